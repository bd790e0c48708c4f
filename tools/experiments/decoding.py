"""
Table 11: the path by action tokens or by the flow in so many steps; and what more samples buy.

    python -m tools.experiments decoding
    python -m tools.experiments decoding --checkpoint out/nano --drive 64

The paper's own tokens are six of a learned tokenizer a path. Here they are the release's 128, two
numbers for each of the 64 poses.
"""
from functools import partial
from statistics import median

import torch
from tqdm import tqdm

import data
import rl
import runs
import world
from alpamayo import HORIZON, NANO, ade, load_model
from doors import whole
from motion import comfort
from tools import markdown
from tools.common import COUNT, batches, drive_scenes
from tools.experiments.trainings import Training, folder_of, measured

ABOUT = "Table 11: the path by tokens or by flow, steps, samples"
NEEDS = "not timed yet"
FIRST = 60_000  # of a split, the first scene to measure on
ROWS = {"128 tokens": ("tokens", 1)}  # what drives, and the flow's Euler steps
ROWS |= {f"flow, {steps} steps": ("flow", steps) for steps in (10, 5, 2)}
ROWS["flow, 1 step"] = "flow", 1
COUNTS = 1, 2, 6, 16  # samples
HEATS = 0.3, 0.6, 1.0, 1.5  # temperatures of what is said
NOTE = """\
{eval} scenes and {drive} scenarios of {split}; ADE and comfort of the likeliest plan; milliseconds
of one scene a plan, median of {plans}."""
PAPER = """\
| the paper's Table 11 | minADE6, m | comfort, % | speed |
| --- | ---: | ---: | ---: |
| auto-regressive, 6 tokens | 0.68 | 44 | 1.00 |
| flow matching, 5 steps | 0.64 | 97 | 1.16 |"""


def add_flags(add):
    add("--checkpoint", metavar="FOLDER", default=NANO, help="whose plans")
    add("--split", choices=data.SPLITS, default="val", help="of the scenes")
    add("--eval", type=COUNT, default=256, help="scenes to plan for")
    add("--drive", type=COUNT, default=64, help="scenarios to drive, 20 s each")
    add("--plans", type=whole(1), default=30, help="of which the median time is shown")


def plan_and_drive(model, scenes, decode, steps, args):
    """Means of a row's plans and drives."""
    options = dict(steps=steps, decode=decode)
    parts = []
    for first, scene in batches(scenes):
        one = rl.likeliest_of(model, scene, **options)
        many = model.sample(scene, 6, seed=first, **options)
        truth = scene["ego_future_xyz"]
        held = comfort(one.xyz[:, 0].cpu().double(), one.rot[:, 0].cpu().double())
        parts.append({
            "ade": ade(one.xyz[:, 0].cpu(), truth),
            "minade": ade(many.xyz.cpu(), truth[:, None]).amin(1),
            "accel": held["accel"].float(),
            "comfort": torch.stack(list(held.values())).all(0).float(),
        })
    found = data.joined(parts)
    first = world.SEEDS[args.split] + FIRST

    def drive(scene):
        return rl.likeliest_of(model, scene, **options).actions[:, 0]

    view = data.view_of(model.cfg, args.size)
    met = drive_scenes(drive, range(first, first + args.drive), seconds=20.0, **view)
    found |= {f"drive {name}": value.float() for name, value in met.items()}
    return {name: value.mean().item() for name, value in found.items()}


def milliseconds(model, scene, decode, steps, plans):
    """Median time of a plan's path, and of all of the plan, for one scene and one sample."""
    laps = []
    for _ in range(plans + 1):
        out = model.sample(scene, 1, steps=steps, decode=decode, seed=0)
        lap = dict(out.seconds)
        if decode == "tokens":  # they are said behind the reasoning, in one go
            lap["path"] = lap["reasoning"] * 2 * HORIZON / out.tokens.shape[2]
        laps.append((lap.get("path", lap["flow"]), sum(out.seconds.values())))
    return [1000 * median(times) for times in zip(*laps[1:])]


def best_of(model, scenes):
    """{temperature: minADE of so many samples, m}."""
    found = {}
    for heat in HEATS:
        parts = []
        for first, scene in batches(scenes):
            out = model.sample(scene, max(COUNTS), temperature=heat, seed=first)
            errors = ade(out.xyz.cpu(), scene["ego_future_xyz"][:, None])  # (B, 16)
            parts.append({count: errors[:, :count].amin(1) for count in COUNTS})
        joined = {count: torch.cat([part[count] for part in parts]) for count in COUNTS}
        found[heat] = {count: value.mean().item() for count, value in joined.items()}
    return found


def measure(args):
    """{row: numbers}; the last is "samples": {temperature: {count: minADE}}. Each is found once,
    but for the times."""
    model = load_model(args.checkpoint, args.device)
    view = data.view_of(model.cfg, args.size)
    scenes = data.load_world(args.split, args.eval, FIRST, args.cache, **view)
    kept = folder_of(Training(f"--init {args.checkpoint}"), args)
    settings = dict(split=args.split, eval=args.eval, drive=args.drive, code=runs.sources())
    rows = {}
    for row, how in tqdm(ROWS.items(), desc="decoding", unit="row"):
        work = partial(plan_and_drive, model, scenes, *how, args)
        rows[row] = dict(measured(kept, settings | {"row": row}, work))
        rows[row]["ms"], rows[row]["ms of all"] = milliseconds(
            model, scenes.batch([0]), *how, args.plans)
    samples = partial(best_of, model, scenes)
    return rows | {"samples": measured(kept, settings | {"row": "samples"}, samples)}


def text(rows, settings):
    """Two tables: ways to decode, and what samples and temperature buy."""
    lines = []
    for row, found in rows.items():
        if row == "samples":
            continue
        lines.append([
            row, f"{found['ade']:.2f}", f"{found['minade']:.2f}", f"{100 * found['accel']:.0f}",
            f"{100 * found['comfort']:.0f}", f"{found['drive score']:.2f}",
            f"{100 * found['drive close']:.0f}", f"{found['ms']:.1f}", f"{found['ms of all']:.0f}",
        ])  # fmt: skip
    ways = markdown(lines, ["path", "ADE, m", "minADE6, m", "comfort: accel, %", "all six, %",
                            "score", "close encounters, %", "ms of the path", "of the plan"])
    lines = []
    for heat, found in rows["samples"].items():
        lines.append([heat, *(f"{value:.2f}" for value in found.values())])
    samples = markdown(lines, ["temperature", *(f"minADE of {count}, m" for count in COUNTS)])
    return f"{ways}\n\n{samples}\n\n{NOTE.format(**settings)}"
