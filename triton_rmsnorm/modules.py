"""Modules over the functions: torch.nn.RMSNorm's twin, and its fused neighbours."""

from typing import Any

import torch
from torch import Tensor

from triton_rmsnorm import functional


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm over our kernels: the same constructor, attributes, repr and state_dict.

    y = weight · x · (mean(x²) + eps)^(-1/2), with the mean over the last dimensions, normalized_shape.

    Args:
        normalized_shape: int or sequence of ints, the last dimensions of the input.
        eps: added to the mean square; None is the machine epsilon of the arithmetic.
        elementwise_affine: whether there is a weight of shape normalized_shape, ones at first.
        device, dtype: of the weight.

    Shape: input (*, *normalized_shape), output the same.

    Source: torch.nn.RMSNorm; dtypes, layouts and errors as in rms_norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class _KnobbedRMSNorm(torch.nn.RMSNorm):
    """A norm with the knobs of rms_norm, of which those that are set show in its repr."""

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **knobs: Any,
    ) -> None:
        self.knobs = knobs  # before the base class fills the weight
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        """A factor of 1: weights of 1 - weight_offset."""
        if self.weight is not None:
            torch.nn.init.constant_(self.weight, 1.0 - self.knobs.get("weight_offset", 0.0))

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *(f"{name}={value!r}" for name, value in self.knobs.items())])


class AddRMSNorm(_KnobbedRMSNorm):
    """Adds to the residual stream and normalizes the sum: (x, residual) -> (y, residual + x), as add_rms_norm.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in RMSNorm.
        group_size, weight_offset, x_hat_dtype, rstd_dtype: keywords of add_rms_norm.

    Shape: x and residual (*, *normalized_shape), both outputs the same.

    Source: the pre-norm residual block, as in Llama (arXiv:2302.13971); dtypes and errors as in add_rms_norm.
    """

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return functional.add_rms_norm(x, residual, self.normalized_shape, self.weight, self.eps, **self.knobs)


class RMSNormGated(_KnobbedRMSNorm):
    """RMSNorm with a gate: (x, gate) -> norm(x) · activation(gate), or norm(x · activation(gate)), as rms_norm_gated.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in RMSNorm.
        activation, norm_before_gate, group_size, weight_offset, x_hat_dtype, rstd_dtype: keywords of rms_norm_gated.

    Shape: x and gate (*, *normalized_shape), the output the same.

    Source: Dao and Gu, Transformers are SSMs (Mamba-2), 2024 (arXiv:2405.21060); dtypes and errors as in rms_norm_gated.
    """

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return functional.rms_norm_gated(x, gate, self.normalized_shape, self.weight, self.eps, **self.knobs)
