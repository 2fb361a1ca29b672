"""Autotuning: when a search is made, what it may change, what is kept of it, and that nothing that stops a search stops the call.

The kernels are interpreted, with the configurations of an H100; a made-up clock stands in for the GPU's.
"""

import fcntl
import importlib
import json
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from processes import compiled

import triton_rmsnorm
from triton_rmsnorm.runtime import autotune, launch, table, timing
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
def small_problems(tuned, monkeypatch):
    monkeypatch.setattr(autotune, "MEMORY", 1 << 15)


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


every_key = pytest.mark.parametrize("key", KEYS, ids=lambda key: "-".join(map(str, key)))


@every_key
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"{device.name}-{device.max_ctas}")
def test_candidates_are_valid(key, device):
    for n in (1, 96, 256, 4096, 5000, 16384, 50000, 131072):
        key = key._replace(n=n)
        base = analytic(key, device)
        few, many = autotune.variants(base, key, device), autotune.neighbors(base, key, device)
        for configs in (few, many):
            assert len({base, *configs}) == 1 + len(configs) and all(is_valid(config, key, device) for config in configs)
        assert 3 <= len(few) < autotune.TRIES <= len(many)


@every_key
def test_default_search_leaves_the_order_of_sums(key):
    """It changes neither what a thread holds of a row nor the number of partial dw."""
    base = analytic(key, SM_90)
    fixed = ("block_n", "num_warps", "num_ctas", "programs") + (("block_m",) if key.direction == "backward" else ())
    for config in autotune.variants(base, key, SM_90):
        assert all(getattr(config, name) == getattr(base, name) for name in fixed)


@every_key
def test_search_on_every_kind_of_key(key, clock, few):
    """The fastest of the configurations with the same results wins."""
    found = autotune.search(key, SM_90, full=False)
    assert found == Measured(replace(analytic(key, SM_90), store_policy=".cs"), 90.0, 100.0)


def test_a_search_tries_a_handful(clock):
    """At most 8 configurations at once, and then the best of them beside the analytic choice."""
    autotune.search(Key("forward", 256, 2, 2), SM_90, full=False)
    assert 4 <= clock[0] <= 8 and clock[1:] == [2]


class FakeGPU:
    """What torch.cuda has for timing, with a clock that only timed work moves; it notes the order of work."""

    def __init__(self):
        self.now, self.work = 0.0, []

    def Event(self, enable_timing):  # noqa: N802
        gpu = self

        class Event:
            def record(self):
                self.at = gpu.now

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()

    def run(self, name, ms):
        self.work.append(name)
        self.now += ms

    def _sleep(self, cycles):
        assert cycles > 0
        self.run("wait", 7)

    def synchronize(self):
        pass


def test_timing_is_interleaved_and_cold(monkeypatch):
    """The calls take turns, and before each of them the L2 is filled with other data and the GPU is kept waiting for the host."""
    gpu = FakeGPU()
    monkeypatch.setattr(timing.torch, "cuda", gpu)
    flush = type("Flush", (), {"sum": lambda self: gpu.run("flush", 5)})()
    times = timing.time_interleaved([lambda: gpu.run("A", 1), lambda: gpu.run("B", 2)], 3, flush)
    assert times == [[1000.0] * 3, [2000.0] * 3]
    assert gpu.work[-3 * 6 :] == ["flush", "wait", "A", "flush", "wait", "B"] * 3


def test_first_use_searches_once(clock, few, capsys, monkeypatch):
    """Also the backward's key, when the first forward that needs a gradient is prepared. The next process reads the cache."""
    call(requires_grad=False)
    assert list(cached()) == [Key("forward", 256, 4, 4)]
    call()
    assert set(cached()) == {Key("forward", 256, 4, 4), Key("backward", 256, 4, 4)}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("same results bit for bit" in line for line in lines)
    clock.clear()
    autotune._found.clear()  # as in another process
    launch.forget()
    call(rows=3).sum().backward()
    assert not clock and choice("forward").store_policy == ".cs"
    for versioned in (autotune, autotune.triton):  # other versions have other caches
        with monkeypatch.context() as patch:
            patch.setattr(versioned, "__version__", "another")
            assert not cached()


def test_no_search_in_a_backward(clock, few, device):
    """Also where y, and with it dy, is wider than x: the forward looks for the backward's configuration as the backward will."""
    x, weight = torch.ones(2, 256, dtype=torch.bfloat16, device=device), torch.ones(256, device=device)
    y = triton_rmsnorm.rms_norm(x.requires_grad_(), (256,), weight, x_hat_dtype=torch.bfloat16)
    clock.clear()
    y.sum().backward()
    assert y.dtype == torch.float32 and not clock


@pytest.mark.parametrize(("key", "output"), [(KEYS[0], "Y"), (KEYS[0], "RSTD"), (KEYS[4], "DX"), (KEYS[4], "DW")], ids=str)
def test_other_bits_are_refused(key, output, clock, few, monkeypatch):
    """However fast it is: a configuration whose results differ in one bit does not win, but in a full search it does."""
    base = analytic(key, SM_90)
    other = replace(base, store_policy=".cs")
    monkeypatch.setattr(autotune, "neighbors", autotune.variants)
    launches = autotune._Trial._launches

    def flipping(self, config):
        steps = launches(self, config)
        if config == other:
            *_, (step, pointers) = (pair for pair in steps if output in pair[0].pointers)
            result = pointers[step.pointers.index(output)].view(torch.uint8)

            def flip(*_):
                result.view(-1)[0] ^= 1

            steps.append((flip, ()))
        return steps

    monkeypatch.setattr(autotune._Trial, "_launches", flipping)
    assert autotune.search(key, SM_90, full=False).config == base
    assert autotune.search(key, SM_90, full=True).config == other


def test_what_fills_the_l2_has_its_size_for_every_default_dtype(device):
    """Programs set it to half precision while they build a model."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert autotune._Trial(KEYS[0], SM_90, device, full=False).flush.dtype == torch.float32
    finally:
        torch.set_default_dtype(default)


def test_a_difference_within_the_noise_is_not_a_gain(clock, few, monkeypatch):
    monkeypatch.setattr(autotune, "time_interleaved", lambda calls, *_: [[100.0], [99.5]][: len(calls)])
    key = Key("forward", 256, 2, 2)
    assert autotune.search(key, SM_90, full=False).config == analytic(key, SM_90)


def search_at_import(variable: str | None) -> bool:
    """Whether the package installs its search where the environment variable has this value; None: it is not set."""
    before = table.search
    environment = {name: value for name, value in os.environ.items() if name != autotune.VARIABLE}
    try:
        with mock.patch.dict(os.environ, environment | ({} if variable is None else {autotune.VARIABLE: variable}), clear=True):
            table.search = None
            importlib.reload(autotune)
        return table.search is autotune.tune
    finally:
        table.search = before


def test_other_values_of_the_variable():
    """They would leave it on."""
    with pytest.raises(ValueError, match="TRITON_RMSNORM_AUTOTUNE must be 0, full, or not set, got 'off'"):
        search_at_import("off")


@pytest.mark.slow
@pytest.mark.xdist_group("compiled")
def test_on_by_default():
    """It is read when the package is imported; under the interpreter nothing is tuned by default."""
    assert [compiled(search_at_import, variable) for variable in ("0", "", None)] == [False, True, True]
    if launch.INTERPRETED:
        script = Path(__file__).parent / "scripts" / "search_at_import.py"
        environment = {name: value for name, value in os.environ.items() if name != autotune.VARIABLE}
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, env=environment)
        assert done.stdout == "None\n"


@pytest.mark.slow
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


def test_contexts_that_overlap(monkeypatch):
    """On two threads, the first to begin may be the first to end: it is on until the last one ends, and then as before."""
    monkeypatch.setattr(table, "search", None)
    first, second = triton_rmsnorm.autotuning(), triton_rmsnorm.autotuning()
    searches = []
    for step in (first.__enter__, second.__enter__, lambda: first.__exit__(None, None, None), lambda: second.__exit__(None, None, None)):
        step()
        searches.append(table.search)
    assert searches == [autotune.tune, autotune.tune, autotune.tune, None]


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


def read_only(*_, **__):
    raise PermissionError("read-only")


FAILURES = {
    "memory": lambda patch: patch(autotune._Trial, "__init__", out_of_memory),
    "compiler": lambda patch: patch(autotune._Trial, "_compile", cannot_compile),
    "read-only cache": lambda patch: patch(Path, "mkdir", read_only),
    "read-only file": lambda patch: patch(table, "write", read_only),
    "no home": lambda patch: patch(autotune, "cache_file", cannot_compile),
    "clock": lambda patch: patch(autotune, "time_interleaved", cannot_compile),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_what_stops_a_search_does_not_stop_the_call(failure, clock, few, monkeypatch):
    """One warning per key, and the analytic choice from then on."""
    failure(monkeypatch.setattr)
    with pytest.warns(RuntimeWarning, match="is not tuned") as caught:
        y = call()
    assert len(caught) == 2 and y.isfinite().all()  # forward and backward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch.forget()
        call().sum().backward()
    assert choice("forward") == analytic(Key("forward", 256, 4, 4), SM_90)


def test_an_interrupt_while_configurations_are_compiled(monkeypatch, device):
    """It leaves no mode of Triton's active, in which nothing could be compiled any more."""
    modes = importlib.import_module("triton.runtime._async_compile")
    trial = autotune._Trial(Key("forward", 256, 2, 2), SM_90, device, full=False)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "INTERPRETED", False)
        patch.setattr(modes, "as_completed", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trial.times([])
    assert modes.active_mode.get() is None


@pytest.mark.parametrize("failure", ["read-only cache", "read-only file"])
def test_what_is_known_is_read_where_nothing_can_be_written(failure, clock, few, monkeypatch):
    """In the image of a container, for example, that has the cache of the machine on which it was built."""
    call()
    clock.clear()
    autotune._found.clear()  # as in another process
    launch.forget()
    FAILURES[failure](monkeypatch.setattr)
    call()
    assert not clock and choice("forward").store_policy == ".cs"


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


def test_several_processes_search_once(clock, few):
    """A process that waits for the lock takes what another one has found meanwhile."""
    key = Key("forward", 256, 4, 4)
    path = autotune.cache_file(SM_90, False)
    path.parent.mkdir(parents=True)
    found = Measured(replace(analytic(key, SM_90), load_policy="evict_last"), 1.0, 2.0)
    held = threading.Event()

    def other_process() -> None:
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            held.set()
            time.sleep(0.2)
            table.write(path, SM_90, {key: found})

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(other_process)
        held.wait()
        call(requires_grad=False)
        other.result()
    assert not clock and choice("forward") == found.config


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


@pytest.mark.slow
def test_memory_is_bounded(clock, few, monkeypatch):
    """All tensors of a search, results of the analytic choice included, stay within the limit, and are freed at its end."""
    sizes, trials = [], []
    times = autotune._Trial.times

    def measured(self, configs):
        found = times(self, configs)
        tensors = [*self.inputs.values(), *self.outputs.values(), *self.expected, self.flush]
        trials.append(weakref.ref(self))
        sizes.append(sum(tensor.nbytes for tensor in tensors if tensor is not None))
        return found

    monkeypatch.setattr(autotune._Trial, "times", measured)
    monkeypatch.setattr(autotune, "MEMORY", 1 << 17)
    for key in KEYS[2::2]:
        autotune.search(key, SM_90, full=False)
    assert max(sizes) <= 1 << 17 < 4 * max(sizes)
    assert not any(trial() for trial in trials)


def test_the_random_generator_is_left_alone(clock, few):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    autotune.search(KEYS[0], SM_90, full=False)
    assert torch.equal(torch.rand(3), expected)


def with_entry(part: str, **changes):
    """A table whose only entry has other values in its key or configuration."""
    return lambda content: json.dumps(
        content | {"entries": [content["entries"][0] | {part: content["entries"][0][part] | changes}]},
    )


BAD_FILES = {
    "no JSON": lambda content: "{",
    "no table": lambda content: json.dumps([1, 2]),
    "too deep": lambda content: "[" * 100_000,
    "no float": lambda content: json.dumps(content | {"entries": [content["entries"][0] | {"us": 10**400}]}),
    "unknown field": with_entry("config", block=3),
    "not an integer": with_entry("config", block_m=1.0),
    "not valid": with_entry("config", num_warps=1024),
    "unknown kind": with_entry("key", kind="odd"),
}


@pytest.mark.parametrize("spoil", BAD_FILES.values(), ids=BAD_FILES)
def test_what_cannot_be_read_is_ignored(spoil, tmp_path, recwarn):
    key = Key("forward", 256, 2, 2)
    path, known = tmp_path / "table.json", {key: Measured(analytic(key, SM_90), 1.0, 2.0)}
    table.write(path, SM_90, known)
    assert table.read(path, SM_90) == known and table.read(path, GFX942) == {} and not recwarn
    path.write_text(spoil(json.loads(path.read_text())))
    assert table.read(path, SM_90) == {}
    assert len(recwarn) == 1


def test_devices_of_one_name_have_their_own_caches(clock, few):
    key, smaller = KEYS[0], SM_90._replace(num_sms=66)
    for _ in range(2):
        autotune._found.clear()  # as in another process
        for device in (SM_90, smaller):
            autotune.tune(key, device)
    assert len(clock) == 4  # two searches, which time twice


def test_missing_files_are_silent(tmp_path, recwarn):
    assert table.read(tmp_path / "missing.json", SM_90) == {} and not recwarn
