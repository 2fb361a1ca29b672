"""The Triton kernels: two forwards, one that computes the output of a forward again, one backward, and two small helpers of the backward.

They are in one file because they share the functions that the compiler inlines, and are read together.

With x_hat = u · rstd, rstd = (mean(u²) + eps)^(-1/2), wdy = w · dy and c1 = mean(x_hat · wdy), means taken over the N columns of a row:

    y  = w · x_hat
    du = (wdy - c1 · x_hat) · rstd
    dw = sum over rows of dy · x_hat

where u is x itself, or x + residual, or x · g with g = activation(gate); g may instead multiply y.

How a kernel covers its input. A tile is BLOCK_M rows of BLOCK_N columns. In the forward each program computes one tile, and the GPU hides
the latency of one tile's loads behind the work on others. In the backward a fixed number of programs P walk over the tiles: program p takes
every P-th tile, starting with the p-th, prefetches the next tiles (NUM_STAGES), and keeps its part of dw in registers until the end. Grid
axis 1 runs over groups of N columns, each with its own statistics and its own slice of the weight; most norms have one group. Rows longer
than a tile (N > BLOCK_N) are processed in blocks of columns: the forward reads such rows twice, and the backward takes c1 from a kernel of
its own and spreads the blocks over grid axis 2.

Tensors of rows may be strided. `sizes` and the tuples of strides describe their outer dimensions, outermost first, without the outermost
size; strides are counted in units of ROW_ALIGN elements, which tells the compiler how rows are aligned. An empty tuple of strides means
contiguous rows. What the kernels write is contiguous. Passing None for a pointer compiles out the code that uses it.

Results do not depend on what the compiler knows about M. The launches switch off the contraction of products and sums to fma, which the
compiler would otherwise decide from the surrounding code; where an fma is wanted, it is written.
"""

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Arithmetic:
    """What a kernel computes with each element, known at compile time. A dtype of None means no rounding at that step."""

    acc: tl.dtype  # of all arithmetic: fp32, or fp64 for fp64 input
    weight_offset: float = 0.0
    x_hat_dtype: tl.dtype | None = None
    rstd_dtype: tl.dtype | None = None
    residual_dtype: tl.dtype | None = None  # of x + residual
    product_dtype: tl.dtype | None = None  # of w · x_hat where a gate follows
    activation: str | None = None
    norm_before_gate: bool = True
    bf16_by_bits: bool = False  # for the interpreter, which truncates to bf16 where a GPU rounds to nearest even


@triton.jit
def _row_offsets(rows, sizes, strides, ROW_ALIGN: tl.constexpr, ROW_LENGTH: tl.constexpr):
    """Offset of the first element of each of `rows`, [BLOCK_M, 1], in 64 bits because M · N may exceed 2^31."""
    if len(strides) == 0:
        return (rows.to(tl.int64) * ROW_LENGTH)[:, None]
    else:
        offsets = tl.zeros_like(rows).to(tl.int64)
        for i in tl.static_range(len(sizes), 0, -1):
            offsets += (rows % sizes[i - 1]).to(tl.int64) * strides[i]
            rows = rows // sizes[i - 1]
        offsets += rows.to(tl.int64) * strides[0]
        return (offsets * ROW_ALIGN)[:, None]


@triton.jit
def _row_pointers(X, rows, sizes, strides, group_start, ROW_ALIGN: tl.constexpr, ROW_LENGTH: tl.constexpr):
    """Pointers to column `group_start` of each of `rows`, [BLOCK_M, 1]; None stays None."""
    if X is None:
        pointers = X
    else:
        pointers = X + (_row_offsets(rows, sizes, strides, ROW_ALIGN, ROW_LENGTH) + group_start)
    return pointers


@triton.jit
def _load(X_ROW, cols, mask, POLICY: tl.constexpr):
    """A tile [BLOCK_M, BLOCK_N] in its own dtype; None for None."""
    if X_ROW is None:
        x = X_ROW
    else:
        x = tl.load(X_ROW + cols[None, :], mask=mask, other=0.0, eviction_policy=POLICY)
    return x


@triton.jit
def _store(Y_ROW, cols, value, mask, POLICY: tl.constexpr):
    tl.store(Y_ROW + cols[None, :], value.to(Y_ROW.dtype.element_ty), mask=mask, cache_modifier=POLICY)


@triton.jit
def _load_weight(W, stride_w, cols, mask, ARITHMETIC: tl.constexpr):
    """Weight + offset as [1, BLOCK_N], or None. An fp64 weight stays fp64 and makes the product fp64, as torch promotes."""
    if W is None:
        w = W
    else:
        w = tl.load(W + cols.to(tl.int64) * stride_w, mask=mask, other=0.0)
        if W.dtype.element_ty != tl.float64:
            w = w.to(ARITHMETIC.acc)
        if ARITHMETIC.weight_offset != 0.0:
            w += ARITHMETIC.weight_offset
        w = w[None, :]
    return w


@triton.jit
def _round(value, DTYPE: tl.constexpr, ARITHMETIC: tl.constexpr):
    """`value` rounded to DTYPE and back."""
    if DTYPE is None:
        return value
    elif DTYPE == tl.bfloat16 and ARITHMETIC.bf16_by_bits:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(value == value, rounded, value).to(value.dtype)
    else:
        return value.to(DTYPE).to(value.dtype)


@triton.jit
def _fma(a, b, c):
    """a · b + c, rounded once, in the dtype of c."""
    return tl.fma(a.to(c.dtype), b.to(c.dtype), c)


@triton.jit
def _rsqrt(v):
    """v^(-1/2), in fp32 nearly exact, by a Newton step after the GPU's instruction, and also for subnormal v, for which that gives inf."""
    if v.dtype == tl.float32:
        tiny = v < 1.1754943508222875e-38
        v = tl.where(tiny, v * 16777216.0, v)
        r = tl.rsqrt(v)
        error = tl.fma(-v * r, r, 1.0)  # NaN where v is 0, infinite or NaN
        return tl.where(tl.abs(error) < 1.0, tl.fma(0.5 * r, error, r), r) * tl.where(tiny, 4096.0, 1.0)
    else:
        return tl.rsqrt(v)


@triton.jit
def _sigmoid(z):
    """1 / (1 + exp(-z)). In fp32 one Newton step makes the quotient nearly exact; a GPU's fast division is off by up to 2 ulp."""
    d = 1.0 + tl.exp(-z)
    if z.dtype == tl.float32:
        r = tl.rsqrt(d)
        s = r * r
        return tl.where(d < float("inf"), tl.fma(s, tl.fma(-d, s, 1.0), s), s)
    else:
        return 1.0 / d


@triton.jit
def _activate(z, ARITHMETIC: tl.constexpr):
    """g = activation(z) and its slope dg/dz. The compiler drops the one that is not used."""
    if ARITHMETIC.activation == "silu":
        s = _sigmoid(z)
        return z * s, s * (1.0 + z * (1.0 - s))
    elif ARITHMETIC.activation == "sigmoid":
        s = _sigmoid(z)
        return s, s * (1.0 - s)
    elif ARITHMETIC.activation == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return z * cdf, cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ARITHMETIC.activation == "gelu_tanh":
        t = 1.5957691216057308 * (z + 0.044715 * z * z * z)
        s = _sigmoid(t)
        rest = tl.where(t > 0.0, s * tl.exp(-t), 1.0 - s)  # 1 - s; where s is nearly 1, the subtraction would cancel most digits
        return z * s, s + z * s * rest * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:
        tl.static_assert(ARITHMETIC.activation == "relu")
        return tl.where(z <= 0.0, 0.0, z), tl.where(z <= 0.0, 0.0, 1.0).to(z.dtype)  # comparisons that let NaN pass, as torch's


@triton.jit
def _norm_input(x, residual, z, ARITHMETIC: tl.constexpr):
    """u [BLOCK_M, BLOCK_N]: x, or x + residual rounded as the residual stream stores it, or x · g."""
    u = x.to(ARITHMETIC.acc)
    if residual is not None:
        u = _round(u + residual.to(ARITHMETIC.acc), ARITHMETIC.residual_dtype, ARITHMETIC)
    if z is not None and not ARITHMETIC.norm_before_gate:
        u *= _activate(z.to(ARITHMETIC.acc), ARITHMETIC)[0]
    return u


@triton.jit
def _x_hat(u, rstd, ARITHMETIC: tl.constexpr):
    return _round(u * _round(rstd, ARITHMETIC.rstd_dtype, ARITHMETIC), ARITHMETIC.x_hat_dtype, ARITHMETIC)


@triton.jit
def _norm_output(u, rstd, w, z, ARITHMETIC: tl.constexpr):
    """y [BLOCK_M, BLOCK_N]: w · x_hat, or w · x_hat · g."""
    y = _x_hat(u, rstd, ARITHMETIC)
    if w is not None:
        y = y * w
    if z is not None and ARITHMETIC.norm_before_gate:
        y = _round(y, ARITHMETIC.product_dtype, ARITHMETIC) * _activate(z.to(ARITHMETIC.acc), ARITHMETIC)[0]
    return y


# Arguments that depend on the batch. They are not specialized, so one compiled kernel serves any number of rows.
_STRIDES = ["x_strides", "residual_strides", "gate_strides", "dy_strides", "dresidual_out_strides"]
_OF_BATCH = ["M", "programs", "sizes", *_STRIDES]
_jit = triton.jit(do_not_specialize=_OF_BATCH, do_not_specialize_on_alignment=_OF_BATCH)


@_jit
def _rms_norm_fwd_kernel(
    X,  # [M, GROUPS · N], strided
    W,  # [GROUPS · N], strided, or None
    RESIDUAL,  # as X, or None
    GATE,  # as X, or None
    Y,  # [M, GROUPS · N]
    RSTD,  # [M, GROUPS], or None
    RESIDUAL_OUT,  # [M, GROUPS · N], or None
    M: tl.int32,
    sizes,
    x_strides,
    residual_strides,
    gate_strides,
    stride_w,
    eps: tl.float64,  # fp64 so that no digits are lost at launch; converted to the accumulator dtype below
    ARITHMETIC: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,  # load the weight before the row's sum instead of after it
    LOAD_POLICY: tl.constexpr,
    STORE_POLICY: tl.constexpr,
):
    """Rows that fit a tile: each is read once, and u stays in registers between the sum and the product."""
    group = tl.program_id(1)
    group_start = group * N
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    x_row = _row_pointers(X, rows, sizes, x_strides, group_start, ROW_ALIGN, GROUPS * N)
    residual_row = _row_pointers(RESIDUAL, rows, sizes, residual_strides, group_start, ROW_ALIGN, GROUPS * N)
    gate_row = _row_pointers(GATE, rows, sizes, gate_strides, group_start, ROW_ALIGN, GROUPS * N)
    out_row = _row_offsets(rows, sizes, (), ROW_ALIGN, GROUPS * N) + group_start

    if WEIGHT_FIRST:
        w = _load_weight(W, stride_w, group_start + cols, cols < N, ARITHMETIC)
    z = _load(gate_row, cols, mask, LOAD_POLICY)  # [BLOCK_M, BLOCK_N], like all that follow
    u = _norm_input(_load(x_row, cols, mask, LOAD_POLICY), _load(residual_row, cols, mask, LOAD_POLICY), z, ARITHMETIC)
    rstd = _rsqrt(tl.sum(u * u, axis=1) / N + tl.full([], eps, ARITHMETIC.acc))  # [BLOCK_M]
    if not WEIGHT_FIRST:
        w = _load_weight(W, stride_w, group_start + cols, cols < N, ARITHMETIC)
    y = _norm_output(u, rstd[:, None], w, z, ARITHMETIC)

    if RSTD is not None:
        tl.store(RSTD + rows.to(tl.int64) * GROUPS + group, rstd, mask=rows < M)
    if RESIDUAL_OUT is not None:
        _store(RESIDUAL_OUT + out_row, cols, u, mask, STORE_POLICY)
    _store(Y + out_row, cols, y, mask, STORE_POLICY)


@_jit
def _rms_norm_fwd_blocked_kernel(
    X,
    W,
    RESIDUAL,
    GATE,
    Y,
    RSTD,
    RESIDUAL_OUT,
    M: tl.int32,
    sizes,
    x_strides,
    residual_strides,
    gate_strides,
    stride_w,
    eps: tl.float64,
    ARITHMETIC: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    LOAD_POLICY: tl.constexpr,
    STORE_POLICY: tl.constexpr,
):
    """Rows longer than a tile, in blocks of columns: read once for the sum and again for the product. Arguments as above."""
    group = tl.program_id(1)
    group_start = group * N
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_row = _row_pointers(X, rows, sizes, x_strides, group_start, ROW_ALIGN, GROUPS * N)
    residual_row = _row_pointers(RESIDUAL, rows, sizes, residual_strides, group_start, ROW_ALIGN, GROUPS * N)
    gate_row = _row_pointers(GATE, rows, sizes, gate_strides, group_start, ROW_ALIGN, GROUPS * N)
    out_row = _row_offsets(rows, sizes, (), ROW_ALIGN, GROUPS * N) + group_start

    squares = tl.zeros([BLOCK_M, BLOCK_N], ARITHMETIC.acc)
    for start in tl.range(0, N, BLOCK_N, num_stages=NUM_STAGES):
        cols = start + tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        z = None
        if not ARITHMETIC.norm_before_gate:
            z = _load(gate_row, cols, mask, LOAD_POLICY)
        u = _norm_input(_load(x_row, cols, mask, LOAD_POLICY), _load(residual_row, cols, mask, LOAD_POLICY), z, ARITHMETIC)
        squares = _fma(u, u, squares)
    rstd = _rsqrt(tl.sum(squares, axis=1) / N + tl.full([], eps, ARITHMETIC.acc))
    if RSTD is not None:
        tl.store(RSTD + rows.to(tl.int64) * GROUPS + group, rstd, mask=rows < M)

    for start in tl.range(0, N, BLOCK_N, num_stages=NUM_STAGES):
        cols = start + tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        z = _load(gate_row, cols, mask, LOAD_POLICY)
        u = _norm_input(_load(x_row, cols, mask, LOAD_POLICY), _load(residual_row, cols, mask, LOAD_POLICY), z, ARITHMETIC)
        w = _load_weight(W, stride_w, group_start + cols, cols < N, ARITHMETIC)
        y = _norm_output(u, rstd[:, None], w, z, ARITHMETIC)
        if RESIDUAL_OUT is not None:
            _store(RESIDUAL_OUT + out_row, cols, u, mask, STORE_POLICY)
        _store(Y + out_row, cols, y, mask, STORE_POLICY)


@_jit
def _rms_norm_output_kernel(
    X,  # [M, GROUPS · N], strided: what was normalized, x or x + residual
    W,
    GATE,
    RSTD,
    Y,
    M: tl.int32,
    sizes,
    x_strides,
    gate_strides,
    stride_w,
    ARITHMETIC: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOAD_POLICY: tl.constexpr,
    STORE_POLICY: tl.constexpr,
):
    """y of a forward again, from its rstd. There is no sum, so the bits of y do not depend on the tile. Arguments as above."""
    group = tl.program_id(1)
    group_start = group * N
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    x_row = _row_pointers(X, rows, sizes, x_strides, group_start, ROW_ALIGN, GROUPS * N)
    gate_row = _row_pointers(GATE, rows, sizes, gate_strides, group_start, ROW_ALIGN, GROUPS * N)
    out_row = _row_offsets(rows, sizes, (), ROW_ALIGN, GROUPS * N) + group_start

    z = _load(gate_row, cols, mask, LOAD_POLICY)
    u = _norm_input(_load(x_row, cols, mask, LOAD_POLICY), None, z, ARITHMETIC)
    rstd = tl.load(RSTD + rows.to(tl.int64) * GROUPS + group, mask=rows < M, other=0.0)
    w = _load_weight(W, stride_w, group_start + cols, cols < N, ARITHMETIC)
    _store(Y + out_row, cols, _norm_output(u, rstd[:, None], w, z, ARITHMETIC), mask, STORE_POLICY)


@_jit
def _rms_norm_bwd_kernel(
    DY,  # [M, GROUPS · N], strided
    DRESIDUAL_OUT,  # as DY, or None
    X,  # as DY: what was normalized, x or x + residual
    W,  # [GROUPS · N], strided, or None
    GATE,  # as DY, or None
    RSTD,  # [M, GROUPS]
    C1,  # [M, GROUPS], or None where a row fits a tile
    DX,  # [M, GROUPS · N], or None
    DW_PARTIAL,  # [programs, GROUPS · N], or None
    DRESIDUAL,  # as DX, or None; also None where DX has its dtype and serves for both
    DGATE,  # as DX, or None
    M: tl.int32,
    sizes,
    dy_strides,
    dresidual_out_strides,
    x_strides,
    gate_strides,
    stride_w,
    ARITHMETIC: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,  # keep the weight in registers instead of loading it again for each tile
    LOAD_POLICY: tl.constexpr,
    STORE_POLICY: tl.constexpr,
):
    GATE_FIRST: tl.constexpr = GATE is not None and not ARITHMETIC.norm_before_gate
    GATE_LAST: tl.constexpr = GATE is not None and ARITHMETIC.norm_before_gate
    NEEDS_DU: tl.constexpr = DX is not None or DRESIDUAL is not None or (GATE_FIRST and DGATE is not None)
    group = tl.program_id(1)
    group_start = group * N
    cols = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    if WEIGHT_FIRST:
        held_w = _load_weight(W, stride_w, group_start + cols, cols < N, ARITHMETIC)  # [1, BLOCK_N]
    if DW_PARTIAL is not None:
        dw = tl.zeros([BLOCK_M, BLOCK_N], DW_PARTIAL.dtype.element_ty)

    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        row_stats = rows.to(tl.int64) * GROUPS + group  # offsets into RSTD and C1
        out_row = _row_offsets(rows, sizes, (), ROW_ALIGN, GROUPS * N) + group_start
        x_row = _row_pointers(X, rows, sizes, x_strides, group_start, ROW_ALIGN, GROUPS * N)
        dy_row = _row_pointers(DY, rows, sizes, dy_strides, group_start, ROW_ALIGN, GROUPS * N)

        if WEIGHT_FIRST:
            w = held_w
        else:
            w = _load_weight(W, stride_w, group_start + cols, cols < N, ARITHMETIC)
        x = _load(x_row, cols, mask, LOAD_POLICY).to(ARITHMETIC.acc)
        dy = _load(dy_row, cols, mask, LOAD_POLICY).to(ARITHMETIC.acc)
        rstd = tl.load(RSTD + row_stats, mask=rows < M, other=0.0)[:, None]
        u = x
        dproduct = dy  # gradient of w · x_hat
        if GATE is not None:
            gate_row = _row_pointers(GATE, rows, sizes, gate_strides, group_start, ROW_ALIGN, GROUPS * N)
            gate, gate_slope = _activate(_load(gate_row, cols, mask, LOAD_POLICY).to(ARITHMETIC.acc), ARITHMETIC)
            if GATE_FIRST:
                u = x * gate
            else:
                dproduct = dy * gate
        x_hat = _x_hat(u, rstd, ARITHMETIC)

        if DW_PARTIAL is not None:
            dw = _fma(dproduct, x_hat, dw)
        if NEEDS_DU:
            wdy = dproduct
            if w is not None:
                wdy = dproduct * w
            if C1 is not None:
                c1 = tl.load(C1 + row_stats, mask=rows < M, other=0.0)
            else:
                c1 = tl.sum(x_hat * wdy, axis=1) / N
            du = _fma(x_hat, -c1[:, None], wdy) * rstd
            if DRESIDUAL_OUT is not None:
                dresidual_out_row = _row_pointers(DRESIDUAL_OUT, rows, sizes, dresidual_out_strides, group_start, ROW_ALIGN, GROUPS * N)
                du += _load(dresidual_out_row, cols, mask, LOAD_POLICY).to(ARITHMETIC.acc)
            if DRESIDUAL is not None:
                _store(DRESIDUAL + out_row, cols, du, mask, STORE_POLICY)
            if GATE_FIRST:
                if DGATE is not None:
                    _store(DGATE + out_row, cols, du * x * gate_slope, mask, STORE_POLICY)
                du *= gate
            if DX is not None:
                _store(DX + out_row, cols, du, mask, STORE_POLICY)
        if GATE_LAST and DGATE is not None:
            product = x_hat
            if w is not None:
                product = x_hat * w
            dgate = dy * _round(product, ARITHMETIC.product_dtype, ARITHMETIC) * gate_slope
            _store(DGATE + out_row, cols, dgate, mask, STORE_POLICY)

    if DW_PARTIAL is not None:
        partial = DW_PARTIAL + tl.program_id(0).to(tl.int64) * (GROUPS * N) + group_start
        tl.store(partial + cols, tl.sum(dw, axis=0), mask=cols < N)


@_jit
def _rms_norm_bwd_c1_kernel(
    DY,
    X,
    W,
    GATE,
    RSTD,
    C1,
    M: tl.int32,
    sizes,
    dy_strides,
    x_strides,
    gate_strides,
    stride_w,
    ARITHMETIC: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOAD_POLICY: tl.constexpr,
):
    """c1 of rows longer than a tile, one tile per program; arguments as in _rms_norm_bwd_kernel."""
    group = tl.program_id(1)
    group_start = group * N
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_stats = rows.to(tl.int64) * GROUPS + group
    x_row = _row_pointers(X, rows, sizes, x_strides, group_start, ROW_ALIGN, GROUPS * N)
    dy_row = _row_pointers(DY, rows, sizes, dy_strides, group_start, ROW_ALIGN, GROUPS * N)
    gate_row = _row_pointers(GATE, rows, sizes, gate_strides, group_start, ROW_ALIGN, GROUPS * N)
    rstd = tl.load(RSTD + row_stats, mask=rows < M, other=0.0)[:, None]

    products = tl.zeros([BLOCK_M, BLOCK_N], C1.dtype.element_ty)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        u = _load(x_row, cols, mask, LOAD_POLICY).to(ARITHMETIC.acc)
        wdy = _load(dy_row, cols, mask, LOAD_POLICY).to(ARITHMETIC.acc)
        if GATE is not None:
            gate, _ = _activate(_load(gate_row, cols, mask, LOAD_POLICY).to(ARITHMETIC.acc), ARITHMETIC)
            if ARITHMETIC.norm_before_gate:
                wdy *= gate
            else:
                u *= gate
        if W is not None:
            wdy *= _load_weight(W, stride_w, group_start + cols, cols < N, ARITHMETIC)
        products = _fma(_x_hat(u, rstd, ARITHMETIC), wdy, products)
    tl.store(C1 + row_stats, tl.sum(products, axis=1) / N, mask=rows < M)


@_jit
def _sum_partials_kernel(DW_PARTIAL, DW, programs: tl.int32, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dw [COLS]: the sum over programs of DW_PARTIAL [programs, COLS], cast to the dtype of the weight."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dw = tl.zeros([BLOCK_M, BLOCK_N], DW_PARTIAL.dtype.element_ty)
    for start in tl.range(0, programs, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < programs)[:, None] & (cols < COLS)[None, :]
        dw += tl.load(DW_PARTIAL + rows.to(tl.int64)[:, None] * COLS + cols[None, :], mask=mask, other=0.0)
    tl.store(DW + cols, tl.sum(dw, axis=0).to(DW.dtype.element_ty), mask=cols < COLS)
