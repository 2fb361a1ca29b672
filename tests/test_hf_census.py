"""The census of Hugging Face models: what it counts, and that it finds what is wrong."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from bench import hf_census
from bench.census.tiny_models import tiny_batch, tiny_model
from bench.census_page import differences, page
from bench.hf_census import DEVICE, census, classes_of, compare
from triton_rmsnorm.patching import replacement


@pytest.fixture(scope="module")
def results():
    return {"models": [census("llama"), census("bert")], "classes": [classes_of("transformers.models.llama")]}


def test_what_is_counted(results):
    llama, bert = results["models"]
    assert (llama["stage"], bert["stage"]) == ("compared", "no norms")
    assert [(row["name"], row["count"], row["status"]) for row in llama["rows"]] == [("LlamaRMSNorm", 5, "replaced")]
    assert [(row["name"], row["count"], row["status"]) for row in llama["layers"]] == [("LlamaDecoderLayer", 2, "fused")]
    for dtype in ("torch.float32", "torch.bfloat16"):
        parts, _, in_fp64 = llama[dtype]
        assert 0 < parts <= 1 and in_fp64
    assert [(one["class"], one["status"], one["differs"]) for one in results["classes"][0]["classes"]] == [
        ("llama.LlamaRMSNorm", "replaced", "")
    ]
    assert not differences(results)


def test_the_page(results):
    text = page(json.loads(json.dumps(results)), "no time")
    assert "| model types | 2 |" in text
    assert "| layers fused in them | 2 |" in text
    assert "| **differences beyond rounding** | **none** |" in text
    assert "| `llama.LlamaRMSNorm` | `w · x_hat.to(x)` | replaced |" in text
    assert "1 more were built and have no norm to replace" in text


def test_a_wrong_norm_is_found(monkeypatch):
    """In bf16 the order of roundings is all that is wrong with it."""
    compute = replacement._compute

    def plain(module, norm, *tensors):
        return compute(module, replace(norm, semantics=replace(norm.semantics, x_hat=None)), *tensors)

    monkeypatch.setattr(replacement, "_compute", plain)
    llama = census("llama")
    assert "another output of" in llama["error"] and llama["differs"]
    package = classes_of("transformers.models.llama")
    assert package["classes"][0]["differs"] == "y, torch.bfloat16"
    found = differences({"models": [llama], "classes": [package]})
    assert len(found) == 2
    assert "**differences beyond rounding** | **2**" in page({"models": [llama], "classes": [package]}, "")


def test_a_wrong_gradient_is_found(monkeypatch):
    compute = replacement._compute

    def scaled(*args):
        y = compute(*args)
        if isinstance(y, torch.Tensor) and y.requires_grad:
            y.register_hook(lambda dy: 1.001 * dy)
        return y

    monkeypatch.setattr(replacement, "_compute", scaled)
    model = tiny_model("llama").eval().to(DEVICE)
    parts, name, _ = compare(model, tiny_batch(model), torch.float32)
    assert parts > 1 and name.startswith("gradient of")
    assert classes_of("transformers.models.llama")["classes"][0]["differs"].startswith("gradient 0")


def test_a_failure_of_patch_is_no_model_that_cannot_be_built(monkeypatch):
    monkeypatch.setattr(hf_census, "patch", lambda *_, **__: 1 / 0)
    assert differences({"models": [census("llama")], "classes": []}) == ["llama: ZeroDivisionError: division by zero"]


def test_unknown_types(capsys):
    with pytest.raises(SystemExit):
        hf_census.main(["--types", "lama"])
    assert "--types must be a model type of transformers, such as llama or mllama or llama4, got lama" in capsys.readouterr().err
