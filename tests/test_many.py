"""
Many processes are one: what they learn, what is left when they die, where they go on.

    python -m pytest tests/test_many.py

Tiny models and forks of this process, as in test_kill.py; gloo stands in for a network of GPUs."""
import json
import os
import re
import signal
import socket
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_kill import Running, lines_of, place, small  # noqa: F401, fixtures
from test_vision import H, W

import memory
import train
from alpamayo import Alpamayo

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="a run is a fork of this process"),
    pytest.mark.in_pytorch("sharded, and often"),
]
COMMON = f"--steps 2 --size {H} {W} --scenes 8 --batch 4 --val-scenes 3 --save-every 2 --warmup 2 --threads 1 --workers 0 --device cpu"
RL = "--stage rl --credit total --split val --group 2 --flow-steps 2 --max-new-tokens 5"
STAGES = {  # what to learn; how the second run has its 4 pieces of a batch; by what
    "all": ("--stage all --action-share 0.5", 2, ""),
    "all, sharded": ("--stage all --action-share 0.5", 2, "--shard"),
    "expert, sharded": ("--stage reason --train expert --init INIT", 4, "--shard"),
    "adapters, sharded": ("--stage reason --train vlm --lora 2 --checkpointing --init INIT", 2, "--shard"),
    "rl": (f"{RL} --kl 0.1 --rehearse 1 --init INIT", 2, ""),
    "rl, sharded": (f"{RL} --kl 0.1 --rehearse 1 --init INIT", 2, "--shard"),
}


def words_of(place, out, what, accumulate, more=""):  # noqa: F811
    words = f"{COMMON} {what} --accumulate {accumulate} {more} --cache {place / 'scenes'} --out {out}"
    return words.replace("INIT", str(place / "init")).split()


def ended(words, said, processes, seconds=120):
    running = Running(words, said, processes)
    assert running.wait(seconds) == [0] * processes, said.read_text()
    return said.read_text()


def numbers_of(line):
    found = {}
    for name, value in line.items():
        for key, number in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(number, float) and name not in ("mismatch", "speed"):
                found[name, key] = number
    return found


def assert_same_losses(ours, theirs, rounding=2e-5):
    assert len(lines_of(ours)) == len(lines_of(theirs)) > 0
    for a, b in zip(lines_of(ours), lines_of(theirs)):
        assert numbers_of(json.loads(a)) == pytest.approx(numbers_of(json.loads(b)), rel=rounding, abs=rounding)


@pytest.fixture(scope="module")
def alone(place):  # noqa: F811
    """A folder of a run in one process, by what it learns."""
    runs = {}

    def run(what):
        if what not in runs:
            runs[what] = place / f"alone-{len(runs)}"
            ended(words_of(place, runs[what], what, 4), place / "said", 1)
        return runs[what]

    return run


@pytest.mark.parametrize("stage", STAGES)
def test_many_processes_learn_what_one_does(stage, place, alone, tmp_path):  # noqa: F811
    """The same pieces of a batch, shared among 2 or 4: losses, validation, gradient norms; weights,
    as far as AdamW does not make a step of a rounding error."""
    what, processes, more = STAGES[stage]
    many = tmp_path / "many"
    said = ended(words_of(place, many, what, 4 // processes, more), tmp_path / "said", processes)
    assert f"{processes} x cpu" in said
    one = alone(what)
    assert_same_losses(one, many)
    a, b = (load_file(out / "model.safetensors") for out in (one, many))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape
        apart = (a[name].float() - b[name].float()).abs()
        assert apart.max() < 3e-3 and apart.mean() < 1e-4, name
    Alpamayo.from_pretrained(str(many))


def wait_for(running, out, lines):
    end = time.time() + 60
    while not running.is_over() and len(lines_of(out)) < lines and time.time() < end:
        time.sleep(0.005)


def test_sharded_it_is_killed_and_goes_on_with_another_number(place, alone, tmp_path):  # noqa: F811
    """Two processes save each step; both are killed; four go on, are killed, then one. The losses are
    those of a run in one process, and its parts are read by whoever comes."""
    what = "--stage all --action-share 0.5 --save-every 1 --steps 4"
    one, out, said = alone(what), tmp_path / "killed", tmp_path / "said"
    words = words_of(place, out, what, 2, "--shard")
    for processes, steps in ((2, 1), (4, 2)):
        running = Running(words, said, processes)
        wait_for(running, out, steps + 1)
        assert not running.is_over(), said.read_text()
        running.kill()
        saved = safe_open(out / "training.safetensors", "pt").metadata()
        assert saved["pieces"] == "4" and os.path.isdir(out / f"training-{saved['step']}")
        assert len(os.listdir(out / f"training-{saved['step']}")) == processes
        words = ["--resume", str(out)]
    assert "has ended" not in said.read_text()
    assert f"{processes // 2} processes when it was saved, {processes} now" in said.read_text()
    ended(words, said, 1)
    assert_same_losses(one, out)
    assert not [name for name in os.listdir(out) if name.startswith(("training-", "saving"))]


def test_who_dies_is_named_and_a_slow_disk_is_waited_for(place, tmp_path, monkeypatch):  # noqa: F811
    """A process that is killed ends the other in seconds. One that is slow to write does not."""
    out, said = tmp_path / "out", tmp_path / "said"
    save, GRACE = train.save_tensors, 0.5
    monkeypatch.setattr(memory, "GRACE", GRACE)
    monkeypatch.setattr(train, "save_tensors", lambda *given: (time.sleep(2), save(*given)))
    words = words_of(place, out, "--stage action --save-every 1 --steps 50", 1)
    running = Running(words, said, 2)
    wait_for(running, out, 3)  # by then two were saved, slowly
    os.killpg(running.pids[1], signal.SIGKILL)
    assert sorted(running.wait(60)) == [-signal.SIGKILL, 1]
    line = said.read_text().splitlines()[-1]
    assert re.search(f"process 1 has ended, so process 0 ends; the checkpoint of step [23] in {out} is intact", line)
    assert "Traceback" not in said.read_text()


def test_damaged_parts_are_one_line(place, tmp_path):  # noqa: F811
    """Whatever is wrong with a part is told before a step is made, and nothing is written over."""
    out, said = tmp_path / "out", tmp_path / "said"
    ended(words_of(place, out, "--stage action", 2, "--shard"), said, 2)
    parts = out / "training-2"
    file = sorted(parts.iterdir())[0]
    good = file.read_bytes()
    tensors, settings = load_file(file), safe_open(file, "pt").metadata()
    name = next(name for name in tensors if tensors[name].numel())

    def nan():
        save_file(tensors | {name: tensors[name] * torch.nan}, file, settings)

    for harm, words in (
        (lambda: file.write_bytes(good[:-9]), "no whole parts"),
        (lambda: file.write_bytes(b""), "no whole parts"),
        (file.unlink, "training"),
        (nan, "NaN or infinite"),
    ):
        harm()
        said.write_text("")
        assert Running(["--resume", str(out)], said, 1).wait() == [1]
        line = said.read_text().splitlines()[-1]
        assert words in line and str(out) in line and "Traceback" not in said.read_text(), line
        file.write_bytes(good)
    ended(["--resume", str(out)], said, 1)


def test_what_cannot_work_is_one_line(place, tmp_path, monkeypatch):  # noqa: F811
    """Told before anything is written."""
    monkeypatch.setattr(train, "JOIN", 1)
    words = words_of(place, tmp_path / "out", "--stage action", 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for world, more, complaint in (
            (1, "--shard", "--shard 1: there are 1 processes; torchrun --nproc_per_node N starts N"),
            (3, "--batch 4", "--batch 4: must be a multiple of processes x --accumulate = 3"),
            (3, "--batch 6 --shard 4", "--shard 4: there are 3 processes"),
            (3, "--batch 6", "process 0 of 3 found no others at 127.0.0.1:0: "),  # two are missing
            (2, "", "process 0 of 2 found no others"),
        ):
            port = taken.getsockname()[1] if world == 2 else 0
            env = {"WORLD_SIZE": world, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            monkeypatch.setattr(sys, "argv", ["train.py", *words, *more.split()])
            with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError) as end:
                for name, value in env.items():
                    patch.setenv(name, str(value))
                train.main()
            assert complaint in str(end.value) and "\n" not in str(end.value)
    assert not (tmp_path / "out").exists()
