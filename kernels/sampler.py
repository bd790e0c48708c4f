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

A block of rows is a sample: its T = 64 action tokens. A norm before a matrix costs no launch and no pass: W (g * x / rms) is
(W (g * x)) / rms, and the sum of squares is taken of the same tiles that are multiplied.

By arithmetic, not measured, for one sample at the release's shape on an H200: a step must read 4.56 GB of weights and 0.44
GB of prefix, 1.16 ms at 4.3 TB/s. With these tiles a layer moves about 240 MB from L2 into the multiprocessors, at some 5.5
TB/s 44 us, 1.6 ms a step: what is bound is not the memory but the 64 rows, read again for every 64 columns. Splitting K
over programs would halve that and cost either another launch or float32 sums in an order that changes.

Why there is no persistent kernel, all steps in one launch, for the nano: its expert fits on the chip (0.6 M parameters), and
floors are tempting: 5 barriers x 4 layers x 10 steps, 0.2 ms at an assumed 1 us each. But the five kernels' bodies would have
to be written again around one grid-wide barrier, weights would need one stacked copy that goes stale while training, Triton
cannot keep a weight in shared memory across a barrier, which is the point of being persistent, and whether all programs are
resident at once, without which the barrier waits for ever, is for a GPU to say. A page of readable code it is not.
"""
import weakref

import torch

from kernels import flow_step, prefix_attention, tl, triton


@triton.jit
def _heads(X, GAIN, WQ, WK, WV, GQ, GK, COS, SIN, Q, K, V, C, S, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
           T: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Grid (samples, H + 2 G): one head of q, k or v. Its two halves, which rope turns into one another, are two tiles.
    Q (N, T, H, D); K, V (N, G, S + T, D), of which the last T are written."""
    n, j = tl.program_id(0), tl.program_id(1)
    if j < H:
        W = WQ + j * D * C
        out = Q + (n * T * H + j) * D + tl.arange(0, T) * (H * D)
    elif j < H + G:
        W = WK + (j - H) * D * C
        out = K + ((n * G + j - H) * (S + T) + S) * D + tl.arange(0, T) * D
    else:
        W = WV + (j - H - G) * D * C
        out = V + ((n * G + j - H - G) * (S + T) + S) * D + tl.arange(0, T) * D
    t, c = tl.arange(0, T), tl.arange(0, BH)
    is_c = c < D // 2
    a, b, square = tl.zeros([T, BH], tl.float32), tl.zeros([T, BH], tl.float32), tl.zeros([T], tl.float32)
    for k in range(0, C, BK):
        k = k + tl.arange(0, BK)
        x = tl.load(X + (n * T + t)[:, None] * C + k[None, :], mask=(k < C)[None, :], other=0.0)
        square += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
        x = (x * tl.load(GAIN + k, mask=k < C, other=0.0)[None, :]).to(x.dtype)
        w = W + c[:, None] * C + k[None, :]
        here = is_c[:, None] & (k < C)[None, :]
        a = tl.dot(x, tl.trans(tl.load(w, mask=here, other=0.0)), a, input_precision="ieee")
        b = tl.dot(x, tl.trans(tl.load(w + D // 2 * C, mask=here, other=0.0)), b, input_precision="ieee")
    r = tl.rsqrt(square / C + 1e-6)[:, None]
    a, b = a * r, b * r
    if j < H + G:  # q and k: normalised, then turned
        GAIN = GQ if j < H else GK
        r = tl.rsqrt(tl.sum(a * a + b * b, 1) / D + 1e-6)[:, None]
        a = a * r * tl.load(GAIN + c, mask=is_c, other=0.0).to(tl.float32)[None, :]
        b = b * r * tl.load(GAIN + D // 2 + c, mask=is_c, other=0.0).to(tl.float32)[None, :]
        at = (n * T + t)[:, None] * (D // 2) + c[None, :]
        cos = tl.load(COS + at, mask=is_c[None, :], other=0.0).to(tl.float32)
        sin = tl.load(SIN + at, mask=is_c[None, :], other=0.0).to(tl.float32)
        a, b = a * cos - b * sin, b * cos + a * sin
    tl.store(out[:, None] + c[None, :], a.to(Q.dtype.element_ty), mask=is_c[None, :])
    tl.store(out[:, None] + D // 2 + c[None, :], b.to(Q.dtype.element_ty), mask=is_c[None, :])


@triton.jit
def _add(X, Y, W, C, K, T: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Grid (samples, blocks of BN columns): X (N, T, C) += Y (N, T, K) W^T, W (C, K)."""
    row, c = tl.program_id(0) * T + tl.arange(0, T), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros([T, BN], tl.float32)
    for k in range(0, K, BK):
        k = k + tl.arange(0, BK)
        y = tl.load(Y + row[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        w = tl.load(W + c[:, None] * K + k[None, :], mask=(c < C)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(y, tl.trans(w), total, input_precision="ieee")
    at = X + row[:, None] * C + c[None, :]
    x = tl.load(at, mask=(c < C)[None, :], other=0.0).to(tl.float32) + total
    tl.store(at, x.to(X.dtype.element_ty), mask=(c < C)[None, :])


@triton.jit
def _gate_up(X, GAIN, WG, WU, Y, C, M, T: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Grid (samples, blocks of BN columns): Y (N, T, M) = silu(W_gate z) * (W_up z), z = rmsnorm(x)."""
    row, m = tl.program_id(0) * T + tl.arange(0, T), tl.program_id(1) * BN + tl.arange(0, BN)
    gate, up, square = tl.zeros([T, BN], tl.float32), tl.zeros([T, BN], tl.float32), tl.zeros([T], tl.float32)
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


class Buffers:
    """Everything that one shape of sampling reads and writes, and its graph. `expert`, `embed` and `project` are the
    model's modules of the expert's layers, the action embedding and the projection to the velocity."""

    def __init__(self, expert, embed, project, steps, B, N, T, P, S):
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
        self.prefix = [(new(B, G, P, D), new(B, G, P, D)) for _ in layers]
        self.tail = [(new(N, G, S + T, D), new(N, G, S + T, D)) for _ in layers]
        self.mask = torch.ones(N, 1, S + T, dtype=torch.bool, device=weight.device)
        self.plan = prefix_attention.plan_of(self.q.transpose(1, 2), self.prefix[0][0], self.tail[0][0])
        self.attention = prefix_attention.scratch_of(self.q.transpose(1, 2), self.plan)
        self.scratch = flow_step.scratch_of(self.flow[0], self.embed[-4])
        self.S, self.sizes, self.graph = S, (N, T, C, M, H, G, D), None

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
        self.mask[:, :, : self.S] = False
        self.mask[:, 0, :s] = seen

    def run(self):
        N, T, C, M, H, G, D = self.sizes
        BK = min(64, triton.next_power_of_2(C))
        shape = dict(T=T, BK=BK, num_warps=4, num_stages=4 if self.h.element_size() == 2 else 2)
        BN = 64 if N > 1 else 32  # columns of a program of `_add`: with one sample there are few programs
        q, y = self.q.transpose(1, 2), self.y.transpose(1, 2)
        share = flow_step.time_share(self.times, self.embed)  # (steps, width), for all steps at once
        step = lambda i, tokens, hidden: flow_step.step_into(
            self.flow[i], tokens, self.flow[max(i - 1, 0)], hidden, self.out, 1 / self.steps,
            None if tokens is None else share[i : i + 1], self.embed, self.scratch)  # fmt: skip
        step(0, self.h, None)
        for i in range(self.steps):
            for layer, (k0, v0), (k1, v1) in zip(self.layers, self.prefix, self.tail):
                a, mlp = layer.self_attn, layer.mlp
                _heads[(N, H + 2 * G)](
                    self.h, layer.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, a.q_norm.weight,
                    a.k_norm.weight, self.cos, self.sin, self.q, k1, v1, C, self.S, H=H, G=G, D=D,
                    BH=max(16, triton.next_power_of_2(D // 2)), **shape)  # fmt: skip
                prefix_attention.attend_into(y, q, k0, v0, k1, v1, None, self.mask, self.plan, self.attention)
                _add[(N, triton.cdiv(C, BN))](self.h, self.y, a.o_proj.weight, C, H * D, BN=BN, **shape)
                _gate_up[(N, triton.cdiv(M, 64))](
                    self.h, layer.post_attention_layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, self.m, C, M,
                    BN=64, **shape)  # fmt: skip
                _add[(N, triton.cdiv(C, BN))](self.h, self.m, mlp.down_proj.weight, C, M, BN=BN, **shape)
            step(i + 1, self.h if i + 1 < self.steps else None, self.h)

    def replay(self):
        if not self.h.is_cuda:
            self.run()
        elif self.graph is None:
            self.run()  # compiles, and is the result; what follows only records
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.run()
        else:
            self.graph.replay()
        return self.flow.clone()


shapes = weakref.WeakKeyDictionary()  # of an expert: its last buffers of each shape


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
    key = (steps, B, N, T, P, S, *(p.data_ptr() for p in (embed.norm.weight, project.weight)))
    mine = shapes.setdefault(expert, {})
    if key not in mine:
        if len(mine) == 4:
            mine.pop(next(iter(mine)))
        mine[key] = Buffers(expert, embed, project, steps, B, N, T, P, S)
    mine[key].fill(noise, cos, sin, prefix, tail, seen)
    return mine[key].replay()
