"""
Whether the model is still what the kernels write out again.

Most kernels are functions of tensors that the model calls, so an edit around them is honoured. Two
write a piece of the model out again: `sampler` the loop of Alpamayo.drive with the expert in it,
`flow_step` the unicycle of roll_out. `decoding` records a pass of the language model, so what
Python would do anew each time is not done. All three run only while that piece is as it was. Before
each call are compared

    the page      what its names mean, with PIECES: a thing, or the fingerprint of its source
    the modules   with new ones of the same Config: class, children, shapes, hooks, numbers
    the call      no gradients, no mode of torch, a cache that the buffers have room for

Where something differs PyTorch runs, and a line on stderr names it. A source that cannot be read,
or is not that of the code in memory, differs too. Who has brought the kernels up to date with an
edit puts the new fingerprint here; tests/test_kernels_edits.py prints it.
"""
import functools
import hashlib
import inspect
import linecache
import math
import sys
import tokenize
import weakref
from collections import namedtuple
from operator import attrgetter, is_
from types import CodeType, FunctionType

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules import module as of_all
from torch.utils import _python_dispatch
from torch.utils._device import DeviceContext
from torch.utils.checkpoint import checkpoint

from kernels import prefix_attention, say

CALLS = "__call__", "_call_impl", "_compiled_call_impl"  # what runs before a forward
Past = namedtuple("Past", "prefix tail prefix_mask mask")


def meaning(torchs, classes):
    """What torch's modules, and all that a page's classes get from nn.Module, should mean."""
    own = {f"{name}.__bases__": (nn.Module,) for name in classes}
    for name in ("nn.Module", *torchs, *classes):
        own |= {f"{name}.{call}": getattr(nn.Module, call) for call in CALLS}
    return own | {f"{name}.forward": attrgetter(name[3:])(nn).forward for name in torchs}


LAYER = {  # of the expert and of the language model
    "torch": torch, "math": math, "nn": nn, "F": F, "F.linear": F.linear, "F.silu": F.silu,
    "F.rms_norm": F.rms_norm, "prefix_attention": prefix_attention.prefix_attention,
    "Past.__bases__": (tuple,), "Past.detach": "00502331ed94",
    **{f"Past.{name}.__code__": getattr(Past, name).__code__
       for name in ("__new__", "_make", "_replace")},
    "Attention.__init__": "0c9697867ddf", "Attention.forward": "465e540ab6e6",
    "MLP.__init__": "8223deb045a0", "MLP.forward": "c4dc7ef8f4b1",
    "Layer.__init__": "432811218633", "Layer.forward": "5b7406caa385", "rotate": "d1f69083920b",
    **meaning(["nn.Linear", "nn.RMSNorm"], ["Attention", "MLP", "Layer"]),
}  # fmt: skip
PIECES = {
    "roll_out": {"torch": torch, "DT": 0.1, "roll_out": "63df729b3884", "rot_of": "c0adad838cd0"},
    "the flow": {
        **LAYER, "F.layer_norm": F.layer_norm,
        **meaning(
            ["nn.SiLU", "nn.LayerNorm", "nn.Sequential"], ["Expert", "Fourier", "ActionEmbed"]
        ),
        "Expert.__init__": "471cc91445fd", "Expert.forward": "0c4c9d93676a",
        "Fourier.__init__": "1eebd909812c", "Fourier.forward": "8a30e7a87be0",
        "ActionEmbed.__init__": "d832f67c3df5", "ActionEmbed.forward": "24be111c6b3e",
        "euler_step": "fcb97f60077d", "Alpamayo.drive": "3a519a4eecdd",
        "Alpamayo.velocity": "b1a7427772e1", "Alpamayo.expert_past": "b6458945dc2d",
    },
    "the thought": {
        **LAYER, "F.embedding": F.embedding, **meaning(["nn.Embedding"], ["LanguageModel"]),
        "LanguageModel.forward": "ea0e4013572d", "Alpamayo.think": "678ace354ff1",
    },
    "adapters": {
        "F": F, "F.linear": F.linear, **meaning([], ["Adapted"]), "Adapted.forward": "a8fd3283d043",
    },
}  # fmt: skip
meanings = {piece: attrgetter(*names) for piece, names in PIECES.items()}
compared = {}  # (page, piece): what its names meant when they were compared, and the edit


# --------------------------------------------------------------------------------------------------
# The page


@functools.lru_cache(1)
def codes_of(text):
    """All code that a file compiles to."""
    codes = [compile(text, "", "exec", dont_inherit=True)]
    for code in codes:  # it grows
        codes += [x for x in code.co_consts if isinstance(x, CodeType)]
    return codes


def plain_source(code):
    """Source without comments, docstring and white space, the same for every version of Python.
    OSError if it cannot be read, or does not compile to this code."""
    lines, _ = inspect.getsourcelines(code)
    if code not in codes_of("".join(linecache.getlines(code.co_filename))):
        raise OSError("the file was changed after it was imported")
    text, line = "", []
    for kind, word, *_ in tokenize.generate_tokens(iter(lines).__next__):
        if kind in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            if [k for k, _ in line] != [tokenize.STRING]:  # else a docstring
                text += "".join(w for _, w in line) + tokenize.tok_name[kind]
            line = []
        elif kind not in (tokenize.COMMENT, tokenize.NL):
            line.append((kind, word))
    return "".join(text.split())


def fingerprint(function, page):
    """Of the source of a page's own function; None if it is something else."""
    own = isinstance(function, FunctionType) and function.__globals__ is vars(page)
    if not own or set(function.__code__.co_freevars) - {"__class__"}:  # values it does not show
        return None
    return hashlib.sha256(plain_source(function.__code__).encode()).hexdigest()[:12]


def first_edit(page, piece, meant):
    """The first name of a piece that does not mean on the page what it should, or None."""
    for (name, wanted), found in zip(PIECES[piece].items(), meant):
        try:
            if isinstance(wanted, str):
                found = fingerprint(found, page)
        except (OSError, SyntaxError, tokenize.TokenError):
            return f"the source of {name} cannot be read, or is not what runs"
        if found is not wanted and (type(found), found) != (type(wanted), wanted):
            return f"{name} was edited"
    return None


def edit_of_page(page, piece):
    """What was edited in a piece of the model, or None. Looked for again when a name means another
    object than last time, or has other code."""
    try:
        now = meanings[piece](page)
    except AttributeError as error:
        return str(error)
    now += tuple(getattr(x, "__code__", None) for x in now)
    before, edit = compared.get((page, piece), (None, None))
    if before is None or not all(map(is_, now, before)):
        edit = first_edit(page, piece, now)
        compared[page, piece] = now, edit
    return edit


# --------------------------------------------------------------------------------------------------
# The modules

COUNTED = "_modules", "_forward_hooks", "_forward_pre_hooks"
NUMBERS = "eps", "normalized_shape", "n_head", "n_kv_head", "head_dim", "on", "max_norm"
as_new = weakref.WeakKeyDictionary()  # model: the traits of its parts in a new one
made_of = weakref.WeakKeyDictionary()  # language model: {class: what its modules have when new}


def all_in(parts):
    """Modules and all modules in them."""
    modules = list(parts)
    for m in modules:  # it grows
        if m._modules:
            modules += [child for child in m._modules.values() if child is not None]
    return modules


def tensors_in(modules):
    """The modules' own parameters and buffers."""
    own = [m._parameters for m in modules] + [m._buffers for m in modules]
    return [x for some in own if some for x in some.values() if x is not None]


def own_of(module):
    """What a module has of its own. A `forward` that checkpoints its class's (memory.py) is none:
    without gradients it is the class's."""
    own = vars(module)
    forward = own.get("forward")
    if type(forward) is functools.partial and forward.func is checkpoint:
        if forward.args == (type(module).forward.__get__(module),):
            own = {name: value for name, value in own.items() if name != "forward"}
    return own


def traits(modules):
    """Of modules, and of their tensors: all that they compute with but the tensors' values."""
    tensors = tensors_in(modules)
    own = [*map(own_of, modules)]  # a `forward` of its own is one more
    counts = [[len(x[name]) for x in own] for name in COUNTED]
    numbers = [[x.get(name) for x in own] for name in NUMBERS]
    return [[*map(type, modules)], [*map(len, own)], *counts, *numbers], [
        len({x.dtype for x in tensors if type(x) is nn.Parameter}),
        *map(type, tensors),
        *map(torch.Tensor.size, tensors),
        *map(torch.Tensor.is_contiguous, tensors),
    ]


def edit_of_modules(page, model):
    """Which of the modules that drive is not like a new one, or None."""
    parts = {name: getattr(model, name) for name in ("expert", "action_in_proj", "action_out_proj")}
    if model not in as_new:
        cfg = model.cfg
        with torch.device("meta"):
            new = page.Expert(cfg), page.ActionEmbed(cfg), nn.Linear(cfg.e_embd, 2)
        as_new[model] = traits(all_in(new))
    modules = all_in(parts.values())
    found, new = traits(modules), as_new[model]
    if found == new:
        return None
    had = zip(*found[0]), zip(*new[0])
    names = {m: name for part in parts for name, m in parts[part].named_modules(prefix=part)}
    odd = [names[m] for m, x, y in zip(modules, *had) if x != y]  # parents first
    return f"{odd[0] if odd else 'a weight of what drives'} was edited"


# --------------------------------------------------------------------------------------------------
# What the model asks

MODES = [
    getattr(torch.overrides, "_get_current_function_mode_stack", list),
    getattr(_python_dispatch, "_get_current_dispatch_mode_stack", list),
]


def edit_around(page, model, piece, methods):
    """What was edited in a piece's page, methods and call, or None."""
    edit = edit_of_page(page, piece)
    if edit:
        return edit
    for name in methods:
        if getattr(getattr(model, name), "__func__", None) is not getattr(page.Alpamayo, name):
            return f"{type(model).__name__}.{name} was edited"
    if of_all._global_forward_hooks or of_all._global_forward_pre_hooks:
        return "there are hooks on all modules"
    if torch.is_grad_enabled():  # noise may require them, whatever the weights do
        return "gradients are enabled"
    active = {type(x) for stack in MODES for x in stack()} - {DeviceContext}  # a default device
    if active:
        return f"{active.pop().__name__} is active"
    return None


def edit_of_flow(page, model, layers):
    """What makes this model drive otherwise than `sample_flow` does, or None."""
    edit = edit_around(page, model, "the flow", ("velocity", "expert_past", "drive"))
    if edit:
        return edit
    if page.HORIZON not in (16, 32, 64, 128):
        return f"HORIZON is {page.HORIZON}, no power of two"
    edit = edit_of_modules(page, model)
    if edit:
        return edit
    if len(layers) != len(model.expert.layers) or len({x.shape for kv in layers for x in kv}) > 1:
        return "the cache has layers of several shapes, or not as many as the expert"
    return None


def edit_of_thought(page, model, layers):
    """What makes a token's pass through this language model one that may differ from the last in
    more than its tensors, or None."""
    edit = edit_around(page, model, "the thought", ("think",))
    if edit:
        return edit
    lm = model.vlm.model.language_model
    if lm not in made_of:
        with torch.device("meta"):
            new = page.LanguageModel(model.cfg)
        made_of[lm] = {type(m): (set(vars(m)), set(m._modules)) for m in new.modules()}
    adapters = sys.modules.get("memory")
    for name, m in lm.named_modules():
        own = own_of(m)
        has, parts = made_of[lm].get(type(m), ((), None))
        if adapters and type(m) is adapters.Adapted and not edit_of_page(adapters, "adapters"):
            has, parts = {*made_of[lm][nn.Linear][0], "on"}, set()
        hooked = any(own[x] for x in COUNTED[1:])
        if parts != set(own["_modules"]) or hooked or not set(own) <= set(has):
            return " ".join(filter(None, ["language_model", name])) + " was edited"
    if {type(x) for x in tensors_in(all_in([lm]))} - {nn.Parameter}:
        return "a weight of the language model is of another type"
    if len(layers) != len(lm.layers) or len({x.shape for kv in layers for x in kv}) > 1:
        return "the cache has layers of several shapes, or not as many as the language model"
    return None


def state_of(module):
    """All that a recording of a module depends on: what its parts compute with, and where their
    tensors lie."""
    modules = all_in([module])
    return traits(modules), [x.data_ptr() for x in tensors_in(modules)]


def unless(edit, piece):
    """Whether there is no edit. One is told."""
    if edit:
        say(f"PyTorch for {piece} ({edit})")
    return not edit


def is_flow(drive, model, layers):
    """Whether `sample_flow` computes what `drive`, Alpamayo's method, has in PyTorch for a model.
    layers: the prompt's keys and values (B, G, P, d) of each."""
    page = sys.modules.get(getattr(drive, "__module__", None))
    return unless(edit_of_flow(page, model, layers), "the flow")


def is_thought(think, model, layers):
    """Whether `decoding` may record what `think`, Alpamayo's method, runs for each token. layers:
    as in `is_flow`."""
    page = sys.modules.get(getattr(think, "__module__", None))
    return unless(edit_of_thought(page, model, layers), "the thought")


@torch.compiler.assume_constant_result  # torch.compile asks once, while it traces
def is_roll_out(roll_out):
    """Whether the kernel computes what `roll_out`, the model's function, has in PyTorch."""
    page = sys.modules.get(getattr(roll_out, "__module__", None))
    return unless(edit_of_page(page, "roll_out"), "roll_out")
