"""The autograd Functions around the kernels, and around the operators where something has to see them.

torch.library.custom_op with register_autograd does not serve here: torch.func.grad refuses it for want of a setup_context staticmethod
(torch 2.13). Forward-mode derivatives, second derivatives and a batched weight are composed of torch's operations, from `reference`.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_rmsnorm import recompute, reference
from triton_rmsnorm.reference import BackwardInputs, Gradients, Inputs, InputTuple, Needs, OutputTuple, Spec
from triton_rmsnorm.runtime import plan

Tensors = tuple[Tensor | None, ...]
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


class RMSNormFunction(torch.autograd.Function):
    """y, or (y, x + residual), for plain eager. Saves what is normalized (x, or x + residual), the weight, the gate and rstd."""

    @staticmethod
    def run(inputs: InputTuple, spec: Spec) -> OutputTuple:
        outputs = _apply(*inputs, spec)
        return (outputs, None, None) if inputs[2] is None else (outputs[0], None, outputs[1])

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, residual: Tensor | None, gate: Tensor | None, spec: Spec) -> Any:
        y, rstd, residual_out = plan.forward((x, weight, residual, gate), spec)
        ctx.spec, ctx.x_dtype = spec, x.dtype
        ctx.set_materialize_grads(False)  # an output that is not used costs nothing
        saved = x if residual is None else residual_out, weight, gate, rstd
        ctx.save_for_backward(*saved)
        ctx.recipe = recompute.remember(y, saved, spec) if recompute.active else None
        if residual is not None and not (x.requires_grad or residual.requires_grad):  # the weight has no part in the sum
            ctx.mark_non_differentiable(residual_out)
        return y if residual is None else (y, residual_out)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dresidual_out: Tensor | None = None) -> Tensors:
        ctx.recipe = None
        return _gradients(ctx, dy, dresidual_out)


# Without the part of Function.apply that is for torch.func, which never comes this way.
_apply = super(torch.autograd.Function, RMSNormFunction).apply


class TransformableForward(torch.autograd.Function):
    """The same for torch.func and for the operator: (y, rstd) or (y, rstd, x + residual).

    torch.func requires that everything saved is an input or an output.
    """

    @staticmethod
    def run(inputs: InputTuple, spec: Spec) -> OutputTuple:
        y, rstd, *residual_out = TransformableForward.apply(*inputs, spec)
        return y, rstd, residual_out[0] if residual_out else None

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, residual: Tensor | None, gate: Tensor | None, spec: Spec) -> tuple[Tensor, ...]:
        return _present(run_forward((x, weight, residual, gate), spec))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, weight, residual, gate, spec = inputs
        _, rstd, *residual_out = output
        ctx.spec, ctx.x_dtype = spec, x.dtype
        summed = residual is not None and (ctx.needs_input_grad[0] or ctx.needs_input_grad[2])
        ctx.mark_non_differentiable(rstd, *(() if summed else residual_out))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else residual_out[0], weight, gate, rstd)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None, dresidual_out: Tensor | None = None) -> Tensors:
        return _gradients(ctx, dy, dresidual_out)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, x: Tensor, weight: Tensor | None, residual: Tensor | None, gate: Tensor | None, spec: Spec
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        x_dim, weight_dim, residual_dim, gate_dim, _ = in_dims
        if weight_dim is not None:  # the kernels read one weight for all rows
            composed = torch.func.vmap(lambda *tensors: _present(reference.forward(Inputs(*tensors), spec)), in_dims[:4])
            outputs = composed(x, weight, residual, gate)
        else:  # samples are more rows
            tensors = _batched(x, x_dim, info), weight, _batched(residual, residual_dim, info), _batched(gate, gate_dim, info)
            outputs = TransformableForward.apply(*tensors, spec)
        return outputs, (0,) * len(outputs)


class TransformableBackward(torch.autograd.Function):
    """The gradients that are needed, as a tuple of tensors, and differentiable in turn: their own backward is composed."""

    @staticmethod
    def run(given: BackwardInputs, spec: Spec, x_dtype: torch.dtype, needs: Needs) -> Gradients:
        needs = needs._replace(dweight=needs.dweight and given.weight is not None)
        if not any(needs):
            return Gradients(None, None, None, None)
        gradients = iter(TransformableBackward.apply(*given, spec, x_dtype, needs))
        return Gradients(*(next(gradients) if needed else None for needed in needs))

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *given, spec, x_dtype, needs = arguments
        return _present(run_backward(BackwardInputs(*given), spec, x_dtype, needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        dy, dresidual_out, x, weight, gate, _, *ctx.rest = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, dresidual_out, x, weight, gate)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Tensors:
        tensors, (spec, x_dtype, needs) = ctx.saved_tensors, ctx.rest
        present = [i for i, tensor in enumerate(tensors) if tensor is not None]
        used = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        if not used:
            return (None,) * 9

        def composed(*arguments: Tensor) -> tuple[Tensor, ...]:
            filled = dict(enumerate(tensors)) | dict(zip(present, arguments, strict=True))
            outputs = composed_backward(tuple(filled.values()), spec, x_dtype, needs)
            return tuple(outputs[i] for i in used)

        with _without_hooks():
            pullback = torch.func.vjp(composed, *(tensors[i] for i in present))[1]
            gradients = dict(zip(present, pullback(tuple(cotangents[i] for i in used)), strict=True))
        return *(gradients.get(i) for i in range(len(tensors))), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        *tensors, spec, x_dtype, needs = arguments
        weight, weight_dim = tensors[3], in_dims[3]
        if weight_dim is not None:
            composed = torch.func.vmap(lambda *some: composed_backward(some, spec, x_dtype, needs), in_dims[:5])
            outputs = composed(*tensors[:5])
            return outputs, (0,) * len(outputs)
        batched = [_batched(tensor, dim, info) for tensor, dim in zip(tensors, in_dims, strict=False)]
        batched[3] = weight
        gradients = TransformableBackward.run(BackwardInputs(*batched), spec, x_dtype, needs._replace(dweight=False))
        if needs.dweight:  # one for each sample, where the kernels sum over all rows
            dy, _, x, _, gate, _ = batched
            (dweight,) = torch.func.vmap(
                lambda dy, x, gate: composed_backward((dy, None, x, weight, gate), spec, x_dtype, Needs(dx=False)),
                (0, 0, None if gate is None else 0),
            )(dy, x, gate)
            gradients = gradients._replace(dweight=dweight)
        outputs = _present(gradients)
        return outputs, (0,) * len(outputs)


def run_forward(inputs: InputTuple, spec: Spec) -> OutputTuple:
    """The kernels, or the operator where something has to see it; all that is left to do inside of a Function."""
    return plan.forward(inputs, spec) if is_direct(inputs) else call_forward(inputs, spec)


def run_backward(given: BackwardInputs, spec: Spec, x_dtype: torch.dtype, needs: Needs) -> Gradients:
    """The gradients that are needed.

    Where they will be differentiated in turn, this goes through TransformableBackward, whose forward comes here again, one level of
    torch.func further down, or with gradients disabled (create_graph), until nothing but the kernels or the operator is left.
    """
    if torch._C._are_functorch_transforms_active():
        return TransformableBackward.run(given, spec, x_dtype, needs)
    if not is_direct(given) or _is_vmapped(given) or has_tangent(given):
        return from_operator(torch.ops.triton_rmsnorm.backward(*given, x_dtype, list(needs), *spec), needs)
    if torch.is_grad_enabled():  # create_graph
        return TransformableBackward.run(given, spec, x_dtype, needs)
    return plan.backward(given, spec, x_dtype, needs)


def _gradients(ctx: Any, dy: Tensor | None, dresidual_out: Tensor | None) -> Tensors:
    """The gradients of x, weight, residual, gate and spec, as far as ctx needs them."""
    needs_dx, needs_dweight, needs_dresidual, needs_dgate, _ = ctx.needs_input_grad
    if dy is None and not _is_autograd_compiled():  # only the sum was used: the weight has no gradient, not one of zeros
        dx = dresidual_out.to(ctx.x_dtype) if needs_dx and dresidual_out is not None else None
        return dx, None, dresidual_out if needs_dresidual else None, None, None
    x, weight, gate, rstd = ctx.saved_tensors
    if dy is None:  # compiled autograd takes no None where a gradient is needed
        dy = x.new_zeros(()).expand(x.shape)
    shared = x.dtype == ctx.x_dtype  # dx serves for dresidual, too
    needs = Needs(needs_dx or (needs_dresidual and shared), needs_dweight, needs_dresidual and not shared, needs_dgate)
    given = BackwardInputs(dy, dresidual_out, x, weight, gate, rstd)
    dx, dweight, dresidual, dgate = run_backward(given, ctx.spec, ctx.x_dtype, needs)
    return dx if needs_dx else None, dweight, (dx if shared else dresidual) if needs_dresidual else None, dgate, None


def _is_autograd_compiled() -> bool:
    module: Any = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and module.in_compiled_autograd_region


def composed_backward(differentiable: tuple[Any, ...], spec: Spec, x_dtype: torch.dtype, needs: Needs) -> tuple[Tensor, ...]:
    """The gradients that are needed, by differentiable operations: of BackwardInputs without rstd, which is a function of x."""
    dy, dresidual_out, x, weight, gate = differentiable
    rstd = reference.forward(Inputs(x, weight, gate=gate), spec).rstd
    assert rstd is not None
    gradients = reference.backward(BackwardInputs(dy, dresidual_out, x, weight, gate, rstd), spec, x_dtype)
    return tuple(gradient for gradient, needed in zip(gradients, needs, strict=True) if needed and gradient is not None)


def call_forward(inputs: InputTuple, spec: Spec) -> OutputTuple:
    """The operator triton_rmsnorm::forward."""
    if "torch.distributed.tensor" in sys.modules:  # which takes half a second to import: not for those who do not use it
        from triton_rmsnorm import distributed

        distributed.register()
    y, rstd, residual_out = torch.ops.triton_rmsnorm.forward(*inputs, *spec)
    return y, rstd, None if inputs[2] is None else residual_out


def from_operator(gradients: tuple[Tensor, ...], needs: Needs) -> Gradients:
    """An operator returns tensors: an empty one stands for None."""
    return Gradients(*(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)))


def needs_grad(tensors: Tensors) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:  # here and in is_direct, any() and all() would take longer
            if tensor is not None and tensor.requires_grad:
                return True
    return False


@contextmanager
def _without_hooks() -> Iterator[None]:
    """Without hooks for saved tensors, which torch.func refuses."""
    hooks = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def is_direct(tensors: Tensors) -> bool:
    """Whether nothing but the kernels has to see the call: plain tensors, no tracing, no dispatch mode, no torch.func."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active():
        return False
    for tensor in tensors:  # noqa: SIM110
        if tensor is not None and type(tensor) not in _PLAIN:
            return False
    return True


def has_tangent(tensors: Tensors) -> bool:
    """Whether any tensor carries a forward-mode tangent. Inside torch.func this cannot be seen per tensor, so there it is assumed."""
    return forward_ad._current_level >= 0 and (
        torch._C._are_functorch_transforms_active() or any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    )


def _is_vmapped(given: BackwardInputs) -> bool:
    """Whether torch.autograd.grad(..., is_grads_batched=True) is under way, which has its own vmap."""
    legacy = torch._C._functorch.is_legacy_batchedtensor
    return legacy(given.dy) or (given.dresidual_out is not None and legacy(given.dresidual_out))


def _present(tensors: Tensors) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)


def _batched(tensor: Tensor | None, dim: int | None, info: Any) -> Any:
    """The tensor with its batch dimension first; expanded to one if it has none."""
    if tensor is None:
        return None
    return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
