"""`python -m bench.host`: the host's time per call, in µs, for ours, torch's norms and the peers that are installed.

On a GPU calls are queued and not waited for. Without one, Triton's launches of CPU tensors end in a driver that does nothing
(bench.speed.stub_driver): this is all of the host's work for ours and Liger, except what torch does differently on a GPU (allocations; a
backward in another thread). torch's norms are not stubbed: they compute on the CPU, with few numbers. An autograd.Function that does
nothing is the lower bound.

`--json` keeps the result under bench/results/.
"""

import argparse
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import quantiles
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import triton_rmsnorm
from bench import records, style
from bench.problem import EPS, Data, Problem, draw
from bench.providers import PROVIDERS, absent
from triton_rmsnorm.runtime import launch

ON_GPU, ON_CPU = Problem(64, 4096), Problem(4, 64)
WINDOW = 200e-6  # seconds of calls between two looks at the clock: short, so that most windows pass undisturbed
WINDOWS = 400


class Nothing(torch.autograd.Function):
    """Saves and allocates what a norm does."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class HostTimes(NamedTuple):
    """µs per call: the first quartile of windows, which disturbances do not reach. Forward without grad, with, and with backward."""

    no_grad: float
    grad: float
    training: float


def norms(problem: Problem, data: Data, gpu: bool) -> dict[str, Callable]:
    """Functions of x, by name."""
    device, dtype, shape, weight = data.x.device, data.x.dtype, (problem.n,), data.weight.requires_grad_()
    ours, torchs = (module(problem.n, EPS, device=device, dtype=dtype) for module in (triton_rmsnorm.RMSNorm, torch.nn.RMSNorm))
    note = "" if gpu else ", computed on the CPU"
    found = {
        "ours: RMSNorm": ours,
        "ours: rms_norm": lambda x: triton_rmsnorm.rms_norm(x, shape, weight, EPS),
        "a Function that does nothing": lambda x: Nothing.apply(x, weight),
        f"torch.nn.RMSNorm{note}": torchs,
        f"F.rms_norm{note}": lambda x: F.rms_norm(x, shape, weight, EPS),
        f"F.layer_norm{note}": lambda x: F.layer_norm(x, shape, weight, None, EPS),
    }
    missing = absent()
    for name in ("Liger", "QuACK", "fla") if gpu else ("Liger",):  # the others ask the driver about the GPU, and tune themselves on it
        if name in missing:
            print(f"{name} is absent: {missing[name]}")
            continue
        norm = PROVIDERS[name].norm(problem)
        found[name] = lambda x, norm=norm: norm(x, weight, None, None)
    return found


def host_times(norm: Callable, data: Data) -> HostTimes:
    parameters = [data.weight, *(norm.parameters() if isinstance(norm, torch.nn.Module) else ())]
    inputs = [data.x, *parameters]

    def training():
        return torch.autograd.grad(norm(data.x), inputs, data.dy, allow_unused=True)

    with torch.no_grad():
        no_grad = window_time(lambda: norm(data.x))
    data.x.requires_grad_()
    return HostTimes(no_grad, window_time(lambda: norm(data.x)), window_time(training))


def window_time(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """µs per call: the first quartile over WINDOWS short windows."""
    for _ in range(20):
        call()
    start = clock()
    call()
    repeats = max(1, int(WINDOW / max(clock() - start, 1e-9)))
    times = []
    for _ in range(WINDOWS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # so that the queue is never full
        start = clock()
        for _ in range(repeats):
            call()
        times.append((clock() - start) / repeats * 1e6)
    return quantiles(times, n=4)[0]


def picture(result: dict):
    """Bars of µs per call: forward without grad, with, and with the backward."""
    about, found = result["metadata"], result["us"]
    figure = style.figure(9.4, 1.6 + 0.55 * len(found))
    axes = figure.subplots()
    parts = {
        "no_grad": ("forward, no grad", style.SKY),
        "grad": ("forward", style.BLUE),
        "training": ("forward and backward", style.VERMILLION),
    }
    for i, (part, (label, color)) in enumerate(parts.items()):
        bars = axes.barh([y + 0.26 * (i - 1) for y in range(len(found))], [times[part] for times in found.values()], 0.24, color=color)
        axes.bar_label(bars, fmt="{:.1f}", padding=3, fontsize=8)
        bars.set_label(label)
    axes.set_yticks(range(len(found)), found)
    axes.invert_yaxis()
    axes.set(xlabel="host time per call (µs)", xlim=(0, 1.1 * max(times["training"] for times in found.values())))
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    axes.grid(axis="x", alpha=0.3)
    versions = records.words(about, "triton_rmsnorm", "torch", "triton")
    where = f"{about['gpu']}, driver {about['driver']}" if about["gpu"] != "none" else "no GPU, the driver is a stub that does nothing"
    figure.suptitle(f"{result['problem']}; {where}\n{about['cpu']}, load {about['load']}, {versions}, {about['date'][:10]}", fontsize=9)
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="write figures and a picture to bench/results")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    problem, driver, times = ON_GPU if gpu else ON_CPU, nullcontext(), {}
    if not gpu:
        if launch.INTERPRETED or not shutil.which("cc"):
            raise SystemExit("Without a GPU this takes a C compiler (cc), and a Triton that does not interpret (no TRITON_INTERPRET=1).")
        from bench.speed.stub_driver import stubbed  # it takes Triton's backend for NVIDIA, which not every Triton has

        torch.set_num_threads(1)  # for the norms that compute: nothing is shared out here
        driver = stubbed()
    with driver:
        data = draw(problem, torch.device("cuda" if gpu else "cpu"))
        for name, norm in norms(problem, data, gpu).items():
            data.x.requires_grad_(False)
            times[name] = host_times(norm, data)
    measured = {
        "metadata": records.metadata() | {"load": round(os.getloadavg()[0], 1)},  # what else ran slows calls down
        "driver": "the GPU's" if gpu else "stubbed: Triton's launches end in a driver that does nothing",
        "problem": f"{problem.m} x {problem.n}, {problem.dtype}",
        "us": {name: {what: round(us, 2) for what, us in found._asdict().items()} for name, found in times.items()},
    }
    caption = f"{measured['problem']}; {records.words(measured['metadata'])}"
    table = Table("µs per call", "forward, no grad", "forward", "forward and backward", caption=caption)
    for name, calls in measured["us"].items():
        table.add_row(name, *(f"{us:.1f}" for us in calls.values()))
    Console(width=120).print(table)
    if options.json:
        path = records.path("host", measured["metadata"], where=None if gpu else "stubbed")
        records.write(path, measured)
        picture(measured).savefig(path.with_suffix(".png"), dpi=130)
        print(f"{path}, {path.with_suffix('.png')}")
    return 0
