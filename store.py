"""
Sets of scenes on disk: whole or not there, and made by processes whose death is seen.

    a folder    making
    a set       Form, make_set, open_set
    arrays      create_arrays, write_rows, open_array
    workers     crew, serve
    sources     hash_of, tell_of_others

This room knows only doors.py.
"""

import ast
import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import pkgutil
import queue
import re
import secrets
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.format import open_memmap
from tqdm import tqdm

import doors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# --------------------------------------------------------------------------------------------------
# A folder that appears whole


@contextlib.contextmanager
def making(done):
    """A new folder to fill, which becomes `done` where the block ends well and is removed else.

    One process at a time makes folders beside `done`; the others wait. So what it finds begun was
    left by the dead, and it sweeps that. None: another process has made `done` meanwhile."""
    home = os.path.dirname(done) or "."
    os.makedirs(home, exist_ok=True)
    with lock_of(home) as locked:
        if os.path.exists(done):
            yield None
            return
        for begun in Path(home).glob("*.making-*") if locked else ():
            shutil.rmtree(begun, ignore_errors=True)
        folder = f"{done}.making-{secrets.token_hex(4)}"
        os.mkdir(folder)
        try:
            yield folder
            for file in Path(folder).iterdir():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())  # else a power cut could leave a folder of zeros
            if not os.path.exists(done):  # without locks, another may have been quicker
                os.rename(folder, done)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def lock_of(home):
    """Holds the lock of a folder, which the system frees when its process ends, however it ends.

    False where there are no such locks: on Windows, on some network disks."""
    place = os.open(os.path.join(home, ".lock"), os.O_RDONLY | os.O_CREAT, 0o666)
    with open(place) as file:
        locked = fcntl is not None
        try:
            if locked:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{home}: waiting for another process that makes scenes here", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            locked = False
        yield locked


# --------------------------------------------------------------------------------------------------
# A set: a folder of arrays, and set.json with its signs and its texts


class Form(NamedTuple):
    """What a set is to be."""

    rows: int
    signs: dict  # what set.json says of it, from which another set is told apart
    texts: tuple  # the names of its lists of str
    arrays: dict  # name: (dtype, shape of a row)

    def whole(self):
        """The arrays, {name: (dtype, shape)}."""
        return {name: (dtype, (self.rows, *shape)) for name, (dtype, shape) in self.arrays.items()}


def make_set(done, form, work, jobs, workers):
    """Make the set `done`; work(folder, *job) writes rows and returns their texts, {name: list}.

    work, workers: see `crew`. It moves to its place when it is whole."""
    with making(done) as folder:
        if not folder:
            return
        create_arrays(folder, form.whole())
        texts = {name: [] for name in form.texts}
        with (
            crew(work, min(workers, len(jobs))) as answers,
            tqdm(desc=f"making {os.path.basename(done)}", total=form.rows, unit="scene") as bar,
        ):
            for part in answers([[folder, *job] for job in jobs]):
                for name in texts:
                    texts[name] += part[name]
                bar.update(len(part[name]))
        doors.write_json(f"{folder}/set.json", form.signs | {"texts": texts})


def open_set(folder, form):
    """The texts {name: list} and the arrays {name: array}, mapped, of a set.

    ValueError or OSError, which names the file, where it is not of this form."""
    about = doors.read_json(f"{folder}/set.json")
    for key, value in json.loads(json.dumps(form.signs)).items():
        if about[key] != value:
            raise about.wrong(key, repr(value))
    texts = {}
    for name in form.texts:
        found = texts[name] = about.part("texts")[name]
        strings = isinstance(found, list) and all(isinstance(text, str) for text in found)
        if not strings or len(found) != form.rows:
            raise about.part("texts").wrong(name, f"{form.rows} texts")
    arrays = {}
    for name, (dtype, shape) in form.whole().items():
        arrays[name] = open_array(f"{folder}/{name}.npy", dtype, shape)
    return texts, arrays


# --------------------------------------------------------------------------------------------------
# Arrays


def create_arrays(folder, arrays):
    """Files of zeros for arrays {name: (dtype, shape)}. OSError where the disk has no room.

    All of it is reserved, where a system can do that."""
    needed = sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in arrays.values())
    free = shutil.disk_usage(folder).free
    full = OSError(
        f"{os.path.dirname(folder) or '.'}: needs {needed / 1e6:.1f} MB of disk for a set of "
        f"scenes, {free / 1e6:.1f} MB are free"
    )
    if needed > free:
        raise full
    for name, (dtype, shape) in arrays.items():
        file = f"{folder}/{name}.npy"
        try:
            open_memmap(file, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):
                with open(file, "rb+") as opened:
                    os.posix_fallocate(opened.fileno(), 0, os.path.getsize(file))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise full from None
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # no such call on this disk
                raise


def write_rows(file, first, rows):
    """Write rows into a .npy file, from number `first` on.

    They are written, not mapped: on a full disk, a map ends the process without a word."""
    start = open_memmap(file, mode="r").offset + first * rows[0].nbytes
    try:
        with open(file, "rb+") as opened:
            opened.seek(start)
            opened.write(np.ascontiguousarray(rows))
    except OSError as error:
        raise OSError(f"{file}: {error.strerror}") from None


def open_array(file, dtype, shape):
    """The array of a .npy file, mapped: whole, finite, of this type and shape. Else one line.

    No pickle is ever read."""
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file}: missing")
    try:
        array = open_memmap(file, mode="r")
    except Exception as error:  # many kinds: NumPy reads a damaged header as Python
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{file}: not an array that can be mapped ({why})") from None
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(
            f"{file}: expected {np.dtype(dtype)} {shape}, not {array.dtype} {array.shape}"
        )
    size = os.path.getsize(file)
    if size != array.offset + array.nbytes:
        raise ValueError(f"{file}: expected {array.offset + array.nbytes} bytes, not {size}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = np.argwhere(~np.isfinite(array))[0, 0]
        raise ValueError(f"{file}: row {row} is not finite")
    return array


# --------------------------------------------------------------------------------------------------
# Workers


@contextlib.contextmanager
def crew(work, workers):
    """A function that yields the answers of `work`, "module.function", to jobs, in order.

    No workers: this process does it all.
    A job is a list of arguments; jobs and answers are JSON. Each worker is a Python process of its
    own that runs nothing of the program that asks: a script needs no guard. It has one thread, as
    threads that share cores with others are many times slower. The death of one is an OSError. They
    end with the block, and with the process that asks, however that ends."""
    if not workers:
        yield partial(itertools.starmap, pkgutil.resolve_name(work))
        return
    program = f"import sys; sys.path[:] = {sys.path!r}; import store; store.serve({work!r})"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    idle = queue.SimpleQueue()
    with contextlib.ExitStack() as ends:
        team = []
        for _ in range(workers):
            # In a session of its own: Ctrl-C is for who asks.
            worker = subprocess.Popen(
                [sys.executable, "-c", program], **pipes, start_new_session=True
            )
            team.append(ends.enter_context(worker))
        threads = ThreadPoolExecutor(workers)  # each waits for a worker
        ends.callback(threads.shutdown, cancel_futures=True)
        for worker in team:
            ends.callback(worker.kill)  # what comes last is called first
            idle.put(worker)
        yield partial(threads.map, partial(ask, idle))


def ask(idle, job):
    """What an idle worker answers. OSError where it dies, ValueError where something is wrong."""
    worker = idle.get()
    try:
        with contextlib.suppress(BrokenPipeError):  # it is dead, and says nothing below
            os.write(worker.stdin.fileno(), f"{json.dumps(job)}\n".encode())
        said = worker.stdout.readline()
        if not said.endswith("\n"):
            raise OSError(obituary(worker.wait()))
    finally:
        idle.put(worker)
    answer, wrong = json.loads(said)
    if wrong:
        raise ValueError(wrong)
    return answer


def obituary(status):
    """How a worker came to its end, from its exit status."""
    if status < 0:
        return (
            f"a worker was killed by signal {-status}, as where memory is out; "
            "fewer need less: python data.py --workers 1"
        )
    return f"a worker ended with exit status {status}; it says above why"


def serve(work):
    """A worker's life: it answers jobs until there is nobody left who asks."""
    torch.set_num_threads(1)
    answers = os.dup(1)
    os.dup2(2, 1)  # what the work prints is no answer
    work = pkgutil.resolve_name(work)
    for job in sys.stdin:
        answer = wrong = None
        try:
            answer = work(*json.loads(job))
        except (ValueError, OSError, FloatingPointError) as error:
            wrong = str(error)
        except (MemoryError, RuntimeError) as error:
            wrong = str(error).partition("\n")[0]
            if not re.search("allocate|out of memory", wrong):
                raise
        with contextlib.suppress(BrokenPipeError):  # nobody asks any more
            os.write(answers, f"{json.dumps([answer, wrong])}\n".encode())


# --------------------------------------------------------------------------------------------------
# Sources


def hash_of(sources):
    """A short hash of Python sources. Comments, docstrings and layout do not count."""
    parts = []
    for source in sources:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value = ast.Constant(...)
        parts.append(ast.unparse(tree))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def tell_of_others(home, made_by):
    """Say how much disk the sets take whose names do not begin with `made_by`: nobody uses them."""
    sets = [one.parent for one in Path(home).glob("world*/set.json")]
    others = [one for one in sets if not one.name.startswith(f"{made_by}-")]
    size = sum(file.stat().st_size for one in others for file in one.iterdir())
    if others:
        doors.note(
            f"{home}: not used, as other sources than {made_by} made them: "
            f"{len(others)} sets of scenes, {size / 1e9:.2f} GB"
        )
