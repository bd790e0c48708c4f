"""
A thought that is read by a Recording is the plain loop's, to the last token; and where Python may do
something else each time, the loop reads. Without a GPU a Recording runs and is not recorded.

    python -m pytest tests/test_kernels_decoding.py
"""
import gc
import weakref

import pytest
import torch

pytest.importorskip("triton")
import cpu_triton  # noqa: E402, F401
import torch.nn as nn  # noqa: E402
from test_rl import tiny as tiny_model  # noqa: E402

import alpamayo  # noqa: E402
import kernels  # noqa: E402
import memory  # noqa: E402
from kernels import decoding  # noqa: E402

# Triton's interpreter computes in masked-off lanes too
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(kernels, "processors", 8)  # interpreted one by one: the fewer, the faster
    monkeypatch.setattr(kernels, "_said", set())
    monkeypatch.setattr(alpamayo, "HORIZON", 4)
    monkeypatch.setattr(decoding, "SHARED", 16)


def tiny(dtype=torch.float32):
    return tiny_model().to(DEVICE, dtype).eval()


def prefix_of(model, B, P, seed=0):
    """As if a prompt of P tokens had been read for each of B scenes."""
    cfg, seeded = model.cfg, torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    size = cfg.n_layer, 2, B, cfg.n_kv_head, P, cfg.head_dim
    layers = [tuple(kv) for kv in torch.randn(size, generator=seeded).to(DEVICE, dtype)]
    x = torch.randn(B, 1, cfg.n_embd, generator=seeded).to(DEVICE, dtype)
    return alpamayo.Prefix(layers, layers, x, P + 2)


@torch.no_grad()
def think(model, prefix, n=2, words=3, due=0, heat=1.0):
    seeded = torch.Generator(DEVICE).manual_seed(3)

    def choose(logits):
        return alpamayo.pick(logits, heat, 1.0, seeded)

    return model.think(prefix, n, words > 0, due, words, choose)


def both(*given, **options):
    """The loop's Thought, and that of the kernels."""
    with kernels.using("torch"):
        expected = think(*given, **options)
    with kernels.using("triton"):
        return expected, think(*given, **options)


def assert_same(expected, found, tolerance=2e-5):
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.length, expected.length)
    assert torch.equal(found.chosen, expected.chosen)
    for a, b in [(found.log_probs, expected.log_probs), *zip(found.tail, expected.tail)]:
        a, b = (torch.stack(x) if isinstance(x, tuple) else x for x in (a, b))
        assert a.shape == b.shape and (a - b).norm() <= tolerance * b.norm()


def recordings(model):
    return list(decoding.kept[model.vlm.model.language_model][1].values())


@pytest.mark.parametrize("B, n, P, words, due", [
    (1, 1, 5, 6, 0), (2, 3, 16, 3, 0), (1, 2, 19, 2, 8), (2, 1, 9, 0, 8),
])  # fmt: skip
def test_a_recorded_thought_is_the_loops(B, n, P, words, due):
    model = tiny()
    assert_same(*both(model, prefix_of(model, B, P), n, words, due))
    assert recordings(model)[0].prompt.shape[4] % decoding.SHARED == 0


def test_prompts_of_other_lengths_share_it_and_leave_nothing_behind():
    """Not even NaN, where a prompt before had them."""
    model = tiny()
    broken = prefix_of(model, 1, 12, seed=1)
    for kv in broken.layers:
        for x in kv:
            x[..., -4:, :] = torch.nan
    with kernels.using("triton"):
        think(model, broken, heat=0)
    for P in (7, 16):
        assert_same(*both(model, prefix_of(model, 1, P, seed=P)))
    assert len(recordings(model)) == 1
    for n in range(3, 7):
        both(model, prefix_of(model, 1, 4), n, words=1)
    assert len(recordings(model)) == decoding.MOST  # those before are forgotten


def test_it_follows_weights_that_learn_and_those_that_are_replaced():
    model = tiny()
    prefix = prefix_of(model, 1, 6)
    lm = model.vlm.model.language_model
    assert_same(*both(model, prefix))
    first = recordings(model)
    lm.layers[0].mlp.down_proj.weight.data.mul_(-3)  # in place, as an optimiser does it
    assert_same(*both(model, prefix))
    assert recordings(model) == first
    lm.layers[0].mlp.up_proj.weight.data = 2 * lm.layers[0].mlp.up_proj.weight.data
    assert_same(*both(model, prefix))
    assert recordings(model) != first
    lm.norm.eps = 0.3
    assert_same(*both(model, prefix))


def test_adapters_are_read_and_can_be_switched_off():
    model = tiny()
    prefix = prefix_of(model, 1, 6)
    memory.add_adapters(model, 2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    _, adapted = both(model, prefix)
    assert_same(*both(model, prefix))
    with memory.without_adapters(model):
        expected, plain = both(model, prefix)
    assert_same(expected, plain)
    assert not torch.equal(torch.stack(adapted.tail[0]), torch.stack(plain.tail[0]))


def hook(model, told):
    model.vlm.model.language_model.layers[1].register_forward_hook(lambda *_: told.append(1))


def hook_on_all(model, told):
    handle = nn.modules.module.register_module_forward_hook(lambda *_: told.append(1))
    told.undo = handle.remove


def own_forward(model, told):
    mlp = model.vlm.model.language_model.layers[0].mlp

    def forward(x):
        told.append(1)
        return type(mlp).forward(mlp, x) * len(told)  # each time something else

    mlp.forward = forward


def own_class(model, told):
    class Counted(alpamayo.MLP):
        def forward(self, x):
            told.append(1)
            return super().forward(x)

    model.vlm.model.language_model.layers[0].mlp.__class__ = Counted


def own_call(model, told):
    """As mlp.compile() leaves it."""
    mlp = model.vlm.model.language_model.layers[0].mlp
    mlp._compiled_call_impl = lambda x: told.append(1) or type(mlp).forward(mlp, x)


def own_think(model, told):
    model.think = lambda *given: told.append(1) or type(model).think(model, *given)


class Told(list):
    def undo(self):
        pass


@pytest.mark.parametrize("edit", [hook, hook_on_all, own_forward, own_class, own_call, own_think])
def test_where_python_may_do_something_else_the_loop_reads(edit, capsys):
    model, told = tiny(), Told()
    prefix = prefix_of(model, 1, 6)
    with kernels.using("triton"):
        think(model, prefix)  # what was recorded before is not used
        edit(model, told)
        try:
            out = think(model, prefix)
        finally:
            told.undo()
    assert len(told) >= (1 if edit is own_think else out.tokens.shape[1])
    assert "kernels: PyTorch for the thought (" in capsys.readouterr().err


def test_an_edited_page_is_read_by_the_loop(monkeypatch, capsys):
    model = tiny()
    prefix = prefix_of(model, 1, 6)
    _, before = both(model, prefix)
    forward = alpamayo.MLP.forward
    monkeypatch.setattr(alpamayo.MLP, "forward", lambda self, x: -forward(self, x))
    expected, found = both(model, prefix)
    assert_same(expected, found)
    assert (torch.stack(found.tail[-1]) - torch.stack(before.tail[-1])).norm() > 0.1
    assert "kernels: PyTorch for the thought (MLP.forward was edited)" in capsys.readouterr().err


def test_with_gradients_the_loop_reads(capsys):
    model = tiny()
    with kernels.using("triton"):
        thought = think.__wrapped__(model, prefix_of(model, 1, 6))
    assert thought.tail[0][0].requires_grad
    assert "PyTorch for the thought (gradients are enabled)" in capsys.readouterr().err


def test_a_choice_that_thinks_has_a_recording_of_its_own():
    model = tiny()
    inner, outer = prefix_of(model, 1, 6), prefix_of(model, 1, 5, seed=1)

    def thoughts():
        seen = []

        def choose(logits):
            seen.append(think(model, inner, words=2))
            return alpamayo.pick(logits, 0, 1.0)

        with torch.no_grad():
            return [model.think(outer, 2, True, 0, 2, choose), *seen]

    with kernels.using("torch"):
        expected = thoughts()
    with kernels.using("triton"):
        thoughts()  # leaves one behind
        for a, b in zip(expected, thoughts()):
            assert_same(a, b)


def test_a_model_is_freed():
    model = tiny()
    with kernels.using("triton"):
        think(model, prefix_of(model, 1, 6), words=1)
    lm = weakref.ref(model.vlm.model.language_model)
    assert lm() in decoding.kept
    del model
    gc.collect()
    assert lm() is None


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs need a GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_a_replay_gives_what_a_run_gives(dtype, tolerance):
    model = tiny(dtype)
    expected, first = both(model, prefix_of(model, 2, 77), words=12, heat=0)
    assert recordings(model)[0].graph is not None
    with kernels.using("triton"):
        again = think(model, prefix_of(model, 2, 77), words=12, heat=0)
    assert torch.equal(again.tokens, first.tokens)
    for a, b, c in zip(first.tail, again.tail, expected.tail):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        if torch.equal(first.tokens, expected.tokens):
            assert (a[0] - c[0]).norm() <= tolerance * c[0].norm()


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs need a GPU")
def test_under_autocast_weights_that_learn_are_cast_anew():
    model = tiny()
    prefix = prefix_of(model, 1, 6)
    prefix = prefix._replace(recalled=[tuple(x.bfloat16() for x in kv) for kv in prefix.recalled])

    def tail():
        with torch.autocast(DEVICE, torch.bfloat16):
            return torch.stack(both(model, prefix, heat=0)[1].tail[-1]).float()

    before = tail()
    model.vlm.model.language_model.layers[0].mlp.down_proj.weight.data.mul_(-3)
    assert (tail() - before).norm() > 0.05 * before.norm()
