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
    monkeypatch.setattr(self_check, "DTYPES", [])
    monkeypatch.setattr(self_check, "SIZES", [(19, 100)])


def test_passes(one_problem, launches, capsys):
    assert self_check.main() == 0
    assert "All 1 passed." in capsys.readouterr().out
    assert [launched.step for launched in launches] == ["forward", "backward", "sum_partials"]


@pytest.mark.parametrize("factor", [1.00001, float("nan")])
@pytest.mark.parametrize("wrong", ["y", "dx", "dw"])
def test_fails(wrong, factor, one_problem, monkeypatch, capsys):
    """One element that is off by more than the budget is enough."""

    class Defect(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, where):
            ctx.where = where
            return spoil(x) if where == "y" else x.clone()

        @staticmethod
        def backward(ctx, dy):
            return (dy if ctx.where == "y" else spoil(dy)), None

    def spoil(x):
        x = x.clone()
        x.view(-1)[x.abs().argmax()] *= factor
        return x

    def defective(x, normalized_shape, weight, eps):
        x, weight = (Defect.apply(t, wrong) if name == wrong else t for name, t in (("dx", x), ("dw", weight)))
        y = rms_norm(x, normalized_shape, weight, eps)
        return Defect.apply(y, wrong) if wrong == "y" else y

    rms_norm = triton_rmsnorm.rms_norm
    monkeypatch.setattr(triton_rmsnorm, "rms_norm", defective)
    assert self_check.main() == 1
    assert "FAILED: 1 of 1." in capsys.readouterr().out


def test_fails_where_no_kernel_can_run(monkeypatch, capsys):
    monkeypatch.setattr(self_check.launch, "runs_on", lambda _: False)
    assert self_check.main() == 1
    assert "FAILED" in capsys.readouterr().out
