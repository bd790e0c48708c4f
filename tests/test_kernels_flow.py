"""
Attention over a shared prefix, the flow's step and the roll-out in Triton: against their specifications in float64, on
fresh random sizes, and what they compile to for four chips.

    python -m pytest tests/test_kernels_flow.py
"""
import random

import pytest
import torch

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("a GPU is here: kernels run on it", allow_module_level=True)
from cpu_triton import compiling, poisoned, programs  # noqa: E402

import kernels  # noqa: E402
from kernels import prefix_attention as attention  # noqa: E402

# Triton's interpreter computes in masked-off lanes too
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the norm; the types' own roundings


@pytest.fixture(autouse=True)
def by_hand():
    kernels.use("triton")
    yield
    kernels.use("auto")


def close(got, expected, tolerance):
    error = (got.double() - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.1e}"


# ------------------------------------------------------------------------------------------------------ prefix attention


def inputs(B, n, H, G, T, P, S, d, mask0, mask1, dtype):
    """Leaves q, k0, v0, k1, v1, as views that a cache and transposed projections are; masks that leave each row a key."""
    N = B * n
    leaf = lambda *shape: torch.randn(shape, dtype=torch.float64).to(dtype)
    q = leaf(N, T, H, d).transpose(1, 2)
    k0, v0 = (leaf(B, G, P + 3, d)[:, :, :P] for _ in range(2))
    k1, v1 = (leaf(N, S + 2, G, d).transpose(1, 2)[:, :, :S] if S else None for _ in range(2))
    mask0 = torch.rand(B, P) < 0.6 if mask0 else None
    mask1 = torch.rand(N, {"samples": 1, "queries": T}[mask1], S) < 0.6 if mask1 else None
    if mask0 is not None:
        mask0[:, random.randrange(P)] = True
    return [x if x is None else x.requires_grad_() for x in (q, k0, v0, k1, v1)], mask0, mask1


def compare(leaves, mask0, mask1, splits, tolerance):
    doubles = [x if x is None else x.detach().double().requires_grad_() for x in leaves]
    y, l = attention._forward(*leaves, mask0, mask1, splits)
    expected = attention.specification(*doubles, mask0, mask1)
    close(y, expected, tolerance)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, [x for x in leaves if x is not None], dy)
    for name, a, b in zip(("q", "k0", "v0", "k1", "v1"), got, torch.autograd.grad(expected, [x for x in doubles if x is not None], dy.double())):  # fmt: skip
        assert a.dtype == y.dtype
        if b.norm():
            close(a, b, 2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", range(5))
def test_prefix_attention(case, dtype):
    """Every path that the model takes, at a random size: decoding, the expert, several samples in a block of rows,
    several blocks a sample; with and without masks and tail."""
    B, n, G = random.randint(1, 2), random.randint(1, 5), random.randint(1, 2)
    d = random.choice([16, 40, 64])
    T, S, mask1 = [
        (1, random.randint(1, 40), "samples"),  # decoding
        (64, 64 + random.randint(0, 9), "samples"),  # the expert behind a reasoning
        (random.randint(2, 9), random.randint(1, 9), "queries"),
        (random.randint(30, 70), 0, None),  # no tail
        (1, 1, None),
    ][case]  # fmt: skip
    P, ratio, splits = random.randint(1, 150), random.randint(1, 4) if T < 10 else 2, random.randint(1, 5)
    size = dict(B=B, n=n, H=G * ratio, G=G, T=T, P=P, S=S, d=d)
    leaves, mask0, mask1 = inputs(**size, mask0=random.random() < 0.7, mask1=mask1, dtype=dtype)
    print(size, mask0 is None, splits)
    with poisoned(), programs(random.choice(["forward", "backward", "shuffled"])):
        compare(leaves, mask0, mask1, splits, TOLERANCE[dtype])


def test_specification_is_attention_with_the_prefix_copied():
    (q, k0, v0, k1, v1), mask0, mask1 = inputs(2, 3, 4, 2, 5, 11, 7, 8, True, "queries", torch.float64)
    copied = lambda x: x.repeat_interleave(3, 0)
    seen = torch.cat([copied(mask0)[:, None].expand(-1, 5, -1), mask1], -1)[:, None]
    k, v = torch.cat([copied(k0), k1], 2), torch.cat([copied(v0), v1], 2)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(attention.specification(q, k0, v0, k1, v1, mask0, mask1), expected)


def test_a_part_may_see_nothing_and_a_row_may_not():
    """Masked keys fill whole parts of the prefix, and one row sees none at all: that row is nan, as in PyTorch."""
    (q, k0, v0, k1, v1), _, _ = inputs(1, 2, 4, 2, 3, 130, 5, 16, False, None, torch.float32)
    mask0 = torch.zeros(1, 130, dtype=torch.bool)
    mask1 = torch.rand(2, 3, 5) < 0.5
    mask1[:, :, 0], mask1[1, 2] = True, False
    y, expected = attention._forward(q, k0, v0, k1, v1, mask0, mask1, 4)[0], attention.specification(q, k0, v0, k1, v1, mask0, mask1)
    assert expected[1, :, 2].isnan().all() and expected.isnan().sum() == 4 * 16
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_a_prefix_without_gradient_costs_none(monkeypatch):
    """Knowledge insulation: the expert's attention sends nothing into the prompt, so nothing is computed for it."""
    (q, k0, v0, k1, v1), _, _ = inputs(1, 2, 4, 2, 3, 40, 5, 16, False, None, torch.float32)
    launched = []
    kernel = attention._grad_kv

    class Noted:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(attention, "_grad_kv", Noted())
    y = attention.prefix_attention(q, k0.detach(), v0.detach(), k1, v1)
    torch.autograd.grad(y.sum(), (q, k1, v1))
    assert launched == [(1, 4)]  # the tail's: one block of keys, two samples of two heads


def test_prefix_attention_is_an_operator():
    """Shapes, strides and gradients under torch.compile's tracing are those that run."""
    leaves, mask0, mask1 = inputs(1, 2, 4, 2, 3, 33, 5, 16, True, "samples", torch.float32)
    torch.library.opcheck(torch.ops.kernels.prefix_attention.default, (*leaves, mask0, mask1, 2))


# -------------------------------------------------------------------------------------------------- what it compiles to


def release(n, T, S, **size):
    """One layer of the release: 3000 tokens of prompt, 8 key-value heads of 128; 16 query heads in the expert, else 32."""
    H = 16 if T == 64 else 32
    leaves, _, mask1 = inputs(1, n, H, 8, T, 3000, S, 128, False, "samples", torch.bfloat16)
    q, _, _, k1, v1 = leaves
    k0, v0 = (torch.zeros(1, 8, 3000, 128, dtype=torch.bfloat16) for _ in range(2))
    return q, k0, v0, k1, v1, None, mask1


def gate(build, instruction, blocks):
    said = f"{build.kernel} sm_{build.chip} grid {build.grid}: {build.registers} registers, {build.spilled} B spilled, "
    said += f"{build.shared} B shared, {build.blocks} blocks of {build.warps} warps, {build.matrix()}, {build.async16} + {build.async_narrow}"  # fmt: skip
    print(said)
    assert build.spilled == 0 and build.fits and build.blocks >= blocks and build.matrix() == instruction, said


MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@pytest.mark.parametrize("chip", [80, 90, 100, 120])
def test_prefix_attention_compiles(chip):
    with compiling(chip) as builds, torch.no_grad():
        for n, T, S in ((1, 64, 104), (6, 1, 40), (64, 64, 104)):
            attention._forward(*release(n, T, S), 0)
        args = release(1, 64, 104)
        y, l = torch.empty_like(args[0]), torch.empty(args[0].shape[:3])
        attention._backward(y, *args, y, l, True, False)
    expert, decoding, many, grad_q, grad_k0 = builds
    assert (expert.grid, decoding.grid) == ((2, 8, 8), (1, 16, 8))  # 128 programs for 132 multiprocessors
    gate(expert, MATRIX[chip], 1 if chip == 120 else 2)
    gate(decoding, "HMMA", 2)  # 24 rows: too few for the larger instructions, which multiply 64 or 128 at once
    gate(many, MATRIX[chip], 1)
    gate(grad_q, MATRIX[chip], 1)
    gate(grad_k0, MATRIX[chip], 1)
    assert all(b.async16 >= 8 for b in builds)
