"""
The flow sampler as a whole: all Euler steps of n samples of B scenes over the action expert. The
kernels work over buffers that stay in place, so a GPU records the launches once, as a CUDA graph,
and replays them without the CPU.

    h = tokens of x                                            `flow_step`, one launch a step
    for each layer of the expert:
        q, k, v = rope(rmsnorm(W rmsnorm(h)))                  `_heads`: k, v go behind the tail
        y = attention of q over prefix and tail                `prefix_attention._attend`
        h += W_o y                                             `_add`
        m = silu(W_gate rmsnorm(h)) * (W_up rmsnorm(h))        `_gate_up`
        h += W_down m                                          `_add`
    x += step * W_out rmsnorm(h)                               `flow_step` again

That is 5 launches a layer, 6 where attention's keys are in parts, and 1 a step: 2171 for 10 steps
of the release's 36 layers and one sample, where PyTorch makes about 40 a layer. The weights are
read where the modules keep them. Nothing is fused by copying, so training may go on between two
calls.

A tile's rows are the T = 64 action tokens of a sample, or of two. A norm before a matrix costs no
launch: see `_two_products` and what stands above it. Under autocast a 16-bit copy of the expert is
sampled, and brought up to date before each call.

One sample at the release's shape: microseconds a launch on an H200 (2026-11-26, in the graph), the
bytes of weights, keys and values at 4.18 TB/s, and what was predicted by counting bytes in L2 and
0.7 us for a sum's parts:

                       bytes   predicted   first version    now
    _heads               4.0         5.8           16.6    12.1
    _attend (+ _join)    3.0         6.0           18.1    16.9
    o_proj + down_proj  10.1        12.4           24.7    21.5
    _gate_up            16.2        15.7           35.8    21.5
    a layer             33.3        39.9           95.2    72.0
    _step, per step                   24            260      98

The launches lie 0.4 us apart, where 1 us was assumed. What was underestimated is latency: a launch
that reads nothing from memory still takes 5 us, from its first load to its last part's sum. The
first version lost most where the product's loop made gain * x in registers, which the compiler
serialises on Hopper. README.md has the whole, its rivals and what was tried in vain.
"""
import copy
import math
import weakref

import torch

from kernels import (
    capability,
    flow_step,
    in_multiples,
    prefix_attention,
    stock,
    tiles,
    tl,
    triton,
)

# With fewer tiles than multiprocessors, SPLITS programs share a tile. Each sums over a part of K
# and leaves its sums, in float32, in PART. The program that finds all other parts there adds them
# up and goes on alone. It always adds from the first to the last, so the result does not depend on
# which program it was.
#
# A norm needs its row's sum of squares, and a tile has only some of the row's columns. So who
# writes h writes z = gain * h too, with the next norm's gain, and for each tile the sums of squares
# of its columns. Who reads z multiplies it as it is and scales the product:
# W rmsnorm(h) = (W z) / rms.


@triton.jit
def _my_part(K, BK: tl.constexpr, SPLITS: tl.constexpr):
    """From where to where along K this program sums. Parts are whole blocks of BK; the last ones
    may have fewer, or none."""
    start, stop = 0, K
    if SPLITS > 1:
        each = tl.cdiv(K, BK * SPLITS) * BK
        start = tl.program_id(2) * each
        stop = tl.minimum(start + each, K)
    return start, stop


@triton.jit
def _sum_of(PART, size, SPLITS: tl.constexpr):
    """Sum over the parts. PART: a tile's addresses in the first; the next is `size` further."""
    total = tl.load(PART, cache_modifier=".cg")  # not from this multiprocessor's own cache
    for p in tl.static_range(1, SPLITS):
        total += tl.load(PART + p * size, cache_modifier=".cg")
    return total


@triton.jit
def _two_products(Z, A, B, row, n, N, C, start, stop, BK: tl.constexpr):
    """Columns n < N of z A^T and z B^T: sums over z's columns from start to stop."""
    a = tl.zeros([row.shape[0], n.shape[0]], tl.float32)
    b = tl.zeros([row.shape[0], n.shape[0]], tl.float32)
    for k in range(start, stop, BK):
        k = k + tl.arange(0, BK)
        z = tiles.read_block(Z, row, k, None, C)
        at = n[:, None] * C + k[None, :]
        there = (n < N)[:, None] & (k < C)[None, :]
        w = tl.load(A + at, mask=there, other=0.0)
        a = tl.dot(z, tl.trans(w), a, input_precision="ieee")
        w = tl.load(B + at, mask=there, other=0.0)
        b = tl.dot(z, tl.trans(w), b, input_precision="ieee")
    return a, b


@triton.jit
def _squares(SQUARE, row, BLOCKS: tl.constexpr):
    """These rows' sums of squares, in BLOCKS parts. To be read before what takes long."""
    j = tl.arange(0, triton.next_power_of_2(BLOCKS))
    return tiles.read_block(SQUARE, row, j, None, BLOCKS)


@triton.jit
def _over_rms(square, C):
    return tl.rsqrt(tl.sum(square, 1) / C + 1e-6)[:, None]


@triton.jit
def _heads(Z, SQUARE, WQ, WK, WV, GQ, GK, COS, SIN, Q, K, V, PART, DONE, C, S,
           BLOCKS: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
           SPLITS: tl.constexpr, T: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
           BK: tl.constexpr):  # fmt: skip
    """Grid (blocks of BM rows, H + 2 G, SPLITS): one head of q, k or v. Its two halves, which rope
    turns into one another, are two tiles. Q (N, T, H, D); K, V (N, G, S + T, D), of which the last
    T are written."""
    i = tl.arange(0, BM)
    c = tl.arange(0, BH)
    j = tl.program_id(1)
    row = tl.program_id(0) * BM + i
    n, t = row // T, row % T
    is_c = c < D // 2
    if j < H:
        W = WQ + j * D * C
        out = Q + (row * H + j) * D
    elif j < H + G:
        W = WK + (j - H) * D * C
        out = K + ((n * G + j - H) * (S + T) + S + t) * D
    else:
        W = WV + (j - H - G) * D * C
        out = V + ((n * G + j - H - G) * (S + T) + S + t) * D
    start, stop = _my_part(C, BK, SPLITS)
    second = W + D // 2 * C
    square = _squares(SQUARE, row, BLOCKS)
    a, b = _two_products(Z, W, second, row, c, D // 2, C, start, stop, BK)
    if SPLITS > 1:
        tile = tl.program_id(0) * (H + 2 * G) + j
        size = BM * 2 * BH
        A = PART + tile * SPLITS * size + i[:, None] * BH + c[None, :]
        B = A + BM * BH
        mine = tl.program_id(2) * size
        tl.store(A + mine, a)
        tl.store(B + mine, b)
        if not tiles.is_last(DONE + tile, SPLITS):
            return
        a = _sum_of(A, size, SPLITS)
        b = _sum_of(B, size, SPLITS)
    r = _over_rms(square, C)
    a, b = a * r, b * r
    if j < H + G:  # q and k: normalised, then turned
        GAIN = GQ if j < H else GK
        r = tl.rsqrt(tl.sum(a * a + b * b, 1) / D + 1e-6)[:, None]
        a = a * r * tl.load(GAIN + c, mask=is_c, other=0.0).to(tl.float32)[None, :]
        b = b * r * tl.load(GAIN + D // 2 + c, mask=is_c, other=0.0).to(tl.float32)[None, :]
        cos = tiles.read_block(COS, row, c, None, D // 2).to(tl.float32)
        sin = tiles.read_block(SIN, row, c, None, D // 2).to(tl.float32)
        a, b = a * cos - b * sin, b * cos + a * sin
    tl.store(out[:, None] + c[None, :], a.to(Q.dtype.element_ty), mask=is_c[None, :])
    tl.store(out[:, None] + D // 2 + c[None, :], b.to(Q.dtype.element_ty), mask=is_c[None, :])


@triton.jit
def _add(X, Y, W, GAIN, Z, SQUARE, PART, DONE, C, K, SPLITS: tl.constexpr, BM: tl.constexpr,
         BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Grid (blocks of BM rows, blocks of BN columns, SPLITS): X (N, T, C) += Y (N, T, K) W^T, W
    (C, K). Z (N, T, C) = GAIN * X, SQUARE (N * T, column blocks)."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    start, stop = _my_part(K, BK, SPLITS)
    x = tiles.read_block(X, row, c, None, C)
    gain = tl.load(GAIN + c, mask=c < C, other=0.0)
    total = tiles.linear(Y, W, row, None, c, C, K, start, stop, BK)
    if SPLITS > 1:
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        size = BM * BN
        PART += tile * SPLITS * size + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        tl.store(PART + tl.program_id(2) * size, total)
        if not tiles.is_last(DONE + tile, SPLITS):
            return
        total = _sum_of(PART, size, SPLITS)
    x = (x.to(tl.float32) + total).to(X.dtype.element_ty)
    tiles.write_block(X, row, c, None, C, x)
    tiles.write_block(Z, row, c, None, C, x * gain[None, :])
    square = tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
    tl.store(SQUARE + row * tl.num_programs(1) + tl.program_id(1), square)


@triton.jit
def _gate_up(Z, SQUARE, WG, WU, Y, C, M, BLOCKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
             BK: tl.constexpr):  # fmt: skip
    """Grid (blocks of BM rows, blocks of BN columns): Y (N, T, M) = silu(W_gate z) * (W_up z), with
    z = rmsnorm(x)."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    m = tl.program_id(1) * BN + tl.arange(0, BN)
    square = _squares(SQUARE, row, BLOCKS)
    gate, up = _two_products(Z, WG, WU, row, m, M, C, 0, C, BK)
    r = _over_rms(square, C)
    gate, up = gate * r, up * r
    tiles.write_block(Y, row, m, None, M, gate * tl.sigmoid(gate) * up)


def weights_of(expert, embed, project):
    """The lists that `flow_step` takes: of the final norm and the projection to the velocity, and
    of the action embedding."""
    freqs = [x.freqs for x in (*embed.sinus, embed.timestep_fourier_encoder)]
    embed = [*freqs, *embed.encoder.trunk.parameters(), embed.norm.weight, embed.norm.bias]
    return [expert.norm.weight, project.weight, project.bias], embed


def launch_of(kind, N, T, columns, K, like, BN=64):
    """Grid and options of a product of N * T rows of K numbers and a matrix with so many columns.
    kind: heads (BN: their width), o_proj, gate_up or down_proj. The sizes were the fastest of those
    tried on an H200 at the release's shape, for 1, 6 and 16 samples.

    A tile's rows are a sample's. Where the chip multiplies 128 at once they may be two samples': a
    weight is then read from L2 once, not twice. With few rows K is cut into parts, and many blocks
    are under way."""
    rows, chip, adds = N * T, capability(like.device), kind in ("o_proj", "down_proj")
    few, many = rows <= 128, rows > 512
    two = N % 2 == 0 and T <= 64 and chip in (90, 100) and (many if adds else not few)
    BM = 2 * T if two else T
    if adds:
        BN = 32 if few else 128 if many and two else 64
    stages = 6 if few and chip in (80, 90, 100) else 3 if kind == "gate_up" and many else 4
    parts = dict(heads=(2, 1, 1), o_proj=(2, 1, 1), gate_up=(1, 1, 1), down_proj=(4, 2, 1))
    half = like.element_size() == 2  # float32's tiles lie in registers, so they are smaller
    BK = min(64 if half else 32, triton.next_power_of_2(K))
    splits = max(1, min(parts[kind][1 + many - few], K // (4 * BK)))
    options = dict(BM=BM, BN=BN, BK=BK, num_warps=8 if BM >= 128 else 4)
    options |= dict(num_stages=stages if half else 2)
    if adds and chip == 100 and BM < 128:  # left alone, the compiler saves registers and spills
        options["maxnreg"] = 128
    return (rows // BM, triton.cdiv(columns, BN), splits), options


class Buffers:
    """Everything that one shape of sampling reads and writes, and its graph.

    expert, embed, project: the model's modules of the expert's layers, the action embedding and the
    projection to the velocity. prefix: that of other buffers, of the same B and P."""

    def __init__(self, expert, embed, project, steps, B, N, T, P, S, eta=0.0, prefix=None):
        weight, layers = embed.norm.weight, list(expert.layers)
        new = weight.new_zeros
        attention = layers[0].self_attn
        H, G, D = attention.n_head, attention.n_kv_head, attention.head_dim
        C, M = expert.norm.weight.numel(), layers[0].mlp.up_proj.out_features
        self.layers, self.steps, self.S, self.graph = layers, steps, S, None
        self.gains = [x.input_layernorm.weight for x in layers[1:]] + [expert.norm.weight]
        self.sizes = T, C, M, H, G, D
        self.out, self.embed = weights_of(expert, embed, project)

        self.flow = new(steps + 1, N, T, 2, dtype=torch.float32)
        self.numbers = [flow_step.step_numbers(i, steps, eta) for i in range(steps)]
        self.kicks = torch.zeros_like(self.flow[1:]) if eta else None
        self.times = torch.arange(steps, device=weight.device) / steps
        self.h = new(N, T, C)
        self.z = new(N, T, C)
        self.q = new(N, T, H, D)
        self.y = new(N, T, H, D)
        self.m = new(N, T, M)
        self.cos = new(N, T, D // 2)
        self.sin = new(N, T, D // 2)
        self.prefix = prefix or [new(2, B, G, P, D).unbind(0) for _ in layers]
        self.tails = new(len(layers), 2, N, G, S + T, D)
        self.tail = [kv.unbind(0) for kv in self.tails]
        self.mask = torch.ones(N, 1, S + T, dtype=torch.bool, device=weight.device)

        q = self.q.transpose(1, 2)
        self.plan = prefix_attention.attention_plan(q, self.prefix[0][0], self.tail[0][0])
        self.attention = prefix_attention.attention_scratch(q, self.plan)
        self.scratch = flow_step.step_scratch(self.flow[0], self.embed[-4])
        self.BH = max(16, triton.next_power_of_2(D // 2))
        self.heads = launch_of("heads", N, T, (H + 2 * G) * D, C, weight, D)
        self.o_proj = launch_of("o_proj", N, T, C, H * D, weight)
        self.gate_up = launch_of("gate_up", N, T, M, C, weight)
        self.down_proj = launch_of("down_proj", N, T, C, M, weight)
        del self.heads[1]["BN"]
        self.square = weight.new_zeros(N * T, self.o_proj[0][1], dtype=torch.float32)
        self.blocks = self.square.shape[1]
        launches = self.heads, self.o_proj, self.down_proj
        sides = 2 * self.BH, self.o_proj[1]["BN"], self.down_proj[1]["BN"]
        part = max(o["BM"] * side * math.prod(grid) for (grid, o), side in zip(launches, sides))
        self.part = weight.new_empty(part, dtype=torch.float32)
        self.done = new(max(grid[0] * grid[1] for grid, _ in launches), dtype=torch.int32)

    def fill(self, noise, cos, sin, prefix, tail, seen):
        """What changes from scene to scene. The prefix is copied once, not once a sample; a tail
        may be shorter than S."""
        self.flow[0] = noise
        self.cos[:] = cos[:, 0]
        self.sin[:] = sin[:, 0]
        there, here = [x for kv in self.prefix for x in kv], [x for kv in prefix for x in kv]
        torch._foreach_copy_(there, here)
        s = 0
        if tail[0] is not None:
            s = tail[0][0].shape[2]
            there = self.tails[:, :, :, :, :s].flatten(0, 1).unbind(0)
            torch._foreach_copy_(there, [x for kv in tail for x in kv])
        self.tails[:, 1, :, :, s : self.S] = 0  # unseen, but 0 times another scene's NaN were NaN
        self.mask[:, :, : self.S] = False
        self.mask[:, 0, :s] = seen

    def draw(self, generator):
        """What each step draws anew."""
        for kick, (_, _, std) in zip(self.kicks, self.numbers):
            if std:
                kick.normal_(generator=generator).mul_(std)

    def run(self):
        """All launches, from flow[0] to flow[steps]."""
        share = flow_step.time_share(self.times, self.embed)  # (steps, width)
        self.step(0, None, share)
        for i in range(self.steps):
            for layer, *kv, gain in zip(self.layers, self.prefix, self.tail, self.gains):
                self.run_layer(layer, *kv, gain)
            self.step(i + 1, self.h, share)

    def step(self, i, hidden, share):
        """The controls flow[i] from those before, and their tokens, except after the last step."""
        last = i == self.steps
        stay, step, _ = self.numbers[max(i - 1, 0)]
        kick = None if self.kicks is None or i == 0 else self.kicks[i - 1]
        gain = self.layers[0].input_layernorm.weight
        flow_step.step_into(
            self.flow[i], None if last else self.h, self.flow[max(i - 1, 0)], hidden, self.out,
            step, None if last else share[i : i + 1], self.embed, self.scratch,
            (gain, self.z, self.square), stay, kick,
        )  # fmt: skip

    def run_layer(self, layer, prefix, tail, next_gain):
        T, C, M, H, G, D = self.sizes
        a, mlp = layer.self_attn, layer.mlp
        grid, options = self.heads
        _heads[grid](
            self.z, self.square, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight,
            a.q_norm.weight, a.k_norm.weight, self.cos, self.sin, self.q, *tail, self.part,
            self.done, C, self.S, BLOCKS=self.blocks, H=H, G=G, D=D, SPLITS=grid[2], T=T,
            BH=self.BH, **options,
        )  # fmt: skip
        prefix_attention.attend_into(
            self.y.transpose(1, 2), self.q.transpose(1, 2), *prefix, *tail, None, self.mask,
            self.plan, self.attention,
        )  # fmt: skip
        self.add(self.o_proj, self.y, a.o_proj.weight, layer.post_attention_layernorm.weight)
        grid, options = self.gate_up
        _gate_up[grid[:2]](
            self.z, self.square, mlp.gate_proj.weight, mlp.up_proj.weight, self.m, C, M,
            BLOCKS=self.blocks, **options,
        )  # fmt: skip
        self.add(self.down_proj, self.m, mlp.down_proj.weight, next_gain)

    def add(self, launch, y, weight, gain):
        grid, options = launch
        _add[grid](
            self.h, y, weight, gain, self.z, self.square, self.part, self.done, *weight.shape,
            SPLITS=grid[2], **options,
        )  # fmt: skip

    def replay(self):
        """flow (steps + 1, N, T, 2), a copy. The first call on a GPU runs, then records."""
        if self.graph is not None:
            self.graph.replay()
            return self.flow.clone()
        self.run()
        if self.h.is_cuda:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                self.run()  # only records
            self.graph = graph
        return self.flow.clone()


copies = weakref.WeakKeyDictionary()  # expert: expert, embed, project in another dtype


def as_autocast(*parts):
    """expert, embed and project, or where autocast has another dtype copies of them in that, with
    the weights of now."""
    device = next(parts[0].parameters()).device.type
    own = [p for part in parts for p in part.parameters()]
    if not torch.is_autocast_enabled(device) or own[0].dtype != torch.float32:
        return parts
    dtype = torch.get_autocast_dtype(device)
    if parts[0] not in copies:
        made = copies[parts[0]] = [copy.deepcopy(part).requires_grad_(False) for part in parts]
        for p in (p for part in made for p in part.parameters()):
            p.data = p.data.to(dtype)
    made = copies[parts[0]]
    torch._foreach_copy_([p for part in made for p in part.parameters()], own)
    return made


ROOM = 64
kept = weakref.WeakKeyDictionary()  # expert: (where its weights lie, {shape: its last buffers})


@torch.no_grad()
def sample_flow(expert, embed, project, steps, noise, cos, sin, prefix, tail, seen, eta=0.0,
                generator=None):  # fmt: skip
    """All Euler steps from noise (N, T, 2) to controls: flow (steps + 1, N, T, 2) in float32. eta:
    the share of noise that a step draws anew, see alpamayo.euler_step.

    cos, sin (N, 1, T, d / 2): rope of the action tokens. prefix: each layer's k, v (B, G, P, d),
    which the N / B samples of a scene share. tail: each layer's (N, G, S, d) of the tokens that a
    sample has generated, or None. seen (N, S): which of these there are. Tails are given room for a
    multiple of ROOM, so that few shapes, and graphs, are made."""
    N, T, _ = noise.shape
    if T < 16 or T & (T - 1):
        raise ValueError(f"noise: {T} action tokens; the kernels' tiles need 16, 32, 64, ...")
    B, _, P, _ = prefix[0][0].shape
    S = 0 if tail[0] is None else in_multiples(tail[0][0].shape[2], ROOM)
    expert, embed, project = as_autocast(expert, embed, project)
    modules = stock.all_in((expert, embed, project))
    places = [x.data_ptr() for x in stock.tensors_in(modules)]
    if expert not in kept or kept[expert][0] != places:
        kept[expert] = places, {}
    mine = kept[expert][1]
    shape = steps, B, N, T, P, S, eta
    if shape not in mine:
        if len(mine) == 4:
            mine.pop(next(iter(mine)))
        same = [b.prefix for key, b in mine.items() if (key[1], key[4]) == (B, P)]
        with torch.inference_mode(False), torch.no_grad():  # usable in every mode
            prefix_too = same[0] if same else None
            mine[shape] = Buffers(expert, embed, project, *shape, prefix_too)
    mine[shape].fill(noise, cos, sin, prefix, tail, seen)
    if eta:
        mine[shape].draw(generator)
    return mine[shape].replay()
