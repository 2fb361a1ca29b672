"""Patching: models compute what they did, state and hooks stay, and what is replaced can be saved, compiled, wrapped and undone."""

import copy
import gc
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from norms import Layer, classes, norm_of, original_of, rstd
from torch import nn
from torch.nn import functional as F

import triton_rmsnorm
from triton_rmsnorm import patch, patched, unpatch
from triton_rmsnorm.patching import Status
from triton_rmsnorm.patching.recognition import agree
from triton_rmsnorm.patching.replacement import is_replacement

pytest.importorskip("transformers")
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from bench.census.compare import compare
from bench.census.tiny_models import model_types, tiny_batch, tiny_model

F32, B16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def llama(device):
    return tiny_model("llama").eval().to(device)


def replaced(module: nn.Module) -> list[str]:
    return [name for name, one in module.named_modules() if is_replacement(type(one))]


def batch_of(model: nn.Module) -> dict:
    return {name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in tiny_batch(model).items()}


def run(model: nn.Module) -> torch.Tensor:
    """Logits; after it parameters have gradients."""
    output = model(**batch_of(model))
    output.loss.backward()
    return output.logits.detach()


# What the norms of model types compute, and the norms that are fused with residual adds.
MODELS = {
    "llama": ({"w · x_hat.to(x)"}, {"post_attention_layernorm"}),
    "gemma2": ({"(1 + w) · x_hat"}, {"pre_feedforward_layernorm"}),
    "olmo2": ({"w · x_hat"}, set()),
    "t5": ({"w · x_hat.to(w if half)"}, set()),
    "nanochat": ({"x_hat"}, {"post_attention_layernorm"}),
    "deepseek_v4": ({"x · rstd.to(x)"}, set()),  # its other norm rounds before the weight in 5.17, not in 5.23
    "muse_spark_text": ({"(1 + w).to(w) · x_hat", "w · x_hat", "x_hat"}, set()),
    "mamba2": ({"w · x_hat.to(x)", "w · x_hat.to(x), silu gate before"}, set()),
    "qwen3_next": ({"(1 + w) · x_hat", "w · x_hat.to(x), silu gate after"}, {"post_attention_layernorm"}),
    "falcon_mamba": ({"w · x_hat.to(x)", "x_hat"}, set()),  # x_hat: its weight is a buffer, unused, of another length
}
# Fields of configurations. One layer has all norms of a model; two of the first show that layers are counted.
FIELDS = {
    "llama": {"num_hidden_layers": 2},
    "qwen3_next": {"num_hidden_layers": 1, "layer_types": ["linear_attention"]},
    "deepseek_v4": {"num_hidden_layers": 1, "layer_types": None},
    "mamba2": {"num_hidden_layers": 1, "chunk_size": 16},
}


# In bf16, where roundings show; the census compares every model type in both.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [*((model_type, B16) for model_type in MODELS), ("llama", F32)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_compute_what_they_did(model_type, dtype, device, launches):
    """Each norm, all outputs and all gradients; the kernels really run; tensors stay, and other models."""
    if model_type not in model_types():
        pytest.skip("a later transformers has it")
    model = tiny_model(model_type, **FIELDS.get(model_type, {"num_hidden_layers": 1})).eval().to(device, dtype)
    fused = copy.deepcopy(model)
    before = {name: id(tensor) for name, tensor in fused.state_dict(keep_vars=True).items()}
    report = patch(fused, fuse_residual=True)
    semantics, layers = MODELS[model_type]
    assert {row.semantics for row in report.rows if row.status == "replaced"} >= semantics
    assert report.replaced == len(replaced(fused))
    assert {row.semantics.removeprefix("residual add in ") for row in report.rows if row.status == "fused"} == layers
    assert report.fused == len(layers) * model.config.num_hidden_layers
    assert {name: id(tensor) for name, tensor in fused.state_dict(keep_vars=True).items()} == before
    assert all(map(torch.equal, fused.state_dict().values(), model.state_dict().values()))
    assert not replaced(model)
    parts, name, in_fp64 = compare(model, tiny_batch(model), dtype, copy.deepcopy(fused))
    assert parts <= 1, name
    assert in_fp64
    calls = []
    for name in replaced(fused):
        fused.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    launches.clear()
    fused(**batch_of(fused))
    assert len(launches) == len(calls) > 0


@pytest.mark.slow
def test_save_pretrained_writes_the_same_bytes(llama, tmp_path):
    llama.save_pretrained(tmp_path / "before")
    patch(llama)
    llama.save_pretrained(tmp_path / "after")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "after").iterdir())
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name
    loaded = type(llama).from_pretrained(tmp_path / "after")
    assert not replaced(loaded)
    assert all(torch.equal(loaded.state_dict()[name], tensor.cpu()) for name, tensor in llama.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("first", ["patch", "peft"])
def test_peft(first, llama):
    peft = pytest.importorskip("peft")
    expected = run(llama)
    names = ["input_layernorm", "post_attention_layernorm"]
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=names, task_type="CAUSAL_LM")
    if first == "patch":
        patch(llama, fuse_residual=True)
        model = peft.get_peft_model(llama, config)
    else:
        model = peft.get_peft_model(llama, config)
        patch(model, fuse_residual=True)
    assert len(replaced(model)) == 9  # those that are trained are copies beside the originals
    torch.testing.assert_close(run(model.train()), expected, rtol=1e-4, atol=1e-5)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert sum("layernorm.modules_to_save" in name for name in gradients) == 4
    assert all(gradient is not None and gradient.any() for name, gradient in gradients.items() if "layernorm" in name)


@pytest.mark.parametrize(
    "module",
    [LlamaRMSNorm(64), Gemma3nRMSNorm(64, with_scale=False), nn.RMSNorm((4, 16)), Qwen3NextRMSNormGated(64)],
    ids=lambda module: type(module).__name__,
)
def test_compile(module, device):
    """One graph, with our operator in it."""
    module = module.to(device)
    patch(module)
    inputs = len(inspect.signature(module.forward).parameters)
    x = torch.randn(inputs, 3, *(module.weight.shape if hasattr(module, "weight") else (64,)), device=device, requires_grad=True)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assert agree(compiled(*x).detach(), module(*x).detach())
    assert len(graphs) == 1
    assert any(str(node.target).startswith("triton_rmsnorm.") for node in graphs[0].graph.nodes)


@pytest.mark.slow
def test_fsdp_applied_later(llama, group_of_one):
    from torch.distributed.fsdp import fully_shard

    patch(llama)
    expected = run(llama)
    llama.zero_grad()
    for layer in (*llama.model.layers, llama.model.norm, llama):
        fully_shard(layer, mesh=group_of_one)
    torch.testing.assert_close(run(llama), expected, rtol=1e-4, atol=1e-5)
    assert llama.model.norm.weight.grad is not None
    with pytest.raises(RuntimeError, match="has become a FSDPTritonLlamaRMSNorm"):
        unpatch(llama)


def test_initialization_finds_the_name(device):
    """transformers initializes what has RMSNorm in its class's name."""
    model = tiny_model("gemma").to(device)
    patch(model)
    assert all("RMSNorm" in type(model.get_submodule(name)).__name__ for name in replaced(model))
    norm = model.model.norm
    nn.init.normal_(norm.weight)
    model._init_weights(norm)
    assert torch.equal(norm.weight, torch.zeros_like(norm.weight))  # which is Gemma's own rule


def test_the_argument_keeps_its_name(device):
    norm = LlamaRMSNorm(64).to(device)
    signature = inspect.signature(norm.forward)
    patch(norm)
    assert inspect.signature(norm.forward) == signature
    x = torch.randn(3, 64, device=device)
    assert torch.equal(norm(hidden_states=x), norm(x))
    for arguments in ((), (x, x)):
        with pytest.raises(TypeError):
            norm(*arguments)


CALLS = {
    "fp32": (torch.randn(3, 64), F32),
    "bf16": (torch.randn(3, 64).to(B16), F32),
    "fp16 weight": (torch.randn(3, 64), F16),
    "fp64": (torch.randn(3, 64).double(), F32),
    "fp64 weight": (torch.randn(3, 64), torch.float64),
    "real": (torch.randn(3, 64, dtype=torch.complex64).real, F32),
    "int": (torch.randint(9, (3, 64)), F32),
    "broadcast": (torch.randn(3, 1), F32),
}


@pytest.mark.parametrize(("x", "weight"), CALLS.values(), ids=CALLS)
def test_calls_beyond_the_proof_run_the_original(x, weight, device, launches):
    norm, x = LlamaRMSNorm(64).to(device, weight), x.to(device)
    expected = norm(x)
    patch(norm)
    actual = norm(x)
    assert actual.dtype == expected.dtype
    assert agree(actual.float(), expected.float())
    assert bool(launches) == (x.dtype in (F32, B16) and x.shape[-1] == 64 and weight != torch.float64)


def gated(self, hidden_states, gate=None):
    x = hidden_states.float() if gate is None else hidden_states.float() * F.silu(gate.float())
    x = x.unflatten(-1, (-1, self.group_size))
    return self.weight * (x * rstd(x, self.eps)).flatten(-2).to(hidden_states.dtype)


def test_a_gated_norm_with_and_without_gate(device, launches):
    norm = norm_of(gated, weight=nn.Parameter(torch.randn(64)), group_size=16).to(device)
    patch(norm)
    twin = original_of(norm)
    x, gate = torch.randn(2, 3, 64, device=device)
    assert agree(norm(x, gate).detach(), twin(x, gate).detach())
    assert agree(norm(x, gate=gate).detach(), twin(x, gate).detach())
    assert len(launches) == 2
    for arguments in ({}, {"gate": None}, {"gate": gate[:1]}, {"gate": gate[:, :1]}):  # a gate may be broadcast
        assert torch.equal(norm(x, **arguments), twin(x, **arguments)) and torch.equal(norm(x, *arguments.values()), twin(x, **arguments))
    assert torch.equal(norm(hidden_states=x), twin(x))
    assert len(launches) == 2
    with pytest.raises(TypeError):
        norm(x, gate, gate)


def test_patched_restores_after_an_exception():
    """What was patched before stays so."""
    model = nn.Sequential(Layer(), Layer())
    patch(model[0].norm)
    before = classes(model)
    with pytest.raises(KeyError), patched(model, fuse_residual=True) as report:
        assert (report.replaced, report.fused) == (1, 2)
        assert type(model[0]) is type(model[1]) is not Layer
        raise KeyError
    assert classes(model) == before


@pytest.mark.parametrize("make", [Layer, lambda: LlamaRMSNorm(8)], ids=["layer", "norm"])
def test_patched_restores_what_it_replaced_and_no_more(make):
    """Also where a model that is itself a layer or a norm was patched before in another way."""
    model = make()
    patch(model, fuse_residual=True)
    before = classes(model)
    with patched(model, recompute=True):
        assert classes(model) != before
    assert classes(model) == before


def test_our_own_modules_are_no_candidates():
    assert patch(nn.Sequential(triton_rmsnorm.RMSNorm(8), triton_rmsnorm.RMSNormGated(8))).rows == ()


def test_replacements_of_one_class_and_proof_are_one_class():
    one, other, weightless = Gemma3nRMSNorm(8), Gemma3nRMSNorm(16), Gemma3nRMSNorm(8, with_scale=False)
    patch(nn.ModuleList([one, other, weightless]))
    assert type(one) is type(other)
    assert type(one) is not type(weightless)
    assert isinstance(one, Gemma3nRMSNorm)


def test_a_class_that_is_gone_is_collected():
    class LocalRMSNorm(LlamaRMSNorm):
        pass

    norm = LocalRMSNorm(8)
    patch(norm)
    names = {LocalRMSNorm.__name__, type(norm).__name__}
    del norm, LocalRMSNorm
    gc.collect()
    assert not names & {cls.__name__ for cls in LlamaRMSNorm.__subclasses__()}


class OtherRMSNorm(nn.Module):
    """In the input's dtype: nothing that we compute."""

    def __init__(self, dim=8):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), 1e-6

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


def test_strict_replaces_nothing_or_all(llama):
    llama.extra = OtherRMSNorm()
    with pytest.raises(RuntimeError, match=r"OtherRMSNorm .* left alone: in float32 it computes w · x_hat, but for") as raised:
        patch(llama, strict=True)
    assert "LlamaRMSNorm" in str(raised.value)
    assert not replaced(llama)
    llama.extra = nn.ModuleList([nn.LayerNorm(8), Doubled(8)])  # neither is an RMS norm
    assert patch(llama, strict=True).replaced == 5


class Doubled(LlamaRMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def test_the_report_is_a_table(llama):
    llama.extra = OtherRMSNorm()
    llama.model.layers[1].input_layernorm = llama.model.layers[0].input_layernorm  # which counts once
    head, rule, *lines = str(patch(llama)).splitlines()
    assert head == "class         semantics        count  outcome"
    assert set(rule) == {"-", " "}
    reason = "in float32 it computes w · x_hat, but for torch.bfloat16 input and torch.bfloat16 weight it rounds in no known order"
    assert lines == [
        "LlamaRMSNorm  w · x_hat.to(x)  4      replaced",
        f"OtherRMSNorm  -                1      left alone: {reason}",
    ]
    assert str(patch(nn.Sequential(nn.LayerNorm(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8)))) == "no RMS norm found"
    assert Status.LEFT_ALONE == "left alone" == f"{Status.LEFT_ALONE}" == str(Status.LEFT_ALONE)


# --- classes and model types ---


def test_a_class_is_patched_for_present_and_future_instances():
    class LocalRMSNorm(LlamaRMSNorm):
        pass

    class Derived(LocalRMSNorm):
        pass

    present, derived = LocalRMSNorm(8), Derived(8)
    signature = inspect.signature(LocalRMSNorm)
    report = patch(LocalRMSNorm)
    assert inspect.signature(LocalRMSNorm) == signature
    future = LocalRMSNorm(8, eps=1e-5)
    assert [(row.count, row.status) for row in report.rows] == [(1, "replaced"), (0, "to come")]
    with torch.device("meta"):
        assert all(is_replacement(type(norm)) for norm in (present, future, LocalRMSNorm(8)))
    assert type(derived) is type(Derived(8)) is Derived
    assert patch(LocalRMSNorm).replaced == 0
    unpatch(LocalRMSNorm)
    assert type(present) is type(future) is type(LocalRMSNorm(8)) is LocalRMSNorm


def test_patched_class_restores_what_was_built_meanwhile():
    before = LlamaRMSNorm(8)
    patch(before)
    with pytest.raises(KeyError), patched(LlamaRMSNorm):
        inside = LlamaRMSNorm(8)
        assert is_replacement(type(inside))
        raise KeyError
    assert type(inside) is type(LlamaRMSNorm(8)) is LlamaRMSNorm
    assert is_replacement(type(before))


def test_a_class_whose_constructor_asks_for_more_is_proved_when_it_is_built():
    class ConfiguredRMSNorm(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(config["size"])), 1e-6

        forward = LlamaRMSNorm.forward
        variance_epsilon = property(lambda self: self.eps)

    (row,) = patch(ConfiguredRMSNorm).rows
    assert (row.status, row.reason) == ("to come", "proved when one is built")
    assert is_replacement(type(ConfiguredRMSNorm({"size": 8})))
    unpatch(ConfiguredRMSNorm)
    assert type(ConfiguredRMSNorm({"size": 8})) is ConfiguredRMSNorm


@pytest.mark.parametrize("cls", [nn.Linear, nn.Sequential, type("Other", (OtherRMSNorm,), {})], ids=lambda cls: cls.__name__)
def test_a_class_that_is_no_norm_is_left_alone(cls):
    constructor = cls.__init__
    (row,) = patch(cls).rows
    assert row.status == "left alone"
    assert cls.__init__ is constructor


def test_a_model_type(llama, tmp_path):
    """Its models are patched when they are built, before they are loaded."""
    constructor = LlamaRMSNorm.__init__
    llama.save_pretrained(tmp_path)
    with patched("llama") as report:
        model = type(llama).from_pretrained(tmp_path)
        assert len(replaced(model)) == len(replaced(llama)) == 5
        assert {row.cls for row in report.rows} == {LlamaRMSNorm}
        assert not replaced(tiny_model("gemma"))
    assert not replaced(model) and not replaced(llama)
    assert LlamaRMSNorm.__init__ is constructor


@pytest.mark.parametrize("model_type", ["gemma3n", "t5", "qwen3_next", "voxtral_realtime"])
def test_model_types_with_more_in_their_files(model_type):
    with patched(model_type) as report:
        assert any(row.status == "to come" and row.semantics for row in report.rows), report


@pytest.mark.parametrize("function", [patch, unpatch])
def test_what_is_no_target(function):
    for bad in (3, None, object(), [LlamaRMSNorm], int, torch.randn(3)):
        with pytest.raises(TypeError, match=r"target must be a torch.nn.Module, a class of modules or a model type of transformers, got"):
            function(bad)
    with pytest.raises(ValueError, match=r"target must be .*'llama'.*got 'lama'"):
        function("lama")


@pytest.mark.parametrize("option", ["fuse_residual", "recompute"])
@pytest.mark.parametrize("target", [LlamaRMSNorm, "llama"], ids=["class", "model type"])
def test_options_that_need_a_model(option, target):
    with pytest.raises(TypeError, match=rf"must be a torch.nn.Module for {option}, got"):
        patch(target, **{option: True})


@pytest.mark.slow
def test_another_process_without_transformers(tmp_path):
    """The package does not import it, and says so where it would need it. What was saved there is loaded as it was, patched."""
    layer = Layer()
    patch(layer, fuse_residual=True)
    torch.save(layer, tmp_path / "layer.pt")
    command = [sys.executable, Path(__file__).parent / "scripts" / "without_transformers.py", tmp_path / "layer.pt"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "2 16 replaced before fused before",
        "1",
        "target 'llama' is taken for a model type of transformers, which cannot be imported",
    ]
