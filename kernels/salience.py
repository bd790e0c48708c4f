"""
How much attention each key receives: the column means of softmax(Q K^T / sqrt(d)) over queries and heads,

    salience[s] = 1 / (H T) * sum over heads h, queries t of exp(score[h, t, s] - lse[h, t])
    score[h, t, s] = q[h, t] . k[h, s] / sqrt(d)        lse[h, t] = log sum over s of exp(score[h, t, s])

SparseVILA (arXiv 2510.17777) prunes image tokens by it inside the vision tower, and retrieves them by it from the cache
(causal: the last T of S tokens ask). Its authors stream the softmax in Triton too; neither normalisation nor heads are
stated there, so means are ours, and so is this kernel.

PyTorch writes score and softmax down: 16 images x 16 heads x 720 x 720 in float32, 0.53 GB each, written and read again.
The kernels hold a tile of them at a time. A column cannot be added up before its rows' lse are known, so there are two
passes over Q K^T: `row_sums` goes along the rows, `column_sums` down the columns. That is twice the products, 2 * 2 H T S d
operations, and no traffic to speak of: at that shape 0.038 TFLOP and 0.05 GB.
"""
import math

import torch
from torch.library import custom_op

from kernels import by_hand, tiles, tl, triton


def specification(q, k, causal=False):
    """q (B, H, T, d), k (B, G, S, d), H a multiple of G: (B, S) in float32 at least. causal: the queries are the last T of
    S tokens and look back only."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    score = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5  # (B, H, T, S)
    if causal:
        T, S = score.shape[-2:]
        score = score.masked_fill(torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1), -torch.inf)
    return score.softmax(-1).mean((1, 2))


# In both kernels: a program is of one head of one row b of the batch. Strides count vectors of d numbers (`tiles`).
# Exponentials are powers of 2, which the hardware has: scale = log2(e) / sqrt(d), and lse is a logarithm to base 2.


@triton.jit
def row_sums(
    Q, K, Lse, T, S, padded, scale, q_batch, q_head, q_row, k_batch, k_head, k_row, SHARE: tl.constexpr,
    CAUSAL: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Lse (B, H, padded) of BT queries: past all keys, BS at a time, with the sum of exponentials relative to the largest
    score so far, as FlashAttention does."""
    head, b = tl.program_id(1), tl.program_id(2)
    t = tl.program_id(0) * BT + tl.arange(0, BT)  # (BT,)
    q0, q1 = tiles.load(Q, b * q_batch + head * q_head + t * q_row, t < T, D, D0, D1)
    top = tl.full([BT], float("-inf"), tl.float32)
    total = tl.zeros([BT], tl.float32)
    end = S
    if CAUSAL:  # no query of this program looks further
        end = tl.minimum(S, S - T + (tl.program_id(0) + 1) * BT)
    for first in range(0, end, BS):
        s = first + tl.arange(0, BS)  # (BS,)
        k0, k1 = tiles.load(K, b * k_batch + head // SHARE * k_head + s * k_row, s < S, D, D0, D1)
        score = tiles.products(q0, q1, k0, k1, D1) * scale  # (BT, BS)
        seen = (s < S)[None, :]
        if CAUSAL:
            seen = seen & (s[None, :] <= S - T + t[:, None])
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))  # finite: every query sees key 0
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(score - new[:, None]), 1)
        top = new
    # Rows beyond T, up to a whole block, get infinity: exp2(score - inf) = 0, so `column_sums` need not look at T.
    heads = tl.num_programs(1)
    tl.store(Lse + (b * heads + head) * padded + t, tl.where(t < T, top + tl.log2(total), float("inf")), mask=t < padded)


@triton.jit
def column_sums(
    Q, K, Lse, Out, T, S, padded, scale, q_batch, q_head, q_row, k_batch, k_head, k_row, SHARE: tl.constexpr,
    CAUSAL: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Out (B, H, S) of BS keys: past all queries, BT at a time. The sum stays a tile until the end, since adding tiles
    is cheap and adding along a tile is not."""
    head, b, heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    s = tl.program_id(0) * BS + tl.arange(0, BS)  # (BS,)
    k0, k1 = tiles.load(K, b * k_batch + head // SHARE * k_head + s * k_row, s < S, D, D0, D1)
    total = tl.zeros([BS, BT], tl.float32)
    begin = 0
    if CAUSAL:  # no query before looks at these keys
        begin = tl.maximum(0, tl.program_id(0) * BS - (S - T)) // BT * BT
    for first in range(begin, T, BT):
        t = first + tl.arange(0, BT)  # (BT,)
        q0, q1 = tiles.load(Q, b * q_batch + head * q_head + t * q_row, t < T, D, D0, D1)
        lse = tl.load(Lse + (b * heads + head) * padded + t)
        score = tiles.products(k0, k1, q0, q1, D1) * scale  # (BS, BT): keys by queries
        if CAUSAL:
            score = tl.where(s[:, None] <= S - T + t[None, :], score, float("-inf"))
        total += tl.exp2(score - lse[None, :])
    tl.store(Out + (b * heads + head) * S + s, tl.sum(total, 1), mask=s < S)


def launch(itemsize):
    """Rows and columns of a tile of scores, and options: chosen by what they compile to; no GPU has timed them. Wider tiles
    read less often, but fewer programs of them fit on a multiprocessor: of these at least three, on all chips of `bench`.
    float32 is not for matrix units."""
    return (64, dict(num_warps=4, num_stages=3)) if itemsize == 2 else (32, dict(num_warps=4, num_stages=2))


@custom_op("alpamayo::column_means", mutates_args=())
def by_kernel(q: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor:
    (B, H, T, d), (_, G, S, _) = q.shape, k.shape
    block, options = launch(q.element_size())
    padded = triton.cdiv(T, block) * block
    lse = torch.empty(B, H, padded, dtype=torch.float32, device=q.device)
    out = torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    (q, *q_strides), (k, *k_strides) = tiles.in_vectors(q), tiles.in_vectors(k)
    D0, D1 = tiles.parts(d)
    sizes = T, S, padded, math.log2(math.e) * d**-0.5, *q_strides, *k_strides
    known = dict(SHARE=H // G, CAUSAL=causal, D=d, D0=D0, D1=D1, BT=block, BS=block)
    row_sums[triton.cdiv(T, block), H, B](q, k, lse, *sizes, **known, **options)
    column_sums[triton.cdiv(S, block), H, B](q, k, lse, out, *sizes, **known, **options)
    return out.mean(1) / T


@by_kernel.register_fake
def _(q, k, causal):
    return q.new_empty(k.shape[0], k.shape[2], dtype=torch.float32)


def column_means(q, k, causal=False):
    """How much attention each key receives: q (B, H, T, d), k (B, G, S, d), H a multiple of G, to (B, S). causal: the
    queries are the last T of S tokens and look back only. It ranks tokens; no gradient goes through it."""
    q, k = q.detach(), k.detach()
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"column_means: q {tuple(q.shape)}, k {tuple(k.shape)}: expected (B, H, T, d) and (B, G, S, d)")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"column_means: {q.shape[2]} queries are not the last of {k.shape[2]} tokens")
    if q.dtype == k.dtype and q.numel() and k.numel() and by_hand(q.device, q.dtype):
        return by_kernel(q, k, causal)
    return specification(q, k, causal)
