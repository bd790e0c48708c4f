"""
The kernels: what costs most on a GPU, by hand in Triton, each beside the PyTorch lines that say what it computes.

    salience.py           how much attention each key receives: what tokens are pruned by
    pruned_attention.py   attention among the patches that are left, image by image
    prefix_attention.py   attention of n samples over the prompt that they share and a tail that each has
    flow_step.py          the flow's Euler step with the embedding of the new controls; the unicycle and its gradient
    sampler.py            all steps of the flow over the expert, five launches a layer, recorded as one CUDA graph
    tiles.py              what these share: vectors whose length is no power of two

A kernel changes how fast something is computed, never what: each file has the PyTorch specification first, the kernel
second and last the function that the model calls, which asks `by_hand` here which of the two runs.

    ALPAMAYO_KERNELS=auto     Triton for 16-bit tensors on an NVIDIA GPU, PyTorch for all others (default)
    ALPAMAYO_KERNELS=torch    PyTorch
    ALPAMAYO_KERNELS=triton   Triton, for 32-bit tensors too, or an error that says why it cannot be

`kernels.use("torch")` does the same from within a program. 64-bit tensors, which only tests have, are PyTorch's always.
"""
import os
import sys
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without: the kernels are then only read, and the specifications run
    triton, tl = SimpleNamespace(__version__=None, jit=lambda kernel: kernel), SimpleNamespace(constexpr=float)

CHOICES = ("auto", "torch", "triton")
devices = {"cuda"}  # where a Triton kernel can run; tests/cpu_triton.py adds "cpu"
chip = 90  # for tensors that are on no GPU: the compute capability that launches are laid out for, see `capability`,
processors = 132  # and the number of multiprocessors, an H200's; see `multiprocessors`
_choice, _said = None, set()


def use(choice):
    """Choose for the whole program: auto, torch or triton. What torch.compile has compiled already stays as it is."""
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"ALPAMAYO_KERNELS: expected auto, torch or triton, not {choice!r}")
    _choice = choice
    _said.clear()


def capability(device):
    """Compute capability as one number: 80 is an A100, 90 an H100 or H200, 100 a B200, 120 an RTX 5090 or RTX PRO 6000."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else divmod(chip, 10)
    return 10 * major + minor


def multiprocessors(device):
    """How many programs run side by side, one of them a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else processors


@torch.compiler.assume_constant_result  # torch.compile asks once, while it traces
def by_hand(device, dtype, even_32_bit=False):
    """Whether Triton, and not PyTorch, works on tensors of this device and dtype; says so on stderr when it first decides,
    but for `auto` on a CPU, where there is nothing to decide. even_32_bit: `auto` takes Triton for 32-bit tensors too, for
    where one launch replaces many."""
    if _choice is None:
        use(os.environ.get("ALPAMAYO_KERNELS", "auto"))
    here = device.type in devices and (device.type != "cuda" or torch.version.hip is None and capability(device) >= 80)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        answer, why = False, f"they are not for {dtype}"
    elif _choice == "torch":
        answer, why = False, "ALPAMAYO_KERNELS=torch"
    elif triton.__version__ is None:
        answer, why = False, "Triton is not installed"
    elif not here:
        answer, why = False, f"they need an NVIDIA GPU of capability 8.0 or more, and the tensors are on {device.type}"
    elif device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        answer, why = False, f"they run on the current GPU, and the tensors are on {device}: call torch.cuda.set_device first"
    elif _choice == "triton":
        answer, why = True, "ALPAMAYO_KERNELS=triton"
    elif device.type != "cuda" or dtype == torch.float32 and not even_32_bit:
        answer, why = False, "16-bit tensors on a GPU gain by them, and these are not"
    else:
        answer, why = True, f"capability {capability(device)}"
    if _choice == "triton" and not answer and dtype != torch.float64:
        raise ValueError(f"ALPAMAYO_KERNELS=triton: the kernels cannot run: {why}")
    told = (device.type, dtype, answer)
    if not even_32_bit and told not in _said and dtype != torch.float64 and (_choice != "auto" or device.type != "cpu"):
        _said.add(told)
        which = f"Triton {triton.__version__}" if answer else "PyTorch"
        print(f"kernels: {which} for {str(dtype)[6:]} on {device.type} ({why})", file=sys.stderr)
    return answer
