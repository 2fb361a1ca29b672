"""Measured configurations: what a search finds, when one is made, what is kept of it and what is done with a file that cannot be read."""

import json
import warnings
from dataclasses import asdict, replace

import pytest
import torch
from torch.nn import functional as F
from triton.runtime.errors import OutOfResources

import triton_rmsnorm
from triton_rmsnorm.runtime import autotune, launch
from triton_rmsnorm.runtime import config as tuning
from triton_rmsnorm.runtime import table as measured
from triton_rmsnorm.runtime.table import Key, Measured

KEYS = [
    Key("forward", 256, 2, 2, 1, 1),
    Key("forward", 256, 4, 0, 1, 1),
    Key("forward", 256, 2, 4, 2, 2),  # a residual
    Key("forward", 256, 2, 2, 2, 1),  # a gate
    Key("backward", 256, 2, 2, 2, 1),
    Key("backward", 256, 4, 0, 2, 1),
    Key("backward", 256, 2, 4, 3, 1),
    Key("backward", 256, 2, 2, 3, 2),
]
DEVICES = [tuning.SM_80, tuning.SM_90, replace(tuning.SM_90, max_ctas=1), tuning.SM_100, tuning.GFX942]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Nothing is known but what a test finds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_RMSNORM_AUTOTUNE", raising=False)
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "none")
    monkeypatch.setattr(measured, "found", {})
    monkeypatch.setattr(autotune, "ELEMENTS", 1 << 12)
    measured.shipped.cache_clear()
    launch.forget()
    yield
    measured.shipped.cache_clear()
    launch.forget()


def forget_process():
    """What a new process does not know."""
    measured.found.clear()
    launch.forget()


@pytest.fixture
def clock(monkeypatch, launches, run_as):
    """A clock that shows 100 µs at 2 warps and 10 more for each doubling of them. Returns the launches that it timed.

    Only the number of warps is varied, since an interpreted launch takes its time.
    """
    run_as(tuning.SM_90)
    monkeypatch.setattr(autotune, "neighbours", fewer_or_more_warps)
    timed = []

    def time_cold(call, seconds, before=None):
        launches.clear()
        call()
        main = next(record.launch for record in launches if "NUM_STAGES" in record.launch.values)
        timed.append(main)
        return [100 + 10 * abs(main.options["num_warps"].bit_length() - 2)] * 3

    monkeypatch.setattr(autotune, "time_cold", time_cold)
    return timed


every_neighbour = autotune.neighbours


def fewer_or_more_warps(config, key, device):
    return [other for other in every_neighbour(config, key, device) if replace(other, num_warps=config.num_warps) == config]


def forward_and_backward(rows=8, n=256):
    x, weight = torch.randn(rows, n, requires_grad=True), torch.randn(n, requires_grad=True)
    dy = torch.randn(rows, n)
    y = triton_rmsnorm.rms_norm(x, (n,), weight, 1e-6)
    gradients = torch.autograd.grad(y, (x, weight), dy)
    expected = F.rms_norm(x, (n,), weight, 1e-6)
    for ours, theirs in zip((y, *gradients), (expected, *torch.autograd.grad(expected, (x, weight), dy)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"{device.name}-{device.max_ctas}")
def test_neighbours_run(device):
    for key in KEYS:
        for n in (1, 96, 256, 4096, 5000, 16384, 50000, 131072):
            config = measured.analytic(key._replace(n=n), device)
            assert measured.runs(config, key._replace(n=n), device), (n, key, config)
            others = autotune.neighbours(config, key._replace(n=n), device)
            assert len(set(others) - {config}) == len(others) >= 4
            assert all(measured.runs(other, key._replace(n=n), device) for other in others)
            assert {other.load_policy for other in others} == set(tuning.LOAD_POLICIES)
            assert {other.store_policy for other in others} == set(tuning.STORE_POLICIES)


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
def test_what_does_not_run(change):
    key, device = Key("forward", 1024, 2, 2, 1, 1), tuning.SM_90
    assert not measured.runs(replace(measured.analytic(key, device), **change), key, device)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: "-".join(map(str, key)))
def test_search_walks_to_the_fastest(clock, key, capsys):
    found = autotune.search(key, tuning.SM_90)
    base = measured.analytic(key, tuning.SM_90)
    assert found.config.num_warps == 2 < base.num_warps
    assert found.us == 100 < found.analytic_us
    assert len({(main.options["num_warps"], *main.arguments, main.grid) for main in clock}) == len(clock) - 2  # the finalists twice
    said = capsys.readouterr().err
    assert f"autotuning the {key.direction} of 256 columns" in said and "100 µs" in said


@pytest.mark.parametrize("key", [KEYS[0], KEYS[-1]], ids=["forward", "backward"])
def test_search_varies_everything(clock, monkeypatch, key):
    monkeypatch.setattr(autotune, "neighbours", every_neighbour)
    monkeypatch.setattr(autotune, "ROUNDS", 1)
    autotune.search(key, tuning.SM_90)
    names = ("BLOCK_M", "NUM_STAGES")
    assert all(len({main.values[name] for main in clock}) >= 3 for name in names)
    assert {option: len({main.options[option] for main in clock}) for option in ("num_warps", "num_ctas")} == {
        "num_warps": 3,
        "num_ctas": 1,
    }


def test_search_keeps_the_analytic_choice_within_the_noise(monkeypatch, run_as):
    run_as(tuning.SM_90)
    times = iter(100 - 0.01 * i for i in range(1000))
    monkeypatch.setattr(autotune, "time_cold", lambda call, seconds: [next(times)])
    found = autotune.search(KEYS[0], tuning.SM_90)
    assert found.config == measured.analytic(KEYS[0], tuning.SM_90) and found.us == found.analytic_us


def test_searches_rows_in_blocks(clock, monkeypatch, run_as):
    """A row that fits no tile has a c1 kernel of its own in the backward."""
    device = replace(tuning.SM_90, max_ctas=1)
    run_as(device)
    monkeypatch.setattr(autotune, "ELEMENTS", 1 << 17)
    monkeypatch.setattr(autotune, "ROUNDS", 1)
    key = Key("backward", 40000, 2, 0, 2, 1)
    monkeypatch.setattr(autotune, "neighbours", lambda *_: [replace(measured.analytic(key, device), programs=1)])
    assert autotune.search(key, device).config.block_n < key.n


@pytest.mark.parametrize("how", ["environment", "context"])
def test_searches_on_first_use_and_never_again(clock, monkeypatch, capsys, how):
    forward_and_backward()
    assert not clock  # nobody asked
    if how == "environment":
        monkeypatch.setenv("TRITON_RMSNORM_AUTOTUNE", "1")
        launch.forget()
        forward_and_backward()
    else:
        with autotune.autotuning():
            forward_and_backward()
        assert not measured.asked
    assert {main.kernel.fn.__name__ for main in clock} == {"_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel"}
    assert capsys.readouterr().err.count("autotuning") == 2
    assert {key.direction: found.config.num_warps for key, found in measured.found[tuning.SM_90].items()} == {"forward": 2, "backward": 2}

    clock.clear()
    forward_and_backward(rows=24)  # as many rows as one likes
    forget_process()
    with autotune.autotuning():
        forward_and_backward()
    assert not clock and not capsys.readouterr().err


def test_what_was_found_is_launched(clock, launches):
    with autotune.autotuning():
        forward_and_backward()
    launches.clear()
    forward_and_backward(rows=40)
    mains = [record.launch for record in launches if "NUM_STAGES" in record.launch.values]
    assert [main.options["num_warps"] for main in mains] == [2, 2]


def test_timing_is_cold_and_without_the_host(monkeypatch):
    """What the GPU is given to do, in order: its functions are replaced by notes."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def elapsed_time(self, end):
            return 0.25  # ms

    class Flush:
        def sum(self):
            done.append("flush")

    clock = iter(range(1000))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep") if cycles == 3e9 else None)
    monkeypatch.setattr(torch, "ones", lambda elements, device: Flush() if elements * 4 >= 4 * 60e6 and device == "cuda" else None)
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: next(clock))
    times = autotune.time_cold(lambda: done.append("call"), 3, before=lambda: done.append("before"))
    once = ["before", "flush", "sleep", "event", "call", "event"]
    assert done == ["call", *["synchronize", "call"] * 3, *[*once * 5, "synchronize"] * 3]
    assert times == [250.0] * 15


def test_interpreter_is_not_tuned(monkeypatch):
    monkeypatch.setenv("TRITON_RMSNORM_AUTOTUNE", "1")
    assert measured.choose(KEYS[0], tuning.INTERPRETER) == measured.analytic(KEYS[0], tuning.INTERPRETER)


def test_nothing_is_searched_while_a_graph_is_captured(clock, monkeypatch):
    for question in ("is_available", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, question, lambda: True)
    with autotune.autotuning(), pytest.warns(UserWarning, match="launch it once before"):
        assert measured.choose(KEYS[0], tuning.SM_90) == measured.analytic(KEYS[0], tuning.SM_90)
    assert not clock and KEYS[0] not in measured.found[tuning.SM_90]


def test_what_does_not_fit_is_passed_over(clock, monkeypatch):
    call = launch.Launch.__call__

    def limited(self, *pointers):
        if self.options["num_warps"] == 2:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return call(self, *pointers)

    monkeypatch.setattr(launch.Launch, "__call__", limited)
    assert autotune.search(KEYS[0], tuning.SM_90).config.num_warps == 4


def test_what_computes_something_else_is_not_used(clock, monkeypatch):
    call = launch.Launch.__call__

    def miscompiled(self, *pointers):
        call(self, *pointers)
        if self.options["num_warps"] == 2:
            pointers[4][-1] = 0  # a row of Y

    monkeypatch.setattr(launch.Launch, "__call__", miscompiled)
    with pytest.warns(UserWarning, match="computes something else"):
        assert autotune.search(KEYS[0], tuning.SM_90).config.num_warps == 4


TABLE = {KEYS[0]: Measured(replace(measured.analytic(KEYS[0], tuning.SM_90), num_warps=16), 10.0, 11.0)}


def test_written_and_read(tmp_path):
    measured.write(tmp_path / "table.json", tuning.SM_90, TABLE, date="today")
    assert measured.read(tmp_path / "table.json", tuning.SM_90) == TABLE
    assert json.loads((tmp_path / "table.json").read_text())["date"] == "today"
    assert measured.read(tmp_path / "table.json", replace(tuning.SM_90, max_ctas=1)) == {}
    assert measured.read(tmp_path / "none.json", tuning.SM_90) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"device": {"name": 1}, "entries": []}'])
def test_a_corrupt_cache_is_ignored_with_one_warning_and_replaced(clock, text):
    path = autotune.cache_file(tuning.SM_90)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with autotune.autotuning(), pytest.warns(UserWarning) as caught:
        forward_and_backward()
    assert [str(path) in str(warning.message) for warning in caught if warning.category is UserWarning] == [True]
    assert len(measured.read(path, tuning.SM_90)) == 2


@pytest.mark.parametrize(
    "bad",
    [
        {},
        None,
        {"key": 1, "config": 2},
        {"key": KEYS[0]._asdict() | {"direction": "sideways"}},
        {"key": KEYS[0]._asdict() | {"n": "256"}},
        {"config": {"block_m": 1}},
        {"config": asdict(TABLE[KEYS[0]].config) | {"num_warps": 7}},
        {"us": "fast"},
    ],
    ids=str,
)
def test_a_corrupt_entry_is_ignored_with_one_warning(tmp_path, bad):
    path = tmp_path / "table.json"
    good = {KEYS[4]: Measured(measured.analytic(KEYS[4], tuning.SM_90), 10.0, 11.0)}
    measured.write(path, tuning.SM_90, TABLE | good)
    content = json.loads(path.read_text())
    index = next(i for i, entry in enumerate(content["entries"]) if entry["key"]["direction"] == "forward")
    content["entries"][index] = content["entries"][index] | bad if bad else bad
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="1 of 2 entries") as caught:
        assert measured.read(path, tuning.SM_90) == good
    assert len(caught) == 1


def test_a_shipped_table_overrides_the_analytic_choice(monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "SHIPPED", tmp_path)
    measured.write(tmp_path / "sm-90.json", tuning.SM_90, TABLE)
    assert measured.choose(KEYS[0], tuning.SM_90) == TABLE[KEYS[0]].config
    assert measured.choose(KEYS[1], tuning.SM_90) == measured.analytic(KEYS[1], tuning.SM_90)
    assert measured.choose(KEYS[0], tuning.SM_100) == measured.analytic(KEYS[0], tuning.SM_100)
    monkeypatch.setenv("TRITON_RMSNORM_AUTOTUNE", "1")
    assert measured.choose(KEYS[0], tuning.SM_90) == TABLE[KEYS[0]].config  # known: not searched


def test_shipped_tables_are_whole():
    for path in (measured.Path(measured.__file__).parent / "tuned").glob("*.json"):
        content = json.loads(path.read_text())
        assert {"device", "entries", "driver", "torch", "triton", "triton_rmsnorm", "date", "commit"} <= content.keys()
        device = tuning.Device(**content["device"])
        assert path.name == measured.file_name(device)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(measured.read(path, device)) == len(content["entries"]) > 0
