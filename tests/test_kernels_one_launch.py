"""
The flow sampler in one launch, and the roll-out in CUDA C++: against float64 and the plain loop, on
fresh random sizes, and what they compile to for four chips.

    python -m pytest tests/test_kernels_one_launch.py

Where there is a GPU the same tests run on it, except those that compile for other chips.
"""
import copy
import random
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from cpu_triton import compiling, poisoned, programs  # noqa: E402

import alpamayo  # noqa: E402
import kernels  # noqa: E402
from kernels import one_launch, roll_out_cuda  # noqa: E402
from kernels.compiled import ask  # noqa: E402

# Triton's interpreter computes in masked-off lanes too
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
cross_compiled = pytest.mark.skipif(DEVICE == "cuda", reason="compiled for the GPU here alone")
NANO = alpamayo.PRESETS["nano"]
ODD = replace(
    NANO, n_layer=2, e_embd=40, e_head=2, e_mlp=72, a_embd=24, n_kv_head=1, head_dim=24,
    mrope_section=(4, 4, 4),
)  # fmt: skip
WIDE = replace(NANO, n_layer=1, e_embd=56, e_head=4, e_mlp=80, a_embd=40, a_fourier=8, a_layer=3)


@pytest.fixture(autouse=True)
def by_hand():
    with kernels.using("triton"), torch.device(DEVICE), torch.no_grad():
        yield


def close(got, expected, tolerance):
    error = (got.double() - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.1e}"


def parts_of(cfg, dtype=torch.float32):
    """A small expert, the embedding and the projection, with norms and biases that matter."""
    parts = alpamayo.Expert(cfg), alpamayo.ActionEmbed(cfg), torch.nn.Linear(cfg.e_embd, 2)
    for part in parts:
        for name, p in part.named_parameters():
            if p.ndim == 1:
                torch.nn.init.normal_(p, float("weight" in name), 0.2)
    return [part.to(dtype) for part in parts]


def left_behind(cfg, dtype, B, n, T, P, S):
    """Noise, rope, and what the language model has left of B scenes of n samples: P keys of prompt,
    up to S of what each sample said, of which a random number is real and the rest is junk."""
    N = B * n
    length = torch.randint(0, S + 1, (N,))
    positions = (P + length[:, None] + torch.arange(T)).expand(3, -1, -1)
    cos, sin = alpamayo.rope(positions, cfg, dtype)

    def kv(owners, keys):
        size = cfg.n_layer, 2, owners, cfg.n_kv_head, keys, cfg.head_dim
        return [tuple(layer) for layer in torch.randn(size).to(dtype)]

    tail = kv(N, S) if S else [None] * cfg.n_layer
    seen = torch.arange(S) < length[:, None]
    return torch.randn(N, T, 2), cos, sin, kv(B, P), tail, seen


def plainly(parts, steps, noise, cos, sin, prefix, tail, seen, eta=0.0, fresh=()):
    mask = torch.cat([seen, seen.new_ones(noise.shape[:2])], 1)[:, None]
    past = [alpamayo.Past(kv, own, None, mask) for kv, own in zip(prefix, tail)]
    step = alpamayo.euler_step
    with kernels.using("torch"):
        return one_launch.plain_sample(*parts, step, steps, noise, cos, sin, past, eta, fresh)


def double(x):
    if isinstance(x, (list, tuple)):
        return [double(y) for y in x]
    return x if x is None or x.dtype == torch.bool else x.double()


def in_float64(parts):
    return [copy.deepcopy(part).double() for part in parts]


@pytest.mark.parametrize("cfg, S", [(ODD, 0), (ODD, 70), (WIDE, 5)])
def test_in_32_bits(cfg, S):
    """Every step against float64. A feature of x turns by 2 pi 100 x, so what the first step has
    wrong by 1e-6 the second has by 1e-4."""
    B, n, T = random.randint(1, 2), random.randint(1, 2), 16
    parts = parts_of(cfg)
    inputs = left_behind(cfg, torch.float32, B, n, T, random.randint(1, 150), S)
    eta = random.choice([0.0, 0.5])
    drawn, again = (torch.Generator(DEVICE).manual_seed(0) for _ in range(2))
    with poisoned(), programs("shuffled"):
        flow = one_launch.sample_in_one_launch(*parts, 2, *inputs, eta, drawn)
    fresh = [torch.randn(B * n, T, 2, generator=again)]
    expected = plainly(in_float64(parts), 2, *map(double, inputs), eta, fresh)
    assert torch.equal(flow[0], inputs[0])
    close(flow[1] - flow[0], expected[1] - expected[0], 2e-5)
    close(flow[2] - flow[1], expected[2] - expected[1], 5e-3)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_in_16_bits(dtype, tolerance):
    """One step against float64 on the same rounded numbers, with nano's 64 controls."""
    parts = parts_of(ODD, dtype)
    inputs = left_behind(ODD, dtype, 1, random.randint(1, 2), 64, random.randint(1, 90), 5)
    with poisoned(), programs("backward"):
        flow = one_launch.sample_in_one_launch(*parts, 1, *inputs)
    expected = plainly(in_float64(parts), 1, *map(double, inputs))
    assert flow.dtype == torch.float32
    close(flow[1] - flow[0], expected[1] - expected[0], tolerance)


def test_samples_do_not_meet():
    """What one sample is has no effect on another, to the last bit; nor has what is not seen."""
    parts, (noise, *rest, prefix, tail, seen) = parts_of(ODD), left_behind(ODD, torch.float32, 1, 2, 16, 9, 6)
    seen[:] = torch.arange(6) < 3
    flow = one_launch.sample_in_one_launch(*parts, 1, noise, *rest, prefix, tail, seen)
    other = torch.cat([noise[:1], torch.randn_like(noise[1:])])
    unseen = [tuple(x.masked_fill(~seen[:, None, :, None], torch.nan) for x in kv) for kv in tail]
    again = one_launch.sample_in_one_launch(*parts, 1, other, *rest, prefix, unseen, seen)
    assert torch.equal(again[:, 0], flow[:, 0]) and not torch.equal(again[1, 1], flow[1, 1])


def test_weights_may_change_between_two_calls():
    parts, inputs = parts_of(ODD), left_behind(ODD, torch.float32, 1, 1, 16, 9, 0)
    for _ in range(2):
        flow = one_launch.sample_in_one_launch(*parts, 1, *inputs)
        expected = plainly(in_float64(parts), 1, *map(double, inputs))
        close(flow[1] - flow[0], expected[1] - expected[0], 2e-5)
        for part in parts:
            for p in part.parameters():
                p.data = p.data + 0.1 * torch.randn_like(p)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_the_plain_loop_is_the_model(eta):
    model = alpamayo.Alpamayo(ODD)
    parts = model.expert, model.action_in_proj, model.action_out_proj
    noise, _, _, prefix, tail, _ = left_behind(ODD, torch.float32, 1, 2, 64, 7, 3)
    length = torch.tensor([1, 3])
    words = torch.zeros(2, 3, dtype=torch.long)
    thought = alpamayo.Thought(words, words > 0, words, length, tail)
    seeded = [torch.Generator(DEVICE).manual_seed(0) for _ in range(2)]
    fresh = [torch.randn(noise.shape, generator=seeded[0]) for _ in range(2)]
    with kernels.using("torch"):
        flow = model.drive(alpamayo.Prefix(prefix, prefix, None, 7), thought, 3, noise, eta, seeded[1])
    cos, sin = model.rope_behind(7 + length, 64, torch.float32)
    seen = torch.arange(3) < length[:, None]
    assert torch.equal(flow, plainly(parts, 3, noise, cos, sin, prefix, tail, seen, eta, fresh))


def test_which_experts_are_small():
    """nano's is; mini's has 23 MB. A width that a program's registers have no room for is not."""
    half = torch.float16
    assert one_launch.fits(NANO, 64, half) and not one_launch.fits(NANO, 64, torch.float32)
    assert one_launch.fits(ODD, 16, half) and one_launch.fits(WIDE, 16, torch.bfloat16)
    assert not one_launch.fits(alpamayo.PRESETS["mini"], 64, half)
    assert not one_launch.fits(alpamayo.Config(), 64, half)
    assert not one_launch.fits(replace(NANO, e_mlp=4096), 64, half)
    for odd in (dict(e_embd=160), dict(a_embd=136), dict(e_head=8)):
        assert not one_launch.fits(replace(NANO, **odd), 64, half)
    assert not one_launch.fits(NANO, 128, half)


def test_too_many_controls():
    parts, inputs = parts_of(ODD), left_behind(ODD, torch.float32, 1, 1, 24, 9, 0)
    with pytest.raises(ValueError, match="24 action tokens"):
        one_launch.sample_in_one_launch(*parts, 1, *inputs)


# --------------------------------------------------------------------------------------------------
# What it compiles to

MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
WIDEST = replace(NANO, n_layer=2, e_embd=128, e_mlp=384, a_embd=128, head_dim=64, mrope_section=(12, 10, 10))


@cross_compiled
@pytest.mark.parametrize("chip", [80, 90, 100, 120])
def test_it_compiles(chip):
    """In 16 bits, for nano with noise: it has the chip's matrix instruction and spills nothing."""
    gate(chip, NANO, torch.bfloat16, eta=0.5)


@cross_compiled
def test_the_widest_compiles():
    assert one_launch.fits(WIDEST, 64, torch.float16)
    gate(90, WIDEST, torch.float16)


def gate(chip, cfg, dtype, eta=0.0):
    inputs = left_behind(cfg, dtype, 1, 6, 64, 150, 33)
    with compiling(chip) as builds:
        one_launch.sample_in_one_launch(*parts_of(cfg, dtype), 2, *inputs, eta)
    (build,) = builds
    said = f"sm_{chip}: {build.registers} registers, {build.spilled} B spilled, {build.shared} B "
    said += f"shared, {build.matrix()}, {sum(build.instructions.values())} instructions"
    print(said)
    assert build.grid == (6,)
    assert build.spilled == 0 and build.fits, said
    assert build.matrix() == MATRIX[chip], said


# --------------------------------------------------------------------------------------------------
# The roll-out in CUDA C++


@pytest.mark.parametrize("chip", [80, 90, 100, 120])
def test_the_cuda_twin_compiles(chip):
    """By NVRTC, which needs neither a GPU nor the toolkit; nothing spills."""
    usage = ask("cuobjdump", "-res-usage", data=roll_out_cuda.compiled(chip))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    assert "roll_out" in usage and registers <= 64 and stack <= 32, usage


def test_what_the_compiler_says(tmp_path, monkeypatch):
    (tmp_path / "broken.cu").write_text("__global__ void roll_out() { speed = 1; }")
    monkeypatch.setattr(roll_out_cuda, "SOURCE", str(tmp_path / "broken.cu"))
    with pytest.raises(RuntimeError, match="speed"):
        roll_out_cuda.compiled.__wrapped__(90)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA C++ runs on a GPU alone")
def test_the_cuda_twin():
    for shape in ((5, 64), (2, 3, 90), (1,)):
        actions = torch.randn(*shape, 2) * torch.tensor([1, 0.05])
        v0 = 12 * torch.rand(shape[:-1])
        with poisoned():
            got = roll_out_cuda.roll_out(actions, v0)
        for a, b in zip(got, alpamayo.roll_out(actions.double(), v0.double())):
            close(a, b, 1e-6)


def test_the_cuda_twin_wants_a_gpu():
    with pytest.raises(ValueError, match="expected float32 on cuda"):
        roll_out_cuda.roll_out(torch.zeros(1, 4, 2, device="cpu"), torch.zeros(1, device="cpu"))
