"""
The flow-matching sampler of a small expert in one launch: a program takes one sample from noise to
controls, through all Euler steps and all layers.

    for each step, from flow time t:
        h = embed(x, t)                          x: the sample's T = 64 controls, (T, 2); h (T, C)
        for each layer of the expert:
            h += W_o attention(q, k, v)          q, k, v = rope(rmsnorm(W rmsnorm(h))), over the
                                                 prompt, what the sample has said, and its own T
            h += W_down (silu(W_gate z) * (W_up z))      z = rmsnorm(h)
        x = euler_step(x, W_out rmsnorm(h))      with new noise where eta > 0

Samples never meet in there. They share a prompt, and each reads it. So no program waits for
another, and N samples are N programs of a launch without knowing of one another. Within a program
each line needs all rows of the one before. It goes through memory, which for so few bytes is the
cache, and `tl.debug_barrier` makes the program's threads wait until all have written.

In sampler.py, for a large expert, a launch is one matrix product, cut over all multiprocessors.
Here a sample has one multiprocessor, which reads from L2 at most 64 bytes a clock: weights of 4 MiB
in 38 us, and so often as there are steps. `fits` draws the line there.

It runs in 16 bits. In 32 the compiled kernel wrote beside its shared memory on an H200, at some
sizes and not at others (triton 3.6.0, sm_90), so `fits` leaves that to sampler.py. nano's five
steps, with all that is around them, take 3.2 ms there. By arithmetic: its 1.2 MB of weights are 11
us a step, and its products as long at a tenth of what a multiprocessor can multiply. But a layer is
some 25 products of which each waits for the one before. At 0.8 us each that is 80 us a step, for
one sample or 132.
"""
import math

import torch
from torch.nn.utils import parameters_to_vector

from kernels import capability, tiles, tl, triton

MOST_BYTES = 4 * 2**20  # of weights


def plain_sample(
    expert, embed, project, euler_step, steps, noise, cos, sin, past, eta=0.0, fresh=()
):
    """The loop of Alpamayo.drive: all steps from noise (N, T, 2), flow (steps + 1, N, T, 2).

    expert, embed, project, euler_step: the model's. past: a `Past` for each layer, which has the
    prompt's keys and values and the sample's. fresh: for eta > 0, normal numbers (N, T, 2) for each
    step but the last."""
    flow = [noise]
    for i in range(steps):
        x, t = flow[-1], i / steps
        tokens = embed(x, x.new_full((len(x),), t))
        velocity = project(expert(tokens, cos, sin, past)).to(x.dtype)
        x, std = euler_step(x, velocity, t, 1 / steps, eta)
        flow.append(x + std * fresh[i] if std else x)
    return torch.stack(flow)


# --------------------------------------------------------------------------------------------------
# The kernel. H to Y are a tensor each, with a row for each control of each sample. A tile has this
# sample's T rows, and columns padded to a power of two. W points at the weights that come next: all
# parameters lie in one vector, in the order in which their modules name them.


@triton.jit
def _linear(X, W, row, n, ok, K: tl.constexpr, BK: tl.constexpr):
    """x W^T in float32: these rows of X (.., K); these rows of W (.., K), which become columns, 0
    where not ok."""
    y = tl.zeros([row.shape[0], n.shape[0]], tl.float32)
    for k in range(0, K, BK):
        k = k + tl.arange(0, BK)
        x = tiles.read_block(X, row, k, None, K)
        w = tiles.read_block(W, n, k, ok, K)
        y = tl.dot(x, tl.trans(w), y)
    return y


@triton.jit
def _vector(W, i, n: tl.constexpr):
    """n numbers as a row (1, n padded), in float32."""
    return tl.load(W + i, mask=i < n, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _rms_norm(x, GAIN, i, n: tl.constexpr, eps: tl.constexpr):
    return x * tl.rsqrt(tl.sum(x * x, 1) / n + eps)[:, None] * _vector(GAIN, i, n)


@triton.jit
def _norm_into(Z, H, GAIN, row, c, C: tl.constexpr):
    h = tiles.read_block(H, row, c, None, C)
    tiles.write_block(Z, row, c, None, C, _rms_norm(h, GAIN, c, C, 1e-6))
    tl.debug_barrier()


@triton.jit
def _add_into(H, X, W, row, c, C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    tl.debug_barrier()
    h = tiles.read_block(H, row, c, None, C) + _linear(X, W, row, c, c < C, K, BK)
    tiles.write_block(H, row, c, None, C, h)
    tl.debug_barrier()


@triton.jit
def _wave(turns, is_sine):
    """sin or cos of 2 pi turns. tl.sin is right for any number, by a hundred instructions. Here a
    polynomial has seven digits of a quarter turn."""
    x = turns - tl.floor(turns + 0.5)
    x = tl.where(is_sine, x - 0.25, x)  # sin is cos a quarter later
    x = 0.25 - tl.abs(x - tl.floor(x + 0.5))  # cos(2 pi x) = sin(2 pi (1/4 - |x|))
    y = x * x
    return x * (6.283185 + y * (y * (81.601006 + y * (y * 39.536705 - 76.54978)) - 41.341656))


@triton.jit
def _embed_into(H, a, k, time, W, FREQS, Z, row, A: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
                DEPTH: tl.constexpr, BF: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr,
                BK: tl.constexpr):  # fmt: skip
    """ActionEmbed of controls a, k (T,) at a flow time: F features of each number, DEPTH layers."""
    i, c, j = tl.arange(0, BA), tl.arange(0, BC), tl.arange(0, BF)
    freq = tl.load(FREQS + j // F * (F // 2) + j % (F // 2), mask=j < 3 * F, other=0.0)
    x = tl.where((j < F)[None, :], a[:, None], tl.where((j < 2 * F)[None, :], k[:, None], time))
    z = _wave(x * freq.to(tl.float32)[None, :], (j % F < F // 2)[None, :]) * 1.4142135623730951
    w = tiles.read_block(W, i, j, i < A, 3 * F)
    y = tl.dot(z.to(w.dtype), tl.trans(w))
    W += A * 3 * F
    for layer in tl.static_range(DEPTH):
        if layer > 0:
            y = _linear(Z, W, row, i, i < A, A, BK)
            W += A * A
        y += _vector(W, i, A)
        tl.debug_barrier()
        y = _rms_norm(y * tl.sigmoid(y), W + A, i, A, 1e-5)
        tiles.write_block(Z, row, i, None, A, y)
        tl.debug_barrier()
        W += 2 * A
    y = _linear(Z, W, row, c, c < C, A, BK) + _vector(W + C * A, c, C)
    W += C * A + C
    y = tl.where((c < C)[None, :], y - (tl.sum(y, 1) / C)[:, None], 0.0)  # layer norm
    y *= tl.rsqrt(tl.sum(y * y, 1) / C + 1e-5)[:, None]
    tiles.write_block(H, row, c, None, C, y * _vector(W, c, C) + _vector(W + C, c, C))
    tl.debug_barrier()


@triton.jit
def _turn_into(Q, at, Z, W, GAIN, COS, SIN, row, C: tl.constexpr, D: tl.constexpr,
               HEADS: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """rope(rmsnorm(W z)) of HEADS heads at once, in halves, which rope turns into one another. Q +
    at (T, HEADS): where the vectors go."""
    n, c, is_c = tl.arange(0, HEADS * BH), tl.arange(0, BH), tl.arange(0, BH) < D // 2
    w = n // BH * D + n % BH
    a = _linear(Z, W, row, w, n % BH < D // 2, C, BK).reshape(row.shape[0], HEADS, BH)
    b = _linear(Z, W, row, w + D // 2, n % BH < D // 2, C, BK).reshape(row.shape[0], HEADS, BH)
    r = tl.rsqrt((tl.sum(a * a, 2) + tl.sum(b * b, 2)) / D + 1e-6)[:, :, None]
    a = a * r * _vector(GAIN, c, D // 2)[None]
    b = b * r * _vector(GAIN + D // 2, c, D // 2)[None]
    cos = tiles.read_block(COS, row, c, None, D // 2).to(tl.float32)[:, None, :]
    sin = tiles.read_block(SIN, row, c, None, D // 2).to(tl.float32)[:, None, :]
    at = at[:, :, None] + c[None, None, :]
    tl.store(Q + at, (a * cos - b * sin).to(Q.dtype.element_ty), mask=is_c[None, None, :])
    tl.store(Q + D // 2 + at, (b * cos + a * sin).to(Q.dtype.element_ty), mask=is_c[None, None, :])


@triton.jit
def _look(q, K, V, SEEN, keys, best, total, y, D: tl.constexpr, BN: tl.constexpr):
    """Attention of q over more keys and values, of those that are SEEN (None: all). Of the keys so
    far a softmax needs the largest score, `best`, and the sum of all weights, `total`. What was
    weighed by an old `best` fades."""
    d = tl.arange(0, q.shape[1])
    for start in range(0, keys, BN):
        key = start + tl.arange(0, BN)
        seen = key < keys
        if SEEN is not None:
            seen = tl.load(SEEN + key, mask=seen, other=0) != 0
        k, v = tiles.read_block(K, key, d, seen, D), tiles.read_block(V, key, d, seen, D)
        score = tl.dot(q, tl.trans(k))
        score = tl.where(seen[None, :], score * (1.4426950408889634 * D**-0.5), float("-inf"))
        new = tl.maximum(best, tl.max(score, 1))
        w, fade = tl.exp2(score - new[:, None]), tl.exp2(best - new)
        y = tl.dot(w.to(v.dtype), v, y * fade[:, None])
        best, total = new, total * fade + tl.sum(w, 1)
    return best, total, y


@triton.jit
def _sample(X, FRESH, W, FREQS, PREFIX, OWN, SEEN, COS, SIN, FIRST, H, Z, Q, Y, U, steps, layers,
            n, P, S, redraw, spread, T: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
            HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, A: tl.constexpr,
            F: tl.constexpr, DEPTH: tl.constexpr, BF: tl.constexpr, BA: tl.constexpr,
            BC: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
            BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Grid (N,). X (steps + 1, N, T, 2): noise, and room for each step. PREFIX (layers, 2, B, G, P,
    D): the prompt's keys and values. OWN (layers, 2, N, G, S, D): the sample's, the last T of S are
    those of the controls."""
    N, s = tl.num_programs(0), tl.program_id(0)
    R: tl.constexpr = HEADS // G  # heads that share keys
    LAYER: tl.constexpr = 2 * (HEADS + G) * D * C + 3 * M * C + 2 * D + 2 * C
    EMBED: tl.constexpr = (3 * F + (DEPTH - 1) * A + 2 * DEPTH + C) * A + 3 * C
    t, c, d = tl.arange(0, T), tl.arange(0, BC), tl.arange(0, BD)
    for step in tl.range(steps, disable_licm=True):
        row = tl.multiple_of(tl.load(FIRST + s), T) + t
        a, k = tl.load(X + row * 2), tl.load(X + row * 2 + 1)
        _embed_into(H, a, k, step / steps, W, FREQS, Z, row, A, F, C, DEPTH, BF, BA, BC, BK)
        for layer in tl.range(layers, disable_licm=True):
            row = tl.multiple_of(tl.load(FIRST + s), T) + t
            WQ = W + EMBED + layer * LAYER
            WK, WV, WO = WQ + HEADS * D * C, WQ + (HEADS + G) * D * C, WQ + (HEADS + 2 * G) * D * C
            NORM = WO + C * HEADS * D
            GATE, UP, DOWN = NORM + 2 * D, NORM + 2 * D + M * C, NORM + 2 * D + 2 * M * C
            K = OWN + (2 * layer * N + s) * G * S * D
            V = K + N * G * S * D

            _norm_into(Z, H, DOWN + C * M, row, c, C)
            last = row + (S - T - s * T)  # of S keys and values
            for g in tl.range(G, disable_licm=True):
                head = (row * HEADS + g * R)[:, None] + tl.arange(0, R)[None, :]
                _turn_into(Q, head * D, Z, WQ + g * R * D * C, NORM, COS, SIN, row, C, D, R, BH, BK)
                at = (g * S + last)[:, None] * D
                _turn_into(K, at, Z, WK + g * D * C, NORM + D, COS, SIN, row, C, D, 1, BH, BK)
                v = _linear(Z, WV + g * D * C, row, d, d < D, C, BK)
                tiles.write_block(V + g * S * D, last, d, None, D, v)
            tl.debug_barrier()
            for g in tl.range(G, disable_licm=True):  # its heads' queries are the rows of one tile
                i = tl.arange(0, R * T)
                row_i = tl.multiple_of(tl.load(FIRST + s), T) + i % T
                query = row_i * HEADS + g * R + i // T
                q = tiles.read_block(Q, query, d, None, D)
                best = tl.full(i.shape, float("-inf"), tl.float32)
                total = tl.zeros(i.shape, tl.float32)
                y = tl.zeros(q.shape, tl.float32)
                B = N // n
                shared = PREFIX + ((2 * layer * B + s // n) * G + g) * P * D
                best, total, y = _look(
                    q, shared, shared + B * G * P * D, None, P, best, total, y, D, BN
                )
                best, total, y = _look(
                    q, K + g * S * D, V + g * S * D, SEEN + s * S, S, best, total, y, D, BN
                )
                tiles.write_block(Y, query, d, None, D, y / total[:, None])
            _add_into(H, Y, WO, row, c, C, HEADS * D, BK)

            _norm_into(Z, H, DOWN + C * M + C, row, c, C)
            for start in tl.range(0, M, BM, disable_licm=True):
                m = start + tl.arange(0, BM)
                gate = _linear(Z, GATE, row, m, m < M, C, BK)
                up = _linear(Z, UP, row, m, m < M, C, BK)
                tiles.write_block(U, row, m, None, M, gate * tl.sigmoid(gate) * up)
            _add_into(H, U, DOWN, row, c, C, M, BK)

        OUT = W + EMBED + layers * LAYER + C  # behind the layers and the last norm
        z = _rms_norm(tiles.read_block(H, row, c, None, C), OUT - C, c, C, 1e-6)
        time, left = step / steps, (steps - 1 - step) / steps  # of the noise, after this step
        for i in tl.static_range(2):  # acceleration, curvature: euler_step
            x = tl.load(X + row * 2 + i)
            v = tl.sum(z * _vector(OUT + i * C, c, C), 1) + tl.load(OUT + 2 * C + i).to(tl.float32)
            x += v / steps - left * redraw * (x - time * v)
            if FRESH is not None:  # none after the last step, where nothing is left
                place = tl.minimum(step, steps - 2) * N * T + row
                x += left * spread * tl.load(FRESH + place * 2 + i)
            tl.store(X + N * T * 2 + row * 2 + i, x)
        X += N * T * 2
        tl.debug_barrier()


# --------------------------------------------------------------------------------------------------
# What the model calls


def padded(n):
    return max(16, triton.next_power_of_2(n))


def fits(cfg, T, dtype):
    """Whether one launch samples T controls for this Config's expert: in 16 bits, its weights are
    at most 4 MiB, and its tiles fit in a program's registers."""
    G, H, D, C, A = cfg.n_kv_head, cfg.e_head, cfg.head_dim, cfg.e_embd, cfg.a_embd
    layer = (2 * (H + G) * D + 3 * cfg.e_mlp) * C
    embed = (3 * cfg.a_fourier + (cfg.a_layer - 1) * A + C) * A
    if dtype.itemsize > 2 or (cfg.n_layer * layer + embed) * dtype.itemsize > MOST_BYTES:
        return False
    widest = max(C, A, 3 * cfg.a_fourier, 2 * D)
    return widest <= 128 and H in (G, 2 * G) and T in (16, 32, 64)


def sizes_of(expert, embed, like):
    """The kernel's constants but T. like: the weights. The blocks of keys and of the MLP are as
    large as registers allow: less where products take their factors from them."""
    block = 64 if capability(like.device) in (90, 100) else 32
    layer = expert.layers[0]
    attention, trunk = layer.self_attn, embed.encoder.trunk
    C, A, D = len(expert.norm.weight), trunk[-1].in_features, attention.head_dim
    F = trunk[0].in_features // 3
    return dict(
        C=C, M=layer.mlp.up_proj.out_features, HEADS=attention.n_head, G=attention.n_kv_head, D=D,
        A=A, F=F, DEPTH=len(trunk) // 3, BF=padded(3 * F), BA=padded(A), BC=padded(C),
        BH=padded(D // 2), BD=padded(D), BM=block, BN=block, BK=64,
    )  # fmt: skip


@torch.no_grad()
def sample_in_one_launch(
    expert, embed, project, steps, noise, cos, sin, prefix, tail, seen, eta=0.0, generator=None
):
    """All steps from noise (N, T, 2) to controls: flow (steps + 1, N, T, 2) in float32.

    As sampler.sample_flow. eta: the share of noise that a step draws anew, see alpamayo.euler_step;
    the numbers are those that the loop draws from the generator, but all at once.
    Weights, keys and values are laid side by side first, by a copy each: they may have changed."""
    N, T, _ = noise.shape
    device = noise.device
    if T not in (16, 32, 64):
        raise ValueError(f"noise: {T} action tokens; the kernel's tiles need 16, 32 or 64")
    ordered = *embed.parameters(), *expert.parameters(), *project.parameters()
    keys = torch.stack([x for kv in prefix for x in kv])  # (2 layers, B, G, P, D)
    weights = parameters_to_vector(ordered).to(keys.dtype)  # which under autocast differs
    freqs = parameters_to_vector(embed.buffers())
    _, B, G, P, D = keys.shape
    said = [x for kv in tail if kv is not None for x in kv]
    S = T + (said[0].shape[2] if said else 0)
    own = keys.new_empty(len(keys), N, G, S, D)
    if said:
        own[:, :, :, : S - T] = torch.stack(said)
    seen = torch.cat([seen[:, : S - T], seen.new_ones(N, T)], 1)
    flow = noise.new_empty(steps + 1, N, T, 2, dtype=torch.float32)
    flow[0] = noise

    def scratch(width, dtype=weights.dtype):
        return weights.new_empty(N * T, width, dtype=dtype)

    rows = torch.arange(0, N * T, T, dtype=torch.int32, device=device)
    sizes = sizes_of(expert, embed, weights)
    heads = sizes["HEADS"] * D
    angle = eta * math.pi / 2
    draws = range(steps - 1 if eta else 0)  # none after the last step
    fresh = [torch.randn(noise.shape, generator=generator, device=device) for _ in draws]
    _sample[(N,)](
        flow, torch.stack(fresh) if fresh else None, weights, freqs, keys, own, seen,
        cos.contiguous(), sin.contiguous(), rows, scratch(sizes["C"], torch.float32),
        scratch(max(sizes["C"], sizes["A"])), scratch(heads), scratch(heads), scratch(sizes["M"]),
        steps, len(prefix), N // B, P, S, 1 - math.cos(angle), math.sin(angle), T=T, **sizes,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return flow
