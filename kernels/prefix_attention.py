"""
Attention of n samples over one prompt that they share and a tail that each has for itself.

    y = softmax([q k0^T, q k1^T] / sqrt(d)) [v0; v1]     prefix k0, v0: one a scene
                                                         tail k1, v1: one a sample

Decoding, n samples of a scene, GRPO's group of rollouts and the expert's 64 action tokens all read
a prompt of thousands of tokens whose keys and values exist once. Three ideas make the kernel, none
of them ours:

  rows       The query heads of a group (GQA) and the samples of a scene read the same prefix. So
             their queries become the rows of one matrix, and a block of keys, once loaded, serves
             them all. ("Hydragen", arXiv 2402.05099)
  streaming  One block of keys at a time, with the largest score so far, the sum of
             exp(score - largest) and the weighted sum of values. No row of scores is ever stored.
             (Milakov and Gimelshein, arXiv 1805.02867; "FlashAttention")
  parts      Few queries are few programs, and most of the chip would idle. So the keys are cut into
             parts. Part p leaves its own y_p and l_p = log sum exp(score), and
             y = sum_p exp(l_p) y_p / sum_p exp(l_p), a launch of its own. ("Flash-Decoding")

Letters: N = B * n samples, H query heads, G key-value heads, T queries of a sample, P keys of the
prefix, S of the tail, d head dimension, R = H / G * T rows of a sample that read the same key-value
head.

The backward pass computes the weights again from the row's log-sum-exp (FlashAttention's), in two
kernels: by rows for the gradient of q, by keys for that of k and v. The second kernel treats a tail
as the prefix of a one-sample scene.
"""
import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from kernels import by_hand, call, capability, multiprocessors, tiles, tl, triton

LOG2E = 1.4426950408889634  # exp(x) = exp2(LOG2E * x), and exp2 is what the chip has


def plain_prefix_attention(q, k0, v0, k1=None, v1=None, mask0=None, mask1=None):
    """Returns (N, H, T, d). q (N, H, T, d) with N = B * n, the samples of a scene side by side;
    prefix k0, v0 (B, G, P, d); tail k1, v1 (N, G, S, d) or None; mask0 (B, P) and mask1
    (N, T or 1, S): True where a key may be seen."""
    N, H, T, d = q.shape
    B, G, P, _ = k0.shape
    R = H // G * T

    def together(x):  # (N, G, R, ...) to (B, G, n * R, ...): the rows that read one prefix
        return x.unflatten(0, (B, N // B)).transpose(1, 2).flatten(2, 3)

    def apart(x):  # and back
        return x.unflatten(2, (N // B, R)).transpose(1, 2).flatten(0, 1)

    rows = q.reshape(N, G, R, d) * d**-0.5
    score = together(rows) @ k0.mT  # (B, G, n * R, P)
    if mask0 is not None:
        score = score.masked_fill(~mask0[:, None, None], -torch.inf)
    score = apart(score)  # (N, G, R, P)
    if k1 is not None:
        score1 = rows @ k1.mT  # (N, G, R, S)
        if mask1 is not None:
            seen = mask1[:, None].repeat(1, 1, R // mask1.shape[1], 1)
            score1 = score1.masked_fill(~seen, -torch.inf)
        score = torch.cat([score, score1], -1)
    w = score.to(torch.promote_types(q.dtype, torch.float32)).softmax(-1).to(q.dtype)
    y = apart(together(w[..., :P]) @ v0)  # (N, G, R, d)
    if k1 is not None:
        y = y + w[..., P:] @ v1
    return y.reshape(N, H, T, d)


def over_copies(q, k0, v0, k1=None, v1=None, mask0=None, mask1=None):
    """The same by PyTorch's fused attention, over a copy of the prefix for each sample."""
    N, H, T, _ = q.shape
    B, G, P, _ = k0.shape
    n = N // B
    k, v = k0.repeat_interleave(n, 0), v0.repeat_interleave(n, 0)
    if k1 is not None:
        k, v = torch.cat([k, k1], 2), torch.cat([v, v1], 2)
    mask = None
    if mask0 is not None or mask1 is not None:
        if mask0 is None:
            mask0 = q.new_ones(B, P, dtype=torch.bool)
        if mask1 is None:
            mask1 = q.new_ones(N, 1, k.shape[2] - P, dtype=torch.bool)
        mask0 = mask0.repeat_interleave(n, 0)[:, None].expand(-1, mask1.shape[1], -1)
        mask = torch.cat([mask0, mask1], 2)[:, None]  # (N, 1, T or 1, P + S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=H != G)


# --------------------------------------------------------------------------------------------------
# The kernels. A program is one call of the function below, with its own program_id; hundreds run at
# once, in any order. It works on whole tiles: `tl.arange(0, BM)` is a vector, X + vector a tile of
# addresses, `tl.load` reads it, and lanes whose mask is False read `other`. Tile sides are powers
# of two, hence the masks where a size (R, P, S, d) is not a power of two.
#
# Q, K0, V0, K1, V1, Y and their gradients are tensors of four dimensions with the strides of the
# first three (tiles.in_vectors). A mask is its bytes and their strides.


@triton.jit
def _rows(block, i, n, T, R, rows, BM: tl.constexpr):
    """Of rows i of a block's BM: (sample, head of the group, query), and which there are. A block
    has `rows` rows of each of its samples. A small R fills it with several samples, a large R takes
    several blocks a sample."""
    chunks, several = tl.cdiv(R, rows), BM // rows
    sample = block // chunks * several + i // rows
    r = block % chunks * rows + i % rows
    return (sample, r // T, r % T), (i // rows < several) & (sample < n) & (r < R)


@triton.jit
def _number(X, far, near):
    """The number of X's vectors at the indices far + near, in two parts. `far` (two indices) may
    be far off and is counted in 64 bits, `near` (three, a vector among them) in 32."""
    first = far[0] * X[1] + far[1] * X[2]
    return first, near[0] * X[1] + near[1] * X[2] + near[2] * X[3]


@triton.jit
def _place(row, T, R, G: tl.constexpr):
    """Where the rows of head g lie in (N, H, T), counted from the scene's first of them."""
    return row[0] * G * R + row[1] * T + row[2]


@triton.jit
def _tile(X, far, near, ok, D: tl.constexpr, BD: tl.constexpr):
    """These vectors as the rows of a tile, zeros where not ok (None: all are) and beyond d."""
    first, more = _number(X, far, near)
    if ok is None and D == BD:
        return tl.load(X[0] + first * D + more[:, None] * D + tl.arange(0, BD)[None, :])
    return tiles.read_block(X[0] + first * D, more, tl.arange(0, BD), ok, D)


@triton.jit
def _put(X, far, near, ok, y, D: tl.constexpr, BD: tl.constexpr):
    first, more = _number(X, far, near)
    tiles.write_block(X[0] + first * D, more, tl.arange(0, BD), ok, D, y)


@triton.jit
def _keys(K, V, M, owner, g, j, P, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """Block j of the P keys and values that a scene, or a sample, has for head g: k, v (BN, BD);
    their places and which of them may be seen (BN,). M: a mask of the owner's keys, or None."""
    key = j * BN + tl.arange(0, BN)
    seen = key < P
    k = _tile(K, (owner, g), (0, 0, key), seen, D, BD)
    v = _tile(V, (owner, g), (0, 0, key), seen, D, BD)
    if M is not None:
        seen = tl.load(M[0] + owner * M[1] + key, mask=seen, other=0) != 0
    return k, v, key, seen


@triton.jit
def _tail_keys(K, V, M, scene, first, j, S, row, EACH: tl.constexpr, D: tl.constexpr,
               BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Block j of the tails of a block's samples, from the `first` on, one after another: k, v, and
    which keys each row may see (BM, BN). scene: (its first sample, g). EACH: M has a row for each
    query."""
    tail = tl.cdiv(S, BN)
    s = first + j // tail  # whose tail
    owner = scene[0] + s
    k, v, key, seen = _keys(K, V, None if EACH else M, owner, scene[1], j % tail, S, D, BN, BD)
    seen = (row[0] == s)[:, None] & seen[None, :]
    if EACH:
        place = M[0] + owner * M[1] + row[2][:, None] * M[2] + key[None, :]
        seen = tl.load(place, mask=seen, other=0) != 0
    return k, v, seen


@triton.jit
def _finite(x):
    """The largest score, or 0 where no key was seen: exp2(-inf - 0) is 0, exp2(-inf - -inf) NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _look(q, k, v, seen, scale, best, total, y):
    """Take in one more block of keys, of which a row sees all (None) or some. What was summed
    relative to the old largest score is scaled to the new. float32 stays float32, not TF32."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BM, BN)
    if seen is not None:
        score = tl.where(seen, score, float("-inf"))
    new = tl.maximum(best, tl.max(score, 1) * scale)  # base 2
    w, fade = tl.exp2(score * scale - _finite(new)[:, None]), tl.exp2(best - _finite(new))
    y = tl.dot(w.to(v.dtype), v, y * fade[:, None], input_precision="ieee")
    return new, total * fade + tl.sum(w, 1), y


@triton.jit
def _attend(Q, K0, V0, M0, K1, V1, M1, Y, L, PART, PART_L, n, T, R, P, S, rows, scale,
            G: tl.constexpr, D: tl.constexpr, EACH: tl.constexpr, SPLITS: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Grid (row blocks of a scene, SPLITS, B * G). A block's keys, in blocks of BN: those of the
    prefix, then those of the tails of its samples. Each part takes an equal run of them, and leaves
    its own result in PART and PART_L; a single part's is the result."""
    block, part = tl.program_id(0), tl.program_id(1)
    b, g = (tl.program_id(2) // G).to(tl.int64), tl.program_id(2) % G
    i = tl.arange(0, BM)
    row, ok = _rows(block, i, n, T, R, rows, BM)
    q = _tile(Q, (b * n, g * (R // T)), row, ok, D, BD)
    best = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    y = tl.zeros([BM, BD], tl.float32)

    first = block // tl.cdiv(R, rows) * (BM // rows)  # the block's first sample
    prefix, tail = tl.cdiv(P, BN), tl.cdiv(S, BN)  # blocks of keys
    every = prefix + tl.minimum(BM // rows, n - first) * tail
    share = tl.cdiv(every, SPLITS)
    start, stop = part * share, tl.minimum((part + 1) * share, every)
    whole = 0  # blocks of the prefix that need no mask
    if M0 is None:
        whole = tl.minimum(P // BN, stop)
    for j in range(start, whole):
        key = j * BN + tl.arange(0, BN)
        k = _tile(K0, (b, g), (0, 0, key), None, D, BD)
        v = _tile(V0, (b, g), (0, 0, key), None, D, BD)
        best, total, y = _look(q, k, v, None, scale, best, total, y)
    for j in range(tl.maximum(start, whole), tl.minimum(stop, prefix)):
        k, v, _, seen = _keys(K0, V0, M0, b, g, j, P, D, BN, BD)
        best, total, y = _look(q, k, v, seen[None, :], scale, best, total, y)
    if K1 is not None:
        for j in range(tl.maximum(start, prefix), stop):
            k, v, seen = _tail_keys(
                K1, V1, M1, (b * n, g), first, j - prefix, S, row, EACH, D, BN, BD
            )
            best, total, y = _look(q, k, v, seen, scale, best, total, y)

    lse = best + tl.log2(total)
    if SPLITS > 1:
        unit = tl.program_id(2) * tl.num_programs(0) + block
        at = (unit * SPLITS + part).to(tl.int64) * BM
        y = y / tl.where(total == 0, 1.0, total)[:, None]
        tiles.write_block(PART + at * BD, i, tl.arange(0, BD), None, BD, y)
        tl.store(PART_L + at + i, lse)
    else:
        _put(Y, (b * n, g * (R // T)), row, ok, y / total[:, None], D, BD)
        tl.store(L + (b * n * G + g) * R + _place(row, T, R, G), lse, mask=ok)


@triton.jit
def _join(Y, L, PART, PART_L, n, T, R, rows, G: tl.constexpr, D: tl.constexpr,
          SPLITS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """Grid (parts of a block, row blocks of a scene, B * G): BR rows of all SPLITS parts."""
    block = tl.program_id(1)
    b, g = (tl.program_id(2) // G).to(tl.int64), tl.program_id(2) % G
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    row, ok = _rows(block, i, n, T, R, rows, BM)
    unit = tl.program_id(2) * tl.num_programs(1) + block
    at = (unit * SPLITS + tl.arange(0, SPLITS)).to(tl.int64)[:, None] * BM + i[None, :]
    lse = tl.load(PART_L + at)  # (SPLITS, BR)
    best = _finite(tl.max(lse, 0))
    w = tl.exp2(lse - best[None, :])
    total = tl.sum(w, 0)
    y = tl.load(PART + at[:, :, None] * BD + tl.arange(0, BD)[None, None, :])
    y = tl.sum(y * w[:, :, None], 0) / total[:, None]  # (BR, BD)
    _put(Y, (b * n, g * (R // T)), row, ok, y, D, BD)
    tl.store(L + (b * n * G + g) * R + _place(row, T, R, G), best + tl.log2(total), mask=ok)


@triton.jit
def _add_dq(q, dy, k, v, seen, lse, dot, scale, dq):
    """dq of one more block of keys, but for a factor. The weights are computed again."""
    w = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
    ds = w * (tl.dot(dy, tl.trans(v), input_precision="ieee") - dot[:, None])
    ds = tl.where(seen, ds, 0.0)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _grad_q(Q, K0, V0, M0, K1, V1, M1, DY, L, DOT, DQ, n, T, R, P, S, rows, scale, G: tl.constexpr,
            D: tl.constexpr, EACH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
            BD: tl.constexpr):  # fmt: skip
    """Grid (row blocks of a scene, B * G): the same walk over the keys. DOT (N, H, T): dy * y."""
    block = tl.program_id(0)
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    row, ok = _rows(block, tl.arange(0, BM), n, T, R, rows, BM)
    scene = (b * n, g * (R // T))
    q = _tile(Q, scene, row, ok, D, BD)
    dy = _tile(DY, scene, row, ok, D, BD)
    place = _place(row, T, R, G)
    begin = (b * n * G + g) * R
    lse = tl.load(L + begin + place, mask=ok, other=0.0)
    dot = tl.load(DOT + begin + place, mask=ok, other=0.0)
    dq = tl.zeros([BM, BD], tl.float32)
    for j in range(0, tl.cdiv(P, BN)):
        k, v, _, seen = _keys(K0, V0, M0, b, g, j, P, D, BN, BD)
        dq = _add_dq(q, dy, k, v, seen[None, :], lse, dot, scale, dq)
    if K1 is not None:
        first = block // tl.cdiv(R, rows) * (BM // rows)
        for j in range(0, tl.minimum(BM // rows, n - first) * tl.cdiv(S, BN)):
            k, v, seen = _tail_keys(K1, V1, M1, (b * n, g), first, j, S, row, EACH, D, BN, BD)
            dq = _add_dq(q, dy, k, v, seen, lse, dot, scale, dq)
    dq *= scale * 0.6931471805599453  # the scores were in base 2
    tiles.write_block(DQ + begin * D, place, tl.arange(0, BD), ok, D, dq)


@triton.jit
def _grad_kv(Q, K, V, M, DY, L, DOT, DK, DV, n, T, R, P, scale, G: tl.constexpr, D: tl.constexpr,
             EACH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
             BD: tl.constexpr):  # fmt: skip
    """Grid (blocks of keys, owners * G): P keys that n samples share, against all rows of these.
    Tiles are transposed, (keys, rows)."""
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    k, v, key, seen = _keys(K, V, None if EACH else M, b, g, tl.program_id(0), P, D, BN, BD)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    scene = (b * n, g * (R // T))
    begin = (b * n * G + g) * R
    for i in range(0, n * R, BM):
        i = i + tl.arange(0, BM)
        row, ok = (i // R, i % R // T, i % T), i < n * R
        q = _tile(Q, scene, row, ok, D, BD)
        dy = _tile(DY, scene, row, ok, D, BD)
        place = begin + _place(row, T, R, G)
        lse = tl.load(L + place, mask=ok, other=0.0)
        dot = tl.load(DOT + place, mask=ok, other=0.0)
        both = seen[:, None] & ok[None, :]
        if EACH:
            mask = M[0] + b * M[1] + row[2][None, :] * M[2] + key[:, None]
            both = tl.load(mask, mask=both, other=0) != 0
        w = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :])
        w = tl.where(both, w, 0.0)
        dv = tl.dot(w.to(dy.dtype), dy, dv, input_precision="ieee")
        ds = w * (tl.dot(v, tl.trans(dy), input_precision="ieee") - dot[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    dk *= scale * 0.6931471805599453
    begin = tl.program_id(1).to(tl.int64) * P
    tiles.write_block(DK + begin * D, key, tl.arange(0, BD), key < P, D, dk)
    tiles.write_block(DV + begin * D, key, tl.arange(0, BD), key < P, D, dv)


# --------------------------------------------------------------------------------------------------
# Launching them


def sizes_of(q, k0, k1):
    """n, T, R, P, S: see the letters above."""
    N, H, T, _ = q.shape
    B, G, P, _ = k0.shape
    return N // B, T, H // G * T, P, 0 if k1 is None else k1.shape[2]


def attention_plan(q, k0, k1, splits=0):
    """Numbers, grid and options of a launch. splits: parts of the keys, 0: as many as fill the
    chip."""
    same = sizes_of(q, k0, k1), k0.shape[0], k0.shape[1], q.shape[3], q.element_size(), splits
    return _plan(*same, capability(q.device), multiprocessors(q.device))


@cache
def _plan(sizes, B, G, d, size, splits, chip, programs):
    """Of those tried on an H200 at the release's shape the fastest: 64 rows; the keys in as many
    parts as multiprocessors are left, twice as many for decoding's few rows, and 32 at a time; else
    64 keys. Parts are powers of two, so that few variants of the kernel are compiled."""
    n, T, R, P, S = sizes
    half = size == 2
    BM = min(64 if half else 32, max(16, triton.next_power_of_2(n * R)))
    rows = min(R, BM)
    blocks = triton.cdiv(n, BM // rows) * triton.cdiv(R, rows)
    if not splits:
        many = (2 if BM < 64 else 1) * programs // (blocks * B * G)
        splits = min(max(1, many), triton.cdiv(P + 1, 64))
        splits = 2 ** int(math.log2(splits))
    splits = triton.next_power_of_2(splits)
    BN = 64 if splits == 1 and BM == 64 and chip == 90 else 32
    options = dict(num_warps=4, num_stages=3 if half else 2)
    if not half and (d > 64 or d % 16):  # no matrix unit: the keys lie in registers, too
        BN = 16
        options = dict(num_warps=8, num_stages=2)
    if d % 16 and chip not in (90, 100):  # nano's 40: left alone, the compiler saves and spills
        options["maxnreg"] = 240
    options |= dict(G=G, D=d, SPLITS=splits, BM=BM, BN=BN)
    options |= dict(BD=max(16, triton.next_power_of_2(d)))
    return (n, T, R, P, S, rows, d**-0.5 * LOG2E), (blocks, splits, B * G), options


def attention_scratch(q, plan):
    """Buffers of a launch, which may serve again: log2-sum-exp2 of the rows, results of the parts
    and their log2-sum-exp2."""
    _, (blocks, splits, groups), options = plan
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if splits == 1:
        return lse, None, None
    parts = blocks * splits * groups * options["BM"]
    part = q.new_empty(parts, options["BD"], dtype=torch.float32)
    return lse, part, q.new_empty(parts, dtype=torch.float32)


def _vectors(*tensors):
    return [None if x is None else tiles.in_vectors(x) for x in tensors]


def _bytes(mask):
    """A mask's bytes with their strides: a sample's, and a query's where each has its own."""
    if mask is None:
        return None
    return mask.contiguous().view(torch.uint8), mask[0].numel(), mask.shape[-1]


def attend_into(y, q, k0, v0, k1, v1, mask0, mask1, plan, scratch):
    """`plain_prefix_attention` by the kernels into y. Returns y and the rows' log2-sum-exp2
    (N, H, T)."""
    (n, T, R, P, S, rows, scale), grid, options = plan
    q, k0, v0, k1, v1, to = _vectors(q, k0, v0, k1, v1, y)
    each = mask1 is not None and mask1.shape[1] > 1
    _attend[grid](
        q, k0, v0, _bytes(mask0), k1, v1, _bytes(mask1), to, *scratch, n, T, R, P, S, rows, scale,
        EACH=each, **options)  # fmt: skip
    blocks, splits, groups = grid
    if splits > 1:
        tile = {name: options[name] for name in ("G", "D", "SPLITS", "BM", "BD")}
        BR = max(1, min(tile["BM"], 64 // splits))
        parts = tile["BM"] // BR, blocks, groups
        _join[parts](to, *scratch, n, T, R, rows, BR=BR, num_warps=4, **tile)
    return y, scratch[0]


def empty_output(q):
    """y (N, H, T, d), in memory as o_proj will read it, (N, T, H, d)."""
    N, H, T, d = q.shape
    return q.new_empty(N, T, H, d).transpose(1, 2)


def empty_attention(q, *_):
    """y, and the rows' log2-sum-exp2 (N, H, T)."""
    return empty_output(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@custom_op("alpamayo::prefix_attention", mutates_args=())
def prefix_attention_op(
    q: Tensor, k0: Tensor, v0: Tensor, k1: Tensor | None, v1: Tensor | None, mask0: Tensor | None,
    mask1: Tensor | None, splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    plan = attention_plan(q, k0, k1, splits)
    scratch = attention_scratch(q, plan)
    return attend_into(empty_output(q), q, k0, v0, k1, v1, mask0, mask1, plan, scratch)


prefix_attention_op.register_fake(empty_attention)


def empty_attention_gradients(dy, q, k0, v0, k1, v1, mask0, mask1, y, lse, prefix, tail):
    """Of q, k0, v0 (empty unless `prefix`), k1, v1 (empty unless `tail`)."""
    wanted = (q, True), (k0, prefix), (v0, prefix), (k1, tail), (v1, tail)
    return tuple(q.new_empty(x.shape if want else 0) for x, want in wanted)


@custom_op("alpamayo::prefix_attention_backward", mutates_args=())
def prefix_attention_backward_op(
    dy: Tensor, q: Tensor, k0: Tensor, v0: Tensor, k1: Tensor | None, v1: Tensor | None,
    mask0: Tensor | None, mask1: Tensor | None, y: Tensor, lse: Tensor, prefix: bool, tail: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `empty_attention_gradients`.

    Tiles of 64 x 64 and of 64 keys x 32 rows, 8 warps: nothing spilled, 1 program a multiprocessor
    (by keys 2 on sm_100)."""
    grads = empty_attention_gradients(dy, q, k0, v0, k1, v1, mask0, mask1, y, lse, prefix, tail)
    n, T, R, P, S = sizes_of(q, k0, k1)
    N, (B, G, _, d) = len(q), k0.shape
    chip, half = capability(q.device), q.element_size() == 2
    BM = 64 if half else 32
    BN = 16 if not half and (d > 64 or d % 16) else BM
    if d % 16 and chip not in (90, 100):  # nano's 40 with a mask for each query spills with 64
        BN = min(BN, 32)
    # maxnreg: left alone, the compiler saves registers for programs that are not there, and spills
    # a few bytes on sm_100 and in float32.
    few = chip == 100 or not half
    options = dict(BD=max(16, triton.next_power_of_2(d)), num_warps=8, num_stages=2)
    options |= dict(G=G, D=d, BN=BN, maxnreg=208 if few else None)
    rows, scale = min(R, BM), d**-0.5 * LOG2E
    each = mask1 is not None and mask1.shape[1] > 1
    dot = (dy.float() * y.float()).sum(-1).contiguous()  # (N, H, T)
    mask0, mask1 = _bytes(mask0), _bytes(mask1)
    dy, q, k0, v0, k1, v1 = _vectors(dy, q, k0, v0, k1, v1)
    _grad_q[(triton.cdiv(n, BM // rows) * triton.cdiv(R, rows), B * G)](
        q, k0, v0, mask0, k1, v1, mask1, dy, lse, dot, grads[0], n, T, R, P, S, rows, scale,
        EACH=each, BM=BM, **options)  # fmt: skip
    if prefix and P:
        _grad_kv[(triton.cdiv(P, BN), B * G)](
            q, k0, v0, mask0, dy, lse, dot, *grads[1:3], n, T, R, P, scale,
            EACH=False, BM=32, **options)  # fmt: skip
    if tail and S:
        _grad_kv[(triton.cdiv(S, BN), N * G)](
            q, k1, v1, mask1, dy, lse, dot, *grads[3:], 1, T, R, S, scale,
            EACH=each, BM=32, **options)  # fmt: skip
    return grads


prefix_attention_backward_op.register_fake(empty_attention_gradients)


def keep_attention(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def gradients_of_attention(ctx, dy, _):
    needs = ctx.needs_input_grad
    prefix, tail = needs[1] or needs[2], needs[3] or needs[4]
    grads = prefix_attention_backward_op(dy, *ctx.saved_tensors, prefix, tail)
    grads = [g if need else None for g, need in zip(grads, needs)]
    return *grads, None, None, None


prefix_attention_op.register_autograd(gradients_of_attention, setup_context=keep_attention)


def prefix_attention(q, k0, v0, k1=None, v1=None, mask0=None, mask1=None):
    """See `plain_prefix_attention`. On a CPU, where the scores of a group's R rows would take more
    memory than copies of its keys and values, copies are faster."""
    if not by_hand(q.device, q.dtype):
        R = q.shape[1] // k0.shape[1] * q.shape[2]
        copies = q.device.type == "cpu" and R >= 2 * q.shape[3]
        attend = over_copies if copies else plain_prefix_attention
        return attend(q, k0, v0, k1, v1, mask0, mask1)
    return call(prefix_attention_op, q, k0, v0, k1, v1, mask0, mask1, 0)[0]
