"""
The paper's experiments in small: each prints Markdown tables, then its rows as JSON.

    python -m tools.experiments list         their names, and what they need
    python -m tools.experiments vision       Table 12: four ways to see
    python -m tools.experiments reasoning    Tables 6 to 8: what it brings to think
    python -m tools.experiments all          all of them, into docs/rows.jsonl and the docs
    python -m tools.experiments page         the docs' tables anew from docs/rows.jsonl

What a table needs is trained once, --jobs at a time, and gone on with after a kill: trainings.py.
What a row is, and how the docs are made from it: rows.py.
"""
import argparse
import json
from pathlib import Path

import doors
from doors import whole
from tools.common import SIDE
from tools.experiments import (
    decoding,
    demand,
    latency,
    lessons,
    pruning,
    reasoning,
    rewards,
    rows,
    scaling,
    signal,
    vision,
)

EXPERIMENTS = {
    "reasoning": reasoning,
    "rl": rewards,
    "signal": signal,
    "decoding": decoding,
    "vision": vision,
    "latency": latency,
    "size": scaling.size,
    "data": scaling.data,
    "pruning": pruning,
    "demand": demand,
    "lessons": lessons,
}


def parse_flags(words=None):
    """The flags of the command line, or of these words."""
    p = doors.Flags("Experiments of the paper in small.")
    named = p.add_subparsers(dest="name", required=True, parser_class=doors.Flags)
    named.add_parser("list", description="Names, and what they need.")
    named.add_parser("page", description="Make the docs' tables anew from docs/rows.jsonl.")
    add_flags(named.add_parser("all", description="All of them, into the docs.").add_argument)
    for name, page in EXPERIMENTS.items():
        add = named.add_parser(name, description=page.ABOUT).add_argument
        add_flags(add)
        add("--rows-to", metavar="FILE", help="put the rows there, in place of the table's older "
            "ones; of docs/rows.jsonl the docs are made")
        page.add_flags(add)
    return p.parse_args(words)


def add_flags(add):
    """What all experiments take."""
    add("--device", type=doors.device_of, help="cpu, cuda or mps (default: a GPU if there is one)")
    add("--size", type=SIDE, nargs=2, default=(64, 128), help="H W, pixels of the images")
    add("--cache", default="data", help="the folder where rendered scenes are kept")
    add("--out", default="out/experiments", type=doors.folder_to_write, help="the models")
    add("--seeds", type=whole(), nargs="+", default=[0], help="trainings of each row")
    add("--jobs", type=whole(1, 1000), default=1, help="trainings at a time, a thread each")


def run(name, args, usual):
    """Measure a table; print it, and its rows; put them where --rows-to says."""
    page = EXPERIMENTS[name]
    if hasattr(page, "aside") and page.aside(args):
        return
    told = rows.about(args, usual)
    found = json.loads(json.dumps(page.measure(args)))  # as a file would have them
    print(rows.block(page, found, told))
    print(json.dumps({"about": told, "rows": found}))
    if args.rows_to:
        rows.write(args.rows_to, name, found, told)


def make_pages():
    """Fill the tables of the docs."""
    tables = rows.read(rows.KEPT)
    for file in sorted(Path(rows.DOCS).glob("*.md")):
        old = file.read_text("utf-8")
        new = rows.fill(old, tables, EXPERIMENTS)
        if new != old:
            doors.write_atomically(str(file), lambda part, new=new: Path(part).write_text(new))
            print(f"made anew  {file}")


def main():
    args = parse_flags()
    if args.name == "list":
        for name, page in EXPERIMENTS.items():
            print(f"{name:10} {page.ABOUT}; {page.NEEDS}")
    elif args.name == "page":
        make_pages()
    elif args.name == "all":
        for name in EXPERIMENTS:
            usual = parse_flags([name])
            given = vars(args) | {"name": name, "rows_to": str(rows.KEPT)}
            run(name, argparse.Namespace(**vars(usual) | given), usual)
        make_pages()
    else:
        run(args.name, args, parse_flags([args.name]))


if __name__ == "__main__":
    doors.run(main)
