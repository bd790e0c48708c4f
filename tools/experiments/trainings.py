"""
Trainings that tables need: each once, some at a time, gone on with after a kill.

A training lies in a folder whose name holds a hash of all that it depends on: its flags, the
project's own Python, the weights that it starts from. So nothing stale is shown: who edits a page
gets another folder.
"""
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open
from tqdm import tqdm

import doors
import runs

ROOT = Path(__file__).resolve().parents[2]

class Training(NamedTuple):
    """Flags of train.py, and a seed."""

    flags: str
    seed: int = 0

    def option(self, name, default=None):
        words = self.flags.split()
        return words[words.index(name) + 1] if name in words else default


def folder_of(training, args):
    """Where a training's checkpoint lies."""
    parts = [training.flags, runs.sources()]
    init = training.option("--init")
    if init:
        parts.append(hashlib.sha256(Path(init, "model.safetensors").read_bytes()).hexdigest())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
    name = "-".join(training.flags.replace("--", "").replace("/", ".").split())
    return f"{args.out}/{name[:80]}-{key}/{training.seed}"


def train(trainings, args):
    """Train what is missing, or go on where it stopped, --jobs at a time, a thread each."""
    wanted = {folder_of(one, args): one for one in trainings}  # some rows share a model
    with ThreadPoolExecutor(args.jobs) as pool:
        work = pool.map(lambda folder: run_training(folder, wanted[folder], args), wanted)
        list(tqdm(work, total=len(wanted), desc="training", unit="run"))


def run_training(folder, training, args):
    """Train a model to the end, from the start or where it stopped, in a process of its own."""
    saved = f"{folder}/training.safetensors"
    if os.path.exists(saved):
        with safe_open(saved, "pt") as file:
            step = file.metadata()["step"]
        if step == training.option("--steps"):
            return
        flags = ["--resume", folder]
    else:
        flags = [*training.flags.split(), "--seed", str(training.seed), "--threads", "1"]
        flags += ["--cache", args.cache, "--out", folder]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["train.py was killed"]
        raise ValueError(f"{folder}: {lines[-1]}")


def measured_rows(rows, args, work, **settings):
    """{row: [what work(row, folder) found of each training]}; rows: {row: its trainings}, of which
    those that are missing are trained first. settings: what it depends on beside the code."""
    train([one for trainings in rows.values() for one in trainings], args)
    found = {}
    for row, trainings in rows.items():
        key = settings | {"row": row, "code": runs.sources()}
        folders = [folder_of(one, args) for one in trainings]
        found[row] = [measured(folder, key, partial(work, row, folder)) for folder in folders]
    return found


def measured(folder, settings, work):
    """What work() found of the checkpoint in a folder, a dictionary; kept there in measured.json
    with the settings that it was found with, and found again with others."""
    file = Path(folder, "measured.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(file.read_text("utf-8")) if file.exists() else {}
    key = json.dumps(settings, sort_keys=True)
    if key not in kept:
        kept[key] = work()
        doors.write_json(str(file), kept)
    return kept[key]


def spread(values, digits=2, scale=1, sign=""):
    """Mean of values, and ± their standard deviation where there are several."""
    values = scale * np.array(values)
    mean = f"{values.mean():{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.{digits}f}"
