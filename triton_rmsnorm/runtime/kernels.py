"""The Triton kernels: one forward, one backward, and two small helpers of the backward.

With x_hat = u · rstd, rstd = (mean(u²) + eps)^(-1/2), wdy = w · dy and c1 = mean(x_hat · wdy), means taken over the N columns of a row:

    y  = w · x_hat
    du = (wdy - c1 · x_hat) · rstd
    dw = sum over rows of dy · x_hat

where u is x itself, or x + residual, or x · g with g = activation(gate); g may instead multiply y.

How a kernel covers its input. Programs are persistent: each loads the weight once, then walks over tiles of BLOCK_M rows, as many tiles
apart as there are programs, while the loads of the next tiles are under way (NUM_STAGES). Grid axis 1 runs over groups: N columns each,
with statistics and a slice of the weight of their own; most norms have one group. Where a row fits no tile (BLOCK_N < N), the forward
walks over the row twice, and the backward takes c1 from a kernel of its own and spreads blocks of columns over grid axis 2.

Rows are found through `sizes` and `strides`, tuples with the outermost dimension first (its size is not needed), so that any strided view
is read in place; strides are counted in units of ROW_ALIGN elements, which is how the compiler learns the alignment of a row. What the
kernels write is contiguous. A pointer that is None switches off what would need it.
"""

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Steps:
    """What a kernel does with each element, known when it is compiled. A dtype that is None stands for no rounding at that step."""

    acc: tl.dtype  # of all arithmetic: fp32, or fp64 for fp64 input
    weight_offset: float = 0.0
    x_hat_dtype: tl.dtype | None = None
    rstd_dtype: tl.dtype | None = None
    residual_dtype: tl.dtype | None = None  # of x + residual
    product_dtype: tl.dtype | None = None  # of w · x_hat where a gate follows
    activation: str | None = None
    norm_before_gate: bool = True
    bf16_by_bits: bool = False  # the interpreter truncates to bf16 where a GPU rounds to nearest even
    load_policy: str = ""  # eviction policy of loads of rows
    store_policy: str = ""  # cache modifier of stores of rows


@triton.jit
def _row_offsets(rows, sizes, strides, ROW_ALIGN: tl.constexpr):
    """Offset of the first element of each of `rows`, [BLOCK_M, 1], in 64 bits because M · N may exceed 2^31."""
    offsets = tl.zeros_like(rows).to(tl.int64)
    for i in tl.static_range(len(sizes), 0, -1):
        offsets += (rows % sizes[i - 1]).to(tl.int64) * strides[i]
        rows = rows // sizes[i - 1]
    offsets += rows.to(tl.int64) * strides[0]
    return (offsets * ROW_ALIGN)[:, None]


@triton.jit
def _load(ROW, cols, mask, STEPS: tl.constexpr):
    return tl.load(ROW + cols[None, :], mask=mask, other=0.0, eviction_policy=STEPS.load_policy).to(STEPS.acc)


@triton.jit
def _store(ROW, cols, value, mask, STEPS: tl.constexpr):
    tl.store(ROW + cols[None, :], value.to(ROW.dtype.element_ty), mask=mask, cache_modifier=STEPS.store_policy)


@triton.jit
def _load_weight(W, stride_w, cols, mask, STEPS: tl.constexpr):
    """Weight + offset as [1, BLOCK_N]; an fp64 weight stays fp64 and makes the product fp64, as torch promotes."""
    w = tl.load(W + cols.to(tl.int64) * stride_w, mask=mask, other=0.0)
    if W.dtype.element_ty != tl.float64:
        w = w.to(STEPS.acc)
    if STEPS.weight_offset != 0.0:
        w += STEPS.weight_offset
    return w[None, :]


@triton.jit
def _round(value, DTYPE: tl.constexpr, STEPS: tl.constexpr):
    """`value` rounded to DTYPE and back."""
    if DTYPE is None:
        return value
    elif DTYPE == tl.bfloat16 and STEPS.bf16_by_bits:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(value == value, rounded, value).to(value.dtype)
    else:
        return value.to(DTYPE).to(value.dtype)


@triton.jit
def _activate(z, STEPS: tl.constexpr):
    """g = activation(z) and dg/dz; the compiler drops what is not used of the two."""
    if STEPS.activation == "silu":
        s = tl.sigmoid(z)
        return z * s, s * (1.0 + z * (1.0 - s))
    elif STEPS.activation == "sigmoid":
        s = tl.sigmoid(z)
        return s, s * (1.0 - s)
    elif STEPS.activation == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return z * cdf, cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif STEPS.activation == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return z * s, s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:
        tl.static_assert(STEPS.activation == "relu")
        return tl.maximum(z, 0.0), tl.where(z > 0.0, 1.0, 0.0).to(z.dtype)


@triton.jit
def _norm_input(X, RESIDUAL, GATE, cols, mask, STEPS: tl.constexpr):
    """u [BLOCK_M, BLOCK_N]: x, or x + residual as the residual stream holds it, or x · g."""
    u = _load(X, cols, mask, STEPS)
    if RESIDUAL is not None:
        u = _round(u + _load(RESIDUAL, cols, mask, STEPS), STEPS.residual_dtype, STEPS)
    if GATE is not None and not STEPS.norm_before_gate:
        u *= _activate(_load(GATE, cols, mask, STEPS), STEPS)[0]
    return u


@triton.jit
def _x_hat(u, rstd, STEPS: tl.constexpr):
    return _round(u * _round(rstd, STEPS.rstd_dtype, STEPS), STEPS.x_hat_dtype, STEPS)


@triton.jit
def _norm_output(u, rstd, w, GATE, cols, mask, STEPS: tl.constexpr):
    """y [BLOCK_M, BLOCK_N]: w · x_hat, or w · x_hat · g."""
    y = _x_hat(u, rstd, STEPS)
    if w is not None:
        y = y * w
    if GATE is not None and STEPS.norm_before_gate:
        y = _round(y, STEPS.product_dtype, STEPS) * _activate(_load(GATE, cols, mask, STEPS), STEPS)[0]
    return y


@triton.jit
def _rms_norm_fwd_kernel(
    X,  # [M, groups · N], strided
    W,  # [groups · N], strided, or None
    RESIDUAL,  # [M, groups · N], strided, or None
    GATE,  # [M, groups · N], strided, or None
    Y,  # [M, groups · N]
    RSTD,  # [M, groups], or None
    RESIDUAL_OUT,  # [M, groups · N], or None
    M,
    sizes,
    x_strides,
    residual_strides,
    gate_strides,
    stride_w,
    eps: tl.float64,  # annotated so that all of it arrives; used in acc
    STEPS: tl.constexpr,
    N: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    first = group * N
    cols = tl.arange(0, BLOCK_N)
    eps = tl.full([], eps, STEPS.acc)
    w = None
    if BLOCK_N >= N and W is not None:
        w = _load_weight(W, stride_w, first + cols, cols < N, STEPS)

    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = (rows < M)[:, None]
        out_row = (rows.to(tl.int64) * (groups * N))[:, None] + first
        x_row = X + _row_offsets(rows, sizes, x_strides, ROW_ALIGN) + first
        y_row = Y + out_row
        residual_row = None
        gate_row = None
        if RESIDUAL is not None:
            residual_row = RESIDUAL + _row_offsets(rows, sizes, residual_strides, ROW_ALIGN) + first
        if GATE is not None:
            gate_row = GATE + _row_offsets(rows, sizes, gate_strides, ROW_ALIGN) + first

        if BLOCK_N >= N:
            mask = in_rows & (cols < N)[None, :]
            u = _norm_input(x_row, residual_row, gate_row, cols, mask, STEPS)
            sum_of_squares = tl.sum(u * u, axis=1)
        else:
            squares = tl.zeros([BLOCK_M, BLOCK_N], STEPS.acc)
            for start in tl.range(0, N, BLOCK_N, num_stages=NUM_STAGES):
                block = start + cols
                u = _norm_input(x_row, residual_row, gate_row, block, in_rows & (block < N)[None, :], STEPS)
                squares += u * u
            sum_of_squares = tl.sum(squares, axis=1)

        rstd = tl.rsqrt(sum_of_squares / N + eps)
        if RSTD is not None:
            tl.store(RSTD + rows.to(tl.int64) * groups + group, rstd, mask=rows < M)

        if BLOCK_N >= N:
            if RESIDUAL_OUT is not None:
                _store(RESIDUAL_OUT + out_row, cols, u, mask, STEPS)
            _store(y_row, cols, _norm_output(u, rstd[:, None], w, gate_row, cols, mask, STEPS), mask, STEPS)
        else:
            for start in tl.range(0, N, BLOCK_N, num_stages=NUM_STAGES):
                block = start + cols
                mask = in_rows & (block < N)[None, :]
                u = _norm_input(x_row, residual_row, gate_row, block, mask, STEPS)
                if RESIDUAL_OUT is not None:
                    _store(RESIDUAL_OUT + out_row, block, u, mask, STEPS)
                w_block = None
                if W is not None:
                    w_block = _load_weight(W, stride_w, first + block, block < N, STEPS)
                _store(y_row, block, _norm_output(u, rstd[:, None], w_block, gate_row, block, mask, STEPS), mask, STEPS)


@triton.jit
def _rms_norm_bwd_kernel(
    DY,  # [M, groups · N], strided
    DRESIDUAL_OUT,  # the same, or None
    X,  # [M, groups · N], strided: x, or x + residual
    W,  # [groups · N], strided, or None
    GATE,  # [M, groups · N], strided, or None
    RSTD,  # [M, groups]
    C1,  # [M, groups], or None where a row fits a tile
    DX,  # [M, groups · N], or None
    DW_PARTIAL,  # [programs, groups · N], or None
    DRESIDUAL,  # [M, groups · N], or None where DX has its dtype and serves for both
    DGATE,  # [M, groups · N], or None
    M,
    sizes,
    dy_strides,
    dresidual_out_strides,
    x_strides,
    gate_strides,
    stride_w,
    STEPS: tl.constexpr,
    N: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    GATE_FIRST: tl.constexpr = GATE is not None and not STEPS.norm_before_gate
    GATE_LAST: tl.constexpr = GATE is not None and STEPS.norm_before_gate
    NEEDS_DU: tl.constexpr = DX is not None or DRESIDUAL is not None or (GATE_FIRST and DGATE is not None)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    first = group * N
    cols = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    w = None
    if W is not None:
        w = _load_weight(W, stride_w, first + cols, cols < N, STEPS)
    if DW_PARTIAL is not None:
        dw = tl.zeros([BLOCK_M, BLOCK_N], DW_PARTIAL.dtype.element_ty)

    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        scalars = rows.to(tl.int64) * groups + group
        out_row = (rows.to(tl.int64) * (groups * N))[:, None] + first

        x = _load(X + _row_offsets(rows, sizes, x_strides, ROW_ALIGN) + first, cols, mask, STEPS)
        dy = _load(DY + _row_offsets(rows, sizes, dy_strides, ROW_ALIGN) + first, cols, mask, STEPS)
        rstd = tl.load(RSTD + scalars, mask=rows < M, other=0.0)[:, None]
        u = x
        if GATE is not None:
            z = _load(GATE + _row_offsets(rows, sizes, gate_strides, ROW_ALIGN) + first, cols, mask, STEPS)
            g, dg = _activate(z, STEPS)
        if GATE_FIRST:
            u = x * g
            dg *= x
        x_hat = _x_hat(u, rstd, STEPS)
        if GATE_LAST:
            dg *= dy
            dy *= g

        if DW_PARTIAL is not None:
            dw += dy * x_hat
        if NEEDS_DU:
            wdy = dy if w is None else dy * w
            if C1 is not None:
                c1 = tl.load(C1 + scalars, mask=rows < M, other=0.0)
            else:
                c1 = tl.sum(x_hat * wdy, axis=1) / N
            du = (wdy - x_hat * c1[:, None]) * rstd
            if DRESIDUAL_OUT is not None:
                du += _load(DRESIDUAL_OUT + _row_offsets(rows, sizes, dresidual_out_strides, ROW_ALIGN) + first, cols, mask, STEPS)
            if DRESIDUAL is not None:
                _store(DRESIDUAL + out_row, cols, du, mask, STEPS)
            if GATE_FIRST:
                if DGATE is not None:
                    _store(DGATE + out_row, cols, du * dg, mask, STEPS)
                du *= g
            if DX is not None:
                _store(DX + out_row, cols, du, mask, STEPS)
        if GATE_LAST and DGATE is not None:
            product = x_hat if w is None else x_hat * w
            _store(DGATE + out_row, cols, dg * _round(product, STEPS.product_dtype, STEPS), mask, STEPS)

    if DW_PARTIAL is not None:
        partial = DW_PARTIAL + tl.program_id(0).to(tl.int64) * (groups * N) + first
        tl.store(partial + cols, tl.sum(dw, axis=0), mask=cols < N)


@triton.jit
def _rms_norm_bwd_c1_kernel(
    DY,
    X,
    W,
    GATE,
    RSTD,
    C1,
    M,
    sizes,
    dy_strides,
    x_strides,
    gate_strides,
    stride_w,
    STEPS: tl.constexpr,
    N: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """c1 of rows that fit no tile, one tile a program; arguments as in _rms_norm_bwd_kernel."""
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    first = group * N
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    scalars = rows.to(tl.int64) * groups + group
    x_row = X + _row_offsets(rows, sizes, x_strides, ROW_ALIGN) + first
    dy_row = DY + _row_offsets(rows, sizes, dy_strides, ROW_ALIGN) + first
    if GATE is not None:
        gate_row = GATE + _row_offsets(rows, sizes, gate_strides, ROW_ALIGN) + first
    rstd = tl.load(RSTD + scalars, mask=rows < M, other=0.0)[:, None]

    products = tl.zeros([BLOCK_M, BLOCK_N], C1.dtype.element_ty)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        u = _load(x_row, cols, mask, STEPS)
        dy = _load(dy_row, cols, mask, STEPS)
        if GATE is not None:
            g, _ = _activate(_load(gate_row, cols, mask, STEPS), STEPS)
            if STEPS.norm_before_gate:
                dy *= g
            else:
                u *= g
        wdy = dy
        if W is not None:
            wdy *= _load_weight(W, stride_w, first + cols, cols < N, STEPS)
        products += _x_hat(u, rstd, STEPS) * wdy
    tl.store(C1 + scalars, tl.sum(products, axis=1) / N, mask=rows < M)


@triton.jit
def _sum_partials_kernel(DW_PARTIAL, DW, programs, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dw [COLS]: the sum over programs of DW_PARTIAL [programs, COLS], cast to the dtype of the weight."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dw = tl.zeros([BLOCK_M, BLOCK_N], DW_PARTIAL.dtype.element_ty)
    for start in tl.range(0, programs, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < programs)[:, None] & (cols < COLS)[None, :]
        dw += tl.load(DW_PARTIAL + rows.to(tl.int64)[:, None] * COLS + cols[None, :], mask=mask, other=0.0)
    tl.store(DW + cols, tl.sum(dw, axis=0).to(DW.dtype.element_ty), mask=cols < COLS)
