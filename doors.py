"""
The doors: what comes in from outside is read and checked here, and what goes out is written here.

    flags       Flags, a parser; whole, real, device_of, file_to_write, folder_to_write: types of
                its flags
    text        read_text, read_csv
    JSON        read_json -> Json
    numbers     finite, whole_number, whole_numbers
    images      read_image
    a clip      check_times, check_count, check_poses, check_bounds, check_drive, check_span,
                check_sizes, calibration_of
    paths       inside, files_in
    writing     write_atomically, write_json, save_tensors
    runs        read_json_lines, write_json_lines, locked
    tensors     open_tensors, read_tensor, require_finite
    a Scene     check_scene, check_sampling
    a program   run(main), note

What is wrong with an input is one line that names the file, the field and what was expected: a
ValueError or an OSError, which `run` prints. A check says what must hold, so that NaN fails it.
This room knows no other.
"""
import argparse
import contextlib
import csv
import functools
import json
import math
import numbers
import operator
import os
import re
import reprlib
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

IMAGE_FORMATS = ("PNG", "JPEG")
LARGEST_TEXT = 2**30  # bytes

# --------------------------------------------------------------------------------------------------
# Flags


class Refused(argparse.ArgumentTypeError, ValueError):
    """What a flag may not be, in words that show nothing of what was typed."""


class ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that tells a flag's default where it has a value that a user could type."""

    def _get_help_string(self, action):
        silent = action.nargs == 0 or action.default in (None, "", argparse.SUPPRESS)
        return action.help if silent else super()._get_help_string(action)


class Flags(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose help tells the defaults."""

    def __init__(self, description, prog=None, **more):
        super().__init__(prog=prog or name_of_program(), description=description,
                         formatter_class=ShowDefaults, **more)

    def error(self, message):
        message = message.removeprefix("argument ")
        self.exit(2, f"{self.prog}: {message}; --help lists the flags\n")


def whole(least=0, most=10**9):
    """The type of a flag that is a whole number within bounds."""

    def read(text):
        if re.fullmatch(r"[+-]?[0-9]{1,18}", text) and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(
            f"expected a whole number from {least} to {most}, not {text!r}")

    return read


def real(least=-math.inf, most=math.inf, above=-math.inf):
    """The type of a flag that is a finite number within bounds, and more than `above`."""

    def read(text):
        value = float_of(text)
        if math.isfinite(value) and least <= value <= most and value > above:
            return value
        bounds = [f"{least:g} or more"] * (least > -math.inf)
        bounds += [f"more than {above:g}"] * (above > -math.inf)
        bounds += [f"at most {most:g}"] * (most < math.inf)
        expected = " and ".join(bounds) or "finite"
        raise argparse.ArgumentTypeError(f"expected a number, {expected}, not {text!r}")

    return read


def device_of(name):
    """The type of the flag --device: a torch.device that is there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if there.get(name.partition(":")[0]):
        with contextlib.suppress(RuntimeError):
            return torch.device(name)
    known = ", ".join(known for known, found in there.items() if found)
    raise argparse.ArgumentTypeError(f"expected one that this machine has ({known}), not {name!r}")


def file_to_write(*endings):
    """The type of a flag that names a file to write, with one of these endings if there are any."""

    def read(path):
        if not os.path.basename(path) or (os.path.exists(path) and not os.path.isfile(path)):
            raise argparse.ArgumentTypeError(f"expected the name of a file, not {path!r}")
        if endings and not path.lower().endswith(endings):
            expected = ", ".join(endings)
            raise argparse.ArgumentTypeError(f"expected a name ending in {expected}, not {path!r}")
        folder_to_write(os.path.dirname(path))
        return path

    return read


def folder_to_write(path):
    """The type of a flag that names a folder to write into, which may be there or not."""
    there = os.path.abspath(path)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"expected a folder to write in, but {there} is none")
    return path


# --------------------------------------------------------------------------------------------------
# Text


@contextlib.contextmanager
def expecting(line):
    """An error in here becomes a ValueError of one line: this one, and the error in brackets."""
    try:
        yield
    except Exception as error:  # libraries have kinds of their own: BadZipFile, csv.Error, ...
        raise ValueError(f"{line} ({' '.join(str(error).split())})") from None


def read_text(path):
    """The text of a file in UTF-8, with or without a byte order mark."""
    try:
        if not os.path.isdir(path) and os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path}: expected a file")  # a pipe would be waited for
        if os.path.isfile(path) and os.path.getsize(path) > LARGEST_TEXT:
            raise ValueError(f"{path}: expected at most {LARGEST_TEXT} bytes of text")
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{path}: expected text in UTF-8")
    return text


def read_csv(file, required, optional):
    """A CSV file with a header -> {name: (N,) float}; a column `file` stays a list of str.

    Numbers are finite. Lines without a value are skipped."""
    reader = csv.reader(read_text(file).splitlines(), skipinitialspace=True)
    with expecting(f"{file}: not a CSV file"):
        rows = [[cell.strip() for cell in row] for row in reader]
    numbered = [(number, row) for number, row in enumerate(rows, start=1) if any(row)]
    (_, header), *lines = numbered or [(1, [])]
    known = {*required, *optional}
    if not set(required) <= set(header) <= known or len(set(header)) < len(header):
        raise ValueError(
            f"{file}: header is {','.join(header)[:100]}; expected {','.join(required)}, "
            f"optional are {','.join(optional)}")
    columns = {name: [] for name in header}
    for number, row in lines:
        if len(row) != len(header):
            raise ValueError(
                f"{file}: line {number} has {len(row)} fields, the header {len(header)}")
        for name, cell in zip(header, row):
            where = f"{file}: {name} in line {number}"
            columns[name].append(cell if name == "file" else number_of(cell, where))
    return {name: cells if name == "file" else np.array(cells) for name, cells in columns.items()}


def number_of(text, where):
    """The finite number that a text is; where: what to name in errors."""
    value = float_of(text)
    if not math.isfinite(value):
        raise ValueError(f"{where} is {text[:40]!r}, expected a finite number")
    return value


def float_of(text):
    """The number that a text is, NaN if it is none. Python would read 1_5 as 15."""
    plain = re.fullmatch(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*", text)
    return float(text) if plain else math.nan


# --------------------------------------------------------------------------------------------------
# JSON


SHOWN = reprlib.Repr()  # a value in a message: on one line, short, however deep or long it is
SHOWN.maxstring = SHOWN.maxother = 60


class Json(dict):
    """An object of a JSON file. An error in it is one line that names file and field."""

    def __init__(self, path, data, where=""):
        super().__init__(data)
        self.path = path
        self.where = where  # the fields around it, each with a dot

    def field(self, key):
        """A key with the fields around it, as a message has it."""
        field = f"{self.where}{key}"
        return field if field.isprintable() else repr(field)

    def __missing__(self, key):
        raise ValueError(f"{self.path}: field {self.field(key)} is missing")

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if value is None:
            raise ValueError(f"{self.path}: field {self.field(key)} is null")
        return Json(self.path, value, f"{self.where}{key}.") if isinstance(value, dict) else value

    def wrong(self, key, expected):
        """The ValueError to raise of a field that is not what was expected."""
        shown = SHOWN.repr(self.get(key))
        return ValueError(f"{self.path}: field {self.field(key)} is {shown}, expected {expected}")

    def object(self, key):
        """The object at key."""
        if not isinstance(self[key], Json):
            raise self.wrong(key, "an object")
        return self[key]

    def part(self, key):
        """The object at key; empty where there is none."""
        return self.object(key) if key in self else Json(self.path, {}, f"{self.where}{key}.")

    def expect(self, key, value):
        """Refuse another value, where there is one."""
        if key in self and self[key] != value:
            raise self.wrong(key, f"{value!r}, which is all that this code knows")

    def number(self, key, least=-math.inf, most=math.inf):
        """The finite number at key, within bounds."""
        value = self[key]
        if not (finite(value) and least <= value <= most):
            raise self.wrong(key, f"a number from {least:g} to {most:g}")
        return value

    def text(self, key):
        """The text at key."""
        value = self[key]
        if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):  # half a character
            raise self.wrong(key, "text")
        return value

    def objects(self, key):
        """The list of objects at key."""
        return objects_of(self.path, self[key], f"{self.where}{key}")


def objects_of(path, values, where=""):
    """A list of objects of a JSON file, as Json."""
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{path}: {where or 'it'} must be a list of objects of named fields")
    return [Json(path, value, f"{where}[{i}].") for i, value in enumerate(values)]


def read_json(path, kind=dict):
    """What a JSON file holds: an object, as Json, or with kind=list a list. Numbers are finite."""
    data = parse_json(read_text(path), path)
    if not isinstance(data, kind):
        wanted = "a list" if kind is list else "an object of named fields"
        raise ValueError(f"{path}: expected {wanted}, not {SHOWN.repr(data)}")
    return Json(path, data) if kind is dict else data


def parse_json(text, where):
    """What a JSON text means; where: what to name in errors."""

    def refuse(constant):
        raise ValueError(f"{constant} is no number")

    def read_float(digits):
        return float(digits) if math.isfinite(float(digits)) else refuse(digits)

    try:
        return json.loads(text, parse_constant=refuse, parse_float=read_float)
    except RecursionError:
        raise ValueError(f"{where}: not JSON: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None


# --------------------------------------------------------------------------------------------------
# Numbers and images


def finite(value):
    """Whether a value is a number that is neither NaN nor infinite. True and False are none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    with contextlib.suppress(OverflowError):  # of an int too large for a float
        return math.isfinite(value)
    return False


def whole_number(name, value, least=0, most=10**9):
    """A value as an int; ValueError unless it is a whole number within bounds."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        shown = " ".join(repr(value).split())[:60]
        raise ValueError(f"{name}: expected a whole number from {least} to {most}, not {shown}")
    return number


def whole_numbers(name, values, least=0, most=10**9):
    """Values as a tuple of ints; ValueError unless they are whole numbers within bounds."""
    try:
        values = list(values)
    except TypeError:
        raise ValueError(f"{name}: expected whole numbers, not {values}") from None
    return tuple(whole_number(name, value, least, most) for value in values)


def read_image(file):
    """An image file -> (H, W, 3) uint8, turned upright as its EXIF orientation says.

    16-bit grey is scaled to 8. Pillow refuses what unpacks to more than 89 million pixels."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ImportError("images are read by Pillow: pip install pillow") from None
    with expecting(f"{file}: not a readable image"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            image = ImageOps.exif_transpose(image)
            if not image.mode.startswith("I"):
                return np.array(image.convert("RGB"))
            grey = np.round(np.array(image) / 257).astype(np.uint8)  # 65535 becomes 255
            return np.repeat(grey[..., None], 3, -1)


# --------------------------------------------------------------------------------------------------
# A clip (clips.py). A car and its cameras keep these bounds with room to spare; beyond them numbers
# have another unit, or are broken.

TICK = 5e-7  # s, half a microsecond of NVIDIA's clock: times closer than this are the same
STEPS = (0.004, 0.3)  # s, the median between poses, and between images: 250 to 3.3 Hz
LONGEST = 100_000  # s, a clip: more than a day
ASIDE = 0.25  # rad between heading and travel, for three of four half seconds; real drives: 0.07
BACKWARDS = 8  # m/s in reverse
BOUNDS = {  # of a number of a pose: the most it may be, either way, and its unit
    "position": (1e8, "m"),  # even coordinates from the middle of the Earth are nearer
    "yaw": (4 * math.pi, "rad"),
    "tilt": (0.7, "rad"),
    "speed to the next": (150, "m/s"),
    "turn rate to the next": (4, "rad/s"),
    "speed": (150, "m/s"),
    "acceleration": (100, "m/s^2"),
    "steering": (1.2, "rad"),
    "turn_signal": (1, "(it is -1, 0 or 1)"),
}
WIDEST = 16384  # pixels, the side of a calibrated image
LONGEST_LENS = 1e6  # pixels, a focal length


def check_times(where, times):
    """ValueError unless times (N,) are two or more, increase, and are in s."""
    if len(times) < 2:
        raise ValueError(f"{where}: {len(times)} times, expected 2 or more")
    steps = np.diff(times)
    late = np.flatnonzero(~(steps > 0))
    if len(late):
        i = late[0]
        raise ValueError(
            f"{where}: times must increase, but {times[i]} s is followed by {times[i + 1]} s")
    step = np.median(steps)
    seconds = times[-1] - times[0]
    if not (STEPS[0] <= step <= STEPS[1] and seconds <= LONGEST):
        raise ValueError(
            f"{where}: times must be in s, {STEPS[0]} to {STEPS[1]} apart (the median), for at "
            f"most {LONGEST} s; they are {step:g} apart, for {seconds:g}")


def check_count(where, times, values, what):
    """ValueError unless there is one of the values for each of times. what: their name."""
    if len(times) != len(values):
        raise ValueError(
            f"{where}: {len(times)} times for {len(values)} {what}, expected one for each")


def check_poses(where, times, fields):
    """ValueError unless 4 poses or more have finite fields, {name: (N, ...)}, and right times."""
    for field, values in fields.items():
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            raise ValueError(f"{where}: {field} of pose {bad[0, 0]} is not a finite number")
    if len(times) < 4:
        raise ValueError(f"{where}: {len(times)} poses, expected 4 or more")
    check_times(where, times)


def check_bounds(where, times, fields):
    """ValueError unless the fields, {name: (N,)}, of poses at times are within BOUNDS."""
    for field, values in fields.items():
        most, unit = BOUNDS[field]
        beyond = np.flatnonzero(~(np.abs(values) <= most))
        if len(beyond):
            i = beyond[0]
            raise ValueError(
                f"{where}: {field} of pose {i}, at {times[i]:g} s, is {values[i]:.4g} {unit}; "
                f"expected at most {most:.4g}")


def check_drive(where, times, xyz, rot, measured):
    """ValueError unless a car can have driven so: its speed, turning, tilt and heading.

    times (N,) s, xyz (N, 3) m, rot (N, 3, 3), and what was measured, {name: (N,)}."""
    tilt = np.arccos(rot[:, 2, 2].clip(-1, 1))
    check_bounds(where, times, {"position": np.abs(xyz).max(1), "tilt": tilt, **measured})
    step = np.maximum(np.diff(times), np.median(np.diff(times)))  # a jitter in time is no leap
    leap = np.linalg.norm(np.diff(xyz, axis=0), axis=1)
    turn = np.trace(rot[:-1].swapaxes(1, 2) @ rot[1:], axis1=1, axis2=2)  # 1 + 2 cos(angle)
    angle = np.arccos(((turn - 1) / 2).clip(-1, 1))
    rates = {"speed to the next": leap / step, "turn rate to the next": angle / step}
    check_bounds(where, times, rates)
    check_heading(where, times, xyz, rot[:, :, 0], measured.get("speed"))


def check_heading(where, times, xyz, heading, measured):
    """ValueError unless the car goes where its heading (N, 3) points, at the speed (N,) measured.

    Looks at the half seconds in which it moves more than 1 m."""
    stride = max(1, round(0.5 / np.median(np.diff(times))))
    middle = slice(stride // 2, stride // 2 + len(times) - stride)  # the pose in the middle of each
    seconds = times[stride:] - times[:-stride]
    way = xyz[stride:] - xyz[:-stride]
    length = np.linalg.norm(way, axis=1)
    moved = (length > 1) & (seconds < 1)
    if not moved.any():
        return
    ahead = (way * heading[middle]).sum(1)[moved]  # m, negative in reverse
    speed = ahead / seconds[moved]
    cosine = np.abs(ahead / length[moved]).clip(0, 1)
    aside = np.quantile(np.arccos(cosine), 0.75)
    if not aside <= ASIDE:
        raise ValueError(
            f"{where}: the heading is {aside:.2f} rad off the direction of travel, expected at "
            f"most {ASIDE}; yaw is in rad, 0 along x, to the left")
    if not np.median(speed) >= -BACKWARDS:
        raise ValueError(
            f"{where}: it drives backwards at {-np.median(speed):.1f} m/s, expected at most "
            f"{BACKWARDS}; yaw is where the car's front points")
    if measured is not None:
        ratio = (measured[middle][moved] * speed).sum() / (speed**2).sum()
        if not 0.5 <= ratio <= 2:
            raise ValueError(
                f"{where}: speed is {ratio:.2f} times that of the positions, expected m/s and m")


def check_span(where, what, times, t0, start, end, gap, back=0.0):
    """ValueError unless what a Scene at t0 needs was recorded, at times (N,), from start to end.

    gap: the longest there may be, in the `back` s before start too."""
    if not (times[0] <= start + TICK and end - TICK <= times[-1]):
        raise ValueError(
            f"{where}: too short for t0 = {t0:.13g} s, which needs {what} from {start:.13g} to "
            f"{end:.13g} s; there are {times[0]:.13g} to {times[-1]:.13g} s")
    first, last = np.searchsorted(times, (start - back + TICK, end - TICK))
    part = times[max(first - 1, 0) : last + 1]
    late = np.flatnonzero(np.diff(part) > gap)
    if len(late):
        i = late[0]
        raise ValueError(
            f"{where}: no {what} from {part[i]:.13g} to {part[i + 1]:.13g} s, which the scene at "
            f"{t0:.13g} s needs; a gap may be {gap:.3g} s")


def check_sizes(where, images, lens):
    """ValueError unless images (H, W, 3) have one size, for which their lens, if any, was made."""
    sizes = {image.shape[1::-1] for image in images}
    if lens is not None:
        sizes.add(tuple(lens[1:3].tolist()))
    if len(sizes) > 1:
        raise ValueError(
            f"{where}: images and calibration must have one width and height, not {sorted(sizes)}")


def calibration_of(where, kind, frame, coefficients, pose):
    """Numbers -> intrinsics (10,), see `project`, and camera_to_ego (4, 4) of a camera on a car.

    frame: width, height, cx, cy; coefficients: 5 of kind 0, f-theta, 2 of kind 1, a pinhole."""
    count = 2 if kind else 5
    with expecting(f"{where}: expected {count} coefficients and a camera_to_ego of 4 x 4"):
        lens = [kind, *frame, *coefficients, *[0] * (5 - count)]
        lens = torch.tensor(lens, dtype=torch.float32).reshape(10)
        pose = torch.as_tensor(pose).float().reshape(4, 4)
    kind, width, height, cx, cy, *rest = lens.tolist()
    focal = rest[:2] if kind == 1 else rest[1:2]  # pixels, or pixels per rad
    turn = pose[:3, :3]
    off = (turn.T @ turn - torch.eye(3)).abs().max()
    held = {
        "finite numbers": lens.isfinite().all() and pose.isfinite().all(),
        f"width and height of 1 to {WIDEST} pixels": 1 <= min(width, height)
        and max(width, height) <= WIDEST,
        "cx and cy in or near the image": abs(cx) <= 3 * width and abs(cy) <= 3 * height,
        f"a focal length of 1 to {LONGEST_LENS:g} pixels": 1 <= min(focal)
        and max(map(abs, rest)) <= LONGEST_LENS,
        "camera_to_ego with a rotation": off < 0.01 and torch.linalg.det(turn) > 0,
        "camera_to_ego with 0 0 0 1 below": pose[3].tolist() == [0, 0, 0, 1],
        "a camera within 20 m of the rear axle": pose[:3, 3].norm() <= 20,
    }
    for expected, holds in held.items():
        if not holds:
            raise ValueError(f"{where}: expected {expected}")
    return lens, pose


# --------------------------------------------------------------------------------------------------
# Paths and writing


def inside(folder, name, where):
    """The path of a file that another file names; ValueError where it leads out of the folder.

    where: the file and the field that have the name."""
    name = str(name)
    parts = re.split(r"[/\\]", name)
    if not name or os.path.isabs(name) or ".." in parts or ":" in parts[0] or "\0" in name:
        raise ValueError(f"{where} is {name!r}, expected a file in {folder}")
    return os.path.join(folder, name)


def files_in(folder, *endings):
    """The files of a folder whose names have one of these endings, 2 before 10.

    Hidden ones are left out: macOS puts a `._1.png` beside a `1.png`."""
    found = []
    for entry in Path(folder).iterdir():
        if entry.name.lower().endswith(endings) and entry.name[0] != "." and entry.is_file():
            parts = re.split("([0-9]+)", entry.name)  # text, digits, text, ...
            order = [int(part) if i % 2 else part for i, part in enumerate(parts)]
            found.append((order, entry.name, entry))
    return [entry for *_, entry in sorted(found)]


def write_atomically(path, write):
    """write(temporary path), then rename: a killed process leaves the old file or the new one.

    OSError, one line, where the file cannot be written; then it is as it was."""
    path = os.fspath(path)
    folder, name = os.path.split(path)
    folder = folder or "."
    own = None  # a folder for this writing alone: libraries have temporary files of their own
    try:
        os.makedirs(folder, exist_ok=True)
        sweep(folder, name)
        own = tempfile.mkdtemp(prefix=f"{name}.", suffix=".part", dir=folder)
        part = os.path.join(own, name)
        with open(part, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode  # as the umask has it
        write(part)
        os.chmod(part, mode)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise OSError(f"{path}: not written, what was there is as it was ({why})") from None
    finally:
        if own:
            shutil.rmtree(own, ignore_errors=True)


def sweep(folder, name):
    """Remove what writings of this file that were killed more than an hour ago have left."""
    for entry in os.scandir(folder):
        if entry.name.startswith(f"{name}.") and entry.name.endswith(".part"):
            with contextlib.suppress(FileNotFoundError):  # another writer was here first
                if time.time() - entry.stat().st_mtime > 3600:
                    shutil.rmtree(entry.path, ignore_errors=True)


def write_json(path, data):
    """Write a JSON file, whole or not at all."""
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda part: Path(part).write_text(text))


def save_tensors(path, tensors, metadata):
    """Write a safetensors file, whole and finite, or not at all."""
    require_finite(tensors, path)
    write_atomically(path, lambda part: save_file(tensors, part, metadata))


# --------------------------------------------------------------------------------------------------
# Lines of JSON, and locks


def read_json_lines(path):
    """The objects of a file of JSON, a line each. A last line that a kill left half is left out."""
    *lines, _ = read_text(path).split("\n")
    objects = [parse_json(line, f"{path}: line {i}") for i, line in enumerate(lines, 1)]
    return objects_of(path, objects)


def write_json_lines(path, lines):
    """Write a file of JSON, a line for each object, whole or not at all."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write_atomically(path, lambda part: Path(part).write_text(text))


@contextlib.contextmanager
def locked(path, message):
    """A file that is locked while the block runs; ValueError(message) where somebody has it.

    The death of a process, whatever kills it, sets its locks free. Where the system or the disk
    knows no locks nothing is locked."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(message) from None
        except (ImportError, OSError):
            pass
        yield


# --------------------------------------------------------------------------------------------------
# Tensors

FLOATS = {  # as safetensors calls what may become a weight
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@contextlib.contextmanager
def open_tensors(path, device="cpu"):
    """A safetensors file, open to read. FileNotFoundError or ValueError: one line."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: missing")
    if not os.path.isfile(path):  # a pipe would be waited for
        raise ValueError(f"{path}: expected a safetensors file")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def read_tensor(file, path, name, shape, dtype):
    """A floating-point tensor of an open safetensors file in a floating-point dtype, checked."""
    stored = file.get_slice(name)
    have = tuple(stored.get_shape())
    if stored.get_dtype() not in FLOATS:
        raise ValueError(
            f"{path}: tensor {name} is {stored.get_dtype()}, expected one of {', '.join(FLOATS)}")
    if have != tuple(shape):
        raise ValueError(f"{path}: tensor {name} has shape {have}, expected {tuple(shape)}")
    tensor = file.get_tensor(name).to(dtype)
    require_finite({name: tensor}, path)
    return tensor


def require_finite(tensors, where):
    """ValueError that names the first of {name: tensor} with a NaN or infinite value.

    where: the file to name. One pass, no copies, one wait for each device; what is not of floating
    point is passed over."""
    named = {}  # device -> names, and whether each is finite
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            ends = torch.stack(tensor.detach().aminmax())  # tensor.isfinite() would copy it
            named.setdefault(tensor.device, []).append((name, ends.isfinite().all()))
    for pairs in named.values():
        names, right = zip(*pairs)
        for name, fine in zip(names, torch.stack(right).tolist()):
            if not fine:
                dtype = str(tensors[name].dtype).removeprefix("torch.")
                raise ValueError(
                    f"{where}: tensor {name} holds values that are NaN or infinite in {dtype}")


# --------------------------------------------------------------------------------------------------
# A Scene (data.py)

SCENE = {  # key -> sizes by name, type; None: float32 or float64
    "images": ("B cameras frames 3 H W", torch.uint8),
    "camera_ids": ("B cameras", torch.long),
    "ego_history_xyz": ("B 16 3", None),
    "ego_history_rot": ("B 16 3 3", None),
    "ego_kinematics": ("B 20 4", None),
    "ego_future_xyz": ("B 64 3", None),
    "ego_future_rot": ("B 64 3 3", None),
    "actions": ("B 64 2", None),
    "camera_to_ego": ("B cameras 4 4", None),
    "intrinsics": ("B cameras 10", None),
    "reasoning": ("B", str),
    "route": ("B", str),
    "name": ("B", str),
}
ALWAYS = "images", "camera_ids", "ego_history_xyz", "ego_history_rot"


def check_scene(scene, *needed):
    """ValueError, one line, unless a Scene has ALWAYS and the needed keys, every key the shape and
    type of SCENE, and finite numbers where they are on the CPU: for a GPU one would have to wait.

    All scenes of a batch have the same cameras in the same order."""
    sizes = {}
    for key, (shape, kind) in SCENE.items():
        if key in scene:
            check_entry(key, scene[key], shape.split(), kind, sizes)
        elif key in ALWAYS or key in needed:
            raise ValueError(f"scene: {key} is missing, expected ({', '.join(shape.split())})")
    cameras = scene["camera_ids"].tolist()
    if any(ids != cameras[0] for ids in cameras) or not all(0 <= i <= 6 for i in cameras[0]):
        raise ValueError(
            f"scene: camera_ids are {SHOWN.repr(cameras)}, expected numbers from 0 to 6, for all "
            "scenes of a batch the same in the same order")


def check_entry(key, value, shape, kind, sizes):
    """ValueError unless the value of a Scene's key has this shape and type.

    sizes: of the names in shapes, as far as they are known; what this one tells is put in."""
    if kind is str:
        if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
            raise ValueError(f"scene: {key} must be a list of texts, not {SHOWN.repr(value)}")
        if any("<|" in text for text in value):  # it would be read as what it is called
            raise ValueError(f"scene: {key} has a special token in it: {SHOWN.repr(value)}")
        have = (len(value),)
    elif not isinstance(value, torch.Tensor):
        raise ValueError(f"scene: {key} must be a tensor, not {type(value).__name__}")
    elif value.dtype not in ((kind,) if kind else (torch.float32, torch.float64)):
        wanted = str(kind or torch.float32).removeprefix("torch.")
        raise ValueError(f"scene: {key} are of type {value.dtype}, expected {wanted}")
    else:
        have = tuple(value.shape)
    want = tuple(int(name) if name.isdigit() else sizes.get(name, name) for name in shape)
    fits = all(a == b or (isinstance(b, str) and a > 0) for a, b in zip(have, want))
    if len(have) != len(want) or not fits:
        named = f"({', '.join(shape)})"
        known = "" if any(isinstance(size, str) for size in want) else f" = {want}"
        raise ValueError(f"scene: {key} has shape {have}, expected {named}{known}")
    sizes |= dict(zip(shape, have))
    if kind is None and value.device.type == "cpu" and not value.isfinite().all():
        raise ValueError(f"scene: {key} holds NaN or infinite values")


def check_sampling(n, temperature, top_p, steps, max_new_tokens, decode, eta, seed, noise):
    """ValueError, one line, where `Alpamayo.sample` is asked for what cannot be.

    A temperature too near 0 ends in infinite logits, a very high one would say masked tokens."""
    counts = {"n": n, "steps": steps, "max_new_tokens": max_new_tokens}
    for name, value in counts.items():
        number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not (number and 1 <= value <= 10**6):
            raise ValueError(f"sample: {name} must be a whole number from 1 to 1e6, not {value!r}")
    if not (finite(temperature) and (temperature == 0 or 1e-4 <= temperature <= 1e4)):
        raise ValueError(f"sample: temperature must be 0 or 1e-4 to 1e4, not {temperature!r}")
    if not (finite(top_p) and 0 < top_p <= 1):
        raise ValueError(f"sample: top_p must be in (0, 1], not {top_p!r}")
    if not (finite(eta) and 0 <= eta <= 1):
        raise ValueError(f"sample: eta must be in [0, 1], not {eta!r}")
    if decode not in ("flow", "tokens"):
        raise ValueError(f"sample: decode must be flow or tokens, not {decode!r}")
    if seed is not None and not (isinstance(seed, int) and -(2**63) <= seed < 2**64):
        raise ValueError(f"sample: seed must be a whole number of 64 bits, not {seed!r}")
    if noise is not None:
        check_entry("noise", noise, ["N", "64", "2"], None, {})


# --------------------------------------------------------------------------------------------------
# A program


def name_of_program():
    """What the running program is called: sample.py, tools.evaluate."""
    page = sys.modules["__main__"]
    spec = getattr(page, "__spec__", None)
    if spec:
        return spec.name.removesuffix(".__main__")
    return os.path.basename(getattr(page, "__file__", "python"))


@functools.cache
def note(line):
    """Tell the user something that is no error: once, on stderr, by the first of the processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{name_of_program()}: note: {line}", file=sys.stderr)


def run(main):
    """Run a program's `main`; what a user can mend becomes `NAME: message` and exit status 1.

    A console that lacks a character, a check mark for one, shows a question mark in its place."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
    except KeyboardInterrupt as error:
        print("; ".join([f"{name_of_program()}: interrupted", *error.args]), file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"{name_of_program()}: {error}") from None
    except (MemoryError, RuntimeError) as error:  # PyTorch's, too, when memory is out
        first = str(error).partition("\n")[0]
        if not re.search("allocate|out of memory|^$", first):
            raise
        raise SystemExit(f"{name_of_program()}: out of memory ({first})") from None
