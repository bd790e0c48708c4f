"""
The tools that the kernels' tests stand on: what the interpreter computes and refuses, what is read
off a compiled kernel, and who decides which of Triton and PyTorch runs.

    python -m pytest tests/test_cpu_triton.py
"""
import pytest
import torch

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("a GPU is here: kernels run on it", allow_module_level=True)
import triton.language as tl  # noqa: E402
from cpu_triton import compiling, poisoned, programs  # noqa: E402

import kernels  # noqa: E402


@triton.jit
def arithmetic(A, B, Out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(A + i, mask=i < n, other=1.0), tl.load(B + i, mask=i < n, other=1.0)
    tl.store(Out + i, a + b, mask=i < n)
    tl.store(Out + n + i, a - b, mask=i < n)
    tl.store(Out + 2 * n + i, a * b, mask=i < n)
    tl.store(Out + 3 * n + i, -a, mask=i < n)
    tl.store(Out + 4 * n + i, tl.where(a < b, a, b), mask=i < n)
    tl.store(Out + 5 * n + i, a * 2.0, mask=i < n)
    tl.store(Out + 6 * n + i, tl.maximum(a, b), mask=i < n)
    tl.store(Out + 7 * n + i, (a.to(tl.float32) / 3).to(Out.dtype.element_ty), mask=i < n)


def test_arithmetic_in_bf16_is_torchs():
    n = 1000
    a, b = (torch.randn(n) * 10 ** torch.empty(n).uniform_(-3, 3) for _ in range(2))
    a, b, out = a.bfloat16(), b.bfloat16(), torch.empty(8 * n, dtype=torch.bfloat16)
    arithmetic[(1,)](a, b, out, n, BLOCK=1024)
    third = (a.float() / 3).bfloat16()
    least, most = torch.minimum(a, b), torch.maximum(a, b)
    for i, e in enumerate([a + b, a - b, a * b, -a, least, a * 2.0, most, third]):
        assert torch.equal(out[i * n : i * n + n], e), i


@triton.jit
def square(x):
    return tl.sum(x * x, 1)


@triton.jit
def product(A, B, Out, Norm, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    y = tl.dot(tl.load(A + at), tl.trans(tl.load(B + at)), tl.zeros([BLOCK, BLOCK], tl.float32))
    tl.store(Out + at, y.to(Out.dtype.element_ty))
    tl.store(Norm + i, square(y))


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)]
)
def test_products(dtype, tolerance):
    a, b = torch.randn(2, 64, 64, dtype=torch.float64).to(dtype)
    out, norm = torch.empty(64, 64, dtype=dtype), torch.empty(64)
    product[(1,)](a, b, out, norm, BLOCK=64)
    expected = a.double() @ b.double().T
    assert (out - expected).norm() < tolerance * expected.norm()
    torch.testing.assert_close(norm.double(), expected.square().sum(1), rtol=1e-5, atol=0)


@triton.jit
def shift(X, Out, by, n, GUARD: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Out + i, tl.load(X + i + by, mask=i + by < n) if GUARD else tl.load(X + i + by))


def test_bounds():
    """Beyond the storage; inside it but beyond the view; before it. What is masked off without
    `other` is not 0."""
    x = torch.randn(64)
    with pytest.raises(Exception, match="out of bounds: load at 1 of 32"):
        shift[(1,)](x, torch.empty(32), 33, 64, GUARD=False, BLOCK=32)
    with pytest.raises(Exception, match="out of bounds: load at 2 of 32"):
        shift[(1,)](x[:32], torch.empty(32), 2, 64, GUARD=False, BLOCK=32)
    with pytest.raises(Exception, match="out of bounds: load at 1 of 32"):
        shift[(1,)](x[1:], torch.empty(32), -1, 64, GUARD=False, BLOCK=32)
    with pytest.raises(Exception, match="out of bounds: store at 2 of 32"):
        shift[(1,)](x, torch.empty(64)[:30], 0, 64, GUARD=False, BLOCK=32)
    out = torch.empty(32)
    shift[(1,)](x, out, 40, 64, GUARD=True, BLOCK=32)
    assert torch.equal(out[:24], x[40:]) and out[24:].isnan().all()


@triton.jit
def one_after_another(X, n):
    i = tl.program_id(0)
    tl.store(X + i + 1, tl.load(X + i) + 1)


def test_order_of_programs():
    """Programs that rely on their order give another result in another one."""

    def run():
        x = torch.zeros(6)
        one_after_another[(5,)](x, 5)
        return x.tolist()

    assert run() == [0, 1, 2, 3, 4, 5]
    with programs("backward"):
        assert run() == [0, 1, 1, 1, 1, 1]
    assert run() == [0, 1, 2, 3, 4, 5]
    with poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()


@pytest.mark.parametrize(
    "chip, matrix", [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"), (120, "HMMA")]
)
def test_compiling_between_runs(chip, matrix):
    a, b = torch.randn(2, 64, 64).bfloat16()
    args = a, b, torch.empty(64, 64), torch.zeros(64)
    product[(1,)](*args, BLOCK=64)
    with kernels.using("torch"), compiling(chip) as builds:
        product[(1,)](*args, BLOCK=64, num_warps=4)
        assert kernels.capability(a.device) == chip and kernels.by_hand(a.device, a.dtype)
    (build,) = builds
    assert build.matrix() == matrix and build.fits and build.spilled == 0
    assert 16 <= build.registers <= 255
    assert build.blocks >= 1 and build.kernel == "product" and build.warps >= 4
    product[(1,)](*args, BLOCK=64)


@triton.jit
def pipelined(A, B, Out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    y = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, n, BLOCK):
        a = tl.load(A + i[:, None] * n + k + i[None, :])
        y = tl.dot(a, tl.load(B + (k + i)[:, None] * BLOCK + i[None, :]), y)
    tl.store(Out + i[:, None] * BLOCK + i[None, :], y)


def test_what_does_not_fit():
    """Spilled registers and too much shared memory are seen."""
    args = torch.randn(2, 64, 64).bfloat16()
    with compiling(90) as builds:
        out = torch.empty(64, 64), torch.empty(64)
        product[(1,)](*args, *out, BLOCK=64, num_warps=1, maxnreg=64)
    assert builds[0].spilled > 0 and builds[0].registers == 64 and builds[0].fits
    with compiling(90) as builds:
        for stages in (2, 6):
            options = dict(BLOCK=128, num_warps=8, num_stages=stages)
            pipelined[(1,)](*args, torch.empty(64, 64), 512, **options)
    assert [b.fits for b in builds] == [True, False] and builds[0].blocks > builds[1].blocks == 0
    wide = builds[0].async16
    assert wide > 0 and builds[0].async_narrow == 0
    with compiling(90) as builds:  # rows of 500 do not begin at multiples of 16 bytes: A's are slow
        pipelined[(1,)](*args, torch.empty(64, 64), 500, BLOCK=128, num_warps=8, num_stages=2)
    assert builds[0].async16 == wide / 2


def decisions(dtypes):
    return [kernels.by_hand(torch.device("cpu"), dtype) for dtype in dtypes]


def test_the_switch(monkeypatch, capsys):
    """Without a GPU: PyTorch. Where somebody chose, that is told once for each dtype. What cannot
    be is an error of one line."""
    every = (torch.float32, torch.bfloat16, torch.float32, torch.float64)
    monkeypatch.setattr(kernels, "_choice", None)  # as when a program starts, and after this test
    monkeypatch.setattr(kernels, "_said", set())
    monkeypatch.setattr(kernels, "devices", {"cuda"})
    monkeypatch.delenv("ALPAMAYO_KERNELS", raising=False)
    assert decisions(every) == [False] * 4
    assert not capsys.readouterr().err
    kernels.use("torch")
    assert decisions(every) == [False] * 4
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "PyTorch for float32 on cpu (ALPAMAYO_KERNELS=torch)" in said[0]
    kernels.use("triton")
    with pytest.raises(ValueError, match="=triton: the kernels cannot run: they need an NVIDIA"):
        decisions(every)
    kernels.devices.add("cpu")  # what importing cpu_triton does
    assert decisions(every) == [True, True, True, False]
    kernels.use("torch")
    assert decisions(every) == [False] * 4
    monkeypatch.setattr(kernels, "_choice", None)
    monkeypatch.setenv("ALPAMAYO_KERNELS", "fast")
    with pytest.raises(ValueError, match="expected auto, torch or triton, not 'fast'"):
        decisions(every)


def test_a_choice_for_a_block(monkeypatch):
    """The choice before comes back, after an error too; a wrong one changes nothing."""
    monkeypatch.setattr(kernels, "_choice", None)
    with pytest.raises(ZeroDivisionError), kernels.using("triton"):
        assert decisions([torch.float32]) == [True]
        with kernels.using("torch"):
            assert decisions([torch.float32]) == [False]
        assert decisions([torch.float32]) == [True]
        raise ZeroDivisionError
    assert kernels._choice is None
    with pytest.raises(ValueError, match="not 'fast'"), kernels.using("fast"):
        pass
    assert kernels._choice is None
