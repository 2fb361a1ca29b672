"""Derivatives of every order and mode, and vmap: as torch has them of its own RMSNorm, in fp64."""

from contextlib import nullcontext

import pytest
import torch
from torch.autograd import gradcheck
from torch.func import vjp, vmap
from torch.utils._pytree import tree_leaves
from transforms import TRANSFORMS, VMAPPED, dual, every
from variants import FUNCTIONS, VARIANTS, N, Variant, assert_same, every_function, every_variant, leaves

from triton_rmsnorm import add_rms_norm, rms_norm
from triton_rmsnorm.testing import draw

SHAPE = (2, 3, N)
pytestmark = pytest.mark.usefixtures("small_tiles")


def assert_alike(ours, theirs) -> None:
    """Equal trees of fp64 tensors, but for the order of a sum; None only where torch has None."""
    # In another order, a sum in fp64 differs by a few eps (2e-16) of its terms, which are about 1. A missing term is far above 1e-10.
    torch.testing.assert_close(tree_leaves(ours), tree_leaves(theirs), rtol=1e-10, atol=1e-10)


@every_variant
def test_gradcheck(variant, device):
    tensors = leaves(variant.draw((3, N) if variant.ndim == 2 else (2, N), torch.float64, device))
    assert gradcheck(variant.ours, tensors, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, fast_mode=True)


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
    assert_alike(transform(variant.ours, tensors), transform(variant.theirs, tensors))


@every_variant
def test_dual_of_one_argument(variant, device):
    """Each argument on its own: its tangent is not lost because the others have none."""
    tensors = variant.draw(SHAPE, torch.float64, device)
    for at in every(tensors):
        tangents = [torch.ones_like(t) if i == at else None for i, t in enumerate(tensors)]
        ours, theirs = (dual(f, tensors, tangents) for f in (variant.ours, variant.theirs))
        assert ours[0][1] is not None
        assert_alike(ours, theirs)


# Where x, the weight, and the residual or the gate have the batch.
BATCHED = {
    "rows": (0, None, 0),
    "rows_at_1": (1, None, 1),
    "rows_at_-1": (-1, None, -1),
    "weight": (None, 0, None),
    "both": (0, 0, 0),
    "both_apart": (1, -1, 1),
    "x": (0, None, None),
    "other": (None, None, 0),
}


@pytest.mark.parametrize("dims", BATCHED.values(), ids=BATCHED)
@pytest.mark.parametrize("transform", VMAPPED.values(), ids=VMAPPED)
@pytest.mark.parametrize("variant", FUNCTIONS)
def test_vmap(variant, transform, dims, device):
    variant = VARIANTS[variant]
    if variant.arguments == ("x", "weight") and dims in (BATCHED["x"], BATCHED["other"]):
        pytest.skip("there is no other")
    in_dims = dims[: len(variant.arguments)]
    tensors = [
        tensor if dim is None else torch.stack([tensor * scale for scale in (1, 0.5, -2)], dim)
        for tensor, dim in zip(variant.draw((4, *SHAPE[1:]), torch.float64, device), in_dims, strict=True)
    ]
    assert_alike(transform(variant.ours, tensors, in_dims), transform(variant.theirs, tensors, in_dims))


@every_variant
def test_nested_vmap(variant, device):
    """Batches of x and of the weight on levels of their own."""
    tensors = variant.draw((4, 3, *SHAPE), torch.float64, device)
    rows = variant.per_argument(0, None)
    if (at := variant.weight_at) is None:
        outer = rows
    else:
        tensors[at] = torch.stack([tensors[at], tensors[at] + 1])
        outer = tuple(0 if i == at else None for i in every(tensors))
    ours, theirs = (vmap(vmap(f, rows), outer)(*tensors) for f in (variant.ours, variant.theirs))
    assert_alike(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_samples_are_rows(dtype, device):
    """What vmap over x makes is bit for bit what the kernels make of the samples one by one: y and dx; and dw in first order."""
    x, weight, dy = draw((5, 7, 128), dtype, device), draw((128,), torch.float32, device), draw((7, 128), dtype, device)

    def single(x):
        y, pullback = vjp(lambda x, w: rms_norm(x, (128,), w), x, weight)
        return y, *pullback(dy)

    y, dx, dw = vmap(single)(x)
    for i in range(5):
        leaf, parameter = leaves((x[i], weight))
        alone = rms_norm(leaf, (128,), parameter)
        alone.backward(dy)
        assert_same([y[i], dx[i]], [alone, leaf.grad])
        torch.testing.assert_close(dw[i], parameter.grad)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32, torch.float32), (torch.float32, torch.bfloat16, torch.float64)], ids=str
)
@pytest.mark.parametrize("in_dims", [(0, None, 0), (0, 0, 0), (0, None, None)], ids=str)
def test_dtypes_under_vmap(in_dims, dtypes, device):
    """Each output and gradient has the dtype that it has without vmap, whichever way computes it."""
    tensors = [draw(shape, dtype, device) for shape, dtype in zip(((4, N), (N,), (4, N)), dtypes, strict=True)]

    def all_of_it(x, weight, residual):
        outputs, pullback = vjp(lambda *args: add_rms_norm(args[0], args[2], (N,), args[1]), x, weight, residual)
        return outputs, pullback(outputs)

    alone = tree_leaves(all_of_it(*tensors))
    batch = [t if dim is None else t.expand(3, *t.shape) for t, dim in zip(tensors, in_dims, strict=True)]
    for one, many in zip(alone, tree_leaves(vmap(all_of_it, in_dims)(*batch)), strict=True):
        assert one.dtype == many.dtype and many.shape == (3, *one.shape)
        torch.testing.assert_close(many, one.expand_as(many), rtol=2e-2 if one.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1], ids=["y", "sum"])
def test_one_output_has_a_gradient(used, device):
    """The other is not used: this gradient is all there is."""
    variant = VARIANTS["residual"]
    tensors = leaves(variant.draw(SHAPE, torch.float64, device))
    results = [
        torch.autograd.grad(function(*tensors)[used].square().sum(), tensors, allow_unused=True)
        for function in (variant.ours, variant.theirs)
    ]
    assert_alike(*results)


def test_sum_changed_in_place(device):
    """An error, not a wrong gradient. test_recompute.py changes the other tensors that the backward needs."""
    x, weight, residual = leaves(VARIANTS["residual"].draw(SHAPE, torch.float64, device))
    y, total = add_rms_norm(x, residual, (N,), weight)
    with torch.no_grad():
        total.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice(device):
    """Once more with retain_graph: the same; without: torch's error."""
    x, weight = leaves(VARIANTS["plain"].draw(SHAPE, torch.float64, device))
    y = rms_norm(x, (N,), weight).sum()
    first = torch.autograd.grad(y, (x, weight), retain_graph=True)
    assert_same(torch.autograd.grad(y, (x, weight)), first)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@every_function
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext], ids=lambda context: context.__name__)
def test_grad_modes(context, function: Variant, device):
    tensors = leaves(function.draw(SHAPE, torch.float64, device))
    with context():
        ours, theirs = tree_leaves(function.ours(*tensors)), tree_leaves(function.theirs(*tensors))
    for our, their in zip(ours, theirs, strict=True):
        assert (our.requires_grad, our.is_inference()) == (their.requires_grad, their.is_inference())
    assert_alike([y.detach() for y in ours], [y.detach() for y in theirs])


def test_saved_tensors(device):
    """x itself, the weight itself and one number per row are kept for the backward; hooks for saved tensors see all of it."""
    x, weight = leaves(VARIANTS["plain"].draw((5, 7, N), torch.float32, device))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = rms_norm(x, (N,), weight)
    assert [t.data_ptr() for t in saved[:2]] == [x.data_ptr(), weight.data_ptr()]
    assert [(t.shape, t.dtype) for t in saved[2:]] == [((5, 7, 1), torch.float32)]
    expected = torch.autograd.grad(y.square().sum(), (x, weight))
    with torch.autograd.graph.save_on_cpu():
        y = rms_norm(x, (N,), weight)
    assert_alike(torch.autograd.grad(y.square().sum(), (x, weight)), expected)
