"""Configurations: every row length has one, within the limits of the device, and nothing but row length, sizes and device decides."""

import ast
import inspect
import itertools
from dataclasses import replace

import pytest

from triton_rmsnorm.runtime import config as tuning

DEVICES = [tuning.SM_80, tuning.SM_90, replace(tuning.SM_90, max_ctas=1), tuning.SM_100, tuning.GFX942, tuning.INTERPRETER]
ITEMSIZES = [2, 4, 8]
WEIGHT_ITEMSIZES = [0, 2, 4, 8]  # 0: no weight
POWERS = [2**k for k in range(19)]
COLUMNS = sorted({n for power in POWERS for n in (power - 1, power, power + 1) if n > 0} | set(range(1, 300_000, 4999)))

# direction, loads and stores: plain, with a residual, with a gate
PASSES = [
    (tuning.forward_config, 1, 1),
    (tuning.forward_config, 2, 2),
    (tuning.forward_config, 2, 1),
    (tuning.backward_config, 2, 1),
    (tuning.backward_config, 3, 1),
    (tuning.backward_config, 3, 2),
]


def is_power_of_2(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def configurations(device, passes=PASSES):
    for (choose, loads, stores), n, itemsize, weight_itemsize in itertools.product(passes, COLUMNS, ITEMSIZES, WEIGHT_ITEMSIZES):
        yield n, itemsize, weight_itemsize, loads, stores, choose, choose(n, itemsize, weight_itemsize, device, loads, stores)


@pytest.fixture(params=DEVICES, ids=lambda device: f"{device.name}-{device.max_ctas}")
def device(request):
    return request.param


def test_valid(device):
    for n, itemsize, _, loads, _, choose, config in configurations(device):
        context = (choose.__name__, n, itemsize, loads, config)
        assert is_power_of_2(config.block_m) and is_power_of_2(config.block_n) and is_power_of_2(config.num_warps), context
        assert config.block_n < 2 * n and config.programs >= 1, context
        assert config.block_m * config.block_n <= 2**20, context  # the largest tile of Triton
        blocked = config.block_n < n
        assert is_power_of_2(config.num_ctas) and config.num_ctas <= device.max_ctas, context
        if config.num_ctas > 1:
            assert config.block_m == 1 and not blocked, context
        if device.backend == "interpreter":
            continue
        assert config.num_warps * (64 if device.backend == "hip" else 32) <= 1024, context
        held = config.block_m * config.block_n // config.num_ctas
        assert held >= config.num_warps, context
        resident = -(-config.programs * config.num_ctas // device.num_sms)  # programs that share the memory of an SM
        on_their_way = (config.num_stages - 1) * loads * held * itemsize
        assert resident * on_their_way <= device.shared_memory, context


def test_never_more_programs_than_fit(device):
    """Persistent programs are resident all at once, a cluster counting as its blocks."""
    for *context, config in configurations(device):
        assert config.programs * config.num_ctas <= 2 * max(device.num_sms, config.num_ctas), context


def test_overhead_is_within_its_budget(device):
    """What programs move besides rows, the weight and the partial dw, is a small part of the rows' bytes."""
    if device.backend == "interpreter":
        pytest.skip("a fixed number of programs")
    for _, itemsize, weight_itemsize, loads, stores, choose, config in configurations(device):
        rows = tuning.OVERHEAD_ROWS * (loads + stores) * itemsize
        if choose is tuning.forward_config:
            overhead, share = weight_itemsize, tuning.FORWARD_OVERHEAD
        else:
            overhead, share = weight_itemsize + 2 * max(4, weight_itemsize), tuning.BACKWARD_OVERHEAD
        assert config.programs == 1 or config.programs * overhead <= share * rows, (choose.__name__, itemsize, weight_itemsize, config)


def test_partial_dw_is_bounded_without_a_weight_size():
    """A weight of 0 bytes stands for none; there is dw only where there is a weight, of at least 2 bytes."""
    for device in DEVICES:
        programs = [tuning.backward_config(4096, 2, weight_itemsize, device).programs for weight_itemsize in (2, 4, 8)]
        assert max(programs) <= device.num_sms


def test_small_n_takes_tiles_of_several_rows(device):
    for choose, n, itemsize in itertools.product((tuning.forward_config, tuning.backward_config), (64, 96, 128, 256, 512), ITEMSIZES):
        assert choose(n, itemsize, 2, device).block_m >= 4


def test_long_rows_take_clusters():
    """Where there are clusters, no row of up to 131072 half-precision columns is read twice; where there are none, long rows are walked."""
    for n in range(16384, 131073, 1024):
        for choose, limit in ((tuning.forward_config, 32768), (tuning.backward_config, 16384)):
            for device in (tuning.SM_90, tuning.SM_100):
                assert choose(n, 2, 2, device).block_n >= n
            assert (choose(n, 2, 2, tuning.SM_80).block_n < n) == (n > limit)
    for itemsize in (2, 4):  # a gradient besides dx
        for device in (tuning.SM_90, tuning.SM_100):
            assert tuning.backward_config(131072, itemsize, 2, device, 3, 2).block_n == 131072
        assert tuning.backward_config(16384, itemsize, 2, tuning.GFX942, 3, 2).block_n == 16384
        assert tuning.backward_config(16384, itemsize, 2, tuning.SM_80, 3, 2).block_n < 16384
    assert tuning.forward_config(32768, 2, 2, tuning.SM_90).num_ctas > 1
    assert tuning.backward_config(16384, 2, 2, tuning.SM_90).num_ctas > 1


def test_same_for_all_n_of_a_power_of_2(device):
    """Nothing changes between two powers of 2 that compiles another kernel: N itself is the only difference."""
    for choose, power, itemsize in itertools.product((tuning.forward_config, tuning.backward_config), POWERS[2:], ITEMSIZES):
        assert choose(power // 2 + 1, itemsize, 2, device) == choose(power, itemsize, 2, device)


def test_reduction(device):
    for n in COLUMNS:
        config = tuning.reduction_config(n, device)
        assert is_power_of_2(config.block_m) and is_power_of_2(config.block_n) and config.num_ctas == 1
        assert config.block_m * config.block_n <= 2**20


def test_number_of_rows_does_not_decide():
    for choose in (tuning.forward_config, tuning.backward_config, tuning.reduction_config):
        assert set(inspect.signature(choose).parameters) <= {"n", "itemsize", "weight_itemsize", "device", "loads", "stores"}


def test_needs_neither_torch_nor_triton():
    tree = ast.parse(inspect.getsource(tuning))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.split(".")[0] in ("torch", "triton", "triton_rmsnorm")]
