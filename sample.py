"""
Look, think, drive, and see what came of it: a picture of one scene, or a table over many.

    python sample.py                           the shipped nano on a scene of the built-in world, drawn into out/
    python sample.py --situation pedestrian    the first held-out scene of that kind
    python sample.py --clip FOLDER --t0 3      a real clip, in any layout that data.py reads
    python sample.py --keep 0.5                with half of the image tokens; any checkpoint, no retraining
    python sample.py --eval                    512 held-out scenes: a Markdown table, then all its numbers as JSON
    python sample.py --drive                   64 scenarios of 20 s in closed loop, and the table of how it went
    python sample.py --drive --split tail      the same, or --eval, in combinations that training never showed
    python sample.py --gallery assets          what there is in the world, on a sheet, and a film of one drive

The page reads: metrics and baselines, the evaluation, driving, the picture, the gallery, the command line.
"""
import argparse
import json
import math
import os
import sys
import textwrap
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import world
from alpamayo import (
    DT, HORIZON, LOW_SPEED, Alpamayo, fit_actions, initial_speed, project, read_config, roll_out, unwrap, yaw_of
)  # fmt: skip

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
    becomes of the model when nobody tells it the route; when its images are its neighbour's in the batch, or grey; and
    of one trained on grey ones."""
    view = world_view(model.cfg, args)
    scenes = data.load("world", split=args.split, scenes=args.eval, folder=args.cache, workers=os.cpu_count(), **view)
    another = lambda scene: scene | {"images": scene["images"].roll(1, 0)}
    grey = lambda scene: scene | {"images": torch.full_like(scene["images"], 127)}  # what train.py --blind shows
    silent = lambda scene: {key: value for key, value in scene.items() if key != "route"}
    runs = {"all": (model, dict if args.route else silent)}
    if model.cfg.route and args.route:
        runs["without the route"] = model, silent
    runs |= {"another scene's images": (model, another), "no images (grey)": (model, grey)}
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
                for name in (*world.SITUATIONS, *world.COMBINATIONS, *world.RARE):
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
# Driving: closed loop in the world

DRIVES = {"close": "close encounter", "at_fault": "at fault", "collision": "collision", "off_road": "off the road",
          "ran": "ran a red light or stop sign", "progress": "progress", "comfort": "comfort"}  # shares
DRIVE_NOTE = """\
% of {n} scenarios of {seconds:g} s, mean ± standard error; a new plan from new images every {replan:g} s. Close
encounter: something solid within 0.25 m of the car; at fault: all but what came from behind, or at a car that stood
(others brake, so few do). A scenario ends at its first close encounter or off the road, and a collision counts until 1 s
later. Nobody comes from the side: a light or sign that is run is counted, but no event. Progress: metres driven, as % (at
most 100) of what the expert drives in the same time. Comfort: how many of the release's six bounds held. Score:
kilometres between ends (> all that were driven, if none)."""


def policy_of(model, args):
    """The model as a policy of `data.drive`. It thinks the likeliest thought, and its flow starts from zero, the middle of
    the noise: from random noise the plans of successive half seconds disagree, and the car wanders off."""
    def policy(scene):
        scene = scene if args.route else {key: value for key, value in scene.items() if key != "route"}
        calm = torch.zeros(len(scene["name"]), HORIZON, 2)
        out = model.sample(scene, 1, 0, steps=args.steps, max_new_tokens=64, noise=calm, reason=args.reason)
        policy.said = [texts[0] for texts in out.reasoning]  # for the film
        return out.actions[:, 0]

    return policy


def drive(model, args):
    """Rows of numbers over scenarios of the world in closed loop: {policy: {name: number, name_se: its standard error}}."""
    first = world.SEEDS[args.split] + args.seed * args.drive
    seeds, view = range(first, first + args.drive), dict(device=model.device, **world_view(model.cfg, args))
    straight_on = lambda scene: torch.zeros(len(scene["name"]), HORIZON, 2)
    policies = {"expert": None, "constant velocity": straight_on, "model": policy_of(model, args)}
    rows = {}
    for name, policy in policies.items():
        parts = []
        for i in tqdm(range(0, args.drive, args.batch), desc=name):
            parts.append(data.drive(policy, seeds[i : i + args.batch], args.seconds, args.replan, **view))
        met = {key: torch.cat([part[key] for part in parts]).double().cpu() for key in parts[0]}  # (N,) each
        row = rows[name] = {"scenarios": args.drive}
        for key in DRIVES:
            row[key] = met[key].mean().item()
            row[key + "_se"] = met[key].std(correction=0).item() / math.sqrt(args.drive)
        row["km"], row["events"] = met["km"].sum().item(), int(((met["close"] + met["off_road"]) > 0).sum())
        row["events_at_fault"] = int(((met["at_fault"] + met["off_road"]) > 0).sum())
    return rows


def drive_table(rows):
    """Rows of `drive` as Markdown."""

    def score(row, events):
        return f"{row['km'] / events:.2f}" if events else f"> {row['km']:.1f}"

    lines = [["policy", *DRIVES.values(), "score, km", "score at fault"], ["---"] + ["---:"] * (len(DRIVES) + 2)]
    for name, row in rows.items():
        shares = [f"{100 * row[key]:.1f} ± {100 * row[key + '_se']:.1f}" for key in DRIVES]
        lines.append([name, *shares, score(row, row["events"]), score(row, row["events_at_fault"])])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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


# ----------------------------------------------------------------------------------------------------------------------
# The gallery: what there is in the world, and a film of a drive


def gallery(model, args):
    """Write drive.gif, a drive in closed loop, and gallery.png, a scene of every kind with its label and the expert's
    path, into the folder args.gallery."""
    import matplotlib

    matplotlib.use("Agg")
    os.makedirs(args.gallery, exist_ok=True)
    draw_film(os.path.join(args.gallery, "drive.gif"), model, args)
    print(f"film       {os.path.join(args.gallery, 'drive.gif')}")
    draw_sheet(os.path.join(args.gallery, "gallery.png"))
    print(f"picture    {os.path.join(args.gallery, 'gallery.png')}")


def draw_sheet(file, size=(128, 256), columns=3):
    """One scene of every situation, combination and rare object: what the front wide and the front tele camera see at t0,
    the label, and the path that the expert will drive."""
    import matplotlib.pyplot as plt

    known, seeds = (*world.SITUATIONS, *world.COMBINATIONS, *world.RARE), {}
    for split in ("val", "tail", "rare"):
        for seed in range(world.SEEDS[split], world.SEEDS[split] + 1000):
            one = world.draw(seed)
            plain = one.dusk == one.rain == 0 and one.visibility == 150
            if plain == (known.index(one.situation) % 4 != 3 and one.situation != "dusk and rain"):  # three of four by day
                seeds.setdefault(one.situation, seed)
    scene = data.make_scenes([seeds[name] for name in known], camera_ids=(1, 6), size=size, frames=1)
    rows, band = -(-len(known) // columns), ((0.5, "white", 0.9), (0.25, MODEL, 1))
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(5.4 * columns, 1.83 * rows), dpi=75)
        grid = figure.add_gridspec(rows, columns, left=0.005, right=0.995, top=0.978, bottom=0.004, wspace=0.03, hspace=0.38)
        for i, name in enumerate(known):
            drive = Drive("", scene["ego_future_xyz"][i], scene["ego_future_rot"][i], None, {}, band)
            pair = grid[i // columns, i % columns].subgridspec(1, 2, wspace=0.01)
            for camera, place in enumerate(pair):
                ax = figure.add_subplot(place)
                view = (scene[key][i, camera] for key in ("images", "intrinsics", "camera_to_ego"))
                image, *geometry = view
                draw_view(ax, (1, 6)[camera], (image[-1].permute(1, 2, 0).numpy(), *geometry), [drive])
                if camera == 0:
                    new = name not in world.SITUATIONS
                    text = name + "   (never in training)" * new
                    ax.text(0, 1.17, text, transform=ax.transAxes, size=11, weight="bold", color=MODEL if new else TRUTH)
                    said = textwrap.shorten(scene["reasoning"][i], 82, placeholder=" ...")
                    ax.text(0, 1.045, said, transform=ax.transAxes, size=8.5, color=PAST)
        figure.savefig(file)
        plt.close(figure)


def draw_film(file, model, args, size=(192, 384)):
    """A scenario in closed loop, a picture every args.replan seconds: the road ahead with the plan on it, what the model
    says, and the scene from above."""
    import matplotlib.pyplot as plt
    from matplotlib.animation import PillowWriter

    situation = args.situation or "double-parked car"
    names = dict(val=world.SITUATIONS, tail=world.COMBINATIONS, rare=world.RARE)
    split = next((split for split, known in names.items() if situation in known), None)
    if split is None:
        raise ValueError(f"--situation {situation!r}: unknown; data.py --splits lists them")
    seed = next(s for s in range(world.SEEDS[split] + args.seed, world.SEEDS["end"]) if world.draw(s).situation == situation)
    policy = policy_of(model, args)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(9.6, 3.9), dpi=75)
        front, above = figure.add_axes([0, 0, 0.66, 0.87]), figure.add_axes([0.69, 0.02, 0.3, 0.83])
        writer = PillowWriter(fps=1 / args.replan)

        def frame(traffic, scene, plan):
            front.clear(), above.clear()
            image = world.images_of(traffic, (1,), size)[0, 0].permute(1, 2, 0).cpu().numpy()
            intrinsics, pose = world.rig_camera(1, *size)
            xyz, rot = roll_out(plan[:1], traffic.speed[:1])
            draw_view(front, 1, (image, intrinsics, pose), [Drive("", xyz[0], rot[0], None, {}, ((1.8, MODEL, 0.5),))])
            draw_above(above, traffic, xyz[0])
            for text in list(figure.texts):
                text.remove()
            said = policy.said[0] if args.reason else "drives without reasoning"
            figure.text(0.012, 0.925, readable(said), size=11, weight="bold", color=TRUTH)
            time = f"{situation}   {traffic.time[0].item():4.1f} s   {traffic.speed[0].item():4.1f} m/s"
            figure.text(0.99, 0.885, time, size=9, color=PAST, ha="right")
            writer.grab_frame()

        with writer.saving(figure, file, 75):
            met = data.drive(policy, [seed], args.seconds, args.replan, film=frame, **world_view(model.cfg, args))
        plt.close(figure)
    print(f"drive      {situation}, seed {seed}: " + ", ".join(f"{k} {v.item():.2g}" for k, v in met.items()))


def draw_above(ax, traffic, plan):
    """Scene 0 of a World from above, the ego at the origin and looking up: what stands or moves, and the plan (64, 3)."""
    from matplotlib.patches import Polygon

    x, y, yaw = (value[0] for value in traffic.poses_to_ego())
    things, solid = traffic.things, traffic.solid(traffic.things.kind)[0]
    ax.set_facecolor("#eceff3")
    s = torch.linspace(-60, 160, 111) + world.locate(traffic.x, traffic.y, traffic.scene.road)[0]
    left, oncoming, right = traffic.scene.lanes[0].tolist()
    for lane in range(int(-right), int(left + oncoming) + 2):  # lane lines
        lx, ly, _ = world.place(s, torch.full_like(s, (lane - 0.5) * world.LANE), traffic.scene.road)
        lx, ly = (value[0] for value in traffic.to_ego(lx, ly))
        ax.plot(-ly, lx, color="white", linewidth=1.5, zorder=0)

    def rectangle(cx, cy, heading, size, colour):
        a, b = torch.tensor([1.0, 1, -1, -1]) * size[0] / 2, torch.tensor([1.0, -1, -1, 1]) * size[1] / 2
        px, py = cx + a * heading.cos() - b * heading.sin(), cy + a * heading.sin() + b * heading.cos()
        ax.add_patch(Polygon(torch.stack([-py, px], 1).numpy(), closed=True, facecolor=colour))

    for j in range(len(x)):
        if solid[j] or things.kind[0, j] == world.BUMP:
            rectangle(x[j], y[j], yaw[j], things.size[0, j], TRUTH if things.cause[0, j] else PAST)
    zero = torch.zeros(())
    rectangle(zero + world.FRONT - world.LENGTH / 2, zero, zero, (world.LENGTH, world.WIDTH), MODEL)
    ax.plot(-plan[:, 1], plan[:, 0], color=MODEL, linewidth=2, alpha=0.7)
    ax.set(xlim=(-17, 17), ylim=(-12, 60), xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_visible(False)


# ----------------------------------------------------------------------------------------------------------------------
# The command line

NANO = os.path.join(os.path.dirname(os.path.abspath(__file__)), "checkpoints", "nano")  # the shipped checkpoint


def parse_flags():
    p = argparse.ArgumentParser(description="Sample a model on one scene and draw it, or evaluate it on many.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    add = p.add_argument
    add("--checkpoint", metavar="FOLDER", default=NANO, help="the model, ours or the release's")
    add("--seed", type=int, default=0, help="which held-out scene of the world; also the seed of the sampling")
    add("--split", choices=("val", "tail", "rare"), default="val",
        help="scenes like those of training | combinations that it never shows | objects that it never shows")
    add("--situation", metavar="NAME", help="the first such scene of the split from --seed on; data.py --splits lists them")
    add("--clip", metavar="FOLDER", help="a real clip instead of the world, in any layout that data.py reads")
    add("--t0", type=float, metavar="SECONDS", help="now, on the clip's clock (default: the first that the clip names)")
    add("--size", type=int, nargs=2, default=(64, 128), metavar=("H", "W"), help="pixels of the world's images")
    add("--n", type=int, default=6, help="samples of a scene, each with its own reasoning")
    add("--temperature", type=float, default=0.6, help="of the reasoning; 0 is greedy")
    add("--top-p", type=float, default=0.98, help="reason with the likeliest words that together have this probability")
    add("--steps", type=int, default=10, help="Euler steps of the flow from noise to controls")
    add("--no-reasoning", dest="reason", action="store_false", help="drive without thinking")
    add("--no-route", dest="route", action="store_false", help="do not tell the model where the route goes")
    add("--out", metavar="PNG", default="out/sample.png", help="the picture")
    add("--eval", type=int, nargs="?", const=512, metavar="N", help="evaluate on N held-out scenes of the world (512)")
    add("--blind", metavar="FOLDER", help="with --eval: a checkpoint that was trained with train.py --blind")
    add("--drive", type=int, nargs="?", const=64, metavar="N", help="drive N scenarios of the world in closed loop (64)")
    add("--seconds", type=float, default=20.0, help="with --drive: how long a scenario is")
    add("--replan", type=float, default=0.5, help="with --drive: seconds between plans")
    add("--gallery", metavar="FOLDER", help="draw a sheet of the world's situations and a film of a drive into it")
    add("--batch", type=int, default=32, help="with --eval and --drive: scenes at a time")
    add("--cache", metavar="FOLDER", default="data", help="with --eval: where rendered scenes are kept")
    add("--keep", type=float, metavar="SHARE", help="of the image tokens, the most looked at (default: the checkpoint's)")
    add("--retrieve", type=float, metavar="SHARE",
        help="of the prompt's image tokens, for the reasoning to read back (default: the checkpoint's)")  # fmt: skip
    args = p.parse_args()
    if (args.eval is not None or args.drive is not None) and (args.clip or args.situation):
        p.error("--eval and --drive are over the world's scenes; they take no --clip and no --situation")
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
    seed = world.SEEDS[args.split] + args.seed
    if args.situation:
        known = {"val": world.SITUATIONS, "tail": world.COMBINATIONS, "rare": world.RARE}[args.split]
        if args.situation not in known:
            known = ", ".join(known)
            raise ValueError(f"--situation {args.situation!r}: not in split {args.split}; expected one of {known}")
        while world.draw(seed).situation != args.situation:
            seed += 1
    scene = data.make_scenes([seed], **world_view(cfg, args))
    scene["name"] = [f"{scene['name'][0]}, held-out scene {seed - world.SEEDS[args.split]} of the world"]
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
        error = f"  ADE {errors[i]:.2f} m" if errors else ""
        print(f"sample {i + 1:<2}{mark:2}  {readable(said) or '(no reasoning)'}{error}")
    if errors:
        ctrv = ade(baselines(scene)["CTRV"], scene["ego_future_xyz"]).item()
        print(f"minADE     {min(errors):.2f} m, best of {args.n}; constant turn rate and velocity: {ctrv:.2f} m")
    print("time       " + ", ".join(f"{k} {1000 * v:.0f} ms" for k, v in out.seconds.items()))


def main():
    args = parse_flags()
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: expected 0 or more")
    for flag in ("n", "steps", "batch", "eval", "drive"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected 1 or more")
    switches = {k: getattr(args, k) for k in ("keep", "retrieve") if getattr(args, k) is not None}
    model = load_model(args.checkpoint, **switches)
    args.reason = args.reason and model.cfg.reasoning == "on"  # after stage `action` a model cannot think yet
    ran = {"checkpoint": args.checkpoint, **{k: getattr(model.cfg, k) for k in ("keep", "retrieve")},
           "split": args.split, "seed": args.seed}  # fmt: skip
    if args.eval is not None:
        rows = evaluate(model, args)
        print(table(rows) + "\n\n" + NOTE.format(n=args.n))
        print(json.dumps({**ran, "samples": args.n, "rows": rows}))
        return
    if args.drive is not None:
        rows = drive(model, args)
        print(drive_table(rows) + "\n\n" + DRIVE_NOTE.format(n=args.drive, seconds=args.seconds, replan=args.replan))
        print(json.dumps({**ran, "rows": rows}))
        return
    if args.gallery:
        gallery(model, args)
        return
    scene, views = clip_scene(model.cfg, args) if args.clip else world_scene(model.cfg, args)
    if not args.route:
        scene.pop("route", None)
    out = model.sample(scene, args.n, args.temperature, args.top_p, args.steps, seed=args.seed, reason=args.reason)
    report(scene, out, args)
    draw(args.out, scene, out, views)
    print(f"picture    {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"sample.py: {error}")
