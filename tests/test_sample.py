"""
sample.py as a person runs it, and paths as a camera sees them.

    python -m pytest tests/test_sample.py
"""
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import data
import doors
import draw
import sample
import world
from alpamayo import PRESETS, Alpamayo, Rollout, Vocabulary, ade, with_words
from clips import CAMERAS
from draw import Photo, draw_scene, ribbon, verdict


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


@pytest.fixture
def here(tmp_path, monkeypatch, capsys, checkpoint):
    """Runs sample.py in this process and in the test's folder: lines of stdout, of stderr."""

    monkeypatch.setattr(doors, "name_of_program", lambda: "sample.py")

    def run_sample(*words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["sample.py", "--checkpoint", checkpoint, *map(str, words)])
        try:
            doors.run(sample.main)
        except SystemExit as exit:
            if isinstance(exit.code, str):  # what the interpreter prints
                print(exit.code, file=sys.stderr)
        found = capsys.readouterr()
        return found.out.splitlines(), found.err.splitlines()

    return run_sample


def test_errors_are_one_line(checkpoint, tmp_path, here):
    code, said, trouble = run(tmp_path, SAMPLE, "--checkpoint", "nowhere")
    assert code == 1 and said == [] and len(trouble) == 1, trouble
    assert trouble[0].startswith("sample.py: ") and "nowhere" in trouble[0]
    for flag, value in (("--situation", "snow"), ("--clip", "no")):
        said, trouble = here(flag, value)
        assert said == [] and len(trouble) == 1 and value in trouble[0]


@pytest.fixture
def no_model(monkeypatch):
    """Flags are checked before a model is loaded."""
    monkeypatch.setattr(sample, "load_model", None)


@pytest.mark.parametrize("flags", [
    "--n 0", "--n 1e20", "--n 1.5", "--n", "--seed -1", "--scene -1", "--scene 10000000", "--steps 0", "--size 0 0", "--size -64 128",
    "--size 64", "--size 64 1e9", "--temperature nan", "--temperature -1", "--temperature inf", "--top-p 0", "--top-p 1.1", "--keep nan",
    "--keep 0", "--keep 2", "--retrieve nan", "--t0 nan --clip c", "--t0 3", "--cameras 1", "--cameras 7 --clip c", "--split tail --clip c",
    "--situation deer --clip c", "--device tpu", "--device cuda:99", "--split snow", "--nowhere",
    "--out sample", "--out sample.xyz", "--out .", "--out a_file/sample.png", "--out a_folder.png",
    "--out /dev/null", "--json .", "--json a_file/b", "--json /dev/null", "--out",
])  # fmt: skip
def test_a_wrong_flag_is_one_line_before_the_work(flags, here, tmp_path, no_model):
    (tmp_path / "a_file").touch()
    (tmp_path / "a_folder.png").mkdir()
    said, trouble = here(*flags.split())
    assert said == [] and len(trouble) == 1 and trouble[0].startswith("sample.py: "), trouble
    assert flags.split()[0].lstrip("-") in trouble[0]
    assert sorted(os.listdir(tmp_path)) == ["a_file", "a_folder.png"]


def test_the_picture_needs_one_more_package_before_the_work(here, monkeypatch, no_model):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert here() == ([], ["sample.py: the picture needs one more package: pip install matplotlib"])


TRUE = "Yield and keep lane since a deer crosses from the left and a car cuts in from the right."


@pytest.mark.parametrize("said, true, what", [
    (TRUE, TRUE, "right"),
    ("yield and keep lane since a car cuts in from the right and a deer crosses from the left", TRUE, "right"),
    ("Yield and keep lane since a deer crosses from the left.", TRUE, "other reason"),
    ("Yield and keep lane", TRUE, "other reason"),
    ("Stop and keep lane since a deer crosses from the left.", TRUE, "wrong"),
    ("the the", TRUE, "wrong"), ("", TRUE, ""), (TRUE, "", ""), (TRUE, "Watch out!", ""),
])  # fmt: skip
def test_right_words_for_another_reason_look_otherwise(said, true, what):
    assert verdict(said, true) == what


def test_words_and_bold_path_are_of_one_sample(here, monkeypatch, tmp_path):
    """The best sample of a scene with a truth. Nothing is random but by the seed."""
    drawn = {}
    monkeypatch.setattr("draw.draw_title", lambda figure, scene, out, shown: drawn.update(title=shown))
    monkeypatch.setattr("draw.draw_paths", lambda ax, scene, paths: drawn.update(paths=paths))
    said, trouble = here("--n", 3, "--steps", 2, "--json", "more/sample.json")
    assert said[0] == "scene      parked car, held-out scene 16 of the world", trouble
    record = json.loads((tmp_path / "more" / "sample.json").read_text())
    scene = data.make_scenes([world.SEEDS["val"] + 16])
    errors = ade(torch.tensor(record["xyz"]), scene["ego_future_xyz"][0])
    best = drawn["title"]
    assert best == int(errors.argmin())
    bold = drawn["paths"][-2]
    assert bold.label == f"sample {best + 1}" and torch.equal(bold.xyz, torch.tensor(record["xyz"][best]))
    assert f"ADE {errors[best]:.2f} m" in said[2 + best]
    assert torch.tensor(record["actions"]).shape == (3, 64, 2) and record["seed"] == 0
    assert len(record["reasoning"]) == 3 and set(record["seconds"]) == {"vision", "prefill", "reasoning", "flow"}
    assert record["checkpoint"] and record["scene"] == "parked car, held-out scene 16 of the world"
    again, _ = here("--n", 3, "--steps", 2, "--scene", 16, "--device", "cpu", "--out", "b.svg")
    assert again[:5] == said[:5] and (tmp_path / "b.svg").read_text().startswith("<?xml")


def test_the_scene_that_is_asked_for(here):
    for flags, scene in (
        (("--scene", 5), "swerving car, held-out scene 5"), (("--split", "tail"), "held-out scene 0"),
        (("--situation", "turn", "--scene", 4), "turn, held-out scene"),
    ):  # fmt: skip
        said, trouble = here("--n", 1, "--steps", 1, *flags)
        assert scene in said[0], trouble


def scene_of(name="a clip", future=True, reasoning=""):
    scene = data.make_scenes([world.SEEDS["val"]], camera_ids=(1,), size=(2, 4), frames=1)
    if not future:
        del scene["ego_future_xyz"], scene["ego_future_rot"]
    return scene | {"name": [name], "reasoning": [reasoning]}


def rollout(texts):
    n = len(texts)
    zeros = torch.zeros(1, n, 64, 3)
    seconds = dict(vision=1234.5, prefill=1234.5, reasoning=1234.5, flow=1234.5)
    rot = torch.eye(3).expand(1, n, 64, 3, 3)
    return Rollout([texts], None, None, None, zeros[..., :2], zeros, rot, None, seconds, 0.6, 0.98, 0.0)


@pytest.mark.parametrize("cameras, shape", [
    ((6,), (90, 160)), ((1, 6), (37, 124)), ((0, 1, 2), (100, 100)), ((0, 1, 2, 6), (64, 128)), (range(7), (90, 160))])  # fmt: skip
def test_every_camera_has_its_place_and_nothing_leaves_the_slide(cameras, shape, monkeypatch):
    """No two things overlap; all words are on the slide, the timing of a slow model too."""
    kept = []
    monkeypatch.setattr("draw.save_figure", lambda figure, file: kept.append(figure))
    photo = Photo(torch.zeros(*shape, 3, dtype=torch.uint8).numpy(), None, None)
    long = "Keep speed and keep lane since " + "the road ahead is free and " * 20
    scene, texts = scene_of(reasoning=long), [long, "", "x" * 300]
    if 1 not in cameras:  # and where nothing is known
        scene, texts = scene_of(future=False), [""]
    draw_scene("a.png", scene, rollout(texts), {i: photo for i in cameras})
    (figure,) = kept
    figure.canvas.draw()
    images = [ax.images[0].get_window_extent() for ax in figure.axes if ax.images]
    places = images + [ax.get_window_extent() for ax in figure.axes if not ax.images]
    assert len(images) == len(cameras) and len(places) == len(cameras) + 4
    for i, a in enumerate(places):
        assert a.x0 >= 0 and a.x1 <= 1600 and a.y0 >= 0 and a.y1 <= 900
        for b in places[:i]:
            assert min(a.x1, b.x1) - max(a.x0, b.x0) < 1 or min(a.y1, b.y1) - max(a.y0, b.y0) < 1
    for words in [*figure.texts, *(text for ax in figure.axes for text in ax.texts)]:
        extent = words.get_window_extent()
        assert extent.x0 >= 0 and extent.x1 <= 1600 and extent.y0 >= 0, words.get_text()
    draw.pyplot().close(figure)


def write_clip(folder, cameras, seconds=10):
    """A clip of a car that drives straight on at 10 m/s; images of camera i are of one grey."""
    from PIL import Image

    folder.mkdir()
    times = [i / 10 for i in range(round(10 * seconds) + 1)]
    rows = [f"{t},{10 * t},0,0" for t in times]
    (folder / "egomotion.csv").write_text("\n".join(["time,x,y,yaw", *rows]))
    calibration = {}
    for camera in cameras:
        images = folder / CAMERAS[camera]
        images.mkdir()
        image = Image.new("RGB", (64, 32), (30 * camera,) * 3)
        for i in range(len(times)):
            image.save(images / f"{i:04d}.png")
        (images / "times.csv").write_text("\n".join(["time", *map(str, times)]))
        intrinsics, pose = world.rig_camera(camera if camera in world.RIG else 1, 32, 64)
        calibration[CAMERAS[camera]] = dict(
            kind="ftheta", width=64, height=32, cx=intrinsics[3].item(), cy=intrinsics[4].item(),
            coefficients=intrinsics[5:].tolist(), camera_to_ego=pose.tolist())  # fmt: skip
    (folder / "cameras.json").write_text(json.dumps(calibration))
    return folder


def test_a_clip(here, tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "clip", (1, 4, 6))
    shown = {}
    monkeypatch.setattr(sample, "draw_scene", lambda file, scene, out, photos: shown.update(photos=photos, scene=scene))
    fast = ("--n", 1, "--steps", 1, "--clip", clip)
    said, trouble = here(*fast)
    assert "scene      clip at 2.0 s" in said, trouble
    assert {i: photo.seen for i, photo in shown["photos"].items()} == {1: True, 4: False, 6: True}
    assert shown["photos"][4].image[0, 0, 0] == 120
    assert "scene      clip at 3.0 s" in here(*fast, "--scene", 2)[0]
    assert "scene      clip at 3.1 s" in here(*fast, "--t0", 3.1, "--cameras", 1)[0]
    assert shown["scene"]["camera_ids"].tolist() == [[1]]
    assert "scene      clip at 9.0 s" in here(*fast, "--t0", 9)[0]  # without a truth
    said, trouble = here(*fast, "--scene", 4)
    assert trouble == [f"sample.py: --scene 4: {clip} has scenes 0 to 3"]


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
