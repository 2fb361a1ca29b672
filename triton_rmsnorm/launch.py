"""From tensors to launches: rows and strides, buffers, one launch each way and one more for the sum of dw.

A launch is prepared once for everything but pointers and kept (`forward_launch`, `backward_launches`); after that a call allocates its
outputs and starts the compiled kernel. Under TRITON_INTERPRET=1, set before Triton is imported, the same launches run on CPU tensors.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from math import gcd, prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_rmsnorm import kernels, measured, tuning
from triton_rmsnorm.reference import Gradients, Spec, accumulation_dtype

INTERPRETED = not isinstance(kernels._rms_norm_fwd_kernel, triton.JITFunction)

_CLUSTERS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)
_TL_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64, None: None}


def runs_on(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of `device`: on a GPU, and on the CPU when Triton interprets."""
    return device.type == "cuda" or (INTERPRETED and device.type == "cpu")


class Needs(NamedTuple):
    """Which gradients are needed; what is not is not computed either."""

    dx: bool = True
    dresidual: bool = False  # apart from dx: not needed where dx has its dtype and serves for both
    dgate: bool = False
    dw: bool = True


def forward(
    x: Tensor, weight: Tensor | None, spec: Spec, residual: Tensor | None = None, gate: Tensor | None = None, needs_rstd: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [shape of x], rstd [spec.rstd_shape] if it is needed, and x + residual (or None), in one launch."""
    x, residual, gate, weight = _readable(x, spec), _readable(residual, spec), _readable(gate, spec), _flat(weight)
    plan = _forward_plan(spec, _layout(x), _layout(weight), device_of(x), _layout(residual), _layout(gate), needs_rstd)
    y, rstd, residual_out = outputs = [_allocate(buffer, x) for buffer in plan.outputs]
    if plan.launch is not None:
        plan.launch(x, residual, gate, weight, y, residual_out, rstd)
    elif rstd is not None:
        rstd.fill_(torch.nan)  # the mean of nothing
    return tuple(outputs)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    spec: Spec,
    gate: Tensor | None = None,
    dresidual_out: Tensor | None = None,
    x_dtype: torch.dtype | None = None,
    needs: Needs | None = None,
) -> Gradients:
    """The gradients that are needed (by default dx and dw), contiguous; arguments as in reference.backward."""
    dy, dresidual_out, x, gate = _readable(dy, spec), _readable(dresidual_out, spec), _readable(x, spec), _readable(gate, spec)
    weight = _flat(weight)
    layouts = (_layout(dy), _layout(x), _layout(weight), _layout(gate), _layout(dresidual_out))
    plan = _backward_plan(spec, *layouts, x_dtype or x.dtype, needs or Needs(), device_of(x))
    gradients = Gradients(*[_allocate(buffer, x) for buffer in plan.gradients])
    if plan.launches is None:
        if gradients.dw is not None:
            gradients.dw.zero_()
        return gradients

    rstd = rstd.contiguous()
    c1, dw_partial = _allocate(plan.c1, x), _allocate(plan.dw_partial, x)
    if c1 is not None:
        plan.launches.c1(dy, x, gate, weight, rstd, c1)
    plan.launches.main(dy, dresidual_out, x, gate, weight, rstd, c1, gradients.dx, gradients.dresidual, gradients.dgate, dw_partial)
    if dw_partial is not None:
        plan.launches.sum_partials(dw_partial, gradients.dw)
    return gradients


class Launch:
    """A kernel with everything but its pointers: called with them, it runs on the current stream of their device."""

    def __init__(self, kernel, grid: tuple[int, int, int], config: tuning.Config, device: tuning.Device, **values):
        self.kernel = kernel
        self.grid = grid
        self.values = values  # by the names of the kernel's parameters
        self.arguments = tuple(values[name] for name in kernel.arg_names if name in values)  # all that follow the pointers
        self.options = {"num_warps": config.num_warps, "num_ctas": config.num_ctas, "enable_fp_fusion": True}
        if device.backend == "cuda":
            self.options["maxnreg"] = config.max_registers
        self._compiled: dict[tuple[bool, ...], Callable] = {}

    def __call__(self, *pointers: Tensor | None) -> None:
        if INTERPRETED:
            return _interpret(self, pointers)
        # Triton compiles for what pointers are divisible by. Everything else that it specializes on is fixed here.
        aligned = tuple([pointer is None or pointer.data_ptr() % 16 == 0 for pointer in pointers])
        run = self._compiled.get(aligned)
        with torch.cuda.device_of(pointers[0]):
            if run is None:
                self._compiled[aligned] = self.kernel[self.grid](*pointers, *self.arguments, **self.options)[self.grid]
            else:
                run(*pointers, *self.arguments, stream=torch._C._cuda_getCurrentRawStream(pointers[0].device.index))


_INTERPRETER_LOCK = threading.Lock()  # the interpreter keeps the program id in a global, and autograd has threads of its own


_OUTPUTS = ("Y", "RESIDUAL_OUT", "DX", "DRESIDUAL", "DGATE", "DW")


def _interpret(launch: Launch, pointers: tuple[Tensor | None, ...]) -> None:
    """Interprets a launch. The interpreter truncates to bf16: it gets fp32 copies of bf16 tensors, and torch rounds what was written."""
    copies = [_fp32_copy(p) if p is not None and p.dtype == torch.bfloat16 else p for p in pointers]
    with _INTERPRETER_LOCK:
        launch.kernel[launch.grid](*copies, *launch.arguments)
    for pointer, copy, name in zip(pointers, copies, launch.kernel.arg_names, strict=False):
        if copy is not pointer and name in _OUTPUTS:
            pointer.copy_(copy)


def _fp32_copy(x: Tensor) -> Tensor:
    """All of the storage of x in fp32, seen through the same strides (which may overlap: an expanded tensor)."""
    storage = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    return storage.float().as_strided(x.shape, x.stride(), x.storage_offset())


class Layout(NamedTuple):
    """What of a tensor a launch depends on."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class _ForwardPlan(NamedTuple):
    launch: Launch | None  # None: nothing to compute
    outputs: tuple[Layout | None, ...]  # y, rstd, x + residual


class _BackwardPlan(NamedTuple):
    launches: "BackwardLaunches | None"
    gradients: tuple[Layout | None, ...]
    c1: Layout | None
    dw_partial: Layout | None


@lru_cache(maxsize=4096)
def _forward_plan(
    spec: Spec, x: Layout, weight: Layout | None, device: tuning.Device, residual: Layout | None, gate: Layout | None, needs_rstd: bool
) -> _ForwardPlan:
    outputs = (
        _contiguous(x.shape, spec.output_dtype(x, weight)),
        _contiguous(spec.rstd_shape(x.shape), accumulation_dtype(x, residual, gate)) if needs_rstd else None,
        _contiguous(x.shape, residual.dtype) if residual else None,
    )
    return _ForwardPlan(forward_launch(spec, x, weight, device, residual, gate) if prod(x.shape) else None, outputs)


@lru_cache(maxsize=4096)
def _backward_plan(
    spec: Spec,
    dy: Layout,
    x: Layout,
    weight: Layout | None,
    gate: Layout | None,
    dresidual_out: Layout | None,
    x_dtype: torch.dtype,
    needs: Needs,
    device: tuning.Device,
) -> _BackwardPlan:
    needs = needs._replace(dw=needs.dw and weight is not None)
    gradients = (
        _contiguous(x.shape, x_dtype) if needs.dx else None,
        _contiguous(x.shape, x.dtype) if needs.dresidual else None,
        _contiguous(x.shape, gate.dtype) if needs.dgate else None,
        _contiguous(spec.normalized_shape, weight.dtype) if needs.dw else None,
    )
    if not prod(x.shape) or not any(needs):
        return _BackwardPlan(None, gradients, None, None)
    launches = backward_launches(spec, dy, x, weight, needs, device, gate, dresidual_out)
    acc = accumulation_dtype(x, gate, weight)
    return _BackwardPlan(
        launches,
        gradients,
        _contiguous(spec.rstd_shape(x.shape), acc) if launches.c1 else None,
        _contiguous((launches.main.grid[0], prod(spec.normalized_shape)), acc) if needs.dw else None,
    )


def _contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
    return Layout(tuple(shape), tuple(prod(shape[i + 1 :]) for i in range(len(shape))), dtype)


def _allocate(layout: Layout | None, like: Tensor) -> Tensor | None:
    return None if layout is None else torch.empty_strided(layout.shape, layout.strides, dtype=layout.dtype, device=like.device)


class BackwardLaunches(NamedTuple):
    c1: Launch | None  # where a row fits no tile
    main: Launch
    sum_partials: Launch | None  # where dw is needed


@lru_cache(maxsize=4096)
def forward_launch(
    spec: Spec,
    x: Layout,
    weight: Layout | None,
    device: tuning.Device,
    residual: Layout | None = None,
    gate: Layout | None = None,
    config: tuning.Config | None = None,  # None: chosen
) -> Launch:
    rows = {"x_strides": x, "residual_strides": residual, "gate_strides": gate}
    loads = sum(layout is not None for layout in rows.values())
    stores = 2 if residual else 1
    key = measured.Key("forward", spec.columns, _itemsize(*rows.values()), _itemsize(weight), loads, stores)
    config = config or measured.choose(key, device)
    values = _values(spec, config, rows, weight)
    if residual:
        values["STEPS"] = replace(values["STEPS"], residual_dtype=_TL_DTYPES[residual.dtype])
    grid = (_programs(values["M"], config, spec.groups), spec.groups, 1)
    return Launch(kernels._rms_norm_fwd_kernel, grid, config, device, eps=spec.eps, NUM_STAGES=config.num_stages, **values)


@lru_cache(maxsize=4096)
def backward_launches(
    spec: Spec,
    dy: Layout,
    x: Layout,
    weight: Layout | None,
    needs: Needs,
    device: tuning.Device,
    gate: Layout | None = None,
    dresidual_out: Layout | None = None,
    config: tuning.Config | None = None,  # None: chosen
) -> BackwardLaunches:
    rows = {"dy_strides": dy, "dresidual_out_strides": dresidual_out, "x_strides": x, "gate_strides": gate}
    loads = sum(layout is not None for layout in rows.values())
    stores = max(1, needs.dx + needs.dresidual + needs.dgate)
    key = measured.Key("backward", spec.columns, _itemsize(*rows.values()), _itemsize(weight), loads, stores)
    config = config or measured.choose(key, device)
    values = _values(spec, config, rows, weight)
    blocks = triton.cdiv(spec.columns, config.block_n)
    programs = _programs(values["M"], config, spec.groups * blocks)
    main = Launch(kernels._rms_norm_bwd_kernel, (programs, spec.groups, blocks), config, device, NUM_STAGES=config.num_stages, **values)
    c1 = sum_partials = None
    if blocks > 1 and needs != (False, False, False, True):
        c1 = Launch(kernels._rms_norm_bwd_c1_kernel, (triton.cdiv(values["M"], config.block_m), spec.groups, 1), config, device, **values)
    if needs.dw:
        columns = spec.groups * spec.columns
        config = tuning.reduction_config(columns, device)
        sizes = {"COLS": columns, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        grid = (triton.cdiv(columns, config.block_n), 1, 1)
        sum_partials = Launch(kernels._sum_partials_kernel, grid, config, device, programs=programs, **sizes)
    return BackwardLaunches(c1, main, sum_partials)


def forget() -> None:
    """Prepares everything anew: configurations are chosen again."""
    for prepared in (forward_launch, backward_launches, _forward_plan, _backward_plan):
        prepared.cache_clear()


def _itemsize(*layouts: Layout | None) -> int:
    """Bytes an element of the widest; 0 for nothing."""
    return max(layout.dtype.itemsize if layout else 0 for layout in layouts)


def _programs(rows: int, config: tuning.Config, columns_of_grid: int) -> int:
    """Extent of grid axis 0: no more programs than tiles, nor than `config` allows over the whole grid."""
    return min(triton.cdiv(rows, config.block_m), max(1, config.programs // columns_of_grid))


def _values(spec: Spec, config: tuning.Config, tensors: dict[str, Layout | None], weight: Layout | None) -> dict:
    """What the forward and the backward kernel take besides pointers; `tensors` of rows by the name of their strides."""
    present = {name: layout for name, layout in tensors.items() if layout}
    shape = tensors["x_strides"].shape
    outer = len(shape) - len(spec.normalized_shape)
    sizes, strides = _rows(shape[:outer], *(layout.strides[:outer] for layout in present.values()))
    row_align = gcd(16, *(stride for row in strides for stride in row))
    units = {name: tuple(stride // row_align for stride in row) for name, row in zip(present, strides, strict=True)}
    steps = kernels.Steps(
        acc=tl.float64 if any(layout.dtype == torch.float64 for layout in present.values()) else tl.float32,
        weight_offset=spec.weight_offset,
        x_hat_dtype=_TL_DTYPES[spec.x_hat_dtype],
        rstd_dtype=_TL_DTYPES[spec.rstd_dtype],
        product_dtype=_TL_DTYPES[spec.product_dtype(weight)] if spec.activation else None,
        activation=spec.activation,
        norm_before_gate=spec.norm_before_gate,
        bf16_by_bits=INTERPRETED,
    )
    return {
        "M": prod(shape[:outer]),
        "sizes": sizes,
        **{name: units.get(name, ()) for name in tensors},
        "stride_w": weight.strides[0] if weight else 1,
        "STEPS": steps,
        "N": spec.columns,
        "ROW_ALIGN": row_align,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }


def _rows(shape: tuple[int, ...], *strides: tuple[int, ...]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The outer dimensions of tensors of one shape, merged where all of them allow it: (sizes but the first, strides of each tensor)."""
    dims: list[list[int]] = []  # [size, stride of the first tensor, ...]
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if dims and all(outer == size * step for outer, step in zip(dims[-1][1:], steps, strict=True)):
            dims[-1] = [dims[-1][0] * size, *steps]
        else:
            dims.append([size, *steps])
    if not dims:
        dims = [[1] + [0] * len(strides)]
    sizes, *merged = zip(*dims, strict=True)
    return sizes[1:], merged


def _readable(x: Tensor | None, spec: Spec) -> Tensor | None:
    """x itself where its normalized dimensions are one contiguous run and its sign is materialized, else a copy."""
    if x is None or (x.is_contiguous() and not x.is_neg()):
        return x
    x = x.resolve_neg()
    run = 1
    for size, stride in zip(reversed(spec.normalized_shape), reversed(x.stride()), strict=False):
        if size != 1 and stride != run:
            return x.contiguous()
        run *= size
    return x


def _flat(weight: Tensor | None) -> Tensor | None:
    """The weight as one dimension: a view, with any stride, unless its dimensions cannot be merged."""
    if weight is None or (weight.dim() == 1 and not weight.is_neg()):
        return weight
    return weight.resolve_neg().reshape(-1)


def _layout(x: Tensor | None) -> Layout | None:
    return None if x is None else Layout(x.shape, x.stride(), x.dtype)


def device_of(x: Tensor) -> tuning.Device:
    return tuning.INTERPRETER if INTERPRETED else _gpu(x.device.index)


@cache
def _gpu(index: int) -> tuning.Device:
    properties = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    return tuning.Device(
        name=properties.name,
        backend="hip" if hip else "cuda",
        num_sms=properties.multi_processor_count,
        shared_memory=64 * 1024 if hip else properties.shared_memory_per_block_optin,
        max_ctas=16 if _CLUSTERS and not hip and properties.major in (9, 10) else 1,
    )
