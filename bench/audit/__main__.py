"""`python -m bench.audit`: what the package would launch, read from compiled code and counted in the interpreter, without a GPU.

For every problem of the grid and every target: registers, spilled bytes, shared memory, widths of accesses, asynchronous copies, resident
warps, bytes in flight and instructions, and the bytes that come from memory compared with the minimum. Rows that break a rule
(bench/audit/rules.py) are named, and the exit status is 1 if there are any. Any version of Triton will do that is installed.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby

import triton
from rich import box
from rich.console import Console
from rich.table import Table

from bench import records
from bench.audit import peers, rules
from bench.audit.compile import TARGETS
from bench.audit.rows import Row, audit, problems
from bench.problem import GRID, VARIANTS

_COLUMNS = ("problem", "tile", "warps", "CTAs", "grid", "registers", "spilled", "shared KB", "width", "async", "fit / given")
_COLUMNS = (*_COLUMNS, "warps per SM", "KB in flight (x needed)", "instructions per element", "memory / minimum", "cache / minimum")


def tables(rows: Iterable[Row]) -> Iterator[Table]:
    """A table for each target, with a line per problem about the kernel that walks over its rows; broken rules are those of all kernels."""
    for target, group in groupby(rows, lambda row: row.target):
        table = Table(*_COLUMNS, "broken rules", title=target, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for row in group:
            table.add_row(str(row.problem), *_cells(row), "; ".join(rules.broken(row)))
        yield table


def _cells(row: Row) -> list[str]:
    kernel = row.main
    if kernel is None:
        return [""] * (len(_COLUMNS) - 1)
    return [
        f"{kernel.block_m} x {kernel.block_n}",
        str(kernel.num_warps),
        str(kernel.num_ctas),
        "x".join(map(str, kernel.grid)),
        str(kernel.registers),
        str(kernel.spilled),
        f"{kernel.shared / 1024:.1f}",
        str(min(kernel.widths.values())),
        str(kernel.async_copies),
        f"{kernel.resident} / {kernel.per_sm:.2f}",
        str(kernel.warps),
        f"{kernel.in_flight / 1024:.0f} ({kernel.in_flight / TARGETS[row.target].latency_bytes:.1f})",
        f"{kernel.per_element:.1f}",
        f"{row.memory / row.minimum:.4f}",
        f"{row.cache / row.minimum:.2f}",
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.audit", description=__doc__.split(": ", 1)[1].split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a representative part of the grid")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; may be repeated")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="only this one; may be repeated")
    parser.add_argument("--n", action="append", type=int, choices=GRID, metavar="N", help="only rows of N columns; may be repeated")
    parser.add_argument("--jobs", type=records.positive, help="processes; by default one per core")
    parser.add_argument("--peers", action="store_true", help="compare kernels with those of Liger and flash-linear-attention instead")
    parser.add_argument("--freeze", action="store_true", help="keep the figures, of the grid or with --quick of its part, for tests")
    options = parser.parse_args(arguments)
    if options.freeze and (options.target or options.variant or options.n):
        parser.error("--freeze takes no part but --quick")
    console = Console(width=260)  # also in a narrow terminal, which wraps lines: fitted into it, figures would be cut
    if options.peers:
        for target in options.target or ("sm_90",):
            console.print(peers.table(target, peers.compare_all(target, options.jobs)))
        return 0

    chosen = [
        problem
        for problem in problems(options.quick)
        if problem.n in (options.n or (problem.n,)) and problem.variant in (options.variant or VARIANTS)
    ]
    if not chosen:
        parser.error("no problem of the grid has such a --variant and --n" + " in the part of --quick" * options.quick)
    rows = audit([(target, problem) for problem in chosen for target in options.target or TARGETS], options.jobs)
    for table in tables(rows):
        console.print(table)
    for line in rules.worse(rules.frozen(), rules.figures(rows)):
        console.print(f"worse than frozen: {line}", highlight=False)
    if options.freeze:
        rules.freeze(rows)
    broken = [f"{row.key}: {rule}" for row in rows for rule in rules.broken(row)]
    for line in broken:
        console.print(line, highlight=False)
    console.print(f"Triton {triton.__version__}: {len(rows)} rows, {len(broken)} broken rules")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
