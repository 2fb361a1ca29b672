"""patch does what it reports or nothing, passes over modules of any kind, and leaves nothing behind outside the model."""

import abc
import copy
import functools
import gc
import random
import typing
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from norms import COLUMNS, Layer, Norm, classes, norm_of, original_of
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from triton_rmsnorm import patch, patched, unpatch
from triton_rmsnorm.patching import patching
from triton_rmsnorm.patching.replacement import is_replacement
from triton_rmsnorm.patching.report import Status

X = torch.randn(3, COLUMNS)


def reason(module: nn.Module) -> str:
    report = patch(module)
    assert report.replaced == 0
    (row,) = report.rows
    assert row.status == Status.LEFT_ALONE and row.cls is type(module)
    return row.reason


# --- all or nothing ---


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize(("where", "last"), [("outcome", 2), ("assign", 2), ("outcome", 8)], ids=["norm", "class of a norm", "layer"])
def test_an_error_midway_leaves_nothing(where, last, error, monkeypatch):
    model = nn.Sequential(Norm(), Layer(), Norm())  # six modules
    before, calls = classes(model), []
    function = getattr(patching, where)

    def fail(*arguments):
        calls.append(1)
        if len(calls) == last:
            raise error
        return function(*arguments)

    monkeypatch.setattr(patching, where, fail)
    context = patched(model, fuse_residual=True)
    with pytest.raises(error):
        context.__enter__()
    assert classes(model) == before
    monkeypatch.undo()
    assert patch(model, fuse_residual=True).replaced == 3


def test_a_class_that_is_refused_stays_as_it_was():
    class Local(Norm):
        pass

    norm, other = Local(), Local()
    other.forward = functools.partial(Norm.forward, other)
    with pytest.raises(RuntimeError, match="its forward was replaced"):
        patch(Local, strict=True)
    assert type(norm) is Local and "__init__" not in vars(Local)


def test_a_layer_whose_class_refuses_subclasses():
    """The hook does not run: what it wrapped around the forward, as that of GradientCheckpointingLayer does, is copied."""

    class Wrapping(nn.Module):
        def __init_subclass__(cls, **named):
            super().__init_subclass__(**named)
            forward = cls.forward
            cls.forward = functools.wraps(forward)(lambda self, x: forward(self, x))

    class Wrapped(Layer, Wrapping):
        def forward(self, x):
            x = x + self.linear(x)
            return x + self.norm(x)

    class SealedLayer(Wrapped):
        def __init_subclass__(cls, **named):
            raise TypeError("may not be derived from")

    for cls in (Wrapped, SealedLayer):
        assert patch(cls(), fuse_residual=True).fused == 1


class Refusing(type):
    def __setattr__(cls, name, value):
        raise TypeError("constant")


def test_a_constructor_that_cannot_be_replaced():
    class Constant(Norm, metaclass=Refusing):
        pass

    norm = Constant()
    replaced, row = patch(Constant).rows
    assert (replaced.status, row.status) == (Status.REPLACED, Status.LEFT_ALONE)
    assert row.reason == "its constructor cannot be replaced: TypeError: constant"
    assert is_replacement(type(norm)) and type(Constant()) is Constant
    unpatch(Constant)
    assert type(norm) is Constant


# --- nothing outside changes ---


REGISTRY: list = []


class Registering(type):
    def __new__(cls, name, bases, space):
        made = super().__new__(cls, name, bases, space)
        REGISTRY.append(made)
        return made

    def __init__(cls, *arguments):
        super().__init__(*arguments)
        REGISTRY.append(cls)


class Sealed(Norm, metaclass=Registering):
    def __init_subclass__(cls, **named):
        raise TypeError("may not be derived from")


def test_registries_and_sealed_classes():
    """They are not asked: a class that takes a class's place registers nowhere."""
    known, model = list(REGISTRY), nn.Sequential(Norm(), Sealed(), Norm())
    assert patch(model).replaced == 3
    assert REGISTRY == known and type(type(model[1])) is Registering
    torch.testing.assert_close(model[1](X), original_of(model[1])(X))
    unpatch(model)
    assert classes(model)[1:] == [Norm, Sealed, Norm]


T = typing.TypeVar("T")


class Abstract(abc.ABC):
    @abc.abstractmethod
    def size(self): ...


class Concrete(Norm, Abstract, typing.Generic[T]):
    def size(self):
        return COLUMNS


def test_abstract_and_generic_classes():
    """isinstance tells our class from the original."""
    assert isinstance(Concrete(), Concrete)
    norm = Concrete[int]()
    assert patch(norm).replaced == 1
    assert isinstance(norm, Concrete) and isinstance(norm, Abstract) and isinstance(norm, type(norm))
    assert not isinstance(Concrete(), type(norm))
    torch.testing.assert_close(norm(X), original_of(norm)(X))


class Drawing(Layer):
    """Draws random numbers in many ways."""

    def forward(self, x):
        x = x + F.dropout(self.linear(x), 0.5, self.training) * torch.rand(()) * torch.bernoulli(torch.full_like(x, 0.5))
        return x + self.norm(x) + torch.randn_like(x) + torch.randperm(3).sum()


class DrawingInPython(Layer):
    def forward(self, x):
        x = x + self.linear(x)
        return x + self.norm(x) * random.random() * np.random.rand()


@pytest.mark.parametrize(("cls", "fused"), [(Layer, 1), (Drawing, 1), (DrawingInPython, 0)])
def test_random_generators(cls, fused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: 1 / 0)
    layer = cls().train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    assert patch(layer, fuse_residual=True).fused == fused
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    np.testing.assert_equal(np.random.get_state(), states[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        report = patch(Layer(), fuse_residual=True)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert (report.replaced, report.fused) == (1, 1)


def normalize(x, weight, eps):
    return weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


COMPILED = torch.compile(normalize, backend="eager", dynamic=False)


class CallsCompiled(Norm):
    def forward(self, x):
        return COMPILED(x, self.weight, self.eps)


class IsCompiled(Norm):
    forward = torch.compile(Norm.forward, backend="eager", dynamic=False)


@pytest.mark.parametrize("cls", [CallsCompiled, IsCompiled])
def test_compile_caches(cls):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert patch(cls()).replaced == 1
    assert not torch._dynamo.utils.counters["frames"]
    norm = cls()
    for rows in range(3):
        norm(X[: rows + 1])
    assert torch._dynamo.utils.counters["frames"]["total"] == 3  # it compiles as before
    torch._dynamo.reset()


def test_warnings():
    class Warns(Norm):
        def forward(self, x):
            warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
            return super().forward(x)

    filters = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert patch(Warns()).replaced == 1
    assert not caught and warnings.filters == filters


def test_threads():
    """Several threads patch one model, and others call it meanwhile; nothing fails or differs."""
    model = nn.Sequential(*[Layer() for _ in range(3)])
    others = [copy.deepcopy(model) for _ in range(2)]
    expected, state = model(X), torch.get_rng_state()
    with ThreadPoolExecutor(7) as threads:
        reports = [threads.submit(patch, one, fuse_residual=True) for one in (model, model, model, *others)]
        results = [threads.submit(lambda: [model(X) for _ in range(20)]) for _ in range(2)]
    for y in (*results[0].result(), *results[1].result()):
        torch.testing.assert_close(y, expected)
    assert sum(report.result().fused for report in reports) == 9  # each layer once
    assert torch.equal(torch.get_rng_state(), state)


# --- any module may stand in a model ---


class EqualToAll(Norm):
    __hash__ = None

    def __eq__(self, other):
        return True


class Partial(Norm):
    def _forward(self, x, eps):
        return normalize(x, self.weight, eps)

    forward = functools.partialmethod(_forward, eps=1e-6)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(COLUMNS, COLUMNS), Norm())


class Unreadable(nn.Module):
    """RMSNorm by name, and nothing can be asked of it."""

    def __init__(self):
        super().__init__()
        vars(self)["_parameters"] = None

    def forward(self, x):
        return x


UnreadableRMSNorm = type("UnreadableRMSNorm", (Unreadable,), {})


def quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}, dtype=torch.qint8)


STRANGERS = {
    "scripted": lambda: torch.jit.script(nn.Linear(COLUMNS, COLUMNS)),
    "scripted norm": lambda: torch.jit.script(nn.RMSNorm(COLUMNS)),
    "traced": lambda: torch.jit.trace(nn.Linear(COLUMNS, COLUMNS), X),
    "frozen": lambda: torch.jit.freeze(torch.jit.script(nn.Linear(COLUMNS, COLUMNS)).eval()),
    "fx": lambda: torch.fx.symbolic_trace(net()),
    "exported": lambda: torch.export.export(net(), (X,)).module(),
    "quantized": quantized,
    "compiled": lambda: torch.compile(net(), backend="eager"),
    "lazy": lambda: nn.LazyLinear(COLUMNS),
    "equal to all": EqualToAll,
    "partial": Partial,
    "data parallel": lambda: nn.DataParallel(net()),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers(stranger):
    model = nn.ModuleList([Norm(), STRANGERS[stranger]()])
    expected = model[1](X) if stranger != "lazy" else None
    report = patch(model, fuse_residual=True)
    assert report.rows[0].status == Status.REPLACED and is_replacement(type(model[0]))
    if expected is not None:
        torch.testing.assert_close(model[1](X), expected)
    unpatch(model)
    assert type(model[0]) is Norm


def test_an_unreadable_module():
    model = nn.ModuleList([Norm(), Unreadable(), UnreadableRMSNorm()])
    replaced, left = patch(model, fuse_residual=True).rows
    assert replaced.count == 1
    assert (left.cls, left.count, left.resembles) == (UnreadableRMSNorm, 1, True) and "it cannot be read: " in left.reason


def test_uninitialized_parameters():
    norm = Norm()
    norm.weight = nn.parameter.UninitializedParameter()
    model = nn.Sequential(norm, Norm())
    assert patch(model).replaced == 1
    norm.weight.materialize((COLUMNS,))
    assert patch(model).replaced == 1
    layer = Layer()
    layer.linear = nn.LazyLinear(COLUMNS)
    assert patch(layer, fuse_residual=True).fused == 1


class Int8(torch.Tensor):
    """A quantized weight, which knows no operators but those of a linear layer."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values, scale):
        self.values_, self.scale = values, scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return F.linear(args[0], args[1].values_.float() * args[1].scale, *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values_, args[0].scale)
        raise NotImplementedError(func)


def test_quantized_weights():
    layer = Layer()
    layer.linear.weight = nn.Parameter(Int8(torch.ones(COLUMNS, COLUMNS, dtype=torch.int8), 0.1), requires_grad=False)
    expected = layer(X)
    assert patch(layer, fuse_residual=True).fused == 1
    torch.testing.assert_close(layer(X), expected)
    norm = Norm()
    norm.weight = nn.Parameter(Int8(torch.ones(COLUMNS, dtype=torch.int8), 0.1), requires_grad=False)
    assert reason(norm) == "it has a Int8 for a tensor"


# --- reasons ---


def normalize_dimension_1(self, x):
    weight = self.weight.view(-1, *(1,) * (x.dim() - 2))
    return weight * x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps)


class ParametrizedRMSNorm(Norm):
    def __init__(self):
        super().__init__()
        parametrize.register_parametrization(self, "weight", nn.Identity())


class CountingRMSNorm(Norm):
    calls = 0

    def forward(self, x):
        CountingRMSNorm.calls += 1
        return super().forward(x)


class WithSlots:
    __slots__ = ("extra",)


class Slotted(Norm, WithSlots):
    pass


def with_a_forward():
    norm = Norm()
    norm.forward = functools.partial(Norm.forward, norm)
    return norm


def hooked():
    hooks = pytest.importorskip("accelerate").hooks
    return hooks.add_hook_to_module(Norm(), hooks.ModelHook())


def rms_norm_of(forward=Norm.forward, **attributes):
    return functools.partial(norm_of, forward, "SomeRMSNorm", **attributes)


def parameter(*shape):
    return nn.Parameter(torch.rand(shape))


BEFORE = "patch the model before it is wrapped, on every rank"
REASONS = [
    (rms_norm_of(weight=parameter(1)), "its weight is one number for all columns"),
    (rms_norm_of(normalize_dimension_1), "it normalizes dimension 1, not the last"),
    (rms_norm_of(normalize_dimension_1, weight=parameter(64, 1, 1)), "it normalizes dimension 1, not the last"),
    (rms_norm_of(eps=nn.Parameter(torch.tensor(1e-6))), "its eps is a parameter, for which it would need a gradient"),
    (rms_norm_of(weight=nn.Buffer(torch.arange(64))), "its weight is torch.int64"),
    (ParametrizedRMSNorm, "it is parametrized"),
    (rms_norm_of(bias=parameter(64), linear=nn.Linear(2, 2)), "it has more parameters and buffers than a weight: weight, bias, linear"),
    (rms_norm_of(lambda self, *arguments: arguments[0]), "its forward takes other arguments than an RMS norm's"),
    (CountingRMSNorm, "its forward changes what it reads"),
    (Slotted, "its class cannot have a subclass: __bases__ assignment: 'Slotted' object layout differs from 'Module'"),
    (with_a_forward, "its forward was replaced: patch the model before that"),
    (hooked, "accelerate has hooked it: patch the model before that"),
    (rms_norm_of(weight=parameter(0)), f"its weight is empty, as where ZeRO-3 or FSDP has partitioned it: {BEFORE}"),
    (
        rms_norm_of(weight=torch.rand(64)),
        f"its weight is a tensor, but neither parameter nor buffer, as where FSDP has flattened it: {BEFORE}",
    ),
]


@pytest.mark.parametrize(("make", "words"), REASONS, ids=[words for _, words in REASONS])
def test_reasons(make, words):
    assert reason(make()) == words


@pytest.mark.slow
def test_distributed_norms(group_of_one):
    norm = torch.distributed.tensor.distribute_module(Norm().to(group_of_one.device_type), group_of_one)
    assert reason(norm) == f"torch.distributed has taken it over: {BEFORE}"


# --- unpatch ---


@pytest.mark.slow
def test_a_constructor_that_something_else_has_wrapped():
    """The wrapper stays, ours does nothing any more, and goes as soon as it is on top again."""

    class Local(Norm):
        def __init__(self):
            super().__init__()

    own = Local.__init__
    patch(Local)
    ours = Local.__init__

    @functools.wraps(ours)
    def wrapper(self):
        ours(self)
        self.wrapped = True

    Local.__init__ = wrapper
    assert is_replacement(type(Local()))
    unpatch(Local)
    assert type(Local()) is Local and Local().wrapped
    Local.__init__ = ours
    assert type(Local()) is Local
    patch(Local)
    assert Local.__init__ is ours and is_replacement(type(Local()))
    unpatch(Local)
    assert Local.__init__ is own

    patch(Local)
    Local.__init__ = functools.wraps(Local.__init__)(functools.partialmethod(Local.__init__))
    patch(Local)  # once more, around the wrapper
    assert is_replacement(type(Local()))
    unpatch(Local)
    assert type(Local()) is Local


def test_contexts_of_a_class_that_end_in_another_order():
    class Local(Norm):
        pass

    one, other = patched(Local), patched(Local)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    other.__exit__(None, None, None)
    assert type(Local()) is Local and "__init__" not in vars(Local)


def test_what_the_garbage_collector_does_not_see():
    class Local(Norm):
        pass

    model = nn.Sequential(Local(), Local())
    patch(model)
    gc.freeze()
    try:
        unpatch(Local)
    finally:
        gc.unfreeze()
    assert classes(model)[1:] == [Local, Local]


def test_a_model_goes_with_its_last_reference():
    """Without the garbage collector: neither proofs nor trials leave cycles that keep it."""
    model = nn.Sequential(Norm(), Layer())
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        patch(model, fuse_residual=True, recompute=True)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_copies_outlive_the_context():
    norm = Norm()
    with patched(norm):
        copied = copy.deepcopy(norm)
    assert type(norm) is Norm and is_replacement(type(copied))
    unpatch(Norm)
    assert type(copied) is Norm


@pytest.mark.parametrize("cls", [Norm, Layer])
def test_something_holds_our_forward(cls, launches):
    """As a hook of accelerate does: it runs the original after unpatch."""
    module = cls()
    patch(module, fuse_residual=True)
    held = module.forward
    unpatch(module)
    assert torch.equal(held(X), module(X))
    assert not launches
