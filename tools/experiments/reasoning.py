"""
Tables 6 to 8: what it brings to say something before driving, and what to say.

    python -m tools.experiments reasoning --jobs 2

One model learns to drive from nothing (stage action). From its checkpoint three go on for equally
many steps: one still says nothing, one says its meta-action (what is decided), one its reasoning
(what is decided, and why). The last is measured a second time without saying it.
"""
from functools import partial

from alpamayo import load_model
from doors import whole
from tools import markdown
from tools.common import COUNT
from tools.experiments import measures
from tools.experiments.measures import shown
from tools.experiments.trainings import Training, folder_of, measured_rows, train

ABOUT = "Tables 6 to 8: path only, meta-action and path, reasoning and path"
NEEDS = "two hours of a busy core"
ROWS = {  # flags of train.py; whether it then speaks
    "path only": ("--stage action", False),
    "meta-action and path": ("--stage reason --says meta", True),
    "reasoning and path": ("--stage reason", True),
    "the same, not saying it": ("--stage reason", False),
}
SPLITS = ("val", "tail")
NOTE = """\
From one checkpoint of stage action ({action_steps} steps from nothing, 32 scenes each, of
{scenes}), {train_steps} steps more for each row; seeds {seeds}. {eval} scenes and {drive}
scenarios of 20 s a split, ± standard error. ADE, both right: of the likeliest plan; minADE6: the
best of six others. Score, close encounters: in closed loop, with the route."""
PAPER = """\
| the paper's Tables 6, 7, 8 | nominal | with route | challenging | close encounters, % | score |
| --- | ---: | ---: | ---: | ---: | ---: |
| path only | 0.971 | 0.834 | 0.994 | 17 | 0.38 |
| meta-action and path | 0.988 | 0.821 | 0.928 | - | - |
| reasoning and path | 0.955 | 0.794 | 0.868 | 11 | 0.50 |

The paper's first three columns are minADE6 over 6 s in metres, of its 0.5B model; the last two are
AlpaSim's, of 75 challenging scenarios."""


def add_flags(add):
    measures.add_flags(add)
    add("--action-steps", type=whole(1), default=200, help="of stage action, from nothing")
    add("--train-steps", type=whole(1), default=600, help="of each row, from there")
    add("--scenes", type=COUNT, default=8000, help="scenes to train with")


def beginning(seed, args):
    """The training that all rows of a seed go on from."""
    return Training(f"--stage action --steps {args.action_steps} --scenes {args.scenes}", seed)


def training_of(row, seed, args):
    flags, _ = ROWS[row]
    init = folder_of(beginning(seed, args), args)
    size = f"--steps {args.train_steps} --scenes {args.scenes}"
    return Training(f"{flags} --init {init} {size}", seed)


def numbers_of(args, row, folder):
    """{split: numbers} of a checkpoint: of plans, of plans without the route, of drives."""
    _, speaks = ROWS[row]
    model = load_model(folder, args.device)
    found = {}
    for split in SPLITS:
        told = measures.plans(model, split, args, reason=speaks)
        untold = measures.plans(model, split, args, reason=speaks, route=False)
        driven = measures.drives(model, split, args, reason=speaks)
        found[split] = told
        found[split] |= {f"no route, {name}": value for name, value in untold.items()}
        found[split] |= {f"drive {name}": value for name, value in driven.items()}
    return found


def measure(args):
    """{row: [{split: numbers} of each seed]}; what is missing is trained first."""
    train([beginning(seed, args) for seed in args.seeds], args)
    rows = {row: [training_of(row, seed, args) for seed in args.seeds] for row in ROWS}
    return measured_rows(rows, args, partial(numbers_of, args), eval=args.eval, drive=args.drive)


COLUMNS = {  # title: name, digits, scale
    "ADE, m": ("ade", 2, 1),
    "minADE6, m": ("minade", 2, 1),
    "without the route": ("no route, minade", 2, 1),
    "both right, %": ("both", 0, 100),
    "score": ("drive score", 2, 1),
    "close encounters, %": ("drive close", 0, 100),
    "off the road, %": ("drive off_road", 0, 100),
}


def text(rows, settings):
    """A table for each split. Of several seeds the first is shown."""
    tables = []
    for split in SPLITS:
        lines = []
        for row, (first, *_) in rows.items():
            numbers = first[split]
            lines.append([row, *(shown(numbers, *column) for column in COLUMNS.values())])
        tables.append(markdown(lines, [split, *COLUMNS]))
    return "\n\n".join([*tables, NOTE.format(**settings)])
