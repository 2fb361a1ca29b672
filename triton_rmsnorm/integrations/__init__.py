"""What other frameworks call; each of them is imported when it is asked for."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["kernel_config", "kernel_mapping"]


def kernel_mapping() -> dict[str, dict[str, Any]]:
    """Our layers for "RMSNorm", "RMSNormGated" and "RMSNormZeroCentered", as a mapping for the `kernels` package.

    Each module runs what `patch` would replace it by, or else its class's own forward, in training, in evaluation and compiled. Nothing is
    downloaded.

    Returns:
        A mapping for `kernels.register_kernel_mapping` or `kernels.use_kernel_mapping`, for the devices "cuda", "rocm" and "cpu".
    """
    from triton_rmsnorm.integrations.layers import LAYERS, Repository  # decorates for torch.compile, which imports all of it

    return {name: dict.fromkeys(("cuda", "rocm", "cpu"), Repository(layer)) for name, layer in LAYERS.items()}


def kernel_config(kernel_mapping: dict[str, Any] | None = None, *, use_local_kernel: bool = False, inherit_mapping: bool = False) -> Any:
    """A configuration with which transformers' `use_kernels=True` replaces norms as `patch` does, and fetches nothing from a hub.

    Each norm computes and rounds as its class does. It stays replaced in training and evaluation, in copies and after torch.save. One
    configuration may serve several models.

    Args:
        kernel_mapping: other layers, as for transformers' KernelConfig; what it names is taken from there, also a norm.
        use_local_kernel: as for KernelConfig, about kernel_mapping.
        inherit_mapping: also take other layers from transformers' own mapping, which fetches them from the Hugging Face Hub. Layers that
            were registered in other ways are taken in any case.

    Returns:
        A transformers.KernelConfig: `AutoModelForCausalLM.from_pretrained(name, use_kernels=True, kernel_config=kernel_config())`.

    Raises:
        ImportError: transformers has no KernelConfig, or the `kernels` package has no version that fits it.
    """
    try:
        from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION, is_kernels_available
    except ImportError as error:
        raise ImportError(f"transformers must be 5.22 or later for kernel_config, got {_installed('transformers')}") from error
    if not is_kernels_available():
        raise ImportError(
            f"kernels must be >={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION} for transformers {_installed('transformers')}, "
            f"got {_installed('kernels')}; transformers 5.22.2 and kernels 0.17.2 fit"
        )
    from triton_rmsnorm.integrations.transformers import TritonKernelConfig

    return TritonKernelConfig(kernel_mapping, use_local_kernel=use_local_kernel, inherit_mapping=inherit_mapping)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
