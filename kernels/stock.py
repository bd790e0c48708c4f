"""
Whether the model is still what the kernels write out again.

Most kernels are functions of tensors that the model calls, so an edit around them is honoured. Two
write a piece of the model out again: `sampler` the loop of Alpamayo.drive with the expert in it,
`flow_step` the unicycle of roll_out. They run only while that piece is as it was. Before each call
are compared

    the page      what its names mean, with PIECES: a thing, or the fingerprint of its source
    the modules   with new ones of the same Config: class, children, shapes, hooks, eps

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
from itertools import zip_longest
from operator import attrgetter, is_
from types import CodeType, FunctionType

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules import module as of_all

from kernels import prefix_attention, say

CLASSES = "Attention", "MLP", "Layer", "Expert", "Fourier", "ActionEmbed"
PIECES = {
    "roll_out": {"torch": torch, "DT": 0.1, "roll_out": "283184f7eff1", "rot_of": "c0adad838cd0"},
    "the flow": {
        "torch": torch, "math": math, "prefix_attention": prefix_attention.prefix_attention,
        "F": F, "F.linear": F.linear, "F.silu": F.silu, "F.rms_norm": F.rms_norm,
        "F.layer_norm": F.layer_norm, "nn": nn, "nn.Module.__call__": nn.Module.__call__,
        "nn.Linear.forward": nn.Linear.forward, "nn.SiLU.forward": nn.SiLU.forward,
        "nn.RMSNorm.forward": nn.RMSNorm.forward, "nn.LayerNorm.forward": nn.LayerNorm.forward,
        "nn.Sequential.forward": nn.Sequential.forward,
        **{f"{name}.__bases__": (nn.Module,) for name in CLASSES},
        **{f"{name}.__call__": nn.Module.__call__ for name in CLASSES},
        "Attention.__init__": "0c9697867ddf", "Attention.forward": "465e540ab6e6",
        "MLP.__init__": "8223deb045a0", "MLP.forward": "c4dc7ef8f4b1",
        "Layer.__init__": "432811218633", "Layer.forward": "5b7406caa385",
        "Expert.__init__": "471cc91445fd", "Expert.forward": "0c4c9d93676a",
        "Fourier.__init__": "1eebd909812c", "Fourier.forward": "8a30e7a87be0",
        "ActionEmbed.__init__": "d832f67c3df5", "ActionEmbed.forward": "24be111c6b3e",
        "rotate": "d1f69083920b", "euler_step": "fcb97f60077d", "Alpamayo.drive": "76f4dfe52ce3",
        "Alpamayo.velocity": "51bf40ed9505", "Alpamayo.expert_past": "8caf8797d9f3",
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
    if not isinstance(function, FunctionType) or function.__globals__ is not vars(page):
        return None
    if set(function.__code__.co_freevars) - {"__class__"}:  # values that the source does not show
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

as_new = weakref.WeakKeyDictionary()  # model: the traits of its parts in a new one


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


def traits(modules):
    """Six of each module, then three of each tensor: all that they compute with but its values."""
    tensors = tensors_in(modules)
    own = [*map(vars, modules)]
    return [
        *[len(m._modules) for m in modules],
        *map(type, modules),
        *map(len, own),  # a `forward` of its own is one more
        *[len(m._forward_hooks) for m in modules],
        *[len(m._forward_pre_hooks) for m in modules],
        *[x.get("eps") for x in own],
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
    found = traits(modules)
    if found == as_new[model]:
        return None
    odd = next(i for i, (x, y) in enumerate(zip_longest(found, as_new[model])) if x != y)
    if odd >= 6 * len(modules):
        return "a weight of what drives was edited"
    names = {m: name for part in parts for name, m in parts[part].named_modules(prefix=part)}
    return f"{names[modules[odd % len(modules)]]} was edited"


# --------------------------------------------------------------------------------------------------
# What the model asks


def edit_of_flow(page, model, layers):
    """What makes this model drive otherwise than `sample_flow` does, or None."""
    edit = edit_of_page(page, "the flow")
    if edit:
        return edit
    for name in ("velocity", "expert_past", "drive"):
        if getattr(getattr(model, name), "__func__", None) is not getattr(page.Alpamayo, name):
            return f"{type(model).__name__}.{name} was edited"
    if of_all._global_forward_hooks or of_all._global_forward_pre_hooks:
        return "there are hooks on all modules"
    if page.HORIZON not in (16, 32, 64, 128):
        return f"HORIZON is {page.HORIZON}, no power of two"
    edit = edit_of_modules(page, model)
    if edit:
        return edit
    if len(layers) != len(model.expert.layers) or len({x.shape for kv in layers for x in kv}) > 1:
        return "the cache has layers of several shapes, or not as many as the expert"
    return None


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


@torch.compiler.assume_constant_result  # torch.compile asks once, while it traces
def is_roll_out(roll_out):
    """Whether the kernel computes what `roll_out`, the model's function, has in PyTorch."""
    page = sys.modules.get(getattr(roll_out, "__module__", None))
    return unless(edit_of_page(page, "roll_out"), "roll_out")
