"""The operators `triton_rmsnorm::forward` and `::backward`, their fake implementations, and the autograd Function over them.

In plain eager mode the Function launches the kernels without a detour through the dispatcher; wherever something traces or intercepts
(torch.compile, export, fake tensors, subclasses, dispatch modes), it calls the operators.
"""

import torch
from torch import Tensor

from triton_rmsnorm import launch, reference
from triton_rmsnorm.reference import Spec

_SPEC = "SymInt[] normalized_shape, float eps, SymInt? group_size, float weight_offset, ScalarType? x_hat_dtype, ScalarType? rstd_dtype"

_library = torch.library.Library("triton_rmsnorm", "DEF")
_library.define(f"forward(Tensor x, Tensor? weight, {_SPEC}) -> (Tensor y, Tensor rstd)")
_library.define(
    f"backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, {_SPEC}, bool needs_dx, bool needs_dw) -> (Tensor dx, Tensor dw)"
)


def _forward(x, weight, *spec):
    return launch.forward(x, weight, _spec(spec))


def _backward(dy, x, weight, rstd, *spec_and_needs):
    *spec, needs_dx, needs_dw = spec_and_needs
    dx, dw = launch.backward(dy, x, weight, rstd, _spec(spec), needs_dx, needs_dw)
    # An operator returns tensors: an empty one stands for None.
    return x.new_empty(0) if dx is None else dx, x.new_empty(0) if dw is None else dw


def _fake_forward(x, weight, *spec):
    spec = _spec(spec)
    y = torch.empty(x.shape, dtype=spec.output_dtype(x.dtype, None if weight is None else weight.dtype), device=x.device)
    return y, torch.empty(spec.rstd_shape(x.shape), dtype=reference.accumulation_dtype(x.dtype), device=x.device)


def _fake_backward(dy, x, weight, rstd, *spec_and_needs):
    needs_dx, needs_dw = spec_and_needs[-2:]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_dx else x.new_empty(0)
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=x.device) if needs_dw and weight is not None else x.new_empty(0)
    return dx, dw


def _spec(fields) -> Spec:
    normalized_shape, *rest = fields
    return Spec(tuple(normalized_shape), *rest)


for _key in ("CPU", "CUDA"):
    _library.impl("forward", _forward, _key)
    _library.impl("backward", _backward, _key)
torch.library.register_fake("triton_rmsnorm::forward", _fake_forward, lib=_library)
torch.library.register_fake("triton_rmsnorm::backward", _fake_backward, lib=_library)


def _direct(*tensors: Tensor | None) -> bool:
    """Whether nothing but the kernels has to see the call."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(tensor is None or type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


class RMSNormFunction(torch.autograd.Function):
    """y from x and weight; saves x, weight and rstd. `apply(x, weight, spec)`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
        if _direct(x, weight):
            y, rstd = launch.forward(x, weight, spec)
        else:
            y, rstd = torch.ops.triton_rmsnorm.forward(x, weight, *spec)
        ctx.spec = spec
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, rstd = ctx.saved_tensors
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # create_graph: a gradient that is itself differentiable, composed of torch's operations
            dx, dw = reference.backward(dy, x, weight, reference.forward(x, weight, ctx.spec)[1], ctx.spec)
        elif _direct(dy, x, weight):
            dx, dw = launch.backward(dy, x, weight, rstd, ctx.spec, needs_dx, needs_dw)
        else:
            dx, dw = torch.ops.triton_rmsnorm.backward(dy, x, weight, rstd, *ctx.spec, needs_dx, needs_dw)
        return dx if needs_dx else None, dw if needs_dw else None, None
