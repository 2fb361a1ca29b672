"""The self-check passes, switches the interpreter on by itself, and fails when something is wrong."""

import os
import subprocess
import sys

import pytest
import torch

import triton_rmsnorm
from triton_rmsnorm import __main__ as self_check


@pytest.mark.slow
def test_switches_the_interpreter_on():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "triton_rmsnorm"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All 9 passed." in done.stdout
    assert ("No GPU is found" in done.stdout) == (not torch.cuda.is_available())
    for module in (triton_rmsnorm, torch):
        assert module.__version__ in done.stdout


@pytest.fixture
def one_problem(monkeypatch):
    monkeypatch.setattr(self_check, "PROBLEMS", [(torch.float32, torch.float32, 19, 100)])


def test_passes(one_problem, launches, capsys):
    assert self_check.main() == 0
    assert "All 1 passed." in capsys.readouterr().out
    assert [launched.step for launched in launches] == ["forward", "backward", "sum_partials"]


@pytest.mark.parametrize("factor", [1.00001, float("nan")])
@pytest.mark.parametrize("wrong", ["y", "dx", "dw"])
def test_fails(wrong, factor, one_problem, monkeypatch, capsys):
    """One element that is off by more than the budget is enough."""
    judge = self_check.testing.parts_of_budget

    def spoiled(results, expected):
        result = {"y": results.y, "dx": results.dx, "dw": results.dweight}[wrong].view(-1)
        result[result.abs().argmax()] *= factor
        return judge(results, expected)

    monkeypatch.setattr(self_check.testing, "parts_of_budget", spoiled)
    assert self_check.main() == 1
    assert "FAILED: 1 of 1." in capsys.readouterr().out


def test_fails_where_no_kernel_can_run(monkeypatch, capsys):
    monkeypatch.setattr(self_check.launch, "runs_on", lambda _: False)
    assert self_check.main() == 1
    assert "FAILED" in capsys.readouterr().out
