"""Modules that call the functions: a drop-in for torch.nn.RMSNorm, and norms fused with a residual add or a gate."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from triton_rmsnorm import functional


class RMSNorm(torch.nn.RMSNorm):
    """A torch.nn.RMSNorm that runs the fused kernels, with the same constructor, attributes, repr and state_dict.

    y = weight · x · (mean(x²) + eps)^(-1/2), with the mean over the last dimensions, normalized_shape.

    Args:
        normalized_shape: int or sequence of ints, the last dimensions of the input.
        eps: added to the mean square; None means the machine epsilon of the arithmetic.
        elementwise_affine: whether there is a weight of shape normalized_shape, initially 1.
        device: the device of the weight.
        dtype: the dtype of the weight.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467); torch.nn.RMSNorm.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes x.

        Args:
            x: shape (*, *normalized_shape); the dtypes and layouts of input in rms_norm.

        Returns:
            y of the shape and dtype of x.

        Raises:
            TypeError: as in rms_norm.
            ValueError: as in rms_norm.
            RuntimeError: as in rms_norm.
            NotImplementedError: as in rms_norm.
        """
        if torch.jit.is_scripting():
            return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class _KnobbedRMSNorm(torch.nn.RMSNorm):
    """Base of the fused modules: stores the keyword options of a function and shows them in its repr."""

    _function: ClassVar[Callable[..., Any]]

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
        x = torch.empty(self.normalized_shape, device="meta")
        self._function(x, x, self.normalized_shape, x if elementwise_affine else None, eps, **knobs)  # without data: checks the options

    def reset_parameters(self) -> None:
        """Sets the weight to 1 - weight_offset, so that the norm multiplies by 1."""
        if self.weight is not None:
            torch.nn.init.constant_(self.weight, 1.0 - self.knobs.get("weight_offset", 0.0))

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *(f"{name}={value!r}" for name, value in self.knobs.items())])


class AddRMSNorm(_KnobbedRMSNorm):
    """Adds the input to the residual stream and normalizes the sum, like add_rms_norm.

    r' = x + r, y = weight · r' · (mean(r'²) + eps)^(-1/2)

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in RMSNorm.
        group_size, weight_offset, x_hat_dtype, rstd_dtype: as in add_rms_norm.

    Source: the pre-norm residual block, as in Llama (arXiv:2302.13971).
    """

    _function = staticmethod(functional.add_rms_norm)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Adds x to the residual and normalizes the sum.

        Args:
            x: shape (*, *normalized_shape); the dtypes of input in add_rms_norm.
            residual: r of the shape of x; the dtypes of residual in add_rms_norm.

        Returns:
            (y, r'), both of the shape of x: y in the dtype of x, r' in that of residual.

        Raises:
            TypeError: as in add_rms_norm.
            ValueError: as in add_rms_norm.
            RuntimeError: as in add_rms_norm.
            NotImplementedError: as in add_rms_norm.
        """
        return self._function(x, residual, self.normalized_shape, self.weight, self.eps, **self.knobs)


class RMSNormGated(_KnobbedRMSNorm):
    """RMSNorm with a gate before or after it, like rms_norm_gated.

    y = norm(x) · activation(gate) or y = norm(x · activation(gate))

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in RMSNorm.
        activation, norm_before_gate, group_size, weight_offset, x_hat_dtype, rstd_dtype: as in rms_norm_gated.

    Source: Dao and Gu, Transformers are SSMs (Mamba-2), 2024 (arXiv:2405.21060).
    """

    _function = staticmethod(functional.rms_norm_gated)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """Normalizes x and multiplies it by the activated gate, in either order.

        Args:
            x: shape (*, *normalized_shape); the dtypes of input in rms_norm_gated.
            gate: z of the shape of x; the dtypes of gate in rms_norm_gated.

        Returns:
            y of the shape and dtype of x.

        Raises:
            TypeError: as in rms_norm_gated.
            ValueError: as in rms_norm_gated.
            RuntimeError: as in rms_norm_gated.
            NotImplementedError: as in rms_norm_gated.
        """
        return self._function(x, gate, self.normalized_shape, self.weight, self.eps, **self.knobs)
