"""
What lies between two evaluations of the action expert: an Euler step of the flow and the embedding
of the new controls. And what follows the last one: the unicycle.

    v = W_out rmsnorm(h) + b_out                     h (N, 64, C): the expert's last hidden state
    x' = x + step * v                                controls x (N, 64, 2): Euler on Eq. 7
    z0 = sqrt(2) [sin, cos](2 pi f x'_a, 2 pi f x'_k, 2 pi f t)
    zi = rmsnorm(silu(W_i z(i-1) + b_i))             a few layers, narrow
    tokens = layernorm(W z + b)                      (N, 64, C), what the expert reads next

In PyTorch this is about forty launches over 64 rows of little work each. Here it is one. The flow
times are the same for all rows and known before the first step. So their share of the first layer,
W_1 [:, time] z0 [time] + b_1, is computed once for all steps (`time_share`). The kernel is for
sampling. Training embeds with PyTorch, which has the gradient.

    roll-out (Eq. 5):   v_t+1 = v_t + dt a_t      yaw_t+1 = yaw_t + dt k_t v_t + dt^2 / 2 k_t a_t
                        x_t+1 = x_t + dt / 2 (v_t cos yaw_t + v_t+1 cos yaw_t+1), y with sin

is three running sums, a tl.cumsum each, and its gradient the same sums from the other end. PyTorch
takes about 25 launches forward and 60 backward; these take one and one. The PyTorch that defines it
is `roll_out` in alpamayo.py, where a reader of the paper looks for Eq. 5; that of the step is here.

At the release's shape (64 rows, C = 2048, 512 wide) a step is four programs of 16 rows. Each reads
the embedding's 2.6 MB, which would be 23 us at 64 bytes a clock. Measured on an H200: 98 us, of
2700 that the step takes with the expert. Tiles of 32 columns took 260.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from kernels import call, capability, tiles, tl, triton


def fourier(x, freqs):
    angle = x[..., None] * freqs.flatten() * (2 * math.pi)
    return math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], -1)


def plain_flow_step(x, hidden, out, step, t, embed):
    """One step: controls x (N, T, 2) float32 to x + step * v, and their tokens (N, T, C) at the
    flow times t (N,).

    hidden (N, T, C), or None before the first step: x stays. t None, after the last: no tokens.
    out: weights of the final norm, weights and bias of the projection.
    embed: frequencies of acceleration, curvature, time; weights, bias, norm of each layer; weights
    and bias of the last linear map; weights and bias of the layer norm."""
    if hidden is not None:
        norm, weight, bias = out
        x = x + step * F.linear(F.rms_norm(hidden, norm.shape, norm, 1e-6), weight, bias).float()
    if t is None:
        return x, None
    accel, curvature, time, *layers, weight, bias, gain, offset = embed
    t = fourier(t, time)[:, None].expand(-1, x.shape[1], -1)
    z = torch.cat([fourier(x[..., 0], accel), fourier(x[..., 1], curvature), t], -1)
    z = z.to(weight.dtype)
    for w, b, norm in zip(layers[::3], layers[1::3], layers[2::3]):
        z = F.rms_norm(F.silu(F.linear(z, w, b)), b.shape, norm, 1e-5)
    return x, F.layer_norm(F.linear(z, weight, bias), gain.shape, gain, offset, 1e-5)


# --------------------------------------------------------------------------------------------------
# The step's kernel. A program has BM = 16 rows, from the expert's hidden state to their tokens. A
# layer's output is wider than the registers hold, so it goes through memory, BN columns at a time.
# `tl.debug_barrier` makes all threads of the program wait until each can read what the others
# stored. The root mean square of a row is known only with all its columns, so a norm is applied one
# layer later: W (g * z / rms) = (W (g * z)) / rms. Memory holds g * z.


@triton.jit
def _row(X, i, n):
    """Numbers i of a vector of n, as a row (1, i) in float32."""
    return tl.load(X + i, mask=i < n, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _velocity(H, NORM, OUT_W, OUT_B, row, ok, C, BC: tl.constexpr):
    """W_out rmsnorm(h) + b_out: of acceleration and of curvature, one number for each row."""
    va = tl.zeros(row.shape, tl.float32)
    vk = tl.zeros(row.shape, tl.float32)
    square = tl.zeros(row.shape, tl.float32)
    for c in range(0, C, BC):
        c = c + tl.arange(0, BC)
        h = tiles.read_block(H, row, c, ok, C).to(tl.float32)
        square += tl.sum(h * h, 1)
        h = h * _row(NORM, c, C)
        va += tl.sum(h * _row(OUT_W, c, C), 1)
        vk += tl.sum(h * _row(OUT_W + C, c, C), 1)
    r = tl.rsqrt(square / C + 1e-6)
    return va * r + tl.load(OUT_B).to(tl.float32), vk * r + tl.load(OUT_B + 1).to(tl.float32)


@triton.jit
def _features(a, k, ACCEL, CURVATURE, j, F):
    """Fourier features j of both controls: F of the one, F of the other, then nothing. The first
    half of each are sines."""
    half = F // 2
    place = j % F % half
    freq = tl.load(ACCEL + place, mask=j < F, other=0.0).to(tl.float32)
    second = (j >= F) & (j < 2 * F)
    freq += tl.load(CURVATURE + place, mask=second, other=0.0).to(tl.float32)
    x = tl.where((j < F)[None, :], a[:, None], k[:, None])
    angle = x * freq[None, :] * 6.283185307179586
    return 1.4142135623730951 * tl.where((j % F < half)[None, :], tl.sin(angle), tl.cos(angle))


@triton.jit
def _silu_into(Z, row, n, ok, A, GAIN, y):
    """Store gain * silu(y) as columns n of Z. Returns the rows' sums of squares of silu(y)."""
    y = (y * tl.sigmoid(y)).to(Z.dtype.element_ty)
    tiles.write_block(Z, row, n, ok, A, y * tl.load(GAIN + n, mask=n < A, other=0.0)[None, :])
    return tl.sum(y.to(tl.float32) * y.to(tl.float32), 1)


@triton.jit
def _step(X, NEXT, H, NORM, OUT_W, OUT_B, TIME, ACCEL, CURVATURE, LAYERS, W, B, GAIN, OFFSET, Z, Y,
          TOKENS, FIRST, GAINED, SQUARE, KICK, rows, T, C, A, F, stay, step, time_,
          MOVE: tl.constexpr, EMBED: tl.constexpr, DEPTH: tl.constexpr, BLOCKS: tl.constexpr,
          BF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
          BC: tl.constexpr):  # fmt: skip
    """Grid (blocks of BM rows,). Z (2, rows, A) and Y (rows, C) float32 are scratch. TIME: each
    sample's share of the first layer, time_ apart (0: all have the same). F: features of a number.
    FIRST, or None: GAINED = FIRST * tokens and SQUARE (rows, BLOCKS) as sampler.py's `_add` has
    them."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = row < rows
    a = tl.load(X + 2 * row, mask=ok, other=0.0)
    k = tl.load(X + 2 * row + 1, mask=ok, other=0.0)
    if MOVE:
        va, vk = _velocity(H, NORM, OUT_W, OUT_B, row, ok, C, BC)
        a = stay * a + step * va
        k = stay * k + step * vk
        if KICK is not None:
            a += tl.load(KICK + 2 * row, mask=ok, other=0.0)
            k += tl.load(KICK + 2 * row + 1, mask=ok, other=0.0)
        tl.store(NEXT + 2 * row, a, mask=ok)
        tl.store(NEXT + 2 * row + 1, k, mask=ok)
    if EMBED:
        j = tl.arange(0, BF)
        z = _features(a, k, ACCEL, CURVATURE, j, F).to(Z.dtype.element_ty)
        square = tl.zeros([BM], tl.float32)
        for n in range(0, A, BN):
            n = n + tl.arange(0, BN)
            there = (n < A)[:, None] & (j < 2 * F)[None, :]
            w = tl.load(LAYERS[0] + n[:, None] * 3 * F + j[None, :], mask=there, other=0.0)
            there = ok[:, None] & (n < A)[None, :]
            share = TIME + (row // T)[:, None] * time_ + n[None, :]
            share = tl.load(share, mask=there, other=0.0)
            y = tl.dot(z, tl.trans(w), share, input_precision="ieee")
            square += _silu_into(Z, row, n, ok, A, LAYERS[2], y)
        r = tl.rsqrt(square / A + 1e-5)
        tl.debug_barrier()
        for i in tl.static_range(1, DEPTH):
            before = Z + (i - 1) % 2 * rows * A
            square = tl.zeros([BM], tl.float32)
            for n in range(0, A, BN):
                n = n + tl.arange(0, BN)
                y = tiles.linear(before, LAYERS[3 * i], row, ok, n, A, A, 0, A, BK)
                y = y * r[:, None] + _row(LAYERS[3 * i + 1], n, A)
                square += _silu_into(Z + i % 2 * rows * A, row, n, ok, A, LAYERS[3 * i + 2], y)
            r = tl.rsqrt(square / A + 1e-5)
            tl.debug_barrier()
        before = Z + (DEPTH - 1) % 2 * rows * A
        total = tl.zeros([BM], tl.float32)
        for n in range(0, C, BN):
            n = n + tl.arange(0, BN)
            y = tiles.linear(before, W, row, ok, n, C, A, 0, A, BK)
            y = y * r[:, None] + _row(B, n, C)
            total += tl.sum(y, 1)
            tiles.write_block(Y, row, n, ok, C, y)
        mean = (total / C)[:, None]
        square = tl.zeros([BM], tl.float32)
        tl.debug_barrier()
        for n in range(0, C, BC):
            n = n + tl.arange(0, BC)
            y = tiles.read_block(Y, row, n, ok, C) - mean
            square += tl.sum(tl.where((n < C)[None, :], y * y, 0.0), 1)
        r = tl.rsqrt(square / C + 1e-5)[:, None]
        square = tl.zeros([BM], tl.float32)
        for n in range(0, C, BC):
            n = n + tl.arange(0, BC)
            y = (tiles.read_block(Y, row, n, ok, C) - mean) * r
            y = (y * _row(GAIN, n, C) + _row(OFFSET, n, C)).to(TOKENS.dtype.element_ty)
            tiles.write_block(TOKENS, row, n, ok, C, y)
            if FIRST is not None:
                square += tl.sum(y.to(tl.float32) * y.to(tl.float32), 1)
                tiles.write_block(GAINED, row, n, ok, C, y * _row(FIRST, n, C).to(y.dtype))
        if FIRST is not None:
            j = tl.arange(0, triton.next_power_of_2(BLOCKS))
            square = tl.where(j[None, :] == 0, square[:, None], 0.0)
            tiles.write_block(SQUARE, row, j, ok, BLOCKS, square)


def time_share(t, embed):
    """Each flow time's share of the embedding's first layer, (N, width) in float32: t (N,)."""
    _, _, freqs, weight, bias = embed[:5]
    z = fourier(t.float(), freqs.float()).to(weight.dtype).float()
    return z @ weight[:, -z.shape[1] :].float().T + bias.float()


def step_numbers(i, steps, eta):
    """Step i of the flow is x' = stay * x + step * v + std * n with n drawn anew: stay, step, std.
    alpamayo.euler_step, its mean put in order of x and v."""
    t, a = i / steps, eta * math.pi / 2
    left = 1 - (t + 1 / steps)
    back = left * (1 - math.cos(a))
    return 1 - back, 1 / steps + back * t, left * math.sin(a) if left > 1e-9 else 0.0


def step_scratch(x, weight):
    """What `step_into` needs for controls x and the embedding's last weight: layers, tokens."""
    rows = x.shape[:-1].numel()
    C, A = weight.shape
    return weight.new_empty(2, rows, A), weight.new_empty(rows, C, dtype=torch.float32)


def step_into(after, tokens, x, hidden, out, step, share, embed, scratch, norm=(None,) * 3,
              stay=1.0, kick=None):  # fmt: skip
    """`plain_flow_step` by the kernel: x's successor into `after`, if there is a `hidden`, and the
    tokens into `tokens` (or None). share: the `time_share` of the step, one row or N; scratch: see
    `step_scratch`; norm: the first layer's gain, and where gain * tokens and the rows' sums of
    squares go, or None each; stay, and kick = std * n (N, T, 2) or None: see `step_numbers`."""
    accel, curvature, _, *layers, weight, bias, gain, offset = embed
    N, T, _ = x.shape
    rows = N * T
    C, A = weight.shape
    features = 2 * accel.numel()
    # Few programs, each alone on its multiprocessor: wide tiles, which wait less often.
    options = dict(BN=32, BC=64, num_warps=4, num_stages=2, maxnreg=255)  # float32
    if weight.element_size() == 2:
        wide = 256 if capability(x.device) in (80, 90, 100) else 128
        options = dict(BN=wide, BC=512, num_warps=8, num_stages=4)
    apart = 0 if share is None or len(share) == 1 else A
    _step[(triton.cdiv(rows, 16),)](
        x, after, hidden, *out, share, accel, curvature, tuple(layers), weight, bias, gain, offset,
        *scratch, tokens, *norm, kick, rows, T, C, A, features, stay, step, apart,
        MOVE=hidden is not None, EMBED=tokens is not None, DEPTH=len(layers) // 3,
        BLOCKS=1 if norm[2] is None else norm[2].shape[1],
        BF=max(16, triton.next_power_of_2(2 * features)), BM=16, BK=64, **options)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The roll-out's kernels. A program drives ROWS cars. A car's T steps lie in a row of a tile; beyond
# T it stands still.


@triton.jit
def _my_cars(cars, T, ROWS: tl.constexpr, BT: tl.constexpr):
    """This program's cars (ROWS,), steps (BT,), which of them there are and where they lie."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, BT)
    return r, t, (r < cars)[:, None] & (t < T)[None, :], r[:, None] * T + t[None, :]


@triton.jit
def _load(X, ok):
    return tl.load(X, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _store_each(X, values, ok):
    """The first numbers at each address X."""
    for i in tl.static_range(len(values)):
        tl.store(X + i, values[i].to(X.dtype.element_ty), mask=ok)


@triton.jit
def _motion(A, V0, r, t, ok, at, dt):
    """Of each step: curvature, speed at its start and end, yaw at its end, metres driven in it."""
    a = _load(A + at * 2, ok)
    k = _load(A + at * 2 + 1, ok)
    v0 = tl.sum(_load(V0 + r[:, None], ok & (t == 0)[None, :]), 1)[:, None]
    v1 = v0 + dt * tl.cumsum(a, 1)
    v = v1 - dt * a
    path = dt * v + dt * dt / 2 * a
    return k, v, v1, tl.cumsum(k * path, 1), path


@triton.jit
def _roll_out(A, V0, XYZ, ROT, cars, T, dt, ROWS: tl.constexpr, BT: tl.constexpr):
    r, t, ok, at = _my_cars(cars, T, ROWS, BT)
    k, v, v1, yaw, path = _motion(A, V0, r, t, ok, at, dt)
    c = tl.cos(yaw)
    s = tl.sin(yaw)
    before = yaw - k * path
    x = tl.cumsum(dt / 2 * (v * tl.cos(before) + v1 * c), 1)
    y = tl.cumsum(dt / 2 * (v * tl.sin(before) + v1 * s), 1)
    zero = tl.zeros_like(x)
    _store_each(XYZ + at * 3, (x, y, zero), ok)
    _store_each(ROT + at * 9, (c, -s, zero, s, c, zero, zero, zero, zero + 1), ok)


@triton.jit
def _roll_back(A, V0, GX, GR, GA, GV, cars, T, dt, ROWS: tl.constexpr, BT: tl.constexpr):
    """Gradients of actions and v0 from those of xyz and rot. A step moves all that follow it, so
    each running sum of the roll-out is here a sum from the last step back. g_x: the gradient of x.
    """
    r, t, ok, at = _my_cars(cars, T, ROWS, BT)
    k, v, v1, yaw, path = _motion(A, V0, r, t, ok, at, dt)
    c = tl.cos(yaw)
    s = tl.sin(yaw)
    gx = _load(GX + at * 3, ok)
    gy = _load(GX + at * 3 + 1, ok)
    GR += at * 9
    g_cos = _load(GR, ok) + _load(GR + 4, ok)
    g_sin = _load(GR + 3, ok) - _load(GR + 1, ok)
    # The velocity at the end of a step moves half of that step, half of the next, and all behind.
    later_x = tl.cumsum(gx, 1, reverse=True)
    later_y = tl.cumsum(gy, 1, reverse=True)
    gvx = dt / 2 * (2 * later_x - gx)
    gvy = dt / 2 * (2 * later_y - gy)
    g_yaw = v1 * (c * gvy - s * gvx) + c * g_sin - s * g_cos
    g_turn = tl.cumsum(g_yaw, 1, reverse=True)  # of k * path
    g_path = g_turn * k
    g_v1 = c * gvx + s * gvy
    # A speed is the end of its step and the start of the next, whose path it makes.
    g_speed = tl.cumsum(g_v1, 1, reverse=True) + dt * (tl.cumsum(g_path, 1, reverse=True) - g_path)
    g_a = dt * g_speed + dt * dt / 2 * g_path
    _store_each(GA + at * 2, (g_a, g_turn * path), ok)
    g_v0 = tl.sum(g_v1 + dt * g_path + dt / 2 * gx, 1)  # at t0 the car points along x
    tl.store(GV + r, g_v0.to(GV.dtype.element_ty), mask=r < cars)


def _over_cars(kernel, actions, v0, *tensors):
    T = actions.shape[-2]
    cars = v0.numel()
    tensors = [x.contiguous() for x in (actions, v0, *tensors)]
    dt = 0.1  # seconds, alpamayo.DT
    BT = max(16, triton.next_power_of_2(T))
    kernel[(triton.cdiv(cars, 2),)](*tensors, cars, T, dt, ROWS=2, BT=BT, num_warps=2)


def empty_paths(actions, v0):
    """Positions (..., T, 3) and rotations (..., T, 3, 3), not yet written."""
    size = actions.shape[:-1]
    return actions.new_empty(*size, 3), actions.new_empty(*size, 3, 3)


@custom_op("alpamayo::roll_out", mutates_args=())
def roll_out_op(actions: Tensor, v0: Tensor) -> tuple[Tensor, Tensor]:
    paths = empty_paths(actions, v0)
    _over_cars(_roll_out, actions, v0, *paths)
    return paths


roll_out_op.register_fake(empty_paths)


def empty_like_actions(xyz, rot, actions, v0):
    return actions.new_empty(actions.shape), v0.new_empty(v0.shape)


@custom_op("alpamayo::roll_out_backward", mutates_args=())
def roll_out_backward_op(
    xyz: Tensor, rot: Tensor, actions: Tensor, v0: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of actions and v0, from those of xyz and rot."""
    grads = empty_like_actions(xyz, rot, actions, v0)
    _over_cars(_roll_back, actions, v0, xyz, rot, *grads)
    return grads


roll_out_backward_op.register_fake(empty_like_actions)


def keep_actions(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def gradients_of_actions(ctx, xyz, rot):
    return roll_out_backward_op(xyz, rot, *ctx.saved_tensors)


roll_out_op.register_autograd(gradients_of_actions, setup_context=keep_actions)


def roll_out_by_kernel(actions, v0):
    """alpamayo.roll_out in one launch: actions (..., T, 2), v0 (...) to xyz and rot."""
    return call(roll_out_op, actions, v0.expand(actions.shape[:-2]))
