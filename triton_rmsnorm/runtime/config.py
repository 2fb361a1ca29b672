"""How a problem is cut into tiles and programs: a pure function of what is tuned (Key) and of the device.

The number of rows is not part of a key. So y and dx of a row do not depend on its batch, bit for bit, and nothing is compiled anew when the
batch changes. This module needs no GPU, no torch and no Triton.

Each threshold says where it comes from. "Measured" means timed on an H200 with Triton 3.9, with a cold L2 cache, on bf16 tensors of 2^26
elements; bench/results/ has the times (sweep-h200.json) and what was predicted before (log.md). "Compiled" means registers and spills read
from the binaries of sm_80, sm_90 and sm_100.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple


class Key(NamedTuple):
    """What a configuration depends on besides the device."""

    direction: str  # "forward" or "backward"
    n: int  # columns that share a mean
    itemsize: int  # bytes per element of the widest tensor of rows
    weight_itemsize: int  # bytes per element; 0 without a weight
    kind: str = "plain"  # "plain", "residual" or "gate"
    own_dresidual: bool = False  # the gradient of the residual is stored apart from dx, because it has another dtype

    @property
    def loads(self) -> int:
        """Tensors of rows that the kernel reads."""
        return (1 if self.direction == "forward" else 2) + (self.kind != "plain")

    @property
    def stores(self) -> int:
        """Tensors of rows that the kernel writes."""
        second = self.kind == "residual" if self.direction == "forward" else self.kind == "gate" or self.own_dresidual
        return 1 + second


class Device(NamedTuple):
    """The properties of a device that a configuration depends on."""

    name: str
    backend: str  # "cuda", "hip" or "interpreter"
    num_sms: int
    shared_memory: int  # bytes that one program may have
    max_ctas: int = 1  # thread blocks that a row may be spread over; more than 1 needs sm_90 or sm_100 and Triton 3.9

    @property
    def warp_size(self) -> int:
        return 64 if self.backend == "hip" else 32


# Stand-ins for tests and the audit, which have no such hardware.
SM_80 = Device("sm_80", "cuda", num_sms=108, shared_memory=163 * 1024)
SM_90 = Device("sm_90", "cuda", num_sms=132, shared_memory=227 * 1024, max_ctas=16)
SM_100 = Device("sm_100", "cuda", num_sms=148, shared_memory=227 * 1024, max_ctas=16)
GFX942 = Device("gfx942", "hip", num_sms=304, shared_memory=64 * 1024)
INTERPRETER = Device("interpreter", "interpreter", num_sms=2, shared_memory=1 << 40)


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel. Rows of more than block_n columns are processed in blocks of block_n columns."""

    block_m: int
    block_n: int
    num_warps: int
    num_ctas: int = 1
    num_stages: int = 1  # of the loop over tiles (backward) or over blocks of columns: one more than are prefetched
    programs: int = 0  # bound of grid axis 0 in the backward; 0 in the forward, where every tile has its own program
    weight_first: bool = False  # load the weight before the sum over the row (forward) or before the loop over tiles (backward)
    # How rows pass through the caches; "" leaves it to the hardware. No other choice was faster (measured: within 1 % of one another).
    load_policy: str = ""  # one of LOAD_POLICIES
    store_policy: str = ""  # one of STORE_POLICIES


LOAD_POLICIES = ("", "evict_first", "evict_last")
STORE_POLICIES = ("", ".cs", ".cg")  # streaming: first to be evicted; and past the L1

# Forward. One tile per program. The GPU overlaps the loads of one program with the work of others, so small thread blocks and many of them
# are fast: 16 elements per thread for rows of up to 4096 columns, and 32 beyond (measured: 97 to 100 % of the bandwidth of a copy for up
# to 8192 columns).
FORWARD_CTA = 32768
# Longer rows of 2 bytes per element are read twice, in blocks of columns. The second read comes from the L2 as long as the rows of all
# programs fit into it (measured: 97 % for 16384 columns, where a tile per row reaches 95 %; 96 against 87 % for 32768; 82 against 78 % for
# 65536). With a gate, which is read once, 1024 threads are best (measured: 92 % for 16384 columns and 91 % for 32768, where a tile per row
# reaches 84 and 86 %). MI300X has 4 MB of L2 per 38 SMs, too little for the rows of 16384 columns that are in flight, and reads them once.
REREAD_COLUMNS = {"plain": 65536, "gate": 32768}
# All others take a cluster of thread blocks of 8192 columns, with 128 bytes per thread (measured: 71 % for 131072 columns of bf16), or half
# as many with a residual, a gate or a weight that is wider than x, so that 16 warps fit on an SM (compiled). So do rows with a residual
# that would fill FORWARD_CTA, where they would spill (compiled).
CLUSTER_CTA = 8192
# Backward. A tile has 4 KiB of x or one row, 16 elements per thread. An SM holds 16 KiB of x, and two more tiles are prefetched for each
# program (measured: 95 to 97 % for up to 8192 columns of bf16, 96 to 99 % for fp32). A gate takes more registers: half as many elements,
# and a weight that is loaded for each tile from 4096 columns on (measured: 160 against 164 µs at 4096 columns, 157 against 160 at 8192).
BACKWARD_TILE_BYTES = 4096
BACKWARD_SM_BYTES = 16384
BACKWARD_STAGES = 3
# Longer rows: thread blocks of 256 threads, which load the weight again for each row; clusters of them where two tiles of a whole row would
# not fit into shared memory (measured: 92 % for 16384 columns and 83 % for 32768; a weight in registers leads to 85 and 72 %). With a gate
# at most 8192 columns per thread block, because more would spill (compiled).
BACKWARD_HELD_COLUMNS = 8192
BACKWARD_CTA_COLUMNS = 16384
# Clusters of more than two thread blocks must fit into a GPC, some of which lack SMs. A cluster that finds no room waits until another one
# has finished all of its rows, so an eighth of the SMs is left out.
CLUSTER_SMS = 7 / 8
# Columns per step where a row is processed in blocks.
BLOCKED_COLUMNS = 8192
# The interpreter needs 1 to 2 ms per program, so its tiles are tall. Its limits are low, so that tests reach every path with short rows.
INTERPRETER_TILE = 1 << 16
INTERPRETER_FORWARD_COLUMNS = 4096
INTERPRETER_BACKWARD_COLUMNS = 2048  # and columns per step of longer rows


def next_power_of_2(n: int) -> int:
    return 1 << max(int(n) - 1, 0).bit_length()  # NumPy integers have no bit_length


@cache
def analytic(key: Key, device: Device) -> Config:
    """The configuration of a key that nobody has measured."""
    if device.backend == "interpreter":
        return _interpreted(key, device)
    return _forward(key, device) if key.direction == "forward" else _backward(key, device)


def _interpreted(key: Key, device: Device) -> Config:
    forward = key.direction == "forward"
    limit = INTERPRETER_FORWARD_COLUMNS if forward else INTERPRETER_BACKWARD_COLUMNS
    columns = next_power_of_2(key.n)
    block_n = columns if columns <= limit else INTERPRETER_BACKWARD_COLUMNS
    # Two programs, so that the loop over tiles and the sum of partial dw are exercised.
    programs = 0 if forward else device.num_sms
    return Config(max(1, INTERPRETER_TILE // block_n), block_n, 1, programs=programs, weight_first=not forward)


def _forward(key: Key, device: Device) -> Config:
    columns, itemsize = next_power_of_2(key.n), _itemsize(key)
    registers = columns * max(1, itemsize // 4)
    gate = key.kind == "gate"
    wide = key.kind != "plain" or key.weight_itemsize > key.itemsize  # takes more registers per element
    blocked = Config(1, 8192 if columns <= 32768 else 16384, min(1024, columns // (8 if gate else 32)) // device.warp_size)
    if device.backend == "cuda" and itemsize == 2 and 16384 <= columns <= REREAD_COLUMNS.get(key.kind, 0):
        return blocked
    if registers <= FORWARD_CTA // (2 if key.kind == "residual" and device.max_ctas > 1 else 1):
        threads = max(128, registers // (16 if registers <= 4096 else 32))
        return Config(max(1, 16 * threads // registers), columns, threads // device.warp_size)
    num_ctas = columns // CLUSTER_CTA
    if num_ctas > device.max_ctas:
        return blocked
    return Config(1, columns, CLUSTER_CTA * itemsize // (64 if wide else 128) // device.warp_size, num_ctas)


def _backward(key: Key, device: Device) -> Config:
    columns, itemsize, gate = next_power_of_2(key.n), _itemsize(key), key.kind == "gate"
    block_m, num_ctas, per_sm = 1, 1, 1
    held = columns * max(1, itemsize // 4) <= BACKWARD_HELD_COLUMNS
    if held:
        block_m = max(1, BACKWARD_TILE_BYTES // (1 + gate) // (columns * itemsize))
        tile = block_m * columns
        if gate:
            threads, per_sm = (256, 1) if tile > 4096 else (128, 2) if tile > 1024 else (128, 4)
            held = columns < 4096
        else:
            threads, per_sm = min(512, max(128, columns // 16)), max(1, BACKWARD_SM_BYTES // (tile * itemsize))
    else:
        threads = 256
        cta = BACKWARD_CTA_COLUMNS // max(1, itemsize // 4)
        if device.max_ctas > 1:
            fits = device.shared_memory // (2 * (key.loads * key.itemsize + key.weight_itemsize))  # columns of two tiles
            cta = min(cta, next_power_of_2(fits + 1) // 2)
        if gate and device.backend == "cuda":
            cta = min(cta, BACKWARD_HELD_COLUMNS)
        num_ctas = -(-columns // cta)
        if num_ctas > device.max_ctas:
            columns, threads, num_ctas, held = BLOCKED_COLUMNS * 2 // itemsize, 512, 1, True
    sms = int(device.num_sms * CLUSTER_SMS) if num_ctas > 2 else device.num_sms
    config = Config(block_m, columns, threads // device.warp_size, num_ctas, 2, max(1, sms * per_sm // num_ctas), weight_first=held)
    if device.backend == "hip":
        return config  # whose prefetch goes into registers
    return replace(config, num_stages=min(BACKWARD_STAGES, 1 + device.shared_memory // (per_sm * prefetched_bytes(config, key))))


def prefetched_bytes(config: Config, key: Key) -> int:
    """Bytes of shared memory per stage of prefetching in a backward. A weight that is loaded for each tile is prefetched, too."""
    columns = config.block_n // config.num_ctas
    return columns * (config.block_m * key.loads * key.itemsize + (0 if config.weight_first else key.weight_itemsize))


def _itemsize(key: Key) -> int:
    """Bytes per element of what is computed: 8 where the weight alone is fp64, too."""
    return 8 if key.weight_itemsize == 8 else key.itemsize


@cache
def reduction_config(n: int, device: Device) -> Config:
    """The configuration of the sum of partial dw over `n` columns. Narrow blocks of 128 bytes per row let many programs share the work."""
    if device.backend == "interpreter":
        return Config(2, min(INTERPRETER_TILE, next_power_of_2(n)), 1)  # as many rows as there are programs
    # All partials at once where there are few programs to hide the latency of a second round.
    return Config(256, 32, 8) if n <= 8192 else Config(64, 32, 4)


def is_valid(config: Config, key: Key, device: Device) -> bool:
    """Whether the kernels can run `config`: powers of 2, within what the device has."""
    powers = (config.block_m, config.block_n, config.num_warps, config.num_ctas)
    if min(powers) < 1 or any(power & (power - 1) for power in powers) or config.num_stages < 1:
        return False
    if config.load_policy not in LOAD_POLICIES or config.store_policy not in STORE_POLICIES:
        return False
    tile = config.block_m * config.block_n // config.num_ctas  # elements that a thread block holds
    prefetched = (config.num_stages - 1) * prefetched_bytes(config, key)
    return (
        config.num_warps * device.warp_size <= min(1024, tile)
        and tile <= 1 << 20
        and (prefetched <= device.shared_memory or device.backend == "hip")
        and config.num_ctas <= device.max_ctas
        and (config.num_ctas == 1 or (config.block_m == 1 and config.block_n >= key.n))
        and (config.programs == 0 if key.direction == "forward" else 1 <= config.programs <= 16 * device.num_sms)
    )
