"""Bytes that a launch of any Triton kernel loads and stores, counted in Triton's interpreter: to be imported with TRITON_INTERPRET=1.

What is counted are the masked loads and stores of a program, lane by lane. Programs of one launch differ only in their masks and in the
number of tiles they walk over, and both can only shrink as the program id grows. So if two programs move as many bytes, those between
them do, too, and a launch is counted by bisection, from a few programs.
"""

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from itertools import product
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
    """Bytes by the name of the kernel's pointer; of pointers into the same storage, the first one's."""

    loaded: Counter[str]
    stored: Counter[str]
    again: Counter[str]  # of `loaded`: what every program loads as a whole, such as the weight, all but the first time


class Launched(NamedTuple):
    """A launch: a kernel, its grid and its arguments, of whose tensors only the metadata are kept."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[tuple[str, Any], ...]
    storages: tuple[tuple[int, int], ...]  # (number, bytes) of the storage of each tensor; tensors that share one have the same number


class _Metadata(NamedTuple):
    """All of a tensor but its values and its place."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "_Metadata":
        return cls(tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype)


def launched(kernel: Any, grid: Any, arguments: dict[str, Any]) -> Launched:
    """A launch with tensors on any device, also without memory."""
    shape = grid(arguments) if callable(grid) else grid
    shape = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    numbers: dict[int, int] = {}
    storages = [tensor.untyped_storage() for tensor in arguments.values() if isinstance(tensor, Tensor)]
    return Launched(
        kernel,
        (*shape, *(1,) * (3 - len(shape))),  # type: ignore[arg-type]
        tuple((name, _Metadata.of(value) if isinstance(value, Tensor) else value) for name, value in arguments.items()),
        tuple((numbers.setdefault(storage._cdata, len(numbers)), storage.nbytes()) for storage in storages),
    )


@lru_cache(maxsize=4096)
def moved(launch: Launched) -> Moved:
    """What all programs of a launch load and store."""
    programs, total = _Programs(launch), Moved(Counter(), Counter(), Counter())
    last = launch.grid[0] - 1
    for y, z in product(*map(range, launch.grid[1:])):
        row = programs.sum(0, last, y, z)
        for (direction, name), nbytes in row.items():
            getattr(total, direction)[name] += nbytes
        if last:
            total.again.update(programs.loaded_again(row, y, z))
    return total


class _Program(NamedTuple):
    """What one program accesses, by direction ("loaded" or "stored") and pointer."""

    moved: Counter[tuple[str, str]]  # bytes
    addresses: dict[tuple[str, str], np.ndarray]  # those that are accessed first, which suffices to tell programs apart


class _Programs:
    """The programs of one launch, with memory for its tensors."""

    def __init__(self, launch: Launched):
        self.kernel, self.grid = launch.kernel, launch.grid
        memory = {number: torch.zeros(nbytes, dtype=torch.uint8).untyped_storage() for number, nbytes in launch.storages}
        self.arguments: dict[str, Any] = {}
        self.places: dict[str, range] = {}  # addresses by the name of the pointer
        numbers = iter(number for number, _ in launch.storages)
        for name, value in launch.arguments:
            if isinstance(value, _Metadata):
                storage = memory[next(numbers)]
                self.places[name] = range(storage.data_ptr(), storage.data_ptr() + storage.nbytes())
                value = torch.empty(0, dtype=value.dtype).set_(storage, value.offset, value.shape, value.strides)
            self.arguments[name] = value
        self.interpreted: dict[tuple[int, int, int], _Program] = {}

    def sum(self, low: int, high: int, y: int, z: int) -> Counter:
        """Bytes of the programs from `low` to `high` of a row of the grid, by direction and pointer."""
        first, last = self.program(low, y, z).moved, self.program(high, y, z).moved
        if first == last:
            return Counter({key: nbytes * (high - low + 1) for key, nbytes in first.items()})
        middle = (low + high) // 2
        return self.sum(low, middle, y, z) + self.sum(middle + 1, high, y, z)

    def loaded_again(self, total: Counter, y: int, z: int) -> dict[str, int]:
        """Bytes of the programs of a row of the grid that the first of them has loaded."""
        first, second = self.program(0, y, z), self.program(1, y, z)
        again = {}
        for (direction, name), addresses in first.addresses.items():
            if np.array_equal(addresses, second.addresses.get((direction, name), ())):
                if direction == "stored":
                    raise UncountableError(f"programs of {self.kernel.__name__} write to the same addresses")
                again[name] = total[direction, name] - first.moved[direction, name]
        return again

    def program(self, *at: int) -> _Program:
        if at not in self.interpreted:
            self.interpreted[at] = self._run(at)
        return self.interpreted[at]

    def _run(self, at: tuple[int, ...]) -> _Program:
        """Interprets one program of the grid."""
        found = _Program(Counter(), {})

        def noted(direction: str, mask_at: int, method: Callable) -> Callable:
            def run(builder: Any, pointers: Any, *arguments: Any) -> Any:
                addresses = pointers.data[np.broadcast_to(arguments[mask_at].data, pointers.data.shape)]
                if addresses.size:
                    key = direction, next(name for name, place in self.places.items() if int(addresses[0]) in place)
                    found.moved[key] += addresses.size * pointers.get_element_ty().primitive_bitwidth // 8
                    found.addresses.setdefault(key, addresses)
                return method(builder, pointers, *arguments)

            return run

        def refused(*_: Any) -> None:
            raise UncountableError(f"{self.kernel.__name__} uses atomic operations")

        builder = InterpreterBuilder
        set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
        with (
            mock.patch.object(builder, "create_masked_load", noted("loaded", 0, builder.create_masked_load)),
            mock.patch.object(builder, "create_masked_store", noted("stored", 1, builder.create_masked_store)),
            mock.patch.object(builder, "create_atomic_rmw", refused),
            mock.patch.object(builder, "create_atomic_cas", refused),
            mock.patch.object(builder, "set_grid_dim", lambda builder, *_: set_dim(builder, *self.grid)),
            mock.patch.object(builder, "set_grid_idx", lambda builder, *_: set_idx(builder, *at)),
            mock.patch.object(interpreter, "_patch_lang", _once_per_module(interpreter._patch_lang)),
            _interpretable(self.kernel),
            np.errstate(all="ignore"),
        ):
            self.kernel[(1, 1, 1)](**{name: self._scalar(name, value) for name, value in self.arguments.items()})
        return found

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
