"""The training comparison: the same start and data for every run, our kernels in ours alone, and what it calls different.

Whatever happens to one provider, the others are measured and the file says what happened.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from bench import plot
from bench.records import ROOT
from bench.train import __main__ as command
from bench.train.job import PRESETS, batches, count_parameters, new_model, read_text
from bench.train.providers import BASELINE, CONTROL, PROVIDERS, QUICK, RECOMPUTED, control
from bench.train.report import picture
from bench.train.run import Run, agrees, attempt, judge, largest_difference, tolerance, train, what_fits

NORMS = 5  # of the tiny model
GIB = 2**30
SMALL = replace(PRESETS["tiny"], steps=3, batch=4, seq_len=32)
SHORT = ["--steps", "3", "--batch", "4", "--seq-len", "32"]


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


def out_of_memory(model):
    raise torch.OutOfMemoryError("Tried to allocate 1.00 GiB. More words.")


def broken(model):
    raise RuntimeError("broke\nin two lines")


def absent(model):
    import no_such_module

    return no_such_module.equip(model)


@pytest.mark.slow
def test_same_losses(tmp_path, capsys, launches):
    assert command.main([*SHORT, "--out", str(tmp_path)]) == 0

    counts = Counter(launched.step for launched in launches)
    assert counts == dict.fromkeys(("forward", "backward", "sum_partials"), 3 * NORMS)

    result = json.loads((tmp_path / "figures.json").read_text())
    assert tuple(result["runs"]) == QUICK == (BASELINE, CONTROL, "ours")
    for run in result["runs"].values():
        assert len(run["losses"]) == 3
        assert run["losses"][2] < run["losses"][0]
        apart = [abs(one - other) for one, other in zip(run["losses"], result["runs"][BASELINE]["losses"], strict=True)]
        assert run["largest_difference"] == max(apart)
        low, median, high = (run["step_seconds"][key] for key in ("low", "median", "high"))
        assert 0 < low <= median <= high and run["tokens_per_second"] == pytest.approx(4 * 32 / median)
        assert (run["peak_bytes"] is None) == (not torch.cuda.is_available())
    assert result["runs"]["ours"]["largest_difference"] <= result["tolerance"] < 1e-4
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().out
    for step, loss in enumerate(result["runs"]["ours"]["losses"]):
        assert f"{step:>6}" in printed and f"{loss:.5f}" in printed
    assert f"ours and {BASELINE}" in printed and "the same." in printed
    assert f"{1e3 * result['runs']['ours']['step_seconds']['median']:.1f}" in printed
    assert ("interpreter" in printed) == (not torch.cuda.is_available())


@pytest.mark.slow
def test_all_that_can_happen(monkeypatch, tmp_path, capsys):
    """And Liger, whether it is here or not, leaves the class of norms as it was."""
    from transformers.models.llama import modeling_llama

    norm = modeling_llama.LlamaRMSNorm
    for name in ("torch.compile", "torch.compile, ours", RECOMPUTED):
        monkeypatch.delitem(PROVIDERS, name)
    for name, provider in (("greedy", out_of_memory), ("broken", broken), ("absent", absent)):
        monkeypatch.setitem(PROVIDERS, name, provider)
    assert command.main(["--compare", *SHORT, "--out", str(tmp_path)]) == 0

    (path,) = tmp_path.glob("train-*.json")
    result = json.loads(path.read_text())
    assert result["metadata"].keys() >= {"gpu", "driver", "torch", "triton", "transformers", "commit", "date", "device"}
    runs = result["runs"]
    assert runs.pop("Liger (its norms)")["status"] in ("measured", "absent", "failed") and modeling_llama.LlamaRMSNorm is norm
    assert {name: run["status"] for name, run in runs.items()} == {
        **dict.fromkeys((BASELINE, CONTROL, "ours", "ours, residual fused"), "measured"),
        "greedy": "out of memory",
        "broken": "failed",
        "absent": "absent",
    }
    assert runs["greedy"]["note"] == "Tried to allocate 1.00 GiB" and runs["broken"]["note"] == "RuntimeError: broke"
    assert "no_such_module" in runs["absent"]["note"] and "--batch 2" in result["advice"]
    assert all(runs[name]["largest_difference"] <= result["tolerance"] < 1e-4 for name in ("ours", "ours, residual fused"))

    printed = capsys.readouterr()
    assert "absent: No module named" in printed.out and "out of memory" in printed.out and "--batch 2" in printed.out
    assert "ours: 100%" in printed.err

    path.with_suffix(".png").unlink()
    assert plot.main([str(path)]) == 0 and path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for run in runs.values():
        run["peak_bytes"] = 3 * GIB
    on_a_gpu = picture(result | {"interpreted": False})
    assert len(picture(result).axes) == 2 and [axes.get_xlabel() for axes in on_a_gpu.axes][1:3] == [
        "time of a step (ms): median and quartiles",
        "training step",
    ]
    assert {text.get_text() for text in on_a_gpu.axes[3].texts} == {"3.00"}


@pytest.fixture(scope="module")
def before():
    """Runs of the baseline and of the control."""
    return {name: attempt(name, SMALL, {}) for name in (BASELINE, CONTROL)}


@pytest.mark.parametrize(
    ("provider", "printed"),
    [
        (defective(scale_gradient), "TOO MUCH"),
        (defective(lambda y: y * 1.0001), "TOO MUCH"),
        (defective(lambda y: y * float("nan")), "nan, TOO MUCH"),
        (out_of_memory, "ours: out of memory: Tried to allocate 1.00 GiB\n"),
        (broken, "ours: failed: RuntimeError: broke\n"),
        (absent, "ours: absent: No module named"),
    ],
    ids=["dx", "y", "nan", "out of memory", "broken", "absent"],
)
def test_ours_has_to_train_the_same(provider, printed, before, capsys, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "ours", provider)
    runs = before | {"ours": attempt("ours", SMALL, before)}
    assert not judge(runs)
    assert printed in capsys.readouterr().out


@pytest.mark.parametrize("provider", [defective(lambda y: y * float("nan")), out_of_memory], ids=["nan", "out of memory"])
def test_a_baseline_that_fails_shows_nothing(provider, tmp_path, monkeypatch):
    for name in QUICK:
        monkeypatch.setitem(PROVIDERS, name, provider)
    assert command.main([*SHORT, "--out", str(tmp_path)]) == 1
    assert (tmp_path / "losses.png").exists() and (tmp_path / "figures.json").exists()


@pytest.mark.parametrize(
    ("status", "losses", "good"),
    [("measured", [1.5], True), ("absent", [], True), ("failed", [], False), ("measured", [float("nan")], False)],
)
def test_ours_compiled_may_not_fail(status, losses, good):
    """A compiled model rounds elsewhere, so its losses are shown, not judged."""
    runs = {name: Run(losses=[1.0]) for name in QUICK}
    assert judge(runs | {"torch.compile, ours": Run(status, losses=losses)}) == good


@pytest.mark.slow
def test_recomputed_norms_train_the_same(before, launches):
    """Bit for bit, with one more launch for each norm and step."""
    plain, recomputed = (attempt(name, SMALL, before) for name in ("ours", RECOMPUTED))
    assert recomputed.losses == plain.losses and len(plain.losses) == SMALL.steps
    counts = Counter(launched.step for launched in launches)
    assert counts == dict.fromkeys(("forward", "backward", "sum_partials"), 2 * 3 * NORMS) | {"output": 3 * NORMS}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["t5", "falcon_h1"])
def test_any_model_type(model, tmp_path, launches):
    """One with an encoder, a decoder and dropout, and one with gated norms."""
    assert command.main(["--model", model, "--steps", "2", "--batch", "2", "--seq-len", "32", "--out", str(tmp_path)]) == 0
    assert {launched.step for launched in launches} >= {"forward", "backward"}
    result = json.loads((tmp_path / "figures.json").read_text())
    assert result["model"]["type"] == model
    assert result["runs"]["ours"]["largest_difference"] <= result["tolerance"] < 1e-4


@pytest.mark.slow
def test_a_model_type_in_a_process_of_its_own(tmp_path):
    """As from a shell, where nothing has switched the interpreter on before."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command_line = [sys.executable, "-m", "bench.train", "--model", "olmo2", "--steps", "1", "--batch", "1", "--seq-len", "8"]
    done = subprocess.run([*command_line, "--out", tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("model", "words"), [("clip", "huggingface: failed: "), ("bert", "ours: failed: RuntimeError: patch found")])
def test_model_types_that_cannot_be_trained(model, words, tmp_path, capsys):
    """One that takes pictures, and one without an RMS norm."""
    assert command.main(["--model", model, "--steps", "2", "--out", str(tmp_path)]) == 1
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start(dtype):
    """Models, batches and what the control moves."""
    job = replace(PRESETS["tiny"], dtype=dtype, steps=2)
    first, second = new_model(job).state_dict(), new_model(job).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {tensor.dtype for tensor in first.values()} == {dtype}

    text = read_text()
    assert bytes(text.tolist()).decode().count(" the ") > 1000
    for one, other in zip(batches(job, text), batches(job, text), strict=True):
        assert torch.equal(one, other) and one.shape == (job.batch, job.seq_len)
    assert not torch.equal(next(batches(job, text, group=1)), next(batches(job, text)))

    moved = control(new_model(job)).state_dict()
    for name, tensor in first.items():
        up, down = (torch.nextafter(tensor, torch.full_like(tensor, towards)) for towards in (9.0, -9.0))
        assert torch.equal(moved[name], tensor) if tensor.dim() > 1 else ((moved[name] == up) | (moved[name] == down)).all(), name


def test_control_of_weights_that_are_used_in_bf16():
    norm = control(torch.nn.RMSNorm(64), torch.bfloat16)
    assert norm.weight.dtype == torch.float32 and set(norm.weight.tolist()) == {1 - 2**-8, 1 + 2**-7}


def test_checkpointing_changes_no_loss():
    def train_once(job):
        model, calls = new_model(job), []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        return [loss for loss, _ in train(model, batches(job, read_text()), job.learning_rate)], len(calls)

    (plain, once), (checkpointed, twice) = train_once(SMALL), train_once(replace(SMALL, checkpointing=True))
    assert plain == checkpointed and (once, twice) == (3, 6)


def test_differences():
    runs = {BASELINE: Run(losses=[1.0, 2.0]), CONTROL: Run(losses=[1.0, 2.125])}
    assert tolerance(runs) == 4 * 0.125
    near, far, nan = (Run(losses=[1.0, loss]) for loss in (2.5, 2.501, float("nan")))
    assert largest_difference(near, runs[BASELINE]) == 0.5
    assert Run(seconds=[9.0, 9.0, 1.0, 3.0]).step_seconds == (1.5, 2.0, 2.5)  # without the first ones
    assert [agrees(run, runs) for run in (near, far, nan, Run("absent"))] == [True, False, False, False]
    assert largest_difference(Run("absent"), runs[BASELINE]) is None
    assert tolerance(runs | {CONTROL: runs[BASELINE]}) == 4 * 2.0 * torch.finfo(torch.float32).eps
    assert tolerance(runs | {BASELINE: Run("out of memory")}) is None and not agrees(near, runs | {CONTROL: Run("failed")})


def test_what_fits():
    job, runs = PRESETS["1b"], {BASELINE: Run("out of memory")}
    assert 0.9e9 < count_parameters(job) < 1.1e9
    assert what_fits(job, runs).startswith("Out of memory: try --batch 2, or --checkpointing")
    assert what_fits(replace(job, batch=1, checkpointing=True), runs) == "Out of memory: try --seq-len 2048, or a smaller model."
    assert what_fits(job, {BASELINE: Run()}) == ""


@pytest.mark.parametrize(
    ("arguments", "compares"),
    [([], False), (["--recompute"], False), (["--preset", "1b"], True), (["--preset", "1b", "--no-compare"], False), (["--compare"], True)],
    ids=["tiny", "recompute", "1b", "no-compare", "compare"],
)
def test_when_all_are_compared(arguments, compares, tmp_path):
    assert command.parse([*arguments, "--out", str(tmp_path)]).compare == compares


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--batch", "x"],
        ["--seq-len", "1"],
        ["--dtype", "int8"],
        ["--preset", "1b", "--model", "llama"],
        ["--compare", "--model", "llama"],
        ["--model", "lama"],
        ["--seq-len", "999999"],
        ["--out", "/dev/null/folder"],
    ],
    ids=lambda arguments: "=".join(arguments[-2:]),
)
def test_bad_arguments(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(["--out", str(tmp_path), *arguments])
    assert exit.value.code == 2
    assert arguments[-2] in capsys.readouterr().err
