"""How it is timed: a call of one pass of a norm, checked against the reference in fp64 first, then timed with a cold L2.

The error budget is 2 x the largest error of the same formulas in plain torch, plus one ulp.
"""

from collections.abc import Callable
from statistics import quantiles
from typing import NamedTuple

import torch
from torch import Tensor

from bench.problem import Data, Problem
from bench.providers import Norm
from triton_rmsnorm import reference
from triton_rmsnorm.runtime import autotune

Call = Callable[[], list[Tensor]]


def make_call(problem: Problem, norm: Norm, data: Data) -> Call:
    """One pass, ready to be repeated; it returns y and x + residual, or the gradients of data.inputs, or all of them."""

    def forward() -> list[Tensor]:
        outputs = norm(data.x, data.weight, data.residual, data.gate)
        return list(outputs) if isinstance(outputs, tuple) else [outputs]

    def backward(outputs: list[Tensor], retain_graph: bool) -> list[Tensor]:
        return list(torch.autograd.grad(outputs, data.inputs, data.cotangents, retain_graph=retain_graph))

    def inference() -> list[Tensor]:
        with torch.no_grad():
            return forward()

    def training() -> list[Tensor]:
        outputs = forward()
        return [*outputs, *backward(outputs, retain_graph=False)]

    if problem.direction == "forward":
        return inference
    for tensor in data.inputs:
        tensor.requires_grad_()
    if problem.direction == "forward+backward":
        return training
    outputs = forward()
    return lambda: backward(outputs, retain_graph=True)


class Expected(NamedTuple):
    """What a call should return, exactly, and by how much it may miss."""

    names: list[str]
    exact: list[Tensor]
    budget: list[float]  # besides one ulp of each element


def expect(problem: Problem, data: Data) -> Expected:
    def norm(x, weight, residual, gate):
        y, _, residual_out = reference.forward(reference.Inputs(x, weight, residual, gate), problem.spec)
        return y if residual_out is None else (y, residual_out)

    def results(data: Data) -> list[Tensor]:
        return [result.detach() for result in make_call(problem, norm, data)()]

    names = [] if problem.direction == "backward" else ["y", "x + residual"][: len(data.cotangents)]
    if problem.direction != "forward":
        names += [f"d{name}" for name, tensor in zip(Data._fields[:4], data[:4], strict=True) if tensor is not None]
    exact = results(Data(*(tensor if tensor is None else tensor.detach().double() for tensor in data)))
    budget = [2 * _largest(torchs - truth) for torchs, truth in zip(results(data), exact, strict=True)]
    if "dweight" in names:  # torch adds up rows in an order of its own; others are as good
        i = names.index("dweight")
        budget[i] = max(budget[i], 2 * _largest(_row_by_row(problem, data) - exact[i]))
    return Expected(names, exact, budget)


def _row_by_row(problem: Problem, data: Data) -> Tensor:
    """dw in fp32, summed over rows in 512 steps one after the other."""
    acc = torch.float32
    with torch.no_grad():
        spec = problem.spec
        residual, gate = (None if tensor is None else tensor.to(acc) for tensor in (data.residual, data.gate))
        products = data.dy.to(acc) * reference.forward(reference.Inputs(data.x.to(acc), None, residual, gate), spec).y
    rows = products.reshape(-1, problem.n)
    total = None
    for step in rows.split(max(1, len(rows) // 512)):
        total = step if total is None else torch.cat([total[: len(step)] + step, total[len(step) :]])
    return total.sum(0)


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0


def wrong(results: list[Tensor], expected: Expected) -> str:
    """What is wrong with the results of a call; nothing if all elements are within the budget."""
    if len(results) != len(expected.exact):
        return f"{len(results)} results instead of {len(expected.exact)}"
    for name, result, exact, budget in zip(expected.names, results, expected.exact, expected.budget, strict=True):
        if result.shape != exact.shape:
            return f"{name} has shape {(*result.shape,)}, not {(*exact.shape,)}"
        excess = _largest_excess(result.detach(), exact, budget)
        if not excess <= 0:  # also where it is NaN
            return f"{name} is off by {excess + budget:.3g} more than one ulp, where {budget:.3g} is allowed"
    return ""


def _largest_excess(result: Tensor, exact: Tensor, budget: float) -> float:
    """How far the worst element misses by more than the budget and one ulp of its dtype at its magnitude."""
    info = torch.finfo(result.dtype)
    _, exponent = torch.frexp(exact.abs().clamp_min(info.smallest_normal))
    ulp = torch.ldexp(torch.full_like(exact, info.eps), exponent - 1)
    return ((result.double() - exact).abs() - ulp).max().item() - budget


class Timing(NamedTuple):
    """Quartiles of the time of a call, in µs."""

    low_us: float
    us: float  # the median
    high_us: float
    calls: int


class WrongError(Exception):
    """A result is over the budget."""


def measure(problem: Problem, norm: Norm, data: Data, expected: Expected, seconds: float) -> Timing:
    """Checks one pass, then times it. The gradients that arrive are restored each time: some providers write over them."""
    own = data._replace(dy=data.dy.clone(), dresidual_out=None if data.dresidual_out is None else data.dresidual_out.clone())
    call = make_call(problem, norm, own)
    if fault := wrong(call(), expected):
        raise WrongError(fault)

    def restore():
        for mine, given in zip(own.cotangents, data.cotangents, strict=True):
            mine.copy_(given)

    return _timing(autotune.time_cold(call, seconds, restore))


def time_copy(problem: Problem, device: torch.device, seconds: float) -> Timing:
    """The ceiling: a copy that moves as many bytes as the problem has to."""
    source = torch.randint(128, (problem.bytes // 2,), dtype=torch.int8, device=device)
    destination = torch.empty_like(source)
    return _timing(autotune.time_cold(lambda: destination.copy_(source), seconds))


def _timing(times: list[float]) -> Timing:
    return Timing(*(round(quartile, 2) for quartile in quantiles(times, n=4, method="inclusive")), len(times))
