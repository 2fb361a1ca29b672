"""Bytes that the kernels really load and store, counted in Triton's interpreter: to be imported with TRITON_INTERPRET=1.

What is counted is what each masked load and store touches, lane by lane, with the configuration of the device that is asked about. A
persistent kernel of P programs that share T tiles moves P · a + T · b bytes: a is what a program moves once, b what it moves for a tile.
One program over one tile and over two gives both; the sum over P partial dw moves c + P · d in the same way. So any number of rows can
be counted without interpreting all of them.
"""

from collections import Counter
from fractions import Fraction
from typing import NamedTuple
from unittest import mock

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder

from bench.launches import Problem, Recorded, launches
from triton_rmsnorm.runtime import config as tuning


class Traffic(NamedTuple):
    loaded: Counter  # bytes by the name of the kernel's pointer, summed over kernels
    stored: Counter
    minimum: int  # bytes of a problem that reads each input once and writes each output once
    reads: dict[str, float]  # how many times each input of rows is read


def traffic(problem: Problem, rows: int, device: tuning.Device) -> Traffic:
    """The traffic of `problem` with `rows` rows, which must be whole tiles, on `device`."""
    real = launches(problem, rows, device)
    block_m = real.recorded[0].launch.values["BLOCK_M"]
    if rows % block_m:
        raise ValueError(f"rows must be a multiple of the tile's {block_m}, got {rows}")
    one, two = (launches(problem, tiles * block_m, device, "cpu").recorded for tiles in (1, 2))
    total: tuple[Counter, Counter] = Counter(), Counter()
    for recorded, *small in zip(real.recorded, one, two, strict=True):
        values, grid = recorded.launch.values, recorded.launch.grid
        if "programs" in values:  # the sum of partials: one block of columns stands for all
            once, times = 1, values["programs"]
            share = Fraction(values["COLS"], min(values["COLS"], values["BLOCK_N"]))
        else:
            once, times, share = grid[0], rows // block_m, 1
        for moved, first, second in zip(total, *(count(launch, (1, *grid[1:])) for launch in small), strict=True):
            for name in recorded.tensors:
                step = second[name] - first[name]
                moved[name] += int(share * ((first[name] - step) * once + step * times))
    x = real.inputs[0]
    given = {name: t for recorded in real.recorded for name, t in recorded.tensors.items() if any(t is i for i in real.inputs)}
    reads = {name: total[0][name] / tensor.nbytes for name, tensor in given.items() if tensor.shape == x.shape}
    return Traffic(*total, sum(tensor.nbytes for tensor in real.inputs + real.outputs), reads)


_counted: dict[tuple, tuple[Counter, Counter]] = {}


def count(recorded: Recorded, grid: tuple[int, int, int]) -> tuple[Counter, Counter]:
    """Bytes that a launch of `grid` over CPU tensors loads and stores, by the name of the pointer. Values do not matter: zeros will do."""
    launch, tensors = recorded
    key = (launch.kernel.__name__, grid, launch.arguments, tuple((name, t.dtype, t.shape, t.stride()) for name, t in tensors.items()))
    if key not in _counted:
        _counted[key] = _interpret(recorded, grid)
    return _counted[key]


def _interpret(recorded: Recorded, grid: tuple[int, int, int]) -> tuple[Counter, Counter]:
    loaded, stored = Counter(), Counter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def note(counts, pointers, mask):
        touched = pointers.data[mask.data]
        if touched.size:
            name, tensor = next(item for item in recorded.tensors.items() if 0 <= int(touched[0]) - item[1].data_ptr() < item[1].nbytes)
            counts[name] += touched.size * tensor.element_size()

    def counted_load(self, pointers, mask, *rest):
        note(loaded, pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        note(stored, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    launch, tensors = recorded
    for tensor in tensors.values():
        tensor.zero_()
    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        np.errstate(all="ignore"),
    ):
        launch.kernel[grid](*(tensors.get(name) for name in launch.kernel.arg_names if name not in launch.values), *launch.arguments)
    return loaded, stored
