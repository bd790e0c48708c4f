"""
An edited model runs as it was edited: with the kernels on it computes what PyTorch does. Without a
GPU the kernels run in Triton's interpreter.

    python -m pytest tests/test_kernels_edits.py
"""
import copy
import importlib.util
import os
import sys
from dataclasses import replace
from operator import attrgetter

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

pytest.importorskip("triton")
import cpu_triton  # noqa: E402, F401
from conftest import ROOT  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import alpamayo  # noqa: E402
import kernels  # noqa: E402
import memory  # noqa: E402
from kernels import stock  # noqa: E402

# Triton's interpreter computes in masked-off lanes too
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = open(os.path.join(ROOT, "alpamayo.py")).read()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(kernels, "processors", 8)  # interpreted one by one: the fewer, the faster
    monkeypatch.setattr(kernels, "_said", set())
    monkeypatch.setattr(alpamayo, "HORIZON", 16)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that run."""
    names, run = set(), JITFunction.run

    def note(self, *args, **options):
        names.add(self.fn.__name__)
        return run(self, *args, **options)

    monkeypatch.setattr(JITFunction, "run", note)
    return names


def tiny(page=alpamayo):
    """A model whose layers all matter."""
    cfg = replace(
        page.PRESETS["nano"], n_layer=2, n_embd=32, n_head=2, n_kv_head=1, head_dim=24, n_mlp=32,
        mrope_section=(4, 4, 4), e_embd=40, e_head=2, e_mlp=48, a_embd=24, v_layer=1, v_embd=32,
        v_mlp=32, deepstack=(),
    )  # fmt: skip
    torch.manual_seed(0)
    model = page.Alpamayo(cfg)
    for p in model.parameters():
        p.data = 1 + 0.2 * torch.randn_like(p) if p.ndim == 1 else torch.randn_like(p) * p[0].numel() ** -0.5
    return model.to(DEVICE).eval()


@torch.no_grad()
def drive(model, steps=1, noise_grad=False):
    """How far each step moves two samples that have said two words, (steps, 2, 16, 2)."""
    cfg = model.cfg
    seeded = torch.Generator().manual_seed(1)
    drawn = torch.randn(cfg.n_layer, 2, 3, 1, 6, cfg.head_dim, generator=seeded).to(DEVICE)
    noise = torch.randn(2, 16, 2, generator=seeded).requires_grad_(noise_grad)
    prompt = [tuple(layer) for layer in drawn[:, :, :1]]
    tail = [tuple(layer) for layer in drawn[:, :, 1:, :, :2]]
    words = torch.zeros(2, 2, dtype=torch.long, device=DEVICE)
    thought = alpamayo.Thought(words, words > 0, words, words[:, 0] + torch.tensor([1, 2], device=DEVICE), tail)
    flow = model.drive(alpamayo.Prefix(prompt, prompt, None, 6), thought, steps, noise)
    return flow.diff(dim=0)


@pytest.fixture(scope="module")
def stock_path():
    with pytest.MonkeyPatch.context() as patch, kernels.using("torch"):
        patch.setattr(alpamayo, "HORIZON", 16)
        return drive(tiny())


@torch.no_grad()
def is_stock(model):
    prompt = [(torch.zeros(1, 1, 6, 24, device=DEVICE),) * 2] * 2
    return stock.is_flow(alpamayo.Alpamayo.drive, model, prompt)


def by_kernels(model, launched):
    """The same path by the kernels, and whether these ran the sampler."""
    with kernels.using("triton"):
        launched.clear()
        return drive(model), "_heads" in launched


def test_a_stock_model_is_driven_by_the_kernels(launched, stock_path, capsys):
    model = tiny()
    memory.add_adapters(model, 2)  # the language model's: the expert has none
    path, fast = by_kernels(model, launched)
    assert fast and "for the flow" not in capsys.readouterr().err
    torch.testing.assert_close(path, stock_path, rtol=0, atol=1e-4)
    model.train().requires_grad_(False)
    model.expert.register_full_backward_hook(lambda *_: None)
    assert is_stock(copy.deepcopy(model))
    with torch.device(DEVICE):  # nor does a default device change anything
        assert is_stock(model.bfloat16())


# --------------------------------------------------------------------------------------------------
# Modules


class Gelu(alpamayo.MLP):
    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


class Plain(nn.Module):
    def forward(self, x, *_):
        return 0.5 * x, None


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def layer(model):
    return model.expert.layers[1]


def replaced_forward(model):
    mlp = layer(model).mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)


def subclass_of_mlp(model):
    layer(model).mlp.__class__ = Gelu


def adapter(model):
    attention = layer(model).self_attn
    attention.o_proj = memory.Adapted(attention.o_proj, 2)
    nn.init.normal_(attention.o_proj.lora_B)


def narrower(model):
    """As pruning does it: nothing but the weights' data is replaced."""
    mlp = layer(model).mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight.data = linear.weight.data[:16]
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :16]


def norm_without_weight(model):
    model.expert.norm = nn.RMSNorm(40, eps=1e-6, elementwise_affine=False).to(DEVICE)


def bias(model):
    layer(model).mlp.up_proj.bias = nn.Parameter(torch.ones(48, device=DEVICE))


def eps(model):
    layer(model).input_layernorm.eps = 1.0


def own_velocity(model):
    model.velocity = lambda *given: 2 * type(model).velocity(model, *given)


def subclass(model):
    class Mine(alpamayo.Alpamayo):
        def velocity(self, *given):
            return 2 * super().velocity(*given)

    model.__class__ = Mine


def extra_child(model):
    model.action_in_proj.encoder.trunk.append(nn.Tanh())


def fewer_keys(model):
    """Of the first layer, as if the cache were of a window there."""
    drawn = model.expert_past

    def past(prefix, *given):
        return drawn(prefix._replace(layers=[tuple(x[:, :, 3:] for x in kv) for kv in prefix.layers]), *given)

    model.expert_past = past


EDITS = {
    "activation": (subclass_of_mlp, "expert.layers.1.mlp was edited"),
    "activation of the embedding": (
        lambda model: setattr(model.action_in_proj.encoder.trunk, "1", nn.GELU()),
        "action_in_proj.encoder.trunk.1 was edited",
    ),
    "forward of an instance": (replaced_forward, "expert.layers.1.mlp was"),
    "replaced layer": (
        lambda model: model.expert.layers.__setitem__(0, Plain()), "expert.layers.0 was edited"
    ),
    "adapter": (adapter, "expert.layers.1.self_attn.o_proj was"),
    "extra child": (extra_child, "action_in_proj.encoder.trunk was"),
    "depth": (lambda model: model.expert.layers.__delitem__(1), "expert.layers was"),
    "eps": (eps, "expert.layers.1.input_layernorm was"),
    "norm of another class": (
        lambda model: setattr(layer(model), "input_layernorm", nn.LayerNorm(40).to(DEVICE)),
        "expert.layers.1.input_layernorm was",
    ),
    "norm without a weight": (norm_without_weight, "a weight of what drives was"),
    "bias": (bias, "a weight of what drives was"),
    "width": (narrower, "a weight of what drives was"),
    "parametrization": (
        lambda model: parametrize.register_parametrization(layer(model).mlp.up_proj, "weight", Doubled()),
        "expert.layers.1.mlp.up_proj was",
    ),
    "projection": (
        lambda model: setattr(model, "action_out_proj", nn.Sequential(model.action_out_proj, nn.Tanh())),
        "action_out_proj was",
    ),
    "a method of the instance": (own_velocity, "Alpamayo.velocity was"),
    "a method of a subclass": (subclass, "Mine.velocity was"),
    "the cache that it reads": (fewer_keys, "Alpamayo.expert_past was"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
@torch.no_grad()
def test_an_edited_model_drives_as_it_was_edited(name, launched, stock_path, capsys):
    """An edit between two calls, which moves PyTorch's path, moves the path with the kernels as
    far. A line says which."""
    edit, said = EDITS[name]
    model = tiny()
    assert is_stock(model)
    edit(model)
    with kernels.using("torch"):
        expected = drive(model)
    assert (expected - stock_path).abs().max() > 0.05
    path, fast = by_kernels(model, launched)
    assert not fast
    torch.testing.assert_close(path, expected, rtol=0, atol=1e-4)
    assert not is_stock(model)
    told = [line for line in capsys.readouterr().err.splitlines() if "flow" in line]
    assert len(told) == 1 and told[0].startswith(f"kernels: PyTorch for the flow ({said}")


@pytest.mark.parametrize("where", ["hook", "pre-hook", "hook on all modules"])
def test_hooks_fire_and_what_they_change_counts(where, launched, stock_path, capsys):
    model, fired = tiny(), []

    def double(m, *given):
        if isinstance(m, alpamayo.MLP):
            fired.append(m)
            return 2 * given[-1] if torch.is_tensor(given[-1]) else (2 * given[-1][0],)

    register = {
        "hook": layer(model).mlp.register_forward_hook,
        "pre-hook": layer(model).mlp.register_forward_pre_hook,
        "hook on all modules": nn.modules.module.register_module_forward_hook,
    }[where]
    assert is_stock(model)
    hook = register(double)
    try:
        with kernels.using("torch"):
            expected = drive(model)
        path, fast = by_kernels(model, launched)
    finally:
        hook.remove()
    assert not fast and len(fired) == (4 if "all" in where else 2)
    assert (expected - stock_path).abs().max() > 0.05
    torch.testing.assert_close(path, expected, rtol=0, atol=1e-4)
    assert ("hooks on all" if "all" in where else "layers.1.mlp was edited") in capsys.readouterr().err
    assert is_stock(model)  # again


def gelu_forward(self, x):
    return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


def other_code(patch):
    """As IPython's autoreload puts an edit in place."""
    before = alpamayo.MLP.forward.__code__
    patch.setattr(alpamayo.MLP.forward, "__code__", gelu_forward.__code__)
    assert alpamayo.MLP.forward.__code__ is not before


def doubled(patch, owner, name="__call__"):
    call = nn.Module._call_impl

    def twice(self, *given):
        return (2 if isinstance(self, nn.Linear) else 1) * call(self, *given)

    patch.setattr(owner, name, twice, raising=False)


PATCHES = {
    "MLP.forward was": lambda patch: patch.setattr(alpamayo.MLP, "forward", gelu_forward),
    "the source of MLP.forward|MLP.forward was": other_code,
    "F.silu was": lambda patch: patch.setattr(F, "silu", lambda x, inplace=False: F.gelu(x)),
    "rotate was": lambda patch: patch.setattr(alpamayo, "rotate", lambda x, cos, sin: x),
    "prefix_attention was": lambda patch: patch.setattr(
        alpamayo, "prefix_attention", lambda *given: 2 * kernels.prefix_attention.prefix_attention(*given)
    ),
    "nn.RMSNorm.forward was": lambda patch: patch.setattr(nn.RMSNorm, "forward", lambda self, x: x),
    "MLP.__call__ was": lambda patch: patch.setattr(
        alpamayo.MLP, "__call__", lambda self, x: 2 * self.forward(x), raising=False
    ),
    "nn.Linear.__call__ was": lambda patch: doubled(patch, nn.Linear),
    "nn.Linear._call_impl was": lambda patch: doubled(patch, nn.Linear, "_call_impl"),
    "nn.Linear._compiled_call_impl was": lambda patch: doubled(patch, nn.Linear, "_compiled_call_impl"),
    "nn.Module._call_impl was": lambda patch: doubled(patch, nn.Module, "_call_impl"),
    "Past.detach was": lambda patch: patch.setattr(
        alpamayo.Past, "detach", lambda self: self._replace(prefix=tuple(2 * x for x in self.prefix))
    ),
    "Past._replace.__code__ was": lambda patch: patch.setattr(
        alpamayo.Past, "_replace", lambda self, prefix, tail: alpamayo.Past(tuple(2 * x for x in prefix), tail, *self[2:])
    ),
}  # fmt: skip


@pytest.mark.parametrize("said", PATCHES)
def test_what_is_patched_while_it_runs(said, launched, stock_path, capsys, monkeypatch):
    model = tiny()
    with monkeypatch.context() as patch:
        PATCHES[said](patch)
        with kernels.using("torch"):
            expected = drive(model)
        path, fast = by_kernels(model, launched)
    assert not fast and (expected - stock_path).abs().max() > 0.05
    torch.testing.assert_close(path, expected, rtol=0, atol=1e-4)
    told = capsys.readouterr().err
    assert any(f"the flow ({one}" in told for one in said.split("|"))
    assert is_stock(model)


class Gelus(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return F.gelu(*args) if function is F.silu else function(*args, **(kwargs or {}))


class GelusBelow(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return F.gelu(*args) if function is torch.ops.aten.silu.default else function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Gelus, GelusBelow])
def test_a_mode_that_is_active(mode, launched, stock_path, capsys):
    model = tiny()
    with mode():
        with kernels.using("torch"):
            expected = drive(model)
        path, fast = by_kernels(model, launched)
    assert not fast and (expected - stock_path).abs().max() > 0.05
    torch.testing.assert_close(path, expected, rtol=0, atol=1e-4)
    assert f"the flow ({mode.__name__} is active)" in capsys.readouterr().err
    assert is_stock(model)


@pytest.mark.parametrize("whose", ["weights", "noise"])
def test_gradients_are_kept(whose, capsys):
    """`drive` is not under no_grad itself: who has not asked for it gets them."""
    model = tiny().requires_grad_(whose == "weights")
    with kernels.using("triton"):
        path = drive.__wrapped__(model, noise_grad=whose == "noise")
    assert path.requires_grad
    assert "PyTorch for the flow (gradients are enabled)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "edit, said",
    [
        (lambda model: model.action_out_proj.bfloat16(), "a weight of what drives"),
        (lambda model: setattr(layer(model).self_attn, "n_head", 1), "expert.layers.1.self_attn"),
        (lambda model: setattr(layer(model).self_attn, "n_kv_head", 2), "expert.layers.1.self_attn"),
        (lambda model: setattr(model.expert.norm, "normalized_shape", (20,)), "expert.norm"),
    ],
)
def test_what_pytorch_refuses(edit, said, capsys):
    """It is left to PyTorch, which says why."""
    model = tiny()
    assert is_stock(model)
    edit(model)
    with kernels.using("triton"), pytest.raises(RuntimeError):
        drive(model)
    assert f"PyTorch for the flow ({said} was edited)" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# The page


@pytest.fixture
def page_with(tmp_path, monkeypatch):
    """alpamayo.py with another text in place of one, as a module."""

    def load(old, new, name="edited"):
        assert PAGE.count(old) == 1, f"{PAGE.count(old)} places have {old!r}"
        file = tmp_path / f"{name}.py"
        file.write_text(PAGE.replace(old, new))
        spec = importlib.util.spec_from_file_location(name, file)
        page = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, page)
        spec.loader.exec_module(page)
        page.HORIZON = 16
        return page

    return load


SOURCES = {
    "MLP.forward was": ("F.silu(self.gate_proj(x))", "F.gelu(self.gate_proj(x))"),
    "Layer.forward was": (
        "        return x + self.mlp(self.post_attention_layernorm(x)), kv",
        "        return self.mlp(self.post_attention_layernorm(x)), kv",
    ),
    "Layer.__init__ was": (
        "        self.post_attention_layernorm = nn.RMSNorm(n_embd, eps=1e-6)",
        "        self.post_attention_layernorm = nn.RMSNorm(n_embd, eps=1.0)",
    ),
    "Attention.forward was": (
        "k = self.k_norm(self.k_proj(x).view(N, T, self.n_kv_head, -1))",
        "k = (self.k_proj(x).view(N, T, self.n_kv_head, -1))",
    ),
    "rotate was": ("[a * cos - b * sin, b * cos + a * sin]", "[a * cos + b * sin, b * cos - a * sin]"),
    "Expert.forward was": ("            x, _ = layer(x, cos, sin, layer_past)\n", "            x = x + layer(x, cos, sin, layer_past)[0]\n"),
    "Fourier.forward was": ("return math.sqrt(2) * torch", "return torch"),
    "ActionEmbed.__init__ was": ("nn.Linear(width, cfg.a_embd), nn.SiLU(), norm]", "nn.Linear(width, cfg.a_embd), norm]"),
    "ActionEmbed.forward was": ("        curvature = self.sinus[1](x[..., 1])", "        curvature = 0 * self.sinus[1](x[..., 1])"),
    "euler_step was": ("    mean = x + dt * velocity -", "    mean = x + 2 * dt * velocity -"),
    "Alpamayo.velocity was": ("        return self.action_out_proj(x).to(x_t.dtype)", "        return 2 * self.action_out_proj(x).to(x_t.dtype)"),
    "Alpamayo.expert_past was": ("        mask = (at < length[:, None]) | (at >= T)", "        mask = (at < length[:, None] - 1) | (at >= T)"),
    "Past.detach was": ("x.detach() for x in self.prefix)", "2 * x.detach() for x in self.prefix)"),
    "Alpamayo.drive was": ("            t = i / steps\n", "            t = (i + 0.5) / steps\n"),
    "MLP.__bases__ was": ("class MLP(nn.Module):", "class Base(nn.Module):\n    pass\n\n\nclass MLP(Base):"),
    "F was": ("import torch.nn.functional as F\n", "from types import SimpleNamespace\nimport torch.nn.functional\nF = SimpleNamespace(**vars(torch.nn.functional))\nF.silu = F.gelu\n"),
}  # fmt: skip


@pytest.mark.parametrize("said", SOURCES)
def test_an_edited_source(said, page_with, launched, stock_path, capsys):
    """Its class and its names are the same, but the page reads otherwise."""
    page = page_with(*SOURCES[said])
    model = tiny(page)
    with kernels.using("torch"):
        expected = drive(model)
    if "__bases__" not in said:
        assert (expected - stock_path).abs().max() > 0.02
    path, fast = by_kernels(model, launched)
    assert not fast and f"PyTorch for the flow ({said} edited)" in capsys.readouterr().err
    torch.testing.assert_close(path, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "old, new",
    [
        ("# seconds\nHORIZON", "# s\n\n# How many\nHORIZON"),
        ('    """An Euler step of the flow', '    """Euler: a step of the flow'),
        ("        angle = x[..., None] * self.freqs[0]", "        # radians\n\n        angle = x[..., None] *  self.freqs[0]"),
    ],
)  # fmt: skip
def test_words_about_it_may_change(old, new, page_with, launched, stock_path):
    path, fast = by_kernels(tiny(page_with(old, new)), launched)
    assert fast
    torch.testing.assert_close(path, stock_path, rtol=0, atol=1e-4)


UNICYCLE = {
    "DT": ("DT = 0.1  # seconds", "DT = 0.2"),
    "roll_out": ("    turn = DT * curvature", "    turn = 2 * DT * curvature"),
    "rot_of": ("    cos, sin = yaw.cos(), yaw.sin()", "    cos, sin = yaw.sin(), yaw.cos()"),
}


@pytest.mark.parametrize("name", [None, *UNICYCLE])
def test_an_edited_unicycle(name, page_with, launched, capsys):
    page = page_with(*UNICYCLE[name]) if name else alpamayo
    actions = torch.tensor([1.0, 0.05], device=DEVICE).expand(2, 16, 2)
    v0 = torch.tensor([3.0, 8.0], device=DEVICE)
    with kernels.using("torch"):
        expected = page.roll_out(actions, v0)
        unedited = alpamayo.roll_out(actions, v0)
    with kernels.using("triton"):
        ours = page.roll_out(actions, v0)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert ("_roll_out" in launched) == (name is None)
    if name:
        assert max((a - b).abs().max() for a, b in zip(expected, unedited)) > 0.1
        assert f"PyTorch for roll_out ({name} was edited)" in capsys.readouterr().err


@torch.no_grad()
def test_what_the_sampler_has_no_room_for(capsys, monkeypatch):
    """Layers of several lengths, or fewer than the expert's; tokens that are no power of two."""
    model = tiny()
    prompt = [(torch.zeros(1, 1, 3, 24, device=DEVICE),) * 2] * 2
    assert is_stock(model)
    assert not stock.is_flow(alpamayo.Alpamayo.drive, model, prompt[:1])
    uneven = [prompt[0], tuple(x[:, :, 1:] for x in prompt[1])]
    assert not stock.is_flow(alpamayo.Alpamayo.drive, model, uneven)
    monkeypatch.setattr(alpamayo, "HORIZON", 20)
    assert not is_stock(model)
    told = capsys.readouterr().err
    assert "HORIZON is 20" in told and told.count("the cache has layers") == 1


def test_a_source_that_is_not_the_code_in_memory(page_with, launched, tmp_path, capsys):
    """A page that was edited after it was imported, as by a change of branch, or that has no file."""
    page = page_with("F.silu(self.gate_proj(x))", "F.gelu(self.gate_proj(x))")
    (tmp_path / "edited.py").write_text(PAGE)  # the edit is gone from the disk, and still runs
    assert not by_kernels(tiny(page), launched)[1]
    page = page_with("F.silu(self.gate_proj(x))", "F.silu(self.gate_proj(x)) ", name="gone")
    os.remove(tmp_path / "gone.py")
    assert not by_kernels(tiny(page), launched)[1]
    told = capsys.readouterr().err
    assert told.count("cannot be read, or is not what runs") >= 1


def test_fingerprints():
    """Once the kernels follow an edit, this prints the lines for kernels/stock.py."""
    for piece, names in stock.PIECES.items():
        page = memory if piece == "adapters" else alpamayo
        for name, wanted in names.items():
            if isinstance(wanted, str):
                found = stock.fingerprint(attrgetter(name)(page), page)
                assert found == wanted, f'kernels/stock.py, {piece}: "{name}": "{found}",'


def sample(x, *,   y = f"{1 + 1} a"):
    """A docstring."""
    # a comment
    if (x  and
            y):  # two lines of one
        '''no statement'''
        return "it's" + f"{ x !r:>4} {y}"

    return not x


def test_what_a_fingerprint_is_of():
    """Of words and structure; one text for all versions of Python."""
    assert stock.plain_source(sample.__code__) == (
        'defsample(x,*,y=f"{1+1}a"):NEWLINEINDENTif(xandy):NEWLINEINDENT'
        'return"it\'s"+f"{x!r:>4}{y}"NEWLINEDEDENTreturnnotxNEWLINEDEDENT'
    )
