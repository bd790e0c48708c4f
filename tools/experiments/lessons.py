"""
Ten changes of one line, and what becomes of the model: docs/lessons.md.

    python -m tools.experiments lessons --jobs 2
    python -m tools.experiments lessons --picture assets/lessons.png    the plans of all of them

Each lesson copies the project, changes its line in the copy, and there measures the shipped nano,
or trains first. What is unchanged is measured likewise, so that a row has two columns.
"""
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
import doors
import draw
import runs
import world
from alpamayo import NANO, load_model
from tools import markdown
from tools.common import COUNT
from tools.experiments import measures
from tools.experiments.measures import shown
from tools.experiments.trainings import ROOT, measured

ABOUT = "ten changes of one line"
NEEDS = "an hour and a half of a busy core"
COPIED = ("*.py", "kernels/*", "world/*.py", "tools/**/*.py", "checkpoints/nano/**/*")
SHOWN = 60_003  # of val: the scene whose plans the picture shows

ON = "--stage reason --init checkpoints/nano --steps 60"
NEW = "--stage action --steps 150 --scenes 2000"
RL = "--stage rl --steps 15 --val-scenes 64"


class Lesson(NamedTuple):
    """A line of a file, what it becomes, and what is trained before it is measured."""

    file: str
    line: str
    becomes: str
    train: str = ""  # flags of train.py; nothing: the shipped nano is measured
    look: str = ""  # at which number of the training's last step


MODEL = "alpamayo.py"
LESSONS = {
    "no DeepStack": Lesson(
        MODEL, "            if i < len(deep):", "            if False:"),
    "no DeepStack, 60 steps later": Lesson(
        MODEL, "            if i < len(deep):", "            if False:", ON),
    "no rotation in the tower": Lesson(
        MODEL, "        if layout:", "        if False:"),
    "no rotation, 60 steps later": Lesson(
        MODEL, "        if layout:", "        if False:", ON),
    "one Euler step": Lesson(
        MODEL, "self.drive(prefix, thought, steps, noise, eta, generator)",
        "self.drive(prefix, thought, 1, noise, eta, generator)"),
    "a tenth of the image tokens": Lesson(
        MODEL, "cfg.keep if keep is None else keep)", "0.1)"),
    "the expert reads padding": Lesson(
        MODEL, "        mask = (at < length[:, None]) | (at >= T)",
        "        mask = at.expand(len(length), -1) >= 0"),
    "no stop-gradient": Lesson(
        MODEL, "        if insulate:", "        if False:", NEW, "val action"),
    "flow times drawn evenly": Lesson(
        MODEL, "(1 - u ** (1 / 1.5))", "(1 - u)", NEW),
    "all accelerations first": Lesson(
        MODEL, "            ids = (bins + vocab.first_action).flatten(1)",
        "            ids = (bins + vocab.first_action).mT.flatten(1)", NEW, "val action"),
    "greedy rollouts": Lesson(
        "rl.py", "top_p=flags.top_p, steps=1", "top_p=1e-9, steps=1", RL, "one_text"),
    "a reward upside down": Lesson(
        "rl.py", '    "trajectory": (1.0,', '    "trajectory": (-1.0,', RL,
        "val tail trajectory"),
}  # fmt: skip


def add_flags(add):
    add("--eval", type=COUNT, default=128, help="scenes of val to plan for")
    add("--of", metavar="FOLDER", help="print the numbers of one checkpoint as JSON, and stop")
    add("--picture", metavar="PNG", type=draw.picture,
        help="draw what was measured, and stop")


# --------------------------------------------------------------------------------------------------
# In a copy with a changed line


def copy_of_project(folder, lesson=None):
    """Copy what runs into a folder, with the lesson's line changed. ValueError where it is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    files = {file for pattern in COPIED for file in ROOT.glob(pattern) if file.is_file()}
    for file in sorted(files):
        to = Path(folder, file.relative_to(ROOT))
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, to)
    if lesson:
        file = Path(folder, lesson.file)
        file.write_text(changed(file.read_text("utf-8"), lesson), "utf-8")


def unchanged(lesson):
    """What is trained beside a lesson: the same for all with these flags."""
    return Lesson(MODEL, "", "", lesson.train)


def changed(text, lesson):
    """A file's text with the lesson's line changed."""
    if text.count(lesson.line) != 1:
        raise ValueError(f"{lesson.file}: expected once: {lesson.line.strip()}")
    return text.replace(lesson.line, lesson.becomes)


def learn(folder, lesson, args, change):
    """Numbers of what a copy's model does, trained there first if the lesson says so."""
    copy_of_project(folder, lesson if change else None)
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(*words):
        words = [sys.executable, *words, "--cache", os.path.abspath(args.cache)]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=env)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            raise ValueError(f"{folder}: {' '.join(last)}")
        return done.stdout

    checkpoint = NANO
    log = []
    if lesson.train:
        checkpoint = os.path.abspath(f"{folder}/out/run")
        words = [*lesson.train.split(), "--threads", "1", "--val-every", "1000"]
        run("train.py", *words, "--out", checkpoint, "--overwrite")
        log = [dict(line) for line in doors.read_json_lines(f"{checkpoint}/log.jsonl")]
    size = map(str, args.size)
    numbers = run("-m", "tools.experiments", "lessons", "--of", checkpoint, "--size", *size,
                  "--eval", str(args.eval))
    found = json.loads(numbers.splitlines()[-1])
    if log:
        found["log"] = {key: value for key, value in log[-1].items() if key != "val"}
        found["log"] |= {f"val {key}": value for key, value in log[-1]["val"].items()}
    return found


def numbers_of(folder, args):
    """What is measured of a checkpoint by the code as it is here: plans, and the paths (6, 64, 2)
    in the scene of the picture."""
    model = load_model(folder, args.device)
    speaks = model.cfg.reasoning == "on"
    found = measures.plans(model, "val", args, reason=speaks)
    scene = scene_shown(model.cfg, args)
    out = model.sample(scene, 6, seed=0, reason=speaks)
    found["paths"] = [[[round(v, 2) for v in xy] for xy in path[:, :2].tolist()]
                      for path in out.xyz[0].cpu()]
    return found


def scene_shown(cfg, args):
    return data.make_scenes([world.SEEDS["val"] + SHOWN], **data.view_of(cfg, args.size))


# --------------------------------------------------------------------------------------------------
# The table and the picture


def aside(args):
    """Whether another thing than the table was asked for; then it is done."""
    if args.of:
        torch.set_num_threads(1)
        print(json.dumps(numbers_of(args.of, args)))
    elif args.picture:
        draw_lessons(args.picture, with_paths(args), args)
        print(f"picture    {args.picture}")
    return bool(args.of or args.picture)


def measure(args):
    """{lesson: {"as it is": numbers, "changed": numbers}}."""
    rows = with_paths(args)
    for pair in rows.values():
        for way, found in pair.items():
            pair[way] = {name: value for name, value in found.items() if name != "paths"}
    return rows


def with_paths(args):
    """The same, each found once, and in it the paths of the picture."""
    jobs = []
    for lesson in LESSONS.values():
        jobs += [(lesson, True), (unchanged(lesson), False)]
    jobs = list(dict.fromkeys(jobs))  # what is not changed is the same for several

    def work(job):
        lesson, change = job
        name = runs.short_hash([repr(job).encode()])
        folder = f"{args.out}/lessons/{name}"
        settings = dict(eval=args.eval, code=runs.sources())
        return measured(f"{folder}.found", settings, partial(learn, folder, lesson, args, change))

    with ThreadPoolExecutor(args.jobs) as pool:
        found = dict(zip(jobs, tqdm(pool.map(work, jobs), total=len(jobs), unit="run")))
    rows = {}
    for name, lesson in LESSONS.items():
        rows[name] = {
            "as it is": found[unchanged(lesson), False],
            "changed": found[lesson, True],
        }
    return rows


WAYS = "as it is", "changed"
COLUMNS = {  # title: name, digits, scale
    "ADE, m": ("ade", 2, 1),
    "minADE6, m": ("minade", 2, 1),
    "both right, %": ("both", 0, 100),
}
NOTE = """\
{eval} scenes of val, ± standard error; in each cell as it is, then changed. ADE, both right: of the
likeliest plan."""


def text(rows, settings):
    """A row for each lesson: as it is -> changed."""
    lines = []
    for name, pair in rows.items():
        cells = []
        for column in COLUMNS.values():
            cells.append(" -> ".join(shown(pair[way], *column) for way in WAYS))
        look = LESSONS[name].look
        logged = [f"{pair[way]['log'][look]:.2f}" for way in WAYS] if look else []
        cells.append(f"`{look}` {' -> '.join(logged)}" if look else "-")
        lines.append([name, LESSONS[name].train or "as shipped", *cells])
    table = markdown(lines, ["changed", "trained by", *COLUMNS, "its log"], left=2)
    return f"{table}\n\n{NOTE.format(**settings)}"


def draw_lessons(file, rows, args):
    """Six plans of one scene, as it is and changed, a panel for each lesson."""
    plt = draw.pyplot()
    scene = scene_shown(load_model(NANO, args.device).cfg, args)
    x, y, _ = scene["ego_future_xyz"][0].T
    with plt.rc_context(draw.STYLE):
        figure, axes = plt.subplots(3, 4, figsize=(16, 9), dpi=80, layout="constrained")
        for ax, (name, pair) in zip(axes.flat, rows.items()):
            for way, colour in (("as it is", draw.GREY), ("changed", "tab:red")):
                for path in pair[way]["paths"]:
                    ax.plot(*zip(*path), color=colour, linewidth=1, alpha=0.7)
            ax.plot(x, y, color=draw.TRUTH, linewidth=2, linestyle=":")
            ax.set_title(name)
            ax.set_aspect("equal", adjustable="datalim")
        title = f"{scene['reasoning'][0]}  Dotted: driven; grey: as it is; red: changed."
        figure.suptitle(title)
        draw.save_figure(figure, file)
