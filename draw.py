"""
Pictures: what all of them share, and one scene on a slide.

    pyplot, picture, save_figure    matplotlib, drawing into files
    readable, verdict               what a model said, and whether that is right
    STYLE, TRUTH, GREY, MODEL       the look: few colours, and grey for what is around them
    DrawnPath, Look, Photo          a path, how it is drawn, and what a camera sees
    ribbon, draw_photo              a path on the road, as a camera sees it
    draw_scene                      everything about one scene, 1600 x 900 pixels

Not a script: sample.py and tools/ draw with it.
"""
import math
import textwrap
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
import doors
import world
from alpamayo import (
    DT,
    HORIZON,
    LOW_SPEED,
    ade,
    fit_actions,
    initial_speed,
    project,
    unwrap,
    yaw_of,
)
from motion import baselines, min_ade

TRUTH = "#1b1f27"  # dark: what was driven
GREY = "#8b919c"  # grey: the past, and everything around a plot
MODEL = "#ff5a1f"  # the one hue: what the model would drive
CAPTIONS = (  # by camera id
    "cross left", "front wide", "cross right", "rear left", "rear tele", "rear right", "front tele")
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}


def pyplot():
    """matplotlib.pyplot, drawing into files. ImportError, in one line, where there is none."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("the picture needs one more package: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def picture(path):
    """The type of a flag that names a picture to write. ImportError where nothing could draw it."""
    pyplot()
    return doors.file_to_write(".png", ".jpg", ".pdf", ".svg")(path)


def save_figure(figure, file):
    """Write a figure into a file, whole or not at all, and forget it."""
    kind = str(file).rpartition(".")[2].lower()
    doors.write_atomically(file, lambda part: figure.savefig(part, format=kind))
    pyplot().close(figure)


def readable(text):
    """The text with a dot for whatever cannot be printed: an untrained model may say any byte."""
    shown = ""
    for character in text:
        known = character.isprintable() and character != "\N{REPLACEMENT CHARACTER}"
        shown += character if known else "·"
    return shown


def verdict(said, true):
    """How a trace compares with the true one: "right"; "other reason", for the same decisions;
    "wrong". Nothing, "", where one of them is silent, or the truth decides nothing."""
    if not said or not data.decisions(true):
        return ""
    if data.decisions(said) != data.decisions(true):
        return "wrong"
    return "right" if reasons_in(said) == reasons_in(true) else "other reason"


def reasons_in(text):
    """The reasons that a trace gives, in whatever order."""
    return set(text.lower().partition(" since ")[2].strip(" .").split(" and "))


# --------------------------------------------------------------------------------------------------
# What is drawn, and how it looks


class Look(NamedTuple):
    """How a path is drawn."""

    line: dict  # options of matplotlib's plot
    bands: tuple  # on the road, in a photo: (width m, colour, alpha) each


class DrawnPath(NamedTuple):
    """A path, and how it is drawn."""

    xyz: torch.Tensor  # (64, 3) m
    rot: torch.Tensor  # (64, 3, 3)
    actions: torch.Tensor | None  # (64, 2): m/s^2, 1/m
    look: Look
    label: str = ""


class Photo(NamedTuple):
    """An image, and the camera that took it; None where the camera is not calibrated."""

    image: np.ndarray  # (H, W, 3)
    intrinsics: torch.Tensor | None  # (10,), see alpamayo.project
    camera_to_ego: torch.Tensor | None  # (4, 4)
    seen: bool = True  # whether the model looks through this camera


CORNER = dict(xycoords="axes fraction", textcoords="offset points", va="top")
BEHIND = dict(color=GREY, linewidth=2.5)  # the line of what was driven before t0
DRIVEN = Look(
    dict(color=TRUTH, linewidth=1.5, markersize=4),
    ((0.4, "white", 1), (0.2, TRUTH, 1)),
)
BEST = Look(
    dict(color=MODEL, alpha=0.8, linewidth=3.5, markersize=8),
    ((1.8, MODEL, 0.55),),
)
OTHER = Look(
    dict(color=MODEL, alpha=0.3, linewidth=1.8, markersize=4),
    ((1.8, MODEL, 0.18),),
)


def sample_shown(scene, out):
    """Which sample a slide is about: the one closest to the truth, or the first where there is
    none. Its words are the title and its path is bold."""
    if "ego_future_xyz" not in scene:
        return 0
    return int(ade(out.xyz[0].cpu(), scene["ego_future_xyz"][0]).argmin())


def paths_of(scene, out, shown):
    """What to draw of a batch of one and its Rollout, in order: samples, the one that is shown, the
    truth where it is known."""
    samples = zip(out.xyz[0].cpu(), out.rot[0].cpu(), out.actions[0].cpu())
    paths = [DrawnPath(*sample, OTHER, "other samples") for sample in samples]
    bold = paths.pop(shown)
    paths.append(bold._replace(look=BEST, label=f"sample {shown + 1}"))
    if "ego_future_xyz" in scene:
        past = scene["ego_history_xyz"][0], scene["ego_history_rot"][0]
        future = scene["ego_future_xyz"][0], scene["ego_future_rot"][0]
        paths.append(DrawnPath(*future, fit_actions(*past, *future), DRIVEN, "driven in truth"))
    return paths


def photos_of(scene, b=0):
    """The newest image of each camera of scene b of a batch: {camera id: Photo}."""
    photos = {}
    for i, camera in enumerate(scene["camera_ids"][b].tolist()):
        image = scene["images"][b, i, -1].permute(1, 2, 0).numpy()
        photos[camera] = Photo(image, scene["intrinsics"][b, i], scene["camera_to_ego"][b, i])
    return photos


# --------------------------------------------------------------------------------------------------
# A path on the road, as a camera sees it


def ribbon(xyz, rot, intrinsics, camera_to_ego, width):
    """Quadrilaterals (K, 4, 2) in pixels: a band on the road along a path, as a camera sees it.

    xyz (64, 3) and rot (64, 3, 3): a path in the ego frame at t0, whose ground is z = 0;
    intrinsics (10,) as alpamayo.project wants them; camera_to_ego (4, 4); width in m.
    What the camera does not see is left out."""
    poses = torch.cat([xyz[:, :2], yaw_of(rot)[:, None]], 1)  # (64, 3): x, y, yaw
    path = F.pad(poses.T, (1, 0))  # (3, 65), from the origin
    path[2] = unwrap(path[2])
    # 16 pieces to each 0.1 s: next to the car a metre of road is a third of the picture.
    path = F.interpolate(path[None], size=16 * HORIZON + 1, mode="linear", align_corners=True)
    x, y, yaw = path[0]
    centre = torch.stack([x, y, 0 * x], -1)
    left = width / 2 * torch.stack([-yaw.sin(), yaw.cos(), 0 * yaw], -1)
    edges = torch.stack([centre + left, centre - left])  # (2, 1025, 3)
    edges = (edges - camera_to_ego[:3, 3]) @ camera_to_ego[:3, :3]  # in camera axes
    pixels, visible = project(edges, intrinsics)
    # A piece across the image's border is kept, the axes cut it; none that reaches behind the lens.
    ahead = edges[..., 2] > 0.1
    kept = corners(visible).any(1) & corners(ahead).all(1)
    return corners(pixels)[kept]


def corners(edges):
    """The pieces between successive points of two edges (2, K + 1, ...): (K, 4, ...)."""
    left, right = edges
    return torch.stack([left[:-1], left[1:], right[1:], right[:-1]], 1)


def draw_photo(ax, camera, photo, paths):
    """A camera's image with the paths on its road."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    H, W = photo.image.shape[:2]
    smoothing = "nearest" if W < 256 else "antialiased"
    ax.imshow(photo.image, extent=(0, W, H, 0), interpolation=smoothing)
    ax.set(xlim=(0, W), ylim=(H, 0))
    ax.set_axis_off()
    box = dict(facecolor=TRUTH, alpha=0.5, linewidth=0, pad=2.5)
    caption = CAPTIONS[camera] + ", unseen by the model" * (not photo.seen)
    ax.annotate(caption, (0, 1), (5, -5), color="white", bbox=box, **CORNER)
    if photo.intrinsics is None:
        return
    for drawn in paths:
        for width, colour, alpha in drawn.look.bands:
            quads = ribbon(drawn.xyz, drawn.rot, photo.intrinsics, photo.camera_to_ego, width)
            if len(quads):
                # One compound path: no seam shows where pieces meet.
                path = Path.make_compound_path_from_polys(quads.numpy())
                ax.add_patch(PathPatch(path, facecolor=colour, alpha=alpha, linewidth=0))


# --------------------------------------------------------------------------------------------------
# The slide


def draw_scene(file, scene, out, photos):
    """Draw everything about one scene on a slide of 1600 x 900 pixels.

    scene: a batch of one; out: its Rollout; photos: {camera id: Photo}."""
    plt = pyplot()
    shown = sample_shown(scene, out)
    paths = paths_of(scene, out, shown)
    cameras = sorted(photos, key=(1, 0, 6, 2, 4, 3, 5).index)  # the first one is large
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(16, 9), dpi=100)
        draw_title(figure, scene, out, shown)
        height, width = photos[cameras[0]].image.shape[:2]
        places, *plots = lay_out(figure, len(cameras), width / height)
        for camera, place in zip(cameras, places):
            ax = figure.add_subplot(place, anchor="N" if camera == cameras[0] else "NW")
            draw_photo(ax, camera, photos[camera], paths)
        above, speed, curvature, numbers = map(figure.add_subplot, plots)
        draw_paths(above, scene, paths)
        draw_profiles(speed, curvature, scene, paths)
        draw_numbers(numbers, scene, out, paths)
        save_figure(figure, file)


def lay_out(figure, cameras, aspect):
    """Where things go: the places of the cameras, the first one large; the view from above, speed,
    curvature and numbers. aspect: width of an image / height."""
    columns = max(4, 2 + math.ceil((cameras - 1) / 2))
    bottom = 0.86 - min(3.4 / columns / aspect, 0.475)
    margins = dict(left=0.025, right=0.975, top=0.86, bottom=bottom)
    top = figure.add_gridspec(2, columns, wspace=0.032, hspace=0.065, **margins)
    margins = dict(left=0.045, right=0.975, top=bottom - 0.08, bottom=0.055)
    below = figure.add_gridspec(1, 4, wspace=0.26, **margins)
    if cameras == 1:
        margins = dict(left=0.55, right=0.975, top=0.84, bottom=bottom + 0.03)
        beside = figure.add_gridspec(1, 1, **margins)[0]
        return [top[:, :2]], beside, below[:2], below[2], below[3]
    small = [top[row, column] for column in (0, *range(3, columns)) for row in (0, 1)]
    places = [top[:, 1:3], *small] if cameras > 2 else [top[:, :2], top[:, 2:]]
    spare = len(places) - cameras
    if spare:
        return places, below[:2], below[2], below[3], top[2 - spare :, -1]
    return places, below[0], below[1], below[2], below[3]


def draw_title(figure, scene, out, shown):
    """What the sample that is shown says. Below it: which one it is, and the truth or the name."""
    said = out.reasoning[0][shown]
    true = scene["reasoning"][0]
    title = textwrap.fill(readable(said) or "Drives without reasoning.", 115, max_lines=2)
    size = 23 if len(title) <= 80 else 16
    figure.text(0.025, 0.965, title, size=size, color=TRUTH, va="top", weight="bold")
    below = f"sample {shown + 1} of {len(out.xyz[0])}"
    if "ego_future_xyz" in scene:
        below += ", the closest to the truth"
    if verdict(said, true):
        below += f"; its words: {verdict(said, true)}"
    below += f" | truth: {true}" if true else f" | {scene['name'][0]}"
    below = textwrap.shorten(readable(below), 165)
    figure.text(0.025, 0.9, below, size=13, color=GREY, va="top")


def draw_numbers(ax, scene, out, paths):
    """The legend, how good the samples are, and how long each stage took."""
    from matplotlib.lines import Line2D

    ax.axis("off")
    lines = {drawn.label: drawn.look.line for drawn in reversed(paths)}
    lines["the past"] = BEHIND
    handles = [Line2D([], [], label=label, **line) for label, line in lines.items()]
    place = dict(loc="upper left", borderaxespad=0, frameon=False)
    ax.legend(handles=handles, labelcolor=TRUTH, **place)
    if "ego_future_xyz" in scene:
        truth = scene["ego_future_xyz"]
        best = min_ade(out.xyz.cpu(), truth).item()
        ctrv = ade(baselines(scene)["CTRV"], truth).item()
        ax.text(0.55, 1, f"{best:.2f} m", size=21, color=MODEL, weight="bold", va="top")
        below = f"minADE of {out.xyz.shape[1]}\nCTRV {ctrv:.2f} m"
        verdicts = Counter(verdict(said, scene["reasoning"][0]) for said in out.reasoning[0])
        verdicts.pop("", None)
        counts = ", ".join(f"{count} {word}" for word, count in verdicts.items())
        below += "\n" + textwrap.fill(f"words: {counts}" if counts else "", 22)
        ax.annotate(below, (0.55, 1), (0, -30), color=GREY, **CORNER)
    times = ", ".join(f"{stage} {1000 * s:.0f} ms" for stage, s in out.seconds.items())
    ax.text(0.02, 0, textwrap.fill(times, 36), size=8.5, color=GREY)


def draw_paths(ax, scene, paths):
    """The paths from above."""
    from matplotlib.patches import Rectangle

    for drawn in paths:
        x, y, _ = drawn.xyz.T
        ax.plot(x, y, marker="o", markevery=slice(19, None, 20), **drawn.look.line)
    x, y, _ = scene["ego_history_xyz"][0].T
    ax.plot(x, y, **BEHIND)
    corner = world.FRONT - world.LENGTH, -world.WIDTH / 2
    ax.add_patch(Rectangle(corner, world.LENGTH, world.WIDTH, facecolor=TRUTH, zorder=3))
    ax.set_title("from above, m; dots at 2, 4 and 6 s")
    ax.set_aspect("equal", adjustable="datalim")


def draw_profiles(speed_ax, curvature_ax, scene, paths):
    """Speed and curvature over time."""
    kinematics = scene["ego_kinematics"][0]
    past = DT * torch.arange(1 - len(kinematics), 1)  # s
    future = DT * torch.arange(HORIZON + 1)
    v0 = initial_speed(scene["ego_history_xyz"], scene["ego_history_rot"])  # (1,)
    for drawn in paths:
        accel, curvature = drawn.actions.T
        speed = v0 + DT * F.pad(accel.cumsum(0), (1, 0))  # (65,)
        standing = speed[:-1].abs() < LOW_SPEED  # then curvature says nothing
        speed_ax.plot(future, speed, **drawn.look.line)
        curvature = curvature.masked_fill(standing, torch.nan)
        curvature_ax.plot(future[:-1] + DT / 2, curvature, **drawn.look.line)
    curvature = kinematics[:, 2].tan() / world.WHEELBASE  # of the steering angle
    speed_ax.plot(past, kinematics[:, 0], **BEHIND)
    curvature_ax.plot(past, curvature, **BEHIND)

    speed_ax.set_title("speed, m/s")
    curvature_ax.set_title("curvature, 1/m; left is up")
    for ax in (speed_ax, curvature_ax):
        ax.axvline(0, color=GREY, linewidth=0.8, alpha=0.5)
        ax.set_xlim(-2, 6.4)
        ax.set_xticks([-2, 0, 2, 4, 6], ["-2", "now", "2", "4", "6 s"])
    speed_ax.set_ylim(0, max(speed_ax.get_ylim()[1], 1))
    low, high = curvature_ax.get_ylim()
    curvature_ax.set_ylim(min(low, -0.02), max(high, 0.02))  # noise shall not look like steering
