"""The self-check passes, switches the interpreter on by itself, and fails when something is wrong."""

import sys

import pytest
import torch

import triton_rmsnorm
from triton_rmsnorm import __main__ as self_check


def test_switches_the_interpreter_on(monkeypatch, capsys):
    """Without a GPU the process starts itself again, because Triton reads the variable when it is imported. `.ci/run` runs the command."""

    def execve(program, arguments, environment):
        raise SystemExit((program, arguments[0], environment["TRITON_INTERPRET"]))

    monkeypatch.setattr(self_check.os, "execve", execve)
    monkeypatch.setattr(self_check.launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as replaced:
        self_check.main()
    assert replaced.value.code == (sys.executable, sys.executable, "1")
    assert "No GPU is found" in capsys.readouterr().out


@pytest.fixture
def one_problem(monkeypatch):
    monkeypatch.setattr(self_check, "PROBLEMS", [(torch.float32, torch.float32, 19, 100)])


def test_passes(one_problem, launches, capsys):
    assert self_check.main() == 0
    said = capsys.readouterr().out
    assert "All 1 passed." in said and all(module.__version__ in said for module in (triton_rmsnorm, torch))
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
