"""RMSNorm in plain torch: the specification that the kernels are held to, readable and differentiable, on any device, also in fp64.

    y = (weight_offset + weight) · x_hat,    x_hat = u · rstd,    rstd = (mean(u²) + eps)^(-1/2)

where u is x, or x + residual, or x · activation(gate); the gate may multiply y instead. The mean is over groups of the normalized
dimensions (one group, unless a group size is given); all arithmetic is in fp32, or fp64 for fp64 input.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467); torch.nn.functional.rms_norm.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class HasDtype(Protocol):
    @property
    def dtype(self) -> torch.dtype: ...


class Spec(NamedTuple):
    """What is computed: all that is not a tensor. A tuple, so that it also serves as the trailing arguments of an operator."""

    normalized_shape: tuple[int, ...]
    eps: float
    group_size: int | None = None  # columns that share a mean; None: all
    weight_offset: float = 0.0
    x_hat_dtype: torch.dtype | None = None  # x_hat is rounded to it before the weight; None: not rounded
    rstd_dtype: torch.dtype | None = None  # rstd is rounded to it before it multiplies x; None: not rounded
    activation: str | None = None  # of the gate
    norm_before_gate: bool = True

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

    def product_dtype(self, weight: HasDtype | None) -> torch.dtype | None:
        """Dtype of weight · x_hat where x_hat is rounded first: what torch makes of the product. None: not rounded."""
        if self.x_hat_dtype is None or weight is None:
            return self.x_hat_dtype
        return torch.promote_types(self.x_hat_dtype, weight.dtype)

    def output_dtype(self, x: HasDtype, weight: HasDtype | None) -> torch.dtype:
        """The input's dtype, unless the product is the last step and has a dtype of its own."""
        gate_last = self.activation is not None and self.norm_before_gate
        return x.dtype if gate_last else self.product_dtype(weight) or x.dtype


def accumulation_dtype(*tensors: HasDtype | None) -> torch.dtype:
    """fp64 if any of the tensors is fp64, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def forward(
    x: Tensor, weight: Tensor | None, spec: Spec, residual: Tensor | None = None, gate: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, rstd [spec.rstd_shape] and x + residual (or None), made of differentiable operations in this very order of roundings.

    Args:
        x: input, any floating dtype, shape (*, *normalized_shape).
        weight: gamma, any floating dtype, shape normalized_shape, or None.
        spec: everything that is no tensor.
        residual: added to x before the norm, in its own dtype; shape of x, or None.
        gate: its activation multiplies the input of the norm or its output; shape of x, or None.
    """
    acc = accumulation_dtype(x, residual, gate)
    u = x.to(acc)
    residual_out = None
    if residual is not None:
        residual_out = (u + residual.to(acc)).to(residual.dtype)
        u = residual_out.to(acc)
    if gate is not None and not spec.norm_before_gate:
        u = u * _activate(gate.to(acc), spec)
    groups = _grouped(u, spec)
    rstd = torch.rsqrt(groups.square().mean(-1, keepdim=True) + spec.eps)
    y = _x_hat(groups, rstd, spec).reshape(x.shape)
    if weight is not None:
        y = y * _weight(weight, y, spec)
    if gate is not None and spec.norm_before_gate:
        y = _round(y, spec.product_dtype(weight)) * _activate(gate.to(acc), spec)
    return y.to(spec.output_dtype(x, weight)), rstd.reshape(spec.rstd_shape(x.shape)), residual_out


class Gradients(NamedTuple):
    """What a backward returns; None where it is not needed."""

    dx: Tensor | None
    dresidual: Tensor | None
    dgate: Tensor | None
    dw: Tensor | None


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    spec: Spec,
    gate: Tensor | None = None,
    dresidual_out: Tensor | None = None,
    x_dtype: torch.dtype | None = None,
) -> Gradients:
    """All gradients in closed form, from x (x + residual, where there was one) and rstd: with wdy = w · dy and c1 = mean(x_hat · wdy),

        du = (wdy - c1 · x_hat) · rstd        dw = sum over rows of dy · x_hat

    where u is x, or x · g with g = activation(gate), in which case dx = du · g and dg = du · x. If g multiplies the output instead,
    dy · g takes the place of dy, and dg = dy · w · x_hat. The gradient that arrives at x + residual is added to du, which then is dx and
    dresidual alike. Roundings of x_hat and rstd count as the identity, which is what autograd takes a cast for.

    Args:
        dy, dresidual_out: gradients of y and of x + residual.
        x_dtype: dtype of dx where it is not that of x, because x is x + residual here.
    """
    acc = accumulation_dtype(x, gate)
    x_acc, dy = x.to(acc), dy.to(acc)
    rstd = rstd.to(acc).reshape(*x.shape[: -len(spec.normalized_shape)], spec.groups, 1)
    u, g, dgate = x_acc, None, None
    g_slope: Any = None  # a tensor where g is
    if gate is not None:
        g, g_slope = _activation_and_slope(gate.to(acc), spec)
    if g is not None and not spec.norm_before_gate:
        u = x_acc * g
    x_hat = _x_hat(_grouped(u, spec), rstd, spec).reshape(x.shape)
    w = None if weight is None else _weight(weight, x_hat, spec)
    if g is not None and spec.norm_before_gate:
        dgate = dy * _round(x_hat if w is None else x_hat * w, spec.product_dtype(weight)) * g_slope
        dy = dy * g
    dw = None if weight is None else (dy * x_hat).reshape(-1, *weight.shape).sum(0, dtype=accumulation_dtype(x_hat, weight))
    wdy = _grouped(dy if w is None else dy * w, spec)
    c1 = (_grouped(x_hat, spec) * wdy).mean(-1, keepdim=True)
    du = ((wdy - c1 * _grouped(x_hat, spec)) * rstd).reshape(x.shape)
    dresidual = None
    if dresidual_out is not None:
        du = du + dresidual_out.to(acc)
        dresidual = du.to(x.dtype)
    if g is not None and not spec.norm_before_gate:
        dgate = du * x_acc * g_slope
        du = du * g
    return Gradients(
        du.to(x_dtype or x.dtype),
        dresidual,
        None if gate is None or dgate is None else dgate.to(gate.dtype),
        None if weight is None or dw is None else dw.to(weight.dtype),
    )


def _grouped(x: Tensor, spec: Spec) -> Tensor:
    return x.reshape(*x.shape[: -len(spec.normalized_shape)], spec.groups, spec.columns)


def _round(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype).to(x.dtype)


def _x_hat(u: Tensor, rstd: Tensor, spec: Spec) -> Tensor:
    return _round(u * _round(rstd, spec.rstd_dtype), spec.x_hat_dtype)


def _weight(weight: Tensor, x_hat: Tensor, spec: Spec) -> Tensor:
    """The factor of x_hat: in fp32 or wider, as torch promotes."""
    return weight.to(torch.promote_types(weight.dtype, x_hat.dtype)) + spec.weight_offset


def _activate(z: Tensor, spec: Spec) -> Tensor:
    return ACTIVATIONS[str(spec.activation)](z)


def _activation_and_slope(z: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """g = activation(z) and dg/dz, both differentiable."""
    g, pullback = torch.func.vjp(partial(_activate, spec=spec), z)  # type: ignore[misc]
    return g, pullback(torch.ones_like(g))[0]
