"""The host's time, and the driver that does nothing: launches of compiled kernels, on a machine without a GPU."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import host


def test_window_time(monkeypatch):
    now = itertools.count()
    calls = []
    monkeypatch.setattr(host, "WINDOWS", 8)
    assert host.window_time(lambda: calls.append(1), clock=lambda: next(now) * 1e-4) == pytest.approx(50)  # 2 calls in 100 µs
    assert len(calls) == 20 + 1 + 2 * 8


on_stub = pytest.mark.skipif(torch.cuda.is_available() or not shutil.which("cc"), reason="a stub of libcuda takes a C compiler and no GPU")


def run_compiled(code: str) -> str:
    """Runs code in a process of its own, in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return done.stdout


@on_stub
def test_host(tmp_path):
    code = (
        "from pathlib import Path; from bench import host; host.WINDOWS, host.RESULTS = 3, Path({!r}); host.main(['--profile', '--json'])"
    )
    shown = run_compiled(code.format(str(tmp_path)))
    lines = {line.split("│")[1].strip(): line.split("│")[2:5] for line in shown.splitlines() if line.startswith("│")}
    assert lines.keys() >= {"ours: RMSNorm", "ours: rms_norm", "F.layer_norm, computed on the CPU", "a Function that does nothing"}
    assert all(0 < float(figure) < 1e5 for line in lines.values() for figure in line)
    assert "launch.py" in shown and "tottime" in shown

    written = host.newest(tmp_path)
    assert written.name.startswith("host-stubbed-") and written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    result = json.loads(written.read_text())
    assert result["driver"].startswith("stubbed") and result["metadata"].keys() >= {"cpu", "torch", "triton", "commit", "date"}
    assert {name: [f"{us:.1f}" for us in times.values()] for name, times in result["us"].items()} == {
        name: [figure.strip() for figure in figures] for name, figures in lines.items()
    }


@on_stub
def test_launches_on_the_stub_are_counted():
    """One launch forward, two backward; a compiled kernel is launched again, and another one for another alignment."""
    shown = run_compiled(
        """
import torch
from bench.stub_driver import stubbed
from triton_rmsnorm import rms_norm
with stubbed() as stub:
    x, weight = torch.randn(8, 65)[:, :64], torch.randn(64, requires_grad=True)
    def launches(x):
        before = stub.launches
        y = rms_norm(x, (64,), weight)
        middle = stub.launches
        torch.autograd.grad(y, weight, y)
        return middle - before, stub.launches - middle
    print(launches(x), launches(x), launches(torch.randn(8 * 65 + 1)[1:].view(8, 65)[:, :64]))
"""
    )
    assert shown.split("\n")[0] == "(1, 2) (1, 2) (1, 2)"


@on_stub
def test_search_compiles_ahead_and_refuses_spills():
    """The search itself, with kernels that are compiled: of two that a made-up clock finds faster, the one that spills is not taken."""
    shown = run_compiled(
        """
import contextlib
from dataclasses import replace
from types import SimpleNamespace
import torch
from bench.stub_driver import DEVICE, stubbed
from triton_rmsnorm.runtime import autotune, table as measured
key, ticks, ahead = measured.Key("backward", 128, 2, 2, 2, 1), iter(range(100, 0, -10)), []
base = measured.analytic(key, DEVICE)
def time_cold(call, seconds):
    call()
    return [next(ticks)]
def compiled(step, pointers, original=autotune._compiled):
    kernel = original(step, pointers)
    ahead.append(type(kernel).__name__)
    return SimpleNamespace(n_spills=4 if step.options["num_warps"] == 2 else 0)
autotune.ELEMENTS, autotune.ROUNDS, autotune.time_cold, autotune._compiled = 1 << 12, 1, time_cold, compiled
autotune.neighbours = lambda config, *_: [replace(config, num_warps=warps) for warps in (4, 2)]
autotune._agree = lambda output, expected: True  # nothing is computed here
autotune._on = lambda device: contextlib.nullcontext(torch.device("cpu"))
with stubbed():
    found = autotune.search(key, DEVICE)
print(found.config == replace(base, num_warps=4), found.us, found.analytic_us, sorted(set(ahead)))
"""
    )
    assert shown == "True 70 80 ['CompiledKernel', 'FutureKernel']\n"
