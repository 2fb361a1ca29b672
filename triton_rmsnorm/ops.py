"""The operators `triton_rmsnorm::forward` and `::backward` with their fake implementations, and the way that a call takes.

`normalize` decides:

    torch's own     where the kernels are unavailable: on other devices, while torch.jit traces, and in torch.onnx.export
    composed        forward-mode derivatives, and torch.func inside torch.compile: torch's operations, from `reference`
    torch.func      TransformableForward and TransformableBackward, with rules for vmap and higher derivatives
    operator        traced or intercepted: torch.compile, export, fake tensors, DTensor, dispatch modes
    direct          plain eager: RMSNormFunction, or without a gradient the kernels themselves

The operators are differentiable, too, by the Transformable Functions.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_rmsnorm import reference
from triton_rmsnorm.autograd import (
    RMSNormFunction,
    TransformableBackward,
    TransformableForward,
    call_forward,
    composed_backward,
    has_tangent,
    is_direct,
    needs_grad,
)
from triton_rmsnorm.reference import BackwardInputs, Gradients, Inputs, InputTuple, Needs, OutputTuple, Spec, accumulation_dtype
from triton_rmsnorm.runtime import launch, plan

_SPEC = (
    "SymInt[] normalized_shape, float eps, SymInt? group_size, float weight_offset, ScalarType? x_hat_dtype, ScalarType? rstd_dtype, "
    "str? activation, bool norm_before_gate"
)

_library = torch.library.Library("triton_rmsnorm", "DEF")
_library.define(
    f"forward(Tensor x, Tensor? weight, Tensor? residual, Tensor? gate, {_SPEC}) -> (Tensor y, Tensor rstd, Tensor residual_out)"
)
_library.define(
    "backward(Tensor dy, Tensor? dresidual_out, Tensor x, Tensor? weight, Tensor? gate, Tensor rstd, ScalarType x_dtype, bool[] needs, "
    f"{_SPEC}) -> (Tensor dx, Tensor dweight, Tensor dresidual, Tensor dgate)"
)


def normalize(inputs: InputTuple, spec: Spec) -> OutputTuple:
    """y and x + residual, differentiable in every input; rstd is there or not, whichever is cheaper."""
    try:
        if not launch.runs_on(inputs[0]) or torch._C._get_tracing_state() is not None:
            return _torchs_own(inputs, spec)
        if torch._C._are_functorch_transforms_active():
            if forward_ad._current_level >= 0 or torch.compiler.is_compiling() or is_inside("Functionalize"):  # it knows no Functions
                return reference.forward(Inputs(*inputs), spec)
            return TransformableForward.run(inputs, spec)
        if forward_ad._current_level >= 0 and has_tangent(inputs):
            return reference.forward(Inputs(*inputs), spec)
        if not is_direct(inputs):
            return _by_operator(inputs, spec)
        if not needs_grad(inputs):
            return plan.forward(inputs, spec, needs_rstd=False)
        return RMSNormFunction.run(inputs, spec)
    except RuntimeError:
        usable = tuple(None if tensor is None else _usable(tensor) for tensor in inputs)
        if all(now is before for now, before in zip(usable, inputs, strict=True)):
            raise
    return normalize(usable, spec)  # type: ignore[arg-type] # as many as before


def _usable(tensor: Tensor) -> Tensor:
    """A copy of a tensor from inference_mode, which autograd cannot save; what a wrapper of torch.func holds that has outlived it."""
    if tensor.is_inference():
        return tensor if torch.is_inference_mode_enabled() else tensor.clone()  # a clone made there would be another one
    return torch._C._functorch.unwrap_if_dead(tensor)


def _by_operator(inputs: InputTuple, spec: Spec) -> OutputTuple:
    """The operator, where the tensors and ONNX know it."""
    if "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export():
        return _torchs_own(inputs, spec)
    try:
        return call_forward(inputs, spec)
    except TypeError as error:
        if "__torch_dispatch__" not in str(error):
            raise
        return _torchs_own(inputs, spec)  # subclasses that know only torch's operators, MaskedTensor for example


def _torchs_own(inputs: InputTuple, spec: Spec) -> OutputTuple:
    """Torch's operator where it has one for `spec`, else composed of its operations."""
    x, weight, residual, _ = inputs
    if residual is None and spec.is_plain:
        # Not F.rms_norm, in whose place a program may have put ours.
        return torch.rms_norm(x, spec.normalized_shape, weight, spec.eps), None, None
    return reference.forward(Inputs(*inputs), spec)


def is_inside(transform: str) -> bool:
    """Whether torch.func's "Functionalize" or "Vmap" is around."""
    return any(level.key().name == transform for level in torch._C._functorch.get_interpreter_stack() or ())


def _to_operator(results: tuple[Tensor | None, ...], x: Tensor) -> tuple[Tensor, ...]:
    """An operator returns tensors: an empty one stands for None."""
    return tuple(x.new_empty(0) if result is None else result for result in results)


def _spec(fields: tuple) -> Spec:
    normalized_shape, *rest = fields
    return Spec(tuple(normalized_shape), *rest)


def _forward(x: Tensor, weight: Tensor | None, residual: Tensor | None, gate: Tensor | None, *spec: Any) -> tuple[Tensor, ...]:
    return _to_operator(plan.forward((x, weight, residual, gate), _spec(spec)), x)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    given, x_dtype, needs, spec = _backward_arguments(arguments)
    return _to_operator(plan.backward(given, spec, x_dtype, needs), given.x)


def _backward_arguments(arguments: tuple) -> tuple[BackwardInputs, torch.dtype, Needs, Spec]:
    given, needs = BackwardInputs(*arguments[:6]), Needs(*arguments[7])
    return given, arguments[6], needs._replace(dweight=needs.dweight and given.weight is not None), _spec(arguments[8:])


def _fake_forward(x: Tensor, weight: Tensor | None, residual: Tensor | None, gate: Tensor | None, *fields: Any) -> tuple[Tensor, ...]:
    spec = _spec(fields)
    y = torch.empty(x.shape, dtype=spec.output_dtype(x, weight), device=x.device)
    rstd = torch.empty(spec.rstd_shape(x.shape), dtype=accumulation_dtype(x, residual, gate), device=x.device)
    residual_out = None if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    return _to_operator((y, rstd, residual_out), x)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    (_, _, x, weight, gate, _), x_dtype, needs, _ = _backward_arguments(arguments)
    gradients = Gradients(
        torch.empty(x.shape, dtype=x_dtype, device=x.device) if needs.dx else None,
        torch.empty(weight.shape, dtype=weight.dtype, device=x.device) if needs.dweight and weight is not None else None,
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs.dresidual else None,
        torch.empty(x.shape, dtype=gate.dtype, device=x.device) if needs.dgate and gate is not None else None,
    )
    return _to_operator(gradients, x)


def _autograd_forward(x: Tensor, weight: Tensor | None, residual: Tensor | None, gate: Tensor | None, *fields: Any) -> tuple[Tensor, ...]:
    inputs = Inputs(x, weight, residual, gate)
    if has_tangent(inputs):
        return _to_operator(reference.forward(inputs, _spec(fields)), x)
    if needs_grad(inputs):
        return _to_operator(TransformableForward.run(inputs, _spec(fields)), x)
    if is_direct(inputs):  # another dispatch would cost as much as the one that led here
        return _forward(*inputs, *fields)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.triton_rmsnorm.forward(*inputs, *fields)


def _autograd_backward(*arguments: Any) -> tuple[Tensor, ...]:
    given, x_dtype, needs, spec = _backward_arguments(arguments)
    differentiable = given[:5]  # rstd is a function of x
    if has_tangent(differentiable):
        outputs = iter(composed_backward(differentiable, spec, x_dtype, needs))
        return _to_operator(Gradients(*(next(outputs) if needed else None for needed in needs)), given.x)
    if needs_grad(differentiable):
        return _to_operator(TransformableBackward.run(given, spec, x_dtype, needs), given.x)
    if is_direct(differentiable):
        return _backward(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.triton_rmsnorm.backward(*arguments)


_library.impl("forward", _autograd_forward, "Autograd")
_library.impl("backward", _autograd_backward, "Autograd")
for _key in ("CPU", "CUDA"):
    _library.impl("forward", _forward, _key)
    _library.impl("backward", _backward, _key)
torch.library.register_fake("triton_rmsnorm::forward", _fake_forward, lib=_library)
torch.library.register_fake("triton_rmsnorm::backward", _fake_backward, lib=_library)
