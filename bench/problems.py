"""What is timed: the table of problems, their random data and the least bytes that each has to move."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from bench.audit import GRID
from bench.launches import DTYPES
from triton_rmsnorm.reference import Spec

EPS = 1e-6
DIRECTIONS = ("forward", "backward", "forward+backward")
ELEMENTS = 1 << 27  # of a tensor of rows: 32768 tokens of 4096, 60 µs or more for any norm
HEADS = 32  # layout "slice": x is q, of that many heads, in a projection of tokens to q, k and v


class Problem(NamedTuple):
    """One norm of m rows of n columns. Dtypes by their short names."""

    m: int
    n: int
    direction: str = "forward"
    variant: str = "plain"  # "plain", "residual" (x + residual is normed, and returned too) or "gated" (norm(x) · silu(gate))
    dtype: str = "bf16"  # of x, y and the gate
    weight_dtype: str = "bf16"
    residual_dtype: str = "bf16"
    layout: str = "contiguous"  # of x and the gate: "contiguous" or "slice"

    def __str__(self) -> str:
        dtypes = self.dtype if self.weight_dtype == self.dtype else f"{self.dtype} with weight {self.weight_dtype}"
        if self.variant == "residual" and self.residual_dtype != self.dtype:
            dtypes += f" and residual {self.residual_dtype}"
        special = [word for word in (self.variant, self.layout) if word not in ("plain", "contiguous")]
        return " ".join([f"{self.m} x {self.n}", self.direction, *special, dtypes])

    @property
    def spec(self) -> Spec:
        return Spec((self.n,), EPS, activation="silu" if self.variant == "gated" else None)

    @property
    def bytes(self) -> int:
        """What has to be moved: each tensor that is given read once, each that is wanted written once. rstd is neither."""
        row, weight, residual = (DTYPES[name].itemsize for name in (self.dtype, self.weight_dtype, self.residual_dtype))
        apart = residual if self.residual_dtype != self.dtype else 0  # dx serves the residual too if it has its dtype
        moved = {  # x and y, with a residual and the sum, with a gate; dy, x and dx, with the sum and its gradient, with a gate and its own
            "forward": ({"plain": 2 * row, "residual": 2 * row + 2 * residual, "gated": 3 * row}, weight),
            "backward": ({"plain": 3 * row, "residual": 2 * row + 2 * residual + apart, "gated": 5 * row}, 2 * weight),
        }
        passes = [moved[name] for name in self.direction.split("+")]
        return sum(self.n * (self.m * rows[self.variant] + weights) for rows, weights in passes)


class Data(NamedTuple):
    """The tensors of a problem; those that it does not have are None."""

    x: Tensor
    weight: Tensor
    residual: Tensor | None
    gate: Tensor | None
    dy: Tensor
    dresidual_out: Tensor | None

    @property
    def inputs(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [tensor for tensor in self[:4] if tensor is not None]

    @property
    def cotangents(self) -> list[Tensor]:
        return [tensor for tensor in self[4:] if tensor is not None]


def draw(problem: Problem, device: torch.device) -> Data:
    """Fresh random data; the weight is around 1."""
    m, n, residual, gated = problem.m, problem.n, problem.variant == "residual", problem.variant == "gated"
    shape = (m, n) if problem.layout == "contiguous" else (m // HEADS, HEADS, n)

    def normal(*shape, dtype=problem.dtype):
        return torch.randn(shape, dtype=DTYPES[dtype], device=device)

    if problem.layout == "contiguous":
        x, gate = normal(*shape), normal(*shape) if gated else None
    else:
        q, k, _ = normal(m // HEADS, 3, HEADS, n).unbind(1)
        x, gate = q, k if gated else None
    weight = (1 + normal(n, dtype="fp32") / 4).to(DTYPES[problem.weight_dtype])
    rows = [normal(*shape, dtype=problem.residual_dtype) if residual else None for _ in range(2)]
    return Data(x, weight, rows[0], gate, normal(*shape), rows[1])


def rows(n: int) -> int:
    """Rows of a large problem: a multiple of HEADS."""
    return max(HEADS, ELEMENTS // n // HEADS * HEADS)


def _both_ways(*shapes: tuple[int, int], **fields) -> Iterator[Problem]:
    for (m, n), direction in product(shapes, DIRECTIONS[:2]):
        yield Problem(m, n, direction, **fields)


def _large(*columns: int, **fields) -> Iterator[Problem]:
    return _both_ways(*((rows(n), n) for n in columns), **fields)


QUICK = [
    *_large(128, 1024, 4096, 8192, 32768),
    *_large(4096, weight_dtype="fp32"),
    *_large(128, layout="slice"),
    *_large(4096, variant="residual"),
    *_large(4096, variant="gated"),
    *_both_ways((64, 4096)),
]
FULL = [  # in the order of what one wants to know first
    *QUICK,
    *_large(*GRID),
    *(problem._replace(direction="forward+backward") for problem in _large(1024, 4096, 16384) if problem.direction == "forward"),
    *_large(1024, 8192, 16384, variant="residual"),
    *_large(4096, variant="residual", residual_dtype="fp32"),
    *_large(128, 1024, 8192, variant="gated"),
    *_large(128, variant="gated", layout="slice"),
    *_large(64, 256, layout="slice"),
    *_both_ways((1, 4096), (1024, 4096), (8192, 4096)),
    *_large(1024, 16384, weight_dtype="fp32"),
    *_large(1024, 4096, 16384, dtype="fp32", weight_dtype="fp32"),
    *_large(4096, dtype="fp16", weight_dtype="fp16"),
]
SUITES = {"quick": QUICK, "full": list(dict.fromkeys(FULL))}
