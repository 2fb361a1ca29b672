"""The public functions with their knobs as functions of tensors alone, each with the same made of torch's own operations."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from conftest import draw
from torch import Tensor
from torch.nn import functional as F

from triton_rmsnorm import add_rms_norm, rms_norm, rms_norm_gated


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

    def per_argument(self, of_rows, of_weight) -> tuple:
        """One value for the tensors of rows, another for the weight: the in_dims of a vmap, for example."""
        return tuple(of_weight if name == "weight" else of_rows for name in self.arguments)


N = 6

VARIANTS = {
    "rms_norm": Variant(lambda x, w: rms_norm(x, (N,), w), lambda x, w: F.rms_norm(x, (N,), w)),
    "no_weight": Variant(lambda x: rms_norm(x, (N,)), lambda x: F.rms_norm(x, (N,)), ("x",)),
    "two_dims": Variant(lambda x, w: rms_norm(x, (3, N), w), lambda x, w: F.rms_norm(x, (3, N), w), ndim=2),
    "groups_and_offset": Variant(
        lambda x, w: rms_norm(x, (N,), w, 1e-3, group_size=2, weight_offset=1.0),
        lambda x, w: F.rms_norm(x.unflatten(-1, (3, 2)), (2,), eps=1e-3).flatten(-2) * (1 + w),
    ),
    "add": Variant(
        lambda x, w, r: add_rms_norm(x, r, (N,), w), lambda x, w, r: (F.rms_norm(x + r, (N,), w), x + r), ("x", "weight", "residual")
    ),
    "gate_after": Variant(
        lambda x, w, z: rms_norm_gated(x, z, (N,), w, activation="sigmoid"),
        lambda x, w, z: F.rms_norm(x, (N,), w) * z.sigmoid(),
        ("x", "weight", "gate"),
    ),
    "gate_before": Variant(
        lambda x, w, z: rms_norm_gated(x, z, (N,), w, activation="gelu_tanh", norm_before_gate=False),
        lambda x, w, z: F.rms_norm(x * F.gelu(z, approximate="tanh"), (N,), w),
        ("x", "weight", "gate"),
    ),
}
# One for each of the three functions.
FUNCTIONS = {name: VARIANTS[name] for name in ("rms_norm", "add", "gate_after")}


def scalar(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """A scalar of all outputs, each element with a weight of its own."""

    def total(*arguments):
        outputs = function(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape).cos()).sum() for y in outputs)

    return total
