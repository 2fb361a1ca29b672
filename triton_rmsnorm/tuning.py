"""How a problem is cut into tiles and programs: a pure function of the row length, the item sizes and the device.

Never of the number of rows: so a row's y and dx do not depend on its batch, bit for bit, and nothing is compiled anew when the batch
changes. This module needs no GPU, no torch and no Triton; every threshold carries its reason, and says whether it was measured on a GPU
("measured") or follows from compiled code ("compiled": registers and spills read from sm_80, sm_90 and sm_100 binaries).
"""

from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Device:
    """What of a device a configuration depends on."""

    name: str
    backend: str  # "cuda", "hip" or "interpreter"
    num_sms: int
    shared_memory: int  # bytes that one program may have
    max_ctas: int = 1  # thread blocks a row may be spread over; more than 1 needs sm_90 and Triton 3.8 (DSMEM reductions)


# What tests and the audit stand in for without the hardware.
SM_80 = Device("sm_80", "cuda", num_sms=108, shared_memory=163 * 1024)
SM_90 = Device("sm_90", "cuda", num_sms=132, shared_memory=227 * 1024, max_ctas=16)
SM_100 = Device("sm_100", "cuda", num_sms=148, shared_memory=227 * 1024, max_ctas=16)
GFX942 = Device("gfx942", "hip", num_sms=304, shared_memory=64 * 1024)
# Two programs, so that the persistent loop and the sum of partials are walked; tall tiles, since a program costs 1 to 2 ms.
INTERPRETER = Device("interpreter", "interpreter", num_sms=2, shared_memory=1 << 40)


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel. `programs` bounds grid axis 0; a row of more than block_n columns is walked in blocks."""

    block_m: int
    block_n: int
    num_warps: int
    num_ctas: int
    num_stages: int
    programs: int


# Elements of a row that one thread block holds without spilling, at 16 warps (compiled: 98 registers forward at 16384, 127 backward at
# 8192, where dw is held beside x, dy and w). Longer rows take clusters.
FORWARD_ELEMENTS_PER_CTA = 16384
BACKWARD_ELEMENTS_PER_CTA = 8192
# Without clusters a backward of up to 16384 columns still reads its row once, at the price of about 64 spilled bytes a thread (compiled).
BACKWARD_ELEMENTS_WITHOUT_CLUSTER = 16384
# Columns a step where a row is walked in blocks.
BLOCKED_ELEMENTS = 8192
# Bytes that an SM keeps on their way: bandwidth times latency is about 26 KB (4.3 TB/s x 800 ns / 132 SMs); twice that, because the tile
# whose rows are being reduced is no longer on its way.
BYTES_IN_FLIGHT = 48 * 1024
# What persistent programs read and write besides rows (the weight, the partial dw) may be so much of the rows' bytes at 8192 rows.
FORWARD_OVERHEAD = 0.02
BACKWARD_OVERHEAD = 0.05
OVERHEAD_ROWS = 8192


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@cache
def forward_config(n: int, itemsize: int, weight_itemsize: int, device: Device, loads: int = 1, stores: int = 1) -> Config:
    """Configuration of the forward kernel for rows of `n` columns of `itemsize` bytes and a weight of `weight_itemsize` (0: none).

    `loads` and `stores` count the tensors of rows: 1 and 1, with a residual 2 and 2, with a gate 2 and 1.
    """
    overhead_bytes = weight_itemsize
    budget = _program_budget(FORWARD_OVERHEAD, (loads + stores) * itemsize, overhead_bytes)
    # Two programs an SM overlap one's reduction with the other's loads; where the weight allows only one, it gets the tile of both.
    per_sm = 2 if n <= 8192 and budget >= 2 * device.num_sms else 1
    return _config(
        n,
        itemsize,
        tile=8192 // per_sm,
        capacity=FORWARD_ELEMENTS_PER_CTA,
        loads=loads,
        extra=loads - 1,
        programs_per_sm=per_sm,
        budget=budget,
        device=device,
    )


@cache
def backward_config(n: int, itemsize: int, weight_itemsize: int, device: Device, loads: int = 2, stores: int = 1) -> Config:
    """Configuration of the backward kernel; `itemsize` is that of the wider of x and dy. With a residual 3 loads, with a gate 3 and 2."""
    overhead_bytes = weight_itemsize + 2 * max(4, weight_itemsize)  # w is read, a partial dw written and read again
    return _config(
        n,
        itemsize,
        tile=8192,
        capacity=BACKWARD_ELEMENTS_PER_CTA if device.max_ctas > 1 else BACKWARD_ELEMENTS_WITHOUT_CLUSTER,
        loads=loads,
        extra=loads - 2,
        programs_per_sm=1,  # the dw of one program fills its registers, and partial dw is traffic
        budget=_program_budget(BACKWARD_OVERHEAD, (loads + stores) * itemsize, overhead_bytes),
        device=device,
    )


def reduction_config(n: int, device: Device) -> Config:
    """Configuration of the sum of partial dw over `n` columns: narrow blocks of 128 bytes a row, so that many programs share the work."""
    if device.backend == "interpreter":
        return Config(1024, min(1024, next_power_of_2(n)), 1, 1, 1, 1 << 16)
    return Config(64, 32, 4, 1, 1, 1 << 16)


def _program_budget(overhead: float, row_bytes: int, program_bytes: int) -> int:
    """Programs whose `program_bytes` a column stay within `overhead` of the `row_bytes` a column at OVERHEAD_ROWS rows."""
    return int(overhead * OVERHEAD_ROWS * row_bytes / program_bytes) if program_bytes else 1 << 16


def _config(n, itemsize, *, loads, extra, tile, capacity, programs_per_sm, budget, device) -> Config:
    block_n = next_power_of_2(n)
    if device.backend == "interpreter":
        block_n = block_n if block_n <= capacity else BLOCKED_ELEMENTS
        return Config(max(1, (1 << 16) // block_n), block_n, 1, 1, 1, device.num_sms)

    if itemsize == 8 or extra:  # more registers an element
        tile, capacity = tile // 2, capacity // 2
    num_ctas = max(1, block_n // capacity)
    blocked = num_ctas > device.max_ctas
    if blocked:
        num_ctas, block_n = 1, min(BLOCKED_ELEMENTS, capacity)

    block_m = max(1, tile // block_n) if num_ctas == 1 else 1  # taller tiles in a cluster cost a barrier a row
    elements = block_m * block_n // num_ctas  # that one thread block holds
    num_warps = min(16, max(4, elements // 512))  # 16 elements a thread
    programs = max(1, min(device.num_sms * programs_per_sm // num_ctas, budget))
    num_stages = 1
    if device.backend == "cuda" and not blocked:
        tile_bytes = elements * loads * itemsize
        wanted = -(-BYTES_IN_FLIGHT // (tile_bytes * programs_per_sm))
        fitting = device.shared_memory // programs_per_sm // tile_bytes
        num_stages = 1 + min(wanted, 6, max(fitting - 1, min(fitting, 1)))  # one more than the tiles that are on their way
    if device.backend == "hip":
        num_warps = max(1, num_warps // 2)  # 64 threads a wavefront
    return Config(block_m, block_n, num_warps, num_ctas, num_stages, programs)
