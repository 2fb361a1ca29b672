"""The public functions with their options as functions of tensors alone, each with the same made of torch's own operations."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from triton_rmsnorm import add_rms_norm, rms_norm, rms_norm_gated
from triton_rmsnorm.reference import Spec
from triton_rmsnorm.runtime import config
from triton_rmsnorm.testing import draw


class Variant(NamedTuple):
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    theirs: Callable[..., Tensor | tuple[Tensor, ...]]
    arguments: tuple[str, ...] = ("x", "weight")
    ndim: int = 1  # of the weight

    @property
    def weight_at(self) -> int | None:
        return self.arguments.index("weight") if "weight" in self.arguments else None

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        return [draw(shape[-self.ndim :] if name == "weight" else shape, dtype, device) for name in self.arguments]

    def per_argument(self, of_rows: Any, of_weight: Any) -> tuple:
        """One value for the tensors of rows, another for the weight: the in_dims of a vmap, for example."""
        return tuple(of_weight if name == "weight" else of_rows for name in self.arguments)


N = 6


def torchs(x: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """F.rms_norm on the CPU: on GPUs torch has another operator, which lacks forward-mode AD and makes all of a row with inf NaN."""
    return F.rms_norm(x.cpu(), normalized_shape, None if weight is None else weight.cpu(), eps).to(x.device)


VARIANTS = {
    "plain": Variant(lambda x, w: rms_norm(x, (N,), w), lambda x, w: torchs(x, (N,), w)),
    "no_weight": Variant(lambda x: rms_norm(x, (N,)), lambda x: torchs(x, (N,)), ("x",)),
    "two_dims": Variant(lambda x, w: rms_norm(x, (3, N), w), lambda x, w: torchs(x, (3, N), w), ndim=2),
    "groups_and_offset": Variant(
        lambda x, w: rms_norm(x, (N,), w, 1e-3, group_size=2, weight_offset=1.0),
        lambda x, w: torchs(x.unflatten(-1, (3, 2)), (2,), eps=1e-3).flatten(-2) * (1 + w),
    ),
    "residual": Variant(
        lambda x, w, r: add_rms_norm(x, r, (N,), w), lambda x, w, r: (torchs(x + r, (N,), w), x + r), ("x", "weight", "residual")
    ),
    "gate": Variant(
        lambda x, w, z: rms_norm_gated(x, z, (N,), w, activation="sigmoid"),
        lambda x, w, z: torchs(x, (N,), w) * z.sigmoid(),
        ("x", "weight", "gate"),
    ),
    "gate_first": Variant(
        lambda x, w, z: rms_norm_gated(x, z, (N,), w, activation="gelu_tanh", norm_before_gate=False),
        lambda x, w, z: torchs(x * F.gelu(z, approximate="tanh"), (N,), w),
        ("x", "weight", "gate"),
    ),
}
# One for each of the three functions.
FUNCTIONS = {name: VARIANTS[name] for name in ("plain", "residual", "gate")}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def ours(spec: Spec) -> Callable[..., Any]:
    """The public function that computes `spec`, as norm(x, weight, residual, gate)."""
    options = spec._asdict()
    shape, eps, gate_options = options.pop("normalized_shape"), options.pop("eps"), ("activation", "norm_before_gate")
    of_gate = {name: options.pop(name) for name in gate_options}

    def norm(x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None, gate: Tensor | None = None) -> Any:
        if residual is not None:
            return add_rms_norm(x, residual, shape, weight, eps, **options)
        if gate is not None:
            return rms_norm_gated(x, gate, shape, weight, eps, **of_gate, **options)
        return rms_norm(x, shape, weight, eps, **options)

    return norm


def leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def trained(function: Callable[..., Any], tensors: Iterable[Tensor]) -> list[Tensor]:
    """All outputs and gradients of function(*tensors), with a gradient arriving that differs from element to element."""
    tensors = leaves(tensors)
    outputs = tree_leaves(function(*tensors))
    dys = [torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape).cos() for y in outputs]
    torch.autograd.backward(outputs, dys)
    return [*[y.detach() for y in outputs], *[t.grad for t in tensors]]


def scalar(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """A scalar of all outputs, each element with its own weight."""

    def total(*arguments: Tensor) -> Tensor:
        outputs = function(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape).cos()).sum() for y in outputs)

    return total


def offsets_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The offset of every element."""
    offsets = torch.zeros(shape, dtype=torch.long)
    for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        offsets += (torch.arange(size) * stride).view(-1, *(1,) * (len(shape) - dim - 1))
    return offsets


def id_of(value: object) -> str | None:
    """A dtype without its module, for the names of tests."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def block_n(direction: str, n: int, device: config.Device) -> int:
    """Columns of a tile for rows of n columns in fp32."""
    return config.analytic(config.Key(direction, n, 4, 4), device).block_n


# The first N at which the interpreter's forward or backward processes rows in blocks.
BLOCKED = {
    next(2**k + 1 for k in range(20) if block_n(direction, 2**k + 1, config.INTERPRETER) <= 2**k) for direction in ("forward", "backward")
}
