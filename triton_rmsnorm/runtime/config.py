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
    max_ctas: int = 1  # thread blocks a row may be spread over; more than 1 needs sm_90 and Triton 3.9 (DSMEM reductions)

    def __hash__(self) -> int:  # each call looks its launches up by device
        return hash(self.name)


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
    # How rows pass through the caches: "" leaves it to the hardware, which is the choice until a GPU shows a better one. Autotuning tries.
    load_policy: str = ""  # one of LOAD_POLICIES
    store_policy: str = ""  # one of STORE_POLICIES

    @property
    def max_registers(self) -> int:
        """Registers a thread that one program may use (NVIDIA). Left to itself the assembler may spill to make room for more programs."""
        return min(255, 65536 // (32 * self.num_warps))


LOAD_POLICIES = ("", "evict_first", "evict_last")
STORE_POLICIES = ("", ".cs", ".cg")  # streaming: first to be evicted; and past the L1
# Elements of a tile a thread. With 16 the code has a quarter more instructions an element than with 32, since addresses, barriers and
# reductions cost the same a tile, and the backward sits on the limit of 128 registers (compiled). Where an element takes more registers,
# which are fp64 and a gradient besides dx, 32 would spill; on AMD there would be one wavefront a scheduler.
ELEMENTS_PER_THREAD = 32
FEWER_ELEMENTS_PER_THREAD = 16
# Elements of a row that one thread block holds without spilling (compiled): forward 16384 at 16 warps (96 to 127 registers), backward
# 8192 at 8 warps (170 to 247: x, dy, w and the accumulated dw). Half of it in fp64 and with a gradient besides dx, of a gate or of a
# residual in a dtype of its own: such rows take all of it only where nothing else reads them once (248 to 255 registers at 8 warps;
# roundings around a gate spill 144 to 160 bytes a thread; all compiled). Longer rows take clusters.
FORWARD_ELEMENTS_PER_CTA = 16384
BACKWARD_ELEMENTS_PER_CTA = 8192
# Where there are no clusters, twice as many: 50 to 210 spilled bytes a thread, mostly loop invariants that are loaded again from L1, are
# taken to cost less than reading rows a second time (compiled; not measured).
SPILLING_FACTOR = 2
# Columns a step where a row is walked in blocks.
BLOCKED_ELEMENTS = 8192
# Bytes of rows that an SM has on their way. At 4.3 TB/s over 132 SMs a forward reads 16 bytes a ns and a backward 22; a tile's place is
# taken for the latency of its loads, about 900 ns, and while it is worked on, about 600 ns: 24 to 33 KB. Twice that, for bursts and for
# GPUs with more bandwidth an SM.
BYTES_IN_FLIGHT = 64 * 1024
# Two tiles on their way at the least: with one, nothing is on its way while a tile is worked on (the next load follows the last store).
# Where registers are at their limit it may be one: the second of fp32 would spill 40 bytes a thread (compiled).
MIN_TILES_IN_FLIGHT = 2
MAX_TILES_IN_FLIGHT = 6
SCRATCH_BYTES = 4096  # of shared memory, for reductions across warps and the reserve of each thread block
# Clusters of more than two thread blocks must fit a GPC, some of which lack SMs: a cluster that finds no place waits for another to end
# its whole share of the rows. So an eighth of the SMs stays idle, which the bandwidth does not need (not measured).
CLUSTER_SMS = 7 / 8
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
    budget = _program_budget(FORWARD_OVERHEAD, (loads + stores) * itemsize, weight_itemsize)
    # Two programs an SM overlap one's reduction with the other's loads; where the weight allows only one, it gets the tile of both. With
    # a gate or in fp64, and with a residual on sm_80, a program that holds 8192 columns leaves no registers for a second one (compiled).
    doubled = max(itemsize, weight_itemsize) == 8
    crowded = doubled or loads > stores or (loads > 1 and device.max_ctas == 1)
    per_sm = 2 if n <= (4096 if crowded else 8192) and budget >= 2 * device.num_sms else 1
    # With a gate, blocks of a cluster that hold 16384 columns would spill 8 to 32 bytes a thread where some are masked (compiled).
    halved = loads > stores and not doubled and n > FORWARD_ELEMENTS_PER_CTA and device.max_ctas > 1
    return _config(
        n,
        loads * itemsize,
        reloaded=weight_itemsize,
        tile=8192 // per_sm,
        capacity=FORWARD_ELEMENTS_PER_CTA // 2 if halved else FORWARD_ELEMENTS_PER_CTA,
        many_registers=doubled,
        stretches=False,
        programs_per_sm=per_sm,
        budget=budget,
        device=device,
    )


@cache
def backward_config(n: int, itemsize: int, weight_itemsize: int, device: Device, loads: int = 2, stores: int = 1) -> Config:
    """Configuration of the backward kernel; `itemsize` is that of the wider of x and dy. With a residual 3 loads, with a gate 3 and 2."""
    doubled = max(itemsize, weight_itemsize) == 8
    overhead_bytes = weight_itemsize + 2 * max(4, weight_itemsize)  # w is read, a partial dw written and read again
    return _config(
        n,
        loads * itemsize,
        reloaded=0,
        tile=8192,
        capacity=BACKWARD_ELEMENTS_PER_CTA,
        many_registers=doubled or stores > 1,
        stretches=not doubled and (device.max_ctas > 1 or device.backend == "hip"),  # else 180 to 440 bytes a thread would spill (compiled)
        programs_per_sm=1,  # the dw of one program fills its registers, and partial dw is traffic
        budget=_program_budget(BACKWARD_OVERHEAD, (loads + stores) * itemsize, overhead_bytes),
        device=device,
    )


def reduction_config(n: int, device: Device) -> Config:
    """Configuration of the sum of partial dw over `n` columns: narrow blocks of 128 bytes a row, so that many programs share the work."""
    if device.backend == "interpreter":
        return Config(1024, min(1024, next_power_of_2(n)), 1, 1, 1, 1 << 16)
    # All partials at once where there are few programs to hide the latency of a second round.
    return Config(256, 32, 8, 1, 1, 1 << 16) if n <= 8192 else Config(64, 32, 4, 1, 1, 1 << 16)


def _program_budget(overhead: float, row_bytes: int, program_bytes: int) -> int:
    """Programs whose `program_bytes` a column stay within `overhead` of the `row_bytes` a column at OVERHEAD_ROWS rows."""
    return int(overhead * OVERHEAD_ROWS * row_bytes / program_bytes) if program_bytes else 1 << 16


def _config(
    n: int,
    loaded: int,
    *,
    reloaded: int,
    tile: int,
    capacity: int,
    many_registers: bool,
    stretches: bool,
    programs_per_sm: int,
    budget: int,
    device: Device,
) -> Config:
    """`loaded` bytes are read for each column of a row, and `reloaded` bytes more where it is walked in blocks.

    `stretches`: a thread that is given fewer elements, since they take many registers, may be given all where a row fits no other way.
    """
    block_n = next_power_of_2(n)
    if device.backend == "interpreter":
        block_n = block_n if block_n <= capacity else BLOCKED_ELEMENTS
        return Config(max(1, (1 << 16) // block_n), block_n, 1, 1, 1, device.num_sms)

    per_thread = ELEMENTS_PER_THREAD if device.backend == "cuda" else FEWER_ELEMENTS_PER_THREAD
    if device.max_ctas == 1:
        capacity *= SPILLING_FACTOR
    stretched = stretches and many_registers and block_n == capacity * device.max_ctas
    if many_registers:
        tile = tile // 2
    if many_registers and not stretched:
        capacity, per_thread = capacity // 2, FEWER_ELEMENTS_PER_THREAD
    num_ctas = max(1, block_n // capacity)
    if num_ctas > device.max_ctas:
        num_ctas, block_n, loaded = 1, min(BLOCKED_ELEMENTS, capacity), loaded + reloaded

    block_m = max(1, tile // block_n) if num_ctas == 1 else 1  # taller tiles in a cluster cost a barrier a row
    elements = block_m * block_n // num_ctas  # that one thread block holds
    threads = min(512, max(128, elements // per_thread))
    sms = int(device.num_sms * CLUSTER_SMS) if num_ctas > 2 else device.num_sms
    programs = max(1, min(sms * programs_per_sm // num_ctas, budget))
    num_stages = 1
    if device.backend == "cuda":  # one more than the tiles that are on their way
        tile_bytes = elements * loaded
        wanted = max(1 if stretched else MIN_TILES_IN_FLIGHT, -(-BYTES_IN_FLIGHT // (tile_bytes * programs_per_sm)))
        num_stages += min(wanted, MAX_TILES_IN_FLIGHT, (device.shared_memory // programs_per_sm - SCRATCH_BYTES) // tile_bytes)
    return Config(block_m, block_n, threads // (64 if device.backend == "hip" else 32), num_ctas, num_stages, programs)
