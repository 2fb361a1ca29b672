"""The grid of the audit, and what is found out about each of its problems on each target: a row."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unittest import mock

from tqdm import tqdm

from bench.audit.compile import TARGETS, Kernel, inspect
from bench.audit.record import depends_on_rows, launches
from bench.audit.traffic import Traffic, traffic
from bench.problem import GRID, VARIANTS, Problem

ROWS = 8192
FEW = (64, 1000, 4096, 16384, 131072)
PAIRS = (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32"))
RARE_PAIRS = (("bf16", None), ("fp16", "fp32"), ("fp32", None), ("fp64", "fp64"))
COMMON_VARIANTS = ("frozen", "rounded", "groups", "residual", "gate", "gate_first")
RARE_VARIANTS = tuple(name for name in VARIANTS if name not in ("plain", *COMMON_VARIANTS))
# What is compiled and not in the grid: other lengths, dtypes that are mixed, layouts.
ODD = [
    *(("plain", ("bf16", "bf16"), n, "contiguous") for n in (1, 24576, 196608)),
    ("plain", ("fp32", "fp32"), 24576, "contiguous"),
    ("plain", ("fp64", "bf16"), 12288, "contiguous"),
    *(
        ("plain", ("bf16", "bf16"), n, layout)
        for n, layout in ((96, "transposed"), (24576, "transposed"), (24576, "padded"), (96, "unaligned"))
    ),
]


def problems(quick: bool = False) -> list[Problem]:
    """The grid: the plain norm in all dtypes, the rarer ones at FEW lengths, and every variant in bf16. `quick`: a representative part."""
    if quick:
        columns = [("plain", PAIRS[0], FEW), ("plain", ("bf16", "fp32"), (1024,)), ("plain", ("fp32", "fp32"), (8192,))]
        columns += [(variant, PAIRS[0], (2048,)) for variant in COMMON_VARIANTS] + [("gate", PAIRS[0], (131072,))]
        columns += [(variant, PAIRS[0], (4096,)) for variant in RARE_VARIANTS]
    else:
        columns = [("plain", pair, GRID) for pair in PAIRS] + [("plain", pair, FEW) for pair in RARE_PAIRS]
        columns += [(variant, PAIRS[0], GRID) for variant in COMMON_VARIANTS] + [(variant, PAIRS[0], FEW) for variant in RARE_VARIANTS]
    cases = [(variant, pair, n, "contiguous") for variant, pair, lengths in columns for n in lengths]
    return [
        Problem(ROWS, n, direction, variant, *pair, layout)
        for variant, pair, n, layout in (*cases, *ODD)
        for direction in ("forward", "backward")
        if direction == "backward" or variant not in ("frozen", "weight_only")  # whose forward is that of the plain norm
    ]


class Row(NamedTuple):
    """What is known of one problem on one target."""

    target: str
    problem: Problem
    error: str  # why it does not compile, or ""
    kernels: list[Kernel]
    depends_on_rows: bool
    traffic: Traffic

    @property
    def key(self) -> str:
        return f"{self.target} {self.problem}"

    @property
    def minimum(self) -> int:
        """Bytes of a norm that reads each input once and writes each output once."""
        return self.problem.bytes + self.problem.rstd_bytes

    @property
    def memory(self) -> int:
        """Bytes that come from memory or go there."""
        return sum(self.traffic.loaded.values()) + sum(self.traffic.stored.values()) - self.cache

    @property
    def cache(self) -> int:
        """Bytes that the L2 serves."""
        loaded, reads = self.traffic.loaded, self.traffic.reads
        again = sum(loaded[name] * (1 - 1 / times) for name, times in reads.items()) if self.reads_from_cache else 0
        return sum(self.traffic.cached.values()) + round(again)

    @property
    def reads_from_cache(self) -> bool:
        """Whether rows that a program of the forward reads again are still in the L2: those of all resident programs fit into it."""
        if self.main is None or self.problem.direction != "forward":
            return False
        target = TARGETS[self.target]
        rows = self.problem.m * VARIANTS[self.problem.variant].groups  # each group of columns has a program of its own
        row_bytes = sum(self.traffic.loaded[name] / times for name, times in self.traffic.reads.items()) / rows
        return self.main.resident * self.main.block_m * target.device.num_sms * row_bytes <= target.l2

    @property
    def main(self) -> Kernel | None:
        """The kernel that computes the rows."""
        return next((kernel for kernel in self.kernels if kernel.step in ("forward", "backward")), None)


def audit(tasks: list[tuple[str, Problem]], jobs: int | None = None) -> list[Row]:
    """One row per target and problem, in the order of targets. Targets of a problem that follow one another share what is interpreted."""
    compiled = in_processes(_compile, tasks, jobs, "compiling", TRITON_INTERPRET=None)
    counted = in_processes(_count, tasks, jobs, "counting bytes", TRITON_INTERPRET="1")
    rows = [Row(*task, *first, second) for task, first, second in zip(tasks, compiled, counted, strict=True)]
    return sorted(rows, key=lambda row: list(TARGETS).index(row.target))


def in_processes(function: Callable, tasks: list, jobs: int | None, label: str, **environment: str | None) -> list:
    """function of each task, in new processes: whether Triton interprets or compiles is decided when it is imported."""
    with TemporaryDirectory() as cache:  # half a megabyte per kernel, which nobody needs afterwards, unless a folder is given
        environment = {"TRITON_CACHE_DIR": cache, **os.environ, **environment}
        environment = {name: value for name, value in environment.items() if value is not None}
        pool = ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=get_context("spawn"))
        with mock.patch.dict(os.environ, environment, clear=True), pool:
            return list(tqdm(pool.map(function, tasks, chunksize=4), label, len(tasks), leave=False, smoothing=0))


def _compile(task: tuple[str, Problem]) -> tuple[str, list[Kernel], bool]:
    target, problem = TARGETS[task[0]], task[1]
    try:
        error, found = "", [inspect(recorded, target) for recorded in launches(problem, target.device)]
    except Exception as exception:  # Triton raises many: each is a row that does not compile
        error, found = f"does not compile: {type(exception).__name__}: {exception}", []
    return error, found, depends_on_rows(problem._replace(layout="contiguous"), target.device)


def _count(task: tuple[str, Problem]) -> Traffic:
    target, problem = task
    return traffic(problem._replace(layout="contiguous"), TARGETS[target].device)
