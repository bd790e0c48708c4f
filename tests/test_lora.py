"""
Adapters and activation checkpointing: less memory, the same numbers.

    python -m pytest tests/test_lora.py
"""
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_train import cache, command, log, run  # noqa: F401
from test_vision import TINY

import data
import train
from alpamayo import Alpamayo, Layer, VisionBlock, Vocabulary
from memory import add_adapters, checkpoint_activations, without_adapters


def make(seed=0, **switches):
    """A tiny model whose every matrix is random, so that no path of gradients is shut at first."""
    cfg = replace(TINY, **switches)
    model = Alpamayo(cfg, Vocabulary(cfg))
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    for p in model.parameters():
        if p.ndim > 1 and not p.any():
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5, generator=generator)
    return model


@pytest.fixture(scope="module")
def scene():
    return data.make_scenes([3, 4], size=(32, 64)) | {"reasoning": ["Stop at the line", "Stop"]}


def losses_of(model, scene):
    """Losses with the same noise every time."""
    return model(scene, flow_samples=2, generator=torch.Generator().manual_seed(7))


def total(losses):
    return sum(losses[k] for k in ("text", "action", "flow", "ade"))


def learned(model, seed=1):
    """Adapters as if they had learned something."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(seed))


def test_adapters_change_nothing_before_they_learn(scene):
    model = make()
    before, told = losses_of(model, scene), model.sample(scene, n=2, seed=3, max_new_tokens=8)
    add_adapters(model, 4)
    after, again = losses_of(model, scene), model.sample(scene, n=2, seed=3, max_new_tokens=8)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(told.tokens, again.tokens) and torch.equal(told.xyz, again.xyz)
    names = [n for n, _ in model.named_parameters() if "lora_" in n]
    assert len(names) == 2 * 7 * model.cfg.n_layer
    assert all("language_model.layers" in n for n in names)


def test_merging_changes_nothing_but_rounding(scene, tmp_path):
    """What is saved is a plain checkpoint.

    It loads strictly into the plain model and computes what the adapters did."""
    model = make()
    plain, kept = losses_of(model, scene), {k: v.clone() for k, v in model.state_dict().items()}
    add_adapters(model, 4)
    learned(model)
    adapted = losses_of(model, scene)
    assert abs(adapted["text"] - plain["text"]) > 0.01  # they do something
    with without_adapters(model):
        assert all(torch.equal(plain[k], v) for k, v in losses_of(model, scene).items())
    model.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in kept.items()}
    changed = {k for k in kept if not torch.equal(kept[k], tensors[k])}
    assert len(changed) == 7 * model.cfg.n_layer
    assert all(k.endswith("_proj.weight") for k in changed)
    fresh = make()
    fresh.load_state_dict(tensors, strict=True)
    for other in (fresh, Alpamayo.from_pretrained(str(tmp_path))):
        for k, v in losses_of(other, scene).items():
            torch.testing.assert_close(v, adapted[k], rtol=1e-4, atol=1e-4)
    for k, v in losses_of(model, scene).items():  # and saving leaves the adapters beside their base
        assert torch.equal(v, adapted[k])


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_only_adapters_learn_and_the_base_may_be_half(scene, dtype, monkeypatch, tmp_path):
    model = make()
    words = f"train.py --init {tmp_path} --lora 4 --train vlm --lr 5e-3 --warmup 0 --dtype {dtype}"
    monkeypatch.setattr(sys, "argv", words.split())
    flags = train.parse_flags()
    run = train.Run(flags, arithmetic=dtype, model=model)
    train.prepare(run)
    params = run.params
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in params} == {torch.float32}
    assert {p.dtype for p in base.values()} == {getattr(torch, dtype)}
    assert len(params) == 2 * 7 * model.cfg.n_layer
    seen = []
    for step in range(8):
        losses = train.backward(run, scene, "reason", True, torch.Generator().manual_seed(0))
        train.update(run, step)
        seen.append(train.total_loss(losses, flags).item())
    assert seen[-1] < seen[0] - 0.5, seen
    assert all(torch.equal(base[n], p) for n, p in model.named_parameters() if n in base)


SWITCHES = (dict(), dict(keep=0.5), dict(vision="flex"), dict(vision="triplane"))


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_activations_computed_twice_are_the_same(scene, switches):
    """Losses, every gradient, and the cache that the layers return."""

    def step(model):
        lm, found = model.vlm.model.language_model, []

        def keep_cache(lm, args, out):
            found.extend(a.detach().clone() for kv in out[1] for a in kv)

        hook = lm.register_forward_hook(keep_cache)
        losses = losses_of(model, scene)
        hook.remove()
        total(losses).backward()
        return losses, found, {n: p.grad for n, p in model.named_parameters()}

    models, calls = (make(**switches), make(**switches)), []
    checkpoint_activations(models[1])
    for m in models[1].modules():
        if isinstance(m, (Layer, VisionBlock)):
            m.mlp.register_forward_pre_hook(lambda mlp, args: calls.append(mlp))
    a, cache_a, grads_a = step(models[0])
    b, cache_b, grads_b = step(models[1])
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(map(torch.equal, cache_a, cache_b)) and len(cache_a) == 2 * TINY.n_layer
    assert {calls.count(mlp) for mlp in calls} == {2}  # in forward, and again in backward
    for name, g in grads_a.items():
        assert (g is None) == (grads_b[name] is None), name
        if g is not None:
            atol = 1e-6 * float(g.abs().max()) + 1e-12
            torch.testing.assert_close(grads_b[name], g, rtol=1e-5, atol=atol, msg=name)


def test_a_checkpoint_has_its_adapters_merged(cache, tmp_path):  # noqa: F811
    """A run goes on from the weights that it began with: its adapters fit no others."""
    base = tmp_path / "base"
    make().save_pretrained(str(base))
    flags = "--lora 4 --dtype bfloat16 --stage reason --train vlm --val-every 10 --steps 10".split()
    run(command(cache, tmp_path / "out", "--init", str(base), *flags))
    lines = log(tmp_path / "out")
    assert lines[9]["text"] < lines[1]["text"] - 0.1
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    first = load_file(base / "model.safetensors")
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in first.items()}
    assert torch.equal(tensors["expert.norm.weight"], first["expert.norm.weight"].bfloat16())
    saved = load_file(tmp_path / "out" / "training.safetensors")
    assert all("lora_" in k for k in saved)

    make(seed=5).save_pretrained(str(base))  # other weights under the same name
    with pytest.raises(ValueError, match=f"{base}: other weights than those"):
        run(["python", "train.py", "--resume", str(tmp_path / "out")])


def test_flags_that_cannot_be_meant(monkeypatch, capsys):
    for words, complaint in (
        ("--lora 8", "--init"),
        ("--lora 8 --init a --train expert", "among what learns"),
        ("--lora 8 --init a --out ./a", "another folder"),
        ("--preset alpamayo-r1-10b", "--plan"),
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", *words.split()])
        with pytest.raises(SystemExit):
            train.parse_flags()
        assert complaint in capsys.readouterr().err.splitlines()[-1]
