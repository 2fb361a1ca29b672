"""The functions that users call: checks, and the choice between the kernels and torch."""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function_variadic

from triton_rmsnorm import reference
from triton_rmsnorm.ops import is_inside, normalize
from triton_rmsnorm.reference import Spec

_PLAIN = (Tensor, Parameter)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    group_size: int | None = None,
    weight_offset: float = 0.0,
    x_hat_dtype: torch.dtype | None = None,
    rstd_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Divides by the root mean square over the last dimensions, like torch.nn.functional.rms_norm, fused in forward and backward.

    .. math:: y = \gamma \cdot x \cdot (\operatorname{mean}(x^2) + \epsilon)^{-1/2}

    All arithmetic is in fp32 (fp64 for fp64 input), with one rounding at the end.

    Args:
        input: x of shape (*, *normalized_shape); fp16, bf16, fp32 or fp64, in any layout. Rows with contiguous elements are read in place.
            Complex input is computed by torch.
        normalized_shape: the last dimensions, over which the mean is taken.
        weight: gamma of shape normalized_shape, in any of the dtypes above; None means 1.
        eps: added to the mean square; None means the machine epsilon of the arithmetic (that of fp64 for fp64 input, otherwise of fp32).
        group_size: normalizes each group of this many columns separately; the weight keeps its full shape. None means one group.
        weight_offset: added to the weight in fp32: 1.0 gives y = (1 + gamma) x_hat. Requires a weight.
        x_hat_dtype: rounds the normalized x to this dtype before the multiplication by the weight; y then has the dtype of that product.
            None means no rounding, and y has the dtype of x.
        rstd_dtype: rounds (mean(x^2) + eps)^(-1/2) to this dtype before it is multiplied by x. None means no rounding.

    Returns:
        y of the shape of input, contiguous (channels_last for channels_last input).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: input has fewer dimensions than normalized_shape, group_size does not divide the normalized size, or weight_offset is
            given without a weight.
        RuntimeError: normalized_shape is empty or does not match input or weight, or weight is on another device.
        NotImplementedError: input or weight has a dtype that is not listed above.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467); torch.nn.functional.rms_norm.
    """
    if has_torch_function_variadic(input, weight):
        options = _set_options(group_size=group_size, weight_offset=weight_offset, x_hat_dtype=x_hat_dtype, rstd_dtype=rstd_dtype)
        return handle_torch_function(rms_norm, (input, weight), input, normalized_shape, weight, eps, **options)
    spec = _checked(input, normalized_shape, weight, eps, group_size, weight_offset, x_hat_dtype, rstd_dtype)
    if input.layout is not torch.strided or input.is_complex():
        return _by_torch(input, weight, eps, spec)
    if _AUTOCAST and input.is_cuda and torch.is_autocast_enabled("cuda"):
        input, weight = _autocast(input, weight)
    y, _, _ = normalize((input, weight, None, None), spec)
    return _channels_last(input, y) if input.dim() in (4, 5) else y


if hasattr(torch.jit, "_builtins"):  # TorchScript is deprecated
    torch.jit._builtins._register_builtin(rms_norm, "aten::rms_norm")  # what torch.jit.script makes of a call


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    group_size: int | None = None,
    weight_offset: float = 0.0,
    x_hat_dtype: torch.dtype | None = None,
    rstd_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Adds the input to the residual stream and normalizes the sum, in one pass over memory in each direction.

    .. math:: r' = x + r, \qquad y = \gamma \cdot r' \cdot (\operatorname{mean}(r'^2) + \epsilon)^{-1/2}

    Args:
        input: x of shape (*, *normalized_shape); fp16, bf16, fp32 or fp64.
        residual: r of the same shape, in any of these dtypes; for example an fp32 stream with bf16 activations.
        normalized_shape: as in rms_norm.
        weight: as in rms_norm.
        eps: as in rms_norm.
        group_size: as in rms_norm.
        weight_offset: as in rms_norm.
        x_hat_dtype: as in rms_norm.
        rstd_dtype: as in rms_norm.

    Returns:
        (y, r'): y in the dtype of input (with x_hat_dtype, in that of the product); r' in the dtype of residual, to which it is rounded
        before it is normalized.

    Raises:
        TypeError: as in rms_norm, also for residual.
        ValueError: as in rms_norm.
        RuntimeError: as in rms_norm, or input and residual differ in shape or device.
        NotImplementedError: as in rms_norm, also for residual and for complex input.

    Source: the pre-norm residual block, as in Llama (arXiv:2302.13971).
    """
    if has_torch_function_variadic(input, residual, weight):
        options = _set_options(group_size=group_size, weight_offset=weight_offset, x_hat_dtype=x_hat_dtype, rstd_dtype=rstd_dtype)
        return handle_torch_function(add_rms_norm, (input, residual, weight), input, residual, normalized_shape, weight, eps, **options)
    of_spec = (group_size, weight_offset, x_hat_dtype, rstd_dtype)
    spec = _checked(input, normalized_shape, weight, eps, *of_spec, beside=("residual", residual))
    y, _, residual_out = normalize((input, weight, residual, None), spec)
    assert residual_out is not None
    return y, residual_out


def rms_norm_gated(
    input: Tensor,
    gate: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: str = "silu",
    norm_before_gate: bool = True,
    group_size: int | None = None,
    weight_offset: float = 0.0,
    x_hat_dtype: torch.dtype | None = None,
    rstd_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""RMSNorm with a gate before or after it, fused in forward and backward.

    .. math:: y = \operatorname{norm}(x) \cdot g \quad\text{or}\quad y = \operatorname{norm}(x \cdot g), \qquad g = \sigma(z)

    Args:
        input: x of shape (*, *normalized_shape); fp16, bf16, fp32 or fp64.
        gate: z of the same shape, in any of these dtypes. Like input, it is read in place where rows are contiguous, so both may be slices
            of one projection.
        normalized_shape: as in rms_norm.
        weight: as in rms_norm.
        eps: as in rms_norm.
        activation: "silu", "sigmoid", "gelu", "gelu_tanh" or "relu"; computed in fp32 (fp64 for fp64 input).
        norm_before_gate: True for norm(x) · g (Qwen3-Next), False for norm(x · g) (Mamba2).
        group_size: as in rms_norm.
        weight_offset: as in rms_norm.
        x_hat_dtype: as in rms_norm. If the gate is after the norm, the product of weight and normalized x is rounded to its dtype before it
            is multiplied by the gate.
        rstd_dtype: as in rms_norm.

    Returns:
        y in the dtype of input (with x_hat_dtype and the gate before the norm, in that of the product).

    Raises:
        TypeError: as in rms_norm, also for gate.
        ValueError: as in rms_norm, or activation is not one of those above.
        RuntimeError: as in rms_norm, or input and gate differ in shape or device.
        NotImplementedError: as in rms_norm, also for gate and for complex input.

    Source: Dao and Gu, Transformers are SSMs (Mamba-2), 2024 (arXiv:2405.21060).
    """
    if has_torch_function_variadic(input, gate, weight):
        options = _set_options(group_size=group_size, weight_offset=weight_offset, x_hat_dtype=x_hat_dtype, rstd_dtype=rstd_dtype)
        options |= {"activation": activation, "norm_before_gate": norm_before_gate}
        return handle_torch_function(rms_norm_gated, (input, gate, weight), input, gate, normalized_shape, weight, eps, **options)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}")
    if type(norm_before_gate) is not bool:
        raise TypeError(f"norm_before_gate must be a bool, got {norm_before_gate!r}")
    of_spec = (group_size, weight_offset, x_hat_dtype, rstd_dtype, activation, norm_before_gate)
    spec = _checked(input, normalized_shape, weight, eps, *of_spec, beside=("gate", gate))
    y, _, _ = normalize((input, weight, None, gate), spec)
    return y


def _set_options(*, weight_offset: float, **options: Any) -> dict[str, Any]:
    """The options that are set: what overrides torch's rms_norm knows none of them."""
    if type(weight_offset) is not float or weight_offset != 0.0:
        options["weight_offset"] = weight_offset
    return {name: value for name, value in options.items() if value is not None or name == "weight_offset"}


def _by_torch(input: Tensor, weight: Tensor | None, eps: float | None, spec: Spec) -> Tensor:
    """Complex input and jagged nested tensors: torch's operator, which has none of the options. Other layouts are an error."""
    if not spec.is_plain:
        _check_dtype("input", input.dtype)
        _check_layout("input", input.layout)
    try:
        return torch.rms_norm(input, spec.normalized_shape, weight, eps)
    except RuntimeError as error:
        if input.layout in (torch.strided, torch.jagged):
            raise
        raise type(error)(f"input must have layout torch.strided or torch.jagged, got {input.layout}") from error


def _channels_last(input: Tensor, output: Tensor) -> Tensor:
    """The output in the memory format of the input, which is what torch keeps of its layout.

    Vmap knows no memory formats, and where torch.jit traces, torch's own operator has kept it.
    """
    if input.stride(1) != 1 or torch._C._get_tracing_state() is not None:
        return output
    if torch._C._are_functorch_transforms_active() and (torch.compiler.is_compiling() or is_inside("Vmap")):
        return output
    return output.contiguous(memory_format=suggest_memory_format(input))


def _checked(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    *options: Any,
    beside: tuple[str, Tensor] | None = None,
) -> Spec:
    """The Spec of a call whose arguments fit one another; raises what torch raises where they do not.

    `options` are further fields of Spec. `beside` is the name and the tensor of a residual or a gate, which has to fit the input; complex
    input is not accepted then.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    if type(normalized_shape) is not tuple and not isinstance(normalized_shape, Sequence):
        raise TypeError(f"normalized_shape must be a tuple of ints, got {normalized_shape!r}")
    for size in normalized_shape:
        if type(size) is not int:
            normalized_shape = _sizes(normalized_shape)
            break
    if weight is not None and not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a Tensor or None, got {type(weight).__name__}")
    if eps is not None and type(eps) is not float:
        eps = _number(eps, "eps must be a float or None")
    if type(options[1]) is not float or (options[0] is not None and type(options[0]) is not int):
        group_size, weight_offset, *rest = options
        weight_offset = _number(weight_offset, "weight_offset must be a float")
        if group_size is not None and (group_size := _integer(given := group_size)) is None:
            raise TypeError(f"group_size must be an int or None, got {given!r}")
        options = (group_size, weight_offset, *rest)
    if (tracing := torch._C._get_tracing_state()) is not None:  # sizes would be traced tensors
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            return _checked(input, [int(size) for size in normalized_shape], weight, eps, *options, beside=beside)
        finally:
            torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
    x_key = (input.shape, input.dtype, input.device, input.layout)
    weight_key = None if weight is None else (weight.shape, weight.dtype, weight.device, weight.layout)
    if type(input) not in _PLAIN or torch.compiler.is_compiling():  # sizes may be symbolic
        spec = _fit(x_key, weight_key, tuple(normalized_shape), eps, beside is not None, *options)
    else:
        spec = _cached_fit(x_key, weight_key, tuple(normalized_shape), eps, beside is not None, *options)
    if beside is not None:
        _check_beside(*beside, input)
    return spec


class _Metadata(NamedTuple):
    """The metadata of a tensor that a check depends on."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout


_MetadataKey = tuple[torch.Size, torch.dtype, torch.device, torch.layout]  # quicker to make than a _Metadata


def _fit(
    x_key: _MetadataKey, weight_key: _MetadataKey | None, normalized_shape: tuple[int, ...], eps: float | None, real: bool, *options: Any
) -> Spec:
    """The checks that need only the metadata of input and weight; `real`: complex input is not accepted."""
    x, weight = _Metadata(*x_key), None if weight_key is None else _Metadata(*weight_key)
    ndim, got = len(normalized_shape), (*x.shape,)
    # After the semicolon: the phrases of torch's own messages, for what looks for them.
    if ndim == 0:
        raise RuntimeError(
            "normalized_shape must have at least one dimension, got (); Expected normalized_shape to be at least 1-dimensional, i.e., "
            "containing at least one element"
        )
    if len(got) < ndim:
        raise ValueError(f"input must have at least {ndim} dimensions to match normalized_shape {normalized_shape}, got {len(got)}")
    if got[-ndim:] != normalized_shape:
        sizes = ", ".join(map(str, normalized_shape))
        raise RuntimeError(
            f"input must have shape (*, {sizes}), got {got}; Given normalized_shape=[{sizes}], expected input with shape [*, {sizes}], "
            f"but got input of size[{', '.join(map(str, got))}]"
        )
    if weight is not None:
        if (*weight.shape,) != normalized_shape:
            raise RuntimeError(
                f"weight must have shape {normalized_shape} to match normalized_shape, got {(*weight.shape,)}; Expected weight to be of "
                "same shape as normalized_shape"
            )
        if weight.device != x.device:
            raise RuntimeError(f"weight must be on the device of input, {x.device}, got {weight.device}")
    spec = Spec(normalized_shape, torch.finfo(reference.accumulation_dtype(x)).eps if eps is None else eps, *options)
    if weight is None and spec.weight_offset != 0.0:
        raise ValueError(f"weight_offset must be 0 without a weight, got {spec.weight_offset}")
    if real or not x.dtype.is_complex:  # last, as in torch
        _check_dtype("input", x.dtype)
        if weight is not None:
            _check_dtype("weight", weight.dtype)
    if weight is not None:
        _check_layout("weight", weight.layout)
    if real:
        _check_layout("input", x.layout)
    for name in ("x_hat_dtype", "rstd_dtype"):
        dtype = getattr(spec, name)
        if not isinstance(dtype, torch.dtype | None):
            raise TypeError(f"{name} must be a torch.dtype or None, got {type(dtype).__name__}")
        if dtype is not None:
            _check_dtype(name, dtype)
    size = prod(normalized_shape)
    if spec.group_size is not None and (spec.group_size < 1 or size % spec.group_size):
        raise ValueError(f"group_size must divide the normalized size {size}, got {spec.group_size}")
    return spec


_cached_fit = lru_cache(maxsize=4096)(_fit)


def _check_beside(name: str, tensor: Tensor, input: Tensor) -> None:
    """A residual or a gate has to fit the input."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.shape != input.shape:
        raise RuntimeError(f"{name} must have the shape of input, {(*input.shape,)}, got {(*tensor.shape,)}")
    if tensor.device != input.device:
        raise RuntimeError(f"{name} must be on the device of input, {input.device}, got {tensor.device}")
    _check_dtype(name, tensor.dtype)
    _check_layout(name, tensor.layout)


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise NotImplementedError(f"{name} must be float16, bfloat16, float32 or float64, got {dtype}")


def _check_layout(name: str, layout: torch.layout) -> None:
    if layout is not torch.strided:
        raise NotImplementedError(f"{name} must have layout torch.strided, got {layout}")


def _sizes(normalized_shape: Sequence[Any]) -> tuple[Any, ...]:
    """The same as ints, or as what stands for ints while torch compiles or traces."""
    sizes = tuple(map(_integer, normalized_shape))
    if any(size is None for size in sizes):
        raise TypeError(f"normalized_shape must be a tuple of ints, got {normalized_shape!r}")
    return sizes


def _integer(size: Any) -> Any:
    """An int, or what stands for one while torch compiles or traces; None if `size` is something else."""
    if isinstance(size, torch.SymInt):
        return size
    if isinstance(size, Tensor) and size.dim() == 0:
        if torch._C._get_tracing_state() is not None:
            return size
        size = size.item()
    return int(size) if isinstance(size, Integral) and not isinstance(size, bool) else None


def _number(value: Any, message: str) -> Any:
    """A float, or what stands for one while torch compiles. Equal keys of a cache then have one type, and no tensor is a key."""
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value
    if isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad:
        value = value.item()
    if isinstance(value, Real) or (torch.compiler.is_compiling() and not isinstance(value, Tensor) and getattr(value, "shape", None) == ()):
        return float(value)  # what stands for a NumPy number while torch compiles is an array
    raise TypeError(f"{message}, got {type(value).__name__}")


# From 2.12 on, torch computes RMSNorm in fp32 under CUDA autocast, and returns fp32.
_AUTOCAST = torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")


def _autocast(input: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Casts as the running torch does before its own operator; fp64 is exempt."""
    half = (torch.float16, torch.bfloat16)
    return input.float() if input.dtype in half else input, weight.float() if weight is not None and weight.dtype in half else weight
