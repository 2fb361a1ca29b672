"""The configuration for transformers' `use_kernels`."""

import copy
from typing import Any

from kernels.layer.globals import _KERNEL_MAPPING
from transformers import KernelConfig
from transformers.integrations.hub_kernels import get_kernel_mapping_transformers
from transformers.utils.kernel_config import infer_device

from triton_rmsnorm.integrations import kernel_mapping
from triton_rmsnorm.patching import patch


class TritonKernelConfig(KernelConfig, dict):
    """A KernelConfig that patches the model it is given to, and then leaves its norms to what was patched.

    It is an empty dict because training arguments that contain it are written as JSON.
    """

    def create_compatible_mapping(self, model: Any, compile: bool = False) -> None:
        """Gives the model a mapping of its own, so that this configuration may serve other models."""
        own = model.kernel_config = copy.copy(self)
        super(TritonKernelConfig, own).create_compatible_mapping(model, compile)
        registered = {} if own.inherit_mapping else _registered(infer_device(model))
        own.kernel_mapping = registered | kernel_mapping() | own.kernel_mapping
        patch(model)


def _registered(device: str) -> dict[str, Any]:
    """The layers for a device that are registered; none where transformers' own mapping registered them, which points to the Hub."""
    own = {(name, getattr(on, "type", on)) for name, devices in get_kernel_mapping_transformers().items() for on in devices}
    mapping: dict[str, Any] = {}
    for name, devices in _KERNEL_MAPPING.get().items():
        repositories = devices[device].repos if device in devices and (name, device) not in own else None
        mapping[name] = {device: repositories} if repositories else {}
    return mapping
