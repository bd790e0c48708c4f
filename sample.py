"""
Look, think, drive, and see what came of it: a picture of one scene, or a table over many.

    python sample.py                           the shipped nano on a scene of the built-in world, drawn into out/
    python sample.py --situation pedestrian    the first held-out scene of that kind
    python sample.py --clip FOLDER --t0 3      a real clip, in any layout that data.py reads
    python sample.py --eval                    512 held-out scenes: a Markdown table, then all its numbers as JSON
    python sample.py --keep 0.5                with half of the image tokens; any checkpoint, no retraining
    python sample.py --encoders out/encoders   train every way to see and compare them in one table; goes on after a kill
    python sample.py --seeing out/seeing.png   draw what each of those looks at

The page reads: metrics and baselines, the evaluation, ways to see, the picture, the command line.
"""
import argparse
import json
import math
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import world
from alpamayo import (
    DT, HORIZON, LOW_SPEED, PRESETS, Alpamayo, Config, VisionTower, fit_actions, initial_speed, project, read_config, rope,
    unwrap, yaw_of)  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Metrics, and what a driver scores who just goes on as before


def ade(path, truth):
    """Average displacement error in m: the mean over 6.4 s of the distance in the ground plane between a path
    (..., 64, 3) and the driven one (..., 64, 3). Returns (...)."""
    return (path - truth)[..., :2].norm(dim=-1).mean(-1)


def min_ade(paths, truth):
    """minADE in m, (B,): the ADE of the best of the n paths (B, n, 64, 3) of a scene; truth (B, 64, 3)."""
    return ade(paths, truth[:, None]).amin(1)


def baselines(scene):
    """Paths that need no eyes, only the Scene's ego history: {name: (B, 64, 3)}.

    Of the history's positions p0 .. p15 and headings yaw, p15 is at t0: v = |p15 - p14| / dt, w = (yaw15 - yaw14) / dt and
    a = (v - |p14 - p13| / dt) / dt are the last speed, turn rate and acceleration. At t seconds from t0
        CV    constant velocity                        speed v, heading 0
        CTRV  constant turn rate and velocity          speed v, heading w t
        CTRA  constant turn rate and acceleration      speed v + a (t + dt / 2), never below 0, heading w t"""
    speed = scene["ego_history_xyz"][..., :2].diff(dim=1).norm(dim=-1) / DT  # (B, 15); the last is that of t0 - dt / 2
    accel = speed.diff(dim=1)[:, -1:] / DT  # (B, 1)
    turn = yaw_of(scene["ego_history_rot"])[:, -2:].diff(dim=1) / DT  # (B, 1); at t0 the heading is 0
    t = DT * torch.arange(HORIZON + 1)

    def drive(speed, heading):
        velocity = torch.stack([speed * heading.cos(), speed * heading.sin(), 0 * speed], -1)  # (B, 65, 3)
        return torch.cumulative_trapezoid(velocity, dx=DT, dim=1)

    steady = speed[:, -1:] + 0 * t  # (B, 65)
    braking = (speed[:, -1:] + accel * (t + DT / 2)).clamp(min=0)
    return {"CV": drive(steady, 0 * steady), "CTRV": drive(steady, turn * t), "CTRA": drive(braking, turn * t)}


def readable(text):
    """The text of a model that can also say any byte, as an untrained one does: what cannot be printed is a dot."""
    return "".join(c if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}" else "·" for c in text)


def is_right(said, true):
    """Whether a reasoning text decides as the true one: longitudinal, lateral, both, word for word: four bools."""
    (a, b), (true_a, true_b) = data.decisions(said) or (None, None), data.decisions(true)
    return a == true_a, b == true_b, (a, b) == (true_a, true_b), said == true


# ----------------------------------------------------------------------------------------------------------------------
# The evaluation

SHARES = ("longitudinal", "lateral", "both", "exact")  # of the samples that are right
COLUMNS = {"scenes": "scenes", "minade": "minADE", "ade": "ADE", "CV": "CV", "CTRV": "CTRV", "CTRA": "CTRA",
           "best": "best of 3", "minade_over_ctrv": "minADE / CTRV", **{share: share for share in SHARES}}  # fmt: skip
NOTE = """\
Metres over 6.4 s, mean ± standard error. minADE: the best of {n} samples, each with its own reasoning; ADE: the first
one. CV, CTRV, CTRA go on with the last speed v, turn rate w and acceleration a: speed v, v, max(v + a t, 0), heading 0,
w t, w t; best of 3: the best of them in each scene. longitudinal, lateral, both: % of first samples that decide right;
exact: % that say so word for word."""


def measure(model, scene, seed, args):
    """All numbers of a batch of scenes: {name: (B,) float}."""
    out = model.sample(scene, args.n, args.temperature, args.top_p, args.steps, seed=seed, reason=args.reason)
    paths, truth = out.xyz.cpu(), scene["ego_future_xyz"]
    eyeless = {name: ade(path, truth) for name, path in baselines(scene).items()}
    eyeless["best"] = torch.stack(list(eyeless.values())).amin(0)
    numbers = {"minade": min_ade(paths, truth), "ade": ade(paths[:, 0], truth), **eyeless}
    if args.reason:
        right = [is_right(texts[0], true) for texts, true in zip(out.reasoning, scene["reasoning"])]
        numbers |= dict(zip(SHARES, torch.tensor(right).float().T))
    return numbers


def summary(numbers):
    """Mean and standard error of each of {name: (N,)}, and how minADE compares with CTRV."""
    row = {"scenes": len(numbers["ade"])}
    for name, values in numbers.items():
        row[name] = round(values.mean().item(), 4)
        row[name + "_se"] = round(values.std(correction=0).item() / math.sqrt(len(values)), 4)
    return row | {"minade_over_ctrv": round(row["minade"] / row["CTRV"], 4)}


def evaluate(model, args):
    """Rows of numbers over held-out scenes of the world: {row: see `summary`}. By situation and over all; then what
    becomes of the model when its images are its neighbour's in the batch, or grey; of one trained on grey ones."""
    scenes = data.load("world", split="val", scenes=args.eval, folder=args.cache, **world_view(model.cfg, args))
    another = lambda scene: scene | {"images": scene["images"].roll(1, 0)}
    grey = lambda scene: scene | {"images": torch.full_like(scene["images"], 127)}  # what train.py --blind shows
    runs = {"all": (model, dict), "another scene's images": (model, another), "no images (grey)": (model, grey)}
    if args.blind:
        runs["trained blind"] = load_model(args.blind), grey
    starts, rows = range(0, len(scenes), args.batch), {}
    with tqdm(total=len(runs) * len(scenes), unit="scene") as bar:
        for run, (driver, show) in runs.items():
            bar.set_description(run)
            batches = []
            for i in starts:
                scene = scenes.batch(range(i, min(i + args.batch, len(scenes))))
                batches.append(measure(driver, show(scene), args.seed + i, args))
                bar.update(len(scene["name"]))
            numbers = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}  # (N,) each
            if run == "all":
                for name in world.SITUATIONS:
                    chosen = torch.tensor([n == name for n in scenes.names])
                    if chosen.any():
                        rows[name] = summary({k: v[chosen] for k, v in numbers.items()})
            rows[run] = summary(numbers)
    return rows


def table(rows):
    """Rows of numbers as Markdown."""

    def cell(row, name):
        if name not in row:  # no reasoning, no decisions
            return "-"
        if name == "scenes":
            return str(row[name])
        if name in SHARES:
            return f"{100 * row[name]:.0f} ± {100 * row[name + '_se']:.0f}"
        return f"{row[name]:.2f}" + (f" ± {row[name + '_se']:.2f}" if name in ("minade", "ade") else "")

    lines = [["situation", *COLUMNS.values()], ["---"] + ["---:"] * len(COLUMNS)]
    for name, row in rows.items():
        lines.append([f"**{name}**" if name == "all" else name, *(cell(row, column) for column in COLUMNS)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ----------------------------------------------------------------------------------------------------------------------
# Ways to see: the paper's table of vision encoders (Table 12), and SparseVILA's pruning, which the paper only names


class Way(NamedTuple):
    """A row of the table."""

    name: str
    train: str = ""  # flags of train.py
    keep: float = 1.0  # pruning of a model that was trained without: no training of its own
    paper: str = "-"  # the paper's row: tokens an image, minADE relative to single image

    @property
    def folder(self):
        return "-".join(self.train.replace("--", "").split()) or "image"


SHARES_KEPT = (0.75, 0.5, 0.25, 0.1)
WAYS = [
    Way("single image", paper="160, 0 %"),
    Way("triplane, patch 4 x 3 x 2", "--vision triplane --planes-patch 4 3 2", paper="104, -3 %"),
    Way("triplane, patch 6 x 6 x 2", "--vision triplane --planes-patch 6 6 2", paper="45, +4 %"),
    Way("Flex, 20 scene tokens", "--vision flex --flex-tokens 20", paper="50, -3 %"),
    Way("Flex, 13", "--vision flex --flex-tokens 13", paper="32, -3 %"),
    Way("Flex, 6", "--vision flex --flex-tokens 6", paper="16, -2 %"),
    Way("Flex, 3", "--vision flex --flex-tokens 3", paper="8, -2 %"),
    *(Way(f"keep {keep}, not retrained", keep=keep) for keep in SHARES_KEPT),
    *(Way(f"keep {keep}, trained with it", f"--keep {keep}") for keep in SHARES_KEPT),
]
WAYS_NOTE = """\
minADE: best of {n} samples, mean over {scenes} held-out scenes of our world; both right: % of first samples that decide
right. relative: minADE against single image of the same seed; seeds: {seeds}, of which what is trained with pruning has the
first; ± their standard deviation. Every model learned from nothing for {steps} steps of 32 scenes. Tokens: visual tokens of
the language model for each of {pictures} pictures; a picture is two successive frames of a camera. Parameters: of what
turns the tower's patches into tokens; triplane and Flex need no mergers, which are single image's. FLOP: matrix products of
one scene. ms: vision + prefill on this machine with {threads} thread(s), median of {repeats} rounds over all rows, a scene
by itself and a scene among {batch}. The paper's: Table 12, tokens an image and relative minADE, of real traffic, a 0.5B
model and 160 tokens an image: to be compared with ours by its order alone."""


def train_ways(args):
    """Train what is missing of every row and seed, or go on where it stopped, --jobs at a time. Returns the checkpoints,
    {row: [folder of each seed]}."""
    for split, count in (("train", args.scenes), ("val", 32)):  # once, before several processes would
        data.load("world", split=split, scenes=count, folder=args.cache, **world_view(PRESETS["nano"], args))
    wanted = {"steps": args.train_steps, "scenes": args.scenes, "size": list(args.size)}
    script = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")]
    rows, runs = {}, {}
    for way in WAYS:
        seeds = args.seeds[: 1 if "keep" in way.train else None]
        rows[way.name] = [os.path.join(args.encoders, f"{way.folder}-{seed}") for seed in seeds]
        runs |= {folder: [*way.train.split(), "--seed", str(seed)] for folder, seed in zip(rows[way.name], seeds)}

    def run(folder):
        saved, command = os.path.join(folder, "training.safetensors"), [*script, "--resume", folder]
        if os.path.exists(saved):
            with safe_open(saved, "pt") as f:
                step, flags = int(f.metadata()["step"]), json.loads(f.metadata()["flags"])
            for key, value in wanted.items():
                if flags[key] != value:
                    raise ValueError(f"{folder}: was trained with {key} {flags[key]}, not {value}; choose another folder")
            if step == args.train_steps:
                return
        else:
            settings = f"--steps {args.train_steps} --scenes {args.scenes} --threads 1 --save-every 100 --val-scenes 32 --val-every 100000"
            size = ["--size", *map(str, args.size)]
            command = [*script, *settings.split(), *size, "--cache", args.cache, "--out", folder, *runs[folder]]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise ValueError(f"{folder}: {(done.stderr.strip().splitlines() or ['train.py was killed'])[-1]}")

    with ThreadPoolExecutor(args.jobs) as pool:
        list(tqdm(pool.map(run, runs), total=len(runs), desc="training", unit="run"))
    return rows


@torch.no_grad()
def flops(model, scene):
    """FLOPs of a scene's matrix products: {vision, prefill}."""
    lm, vision, prefill = model.vlm.model.language_model, FlopCounterMode(display=False), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH):  # a CPU's fused attention is not counted
        with vision:
            x, positions, seen, _ = model.embed_prompt(scene, reason=False)
        with prefill:
            lm(x, *rope(positions, model.cfg, x.dtype), seen=seen)
    return {"vision": vision.get_total_flops(), "prefill": prefill.get_total_flops()}


def encoder_of(tower):
    """What turns the tower's patches into the language model's tokens: a list of modules."""
    return [getattr(tower, k) for k in ("triplane", "flex", "merger", "deepstack_merger_list") if hasattr(tower, k)]


def compare_ways(args):
    """The table's numbers, {row: {name: number, or a list of one for each seed}}, and how many pictures a scene has."""
    checkpoints = train_ways(args)
    args.reason, count, firsts, rows = True, args.eval or 256, {}, {}
    scenes = data.load("world", split="val", scenes=count, folder=args.cache, **world_view(PRESETS["nano"], args))
    one, many = scenes.batch([0]), scenes.batch(range(min(args.batch, count)))
    for way in tqdm(WAYS, desc="evaluating", unit="row"):
        row = rows[way.name] = {"minade": [], "both": [], "paper": way.paper}
        for folder in checkpoints[way.name]:
            model = load_model(folder, **({"keep": way.keep} if way.keep < 1 else {}))
            firsts.setdefault(way.name, model)
            starts = range(0, count, args.batch)
            batches = [measure(model, scenes.batch(range(i, min(i + args.batch, count))), i, args) for i in starts]
            for key in ("minade", "both"):
                row[key].append(torch.cat([b[key] for b in batches]).mean().item())
        row["relative"] = [a / b - 1 for a, b in zip(row["minade"], rows[WAYS[0].name]["minade"])]
    pictures = model.cfg.frames // model.cfg.temporal_patch * len(model.cfg.cameras)
    for name, model in firsts.items():
        places = model.embed_prompt(one, reason=False)[2][0]  # (1, V)
        parameters = [p.numel() for part in encoder_of(model.vlm.model.visual) for p in part.parameters()]
        rows[name] |= {"tokens": places.shape[1] / pictures, "parameters": sum(parameters), "flops": flops(model, one)}
        rows[name] |= {"ms": [], "ms_among": []}
    for _ in tqdm(range(args.repeats), desc="timing", unit="round"):
        for name, model in firsts.items():  # in turn, so that whatever else this machine does is everybody's
            for key, scene in (("ms", one), ("ms_among", many)):
                seconds = model.sample(scene, n=1, steps=1, reason=False, seed=0).seconds
                rows[name][key].append(1000 * (seconds["vision"] + seconds["prefill"]) / len(scene["images"]))
    for row in rows.values():
        row |= {key: float(np.median(row[key])) for key in ("ms", "ms_among")}
    return rows, pictures


def ways_table(rows):
    """Rows of compare_ways as Markdown."""

    def spread(values, scale, form):
        deviation = f" ± {scale * np.std(values, ddof=1):{form.lstrip('+')}}" if len(values) > 1 else ""
        return f"{scale * np.mean(values):{form}}" + deviation

    titles = ("encoder", "tokens a picture", "parameters", "minADE, m", "relative, %", "both right, %", "MFLOP vision",
              "MFLOP prefill", "ms", "ms among", "the paper's")  # fmt: skip
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1)]
    for name, row in rows.items():
        lines.append([name, f"{row['tokens']:.2f}", f"{row['parameters']:,}", spread(row["minade"], 1, ".2f"),
                      spread(row["relative"], 100, "+.0f"), spread(row["both"], 100, ".0f"),
                      *(f"{row['flops'][k] / 1e6:.1f}" for k in ("vision", "prefill")), f"{row['ms']:.1f}",
                      f"{row['ms_among']:.2f}", row["paper"]])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def full_size():
    """Parameters of the encoders behind the release's tower, counted without memory, beside the paper's."""
    lines = []
    for vision, last, paper in (("triplane", "patchify", "6.3 M"), ("flex", "out", "61.6 M")):
        for width in (896, 4096):  # Qwen2.5-0.5B, the paper's, and the release
            with torch.device("meta"):
                (encoder,) = encoder_of(VisionTower(replace(Config(), vision=vision, n_embd=width)))
            count = lambda module: sum(p.numel() for p in module.parameters())
            into = count(getattr(encoder, last))
            lines.append(f"{vision:8} for a language model {width:4} wide: {(count(encoder) - into) / 1e6:4.1f} M, and "
                         f"{into / 1e6:5.1f} M for the projection to its tokens; the paper says {paper}")  # fmt: skip
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# The picture

TRUTH, PAST, MODEL = "#1b1f27", "#8b919c", "#ff5a1f"  # few colours: dark for what was driven, one hue for the model
CAMERAS = ("cross left", "front wide", "cross right", "rear left", "rear tele", "rear right", "front tele")  # by id
STYLE = {
    "font.size": 11, "axes.titlesize": 11, "axes.titlelocation": "left", "axes.titlecolor": PAST,
    "xtick.color": PAST, "ytick.color": PAST, "axes.edgecolor": PAST,
    "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False,
}  # fmt: skip


class Drive(NamedTuple):
    """A path, and how it looks."""

    label: str
    xyz: torch.Tensor  # (64, 3)
    rot: torch.Tensor  # (64, 3, 3)
    actions: torch.Tensor  # (64, 2): m/s^2, 1/m
    line: dict  # of matplotlib's plot
    bands: tuple  # on the road, in a camera: (m, colour, alpha) each


def drives_of(scene, out):
    """The Drives of a batch of one and its Rollout, in the order to draw them: samples, the best one, the truth."""
    known = "ego_future_xyz" in scene
    best = int(ade(out.xyz[0].cpu(), scene["ego_future_xyz"][0]).argmin()) if known else 0
    usual = dict(color=MODEL, alpha=0.3, linewidth=1.8, markersize=4), ((1.8, MODEL, 0.18),)
    strong = dict(color=MODEL, alpha=0.8, linewidth=3.5, markersize=8), ((1.8, MODEL, 0.55),)
    dark = dict(color=TRUTH, linewidth=1.5, markersize=4), ((0.4, "white", 1), (0.2, TRUTH, 1))
    samples = list(zip(out.xyz[0].cpu(), out.rot[0].cpu(), out.actions[0].cpu()))
    chosen = samples.pop(best)
    drives = [Drive("other samples", *sample, *usual) for sample in samples]
    drives.append(Drive("best sample" if known else "first sample", *chosen, *strong))
    if known:
        motion = [scene[k][0] for k in ("ego_history_xyz", "ego_history_rot", "ego_future_xyz", "ego_future_rot")]
        drives.append(Drive("driven in truth", *motion[2:], fit_actions(*motion), *dark))
    return drives


def ribbon(xyz, rot, intrinsics, camera_to_ego, width):
    """A band that lies on the road along a path, as a camera sees it: quadrilaterals (K, 4, 2) in pixels.

    xyz (64, 3) and rot (64, 3, 3): a path in the ego frame at t0, whose ground is z = 0; intrinsics (10,) as
    `alpamayo.project` wants them; camera_to_ego (4, 4); width in m. What the camera does not see is left out."""
    # From the origin on, 16 pieces to each 0.1 s: next to the car a metre of road is a third of the picture.
    path = F.pad(torch.cat([xyz[:, :2], yaw_of(rot)[:, None]], 1).T, (1, 0))  # (3, 65): x, y, yaw
    path[2] = unwrap(path[2])
    x, y, yaw = F.interpolate(path[None], size=16 * HORIZON + 1, mode="linear", align_corners=True)[0]
    centre = torch.stack([x, y, 0 * x], -1)
    left = width / 2 * torch.stack([-yaw.sin(), yaw.cos(), 0 * yaw], -1)
    edges = torch.stack([centre + left, centre - left])  # (2, 1025, 3)
    edges = (edges - camera_to_ego[:3, 3]) @ camera_to_ego[:3, :3]  # to camera axes
    pixels, visible = project(edges, intrinsics)

    def corners(a):  # of the pieces between successive points: left, left, right, right
        return torch.stack([a[0, :-1], a[0, 1:], a[1, 1:], a[1, :-1]], 1)

    # A piece across the image's border is kept, the axes cut it; but none that reaches behind the camera.
    kept = corners(visible).any(1) & (corners(edges[..., 2]) > 0.1).all(1)
    return corners(pixels)[kept]


def draw_view(ax, camera, view, drives):
    """A camera's newest image with the paths on its road; view: (image, intrinsics, camera_to_ego), see `draw`."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    image, intrinsics, camera_to_ego = view
    H, W = image.shape[:2]
    ax.imshow(image, extent=(0, W, H, 0), interpolation="nearest" if W < 256 else "antialiased")
    ax.set(xlim=(0, W), ylim=(H, 0), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    box = dict(facecolor=TRUTH, alpha=0.5, linewidth=0, pad=2.5)
    ax.annotate(CAMERAS[camera], (0, 1), (5, -5), "axes fraction", "offset points", va="top", color="white", bbox=box)
    if intrinsics is None:
        return
    for drive in drives:
        for width, colour, alpha in drive.bands:
            quads = ribbon(drive.xyz, drive.rot, intrinsics, camera_to_ego, width)
            if len(quads):  # as one compound path: no seam shows where pieces meet
                path = Path.make_compound_path_from_polys(quads.numpy())
                ax.add_patch(PathPatch(path, facecolor=colour, alpha=alpha, linewidth=0))


def draw_numbers(ax, scene, out, drives):
    """The legend, how good the best sample is, and how long each stage took."""
    from matplotlib.lines import Line2D

    ax.axis("off")
    looks = {d.label: d.line for d in reversed(drives)} | {"the past": dict(color=PAST, linewidth=2.5)}
    handles = [Line2D([], [], label=label, **look) for label, look in looks.items()]
    ax.legend(handles=handles, loc="upper left", frameon=False, labelcolor=TRUTH, borderaxespad=0)
    if "ego_future_xyz" in scene:
        ours = min_ade(out.xyz.cpu(), scene["ego_future_xyz"]).item()
        ctrv = ade(baselines(scene)["CTRV"], scene["ego_future_xyz"]).item()
        ax.text(0.55, 0.96, f"{ours:.2f} m", size=21, color=MODEL, weight="bold", va="top")
        ax.text(0.55, 0.72, f"minADE of {out.xyz.shape[1]}\nCTRV {ctrv:.2f} m", color=PAST, va="top")
    ax.text(0.02, 0.03, "   ".join(f"{k} {1000 * v:.0f} ms" for k, v in out.seconds.items()), size=8.5, color=PAST)


def draw_motion(above, speed, curvature, scene, drives):
    """Three axes: the paths from above, speed and curvature over time."""
    from matplotlib.patches import Rectangle

    history, kinematics = scene["ego_history_xyz"][0], scene["ego_kinematics"][0]
    v0 = initial_speed(scene["ego_history_xyz"], scene["ego_history_rot"])  # (1,)
    t = DT * torch.arange(1 - len(kinematics), HORIZON + 1)
    past, future = t[: len(kinematics)], t[len(kinematics) - 1 :]  # both have t0
    for d in drives:
        v = v0 + DT * F.pad(d.actions[:, 0].cumsum(0), (1, 0))  # (65,)
        bend = d.actions[:, 1].masked_fill(v[:-1].abs() < LOW_SPEED, torch.nan)  # a car that hardly moves shows none
        above.plot(d.xyz[:, 0], d.xyz[:, 1], marker="o", markevery=slice(19, None, 20), **d.line)
        speed.plot(future, v, **d.line)
        curvature.plot(future[:-1] + DT / 2, bend, **d.line)
    above.plot(history[:, 0], history[:, 1], color=PAST, linewidth=2.5)
    speed.plot(past, kinematics[:, 0], color=PAST, linewidth=2.5)
    curvature.plot(past, kinematics[:, 2].tan() / world.WHEELBASE, color=PAST, linewidth=2.5)

    above.set_title("from above, m; dots at 2, 4 and 6 s")
    rear, right = world.FRONT - world.LENGTH, -world.WIDTH / 2
    above.add_patch(Rectangle((rear, right), world.LENGTH, world.WIDTH, facecolor=TRUTH, zorder=3))
    above.set_aspect("equal", adjustable="datalim")
    for ax, title in ((speed, "speed, m/s"), (curvature, "curvature, 1/m; left is up")):
        ax.set_title(title)
        ax.axvline(0, color=PAST, linewidth=0.8, alpha=0.5)
        ax.set_xlim(-2, 6.4)
        ax.set_xticks([-2, 0, 2, 4, 6], ["-2", "now", "2", "4", "6 s"])
    speed.set_ylim(0, max(speed.get_ylim()[1], 1))
    low, high = curvature.get_ylim()
    curvature.set_ylim(min(low, -0.02), max(high, 0.02))  # no drama out of noise


def draw(file, scene, out, views):
    """Everything about one scene on a slide of 1600 x 900 pixels.

    scene: a batch of one; out: its Rollout; views {camera id: (image (H, W, 3) uint8, intrinsics (10,), camera_to_ego
    (4, 4))}, the last two None where unknown."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("the picture needs one more package: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drives = drives_of(scene, out)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(16, 9), dpi=100)
        said, true = readable(out.reasoning[0][0]) or "Drives without reasoning.", scene["reasoning"][0]
        size, columns = (23, 80) if len(said) <= 80 else (16, 115)
        figure.text(0.025, 0.965, textwrap.fill(said, columns), size=size, color=TRUTH, va="top", weight="bold")
        below = f"sample 1 of {len(out.reasoning[0])} | " + (f"truth: {true}" if true else scene["name"][0])
        figure.text(0.025, 0.9, textwrap.shorten(below, 180), size=13, color=PAST, va="top")

        # The front camera is large, in the middle of the others, or beside the numbers if it is alone.
        grid = figure.add_gridspec(2, 4, left=0.025, right=0.975, top=0.86, bottom=0.435, wspace=0.032, hspace=0.065)
        front = 1 if 1 in views else next(iter(views))
        places = {0: grid[0, 0], 6: grid[1, 0], 2: grid[0, 3]}
        places = {camera: place for camera, place in places.items() if camera in views and camera != front}
        for camera, place in places.items():
            draw_view(figure.add_subplot(place, anchor="NW"), camera, views[camera], drives)
        ax = figure.add_subplot(grid[:, 1:3] if places else grid[:, :3], anchor="N" if places else "NW")
        draw_view(ax, front, views[front], drives)
        draw_numbers(figure.add_subplot(grid[1, 3] if places else grid[0, 3]), scene, out, drives)

        grid = figure.add_gridspec(1, 4, left=0.045, right=0.975, top=0.355, bottom=0.055, wspace=0.26)
        draw_motion(*(figure.add_subplot(place) for place in (grid[:2], grid[2], grid[3])), scene, drives)
        os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
        figure.savefig(file)
        plt.close(figure)


@torch.no_grad()
def looked_at(model, scene):
    """What a model sees of a Scene, by how it sees. image: for each group of the newest pictures, (B, cameras, h, w), the
    smallest share of SHARES_KEPT that keeps it, or 1; flex: the attention it receives from the scene tokens in Flex's last
    layer, the same shape; triplane: how far each plane is from the batch's mean, three (B, rows, columns)."""
    tower, caught, cfg = model.vlm.model.visual, [], model.cfg
    B, cameras, H, W = *scene["images"].shape[:2], *scene["images"].shape[-2:]
    by_group = lambda a: a.view(B, cameras, -1, H // cfg.patch // cfg.merge, W // cfg.patch // cfg.merge)[:, :, -1]
    if cfg.vision == "triplane":
        hook = tower.triplane.norm3.register_forward_hook(lambda _, inputs, output: caught.append(output))
        model.look(scene)
        hook.remove()
        planes = [plane.unflatten(0, (B, -1))[:, -1] for plane in caught]  # (B, rows, columns, C), of the newest time
        return [(plane - plane.mean(0)).norm(dim=-1) for plane in planes]
    if cfg.vision == "flex":
        remember = lambda attn, inputs: caught.append(attn.heads(*inputs[:3]))
        hook = tower.flex.blocks[-1].attn.register_forward_pre_hook(remember)
        model.look(scene)
        hook.remove()
        (q, k, _), K = caught[0], cfg.flex_tokens
        return by_group((q[:, :, :K] @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean((1, 2))[:, K:])
    was, share = cfg.keep, 1.0
    for cfg.keep in (1.0, *SHARES_KEPT):  # descending
        kept = model.look(scene)[-1]
        share = torch.ones(kept.shape) if cfg.keep == 1 else share.scatter(1, kept, cfg.keep)
    cfg.keep = was
    return by_group(share)


def draw_seeing(file, args):
    """What single image under pruning, Flex and triplanes look at in one scene, as trained by --encoders."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("the picture needs one more package: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = args.encoders or os.path.join("out", "encoders")
    single, triplane, flex = (load_model(f"{folder}/{WAYS[i].folder}-{args.seeds[0]}") for i in (0, 1, 3))
    scene, views = world_scene(single.cfg, args)
    others = data.load("world", split="val", scenes=32, folder=args.cache, **world_view(single.cfg, args)).batch(range(31))
    batch = {k: torch.cat([scene[k], others[k]]) for k in scene if torch.is_tensor(scene[k])}
    share, attention, planes = looked_at(single, scene)[0], looked_at(flex, scene)[0], looked_at(triplane, batch)
    light = {0.1: 1, 0.25: 0.7, 0.5: 0.45, 0.75: 0.25, 1: 0.06}
    rows = {
        "the newest pictures": torch.ones_like(attention),
        "pruning: keep 0.1 keeps what is fully lit, then, ever darker, 0.25, 0.5 and 0.75; what is black goes first":
            share.clone().apply_(lambda s: light[round(s, 2)]),
        f"Flex: the lit is what its {flex.cfg.flex_tokens} scene tokens attend to in the last layer (root of the mean attention)":
            0.06 + 0.94 * (attention / attention.max()).sqrt(),
    }  # fmt: skip

    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(16, 10.4), dpi=100)
        figure.text(0.02, 0.965, f"What each way of seeing looks at: {scene['name'][0]}", size=17, weight="bold", color=TRUTH)
        figure.text(0.02, 0.937, f"truth: {scene['reasoning'][0]}", size=12, color=PAST)
        grid = figure.add_gridspec(3, len(views), left=0.02, right=0.98, top=0.905, bottom=0.33, wspace=0.03, hspace=0.16)
        for r, (title, lit) in enumerate(rows.items()):
            for c, (camera, (image, _, _)) in enumerate(views.items()):
                ax = figure.add_subplot(grid[r, c], anchor="NW")
                over = F.interpolate(lit[None, c : c + 1], image.shape[:2])[0, 0].numpy()  # each group's light, by the pixel
                ax.imshow(image / 255 * over[..., None], interpolation="nearest")
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
                if c == 0:
                    ax.set_title(title, pad=3)
                if r == 0:
                    ax.annotate(CAMERAS[camera], (0, 1), (5, -5), "axes fraction", "offset points", va="top", color="white")

        grid = figure.add_gridspec(1, 3, left=0.045, right=0.98, top=0.28, bottom=0.04, wspace=0.12, width_ratios=(2, 1, 1))
        centres = triplane.vlm.model.visual.triplane.centres()
        axes = centres[:, 0, 0, 0], centres[0, :, 0, 1], centres[0, 0, :, 2]  # m
        titles = ("triplane from above: x ahead, y left, m; dark: unlike its mean over 32 scenes",
                  "from the side: x, z", "from the front: y, z")  # fmt: skip
        for k, (a, b) in enumerate(((0, 1), (0, 2), (1, 2))):
            ax = figure.add_subplot(grid[k])
            ax.pcolormesh(axes[a], axes[b], planes[k][0].T, cmap="Oranges", shading="nearest")
            ax.set_title(titles[k])
            if k == 0:
                path = scene["ego_future_xyz"][0]
                ax.plot(path[:, 0], path[:, 1], color=TRUTH, linewidth=1.5)
        ax.invert_xaxis()  # seen from the front of the car on, left is left
        os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
        figure.savefig(file)
        plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# The command line

NANO = os.path.join(os.path.dirname(os.path.abspath(__file__)), "checkpoints", "nano")  # the shipped checkpoint


def parse_flags():
    p = argparse.ArgumentParser(description="Sample a model on one scene and draw it, or evaluate it on many.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    add = p.add_argument
    add("--checkpoint", metavar="FOLDER", default=NANO, help="the model, ours or the release's")
    add("--seed", type=int, default=0, help="which held-out scene of the world; also the seed of the sampling")
    add("--situation", metavar="NAME", help=f"the first such scene from --seed on: {', '.join(world.SITUATIONS)}")
    add("--clip", metavar="FOLDER", help="a real clip instead of the world, in any layout that data.py reads")
    add("--t0", type=float, metavar="SECONDS", help="now, on the clip's clock (default: the first that the clip names)")
    add("--size", type=int, nargs=2, default=(64, 128), metavar=("H", "W"), help="pixels of the world's images")
    add("--n", type=int, default=6, help="samples of a scene, each with its own reasoning")
    add("--temperature", type=float, default=0.6, help="of the reasoning; 0 is greedy")
    add("--top-p", type=float, default=0.98, help="reason with the likeliest words that together have this probability")
    add("--steps", type=int, default=10, help="Euler steps of the flow from noise to controls")
    add("--no-reasoning", dest="reason", action="store_false", help="drive without thinking")
    add("--out", metavar="PNG", default="out/sample.png", help="the picture")
    add("--eval", type=int, nargs="?", const=512, metavar="N", help="evaluate on N held-out scenes of the world (512)")
    add("--blind", metavar="FOLDER", help="with --eval: a checkpoint that was trained with train.py --blind")
    add("--batch", type=int, default=32, help="with --eval: scenes at a time")
    add("--cache", metavar="FOLDER", default="data", help="with --eval: where rendered scenes are kept")
    add("--keep", type=float, metavar="SHARE", help="of the image tokens, the most looked at (default: the checkpoint's)")
    add("--retrieve", type=float, metavar="SHARE",
        help="of the prompt's image tokens, for the reasoning to read back (default: the checkpoint's)")  # fmt: skip
    add("--encoders", metavar="FOLDER", help="train every way to see into FOLDER, what is missing of it, and compare them")
    add("--train-steps", type=int, default=400, help="with --encoders: of each training")
    add("--scenes", type=int, default=8000, help="with --encoders: scenes to train with")
    add("--seeds", type=int, nargs="+", default=[0], help="with --encoders: trainings of each row")
    add("--jobs", type=int, default=1, help="with --encoders: trainings at a time, a thread each")
    add("--repeats", type=int, default=20, help="with --encoders: of each measurement of time")
    add("--seeing", metavar="PNG", help="draw what the encoders of --encoders (default: out/encoders) look at")
    args = p.parse_args()
    if args.eval is not None and (args.clip or args.situation):
        p.error("--eval is over the world's scenes; it takes no --clip and no --situation")
    if args.blind and args.eval is None:
        p.error("--blind goes with --eval")
    return args


def load_model(folder, **switches):
    """The checkpoint where it runs best: the GPU if there is one, and there the release's size in bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    large = read_config(folder).max_pixels > 0
    dtype = torch.bfloat16 if large and device == "cuda" else torch.float32
    return Alpamayo.from_pretrained(folder, dtype, device, **switches)


def world_view(cfg, args):
    """How the model wants to be shown the world."""
    return dict(camera_ids=cfg.cameras, frames=cfg.frames, frame_dt=cfg.frame_dt, size=tuple(args.size))


def world_scene(cfg, args):
    """A Scene of the built-in world, batched, and its views for `draw`."""
    seed = data.SEEDS["val"] + args.seed
    if args.situation:
        if args.situation not in world.SITUATIONS:
            raise ValueError(f"--situation {args.situation!r}: unknown; expected one of {', '.join(world.SITUATIONS)}")
        while world.draw(seed).situation != args.situation:
            seed += 1
    scene = data.make_scenes([seed], **world_view(cfg, args))
    scene["name"] = [f"{scene['name'][0]}, held-out scene {seed - data.SEEDS['val']} of the world"]
    images = scene["images"][0, :, -1].permute(0, 2, 3, 1).numpy()  # (cameras, H, W, 3), the newest
    views = zip(images, scene["intrinsics"][0], scene["camera_to_ego"][0])
    return scene, dict(zip(scene["camera_ids"][0].tolist(), views))


def clip_scene(cfg, args):
    """A Scene of a real clip, batched, and its views for `draw`: the images as they were taken."""
    view = dict(t0=args.t0, frames=cfg.frames, frame_dt=cfg.frame_dt)
    of_world = cfg.max_pixels == 0
    if of_world:  # it knows only the world's cameras
        view |= dict(size=tuple(args.size), rig=world.RIG)
    try:
        clips = data.load_clips(args.clip, **view)
    except ValueError:  # perhaps the clip ends within 6.4 s: then there is no truth to compare with
        clips = data.load_clips(args.clip, future=False, **view)
    if of_world:
        print("note       images are re-projected to the world's cameras; the shipped nano never saw a real street")
    scene, (clip, t0) = clips.batch([0]), clips.cuts[0]
    now = np.array([t0])
    return scene, {k: (c.read(now)[0], c.intrinsics, c.camera_to_ego) for k, c in clips.sources(clip).items()}


def report(scene, out, args):
    """Print what the model thought and where it would go, beside the truth where it is known."""
    true = scene["reasoning"][0]
    print(f"scene      {scene['name'][0]}")
    if true:
        print(f"truth      {true}")
    errors = ade(out.xyz[0].cpu(), scene["ego_future_xyz"][0]).tolist() if "ego_future_xyz" in scene else None
    for i, said in enumerate(out.reasoning[0]):
        known = args.reason and data.decisions(true)
        mark = (" ✓" if is_right(said, true)[2] else " ✗") if known else ""
        print(f"sample {i + 1:<2}{mark:2}  {readable(said) or '(no reasoning)'}" + (f"  ADE {errors[i]:.2f} m" if errors else ""))
    if errors:
        ctrv = ade(baselines(scene)["CTRV"], scene["ego_future_xyz"]).item()
        print(f"minADE     {min(errors):.2f} m, best of {args.n}; constant turn rate and velocity: {ctrv:.2f} m")
    print("time       " + ", ".join(f"{k} {1000 * v:.0f} ms" for k, v in out.seconds.items()))


def main():
    args = parse_flags()
    for flag in ("n", "steps", "batch"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected 1 or more")
    if args.seeing:
        draw_seeing(args.seeing, args)
        print(f"picture    {args.seeing}")
        return
    if args.encoders:
        rows, pictures = compare_ways(args)
        note = dict(n=args.n, scenes=args.eval or 256, steps=args.train_steps, seeds=" ".join(map(str, args.seeds)),
                    pictures=pictures, threads=torch.get_num_threads(), repeats=args.repeats, batch=args.batch)  # fmt: skip
        print(ways_table(rows) + "\n\n" + WAYS_NOTE.format(**note) + "\n\nParameters at full size:\n" + full_size())
        print(json.dumps({**note, "rows": rows}))
        return
    switches = {k: getattr(args, k) for k in ("keep", "retrieve") if getattr(args, k) is not None}
    model = load_model(args.checkpoint, **switches)
    args.reason = args.reason and model.cfg.reasoning == "on"  # after stage `action` a model cannot think yet
    if args.eval is not None:
        rows = evaluate(model, args)
        print(table(rows) + "\n\n" + NOTE.format(n=args.n))
        print(json.dumps({"checkpoint": args.checkpoint, "samples": args.n, "seed": args.seed, "rows": rows}))
        return
    scene, views = clip_scene(model.cfg, args) if args.clip else world_scene(model.cfg, args)
    out = model.sample(scene, args.n, args.temperature, args.top_p, args.steps, seed=args.seed, reason=args.reason)
    report(scene, out, args)
    draw(args.out, scene, out, views)
    print(f"picture    {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"sample.py: {error}")
