"""The proof of what a norm computes: its forward runs on a copy beside the closed list of semantics, and one of these must remain.

The copy is on the CPU and has random weights. The probes are: float32, bfloat16 and float16, weights of other dtypes than the input,
inputs of one to four dimensions and of several layouts, rows whose mean square is near eps, zeros, infinities and overflow, training and
evaluation, another epsilon, another number of columns, and gradients. The module itself is only looked at: its tensors, hooks and
attributes, random generators, grad mode and devices stay as they are, and its weights may be anywhere, also on the meta device.

What counts as equal. Two ways to write one formula, such as x / sqrt(v) and x · rsqrt(v), differ in the last bits of float32. So float32
outputs must agree to FLOAT32_TOLERANCE, element by element, and half-precision outputs must be equal bit for bit except for the share of
elements that such a difference tips over a rounding boundary, HALF_MISMATCHES. Another order of roundings changes tens of percent.
"""

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from triton_rmsnorm.patching.isolation import Draws, DrawsError, bare_copy
from triton_rmsnorm.patching.reads import INTERNAL, Reads
from triton_rmsnorm.patching.semantics import HALF, SEMANTICS, Norm, Semantics, evaluate, gated

# 8 units in the last place: the effect of rsqrt, pow, sqrt and division, and of other orders of summation.
FLOAT32_TOLERANCE = 2.0**-20
# 8 units of float32 tip 8 · 2^-13 of all float16 values over a boundary (2^-13 is the ratio of the units), and there may be two roundings.
HALF_MISMATCHES = 0.002
# Of gradients in float32, relative to the largest: they are sums over rows or columns.
GRADIENT_TOLERANCE = 1e-4
# What the epsilon of a copy is set to: it shows in rows of any scale up to 1.
OTHER_EPS = 0.03
# The epsilon of a copy where the module's is a tensor, whose value is not looked at.
EPS_OF_TENSORS = 1e-6
# A weight with more columns is first taken for one of these.
FEW_COLUMNS = 64
# Elements of a probe: enough for HALF_MISMATCHES to mean something.
ELEMENTS = 4096

F32, F16, B16 = torch.float32, torch.float16, torch.bfloat16

# Operators that CUDA's autocast runs in float32, and in half precision.
_TO_FLOAT32 = re.compile("pow|rsqrt|reciprocal|sum|prod|cumsum|cumprod|norm|linalg_vector_norm|c?dist|renorm|expm?1?|log(2|10|1p)?")
_TO_HALF = re.compile("mm|bmm|mv|addmm|addmv|addr|addbmm|baddbmm|matmul|linear|einsum|prelu")


class NotProvedError(Exception):
    """Why nothing is proved.

    Args:
        reason: in words, for the report.
        resembles: it looks like an RMS norm all the same.
        ran: its forward took what an RMS norm takes.
        other: it is a known other norm, such as a LayerNorm.
    """

    def __init__(self, reason: str, resembles: bool = False, ran: bool = True, other: bool = False):
        super().__init__(reason)
        self.resembles, self.ran, self.other = resembles, ran, other


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a module has that not every module has."""
    return {name: value for name, value in vars(module).items() if name not in INTERNAL}


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters and buffers, and tensors that are plain attributes."""
    named = (*module._parameters.items(), *module._buffers.items(), *attributes(module).items())
    return {name: value for name, value in named if isinstance(value, Tensor)}


def is_epsilon(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of a module looks like its epsilon."""
    return "eps" in name and not is_lazy(tensor) and tensor.numel() == 1


def agree(actual: Tensor, expected: Tensor) -> bool:
    """Whether two outputs are of one norm, up to the last bits of float32 (see the top of this file)."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if torch.equal(actual, expected):
        return True
    info = torch.finfo(actual.dtype)
    relative = FLOAT32_TOLERANCE if actual.dtype == F32 else 4 * info.eps
    if not torch.isclose(actual, expected, rtol=relative, atol=2 * info.smallest_normal * info.eps, equal_nan=True).all():
        return False
    mismatches = ((actual != expected) & ~(actual.isnan() & expected.isnan())).sum().item()
    return actual.dtype == F32 or mismatches <= max(1, HALF_MISMATCHES * actual.numel())


class _RMSNormCalls(TorchFunctionMode):
    """Notes whether torch's own rms_norm is called, and with input that autocast would cast."""

    called = casts = False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.rms_norm, F.rms_norm):
            self.called = True
            self.casts |= bool(args) and isinstance(args[0], Tensor) and args[0].dtype in HALF
        return func(*args, **(kwargs or {}))


class _Operators(Draws):
    """Notes whether autocast on a GPU would change what is computed. Refuses random numbers."""

    autocast = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if _TO_HALF.fullmatch(name):
            self.autocast = True
        elif _TO_FLOAT32.fullmatch(name):
            self.autocast |= any(isinstance(arg, Tensor) and arg.dtype in HALF for arg in args)
        return super().__torch_dispatch__(func, types, args, kwargs)


@dataclass(frozen=True)
class _Probe:
    """One run of the original: its input, and the state of the copy that it runs on."""

    x: Tensor
    gate: Tensor | None
    weight: Tensor | None  # in place of the module's only tensor beside its epsilon, used or not
    changed: dict[str, float] = field(default_factory=dict)  # epsilons
    training: bool = False
    required: bool = True  # False: the original may refuse the input

    @property
    def in_float32(self) -> bool:
        return self.x.dtype == F32 and (self.weight is None or self.weight.dtype == F32)


class Proof:
    """Probes run one after another, and each removes candidates.

    Args:
        module: a module with at most one tensor beside its epsilon.
        reads: what its forward may read.
        inputs: how many tensors its forward requires, and how many it accepts, of two.

    Raises:
        NotProvedError: its tensors are not what a norm has.
    """

    def __init__(self, module: nn.Module, reads: Reads, inputs: tuple[int, int]):
        self.module, self.reads, self.inputs = module, reads, inputs
        self.cls = type(module)
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.calls, self.operators = _RMSNormCalls(), _Operators()
        self.weight: str | None = None  # the name of its only tensor beside its epsilon, used or not
        self.weight_shape: tuple[int, ...] | None = None
        for name, tensor in own_tensors(module).items():
            self._check_tensor(name, tensor)
            if not is_epsilon(name, tensor):
                self.weight, self.weight_shape = name, tuple(tensor.shape)
        self.gated = False
        self.shape: tuple[int, ...] = ()  # what is normalized
        self.rows: tuple[int, ...] = ()  # outer dimensions that the original takes

    def _check_tensor(self, name: str, tensor: Tensor) -> None:
        sounds = "RMS" in self.cls.__name__
        if is_lazy(tensor):
            raise NotProvedError(f"its {name} is not initialized yet", sounds, ran=False)
        if tensor.numel() == 0:
            raise NotProvedError(f"its {name} is empty, as where ZeRO-3 or FSDP has partitioned it: {BEFORE_WRAPPING}", True, ran=False)
        if name in vars(self.module):
            flat = f"its {name} is a tensor, but neither parameter nor buffer, as where FSDP has flattened it: {BEFORE_WRAPPING}"
            raise NotProvedError(flat, sounds)
        if not tensor.is_floating_point():
            raise NotProvedError(f"its {name} is {tensor.dtype}", sounds)
        if is_epsilon(name, tensor) and name in self.module._parameters:
            raise NotProvedError(f"its {name} is a parameter, for which it would need a gradient", sounds)

    def norm(self) -> Norm:
        """What is proved: of few columns, if more are like these, or else of as many as the weight has.

        Raises:
            NotProvedError: nothing.
        """
        shape = self.weight_shape
        if shape is not None and len(_squeezed(shape)) == 1 and shape[-1] > FEW_COLUMNS:
            self.weight_shape = (*shape[:-1], FEW_COLUMNS)
            with suppress(NotProvedError):
                norm = self._norm()
                if self._same_of(norm, shape):
                    return norm
            self.weight_shape = shape
            self.calls, self.operators = _RMSNormCalls(), _Operators()
        return self._norm()

    def _same_of(self, norm: Norm, weight_shape: tuple[int, ...]) -> bool:
        """Whether it computes `norm` also with a weight of this shape."""
        self.weight_shape, self.shape = weight_shape, weight_shape[-1:]
        rows = (1,) * (len(self.rows) - 1)
        x = self._randn(*rows, 2, *self.shape) * torch.tensor([[1.0], [1e-3]], dtype=F32)
        for dtype in (F32, B16):
            probe = self._probe(x, dtype, dtype)
            actual = self._run(probe)
            if not isinstance(actual, Tensor) or not self._fitting([norm.semantics], probe, actual, norm.eps):
                return False
        return norm.shape is None

    def _norm(self) -> Norm:
        required, accepted = self.inputs
        refusals: list[NotProvedError] = []
        for self.gated in (True, False)[2 - accepted : 3 - required]:
            try:
                self._find_shape()
                for eps in self._epsilons():
                    try:
                        return self._prove(eps)
                    except NotProvedError as refused:
                        refusals.append(refused)
            except NotProvedError as refused:
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
            remaining = self._fitting(candidates, probe, actual, eps)
            if not remaining:
                raise self._none_fits(probe, actual, candidates, eps)
            candidates = remaining
        if len(candidates) > 1:
            raise NotProvedError(f"more than one semantics fits: {'; '.join(map(str, candidates))}", resembles=True)
        semantics = candidates[0]
        self._prove_gradients(semantics, eps)
        return Norm(
            semantics,
            self.weight if semantics.scaled else None,
            eps,
            len(self.shape),
            None if self._takes_other_shapes(semantics, eps) else self.shape,
            self._strides(),
            self._autocast(semantics),
            self.reads.without(eps),
        )

    def _fitting(self, candidates: list[Semantics], probe: _Probe, actual: Tensor, eps: str | float) -> list[Semantics]:
        formulas = {c: c.in_float32() if probe.in_float32 else c for c in candidates}
        fits = {formula: agree(actual, self._expected(formula, probe, eps)) for formula in set(formulas.values())}
        return [c for c in candidates if fits[formulas[c]]]

    def _candidates(self) -> Iterator[Semantics]:
        n = math.prod(self.shape)
        numbers = {v for v in attributes(self.module).values() if type(v) is int and v > 0 and n % v == 0}
        groups = sorted({size for v in numbers for size in (v, n // v) if 1 < size < n}) if len(self.shape) == 1 else []
        for semantics, group_size in itertools.product(SEMANTICS, (None, *groups)):
            if not semantics.scaled or (self.weight_shape is not None and _squeezed(self.weight_shape) == _squeezed(self.shape)):
                semantics = replace(semantics, group_size=group_size)
                yield from gated(semantics) if self.gated else [semantics]

    def _find_shape(self) -> None:
        """Sets a shape that the module normalizes, its weight's or one that it declares or takes, and outer dimensions that it takes."""
        values = attributes(self.module)
        declared = values.get("normalized_shape")
        weight = None if self.weight_shape is None else _squeezed(self.weight_shape)
        hints = [declared if isinstance(declared, (tuple, list)) else None, (64,) if weight == (1,) else weight, weight, (64,)]
        hints += [(v,) for v in values.values() if type(v) is int and 1 < v <= 1 << 16]
        if weight is not None and len(weight) > 1 and weight[-1] == 1:
            raise self._other_dimension() or NotProvedError(f"its {self.weight} has shape {self.weight_shape}")
        failure: Exception | None = None
        for hint, self.rows in itertools.product(hints, ((8,), (2, 4), (2, 2, 2))):
            if hint and all(type(size) is int and size > 0 for size in hint):
                self.shape = tuple(hint)
                if not self._has_rank(self.rows):
                    continue
                actual = self._run(self._probe(self._randn(*self.rows, *self.shape)))
                if isinstance(actual, Tensor):
                    if weight == (1,) and self.shape != (1,):
                        raise NotProvedError(f"its {self.weight} is one number for all columns")
                    return
                failure = failure or actual
        raise self._other_dimension() or self._fails(failure)

    def _has_rank(self, rows: tuple[int, ...]) -> bool:
        """Whether input with these outer dimensions has as many dimensions as the weight, over which the weight is broadcast."""
        return len(rows) + len(self.shape) >= len(self.weight_shape or ())

    def _other_dimension(self) -> NotProvedError | None:
        """The reason, if it normalizes dimension 1 of a larger input."""
        if self.weight_shape is None or self.gated:
            return None
        columns = math.prod(self.weight_shape)
        for rest in ((5,), (3, 5), (2, 3, 5)):
            probe = self._probe(self._randn(2, columns, *rest))
            actual = self._run(probe)
            if isinstance(actual, Tensor) and actual.shape == probe.x.shape and probe.weight is not None:
                shape = (columns, *(1,) * len(rest))
                expected = probe.x * torch.rsqrt(probe.x.square().mean(1, keepdim=True)) * probe.weight.reshape(shape)
                if torch.allclose(actual, expected, rtol=0.1, atol=0.01):
                    return NotProvedError("it normalizes dimension 1, not the last")
        return None

    def _epsilons(self) -> list[str | float]:
        """Where the epsilon may be: attributes that change what is computed of small input, else a constant."""
        numbers: dict[str, Any] = {}
        for base in reversed(self.cls.__mro__):
            numbers |= {name: v for name, v in vars(base).items() if type(v) is float}
        numbers |= attributes(self.module)
        numbers |= {".".join(path): v for root, path, v in self.reads.values if not root and len(path) > 1}
        names = [n for n, v in numbers.items() if (type(v) in (int, float) and abs(v) < 1) or (v is None and "eps" in n)]
        names += [name for name, tensor in own_tensors(self.module).items() if is_epsilon(name, tensor)]
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
                raise NotProvedError(f"its output does not depend on its {name}")
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
        raise NotProvedError("it has no epsilon under the square root")

    def _probes(self, eps: str | float) -> Iterator[_Probe]:
        """All probes, those first that remove most; float32 before half precision."""
        copies = max(1, -(-ELEMENTS // (math.prod(self.shape) * math.prod(self.rows))))
        rows = (copies * self.rows[0], *self.rows[1:])
        near = math.sqrt(abs(self._value({}, eps) or torch.finfo(F32).eps))
        scales = torch.tensor([1, 1, 30, 0.05, near, 0.3 * near, 3 * near, 0], dtype=F32).repeat(math.prod(rows) // 8)
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
        for size in filter(self._has_rank, ((), (8,), (2, 4), (2, 2, 2))):
            yield self._probe(flat[: math.prod(size)].reshape(*size, *self.shape), B16, B16, required=False)
        yield from self._layouts()

    def _layouts(self) -> list[_Probe]:
        """Input that is not contiguous: a slice; without a gate also transposed, of another stride than 1 in a row, and channels_last."""
        slices = self._randn(2, 2, 4, *self.shape[:-1], 2 * self.shape[-1])[..., : self.shape[-1]]
        layouts = [slices[0]]
        if not self.gated:
            layouts.append(self._randn(2, 4, *self.shape).transpose(0, 1))
            if len(self.shape) == 1:
                layouts.append(self._randn(2, *self.shape, 4).transpose(1, 2))
                layouts.append(self._randn(2, 3, 2, *self.shape).to(memory_format=torch.channels_last))
        layouts = [layout for layout in layouts if layout.dim() >= len(self.weight_shape or ())]
        return [self._probe(layout, gate=slices[1], required=False) for layout in layouts]

    def _strides(self) -> Any:
        """Norm.strides."""
        outputs = [(probe.x, self._run(probe)) for probe in self._layouts()]
        found = [(x, y.stride()) for x, y in outputs if isinstance(y, Tensor)]
        rules: dict[str, Callable[[Tensor], tuple[int, ...]]] = {
            "input": lambda x: torch.empty_like(x).stride(),
            "rms_norm": lambda x: F.rms_norm(x, self.shape).stride(),
            "contiguous": lambda x: torch.empty(x.shape).stride(),
        }
        return next((name for name, rule in rules.items() if all(rule(x) == strides for x, strides in found)), None)

    def _autocast(self, semantics: Semantics) -> Any:
        """Norm.autocast."""
        if self.calls.casts and semantics == semantics.in_float32() and not self.reads.autocast:
            return "rms_norm"
        return "other" if self.reads.autocast or self.calls.casts or self.operators.autocast else "unaffected"

    def _takes_other_shapes(self, semantics: Semantics, eps: str | float) -> bool:
        """Whether it computes the same of rows of twice the length, with a weight of that length."""
        shape = (2 * self.shape[0], *self.shape[1:])
        x = self._randn(*self.rows, *shape)
        probe = self._probe(x)
        if probe.weight is not None and semantics.scaled:
            probe = replace(probe, weight=torch.cat([probe.weight] * 2, dim=probe.weight.dim() - len(shape)))
        actual = self._run(probe)
        return isinstance(actual, Tensor) and bool(self._fitting([semantics], probe, actual, eps))

    def _probe(self, x: Tensor, dtype: torch.dtype = F32, weight: torch.dtype = F32, gate: Tensor | None = None, **rest: Any) -> _Probe:
        if self.gated:
            gate = (self._randn(*x.shape) if gate is None else gate).to(weight)
        tensor = None if self.weight_shape is None else self._randn(*self.weight_shape).to(weight)
        return _Probe(x.to(dtype), gate if self.gated else None, tensor, **rest)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F32, device="cpu")

    def _run(self, probe: _Probe) -> Tensor | Exception:
        """What the original's forward returns for copies of the probe's tensors."""
        x, gate, weight = (None if t is None else _cloned(t) for t in (probe.x, probe.gate, probe.weight))
        copied = self._copy(self.module, weight, probe.training, probe.changed)
        inputs = [t for t in (x, gate) if t is not None]
        before = _state(copied)
        versions = [t._version for t in inputs]
        try:
            with self.calls, self.operators:
                actual = self.cls.forward(copied, *inputs)
        except DrawsError as error:
            raise NotProvedError(str(error)) from None
        except Exception as error:  # of any kind: it is other people's code
            return error
        if versions != [t._version for t in inputs]:
            raise NotProvedError("its forward changes its input")
        if before != _state(copied):
            raise NotProvedError("its forward changes the module")
        if not isinstance(actual, Tensor):
            return TypeError(f"forward returns {type(actual).__name__}, not a tensor")
        return actual

    def _copy(self, module: nn.Module, weight: Tensor | None, training: bool, changed: dict[str, float]) -> nn.Module:
        """A module of the same class and attributes with `weight` in place of its tensor, and other epsilons."""
        copied = bare_copy(module)
        copied.training = training
        named: list[tuple[dict, dict]] = [(copied._parameters, module._parameters), (copied._buffers, module._buffers)]
        for own, others in named:
            for name, tensor in others.items():
                if tensor is not None and is_epsilon(name, tensor):
                    own[name] = torch.full(tensor.shape, changed.get(name, EPS_OF_TENSORS), dtype=F32)
                else:
                    own[name] = None if tensor is None else weight
        for name, value in changed.items():
            if name not in copied._buffers:
                _set(copied, name, value)
        for name, child in module._modules.items():
            copied._modules[name] = None if child is None else self._copy(child, None, training, {})
        return copied

    def _expected(self, semantics: Semantics, probe: _Probe, eps: str | float) -> Tensor:
        weight = probe.weight if semantics.scaled else None
        if weight is not None:
            weight = weight.reshape(weight.shape[weight.dim() - len(self.shape) :])
        return evaluate(semantics, probe.x, weight, self._value(probe.changed, eps), len(self.shape), probe.gate)

    def _value(self, changed: dict[str, float], eps: str | float) -> float | None:
        if not isinstance(eps, str):
            return eps
        value = changed.get(eps, attrgetter(eps)(self.module))
        return EPS_OF_TENSORS if isinstance(value, Tensor) else value

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
                raise NotProvedError(f"it computes {semantics}, but its gradient is another", resembles=True)

    def _fails(self, error: Exception | None) -> NotProvedError:
        message = str(error).split("\n")[0]
        reason = f"its forward fails on a copy on the CPU: {type(error).__name__}: {message}"
        return NotProvedError(reason, resembles=sounds_like_rms(self.cls), ran=False)

    def _none_fits(self, probe: _Probe, actual: Tensor, candidates: list[Semantics], eps: str | float) -> NotProvedError:
        """The reason, in words: what it is instead, if it is a known other thing."""
        if not probe.in_float32:
            dtypes = f"{probe.x.dtype} input" + (f" and {probe.weight.dtype} weight" if probe.weight is not None else "")
            return NotProvedError(f"in float32 it computes {candidates[0]}, but for {dtypes} it rounds in no known order", resembles=True)
        x, value = probe.x, self._value(probe.changed, eps) or 0.0
        over = tuple(range(-len(self.shape), 0))
        mean_square = x.square().mean(over, keepdim=True)
        centered = x - x.mean(over, keepdim=True)
        formulas = {
            "subtracts the mean": centered * torch.rsqrt(centered.square().mean(over, keepdim=True) + value),
            "divides by the unbiased standard deviation": x * torch.rsqrt(x.var(over, keepdim=True) + value),
            "divides by the L2 norm": x * torch.rsqrt(x.square().sum(over, keepdim=True) + value),
            "adds its epsilon outside the square root": x / (mean_square.sqrt() + value),
            "clamps the mean square by its epsilon": x * torch.rsqrt(mean_square.clamp_min(value)),
            "clamps the root mean square by its epsilon": x / mean_square.sqrt().clamp_min(value),
            "returns the reciprocal root mean square": torch.rsqrt(mean_square + value),
        }
        factors: tuple = (1.0,)
        if probe.weight is not None and _squeezed(tuple(probe.weight.shape)) == _squeezed(self.shape):
            factors = (1.0, probe.weight, 1.0 + probe.weight)
        for reason, formula in formulas.items():
            if any(agree(actual, (formula * factor).to(actual.dtype)) for factor in factors):
                return NotProvedError(f"it {reason}", other=reason == "subtracts the mean")
        return NotProvedError("it computes no RMS norm of its input")


BEFORE_WRAPPING = "patch the model before it is wrapped, on every rank"


def sounds_like_rms(cls: type) -> bool:
    """Whether a class is called an RMS norm."""
    name = cls.__name__
    return "RMS" in name or "Rms" in name or "_rms" in name or name.startswith("rms")  # not LayerNormSomething


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without leading dimensions of size 1, over which a weight is broadcast."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _cloned(tensor: Tensor) -> Tensor:
    """With the same strides, also where there are gaps."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)


def _set(module: nn.Module, path: str, value: float) -> None:
    """Sets an attribute of a module, or of an object that is one, which is copied."""
    *owners, name = path.split(".")
    owner: Any = module
    for attribute in owners:
        owner_copy = copy.copy(getattr(owner, attribute))
        vars(owner)[attribute] = owner_copy
        owner = owner_copy
    vars(owner)[name] = value


def _state(module: nn.Module) -> dict:
    """What a forward might change: compare two of one module."""
    values = {n: repr(v) if isinstance(v, (int, float, str, tuple, list, dict, set)) else id(v) for n, v in attributes(module).items()}
    return values | {name: (id(t), t._version) for name, t in own_tensors(module).items()}
