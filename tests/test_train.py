"""The training comparison: the same start and data for every run, our kernels in the one called ours, and what it calls different."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from bench import train

SHORT = ["--steps", "3", "--batch", "4", "--seq-len", "32"]
NORMS = 5  # of the tiny model


def defective(change):
    """A provider: Hugging Face's norms, with `change` applied to what they return."""

    def provider(model):
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.register_forward_hook(lambda module, args, y: change(y))
        return model

    return provider


def scale_gradient(y):
    if y.requires_grad:
        y.register_hook(lambda gradient: 1.01 * gradient)
    return y


def test_same_losses(tmp_path, capsys, launches):
    assert train.main([*SHORT, "--out", str(tmp_path)]) == 0

    counts = Counter(launched.kernel for launched in launches)
    assert counts == dict.fromkeys(("_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel", "_sum_partials_kernel"), 3 * NORMS)

    result = json.loads((tmp_path / "figures.json").read_text())
    assert list(result["runs"]) == ["huggingface", "control", "ours"]
    for run in result["runs"].values():
        assert len(run["losses"]) == 3
        assert run["losses"][2] < run["losses"][0]
        assert run["tokens_per_second"] == pytest.approx(4 * 32 / run["step_seconds"])
        assert (run["peak_bytes"] is None) == (not torch.cuda.is_available())
    assert result["runs"]["ours"]["largest_difference"] <= result["tolerance"] < 1e-4
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().out
    for step, loss in enumerate(result["runs"]["ours"]["losses"]):
        assert f"{step:>6}" in printed and f"{loss:.5f}" in printed
    assert "ours and huggingface" in printed and "the same." in printed
    assert ("interpreter" in printed) == (not torch.cuda.is_available())


@pytest.mark.parametrize("model", ["t5", "falcon_h1"])
def test_any_model_type(model, tmp_path, launches):
    """One with an encoder, a decoder and dropout, and one with gated norms."""
    assert train.main(["--model", model, "--steps", "2", "--batch", "2", "--seq-len", "32", "--out", str(tmp_path)]) == 0
    assert {launched.kernel for launched in launches} >= {"_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel"}
    result = json.loads((tmp_path / "figures.json").read_text())
    assert result["model"]["type"] == model
    assert result["runs"]["ours"]["largest_difference"] <= result["tolerance"] < 1e-4


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("lama", "a model type of transformers, such as llama"),
        ("clip", "one that is trained on text"),
        ("bert", "one with RMS norms"),
    ],
)
def test_model_types_that_cannot_be_trained(model, words, capsys):
    with pytest.raises(SystemExit) as exit:
        train.main(["--model", model])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert f"--model must be {words}" in error and model in error


@pytest.mark.parametrize("change", [scale_gradient, lambda y: y * 1.0001, lambda y: y * float("nan")], ids=["dx", "y", "nan"])
def test_different_losses(change, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(train.PROVIDERS, "ours", defective(change))
    assert train.main([*SHORT, "--out", str(tmp_path)]) == 1
    assert "TOO MUCH" in capsys.readouterr().out


def test_nothing_but_nan(tmp_path, capsys, monkeypatch):
    for name in train.PROVIDERS:
        monkeypatch.setitem(train.PROVIDERS, name, defective(lambda y: y * float("nan")))
    assert train.main([*SHORT, "--out", str(tmp_path)]) == 1
    assert "nan, TOO MUCH" in capsys.readouterr().out


def test_nothing_to_replace():
    with pytest.raises(RuntimeError, match="no norm to replace"):
        train.ours(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start(dtype):
    job = replace(train.PRESETS["tiny"], dtype=dtype, steps=2)
    first, second = train.new_model(job).state_dict(), train.new_model(job).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {tensor.dtype for tensor in first.values()} == {dtype}

    text = train.read_text(None)
    for one, other in zip(train.batches(job, text), train.batches(job, text), strict=True):
        assert torch.equal(one, other) and one.shape == (job.batch, job.seq_len)

    moved = train.control(train.new_model(job)).state_dict()
    for name, tensor in first.items():
        up, down = (torch.nextafter(tensor, torch.full_like(tensor, towards)) for towards in (9.0, -9.0))
        assert torch.equal(moved[name], tensor) if tensor.dim() > 1 else ((moved[name] == up) | (moved[name] == down)).all(), name


def test_control_of_weights_that_are_used_in_bf16():
    norm = train.control(torch.nn.RMSNorm(64), torch.bfloat16)
    assert norm.weight.dtype == torch.float32 and set(norm.weight.tolist()) == {1 - 2**-8, 1 + 2**-7}


def test_text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"abc" * 100)
    job = replace(train.PRESETS["tiny"], seq_len=300, steps=1)
    assert bytes(next(train.batches(job, train.read_text(path)))[0].tolist()) == b"abc" * 100
    assert bytes(train.read_text(None).tolist()).decode().count(" the ") > 1000


def test_out_of_memory(tmp_path, capsys, monkeypatch):
    def checked_batches(job, text):
        if job.tokens > limit:
            raise torch.OutOfMemoryError("Tried to allocate 1.00 GiB. More words.")
        return batches(job, text)

    batches, limit = train.batches, 70
    monkeypatch.setattr(train, "batches", checked_batches)
    assert train.main([*SHORT, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "Tried to allocate 1.00 GiB." in printed and "This fits: --batch 2 --seq-len 32" in printed
    limit = 0
    assert train.main([*SHORT, "--out", str(tmp_path)]) == 1
    assert "Not even one" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--batch", "x"],
        ["--seq-len", "1"],
        ["--dtype", "int8"],
        ["--device", "abacus"],
        ["--device", "meta"],
        ["--preset", "1b", "--model", "llama"],
        ["--text", "missing"],
        ["--text", __file__, "--seq-len", "999999"],
    ],
    ids=lambda arguments: "=".join(arguments[-2:]),
)
def test_bad_arguments(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        train.main([*arguments, "--out", str(tmp_path)])
    assert exit.value.code == 2
    assert arguments[-2] in capsys.readouterr().err


def test_runs_as_a_program(tmp_path):
    """It decides by itself whether Triton interprets, which must be before Triton is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.train", *SHORT, "--dtype", "bfloat16", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ours: 100%" in done.stderr  # the progress bar
