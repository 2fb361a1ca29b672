"""Residual adds taken into the norms that follow them: which layers, that nothing else changes, and what is left alone."""

import contextlib
import copy
import io
import pickle
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from bench.census.tiny_models import tiny_batch, tiny_model
from triton_rmsnorm import patch, patched, unpatch
from triton_rmsnorm.patching import trial
from triton_rmsnorm.patching.fusion import Fusion, fused
from triton_rmsnorm.patching.replacement import add_and_normalize

SIZE = 64


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(SIZE) + 0.5)
        self.eps = 1e-6

    def forward(self, x):
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps)).to(x.dtype)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.after = Norm(), Norm()
        self.attention, self.mlp = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)


class Layer(Base):
    def forward(self, hidden, scale=1.0):
        residual = hidden
        hidden = self.attention(self.before(hidden))
        hidden = residual + hidden * scale
        residual = hidden
        hidden = self.after(hidden)
        return residual + self.mlp(hidden)


class Nested(Base):
    def forward(self, hidden):
        hidden = hidden + self.attention(self.before(hidden))
        return hidden + self.mlp(self.after(hidden))


class Chained(Base):
    def forward(self, hidden):
        hidden = hidden + self.attention(hidden)
        hidden = hidden + self.before(hidden)
        return hidden, self.after(hidden)


class Branches(Base):
    def forward(self, hidden, other=None):
        total = hidden + self.attention(hidden)
        if other is not None:
            total = other + total
            return self.before(total)
        try:
            kept = total
            total = kept + hidden
            hidden = self.after(total)
        finally:
            total = None
        return self.mlp(hidden)


class Renamed(Base):
    """The norm is of another tensor than the sum, in spite of its name."""

    def forward(self, hidden):
        residual = hidden
        hidden = residual + self.attention(hidden)
        hidden = residual
        return self.after(hidden)


class Between(Base):
    def forward(self, hidden):
        hidden = hidden + self.attention(hidden)
        hidden.mul_(2)
        return self.after(hidden)


class InPlace(Base):
    def forward(self, hidden):
        hidden = hidden.clone()
        hidden += self.attention(hidden)
        return self.after(hidden)


class Annotated(Base):
    def forward(self, hidden):
        hidden: torch.Tensor = hidden + self.attention(hidden)
        return self.after(hidden)


class OneOfTwo(Base):
    def forward(self, hidden):
        hidden, scale = hidden + self.attention(hidden), 2
        return scale * self.after(hidden)


class Later(Base):
    """Something happens before the norm in its statement."""

    def forward(self, hidden):
        hidden = hidden + self.attention(hidden)
        return self.mlp(hidden.mul_(2)) + self.after(hidden)


class Perhaps(Base):
    def forward(self, hidden):
        hidden = hidden + self.attention(hidden)
        return hidden if self.training else self.after(hidden)


class Child(Layer):
    def forward(self, hidden):
        hidden = hidden + self.attention(hidden)
        hidden = self.after(hidden)
        return super().forward(hidden)


class LikeLlama(GradientCheckpointingLayer, Base):
    def forward(self, hidden):
        residual = hidden
        hidden = residual + self.attention(self.before(hidden))
        residual = hidden
        return residual + self.mlp(self.after(hidden))


class Undefined(Base):
    def forward(self, hidden):
        hidden = hidden + self.attention(hidden)
        return self.after(hidden).reshape(7, 11, 13)


def results(model, *inputs, **named):
    """Outputs and gradients, of a loss that weights all outputs at random."""
    torch.manual_seed(0)
    model.zero_grad()
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = model(*inputs, **named)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((y * torch.randn_like(y)).sum() for y in outputs).backward()
    return [y.detach() for y in outputs], [x.grad for x in (*inputs, *model.parameters())]


def assert_same(actual, expected, tolerance=1e-5):
    """In float32, other orders of sums of tens of terms differ by tens of units of 1e-7, relative to the largest element."""
    for one, other in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype and one.shape == other.shape
            assert (one - other).abs().max() <= tolerance * other.abs().max()


def fused_rows(report):
    return {row.cls.__name__: (row.count, row.semantics.removeprefix("residual add in ")) for row in report.rows if row.status == "fused"}


def reason(layer):
    report = patch(layer, fuse_residual=True)
    assert report.fused == 0 and type(layer).__module__ == __name__
    return next(row.reason for row in report.rows if row.cls is type(layer))


@pytest.mark.parametrize(
    "layer, names",
    [(Layer, "after"), (Nested, "after"), (Chained, "after, before"), (Branches, "after, before"), (LikeLlama, "after")],
)
def test_fused(layer, names, device, launches):
    model = layer().to(device)
    x = torch.randn(2, 3, SIZE, device=device)
    expected = results(model, x)
    keys, types = list(model.state_dict()), [type(module) for module in model.modules()]
    report = patch(model, fuse_residual=True)
    assert fused_rows(report) == {layer.__name__: (1, names)} and report.fused == 1
    assert type(model).__name__ == layer.__name__ and isinstance(model, layer) and list(model.state_dict()) == keys
    launches.clear()
    assert_same(results(model, x), expected)
    assert any(one.pointers["RESIDUAL"] is not None for one in launches if one.step == "forward")
    unpatch(model)
    assert [type(module) for module in model.modules()] == types
    assert_same(results(model, x), expected, 0)


def test_what_is_launched(device, launches):
    """The sum costs no launch of its own, forward or backward."""
    model = Layer().to(device)
    patch(model)
    x = torch.randn(2, 3, SIZE, device=device)
    results(model, x)
    separate = Counter(one.step for one in launches)
    patch(model, fuse_residual=True)
    launches.clear()
    results(model, x)
    assert Counter(one.step for one in launches) == separate
    forward = [one.pointers["RESIDUAL"] is not None for one in launches if one.step == "forward"]
    assert forward == [False, True]


@pytest.mark.parametrize(
    "layer, words",
    [
        (Renamed, ""),
        (Between, "no sum goes straight"),
        (InPlace, "the sum before after is written as `x += ...`, which changes a tensor that may have other names"),
        (Annotated, "the sum before after is an assignment with an annotation"),
        (OneOfTwo, "the sum before after is one of several values of an assignment"),
        (Later, "no sum goes straight"),
        (Perhaps, "no sum goes straight"),
        (Child, "enclosing scope: __class__"),
        (Undefined, "does not run on a trial: RuntimeError: shape '[7, 11, 13]'"),
    ],
)
def test_left_alone(layer, words):
    model = layer()
    report = patch(model, fuse_residual=True)
    assert report.fused == 0 and type(model) is layer and report.replaced == 2
    rows = [row for row in report.rows if row.cls is layer]
    assert [words in row.reason and row.status == "left alone" for row in rows] == [True] * bool(words)
    patch(layer(), strict=True, fuse_residual=True)  # it is no norm that was not replaced


def test_closure():
    factor = torch.ones(())

    class Closure(Base):
        def forward(self, hidden):
            hidden = hidden + factor * self.attention(hidden)
            return self.after(hidden)

    assert "enclosing scope: factor" in reason(Closure())


def test_no_source():
    space = {"Base": Base, "__name__": __name__}
    text = "class Silent(Base):\n def forward(self, x):\n  x = x + self.mlp(x)\n  return self.after(x)"
    exec(text, space)
    assert "source of its forward is not there" in reason(space["Silent"]())


def test_other_source(tmp_path):
    """A file that was edited after it was imported."""
    file = tmp_path / "edited_layer.py"
    text = "class Edited(Base):\n    def forward(self, x):\n        x = x + self.mlp(x)\n        return self.after(x)\n"
    file.write_text(text)
    space = {"Base": Base, "__name__": __name__}
    exec(compile(text, file, "exec"), space)
    file.write_text(text.replace("self.mlp(x)", "2 * self.mlp(x)"))
    assert "not what its source says" in reason(space["Edited"]())


def test_wrapped_forward():
    class Wrapped(Layer):
        pass

    original = Layer.forward
    Wrapped.forward = lambda self, hidden: original(self, 2 * hidden)
    Wrapped.forward.__wrapped__ = original
    assert "wrapped around its forward" in reason(Wrapped())

    hooked = Layer()
    hooked.forward = partial(Layer.forward, hooked)
    assert "its forward was replaced: patch the model before that" in reason(hooked)


def test_decorated():
    torch.manual_seed(0)

    class Decorated(Base):
        @torch.no_grad()
        def forward(self, hidden, *, scale=2.0):
            hidden = hidden + scale * self.attention(hidden)
            return self.after(hidden)

    model, x = Decorated(), torch.randn(2, SIZE, requires_grad=True)
    expected = model(x)
    assert patch(model, fuse_residual=True).fused == 1
    assert not model(x).requires_grad and torch.allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    assert model.forward.__wrapped__.__kwdefaults__ == {"scale": 2.0}


def of_a_method(function):
    assert function.__qualname__.endswith(".Decorated.forward") or function.__qualname__ == "Decorated.forward"
    return function


def test_decorated_as_a_method():
    """Some decorators, such as one of transformers, ask for the name of the class."""

    class Decorated(Base):
        @of_a_method
        def forward(self, hidden):
            hidden = hidden + self.attention(hidden)
            return self.after(hidden)

    assert patch(Decorated(), fuse_residual=True).fused == 1


def function_of_a_layer(self, hidden):
    hidden = hidden + self.attention(hidden)
    return self.after(hidden)


def test_a_function_for_a_method():
    class Assigned(Base):
        forward = function_of_a_layer

    assert patch(Assigned(), fuse_residual=True).fused == 1


@pytest.mark.parametrize(
    "defect",
    [
        lambda x, residual, norm: (norm(x), x + residual),
        lambda x, residual, norm: (norm(x + residual), residual),
        lambda x, residual, norm: (norm(x + residual), (x + residual).detach()),
        lambda x, residual, norm: (norm((x + residual).detach()), x + residual),
        lambda x, residual, norm: (norm(x + residual) * 1.001, x + residual),
        lambda x, residual, norm: (norm(x + residual), (x + residual).double()),
    ],
    ids=["norm of x", "no sum", "sum without gradient", "norm without gradient", "scaled", "dtype"],
)
def test_trial_finds_defects(defect, monkeypatch):
    monkeypatch.setattr(trial, "add_and_normalize", defect)
    assert "computes something else on a trial" in reason(Layer())


def test_trial_finds_failures(monkeypatch):
    monkeypatch.setattr(trial, "add_and_normalize", lambda x, residual, norm: 1 / 0)
    assert "fails on a trial: ZeroDivisionError" in reason(Layer())


def test_trial_leaves_no_trace():
    """Nothing of the model, of the random state or of grad mode changes; weights may be on no device."""
    model = Layer()
    called = []
    model.register_forward_hook(lambda *_: called.append(1))
    model.mlp.register_forward_hook(lambda *_: called.append(2))
    patch(model)
    before = {name: (id(t), t._version, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = torch.get_rng_state()
    with torch.no_grad():
        assert patch(model, fuse_residual=True).fused == 1
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state) and not called
    for name, t in model.state_dict(keep_vars=True).items():
        assert (id(t), t._version) == before[name][:2] and torch.equal(t, before[name][2]) and t.grad is None
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes

    with torch.device("meta"):
        assert patch(Layer(), fuse_residual=True).fused == 1


def test_large_layers_are_small_in_a_trial():
    with torch.device("meta"):
        layer = Layer()
        layer.mlp = nn.Linear(1 << 20, 1 << 20)
        assert patch(layer, fuse_residual=True).fused == 1
        layer = Layer()
        layer.own = nn.Parameter(torch.empty(1 << 13, 1 << 13))
        assert "too large" in reason(layer)


def test_hooks_of_all_modules():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "hook for all modules" in reason(Layer())
    finally:
        handle.remove()


CASES = {  # layers of that many are fused
    "llama": {"LlamaDecoderLayer": (2, "post_attention_layernorm")},
    "mixtral": {"MixtralDecoderLayer": (2, "post_attention_layernorm")},
    "gemma2": {"Gemma2DecoderLayer": (2, "pre_feedforward_layernorm")},
    "lfm2": {"Lfm2DecoderLayer": (2, "ffn_norm")},
    "olmo2": {},
    "t5": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", CASES)
def test_models(model_type, device):
    """The original is compared in fp64: gradients are sums of terms that cancel, and of these fp32 is as far off as we are."""
    model = tiny_model(model_type).eval().to(device)
    batch = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in tiny_batch(model).items()}

    def run(model):
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        return {"logits": output.logits.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}

    original, exact = run(model), run(copy.deepcopy(model).double())
    original = {name: t.clone() for name, t in original.items()}
    with patched(model, fuse_residual=True) as report:
        assert fused_rows(report) == CASES[model_type]
        assert report.fused == sum(count for count, _ in CASES[model_type].values())
        ours = run(model)
    assert ours.keys() == original.keys()
    for name, truth in exact.items():
        errors = [(one[name].double() - truth).norm() for one in (ours, original)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(torch.float32).eps * truth.norm(), name
    assert report.fused or any("no sum goes straight" in row.reason for row in report.rows)
    assert not any(type(module).__module__.startswith("triton_rmsnorm") for module in model.modules())


def test_hidden_states(device):
    """transformers collects outputs by the classes of layers."""
    model = tiny_model("llama").eval().to(device)
    ids = tiny_batch(model)["input_ids"].to(device)
    expected = model(ids, output_hidden_states=True, output_attentions=True)
    patch(model, fuse_residual=True)
    actual = model(ids, output_hidden_states=True, output_attentions=True)
    for one, other in zip((*actual.hidden_states, *actual.attentions), (*expected.hidden_states, *expected.attentions), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_half_precision(device):
    """The forward does not change by a bit, because the sum is rounded before it is normalized, as it was.

    In the backward, the two gradients that meet at the sum are added before they are rounded, not after. They and the gradients of weights
    differ by a few units in the last place.
    """
    model = Layer().to(device, torch.bfloat16)
    patch(model)
    x = torch.randn(64, SIZE, device=device).bfloat16()
    separate = results(model, x)
    patch(model, fuse_residual=True)
    together = results(model, x)
    assert_same((together[0], []), (separate[0], []), 0)
    assert_same(together, separate, 4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64,) * 2])
def test_other_dtypes(dtypes, device, launches):
    """Where the sum has another dtype or none that is proved, it is added and normalized as before."""
    norm = Norm().to(device)
    x, residual = (torch.randn(4, SIZE, device=device).to(dtype) for dtype in dtypes)
    expected = norm(x + residual)
    patch(norm)
    launches.clear()
    y, total = add_and_normalize(x, residual, norm)
    assert y.dtype == expected.dtype and torch.allclose(y, expected, rtol=1e-5) and torch.equal(total, x + residual)
    assert not any(one.pointers["RESIDUAL"] is not None for one in launches if one.step == "forward")


def test_shapes_and_numbers(device):
    norm = Norm().to(device)
    patch(norm)
    x = torch.randn(4, SIZE, device=device)
    for residual in (torch.randn(SIZE, device=device), 1.0):
        y, total = add_and_normalize(x, residual, norm)
        assert torch.equal(total, x + residual) and torch.equal(y, norm(x + residual))


def test_hooks_on_the_norm(device):
    model = Layer().to(device)
    patch(model, fuse_residual=True)
    x = torch.randn(2, SIZE, device=device)
    expected = model(x)
    seen = []
    hooks = (
        lambda: model.after.register_forward_hook(lambda module, args, y: seen.append((args[0], y))),
        lambda: model.after.register_forward_pre_hook(lambda module, args: seen.append(args)),
        lambda: model.after.register_full_backward_hook(lambda module, dx, dy: seen.append(dx)),
        lambda: nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(y) if module is model.after else None),
    )
    for register in hooks:
        seen.clear()
        handle = register()
        x.requires_grad_()
        y = model(x)
        y.sum().backward()
        handle.remove()
        assert len(seen) == 1 and torch.allclose(y, expected, rtol=1e-5, atol=1e-6)
    handle = model.after.register_forward_hook(lambda module, args, y: 2 * y)
    assert not torch.allclose(model(x), expected)
    handle.remove()


def test_norm_replaced_since(device):
    """The layer does what its norm is by now."""
    model = Layer().to(device)
    x = torch.randn(2, SIZE, device=device)
    expected = model(x)
    patch(model, fuse_residual=True)
    unpatch(model.after)
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    model.after = nn.Identity()
    once = Layer()
    once.load_state_dict(model.state_dict(), strict=False)
    once.after = nn.Identity()
    assert torch.allclose(model(x), once.to(device)(x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, device, launches):
    model = tiny_model("llama").to(device)
    ids = tiny_batch(model)["input_ids"].to(device)

    def run():
        model.zero_grad()
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        return [output.logits.detach()], [p.grad.clone() for p in model.parameters()]

    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    expected = run()
    assert patch(model, fuse_residual=True).fused == 2
    launches.clear()
    assert_same(run(), expected, 1e-4)
    sums = [one for one in launches if one.step == "forward" and one.pointers["RESIDUAL"] is not None]
    assert len(sums) == 4  # two layers, and both again in the backward
    unpatch(model)
    assert_same(run(), expected, 0)


@pytest.mark.slow
def test_compile(device):
    for model, shape in ((Layer(), None), (tiny_model("llama").model.layers[0], (1, 8, 16))):
        model = model.to(device)
        patch(model, fuse_residual=True)
        x = torch.randn(1, 8, SIZE, device=device)
        named = {"position_embeddings": (torch.ones(shape, device=device), torch.zeros(shape, device=device))} if shape else {}
        expected = results(model, x, **named)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_same(results(compiled, x, **named), expected)

        sums = []

        def backend(graph, inputs):
            nodes = [node for node in graph.graph.nodes if str(node.target).startswith("triton_rmsnorm.")]
            sums.append([node.args[2] is not None for node in nodes])  # noqa: B023
            return graph

        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(model, backend=backend, fullgraph=True)(x, **named)
        assert sums == [[False, True]]


def test_copies(device, tmp_path):
    model = Layer().to(device)
    patch(model, fuse_residual=True)
    x = torch.randn(2, SIZE, device=device)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for one in copies:
        assert type(one) is type(model) and torch.equal(one(x), expected)
        unpatch(one)
        assert type(one) is Layer


def test_loaded_where_the_source_is_another():
    """`fused` is what unpickling calls."""
    with pytest.raises(RuntimeError, match=r"in Between\.forward no sum goes straight into after"):
        fused(Between, Fusion(("after",)))


def test_exception():
    model = nn.Sequential(Layer(), Layer())
    types = [type(module) for module in model.modules()]
    with contextlib.suppress(KeyError), patched(model, fuse_residual=True) as report:
        assert report.fused == 2
        assert type(model[0]) is type(model[1]) is not Layer
        raise KeyError
    assert [type(module) for module in model.modules()] == types


def test_twice():
    model = Layer()
    assert patch(model).fused == 0
    assert type(model) is Layer
    assert patch(model, fuse_residual=True).fused == 1
    again = patch(model, fuse_residual=True)
    assert again.fused == 0 and again.replaced == 0
    assert {row.status for row in again.rows} == {"replaced before", "fused before"}
    assert "fused before" in str(again)
    with patched(model, fuse_residual=True):
        pass
    assert type(model) is not Layer
    unpatch(Layer)
    assert type(model) is Layer and type(model.after) is not Norm


def test_bad_target():
    for target in (Norm, "llama"):
        with pytest.raises(TypeError, match=r"must be a torch.nn.Module for fuse_residual, got"):
            patch(target, fuse_residual=True)


@pytest.mark.slow
def test_peft(device):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama").eval().to(device)
    ids = tiny_batch(model)["input_ids"].to(device)
    expected = model(ids).logits
    assert patch(model, fuse_residual=True).fused == 2
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["post_attention_layernorm"])
    wrapped = peft.get_peft_model(model, config)
    assert torch.allclose(wrapped(ids).logits, expected, rtol=1e-4, atol=1e-5)
    wrapped.train()
    wrapped(ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    assert sum("post_attention_layernorm" in name for name in gradients) == 2
