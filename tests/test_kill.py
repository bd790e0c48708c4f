"""Each stage is killed five times at random moments, and ends as a run that was not.

    python -m pytest tests/test_kill.py

Tiny models, scenes rendered once. A run is a fork of this process, so that PyTorch is there at once;
it is killed with its process group, by SIGKILL. Two processes share a batch as under torchrun: by
its environment variables."""
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_vision import TINY, H, W
from tqdm import tqdm

import data
import doors
import rl
import train
from alpamayo import Alpamayo, Vocabulary

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="a run is a fork of this process"),
    pytest.mark.in_pytorch("to the last bit, and often"),
]
SMALLER = replace(TINY, n_layer=2, v_layer=2, deepstack=(0,))
STEPS = 6
COMMON = f"--steps {STEPS} --size {H} {W} --scenes 4 --batch 2 --val-scenes 2 --val-every 3 --save-every 1 --warmup 2 --threads 1 --workers 0 --device cpu"
STAGES = {
    "action": "--stage action",
    "all": "--stage all --action-share 0.3 --accumulate 2 --action-every 1",
    "expert": "--stage reason --train expert --init INIT",  # its frozen weights are in the checkpoint beside
    "adapters": "--stage reason --train vlm --lora 4 --dtype bfloat16 --init INIT",
    "rl": "--stage rl --split tail --group 2 --flow-steps 2 --max-new-tokens 6 --kl 0.01 --init INIT",
    "own": "--stage reason --init INIT --own 2 --max-new-tokens 4",
    "two processes": "--stage all --action-share 0.3",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model to start from; scenes come beside it."""
    folder = tmp_path_factory.mktemp("kill")
    model = Alpamayo(SMALLER, Vocabulary(SMALLER))
    model.init_weights(torch.Generator().manual_seed(0))
    model.save_pretrained(str(folder / "init"), reasoning="on")
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(train.PRESETS, "nano", SMALLER)
    monkeypatch.setattr(data, "own_scenes", partial(data.own_scenes, seconds=1.5))
    monkeypatch.setattr(rl, "draw_curves", lambda *_: None)  # a second for each validation


def child(words, said, env):
    """The process id of a run that has begun."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        sys.stdout = sys.stderr = open(said, "a")
        tqdm.set_lock(threading.RLock())  # the usual one is shared: who dies with it stops all others
        os.environ.update(env)
        sys.argv = ["train.py", *words]
        doors.run(train.main)
        os._exit(0)
    except SystemExit as end:
        print(end.code if isinstance(end.code, str) else "", file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        sys.stderr.flush()
    finally:
        os._exit(1)


class Running:
    """A run: one process, or several that share a batch."""

    def __init__(self, words, said, processes=1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.pids = []
        for rank in range(processes):
            env = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            self.pids.append(child(words, said, env))
        self.codes = {}

    def is_over(self):
        """Whether all have ended; their exit statuses are in `codes`."""
        for pid in self.pids:
            if pid not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, seconds=60):
        end = time.time() + seconds
        while not self.is_over():
            if time.time() > end:
                self.kill()
                raise AssertionError("hangs")
            time.sleep(0.005)
        return list(self.codes.values())

    def kill(self):
        for pid in self.pids:
            if pid not in self.codes:
                os.killpg(pid, signal.SIGKILL)
        while not self.is_over():
            time.sleep(0.002)


def lines_of(out):
    path = out / "log.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def run_with_kills(words, out, said, processes, dice, seconds):
    """Five kills: each some steps after the one before, and up to a step of `seconds` later."""
    landed = 0
    for last in [False] * 5 + [True]:
        saved = (out / "training.safetensors").exists()
        again = ["--resume", str(out)] if saved else words
        running = Running(again, said, processes)
        if last:
            assert running.wait() == [0] * processes, said.read_text()
            return landed
        enough = min(len(lines_of(out)) + dice.randint(0, 2), STEPS)
        end = time.time() + 60
        while not running.is_over() and len(lines_of(out)) < enough and time.time() < end:
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 1.5 * seconds))
        landed += not running.is_over()
        running.kill()


@pytest.mark.parametrize("stage", STAGES)
def test_killed_five_times_it_ends_as_if_it_had_not_been(stage, place, tmp_path):
    processes = 2 if stage == "two processes" else 1
    words = f"{COMMON} {STAGES[stage]} --cache {place / 'scenes'}".replace("INIT", str(place / "init"))
    whole, killed, said = tmp_path / "whole", tmp_path / "killed", tmp_path / "said"
    words_of = lambda out: [*words.split(), "--out", str(out)]
    begin = time.time()
    running = Running(words_of(whole), said, processes)
    assert running.wait() == [0] * processes, said.read_text()
    seconds = (time.time() - begin) / STEPS
    dice = random.Random(stage)
    assert run_with_kills(words_of(killed), killed, said, processes, dice, seconds) > 0
    assert [json.loads(line)["step"] for line in lines_of(whole)] == list(range(1, STEPS + 1))
    assert lines_of(killed) == lines_of(whole)
    for file in ("model.safetensors", "training.safetensors"):
        a, b = load_file(whole / file), load_file(killed / file)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), file
    left = {name for name in os.listdir(killed) if not name.endswith(".part")}  # those go in an hour
    assert left == set(os.listdir(whole))
    assert "losses will not be" not in said.read_text()


# --------------------------------------------------------------------------------------------------
# Two processes end together


def of_rank(rank, function, harmed):
    """The function, but harmed in one process from its third call on."""
    calls = []

    def call(*args, **more):
        calls.append(1)
        mine = os.environ["RANK"] == str(rank) and len(calls) > 2
        return (harmed if mine else function)(*args, **more)

    return call


def loss_of_nan(*args):
    return backward(*args) | {"flow": torch.tensor(torch.nan)}


def gradient_of_infinity(*args):
    args[0].params[0].register_hook(lambda grad: grad + torch.inf)
    return backward(*args)


def full_disk(*_):
    raise OSError(28, "No space left on device")


backward = train.backward
TROUBLE = {  # name: (function of train.py, the process, what is in its place, what is said)
    "loss": ("backward", 1, loss_of_nan, "step 3: loss `flow` is not finite; the checkpoint of step 2"),
    "gradient": ("backward", 1, gradient_of_infinity, "step 3: `grad_norm` is not finite; the checkpoint of step 2"),
    "disk": ("save_tensors", 0, full_disk, "No space left on device; the checkpoint of step 2"),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_what_stops_one_process_stops_both(trouble, place, tmp_path, monkeypatch):
    name, rank, harmed, line = TROUBLE[trouble]
    monkeypatch.setattr(train, name, of_rank(rank, getattr(train, name), harmed))
    words = f"{COMMON} --stage action --cache {place / 'scenes'} --out {tmp_path / 'out'}".split()
    running = Running(words, tmp_path / "said", 2)
    assert running.wait() == [1, 1]
    said = (tmp_path / "said").read_text()
    assert line in said and "Traceback" not in said
    with safe_open(tmp_path / "out" / "training.safetensors", "pt") as file:
        assert file.metadata()["step"] == "2"
    assert len(lines_of(tmp_path / "out")) == 2 + (trouble == "disk")
    assert not (tmp_path / "out" / "saving").exists()
