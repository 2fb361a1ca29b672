"""Ways to differentiate, transform and map a function of tensors: each of the function and of its tensors."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves
from variants import leaves, scalar


def ones(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.full_like(t, i + 1) for i, t in enumerate(tensors))


def every(tensors) -> tuple[int, ...]:
    return tuple(range(len(tensors)))


def gradients(f, tensors, **options) -> tuple[Tensor, ...]:
    return torch.autograd.grad(scalar(f)(*tensors), tensors, **options)


def double_backward(f, tensors):
    tensors = leaves(tensors)
    first = gradients(f, tensors, create_graph=True)
    return first, torch.autograd.grad(sum(t.cos().sum() for t in first), tensors)


def triple_backward(f, tensors):
    tensors = leaves(tensors)
    first = gradients(f, tensors, create_graph=True)
    second = torch.autograd.grad(sum(t.cos().sum() for t in first), tensors, create_graph=True)
    return torch.autograd.grad(sum(t.sin().sum() for t in second), tensors)


def batched_gradients(f, tensors, create_graph=False):
    """By is_grads_batched, with four gradients of every output."""
    tensors = leaves(tensors)
    ys = tree_leaves(f(*tensors))
    directions = [torch.stack([torch.full_like(y, scale).cumsum(-1).cos() for scale in range(4)]) for y in ys]
    first = torch.autograd.grad(ys, tensors, directions, is_grads_batched=True, create_graph=create_graph)
    return (first, torch.autograd.grad(sum(t.cos().sum() for t in first), tensors)) if create_graph else first


def dual(f, tensors, tangents):
    """Outputs and tangents of dual tensors; a tangent that is None is none."""
    with forward_ad.dual_level():
        duals = [t if tangent is None else forward_ad.make_dual(t, tangent) for t, tangent in zip(tensors, tangents, strict=True)]
        return [tuple(forward_ad.unpack_dual(y)) for y in tree_leaves(f(*duals))]


def dual_of_dy(f, tensors):
    """Only the gradient that arrives has a tangent; the forward knows of none."""
    tensors = leaves(tensors)
    y = tree_leaves(f(*tensors))[0]
    return dual(lambda dy: torch.autograd.grad(y, tensors, dy, allow_unused=True), [torch.ones_like(y).cumsum(-1)], [torch.ones_like(y)])


def grad_of_grad(f, tensors):
    def slopes(*args: Tensor) -> Tensor:
        return sum(t.cos().sum() for t in grad(scalar(f), every(tensors))(*args))

    return grad(slopes, every(tensors))(*tensors)


Transform = Callable[[Callable, Any], Any]
TRANSFORMS: dict[str, Transform] = {
    "backward": lambda f, tensors: gradients(f, leaves(tensors)),
    "double_backward": double_backward,
    "triple_backward": triple_backward,
    "batched_gradients": batched_gradients,
    "batched_gradients_create_graph": lambda f, tensors: batched_gradients(f, tensors, create_graph=True),
    "dual": lambda f, tensors: dual(f, tensors, ones(tensors)),
    "dual_without_grad": lambda f, tensors: torch.no_grad()(dual)(f, tensors, ones(tensors)),
    "dual_of_gradients": lambda f, tensors: dual(lambda *duals: gradients(f, duals), leaves(tensors), ones(tensors)),
    "dual_of_dy": dual_of_dy,
    "dual_of_func_grad": lambda f, tensors: dual(grad(scalar(f), every(tensors)), tensors, ones(tensors)),
    "jvp": lambda f, tensors: jvp(f, tuple(tensors), ones(tensors)),
    "grad": lambda f, tensors: grad(scalar(f), every(tensors))(*tensors),
    "vjp": lambda f, tensors: (lambda y, pullback: pullback(y))(*vjp(f, *tensors)),
    "jacrev": lambda f, tensors: jacrev(f, every(tensors))(*tensors),
    "jacfwd": lambda f, tensors: jacfwd(f, every(tensors))(*tensors),
    "hessian": lambda f, tensors: hessian(scalar(f), every(tensors))(*tensors),
    "grad_of_grad": grad_of_grad,
    "jvp_of_grad": lambda f, tensors: jvp(grad(scalar(f), every(tensors)), tuple(tensors), ones(tensors)),
    "grad_of_jvp": lambda f, tensors: grad(scalar(lambda *args: jvp(f, args, ones(args))[1]), every(tensors))(*tensors),
    "functionalize": lambda f, tensors: functionalize(f)(*tensors),
    "functionalize_of_grad": lambda f, tensors: functionalize(grad(scalar(f), every(tensors)))(*tensors),
    "functional_hessian": lambda f, tensors: torch.autograd.functional.hessian(scalar(f), tuple(tensors), vectorize=True),
    "functional_jacobian": lambda f, tensors: torch.autograd.functional.jacobian(
        f, tuple(tensors), vectorize=True, strategy="forward-mode"
    ),
}
# The same with the dimensions of a batch.
VMAPPED: dict[str, Callable[[Callable, Any, tuple], Any]] = {
    "vmap": lambda f, tensors, in_dims: vmap(f, in_dims)(*tensors),
    "chunks": lambda f, tensors, in_dims: vmap(f, in_dims, chunk_size=2)(*tensors),
    "vmap_of_grad": lambda f, tensors, in_dims: vmap(grad(scalar(f), every(tensors)), in_dims)(*tensors),
    "vmap_of_jvp": lambda f, tensors, in_dims: vmap(lambda *args: jvp(f, args, ones(args)), in_dims)(*tensors),
    "vmap_of_hessian": lambda f, tensors, in_dims: vmap(hessian(scalar(f)), in_dims)(*tensors),
    "grad_of_vmap": lambda f, tensors, in_dims: grad(scalar(vmap(f, in_dims)), every(tensors))(*tensors),
    "jvp_of_vmap": lambda f, tensors, in_dims: jvp(vmap(f, in_dims), tuple(tensors), ones(tensors)),
    "backward_through_vmap": lambda f, tensors, in_dims: gradients(vmap(f, in_dims), leaves(tensors)),
    "double_backward_through_vmap": lambda f, tensors, in_dims: double_backward(vmap(f, in_dims), tensors),
    "backward_through_vmap_of_grad": lambda f, tensors, in_dims: gradients(vmap(grad(scalar(f), every(tensors)), in_dims), leaves(tensors)),
}
