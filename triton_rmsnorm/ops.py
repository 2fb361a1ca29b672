"""The operators `triton_rmsnorm::forward` and `::backward`, their fake implementations, and the autograd Function over them.

In plain eager mode the Function launches the kernels without a detour through the dispatcher; wherever something traces or intercepts
(torch.compile, export, fake tensors, subclasses, dispatch modes), it calls the operators.
"""

import torch
from torch import Tensor

from triton_rmsnorm import launch, reference
from triton_rmsnorm.reference import Spec, accumulation_dtype

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
    f"{_SPEC}) -> (Tensor dx, Tensor dresidual, Tensor dgate, Tensor dw)"
)


def _forward(x, weight, residual, gate, *spec):
    y, rstd, residual_out = launch.forward(x, weight, _spec(spec), residual, gate)
    return y, rstd, _or_empty(residual_out, x)


def _backward(dy, dresidual_out, x, weight, gate, rstd, x_dtype, needs, *spec):
    gradients = launch.backward(dy, x, weight, rstd, _spec(spec), gate, dresidual_out, x_dtype, launch.Needs(*needs))
    return tuple(_or_empty(gradient, x) for gradient in gradients)


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An operator returns tensors: an empty one stands for None."""
    return like.new_empty(0) if tensor is None else tensor


def _fake_forward(x, weight, residual, gate, *spec):
    spec = _spec(spec)
    y = torch.empty(x.shape, dtype=spec.output_dtype(x, weight), device=x.device)
    rstd = torch.empty(spec.rstd_shape(x.shape), dtype=accumulation_dtype(x, residual, gate), device=x.device)
    return y, rstd, x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)


def _fake_backward(dy, dresidual_out, x, weight, gate, rstd, x_dtype, needs, *spec):
    needs = launch.Needs(*needs)
    return (
        torch.empty(x.shape, dtype=x_dtype, device=x.device) if needs.dx else x.new_empty(0),
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs.dresidual else x.new_empty(0),
        torch.empty(x.shape, dtype=gate.dtype, device=x.device) if needs.dgate else x.new_empty(0),
        torch.empty(weight.shape, dtype=weight.dtype, device=x.device) if needs.dw and weight is not None else x.new_empty(0),
    )


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
    """y, or (y, x + residual) where there is a residual. Saves what the norm sees (x, or x + residual), the weight, the gate and rstd."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, residual: Tensor | None, gate: Tensor | None, spec: Spec):
        if _direct(x, weight, residual, gate):
            y, rstd, residual_out = launch.forward(x, weight, spec, residual, gate)
        else:
            y, rstd, residual_out = torch.ops.triton_rmsnorm.forward(x, weight, residual, gate, *spec)
        ctx.spec = spec
        ctx.x_dtype = x.dtype
        if residual is None:
            ctx.save_for_backward(x, weight, gate, rstd)
            return y
        ctx.save_for_backward(residual_out, weight, gate, rstd)
        return y, residual_out

    @staticmethod
    def backward(ctx, dy: Tensor, dresidual_out: Tensor | None = None):
        x, weight, gate, rstd = ctx.saved_tensors
        needs_dx, needs_dw, needs_dresidual, needs_dgate, _ = ctx.needs_input_grad
        shared = x.dtype == ctx.x_dtype  # dx serves for dresidual, too
        needs = launch.Needs(needs_dx or (needs_dresidual and shared), needs_dresidual and not shared, needs_dgate, needs_dw)
        if torch.is_grad_enabled():  # create_graph: gradients that are themselves differentiable, composed of torch's operations
            u_rstd = reference.forward(x, weight, ctx.spec, gate=gate)[1]
            dx, dresidual, dgate, dw = reference.backward(dy, x, weight, u_rstd, ctx.spec, gate, dresidual_out, ctx.x_dtype)
        elif _direct(dy, dresidual_out, x, weight, gate):
            dx, dresidual, dgate, dw = launch.backward(dy, x, weight, rstd, ctx.spec, gate, dresidual_out, ctx.x_dtype, needs)
        else:
            dx, dresidual, dgate, dw = torch.ops.triton_rmsnorm.backward(
                dy, dresidual_out, x, weight, gate, rstd, ctx.x_dtype, list(needs), *ctx.spec
            )
        if shared:
            dresidual = dx
        return (
            dx if needs_dx else None,
            dw if needs_dw else None,
            dresidual if needs_dresidual else None,
            dgate if needs_dgate else None,
            None,
        )
