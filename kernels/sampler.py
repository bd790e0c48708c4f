"""
The flow sampler as a whole: all Euler steps of n samples of B scenes over the action expert, in kernels over buffers that
stay where they are, so that a GPU records the launches once, as a CUDA graph, and then replays them without the CPU.

    h = tokens of x                                              `flow_step`, one launch a step
    for each layer of the expert:
        q, k, v = rope(rmsnorm(W rmsnorm(h)))                    `_heads`: the three projections; k, v go behind the tail
        y = attention of q over prefix and tail                  `prefix_attention._attend`
        h += W_o y                                               `_add`
        m = silu(W_gate rmsnorm(h)) * (W_up rmsnorm(h))          `_gate_up`
        h += W_down m                                            `_add`
    x += step * W_out rmsnorm(h)                                 `flow_step` again

That is 5 launches a layer and 1 a step: 1811 for 10 steps of the release's 36 layers, where PyTorch makes about 40 a layer.
The weights are read where the modules keep them; nothing is fused by copying, so training may go on between two calls.

A tile's rows are the T = 64 action tokens of a sample, or of two. A norm before a matrix costs no launch and no pass:
W (g * x / rms) is (W (g * x)) / rms, and the sum of squares is taken of the same tiles that are multiplied.

What one sample costs a layer at the release's shape on an H200, by arithmetic, not measured. Its memory gives 4.3 TB/s;
L2 gives 9.7 TB/s to all (github.com/te42kyfo/gpu-benches, gpu-l2-cache/h200.txt) and at most 110 GB/s to one
multiprocessor (64 bytes x 1.7 GHz), so too few programs wait for L2. `tail`: what follows when K is cut into parts and the
last of them is done, 0.7 us (assumed) until its program knows, and all parts' sums at 110 GB/s. `us`: the slower of L2 and
memory, and the tail.

                  each its whole K                  K in parts, as below
               programs  MB each    us     programs  MB each   L2, us  memory, us  tail, us     us
    _heads        32      0.79     7.1        128     0.20       2.6       3.9        1.9       5.8
    _attend      128      0.21     6.0        128     0.21       2.8       2.9        3.1       6.0
    o_proj        64      0.39     3.6        128     0.13       1.7       2.0        1.3       3.2
    _gate_up     129      0.79    15.7        129     0.79      10.5      15.7          0      15.7
    down_proj     64      1.59    14.4        128     0.54       7.1       7.9        1.3       9.2
    a layer                       46.9                                    32.4        7.5      39.9
    a step: 36 x (a layer + 5 gaps of 1 us, assumed) + 24 us of `flow_step`
                               1.89 ms                                                      1.64 ms

The floor is 1.16 ms, the bytes alone, and the aim 1.3 times that. On paper this is 1.4 times, from 1.6: the aim leaves 9 us
a layer for gaps and tails, which are assumed to take 12.5; were both half as long, it would be 1.2. What is left is to be
tried on a GPU: fewer parts in `_attend`, whose tail is longest, and launches that begin before the last one has ended.

Six samples are bound by products, 2.66 ms a step. With one sample a tile they would draw 1.42 GB a layer from L2, 5.3 ms a
step at 9.7 TB/s; two a tile draw 1.04 GB, 3.8 ms. That is L2 still, before the products.

Why there is no persistent kernel, all steps in one launch, for the nano: its expert fits on the chip (0.6 M parameters), and
floors are tempting: 5 barriers x 4 layers x 10 steps, 0.2 ms at an assumed 1 us each. But the five kernels' bodies would have
to be written again around one grid-wide barrier, weights would need one stacked copy that goes stale while training, Triton
cannot keep a weight in shared memory across a barrier, which is the point of being persistent, and whether all programs are
resident at once, without which the barrier waits for ever, is for a GPU to say. A page of readable code it is not.
"""
import math
import weakref

import torch

from kernels import capability, flow_step, multiprocessors, prefix_attention, tl, triton

# Where there are fewer tiles than multiprocessors, SPLITS programs share one: each sums over a part of K and leaves its
# sums, in float32, in PART. The program that finds all other parts there adds them up, always from the first to the last,
# so that the result does not depend on who it was, and goes on alone.


@triton.jit
def _my_part(K, BK: tl.constexpr, SPLITS: tl.constexpr):
    """From where to where along K this program sums. Parts are whole blocks of BK, the last ones fewer, or none."""
    start, stop = 0, K
    if SPLITS > 1:
        each = tl.cdiv(K, BK * SPLITS) * BK
        start = tl.program_id(2) * each
        stop = tl.minimum(start + each, K)
    return start, stop


@triton.jit
def _is_last(DONE, SPLITS: tl.constexpr):
    """Whether all other parts of the tile are there. DONE: where it is counted how many are."""
    tl.debug_barrier()  # all threads of this program have stored, and then one of them says so
    last = tl.atomic_add(DONE, 1, sem="acq_rel") == SPLITS - 1
    tl.store(DONE, 0, mask=last)  # ready for the next launch
    return last


@triton.jit
def _sum_of(PART, size, SPLITS: tl.constexpr):
    """Of a tile of addresses in the first part; the same numbers of the next part are `size` further."""
    total = tl.load(PART, cache_modifier=".cg")  # not from this multiprocessor's own cache
    for p in tl.static_range(1, SPLITS):
        total += tl.load(PART + p * size, cache_modifier=".cg")
    return total


@triton.jit
def _heads(X, GAIN, WQ, WK, WV, GQ, GK, COS, SIN, Q, K, V, PART, DONE, C, S,
           H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
           T: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Grid (blocks of BM rows, H + 2 G, SPLITS): one head of q, k or v. Its two halves, which rope turns into one another,
    are two tiles. Q (N, T, H, D); K, V (N, G, S + T, D), of which the last T are written."""
    i, c, j = tl.arange(0, BM), tl.arange(0, BH), tl.program_id(1)
    row = tl.program_id(0) * BM + i
    n, t, is_c = row // T, row % T, c < D // 2
    if j < H:
        W = WQ + j * D * C
        out = Q + (row * H + j) * D
    elif j < H + G:
        W = WK + (j - H) * D * C
        out = K + ((n * G + j - H) * (S + T) + S + t) * D
    else:
        W = WV + (j - H - G) * D * C
        out = V + ((n * G + j - H - G) * (S + T) + S + t) * D
    a, b, square = tl.zeros([BM, BH], tl.float32), tl.zeros([BM, BH], tl.float32), tl.zeros([BM], tl.float32)
    start, stop = _my_part(C, BK, SPLITS)
    for k in range(start, stop, BK):
        k = k + tl.arange(0, BK)
        x = tl.load(X + row[:, None] * C + k[None, :], mask=(k < C)[None, :], other=0.0)
        square += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
        x = (x * tl.load(GAIN + k, mask=k < C, other=0.0)[None, :]).to(x.dtype)
        w = W + c[:, None] * C + k[None, :]
        here = is_c[:, None] & (k < C)[None, :]
        a = tl.dot(x, tl.trans(tl.load(w, mask=here, other=0.0)), a, input_precision="ieee")
        b = tl.dot(x, tl.trans(tl.load(w + D // 2 * C, mask=here, other=0.0)), b, input_precision="ieee")
    if SPLITS > 1:
        tile, size = tl.program_id(0) * (H + 2 * G) + j, BM * (2 * BH + 1)
        A = PART + tile * SPLITS * size + i[:, None] * BH + c[None, :]
        B, SQUARE = A + BM * BH, PART + tile * SPLITS * size + 2 * BM * BH + i
        mine = tl.program_id(2) * size
        tl.store(A + mine, a)
        tl.store(B + mine, b)
        tl.store(SQUARE + mine, square)
        if not _is_last(DONE + tile, SPLITS):
            return
        a, b, square = _sum_of(A, size, SPLITS), _sum_of(B, size, SPLITS), _sum_of(SQUARE, size, SPLITS)
    r = tl.rsqrt(square / C + 1e-6)[:, None]
    a, b = a * r, b * r
    if j < H + G:  # q and k: normalised, then turned
        GAIN = GQ if j < H else GK
        r = tl.rsqrt(tl.sum(a * a + b * b, 1) / D + 1e-6)[:, None]
        a = a * r * tl.load(GAIN + c, mask=is_c, other=0.0).to(tl.float32)[None, :]
        b = b * r * tl.load(GAIN + D // 2 + c, mask=is_c, other=0.0).to(tl.float32)[None, :]
        at = row[:, None] * (D // 2) + c[None, :]
        cos = tl.load(COS + at, mask=is_c[None, :], other=0.0).to(tl.float32)
        sin = tl.load(SIN + at, mask=is_c[None, :], other=0.0).to(tl.float32)
        a, b = a * cos - b * sin, b * cos + a * sin
    tl.store(out[:, None] + c[None, :], a.to(Q.dtype.element_ty), mask=is_c[None, :])
    tl.store(out[:, None] + D // 2 + c[None, :], b.to(Q.dtype.element_ty), mask=is_c[None, :])


@triton.jit
def _add(X, Y, W, PART, DONE, C, K, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Grid (blocks of BM rows, blocks of BN columns, SPLITS): X (N, T, C) += Y (N, T, K) W^T, W (C, K)."""
    row, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    start, stop = _my_part(K, BK, SPLITS)
    for k in range(start, stop, BK):
        k = k + tl.arange(0, BK)
        y = tl.load(Y + row[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        w = tl.load(W + c[:, None] * K + k[None, :], mask=(c < C)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(y, tl.trans(w), total, input_precision="ieee")
    if SPLITS > 1:
        tile, size = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), BM * BN
        PART += tile * SPLITS * size + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        tl.store(PART + tl.program_id(2) * size, total)
        if not _is_last(DONE + tile, SPLITS):
            return
        total = _sum_of(PART, size, SPLITS)
    at = X + row[:, None] * C + c[None, :]
    x = tl.load(at, mask=(c < C)[None, :], other=0.0).to(tl.float32) + total
    tl.store(at, x.to(X.dtype.element_ty), mask=(c < C)[None, :])


@triton.jit
def _gate_up(X, GAIN, WG, WU, Y, C, M, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Grid (blocks of BM rows, blocks of BN columns): Y (N, T, M) = silu(W_gate z) * (W_up z), z = rmsnorm(x)."""
    row, m = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    gate, up, square = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32), tl.zeros([BM], tl.float32)
    for k in range(0, C, BK):
        k = k + tl.arange(0, BK)
        x = tl.load(X + row[:, None] * C + k[None, :], mask=(k < C)[None, :], other=0.0)
        square += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
        x = (x * tl.load(GAIN + k, mask=k < C, other=0.0)[None, :]).to(x.dtype)
        here, at = (m < M)[:, None] & (k < C)[None, :], m[:, None] * C + k[None, :]
        gate = tl.dot(x, tl.trans(tl.load(WG + at, mask=here, other=0.0)), gate, input_precision="ieee")
        up = tl.dot(x, tl.trans(tl.load(WU + at, mask=here, other=0.0)), up, input_precision="ieee")
    r = tl.rsqrt(square / C + 1e-6)[:, None]
    gate, up = gate * r, up * r
    tl.store(Y + row[:, None] * M + m[None, :], (gate * tl.sigmoid(gate) * up).to(Y.dtype.element_ty), mask=(m < M)[None, :])


def weights_of(expert, embed, project):
    """The lists that flow_step takes: of the final norm and the projection to the velocity, of the action embedding."""
    freqs = [x.freqs for x in (*embed.sinus, embed.timestep_fourier_encoder)]
    embed = [*freqs, *embed.encoder.trunk.parameters(), embed.norm.weight, embed.norm.bias]
    return [expert.norm.weight, project.weight, project.bias], embed


def tiles_of(N, T, C, like):
    """Sides of the tiles and options of the launches. Rows are one sample's or, where the chip multiplies 128 at once and
    N is even, two samples', which read a weight from L2 once and not twice."""
    BM = 2 * T if N % 2 == 0 and T <= 64 and capability(like.device) in (90, 100) else T
    half = like.element_size() == 2  # float32's tiles lie in registers, so they are smaller
    BK = min(64 if half else 32, triton.next_power_of_2(C))
    return dict(BM=BM, BK=BK, num_warps=8 if BM >= 128 else 4, num_stages=4 if half else 2)


def splits_of(tiles, K, BK, device):
    """Into how many parts K is cut: as many as there are multiprocessors for, if each has 4 blocks."""
    return max(1, min(multiprocessors(device) // tiles, K // (4 * BK)))


class Buffers:
    """Everything that one shape of sampling reads and writes, and its graph. `expert`, `embed` and `project` are the
    model's modules of the expert's layers, the action embedding and the projection to the velocity. prefix: that of
    other buffers, of the same B and P."""

    def __init__(self, expert, embed, project, steps, B, N, T, P, S, prefix=None):
        layers, weight = expert.layers, embed.norm.weight
        first = layers[0].self_attn
        H, G, D = first.n_head, first.n_kv_head, first.head_dim
        (C, M), new, self.steps = (expert.norm.weight.numel(), layers[0].mlp.up_proj.out_features), weight.new_zeros, steps
        self.layers = list(layers)
        self.out, self.embed = weights_of(expert, embed, project)
        self.flow = new(steps + 1, N, T, 2, dtype=torch.float32)
        self.times = new(steps, dtype=torch.float32).copy_(torch.arange(steps) / steps)
        self.h, self.q, self.y, self.m = new(N, T, C), new(N, T, H, D), new(N, T, H, D), new(N, T, M)
        self.cos, self.sin = new(N, T, D // 2), new(N, T, D // 2)
        self.prefix = prefix or [(new(B, G, P, D), new(B, G, P, D)) for _ in layers]
        self.tail = [(new(N, G, S + T, D), new(N, G, S + T, D)) for _ in layers]
        self.mask = torch.ones(N, 1, S + T, dtype=torch.bool, device=weight.device)
        self.plan = prefix_attention.plan_of(self.q.transpose(1, 2), self.prefix[0][0], self.tail[0][0])
        self.attention = prefix_attention.scratch_of(self.q.transpose(1, 2), self.plan)
        self.scratch = flow_step.scratch_of(self.flow[0], self.embed[-4])
        self.tiles = tiles_of(N, T, C, weight)
        BM, BK, self.BH = self.tiles["BM"], self.tiles["BK"], max(16, triton.next_power_of_2(D // 2))
        grid = lambda columns, K: (N * T // BM, columns, splits_of(N * T // BM * columns, K, BK, weight.device))
        self.heads, self.gate_up = grid(H + 2 * G, C), (N * T // BM, triton.cdiv(M, 64))
        self.o_proj, self.down_proj = grid(triton.cdiv(C, 64), H * D), grid(triton.cdiv(C, 64), M)
        parts = math.prod(self.heads) * (2 * self.BH + 1), math.prod(self.o_proj) * 64, math.prod(self.down_proj) * 64
        self.part = weight.new_empty(BM * max(parts), dtype=torch.float32)
        self.done = new(N * T // BM * max(self.heads[1], self.o_proj[1]), dtype=torch.int32)
        self.S, self.sizes, self.graph = S, (T, C, M, H, G, D), None

    def fill(self, noise, cos, sin, prefix, tail, seen):
        """What changes from scene to scene. The prefix is copied once, not once a sample; a tail may be shorter than S."""
        self.flow[0], self.cos[:], self.sin[:] = noise, cos[:, 0], sin[:, 0]
        for (k0, v0), (k, v) in zip(self.prefix, prefix):
            k0[:], v0[:] = k, v
        s = 0
        for (k1, v1), (k, v) in zip(self.tail, tail):
            if k is not None:
                s = k.shape[2]
                k1[:, :, :s], v1[:, :, :s] = k, v
            v1[:, :, s : self.S] = 0  # not seen, but 0 times a nan of another scene would be nan
        self.mask[:, :, : self.S] = False
        self.mask[:, 0, :s] = seen

    def run(self):
        T, C, M, H, G, D = self.sizes
        head, block = dict(H=H, G=G, D=D, T=T, BH=self.BH, **self.tiles), dict(BN=64, **self.tiles)
        q, y = self.q.transpose(1, 2), self.y.transpose(1, 2)
        share = flow_step.time_share(self.times, self.embed)  # (steps, width), for all steps at once
        step = lambda i, tokens, hidden: flow_step.step_into(
            self.flow[i], tokens, self.flow[max(i - 1, 0)], hidden, self.out, 1 / self.steps,
            None if tokens is None else share[i : i + 1], self.embed, self.scratch)  # fmt: skip
        # maxnreg: left alone the compiler saves registers for programs that are not there, and spills some on sm_100
        add = lambda grid, y, weight, K: _add[grid](
            self.h, y, weight, self.part, self.done, C, K, SPLITS=grid[2], maxnreg=128, **block)  # fmt: skip
        step(0, self.h, None)
        for i in range(self.steps):
            for layer, (k0, v0), (k1, v1) in zip(self.layers, self.prefix, self.tail):
                a, mlp = layer.self_attn, layer.mlp
                _heads[self.heads](
                    self.h, layer.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, a.q_norm.weight,
                    a.k_norm.weight, self.cos, self.sin, self.q, k1, v1, self.part, self.done, C, self.S,
                    SPLITS=self.heads[2], **head)  # fmt: skip
                prefix_attention.attend_into(y, q, k0, v0, k1, v1, None, self.mask, self.plan, self.attention)
                add(self.o_proj, self.y, a.o_proj.weight, H * D)
                _gate_up[self.gate_up](
                    self.h, layer.post_attention_layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, self.m, C, M,
                    **block)  # fmt: skip
                add(self.down_proj, self.m, mlp.down_proj.weight, M)
            step(i + 1, self.h if i + 1 < self.steps else None, self.h)

    def replay(self):
        if not self.h.is_cuda:
            self.run()
        elif self.graph is None:
            self.run()  # compiles, and is the result; what follows only records
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                self.run()
            self.graph = graph
        else:
            self.graph.replay()
        return self.flow.clone()


kept = weakref.WeakKeyDictionary()  # of an expert: where its weights lie, and its last buffers by their shape


@torch.no_grad()
def sample_flow(expert, embed, project, steps, noise, cos, sin, prefix, tail, seen):
    """All Euler steps from noise (N, T, 2) to controls: flow (steps + 1, N, T, 2) in float32.

    cos, sin (N, 1, T, d / 2): rope of the action tokens; prefix: each layer's k, v (B, G, P, d), which the N / B samples of
    a scene share; tail: each layer's (N, G, S, d) of the tokens that a sample has generated, or None; seen (N, S): which
    of these there are. Tails are given room for a multiple of 64, so that few shapes, and graphs, are made."""
    N, T, _ = noise.shape
    if T < 16 or T & (T - 1):
        raise ValueError(f"noise: {T} action tokens; the kernels' tiles need 16, 32, 64, ...")
    (B, _, P, _), k1 = prefix[0][0].shape, tail[0][0]
    S = 0 if k1 is None else -(-k1.shape[2] // 64) * 64
    places = [p.data_ptr() for part in (expert, embed, project) for p in (*part.parameters(), *part.buffers())]
    if expert not in kept or kept[expert][0] != places:
        kept[expert] = places, {}
    mine, shape = kept[expert][1], (steps, B, N, T, P, S)
    if shape not in mine:
        if len(mine) == 4:
            mine.pop(next(iter(mine)))
        same = next((b.prefix for (_, B1, _, _, P1, _), b in mine.items() if (B1, P1) == (B, P)), None)
        with torch.inference_mode(False), torch.no_grad():  # buffers for all modes, whichever the first call is in
            mine[shape] = Buffers(expert, embed, project, steps, B, N, T, P, S, same)
    mine[shape].fill(noise, cos, sin, prefix, tail, seen)
    return mine[shape].replay()
