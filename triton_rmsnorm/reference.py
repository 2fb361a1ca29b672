"""RMSNorm in plain torch: the specification that the kernels are held to, readable and differentiable, on any device, also in fp64.

    y = (weight_offset + weight) · x_hat,    x_hat = u · rstd,    rstd = (mean(u²) + eps)^(-1/2)

where u is x, or x + residual, or x · activation(gate); the gate may multiply y instead. The mean is over groups of the normalized
dimensions (one group, unless a group size is given); all arithmetic is in fp32, or fp64 for fp64 input.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467); torch.nn.functional.rms_norm.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import NamedTuple, Protocol

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
    """What is computed: everything that is not a tensor. Its fields are also the trailing arguments of the operators."""

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

    @property
    def is_plain(self) -> bool:
        """Whether torch.nn.functional.rms_norm computes it."""
        return self == Spec(self.normalized_shape, self.eps)

    def rstd_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of rstd for an input of `shape`: one value per row and group, with as many dimensions as the input."""
        ndim = len(self.normalized_shape)
        return (*shape[:-ndim], *(1,) * (ndim - 1), self.groups)

    def product_dtype(self, weight: HasDtype | None) -> torch.dtype | None:
        """Dtype of weight · x_hat where x_hat is rounded first: what torch makes of the product. None: not rounded."""
        if self.x_hat_dtype is None or weight is None:
            return self.x_hat_dtype
        return torch.promote_types(self.x_hat_dtype, weight.dtype)

    def output_dtype(self, x: HasDtype, weight: HasDtype | None) -> torch.dtype:
        """The input's dtype, unless the product of weight and x_hat is the last step and is rounded to another dtype."""
        gate_last = self.activation is not None and self.norm_before_gate
        return x.dtype if gate_last else self.product_dtype(weight) or x.dtype


class Inputs(NamedTuple):
    """What a norm reads: x, the weight, and at most one of residual and gate."""

    x: Tensor
    weight: Tensor | None = None
    residual: Tensor | None = None
    gate: Tensor | None = None


class Outputs(NamedTuple):
    """What a norm returns: y, rstd [spec.rstd_shape] where it is wanted, and x + residual where there is a residual."""

    y: Tensor
    rstd: Tensor | None
    residual_out: Tensor | None


# The same as plain tuples, which are quicker to make.
InputTuple = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
OutputTuple = tuple[Tensor, Tensor | None, Tensor | None]


class BackwardInputs(NamedTuple):
    """What a backward reads: the gradients of y and residual_out, and what the forward saved of its inputs and outputs."""

    dy: Tensor
    dresidual_out: Tensor | None
    x: Tensor  # what was normalized: residual_out where there was a residual
    weight: Tensor | None
    gate: Tensor | None
    rstd: Tensor


class Needs(NamedTuple):
    """Which gradients are needed; the others are not computed."""

    dx: bool = True
    dweight: bool = True
    dresidual: bool = False  # separately from dx: not where dx has its dtype and serves for both
    dgate: bool = False


class Gradients(NamedTuple):
    """What a backward returns, in the order of Inputs; None where it is not needed."""

    dx: Tensor | None
    dweight: Tensor | None
    dresidual: Tensor | None
    dgate: Tensor | None


def accumulation_dtype(*tensors: HasDtype | None) -> torch.dtype:
    """fp64 if any of the tensors is fp64, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def forward(inputs: Inputs, spec: Spec) -> Outputs:
    """y, rstd and x + residual, composed of differentiable operations in exactly this order of roundings.

    Args:
        inputs: x, any floating dtype, shape (*, *normalized_shape); weight, any floating dtype, shape normalized_shape, or None;
            residual, added to x before the norm, in its own dtype, shape of x, or None; gate, whose activation multiplies the input of
            the norm or its output, shape of x, or None.
        spec: everything that is not a tensor.
    """
    x, weight, residual, gate = inputs
    acc = accumulation_dtype(x, residual, gate)
    u = x.to(acc)
    residual_out = None
    if residual is not None:
        residual_out = (u + residual.to(acc)).to(residual.dtype).contiguous()
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
    return Outputs(y.to(spec.output_dtype(x, weight)).contiguous(), rstd.reshape(spec.rstd_shape(x.shape)), residual_out)


def backward(given: BackwardInputs, spec: Spec, x_dtype: torch.dtype | None = None) -> Gradients:
    """All gradients in closed form, from what was normalized and rstd.

    With wdy = w · dy and c1 = mean(x_hat · wdy),

        du = (wdy - c1 · x_hat) · rstd        dw = sum over rows of dy · x_hat

    where u is x, or x · g with g = activation(gate), in which case dx = du · g and dg = du · x. If g multiplies the output instead,
    dy · g takes the place of dy, and dg = dy · w · x_hat. The gradient that arrives at x + residual is added to du, which then is both
    dx and dresidual. Roundings of x_hat and rstd count as the identity, as autograd treats a cast.

    Args:
        given: gradients of the outputs, and what the forward saved.
        spec: everything that is not a tensor.
        x_dtype: dtype of dx; None: that of given.x. They differ where given.x is x + residual in the dtype of the residual.
    """
    dy, dresidual_out, x, weight, gate, rstd = given
    acc = accumulation_dtype(dy, x, gate)
    x_acc, dproduct = x.to(acc), dy.to(acc)  # dproduct: the gradient of w · x_hat
    rstd = rstd.to(acc).reshape(*x.shape[: -len(spec.normalized_shape)], spec.groups, 1)
    u, dgate = x_acc, None
    if gate is not None:
        g, slope = _activation_and_slope(gate.to(acc), spec)
        if not spec.norm_before_gate:
            u = x_acc * g
    x_hat = _x_hat(_grouped(u, spec), rstd, spec).reshape(x.shape)
    w = None if weight is None else _weight(weight, x_hat, spec)
    if gate is not None and spec.norm_before_gate:
        dgate = (dproduct * _round(x_hat if w is None else x_hat * w, spec.product_dtype(weight)) * slope).to(gate.dtype)
        dproduct = dproduct * g
    dweight = None
    if weight is not None:
        dweight = (dproduct * x_hat).reshape(-1, *weight.shape).sum(0, dtype=accumulation_dtype(x_hat, weight)).to(weight.dtype)
    wdy = _grouped(dproduct if w is None else dproduct * w, spec)
    c1 = (_grouped(x_hat, spec) * wdy).mean(-1, keepdim=True)
    du = ((wdy - c1 * _grouped(x_hat, spec)) * rstd).reshape(x.shape)
    dresidual = None
    if dresidual_out is not None:
        du = du + dresidual_out.to(acc)
        dresidual = du.to(x.dtype)
    if gate is not None and not spec.norm_before_gate:
        dgate = (du * x_acc * slope).to(gate.dtype)
        du = du * g
    return Gradients(du.to(x_dtype or x.dtype), dweight, dresidual, dgate)


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
