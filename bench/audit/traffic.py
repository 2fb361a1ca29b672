"""Bytes that the kernels really load and store, counted in Triton's interpreter: to be imported with TRITON_INTERPRET=1.

What is counted is what each masked load and store touches, lane by lane, with the configuration of the device that is asked about. P
programs that share T tiles move P · a + T · b bytes: a is what a program moves once, b what it moves per tile. One program over one tile
and over two gives both; the sum over P partial dw moves c + P · d in the same way. So any number of rows can be counted without
interpreting all of them.
"""

from collections import Counter
from fractions import Fraction
from typing import NamedTuple
from unittest import mock

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder

from bench.audit.record import launches, rows, tensors
from bench.problem import Problem
from triton_rmsnorm.runtime.config import Device
from triton_rmsnorm.runtime.launch import Recorded


class Traffic(NamedTuple):
    loaded: dict[str, int]  # bytes by the name of the kernel's pointer, summed over kernels
    stored: dict[str, int]
    cached: dict[str, int]  # bytes of `loaded` that the L2 serves: of a weight, all but the first time it is read
    reads: dict[str, float]  # how many times each input of rows is read


def traffic(problem: Problem, device: Device) -> Traffic:
    """The traffic of a problem, whose rows must be whole tiles, on `device`."""
    real = launches(problem, device)
    block_m = real[0].launch.values["BLOCK_M"]
    if problem.m % block_m:
        raise ValueError(f"rows must be a multiple of the tile's {block_m}, got {problem.m}")
    one, two = (launches(problem._replace(m=tiles * block_m), device, "cpu") for tiles in (1, 2))
    loaded: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    for recorded, *small in zip(real, one, two, strict=True):
        values, grid = recorded.launch.values, recorded.launch.grid
        if recorded.step == "sum_partials":  # one block of columns stands for all
            once, times = 1, values["programs"]
            share = Fraction(values["COLS"], min(values["COLS"], values["BLOCK_N"]))
        else:
            once, times, share = grid[0], problem.m // block_m, Fraction(1)
        for moved, first, second in zip((loaded, stored), *(count(launch, (1, *grid[1:])) for launch in small), strict=True):
            for name in tensors(recorded):
                step = second[name] - first[name]
                moved[name] += int(share * ((first[name] - step) * once + step * times))
    row_bytes = {name: tensor.nbytes for recorded in real for name, tensor in rows(recorded).items()}
    other_bytes = {name: tensor.nbytes for recorded in real for name, tensor in tensors(recorded).items() if name not in row_bytes}
    cached = {name: loaded[name] - size for name, size in other_bytes.items() if loaded[name] > size}
    reads = {name: loaded[name] / size for name, size in row_bytes.items() if loaded[name] and name != "DW_PARTIAL"}
    return Traffic(dict(+loaded), dict(+stored), cached, reads)


_counted: dict[tuple, tuple[Counter, Counter]] = {}


def count(recorded: Recorded, grid: tuple[int, int, int]) -> tuple[Counter, Counter]:
    """Bytes that a launch of `grid` over CPU tensors loads and stores, by the name of the pointer. Values do not matter: zeros will do."""
    layouts = tuple((name, tensor.dtype, tensor.shape, tensor.stride()) for name, tensor in tensors(recorded).items())
    key = (recorded.launch.kernel.__name__, grid, recorded.launch.arguments, layouts)
    if key not in _counted:
        _counted[key] = _interpret(recorded, grid)
    return _counted[key]


def _interpret(recorded: Recorded, grid: tuple[int, int, int]) -> tuple[Counter, Counter]:
    loaded: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def note(counts, pointers, mask):
        touched = pointers.data[mask.data]
        if touched.size:
            at = int(touched[0])
            name, tensor = next(item for item in tensors(recorded).items() if 0 <= at - item[1].data_ptr() < item[1].nbytes)
            counts[name] += touched.size * tensor.element_size()

    def counted_load(self, pointers, mask, *rest):
        note(loaded, pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        note(stored, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    for tensor in tensors(recorded).values():
        tensor.detach().zero_()
    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        np.errstate(all="ignore"),
    ):
        recorded.launch.kernel[grid](*recorded.pointers.values(), *recorded.launch.arguments)
    return loaded, stored
