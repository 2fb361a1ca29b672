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

from triton_rmsnorm.reference import Gradients, Spec, accumulation_dtype
from triton_rmsnorm.runtime import config as tuning
from triton_rmsnorm.runtime import kernels
from triton_rmsnorm.runtime import table as measured

INTERPRETED = not isinstance(kernels._rms_norm_fwd_kernel, triton.JITFunction)

# With 3.8 only one-dimensional rows compile (TritonGPUPlanCTAPass), older ones know no reductions across a cluster.
_CLUSTERS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
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
    plan = _forward_plan(spec, needs_rstd, device_of(x), _key(x), _key(weight), _key(residual), _key(gate))
    if plan is None:
        x, residual, gate = (_readable(tensor, spec) for tensor in (x, residual, gate))
        return forward(x, _readable_weight(weight), spec, residual, gate, needs_rstd)
    y, rstd, residual_out = _allocate(plan.y, x), _allocate(plan.rstd, x), _allocate(plan.residual_out, x)
    if plan.launch is not None:
        plan.launch(x, residual, gate, weight, y, residual_out, rstd)
    elif rstd is not None:
        rstd.fill_(torch.nan)  # the mean of nothing
    return y, rstd, residual_out


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    spec: Spec,
    gate: Tensor | None = None,
    dresidual_out: Tensor | None = None,
    x_dtype: torch.dtype | None = None,
    needs: Needs = Needs(),  # noqa: B008
) -> Gradients:
    """The gradients that are needed (by default dx and dw), contiguous; arguments as in reference.backward."""
    keys = (_key(dy), _key(x), _key(weight), _key(gate), _key(dresidual_out))
    plan = _backward_plan(spec, needs, device_of(x), x_dtype or x.dtype, *keys)
    if plan is None:
        dy, x, gate, dresidual_out = (_readable(tensor, spec) for tensor in (dy, x, gate, dresidual_out))
        return backward(dy, x, _readable_weight(weight), rstd, spec, gate, dresidual_out, x_dtype, needs)
    gradients = Gradients(*[_allocate(buffer, x) for buffer in plan.gradients])
    if plan.launches is None:
        if gradients.dw is not None:
            gradients.dw.zero_()
        return gradients

    rstd = rstd.contiguous()
    c1, dw_partial = _allocate(plan.c1, x), _allocate(plan.dw_partial, x)
    if c1 is not None:
        plan.launches.c1(dy, x, gate, weight, rstd, c1)
    dx, dresidual, dgate, dw = gradients
    plan.launches.main(dy, dresidual_out, x, gate, weight, rstd, c1, dx, dresidual, dgate, dw_partial)
    if dw_partial is not None:
        plan.launches.sum_partials(dw_partial, dw)
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
        self._compiled: dict[tuple, Callable] = {}

    def __call__(self, *pointers: Tensor | None) -> None:
        if INTERPRETED:
            return _interpret(self, pointers)
        device = pointers[0].get_device()
        if device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self(*pointers)
        # Triton compiles for what pointers are divisible by, and loads for a device. All else that it specializes on is fixed here.
        bits = 0
        for pointer in pointers:
            if pointer is not None:
                bits |= pointer.data_ptr()
        aligned = bits % 16 == 0 or tuple([pointer is None or pointer.data_ptr() % 16 == 0 for pointer in pointers])
        run = self._compiled.get((device, aligned))
        if run is None:
            self._compiled[device, aligned] = self.kernel[self.grid](*pointers, *self.arguments, **self.options)[self.grid]
        else:
            run(*pointers, *self.arguments, stream=torch._C._cuda_getCurrentRawStream(device))


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
    negative: bool = False  # torch's lazy negation: such a tensor is copied


class _ForwardPlan(NamedTuple):
    launch: Launch | None  # None: nothing to compute
    y: Layout
    rstd: Layout | None
    residual_out: Layout | None


class _BackwardPlan(NamedTuple):
    launches: "BackwardLaunches | None"
    gradients: tuple[Layout | None, ...]
    c1: Layout | None
    dw_partial: Layout | None


@lru_cache(maxsize=4096)
def _forward_plan(spec: Spec, needs_rstd: bool, device: tuning.Device, *keys: tuple | None) -> _ForwardPlan | None:
    """All of a forward but its pointers; None if some tensor cannot be read in place."""
    x, weight, residual, gate = (None if key is None else Layout(*key) for key in keys)
    if not _in_place(spec, weight, x, residual, gate):
        return None
    return _ForwardPlan(
        forward_launch(spec, x, weight, device, residual, gate) if prod(x.shape) else None,
        _contiguous(x.shape, spec.output_dtype(x, weight)),
        _contiguous(spec.rstd_shape(x.shape), accumulation_dtype(x, residual, gate)) if needs_rstd else None,
        _contiguous(x.shape, residual.dtype) if residual else None,
    )


@lru_cache(maxsize=4096)
def _backward_plan(spec: Spec, needs: Needs, device: tuning.Device, x_dtype: torch.dtype, *keys: tuple | None) -> _BackwardPlan | None:
    """All of a backward but its pointers; None if some tensor cannot be read in place."""
    dy, x, weight, gate, dresidual_out = (None if key is None else Layout(*key) for key in keys)
    if not _in_place(spec, weight, dy, x, gate, dresidual_out):
        return None
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
        load_policy=config.load_policy,
        store_policy=config.store_policy,
    )
    return {
        "M": prod(shape[:outer]),
        "sizes": sizes,
        **{name: units.get(name, ()) for name in tensors},
        "stride_w": _weight_strides(weight)[-1] if weight else 1,
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


def _in_place(spec: Spec, weight: Layout | None, *rows: Layout | None) -> bool:
    """Whether the kernels can read all of these tensors where they are."""
    if weight and (weight.negative or (len(_weight_strides(weight)) > 1 and prod(weight.shape))):
        return False
    return all(_rows_in_place(x, spec) for x in rows if x)


def _rows_in_place(x: Layout, spec: Spec) -> bool:
    """Whether its normalized dimensions are one contiguous run, and its sign is materialized."""
    run = 1
    for size, stride in zip(reversed(spec.normalized_shape), reversed(x.strides), strict=False):
        if size != 1 and stride != run and prod(x.shape):
            return False
        run *= size
    return not x.negative


def _weight_strides(weight: Layout) -> tuple[int, ...]:
    """Its strides after the dimensions are merged: one, unless they cannot be."""
    _, (strides,) = _rows(weight.shape, weight.strides)
    return strides


def _readable(x: Tensor | None, spec: Spec) -> Tensor | None:
    """x itself where its rows can be read in place, else a copy."""
    if x is None or _rows_in_place(Layout(*_key(x)), spec):
        return x
    return x.resolve_neg().contiguous()


def _readable_weight(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.resolve_neg().contiguous()


def _key(x: Tensor | None) -> tuple | None:
    """The fields of its Layout, which itself would take longer to make."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.is_neg())


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
