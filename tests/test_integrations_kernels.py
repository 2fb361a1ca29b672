"""kernel_config and kernel_mapping with transformers and kernels of versions that fit, in which `.ci/run` runs this file."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("triton_rmsnorm.integrations.transformers", exc_type=ImportError)

from kernels import LayerRepository, Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping
from transformers import KernelConfig
from transformers.integrations.hub_kernels import get_kernel_mapping_transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from bench.census.compare import compare
from bench.census.tiny_models import tiny_batch, tiny_model
from triton_rmsnorm import kernel_config, kernel_mapping
from triton_rmsnorm.integrations.layers import LAYERS, Repository
from triton_rmsnorm.patching.recognition import agree
from triton_rmsnorm.patching.replacement import is_replacement

MODES = {"training": Mode.TRAINING, "inference": Mode.INFERENCE}
FAMILIES = (
    "llama",
    "qwen3",
    "gemma3_text",
    "olmo2",
    "gpt_oss",
    "mixtral",
    "deepseek_v3",
    "nemotron_h",
    "qwen3_next",
    "falcon_h1",
    "qwen3_5_text",  # its norms are "RMSNormZeroCentered" and "RMSNormGated"
)


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"asks a hub: {args} {kwargs}")

    monkeypatch.setattr(LayerRepository, "load", refuse)


@pytest.fixture
def load(tmp_path):
    """A function that saves a model and loads it again with the arguments of from_pretrained."""

    def load(model: nn.Module, **arguments) -> nn.Module:
        model.save_pretrained(tmp_path)
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        return type(model).from_pretrained(tmp_path, dtype=torch.float32, **eager, **arguments)

    return load


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "norm" in type(module).__name__.lower()]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, load):
    """Every norm is replaced, and logits and gradients are what they were."""
    model = tiny_model(family).eval()
    replaced = load(model, use_kernels=True, kernel_config=kernel_config())
    assert norms(replaced) and all(is_replacement(type(norm)) for norm in norms(replaced))
    batch = tiny_batch(model)
    for dtype in (torch.float32, torch.bfloat16):
        parts, worst, in_fp64 = compare(copy.deepcopy(model).to(dtype), batch, dtype, copy.deepcopy(replaced).to(dtype))
        assert parts <= 1 and in_fp64, worst


def run(model: nn.Module, launches: list) -> int:
    """How many kernels a forward launches."""
    launches.clear()
    model(input_ids=torch.arange(8).view(1, 8), use_cache=False)
    return len(launches)


def test_stays(load, launches):
    """In training and evaluation, in a copy, saved and loaded, and compiled, with no graph break."""
    model = load(tiny_model("deepseek_v3"), use_kernels=True, kernel_config=kernel_config())
    count = len(norms(model))
    assert run(model, launches) == count
    assert run(model.train(), launches) == count
    assert run(copy.deepcopy(model), launches) == count
    assert run(pickle.loads(pickle.dumps(model)), launches) == count
    assert run(model.eval(), launches) == count
    assert run(load(model, use_kernels=True, kernel_config=kernel_config()), launches) == count
    assert run(load(model), launches) == 0
    assert run(torch.compile(model, backend="eager", fullgraph=True), launches) == count


def test_one_configuration_for_two_models(load, launches):
    config = pickle.loads(pickle.dumps(kernel_config()))
    assert isinstance(config, KernelConfig) and json.dumps(config)  # as training arguments are written
    for _ in range(2):
        model = load(tiny_model("olmo2"), use_kernels=True, kernel_config=config)
        assert run(model, launches) == len(norms(model))
    assert config.kernel_mapping == {}


class Doubled(nn.Module):
    def forward(self, input):
        return 2 * nn.functional.silu(input)


def test_other_mappings_stay(load):
    def activation(**arguments) -> nn.Module:
        return load(tiny_model("llama"), use_kernels=True, kernel_config=kernel_config(**arguments)).model.layers[0].mlp.act_fn

    x = torch.randn(8)
    assert activation()(x).equal(nn.functional.silu(x))
    with use_kernel_mapping({"SiLU": {"cpu": Repository(Doubled)}}):
        assert activation()(x).equal(2 * nn.functional.silu(x))
        assert activation(inherit_mapping=True)(x).equal(2 * nn.functional.silu(x))


@pytest.mark.parametrize("device", ["cuda", "rocm", "cpu"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_instead_of_the_hub(device, mode, compiled, monkeypatch):
    """Transformers' own mapping has layers for the same names."""
    monkeypatch.setattr("kernels.layer.repos._find_capability", lambda: 90)
    norm = LlamaRMSNorm(64)
    with use_kernel_mapping(get_kernel_mapping_transformers()), use_kernel_mapping(kernel_mapping()):
        kernelize(norm, mode=mode | Mode.TORCH_COMPILE if compiled else mode, device=device, use_fallback=False)
    assert norm.forward.__func__ is LAYERS["RMSNorm"].forward


@use_kernel_forward_from_hub("RMSNorm")
class NoNorm(nn.Module):
    def forward(self, hidden_states):
        return 3 * hidden_states


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_kernelize(compiled, launches):
    """Each class gets its own rounding, and what is no norm its own forward."""
    model = nn.Sequential(Olmo2RMSNorm(64), LlamaRMSNorm(64), NoNorm()).bfloat16()
    for norm in model[:2]:
        nn.init.normal_(norm.weight)
    x = torch.randn(128, 64, dtype=torch.bfloat16)
    expected = [module(x) for module in model]
    llama = LlamaRMSNorm.forward(model[0], x)
    with use_kernel_mapping(kernel_mapping()):
        kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
    assert not any(is_replacement(type(module)) for module in model)
    actual = [torch.compile(module, backend="eager", fullgraph=True)(x) if compiled else module(x) for module in model]
    assert all(map(agree, actual, expected)) and len(launches) == 2
    assert not agree(actual[0], llama)
    assert actual[2].equal(3 * x)


@pytest.mark.parametrize("family", ["qwen3_5_text", "olmo_hybrid"])
def test_kernelize_other_names(family, launches):
    """Those named "RMSNormGated" and "RMSNormZeroCentered" run ours as well."""
    model = tiny_model(family).eval()
    named = [module for module in norms(model) if type(module).kernel_layer_name in LAYERS]
    with use_kernel_mapping(kernel_mapping(), inherit_mapping=False):
        kernelize(model, mode=Mode.INFERENCE, device="cpu")
    assert run(model, launches) == len(named) > 3
