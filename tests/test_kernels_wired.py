"""
The model with its kernels and without: the same losses, gradients, tokens and paths. Without a GPU
the kernels run in Triton's interpreter.

    python -m pytest tests/test_kernels_wired.py
"""
import os
import re
from functools import partial

import pytest
import torch

pytest.importorskip("triton")
import test_rl  # noqa: E402
from conftest import ROOT  # noqa: E402
from cpu_triton import poisoned, programs  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import alpamayo  # noqa: E402
import data  # noqa: E402
import kernels  # noqa: E402
import memory  # noqa: E402
import rl  # noqa: E402
import world  # noqa: E402
from kernels import decoding, one_launch  # noqa: E402
from tools.experiments.rewards import flags_of_rl  # noqa: E402

# Triton's interpreter computes in masked-off lanes too
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


SAMPLER, ONE_LAUNCH = {"_heads", "_gate_up", "_add", "_step"}, {"_sample"}
PAGE = open(os.path.join(ROOT, "kernels", "README.md")).read()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def launched_by(command):
    """The kernels that the table in kernels/README.md says a command launches."""
    (row,) = re.findall(rf"^\| {re.escape(command)} \| (.*) \|$", PAGE, re.M)
    return set(re.findall(r"`(\w+)`", row))


def seeded():
    return torch.Generator(DEVICE).manual_seed(0)


def tiny():
    return test_rl.tiny().to(DEVICE)


@pytest.fixture(scope="module")
def scene():
    scene = data.make_scenes(range(world.SEEDS["val"] + 40, world.SEEDS["val"] + 42), size=(32, 64))
    return {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in scene.items()}


@pytest.fixture
def both(monkeypatch):
    """Run something in PyTorch, then in Triton with poisoned outputs and programs in random order:
    both results, and the names of the kernels that were launched."""
    launched, run_kernel = set(), JITFunction.run

    def note(self, *args, **options):
        launched.add(self.fn.__name__)
        return run_kernel(self, *args, **options)

    monkeypatch.setattr(JITFunction, "run", note)
    monkeypatch.setattr(kernels, "processors", 8)  # interpreted one by one: the fewer, the faster

    def run(what):
        with kernels.using("torch"):
            expected = what()
        assert not launched
        with kernels.using("triton"), poisoned(), programs("shuffled"):
            return expected, what(), launched

    return run


def test_losses_and_gradients_of_a_pruned_model(scene, both):
    model = tiny()
    model.cfg.keep = 0.4

    def learn():
        model.zero_grad()
        losses = model(scene, generator=seeded())
        (losses["text"] + losses["action"] + losses["flow"] + losses["ade"]).backward()
        learning = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        return {k: v.item() for k, v in losses.items()}, {name: g.clone() for name, g in learning}

    (losses, grads), (ours, our_grads), used = both(learn)
    besides = launched_by("with `--keep 0.4`, besides")
    assert used | {"_join"} == launched_by("`python train.py`") | besides
    assert ours == pytest.approx(losses, rel=1e-5)
    for name, grad in grads.items():
        assert (our_grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name


def test_under_autocast(scene, both, monkeypatch):
    """As stage reason trains on a GPU, where autocast returns norms in float32, which a CPU's does
    not. Queries and keys have the values' dtype all the same, or `auto` would leave them to
    PyTorch."""
    model, norm, types = tiny(), torch.nn.functional.rms_norm, set()
    model.cfg.keep = 0.4

    def norm_in_float32(x, shape, weight, eps):
        return norm(x.float(), shape, weight, eps)

    def spied(attention):
        def spy(*args, **options):
            types.update(a.dtype for a in args if torch.is_tensor(a))
            return attention(*args, **options)

        return spy

    monkeypatch.setattr(torch.nn.functional, "rms_norm", norm_in_float32)
    for name in ("prefix_attention", "column_means"):
        monkeypatch.setattr(alpamayo, name, spied(getattr(alpamayo, name)))

    def learn():
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            losses = model(scene, generator=seeded())
        (losses["text"] + losses["flow"]).backward()
        return losses, [p.grad.norm() for p in model.expert.parameters()]

    (losses, grads), (ours, our_grads), used = both(learn)
    assert types <= {torch.bfloat16, torch.bool}
    assert used >= {"_attend", "_grad_q", "_grad_kv", "row_sums", "attend_patches"}
    for name in ("text", "flow"):
        torch.testing.assert_close(ours[name], losses[name], rtol=0.05, atol=0)
    torch.testing.assert_close(torch.stack(our_grads), torch.stack(grads), rtol=0.3, atol=1e-3)


def test_thoughts_and_paths(scene, both):
    model = tiny()
    out, ours, used = both(lambda: model.sample(scene, n=2, steps=2, max_new_tokens=5, seed=0))
    assert used | {"_join"} == launched_by("the same, mini or the 10B")
    assert torch.equal(out.tokens, ours.tokens)
    assert (out.flow - ours.flow).abs().max() < 1e-3 and (out.xyz - ours.xyz).abs().max() < 1e-2


@pytest.mark.parametrize("dtype, kernels_used, tolerance", [  # in 16 bits one launch samples
    (torch.float32, SAMPLER | {"_attend"}, 1e-4), (torch.bfloat16, ONE_LAUNCH, 3e-2),
])  # fmt: skip
@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_driving_without_thinking(both, eta, dtype, kernels_used, tolerance):
    """No tail but the action tokens' own. Euler's steps, and steps with noise. What rounding makes
    of the first step, features of a high frequency make much larger in the second."""
    model = tiny().to(dtype)
    cfg, x = model.cfg, torch.randn(4, 64, 2, device=DEVICE)
    size = cfg.n_layer, 2, 2, cfg.n_kv_head, 9, cfg.head_dim
    layers = [tuple(kv) for kv in torch.randn(size, device=DEVICE, dtype=dtype)]
    none = torch.zeros(4, 0, dtype=torch.long, device=DEVICE)
    length = torch.zeros(4, dtype=torch.long, device=DEVICE)
    thought = alpamayo.Thought(none, none, none, length, [None] * cfg.n_layer)
    prefix = alpamayo.Prefix(layers, layers, None, 12)
    run = torch.no_grad()(lambda: model.drive(prefix, thought, 2, x, eta, seeded()))
    flow, ours, used = both(run)
    assert used == kernels_used
    assert torch.equal(flow[0], x) and (flow[2] - flow[0]).abs().mean() > 0.1
    assert (flow[1] - ours[1]).norm() <= tolerance * (flow[1] - flow[0]).norm()
    assert dtype == torch.bfloat16 or (flow - ours).abs().max() < 1e-3


@pytest.mark.parametrize("small", [True, False])
def test_sampling_under_autocast(small, scene, both, monkeypatch):
    """As stage rl tries things out on a GPU, with weights that learn and activation checkpointing."""
    model = tiny()
    memory.checkpoint_activations(model)
    if not small:
        monkeypatch.setattr(one_launch, "MOST_BYTES", 0)

    def run():
        with torch.autocast(DEVICE, torch.bfloat16):
            return model.sample(scene, n=2, temperature=0, steps=1, max_new_tokens=2, seed=0)

    out, ours, used = both(run)
    if small:
        assert used | {"_join"} == launched_by("`python sample.py`, nano")
        assert used | {"_join"} == launched_by("`python train.py --stage rl`, trying out")
    assert used >= {"_attend"} | (ONE_LAUNCH if small else SAMPLER)
    assert model.vlm.model.language_model in decoding.kept
    assert torch.equal(out.tokens, ours.tokens)
    moved, by_ours = out.flow[1] - out.flow[0], ours.flow[1] - ours.flow[0]
    assert (moved - by_ours).norm() <= 3e-2 * moved.norm()


def test_an_update_of_stage_rl(scene, both, monkeypatch):
    monkeypatch.setattr(rl, "nft", partial(rl.nft, levels=1))
    model, flags, scene = tiny(), flags_of_rl(), data.rows_of(scene, [0])
    with kernels.using("torch"):
        rollout = model.sample(scene, n=2, steps=1, max_new_tokens=2, seed=0)
    advantage = {head: torch.tensor([[1.0, -1.0]], device=DEVICE) for head in rl.HEADS}

    def learn():
        model.zero_grad()
        losses = rl.losses_of(model, None, scene, rollout, advantage, flags)
        losses["policy"].backward()
        return [p.grad.norm() for p in model.parameters() if p.grad is not None]

    grads, ours, used = both(learn)
    assert used | {"_join"} == launched_by("its update")
    torch.testing.assert_close(torch.stack(ours), torch.stack(grads), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype, kernels_used, tolerance", [
    (torch.float32, SAMPLER, 1e-4), (torch.bfloat16, ONE_LAUNCH, 5e-2),
])  # fmt: skip
def test_the_shipped_model_at_its_own_sizes(both, dtype, kernels_used, tolerance):
    """In 32 bits one launch wrote beside its memory at these, and not at a small model's."""
    scene = data.make_scenes([world.SEEDS["val"]], size=(64, 128))
    model = alpamayo.Alpamayo.from_pretrained(dtype=dtype, device=DEVICE)
    words = 2 if DEVICE == "cpu" else 40
    out, ours, used = both(lambda: model.sample(scene, 1, 0, steps=1, max_new_tokens=words, seed=0))
    assert used >= kernels_used | {"_attend"}
    assert torch.equal(out.tokens, ours.tokens)
    moved, by_ours = out.flow[1] - out.flow[0], ours.flow[1] - ours.flow[0]
    assert (moved - by_ours).norm() <= tolerance * moved.norm()
