"""Stand-ins for a rehearsal of the record without a GPU: the interpreter, Triton's stubbed driver, made-up times, small shapes."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from unittest import mock

import torch

from bench import problem, records
from bench.providers import EAGER, OURS, PROVIDERS
from bench.record import steps
from bench.speed import check, host
from bench.speed import run as benchmark
from bench.train.job import PRESETS
from bench.train.providers import BASELINE, CONTROL, RECOMPUTED
from bench.train.providers import PROVIDERS as TRAINED
from triton_rmsnorm import __main__ as self_check
from triton_rmsnorm.runtime import autotune, launch
from triton_rmsnorm.runtime.config import SM_90

METADATA = {"gpu": "REHEARSAL", "driver": "none"}
COLUMNS = (64, 128, 256, 1024)


@contextmanager
def small() -> Iterator[None]:
    """Problems that the interpreter can do."""
    with mock.patch.multiple(problem, ELEMENTS=1 << 14, HEADS=4):
        large = [problem.Problem(problem.rows(n), n, direction) for n in COLUMNS for direction in problem.DIRECTIONS[:2]]
        others = [problem.Problem(problem.rows(256), 256, direction, "residual") for direction in problem.DIRECTIONS[:2]]
        with mock.patch.dict(problem.SUITES, {"quick": [*large[:4], *others], "full": [*large, *others]}):
            yield


@contextmanager
def stand_ins() -> Iterator[None]:
    """For a process that does one step. Calls are made, and their results are checked; their times are made up."""
    metadata, ticks = records.metadata, count()

    def microseconds() -> float:
        return 100.0 + 7.0 * (next(ticks) * 37 % 11)

    def time_cold(call, seconds, before=lambda: None):
        before()
        call()
        return [microseconds()] * 5

    def time_interleaved(calls, rounds, flush, before=lambda: None):
        for call in calls:
            call()
        return [[microseconds()] * rounds for _ in calls]

    def neighbors(config, *_):
        return [replace(config, store_policy=".cs")]

    search = {"time_interleaved": time_interleaved, "neighbors": neighbors, "variants": neighbors, "MEMORY": 1 << 15, "STEPS": 0}
    with (
        small(),
        mock.patch.multiple(records, gpu=lambda: torch.device("cpu"), metadata=lambda: metadata() | METADATA),
        mock.patch.object(check, "time_cold", time_cold),
        mock.patch.multiple(autotune, **search),
        mock.patch.object(host, "WINDOWS", 3),
        mock.patch.object(steps, "FIRST_USED", COLUMNS[:2]),
        mock.patch.object(self_check, "PROBLEMS", [(torch.float32, torch.float32, 19, 100)]),
        mock.patch.object(benchmark, "PROVIDERS", {name: PROVIDERS[name] for name in (OURS, EAGER)}),
        mock.patch.dict(PRESETS, {"1b": replace(PRESETS["tiny"], steps=4, batch=1, seq_len=16)}),
        mock.patch.dict(TRAINED, {name: TRAINED[name] for name in (BASELINE, CONTROL, "ours", RECOMPUTED)}, clear=True),
        launch.pretend(SM_90) if launch.INTERPRETED else nullcontext(),
    ):
        yield
