"""What changes after a norm was recognized: between two patches, and while it is patched. No call may give numbers of before."""

import copy
import functools
import pickle
import sys
import types
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from norms import COLUMNS, Layer, Norm, Switched, original_of, rstd
from torch import nn
from torch.nn.utils import parametrize

import triton_rmsnorm
from triton_rmsnorm import patch, patched, unpatch
from triton_rmsnorm.integrations.layers import RMSNorm
from triton_rmsnorm.patching.reads import reads
from triton_rmsnorm.patching.replacement import is_replacement


class Optional(Norm):
    """With a bias, if one is registered."""

    def __init__(self):
        super().__init__()
        self.register_parameter("bias", None)

    def forward(self, x):
        return super().forward(x) if self.bias is None else super().forward(x) + self.bias


class Configured(Norm):
    """Its epsilon and more are in a configuration."""

    def __init__(self, eps=1e-6, scaled=False):
        super().__init__()
        self.eps, self.config = None, SimpleNamespace(eps=eps, scaled=scaled, factors={"all": 1.0})

    def forward(self, x):
        factor = self.config.factors["all"] if self.config.scaled else 1
        return factor * self.weight * (x.float() * rstd(x, self.config.eps)).to(x.dtype)


class Plain(Norm):
    def forward(self, x):
        return self.weight * (x.float() * rstd(x, self.eps)).to(torch.promote_types(x.dtype, torch.as_tensor(self.eps).dtype))


class InGlobals(Norm):
    def forward(self, x):
        return super().forward(x) if SWITCH else x


class InAModule(Norm):
    def forward(self, x):
        return super().forward(x) if flags.on else x


class WithMethod(Norm):
    def factor(self, x):
        return rstd(x, self.eps)

    def forward(self, x):
        return self.weight * (x.float() * self.factor(x)).to(x.dtype)


class BySuper(WithMethod):
    def forward(self, x):
        return super().forward(x)


class WithOthers(Norm):
    """Calls what is in its class in other ways than methods."""

    @property
    def one(self):
        return 1.0

    @classmethod
    def two(cls):
        return 1.0

    @functools.cache  # noqa: B019
    def three(self, dtype):
        return self.scale

    scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.one * self.two() * self.three(x.dtype)


def doubled(x):
    return x


class ByFunction(Norm):
    def forward(self, x):
        return doubled(super().forward(x))


FUNCTIONS = {"same": lambda x: x, "tanh": torch.tanh}


class ByRegistry(Norm):
    def forward(self, x):
        return FUNCTIONS["same"](super().forward(x))


class Differentiated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y if SWITCH else 2 * y

    @staticmethod
    def backward(ctx, dy):
        return dy


class ByAutograd(Norm):
    def forward(self, x):
        return Differentiated.apply(super().forward(x))


class ByParameters(Norm):
    def forward(self, x):
        return super().forward(x) + sum(p for name, p in self.named_parameters() if name != "weight")


class Matched(Switched):
    def forward(self, x):
        match self:
            case Matched(on=True):
                return Norm.forward(self, x)
        return x


@dataclass(slots=True)
class Slots:
    factor: float = 1.0
    eps: float = 1e-6


class MadeUp:
    """Its attributes are in a dictionary."""

    def __init__(self):
        self._values = {"factor": 1.0, "eps": 1e-6}

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return self._values[name]

    def times(self, y):
        return self.factor * y


class Large(dict):
    """More than is compared as a whole."""

    def __init__(self):
        super().__init__({str(number): number for number in range(99)} | {"factor": 1.0, "eps": 1e-6})


class Held(Norm):
    """Its epsilon and a factor are in an object that it holds somehow."""

    def __init__(self, held):
        super().__init__()
        del self.eps
        self.held = held

    def get(self, name):
        held = self.held[0] if isinstance(self.held, (list, tuple)) else self.held
        return held[name] if isinstance(held, dict) else held

    def forward(self, x):
        found = self.get("eps"), self.get("factor")
        eps, factor = found if isinstance(self.held, dict) else (found[0].eps, found[1].factor)
        return factor * self.weight * (x.float() * rstd(x, eps)).to(x.dtype)


class HoldsMethod(Norm):
    def __init__(self):
        super().__init__()
        self.times = MadeUp().times

    def forward(self, x):
        return self.times(super().forward(x))


def of_a_closure():
    held = SimpleNamespace(factor=1.0)

    class Enclosing(Norm):
        def forward(self, x):
            return held.factor * self.weight * (x.float() * rstd(x, self.eps)).to(x.dtype)

    norm = Enclosing()
    norm.note = held
    return norm


class Twice(nn.Module):
    def forward(self, y):
        return 2 * y


class WithChild(Norm):
    """As in TransformerLens, where hooks on such submodules look at values and change them."""

    def __init__(self):
        super().__init__()
        self.child = nn.Sequential(nn.Identity())

    def forward(self, x):
        return self.child(super().forward(x))


SWITCH = True
flags = types.ModuleType("flags_of_a_test")
BIAS = nn.Parameter(torch.ones(COLUMNS))


def bias_becomes_a_buffer(norm):
    del norm.bias
    norm.register_buffer("bias", BIAS.detach())


CHANGES = {
    "attribute": (Switched, lambda norm: setattr(norm, "on", False)),
    "parameter": (Optional, lambda norm: setattr(norm, "bias", BIAS)),
    "registered parameter": (Optional, lambda norm: norm.register_parameter("bias", BIAS)),
    "registered buffer": (Optional, bias_becomes_a_buffer),
    "attribute of the class": (Switched, lambda norm: setattr(Switched, "on", False)),
    "epsilon with a gradient": (Norm, lambda norm: setattr(norm, "eps", nn.Parameter(torch.tensor(0.5)))),
    "epsilon in fp64": (Plain, lambda norm: setattr(norm, "eps", torch.tensor([0.5], dtype=torch.float64))),
    "epsilon of each column": (Norm, lambda norm: setattr(norm, "eps", torch.linspace(0.1, 1, COLUMNS))),
    "configuration": (Configured, lambda norm: vars(norm.config).update(scaled=True, factors={"all": 2.0})),
    "dictionary": (lambda: Configured(scaled=True), lambda norm: norm.config.factors.update(all=2.0)),
    "another configuration": (Configured, lambda norm: setattr(norm, "config", Configured(0.5, scaled=True).config)),
    "global": (InGlobals, lambda norm: globals().update(SWITCH=False)),
    "global of another module": (InAModule, lambda norm: setattr(flags, "on", False)),
    "forward": (Norm, lambda norm: setattr(Norm, "forward", lambda self, x: 2 * x)),
    "code of the forward": (Norm, lambda norm: setattr(Norm.forward, "__code__", (lambda self, x: 2 * x).__code__)),
    "code of a function": (ByFunction, lambda norm: setattr(doubled, "__code__", (lambda x: 3 * x).__code__)),
    "forward by super()": (BySuper, lambda norm: setattr(WithMethod, "forward", lambda self, x: 2 * x)),
    "property": (WithOthers, lambda norm: setattr(WithOthers, "one", property(lambda self: 2))),
    "class method": (WithOthers, lambda norm: setattr(WithOthers, "two", classmethod(lambda cls: 2))),
    "function": (ByFunction, lambda norm: globals().update(doubled=lambda x: 2 * x)),
    "function in a registry": (ByRegistry, lambda norm: FUNCTIONS.update(same=lambda x: 2 * x)),
    "global of an autograd function": (ByAutograd, lambda norm: globals().update(SWITCH=False)),
    "one of all parameters": (ByParameters, lambda norm: norm.register_parameter("bias", BIAS)),
    "attribute of a pattern": (Matched, lambda norm: setattr(norm, "on", False)),
    "slots": (lambda: Held(Slots()), lambda norm: setattr(norm.held, "factor", 2.0)),
    "computed attributes": (lambda: Held(MadeUp()), lambda norm: norm.held._values.update(factor=2.0)),
    "epsilon in a large dictionary": (lambda: Held(Large()), lambda norm: norm.held.update(eps=0.5)),
    "object in a list": (lambda: Held([SimpleNamespace(eps=1e-6, factor=1.0)]), lambda norm: setattr(norm.held[0], "factor", 2.0)),
    "object in a tuple": (lambda: Held((Slots(),)), lambda norm: setattr(norm.held[0], "factor", 2.0)),
    "object of a method": (HoldsMethod, lambda norm: norm.times.__self__._values.update(factor=2.0)),
    "object of a closure": (of_a_closure, lambda norm: setattr(norm.note, "factor", 2.0)),
    "hook of a submodule": (WithChild, lambda norm: norm.child[0].register_forward_hook(lambda module, args, y: 2 * y)),
    "forward of a submodule": (WithChild, lambda norm: setattr(norm.child[0], "forward", lambda y: 2 * y)),
    "another submodule": (WithChild, lambda norm: norm._modules.update(child=Twice())),
    "method": (WithMethod, lambda norm: setattr(WithMethod, "factor", lambda self, x: 2)),
}


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.setitem(globals(), "SWITCH", True)
    monkeypatch.setattr(Switched, "on", True)
    monkeypatch.setattr(Norm, "forward", Norm.forward)
    for function in (Norm.forward, doubled):
        monkeypatch.setattr(function, "__code__", function.__code__)
    monkeypatch.setattr(WithMethod, "factor", WithMethod.factor)
    monkeypatch.setattr(WithMethod, "forward", WithMethod.forward)
    monkeypatch.setitem(globals(), "doubled", doubled)
    monkeypatch.setitem(FUNCTIONS, "same", FUNCTIONS["same"])
    for name in ("one", "two"):
        monkeypatch.setattr(WithOthers, name, vars(WithOthers)[name])
    monkeypatch.setattr(flags, "on", True, raising=False)
    monkeypatch.setitem(sys.modules, flags.__name__, flags)


@pytest.mark.parametrize(("make", "change"), CHANGES.values(), ids=CHANGES)
def test_while_it_is_patched(make, change, device, launches):
    """The call after the change gives what an unpatched norm gives."""
    norm, x = make().to(device), torch.randn(3, COLUMNS, device=device)
    original = copy.deepcopy(norm)
    assert patch(norm).replaced == 1
    torch.testing.assert_close(norm(x), original(x))
    assert len(launches) == 1
    change(norm)
    change(original)
    torch.testing.assert_close(norm(x), original(x), rtol=0, atol=0)
    assert len(launches) == 1


def test_a_recomputing_norm_changes(device):
    norm, x = Switched().to(device), torch.randn(3, COLUMNS, device=device)
    patch(norm, recompute=True)
    norm.on = False
    assert torch.equal(norm(x), x) and type(norm) is Switched


@pytest.mark.parametrize(("make", "change"), CHANGES.values(), ids=CHANGES)
def test_between_two_patches(make, change, device):
    """A second norm, patched after the change, is recognized anew; so is the first after unpatch."""
    norm, x = make().to(device), torch.randn(3, COLUMNS, device=device)
    patch(norm)
    unpatch(norm)
    change(norm)
    expected = norm(x)
    patch(norm)
    torch.testing.assert_close(norm(x), expected)


def test_between_two_instances():
    """What was found of one is not taken for the next of its class."""
    with patched(Switched):
        Switched.on = False
        assert not is_replacement(type(Switched()))
        Switched.on = True
        assert is_replacement(type(Switched()))


def test_a_layer_of_the_kernels_package(device, launches):
    """Its forward is put into modules that keep their class, where setting an attribute is not noticed but looked for."""
    norm, x = Switched().to(device), torch.randn(3, COLUMNS, device=device)
    norm.on = True
    norm.forward = types.MethodType(RMSNorm.forward, norm)
    torch.testing.assert_close(norm(x), Switched.forward(norm, x))
    assert len(launches) == 1
    norm.on = False
    assert torch.equal(norm(x), x)


def test_what_a_cached_method_reads(device):
    norm, x = WithOthers().to(device), torch.randn(3, COLUMNS, device=device)
    assert patch(norm).replaced == 1
    norm.scale = 2.0
    torch.testing.assert_close(norm(x), original_of(norm)(x))


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (Configured, lambda norm, eps: setattr(norm.config, "eps", eps)),
        (lambda: Held(Slots()), lambda norm, eps: setattr(norm.held, "eps", eps)),
        (lambda: Held(MadeUp()), lambda norm, eps: norm.held._values.update(eps=eps)),
    ],
    ids=["attributes", "slots", "computed"],
)
def test_epsilon_of_a_configuration_is_followed(make, change, device, launches):
    """Also where two models share the configuration."""
    norms = [make().to(device) for _ in range(2)]
    vars(norms[1]).update({name: value for name, value in vars(norms[0]).items() if name in ("config", "held")})
    x = 0.1 * torch.randn(3, COLUMNS, device=device)
    for norm, eps in zip(norms, (1e-2, 0.5), strict=True):
        patch(norm)
        change(norm, eps)
        torch.testing.assert_close(norm(x), original_of(norm)(x))
    assert len(launches) == 2


def test_an_epsilon_that_the_original_refuses():
    norm = Norm()
    patch(norm)
    norm.eps = None
    with pytest.raises(TypeError, match="unsupported operand"):
        norm(torch.randn(3, COLUMNS))


def test_other_attributes_leave_it_patched(device, launches):
    """Neither attributes that its forward does not read, nor the weight, the epsilon, a mode, or the same value once more."""
    norm = Switched().to(device)
    norm.on = True
    patch(norm)
    norm.note, norm.eps, norm.on = "read by nobody", 0.5, True
    norm.weight = nn.Parameter(torch.ones(COLUMNS, device=device))
    norm.train().eval().requires_grad_(False)
    norm.load_state_dict({"weight": torch.full((COLUMNS,), 2.0)}, assign=True)
    norm.to(device).half().float()
    assert is_replacement(type(norm))
    x = torch.randn(3, COLUMNS, device=device)
    torch.testing.assert_close(norm(x), original_of(norm)(x))
    assert len(launches) == 1


def test_attributes_looked_up_by_name(device):
    """Where a forward computes the names that it reads, any attribute counts."""

    class ByName(Norm):
        def forward(self, x):
            return super().forward(x) * getattr(self, "fac" + "tor", 1)

    norm, x = ByName().to(device), torch.randn(3, COLUMNS, device=device)
    assert patch(norm).replaced == 1
    norm.factor = 2
    assert type(norm) is ByName
    torch.testing.assert_close(norm(x), original_of(norm)(x))


def test_compiled_before_the_change(device):
    norm, x = Switched().to(device), torch.randn(3, COLUMNS, device=device)
    patch(norm)
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), original_of(norm)(x))
    Switched.on = False
    assert torch.equal(compiled(x), x)
    torch._dynamo.reset()


class Taking(Layer):
    def forward(self, x, *more, scale=1.0, **named):
        x = x + self.linear(x)
        return scale * (x + self.norm(x))


@pytest.mark.parametrize("holder, name", [(Taking, "forward"), (Taking.forward, "__code__")], ids=["function", "code"])
@pytest.mark.parametrize("option", ["fuse_residual", "recompute"])
def test_the_forward_of_a_layer_is_replaced(option, holder, name, device, monkeypatch):
    """Also where it was compiled before."""
    layer, x = Taking().to(device), torch.randn(3, COLUMNS, device=device)
    patch(layer, **{option: True})
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(x, scale=2.0), original_of(layer)(x, scale=2.0))

    def other(self, *arguments, **named):
        return arguments, named

    monkeypatch.setattr(holder, name, other if name == "forward" else other.__code__)
    for one in (layer, compiled):
        assert one(x, 1, scale=2.0, other=3) == ((x, 1), {"scale": 2.0, "other": 3})
    torch._dynamo.reset()


class OtherwiseCompiled(Norm):
    def forward(self, x):
        return x if torch.compiler.is_compiling() else super().forward(x)


def test_a_forward_that_asks_whether_it_is_compiled(device, launches):
    norm, x = OtherwiseCompiled().to(device), torch.randn(3, COLUMNS, device=device)
    patch(norm)
    torch.testing.assert_close(norm(x), original_of(norm)(x))
    assert launches
    assert torch.equal(torch.compile(norm, backend="eager", fullgraph=True)(x), x)
    torch._dynamo.reset()


def test_a_class_derived_from_the_replacement(device):
    """As fully_shard and parametrize do; a change is noticed there, too, and what they did can be undone."""
    norm, x = Switched().to(device), torch.randn(3, COLUMNS, device=device)
    patch(norm)
    replaced = type(norm)
    norm.__class__ = type("Derived", (replaced,), {})
    norm.on = False
    for one in (norm, copy.deepcopy(norm)):
        assert torch.equal(one(x), x)
    with pytest.raises(RuntimeError, match="has become a Derived since"):
        unpatch(norm)
    norm.__class__ = replaced
    unpatch(norm)
    assert type(norm) is Switched and "forward" not in vars(norm)


class Exponential(nn.Module):
    def forward(self, weight):
        return weight.exp()


def test_parametrized_later(device, launches):
    norm, x = Norm().to(device), torch.randn(3, COLUMNS, device=device)
    patch(norm)
    parametrize.register_parametrization(norm, "weight", Exponential())
    y = norm(x)
    assert launches
    parametrize.remove_parametrizations(norm, "weight")
    torch.testing.assert_close(y, norm(x))


def test_an_instance_made_from_the_class_of_another(device):
    """Its constructor sets attributes, so nothing is taken for granted; the result is right in any case."""
    norm = Switched().to(device)
    patch(norm)
    other = type(norm)().to(device)
    x = torch.randn(3, COLUMNS, device=device)
    torch.testing.assert_close(other(x), original_of(other)(x))


# --- copies ---


class WithArguments(Norm):
    def __new__(cls, size):
        assert size == COLUMNS
        return super().__new__(cls)

    def __init__(self, size):
        super().__init__()

    def __getnewargs__(self):
        return (COLUMNS,)


class WithKeywords(WithArguments):
    def __new__(cls, *, size):
        return super().__new__(cls, size)

    def __getnewargs_ex__(self):
        return (), {"size": COLUMNS}


class Reduced(Norm):
    def __reduce__(self):
        return type(self), (), {"weight": self.weight.data}

    def __setstate__(self, state):
        self.weight.data = state["weight"]


class ReducedToNothing(Norm):
    def __reduce__(self):
        return type(self), ()

    def __init__(self):
        super().__init__()
        nn.init.ones_(self.weight)


class Copied(Norm):
    def __deepcopy__(self, memo):
        copied = type(self)()
        copied.load_state_dict(self.state_dict())
        return copied


COPIED = [
    WithArguments(COLUMNS),
    WithKeywords(size=COLUMNS),
    Reduced(),
    ReducedToNothing(),
    Copied(),
    Norm(),
    nn.RMSNorm(COLUMNS, eps=0.1),
    Layer(),
]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("norm", COPIED, ids=lambda norm: type(norm).__name__)
def test_copies(norm, recompute, device):
    """Also of fused layers, and of classes with ways of their own to be copied and pickled."""
    norm = copy.deepcopy(norm).to(device)
    original = type(norm)
    patch(norm, fuse_residual=True, recompute=recompute)
    x = torch.randn(3, COLUMNS, device=device)
    pickled = [pickle.loads(pickle.dumps(norm, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for one in (copy.deepcopy(norm), *pickled, copy.copy(norm)):
        assert isinstance(one, (type(norm), Copied)) and one.extra_repr() == norm.extra_repr()
        assert torch.equal(one(x), norm(x))
        unpatch(one)
        assert type(one) is original


def test_a_copy_is_what_the_class_is_by_then(device):
    """What was proved is compared with the code and the values that the class reads where the copy is made."""
    norm, x = Switched().to(device), torch.randn(3, COLUMNS, device=device)
    patch(norm)
    pickled = pickle.dumps(norm)
    Switched.on = False
    with pytest.warns(UserWarning, match="Switched is loaded as it was before it was patched: its code is another here"):
        loaded = pickle.loads(pickled)
    assert type(loaded) is Switched and torch.equal(loaded(x), x)
    Switched.on = True
    Norm.forward = lambda self, x: 2 * x
    with pytest.warns(UserWarning, match="its code is another here"):
        assert type(pickle.loads(pickled)) is Switched


# --- what is found in the code ---


def test_reads():
    found = reads(Configured())
    assert {"weight", "config"} <= found.names and not found.every and not found.autocast
    assert {path: value for root, path, value in found.values if not root} == {
        ("config", "eps"): 1e-6,
        ("config", "scaled"): False,
        ("config", "factors"): ("dict", (("all", 1.0),)),
    }
    assert reads(Switched()).values == (("", ("on",), True),)
    assert (__name__, ("SWITCH",), True) in reads(InGlobals()).values
    assert (flags.__name__, ("on",), True) in reads(InAModule()).values
    assert reads(WithMethod()).code != reads(Norm()).code == reads(Norm()).code
    assert reads(triton_rmsnorm.RMSNorm(8)).values == ()  # our own modules read nothing that matters
