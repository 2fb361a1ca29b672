"""The steps of a record, in their order. Each calls an existing command or function in a process of its own and says what came of it."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import problem, records
from bench import tune as tuning
from bench.speed import check
from bench.speed import host as host_time
from bench.speed import run as benchmark
from bench.train import __main__ as training
from bench.train import report
from bench.train.job import PRESETS
from bench.train.providers import BASELINE, RECOMPUTED
from bench.train.run import Run, attempt
from triton_rmsnorm import __main__ as self_checking
from triton_rmsnorm import add_rms_norm, rms_norm, rms_norm_gated
from triton_rmsnorm.runtime import autotune, launch, table
from triton_rmsnorm.runtime.config import Key

LINE = r"^(\S.*)$"
FIRST_USED = (128, 1024, 4096, 16384)  # columns
SUMMARY = r"^=+ (.*SUMMARY: .*)$"  # of compute-sanitizer


class Outcome(NamedTuple):
    """What came of a step."""

    status: str = "done"  # or "partial": there is more to do; "failed"; "absent": something is not installed; "out of time"
    note: str = ""
    result: Any = None


class Step(NamedTuple):
    name: str
    what: str
    run: Callable[[Path, float], Outcome]  # given a folder for files and the minutes that it may take
    least: float  # minutes below which it is not worth beginning
    wanted: float  # minutes that it can use
    rank: int  # where the time is short, steps of a low rank are done


def gpu_tests(folder: Path, minutes: float) -> Outcome:
    cores = os.cpu_count() or 1
    workers = ["-n", str(min(14, cores) if cores > 1 else 0)]
    status, said = _shown([sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--durations=10", *workers, "tests/test_gpu.py"], minutes)
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    summary = _last(r"^=+ ((?:\d+ \w+,? ?)+ in .*?) =+$", said)
    if not summary:
        passed, failed = (len(re.findall(rf"\b{word}\b", said)) for word in ("PASSED", "FAILED"))
        return Outcome("partial", f"ended after {passed} passed and {failed} failed" if passed else _last(LINE, said))
    return Outcome("failed" if status else "done", "; ".join([summary, *failures[:5]]), {"failed": failures})


def self_check(folder: Path, minutes: float) -> Outcome:
    status, said = _said(self_checking.main)
    return Outcome("failed" if status else "done", _last(LINE, said))


def ceiling(folder: Path, minutes: float) -> Outcome:
    device, found = records.gpu(), {}
    for elements in (problem.ELEMENTS // 4, problem.ELEMENTS // 2, problem.ELEMENTS):
        of = problem.Problem(elements // 4096 or 1, 4096)
        found[of.bytes] = round(of.bytes / check.time_copy(of, device, 1.0).us / 1000, 1)
    note = ", ".join(f"{size / 1e6:.4g} MB: {speed} GB/s" for size, speed in found.items())
    return Outcome(note=note, result={"gb_per_s": found})


def tune(folder: Path, minutes: float) -> Outcome:
    path = folder / "tuned" / table.file_name(launch.device_of(records.gpu()))
    path.parent.mkdir(exist_ok=True)
    _, said = _said(tuning.main, ["--suite", "quick", "--minutes", f"{minutes}", "--output", str(path)])
    note = said.strip().split(": ", 1)[-1]
    return Outcome("done" if note.endswith(" 0 left") else "partial", note)


def suite(name: str, folder: Path, minutes: float) -> Outcome:
    status = benchmark.main(["--suite", name, "--minutes", f"{minutes}"])
    content = json.loads(records.newest(f"run-{name}").read_text())
    left = len(benchmark.cells(name, content["absent"])) - len(content["rows"])
    note = f"{len(content['rows'])} cells" + (f", {left} left" if left else "")
    if status:
        return Outcome("failed", f"{note}; ours failed or was wrong")
    return Outcome("partial" if left else "done", note)


def first_use(folder: Path, minutes: float) -> Outcome:
    """What a search at the first use of a key costs, and what it gains."""
    device, rows = launch.device_of(records.gpu()), []
    for n in FIRST_USED:
        for direction in ("forward", "backward"):
            start = time.perf_counter()
            found = autotune.search(Key(direction, n, 2, 2), device, full=False)
            rows.append({"N": n, "direction": direction, "seconds": round(time.perf_counter() - start, 2)})
            rows[-1] |= {"untuned, µs": found.analytic_us, "tuned, µs": found.us, "times as fast": round(found.analytic_us / found.us, 3)}
            rows[-1]["configuration"] = str(found.config)
    seconds, gain = sum(row["seconds"] for row in rows) / len(rows), max(row["times as fast"] for row in rows)
    return Outcome(note=f"{seconds:.1f} s per search; at best {gain:.3f} times as fast", result={"rows": rows})


def host(folder: Path, minutes: float) -> Outcome:
    host_time.main(["--json"])
    us = json.loads(records.newest("host").read_text())["us"]["ours: RMSNorm"]
    return Outcome(note=f"ours: {us['no_grad']:.1f} µs without grad, {us['training']:.1f} µs forward and backward")


def memory(folder: Path, minutes: float) -> Outcome:
    """Time and memory of training steps, with and without the outputs of norms kept for the backward."""
    job = PRESETS["1b"]
    job = replace(job, steps=job.steps // 4, device=records.gpu(), sizes=job.sizes | {"num_hidden_layers": 4})
    runs: dict[str, Run] = {}
    for name in (BASELINE, "ours", RECOMPUTED):
        runs[name] = attempt(name, job, runs)
    figures = report.figures({}, job, runs)["runs"]
    return Outcome("done" if all(run.measured for run in runs.values()) else "failed", _trained(figures), {"runs": figures})


def train(folder: Path, minutes: float) -> Outcome:
    status = training.main(["--preset", "1b", "--compare", "--out", str(folder)])
    note = _trained(json.loads(records.newest("train").read_text())["runs"])
    return Outcome("failed", f"ours differs or failed; {note}") if status else Outcome(note=note)


def _trained(runs: dict[str, dict]) -> str:
    """Time of a step and memory, or why there are none."""
    notes = []
    for name, run in runs.items():
        peak = f", {run['peak_bytes'] / 2**30:.2f} GiB" if run["peak_bytes"] else ""
        measured = run["status"] == "measured"
        notes.append(f"{name}: {1000 * run['step_seconds']['median']:.1f} ms{peak}" if measured else f"{name}: {run['status']}")
    return "; ".join(notes)


def sanitizer(folder: Path, minutes: float) -> Outcome:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        return Outcome("absent", "compute-sanitizer is not installed")
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that each tensor has its own bounds
    notes, good = [], True
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", "from bench.record.steps import small; small()"]
        status, said = _shown(command, minutes / 2)
        good &= status == 0
        notes.append(f"{tool}: {_last(SUMMARY, said) or _last(LINE, said)}")
    return Outcome("done" if good else "failed", "; ".join(notes))


def small() -> None:
    """Every kind of kernel on few rows, forward and backward."""
    device = records.gpu()
    for n in (33, 128, 4096, 20000, 65536):
        for m in (1, 9):
            x, other = (torch.randn(m, n, device=device, requires_grad=True) for _ in range(2))
            weight = torch.ones(n, device=device, requires_grad=True)
            for y in (rms_norm(x, (n,), weight), add_rms_norm(x, other, (n,), weight)[0], rms_norm_gated(x, other, (n,), weight)):
                y.sum().backward()
    torch.cuda.synchronize()


STEPS = {
    step.name: step
    for step in (
        Step("tests", "the tests that only a GPU can answer (pytest -m gpu)", gpu_tests, 2, 5, 5),
        Step("self-check", "python -m triton_rmsnorm", self_check, 0.25, 0.5, 1),
        Step("ceiling", "the bandwidth of a copy, with a cold L2", ceiling, 0.2, 0.3, 2),
        Step("tune", "bench.tune for the most used keys", tune, 1, 8, 6),
        Step("quick", "bench.run --suite quick", partial(suite, "quick"), 2, 4, 0),
        Step("full", "bench.run --suite full", partial(suite, "full"), 2.5, 12, 7),
        Step("first use", "what tuning at the first use of a key costs and gains (bf16, same bits)", first_use, 0.7, 1, 4),
        Step("host", "bench.host", host, 0.4, 0.8, 3),
        Step("memory", "training steps of four layers of a 1B Llama, with and without recompute_norms", memory, 1, 2, 8),
        Step("train", "bench.train --preset 1b --compare", train, 3, 9, 9),
        Step("sanitizer", "compute-sanitizer memcheck and racecheck", sanitizer, 1, 3, 10),
    )
}


def _shown(command: list[str], minutes: float) -> tuple[int, str]:
    """A command's exit status and what it printed, which is shown as it comes. After so many minutes it is killed."""
    with subprocess.Popen(command, cwd=records.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        timer = threading.Timer(60 * minutes, process.kill)
        timer.start()
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        timer.cancel()
    return process.returncode, "".join(lines)


def _said(function: Callable[..., int], *arguments: list[str]) -> tuple[int, str]:
    """What a command returned, and what it printed."""
    with redirect_stdout(StringIO()) as shown:
        status = function(*arguments)
    print(shown.getvalue(), flush=True)
    return status, shown.getvalue()


def _last(pattern: str, text: str) -> str:
    found = re.findall(pattern, text, re.MULTILINE)
    return found[-1][:300] if found else ""
