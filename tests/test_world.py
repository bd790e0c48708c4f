"""The built-in world: the same everywhere, honest about causes, driven cleanly.    python -m pytest tests/test_world.py"""
import math
import os

import numpy as np
import pytest
import torch

import alpamayo
import data
import world
from alpamayo import fit_actions, initial_speed, roll_out

SMALL = dict(size=(32, 64))


@pytest.fixture(scope="module")
def scene():
    return data.make_scenes(range(24), **SMALL)


def test_a_scene_is_what_design_says(scene):
    shapes = {k: tuple(v.shape[1:]) for k, v in scene.items() if torch.is_tensor(v)}
    assert shapes == {
        "images": (4, 4, 3, 32, 64), "camera_ids": (4,), "ego_history_xyz": (16, 3), "ego_history_rot": (16, 3, 3),
        "ego_kinematics": (20, 4), "ego_future_xyz": (64, 3), "ego_future_rot": (64, 3, 3), "camera_to_ego": (4, 4, 4), "intrinsics": (4, 10),
    }  # fmt: skip
    assert scene["images"].dtype == torch.uint8 and scene["images"].float().std() > 20
    assert torch.allclose(scene["ego_history_xyz"][:, -1], torch.zeros(3), atol=1e-6)
    assert torch.allclose(scene["ego_history_rot"][:, -1], torch.eye(3).expand(24, 3, 3), atol=1e-6)
    assert (scene["ego_history_xyz"][:, 0, 0] < -5).all() and scene["camera_ids"][0].tolist() == [0, 1, 2, 6]


def test_a_seed_is_a_scene_wherever_it_stands(scene):
    alone = data.make_scenes([7], **SMALL)
    for key, value in alone.items():
        same = torch.equal(value[0], scene[key][7]) if torch.is_tensor(value) else value[0] == scene[key][7]
        assert same, key
    other = data.make_scenes([10_000_007], **SMALL)
    assert not torch.equal(other["images"], alone["images"])


def test_the_world_is_version_one():
    """What these seeds are on every machine. If this fails on purpose, raise WORLD_VERSION and write the new values."""
    scene = data.make_scenes(range(4), **SMALL)
    assert (world.WORLD_VERSION, scene["name"]) == (1, VERSION_ONE["name"])
    end = scene["ego_future_xyz"][:, -1, :2].numpy()
    np.testing.assert_allclose(end, VERSION_ONE["end"], atol=0.01)
    brightness = scene["images"].float().mean((1, 2, 3, 4, 5)).numpy()
    np.testing.assert_allclose(brightness, VERSION_ONE["brightness"], atol=0.05)


VERSION_ONE = {
    "name": ["parked car", "red light", "parked car", "cones"],
    "end": [[61.441, -0.502], [38.475, 0.16], [62.562, -0.456], [59.868, 0.545]],  # m
    "brightness": [141.787, 130.789, 137.556, 127.658],
}


def test_every_sentence_parses_back_to_its_decisions():
    for situation, (longitudinal, lateral, _) in data.CAUSES.items():
        for side in (world.LEFT, world.RIGHT):
            parsed = data.decisions(data.sentence(situation, side))
            assert parsed is not None and parsed[0] == longitudinal and parsed[1].split()[0] == lateral.split()[0]
    assert data.decisions("Cones block the left side.") is None and data.decisions("") is None
    assert data.decisions("Fly and keep lane since the road ahead is free.") is None


def corners(x, y, yaw, length, width):
    """Corners and edge midpoints (..., 8, 2) of rectangles."""
    a = torch.tensor([1.0, 1, 1, 0, 0, -1, -1, -1]) * length[..., None] / 2
    b = torch.tensor([1.0, 0, -1, 1, -1, 1, 0, -1]) * width[..., None] / 2
    c, s = torch.cos(yaw)[..., None], torch.sin(yaw)[..., None]
    return torch.stack([x[..., None] + c * a - s * b, y[..., None] + s * a + c * b], -1)


def inside(points, x, y, yaw, length, width):
    dx, dy = points[..., 0] - x[..., None], points[..., 1] - y[..., None]
    c, s = torch.cos(yaw)[..., None], torch.sin(yaw)[..., None]
    return ((c * dx + s * dy).abs() < length[..., None] / 2) & ((c * dy - s * dx).abs() < width[..., None] / 2)


def test_the_expert_hits_nothing_and_stays_on_the_road():
    traffic = world.World(range(300))
    size = torch.tensor([world.LENGTH, world.WIDTH])
    for step in range(world.PAST + world.FUTURE):
        traffic.step(*traffic.expert())
        ego_x = traffic.x + (world.FRONT - world.LENGTH / 2) * torch.cos(traffic.yaw)
        ego_y = traffic.y + (world.FRONT - world.LENGTH / 2) * torch.sin(traffic.yaw)
        t, n = traffic.things, traffic.things.s.shape[1]
        x, y, heading = world.place(t.s, t.d, traffic.scene.road[:, None])
        solid = (t.kind > 0) & (t.kind != world.LIGHT)
        ego = [v[:, None].expand(-1, n) for v in (ego_x, ego_y, traffic.yaw, size[:1].expand(300), size[1:].expand(300))]
        thing = (x, y, heading, t.size[..., 0], t.size[..., 1])
        touch = inside(corners(*thing), *ego).any(-1) | inside(corners(*ego), *thing).any(-1)
        hit = (touch & solid).any(1)
        assert not hit.any(), [(step, traffic.situations[i]) for i in hit.nonzero()[:, 0].tolist()]
        _, d, _ = world.locate(traffic.x, traffic.y, traffic.scene.route)
        assert d.abs().max() < world.LANE / 2 + 0.2  # a nudge leaves the lane's middle by 1.3 m and no more


def test_history_gives_no_answer_away(scene):
    """Before t0 nobody reacts: else a model without eyes could tell a red light from a free road."""
    quiet = torch.tensor([name != "turn" for name in scene["name"]])
    assert scene["ego_kinematics"][quiet, :, 1].abs().max() < 0.8  # m/s^2
    assert (scene["ego_kinematics"][quiet, :, 3] == 0).all()
    assert (scene["ego_kinematics"][~quiet, :, 3].abs() == 1).all()


def test_the_paths_are_what_a_unicycle_can_drive(scene):
    motion = [scene[k] for k in ("ego_history_xyz", "ego_history_rot", "ego_future_xyz", "ego_future_rot")]
    xyz, _ = roll_out(fit_actions(*motion), initial_speed(*motion[:2]))
    assert (xyz - scene["ego_future_xyz"]).norm(dim=-1).max() < 0.3  # m, after 6.4 s, through the smoothing fit


def test_the_red_lamp_is_where_project_says():
    seeds = [s for s in range(60) if world.draw(s).situation == "red light"][:4]
    traffic = world.World(seeds)
    while traffic.time < 0:
        traffic.step(*traffic.expert())
    image = traffic.render((1, 6), (64, 128))  # (n, 2, 3, H, W)
    boxes = world._boxes(traffic)
    lamp = boxes["part"] == 2 * world.LIGHT
    found = 0
    for i in range(len(seeds)):
        for j in lamp[i].nonzero()[:, 0].tolist():
            if boxes["signal"][i, j] != world.RED:
                continue
            point = boxes["centre"][i, j] + torch.tensor([-boxes["half"][i, j, 0], 0, 0.45 * boxes["half"][i, j, 2]])
            for camera, pixels in zip((1, 6), image[i]):
                intrinsics, pose = world.rig_camera(camera, 64, 128)
                uv, visible = alpamayo.project((point - pose[:3, 3]) @ pose[:3, :3], intrinsics)
                if visible:
                    r, g, b = pixels[:, int(uv[1]), int(uv[0])].tolist()
                    assert r > 2 * g and r > 2 * b, (seeds[i], camera, uv, (r, g, b))
                    found += 1
    assert found >= 4


@pytest.mark.parametrize("kind", [0.0, 1.0])
def test_rays_are_the_inverse_of_project(kind):
    intrinsics = torch.tensor([kind, 96, 40, 50.0, 18.0, *([0.0, 60, 1.5, -2, 0.3] if kind == 0 else [70.0, 65, 0, 0, 0])])
    rays = world.rays(intrinsics, 40, 96)
    uv, visible = alpamayo.project(rays * 7, intrinsics)
    v, u = torch.meshgrid(torch.arange(40) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    assert visible.all() and torch.allclose(uv, torch.stack([u, v], -1), atol=1e-3)
    behind, seen = alpamayo.project(torch.tensor([0.1, 0.1, -5.0]), intrinsics)
    assert not seen
    ahead, _ = alpamayo.project(torch.tensor([0.0, 0.0, 5.0]), intrinsics)
    assert torch.allclose(ahead, intrinsics[3:5])


def test_the_cache_is_the_world_and_appears_whole(tmp_path, monkeypatch):
    options = dict(scenes=6, folder=str(tmp_path), workers=0, **SMALL)
    made = data.load("world", split="val", **options)
    direct = data.make_scenes([10_000_004, 10_000_001], **SMALL)
    for key, value in made.batch([4, 1]).items():
        assert torch.equal(value, direct[key]) if torch.is_tensor(value) else value == direct[key], key

    def interrupted(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "_make_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load("world", split="train", **options)
    assert len(os.listdir(tmp_path)) == 1  # the whole one; nothing that looks like a set is left of the other


def test_bad_options_are_one_line():
    for call in (lambda: data.load("world", split="test"), lambda: data.load("world", scenes=0), lambda: data.make_scenes([0], frame_dt=0.25),
                 lambda: data.make_scenes([0], camera_ids=(1, 9)), lambda: data.make_scenes([0], frames=9)):  # fmt: skip
        with pytest.raises(ValueError) as error:
            call()
        assert "\n" not in str(error.value)
    assert math.isclose(world.RIG[1][2], math.radians(120))
