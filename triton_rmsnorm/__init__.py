"""RMSNorm as fused Triton kernels, forward and backward, in place of torch.nn.RMSNorm."""

import sys

from triton_rmsnorm._version import __version__
from triton_rmsnorm.functional import add_rms_norm, rms_norm, rms_norm_gated
from triton_rmsnorm.integrations import kernel_config, kernel_mapping
from triton_rmsnorm.modules import AddRMSNorm, RMSNorm, RMSNormGated
from triton_rmsnorm.patching import patch, patched, replacement, unpatch
from triton_rmsnorm.recompute import recompute_norms
from triton_rmsnorm.runtime import autotune, launch
from triton_rmsnorm.runtime.autotune import autotuning

__all__ = [
    "AddRMSNorm",
    "RMSNorm",
    "RMSNormGated",
    "__version__",
    "add_rms_norm",
    "autotune",
    "autotuning",
    "kernel_config",
    "kernel_mapping",
    "patch",
    "patched",
    "recompute_norms",
    "rms_norm",
    "rms_norm_gated",
    "unpatch",
]

# The names that these modules had before they moved into rooms, for programs that import them by those.
sys.modules |= {f"{__name__}.launch": launch, f"{__name__}.replacement": replacement}
