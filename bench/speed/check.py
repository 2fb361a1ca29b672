"""How it is timed: a call of one direction of a norm, checked against the exact result first, then timed with a cold L2."""

from collections.abc import Callable
from statistics import quantiles
from typing import NamedTuple

import torch
from torch import Tensor

from bench.problem import VARIANTS, Data, Problem
from bench.providers import Norm
from triton_rmsnorm import testing
from triton_rmsnorm.reference import Inputs
from triton_rmsnorm.runtime.timing import time_cold
from triton_rmsnorm.testing import Expected, Results

Call = Callable[[], list[Tensor]]


def trained(problem: Problem, data: Data) -> dict[str, Tensor]:
    """The inputs whose gradients a problem has, by name."""
    variant = VARIANTS[problem.variant]
    wanted = {"x": variant.needs_dx, "weight": variant.needs_dw, "residual": True, "gate": True}
    return {name: tensor for name, tensor in zip(wanted, data, strict=False) if wanted[name] and tensor is not None}


def make_call(problem: Problem, norm: Norm, data: Data) -> Call:
    """One direction, ready to be repeated; it returns y and x + residual, or the gradients, or all of them."""

    def forward() -> list[Tensor]:
        outputs = norm(data.x, data.weight, data.residual, data.gate)
        return list(outputs) if isinstance(outputs, tuple) else [outputs]

    def backward(outputs: list[Tensor], retain_graph: bool) -> list[Tensor]:
        return list(torch.autograd.grad(outputs, inputs, data.cotangents, retain_graph=retain_graph))

    def inference() -> list[Tensor]:
        with torch.no_grad():
            return forward()

    def training() -> list[Tensor]:
        outputs = forward()
        return [*outputs, *backward(outputs, retain_graph=False)]

    if problem.direction == "forward":
        return inference
    inputs = list(trained(problem, data).values())
    for tensor in inputs:
        tensor.requires_grad_()
    if problem.direction == "forward+backward":
        return training
    outputs = forward()
    return lambda: backward(outputs, retain_graph=True)


def expect(problem: Problem, data: Data) -> dict[str, Expected]:
    """What a call should return, exactly, and by how much it may miss; in the order in which it returns it."""
    exact = testing.expected(Inputs(*data[:4]), data.dy, problem.spec, data.dresidual_out, rounded=True)
    names = [] if problem.direction == "backward" else ["y", "residual_out"][: len(data.cotangents)]
    if problem.direction != "forward":
        names += [f"d{name}" for name in trained(problem, data)]
    return {name: exact[name] for name in names}


def wrong(results: list[Tensor], expected: dict[str, Expected]) -> str:
    """What is wrong with the results of a call; nothing if all elements are within the budget."""
    if len(results) != len(expected):
        return f"{len(results)} results instead of {len(expected)}"
    named: dict = {"y": None} | dict(zip(expected, results, strict=True))
    try:
        parts = testing.parts_of_budget(Results(**named), expected)
    except AssertionError as error:  # a shape
        return str(error)
    return "; ".join(f"{name} takes {part:.3g} of its error budget" for name, part in parts.items() if not part <= 1)  # NaN neither


class Timing(NamedTuple):
    """Quartiles of the time per call, in µs."""

    low_us: float
    us: float  # the median
    high_us: float
    calls: int


class WrongError(Exception):
    """A result is over the budget."""


def measure(problem: Problem, norm: Norm, data: Data, expected: dict[str, Expected], seconds: float) -> Timing:
    """Checks one call, then times it. The gradients that arrive are restored each time, since some providers write over them."""
    own = data._replace(dy=data.dy.clone(), dresidual_out=None if data.dresidual_out is None else data.dresidual_out.clone())
    call = make_call(problem, norm, own)
    if fault := wrong(call(), expected):
        raise WrongError(fault)

    def restore():
        for mine, given in zip(own.cotangents, data.cotangents, strict=True):
            mine.copy_(given)

    return _timing(time_cold(call, seconds, restore))


def time_copy(problem: Problem, device: torch.device, seconds: float) -> Timing:
    """The ceiling: a copy that moves as many bytes as the problem has to."""
    source = torch.randint(128, (problem.bytes // 2,), dtype=torch.int8, device=device)
    destination = torch.empty_like(source)
    return _timing(time_cold(lambda: destination.copy_(source), seconds))


def _timing(times: list[float]) -> Timing:
    return Timing(*(round(quartile, 2) for quartile in quantiles(times, n=4, method="inclusive")), len(times))
