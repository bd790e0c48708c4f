"""
roll_out.cu compiled by NVRTC, the compiler that comes with PyTorch for CUDA, and launched. It is
for who wants to compare CUDA C++ with Triton; the model runs the Triton one, in flow_step.py.

    xyz, rot = roll_out(actions, v0)      on a GPU; alpamayo.roll_out says what these are
    cubin = compiled(90)                  machine code for sm_90, anywhere: pip install
                                          nvidia-cuda-nvrtc

torch.cuda._compile_kernel does both at once, but only where CUDA's toolkit is installed, since it
looks for headers. This file has none.
"""
import ctypes
import functools
import glob
import os
import sys

import torch

from kernels import capability, flow_step

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "roll_out.cu")
WARPS = 4  # in a block, a car each


@functools.cache
def nvrtc():
    """NVRTC's library: the one in memory, or of a wheel. OSError if there is none."""
    wheels = [os.path.join(folder, "nvidia", "*", "lib") for folder in sys.path]
    builtins = [path for w in wheels for path in glob.glob(f"{w}/libnvrtc-builtins.so.*")]
    found = [path for w in wheels for path in sorted(glob.glob(f"{w}/libnvrtc.so.*"))]
    for path in builtins:  # which the compiler asks for by name
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    for path in ("libnvrtc.so.13", "libnvrtc.so.12", *found):
        try:
            return ctypes.CDLL(path)
        except OSError:
            pass
    raise OSError("NVRTC is not installed: pip install nvidia-cuda-nvrtc")


@functools.cache
def compiled(chip):
    """Machine code of roll_out.cu for a compute capability, as bytes. RuntimeError with the
    compiler's words where it is not C++."""
    library, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    with open(SOURCE, "rb") as f:
        library.nvrtcCreateProgram(ctypes.byref(program), f.read(), b"roll_out.cu", 0, None, None)
    option = (ctypes.c_char_p * 1)(f"--gpu-architecture=sm_{chip}".encode())
    failed = library.nvrtcCompileProgram(program, 1, option)
    what = "ProgramLog" if failed else "CUBIN"
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, text)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(f"roll_out.cu: {text.value.decode()}")
    return text.raw


@functools.cache
def loaded(device):
    from torch.cuda._utils import _cuda_load_module

    with torch.cuda.device(device):
        return _cuda_load_module(compiled(capability(device)), ["roll_out"])["roll_out"]


def roll_out(actions, v0):
    """alpamayo.roll_out without gradient, on a GPU in float32: actions (..., T, 2), v0 (...) to xyz
    (..., T, 3) and rot (..., T, 3, 3)."""
    if not actions.is_cuda or actions.dtype != torch.float32 or v0.dtype != torch.float32:
        raise ValueError(f"actions: {actions.dtype} on {actions.device}, expected float32 on cuda")
    actions, v0 = actions.contiguous(), v0.expand(actions.shape[:-2]).contiguous()
    xyz, rot = flow_step.empty_paths(actions, v0)
    cars, T = v0.numel(), actions.shape[-2]
    blocks = -(-cars // WARPS)
    launch = loaded(actions.device)
    launch((blocks, 1, 1), (32 * WARPS, 1, 1), [actions, v0, xyz, rot, cars, T])
    return xyz, rot
