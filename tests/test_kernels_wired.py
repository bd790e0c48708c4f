"""
The model with its kernels and without: the same losses, gradients, tokens and paths. On a machine without a GPU the
kernels run in Triton's interpreter.    python -m pytest tests/test_kernels_wired.py
"""
import pytest
import torch

pytest.importorskip("triton")
from cpu_triton import poisoned, programs  # noqa: E402
from test_rl import tiny  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import data  # noqa: E402
import kernels  # noqa: E402
import world  # noqa: E402


@pytest.fixture(scope="module")
def scene():
    return data.make_scenes(range(world.SEEDS["val"] + 40, world.SEEDS["val"] + 42), size=(32, 64))


@pytest.fixture
def both(monkeypatch):
    """Run something in PyTorch, then in Triton with poisoned outputs and programs in random order: both results, and the
    names of the kernels that were launched."""
    launched, launch = set(), JITFunction.run
    note = lambda self, *args, **more: launched.add(self.fn.__name__) or launch(self, *args, **more)
    monkeypatch.setattr(JITFunction, "run", note)

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
        losses = model(scene, generator=torch.Generator().manual_seed(0))
        (losses["text"] + losses["action"] + losses["flow"] + losses["ade"]).backward()
        return {k: v.item() for k, v in losses.items()}, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    (losses, grads), (ours, our_grads), used = both(learn)
    assert used == {"row_sums", "column_sums", "forward", "backward_queries", "backward_keys", "_attend", "_grad_q",
                    "_grad_kv", "_roll_out", "_roll_back"}  # fmt: skip
    assert ours == pytest.approx(losses, rel=1e-5)
    for name, grad in grads.items():
        assert (our_grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name


@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_thoughts_and_paths(scene, both, eta):
    """The sampler's kernels take Euler's steps; steps with noise are the plain loop."""
    model = tiny()
    out, ours, used = both(lambda: model.sample(scene, n=2, steps=2, max_new_tokens=5, seed=0, eta=eta))
    assert used >= {"_attend", "_roll_out"} and ({"_heads", "_gate_up", "_add", "_step"} <= used) == (eta == 0)
    assert torch.equal(out.tokens, ours.tokens)
    assert (out.flow - ours.flow).abs().max() < 1e-3 and (out.xyz - ours.xyz).abs().max() < 1e-2
