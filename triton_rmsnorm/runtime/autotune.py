"""Autotuning: the first launch of a key that no table knows tries other configurations on the GPU and keeps the fastest.

The environment variable TRITON_RMSNORM_AUTOTUNE says how far a search goes:

    not set   at most 8 configurations, and only one whose results equal those of the analytic choice bit for bit can win. So results do not
              depend on what was timed. It takes up to 3 s per key and at most 256 MB of GPU memory.
    full      the whole neighborhood of the analytic choice, including what changes the order of sums, and with it last bits of the results.
              `with autotuning():` does the same. It takes up to a minute per key and 1 GB.
    0         no search: the analytic choice.

What is found is kept in the user's cache (XDG_CACHE_HOME), in one file per device, version of this package, version of Triton and kind of
search. If a search is not possible (a CUDA graph is being captured, another process holds the lock for more than 10 s, the cache folder
cannot be written, memory runs out, the compiler fails), the analytic choice is used. The number of rows plays no part in a search.
"""

import fcntl
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor

from triton_rmsnorm._version import __version__
from triton_rmsnorm.reference import Needs, Spec
from triton_rmsnorm.runtime import launch, plan, table
from triton_rmsnorm.runtime.config import LOAD_POLICIES, STORE_POLICIES, Config, Device, Key, analytic, is_valid
from triton_rmsnorm.runtime.launch import Launch
from triton_rmsnorm.runtime.layout import Layout, keys_of
from triton_rmsnorm.runtime.table import Measured
from triton_rmsnorm.runtime.timing import time_interleaved

VARIABLE = "TRITON_RMSNORM_AUTOTUNE"
MEMORY = 256 << 20  # bytes of a search that keeps results; a full search takes 4 times as much, for steadier times
COMPARED = 1 << 20  # elements that are compared at a time
LOCK_SECONDS = 10
TRIES = 8  # configurations of a search that keeps results, the analytic choice included
ROUNDS = 15  # of timing each configuration
STEPS = 6  # of a full search, each to the best neighbor
MARGIN = 0.01  # the share by which a configuration must beat the analytic choice to replace it: less is noise

_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
_found: dict[tuple[Device, bool], dict[Key, Measured | None]] = {}  # of this process, by device and whether the search was full
_contexts = 0  # how many `autotuning` contexts are open
_outside: Any = None  # the search outside of them
_lock = threading.Lock()


@contextmanager
def autotuning() -> Iterator[None]:
    """While it is active, on all threads, the first launch of every key searches the whole neighborhood of its analytic choice.

    Launches that were prepared before are prepared again. What is found may change last bits of results; see TRITON_RMSNORM_AUTOTUNE.
    """
    global _contexts, _outside
    with _lock:
        if _contexts == 0:
            _outside, table.search = table.search, tune
        _contexts += 1
    launch.forget()
    try:
        yield
    finally:
        with _lock:
            _contexts -= 1
            if _contexts == 0:
                table.search = _outside
        launch.forget()


def tune(key: Key, device: Device) -> Measured | None:
    """What was found for `key` before, or else by a search now. None where the analytic choice is to be used."""
    full = _contexts > 0 or os.environ.get(VARIABLE) == "full"
    found = _found.setdefault((device, full), {})
    if key not in found:
        if _capturing() or not (torch.cuda.is_available() or launch.INTERPRETED):  # without a GPU, for tests of the host path
            return None
        try:
            found[key] = _look_up(key, device, full)
        except Exception as error:  # whatever stops a search, the launch that asked for it goes on
            found[key] = None
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            warnings.warn(f"{_name(key)} is not tuned: {reason}. {VARIABLE}=0 switches tuning off.", RuntimeWarning, stacklevel=2)
    return found[key]


def cache_file(device: Device, full: bool) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = f"{__version__}-triton-{triton.__version__}{'-full' if full else ''}"
    # Devices of one name may differ in their SMs (RTX 3080, limits of MPS). Each would replace the table of the other.
    return cache / "triton_rmsnorm" / folder / f"{device.num_sms}-sms-{table.file_name(device)}"


def search(key: Key, device: Device, full: bool = True) -> Measured:
    """Times configurations of `key` on a GPU like `device`, and says so on stderr."""
    start = time.monotonic()
    base = best = analytic(key, device)
    with _on(device) as place, torch.no_grad():
        trial = _Trial(key, device, place, full)
        times = trial.times([base, *(neighbors(base, key, device) if full else variants(base, key, device))])
        for _ in range(STEPS if full else 0):
            winner = min(times, key=times.__getitem__)
            if winner == best:
                break
            best = winner
            times |= trial.times([config for config in neighbors(best, key, device) if config not in times])
        best = min(times, key=times.__getitem__)
        finals = trial.times([base, best]) if best != base else times
        del trial
    if place.type == "cuda":
        torch.cuda.empty_cache()
    if finals[best] > (1 - MARGIN) * finals[base]:
        best = base
    result = Measured(best, round(finals[best], 2), round(finals[base], 2))
    effort = f"{len(times)} configurations, {time.monotonic() - start:.1f} s"
    effect = "results may differ in last bits" if full else "same results bit for bit"
    print(
        f"triton_rmsnorm: {_name(key)}: {result.us} µs, {result.analytic_us} µs untuned ({effort}; {effect})", file=sys.stderr, flush=True
    )
    return result


def variants(config: Config, key: Key, device: Device) -> list[Config]:
    """Configurations that leave the order of sums within a row as it is."""
    if key.direction == "forward":
        changes: list[dict[str, Any]] = [
            {"weight_first": not config.weight_first},
            {"block_m": config.block_m * 2},
            {"block_m": config.block_m // 2},
        ]
    else:
        changes = [{"num_stages": config.num_stages + 1}, {"num_stages": config.num_stages - 1}]
    changes += [{"load_policy": policy} for policy in LOAD_POLICIES] + [{"store_policy": policy} for policy in STORE_POLICIES]
    return _changed(config, changes, key, device)[: TRIES - 1]


def neighbors(config: Config, key: Key, device: Device) -> list[Config]:
    """Configurations one step away from `config`."""
    doubled = [("block_m",), ("num_warps",), ("num_ctas",), ("block_m", "num_warps")]  # together; and halved
    traded = [("num_ctas", "num_warps")]  # one doubled, the other halved; and the other way round
    changes: list[dict[str, Any]] = [{"num_stages": config.num_stages - 1}, {"num_stages": config.num_stages + 1}]
    if config.programs:
        doubled.append(("programs",))
        traded += [("num_ctas", "programs"), ("block_m", "programs"), ("num_warps", "programs")]
    else:
        changes.append({"weight_first": not config.weight_first})
    up, down = ({name: value * 2 // divisor for name, value in vars(config).items() if type(value) is int} for divisor in (1, 4))
    for names in doubled:
        changes += [{name: scaled[name] for name in names} for scaled in (down, up)]
    for first, second in traded:
        changes += [{first: up[first], second: down[second]}, {first: down[first], second: up[second]}]
    changes += [{"load_policy": policy} for policy in LOAD_POLICIES] + [{"store_policy": policy} for policy in STORE_POLICIES]
    return _changed(config, changes, key, device)


def _changed(config: Config, changes: list[dict[str, Any]], key: Key, device: Device) -> list[Config]:
    configs = dict.fromkeys(replace(config, **change) for change in changes)
    return [other for other in configs if other != config and is_valid(other, key, device)]


def _look_up(key: Key, device: Device, full: bool) -> Measured:
    """From the cache file, or by a search that is added to it. Of several processes one searches, the others read what it found."""
    path = cache_file(device, full)
    known = table.read(path, device)
    if key in known:  # without the lock, so also where nothing can be written, or while another process searches for other keys
        return known[key]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        _acquire(lock.fileno())
        try:
            known = table.read(path, device)
            if key not in known:
                known[key] = search(key, device, full)
                table.write(path, device, known, triton=triton.__version__, triton_rmsnorm=__version__)
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough where a process was forked meanwhile
    return known[key]


def _acquire(lock: int) -> None:
    stop = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > stop:
                raise TimeoutError(f"another process has been tuning for more than {LOCK_SECONDS} s") from None
            time.sleep(0.05)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _name(key: Key) -> str:
    what = "RMSNorm" if key.kind == "plain" else f"RMSNorm with {key.kind}"
    return f"{what}, {key.direction}, {key.n} columns of {key.itemsize} bytes"


class _Trial:
    """A problem of one key, with its own tensors, to be launched in any configuration."""

    def __init__(self, key: Key, device: Device, place: torch.device, full: bool):
        self.device = device
        self.full = full
        self.forward = key.direction == "forward"
        self.expected: list[Tensor] = []  # results of the analytic choice
        self.dw_partial: dict[int, Tensor] = {}  # by the number of programs
        residual, gate = key.kind == "residual", key.kind == "gate"
        dtype, weight_dtype = _DTYPES[key.itemsize], _DTYPES.get(key.weight_itemsize)
        self.spec = Spec((key.n,), 1e-6, activation="silu" if gate else None)
        self.needs = Needs(dweight=weight_dtype is not None, dresidual=key.own_dresidual, dgate=gate)
        accumulator = torch.promote_types(torch.promote_types(dtype, weight_dtype or dtype), torch.float32)

        memory = MEMORY * (4 if full else 1)
        l2 = torch.cuda.get_device_properties(place).L2_cache_size if place.type == "cuda" else 0
        self.flush = torch.ones(min(l2 + l2 // 4, memory // 3) // 4, dtype=torch.float32, device=place)
        row_tensors = key.loads + 2 * key.stores  # with a copy of the results of the analytic choice
        left = memory - self.flush.nbytes - memory // 4  # a quarter is for partial dw and for comparisons
        rows = max(1, left // (row_tensors * key.n * key.itemsize))
        generator = torch.Generator(place).manual_seed(0)

        def given(*shape: int, dtype: torch.dtype | None = dtype, wanted: bool = True) -> Any:
            return torch.empty(shape, dtype=dtype, device=place).normal_(generator=generator) if wanted and dtype else None

        def written(*shape: int, dtype: torch.dtype | None = dtype, wanted: bool = True) -> Tensor | None:
            return torch.empty(shape, dtype=dtype, device=place) if wanted and dtype else None

        data = (rows, key.n)
        self.inputs = {
            "X": given(*data),
            "W": given(key.n, dtype=weight_dtype),
            "GATE": given(*data, wanted=gate),
            "RESIDUAL": given(*data, wanted=residual and self.forward),
            "DY": given(*data, wanted=not self.forward),
            "DRESIDUAL_OUT": given(*data, wanted=residual and not self.forward),
        }
        if not self.forward:
            self.inputs["RSTD"] = given(rows, dtype=accumulator)
        self.outputs = {
            "Y": written(*data, wanted=self.forward),
            "RSTD": written(rows, dtype=accumulator, wanted=self.forward),
            "RESIDUAL_OUT": written(*data, wanted=residual and self.forward),
            "DX": written(*data, wanted=not self.forward),
            "DRESIDUAL": written(*data, wanted=key.own_dresidual),
            "DGATE": written(*data, wanted=gate and not self.forward),
            "DW": written(key.n, dtype=weight_dtype, wanted=not self.forward),
        }
        if not self.forward:
            del self.outputs["RSTD"]

    def times(self, configs: Iterable[Config]) -> dict[Config, float]:
        """µs of each configuration that fits the GPU and computes what the first one, the analytic choice, computes."""
        launches = {config: self._launches(config) for config in configs}
        copy_context().run(self._compile, launches.values())  # Triton 3.7 stays in its mode where it is interrupted
        calls = {config: _caller(steps) for config, steps in launches.items() if self._is_right(steps)}
        times = time_interleaved(list(calls.values()), ROUNDS, self.flush)
        return {config: median(us) for config, us in zip(calls, times, strict=True)}

    def _launches(self, config: Config) -> list[tuple[Launch, list[Tensor | None]]]:
        """The launches in order, with their pointers."""
        keys = zip(self.inputs, keys_of(self.inputs.values()), strict=True)
        layouts: dict[str, Any] = {name: key and Layout(*key) for name, key in keys}
        x, weight, gate = layouts["X"], layouts["W"], layouts["GATE"]
        scratch: dict[str, Tensor] = {}
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
                programs = main.grid[0]
                if programs not in self.dw_partial:
                    self.dw_partial[programs] = rstd.new_empty(programs, self.spec.columns)
                scratch["DW_PARTIAL"] = self.dw_partial[programs]
        tensors = self.inputs | self.outputs | scratch
        return [(step, [tensors.get(name) for name in step.pointers]) for step in steps if step]

    def _compile(self, launches: Iterable[list]) -> None:
        """On all processors at once; what does not compile will say so when it is launched."""
        if launch.INTERPRETED:
            return
        with ThreadPoolExecutor(os.cpu_count()) as executor, triton.AsyncCompileMode(executor, ignore_errors=True):
            for step, pointers in (pair for steps in launches for pair in steps):
                step.kernel.warmup(*pointers, *step.arguments, grid=step.grid, **step.options)

    def _is_right(self, steps: list) -> bool:
        """Launches once, and compares the results with those of the first configuration, which must run."""
        outputs = [output.fill_(torch.nan) for output in self.outputs.values() if output is not None]
        try:
            _caller(steps)()
        except Exception:  # one configuration that does not compile or does not fit is no reason to end the search
            if not self.expected:
                raise
            return False
        if not self.expected:
            self.expected = [output.clone() for output in outputs]
        agree = _agree if self.full else _equal
        return all(agree(*pair) for pair in zip(outputs, self.expected, strict=True))


def _caller(steps: list[tuple[Launch, list[Tensor | None]]]) -> Callable[[], None]:
    def call() -> None:
        for step, pointers in steps:
            step(*pointers)

    return call


def _parts(output: Tensor, expected: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of a few rows, because comparisons need memory of their own."""
    rows = max(1, COMPARED // output[0].numel())
    return zip(output.split(rows), expected.split(rows), strict=True)


def _equal(output: Tensor, expected: Tensor) -> bool:
    return all(torch.equal(*pair) for pair in _parts(output, expected))


def _agree(output: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by no more than orders of summation do: over as many terms as a row or a column has."""
    terms = max(output.shape[-1], expected.numel() // output.shape[-1])
    roundings = 8 * torch.finfo(output.dtype).eps + torch.finfo(torch.float32).eps * terms**0.5
    difference = size = 0.0
    for one, other in _parts(output, expected):
        difference += (one - other).double().square().sum().item()
        size += other.double().square().sum().item()
    return difference <= roundings**2 * size


@contextmanager
def _on(device: Device) -> Iterator[torch.device]:
    """The current GPU, or the first other one that is a `device`."""
    if launch.INTERPRETED:
        yield torch.device("cpu")
        return
    candidates = [torch.device("cuda", i) for i in (torch.cuda.current_device(), *range(torch.cuda.device_count()))]
    place = next(candidate for candidate in candidates if launch.device_of(candidate) == device)
    with torch.cuda.device(place):
        yield place


if os.environ.get(VARIABLE, "") not in ("", "0", "full"):
    raise ValueError(f"{VARIABLE} must be 0, full, or not set, got {os.environ[VARIABLE]!r}")
if os.environ.get(VARIABLE) != "0" and not launch.INTERPRETED:
    table.search = tune
