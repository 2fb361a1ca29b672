"""`python -m bench.run --suite quick|full`: times every provider on every problem, beside a copy of as many bytes, on this GPU.

Results are one JSON file a run, under bench/results/, written as they come: a run that was stopped, or that ran out of its minutes, goes on
where it was when the command is given again with the same code and versions. `python -m bench.plot` draws them.

Exit status: 0; 1 if ours failed, or computed something wrong; 69 without a GPU.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Container
from concurrent.futures import TimeoutError, as_completed
from pathlib import Path

import torch
import triton
from pebble import ProcessPool
from tqdm import tqdm

from bench import records
from bench.problem import SUITES, Data, Problem, draw
from bench.providers import CEILING, EAGER, OURS, PROVIDERS, UnsupportedError, absent, path
from bench.speed import check, report
from bench.speed.check import WrongError
from triton_rmsnorm.runtime import table
from triton_rmsnorm.testing import Expected

MINUTES = {"quick": 4, "full": 10}
SECONDS = 0.1  # of timing for each provider and problem
RESERVE = 15  # seconds of the minutes for starting, and for the cell that is under way when they end


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes (default: 4 for quick, 10 for full)")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="processes that compile ahead; 0 for none")
    options = parser.parse_args(arguments)
    device = records.gpu()
    deadline = time.monotonic() + 60 * (MINUTES[options.suite] if options.minutes is None else options.minutes) - RESERVE

    run, file = _run(options.suite)
    known = _done(run)
    todo: dict[Problem, list[str]] = {}
    for problem, name in cells(options.suite, run["absent"]):
        if (problem, name) not in known:
            todo.setdefault(problem, []).append(name)
    for name, reason in run["absent"].items():
        print(f"{name} is absent: {reason}")

    _compile_ahead(todo, device, options.jobs, (deadline - time.monotonic()) / 3)
    with tqdm(total=sum(map(len, todo.values())), unit="cell") as progress:
        for problem, missing in todo.items():
            if time.monotonic() > deadline:
                break
            progress.set_description(str(problem))
            data = draw(problem, device)
            expected = check.expect(problem, data)
            for name in missing:
                if time.monotonic() > deadline:
                    break
                run["rows"].append(_row(problem, name, data, expected))
                progress.update()
            records.write(file, run, lines="rows")
    left = progress.total - progress.n
    print(report.markdown(run))
    print(f"\n{file}" + (f": out of time, {left} of {progress.total} cells are left; the same command goes on" if left else ""))
    return int(any(row["provider"] == OURS and row["status"] in ("failed", "wrong") for row in run["rows"]))


def cells(suite: str, absent: Container[str]) -> list[tuple[Problem, str]]:
    """What is measured: every provider that is there, and a copy, on every problem of a suite."""
    names = [CEILING, *(name for name in PROVIDERS if name not in absent)]
    return [(problem, name) for problem in SUITES[suite] for name in names]


def _done(run: dict) -> set[tuple[Problem, str]]:
    return {(Problem(**row["problem"]), row["provider"]) for row in run["rows"]}


def _row(problem: Problem, name: str, data: Data, expected: dict[str, Expected]) -> dict:
    row = {"problem": problem._asdict(), "provider": name, "bytes": problem.bytes, "status": "measured", "note": ""}
    try:
        if name == CEILING:
            timing = check.time_copy(problem, data.x.device, SECONDS)
        else:
            norm = PROVIDERS[name].norm(problem)
            timing = check.measure(problem, norm, data, expected, SECONDS)
            if name == EAGER:
                row["note"] = path(check.make_call(problem, norm, data))
    except UnsupportedError as error:
        return row | {"status": "unsupported", "note": str(error)}
    except WrongError as error:
        return row | {"status": "wrong", "note": str(error)}
    except Exception as error:  # whatever foreign code trips over is its result
        return row | {"status": "failed", "note": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
    return row | timing._asdict() | {"gb_per_s": round(problem.bytes / timing.us / 1000, 1)}


def _compile_ahead(todo: dict[Problem, list[str]], device: torch.device, jobs: int, seconds: float) -> None:
    """Calls everything once in processes of their own, which leaves what is compiled in caches on disk. Nothing is timed meanwhile."""
    if not jobs or not todo:
        return
    pool = ProcessPool(jobs, initializer=_never_tune, context=multiprocessing.get_context("spawn"))
    futures = [pool.schedule(_call_once, args=(problem, names, device)) for problem, names in todo.items()]
    failed = 0
    try:
        for future in tqdm(as_completed(futures, timeout=max(0, seconds)), "compiling", len(futures), leave=False):
            failed += future.exception() is not None
    except TimeoutError:
        failed += sum(not future.done() for future in futures)
    if failed:  # the process that measures will do it
        print(f"{failed} of {len(futures)} problems are not compiled ahead")
    pool.stop()  # also what is still being compiled: it would share the GPU with what is timed
    pool.join()


def _never_tune() -> None:
    """In a process that shares the GPU: what tunes itself by timing compiles all that it would time, and learns nothing from it."""
    os.environ.update(FLA_CACHE_RESULTS="0", TORCHINDUCTOR_COMPILE_THREADS="1")
    table.search = None
    triton.testing.do_bench = lambda call, **_: call() or [0.0] * 3


def _call_once(problem: Problem, names: list[str], device: torch.device) -> None:
    data = draw(problem, device)
    for name in names:
        try:
            check.make_call(problem, PROVIDERS[name].norm(problem), data)()
        except Exception:  # the process that measures meets it again, and reports it
            continue
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _run(suite: str) -> tuple[dict, Path]:
    """The newest run of the suite that is like one that would start now, or a new one, and its file."""
    run = {"suite": suite, "metadata": records.metadata(), "absent": absent(), "rows": []}
    for file in sorted(records.RESULTS.glob(f"run-{suite}-*.json"), reverse=True):
        try:
            old = json.loads(file.read_text())
        except ValueError as error:
            print(f"{file} is left alone, because it is not JSON: {error}")
            continue
        if all(records.undated(old[key]) == records.undated(run[key]) for key in ("metadata", "absent")):
            if len(_done(old)) == len(cells(suite, old["absent"])):
                break
            print(f"Going on with {file}, where {len(_done(old))} cells are done.")
            return old, file
    return run, records.path(f"run-{suite}", run["metadata"])
