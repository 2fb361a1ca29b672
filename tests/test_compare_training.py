"""The comparison of providers in training: whatever happens to one of them, the others are measured and the file says what happened."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import compare_training, plot, train, training
from bench.compare_training import BASELINE, Run

SHORT = ["--compare", "--steps", "3", "--batch", "4", "--seq-len", "32"]
GIB = 2**30


def out_of_memory(model):
    raise torch.OutOfMemoryError("Tried to allocate 1.00 GiB. More words.")


def failing(model):
    raise RuntimeError("broke\nin two lines")


def lost(model):
    model.model.norm.register_forward_hook(lambda module, args, y: y * float("nan"))
    return model


@pytest.fixture
def providers(monkeypatch):
    """Sets the table of providers."""

    def set_providers(**table):
        table = {BASELINE: compare_training.eager, **{name.replace("_", " "): provider for name, provider in table.items()}}
        monkeypatch.setattr(compare_training, "PROVIDERS", table)

    return set_providers


def result_in(folder) -> dict:
    (path,) = folder.glob("train-*.json")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return json.loads(path.read_text())


def test_all_that_can_happen(providers, tmp_path, capsys, launches):
    providers(ours=compare_training.ours, fused_ours=compare_training.ours_fused, greedy=out_of_memory, broken=failing, absent=absent)
    assert train.main([*SHORT, "--out", str(tmp_path)]) == 0
    assert {recorded.kernel for recorded in launches} >= {"_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel"}

    result = result_in(tmp_path)
    assert result["metadata"].keys() >= {"gpu", "driver", "torch", "triton", "transformers", "commit", "date"}
    runs = result["runs"]
    assert {name: run["status"] for name, run in runs.items()} == {
        BASELINE: "measured",
        "ours": "measured",
        "fused ours": "measured",
        "greedy": "out of memory",
        "broken": "failed",
        "absent": "absent",
    }
    assert runs["greedy"]["note"] == "Tried to allocate 1.00 GiB" and runs["broken"]["note"] == "RuntimeError: broke"
    assert "no_such_module" in runs["absent"]["note"] and "--batch 2" in result["advice"]
    for name in (BASELINE, "ours", "fused ours"):
        run = runs[name]
        assert len(run["losses"]) == 3 and run["losses"][2] < run["losses"][0] and run["largest_difference"] < 1e-5
        low, median, high = (run["step_seconds"][key] for key in ("low", "median", "high"))
        assert 0 < low <= median <= high and run["tokens_per_second"] == pytest.approx(4 * 32 / median)

    printed = capsys.readouterr()
    (path,) = tmp_path.glob("train-*.json")
    path.with_suffix(".png").unlink()
    assert plot.main([str(path)]) == 0 and path.with_suffix(".png").exists()
    assert "absent: No module named" in printed.out and "out of memory" in printed.out and "--batch 2" in printed.out
    assert "ours: 100%" in printed.err


def absent(model):
    import no_such_module

    return no_such_module.equip(model)


def test_liger_is_listed(providers, tmp_path):
    """Whether it is here or not, the class of norms stays the one that it was."""
    from transformers.models.llama import modeling_llama

    before = modeling_llama.LlamaRMSNorm
    providers(liger=compare_training.liger)
    assert train.main([*SHORT, "--steps", "1", "--out", str(tmp_path)]) == 0
    assert result_in(tmp_path)["runs"]["liger"]["status"] in ("measured", "absent", "failed")
    assert modeling_llama.LlamaRMSNorm is before


@pytest.mark.parametrize("ours", [out_of_memory, failing, lost], ids=lambda provider: provider.__name__)
def test_ours_has_to_get_through(ours, providers, tmp_path):
    providers(ours=ours)
    assert train.main([*SHORT, "--out", str(tmp_path)]) == 1
    assert result_in(tmp_path)["runs"][BASELINE]["status"] == "measured"


def test_nothing_to_replace():
    with pytest.raises(RuntimeError, match="nothing to replace"):
        compare_training.ours(torch.nn.Linear(2, 2))


def test_every_provider_starts_from_the_same_model(providers):
    seen = []

    def see(model):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return model

    providers(one=see, other=see)
    job = replace(training.PRESETS["tiny"], steps=1, batch=1, seq_len=8)
    compare_training.compare(job, training.read_text(None))
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])


def test_checkpointing_changes_no_loss():
    job = replace(training.PRESETS["tiny"], steps=2, batch=2, seq_len=16)
    text = training.read_text(None)

    def train_once(job):
        model, calls = training.new_model(job), []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        return list(training.train(model, training.batches(job, text), job.learning_rate)), len(calls)

    (plain, once), (checkpointed, twice) = train_once(job), train_once(replace(job, checkpointing=True))
    assert plain == checkpointed and (once, twice) == (2, 4)


def test_what_fits():
    job = replace(training.PRESETS["1b"], batch=4, seq_len=4096)
    # 8 GiB stay, 24 GiB grow with the batch: of 24 GiB, 21.6 may be taken, so half of the batch fits.
    advice = compare_training.what_fits(job, 8 * GIB, 24 * GIB, 32 * GIB)
    assert advice.startswith("--batch 2 --seq-len 4096 should fit: about 20.0 of 24.0 GiB, of which 8.0") and "--checkpointing" in advice
    advice = compare_training.what_fits(replace(job, batch=1), 8 * GIB, 12 * GIB, 16 * GIB)
    assert advice.startswith("--batch 1 --seq-len 1024")
    assert "--checkpointing" not in compare_training.what_fits(replace(job, checkpointing=True), 8 * GIB, 24 * GIB, 32 * GIB)
    assert "only a smaller model" in compare_training.what_fits(job, 24 * GIB, 24 * GIB, 24 * GIB)
    # What was taken when the memory ran out says less than a step that got through, but never that nothing needs to be smaller.
    assert compare_training.what_fits(job, 8 * GIB, 80 * GIB, 70 * GIB).startswith("--batch 2 --seq-len 4096")


def test_advice_on_a_gpu(monkeypatch):
    job = replace(training.PRESETS["1b"], device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
    parameters = training.count_parameters(job)
    assert 0.9e9 < parameters < 1.1e9
    assert compare_training.advice(job, {BASELINE: Run("measured", peak_bytes=70 * GIB)}) == ""
    advice = compare_training.advice(
        job, {BASELINE: Run("out of memory", peak_bytes=79 * GIB), "ours": Run("measured", peak_bytes=75 * GIB)}
    )
    fixed = 4 * 2 * parameters / GIB  # parameters, gradients and two moments, two bytes each
    estimate = fixed + (79 - fixed) / 2
    assert advice.startswith(f"--batch 2 --seq-len 4096 should fit: about {estimate:.1f} of 80.0 GiB, of which {fixed:.1f}")


@pytest.mark.parametrize(
    ("arguments", "compares"),
    [([], False), (["--preset", "1b"], True), (["--preset", "1b", "--no-compare"], False), (["--compare"], True)],
    ids=["tiny", "1b", "no-compare", "compare"],
)
def test_when_all_are_compared(arguments, compares):
    assert train.parse(arguments).compare == compares


def test_differences():
    baseline = Run("measured", losses=[1.0, 2.0])
    assert compare_training.difference(Run("measured", losses=[1.5, 2.25]), baseline) == 0.5
    assert compare_training.difference(Run("absent"), baseline) is None
    nan = compare_training.difference(Run("measured", losses=[1.0, float("nan")]), baseline)
    assert nan != nan
