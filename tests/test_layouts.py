"""Strided inputs, weights and gradients: read in place, never written to, and the same result as for a contiguous copy."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from transforms import dual
from variants import BLOCKED, Drawn, N, Variant, assert_same, every_function, offsets_of

from triton_rmsnorm import rms_norm
from triton_rmsnorm.reference import Inputs, Spec
from triton_rmsnorm.runtime import launch
from triton_rmsnorm.runtime.layout import merge_rows
from triton_rmsnorm.testing import draw


class View(NamedTuple):
    """A view of a contiguous base; normalized over its last dimension."""

    base: tuple[int, ...]
    of: Callable[[Tensor], Tensor]
    in_place: bool = True


QKV = (2, 5, 3, 4, 64)  # B, S, (q, k, v), H, D
VIEWS = {
    "contiguous": View((3, 7, 128), lambda x: x),
    "q_of_qkv": View(QKV, lambda x: x[:, :, 0]),
    "k_of_qkv": View(QKV, lambda x: x[:, :, 1]),
    "q_heads_first": View(QKV, lambda x: x[:, :, 0].transpose(1, 2)),
    "batch_and_sequence_swapped": View((5, 4, 3, 100), lambda x: x.transpose(0, 1)),
    "five_dims_permuted": View((2, 3, 4, 5, 33), lambda x: x.permute(3, 1, 0, 2, 4)),
    "every_third_row": View((20, 128), lambda x: x[::3]),
    "columns_of_wider_rows": View((7, 131), lambda x: x[:, 1:128]),
    "overlapping_windows": View((400,), lambda x: x.unfold(0, 128, 3)),
    "expanded_rows": View((1, 128), lambda x: x.expand(9, 128)),
    "expanded_middle": View((4, 1, 128), lambda x: x.expand(4, 5, 128)),
    "one_row": View((128,), lambda x: x),
    "offset": View((3, 129), lambda x: x.flatten()[3:].unflatten(0, (3, 128))),
    "one_column": View((6, 4), lambda x: x[:, 1:2]),
    "expanded_number": View((1,), lambda x: x.expand(9, 100), in_place=False),  # the gradient of a sum
    "every_second_column": View((6, 256), lambda x: x[:, ::2], in_place=False),
    "transposed": View((128, 6), lambda x: x.t(), in_place=False),
    "expanded_columns": View((6, 1), lambda x: x.expand(6, 128), in_place=False),
    "negated": View((6, 128), lambda x: torch._neg_view(x), in_place=False),
}


@contextmanager
def untouched(*tensors: Tensor):
    """All bytes of the storages of `tensors` stay as they are."""

    def contents():
        return [torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).clone() for t in tensors]

    before = contents()
    yield
    assert_same(contents(), before)


def check(x: Tensor, weight: Tensor, dy: Tensor, ndim: int = 1) -> None:
    drawn = Drawn(Spec(tuple(x.shape[-ndim:]), 1e-6), Inputs(x, weight), dy)
    with untouched(x, weight, dy):
        results = drawn.run()
    drawn.check(results)


@pytest.mark.parametrize("strided", ["X", "DY", "both"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view, strided, device, launches):
    """The input, the gradient, or both, differently: rows that merge in one need not merge in the other."""
    dtype = torch.bfloat16 if strided == "X" else torch.float32
    tensor = view.of(draw(view.base, dtype, device))
    *rows, n = tensor.shape
    other = draw((*rows, 2, n), dtype, device).select(-2, 1) if strided == "both" else draw(tensor.shape, dtype, device)
    x, dy = (other, tensor) if strided == "DY" else (tensor, other)
    check(x, draw((n,), dtype, device), dy)
    forward, backward, _ = launches
    for recorded in [backward] if strided == "DY" else [forward, backward]:
        assert (recorded.pointers["DY" if strided == "DY" else "X"].data_ptr() == tensor.data_ptr()) == view.in_place


@pytest.mark.parametrize("n", [100, max(BLOCKED)])
@pytest.mark.parametrize(
    "of",
    [lambda w: w[::3], lambda w: w[:1].expand(len(w) // 3), lambda w: torch._neg_view(w[::3]), lambda w: w.view(-1, 3)[:, 2]],
    ids=["every_third", "expanded", "negated", "column"],
)
def test_weight(of, n, device, launches):
    weight = of(draw((3 * n,), torch.float32, device))
    check(draw((5, n), torch.float32, device), weight, draw((5, n), torch.float32, device))
    assert (launches[0].pointers["W"].data_ptr() == weight.data_ptr()) != weight.is_neg()


def test_weight_of_two_dims(device, launches):
    """A view where its dimensions merge (here they do not), otherwise a copy; dw in its shape either way."""
    weight = draw((8, 6), torch.float32, device).t()
    check(draw((5, 6, 8), torch.float32, device), weight, draw((5, 6, 8), torch.float32, device), ndim=2)


def test_normalized_over_two_strided_dims(device, launches):
    x = draw((4, 3, 6, 8), torch.float32, device)[:, 1]
    check(x, draw((6, 8), torch.float32, device), draw((4, 6, 8), torch.float32, device), ndim=2)
    assert launches[0].pointers["X"].data_ptr() == x.data_ptr()


LIKE_TORCH = {  # test_contract.py has channels_last
    "transposed": lambda x: x.transpose(1, 2),
    "heads_first": lambda x: x.transpose(-1, -2),
    "sliced": lambda x: x[:, ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 4, -1, -1),
}


@pytest.mark.parametrize("ndim", [1, 3])
@pytest.mark.parametrize("of", LIKE_TORCH.values(), ids=LIKE_TORCH)
def test_strides_of_the_output(of, ndim, device):
    x = of(draw((2, 4, 6, 8), torch.float32, device))
    ours, theirs = rms_norm(x, x.shape[-ndim:]), F.rms_norm(x, x.shape[-ndim:])
    assert ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs)


@every_function
def test_strides_of_what_is_composed(function: Variant, device):
    """Whatever way computes an output, it is contiguous: for views of it."""
    tensors = [t.transpose(0, 1) if t.dim() > 1 else t for t in function.draw((4, 3, N), torch.float32, device)]
    with launch.pretend(None):
        without_kernels = tree_leaves(function.ours(*tensors))
    functionalized = tree_leaves(torch.func.functionalize(function.ours)(*tensors))
    duals = [y for y, _ in dual(function.ours, tensors, tensors)]
    assert all(y.is_contiguous() for y in (*without_kernels, *functionalized, *duals))


def test_output_is_no_view(device):
    """It may be changed in place, also where autograd follows."""
    x = draw((4, 100), torch.float32, device).requires_grad_()
    y = rms_norm(x, (100,))
    assert y._base is None
    with untouched(x):
        y.mul_(2).sum().backward()


@st.composite
def strided(draw) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Outer sizes, and strides of two tensors: each of a permuted, sliced or expanded layout."""
    sizes = tuple(draw(st.lists(st.integers(1, 4), max_size=5)))
    tensors = []
    for _ in range(2):
        strides, step = [0] * len(sizes), 8
        for dim in draw(st.permutations(range(len(sizes)))):
            if draw(st.booleans()):
                strides[dim] = step
                step *= sizes[dim] * draw(st.integers(1, 2))
        tensors.append(tuple(strides))
    return sizes, tensors


@given(strided())
def test_rows_are_found(problem):
    """Merged sizes and strides lead to the offset of every row."""
    sizes, tensors = problem
    inner_sizes, merged = merge_rows(sizes, *tensors)
    for strides, ours in zip(tensors, merged, strict=True):
        expected = offsets_of(sizes, strides).flatten()
        row, offsets = torch.arange(len(expected)), torch.zeros(len(expected), dtype=torch.long)
        for size, stride in zip(reversed(inner_sizes), reversed(ours[1:]), strict=True):
            offsets += row % size * stride
            row = row // size
        assert torch.equal(offsets + row * ours[0], expected)
