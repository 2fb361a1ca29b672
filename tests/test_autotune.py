"""Autotuning: when a search is made, what it may change, what is kept of it, and that nothing that stops a search stops the call.

The kernels are interpreted, with the configurations of an H100; a made-up clock stands in for the GPU's.
"""

import fcntl
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import triton_rmsnorm
from triton_rmsnorm.runtime import autotune, launch, plan, table
from triton_rmsnorm.runtime.config import GFX942, SM_80, SM_90, SM_100, Config, Key, analytic, is_valid
from triton_rmsnorm.runtime.table import Measured

KEYS = [
    Key("forward", 256, 2, 2),
    Key("forward", 256, 4, 0),
    Key("forward", 256, 2, 4, "residual"),
    Key("forward", 256, 2, 2, "gate"),
    Key("backward", 256, 2, 2),
    Key("backward", 256, 4, 0),
    Key("backward", 256, 4, 4, "residual", own_dresidual=True),
    Key("backward", 256, 2, 2, "gate"),
]
DEVICES = [SM_80, SM_90, SM_90._replace(max_ctas=1), SM_100, GFX942]


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Nothing is known except what the test finds, and problems are small."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(autotune.VARIABLE, raising=False)
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "none")
    monkeypatch.setattr(table, "search", autotune.tune)
    monkeypatch.setattr(autotune, "_found", {})
    monkeypatch.setattr(autotune, "MEMORY", 1 << 15)
    table.shipped.cache_clear()
    launch.forget()
    yield
    table.shipped.cache_clear()
    launch.forget()


@pytest.fixture
def clock(monkeypatch, run_as):
    """A clock by which every configuration except the analytic choice takes 90 µs instead of 100. Returns how many it timed."""
    if not launch.INTERPRETED:
        pytest.skip("a GPU has its own clock")
    run_as(SM_90)
    timed = []

    def time_interleaved(calls, rounds, flush):
        for call in calls:
            call()
        timed.append(len(calls))
        return [[90.0 if i else 100.0] * rounds for i in range(len(calls))]

    monkeypatch.setattr(autotune, "time_interleaved", time_interleaved)
    return timed


@pytest.fixture
def few(monkeypatch):
    """Each search tries one other configuration, because an interpreted launch takes its time."""
    monkeypatch.setattr(autotune, "variants", lambda config, *_: [replace(config, store_policy=".cs")])
    monkeypatch.setattr(autotune, "neighbors", lambda config, *_: [replace(config, num_warps=2)])


def call(n=256, rows=8, requires_grad=True):
    x, weight = torch.randn(rows, n, requires_grad=requires_grad), torch.randn(n)
    return triton_rmsnorm.rms_norm(x, (n,), weight, 1e-6)


def choice(direction, n=256):
    return table.choose(Key(direction, n, 4, 4), SM_90)


def cached(full=False):
    path = autotune.cache_file(SM_90, full)
    return table.read(path, SM_90) if path.exists() else {}


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"{device.name}-{device.max_ctas}")
@pytest.mark.parametrize("key", KEYS, ids=lambda key: "-".join(map(str, key)))
def test_candidates_are_valid(key, device):
    for n in (1, 96, 256, 4096, 5000, 16384, 50000, 131072):
        key = key._replace(n=n)
        base = analytic(key, device)
        few, many = autotune.variants(base, key, device), autotune.neighbors(base, key, device)
        for configs in (few, many):
            assert len({base, *configs}) == 1 + len(configs) and all(is_valid(config, key, device) for config in configs)
        assert 3 <= len(few) < autotune.TRIES <= len(many)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: "-".join(map(str, key)))
def test_default_search_leaves_the_order_of_sums(key):
    """It changes neither what a thread holds of a row nor the number of partial dw."""
    base = analytic(key, SM_90)
    fixed = ("block_n", "num_warps", "num_ctas", "programs") + (("block_m",) if key.direction == "backward" else ())
    for config in autotune.variants(base, key, SM_90):
        assert all(getattr(config, name) == getattr(base, name) for name in fixed)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: "-".join(map(str, key)))
def test_search_on_every_kind_of_key(key, clock, few):
    """The fastest of the configurations with the same results wins."""
    found = autotune.search(key, SM_90, full=False)
    assert found == Measured(replace(analytic(key, SM_90), store_policy=".cs"), 90.0, 100.0)


def test_first_use_searches_once(clock, few, capsys):
    """Also the backward's key, when the first forward that needs a gradient is prepared. The next process reads the cache."""
    call(requires_grad=False)
    assert list(cached()) == [Key("forward", 256, 4, 4)]
    call()
    assert set(cached()) == {Key("forward", 256, 4, 4), Key("backward", 256, 4, 4)}
    assert "same results bit for bit" in capsys.readouterr().err
    clock.clear()
    autotune._found.clear()  # as in another process
    launch.forget()
    call(rows=3).sum().backward()
    assert not clock and choice("forward").store_policy == ".cs"


def test_other_bits_are_refused(clock, monkeypatch):
    """However fast it is: a configuration whose results differ in one bit does not win, but in a full search it does."""
    monkeypatch.setattr(autotune, "variants", lambda config, *_: [replace(config, num_stages=2)])
    monkeypatch.setattr(autotune, "neighbors", autotune.variants)
    prepare = plan.backward_launches

    def other_bits(*arguments):
        launches = prepare(*arguments)
        if arguments[-1].num_stages == 2:
            run = launches.main.__call__

            class Flipped:
                step, pointers = launches.main.step, launches.main.pointers
                kernel, values, grid = launches.main.kernel, launches.main.values, launches.main.grid

                def __call__(self, *pointers):
                    run(*pointers)
                    dx = pointers[self.pointers.index("DX")]
                    dx.view(torch.int16)[0, 0] ^= 1

            return launches._replace(main=Flipped())
        return launches

    monkeypatch.setattr(plan, "backward_launches", other_bits)
    key = Key("backward", 256, 2, 2)
    base = replace(analytic(key, SM_90), num_stages=3)
    assert autotune.search(key, SM_90, full=False).config == base
    assert autotune.search(key, SM_90, full=True).config == replace(base, num_stages=2)


def test_a_difference_within_the_noise_is_not_a_gain(clock, few, monkeypatch):
    monkeypatch.setattr(autotune, "time_interleaved", lambda calls, *_: [[100.0], [99.5]][: len(calls)])
    key = Key("forward", 256, 2, 2)
    assert autotune.search(key, SM_90, full=False).config == analytic(key, SM_90)


def test_switched_off(clock, monkeypatch, tmp_path):
    """TRITON_RMSNORM_AUTOTUNE=0 is read when the package is imported; so is the interpreter, under which nothing is tuned by default."""
    script = Path(__file__).parent / "scripts" / "search_at_import.py"
    assert subprocess.run([sys.executable, script, "0"], capture_output=True, text=True, check=True).stdout == "None\n"
    assert subprocess.run([sys.executable, script, ""], capture_output=True, text=True, check=True).stdout == "tune\n"


@pytest.mark.parametrize("how", ["variable", "context"])
def test_full_search(how, clock, few, monkeypatch, capsys):
    """It has a cache of its own, so that results never depend on what another process searched for."""
    call()
    if how == "variable":
        monkeypatch.setenv(autotune.VARIABLE, "full")
        launch.forget()
        call()
    else:
        with triton_rmsnorm.autotuning():
            call()
    assert {measured.config.num_warps for measured in cached(full=True).values()} == {2}
    assert "last bits" in capsys.readouterr().err
    monkeypatch.delenv(autotune.VARIABLE, raising=False)
    launch.forget()
    assert choice("forward").store_policy == ".cs" and choice("forward").num_warps != 2


def test_a_shipped_table_wins(clock, few, monkeypatch, tmp_path):
    key, shipped = Key("forward", 256, 4, 4), Config(1, 256, 1)
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "tuned")
    table.write(tmp_path / "tuned" / "sm-90.json", SM_90, {key: Measured(shipped, 1.0, 2.0)})
    table.shipped.cache_clear()
    with triton_rmsnorm.autotuning():
        call(requires_grad=False)
        assert table.choose(key, SM_90) == shipped
    assert not clock


def test_nothing_runs_while_a_graph_is_captured(clock, few, monkeypatch):
    monkeypatch.setattr(autotune, "_capturing", lambda: True)
    call()
    assert not clock and not cached() and choice("forward") == analytic(Key("forward", 256, 4, 4), SM_90)
    monkeypatch.setattr(autotune, "_capturing", lambda: False)
    assert choice("forward").store_policy == ".cs"


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def cannot_compile(*_):
    raise RuntimeError("ptxas failed")


FAILURES = {
    "memory": lambda patch: patch(autotune._Trial, "__init__", out_of_memory),
    "compiler": lambda patch: patch(autotune._Trial, "_compile", cannot_compile),
    "cache": lambda patch: patch(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError("read-only"))),
    "clock": lambda patch: patch(autotune, "time_interleaved", cannot_compile),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_what_stops_a_search_does_not_stop_the_call(failure, clock, few, monkeypatch):
    """One warning per key, and the analytic choice from then on."""
    failure(monkeypatch.setattr)
    with pytest.warns(RuntimeWarning, match="is not tuned") as caught:
        call()
    assert len(caught) == 2  # forward and backward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch.forget()
        call().sum().backward()
    assert choice("forward") == analytic(Key("forward", 256, 4, 4), SM_90)


def test_one_bad_configuration_does_not_end_a_search(clock, monkeypatch):
    monkeypatch.setattr(autotune, "variants", lambda c, *_: [replace(c, block_m=1 << 21), replace(c, store_policy=".cs")])
    assert autotune.search(Key("forward", 256, 4, 4), SM_90, full=False).config.store_policy == ".cs"


def test_a_lock_that_is_not_had_in_time(clock, few, monkeypatch):
    monkeypatch.setattr(autotune, "LOCK_SECONDS", 0.1)
    path = autotune.cache_file(SM_90, False).with_suffix(".lock")
    path.parent.mkdir(parents=True)
    with open(path, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.warns(RuntimeWarning, match="another process has been tuning"):
            call(requires_grad=False)
    assert not clock


def test_the_lock_is_released_although_a_child_has_it_open(clock, few, monkeypatch):
    """A process that is forked during a search inherits the open file, and with it the lock."""
    searched = autotune.search

    def forking(*arguments):
        children.append(subprocess.Popen(["sleep", "30"], close_fds=False))
        return searched(*arguments)

    children: list[subprocess.Popen] = []
    monkeypatch.setattr(autotune, "search", forking)
    monkeypatch.setattr(autotune, "open", inheritable_open, raising=False)
    monkeypatch.setattr(autotune, "LOCK_SECONDS", 0.1)
    try:
        call()
        assert set(cached()) == {Key("forward", 256, 4, 4), Key("backward", 256, 4, 4)}
    finally:
        for child in children:
            child.kill()


def inheritable_open(*arguments):
    file = open(*arguments)  # noqa: SIM115
    os.set_inheritable(file.fileno(), True)
    return file


def test_memory_is_bounded(clock, few, monkeypatch):
    """All tensors of a search, results of the analytic choice included, stay within the limit."""
    sizes = []
    times = autotune._Trial.times

    def measured(self, configs):
        found = times(self, configs)
        tensors = [*self.inputs.values(), *self.outputs.values(), *self.expected, self.flush]
        sizes.append(sum(tensor.nbytes for tensor in tensors if tensor is not None))
        return found

    monkeypatch.setattr(autotune._Trial, "times", measured)
    monkeypatch.setattr(autotune, "MEMORY", 1 << 18)
    for key in KEYS:
        autotune.search(key, SM_90, full=False)
    assert max(sizes) <= 1 << 18 < 4 * max(sizes)


def test_the_random_generator_is_left_alone(clock, few):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    autotune.search(KEYS[0], SM_90, full=False)
    assert torch.equal(torch.rand(3), expected)


BAD_FILES = {
    "no JSON": lambda content: "{",
    "no table": lambda content: json.dumps([1, 2]),
    "another device": lambda content: json.dumps(content | {"device": GFX942._asdict()}),
    "unknown field": lambda content: json.dumps(content | {"entries": [content["entries"][0] | {"config": {"block": 3}}]}),
    "not an integer": lambda content: json.dumps(
        content | {"entries": [content["entries"][0] | {"config": content["entries"][0]["config"] | {"block_m": 1.0}}]}
    ),
    "not valid": lambda content: json.dumps(
        content | {"entries": [content["entries"][0] | {"config": content["entries"][0]["config"] | {"num_warps": 1024}}]}
    ),
    "unknown kind": lambda content: json.dumps(
        content | {"entries": [content["entries"][0] | {"key": content["entries"][0]["key"] | {"kind": "odd"}}]}
    ),
}


@pytest.mark.parametrize("spoil", BAD_FILES.values(), ids=BAD_FILES)
def test_what_cannot_be_read_is_ignored(spoil, tmp_path, recwarn):
    key = Key("forward", 256, 2, 2)
    path = tmp_path / "table.json"
    table.write(path, SM_90, {key: Measured(analytic(key, SM_90), 1.0, 2.0)})
    assert table.read(path, SM_90) == {key: Measured(analytic(key, SM_90), 1.0, 2.0)} and not recwarn
    path.write_text(spoil(json.loads(path.read_text())))
    assert table.read(path, SM_90) == {}
    assert len(recwarn) == (0 if "sm_90" not in path.read_text() and "gfx942" in path.read_text() else 1)


def test_missing_files_are_silent(tmp_path, recwarn):
    assert table.read(tmp_path / "missing.json", SM_90) == {} and not recwarn
