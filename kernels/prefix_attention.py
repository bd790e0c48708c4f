"""
Attention of n samples over one prompt that they share and a tail that each has for itself.

    y = softmax([q k0^T, q k1^T] / sqrt(d)) [v0; v1]         prefix k0, v0: one a scene; tail k1, v1: one a sample

Decoding, n samples of a scene, GRPO's group of rollouts and the expert's 64 action tokens all read a prompt of thousands
of tokens whose keys and values exist once. Three ideas make the kernel, none of them ours:

  rows       The query heads of a group (GQA) and the samples of a scene read the same prefix, so their queries become
             the rows of one matrix, and a block of keys, once loaded, serves them all. ("Hydragen", arXiv 2402.05099)
  streaming  A block of keys at a time, with the largest score so far, the sum of exp(score - largest) and the weighted
             sum of values; no row of scores is ever stored. (Milakov and Gimelshein, arXiv 1805.02867; "FlashAttention")
  parts      Few queries are few programs, and most of the chip would idle. So the keys are cut into parts. Part p leaves
             its own y_p and l_p = log sum exp(score), and y = sum_p exp(l_p) y_p / sum_p exp(l_p). ("Flash-Decoding")

Letters: N = B * n samples, H query heads, G key-value heads, T queries of a sample, P keys of the prefix, S of the tail,
d head dimension, R = H / G * T rows of a sample that read the same key-value head.

The backward pass computes the weights again from the row's log-sum-exp (FlashAttention's), in two kernels: by rows for
the gradient of q, by keys for that of k and v. A tail is, to the second, the prefix of a scene with one sample.
"""
from typing import Optional

import torch
from torch import Tensor
from torch.library import custom_op

from kernels import by_hand, capability, multiprocessors, tiles, tl, triton

LOG2E = 1.4426950408889634  # exp(x) = exp2(LOG2E * x), and exp2 is what the chip has


def specification(q, k0, v0, k1=None, v1=None, mask0=None, mask1=None):
    """q (N, H, T, d) with N = B * n, the samples of a scene side by side; prefix k0, v0 (B, G, P, d); tail k1, v1
    (N, G, S, d) or None; mask0 (B, P) and mask1 (N, T or 1, S): True where a key may be seen. Returns (N, H, T, d)."""
    N, H, T, d = q.shape
    B, G, P = k0.shape[:3]
    R = H // G * T
    own = q.reshape(N, G, R, d) * d**-0.5
    together = own.view(B, N // B, G, R, d).transpose(1, 2).reshape(B, G, N // B * R, d)
    score = together @ k0.mT  # (B, G, n * R, P)
    if mask0 is not None:
        score = score.masked_fill(~mask0[:, None, None], -torch.inf)
    score = score.view(B, G, N // B, R, P).transpose(1, 2).reshape(N, G, R, P)
    if k1 is not None:
        score1 = own @ k1.mT  # (N, G, R, S)
        if mask1 is not None:
            score1 = score1.masked_fill(~mask1[:, None].repeat(1, 1, R // mask1.shape[1], 1), -torch.inf)
        score = torch.cat([score, score1], -1)
    w = score.float().softmax(-1).to(q.dtype) if q.dtype != torch.float64 else score.softmax(-1)
    w0 = w[..., :P].view(B, N // B, G, R, P).transpose(1, 2).reshape(B, G, N // B * R, P)
    y = (w0 @ v0).view(B, G, N // B, R, d).transpose(1, 2).reshape(N, G, R, d)
    if k1 is not None:
        y = y + w[..., P:] @ v1
    return y.reshape(N, H, T, d)


# ---------------------------------------------------------------------------------------------------------- the kernels
# A program is one call of the function below, with its own program_id; hundreds run at once, in any order. It works on
# whole tiles: `tl.arange(0, BM)` is a vector, X + vector a tile of addresses, `tl.load` reads it, lanes whose mask is
# False read `other`. Tile sides are powers of two, hence the masks wherever a real size (R, P, S, d) is none.
# Arguments like q_ are the strides of q, counted in vectors of d numbers; see tiles.in_vectors for why.


@triton.jit
def _rows(block, n, T, R, rows, BM: tl.constexpr):
    """Which sample, head of the group and query each of a block's BM rows is, and whether it is any. A block has `rows`
    rows of each of its samples: a small R fills it with several samples, a large R takes several blocks a sample."""
    i = tl.arange(0, BM)
    chunks, several = tl.cdiv(R, rows), BM // rows
    sample, r = block // chunks * several + i // rows, block % chunks * rows + i % rows
    return sample, r // T, r % T, (i // rows < several) & (sample < n) & (r < R)


@triton.jit
def _tile(X, first, more, ok, D: tl.constexpr, BD: tl.constexpr):
    """X's vectors number first + more (BM,), as the rows of a tile; zeros where not ok and beyond d. The first may be far
    off, and is counted in 64 bits; the tile in 32."""
    c = tl.arange(0, BD)
    return tl.load(X + first * D + (more * D)[:, None] + c[None, :], mask=ok[:, None] & (c < D)[None, :], other=0.0)


@triton.jit
def _put(X, first, more, ok, y, D: tl.constexpr, BD: tl.constexpr):
    c = tl.arange(0, BD)
    tl.store(X + first * D + (more * D)[:, None] + c[None, :], y.to(X.dtype.element_ty), mask=ok[:, None] & (c < D)[None, :])


@triton.jit
def _keys(K, V, M, owner, g, j, P, k_, v_, m, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """Block j of the P keys and values that a scene, or a sample, has for head g: k, v (BN, BD); their places and which of
    them are there to be seen (BN,). M: the mask's bytes, a row of m of them an owner, or None."""
    key = j * BN + tl.arange(0, BN)
    seen = key < P
    k = _tile(K, owner * k_[0] + g * k_[1], key * k_[2], seen, D, BD)
    v = _tile(V, owner * v_[0] + g * v_[1], key * v_[2], seen, D, BD)
    if M is not None:
        seen = tl.load(M + owner * m + key, mask=seen, other=0) != 0
    return k, v, key, seen


@triton.jit
def _finite(x):
    """The largest score, or 0 where no key was seen: exp2(-inf - 0) is 0, but exp2(-inf - -inf) would be nan."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _look(q, k, v, seen, scale, best, total, y):
    """Take one more block of keys into account: what was summed relative to the old largest score fades to the new."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (BM, BN), base 2; float32 stays float32, not TF32
    score = tl.where(seen, score, float("-inf"))
    new = tl.maximum(best, tl.max(score, 1))
    w, fade = tl.exp2(score - _finite(new)[:, None]), tl.exp2(best - _finite(new))
    y = tl.dot(w.to(v.dtype), v, y * fade[:, None], input_precision="ieee")
    return new, total * fade + tl.sum(w, 1), y


@triton.jit
def _attend(Q, K0, V0, M0, K1, V1, M1, Y, L, PART, PART_L, DONE, q_, k0_, v0_, k1_, v1_, m1_, y_, n, T, R, P, S, rows, scale,
            G: tl.constexpr, D: tl.constexpr, EACH: tl.constexpr, SPLITS: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Grid (row blocks of a scene, SPLITS, B * G). A block's keys, in blocks of BN: those of the prefix, then those of the
    tails of its samples, one after another. Each part takes an equal run of them. EACH: M1 has a row for each query."""
    block, part = tl.program_id(0), tl.program_id(1)
    b, g = (tl.program_id(2) // G).to(tl.int64), tl.program_id(2) % G
    sample, head, t, ok = _rows(block, n, T, R, rows, BM)
    q = _tile(Q, b * n * q_[0] + g * (R // T) * q_[1], sample * q_[0] + head * q_[1] + t * q_[2], ok, D, BD)
    best = tl.full([BM], float("-inf"), tl.float32)
    total, y = tl.zeros([BM], tl.float32), tl.zeros([BM, BD], tl.float32)

    first = block // tl.cdiv(R, rows) * (BM // rows)  # the block's first sample
    prefix, tail = tl.cdiv(P, BN), tl.cdiv(S, BN)  # blocks of keys
    every = prefix + tl.minimum(BM // rows, n - first) * tail
    share = tl.cdiv(every, SPLITS)
    start, stop = part * share, tl.minimum((part + 1) * share, every)
    for j in range(start, tl.minimum(stop, prefix)):
        k, v, _, seen = _keys(K0, V0, M0, b, g, j, P, k0_, v0_, P, D, BN, BD)
        best, total, y = _look(q, k, v, seen[None, :], scale, best, total, y)
    if K1 is not None:
        for j in range(tl.maximum(start, prefix), stop):
            s = first + (j - prefix) // tail  # whose tail
            mask, place = None if EACH else M1, (j - prefix) % tail
            k, v, key, seen = _keys(K1, V1, mask, b * n + s, g, place, S, k1_, v1_, m1_[0], D, BN, BD)
            seen = (sample == s)[:, None] & seen[None, :]
            if EACH:
                seen = tl.load(M1 + (b * n + s) * m1_[0] + t[:, None] * m1_[1] + key[None, :], mask=seen, other=0) != 0
            best, total, y = _look(q, k, v, seen, scale, best, total, y)

    if SPLITS > 1:  # leave the part's result; whoever finds that all other parts are there combines them
        i, unit = tl.arange(0, BM), tl.program_id(2) * tl.num_programs(0) + block
        at = (unit * SPLITS + part).to(tl.int64) * BM
        _put(PART, at, i, i < BM, y / tl.where(total == 0, 1.0, total)[:, None], BD, BD)
        tl.store(PART_L + at + i, best + tl.log2(total))
        tl.debug_barrier()  # all threads of this program have stored, and then one of them says so
        last = tl.atomic_add(DONE + unit, 1, sem="acq_rel") == SPLITS - 1
        best = tl.full([BM], float("-inf"), tl.float32)
        total, y = tl.zeros([BM], tl.float32), tl.zeros([BM, BD], tl.float32)
        for p in range(0, tl.where(last, SPLITS, 0)):
            at = (unit * SPLITS + p).to(tl.int64) * BM
            l = tl.load(PART_L + at + i, cache_modifier=".cg")  # not from this multiprocessor's own cache
            new = tl.maximum(best, l)
            w, fade = tl.exp2(l - _finite(new)), tl.exp2(best - _finite(new))
            part_y = tl.load(PART + at * BD + i[:, None] * BD + tl.arange(0, BD)[None, :], cache_modifier=".cg")
            best, total, y = new, total * fade + w, y * fade[:, None] + w[:, None] * part_y
        tl.store(DONE + unit, 0, mask=last)  # ready for the next launch
        ok = ok & last
    _put(Y, b * n * y_[0] + g * (R // T) * y_[1], sample * y_[0] + head * y_[1] + t * y_[2], ok, y / total[:, None], D, BD)
    tl.store(L + (b * n * G + g) * R + sample * G * R + head * T + t, best + tl.log2(total), mask=ok)


@triton.jit
def _grad_q(Q, K0, V0, M0, K1, V1, M1, DY, L, DOT, DQ, q_, k0_, v0_, k1_, v1_, m1_, dy_, n, T, R, P, S, rows, scale,
            G: tl.constexpr, D: tl.constexpr, EACH: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Grid (row blocks of a scene, B * G): the same walk over the keys. DOT: the rows' sum of dy * y."""
    block = tl.program_id(0)
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    sample, head, t, ok = _rows(block, n, T, R, rows, BM)
    q = _tile(Q, b * n * q_[0] + g * (R // T) * q_[1], sample * q_[0] + head * q_[1] + t * q_[2], ok, D, BD)
    dy = _tile(DY, b * n * dy_[0] + g * (R // T) * dy_[1], sample * dy_[0] + head * dy_[1] + t * dy_[2], ok, D, BD)
    at = (b * n * G + g) * R + sample * G * R + head * T + t  # in (N, H, T)
    l, dot = tl.load(L + at, mask=ok, other=0.0), tl.load(DOT + at, mask=ok, other=0.0)
    dq = tl.zeros([BM, BD], tl.float32)
    for j in range(0, tl.cdiv(P, BN)):
        k, v, _, seen = _keys(K0, V0, M0, b, g, j, P, k0_, v0_, P, D, BN, BD)
        w = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - l[:, None])  # the weights again
        ds = tl.where(seen[None, :], w * (tl.dot(dy, tl.trans(v), input_precision="ieee") - dot[:, None]), 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    if K1 is not None:
        first, tail = block // tl.cdiv(R, rows) * (BM // rows), tl.cdiv(S, BN)
        for j in range(0, tl.minimum(BM // rows, n - first) * tail):
            s = first + j // tail
            mask = None if EACH else M1
            k, v, key, seen = _keys(K1, V1, mask, b * n + s, g, j % tail, S, k1_, v1_, m1_[0], D, BN, BD)
            seen = (sample == s)[:, None] & seen[None, :]
            if EACH:
                seen = tl.load(M1 + (b * n + s) * m1_[0] + t[:, None] * m1_[1] + key[None, :], mask=seen, other=0) != 0
            w = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - l[:, None])
            ds = tl.where(seen, w * (tl.dot(dy, tl.trans(v), input_precision="ieee") - dot[:, None]), 0.0)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq *= scale * 0.6931471805599453  # the scores were in base 2
    _put(DQ, (b * n * G + g) * R, sample * G * R + head * T + t, ok, dq, D, BD)


@triton.jit
def _grad_kv(Q, K, V, M, DY, L, DOT, DK, DV, q_, k_, v_, m_, dy_, n, T, R, P, scale,
             G: tl.constexpr, D: tl.constexpr, EACH: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Grid (blocks of keys, owners * G): P keys that n samples share, against all rows of these; tiles lie the other way
    round, (keys, rows)."""
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    k, v, key, seen = _keys(K, V, None if EACH else M, b, g, tl.program_id(0), P, k_, v_, m_[0], D, BN, BD)
    dk, dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32)
    L, DOT = L + (b * n * G + g) * R, DOT + (b * n * G + g) * R
    for i in range(0, n * R, BM):
        i = i + tl.arange(0, BM)
        sample, head, t, ok = i // R, i % R // T, i % T, i < n * R
        q = _tile(Q, b * n * q_[0] + g * (R // T) * q_[1], sample * q_[0] + head * q_[1] + t * q_[2], ok, D, BD)
        dy = _tile(DY, b * n * dy_[0] + g * (R // T) * dy_[1], sample * dy_[0] + head * dy_[1] + t * dy_[2], ok, D, BD)
        at = sample * G * R + head * T + t
        l, dot = tl.load(L + at, mask=ok, other=0.0), tl.load(DOT + at, mask=ok, other=0.0)
        both = seen[:, None] & ok[None, :]
        if EACH:
            both = tl.load(M + b * m_[0] + t[None, :] * m_[1] + key[:, None], mask=both, other=0) != 0
        w = tl.where(both, tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - l[None, :]), 0.0)
        dv = tl.dot(w.to(dy.dtype), dy, dv, input_precision="ieee")
        ds = w * (tl.dot(v, tl.trans(dy), input_precision="ieee") - dot[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    first = tl.program_id(1).to(tl.int64) * P
    _put(DK, first, key, key < P, dk * (scale * 0.6931471805599453), D, BD)
    _put(DV, first, key, key < P, dv, D, BD)


# ------------------------------------------------------------------------------------------------------- launching them


def plan_of(q, k0, k1, splits=0):
    """Sides of the tiles, grid and options of a launch. Rows of 64 while they are too few to fill the chip, of 128 where
    there are enough and the chip multiplies 128 at once; keys by 32, three blocks under way while one is worked on.
    Compiled for d = 128 in bf16: nothing spilled, 2 programs a multiprocessor (1 of 128 rows, 4 of 16)."""
    (N, H, T, d), (B, G, P, _) = q.shape, k0.shape
    n, R, S = N // B, H // G * T, 0 if k1 is None else k1.shape[2]
    processors = multiprocessors(q.device)
    BM, BN = min(64 if q.element_size() == 2 else 32, max(16, triton.next_power_of_2(n * R))), 32
    options = dict(num_warps=4, num_stages=3 if q.element_size() == 2 else 2)
    if BM == 64 and R >= 128 and n * R // 128 * B * G >= processors and capability(q.device) in (90, 100):
        BM, BN, options = 128, 64, dict(num_warps=8, num_stages=2)
    if q.element_size() == 4 and (d > 64 or d % 16):  # no matrix unit: the keys lie in registers, too
        BN, options = 16, dict(num_warps=8, num_stages=2)
    if d % 16 and capability(q.device) not in (90, 100):  # the nano's 40: left alone, the compiler saves registers, and spills
        options["maxnreg"] = 240
    rows = min(R, BM)
    blocks = triton.cdiv(n, BM // rows) * triton.cdiv(R, rows)
    power = lambda x: triton.next_power_of_2(max(1, x))  # so that few variants of the kernel are compiled
    splits = splits or min(power(processors // (blocks * B * G)), power(triton.cdiv(P, BN)))
    sizes = dict(G=G, D=d, SPLITS=splits, BM=BM, BN=BN, BD=max(16, triton.next_power_of_2(d)), **options)
    return (n, T, R, P, S, rows, d**-0.5 * LOG2E), (blocks, splits, B * G), sizes


def _in_vectors(*tensors):
    """Copies of those that are not laid out in vectors, see tiles.in_vectors."""
    return [x if x is None else tiles.in_vectors(x)[0] for x in tensors]


def _strides(*tensors):
    """Their strides, but the last, in vectors; of what may be missing, too."""
    return [(0, 0, 0) if x is None else tuple(s // x.shape[3] for s in x.stride()[:3]) for x in tensors]


def _rows_of(mask1):
    """Bytes of a sample's mask, and of a query's."""
    return (0, 0) if mask1 is None else (mask1[0].numel(), mask1.shape[2])


def _bytes(mask):
    return None if mask is None else mask.contiguous().view(torch.uint8)


@custom_op("alpamayo::prefix_attention", mutates_args=())
def _forward(q: Tensor, k0: Tensor, v0: Tensor, k1: Optional[Tensor], v1: Optional[Tensor], mask0: Optional[Tensor],
             mask1: Optional[Tensor], splits: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and the rows' log2-sum-exp2 (N, H, T). splits: parts of the keys, 0: as many as fill the chip."""
    N, H, T, d = q.shape
    q, k0, v0, k1, v1 = _in_vectors(q, k0, v0, k1, v1)
    plan = plan_of(q, k0, k1, splits)
    y = q.new_empty(N, T, H, d).transpose(1, 2)  # in memory as o_proj will read it
    return attend_into(y, q, k0, v0, k1, v1, mask0, mask1, plan, scratch_of(q, plan))


def scratch_of(q, plan):
    """Buffers of a launch, which may serve again: log2-sum-exp2 of the rows, of the parts, the parts, who is done."""
    _, grid, sizes = plan
    parts = grid[0] * grid[1] * grid[2] * sizes["BM"] if grid[1] > 1 else 1
    l, part_l, part = (q.new_empty(s, dtype=torch.float32) for s in (q.shape[:3], (parts,), (parts, sizes["BD"])))
    return l, part_l, part, q.new_zeros(grid[0] * grid[2], dtype=torch.int32)


def attend_into(y, q, k0, v0, k1, v1, mask0, mask1, plan, scratch):
    (numbers, grid, sizes), (l, part_l, part, done) = plan, scratch
    _attend[grid](q, k0, v0, _bytes(mask0), k1, v1, _bytes(mask1), y, l, part, part_l, done,
                  *_strides(q, k0, v0, k1, v1), _rows_of(mask1), *_strides(y), *numbers, **sizes,
                  EACH=mask1 is not None and mask1.shape[1] > 1)  # fmt: skip
    return y, l


@_forward.register_fake
def _(q, k0, v0, k1, v1, mask0, mask1, splits):
    N, H, T, d = q.shape
    return q.new_empty(N, T, H, d).transpose(1, 2), q.new_empty(N, H, T, dtype=torch.float32)


@custom_op("alpamayo::prefix_attention_backward", mutates_args=())
def _backward(dy: Tensor, q: Tensor, k0: Tensor, v0: Tensor, k1: Optional[Tensor], v1: Optional[Tensor],
              mask0: Optional[Tensor], mask1: Optional[Tensor], y: Tensor, l: Tensor, prefix: bool, tail: bool
              ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k0, v0 (empty unless `prefix`), k1, v1 (empty unless `tail`)."""
    (N, H, T, d), (B, G, P, _) = q.shape, k0.shape
    n, R, S, scale = N // B, H // G * T, 0 if k1 is None else k1.shape[2], d**-0.5 * LOG2E
    # tiles of 64 x 64 and of 64 keys x 32 rows, 8 warps: nothing spilled, 1 program a multiprocessor (2 on sm_100 by keys).
    # Left alone, the compiler saves registers for programs that are not there, and spills a few bytes, on sm_100 and in float32
    BM = 64 if q.element_size() == 2 else 32
    BN = 16 if BM == 32 and (d > 64 or d % 16) else BM
    if d % 16 and capability(q.device) not in (90, 100):  # the nano's 40, if each query has its own mask, spills with 64
        BN = min(BN, 32)
    rows, sizes = min(R, BM), dict(G=G, D=d, BD=max(16, triton.next_power_of_2(d)), num_warps=8, num_stages=2,
                                   maxnreg=208 if capability(q.device) == 100 or BM == 32 else None)  # fmt: skip
    each = mask1 is not None and mask1.shape[1] > 1
    dy, q, k0, v0, k1, v1 = _in_vectors(dy, q, k0, v0, k1, v1)
    dot = (dy.float() * y.float()).sum(-1).contiguous()  # (N, H, T)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _grad_q[(triton.cdiv(n, BM // rows) * triton.cdiv(R, rows), B * G)](
        q, k0, v0, _bytes(mask0), k1, v1, _bytes(mask1), dy, l, dot, dq, *_strides(q, k0, v0, k1, v1),
        _rows_of(mask1), *_strides(dy), n, T, R, P, S, rows, scale, EACH=each, BM=BM, BN=BN, **sizes)  # fmt: skip
    grads = [dq]
    for wanted, k, v, mask, m, each, owners in (
        (prefix, k0, v0, mask0, (P, 0), False, B), (tail, k1, v1, mask1, _rows_of(mask1), each, N)
    ):  # fmt: skip
        dk, dv = (torch.empty(k.shape if wanted else 0, dtype=q.dtype, device=q.device) for _ in range(2))
        if wanted and k.numel():
            _grad_kv[(triton.cdiv(k.shape[2], BN), owners * G)](
                q, k, v, _bytes(mask), dy, l, dot, dk, dv, *_strides(q, k, v), m, *_strides(dy),
                N // owners, T, R, k.shape[2], scale, EACH=each, BM=32, BN=BN, **sizes)  # fmt: skip
        grads += [dk, dv]
    return tuple(grads)


@_backward.register_fake
def _(dy, q, k0, v0, k1, v1, mask0, mask1, y, l, prefix, tail):
    like = lambda x, wanted: q.new_empty(x.shape if wanted else 0)
    return q.new_empty(q.shape), like(k0, prefix), like(v0, prefix), like(k1, tail), like(v1, tail)


def _keep(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, dy, _):
    needs = ctx.needs_input_grad
    prefix, tail = needs[1] or needs[2], needs[3] or needs[4]
    grads = torch.ops.alpamayo.prefix_attention_backward(dy, *ctx.saved_tensors, prefix, tail)
    return *(g if need else None for g, need in zip(grads, needs)), None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def prefix_attention(q, k0, v0, k1=None, v1=None, mask0=None, mask1=None):
    """See `specification`."""
    if not by_hand(q.device, q.dtype):
        return specification(q, k0, v0, k1, v1, mask0, mask1)
    return _forward(q, k0, v0, k1, v1, mask0, mask1, 0)[0]
