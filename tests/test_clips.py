"""
Real clips: the three readers of clips.py, on small clips made here.    pytest tests/test_clips.py

Every clip drives one arc: 8 m/s, radius 50 m to the left. Its images are plain, image i has the
grey 2 * i.
"""
import csv
import io
import json
import math
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from alpamayo import project
from clips import Motion, rotation
from data import load
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
def folder(tmp_path):
    """A folder of one's own: a wide and a tele camera."""
    clip = tmp_path / "mine"
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
     "egomotion.csv: position of pose 0 is not a finite"),
    (spoil("egomotion.csv", "\n0.0,0.0,", "\n0.0,zero,"), {},
     "egomotion.csv: column x must be numbers"),
    (spoil("egomotion.csv", "\n0.0,0.0,", "\n0.0,"), {},
     "egomotion.csv: line 2 has 3 fields, the header 4"),
    (rewrite("egomotion.csv", "time,x,y,yaw\n0,0,0,0\n"), {},
     "egomotion.csv: 1 poses, expected 4 or more"),
    (rewrite("egomotion.csv", "time,x,y,yaw\n0,0,0,0\n1,8,0,0\n2,16,0,0\n3,24,0,0\n"), {},
     r"too short for t0 = 2.00 s, which needs poses from before 0.40 s to 8.40 s .* there are 0.00 "
     "to 3.00 s"),
    (None, {"t0": 1.6}, r"egomotion.csv: too short for t0 = 1.60 s, .* before 0.00 s"),
    (None, {"t0": 9},
     r"too short for t0 = 9.00 s, which needs poses .* to 15.40 s \(9.00 s with future=False\)"),
    (None, {"t0": 3, "frames": 4, "frame_dt": 1.5},
     r"needs images of camera 1 from -1.50 s to 3.00 s; there are 0.00"),
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
     "of a camera must be of one size"),
    (rewrite("cameras.json", "{"), {}, "cameras.json: not JSON"),
    (rename("cameras.json", "other.json"), {"rig": RIG, "size": (64, 128)},
     "a rig needs calibrated cameras"),
    (rewrite("cameras.json", '{"front_wide_120fov": {"kind": "fisheye"}}'), {},
     "front_tele_30fov needs kind, one of"),
    (spoil("cameras.json", '"cx"', '"x"'), {},
     r"cameras.json: front_wide_120fov needs cx, numbers of shape \(1,\)"),
    (spoil("cameras.json", "[16.0, 16.0]", "[16.0]"), {},
     r"needs coefficients, numbers of shape \(2,\)"),
    (spoil("cameras.json", '"width": 32', '"width": 64'), {},
     "are 32 x 16 pixels, but its intrinsics are for 64"),
    (rewrite("reasoning.json", '[{"t": 3}]'), {}, "reasoning.json: expected a list of"),
])
def test_folder_says_in_a_line_what_is_wrong(folder, change, options, message):
    if change:
        change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        clips = load(folder, **options)
        clips.batch(range(len(clips)))
    assert "\n" not in str(error.value)


def test_cameras_of_several_sizes_are_for_a_rig(folder):
    for i in range(len(TIMES)):
        Image.new("RGB", (64, 32)).save(folder / "front_tele_30fov" / f"{i:06d}.png")
    (folder / "cameras.json").unlink()
    sizes = r"\{1: \(16, 32\), 6: \(32, 64\)"
    with pytest.raises(ValueError, match="images must be of one size, .* " + sizes):
        load(folder).batch([0])
    assert load(folder, camera_ids=[6]).batch([0])["images"].shape == (1, 1, 4, 3, 32, 64)


@pytest.mark.parametrize("change, message", [
    (remove("oxts/data/0000000003.txt"),
     "oxts: 103 files in data, but 104 lines in timestamps.txt"),
    (rewrite("oxts/data/0000000003.txt", "1 2 3"), "0000000003.txt: expected 30 numbers"),
    (spoil("oxts/timestamps.txt", "2011-09-26 13", "then 13"),
     "timestamps.txt: expected lines like 2011-09-26"),
    (remove("image_02/data/0000000003.png"), "image_02/timestamps.txt: 104 times for 103 images"),
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


def test_nvidia_layout(tmp_path):
    """One camera, one clip of 10 s, in the data set's own layout, read by NVIDIA's kit."""
    pytest.importorskip("physical_ai_av", reason="no kit of NVIDIA's: pip install physical_ai_av")
    import av
    import pandas
    clip, name = "00000000-0000-4000-8000-000000000001", "camera_front_wide_120fov"
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

    clips = load(tmp_path)
    assert clips.names == [f"{clip} at 3.0 s"]  # the other key frames are too near an end
    scene = clips.batch([0])
    check_arc(scene, 1e-3)
    assert scene["reasoning"] == ["Because of 3000000."] and scene["camera_ids"].tolist() == [[1]]
    grey = scene["images"][0, 0, :, 0, 16, 32].float()  # images come 30 ms after the tenths
    assert torch.allclose(grey, 25.0 * torch.tensor([6, 7, 8, 9]), atol=5)
    assert scene["intrinsics"][0, 0].tolist() == [0, 64, 32, 32, 16, 0, 60, 0, 0, 0]
    level = torch.tensor(LEVEL, dtype=torch.float32)
    assert torch.allclose(scene["camera_to_ego"][0, 0], level, atol=1e-6)
    with pytest.raises(ValueError, match="too short for t0 = 1.60 s"):
        load(tmp_path, t0=1.6)
    with pytest.raises(ValueError, match="Requested timestamps must be within the range") as error:
        load(tmp_path, t0=1.8, frame_dt=1.0).batch([0])
    assert "\n" not in str(error.value)
