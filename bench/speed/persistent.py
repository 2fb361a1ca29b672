"""A persistent forward, to be timed beside the package's flat one: few programs, each of which walks over many tiles and prefetches them.

It is for plain, contiguous rows whose length is a power of two, and is kept only for this comparison.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from statistics import median
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.problem import EPS
from triton_rmsnorm import rms_norm
from triton_rmsnorm.runtime import launch
from triton_rmsnorm.runtime.config import Device
from triton_rmsnorm.runtime.timing import FLUSH_BYTES, time_interleaved

COLUMNS = (256, 1024, 4096, 16384, 65536)
ELEMENTS = 1 << 27
ROUNDS = 30
TILE = 4096  # elements, or one row


@triton.jit
def _forward(X, W, Y, M, eps, N: tl.constexpr, BLOCK_M: tl.constexpr, NUM_STAGES: tl.constexpr):
    cols = tl.arange(0, N)[None, :]
    w = tl.load(W + cols).to(tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        at = tl.cast(rows, tl.int64) * N + cols
        x = tl.load(X + at, mask=rows < M, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)
        tl.store(Y + at, (x * rstd[:, None] * w).to(Y.dtype.element_ty), mask=rows < M)


class Config(NamedTuple):
    """How the persistent forward is launched."""

    block_m: int
    num_warps: int
    num_ctas: int
    num_stages: int
    programs: int


def forward(x: Tensor, weight: Tensor, eps: float, config: Config) -> Tensor:
    """y of contiguous rows."""
    m, n = x.shape
    y = torch.empty_like(x)
    options = {} if launch.INTERPRETED else {"num_warps": config.num_warps, "num_ctas": config.num_ctas}
    tiles = triton.cdiv(m, config.block_m)
    _forward[(min(config.programs, tiles),)](x, weight, y, m, eps, N=n, BLOCK_M=config.block_m, NUM_STAGES=config.num_stages, **options)
    return y


def configs(n: int, itemsize: int, device: Device) -> Iterator[Config]:
    """Some that fit: 16 or 32 elements per thread, programs on all SMs at once, two to four tiles in flight for each."""
    block_m = max(1, TILE // n)
    tile = block_m * n
    num_ctas = min(device.max_ctas, max(1, n // 16384))
    for elements, num_stages, per_sm in product((16, 32), (2, 3, 4), (1, 2, 4)):
        num_warps = min(32, max(4, tile // num_ctas // elements // device.warp_size))
        memory = (num_stages - 1) * tile // num_ctas * itemsize * per_sm
        if memory <= device.shared_memory and per_sm * num_warps <= 64:
            yield Config(block_m, num_warps, num_ctas, num_stages, device.num_sms * per_sm // num_ctas)
    if n > 16384:  # no room for a second tile
        yield Config(1, 32, num_ctas, 1, device.num_sms // num_ctas)


def compare(device: torch.device, columns: Sequence[int] = COLUMNS, elements: int = ELEMENTS) -> list[dict]:
    """µs of the package's forward, of the fastest persistent one and of a copy, in bf16, for each row length."""
    flush = torch.ones(FLUSH_BYTES // 4, device=device)
    return [_compare(n, elements // n, device, flush) for n in columns]


@torch.no_grad()
def _compare(n: int, m: int, device: torch.device, flush: Tensor) -> dict:
    x, weight = torch.randn(m, n, device=device).bfloat16(), torch.randn(n, device=device).bfloat16()
    flat = rms_norm(x, (n,), weight, EPS)
    copy = torch.empty_like(x)
    calls: dict[Config, Callable[[], object]] = {}
    for config in dict.fromkeys(configs(n, x.element_size(), launch.device_of(device))):
        call = lambda config=config: forward(x, weight, EPS, config)  # noqa: E731
        try:
            y = call()
        except Exception:  # of the compiler, or out of registers or shared memory: this one is not a candidate
            continue
        torch.testing.assert_close(y, flat)
        calls[config] = call
    names = [*calls, "flat", "copy"]
    every = [*calls.values(), lambda: rms_norm(x, (n,), weight, EPS), lambda: copy.copy_(x)]
    us = {name: median(times) for name, times in zip(names, time_interleaved(every, ROUNDS, flush), strict=True)}
    best = min(calls, key=us.__getitem__, default=None)
    return {
        "N": n,
        "rows": m,
        "copy, µs": round(us["copy"], 2),
        "flat, µs": round(us["flat"], 2),
        "persistent, µs": round(us[best], 2) if best else None,
        "flat / persistent": round(us["flat"] / us[best], 3) if best else None,
        "fastest persistent configuration": str(best),
        "tried": len(calls),
    }
