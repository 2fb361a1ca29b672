"""The Triton kernels: one forward, one backward, and two small helpers of the backward.

With x_hat = x · rstd, rstd = (mean(x²) + eps)^(-1/2), wdy = w · dy and c1 = mean(x_hat · wdy), means taken over the N columns of a row:

    y  = w · x_hat
    dx = (wdy - c1 · x_hat) · rstd
    dw = sum over rows of dy · x_hat

How a kernel covers its input. Programs are persistent: each loads the weight once, then walks over tiles of BLOCK_M rows, as many tiles
apart as there are programs, while the loads of the next tiles are under way (NUM_STAGES). Grid axis 1 runs over groups: N columns each,
with statistics and a slice of the weight of their own; most norms have one group. Where a row fits no tile (BLOCK_N < N), the forward
walks over the row twice, and the backward takes c1 from a kernel of its own and spreads blocks of columns over grid axis 2.

Rows are found through `sizes` and `strides`, tuples with the outermost dimension first (its size is not needed), so that any strided view
is read in place; strides are counted in units of ROW_ALIGN elements, which is how the compiler learns the alignment of a row. What the
kernels write is contiguous. A pointer that is None switches off what would need it. Arithmetic is in ACC: fp32, or fp64 for fp64 input.
"""

import triton
import triton.language as tl


@triton.jit
def _row_offsets(rows, sizes, strides, ROW_ALIGN: tl.constexpr):
    """Offset of the first element of each of `rows` [BLOCK_M], in 64 bits because M · N may exceed 2^31."""
    offsets = tl.zeros_like(rows).to(tl.int64)
    for i in tl.static_range(len(sizes)):
        dim: tl.constexpr = len(sizes) - 1 - i
        offsets += (rows % sizes[dim]).to(tl.int64) * strides[dim + 1]
        rows = rows // sizes[dim]
    offsets += rows.to(tl.int64) * strides[0]
    return offsets * ROW_ALIGN


@triton.jit
def _round_to(value, DTYPE: tl.constexpr, BF16_BY_BITS: tl.constexpr):
    """`value` rounded to DTYPE and back; to bf16 by bits for the interpreter, which truncates where a GPU rounds to nearest even."""
    if DTYPE == tl.bfloat16 and BF16_BY_BITS:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(value == value, rounded, value)
    else:
        return value.to(DTYPE).to(value.dtype)


@triton.jit
def _load_weight(W, stride_w, first, cols, N: tl.constexpr, ACC: tl.constexpr, WEIGHT_OFFSET: tl.constexpr):
    """WEIGHT_OFFSET + the weight of columns `first` + `cols` as [1, BLOCK_N] in ACC (an fp64 weight makes the product fp64), or None."""
    if W is None:
        return None
    else:
        w = tl.load(W + (first + cols).to(tl.int64) * stride_w, mask=cols < N, other=0.0)
        if W.dtype.element_ty != tl.float64:
            w = w.to(ACC)
        if WEIGHT_OFFSET != 0.0:
            w += WEIGHT_OFFSET
        return w[None, :]


@triton.jit
def _normalize(x, rstd, X_HAT_DTYPE: tl.constexpr, RSTD_DTYPE: tl.constexpr, BF16_BY_BITS: tl.constexpr):
    """x_hat = x · rstd, with rstd and x_hat rounded to the dtypes given, if any."""
    if RSTD_DTYPE is not None:
        rstd = _round_to(rstd, RSTD_DTYPE, BF16_BY_BITS)
    x_hat = x * rstd
    if X_HAT_DTYPE is not None:
        x_hat = _round_to(x_hat, X_HAT_DTYPE, BF16_BY_BITS)
    return x_hat


@triton.jit
def _store_y(Y, x, rstd, w, mask, X_HAT_DTYPE: tl.constexpr, RSTD_DTYPE: tl.constexpr, BF16_BY_BITS: tl.constexpr):
    y = _normalize(x, rstd[:, None], X_HAT_DTYPE, RSTD_DTYPE, BF16_BY_BITS)
    if w is not None:
        y = y * w
    tl.store(Y, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_fwd_kernel(
    X,  # [M, groups · N], strided
    W,  # [groups · N], strided, or None
    Y,  # [M, groups · N]
    RSTD,  # [M, groups], or None
    M,
    sizes,
    x_strides,
    stride_w,
    eps: tl.float64,  # annotated so that all of it arrives; used in ACC
    N: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    X_HAT_DTYPE: tl.constexpr,
    RSTD_DTYPE: tl.constexpr,
    BF16_BY_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    X += group * N
    Y += group * N
    cols = tl.arange(0, BLOCK_N)
    w = _load_weight(W, stride_w, group * N, cols, N, ACC, WEIGHT_OFFSET)
    eps = tl.full([], eps, ACC)

    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = (rows < M)[:, None]
        x_rows = X + _row_offsets(rows, sizes, x_strides, ROW_ALIGN)[:, None]
        y_rows = Y + (rows.to(tl.int64) * (groups * N))[:, None]

        if BLOCK_N >= N:
            mask = row_mask & (cols < N)[None, :]
            x = tl.load(x_rows + cols[None, :], mask=mask, other=0.0).to(ACC)  # [BLOCK_M, BLOCK_N]
            sum_of_squares = tl.sum(x * x, axis=1)
        else:
            squares = tl.zeros([BLOCK_M, BLOCK_N], ACC)
            for start in tl.range(0, N, BLOCK_N):
                block = start + cols
                mask = row_mask & (block < N)[None, :]
                x = tl.load(x_rows + block[None, :], mask=mask, other=0.0).to(ACC)
                squares += x * x
            sum_of_squares = tl.sum(squares, axis=1)

        rstd = tl.rsqrt(sum_of_squares / N + eps)
        if RSTD is not None:
            tl.store(RSTD + rows.to(tl.int64) * groups + group, rstd, mask=rows < M)

        if BLOCK_N >= N:
            _store_y(y_rows + cols[None, :], x, rstd, w, mask, X_HAT_DTYPE, RSTD_DTYPE, BF16_BY_BITS)
        else:
            for start in tl.range(0, N, BLOCK_N):
                block = start + cols
                mask = row_mask & (block < N)[None, :]
                x = tl.load(x_rows + block[None, :], mask=mask, other=0.0).to(ACC)
                w = _load_weight(W, stride_w, group * N, block, N, ACC, WEIGHT_OFFSET)
                _store_y(y_rows + block[None, :], x, rstd, w, mask, X_HAT_DTYPE, RSTD_DTYPE, BF16_BY_BITS)


@triton.jit
def _rms_norm_bwd_kernel(
    DY,  # [M, groups · N], strided
    X,  # [M, groups · N], strided
    W,  # [groups · N], strided, or None
    RSTD,  # [M, groups]
    C1,  # [M, groups], or None where a row fits a tile
    DX,  # [M, groups · N], or None
    DW_PARTIAL,  # [programs, groups · N], or None
    M,
    sizes,
    dy_strides,
    x_strides,
    stride_w,
    N: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    X_HAT_DTYPE: tl.constexpr,
    RSTD_DTYPE: tl.constexpr,
    BF16_BY_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    cols = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    X += group * N
    DY += group * N
    if DX is not None:
        DX += group * N
        w = _load_weight(W, stride_w, group * N, cols, N, ACC, WEIGHT_OFFSET)
    if DW_PARTIAL is not None:
        dw = tl.zeros([BLOCK_M, BLOCK_N], DW_PARTIAL.dtype.element_ty)

    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        scalars = rows.to(tl.int64) * groups + group
        x_offsets = _row_offsets(rows, sizes, x_strides, ROW_ALIGN)[:, None] + cols[None, :]
        dy_offsets = _row_offsets(rows, sizes, dy_strides, ROW_ALIGN)[:, None] + cols[None, :]
        x = tl.load(X + x_offsets, mask=mask, other=0.0).to(ACC)  # [BLOCK_M, BLOCK_N]
        dy = tl.load(DY + dy_offsets, mask=mask, other=0.0).to(ACC)
        rstd = tl.load(RSTD + scalars, mask=rows < M, other=0.0)[:, None]
        x_hat = _normalize(x, rstd, X_HAT_DTYPE, RSTD_DTYPE, BF16_BY_BITS)

        if DW_PARTIAL is not None:
            dw += dy * x_hat
        if DX is not None:
            wdy = dy * w if W is not None else dy
            if C1 is not None:
                c1 = tl.load(C1 + scalars, mask=rows < M, other=0.0)
            else:
                c1 = tl.sum(x_hat * wdy, axis=1) / N
            dx = (wdy - x_hat * c1[:, None]) * rstd
            dx_offsets = (rows.to(tl.int64) * (groups * N))[:, None] + cols[None, :]
            tl.store(DX + dx_offsets, dx.to(DX.dtype.element_ty), mask=mask)

    if DW_PARTIAL is not None:
        partial = DW_PARTIAL + tl.program_id(0).to(tl.int64) * (groups * N) + group * N
        tl.store(partial + cols, tl.sum(dw, axis=0), mask=cols < N)


@triton.jit
def _rms_norm_bwd_c1_kernel(
    DY,
    X,
    W,
    RSTD,
    C1,
    M,
    sizes,
    dy_strides,
    x_strides,
    stride_w,
    N: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    X_HAT_DTYPE: tl.constexpr,
    RSTD_DTYPE: tl.constexpr,
    BF16_BY_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """c1 of rows that fit no tile; arguments as in _rms_norm_bwd_kernel."""
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    X += group * N
    DY += group * N
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    scalars = rows.to(tl.int64) * groups + group
    x_rows = X + _row_offsets(rows, sizes, x_strides, ROW_ALIGN)[:, None]
    dy_rows = DY + _row_offsets(rows, sizes, dy_strides, ROW_ALIGN)[:, None]
    rstd = tl.load(RSTD + scalars, mask=rows < M, other=0.0)[:, None]
    products = tl.zeros([BLOCK_M, BLOCK_N], C1.dtype.element_ty)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        x = tl.load(x_rows + cols[None, :], mask=mask, other=0.0).to(ACC)
        dy = tl.load(dy_rows + cols[None, :], mask=mask, other=0.0).to(ACC)
        w = _load_weight(W, stride_w, group * N, cols, N, ACC, WEIGHT_OFFSET)
        wdy = dy * w if W is not None else dy
        products += _normalize(x, rstd, X_HAT_DTYPE, RSTD_DTYPE, BF16_BY_BITS) * wdy
    tl.store(C1 + scalars, tl.sum(products, axis=1) / N, mask=rows < M)


@triton.jit
def _sum_partials_kernel(DW_PARTIAL, DW, programs, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dw [COLS] = sum over programs of DW_PARTIAL [programs, COLS], cast to the dtype of the weight."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dw = tl.zeros([BLOCK_M, BLOCK_N], DW_PARTIAL.dtype.element_ty)
    for start in tl.range(0, programs, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < programs)[:, None] & (cols < COLS)[None, :]
        dw += tl.load(DW_PARTIAL + rows.to(tl.int64)[:, None] * COLS + cols[None, :], mask=mask, other=0.0)
    tl.store(DW + cols, tl.sum(dw, axis=0).to(DW.dtype.element_ty), mask=cols < COLS)
