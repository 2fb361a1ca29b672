"""The host's time, and the driver that does nothing: launches of compiled kernels, on a machine without a GPU."""

import contextlib
import io
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from processes import compiled

from bench import records
from bench.speed import host
from triton_rmsnorm import rms_norm


def test_window_time(monkeypatch):
    now = itertools.count()
    calls = []
    monkeypatch.setattr(host, "WINDOWS", 8)
    assert host.window_time(lambda: calls.append(1), clock=lambda: next(now) * 1e-4) == pytest.approx(50)  # 2 calls in 100 µs
    assert len(calls) == 20 + 1 + 2 * 8


def on_stub(test):
    """A test of compiled kernels that end in a stub of libcuda, which takes a C compiler and no GPU."""
    missing = torch.cuda.is_available() or not shutil.which("cc")
    marked = pytest.mark.skipif(missing, reason="a stub of libcuda takes a C compiler and no GPU")(test)
    return pytest.mark.slow(pytest.mark.xdist_group("compiled")(marked))


def measured(folder: Path) -> str:
    """What `python -m bench.host --json` prints, with few windows."""
    few, there = mock.patch.object(host, "WINDOWS", 3), mock.patch.object(records, "RESULTS", folder)
    with few, there, contextlib.redirect_stdout(io.StringIO()) as shown:
        host.main(["--json"])
    return shown.getvalue()


@on_stub
def test_host(tmp_path, monkeypatch):
    shown = compiled(measured, tmp_path)
    lines = {line.split("│")[1].strip(): line.split("│")[2:5] for line in shown.splitlines() if line.startswith("│")}
    assert lines.keys() >= {"ours: RMSNorm", "ours: rms_norm", "F.layer_norm, computed on the CPU", "a Function that does nothing"}
    assert all(0 < float(figure) < 1e5 for line in lines.values() for figure in line)

    monkeypatch.setattr(records, "RESULTS", tmp_path)
    written = records.newest("host")
    assert written.name.startswith("host-stubbed-") and written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    result = json.loads(written.read_text())
    assert result["driver"].startswith("stubbed") and result["metadata"].keys() >= {"cpu", "torch", "triton", "commit", "date"}
    assert {name: [f"{us:.1f}" for us in times.values()] for name, times in result["us"].items()} == {
        name: [figure.strip() for figure in figures] for name, figures in lines.items()
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_the_stub_needs():
    """Here Triton interprets; the other thing that may be missing is a C compiler."""
    with pytest.raises(SystemExit, match=r"takes a C compiler \(cc\)"):
        host.main([])


def launches_on_the_stub() -> list[tuple[int, int]]:
    """Launches forward and backward of rows, of the same again, and of rows that are aligned to fewer bytes."""
    from bench.speed.stub_driver import stubbed  # takes Triton's backend for NVIDIA, and compiles

    def launches(x):
        before = stub.launches
        y = rms_norm(x, (64,), weight)
        middle = stub.launches
        torch.autograd.grad(y, weight, y)
        return middle - before, stub.launches - middle

    with stubbed() as stub:
        x, weight = torch.randn(8, 65)[:, :64], torch.randn(64, requires_grad=True)
        return [launches(x), launches(x), launches(torch.randn(8 * 65 + 1)[1:].view(8, 65)[:, :64])]


@on_stub
def test_launches_on_the_stub_are_counted():
    """One launch forward, two backward; a compiled kernel is launched again, and another one for another alignment."""
    assert compiled(launches_on_the_stub) == [(1, 2)] * 3


def search_on_the_stub() -> tuple:
    """A search with a made-up clock, by which each configuration is faster than the one before."""
    from bench.speed.stub_driver import DEVICE, stubbed
    from triton_rmsnorm.runtime import autotune
    from triton_rmsnorm.runtime.config import Key, analytic

    key, ahead = Key("backward", 128, 2, 2), []
    base = analytic(key, DEVICE)
    compile_all = autotune._Trial._compile

    def compile_ahead(self, launches):
        def count():
            return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

        kernels = {step.kernel for steps in launches for step, _ in steps}
        before = count()
        compile_all(self, launches)
        ahead.append(count() - before)

    def time_interleaved(calls, rounds, flush):
        for call in calls:
            call()
        return [[100.0 - 10 * i] for i in range(len(calls))]

    with (
        mock.patch.object(autotune, "MEMORY", 1 << 15),
        mock.patch.object(autotune._Trial, "_compile", compile_ahead),
        mock.patch.object(autotune, "time_interleaved", time_interleaved),
        mock.patch.object(autotune, "variants", lambda config, *_: [replace(config, num_stages=stages) for stages in (2, 1)]),
        mock.patch.object(autotune, "_equal", lambda *_: True),  # nothing is computed here
        mock.patch.object(autotune, "_on", lambda device: contextlib.nullcontext(torch.device("cpu"))),
        stubbed(),
    ):
        found = autotune.search(key, DEVICE, full=False)
    return found.config == replace(base, num_stages=1), found.us, found.analytic_us, ahead[0]


@on_stub
def test_search_compiles_ahead():
    """The kernel for each of three configurations, and the sum of partials, before the first is launched."""
    assert compiled(search_on_the_stub) == (True, 90.0, 100.0, 4)
