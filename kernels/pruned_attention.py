"""
Attention among the patches that are kept, image by image,

    out[r] = sum over s of softmax_s(q[r] . k[s] / sqrt(d)) v[s]     r, s: kept patches of one image

After pruning (SparseVILA, arXiv 2510.17777; `salience.py` ranks) every image keeps another number
of patches, down to none at all. Padding them to one length would compute what was just saved. So
they lie one after the other, image i from offsets[i] to offsets[i + 1], and each program works on
one block of one image's patches. Queries and keys are both kept patches: at a quarter kept, a
sixteenth of the products.

q, k and v may still have all rows. Then `rows` says which rows stay. The kernels read them where
they are, and write their gradients there, without a copy.

The softmax is streamed as in FlashAttention-2 (arXiv 2307.08691), whose names and equations the
backward pass keeps. With S = q k^T / sqrt(d), P = softmax(S), O = P V and dO the gradient of O:

    dV = P^T dO      dP = dO V^T      dS = P * (dP - D),  D = row sums of dO * O
    dQ = dS K / sqrt(d)      dK = dS^T Q / sqrt(d)

P is not stored. It is computed again from Lse, the log of each row's sum of exponentials.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from kernels import by_hand, call, capability, tiles, tl, triton


def plain_pruned_attention(q, k, v, offsets, longest, rows=None):
    """q, k, v (T, H, d) to (R, H, d). Image i has the kept patches offsets[i] to offsets[i + 1], at
    most `longest`, of R in all. Kept patch r is row rows[r], all different, or row r."""
    if rows is not None:
        q, k, v = q[rows], k[rows], v[rows]
    counts = offsets.diff().tolist()
    if counts and max(counts) > longest:
        many = f"an image has {max(counts)} patches, more than longest = {longest}"
        raise ValueError(f"pruned_attention: {many}")
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (H, R, d)
    out = [q[:, :0]]
    for image in zip(q.split(counts, 1), k.split(counts, 1), v.split(counts, 1)):
        if image[0].shape[1]:  # an image may have no patch left
            batch = [x[None] for x in image]  # the fast implementations want one
            out.append(F.scaled_dot_product_attention(*batch)[0])
    return torch.cat(out, 1).transpose(0, 1)


# --------------------------------------------------------------------------------------------------
# The kernels. A program has one head of one image: a block of its queries that goes along all keys,
# or a block of keys that goes along all queries. Q, K and V are tensors with their strides
# (tiles.in_vectors). Exponentials are powers of 2, which the hardware has: scale =
# log2(e) / sqrt(d), and Lse is a logarithm to base 2. Lse and D are (images, H, padded): each image
# begins at a multiple of 16 bytes and its last block is filled up, with infinity in Lse and 0 in D,
# so no mask is needed to read them.


@triton.jit
def my_image(Offsets):
    """This program's head and image, the image's first patch and how many it has."""
    head, image = tl.program_id(1), tl.program_id(2)
    first = tl.load(Offsets + image).to(tl.int32)
    return head, image, first, tl.load(Offsets + image + 1).to(tl.int32) - first


@triton.jit
def row_of(Rows, patch, ok):
    row = patch
    if Rows is not None:
        row = tl.load(Rows + patch, mask=ok, other=0).to(tl.int32)
    return row


@triton.jit
def attend_patches(
    Q, K, V, Out, Lse, Offsets, Rows, padded, scale, H: tl.constexpr, D: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    head, image, first, n = my_image(Offsets)
    i = tl.program_id(0) * BQ + tl.arange(0, BQ)  # (BQ,) queries of the image
    at = (image * H + head) * padded + i
    if tl.program_id(0) * BQ >= n:  # the grid is laid out for the longest image
        tl.store(Lse + at, tl.full([BQ], float("inf"), tl.float32))
        return
    q = tiles.read(Q, (row_of(Rows, first + i, i < n), head), i < n, D)
    top = tl.full([BQ], float("-inf"), tl.float32)  # largest score so far
    total = tl.zeros([BQ], tl.float32)  # of exponentials relative to it
    y = tiles.zeros(BQ, D)
    for start in range(0, n, BK):
        j = start + tl.arange(0, BK)  # (BK,) keys
        key = row_of(Rows, first + j, j < n)
        k = tiles.read(K, (key, head), j < n, D)
        v = tiles.read(V, (key, head), j < n, D)
        score = tiles.products(q, k) * scale  # (BQ, BK)
        score = tl.where((j < n)[None, :], score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2(score - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        y = tiles.add(tiles.scaled(y, shrink), p, v)
        top = new
    tiles.write((Out, H, 1), (first + i, head), i < n, tiles.scaled(y, 1 / total), D)
    tl.store(Lse + at, tl.where(i < n, top + tl.log2(total), float("inf")))


@triton.jit
def backward_queries(
    Q, K, V, Out, Lse, Grad, Delta, DQ, Offsets, Rows, padded, scale, H: tl.constexpr,
    D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries, and Delta, their D, which `backward_keys` reads."""
    head, image, first, n = my_image(Offsets)
    i = tl.program_id(0) * BQ + tl.arange(0, BQ)  # (BQ,)
    if tl.program_id(0) * BQ >= n:
        return
    row = row_of(Rows, first + i, i < n)
    q = tiles.read(Q, (row, head), i < n, D)
    o = tiles.read((Out, H, 1), (first + i, head), i < n, D)
    g = tiles.read((Grad, H, 1), (first + i, head), i < n, D)
    delta = tl.sum(o[0].to(tl.float32) * g[0].to(tl.float32), 1)  # (BQ,)
    if len(o) > 1:
        delta += tl.sum(o[1].to(tl.float32) * g[1].to(tl.float32), 1)
    at = (image * H + head) * padded + i
    tl.store(Delta + at, delta)
    lse = tl.load(Lse + at)
    dq = tiles.zeros(BQ, D)
    for start in range(0, n, BK):
        j = start + tl.arange(0, BK)  # (BK,)
        key = row_of(Rows, first + j, j < n)
        k = tiles.read(K, (key, head), j < n, D)
        v = tiles.read(V, (key, head), j < n, D)
        p = tiles.products(q, k) * scale - lse[:, None]  # (BQ, BK)
        # No weight is above 1. Keys beyond n have score 0, whose weight could be infinite; they are
        # 0, so with a finite weight they add nothing.
        p = tl.exp2(tl.minimum(p, 0.0))
        ds = p * (tiles.products(g, v) - delta[:, None])
        dq = tiles.add(dq, ds, k)
    over = tl.full([BQ], 0.6931471805599453, tl.float32) * scale  # 1 / sqrt(d) = scale * ln 2
    tiles.write((DQ, H, 1), (row, head), i < n, tiles.scaled(dq, over), D)


@triton.jit
def backward_keys(
    Q, K, V, Lse, Grad, Delta, DK, DV, Offsets, Rows, padded, scale, H: tl.constexpr,
    D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys. P and dS are transposed, keys by queries, as they are used."""
    head, image, first, n = my_image(Offsets)
    j = tl.program_id(0) * BK + tl.arange(0, BK)  # (BK,)
    if tl.program_id(0) * BK >= n:
        return
    row = row_of(Rows, first + j, j < n)
    k = tiles.read(K, (row, head), j < n, D)
    v = tiles.read(V, (row, head), j < n, D)
    dk = tiles.zeros(BK, D)
    dv = tiles.zeros(BK, D)
    for start in range(0, n, BQ):
        i = start + tl.arange(0, BQ)  # (BQ,)
        q = tiles.read(Q, (row_of(Rows, first + i, i < n), head), i < n, D)
        g = tiles.read((Grad, H, 1), (first + i, head), i < n, D)
        at = (image * H + head) * padded + i
        lse = tl.load(Lse + at)
        delta = tl.load(Delta + at)
        p = tl.exp2(tiles.products(k, q) * scale - lse[None, :])  # (BK, BQ), 0 beyond n
        dv = tiles.add(dv, p, g)
        ds = p * (tiles.products(v, g) - delta[None, :])
        dk = tiles.add(dk, ds, q)
    over = tl.full([BK], 0.6931471805599453, tl.float32) * scale
    tiles.write((DK, H, 1), (row, head), j < n, tiles.scaled(dk, over), D)
    tiles.write((DV, H, 1), (row, head), j < n, dv, D)


# --------------------------------------------------------------------------------------------------
# Launching them

BLOCK = 64  # queries of a program at most; Lse and D are filled up to a multiple of it


def blocks_of(kernel, q):
    """Queries BQ and keys BK of a program, warps, and stages of copying ahead.

    Chosen by what they compile to; no GPU has timed them. At least two programs of each kernel fit
    on a multiprocessor. 64 queries rather than 128: a quarter of an image is 180 patches, and more
    programs fit. sm_80 and sm_120 hold in registers what sm_90 and sm_100 read from shared memory,
    so their backward blocks are smaller."""
    BQ, BK, stages = 64, 64, 2
    if q.element_size() == 4:  # float32 does not use the matrix units
        BQ, BK, stages = 32, 32 if kernel is attend_patches else 16, 1
    elif kernel is attend_patches:
        stages = 3
    elif not 90 <= capability(q.device) < 120:
        BQ, BK = (64, 32) if kernel is backward_queries else (16, 64)
    return dict(BQ=BQ, BK=BK, num_warps=4, num_stages=stages)


def common_arguments(q, k, v, lse):
    """What all three kernels take: q, k and v with their strides, and sizes."""
    d = q.shape[2]
    sizes = dict(padded=lse.shape[2], scale=math.log2(math.e) * d**-0.5, H=q.shape[1], D=d)
    return [tiles.in_vectors(x) for x in (q, k, v)], sizes


def empty_outputs(q, k, v, offsets, longest, rows):
    """Out (R, H, d) and Lse (images, H, padded), not yet written."""
    _, H, d = q.shape
    R = len(q if rows is None else rows)
    padded = (longest + BLOCK - 1) // BLOCK * BLOCK
    lse = q.new_empty(len(offsets) - 1, H, padded, dtype=torch.float32)
    return q.new_empty(R, H, d), lse


@custom_op("alpamayo::pruned_attention", mutates_args=())
def pruned_attention_op(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Out and Lse, see `empty_outputs`."""
    out, lse = empty_outputs(q, k, v, offsets, longest, rows)
    if len(out):
        blocks = blocks_of(attend_patches, q)
        tensors, sizes = common_arguments(q, k, v, lse)
        images, H, padded = lse.shape
        grid = triton.cdiv(padded, blocks["BQ"]), H, images
        attend_patches[grid](*tensors, out, lse, offsets, rows, **sizes, **blocks)
    return out, lse


pruned_attention_op.register_fake(empty_outputs)


def empty_gradients(q, k, v, offsets, longest, rows, *_):
    """Of q, k and v (T, H, d); zero in rows that were not kept."""
    make = torch.empty if rows is None else torch.zeros
    return tuple(make(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


@custom_op("alpamayo::pruned_attention_backward", mutates_args=())
def pruned_attention_backward_op(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, rows: Tensor | None,
    out: Tensor, lse: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = empty_gradients(q, k, v, offsets, longest, rows)
    if not len(out):
        return dq, dk, dv
    tensors, sizes = common_arguments(q, k, v, lse)
    images, H, _ = lse.shape
    grad = grad.contiguous()
    delta = torch.empty_like(lse)
    blocks = blocks_of(backward_queries, q)
    backward_queries[triton.cdiv(longest, blocks["BQ"]), H, images](
        *tensors, out, lse, grad, delta, dq, offsets, rows, **sizes, **blocks
    )
    blocks = blocks_of(backward_keys, q)
    backward_keys[triton.cdiv(longest, blocks["BK"]), H, images](
        *tensors, lse, grad, delta, dk, dv, offsets, rows, **sizes, **blocks
    )
    return dq, dk, dv


pruned_attention_backward_op.register_fake(empty_gradients)


def keep_patches(ctx, inputs, output):
    q, k, v, offsets, ctx.longest, rows = inputs
    ctx.save_for_backward(q, k, v, offsets, rows, *output)
    ctx.mark_non_differentiable(output[1])


def gradients_of_patches(ctx, grad, _):
    q, k, v, offsets, *more = ctx.saved_tensors
    grads = pruned_attention_backward_op(q, k, v, offsets, ctx.longest, *more, grad)
    return *grads, None, None, None


pruned_attention_op.register_autograd(gradients_of_patches, setup_context=keep_patches)


def pruned_attention(q, k, v, offsets, longest, rows=None):
    """Attention within images of different numbers of patches: q, k, v (T, H, d) to (R, H, d).

    offsets (images + 1,): image i has the patches offsets[i] to offsets[i + 1], of R in all.
    longest: no image has more; it lays out the launch without waiting for the GPU's numbers.
    rows (R,): patch r is row rows[r], no row twice; without it, patch r is row r."""
    device = q.device.type
    if torch.is_autocast_enabled(device):  # as PyTorch's own attention does
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    if q.ndim != 3 or not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        tensors = zip("qkv", (q, k, v))
        said = ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in tensors)
        raise ValueError(f"pruned_attention: {said}: expected (T, H, d) of one shape and dtype")
    if by_hand(q.device, q.dtype):
        return call(pruned_attention_op, q, k, v, offsets, longest, rows)[0]
    return plain_pruned_attention(q, k, v, offsets, longest, rows)
