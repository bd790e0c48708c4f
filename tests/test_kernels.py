"""
The kernels against float64, without a GPU: in Triton's interpreter (cpu_triton.py), and compiled
for four chips (kernels/compiled.py).

    python -m pytest tests/test_kernels.py

Sizes are fresh at random each time and no multiple of a block; outputs begin as NaN; programs run
in any order; an address outside a tensor raises. The references are written out here, in float64.
The PyTorch beside the kernels (`plain_...`) is tested by them too. Where there is a GPU the same
tests run on it, except those that compile for other chips.
"""
import math
import random
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")
from cpu_triton import compiling, poisoned, programs  # noqa: E402

import kernels  # noqa: E402
from alpamayo import PRESETS  # noqa: E402
from kernels import bench, salience, tiles  # noqa: E402
from kernels import pruned_attention as pruned  # noqa: E402

# Relative to the reference's norm. 16-bit: inputs are exact, weights and outputs are rounded.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
cross_compiled = pytest.mark.skipif(DEVICE == "cuda", reason="compiled for the GPU here alone")


@pytest.fixture(autouse=True)
def by_hand():
    with kernels.using("triton"), torch.device(DEVICE):
        yield


def close(a, b, tolerance, least=1e-300):
    """a within tolerance of b, relative to the norm of b or to `least`, whichever is more."""
    assert a.shape == b.shape
    error = (a.double() - b).norm() / b.norm().clamp(min=least)
    assert error <= tolerance, f"relative error {error:.2e}, expected at most {tolerance}"


def normal(*shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


# --------------------------------------------------------------------------------------------------
# Tiles


def test_parts():
    """Wide enough, powers of two of at least 16 that the matrix units take, and never wider than
    padding would be."""
    widths = {d: (tiles.part(d, 0), tiles.part(d, 1)) for d in range(1, 257)}
    assert widths[72] == (64, 16) and widths[24] == (32, 0) and widths[64] == (64, 0)
    assert widths[128] == (128, 0) and widths[8] == (16, 0) and widths[40] == (32, 16)
    for d, (D0, D1) in widths.items():
        assert d <= D0 + D1 <= max(16, 2 ** math.ceil(math.log2(d)))
        assert D0 in (16, 32, 64, 128, 256) and D1 in (0, 16, 32, 64, 128)


def test_strides_are_counted_in_vectors():
    """Views of a joint matrix are read where they are; what cannot be counted so is copied."""
    q, k, v = normal(5, 3, 2, 24, dtype=torch.float32).unbind(1)
    same, *strides = tiles.in_vectors(k)
    assert same.data_ptr() == k.data_ptr() and strides == [6, 1]
    transposed = normal(24, 5, 2, dtype=torch.float32).permute(1, 2, 0)
    for other in (transposed, normal(5, 2, 30, dtype=torch.float32)[..., :24]):
        copy, *strides = tiles.in_vectors(other)
        assert torch.equal(copy, other) and strides == [2, 1] and copy.is_contiguous()


# --------------------------------------------------------------------------------------------------
# Salience


def reference_means(q, k, causal):
    """One query at a time."""
    (B, H, T, d), (_, G, S, _) = q.shape, k.shape
    total = torch.zeros(B, S, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = S - T + t + 1 if causal else S
                score = k[b, h // (H // G), :seen].double() @ q[b, h, t].double() / d**0.5
                total[b, :seen] += score.softmax(0)
    return total / (H * T)


@every_dtype
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_column_means(dtype, causal):
    for d in (72, random.choice([8, 24, 40, 64])):
        B, G, share = random.choice([(1, 2, 1), (2, 1, 2), (1, 1, 3)])
        S = random.randint(65, 150)
        T = random.randint(1, S) if causal else random.randint(65, 100)
        q = normal(B, T, G * share, d, dtype=dtype).transpose(1, 2)  # as projections give it
        k = normal(B, G, S, d, dtype=dtype)  # as a cache has it
        with poisoned(), programs(random.choice(["forward", "backward", "shuffled"])):
            means = salience.column_means(q, k, causal)
        expected = reference_means(q, k, causal)
        assert means.dtype == torch.float32
        close(means, expected, 2e-6)  # in all dtypes: no weight is rounded
        close(means.sum(1), torch.ones(B, dtype=torch.float64), 2e-6)
        close(salience.plain_column_means(q.double(), k.double(), causal), expected, 1e-12)


def test_column_means_at_the_edges():
    for T, S in ((1, 1), (1, 64), (1, 65), (64, 1), (2, 3)):
        q = normal(1, 2, T, 72, dtype=torch.float32)
        k = normal(1, 2, S, 72, dtype=torch.float32)
        for causal in (False, True)[: 1 + (T <= S)]:
            with poisoned():
                close(salience.column_means(q, k, causal), reference_means(q, k, causal), 2e-6)
    big = 10 * torch.randn(2, 1, 1, 70, 24)  # scores of +-100 and more: their exp is beyond float32
    close(salience.column_means(*big), reference_means(*big, False), 1e-4)
    assert salience.column_means(torch.empty(2, 4, 3, 8), torch.empty(2, 4, 0, 8)).shape == (2, 0)
    with pytest.raises(ValueError, match=r"q \(2, 4, 3, 8\), k \(2, 3, 5, 8\): expected"):
        salience.column_means(torch.empty(2, 4, 3, 8), torch.empty(2, 3, 5, 8))
    with pytest.raises(ValueError, match=r"q \(4, 3, 8\), k \(2, 4, 5, 8\): expected"):
        salience.column_means(torch.empty(4, 3, 8), torch.empty(2, 4, 5, 8))
    with pytest.raises(ValueError, match="3 queries are not the last of 2 tokens"):
        salience.column_means(torch.empty(2, 4, 3, 8), torch.empty(2, 4, 2, 8), causal=True)


# --------------------------------------------------------------------------------------------------
# Attention among kept patches


def reference_attention(q, k, v, counts, rows):
    """Everything at once, with a mask of who shares an image."""
    q, k, v = q[rows], k[rows], v[rows]
    image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    score = torch.einsum("rhd,shd->hrs", q, k) / q.shape[-1] ** 0.5
    w = score.masked_fill(image[:, None] != image, -torch.inf).softmax(-1)
    return torch.einsum("hrs,shd->rhd", w, v)


def kept(counts, dropped):
    """offsets, and which of the rows stay: in some order, or all in theirs."""
    R = sum(counts)
    rows = torch.randperm(R + dropped)[:R] if dropped else None
    return torch.tensor([0, *counts]).cumsum(0), rows


def check_attention(counts, dropped, H, d, dtype):
    """Outputs and gradients of q, k and v that are views of one matrix, as the tower's are."""
    (offsets, rows), T = kept(counts, dropped), sum(counts) + dropped
    qkv = normal(T, 3, H, d, dtype=dtype).requires_grad_()
    grad = normal(sum(counts), d, H, dtype=dtype).transpose(1, 2)
    with poisoned(), programs(random.choice(["forward", "backward", "shuffled"])):
        longest = max(counts) + random.choice([0, 70])
        y = pruned.pruned_attention(*qkv.unbind(1), offsets, longest, rows)
        (dqkv,) = torch.autograd.grad(y, qkv, grad)
    exact = qkv.detach().double().requires_grad_()
    which = torch.arange(T) if rows is None else rows
    expected = reference_attention(*exact.unbind(1), counts, which)
    (dexpected,) = torch.autograd.grad(expected, exact, grad.double())
    assert y.dtype == dqkv.dtype == dtype
    close(y, expected, TOLERANCE[dtype])
    for i in range(3):
        # of all three's norm: dQ of one patch is 0, a difference of equal numbers
        close(dqkv[:, i], dexpected[:, i], TOLERANCE[dtype] * 1.5, least=dexpected.norm())
    gone = torch.ones(T, dtype=torch.bool).index_fill(0, which, False)
    assert (dqkv[gone] == 0).all()
    plain = pruned.plain_pruned_attention(*exact.unbind(1), offsets, max(counts), rows)
    close(plain, expected.detach(), 1e-12)


@every_dtype
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the padding's keys, which are not stored
def test_scores_far_below_zero(dtype):
    """All of them: then the padding of a tile, whose scores are 0, would have infinite weights."""
    noise = torch.randn(2, 40, 1, 24, dtype=torch.float64)
    q = (noise[0] + 7).to(dtype).requires_grad_()  # scores around -240
    k = (noise[1] - 7).to(dtype).requires_grad_()
    v = normal(40, 1, 24, dtype=dtype).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    y = pruned.pruned_attention(q, k, v, torch.tensor([0, 40]), 40)
    expected = reference_attention(*exact, [40], torch.arange(40))
    close(y, expected, 100 * TOLERANCE[dtype])
    grads = torch.autograd.grad(y.square().sum(), (q, k, v))
    for g, e in zip(grads, torch.autograd.grad(expected.square().sum(), exact)):
        assert g.isfinite().all()
        if dtype == torch.float32:  # differences of large numbers: in 16 bits little is left
            close(g, e, 1e-2)


@every_dtype
@pytest.mark.parametrize("dropped", [0, 37], ids=["packed", "gathered"])
def test_pruned_attention(dtype, dropped):
    counts = [random.randint(65, 140), 1, 0, random.randint(2, 64)]
    random.shuffle(counts)
    check_attention(counts, dropped, 2, 72, dtype)


@pytest.mark.parametrize("d", [8, 24, 40, 64, 80, 128])
def test_any_head_dimension(d):
    counts = [random.randint(33, 70), random.randint(1, 32)]
    check_attention(counts, random.choice([0, 5]), 1, d, torch.float32)


def test_pruned_attention_at_the_edges():
    """One patch sees itself alone; no image, no patch, no patch kept."""
    check_attention([1], 0, 1, 72, torch.float32)
    check_attention([64], 0, 1, 72, torch.float32)
    q, k, v = normal(3, 70, 2, 24, dtype=torch.float32).requires_grad_()
    for counts in ([], [0], [0, 0, 0]):
        none = torch.empty(0, dtype=torch.long)
        y = pruned.pruned_attention(q, k, v, *kept(counts, 0)[:1], 70, none)
        assert y.shape == (0, 2, 24)
        assert all((g == 0).all() for g in torch.autograd.grad(y.sum(), (q, k, v)))
    big = 10 * q.detach(), 10 * k.detach(), v.detach()  # as above
    y = pruned.pruned_attention(*big, torch.tensor([0, 70]), 70)
    close(y, reference_attention(*(a.double() for a in big), [70], torch.arange(70)), 1e-4)
    said = r"k \(70, 2, 12\) torch.float32.* expected \(T, H, d\) of one shape and dtype"
    with pytest.raises(ValueError, match=said):
        pruned.pruned_attention(q, k[..., :12], v, torch.tensor([0, 70]), 70)
    with kernels.using("torch"), pytest.raises(ValueError, match="69 patches, more than .* = 68"):
        pruned.pruned_attention(q, k, v, torch.tensor([0, 1, 70]), 68)


def test_autocast():
    """Queries that a rotation made float32 beside values in bf16, as in the tower."""
    q, k, v = normal(3, 40, 2, 24, dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = pruned.pruned_attention(q, k, v.bfloat16(), torch.tensor([0, 40]), 40)
    assert y.dtype == torch.bfloat16
    close(y, reference_attention(q.double(), k.double(), v.double(), [40], torch.arange(40)), 1e-2)


# --------------------------------------------------------------------------------------------------
# What torch.compile and autograd see


def test_operators():
    """PyTorch's own check of custom operators: shapes told without running are true, and gradients
    are there."""
    q, k, v = normal(3, 20, 2, 24, dtype=torch.float32).requires_grad_()
    offsets, rows = torch.tensor([0, 9, 9, 14]), torch.randperm(20)[:14]
    torch.library.opcheck(pruned.pruned_attention_op, (q, k, v, offsets, 9, rows))
    whole = torch.tensor([0, 9, 20])
    torch.library.opcheck(pruned.pruned_attention_op, (q, k, v, whole, 15, None))
    heads = torch.randn(2, 4, 5, 24), torch.randn(2, 2, 9, 24)
    torch.library.opcheck(salience.column_means_op, (*heads, True))


def test_compiled_model():
    """One graph, with the same results and gradients."""

    def f(qkv, offsets, rows):
        q, k, v = qkv.unbind(1)
        means = salience.column_means(q.transpose(0, 1)[None], k.transpose(0, 1)[None])[0]
        y = pruned.pruned_attention(q, k, v, offsets, 30, rows)
        return y.square() + means.argsort()[:30, None, None] * 1e-3

    qkv = torch.randn(50, 3, 2, 24, requires_grad=True)
    args = torch.tensor([0, 10, 30]), torch.randperm(50)[:30]
    plain = f(qkv, *args)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(qkv, *args)
    torch.testing.assert_close(compiled, plain)
    a, b = (torch.autograd.grad(y.sum(), qkv)[0] for y in (compiled, plain))
    torch.testing.assert_close(a, b)


# --------------------------------------------------------------------------------------------------
# The bench


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of masked-off lanes, interpreted
def test_bench():
    """What it would do with a GPU, without the clock: every case of a small shape computes what it
    says it computes."""
    cfg = replace(
        PRESETS["nano"], n_layer=1, n_head=4, n_kv_head=2, head_dim=24, mrope_section=(4, 4, 4),
        v_embd=48, v_head=2, e_embd=40, e_head=2, e_mlp=72, a_embd=24,
    )  # fmt: skip
    small = bench.Shape("small", cfg, 3, 20, 50, 5, samples=(1, 3), tokens=16, steps=2)
    for cases in bench.CASES.values():
        for case in cases(small):
            dtype, limit = torch.bfloat16, 2e-2
            if case.kernel == "sample_flow":  # two steps amplify bf16's rounding too much
                dtype, limit = torch.float32, 1e-3
            result = dict(bench.time_case(case, DEVICE, lambda f: 1e-3, dtype))
            errors = {name: r["error"] for name, r in result.items() if name != bench.UNPRUNED}
            assert len(errors) >= 2 and max(errors.values()) < limit, (case, errors)
            assert case.floor(1e12, 1e30) == (case.traffic / 1e12, "memory")


# --------------------------------------------------------------------------------------------------
# What they compile to


def builds_of(chip, dtype, d, H=16, images=16, patches=720, keep=4):
    """Launches at the release's shape; nothing is computed."""
    q, k, v = torch.empty(images * patches, 3, H, d, dtype=dtype).unbind(1)
    offsets = torch.arange(images + 1) * (patches // keep)
    rows = torch.arange(images * patches // keep)
    with compiling(chip) as builds:
        heads = [a.view(images, patches, H, d).transpose(1, 2) for a in (q, k)]
        salience.column_means_op(*heads, False)
        out, lse = pruned.pruned_attention_op(q, k, v, offsets, patches, rows)
        pruned.pruned_attention_backward_op(q, k, v, offsets, patches, rows, out, lse, out)
    names = ["row_sums", "column_sums", "attend_patches", "backward_queries", "backward_keys"]
    assert [b.kernel for b in builds] == names
    return builds


@cross_compiled
@pytest.mark.parametrize("chip", MATRIX)
def test_compiles_for(chip):
    for b in builds_of(chip, torch.bfloat16, 72):
        said = f"sm_{chip} {b.kernel}: {b.registers} registers, {b.spilled} bytes spilled, "
        said += f"{b.shared} bytes shared"
        assert b.matrix() == MATRIX[chip] and b.spilled == 0 and b.fits, said
        assert b.blocks >= (3 if b.kernel in ("row_sums", "column_sums") else 2), said  # as told
        assert b.async16 >= 4, said


@cross_compiled
def test_float32_stays_float32():
    """On the chip too: no matrix unit, which would cut the inputs to 19 bits. Nothing spilled."""
    for b in builds_of(90, torch.float32, 72):
        assert b.matrix() is None and b.spilled == 0 and b.fits and b.blocks >= 2, b.kernel


@cross_compiled
@pytest.mark.parametrize("d, H", [(24, 4), (64, 6)], ids=["nano", "mini"])
def test_small_presets_compile(d, H):
    for b in builds_of(90, torch.float16, d, H, images=8, patches=32, keep=2):
        assert b.matrix() == "HGMMA" and b.spilled == 0 and b.fits and b.blocks >= 2, b.kernel
