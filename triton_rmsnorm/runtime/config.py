"""How a problem is cut into tiles and programs: a pure function of what is tuned (Key) and of the device.

The number of rows is not part of a key. So y and dx of a row do not depend on its batch, bit for bit, and nothing is compiled anew when the
batch changes. This module needs no GPU, no torch and no Triton.

Each threshold says where it comes from. "Measured" means timed on an H200 with Triton 3.9, with a cold L2 cache, on bf16 tensors of 2^26
elements (bench/results/sweep-h200.json). "Compiled" means registers and spills read from the binaries of sm_80, sm_90 and sm_100.
"""

from dataclasses import dataclass
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
    weight_first: bool = False  # the forward loads the weight before the sum over the row
    # How rows pass through the caches; "" leaves it to the hardware. No other choice was faster (measured: within 1 % of one another).
    load_policy: str = ""  # one of LOAD_POLICIES
    store_policy: str = ""  # one of STORE_POLICIES


LOAD_POLICIES = ("", "evict_first", "evict_last")
STORE_POLICIES = ("", ".cs", ".cg")  # streaming: first to be evicted; and past the L1

# Registers are counted as elements of a row: one each in fp32, two in fp64.
#
# Forward. One tile per program; the GPU overlaps the loads of one program with the work of others, so small thread blocks and many of them
# are fast: 16 registers of u per thread for rows of up to 4096 columns, 32 up to 16384, 64 up to 32768 (measured: 99, 97 and 87 % of the
# bandwidth of a copy). Longer rows take a cluster of thread blocks of 8192 columns (measured: 78 % at 65536 columns, 71 % at 131072).
FORWARD_CTA = 32768
FORWARD_CTA_RESIDUAL = 16384  # twice as much spills 64 to 168 bytes per thread (compiled)
CLUSTER_CTA = 8192
CLUSTER_THREADS = 128
# Backward. x, dy, the weight and the accumulated dw take four registers per element. A tile has 2048 elements or one row, 16 elements per
# thread. As many programs per SM as hold 8192 elements of dw in all, with two tiles prefetched each, reach 95 to 97 % of a copy for up to
# 8192 columns (measured). A gate takes more registers per element, hence half as many programs. Rows of 16384 columns fill the registers of
# an SM and are faster without a prefetch (measured: 113 against 120 µs).
BACKWARD_CTA = 16384
BACKWARD_CTA_CROWDED = 8192  # with a gate, or with a second gradient to store: 16384 spills 550 bytes per thread (compiled)
BACKWARD_TILE = 2048
BACKWARD_ELEMENTS_PER_SM = 8192
BACKWARD_STAGES = 3
# Clusters of more than two thread blocks must fit into a GPC, some of which lack SMs. A cluster that finds no room waits until another one
# has finished all of its rows, so an eighth of the SMs is left out.
CLUSTER_SMS = 7 / 8
# Columns per step where a row is processed in blocks.
BLOCKED_COLUMNS = 8192
# The interpreter needs 1 to 2 ms per program, so its tiles are tall. Its limits are low, so that tests reach every path with short rows.
INTERPRETER_TILE = 1 << 16
INTERPRETER_FORWARD_COLUMNS = 16384
INTERPRETER_BACKWARD_COLUMNS = 8192


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


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
    block_n = columns if columns <= limit else BLOCKED_COLUMNS
    # Two programs, so that the loop over tiles and the sum of partial dw are exercised.
    return Config(max(1, INTERPRETER_TILE // block_n), block_n, 1, programs=0 if forward else device.num_sms)


def _forward(key: Key, device: Device) -> Config:
    columns = next_power_of_2(key.n)
    registers = columns * _registers_per_element(key)
    capacity = FORWARD_CTA_RESIDUAL if key.kind == "residual" else FORWARD_CTA
    if registers <= capacity:
        threads = max(128, registers // 16 if registers <= 4096 else registers // 32 if registers <= 16384 else 512)
        return Config(max(1, 16 * threads // registers), columns, threads // device.warp_size)
    num_ctas = registers // CLUSTER_CTA
    if num_ctas <= device.max_ctas:
        return Config(1, columns, CLUSTER_THREADS // device.warp_size, num_ctas)
    return Config(1, BLOCKED_COLUMNS, 256 // device.warp_size, num_stages=2)


def _backward(key: Key, device: Device) -> Config:
    columns = next_power_of_2(key.n)
    registers = columns * _registers_per_element(key)
    crowded = key.stores > 1
    capacity = BACKWARD_CTA_CROWDED if crowded and device.backend == "cuda" else BACKWARD_CTA
    block_m, num_ctas, per_sm = max(1, BACKWARD_TILE // registers), 1, 1
    threads = min(512, max(128, registers // 16))
    stages = BACKWARD_STAGES
    if registers <= capacity:
        per_sm = max(1, BACKWARD_ELEMENTS_PER_SM // (1 + crowded) // (block_m * registers))
        if registers > BACKWARD_ELEMENTS_PER_SM:
            stages = 1
    elif registers == 2 * capacity and not crowded and device.max_ctas > 1:
        num_ctas, threads = 2, 512
    elif registers // CLUSTER_CTA <= device.max_ctas:
        num_ctas, stages = registers // CLUSTER_CTA, 2
        threads, per_sm = (512, 1) if crowded else (CLUSTER_THREADS, 2)
    else:
        columns, threads = BLOCKED_COLUMNS // _registers_per_element(key), 512
    if device.backend == "hip":
        stages = min(stages, 2)  # a prefetch into registers
    else:
        loaded = block_m * columns // num_ctas * key.loads * key.itemsize  # bytes per tile
        stages = min(stages, 1 + device.shared_memory // (per_sm * loaded))
    sms = int(device.num_sms * CLUSTER_SMS) if num_ctas > 2 else device.num_sms
    return Config(block_m, columns, threads // device.warp_size, num_ctas, stages, max(1, sms * per_sm // num_ctas))


def _registers_per_element(key: Key) -> int:
    return 2 if max(key.itemsize, key.weight_itemsize) == 8 else 1


@cache
def reduction_config(n: int, device: Device) -> Config:
    """The configuration of the sum of partial dw over `n` columns. Narrow blocks of 128 bytes per row let many programs share the work."""
    if device.backend == "interpreter":
        return Config(1024, min(1024, next_power_of_2(n)), 1)
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
    prefetched = (config.num_stages - 1) * tile * key.loads * key.itemsize
    return (
        config.num_warps * device.warp_size <= min(1024, tile)
        and tile <= 1 << 20
        and (prefetched <= device.shared_memory or device.backend == "hip")
        and config.num_ctas <= device.max_ctas
        and (config.num_ctas == 1 or (config.block_m == 1 and config.block_n >= key.n))
        and (config.programs == 0 if key.direction == "forward" else 1 <= config.programs <= 16 * device.num_sms)
    )
