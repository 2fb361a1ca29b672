"""Stand-ins for a rehearsal of the record without a GPU: the interpreter, Triton's stubbed driver, made-up times, small shapes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from unittest import mock

import torch

from bench import problem, records

METADATA = {"gpu": "REHEARSAL", "driver": "none"}
COLUMNS = (64, 128, 256, 1024)


@contextmanager
def small() -> Iterator[None]:
    """Problems that the interpreter can do."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(problem, "ELEMENTS", 1 << 14))
        stack.enter_context(mock.patch.object(problem, "HEADS", 4))
        large = [problem.Problem(problem.rows(n), n, direction) for n in COLUMNS for direction in problem.DIRECTIONS[:2]]
        others = [problem.Problem(problem.rows(256), 256, direction, "residual") for direction in problem.DIRECTIONS[:2]]
        stack.enter_context(mock.patch.dict(problem.SUITES, {"quick": [*large[:4], *others], "full": [*large, *others]}))
        yield


@contextmanager
def stand_ins() -> Iterator[None]:
    """For a process that does one step. Calls are made, and their results are checked; their times are made up."""
    from bench.providers import EAGER, OURS, PROVIDERS
    from bench.record import steps
    from bench.speed import check, host
    from bench.speed import run as speed
    from bench.train.job import PRESETS
    from bench.train.providers import BASELINE, CONTROL, RECOMPUTED
    from bench.train.providers import PROVIDERS as TRAINED
    from triton_rmsnorm import __main__ as self_check
    from triton_rmsnorm.runtime import autotune, launch
    from triton_rmsnorm.runtime.config import SM_90

    cpu, ticks = torch.device("cpu"), count()

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

    with small(), ExitStack() as stack:

        def patch(target, name, value):
            stack.enter_context(mock.patch.object(target, name, value))

        patch(records, "gpu", lambda: cpu)
        metadata = records.metadata
        patch(records, "metadata", lambda: metadata() | METADATA)
        patch(check, "time_cold", time_cold)
        patch(autotune, "time_interleaved", time_interleaved)
        patch(autotune, "MEMORY", 1 << 15)
        patch(autotune, "STEPS", 0)
        patch(autotune, "neighbors", lambda config, *_: [replace(config, store_policy=".cs")])
        patch(autotune, "variants", autotune.neighbors)
        patch(host, "WINDOWS", 3)
        patch(steps, "FIRST_USED", COLUMNS[:2])
        patch(self_check, "PROBLEMS", [(torch.float32, torch.float32, 19, 100)])
        patch(speed, "PROVIDERS", {name: PROVIDERS[name] for name in (OURS, EAGER)})
        stack.enter_context(mock.patch.dict(PRESETS, {"1b": replace(PRESETS["tiny"], steps=8, batch=1, seq_len=16)}))
        stack.enter_context(mock.patch.dict(TRAINED))
        for name in set(TRAINED) - {BASELINE, CONTROL, "ours", RECOMPUTED}:
            del TRAINED[name]
        if launch.INTERPRETED:
            stack.enter_context(launch.pretend(SM_90))
        yield
