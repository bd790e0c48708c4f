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


# The renderer


def at_t0(seeds, **air):
    """A world at t0, with this dusk, rain or visibility in all its scenes."""
    traffic = world.World(seeds)
    while traffic.time < 0:
        traffic.step(*traffic.expert())
    for name, value in air.items():
        getattr(traffic.scene, name)[:] = torch.as_tensor(value)
    return traffic


def alone(kind, s=18.0, d=0.0, **fields):
    """A world at t0 with one thing on an empty straight road."""
    seed = next(i for i in range(100) if world.draw(i).situation == "free" and world.draw(i).road == world.STRAIGHT)
    traffic = at_t0([seed])
    for name, value in (world.Thing(kind, s, d)._asdict() | fields).items():
        getattr(traffic.things, name)[0, 0] = torch.as_tensor(value)
    traffic.things.kind[0, 1:] = world.NOTHING
    traffic.scene.crossing[:] = traffic.scene.stop[:] = world.FAR
    return traffic


def slow_render(traffic, camera, ground, H, W):
    """
    `World.render` as one would write it down: every ray with every box, in float64. ground (n, 3, H, W) is what is
    behind the boxes. Each thing has its own colour all over, the day is clear.
    """
    boxes = {name: value.double() for name, value in world._boxes(traffic).items()}
    intrinsics, pose = world.rig_camera(camera, 2 * H, 2 * W)
    ray, origin = (world.rays(intrinsics, 2 * H, 2 * W) @ pose[:3, :3].T).double(), pose[:3, 3].double()
    images = []
    for i in range(len(ground)):
        depth, colour = torch.full((2 * H, 2 * W), math.inf, dtype=torch.double), torch.zeros(2 * H, 2 * W, 3).double()
        for centre, half, cos, sin, own in zip(*(boxes[f][i] for f in ("centre", "half", "cos", "sin", "colour"))):
            turn = torch.stack([torch.stack([cos, sin, cos * 0]), torch.stack([-sin, cos, cos * 0]), torch.eye(3).double()[2]])
            o, d = turn @ (origin - centre), ray @ turn.T
            enter, leave = torch.stack([(-half - o) / d, (half - o) / d]).sort(0).values
            near = enter.amax(-1)
            hit = (near < leave.amin(-1)) & (near > 0) & (near < depth) & (half > 0).all()
            face = ((o + near[..., None] * d) / half).abs().argmax(-1)
            shade = torch.tensor([0.8, 0.62, 1.05]).double()[face] * traffic.scene.daylight[i].double()
            fade = torch.exp(-near / 400)[..., None]
            seen = 255 * (own * shade[..., None]).clamp(max=1) * fade + 205 * (1 - fade)
            depth, colour = torch.where(hit, near, depth), torch.where(hit[..., None], seen, colour)
        behind = ground[i].permute(1, 2, 0).double().repeat_interleave(2, 0).repeat_interleave(2, 1)
        image = torch.where(depth.isfinite()[..., None], colour, behind)
        images.append(image.view(H, 2, W, 2, 3).mean((1, 3)).permute(2, 0, 1))
    return torch.stack(images)


@pytest.mark.parametrize("crowd", ["as drawn", "anywhere"])
def test_the_fast_renderer_agrees_with_a_slow_one(crowd, monkeypatch):
    monkeypatch.setattr(world, "_livery", lambda *_: None)  # things in their own colour
    seed = int(torch.randint(10**6, ()))
    traffic = at_t0(range(seed, seed + 4))
    t = traffic.things
    t.colour = torch.rand_like(t.colour)
    if crowd == "anywhere":  # also what is huge, near, or reaches behind the cameras
        t.kind = torch.randint_like(t.kind, world.CAR, len(world.PARTS))
        t.s, t.d = torch.empty_like(t.s).uniform_(-15, 60), torch.empty_like(t.d).uniform_(-12, 12)
        t.size = torch.rand_like(t.size) * torch.tensor([12, 4, 6]) + 0.1
        t.drift, t.d_end = torch.randn_like(t.drift), torch.full_like(t.d_end, 99.0)
    cameras, size = (0, 1, 6), (24, 48)
    fast = traffic.render(cameras, size)
    kinds, t.kind = t.kind, torch.zeros_like(t.kind)
    ground = traffic.render(cameras, size)
    t.kind = kinds
    assert (fast != ground).any(2).float().mean() > 0.01
    for i, camera in enumerate(cameras):
        slow = slow_render(traffic, camera, ground[:, i], *size)
        wrong = ((fast[:, i] - slow).abs() > 2).any(1).float().mean()
        assert wrong < 1.5e-3, (seed, camera, wrong)  # a ray that grazes an edge may fall to either side in float32


def test_a_scene_looks_the_same_beside_any_other(monkeypatch):
    seeds = [3, 8, 21, 34, 55, 89, 144]
    air = dict(dusk=[0, 1, 0, 0.4, 0, 0, 0.8], rain=[0, 0, 1, 0.5, 0, 0, 0], visibility=[150.0, 150, 90, 80, 50, 150, 150])
    together = at_t0(seeds, **air).render((1, 6), (32, 64))
    backwards = at_t0(seeds[::-1], **{k: v[::-1] for k, v in air.items()}).render((1, 6), (32, 64))
    assert torch.equal(together, backwards.flip(0))
    for i, seed in enumerate(seeds):
        one = at_t0([seed], **{k: v[i] for k, v in air.items()})
        assert torch.equal(one.render((1, 6), (32, 64))[0], together[i]), seed
        assert torch.equal(one.render((6,), (32, 64))[0, 0], together[i, 1]), seed
    monkeypatch.setattr(world, "CHUNK", (1, 1))  # one scene at a time
    assert torch.equal(at_t0(seeds, **air).render((1, 6), (32, 64)), together)


def pixel(traffic, part, q, camera=6, size=(64, 128)):
    """What the camera shows of the point q of the first thing's box (0 or 1), each coordinate from -1 to 1: r, g, b."""
    boxes = {name: value[0, part] for name, value in world._boxes(traffic).items()}
    x, y, z = torch.tensor(q) * boxes["half"]
    cos, sin = boxes["cos"], boxes["sin"]
    point = torch.stack([cos * x - sin * y, sin * x + cos * y, z]) + boxes["centre"]
    intrinsics, pose = world.rig_camera(camera, *size)
    uv, visible = alpamayo.project((point - pose[:3, 3]) @ pose[:3, :3], intrinsics)
    assert visible
    return traffic.render((camera,), size)[0, 0, :, int(uv[1]), int(uv[0])].int().tolist()


RED, YELLOW, BROWN = (lambda r, g, b: r > 2 * g and r > 2 * b), (lambda r, g, b: min(r, g) > 1.5 * b), (lambda r, g, b: r > 1.2 * g > 1.2 * b)
WHITE, DARK, PINK = (lambda r, g, b: min(r, g, b) > 150), (lambda r, g, b: max(r, g, b) < 80), (lambda r, g, b: r > 1.4 * b > 2 * g)


@pytest.mark.parametrize("kind, size, box, q, colour, fields", [
    ("BUMP", world.BUMP_SIZE, 0, (-1, 0, 0), YELLOW, {}),
    ("SIGN", world.SIGN_SIZE, 0, (-1, 0.55, 0.65), RED, {}),
    ("SIGN", world.SIGN_SIZE, 0, (-1, 0.55, 0.65), YELLOW, dict(signal=world.YELLOW)),
    ("LIGHT", world.LIGHT_SIZE, 0, (-1, 0, 0), YELLOW, dict(signal=world.YELLOW, s=35.0)),
    ("CAR", world.TRUCK_SIZE, 0, (-1, 0.75, -0.48), RED, dict(accel=-2.0, t_accel=-1.0, s=24.0)),
    ("CAR", world.TRUCK_SIZE, 0, (-1, 0, 0.3), WHITE, dict(colour=(0.95, 0.95, 0.95), s=24.0)),
    ("CYCLIST", world.CYCLIST_SIZE, 1, (-1, 0, 0), PINK, dict(colour=(0.95, 0.1, 0.6))),
    ("CYCLIST", world.CYCLIST_SIZE, 0, (-1, 0, -0.2), DARK, {}),
    ("DEER", world.DEER_SIZE, 0, (-1, 0, 0.5), BROWN, dict(colour=world.DEER_COLOUR)),
    ("DEER", world.DEER_SIZE, 0, (0, 1, 0.5), BROWN, dict(colour=world.DEER_COLOUR, drift=-1.0)),
    ("DEBRIS", world.DEBRIS_SIZE, 0, (-1, 0.2, 0), DARK, {}),
    ("BARRIER", world.BARRIER_SIZE, 0, (-1, 0.12, 0), RED, {}),
    ("BARRIER", world.BARRIER_SIZE, 0, (-1, 0.37, 0), WHITE, {}),
])  # fmt: skip
def test_a_kind_of_thing_is_where_project_says(kind, size, box, q, colour, fields):
    traffic = alone(getattr(world, kind), size=size, **fields)
    assert colour(*pixel(traffic, box, q)), pixel(traffic, box, q)


def test_lamps_glow_at_dusk():
    def tail(**air):
        traffic = alone(world.CAR, size=world.CAR_SIZE, colour=(0.5, 0.5, 0.5), **{k: air.pop(k) for k in ("accel", "t_accel") if k in air})
        for name, value in air.items():
            getattr(traffic.scene, name)[:] = value
        return pixel(traffic, 0, (-1, 0.7, 0.2))[0], traffic.render((1,), (32, 64)).float().mean()

    (day, bright), (dusk, dim), (braking, _) = tail(), tail(dusk=1.0), tail(dusk=1.0, accel=-2.0, t_accel=-1.0)
    assert dim < 0.75 * bright and day + 20 < dusk < braking - 60


def test_a_pedestrian_at_60_m_is_seen_in_any_air():
    for air in ({}, dict(dusk=1.0), dict(rain=1.0, visibility=80.0), dict(visibility=50.0), dict(dusk=1.0, rain=1.0, visibility=80.0)):
        images = []
        for colour in ((1.0, 0.9, 0.1), (0.6, 0.1, 0.9)):
            traffic = alone(world.PEDESTRIAN, s=60.0, size=world.PERSON_SIZE, colour=colour)
            for kind in (world.PEDESTRIAN, world.NOTHING):
                traffic.things.kind[0, 0] = kind
                for name, value in air.items():
                    getattr(traffic.scene, name)[:] = value
                images.append(traffic.render((6,), (64, 128)).int())
            assert (images[-2] - images[-1]).abs().max() > 25, (air, colour)


def test_rain_falls():
    first, same = (at_t0([5, 6], rain=1.0) for _ in range(2))
    image = first.render((1,), (64, 128))
    assert torch.equal(image, same.render((1,), (64, 128)))
    sky = image[:, 0, :, :16].int()  # of two scenes: their streaks are not in the same places
    assert (sky[0] != sky[1]).any() and (sky.amax((2, 3)) - sky.amin((2, 3))).min() > 10
    first.time += world.DT
    assert not torch.equal(first.render((1,), (64, 128))[..., :16, :], image[..., :16, :])
