"""
Attention among the patches that are left, image by image,

    out[r] = sum over s of softmax_s(q[r] . k[s] / sqrt(d)) v[s]        r and s kept patches of the same image

After pruning (SparseVILA, arXiv 2510.17777; `salience.py` ranks) every image keeps another number of patches, down to none
at all. Padding them to one length would compute what was just saved, so they lie one after the other, image i from
offsets[i] to offsets[i + 1], and each program works on one block of one image's patches. Only kept patches ask and only
kept patches are seen: at a quarter kept, a sixteenth of the products.

Where not all of q, k and v was dropped yet, `rows` says which rows stay: the kernels read them where they are (and write
their gradients there), rather than from a copy.

The softmax is streamed as in FlashAttention-2 (arXiv 2307.08691), whose names and equations the backward pass keeps. With
S = q k^T / sqrt(d), P = softmax(S), O = P V and dO the gradient of O:

    dV = P^T dO      dP = dO V^T      dS = P * (dP - D),  D = row sums of dO * O
    dQ = dS K / sqrt(d)      dK = dS^T Q / sqrt(d)

P is not kept but computed again from the logarithm of each row's sum of exponentials (Lse).
"""
import math

import torch
import torch.nn.functional as F
from torch.library import custom_op

from kernels import by_hand, capability, tiles, tl, triton


def specification(q, k, v, offsets, longest, rows=None):
    """q, k, v (T, H, d); image i has the kept patches offsets[i] to offsets[i + 1], at most `longest`, of R in all; kept
    patch r is row rows[r], all different, or row r. Returns (R, H, d)."""
    if rows is not None:
        q, k, v = q[rows], k[rows], v[rows]
    counts = offsets.diff().tolist()
    if counts and max(counts) > longest:
        raise ValueError(f"pruned_attention: an image has {max(counts)} patches, more than longest = {longest}")
    images = zip(*(a.transpose(0, 1).split(counts, 1) for a in (q, k, v)))  # (H, patches, d) each
    # A batch of one, since that is what the fast implementations want; an image with no patch gives none.
    y = [F.scaled_dot_product_attention(q[None], k[None], v[None])[0] for q, k, v in images if q.shape[1]]
    return torch.cat([q.transpose(0, 1)[:, :0], *y], 1).transpose(0, 1)


# A program is of one head of one image: a block of its queries that passes by all keys, or a block of keys that passes by
# all queries. Strides count vectors of d numbers (`tiles`). Exponentials are powers of 2, which the hardware has: scale =
# log2(e) / sqrt(d), and Lse is a logarithm to base 2. Lse and D are (images, H, padded), so that each image begins anew at
# a multiple of 16 bytes: an image's last block is filled up, with infinity and 0, and needs no mask when it is read.


@triton.jit
def row_of(Rows, patch, ok):
    row = patch
    if Rows is not None:
        row = tl.load(Rows + patch, mask=ok, other=0).to(tl.int32)
    return row


@triton.jit
def forward(
    Q, K, V, Out, Lse, Offsets, Rows, padded, scale, q_row, q_head, k_row, k_head, v_row, v_head, H: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    head, image = tl.program_id(1), tl.program_id(2)
    first = tl.load(Offsets + image).to(tl.int32)
    n = tl.load(Offsets + image + 1).to(tl.int32) - first  # patches of this image
    i = tl.program_id(0) * BQ + tl.arange(0, BQ)  # (BQ,) queries among them
    at = (image * H + head) * padded + i
    if tl.program_id(0) * BQ >= n:  # the grid is laid out for the longest image
        tl.store(Lse + at, tl.full([BQ], float("inf"), tl.float32))
        return
    row = row_of(Rows, first + i, i < n)
    q0, q1 = tiles.load(Q, row * q_row + head * q_head, i < n, D, D0, D1)
    top = tl.full([BQ], float("-inf"), tl.float32)  # largest score so far
    total = tl.zeros([BQ], tl.float32)  # of exponentials relative to it
    y0, y1 = tiles.zeros(BQ, D0, D1)
    for start in range(0, n, BK):
        j = start + tl.arange(0, BK)  # (BK,) keys
        key = row_of(Rows, first + j, j < n)
        k0, k1 = tiles.load(K, key * k_row + head * k_head, j < n, D, D0, D1)
        v0, v1 = tiles.load(V, key * v_row + head * v_head, j < n, D, D0, D1)
        score = tiles.products(q0, q1, k0, k1, D1) * scale  # (BQ, BK)
        score = tl.where((j < n)[None, :], score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2(score - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        y0, y1 = tiles.scaled(y0, y1, shrink, D1)
        y0, y1 = tiles.add(y0, y1, p, v0, v1, D1)
        top = new
    y0, y1 = tiles.scaled(y0, y1, 1 / total, D1)
    tiles.store(Out, (first + i) * H + head, i < n, y0, y1, D, D0, D1)
    tl.store(Lse + at, tl.where(i < n, top + tl.log2(total), float("inf")))


@triton.jit
def backward_queries(
    Q, K, V, Out, Lse, Grad, Delta, DQ, Offsets, Rows, padded, scale, q_row, q_head, k_row, k_head, v_row, v_head,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries, and Delta, their D, which `backward_keys` reads."""
    head, image = tl.program_id(1), tl.program_id(2)
    first = tl.load(Offsets + image).to(tl.int32)
    n = tl.load(Offsets + image + 1).to(tl.int32) - first
    i = tl.program_id(0) * BQ + tl.arange(0, BQ)  # (BQ,)
    if tl.program_id(0) * BQ >= n:
        return
    row = row_of(Rows, first + i, i < n)
    q0, q1 = tiles.load(Q, row * q_row + head * q_head, i < n, D, D0, D1)
    o0, o1 = tiles.load(Out, (first + i) * H + head, i < n, D, D0, D1)
    g0, g1 = tiles.load(Grad, (first + i) * H + head, i < n, D, D0, D1)
    delta = tl.sum(o0.to(tl.float32) * g0.to(tl.float32), 1)  # (BQ,)
    if D1:
        delta += tl.sum(o1.to(tl.float32) * g1.to(tl.float32), 1)
    at = (image * H + head) * padded + i
    tl.store(Delta + at, delta)
    lse = tl.load(Lse + at)
    dq0, dq1 = tiles.zeros(BQ, D0, D1)
    for start in range(0, n, BK):
        j = start + tl.arange(0, BK)  # (BK,)
        key = row_of(Rows, first + j, j < n)
        k0, k1 = tiles.load(K, key * k_row + head * k_head, j < n, D, D0, D1)
        v0, v1 = tiles.load(V, key * v_row + head * v_head, j < n, D, D0, D1)
        p = tiles.products(q0, q1, k0, k1, D1) * scale - lse[:, None]  # (BQ, BK)
        p = tl.exp2(tl.minimum(p, 0.0))  # no weight is above 1; beyond n, where the score is 0, it could be infinite
        ds = p * (tiles.products(g0, g1, v0, v1, D1) - delta[:, None])  # and there the keys are 0, so nothing is added
        dq0, dq1 = tiles.add(dq0, dq1, ds, k0, k1, D1)
    over = tl.full([BQ], 0.6931471805599453, tl.float32) * scale  # 1 / sqrt(d) = scale * ln 2
    dq0, dq1 = tiles.scaled(dq0, dq1, over, D1)
    tiles.store(DQ, row * H + head, i < n, dq0, dq1, D, D0, D1)


@triton.jit
def backward_keys(
    Q, K, V, Lse, Grad, Delta, DK, DV, Offsets, Rows, padded, scale, q_row, q_head, k_row, k_head, v_row, v_head,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys. P and dS are transposed, keys by queries, as that is how they are used."""
    head, image = tl.program_id(1), tl.program_id(2)
    first = tl.load(Offsets + image).to(tl.int32)
    n = tl.load(Offsets + image + 1).to(tl.int32) - first
    j = tl.program_id(0) * BK + tl.arange(0, BK)  # (BK,)
    if tl.program_id(0) * BK >= n:
        return
    row = row_of(Rows, first + j, j < n)
    k0, k1 = tiles.load(K, row * k_row + head * k_head, j < n, D, D0, D1)
    v0, v1 = tiles.load(V, row * v_row + head * v_head, j < n, D, D0, D1)
    dk0, dk1 = tiles.zeros(BK, D0, D1)
    dv0, dv1 = tiles.zeros(BK, D0, D1)
    for start in range(0, n, BQ):
        i = start + tl.arange(0, BQ)  # (BQ,)
        query = row_of(Rows, first + i, i < n)
        q0, q1 = tiles.load(Q, query * q_row + head * q_head, i < n, D, D0, D1)
        g0, g1 = tiles.load(Grad, (first + i) * H + head, i < n, D, D0, D1)
        at = (image * H + head) * padded + i
        lse, delta = tl.load(Lse + at), tl.load(Delta + at)
        p = tl.exp2(tiles.products(k0, k1, q0, q1, D1) * scale - lse[None, :])  # (BK, BQ), 0 for queries beyond n
        dv0, dv1 = tiles.add(dv0, dv1, p, g0, g1, D1)
        ds = p * (tiles.products(v0, v1, g0, g1, D1) - delta[None, :])
        dk0, dk1 = tiles.add(dk0, dk1, ds, q0, q1, D1)
    over = tl.full([BK], 0.6931471805599453, tl.float32) * scale
    dk0, dk1 = tiles.scaled(dk0, dk1, over, D1)
    tiles.store(DK, row * H + head, j < n, dk0, dk1, D, D0, D1)
    tiles.store(DV, row * H + head, j < n, dv0, dv1, D, D0, D1)


BLOCK = 64  # queries of a program at most, and to a multiple of what Lse and D are filled up


def launch(kernel, itemsize, chip):
    """Queries BQ and keys BK of a program, warps, and stages of copying ahead: chosen by what they compile to; no GPU has
    timed them. 64 queries rather than 128, since a quarter of an image is 180 patches, and more programs fit on a
    multiprocessor. Chips before and beside Hopper and Blackwell's servers hold in registers what these read from shared
    memory, so their backward blocks are smaller. At least two programs of each kernel fit on a multiprocessor."""
    if itemsize == 4:  # float32 is not for matrix units
        return dict(BQ=32, BK=32 if kernel is forward else 16, num_warps=4, num_stages=1)
    if kernel is forward:
        return dict(BQ=64, BK=64, num_warps=4, num_stages=3)
    if 90 <= chip < 120:
        return dict(BQ=64, BK=64, num_warps=4, num_stages=2)
    size = dict(BQ=64, BK=32) if kernel is backward_queries else dict(BQ=16, BK=64)
    return dict(**size, num_warps=4, num_stages=2)


def arguments(q, k, v, longest):
    """What the three kernels have in common: q, k, v; sizes and strides; what is known when they are compiled."""
    (q, *q_strides), (k, *k_strides), (v, *v_strides) = map(tiles.in_vectors, (q, k, v))
    _, H, d = q.shape
    D0, D1 = tiles.parts(d)
    sizes = triton.cdiv(longest, BLOCK) * BLOCK, math.log2(math.e) * d**-0.5, *q_strides, *k_strides, *v_strides
    return (q, k, v), sizes, dict(H=H, D=d, D0=D0, D1=D1)


@custom_op("alpamayo::pruned_attention", mutates_args=())
def by_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, longest: int, rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out (R, H, d) and Lse (images, H, padded)."""
    images, (_, H, d), R = len(offsets) - 1, q.shape, len(q) if rows is None else len(rows)
    (q, k, v), sizes, known = arguments(q, k, v, longest)
    out, lse = q.new_empty(R, H, d), q.new_empty(images, H, sizes[0], dtype=torch.float32)
    if R:
        options = launch(forward, q.element_size(), capability(q.device))
        grid = triton.cdiv(lse.shape[2], options["BQ"]), H, images
        forward[grid](q, k, v, out, lse, offsets, rows, *sizes, **known, **options)
    return out, lse


@by_kernel.register_fake
def _(q, k, v, offsets, longest, rows):
    R, (_, H, d) = len(q) if rows is None else len(rows), q.shape
    padded = (longest + BLOCK - 1) // BLOCK * BLOCK
    return q.new_empty(R, H, d), q.new_empty(len(offsets) - 1, H, padded, dtype=torch.float32)


@custom_op("alpamayo::pruned_attention_backward", mutates_args=())
def backward_by_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, longest: int, rows: torch.Tensor | None,
    out: torch.Tensor, lse: torch.Tensor, grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k and v, (T, H, d) each; zero in rows that were not kept."""
    make = torch.empty if rows is None else torch.zeros
    dq, dk, dv = (make(a.shape, dtype=a.dtype, device=a.device) for a in (q, k, v))
    images, itemsize, chip = len(offsets) - 1, q.element_size(), capability(q.device)
    (q, k, v), sizes, known = arguments(q, k, v, longest)
    grad, delta, H = grad.contiguous(), torch.empty_like(lse), known["H"]
    if len(out):
        options = launch(backward_queries, itemsize, chip)
        backward_queries[triton.cdiv(longest, options["BQ"]), H, images](
            q, k, v, out, lse, grad, delta, dq, offsets, rows, *sizes, **known, **options
        )
        options = launch(backward_keys, itemsize, chip)
        backward_keys[triton.cdiv(longest, options["BK"]), H, images](
            q, k, v, lse, grad, delta, dk, dv, offsets, rows, *sizes, **known, **options
        )
    return dq, dk, dv


@backward_by_kernel.register_fake
def _(q, k, v, offsets, longest, rows, out, lse, grad):
    return tuple(torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in (q, k, v))


def keep_for_backward(ctx, inputs, output):
    q, k, v, offsets, ctx.longest, rows = inputs
    ctx.save_for_backward(q, k, v, offsets, rows, *output)
    ctx.mark_non_differentiable(output[1])


def backward(ctx, grad, _):
    q, k, v, offsets, rows, out, lse = ctx.saved_tensors
    return *backward_by_kernel(q, k, v, offsets, ctx.longest, rows, out, lse, grad), None, None, None


by_kernel.register_autograd(backward, setup_context=keep_for_backward)


def pruned_attention(q, k, v, offsets, longest, rows=None):
    """Attention within images of different numbers of patches: q, k, v (T, H, d); image i has the patches offsets[i] to
    offsets[i + 1] (images + 1,) of R in all, none has more than `longest`, which lays out the launch without waiting for
    the GPU's numbers. rows (R,): patch r is row rows[r], no row twice; without, patch r is row r. Returns (R, H, d)."""
    if torch.is_autocast_enabled(q.device.type):  # as PyTorch's own attention does
        q, k, v = (a.to(torch.get_autocast_dtype(q.device.type)) for a in (q, k, v))
    if q.ndim != 3 or not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        said = ", ".join(f"{name} {tuple(a.shape)} {a.dtype}" for name, a in zip("qkv", (q, k, v)))
        raise ValueError(f"pruned_attention: {said}: expected (T, H, d) of one shape and dtype")
    if by_hand(q.device, q.dtype):
        return by_kernel(q, k, v, offsets, longest, rows)[0]
    return specification(q, k, v, offsets, longest, rows)
