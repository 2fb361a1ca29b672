"""The proof of what a norm computes: its forward runs on a copy beside the closed list of semantics, and one of these must remain.

The probes are: float32, bfloat16 and float16, weights of other dtypes than the input, inputs of one to four dimensions and of several
layouts, rows whose mean square is near eps, zeros, infinities and overflow, training and evaluation, another epsilon, another number of
columns, and gradients. The module itself is only looked at: its tensors, hooks and attributes, random generators, grad mode and devices
stay as they are, and its weights may be anywhere, also on the meta device.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triton_rmsnorm.patching.inspection import attributes, is_epsilon, own_tensors, squeezed
from triton_rmsnorm.patching.probes import B16, EPS_OF_TENSORS, F16, F32, Probe, Subject, agree
from triton_rmsnorm.patching.reads import Reads
from triton_rmsnorm.patching.reasons import check_tensors, fails, none_fits, other_dimension
from triton_rmsnorm.patching.report import LeftAloneError
from triton_rmsnorm.patching.semantics import SEMANTICS, Norm, Semantics, evaluate, gated

# Of gradients in float32, relative to the largest: they are sums over rows or columns.
GRADIENT_TOLERANCE = 1e-4
# What the epsilon of a copy is set to: it shows in rows of any scale up to 1.
OTHER_EPS = 0.03
# A weight with more columns is first taken for one of these.
FEW_COLUMNS = 64
# Elements of a probe: enough for HALF_MISMATCHES to mean something.
ELEMENTS = 4096
# Outer dimensions of probes.
ROWS: tuple[tuple[int, ...], ...] = ((), (8,), (2, 4), (2, 2, 2))


def _with_outliers(x: Tensor, dims: int = 1) -> Tensor:
    """x with rows in which one element is nearly all: it shows if x_hat is limited, which is at most the root of the number of columns."""
    rows = x.flatten(-dims).flatten(0, -2)
    rows[1::4, 0], rows[2::4, -1] = 1e3, -1e3
    return rows.view_as(x)


class Proof:
    """Probes run one after another, and each removes candidates.

    Args:
        module: a module with at most one tensor beside its epsilon.
        reads: what its forward may read.
        inputs: how many tensors its forward requires, and how many it accepts, of two.

    Raises:
        LeftAloneError: its tensors are not what a norm has.
    """

    def __init__(self, module: nn.Module, reads: Reads, inputs: tuple[int, int]):
        check_tensors(module)
        self.module, self.reads, self.inputs = module, reads, inputs
        self.subject = Subject(module)
        self.shape: tuple[int, ...] = ()  # what is normalized
        self.rows: tuple[int, ...] = ()  # outer dimensions that the original takes

    def norm(self) -> Norm:
        """What is proved: of few columns, if more are like these, or else of as many as the weight has.

        Raises:
            LeftAloneError: nothing.
        """
        shape = self.subject.weight_shape
        if shape is not None and len(squeezed(shape)) == 1 and shape[-1] > FEW_COLUMNS:
            self.subject.weight_shape = (*shape[:-1], FEW_COLUMNS)
            with suppress(LeftAloneError):
                norm = self._norm()
                if self._same_of(norm, shape):
                    return norm
            self.subject.weight_shape = shape
            self.subject.forget()
        return self._norm()

    def _same_of(self, norm: Norm, weight_shape: tuple[int, ...]) -> bool:
        """Whether it computes `norm` also with a weight of this shape."""
        self.subject.weight_shape, self.shape = weight_shape, weight_shape[-1:]
        rows = (1,) * (len(self.rows) - 1)
        x = _with_outliers(self.subject.randn(*rows, 4, *self.shape) * torch.tensor([[1.0], [1.0], [1.0], [1e-3]], dtype=F32))
        for dtype in (F32, B16):
            probe = self.subject.probe(x, dtype, dtype)
            actual = self.subject.run(probe)
            if not isinstance(actual, Tensor) or not self._fitting([norm.semantics], probe, actual, norm.eps):
                return False
        return norm.shape is None

    def _norm(self) -> Norm:
        required, accepted = self.inputs
        refusals: list[LeftAloneError] = []
        for self.subject.gated in (True, False)[2 - accepted : 3 - required]:
            try:
                self._find_shape()
                for eps in self._epsilons():
                    try:
                        return self._prove(eps)
                    except LeftAloneError as refused:
                        refusals.append(refused)
            except LeftAloneError as refused:
                refusals.append(refused)
        raise max(reversed(refusals), key=lambda refused: (refused.resembles, refused.ran))

    def _prove(self, eps: str | float) -> Norm:
        candidates = list(self._candidates())
        for probe in self._probes(eps):
            actual = self.subject.run(probe)
            if isinstance(actual, BaseException):
                if probe.required:
                    raise fails(self.subject, actual)
                continue
            remaining = self._fitting(candidates, probe, actual, eps)
            if not remaining:
                raise none_fits(probe, actual, candidates, self._value(probe.changed, eps) or 0.0, self.shape)
            candidates = remaining
        if len(candidates) > 1:
            raise LeftAloneError(f"more than one semantics fits: {'; '.join(map(str, candidates))}", resembles=True)
        semantics = candidates[0]
        for training in (False, True):
            self._prove_gradients(semantics, eps, training)
        return Norm(
            semantics,
            self.subject.weight if semantics.scaled else None,
            eps,
            self._value({}, eps) is None,
            len(self.shape),
            None if self._takes_other_shapes(semantics, eps) else self.shape,
            self._outer_dims(),
            self._strides(),
            self._autocast(semantics),
            self.reads.without(eps),
        )

    def _fitting(self, candidates: list[Semantics], probe: Probe, actual: Tensor, eps: str | float) -> list[Semantics]:
        formulas = {c: c.in_float32() if probe.in_float32 else c for c in candidates}
        fits = {formula: agree(actual, self._expected(formula, probe, eps), probe.coarsest) for formula in set(formulas.values())}
        return [c for c in candidates if fits[formulas[c]]]

    def _candidates(self) -> Iterator[Semantics]:
        n = math.prod(self.shape)
        numbers = {v for v in attributes(self.module).values() if type(v) is int and v > 0 and n % v == 0}
        groups = sorted({size for v in numbers for size in (v, n // v) if 1 < size < n}) if len(self.shape) == 1 else []
        for semantics, group_size in itertools.product(SEMANTICS, (None, *groups)):
            if not semantics.scaled or (
                self.subject.weight_shape is not None and squeezed(self.subject.weight_shape) == squeezed(self.shape)
            ):
                semantics = replace(semantics, group_size=group_size)
                yield from gated(semantics) if self.subject.gated else [semantics]

    def _find_shape(self) -> None:
        """Sets a shape that the module normalizes, its weight's or one that it declares or takes, and outer dimensions that it takes."""
        values = attributes(self.module)
        declared = values.get("normalized_shape")
        weight = None if self.subject.weight_shape is None else squeezed(self.subject.weight_shape)
        if weight is not None and (len(weight) == 1 or weight[-1] == 1) and (reason := other_dimension(self.subject)) is not None:
            raise reason
        hints = [declared if isinstance(declared, (tuple, list)) else None, (64,) if weight == (1,) else weight, weight, (64,)]
        hints += [(v,) for v in values.values() if type(v) is int and 1 < v <= 1 << 16]
        failure: BaseException | None = None
        for hint, self.rows in itertools.product(hints, ROWS[1:]):
            if hint and all(type(size) is int and size > 0 for size in hint):
                self.shape = tuple(hint)
                if not self._has_rank(self.rows):
                    continue
                actual = self.subject.run(self.subject.probe(self.subject.randn(*self.rows, *self.shape)))
                if isinstance(actual, Tensor):
                    if weight == (1,) and self.shape != (1,):
                        raise LeftAloneError(f"its {self.subject.weight} is one number for all columns")
                    return
                failure = failure or actual
        raise fails(self.subject, failure)

    def _has_rank(self, rows: tuple[int, ...]) -> bool:
        """Whether input with these outer dimensions has as many dimensions as the weight, over which the weight is broadcast."""
        return len(rows) + len(self.shape) >= len(self.subject.weight_shape or ())

    def _outer_dims(self) -> tuple[int, ...] | None:
        """Norm.outer_dims."""
        tried = list(filter(self._has_rank, ROWS))
        taken = [len(rows) for rows in tried if self._takes(*rows, *self.shape)]
        return None if len(taken) == len(tried) else tuple(taken)

    def _takes(self, *shape: int) -> bool:
        return isinstance(self.subject.run(self.subject.probe(self.subject.randn(*shape))), Tensor)

    def _epsilons(self) -> list[str | float]:
        """Where the epsilon may be: attributes that change what is computed of small input, else a constant."""
        numbers: dict[str, Any] = {}
        for base in reversed(self.subject.cls.__mro__):
            numbers |= {name: v for name, v in vars(base).items() if type(v) is float}
        numbers |= attributes(self.module)
        paths = {path: v for root, path, v in self.reads.values if not root and len(path) > 1}
        named = {path: v for path, v in paths.items() if all(type(step) is str and not step.startswith("__") for step in path)}
        numbers |= {".".join(map(str, path)): v for path, v in named.items()}
        names = [n for n, v in numbers.items() if (type(v) in (int, float) and abs(v) < 1) or (v is None and "eps" in n)]
        names += [name for name, tensor in own_tensors(self.module).items() if is_epsilon(name, tensor)]
        probe = self.subject.probe(1e-3 * self.subject.randn(*self.rows, *self.shape))
        outputs = {name: self.subject.run(replace(probe, changed={name: OTHER_EPS})) for name in names}
        before = self.subject.run(probe)
        if isinstance(before, BaseException):
            raise fails(self.subject, before)
        acting: list[str | float] = [n for n, after in outputs.items() if isinstance(after, Tensor) and not agree(after, before)]
        if acting:
            return acting
        for name in names:
            if "eps" in name:
                raise LeftAloneError(f"its output does not depend on its {name}")
        return [self._constant_epsilon()]

    def _constant_epsilon(self) -> float:
        """The epsilon that rows of tiny and of large elements of one magnitude show, where it is a number that somebody writes down."""
        sign = self.subject.randn(*self.shape).sign().expand(*self.rows, *self.shape)
        tiny, large = 1e-12, 1e4
        probe = self.subject.probe(sign, gate=torch.ones_like(sign))
        at_tiny, at_large = (self.subject.run(replace(probe, x=size * sign)) for size in (tiny, large))
        if isinstance(at_tiny, Tensor) and isinstance(at_large, Tensor):
            ratio = (at_tiny.double() / at_large.double()).median().item()
            if 0 < ratio < 1:
                eps = tiny**2 * (ratio**-2 - 1)
                written = [float(f"{eps:.{digits}e}") for digits in range(4)] + [torch.finfo(dtype).eps for dtype in (F32, F16, B16)]
                for value in written:
                    if math.isclose(value, eps, rel_tol=1e-5):
                        return value
        raise LeftAloneError("it has no epsilon under the square root")

    def _probes(self, eps: str | float) -> Iterator[Probe]:
        """All probes, those first that remove most; float32 before half precision."""
        copies = max(1, -(-ELEMENTS // (math.prod(self.shape) * math.prod(self.rows))))
        rows = (copies * self.rows[0], *self.rows[1:])
        near = math.sqrt(abs(self._value({}, eps) or torch.finfo(F32).eps))
        scales = torch.tensor([1, 1, 30, 0.05, near, 0.3 * near, 3 * near, 0], dtype=F32).repeat(math.prod(rows) // 8)
        x = _with_outliers(self.subject.randn(*rows, *self.shape) * scales.view(*rows, *[1] * len(self.shape)), len(self.shape))
        special = self.subject.randn(math.prod(rows), *self.shape)
        special[0].view(-1)[0] = math.inf
        special[1].view(-1)[0] = math.nan
        special[2] *= 1e25  # its square overflows
        special[3] *= 1e-25

        yield self.subject.probe(x, training=True)
        if isinstance(eps, str):
            for value in (OTHER_EPS, 0.0):
                yield self.subject.probe(x, changed={eps: value}, required=value > 0)
        yield self.subject.probe(special.view_as(x))
        for dtype in (B16, F16):
            yield self.subject.probe(x, dtype, dtype)
            probe = self.subject.probe(special.view_as(x), dtype, dtype)
            yield replace(probe, weight=None if probe.weight is None else 4096 * probe.weight)  # so that products overflow
        yield self.subject.probe(x, B16, B16, training=True)
        if self.subject.weight is not None:
            for dtype, weight in itertools.permutations((F32, B16, F16), 2):
                probe = self.subject.probe(x, dtype, weight, required=False)
                yield from [probe] if probe.gate is None else [probe, replace(probe, gate=probe.gate.to(dtype))]
        flat = x.view(-1, *self.shape)
        for size in filter(self._has_rank, ROWS):
            yield self.subject.probe(flat[: math.prod(size)].reshape(*size, *self.shape), B16, B16, required=False)
        yield from self._layouts()

    def _layouts(self) -> list[Probe]:
        """Input that is not contiguous: a slice; without a gate also transposed, of another stride than 1 in a row, and channels_last."""
        slices = self.subject.randn(2, 2, 4, *self.shape[:-1], 2 * self.shape[-1])[..., : self.shape[-1]]
        layouts = [slices[0]]
        if not self.subject.gated:
            layouts.append(self.subject.randn(2, 4, *self.shape).transpose(0, 1))
            if len(self.shape) == 1:
                layouts.append(self.subject.randn(2, *self.shape, 4).transpose(1, 2))
                layouts.append(self.subject.randn(2, 3, 2, *self.shape).to(memory_format=torch.channels_last))
        layouts = [layout for layout in layouts if layout.dim() >= len(self.subject.weight_shape or ())]
        return [self.subject.probe(layout, gate=slices[1], required=False) for layout in layouts]

    def _strides(self) -> Any:
        """Norm.strides."""
        outputs = [(probe.x, self.subject.run(probe)) for probe in self._layouts()]
        found = [(x, y.stride()) for x, y in outputs if isinstance(y, Tensor)]
        rules: dict[str, Callable[[Tensor], tuple[int, ...]]] = {
            "input": lambda x: torch.empty_like(x).stride(),
            "rms_norm": lambda x: F.rms_norm(x, self.shape).stride(),
            "contiguous": lambda x: torch.empty(x.shape).stride(),
        }
        return next((name for name, rule in rules.items() if all(rule(x) == strides for x, strides in found)), None)

    def _autocast(self, semantics: Semantics) -> Any:
        """Norm.autocast."""
        if self.subject.calls.casts and semantics == semantics.in_float32() and not self.reads.autocast:
            return "rms_norm"
        return "other" if self.reads.autocast or self.subject.calls.casts or self.subject.operators.autocast else "unaffected"

    def _takes_other_shapes(self, semantics: Semantics, eps: str | float) -> bool:
        """Whether it computes the same of rows of twice the length, with a weight of that length."""
        shape = (2 * self.shape[0], *self.shape[1:])
        x = self.subject.randn(*self.rows, *shape)
        probe = self.subject.probe(x)
        if probe.weight is not None and semantics.scaled:
            probe = replace(probe, weight=torch.cat([probe.weight] * 2, dim=probe.weight.dim() - len(shape)))
        actual = self.subject.run(probe)
        return isinstance(actual, Tensor) and bool(self._fitting([semantics], probe, actual, eps))

    def _expected(self, semantics: Semantics, probe: Probe, eps: str | float) -> Tensor:
        weight = probe.weight if semantics.scaled else None
        if weight is not None:
            weight = weight.reshape(weight.shape[weight.dim() - len(self.shape) :])
        return evaluate(semantics, probe.x, weight, self._value(probe.changed, eps), len(self.shape), probe.gate)

    def _value(self, changed: dict[str, float], eps: str | float) -> float | None:
        if not isinstance(eps, str):
            return eps
        value = changed.get(eps, attrgetter(eps)(self.module))
        return EPS_OF_TENSORS if isinstance(value, Tensor) else value

    def _prove_gradients(self, semantics: Semantics, eps: str | float, training: bool) -> None:
        """Of a random function of y, by autograd: so that nothing is detached that the formula differentiates."""
        probe = self.subject.probe(self.subject.randn(*self.rows, *self.shape), training=training)
        inputs = [t.requires_grad_() for t in (probe.x, probe.gate, probe.weight if semantics.scaled else None) if t is not None]
        actual, expected = self.subject.run(probe), self._expected(semantics, probe, eps)
        if isinstance(actual, BaseException):
            raise fails(self.subject, actual)
        dy = self.subject.randn(*expected.shape)
        wanted = torch.autograd.grad(expected, inputs, dy)
        found = torch.autograd.grad(actual, inputs, dy, allow_unused=True) if actual.requires_grad else [None] * len(inputs)
        for one, other in zip(found, wanted, strict=True):
            if one is None or not (one - other).abs().max() <= GRADIENT_TOLERANCE * other.abs().max():
                raise LeftAloneError(f"it computes {semantics}, but its gradient is another", resembles=True)
