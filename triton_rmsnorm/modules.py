"""Modules: what torch.nn has, over our functions."""

import torch
from torch import Tensor

from triton_rmsnorm.functional import rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm over our kernels: the same constructor, attributes, repr and state_dict.

    y = weight · x · (mean(x²) + eps)^(-1/2), with the mean over the last dimensions, normalized_shape.

    Args:
        normalized_shape: int or sequence of ints, the last dimensions of the input.
        eps: added to the mean square; None is the machine epsilon of the arithmetic.
        elementwise_affine: whether there is a weight of shape normalized_shape, ones at first.
        device, dtype: of the weight.

    Source: torch.nn.RMSNorm; see rms_norm for dtypes, layouts and errors.
    """

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)
