"""RMSNorm in plain torch: the specification that the kernels are held to, readable and differentiable, on any device, also in fp64.

    y = (weight_offset + weight) · x_hat,    x_hat = x · rstd,    rstd = (mean(x²) + eps)^(-1/2)

with the mean over groups of the normalized dimensions (one group, unless a group size is given) and all arithmetic in fp32, or fp64 for
fp64 input. Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019; torch.nn.functional.rms_norm.
"""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Spec(NamedTuple):
    """What is computed: all that is not a tensor. A tuple, so that it also serves as the trailing arguments of an operator."""

    normalized_shape: tuple[int, ...]
    eps: float
    group_size: int | None = None  # columns that share a mean; None: all
    weight_offset: float = 0.0
    x_hat_dtype: torch.dtype | None = None  # x_hat is rounded to it before the weight; None: not rounded
    rstd_dtype: torch.dtype | None = None  # rstd is rounded to it before it multiplies x; None: not rounded

    @property
    def columns(self) -> int:
        """Columns that share a mean: N."""
        return self.group_size or prod(self.normalized_shape)

    @property
    def groups(self) -> int:
        return prod(self.normalized_shape) // self.columns if self.columns else 1

    def rstd_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Shape of rstd for an input of `shape`: one value a row and group, with as many dimensions as the input."""
        ndim = len(self.normalized_shape)
        return (*shape[:-ndim], *(1,) * (ndim - 1), self.groups)

    def output_dtype(self, x: torch.dtype, weight: torch.dtype | None) -> torch.dtype:
        """The input's dtype; where x_hat is rounded before the weight, what torch makes of the product."""
        if self.x_hat_dtype is None:
            return x
        return self.x_hat_dtype if weight is None else torch.promote_types(self.x_hat_dtype, weight)


def accumulation_dtype(x: torch.dtype, weight: torch.dtype | None = None) -> torch.dtype:
    """fp64 if the input or the weight is fp64, else fp32."""
    return torch.float64 if torch.float64 in (x, weight) else torch.float32


def forward(x: Tensor, weight: Tensor | None, spec: Spec) -> tuple[Tensor, Tensor]:
    """y [shape of x] and rstd [spec.rstd_shape]. Made of differentiable operations, in this very order of roundings.

    Args:
        x: input, any floating dtype, shape (*, *normalized_shape).
        weight: gamma, any floating dtype, shape normalized_shape, or None.
        spec: everything else.
    """
    groups = x.to(accumulation_dtype(x.dtype)).reshape(*x.shape[: -len(spec.normalized_shape)], spec.groups, spec.columns)
    rstd = torch.rsqrt(groups.square().mean(-1, keepdim=True) + spec.eps)
    x_hat = _x_hat(groups, rstd, spec).reshape(x.shape)
    y = x_hat if weight is None else x_hat * _weight(weight, x_hat, spec)
    return y.to(spec.output_dtype(x.dtype, None if weight is None else weight.dtype)), rstd.reshape(spec.rstd_shape(x.shape))


def backward(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, spec: Spec) -> tuple[Tensor, Tensor | None]:
    """dx [shape of x] and dw [shape of weight] in closed form: with wdy = w · dy and c1 = mean(x_hat · wdy),

        dx = (wdy - c1 · x_hat) · rstd        dw = sum over rows of dy · x_hat

    Roundings of x_hat and rstd count as the identity, which is what autograd takes a cast for.
    """
    ndim = len(spec.normalized_shape)
    grouped = (*x.shape[:-ndim], spec.groups, spec.columns)
    acc = accumulation_dtype(x.dtype)
    rstd = rstd.reshape(*grouped[:-1], 1)
    x_hat = _x_hat(x.to(acc).reshape(grouped), rstd, spec).reshape(x.shape)
    dy = dy.to(acc)
    wdy = dy if weight is None else dy * _weight(weight, x_hat, spec)
    c1 = (x_hat * wdy).reshape(grouped).mean(-1, keepdim=True)
    dx = ((wdy.reshape(grouped) - c1 * x_hat.reshape(grouped)) * rstd).reshape(x.shape)
    dw = None if weight is None else (dy * x_hat).reshape(-1, *weight.shape).sum(0, dtype=accumulation_dtype(x.dtype, weight.dtype))
    return dx.to(x.dtype), None if dw is None else dw.to(weight.dtype)


def _x_hat(x: Tensor, rstd: Tensor, spec: Spec) -> Tensor:
    if spec.rstd_dtype is not None:
        rstd = rstd.to(spec.rstd_dtype).to(rstd.dtype)
    x_hat = x * rstd
    return x_hat if spec.x_hat_dtype is None else x_hat.to(spec.x_hat_dtype).to(x_hat.dtype)


def _weight(weight: Tensor, x_hat: Tensor, spec: Spec) -> Tensor:
    """The factor of x_hat: in fp32 or wider, as torch promotes."""
    return weight.to(torch.promote_types(weight.dtype, x_hat.dtype)) + spec.weight_offset
