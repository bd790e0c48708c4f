"""
The kernels against PyTorch and against what the hardware allows.

    python -m kernels.bench

prints a table, and as its last line the same as JSON. With a GPU: milliseconds (median) of each
kernel and of its rivals, which compute the same (SDPA, compiled FlexAttention, flash-attn where
installed); the largest error against float64 on the same inputs; operations and bytes a second; and
how far that is from the floor. No kernel can take less time than its products at the rate of a
large matrix product, nor than its inputs and outputs at the rate of a copy. Both rates are measured
first. What n samples share is counted once. Attention and salience are one layer's. `sample_flow`
is the whole sampler, all layers and steps; its floor reads the expert's weights and the prefix once
a step.

Without a GPU nothing is measured. The table then has the counted operations and bytes, their floors
on an H200, and what each launch compiles to for four chips. All of that is arithmetic and says
nothing of speed.
"""
import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

import alpamayo
import kernels
from kernels import flow_step, prefix_attention, pruned_attention, salience, sampler

# What a copy and a large bf16 product reach on an H200, bytes/s and operations/s: for floors where
# there is no GPU.
H200 = 4.3e12, 788e12
CHIPS = (80, 90, 100, 120)  # A100; H100 and H200; B200; RTX 5090 and RTX PRO 6000
UNPRUNED = "SDPA, nothing pruned"  # pruning is to be faster; the answer is another
LAYERS = """Attention and salience are of one layer. The release has 27 in the tower, 36 in language
model and expert. The nano's data stay in a GPU's L2 cache, and a launch alone takes microseconds,
so its floors are out of reach."""


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
    "release": Shape("release", alpamayo.PRESETS["alpamayo-r1-10b"], 16, 720, 3000, 40),
    "nano": Shape("nano", alpamayo.PRESETS["nano"], 8, 32, 82, 20),
}


@dataclass
class Problem:
    """Inputs, and functions of them that compute the same."""

    inputs: list  # tensors, modules, numbers, lists of them
    ours: Callable
    plain: Callable  # the PyTorch that defines it
    rivals: Callable = None  # of the inputs: {name: (prepare, f)}, see `run`; None: `plain` alone
    grads: list = None  # of the outputs, where the gradients of the inputs are part of the problem

    def run(self, f, prepare=None):
        """f(*inputs), or f(*prepare(*inputs)), as a function of nothing. It prepares once, before.
        With gradients it prepares each time, as they go through that, and returns them behind the
        outputs."""
        if self.grads is None:
            inputs = prepare(*self.inputs) if prepare else self.inputs
            return lambda: f(*inputs)
        leaves = [x for x in self.inputs if torch.is_tensor(x) and x.requires_grad]

        def both():
            y = f(*(prepare(*self.inputs) if prepare else self.inputs))
            y = y if isinstance(y, tuple) else (y,)
            return *y, *torch.autograd.grad(y, leaves, self.grads)

        return both

    def truth(self):
        """What `plain` computes in float64."""
        exact = replace(self, inputs=in_float64(self.inputs), grads=in_float64(self.grads))
        return exact.run(self.plain)()

    def others(self):
        """{name: function of nothing}: the rivals, which may fail when they run."""
        if self.rivals is None:
            return {"PyTorch": self.run(self.plain)}
        found = self.rivals(*self.inputs).items()
        return {name: self.run(f, prepare) for name, (prepare, f) in found}


def in_float64(x):
    """A copy of tensors, modules, or lists of them, with all floating point numbers in float64."""
    if isinstance(x, (list, tuple)):
        return [in_float64(y) for y in x]
    if isinstance(x, torch.nn.Module):
        return copy.deepcopy(x).double()
    if torch.is_tensor(x) and x.is_floating_point():
        return x.detach().double().requires_grad_(x.requires_grad)
    return x


@dataclass
class Case:
    """One kernel at one shape."""

    kernel: str
    shape: str
    operations: float  # of the products in the formula, two for a multiplication and an addition
    traffic: float  # bytes: inputs read once, outputs written once
    make: Callable  # (device, dtype): a Problem

    def counts(self):
        return {k: v for k, v in self.__dict__.items() if k != "make"}

    def floor(self, ceiling):
        """Seconds, and what sets them: ceiling is bytes a second and operations a second."""
        memory, compute = self.traffic / ceiling[0], self.operations / ceiling[1]
        return max(memory, compute), "memory" if memory > compute else "compute"


def samples(n):
    return f"{n} sample" if n == 1 else f"{n} samples"


def flex_attention(sees, queries, keys, device, **options):
    """FlexAttention, compiled anew, under a mask: which query and key numbers see one another."""
    from torch.nn.attention import flex_attention as flex

    torch.compiler.reset()  # it gives up on a function that was compiled for too many shapes

    def mask(batch, head, i, j):
        return sees(i, j)

    block_mask = flex.create_block_mask(mask, None, None, queries, keys, device)
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, **options)


def flash_attention():
    """The package flash-attn, or None."""
    try:
        import flash_attn
    except ImportError:
        return None
    return flash_attn


# --------------------------------------------------------------------------------------------------
# Salience


def salience_cases(shape):
    images, patches, H = shape.images, shape.patches, shape.cfg.v_head
    d = shape.cfg.v_embd // H

    def make(device, dtype):
        q, k = torch.randn(2, images, patches, H, d, dtype=dtype, device=device).transpose(2, 3)
        return Problem([q, k], salience.column_means, salience.plain_column_means)

    operations = 2 * 2 * d * images * patches**2 * H
    traffic = 2 * 2 * images * patches * H * d
    yield Case("salience", f"{shape.name}, {images} x {patches}", operations, traffic, make)


# --------------------------------------------------------------------------------------------------
# Attention among kept patches


def kept_at_random(images, patches, keep, device):
    """offsets and rows of patches that are kept in groups of 4, as in the tower, other numbers in
    each image; and these numbers."""
    groups = torch.randperm(images * patches // 4, generator=torch.Generator().manual_seed(0))
    groups = groups[: round(keep * len(groups))].sort().values
    rows = (groups[:, None] * 4 + torch.arange(4)).flatten()
    counts = (rows // patches).bincount(minlength=images)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    return offsets.to(device), rows.to(device), counts


def pruned_rivals(q, k, v, offsets, patches, rows):
    """They are given a copy of the kept patches, which ours gathers itself."""

    def gather(q, k, v, *_):
        return q[rows], k[rows], v[rows]

    def by_image(q, k, v, *_):
        return [x.unflatten(0, (-1, patches)).transpose(1, 2) for x in (q, k, v)]

    def unpruned(q, k, v):
        y = F.scaled_dot_product_attention(q, k, v)  # (images, H, patches, d)
        return y.transpose(1, 2).flatten(0, 1)[rows]

    def image_by_image(q, k, v):
        return pruned_attention.plain_pruned_attention(q, k, v, offsets, patches)

    found = {UNPRUNED: (by_image, unpruned), "SDPA, image by image": (gather, image_by_image)}
    if not q.is_cuda:
        return found
    image = rows // patches
    flex = flex_attention(lambda i, j: image[i] == image[j], len(rows), len(rows), q.device)

    def flexible(*qkv):
        return flex(*(x.transpose(0, 1)[None] for x in qkv))[0].transpose(0, 1)

    found["FlexAttention"] = gather, flexible
    if flash := flash_attention():
        starts, most = offsets.int(), int(offsets.diff().max())
        found["flash-attn"] = gather, lambda *qkv: flash.flash_attn_varlen_func(
            *qkv, starts, starts, most, most
        )
    return found


def pruned_attention_cases(shape):
    """Patches gathered in the kernel, from the joint matrix of queries, keys and values."""
    images, patches, H = shape.images, shape.patches, shape.cfg.v_head
    d = shape.cfg.v_embd // H

    def case(keep, gradients):
        def make(device, dtype):
            qkv = torch.randn(images * patches, 3, H, d, dtype=dtype, device=device)
            qkv = [x.requires_grad_(gradients) for x in qkv.unbind(1)]
            offsets, rows, _ = kept_at_random(images, patches, keep, device)
            grads = [torch.randn(len(rows), H, d, dtype=dtype, device=device)]
            ours, plain = pruned_attention.pruned_attention, pruned_attention.plain_pruned_attention
            return Problem([*qkv, offsets, patches, rows], ours, plain, pruned_rivals,
                           grads if gradients else None)  # fmt: skip

        _, rows, counts = kept_at_random(images, patches, keep, "cpu")
        product = 2 * d * int(counts.square().sum()) * H
        vector = 2 * len(rows) * H * d  # bytes of q, or k, v, out
        name = f"{shape.name}, keep {keep}"
        if not gradients:
            return Case("pruned_attention", name, 2 * product, 4 * vector, make)
        # 2 products forward, 5 backward. q, k, v, out, and again with grad, and their gradients, of
        # all rows.
        traffic = 9 * vector + 3 * 2 * images * patches * H * d
        return Case("pruned_attention + gradients", name, 7 * product, traffic, make)

    for keep in (1.0, 0.5, 0.25):
        yield case(keep, gradients=False)
        yield case(keep, gradients=True)


# --------------------------------------------------------------------------------------------------
# Attention over a shared prefix


def prefix_rivals(q, k0, v0, k1, v1, mask0, mask1):
    """Where a mask is given, it is causal. Rivals get prefix and tails together, in one tensor."""
    n, _, T, _ = q.shape
    P, S = k0.shape[2], k1.shape[2]
    causal = mask1 is not None

    def copied(q, k0, v0, k1, v1, *_):  # to each sample, as the release does: (n, G, P + S, d)
        return q, *(torch.cat([x.expand(n, -1, -1, -1), y], 2) for x, y in ((k0, k1), (v0, v1)))

    def in_a_row(x):  # (n, heads, length, d) to (1, heads, n * length, d)
        return x.transpose(0, 1).flatten(1, 2)[None]

    def once(q, k0, v0, k1, v1, *_):  # the prefix and all tails: (1, G, P + n * S, d)
        return q, torch.cat([k0, in_a_row(k1)], 2), torch.cat([v0, in_a_row(v1)], 2)

    def sdpa(q, k, v):
        mask = causal_lower_right(T, P + S) if causal else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    found = {"SDPA, prefix copied": (copied, sdpa)}
    if not q.is_cuda:
        return found

    def sees(i, j):  # query i of all samples' sees key j
        own = (j - P) // S == i // T
        if causal:
            own = own & ((j - P) % S <= i % T)
        return (j < P) | own

    flex = flex_attention(sees, n * T, P + n * S, q.device, enable_gqa=True)

    def flexible(q, k, v):
        return flex(in_a_row(q), k, v)[0].unflatten(1, (n, T)).transpose(0, 1)

    found["FlexAttention, one prefix"] = once, flexible
    if flash := flash_attention():

        def flash_copied(*qkv):
            qkv = [x.transpose(1, 2) for x in qkv]
            return flash.flash_attn_func(*qkv, causal=causal).transpose(1, 2)

        found["flash-attn, prefix copied"] = copied, flash_copied
    return found


def prefix_attention_case(shape, what, n, H, T, S, gradients=False, causal=False):
    """n samples of one scene. Tails are masked only where causal: the rivals would be slower with
    masks. There the prefix is the language model's own prompt; the expert's has no gradient."""
    P, G, d = shape.prefix, shape.cfg.n_kv_head, shape.cfg.head_dim

    def make(device, dtype):
        def normal(*size):
            return torch.randn(*size, d, dtype=dtype, device=device)

        q = normal(n, T, H).transpose(1, 2)  # as the projections give it
        prefix, tail = normal(2, 1, G, P).unbind(0), normal(2, n, G, S).unbind(0)
        for x in (q, *tail, *prefix) if causal else (q, *tail):
            x.requires_grad_(gradients)
        mask = torch.ones(T, S, dtype=torch.bool, device=device).tril().expand(n, -1, -1)
        ours, plain = prefix_attention.prefix_attention, prefix_attention.plain_prefix_attention
        return Problem([q, *prefix, *tail, None, mask if causal else None], ours, plain,
                       prefix_rivals, [torch.randn_like(q)] if gradients else None)  # fmt: skip

    pairs = n * H * T * (P + (S - (T - 1) / 2 if causal else S))
    queries = 2 * n * H * T * d  # bytes of q, or y
    prefix, tails = 2 * 2 * G * P * d, 2 * 2 * n * G * S * d  # of their keys and values
    name = f"{shape.name}, {what}, {samples(n)}"
    operations, traffic = 2 * 2 * d * pairs, 2 * queries + prefix + tails
    if not gradients:
        return Case("prefix_attention", name, operations, traffic, make)
    # Backward: the score again, the gradients of weight and q, and where they are wanted of key and
    # value.
    of_keys = pairs if causal else n * H * T * S
    operations += 2 * d * (3 * pairs + 2 * of_keys)
    traffic += 4 * queries + prefix + tails + (prefix if causal else 0) + tails
    return Case("prefix_attention + gradients", name, operations, traffic, make)


def prefix_attention_cases(shape):
    cfg, both = shape.cfg, shape.tail + shape.tokens
    for n in shape.samples:
        yield prefix_attention_case(shape, "decoding", n, cfg.n_head, 1, shape.tail)
    for n in shape.samples:
        yield prefix_attention_case(shape, "expert", n, cfg.e_head, shape.tokens, both)
    n = shape.samples[1]
    yield prefix_attention_case(shape, "expert", n, cfg.e_head, shape.tokens, both, gradients=True)
    # Reinforcement learning reads the group's reasoning once more, all tokens at once.
    yield prefix_attention_case(shape, "reasoning", n, cfg.n_head, shape.tail, shape.tail,
                                gradients=True, causal=True)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The flow's step and the roll-out


def expert_of(cfg, device, dtype):
    """Expert, action embedding and projection with random weights. The embedding's frequencies end
    at 1, not at 100, which costs the same. Else ten steps of random weights amplify rounding until
    nothing is left to compare."""
    with torch.device(device):
        cfg = replace(cfg, a_max_freq=1.0)
        parts = alpamayo.Expert(cfg), alpamayo.ActionEmbed(cfg), torch.nn.Linear(cfg.e_embd, 2)
    return [part.to(dtype).requires_grad_(False) for part in parts]


def count(parts, matrices=False):
    """Parameters, or those of matrices only."""
    every = [p for part in parts for p in part.parameters()]
    return sum(p.numel() for p in every if p.ndim == 2 or not matrices)


def flow_step_cases(shape):
    """What lies between two evaluations of the expert, in buffers, as the sampler calls it."""
    T, C = shape.tokens, shape.cfg.e_embd
    cfg = replace(shape.cfg, n_layer=0)

    def case(n):
        def make(device, dtype):
            out, embed = sampler.weights_of(*expert_of(cfg, device, dtype))
            x = torch.randn(n, T, 2, device=device)
            hidden = torch.randn(n, T, C, dtype=dtype, device=device)
            t = torch.full((n,), 0.5, device=device)
            after, tokens = torch.empty_like(x), torch.empty_like(hidden)
            share = flow_step.time_share(t[:1], embed)
            scratch = flow_step.step_scratch(x, embed[-4])

            def ours(x, hidden, out, step, t, embed):
                flow_step.step_into(after, tokens, x, hidden, out, step, share, embed, scratch)
                return after, tokens

            return Problem([x, hidden, out, 0.1, t, embed], ours, flow_step.plain_flow_step)

        _, *parts = expert_of(cfg, "meta", torch.bfloat16)
        operations = 2 * n * T * count(parts, matrices=True)
        states = 2 * 2 * n * T * C + 2 * 4 * n * T * 2  # hidden states, tokens; x and the next
        traffic = 2 * count(parts) + states
        return Case("flow_step", f"{shape.name}, {samples(n)}", operations, traffic, make)

    for n in shape.samples:
        yield case(n)


def roll_out_cases(shape):
    """The unicycle: in every model the same, and in float32 whatever the model is in."""
    n, T = shape.samples[-1], shape.tokens

    def make(device, gradients):
        spread = torch.tensor([1, 0.05], device=device)  # m/s^2, 1/m
        actions = (torch.randn(n, T, 2, device=device) * spread).requires_grad_(gradients)
        v0 = (20 * torch.rand(n, device=device)).requires_grad_(gradients)  # m/s
        grads = [torch.randn(n, T, *size, device=device) for size in ((3,), (3, 3))]
        return Problem([actions, v0], flow_step.roll_out_by_kernel, alpamayo.roll_out,
                       grads=grads if gradients else None)  # fmt: skip

    name = f"{n} samples"
    traffic = 4 * n * (T * (2 + 3 + 9) + 1)  # and no products
    yield Case("roll_out", name, 0, traffic, lambda device, _: make(device, False))
    traffic += 4 * n * (T * (2 * 2 + 3 + 9) + 2)
    yield Case("roll_out + gradients", name, 0, traffic, lambda device, _: make(device, True))


# --------------------------------------------------------------------------------------------------
# The sampler


def plain_loop(parts, steps, x, cos, sin, past, read=alpamayo.Expert.forward):
    """The loop of Alpamayo.integrate, from noise x: all its steps, (steps + 1, n, T, 2)."""
    expert, embed, project = parts
    flow = [x]
    for i in range(steps):
        t = torch.full((len(x),), i / steps, dtype=x.dtype, device=x.device)
        x = x + project(read(expert, embed(x, t), cos, sin, past)).to(x.dtype) / steps
        flow.append(x)
    return torch.stack(flow)


def read_copies(expert, x, cos, sin, caches):
    """The expert as the release runs it: keys and values (n, G, P + S + T, d) of each layer have a
    copy of the prefix for each sample, and room for the T action tokens."""
    T = x.shape[1]
    for layer, (keys, values) in zip(expert.layers, caches, strict=True):
        a, z = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (w(z).unflatten(2, (-1, a.head_dim)) for w in (a.q_proj, a.k_proj, a.v_proj))
        keys[:, :, -T:] = alpamayo.rotate(a.k_norm(k).transpose(1, 2), cos, sin)
        values[:, :, -T:] = v.transpose(1, 2)
        q = alpamayo.rotate(a.q_norm(q).transpose(1, 2), cos, sin)
        y = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        x = x + a.o_proj(y.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return expert.norm(x)


def sampler_case(shape, n):
    cfg, steps = shape.cfg, shape.steps
    P, S, T, G, d = shape.prefix, shape.tail, shape.tokens, cfg.n_kv_head, cfg.head_dim

    def moved(flow):  # from the noise, which all have in common and which would hide errors
        return flow[1:] - flow[0]

    def ours(parts, *inputs):
        return moved(sampler.sample_flow(*parts, steps, *inputs))

    def plain(parts, noise, cos, sin, prefix, tail, seen):
        past = [(*a, None, *b, None) for a, b in zip(prefix, tail, strict=True)]
        return moved(plain_loop(parts, steps, noise, cos, sin, past))

    def copied(parts, noise, cos, sin, prefix, tail, seen):
        def room(x, y):
            return torch.cat([x.expand(n, -1, -1, -1), y, y.new_empty(n, G, T, d)], 2)

        caches = [[*map(room, a, b)] for a, b in zip(prefix, tail, strict=True)]
        return parts, noise, cos, sin, caches

    def over_copies(parts, noise, cos, sin, caches):
        return moved(plain_loop(parts, steps, noise, cos, sin, caches, read_copies))

    def rivals(*_):
        return {"PyTorch": (None, plain), "PyTorch, prefix copied": (copied, over_copies)}

    def make(device, dtype):
        def cache(*size):
            pairs = torch.randn(cfg.n_layer, 2, *size, d, dtype=dtype, device=device)
            return [pair.unbind(0) for pair in pairs]

        noise = torch.randn(n, T, 2, device=device)
        seen = torch.ones(n, S, dtype=torch.bool, device=device)
        places = (P + S + torch.arange(T, device=device)).expand(3, n, -1)
        cos, sin = alpamayo.rope(places, cfg, dtype)
        parts = expert_of(cfg, device, dtype)
        inputs = [parts, noise, cos, sin, cache(1, G, P), cache(n, G, S), seen]
        return Problem(inputs, ours, plain, rivals)

    parts = expert_of(cfg, "meta", torch.bfloat16)
    pairs = cfg.n_layer * cfg.e_head * n * T * (P + S + T)
    keys = cfg.n_layer * 2 * G * (P + n * S) * d  # and values; the actions' are made on the way
    operations = steps * 2 * (n * T * count(parts, matrices=True) + 2 * d * pairs)
    traffic = steps * 2 * (count(parts) + keys)
    return Case("sample_flow", f"{shape.name}, {samples(n)}", operations, traffic, make)


def sampler_cases(shape):
    for n in shape.samples:
        yield sampler_case(shape, n)


CASES = {
    "salience": salience_cases,
    "pruned_attention": pruned_attention_cases,
    "prefix_attention": prefix_attention_cases,
    "flow_step": flow_step_cases,
    "roll_out": roll_out_cases,
    "sampler": sampler_cases,
}


# --------------------------------------------------------------------------------------------------
# With a GPU


def ceilings(clock, device):
    """Bytes a second of a copy, operations a second of a large product in bf16."""
    a, b = torch.empty(2, 2**29, dtype=torch.uint8, device=device)
    x = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    return 2 * a.numel() / clock(lambda: b.copy_(a)), 2 * 8192**3 / clock(lambda: x @ x)


def error_of(result, truth):
    """The largest, relative to the largest number; of several outputs the worst one's."""
    pairs = zip(result, truth, strict=True) if isinstance(truth, tuple) else [(result, truth)]
    errors = [(a.detach().double() - b).abs().max() / b.abs().max() for a, b in pairs]
    return float(max(errors))


def failed(e):
    return dict(failed=f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}")


def compare(case, device, clock, dtype=torch.bfloat16):
    """{name: error and seconds} of ours and of the rivals; or what kept a rival from running."""
    problem = case.make(device, dtype)
    truth = problem.truth()

    def look(name, f):
        f()  # compiles, and records a graph; what is compared and timed comes after
        return dict(error=None if name == UNPRUNED else error_of(f(), truth), seconds=clock(f))

    with kernels.using("triton"):
        result = {"ours": look("ours", problem.run(problem.ours))}
    with kernels.using("torch"):
        for name, f in problem.others().items():
            try:
                result[name] = look(name, f)
            except Exception as e:
                result[name] = failed(e)
    return result


def widths(cases):
    """Of the columns of kernels and shapes. The second also has the rivals, indented."""
    first = max(len(case.kernel) for case in cases)
    return first + 2, max(30, *(len(case.shape) + 2 for case in cases))


def on_gpu(cases, device):
    from triton.testing import do_bench

    def clock(f):
        return do_bench(f, return_mode="median") / 1e3

    ceiling = ceilings(clock, device)
    first, second = widths(cases)
    name, version = torch.cuda.get_device_name(device), kernels.triton.__version__
    print(f"{name}, torch {torch.__version__}, triton {version}")
    print(f"a copy {ceiling[0] / 1e12:.2f} TB/s, a large bf16 product "
          f"{ceiling[1] / 1e12:.0f} TFLOP/s\n{LAYERS}\n")  # fmt: skip
    columns = f"{'ms':>10}{'error':>9}{'TFLOP/s':>9}{'TB/s':>7}{'x floor':>9}{'x ours':>8}"
    print(f"{'':{first + second}}{columns}")
    rows = []
    for case in cases:
        least, _ = case.floor(ceiling)
        try:
            result = compare(case, device, clock)
        except Exception as e:  # of ours, or of its reference; the other cases may run
            result = {"ours": failed(e)}
        for name, r in result.items():
            head = f"{'':{first}}  {name:{second - 2}}"
            if name == "ours":
                head = f"{case.kernel:{first}}{case.shape:{second}}"
            if "failed" in r:
                print(f"{head}  {r['failed'][:100]}", flush=True)
                continue
            s = r["seconds"]
            error = "-" if r["error"] is None else f"{r['error']:.1e}"
            rates = f"{case.operations / s / 1e12:9.1f}{case.traffic / s / 1e12:7.2f}"
            ratios = f"{s / least:9.2f}{s / result['ours']['seconds']:8.2f}"
            print(f"{head}{s * 1e3:10.4f}{error:>9}{rates}{ratios}", flush=True)
        rows.append(case.counts() | dict(floor=least, **result))
    return dict(copy=ceiling[0], product=ceiling[1], cases=rows)


# --------------------------------------------------------------------------------------------------
# Without


def analytic(cases):
    print("Nothing was measured: there is no GPU here. Floors are arithmetic, for an H200 at "
          f"{H200[0] / 1e12} TB/s and {H200[1] / 1e12:.0f} TFLOP/s.\n{LAYERS}\n")  # fmt: skip
    first, second = widths(cases)
    print(f"{'':{first + second}}{'GFLOP':>11}{'MB':>11}{'floor, us':>11}")
    rows = []
    for case in cases:
        least, by = case.floor(H200)
        counted = f"{case.operations / 1e9:11.3f}{case.traffic / 1e6:11.2f}{least * 1e6:11.2f}"
        print(f"{case.kernel:{first}}{case.shape:{second}}{counted} {by}")
        rows.append(case.counts() | dict(floor=least))
    return rows


def compile_report(cases):
    """What the launches of these cases compile to, see compiled.py."""
    from kernels.compiled import compiling

    _, second = widths(cases)
    print(f"\nCompiled by triton {kernels.triton.__version__} for chips that are not here, bf16. "
          "blocks: how many fit\non a multiprocessor. A launch that is the same machine code at "
          "another shape is told once.\n")  # fmt: skip
    columns = f"{'chip':>6}{'registers':>11}{'spilled':>9}{'shared, KB':>12}{'blocks x warps':>16}"
    print(f"{'':{18 + second}}{columns}  matrix")
    rows, seen = [], set()
    for case in cases:
        problem = case.make("cpu", torch.bfloat16)
        for chip in CHIPS:
            sampler.kept.clear()  # its buffers are laid out for one chip
            with compiling(chip) as builds:
                problem.run(problem.ours)()
            for b in builds:
                if b.sass in seen:
                    continue
                seen.add(b.sass)
                matrix = b.matrix()
                used = f"{b.instructions[matrix]} {matrix}" if matrix else "-"
                sizes = f"{b.chip:6}{b.registers:11}{b.spilled:9}{b.shared / 1024:12.1f}"
                where = f"{b.kernel:18}{case.shape:{second}}"
                print(f"{where}{sizes}{b.blocks:12} x {b.warps}  {used}", flush=True)
                row = {k: getattr(b, k) for k in ("kernel", "chip", "registers", "spilled",
                                                  "shared", "blocks", "warps")}  # fmt: skip
                rows.append(row | dict(shape=case.shape, matrix=matrix))
    return rows


def cases_of(flags, small=False):
    """The cases asked for. small: for the compiler, with one layer and two steps. What is launched
    depends on neither."""
    cases = {}
    for make in [CASES[flags.kernel]] if flags.kernel else CASES.values():
        for shape in [SHAPES[flags.shape]] if flags.shape else SHAPES.values():
            if small:
                shape = replace(shape, cfg=replace(shape.cfg, n_layer=1), steps=2)
            for case in make(shape):
                cases[case.kernel, case.shape] = case  # the roll-out is the same in all shapes
    return list(cases.values())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, help="this one only (default: all)")
    parser.add_argument("--kernel", choices=CASES, help="its cases only (default: all)")
    parser.add_argument("--no-compile", action="store_true",
                        help="without a GPU: leave out the compile report")  # fmt: skip
    flags = parser.parse_args()
    cases, version = cases_of(flags), kernels.triton.__version__
    report = dict(torch=torch.__version__, triton=version)
    if torch.cuda.is_available():
        report |= dict(device=torch.cuda.get_device_name(), measured=True)
        report |= on_gpu(cases, torch.device("cuda"))
    else:
        report |= dict(device="none", measured=False, cases=analytic(cases))
        if version is None:
            print("\nTriton is not installed: nothing was compiled.")
        elif not flags.no_compile:
            report["builds"] = compile_report(cases_of(flags, small=True))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
