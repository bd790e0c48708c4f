"""
Tiles of vectors whose length d is no power of two.

A Triton program computes on tiles, whose sides are powers of two. The heads of the release's vision tower have d = 72 =
1152 / 16 numbers. Padded to 128, 44 % of every product would multiply zeros. So a vector is cut in two parts, 64 + 16, of
which 8 are padding: a tile of n vectors is a pair of tiles, (n, D0) and (n, D1), and a product of vectors is the sum of
two products, 80 wide together. Other lengths: nano's 24 is one tile of 32, as a second part would save nothing, and where
D1 = 0 the second of a pair is not used.

For a reader who knows PyTorch but not Triton: a kernel is written for one program, of which the GPU runs as many as the
grid says, in any order. X is the address of a tensor's first number; X + at is a tile of addresses where at is a tile of
integers; tl.load and tl.store take a mask, False for what lies outside the tensor. What is tl.constexpr is known when the
kernel is compiled, so `if D1:` costs nothing when it runs. A tile lives in the registers of one block of threads.
"""
import torch

from kernels import tl, triton


def power_of_2(n):
    return 1 << (n - 1).bit_length()


def parts(d):
    """(D0, D1): the widths of the tiles that hold d numbers. The matrix units want at least 16."""
    whole = max(16, power_of_2(d))
    first = whole // 2
    second = max(16, power_of_2(max(1, d - first)))
    return (first, second) if first >= 16 and first + second < whole else (whole, 0)


def in_vectors(x):
    """x (..., d), or a copy, whose vectors all begin at multiples of d numbers, and its strides but the last, counted in
    vectors. A kernel multiplies them by d, which it knows when it is compiled, and so the compiler sees that each vector
    begins at a multiple of 16 bytes (d = 72 in bf16: 144) and copies 16 bytes at a time."""
    d = x.shape[-1]
    fits = x.stride(-1) == 1 and all(s % d == 0 for n, s in zip(x.shape[:-1], x.stride()) if n > 1)
    x = x if fits else x.clone(memory_format=torch.contiguous_format)
    return x, *(s // d for s in x.stride()[:-1])


@triton.jit
def load(X, vector, ok, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """The vectors of the numbers `vector` (n,) of X, zero where not ok (n,) and beyond their end: tiles (n, D0), (n, D1)."""
    at = X + vector.to(tl.int64)[:, None] * D  # (n, 1)
    i = tl.arange(0, D0)[None, :]
    x0 = tl.load(at + i, mask=ok[:, None] if D0 <= D else ok[:, None] & (i < D), other=0.0)
    x1 = x0
    if D1:
        i = D0 + tl.arange(0, D1)[None, :]
        x1 = tl.load(at + i, mask=ok[:, None] if D0 + D1 <= D else ok[:, None] & (i < D), other=0.0)
    return x0, x1


@triton.jit
def store(X, vector, ok, x0, x1, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """The reverse of `load`, rounded to X's dtype."""
    at = X + vector.to(tl.int64)[:, None] * D
    i = tl.arange(0, D0)[None, :]
    tl.store(at + i, x0.to(X.dtype.element_ty), mask=ok[:, None] if D0 <= D else ok[:, None] & (i < D))
    if D1:
        i = D0 + tl.arange(0, D1)[None, :]
        tl.store(at + i, x1.to(X.dtype.element_ty), mask=ok[:, None] if D0 + D1 <= D else ok[:, None] & (i < D))


@triton.jit
def products(a0, a1, b0, b1, D1: tl.constexpr):
    """All products of vectors, a b^T, in float32. ieee: of float32 vectors too, which would be cut to 19 bits otherwise."""
    x = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if D1:
        x = tl.dot(a1, tl.trans(b1), x, input_precision="ieee")
    return x  # (rows of a, rows of b)


@triton.jit
def add(y0, y1, w, x0, x1, D1: tl.constexpr):
    """y + w x: to each vector of y (m, d) the vectors of x (n, d) by their weights w (m, n)."""
    w = w.to(x0.dtype)
    y0 = tl.dot(w, x0, y0, input_precision="ieee")
    if D1:
        y1 = tl.dot(w, x1, y1, input_precision="ieee")
    return y0, y1


@triton.jit
def zeros(N: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """N vectors to add to, in float32."""
    y0 = tl.zeros([N, D0], tl.float32)
    y1 = y0
    if D1:
        y1 = tl.zeros([N, D1], tl.float32)
    return y0, y1


@triton.jit
def scaled(y0, y1, by, D1: tl.constexpr):
    """Each vector of y (n, d) times its own factor (n,)."""
    y0 = y0 * by[:, None]
    if D1:
        y1 = y1 * by[:, None]
    return y0, y1
