"""
Real clips: a folder of one's own, NVIDIA's PhysicalAI-AV, KITTI raw.

A clip is one recorded drive: a Motion (poses on their own clock), Cameras (images on theirs), and
texts where somebody labelled it. Each Scene is cut out of a clip at a time t0: poses at 10 Hz by
interpolation, and of each camera the last images at or before the times wanted.

    layout                      known by         read by
    a folder of one's own       egomotion.csv    read_folder; its docstring is the format
    NVIDIA's PhysicalAI-AV      features.csv     read_nvidia, through NVIDIA's kit
    KITTI raw                   oxts             read_kitti

From top to bottom: ClipScenes, which cuts the Scenes; Motion; the three readers; single files.

To add a layout, write a reader and give it a line in `read_clips`: a file or folder that only this
layout has. A reader takes the folder and returns a list of Clips. A Clip needs

    motion       Motion(file, times, xyz, rot) of the rear axle: s, m, rotations (`rotation` makes
                 them of yaw, pitch and roll). What was measured goes in by name, as speed=...
    cameras      {id: Camera}, ids as in CAMERAS; `image_camera` makes one of image files and times,
                 `calibration_of` its intrinsics and camera_to_ego
    reasoning    {time in s: text}, or {}

All else works on Clips: Scenes, batches, rigs, labels, and the errors about what is too short or
what no car does (doors.py).
"""
import functools
import io
import math
import os
import zipfile
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import grid_sample, interpolate, pad
from torch.utils.data import default_collate

import doors
from alpamayo import DT, LOW_SPEED, project, rot_of, yaw_of
from doors import (
    TICK,
    expecting,
    files_in,
    finite,
    inside,
    read_csv,
    read_image,
    read_json,
    read_text,
    whole_number,
    whole_numbers,
)
from world import FUTURE, HISTORY, PAST, WHEELBASE, rays, rig_camera

CAMERAS = """
cross_left_120fov front_wide_120fov cross_right_120fov
rear_left_70fov rear_tele_30fov rear_right_70fov front_tele_30fov
""".split()  # in the order of their ids, from 0
USED = (0, 1, 2, 6)  # the cameras that the release looks through
KINEMATICS = ("speed", "acceleration", "steering", "turn_signal")  # columns of ego_kinematics
POSE_GAP = 0.5  # s without a pose, the most that a Scene may span
IMAGE_GAP = 3  # frame periods without an image, the most
IMAGE_TYPES = (".png", ".jpg", ".jpeg")


class Camera:
    """
    The images of a camera, and when they were taken.

    where       the file to name in errors
    times       (N,) s, increasing
    images      a function: numbers (n,) of images -> n images (H, W, 3) uint8
    intrinsics, camera_to_ego   (10,), see `project`, and (4, 4); None where unknown

    ValueError for times that do not increase or are not in s.
    """

    def __init__(self, where, times, images, intrinsics=None, camera_to_ego=None):
        doors.check_times(where, times)
        self.where = where
        self.times = times
        self.first, self.last = times[0], times[-1]
        self.gap = IMAGE_GAP * np.median(np.diff(times))  # s
        self.images = images
        self.intrinsics = intrinsics
        self.camera_to_ego = camera_to_ego

    def read(self, times):
        """The last images at or before times (n,) in s: (n, H, W, 3) uint8."""
        images = self.images(last_at(self.times, times))
        doors.check_sizes(self.where, images, self.intrinsics)
        return np.stack(images)

    def view(self, times):
        """Images (n, 3, H, W) at or before times (n,) in s, the intrinsics, camera_to_ego."""
        images = torch.from_numpy(self.read(times)).permute(0, 3, 1, 2)
        return images, self.intrinsics, self.camera_to_ego


class Clip(NamedTuple):
    name: str
    motion: "Motion"
    cameras: dict  # camera id -> Camera
    reasoning: dict  # time in s -> text, "" for a key frame without one

    def default_starts(self, after):
        """The times t0 in s that Scenes are cut at when nobody asks for others.

        after: how long a Scene goes on after its t0, in s."""
        first = self.motion.first + 2
        end = self.motion.last - after
        every_half = np.arange(first, max(end + TICK, first + 0.1), 0.5)  # at least one
        return list(self.reasoning) or every_half

    def text_at(self, t0):
        """The reasoning at t0, "" if there is none."""
        near = min(self.reasoning, key=lambda time: abs(time - t0), default=math.inf)
        return self.reasoning[near] if abs(near - t0) < DT / 2 else ""


def load_clips(path, **options):
    """ClipScenes of the clips in a folder, with the options of ClipScenes."""
    return ClipScenes(read_clips(path), **options)


def read_clips(path):
    """The Clips in a folder of any layout. FileNotFoundError if it has none."""
    path = Path(path)
    readers = {"features.csv": read_nvidia, "oxts": read_kitti, "egomotion.csv": read_folder}
    for entry, reader in readers.items():
        if (path / entry).exists():
            clips = reader(path)
            for clip in clips:
                drive = clip.motion
                doors.check_drive(drive.where, drive.times, drive.xyz, drive.rot, drive.measured)
            return clips
    raise FileNotFoundError(f"{path}: no ego motion in it, expected one of {', '.join(readers)}")


class ClipScenes:
    """
    The Scenes of clips: `len(set)`, `set.batch(indices)` -> Scene, `set.names`, `set.reasoning`.

    t0          a time or a list of times in s on the clip's own clock. Left out: the times that
                have reasoning, or else every half second. It takes more than 1.6 s of poses before
                t0, as in the release, and 6.4 s after it
    camera_ids  left out: those of 0, 1, 2 and 6 that there are
    frames      images of each camera, frame_dt s apart, the last one at t0
    size, rig   (H, W), and RIG or the like: all images become what the cameras of the rig would
                see, for models that know only the world. Left out, images keep their size; if the
                cameras' differ, all are scaled into that of the front wide one
    future      False asks for no poses after t0, and the Scenes have no ego_future_xyz and
                ego_future_rot

    A Scene has intrinsics and camera_to_ego where all its cameras are calibrated.
    Raises ValueError or FileNotFoundError: one line, the file and what was expected of it. Scenes
    that nobody asked for by t0 and that cannot be cut are left out; a note counts them.
    """

    def __init__(self, clips, t0=None, camera_ids=None, frames=4, frame_dt=0.1,
                 size=None, rig=None, future=True):  # fmt: skip
        if (rig is None) != (size is None):
            raise ValueError("rig and size go together: without a rig, images keep their own size")
        frames = whole_number("frames", frames, 1, 1000)
        if not (finite(frame_dt) and 0 < frame_dt <= 10):
            raise ValueError(f"frame_dt: expected seconds, more than 0, at most 10, not {frame_dt}")
        if camera_ids is not None:
            camera_ids = whole_numbers("camera_ids", camera_ids, 0, len(CAMERAS) - 1)
        self.camera_ids = camera_ids
        self.size = size and whole_numbers("size", size, 1, 10_000)
        self.rig = rig
        self.future = future
        self.after = FUTURE * DT * future  # s of poses after t0
        self.ages = frame_dt * np.arange(frames - 1, -1, -1)  # (frames,) s before t0, oldest first
        self.cuts = []  # (clip, t0) of each Scene
        refused = []
        for clip in clips:
            for start in clip.default_starts(self.after) if t0 is None else np.atleast_1d(t0):
                try:
                    self.check(clip, float(start))
                    self.cuts.append((clip, float(start)))
                except ValueError as error:
                    refused.append(str(error))
        if refused and (t0 is not None or not self.cuts):  # asked for in vain, or nothing left
            raise ValueError(refused[0])
        if refused:
            total = len(refused) + len(self.cuts)
            doors.note(f"{len(refused)} of {total} scenes are left out; the first: {refused[0]}")
        self.names = [f"{clip.name} at {start:.1f} s" for clip, start in self.cuts]
        self.reasoning = [clip.text_at(start) for clip, start in self.cuts]

    def __len__(self):
        return len(self.cuts)

    def batch(self, indices):
        """Scenes number `indices` -> one Scene. ValueError where cameras or image sizes differ."""
        scenes = [self.scene(int(i)) for i in indices]
        kinds = [(one["camera_ids"].tolist(), one["images"].shape, one.keys()) for one in scenes]
        for scene, kind in zip(scenes, kinds):
            if kind != kinds[0]:
                raise ValueError(
                    f"{scene['name']} cannot be batched with {scenes[0]['name']}: cameras, sizes "
                    "of images or calibration differ; choose camera_ids or a rig")
        return default_collate(scenes)

    def drive_plans(self, indices, plans):
        """Nothing: a clip cannot tell what happens when the car drives otherwise."""
        return {}

    def scene(self, index):
        """Scene number `index`, not batched."""
        clip, t0 = self.cuts[index]
        views = {i: camera.view(t0 - self.ages) for i, camera in self.sources(clip).items()}
        if self.rig:
            views = reproject(self.rig, views, self.camera_ids, self.size)
        wide, _, _ = views.get(1) or next(iter(views.values()))
        views = {i: scaled_into(wide.shape[2:], *view) for i, view in views.items()}
        scene = clip.motion.scene(t0, self.future)
        images, intrinsics, poses = zip(*views.values())
        scene["images"] = torch.stack(images)
        scene["camera_ids"] = torch.tensor(list(views))
        if all(lens is not None for lens in intrinsics):
            scene["intrinsics"] = torch.stack(intrinsics)
            scene["camera_to_ego"] = torch.stack(poses)
        scene["reasoning"] = self.reasoning[index]
        scene["name"] = self.names[index]
        return scene

    def sources(self, clip):
        """The real cameras that a clip's Scenes are made of: {id: Camera}, ids ascending."""
        ids = [i for i in USED if i in clip.cameras]
        if self.camera_ids and not self.rig:
            ids = sorted(set(self.camera_ids))
        if not ids or not clip.cameras.keys() >= set(ids):
            raise ValueError(
                f"{clip.name}: has the cameras {sorted(clip.cameras)}, not {ids or list(USED)}")
        for i in ids:
            if self.rig and clip.cameras[i].intrinsics is None:
                raise ValueError(
                    f"{clip.name}: a rig needs calibrated cameras, {CAMERAS[i]} is not; see "
                    "cameras.json in docs/clips.md")
        return {i: clip.cameras[i] for i in ids}

    def check(self, clip, t0):
        """ValueError unless a clip has the poses and the images of a Scene at t0."""
        motion = clip.motion
        start = t0 - HISTORY * DT - 1e-3  # more than the history, as in the release
        end = t0 + self.after
        back = (PAST + 2 - HISTORY) * DT  # `kinematics` looks further back
        doors.check_span(motion.where, "poses", motion.times, t0, start, end, POSE_GAP, back)
        start = t0 - self.ages[0]
        for camera in self.sources(clip).values():
            doors.check_span(camera.where, "images", camera.times, t0, start, t0, camera.gap)


def scaled_into(size, images, lens, pose):
    """
    A view, see Camera.view, in images of a size (H, W): scaled to fit, in the middle, black around.

    Width and height are scaled alike, as an f-theta lens cannot say otherwise.
    """
    old = images.shape[2:]
    if old == size:
        return images, lens, pose
    scale = min(size[0] / old[0], size[1] / old[1])
    height, width = [max(1, round(scale * side)) for side in old]
    above, left = (size[0] - height) // 2, (size[1] - width) // 2
    images = interpolate(images, (height, width), mode="bicubic", antialias=True)
    images = pad(images, (left, size[1] - width - left, above, size[0] - height - above))
    if lens is not None:
        shift = torch.tensor([left, above])
        centre = lens[3:5] * torch.tensor([width, height]) / lens[1:3] + shift
        lens = torch.cat([lens[:1], torch.tensor(size).flip(0), centre, scale * lens[5:]])
    return images, lens, pose


def reproject(rig, views, camera_ids, size):
    """
    What the cameras of a rig would see: real cameras, turned but not moved.

    views {id: (images (frames, 3, H, W), intrinsics, camera_to_ego)} of real cameras -> the same of
    the rig's, images (frames, 3, *size). A pixel takes its colour from the first real camera that
    sees in its direction, the one of the same id before all others; it is black where none does.
    Rotating a camera needs no depth, translating it would: camera_to_ego has the rig's rotation and
    the real camera's position. camera_ids left out: those of the rig whose centre is seen.
    """
    turned = {}
    for camera_id in sorted(camera_ids or rig):
        intrinsics, pose = rig_camera(camera_id, *size, rig)
        directions = rays(intrinsics, *size) @ pose[:3, :3].T  # (H, W, 3), ego axes
        seen = torch.zeros(size, dtype=torch.bool)
        picture = None
        for source in sorted(views, key=lambda source: source != camera_id):  # its own id first
            images, lens, source_pose = views[source]
            if picture is None:
                picture = torch.zeros(len(images), 3, *size)
            pixels, visible = project(directions @ source_pose[:3, :3], lens)
            visible &= ~seen
            if not visible.any():
                continue
            if not seen.any():
                pose[:3, 3] = source_pose[:3, 3]
            colours = colours_at(pixels, images, lens, intrinsics[6])
            picture = torch.where(visible, colours, picture)
            seen |= visible
        if camera_ids or seen[size[0] // 2, size[1] // 2]:
            turned[camera_id] = picture.round().byte(), intrinsics, pose
    if not turned:
        raise ValueError(
            f"no camera of the rig looks where cameras {list(views)} do; choose camera_ids")
    return turned


def colours_at(pixels, images, lens, focal):
    """
    Colours (frames, 3, H, W) of images at pixels (H, W, 2), for a camera with this focal length.

    Focal lengths are in pixels per radian on the axis. Where the images' own, in lens (10,), is
    longer, they are averaged first, so that no pixel is skipped.
    """
    shrink = max(1, float((lens[6] if lens[0] == 0 else lens[5]) / focal))
    small = [max(1, round(n / shrink)) for n in images.shape[2:]]
    images = interpolate(images.float(), small, mode="area")
    grid = (2 * pixels / lens[1:3] - 1).expand(len(images), -1, -1, -1)  # the picture is -1 .. 1
    return grid_sample(images, grid, padding_mode="border", align_corners=False)


# --------------------------------------------------------------------------------------------------
# Motion


class Motion:
    """
    Where the rear axle was, at its own times and, by interpolation, between them.

    where       the file to name in errors
    times       (N,) s, increasing
    xyz, rot    (N, 3) m and (N, 3, 3) in any fixed frame with z up
    measured    those of KINEMATICS that were recorded, each (N,) in the units of a Scene

    ValueError for fewer than 4 poses, numbers that are not finite, times that do not increase or
    are not in s.
    """

    def __init__(self, where, times, xyz, rot, **measured):
        doors.check_poses(where, times, {"position": xyz, "rotation": rot, **measured})
        self.where = where
        self.times = times
        self.first, self.last = times[0], times[-1]
        self.xyz = xyz
        self.rot = rot
        self.measured = measured

    @functools.cached_property
    def curve(self):
        """The spline through the positions, (4, N - 1, 3): see cubic_spline."""
        return cubic_spline(self.times, self.xyz)

    def pose(self, t):
        """
        xyz (T, 3), rot (T, 3, 3) and velocity (T, 3) m/s at t (T,) s.

        By cubic spline and slerp, as in NVIDIA's kit.
        """
        i = np.searchsorted(self.times[1:-1], t, side="right")  # t is between poses i and i + 1
        since = t - self.times[i]
        s = since[:, None]
        a, b, c, d = self.curve[:, i]
        xyz = a + s * (b + s * (c + s * d))
        velocity = b + s * (2 * c + s * 3 * d)
        rot = slerp(self.rot[i], self.rot[i + 1], since / np.diff(self.times)[i])
        return xyz, rot, velocity

    def speed(self, t):
        """Speed (T,) in m/s at t (T,), negative in reverse."""
        if "speed" in self.measured:
            return np.interp(t, self.times, self.measured["speed"])
        _, rot, velocity = self.pose(t)
        return (velocity * rot[:, :, 0]).sum(-1)  # along the x axis of the car

    def kinematics(self, t0):
        """
        The Scene's ego_kinematics (20, 4).

        What was not measured is derived from the poses, with slopes over 0.6 s that end at t0 at
        the latest: a model reads this. Where a clip starts less than 1.9 s before t0, its first
        values are repeated.
        """
        t = np.maximum(t0 + DT * np.arange(1 - PAST, 1), self.first)  # (20,)
        before = np.maximum(t - 0.3, self.first)
        after = np.minimum(t + 0.3, t0)
        seconds = after - before
        speed = self.speed(t)
        turned = self.pose(before)[1].swapaxes(1, 2) @ self.pose(after)[1]
        yaw_rate = yaw_of(torch.from_numpy(turned)).numpy() / seconds
        columns = {
            "speed": speed,
            "acceleration": (self.speed(after) - self.speed(before)) / seconds,
            "steering": steering_angle(speed, yaw_rate / np.where(speed == 0, 1, speed)),
            "turn_signal": 0 * t,
        }
        for field, values in self.measured.items():
            columns[field] = np.interp(t, self.times, values)
        if "turn_signal" in self.measured:  # a switch has no values between
            columns["turn_signal"] = self.measured["turn_signal"][last_at(self.times, t)]
        return np.stack([columns[field] for field in KINEMATICS], -1)

    def scene(self, t0, future):
        """The Scene's entries about motion, in the ego frame at t0; ego_future_* with `future`."""
        (origin,), (facing,), _ = self.pose(np.array([t0]))
        steps = {"history": np.arange(1 - HISTORY, 1)}
        if future:
            steps["future"] = np.arange(1, FUTURE + 1)
        scene = {"ego_kinematics": self.kinematics(t0)}
        for name, step in steps.items():
            xyz, rot, _ = self.pose(t0 + DT * step)
            scene[f"ego_{name}_xyz"] = (xyz - origin) @ facing
            scene[f"ego_{name}_rot"] = facing.T @ rot
        return {key: torch.from_numpy(value).float() for key, value in scene.items()}


def last_at(times, t):
    """Indices (T,) of the last of times (N,) at or before each of t (T,)."""
    return np.searchsorted(times, t + TICK, side="right") - 1


def steering_angle(speed, curvature):
    """rad. A car that hardly moves shows no curvature: below LOW_SPEED the angle is 0."""
    return np.arctan(WHEELBASE * np.where(np.abs(speed) < LOW_SPEED, 0.0, curvature))


def cubic_spline(x, y):
    """
    The cubic spline through y (N, D) at knots x (N,), with "not-a-knot" ends; N >= 4.

    Returns coefficients (4, N - 1, D) of 1, s, s^2, s^3 in each interval, s from its left knot.
    Slopes are continuous at the N - 2 inner knots: a tridiagonal system of second derivatives. Next
    to an end the third derivative is continuous too. So the outer second derivative lies on a line
    with the next two, and drops out of the system. A sweep of Jacobi's iteration halves the error,
    100 leave rounding. (Not so for 4 poses, if the middle gap is 20 times shorter: 1e-6.)
    """
    h = np.diff(x)[:, None]  # (N - 1, 1)
    chord = np.diff(y, axis=0) / h  # (N - 1, D)
    right = 6 * np.diff(chord, axis=0)  # (N - 2, D)
    below, above = h[:-1].copy(), h[1:].copy()
    diagonal = 2 * (below + above)
    first, last = h[0] / h[1], h[-1] / h[-2]
    diagonal[0] += h[0] * (1 + first)
    above[0] -= h[0] * first
    diagonal[-1] += h[-1] * (1 + last)
    below[-1] -= h[-1] * last
    bend = np.zeros(y.shape)  # the second derivatives, of which the ends stay 0 for now
    for _ in range(100):
        bend[1:-1] = (right - below * bend[:-2] - above * bend[2:]) / diagonal
    bend[0] = bend[1] + first * (bend[1] - bend[2])
    bend[-1] = bend[-2] + last * (bend[-2] - bend[-3])
    slope = chord - h / 6 * (2 * bend[:-1] + bend[1:])
    return np.stack([y[:-1], slope, bend[:-1] / 2, np.diff(bend, axis=0) / (6 * h)])


def slerp(first, second, share):
    """
    Rotations (N, 3, 3) a share (N,) of the way from first to second (N, 3, 3).

    first exp(share log(first^T second)); the two are less than 180 degrees apart.
    """
    turn = first.swapaxes(1, 2) @ second
    odd = (turn - turn.swapaxes(1, 2)) / 2  # sin(angle) [axis]x
    sin = np.sqrt((odd**2).sum((1, 2)) / 2)
    cos = (np.trace(turn, axis1=1, axis2=2) - 1) / 2
    angle = share * np.arctan2(sin, cos) / np.maximum(sin, 1e-12)
    log = torch.from_numpy(angle[:, None, None] * odd)
    return first @ torch.linalg.matrix_exp(log).numpy()


def rotation(yaw, pitch, roll):
    """
    Rz(yaw) Ry(pitch) Rx(roll), each (N,) rad -> (N, 3, 3).

    y is left, so a positive pitch is nose down.
    """
    z, y, x = rot_of(torch.from_numpy(np.stack([yaw, pitch, roll])))  # each turns about z:
    y = y.roll((2, 2), (1, 2))  # now about y
    x = x.roll((1, 1), (1, 2))  # about x
    return (z @ y @ x).numpy()


# --------------------------------------------------------------------------------------------------
# The three readers


def read_folder(path):
    """
    A folder of one's own -> [Clip].

        egomotion.csv       header time,x,y,yaw: s, m, m, rad of the rear axle in any fixed frame,
                            x forward where yaw = 0; at about 10 Hz or more. Optional columns: z,
                            roll, pitch (rad, nose down is positive), speed, acceleration, steering
                            (rad, left is positive), turn_signal (-1, 0, 1)
        front_wide_120fov/  a folder for each camera there is, with png or jpg images in the order
                            of their names; cross_left_120fov, front_tele_30fov ...: the names in
                            CAMERAS, take the most similar one
            times.csv       header time: s on the clock of egomotion.csv, a line for each image;
                            or header file,time: the images by name
        cameras.json        optional, a rig needs it: {"front_wide_120fov": {"kind": "pinhole",
                            "width": 1920, "height": 1080, "cx": 960, "cy": 540,
                            "coefficients": [1000, 1000], "camera_to_ego": 4 x 4 rows, from x right,
                            y down, z out to the ego frame}}; see `project`, kind may be "ftheta"
        reasoning.json      optional: [{"time": 3.2, "text": "Stop and keep lane since the light
                            ahead is red."}]
    """
    file = path / "egomotion.csv"
    columns = read_csv(file, ("time", "x", "y", "yaw"), ("z", "roll", "pitch", *KINEMATICS))
    times = columns["time"]
    doors.check_bounds(file, times, {"yaw": columns["yaw"]})
    z, roll, pitch = [columns.get(name, 0 * times) for name in ("z", "roll", "pitch")]
    xyz = np.c_[columns["x"], columns["y"], z]
    measured = {name: columns[name] for name in KINEMATICS if name in columns}
    motion = Motion(file, times, xyz, rotation(columns["yaw"], pitch, roll), **measured)
    cameras = {}
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        if folder.name.startswith((".", "__")):  # .ipynb_checkpoints, __MACOSX
            continue
        if folder.name not in CAMERAS:
            raise ValueError(f"{folder}: unknown camera, expected one of {', '.join(CAMERAS)}")
        cameras[CAMERAS.index(folder.name)] = read_camera(folder, path / "cameras.json")
    return [Clip(path.resolve().name, motion, cameras, read_reasoning(path / "reasoning.json"))]


def read_camera(folder, calibrations):
    """The Camera in a folder of images, see read_folder; calibrations: cameras.json, if any."""
    file = folder / "times.csv"
    columns = read_csv(file, ("time",), ("file",))
    images = files_in(folder, *IMAGE_TYPES)
    if "file" in columns:
        there = {image.name: image for image in images}
        with expecting(f"{file}: column file names no image of its folder"):
            images = [there[name] for name in columns["file"]]
    known = read_calibration(calibrations, folder.name) if calibrations.exists() else ()
    return image_camera(file, images, columns["time"], *known)


def read_calibration(file, name):
    """A camera's intrinsics (10,) and camera_to_ego (4, 4) in cameras.json, see read_folder."""
    entry = read_json(file).part(name)
    kinds = ("ftheta", "pinhole")  # 0 and 1 in `project`
    if entry.text("kind") not in kinds:
        raise entry.wrong("kind", " or ".join(kinds))
    frame = [entry.number(field) for field in ("width", "height", "cx", "cy")]
    numbers = entry["coefficients"], entry["camera_to_ego"]
    return doors.calibration_of(f"{file}: {name}", kinds.index(entry["kind"]), frame, *numbers)


def read_reasoning(file):
    """{time in s: text} of a reasoning.json, see read_folder; empty where there is no file."""
    entries = read_json(file, list) if file.exists() else []
    return texts_of(file, entries, "time", 1, "text")


def texts_of(where, entries, time, second, text):
    """{time in s: text} of a list of objects; time and text name their fields.

    second: how many of its units a second has."""
    texts = {}
    for entry in doors.objects_of(where, entries):
        at = entry.number(time) / second
        words = entry.text(text).strip()
        if texts.setdefault(at, words) != words:
            raise ValueError(f"{where}: two texts at {at:g} s")
    return texts


def read_kitti(path):
    """
    A drive of KITTI raw, synced and rectified -> [Clip].

    Motion comes from oxts, and image_02 is the front wide camera. The ego frame has the axes of the
    inertial unit. From the unit the camera is 1.08 m ahead, 0.25 m to the right and 0.73 m up; the
    ego's origin is 1.60 m behind the camera, 0.06 m to its right (the middle) and 1.65 m below it.
    Time 0 is the first pose. A reasoning.json may be beside oxts, as in a folder of one's own.
    """
    clock = read_timestamps(path / "oxts/timestamps.txt")
    motion = kitti_motion(path / "oxts", (clock - clock[0]) / 1e6)
    file = path / "image_02/timestamps.txt"
    images = files_in(path / "image_02/data", *IMAGE_TYPES)
    camera = image_camera(file, images, (read_timestamps(file) - clock[0]) / 1e6)
    size = read_image(images[0]).shape[:2]
    camera.intrinsics, camera.camera_to_ego = kitti_calibration(path, *size)
    name = path.resolve().name
    return [Clip(name, motion, {1: camera}, read_reasoning(path / "reasoning.json"))]


def kitti_motion(folder, times):
    """The Motion in KITTI's oxts, with poses at times (N,) in s."""
    rows = np.array([read_oxts(file) for file in files_in(folder / "data", ".txt")])  # (N, 30)
    doors.check_count(folder, times, rows, "files in data")
    east = (rows[:, 1] - rows[0, 1] + 180) % 360 - 180  # degrees from the start, the short way
    latitude, longitude = np.radians([rows[:, 0], east])
    up, roll, pitch, yaw = rows[:, 2:6].T
    scale = 6378137 * np.cos(latitude[0])  # Mercator, true to scale at the start
    north = scale * np.log(np.tan(np.pi / 4 + latitude / 2))
    unit = np.c_[scale * longitude, north, up]
    rot = rotation(yaw, pitch, roll)
    xyz = unit - unit[0] + rot @ (-0.52, -0.31, -0.92)
    return Motion(folder, times, xyz, rot, speed=rows[:, 8], acceleration=rows[:, 14])


KITTI_CALIBRATION = """
S_rect_02: 1242 375
P_rect_02: 721.5377 0 609.5593 0 0 721.5377 172.854 0 0 0 1 0
"""


def kitti_calibration(path, height, width):
    """
    The pinhole (10,) of image_02, scaled to images of this size, and its camera_to_ego (4, 4).

    It is read from calib_cam_to_cam.txt in the folder or its parent, else it is that of 2011_09_26.
    KITTI's pixel centres are at integers, ours half a pixel further.
    """
    text = KITTI_CALIBRATION
    for file in (path / "calib_cam_to_cam.txt", path.parent / "calib_cam_to_cam.txt"):
        if file.exists():
            text = read_text(file)
            break
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    with expecting(f"{file}: expected lines S_rect_02 and P_rect_02 of numbers"):
        full_width, full_height = map(float, lines["S_rect_02"].split())
        projection = np.array(lines["P_rect_02"].split(), float).reshape(3, 4)
        scale = np.array([width / full_width, height / full_height])
    centre = (projection[:2, 2] + 0.5) * scale
    focal = projection.diagonal()[:2] * scale
    _, pose = rig_camera(1, 1, 1, {1: ((1.6, 0.06, 1.65), 0, 1)})  # looks ahead, level
    return doors.calibration_of(file, 1, [width, height, *centre], focal, pose)


def read_nvidia(path):
    """
    NVIDIA's PhysicalAI-AV data set, as far as its chunks are in the folder -> [Clip].

    t0 are the events of reasoning/ood_reasoning.parquet, with their texts, or else event_t0s of
    clip_index.parquet, or else 5.1 s, the release's default. Clips without egomotion here and
    invalid ones are left out; a note counts those that the zips here lack.
    """
    kit = Kit(path)
    file = path / "clip_index.parquet"
    listed = [clip for clip in kit.index.index if kit.file_of(clip, "egomotion")]
    there = [clip for clip in listed if "egomotion" in kit.parts(clip, "egomotion")]
    if not there:
        raise FileNotFoundError(f"{path}: none of the clips of {file.name} has its egomotion here")
    if len(there) < len(listed):
        gone = len(listed) - len(there)
        doors.note(f"{path}: {gone} of {len(listed)} clips are left out, the zips lack their poses")
    events = nvidia_events(path / "reasoning/ood_reasoning.parquet")
    clips = []
    for clip in there:
        inside(path, clip, f"{file}: clip_id")
        starts = kit.index.get("event_t0s", {}).get(clip)
        with expecting(f"{file}: event_t0s of clip {clip} must be a list of microseconds"):
            starts = {int(start) / 1e6: "" for start in ([] if starts is None else starts)}
        starts = events.get(clip) or starts or {5.1: ""}
        clips.append(Clip(clip, nvidia_motion(kit, clip), nvidia_cameras(kit, clip), starts))
    return clips


class Kit:
    """NVIDIA's kit on a folder: what is there of which clip. Its errors name folder and clip."""

    def __init__(self, path):
        self.path = path
        self.kit = local_kit(path)
        with expecting(f"{path}/clip_index.parquet: expected clip_id, clip_is_valid and chunk"):
            index = self.kit.clip_index
            index = index[index["clip_is_valid"]].astype({"chunk": int})
            if not index.index.is_unique:
                raise ValueError("a clip_id stands in two rows")
        self.index = self.kit.clip_index = index

    def name_of(self, clip, feature):
        """What to call a feature of a clip in errors."""
        return f"{self.path}: {feature} of clip {clip}"

    def file_of(self, clip, feature):
        """The file that has a clip's feature; None where it is not there."""
        if feature not in self.kit.features.ALL:
            return None
        with expecting(f"{self.path}/features.csv: chunk_path of {feature}"):
            chunk = self.index.at[clip, "chunk"]
            name = self.kit.features.get_chunk_feature_filename(chunk, feature)
        file = self.kit.download_file(name)
        return file if os.path.exists(file) else None

    def parts(self, clip, feature):
        """What a zip file has of a clip's feature: {part: name in the zip file}."""
        file = self.file_of(clip, feature)
        if not file:
            return {}
        with expecting(f"{file}: not a zip file"), zipfile.ZipFile(file) as archive:
            there = set(archive.namelist())
        with expecting(f"{self.path}/features.csv: clip_files_in_zip of {feature}"):
            parts = self.kit.features.get_clip_files_in_zip(clip, feature)
            return {part: name for part, name in parts.items() if name in there}

    def read(self, clip, feature):
        """A clip's feature, as the kit has it."""
        with expecting(f"{self.name_of(clip, feature)}: the kit cannot read it"):
            return self.kit.get_clip_feature(clip, feature)

    def image_times(self, clip, feature):
        """When the images of a camera were taken, (N,) s. The kit would read the video for it."""
        import pandas  # the kit brings it

        name = self.parts(clip, feature)["frame_timestamps"]
        with expecting(f"{self.name_of(clip, feature)}: expected a table of timestamps"):
            with zipfile.ZipFile(self.file_of(clip, feature)) as archive:
                table = pandas.read_parquet(io.BytesIO(archive.read(name)))
            return table["timestamp"].to_numpy(float) / 1e6

    def images(self, clip, feature, numbers):
        """Images (n, H, W, 3) uint8 of a camera by their numbers (n,)."""
        video = self.read(clip, feature)
        with expecting(f"{self.name_of(clip, feature)}: no images {numbers.tolist()}"):
            return video.decode_images_from_frame_indices(numbers)


def local_kit(path):
    """NVIDIA's kit on a folder. It asks the Hugging Face hub what there is, this one the folder."""
    try:
        from physical_ai_av import PhysicalAIAVDatasetInterface
    except ImportError as error:
        raise ImportError(f"{path}: NVIDIA's layout is read by its kit, "
                          f"pip install physical_ai_av ({error})") from None  # fmt: skip

    class LocalKit(PhysicalAIAVDatasetInterface):
        def _load_metadata(self):
            self.api = self  # in place of the hub's
            self.is_offline_mode = True
            super()._load_metadata()

        def file_exists(self, filename, **repository):
            return os.path.exists(self.download_file(filename))

        is_file_cached = file_exists

        def download_file(self, filename):
            return inside(path, filename, f"{path}/features.csv: chunk_path")

        def open_file(self, filename, **options):
            return open(self.download_file(filename), "rb")

    with expecting(f"{path}: NVIDIA's kit cannot read its tables"):
        return LocalKit(revision="local")


def nvidia_events(file):
    """{clip: {time in s: text}} of ood_reasoning.parquet; empty where there is no file."""
    import pandas  # the kit brings it

    if not file.exists():
        return {}
    with expecting(f"{file}: expected clip_id and events"):
        table = pandas.read_parquet(file)["events"].items()
    events = {}
    for clip, entries in table:
        where = f"{file}: events of clip {clip}"
        of_text = isinstance(entries, str)
        entries = doors.parse_json(entries, where) if of_text else np.ravel(entries).tolist()
        events[clip] = texts_of(where, entries, "event_start_timestamp", 1e6, "cot")
    return events


def nvidia_motion(kit, clip):
    """The Motion of a clip. Its velocities and accelerations are in the frame of the poses."""
    egomotion = kit.read(clip, "egomotion")
    state = egomotion.values
    rot = state.pose.rotation.as_matrix()
    forward = rot[:, :, 0]
    speed = (state.velocity * forward).sum(-1)
    acceleration = (state.acceleration * forward).sum(-1)
    steering = steering_angle(speed, state.curvature[:, 0])
    return Motion(kit.name_of(clip, "egomotion"), egomotion.timestamps / 1e6,
                  state.pose.translation, rot,
                  speed=speed, acceleration=acceleration, steering=steering)  # fmt: skip


def nvidia_cameras(kit, clip):
    """{id: Camera} of a clip, calibrated where the folder has both the lenses and the poses."""
    lenses = poses = {}
    if kit.file_of(clip, "camera_intrinsics") and kit.file_of(clip, "sensor_extrinsics"):
        lenses = kit.read(clip, "camera_intrinsics").camera_models
        poses = kit.read(clip, "sensor_extrinsics").sensor_poses
    cameras = {}
    for camera_id, name in enumerate(CAMERAS):
        feature = "camera_" + name
        if not kit.parts(clip, feature).keys() >= {"video", "frame_timestamps"}:
            continue
        where = kit.name_of(clip, feature)
        known = ()
        if feature in lenses and feature in poses:
            lens = lenses[feature]
            frame = [lens.width, lens.height, *lens.principal_point]
            pose = poses[feature].as_matrix()
            known = doors.calibration_of(where, 0, frame, lens.th2r.coef, pose)
        images = functools.partial(kit.images, clip, feature)
        cameras[camera_id] = Camera(where, kit.image_times(clip, feature), images, *known)
    return cameras


# --------------------------------------------------------------------------------------------------
# Single files


def image_camera(file, images, times, *known):
    """A Camera of images (paths, oldest first) taken at times (N,) in s; file has the times.

    known: what `calibration_of` makes, if anything."""
    doors.check_count(file, times, images, "images")
    return Camera(file, times, lambda numbers: [read_image(images[i]) for i in numbers], *known)


def read_timestamps(file):
    """KITTI's lines of date and time -> (N,) us, integers."""
    lines = read_text(file).split("\n")
    with expecting(f"{file}: expected lines like 2011-09-26 13:02:25.964000000"):
        stamps = [datetime.fromisoformat(line.strip()) for line in lines if line.strip()]
        if not stamps:
            raise ValueError("it is empty")
        return np.array(stamps, "datetime64[us]").astype("int64")


def read_oxts(file):
    """A file of KITTI's oxts -> 30 numbers: latitude, longitude, altitude, roll, pitch, yaw, ..."""
    numbers = [doors.number_of(text, f"{file}: a field") for text in read_text(file).split()]
    if len(numbers) != 30 or not abs(numbers[0]) < 89:
        raise ValueError(f"{file}: expected 30 numbers, the first a latitude within 89 degrees")
    return numbers
