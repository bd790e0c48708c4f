"""Comfort, baselines, path errors; what scripts share: python -m pytest tests/test_motion.py"""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, ROOT
from safetensors.torch import load_file

import data
import doors
import world
from alpamayo import Config, ade, rot_of
from motion import (
    COMFORT_BOUNDS,
    baselines,
    comfort,
    comfort_of,
    key_frames,
    meta_actions,
    min_ade,
    smooth_motion,
)
from tools import markdown


def drive(speed, accel, turn):
    """A batch of one: constant acceleration (m/s^2) and turn rate (rad/s), 16 poses and 64."""
    t = 0.1 * torch.arange(-15, 65, dtype=torch.float64)
    if turn:
        x = speed / turn * (turn * t).sin()
        y = speed / turn * (1 - (turn * t).cos())
    else:
        x = speed * t + accel / 2 * t**2
        y = 0 * t
    xyz = torch.stack([x, y, 0 * x], -1)[None].float()
    return {
        "ego_history_xyz": xyz[:, :16],
        "ego_history_rot": rot_of(turn * t)[None, :16].float(),
        "ego_future_xyz": xyz[:, 16:],
    }


def errors(scene):
    truth = scene["ego_future_xyz"]
    return {name: ade(path, truth).item() for name, path in baselines(scene).items()}


def test_baselines():
    assert max(errors(drive(10, 0, 0)).values()) < 1e-3
    turning = errors(drive(10, 0, 0.2))
    assert turning["CTRV"] < 0.01 and turning["CTRA"] < 0.01  # not 0: a step is a chord, not an arc
    assert turning["CV"] > 5
    faster = errors(drive(10, 1, 0))
    mean_square = sum((0.1 * k) ** 2 for k in range(1, 65)) / 64
    assert faster["CTRA"] < 2e-3 and faster["CV"] == pytest.approx(mean_square / 2, rel=0.05)
    stopping = baselines(drive(6, -1.5, 0))["CTRA"][0, :, 0]  # stops after 4 s and 12 m, and stays
    assert stopping.diff().min() >= 0 and stopping[-1].item() == pytest.approx(12, abs=0.02)


def test_baselines_in_reverse():
    """At 2 m/s backwards, straight and turning; braking, they stop where the car does."""
    for turn in (0, 0.2):
        back = errors(drive(-2, 0, turn))
        assert back["CTRV"] < 0.01 and back["CTRA"] < 0.01
    assert errors(drive(-2, 0, 0))["CV"] < 1e-3
    stopping = baselines(drive(-2, 0.5, 0))["CTRA"][0, :, 0]  # after 4 s and 4 m
    assert stopping.diff().max() <= 0 and stopping[-1].item() == pytest.approx(-4, abs=0.02)


@pytest.mark.parametrize("spoil", [
    lambda xyz, rot: (xyz * torch.nan, rot), lambda xyz, rot: (xyz, rot + torch.inf),
    lambda xyz, rot: (xyz[:, :1], rot[:, :1]), lambda xyz, rot: (xyz[:, :0], rot[:, :0]),
    lambda xyz, rot: (xyz[..., :2], rot), lambda xyz, rot: (xyz, rot[:, :5]),
])  # fmt: skip
def test_poses_too_few_or_not_finite_are_refused_in_a_line(spoil):
    scene = drive(10, 0, 0)
    xyz, rot = spoil(scene["ego_history_xyz"], scene["ego_history_rot"])
    history = {"ego_history_xyz": xyz, "ego_history_rot": rot}
    for use in (
        lambda: baselines(history), lambda: comfort(xyz, rot), lambda: smooth_motion(xyz, rot),
        lambda: meta_actions(xyz, rot), lambda: key_frames(xyz[0], rot[0]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="^poses: expected ") as error:
            use()
        assert "\n" not in str(error.value)


def test_min_ade():
    truth = torch.zeros(2, 64, 3)
    offsets = torch.tensor([[3.0, 1.0, 2.0], [5.0, 7.0, 4.0]])  # m aside: 2 scenes, 3 samples
    paths = torch.zeros(2, 3, 64, 3)
    paths[..., 1] = offsets[..., None]
    paths[..., 2] = 100  # height does not count
    assert torch.allclose(ade(paths, truth[:, None]), offsets)
    assert min_ade(paths, truth).tolist() == [1, 4]


def test_comfort_is_the_releases():
    """Its verdicts on 64 paths, all six."""
    g = load_file(os.path.join(GOLDEN, "comfort.safetensors"))
    names = {
        "lon_accel": "accel",
        "lat_accel": "lateral accel",
        "jerk": "jerk",
        "lon_jerk": "longitudinal jerk",
        "yaw_accel": "yaw accel",
        "yaw_rate": "yaw rate",
    }
    assert set(names.values()) == set(COMFORT_BOUNDS)
    for dtype in (torch.float32, torch.float64):
        ours = comfort(g["xyz"].to(dtype), g["rot"].to(dtype))
        for theirs, name in names.items():
            assert torch.equal(ours[name], g[theirs] > 0.5), name


@pytest.mark.parametrize("slower, fails", [
    (0.04, set()), (0.06, {"longitudinal jerk"}), (0.09, {"longitudinal jerk", "jerk"}),
])  # fmt: skip
def test_a_path_that_brakes_when_it_ends_jerks_there(slower, fails):
    """The release repeats the last difference, also of rates: 0.41 and 0.84 m/s^2 are too much."""
    speed = torch.full((64,), 10.0, dtype=torch.float64)
    speed[-1] -= slower  # m/s in 0.1 s
    x = 0.1 * speed.cumsum(0)
    held = comfort(torch.stack([x, 0 * x, 0 * x], -1), torch.eye(3).expand(64, 3, 3))
    assert {name for name, ok in held.items() if not ok} == fails


def test_a_drive_jerks_only_where_it_does():
    speed = torch.full((1, 64), 10.0)
    accel = torch.zeros(1, 64)
    accel[:, -1] = -0.4  # since the step before: -4 m/s^3
    assert all(ok.all() for ok in comfort_of(speed, accel, 0 * speed).values())
    accel[:, -1] = -0.5
    jolts = comfort_of(speed, accel, 0 * speed)["longitudinal jerk"]
    assert jolts[0].tolist() == [True] * 63 + [False]


def test_seeds_are_those_of_the_first_runs():
    """What nano was trained with: order of scenes, curation; noise of a process or a piece."""
    for seed, step, part in ((0, 0, 0), (0, 7, 1), (3, 12345, 2), (17, 999_999, 0)):
        assert data.seed_of(seed, step) == 1_000_003 * seed + step
        assert data.seed_of(seed, step, part) == (seed * 1_000_003 + step) * 1_003 + part


def test_is_right():
    true = data.sentence("cones", world.LEFT)
    assert data.is_right(true, true) == (True,) * 4
    other = data.sentence("parked car", world.RIGHT)
    assert data.is_right(other, true) == (True, False, False, False)
    assert data.is_right("!", true) == (False,) * 4
    assert data.is_right("", "") == (False, False, False, True)  # a clip without a label


def test_what_loops_do_to_a_scene():
    cfg = Config(cameras=(1, 6), frames=2, frame_dt=0.3)
    view = data.view_of(cfg, [32, 64])
    assert view == {"camera_ids": (1, 6), "frames": 2, "frame_dt": 0.3, "size": (32, 64)}
    scene = data.make_scenes([3, 4], **view)
    silent = data.without_route(scene)
    assert set(scene) - set(silent) == {"route"}
    assert data.without_route(silent).keys() == silent.keys()
    assert "route" in scene and scene["images"].shape == (2, 2, 2, 3, 32, 64)
    meta = data.to_device(scene, "meta")
    for key, value in scene.items():
        assert meta[key].device.type == "meta" if torch.is_tensor(value) else meta[key] is value
    assert scene["images"].device.type == "cpu"


def test_a_table():
    assert markdown([["a", 1, 2.5], ("b", "-", None)], ["x", "y", "z"]) == (
        "| x | y | z |\n| --- | ---: | ---: |\n| a | 1 | 2.5 |\n| b | - | None |"
    )
    assert markdown([], ["x", "y", "z"], left=2).splitlines()[1] == "| --- | --- | ---: |"


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError, FloatingPointError])
def test_what_a_user_can_mend_is_one_line(error):
    def fails():
        raise error("frames: expected 1 or more, not 0")

    with pytest.raises(SystemExit) as exit:
        doors.run(fails)
    message = exit.value.code
    assert message.endswith(": frames: expected 1 or more, not 0") and "\n" not in message
    assert exit.value.__suppress_context__


def test_other_errors_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        doors.run(lambda: 1 / 0)


def test_a_script_names_itself_as_users_type_it(tmp_path, monkeypatch):
    command = [sys.executable, "data.py", "--size", "63", "128", "--folder", str(tmp_path)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 1 and done.stdout == "", done.stderr
    assert done.stderr.startswith("data.py: size: ") and done.stderr.count("\n") == 1, done.stderr
    assert not os.listdir(tmp_path)

    def fails():
        raise ValueError("no")

    for page, message in (
        (SimpleNamespace(__spec__=SimpleNamespace(name="tools.label")), "tools.label: no"),
        (SimpleNamespace(__spec__=None, __file__="/home/me/sample.py"), "sample.py: no"),
    ):
        monkeypatch.setitem(sys.modules, "__main__", page)
        with pytest.raises(SystemExit, match=f"^{message}$"):
            doors.run(fails)
