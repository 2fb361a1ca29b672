"""Configurations: every key has one, within the limits of the device, and nothing but the key and the device decides."""

import itertools

import pytest

from triton_rmsnorm.runtime.config import (
    GFX942,
    INTERPRETER,
    SM_80,
    SM_90,
    SM_100,
    Config,
    Key,
    analytic,
    is_valid,
    prefetched_bytes,
    reduction_config,
)

GPUS = [SM_80, SM_90, SM_90._replace(max_ctas=1), SM_100, GFX942]
POWERS = [2**k for k in range(19)]
COLUMNS = sorted({n for power in POWERS for n in (power - 1, power, power + 1) if n > 0} | set(range(1, 300_000, 9999)))
KINDS = [("plain", False), ("residual", False), ("residual", True), ("gate", False)]
KEYS = [
    Key(direction, n, itemsize, weight_itemsize, kind, own and direction == "backward")
    for direction, n, itemsize, weight_itemsize, (kind, own) in itertools.product(
        ("forward", "backward"), COLUMNS, (2, 4, 8), (0, 2, 4, 8), KINDS
    )
]


def on(devices):
    return pytest.mark.parametrize("device", devices, ids=lambda device: f"{device.name}-{device.max_ctas}")


@on([*GPUS, INTERPRETER])
def test_valid(device):
    assert [key for key in KEYS if device is not INTERPRETER and not is_valid(analytic(key, device), key, device)] == []
    for key in KEYS:
        config = analytic(key, device)
        assert config.block_n < 2 * key.n or key.n == 1, (key, config)
        assert config.block_m * config.block_n <= 2**20, (key, config)  # the largest tile of Triton


@on(GPUS)
def test_programs_of_the_backward_are_resident_at_once(device):
    """A program that waits for another one to end would do its share of the rows alone, at the end."""
    for key in KEYS:
        config = analytic(key, device)
        if key.direction == "forward":
            assert config.programs == 0
            continue
        per_sm = -(-config.programs * config.num_ctas // device.num_sms)
        threads = per_sm * config.num_warps * device.warp_size
        prefetched = (config.num_stages - 1) * prefetched_bytes(config, key)
        assert config.programs >= 1 and threads <= 1024, (key, config)
        assert device.backend == "hip" or per_sm * prefetched <= device.shared_memory, (key, config)


@on(GPUS)
def test_short_rows_have_several_programs_per_sm(device):
    for n in (64, 128, 256, 512, 1024, 2048):
        config = analytic(Key("backward", n, 2, 2), device)
        assert config.programs >= 4 * device.num_sms and config.block_m * config.block_n <= 2048


@on(GPUS)
def test_tiles_of_the_forward_are_small(device):
    """So that an SM holds many of them: no more than 32 elements per thread up to 32768 columns."""
    for n, kind in itertools.product(range(1, 32769, 97), ("plain", "residual", "gate")):
        config = analytic(Key("forward", n, 2, 2, kind), device)
        assert config.block_m * config.block_n <= 32 * config.num_warps * device.warp_size * config.num_ctas


@on(GPUS)
def test_partial_dw_fits_into_the_last_level_cache(device):
    """So that the kernel that sums them need not read them from memory."""
    for n in COLUMNS:
        config = analytic(Key("backward", n, 2, 2), device)
        blocks = -(-n // config.block_n)  # which share the programs
        assert max(1, config.programs // blocks) * n * 4 <= (256 if device is GFX942 else 40) * 2**20


def test_long_rows():
    """Where there are clusters, the backward reads no row of up to 131072 half-precision columns twice; elsewhere long rows are."""
    for n in range(16384, 131073, 1024):
        for device in (SM_90, SM_100):
            assert analytic(Key("backward", n, 2, 2), device).block_n >= n
        assert (analytic(Key("backward", n, 2, 2), SM_80).block_n < n) == (n > 16384)
    for kind in ("plain", "residual", "gate"):
        assert analytic(Key("forward", 16384, 4, 4, kind), SM_80).block_n == 16384
        assert analytic(Key("forward", 131072, 2, 2, kind), SM_90).num_ctas == 16
        assert analytic(Key("forward", 131072, 2, 2, kind), SM_80).block_n < 131072
    for n in (16384, 32768, 65536):
        assert analytic(Key("forward", n, 2, 2), SM_90).block_n < n  # the second read comes from the L2
    assert analytic(Key("forward", 65536, 4, 4), SM_90).num_ctas > 1


@on([*GPUS, INTERPRETER])
def test_same_for_all_n_of_a_power_of_2(device):
    """Between two powers of 2, N itself is the only thing that compiles another kernel."""
    for key in KEYS:
        power = 1 << max(key.n - 1, 0).bit_length()
        assert analytic(key, device) == analytic(key._replace(n=power), device)


@on([*GPUS, INTERPRETER])
def test_reduction(device):
    for n in COLUMNS:
        config = reduction_config(n, device)
        powers = (config.block_m, config.block_n, config.num_warps)
        assert all(power > 0 and power & (power - 1) == 0 for power in powers) and config.num_ctas == 1
        assert config.block_m * config.block_n <= 2**20


@pytest.mark.parametrize(
    "change",
    [
        {"block_m": 3},
        {"load_policy": "evict_never"},
        {"store_policy": ".ca"},
        {"num_warps": 64},
        {"num_warps": 0},
        {"num_stages": 0},
        {"num_stages": 40},
        {"num_ctas": 2},
        {"num_ctas": 32, "block_m": 1},
        {"programs": 0},
        {"programs": 1 << 20},
    ],
    ids=str,
)
def test_invalid(change):
    key = Key("backward", 256, 2, 2)
    config = analytic(key, SM_90)
    assert is_valid(config, key, SM_90) and config.load_policy == config.store_policy == ""
    assert not is_valid(Config(**(vars(config) | change)), key, SM_90)
