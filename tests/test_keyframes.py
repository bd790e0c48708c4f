"""
Motion in words and labels of one's own clips, on made-up drives.    pytest tests/test_keyframes.py

A drive is a list of phases (seconds, speed at the end in m/s, heading at the end in degrees). Both
change smoothly in between. Its poses have noise like KITTI's: the plain second difference of
positions reaches 5 m/s^2.
"""
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from alpamayo import fit_actions, initial_speed, roll_out, rot_of
from data import CAUSES, COMPONENTS, load, words_of
from doors import Json
from motion import LATERAL_META, LONGITUDINAL_META, key_frames, meta_actions, segments
from tools.label import check_reasoning, read_labels, write_labels

NOISE = (0.008, 0.001)  # m, rad


def drive(phases, speed=10.0, noise=NOISE, seed=0):
    """xyz (T, 3), rot (T, 3, 3) at 10 Hz, from the origin along x, and then noise."""
    v, yaw = [speed], [0.0]
    for seconds, faster, heading in phases:
        u = np.arange(1, round(100 * seconds) + 1) / round(100 * seconds)  # steps of 0.01 s
        ease = u * u * (3 - 2 * u)
        v += (v[-1] + (faster - v[-1]) * ease).tolist()
        yaw += (yaw[-1] + (math.radians(heading) - yaw[-1]) * ease).tolist()
    v, yaw = np.array(v), np.array(yaw)
    step = 0.01 * np.stack([v * np.cos(yaw), v * np.sin(yaw), 0 * v], -1)
    xyz, yaw = torch.from_numpy(step.cumsum(0) - step[0])[::10], torch.from_numpy(yaw)[::10]
    chance = torch.Generator().manual_seed(seed)
    xyz = xyz + noise[0] * torch.randn(xyz.shape, generator=chance, dtype=torch.float64)
    yaw = yaw + noise[1] * torch.randn(yaw.shape, generator=chance, dtype=torch.float64)
    return xyz, rot_of(yaw)


def words(xyz, rot):
    """The meta-actions in order, each once: [longitudinal], [lateral]."""
    return [[names[label] for label, _, _ in segments(labels)]
            for names, labels in zip((LONGITUDINAL_META, LATERAL_META), meta_actions(xyz, rot))]


def found(xyz, rot):
    """{kind: [seconds]}"""
    kinds = {}
    for step, names in key_frames(xyz, rot):
        for name in names:
            kinds.setdefault(name, []).append(step / 10)
    return kinds


def seed():
    return int(torch.randint(1 << 30, ()))


# With ease-in, 0.4 m/s^2 is reached about half a second into a change. Key frames are half a second
# earlier, so near its beginning.
STOP_AND_GO = [(6, 10, 0), (6, 0, 0), (5, 0, 0), (6, 10, 0), (8, 10, 0), (4, 4, 0), (3, 4, 0),
               (5, 12, 0), (6, 12, 0)]


def test_stop_and_go():
    for _ in range(10):
        xyz, rot = drive(STOP_AND_GO, seed=seed())
        raw = (xyz.diff(n=2, dim=0)[:, 0] / 0.01).abs()
        assert 3 < raw.quantile(0.99) < 8  # noise as KITTI's, and the words are calm:
        kinds = found(xyz, rot)
        assert set(kinds) == {"stop", "start", "slow down", "speed up"}, kinds
        for kind, begins in (("stop", 6), ("start", 17), ("slow down", 31), ("speed up", 38)):
            (time,) = kinds[kind]
            assert begins - 0.6 <= time <= begins + 0.6, (kind, time)
        longitudinal, lateral = words(xyz, rot)
        plain = [word.replace("gentle ", "").replace("strong ", "") for word in longitudinal]
        plain = [a for a, b in zip(plain, [None, *plain]) if a != b]
        assert plain == ["maintain speed", "decelerate", "stop", "accelerate", "maintain speed",
                         "decelerate", "maintain speed", "accelerate", "maintain speed"]
        assert lateral == ["go straight"]


def test_gentle_and_strong():
    longitudinal, _ = words(*drive([(3, 20, 0), (10, 12, 0), (4, 12, 0)], speed=20.0))
    assert longitudinal == ["maintain speed", "gentle decelerate", "maintain speed"]
    longitudinal, _ = words(*drive([(3, 20, 0), (4, 6, 0), (4, 6, 0)], speed=20.0))
    assert longitudinal == ["maintain speed", "gentle decelerate", "strong decelerate",
                            "gentle decelerate", "maintain speed"]


@pytest.mark.parametrize("side, word, other", [(1, "left", "right"), (-1, "right", "left")])
def test_turns_bends_and_ways_out_of_the_lane(side, word, other):
    xyz, rot = drive([(6, 5, 0), (6, 5, 90 * side), (6, 5, 90 * side)], speed=5.0, seed=seed())
    assert found(xyz, rot) == {f"turn {word}": [pytest.approx(5.8, abs=0.5)]}
    assert words(xyz, rot)[1] == [
        "go straight", f"steer {word}", f"sharp steer {word}", f"steer {word}", "go straight"]
    xyz, rot = drive([(6, 15, 0), (8, 15, 25 * side), (6, 15, 25 * side)], speed=15.0, seed=seed())
    assert found(xyz, rot) == {f"bend {word}": [pytest.approx(5.8, abs=0.6)]}
    assert words(xyz, rot)[1] == ["go straight", f"steer {word}", "go straight"]
    # a turn that begins with a swing to the other side
    phases = [(6, 6, 0), (2, 6, -12 * side), (5, 6, 90 * side), (6, 6, 90 * side)]
    xyz, rot = drive(phases, speed=6.0, seed=seed())
    assert found(xyz, rot) == {f"turn {word}": [pytest.approx(7.7, abs=0.5)]}
    # one lane aside at 25 m/s
    phases = [(6, 25, 0), (2.5, 25, 3.5 * side), (2.5, 25, 0), (6, 25, 0)]
    xyz, rot = drive(phases, speed=25.0, seed=seed())
    assert found(xyz, rot) == {f"leave lane {word}": [pytest.approx(5.7, abs=0.5)]}
    # around something at 8 m/s
    phases = [(6, 8, 0), (1.5, 8, 9 * side), (3, 8, -9 * side), (1.5, 8, 0), (6, 8, 0)]
    xyz, rot = drive(phases, speed=8.0, seed=seed())
    assert found(xyz, rot) == {f"leave lane {word}": [pytest.approx(5.6, abs=0.5)]}
    assert words(xyz, rot)[1] == [
        "go straight", f"steer {word}", f"steer {other}", f"steer {word}", "go straight"]


def test_braking_and_turning_at_once_is_one_key_frame():
    frames = key_frames(*drive([(6, 9, 0), (5, 4, 90), (6, 4, 90)], speed=9.0))
    assert len(frames) == 1 and frames[0][1] == ("slow down", "turn left")


@pytest.mark.parametrize("speed", [0.0, 3.0, 12.0, 30.0])
def test_noise_makes_no_storm(speed):
    """Two minutes, standing or steady, with poses as noisy as KITTI's and 2.5 times as noisy."""
    for noise in (NOISE, (0.02, 0.0025)):
        xyz, rot = drive([(120, speed, 0)], speed, noise, seed())
        assert key_frames(xyz, rot) == []
        assert words(xyz, rot) == [["maintain speed" if speed else "stop"], ["go straight"]]


def test_a_highway_wobbles_and_nothing_happens():
    """30 m/s, plus and minus 0.8 m/s in a minute, half a metre to and fro in the lane in 12 s."""
    t = torch.arange(1800, dtype=torch.float64) / 10
    x = 30 * t + 0.8 * 60 / (2 * math.pi) * torch.sin(t * 2 * math.pi / 60)
    y = 0.25 * torch.sin(t * 2 * math.pi / 12)
    yaw = torch.atan2(y.diff(append=y[-1:]), x.diff(append=x[-1:] + 3))
    xyz = torch.stack([x, y, 0 * t], -1) + NOISE[0] * torch.randn(1800, 3)
    rot = rot_of(yaw + NOISE[1] * torch.randn(1800))
    assert key_frames(xyz, rot) == []
    assert words(xyz, rot) == [["maintain speed"], ["go straight"]]


def test_reversing():
    """Out of a parking place backwards, the tail to the right, then forwards."""
    phases = [(5, 0, 0), (2, -2, 0), (4, -2, 50), (2, 0, 50), (3, 0, 50), (4, 6, 50), (5, 6, 50)]
    xyz, rot = drive(phases, 0.0, seed=seed())
    kinds = found(xyz, rot)
    assert set(kinds) == {"reverse", "stop", "start"}
    assert kinds["reverse"] == [pytest.approx(5, abs=0.6)]
    assert kinds["start"] == [pytest.approx(16, abs=0.6)]
    longitudinal, lateral = words(xyz, rot)
    assert longitudinal[:3] == ["stop", "reverse", "stop"] and "reverse" not in longitudinal[3:]
    assert lateral == ["go straight", "reverse right", "go straight"]


def test_many_at_once_are_each_alone():
    """What a reward calls: a batch of short paths, float32, in the ego frame."""
    drives = [drive(STOP_AND_GO, seed=i) for i in range(3)]
    drives.append(drive([(6, 8, 0), (7, 5, 90), (36, -1, 90)], seed=9))
    length = min(len(xyz) for xyz, _ in drives) - 80
    at = torch.randint(length, (4, 6)).tolist()
    # (4, 6, 80, 3) and (4, 6, 80, 3, 3)
    xyz = torch.stack([torch.stack([drives[i][0][a:a + 80] for a in at[i]]) for i in range(4)])
    rot = torch.stack([torch.stack([drives[i][1][a:a + 80] for a in at[i]]) for i in range(4)])
    together = meta_actions(xyz.float(), rot.float())
    assert together[0].shape == together[1].shape == (4, 6, 80)
    for i in range(4):
        for j in range(6):
            alone = meta_actions(xyz[i, j].float(), rot[i, j].float())
            assert all(torch.equal(a, b[i, j]) for a, b in zip(alone, together))


def test_the_frame_does_not_matter():
    xyz, rot = drive([*STOP_AND_GO, (5, 6, 90), (5, 6, 90)], seed=seed())
    turn = rot_of(torch.tensor(2.5, dtype=torch.float64))
    moved = xyz @ turn.T + torch.tensor([5e5, -4e6, 100.0])
    assert key_frames(moved, turn @ rot) == key_frames(xyz, rot)
    for a, b in zip(meta_actions(moved, turn @ rot), meta_actions(xyz, rot)):
        assert torch.equal(a, b)


def test_the_clock_does_not_matter():
    """A drive seen from 4 s on has the same key frames, 4 s earlier, and the same words."""
    xyz, rot = drive(STOP_AND_GO, seed=seed())
    late = xyz[40:], rot[40:]
    assert [(step + 40, kinds) for step, kinds in key_frames(*late)] == key_frames(xyz, rot)
    for whole, part in zip(meta_actions(xyz, rot), meta_actions(*late)):
        assert torch.equal(whole[50:], part[10:])


def test_a_path_of_a_model_after_its_history():
    """1.6 s of history, then 6.4 s of controls: from t0 on the words are those of the controls."""
    v0, past = 8.0, torch.arange(-15, 1) / 10
    history = torch.stack([v0 * past, 0 * past, 0 * past], -1), torch.eye(3).expand(16, 3, 3)
    for accel, curvature, long, late in (
            (0, 0, 4, 6), (1, 0, 0, 6), (-1, 0, 2, 6), (2.5, 0, 1, 6), (-3, 0, 5, 6),
            (0, 0.02, 4, 0), (0, -0.02, 4, 1), (0, 0.1, 4, 2), (0, -0.1, 4, 3)):
        accels = torch.full((64,), float(accel))
        if accel == -3:
            accels[26:], accels[26] = 0, -2.0  # to a halt and no further
        actions = torch.stack([accels, torch.full((64,), float(curvature))], -1)
        xyz, rot = roll_out(actions, torch.tensor(v0))
        path = torch.cat([history[0], xyz]), torch.cat([history[1], rot])
        longitudinal, lateral = meta_actions(*path)
        assert longitudinal[:10].tolist() == [4] * 10 and lateral[:10].tolist() == [6] * 10
        assert longitudinal[48:].tolist() == [long] * 32 and lateral[20:].tolist() == [late] * 60
        if accel == -3:
            assert longitudinal[20:38].tolist() == [3] * 18  # strong decelerate, then stop
        else:
            assert longitudinal[20:].tolist() == [long] * 60


def test_poses_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"expected xyz \(..., T, 3\) and rot \(..., T, 3, 3\)"):
        meta_actions(torch.zeros(80, 2), torch.zeros(80, 2, 2))


def test_fit_survives_noise():
    """Least-squares fits of 6.4 s on a noisy stop and go with a turn: in bounds, on the path."""
    xyz, rot = drive([*STOP_AND_GO, (5, 5, 90), (5, 10, 90)], seed=seed())
    start = torch.arange(15, len(xyz) - 65, 5)
    steps = start[:, None] + torch.arange(-15, 65)  # (B, 80)
    local = (xyz[steps] - xyz[start, None]) @ rot[start]  # in the ego frame at t0, itself noisy
    turned = rot[start].mT[:, None] @ rot[steps]
    history, future = (local[:, :16], turned[:, :16]), (local[:, 16:], turned[:, 16:])
    actions = fit_actions(*history, *future)
    assert (actions[..., 0].abs() <= 9.8).all() and (actions[..., 1].abs() <= 0.33).all()
    error = (roll_out(actions, initial_speed(*history))[0] - future[0])[..., :2].norm(dim=-1)
    assert error.median() < 0.2 and error.max() < 1.5, (error.median(), error.max())


# Labels, from outside.

def write_clip(clip, xyz, rot):
    times = np.arange(len(xyz)) / 10
    images = clip / "front_wide_120fov"
    images.mkdir(parents=True)
    for i in range(len(xyz)):
        Image.new("RGB", (32, 16), (i % 256,) * 3).save(images / f"{i:06d}.png")
    yaw = torch.atan2(rot[:, 1, 0], rot[:, 0, 0])
    motion = [times, *xyz[:, :2].T.tolist(), yaw.tolist()]
    for file, header, columns in ((images / "times.csv", "time", [times]),
                                  (clip / "egomotion.csv", "time,x,y,yaw", motion)):
        with open(file, "w", newline="") as lines:
            csv.writer(lines).writerows([header.split(","), *zip(*columns)])


def run(*arguments):
    command = [sys.executable, "-m", "tools.label", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, done.stderr


def fill(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


LIGHT = [{"component": "traffic light", "description": "the light ahead turns red",
          "uncertainty": "low"}]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A clip that stops, starts, slows down, speeds up, and the folder of its labels."""
    folder = tmp_path_factory.mktemp("labelling")
    write_clip(folder / "mine", *drive(STOP_AND_GO))
    assert run(folder / "mine", "--out", folder / "labels")[0] == 0
    return folder


def test_labels_go_round(prepared):
    clip, labels = prepared / "mine", prepared / "labels"
    frames = json.loads((labels / "keyframes.json").read_text())["key_frames"]
    kinds = [frame["kinds"] for frame in frames]
    assert kinds == [["stop"], ["start"], ["slow down"], ["speed up"]]
    assert all(frame["label"] for frame in frames)
    with Image.open(labels / "motion.png") as picture:
        assert picture.size[0] > 600
    stop, start, slow, _ = [labels / frame["label"] for frame in frames]

    # Stage 1 shows two seconds of images up to the key frame, stage 2 the six after it.
    now = round(10 * frames[0]["time"])
    for stage, ages in (("stage_1", range(-20, 1, 5)), ("stage_2", range(5, 61, 5))):
        pictures = sorted((stop / stage).glob("*.jpg"))
        # image i has the grey i
        greys = [np.array(Image.open(picture))[8, 16, 0] for picture in pictures]
        assert greys == pytest.approx([now + age for age in ages], abs=2)
    first, second = [json.loads((stop / stage / "label.json").read_text())
                     for stage in ("stage_1", "stage_2")]
    assert first["allowed"]["component"] == list(COMPONENTS)
    assert "none" in second["allowed"]["lateral"]
    assert "future" not in first and "meta_actions" not in first
    assert len(first["history"]) == 4
    assert re.match(r"\+0.0 s: speed (9.[89]|10.[0-2]) m/s, ", first["history"][-1])
    assert any("stop" in line for line in second["meta_actions"]["longitudinal"])

    code, out, err = run("--read", labels)
    assert code == 0 and "0 labels, 0 excluded, 4 to be filled in" in out, err
    assert not (clip / "reasoning.json").exists()
    text = "Stop and keep lane since the light ahead turns red."
    fill(stop / "stage_1" / "label.json", critical_components=LIGHT)
    fill(stop / "stage_2" / "label.json", exclude="no", longitudinal="stop", lateral="none",
         reasoning=text)
    fill(start / "stage_2" / "label.json", exclude="no decision")
    (clip / "reasoning.json").write_text(json.dumps([{"time": 3.0, "text": "Old."},
                                                     {"time": frames[0]["time"], "text": "Old."}]))
    code, out, err = run("--read", labels)
    assert code == 0 and "1 labels, 1 excluded, 2 to be filled in" in out, err
    clips = load(clip)
    assert clips.reasoning == ["Old.", text]
    assert clips.batch([1])["reasoning"] == [text]
    # A second search keeps what was filled in.
    assert run(clip, "--out", labels)[0] == 0
    assert json.loads((stop / "stage_2" / "label.json").read_text())["reasoning"] == text


def light(**fields):
    return {"critical_components": [LIGHT[0] | fields]}


@pytest.mark.parametrize("first, second, message", [
    ({"critical_components": []}, {},
     "stage_1/label.json: field critical_components is [], expected one or more"),
    ({}, {"exclude": "yes"},
     "stage_2/label.json: field exclude is 'yes', expected one of no, unsafe, no decision"),
    ({}, {"exclude": None},
     "stage_2/label.json: field exclude is None, expected one of no, unsafe, no decision"),
    ({}, {"longitudinal": "brake"}, "longitudinal is 'brake', expected one of yield, stop, follow"),
    ({}, {"lateral": None}, "lateral is None, expected one of keep lane"),
    ({}, {"longitudinal": "none", "lateral": "none"},
     "field lateral is 'none', expected one decision"),
    ({}, {"longitudinal": "yield"}, 'expected a line "Yield and keep lane since <reasons>."'),
    ({}, {"longitudinal": ["stop"]}, "longitudinal is ['stop'], expected one of"),
    ({}, {"reasoning": None},
     'reasoning is None, expected a line "Stop and keep lane since <reasons>."'),
    ({}, {"reasoning": "The light is red."},
     'expected a line "Stop and keep lane since <reasons>."'),
    ({}, {"reasoning": "Stop and keep lane since ."},
     'expected a line "Stop and keep lane since <reasons>."'),
    ({}, {"reasoning": "Stop and keep lane since a pedestrian crosses at the light."},
     "names, not 'pedestrian'"),
    ({}, {"reasoning": "Stop and keep lane since one must."},
     "expected words of the critical_components"),
    (light(component="lamp"), {},
     "critical_components[0].component is 'lamp', expected one of critical object, tr"),
    (light(uncertainty=0.5), {},
     "critical_components[0].uncertainty is 0.5, expected one of low, high"),
    (light(description=" "), {}, "critical_components[0].description is ' ', expected a few words"),
    ({"critical_components": ["a light"]}, {},
     "critical_components must be a list of objects"),
    ({"critical_components": "a light"}, {}, "critical_components must be a list of objects"),
])
def test_a_wrong_label_is_told_in_a_line(prepared, tmp_path, first, second, message):
    frames = json.loads((prepared / "labels" / "keyframes.json").read_text())
    label = frames["key_frames"][3]["label"]
    good = {"exclude": "no", "longitudinal": "stop", "lateral": "keep lane",
            "reasoning": "Stop and keep lane since the light ahead turns red."}
    for stage, fields in (("stage_1", light() | first), ("stage_2", good | second)):
        folder = tmp_path / label / stage
        folder.mkdir(parents=True)
        original = prepared / "labels" / label / stage / "label.json"
        (folder / "label.json").write_text(original.read_text())
        fill(folder / "label.json", **fields)
    frames["key_frames"] = frames["key_frames"][3:]
    (tmp_path / "keyframes.json").write_text(json.dumps(frames | {"clip": str(prepared / "mine")}))
    with pytest.raises(ValueError) as error:
        read_labels(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "reasoning.json").exists()


LAMP = ("traffic light", "the tram signal on the left is lit")


@pytest.mark.parametrize("component, reason", [
    (LAMP, "a car ahead has stopped"),
    (LAMP, "a tram comes from the left"),
    (LAMP, "the traffic ahead is dense"),
    (("critical object", "the brake lights of the van ahead are on"), "the light ahead turns red"),
    (("critical object", "a school bus stands on the right"), "a child crosses from the right"),
    (("critical object", "a parked car on the right"), "a truck blocks the lane"),
    (("yield or stop control", "a speed limit sign of 30"), "a stop sign stands ahead"),
    (("lane or lane lines", "the lane ahead is free"), "the route turns left ahead"),
    (("road event", "light rain, the road is wet"), "the light is red"),
    (("critical object", "a cyclist beside the crosswalk"), "a pedestrian crosses from the left"),
    (("road event", "the road bends left ahead"), "a speed bump lies ahead"),
    (("critical object", "a woman on the left side of the road waits"), "a deer stands ahead"),
    (("ODD constraint", "thick fog, nothing to be seen ahead"), "one must slow down ahead"),
    (("routing intent", "straight on at the next junction"), "an ostrich must cross from the left"),
])  # fmt: skip
def test_an_invention_is_refused(component, reason):
    with pytest.raises(ValueError, match="expected (only what|words of) [^\n]*$"):
        check(component, reason)


@pytest.mark.parametrize("component, reason", [
    (LAMP, "the light on the left is lit"),
    (("critical object", "a grey car 30 m ahead has stopped"), "the car ahead has stopped"),
    (("critical object", "two trucks ahead, brake lights on"), "the vehicles ahead are slow"),
    (("critical object", "a boy runs onto the street"), "a child crosses from the right"),
    (("critical object", "construction worker with a flag"), "people stand in the lane"),
    (("yield or stop control", "octagonal, red"), "a sign asks for it"),
    (("yield or stop control", "a stop sign and a stop line"), "a stop sign stands ahead"),
    (("routing intent", "left at the next junction"), "the route turns left at the junction"),
    (("road event", "heavy snow"), "the snow hides the lane"),
    (("lane or lane lines", "our lane, free for 100 m"), "the road ahead is free"),
    (("critical object", "cones on the right side of the lane"), "cones block the right side of the lane"),
    (("critical object", "a deer beside the road"), "a deer crosses from the left"),
    (("road event", "the road bends to the right"), "the road bends right ahead"),
    (("critical object", "an oncoming car with its turn signal on"), "a car signals to the left"),
    (("critical object", "a pedestrian is crossing from the left"), "a pedestrian crosses"),
])  # fmt: skip
def test_an_honest_trace_passes(component, reason):
    check(component, reason)


def check(component, reason):
    name, description = component
    components = [{"component": name, "description": description, "uncertainty": "low"}]
    text = f"Stop and keep lane since {reason}."
    first = Json("label.json", {"critical_components": components})
    check_reasoning(Json("label.json", {"reasoning": text}), ("stop", "keep lane"), first)


def test_each_cause_of_the_world_names_its_thing():
    for cause in CAUSES:
        words = words_of(cause, 1)
        check((words.component, words.reason), words.reason)


@pytest.fixture
def filled(prepared, tmp_path):
    """Labels of which the first is filled in, and a clip of its own for them."""
    pictures = shutil.ignore_patterns("*.jpg", "*.png")
    shutil.copytree(prepared / "labels", tmp_path / "labels", ignore=pictures)
    (tmp_path / "clip").mkdir()
    shutil.copy(prepared / "mine" / "egomotion.csv", tmp_path / "clip")
    listed = json.loads((tmp_path / "labels" / "keyframes.json").read_text())
    fill(tmp_path / "labels" / "keyframes.json", clip=str(tmp_path / "clip"))
    label = tmp_path / "labels" / listed["key_frames"][0]["label"]
    fill(label / "stage_1" / "label.json", critical_components=LIGHT)
    fill(label / "stage_2" / "label.json", exclude="no", longitudinal="stop", lateral="none",
         reasoning="Stop and keep lane since the light ahead turns red.")  # fmt: skip
    return tmp_path


def test_what_is_filled_in_is_read(filled):
    (line,) = read_labels(filled / "labels")
    assert ": 1 labels, " in line and "; 1 in " in line
    assert "turns red" in (filled / "clip" / "reasoning.json").read_text()


@pytest.mark.parametrize("damage, message", [
    (dict(clip="clip"), "keyframes.json: field clip is 'clip', expected the absolute path of a clip"),
    (dict(clip=["/"]), "keyframes.json: field clip is .*, expected text"),
    (dict(clip=None), "keyframes.json: field clip is null"),
    (dict(clip="/"), "keyframes.json: clip is /, where no clip is any more"),
    (dict(clip="/\ud800"), "keyframes.json: field clip is .*, expected text"),
    (dict(clip="/\0"), "keyframes.json: clip is .*, where no clip is any more"),
    (dict(key_frames=None), "keyframes.json: field key_frames is null"),
    (dict(key_frames={}), "keyframes.json: key_frames must be a list of objects"),
    (dict(key_frames=["0006.0"]), "keyframes.json: key_frames must be a list of objects"),
    (dict(time="6"), r"keyframes.json: field key_frames\[3\].time is '6', expected a number"),
    (dict(time=None), r"keyframes.json: field key_frames\[3\].time is null"),
    (dict(time=True), r"keyframes.json: field key_frames\[3\].time is True, expected a number"),
    (dict(time=[6]), r"keyframes.json: field key_frames\[3\].time is \[6\], expected a number"),
    (dict(label="../labels/0006.0"), r"keyframes.json: field key_frames\[3\].label is '../labels/0006.0', expected a file in"),
    (dict(label="/tmp"), r"key_frames\[3\].label is '/tmp', expected a file in"),
    (dict(label=6), r"key_frames\[3\].label is 6, expected text"),
    (dict(label=["a"]), r"key_frames\[3\].label is \['a'\], expected text"),
    (dict(label="elsewhere"), "elsewhere/stage_1/label.json: missing"),
    (dict(label="x" * 300), "File name too long"),
])  # fmt: skip
def test_damaged_keyframes_are_one_line_and_nothing_is_written(filled, damage, message):
    file = filled / "labels" / "keyframes.json"
    listed = json.loads(file.read_text())
    of_file = {"clip", "key_frames"} & set(damage)
    (listed if of_file else listed["key_frames"][3]).update(damage)
    file.write_text(json.dumps(listed))
    refused(filled, message)


@pytest.mark.parametrize("stage, text, message", [
    (1, "[" * 100_000, "stage_1/label.json: not JSON: nested too deep"),
    (1, '{"critical_components": NaN}', "stage_1/label.json: not JSON: NaN is no number"),
    (1, '{"critical_components": [{"component": ["a"]}]}', "component is ..a.., expected one of"),
    (1, json.dumps({"critical_components": "x" * 10**6}), "critical_components must be a list"),
    (2, '{"exclude": "no", "longitudinal": {}, "lateral": "none", "reasoning": ""}', "longitudinal is {}, expected"),
    (2, '{"exclude": ["no"], "longitudinal": 1, "lateral": 1, "reasoning": 1}', "exclude is ..no.., expected one of"),
    (2, b"\xff\xfe{", "stage_2/label.json: expected text in UTF-8"),
    (2, "", "stage_2/label.json: not JSON"),
])  # fmt: skip
def test_damaged_labels_are_one_line_and_nothing_is_written(filled, stage, text, message):
    listed = json.loads((filled / "labels" / "keyframes.json").read_text())["key_frames"]
    file = filled / "labels" / listed[1]["label"] / f"stage_{stage}" / "label.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(filled, message)


def refused(filled, message):
    with pytest.raises((ValueError, OSError), match=message) as error:
        read_labels(filled / "labels")
    assert "\n" not in str(error.value) and len(str(error.value)) < 800
    assert not (filled / "clip" / "reasoning.json").exists()


def test_nothing_is_written_where_one_of_two_clips_is_wrong(filled):
    """Nor is a text lost where two folders of labels are of the same clip."""
    shutil.copytree(filled / "labels", filled / "labels" / "more")
    shutil.copytree(filled / "clip", filled / "other")
    fill(filled / "labels" / "more" / "keyframes.json", clip=str(filled / "other"))
    (filled / "other" / "reasoning.json").write_text("{")
    refused(filled, "other/reasoning.json: not JSON")
    fill(filled / "labels" / "more" / "keyframes.json", clip=str(filled / "clip"))
    more = filled / "labels" / "more" / "keyframes.json"
    listed = json.loads(more.read_text())
    listed["key_frames"][0]["time"] += 1
    more.write_text(json.dumps(listed))
    read_labels(filled / "labels")
    assert len(json.loads((filled / "clip" / "reasoning.json").read_text())) == 2


def test_labels_need_one_more_package(prepared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        write_labels(prepared / "mine", tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


def test_broken_label_files_are_all_told(prepared, tmp_path):
    frames = json.loads((prepared / "labels" / "keyframes.json").read_text())
    for frame in frames["key_frames"]:
        for stage in ("stage_1", "stage_2"):
            (tmp_path / frame["label"] / stage).mkdir(parents=True)
            (tmp_path / frame["label"] / stage / "label.json").write_text(
                (prepared / "labels" / frame["label"] / stage / "label.json").read_text())
    (tmp_path / "keyframes.json").write_text(json.dumps(frames | {"clip": str(prepared / "mine")}))
    labels = [tmp_path / frame["label"] for frame in frames["key_frames"]]
    (labels[1] / "stage_1" / "label.json").write_text("{")
    (labels[2] / "stage_2" / "label.json").write_text("[]")
    (labels[3] / "stage_2" / "label.json").write_text('{"exclude": "no"}')
    code, _, err = run("--read", tmp_path)
    lines = err.strip().splitlines()
    assert code == 1 and len(lines) == 3 and "Traceback" not in err
    assert "stage_1/label.json: not JSON" in lines[0]
    assert "stage_2/label.json: expected an object" in lines[1]
    assert "stage_2/label.json: field longitudinal is None, expected to be there" in lines[2]
    (labels[0] / "stage_1" / "label.json").unlink()
    with pytest.raises(ValueError, match="stage_1/label.json: missing"):
        read_labels(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing: no keyframes.json in it"):
        read_labels(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="nothing: no ego motion in it"):
        write_labels(tmp_path / "nothing", tmp_path)
    with pytest.raises(ValueError, match="labels do not go into the clip's own folder"):
        write_labels(prepared / "mine", prepared / "mine" / "labels")
    (tmp_path / "keyframes.json").write_text(json.dumps(frames | {"clip": str(tmp_path / "gone")}))
    gone = "keyframes.json: clip is .*gone, where no clip is any more"
    with pytest.raises(FileNotFoundError, match=gone):
        read_labels(tmp_path)
    (tmp_path / "keyframes.json").write_text("[]")
    with pytest.raises(ValueError, match="keyframes.json: expected an object of named fields"):
        read_labels(tmp_path)
    (tmp_path / "keyframes.json").write_text("{}")
    with pytest.raises(ValueError, match="keyframes.json: field clip is missing"):
        read_labels(tmp_path)


def test_a_clip_too_short_to_learn_from(tmp_path):
    write_clip(tmp_path / "mine", *drive([(4, 10, 0), (6, 4, 0)]))
    (_, [frame]), = write_labels(tmp_path / "mine", tmp_path / "labels")
    assert frame["label"] is None and "too short for t0" in frame["why"]
