"""
Reading, writing and multiplying tiles.

For a reader who knows PyTorch but not Triton: a kernel is written for one program. The GPU runs as
many programs as the grid says, in any order. X is the address of a tensor's first number; X + i is
a tile of addresses where i is a tile of integers. tl.load and tl.store take a mask, False for what
lies outside the tensor. A tl.constexpr is known when the kernel is compiled, so `if` on it costs
nothing at run time. A tile lives in the registers of one block of threads. Its sides are powers of
two.

Vectors whose length d is not a power of two. The heads of the release's vision tower have d = 72 =
1152 / 16 numbers. Padded to 128, 44 % of every product would multiply zeros. So a vector is cut in
two parts, 64 + 16, of which 8 are padding. A tile of n vectors is then a tuple of two tiles,
(n, 64) and (n, 16), and a product of vectors is the sum of two products, 80 wide together. Where a
second part would save nothing (nano's 24 fit in 32), the tuple has one tile.
"""
import torch

from kernels import tl, triton


@triton.constexpr_function
def part(d, i):
    """Width of tile i, 0 or 1, of vectors of d numbers; 0 where the first tile holds all of them.
    The matrix units want at least 16."""
    whole = max(16, triton.next_power_of_2(d))
    first = whole // 2
    second = max(16, triton.next_power_of_2(max(1, d - first)))
    if first < 16 or first + second >= whole:
        first, second = whole, 0
    return second if i else first


def in_vectors(x):
    """x (..., d), or a copy, whose vectors all begin at multiples of d numbers; and its strides
    except the last, in units of d. This tuple is how a kernel takes a tensor that may be a view.

    A kernel multiplies the strides by d, which is known when it is compiled. So the compiler sees
    that each vector begins at a multiple of 16 bytes (d = 72 in bf16: 144) and copies 16 at a time.
    """
    d = x.shape[-1]
    *strides, last = x.stride()
    if last != 1 or any(s % d for s in strides):  # of one vector any stride will do
        if last != 1 or any(s % d for n, s in zip(x.shape, strides) if n > 1):
            x = x.clone(memory_format=torch.contiguous_format)
        strides = x.stride()[:-1]
    return x, *(s // d for s in strides)


@triton.jit
def read_block(X, row, column, ok, width):
    """Rows (m,) and columns (n,) of a matrix that is `width` wide, (m, n); 0 beyond it and in rows
    that are not ok (m,). ok None: all are."""
    there = (column < width)[None, :]
    if ok is not None:
        there = ok[:, None] & there
    return tl.load(X + row[:, None] * width + column[None, :], mask=there, other=0.0)


@triton.jit
def write_block(X, row, column, ok, width, x):
    """The reverse of `read_block`, rounded to X's dtype."""
    there = (column < width)[None, :]
    if ok is not None:
        there = ok[:, None] & there
    x = x.to(X.dtype.element_ty)
    tl.store(X + row[:, None] * width + column[None, :], x, mask=there)


@triton.jit
def linear(X, W, row, ok, n, N, K, start, stop, BK: tl.constexpr):
    """Columns n of x W^T in float32, the sum over k from start to stop: X (rows, K), W (N, K)."""
    y = tl.zeros([row.shape[0], n.shape[0]], tl.float32)
    for k in range(start, stop, BK):
        k = k + tl.arange(0, BK)
        x = read_block(X, row, k, ok, K)
        w = read_block(W, n, k, n < N, K)
        y = tl.dot(x, tl.trans(w), y, input_precision="ieee")
    return y


@triton.jit
def is_last(DONE, SPLITS: tl.constexpr):
    """Of SPLITS programs that share a tile and have stored their parts, whether this one is the
    last. DONE: the counter of those that have. What the others stored is to be read with .cg."""
    tl.debug_barrier()  # all threads of this program have stored before one of them says so
    last = tl.atomic_add(DONE, 1, sem="acq_rel") == SPLITS - 1
    tl.store(DONE, 0, mask=last)  # ready for the next launch
    return last


@triton.jit
def _places(X, at, ok, TILE: tl.constexpr, D: tl.constexpr):
    """Addresses of tile 0 or 1 of the vectors at these indices, one for each stride of X, and which
    of its numbers exist."""
    vector = at[0] * X[1]
    for i in tl.static_range(1, len(at)):
        vector += at[i] * X[i + 1]
    column = TILE * part(D, 0) + tl.arange(0, part(D, TILE))[None, :]
    there = ok[:, None]
    if TILE * part(D, 0) + part(D, TILE) > D:
        there = there & (column < D)
    return X[0] + vector.to(tl.int64)[:, None] * D + column, there


@triton.jit
def read(X, at, ok, D: tl.constexpr):
    """Vectors of X, a tensor with its strides (see in_vectors), at the indices `at`, of which one
    or more are (n,). Zeros where not ok (n,) and beyond d. Returns a tuple of tiles."""
    place, there = _places(X, at, ok, 0, D)
    x = (tl.load(place, mask=there, other=0.0),)
    if part(D, 1):
        place, there = _places(X, at, ok, 1, D)
        x += (tl.load(place, mask=there, other=0.0),)
    return x


@triton.jit
def write(X, at, ok, x, D: tl.constexpr):
    """The reverse of `read`, rounded to X's dtype."""
    place, there = _places(X, at, ok, 0, D)
    tl.store(place, x[0].to(X[0].dtype.element_ty), mask=there)
    if part(D, 1):
        place, there = _places(X, at, ok, 1, D)
        tl.store(place, x[1].to(X[0].dtype.element_ty), mask=there)


@triton.jit
def products(a, b):
    """All products of vectors, a b^T (rows of a, rows of b), in float32. ieee: float32 inputs are
    not cut to 19 bits."""
    x = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if len(a) > 1:
        x = tl.dot(a[1], tl.trans(b[1]), x, input_precision="ieee")
    return x


@triton.jit
def add(y, w, x):
    """y + w x: adds to each vector of y (m, d) those of x (n, d) by their weights w (m, n)."""
    w = w.to(x[0].dtype)
    total = (tl.dot(w, x[0], y[0], input_precision="ieee"),)
    if len(y) > 1:
        total += (tl.dot(w, x[1], y[1], input_precision="ieee"),)
    return total


@triton.jit
def zeros(N: tl.constexpr, D: tl.constexpr):
    """N vectors to add to, in float32."""
    y = (tl.zeros([N, part(D, 0)], tl.float32),)
    if part(D, 1):
        y += (tl.zeros([N, part(D, 1)], tl.float32),)
    return y


@triton.jit
def scaled(y, by):
    """Each vector of y (n, d) times its own factor (n,)."""
    x = (y[0] * by[:, None],)
    if len(y) > 1:
        x += (y[1] * by[:, None],)
    return x
