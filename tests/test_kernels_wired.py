"""
The model with its kernels and without: the same losses, gradients, tokens and paths. Without a GPU the kernels run in
Triton's interpreter.    python -m pytest tests/test_kernels_wired.py
"""
import pytest
import torch

pytest.importorskip("triton")
import test_rl  # noqa: E402
from cpu_triton import poisoned, programs  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import alpamayo  # noqa: E402
import data  # noqa: E402
import kernels  # noqa: E402
import world  # noqa: E402

# Triton's interpreter computes in masked-off lanes too
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
    """Run something in PyTorch, then in Triton with poisoned outputs and programs in random order: both results, and the
    names of the kernels that were launched."""
    launched, launch = set(), JITFunction.run
    note = lambda self, *args, **more: launched.add(self.fn.__name__) or launch(self, *args, **more)
    monkeypatch.setattr(JITFunction, "run", note)
    monkeypatch.setattr(kernels, "processors", 8)  # the interpreter has one program run after another: the fewer, the faster

    def run(what):
        monkeypatch.setattr(kernels, "_choice", "torch")
        expected = what()
        assert not launched
        monkeypatch.setattr(kernels, "_choice", "triton")
        with poisoned(), programs("shuffled"):
            return expected, what(), launched

    return run


def test_losses_and_gradients_of_a_pruned_model(scene, both):
    model = tiny()
    model.cfg.keep = 0.4

    def learn():
        model.zero_grad()
        losses = model(scene, generator=seeded())
        (losses["text"] + losses["action"] + losses["flow"] + losses["ade"]).backward()
        return {k: v.item() for k, v in losses.items()}, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    (losses, grads), (ours, our_grads), used = both(learn)
    assert used == {"row_sums", "column_sums", "forward", "backward_queries", "backward_keys", "_attend", "_grad_q",
                    "_grad_kv", "_roll_out", "_roll_back"}  # fmt: skip
    assert ours == pytest.approx(losses, rel=1e-5)
    for name, grad in grads.items():
        assert (our_grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name


def test_under_autocast(scene, both, monkeypatch):
    """As stage reason trains on a GPU, where autocast gives norms in float32, which a CPU's does not: queries and keys are
    of the values' type all the same, or `auto` would leave them to PyTorch."""
    model, norm, types = tiny(), torch.nn.functional.rms_norm, set()
    model.cfg.keep = 0.4
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda x, shape, weight, eps: norm(x.float(), shape, weight, eps))
    for name in ("prefix_attention", "column_means"):
        whole = getattr(alpamayo, name)
        spy = lambda *args, whole=whole, **more: types.update(a.dtype for a in args if torch.is_tensor(a)) or whole(*args, **more)
        monkeypatch.setattr(alpamayo, name, spy)

    def learn():
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            losses = model(scene, generator=seeded())
        (losses["text"] + losses["flow"]).backward()
        return losses, [p.grad.norm() for p in model.expert.parameters()]

    (losses, grads), (ours, our_grads), used = both(learn)
    assert types <= {torch.bfloat16, torch.bool} and used >= {"_attend", "_grad_q", "_grad_kv", "row_sums", "forward"}
    for name in ("text", "flow"):
        torch.testing.assert_close(ours[name], losses[name], rtol=0.05, atol=0)
    torch.testing.assert_close(torch.stack(our_grads), torch.stack(grads), rtol=0.3, atol=1e-3)


def test_thoughts_and_paths(scene, both):
    model = tiny()
    out, ours, used = both(lambda: model.sample(scene, n=2, steps=2, max_new_tokens=5, seed=0))
    assert used >= {"_attend", "_heads", "_gate_up", "_add", "_step", "_roll_out"}
    assert torch.equal(out.tokens, ours.tokens)
    assert (out.flow - ours.flow).abs().max() < 1e-3 and (out.xyz - ours.xyz).abs().max() < 1e-2


@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_driving_without_thinking(both, eta):
    """No tail but the action tokens' own; the sampler's kernels take Euler's steps, and steps with noise are the loop's."""
    model = tiny()
    cfg, x = model.cfg, torch.randn(4, 64, 2, device=DEVICE)
    layers = [tuple(torch.randn(2, cfg.n_kv_head, 9, cfg.head_dim, device=DEVICE) for _ in "kv") for _ in range(cfg.n_layer)]
    none = torch.zeros(4, 0, dtype=torch.long, device=DEVICE)
    length = torch.zeros(4, dtype=torch.long, device=DEVICE)
    thought = alpamayo.Thought(none, none, none, length, [None] * cfg.n_layer)
    prefix = alpamayo.Prefix(layers, layers, None, 12)
    run = torch.no_grad()(lambda: model.drive(prefix, thought, 2, x, eta, seeded()))
    flow, ours, used = both(run)
    assert used == ({"_attend", "_heads", "_gate_up", "_add", "_step"} if eta == 0 else {"_attend"})
    assert torch.equal(flow[0], x) and (flow[2] - flow[0]).abs().mean() > 0.1
    assert (flow - ours).abs().max() < 1e-3
