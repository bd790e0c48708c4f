"""
Attention over a shared prefix, the flow's step and the roll-out in Triton: against their specifications in float64, on
fresh random sizes, and what they compile to for four chips.

    python -m pytest tests/test_kernels_flow.py

Where there is a GPU the same tests run on it, the sampler as a CUDA graph, but for what is compiled for others.
"""
import copy
import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from cpu_triton import compiling, poisoned, programs  # noqa: E402

import alpamayo  # noqa: E402
import kernels  # noqa: E402
from kernels import flow_step as flow  # noqa: E402
from kernels import prefix_attention as attention  # noqa: E402
from kernels import bench, sampler  # noqa: E402

# Triton's interpreter computes in masked-off lanes too
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the norm; the types' own roundings
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
cross_compiled = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is here: kernels are compiled for it alone")


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    monkeypatch.setattr(kernels, "_choice", "triton")
    monkeypatch.setattr(kernels, "processors", 132)
    with torch.device(DEVICE):
        yield


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
    wanted = torch.autograd.grad(expected, [x for x in doubles if x is not None], dy.double())
    for a, b in zip(got, wanted):
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
    y = attention._forward(q, k0, v0, k1, v1, mask0, mask1, 4)[0]
    expected = attention.specification(q, k0, v0, k1, v1, mask0, mask1)
    assert expected[1, :, 2].isnan().all() and expected.isnan().sum() == 4 * 16
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_vectors_that_lie_anyhow():
    """Strides are counted in vectors of d numbers; what is not laid out so is copied, the gradient that comes in as well."""
    plain, mask0, mask1 = inputs(1, 2, 4, 2, 3, 21, 5, 16, True, "queries", torch.float32)
    odd = [torch.cat([x.detach(), torch.full_like(x[..., :3], torch.nan)], -1)[..., :-3].requires_grad_() for x in plain]
    odd[0] = plain[0].detach().mT.contiguous().mT.requires_grad_()
    dy = torch.randn(2, 4, 3, 19)[..., :-3]
    y, expected = (attention._forward(*leaves, mask0, mask1, 0)[0] for leaves in (odd, plain))
    assert torch.equal(y, expected)
    for a, b in zip(torch.autograd.grad(y, odd, dy), torch.autograd.grad(expected, plain, dy.contiguous())):
        assert torch.equal(a, b)


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
    torch.library.opcheck(torch.ops.alpamayo.prefix_attention.default, (*leaves, mask0, mask1, 2))


# --------------------------------------------------------------------------------------------- the flow's step, the unicycle


def embedding(C, A, features, depth, dtype):
    """Weights of the final norm and projection, and of an action embedding, of sizes that fill no tile."""
    matrix = lambda n, k: (torch.randn(n, k) / k**0.5).to(dtype)
    vector = lambda n, mean: (mean + 0.2 * torch.randn(n)).to(dtype)
    embed, width = [torch.logspace(0, 2, features // 2)[None].to(dtype) for _ in range(3)], 3 * features
    for _ in range(depth):
        embed += [matrix(A, width), vector(A, 0), vector(A, 1)]
        width = A
    return [vector(C, 1), matrix(2, C), vector(2, 0)], [*embed, matrix(C, A), vector(C, 0), vector(C, 1), vector(C, 0)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-5), (torch.float16, 4e-3), (torch.bfloat16, 2e-2)])
def test_flow_step(dtype, tolerance):
    """Before the first evaluation of the expert, between two, after the last. The tolerance of float32 is that of an
    angle of 2 pi 100 x."""
    N, T, C, A = random.randint(1, 3), random.randint(1, 40), random.randint(20, 150), random.randint(17, 90)
    out, embed = embedding(C, A, random.choice([4, 10, 20]), random.randint(1, 3), dtype)
    x, hidden, t, step = torch.randn(N, T, 2), (3 * torch.randn(N, T, C)).to(dtype), torch.rand(N), 1 / random.randint(1, 9)
    double = lambda y: y if y is None else [z.double() for z in y] if isinstance(y, list) else y.double()
    for h, time in ((None, t), (hidden, t), (hidden, None)):
        with poisoned(), programs(random.choice(["forward", "backward"])), torch.no_grad():
            after, tokens = flow.flow_step(x, h, out, step, time, embed)
        expected, words = flow.specification(double(x), double(h), double(out), step, double(time), double(embed))
        close(after, expected, 1e-6)  # the velocity is summed in float32 whatever the weights are
        assert (tokens is None) == (time is None)
        if time is not None:
            assert tokens.dtype == dtype
            close(tokens, words, tolerance)


def test_specification_of_the_step_is_the_model():
    cfg = alpamayo.PRESETS["nano"]
    model = alpamayo.Alpamayo(cfg)
    embed, x, t = model.action_in_proj, torch.randn(3, 64, 2), torch.rand(3)
    weights = sampler.weights_of(model.expert, embed, model.action_out_proj)
    torch.testing.assert_close(flow.specification(x, None, weights[0], 0.1, t, weights[1])[1], embed(x, t))
    hidden = torch.randn(3, 64, cfg.e_embd)
    expected = x + 0.1 * model.action_out_proj(model.expert.norm(hidden))
    torch.testing.assert_close(flow.specification(x, hidden, weights[0], 0.1, None, weights[1])[0], expected)


def test_roll_out_and_its_gradient():
    """Of position and heading, into acceleration, curvature and the first speed; 64 steps and other numbers of them."""
    for shape in ((random.randint(1, 5), 64), (2, random.randint(1, 3), random.randint(1, 90)), (1,)):
        actions, v0 = torch.randn(*shape, 2) * torch.tensor([1, 0.05]), 12 * torch.rand(shape[:-1])
        leaves = actions.requires_grad_(), v0.requires_grad_()
        doubles = [x.detach().double().requires_grad_() for x in leaves]
        with poisoned(), programs("shuffled"):
            got = alpamayo.roll_out(*leaves)
            assert "roll_out" in got[0].grad_fn.name()
            weights = [torch.randn_like(x) for x in got]
            grads = torch.autograd.grad(got, leaves, weights)
        expected = alpamayo.roll_out(*doubles)  # 64-bit tensors are PyTorch's
        for a, b in zip(got, expected):
            close(a, b, 1e-6)
        for a, b in zip(grads, torch.autograd.grad(expected, doubles, [w.double() for w in weights])):
            close(a, b, 3e-6)


def test_gradient_of_positions_alone():
    """As a loss in metres has it: the headings receive none."""
    actions, v0 = (torch.randn(3, 20, 2) * torch.tensor([1, 0.05])).requires_grad_(), torch.rand(3)
    double = actions.detach().double().requires_grad_()
    (got,) = torch.autograd.grad(alpamayo.roll_out(actions, v0)[0].square().sum(), actions)
    close(got, torch.autograd.grad(alpamayo.roll_out(double, v0.double())[0].square().sum(), double)[0], 3e-6)


def test_operators_of_the_flow():
    actions, v0 = torch.randn(2, 5, 2, requires_grad=True), torch.rand(2, requires_grad=True)
    torch.library.opcheck(torch.ops.alpamayo.roll_out.default, (actions, v0))
    out, embed = embedding(40, 20, 4, 2, torch.float32)
    args = torch.randn(1, 3, 2), torch.randn(1, 3, 40), out, 0.1, torch.rand(1), embed
    torch.library.opcheck(torch.ops.alpamayo.flow_step.default, args)


# ------------------------------------------------------------------------------------------------------- the whole sampler


def sampling(dtype, B=2, n=2, T=16):
    """A small expert, B scenes of n samples, and what the language model left them."""
    cfg = replace(alpamayo.PRESETS["nano"], n_layer=2, e_embd=40, e_head=2, e_mlp=72, a_embd=24, n_kv_head=1, head_dim=24,
                  mrope_section=(4, 4, 4))  # fmt: skip
    parts = alpamayo.Expert(cfg), alpamayo.ActionEmbed(cfg), torch.nn.Linear(cfg.e_embd, 2)
    for part in parts:
        for name, p in part.named_parameters():
            if p.ndim == 1:
                torch.nn.init.normal_(p, float("weight" in name), 0.2)
        part.to(dtype)
    kv = lambda n, k: [tuple(torch.randn(n, 1, k, 24, dtype=torch.float64).to(dtype) for _ in "kv") for _ in range(2)]
    P, N, length = random.randint(1, 70), B * n, torch.randint(1, 6, (B * n,))
    positions = (P + length[:, None] + torch.arange(T)).expand(3, -1, -1)
    cos, sin = alpamayo.rope(positions, cfg, dtype)
    return parts, torch.randn(N, T, 2), cos, sin, kv(B, P), kv(N, 5), torch.arange(5) < length[:, None]


def plainly(steps, parts, noise, cos, sin, prefix, tail, seen):
    mask = torch.cat([seen, torch.ones(noise.shape[:2], dtype=torch.bool)], 1)[:, None]
    past = [alpamayo.Past(a, b, None, mask) for a, b in zip(prefix, tail)]
    return bench.in_pytorch(bench.plain_loop)(parts, steps, noise, cos, sin, past)


def cut(monkeypatch, splits):
    """Sums along K in this many parts. These are of blocks of 16, as K is small: 40, 48 and 72 in the three kinds of them."""
    tiles = sampler.tiles_of
    monkeypatch.setattr(sampler, "tiles_of", lambda *size: {**tiles(*size), "BK": 16})
    monkeypatch.setattr(sampler, "splits_of", lambda *size: splits)


@pytest.mark.parametrize("B, n, splits", [(2, 2, 2), (1, 1, 1)])  # two samples a tile, and one
@torch.no_grad()
def test_sampler(B, n, splits, monkeypatch):
    """The kernels over static buffers do what the plain loop does, and do it again for another scene in the same ones."""
    cut(monkeypatch, splits)
    for scene in range(2):
        if scene == 0:
            parts, *inputs = sampling(torch.float32, B, n)
        else:
            P = inputs[3][0][0].shape[2]
            fresh = lambda kvs: [tuple(torch.randn_like(x) for x in kv) for kv in kvs]
            noise, cos, sin, prefix, tail, seen = inputs
            tail = [tuple(x[:, :, :3] for x in kv) for kv in fresh(tail)]
            inputs = torch.randn_like(noise), cos, sin, fresh(prefix), tail, seen[:, :3]
            assert inputs[3][0][0].shape[2] == P
        with poisoned(), programs("shuffled"):
            got = sampler.sample_flow(*parts, 2, *inputs)
        expected = plainly(2, parts, *inputs)
        assert torch.equal(got[0], inputs[0])
        close(got[1] - got[0], (expected[1] - expected[0]).double(), 5e-5)
        close(got[2] - got[1], (expected[2] - expected[1]).double(), 5e-3)  # a feature of x turns by 2 pi 100 x
    assert len(sampler.kept[parts[0]][1]) == 1


@torch.no_grad()
def test_buffers_outlive_what_changes_between_two_calls(monkeypatch):
    """Tails of another width share the prefix; a tail of nan is gone with its scene; weights that are put elsewhere are
    found there; and buffers that were made in inference mode serve out of it."""
    cut(monkeypatch, 1)
    parts, noise, cos, sin, prefix, tail, seen = sampling(torch.float32, 1, 1)
    longer = [tuple(torch.cat([x] * 13, 2) for x in kv) for kv in tail], torch.cat([seen] * 13, 1)  # 65 tokens
    ours = lambda tail, seen: sampler.sample_flow(*parts, 1, noise, cos, sin, prefix, tail, seen)[1] - noise
    expected = lambda tail, seen: (plainly(1, parts, noise, cos, sin, prefix, tail, seen)[1] - noise).double()
    with torch.inference_mode():
        ours([tuple(x * torch.nan for x in kv) for kv in tail], seen)
    short = [tuple(x[:, :, :2] for x in kv) for kv in tail], torch.ones_like(seen[:, :2])
    for inputs in (short, longer):
        close(ours(*inputs), expected(*inputs), 5e-5)
    small, large = sampler.kept[parts[0]][1].values()
    assert small.prefix is large.prefix and small.mask.shape[2] == 64 + 16 and large.mask.shape[2] == 128 + 16
    parts[0].load_state_dict({k: v + 0.1 for k, v in parts[0].state_dict().items()}, assign=True)
    close(ours(*short), expected(*short), 5e-5)
    assert len(sampler.kept[parts[0]][1]) == 1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@torch.no_grad()
def test_sampler_in_16_bits(dtype, tolerance, monkeypatch):
    """A step, its sums cut into parts or not, against float64 on the same rounded weights."""
    cut(monkeypatch, random.choice([1, 2]))
    parts, *inputs = sampling(dtype, B=1, n=random.choice([1, 2]))
    with poisoned(), programs("shuffled"):
        noise, after = sampler.sample_flow(*parts, 1, *inputs)
    double = lambda x: [tuple(map(double, kv)) for kv in x] if isinstance(x, list) else x if x.dtype == torch.bool else x.double()
    expected = plainly(1, [copy.deepcopy(part).double() for part in parts], *map(double, inputs))
    close(after - noise, expected[1] - expected[0], tolerance)


class Junk:
    """A kernel that finds nan in its scratch."""

    def __init__(self, kernel, scratch):
        self.kernel, self.scratch = kernel, scratch

    def __getitem__(self, grid):
        self.scratch.fill_(torch.nan)
        return self.kernel[grid]


@pytest.mark.parametrize("N, splits", [(3, 3), (2, 5)])
@torch.no_grad()
def test_parts_of_a_sum(N, splits, monkeypatch):
    """Parts are unequal, and of 5 some are empty. Whichever program of a tile comes last, the same bits come out, with junk
    in the scratch before each launch; and the counters are back at 0 for the next."""
    cut(monkeypatch, splits)
    (expert, embed, project), noise, cos, sin, prefix, tail, seen = sampling(torch.float32, B=1, n=N)
    buffers = sampler.Buffers(expert, embed, project, 1, 1, N, 16, prefix[0][0].shape[2], 64)
    assert buffers.heads[2] == buffers.o_proj[2] == buffers.down_proj[2] == splits
    for kernel in ("_heads", "_add"):
        monkeypatch.setattr(sampler, kernel, Junk(getattr(sampler, kernel), buffers.part))
    buffers.fill(noise, cos, sin, prefix, tail, seen)
    results = []
    for order in ("forward", "backward", "shuffled"):
        with programs(order):
            results.append(buffers.replay())
        assert not buffers.done.any()
    expected = plainly(1, (expert, embed, project), noise, cos, sin, prefix, tail, seen)
    close(results[0][1] - noise, (expected[1] - noise).double(), 5e-5)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_as_many_parts_as_the_chip_has_room_for():
    device = torch.device("cpu")
    assert [sampler.splits_of(32 * n, 2048, 64, device) for n in (1, 2, 3, 8)] == [4, 2, 1, 1]
    assert sampler.splits_of(1, 600, 64, device) == 2  # of 300 each: 5 blocks


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
    said += f"{build.shared} B shared, {build.blocks} blocks of {build.warps} warps, {build.matrix()}, "
    said += f"{build.async16} + {build.async_narrow} asynchronous copies"
    print(said)
    assert build.spilled == 0 and build.fits and build.blocks >= blocks and build.matrix() == instruction, said


MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@cross_compiled
@pytest.mark.parametrize("chip", [80, 90, 100, 120])
def test_prefix_attention_compiles(chip):
    with compiling(chip) as builds, torch.no_grad():
        args = release(1, 64, 104)
        y, l = torch.empty_like(args[0]), torch.empty(args[0].shape[:3])
        attention._forward(*args, 0)
        attention._backward(y, *args, y, l, True, False)
        attention._forward(*release(6, 1, 40), 0)
        if chip in (90, 100):  # others take no more rows at once
            attention._forward(*release(64, 64, 104), 0)
    expert, grad_q, grad_k0, decoding, *many = builds
    assert (expert.grid, decoding.grid) == ((2, 8, 8), (1, 16, 8))  # 128 programs for 132 multiprocessors
    gate(expert, MATRIX[chip], 1 if chip == 120 else 2)
    gate(decoding, "HMMA", 2)  # 24 rows: too few for the larger instructions, which multiply 64 or 128 at once
    for build in (grad_q, grad_k0, *many):
        gate(build, MATRIX[chip], 1)
    assert all(b.async16 >= 8 for b in builds)


@cross_compiled
@pytest.mark.parametrize("chip", [80, 90, 100, 120])
def test_sampler_compiles(chip):
    """A step of one sample over a layer of the release, in at most 5 launches, between two steps of the flow; and the
    layer again for six samples."""
    cfg = replace(alpamayo.Config(), n_layer=1)
    with torch.device("meta"):
        parts = alpamayo.Expert(cfg), alpamayo.ActionEmbed(cfg), torch.nn.Linear(cfg.e_embd, 2)
    expert, embed, project = (part.to_empty(device="cpu").bfloat16() for part in parts)
    share = torch.zeros(1, cfg.a_embd)
    with compiling(chip) as builds, torch.no_grad():
        sampler.Buffers(expert, embed, project, 1, B=1, N=6, T=64, P=3000, S=64).run()
        buffers = sampler.Buffers(expert, embed, project, 1, B=1, N=1, T=64, P=3000, S=64)
        buffers.run()
        x, after = buffers.flow
        flow.step_into(after, buffers.h, x, buffers.h, buffers.out, 0.5, share, buffers.embed, buffers.scratch)
        flow._backward(*flow._forward(torch.zeros(16, 64, 2), torch.zeros(16)), torch.zeros(16, 64, 2), torch.zeros(16))
    six, (first, *layer, last, between, roll_out, roll_back) = builds[1:6], builds[7:]
    assert [b.kernel for b in layer] == [b.kernel for b in six] == ["_heads", "_attend", "_add", "_gate_up", "_add"]
    # one sample: 128 programs or 129 for 132 multiprocessors
    assert [b.grid for b in layer] == [(1, 32, 4), (2, 8, 8), (1, 32, 4), (1, 129), (1, 32, 4)]
    rows = 3 if chip in (90, 100) else 6  # blocks of them: two samples' or one's
    assert [six[i].grid for i in (0, 2, 3, 4)] == [(rows, 32, 1), (rows, 32, 1), (rows, 129), (rows, 32, 1)]
    for build in layer:
        gate(build, MATRIX[chip], 1 if chip == 120 else 2)
    for build in six:
        gate(build, MATRIX[chip], 1)
    assert all(build.async16 >= 8 for build in layer + six)
    gate(first, "HMMA", 3)  # 16 rows
    gate(between, "HMMA", 3)
    for build in (last, roll_out, roll_back):
        gate(build, None, 8)


@cross_compiled
@pytest.mark.parametrize("preset, dtype", [("nano", torch.float16), ("release", torch.float32)])
def test_other_sizes_compile(preset, dtype):
    """For sm_90, all that attention over a prefix and the sampler launch: for the nano's heads of 40 numbers, and for the
    release in float32, whose products no matrix unit may have, since it would cut their inputs to 19 bits."""
    shape = replace(bench.SHAPES[preset], samples=(1, 6))
    _, *cases = bench.prefix_attention_cases(shape)
    seen = set()
    for case in [*cases, next(bench.sampler_cases(shape))]:
        ours, _, _ = (case.small or case.make)("cpu", dtype)
        with compiling(90) as builds:
            ours()
        for build in builds:
            few_rows = build.kernel == "_step" or "decoding" in case.shape
            expected = None if dtype == torch.float32 else "HMMA" if few_rows else "HGMMA"
            gate(build, build.matrix() if build.kernel == "_step" and not build.matrix() else expected, 1)
            assert build.async16 >= 8 or build.kernel in ("_step", "_grad_kv")
            seen.add(build.kernel)
    assert seen == {"_attend", "_grad_q", "_grad_kv", "_step", "_heads", "_add", "_gate_up"}
