"""Strided tensors as the kernels see them: rows that are read in place, or copies where they cannot be."""

from collections.abc import Iterable
from math import gcd, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_rmsnorm.reference import Spec


class Layout(NamedTuple):
    """The metadata of a tensor that a launch depends on."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    negative: bool = False  # torch's lazy negation: such a tensor is copied

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return 0 if 0 in self.shape else (last + 1) * self.dtype.itemsize


LayoutKey = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool]


def keys_of(tensors: Iterable[Tensor | None]) -> list[LayoutKey | None]:
    """The fields of the Layouts of tensors: plain tuples are quicker to make and serve as keys of caches."""
    keys: list[LayoutKey | None] = []
    for x in tensors:  # before Python 3.12, a comprehension would be one more call
        keys.append(None if x is None else (x.shape, x.stride(), x.dtype, x.is_neg()))
    return keys


def contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
    return Layout(tuple(shape), tuple(prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape))), dtype)


def merge_rows(shape: tuple[int, ...], *strides: tuple[int, ...]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The outer dimensions of tensors of one shape, merged where all of them allow it: (sizes but the first, strides of each tensor)."""
    dims: list[list[int]] = []  # [size, stride of the first tensor, ...]
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if dims and all(outer == size * step for outer, step in zip(dims[-1][1:], steps, strict=True)):
            dims[-1] = [dims[-1][0] * size, *steps]
        else:
            dims.append([size, *steps])
    if not dims:
        dims = [[1] + [0] * len(strides)]
    sizes, *merged = zip(*dims, strict=True)
    return sizes[1:], merged


def row_strides(spec: Spec, tensors: list[Layout]) -> tuple[tuple[int, ...], int, list[tuple[int, ...]]]:
    """The outer dimensions of tensors of rows, as the kernels take them: (sizes but the first, alignment of rows, strides of each tensor).

    The alignment is in elements, at most 16, and the unit of the strides. Where the rows of all tensors are contiguous, the strides are ().
    """
    shape = tensors[0].shape
    outer = len(shape) - len(spec.normalized_shape)
    sizes, strides = merge_rows(shape[:outer], *(tensor.strides[:outer] for tensor in tensors))
    if prod(shape[:outer]) == 1 or all(row == (prod(spec.normalized_shape),) for row in strides):
        return (), 1, [()] * len(tensors)
    row_align = gcd(16, *(stride for row in strides for stride in row))
    return sizes, row_align, [tuple(stride // row_align for stride in row) for row in strides]


def in_place(spec: Spec, weight: Layout | None, *rows: Layout | None) -> bool:
    """Whether the kernels can read all of these tensors where they are."""
    if weight and (weight.negative or (len(weight_strides(weight)) > 1 and 0 not in weight.shape)):
        return False
    return all(rows_in_place(x, spec) for x in rows if x)


def rows_in_place(x: Layout, spec: Spec) -> bool:
    """Whether the normalized dimensions of x are one contiguous run, and its sign is materialized."""
    run = 1
    for size, stride in zip(reversed(spec.normalized_shape), reversed(x.strides), strict=False):
        if size != 1 and stride != run and 0 not in x.shape:
            return False
        run *= size
    return not x.negative


def weight_strides(weight: Layout) -> tuple[int, ...]:
    """The strides of the weight after its dimensions are merged: one, unless they cannot be merged."""
    _, (strides,) = merge_rows(weight.shape, weight.strides)
    return strides


def readable(spec: Spec, weight: Tensor | None, *rows: Tensor | None) -> list[Any]:
    """The weight and tensors of rows as the kernels can read them: themselves where they are, else copies."""
    copies = [None if weight is None else weight.resolve_neg().contiguous()]
    for x, key in zip(rows, keys_of(rows), strict=True):
        copies.append(x if x is None or not key or rows_in_place(Layout(*key), spec) else x.resolve_neg().contiguous())
    return copies
