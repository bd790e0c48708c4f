"""
How much attention each key receives: the column means of softmax(Q K^T / sqrt(d)) over queries and
heads,

    salience[s] = 1 / (H T) * sum over heads h, queries t of exp(score[h, t, s] - lse[h, t])
    score[h, t, s] = q[h, t] . k[h, s] / sqrt(d)
    lse[h, t] = log sum over s of exp(score[h, t, s])

SparseVILA (arXiv 2510.17777) prunes image tokens by it inside the vision tower, and retrieves them
by it from the cache (causal: the last T of S tokens are the queries). Its authors stream the
softmax in Triton too. The paper states neither the normalisation nor how heads are combined; means
are our choice, and the kernel is ours.

PyTorch writes score and softmax to memory: 16 images x 16 heads x 720 x 720 in float32, 0.53 GB
each, written and read again. The kernels hold one tile of them at a time. A column can be summed
only when its rows' lse are known, so there are two passes over Q K^T: `row_sums` goes along the
rows, `column_sums` down the columns. That is twice the products, 2 * 2 H T S d operations, and
hardly any traffic: at that shape 0.038 TFLOP and 0.05 GB.
"""
import math

import torch
from torch import Tensor
from torch.library import custom_op

from kernels import by_hand, call, tiles, tl, triton


def plain_column_means(q, k, causal=False):
    """q (B, H, T, d), k (B, G, S, d), H a multiple of G, to (B, S), at least in float32.

    causal: the queries are the last T of S tokens and see no later key."""
    T, S = q.shape[2], k.shape[2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    score = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))  # (B, H, T, S)
    score = score * q.shape[-1] ** -0.5
    if causal:
        later = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        score = score.masked_fill(later, -torch.inf)
    return score.softmax(-1).mean((1, 2))


# --------------------------------------------------------------------------------------------------
# The kernels. A program has one head of one row b of the batch. Q and K are tensors with their
# strides (tiles.in_vectors). Exponentials are powers of 2, which the hardware has: scale =
# log2(e) / sqrt(d), and lse is a logarithm to base 2. SHARE query heads read one key head.


@triton.jit
def row_sums(
    Q, K, Lse, T, S, padded, scale, SHARE: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Lse (B, H, padded) of BT queries. Goes along the keys, BS at a time, with the sum of
    exponentials relative to the largest score so far, as FlashAttention does."""
    head, b = tl.program_id(1), tl.program_id(2)
    t = tl.program_id(0) * BT + tl.arange(0, BT)  # (BT,)
    q = tiles.read(Q, (b, head, t), t < T, D)
    top = tl.full([BT], float("-inf"), tl.float32)
    total = tl.zeros([BT], tl.float32)
    end = S
    if CAUSAL:  # no query of this program sees a later key
        end = tl.minimum(S, S - T + (tl.program_id(0) + 1) * BT)
    for first in range(0, end, BS):
        s = first + tl.arange(0, BS)  # (BS,)
        k = tiles.read(K, (b, head // SHARE, s), s < S, D)
        score = tiles.products(q, k) * scale  # (BT, BS)
        seen = (s < S)[None, :]
        if CAUSAL:
            seen = seen & (s[None, :] <= S - T + t[:, None])
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))  # finite: every query sees key 0
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(score - new[:, None]), 1)
        top = new
    # Rows from T to the end of a block are infinite. exp2(score - inf) = 0, so `column_sums` need
    # not mask them.
    lse = tl.where(t < T, top + tl.log2(total), float("inf"))
    tl.store(Lse + (b * tl.num_programs(1) + head) * padded + t, lse, mask=t < padded)


@triton.jit
def column_sums(
    Q, K, Lse, Out, T, S, padded, scale, SHARE: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Out (B, H, S) of BS keys. Goes along the queries, BT at a time. The sum stays a tile until
    the end: adding tiles is cheap, adding along a tile is not."""
    head, b, heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    s = tl.program_id(0) * BS + tl.arange(0, BS)  # (BS,)
    k = tiles.read(K, (b, head // SHARE, s), s < S, D)
    total = tl.zeros([BS, BT], tl.float32)
    begin = 0
    if CAUSAL:  # no earlier query sees these keys
        begin = tl.maximum(0, tl.program_id(0) * BS - (S - T)) // BT * BT
    for first in range(begin, T, BT):
        t = first + tl.arange(0, BT)  # (BT,)
        q = tiles.read(Q, (b, head, t), t < T, D)
        lse = tl.load(Lse + (b * heads + head) * padded + t)
        score = tiles.products(k, q) * scale  # (BS, BT): keys by queries
        if CAUSAL:
            score = tl.where(s[:, None] <= S - T + t[None, :], score, float("-inf"))
        total += tl.exp2(score - lse[None, :])
    tl.store(Out + (b * heads + head) * S + s, tl.sum(total, 1), mask=s < S)


@custom_op("alpamayo::column_means", mutates_args=())
def column_means_op(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    (B, H, T, d), (_, G, S, _) = q.shape, k.shape
    # A tile of scores is square. Its side was chosen by what it compiles to; no GPU has timed it.
    # Wider tiles read less often, but fewer programs fit on a multiprocessor: of these at least
    # three, on all chips of `bench`. float32 does not use the matrix units.
    half = q.element_size() == 2
    side, stages = (64, 3) if half else (32, 2)
    padded = triton.cdiv(T, side) * side
    lse = q.new_empty(B, H, padded, dtype=torch.float32)
    out = q.new_empty(B, H, S, dtype=torch.float32)
    sizes = dict(
        T=T, S=S, padded=padded, scale=math.log2(math.e) * d**-0.5, SHARE=H // G, CAUSAL=causal,
        D=d, BT=side, BS=side, num_warps=4, num_stages=stages,
    )  # fmt: skip
    q, k = tiles.in_vectors(q), tiles.in_vectors(k)
    row_sums[triton.cdiv(T, side), H, B](q, k, lse, **sizes)
    column_sums[triton.cdiv(S, side), H, B](q, k, lse, out, **sizes)
    return out.mean(1) / T


@column_means_op.register_fake
def _(q, k, causal):
    return q.new_empty(k.shape[0], k.shape[2], dtype=torch.float32)


def column_means(q, k, causal=False):
    """How much attention each key receives, (B, S): q (B, H, T, d), k (B, G, S, d), H a multiple of
    G. It ranks tokens; no gradient goes through it.

    causal: the queries are the last T of S tokens and see no later key."""
    q, k = q.detach(), k.detach()
    fit = q.ndim == k.ndim == 4 and q.shape[::3] == k.shape[::3] and q.shape[1] % k.shape[1] == 0
    if not fit:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}"
        raise ValueError(f"column_means: {shapes}: expected (B, H, T, d) and (B, G, S, d)")
    if causal and q.shape[2] > k.shape[2]:
        many = f"{q.shape[2]} queries are not the last of {k.shape[2]} tokens"
        raise ValueError(f"column_means: {many}")
    if q.dtype == k.dtype and q.numel() and k.numel() and by_hand(q.device, q.dtype):
        return call(column_means_op, q, k, causal)
    return plain_column_means(q, k, causal)
