"""
Rows of tables: a JSON line each, from which the docs are made.

    {"table": "reasoning", "row": "path only", "found": {...}, "about": {...}}

`found` is what was measured, `about` what it was measured with: command, settings, code, machine,
date. Tables of the docs stand between two marks, `<!-- table NAME -->` and `<!-- end -->`, and are
made by `python -m tools.experiments page` from docs/rows.jsonl alone: nobody types a figure.
"""
import json
import os
import platform
import re
import shlex
from datetime import date
from pathlib import Path

import torch

import doors
import runs
from tools.experiments.trainings import ROOT

DOCS = ROOT / "docs"
KEPT = DOCS / "rows.jsonl"
MARKED = re.compile(r"<!-- table (\S+) -->\n(.*?)<!-- end -->\n", re.DOTALL)
NOT_TOLD = ("name", "cache", "out", "rows_to", "jobs", "device")  # of a command's settings


def about(args, usual):
    """What a table's rows are measured with. usual: the flags where none is given."""
    told = {name: value for name, value in vars(args).items() if name not in NOT_TOLD}
    settings = {name: in_project(value) for name, value in told.items()}
    words = ["python -m tools.experiments", args.name]
    for name, value in settings.items():
        if value != in_project(getattr(usual, name)):
            given = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name.replace('_', '-')}", *(shlex.quote(str(one)) for one in given)]
    return {
        "command": " ".join(words),
        "settings": json.loads(json.dumps(settings, default=str)),
        "code": runs.sources(),
        "machine": machine(args.device),
        "date": f"{date.today().day} {date.today():%B %Y}",
    }


def in_project(value):
    """A setting; of a path in the project, the part that is the same on every machine."""
    inside = isinstance(value, str) and value.startswith(f"{ROOT}{os.sep}")
    return os.path.relpath(value, ROOT) if inside else value


def machine(device):
    """The processor, how much of it works, and PyTorch's version, in words."""
    if str(device or "").startswith("cuda") or (device is None and torch.cuda.is_available()):
        name = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        name = f"{processor()}, {threads} thread{'s' * (threads > 1)}"
    return f"{name}, PyTorch {torch.__version__.partition('+')[0]}"


def processor():
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write(file, table, found, told):
    """Put a table's rows {row: numbers} into a file of JSON lines, in place of its older ones."""
    lines = []
    if os.path.exists(file):
        lines = list(doors.read_json_lines(str(file)))
    lines = [line for line in lines if line.get("table") != table]
    for row, numbers in found.items():
        lines.append({"table": table, "row": row, "found": numbers, "about": told})
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    doors.write_json_lines(str(file), lines)


def read(file):
    """{table: ({row: numbers}, about)} of a file of JSON lines."""
    tables = {}
    for line in doors.read_json_lines(str(file)):
        rows, _ = tables.setdefault(line.text("table"), ({}, line.object("about")))
        rows[line.text("row")] = line["found"]
    return tables


def origin(told):
    """Where a table's rows come from, a line."""
    return (f"`{told['command']}`: {told['machine']}, {told['date']}, code "
            f"`{told['code']}`.")


def block(page, found, told):
    """A table as the docs show it: ours, where it comes from, and the paper's."""
    parts = [page.text(found, told["settings"]), origin(told)]
    if hasattr(page, "PAPER"):
        parts.append(page.PAPER)
    return "\n\n".join(parts)


def fill(text, tables, pages):
    """A page of the docs with its tables made anew. KeyError where a table has no rows."""

    def made(match):
        name = match[1]
        return f"<!-- table {name} -->\n{block(pages[name], *tables[name])}\n<!-- end -->\n"

    return MARKED.sub(made, text)
