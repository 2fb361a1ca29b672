"""Bytes that the kernels really load and store, counted in Triton's interpreter: to be imported with TRITON_INTERPRET=1.

Counted is the configuration of the device that is asked about. P programs that share T tiles move P · a + T · b bytes: a is what a program
moves once, b what it moves per tile. One program over one tile and over two gives both; the sum over P partial dw moves c + P · d in the
same way. So any number of rows can be counted without interpreting all of them.
"""

from collections import Counter
from fractions import Fraction
from typing import NamedTuple

from bench.audit.record import launches, rows, tensors
from bench.problem import Problem
from bench.traffic import Moved, launched, moved
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
    one, two = (launches(problem._replace(m=tiles * block_m), device) for tiles in (1, 2))
    loaded: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    for recorded, *small in zip(real, one, two, strict=True):
        values, grid = recorded.launch.values, recorded.launch.grid
        if recorded.step == "sum_partials":  # one block of columns stands for all
            once, times = 1, values["programs"]
            share = Fraction(values["COLS"], min(values["COLS"], values["BLOCK_N"]))
        else:
            once, times, share = grid[0], problem.m // block_m, Fraction(1)
        for total, first, second in zip((loaded, stored), *(count(launch, (1, *grid[1:]))[:2] for launch in small), strict=True):
            for name in tensors(recorded):
                step = second[name] - first[name]
                total[name] += int(share * ((first[name] - step) * once + step * times))
    row_bytes = {name: tensor.nbytes for recorded in real for name, tensor in rows(recorded).items()}
    other_bytes = {name: tensor.nbytes for recorded in real for name, tensor in tensors(recorded).items() if name not in row_bytes}
    cached = {name: loaded[name] - size for name, size in other_bytes.items() if loaded[name] > size}
    reads = {name: loaded[name] / size for name, size in row_bytes.items() if loaded[name] and name != "DW_PARTIAL"}
    return Traffic(dict(+loaded), dict(+stored), cached, reads)


def count(recorded: Recorded, grid: tuple[int, int, int]) -> Moved:
    """What a launch moves if it has another grid."""
    return moved(launched(recorded.launch.kernel, grid, recorded.pointers | recorded.launch.values))
