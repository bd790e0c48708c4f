"""
Figures 12 and 13: wider models at equal steps, and more scenes at equal steps.

    python -m tools.experiments size --jobs 2
    python -m tools.experiments data --jobs 2

Each row is a nano from nothing. `data` is measured twice: at its last step, and at the step whose
validation was best (early stopping), on other scenes than those of the validation.
"""
from functools import partial

import numpy as np

from alpamayo import load_model
from doors import whole
from tools import markdown
from tools.experiments import measures
from tools.experiments.measures import shown
from tools.experiments.trainings import Training, measured_rows

COLUMNS = {  # title: name, digits, scale
    "ADE, m": ("ade", 2, 1),
    "minADE6, m": ("minade", 2, 1),
    "both right, %": ("both", 0, 100),
}


class Scaling:
    """An experiment: rows {title: flags of train.py}, and what is changed along them."""

    def __init__(self, about, needs, rows, along, early, paper):
        self.ABOUT = about
        self.NEEDS = needs
        self.ROWS = rows
        self.PAPER = paper
        self.along = along  # the name of what a row has more of
        self.early = early  # whether the checkpoint of the best validation is measured, too

    def add_flags(self, add):
        measures.add_flags(add)
        add("--train-steps", type=whole(1), default=400, help="optimiser steps of each training")

    def training_of(self, row, seed, args):
        steps = args.train_steps
        each = max(1, steps // 8)
        flags = f"--steps {steps} --val-every {each} --best {self.ROWS[row]}"
        return Training(flags, seed)

    def measure(self, args):
        """{row: [numbers of each seed]}; what is missing is trained first."""
        rows = {row: [self.training_of(row, seed, args) for seed in args.seeds]
                for row in self.ROWS}
        return measured_rows(rows, args, partial(self.numbers_of, args), eval=args.eval)

    def numbers_of(self, args, row, folder):
        """Numbers of plans of a training's last checkpoint and, if it is to be measured, of that of
        its best validation."""
        model = load_model(folder, args.device)
        found = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "scenes": int(self.training_of(row, 0, args).option("--scenes")),
            "last": measures.plans(model, "val", args),
        }
        if self.early:
            best = load_model(f"{folder}/best", args.device)
            found["best"] = measures.plans(best, "val", args, reason=best.cfg.reasoning == "on")
        return found

    def text(self, rows, settings):
        """The table, and how steeply the error falls. Of several seeds the first is shown."""
        header = ["", self.along, *COLUMNS]
        header += [f"{title}, stopped early" for title in COLUMNS] * self.early
        lines = []
        for row, (first, *_) in rows.items():
            cells = [shown(first["last"], *column) for column in COLUMNS.values()]
            if self.early:
                cells += [shown(first["best"], *column) for column in COLUMNS.values()]
            lines.append([row, f"{first[self.along]:,}", *cells])
        note = NOTE.format(slope=slope(rows, self.along, "ade"), along=self.along, **settings)
        return f"{markdown(lines, header)}\n\n{note}"


NOTE = """\
Each from nothing, {train_steps} steps of 32 scenes; seeds {seeds}; {eval} scenes of val, ± standard
error. ADE, both right: of the likeliest plan; minADE6: the best of six others. Over these rows ADE
goes as {along} to the power of {slope:.2f}."""


def slope(rows, along, name):
    """The power to which a number goes with what the rows have more of, by least squares."""
    more = [np.log(first[along]) for first, *_ in rows.values()]
    value = [np.log(first["last"][name]) for first, *_ in rows.values()]
    return np.polyfit(more, value, 1)[0]


size = Scaling(
    about="Figure 12: three widths of nano at equal steps",
    needs="not timed yet",
    rows={
        "half as wide": "--scenes 8000 --width 0.5",
        "nano": "--scenes 8000",
        "twice as wide": "--scenes 8000 --width 2",
    },
    along="parameters",
    early=False,
    paper="The paper's Figure 12: 7B has a minADE6 11 % below that of 0.5B (-0.04 as a power).",
)
data = Scaling(
    about="Figure 13: 500 to 8,000 scenes at equal steps, with and without early stopping",
    needs="not timed yet",
    rows={f"{count:,} scenes": f"--scenes {count}" for count in (500, 2000, 8000)},
    along="scenes",
    early=True,
    paper="The paper's Figure 13, minADE6: 1.111 m from 100,000 segments (1.016 stopped early), "
    "0.880 from 500,000, 0.874 from 2,000,000.",
)
