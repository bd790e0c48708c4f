"""The README tells the truth: its lines, paths, flags and commands.    python -m pytest tests/test_readme.py"""
import os
import re
import shlex
import subprocess
import sys
import textwrap
from functools import cache

import pytest
import torch
from conftest import ROOT

README = open(os.path.join(ROOT, "README.md")).read()
LINKS = re.findall(r"\[`(\w+)`\]\(([\w/]+\.py)#L(\d+)\)", README)
LINES = re.sub(r" \\\n +", " ", README).splitlines()  # a command may go on in the next line
COMMANDS = [line.split("#")[0].strip() for line in LINES if re.match(r"    (python|torchrun|pip|python3) ", line)]


@pytest.mark.parametrize("name, file, line", LINKS)
def test_the_map_points_at_the_line(name, file, line):
    lines = open(os.path.join(ROOT, file)).read().splitlines()
    pattern = re.compile(rf"\s*(def|class) {name}\b|{name} = ")
    where = [i + 1 for i, text in enumerate(lines) if pattern.match(text)]
    assert int(line) in where, f"{file}: {name} is at line {where}, the README says {line}"


def test_every_path_exists():
    assert len(LINKS) >= 15
    for path in re.findall(r"\]\(([\w/.-]+?)(?:#L\d+)?\)", README):
        assert os.path.exists(os.path.join(ROOT, path)), path


@cache
def help_of(script):
    return subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if ".py" in c])
def test_every_flag_exists(command):
    words = shlex.split(command)
    script = next(w for w in words if w.endswith(".py"))
    known = help_of(script)
    for flag in words[words.index(script) :]:
        if flag.startswith("--"):
            assert re.search(rf"{flag}\b", known), f"{script} has no flag {flag}"


def test_the_first_command_works(tmp_path):
    """What a newcomer runs, with the shipped checkpoint, from any folder."""
    picture = tmp_path / "sample.png"
    command = [sys.executable, os.path.join(ROOT, "sample.py"), "--out", str(picture)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert picture.stat().st_size > 50_000
    truth = re.search(r"truth +(.+)", done.stdout).group(1)
    assert done.stdout.count(truth) >= 4, done.stdout  # most of six samples of the README's scene say what is true


def test_the_shipped_checkpoint_is_small():
    size = os.path.getsize(os.path.join(ROOT, "checkpoints", "nano", "model.safetensors"))
    assert size <= 8e6


def test_the_kernel_that_is_explained(tmp_path, monkeypatch):
    """kernels/README.md shows one: it computes what the line of PyTorch above it does."""
    pytest.importorskip("triton")
    import cpu_triton  # noqa: F401

    text = open(os.path.join(ROOT, "kernels", "README.md")).read()
    line = re.search(r"^    v = .*$", text, re.M)[0]
    kernel, launch = re.search(r"^(    @triton\.jit.*?)^(    speeds\[.*?)$", text, re.M | re.S).groups()
    (tmp_path / "explained.py").write_text("import triton\nimport triton.language as tl\n\n\n" + textwrap.dedent(kernel))
    monkeypatch.syspath_prepend(tmp_path)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        here = dict(accel=torch.randn(5, 64), v0=torch.rand(5), v=torch.empty(5, 64), cars=5, dt=0.1)
    exec("import triton; from explained import speeds; " + launch.strip(), here)
    torch.testing.assert_close(here["v"], eval(line.split("=", 1)[1].strip(), dict(here)))
