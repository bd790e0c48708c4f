"""
Real clips: NVIDIA's PhysicalAI-AV, KITTI raw, a folder of one's own.
"""
import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from alpamayo import DT, LOW_SPEED, project
from world import FUTURE, HISTORY, PAST, WHEELBASE, rays, rig_camera

#
# A reader turns what lies on the disk into Clips: a Motion (poses at their own times), Cameras (images at their own
# times) and texts. From there on all clips are alike, and ClipScenes cuts Scenes out of them.

CAMERAS = {"cross_left_120fov": 0, "front_wide_120fov": 1, "cross_right_120fov": 2, "rear_left_70fov": 3,
           "rear_tele_30fov": 4, "rear_right_70fov": 5, "front_tele_30fov": 6}
USED = (0, 1, 2, 6)     # the cameras that the release looks through
KINEMATICS = ("speed", "acceleration", "steering", "turn_signal")   # the columns of a Scene's ego_kinematics
TICK = 5e-7             # s, half a microsecond of NVIDIA's clock: times closer than this are the same time


class Camera(NamedTuple):
    read: Callable      # times (frames,) in s -> (frames, H, W, 3) uint8, for each the last image at or before it
    first: float        # s, the first image
    last: float
    intrinsics: torch.Tensor | None         # (10,), see `project`; None where unknown
    camera_to_ego: torch.Tensor | None      # (4, 4)


class Clip(NamedTuple):
    name: str
    motion: "Motion"
    cameras: dict       # camera id -> Camera
    reasoning: dict     # time in s -> text
    starts: list        # s, the t0 that the data itself names; empty: every half second


def load_clips(path, t0=None, camera_ids=None, frames=4, frame_dt=0.1, size=None, rig=None, future=True):
    """
    Scenes of the real clips in a folder -> ClipScenes: `len(set)`, `set.batch(indices)` -> Scene, `set.names`.

    path        NVIDIA's layout (it holds features.csv), a drive of KITTI raw (oxts), or a folder of one's own
                (egomotion.csv): see read_nvidia, read_kitti, read_folder
    t0          a time or a list of times in s on the clip's own clock; left out: its key frames, the times that have
                reasoning, or else every half second. There must be more than 1.6 s of poses before t0, as in the
                release, and 6.4 s after it
    camera_ids  left out: those of 0, 1, 2 and 6 that there are
    frames      images of each camera, frame_dt s apart, the last one at t0
    rig, size   RIG or the like, and (H, W): all images are turned into what the cameras of the rig would see, for
                models that know only the world. Left out, images keep their size, which must be one for all
    future      False asks for no poses after t0; the Scenes then have no ego_future_xyz and ego_future_rot

    A Scene has camera_to_ego and intrinsics where all its cameras are calibrated.
    Raises ValueError or FileNotFoundError: one line that names the file and what was expected of it.
    """
    if (rig is None) != (size is None):
        raise ValueError("rig and size go together: without a rig, images keep their own size")
    return ClipScenes(read_clips(path), t0, camera_ids, frames, frame_dt, size, rig, future)


def read_clips(path):
    """The Clips in a folder of one of the three layouts, see load_clips."""
    path = Path(path)
    readers = {"features.csv": read_nvidia, "oxts": read_kitti, "egomotion.csv": read_folder}
    found = [reader for entry, reader in readers.items() if (path / entry).exists()]
    if not found:
        raise FileNotFoundError(f"{path}: no ego motion in it, expected one of {', '.join(readers)}")
    return found[0](path)


class ClipScenes:
    """The Scenes cut out of clips, see load_clips. `names` and `reasoning` have a str for each."""

    def __init__(self, clips, t0, camera_ids, frames, frame_dt, size, rig, future):
        self.camera_ids, self.size, self.rig, self.future = camera_ids, size, rig, future
        self.ages = frame_dt * np.arange(frames - 1, -1, -1)                # (frames,) s before t0, oldest first
        self.cuts, refused = [], []                                         # (clip, t0) of each Scene; reasons
        for clip in clips:
            first, last = clip.motion.times[[0, -1]]
            every_half = np.arange(first + 2, max(last, first + 2.1), 0.5)  # never empty: a short clip is to be told
            for start in (clip.starts or every_half) if t0 is None else np.atleast_1d(t0):
                reason = self.refusal(clip, float(start))
                if reason:
                    refused.append(reason)
                else:
                    self.cuts.append((clip, float(start)))
        if refused and (t0 is not None or not self.cuts):                   # asked for in vain, or nothing left
            raise ValueError(refused[0])
        self.names = [f"{clip.name} at {start:.1f} s" for clip, start in self.cuts]
        self.reasoning = [next((text for at, text in clip.reasoning.items() if abs(at - start) < DT / 2), "")
                          for clip, start in self.cuts]

    def __len__(self):
        return len(self.cuts)

    def batch(self, indices):
        """Scenes number `indices` -> one Scene. ValueError where their cameras or the sizes of their images differ."""
        indices = [int(i) for i in indices]
        scenes = [self.scene(i) for i in indices]
        for i, scene in zip(indices, scenes):
            ours, first = [(*s["camera_ids"].tolist(), *s["images"].shape, *s) for s in (scene, scenes[0])]
            if ours != first:
                raise ValueError(f"{self.names[i]} cannot be batched with {self.names[indices[0]]}: cameras, sizes of "
                                 "images or calibration differ; choose camera_ids or a rig")
        lists = {key: [scene[key] for scene in scenes] for key in scenes[0]}
        return {key: torch.stack(values) if torch.is_tensor(values[0]) else values for key, values in lists.items()}

    def drive_plans(self, indices, plans):
        """What came of it if the car drove otherwise, a clip cannot tell."""
        return {}

    def scene(self, index):
        """Scene number `index`, not batched."""
        clip, t0 = self.cuts[index]
        views = {}                                  # camera id -> images (frames, 3, H, W), intrinsics, camera_to_ego
        for camera_id, camera in self.sources(clip).items():
            images = torch.from_numpy(camera.read(t0 - self.ages)).permute(0, 3, 1, 2)
            width, height = images.shape[3], images.shape[2]
            if camera.intrinsics is not None and camera.intrinsics[1:3].tolist() != [width, height]:
                raise ValueError(f"{clip.name}: images of camera {camera_id} are {width} x {height} pixels, but its "
                                 "intrinsics are for {:g} x {:g}".format(*camera.intrinsics[1:3]))
            views[camera_id] = images, camera.intrinsics, camera.camera_to_ego
        if self.rig:
            views = reproject(self.rig, views, self.camera_ids, self.size)
        images, intrinsics, poses = zip(*views.values())
        sizes = {camera_id: tuple(view.shape[2:]) for camera_id, view in zip(views, images)}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{clip.name}: images must be of one size, by camera they are {sizes}; choose camera_ids")
        scene = clip.motion.scene(t0, self.future)
        scene["images"], scene["camera_ids"] = torch.stack(images), torch.tensor(list(views))
        if all(lens is not None for lens in intrinsics):
            scene["intrinsics"], scene["camera_to_ego"] = torch.stack(intrinsics), torch.stack(poses)
        scene["reasoning"], scene["name"] = self.reasoning[index], self.names[index]
        return scene

    def sources(self, clip):
        """The cameras that its Scenes are made of: {id: Camera}, ids ascending."""
        ids = sorted(self.camera_ids) if self.camera_ids and not self.rig else [i for i in USED if i in clip.cameras]
        if not ids or not set(ids) <= set(clip.cameras):
            raise ValueError(f"{clip.name}: has the cameras {sorted(clip.cameras)}, not {ids or list(USED)}")
        unknown = [i for i in ids if clip.cameras[i].intrinsics is None]
        if self.rig and unknown:
            raise ValueError(f"{clip.name}: a rig needs calibrated cameras, camera {unknown[0]} is not")
        return {i: clip.cameras[i] for i in ids}

    def refusal(self, clip, t0):
        """In a line, what the clip is too short for; None if it is not."""
        first, last = clip.motion.times[[0, -1]]
        start, end = t0 - HISTORY * DT, t0 + FUTURE * DT * self.future
        if not first < start - TICK or end > last + TICK:
            hint = f" ({t0:.2f} s with future=False)" if self.future else ""
            return (f"{clip.motion.where}: too short for t0 = {t0:.2f} s, which needs poses from before {start:.2f} s "
                    f"to {end:.2f} s{hint}; there are {first:.2f} to {last:.2f} s")
        for camera_id, camera in self.sources(clip).items():
            start = t0 - self.ages[0]
            if start < camera.first - TICK or t0 > camera.last + TICK:
                return (f"{clip.name}: too short for t0 = {t0:.2f} s, which needs images of camera {camera_id} from "
                        f"{start:.2f} s to {t0:.2f} s; there are {camera.first:.2f} to {camera.last:.2f} s")


def reproject(rig, views, camera_ids, size):
    """
    What the cameras of a rig would see: the images of real cameras, turned but not moved.

    views {id: (images (frames, 3, h, w) uint8, intrinsics, camera_to_ego)} -> the same for the rig's cameras, images
    (frames, 3, *size). A pixel takes its colour from the first real camera that sees in its direction, the one of the
    same id before all others, and is black where none does. To turn a camera takes no depths, to move it would: so
    camera_to_ego has the rig's direction, but the place of the real camera. camera_ids left out: those of the rig whose
    centre is seen.
    """
    turned = {}
    for camera_id in sorted(camera_ids or rig):
        intrinsics, pose = rig_camera(camera_id, *size, rig)
        directions = rays(intrinsics, *size) @ pose[:3, :3].T                               # (H, W, 3), ego axes
        frames = next(iter(views.values()))[0].shape[0]
        picture, unseen = torch.zeros(frames, 3, *size), torch.ones(size, dtype=torch.bool)
        for _, (images, source, source_pose) in sorted(views.items(), key=lambda view: view[0] != camera_id):
            pixels, visible = project(directions @ source_pose[:3, :3], source)
            visible &= unseen
            if not visible.any():
                continue
            if unseen.all():
                pose[:3, 3] = source_pose[:3, 3]
            # Average first, so that no pixel of the source is skipped: by the ratio of pixels per radian on the axis.
            focal = source[6] if source[0] == 0 else source[5]
            small = [max(1, round(n / max(1, float(focal / intrinsics[6])))) for n in images.shape[2:]]
            images = torch.nn.functional.interpolate(images.float(), small, mode="area")
            grid = (2 * pixels / source[1:3] - 1).expand(frames, -1, -1, -1)                # the picture is -1 .. 1
            colours = torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
            picture = torch.where(visible, colours, picture)
            unseen &= ~visible
        if camera_ids or not unseen[size[0] // 2, size[1] // 2]:
            turned[camera_id] = picture.round().byte(), intrinsics, pose
    if not turned:
        raise ValueError(f"no camera of the rig looks where cameras {list(views)} do; choose camera_ids")
    return turned


class Motion:
    """
    Where the rear axle was, at its own times and, by interpolation, between them.

    where: the file to name in errors. times (N,) s; xyz (N, 3) m and rot (N, 3, 3) in any fixed frame with z up;
    measured: those of KINEMATICS that were recorded, each (N,) in the units of a Scene.
    Raises ValueError where there are fewer than 4 poses, a number is not finite or times do not increase.
    """

    def __init__(self, where, times, xyz, rot, **measured):
        if len(times) < 4:
            raise ValueError(f"{where}: {len(times)} poses, expected 4 or more")
        for field, values in dict(time=times, position=xyz, rotation=rot, **measured).items():
            for row in np.argwhere(~np.isfinite(values))[:1, 0]:
                raise ValueError(f"{where}: {field} of pose {row} is not a finite number")
        require_increasing(where, times)
        self.where, self.times, self.xyz, self.rot, self.measured = where, times, xyz, rot, measured
        self.slopes = spline_slopes(times, xyz)                             # (N, 3) m/s

    def pose(self, t):
        """t (T,) s -> xyz (T, 3), rot (T, 3, 3), velocity (T, 3) m/s: cubic spline and slerp, as in NVIDIA's kit."""
        i = np.clip(np.searchsorted(self.times, t, side="right") - 1, 0, len(self.times) - 2)
        seconds = (self.times[i + 1] - self.times[i])[:, None]
        u = (t - self.times[i])[:, None] / seconds                          # 0 at pose i, 1 at pose i + 1
        mean, start, end = (self.xyz[i + 1] - self.xyz[i]) / seconds, self.slopes[i], self.slopes[i + 1]
        a, b = 3 * mean - 2 * start - end, start + end - 2 * mean           # of u^2 and u^3, so that slopes meet
        xyz = self.xyz[i] + seconds * u * (start + u * (a + u * b))
        return xyz, slerp(self.rot[i], self.rot[i + 1], u[:, 0]), start + u * (2 * a + u * 3 * b)

    def speed(self, t):
        """Speed (T,) in m/s at t (T,), negative in reverse."""
        if "speed" in self.measured:
            return np.interp(t, self.times, self.measured["speed"])
        _, rot, velocity = self.pose(t)
        return (velocity * rot[:, :, 0]).sum(-1)

    def kinematics(self, t0):
        """
        The Scene's ego_kinematics (20, 4). What was not measured is derived from the poses, with slopes over 0.6 s that
        end at t0 at the latest: a model reads this. Where a clip starts less than 1.9 s before t0, its first values
        are repeated.
        """
        t = np.maximum(t0 + DT * np.arange(1 - PAST, 1), self.times[0])     # (20,)
        before, after = np.maximum(t - 0.3, self.times[0]), np.minimum(t + 0.3, t0)
        speed, gained = self.speed(t), self.speed(after) - self.speed(before)
        turned = np.swapaxes(self.pose(before)[1], 1, 2) @ self.pose(after)[1]
        yaw_rate = np.arctan2(turned[:, 1, 0], turned[:, 0, 0]) / (after - before)
        derived = {"speed": speed, "acceleration": gained / (after - before),
                   "steering": steering_angle(speed, yaw_rate / np.where(speed == 0, 1, speed)), "turn_signal": 0 * t}
        kinematics = derived | {field: np.interp(t, self.times, values) for field, values in self.measured.items()}
        if "turn_signal" in self.measured:                                  # a switch has no values between
            last = np.searchsorted(self.times, t + TICK, side="right") - 1
            kinematics["turn_signal"] = self.measured["turn_signal"][last]
        return np.stack([kinematics[field] for field in KINEMATICS], -1)

    def scene(self, t0, future):
        """The Scene's entries about motion at t0, in the ego frame at t0; ego_future_* only with `future`."""
        (origin,), (facing,), _ = self.pose(np.array([t0]))

        def local(steps):
            xyz, rot, _ = self.pose(t0 + DT * steps)
            return (xyz - origin) @ facing, facing.T @ rot

        scene = {"ego_kinematics": self.kinematics(t0)}
        scene["ego_history_xyz"], scene["ego_history_rot"] = local(np.arange(1 - HISTORY, 1))
        if future:
            scene["ego_future_xyz"], scene["ego_future_rot"] = local(np.arange(1, FUTURE + 1))
        return {key: torch.from_numpy(value).float() for key, value in scene.items()}


def steering_angle(speed, curvature):
    """rad. A car that hardly moves shows no curvature: below LOW_SPEED the angle is 0."""
    return np.arctan(WHEELBASE * np.where(np.abs(speed) < LOW_SPEED, 0.0, curvature))


def spline_slopes(x, y):
    """
    Slopes (N, D) at its knots x (N,) of the cubic spline through y (N, D), with "not-a-knot" ends; N >= 4.

    A tridiagonal system. Inner rows say that the second derivative is continuous at a knot; the first and the last say
    that the third is too at the knot next to the end, the unknown beyond that knot being eliminated.
    """
    h = np.diff(x)                                                          # (N - 1,)
    chord = np.diff(y, axis=0) / h[:, None]                                 # (N - 1, D)

    def end(h0, h1, chord0, chord1):                                        # right side, seen from that end
        return ((3 * h0 + 2 * h1) * h1 * chord0 + h0 ** 2 * chord1) / (h0 + h1)

    inner = 3 * (h[1:, None] * chord[:-1] + h[:-1, None] * chord[1:])
    right = np.stack([end(h[0], h[1], chord[0], chord[1]), *inner, end(h[-1], h[-2], chord[-1], chord[-2])])
    below = np.array([0, *h[1:], h[-1] + h[-2]])
    diagonal = np.array([h[1], *2 * (h[:-1] + h[1:]), h[-2]])
    above = np.array([h[0] + h[1], *h[:-1], 0])
    for i in range(1, len(x)):                                              # eliminate downwards,
        factor = below[i] / diagonal[i - 1]
        diagonal[i] -= factor * above[i - 1]
        right[i] -= factor * right[i - 1]
    slopes = right / diagonal[:, None]
    for i in reversed(range(len(x) - 1)):                                   # substitute upwards
        slopes[i] -= above[i] / diagonal[i] * slopes[i + 1]
    return slopes


def slerp(first, second, share):
    """Rotations (N, 3, 3) a share (N,) of the way from first to second (N, 3, 3), which are less than 180 deg apart."""
    turn = np.swapaxes(first, 1, 2) @ second
    odd = (turn - np.swapaxes(turn, 1, 2)) / 2                              # sin(angle) [axis]x
    sin = np.sqrt((odd ** 2).sum((1, 2)) / 2)
    angle = share * np.arctan2(sin, (np.trace(turn, axis1=1, axis2=2) - 1) / 2)
    cross = odd / np.maximum(sin, 1e-12)[:, None, None]                     # [axis]x, the cross product as a matrix
    sin, cos = np.sin(angle)[:, None, None], np.cos(angle)[:, None, None]
    return first @ (np.eye(3) + sin * cross + (1 - cos) * cross @ cross)    # Rodrigues


def rotation(yaw, pitch, roll):
    """Rz(yaw) Ry(pitch) Rx(roll): each (N,) rad -> (N, 3, 3). y is left, so a positive pitch is nose down."""
    (cy, sy), (cp, sp), (cr, sr) = [(np.cos(angle), np.sin(angle)) for angle in (yaw, pitch, roll)]
    return np.stack([cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr,
                     sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr,
                     -sp, cp * sr, cp * cr], -1).reshape(-1, 3, 3)


def require_increasing(where, times):
    """ValueError unless times (N,) increase."""
    for i in np.flatnonzero(np.diff(times) <= 0)[:1]:
        raise ValueError(f"{where}: times must increase, but {times[i]} s is followed by {times[i + 1]} s")


# The three readers.

def read_folder(path):
    """
    A folder of one's own -> [Clip].

        egomotion.csv       header time,x,y,yaw: s, m, m, rad of the rear axle in any fixed frame, x forward where
                            yaw = 0; at about 10 Hz or more. Optional columns: z, roll, pitch (rad, nose down is
                            positive), speed, acceleration, steering (rad, left is positive), turn_signal (-1, 0, 1)
        front_wide_120fov/  a folder for each camera there is, with png or jpg images in the order of their names;
                            cross_left_120fov, front_tele_30fov ...: the names in CAMERAS, take the most similar one
            times.csv       header time: s on the clock of egomotion.csv, a line for each image; or header file,time
        cameras.json        optional, a rig needs it: {"front_wide_120fov": {"kind": "pinhole", "width": 1920,
                            "height": 1080, "cx": 960, "cy": 540, "coefficients": [1000, 1000], "camera_to_ego": 4 x 4
                            rows, from x right, y down, z out to the ego frame}}; see `project`, kind may be "ftheta"
        reasoning.json      optional: [{"time": 3.2, "text": "Stop and keep lane since the light ahead is red."}]
    """
    file, names = path / "egomotion.csv", ("time", "x", "y", "yaw")
    columns = read_csv(file, names, ("z", "roll", "pitch", *KINEMATICS))
    times, x, y, yaw = [columns[name] for name in names]
    z, roll, pitch = [columns.get(name, 0 * times) for name in ("z", "roll", "pitch")]
    motion = Motion(file, times, np.stack([x, y, z], -1), rotation(yaw, pitch, roll),
                    **{field: columns[field] for field in KINEMATICS if field in columns})
    calibrations = read_json(path / "cameras.json")
    cameras = {}
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        if folder.name not in CAMERAS:
            raise ValueError(f"{folder}: unknown camera, expected one of {', '.join(CAMERAS)}")
        columns = read_csv(folder / "times.csv", ("time",), ("file",))
        images = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() in (".png", ".jpg", ".jpeg"))
        images = [folder / name for name in columns["file"]] if "file" in columns else images
        known = camera_of_json(path / "cameras.json", calibrations, folder.name) if calibrations else (None, None)
        cameras[CAMERAS[folder.name]] = image_camera(folder / "times.csv", images, columns["time"], *known)
    reasoning = read_reasoning(path / "reasoning.json")
    return [Clip(path.name, motion, cameras, reasoning, list(reasoning))]


def read_reasoning(file):
    """{time in s: text} of a reasoning.json, see read_folder; empty where there is no file."""
    reasoning = read_json(file) or []
    if not all(isinstance(entry, dict) and {"time", "text"} <= entry.keys() for entry in reasoning):
        raise ValueError(f'{file}: expected a list of {{"time": s, "text": str}}')
    return {entry["time"]: entry["text"] for entry in reasoning}


def camera_of_json(file, calibrations, name):
    """intrinsics (10,) and camera_to_ego (4, 4) of the camera in cameras.json."""
    entry, kinds = calibrations.get(name, {}), {"ftheta": (0, 5), "pinhole": (1, 2)}    # coefficients of each
    if entry.get("kind") not in kinds:
        raise ValueError(f"{file}: {name} needs kind, one of {', '.join(kinds)}; it has {entry.get('kind')}")
    kind, count = kinds[entry["kind"]]
    shapes = {"width": (1,), "height": (1,), "cx": (1,), "cy": (1,), "coefficients": (count,), "camera_to_ego": (4, 4)}
    numbers = []
    for field, shape in shapes.items():
        try:
            numbers.append(torch.tensor(entry[field], dtype=torch.float32).reshape(shape))
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise ValueError(f"{file}: {name} needs {field}, numbers of shape {shape}") from None
    *lens, camera_to_ego = numbers
    return torch.cat([torch.tensor([kind]), *lens, torch.zeros(5 - count)]), camera_to_ego


def read_kitti(path):
    """
    A drive of KITTI's raw data, synced and rectified -> [Clip]: oxts for motion, image_02 as the front wide camera.

    The ego frame has the axes of the inertial unit. From the unit the camera is 1.08 m ahead, 0.25 m to the right and
    0.73 m up; the ego's origin is 1.60 m behind the camera, 0.06 m to its right (the centre line) and 1.65 m below.
    The calibration is calib_cam_to_cam.txt in the folder or its parent, else that of 2011_09_26. Time 0 is the first
    pose. A reasoning.json may be beside oxts, as in a folder of one's own.
    """
    clock = read_timestamps(path / "oxts" / "timestamps.txt")
    rows = np.array([read_oxts(file) for file in sorted((path / "oxts" / "data").glob("*.txt"))])   # (N, 30)
    if len(rows) != len(clock):
        raise ValueError(f"{path / 'oxts'}: {len(rows)} files in data, but {len(clock)} lines in timestamps.txt")
    latitude, longitude, up, roll, pitch, yaw = rows[:, :6].T
    latitude, longitude = np.radians(latitude), np.radians(longitude)
    scale = 6378137 * np.cos(latitude[0])                                   # Mercator, true to scale at the start
    unit = np.stack([scale * longitude, scale * np.log(np.tan(np.pi / 4 + latitude / 2)), up], -1)
    rot = rotation(yaw, pitch, roll)
    motion = Motion(path / "oxts", (clock - clock[0]) / np.timedelta64(1, "s"),
                    unit - unit[0] + rot @ (-0.52, -0.31, -0.92), rot, speed=rows[:, 8], acceleration=rows[:, 14])
    file = path / "image_02" / "timestamps.txt"
    times = (read_timestamps(file) - clock[0]) / np.timedelta64(1, "s")
    images = sorted((path / "image_02" / "data").glob("*.png"))
    pose = rig_camera(1, 1, 1)[1]                                           # looks ahead, level
    pose[:3, 3] = torch.tensor([1.6, 0.06, 1.65])
    camera = image_camera(file, images, times, None, pose)
    camera = camera._replace(intrinsics=kitti_intrinsics(path, *read_image(images[0]).shape[:2]))
    reasoning = read_reasoning(path / "reasoning.json")
    return [Clip(path.name, motion, {CAMERAS["front_wide_120fov"]: camera}, reasoning, list(reasoning))]


def kitti_intrinsics(path, height, width):
    """The pinhole (10,) of image_02, scaled to images of this size. KITTI's pixel centres are at integers."""
    sizes, projection = (1242, 375), (721.5377, 0, 609.5593, 0, 0, 721.5377, 172.854, 0)
    for file in (path / "calib_cam_to_cam.txt", path.parent / "calib_cam_to_cam.txt"):
        if file.exists():
            lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
            try:
                sizes, projection = [[float(n) for n in lines[key].split()] for key in ("S_rect_02", "P_rect_02")]
            except (KeyError, ValueError):
                raise ValueError(f"{file}: expected lines S_rect_02 and P_rect_02 of numbers") from None
            break
    right, down = width / sizes[0], height / sizes[1]
    fx, cx, fy, cy = [projection[i] for i in (0, 2, 5, 6)]
    return torch.tensor([1, width, height, (cx + 0.5) * right, (cy + 0.5) * down, fx * right, fy * down, 0, 0, 0])


def read_nvidia(path):
    """
    NVIDIA's PhysicalAI-AV data set, as far as its chunks are in the folder, through NVIDIA's kit -> [Clip].

    t0 are the events of reasoning/ood_reasoning.parquet, with their texts, or else event_t0s of clip_index.parquet, or
    else 5.1 s, the release's default. Clips of which there is no egomotion here are left out, as are the invalid ones.
    """
    try:
        import pandas
        from physical_ai_av import PhysicalAIAVDatasetInterface
    except ImportError as error:
        raise ImportError(f"{path}: NVIDIA's layout is read by its kit, pip install physical_ai_av ({error})") from None

    class Kit(PhysicalAIAVDatasetInterface):
        """The kit asks the Hugging Face hub what there is; this one asks the folder."""

        def is_file_cached(self, filename):
            return (path / filename).exists()

        _has_file = is_file_cached

        def download_file(self, filename):
            if not self.is_file_cached(filename):
                raise FileNotFoundError(f"{path / filename}: no such file")
            return path / filename

        def open_file(self, filename, mode="rb", maybe_stream=False):
            return open(self.download_file(filename), mode)

    kit = Kit(revision="local")

    def has(chunk, feature):
        features = kit.features
        return feature in features.ALL and kit.is_file_cached(features.get_chunk_feature_filename(chunk, feature))

    def read(clip, feature):
        try:
            return kit.get_clip_feature(clip, feature)
        except KeyError:
            raise ValueError(f"{path}: clip {clip} has no {feature}") from None

    def video(clip, feature):
        def frames(times):
            try:
                return read(clip, feature).decode_images_from_timestamps(np.round(1e6 * times).astype(np.int64))[0]
            except ValueError as error:                                     # the kit's errors have several lines
                raise ValueError(f"{path}: {feature} of clip {clip}: {' '.join(str(error).split())}") from None
        return frames

    index = kit.clip_index[kit.clip_index["clip_is_valid"]]
    chunks = {chunk for chunk in index["chunk"].unique() if has(chunk, "egomotion")}
    index = index[index["chunk"].isin(chunks)]
    if not len(index):
        raise FileNotFoundError(f"{path}: none of the clips of clip_index.parquet has its egomotion here")
    events, file = {}, path / "reasoning" / "ood_reasoning.parquet"
    if file.exists():
        for clip, entries in pandas.read_parquet(file)["events"].items():
            entries = json.loads(entries) if isinstance(entries, str) else entries
            events[clip] = {entry["event_start_timestamp"] / 1e6: entry["cot"] for entry in entries}
    clips = []
    for clip, row in index.iterrows():
        chunk, ego = row["chunk"], read(clip, "egomotion")
        state, rot = ego.values, ego.values.pose.rotation.as_matrix()
        speed = (state.velocity * rot[:, :, 0]).sum(-1)                     # vectors are in the frame of the poses
        motion = Motion(f"{path}: egomotion of clip {clip}", ego.timestamps / 1e6, state.pose.translation, rot,
                        speed=speed, acceleration=(state.acceleration * rot[:, :, 0]).sum(-1),
                        steering=steering_angle(speed, state.curvature[:, 0]))
        calibrated = has(chunk, "camera_intrinsics") and has(chunk, "sensor_extrinsics")    # the release needs neither
        lenses = read(clip, "camera_intrinsics").camera_models if calibrated else {}
        places = read(clip, "sensor_extrinsics").sensor_poses if calibrated else {}
        cameras = {}
        for name, camera_id in [("camera_" + name, camera_id) for name, camera_id in CAMERAS.items()]:
            if not has(chunk, name):
                continue
            intrinsics = camera_to_ego = None
            if name in lenses and name in places:
                lens, camera_to_ego = lenses[name], torch.tensor(places[name].as_matrix(), dtype=torch.float32)
                numbers = [0, lens.width, lens.height, *lens.principal_point, *lens.th2r.coef]
                intrinsics = torch.tensor(numbers, dtype=torch.float32)
            # The kit knows when its images are from, and refuses times before and after them.
            cameras[camera_id] = Camera(video(clip, name), -math.inf, math.inf, intrinsics, camera_to_ego)
        starts = list(events.get(clip, [])) or [start / 1e6 for start in row.get("event_t0s", [])] or [5.1]
        clips.append(Clip(clip, motion, cameras, events.get(clip, {}), starts))
    return clips


# Files.

def image_camera(file, images, times, intrinsics, camera_to_ego):
    """A Camera whose images (paths, oldest first) were taken at times (N,); file: where the times are from."""
    if len(images) == 0 or len(images) != len(times):
        raise ValueError(f"{file}: {len(times)} times for {len(images)} images, expected one for each")
    require_increasing(file, times)

    def read(t):
        pictures = [read_image(images[i]) for i in np.searchsorted(times, t + TICK, side="right") - 1]
        if len({picture.shape for picture in pictures}) > 1:
            raise ValueError(f"{images[0].parent}: the images of a camera must be of one size")
        return np.stack(pictures)

    return Camera(read, times[0], times[-1], intrinsics, camera_to_ego)


def read_image(file):
    """An image file -> (H, W, 3) uint8."""
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("images are read by Pillow: pip install pillow") from None
    try:
        with Image.open(file) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{file}: not a readable image ({error})") from None


def read_csv(file, required, optional):
    """A CSV file with a header -> {name: (N,) float}; a column `file` stays a list of str."""
    with open(file, newline="") as lines:
        header, *rows = list(csv.reader(lines)) or [[]]
    header = [name.strip() for name in header]
    if not set(required) <= set(header) <= {*required, *optional}:
        raise ValueError(f"{file}: header is {','.join(header)}; expected {','.join(required)}, "
                         f"optional are {','.join(optional)}")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(f"{file}: line {number} has {len(row)} fields, the header {len(header)}")
    columns = {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}
    for name in columns.keys() - {"file"}:
        try:
            columns[name] = np.array(columns[name], float)
        except ValueError as error:
            raise ValueError(f"{file}: column {name} must be numbers ({error})") from None
    return columns


def read_json(file):
    """What a JSON file holds; None where there is no file."""
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None


def read_timestamps(file):
    """KITTI's lines of date and time -> (N,) datetime64[ns]."""
    try:
        return np.array(file.read_text().strip().splitlines(), "datetime64[ns]")
    except ValueError as error:
        raise ValueError(f"{file}: expected lines like 2011-09-26 13:02:25.964000000 ({error})") from None


def read_oxts(file):
    """A file of KITTI's oxts -> (30,): latitude, longitude, altitude, roll, pitch, yaw, ..."""
    try:
        return np.array(file.read_text().split(), float).reshape(30)
    except ValueError:
        raise ValueError(f"{file}: expected 30 numbers") from None


