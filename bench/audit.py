"""`python -m bench.audit`: what the package would launch, read from compiled code and counted in the interpreter, without a GPU.

For every problem of the grid and every target: registers, spilled bytes, shared memory, widths of accesses, asynchronous copies, clusters,
resident thread blocks, bytes on their way to an SM, and bytes moved beside the least that could be. Rows that break a rule are named, and
the exit status is 1 if there are any. It takes the Triton that is installed, whatever its version.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from math import inf
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unittest import mock

import triton
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.launches import VARIANTS, Problem, depends_on_rows
from bench.offline import TARGETS, Kernel, kernels

GRID = (64, 96, 128, 256, 512, 768, 1000, 1024, 1536, 2048, 2560, 3072, 4096, 5000, 5120, 6144, 7168, 8192)
GRID = (*GRID, 12288, 14336, 16384, 28672, 32768, 50000, 65536, 131072)
FEW = (64, 1000, 4096, 16384, 131072)
PAIRS = (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32"))
RARE_PAIRS = (("bf16", None), ("fp16", "fp32"), ("fp32", None), ("fp64", "fp64"))
RARE_VARIANTS = ("add_fp32", "gate_rounded")
ROWS = 8192
RESULTS = Path(__file__).parent / "results"


def problems(quick: bool = False) -> list[Problem]:
    """The grid: the plain norm in all dtypes, the rarer ones at FEW lengths, and every variant in bf16. `quick`: a representative part."""
    columns = [("plain", pair, GRID) for pair in PAIRS] + [("plain", pair, FEW) for pair in RARE_PAIRS]
    columns += [(variant, PAIRS[0], FEW if variant in RARE_VARIANTS else GRID) for variant in VARIANTS if variant != "plain"]
    if quick:
        columns = [("plain", PAIRS[0], FEW), ("plain", ("bf16", "fp32"), (1024,)), ("plain", ("fp32", "fp32"), (8192,))]
        columns += [(variant, PAIRS[0], (4096 if variant in RARE_VARIANTS else 2048,)) for variant in VARIANTS if variant != "plain"]
        columns += [("gate", PAIRS[0], (131072,))]
    return [
        Problem(way, variant, *pair, n)
        for variant, pair, ns in columns
        for way in ("forward", "backward")
        if (way, variant) != ("forward", "frozen")
        for n in ns
    ]


class Row(NamedTuple):
    """What is known of one problem on one target."""

    target: str
    problem: Problem
    error: str  # why it does not compile, or ""
    kernels: list[Kernel]
    depends_on_rows: bool
    loaded: dict[str, int]  # bytes by the name of a kernel's pointer
    stored: dict[str, int]
    minimum: int  # bytes
    reads: dict[str, float]  # how many times each input of rows is read

    @property
    def key(self) -> str:
        return " ".join(map(str, (self.target, *self.problem)))

    @property
    def bytes(self) -> int:
        return sum(self.loaded.values()) + sum(self.stored.values())


def audit(problems: Sequence[Problem], targets: Sequence[str] = tuple(TARGETS), jobs: int | None = None) -> list[Row]:
    """One row a target and problem, at ROWS rows."""
    tasks = [(target, problem) for problem in problems for target in targets]  # targets of a problem share what is interpreted
    compiled = _run(_compile, tasks, jobs, "compiling", TRITON_INTERPRET=None)
    counted = _run(_count, tasks, jobs, "counting bytes", TRITON_INTERPRET="1")
    rows = [Row(*task, *first, *second) for task, first, second in zip(tasks, compiled, counted, strict=True)]
    return sorted(rows, key=lambda row: list(targets).index(row.target))


def _run(function: Callable, tasks: list, jobs: int | None, label: str, **environment: str | None) -> list:
    """function of each task, in processes of their own: whether Triton interprets or compiles is decided when it is imported."""
    with TemporaryDirectory() as cache:  # half a megabyte a kernel, of no use to anyone afterwards, unless asked for
        environment = {"TRITON_CACHE_DIR": cache, **os.environ, **environment}
        environment = {name: value for name, value in environment.items() if value is not None}
        pool = ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=get_context("spawn"))
        with mock.patch.dict(os.environ, environment, clear=True), pool:
            return list(tqdm(pool.map(function, tasks, chunksize=4), label, len(tasks), leave=False, smoothing=0))


def _compile(task: tuple[str, Problem]) -> tuple[str, list[Kernel], bool]:
    name, problem = task
    target = TARGETS[name]
    try:
        error, found = "", kernels(problem, ROWS, target)
    except Exception as exception:  # Triton raises many: each is a row that does not compile
        error, found = f"does not compile: {type(exception).__name__}: {exception}", []
    return error, found, depends_on_rows(problem, target.device)


def _count(task: tuple[str, Problem]) -> tuple[dict[str, int], dict[str, int], int, dict[str, float]]:
    from bench.traffic import traffic

    name, problem = task
    return tuple(traffic(problem, ROWS, TARGETS[name].device))


def read_once(target: str, problem: Problem) -> int:
    """Up to how many columns rows are to be read once: 131072 where there are clusters, 16384 where there are none (sm_80, gfx942, Triton
    before 3.9). Half of that in two cases, in which a row fits no other way than by spilling (compiled):

    - the backward in fp64: 120 bytes a thread at 131072 columns in 16 thread blocks;
    - a backward that writes a gradient besides dx, where one NVIDIA thread block holds a row: 180 to 440 bytes a thread at 16384 columns.
    """
    device, variant = TARGETS[target].device, VARIANTS[problem.variant]
    one_block = device.backend == "cuda" and device.max_ctas == 1
    two_gradients = variant.gate or variant.residual not in (None, problem.dtype)
    halved = problem.direction == "backward" and (problem.dtype == "fp64" or (two_gradients and one_block))
    return (131072 if device.max_ctas > 1 else 16384) // (2 if halved else 1)


def may_spill(target: str, problem: Problem) -> float:
    """Bytes a thread: none on sm_90 and sm_100, but for rows where a second read is taken to cost more (not measured). These are

    - without clusters (Triton before 3.9), the longer half of those that are to be read once, and longer ones;
    - with clusters, the backward of a gate around which values are rounded, beyond 65536 columns.
    """
    once, variant = read_once(target, problem), VARIANTS[problem.variant]
    if target not in ("sm_90", "sm_100"):
        return inf
    if TARGETS[target].device.max_ctas == 1:
        return 192 if problem.n > once // 2 else 0
    rounded_gate = problem.direction == "backward" and variant.gate and "x_hat_dtype" in variant.steps
    return 176 if rounded_gate and once // 2 < problem.n <= once else 0


def broken_rules(row: Row) -> list[str]:
    """What is wrong with a row, in words."""
    if row.error:
        return [row.error]
    problem = row.problem
    broken = []
    for kernel in row.kernels:
        if kernel.spilled > may_spill(row.target, problem):
            broken.append(f"{kernel.name} spills {kernel.spilled} bytes a thread")
        for name, width in kernel.widths.items():
            if width < kernel.aligned[name]:
                broken.append(f"{kernel.name} accesses {name} by {width} bytes, not {kernel.aligned[name]}")
        wanted = kernel.per_sm if kernel.persistent and kernel.grid[0] > 1 else 1  # one for each block of columns there must be
        if kernel.resident < wanted:
            broken.append(f"{kernel.name} has {kernel.per_sm:.2f} thread blocks an SM, of which {kernel.resident} fit")
    if problem.n <= read_once(row.target, problem):
        broken += [f"{name} is read {times:.3f} times" for name, times in row.reads.items() if times != 1]
        limit = 1.02 if problem.direction == "forward" else 1.05
        if row.bytes > limit * row.minimum:
            broken.append(f"moves {row.bytes / row.minimum:.4f} of the least bytes, more than {limit}")
    if row.depends_on_rows:
        broken.append("the configuration depends on the number of rows")
    return broken


def figures(rows: Iterable[Row]) -> dict[str, dict]:
    """What is frozen of each row: registers and spilled bytes a thread and shared bytes a block of each kernel, and bytes moved."""
    return {
        row.key: {
            "registers": [kernel.registers for kernel in row.kernels],
            "spilled": [kernel.spilled for kernel in row.kernels],
            "shared": [kernel.shared for kernel in row.kernels],
            "bytes": row.bytes,
        }
        for row in rows
    }


def frozen_path() -> Path:
    """Of the Triton that is installed: others compile to other registers."""
    return RESULTS / f"audit-{triton.__version__}.json"


def freeze(rows: Iterable[Row]) -> None:
    from bench.records import metadata

    about = {name: value for name, value in metadata().items() if name in ("commit", "changed", "date")}
    about = json.dumps({"triton": triton.__version__, **about, "rows": ROWS})[:-1]
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in figures(rows).items())
    RESULTS.mkdir(exist_ok=True)
    frozen_path().write_text(f'{about}, "figures": {{\n{lines}\n}}}}\n')


def frozen() -> dict[str, dict]:
    """The figures frozen for the Triton that is installed; none if there is no such file."""
    return json.loads(frozen_path().read_text())["figures"] if frozen_path().exists() else {}


def worse(before: dict[str, dict], now: dict[str, dict]) -> list[str]:
    """Figures of `now` that are larger than `before`, in words. Rows that only one of them has are not compared."""
    return [
        f"{key}: {name} was {old}, is {now[key][name]}"
        for key in before.keys() & now.keys()
        for name, old in before[key].items()
        if _larger(now[key][name], old)
    ]


def _larger(new: int | list[int], old: int | list[int]) -> bool:
    if isinstance(new, int):
        return new > old
    if len(new) == len(old):
        return any(a > b for a, b in zip(new, old, strict=True))
    return max(new, default=inf) > max(old)


_COLUMNS = ("way", "variant", "x", "w", "N", "tile", "warps", "CTAs", "stages", "grid", "regs", "spilled", "shared KB", "width", "async")
_COLUMNS = (*_COLUMNS, "fit / given", "KB in flight (x needed)", "bytes / least", "broken rules")


def tables(rows: Iterable[Row]) -> Iterator[Table]:
    """A table for each target: one line a problem, about the kernel that walks over its rows; broken rules are those of all its kernels."""
    for target, group in groupby(rows, lambda row: row.target):
        table = Table(*_COLUMNS, title=target, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for row in group:
            table.add_row(*map(str, row.problem), *_cells(row), "; ".join(broken_rules(row)))
        yield table


def _cells(row: Row) -> list[str]:
    if not row.kernels:
        return [""] * 13
    kernel = next(kernel for kernel in row.kernels if kernel.persistent)
    return [
        f"{kernel.block_m} x {kernel.block_n}",
        *map(
            str, (kernel.num_warps, kernel.num_ctas, kernel.num_stages, "x".join(map(str, kernel.grid)), kernel.registers, kernel.spilled)
        ),
        f"{kernel.shared / 1024:.1f}",
        str(min(kernel.widths.values())),
        str(kernel.async_copies),
        f"{kernel.resident} / {kernel.per_sm:.2f}",
        f"{kernel.in_flight / 1024:.0f} ({kernel.in_flight / TARGETS[row.target].latency_bytes:.1f})",
        f"{row.bytes / row.minimum:.4f}",
    ]


def _json(row: Row) -> dict:
    fields = {
        **row._asdict(),
        **row.problem._asdict(),
        "kernels": [kernel._asdict() for kernel in row.kernels],
        "broken": broken_rules(row),
    }
    del fields["problem"]
    return fields


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.audit", description=__doc__.split(": ", 1)[1].split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a representative part of the grid, within a minute on two cores")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; may be repeated")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="only this one; may be repeated")
    parser.add_argument("--n", action="append", type=int, choices=GRID, metavar="N", help="only rows of so many columns; may be repeated")
    parser.add_argument("--jobs", type=int, help="processes; by default one a core")
    parser.add_argument("--json", type=Path, help="write all that was found to this file")
    parser.add_argument("--freeze", action="store_true", help="keep the figures, of the grid or with --quick of its part, for tests")
    options = parser.parse_args(arguments)
    if options.freeze and (options.target or options.variant or options.n):
        parser.error("--freeze takes no part but --quick")

    chosen = [
        problem
        for problem in problems(options.quick)
        if problem.n in (options.n or GRID) and problem.variant in (options.variant or VARIANTS)
    ]
    rows = audit(chosen, options.target or tuple(TARGETS), options.jobs)
    console = Console(width=None if sys.stdout.isatty() else 240)
    for table in tables(rows):
        console.print(table)
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "rows": [_json(row) for row in rows]}, indent=1) + "\n")
    for line in worse(frozen(), figures(rows)):
        console.print(f"worse than frozen: {line}", highlight=False)
    if options.freeze:
        freeze(rows)
    broken = [f"{row.key}: {rule}" for row in rows for rule in broken_rules(row)]
    for line in broken:
        console.print(line, highlight=False)
    console.print(f"Triton {triton.__version__}: {len(rows)} rows, {len(broken)} broken rules")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
