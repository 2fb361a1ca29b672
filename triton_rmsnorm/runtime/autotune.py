"""Autotuning, which is off by default.

It is switched on by TRITON_RMSNORM_AUTOTUNE=1, or by

    with triton_rmsnorm.autotune.autotuning():
        model(x).sum().backward()  # searches on first use of a row length, and says so

A search starts from the analytic choice and walks downhill: it times all neighbours of the best configuration so far, with a cold L2,
until none is faster. What it finds is used from then on in this process, and kept in the user's cache (XDG_CACHE_HOME), so that no key is
searched twice with the same GPU, Triton and version of this package. The number of rows plays no part: a search takes ELEMENTS elements.
"""

import fcntl
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from triton_rmsnorm._version import __version__
from triton_rmsnorm.reference import Needs, Spec
from triton_rmsnorm.runtime import config as tuning
from triton_rmsnorm.runtime import launch, plan
from triton_rmsnorm.runtime import table as measured
from triton_rmsnorm.runtime.config import Config, Device
from triton_rmsnorm.runtime.launch import Launch
from triton_rmsnorm.runtime.layout import Layout, key_of
from triton_rmsnorm.runtime.table import Key, Measured, runs

ELEMENTS = 1 << 26  # of each tensor of rows: well past any L2
SECONDS = 0.01  # of timing for each configuration, and ten times that for the two finalists
ROUNDS = 6
MARGIN = 0.01  # a configuration must beat the analytic choice by this share to replace it: less is noise
FLUSH_BYTES = 256 << 20  # read before each timed call, so that the L2 holds other data, none of it to be written back

_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


@contextmanager
def autotuning() -> Iterator[None]:
    """While it is active, the first launch of every kind that has no measured configuration searches for one, on every thread."""
    launch.forget()  # so that what was launched before is searched for, too
    measured.asked += 1
    try:
        yield
    finally:
        measured.asked -= 1


def tune(key: Key, device: Device) -> Measured | None:
    """The measured configuration of `key`: from the cache, or by a search, which is added to it. None where a search is not possible."""
    path = cache_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one searches, the others read what it found
        table = measured.found.setdefault(device, {})
        table |= measured.read(path, device)
        if key not in table:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                warnings.warn(f"{key} is not searched for while a CUDA graph is captured: launch it once before", stacklevel=2)
                return None
            table[key] = search(key, device)
            measured.write(path, device, table, triton=triton.__version__, triton_rmsnorm=__version__)
    return table[key]


def cache_file(device: Device) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "triton_rmsnorm" / f"{__version__}-triton-{triton.__version__}" / measured.file_name(device)


def search(key: Key, device: Device) -> Measured:
    """Times configurations of `key` around the analytic choice on a GPU like `device`, and says so on stderr."""
    start = time.monotonic()
    name = f"{key.direction} of {key.n} columns of {key.itemsize} bytes, {key.loads} read and {key.stores} written"
    print(f"triton_rmsnorm: autotuning the {name} ...", file=sys.stderr, flush=True)
    base = best = measured.analytic(key, device)
    with _on(device) as place, torch.no_grad():
        trial = _Trial(key, device, place)
        times: dict[Config, float] = {}
        for _ in range(ROUNDS):
            new = [config for config in (base, *neighbours(best, key, device)) if config not in times]
            times |= trial.times(new, SECONDS)
            winner = min(times, key=times.__getitem__)
            if winner == best and times.keys() > {base}:
                break
            best = winner
        finals = trial.times(list(dict.fromkeys((base, best))), 10 * SECONDS)
    if finals[best] > (1 - MARGIN) * finals[base]:
        best = base
    result = Measured(best, round(finals[best], 2), round(finals[base], 2))
    seconds = time.monotonic() - start
    print(
        f"triton_rmsnorm: {result.us} µs, {result.analytic_us} µs untuned; {len(times)} configurations, {seconds:.0f} s: {best}",
        file=sys.stderr,
        flush=True,
    )
    return result


def neighbours(config: Config, key: Key, device: Device) -> list[Config]:
    """Configurations one step away from `config` that run on `device`."""
    half_and_double = [
        {name: value}
        for name in ("block_m", "num_warps", "num_ctas", "programs")
        for value in (getattr(config, name) // 2, getattr(config, name) * 2)
    ]
    stages = [{"num_stages": config.num_stages + step} for step in (-1, 1, 2)]
    together = [
        {"block_m": config.block_m * 2, "num_warps": config.num_warps * 2},
        {"block_m": config.block_m // 2, "num_warps": config.num_warps // 2},
        {"num_ctas": config.num_ctas * 2, "programs": config.programs // 2},
        {"num_ctas": config.num_ctas // 2, "programs": config.programs * 2},
        {"block_m": config.block_m // 2, "programs": config.programs * 2},
        {"block_m": config.block_m * 2, "programs": config.programs // 2},
    ]
    policies = [{"load_policy": policy} for policy in tuning.LOAD_POLICIES] + [{"store_policy": policy} for policy in tuning.STORE_POLICIES]
    changed = [replace(config, **change) for change in (*half_and_double, *stages, *together, *policies)]
    return [other for other in changed if other != config and runs(other, key, device)]


class _Trial:
    """A problem of one key, with tensors of its own, to be launched in any configuration."""

    def __init__(self, key: Key, device: Device, place: torch.device):
        self.device = device
        self.forward = key.direction == "forward"
        rows, dtype, weight_dtype = max(1, ELEMENTS // key.n), _DTYPES[key.itemsize], _DTYPES.get(key.weight_itemsize)
        residual = (key.loads, key.stores) == ((2, 2) if self.forward else (3, 1))
        gate = key.loads == (2 if self.forward else 3) and not residual
        self.spec = Spec((key.n,), 1e-6, activation="silu" if gate else None)
        self.needs = Needs(dweight=weight_dtype is not None, dgate=gate and key.stores > 1)
        self.accumulator = torch.promote_types(torch.promote_types(dtype, weight_dtype or dtype), torch.float32)
        self.expected: list[Tensor] = []
        self.spills = 0

        def given(*shape: int, dtype: torch.dtype | None = dtype, wanted: bool = True) -> Any:
            return torch.randn(shape, device=place).to(dtype) if wanted and dtype else None

        def written(*shape: int, dtype: torch.dtype | None = dtype, wanted: bool = True) -> Tensor | None:
            return torch.empty(shape, dtype=dtype, device=place) if wanted and dtype else None

        row_data = (rows, key.n)
        self.inputs = {
            "X": given(*row_data),
            "W": given(key.n, dtype=weight_dtype),
            "GATE": given(*row_data, wanted=gate),
            "RESIDUAL": given(*row_data, wanted=residual and self.forward),
            "DY": given(*row_data, wanted=not self.forward),
            "DRESIDUAL_OUT": given(*row_data, wanted=residual and not self.forward),
            "RSTD": given(rows, dtype=self.accumulator),
        }
        self.outputs = {
            "Y": written(*row_data, wanted=self.forward),
            "RESIDUAL_OUT": written(*row_data, wanted=residual and self.forward),
            "DX": written(*row_data, wanted=not self.forward),
            "DGATE": written(*row_data, wanted=self.needs.dgate),
            "DW": written(key.n, dtype=weight_dtype, wanted=not self.forward),
        }

    def times(self, configs: Iterable[Config], seconds: float) -> dict[Config, float]:
        """µs of each configuration that fits the GPU and computes what the first one did."""
        launches = {config: self._launches(config) for config in configs}
        self._compile(launches.values())
        return {config: time for config, steps in launches.items() if (time := self._time(steps, seconds)) is not None}

    def _launches(self, config: Config) -> list[tuple[Launch, list[Tensor | None]]]:
        """The launches in order, with their pointers."""
        keys = {name: key_of(tensor) for name, tensor in self.inputs.items()}
        layouts = {name: None if key is None else Layout(*key) for name, key in keys.items()}
        x, weight, gate = layouts["X"], layouts["W"], layouts["GATE"]
        scratch = {}
        steps: tuple[Launch | None, ...]
        if self.forward:
            steps = (plan.forward_launch(self.spec, self.device, x, weight, layouts["RESIDUAL"], gate, config),)
        else:
            given = (layouts["DY"], layouts["DRESIDUAL_OUT"], x, weight, gate)
            steps = c1, main, sum_partials = plan.backward_launches(self.spec, self.device, self.needs, *given, config)
            rstd = self.inputs["RSTD"]
            if c1:
                scratch["C1"] = torch.empty_like(rstd)
            if sum_partials:
                scratch["DW_PARTIAL"] = rstd.new_empty(main.grid[0], self.spec.columns)
        tensors = self.inputs | self.outputs | scratch
        return [(step, [tensors.get(name) for name in step.pointers]) for step in steps if step]

    def _compile(self, launches: Iterable[list]) -> None:
        """On all processors at once; what does not compile will say so when it is launched."""
        if launch.INTERPRETED:
            return
        with ThreadPoolExecutor(os.cpu_count()) as executor, triton.AsyncCompileMode(executor, ignore_errors=True):
            for step, pointers in (pair for steps in launches for pair in steps):
                _compiled(step, pointers)

    def _time(self, steps: list, seconds: float) -> float | None:
        def call() -> None:
            for step, pointers in steps:
                step(*pointers)

        outputs = [output.fill_(torch.nan) for output in self.outputs.values() if output is not None]
        first = not self.expected  # the analytic choice, which has to run, and which all others are held against
        try:
            call()
        except (OutOfResources, PTXASError):
            if first:
                raise
            return None
        spills = 0 if launch.INTERPRETED else sum(_compiled(*pair).n_spills for pair in steps)
        if first:
            self.expected, self.spills = [output.clone() for output in outputs], spills
        if spills > self.spills:
            return None
        if not all(_agree(*pair) for pair in zip(outputs, self.expected, strict=True)):
            warnings.warn(f"a kernel compiled with {steps[-1][0].options} computes something else and is not used", stacklevel=2)
            return None
        return median(time_cold(call, seconds))


def _compiled(step: Launch, pointers: list[Tensor | None]) -> Any:
    """The compiled kernel of a launch, or, while compiling in the background, a promise of it. Nothing runs."""
    return step.kernel.warmup(*pointers, *step.arguments, grid=step.grid, **step.options)


def _agree(output: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by no more than orders of summation do: over as many terms as a row or a column of ELEMENTS has."""
    roundings = 8 * torch.finfo(output.dtype).eps + torch.finfo(torch.float32).eps * (ELEMENTS / output.shape[-1]) ** 0.5
    difference, size = (torch.linalg.vector_norm(values, dtype=torch.float64) for values in (output - expected, expected))
    return bool(difference <= roundings * size)


@contextmanager
def _on(device: Device) -> Iterator[torch.device]:
    """The current GPU, or the first other one that is a `device`."""
    if launch.INTERPRETED:
        yield torch.device("cpu")
        return
    index = next(i for i in (torch.cuda.current_device(), *range(torch.cuda.device_count())) if launch._gpu(i) == device)
    with torch.cuda.device(index):
        yield torch.device("cuda", index)


def time_cold(call: Callable[[], object], seconds: float, before: Callable[[], object] = lambda: None) -> list[float]:
    """µs that the GPU took for each of at least 5 calls, for as many as `seconds` allow, each with `before` done and the L2 cold.

    The GPU is kept waiting until a call is in its queue, so that the host's time is not measured. The L2 is filled by reading: lines that
    were written would have to go back to memory during the call.
    """
    call()
    host = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        host.append(time.perf_counter() - start)
    host_cycles = int(min(host) * 3e9)  # more than a GPU's clock makes in that time
    flush = torch.ones(FLUSH_BYTES // 4, device="cuda")
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while not times or (time.perf_counter() < stop and len(times) < 1000):
        events = []
        for _ in range(5):
            before()
            flush.sum()
            torch.cuda._sleep(host_cycles)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        times += [1000 * begin.elapsed_time(end) for begin, end in events]
    return times
