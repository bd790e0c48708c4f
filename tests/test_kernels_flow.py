"""
Attention over a shared prefix, the flow's step, the roll-out and the sampler in Triton: against
float64, on fresh random sizes, and what they compile to for four chips.

    python -m pytest tests/test_kernels_flow.py

Where there is a GPU the same tests run on it, the sampler as a CUDA graph, except those that
compile for other chips.
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
from kernels import bench, sampler  # noqa: E402
from kernels import flow_step as flow  # noqa: E402
from kernels import prefix_attention as attention  # noqa: E402

# Triton's interpreter computes in masked-off lanes too
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# Relative to the norm: the types' own roundings.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
cross_compiled = pytest.mark.skipif(DEVICE == "cuda", reason="compiled for the GPU here alone")


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    monkeypatch.setattr(kernels, "processors", 132)
    with kernels.using("triton"), torch.device(DEVICE):
        yield


def close(got, expected, tolerance):
    error = (got.double() - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.1e}"


# --------------------------------------------------------------------------------------------------
# Attention over a shared prefix


def inputs(B, n, H, G, T, P, S, d, mask0, mask1, dtype):
    """Leaves q, k0, v0, k1, v1, views as a cache and transposed projections are; masks that leave
    each row a key."""
    N = B * n

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    leaves = [normal(N, T, H, d).transpose(1, 2)]
    leaves += [normal(B, G, P + 3, d)[:, :, :P] for _ in range(2)]
    leaves += [normal(N, S + 2, G, d).transpose(1, 2)[:, :, :S] if S else None for _ in range(2)]
    mask0 = torch.rand(B, P) < 0.6 if mask0 else None
    if mask0 is not None:
        mask0[:, random.randrange(P)] = True
    mask1 = torch.rand(N, {"samples": 1, "queries": T}[mask1], S) < 0.6 if mask1 else None
    for x in leaves:
        if x is not None:
            x.requires_grad_()
    return leaves, mask0, mask1


def compare(leaves, mask0, mask1, splits, tolerance):
    doubles = [x if x is None else x.detach().double().requires_grad_() for x in leaves]
    y, _ = attention.prefix_attention_op(*leaves, mask0, mask1, splits)
    expected = attention.plain_prefix_attention(*doubles, mask0, mask1)
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
    """Every path that the model takes, at a random size: decoding, the expert, several samples in a
    block of rows, several blocks a sample; with and without masks and tail."""
    B, n, G = random.randint(1, 2), random.randint(1, 5), random.randint(1, 2)
    d = random.choice([16, 40, 64])
    T, S, mask1 = [
        (1, random.randint(1, 40), "samples"),  # decoding
        (64, 64 + random.randint(0, 9), "samples"),  # the expert behind a reasoning
        (random.randint(2, 9), random.randint(1, 9), "queries"),
        (random.randint(30, 70), 0, None),  # no tail
        (1, 1, None),
    ][case]  # fmt: skip
    P, splits = random.randint(1, 150), random.randint(1, 5)
    ratio = random.randint(1, 4) if T < 10 else 2
    size = dict(B=B, n=n, H=G * ratio, G=G, T=T, P=P, S=S, d=d)
    leaves, mask0, mask1 = inputs(**size, mask0=random.random() < 0.7, mask1=mask1, dtype=dtype)
    print(size, mask0 is None, splits)
    with poisoned(), programs(random.choice(["forward", "backward", "shuffled"])):
        compare(leaves, mask0, mask1, splits, TOLERANCE[dtype])


@pytest.mark.parametrize("mask0, mask1, S", [
    (True, "queries", 7), (False, "samples", 7), (True, None, 7), (False, None, 7), (True, None, 0), (False, None, 0),
])  # fmt: skip
def test_attention_over_copies_of_the_prefix_is_the_same(mask0, mask1, S, monkeypatch):
    """A CPU's way, by PyTorch's own attention, is taken where the model's queries are many."""
    T = 5 if mask1 is None else random.choice([5, 40])
    leaves, *masks = inputs(2, 3, 4, 2, T, 11, S, 8, mask0, mask1, torch.float64)
    there = [x for x in leaves if x is not None]
    expected = attention.plain_prefix_attention(*leaves, *masks)
    found = attention.over_copies(*leaves, *masks)
    torch.testing.assert_close(found, expected)
    dy = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(y, there, dy) for y in (found, expected))):
        torch.testing.assert_close(a, b)
    with kernels.using("torch"):
        monkeypatch.setattr(attention, "over_copies", lambda *_: "copies")
        taken = attention.prefix_attention(*leaves, *masks)
    assert isinstance(taken, str) == (2 * T >= 16 and DEVICE == "cpu")


def test_a_part_may_see_nothing_and_a_row_may_not():
    """Masked keys fill whole parts of the prefix, and one row sees none at all: that row is NaN, as
    in PyTorch."""
    leaves, _, _ = inputs(1, 2, 4, 2, 3, 130, 5, 16, False, None, torch.float32)
    mask0 = torch.zeros(1, 130, dtype=torch.bool)
    mask1 = torch.rand(2, 3, 5) < 0.5
    mask1[:, :, 0] = True
    mask1[1, 2] = False
    y = attention.prefix_attention_op(*leaves, mask0, mask1, 4)[0]
    expected = attention.plain_prefix_attention(*leaves, mask0, mask1)
    assert expected[1, :, 2].isnan().all() and expected.isnan().sum() == 4 * 16
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_vectors_that_lie_anyhow():
    """Strides are counted in vectors of d numbers. What is not laid out so is copied, the gradient
    that comes in as well."""
    plain, mask0, mask1 = inputs(1, 2, 4, 2, 3, 21, 5, 16, True, "queries", torch.float32)
    odd = []
    for x in plain:
        beside = torch.full_like(x[..., :3], torch.nan)
        odd.append(torch.cat([x.detach(), beside], -1)[..., :-3].requires_grad_())
    odd[0] = plain[0].detach().mT.contiguous().mT.requires_grad_()
    dy = torch.randn(2, 4, 3, 19)[..., :-3]
    y = attention.prefix_attention_op(*odd, mask0, mask1, 0)[0]
    expected = attention.prefix_attention_op(*plain, mask0, mask1, 0)[0]
    assert torch.equal(y, expected)
    wanted = torch.autograd.grad(expected, plain, dy.contiguous())
    for a, b in zip(torch.autograd.grad(y, odd, dy), wanted):
        assert torch.equal(a, b)


def test_a_prefix_without_gradient_costs_none(monkeypatch):
    """Stop-gradient: the expert's attention sends nothing into the prompt, and computes nothing for
    it."""
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
    op = torch.ops.alpamayo.prefix_attention.default
    torch.library.opcheck(op, (*leaves, mask0, mask1, 2))


# --------------------------------------------------------------------------------------------------
# The flow's step, the unicycle


def embedding(C, A, features, depth, dtype):
    """Weights of the final norm and projection, and of an action embedding, of sizes that fill no
    tile."""

    def matrix(n, k):
        return (torch.randn(n, k) / k**0.5).to(dtype)

    def vector(n, mean):
        return (mean + 0.2 * torch.randn(n)).to(dtype)

    embed = [torch.logspace(0, 2, features // 2)[None].to(dtype) for _ in range(3)]
    width = 3 * features
    for _ in range(depth):
        embed += [matrix(A, width), vector(A, 0), vector(A, 1)]
        width = A
    embed += [matrix(C, A), vector(C, 0), vector(C, 1), vector(C, 0)]
    return [vector(C, 1), matrix(2, C), vector(2, 0)], embed


def double(x):
    if x is None:
        return x
    if isinstance(x, (list, tuple)):
        return [double(y) for y in x]
    return x if x.dtype == torch.bool else x.double()


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 5e-5), (torch.float16, 4e-3), (torch.bfloat16, 2e-2)]
)
@torch.no_grad()
def test_flow_step(dtype, tolerance):
    """Before the first evaluation of the expert, between two, after the last; flow times that all
    rows share, or each sample's own. The tolerance of float32 is that of an angle of 2 pi 100 x."""
    N, T = random.randint(1, 3), random.randint(1, 40)
    C, A = random.randint(20, 150), random.randint(17, 90)
    out, embed = embedding(C, A, random.choice([4, 10, 20]), random.randint(1, 3), dtype)
    x, step = torch.randn(N, T, 2), 1 / random.randint(1, 9)
    hidden = (3 * torch.randn(N, T, C)).to(dtype)
    own, shared = torch.rand(N), torch.rand(1)
    for h, t in ((None, own), (hidden, own), (hidden, shared), (hidden, None)):
        with poisoned(), programs(random.choice(["forward", "backward"])):
            after = torch.empty_like(x)
            tokens, share = None, None
            if t is not None:
                tokens = torch.empty(N, T, C, dtype=dtype)
                share = flow.time_share(t, embed)
            scratch = flow.step_scratch(x, embed[-4])
            flow.step_into(after, tokens, x, h, out, step, share, embed, scratch)
        times = t if t is None else t.expand(N)
        inputs = map(double, (x, h, out))
        expected, words = flow.plain_flow_step(*inputs, step, double(times), double(embed))
        if h is None:
            assert after.isnan().all() and torch.equal(expected, x.double())  # x stays where it is
        else:
            close(after, expected, 1e-6)  # the velocity is summed in float32, whatever the weights
        if t is not None:
            close(tokens, words, tolerance)


def test_the_plain_step_is_the_model():
    cfg = alpamayo.PRESETS["nano"]
    model = alpamayo.Alpamayo(cfg)
    embed, x, t = model.action_in_proj, torch.randn(3, 64, 2), torch.rand(3)
    out, weights = sampler.weights_of(model.expert, embed, model.action_out_proj)
    tokens = flow.plain_flow_step(x, None, out, 0.1, t, weights)[1]
    torch.testing.assert_close(tokens, embed(x, t))
    hidden = torch.randn(3, 64, cfg.e_embd)
    expected = x + 0.1 * model.action_out_proj(model.expert.norm(hidden))
    after = flow.plain_flow_step(x, hidden, out, 0.1, None, weights)[0]
    torch.testing.assert_close(after, expected)


def test_roll_out_and_its_gradient():
    """Of position and heading, into acceleration, curvature and the first speed; 64 steps and other
    numbers of them."""
    several = 2, random.randint(1, 3), random.randint(1, 90)
    for shape in ((random.randint(1, 5), 64), several, (1,)):
        actions = torch.randn(*shape, 2) * torch.tensor([1, 0.05])
        v0 = 12 * torch.rand(shape[:-1])
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
        wanted = torch.autograd.grad(expected, doubles, [w.double() for w in weights])
        for a, b in zip(grads, wanted):
            close(a, b, 3e-6)


def test_gradient_of_positions_alone():
    """As a loss in metres has it: the headings receive none."""
    actions = (torch.randn(3, 20, 2) * torch.tensor([1, 0.05])).requires_grad_()
    exact = actions.detach().double().requires_grad_()
    v0 = torch.rand(3)
    (got,) = torch.autograd.grad(alpamayo.roll_out(actions, v0)[0].square().sum(), actions)
    loss = alpamayo.roll_out(exact, v0.double())[0].square().sum()
    close(got, torch.autograd.grad(loss, exact)[0], 3e-6)


def test_roll_out_is_an_operator():
    actions, v0 = torch.randn(2, 5, 2, requires_grad=True), torch.rand(2, requires_grad=True)
    torch.library.opcheck(torch.ops.alpamayo.roll_out.default, (actions, v0))


# --------------------------------------------------------------------------------------------------
# The whole sampler


def sampling(dtype, B=2, n=2, T=16):
    """A small expert, B scenes of n samples, and what the language model left them."""
    cfg = replace(
        alpamayo.PRESETS["nano"], n_layer=2, e_embd=40, e_head=2, e_mlp=72, a_embd=24, n_kv_head=1,
        head_dim=24, mrope_section=(4, 4, 4),
    )  # fmt: skip
    parts = alpamayo.Expert(cfg), alpamayo.ActionEmbed(cfg), torch.nn.Linear(cfg.e_embd, 2)
    for part in parts:
        for name, p in part.named_parameters():
            if p.ndim == 1:
                torch.nn.init.normal_(p, float("weight" in name), 0.2)
        part.to(dtype)

    def kv(n, length):
        both = torch.randn(2, 2, n, 1, length, 24, dtype=torch.float64).to(dtype)
        return [tuple(layer) for layer in both]

    P, N, length = random.randint(1, 70), B * n, torch.randint(1, 6, (B * n,))
    positions = (P + length[:, None] + torch.arange(T)).expand(3, -1, -1)
    cos, sin = alpamayo.rope(positions, cfg, dtype)
    seen = torch.arange(5) < length[:, None]
    return parts, torch.randn(N, T, 2), cos, sin, kv(B, P), kv(N, 5), seen


def plainly(steps, parts, noise, cos, sin, prefix, tail, seen):
    """How far each step is from the noise, by the plain loop."""
    mask = torch.cat([seen, torch.ones(noise.shape[:2], dtype=torch.bool)], 1)[:, None]
    past = [alpamayo.Past(kv, own, None, mask) for kv, own in zip(prefix, tail)]
    with kernels.using("torch"):
        return bench.plain_loop(parts, steps, noise, cos, sin, past)


def cut(monkeypatch, splits):
    """Sums along K in this many parts. These are of blocks of 16, as K is small: 40, 48 and 72 in
    the three kinds of them."""
    launch_of = sampler.launch_of

    def in_parts(kind, *size):
        (rows, columns, _), options = launch_of(kind, *size)
        return (rows, columns, 1 if kind == "gate_up" else splits), {**options, "BK": 16}

    monkeypatch.setattr(sampler, "launch_of", in_parts)


@pytest.mark.parametrize("B, n, splits", [(2, 2, 2), (1, 1, 1)])  # two samples a tile, and one
@torch.no_grad()
def test_sampler(B, n, splits, monkeypatch):
    """The kernels over static buffers do what the plain loop does, and do it again for another
    scene in the same ones."""
    cut(monkeypatch, splits)
    parts, noise, cos, sin, prefix, tail, seen = sampling(torch.float32, B, n)
    for scene in range(2):
        if scene == 1:
            noise = torch.randn_like(noise)
            prefix = [tuple(torch.randn_like(x) for x in kv) for kv in prefix]
            tail = [tuple(torch.randn_like(x[:, :, :3]) for x in kv) for kv in tail]
            seen = seen[:, :3]
        inputs = noise, cos, sin, prefix, tail, seen
        with poisoned(), programs("shuffled"):
            got = sampler.sample_flow(*parts, 2, *inputs)
        expected = plainly(2, parts, *inputs).double()
        assert torch.equal(got[0], noise)
        close(got[1] - noise, expected[0], 5e-5)
        # the second step: a feature of x turns by 2 pi 100 x
        close(got[2] - got[1], expected[1] - expected[0], 5e-3)
    assert len(sampler.kept[parts[0]][1]) == 1


@torch.no_grad()
def test_buffers_outlive_what_changes_between_two_calls(monkeypatch):
    """Tails of another width share the prefix; a tail of NaN is gone with its scene; weights that
    are put elsewhere are found there; and buffers made in inference mode serve out of it."""
    cut(monkeypatch, 1)
    parts, noise, cos, sin, prefix, tail, seen = sampling(torch.float32, 1, 1)

    def ours(tail, seen):
        flow = sampler.sample_flow(*parts, 1, noise, cos, sin, prefix, tail, seen)
        return flow[1] - noise

    def expected(tail, seen):
        return plainly(1, parts, noise, cos, sin, prefix, tail, seen)[0].double()

    with torch.inference_mode():
        ours([tuple(x * torch.nan for x in kv) for kv in tail], seen)
    short = [tuple(x[:, :, :2] for x in kv) for kv in tail], torch.ones_like(seen[:, :2])
    longer = [tuple(torch.cat([x] * 13, 2) for x in kv) for kv in tail]  # 65 tokens
    for inputs in (short, (longer, torch.cat([seen] * 13, 1))):
        close(ours(*inputs), expected(*inputs), 5e-5)
    small, large = sampler.kept[parts[0]][1].values()
    assert small.prefix is large.prefix
    assert small.mask.shape[2] == 64 + 16 and large.mask.shape[2] == 128 + 16
    moved = {k: v + 0.1 for k, v in parts[0].state_dict().items()}
    parts[0].load_state_dict(moved, assign=True)
    close(ours(*short), expected(*short), 5e-4)  # float32 beside float32, of weights that all add up
    assert len(sampler.kept[parts[0]][1]) == 1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@torch.no_grad()
def test_sampler_in_16_bits(dtype, tolerance, monkeypatch):
    """A step, its sums cut into parts or not, against float64 on the same rounded weights."""
    cut(monkeypatch, random.choice([1, 2]))
    parts, *inputs = sampling(dtype, B=1, n=random.choice([1, 2]))
    with poisoned(), programs("shuffled"):
        noise, after = sampler.sample_flow(*parts, 1, *inputs)
    exact = [copy.deepcopy(part).double() for part in parts]
    close(after - noise, plainly(1, exact, *map(double, inputs))[0], tolerance)


@torch.no_grad()
def test_autocast_samples_a_copy_that_follows(monkeypatch):
    """32-bit weights that learn under autocast: a 16-bit copy is sampled, with the weights of
    now."""
    cut(monkeypatch, 1)
    parts, *inputs = sampling(torch.float32, B=1, n=1)
    for _ in range(2):
        with torch.autocast(DEVICE, torch.bfloat16):
            noise, after = sampler.sample_flow(*parts, 1, *inputs)
        exact = [copy.deepcopy(part).double() for part in parts]
        for p in (p for part in exact for p in part.parameters()):
            p.data = p.data.bfloat16().double()
        close(after - noise, plainly(1, exact, *map(double, inputs))[0], 2e-2)
        parts[2].weight.mul_(3)
    assert len(sampler.copies) and parts[2].weight.dtype == torch.float32


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
    """Parts are unequal, and of 5 some are empty. Whichever program of a tile comes last, the same
    bits come out, with junk in the scratch before each launch. The counters are back at 0 for the
    next."""
    cut(monkeypatch, splits)
    parts, noise, cos, sin, prefix, tail, seen = sampling(torch.float32, B=1, n=N)
    buffers = sampler.Buffers(*parts, 1, 1, N, 16, prefix[0][0].shape[2], 64)
    assert all(x[0][2] == splits for x in (buffers.heads, buffers.o_proj, buffers.down_proj))
    for kernel in ("_heads", "_add"):
        monkeypatch.setattr(sampler, kernel, Junk(getattr(sampler, kernel), buffers.part))
    buffers.fill(noise, cos, sin, prefix, tail, seen)
    results = []
    for order in ("forward", "backward", "shuffled"):
        with programs(order):
            results.append(buffers.replay())
        assert not buffers.done.any()
    expected = plainly(1, parts, noise, cos, sin, prefix, tail, seen)
    close(results[0][1] - noise, expected[0].double(), 5e-5)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# --------------------------------------------------------------------------------------------------
# What they compile to


def release(n, T, S):
    """One layer of the release: 3000 tokens of prompt, 8 key-value heads of 128; 16 query heads in
    the expert, else 32."""
    H = 16 if T == 64 else 32
    leaves, _, mask1 = inputs(1, n, H, 8, T, 3000, S, 128, False, "samples", torch.bfloat16)
    q, _, _, k1, v1 = leaves
    k0, v0 = (torch.zeros(1, 8, 3000, 128, dtype=torch.bfloat16) for _ in range(2))
    return q, k0, v0, k1, v1, None, mask1


def gate(build, instruction, blocks):
    said = f"{build.kernel} sm_{build.chip} grid {build.grid}: {build.registers} registers, "
    said += f"{build.spilled} B spilled, {build.shared} B shared, {build.blocks} blocks of "
    said += f"{build.warps} warps, {build.matrix()}, "
    said += f"{build.async16} + {build.async_narrow} asynchronous copies"
    print(said)
    assert build.spilled == 0 and build.fits and build.blocks >= blocks, said
    assert build.matrix() == instruction, said


MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@cross_compiled
@pytest.mark.parametrize("chip", [80, 90, 100, 120])
def test_prefix_attention_compiles(chip):
    with compiling(chip) as builds, torch.no_grad():
        args = release(1, 64, 104)
        y, lse = torch.empty_like(args[0]), torch.empty(args[0].shape[:3])
        attention.prefix_attention_op(*args, 0)
        attention.prefix_attention_backward_op(y, *args, y, lse, True, False)
        attention.prefix_attention_op(*release(6, 1, 40), 0)
        if chip in (90, 100):  # others take no more rows at once
            attention.prefix_attention_op(*release(64, 64, 104), 0)
    expert, join, grad_q, grad_k0, decoding, join_too, *many = builds
    for build in (join, join_too):
        gate(build, None, 4)
    assert expert.grid == (2, 8, 8) and decoding.grid == (1, 32, 8)  # for 132 multiprocessors
    gate(expert, MATRIX[chip], 1 if chip == 120 else 2)
    gate(decoding, "HMMA", 2)  # 24 rows: the larger instructions multiply 64 or 128 at once
    for build in (grad_q, grad_k0, *many):
        gate(build, MATRIX[chip], 1)
    assert all(b.async16 >= 8 or b.kernel == "_join" for b in builds)


@cross_compiled
@pytest.mark.parametrize("chip", [90, 120])
def test_sampler_compiles(chip):
    """A step of one sample over a layer of the release, in at most 6 launches, between two steps of
    the flow; and the layer again for six samples. For the chip of our tables, and one with less
    shared memory and other matrix units; attention, above, for all four."""
    cfg = replace(alpamayo.Config(), n_layer=1)
    with torch.device("meta"):
        parts = alpamayo.Expert(cfg), alpamayo.ActionEmbed(cfg), torch.nn.Linear(cfg.e_embd, 2)
    parts = [part.to_empty(device="cpu").bfloat16() for part in parts]
    share = torch.zeros(1, cfg.a_embd)
    with compiling(chip) as builds, torch.no_grad():
        sampler.Buffers(*parts, 1, B=1, N=6, T=64, P=3000, S=64).run()
        buffers = sampler.Buffers(*parts, 1, B=1, N=1, T=64, P=3000, S=64)
        buffers.run()
        (x, after), h = buffers.flow, buffers.h
        flow.step_into(after, h, x, h, buffers.out, 0.5, share, buffers.embed, buffers.scratch)
        cars = torch.zeros(16, 64, 2), torch.zeros(16)
        flow.roll_out_backward_op(*flow.roll_out_op(*cars), *cars)
    six, (first, *layer, last, between, roll_out, roll_back) = builds[1:6], builds[7:]
    names = ["_heads", "_attend", "_join", "_add", "_gate_up", "_add"]
    assert [b.kernel for b in layer] == names
    assert [b.kernel for b in six] == names[:2] + names[3:]  # enough rows for the chip
    grids = [(1, 32, 2), (2, 8, 8), (8, 2, 8), (1, 64, 2), (1, 129), (1, 64, 4)]
    assert [b.grid for b in layer] == [grid[: len(b.grid)] for grid, b in zip(grids, layer)]
    pairs = 3 if chip in (90, 100) else 6  # blocks of rows: two samples' or one's
    grids = [(pairs, 32, 1), (12, 1, 8), (6, 32, 1), (pairs, 129), (6, 32, 2)]
    assert [b.grid for b in six] == [grid[: len(b.grid)] for grid, b in zip(grids, six)]
    for build in layer + six:
        gate(build, None if build.kernel == "_join" else MATRIX[chip], 1)
        assert build.async16 >= 8 or build.kernel == "_join"
    gate(first, "HMMA", 1)  # 16 rows
    gate(between, "HMMA", 1)
    gate(last, None, 2)
    for build in (roll_out, roll_back):
        gate(build, None, 8)


@cross_compiled
@pytest.mark.parametrize("preset, dtype", [("nano", torch.float16), ("release", torch.float32)])
def test_other_sizes_compile(preset, dtype):
    """For sm_90, all that attention over a prefix and the sampler launch: nano's heads of 40
    numbers, and the release in float32, whose products no matrix unit may have, since it would cut
    their inputs to 19 bits."""
    shape = bench.SHAPES[preset]
    shape = replace(shape, samples=(1, 6), cfg=replace(shape.cfg, n_layer=1), steps=2)
    _, *cases = bench.prefix_attention_cases(shape)
    seen = set()
    for case in [*cases, next(bench.sampler_cases(shape))]:
        problem = case.problem("cpu", dtype)
        with compiling(90) as builds:
            problem.run(problem.ours)()
        for build in builds:
            few_rows = build.kernel == "_step" or "decoding" in case.shape
            expected = None if dtype == torch.float32 else "HMMA" if few_rows else "HGMMA"
            if build.kernel == "_join" or build.kernel == "_step" and not build.matrix():
                expected = None
            gate(build, expected, 1)
            assert build.async16 >= 8 or build.kernel in ("_step", "_grad_kv", "_join")
            seen.add(build.kernel)
    assert seen == {"_attend", "_join", "_grad_q", "_grad_kv", "_step", "_heads", "_add", "_gate_up"}
