"""Derivatives of every order and mode, and vmap: as torch has them of its own RMSNorm, in fp64."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from variants import FUNCTIONS, VARIANTS, N, Variant, leaves, scalar

from triton_rmsnorm import RMSNorm, add_rms_norm, rms_norm
from triton_rmsnorm.testing import draw

SHAPE = (2, 3, N)
pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def variant(request) -> Variant:
    return request.param


@pytest.fixture(params=FUNCTIONS.values(), ids=FUNCTIONS)
def function(request) -> Variant:
    return request.param


def assert_same(ours, theirs) -> None:
    """Equal trees of fp64 tensors, but for the order of a sum; None only where torch has None."""
    ours, theirs = map(tree_leaves, (ours, theirs))
    assert [t is None for t in ours] == [t is None for t in theirs]
    for our, their in zip(ours, theirs, strict=True):
        if our is not None:
            torch.testing.assert_close(our, their, rtol=1e-10, atol=1e-10)


def test_gradcheck(variant, device):
    tensors = [t.requires_grad_() for t in variant.draw((3, N) if variant.ndim == 2 else (2, N), torch.float64, device)]
    assert gradcheck(variant.ours, tensors, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


def test_gradgradcheck(function, device):
    tensors = [t.requires_grad_() for t in function.draw((1, N), torch.float64, device)]
    assert gradgradcheck(function.ours, tensors, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


def ones(tensors) -> tuple[Tensor, ...]:
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


def directions(y: Tensor) -> Tensor:
    """Four gradients of y, batched."""
    return torch.stack([torch.full_like(y, scale).cumsum(-1).cos() for scale in range(4)])


def batched_gradients(f, tensors, create_graph=False):
    tensors = leaves(tensors)
    ys = f(*tensors) if isinstance(f(*tensors), tuple) else (f(*tensors),)
    first = torch.autograd.grad(ys, tensors, tuple(map(directions, ys)), is_grads_batched=True, create_graph=create_graph)
    if not create_graph:
        return first
    return first, torch.autograd.grad(sum(t.cos().sum() for t in first), tensors)


def dual(f, tensors, tangents):
    """Outputs and tangents of dual tensors; a tangent that is None is none."""
    with forward_ad.dual_level():
        duals = [t if tangent is None else forward_ad.make_dual(t, tangent) for t, tangent in zip(tensors, tangents, strict=True)]
        return [tuple(forward_ad.unpack_dual(y)) for y in tree_leaves(f(*duals))]


def dual_of_gradients(f, tensors):
    """Forward over reverse: the inputs have tangents, too."""
    return dual(lambda *duals: gradients(f, duals), leaves(tensors), ones(tensors))


def dual_of_dy(f, tensors):
    """Only the gradient that arrives has a tangent; the forward knows of none."""
    tensors = leaves(tensors)
    y = tree_leaves(f(*tensors))[0]
    return dual(lambda dy: torch.autograd.grad(y, tensors, dy, allow_unused=True), [torch.ones_like(y).cumsum(-1)], [torch.ones_like(y)])


def through_vmap(f, tensors, in_dims):
    """Plain autograd from outside of a vmap."""
    tensors = leaves(tensors)
    return gradients(vmap(f, in_dims), tensors)


TRANSFORMS = {
    "double_backward": double_backward,
    "triple_backward": triple_backward,
    "batched_gradients": batched_gradients,
    "batched_gradients_create_graph": lambda f, tensors: batched_gradients(f, tensors, create_graph=True),
    "dual": lambda f, tensors: dual(f, tensors, ones(tensors)),
    "dual_of_leaves": lambda f, tensors: dual(f, leaves(tensors), ones(tensors)),
    "dual_without_grad": lambda f, tensors: torch.no_grad()(dual)(f, tensors, ones(tensors)),
    "dual_of_gradients": dual_of_gradients,
    "dual_of_dy": dual_of_dy,
    "dual_of_func_grad": lambda f, tensors: dual(grad(scalar(f), every(tensors)), tensors, ones(tensors)),
    "jvp": lambda f, tensors: jvp(f, tuple(tensors), ones(tensors)),
    "linearize": lambda f, tensors: linearize(f, *tensors)[1](*ones(tensors)),
    "grad": lambda f, tensors: grad(scalar(f), every(tensors))(*tensors),
    "vjp": lambda f, tensors: (lambda y, pullback: pullback(y))(*vjp(f, *tensors)),
    "jacrev": lambda f, tensors: jacrev(f, every(tensors))(*tensors),
    "jacfwd": lambda f, tensors: jacfwd(f, every(tensors))(*tensors),
    "hessian": lambda f, tensors: hessian(scalar(f), every(tensors))(*tensors),
    "jacrev_of_jacrev": lambda f, tensors: jacrev(jacrev(scalar(f)), every(tensors))(*tensors),
    "grad_of_grad": lambda f, tensors: grad(
        lambda *args: sum(t.cos().sum() for t in grad(scalar(f), every(tensors))(*args)), every(tensors)
    )(*tensors),
    "jvp_of_grad": lambda f, tensors: jvp(grad(scalar(f), every(tensors)), tuple(tensors), ones(tensors)),
    "grad_of_jvp": lambda f, tensors: grad(scalar(lambda *args: jvp(f, args, ones(args))[1]), every(tensors))(*tensors),
    "functionalize": lambda f, tensors: functionalize(f)(*tensors),
    "functionalize_of_grad": lambda f, tensors: functionalize(grad(scalar(f), every(tensors)))(*tensors),
    "functional_hessian": lambda f, tensors: torch.autograd.functional.hessian(scalar(f), tuple(tensors)),
    "functional_hessian_vectorized": lambda f, tensors: torch.autograd.functional.hessian(scalar(f), tuple(tensors), vectorize=True),
    "functional_jacobian_vectorized": lambda f, tensors: torch.autograd.functional.jacobian(f, tuple(tensors), vectorize=True),
    "functional_jacobian_forward": lambda f, tensors: torch.autograd.functional.jacobian(
        f, tuple(tensors), vectorize=True, strategy="forward-mode"
    ),
}


# All variants for one transform of each kind: reverse twice, forward, torch.func. One of each function for the others.
TRANSFORMED = [
    (name, variant)
    for name in TRANSFORMS
    for variant in (VARIANTS if name in ("double_backward", "dual_of_gradients", "vjp", "jacfwd") else FUNCTIONS)
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "variant"), TRANSFORMED)
def test_transform(name, variant, device):
    variant, transform = VARIANTS[variant], TRANSFORMS[name]
    tensors = variant.draw(SHAPE, torch.float64, device)
    assert_same(transform(variant.ours, tensors), transform(variant.theirs, tensors))


def test_dual_of_one_argument(variant, device):
    """Each argument on its own: its tangent is not lost because the others have none."""
    tensors = variant.draw(SHAPE, torch.float64, device)
    for at in every(tensors):
        tangents = [torch.ones_like(t) if i == at else None for i, t in enumerate(tensors)]
        ours, theirs = (dual(f, tensors, tangents) for f in (variant.ours, variant.theirs))
        assert ours[0][1] is not None
        assert_same(ours, theirs)


VMAPPED = {
    "vmap": lambda f, tensors, in_dims: vmap(f, in_dims)(*tensors),
    "chunks": lambda f, tensors, in_dims: vmap(f, in_dims, chunk_size=2)(*tensors),
    "vmap_of_grad": lambda f, tensors, in_dims: vmap(grad(scalar(f), every(tensors)), in_dims)(*tensors),
    "vmap_of_jvp": lambda f, tensors, in_dims: vmap(lambda *args: jvp(f, args, ones(args)), in_dims)(*tensors),
    "vmap_of_hessian": lambda f, tensors, in_dims: vmap(hessian(scalar(f)), in_dims)(*tensors),
    "grad_of_vmap": lambda f, tensors, in_dims: grad(scalar(vmap(f, in_dims)), every(tensors))(*tensors),
    "jvp_of_vmap": lambda f, tensors, in_dims: jvp(vmap(f, in_dims), tuple(tensors), ones(tensors)),
    "backward_through_vmap": through_vmap,
    "double_backward_through_vmap": lambda f, tensors, in_dims: double_backward(vmap(f, in_dims), tensors),
    "backward_through_vmap_of_grad": lambda f, tensors, in_dims: gradients(vmap(grad(scalar(f), every(tensors)), in_dims), leaves(tensors)),
}
# Which tensors have the batch, where: (tensors of rows, weight).
BATCHED = {"rows": (0, None), "rows_at_1": (1, None), "rows_at_-1": (-1, None), "weight": (None, 0), "both": (0, 0), "both_apart": (1, -1)}


@pytest.mark.parametrize("dims", BATCHED.values(), ids=BATCHED)
@pytest.mark.parametrize("transform", VMAPPED.values(), ids=VMAPPED)
def test_vmap(function, transform, dims, device):
    tensors = function.draw((4, *SHAPE[1:]), torch.float64, device)
    tensors = [
        tensor if dim is None else torch.stack([tensor * scale for scale in (1, 0.5, -2)], dim)
        for tensor, dim in zip(tensors, function.per_argument(*dims), strict=True)
    ]
    in_dims = function.per_argument(*dims)
    assert_same(transform(function.ours, tensors, in_dims), transform(function.theirs, tensors, in_dims))


@pytest.mark.parametrize("transform", VMAPPED.values(), ids=VMAPPED)
@pytest.mark.parametrize("name", ["residual", "gate", "gate_first"])
def test_vmap_of_one_of_two(name, transform, device):
    """x has a batch, the residual or the gate has none; and the other way round."""
    variant = VARIANTS[name]
    x, weight, other = variant.draw(SHAPE, torch.float64, device)
    many = torch.stack([x, x * 0.5, -2 * x])
    for tensors, in_dims in (((many, weight, other), (0, None, None)), ((other, weight, many), (None, None, 0))):
        assert_same(transform(variant.ours, tensors, in_dims), transform(variant.theirs, tensors, in_dims))


def test_nested_vmap(variant, device):
    """Batches of x and of the weight on levels of their own."""
    tensors = (
        variant.draw((4, 3, *SHAPE), torch.float64, device) if variant.ndim == 1 else variant.draw((4, 3, 2, 3, N), torch.float64, device)
    )
    rows = variant.per_argument(0, None)

    def twice(f):
        return vmap(vmap(f, rows), rows)(*tensors)

    assert_same(twice(variant.ours), twice(variant.theirs))
    if variant.weight_at is None:
        return
    weights = torch.stack([tensors[variant.weight_at], tensors[variant.weight_at] + 1])
    tensors[variant.weight_at] = weights
    outer = tuple(0 if i == variant.weight_at else None for i in every(tensors))

    def crossed(f):
        return vmap(vmap(f, rows), outer)(*tensors)

    assert_same(crossed(variant.ours), crossed(variant.theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_samples_are_rows(dtype, device):
    """What vmap over x makes is bit for bit what the kernels make of the samples one by one: y and dx; and dw in first order."""
    x, weight, dy = draw((5, 7, 128), dtype, device), draw((128,), torch.float32, device), draw((7, 128), dtype, device)

    def single(x):
        y, pullback = vjp(lambda x, w: rms_norm(x, (128,), w), x, weight)
        return y, *pullback(dy)

    y, dx, dw = vmap(single)(x)
    leaf, parameter = leaves((x, weight))
    for i in range(5):
        alone = rms_norm(leaf[i], (128,), parameter)
        assert torch.equal(y[i], alone)
        leaf.grad = parameter.grad = None
        alone.backward(dy)
        assert torch.equal(dx[i], leaf.grad[i])
        torch.testing.assert_close(dw[i], parameter.grad)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32, torch.float32), (torch.float32, torch.bfloat16, torch.float64)], ids=str
)
@pytest.mark.parametrize("in_dims", [(0, None, 0), (0, 0, 0), (0, None, None)], ids=str)
def test_dtypes_under_vmap(in_dims, dtypes, device):
    """Each output and gradient has the dtype that it has without vmap, whichever way computes it."""
    x, weight, residual = (draw(shape, dtype, device) for shape, dtype in zip(((4, N), (N,), (4, N)), dtypes, strict=True))

    def all_of_it(x, weight, residual):
        outputs, pullback = vjp(lambda *args: add_rms_norm(args[0], args[2], (N,), args[1]), x, weight, residual)
        return outputs, pullback(outputs)

    alone = tree_leaves(all_of_it(x, weight, residual))
    tensors = [t if dim is None else t.expand(3, *t.shape) for t, dim in zip((x, weight, residual), in_dims, strict=True)]
    batched = tree_leaves(vmap(all_of_it, in_dims)(*tensors))
    for one, many in zip(alone, batched, strict=True):
        assert one.dtype == many.dtype and many.shape == (3, *one.shape)
        torch.testing.assert_close(many, one.expand_as(many), rtol=2e-2 if one.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_only_the_sum_has_a_gradient(device):
    """y is not used, or x + residual is not: the other's gradient is all there is."""
    x, weight, residual = VARIANTS["residual"].draw(SHAPE, torch.float64, device)
    for used in (0, 1):
        tensors = leaves((x, weight, residual))
        ours, theirs = VARIANTS["residual"].ours(*tensors)[used], VARIANTS["residual"].theirs(*tensors)[used]
        results = [torch.autograd.grad(y.square().sum(), tensors, allow_unused=True, materialize_grads=True) for y in (ours, theirs)]
        assert_same(*results)


def test_gradient_penalty_trains_the_weight(device):
    """A loss with the norm of its own gradient: in every parameter's gradient."""
    torch.manual_seed(0)
    net = torch.nn.Linear(N, 1, dtype=torch.float64, device=device)
    x, weight = VARIANTS["plain"].draw((5, N), torch.float64, device)

    def trained(norm):
        parameters = leaves((weight, *net.parameters()))
        x_leaf = x.detach().requires_grad_()
        loss = F.linear(norm(x_leaf, parameters[0]), *parameters[1:]).sigmoid().sum()
        (slope,) = torch.autograd.grad(loss, x_leaf, create_graph=True)
        (loss + (slope.norm(dim=-1) - 1).square().mean()).backward()
        return [p.grad for p in parameters]

    assert_same(trained(VARIANTS["plain"].ours), trained(VARIANTS["plain"].theirs))


def test_ensemble(device):
    """torch.func.functional_call over stacked modules: a weight for each."""

    def results(norm_class):
        torch.manual_seed(0)
        nets = [
            torch.nn.Sequential(torch.nn.Linear(N, N), norm_class(N), torch.nn.Linear(N, 1)).to(device, torch.float64) for _ in range(3)
        ]
        for net in nets:
            torch.nn.init.normal_(net[1].weight)
        parameters, buffers = torch.func.stack_module_state(nets)
        x = draw((4, N), torch.float64, device)

        def loss(parameters, x):
            return torch.func.functional_call(nets[0], (parameters, {}), (x,)).square().sum()

        assert not buffers
        return vmap(grad(loss), (0, None))(parameters, x)

    assert_same(results(RMSNorm), results(torch.nn.RMSNorm))


@pytest.mark.parametrize("changed", ["input", "sum"])
def test_changed_in_place(changed, device):
    """What the backward needs may not have been changed: an error, not a wrong gradient."""
    x, weight, residual = leaves(VARIANTS["residual"].draw(SHAPE, torch.float64, device))
    if changed == "input":
        u = x * 1
        y = rms_norm(u, (N,), weight)
    else:
        y, u = add_rms_norm(x, residual, (N,), weight)
    with torch.no_grad():
        u.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice(device):
    """Once more with retain_graph: the same; without: torch's error."""
    x, weight = leaves(VARIANTS["plain"].draw(SHAPE, torch.float64, device))
    y = rms_norm(x, (N,), weight).sum()
    first = torch.autograd.grad(y, (x, weight), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, (x, weight))))
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext], ids=lambda context: context.__name__)
def test_grad_modes(context, function, device):
    tensors = leaves(function.draw(SHAPE, torch.float64, device))
    with context():
        ours, theirs = tree_leaves(function.ours(*tensors)), tree_leaves(function.theirs(*tensors))
    for our, their in zip(ours, theirs, strict=True):
        assert (our.requires_grad, our.is_inference()) == (their.requires_grad, their.is_inference())
    assert_same([y.detach() for y in ours], [y.detach() for y in theirs])


def test_saved_tensors(device):
    """What is kept for the backward is x and one number a row; hooks on saved tensors see all of it."""
    x, weight = leaves(VARIANTS["plain"].draw((5, 7, N), torch.float64, device))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = rms_norm(x, (N,), weight)
    assert sorted(t.numel() for t in saved) == sorted([x.numel(), weight.numel(), 5 * 7])
    expected = torch.autograd.grad(y.square().sum(), (x, weight))
    with torch.autograd.graph.save_on_cpu():
        y = rms_norm(x, (N,), weight)
    assert_same(torch.autograd.grad(y.square().sum(), (x, weight)), expected)
