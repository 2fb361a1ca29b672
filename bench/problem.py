"""What is measured and audited: one norm as a problem, its random tensors, the bytes it has to move, and the suites that are timed."""

from collections.abc import Iterator, Mapping
from itertools import product
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from triton_rmsnorm.reference import Spec

EPS = 1e-6
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
DIRECTIONS = ("forward", "backward", "forward+backward")
LAYOUTS = ("contiguous", "slice", "transposed", "padded", "unaligned")
GRID = (64, 96, 128, 256, 512, 768, 1000, 1024, 1536, 2048, 2560, 3072, 4096, 5000, 5120, 6144, 7168, 8192)
GRID = (*GRID, 12288, 14336, 16384, 28672, 32768, 50000, 65536, 131072)
ELEMENTS = 1 << 27  # of a large tensor of rows: 32768 tokens of 4096, which takes a GPU 60 µs or more
HEADS = 32  # of x in layout "slice"


class Variant(NamedTuple):
    """What a norm has besides an input and a weight."""

    residual: str | None = None  # "x" for a residual in the dtype of x, or its dtype: x + residual is normalized, and returned too
    gate: bool = False
    groups: int = 1
    needs_dx: bool = True
    needs_dw: bool = True
    knobs: Mapping = MappingProxyType({})  # further keyword arguments of the public function, which are fields of Spec


VARIANTS = {
    "plain": Variant(),
    "frozen": Variant(needs_dw=False),
    "weight_only": Variant(needs_dx=False),
    "rounded": Variant(knobs={"x_hat_dtype": torch.bfloat16}),
    "rounded_twice": Variant(knobs={"x_hat_dtype": torch.float16, "rstd_dtype": torch.bfloat16}),
    "groups": Variant(groups=8),
    "groups_offset": Variant(groups=4, knobs={"weight_offset": 1.0}),
    "residual": Variant(residual="x"),
    "residual_fp32": Variant(residual="fp32"),
    "gate": Variant(gate=True, knobs={"activation": "silu"}),
    "gate_first": Variant(gate=True, knobs={"activation": "silu", "norm_before_gate": False}),
    "gate_rounded": Variant(gate=True, knobs={"activation": "gelu", "x_hat_dtype": torch.bfloat16}),
}


class Problem(NamedTuple):
    """One norm of m rows of one or more groups of n columns. Dtypes by their short names."""

    m: int
    n: int  # columns that share a mean
    direction: str = "forward"
    variant: str = "plain"
    dtype: str = "bf16"  # of x and the gate, and of y where nothing is rounded before the weight
    weight_dtype: str | None = "bf16"  # None: no weight
    layout: str = "contiguous"  # of x and the gate

    def __str__(self) -> str:
        dtypes = self.dtype if self.weight_dtype == self.dtype else f"{self.dtype} with weight {self.weight_dtype or 'none'}"
        special = [word for word in (self.variant, self.layout) if word not in ("plain", "contiguous")]
        return " ".join([f"{self.m} x {self.n}", self.direction, *special, dtypes])

    @property
    def columns(self) -> int:
        return self.n * VARIANTS[self.variant].groups

    @property
    def knobs(self) -> dict:
        """Keyword arguments of the public function, or fields of Spec."""
        variant = VARIANTS[self.variant]
        return {"group_size": self.n if variant.groups > 1 else None, **variant.knobs}

    @property
    def spec(self) -> Spec:
        return Spec((self.columns,), EPS, **self.knobs)

    @property
    def kind(self) -> str:
        """The function that computes it: "plain", "residual" or "gate"."""
        variant = VARIANTS[self.variant]
        return "gate" if variant.gate else "residual" if variant.residual else "plain"

    @property
    def residual_dtype(self) -> str | None:
        residual = VARIANTS[self.variant].residual
        return self.dtype if residual == "x" else residual

    @property
    def y_dtype(self) -> torch.dtype:
        x, weight = (torch.empty(0, dtype=DTYPES[name], device="meta") if name else None for name in (self.dtype, self.weight_dtype))
        return self.spec.output_dtype(x, weight)

    @property
    def own_dresidual(self) -> bool:
        """Whether the gradient of the residual is a tensor apart from dx, since its dtype is another one."""
        return self.residual_dtype not in (None, self.dtype)

    @property
    def bytes(self) -> int:
        """What has to be moved: each tensor that is given is read once, each that is wanted is written once. rstd is neither."""
        variant = VARIANTS[self.variant]
        row, weight, residual = (DTYPES[name].itemsize if name else 0 for name in (self.dtype, self.weight_dtype, self.residual_dtype))
        y, gate = self.y_dtype.itemsize, row * variant.gate
        read = y + (residual or row) + residual + gate  # dy, x or the sum, the gradient of the sum, the gate
        written = row * variant.needs_dx + residual * self.own_dresidual + gate  # dx, dresidual, dgate
        rows = {"forward": row + y + 2 * residual + gate, "backward": read + written}  # bytes per element
        weights = {"forward": weight, "backward": weight * (1 + variant.needs_dw)}
        return sum(self.columns * (self.m * rows[name] + weights[name]) for name in self.direction.split("+"))

    @property
    def rstd_bytes(self) -> int:
        """What our kernels write in a forward that needs gradients, and read in a backward: not part of `bytes`."""
        passes = len(self.direction.split("+"))
        return passes * self.m * VARIANTS[self.variant].groups * (8 if self.dtype == "fp64" else 4)


class Data(NamedTuple):
    """The tensors of a problem; those that it does not have are None."""

    x: Tensor
    weight: Tensor | None
    residual: Tensor | None
    gate: Tensor | None
    dy: Tensor
    dresidual_out: Tensor | None

    @property
    def inputs(self) -> list[Tensor]:
        return [tensor for tensor in self[:4] if tensor is not None]

    @property
    def cotangents(self) -> list[Tensor]:
        return [tensor for tensor in self[4:] if tensor is not None]


def draw(problem: Problem, device: torch.device | str) -> Data:
    """Fresh random data; the weight is around 1."""

    def normal(*shape, dtype=problem.dtype):
        return torch.randn(shape, dtype=DTYPES.get(dtype, dtype), device=device)

    m, columns = problem.m, problem.columns
    x = _rows(problem, normal)
    gate = _rows(problem, normal) if problem.kind == "gate" else None
    weight = None
    if problem.weight_dtype:
        weight = (1 + normal(2 * columns if problem.layout == "padded" else columns, dtype="fp32") / 4).to(DTYPES[problem.weight_dtype])
        weight = weight[::2] if problem.layout == "padded" else weight
    residual, dresidual_out = (
        normal(m, columns, dtype=problem.residual_dtype).view(x.shape) if problem.residual_dtype else None for _ in range(2)
    )
    return Data(x, weight, residual, gate, normal(*x.shape, dtype=problem.y_dtype), dresidual_out)


def _rows(problem: Problem, normal) -> Tensor:
    """A tensor of m rows in the layout of the problem."""
    m, columns = problem.m, problem.columns
    match problem.layout:
        case "slice":  # q of a projection of tokens to q, k and v
            return normal(m // HEADS, 3, HEADS, columns)[:, 0]
        case "transposed":  # two of three heads, before the tokens
            return normal(2, m // 4, 3, columns).transpose(1, 2)[:, 1:]
        case "padded":  # rows are aligned to one element
            return normal(m, columns + 3)[:, :columns]
        case "unaligned":  # so is the first of them, but not their distance
            return normal(m * columns + 1)[1:].view(m, columns)
    return normal(m, columns)


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
    *_large(4096, variant="gate"),
    *_both_ways((64, 4096)),
]
FULL = [  # in the order of what one wants to know first
    *QUICK,
    *_large(*GRID),
    *(problem._replace(direction="forward+backward") for problem in _large(1024, 4096, 16384) if problem.direction == "forward"),
    *_large(1024, 8192, 16384, variant="residual"),
    *_large(4096, variant="residual_fp32"),
    *_large(128, 1024, 8192, variant="gate"),
    *_large(128, variant="gate", layout="slice"),
    *_large(64, 256, layout="slice"),
    *_both_ways((1, 4096), (1024, 4096), (8192, 4096)),
    *_large(1024, 16384, weight_dtype="fp32"),
    *_large(1024, 4096, 16384, dtype="fp32", weight_dtype="fp32"),
    *_large(4096, dtype="fp16", weight_dtype="fp16"),
]
SUITES = {"quick": QUICK, "full": list(dict.fromkeys(FULL))}
