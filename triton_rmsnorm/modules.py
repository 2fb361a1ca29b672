"""Modules over the functions: torch.nn.RMSNorm's twin, and its fused neighbours."""

from typing import Any

import torch
from torch import Tensor

from triton_rmsnorm import functional


class RMSNorm(torch.nn.RMSNorm):
    """A torch.nn.RMSNorm over our kernels: the same constructor, attributes, repr and state_dict.

    y = weight · x · (mean(x²) + eps)^(-1/2), with the mean over the last dimensions, normalized_shape.

    Args:
        normalized_shape: int or sequence of ints, the last dimensions of the input.
        eps: added to the mean square, in the unit of x²; None is the machine epsilon of the arithmetic.
        elementwise_affine: whether there is a weight of shape normalized_shape, ones at first.
        device, dtype: of the weight.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467); torch.nn.RMSNorm.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes x.

        Args:
            x: shape (*, *normalized_shape); dtypes and layouts as input of rms_norm.

        Returns:
            y of the shape and dtype of x.

        Raises:
            As rms_norm.
        """
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
    """Adds to the residual stream and normalizes the sum, as add_rms_norm.

    r' = x + r, y = weight · r' · (mean(r'²) + eps)^(-1/2)

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in RMSNorm.
        group_size, weight_offset, x_hat_dtype, rstd_dtype: as in add_rms_norm.

    Source: the pre-norm residual block, as in Llama (arXiv:2302.13971).
    """

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Adds x to the residual and normalizes the sum.

        Args:
            x: shape (*, *normalized_shape); dtypes as input of add_rms_norm.
            residual: r of the shape of x; dtypes as in add_rms_norm.

        Returns:
            (y, r'), both of the shape of x: y in the dtype of x, r' in that of residual.

        Raises:
            As add_rms_norm.
        """
        return functional.add_rms_norm(x, residual, self.normalized_shape, self.weight, self.eps, **self.knobs)


class RMSNormGated(_KnobbedRMSNorm):
    """RMSNorm with a gate, after or before it, as rms_norm_gated.

    y = norm(x) · activation(gate) or y = norm(x · activation(gate))

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in RMSNorm.
        activation, norm_before_gate, group_size, weight_offset, x_hat_dtype, rstd_dtype: as in rms_norm_gated.

    Source: Dao and Gu, Transformers are SSMs (Mamba-2), 2024 (arXiv:2405.21060).
    """

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """Normalizes x and multiplies by the gate, in either order.

        Args:
            x: shape (*, *normalized_shape); dtypes as input of rms_norm_gated.
            gate: the shape of x; dtypes as in rms_norm_gated.

        Returns:
            y of the shape and dtype of x.

        Raises:
            As rms_norm_gated.
        """
        return functional.rms_norm_gated(x, gate, self.normalized_shape, self.weight, self.eps, **self.knobs)
