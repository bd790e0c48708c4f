"""
Four ways to see, compared: a table that anyone can rerun, and a picture of what each looks at.

    python encoders.py                             train what is missing, evaluate, print a table; goes on after a kill
    python encoders.py --jobs 2 --seeds 0 1 2      two trainings at a time, three of each row
    python encoders.py --picture out/seeing.png    draw what the trained ones look at
    python encoders.py --parameters                count the encoders at full size; trains nothing

Single image, triplanes, Flex and token pruning are in alpamayo.py: `vision` and `keep` of its Config. Here a nano learns
with each, from nothing, in the built-in world; beside it stand the figures of the paper's Table 12, which has none for
pruning.

The page reads: the rows and their training, the numbers, the table, the picture, the command line.
"""
import argparse
import json
import os
import subprocess
import sys
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
from alpamayo import PRESETS, Config, VisionTower
from sample import CAMERAS, PAST, STYLE, TRUTH, load_model, measure, world_scene, world_view

# ----------------------------------------------------------------------------------------------------------------------
# The rows and their training


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
NOTE = """\
minADE: best of {n} samples, mean over {scenes} held-out scenes of our world; both right: % of first samples that decide
right. relative: minADE against single image of the same seed; seeds: {seeds}, of which what is trained with pruning has the
first; ± their standard deviation. Every model learned from nothing for {steps} steps of 32 scenes. Tokens: visual tokens of
the language model for each of {pictures} pictures; a picture is two successive frames of a camera. Parameters: of what
turns the tower's patches into tokens; triplane and Flex need no mergers, which are single image's. FLOP: matrix products of
one scene. ms: vision + prefill on this machine with {threads} thread(s), median of {repeats} rounds over all rows, a scene
by itself and a scene among {batch}. The paper's: Table 12, tokens an image and relative minADE, of real traffic, a 0.5B
model and 160 tokens an image: to be compared with ours by its order alone."""


def load_scenes(split, count, args):
    """Scenes of the world as every row is shown them."""
    view = world_view(PRESETS["nano"], args)
    return data.load("world", split=split, scenes=count, folder=args.cache, workers=os.cpu_count(), **view)


def train_missing(args):
    """Train what is missing of every row and seed, or go on where it stopped, --jobs at a time. Returns the checkpoints,
    {row: [folder of each seed]}."""
    for split, count in (("train", args.scenes), ("val", 32)):  # once, before several processes would
        load_scenes(split, count, args)
    wanted = {"steps": args.train_steps, "scenes": args.scenes, "size": list(args.size), "world": world.WORLD_VERSION}
    script = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")]
    rows, runs = {}, {}
    for way in WAYS:
        seeds = args.seeds[: 1 if "keep" in way.train else None]
        rows[way.name] = [os.path.join(args.out, f"{way.folder}-{seed}") for seed in seeds]
        runs |= {folder: [*way.train.split(), "--seed", str(seed)] for folder, seed in zip(rows[way.name], seeds)}

    def run(folder):
        saved, command = os.path.join(folder, "training.safetensors"), [*script, "--resume", folder]
        if os.path.exists(saved):
            with safe_open(saved, "pt") as f:
                step, flags = int(f.metadata()["step"]), json.loads(f.metadata()["flags"])
                flags["world"] = int(f.metadata().get("world", 2))  # the last version that runs did not record
            for key, value in wanted.items():
                if flags[key] != value:
                    raise ValueError(f"{folder}: was trained with {key} {flags[key]}, not {value}; choose another folder")
            if step == args.train_steps:
                return
        else:
            settings = f"--steps {args.train_steps} --scenes {args.scenes} --threads 1 --save-every 100"
            settings += " --val-scenes 32 --val-every 100000 --size {} {}".format(*args.size)
            command = [*script, *settings.split(), "--cache", args.cache, "--out", folder, *runs[folder]]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise ValueError(f"{folder}: {(done.stderr.strip().splitlines() or ['train.py was killed'])[-1]}")

    with ThreadPoolExecutor(args.jobs) as pool:
        list(tqdm(pool.map(run, runs), total=len(runs), desc="training", unit="run"))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# The numbers


@torch.no_grad()
def flops(model, scene):
    """FLOPs of a scene's matrix products: {vision, prefill}."""
    vision, prefill = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH):  # a CPU's fused attention is not counted
        with vision:
            prompt = model.embed_prompt(scene, reason=False)
        with prefill:
            model.prefill(prompt)
    return {"vision": vision.get_total_flops(), "prefill": prefill.get_total_flops()}


def encoder_of(tower):
    """What turns the tower's patches into the language model's tokens: a list of modules."""
    return [getattr(tower, k) for k in ("triplane", "flex", "merger", "deepstack_merger_list") if hasattr(tower, k)]


def compare(args):
    """The table's numbers, {row: {name: number, or a list of one for each seed}}, and how many pictures a scene has."""
    checkpoints = train_missing(args)
    count, firsts, rows = args.eval, {}, {}
    scenes = load_scenes("val", count, args)
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
        places = model.embed_prompt(one, reason=False).image_at  # (1, V)
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


# ----------------------------------------------------------------------------------------------------------------------
# The table


def table(rows):
    """Rows of `compare` as Markdown."""

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
        return [(plane - plane.mean(0)).norm(dim=-1).cpu() for plane in planes]
    if cfg.vision == "flex":
        remember = lambda attn, inputs: caught.append(attn.heads(*inputs[:2]))
        hook = tower.flex.blocks[-1].attn.register_forward_pre_hook(remember)
        model.look(scene)
        hook.remove()
        (q, k, _), K = caught[0], cfg.flex_tokens
        return by_group((q[:, :, :K] @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean((1, 2))[:, K:].cpu())
    share = 1.0
    for keep in (1.0, *SHARES_KEPT):  # descending
        kept = model.look(scene, keep).kept.cpu()
        share = torch.ones(kept.shape) if keep == 1 else share.scatter(1, kept, keep)
    return by_group(share)


def draw(file, args):
    """What single image under pruning, Flex and triplanes look at in one scene: those trained with the first seed."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("the picture needs one more package: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    single, triplane, flex = (load_model(f"{args.out}/{WAYS[i].folder}-{args.seeds[0]}") for i in (0, 1, 3))
    scene, views = world_scene(single.cfg, args)
    others = load_scenes("val", 32, args).batch(range(31))
    batch = {k: torch.cat([scene[k], others[k]]) for k in scene if torch.is_tensor(scene[k])}
    share, attention, planes = looked_at(single, scene)[0], looked_at(flex, scene)[0], looked_at(triplane, batch)
    K, light = flex.cfg.flex_tokens, {0.1: 1, 0.25: 0.7, 0.5: 0.45, 0.75: 0.25, 1: 0.06}
    rows = {
        "the newest pictures": torch.ones_like(attention),
        "pruning: keep 0.1 keeps what is fully lit, then, ever darker, 0.25, 0.5 and 0.75; what is black goes first":
            share.clone().apply_(lambda s: light[round(s, 2)]),
        f"Flex: the lit is what its {K} scene tokens attend to in the last layer (root of the mean attention)":
            0.06 + 0.94 * (attention / attention.max()).sqrt(),
    }  # fmt: skip

    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(16, 10.4), dpi=100)
        title = f"What each way of seeing looks at: {scene['name'][0]}"
        figure.text(0.02, 0.965, title, size=17, weight="bold", color=TRUTH)
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


def parse_flags():
    p = argparse.ArgumentParser(description="Train every way to see and compare them.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    add = p.add_argument
    add("--out", metavar="FOLDER", default="out/encoders", help="the models: what is missing is trained, the rest read")
    add("--train-steps", type=int, default=400, help="optimiser steps of each training")
    add("--scenes", type=int, default=8000, help="scenes to train with")
    add("--seeds", type=int, nargs="+", default=[0], help="trainings of each row")
    add("--jobs", type=int, default=1, help="trainings at a time, a thread each")
    add("--size", type=int, nargs=2, default=(64, 128), metavar=("H", "W"), help="pixels of the world's images")
    add("--cache", metavar="FOLDER", default="data", help="where rendered scenes are kept")
    add("--eval", type=int, default=256, metavar="N", help="held-out scenes to evaluate on")
    add("--batch", type=int, default=32, help="of these at a time")
    add("--n", type=int, default=6, help="samples of a scene, each with its own reasoning")
    add("--steps", type=int, default=10, help="Euler steps of the flow from noise to controls")
    add("--repeats", type=int, default=20, help="rounds of timing")
    add("--parameters", action="store_true", help="print the encoders' parameters at full size, and stop")
    add("--picture", metavar="PNG", help="draw what the trained encoders look at, and stop")
    add("--situation", metavar="NAME", help="with --picture: the first held-out scene of that kind")
    p.set_defaults(temperature=0.6, top_p=0.98, reason=True, split="val", seed=0)  # sample.py's
    return p.parse_args()


def main():
    args = parse_flags()
    for flag in ("train_steps", "scenes", "jobs", "eval", "batch", "n", "steps", "repeats"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected 1 or more")
    if args.parameters:
        print(full_size())
    elif args.picture:
        draw(args.picture, args)
        print(f"picture    {args.picture}")
    else:
        rows, pictures = compare(args)
        note = dict(n=args.n, scenes=args.eval, steps=args.train_steps, seeds=" ".join(map(str, args.seeds)),
                    pictures=pictures, threads=torch.get_num_threads(), repeats=args.repeats,
                    batch=min(args.batch, args.eval))  # fmt: skip
        print(table(rows) + "\n\n" + NOTE.format(**note) + "\n\nParameters at full size:\n" + full_size())
        print(json.dumps({**note, "rows": rows}))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"encoders.py: {error}")
