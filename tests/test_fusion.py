"""Residual adds taken into the norms that follow them: which layers, that nothing else changes, and what is left alone."""

import functools
import inspect
from collections import Counter

import pytest
import torch
from norms import COLUMNS, Norm
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from bench.census.tiny_models import tiny_batch, tiny_model
from triton_rmsnorm import patch, patched, unpatch
from triton_rmsnorm.patching import trial
from triton_rmsnorm.patching.fusion import Fusion, fused
from triton_rmsnorm.patching.replacement import add_and_normalize


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.after = Norm(), Norm()
        self.attention, self.mlp = nn.Linear(COLUMNS, COLUMNS), nn.Linear(COLUMNS, COLUMNS)


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


class LikeLlama(GradientCheckpointingLayer, Base):
    def forward(self, hidden):
        residual = hidden
        hidden = residual + self.attention(self.before(hidden))
        residual = hidden
        return residual + self.mlp(self.after(hidden))


def of_a_method(function):
    """Some decorators, such as one of transformers, ask for the name of the class."""
    assert function.__qualname__.endswith("Decorated.forward")
    return function


class Decorated(Base):
    @of_a_method
    def forward(self, hidden):
        hidden = hidden + self.attention(hidden)
        return self.after(hidden)


def function_of_a_layer(self, hidden):
    hidden = hidden + self.attention(hidden)
    return self.after(hidden)


class Assigned(Base):
    forward = function_of_a_layer


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


def reason(layer):
    report = patch(layer, fuse_residual=True)
    assert report.fused == 0 and type(layer).__module__ == __name__
    return next(row.reason for row in report.rows if row.cls is type(layer))


@pytest.mark.parametrize(
    "layer, names",
    [
        (Layer, "after"),
        (Nested, "after"),
        (Chained, "after, before"),
        (Branches, "after, before"),
        (LikeLlama, "after"),
        (Decorated, "after"),
        (Assigned, "after"),
    ],
)
def test_fused(layer, names, device, launches):
    """The sum costs no launch of its own, forward or backward."""
    model = layer().to(device)
    x = torch.randn(2, 3, COLUMNS, device=device)
    expected = results(model, x)
    keys, types = list(model.state_dict()), [type(module) for module in model.modules()]
    patch(model)
    results(model, x)
    separate = Counter(one.step for one in launches)
    report = patch(model, fuse_residual=True)
    (row,) = [row for row in report.rows if row.status == "fused"]
    assert (row.cls, row.count, row.semantics) == (layer, 1, f"residual add in {names}") and report.fused == 1
    assert type(model).__name__ == layer.__name__ and isinstance(model, layer) and list(model.state_dict()) == keys
    launches.clear()
    assert_same(results(model, x), expected)
    assert Counter(one.step for one in launches) == separate
    assert any(one.pointers["RESIDUAL"] is not None for one in launches if one.step == "forward")
    unpatch(model)
    assert [type(module) for module in model.modules()] == types
    assert_same(results(model, x), expected, 0)


ADD = "x = x + self.attention(x)"
LEFT_ALONE = [
    (["total = x + self.attention(x)", "total = x", "return self.after(total)"], ""),  # another tensor than the sum, in spite of its name
    ([ADD, "x.mul_(2)", "return self.after(x)"], "no sum goes straight"),
    ([ADD, "return self.mlp(x.mul_(2)) + self.after(x)"], "no sum goes straight"),  # something comes before the norm in its statement
    ([ADD, "return x if self.training else self.after(x)"], "no sum goes straight"),
    (
        ["x = x.clone()", "x += self.attention(x)", "return self.after(x)"],
        "the sum before after is written as `x += ...`, which changes a tensor that may have other names",
    ),
    (["x: torch.Tensor = x + self.attention(x)", "return self.after(x)"], "the sum before after is an assignment with an annotation"),
    (
        ["x, scale = x + self.attention(x), 2", "return scale * self.after(x)"],
        "the sum before after is one of several values of an assignment",
    ),
    ([ADD, "x = self.after(x)", "return super().forward(x)"], "enclosing scope: __class__"),
    ([ADD, "y = self.after(x)", "x.register_hook(torch.neg)", "return x + y"], "computes something else on a trial"),
    ([ADD, "return self.after(x) * (2 if type(self).__module__ == __name__ else 1)"], "computes something else on a trial"),
    ([ADD, "return self.after(x).reshape(7, 11, 13)"], "does not run on a trial: RuntimeError: shape '[7, 11, 13]'"),
]


@pytest.fixture
def layer_of(tmp_path):
    """A function that makes a class of layers, in a file, whose forward has the given statements."""

    def layer_of(*statements: str) -> type:
        lines = ["class OfAFile(Base):", "    def forward(self, x):", *(f"        {statement}" for statement in statements)]
        file = tmp_path / "layer.py"
        file.write_text("\n".join(lines))
        space = {"Base": Base, "torch": torch, "__name__": __name__}
        exec(compile(file.read_text(), file, "exec"), space)
        return space["OfAFile"]

    return layer_of


@pytest.mark.parametrize(("statements", "words"), LEFT_ALONE)
def test_left_alone(statements, words, layer_of):
    layer = layer_of(*statements)
    model = layer()
    report = patch(model, fuse_residual=True)
    assert report.fused == 0 and type(model) is layer and report.replaced == 2
    rows = [row for row in report.rows if row.cls is layer]
    assert [words in row.reason and row.status == "left alone" for row in rows] == [True] * bool(words)
    patch(layer(), strict=True, fuse_residual=True)  # it is no norm that was not replaced


def test_the_source_is_gone_or_was_edited(layer_of, tmp_path):
    layer = layer_of(ADD, "return self.after(x)")
    file = tmp_path / "layer.py"
    text = file.read_text()
    file.unlink()
    assert "source of its forward is not there" in reason(layer())
    file.write_text(text.replace("self.attention(x)", "2 * self.attention(x)"))
    assert "not what its source says" in reason(layer())


def test_wrapped_forward():
    """Wrappers stay as they are, with what they are bound to, and do not stay around a forward that replaces the original's later."""
    factor, x = 2.0, torch.randn(2, COLUMNS)

    def decorator(function):
        constant = factor
        return functools.wraps(function)(lambda self, hidden: constant * function(self, hidden))

    class Wrapped(Base):
        @decorator
        def forward(self, hidden):
            hidden = hidden + self.attention(hidden)
            return self.after(hidden)

    factor, model = 3.0, Wrapped()
    expected = results(model, x)
    assert patch(model, fuse_residual=True).fused == 1
    assert_same(results(model, x), expected)
    Wrapped.forward = Layer.forward
    replaced = results(model, x)
    unpatch(model)
    assert_same(replaced, results(model, x))

    functions = [Layer.forward]
    Wrapped.forward = functools.wraps(Layer.forward)(lambda self, hidden: functions[0](self, 2 * hidden))
    assert "wrapped around its forward that cannot be followed" in reason(model)


class Calling(Norm):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_a_norm_whose_class_has_its_own_call():
    layer = Decorated()
    layer.after = Calling()
    assert reason(layer) == "a call of its norm does more than the norm's forward"


def test_decorated():
    torch.manual_seed(0)

    class Decorated(Base):
        @torch.no_grad()
        def forward(self, hidden, *, scale=2.0):
            hidden = hidden + scale * self.attention(hidden)
            return self.after(hidden)

    model, x = Decorated(), torch.randn(2, COLUMNS, requires_grad=True)
    expected = model(x)
    assert patch(model, fuse_residual=True).fused == 1
    assert not model(x).requires_grad and torch.allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    assert inspect.unwrap(model.forward).__kwdefaults__ == {"scale": 2.0}


DEFECTS = {
    "norm of x": lambda x, residual, norm: (norm(x), x + residual),
    "no sum": lambda x, residual, norm: (norm(x + residual), residual),
    "sum without gradient": lambda x, residual, norm: (norm(x + residual), (x + residual).detach()),
    "norm without gradient": lambda x, residual, norm: (norm((x + residual).detach()), x + residual),
    "scaled": lambda x, residual, norm: (norm(x + residual) * 1.001, x + residual),
    "dtype": lambda x, residual, norm: (norm(x + residual), (x + residual).double()),
    "error": lambda x, residual, norm: 1 / 0,
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_trial_finds_defects(defect, monkeypatch):
    monkeypatch.setattr(trial, "add_and_normalize", DEFECTS[defect])
    words = "fails on a trial: ZeroDivisionError" if defect == "error" else "computes something else on a trial"
    assert words in reason(Layer())


def test_proofs_and_trials_leave_no_trace():
    """Nothing of the model, of the random state or of grad mode changes; weights may be on no device."""
    model, called = Layer(), []
    for module in (model, model.mlp, model.after):
        module.register_forward_pre_hook(lambda *_: called.append(1))
        module.register_forward_hook(lambda *_: called.append(1))
        module.register_full_backward_hook(lambda *_: called.append(1))
    model.after.weight.grad = torch.randn(COLUMNS)
    before = {name: (id(t), t._version, t.grad, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = torch.get_rng_state()
    with torch.no_grad():
        assert patch(model, fuse_residual=True).fused == 1
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state) and not called
    for name, t in model.state_dict(keep_vars=True).items():
        assert (id(t), t._version, t.grad) == before[name][:3] and torch.equal(t, before[name][3])
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
    x = torch.randn(64, COLUMNS, device=device).bfloat16()
    separate = results(model, x)
    patch(model, fuse_residual=True)
    together = results(model, x)
    assert_same((together[0], []), (separate[0], []), 0)
    assert_same(together, separate, 4 * torch.finfo(torch.bfloat16).eps)


OPERANDS = {
    "bf16 residual": (torch.randn(4, COLUMNS), torch.randn(4, COLUMNS).bfloat16()),
    "fp32 residual": (torch.randn(4, COLUMNS).bfloat16(), torch.randn(4, COLUMNS)),
    "fp64": torch.randn(2, 4, COLUMNS).double(),
    "broadcast": (torch.randn(4, COLUMNS), torch.randn(COLUMNS)),
    "number": (torch.randn(4, COLUMNS), 1.0),
    "transposed": (torch.randn(4, COLUMNS), torch.randn(COLUMNS, 4).T),
}


@pytest.mark.parametrize(("x", "residual"), OPERANDS.values(), ids=OPERANDS)
def test_other_operands(x, residual, device, launches):
    """Where the sum has another dtype or shape than they, or none that is proved, it is added and normalized as before."""
    norm, x = Norm().to(device), x.to(device)
    residual = residual.to(device) if isinstance(residual, torch.Tensor) else residual
    expected = norm(x + residual)
    patch(norm)
    y, total = add_and_normalize(x, residual, norm)
    assert y.dtype == expected.dtype and torch.allclose(y, expected, rtol=1e-5) and torch.equal(total, x + residual)
    assert not any(one.pointers["RESIDUAL"] is not None for one in launches if one.step == "forward")


def test_hooks_on_the_norm(device):
    model = Layer().to(device)
    patch(model, fuse_residual=True)
    x = torch.randn(2, COLUMNS, device=device)
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
    x = torch.randn(2, COLUMNS, device=device)
    expected = model(x)
    handle = model.after.register_forward_hook(lambda module, args, y: 2 * y)
    doubled = model(x)
    handle.remove()
    patch(model, fuse_residual=True)
    model.after.__class__ = type("Doubling", (type(model.after),), {"forward": lambda self, x: 2 * super(type(self), self).forward(x)})
    assert torch.allclose(model(x), doubled, rtol=1e-5, atol=1e-6)
    model.after.__class__ = type(model.after).__base__
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-6)
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
@pytest.mark.parametrize("layer", [Layer, LikeLlama])
def test_compile(layer, device):
    model, sums = layer().to(device), []
    patch(model, fuse_residual=True)
    x = torch.randn(1, 8, COLUMNS, device=device)
    expected = results(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, x), expected)

    def backend(graph, inputs):
        sums.extend(node.args[2] is not None for node in graph.graph.nodes if str(node.target).startswith("triton_rmsnorm."))
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(x)
    assert sums == [False, True]


def test_loaded_where_the_source_is_another(layer_of):
    """`fused` is what unpickling calls."""
    with pytest.raises(RuntimeError, match=r"in OfAFile\.forward no sum goes straight into after"):
        fused(layer_of(ADD, "x.mul_(2)", "return self.after(x)"), Fusion(("after",)))


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
