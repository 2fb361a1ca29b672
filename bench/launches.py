"""What the package would launch for a problem on a device that is not there: the launches, recorded with the tensors they get."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from triton_rmsnorm.reference import BackwardInputs, Inputs, Needs, Spec, accumulation_dtype
from triton_rmsnorm.runtime import config as tuning
from triton_rmsnorm.runtime import launch, plan

CLUSTERS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
DEVICES = {
    device.name: device if CLUSTERS else replace(device, max_ctas=1)
    for device in (tuning.SM_80, tuning.SM_90, tuning.SM_100, tuning.GFX942)
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class Variant(NamedTuple):
    """What a norm has besides an input and a weight."""

    groups: int = 1
    residual: str | None = None  # its dtype
    gate: bool = False
    needs_dw: bool = True
    steps: Mapping = MappingProxyType({})  # further fields of Spec


VARIANTS = {
    "plain": Variant(),
    "frozen": Variant(needs_dw=False),
    "rounded": Variant(steps={"x_hat_dtype": torch.bfloat16}),
    "groups": Variant(groups=8),
    "add": Variant(residual="bf16"),
    "add_fp32": Variant(residual="fp32"),
    "gate": Variant(gate=True, steps={"activation": "silu"}),
    "gate_first": Variant(gate=True, steps={"activation": "silu", "norm_before_gate": False}),
    "gate_rounded": Variant(gate=True, steps={"activation": "gelu", "x_hat_dtype": torch.bfloat16}),
}


class Problem(NamedTuple):
    """One norm, one way. Dtypes by their short names; a weight dtype of None is no weight."""

    direction: str  # "forward" or "backward"
    variant: str
    dtype: str
    weight_dtype: str | None
    n: int  # columns that share a mean


class Recorded(NamedTuple):
    launch: launch.Launch
    tensors: dict[str, Tensor]  # by the names of the kernel's pointers; without those that are None

    @property
    def rows(self) -> dict[str, Tensor]:
        """The tensors whose rows the kernel walks over, which are its largest."""
        largest = max(tensor.numel() for tensor in self.tensors.values())
        return {name: tensor for name, tensor in self.tensors.items() if tensor.dim() == 2 and tensor.numel() == largest}


class Launches(NamedTuple):
    """The launches of a problem in order, and the tensors that are given and returned."""

    recorded: list[Recorded]
    inputs: list[Tensor]
    outputs: list[Tensor]


def launches(problem: Problem, rows: int, device: tuning.Device, tensor_device: str = "meta") -> Launches:
    """Records the launches of `problem` with so many rows, as they would be on `device`. Nothing runs."""
    with launch.pretend(device), launch.recorded(run=False) as recorded:
        inputs, outputs = _call(problem, rows, tensor_device)
    some = [Recorded(each.launch, {name: t for name, t in each.pointers.items() if t is not None}) for each in recorded]
    return Launches(some, *([tensor for tensor in tensors if tensor is not None] for tensors in (inputs, outputs)))


def depends_on_rows(problem: Problem, device: tuning.Device, rows: tuple[int, ...] = (1, 3, 100_000)) -> bool:
    """Whether a problem is cut into other tiles, or compiled with other options, for other numbers of rows."""
    return len({tuple(map(_configuration, launches(problem, some, device).recorded)) for some in rows}) > 1


def _configuration(recorded: Recorded) -> tuple:
    values, options = recorded.launch.values, recorded.launch.options
    return (*(values.get(name) for name in ("BLOCK_M", "BLOCK_N", "NUM_STAGES")), *sorted(options.items()))


def _call(problem: Problem, rows: int, device: str) -> tuple[list[Tensor | None], list[Tensor | None]]:
    variant = VARIANTS[problem.variant]
    columns = variant.groups * problem.n
    spec = Spec((columns,), 1e-6, problem.n if variant.groups > 1 else None, **variant.steps)

    def empty(*shape, dtype=DTYPES[problem.dtype]):
        return torch.empty(shape, dtype=dtype, device=device)

    x = empty(rows, columns)
    weight = empty(columns, dtype=DTYPES[problem.weight_dtype]) if problem.weight_dtype else None
    gate = empty(rows, columns) if variant.gate else None
    residual = empty(rows, columns, dtype=DTYPES[variant.residual]) if variant.residual else None
    if problem.direction == "forward":
        return [x, weight, residual, gate], list(plan.forward(Inputs(x, weight, residual, gate), spec))
    dy = empty(rows, columns, dtype=spec.output_dtype(x, weight))
    rstd = empty(*spec.rstd_shape(x.shape), dtype=accumulation_dtype(x))
    needs = Needs(dweight=variant.needs_dw, dresidual=variant.residual not in (None, problem.dtype), dgate=variant.gate)
    normed = x if residual is None else torch.empty_like(residual)  # x + residual, as the forward returned it
    given = BackwardInputs(dy, residual, normed, weight, gate, rstd)
    return list(given), list(plan.backward(given, spec, x.dtype, needs))
