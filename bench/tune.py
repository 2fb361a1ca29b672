"""`python -m bench.tune`: searches for the fastest configurations on this GPU of all that bench.run times, and writes the shipped table.

The table is triton_rmsnorm/tuned/<GPU>.json. It is written as it grows, and what it knows is not searched for again: the same command goes
on where the last one ran out of its minutes, or begins anew where the table was deleted. Exit status: 0, or 69 without a GPU.
"""

import argparse
import time
from pathlib import Path
from statistics import geometric_mean

from tqdm import tqdm

from bench import records
from bench.problem import DTYPES, SUITES, Problem
from triton_rmsnorm.runtime import autotune, launch
from triton_rmsnorm.runtime import table as measured
from triton_rmsnorm.runtime.config import Key


def keys(problem: Problem) -> list[Key]:
    """What the launches of a problem are chosen by."""
    row, weight, residual = (DTYPES[name].itemsize if name else 0 for name in (problem.dtype, problem.weight_dtype, problem.residual_dtype))
    directions = problem.direction.split("+")
    return [
        Key(direction, problem.n, max(row, residual), weight, problem.kind, direction == "backward" and problem.own_dresidual)
        for direction in directions
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--suite", choices=SUITES, default="full", help="the problems of bench.run to tune for")
    parser.add_argument("--minutes", type=float, default=10, help="start no new search after this many minutes")
    parser.add_argument("--output", type=Path, help="another file than the shipped table")
    options = parser.parse_args(arguments)
    device = launch.device_of(records.gpu())
    deadline = time.monotonic() + 60 * options.minutes

    path = options.output or measured.SHIPPED / measured.file_name(device)
    table = measured.read(path, device)
    wanted = dict.fromkeys(key for problem in SUITES[options.suite] for key in keys(problem))
    todo = [key for key in wanted if key not in table]
    searched = []
    for key in tqdm(todo, "tuning", unit="search"):
        if time.monotonic() > deadline:
            break
        table[key] = autotune.search(key, device)
        searched.append(key)
        measured.write(path, device, table, **records.metadata())

    gains = [table[key].analytic_us / table[key].us for key in searched]
    gain = f"on average {geometric_mean(gains):.3f} times as fast as the analytic choice, at most {max(gains):.2f}; " if gains else ""
    print(f"{path}: {len(table)} configurations, {len(searched)} of them new; {gain}{len(todo) - len(searched)} left")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
