"""
Folders of arrays on disk: whole or not there, and made by processes whose death is seen.

    a folder    making
    arrays      create_arrays, write_rows, open_array
    workers     crew, serve
    sources     essence

This room knows no other.
"""

import ast
import contextlib
import errno
import json
import math
import os
import queue
import re
import secrets
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import dtype_to_descr, open_memmap, write_array_header_1_0

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
                flush(file)  # else a power cut could leave a folder of zeros
            if not os.path.exists(done):  # without locks, another may have been quicker
                os.rename(folder, done)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def lock_of(home):
    """Holds the lock of a folder, which the system frees when its process ends, however it ends.

    False where there are no such locks: on Windows, on some network disks."""
    place = os.open(os.path.join(home, ".lock"), os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        yield fcntl is not None and wait_for(place, home)
    finally:
        os.close(place)


def wait_for(place, home):
    """Whether the lock of an open file could be had, at once or after some waiting."""
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{home}: waiting for another process that makes scenes here", file=sys.stderr)
        fcntl.flock(place, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def flush(file):
    """Have a file's bytes on the disk itself."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


# --------------------------------------------------------------------------------------------------
# Arrays


def create_arrays(folder, arrays):
    """Files of zeros for arrays {name: (dtype, shape)}. OSError where the disk has no room."""
    free = shutil.disk_usage(folder).free
    needed = 0
    for dtype, shape in arrays.values():
        needed += math.prod(shape) * np.dtype(dtype).itemsize
    try:
        if needed > free and not hasattr(os, "posix_fallocate"):
            raise OSError(errno.ENOSPC, "")
        for name, (dtype, shape) in arrays.items():
            create_array(f"{folder}/{name}.npy", np.dtype(dtype), shape)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"{os.path.dirname(folder) or '.'}: needs {needed / 1e6:.1f} MB of disk for a set of "
            f"scenes, {free / 1e6:.1f} MB are free"
        ) from None


def create_array(file, dtype, shape):
    """A .npy file of zeros, with room on the disk for all of them where a system can reserve it."""
    with open(file, "wb") as opened:
        about = {"descr": dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        write_array_header_1_0(opened, about)
        size = opened.tell() + math.prod(shape) * dtype.itemsize
        opened.truncate(size)
        try:
            os.posix_fallocate(opened.fileno(), 0, size)
        except AttributeError:  # no such call here
            pass
        except OSError as error:
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

    A job is a list of arguments; jobs and answers are JSON. Each worker is a Python process of its
    own that runs nothing of the program that asks: a script needs no guard. It has one thread, as
    threads that share cores with others are many times slower. The death of one is an OSError. They
    end with the block, and with the process that asks, however that ends."""
    module, _, function = work.rpartition(".")
    program = (
        f"import sys; sys.path[:] = {sys.path!r}; import store, {module}; "
        f"store.serve({module}.{function})"
    )
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


def essence(source, names=None):
    """A Python source without comments, docstrings and layout.

    names: only the statements that define these names or what those mention, and so on."""
    body = [one for part in ast.parse(source).body for one in alone(part)]
    if names is not None:
        body = reached(body, names)
    for part in body:
        for node in ast.walk(part):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
    return "\n".join(map(ast.unparse, body))


def alone(part):
    """A statement as a list, with an import apart for each name; empty for a page's docstring."""
    if isinstance(part, ast.ImportFrom):
        return [ast.ImportFrom(part.module, [name], part.level) for name in part.names]
    return [] if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) else [part]


def reached(body, names):
    """The statements that define or change these names or what those mention, and so on."""
    imports = {}  # name: statements
    others = {}
    for part in body:
        if isinstance(part, (ast.Import, ast.ImportFrom)):
            for alias in part.names:
                imports.setdefault(alias.asname or alias.name, []).append(part)
            continue
        for name in defined_by(part):
            others.setdefault(name, []).append(part)
    kept = set()
    wanted = list(names)
    for name in wanted:  # it grows
        for part in imports.get(name) or others.pop(name, []):
            kept.add(part)
            wanted += mentioned(part)
    return [part for part in body if part in kept]


def defined_by(part):
    """The names that a statement defines, or may change: a line that is added to a table."""
    if isinstance(part, (ast.FunctionDef, ast.ClassDef)):
        return [part.name]
    return mentioned(ast.Tuple(part.targets) if isinstance(part, ast.Assign) else part)


def mentioned(part):
    """The names in a statement."""
    return [node.id for node in ast.walk(part) if isinstance(node, ast.Name)]


def imported(source, module):
    """The names that a Python source imports from a module, a set."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in found if node.module == module for alias in node.names}
