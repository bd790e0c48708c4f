"""
sample.py as a person runs it, and paths as a camera sees them.

    python -m pytest tests/test_sample.py
"""
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import data
import doors
import sample
import world
from alpamayo import PRESETS, Alpamayo, Vocabulary, with_words
from draw import ribbon


@pytest.mark.parametrize("camera", [1, 6])
def test_ribbon_ahead(camera):
    """A straight path lies in the middle of the image, below the horizon, as wide as it should."""
    H, W, length, width = 64, 128, 60.0, 1.8
    intrinsics, pose = world.rig_camera(camera, H, W)
    xyz = torch.linspace(length / 64, length, 64)[:, None] * torch.tensor([1.0, 0, 0])
    quads = ribbon(xyz, torch.eye(3).expand(64, 3, 3), intrinsics, pose, width)
    assert torch.allclose(quads[..., 0].mean(1), torch.tensor(W / 2), atol=1e-3)
    assert (quads[..., 1] > H / 2).all()
    ahead, height = length - pose[0, 3].item(), pose[2, 3].item()
    angle = math.atan(math.hypot(width / 2, height) / ahead)  # of the far corners, off the axis
    radius = (quads[-1, 1] - torch.tensor([W / 2, H / 2])).norm().item()
    assert radius == pytest.approx(intrinsics[6].item() * angle, rel=1e-3)
    assert quads[..., 1].max() > 0.95 * H  # and begins where the image does


def test_ribbon_behind():
    intrinsics, pose = world.rig_camera(1, 64, 128)
    back = torch.linspace(-1, -30, 64)[:, None] * torch.tensor([1.0, 0, 0])
    assert len(ribbon(back, torch.eye(3).expand(64, 3, 3), intrinsics, pose, 1.8)) == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("nano"))
    texts = list(data.ROUTES.values())
    for situation in world.SITUATIONS:
        texts += [data.sentence(situation, side) for side in (world.LEFT, world.RIGHT)]
    cfg = with_words(PRESETS["nano"], texts)
    model = Alpamayo(cfg, Vocabulary(cfg))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.vlm.lm_head.weight[model.vocabulary["traj_future_start"]] *= 30  # of few words
    model.save_pretrained(folder)
    return folder


def run(folder, *words):
    """A command of Python in another folder -> exit code, lines of stdout, lines of stderr."""
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONIOENCODING="utf-8")
    if words[0] == "-m":
        env["PYTHONPATH"] = ROOT
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, encoding="utf-8")
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


SAMPLE = os.path.join(ROOT, "sample.py")


def test_picture(checkpoint, tmp_path):
    flags = ("--situation", "pedestrian", "--n", 2, "--steps", 2)
    code, said, trouble = run(tmp_path, SAMPLE, "--checkpoint", checkpoint, *flags)
    assert code == 0, trouble
    assert [line.split()[0] for line in said if line[:1] != " "][:2] == ["scene", "truth"]
    assert "pedestrian" in said[0] and said[1].endswith(("from the left.", "from the right."))
    assert sum(line.startswith("sample ") and "ADE" in line for line in said) == 2
    assert said[-3].startswith("minADE") and said[-1].split() == ["picture", "out/sample.png"]
    assert all(stage in said[-2] for stage in ("vision", "prefill", "reasoning", "flow"))
    picture = (tmp_path / "out" / "sample.png").read_bytes()
    assert [int.from_bytes(picture[i : i + 4], "big") for i in (16, 20)] == [1600, 900]


def test_errors_are_one_line(checkpoint, tmp_path, monkeypatch):
    code, said, trouble = run(tmp_path, SAMPLE, "--checkpoint", "nowhere")
    assert code == 1 and said == [] and len(trouble) == 1, trouble
    assert trouble[0].startswith("sample.py: ") and "nowhere" in trouble[0]
    for flag, value in (("--situation", "snow"), ("--n", "0"), ("--seed", "-1"), ("--clip", "no")):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--checkpoint", checkpoint, flag, value])
        with pytest.raises(SystemExit) as exit:
            doors.run(sample.main)
        assert value in exit.value.code and "\n" not in exit.value.code


def test_the_route_is_read(checkpoint):
    """The prompt holds the route where the scene has one; a batch must agree on its length."""
    model = Alpamayo.from_pretrained(checkpoint)
    scene = data.make_scenes(range(world.SEEDS["val"], world.SEEDS["val"] + 2), size=(64, 128))
    scene["route"] = ["turn left", "go straight"]
    ids = model.embed_prompt(scene).ids
    texts = [[i for i in row.tolist() if i < model.cfg.text_vocab] for row in ids]
    words = [model.vocabulary.decode(text) for text in texts]
    assert "turn left" in words[0] and "go straight" in words[1]
    scene.pop("route")
    assert model.embed_prompt(scene).ids.shape[1] == ids.shape[1] - 4  # two words between two marks
    with pytest.raises(ValueError, match="route"):
        model.embed_prompt(scene | {"route": ["turn left", ""]})
