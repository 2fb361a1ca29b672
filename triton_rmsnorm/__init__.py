"""RMSNorm as fused Triton kernels, forward and backward, in place of torch.nn.RMSNorm."""

from triton_rmsnorm._version import __version__
from triton_rmsnorm.functional import rms_norm
from triton_rmsnorm.modules import RMSNorm

__all__ = ["RMSNorm", "__version__", "rms_norm"]
