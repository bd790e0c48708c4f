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
    cameras      {id: Camera}, ids as in CAMERAS; `image_camera` makes one of image files and times
    reasoning    {time in s: text}, or {}

All else works on Clips: Scenes, batches, rigs, labels, and the errors about what is too short.
"""
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import grid_sample, interpolate
from torch.utils.data import default_collate

from alpamayo import DT, LOW_SPEED, project, rot_of, yaw_of
from doors import expecting, read_csv, read_image, read_json, require_increasing
from world import FUTURE, HISTORY, PAST, WHEELBASE, rays, rig_camera

CAMERAS = """
cross_left_120fov front_wide_120fov cross_right_120fov
rear_left_70fov rear_tele_30fov rear_right_70fov front_tele_30fov
""".split()  # in the order of their ids, from 0
USED = (0, 1, 2, 6)  # the cameras that the release looks through
KINEMATICS = ("speed", "acceleration", "steering", "turn_signal")  # columns of ego_kinematics
TICK = 5e-7  # s, half a microsecond of NVIDIA's clock: times closer than this are the same


class Camera(NamedTuple):
    read: Callable  # times (frames,) in s -> (frames, H, W, 3) uint8, the last image at or before
    first: float  # s, the first image
    last: float  # s
    intrinsics: torch.Tensor | None = None  # (10,), see `project`; None where unknown
    camera_to_ego: torch.Tensor | None = None  # (4, 4)


class Clip(NamedTuple):
    name: str
    motion: "Motion"
    cameras: dict  # camera id -> Camera
    reasoning: dict  # time in s -> text, "" for a key frame without one

    def default_starts(self):
        """The times t0 in s that Scenes are cut at when nobody asks for others."""
        first = self.motion.first + 2
        every_half = np.arange(first, max(self.motion.last, first + 0.1), 0.5)  # at least one
        return list(self.reasoning) or every_half

    def text_at(self, t0):
        """The reasoning at t0, "" if there is none."""
        for time, text in self.reasoning.items():
            if abs(time - t0) < DT / 2:
                return text
        return ""

    def view(self, camera_id, times):
        """
        Images (frames, 3, H, W) of a camera at times (frames,) in s, its intrinsics, camera_to_ego.

        ValueError if it was calibrated for images of another size.
        """
        camera = self.cameras[camera_id]
        images = torch.from_numpy(camera.read(times)).permute(0, 3, 1, 2)
        if camera.intrinsics is not None:
            height, width = images.shape[2:]
            size = camera.intrinsics[1:3].tolist()
            if size != [width, height]:
                raise ValueError(
                    f"{self.name}: images of camera {camera_id} are {width} x {height} pixels, but "
                    f"its intrinsics are for {size[0]:g} x {size[1]:g}")
        return images, camera.intrinsics, camera.camera_to_ego


def load_clips(path, **options):
    """ClipScenes of the clips in a folder, with the options of ClipScenes."""
    return ClipScenes(read_clips(path), **options)


def read_clips(path):
    """The Clips in a folder of any layout. FileNotFoundError if it has none."""
    path = Path(path)
    readers = {"features.csv": read_nvidia, "oxts": read_kitti, "egomotion.csv": read_folder}
    for entry, reader in readers.items():
        if (path / entry).exists():
            return reader(path)
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
                see, for models that know only the world. Left out, images keep their size, which
                must be one for all
    future      False asks for no poses after t0, and the Scenes have no ego_future_xyz and
                ego_future_rot

    A Scene has intrinsics and camera_to_ego where all its cameras are calibrated.
    Raises ValueError or FileNotFoundError: one line, the file and what was expected of it.
    """

    def __init__(self, clips, t0=None, camera_ids=None, frames=4, frame_dt=0.1,
                 size=None, rig=None, future=True):  # fmt: skip
        if (rig is None) != (size is None):
            raise ValueError("rig and size go together: without a rig, images keep their own size")
        self.camera_ids = camera_ids
        self.size = size
        self.rig = rig
        self.future = future
        self.ages = frame_dt * np.arange(frames - 1, -1, -1)  # (frames,) s before t0, oldest first
        self.cuts = []  # (clip, t0) of each Scene
        refused = []
        for clip in clips:
            for start in clip.default_starts() if t0 is None else np.atleast_1d(t0):
                reason = self.refusal(clip, float(start))
                if reason:
                    refused.append(reason)
                else:
                    self.cuts.append((clip, float(start)))
        if refused and (t0 is not None or not self.cuts):  # asked for in vain, or nothing left
            raise ValueError(refused[0])
        self.names = [f"{clip.name} at {start:.1f} s" for clip, start in self.cuts]
        self.reasoning = [clip.text_at(start) for clip, start in self.cuts]

    def __len__(self):
        return len(self.cuts)

    def batch(self, indices):
        """Scenes number `indices` -> one Scene. ValueError where cameras or image sizes differ."""
        scenes = [self.scene(int(i)) for i in indices]
        first = scenes[0]
        for scene in scenes:
            same_cameras = torch.equal(scene["camera_ids"], first["camera_ids"])
            same_size = scene["images"].shape == first["images"].shape
            if not same_cameras or not same_size or scene.keys() != first.keys():
                raise ValueError(
                    f"{scene['name']} cannot be batched with {first['name']}: cameras, sizes of "
                    "images or calibration differ; choose camera_ids or a rig")
        return default_collate(scenes)

    def drive_plans(self, indices, plans):
        """Nothing: a clip cannot tell what happens when the car drives otherwise."""
        return {}

    def scene(self, index):
        """Scene number `index`, not batched."""
        clip, t0 = self.cuts[index]
        views = {i: clip.view(i, t0 - self.ages) for i in self.sources(clip)}
        if self.rig:
            views = reproject(self.rig, views, self.camera_ids, self.size)
        sizes = {i: tuple(images.shape[2:]) for i, (images, _, _) in views.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"{clip.name}: images must be of one size, by camera they are {sizes}; "
                "choose camera_ids")
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
            ids = sorted(self.camera_ids)
        if not ids or not clip.cameras.keys() >= set(ids):
            raise ValueError(
                f"{clip.name}: has the cameras {sorted(clip.cameras)}, not {ids or list(USED)}")
        for i in ids:
            if self.rig and clip.cameras[i].intrinsics is None:
                raise ValueError(f"{clip.name}: a rig needs calibrated cameras, camera {i} is not")
        return {i: clip.cameras[i] for i in ids}

    def refusal(self, clip, t0):
        """What the clip is too short for, in one line; None if it is long enough."""
        too_short = f"too short for t0 = {t0:.2f} s, which needs"
        start = t0 - HISTORY * DT
        end = t0 + FUTURE * DT * self.future
        motion = clip.motion
        if motion.first >= start - TICK or motion.last < end - TICK:
            hint = f" ({t0:.2f} s with future=False)" if self.future else ""
            return (f"{motion.where}: {too_short} poses from before {start:.2f} s to {end:.2f} s"
                    f"{hint}; there are {motion.first:.2f} to {motion.last:.2f} s")
        start = t0 - self.ages[0]
        for i, camera in self.sources(clip).items():
            if start < camera.first - TICK or t0 > camera.last + TICK:
                return (f"{clip.name}: {too_short} images of camera {i} from {start:.2f} s "
                        f"to {t0:.2f} s; there are {camera.first:.2f} to {camera.last:.2f} s")


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

    ValueError for fewer than 4 poses, numbers that are not finite, times that do not increase.
    """

    def __init__(self, where, times, xyz, rot, **measured):
        if len(times) < 4:
            raise ValueError(f"{where}: {len(times)} poses, expected 4 or more")
        fields = {"time": times, "position": xyz, "rotation": rot, **measured}
        for field, values in fields.items():
            bad = np.argwhere(~np.isfinite(values))
            if len(bad):
                raise ValueError(f"{where}: {field} of pose {bad[0, 0]} is not a finite number")
        require_increasing(where, times)
        self.where = where
        self.times = times
        self.first, self.last = times[0], times[-1]
        self.xyz = xyz
        self.rot = rot
        self.measured = measured
        self.curve = cubic_spline(times, xyz)  # (4, N - 1, 3)

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
                            or header file,time
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
    z, roll, pitch = [columns.get(name, 0 * times) for name in ("z", "roll", "pitch")]
    xyz = np.c_[columns["x"], columns["y"], z]
    measured = {name: columns[name] for name in KINEMATICS if name in columns}
    motion = Motion(file, times, xyz, rotation(columns["yaw"], pitch, roll), **measured)
    cameras = {}
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        if folder.name not in CAMERAS:
            raise ValueError(f"{folder}: unknown camera, expected one of {', '.join(CAMERAS)}")
        cameras[CAMERAS.index(folder.name)] = read_camera(folder, path / "cameras.json")
    return [Clip(path.name, motion, cameras, read_reasoning(path / "reasoning.json"))]


def read_camera(folder, calibration):
    """The Camera in a folder of images, see read_folder; calibration: its cameras.json, if any."""
    file = folder / "times.csv"
    columns = read_csv(file, ("time",), ("file",))
    images = sorted(i for i in folder.iterdir() if i.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if "file" in columns:
        images = [folder / name for name in columns["file"]]
    known = read_calibration(calibration, folder.name) if calibration.exists() else ()
    return image_camera(file, images, columns["time"], *known)


def read_calibration(file, name):
    """A camera's intrinsics (10,) and camera_to_ego (4, 4) in cameras.json, see read_folder."""
    entry = read_json(file).get(name, {})
    kinds = {"ftheta": (0, 5), "pinhole": (1, 2)}  # kind in `project`, number of coefficients
    if entry.get("kind") not in kinds:
        raise ValueError(
            f"{file}: {name} needs kind, one of {', '.join(kinds)}; it has {entry.get('kind')}")

    def numbers(field, *shape):
        with expecting(f"{file}: {name} needs {field}, numbers of shape {shape}"):
            return torch.tensor(entry[field], dtype=torch.float32).reshape(shape)

    kind, count = kinds[entry["kind"]]
    size_and_centre = [numbers(field, 1) for field in ("width", "height", "cx", "cy")]
    lens = [torch.tensor([kind]), *size_and_centre, numbers("coefficients", count)]
    intrinsics = torch.cat([*lens, torch.zeros(5 - count)])
    return intrinsics, numbers("camera_to_ego", 4, 4)


def read_reasoning(file):
    """{time in s: text} of a reasoning.json, see read_folder; empty where there is no file."""
    entries = read_json(file, list) if file.exists() else []
    with expecting(f'{file}: expected a list of {{"time": s, "text": str}}'):
        return {entry["time"]: entry["text"] for entry in entries}


def read_kitti(path):
    """
    A drive of KITTI raw, synced and rectified -> [Clip].

    Motion comes from oxts, and image_02 is the front wide camera. The ego frame has the axes of the
    inertial unit. From the unit the camera is 1.08 m ahead, 0.25 m to the right and 0.73 m up; the
    ego's origin is 1.60 m behind the camera, 0.06 m to its right (the middle) and 1.65 m below it.
    Time 0 is the first pose. A reasoning.json may be beside oxts, as in a folder of one's own.
    """
    clock = read_timestamps(path / "oxts/timestamps.txt")
    motion = kitti_motion(path / "oxts", (clock - clock[0]) / 1e9)
    folder = path / "image_02"
    times = (read_timestamps(folder / "timestamps.txt") - clock[0]) / 1e9
    images = sorted((folder / "data").glob("*.png"))
    camera = image_camera(folder / "timestamps.txt", images, times)
    intrinsics = kitti_intrinsics(path, *read_image(images[0]).shape[:2])
    _, pose = rig_camera(1, 1, 1, {1: ((1.6, 0.06, 1.65), 0, 1)})  # looks ahead, level
    camera = camera._replace(intrinsics=intrinsics, camera_to_ego=pose)
    return [Clip(path.name, motion, {1: camera}, read_reasoning(path / "reasoning.json"))]


def kitti_motion(folder, times):
    """The Motion in KITTI's oxts, with poses at times (N,) in s."""
    rows = [read_oxts(file) for file in sorted((folder / "data").glob("*.txt"))]
    rows = np.array(rows)  # (N, 30)
    if len(rows) != len(times):
        raise ValueError(
            f"{folder}: {len(rows)} files in data, but {len(times)} lines in timestamps.txt")
    latitude, longitude = np.radians(rows[:, :2]).T
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


def kitti_intrinsics(path, height, width):
    """
    The pinhole (10,) of image_02, scaled to images of this size.

    It is read from calib_cam_to_cam.txt in the folder or its parent, else it is that of 2011_09_26.
    KITTI's pixel centres are at integers, ours half a pixel further.
    """
    text = KITTI_CALIBRATION
    for file in (path / "calib_cam_to_cam.txt", path.parent / "calib_cam_to_cam.txt"):
        if file.exists():
            text = file.read_text()
            break
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    with expecting(f"{file}: expected lines S_rect_02 and P_rect_02 of numbers"):
        size = np.array(lines["S_rect_02"].split(), float)
        projection = np.array(lines["P_rect_02"].split(), float).reshape(3, 4)
    scale = (width, height) / size
    centre = (projection[:2, 2] + 0.5) * scale
    focal = projection.diagonal()[:2] * scale
    return torch.tensor([1, width, height, *centre, *focal, 0, 0, 0]).float()


def read_nvidia(path):
    """
    NVIDIA's PhysicalAI-AV data set, as far as its chunks are in the folder -> [Clip].

    t0 are the events of reasoning/ood_reasoning.parquet, with their texts, or else event_t0s of
    clip_index.parquet, or else 5.1 s, the release's default. Clips without egomotion here and
    invalid ones are left out.
    """
    kit = local_kit(path)
    index = kit.clip_index[kit.clip_index["clip_is_valid"]]
    chunks = {chunk: kit.has(chunk, "egomotion") for chunk in index["chunk"].unique()}
    index = index[index["chunk"].map(chunks)]
    if not len(index):
        raise FileNotFoundError(
            f"{path}: none of the clips of clip_index.parquet has its egomotion here")
    events = nvidia_events(path / "reasoning/ood_reasoning.parquet")
    clips = []
    for clip, row in index.iterrows():
        motion = nvidia_motion(kit, clip, f"{path}: egomotion of clip {clip}")
        cameras = nvidia_cameras(kit, clip, row["chunk"])
        starts = {start / 1e6: "" for start in row.get("event_t0s", [])} or {5.1: ""}
        clips.append(Clip(clip, motion, cameras, events.get(clip) or starts))
    return clips


def local_kit(path):
    """NVIDIA's kit on a folder. It asks the Hugging Face hub what there is, this one the folder."""
    try:
        from physical_ai_av import PhysicalAIAVDatasetInterface
    except ImportError as error:
        raise ImportError(f"{path}: NVIDIA's layout is read by its kit, "
                          f"pip install physical_ai_av ({error})") from None  # fmt: skip

    class LocalKit(PhysicalAIAVDatasetInterface):
        def is_file_cached(self, filename):
            return (path / filename).exists()

        _has_file = is_file_cached

        def download_file(self, filename):
            return path / filename

        def open_file(self, filename, **options):
            return open(path / filename, "rb")

        def has(self, chunk, feature):
            return feature in self.features.ALL and self.is_file_cached(
                self.features.get_chunk_feature_filename(chunk, feature))

        def read(self, clip, feature):
            with expecting(f"{path}: clip {clip} has no {feature}"):
                return self.get_clip_feature(clip, feature)

        def images(self, clip, feature, times):
            video = self.read(clip, feature)
            microseconds = np.round(1e6 * times).astype("int64")
            with expecting(f"{path}: clip {clip} has no {feature} at {times[0]} to {times[-1]} s"):
                return video.decode_images_from_timestamps(microseconds)[0]

    return LocalKit(revision="local")


def nvidia_events(file):
    """{clip: {time in s: text}} of ood_reasoning.parquet; empty where there is no file."""
    import pandas  # the kit brings it

    events = {}
    for clip, entries in pandas.read_parquet(file)["events"].items() if file.exists() else ():
        entries = json.loads(entries) if isinstance(entries, str) else entries
        events[clip] = {entry["event_start_timestamp"] / 1e6: entry["cot"] for entry in entries}
    return events


def nvidia_motion(kit, clip, where):
    """The Motion of a clip. Its velocities and accelerations are in the frame of the poses."""
    egomotion = kit.read(clip, "egomotion")
    state = egomotion.values
    rot = state.pose.rotation.as_matrix()
    forward = rot[:, :, 0]
    speed = (state.velocity * forward).sum(-1)
    acceleration = (state.acceleration * forward).sum(-1)
    steering = steering_angle(speed, state.curvature[:, 0])
    return Motion(where, egomotion.timestamps / 1e6, state.pose.translation, rot,
                  speed=speed, acceleration=acceleration, steering=steering)  # fmt: skip


def nvidia_cameras(kit, clip, chunk):
    """{id: Camera} of a clip, calibrated where the folder has both the lenses and the poses."""
    has = functools.partial(kit.has, chunk)
    lenses = kit.read(clip, "camera_intrinsics").camera_models if has("camera_intrinsics") else {}
    poses = kit.read(clip, "sensor_extrinsics").sensor_poses if has("sensor_extrinsics") else {}
    cameras = {}
    for camera_id, name in enumerate(CAMERAS):
        feature = "camera_" + name
        if not has(feature):
            continue
        calibration = ()
        if feature in lenses and feature in poses:
            lens, pose = lenses[feature], poses[feature].as_matrix()
            numbers = [0, lens.width, lens.height, *lens.principal_point, *lens.th2r.coef]
            calibration = torch.tensor(numbers).float(), torch.tensor(pose).float()
        # The kit knows when its images are from, and refuses times before and after them.
        read = functools.partial(kit.images, clip, feature)
        cameras[camera_id] = Camera(read, -math.inf, math.inf, *calibration)
    return cameras


# --------------------------------------------------------------------------------------------------
# Single files


def image_camera(file, images, times, *calibration):
    """A Camera of images (paths, oldest first) taken at times (N,) in s; file has the times."""
    if not 0 < len(images) == len(times):
        raise ValueError(
            f"{file}: {len(times)} times for {len(images)} images, expected one for each")
    require_increasing(file, times)

    def read(t):
        pictures = [read_image(images[i]) for i in last_at(times, t)]
        if len({picture.shape for picture in pictures}) > 1:
            raise ValueError(f"{images[0].parent}: the images of a camera must be of one size")
        return np.stack(pictures)

    return Camera(read, times[0], times[-1], *calibration)


def read_timestamps(file):
    """KITTI's lines of date and time -> (N,) ns, integers."""
    with expecting(f"{file}: expected lines like 2011-09-26 13:02:25.964000000"):
        return np.array(file.read_text().strip().splitlines(), "datetime64[ns]").astype("int64")


def read_oxts(file):
    """A file of KITTI's oxts -> (30,): latitude, longitude, altitude, roll, pitch, yaw, ..."""
    with expecting(f"{file}: expected 30 numbers"):
        return np.array(file.read_text().split(), float).reshape(30)
