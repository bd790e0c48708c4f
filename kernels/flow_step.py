"""
What lies between two evaluations of the action expert, and what follows the last: an Euler step of the flow, the embedding
of the new controls, and the unicycle.

    v = W_out rmsnorm(h) + b_out                     h (N, 64, C): the expert's last hidden state
    x' = x + step * v                                controls x (N, 64, 2), Alpamayo-R1 Eq. 7 integrated by Euler
    z0 = sqrt(2) [sin, cos](2 pi f x'_a, 2 pi f x'_k, 2 pi f t)
    zi = rmsnorm(silu(W_i z(i-1) + b_i))             a few layers, narrow
    tokens = layernorm(W z + b)                      (N, 64, C), which the expert reads next

In PyTorch this is about forty launches over 64 rows of little work each. Here it is one. The flow times are the same for
all rows and known before the first step, so their share of the first layer, W_1 [:, time] z0 [time] + b_1, is computed
once for all steps (`time_share`). The kernel is for sampling; training embeds with PyTorch, which has the gradient.

    roll-out (Eq. 5):   v_t+1 = v_t + dt a_t      yaw_t+1 = yaw_t + dt k_t v_t + dt^2 / 2 k_t a_t
                        x_t+1 = x_t + dt / 2 (v_t cos yaw_t + v_t+1 cos yaw_t+1), y with sin

is three running sums, so a row of tl.cumsum each, and its gradient the same sums from the other end. About 25 launches
forward and 60 backward in PyTorch; one and one here. Its specification is `roll_out` in alpamayo.py, where a reader of
the paper looks for Eq. 5; that of the step is below.

By arithmetic, not measured: at the release's shape (64 rows, C = 2048, 512 wide) a step is four programs of 16 rows, each
of which reads the embedding's 2.6 MB, which is 23 us at 64 bytes a clock, beside 1160 us for the bytes of the expert.
"""
import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from kernels import by_hand, tl, triton

DT = 0.1  # seconds


def fourier(x, freqs):
    angle = x[..., None] * freqs.flatten() * (2 * math.pi)
    return math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], -1)


def specification(x, hidden, out, step, t, embed):
    """One step: controls x (N, T, 2) float32 to x + step * v, and their tokens (N, T, C) at the flow times t (N,).

    hidden (N, T, C) or None, before the first step: then x stays. t None, after the last: no tokens. out: the weights of
    the final norm, weights and bias of the projection. embed: frequencies of acceleration, curvature, time; weights,
    bias, norm of each layer; weights and bias of the last linear map; weights and bias of the layer norm."""
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


# ------------------------------------------------------------------------------------------------------- the step's kernel
# A program has BM = 16 rows, from the expert's hidden state to their tokens. A layer's output is wider than the registers
# hold, so it goes through memory, BN columns at a time; `tl.debug_barrier` has all threads of the program wait until what
# the others stored can be read. The root mean square of a row is known only when all its columns are, so a norm is applied
# one layer later: W (g * z / rms) = (W (g * z)) / rms.


@triton.jit
def _layer(Z, G, W, row, ok, n, K, N, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """BN columns of W (g * z): z (rows, K) in memory, gain g (K,) or None, W (N, K). Sums in float32."""
    y = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        k = k + tl.arange(0, BK)
        z = tl.load(Z + row[:, None] * K + k[None, :], mask=ok[:, None] & (k < K)[None, :], other=0.0)
        if G is not None:
            z = (z * tl.load(G + k, mask=k < K, other=0.0)[None, :]).to(z.dtype)
        w = tl.load(W + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        y = tl.dot(z, tl.trans(w), y, input_precision="ieee")
    return y


@triton.jit
def _step(X, NEXT, H, NORM, OUT_W, OUT_B, TIME, ACCEL, CURVATURE, LAYERS, W, B, GAIN, OFFSET, Z, Y, TOKENS,
          rows, T, C, A, F, step, time_,
          MOVE: tl.constexpr, EMBED: tl.constexpr, DEPTH: tl.constexpr, BF: tl.constexpr,
          BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Grid (blocks of BM rows,). Z (2, rows, A) and Y (rows, C) float32 are scratch; TIME: each sample's share of the first
    layer, time_ apart (0: all have the same). F: features of a number."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = row < rows
    a, k = tl.load(X + 2 * row, mask=ok, other=0.0), tl.load(X + 2 * row + 1, mask=ok, other=0.0)
    if MOVE:
        va, vk, square = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
        for c in range(0, C, BK):
            c = c + tl.arange(0, BK)
            h = tl.load(H + row[:, None] * C + c[None, :], mask=ok[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
            square += tl.sum(h * h, 1)
            h = h * tl.load(NORM + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
            va += tl.sum(h * tl.load(OUT_W + c, mask=c < C, other=0.0).to(tl.float32)[None, :], 1)
            vk += tl.sum(h * tl.load(OUT_W + C + c, mask=c < C, other=0.0).to(tl.float32)[None, :], 1)
        r = tl.rsqrt(square / C + 1e-6)
        a += step * (va * r + tl.load(OUT_B).to(tl.float32))
        k += step * (vk * r + tl.load(OUT_B + 1).to(tl.float32))
        tl.store(NEXT + 2 * row, a, mask=ok)
        tl.store(NEXT + 2 * row + 1, k, mask=ok)
    if EMBED:
        # The features of both controls: F of the one, F of the other, then nothing; the first half of each are sines.
        j = tl.arange(0, BF)
        half, place = F // 2, j % F % (F // 2)
        freq = tl.load(ACCEL + place, mask=j < F, other=0.0).to(tl.float32)
        freq += tl.load(CURVATURE + place, mask=(j >= F) & (j < 2 * F), other=0.0).to(tl.float32)
        angle = tl.where((j < F)[None, :], a[:, None], k[:, None]) * freq[None, :] * 6.283185307179586
        z = 1.4142135623730951 * tl.where((j % F < half)[None, :], tl.sin(angle), tl.cos(angle))
        z = z.to(Z.dtype.element_ty)
        square = tl.zeros([BM], tl.float32)
        for n in range(0, A, BN):
            n = n + tl.arange(0, BN)
            w = tl.load(LAYERS[0] + n[:, None] * 3 * F + j[None, :], mask=(n < A)[:, None] & (j < 2 * F)[None, :], other=0.0)
            share = tl.load(TIME + (row // T)[:, None] * time_ + n[None, :], mask=ok[:, None] & (n < A)[None, :], other=0.0)
            y = tl.dot(z, tl.trans(w), share, input_precision="ieee")
            y = (y * tl.sigmoid(y)).to(Z.dtype.element_ty)
            square += tl.sum(y.to(tl.float32) * y.to(tl.float32), 1)
            tl.store(Z + row[:, None] * A + n[None, :], y, mask=ok[:, None] & (n < A)[None, :])
        r = tl.rsqrt(square / A + 1e-5)
        tl.debug_barrier()
        for i in tl.static_range(1, DEPTH):
            square = tl.zeros([BM], tl.float32)
            for n in range(0, A, BN):
                n = n + tl.arange(0, BN)
                y = _layer(Z + (i - 1) % 2 * rows * A, LAYERS[3 * i - 1], LAYERS[3 * i], row, ok, n, A, A, BM, BN, BK)
                y = y * r[:, None] + tl.load(LAYERS[3 * i + 1] + n, mask=n < A, other=0.0).to(tl.float32)[None, :]
                y = (y * tl.sigmoid(y)).to(Z.dtype.element_ty)
                square += tl.sum(y.to(tl.float32) * y.to(tl.float32), 1)
                tl.store(Z + i % 2 * rows * A + row[:, None] * A + n[None, :], y, mask=ok[:, None] & (n < A)[None, :])
            r = tl.rsqrt(square / A + 1e-5)
            tl.debug_barrier()
        total = tl.zeros([BM], tl.float32)
        for n in range(0, C, BN):
            n = n + tl.arange(0, BN)
            y = _layer(Z + (DEPTH - 1) % 2 * rows * A, LAYERS[3 * DEPTH - 1], W, row, ok, n, A, C, BM, BN, BK)
            y = y * r[:, None] + tl.load(B + n, mask=n < C, other=0.0).to(tl.float32)[None, :]
            total += tl.sum(y, 1)
            tl.store(Y + row[:, None] * C + n[None, :], y, mask=ok[:, None] & (n < C)[None, :])
        mean, square = total / C, tl.zeros([BM], tl.float32)
        tl.debug_barrier()
        for n in range(0, C, BK):
            n = n + tl.arange(0, BK)
            y = tl.load(Y + row[:, None] * C + n[None, :], mask=ok[:, None] & (n < C)[None, :], other=0.0) - mean[:, None]
            square += tl.sum(tl.where((n < C)[None, :], y * y, 0.0), 1)
        r = tl.rsqrt(square / C + 1e-5)
        for n in range(0, C, BK):
            n = n + tl.arange(0, BK)
            y = tl.load(Y + row[:, None] * C + n[None, :], mask=ok[:, None] & (n < C)[None, :], other=0.0) - mean[:, None]
            y = y * r[:, None] * tl.load(GAIN + n, mask=n < C, other=0.0).to(tl.float32)[None, :]
            y = y + tl.load(OFFSET + n, mask=n < C, other=0.0).to(tl.float32)[None, :]
            tl.store(TOKENS + row[:, None] * C + n[None, :], y.to(TOKENS.dtype.element_ty), mask=ok[:, None] & (n < C)[None, :])


def time_share(t, embed):
    """Each flow time's share of the embedding's first layer, (N, width) in float32, for times (N,)."""
    weight, bias, freqs = embed[3], embed[4], embed[2]
    z = fourier(t.float(), freqs.float()).to(weight.dtype).float()
    return z @ weight[:, -z.shape[1] :].float().T + bias.float()


def step_into(after, tokens, x, hidden, out, step, share, embed, scratch):
    """The kernel, into x's successor `after` (if there is a `hidden`) and `tokens` (if not None). maxnreg: left alone the
    compiler saves registers for programs that are not there, and spills a few bytes on some chips; so it spills nothing."""
    accel, curvature, _, *layers, weight, bias, gain, offset = embed
    rows, T = x.shape[0] * x.shape[1], x.shape[1]
    norm, out_w, out_b = out
    options = dict(num_stages=4, maxnreg=168) if weight.element_size() == 2 else dict(num_stages=2, maxnreg=255)
    (C, A), features = weight.shape, 2 * accel.numel()
    _step[(triton.cdiv(rows, 16),)](
        x, after, hidden, norm, out_w, out_b, share, accel, curvature, tuple(layers), weight, bias, gain, offset, *scratch,
        tokens, rows, T, C, A, features, step, 0 if share is None or len(share) == 1 else A, MOVE=hidden is not None,
        EMBED=tokens is not None, DEPTH=len(layers) // 3, BF=max(16, triton.next_power_of_2(2 * features)), BM=16, BN=32,
        BK=64, num_warps=4, **options)  # fmt: skip


def scratch_of(x, weight):
    rows, (C, A) = x.shape[0] * x.shape[1], weight.shape
    return weight.new_empty(2, rows, A), weight.new_empty(rows, C, dtype=torch.float32)


@custom_op("alpamayo::flow_step", mutates_args=())
def _flow_step(x: Tensor, hidden: Optional[Tensor], out: list[Tensor], step: float, t: Optional[Tensor], embed: list[Tensor]
               ) -> tuple[Tensor, Tensor]:  # fmt: skip
    weight = embed[-4]
    after = torch.empty_like(x) if hidden is not None else x.clone()
    tokens = weight.new_empty(*x.shape[:2], weight.shape[0]) if t is not None else None
    share = None if t is None else time_share(t, embed)
    step_into(after, tokens, x, hidden, out, step, share, embed, scratch_of(x, weight))
    return after, weight.new_empty(0) if tokens is None else tokens


@_flow_step.register_fake
def _(x, hidden, out, step, t, embed):
    weight = embed[-4]
    return torch.empty_like(x), weight.new_empty(0 if t is None else (*x.shape[:2], weight.shape[0]))


def flow_step(x, hidden, out, step, t, embed):
    """See `specification`; the kernel where nothing needs a gradient."""
    tensors = [y for y in (x, hidden, *out, *embed) if y is not None]
    if torch.is_grad_enabled() and any(y.requires_grad for y in tensors) or not by_hand(x.device, embed[-4].dtype):
        return specification(x, hidden, out, step, t, embed)
    hidden = hidden if hidden is None else hidden.contiguous()
    after, tokens = _flow_step(x.contiguous(), hidden, list(out), step, t, list(embed))
    return after, None if t is None else tokens


# ------------------------------------------------------------------------------------------------- the roll-out's kernels
# A program drives ROWS cars; the T steps of a car lie in a tile's row, those beyond T stand still.


@triton.jit
def _drive(A, V0, r, t, ok, T, dt):
    """Accelerations, curvatures, speeds and yaws at the end of each step, speed at its start, and by how much it turns."""
    a = tl.load(A + (r[:, None] * T + t[None, :]) * 2, mask=ok, other=0.0).to(tl.float32)
    k = tl.load(A + (r[:, None] * T + t[None, :]) * 2 + 1, mask=ok, other=0.0).to(tl.float32)
    v0 = tl.load(V0 + r[:, None], mask=ok & (t == 0)[None, :], other=0.0).to(tl.float32)
    v0 = tl.sum(v0, 1)[:, None]
    v1 = v0 + dt * tl.cumsum(a, 1)
    v = v1 - dt * a
    path = dt * v + dt * dt / 2 * a  # metres in the step
    return k, v0, v, v1, tl.cumsum(k * path, 1), path


@triton.jit
def _store3(X, a, b, c, ok):
    tl.store(X, a.to(X.dtype.element_ty), mask=ok)
    tl.store(X + 1, b.to(X.dtype.element_ty), mask=ok)
    tl.store(X + 2, c.to(X.dtype.element_ty), mask=ok)


@triton.jit
def _roll_out(A, V0, XYZ, ROT, cars, T, dt, ROWS: tl.constexpr, BT: tl.constexpr):
    r, t = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BT)
    ok = (r < cars)[:, None] & (t < T)[None, :]
    k, v0, v, v1, yaw, path = _drive(A, V0, r, t, ok, T, dt)
    c, s, before = tl.cos(yaw), tl.sin(yaw), yaw - k * path
    x = tl.cumsum(dt / 2 * (v * tl.cos(before) + v1 * c), 1)
    y = tl.cumsum(dt / 2 * (v * tl.sin(before) + v1 * s), 1)
    at, zero = r[:, None] * T + t[None, :], tl.zeros_like(x)
    _store3(XYZ + at * 3, x, y, zero, ok)
    _store3(ROT + at * 9, c, -s, zero, ok)
    _store3(ROT + at * 9 + 3, s, c, zero, ok)
    _store3(ROT + at * 9 + 6, zero, zero, zero + 1, ok)


@triton.jit
def _roll_back(A, V0, GX, GR, GA, GV, cars, T, dt, ROWS: tl.constexpr, BT: tl.constexpr):
    """Gradients of actions and v0 from those of xyz and rot. What happens at a step moves all that follows it, so each
    running sum of the roll-out is here a sum from the last step back."""
    r, t = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BT)
    ok = (r < cars)[:, None] & (t < T)[None, :]
    k, v0, v, v1, yaw, path = _drive(A, V0, r, t, ok, T, dt)
    c, s = tl.cos(yaw), tl.sin(yaw)
    at = r[:, None] * T + t[None, :]
    gx = tl.load(GX + at * 3, mask=ok, other=0.0).to(tl.float32)
    gy = tl.load(GX + at * 3 + 1, mask=ok, other=0.0).to(tl.float32)
    GR += at * 9  # of the rotation's two cosines, and of its sine and minus sine
    r0 = tl.load(GR, mask=ok, other=0.0).to(tl.float32) + tl.load(GR + 4, mask=ok, other=0.0).to(tl.float32)
    r1 = tl.load(GR + 3, mask=ok, other=0.0).to(tl.float32) - tl.load(GR + 1, mask=ok, other=0.0).to(tl.float32)
    # of the velocity at the end of a step: it moves half of that step and half of the next, and all after them
    later_x, later_y = tl.cumsum(gx, 1, reverse=True), tl.cumsum(gy, 1, reverse=True)
    gvx, gvy = dt / 2 * (2 * later_x - gx), dt / 2 * (2 * later_y - gy)
    g_yaw = v1 * (c * gvy - s * gvx) + c * r1 - s * r0
    g_turn = tl.cumsum(g_yaw, 1, reverse=True)  # of k * path
    g_path = g_turn * k
    g_v1 = c * gvx + s * gvy  # of the speed at the end; the speed at the start of a step also makes its path
    g_speed = tl.cumsum(g_v1, 1, reverse=True) + dt * (tl.cumsum(g_path, 1, reverse=True) - g_path)
    tl.store(GA + at * 2, (dt * g_speed + dt * dt / 2 * g_path).to(GA.dtype.element_ty), mask=ok)
    tl.store(GA + at * 2 + 1, (g_turn * path).to(GA.dtype.element_ty), mask=ok)
    g_v0 = tl.sum(g_v1 + dt * g_path + dt / 2 * gx, 1)  # at t0 the car points along x
    tl.store(GV + r, g_v0.to(GV.dtype.element_ty), mask=r < cars)


def _over_cars(kernel, *tensors, T):
    cars = tensors[1].numel()
    kernel[(triton.cdiv(cars, 2),)](*tensors, cars, T, DT, ROWS=2, BT=max(16, triton.next_power_of_2(T)), num_warps=2)


@custom_op("alpamayo::roll_out", mutates_args=())
def _forward(actions: Tensor, v0: Tensor) -> tuple[Tensor, Tensor]:
    xyz, rot = actions.new_empty(*actions.shape[:-1], 3), actions.new_empty(*actions.shape[:-1], 3, 3)
    _over_cars(_roll_out, actions.contiguous(), v0.contiguous(), xyz, rot, T=actions.shape[-2])
    return xyz, rot


@_forward.register_fake
def _(actions, v0):
    return actions.new_empty(*actions.shape[:-1], 3), actions.new_empty(*actions.shape[:-1], 3, 3)


@custom_op("alpamayo::roll_out_backward", mutates_args=())
def _backward(xyz: Tensor, rot: Tensor, actions: Tensor, v0: Tensor) -> tuple[Tensor, Tensor]:
    grads = actions.new_empty(actions.shape), v0.new_empty(v0.shape)
    tensors = actions.contiguous(), v0.contiguous(), xyz.contiguous(), rot.contiguous(), *grads
    _over_cars(_roll_back, *tensors, T=actions.shape[-2])
    return grads


@_backward.register_fake
def _(xyz, rot, actions, v0):
    return actions.new_empty(actions.shape), v0.new_empty(v0.shape)


_forward.register_autograd(
    lambda ctx, xyz, rot: torch.ops.alpamayo.roll_out_backward(xyz, rot, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def roll_out_by_kernel(actions, v0):
    """alpamayo.roll_out, which is the specification, in one launch."""
    return _forward(actions, v0.expand(actions.shape[:-2]))
