"""
Alpamayo-R1 in one file: a driving model that looks, says why it will act, and drives.

    paper    Alpamayo-R1, arXiv 2511.00088; equation and section numbers below are the paper's
    release  github.com/NVlabs/alpamayo and the Alpamayo-R1-10B weights: every parameter here has the release's name,
             and every numerical convention is checked against values that the official code computed (tests/golden)

What the language model reads, from left to right (Eq. 1), and what the action expert reads of it:

    prompt      <system> <user> [images: camera by camera, oldest frame first] [ego history] <assistant> <|cot_start|>
    reasoning   Yield since a pedestrian crosses ... <|cot_end|> <|traj_future_start|>
    training    <i1503> <i1499> ... 128 action tokens ... <|traj_future_end|>
    driving     keys and values of prompt and reasoning -> expert: 64 noisy controls -> velocity -> 64 controls

The discrete action tokens teach the language model to drive and give reinforcement learning something to score; the
expert, a smaller transformer that reads the language model's key-value cache layer by layer, makes the path that is
driven, by flow matching. No gradient of the expert reaches the language model (knowledge insulation, Sec. 5.1).

Conventions. x forward, y left, z up, metres, seconds; yaw left-positive. Ego frame: rear axle at time t0.
Flow time runs from noise (t = 0) to data (t = 1). Letters in shapes: B scenes, n samples of each, N = B * n,
T tokens, P prompt tokens, H heads, G key-value heads, d head dimension, C channels.

Contents: configuration; motion and actions; tokens; seeing; reading (the language model); driving (the expert);
the whole model with its losses and its sampler; training in less memory; loading and saving.
"""
import json
import math
import os
import re
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from kernels import by_hand
from kernels.flow_step import roll_out_by_kernel
from kernels.prefix_attention import prefix_attention
from kernels.pruned_attention import pruned_attention
from kernels.salience import column_means
from kernels.sampler import sample_flow

# ----------------------------------------------------------------------------------------------------------------------
# Configuration: the defaults are Alpamayo-R1-10B, number by number; a preset names only what differs.


@dataclass
class Config:
    # language model: Qwen3-VL-8B's decoder (Cosmos-Reason2-8B has the same shape)
    n_layer: int = 36
    n_embd: int = 4096
    n_head: int = 32
    n_kv_head: int = 8
    head_dim: int = 128
    n_mlp: int = 12288
    rope_theta: float = 5e6
    mrope_section: tuple = (24, 20, 20)  # how many of the head_dim / 2 frequencies turn with time, height, width
    # vision tower: Qwen3-VL's
    v_layer: int = 27
    v_embd: int = 1152
    v_head: int = 16
    v_mlp: int = 4304
    v_grid: int = 48  # side of the learned grid of position embeddings (48 x 48 = 2304)
    patch: int = 16  # pixels
    merge: int = 2  # merge x merge patches become one token of the language model
    temporal_patch: int = 2  # frames in a patch
    deepstack: tuple = (8, 16, 24)  # tower blocks whose output also enters the first decoder layers
    # action expert: as many layers, key-value heads and the same head_dim as the language model, narrower elsewhere
    e_embd: int = 2048
    e_head: int = 16
    e_mlp: int = 8256
    # embedding of noisy controls and flow time
    a_layer: int = 2
    a_embd: int = 512
    a_fourier: int = 20
    a_max_freq: float = 100.0
    # normalisation of the controls: acceleration m/s^2 and curvature 1/m
    accel_mean: float = 0.02902694707164455
    accel_std: float = 0.6810426736454882
    curvature_mean: float = 0.0002692167976330542
    curvature_std: float = 0.026148280660833106
    # tokens
    bins: int = 3000  # of an action token, over +-bin_range standard deviations
    bin_range: float = 10.0
    history_bins: int = 1000  # of an ego-history token
    text_vocab: int = 151669  # tokens of the text tokenizer; trajectory and special tokens follow
    words: tuple = ()  # a built-in vocabulary of words and bytes; empty: a tokenizer.json, as the release
    # what the model is given
    cameras: tuple = (0, 1, 2, 6)  # cross left, front wide, cross right, front tele
    frames: int = 4  # a camera, the last one at t0
    frame_dt: float = 0.1  # seconds between them
    min_pixels: int = 163840  # images are resized so that their area lies between these; 0: they come as they should be
    max_pixels: int = 196608
    ego: str = "deltas"  # 48 tokens of binned motion, as the release | kinematics: speed, acceleration, steering angle and
    #                      turn signal over 2 s, which the paper's labellers were shown, through an MLP to 4 tokens
    # switches that the release lacks
    chat: bool = True  # the release's words around the images; False: images, ego motion and nothing else
    name_cameras: bool = False  # "Front camera: frame 0 " before images, as Alpamayo-1.5
    pair_frames: bool = False  # successive frames share patches, as Qwen3-VL reads video; False: each frame is an image
    #                            of its own, repeated temporal_patch times, as the release
    view_embed: bool = False  # add a learned embedding of camera and time to image tokens
    route: bool = False  # read the scene's route, "turn left", as text; a scene may also have none
    reasoning: str = "on"  # on: think, then drive | off: drive at once
    # how it sees (Sec. 3.2.1)
    vision: str = "image"  # image: each image its own tokens | triplane: three planes a time step | flex: scene tokens
    keep: float = 1.0  # share of the image tokens that is kept; the least looked at are dropped inside the tower
    keep_at: float = 0.34  # ours: share of the tower's blocks before that; the next block tells who is looked at
    retrieve: float = 1.0  # share of the prompt's image tokens that the reasoning reads back; the expert reads all
    planes: tuple = (96, 96, 48)  # triplane: cells along x, y, z
    planes_patch: tuple = (8, 8, 8)  # cells along x, y, z that become one token
    planes_reach: tuple = (-180.0, 180.0, -180.0, 180.0, -3.0, 45.0)  # m: from and to along x, y, z
    planes_embd: int = 192
    flex_tokens: int = 256  # flex: scene tokens in all; 16 for each of 16 images
    flex_layer: int = 4  # ours, see Flex

    def __post_init__(self):
        for name in ("keep", "retrieve"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in (0, 1], not {getattr(self, name)}")
        if self.vision not in ("image", "triplane", "flex"):
            raise ValueError(f"vision: expected image, triplane or flex, not {self.vision!r}")
        if not 0 <= self.keep_at < 1:
            raise ValueError(f"keep_at: expected a share in [0, 1), not {self.keep_at}")
        if self.vision == "triplane" and any(s % p for s, p in zip(self.planes, self.planes_patch)):
            raise ValueError(f"planes: {self.planes} cells are not whole patches of {self.planes_patch}")

    @property
    def vocab(self) -> int:
        return self.text_vocab + self.bins + self.history_bins + sum(t not in QWEN_TOKENS for t in SPECIAL_TOKENS)

    @property
    def ego_tokens(self) -> int:
        return 48 if self.ego == "deltas" else 4


# What nano and mini share: they learn in the built-in world, and their words are added by `with_words`.
OF_WORLD = dict(
    rope_theta=1e4, accel_mean=0.0, accel_std=1.5, curvature_mean=0.0, curvature_std=0.03, history_bins=0,
    text_vocab=264, frame_dt=0.5, min_pixels=0, max_pixels=0, ego="kinematics", chat=False, pair_frames=True,
    view_embed=True, route=True, planes_reach=(0.0, 120.0, -60.0, 60.0, -1.0, 7.0),
)  # fmt: skip
PRESETS = {
    # a laptop: tests, the demo, the shipped checkpoint. 64 x 128 images: 8 tokens for each camera's pair of frames
    "nano": Config(
        n_layer=4, n_embd=160, n_head=4, n_kv_head=2, head_dim=40, n_mlp=320, mrope_section=(8, 6, 6), v_layer=3,
        v_embd=96, v_head=4, v_mlp=256, v_grid=8, deepstack=(1,), e_embd=96, e_head=4, e_mlp=256, a_embd=96, bins=128,
        bin_range=4.0, planes=(12, 12, 2), planes_patch=(4, 3, 2), planes_embd=64, flex_tokens=20,
        flex_layer=2, **OF_WORLD),
    # one GPU. 128 x 256 images: 32 tokens
    "mini": Config(
        n_layer=12, n_embd=512, n_head=8, n_kv_head=4, head_dim=64, n_mlp=1536, mrope_section=(12, 10, 10), v_layer=8,
        v_embd=384, v_head=6, v_mlp=1536, v_grid=16, deepstack=(1, 3, 5), e_embd=256, e_head=8, e_mlp=768, a_embd=256,
        bins=512, bin_range=5.0, planes=(48, 48, 8), planes_patch=(8, 8, 4), planes_embd=96, flex_tokens=64,
        **OF_WORLD),
    "alpamayo-r1-10b": Config(),
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Motion and actions: a path of 64 poses at 10 Hz <-> 64 pairs of acceleration and curvature of a unicycle (Sec. 3.2.2)

DT, HORIZON = 0.1, 64  # seconds, steps: 6.4 s
CURVATURE_BOUND = 0.33  # 1/m: a 3 m turning radius
LOW_SPEED = 0.6  # m/s: below it a unicycle's curvature cannot be observed


def yaw_of(rot):
    """Heading in rad of rotation matrices (..., 3, 3)."""
    return torch.atan2(rot[..., 1, 0], rot[..., 0, 0])


def rot_of(yaw):
    """Rotation matrices (..., 3, 3) about z of headings (...) in rad."""
    c, s, o, l = yaw.cos(), yaw.sin(), torch.zeros_like(yaw), torch.ones_like(yaw)
    return torch.stack([c, -s, o, s, c, o, o, o, l], -1).unflatten(-1, (3, 3))


def roll_out(actions, v0):
    """Drive a unicycle from the origin of the ego frame, in Euler steps of 0.1 s (Eq. 5).

    actions (..., 64, 2): acceleration m/s^2, curvature 1/m (left-positive); v0 (...): m/s at t0.
    Returns xyz (..., 64, 3) in metres, with z = 0, and rot (..., 64, 3, 3)."""
    if by_hand(actions.device, actions.dtype, even_32_bit=True):
        return roll_out_by_kernel(actions, v0)
    accel, curvature = actions.unbind(-1)
    v0 = v0[..., None]
    v = torch.cat([v0, v0 + DT * accel.cumsum(-1)], -1)  # (..., 65)
    yaw = (DT * curvature * v[..., :-1] + DT**2 / 2 * curvature * accel).cumsum(-1)
    yaw = torch.cat([torch.zeros_like(v0), yaw], -1)
    vx, vy = v * yaw.cos(), v * yaw.sin()
    x = (DT / 2 * (vx[..., :-1] + vx[..., 1:])).cumsum(-1)
    y = (DT / 2 * (vy[..., :-1] + vy[..., 1:])).cumsum(-1)
    return torch.stack([x, y, torch.zeros_like(x)], -1), rot_of(yaw[..., 1:])


def differences(n, order):
    """The matrix (n - order, n) that takes finite differences of that order, divided by DT^order."""
    D = torch.eye(n, dtype=torch.float64)
    for _ in range(order):
        D = (D[1:] - D[:-1]) / DT
    return D


def smooth_solve(A, b, order, smooth, ridge, first=None):
    """Tikhonov least squares: argmin_x |A x - b|^2 + smooth |D x|^2 + ridge |x|^2, D the differences of that order.

    A (..., m, n), b (..., m); first (...): a known x[0], moved to the right-hand side. Normal equations by Cholesky in
    float64: the third differences of 64 values at 10 Hz reach 1e6, too much for float32."""
    n = A.shape[-1]
    D = differences(n, order).to(A.device)
    M = A.mT @ A + smooth * D.mT @ D + ridge * torch.eye(n, dtype=torch.float64, device=A.device)
    rhs = (A.mT @ b[..., None])[..., 0]  # (..., n)
    if first is None:
        return torch.cholesky_solve(rhs[..., None], torch.linalg.cholesky(M))[..., 0]
    rhs = rhs[..., 1:] - M[..., 1:, 0] * first[..., None]
    rest = torch.cholesky_solve(rhs[..., None], torch.linalg.cholesky(M[..., 1:, 1:]))[..., 0]
    return torch.cat([first[..., None], rest], -1)


def unwrap(yaw):
    """Headings (..., T) without jumps of 2 pi."""
    step = yaw.diff(dim=-1)
    step = step - 2 * math.pi * torch.round(step / (2 * math.pi))
    return torch.cat([yaw[..., :1], yaw[..., :1] + step.cumsum(-1)], -1)


def fit_speed(xy, yaw, v0=None):
    """Speed (..., T) in m/s along a path xy (..., T, 2) with headings yaw (..., T), so that Eq. 5 meets each next point."""
    T = xy.shape[-2]
    u = torch.stack([yaw.cos(), yaw.sin()], -1)  # (..., T, 2), the direction of travel
    step = torch.arange(T - 1, device=xy.device)
    A = torch.zeros(*xy.shape[:-2], 2, T - 1, T, dtype=torch.float64, device=xy.device)
    A[..., step, step] = u[..., :-1, :].mT
    A[..., step, step + 1] = u[..., 1:, :].mT
    b = 2 / DT * xy.diff(dim=-2).mT  # (..., 2, T-1): v[t] u[t] + v[t+1] u[t+1] = 2 dp / dt
    return smooth_solve(A.flatten(-3, -2), b.flatten(-2), 3, 1e-6, 1e-4, v0)


def initial_speed(history_xyz, history_rot):
    """Speed in m/s at t0, (...), from ego_history_xyz (..., T, 3) and ego_history_rot (..., T, 3, 3)."""
    yaw = unwrap(yaw_of(history_rot.double()))
    return fit_speed(history_xyz[..., :2].double(), yaw)[..., -1].to(history_xyz.dtype)


def fit_actions(history_xyz, history_rot, future_xyz, future_rot):
    """Acceleration and curvature of a driven path, smoothed against sensor noise (Sec. 3.2.2), as the release does it.

    history (..., 16, 3[, 3]) and future (..., 64, 3[, 3]) in the ego frame at t0. Returns (..., 64, 2) in m/s^2 and 1/m.
    Four small least-squares problems in turn: heading, speed, acceleration, curvature. Where the car hardly moves its
    curvature is 0 / 0, and the fit invents wild values; it is clamped to +-0.33 1/m and zeroed where either end of the
    step is slower than 0.6 m/s. No other step changes."""
    eye = lambda n: torch.eye(n, dtype=torch.float64, device=future_xyz.device)
    xy = torch.cat([torch.zeros_like(future_xyz[..., :1, :2]), future_xyz[..., :2]], -2).double()  # (..., 65, 2)
    raw = unwrap(torch.cat([torch.zeros_like(future_xyz[..., :1, 0]), yaw_of(future_rot)], -1).double())
    start = torch.zeros_like(raw[..., 0])
    yaw = smooth_solve(eye(HORIZON + 1), raw, 3, 1e-6, 1e-8, start)
    v = fit_speed(xy, yaw, initial_speed(history_xyz, history_rot).double())
    accel = smooth_solve(eye(HORIZON), v.diff(dim=-1) / DT, 2, 1e-4, 1e-4)
    arc = DT * v[..., :-1] + DT**2 / 2 * accel  # metres of each step: dyaw = curvature * arc (Eq. 5)
    curvature = smooth_solve(torch.diag_embed(arc), yaw.diff(dim=-1), 2, 1e-4, 1e-4)
    curvature = curvature.clamp(-CURVATURE_BOUND, CURVATURE_BOUND)
    moving = (v[..., :-1].abs() >= LOW_SPEED) & (v[..., 1:].abs() >= LOW_SPEED)
    return torch.stack([accel, curvature * moving], -1).to(future_xyz.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens. One vocabulary: text, then <i0> <i1> ... (action bins, then history bins), then the release's special tokens.

QWEN_TOKENS = ["<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
               "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
SPECIAL_TOKENS = [  # the release's order decides their ids; those that the text tokenizer has keep theirs
    f"<|{name}|>" for name in
    "prompt_start prompt_end image_start image_pre_tkn image_end traj_history_start traj_history_pre_tkn "
    "traj_history_end cot_start cot_end meta_action_start meta_action_end traj_future_start traj_future_pre_tkn "
    "traj_future_end traj_history traj_future image_pad vectorized_wm vectorized_wm_start vectorized_wm_end "
    "vectorized_wm_pre_tkn route_start route_pad route_end question_start question_end answer_start answer_end".split()
]  # fmt: skip


CAMERA_NAMES = {0: "Front left camera", 1: "Front camera", 2: "Front right camera", 3: "Rear left camera",
                4: "Rear camera", 5: "Rear right camera", 6: "Front telephoto camera"}  # what Alpamayo-1.5 calls them


def split_words(text):
    """Words with the space before them, and single characters of everything else: "Stop at 3" -> Stop, " at", " ", 3."""
    return re.findall(r" ?[A-Za-z]+|.", text, flags=re.DOTALL)


class WordTokenizer:
    """256 bytes and a list of words: any text goes in and comes back exactly; known words cost one token each."""

    def __init__(self, words):
        self.words = list(words)
        self.id_of = {w: 256 + i for i, w in enumerate(self.words)}

    def __len__(self):
        return 256 + len(self.words)

    def encode(self, text):
        return [i for w in split_words(text) for i in ([self.id_of[w]] if w in self.id_of else w.encode())]

    def decode(self, ids):
        return b"".join(bytes([i]) if i < 256 else self.words[i - 256].encode() for i in ids).decode(errors="replace")


class FileTokenizer:
    """The backbone's own tokenizer.json, read by the `tokenizers` package."""

    def __init__(self, path):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ImportError(f"{path}: reading it needs one more package: pip install tokenizers") from None
        try:
            self.tokenizer = Tokenizer.from_file(path)
        except Exception as e:  # the package raises bare Exceptions
            raise ValueError(f"{path}: not a tokenizer.json: {e}") from None

    def __len__(self):
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids)


class Vocabulary:
    """Text <-> ids of the whole model. `ids` maps every special token to its number."""

    def __init__(self, cfg, folder=None):
        path = os.path.join(folder or "", "tokenizer.json")
        if folder and os.path.exists(path):
            self.text, self.path = FileTokenizer(path), path
            self.ids = {t: self.text.tokenizer.token_to_id(t) for t in QWEN_TOKENS}
            if len(self.text) != cfg.text_vocab:
                raise ValueError(f"{path}: {len(self.text)} tokens, traj_token_start_idx in config.json is {cfg.text_vocab}")
        elif not cfg.chat:  # a model from scratch: it needs no other words than its own
            self.text, self.path = WordTokenizer(cfg.words), None
            self.ids = {t: len(self.text) + i for i, t in enumerate(QWEN_TOKENS)}
        else:
            raise FileNotFoundError(f"{path}: missing; copy the backbone's there (Qwen3-VL-8B's for the release)")
        self.first_action = cfg.text_vocab
        self.first_history = self.first_action + cfg.bins
        new = [t for t in SPECIAL_TOKENS if t not in self.ids]
        self.ids |= {t: self.first_history + cfg.history_bins + i for i, t in enumerate(new)}

    def __getitem__(self, name):
        return self.ids[f"<|{name}|>"]

    def encode(self, text):
        """Text, possibly with <|special|> tokens in it, to a list of ids."""
        pieces = re.split(r"(<\|[a-z_]+\|>)", text)
        return [i for p in pieces if p for i in ([self.ids[p]] if p in self.ids else self.text.encode(p))]

    def decode(self, ids):
        """The text of a list of ids; trajectory and special tokens are left out."""
        special = set(self.ids.values())
        return self.text.decode([i for i in ids if i < self.first_action and i not in special])


def to_bins(x, low, high, bins):
    """Values to the numbers of the nearest of `bins` evenly spaced levels from low to high; out of range: the end ones."""
    return ((x - low) / (high - low) * (bins - 1)).round().clamp(0, bins - 1).long()


def from_bins(i, low, high, bins):
    """The levels that to_bins chose."""
    return low + i.float() / (bins - 1) * (high - low)


def history_bins(history_xyz, bins):
    """Ego history (B, 16, 3) to 48 bin numbers (B, 48): steps in x, y, z, within +-4, +-4, +-10 m. The release takes the
    first step from the ego frame's origin, some 20 m ahead at speed, so its x is nearly always the lowest bin."""
    step = F.pad(history_xyz, (0, 0, 1, 0)).diff(dim=1)
    high = torch.tensor([4.0, 4.0, 10.0], device=step.device)
    return to_bins(step, -high, high, bins).flatten(1)


# ----------------------------------------------------------------------------------------------------------------------
# Seeing: images -> patches -> tower -> tokens of the language model (Qwen3-VL's vision tower)


def project(points, intrinsics):
    """
    Pixels of points. points (..., 3) in camera axes; intrinsics (10,), or any (..., 10) that broadcasts to points:
    [kind, width, height, cx, cy, a0, a1, a2, a3, a4]. Kind 0 is f-theta: pixel radius = a0 + a1 th + .. + a4 th^4 with
    th the angle off the optical axis in rad. Kind 1 is a pinhole: a0 = fx, a1 = fy.
    Returns pixels (..., 2), u right and v down with pixel centres at integer + 0.5, and visible (...) bool.
    """
    kind, width, height, cx, cy, a0, a1, a2, a3, a4 = intrinsics.unbind(-1)
    x, y, z = points.unbind(-1)
    rho = torch.hypot(x, y)
    th = torch.atan2(rho, z)  # 0 ahead, pi behind: no division by z
    radius = a0 + th * (a1 + th * (a2 + th * (a3 + th * a4)))
    slope = a1 + th * (2 * a2 + th * (3 * a3 + th * 4 * a4))  # where it turns back the polynomial means nothing
    scale = torch.where(rho > 0, radius / rho.clamp(min=1e-9), 0)
    depth = z.clamp(min=1e-6)
    pinhole = kind == 1
    u = cx + torch.where(pinhole, a0 * x / depth, scale * x)
    v = cy + torch.where(pinhole, a1 * y / depth, scale * y)
    ahead = torch.where(pinhole, z > 1e-6, (slope > 0) & (th < 2.0))  # no lens here sees 115 degrees off its axis
    visible = ahead & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    return torch.stack([u, v], -1), visible


def resize(images, cfg):
    """The release's resizing of (..., 3, H, W) uint8: both sides to multiples of 32 pixels, the area within
    [min_pixels, max_pixels], bicubic with antialiasing. 1080 x 1920 becomes 320 x 576."""
    H, W = images.shape[-2:]
    unit = cfg.patch * cfg.merge
    if not cfg.max_pixels:
        if H % unit or W % unit:
            raise ValueError(f"images: {H} x {W} pixels; height and width must be multiples of {unit}, patch x merge")
        return images
    h, w = max(1, round(H / unit)) * unit, max(1, round(W / unit)) * unit
    if h * w > cfg.max_pixels:
        shrink = math.sqrt(H * W / cfg.max_pixels)
        h, w = (max(unit, math.floor(s / shrink / unit) * unit) for s in (H, W))
    elif h * w < cfg.min_pixels:
        grow = math.sqrt(cfg.min_pixels / (H * W))
        h, w = (math.ceil(s * grow / unit) * unit for s in (H, W))
    if (h, w) == (H, W):
        return images
    flat = images.flatten(0, -4).float()
    flat = F.interpolate(flat, (h, w), mode="bicubic", antialias=True, align_corners=False)
    return flat.round().clamp(0, 255).to(torch.uint8).view(*images.shape[:-2], h, w)


def patchify(images, cfg):
    """Images (M, frames, 3, H, W) uint8, frames = temporal_patch, to patches (M, h * w, 3 * frames * patch^2) in -1..1.

    Patches are ordered so that each merge x merge group, one token later, is contiguous."""
    p, m = cfg.patch, cfg.merge
    M, T, _, H, W = images.shape
    x = images.float() / 127.5 - 1
    x = x.view(M, T, 3, H // p // m, m, p, W // p // m, m, p)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(M, H // p * (W // p), 3 * T * p * p)


def rotate(x, cos, sin):
    """Rotary position embedding of x (..., T, d) by angles whose cos and sin are (..., T, d / 2); dimension i turns with
    i + d / 2."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class PatchEmbed(nn.Module):
    """The release's 3D convolution over patches that do not overlap is one matrix product."""

    def __init__(self, cfg):
        super().__init__()
        size = (cfg.temporal_patch, cfg.patch, cfg.patch)
        self.proj = nn.Conv3d(3, cfg.v_embd, size, size)

    def forward(self, patches):
        return F.linear(patches.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


class VisionAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.v_head
        self.qkv = nn.Linear(cfg.v_embd, 3 * cfg.v_embd)
        self.proj = nn.Linear(cfg.v_embd, cfg.v_embd)

    def heads(self, x, cos, sin):
        """Queries, keys and values (M, H, S, d) each; turned, but for those without a place in an image (cos = None)."""
        M, S, C = x.shape
        q, k, v = self.qkv(x).view(M, S, 3, self.n_head, C // self.n_head).unbind(2)
        if cos is not None:  # (S, d / 2) or (M, S, d / 2)
            q, k = (rotate(a, cos[..., None, :], sin[..., None, :]).to(v.dtype) for a in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, cos, sin, images=None, heads=None):
        """x (M, S, C): every patch of a row sees every other. images: or the rows hold images, which do not mix: what
        `pruned_attention` is told of them. heads: those of before x was pruned, from which images names its rows."""
        q, k, v = heads or self.heads(x, cos, sin)
        if images is None:
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        else:
            y = pruned_attention(*(a.transpose(1, 2).flatten(0, 1) for a in (q, k, v)), *images)  # (patches, H, d)
        return self.proj(y.reshape(x.shape))


class VisionMLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.linear_fc1 = nn.Linear(cfg.v_embd, cfg.v_mlp)
        self.linear_fc2 = nn.Linear(cfg.v_mlp, cfg.v_embd)

    def forward(self, x):
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.v_embd, eps=1e-6)
        self.norm2 = nn.LayerNorm(cfg.v_embd, eps=1e-6)
        self.attn = VisionAttention(cfg)
        self.mlp = VisionMLP(cfg)

    def forward(self, x, cos=None, sin=None, images=None, heads=None):
        x = x + self.attn(self.norm1(x), cos, sin, images, heads)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """merge x merge patches to one token of the language model. DeepStack's mergers normalise after the grouping."""

    def __init__(self, cfg, norm_after):
        super().__init__()
        self.norm_after = norm_after
        self.group = cfg.v_embd * cfg.merge**2
        self.norm = nn.LayerNorm(self.group if norm_after else cfg.v_embd, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.group, self.group)
        self.linear_fc2 = nn.Linear(self.group, cfg.n_embd)

    def forward(self, x):
        x = x if self.norm_after else self.norm(x)
        x = x.reshape(len(x), -1, self.group)
        x = self.norm(x) if self.norm_after else x
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


def take(x, places):
    """Rows `places` (B, K) of x (B, V, ...): (B, K, ...), each scene its own."""
    return x[torch.arange(len(x), device=x.device)[:, None], places]


def look_up(maps, points, intrinsics, camera_to_ego):
    """What each camera shows at points (n, 3) in m of the ego frame: of maps (B, cameras, C, h, w) the bilinear value
    where a point is projected to, (B, cameras, n, C), and whether the camera sees it, (B, cameras, n)."""
    points = (points - camera_to_ego[..., None, :3, 3]) @ camera_to_ego[..., :3, :3]  # (B, cameras, n, 3), camera axes
    pixels, visible = project(points, intrinsics[..., None, :])
    at = 2 * pixels / intrinsics[..., None, 1:3] - 1  # -1 and 1: the image's edges, whatever it was resized to
    at = at.masked_fill(~visible[..., None], 0).flatten(0, 1)[:, :, None]  # (B * cameras, n, 1, 2)
    exact = torch.promote_types(maps.dtype, at.dtype)  # bfloat16 would tell 256 places apart
    found = F.grid_sample(maps.flatten(0, 1).to(exact), at.to(exact), padding_mode="border", align_corners=False)
    return found[..., 0].mT.unflatten(0, maps.shape[:2]).to(maps.dtype), visible


class Triplane(nn.Module):
    """What all cameras of a time step see, as three planes around the car (arXiv 2506.12251, Sec. 3.2.1).

    Space is a grid of cells (X, Y, Z). A cell's learned query looks up the image features where its centre is projected
    to in every camera, bilinearly, and attends to those that see it, or to nothing; the updated cells are averaged along
    z, y and x to planes xy, xz, yz, and patches of these are the tokens.

    Left open there, and ours: queries are the sum of one learned vector for each x, y and z (a free one a cell would be
    85 M parameters, the paper adds 6.3 M); one layer, one sampling point a cell and camera; reading "the inner 36 cells
    reach 80 m" as 36 of each side's 48. Time steps do not mix; the space is around where the car was then."""

    slab = 2**13  # cells at a time: all 442,368 of full size would hold 11 GB of samples for a scene

    def __init__(self, cfg):
        super().__init__()
        self.cells, self.patch, self.reach = cfg.planes, cfg.planes_patch, cfg.planes_reach
        C = cfg.planes_embd
        self.head_dim = math.gcd(C, 32)
        self.queries = nn.Parameter(torch.zeros(1, sum(self.cells), C))
        self.norm = nn.LayerNorm(cfg.v_embd, eps=1e-6)
        self.q, self.kv, self.proj = nn.Linear(C, C), nn.Linear(cfg.v_embd, 2 * C), nn.Linear(C, C)
        self.norm2 = nn.LayerNorm(C, eps=1e-6)
        self.linear_fc1, self.linear_fc2 = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.norm3 = nn.LayerNorm(C, eps=1e-6)
        px, py, pz = self.patch
        self.patchify = nn.ModuleList(nn.Linear(C * n, cfg.n_embd) for n in (px * py, px * pz, py * pz))
        self.times = nn.Parameter(torch.zeros(1, times_of(cfg), cfg.n_embd))

    def grids(self):
        """Rows and columns of the planes' tokens: x by y, x by z, y by z."""
        x, y, z = (s // p for s, p in zip(self.cells, self.patch))
        return [(x, y), (x, z), (y, z)]

    def centres(self, device=None):
        """Where the cells are, (X, Y, Z, 3) in m in the ego frame. Along x and y three quarters of the cells share the
        inner 80 / 180 of the reach, evenly; the outer quarter has the rest."""
        axes = []
        for n, low, high in zip(self.cells, self.reach[::2], self.reach[1::2]):
            at = low + (high - low) * (torch.arange(n, device=device) + 0.5) / n
            if len(axes) < 2:
                far = max(-low, high)
                u = at.abs() / far
                at = at.sign() * far * torch.where(u < 0.75, u * (16 / 27), 4 / 9 + (u - 0.75) * (20 / 9))
            axes.append(at)
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)

    def update(self, cells, centres, maps, times, intrinsics, camera_to_ego):
        """Cells (n, C) at centres (n, 3) after their look at maps (B, cameras, times * (2 C + 1), h, w) of keys, values and
        whether they are known, 1 or 0: (B * times, n, C)."""
        C, d = cells.shape[-1], self.head_dim
        x, visible = look_up(maps, centres, intrinsics, camera_to_ego)
        x = x.unflatten(-1, (times, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)  # (B * times, cameras, n, 2 C + 1)
        k, v = x[..., :-1].unflatten(-1, (2, C // d, d)).unbind(-3)  # (B * times, cameras, n, H, d)
        share = x[..., -1:]  # of the bilinear weights: what lies on patches that were not pruned
        seen = (share > 0.5) & visible.repeat_interleave(times, 0)[..., None]
        share = share.clamp(min=0.5)
        q = self.q(cells).unflatten(-1, (-1, d))
        score = ((q * k).sum(-1) * d**-0.5 / share).masked_fill(~seen, -torch.inf)  # (B * times, cameras, n, H)
        weight = torch.cat([score, torch.zeros_like(score[:, :1])], 1).softmax(1)[:, :-1]  # the last one is nothing
        cells = cells + self.proj(((weight / share)[..., None] * v).sum(1).flatten(2))
        return cells + self.linear_fc2(F.gelu(self.linear_fc1(self.norm2(cells)), approximate="tanh"))

    def lift(self, x, kept, view, intrinsics, camera_to_ego):
        """Patches x (B, K * merge^2, v_embd) of the groups `kept` (B, K) of view = (cameras, times, h, w) to planes
        (B * times, X, Y, C), (B * times, X, Z, C), (B * times, Y, Z, C)."""
        (cameras, times, h, w), B, K = view, *kept.shape
        m = math.isqrt(x.shape[1] // K)
        x = self.kv(self.norm(x))
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1).view(B, K, -1)
        x = x.new_zeros(B, cameras * times * h * w, x.shape[-1]).scatter(1, kept[..., None].expand_as(x), x)
        x = x.view(B, cameras, times, h, w, m, m, -1).permute(0, 1, 2, 7, 3, 5, 4, 6)  # .., 2 C + 1, h, m, w, m
        maps = x.reshape(B, cameras, -1, h * m, w * m)
        qx, qy, qz = self.queries[0].split(self.cells)
        slabs, n = [], max(1, self.slab // (len(qy) * len(qz)))
        for q, centres in zip(qx.split(n), self.centres(x.device).split(n)):
            cells = (q[:, None, None] + qy[:, None] + qz).flatten(0, 2)
            cells = self.update(cells, centres.flatten(0, 2), maps, times, intrinsics, camera_to_ego)
            slabs.append(cells.unflatten(1, (-1, len(qy), len(qz))))
        cells = torch.cat(slabs, 1)  # (B * times, X, Y, Z, C)
        return cells.mean(3), cells.mean(2), cells.mean(1)

    def forward(self, x, kept, view, intrinsics, camera_to_ego):
        """See `lift`. Returns tokens (B, times * tokens of the three planes, n_embd)."""
        tokens = []
        for plane, (r, c), to_token in zip(self.lift(x, kept, view, intrinsics, camera_to_ego), self.grids(), self.patchify):
            N, R, S, C = plane.shape
            patches = self.norm3(plane).view(N, r, R // r, c, S // c, C).transpose(2, 3)
            tokens.append(to_token(patches.reshape(N, r * c, -1)))
        tokens = torch.cat(tokens, 1).unflatten(0, (len(kept), -1))  # (B, times, T, n_embd)
        return (tokens + self.times[0, :, None]).flatten(1, 2)


class Flex(nn.Module):
    """Learned scene tokens beside all image tokens of all cameras and times in a few layers of joint self-attention; only
    the scene tokens go on (arXiv 2512.10947, Sec. 3.2.1). It needs no calibration.

    Left open there, and ours: the layers are the tower's own kind, without rotation, and four of them: at full size 61.0 M
    parameters, where the paper adds 61.6 M in all; and 5.3 M that join the patches of a merge group to one image token,
    for their mean, as the paper's default halves its features, was seen to learn more slowly."""

    def __init__(self, cfg):
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, cfg.flex_tokens, cfg.v_embd))
        self.views = nn.Parameter(torch.zeros(7, times_of(cfg), cfg.v_embd))  # by camera id and time
        self.join = nn.Linear(cfg.v_embd * cfg.merge**2, cfg.v_embd)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.flex_layer))
        self.norm = nn.LayerNorm(cfg.v_embd, eps=1e-6)
        self.out = nn.Linear(cfg.v_embd, cfg.n_embd)

    def forward(self, x, kept, view, camera_ids):
        """Patches x (B, K * merge^2, v_embd) of the groups `kept` (B, K) of view = (cameras, times, h, w), camera_ids
        (B, cameras). Returns tokens (B, flex_tokens, n_embd)."""
        (B, K), S = kept.shape, view[2] * view[3]
        x = self.join(x.view(B, K, -1)) + take(self.views[camera_ids].flatten(1, 2), kept // S)
        x = torch.cat([self.tokens.expand(B, -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x[:, : self.tokens.shape[1]]))


def times_of(cfg):
    """Time steps of a camera that become tokens of their own."""
    return cfg.frames // cfg.temporal_patch if cfg.pair_frames else cfg.frames


class VisionTower(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = PatchEmbed(cfg)
        self.pos_embed = nn.Embedding(cfg.v_grid**2, cfg.v_embd)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.v_layer))
        if cfg.vision == "triplane":
            self.triplane = Triplane(cfg)
        elif cfg.vision == "flex":
            self.flex = Flex(cfg)
        else:  # DeepStack belongs to this one: planes and scene tokens are at no place in an image
            self.merger = Merger(cfg, norm_after=False)
            self.deepstack_merger_list = nn.ModuleList(Merger(cfg, norm_after=True) for _ in cfg.deepstack)

    def by_group(self, grid):
        """(h * w, C) in rows to the order of `patchify`: (h/m, w/m, m, m)."""
        h, w, C = grid.shape
        m = self.cfg.merge
        return grid.view(h // m, m, w // m, m, C).transpose(1, 2).reshape(h * w, C)

    def positions(self, h, w, device):
        """The learned grid of embeddings, bilinearly resampled to h x w: (h * w, C); cos and sin of the rotary angles:
        the first half of the frequencies turns with the row, the second with the column, (h * w, d / 2) each."""
        grid = self.pos_embed.weight.T.unflatten(1, (self.cfg.v_grid, self.cfg.v_grid))[None]  # (1, C, 48, 48)
        embed = F.interpolate(grid.float(), (h, w), mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
        quarter = self.cfg.v_embd // self.cfg.v_head // 4
        freqs = 1e4 ** -(torch.arange(quarter, device=device) / quarter)
        rows = (torch.arange(h, device=device)[:, None] * freqs)[:, None].expand(h, w, quarter)
        cols = (torch.arange(w, device=device)[:, None] * freqs)[None].expand(h, w, quarter)
        angle = self.by_group(torch.cat([rows, cols], -1))
        return self.by_group(embed).to(grid.dtype), angle.cos(), angle.sin()

    def prune(self, q, k, scenes, keep):
        """Which merge groups a block looks at most, by its queries and keys (M, H, h * w, d): (scenes, K) of all V = M /
        scenes * S groups, ascending. All images of a scene compete; salience is the mean attention that a group's patches
        receive (SparseVILA). Rank across images, one block, all heads alike: ours, since its authors do not say."""
        salience = column_means(q, k).view(scenes, -1, self.cfg.merge**2).mean(-1)  # (scenes, V)
        return salience.topk(max(1, round(keep * salience.shape[1]))).indices.sort().values

    def forward(self, images, scenes=1, keep=1.0):
        """Images (M, temporal_patch, 3, H, W) uint8, M / scenes of each scene, to what the decoder adds or an encoder
        reads, of the K = keep * V groups of a scene that stay: patches (scenes, K * merge^2, C), those after the blocks of
        DeepStack, a list of the same, and which groups they are, (scenes, K), ascending."""
        h, w = images.shape[-2] // self.cfg.patch, images.shape[-1] // self.cfg.patch
        embed, cos, sin = self.positions(h, w, images.device)
        x = self.patch_embed(patchify(images, self.cfg)) + embed  # (M, h * w, C)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        m2 = self.cfg.merge**2
        S, deep, images_left = h * w // m2, [], None
        kept = torch.arange(len(x) // scenes * S, device=x.device).expand(scenes, -1)
        for i, block in enumerate(self.blocks):
            heads = None
            if keep < 1 and i == int(self.cfg.keep_at * len(self.blocks)):
                # From here on a scene is one row of patches, image after image. This block has all heads already.
                heads = block.attn.heads(block.norm1(x), cos, sin)
                kept = self.prune(*heads[:2], scenes, keep)
                stay = lambda a: take(a.reshape(scenes, -1, m2, a.shape[-1]), kept).flatten(1, 2)
                x, deep = stay(x), [stay(a) for a in deep]
                cos, sin = (stay(a.expand(len(images), -1, -1)) for a in (cos, sin))
                group = (kept + torch.arange(scenes, device=x.device)[:, None] * (len(images) // scenes * S)).flatten()
                offsets = m2 * torch.searchsorted(group, S * torch.arange(len(images) + 1, device=x.device))
                images_left = offsets, h * w
                rows = (m2 * group[:, None] + torch.arange(m2, device=x.device)).flatten()
            x = block(x, cos, sin, images_left if heads is None else (*images_left, rows), heads)
            if i in self.cfg.deepstack:
                deep.append(x)
        by_scene = lambda a: a.reshape(scenes, -1, a.shape[-1])
        return by_scene(x), [by_scene(a) for a in deep], kept


# ----------------------------------------------------------------------------------------------------------------------
# Reading: the decoder (Qwen3) with interleaved M-RoPE, and attention over a prompt that n samples share


def image_positions(ids, image_pad, grids):
    """M-RoPE positions (3, P) of a prompt (P,) whose images fill grids of (h, w) tokens: time, height, width.

    Text moves all three together. An image stands still in time and spreads over rows and columns; what follows it
    continues after the largest of them. So 180 tokens of a 10 x 18 image take 18 positions. Ours: a plane of `Triplane`
    is an image; a scene token of `Flex` is an image of 1 x 1, and so moves as a word does."""
    axes, at, i = [], 0, 0
    ids, grids = ids.tolist(), iter(grids)
    while i < len(ids):
        if ids[i] == image_pad:
            h, w = next(grids)
            rows, columns = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
            axes.append(torch.stack([torch.zeros(h * w).long(), rows, columns]) + at)
            at, i = at + max(h, w), i + h * w
        else:
            axes.append(torch.full((3, 1), at))
            at, i = at + 1, i + 1
    return torch.cat(axes, 1)


def rope(positions, cfg, dtype):
    """cos and sin (B, 1, T, head_dim / 2) of M-RoPE positions (3, B, T). Interleaved: frequencies 1, 4, 7, ... turn with
    height and 2, 5, 8, ... with width, as far as their sections reach; all others with time."""
    half = cfg.head_dim // 2
    axis = torch.zeros(half, dtype=torch.long)
    axis[1 : 3 * cfg.mrope_section[1] : 3] = 1
    axis[2 : 3 * cfg.mrope_section[2] : 3] = 2
    freqs = cfg.rope_theta ** -(torch.arange(half, device=positions.device) / half)
    angle = positions[axis.to(positions.device)].permute(1, 2, 0).float() * freqs  # (B, T, half)
    return angle.cos()[:, None].to(dtype), angle.sin()[:, None].to(dtype)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys (Qwen3)."""

    def __init__(self, cfg, n_embd, n_head):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = n_head, cfg.n_kv_head, cfg.head_dim
        self.q_proj = nn.Linear(n_embd, n_head * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(n_embd, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(n_embd, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(n_head * cfg.head_dim, n_embd, bias=False)
        self.q_norm = nn.RMSNorm(cfg.head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(cfg.head_dim, eps=1e-6)

    def forward(self, x, cos, sin, past=None, ask=0):
        """x (N, T, C) to (N, T, C) and this layer's keys and values. Without a past: causal. With one,
        (k0, v0, mask0, k1, v1, mask1): over the shared prefix, then the own tail, then these T tokens, not causal.
        ask: beside keys and values, how much attention each token receives from the last so many, (N, T)."""
        N, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(N, T, self.n_head, self.head_dim)).transpose(1, 2)  # (N, H, T, d)
        k = self.k_norm(self.k_proj(x).view(N, T, self.n_kv_head, self.head_dim)).transpose(1, 2)  # (N, G, T, d)
        v = self.v_proj(x).view(N, T, self.n_kv_head, self.head_dim).transpose(1, 2).contiguous()  # as it will be read
        q, k = (rotate(a, cos, sin).to(v.dtype) for a in (q, k))  # CUDA's autocast norms in float32
        if past is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n_head != self.n_kv_head)
        else:
            k0, v0, mask0, k1, v1, mask1 = past
            if k1 is not None:
                k, v = torch.cat([k1, k], 2), torch.cat([v1, v], 2)
            y = prefix_attention(q, k0, v0, k, v, mask0, mask1)
        kv = (k, v, column_means(q[:, :, -ask:], k, causal=True)) if ask else (k, v)
        return self.o_proj(y.transpose(1, 2).reshape(N, T, -1)), kv


class MLP(nn.Module):
    def __init__(self, n_embd, n_mlp):
        super().__init__()
        self.gate_proj = nn.Linear(n_embd, n_mlp, bias=False)
        self.up_proj = nn.Linear(n_embd, n_mlp, bias=False)
        self.down_proj = nn.Linear(n_mlp, n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A decoder layer; language model and expert are stacks of them."""

    def __init__(self, cfg, n_embd, n_head, n_mlp):
        super().__init__()
        self.self_attn = Attention(cfg, n_embd, n_head)
        self.mlp = MLP(n_embd, n_mlp)
        self.input_layernorm = nn.RMSNorm(n_embd, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(n_embd, eps=1e-6)

    def forward(self, x, cos, sin, past=None, ask=0):
        y, kv = self.self_attn(self.input_layernorm(x), cos, sin, past, ask)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), kv


class LanguageModel(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab, cfg.n_embd)
        self.layers = nn.ModuleList(Layer(cfg, cfg.n_embd, cfg.n_head, cfg.n_mlp) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd, eps=1e-6)

    def forward(self, x, cos, sin, past=None, seen=None, ask=0):
        """x (N, T, C) to (N, T, C) and the layers' keys and values. `past`, `ask`: for every layer, see Attention.
        `seen`: (where, features): DeepStack's features are added to the image tokens after the first layers."""
        cache = []
        for i, layer in enumerate(self.layers):
            x, kv = layer(x, cos, sin, past[i] if past else None, ask)
            cache.append(kv)
            if seen is not None and i < len(seen[1]):
                where, deep = seen  # where (B, V): the image tokens' places in the prompt
                x = x.scatter_add(1, where[..., None].expand_as(deep[i]), deep[i].to(x.dtype))
        return self.norm(x), cache


class Backbone(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.visual = VisionTower(cfg)
        self.language_model = LanguageModel(cfg)


class VLM(nn.Module):
    """Qwen3-VL; the nesting is that of the release's parameter names."""

    def __init__(self, cfg):
        super().__init__()
        self.model = Backbone(cfg)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab, bias=False)


# ----------------------------------------------------------------------------------------------------------------------
# Driving: the action expert and flow matching (Sec. 3.2.2, 5.1)


class Fourier(nn.Module):
    """A number to sines and cosines of `features` / 2 frequencies, evenly spaced in log from 1 to max_freq."""

    def __init__(self, features, max_freq):
        super().__init__()
        self.register_buffer("freqs", torch.logspace(0, math.log10(max_freq), features // 2)[None])

    def forward(self, x):
        angle = x[..., None] * self.freqs[0] * (2 * math.pi)
        return math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], -1)


class ActionEmbed(nn.Module):
    """Noisy controls (N, 64, 2) and flow time (N,) to the expert's 64 input tokens (N, 64, e_embd)."""

    def __init__(self, cfg):
        super().__init__()
        self.sinus = nn.ModuleList(Fourier(cfg.a_fourier, cfg.a_max_freq) for _ in range(2))
        self.timestep_fourier_encoder = Fourier(cfg.a_fourier, cfg.a_max_freq)
        trunk, width = [], 3 * cfg.a_fourier
        for _ in range(cfg.a_layer):
            trunk += [nn.Linear(width, cfg.a_embd), nn.SiLU(), nn.RMSNorm(cfg.a_embd, eps=1e-5)]
            width = cfg.a_embd
        self.encoder = nn.Module()
        self.encoder.trunk = nn.Sequential(*trunk, nn.Linear(width, cfg.e_embd))
        self.norm = nn.LayerNorm(cfg.e_embd)

    def forward(self, x, t):
        t = self.timestep_fourier_encoder(t)[:, None].expand(-1, x.shape[1], -1)
        x = torch.cat([self.sinus[0](x[..., 0]), self.sinus[1](x[..., 1]), t], -1)  # (N, 64, 3 * features)
        return self.norm(self.encoder.trunk(x.to(self.norm.weight.dtype)))


OF_EXPERT = ("expert.", "action_in_proj.", "action_out_proj.")  # how the names of its parameters begin


class Expert(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.ModuleList(Layer(cfg, cfg.e_embd, cfg.e_head, cfg.e_mlp) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.e_embd, eps=1e-6)

    def forward(self, x, cos, sin, past):
        """x (N, 64, C) over the language model's keys and values: `past` has a tuple for every layer, see Attention."""
        for layer, layer_past in zip(self.layers, past):
            x, _ = layer(x, cos, sin, layer_past)
        return self.norm(x)


def flow_time(n, generator=None, device=None):
    """Training times (n,): t = 0.999 (1 - b), b ~ Beta(1.5, 1), so more often near the noise. Its quantile is u^(2/3)."""
    u = torch.rand(n, generator=generator, device=device)
    return 0.999 * (1 - u ** (1 / 1.5))


def flow_step(x, velocity, t, dt, eta=0.0):
    """One step of the sampler from x_t (..., 64, 2) at flow time t by dt: the mean of x_{t + dt} and its standard deviation.

    The straight line through x_t has its data end at d = x_t + (1 - t) v and its noise end at e = x_t - t v. Euler goes on
    along it, s d + (1 - s) e with s = t + dt. Reinforcement learning needs a step that has a probability, so a share of
    the noise is drawn anew, and the two coefficients stay what training showed (Coefficients-Preserving Sampling, arXiv
    2509.05952): s d + (1 - s) (cos(a) e + sin(a) n), with a = eta pi / 2 and n ~ N(0, I). eta = 0 is Euler, to the bit;
    the last step, to s = 1, is always Euler's."""
    s, a = t + dt, eta * math.pi / 2
    mean = x + dt * velocity - (1 - s) * (1 - math.cos(a)) * (x - t * velocity)
    return mean, (1 - s) * math.sin(a) if 1 - s > 1e-9 else 0.0


def gaussian_log_prob(x, mean, std):
    """log N(x; mean, std^2 I) of (..., 64, 2), summed over the last two dimensions."""
    return (-0.5 * ((x - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))).sum((-2, -1))


class ActionSpace(nn.Module):
    """Controls <-> numbers of mean 0 and standard deviation about 1."""

    def __init__(self, cfg):
        super().__init__()
        for name in ("accel_mean", "accel_std", "curvature_mean", "curvature_std"):
            self.register_buffer(name, torch.tensor(getattr(cfg, name)))

    def moments(self):
        mean, std = (self.accel_mean, self.curvature_mean), (self.accel_std, self.curvature_std)
        return torch.stack(mean).float(), torch.stack(std).float()

    def normalise(self, actions):
        mean, std = self.moments()
        return (actions - mean) / std

    def restore(self, normalised):
        mean, std = self.moments()
        return normalised.float() * std + mean


class EgoEmbed(nn.Module):
    """ego = kinematics: (B, 20, 4) of speed, acceleration, steering angle, turn signal to 4 tokens of half a second each."""

    def __init__(self, cfg):
        super().__init__()
        self.fc1 = nn.Linear(20, cfg.n_embd)
        self.fc2 = nn.Linear(cfg.n_embd, cfg.n_embd)

    def forward(self, kinematics):
        scale = torch.tensor([0.1, 0.5, 10.0, 1.0], device=kinematics.device)  # to numbers of about 1
        x = (kinematics * scale).unflatten(1, (4, 5)).flatten(2)  # (B, 4, 20)
        return self.fc2(F.gelu(self.fc1(x.to(self.fc1.weight.dtype))))


# ----------------------------------------------------------------------------------------------------------------------
# The whole model: prompt, losses of the stages `action` and `reason`, and sampling


@dataclass
class Rollout:
    """n samples of B scenes: what the model thought and where it would drive."""

    reasoning: list  # B lists of n str
    tokens: torch.Tensor  # (B, n, T): generated ids up to <|traj_future_start|>, or the last action token; then padding
    log_probs: torch.Tensor  # (B, n, T): of these tokens, as they were drawn; 0 where there was no choice, or padding
    actions: torch.Tensor  # (B, n, 64, 2): m/s^2, 1/m
    xyz: torch.Tensor  # (B, n, 64, 3): m, ego frame at t0
    rot: torch.Tensor  # (B, n, 64, 3, 3)
    flow: torch.Tensor  # (steps + 1, B, n, 64, 2): normalised controls on their way from noise to data; no steps: tokens
    seconds: dict  # vision, prefill, reasoning, flow


class Alpamayo(nn.Module):
    def __init__(self, cfg: Config, vocabulary: Vocabulary = None):
        super().__init__()
        self.cfg = cfg
        self.vocabulary = vocabulary
        self.vlm = VLM(cfg)
        self.expert = Expert(cfg)
        self.action_space = ActionSpace(cfg)
        self.action_in_proj = ActionEmbed(cfg)
        self.action_out_proj = nn.Linear(cfg.e_embd, 2)
        if cfg.ego == "kinematics":
            self.ego_embed = EgoEmbed(cfg)
        if cfg.view_embed and cfg.vision == "image":
            self.view_embed = nn.Parameter(torch.zeros(7, times_of(cfg), cfg.n_embd))  # by camera id and time

    @property
    def device(self):
        return self.action_out_proj.weight.device

    def init_weights(self, generator=None):
        """From scratch. Matrices are normal with standard deviation 1 / sqrt(fan in); what a layer adds to the residual
        stream is zero at first, so that training starts from the identity."""
        adds = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "mlp.linear_fc2.weight", "action_out_proj.weight")
        tables = ("embed_tokens.weight", "pos_embed.weight", "view_embed", ".queries", ".times", ".tokens", ".views")
        for name, p in self.named_parameters():
            if name.endswith(adds):
                nn.init.zeros_(p)
            elif name.endswith(tables):
                nn.init.normal_(p, std=0.5, generator=generator)
            elif p.ndim > 1:
                nn.init.normal_(p, std=p[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            if ".flex." in name and name.endswith("qkv.weight"):
                p.data[: 2 * p.shape[1]] *= 2  # queries, keys: a scene token starts with a few image tokens, not the mean

    @staticmethod
    def from_pretrained(folder, dtype=torch.float32, device="cpu", **switches):
        """A checkpoint of ours, or Alpamayo-R1-10B / Alpamayo-1.5-10B as released with the backbone's tokenizer.json put
        beside it. switches: fields of Config to change, as keep=0.5. Raises FileNotFoundError or ValueError with one line
        that names file and field."""
        cfg = replace(read_config(folder), **switches)
        with torch.device("meta"):
            model = Alpamayo(cfg, Vocabulary(cfg, folder))
        load_weights(model, folder, dtype, device)
        return model

    def save_pretrained(self, folder, dtype=None, shard_bytes=5 * 2**30):
        """Write a checkpoint in the release's format; dtype: of the weights on disk (default: as they are)."""
        save_weights(self, folder, dtype, shard_bytes)
        source, target = self.vocabulary.path, os.path.join(folder, "tokenizer.json")
        if source and os.path.abspath(source) != os.path.abspath(target):
            write_atomically(target, lambda part: shutil.copyfile(source, part))
        write_json(os.path.join(folder, "vlm", "config.json"), vlm_config(self.cfg))
        write_json(os.path.join(folder, "config.json"), release_config(self.cfg))

    # ------------------------------------------------------------------------------------------------------ the prompt

    def prompt_ids(self, camera_ids, images, reason, route=""):
        """The prompt's ids (P,): placeholders of `images`, the grids of each, camera by camera, ego history, route (the
        paper leaves its form open: here it is text between the release's route tokens), instruction."""
        cfg = self.cfg
        pads = ["<|image_pad|>" * sum(h * w for h, w in grids) for grids in images]
        history = "<|traj_history|>" * cfg.ego_tokens
        route = f"<|route_start|>{route}<|route_end|>" if route else ""
        if cfg.chat:
            pads = [f"<|vision_start|>{pad}<|vision_end|>" for pad in pads]
            if cfg.name_cameras and cfg.vision == "image":  # planes and scene tokens are of no camera
                times = len(pads) // len(camera_ids)
                name = lambda i: f"{CAMERA_NAMES[camera_ids[i // times]]}: " * (i % times == 0) + f"frame {i % times} "
                pads = [name(i) + pad for i, pad in enumerate(pads)]
            task = "output the future trajectory."  # what Alpamayo-1.5 asks where it wants no reasoning
            if reason:
                task = f"output the chain-of-thought reasoning of the driving process, then {task}"
            text = (
                "<|im_start|>system\nYou are a driving assistant that generates safe and accurate actions.<|im_end|>\n"
                f"<|im_start|>user\n{''.join(pads)}<|traj_history_start|>{history}<|traj_history_end|>"
                f"{route}{task}<|im_end|>\n<|im_start|>assistant\n"
            )
        else:
            text = "".join(pads) + history + route
        return torch.tensor(self.vocabulary.encode(text + ("<|cot_start|>" if reason else "<|traj_future_start|>")))

    def look(self, scene):
        """Scene's images (B, cameras, frames, 3, H, W) through tower and encoder: tokens (B, K, n_embd); DeepStack features,
        a list of the same; the prompt's images, each a list of grids (h, w) of tokens; and which of these tokens were
        kept, (B, K)."""
        cfg, tower = self.cfg, self.vlm.model.visual
        images = resize(scene["images"].to(self.device), cfg)
        B, cameras, frames, _, H, W = images.shape
        if (cfg.view_embed or cfg.vision != "image") and frames != cfg.frames:
            raise ValueError(f"images: {frames} frames of each camera; this model reads {cfg.frames}")
        if cfg.pair_frames:
            images = images.view(-1, cfg.temporal_patch, 3, H, W)
        else:
            images = images.view(-1, 1, 3, H, W).expand(-1, cfg.temporal_patch, -1, -1, -1)
        times, h, w = len(images) // (B * cameras), H // (cfg.patch * cfg.merge), W // (cfg.patch * cfg.merge)
        x, deep, kept = tower(images, B, cfg.keep)
        view, camera_ids = (cameras, times, h, w), scene["camera_ids"].to(self.device)
        if cfg.vision == "image":
            tokens = tower.merger(x)
            deep = [merger(x) for merger, x in zip(tower.deepstack_merger_list, deep)]
            if cfg.view_embed:
                views = self.view_embed[camera_ids].flatten(1, 2)  # (B, cameras * times, n_embd)
                tokens = tokens + take(views, kept // (h * w)).to(tokens.dtype)
            return tokens, deep, [[(h, w)]] * (cameras * times), kept
        if cfg.vision == "flex":
            tokens, grids = tower.flex(x, kept, view, camera_ids), [[(1, 1)] * cfg.flex_tokens]
        else:
            lens = [scene[k].to(self.device) for k in ("intrinsics", "camera_to_ego") if k in scene]
            if len(lens) < 2:
                raise ValueError("vision = triplane: the scene's cameras are not calibrated (intrinsics, camera_to_ego)")
            tokens, grids = tower.triplane(x, kept, view, *lens), [tower.triplane.grids()] * times
        return tokens, [], grids, torch.arange(tokens.shape[1], device=self.device).expand(B, -1)

    def embed_prompt(self, scene, reason=True):
        """The prompt's embeddings (B, P, n_embd), M-RoPE positions (3, B, P), where DeepStack adds what, and ids (B, P).
        What was pruned is not in it; what was kept has the position that it would have had among all."""
        cfg, vocab, device = self.cfg, self.vocabulary, self.device
        tokens, deep, images, kept = self.look(scene)
        cameras = scene["camera_ids"]
        if (cameras != cameras[0]).any():
            raise ValueError("camera_ids: the scenes of a batch must have the same cameras in the same order")
        routes = scene["route"] if cfg.route and "route" in scene else [""] * len(tokens)
        every = [self.prompt_ids(cameras[0].tolist(), images, reason, route) for route in routes]
        if len({len(ids) for ids in every}) > 1:
            raise ValueError("route: the routes of a batch must have the same number of tokens, or none of them any")
        positions = image_positions(every[0], vocab["image_pad"], sum(images, [])).to(device)
        ids = torch.stack(every).to(device)  # (B, all), of which some images may be pruned
        is_image = ids[0] == vocab["image_pad"]
        places = is_image.nonzero()[:, 0][kept]  # (B, K), in the prompt of all
        stay = torch.cat([(~is_image).nonzero()[:, 0].expand(len(kept), -1), places], 1).sort().values  # (B, P)
        ids, positions, where = ids.gather(1, stay), positions[:, stay], torch.searchsorted(stay, places)
        ego = (ids[0] == vocab["traj_history"]).nonzero()[:, 0]  # behind all images, so at the same places in all scenes
        if cfg.ego == "deltas":
            ids[:, ego] = history_bins(scene["ego_history_xyz"].to(device), cfg.history_bins) + vocab.first_history
        x = self.vlm.model.language_model.embed_tokens(ids)
        if cfg.ego == "kinematics":
            x = x.index_copy(1, ego, self.ego_embed(scene["ego_kinematics"].to(device)).to(x.dtype))
        x = x.scatter(1, where[..., None].expand_as(tokens), tokens.to(x.dtype))
        return x, positions, (where, deep), ids

    # ------------------------------------------------------------------------------------------------------ the losses

    def target_actions(self, scene):
        """Normalised controls (B, 64, 2) of the driven future; fitted unless the scene brings `actions` in SI units."""
        if "actions" not in scene:
            keys = ("ego_history_xyz", "ego_history_rot", "ego_future_xyz", "ego_future_rot")
            return self.action_space.normalise(fit_actions(*(scene[k].to(self.device) for k in keys)))
        return self.action_space.normalise(scene["actions"].to(self.device))

    def response_ids(self, scene, actions, reason, action_tokens):
        """What the language model should say after the prompt: ids (B, R), right-padded with -1, and where the
        expert's prefix ends in it, (B,): the number of ids up to and including <|traj_future_start|>."""
        cfg, vocab = self.cfg, self.vocabulary
        close = "<|cot_end|><|traj_future_start|>"
        says = [vocab.encode(text + close) if reason else [] for text in scene["reasoning"]]
        ends = torch.tensor([len(s) for s in says])
        if action_tokens:
            bins = to_bins(actions, -cfg.bin_range, cfg.bin_range, cfg.bins).flatten(1)  # a0 k0 a1 k1 ...
            close = vocab.encode("<|traj_future_end|>" + ("<|im_end|>" if cfg.chat else ""))
            says = [s + b + close for s, b in zip(says, (bins + vocab.first_action).tolist())]
        ids = torch.full((len(says), max(map(len, says))), -1)
        for row, s in zip(ids, says):
            row[: len(s)] = torch.tensor(s)
        return ids.to(self.device), ends.to(self.device)

    def forward(
        self, scene, stage="reason", action_tokens=True, flow_samples=1, flow_t=None, flow_noise=None, generator=None,
        hide_actions=0.0,
    ):  # fmt: skip
        """Losses of one batch of Scenes (data.py).

        stage "reason": cross-entropy of reasoning and action tokens (Eq. 9) and the expert's flow matching (Eq. 6, 7);
        "action": the same without reasoning (Sec. 5.1). action_tokens=False leaves the 128 out, for speed.
        flow_samples: noise levels a scene, all of which read one cache; flow_t (N,), flow_noise (N, 64, 2) fix them.
        hide_actions: share of the scenes in which the model does not read the action tokens before the one that it is to
        say. Told the first two or three it can guess the others, and the tower, which the expert teaches nothing, need
        not learn where in the lane the car is: our nano could not keep to it before this. Not of the paper.
        Returns a dict of scalars: the losses `text` and `action`, mean nats a token of each kind (the release adds the
        two), `flow`, a mean square, and `ade`, metres between the driven path and that of one Euler step from x_t to t = 1;
        and, to look at, `tokens`, how many the language model read."""
        cfg, reason = self.cfg, stage == "reason"
        actions = self.target_actions(scene)  # (B, 64, 2)
        x, positions, seen, _ = self.embed_prompt(scene, reason)
        ids, ends = self.response_ids(scene, actions, reason, action_tokens)
        (B, P, _), R, device = x.shape, ids.shape[1], x.device
        read = ids.clamp(min=0)
        if action_tokens and hide_actions:
            first, hidden = self.vocabulary.first_action, torch.rand(B, 1, generator=generator, device=device) < hide_actions
            read = torch.where(hidden & (ids >= first) & (ids < first + cfg.bins), self.vocabulary["traj_future"], read)
        x = torch.cat([x, self.vlm.model.language_model.embed_tokens(read)], 1)  # (B, P + R, C)
        start = positions.max() + 1
        positions = torch.cat([positions, (start + torch.arange(R, device=device)).expand(3, B, -1)], 2)
        cos, sin = rope(positions, cfg, x.dtype)
        x, cache = self.vlm.model.language_model(x, cos, sin, seen=seen)

        losses = {}
        if R:
            logits = self.vlm.lm_head(x[:, P - 1 : -1]).float()
            nats = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=-1, reduction="none").view(B, R)
            said, is_action = ids >= 0, torch.zeros_like(ids, dtype=torch.bool)
            if action_tokens:  # from <|traj_future_start|> to <|traj_future_end|>
                late = torch.arange(R, device=device) >= ends[:, None] - 1
                is_action = said & late & (ids != self.vocabulary["im_end"])
                losses["action"] = nats[is_action].mean()
            if (said & ~is_action).any():
                losses["text"] = nats[said & ~is_action].mean()

        # The expert: x_t on the straight line from noise to the controls, its velocity the target (Eq. 6, 7).
        n = flow_samples
        t = flow_time(B * n, generator, device) if flow_t is None else flow_t
        noise = torch.randn(B * n, HORIZON, 2, generator=generator, device=device) if flow_noise is None else flow_noise
        data = actions.repeat_interleave(n, 0)
        x_t = t[:, None, None] * data + (1 - t[:, None, None]) * noise
        L = P + int(ends.max())
        mask = torch.arange(L, device=device) < (P + ends)[:, None]
        past = [(k[:, :, :L].detach(), v[:, :, :L].detach(), mask, None, None, None) for k, v in cache]
        velocity = self.velocity(x_t, t, past, (start + ends).repeat_interleave(n))
        losses["flow"] = F.mse_loss(velocity, data - noise)
        guess = self.action_space.restore(x_t + (1 - t[:, None, None]) * velocity)  # where the straight line leads
        v0 = initial_speed(scene["ego_history_xyz"], scene["ego_history_rot"]).to(device).repeat_interleave(n)
        truth = scene["ego_future_xyz"].to(device).repeat_interleave(n, 0)
        losses["ade"] = (roll_out(guess, v0)[0] - truth).norm(dim=-1).mean()
        losses["tokens"] = torch.tensor(float(B * (P + R)))
        return losses

    def velocity(self, x_t, t, past, start):
        """The expert's velocity (N, 64, 2) at noisy controls x_t (N, 64, 2), times t (N,), over the language model's
        keys and values; its 64 tokens take the positions from `start` (N,) on."""
        x = self.action_in_proj(x_t, t)
        return self.action_out_proj(self.expert(x, *self.rope_of_actions(start, x.dtype), past)).to(x_t.dtype)

    def rope_of_actions(self, start, dtype):
        positions = (start[:, None] + torch.arange(HORIZON, device=start.device)).expand(3, -1, -1)
        return rope(positions, self.cfg, dtype)

    # -------------------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def sample(
        self, scene, n=6, temperature=0.6, top_p=0.98, steps=10, max_new_tokens=256, noise=None, seed=None, reason=None,
        decode="flow", eta=0.0,
    ):  # fmt: skip
        """Look, think, drive: n samples of each of B scenes, each with its own reasoning (Sec. 5.1).

        temperature 0 is greedy; top_p keeps the likeliest tokens that together have that probability; steps of Euler
        from noise (B * n, 64, 2), drawn where not given; seed fixes both. reason=False drives without thinking.
        decode "flow": the expert drives; "tokens": the language model says its 128 action tokens, which is slow, and what
        the paper's reinforcement learning scores. eta: how stochastic the flow is, see flow_step.
        The prompt's keys and values are stored once for all n samples. Returns a Rollout."""
        if min(n, steps, max_new_tokens) < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ValueError("sample: n, steps and max_new_tokens must be 1 or more, temperature 0 or more, top_p in (0, 1]")
        if decode not in ("flow", "tokens") or not 0 <= eta <= 1:
            raise ValueError(f"sample: decode must be flow or tokens, eta in [0, 1], not {decode!r} and {eta}")
        cfg, vocab, device = self.cfg, self.vocabulary, self.device
        lm, reason = self.vlm.model.language_model, cfg.reasoning == "on" if reason is None else reason
        generator = torch.Generator(device).manual_seed(seed) if seed is not None else None
        clock, seconds = Clock(device), {}

        x, positions, seen, _ = self.embed_prompt(scene, reason)
        seconds["vision"] = clock.lap()
        cos, sin = rope(positions, cfg, x.dtype)
        where, P = seen[0], x.shape[1]
        ask = P - 1 - int(where.max()) if reason and cfg.retrieve < 1 else 0  # the words behind all images
        x, prompt = lm(x, cos, sin, seen=seen, ask=ask)  # prompt: keys and values (B, G, P, d) a layer
        read = [retrieve(*kvs, where, cfg.retrieve) for kvs in prompt] if ask else prompt  # what the reasoning reads of it
        B, N, start = len(x), len(x) * n, int(positions.max()) + 1
        seconds["prefill"] = clock.lap()

        # Reasoning, token by token, until every sample has said <|traj_future_start|>, whose keys and values belong to
        # what the expert reads; then, if asked, the action tokens. A sample that is done says padding: nobody will see it.
        tokens, log_probs, tail = [], [], [(None, None)] * cfg.n_layer
        length = torch.zeros(N, dtype=torch.long, device=device)  # generated tokens up to <|traj_future_start|>
        thinking = torch.full((N,), reason, device=device)
        due = 2 * HORIZON if decode == "tokens" else 0  # action tokens
        x = x[:, -1:].repeat_interleave(n, 0)
        while (busy := thinking | (len(tokens) - length < due)).any():
            logits = self.allowed(self.vlm.lm_head(x[:, -1]).float(), ~thinking)  # (N, vocab)
            token, log_prob = pick(logits, temperature, top_p, generator)
            forced = thinking & (len(tokens) == max_new_tokens - 1)  # out of time to think: drive, which is no choice
            token = torch.where(forced, vocab["traj_future_start"], token)
            log_probs.append(log_prob * (busy & ~forced))
            token = torch.where(busy, token, vocab["endoftext"])
            tokens.append(token)
            length = torch.where(thinking, len(tokens), length)
            thinking = thinking & (token != vocab["traj_future_start"])
            cos, sin = rope(torch.full((3, 1, 1), start + len(tokens) - 1, device=device), cfg, x.dtype)
            past = [(k0, v0, None, k1, v1, None) for (k0, v0), (k1, v1) in zip(read, tail)]
            x, tail = lm(lm.embed_tokens(token)[:, None], cos, sin, past)
        seconds["reasoning"] = clock.lap()
        tokens, log_probs = (torch.stack(a, 1) if a else torch.zeros(N, 0, device=device) for a in (tokens, log_probs))
        tokens = tokens.long()

        # Driving: Euler steps from noise to controls, or the action tokens' bins; then the unicycle.
        if decode == "tokens":
            after = length[:, None] + torch.arange(due, device=device)
            bins = (tokens.gather(1, after) - vocab.first_action).view(N, HORIZON, 2)
            x = from_bins(bins, -cfg.bin_range, cfg.bin_range, cfg.bins)
            steps = 0
        else:
            x = torch.randn(N, HORIZON, 2, generator=generator, device=device) if noise is None else noise.to(device)
        if x.shape != (N, HORIZON, 2):
            raise ValueError(f"noise: shape {tuple(x.shape)}; {B} scenes of {n} samples need {(N, HORIZON, 2)}")
        flow = self.integrate(x, prompt, tail, length, start, steps, eta, generator)
        actions = self.action_space.restore(flow[-1])
        v0 = initial_speed(scene["ego_history_xyz"].to(device), scene["ego_history_rot"].to(device))
        xyz, rot = roll_out(actions, v0.repeat_interleave(n))
        seconds["flow"] = clock.lap()

        texts = []
        for row, k in zip(tokens.tolist(), length.tolist()):
            k = row.index(vocab["cot_end"]) if vocab["cot_end"] in row else k
            texts.append(vocab.decode(row[:k]))
        by_scene = lambda a: a.unflatten(0, (B, n))
        return Rollout([texts[i : i + n] for i in range(0, N, n)], by_scene(tokens), by_scene(log_probs), by_scene(actions),
                       by_scene(xyz), by_scene(rot), flow.unflatten(1, (B, n)), seconds)  # fmt: skip

    def allowed(self, logits, driving):
        """Logits (N, vocab) of what may be said: no action tokens while thinking, nothing else where `driving` (N,)."""
        first = self.vocabulary.first_action
        token = torch.arange(logits.shape[-1], device=logits.device)
        is_action = (token >= first) & (token < first + self.cfg.bins)
        is_history = (token >= first + self.cfg.bins) & (token < first + self.cfg.bins + self.cfg.history_bins)
        barred = torch.where(driving[..., None], ~is_action, is_action | is_history)
        return logits.masked_fill(barred, -1e9)  # not -inf: what is sure to be 0 should have a gradient of 0, not NaN

    def integrate(self, x, prompt, tail, length, start, steps, eta=0.0, generator=None):
        """Euler steps of the flow from noise x (N, 64, 2) to controls, Eq. 7 from t = 0 to 1: all of them, (steps + 1, N,
        64, 2). prompt, tail, length (N,): see expert_past; start: the position behind the prompt; eta: see flow_step."""
        dtype = self.expert.norm.weight.dtype
        if steps and eta == 0 and by_hand(x.device, dtype):
            seen = torch.arange(tail[0][0].shape[2] if tail[0][0] is not None else 0, device=x.device) < length[:, None]
            cos, sin = self.rope_of_actions(start + length, dtype)
            return sample_flow(self.expert, self.action_in_proj, self.action_out_proj, steps, x, cos, sin,
                               [kv[:2] for kv in prompt], tail, seen)  # fmt: skip
        past, flow = self.expert_past(prompt, tail, length), [x]
        for i in range(steps):
            velocity = self.velocity(x, torch.full((len(x),), i / steps, device=x.device), past, start + length)
            x, std = flow_step(x, velocity, i / steps, 1 / steps, eta)
            if std:
                x = x + std * torch.randn(x.shape, generator=generator, device=x.device)
            flow.append(x)
        return torch.stack(flow)

    def expert_past(self, prompt, tail, length):
        """What the expert reads, for every layer: the shared prompt, of a sample's own tokens the first length (N,), and
        its 64 action tokens."""
        S = tail[0][0].shape[2] if tail[0][0] is not None else 0
        own = torch.arange(S + HORIZON, device=length.device) >= S  # the 64 action tokens, behind the S generated ones
        mask = ((torch.arange(S + HORIZON, device=length.device) < length[:, None]) | own)[:, None]  # (N, 1, S + 64)
        return [(k0.detach(), v0.detach(), None, k1 if k1 is None else k1.detach(), v1 if v1 is None else v1.detach(), mask)
                for (k0, v0, *_), (k1, v1) in zip(prompt, tail)]  # fmt: skip

    def replay(self, scene, rollout, eta=0.0):
        """The passes of a Rollout once more, all at once and with gradients: logits (N, T, vocab) of its tokens (what may
        not be said is barred, as in sample); the means (steps, N, 64, 2) of its flow's steps, or None where it has none, and
        a list of their standard deviations, see flow_step.

        The prompt is read once, the n samples' tokens stand behind it side by side. No gradient of the expert reaches the
        language model, as in `forward`. ValueError where reasoning reads only a share of the cache (retrieve < 1)."""
        cfg, vocab, lm = self.cfg, self.vocabulary, self.vlm.model.language_model
        if cfg.retrieve < 1:
            raise ValueError(f"retrieve: replay reads the whole cache, not {cfg.retrieve} of it")
        tokens, device = rollout.tokens.flatten(0, 1), self.device  # (N, T)
        (N, T), n = tokens.shape, rollout.tokens.shape[1]
        said_start = tokens == vocab["traj_future_start"]
        reason = bool(said_start.any())
        x, positions, seen, _ = self.embed_prompt(scene, reason)
        start = int(positions.max()) + 1
        x, prompt = lm(x, *rope(positions, cfg, x.dtype), seen=seen)
        tail, logits = [(None, None)] * cfg.n_layer, x.new_zeros(N, 0, cfg.vocab)
        length = said_start.int().argmax(1) + 1 if reason else torch.zeros(N, dtype=torch.long, device=device)
        if T:
            causal = torch.ones(T, T, dtype=torch.bool, device=device).tril().expand(N, -1, -1)
            past = [(k0, v0, None, None, None, causal) for k0, v0 in prompt]
            cos, sin = rope((start + torch.arange(T, device=device)).expand(3, 1, -1), cfg, x.dtype)
            y, tail = lm(lm.embed_tokens(tokens), cos, sin, past)
            y = torch.cat([x[:, -1:].repeat_interleave(n, 0), y[:, :-1]], 1)  # what each token was predicted from
            driving = torch.arange(T, device=device) >= length[:, None]
            logits = self.allowed(self.vlm.lm_head(y).float(), driving)
        past, steps, flow = self.expert_past(prompt, tail, length), len(rollout.flow) - 1, []
        for i, x in enumerate(rollout.flow[:-1].flatten(1, 2)):
            t = torch.full((N,), i / steps, device=device)
            flow.append(flow_step(x, self.velocity(x, t, past, start + length), i / steps, 1 / steps, eta))
        return logits, torch.stack([mean for mean, _ in flow]) if flow else None, [std for _, std in flow]


def retrieve(k, v, salience, where, share):
    """SparseVILA's second half: of a layer's keys and values (B, G, P, d) those of all words and of the share of the image
    tokens, at `where` (B, V), that the words behind them attend to most (salience (B, P)), as they stand. Each layer
    chooses for itself, for all its heads: ours, since its authors do not say. The rest stays in the cache."""
    B, P = salience.shape
    drop = where.shape[1] - max(1, round(share * where.shape[1]))
    least = take(where, take(salience, where).topk(drop, largest=False).indices)  # (B, drop)
    stay = torch.ones_like(salience, dtype=torch.bool).scatter(1, least, False).nonzero()[:, 1].view(B, P - drop)
    return take(k.transpose(1, 2), stay).transpose(1, 2), take(v.transpose(1, 2), stay).transpose(1, 2)


def nucleus(logits, temperature, top_p):
    """Probabilities (..., vocab) at a temperature above 0, the largest first, and whose they are; 0 for all that the
    likeliest tokens which together have top_p do not need."""
    p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    p[p.cumsum(-1) - p > top_p] = 0  # what comes before a token already has top_p
    return p, order


def pick(logits, temperature, top_p, generator=None):
    """One token of each row of logits (N, vocab), the likeliest at temperature 0, else drawn from the smallest set of
    likeliest tokens whose probabilities reach top_p; and its log-probability there, (N,) each. At temperature 0, where
    there is no choice, it is that of temperature 1."""
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return best[:, 0], logits.log_softmax(-1).gather(-1, best)[:, 0]
    p, order = nucleus(logits, temperature, top_p)
    drawn = torch.multinomial(p, 1, generator=generator)  # (N, 1)
    return order.gather(-1, drawn)[:, 0], (p.gather(-1, drawn)[:, 0] / p.sum(-1)).log()


def token_log_probs(logits, tokens, temperature, top_p):
    """Log-probabilities (...), with gradient, of tokens (...) that `pick` drew from logits (..., vocab) at a temperature
    above 0: of the tempered softmax over the nucleus, to which the token itself is counted in any case."""
    logits = logits / temperature
    if top_p < 1:
        p, order = nucleus(logits.detach(), 1.0, top_p)
        kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p > 0).scatter(-1, tokens[..., None], True)
        logits = logits.masked_fill(~kept, -1e9)
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


class Clock:
    """Seconds between calls of lap(), of work that is really finished."""

    def __init__(self, device):
        self.cuda = torch.device(device).type == "cuda"
        self.lap()

    def lap(self):
        if self.cuda:
            torch.cuda.synchronize()
        last, self.last = getattr(self, "last", 0.0), time.perf_counter()
        return self.last - last


# ----------------------------------------------------------------------------------------------------------------------
# Training in less memory: adapters in place of the language model's matrices, and activations computed twice


class Adapted(nn.Module):
    """A matrix W that stays and a change of rank r that learns: y = W x + B (A x), with A (r, in), B (out, r) in float32
    (LoRA, arXiv 2106.09685). B starts at zero, so that the model starts as it was. LoRA's factor alpha / r is 1 here: to
    Adam, which forgets the size of gradients, another one is little else than another learning rate. Neither the paper
    nor the release adapts in this way: rank, matrices and learning rate are the user's to try.

    In a state_dict it is the one matrix W + B A: what is saved is a checkpoint like any other, without adapters."""

    def __init__(self, linear, rank, generator=None):
        super().__init__()
        out, size = linear.weight.shape
        like = dict(device=linear.weight.device, dtype=torch.float32)
        self.weight, self.on = linear.weight, True
        a = torch.randn(rank, size, generator=generator) * size**-0.5  # on the CPU: the same on any device
        self.lora_A, self.lora_B = nn.Parameter(a.to(**like)), nn.Parameter(torch.zeros(out, rank, **like))

    def forward(self, x):
        y = F.linear(x, self.weight)
        return y + F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) if self.on else y

    @torch.no_grad()
    def merged(self):
        return (self.weight.float() + self.lora_B @ self.lora_A).to(self.weight.dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.merged().cpu()  # all of them would not fit beside a large model


def add_adapters(model, rank, generator=None):
    """Adapters of this rank in place of the language model's seven matrices a layer: q, k, v, o, gate, up, down."""
    for layer in model.vlm.model.language_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, Adapted(linear, rank, generator))


@contextmanager
def without_adapters(model):
    """The model as it was before its adapters learned anything: RL's reference, which so costs no second model. Without
    gradients, for a layer that is computed again in a later backward pass would have its adapters again."""
    adapted = [m for m in model.modules() if isinstance(m, Adapted)]
    for m in adapted:
        m.on = False
    try:
        with torch.no_grad():
            yield model
    finally:
        for m in adapted:
            m.on = True


def checkpoint_activations(model):
    """From now on every block and layer keeps what it was given and what it returns (the cache too), and in the backward
    pass computes again what lies between: the memory of one layer at a time, for the time of a second forward pass."""

    def twice(forward):
        again = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)  # nothing inside is random
        return lambda *args, **more: (again if torch.is_grad_enabled() else forward)(*args, **more)

    for m in model.modules():
        if isinstance(m, (VisionBlock, Layer)):
            m.forward = twice(m.forward)
        elif isinstance(m, Triplane):
            m.update = twice(m.update)  # a slab of cells, of which there are many


# ----------------------------------------------------------------------------------------------------------------------
# Loading and saving, in the release's format: config.json, vlm/config.json (the backbone's), *.safetensors

ACTION_FIELDS = ("accel_mean", "accel_std", "curvature_mean", "curvature_std")
FIT = dict(a_lambda=1e-4, a_ridge=1e-4, kappa_lambda=1e-4, kappa_ridge=1e-4, theta_lambda=1e-6, theta_ridge=1e-8,
           v_lambda=1e-6, v_ridge=1e-4, n_waypoints=HORIZON, dt=DT)  # fmt: skip
MAY_BE_ZERO = ("min_pixels", "max_pixels", "history_bins")
EXTRA_FIELDS = ("words", "cameras", "frames", "frame_dt", "ego", "chat", "pair_frames", "view_embed", "route",
                "reasoning", "vision", "keep", "keep_at", "retrieve", "planes", "planes_patch", "planes_reach",
                "planes_embd", "flex_tokens", "flex_layer")  # fmt: skip
NAMED = ("include_camera_ids", "include_frame_nums")  # fields of Alpamayo-1.5's config.json: name_cameras
QWEN3_VL_8B = ("Qwen3-VL-8B", "Cosmos-Reason2-8B")


def vlm_config(cfg: Config) -> dict:
    """The backbone's config.json, as Qwen3-VL's."""
    first = 151652 if cfg.text_vocab == 151669 else cfg.text_vocab - 5  # Qwen's tokenizer has tool tokens behind them
    special = dict(zip(QWEN_TOKENS[3:], range(first, first + 5)))
    return {
        "model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], "tie_word_embeddings": False,
        "image_token_id": special["<|image_pad|>"], "video_token_id": special["<|video_pad|>"],
        "vision_start_token_id": special["<|vision_start|>"], "vision_end_token_id": special["<|vision_end|>"],
        "text_config": {
            "model_type": "qwen3_vl_text", "attention_bias": False, "head_dim": cfg.head_dim, "hidden_act": "silu",
            "hidden_size": cfg.n_embd, "intermediate_size": cfg.n_mlp, "max_position_embeddings": 262144,
            "num_attention_heads": cfg.n_head, "num_hidden_layers": cfg.n_layer, "num_key_value_heads": cfg.n_kv_head,
            "rms_norm_eps": 1e-6, "rope_theta": cfg.rope_theta, "vocab_size": cfg.text_vocab,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": list(cfg.mrope_section), "rope_type": "default"},
        },
        "vision_config": {
            "model_type": "qwen3_vl", "depth": cfg.v_layer, "hidden_size": cfg.v_embd, "num_heads": cfg.v_head,
            "intermediate_size": cfg.v_mlp, "hidden_act": "gelu_pytorch_tanh", "in_channels": 3,
            "deepstack_visual_indexes": list(cfg.deepstack), "num_position_embeddings": cfg.v_grid**2,
            "out_hidden_size": cfg.n_embd, "patch_size": cfg.patch, "spatial_merge_size": cfg.merge,
            "temporal_patch_size": cfg.temporal_patch,
        },
    }  # fmt: skip


def release_config(cfg: Config) -> dict:
    """config.json in the release's own format; what the release lacks stands under "extra"."""
    space = {"_target_": "alpamayo_r1.action_space.UnicycleAccelCurvatureActionSpace", "accel_bounds": [-9.8, 9.8],
             "curvature_bounds": [-CURVATURE_BOUND, CURVATURE_BOUND], **FIT,
             **{k: getattr(cfg, k) for k in ACTION_FIELDS}}  # fmt: skip
    first_special = cfg.text_vocab + cfg.bins + cfg.history_bins
    new = [t for t in SPECIAL_TOKENS if t not in QWEN_TOKENS]
    names = ("history", "future", "history_start", "future_start", "history_end", "future_end")
    pixels = {"min_pixels": cfg.min_pixels, "max_pixels": cfg.max_pixels} if cfg.max_pixels else {}
    default = Config()
    extra = {k: getattr(cfg, k) for k in EXTRA_FIELDS if getattr(cfg, k) != getattr(default, k)}
    if not cfg.max_pixels:
        extra["max_pixels"] = 0
    return {
        "model_type": "alpamayo_r1", "architectures": ["AlpamayoR1"], "vlm_backend": "qwenvl3", "vlm_name_or_path": "vlm",
        "model_dtype": "bfloat16", "attn_implementation": "sdpa", "add_special_tokens": True, "keep_same_dtype": True,
        "expert_non_causal_attention": True, "vocab_size": cfg.vocab, "traj_vocab_size": cfg.bins + cfg.history_bins,
        "tokens_per_history_traj": cfg.ego_tokens, "tokens_per_future_traj": 2 * HORIZON,
        "traj_token_start_idx": cfg.text_vocab,
        "traj_token_ids": {k: first_special + new.index(f"<|traj_{k}|>") for k in names},
        "traj_tokenizer_cfg": {
            "_target_": "alpamayo_r1.action_space.discrete_action_space.DiscreteTrajectoryTokenizer",
            "_recursive_": False, "action_space_cfg": space, "num_bins": cfg.bins,
            "dims_min": [-cfg.bin_range] * 2, "dims_max": [cfg.bin_range] * 2,
        },
        "hist_traj_tokenizer_cfg": {
            "_target_": "alpamayo_r1.models.delta_tokenizer.DeltaTrajectoryTokenizer", "num_bins": cfg.history_bins,
        },
        "diffusion_cfg": {
            "_target_": "alpamayo_r1.diffusion.flow_matching.FlowMatching", "int_method": "euler",
            "num_inference_steps": 10,
        },
        "action_space_cfg": space,
        "action_in_proj_cfg": {
            "_target_": "alpamayo_r1.models.action_in_proj.PerWaypointActionInProjV2", "hidden_size": cfg.a_embd,
            "max_freq": cfg.a_max_freq, "num_enc_layers": cfg.a_layer, "num_fourier_feats": cfg.a_fourier,
        },
        "action_out_proj_cfg": {"_target_": "torch.nn.Linear"},
        "expert_cfg": {"hidden_size": cfg.e_embd, "intermediate_size": cfg.e_mlp, "num_attention_heads": cfg.e_head,
                       "num_key_value_heads": cfg.n_kv_head, "head_dim": cfg.head_dim},
        **pixels, **({k: True for k in NAMED} if cfg.name_cameras else {}), **({"extra": extra} if extra else {}),
    }  # fmt: skip


class Json(dict):
    """A dict read from a JSON file whose missing keys are one clear line."""

    def __init__(self, path, data, where=""):
        super().__init__(data)
        self.path, self.where = path, where

    def __missing__(self, key):
        raise ValueError(f"{self.path}: field {self.where}{key} is missing")

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if value is None:
            raise ValueError(f"{self.path}: field {self.where}{key} is null")
        return Json(self.path, value, f"{self.where}{key}.") if isinstance(value, dict) else value

    def expect(self, key, value):
        if key in self and self[key] != value:
            raise ValueError(f"{self.path}: field {self.where}{key} is {self[key]!r}; this code knows {value!r}")


def read_json(path):
    try:
        with open(path) as f:
            data = json.load(f)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing") from None
    except ValueError as e:
        raise ValueError(f"{path}: not JSON: {e}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected an object of named fields, not {str(data)[:20]!r}")
    return Json(path, data)


def read_config(folder) -> Config:
    """Config of a checkpoint folder, ours or the release's. The backbone's config is looked for in vlm/; where it is
    missing and the release names an 8B backbone that we know, its numbers are those of the preset alpamayo-r1-10b."""
    release = read_json(os.path.join(folder, "config.json"))
    release.expect("add_special_tokens", True)
    release.expect("expert_non_causal_attention", True)
    path = os.path.join(folder, "vlm", "config.json")
    name = str(release["vlm_name_or_path"])
    if os.path.exists(path):
        vlm = read_json(path)
    elif any(known in name for known in QWEN3_VL_8B):
        vlm = Json("built-in Qwen3-VL-8B", vlm_config(Config()))
    else:
        known = " or ".join(QWEN3_VL_8B)
        raise FileNotFoundError(f"{path}: missing, and config.json's vlm_name_or_path {name!r} is not {known}")
    text, see, tokens = vlm["text_config"], vlm["vision_config"], release["traj_tokenizer_cfg"]
    space, expert, embed = release["action_space_cfg"], release["expert_cfg"], release["action_in_proj_cfg"]
    for key, value in FIT.items():
        space.expect(key, value)
    text.expect("tie_word_embeddings", False)
    layout = text["rope_scaling" if text.get("rope_scaling") else "rope_parameters"]
    get = lambda key, default: expert[key] if key in expert else default
    for key in ("num_key_value_heads", "head_dim", "num_hidden_layers"):  # the expert reads the backbone's cache
        expert.expect(key, text[key])
    extra = dict(release.get("extra") or {})
    unknown = set(extra) - set(EXTRA_FIELDS) - {"max_pixels"}
    if unknown:
        raise ValueError(f"{release.path}: field extra.{unknown.pop()} is unknown; known are {', '.join(EXTRA_FIELDS)}")
    default = Config()
    pixels = {k: release.get(k) or getattr(default, k) for k in ("min_pixels", "max_pixels")}
    if extra.pop("max_pixels", None) == 0:
        pixels = {"min_pixels": 0, "max_pixels": 0}
    history = release["hist_traj_tokenizer_cfg"]["num_bins"]
    named = [bool(release.get(k)) for k in NAMED]
    if named[0] != named[1]:
        raise ValueError(f"{release.path}: fields {' and '.join(NAMED)} differ; this code knows both or neither")
    numbers = dict(
        n_layer=text["num_hidden_layers"], n_embd=text["hidden_size"], n_head=text["num_attention_heads"],
        n_kv_head=text["num_key_value_heads"], head_dim=text["head_dim"], n_mlp=text["intermediate_size"],
        rope_theta=text.get("rope_theta") or layout["rope_theta"], mrope_section=layout["mrope_section"],
        v_layer=see["depth"], v_embd=see["hidden_size"], v_head=see["num_heads"], v_mlp=see["intermediate_size"],
        v_grid=see["num_position_embeddings"], patch=see["patch_size"], merge=see["spatial_merge_size"],
        temporal_patch=see["temporal_patch_size"], deepstack=see["deepstack_visual_indexes"],
        e_embd=get("hidden_size", text["hidden_size"]), e_head=get("num_attention_heads", text["num_attention_heads"]),
        e_mlp=get("intermediate_size", text["intermediate_size"]),
        a_layer=embed["num_enc_layers"], a_embd=embed["hidden_size"], a_fourier=embed["num_fourier_feats"],
        a_max_freq=embed["max_freq"], **{k: space[k] for k in ACTION_FIELDS}, bins=tokens["num_bins"],
        bin_range=(tokens["dims_max"] or [None])[0], history_bins=history, text_vocab=release["traj_token_start_idx"],
        name_cameras=named[0], **pixels, **extra,
    )  # fmt: skip
    for f in fields(Config):
        kind = list if isinstance(f.default, tuple) else (int, float) if isinstance(f.default, float) else type(f.default)
        value = numbers.get(f.name, [] if kind is list else f.default)
        if not isinstance(value, kind) or (kind is int and value < (f.name not in MAY_BE_ZERO)):
            wanted = type(f.default).__name__
            raise ValueError(f"{folder}: {value!r} in config.json or vlm/config.json cannot be {f.name} ({wanted})")
    numbers = {k: tuple(v) if isinstance(v, list) else v for k, v in numbers.items()}
    try:
        cfg = Config(**numbers | {"v_grid": math.isqrt(numbers["v_grid"])})
    except ValueError as e:
        raise ValueError(f"{release.path}: field extra.{e}") from None
    if sum(cfg.mrope_section) != cfg.head_dim // 2 or cfg.v_embd % cfg.v_head:
        raise ValueError(f"{path}: mrope_section must add up to head_dim / 2, and num_heads divide the tower's hidden_size")
    # What follows from these numbers, and what this code does in one way only, must be what the files say.
    ours, backbone = release_config(cfg), vlm_config(cfg)
    for key in ("vocab_size", "traj_vocab_size", "traj_token_ids", "tokens_per_history_traj", "tokens_per_future_traj"):
        release.expect(key, ours[key])
    for key in ("dims_min", "dims_max"):
        tokens.expect(key, ours["traj_tokenizer_cfg"][key])
    vlm.expect("tie_word_embeddings", False)
    layout.expect("mrope_interleaved", True)
    for part in ("text_config", "vision_config"):
        for key in backbone[part].keys() - {"vocab_size", "max_position_embeddings", "rope_scaling"}:
            vlm[part].expect(key, backbone[part][key])
    if cfg.words and 256 + len(cfg.words) + len(QWEN_TOKENS) != cfg.text_vocab:
        raise ValueError(f"{release.path}: field traj_token_start_idx does not fit extra.words, {len(cfg.words)} words")
    return cfg


def with_words(cfg: Config, texts) -> Config:
    """The Config with a built-in vocabulary of the words of these texts."""
    words = tuple(sorted({w for t in texts for w in split_words(t) if len(w) > 1}))
    return replace(cfg, words=words, text_vocab=256 + len(words) + len(QWEN_TOKENS))


def shards_of(folder):
    """Paths of the folder's safetensors files."""
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index):
        weight_map = read_json(index)["weight_map"]
        return [os.path.join(folder, f) for f in sorted(set(weight_map.values()))]
    one = os.path.join(folder, "model.safetensors")
    if not os.path.exists(one):
        raise FileNotFoundError(f"{one}: missing (and no model.safetensors.index.json)")
    return [one]


def first_few(names):
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_weights(model, folder, dtype, device):
    """Fill a model that was built on the meta device, one tensor at a time straight onto the device: the weights exist
    once. Any tensor missing, unexpected, of another shape or not finite ends it with one line."""
    wanted = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    buffers, found = dict(model.named_buffers()), set()
    for path in shards_of(folder):
        try:
            with safe_open(path, framework="pt", device=str(device)) as f:
                for name in f.keys():
                    if name not in wanted:
                        raise ValueError(f"{path}: tensor {name} is unexpected; the config describes no such part")
                    have, want = tuple(f.get_slice(name).get_shape()), tuple(wanted[name].shape)
                    if have != want:
                        raise ValueError(f"{path}: tensor {name} has shape {have}, the config asks for {want}")
                    tensor = f.get_tensor(name)
                    if not all(x.isfinite() for x in tensor.aminmax()):  # tensor.isfinite() would copy it
                        raise ValueError(f"{path}: tensor {name} holds NaN or infinite values")
                    # frequencies and moments stay float32: in bfloat16 sin(2 pi 60 x) is up to 1/8 turn off at x = 1
                    tensor = tensor.to(torch.float32 if name in buffers else dtype)
                    model.load_state_dict({name: tensor}, strict=False, assign=True)
                    found.add(name)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: missing, though the index names it") from None
        except SafetensorError as e:
            raise ValueError(f"{path}: not a whole safetensors file ({e})") from None
    missing = set(wanted) - found
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing from its safetensors: {first_few(missing)}")


def write_atomically(path, write):
    """write(temporary path), then rename: a killed process leaves the old file or the new one, never half of one."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    write(path + ".part")
    os.replace(path + ".part", path)


def write_json(path, data):
    def write(part):
        with open(part, "w") as f:
            json.dump(data, f, indent=1)
            f.write("\n")

    write_atomically(path, write)


def save_weights(model, folder, dtype=None, shard_bytes=5 * 2**30):
    """The model's tensors as one safetensors file, or as many and an index."""
    buffers = dict(model.named_buffers())
    shards, room = [{}], shard_bytes
    for name, t in model.state_dict().items():
        t = t.to(t.dtype if dtype is None or name in buffers else dtype)
        size = t.numel() * t.element_size()
        if size > room and shards[-1]:
            shards, room = shards + [{}], shard_bytes
        shards[-1][name] = t.contiguous()
        room -= size
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(names, shards):
        write_atomically(os.path.join(folder, file), lambda part: save_file(shard, part, metadata={"format": "pt"}))
    index = os.path.join(folder, "model.safetensors.index.json")
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
        write_json(index, {"metadata": {}, "weight_map": weight_map})
    elif os.path.exists(index):
        os.remove(index)  # of an earlier save in many shards, which loading would prefer
