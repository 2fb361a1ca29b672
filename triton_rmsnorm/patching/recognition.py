"""Recognition: what a module computes, proved by running it beside the closed list of semantics.

The original's forward runs on a copy of the module on the CPU, with random weights, beside each candidate in plain torch: in float32,
bfloat16 and float16, with weights of other dtypes than the input, for inputs of one to four dimensions, for rows whose mean square is
near eps, zeros, infinities and overflow, in training and evaluation, with its epsilon changed, and with gradients. Exactly one candidate
must remain. The module itself is only looked at: its tensors, hooks and attributes, the state of random generators, grad mode and
devices stay as they are, and weights may be anywhere, also on the meta device.

What counts as equal. Two ways to write one formula, such as x / sqrt(v) and x · rsqrt(v), differ in the last bits of float32. So float32
outputs must agree to FLOAT32_TOLERANCE, element by element, and half-precision outputs must be equal bit for bit but for the share of
elements that such a difference tips over a rounding boundary, HALF_MISMATCHES. Another order of roundings changes tens of percent.
"""

import copy
import inspect
import itertools
import math
import re
import types
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from triton_rmsnorm.patching.semantics import SEMANTICS, Norm, Semantics, evaluate, gated

# 8 units in the last place: what rsqrt, pow, sqrt and division, and other orders of summation, amount to.
FLOAT32_TOLERANCE = 2.0**-20
# 8 units of float32 tip 8 · 2^-13 of all float16 values over a boundary (2^-13 is the ratio of the units), and there may be two roundings.
HALF_MISMATCHES = 0.002
# Of gradients in float32, relative to the largest: they are sums over rows or columns.
GRADIENT_TOLERANCE = 1e-4
# What the epsilon of a copy is set to: it shows in rows of any scale up to 1.
OTHER_EPS = 0.03

F32, F16, B16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Verdict:
    """The outcome for a module: a proved norm, or the reason why there is none."""

    norm: Norm | None
    reason: str = ""
    resembles: bool = False  # it looks like an RMS norm all the same
    ran: bool = True  # its forward took what an RMS norm takes


def recognize(module: nn.Module) -> Verdict | None:
    """What `module` computes, or why it is not known. None: nothing about it suggests an RMS norm.

    A verdict is remembered by class and by all attributes of the instance but the values of its tensors.
    """
    if not _suggests_norm(module):
        return Verdict(None, "it has several tensors or submodules: no RMS norm") if _sounds_like_rms(type(module)) else None
    verdicts = _VERDICTS.setdefault(type(module), {})
    try:
        key = _fingerprint(module)
    except TypeError:  # an attribute that is neither a plain value nor has an identity to remember
        verdict = _prove(module)
    else:
        verdict = verdicts.get(key) or verdicts.setdefault(key, _prove(module))
    named = verdict.ran and "norm" in type(module).__name__.lower()
    return verdict if verdict.norm or verdict.resembles or named else None


_VERDICTS: weakref.WeakKeyDictionary[type, dict[Hashable, Verdict]] = weakref.WeakKeyDictionary()


def may_be_norm(cls: type[nn.Module]) -> bool:
    """Whether instances of a class may be RMS norms, as far as its code tells: forward's arguments, a name or a trace of an epsilon."""
    if not issubclass(cls, nn.Module) or (cls.__module__.startswith("torch.nn.") and not issubclass(cls, nn.RMSNorm)):
        return False
    return _inputs(cls) is not None and ("norm" in cls.__name__.lower() or _sounds_like_rms(cls) or _mentions_eps(cls))


def _suggests_norm(module: nn.Module) -> bool:
    cls = type(module)
    if cls.__module__.startswith("torch.nn.") and not isinstance(module, nn.RMSNorm):
        return False
    if _inputs(cls) is None or len(_tensors(module)) > 1 or any(_tensors(child) for child in module.modules() if child is not module):
        return False
    attributes = _attributes(module)
    return may_be_norm(cls) or any("eps" in name or (type(v) is float and 0 < v <= 1e-2) for name, v in attributes.items())


def _sounds_like_rms(cls: type) -> bool:
    return re.search("RMS|Rms|^rms|_rms", cls.__name__) is not None  # not LayerNormSomething


def _inputs(cls: type[nn.Module]) -> tuple[int, int] | None:
    """How many tensors forward needs and at most takes, of two; None if it needs other arguments."""
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    if required not in (1, 2) or any(p.kind == p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        return None
    return required, min(2, len(positional))


def _mentions_eps(cls: type) -> bool:
    """Whether the class's own methods name an epsilon, or contain a number that may be one."""
    bases = [base for base in cls.__mro__ if not base.__module__.startswith("torch.")]
    for function in (value for base in bases for name, value in vars(base).items() if name != "__init__"):
        if isinstance(function, types.FunctionType):
            code = function.__code__
            if any("eps" in name for name in (*code.co_varnames, *code.co_names, *code.co_freevars)):
                return True
            if any(type(v) is float and 0 < v <= 1e-2 for v in (*code.co_consts, *(function.__defaults__ or ()))):
                return True
    return False


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters and buffers, and tensors that are plain attributes."""
    named = (*module._parameters.items(), *module._buffers.items(), *_attributes(module).items())
    return {name: value for name, value in named if isinstance(value, Tensor)}


_INTERNAL = frozenset(vars(nn.Module())) | {"forward"}  # of its class is what is proved, not what something put into the instance


def _attributes(module: nn.Module) -> dict:
    return {name: value for name, value in vars(module).items() if name not in _INTERNAL}


def _fingerprint(module: nn.Module) -> Hashable:
    attributes = tuple((name, _key(value)) for name, value in sorted(_attributes(module).items()))
    tensors = tuple((name, name in module._parameters, t.shape, t.is_floating_point()) for name, t in _tensors(module).items())
    children = tuple((weakref.ref(type(child)), _fingerprint(child)) for child in module.children())
    return weakref.ref(type(module).forward), attributes, tensors, children


def _key(value: Any) -> tuple:
    """Plain values and sequences of them by value, other objects by identity. TypeError if there is no weak reference to them."""
    if isinstance(value, (tuple, list)):
        return type(value), *map(_key, value)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return type(value), repr(value)
    return id(value), _Identity(value)


class _Identity(weakref.ref):
    """A reference that equals those to the very same object, whatever that thinks of equality and hashes."""

    __slots__ = ()

    def __hash__(self) -> int:
        return 0  # the id is beside it

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Identity) and self() is not None and self() is other())


class _NotProvedError(Exception):
    def __init__(self, reason: str, resembles: bool = False, ran: bool = True):
        super().__init__(reason)
        self.resembles = resembles
        self.ran = ran


def _prove(module: nn.Module) -> Verdict:
    try:
        with isolated():
            return Verdict(_Proof(module).norm())
    except _NotProvedError as refused:
        return Verdict(None, str(refused), refused.resembles, refused.ran)


@contextmanager
def isolated() -> Iterator[None]:
    """On the CPU, with gradients, without warnings, without the caller's modes and autocast; random state restored."""
    with (
        warnings.catch_warnings(),
        _disable_current_modes(),
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        warnings.simplefilter("ignore")
        yield


class _Calls(TorchFunctionMode):
    """Notes whether torch's own rms_norm is called."""

    rms_norm = False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.rms_norm |= func in (torch.rms_norm, F.rms_norm)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Probe:
    """One run of the original: its input, and the state of the copy that it runs on."""

    x: Tensor
    gate: Tensor | None
    weight: Tensor | None  # the copy's only tensor, used or not
    changed: dict[str, float] = field(default_factory=dict)  # attributes
    training: bool = False
    required: bool = True  # False: the original may refuse the input

    @property
    def in_float32(self) -> bool:
        return self.x.dtype == F32 and (self.weight is None or self.weight.dtype == F32)


class _Proof:
    """Probes are run one after another, and each removes candidates."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.cls = type(module)
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.calls = _Calls()
        self.weight: str | None = None  # name of its only tensor, used or not
        self.weight_shape: tuple[int, ...] | None = None
        for name, tensor in _tensors(module).items():
            if name in vars(module) or not tensor.is_floating_point():
                raise _NotProvedError(f"its {name} is no floating-point parameter or buffer")
            self.weight, self.weight_shape = name, tuple(tensor.shape)
        self.gated = False
        self.shape: tuple[int, ...] = ()  # what is normalized
        self.rows: tuple[int, ...] = ()  # outer dimensions that the original takes

    def norm(self) -> Norm:
        required, accepted = _inputs(self.cls) or (1, 1)
        refusals: list[_NotProvedError] = []
        for self.gated in (True, False)[2 - accepted : 3 - required]:
            try:
                self._find_shape()
                for eps in self._epsilons():
                    try:
                        return self._prove(eps)
                    except _NotProvedError as refused:
                        refusals.append(refused)
            except _NotProvedError as refused:
                refusals.append(refused)
        raise max(reversed(refusals), key=lambda refused: (refused.resembles, refused.ran))

    def _prove(self, eps: str | float) -> Norm:
        candidates = list(self._candidates())
        for probe in self._probes(eps):
            actual = self._run(probe)
            if isinstance(actual, Exception):
                if probe.required:
                    raise self._fails(actual)
                continue
            formulas = {c: c.in_float32() if probe.in_float32 else c for c in candidates}
            fits = {formula: agree(actual, self._expected(formula, probe, eps)) for formula in set(formulas.values())}
            remaining = [c for c in candidates if fits[formulas[c]]]
            if not remaining:
                raise self._none_fits(probe, actual, candidates, eps)
            candidates = remaining
        if len(candidates) > 1:
            raise _NotProvedError(f"more than one semantics fits: {'; '.join(map(str, candidates))}", resembles=True)
        self._prove_gradients(candidates[0], eps)
        return Norm(candidates[0], self.weight if candidates[0].scaled else None, eps, len(self.shape), self.calls.rms_norm)

    def _candidates(self) -> Iterator[Semantics]:
        n = math.prod(self.shape)
        numbers = {v for v in _attributes(self.module).values() if type(v) is int and v > 0 and n % v == 0}
        groups = sorted({size for v in numbers for size in (v, n // v) if 1 < size < n}) if len(self.shape) == 1 else []
        for semantics, group_size in itertools.product(SEMANTICS, (None, *groups)):
            if not semantics.scaled or self.weight_shape == self.shape:
                semantics = replace(semantics, group_size=group_size)
                yield from gated(semantics) if self.gated else [semantics]

    def _find_shape(self) -> None:
        """Sets a shape that the module normalizes, its weight's or one that it declares or takes, and outer dimensions that it takes."""
        attributes = _attributes(self.module)
        declared = attributes.get("normalized_shape")
        hints = [self.weight_shape, declared if isinstance(declared, (tuple, list)) else None, (64,)]
        hints += [(v,) for v in attributes.values() if type(v) is int and 1 < v <= 1 << 16]
        failure: Exception | None = None
        for hint, self.rows in itertools.product(hints, ((8,), (2, 4), (2, 2, 2))):
            if hint and all(type(size) is int and size > 0 for size in hint):
                self.shape = tuple(hint)
                actual = self._run(self._probe(self._randn(*self.rows, *self.shape)))
                if isinstance(actual, Tensor):
                    return
                failure = failure or actual
        raise self._fails(failure)

    def _epsilons(self) -> list[str | float]:
        """Where the epsilon may be: attributes that change what is computed of small input, else a constant."""
        numbers = {name: v for base in reversed(self.cls.__mro__) for name, v in vars(base).items() if type(v) is float}
        numbers |= _attributes(self.module)
        names = [n for n, v in numbers.items() if (type(v) in (int, float) and abs(v) < 1) or (v is None and "eps" in n)]
        probe = self._probe(1e-3 * self._randn(*self.rows, *self.shape))
        outputs = {name: self._run(replace(probe, changed={name: OTHER_EPS})) for name in names}
        before = self._run(probe)
        if isinstance(before, Exception):
            raise self._fails(before)
        acting: list[str | float] = [n for n, after in outputs.items() if isinstance(after, Tensor) and not agree(after, before)]
        if acting:
            return acting
        for name in names:
            if "eps" in name:
                raise _NotProvedError(f"its output does not depend on its {name}")
        return [self._constant_epsilon()]

    def _constant_epsilon(self) -> float:
        """The epsilon that rows of tiny and of large elements of one magnitude show, where it is a number that somebody writes down."""
        sign = self._randn(*self.shape).sign().expand(*self.rows, *self.shape)
        tiny, large = 1e-12, 1e4
        probe = self._probe(sign, gate=torch.ones_like(sign))
        at_tiny, at_large = (self._run(replace(probe, x=size * sign)) for size in (tiny, large))
        if isinstance(at_tiny, Tensor) and isinstance(at_large, Tensor):
            ratio = (at_tiny.double() / at_large.double()).median().item()
            if 0 < ratio < 1:
                eps = tiny**2 * (ratio**-2 - 1)
                written = [float(f"{eps:.{digits}e}") for digits in range(4)] + [torch.finfo(dtype).eps for dtype in (F32, F16, B16)]
                for value in written:
                    if math.isclose(value, eps, rel_tol=1e-5):
                        return value
        raise _NotProvedError("it has no epsilon under the square root")

    def _probes(self, eps: str | float) -> Iterator[_Probe]:
        """All probes, those first that remove most; float32 before half precision."""
        n = math.prod(self.shape)
        copies = max(1, -(-4096 // (n * math.prod(self.rows))))  # enough elements for HALF_MISMATCHES to mean something
        rows = (copies * self.rows[0], *self.rows[1:])
        value = getattr(self.module, eps) if isinstance(eps, str) else eps
        near = math.sqrt(abs(value or torch.finfo(F32).eps))
        scales = torch.tensor([1, 1, 30, 0.05, near, 0.3 * near, 3 * near, 0]).repeat(math.prod(rows) // 8)
        x = self._randn(*rows, *self.shape) * scales.view(*rows, *[1] * len(self.shape))
        special = self._randn(math.prod(rows), *self.shape)
        special[0].view(-1)[0] = math.inf
        special[1].view(-1)[0] = math.nan
        special[2] *= 1e25  # its square overflows
        special[3] *= 1e-25

        yield self._probe(x, training=True)
        if isinstance(eps, str):
            yield self._probe(x, changed={eps: OTHER_EPS})
        yield self._probe(special.view_as(x))
        for dtype in (B16, F16):
            yield self._probe(x, dtype, dtype)
        yield self._probe(x, B16, B16, training=True)
        if self.weight is not None:
            for dtype, weight in itertools.permutations((F32, B16, F16), 2):
                yield self._probe(x, dtype, weight, required=False)
        flat = x.view(-1, *self.shape)
        for size in ((), (8,), (2, 4), (2, 2, 2)):
            yield self._probe(flat[: math.prod(size)].reshape(*size, *self.shape), B16, B16, required=False)
        yield self._probe(flat[:8].reshape(2, 4, *self.shape).transpose(0, 1), B16, B16, required=False)

    def _probe(self, x: Tensor, dtype: torch.dtype = F32, weight: torch.dtype = F32, gate: Tensor | None = None, **rest: Any) -> _Probe:
        if self.gated:
            gate = (self._randn(*x.shape) if gate is None else gate).to(weight)
        tensor = None if self.weight_shape is None else self._randn(*self.weight_shape).to(weight)
        return _Probe(x.to(dtype), gate if self.gated else None, tensor, **rest)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F32, device="cpu")

    def _run(self, probe: _Probe) -> Tensor | Exception:
        """What the original's forward returns for copies of the probe's tensors."""
        x, gate, weight = (None if t is None else t.clone().requires_grad_(t.requires_grad) for t in (probe.x, probe.gate, probe.weight))
        copied = _copy(self.module, weight, probe.training)
        vars(copied).update(probe.changed)
        inputs = [t for t in (x, gate) if t is not None]
        before = _state(copied)
        versions = [t._version for t in inputs]
        try:
            with self.calls:
                actual = self.cls.forward(copied, *inputs)
        except Exception as error:
            return error
        if versions != [t._version for t in inputs]:
            raise _NotProvedError("its forward changes its input")
        if before != _state(copied):
            raise _NotProvedError("its forward changes the module")
        if not isinstance(actual, Tensor):
            return TypeError(f"forward returns {type(actual).__name__}, not a tensor")
        return actual

    def _expected(self, semantics: Semantics, probe: _Probe, eps: str | float) -> Tensor:
        weight = probe.weight if semantics.scaled else None
        return evaluate(semantics, probe.x, weight, self._value(probe, eps), len(self.shape), probe.gate)

    def _value(self, probe: _Probe, eps: str | float) -> float | None:
        return probe.changed.get(eps, getattr(self.module, eps)) if isinstance(eps, str) else eps

    def _prove_gradients(self, semantics: Semantics, eps: str | float) -> None:
        """Of a random function of y, by autograd: so that nothing is detached that the formula differentiates."""
        probe = self._probe(self._randn(*self.rows, *self.shape))
        inputs = [t.requires_grad_() for t in (probe.x, probe.gate, probe.weight if semantics.scaled else None) if t is not None]
        actual, expected = self._run(probe), self._expected(semantics, probe, eps)
        if isinstance(actual, Exception):
            raise self._fails(actual)
        dy = self._randn(*expected.shape)
        wanted = torch.autograd.grad(expected, inputs, dy)
        found = torch.autograd.grad(actual, inputs, dy, allow_unused=True) if actual.requires_grad else [None] * len(inputs)
        for one, other in zip(found, wanted, strict=True):
            if one is None or not (one - other).abs().max() <= GRADIENT_TOLERANCE * other.abs().max():
                raise _NotProvedError(f"it computes {semantics}, but its gradient is another", resembles=True)

    def _fails(self, error: Exception | None) -> _NotProvedError:
        message = str(error).split("\n")[0]
        reason = f"its forward fails on a copy on the CPU: {type(error).__name__}: {message}"
        return _NotProvedError(reason, resembles=_sounds_like_rms(self.cls), ran=False)

    def _none_fits(self, probe: _Probe, actual: Tensor, candidates: list[Semantics], eps: str | float) -> _NotProvedError:
        """The reason, in words: what it is instead, if it is a known other thing."""
        if not probe.in_float32:
            dtypes = f"{probe.x.dtype} input" + (f" and {probe.weight.dtype} weight" if probe.weight is not None else "")
            return _NotProvedError(f"in float32 it computes {candidates[0]}, but for {dtypes} it rounds in no known order", resembles=True)
        x, value = probe.x, self._value(probe, eps) or 0.0
        over = tuple(range(-len(self.shape), 0))
        rms = x.square().mean(over, keepdim=True)
        centered = x - x.mean(over, keepdim=True)
        formulas = {
            "subtracts the mean": centered * torch.rsqrt(centered.square().mean(over, keepdim=True) + value),
            "divides by the unbiased standard deviation": x * torch.rsqrt(x.var(over, keepdim=True) + value),
            "divides by the L2 norm": x * torch.rsqrt(x.square().sum(over, keepdim=True) + value),
            "adds its epsilon outside the square root": x / (rms.sqrt() + value),
            "bounds the mean square by its epsilon": x * torch.rsqrt(rms.clamp_min(value)),
            "returns the reciprocal root mean square": torch.rsqrt(rms + value),
        }
        factors = (1.0, probe.weight, 1.0 + probe.weight) if probe.weight is not None and self.weight_shape == self.shape else (1.0,)
        for reason, formula in formulas.items():
            if any(agree(actual, (formula * factor).to(actual.dtype)) for factor in factors):
                return _NotProvedError(f"it {reason}")
        return _NotProvedError("it computes no RMS norm of its input")


def _copy(module: nn.Module, tensor: Tensor | None, training: bool) -> nn.Module:
    """A module of the same class and attributes without hooks, with `tensor` in place of its only one. No constructor runs."""
    copied = object.__new__(type(module))
    vars(copied).update(vars(nn.Module()))
    for name, value in _attributes(module).items():
        vars(copied)[name] = copy.copy(value) if isinstance(value, (list, dict, set)) else value
    copied.training = training
    named: list[tuple[dict, dict]] = [(copied._parameters, module._parameters), (copied._buffers, module._buffers)]
    for own, others in named:
        own.update({name: None if other is None else tensor for name, other in others.items()})
    copied._modules.update({name: None if child is None else _copy(child, None, training) for name, child in module._modules.items()})
    return copied


def _state(module: nn.Module) -> dict:
    """What a forward might change: compare two of one module."""
    attributes = {n: repr(v) if isinstance(v, (int, float, str, tuple, list, dict, set)) else id(v) for n, v in _attributes(module).items()}
    return attributes | {name: (id(t), t._version) for name, t in _tensors(module).items()}


def agree(actual: Tensor, expected: Tensor) -> bool:
    """Whether two outputs are of one norm, up to the last bits of float32 (see the top of this file)."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    info = torch.finfo(actual.dtype)
    relative = FLOAT32_TOLERANCE if actual.dtype == F32 else 4 * info.eps
    if not torch.isclose(actual, expected, rtol=relative, atol=2 * info.smallest_normal * info.eps, equal_nan=True).all():
        return False
    mismatches = ((actual != expected) & ~(actual.isnan() & expected.isnan())).sum().item()
    return actual.dtype == F32 or mismatches <= max(1, HALF_MISMATCHES * actual.numel())
