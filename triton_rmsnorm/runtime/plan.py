"""From tensors to launches: one launch forward; one backward, one more for the sum of dw, and one for c1 where rows are longer than a tile.

All but the pointers is prepared once and kept; after that a call allocates its outputs and starts the compiled kernels.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_rmsnorm.reference import BackwardInputs, Gradients, InputTuple, Needs, OutputTuple, Spec, accumulation_dtype
from triton_rmsnorm.runtime import kernels, table
from triton_rmsnorm.runtime.config import Config, Device, Key, analytic, reduction_config
from triton_rmsnorm.runtime.launch import INTERPRETED, Launch, device_of, kept
from triton_rmsnorm.runtime.layout import Layout, LayoutKey, contiguous, in_place, keys_of, readable, row_strides, weight_strides

_TL_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64, None: None}
MAX_ROWS = 2**31 - 2**16  # row numbers are 32-bit integers in the kernels, also those of the last tile, which may go beyond the rows
MAX_COLUMNS = 2**31 - 2**20  # so are column numbers
MAX_GROUPS = 2**16 - 1  # the extent of grid axis 1


def forward(inputs: InputTuple, spec: Spec, needs_rstd: bool = True) -> OutputTuple:
    """y, rstd if it is needed, and x + residual where there is a residual, in one launch."""
    x, weight, residual, gate = inputs
    plan = _forward_plan(spec, needs_rstd, x.device, *keys_of(inputs))
    if plan is None:
        weight, x, residual, gate = readable(spec, weight, x, residual, gate)
        return forward((x, weight, residual, gate), spec, needs_rstd)
    outputs: list[Any] = [None if new is None else new() for new in plan.outputs]
    y, rstd, residual_out = outputs
    if plan.launch is not None:
        plan.launch(x, weight, residual, gate, y, rstd, residual_out)
    elif rstd is not None:
        rstd.fill_(torch.nan)  # the mean of nothing
    return y, rstd, residual_out


def output(u: Tensor, weight: Tensor | None, gate: Tensor | None, rstd: Tensor, spec: Spec, dtype: torch.dtype) -> Tensor:
    """y of a forward again, in its dtype and with the same bits, from what was normalized (x, or x + residual) and rstd."""
    plan = _output_plan(spec, u.device, rstd.dtype, dtype, *keys_of((u, weight, gate)))
    if plan is None:
        weight, u, gate = readable(spec, weight, u, gate)
        return output(u, weight, gate, rstd, spec, dtype)
    y = plan.new()
    if plan.launch is not None:
        _check_data("weight", weight, plan.weight_bytes)
        plan.launch(u, weight, gate, rstd.contiguous(), y)
    return y


def backward(given: BackwardInputs, spec: Spec, x_dtype: torch.dtype | None = None, needs: Needs = Needs()) -> Gradients:  # noqa: B008
    """The gradients that are needed (by default dx and dweight), contiguous; arguments as in reference.backward."""
    dy, dresidual_out, x, weight, gate, rstd = given
    plan = _backward_plan(spec, needs, x.device, x_dtype or x.dtype, *keys_of(given[:5]))  # rstd is contiguous
    if plan is None:
        for gradient in (dy, dresidual_out):
            if gradient is not None and gradient.layout is not torch.strided:
                raise NotImplementedError(f"gradients must have layout torch.strided, got {gradient.layout}")
        weight, dy, dresidual_out, x, gate = readable(spec, weight, dy, dresidual_out, x, gate)
        return backward(BackwardInputs(dy, dresidual_out, x, weight, gate, rstd), spec, x_dtype, needs)
    buffers: list[Any] = [None if new is None else new() for new in plan.buffers]
    dx, dweight, dresidual, dgate, c1, dw_partial = buffers
    gradients = Gradients(dx, dweight, dresidual, dgate)
    if plan.launches is None:
        if dweight is not None:
            dweight.zero_()
        return gradients

    _check_data("weight", weight, plan.weight_bytes)
    rstd = rstd.contiguous()
    if plan.launches.c1 is not None:
        plan.launches.c1(dy, x, weight, gate, rstd, c1)
    plan.launches.main(dy, dresidual_out, x, weight, gate, rstd, c1, dx, dw_partial, dresidual, dgate)
    if plan.launches.sum_partials is not None:
        plan.launches.sum_partials(dw_partial, dweight)
    return gradients


class BackwardLaunches(NamedTuple):
    c1: Launch | None  # where a row is longer than a tile
    main: Launch
    sum_partials: Launch | None  # where dweight is needed


Buffer = Callable[[], Any]  # returns a new tensor


class _ForwardPlan(NamedTuple):
    launch: Launch | None  # None: nothing to compute
    outputs: tuple[Buffer | None, ...]  # y, rstd, residual_out


class _OutputPlan(NamedTuple):
    launch: Launch | None
    new: Buffer  # of y
    weight_bytes: int


class _BackwardPlan(NamedTuple):
    launches: BackwardLaunches | None  # None: nothing to compute
    buffers: tuple[Buffer | None, ...]  # the gradients, c1 and the partial sums of dweight
    weight_bytes: int = 0  # that its elements span


@kept
def _forward_plan(spec: Spec, needs_rstd: bool, device: torch.device, *keys: LayoutKey | None) -> _ForwardPlan | None:
    """Everything of a forward except the pointers; None if some tensor cannot be read in place."""
    x, weight, residual, gate = (None if key is None else Layout(*key) for key in keys)
    assert x
    if not in_place(spec, weight, x, residual, gate):
        return None
    y = contiguous(x.shape, spec.output_dtype(x, weight))
    if needs_rstd:  # a search for the backward's configuration runs now, because memory is short when the backward itself runs
        own_dresidual = residual is not None and residual.dtype != x.dtype
        table.choose(_key("backward", spec, weight, x, residual, gate, own_dresidual, dy=y), device_of(device))
    outputs = _new(
        device,
        y,
        contiguous(spec.rstd_shape(x.shape), accumulation_dtype(x, residual, gate)) if needs_rstd else None,
        contiguous(x.shape, residual.dtype) if residual else None,
    )
    return _ForwardPlan(forward_launch(spec, device_of(device), x, weight, residual, gate) if prod(x.shape) else None, outputs)


@kept
def _output_plan(spec: Spec, device: torch.device, acc: torch.dtype, dtype: torch.dtype, *keys: LayoutKey | None) -> _OutputPlan | None:
    """Everything of the computation of y from rstd except the pointers; None if some tensor cannot be read in place."""
    u, weight, gate = (None if key is None else Layout(*key) for key in keys)
    assert u
    _check_saved("weight", weight, spec.normalized_shape)
    _check_saved("gate", gate, u.shape)
    if not in_place(spec, weight, u, gate):
        return None
    new = partial(torch.empty, u.shape, dtype=dtype, device=device)
    launch = output_launch(spec, device_of(device), acc, u, weight, gate) if prod(u.shape) else None
    return _OutputPlan(launch, new, weight.span if weight else 0)


@kept
def _backward_plan(spec: Spec, needs: Needs, device: torch.device, x_dtype: torch.dtype, *keys: LayoutKey | None) -> _BackwardPlan | None:
    """Everything of a backward except the pointers; None if some tensor cannot be read in place."""
    dy, dresidual_out, x, weight, gate = (None if key is None else Layout(*key) for key in keys)
    assert dy and x
    _check_saved("input", x, dy.shape)
    _check_saved("weight", weight, spec.normalized_shape)
    _check_saved("gate", gate, dy.shape)
    if not in_place(spec, weight, dy, dresidual_out, x, gate):
        return None
    needs = needs._replace(dweight=needs.dweight and weight is not None)
    gradients = (
        contiguous(x.shape, x_dtype) if needs.dx else None,
        contiguous(spec.normalized_shape, weight.dtype) if weight and needs.dweight else None,
        contiguous(x.shape, x.dtype) if needs.dresidual else None,
        contiguous(x.shape, gate.dtype) if gate and needs.dgate else None,
    )
    if not prod(x.shape) or not any(needs):
        return _BackwardPlan(None, _new(device, *gradients, None, None))
    launches = backward_launches(spec, device_of(device), needs, dy, dresidual_out, x, weight, gate)
    acc = accumulation_dtype(dy, x, gate, weight)
    c1 = contiguous(spec.rstd_shape(x.shape), acc) if launches.c1 else None
    dw_partial = contiguous((launches.main.grid[0], prod(spec.normalized_shape)), acc) if needs.dweight else None
    return _BackwardPlan(launches, _new(device, *gradients, c1, dw_partial), weight.span if weight else 0)


def _check_saved(name: str, saved: Layout | None, shape: tuple[int, ...]) -> None:
    """What the forward saved may have got other data since: distributed training frees and partitions weights."""
    if saved and (*saved.shape,) != (*shape,):
        raise RuntimeError(f"{name} must have the same shape in backward as in forward, {(*shape,)}, got {(*saved.shape,)}")


def _check_data(name: str, saved: Tensor | None, nbytes: int) -> None:
    if saved is not None and saved.untyped_storage().nbytes() < nbytes:
        held = saved.untyped_storage().nbytes() // saved.element_size()
        raise RuntimeError(f"{name} must have the data in backward that it had in forward, {(*saved.shape,)}, got storage of {(held,)}")


def forward_launch(
    spec: Spec,
    device: Device,
    x: Layout,
    weight: Layout | None,
    residual: Layout | None = None,
    gate: Layout | None = None,
    config: Config | None = None,  # None: chosen
) -> Launch:
    """The launch of a forward on `device`."""
    rows = {"x_strides": x, "residual_strides": residual, "gate_strides": gate}
    config = config or table.choose(_key("forward", spec, weight, x, residual, gate), device)
    values = _values(spec, config, rows, weight, residual)
    grid = (triton.cdiv(values["M"], config.block_m), spec.groups, 1)
    if config.block_n < spec.columns:
        return Launch("forward", kernels._rms_norm_fwd_blocked_kernel, grid, config, eps=spec.eps, NUM_STAGES=config.num_stages, **values)
    return Launch("forward", kernels._rms_norm_fwd_kernel, grid, config, eps=spec.eps, WEIGHT_FIRST=config.weight_first, **values)


def output_launch(spec: Spec, device: Device, acc: torch.dtype, u: Layout, weight: Layout | None, gate: Layout | None = None) -> Launch:
    """The launch that computes y from rstd on `device`, in the arithmetic of the forward: `acc`, which x may have been in, but not u."""
    rows = {"x_strides": u, "gate_strides": gate}
    config = analytic(_key("forward", spec, weight, u, None, gate), device)  # not tuned: this runs where memory is short
    values = _values(spec, config, rows, weight)
    values["ARITHMETIC"] = replace(values["ARITHMETIC"], acc=_TL_DTYPES[acc])
    grid = (triton.cdiv(values["M"], config.block_m), spec.groups, triton.cdiv(spec.columns, config.block_n))
    return Launch("output", kernels._rms_norm_output_kernel, grid, config, **values)


def backward_launches(
    spec: Spec,
    device: Device,
    needs: Needs,
    dy: Layout,
    dresidual_out: Layout | None,
    x: Layout,
    weight: Layout | None,
    gate: Layout | None = None,
    config: Config | None = None,  # None: chosen
) -> BackwardLaunches:
    """The launches of a backward on `device`."""
    rows = {"dy_strides": dy, "dresidual_out_strides": dresidual_out, "x_strides": x, "gate_strides": gate}
    config = config or table.choose(_key("backward", spec, weight, x, dresidual_out, gate, needs.dresidual, dy), device)
    values = _values(spec, config, rows, weight)
    tiles = triton.cdiv(values["M"], config.block_m)
    blocks = triton.cdiv(spec.columns, config.block_n)
    programs = min(tiles, max(1, config.programs // (spec.groups * blocks)))
    grid = (programs, spec.groups, blocks)
    knobs = {"NUM_STAGES": config.num_stages, "WEIGHT_FIRST": config.weight_first}
    main = Launch("backward", kernels._rms_norm_bwd_kernel, grid, config, **knobs, **values)
    c1 = sum_partials = None
    if blocks > 1 and needs != Needs(dx=False):  # dweight alone needs no c1
        values = {name: value for name, value in values.items() if name not in ("dresidual_out_strides", "STORE_POLICY")}
        c1 = Launch("c1", kernels._rms_norm_bwd_c1_kernel, (tiles, spec.groups, 1), config, **values)
    if needs.dweight:
        columns = spec.groups * spec.columns
        config = reduction_config(columns, device)
        sizes = {"COLS": columns, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        grid = (triton.cdiv(columns, config.block_n), 1, 1)
        sum_partials = Launch("sum_partials", kernels._sum_partials_kernel, grid, config, programs=programs, **sizes)
    return BackwardLaunches(c1, main, sum_partials)


def _key(
    direction: str,
    spec: Spec,
    weight: Layout | None,
    x: Layout,
    residual: Layout | None,
    gate: Layout | None,
    own_dresidual: bool = False,
    dy: Layout | None = None,
) -> Key:
    """What the configuration of a launch depends on; in the backward, `residual` stands for dresidual_out."""
    kind = "gate" if gate else "residual" if residual else "plain"
    return Key(direction, spec.columns, _itemsize(x, residual, gate, dy), _itemsize(weight), kind, own_dresidual)


def _values(
    spec: Spec, config: Config, tensors: dict[str, Layout | None], weight: Layout | None, residual: Layout | None = None
) -> dict[str, Any]:
    """The arguments of the forward and the backward kernel besides pointers; `tensors` of rows by the name of their strides."""
    present = {name: layout for name, layout in tensors.items() if layout}
    shape = present["x_strides"].shape
    rows = prod(shape[: len(shape) - len(spec.normalized_shape)])
    if rows > MAX_ROWS:
        raise RuntimeError(f"input must have at most {MAX_ROWS} rows, got {rows}")
    if (columns := prod(spec.normalized_shape)) > MAX_COLUMNS:
        raise RuntimeError(f"rows must have at most {MAX_COLUMNS} columns, got {columns}")
    if spec.groups > MAX_GROUPS:
        raise RuntimeError(f"rows must have at most {MAX_GROUPS} groups, got {spec.groups}")
    sizes, row_align, strides = row_strides(spec, list(present.values()))
    return {
        "M": rows,
        "sizes": sizes,
        **dict.fromkeys(tensors, ()),
        **dict(zip(present, strides, strict=True)),
        "stride_w": weight_strides(weight)[-1] if weight else 1,
        "ARITHMETIC": kernels.Arithmetic(
            acc=tl.float64 if any(layout.dtype == torch.float64 for layout in present.values()) else tl.float32,
            weight_offset=spec.weight_offset,
            x_hat_dtype=_TL_DTYPES[spec.x_hat_dtype],
            rstd_dtype=_TL_DTYPES[spec.rstd_dtype],
            residual_dtype=_TL_DTYPES[residual.dtype] if residual else None,
            product_dtype=_TL_DTYPES[spec.product_dtype(weight)] if spec.activation else None,
            activation=spec.activation,
            norm_before_gate=spec.norm_before_gate,
            bf16_by_bits=INTERPRETED,
        ),
        "N": spec.columns,
        "GROUPS": spec.groups,
        "ROW_ALIGN": row_align,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "LOAD_POLICY": config.load_policy,
        "STORE_POLICY": config.store_policy,
    }


def _itemsize(*layouts: Layout | None) -> int:
    """Bytes per element of the widest; 0 if all are None."""
    return max(layout.dtype.itemsize if layout else 0 for layout in layouts)


def _new(device: torch.device, *buffers: Layout | None) -> tuple[Buffer | None, ...]:
    """What allocates the buffers, prepared as far as possible."""
    return tuple(None if b is None else partial(torch.empty_strided, b.shape, b.strides, dtype=b.dtype, device=device) for b in buffers)
