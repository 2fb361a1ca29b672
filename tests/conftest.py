"""What all tests share: the interpreter where there is no GPU, memory that starts as NaN, a seed, the exact result and the error budget."""

import os
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from triton_rmsnorm import reference
from triton_rmsnorm.reference import Spec, accumulation_dtype
from triton_rmsnorm.runtime import config as tuning
from triton_rmsnorm.runtime import launch

# torch.empty and its relatives are filled with NaN, so that output that no kernel wrote is noticed.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def walked_in_blocks(config) -> int:
    """The first N of which the interpreter's kernel walks a row in blocks."""
    return next(2**k + 1 for k in range(20) if config(2**k + 1, 4, 4, tuning.INTERPRETER).block_n <= 2**k)


BLOCKED = {walked_in_blocks(tuning.forward_config), walked_in_blocks(tuning.backward_config)}


def pytest_addoption(parser):
    parser.addoption("--compile-all", action="store_true", help="compile every configuration with every pair of dtypes: minutes a device")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU if Triton interprets."""
    return torch.device("cpu" if launch.INTERPRETED else "cuda")


class Recorded(NamedTuple):
    launch: launch.Launch
    pointers: dict[str, Tensor | None]  # by the names of the kernel's parameters

    @property
    def kernel(self) -> str:
        return self.launch.kernel.fn.__name__


@pytest.fixture
def launches(monkeypatch) -> list[Recorded]:
    """The launches of a test, as they happen."""
    recorded = []
    call = launch.Launch.__call__

    def record(self, *pointers):
        recorded.append(Recorded(self, dict(zip(self.kernel.arg_names, pointers, strict=False))))
        return call(self, *pointers)

    monkeypatch.setattr(launch.Launch, "__call__", record)
    return recorded


@pytest.fixture
def run_as(monkeypatch):
    """run_as(tuning.SM_90): from here on, the interpreter runs the configurations of that device (clusters count as one program)."""
    if not launch.INTERPRETED:
        pytest.skip("a GPU runs its own configurations")

    def set_device(stand_in: tuning.Device) -> None:
        monkeypatch.setattr(launch, "device_of", lambda _: stand_in)

    return set_device


class Results(NamedTuple):
    """y, dx and dw of one problem: tensors, or arrays of long doubles."""

    y: Tensor | np.ndarray | None
    dx: Tensor | np.ndarray | None
    dw: Tensor | np.ndarray | None


def results_of(function, x: Tensor, weight: Tensor | None, dy: Tensor) -> Results:
    """y = function(x, weight) and its gradients, by autograd."""
    x = x.detach().requires_grad_()
    weight = weight if weight is None else weight.detach().requires_grad_()
    y = function(x, weight)
    y.backward(dy)
    return Results(y.detach(), x.grad, None if weight is None else weight.grad)


def exact(x: Tensor, weight: Tensor | None, dy: Tensor, spec: Spec) -> Results:
    """The formulas in 80-bit floats, which also judge fp64. Knows groups and the weight's offset, not the roundings."""
    shape = (-1, spec.groups, spec.columns)
    squares = longdouble(x).reshape(shape) ** 2
    rstd = 1 / np.sqrt(squares.mean(-1, keepdims=True) + np.longdouble(spec.eps))
    return exact_given(longdouble(x).reshape(shape) * rstd, rstd, weight, dy, spec)


def exact_given(x_hat: np.ndarray, rstd: np.ndarray, weight: Tensor | None, dy: Tensor, spec: Spec) -> Results:
    """What follows exactly from x_hat and rstd."""
    shape = (-1, spec.groups, spec.columns)
    x_hat, rstd, flat_dy = x_hat.reshape(shape), rstd.reshape(-1, spec.groups, 1), longdouble(dy).reshape(shape)
    w = np.longdouble(1) if weight is None else longdouble(weight).reshape(shape[1:]) + spec.weight_offset
    wdy = w * flat_dy
    dx = (wdy - (x_hat * wdy).mean(-1, keepdims=True) * x_hat) * rstd
    dw = None if weight is None else (flat_dy * x_hat).sum(0).reshape(weight.shape)
    return Results((x_hat * w).reshape(dy.shape), dx.reshape(dy.shape), dw)


def torchs(x: Tensor, weight: Tensor | None, dy: Tensor, spec: Spec) -> list[Results]:
    """torch's own op (reference.py for what it lacks), before a rounding to half precision; dw also row by row and in other orders."""
    acc = accumulation_dtype(x)
    x, dy = x.to(acc), dy.to(acc)
    if weight is not None:
        weight = weight.to(torch.promote_types(weight.dtype, acc))

    def rms_norm(x, weight):
        if spec == Spec(spec.normalized_shape, spec.eps):
            return F.rms_norm(x, spec.normalized_shape, weight, spec.eps)
        return reference.forward(x, weight, spec if weight is not None else spec._replace(weight_offset=0.0))[0]

    results = [results_of(rms_norm, x, weight, dy)]
    if weight is not None:
        dw_of_rows = (dy * rms_norm(x, None)).to(weight.dtype).reshape(-1, *weight.shape)
        for _ in range(4 + 64 // weight.numel()):  # the worst of few columns takes many orders to show
            dw_of_rows = dw_of_rows[torch.randperm(len(dw_of_rows), device=x.device)]
            by_row = torch.zeros_like(weight)
            for row in dw_of_rows:
                by_row += row
            results += [results[0]._replace(dw=dw) for dw in (by_row, dw_of_rows.sum(0))]
    return results


def assert_within_budget(actual: Results, exact: Results, others: list[Results]) -> None:
    """Each element of `actual` is within 2 x the largest error of `others` + one ulp of its own dtype at its own magnitude."""
    for name, ours, truth, *theirs in zip(Results._fields, actual, exact, *others, strict=True):
        if ours is None or truth is None:
            assert ours is None and truth is None, name
            continue
        assert ours.shape == truth.shape, name
        worst = max(np.abs(longdouble(other) - truth).max(initial=0) for other in theirs)
        excess = np.abs(longdouble(ours) - truth) - (2 * worst + ulp(truth, ours.dtype))
        assert not np.isnan(excess).any(), f"{name}: {np.isnan(excess).sum()} of {excess.size} elements are NaN"
        at = np.unravel_index(excess.argmax(), excess.shape) if excess.size else ()
        assert excess.max(initial=-1) <= 0, f"{name}{at} is {ours[at].item()}, not {truth[at]}: {excess[at]} over the budget"


def longdouble(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy().astype(np.longdouble)


def ulp(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The gap between neighbours of `dtype` at the magnitude of x."""
    info = torch.finfo(dtype)
    exponent = np.frexp(np.maximum(np.abs(x), info.smallest_normal))[1]
    return np.ldexp(np.longdouble(info.eps), exponent - 1)


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal random numbers; in rows of a few columns none is near 0, so that the rounding of one row does not outweigh all others."""
    x = torch.randn(shape, dtype=torch.float64, device=device)
    return (x if shape[-1] > 8 else x + x.sign() / 2).to(dtype)
