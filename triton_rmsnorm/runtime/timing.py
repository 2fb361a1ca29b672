"""Timing of GPU work with a cold L2 cache."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Seconds beyond what a call took the host: after a synchronization it takes longer (measured: up to 50 µs longer).
SLACK = 100e-6
FLUSH_BYTES = 256 << 20  # read before each timed call, so that the L2 holds other data, none of which has to be written back


def time_cold(call: Callable[[], object], seconds: float, before: Callable[[], object] = lambda: None) -> list[float]:
    """µs that the GPU took for each of at least 5 calls, for as many as `seconds` allow, each with `before` done and the L2 cold."""
    flush = torch.ones(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while not times or (time.perf_counter() < stop and len(times) < 1000):
        times += time_interleaved([call], 5, flush, before)[0]
    return times


def time_interleaved(
    calls: Sequence[Callable[[], object]], rounds: int, flush: Tensor, before: Callable[[], object] = lambda: None
) -> list[list[float]]:
    """µs that the GPU took for each call in each of `rounds`. The calls take turns, so that a drift of the clock affects all of them.

    Reading `flush` fills the L2: lines that were written would have to go back to memory during the call. The GPU is kept waiting until a
    call is in its queue, so that the host's time is not measured.
    """
    waits = [_host_cycles(call) for call in calls]
    events = []
    for _ in range(rounds):
        for call, wait in zip(calls, waits, strict=True):
            before()
            flush.sum()
            torch.cuda._sleep(wait)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
    times = [1000 * begin.elapsed_time(end) for begin, end in events]
    return [times[i :: len(calls)] for i in range(len(calls))]


def _host_cycles(call: Callable[[], object]) -> int:
    """GPU cycles that pass while the host makes a call, at 3 GHz, which is more than a GPU's clock makes."""
    call()
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return int((min(times) + SLACK) * 3e9)
