"""
Table 9, and stage rl's own choices: what each reward, objective and flag makes of the shipped nano.

    python -m tools.experiments rl --jobs 2 --seeds 0 1 2
    python -m tools.experiments rl --rows "before" "nft" "by steps"    some of its rows

Each row is trained by `train.py --stage rl` with its flags. It is measured on scenes that no
training, no validation and no choice of a setting has seen: the likeliest rollout of --eval scenes
a split, and --drive scenarios of 20 s in closed loop.
"""
import argparse
from functools import partial

import torch

import data
import rl
import runs
import world
from alpamayo import NANO, load_model
from doors import whole
from tools import markdown
from tools.common import COUNT, drive_scenes
from tools.experiments.trainings import Training, folder_of, measured, spread, train

ABOUT = "Table 9: what each reward adds, and stage rl's other choices"
NEEDS = "12 to 25 minutes of a core for a training of 60 steps, 6 to measure it"
FIRST = 50_000  # of a split, the first scene to measure on
ROWS = {  # flags beside the usual ones
    "before": None,
    "by steps": "--objective clip",
    "nft": "--objective nft",
    "told": "--objective nft --tell",
    "rehearsed": "--objective nft --rehearse 2",
    "expert teaches": "--objective nft --expert-teaches 0",
    "told, rehearsed": "--objective nft --tell --rehearse 0.3",
    "all three": "--objective nft --tell --rehearse 0.3 --expert-teaches 0",
    "one reward for both": "--objective nft --credit total",
    "+ reasoning": "--rewards reason",
    "+ consistency": "--rewards reason consistency",
    "+ trajectory": "--rewards reason consistency trajectory",
    "Eq. 10": "--objective paper",
    "tokens": "--policy tokens --train vlm",
    "at random": "--curate 0",
    "expert alone": "--objective nft --train expert",
    "thought alone": "--objective nft --train vlm",
    "episodes": "--objective nft --episode 4 --batch 2 --group 8",
}
BY_SITUATION = {"right": ("both right, %", 0, 100), "drive score": ("score", 2, 1)}
NOTE = """\
{train_steps} steps; the likeliest rollout of {eval} scenes a split, {drive} scenarios of 20 s;
seeds: {seeds}; ± their standard deviation."""
PAPER = """\
| the paper's Table 9 | ADE | reasoning | consistency | close encounters, % |
| --- | ---: | ---: | ---: | ---: |
| SFT | 2.12 | 3.1 | 0.62 | 6.9 |
| + reasoning | 2.19 | 4.5 | 0.53 | 5.8 |
| + consistency | 1.92 | 4.5 | 0.85 | 6.2 |
| + trajectory | 1.94 | 4.4 | 0.83 | 3.7 |"""


def add_flags(add):
    add("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), metavar="ROW",
        help="of the table: " + ", ".join(ROWS))
    add("--train-steps", type=whole(1), default=60, help="optimiser steps of each training")
    add("--eval", type=COUNT, default=128, help="scenes a split to plan for")
    add("--drive", type=COUNT, default=64, help="scenarios a split to drive")
    add("--splits", nargs="+", choices=data.SPLITS, default=["tail", "rare", "val"])


def trainings_of(row, args):
    """A row's, one a seed; of the shipped nano itself, none."""
    if ROWS[row] is None:
        return []
    flags = f"--stage rl --init {NANO} --steps {args.train_steps} {ROWS[row]}".strip()
    return [Training(flags, seed) for seed in args.seeds]


def of_checkpoint(folder, policy, args):
    """{split: numbers} of a checkpoint, each found once. policy: what drives, flow or tokens."""
    kept = folder
    if folder == NANO:  # nothing is written beside what is shipped
        kept = folder_of(Training(f"--init {NANO}"), args)
    found = {}
    for split in args.splits:
        settings = {"split": split, "eval": args.eval, "drive": args.drive, "code": runs.sources()}
        work = partial(think_and_drive, folder, policy, split, args)
        found[split] = measured(kept, settings, work)
    return found


def think_and_drive(folder, policy, split, args):
    """Means of a checkpoint's likeliest rollouts of scenes of a split, and of its drives; decisions
    and score also by situation."""
    model = load_model(folder, args.device)
    flags = flags_of_rl()
    flags.policy = policy
    view = data.view_of(model.cfg, args.size)
    scenes = data.load_world(split, max(args.eval, args.drive), FIRST, args.cache, **view)
    found = rl.likeliest(model, scenes, range(args.eval), flags)

    def drive(scene):
        options = dict(length=flags.max_new_tokens, decode=policy)
        return rl.likeliest_of(model, scene, flags.flow_steps, **options).actions[:, 0]

    first = world.SEEDS[split] + FIRST
    met = drive_scenes(drive, range(first, first + args.drive), seconds=20.0, **view)
    found |= {f"drive {name}": value.float() for name, value in met.items()}
    means = {name: value.mean().item() for name, value in found.items()}
    for situation in sorted(set(scenes.names)):
        there = torch.tensor([name == situation for name in scenes.names])
        for name in BY_SITUATION:
            some = found[name][there[: len(found[name])]]
            if len(some):
                means[f"{name}: {situation}"] = some.mean().item()
    return means


def flags_of_rl():
    """Stage rl's own flags, as they are where none is given."""
    parser = argparse.ArgumentParser()
    rl.add_flags(lambda name, default, help, *_, **__: parser.add_argument(name, default=default))
    flags = parser.parse_args([])
    rl.fill_in(flags)
    return flags


COLUMNS = {  # of a split: title, name, digits, scale
    "both right, %": ("right", 0, 100),
    "reasoning, 0 to 5": ("reason", 2, 1),
    "consistency": ("consistency", 2, 1),
    "ADE, m": ("ade", 2, 1),
    "score": ("drive score", 2, 1),
    "close encounters, %": ("drive close", 0, 100),
    "off the road, %": ("drive off_road", 0, 100),
    "progress, %": ("drive progress", 0, 100),
}


def table_of(rows, split):
    """Rows {name: [numbers of each checkpoint, by split]} as Markdown."""
    lines = []
    for row, seeds in rows.items():
        cells = [row]
        for name, digits, scale in COLUMNS.values():
            cells.append(spread([found[split][name] for found in seeds], digits, scale))
        lines.append(cells)
    return markdown(lines, [split, *COLUMNS])


def table_by_situation(rows, split, name):
    """The same by situation: of decisions or score, a column for each row."""
    title, digits, scale = BY_SITUATION[name]
    every = [found[split] for seeds in rows.values() for found in seeds]
    keys = sorted({key for found in every for key in found if key.startswith(f"{name}: ")})
    lines = []
    for key in keys:
        cells = [key.removeprefix(f"{name}: ")]
        for seeds in rows.values():
            cells.append(spread([found[split][key] for found in seeds], digits, scale))
        lines.append(cells)
    return markdown(lines, [f"{split}, {title}", *rows])


def measure(args):
    """{row: [{split: numbers} of each seed]}; what is missing is trained first."""
    train([one for row in args.rows for one in trainings_of(row, args)], args)
    rows = {}
    for row in args.rows:
        trained = [folder_of(one, args) for one in trainings_of(row, args)]
        policy = "tokens" if "--policy tokens" in (ROWS[row] or "") else "flow"
        rows[row] = [of_checkpoint(folder, policy, args) for folder in trained or [NANO]]
    return rows


def text(rows, settings):
    """A table for each split, and two of its situations."""
    tables = []
    for split in settings["splits"]:
        tables.append(table_of(rows, split))
        tables += [table_by_situation(rows, split, name) for name in BY_SITUATION]
    return "\n\n".join([*tables, NOTE.format(**settings)])
