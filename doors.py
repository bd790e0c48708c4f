"""
The doors: what comes in from outside is read and checked here, and what goes out is written here.

    flags       Flags, a parser; whole, real, device_of: the types of its flags
    text        read_text, read_lines, read_csv
    JSON        read_json -> Json
    numbers     finite, require_finite, require_increasing
    images      read_image
    paths       inside
    writing     write_atomically, write_json, save_tensors
    runs        read_json_lines, write_json_lines, locked
    a program   run(main)

What is wrong with an input is one line that names the file, the field and what was expected: a
ValueError or an OSError, which `run` prints. A check says what must hold, so that NaN fails it.
This room knows no other.
"""
import argparse
import contextlib
import csv
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

# --------------------------------------------------------------------------------------------------
# Flags


class ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that tells a flag's default where it has a value that a user could type."""

    def _get_help_string(self, action):
        silent = action.nargs == 0 or action.default in (None, "", argparse.SUPPRESS)
        return action.help if silent else super()._get_help_string(action)


class Flags(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose help tells the defaults."""

    def __init__(self, description, **more):
        super().__init__(
            prog=name_of_program(), description=description, formatter_class=ShowDefaults, **more)

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
        try:
            value = float(text)
        except ValueError:
            value = math.nan
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


# --------------------------------------------------------------------------------------------------
# Text


@contextlib.contextmanager
def expecting(line):
    """An error in here becomes a ValueError of one line: this one, and the error in brackets."""
    try:
        yield
    except (
        ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
        SyntaxError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise ValueError(f"{line} ({' '.join(str(error).split())})") from None


def read_text(path):
    """The text of a file in UTF-8, with or without a byte order mark."""
    try:
        if not os.path.isdir(path) and os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path}: expected a file")  # a pipe would be waited for
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

    Blank lines are skipped."""
    rows = [row for row in csv.reader(read_text(file).splitlines(), skipinitialspace=True) if row]
    header, *rows = rows or [[]]
    if not set(required) <= set(header) <= {*required, *optional}:
        raise ValueError(
            f"{file}: header is {','.join(header)}; expected {','.join(required)}, "
            f"optional are {','.join(optional)}")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(
                f"{file}: line {number} has {len(row)} fields, the header {len(header)}")
    table = np.array(rows, str).reshape(-1, len(header))
    columns = dict(zip(header, table.T))
    for name in columns.keys() - {"file"}:
        with expecting(f"{file}: column {name} must be numbers"):
            columns[name] = columns[name].astype(float)
    return columns


# --------------------------------------------------------------------------------------------------
# JSON


class Json(dict):
    """An object of a JSON file. An error in it is one line that names file and field."""

    def __init__(self, path, data, where=""):
        super().__init__(data)
        self.path = path
        self.where = where  # the fields around it, each with a dot

    def __missing__(self, key):
        raise ValueError(f"{self.path}: field {self.where}{key} is missing")

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if value is None:
            raise ValueError(f"{self.path}: field {self.where}{key} is null")
        return Json(self.path, value, f"{self.where}{key}.") if isinstance(value, dict) else value

    def wrong(self, key, expected):
        """The ValueError to raise of a field that is not what was expected."""
        value = repr(self.get(key))
        shown = value if len(value) <= 60 else f"{value[:60]}..."
        return ValueError(f"{self.path}: field {self.where}{key} is {shown}, expected {expected}")

    def part(self, key):
        """The object at key; empty where there is none."""
        value = self[key] if key in self else Json(self.path, {}, f"{self.where}{key}.")
        if not isinstance(value, Json):
            raise self.wrong(key, "an object")
        return value

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
        if not isinstance(self[key], str):
            raise self.wrong(key, "text")
        return self[key]

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
        raise ValueError(f"{path}: expected {wanted}, not {str(data)[:20]!r}")
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
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    with contextlib.suppress(OverflowError):  # of an int too large for a float
        return math.isfinite(value)
    return False


def require_increasing(where, times):
    """ValueError unless times (N,) are finite and increase."""
    late = np.flatnonzero(~(np.diff(times) > 0))
    if len(late):
        i = late[0]
        raise ValueError(
            f"{where}: times must increase, but {times[i]} s is followed by {times[i + 1]} s")


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


def read_image(file):
    """An image file -> (H, W, 3) uint8."""
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("images are read by Pillow: pip install pillow") from None
    with expecting(f"{file}: not a readable image"), Image.open(file) as image:
        return np.array(image.convert("RGB"))


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


def write_atomically(path, write):
    """write(temporary path), then rename: a killed process leaves the old file or the new one."""
    path = os.fspath(path)
    part = path + ".part"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        write(part)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)


def write_json(path, data):
    """Write a JSON file, whole or not at all."""
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda part: Path(part).write_text(text))


def save_tensors(path, tensors, metadata):
    """Write a safetensors file, whole and finite, or not at all."""
    require_finite(tensors, path)

    def write(part):
        try:
            save_file(tensors, part, metadata)
        except SafetensorError as error:  # a full disk
            raise OSError(f"{path}: {error}") from None

    write_atomically(path, write)


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
# A program


def name_of_program():
    """What the running program is called: sample.py, tools.evaluate."""
    page = sys.modules["__main__"]
    spec = getattr(page, "__spec__", None)
    return spec.name if spec else os.path.basename(getattr(page, "__file__", "python"))


def run(main):
    """Run a program's `main`; what a user can mend becomes `NAME: message` and exit status 1.

    A console that lacks a character, a check mark for one, shows a question mark in its place."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
    except KeyboardInterrupt:
        print(f"{name_of_program()}: interrupted", file=sys.stderr)
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
