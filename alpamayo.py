"""
Alpamayo-R1 in one file: a driving model that looks, says why it will act, and drives.

    paper    Alpamayo-R1, arXiv 2511.00088; sections and equations below are the paper's
    release  github.com/NVlabs/alpamayo and the Alpamayo-R1-10B weights. What the release has keeps
             its name (EgoEmbed, view_embed, Triplane and Flex are ours); its conventions are
             checked against values that the official code computed (tests/golden)

What the language model reads, from left to right (Eq. 1), and what the action expert reads of it:

    prompt     <system> <user> [images: camera by camera, oldest frame first] [ego history] [route]
               <assistant> <|cot_start|>
    reasoning  Yield and keep lane since a pedestrian ... <|cot_end|> <|traj_future_start|>
    training   <i1503> <i1499> ... 128 action tokens ... <|traj_future_end|>
    driving    key-value cache of prompt and reasoning -> expert -> velocity of 64 noisy controls

The reasoning is the Chain of Causation: what the car decides, and why. The discrete action tokens
teach the language model to drive, and give reinforcement learning something to score. The path that
is driven comes from the action expert, a smaller transformer that reads the language model's cache
layer by layer and turns noise into controls by flow matching. A stop-gradient lies between the two:
the expert learns from the cache and never changes it (knowledge insulation, Sec. 5.1).

Training has three stages, all of them in `Alpamayo.forward`:

    stage   what learns             what is frozen      loss                           paper
    action  tower, language model   nothing             cross-entropy, action tokens   Sec. 5.1
            action expert           the cache it reads  flow matching                  Eq. 6, 7
    reason  the same                the same            + Chain of Causation           Eq. 9
    rl      the same                the same, and the   GRPO: advantage times          Eq. 10
                                    reference policy    log-probability, less KL

The paper does not say whether its expert learns in stages reason and rl; ours does. The release
freezes the language model while its expert learns (`train.py --train expert`).

Conventions. x forward, y left, z up; metres, seconds; yaw left-positive. Ego frame: rear axle at
t0. Flow time runs from noise (t = 0) to data (t = 1). Letters in shapes: B scenes, n samples of
each (in stage rl a group of G), N = B * n, T tokens, P prompt tokens, V image tokens, H heads, K
key-value heads, d head dimension, C channels.

The page reads: configuration; the model with its losses and its sampler; then what it is made of,
in the data's order: actions, tokens, seeing, reading, driving, reinforcement learning.
"""
import math
import os
import shutil
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import release
from doors import check_sampling, check_scene, write_atomically
from kernels import by_hand, decoding, one_launch, stock
from kernels.flow_step import roll_out_by_kernel
from kernels.prefix_attention import prefix_attention
from kernels.pruned_attention import pruned_attention
from kernels.salience import column_means
from kernels.sampler import sample_flow
from release import TEXT_TOKENS, Vocabulary, chat, resize, split_words

# --------------------------------------------------------------------------------------------------
# Configuration: the defaults are Alpamayo-R1-10B. A preset names what differs.


@dataclass
class Config:
    """Every number and switch of the model; a checkpoint's config.json holds them (release.py)."""
    # Language model: the decoder of Qwen3-VL-8B, which Cosmos-Reason2-8B is.
    n_layer: int = 36
    n_embd: int = 4096
    n_head: int = 32
    n_kv_head: int = 8
    head_dim: int = 128
    n_mlp: int = 12288
    rope_theta: float = 5e6
    mrope_section: tuple = (24, 20, 20)  # of head_dim / 2 frequencies: time, height, width
    # Vision tower: Qwen3-VL's.
    v_layer: int = 27
    v_embd: int = 1152
    v_head: int = 16
    v_mlp: int = 4304
    v_grid: int = 48  # side of the learned grid of position embeddings
    patch: int = 16  # pixels
    merge: int = 2  # merge x merge patches become one token
    temporal_patch: int = 2  # frames in a patch
    deepstack: tuple = (8, 16, 24)  # tower blocks that also feed the first decoder layers
    # Action expert: the language model's layers, key-value heads and head_dim; narrower elsewhere.
    e_embd: int = 2048
    e_head: int = 16
    e_mlp: int = 8256
    # Embedding of the noisy controls and the flow time.
    a_layer: int = 2
    a_embd: int = 512
    a_fourier: int = 20
    a_max_freq: float = 100.0
    # Normalisation of the controls: acceleration m/s^2, curvature 1/m.
    accel_mean: float = 0.02902694707164455
    accel_std: float = 0.6810426736454882
    curvature_mean: float = 0.0002692167976330542
    curvature_std: float = 0.026148280660833106
    # Tokens.
    bins: int = 3000  # of an action token, over +-bin_range standard deviations
    bin_range: float = 10.0
    history_bins: int = 1000  # of an ego history token
    text_vocab: int = 151669  # tokens of the text tokenizer; trajectory and special tokens follow
    words: tuple = ()  # a built-in vocabulary of words and bytes; empty: a tokenizer.json
    # Inputs.
    cameras: tuple = (0, 1, 2, 6)  # cross left, front wide, cross right, front tele
    frames: int = 4  # of a camera, the last one at t0
    frame_dt: float = 0.1  # seconds between frames
    min_pixels: int = 163840  # images are resized to an area between these; 0: taken as they are
    max_pixels: int = 196608
    ego: str = "deltas"  # ego history as 48 tokens of binned motion | "kinematics": speed,
    #                      acceleration, steering and turn signal of 2 s as 4 embedded tokens
    # Switches that the release lacks.
    chat: bool = True  # the release's words around the images
    name_cameras: bool = False  # "Front camera: frame 0 " before images, as Alpamayo-1.5
    pair_frames: bool = False  # two frames share patches, as Qwen3-VL reads video; the release
    #                            repeats each frame temporal_patch times
    view_embed: bool = False  # add a learned embedding of camera and time to image tokens
    route: bool = False  # read the scene's route, "turn left", where it has one
    reasoning: str = "on"  # think, then drive | "off": drive at once
    # How it sees (Sec. 3.2.1).
    vision: str = "image"  # each image its own tokens | "triplane" | "flex"
    keep: float = 1.0  # token pruning: share of the image tokens kept, by salience
    keep_at: float = 0.34  # share of the tower's blocks before pruning (ours)
    retrieve: float = 1.0  # share of the prompt's image tokens that the reasoning reads back
    planes: tuple = (96, 96, 48)  # triplane: cells along x, y, z
    planes_patch: tuple = (8, 8, 8)  # cells along x, y, z that become one token
    planes_reach: tuple = (-180.0, 180.0, -180.0, 180.0, -3.0, 45.0)  # m, from and to: x, y, z
    planes_embd: int = 192
    flex_tokens: int = 256  # Flex: scene tokens in all, 16 for each of 16 images
    flex_layer: int = 4  # ours, see Flex

    def __post_init__(self):
        release.require_config(vars(self), vars(Config))

    @property
    def vocab(self):  # tokens in all
        return release.vocab_size(vars(self))

    @property
    def ego_tokens(self):  # of the ego history
        return release.EGO_TOKENS[self.ego]

    @property
    def times(self):  # time steps of a camera that become tokens of their own
        return self.frames // self.temporal_patch if self.pair_frames else self.frames

    @property
    def reads(self):  # keys of a Scene, beside those that every model reads
        keys = ["ego_kinematics"] if self.ego == "kinematics" else []
        return keys + (["intrinsics", "camera_to_ego"] if self.vision == "triplane" else [])


# What nano and mini share. They learn in the built-in world; `with_words` adds its words.
OF_WORLD = dict(
    rope_theta=1e4, accel_mean=0.0, accel_std=1.5, curvature_mean=0.0, curvature_std=0.03,
    history_bins=0, text_vocab=264, frame_dt=0.5, min_pixels=0, max_pixels=0, ego="kinematics",
    chat=False, pair_frames=True, view_embed=True, route=True,
    planes_reach=(0.0, 120.0, -60.0, 60.0, -1.0, 7.0),
)  # fmt: skip
PRESETS = {
    # A laptop: tests, the demo, the shipped checkpoint. 64 x 128 images, 8 tokens a pair of frames.
    "nano": Config(
        n_layer=4, n_embd=160, n_head=4, n_kv_head=2, head_dim=40, n_mlp=320,
        mrope_section=(8, 6, 6), v_layer=3, v_embd=96, v_head=4, v_mlp=256, v_grid=8,
        deepstack=(1,), e_embd=96, e_head=4, e_mlp=256, a_embd=96, bins=128, bin_range=4.0,
        planes=(12, 12, 2), planes_patch=(4, 3, 2), planes_embd=64, flex_tokens=20, flex_layer=2,
        **OF_WORLD),
    # One GPU. 128 x 256 images, 32 tokens a pair of frames.
    "mini": Config(
        n_layer=12, n_embd=512, n_head=8, n_kv_head=4, head_dim=64, n_mlp=1536,
        mrope_section=(12, 10, 10), v_layer=8, v_embd=384, v_head=6, v_mlp=1536, v_grid=16,
        deepstack=(1, 3, 5), e_embd=256, e_head=8, e_mlp=768, a_embd=256, bins=512, bin_range=5.0,
        planes=(48, 48, 8), planes_patch=(8, 8, 4), planes_embd=96, flex_tokens=64, **OF_WORLD),
    "alpamayo-r1-10b": Config(),
}  # fmt: skip
NANO = os.path.join(os.path.dirname(os.path.abspath(__file__)), "checkpoints", "nano")


def read_config(folder):
    """Config of a checkpoint folder, ours or the release's."""
    return Config(**release.read_config(folder, vars(Config())))


def with_words(cfg, texts):
    """The Config with a built-in vocabulary of the words of these texts."""
    found = {word for text in texts for word in split_words(text) if len(word) > 1}
    words = tuple(sorted(found))
    return replace(cfg, words=words, text_vocab=256 + len(words) + len(TEXT_TOKENS))


# --------------------------------------------------------------------------------------------------
# The model


@dataclass(repr=False)
class Rollout:
    """n samples of each of B scenes: what the model thought, and where it would drive."""
    reasoning: list  # B lists of n str
    tokens: torch.Tensor  # (B, n, T): ids up to <|traj_future_start|> or the last action token,
    #                       then padding
    chosen: torch.Tensor  # (B, n, T) bool: drawn by the policy; neither padding nor forced
    log_probs: torch.Tensor  # (B, n, T): of the chosen tokens as they were drawn, else 0
    actions: torch.Tensor  # (B, n, 64, 2): m/s^2, 1/m
    xyz: torch.Tensor  # (B, n, 64, 3): m, ego frame at t0
    rot: torch.Tensor  # (B, n, 64, 3, 3)
    flow: torch.Tensor  # (steps + 1, B, n, 64, 2): normalised controls from noise to data
    seconds: dict  # vision, prefill, reasoning, flow
    temperature: float = 0.6  # how it was drawn, see `sample`
    top_p: float = 0.98
    eta: float = 0.0

    def __repr__(self):
        B, n, T = self.tokens.shape
        first = self.reasoning[0][0] if self.reasoning else ""
        return f"Rollout({B} scenes x {n} samples, {T} tokens; the first thinks {first!r})"


# Prefixes of the expert's parameter names, suffixes of those that `init_weights` treats apart.
OF_EXPERT = ("expert.", "action_in_proj.", "action_out_proj.")
START_AT_ZERO = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "mlp.linear_fc2.weight",
                   "action_out_proj.weight")  # fmt: skip
LEARNED_TABLES = ("embed_tokens.weight", "pos_embed.weight", "view_embed", ".queries", ".times",
                  ".tokens", ".views")  # fmt: skip


class Alpamayo(nn.Module):
    """Vision tower and language model (`vlm`), action expert (`expert`), and what joins them.
    Read `forward` for the losses of the three stages and `sample` for look, think, drive."""
    def __init__(self, cfg, vocabulary=None):
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
        if cfg.view_embed and cfg.vision == "image":  # by camera id and time
            self.view_embed = nn.Parameter(torch.zeros(7, cfg.times, cfg.n_embd))

    @property
    def device(self):
        return self.action_out_proj.weight.device

    def init_weights(self, generator=None):
        """From scratch: matrices are normal with standard deviation 1 / sqrt(fan in).
        Zero is what a layer adds to the residual stream, and the velocity, at first."""
        for name, p in self.named_parameters():
            if name.endswith(START_AT_ZERO):
                nn.init.zeros_(p)
            elif name.endswith(LEARNED_TABLES):
                nn.init.normal_(p, std=0.5, generator=generator)
            elif p.ndim > 1:
                nn.init.normal_(p, std=p[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            if ".flex." in name and name.endswith("qkv.weight"):
                # Queries and keys: a scene token starts with a few image tokens, not their mean.
                p.data[: 2 * p.shape[1]] *= 2

    @staticmethod
    def from_pretrained(folder=NANO, dtype=torch.float32, device="cpu", **switches):
        """A checkpoint of ours, or Alpamayo-R1-10B / Alpamayo-1.5-10B as released, in eval mode.
        The release lacks the backbone's tokenizer.json: put it beside. switches: fields of Config
        to change, such as keep=0.5. FileNotFoundError, ValueError: one line with file and field."""
        cfg = replace(read_config(folder), **switches)
        folder = os.fsdecode(folder)
        with torch.device("meta"):
            model = Alpamayo(cfg, Vocabulary(cfg, folder))
        release.load_weights(model, folder, dtype, device)
        return model.eval()

    def save_pretrained(self, folder, dtype=None, shard_bytes=5 * 2**30, reasoning=None):
        """Write a checkpoint in the release's format.
        dtype: of the weights on disk, as they are where not given; reasoning: whether the saved
        model thinks before it drives, "on" or "off", as its Config says where not given."""
        folder = os.fsdecode(folder)
        release.save_weights(self, folder, dtype, shard_bytes)
        source = self.vocabulary.path
        target = os.path.join(folder, "tokenizer.json")
        if source and os.path.abspath(source) != os.path.abspath(target):
            write_atomically(target, lambda part: shutil.copyfile(source, part))
        cfg = replace(self.cfg, reasoning=reasoning or self.cfg.reasoning)
        release.write_config(folder, vars(cfg), vars(Config()))

    # ---------------------------------------------------------------------------------- the prompt

    def look(self, scene, keep=None):
        """A Scene's images (B, cameras, frames, 3, H, W) through tower and encoder.
        keep: share of the image tokens kept by pruning, the Config's where not given. Returns
        tokens (B, V, n_embd), DeepStack's features (a list of the same), the grids (h, w) of tokens
        of each image of the prompt, and which image tokens were kept, (B, V), ascending."""
        cfg = self.cfg
        tower = self.vlm.model.visual
        images = resize(scene["images"].to(self.device), cfg)
        camera_ids = scene["camera_ids"].to(self.device)
        B, cameras, frames, _, H, W = images.shape
        placed = cfg.pair_frames or cfg.view_embed or cfg.vision != "image"
        if placed and frames != cfg.frames:
            raise ValueError(f"images: {frames} frames a camera; this model reads {cfg.frames}")
        if cfg.pair_frames:
            images = images.view(-1, cfg.temporal_patch, 3, H, W)
        else:
            images = images.view(-1, 1, 3, H, W).expand(-1, cfg.temporal_patch, -1, -1, -1)
        times = len(images) // (B * cameras)
        h, w = H // (cfg.patch * cfg.merge), W // (cfg.patch * cfg.merge)
        view = cameras, times, h, w
        x, deep, kept = tower(images, B, cfg.keep if keep is None else keep)
        if cfg.vision == "image":
            tokens = tower.merger(x)
            if cfg.view_embed:
                views = self.view_embed[camera_ids].flatten(1, 2)  # (B, cameras * times, n_embd)
                tokens = tokens + take(views, kept // (h * w)).to(tokens.dtype)
            deep = [merger(d) for merger, d in zip(tower.deepstack_merger_list, deep)]
            return tokens, deep, [[(h, w)]] * (cameras * times), kept
        if cfg.vision == "flex":
            tokens = tower.flex(x, kept, view, camera_ids)
            grids = [[(1, 1)] * cfg.flex_tokens]
        else:
            lenses = [scene[k].to(self.device) for k in ("intrinsics", "camera_to_ego")]
            tokens = tower.triplane(x, kept, view, *lenses)
            grids = [tower.triplane.grids()] * times
        every = torch.arange(tokens.shape[1], device=self.device).expand(B, -1)
        return tokens, [], grids, every

    def prompt_ids(self, camera_ids, images, reason, route=""):
        """The prompt's ids (P,): placeholders of images, ego history, route, instruction.
        images: for each one the grids (h, w) of its tokens. The paper leaves the form of the route
        open; here it is text between the release's route tokens."""
        cfg = self.cfg
        pads = ["<|image_pad|>" * sum(h * w for h, w in grids) for grids in images]
        history = "<|traj_history|>" * cfg.ego_tokens
        route = f"<|route_start|>{route}<|route_end|>" if route else ""
        if cfg.chat:
            named = cfg.name_cameras and cfg.vision == "image"  # planes and scene tokens: no camera
            text = chat(pads, camera_ids if named else None, history, route, reason)
        else:
            text = "".join(pads) + history + route
        text += "<|cot_start|>" if reason else "<|traj_future_start|>"
        return torch.tensor(self.vocabulary.encode(text))

    def embed_prompt(self, scene, reason=True):
        """The sequence of Eq. 1 up to where the model speaks: a `Prompt`.
        Pruned image tokens are not in it. Kept ones have the position they would have among all."""
        cfg, vocab, device = self.cfg, self.vocabulary, self.device
        check_scene(scene, *cfg.reads)
        tokens, deep, images, kept = self.look(scene)
        cameras = scene["camera_ids"]
        routes = scene["route"] if cfg.route and "route" in scene else [""] * len(cameras)
        every = [self.prompt_ids(cameras[0].tolist(), images, reason, r) for r in routes]
        if len({len(ids) for ids in every}) > 1:
            raise ValueError("route: a batch's routes must have equally many tokens, or none")
        grids = sum(images, [])
        positions = image_positions(every[0], vocab["image_pad"], grids).to(device)
        ids = torch.stack(every).to(device)

        # Leave out the image tokens that were pruned.
        is_image = ids[0] == vocab["image_pad"]
        image_at = is_image.nonzero()[:, 0][kept]  # (B, V)
        text_at = (~is_image).nonzero()[:, 0].expand(len(ids), -1)
        stay = torch.cat([text_at, image_at], 1).sort().values  # (B, P)
        ids = ids.gather(1, stay)
        positions = positions[:, stay]  # (3, B, P)
        image_at = torch.searchsorted(stay, image_at)

        # Ego history is behind all images, so at the same places in all scenes.
        ego_at = (ids[0] == vocab["traj_history"]).nonzero()[:, 0]
        if cfg.ego == "deltas":
            bins = history_bins(scene["ego_history_xyz"].to(device), cfg.history_bins)
            ids[:, ego_at] = bins + vocab.first_history
        x = self.vlm.model.language_model.embed_tokens(ids)
        if cfg.ego == "kinematics":
            ego = self.ego_embed(scene["ego_kinematics"].to(device))
            x = x.index_copy(1, ego_at, ego.to(x.dtype))
        x = x.scatter(1, image_at[..., None].expand_as(tokens), tokens.to(x.dtype))
        return Prompt(x, positions, image_at, deep, ids)

    def prefill(self, prompt, retrieve=1.0):
        """Read the prompt: its `Prefix`, the key-value cache that all samples of a scene share.
        retrieve: share of the image tokens that the reasoning will read back."""
        P = prompt.x.shape[1]
        n_ask = P - 1 - int(prompt.image_at.max()) if retrieve < 1 else 0  # words behind all images
        angles = rope(prompt.positions, self.cfg, prompt.x.dtype)
        x, cache = self.vlm.model.language_model(prompt.x, *angles, prompt=prompt, n_ask=n_ask)
        layers = [kv[:2] for kv in cache]
        recalled = layers
        if n_ask:
            recalled = [retrieved(*kv, prompt.image_at, retrieve) for kv in cache]
        return Prefix(layers, recalled, x[:, -1:], int(prompt.positions.max()) + 1)

    # ---------------------------------------------------------------------------------- the losses

    def forward(self, scene, stage="reason", **options):
        """The losses of a batch of Scenes (data.py), a dictionary of scalars.
        stage "action", "reason": `supervised_losses`; "rl": `rl_losses`. Options are theirs."""
        if stage == "rl":
            return self.rl_losses(scene, **options)
        return self.supervised_losses(scene, stage == "reason", **options)

    def supervised_losses(
        self, scene, reason, action_tokens=True, flow_samples=1, flow_t=None, flow_noise=None,
        generator=None, hide_actions=0.0, insulate=True,
    ):  # fmt: skip
        """Stages action (Sec. 5.1) and, with `reason`, reason (Sec. 5.2): cross-entropy of what the
        language model should say, and the expert's flow matching.
        action_tokens=False leaves the 128 out, for speed. flow_samples: noise levels a scene, which
        all read one cache; flow_t (N,) and flow_noise (N, 64, 2) fix them. hide_actions: share of
        the scenes whose earlier action tokens are not read. Not of the paper: after two or three
        action tokens the rest can be guessed, and the expert sends the tower no gradient, so the
        tower never learns the lane offset. insulate=False lets that gradient through, see
        `flow_losses`.
        Returns `text` and `action`, mean nats a token of each kind (the release adds them); `flow`,
        a mean square; `ade`, m, of where the velocity points; `tokens`, how many were read."""
        rot = [] if "actions" in scene else ["ego_future_rot"]
        check_scene(scene, "reasoning", "ego_future_xyz", *rot)
        actions = self.target_actions(scene)  # (B, 64, 2)
        prompt = self.embed_prompt(scene, reason)
        ids, ends = self.response_ids(scene, actions, reason, action_tokens)  # (B, R), (B,)
        inputs = ids.clamp(min=0)  # padding is -1
        if action_tokens and hide_actions:
            inputs = self.hide(inputs, hide_actions, generator)
        x, cache = self.read(prompt, inputs)
        losses = self.token_losses(x, ids, ends if action_tokens else None)
        t, noise = self.draw_flow(actions, flow_samples, flow_t, flow_noise, generator)
        losses |= self.flow_losses(scene, actions, prompt, cache, ends, t, noise, insulate)
        losses["tokens"] = torch.tensor(float(x.shape[0] * x.shape[1]))
        return losses

    def target_actions(self, scene):
        """Normalised controls (B, 64, 2) of the driven future, fitted to its path.
        A scene may bring `actions` in SI units."""
        if "actions" in scene:
            return self.action_space.normalise(scene["actions"].to(self.device))
        keys = "ego_history_xyz", "ego_history_rot", "ego_future_xyz", "ego_future_rot"
        return self.action_space.normalise(fit_actions(*(scene[k].to(self.device) for k in keys)))

    def response_ids(self, scene, actions, reason, action_tokens):
        """What the language model should say: ids (B, R), right-padded with -1, and `ends` (B,),
        the number of ids up to <|traj_future_start|>, where the expert's prefix ends."""
        cfg, vocab = self.cfg, self.vocabulary
        says = []
        for text in scene["reasoning"]:
            says.append(vocab.encode(f"{text}<|cot_end|><|traj_future_start|>") if reason else [])
        ends = torch.tensor([len(reasoning) for reasoning in says])
        if action_tokens:
            end = vocab.encode("<|traj_future_end|>" + ("<|im_end|>" if cfg.chat else ""))
            bins = to_bins(actions, -cfg.bin_range, cfg.bin_range, cfg.bins)
            ids = (bins + vocab.first_action).flatten(1)  # (B, 128): a0 k0 a1 k1 ...
            for reasoning, tokens in zip(says, ids.tolist()):
                reasoning += tokens + end
        padded = [torch.tensor(tokens, dtype=torch.long) for tokens in says]
        ids = nn.utils.rnn.pad_sequence(padded, batch_first=True, padding_value=-1)
        return ids.to(self.device), ends.to(self.device)

    def hide(self, ids, share, generator):
        """The ids (B, R) with a placeholder for every action token in a share of the scenes."""
        first = self.vocabulary.first_action
        is_action = (ids >= first) & (ids < first + self.cfg.bins)
        drawn = torch.rand(len(ids), 1, generator=generator, device=ids.device)
        return torch.where((drawn < share) & is_action, self.vocabulary["traj_future"], ids)

    def read(self, prompt, ids):
        """Prompt and response (B, R) in one pass: hidden states (B, P + R, C) and the cache."""
        lm = self.vlm.model.language_model
        B, R = ids.shape
        x = torch.cat([prompt.x, lm.embed_tokens(ids)], 1)
        behind = prompt.positions.max() + 1 + torch.arange(R, device=ids.device)
        positions = torch.cat([prompt.positions, behind.expand(3, B, -1)], 2)
        return lm(x, *rope(positions, self.cfg, x.dtype), prompt=prompt)

    def token_losses(self, x, ids, ends=None):
        """Cross-entropy of the Chain of Causation (Eq. 9) and of action tokens, ids (B, R), from
        hidden states x (B, P + R, C), padding left out: `text` and, with `ends` (B,), `action`."""
        B, R = ids.shape
        if not R:
            return {}
        logits = self.vlm.lm_head(x[:, -R - 1 : -1]).float()
        nats = F.cross_entropy(logits.mT, ids, ignore_index=-1, reduction="none")  # (B, R)
        losses = {}
        is_text = ids >= 0
        if ends is not None:  # action tokens: from <|traj_future_start|> to <|traj_future_end|>
            late = torch.arange(R, device=ids.device) >= ends[:, None] - 1
            is_action = is_text & late & (ids != self.vocabulary["im_end"])
            losses["action"] = nats[is_action].mean()
            is_text = is_text & ~is_action
        if is_text.any():
            losses["text"] = nats[is_text].mean()
        return losses

    def draw_flow(self, actions, n, t=None, noise=None, generator=None):
        """Flow times (N,) and noise (N, 64, 2) of n noise levels a scene, drawn where None."""
        N = len(actions) * n
        if t is None:
            t = flow_time(N, generator, actions.device)
        if noise is None:
            noise = torch.randn(N, HORIZON, 2, generator=generator, device=actions.device)
        return t, noise

    def flow_losses(self, scene, actions, prompt, cache, ends, t, noise, insulate=True):
        """Flow matching (Eq. 6, 7): x_t lies on the straight line from noise to the controls, and
        the expert learns the line's velocity, data - noise.
        actions (B, 64, 2), ends (B,): see `response_ids`; t (N,), noise (N, 64, 2), several a
        scene. Returns `flow` and `ade`.
        insulate: with the stop-gradient (knowledge insulation, Sec. 5.1), which keeps what the
        language model knew before. Without it this loss teaches the vlm, too; not the paper's."""
        B, P = prompt.x.shape[:2]
        n = len(t) // B
        device = actions.device
        data = actions.repeat_interleave(n, 0)
        share = t[:, None, None]
        x_t = share * data + (1 - share) * noise

        L = P + int(ends.max())
        mask = torch.arange(L, device=device) < (P + ends)[:, None]  # (B, L)
        past = [Past((k[:, :, :L], v[:, :, :L]), None, mask) for k, v in cache]
        if insulate:
            past = [kv.detach() for kv in past]
        start = (prompt.positions.max() + 1 + ends).repeat_interleave(n)
        velocity = self.velocity(x_t, t, past, start)
        flow = F.mse_loss(velocity, data - noise)

        guess = self.action_space.restore(x_t + (1 - share) * velocity)  # where the line leads
        v0 = self.speed(scene).repeat_interleave(n)
        truth = scene["ego_future_xyz"].to(device).repeat_interleave(n, 0)
        return {"flow": flow, "ade": ade(roll_out(guess, v0)[0], truth).mean()}

    def velocity(self, x_t, t, past, start):  # kernels/sampler.py has it too
        """The expert's velocity (N, 64, 2) of noisy controls x_t (N, 64, 2) at times t (N,).
        past: a `Past` for every layer; its 64 tokens take the positions from start (N,) on."""
        x = self.action_in_proj(x_t, t)
        x = self.expert(x, *self.rope_behind(start, HORIZON, x.dtype), past)
        return self.action_out_proj(x).to(x_t.dtype)

    def rope_behind(self, start, n, dtype):
        """cos and sin (N, 1, n, d / 2) of n tokens from positions start (N,) on."""
        positions = start[:, None] + torch.arange(n, device=start.device)
        return rope(positions.expand(3, -1, -1), self.cfg, dtype)

    def speed(self, scene):
        """Speed (B,) in m/s at t0."""
        return initial_speed(scene["ego_history_xyz"], scene["ego_history_rot"]).to(self.device)

    def rl_losses(
        self, scene, rollout, advantage, objective="clip", beta=2.0, kl_weight=None,
        drive_weight=1.0, reference=None, old=None, insulate=True,
    ):  # fmt: skip
        """Stage rl (Sec. 5.3): GRPO on a group of rollouts of each scene. Two heads decide, the
        thought's tokens and the drive's random steps (or its action tokens). Each has its own
        advantage {"thought": (B, G), "drive": (B, G)}, a reward (rl.py) less the group's mean; one
        without does not learn. objective, beta: see `grpo`; kl_weight {head: float}: of the KL to
        the SFT model, whose `replay` is `reference`; drive_weight: of the drive's loss beside the
        thought's; old {head: (B, G, T)}: log-probabilities at the first update on this rollout;
        insulate: see `flow_losses`.
        Returns `policy`, the loss, and what it was made of, `heads` and `replay`."""
        replayed = self.replay(scene, rollout, insulate)
        heads = heads_of(replayed, rollout, reference)
        losses = {"thought": 0.0, "drive": 0.0}
        for name, head in heads.items():
            weight = (kl_weight or {}).get(name, 0.0)
            if name in advantage:
                before = old[name] if old else head.log_pi.detach()
                losses[name] = grpo(objective, head, before, advantage[name], beta, weight)
            elif weight:
                losses[name] = weight * head.kl.mean()  # shared weights move it all the same
        policy = losses["thought"] + drive_weight * losses["drive"]
        return {"policy": policy, "heads": heads, "replay": replayed}

    # -------------------------------------------------------------------------------- the sampler

    @torch.no_grad()
    def sample(
        self, scene, n=6, temperature=0.6, top_p=0.98, steps=10, max_new_tokens=256, noise=None,
        seed=None, reason=None, decode="flow", eta=0.0, choose=None,
    ):  # fmt: skip
        """Look, think, drive: n samples of B scenes, each with its own reasoning (Sec. 5.1).
        temperature 0 is greedy; top_p keeps the likeliest tokens that together have that
        probability; steps: of Euler from noise (B * n, 64, 2), drawn where not given; seed fixes
        both draws. reason=False drives without thinking; None: as the Config says. decode "flow":
        the expert drives; "tokens": the language model says its 128 action tokens, which is slow
        and is what the paper's reinforcement learning scores. eta: see euler_step.
        choose: in place of `pick`, logits (B * n, vocab) to tokens and log-probabilities (B * n,).
        The prompt's keys and values are stored once for all n samples. Returns a Rollout."""
        check_sampling(n, temperature, top_p, steps, max_new_tokens, decode, eta, seed, noise)
        cfg = self.cfg
        reason = cfg.reasoning == "on" if reason is None else reason
        generator = torch.Generator(self.device).manual_seed(seed) if seed is not None else None
        clock = Clock(self.device)
        usual = partial(pick, temperature=temperature, top_p=top_p, generator=generator)
        prompt = self.embed_prompt(scene, reason)
        clock.lap("vision")
        prefix = self.prefill(prompt, cfg.retrieve if reason else 1.0)
        clock.lap("prefill")
        due = 2 * HORIZON if decode == "tokens" else 0  # action tokens
        thought = self.think(prefix, n, reason, due, max_new_tokens, choose or usual)
        clock.lap("reasoning")
        if decode == "tokens":
            flow = self.said_controls(thought)[None]
        else:
            flow = self.drive(prefix, thought, steps, noise, eta, generator)
        actions = self.action_space.restore(flow[-1])  # (N, 64, 2)
        xyz, rot = roll_out(actions, self.speed(scene).repeat_interleave(n))
        clock.lap("flow")
        if not (actions.isfinite().all() and thought.log_probs.isfinite().all()):
            raise FloatingPointError("sample: what the model computes is not finite")

        texts = self.texts_of(thought)
        reasoning = [texts[i : i + n] for i in range(0, len(texts), n)]
        by_sample = (*thought[:3], actions, xyz, rot)  # tokens, chosen, log_probs: (N, T)
        by_scene = [a.unflatten(0, (-1, n)) for a in by_sample]
        flow = flow.unflatten(1, (-1, n))
        return Rollout(reasoning, *by_scene, flow, clock.seconds, temperature, top_p, eta)

    def think(self, prefix, n, reason, due, max_new_tokens, choose):
        """Say the reasoning token by token, and then `due` action tokens: a `Thought` of N samples.
        choose: logits (N, vocab) to tokens and log-probabilities (N,). Ends when every sample has
        said <|traj_future_start|>, which the expert reads too, and its `due` action tokens."""
        lm, vocab = self.vlm.model.language_model, self.vocabulary
        x = prefix.x.repeat_interleave(n, 0)  # (N, 1, C)
        N = len(x)
        thinking = torch.full((N,), reason, device=x.device)
        length = torch.zeros(N, dtype=torch.long, device=x.device)  # up to <|traj_future_start|>
        tail = [None] * len(lm.layers)
        ahead = self.rope_behind(length[:1] + prefix.end, due + max_new_tokens * reason, x.dtype)
        recorded = decoding.recorded(Alpamayo.think, self, prefix.recalled, N, ahead)
        said = []  # of each step: tokens, whether they were chosen, their log-probabilities
        while True:
            step = len(said)
            busy = thinking | (step - length < due)
            if not busy.any():
                break
            logits = self.allowed(self.vlm.lm_head(x[:, -1]).float(), ~thinking)
            token, log_prob = choose(logits)
            forced = thinking & (step == max_new_tokens - 1)  # out of time to think: drive
            token = torch.where(forced, vocab["traj_future_start"], token)
            token = torch.where(busy, token, vocab["endoftext"])  # finished: padding, never read
            chosen = busy & ~forced
            said.append((token, chosen, log_prob * chosen))
            length = torch.where(thinking, step + 1, length)
            thinking = thinking & (token != vocab["traj_future_start"])
            if recorded:
                x = recorded.read(token)
                continue
            angles = [a[:, :, step : step + 1] for a in ahead]
            past = [Past(kv, own) for kv, own in zip(prefix.recalled, tail)]
            x, tail = lm(lm.embed_tokens(token)[:, None], *angles, past)
        tail = recorded.tail(len(said)) if recorded else tail
        if not said:
            none = torch.zeros(N, 0, device=x.device)
            return Thought(none.long(), none.bool(), none, length, tail)
        tokens, chosen, log_probs = (torch.stack(column, 1) for column in zip(*said))
        return Thought(tokens, chosen, log_probs, length, tail)

    def allowed(self, logits, driving):
        """Logits (..., vocab) with disallowed tokens masked: trajectory tokens while it thinks, all
        but action tokens where `driving` (...)."""
        first = self.vocabulary.first_action
        last = first + self.cfg.bins
        token = torch.arange(logits.shape[-1], device=logits.device)
        is_action = (token >= first) & (token < last)
        is_trajectory = (token >= first) & (token < last + self.cfg.history_bins)
        masked = torch.where(driving[..., None], ~is_action, is_trajectory)
        return logits.masked_fill(masked, -1e9)  # not -inf: p log p would give NaN gradients

    def texts_of(self, thought):
        """The reasoning of each sample, N str."""
        end = self.vocabulary["cot_end"]
        texts = []
        for ids, length in zip(thought.tokens.tolist(), thought.length.tolist()):
            ids = ids[: ids.index(end) if end in ids else length]
            texts.append(self.vocabulary.decode(ids))
        return texts

    def said_controls(self, thought):
        """Normalised controls (N, 64, 2) of the action tokens that the language model said."""
        cfg = self.cfg
        at = thought.length[:, None] + torch.arange(2 * HORIZON, device=self.device)
        bins = thought.tokens.gather(1, at) - self.vocabulary.first_action
        return from_bins(bins.view(-1, HORIZON, 2), -cfg.bin_range, cfg.bin_range, cfg.bins)

    def drive(self, prefix, thought, steps, noise=None, eta=0.0, generator=None):
        """Euler steps of the flow from noise (N, 64, 2) to controls, Eq. 7 from t = 0 to 1: all of
        them, (steps + 1, N, 64, 2). eta: see euler_step."""
        N, T = thought.tokens.shape
        device = thought.tokens.device
        if noise is None:
            noise = torch.randn(N, HORIZON, 2, generator=generator, device=device)
        if noise.shape != (N, HORIZON, 2):
            raise ValueError(f"noise: shape {tuple(noise.shape)}, expected {(N, HORIZON, 2)}")
        x = noise.to(device)
        start = prefix.end + thought.length
        dtype = next(self.expert.parameters(), x).dtype
        fast = by_hand(device, dtype)
        if fast and stock.is_flow(Alpamayo.drive, self, prefix.layers):  # see kernels/stock.py
            parts = self.expert, self.action_in_proj, self.action_out_proj
            cos, sin = self.rope_behind(start, HORIZON, dtype)
            seen = torch.arange(T, device=device) < thought.length[:, None]
            inputs = *parts, steps, x, cos, sin, prefix.layers, thought.tail, seen, eta, generator
            if one_launch.fits(self.cfg, HORIZON, prefix.layers[0][0].dtype):
                return one_launch.sample_in_one_launch(*inputs)
            return sample_flow(*inputs)
        past = self.expert_past(prefix, thought.tail, T, thought.length)
        flow = [x]
        for i in range(steps):
            t = i / steps
            velocity = self.velocity(x, torch.full((N,), t, device=device), past, start)
            x, std = euler_step(x, velocity, t, 1 / steps, eta)
            if std:
                x = x + std * torch.randn(x.shape, generator=generator, device=device)
            flow.append(x)
        return torch.stack(flow)

    def expert_past(self, prefix, tail, T, length, insulate=True):  # kernels/sampler.py has it too
        """The expert's `Past` of every layer: the prompt, and of a sample's own T tokens the first
        length (N,). insulate: see `flow_losses`."""
        at = torch.arange(T + HORIZON, device=length.device)
        mask = (at < length[:, None]) | (at >= T)  # (N, T + 64): its 64 tokens see one another
        past = [Past(kv, own, None, mask[:, None]) for kv, own in zip(prefix.layers, tail)]
        return [kv.detach() for kv in past] if insulate else past

    def replay(self, scene, rollout, insulate=True):
        """The passes of a Rollout once more, all at once and with gradients: a `Replay`.
        The prompt is read once, the n samples' tokens stand behind it side by side. insulate: see
        `flow_losses`. ValueError where reasoning reads only a share of the cache (retrieve < 1)."""
        cfg, lm = self.cfg, self.vlm.model.language_model
        if cfg.retrieve < 1:
            raise ValueError(f"retrieve: replay reads the whole cache, not {cfg.retrieve} of it")
        tokens = rollout.tokens.flatten(0, 1)  # (N, T)
        N, T = tokens.shape
        n = rollout.tokens.shape[1]
        device = self.device
        said_start = tokens == self.vocabulary["traj_future_start"]
        reason = bool(said_start.any())
        prefix = self.prefill(self.embed_prompt(scene, reason))
        length = said_start.int().argmax(1) + 1 if reason else tokens.new_zeros(N)
        tail = [None] * cfg.n_layer
        logits = prefix.x.new_zeros(N, 0, cfg.vocab)
        if T:
            at = torch.arange(T, device=device)
            causal = (at <= at[:, None]).expand(N, -1, -1)
            past = [Past(kv, None, None, causal) for kv in prefix.layers]
            y = lm.embed_tokens(tokens)
            angles = rope((prefix.end + at).expand(3, 1, -1), cfg, y.dtype)
            y, tail = lm(y, *angles, past)
            # Each token was predicted from the one before, the first from the prompt's last.
            y = torch.cat([prefix.x.repeat_interleave(n, 0), y[:, :-1]], 1)
            logits = self.allowed(self.vlm.lm_head(y).float(), at >= length[:, None])
        steps = len(rollout.flow) - 1
        noisy = steps - 1 if rollout.eta else 0  # the last step is Euler's
        moves = []
        if noisy:  # steps do not see one another: as more samples, one pass of the expert reads all
            x = rollout.flow[:noisy].flatten(1, 2).transpose(0, 1)  # (N, S, 64, 2)
            t = torch.arange(noisy, device=device) / steps
            ends = length.repeat_interleave(noisy)
            own = [kv and tuple(z.repeat_interleave(noisy, 0) for z in kv) for kv in tail]
            past = self.expert_past(prefix, own, T, ends, insulate)
            velocity = self.velocity(x.flatten(0, 1), t.repeat(N), past, prefix.end + ends)
            for i in range(noisy):
                where = x[:, i], velocity.view_as(x)[:, i]
                moves.append(euler_step(*where, i / steps, 1 / steps, rollout.eta))
        return Replay(logits, moves, (prefix, tail, T, length))


def load_model(folder=NANO, device=None, **switches):
    """A checkpoint on a device, by default a GPU if there is one. There it is in bfloat16."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    large = read_config(folder).max_pixels > 0
    half = device.type == "cuda" or (large and device.type != "cpu")
    dtype = torch.bfloat16 if half else torch.float32
    return Alpamayo.from_pretrained(folder, dtype, device, **switches)


# What joins the parts. Each travels from one method to the next.


class Prompt(NamedTuple):
    """The prompt as the decoder reads it."""
    x: torch.Tensor  # (B, P, n_embd)
    positions: torch.Tensor  # (3, B, P): M-RoPE
    image_at: torch.Tensor  # (B, V): where the image tokens are
    deep: list  # DeepStack features (B, V, n_embd)
    ids: torch.Tensor  # (B, P)


class Prefix(NamedTuple):
    """The prompt once it was read: what all samples of a scene share."""
    layers: list  # of each layer keys and values (B, K, P, d)
    recalled: list  # the same, or the share of it that the reasoning reads back
    x: torch.Tensor  # (B, 1, C): the last hidden state
    end: int  # the position behind it


class Thought(NamedTuple):
    """What N samples said."""
    tokens: torch.Tensor  # (N, T)
    chosen: torch.Tensor  # (N, T) bool: drawn, neither padding nor forced
    log_probs: torch.Tensor  # (N, T): of the chosen tokens, else 0
    length: torch.Tensor  # (N,): tokens up to <|traj_future_start|>
    tail: list  # of each layer keys and values (N, K, T, d), or None


class Past(NamedTuple):
    """What a layer's queries read beside their own tokens: the prompt that a scene's samples share,
    stored once, and each sample's own tail."""
    prefix: tuple  # keys and values (B, K, P, d)
    tail: tuple = None  # keys and values (N, K, S, d)
    prefix_mask: torch.Tensor = None  # (B, P) bool; None: all are seen
    mask: torch.Tensor = None  # (N, 1 or T, S + T) bool, over tail and own tokens

    def detach(self):
        """The same behind a stop-gradient."""
        tail = self.tail and tuple(x.detach() for x in self.tail)
        return self._replace(prefix=tuple(x.detach() for x in self.prefix), tail=tail)


class Replay(NamedTuple):
    """A Rollout's passes once more."""
    logits: torch.Tensor  # (N, T, vocab), disallowed tokens masked
    moves: list  # of each random step of the flow, S of them: see `euler_step`
    read: tuple  # what the expert reads: prefix, tail, T, and each thought's length (N,)


class Head(NamedTuple):
    """What a head of the model decided in a group of rollouts: tokens, or random steps."""
    log_pi: torch.Tensor  # (B, G, T): log-probabilities, with gradient; 0 where nothing was decided
    decided: torch.Tensor  # (B, G, T) bool
    kl: torch.Tensor  # (B, G): nats to the reference policy


class Clock:
    """Wall-clock seconds of each stage; waits until the GPU has finished it."""
    def __init__(self, device):
        self.cuda = torch.device(device).type == "cuda"
        self.seconds = {}
        self.last = time.perf_counter()

    def lap(self, name):
        """What came since the last lap was this."""
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now

# --------------------------------------------------------------------------------------------------
# Actions: a path of 64 poses at 10 Hz <-> 64 pairs of acceleration and curvature of a unicycle
# (Eq. 2, 3 and 5; Sec. 3.2.2)

DT = 0.1  # seconds
HORIZON = 64  # steps: 6.4 s
CURVATURE_BOUND = 0.33  # 1/m: a turning radius of 3 m
LOW_SPEED = 0.6  # m/s: below it a unicycle's curvature cannot be observed


def yaw_of(rot):
    """Heading in rad of rotation matrices (..., 3, 3)."""
    return torch.atan2(rot[..., 1, 0], rot[..., 0, 0])


def rot_of(yaw):  # kernels/flow_step.py has it too
    """Rotation matrices (..., 3, 3) about z of headings (...) in rad."""
    cos, sin = yaw.cos(), yaw.sin()
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    rows = [cos, -sin, zero, sin, cos, zero, zero, zero, one]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def roll_out(actions, v0):  # kernels/flow_step.py has it too
    """Drive a unicycle from the origin of the ego frame, in Euler steps of 0.1 s (Eq. 5).
    actions (..., 64, 2): acceleration m/s^2, curvature 1/m (left-positive); v0 (...): m/s at t0.
    Returns xyz (..., 64, 3) in metres, with z = 0, and rot (..., 64, 3, 3)."""
    if by_hand(actions.device, actions.dtype) and stock.is_roll_out(roll_out):
        return roll_out_by_kernel(actions, v0)
    accel, curvature = actions.unbind(-1)
    v0 = v0[..., None]
    v = torch.cat([v0, v0 + DT * accel.cumsum(-1)], -1)  # (..., 65)
    turn = DT * curvature * v[..., :-1] + DT**2 / 2 * curvature * accel
    yaw = torch.cat([torch.zeros_like(v0), turn.cumsum(-1)], -1)
    vx = v * yaw.cos()
    vy = v * yaw.sin()
    x = (DT / 2 * (vx[..., :-1] + vx[..., 1:])).cumsum(-1)
    y = (DT / 2 * (vy[..., :-1] + vy[..., 1:])).cumsum(-1)
    return torch.stack([x, y, torch.zeros_like(x)], -1), rot_of(yaw[..., 1:])


def ade(path, truth):
    """Average displacement error in m, (...): the mean over 6.4 s of the distance in the ground
    plane between a path (..., 64, 3) and the driven one (..., 64, 3)."""
    return (path - truth)[..., :2].norm(dim=-1).mean(-1)


def in_float64(x):
    """x in float64, on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def smooth_solve(A, b, order, smooth, ridge, first=None):
    """Least squares with Tikhonov regularisation:
        argmin_x |A x - b|^2 + smooth |D x|^2 + ridge |x|^2,  D the differences of that order

    A (..., m, n), b (..., m); first (...): a known x[0]. Normal equations by Cholesky in float64:
    at 10 Hz the third differences' D^T D reaches 2e7, too much for float32."""
    n = A.shape[-1]
    eye = torch.eye(n, dtype=torch.float64, device=A.device)
    D = eye.diff(n=order, dim=0) / DT**order
    M = A.mT @ A + smooth * D.mT @ D + ridge * eye
    rhs = A.mT @ b[..., None]  # (..., n, 1)
    if first is None:
        return torch.cholesky_solve(rhs, torch.linalg.cholesky(M))[..., 0]
    first = first[..., None]
    rhs = rhs[..., 1:, :] - (M[..., 1:, 0] * first)[..., None]
    rest = torch.cholesky_solve(rhs, torch.linalg.cholesky(M[..., 1:, 1:]))[..., 0]
    return torch.cat([first, rest], -1)


def unwrap(yaw):
    """Headings (..., T) without jumps of 2 pi."""
    step = yaw.diff(dim=-1)
    step = step - 2 * math.pi * torch.round(step / (2 * math.pi))
    first = yaw[..., :1]
    return torch.cat([first, first + step.cumsum(-1)], -1)


def fit_speed(xy, yaw, v0=None):
    """Speed (..., T) in m/s along a path xy (..., T, 2) with headings yaw (..., T), such that
    Eq. 5 meets each next point; v0 (...): a known first speed."""
    T = xy.shape[-2]
    ahead = torch.stack([yaw.cos(), yaw.sin()], -1)  # (..., T, 2): the direction of travel
    # v[t] ahead[t] + v[t+1] ahead[t+1] = 2 dp / dt, in x and in y
    A = torch.zeros(*xy.shape[:-2], 2, T - 1, T, dtype=torch.float64, device=xy.device)
    step = torch.arange(T - 1, device=xy.device)
    A[..., step, step] = ahead[..., :-1, :].mT
    A[..., step, step + 1] = ahead[..., 1:, :].mT
    b = 2 / DT * xy.diff(dim=-2).mT  # (..., 2, T - 1)
    return smooth_solve(A.flatten(-3, -2), b.flatten(-2), 3, 1e-6, 1e-4, v0)


def initial_speed(history_xyz, history_rot):
    """Speed (...) in m/s at t0 of history_xyz (..., T, 3) and history_rot (..., T, 3, 3)."""
    yaw = unwrap(yaw_of(in_float64(history_rot)))
    speed = fit_speed(in_float64(history_xyz)[..., :2], yaw)
    return speed[..., -1].to(history_xyz)


def fit_actions(history_xyz, history_rot, future_xyz, future_rot):
    """Acceleration and curvature (..., 64, 2) in m/s^2 and 1/m of a driven path, smoothed against
    sensor noise (Sec. 3.2.2).

    history (..., 16, 3[, 3]) and future (..., 64, 3[, 3]) in the ego frame at t0. Four least
    squares in turn: heading, speed, acceleration, curvature, as the release. One thing differs.
    Where the car hardly moves, curvature is 0 / 0 and the release's fit runs wild. Ours is clamped
    to +-0.33 1/m, and is 0 where either end of the step is slower than 0.6 m/s."""
    xy = F.pad(in_float64(future_xyz)[..., :2], (0, 0, 1, 0))  # (..., 65, 2): from the origin on
    eye = torch.eye(HORIZON + 1, dtype=torch.float64, device=xy.device)
    measured = unwrap(F.pad(in_float64(yaw_of(future_rot)), (1, 0)))
    yaw = smooth_solve(eye, measured, 3, 1e-6, 1e-8, torch.zeros_like(measured[..., 0]))
    v = fit_speed(xy, yaw, in_float64(initial_speed(history_xyz, history_rot)))
    accel = smooth_solve(eye[1:, 1:], v.diff(dim=-1) / DT, 2, 1e-4, 1e-4)

    arc = DT * v[..., :-1] + DT**2 / 2 * accel  # arc length in m: dyaw = curvature * arc (Eq. 5)
    curvature = smooth_solve(torch.diag_embed(arc), yaw.diff(dim=-1), 2, 1e-4, 1e-4)
    curvature = curvature.clamp(-CURVATURE_BOUND, CURVATURE_BOUND)
    fast = v.abs() >= LOW_SPEED
    moving = fast[..., :-1] & fast[..., 1:]
    return torch.stack([accel, curvature * moving], -1).to(future_xyz)


class ActionSpace(nn.Module):
    """Controls in SI units <-> numbers of mean 0 and standard deviation about 1."""
    def __init__(self, cfg):
        super().__init__()
        for name in ("accel_mean", "accel_std", "curvature_mean", "curvature_std"):
            self.register_buffer(name, torch.tensor(getattr(cfg, name)))

    def moments(self):
        """Mean and standard deviation, (2,) each."""
        mean = torch.stack([self.accel_mean, self.curvature_mean])
        std = torch.stack([self.accel_std, self.curvature_std])
        return mean.float(), std.float()

    def normalise(self, actions):
        """Controls (..., 2) in m/s^2 and 1/m to normalised ones."""
        mean, std = self.moments()
        return (actions - mean) / std

    def restore(self, normalised):
        """Normalised controls (..., 2) to m/s^2 and 1/m."""
        mean, std = self.moments()
        return normalised.float() * std + mean


# --------------------------------------------------------------------------------------------------
# Tokens. One vocabulary (release.Vocabulary): text, then <i0> <i1> ... (action bins, then history
# bins), then the release's special tokens.


def to_bins(x, low, high, bins):
    """The nearest of `bins` evenly spaced levels from low to high, by number. Values out of range
    take the end ones. Action tokens: 3000 levels over +-10 standard deviations (Sec. 3.2.2)."""
    return ((x - low) / (high - low) * (bins - 1)).round().clamp(0, bins - 1).long()


def from_bins(i, low, high, bins):
    """The levels that to_bins chose."""
    return low + i.float() / (bins - 1) * (high - low)


def history_bins(history_xyz, bins):
    """Ego history (B, 16, 3) to 48 bin numbers (B, 48): steps in x, y, z within +-4, +-4, +-10 m.
    The release takes the first step from the ego frame's origin, some 20 m ahead at speed, so its
    x is nearly always the lowest bin."""
    step = F.pad(history_xyz, (0, 0, 1, 0)).diff(dim=1)
    high = torch.tensor([4.0, 4.0, 10.0], device=step.device)
    return to_bins(step, -high, high, bins).flatten(1)


class EgoEmbed(nn.Module):
    """ego = "kinematics": speed, acceleration, steering and turn signal (B, 20, 4) to 4 tokens of
    half a second each. Ours; it is what the paper's labellers were shown."""
    def __init__(self, cfg):
        super().__init__()
        self.fc1 = nn.Linear(20, cfg.n_embd)
        self.fc2 = nn.Linear(cfg.n_embd, cfg.n_embd)

    def forward(self, kinematics):
        scale = torch.tensor([0.1, 0.5, 10.0, 1.0], device=kinematics.device)  # to about 1
        x = (kinematics * scale).unflatten(1, (4, 5)).flatten(2)  # (B, 4, 20)
        return self.fc2(F.gelu(self.fc1(x.to(self.fc1.weight.dtype))))


# --------------------------------------------------------------------------------------------------
# Seeing: images -> patches -> tower -> tokens of the language model (Qwen3-VL's vision tower)


def project(points, intrinsics):
    """Pixels of points (..., 3) in camera axes, and whether the camera sees them.
    intrinsics (10,), or any (..., 10) that broadcasts to points: kind, width, height, cx, cy, a0,
    a1, a2, a3, a4. Kind 0 is f-theta: pixel radius = a0 + a1 th + ... + a4 th^4, with th the angle
    off the optical axis in rad. Kind 1 is a pinhole: a0 = fx, a1 = fy.
    Returns pixels (..., 2), u right, v down, pixel centres at integer + 0.5; visible (...) bool."""
    kind, width, height, cx, cy, a0, a1, a2, a3, a4 = intrinsics.unbind(-1)
    x, y, z = points.unbind(-1)
    rho = torch.hypot(x, y)
    th = torch.atan2(rho, z)  # 0 ahead, pi behind: no division by z
    radius = a0 + th * (a1 + th * (a2 + th * (a3 + th * a4)))
    slope = a1 + th * (2 * a2 + th * (3 * a3 + th * 4 * a4))
    scale = torch.where(rho > 0, radius / rho.clamp(min=1e-9), 0)
    depth = z.clamp(min=1e-6)
    pinhole = kind == 1
    u = cx + torch.where(pinhole, a0 * x / depth, scale * x)
    v = cy + torch.where(pinhole, a1 * y / depth, scale * y)

    # A polynomial means nothing where it turns back. No lens here sees 115 degrees off its axis.
    ahead = torch.where(pinhole, z > 1e-6, (slope > 0) & (th < 2.0))
    visible = ahead & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    return torch.stack([u, v], -1), visible


def patchify(images, cfg):
    """Images (M, frames, 3, H, W) uint8 to patches (M, h * w, 3 * frames * patch^2) in -1 .. 1.
    Patches are ordered so that each merge x merge group, one token later, is contiguous."""
    p, m = cfg.patch, cfg.merge
    M, T, _, H, W = images.shape
    x = images.float() / 127.5 - 1
    x = x.view(M, T, 3, H // p // m, m, p, W // p // m, m, p)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # M, h/m, w/m, m, m, 3, T, p, p
    return x.reshape(M, H // p * (W // p), 3 * T * p * p)


def rotate(x, cos, sin):  # kernels/sampler.py has it too
    """Rotary position embedding of x (..., T, d) by angles whose cos and sin are (..., T, d / 2).
    Dimension i turns with i + d / 2."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def take(x, places):
    """Rows `places` (B, k) of x (B, V, ...), each scene its own: (B, k, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], places]


class Layout(NamedTuple):
    """Which patch stands where. The rows of x are images, and once tokens are pruned, scenes."""
    cos: torch.Tensor  # rotary angles, (h * w, d / 2), then (scenes, patches, d / 2)
    sin: torch.Tensor
    kept: torch.Tensor  # (scenes, V): the merge groups that are left, ascending
    images: tuple = None  # None for dense, else (offsets, longest): attention stays within an image
    heads: tuple = None  # the pruning block's q, k, v from before pruning,
    rows: torch.Tensor = None  # and which of their rows are left


class PatchEmbed(nn.Module):
    """The release's 3D convolution over patches that do not overlap is one matrix product."""
    def __init__(self, cfg):
        super().__init__()
        size = (cfg.temporal_patch, cfg.patch, cfg.patch)
        self.proj = nn.Conv3d(3, cfg.v_embd, size, size)

    def forward(self, patches):
        weight = self.proj.weight.flatten(1)
        return F.linear(patches.to(weight.dtype), weight, self.proj.bias)


class VisionAttention(nn.Module):
    """Attention among the patches of an image."""
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.v_head
        self.qkv = nn.Linear(cfg.v_embd, 3 * cfg.v_embd)
        self.proj = nn.Linear(cfg.v_embd, cfg.v_embd)

    def heads(self, x, layout=None):
        """Queries, keys and values (M, H, S, d) of x (M, S, C); rotated where there is a layout."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.n_head, -1)).unbind(2)  # (M, S, H, d)
        if layout:
            cos = layout.cos[..., None, :]
            sin = layout.sin[..., None, :]
            q = rotate(q, cos, sin).to(v.dtype)
            k = rotate(k, cos, sin).to(v.dtype)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, layout=None):
        """x (M, S, C): every patch of a row sees every other, or where the layout says so, every
        other of its image."""
        if layout is None or layout.images is None:
            q, k, v = self.heads(x, layout)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        else:
            heads = layout.heads or self.heads(x, layout)
            q, k, v = (a.transpose(1, 2).flatten(0, 1) for a in heads)  # (patches, H, d)
            y = pruned_attention(q, k, v, *layout.images, layout.rows)
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

    def forward(self, x, layout=None):
        x = x + self.attn(self.norm1(x), layout)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """merge x merge patches to one token of the language model (single-image tokens, Sec. 3.2.1).
    The paper's default downsamples the features bilinearly by 2 instead; we follow the release.
    DeepStack's mergers normalise after the grouping."""
    def __init__(self, cfg, norm_after):
        super().__init__()
        self.norm_after = norm_after
        self.group = cfg.v_embd * cfg.merge**2
        self.norm = nn.LayerNorm(self.group if norm_after else cfg.v_embd, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.group, self.group)
        self.linear_fc2 = nn.Linear(self.group, cfg.n_embd)

    def forward(self, x):
        """x (B, patches, v_embd) to (B, groups, n_embd)."""
        if not self.norm_after:
            x = self.norm(x)
        x = x.reshape(len(x), -1, self.group)
        if self.norm_after:
            x = self.norm(x)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class VisionTower(nn.Module):
    """Qwen3-VL's vision transformer with token pruning, and the encoder behind it: mergers for
    single-image tokens, or planes, or scene tokens."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.prune_at = int(cfg.keep_at * cfg.v_layer)
        self.patch_embed = PatchEmbed(cfg)
        self.pos_embed = nn.Embedding(cfg.v_grid**2, cfg.v_embd)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.v_layer))
        if cfg.vision == "triplane":
            self.triplane = Triplane(cfg)
        elif cfg.vision == "flex":
            self.flex = Flex(cfg)
        else:  # DeepStack needs tokens with a place in an image
            self.merger = Merger(cfg, norm_after=False)
            mergers = [Merger(cfg, norm_after=True) for _ in cfg.deepstack]
            self.deepstack_merger_list = nn.ModuleList(mergers)

    def forward(self, images, scenes=1, keep=1.0):
        """Images (M, temporal_patch, 3, H, W) uint8, M / scenes of each scene.
        Returns patches (scenes, V * merge^2, C), the same after each DeepStack block, and the V
        merge groups of each scene that were kept, (scenes, V), ascending."""
        x, layout = self.embed(images, scenes)
        deep = []
        for i, block in enumerate(self.blocks):
            if keep < 1 and i == self.prune_at:
                x, deep, layout = self.prune(block, x, deep, layout, keep)
            x = block(x, layout)
            layout = layout._replace(heads=None, rows=None)
            if i in self.cfg.deepstack:
                deep.append(x)
        C = x.shape[-1]
        deep = [d.reshape(scenes, -1, C) for d in deep]
        return x.reshape(scenes, -1, C), deep, layout.kept

    def embed(self, images, scenes):
        """Patches with their position embedding, (M, h * w, C), and their Layout."""
        cfg = self.cfg
        h, w = images.shape[-2] // cfg.patch, images.shape[-1] // cfg.patch
        x = self.patch_embed(patchify(images, cfg))
        x = x + self.position_embedding(h, w).to(self.pos_embed.weight.dtype)
        angle = self.rotary_angles(h, w, images.device)
        groups = len(x) // scenes * (h * w // cfg.merge**2)
        kept = torch.arange(groups, device=x.device).expand(scenes, -1)
        return x, Layout(angle.cos().to(x.dtype), angle.sin().to(x.dtype), kept)

    def position_embedding(self, h, w):
        """The learned grid of embeddings, resampled to h x w: (h * w, C)."""
        side = self.cfg.v_grid
        grid = self.pos_embed.weight.T.unflatten(1, (side, side))[None].float()  # (1, C, 48, 48)
        grid = F.interpolate(grid, (h, w), mode="bilinear", align_corners=True)
        return self.by_group(grid[0].permute(1, 2, 0))

    def rotary_angles(self, h, w, device):
        """(h * w, d / 2): the first half turns with the row, the second with the column."""
        quarter = self.cfg.v_embd // self.cfg.v_head // 4
        freqs = 1e4 ** -(torch.arange(quarter, device=device) / quarter)
        rows = torch.arange(h, device=device)[:, None, None] * freqs
        columns = torch.arange(w, device=device)[None, :, None] * freqs
        angle = torch.cat([rows.expand(h, w, quarter), columns.expand(h, w, quarter)], -1)
        return self.by_group(angle)

    def by_group(self, grid):
        """(h, w, C) to (h * w, C) in the order of `patchify`: h/m, w/m, m, m."""
        h, w, C = grid.shape
        m = self.cfg.merge
        return grid.view(h // m, m, w // m, m, C).transpose(1, 2).reshape(h * w, C)

    def prune(self, block, x, deep, layout, keep):
        """Token pruning by salience (SparseVILA, named in Sec. 3.2.1): drop the merge groups that
        get the least attention in this block. From here on a scene is one row of patches, image
        after image. Salience is the mean attention that a group's patches receive. All images of a
        scene compete, all heads alike, in one block: ours, since its authors do not say."""
        group = self.cfg.merge**2  # patches
        scenes, groups = layout.kept.shape
        M, S, C = x.shape
        heads = block.attn.heads(block.norm1(x), layout)
        salience = column_means(*heads[:2]).view(scenes, groups, group).mean(-1)
        kept = salience.topk(max(1, round(keep * groups))).indices.sort().values  # (scenes, V)
        def left(a):
            """Patches (M, S, C) to those that are left, (scenes, V * group, C)."""
            a = a.reshape(scenes, groups, group, a.shape[-1])
            return take(a, kept).flatten(1, 2)

        # Where the kept groups stand among all scenes', and where each image begins in them.
        numbers = (kept + groups * torch.arange(scenes, device=x.device)[:, None]).flatten()
        first = S // group * torch.arange(M + 1, device=x.device)
        offsets = group * torch.searchsorted(numbers, first)
        rows = group * numbers[:, None] + torch.arange(group, device=x.device)
        cos = left(layout.cos.expand(M, -1, -1))
        sin = left(layout.sin.expand(M, -1, -1))
        layout = Layout(cos, sin, kept, (offsets, S), heads, rows.flatten())
        return left(x), [left(d) for d in deep], layout


def look_up(maps, points, intrinsics, camera_to_ego):
    """What each camera shows at points (n, 3) in m of the ego frame.
    Returns of maps (B, cameras, C, h, w) the bilinear value where a point is projected to, (B,
    cameras, n, C), and whether the camera sees it, (B, cameras, n)."""
    place = camera_to_ego[..., None, :3, 3]
    points = (points - place) @ camera_to_ego[..., :3, :3]  # (B, cameras, n, 3), camera axes
    pixels, visible = project(points, intrinsics[..., None, :])
    at = 2 * pixels / intrinsics[..., None, 1:3] - 1  # -1 and 1 are the image's edges
    at = at.masked_fill(~visible[..., None], 0).flatten(0, 1)[:, :, None]  # (B * cameras, n, 1, 2)
    exact = torch.promote_types(maps.dtype, at.dtype)  # bfloat16 would tell 256 places apart
    flat = maps.flatten(0, 1).to(exact)
    found = F.grid_sample(flat, at.to(exact), padding_mode="border", align_corners=False)
    return found[..., 0].mT.unflatten(0, maps.shape[:2]).to(maps.dtype), visible


class Triplane(nn.Module):
    """What all cameras of a time step see, as three planes around the car: the paper's triplane
    tokens (arXiv 2506.12251, Sec. 3.2.1).

    Space is a grid of cells (X, Y, Z). A cell's learned query looks up the image features where its
    centre is projected to in every camera, and attends to the cameras that see it, or to nothing.
    The updated cells are averaged along z, y and x to planes xy, xz, yz. Patches of these are the
    tokens.

    Left open there, and ours: queries are the sum of one learned vector for each x, y and z (a free
    one for each cell would be 85 M parameters, the paper adds 6.3 M); one layer; one sampling point
    a cell and camera; 36 of each side's 48 cells reach 80 m; time steps do not mix."""
    slab = 2**13  # cells at a time: all 442,368 of full size would hold 11 GB of samples a scene

    def __init__(self, cfg):
        super().__init__()
        self.cells = cfg.planes
        self.patch = cfg.planes_patch
        self.reach = cfg.planes_reach
        C = cfg.planes_embd
        self.head_dim = math.gcd(C, 32)
        self.queries = nn.Parameter(torch.zeros(1, sum(self.cells), C))
        self.norm = nn.LayerNorm(cfg.v_embd, eps=1e-6)
        self.q = nn.Linear(C, C)
        self.kv = nn.Linear(cfg.v_embd, 2 * C)
        self.proj = nn.Linear(C, C)
        self.norm2 = nn.LayerNorm(C, eps=1e-6)
        self.linear_fc1 = nn.Linear(C, 4 * C)
        self.linear_fc2 = nn.Linear(4 * C, C)
        self.norm3 = nn.LayerNorm(C, eps=1e-6)
        x, y, z = self.patch
        self.patchify = nn.ModuleList(nn.Linear(C * n, cfg.n_embd) for n in (x * y, x * z, y * z))
        self.times = nn.Parameter(torch.zeros(1, cfg.times, cfg.n_embd))

    def forward(self, x, kept, view, intrinsics, camera_to_ego):
        """Patches x (B, V * merge^2, v_embd) of the groups `kept` (B, V) of view = (cameras, times,
        h, w) to tokens (B, times * tokens of the three planes, n_embd)."""
        planes = self.lift(x, kept, view, intrinsics, camera_to_ego)
        tokens = []
        for plane, (rows, columns), to_token in zip(planes, self.grids(), self.patchify):
            N, R, S, C = plane.shape
            patches = self.norm3(plane).view(N, rows, R // rows, columns, S // columns, C)
            patches = patches.transpose(2, 3).reshape(N, rows * columns, -1)
            tokens.append(to_token(patches))
        tokens = torch.cat(tokens, 1).unflatten(0, (len(kept), -1))  # (B, times, T, n_embd)
        return (tokens + self.times[0, :, None]).flatten(1, 2)

    def grids(self):
        """Rows and columns of the planes' tokens: x by y, x by z, y by z."""
        x, y, z = (cells // patch for cells, patch in zip(self.cells, self.patch))
        return [(x, y), (x, z), (y, z)]

    def feature_maps(self, x, kept, view):
        """Keys, values and whether they are known, 1 or 0, at every patch of every image:
        (B, cameras, times * (2 C + 1), h * merge, w * merge). Pruned patches are 0."""
        cameras, times, h, w = view
        B, V = kept.shape
        m = math.isqrt(x.shape[1] // V)
        x = self.kv(self.norm(x))
        x = F.pad(x, (0, 1), value=1.0).view(B, V, -1)
        every = x.new_zeros(B, cameras * times * h * w, x.shape[-1])
        x = every.scatter(1, kept[..., None].expand_as(x), x)
        x = x.view(B, cameras, times, h, w, m, m, -1)
        x = x.permute(0, 1, 2, 7, 3, 5, 4, 6)  # B, cameras, times, 2 C + 1, h, m, w, m
        return x.reshape(B, cameras, -1, h * m, w * m)

    def lift(self, x, kept, view, intrinsics, camera_to_ego):
        """As `forward`, to planes (B * times, X, Y, C), (B * times, X, Z, C), (.., Y, Z, C)."""
        maps = self.feature_maps(x, kept, view)
        qx, qy, qz = self.queries[0].split(self.cells)
        n = max(1, self.slab // (len(qy) * len(qz)))  # slices along x at a time
        slabs = []
        for q, centres in zip(qx.split(n), self.centres(maps.device).split(n)):
            cells = q[:, None, None] + qy[:, None] + qz  # (n, Y, Z, C)
            centres = centres.flatten(0, 2)
            cells = cells.flatten(0, 2)
            cells = self.update(cells, centres, maps, view[1], intrinsics, camera_to_ego)
            slabs.append(cells.unflatten(1, (-1, len(qy), len(qz))))
        cells = torch.cat(slabs, 1)  # (B * times, X, Y, Z, C)
        return cells.mean(3), cells.mean(2), cells.mean(1)

    def centres(self, device=None):
        """Where the cells are, (X, Y, Z, 3) in m in the ego frame.
        Along x and y three quarters of the cells share the inner 80 / 180 of the reach, evenly."""
        axes = []
        for cells, low, high in zip(self.cells, self.reach[::2], self.reach[1::2]):
            at = low + (high - low) * (torch.arange(cells, device=device) + 0.5) / cells
            if len(axes) < 2:
                far = max(-low, high)
                u = at.abs() / far
                u = torch.where(u < 0.75, u * (16 / 27), 4 / 9 + (u - 0.75) * (20 / 9))
                at = at.sign() * far * u
            axes.append(at)
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)

    def update(self, cells, centres, maps, times, intrinsics, camera_to_ego):
        """Cells (n, C) at centres (n, 3) after attending to `feature_maps`: (B * times, n, C)."""
        d = self.head_dim
        x, visible = look_up(maps, centres, intrinsics, camera_to_ego)
        x = x.unflatten(-1, (times, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)
        k, v = x[..., :-1].unflatten(-1, (2, -1, d)).unbind(-3)  # (B * times, cameras, n, H, d)
        share = x[..., -1:]  # of the bilinear weights that lie on patches that were not pruned
        seen = (share > 0.5) & visible.repeat_interleave(times, 0)[..., None]
        share = share.clamp(min=0.5)
        q = self.q(cells).unflatten(-1, (-1, d))
        score = (q * k).sum(-1) * d**-0.5 / share  # (B * times, cameras, n, H)
        score = score.masked_fill(~seen, -torch.inf)
        nothing = torch.zeros_like(score[:, :1])
        weight = torch.cat([score, nothing], 1).softmax(1)[:, :-1]
        read = ((weight / share)[..., None] * v).sum(1).flatten(2)
        cells = cells + self.proj(read)
        hidden = F.gelu(self.linear_fc1(self.norm2(cells)), approximate="tanh")
        return cells + self.linear_fc2(hidden)


class Flex(nn.Module):
    """Learned scene tokens beside all image tokens of all cameras and times in a few layers of
    joint self-attention; only scene tokens go on (arXiv 2512.10947, Sec. 3.2.1). No calibration.

    Left open there, and ours: four layers of the tower's kind without rotation, at full size 61.0 M
    parameters (the paper adds 61.6 M in all), and 5.3 M more that join the patches of a merge group
    to one image token. Their mean was seen to learn more slowly."""
    def __init__(self, cfg):
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, cfg.flex_tokens, cfg.v_embd))
        self.views = nn.Parameter(torch.zeros(7, cfg.times, cfg.v_embd))  # by camera id and time
        self.join = nn.Linear(cfg.v_embd * cfg.merge**2, cfg.v_embd)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.flex_layer))
        self.norm = nn.LayerNorm(cfg.v_embd, eps=1e-6)
        self.out = nn.Linear(cfg.v_embd, cfg.n_embd)

    def forward(self, x, kept, view, camera_ids):
        """Patches x (B, V * merge^2, v_embd) of the groups `kept` (B, V) of view = (cameras, times,
        h, w), camera_ids (B, cameras), to tokens (B, flex_tokens, n_embd)."""
        _, _, h, w = view
        B, V = kept.shape
        views = self.views[camera_ids].flatten(1, 2)  # (B, cameras * times, v_embd)
        x = self.join(x.view(B, V, -1)) + take(views, kept // (h * w))
        x = torch.cat([self.tokens.expand(B, -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x[:, : self.tokens.shape[1]]))


# --------------------------------------------------------------------------------------------------
# Reading: the decoder (Qwen3) with interleaved M-RoPE, and attention over a prompt that n samples
# share


def image_positions(ids, image_pad, grids):
    """M-RoPE positions (3, P) of a prompt (P,) whose images fill grids (h, w): time, height, width.
    Text moves all three together. An image stands still in time and spreads over rows and columns.
    Text goes on after the largest of them, so the 180 tokens of a 10 x 18 image take 18 positions.
    Ours: a plane of `Triplane` is an image, a scene token of `Flex` one of 1 x 1."""
    ids = ids.tolist()
    grids = iter(grids)
    axes = []
    at = i = 0  # position, token
    while i < len(ids):
        if ids[i] == image_pad:
            h, w = next(grids)
            rows = torch.arange(h).repeat_interleave(w)
            columns = torch.arange(w).repeat(h)
            axes.append(torch.stack([torch.zeros_like(rows), rows, columns]) + at)
            at += max(h, w)
            i += h * w
        else:
            axes.append(torch.full((3, 1), at))
            at += 1
            i += 1
    return torch.cat(axes, 1)


def rope(positions, cfg, dtype):
    """cos and sin (B, 1, T, head_dim / 2) of M-RoPE positions (3, B, T).
    Interleaved: frequencies 1, 4, 7, ... turn with height and 2, 5, 8, ... with width, as far as
    their sections reach; all others with time."""
    half = cfg.head_dim // 2
    _, height, width = cfg.mrope_section
    axis = torch.zeros(half, dtype=torch.long)
    axis[1 : 3 * height : 3] = 1
    axis[2 : 3 * width : 3] = 2
    freqs = cfg.rope_theta ** -(torch.arange(half, device=positions.device) / half)
    angle = positions[axis.to(positions.device)].permute(1, 2, 0).float() * freqs  # (B, T, half)
    return angle.cos()[:, None].to(dtype), angle.sin()[:, None].to(dtype)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys (Qwen3)."""
    def __init__(self, cfg, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.n_kv_head = cfg.n_kv_head
        self.head_dim = cfg.head_dim
        self.q_proj = nn.Linear(n_embd, n_head * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(n_embd, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(n_embd, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(n_head * cfg.head_dim, n_embd, bias=False)
        self.q_norm = nn.RMSNorm(cfg.head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(cfg.head_dim, eps=1e-6)

    def forward(self, x, cos, sin, past=None, n_ask=0):  # kernels/sampler.py has it too
        """x (N, T, C) to (N, T, C), and this layer's keys and values.
        Without a past: causal. With a `Past`: over the shared prefix, the own tail and these T
        tokens, by its masks. n_ask: also return the attention received from the last n_ask queries,
        (N, T)."""
        N, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(N, T, self.n_head, -1)).transpose(1, 2)  # (N, H, T, d)
        k = self.k_norm(self.k_proj(x).view(N, T, self.n_kv_head, -1)).transpose(1, 2)
        v = self.v_proj(x).view(N, T, self.n_kv_head, -1).transpose(1, 2)
        v = v.contiguous()  # as the cache will be read
        q = rotate(q, cos, sin).to(v.dtype)  # autocast on CUDA returns norms in float32
        k = rotate(k, cos, sin).to(v.dtype)
        if past is None:
            gqa = self.n_head != self.n_kv_head
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        else:
            if past.tail:
                k = torch.cat([past.tail[0], k], 2)
                v = torch.cat([past.tail[1], v], 2)
            y = prefix_attention(q, *past.prefix, k, v, past.prefix_mask, past.mask)
        kv = (k, v)
        if n_ask:
            kv = (k, v, column_means(q[:, :, -n_ask:], k, causal=True))
        return self.o_proj(y.transpose(1, 2).reshape(N, T, -1)), kv


class MLP(nn.Module):
    def __init__(self, n_embd, n_mlp):
        super().__init__()
        self.gate_proj = nn.Linear(n_embd, n_mlp, bias=False)
        self.up_proj = nn.Linear(n_embd, n_mlp, bias=False)
        self.down_proj = nn.Linear(n_mlp, n_embd, bias=False)

    def forward(self, x):  # kernels/sampler.py has it too
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A decoder layer; language model and expert are stacks of them."""
    def __init__(self, cfg, n_embd, n_head, n_mlp):
        super().__init__()
        self.self_attn = Attention(cfg, n_embd, n_head)
        self.mlp = MLP(n_embd, n_mlp)
        self.input_layernorm = nn.RMSNorm(n_embd, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(n_embd, eps=1e-6)

    def forward(self, x, cos, sin, past=None, n_ask=0):  # kernels/sampler.py has it too
        y, kv = self.self_attn(self.input_layernorm(x), cos, sin, past, n_ask)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), kv


class LanguageModel(nn.Module):
    """The decoder. It reads the prompt causally, and whatever comes later over a `Past`."""
    def __init__(self, cfg):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab, cfg.n_embd)
        layers = [Layer(cfg, cfg.n_embd, cfg.n_head, cfg.n_mlp) for _ in range(cfg.n_layer)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(cfg.n_embd, eps=1e-6)

    def forward(self, x, cos, sin, past=None, prompt=None, n_ask=0):
        """x (N, T, C) to (N, T, C), and the cache: of each layer keys and values (N, K, T, d).
        past: a `Past` for every layer; prompt: a `Prompt` whose DeepStack features are added to the
        image tokens after the first layers; n_ask: see Attention."""
        cache = []
        deep = prompt.deep if prompt else []
        for i, layer in enumerate(self.layers):
            x, kv = layer(x, cos, sin, past[i] if past else None, n_ask)
            cache.append(kv)
            if i < len(deep):
                at = prompt.image_at[..., None].expand_as(deep[i])
                x = x.scatter_add(1, at, deep[i].to(x.dtype))
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


def retrieved(k, v, salience, image_at, share):
    """SparseVILA's second half: of a layer's keys and values (B, K, P, d) keep all words, and of
    the image tokens at image_at (B, V) the share that later words attend to most.

    salience (B, P): the attention received. Each layer chooses for itself, for all its heads: ours,
    since its authors do not say. The rest stays in the cache."""
    B, P = salience.shape
    V = image_at.shape[1]
    drop = V - max(1, round(share * V))
    least = take(salience, image_at).topk(drop, largest=False).indices
    least = take(image_at, least)  # (B, drop)
    stay = torch.ones_like(salience, dtype=torch.bool).scatter(1, least, False)
    stay = stay.nonzero()[:, 1].view(B, P - drop)
    k = take(k.transpose(1, 2), stay).transpose(1, 2)
    v = take(v.transpose(1, 2), stay).transpose(1, 2)
    return k, v


def nucleus(logits, temperature, top_p):
    """Probabilities (..., vocab) at a temperature above 0, largest first, 0 outside the nucleus
    (the likeliest tokens that together have top_p), and the token of each."""
    p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    p[p.cumsum(-1) - p > top_p] = 0  # what comes before a token already has top_p
    return p, order


def pick(logits, temperature, top_p, generator=None):
    """A token for each row of logits (N, vocab), and its log-probability: (N,) each.
    The likeliest at temperature 0, with its log-probability at temperature 1; else drawn from the
    nucleus, with its log-probability there."""
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return best[:, 0], logits.log_softmax(-1).gather(-1, best)[:, 0]
    p, order = nucleus(logits, temperature, top_p)
    drawn = torch.multinomial(p, 1, generator=generator)  # (N, 1)
    log_prob = (p.gather(-1, drawn)[:, 0] / p.sum(-1)).log()
    return order.gather(-1, drawn)[:, 0], log_prob


# --------------------------------------------------------------------------------------------------
# Driving: the action expert and flow matching (Sec. 3.2.2, 5.1)


class Fourier(nn.Module):
    """Sines and cosines of a number, at features / 2 frequencies evenly spaced in log from 1 to
    max_freq."""
    def __init__(self, features, max_freq):
        super().__init__()
        freqs = torch.logspace(0, math.log10(max_freq), features // 2)
        self.register_buffer("freqs", freqs[None])

    def forward(self, x):  # kernels/flow_step.py has it too
        angle = x[..., None] * self.freqs[0] * (2 * math.pi)
        return math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], -1)


class ActionEmbed(nn.Module):
    """Noisy controls (N, 64, 2) and flow time (N,) to the expert's 64 input tokens (N, 64, e_embd).
    The paper adds the time's embedding; the release, and we, concatenate it before the MLP."""
    def __init__(self, cfg):
        super().__init__()
        self.sinus = nn.ModuleList(Fourier(cfg.a_fourier, cfg.a_max_freq) for _ in range(2))
        self.timestep_fourier_encoder = Fourier(cfg.a_fourier, cfg.a_max_freq)
        trunk = []
        width = 3 * cfg.a_fourier
        for _ in range(cfg.a_layer):
            norm = nn.RMSNorm(cfg.a_embd, eps=1e-5)
            trunk += [nn.Linear(width, cfg.a_embd), nn.SiLU(), norm]
            width = cfg.a_embd
        self.encoder = nn.Module()
        self.encoder.trunk = nn.Sequential(*trunk, nn.Linear(width, cfg.e_embd))
        self.norm = nn.LayerNorm(cfg.e_embd)

    def forward(self, x, t):  # kernels/flow_step.py has it too
        accel = self.sinus[0](x[..., 0])
        curvature = self.sinus[1](x[..., 1])
        t = self.timestep_fourier_encoder(t)[:, None].expand(-1, x.shape[1], -1)
        x = torch.cat([accel, curvature, t], -1)  # (N, 64, 3 * features)
        return self.norm(self.encoder.trunk(x.to(self.norm.weight.dtype)))


class Expert(nn.Module):
    """The action expert: 64 tokens, one a control, that see one another and the language model's
    key-value cache, layer by layer. Layers, key-value heads and head_dim are the language model's;
    width and query heads are its own."""
    def __init__(self, cfg):
        super().__init__()
        layers = [Layer(cfg, cfg.e_embd, cfg.e_head, cfg.e_mlp) for _ in range(cfg.n_layer)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(cfg.e_embd, eps=1e-6)

    def forward(self, x, cos, sin, past):  # kernels/sampler.py has it too
        """x (N, 64, C) to (N, 64, C); past: a `Past` for every layer."""
        for layer, layer_past in zip(self.layers, past):
            x, _ = layer(x, cos, sin, layer_past)
        return self.norm(x)


def flow_time(n, generator=None, device=None):
    """Training times (n,): t = 0.999 (1 - b) with b ~ Beta(1.5, 1), so more often near the noise.
    The Beta's quantile is u^(2/3)."""
    u = torch.rand(n, generator=generator, device=device)
    return 0.999 * (1 - u ** (1 / 1.5))


def euler_step(x, velocity, t, dt, eta=0.0):  # kernels/flow_step.py has it too
    """An Euler step of the flow from x_t (..., 64, 2) at time t by dt: the next controls' mean and
    standard deviation, which is 0 for eta = 0.

    The straight line through x_t ends in data x_t + (1 - t) v and in noise x_t - t v.
    Reinforcement learning needs a step that has a probability. So a share of the noise is drawn
    anew, and both coefficients of the line stay what training showed (Coefficients-Preserving
    Sampling, arXiv 2509.05952): with s = t + dt and a = eta pi / 2 the next controls are
    s data + (1 - s) (cos(a) noise + sin(a) n), n ~ N(0, I). The last step, to s = 1, is always
    Euler's, and eta = 0 is Euler to the bit."""
    a = eta * math.pi / 2
    left = 1 - (t + dt)  # of the noise
    noise = x - t * velocity
    mean = x + dt * velocity - left * (1 - math.cos(a)) * noise
    return mean, left * math.sin(a) if left > 1e-9 else 0.0


# --------------------------------------------------------------------------------------------------
# Reinforcement learning: GRPO (Sec. 5.3), and the log-probabilities of what a rollout decided

CLIP = 0.2, 0.28  # how far below and above 1 a ratio counts: the release's


def grpo(objective, head, old, advantage, beta, kl_weight):
    """GRPO's loss of what a Head decided in a group of G rollouts of each scene.

    old (B, G, T): log-probabilities before the first update, without gradient; advantage (B, G):
    rewards less the group's mean. So there is no value network; nor is it divided by the spread.

    "paper" (Eq. 10): likelihood, weighted by softmax(beta * advantage) over the group. The weights
    add up to 1 whatever the rewards, so it also makes likelier what all of a group said; the KL
    term holds that. Else the release's recipe: the clipped surrogate of each decision."""
    if objective == "paper":
        weights = (beta * advantage).softmax(1)
        return -(weights * (head.log_pi.sum(2) - kl_weight * head.kl)).sum(1).mean()
    advantage = advantage[..., None]
    ratio = ratio_of(head, old)
    clipped = ratio.clamp(1 - CLIP[0], 1 + CLIP[1])
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    surrogate = torch.where(head.decided, surrogate, 0).sum(2)  # (B, G)
    return -(surrogate - kl_weight * head.kl).mean()


def ratio_of(head, old):
    """Importance ratios (B, G, T), 1 at the first update. From e^-3 to e^3: none is infinite, and
    one beyond has no gradient."""
    return (head.log_pi - old).clamp(-3, 3).exp()


def heads_of(replayed, rollout, reference=None):
    """What was decided in a Rollout, from its `replay`, {name: Head}. "thought": the tokens of the
    reasoning. "drive": the flow's random steps, or else the action tokens. reference: the reference
    policy's replay."""
    at = torch.arange(rollout.tokens.shape[2], device=rollout.tokens.device)
    thinks = (at < replayed.read[3][:, None]).view(rollout.tokens.shape)
    ids = rollout.tokens.flatten(0, 1)
    nats = token_log_probs(replayed.logits, ids, rollout.temperature, rollout.top_p).view_as(thinks)
    kl_tokens, kl_steps = kl_of(replayed, reference, rollout)
    heads = {}
    for name, part in {"thought": thinks, "drive": ~thinks}.items():
        decided = rollout.chosen & part
        log_pi = torch.where(decided, nats, 0)
        heads[name] = Head(log_pi, decided, torch.where(decided, kl_tokens, 0).sum(2))
    if replayed.moves:
        after = rollout.flow[1:].flatten(1, 2)
        steps = [gaussian_log_prob(x, *move) for x, move in zip(after, replayed.moves)]
        log_pi = torch.stack(steps, -1).view(*rollout.tokens.shape[:2], -1)
        heads["drive"] = Head(log_pi, torch.ones_like(log_pi, dtype=torch.bool), kl_steps)
    return heads


def token_log_probs(logits, tokens, temperature, top_p):
    """Log-probabilities (...), with gradient, of tokens (...) that `pick` drew from logits
    (..., vocab) at a temperature above 0: of the tempered softmax over the nucleus, in which the
    token itself always counts."""
    logits = logits / temperature
    if top_p < 1:
        p, order = nucleus(logits.detach(), 1.0, top_p)
        kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p > 0)
        kept = kept.scatter(-1, tokens[..., None], True)
        logits = logits.masked_fill(~kept, -1e9)
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def gaussian_log_prob(x, mean, std):
    """log N(x; mean, std^2 I) of (..., 64, 2), summed over the last two dimensions."""
    z = (x - mean) / std
    return (-0.5 * z**2 - math.log(std * math.sqrt(2 * math.pi))).sum((-2, -1))


def kl_of(replayed, reference, rollout):
    """KL[policy || reference policy] in nats from the two models' `replay`: of the tokens at the
    rollout's temperature, over the whole vocabulary, (B, G, T), and of the flow's random steps
    together, Gaussians of one variance, (B, G). Zeros without a reference."""
    nothing = torch.zeros_like(rollout.log_probs)
    steps = nothing.sum(2)
    if reference is None:
        return nothing, steps
    ours = (replayed.logits / rollout.temperature).log_softmax(-1)
    theirs = (reference.logits / rollout.temperature).log_softmax(-1)
    tokens = (ours.exp() * (ours - theirs)).sum(-1)  # (N, T)
    for (mean, std), (expected, _) in zip(replayed.moves, reference.moves):
        apart = ((mean - expected) / std).square().sum((1, 2)) / 2
        steps = steps + apart.view_as(steps)
    return tokens.view_as(nothing), steps
