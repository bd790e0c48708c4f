"""
The kernels against PyTorch and against what the hardware allows.

    python -m kernels.bench

prints a table, and as its last line the same as JSON. With a GPU: milliseconds (median) of each kernel and of what else
computes the same (SDPA, compiled FlexAttention, flash-attn where installed), the largest error against float64 on the same
inputs, operations and bytes a second, and how far that is from the floor: no kernel can take less time than its products
at the rate of a large matrix product, nor than its inputs and outputs at the rate of a copy, both measured first. What n
samples share is counted once. Attention and salience are one layer's; `sample_flow` is the whole sampler, all layers and
steps, whose floor reads the expert's weights and the prefix once a step.

Without a GPU nothing is measured. The table then has the counted operations and bytes, the floors that they would have on
an H200, and what each launch compiles to for four chips. All of that is arithmetic, and says nothing of speed.
"""
import argparse
import copy
import json
import os
import sys
from dataclasses import dataclass, replace
from typing import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

import alpamayo
import kernels
from kernels import flow_step, prefix_attention, pruned_attention, salience, sampler

# What a copy and a large bf16 product reach on an H200, bytes/s and operations/s: for floors where there is no GPU.
H200 = 4.3e12, 788e12
UNPRUNED = "SDPA, nothing pruned"  # what pruning is to be faster than; it has another answer
CHIPS = (80, 90, 100, 120)  # A100; H100 and H200; B200; RTX 5090 and RTX PRO 6000


@dataclass
class Shape:
    """What the kernels meet in a model."""

    name: str
    cfg: alpamayo.Config
    images: int  # of a scene
    patches: int  # of an image
    prefix: int  # tokens of the prompt
    tail: int  # tokens that a sample has generated
    samples: tuple = (1, 6, 16)
    tokens: int = 64  # of the actions
    steps: int = 10  # of the flow


SHAPES = {
    "release": Shape("release", alpamayo.PRESETS["alpamayo-r1-10b"], images=16, patches=720, prefix=3000, tail=40),
    "nano": Shape("nano", alpamayo.PRESETS["nano"], images=8, patches=32, prefix=82, tail=20),
}


@dataclass
class Case:
    """One kernel at one shape."""

    kernel: str
    shape: str
    operations: float  # of the products that the formula asks for, two for each multiplication and addition
    traffic: float  # bytes: inputs read once, outputs written once
    make: Callable  # (device, dtype): ours, others, exact: functions of nothing; others() is {name: what else computes it}
    small: Callable = None  # the same launches in less memory, for the compiler; None: `make`


def exact(f, *args):
    """f of args in float64."""
    double = lambda x: [*map(double, x)] if isinstance(x, list) else x.double() if is_float(x) else x
    is_float = lambda x: torch.is_tensor(x) and x.is_floating_point()
    return lambda: f(*map(double, args))


def with_gradients(f, leaves, grads):
    """f of the leaves and the gradients of those that want one, for these gradients of its outputs: a tuple."""

    def run():
        y = f(*leaves)
        y = y if isinstance(y, tuple) else (y,)
        return *y, *torch.autograd.grad(y, [x for x in leaves if x.requires_grad], grads)

    return run


def exact_with_gradients(f, leaves, grads):
    double = lambda x: x.detach().double().requires_grad_(x.requires_grad)
    return lambda: with_gradients(f, [*map(double, leaves)], [*map(double, grads)])()


# ----------------------------------------------------------------------------------------------------------------------
# Cases: a function for each kernel


def salience_cases(shape):
    images, patches, H, d = shape.images, shape.patches, shape.cfg.v_head, shape.cfg.v_embd // shape.cfg.v_head

    def make(device, dtype):
        q, k = torch.randn(2, images, patches, H, d, dtype=dtype, device=device).transpose(2, 3)
        ours = lambda: salience.column_means(q, k)
        others = lambda: {"PyTorch": lambda: salience.specification(q, k)}
        return ours, others, exact(salience.specification, q, k)

    operations, traffic = 2 * 2 * d * images * patches**2 * H, 2 * 2 * images * patches * H * d
    yield Case("salience", f"{shape.name}, {images} x {patches}", operations, traffic, make)


def kept_at_random(images, patches, keep, device):
    """offsets and rows of patches that are kept in groups of 4: as in the tower, other numbers in each image."""
    groups = torch.randperm(images * patches // 4, generator=torch.Generator().manual_seed(0))
    groups = groups[: round(keep * len(groups))].sort().values
    rows = (groups[:, None] * 4 + torch.arange(4)).flatten()
    counts = (rows // patches).bincount(minlength=images)
    return torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).to(device), rows.to(device), counts


def flex_attention(sees, queries, keys, device, **options):
    """FlexAttention, compiled anew, under a mask: which numbers of queries and keys see one another."""
    from torch.nn.attention import flex_attention as flex

    torch.compiler.reset()  # it gives up on a function that was compiled for too many shapes
    mask = flex.create_block_mask(lambda b, h, i, j: sees(i, j), None, None, queries, keys, device)
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, **options)


def flash_attention():
    """The package flash-attn, or None."""
    try:
        import flash_attn
    except ImportError:
        return None
    return flash_attn


def pruned_attention_cases(shape):
    """Patches gathered in the kernel, from the joint matrix of queries, keys and values. The others are given a copy."""
    images, patches, H, d = shape.images, shape.patches, shape.cfg.v_head, shape.cfg.v_embd // shape.cfg.v_head

    def inputs(device, dtype, keep):
        qkv = torch.randn(images * patches, 3, H, d, dtype=dtype, device=device)
        return qkv, *kept_at_random(images, patches, keep, device)

    def forward(device, dtype, keep):
        qkv, offsets, rows, counts = inputs(device, dtype, keep)
        q, k, v = qkv.unbind(1)
        ours = lambda: pruned_attention.pruned_attention(q, k, v, offsets, patches, rows)
        truth = exact(pruned_attention.specification, q, k, v, offsets, patches, rows)
        return ours, lambda: others(q, k, v, offsets, rows, counts), truth

    def others(q, k, v, offsets, rows, counts):
        kept = [a[rows] for a in (q, k, v)]
        dense = [a.view(images, patches, H, d).transpose(1, 2) for a in (q, k, v)]
        found = {
            UNPRUNED: lambda: F.scaled_dot_product_attention(*dense).transpose(1, 2).reshape(-1, H, d)[rows],
            "SDPA, image by image": lambda: pruned_attention.specification(*kept, offsets, patches),
        }
        if q.is_cuda:
            image, heads = rows // patches, [a.transpose(0, 1)[None] for a in kept]
            flex = flex_attention(lambda i, j: image[i] == image[j], len(rows), len(rows), q.device)
            found["FlexAttention"] = lambda: flex(*heads)[0].transpose(0, 1)
            if flash := flash_attention():
                cu, most = offsets.int(), int(counts.max())
                found["flash-attn"] = lambda: flash.flash_attn_varlen_func(*kept, cu, cu, most, most)
        return found

    def both(device, dtype, keep):
        qkv, offsets, rows, _ = inputs(device, dtype, keep)
        leaves, grads = [qkv.requires_grad_()], [torch.randn(len(rows), H, d, dtype=dtype, device=device)]
        kernel = lambda qkv: pruned_attention.pruned_attention(*qkv.unbind(1), offsets, patches, rows)
        images_in_turn = lambda qkv: pruned_attention.specification(*qkv.unbind(1), offsets, patches, rows)
        others = lambda: {"SDPA, image by image": with_gradients(images_in_turn, leaves, grads)}
        truth = exact_with_gradients(images_in_turn, leaves, grads)
        return with_gradients(kernel, leaves, grads), others, truth

    for keep in (1.0, 0.5, 0.25):
        _, rows, counts = kept_at_random(images, patches, keep, "cpu")
        pairs, vector = int(counts.square().sum()) * H, 2 * len(rows) * H * d  # vector: bytes of q, or k, v, out
        name = f"{shape.name}, keep {keep}"
        yield Case("pruned_attention", name, 2 * 2 * d * pairs, 4 * vector, lambda *a, keep=keep: forward(*a, keep))
        # 2 products forward, 5 backward; q, k, v, out, and again with grad, and their gradients, of all rows
        traffic = 9 * vector + 3 * 2 * images * patches * H * d
        yield Case("pruned_attention + gradients", name, 7 * 2 * d * pairs, traffic, lambda *a, keep=keep: both(*a, keep))


def over_copies(q, k, v, causal):
    """SDPA over keys of which each sample has all: what the release does, and all that SDPA can."""
    mask = causal_lower_right(q.shape[2], k.shape[2]) if causal else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def prefix_attention_cases(shape):
    """One scene. No tail is masked but by causality: the others would be slower with masks."""
    cfg, P = shape.cfg, shape.prefix
    G, d = cfg.n_kv_head, cfg.head_dim

    def inputs(n, H, T, S, device, dtype):
        q = torch.randn(n, T, H, d, dtype=dtype, device=device).transpose(1, 2)  # as the projections give it
        k0, v0 = torch.randn(2, 1, G, P, d, dtype=dtype, device=device)
        k1, v1 = torch.randn(2, n, G, S, d, dtype=dtype, device=device)
        return q, k0, v0, k1, v1

    def others(q, n, T, S, causal):
        """{name: (how it wants prefix and tails together, attention of q over that)}."""
        copies = lambda x0, x1: torch.cat([x0.expand(n, -1, -1, -1), x1], 2)  # (n, G, P + S, d)
        once = lambda x0, x1: torch.cat([x0, x1.transpose(0, 1).flatten(1, 2)[None]], 2)  # (1, G, P + n S, d)
        found = {"SDPA, prefix copied": (copies, lambda q, k, v: over_copies(q, k, v, causal))}
        if q.is_cuda:  # the samples' queries as one sequence over one of keys: a mask says whose tail is whose

            def sees(i, j):
                own = (j - P) // S == i // T
                return (j < P) | (own & ((j - P) % S <= i % T) if causal else own)

            one = lambda x: x.transpose(0, 1).flatten(1, 2)[None]  # (n, H, T, d) to (1, H, n T, d)
            back = lambda y: y[0].unflatten(1, (n, T)).transpose(0, 1)
            flex = flex_attention(sees, n * T, P + n * S, q.device, enable_gqa=True)
            found["FlexAttention, one prefix"] = once, lambda q, k, v: back(flex(one(q), k, v))
            if flash := flash_attention():
                across = lambda x: x.transpose(1, 2)
                found["flash-attn, prefix copied"] = copies, lambda q, k, v: across(
                    flash.flash_attn_func(across(q), across(k), across(v), causal=causal)
                )
        return found

    def forward(n, H, T, S, device, dtype):
        q, k0, v0, k1, v1 = inputs(n, H, T, S, device, dtype)

        def theirs():  # copied or put together beforehand
            found = others(q, n, T, S, False).items()
            ready = {name: (lay(k0, k1), lay(v0, v1), attend) for name, (lay, attend) in found}
            return {name: lambda k=k, v=v, attend=attend: attend(q, k, v) for name, (k, v, attend) in ready.items()}

        ours = lambda: prefix_attention.prefix_attention(q, k0, v0, k1, v1)
        return ours, theirs, exact(prefix_attention.specification, q, k0, v0, k1, v1)

    def both(n, H, T, S, causal, device, dtype):
        q, k0, v0, k1, v1 = inputs(n, H, T, S, device, dtype)
        leaves, grads = [q.requires_grad_(), k0, v0, k1.requires_grad_(), v1.requires_grad_()], [torch.randn_like(q)]
        if causal:  # the language model's own prompt; the expert's comes without gradient
            k0.requires_grad_(), v0.requires_grad_()
        mask = torch.ones(T, S, dtype=torch.bool, device=device).tril().expand(n, -1, -1) if causal else None
        kernel = lambda *a: prefix_attention.prefix_attention(*a, None, mask)
        together = lambda lay, attend: lambda q, k0, v0, k1, v1: attend(q, lay(k0, k1), lay(v0, v1))
        theirs = lambda: {
            name: with_gradients(together(*how), leaves, grads) for name, how in others(q, n, T, S, causal).items()
        }
        truth = exact_with_gradients(lambda *a: prefix_attention.specification(*a, None, mask), leaves, grads)
        return with_gradients(kernel, leaves, grads), theirs, truth

    def case(gradients, what, n, H, T, S, causal=False):
        pairs = n * H * T * (P + (S - (T - 1) / 2 if causal else S))
        queries = 2 * n * H * T * d  # bytes of q, or y
        prefix, tails = 2 * 2 * G * P * d, 2 * 2 * n * G * S * d  # of their keys and values
        name, args = f"{shape.name}, {what}, {n} sample{'s' * (n > 1)}", (n, H, T, S)
        operations, traffic = 2 * 2 * d * pairs, 2 * queries + prefix + tails
        if not gradients:
            return Case("prefix_attention", name, operations, traffic, lambda *a: forward(*args, *a))
        # backward: the score again, the gradients of weight and q, and, where it is wanted, those of key and value
        of_keys = pairs if causal else n * H * T * S
        operations += 2 * d * (3 * pairs + 2 * of_keys)
        traffic += 4 * queries + prefix + tails + (prefix if causal else 0) + tails
        return Case("prefix_attention + gradients", name, operations, traffic, lambda *a: both(*args, causal, *a))

    for n in shape.samples:
        yield case(False, "decoding", n, cfg.n_head, 1, shape.tail)
    for n in shape.samples:
        yield case(False, "expert", n, cfg.e_head, shape.tokens, shape.tail + shape.tokens)
    n = shape.samples[1]
    yield case(True, "expert", n, cfg.e_head, shape.tokens, shape.tail + shape.tokens)
    # reinforcement learning reads the group's reasoning once more, all tokens at once
    yield case(True, "reasoning", n, cfg.n_head, shape.tail, shape.tail, causal=True)


def expert_of(cfg, device, dtype):
    """Expert, action embedding and projection with random weights. The embedding's frequencies end at 1, not at 100, which
    costs the same: else ten steps of random weights amplify rounding until nothing is left to compare."""
    with torch.device(device):
        cfg = replace(cfg, a_max_freq=1.0)
        parts = alpamayo.Expert(cfg), alpamayo.ActionEmbed(cfg), torch.nn.Linear(cfg.e_embd, 2)
    return [part.to(dtype).requires_grad_(False) for part in parts]


def numbers(*parts, matrices=False):
    return sum(p.numel() for part in parts for p in part.parameters() if p.ndim == 2 or not matrices)


def flow_step_cases(shape):
    """What lies between two evaluations of the expert, in buffers that are there, as the sampler calls it."""
    T, C = shape.tokens, shape.cfg.e_embd

    def make(n, device, dtype):
        parts = expert_of(replace(shape.cfg, n_layer=0), device, dtype)
        out, embed = sampler.weights_of(*parts)
        x, hidden = torch.randn(n, T, 2, device=device), torch.randn(n, T, C, dtype=dtype, device=device)
        t = torch.full((n,), 0.5, device=device)
        after, tokens, share = torch.empty_like(x), torch.empty_like(hidden), flow_step.time_share(t[:1], embed)
        scratch = flow_step.scratch_of(x, embed[-4])

        def ours():
            flow_step.step_into(after, tokens, x, hidden, out, 0.1, share, embed, scratch)
            return after, tokens

        args = x, hidden, out, 0.1, t, embed
        return ours, lambda: {"PyTorch": lambda: flow_step.specification(*args)}, exact(flow_step.specification, *args)

    _, *parts = expert_of(replace(shape.cfg, n_layer=0), "meta", torch.bfloat16)
    for n in shape.samples:
        operations = 2 * n * T * numbers(*parts, matrices=True)
        traffic = 2 * numbers(*parts) + n * T * (2 * 2 * C + 2 * 4 * 2)  # weights; hidden states and tokens; x and the next
        name = f"{shape.name}, {n} sample{'s' * (n > 1)}"
        yield Case("flow_step", name, operations, traffic, lambda *a, n=n: make(n, *a))


def roll_out_cases(shape):
    """The unicycle: in every model the same, and in float32 whatever the model is in."""
    n, T = shape.samples[-1], shape.tokens

    def make(gradients, device, dtype):
        actions = torch.randn(n, T, 2, device=device) * torch.tensor([1, 0.05], device=device)  # m/s^2, 1/m
        leaves = [actions, 20 * torch.rand(n, device=device)]  # m/s
        kernel, unicycle = flow_step.roll_out_by_kernel, in_pytorch(alpamayo.roll_out)
        if not gradients:
            others = lambda: {"PyTorch": lambda: unicycle(*leaves)}
            return lambda: kernel(*leaves), others, exact(unicycle, *leaves)
        grads = [torch.randn(n, T, *size, device=device) for size in ((3,), (3, 3))]
        leaves = [x.requires_grad_() for x in leaves]
        others = lambda: {"PyTorch": with_gradients(unicycle, leaves, grads)}
        return with_gradients(kernel, leaves, grads), others, exact_with_gradients(unicycle, leaves, grads)

    name, traffic = f"{n} samples", 4 * n * (T * (2 + 3 + 9) + 1)  # and no products
    yield Case("roll_out", name, 0, traffic, lambda *a: make(False, *a))
    yield Case("roll_out + gradients", name, 0, traffic + 4 * n * (T * (2 * 2 + 3 + 9) + 2), lambda *a: make(True, *a))


def in_pytorch(f):
    """f with no kernel in it."""

    def run(*args):
        before, kernels._choice = kernels._choice, "torch"
        try:
            return f(*args)
        finally:
            kernels._choice = before

    return run


def plain_loop(parts, steps, x, cos, sin, past):
    """The loop of Alpamayo.integrate, from noise x: all its steps, (steps + 1, n, T, 2)."""
    (expert, embed, project), flow = parts, [x]
    for i in range(steps):
        t = torch.full((len(x),), i / steps, dtype=x.dtype, device=x.device)
        flow.append(flow[-1] + project(expert(embed(flow[-1], t), cos, sin, past)).to(x.dtype) / steps)
    return torch.stack(flow)


def moved(flow):
    """How far each step is from the noise, which all have in common and which would make errors look small."""
    return flow[1:] - flow[0]


def loop_over_copies(parts, steps, x, cos, sin, prefix, tail):
    """The same with the prefix copied for each sample, as the release does, here into one cache that stays in place."""
    n, T = len(x), x.shape[1]
    room = lambda x0, x1: torch.cat([x0.expand(n, -1, -1, -1), x1, x1.new_empty(n, x1.shape[1], T, x1.shape[3])], 2)
    past = [alpamayo.Past((room(k0, k1), room(v0, v1))) for (k0, v0), (k1, v1) in zip(prefix, tail)]

    def attend(q, k, v, own_k, own_v, mask0, mask1):
        k[:, :, -T:], v[:, :, -T:] = own_k, own_v
        return over_copies(q, k, v, False)

    def run():
        before, alpamayo.prefix_attention = alpamayo.prefix_attention, attend
        try:
            return moved(plain_loop(parts, steps, x, cos, sin, past))
        finally:
            alpamayo.prefix_attention = before

    return run


def sampler_cases(shape):
    cfg, P, S, T = shape.cfg, shape.prefix, shape.tail, shape.tokens
    G, d = cfg.n_kv_head, cfg.head_dim

    def make(n, cfg, steps, device, dtype):
        parts = expert_of(cfg, device, dtype)
        noise, seen = torch.randn(n, T, 2, device=device), torch.ones(n, S, dtype=torch.bool, device=device)
        cos, sin = alpamayo.rope((P + S + torch.arange(T, device=device)).expand(3, n, -1), cfg, dtype)
        kv = lambda *size: [torch.randn(2, *size, d, dtype=dtype, device=device).unbind(0) for _ in range(cfg.n_layer)]
        prefix, tail = kv(1, G, P), kv(n, G, S)
        past = [alpamayo.Past(kv, own) for kv, own in zip(prefix, tail)]

        def truth():
            double = lambda x: x.double() if torch.is_tensor(x) else x
            inputs = [double(x) for x in (noise, cos, sin)], [[double(x) for x in layer] for layer in past]
            return moved(plain_loop([copy.deepcopy(part).double() for part in parts], steps, *inputs[0], inputs[1]))

        others = lambda: {
            "PyTorch": lambda: moved(in_pytorch(plain_loop)(parts, steps, noise, cos, sin, past)),
            "PyTorch, prefix copied": loop_over_copies(parts, steps, noise, cos, sin, prefix, tail),
        }
        ours = lambda: moved(sampler.sample_flow(*parts, steps, noise, cos, sin, prefix, tail, seen))
        return ours, others, truth

    parts = expert_of(cfg, "meta", torch.bfloat16)
    for n in shape.samples:
        pairs = cfg.n_layer * cfg.e_head * n * T * (P + S + T)
        keys = cfg.n_layer * 2 * G * (P + n * S) * d  # and values; those of the actions are made on the way
        operations = shape.steps * 2 * (n * T * numbers(*parts, matrices=True) + 2 * d * pairs)
        traffic = shape.steps * 2 * (numbers(*parts) + keys)
        name = f"{shape.name}, {n} sample{'s' * (n > 1)}"
        # The compiler is shown one layer and two steps. Which launches there are depends on neither.
        yield Case("sample_flow", name, operations, traffic, lambda *a, n=n: make(n, cfg, shape.steps, *a),
                   lambda *a, n=n: make(n, replace(cfg, n_layer=1), 2, *a))  # fmt: skip


CASES = {
    "salience": salience_cases, "pruned_attention": pruned_attention_cases, "prefix_attention": prefix_attention_cases,
    "flow_step": flow_step_cases, "roll_out": roll_out_cases, "sampler": sampler_cases,
}  # fmt: skip
LAYERS = """Attention and salience are of one layer: the release has 27 in the tower, 36 in language model and expert. The nano's
data stay in a GPU's L2 cache, and a launch alone takes microseconds, so that its floors are out of reach."""


def counts(case):
    return dict(kernel=case.kernel, shape=case.shape, operations=case.operations, traffic=case.traffic)


def widths(cases):
    """Of the columns of kernels and shapes. The second has, indented, what else computes the same: up to 26 letters."""
    return max(len(case.kernel) for case in cases) + 2, max(30, *(len(case.shape) + 2 for case in cases))


# ----------------------------------------------------------------------------------------------------------------------
# With a GPU


def ceilings(clock, device):
    """Bytes a second of a copy, operations a second of a large product in bf16."""
    a, b = torch.empty(2, 2**29, dtype=torch.uint8, device=device)
    x = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    return 2 * a.numel() / clock(lambda: b.copy_(a)), 2 * 8192**3 / clock(lambda: x @ x)


def floor(case, ceiling):
    """Seconds, and what sets them."""
    memory, compute = case.traffic / ceiling[0], case.operations / ceiling[1]
    return max(memory, compute), "memory" if memory > compute else "compute"


def error_of(result, truth):
    """The largest, relative to the largest number; of several outputs the worst one's."""
    pairs = zip(result, truth, strict=True) if isinstance(truth, tuple) else [(result, truth)]
    return max(float((a.detach().double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def failed(e):
    return dict(failed=f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}")


def measure(case, device, clock, dtype=torch.bfloat16):
    """Seconds of ours and of the others, and the error of each; or, of another, what kept it from running."""
    ours, others, truth = case.make(device, dtype)
    truth = truth()

    def look(name, f):
        f()  # compiles, and records a graph; what is timed, and compared, comes after
        return dict(error=None if name == UNPRUNED else error_of(f(), truth), seconds=clock(f))

    result = {"ours": look("ours", ours)}
    for name, f in others().items():
        try:
            result[name] = look(name, f)
        except Exception as e:
            result[name] = failed(e)
    return result


def on_gpu(cases, device):
    from triton.testing import do_bench

    clock = lambda f: do_bench(f, return_mode="median") / 1e3
    ceiling, (first, second) = ceilings(clock, device), widths(cases)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {kernels.triton.__version__}")
    print(f"a copy {ceiling[0] / 1e12:.2f} TB/s, a large bf16 product {ceiling[1] / 1e12:.0f} TFLOP/s\n{LAYERS}\n")
    print(f"{'':{first}}{'':{second}}{'ms':>10}{'error':>9}{'TFLOP/s':>9}{'TB/s':>7}{'x floor':>9}{'x ours':>8}")
    rows = []
    for case in cases:
        least, _ = floor(case, ceiling)
        try:
            result = measure(case, device, clock)
        except Exception as e:  # of ours, or of its reference; the other cases may run
            result = {"ours": failed(e)}
        for name, r in result.items():
            head = f"{case.kernel:{first}}{case.shape:{second}}" if name == "ours" else f"{'':{first}}  {name:{second - 2}}"
            if "failed" in r:
                print(f"{head}  {r['failed'][:100]}", flush=True)
                continue
            s, error = r["seconds"], "-" if r["error"] is None else f"{r['error']:.1e}"
            rates = f"{case.operations / s / 1e12:9.1f}{case.traffic / s / 1e12:7.2f}{s / least:9.2f}"
            print(f"{head}{s * 1e3:10.4f}{error:>9}{rates}{s / result['ours']['seconds']:8.2f}", flush=True)
        rows.append(counts(case) | dict(floor=least, **result))
    return dict(copy=ceiling[0], product=ceiling[1], cases=rows)


# ----------------------------------------------------------------------------------------------------------------------
# Without


def analytic(cases):
    print("Nothing was measured: there is no GPU here. Floors are arithmetic, for an H200 at "
          f"{H200[0] / 1e12} TB/s and {H200[1] / 1e12:.0f} TFLOP/s.\n{LAYERS}\n")  # fmt: skip
    first, second = widths(cases)
    print(f"{'':{first}}{'':{second}}{'GFLOP':>11}{'MB':>11}{'floor, us':>11}")
    rows = []
    for case in cases:
        least, by = floor(case, H200)
        counted = f"{case.operations / 1e9:11.3f}{case.traffic / 1e6:11.2f}{least * 1e6:11.2f} {by}"
        print(f"{case.kernel:{first}}{case.shape:{second}}{counted}")
        rows.append(counts(case) | dict(floor=least))
    return rows


def compile_report(cases):
    """What the launches of these cases compile to, by tests/cpu_triton.py."""
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests"))
    from cpu_triton import compiling

    _, second = widths(cases)
    print(f"\nCompiled by triton {kernels.triton.__version__} for chips that are not here, bf16. blocks: how many fit on a "
          "multiprocessor. A launch that\nis the same machine code at another shape is told once.\n\n"  # fmt: skip
          f"{'':18}{'':{second}}{'chip':>6}{'registers':>11}{'spilled':>9}{'shared, KB':>12}{'blocks x warps':>16}  matrix")
    rows, seen = [], set()
    kernels.use("triton")
    for case in cases:
        ours, _, _ = (case.small or case.make)("cpu", torch.bfloat16)
        for chip in CHIPS:
            sampler.kept.clear()  # its buffers are laid out for one chip
            with compiling(chip) as builds:
                ours()
            for b in builds:
                if b.sass in seen:
                    continue
                seen.add(b.sass)
                matrix = f"{b.instructions[b.matrix()]} {b.matrix()}" if b.matrix() else "-"
                print(f"{b.kernel:18}{case.shape:{second}}{b.chip:6}{b.registers:11}{b.spilled:9}{b.shared / 1024:12.1f}"
                      f"{b.blocks:12} x {b.warps}  {matrix}", flush=True)  # fmt: skip
                rows.append(dict(kernel=b.kernel, shape=case.shape, chip=b.chip, registers=b.registers, spilled=b.spilled,
                                 shared=b.shared, blocks=b.blocks, warps=b.warps, matrix=b.matrix()))  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="this one only (default: all)")
    parser.add_argument("--kernel", choices=CASES, help="the cases of this one only (default: all)")
    parser.add_argument("--no-compile", action="store_true", help="without a GPU: leave out the compile report")
    flags = parser.parse_args()
    shapes = [SHAPES[flags.shape]] if flags.shape else SHAPES.values()
    makers = [CASES[flags.kernel]] if flags.kernel else CASES.values()
    cases = [case for make in makers for shape in shapes for case in make(shape)]
    cases = list({(case.kernel, case.shape): case for case in cases}.values())  # the roll-out is in all shapes the same
    report = dict(torch=torch.__version__, triton=kernels.triton.__version__)
    if torch.cuda.is_available():
        kernels.use("triton")
        report |= dict(device=torch.cuda.get_device_name(), measured=True, **on_gpu(cases, torch.device("cuda")))
    else:
        report |= dict(device="none", measured=False, cases=analytic(cases))
        if kernels.triton.__version__ is None:
            print("\nTriton is not installed: nothing was compiled.")
        elif not flags.no_compile:
            report["builds"] = compile_report(cases)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
