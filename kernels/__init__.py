"""
What costs most on a GPU, written by hand in Triton, each kernel beside the PyTorch that defines it.

    salience.py           how much attention each key receives; tokens are pruned by it
    pruned_attention.py   attention among the patches that are kept, image by image
    prefix_attention.py   attention of n samples over the prompt they share and a tail each
    flow_step.py          Euler step of the flow with the embedding of the new controls; roll-out
    decoding.py           the language model's pass over one token, recorded as a CUDA graph
    sampler.py            all steps of the flow over the expert, recorded as one CUDA graph
    one_launch.py         the same for a small expert, nano's, in one launch
    roll_out.cu           the roll-out once more, in CUDA C++, to compare (roll_out_cuda.py)
    stock.py              whether the model is still what sampler and flow_step write out again
    tiles.py              reading and multiplying tiles; vectors whose length is no power of two
    bench.py              each kernel timed, or without a GPU counted and compiled (compiled.py)

A kernel changes how fast something is computed, never what. Each file has the PyTorch first
(`plain_...`), then the kernels, and last the function that the model calls. That function asks
`by_hand` here which of the two runs. Two write a piece of the model itself out again. Where that
piece was edited PyTorch runs, whatever was chosen: see stock.py.

    ALPAMAYO_KERNELS=auto     Triton on an NVIDIA GPU, else PyTorch (default)
    ALPAMAYO_KERNELS=torch    PyTorch
    ALPAMAYO_KERNELS=triton   Triton, or an error that says why it cannot

`kernels.use("torch")` does the same within a program, and `with kernels.using("torch"):` within a
block. 64-bit tensors, which only tests have, always go to PyTorch.
"""
import contextlib
import functools
import os
import sys
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without it: the kernels can be read, PyTorch runs
    triton = SimpleNamespace(__version__=None, jit=lambda f: f, constexpr_function=lambda f: f)
    tl = SimpleNamespace(constexpr=float)

CHOICES = ("auto", "torch", "triton")
devices = {"cuda"}  # where a Triton kernel can run; tests/cpu_triton.py adds "cpu"
chip = 90  # for tensors that are on no GPU: the capability that launches are laid out for
processors = 132  # and the number of multiprocessors, an H200's
_choice = None
_said = set()  # decisions that were told


def use(choice):
    """Choose for the whole program: auto, torch or triton. torch.compile keeps what it compiled."""
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"ALPAMAYO_KERNELS: expected auto, torch or triton, not {choice!r}")
    _choice = choice


@contextlib.contextmanager
def using(choice):
    """Choose for a `with` block."""
    global _choice
    before = _choice
    use(choice)
    try:
        yield
    finally:
        _choice = before


def capability(device):
    """Compute capability as one number: 80 is an A100, 90 an H100 or H200, 100 a B200, 120 an
    RTX 5090 or RTX PRO 6000."""
    if device.type != "cuda":
        return chip
    return _properties(device)[0]


def multiprocessors(device):
    """How many there are; each runs one program or several at a time."""
    if device.type != "cuda":
        return processors
    return _properties(device)[1]


@functools.cache
def _properties(device):
    found = torch.cuda.get_device_properties(device)
    return 10 * found.major + found.minor, found.multi_processor_count


def in_multiples(n, of):
    """The multiple that has room for n."""
    return -(-n // of) * of


def say(line):
    """Tell a decision on stderr, once."""
    if line not in _said:
        _said.add(line)
        print(f"kernels: {line}", file=sys.stderr)


def _decide(device, dtype):
    """Whether Triton runs, and why or why not."""
    on_gpu = device.type == "cuda"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False, f"they are not for {dtype}"
    if _choice == "torch":
        return False, "ALPAMAYO_KERNELS=torch"
    if triton.__version__ is None:
        return False, "Triton is not installed"
    if device.type not in devices or on_gpu and (torch.version.hip or capability(device) < 80):
        wanted = "an NVIDIA GPU of capability 8.0 or more"
        return False, f"they need {wanted}, and the tensors are on {device.type}"
    if on_gpu and device.index not in (None, torch.cuda.current_device()):
        where = "they run on the current GPU, and the tensors are on"
        return False, f"{where} {device}: call torch.cuda.set_device first"
    if _choice == "triton":
        return True, "ALPAMAYO_KERNELS=triton"
    if not on_gpu:
        return False, "tensors on a GPU gain by them"
    return True, f"capability {capability(device)}"


def call(op, *inputs):
    """op(*inputs), an operator of torch.library. Where nobody would notice, its function without
    the operator, which costs the CPU more than a launch: nothing traces, no gradients, no subclass
    of tensors."""
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    plain = not torch.compiler.is_compiling() and all(type(x) is torch.Tensor for x in tensors)
    if plain and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return op._init_fn(*inputs)
    return op(*inputs)


@torch.compiler.assume_constant_result  # torch.compile asks once, while it traces
def by_hand(device, dtype):
    """Whether Triton, and not PyTorch, works on tensors of this device and dtype.

    A first decision is told on stderr, except `auto` on a CPU, where there is nothing to decide.
    ValueError if Triton was asked for and cannot run."""
    if _choice is None:
        use(os.environ.get("ALPAMAYO_KERNELS", "auto"))
    answer, why = _decide(device, dtype)
    if dtype == torch.float64:
        return answer
    if _choice == "triton" and not answer:
        raise ValueError(f"ALPAMAYO_KERNELS=triton: the kernels cannot run: {why}")
    decision = (_choice, device.type, dtype, answer)
    nothing_to_decide = _choice == "auto" and device.type == "cpu"
    if decision not in _said and not nothing_to_decide:
        _said.add(decision)
        which = f"Triton {triton.__version__}" if answer else "PyTorch"
        say(f"{which} for {str(dtype)[6:]} on {device.type} ({why})")
    return answer
