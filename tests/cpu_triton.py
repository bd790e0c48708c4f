"""
Triton kernels without a GPU: they run on CPU tensors, in Triton's interpreter.

    import cpu_triton                  from here on kernel[grid](tensors, ...) is interpreted
    with programs("backward"): ...     in another order, which finds kernels that rely on it
    with poisoned(): ...               torch.empty gives NaN, which finds what is left unwritten
    with compiling(90) as builds: ...  compiled for sm_90 instead, see kernels/compiled.py

Leave TRITON_INTERPRET unset. Made for Triton 3.6 (with numpy before 2.4) and 3.7, parts of which
it replaces. Where there is a GPU it replaces nothing.

What the interpreter has wrong, and is put right here:
  - bf16 is kept as its 16 bits, and most arithmetic treats them as an integer. Here every operation
    on bf16 is done in float32 and rounded to nearest even once, as a GPU does.
  - An address outside all tensors is read or written silently. Here it raises IndexError. So does
    an address in a tensor's storage, but outside the view that the kernel was given.
  - A lane that a load masks off, without `other`, reads 0. On a GPU it is undefined, here NaN.
  - A helper function (or tl.sum) leaves the language patched, and nothing compiles afterwards.
What stays different: float32 products are exact, whatever input_precision says. num_warps,
num_stages and maxnreg mean nothing. Programs run one after another, so one that waits for another
waits for ever.
"""
import contextlib
import functools
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
)
from triton.runtime.jit import JITFunction

import kernels
from kernels.compiled import compiling  # noqa: F401  before JITFunction.run is replaced here

# --------------------------------------------------------------------------------------------------
# bf16: widened before an operation, rounded after it


def is_bf16(x):
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def widen(x):
    if not is_bf16(x):
        return x
    bits = x.data.astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def narrow(x):
    data = torch.from_numpy(np.array(x.data, dtype=np.float32, order="C", ndmin=1))
    bits = data.bfloat16().view(torch.int16).numpy().view(np.uint16)
    return TensorHandle(bits.reshape(np.shape(x.data)), tl.bfloat16)


def in_float32(method):
    def wrapped(self, *args):
        if not any(map(is_bf16, args)):
            return method(self, *args)
        result = method(self, *map(widen, args))
        return result if result.data.dtype == bool else narrow(result)  # bool: a comparison

    return wrapped


def cast(method):
    def wrapped(self, x, dtype):
        to_bf16 = dtype.scalar == tl.bfloat16
        if is_bf16(x) and not to_bf16:
            return widen(x) if dtype.scalar == tl.float32 else method(self, widen(x), dtype)
        if to_bf16 and not is_bf16(x):
            return narrow(x)
        return method(self, x, dtype)

    return wrapped


def dot(method):
    def wrapped(self, a, b, *rest):
        return method(self, widen(a), widen(b), *rest)  # its sum is float32 already

    return wrapped


# --------------------------------------------------------------------------------------------------
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
    begin = t.data_ptr()
    if not t.numel():
        return begin, begin
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return begin, begin + (last + 1) * t.element_size()


def check_bounds(builder, pointers, mask, what):
    at = np.broadcast_to(pointers.data, np.shape(mask))[mask]
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    good = np.zeros(at.shape, bool)
    for first, end in allowed:
        good |= (at >= first) & (at + size <= end)
    if not good.all():
        lanes = f"{(~good).sum()} of {good.size} places"
        raise IndexError(f"out of bounds: {what} at {lanes}, program {builder.grid_idx}")


def junk(x):
    """What an undefined lane of this tile might hold."""
    if is_bf16(x):
        return 0x7FC0  # the bits of NaN
    return np.nan if x.data.dtype.kind == "f" else np.iinfo(x.data.dtype).max


def load(method):
    def wrapped(self, pointers, mask, other, *rest):
        there = mask.data.astype(bool)
        check_bounds(self, pointers, there, "load")
        got = method(self, pointers, mask, other, *rest)
        if other is None and not there.all():
            got.data = np.where(there, got.data, np.array(junk(got), got.data.dtype))
        return got

    return wrapped


def store(method):
    def wrapped(self, pointers, value, mask, *rest):
        check_bounds(self, pointers, mask.data.astype(bool), "store")
        return method(self, pointers, value, mask, *rest)

    return wrapped


def atomic(method):
    def wrapped(self, operation, pointers, value, mask, *rest):
        there = np.broadcast_to(mask.data, np.shape(pointers.data)).astype(bool)
        check_bounds(self, pointers, there, "atomic")
        return method(self, operation, pointers, value, mask, *rest)

    return wrapped


# --------------------------------------------------------------------------------------------------
# The order of programs, and outputs that nobody wrote

order = ["forward"]
ORDERS = {"forward": id, "backward": list.reverse, "shuffled": random.shuffle}


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
        ORDERS[order[-1]](self.places)

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
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# --------------------------------------------------------------------------------------------------
# Putting it in place


def interpreted(kernel):
    if "interpreted" not in kernel.__dict__:
        kernel.interpreted = InterpretedFunction(kernel.fn)
    return kernel.interpreted


def run(self, *args, **kwargs):
    return interpreted(self).run(*args, **kwargs)


def call(self, *args, **kwargs):
    """A helper that an interpreted kernel calls; the launch has patched the language already."""
    return interpreted(self).rewrite()(*args, **kwargs)


def run_first_choice(self, *args, **kwargs):
    """An autotuner's kernel with the first configuration: there is nothing to time here."""
    return self.fn.run(*args, **{**kwargs, **self.configs[0].all_kwargs()})


def get_bf16(self, value):
    return narrow(TensorHandle(np.array([value], np.float32), tl.float32))


def install():
    for name, put_right in (
        ("binary_op", in_float32), ("unary_op", in_float32), ("ternary_op", in_float32),
        ("create_fma", in_float32), ("create_erf", in_float32), ("create_rsqrt", in_float32),
        ("create_dot", dot), ("cast_impl", cast), ("create_masked_load", load),
        ("create_masked_store", store), ("create_atomic_rmw", atomic), ("set_grid_dim", lay_out),
        ("set_grid_idx", take_place),
    ):  # fmt: skip
        setattr(InterpreterBuilder, name, put_right(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.get_bf16 = get_bf16
    GridExecutor._init_args_hst = note_tensors(GridExecutor._init_args_hst)
    # Both names of the language, so that helpers from either find it patched, during a launch.
    everywhere = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    patch = interpreter._patch_lang
    interpreter._patch_lang = lambda fn: patch(everywhere)
    JITFunction.run = run
    JITFunction.__call__ = call
    Autotuner.run = run_first_choice
    kernels.devices.add("cpu")
    # A third of the interpreter's time went into overflows, which it looks for but does not report
    # outside its debug mode, and into one table made anew at each operation.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    table = functools.cache(interpreter._get_np_dtype)

    def np_dtype(dtype):
        return np.dtype(np.uint64) if dtype.scalar.is_ptr() else table(dtype.scalar)

    interpreter._get_np_dtype = np_dtype


if not torch.cuda.is_available():
    install()
