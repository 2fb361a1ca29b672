"""An override for torchtitan: `--override.imports triton_rmsnorm.integrations.torchtitan.rms_norm`."""

from dataclasses import dataclass

from torchtitan.config import derive, override
from torchtitan.models.common.nn_modules import RMSNorm

from triton_rmsnorm import modules


class TritonRMSNorm(modules.RMSNorm, RMSNorm):
    """torchtitan's RMSNorm with our forward."""

    @dataclass(kw_only=True, slots=True)
    class Config(RMSNorm.Config):
        """The same fields; it builds the class around it."""


@override(target=RMSNorm.Config, exact=True, description="RMSNorm as fused Triton kernels")
def rms_norm(config: RMSNorm.Config) -> TritonRMSNorm.Config:
    """The configuration of our norm for one of torchtitan's."""
    return derive(config, TritonRMSNorm.Config)
