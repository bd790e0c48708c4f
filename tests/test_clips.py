"""
Real clips: the three readers of clips.py, on small clips made here.    pytest tests/test_clips.py

Every clip drives one arc: 8 m/s, radius 50 m to the left. Its images are plain, image i has the
grey 2 * i.
"""
import csv
import io
import json
import math
import os
import shutil
import socket
import sys
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from alpamayo import project
from clips import Motion, rotation
from data import load
from doors import read_image
from world import RIG

SPEED, RADIUS = 8.0, 50.0
TIMES = np.round(np.arange(0, 10, 0.097), 6)  # s, of poses and images: not those of a Scene
# camera_to_ego of a camera that looks ahead
LEVEL = [[0, 0, 1, 1.6], [-1, 0, 0, 0.0], [0, -1, 0, 1.5], [0, 0, 0, 1]]


def arc(t):
    """x, y, yaw of the rear axle, t seconds after the start."""
    angle = SPEED / RADIUS * t
    return RADIUS * np.sin(angle), RADIUS * (1 - np.cos(angle)), angle


def pinhole(width, height, focal):
    return {"kind": "pinhole", "width": width, "height": height, "cx": width / 2, "cy": height / 2,
            "coefficients": [focal, focal], "camera_to_ego": LEVEL}


def write_csv(file, header, *columns):
    with open(file, "w", newline="") as lines:
        csv.writer(lines).writerows([header.split(","), *zip(*columns)])


def write_images(folder, count, size=(32, 16)):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", size, (2 * i,) * 3).save(folder / f"{i:06d}.png")


@pytest.fixture
def folder(folder_original, tmp_path):
    return shutil.copytree(folder_original, tmp_path / "mine")


@pytest.fixture(scope="module")
def folder_original(tmp_path_factory):
    """A folder of one's own: a wide and a tele camera."""
    clip = tmp_path_factory.mktemp("clips") / "mine"
    for camera in ("front_wide_120fov", "front_tele_30fov"):
        write_images(clip / camera, len(TIMES))
        write_csv(clip / camera / "times.csv", "time", TIMES)
    write_csv(clip / "egomotion.csv", "time,x,y,yaw", TIMES, *arc(TIMES))
    (clip / "cameras.json").write_text(json.dumps({"front_wide_120fov": pinhole(32, 16, 16.0),
                                                   "front_tele_30fov": pinhole(32, 16, 60.0)}))
    return clip


@pytest.fixture
def kitti(tmp_path):
    """A drive of KITTI's. Its unit is 0.52 m ahead of the rear axle, 0.31 m left, 0.92 m up."""
    clip = tmp_path / "2011_09_26_drive_0000_sync"
    x, y, yaw = arc(TIMES)
    east = x + 0.52 * np.cos(yaw) - 0.31 * np.sin(yaw)
    north = y + 0.52 * np.sin(yaw) + 0.31 * np.cos(yaw)
    latitude = math.radians(49)
    scale = 6378137 * math.cos(latitude)
    north = north + scale * math.log(math.tan(math.pi / 4 + latitude / 2))
    longitude = np.degrees(east / scale)
    latitude = np.degrees(2 * np.arctan(np.exp(north / scale)) - math.pi / 2)
    write_images(clip / "image_02" / "data", len(TIMES), size=(124, 37))
    (clip / "oxts" / "data").mkdir(parents=True)
    for i in range(len(TIMES)):
        row = np.zeros(30)
        row[[0, 1, 2, 5, 8]] = latitude[i], longitude[i], 100.92, yaw[i], SPEED
        text = " ".join(f"{value:.14g}" for value in row)
        (clip / "oxts" / "data" / f"{i:010d}.txt").write_text(text)
    stamps = "".join(f"2011-09-26 13:02:{25 + t:012.9f}\n" for t in TIMES)
    for sensor in ("oxts", "image_02"):
        (clip / sensor / "timestamps.txt").write_text(stamps)
    return clip


def check_arc(scene, tolerance):
    """All Scenes of a clip on this arc have the same motion, whatever their t0."""
    for key, steps in (("history", np.arange(-15, 1)), ("future", np.arange(1, 65))):
        x, y, yaw = arc(0.1 * steps)
        xyz, rot = scene[f"ego_{key}_xyz"], scene[f"ego_{key}_rot"]  # (B, T, 3), (B, T, 3, 3)
        wanted = torch.from_numpy(np.stack([x, y, 0 * x], -1)).float()
        assert torch.allclose(xyz, wanted.expand_as(xyz), atol=tolerance)
        heading = torch.atan2(rot[..., 1, 0], rot[..., 0, 0])
        assert torch.allclose(heading, torch.from_numpy(yaw).float().expand_as(heading), atol=1e-4)
    wanted = torch.tensor([SPEED, 0, math.atan(2.8 / RADIUS), 0])
    kinematics = scene["ego_kinematics"]
    assert torch.allclose(kinematics, wanted.expand(kinematics.shape), atol=0.02)


def last_image(t):
    """The number of the last image at or before t."""
    return int(np.searchsorted(TIMES, t + 1e-7, side="right") - 1)


def test_a_cubic_is_its_own_spline_and_turning_is_even():
    """At irregular times, up to the ends ("not-a-knot"); slerp about a slanted axis."""
    times = np.cumsum(np.random.default_rng(0).uniform(0.05, 0.2, 12))
    t = np.linspace(times[0], times[-1], 50)

    def cubic(t):
        return np.stack([t**3, t - t**2, 1 + 0 * t], -1)

    slanted = rotation(*np.array([[0.4], [0.3], [0.2]]))  # (1, 3, 3)
    motion = Motion("poses", times, cubic(times), slanted @ rotation(times, 0 * times, 0 * times))
    xyz, rot, velocity = motion.pose(t)
    assert np.allclose(xyz, cubic(t), rtol=0, atol=1e-12)
    assert np.allclose(velocity, np.stack([3 * t**2, 1 - 2 * t, 0 * t], -1), rtol=0, atol=1e-11)
    assert np.allclose(rot, slanted @ rotation(t, 0 * t, 0 * t), rtol=0, atol=1e-12)


def test_yaw_pitch_and_roll():
    yaw, pitch, roll = 0.4, 0.3, 0.2
    (rot,) = rotation(*np.array([[yaw], [pitch], [roll]]))
    forward = [math.cos(yaw) * math.cos(pitch), math.sin(yaw) * math.cos(pitch), -math.sin(pitch)]
    assert np.allclose(rot[:, 0], forward)  # a positive pitch is nose down
    assert np.allclose(rot[2], [forward[2], math.cos(pitch) * math.sin(roll),
                                math.cos(pitch) * math.cos(roll)])  # left side up
    assert np.allclose(rot @ rot.T, np.eye(3)) and np.linalg.det(rot) == pytest.approx(1)


def test_kinematics_know_nothing_of_what_follows():
    """The car speeds up from t0 on: its acceleration at t0 is still none."""
    times = np.arange(100) / 10
    later = np.maximum(times - 5, 0)
    x = 8 * times + 2 * later**2
    motion = Motion("poses", times, np.stack([x, 0 * x, 0 * x], -1), rotation(*[0 * x] * 3))
    assert abs(motion.kinematics(5.0)[-1, 1]) < 0.5 and motion.kinematics(5.6)[-1, 1] > 3.5


def test_folder_recovers_the_arc_and_takes_the_last_image(folder):
    clips = load(folder)
    assert len(clips) == len(clips.names) == len(clips.reasoning) == 4  # each half second from 2 s
    scene = clips.batch(range(4))
    check_arc(scene, 1e-3)
    assert scene["images"].shape == (4, 2, 4, 3, 16, 32)
    assert scene["camera_ids"].tolist() == [[1, 6]] * 4
    for b, t0 in enumerate((2.0, 2.5, 3.0, 3.5)):
        wanted = [2 * last_image(t0 - age) for age in (0.3, 0.2, 0.1, 0.0)]
        assert scene["images"][b, 0, :, 0, 0, 0].tolist() == wanted
    exact = load(folder, t0=TIMES[30], frames=1).batch([0])  # an image of that very time is taken
    assert exact["images"][0, 0, 0, 0, 0, 0] == 60


def test_folder_options(folder):
    wide = load(folder, t0=[2, 2.25], camera_ids=[1], frames=2, frame_dt=0.5).batch([1])
    assert wide["images"].shape == (1, 1, 2, 3, 16, 32)
    assert wide["images"][0, 0, :, 0, 0, 0].tolist() == [2 * last_image(1.75), 2 * last_image(2.25)]
    late = load(folder, t0=8, future=False).batch([0])
    assert "ego_future_xyz" not in late and "ego_history_xyz" in late
    early = load(folder, t0=1.7).batch([0])  # less than 1.9 s before it: values repeat
    check_arc(early, 1e-3)


def test_folder_with_all_there_may_be(folder):
    zero = 0 * TIMES
    write_csv(folder / "egomotion.csv", "time,x,y,yaw,z,speed,turn_signal",
              TIMES, *arc(TIMES), zero, zero + 7, np.where(TIMES > 2.5, 1, 0))
    (folder / "reasoning.json").write_text(json.dumps([{"time": 3.0, "text": "Turn left."}]))
    clips = load(folder)
    assert clips.names == ["mine at 3.0 s"] and clips.reasoning == ["Turn left."]
    kinematics = clips.batch([0])["ego_kinematics"][0]
    assert kinematics[:, 0].tolist() == [7.0] * 20
    assert kinematics[:, 3].tolist() == [0.0] * 15 + [1.0] * 5
    (folder / "cameras.json").unlink()
    assert "intrinsics" not in load(folder).batch([0])


def test_files_named_in_times_csv(folder):
    names = [f"{i:06d}.png" for i in range(len(TIMES))]
    write_csv(folder / "front_wide_120fov" / "times.csv", "file,time", names[::-1], TIMES)
    scene = load(folder, t0=3, frames=1).batch([0])
    assert scene["images"][0, 0, 0, 0, 0, 0] == 2 * (len(TIMES) - 1 - last_image(3.0))


def test_kitti_recovers_the_arc(kitti):
    scene = load(kitti).batch([0, 2])
    check_arc(scene, 5e-3)
    assert scene["camera_ids"].tolist() == [[1], [1]]
    assert scene["images"].shape == (2, 1, 4, 3, 37, 124)
    kind, width, height, cx, cy, fx, fy = scene["intrinsics"][0, 0, :7].tolist()
    assert (kind, width, height) == (1, 124, 37)
    assert fx == pytest.approx(721.5377 * 124 / 1242) and cx == pytest.approx(610.0593 * 124 / 1242)
    assert fy == pytest.approx(721.5377 * 37 / 375) and cy == pytest.approx(173.354 * 37 / 375)
    assert scene["images"][0, 0, -1, 0, 0, 0] == 2 * last_image(2.0)


def test_kitti_reads_its_calibration(kitti):
    (kitti.parent / "calib_cam_to_cam.txt").write_text(
        "S_rect_02: 124 37\nP_rect_02: 70 0 60 0 0 71 18 0 0 0 1 0\n")
    intrinsics = load(kitti).batch([0])["intrinsics"][0, 0]
    assert intrinsics.tolist() == [1, 124, 37, 60.5, 18.5, 70, 71, 0, 0, 0]


def test_kitti_reads_reasoning(kitti):
    (kitti / "reasoning.json").write_text(json.dumps([{"time": 3.0, "text": "Turn left."}]))
    clips = load(kitti)
    assert clips.names == [f"{kitti.name} at 3.0 s"] and clips.reasoning == ["Turn left."]


def test_rig_puts_a_point_where_project_says(folder):
    """A bright square in the wide camera's images is where the rig's cameras see its direction."""
    point = torch.tensor([20.0, -1.6, 2.6])  # m, ego frame
    width, height, focal = 320, 160, 160.0
    known = {"front_wide_120fov": pinhole(width, height, focal)}
    (folder / "cameras.json").write_text(json.dumps(known))
    for file in (folder / "front_tele_30fov").iterdir():
        file.unlink()
    (folder / "front_tele_30fov").rmdir()
    pose = torch.tensor(LEVEL, dtype=torch.float32)
    lens = torch.tensor([1, width, height, width / 2, height / 2, focal, focal, 0, 0, 0.0])
    (u, v), visible = project((point - pose[:3, 3]) @ pose[:3, :3], lens)
    assert visible
    picture = np.zeros((height, width, 3), np.uint8)
    picture[int(v) - 2:int(v) + 3, int(u) - 2:int(u) + 3] = 255
    for file in (folder / "front_wide_120fov").glob("*.png"):
        Image.fromarray(picture).save(file)

    scene = load(folder, rig=RIG, size=(64, 128)).batch([0])
    assert scene["camera_ids"].tolist() == [[1, 6]]
    assert scene["images"].shape == (1, 2, 4, 3, 64, 128)
    for camera in range(2):
        pose = scene["camera_to_ego"][0, camera]
        assert pose[:3, 3].tolist() == pytest.approx([1.6, 0.0, 1.5])  # where the real camera is
        (u, v), _ = project((point - pose[:3, 3]) @ pose[:3, :3], scene["intrinsics"][0, camera])
        image = scene["images"][0, camera, -1, 0].float()  # (64, 128)
        rows, columns = torch.arange(64) + 0.5, torch.arange(128) + 0.5
        assert abs((image.sum(0) * columns).sum() / image.sum() - u) < 0.7
        assert abs((image.sum(1) * rows).sum() / image.sum() - v) < 0.7


def test_the_same_camera_comes_before_all_others(folder):
    for file in (folder / "front_tele_30fov").glob("*.png"):
        Image.new("RGB", (32, 16), (0, 200, 0)).save(file)
    for file in (folder / "front_wide_120fov").glob("*.png"):
        Image.new("RGB", (32, 16), (200, 0, 0)).save(file)
    scene = load(folder, rig=RIG, size=(64, 128), camera_ids=[0, 1, 2, 6], t0=3).batch([0])
    left, wide, right, tele = scene["images"][0, :, -1]  # (3, 64, 128) each
    red, green, black = [200, 0, 0], [0, 200, 0], [0, 0, 0]
    assert wide[:, 32, 64].tolist() == red and tele[:, 32, 64].tolist() == green
    assert wide[:, 0, 0].tolist() == black  # outside of both
    assert tele[:, 0, 0].tolist() == red  # outside of the tele
    assert left[:, 32, 0].tolist() == black and left[:, 32, 100].tolist() == red  # 115 and 21 deg
    assert right[:, 32, 127].tolist() == black and right[:, 32, 27].tolist() == red


def spoil(name, old, new):
    """A change to a text file of the clip."""
    def change(clip):
        text = (clip / name).read_text()
        assert old in text
        (clip / name).write_text(text.replace(old, new, 1))
    return change


def remove(name):
    return lambda clip: (clip / name).unlink()


def rewrite(name, text):
    return lambda clip: (clip / name).write_text(text)


def rename(old, new):
    return lambda clip: (clip / old).rename(clip / new)


def empty(folder):
    return lambda clip: [file.unlink() for file in (clip / folder).iterdir()]


WIDE = "front_wide_120fov"


@pytest.mark.parametrize("change, options, message", [
    (remove("egomotion.csv"), {},
     "no ego motion in it, expected one of features.csv, oxts, egomotion.csv"),
    (spoil("egomotion.csv", "yaw", "heading"), {},
     r"egomotion.csv: header is time,x,y,heading; expected time,x,y,yaw"),
    (rewrite("egomotion.csv", ""), {}, "egomotion.csv: header is ; expected"),
    (spoil("egomotion.csv", "0.097,", "0.0,"), {},
     "egomotion.csv: times must increase, but 0.0 s is"),
    (spoil("egomotion.csv", "\n0.0,0.0,", "\n0.0,nan,"), {},
     "egomotion.csv: x in line 2 is 'nan', expected a finite number"),
    (spoil("egomotion.csv", "\n0.0,0.0,", "\n0.0,zero,"), {},
     "egomotion.csv: x in line 2 is 'zero', expected a finite number"),
    (spoil("egomotion.csv", "\n0.0,0.0,", "\n0.0,"), {},
     "egomotion.csv: line 2 has 3 fields, the header 4"),
    (rewrite("egomotion.csv", "time,x,y,yaw\n0,0,0,0\n"), {},
     "egomotion.csv: 1 poses, expected 4 or more"),
    (rewrite("egomotion.csv", "time,x,y,yaw\n0,0,0,0\n.1,1,0,0\n.2,2,0,0\n.3,3,0,0\n"), {},
     "egomotion.csv: too short for t0 = 2 s, which needs poses from 0.399 to 8.4 s; there are 0 "
     "to 0.3 s"),
    (None, {"t0": 1.6}, "egomotion.csv: too short for t0 = 1.6 s, .* from -0.001 to 8 s"),
    (None, {"t0": 9},
     "too short for t0 = 9 s, which needs poses from 7.399 to 15.4 s; there are 0 to 9.991 s"),
    (None, {"t0": 3, "frames": 4, "frame_dt": 1.5},
     f"{WIDE}/times.csv: too short .* needs images from -1.5 to 3 s; there are 0 to 9.991 s"),
    (None, {"camera_ids": [0, 1]}, r"mine: has the cameras \[1, 6\], not \[0, 1\]"),
    (None, {"size": (64, 128)}, "rig and size go together"),
    (None, {"rig": RIG, "size": (64, 128), "camera_ids": [4]},
     r"camera_ids: the rig has the cameras .*, not 4"),
    (rename(WIDE, "front"), {},
     r"front: unknown camera, expected one of cross_left_120fov, front_wide_120fov"),
    (remove(f"{WIDE}/times.csv"), {}, "times.csv"),
    (remove(f"{WIDE}/000003.png"), {}, r"front_wide_120fov/times.csv: 104 times for 103 images"),
    (rewrite(f"{WIDE}/times.csv", "when\n1\n"), {}, "times.csv: header is when; expected time"),
    (rewrite(f"{WIDE}/000020.png", "not a picture"), {}, "000020.png: not a readable image"),
    (lambda clip: Image.new("RGB", (8, 8)).save(clip / WIDE / "000020.png"), {},
     r"images and calibration must have one width and height, not \[\(8, 8\), \(32, 16\)\]"),
    (rewrite("cameras.json", "{"), {}, "cameras.json: not JSON"),
    (rename("cameras.json", "other.json"), {"rig": RIG, "size": (64, 128)},
     "a rig needs calibrated cameras"),
    (rewrite("cameras.json", '{"front_wide_120fov": {"kind": "fisheye"}}'), {},
     "cameras.json: field front_tele_30fov.kind is missing"),
    (spoil("cameras.json", '"cx"', '"x"'), {},
     "cameras.json: field front_wide_120fov.cx is missing"),
    (spoil("cameras.json", "[16.0, 16.0]", "[16.0]"), {},
     "front_wide_120fov: expected 2 coefficients and a camera_to_ego of 4 x 4"),
    (spoil("cameras.json", '"width": 32', '"width": 64'), {},
     r"images and calibration must have one width and height, not .*\(64.0, 16.0\)"),
    (rewrite("reasoning.json", '[{"t": 3}]'), {}, r"reasoning.json: field \[0\].time is missing"),
])
def test_folder_says_in_a_line_what_is_wrong(folder, change, options, message):
    if change:
        change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        clips = load(folder, **options)
        clips.batch(range(len(clips)))
    assert "\n" not in str(error.value)


def test_cameras_of_several_sizes_are_scaled_into_that_of_the_wide_one(folder):
    """A point is where `project` says in the scaled image too; black is around it."""
    known = {"front_wide_120fov": pinhole(32, 16, 16.0), "front_tele_30fov": pinhole(96, 96, 90.0)}
    (folder / "cameras.json").write_text(json.dumps(known))
    picture = np.full((96, 96, 3), 80, np.uint8)
    picture[24:30, 60:66] = 255
    for i in range(len(TIMES)):
        Image.fromarray(picture).save(folder / "front_tele_30fov" / f"{i:06d}.png")
    scene = load(folder).batch([0])
    assert scene["images"].shape == (1, 2, 4, 3, 16, 32)
    image = scene["images"][0, 1, -1, 0].float()  # 16 x 16 in the middle
    assert image[:, :8].eq(0).all() and image[:, 24:].eq(0).all() and image[:, 8:24].gt(50).all()
    ray = torch.tensor([(63 - 48) / 90, (27 - 48) / 90, 1])
    (u, v), _ = project(ray, scene["intrinsics"][0, 1])
    bright = (image - 90).clamp(min=0)
    rows, columns = torch.arange(16) + 0.5, torch.arange(32) + 0.5
    assert abs((bright.sum(0) * columns).sum() / bright.sum() - u) < 0.1
    assert abs((bright.sum(1) * rows).sum() / bright.sum() - v) < 0.1
    alone = load(folder, camera_ids=[6]).batch([0])
    assert alone["images"].shape == (1, 1, 4, 3, 96, 96)


WAYS = {  # how a picture of one grey is stored, and the 8-bit colour that it is
    "16-bit grey.png": (np.full((4, 6), 40_000, np.uint16), None, (156,) * 3),
    "grey.jpg": (np.full((4, 6), 100, np.uint8), None, (100,) * 3),
    "palette.png": (np.full((4, 6, 3), (10, 90, 200), np.uint8), "P", (10, 90, 200)),
    "alpha.png": (np.full((4, 6, 4), (10, 90, 200, 255), np.uint8), None, (10, 90, 200)),
    "cmyk.jpg": (np.full((4, 6, 3), (100, 100, 100), np.uint8), "CMYK", (100,) * 3),
    "bits.png": (np.full((4, 6), 255, np.uint8), "1", (255,) * 3),
}


@pytest.mark.parametrize("name", WAYS)
def test_an_image_is_its_8_bit_colours(tmp_path, name):
    pixels, mode, colour = WAYS[name]
    image = Image.fromarray(pixels)
    (image.convert(mode, palette=Image.Palette.ADAPTIVE) if mode else image).save(tmp_path / name)
    read = read_image(tmp_path / name)
    assert read.dtype == np.uint8 and read.shape == (4, 6, 3)
    assert np.abs(read.astype(int) - colour).max() <= 1


def png(width, height, depth, kind, rows):
    """The bytes of a PNG file: kind 2 is colour, 0 grey; rows of samples with their filter bytes."""
    def chunk(name, data):
        crc = zlib.crc32(name + data)
        return len(data).to_bytes(4, "big") + name + data + crc.to_bytes(4, "big")
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + bytes([depth, kind, 0, 0, 0]))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_images_of_16_bit_colour_and_of_too_many_pixels(tmp_path):
    colour = b"".join(value.to_bytes(2, "big") for value in (40_000, 20_000, 65_535))
    (tmp_path / "a.png").write_bytes(png(2, 1, 16, 2, b"\0" + 2 * colour))
    assert np.abs(read_image(tmp_path / "a.png")[0, 0].astype(int) - (156, 78, 255)).max() <= 1
    (tmp_path / "b.png").write_bytes(png(13_376, 13_376, 1, 0, b"\0" * 100))  # it would be 537 MB
    (tmp_path / "c.png").write_bytes(png(60_000, 60_000, 1, 0, b"\0" * 100))
    for name in "bc":
        with pytest.raises(ValueError, match=f"{name}.png: not a readable image .*exceeds limit"):
            read_image(tmp_path / f"{name}.png")


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the top of the scene is at the right of the file
    picture = np.zeros((8, 16, 3), np.uint8)
    picture[:, 8:] = 255
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif, quality=95)
    read = read_image(tmp_path / "a.jpg")
    assert read.shape == (16, 8, 3) and read[:6].mean() < 20 and read[-6:].mean() > 235


def rewritten(name, change):
    """A change to a column of numbers in a CSV file: {column: new values of its values}."""
    def rewrite_it(clip):
        with open(clip / name) as file:
            header, *rows = list(csv.reader(file))
        columns = dict(zip(header, np.array(rows, float).T))
        columns |= {column: values(columns) for column, values in change.items()}
        write_csv(clip / name, ",".join(columns), *columns.values())
    return rewrite_it


def all_times(change):
    def at_all(clip):
        for name in ("egomotion.csv", f"{WIDE}/times.csv", "front_tele_30fov/times.csv"):
            rewritten(name, {"time": lambda c: change(c["time"])})(clip)
    return at_all


def motion(**change):
    return rewritten("egomotion.csv", change)


def lens(**change):
    def spoil_it(clip):
        known = json.loads((clip / "cameras.json").read_text())
        known["front_wide_120fov"] |= change
        (clip / "cameras.json").write_text(json.dumps(known))
    return spoil_it


def text(entry):
    return rewrite("reasoning.json", f'[{{"time": 3, "text": "Stop."}}, {entry}]')


def directory(name):
    def make(clip):
        (clip / name).unlink(missing_ok=True)
        (clip / name).mkdir()
    return make


def named(name):
    """times.csv of the wide camera names this file for its first image."""
    def write(clip):
        names = [name] + [f"{i:06d}.png" for i in range(1, len(TIMES))]
        write_csv(clip / WIDE / "times.csv", "file,time", names, TIMES)
    return write


@pytest.mark.parametrize("change, message", [
    # Units, and what no car does.
    (all_times(lambda t: 1e3 * t), "egomotion.csv: times must be in s, 0.004 to 0.3 apart .* are 97 "),
    (all_times(lambda t: 1e6 * t), "egomotion.csv: times must be in s"),
    (all_times(lambda t: 1e9 * t), "egomotion.csv: times must be in s"),
    (rewritten(f"{WIDE}/times.csv", {"time": lambda c: 1e3 * c["time"]}),
     f"{WIDE}/times.csv: times must be in s"),
    (all_times(lambda t: 10 * t), "egomotion.csv: times must be in s, .* they are 0.97 apart"),
    (motion(time=lambda c: np.where(c["time"] > 5, c["time"] + 1e6, c["time"])),
     "times must be in s, .* for at most 100000 s"),
    (motion(yaw=lambda c: np.degrees(c["yaw"])), "egomotion.csv: yaw of pose .* is .* rad; expected at most 12.57"),
    (motion(yaw=lambda c: np.degrees(c["yaw"] / 8)), "egomotion.csv: the heading is .* rad off"),
    (motion(yaw=lambda c: math.pi / 2 - c["yaw"]), "the heading is .* rad off the direction"),
    (motion(yaw=lambda c: c["yaw"] + 3 * np.sin(40 * c["time"])), "turn rate to the next of pose"),
    (motion(roll=lambda c: 0 * c["x"] + 2), "egomotion.csv: tilt of pose 0, at 0 s, is 2 rad"),
    (motion(pitch=lambda c: 0 * c["x"] + 0.5), "the heading is 0.50 rad off"),
    (motion(yaw=lambda c: c["yaw"] + math.pi, x=lambda c: 1.5 * c["x"], y=lambda c: 1.5 * c["y"]),
     r"it drives backwards at 1\d.\d m/s"),
    (motion(x=lambda c: c["x"] + 30 * (c["time"] > 5)), "speed to the next of pose 51, at 4.947 s"),
    (motion(x=lambda c: 1e9 * c["x"]), r"egomotion.csv: position of pose 1, at 0.097 s, is 7.7\S*e\+08 m"),
    (motion(x=lambda c: 0 * c["x"] + 1e300), "egomotion.csv: position of pose 0"),
    (motion(speed=lambda c: 0 * c["x"] + 1e9), r"speed of pose 0, at 0 s, is 1e\+09 m/s; .* 150"),
    (motion(speed=lambda c: 0 * c["x"] + 3.6 * SPEED), "speed is 3.6. times that of the positions"),
    (motion(steering=lambda c: 0 * c["x"] + 3), "steering of pose 0, at 0 s, is 3 rad"),
    (motion(turn_signal=lambda c: 0 * c["x"] + 2), "turn_signal of pose 0"),
    # Times.
    (spoil("egomotion.csv", "\n0.097,", "\ninf,"), "time in line 3 is 'inf', expected a finite"),
    (spoil(f"{WIDE}/times.csv", "0.097", "nan"), "times.csv: time in line 3 is 'nan'"),
    (spoil(f"{WIDE}/times.csv", "0.194", "0.097"), "times must increase, but 0.097 s is followed"),
    (spoil(f"{WIDE}/times.csv", "0.194", "0.05"), "times must increase, but 0.097 s is followed"),
    (rewrite(f"{WIDE}/times.csv", "time\n"), f"{WIDE}/times.csv: 0 times for 104 images"),
    # Files.
    (spoil("egomotion.csv", "time,x,y,yaw", "time;x;y;yaw"), "egomotion.csv: header is time;x;y;yaw"),
    (spoil("egomotion.csv", "time,x,y,yaw", "time,x,x,yaw"), "egomotion.csv: header is time,x,x,yaw"),
    (rewrite("egomotion.csv", "time,x,y,yaw\n" + "1" * 200_000), "egomotion.csv: not a CSV file"),
    (lambda clip: (clip / "egomotion.csv").write_text(
        (clip / "egomotion.csv").read_text(), encoding="utf-16"), "egomotion.csv: expected text in UTF-8"),
    (lambda clip: os.truncate(clip / "egomotion.csv", 2**31), "egomotion.csv: expected at most 1073741824"),
    (directory("egomotion.csv"), "egomotion.csv: Is a directory"),
    (directory(f"{WIDE}/times.csv"), "times.csv: Is a directory"),
    (directory("cameras.json"), "cameras.json: unknown camera"),
    (directory(f"{WIDE}/000003.png"), "times.csv: 104 times for 103 images"),
    (rewrite(f"{WIDE}/000020.png", ""), "000020.png: not a readable image"),
    (lambda clip: (clip / WIDE / "000020.png").write_bytes(
        (clip / WIDE / "000020.png").read_bytes()[:50]), "000020.png: not a readable image"),
    (named("../front_tele_30fov/000000.png"), r"times.csv: column file names no image of its folder \('../front_tele"),
    (named("/etc/passwd"), r"times.csv: column file names no image of its folder \('/etc/passwd'"),
    (named("absent.png"), r"times.csv: column file names no image of its folder \('absent.png'"),
    (named(""), r"times.csv: column file names no image of its folder \(''"),
    # Calibration.
    (rewrite("cameras.json", "[]"), "cameras.json: expected an object"),
    (rewrite("cameras.json", '{"front_wide_120fov": 3}'), "cameras.json: field front_"),
    (lens(kind=["pinhole"]), "cameras.json: field front_wide_120fov.kind is"),
    (lens(cx="middle"), "cameras.json: field front_wide_120fov.cx is 'middle', expected a number"),
    (lens(width=0), "cameras.json: front_wide_120fov: expected width and height of 1"),
    (lens(cx=1e39), "front_wide_120fov: expected finite numbers"),
    (lens(coefficients=[0, 16]), "front_wide_120fov: expected a focal length of 1 to"),
    (lens(coefficients=[None, 16]), "front_wide_120fov: expected 2 coefficients"),
    (lens(coefficients=[-16, 16]), "front_wide_120fov: expected a focal length"),
    (lens(camera_to_ego=np.zeros((4, 4)).tolist()), "front_wide_120fov: expected camera_to_ego with a r"),
    (lens(camera_to_ego=[[0, 0, 1, 1600], *LEVEL[1:]]), "expected a camera within 20 m"),
    (lens(camera_to_ego=np.array(LEVEL).T.tolist()), "camera_to_ego with 0 0 0 1 below"),
    (lens(camera_to_ego=LEVEL[:3]), "expected 2 coefficients and a camera_to_ego of 4 x 4"),
    # Texts.
    (text('{"time": "3", "text": "Go."}'), r"reasoning.json: field \[1\].time is '3', expected a number"),
    (text('{"time": null, "text": "Go."}'), r"reasoning.json: field \[1\].time is null"),
    (text('{"time": NaN, "text": "Go."}'), "reasoning.json: not JSON: NaN is no number"),
    (text('{"time": 4, "text": null}'), r"reasoning.json: field \[1\].text is null"),
    (text('{"time": 4, "text": 5}'), r"reasoning.json: field \[1\].text is 5, expected text"),
    (text('{"time": 3, "text": "Go."}'), "reasoning.json: two texts at 3 s"),
    (text("5"), "reasoning.json: it must be a list of objects"),
    (rewrite("reasoning.json", "{}"), "reasoning.json: expected a list"),
])
def test_what_no_car_or_camera_makes_is_refused_in_a_line(folder, change, message):
    """Nothing is printed but the error: no warning of numpy's or Pillow's."""
    change(folder)
    with warnings.catch_warnings(), pytest.raises((ValueError, OSError), match=message) as error:
        warnings.simplefilter("error")
        clips = load(folder, frames=1)
        clips.batch(range(len(clips)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("t0", [math.nan, math.inf, -math.inf, 1e300, -5, 1e6])
def test_t0_must_be_in_the_clip(folder, t0):
    for future in (True, False):
        with pytest.raises(ValueError, match="too short for t0") as error:
            load(folder, t0=t0, future=future)
        assert len(str(error.value)) < 400


def test_files_as_people_have_them(folder, capsys):
    """Names without leading zeros, what macOS, Windows, Excel and Jupyter leave: the same Scenes."""
    expected = load(folder).batch(range(4))
    for camera in (WIDE, "front_tele_30fov"):
        for i in range(len(TIMES)):
            (folder / camera / f"{i:06d}.png").rename(folder / camera / f"frame_{i}.png")
        for junk in ("._frame_0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
            (folder / camera / junk).write_bytes(b"\0\5\x16\7")
        (folder / camera / ".ipynb_checkpoints").mkdir()
        (folder / camera / ".ipynb_checkpoints" / "frame_0.png").write_bytes(b"")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (folder / name).mkdir()
    for file in [folder / "egomotion.csv", *folder.glob("*/times.csv")]:
        header, *lines = file.read_text().splitlines()
        quoted = ['"' + line.replace(",", '", "') + '"' for line in lines]
        text = "\r\n".join([header, *quoted, "", "," * header.count(","), ""])
        file.write_bytes(text.encode("utf-8-sig"))
    got = load(folder).batch(range(4))
    for key, value in expected.items():
        assert torch.equal(value, got[key]) if torch.is_tensor(value) else value == got[key], key
    assert capsys.readouterr().err == ""


def test_scenes_over_a_gap_are_left_out_and_counted(folder, capsys):
    """No poses for a second, then one camera without images for a second."""
    keep = (TIMES < 3.6) | (TIMES > 4.6)
    whole = load(folder, future=False).names
    write_csv(folder / "egomotion.csv", "time,x,y,yaw", TIMES[keep], *arc(TIMES[keep]))
    names = load(folder, future=False).names
    gone = {f"mine at {t:.1f} s" for t in (4.0, 4.5, 5.0, 5.5, 6.0, 6.5)}
    assert set(whole) - set(names) == gone  # a Scene looks back over 2.2 s
    notes = capsys.readouterr().err
    assert notes.count("\n") == 1 and "note: 6 of 16 scenes are left out; the first: " in notes
    assert "no poses from 3.589 to 4.656 s" in notes
    with pytest.raises(ValueError, match="no poses from 3.589 to 4.656 s, which the scene at 4 s"):
        load(folder, t0=4, future=False)

    write_csv(folder / "egomotion.csv", "time,x,y,yaw", TIMES, *arc(TIMES))
    for i in np.flatnonzero(~keep):
        (folder / WIDE / f"{i:06d}.png").unlink()
    write_csv(folder / WIDE / "times.csv", "time", TIMES[keep])
    names = load(folder, future=False).names
    assert set(whole) - set(names) == {"mine at 4.0 s", "mine at 4.5 s"}
    assert f"{WIDE}/times.csv: no images from 3.589 to 4.656 s" in capsys.readouterr().err
    assert len(load(folder, future=False, camera_ids=[6])) == len(whole)


def test_a_text_belongs_to_the_nearest_time(folder):
    texts = [{"time": 3.0, "text": "Stop."}, {"time": 3.04, "text": "Go."}]
    (folder / "reasoning.json").write_text(json.dumps(texts))
    assert load(folder).reasoning == ["Stop.", "Go."]


def test_an_image_that_vanishes_later_is_named(folder):
    clips = load(folder)
    for file in folder.glob("*/0000*.png"):
        file.unlink()
    with pytest.raises(ValueError, match=r"\.png: not a readable image .*No such file"):
        clips.batch([0])


@pytest.mark.parametrize("change, message", [
    (remove("oxts/data/0000000003.txt"),
     "oxts: 104 times for 103 files in data"),
    (empty("oxts/data"), "oxts: 104 times for 0 files in data"),
    (empty("image_02/data"), "image_02/timestamps.txt: 104 times for 0 images"),
    (rewrite("oxts/data/0000000003.txt", "1 2 3"), "0000000003.txt: expected 30 numbers"),
    (spoil("oxts/timestamps.txt", "2011-09-26 13", "then 13"),
     "timestamps.txt: expected lines like 2011-09-26"),
    (remove("image_02/data/0000000003.png"), "image_02/timestamps.txt: 104 times for 103 images"),
    (rewrite("oxts/timestamps.txt", ""), "oxts/timestamps.txt: expected lines like 2011-09-26"),
    (rewrite("oxts/timestamps.txt", "NaT\n"), "oxts/timestamps.txt: expected lines like 2011-09-26"),
    (spoil("oxts/timestamps.txt", "13:02:25", "now 13:02:25"), "oxts/timestamps.txt: expected lines like"),
    (rewrite("image_02/timestamps.txt", " \n"), "image_02/timestamps.txt: expected lines like"),
    (rewrite("oxts/data/0000000003.txt", "nan " * 30),
     "0000000003.txt: a field is 'nan', expected a finite number"),
    (rewrite("oxts/data/0000000003.txt", "90 " * 30), "0000000003.txt: expected 30 numbers, the first a latitude"),
    (rewrite("calib_cam_to_cam.txt", "S_rect_02: 0 375\nP_rect_02: 70 0 60 0 0 71 18 0 0 0 1 0"),
     "calib_cam_to_cam.txt: expected lines S_rect_02 and P_rect_02"),
    (rewrite("calib_cam_to_cam.txt", "S_rect_02: 124 37\nP_rect_02: 0 0 60 0 0 71 18 0 0 0 1 0"),
     "calib_cam_to_cam.txt: expected a focal length"),
    (rewrite("calib_cam_to_cam.txt", "S_rect_02: 124 37\nP_rect_02: nan 0 60 0 0 71 18 0 0 0 1 0"),
     "calib_cam_to_cam.txt: expected finite numbers"),
    (rewrite("calib_cam_to_cam.txt", "P_rect_00: 1"),
     "calib_cam_to_cam.txt: expected lines S_rect_02 and P_rect_02"),
])
def test_kitti_says_in_a_line_what_is_wrong(kitti, change, message):
    if "png" in message or "image_02" in message:
        images = kitti / "image_02" / "data"
        (images / "000003.png").rename(images / "0000000003.png")
    change(kitti)
    with pytest.raises(ValueError, match=message) as error:
        load(kitti)
    assert "\n" not in str(error.value)


def test_kitti_over_the_180th_degree_of_longitude(kitti):
    for file in (kitti / "oxts" / "data").iterdir():
        row = np.array(file.read_text().split(), float)
        row[1] = (row[1] - 1e-4 + 360) % 360 - 180  # 7 m before the line, at the start
        file.write_text(" ".join(f"{value:.17g}" for value in row))
    check_arc(load(kitti).batch([0, 2]), 5e-3)


def test_kitti_with_what_macos_leaves(kitti):
    for folder in ("oxts", "image_02"):
        (kitti / folder / "data" / "._0.txt").write_bytes(b"\0\5\x16\7")
        (kitti / folder / "data" / "._0.png").write_bytes(b"\0\5\x16\7")
    check_arc(load(kitti).batch([0]), 5e-3)


@pytest.fixture
def nvidia(nvidia_original, tmp_path):
    return shutil.copytree(nvidia_original, tmp_path / "nvidia")


@pytest.fixture(scope="module")
def nvidia_original(tmp_path_factory):
    """One camera, one clip of 10 s, in the data set's own layout, for NVIDIA's kit."""
    pytest.importorskip("physical_ai_av", reason="no kit of NVIDIA's: pip install physical_ai_av")
    import av
    import pandas
    tmp_path = tmp_path_factory.mktemp("nvidia")
    clip, name = NVIDIA_CLIP, "camera_front_wide_120fov"
    videos = {"video": "{clip_id}.mp4", "frame_timestamps": "{clip_id}.timestamps.parquet"}
    poses = {"egomotion": "{clip_id}.parquet"}
    features = {
        name: ("camera", f"camera/{name}.{{chunk_id:04d}}.zip", json.dumps(videos)),
        "egomotion": ("labels", "labels/egomotion.{chunk_id:04d}.zip", json.dumps(poses)),
        "camera_intrinsics": ("calibration", "calibration/intrinsics.{chunk_id:04d}.parquet", ""),
        "sensor_extrinsics": ("calibration", "calibration/extrinsics.{chunk_id:04d}.parquet", ""),
    }
    for folder in ("camera", "labels", "calibration", "metadata", "reasoning"):
        (tmp_path / folder).mkdir()
    write_csv(tmp_path / "features.csv", "feature,directory,chunk_path,clip_files_in_zip",
              features, *zip(*features.values()))
    index = pandas.Index([clip], name="clip_id")
    pandas.DataFrame({"clip_is_valid": [True], "chunk": [0], "split": ["train"]}, index).to_parquet(
        tmp_path / "clip_index.parquet")
    pandas.DataFrame({feature: [True] for feature in features}, index).to_parquet(
        tmp_path / "metadata" / "feature_presence.parquet")
    pandas.DataFrame({"country": ["-"]}, index).to_parquet(
        tmp_path / "metadata" / "data_collection.parquet")

    t = np.arange(100)  # tenths of a second
    x, y, yaw = arc(t / 10)
    zero = 0.0 * t
    motion = dict(
        timestamp=100_000 * t, qx=zero, qy=zero, qz=np.sin(yaw / 2), qw=np.cos(yaw / 2),
        x=x, y=y, z=zero, vx=SPEED * np.cos(yaw), vy=SPEED * np.sin(yaw), vz=zero,
        ax=zero, ay=zero, az=zero, curvature=zero + 1 / RADIUS)
    with zipfile.ZipFile(tmp_path / "labels" / "egomotion.0000.zip", "w") as file:
        file.writestr(f"{clip}.parquet", pandas.DataFrame(motion).to_parquet())
    video = io.BytesIO()
    with av.open(video, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for i in t:
            picture = np.full((32, 64, 3), 25 * (i % 10), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with zipfile.ZipFile(tmp_path / "camera" / f"{name}.0000.zip", "w") as file:
        file.writestr(f"{clip}.mp4", video.getvalue())
        stamps = pandas.DataFrame({"timestamp": 100_000 * t + 30_000})
        file.writestr(f"{clip}.timestamps.parquet", stamps.to_parquet())
    polynomials = {f"{way}_poly_{i}": [60.0 * (i == 1)] for way in ("fw", "bw") for i in range(5)}
    camera = pandas.MultiIndex.from_tuples([(clip, name)], names=["clip_id", "camera_name"])
    lens = dict(width=[64], height=[32], cx=[32.0], cy=[16.0], **polynomials)
    pandas.DataFrame(lens, camera).to_parquet(tmp_path / "calibration" / "intrinsics.0000.parquet")
    pose = dict(qx=[0.5], qy=[-0.5], qz=[0.5], qw=[-0.5], x=[1.6], y=[0.0], z=[1.5])
    pandas.DataFrame(pose, camera).to_parquet(tmp_path / "calibration" / "extrinsics.0000.parquet")
    events = [{"event_start_timestamp": us, "cot": f"Because of {us}."}
              for us in (1_000_000, 3_000_000, 9_000_000)]
    pandas.DataFrame({"events": [json.dumps(events)]}, index).to_parquet(
        tmp_path / "reasoning" / "ood_reasoning.parquet")
    return tmp_path


def test_nvidia_layout(nvidia, capsys):
    clips = load(nvidia)
    assert clips.names == [f"{NVIDIA_CLIP} at 3.0 s"]  # the other key frames are too near an end
    assert "note: 2 of 3 scenes are left out; the first: " in capsys.readouterr().err
    scene = clips.batch([0])
    check_arc(scene, 1e-3)
    assert scene["reasoning"] == ["Because of 3000000."] and scene["camera_ids"].tolist() == [[1]]
    grey = scene["images"][0, 0, :, 0, 16, 32].float()  # images come 30 ms after the tenths
    assert torch.allclose(grey, 25.0 * torch.tensor([6, 7, 8, 9]), atol=5)
    assert scene["intrinsics"][0, 0].tolist() == [0, 64, 32, 32, 16, 0, 60, 0, 0, 0]
    level = torch.tensor(LEVEL, dtype=torch.float32)
    assert torch.allclose(scene["camera_to_ego"][0, 0], level, atol=1e-6)
    with pytest.raises(ValueError, match="too short for t0 = 1.6 s"):
        load(nvidia, t0=1.6)
    with pytest.raises(ValueError, match="needs images from -1.2 to 1.8 s"):
        load(nvidia, t0=1.8, frame_dt=1.0)


def table(name, **columns):
    """A change to a parquet table of NVIDIA's: cells of its first row."""
    def change(folder):
        import pandas
        frame = pandas.read_parquet(folder / name).astype(object)
        for column, value in columns.items():
            frame[column] = [value] * len(frame)
        frame.to_parquet(folder / name)
    return change


def events(*entries):
    return table("reasoning/ood_reasoning.parquet", events=json.dumps(entries))


def zipped(name, member, change):
    """A change to the bytes of a file in a zip file."""
    def rewrite_it(folder):
        with zipfile.ZipFile(folder / name) as old:
            files = {entry: old.read(entry) for entry in old.namelist()}
        files[member] = change(files[member])
        with zipfile.ZipFile(folder / name, "w") as new:
            for entry, data in files.items():
                new.writestr(entry, data)
    return rewrite_it


def cells(**change):
    """Parquet bytes -> the same with cells of the third row changed."""
    def of(data):
        import pandas
        frame = pandas.read_parquet(io.BytesIO(data))
        for column, value in change.items():
            values = frame[column].to_numpy(float, copy=True)
            values[2] = value
            frame[column] = values
        return frame.to_parquet()
    return of


NVIDIA_CLIP = "00000000-0000-4000-8000-000000000001"
POSES, VIDEOS = "labels/egomotion.0000.zip", "camera/camera_front_wide_120fov.0000.zip"


@pytest.mark.parametrize("change, message", [
    (remove("metadata/feature_presence.parquet"), "NVIDIA's kit cannot read its tables .*feature_pres"),
    (remove("clip_index.parquet"), "NVIDIA's kit cannot read its tables .*clip_index.parquet"),
    (rewrite("features.csv", "feature\n"), "NVIDIA's kit cannot read its tables"),
    (rewrite("clip_index.parquet", "no table"), "NVIDIA's kit cannot read its tables"),
    (table("clip_index.parquet", chunk=None), "clip_index.parquet: expected clip_id, clip_is_valid"),
    (table("clip_index.parquet", clip_is_valid=None), "clip_index.parquet: expected clip_id, clip_is_v"),
    (rewrite(POSES, "no zip"), r"egomotion.0000.zip: not a zip file"),
    (rewrite(VIDEOS, "no zip"), r"camera_front_wide_120fov.0000.zip: not a zip file"),
    (zipped(POSES, f"{NVIDIA_CLIP}.parquet", lambda data: b"no table"), "egomotion of clip .* the kit cannot read it"),
    (zipped(POSES, f"{NVIDIA_CLIP}.parquet", cells(vx=math.nan)), "egomotion of clip .*: the kit cannot read it"),
    (zipped(POSES, f"{NVIDIA_CLIP}.parquet", cells(qw=math.nan)), "egomotion of clip 0"),
    (zipped(POSES, f"{NVIDIA_CLIP}.parquet", cells(timestamp=100_000)), "egomotion of clip 0"),
    (zipped(VIDEOS, f"{NVIDIA_CLIP}.timestamps.parquet", cells(timestamp=math.nan)), "times must increase"),
    (zipped(VIDEOS, f"{NVIDIA_CLIP}.mp4", lambda data: data[:100]), "wide_120fov of clip .*: the kit cannot"),
    (table("calibration/intrinsics.0000.parquet", fw_poly_1=0.0), "expected a focal length"),
    (table("calibration/intrinsics.0000.parquet", fw_poly_1=math.nan), "expected finite numbers"),
    (events({"event_start_timestamp": 3e6}), r"events of clip 0.*: field \[0\].cot is missing"),
    (events({"event_start_timestamp": None, "cot": "Go."}), r"\[0\].event_start_timestamp is null"),
    (events({"event_start_timestamp": math.nan, "cot": "Go."}), "events of clip 0.* NaN is no number"),
    (events({"event_start_timestamp": 3e6, "cot": None}), r"\[0\].cot is null"),
    (table("reasoning/ood_reasoning.parquet", events=None), "events of clip 0.*must be a list of objects"),
    (rewrite("reasoning/ood_reasoning.parquet", "no table"), "ood_reasoning.parquet: expected clip_id"),
    (spoil("features.csv", ".{chunk_id:04d}.zip", ".{}.zip"), "features.csv: chunk_path of camera_"),
    (spoil("features.csv", "labels/egomotion", "../labels/egomotion"), "chunk_path is '../labels"),
    (spoil("features.csv", "labels/egomotion", "/labels/egomotion"), "chunk_path is '/labels"),
])
def test_nvidia_says_in_a_line_what_is_wrong(nvidia, monkeypatch, change, message):
    monkeypatch.setattr(socket, "socket", None)  # whoever asks a hub fails by another error
    change(nvidia)
    with pytest.raises((ValueError, OSError), match=message) as error:
        load(nvidia).batch([0])
    assert "\n" not in str(error.value) and str(nvidia) in str(error.value)


def test_clips_that_the_zips_lack_are_left_out_and_counted(nvidia, capsys):
    import pandas
    index = pandas.read_parquet(nvidia / "clip_index.parquet")
    for i in (2, 3):
        index.loc[NVIDIA_CLIP[:-1] + str(i)] = index.loc[NVIDIA_CLIP]
    index.to_parquet(nvidia / "clip_index.parquet")
    assert load(nvidia).names == [f"{NVIDIA_CLIP} at 3.0 s"]
    assert "note: " + str(nvidia) + ": 2 of 3 clips are left out" in capsys.readouterr().err
    (nvidia / "metadata" / "feature_presence.parquet").rename(
        nvidia / "metadata" / "sensor_presence.parquet")  # as it was called before 26.03
    assert len(load(nvidia)) == 1
    index.index = ["../" + clip for clip in index.index]
    index.to_parquet(nvidia / "clip_index.parquet")
    with zipfile.ZipFile(nvidia / POSES, "a") as file:
        file.writestr(f"../{NVIDIA_CLIP}.parquet", file.read(f"{NVIDIA_CLIP}.parquet"))
    with pytest.raises(ValueError, match="clip_index.parquet: clip_id is '../0000"):
        load(nvidia)


def test_without_the_kit_it_is_named(nvidia, monkeypatch):
    monkeypatch.setitem(sys.modules, "physical_ai_av", None)
    with pytest.raises(ImportError, match="pip install physical_ai_av"):
        load(nvidia)


def test_nvidia_events_may_be_a_list(nvidia):
    table("reasoning/ood_reasoning.parquet", events=[
        {"event_start_timestamp": 3_000_000, "cot": "Go."}])(nvidia)
    assert load(nvidia).reasoning == ["Go."]


@pytest.mark.parametrize("options", [
    {"frame_dt": -0.1}, {"frame_dt": 0}, {"frame_dt": math.nan}, {"frames": 2.5}, {"frames": 0}, {"camera_ids": 1},
    {"camera_ids": [9]}, {"size": (0, 0), "rig": RIG},
])  # fmt: skip
def test_options_that_cannot_be_meant(folder, options):  # noqa: F811
    with pytest.raises(ValueError) as error:
        load(folder, **options)
    assert "\n" not in str(error.value) and "expected" in str(error.value)
