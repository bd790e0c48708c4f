"""
Triton kernels without a GPU: run them on CPU tensors, and compile them for GPUs that are not there.

    import cpu_triton                      from here on a launch, kernel[grid](tensors, ...), runs in Triton's interpreter
    with programs("backward"): ...         in another order: a kernel whose programs rely on their order is wrong
    with poisoned(): ...                   torch.empty gives NaN: a kernel that leaves something unwritten is seen
    with compiling(90) as builds: ...      a launch is compiled for sm_90 instead, and builds gets one `Build` for each

Leave TRITON_INTERPRET unset: it makes of kernels objects that can no longer be compiled. Made for Triton 3.6 (with numpy
before 2.4) and 3.7; it replaces parts of their insides, and with a GPU at hand it replaces nothing.

What the interpreter has wrong, and is put right here:
  - bf16 is kept as its 16 bits, and most arithmetic treats them as an integer. Here every operation on bf16 is done in
    float32 and rounded to nearest even once, as a GPU does.
  - An address outside all tensors is read or written without a word. Here it raises IndexError, and so does an address in
    a tensor's storage but not between the first and last element that the kernel was given.
  - A lane that a load masks off, with no `other` to stand in, reads 0; a GPU leaves there what it likes. Here it is NaN.
  - A helper function (or tl.sum) leaves the language patched when it returns, and nothing compiles afterwards.
What stays different: float32 products are exact, whatever input_precision says; num_warps, num_stages and maxnreg mean
nothing; programs run one after another, so one that waits for another waits for ever.
"""
import contextlib
import functools
import os
import random
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

import kernels

# ----------------------------------------------------------------------------------------------------------------------
# bf16: widened before an operation, rounded after it


def is_bf16(x):
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def widen(x):
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if is_bf16(x) else x


def narrow(x):
    data = torch.from_numpy(np.array(x.data, dtype=np.float32, order="C", ndmin=1)).bfloat16().view(torch.int16)
    return TensorHandle(data.numpy().view(np.uint16).reshape(np.shape(x.data)), tl.bfloat16)


def in_float32(method):
    def wrapped(self, *args):
        if not any(map(is_bf16, args)):
            return method(self, *args)
        result = method(self, *map(widen, args))
        return result if result.data.dtype == bool else narrow(result)  # a comparison is a bool already

    return wrapped


def cast(method):
    def wrapped(self, x, dtype):
        if is_bf16(x) and dtype.scalar != tl.bfloat16:
            return widen(x) if dtype.scalar == tl.float32 else method(self, widen(x), dtype)
        if dtype.scalar == tl.bfloat16 and not is_bf16(x):
            return narrow(x)
        return method(self, x, dtype)

    return wrapped


def dot(method):
    return lambda self, a, b, *rest: method(self, widen(a), widen(b), *rest)  # its sum is float32 already


# ----------------------------------------------------------------------------------------------------------------------
# Bounds, and lanes that are masked off

allowed = []  # first and last + 1 address of every tensor of the launch


def note_tensors(method):
    def wrapped(self, args, kwargs):
        host = method(self, args, kwargs)
        allowed[:] = [extent(t) for t in tensors([*host[0], *host[1].values()])]
        return host

    return wrapped


def tensors(args):
    for a in args:
        if isinstance(a, tuple):
            yield from tensors(a)
        elif hasattr(a, "base"):  # a tensor descriptor
            yield from tensors([a.base])
        elif torch.is_tensor(a):
            yield a


def extent(t):
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1 if t.numel() else 0
    return t.data_ptr(), t.data_ptr() + last * t.element_size()


def check_bounds(builder, pointers, mask, what):
    at = np.broadcast_to(pointers.data, np.shape(mask))[mask]
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    good = np.zeros(at.shape, bool)
    for first, end in allowed:
        good |= (at >= first) & (at + size <= end)
    if not good.all():
        raise IndexError(f"out of bounds: {what} at {(~good).sum()} of {good.size} places, program {builder.grid_idx}")


def load(method):
    def wrapped(self, pointers, mask, other, *rest):
        check_bounds(self, pointers, mask.data.astype(bool), "load")
        got = method(self, pointers, mask, other, *rest)
        if other is None and not mask.data.all():
            junk = 0x7FC0 if is_bf16(got) else np.nan if got.data.dtype.kind == "f" else np.iinfo(got.data.dtype).max
            got.data = np.where(mask.data.astype(bool), got.data, np.array(junk, got.data.dtype))
        return got

    return wrapped


def store(method):
    def wrapped(self, pointers, value, mask, *rest):
        check_bounds(self, pointers, mask.data.astype(bool), "store")
        return method(self, pointers, value, mask, *rest)

    return wrapped


def atomic(method):  # (operation, pointers, value, mask, ...)
    def wrapped(self, operation, pointers, value, mask, *rest):
        check_bounds(self, pointers, np.broadcast_to(mask.data, np.shape(pointers.data)).astype(bool), "atomic")
        return method(self, operation, pointers, value, mask, *rest)

    return wrapped


# ----------------------------------------------------------------------------------------------------------------------
# The order of programs, and outputs that nobody wrote

order = ["forward"]


@contextlib.contextmanager
def programs(how):
    """Run a launch's programs forward, backward or shuffled; a GPU promises none of these."""
    order.append(how)
    try:
        yield
    finally:
        order.pop()


def lay_out(method):
    def wrapped(self, *size):
        method(self, *size)
        self.places = list(np.ndindex(*size))
        {"forward": id, "backward": list.reverse, "shuffled": random.shuffle}[order[-1]](self.places)

    return wrapped


def take_place(method):
    def wrapped(self, x, y, z):
        _, Y, Z = self.grid_dim
        method(self, *self.places[(x * Y + y) * Z + z])

    return wrapped


@contextlib.contextmanager
def poisoned():
    """torch.empty and its kin give NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what is allocated, unless asked not to
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# ----------------------------------------------------------------------------------------------------------------------
# Compiling for a GPU that is not there

BIN = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
# of a multiprocessor, by compute capability: KiB of shared memory, of which a block may have all but one; resident warps
CHIPS = {80: (164, 64), 86: (100, 48), 89: (100, 48), 90: (228, 64), 100: (228, 64), 120: (100, 48)}


@dataclass
class Build:
    """What a launch compiled to."""

    kernel: str
    chip: int  # compute capability
    grid: tuple
    registers: int  # of a thread; the hardware has 65536 for each multiprocessor and at most 255 for a thread
    spilled: int  # bytes that did not fit into registers and are written out and read back
    shared: int  # bytes of shared memory of a block
    fits: bool  # whether the chip has as much
    blocks: int  # of these at once on a multiprocessor: what hides waiting
    warps: int  # of 32 threads, in a block
    instructions: Counter  # of the machine code, by opcode
    async16: int  # asynchronous copies to shared memory of 16 bytes each thread, the widest; or by a descriptor
    async_narrow: int  # narrower ones, each of which moves less for the same instruction
    sass: str  # the machine code

    def matrix(self):
        """The matrix instruction: HMMA (sm_80, sm_120), HGMMA (sm_90), UTCHMMA (sm_100), or None."""
        return next((op for op in ("UTCHMMA", "HGMMA", "HMMA") if self.instructions[op]), None)


known = {}  # builds by Triton's hash of what was compiled and for what
building = []  # stack of (chip, list of builds) of the `compiling` contexts that are open


@contextlib.contextmanager
def compiling(chip):
    """Launches are compiled for this compute capability, with the arguments that they would have run with, not run."""
    builds, before = [], kernels.chip
    building.append((chip, builds))
    kernels.chip = chip
    try:
        yield builds
    finally:
        kernels.chip = before
        building.pop()


def build(kernel, chip, grid, args, kwargs):
    target = GPUTarget("cuda", chip, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: chip,
            get_current_stream=lambda device: 0,
        )
    )
    made = run_on_device(kernel, *args, grid=grid, warmup=True, **kwargs)
    if made.hash in known:
        return replace(known[made.hash], grid=grid)
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = os.path.join(folder, "k.cubin"), os.path.join(folder, "k.ptx")
        with open(cubin, "wb") as f:
            f.write(made.asm["cubin"])
        with open(ptx, "w") as f:
            f.write(made.asm["ptx"])
        ask = lambda *words: subprocess.run([os.path.join(BIN, words[0]), *words[1:]], capture_output=True, text=True)
        usage = ask("cuobjdump", "-res-usage", cubin).stdout
        sass = ask("nvdisasm", "-c", cubin).stdout
        spilled = 0
        if int(re.search(r"STACK:(\d+)", usage)[1]):  # a stack is spilled registers or a function's table; ptxas knows
            arch, ptxas = f"sm_{chip}{'a' * (chip >= 90)}", "ptxas-blackwell" if chip >= 100 else "ptxas"
            log = ask(ptxas, "-v", "--regAllocOptLevel=2", f"--gpu-name={arch}", ptx, "-o", os.devnull).stderr
            spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    registers, shared, warps = int(re.search(r"REG:(\d+)", usage)[1]), made.metadata.shared, made.metadata.num_warps
    memory, most_warps = CHIPS[chip]
    blocks = min(65536 // (-(-registers // 8) * 8 * 32 * warps), memory * 1024 // (shared + 1024), most_warps // warps)
    if tensor_memory := getattr(made.metadata, "tmem_size", 0):  # sm_100 alone: 512 columns for the sums of its products
        blocks = min(blocks, 512 // tensor_memory)
    code = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M)
    copies = [op for op in code if op.startswith("LDGSTS")]
    wide = sum(op.endswith(".128") for op in copies)
    opcodes = Counter(op.split(".")[0] for op in code)
    fits = shared <= (memory - 1) * 1024
    known[made.hash] = Build(
        kernel.__name__, chip, grid, registers, spilled, shared, fits, blocks, warps, opcodes, wide + opcodes["UTMALDG"],
        len(copies) - wide, sass,
    )  # fmt: skip
    return known[made.hash]


# ----------------------------------------------------------------------------------------------------------------------
# Putting it in place

run_on_device = JITFunction.run


def run(self, *args, grid, warmup=False, **kwargs):
    if not building:
        if "interpreted" not in self.__dict__:
            self.interpreted = InterpretedFunction(self.fn)
        return self.interpreted.run(*args, grid=grid, warmup=warmup, **kwargs)
    chip, builds = building[-1]
    builds.append(build(self, chip, grid, args, kwargs))


def call(self, *args, **kwargs):
    """A helper function that an interpreted kernel calls; the launch has patched the language already."""
    if "interpreted" not in self.__dict__:
        self.interpreted = InterpretedFunction(self.fn)
    return self.interpreted.rewrite()(*args, **kwargs)


def install():
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("TRITON_INTERPRET is set: kernels made under it cannot be compiled; leave it unset")
    B = InterpreterBuilder
    for name, put_right in (
        ("binary_op", in_float32), ("unary_op", in_float32), ("ternary_op", in_float32), ("create_fma", in_float32),
        ("create_erf", in_float32), ("create_rsqrt", in_float32), ("create_dot", dot), ("cast_impl", cast),
        ("create_masked_load", load), ("create_masked_store", store), ("create_atomic_rmw", atomic),
        ("set_grid_dim", lay_out), ("set_grid_idx", take_place),
    ):  # fmt: skip
        setattr(B, name, put_right(getattr(B, name)))
    B.get_bf16 = lambda self, value: narrow(TensorHandle(np.array([value], np.float32), tl.float32))
    GridExecutor._init_args_hst = note_tensors(GridExecutor._init_args_hst)
    # Both names of the language, so that helpers from either find it patched, from a launch's begin to its end.
    everywhere, patch = SimpleNamespace(__globals__={"tl": tl, "core": tl.core}), interpreter._patch_lang
    interpreter._patch_lang = lambda fn: patch(everywhere)
    JITFunction.run, JITFunction.__call__ = run, call
    first = lambda self, *args, **kwargs: self.fn.run(*args, **{**kwargs, **self.configs[0].all_kwargs()})
    Autotuner.run = first  # there is nothing to time here
    kernels.devices.add("cpu")
    # A third of the interpreter's time went into overflows that it looks for and, outside its debug mode, says nothing of,
    # and into one table made anew at each operation.
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    table = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda dtype: np.dtype(np.uint64) if dtype.scalar.is_ptr() else table(dtype.scalar)


if not torch.cuda.is_available():
    install()
