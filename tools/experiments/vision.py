"""
Table 12: four ways to see, each before the shipped nano, which then learns on.

    python -m tools.experiments vision --jobs 2
    python -m tools.experiments vision --from-nothing              each a nano from nothing
    python -m tools.experiments vision --picture out/seeing.png    what the trained ones look at
    python -m tools.experiments vision --parameters                their size beside the paper's

The page reads: the ways to see; their numbers; their table; their picture; the command.
"""
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import draw
import world
from alpamayo import NANO, PRESETS, Config, VisionTower, load_model
from doors import whole
from tools import blind, markdown
from tools.common import COUNT, measure_plans, world_scenes
from tools.experiments.measures import FIRST
from tools.experiments.trainings import Training, folder_of, spread, train

ABOUT = "Table 12: vision encoders"
NEEDS = "not timed yet"
SAMPLING = {"seed": 0, "n": 6, "steps": 10, "batch": 32, "reason": True, "route": True}
TRAINED = PRESETS["nano"]
PICTURES = TRAINED.frames // TRAINED.temporal_patch * len(TRAINED.cameras)  # of a scene
REPEATS = 20  # rounds of timing


# --------------------------------------------------------------------------------------------------
# The ways to see


class Way(NamedTuple):
    """A row of the table."""

    name: str
    flags: str = ""  # of train.py
    paper: str = "-"  # the paper's row: tokens an image, minADE relative to single image
    switches: dict = {}  # of a model that was trained without them: no training of its own


SHARES_KEPT = (0.75, 0.5, 0.25, 0.1)
WAYS = [
    Way("single image", "", "160, 0 %"),
    Way("triplane, patch 4 x 3 x 2", "--vision triplane --planes-patch 4 3 2", "104, -3 %"),
    Way("triplane, patch 6 x 6 x 2", "--vision triplane --planes-patch 6 6 2", "45, +4 %"),
    Way("Flex, 20 scene tokens", "--vision flex --flex-tokens 20", "50, -3 %"),
    Way("Flex, 13", "--vision flex --flex-tokens 13", "32, -3 %"),
    Way("Flex, 6", "--vision flex --flex-tokens 6", "16, -2 %"),
    Way("Flex, 3", "--vision flex --flex-tokens 3", "8, -2 %"),
]


def trainings_of(way, args):
    """A row's, one a seed."""
    height, width = args.size
    usual = f"--steps {args.train_steps} --scenes {args.scenes} --size {height} {width}"
    usual += "" if args.from_nothing else f" --stage reason --init {NANO}"
    return [Training(f"{usual} {way.flags}".strip(), seed) for seed in args.seeds]


# --------------------------------------------------------------------------------------------------
# Their numbers


def encoder_of(tower):
    """What turns the tower's patches into the language model's tokens: a list of modules."""
    names = ("triplane", "flex", "merger", "deepstack_merger_list")
    return [getattr(tower, name) for name in names if hasattr(tower, name)]


def parameters_of(modules):
    return sum(p.numel() for module in modules for p in module.parameters())


@torch.no_grad()
def flops(model, scene):
    """FLOPs of a scene's matrix products: {vision, prefill}."""
    vision = FlopCounterMode(display=False)
    prefill = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH):  # a CPU's fused attention is not counted
        with vision:
            prompt = model.embed_prompt(scene, reason=False)
        with prefill:
            model.prefill(prompt)
    return {"vision": vision.get_total_flops(), "prefill": prefill.get_total_flops()}


def prompt_milliseconds(model, scene):
    """Time of vision and prefill for each scene of a batch."""
    seconds = model.sample(scene, n=1, steps=1, reason=False, seed=0).seconds
    return 1000 * (seconds["vision"] + seconds["prefill"]) / len(scene["images"])


def compare_ways(ways, args):
    """The table's numbers, {row: {name: number, or a list of one for each seed}}."""
    world_scenes(TRAINED, "train", args.scenes, args)  # once, before several processes would
    train([one for way in ways for one in trainings_of(way, args)], args)
    view = data.view_of(TRAINED, args.size)
    scenes = data.load_world("val", args.eval, FIRST, args.cache, **view)
    one = scenes.batch([0])
    many = scenes.batch(range(min(SAMPLING["batch"], args.eval)))
    rows = {}
    models = {}  # of the first seed
    for way in tqdm(ways, desc="evaluating", unit="row"):
        folders = [folder_of(one, args) for one in trainings_of(way, args)]
        seeds = [load_model(folder, args.device, **way.switches) for folder in folders]
        found = [measure_plans(model, scenes, SimpleNamespace(**SAMPLING)) for model in seeds]
        both, errors, minade = (
            [numbers[name].mean().item() for numbers in found]
            for name in ("both", "ade", "minade"))
        single = rows[ways[0].name]["minade"] if rows else minade
        model = models[way.name] = seeds[0]
        row = rows[way.name] = {"paper": way.paper, "both": both, "ade": errors, "minade": minade}
        row["relative"] = [a / b - 1 for a, b in zip(minade, single)]
        row["tokens"] = model.look(one)[0].shape[1] / PICTURES
        row["parameters"] = parameters_of(encoder_of(model.vlm.model.visual))
        row["flops"] = flops(model, one)
    times = {name: [] for name in rows}
    for _ in tqdm(range(REPEATS), desc="timing", unit="round"):
        for name, model in models.items():  # in turn: what else this machine does slows all alike
            times[name].append([prompt_milliseconds(model, one), prompt_milliseconds(model, many)])
    for name, row in rows.items():
        row["ms"], row["ms_among"] = np.median(times[name], 0).tolist()
    for name, numbers in blind.measure(blind.fit_drivers(), scenes).items():
        rows[name] = {key: [numbers[key].mean().item()] for key in ("ade", "minade")}
    return rows


# --------------------------------------------------------------------------------------------------
# Their table

ENCODER_NOTE = """\
Both right, ADE: of the likeliest samples for {eval} held-out scenes of our world, % that decide
right, and m; minADE: best of {n} other samples; relative: minADE against the first row's of the
same seed; seeds: {seeds}; ± their standard deviation. Every model learned {begun} for {train_steps}
steps of 32 scenes, of {scenes}. The last rows have no eyes. Tokens: visual tokens of the language
model for each of {pictures} pictures; a picture is two successive frames of a camera. Parameters:
of what turns the tower's patches into tokens; triplane and Flex need no mergers. FLOP: matrix
products of one scene. ms: vision + prefill, median of {repeats} rounds over all rows, a scene by
itself and a scene of a batch of {batch}. The paper's: Table 12, tokens an image and relative
minADE, of real traffic, a 0.5B model and 160 tokens an image: compare the order only."""


def encoder_table(rows):
    """Rows of `compare_ways` as Markdown, the best first: by decisions, then by ADE."""
    header = [
        "encoder", "both right, %", "ADE, m", "tokens a picture", "parameters", "MFLOP vision",
        "MFLOP prefill", "ms", "ms among", "minADE, m", "relative, %", "the paper's"]
    lines = []

    def rank(name):
        return -np.mean(rows[name].get("both", -1)), np.mean(rows[name]["ade"])

    for name in sorted(rows, key=rank):
        row = rows[name]
        if "both" not in row:  # it has no eyes
            numbers = {"ADE, m": spread(row["ade"]), "minADE, m": spread(row["minade"])}
            lines.append([name, *(numbers.get(title, "-") for title in header[1:])])
            continue
        lines.append([
            name,
            spread(row["both"], 0, 100),
            spread(row["ade"]),
            f"{row['tokens']:.2f}",
            f"{row['parameters']:,}",
            f"{row['flops']['vision'] / 1e6:.1f}",
            f"{row['flops']['prefill'] / 1e6:.1f}",
            f"{row['ms']:.1f}",
            f"{row['ms_among']:.2f}",
            spread(row["minade"]),
            spread(row["relative"], 0, 100, "+"),
            row["paper"],
        ])
    return markdown(lines, header)


def full_size():
    """Parameters of the encoders behind the release's tower, beside the paper's, as text."""
    lines = []
    for vision, last, paper in (("triplane", "patchify", "6.3 M"), ("flex", "out", "61.6 M")):
        for width in (896, 4096):  # Qwen2.5-0.5B, the paper's, and the release
            with torch.device("meta"):  # takes no memory
                tower = VisionTower(replace(Config(), vision=vision, n_embd=width))
            (encoder,) = encoder_of(tower)
            projection = parameters_of([getattr(encoder, last)])
            rest = parameters_of([encoder]) - projection
            lines.append(
                f"    {vision:8} for a language model {width:4} wide: {rest / 1e6:4.1f} M, and "
                f"{projection / 1e6:5.1f} M for the projection to its tokens; "
                f"the paper says {paper}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Their picture


def newest(groups, scene, cfg):
    """Of values of the merge groups of a Scene (B, V): the newest pictures', (B, cameras, h, w)."""
    B, cameras, _, _, H, W = scene["images"].shape
    side = cfg.patch * cfg.merge
    return groups.view(B, cameras, -1, H // side, W // side)[:, :, -1].cpu()


def shares_that_keep(model, scene):
    """The smallest of SHARES_KEPT that keeps each group of the newest pictures, or 1."""
    *_, kept = model.look(scene, keep=1.0)  # (B, V)
    share = torch.ones(kept.shape, device=model.device)
    for keep in SHARES_KEPT:  # descending
        *_, kept = model.look(scene, keep=keep)
        share = share.scatter(1, kept, keep)
    return newest(share, scene, model.cfg)


def calls_of(module, model, scene):
    """What a module is given and returns while the model looks at a Scene: [(inputs, output)]."""
    calls = []
    hook = module.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output)))
    model.look(scene)
    hook.remove()
    return calls


def scene_token_attention(model, scene):
    """How much the scene tokens attend to each group of the newest pictures, in the last layer."""
    attn = model.vlm.model.visual.flex.blocks[-1].attn
    ((inputs, _),) = calls_of(attn, model, scene)
    q, k, _ = attn.heads(*inputs[:2])
    K = model.cfg.flex_tokens
    logits = q[:, :, :K] @ k.mT / q.shape[-1] ** 0.5
    attention = logits.softmax(-1).mean((1, 2))  # (B, K + groups)
    return newest(attention[:, K:], scene, model.cfg)


def plane_contrast(model, scene):
    """How far the newest planes are from their mean over the batch: three (B, rows, columns)."""
    contrasts = []
    for _, plane in calls_of(model.vlm.model.visual.triplane.norm3, model, scene):
        plane = plane.unflatten(0, (len(scene["images"]), -1))[:, -1]  # (B, rows, columns, C)
        contrasts.append((plane - plane.mean(0)).norm(dim=-1).cpu())
    return contrasts


LIGHT = {1.0: 0.06, 0.75: 0.25, 0.5: 0.45, 0.25: 0.7, 0.1: 1.0}  # of the share that keeps a group


@torch.no_grad()
def draw_seeing(file, args):
    """Draw what single image with pruning, Flex and triplanes look at: the first seed's models."""
    plt = draw.pyplot()
    folders = [folder_of(trainings_of(WAYS[i], args)[0], args) for i in (0, 1, 3)]
    for folder in folders:
        if not os.path.exists(folder):
            raise FileNotFoundError(
                f"{folder}: missing; run `vision` with these flags, without --picture, first")
    models = [load_model(folder, args.device) for folder in folders]
    single, triplane, flex = models
    first = world.SEEDS["val"]
    seed = world.find(args.situation, "val") if args.situation else first
    batch = [seed, *range(first, first + 31)]  # the picture is of the first
    scene = data.make_scenes(batch, **data.view_of(single.cfg, args.size))

    lit = shares_that_keep(single, scene)[0]
    lit.apply_(lambda share: LIGHT[round(share, 2)])
    attention = scene_token_attention(flex, scene)[0]
    rows = {
        "the newest pictures": torch.ones_like(lit),
        "pruning: keep 0.1 keeps what is fully lit, then, ever darker, 0.25, 0.5 and 0.75; what is "
        "black goes first": lit,
        f"Flex: the lit is what its {flex.cfg.flex_tokens} scene tokens attend to in the last "
        "layer (root of the mean attention)": 0.06 + 0.94 * (attention / attention.max()).sqrt(),
    }
    with plt.rc_context(draw.STYLE):
        figure = plt.figure(figsize=(16, 10.4), dpi=100)
        name = f"{scene['name'][0]}, held-out scene {seed - first} of the world"
        title = f"What each way of seeing looks at: {name}"
        truth = f"truth: {scene['reasoning'][0]}"
        figure.text(0.02, 0.965, title, size=17, weight="bold", color=draw.TRUTH)
        figure.text(0.02, 0.937, truth, size=12, color=draw.GREY)
        draw_lit(figure, draw.photos_of(scene), rows)
        draw_planes(figure, triplane, scene)
        draw.save_figure(figure, file)


def draw_lit(figure, photos, rows):
    """Photos in rows {title: light (cameras, h, w), 0 to 1}."""
    margins = dict(left=0.02, right=0.98, top=0.905, bottom=0.33, wspace=0.03, hspace=0.16)
    grid = figure.add_gridspec(len(rows), len(photos), **margins)
    for row, (title, light) in enumerate(rows.items()):
        for column, (camera, photo) in enumerate(photos.items()):
            ax = figure.add_subplot(grid[row, column], anchor="NW")
            of_camera = light[None, column, None]  # (1, 1, h, w)
            of_pixel = F.interpolate(of_camera, photo.image.shape[:2])[0, 0, :, :, None]
            image = photo.image / 255 * of_pixel.numpy()
            draw.draw_photo(ax, camera, draw.Photo(image, None, None), [])
            if column == 0:
                ax.set_title(title, pad=3)


def draw_planes(figure, model, scene):
    """The planes of a triplane model, dark where the first scene differs from the batch's mean."""
    centres = model.vlm.model.visual.triplane.centres().numpy()  # (X, Y, Z, 3) m
    x = centres[:, 0, 0, 0]
    y = centres[0, :, 0, 1]
    z = centres[0, 0, :, 2]
    planes = {
        "triplane from above: x ahead, y left, m; dark: unlike its mean over 32 scenes": (x, y),
        "from the side: x, z": (x, z),
        "from the front: y, z": (y, z),
    }
    margins = dict(left=0.045, right=0.98, top=0.28, bottom=0.04, wspace=0.12)
    axes = figure.add_gridspec(1, 3, width_ratios=(2, 1, 1), **margins).subplots()
    for ax, title, contrast in zip(axes, planes, plane_contrast(model, scene)):
        ax.pcolormesh(*planes[title], contrast[0].T.numpy(), cmap="Oranges", shading="nearest")
        ax.set_title(title)
    path = scene["ego_future_xyz"][0]
    axes[0].plot(path[:, 0], path[:, 1], color=draw.TRUTH, linewidth=1.5)
    axes[2].invert_xaxis()  # looking ahead, left is left


def add_training_flags(add):
    add("--train-steps", type=whole(1), default=200, help="optimiser steps of each training")
    add("--scenes", type=COUNT, default=8000, help="scenes to train with")
    add("--eval", type=COUNT, default=256, help="held-out scenes to evaluate on")
    add("--from-nothing", action="store_true", help="train whole models, not the shipped one on")


def add_flags(add):
    add_training_flags(add)
    add("--parameters", action="store_true", help="count the encoders at full size, and stop")
    add("--picture", metavar="PNG", type=draw.picture,
        help="draw what the trained encoders look at, and stop")
    add("--situation", help="with --picture: the first held-out scene of that kind")


def aside(args):
    """Whether another thing than the table was asked for; then it is done."""
    if args.parameters:
        print(full_size())
    elif args.picture:
        draw_seeing(args.picture, args)
        print(f"picture    {args.picture}")
    return bool(args.parameters or args.picture)


def measure(args):
    """{row: numbers}, see `compare_ways`; what is missing is trained first."""
    return compare_ways(WAYS, args)


def text(rows, settings):
    """The table, and the encoders at full size."""
    return f"{encoder_table(rows)}\n\n{note_of(settings)}\n\nAt full size:\n\n{full_size()}"


def note_of(settings):
    begun = "from nothing" if settings["from_nothing"] else "on from the shipped nano"
    options = SAMPLING | settings | {"pictures": PICTURES, "repeats": REPEATS, "begun": begun}
    return ENCODER_NOTE.format(**options)
