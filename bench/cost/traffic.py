"""Bytes that a launch of any Triton kernel moves, counted in Triton's interpreter: to be imported with TRITON_INTERPRET=1.

What is counted are the masked loads and stores of a program, lane by lane. Programs of one launch differ only in their masks and in the
number of tiles they walk over, and both can only shrink as the program id grows. So if two programs move as many bytes, those between
them do, too, and a launch is counted by bisection, from a few programs.

A tensor that every program reads as a whole, such as the weight, is counted once per launch, because the caches of a GPU serve the rest.
"""

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


class UncountableError(Exception):
    """Something cannot be counted; says why."""


class Moved(NamedTuple):
    read: int
    written: int


class Launched(NamedTuple):
    """A launch: a kernel, its grid and its arguments, of whose tensors only the metadata are kept."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[tuple[str, Any], ...]
    storages: tuple[tuple[int, int], ...]  # (number, bytes) of the storage of each tensor; tensors that share one have the same number

    @property
    def moved(self) -> Moved:
        """Bytes read from and written to memory."""
        return _moved(self)


def launched(kernel: Any, grid: Any, arguments: dict[str, Any]) -> Launched:
    """A launch with tensors on any device, also without memory."""
    shape = grid(arguments) if callable(grid) else grid
    shape = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    numbers: dict[int, int] = {}
    storages = [tensor.untyped_storage() for tensor in arguments.values() if isinstance(tensor, Tensor)]
    return Launched(
        kernel,
        (*shape, *(1,) * (3 - len(shape))),  # type: ignore[arg-type]
        tuple((name, _described(argument)) for name, argument in arguments.items()),
        tuple((numbers.setdefault(storage._cdata, len(numbers)), storage.nbytes()) for storage in storages),
    )


class _Metadata(NamedTuple):
    """All of a tensor but its values and its place."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype


def _described(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return _Metadata(tuple(argument.shape), argument.stride(), argument.storage_offset(), argument.dtype)
    return argument


@lru_cache(maxsize=4096)
def _moved(launch: Launched) -> Moved:
    memory = {number: torch.zeros(nbytes, dtype=torch.uint8).untyped_storage() for number, nbytes in launch.storages}
    numbers = iter(number for number, _ in launch.storages)
    arguments = {}
    for name, value in launch.arguments:
        if isinstance(value, _Metadata):
            value = torch.empty(0, dtype=value.dtype).set_(memory[next(numbers)], value.offset, value.shape, value.strides)
        arguments[name] = value
    programs = _Programs(launch, arguments, list(memory.values()))
    total: Counter = Counter()
    for y in range(launch.grid[1]):
        for z in range(launch.grid[2]):
            total.update(programs.sum_over_x(y, z))
    return Moved(*(sum(nbytes for (direction, _), nbytes in total.items() if direction == one) for one in ("read", "written")))


class _Access(NamedTuple):
    direction: str
    storage: int
    addresses: np.ndarray
    itemsize: int


class _Program(NamedTuple):
    """What one program accesses, by direction and storage."""

    moved: dict[tuple[str, int], int]  # bytes
    addresses: dict[tuple[str, int], frozenset[int]]  # those that are accessed first, which suffices to tell programs apart


class _Programs:
    """The programs of one launch."""

    def __init__(self, launch: Launched, arguments: dict[str, Any], storages: list[torch.UntypedStorage]):
        self.kernel, self.grid, self.arguments = launch.kernel, launch.grid, arguments
        self.starts = [storage.data_ptr() for storage in storages]
        self.ends = [storage.data_ptr() + storage.nbytes() for storage in storages]
        self.interpreted: dict[tuple[int, int, int], _Program] = {}

    def sum_over_x(self, y: int, z: int) -> Counter:
        """Bytes of the programs of a row of the grid, by direction and storage."""
        total = self._sum(0, self.grid[0] - 1, y, z)
        if self.grid[0] > 1:
            first, second = self._program(0, y, z), self._program(1, y, z)
            for key, addresses in first.addresses.items():
                if addresses == second.addresses.get(key):
                    if key[0] == "written":
                        raise UncountableError(f"programs of {self.kernel.__name__} write to the same addresses")
                    total[key] = first.moved[key]
        return total

    def _sum(self, low: int, high: int, y: int, z: int) -> Counter:
        first, last = self._program(low, y, z).moved, self._program(high, y, z).moved
        if first == last:
            return Counter({key: nbytes * (high - low + 1) for key, nbytes in first.items()})
        middle = (low + high) // 2
        return self._sum(low, middle, y, z) + self._sum(middle + 1, high, y, z)

    def _program(self, *at: int) -> _Program:
        if at not in self.interpreted:
            moved: Counter = Counter()
            addresses: dict[tuple[str, int], frozenset[int]] = {}
            for access in self._run(at):
                key = access.direction, access.storage
                moved[key] += access.addresses.size * access.itemsize
                addresses.setdefault(key, frozenset(access.addresses.tolist()))
            self.interpreted[at] = _Program(dict(moved), addresses)
        return self.interpreted[at]

    def _run(self, program: tuple[int, ...]) -> list[_Access]:
        """Interprets one program of the grid."""
        accesses: list[_Access] = []

        def note(direction: str, pointers: Any, mask: Any) -> None:
            addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
            if addresses.size:
                at = int(addresses.flat[0])
                storage = next(i for i, start in enumerate(self.starts) if start <= at < self.ends[i])
                accesses.append(_Access(direction, storage, addresses.ravel(), pointers.get_element_ty().primitive_bitwidth // 8))

        def noted(direction: str, mask_at: int, method: Callable) -> Callable:
            def run(builder: Any, pointers: Any, *arguments: Any) -> Any:
                note(direction, pointers, arguments[mask_at])
                return method(builder, pointers, *arguments)

            return run

        def refused(*_: Any) -> None:
            raise UncountableError(f"{self.kernel.__name__} uses atomic operations")

        builder = InterpreterBuilder
        set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
        with (
            mock.patch.object(builder, "create_masked_load", noted("read", 0, builder.create_masked_load)),
            mock.patch.object(builder, "create_masked_store", noted("written", 1, builder.create_masked_store)),
            mock.patch.object(builder, "create_atomic_rmw", refused),
            mock.patch.object(builder, "create_atomic_cas", refused),
            mock.patch.object(builder, "set_grid_dim", lambda builder, *_: set_dim(builder, *self.grid)),
            mock.patch.object(builder, "set_grid_idx", lambda builder, *_: set_idx(builder, *program)),
            mock.patch.object(interpreter, "_patch_lang", _once_per_module(interpreter._patch_lang)),
            _interpretable(self.kernel),
            np.errstate(all="ignore"),
        ):
            self.kernel[(1, 1, 1)](**{name: self._scalar(name, value) for name, value in self.arguments.items()})
        return accesses

    def _scalar(self, name: str, value: Any) -> Any:
        """A float without an annotation is fp32 in a kernel; the interpreter leaves it a Python number, which has no methods."""
        if not isinstance(value, float) or name in inspect.get_annotations(self.kernel.fn):
            return value
        return tl.core.tensor(TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)


def _once_per_module(patch: Callable) -> Callable:
    """The interpreter replaces Triton's language at each call of a function in a kernel, which takes half of the time."""
    done: set[int] = set()

    def patch_once(function: Callable) -> Any:
        if id(function.__globals__) not in done:
            done.add(id(function.__globals__))
            return patch(function)
        return None

    return patch_once


@contextmanager
def _interpretable(kernel: InterpretedFunction) -> Iterator[None]:
    """Functions of CUDA's libdevice, which return nothing in the interpreter, become functions of Triton's language."""
    with ExitStack() as stack:
        for name, value in list(kernel.fn.__globals__.items()):
            if str(getattr(value, "__module__", "")).endswith("libdevice"):
                stack.enter_context(mock.patch.object(sys.modules[kernel.fn.__module__], name, partial(_in_language, value.__name__)))
        yield


def _in_language(function: str, *arguments: Any) -> Any:
    """Looks the function up when it is called, which is when the interpreter has replaced it."""
    return getattr(tl, function)(*arguments)


def bound(kernel: InterpretedFunction, arguments: tuple, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a kernel by name, from those of a call, among whose options may be those of the compiler."""
    return inspect.getcallargs(kernel.fn, *arguments, **{name: value for name, value in options.items() if name in kernel.arg_names})


def elements(tensor: Tensor) -> int:
    """Distinct elements of a tensor, which may be expanded."""
    return prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
