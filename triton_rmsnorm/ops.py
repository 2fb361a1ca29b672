"""The operators `triton_rmsnorm::forward` and `::backward` with their fake implementations, and the autograd Functions around the kernels.

Three ways lead to the kernels, and `normalize` chooses:

    plain eager             RMSNormFunction, which launches them without a detour through the dispatcher
    traced or intercepted   the operators (torch.compile, export, fake tensors, DTensor, dispatch modes)
    torch.func              TransformableForward and TransformableBackward, with rules for vmap and higher derivatives

The operators are differentiable, too, by the latter two. Forward-mode derivatives, second derivatives and a batched weight are composed
of torch's operations, from `reference`.
"""

import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_rmsnorm import reference
from triton_rmsnorm.reference import Spec, accumulation_dtype
from triton_rmsnorm.runtime import launch
from triton_rmsnorm.runtime.launch import Needs

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
    gradients = launch.backward(dy, x, weight, rstd, _spec(spec), gate, dresidual_out, x_dtype, Needs(*needs))
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
    needs = Needs(*needs)
    return (
        torch.empty(x.shape, dtype=x_dtype, device=x.device) if needs.dx else x.new_empty(0),
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs.dresidual else x.new_empty(0),
        torch.empty(x.shape, dtype=gate.dtype, device=x.device) if needs.dgate else x.new_empty(0),
        torch.empty(weight.shape, dtype=weight.dtype, device=x.device) if needs.dw and weight is not None else x.new_empty(0),
    )


def _spec(fields) -> Spec:
    normalized_shape, *rest = fields
    return Spec(tuple(normalized_shape), *rest)


def _autograd_forward(x, weight, residual, gate, *spec):
    tensors = (x, weight, residual, gate)
    if _forward_mode(*tensors):
        y, rstd, residual_out = reference.forward(x, weight, _spec(spec), residual, gate)
        return y, rstd, _or_empty(residual_out, x)
    if _needs_grad(*tensors):
        y, rstd, *residual_out = TransformableForward.apply(*tensors, _spec(spec))
        return y, rstd, _or_empty(residual_out[0] if residual_out else None, x)
    if _direct(*tensors):  # another dispatch would cost as much as the one that led here
        return _forward(*tensors, *spec)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.triton_rmsnorm.forward(*tensors, *spec)


def _autograd_backward(dy, dresidual_out, x, weight, gate, rstd, x_dtype, needs, *spec):
    tensors = (dy, dresidual_out, x, weight, gate)
    if _forward_mode(*tensors):
        outputs = iter(_composed_backward(*tensors, _spec(spec), x_dtype, needs))
        return tuple(_or_empty(next(outputs) if needed else None, x) for needed in needs)
    if _needs_grad(*tensors):
        gradients = TransformableBackward.run(*tensors, rstd, _spec(spec), x_dtype, Needs(*needs))
        return tuple(_or_empty(gradient, x) for gradient in gradients)
    if _direct(*tensors):
        return _backward(*tensors, rstd, x_dtype, needs, *spec)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.triton_rmsnorm.backward(*tensors, rstd, x_dtype, needs, *spec)


_library.impl("forward", _autograd_forward, "Autograd")
_library.impl("backward", _autograd_backward, "Autograd")
for _key in ("CPU", "CUDA"):
    _library.impl("forward", _forward, _key)
    _library.impl("backward", _backward, _key)
torch.library.register_fake("triton_rmsnorm::forward", _fake_forward, lib=_library)
torch.library.register_fake("triton_rmsnorm::backward", _fake_backward, lib=_library)


def normalize(
    x: Tensor, weight: Tensor | None, spec: Spec, residual: Tensor | None = None, gate: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """y and x + residual (or None), differentiable in every argument; on a device that launch.runs_on."""
    tensors = (x, weight, residual, gate)
    transformed = torch._C._are_functorch_transforms_active()
    if _forward_mode(*tensors) or (transformed and (torch.compiler.is_compiling() or _functionalized())):
        y, _, residual_out = reference.forward(x, weight, spec, residual, gate)
    elif transformed:
        y, _, *outputs = TransformableForward.apply(*tensors, spec)
        residual_out = outputs[0] if outputs else None
    elif not _direct(*tensors):
        y, _, residual_out = _run_forward(*tensors, spec)
    elif not _needs_grad(*tensors):
        y, _, residual_out = launch.forward(x, weight, spec, residual, gate, needs_rstd=False)
    elif residual is None:
        y, residual_out = RMSNormFunction.apply(*tensors, spec), None
    else:
        y, residual_out = RMSNormFunction.apply(*tensors, spec)
    return y, residual_out


def _needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:  # here and in _direct, any() and all() would take longer
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _forward_mode(*tensors: Tensor | None) -> bool:
    """Whether one of them has a tangent; torch.func does not tell of which, so there all have."""
    return forward_ad._current_level >= 0 and (torch._C._are_functorch_transforms_active() or any(_has_tangent(t) for t in tensors))


def _functionalized() -> bool:
    """Whether torch.func.functionalize is around, which knows no autograd Functions."""
    return any(
        level.key() == torch._C._functorch.TransformType.Functionalize for level in torch._C._functorch.get_interpreter_stack() or ()
    )


def _has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def _direct(*tensors: Tensor | None) -> bool:
    """Whether nothing but the kernels has to see the call."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active():
        return False
    for tensor in tensors:  # noqa: SIM110
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return False
    return True


def _is_vmapped(tensor: Tensor | None) -> bool:
    """Whether torch.autograd.grad(..., is_grads_batched=True) is under way, which has a vmap of its own."""
    return tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor)


def _run_forward(x, weight, residual, gate, spec) -> tuple[Tensor, Tensor, Tensor | None]:
    if _direct(x, weight, residual, gate):
        return launch.forward(x, weight, spec, residual, gate)
    if "torch.distributed.tensor" in sys.modules:  # which takes half a second to import: not for those who do not use it
        from triton_rmsnorm import distributed

        distributed.register()
    y, rstd, residual_out = torch.ops.triton_rmsnorm.forward(x, weight, residual, gate, *spec)
    return y, rstd, None if residual is None else residual_out


def _run_backward(dy, dresidual_out, x, weight, gate, rstd, spec, x_dtype, needs) -> reference.Gradients:
    tensors = (dy, dresidual_out, x, weight, gate)
    if torch._C._are_functorch_transforms_active():
        return TransformableBackward.run(*tensors, rstd, spec, x_dtype, needs)
    if _direct(*tensors) and not _is_vmapped(dy) and not _is_vmapped(dresidual_out) and not _forward_mode(*tensors):
        if torch.is_grad_enabled():  # create_graph
            return TransformableBackward.run(*tensors, rstd, spec, x_dtype, needs)
        return launch.backward(dy, x, weight, rstd, spec, gate, dresidual_out, x_dtype, needs)
    gradients = torch.ops.triton_rmsnorm.backward(*tensors, rstd, x_dtype, list(needs), *spec)
    return reference.Gradients(*(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)))


def _gradients(ctx, dy, dresidual_out, x, weight, gate, rstd) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, residual, gate and spec, as far as ctx needs them."""
    if dy is None:  # only x + residual was used
        dy = x.new_zeros(()).expand(x.shape)
    needs_dx, needs_dw, needs_dresidual, needs_dgate, _ = ctx.needs_input_grad
    shared = x.dtype == ctx.x_dtype  # dx serves for dresidual, too
    needs = Needs(needs_dx or (needs_dresidual and shared), needs_dresidual and not shared, needs_dgate, needs_dw)
    dx, dresidual, dgate, dw = _run_backward(dy, dresidual_out, x, weight, gate, rstd, ctx.spec, ctx.x_dtype, needs)
    return dx if needs_dx else None, dw, (dx if shared else dresidual) if needs_dresidual else None, dgate, None


class RMSNormFunction(torch.autograd.Function):
    """y, or (y, x + residual) where there is a residual. Saves what is normalized (x, or x + residual), the weight, the gate and rstd."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, residual: Tensor | None, gate: Tensor | None, spec: Spec):
        y, rstd, residual_out = launch.forward(x, weight, spec, residual, gate)
        ctx.spec, ctx.x_dtype = spec, x.dtype
        ctx.set_materialize_grads(False)  # an output that is not used costs nothing
        ctx.save_for_backward(x if residual is None else residual_out, weight, gate, rstd)
        return y if residual is None else (y, residual_out)

    @staticmethod
    def backward(ctx, dy: Tensor | None, dresidual_out: Tensor | None = None):
        return _gradients(ctx, dy, dresidual_out, *ctx.saved_tensors)


class TransformableForward(torch.autograd.Function):
    """The same under torch.func, which asks that all that is saved be an input or an output: (y, rstd) or (y, rstd, x + residual)."""

    @staticmethod
    def forward(x, weight, residual, gate, spec):
        return _tensors(_run_forward(x, weight, residual, gate, spec))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, residual, gate, spec = inputs
        _, rstd, *residual_out = output
        ctx.spec, ctx.x_dtype = spec, x.dtype
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else residual_out[0], weight, gate, rstd)

    @staticmethod
    def backward(ctx, dy, _, dresidual_out=None):
        return _gradients(ctx, dy, dresidual_out, *ctx.saved_tensors)

    @staticmethod
    def vmap(info, in_dims, x, weight, residual, gate, spec):
        x_dim, weight_dim, residual_dim, gate_dim, _ = in_dims
        if weight_dim is not None:  # a weight for each sample is none for the kernels
            outputs = torch.func.vmap(_composed_forward, (x_dim, weight_dim, residual_dim, gate_dim, None))(x, weight, residual, gate, spec)
        else:  # samples are more rows
            x, residual, gate = (_batch(t, dim, info) for t, dim in ((x, x_dim), (residual, residual_dim), (gate, gate_dim)))
            outputs = TransformableForward.apply(x, weight, residual, gate, spec)
        return outputs, (0,) * len(outputs)


class TransformableBackward(torch.autograd.Function):
    """The gradients that are needed, as a tuple of tensors, and differentiable in turn: their own backward is composed."""

    @staticmethod
    def run(dy, dresidual_out, x, weight, gate, rstd, spec, x_dtype, needs) -> reference.Gradients:
        needs = needs._replace(dw=needs.dw and weight is not None)
        if not any(needs):
            return reference.Gradients(None, None, None, None)
        outputs = iter(TransformableBackward.apply(dy, dresidual_out, x, weight, gate, rstd, spec, x_dtype, needs))
        return reference.Gradients(*(next(outputs) if needed else None for needed in needs))

    @staticmethod
    def forward(dy, dresidual_out, x, weight, gate, rstd, spec, x_dtype, needs):
        return _tensors(_run_backward(dy, dresidual_out, x, weight, gate, rstd, spec, x_dtype, needs))

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, dresidual_out, x, weight, gate, _, *ctx.rest = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, dresidual_out, x, weight, gate)

    @staticmethod
    def backward(ctx, *cotangents):
        tensors = ctx.saved_tensors
        present = [i for i, tensor in enumerate(tensors) if tensor is not None]
        used = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        if not used:
            return (None,) * 9

        def composed(*arguments):
            filled = list(tensors)
            for i, argument in zip(present, arguments, strict=True):
                filled[i] = argument
            outputs = _composed_backward(*filled, *ctx.rest)
            return tuple(outputs[i] for i in used)

        _, pullback = torch.func.vjp(composed, *(tensors[i] for i in present))
        gradients = dict(zip(present, pullback(tuple(cotangents[i] for i in used)), strict=True))
        return *(gradients.get(i) for i in range(len(tensors))), None, None, None, None

    @staticmethod
    def vmap(info, in_dims, dy, dresidual_out, x, weight, gate, rstd, spec, x_dtype, needs):
        tensors, dims = (dy, dresidual_out, x, weight, gate), in_dims[:5]
        if dims[3] is not None:
            outputs = torch.func.vmap(lambda *batched: _composed_backward(*batched, spec, x_dtype, needs), dims)(*tensors)
            return outputs, (0,) * len(outputs)
        dy, dresidual_out, x, gate, rstd = (
            _batch(tensor, dim, info)
            for tensor, dim in ((dy, dims[0]), (dresidual_out, dims[1]), (x, dims[2]), (gate, dims[4]), (rstd, in_dims[5]))
        )
        rows = needs._replace(dw=False)
        outputs = _tensors(TransformableBackward.run(dy, dresidual_out, x, weight, gate, rstd, spec, x_dtype, rows))
        if needs.dw:  # one for each sample, where the kernels sum over all rows
            only_dw = Needs(dx=False, dw=True)
            outputs += torch.func.vmap(
                lambda dy, x, gate: _composed_backward(dy, None, x, weight, gate, spec, x_dtype, only_dw),
                (0, 0, None if gate is None else 0),
            )(dy, x, gate)
        return outputs, (0,) * len(outputs)


def _tensors(outputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(output for output in outputs if output is not None)


def _composed_forward(x, weight, residual, gate, spec) -> tuple[Tensor, ...]:
    return _tensors(reference.forward(x, weight, spec, residual, gate))


def _composed_backward(dy, dresidual_out, x, weight, gate, spec, x_dtype, needs) -> tuple[Tensor, ...]:
    """The gradients that are needed, by differentiable operations, with rstd as the function of x that it is."""
    rstd = reference.forward(x, weight, spec, gate=gate)[1]
    gradients = reference.backward(dy, x, weight, rstd, spec, gate, dresidual_out, x_dtype)
    return tuple(gradient for gradient, needed in zip(gradients, needs, strict=True) if needed)


def _batch(tensor: Tensor | None, dim: int | None, info) -> Tensor | None:
    """The tensor with its batch dimension first; expanded to one if it has none."""
    if tensor is None:
        return None
    return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
