"""
The kernels against PyTorch and against what the hardware allows.

    python -m kernels.bench --out bench.jsonl

With a GPU: milliseconds (median) of each kernel and of its rivals, which compute the same (SDPA,
compiled FlexAttention, flash-attn where installed, the plain loop compiled and in a CUDA graph);
microseconds that the CPU takes to launch it; the largest error against float64 on the same inputs;
operations and bytes a second; and how far that is from the floor. No kernel can take less time than
its products at the rate of a large matrix product, nor than its inputs and outputs at the rate of a
copy. Both rates are measured first. What n samples share is counted once. Attention and salience
are one layer's. `sample_flow` is the whole sampler, all layers and steps; its floor reads the
expert's weights and the prefix once a step. `decoding` is the language model's pass over one token.

Each result is a line of JSON in --out at once, and what is there is not timed again. Rivals that
compile first come last. One that fails says so in its line and stops nobody.

Without a GPU nothing is measured. The table then has the counted operations and bytes, their floors
on an H200, and what each launch compiles to for four chips. All of that is arithmetic and says
nothing of speed.
"""
import argparse
import copy
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention
from torch.nn.attention.bias import causal_lower_right

import alpamayo
import kernels
from kernels import decoding, flow_step, prefix_attention, pruned_attention, salience, sampler

try:
    import flash_attn
except ImportError:
    flash_attn = None

# What a copy and a large bf16 product reach on an H200, bytes/s and operations/s: for floors where
# there is no GPU.
H200 = 4.3e12, 788e12
CHIPS = (80, 90, 100, 120)  # A100; H100 and H200; B200; RTX 5090 and RTX PRO 6000
COMPILED = "copied, compiled"  # torch.compile of the loop over copies of the prefix
SLOW = COMPILED, "FlexAttention"  # rivals that are compiled first
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
    grads: list = None  # of the outputs, where gradients are part of the problem

    def run(self, f, prepare=None):
        """f(*inputs), or f(*prepare()), as a function of nothing. It prepares once, beforehand.
        With gradients it prepares each time, as they go through that, and returns those of the
        inputs behind the outputs."""
        prepare = prepare or (lambda: self.inputs)
        if self.grads is None:
            return partial(torch.no_grad()(f), *prepare())
        leaves = [x for x in self.inputs if torch.is_tensor(x) and x.requires_grad]

        def both():
            y = f(*prepare())
            y = y if isinstance(y, tuple) else (y,)
            return *y, *torch.autograd.grad(y, leaves, self.grads)

        return both

    def truth(self):
        """What `plain` computes in float64."""
        exact = replace(self, inputs=in_float64(self.inputs), grads=in_float64(self.grads))
        return exact.run(self.plain)()

    def others(self):
        """{name: what makes a function of nothing}."""
        found = self.rivals(*self.inputs) if self.rivals else {"PyTorch": (None, self.plain)}
        return {name: partial(self.run, f, prepare) for name, (prepare, f) in found.items()}


def in_float64(x):
    """Copies of tensors and modules, or lists of them, with floating point numbers in float64."""
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
    make: Callable  # a Problem of this dtype, on the default device

    def problem(self, device, dtype):
        """With gradients if the kernel's name says so."""
        with torch.device(device):
            made = self.make(dtype)
        return made if self.kernel.endswith("gradients") else replace(made, grads=None)

    def key(self):
        return self.kernel, self.shape

    def counts(self):
        return {name: value for name, value in vars(self).items() if name != "make"}

    def floor(self, copied, product):
        """Seconds, and what sets them, where a chip copies so many bytes and multiplies so many
        operations a second."""
        memory, compute = self.traffic / copied, self.operations / product
        return max(memory, compute), "memory" if memory > compute else "compute"


def flex(sees, queries, keys):
    """FlexAttention, compiled anew, under a mask: which query and key numbers see one another."""
    torch.compiler.reset()  # it gives up on a function that was compiled for too many shapes
    mask = flex_attention.create_block_mask(
        lambda batch, head, i, j: sees(i, j), None, None, queries, keys, "cuda"
    )
    compiled = torch.compile(flex_attention.flex_attention, dynamic=False)
    return partial(compiled, block_mask=mask, enable_gqa=True)


# --------------------------------------------------------------------------------------------------
# In the tower


def salience_cases(shape):
    images, patches, H = shape.images, shape.patches, shape.cfg.v_head
    d = shape.cfg.v_embd // H

    def make(dtype):
        q, k = torch.randn(2, images, patches, H, d, dtype=dtype).transpose(2, 3)
        return Problem([q, k], salience.column_means, salience.plain_column_means)

    operations = 2 * 2 * d * images * patches**2 * H
    traffic = 2 * 2 * images * patches * H * d
    yield Case("salience", f"{shape.name}, {images} x {patches}", operations, traffic, make)


def kept_at_random(images, patches, keep):
    """offsets and rows of patches that are kept in groups of 4, as in the tower, other numbers in
    each image. On the CPU, where the seed gives the same everywhere."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        groups = torch.randperm(images * patches // 4, generator=generator)
        groups = groups[: round(keep * len(groups))].sort().values
        rows = (groups[:, None] * 4 + torch.arange(4)).flatten()
        starts = patches * torch.arange(images + 1)
        return torch.searchsorted(rows, starts), rows


def pruned_rivals(q, k, v, offsets, patches, rows):
    """They are given a copy of the kept patches, which ours gathers itself."""

    def gathered():
        return q[rows], k[rows], v[rows]

    def dense():  # (images, H, patches, d)
        return [x.unflatten(0, (-1, patches)).transpose(1, 2) for x in (q, k, v)]

    def unpruned(q, k, v):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)[rows]

    def image_by_image(*qkv):
        return pruned_attention.plain_pruned_attention(*qkv, offsets, patches)

    found = {UNPRUNED: (dense, unpruned), "SDPA, image by image": (gathered, image_by_image)}
    if q.is_cuda:
        image = rows // patches
        attend = cache(lambda: flex(lambda i, j: image[i] == image[j], len(rows), len(rows)))

        def flexible(*qkv):
            return attend()(*(x.transpose(0, 1)[None] for x in qkv))[0].transpose(0, 1)

        found["FlexAttention"] = gathered, flexible
    if q.is_cuda and flash_attn:
        starts, most = offsets.int(), int(offsets.diff().max())

        def flash(*qkv):
            return flash_attn.flash_attn_varlen_func(*qkv, starts, starts, most, most)

        found["flash-attn"] = gathered, flash
    return found


def pruned_attention_cases(shape):
    """Patches gathered in the kernel, from the joint matrix of queries, keys and values."""
    images, patches, H = shape.images, shape.patches, shape.cfg.v_head
    d = shape.cfg.v_embd // H

    def make(keep, dtype):
        qkv = torch.randn(images * patches, 3, H, d, dtype=dtype).unbind(1)
        offsets, rows = (x.to(qkv[0].device) for x in kept_at_random(images, patches, keep))
        inputs = [*(x.requires_grad_() for x in qkv), offsets, patches, rows]
        return Problem(
            inputs, pruned_attention.pruned_attention, pruned_attention.plain_pruned_attention,
            pruned_rivals, [torch.randn(len(rows), H, d, dtype=dtype)],
        )  # fmt: skip

    for keep in (1.0, 0.5, 0.25):
        offsets, rows = kept_at_random(images, patches, keep)
        product = 2 * d * int(offsets.diff().square().sum()) * H
        vector = 2 * len(rows) * H * d  # bytes of q, or k, v, out
        name = f"{shape.name}, keep {keep}"
        yield Case("pruned_attention", name, 2 * product, 4 * vector, partial(make, keep))
        # 2 products forward, 5 backward. q, k, v, out, and again with grad, and their gradients, of
        # all rows.
        traffic = 9 * vector + 3 * 2 * images * patches * H * d
        yield Case("pruned_attention + gradients", name, 7 * product, traffic, partial(make, keep))


# --------------------------------------------------------------------------------------------------
# Over a shared prefix


def prefix_rivals(q, k0, v0, k1, v1, mask0, mask1):
    """They get prefix and tails together, in one tensor. mask1: where there is one, it is causal.
    """
    n, _, T, _ = q.shape
    P, S = k0.shape[2], k1.shape[2]
    causal = mask1 is not None

    def in_a_row(x):  # (n, heads, length, d) to (1, heads, n * length, d)
        return x.transpose(0, 1).flatten(1, 2)[None]

    def copied():  # a prefix for each sample, as in the release: (n, G, P + S, d)
        return q, *(torch.cat([x.expand(n, -1, -1, -1), y], 2) for x, y in ((k0, k1), (v0, v1)))

    def once():  # one prefix and all tails: (1, G, P + n * S, d)
        return q, torch.cat([k0, in_a_row(k1)], 2), torch.cat([v0, in_a_row(v1)], 2)

    def sdpa(q, k, v):
        mask = causal_lower_right(T, P + S) if causal else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def sees(i, j):  # query i and key j of all samples'
        own = (j - P) // S == i // T
        return (j < P) | (own & ((j - P) % S <= i % T) if causal else own)

    found = {"SDPA, prefix copied": (copied, sdpa)}
    if q.is_cuda:
        attend = cache(lambda: flex(sees, n * T, P + n * S))

        def flexible(q, k, v):
            return attend()(in_a_row(q), k, v)[0].unflatten(1, (n, T)).transpose(0, 1)

        found["FlexAttention, one prefix"] = once, flexible
    return found


def prefix_attention_case(shape, what, n, H, T, S, gradients=False, causal=False):
    """n samples of one scene. Tails are masked only where causal: the rivals would be slower with
    masks. There the prefix is the language model's own prompt. The expert's has no gradient."""
    P, G, d = shape.prefix, shape.cfg.n_kv_head, shape.cfg.head_dim

    def make(dtype):
        q = torch.randn(n, T, H, d, dtype=dtype).transpose(1, 2)  # as the projections give it
        prefix = torch.randn(2, 1, G, P, d, dtype=dtype).unbind(0)
        tail = torch.randn(2, n, G, S, d, dtype=dtype).unbind(0)
        for x in (q, *tail, *prefix) if causal else (q, *tail):
            x.requires_grad_()
        mask = torch.ones(T, S, dtype=torch.bool).tril().expand(n, -1, -1) if causal else None
        return Problem(
            [q, *prefix, *tail, None, mask], prefix_attention.prefix_attention,
            prefix_attention.plain_prefix_attention, prefix_rivals, [torch.randn_like(q)],
        )  # fmt: skip

    pairs = n * H * T * (P + (S - (T - 1) / 2 if causal else S))
    queries = 2 * n * H * T * d  # bytes of q, or y
    prefix, tails = 2 * 2 * G * P * d, 2 * 2 * n * G * S * d  # of their keys and values
    name = f"{shape.name}, {what}, {n} sample{'s' * (n > 1)}"
    operations, traffic = 2 * 2 * d * pairs, 2 * queries + prefix + tails
    if not gradients:
        return Case("prefix_attention", name, operations, traffic, make)
    # Backward: the score again, the gradients of weight and q, and where wanted of key and value.
    of_keys = pairs if causal else n * H * T * S
    operations += 2 * d * (3 * pairs + 2 * of_keys)
    traffic += 4 * queries + prefix + tails + (prefix if causal else 0) + tails
    return Case("prefix_attention + gradients", name, operations, traffic, make)


def prefix_attention_cases(shape):
    cfg, few = shape.cfg, shape.samples[1]
    expert = cfg.e_head, shape.tokens, shape.tail + shape.tokens
    for n in shape.samples:
        yield prefix_attention_case(shape, "decoding", n, cfg.n_head, 1, shape.tail)
    for n in shape.samples:
        yield prefix_attention_case(shape, "expert", n, *expert)
    yield prefix_attention_case(shape, "expert", few, *expert, gradients=True)
    # Reinforcement learning reads the group's reasoning once more, all tokens at once.
    said = cfg.n_head, shape.tail, shape.tail
    yield prefix_attention_case(shape, "reasoning", few, *said, gradients=True, causal=True)


# --------------------------------------------------------------------------------------------------
# The flow


def expert_of(cfg, dtype, layers=True):
    """Expert, action embedding and projection with random weights. The embedding's frequencies end
    at 1, not at 100, which costs the same. Else ten steps of random weights amplify rounding until
    nothing is left to compare. layers=False: of the expert its last norm alone."""
    cfg = replace(cfg, a_max_freq=1.0)
    expert = alpamayo.Expert(cfg)
    if not layers:
        expert.layers = torch.nn.ModuleList()
    parts = expert, alpamayo.ActionEmbed(cfg), torch.nn.Linear(cfg.e_embd, 2)
    return [part.to(dtype).requires_grad_(False) for part in parts]


def weights(cfg, layers=True):
    """Numbers in all parameters of these parts, and in their matrices."""
    with torch.device("meta"):
        parts = expert_of(cfg, torch.bfloat16, layers)
    every = [p for part in parts for p in part.parameters()]
    return sum(p.numel() for p in every), sum(p.numel() for p in every if p.ndim == 2)


def flow_step_cases(shape):
    """What lies between two evaluations of the expert, in buffers, as the sampler calls it."""
    T, C = shape.tokens, shape.cfg.e_embd

    def make(n, dtype):
        out, embed = sampler.weights_of(*expert_of(shape.cfg, dtype, layers=False))
        x, hidden = torch.randn(n, T, 2), torch.randn(n, T, C, dtype=dtype)
        after, tokens = torch.empty_like(x), torch.empty_like(hidden)
        t = torch.full((n,), 0.5)
        share, scratch = flow_step.time_share(t[:1], embed), flow_step.step_scratch(x, embed[-4])

        def ours(x, hidden, out, step, t, embed):
            flow_step.step_into(after, tokens, x, hidden, out, step, share, embed, scratch)
            return after, tokens

        return Problem([x, hidden, out, 0.1, t, embed], ours, flow_step.plain_flow_step)

    every, matrices = weights(shape.cfg, layers=False)
    every -= C  # the expert's norm
    for n in shape.samples:
        states = 2 * 2 * n * T * C + 2 * 4 * n * T * 2  # hidden states, tokens; x and the next
        name = f"{shape.name}, {n} sample{'s' * (n > 1)}"
        yield Case("flow_step", name, 2 * n * T * matrices, 2 * every + states, partial(make, n))


def roll_out_cases(shape):
    """The unicycle: in every model the same, and in float32 whatever the model is in."""
    n, T = shape.samples[-1], shape.tokens

    def make(dtype):
        actions = torch.randn(n, T, 2) * torch.tensor([1, 0.05])  # m/s^2, 1/m
        inputs = [actions.requires_grad_(), (20 * torch.rand(n)).requires_grad_()]  # m/s
        grads = [torch.randn(n, T, 3), torch.randn(n, T, 3, 3)]
        return Problem(inputs, flow_step.roll_out_by_kernel, alpamayo.roll_out, grads=grads)

    traffic = 4 * n * (T * (2 + 3 + 9) + 1)  # and no products
    yield Case("roll_out", f"{n} samples", 0, traffic, make)
    traffic += 4 * n * (T * (2 * 2 + 3 + 9) + 2)
    yield Case("roll_out + gradients", f"{n} samples", 0, traffic, make)


def plain_loop(parts, steps, noise, cos, sin, past, read=alpamayo.Expert.forward):
    """The loop of Alpamayo.drive: after each step, how far x is from the noise, (steps, n, T, 2).
    x itself has the noise in common with all others, which would hide their errors. read: the
    expert over `past`."""
    expert, embed, project = parts
    x, moved = noise, []
    for i in range(steps):
        tokens = embed(x, x.new_full((len(x),), i / steps))
        x = x + project(read(expert, tokens, cos, sin, past)).to(x.dtype) / steps
        moved.append(x - noise)
    return torch.stack(moved)


def read_copy(layer, x, cos, sin, keys, values):
    """A layer as the release runs it. Its cache (n, G, P + S + T, d) has the prefix once a sample
    and room for the T action tokens."""
    T = x.shape[1]
    a, z = layer.self_attn, layer.input_layernorm(x)
    q, k, v = (w(z).unflatten(2, (-1, a.head_dim)) for w in (a.q_proj, a.k_proj, a.v_proj))
    q = alpamayo.rotate(a.q_norm(q).transpose(1, 2), cos, sin)
    keys[:, :, -T:] = alpamayo.rotate(a.k_norm(k).transpose(1, 2), cos, sin)
    values[:, :, -T:] = v.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
    x = x + a.o_proj(y.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def read_copies(expert, x, cos, sin, caches, read=read_copy):
    for layer, (keys, values) in zip(expert.layers, caches):
        x = read(layer, x, cos, sin, keys, values)
    return expert.norm(x)


@torch.no_grad()
def recorded(loop, *inputs):
    """A loop's launches as a CUDA graph, and what gives its output."""
    loop(*inputs)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = loop(*inputs)
    return graph, lambda: output


def recorded_by_us(expert):
    """The same of what `sample_flow` recorded last for this expert."""
    *_, buffers = sampler.kept[expert][1].values()
    return buffers.graph, lambda: buffers.flow[1:] - buffers.flow[0]


def replayed(graph, output):
    graph.replay()
    return output()


def sampler_rivals(parts, steps, noise, cos, sin, prefix, tail, seen):
    """prefix (layers, 2, 1, G, P, d), tail (layers, 2, n, G, S, d)."""
    inputs = parts, steps, noise, cos, sin

    def shared():
        return *inputs, [alpamayo.Past(tuple(kv), tuple(own)) for kv, own in zip(prefix, tail)]

    def copied():
        room = F.pad(tail, (0, 0, 0, noise.shape[1]))  # (layers, 2, n, G, S + T, d)
        caches = torch.cat([prefix.expand(-1, -1, len(noise), -1, -1, -1), room], 4)
        return *inputs, caches, read_copies

    def compiled(mode):
        """A layer is compiled once for all; so are the embedding and what follows the layers."""
        torch.compiler.reset()
        make = partial(torch.compile, mode=mode, dynamic=False)
        (expert, embed, project), *rest, caches, _ = copied()
        few = expert, make(lambda x, t: embed(x, t)), make(lambda x: project(expert.norm(x)))
        layer = make(read_copy)

        def read(expert, x, cos, sin, caches):
            for one, (keys, values) in zip(expert.layers, caches):
                x = layer(one, x, cos, sin, keys, values)
            return x

        return recorded(plain_loop, few, *rest, caches, read)

    found = {"PyTorch": (shared, plain_loop), "PyTorch, prefix copied": (copied, plain_loop)}
    if noise.is_cuda:
        found["ours, a replay alone"] = lambda: recorded_by_us(parts[0]), replayed
        found[f"{COMPILED} and in a graph"] = partial(compiled, "default"), replayed
        mode = "max-autotune-no-cudagraphs"
        found[f"{COMPILED}, max-autotune, in a graph"] = partial(compiled, mode), replayed
    return found


def sampler_cases(shape):
    cfg, steps, P, S, T = shape.cfg, shape.steps, shape.prefix, shape.tail, shape.tokens
    G, d = cfg.n_kv_head, cfg.head_dim

    def ours(parts, *inputs):
        flow = sampler.sample_flow(*parts, *inputs)
        return flow[1:] - flow[0]

    def plain(*inputs):
        prepare, loop = sampler_rivals(*inputs)["PyTorch"]
        return loop(*prepare())

    def make(n, dtype):
        prefix = torch.randn(cfg.n_layer, 2, 1, G, P, d, dtype=dtype)
        tail = torch.randn(cfg.n_layer, 2, n, G, S, d, dtype=dtype)
        rope = alpamayo.rope((P + S + torch.arange(T)).expand(3, n, -1), cfg, dtype)
        inputs = [expert_of(cfg, dtype), steps, torch.randn(n, T, 2), *rope, prefix, tail]
        seen = torch.ones(n, S, dtype=torch.bool)
        return Problem([*inputs, seen], ours, plain, sampler_rivals)

    every, matrices = weights(cfg)
    for n in shape.samples:
        pairs = cfg.n_layer * cfg.e_head * n * T * (P + S + T)
        keys = cfg.n_layer * 2 * G * (P + n * S) * d  # and values; the actions' are made on the way
        operations = steps * 2 * (n * T * matrices + 2 * d * pairs)
        name = f"{shape.name}, {n} sample{'s' * (n > 1)}"
        yield Case("sample_flow", name, operations, steps * 2 * (every + keys), partial(make, n))


# --------------------------------------------------------------------------------------------------
# A token of the language model


def read_token(lm, token, cos, sin, prefix, tail):
    """What Alpamayo.think runs for each token, in PyTorch or by the kernels that are chosen."""
    past = [alpamayo.Past(tuple(kv), tuple(own)) for kv, own in zip(prefix, tail)]
    return lm(lm.embed_tokens(token)[:, None], cos, sin, past)[0]


def read_by_kernels(*inputs):
    with kernels.using("triton"):
        return read_token(*inputs)


def read_recorded(recordings, lm, token, cos, sin, prefix, tail):
    """The same token again and again, behind a tail that stays as it is."""
    S = tail.shape[4]
    if not recordings:
        angles = [a.expand(-1, -1, S + 1, -1) for a in (cos, sin)]
        made = decoding.Recording(lm, prefix, len(token), prefix.shape[4], angles)
        made.begin(prefix, angles)
        made.tails[..., :S, :] = tail
        made.taken[..., :S] = True
        recordings.append(made)
    (one,) = recordings
    one.place.fill_(S)
    one.taken[..., S] = False
    return one.read(token)


def decoding_cases(shape):
    """All layers of the language model, for one token of each sample, not what is then chosen."""
    cfg, P, S = shape.cfg, shape.prefix, shape.tail
    G, d = cfg.n_kv_head, cfg.head_dim

    def make(n, dtype):
        lm = alpamayo.LanguageModel(cfg).to(dtype).requires_grad_(False)
        angles = alpamayo.rope(torch.full((3, 1, 1), P + S), cfg, dtype)
        prefix = torch.randn(cfg.n_layer, 2, 1, G, P, d, dtype=dtype)
        tail = torch.randn(cfg.n_layer, 2, n, G, S, d, dtype=dtype)
        token = torch.randint(cfg.text_vocab, (n,))
        inputs = [lm, token, *angles, prefix, tail]

        def rivals(*_):
            found = {"the loop in PyTorch": (None, read_token)}
            return found | {"the loop by the kernels": (None, read_by_kernels)}

        return Problem(inputs, partial(read_recorded, []), read_token, rivals)

    with torch.device("meta"):
        lm = alpamayo.LanguageModel(cfg)
    read = sum(p.numel() for p in lm.parameters()) - lm.embed_tokens.weight.numel()
    for n in shape.samples:
        keys = cfg.n_layer * 2 * G * (P + n * S) * d  # and values
        operations = 2 * n * (read + 2 * cfg.n_layer * cfg.n_head * (P + S) * d)
        name = f"{shape.name}, {n} sample{'s' * (n > 1)}"
        yield Case("decoding", name, operations, 2 * (read + keys), partial(make, n))


CASES = {
    "sampler": sampler_cases,
    "decoding": decoding_cases,
    "prefix_attention": prefix_attention_cases,
    "pruned_attention": pruned_attention_cases,
    "roll_out": roll_out_cases,
    "flow_step": flow_step_cases,
    "salience": salience_cases,
}


def cases_of(flags, small=False):
    """The cases asked for. small: for the compiler, with one layer and two steps. What is launched
    depends on neither."""
    cases = {}
    for shape in map(SHAPES.get, flags.shape):
        for kernel in flags.kernel:
            if small:
                shape = replace(shape, cfg=replace(shape.cfg, n_layer=1), steps=2)
            for case in CASES[kernel](shape):
                cases[case.key()] = case  # the roll-out is the same in all shapes
    return list(cases.values())


# --------------------------------------------------------------------------------------------------
# With a GPU


def ceilings(clock):
    """Bytes a second of a copy, operations a second of a large product in bf16."""
    a, b = torch.empty(2, 2**29, dtype=torch.uint8, device="cuda")
    x = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    return 2 * a.numel() / clock(lambda: b.copy_(a)), 2 * 8192**3 / clock(lambda: x @ x)


@torch.no_grad()
def error_of(result, truth):
    """The largest, relative to the largest number; of several outputs the worst one's."""
    pairs = zip(result, truth) if isinstance(truth, tuple) else [(result, truth)]
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def time_case(case, device, clock, dtype=torch.bfloat16, wanted=lambda who: True):
    """(who, result) of ours and of the rivals that are wanted. A result is the error, seconds, and
    seconds of the CPU to launch it; or what kept it from running."""
    problem = case.problem(device, dtype)
    try:
        truth = problem.truth()
    except torch.OutOfMemoryError:  # a reference that does not fit keeps nobody from being timed
        truth = None

    def look(who, prepare):
        f = prepare()
        f()  # compiles, and records a graph; what is compared and timed comes after
        y = f()
        comparable = truth is not None and who != UNPRUNED
        error = error_of(y, truth) if comparable else None
        return dict(error=error, seconds=clock(f), host=host_time(f))

    ours = {"ours": partial(problem.run, problem.ours)}
    for choice, whose in ("triton", ours), ("torch", problem.others()):
        for who, prepare in whose.items():
            if wanted(who):
                try:
                    with kernels.using(choice):
                        yield who, look(who, prepare)
                except Exception as e:
                    yield who, dict(failed=f"{type(e).__name__}: {e}"[:500])


def host_time(f, calls=10):
    """Seconds until f returns, while the GPU is still at work, or not (median)."""
    if not torch.cuda.is_available():
        return None
    seconds = []
    while len(seconds) < calls and sum(seconds) < 0.2:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        f()
        seconds.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return sorted(seconds)[len(seconds) // 2]


def told_before(path):
    """The lines of an earlier run on the same card, if there are any."""
    if not os.path.exists(path):
        return []
    with open(path) as f:
        rows = [json.loads(line) for line in f]
    return rows if rows and rows[0]["device"] == torch.cuda.get_device_name() else []


def on_gpu(cases, flags):
    from triton.testing import do_bench

    def clock(f):
        return do_bench(f, warmup=20, rep=150, return_mode="median") / 1e3

    begin = time.time()
    rows = told_before(flags.out)
    out = open(flags.out, "a" if rows else "w")

    def tell(row):
        rows.append(row)
        out.write(json.dumps(row) + "\n")
        out.flush()

    if not rows:
        copied, product = ceilings(clock)
        tell(dict(device=torch.cuda.get_device_name(), torch=torch.__version__, copy=copied,
                  triton=kernels.triton.__version__, product=product))  # fmt: skip
    chip = rows[0]
    print(f"{chip['device']}, torch {chip['torch']}, triton {chip['triton']}: a copy "
          f"{chip['copy'] / 1e12:.2f} TB/s, a large bf16 product {chip['product'] / 1e12:.0f} "
          f"TFLOP/s\n{LAYERS}\n\n{'':64}{'ms':>9}{'CPU us':>8}{'error':>9}{'TFLOP/s':>9}"
          f"{'TB/s':>7}{'x floor':>9}{'x ours':>8}")  # fmt: skip
    for slow in False, True:
        for case in cases:
            known = {r["who"]: r for r in rows[1:] if (r["kernel"], r["shape"]) == case.key()}

            def wanted(who, known=known, slow=slow):
                return who not in known and who.startswith(SLOW) == slow

            if time.time() - begin > flags.seconds:
                return
            try:
                for who, result in time_case(case, "cuda", clock, wanted=wanted):
                    least, _ = case.floor(chip["copy"], chip["product"])
                    row = case.counts() | dict(floor=least, who=who, **result)
                    if who not in known:
                        tell(row)
                    known.setdefault(who, row)
                    print(line_of(row, known["ours"]), flush=True)
            except Exception as e:  # the case's inputs do not fit
                print(f"{case.kernel} {case.shape}: {e!r}"[:200], flush=True)
            sampler.kept.clear()


def line_of(row, ours):
    head = f"{row['kernel'][:28]:29}{row['shape']:32}" if row["who"] == "ours" else ""
    head = f"{head or '':29}"[:61] if head else f"{'':24}{row['who']:38}"
    if "failed" in row:
        return f"{head}  {row['failed'][:100]}"
    s = row["seconds"]
    error = "-" if row["error"] is None else f"{row['error']:.1e}"
    times = f"{s / ours['seconds']:8.2f}" if "seconds" in ours else ""
    return (f"{head:62}{s * 1e3:11.4f}{row['host'] * 1e6:8.0f}{error:>9}"
            f"{row['operations'] / s / 1e12:9.1f}{row['traffic'] / s / 1e12:7.2f}"
            f"{s / row['floor']:9.2f}{times}")  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Without


def analytic(cases):
    print("Nothing was measured: there is no GPU here. Floors are arithmetic, for an H200 at "
          f"{H200[0] / 1e12} TB/s and {H200[1] / 1e12:.0f} TFLOP/s.\n{LAYERS}\n\n"
          f"{'':62}{'GFLOP':>11}{'MB':>11}{'floor, us':>11}")  # fmt: skip
    rows = []
    for case in cases:
        least, by = case.floor(*H200)
        print(f"{case.kernel:30}{case.shape:32}{case.operations / 1e9:11.3f}"
              f"{case.traffic / 1e6:11.2f}{least * 1e6:11.2f} {by}")  # fmt: skip
        rows.append(case.counts() | dict(floor=least))
    return rows


def compile_report(cases):
    """What the launches of these cases compile to, see compiled.py."""
    from kernels.compiled import compiling

    print(f"\nCompiled by triton {kernels.triton.__version__} for chips that are not here, bf16. "
          "blocks: how many fit\non a multiprocessor. A launch that is the same machine code at "
          f"another shape is told once.\n\n{'':50}{'chip':>6}{'registers':>11}{'spilled':>9}"
          f"{'shared, KB':>12}{'blocks x warps':>16}  matrix")  # fmt: skip
    found = {}  # by machine code
    for case in cases:
        problem = case.problem("cpu", torch.bfloat16)
        for chip in CHIPS:
            sampler.kept.clear()  # its buffers are laid out for one chip
            with compiling(chip) as builds:
                problem.run(problem.ours)()
            for b in builds:
                if b.sass not in found:
                    found[b.sass] = vars(b) | dict(shape=case.shape, matrix=b.matrix())
                    print(f"{b.kernel:18}{case.shape:32}{chip:6}{b.registers:11}{b.spilled:9}"
                          f"{b.shared / 1024:12.1f}{b.blocks:12} x {b.warps}  "
                          f"{b.instructions[b.matrix()]} {b.matrix()}", flush=True)  # fmt: skip
    told = "kernel shape chip registers spilled shared blocks warps matrix".split()
    return [{name: row[name] for name in told} for row in found.values()]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, every in (("--shape", SHAPES), ("--kernel", CASES)):
        parser.add_argument(flag, nargs="+", choices=every, default=[*every], help="default: all")
    parser.add_argument("--no-compile", action="store_true",
                        help="without a GPU: leave out the compile report")  # fmt: skip
    parser.add_argument("--out", default="bench.jsonl", help="lines of JSON; gone on with")
    parser.add_argument("--seconds", type=float, default=600, help="begin no case after these")
    flags = parser.parse_args()
    cases = cases_of(flags)
    if torch.cuda.is_available():
        return on_gpu(cases, flags)
    report = dict(torch=torch.__version__, triton=kernels.triton.__version__)
    report |= dict(device="none", measured=False, cases=analytic(cases))
    if kernels.triton.__version__ is None:
        print("\nTriton is not installed: nothing was compiled.")
    elif not flags.no_compile:
        report["builds"] = compile_report(cases_of(flags, small=True))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
