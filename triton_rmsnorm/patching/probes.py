"""Probes: a forward runs on a copy of its module, on the CPU and with other weights, and its output is compared.

What counts as equal. Two ways to write one formula, such as x / sqrt(v) and x · rsqrt(v), differ in the last bits of float32. So float32
outputs must agree to FLOAT32_TOLERANCE, element by element, and half-precision outputs must be equal bit for bit except for the share of
elements that such a difference tips over a rounding boundary, HALF_MISMATCHES. Another order of roundings changes tens of percent.
"""

import copy
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from triton_rmsnorm.patching.inspection import attributes, is_epsilon, own_tensors
from triton_rmsnorm.patching.isolation import Draws, copy_with
from triton_rmsnorm.patching.report import LeftAloneError
from triton_rmsnorm.patching.semantics import HALF

# 8 units in the last place: the effect of rsqrt, pow, sqrt and division, and of other orders of summation.
FLOAT32_TOLERANCE = 2.0**-20
# 8 units of float32 tip 8 · 2^-13 of all float16 values over a boundary (2^-13 is the ratio of the units), and there may be two roundings.
HALF_MISMATCHES = 0.002
# The epsilon of a copy where the module's is a tensor, whose value is not looked at.
EPS_OF_TENSORS = 1e-6

F32, F16, B16 = torch.float32, torch.float16, torch.bfloat16

# Operators that CUDA's autocast runs in float32, and in half precision.
_TO_FLOAT32 = re.compile("pow|rsqrt|reciprocal|sum|prod|cumsum|cumprod|norm|linalg_vector_norm|c?dist|renorm|expm?1?|log(2|10|1p)?")
_TO_HALF = re.compile("mm|bmm|mv|addmm|addmv|addr|addbmm|baddbmm|matmul|linear|einsum|prelu")

# Operators that give Python values of tensors, on which the code that follows may depend.
_TO_PYTHON = {"_local_scalar_dense", "allclose", "equal", "is_nonzero"}


def agree(actual: Tensor, expected: Tensor, rounded_to: torch.dtype = F32) -> bool:
    """Whether two outputs are of one norm, up to the last bits of float32 (see the top of this file).

    Args:
        actual, expected: the outputs.
        rounded_to: a dtype that something may have been rounded to on the way.
    """
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if torch.equal(actual, expected):
        return True
    infos = [torch.finfo(dtype) for dtype in (actual.dtype, rounded_to)]
    half = any(info.bits == 16 for info in infos)
    relative = 4 * max(info.eps for info in infos) if half else FLOAT32_TOLERANCE
    tiny = max(2 * info.smallest_normal * info.eps for info in infos)
    if not torch.isclose(actual, expected, rtol=relative, atol=tiny, equal_nan=True).all():
        return False
    same = torch.isclose(actual, expected, rtol=FLOAT32_TOLERANCE if actual.dtype == F32 else 0, atol=0, equal_nan=True)
    return not half or (~same).sum().item() <= max(1, HALF_MISMATCHES * actual.numel())


class _RMSNormCalls(TorchFunctionMode):
    """Notes whether torch's own rms_norm is called, and with input that autocast would cast."""

    called = casts = False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.rms_norm, F.rms_norm):
            self.called = True
            self.casts |= bool(args) and isinstance(args[0], Tensor) and args[0].dtype in HALF
        return func(*args, **(kwargs or {}))


class _Operators(Draws):
    """Notes whether autocast on a GPU would change what is computed. Refuses random numbers, and tensors from elsewhere."""

    autocast = False
    own: dict[int, Tensor]  # those that a forward is given, and what it has computed of them
    epsilons: set[int]  # of these, the module's epsilons, which may become numbers

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name != "lift_fresh" and any(id(tensor) not in self.own for tensor in _tensors((*args, *(kwargs or {}).values()))):
            raise LeftAloneError("it reads a tensor that is neither its input nor its parameter or buffer")
        if name in _TO_PYTHON and any(id(tensor) not in self.epsilons for tensor in _tensors(args)):
            raise LeftAloneError("what it does depends on the values of its input")
        if _TO_HALF.fullmatch(name):
            self.autocast = True
        elif _TO_FLOAT32.fullmatch(name):
            self.autocast |= any(isinstance(arg, Tensor) and arg.dtype in HALF for arg in args)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.own |= {id(tensor): tensor for tensor in _tensors((result,))}
        return result


def _tensors(values: Iterable) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@dataclass(frozen=True)
class Probe:
    """One run of the original: its input, and the state of the copy that it runs on."""

    x: Tensor
    gate: Tensor | None
    weight: Tensor | None  # in place of the module's only tensor beside its epsilon, used or not
    changed: dict[str, float] = field(default_factory=dict)  # epsilons
    training: bool = False
    required: bool = True  # False: the original may refuse the input

    @property
    def in_float32(self) -> bool:
        return self.coarsest == F32

    @property
    def coarsest(self) -> torch.dtype:
        """Of the dtypes of its tensors, the one with the fewest digits."""
        dtypes = [self.x.dtype, *([] if self.weight is None else [self.weight.dtype])]
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


class Subject:
    """A module whose forward is to be run.

    Args:
        module: a module with at most one tensor beside its epsilon. It is only looked at.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.cls = type(module)
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.gated = False  # its forward is given a second tensor
        self.weight: str | None = None  # the name of its only tensor beside its epsilon, used or not
        self.weight_shape: tuple[int, ...] | None = None
        for name, tensor in own_tensors(module).items():
            if not is_epsilon(name, tensor):
                self.weight, self.weight_shape = name, tuple(tensor.shape)
        self.forget()

    def forget(self) -> None:
        """Starts to note anew what runs show beside their outputs."""
        self.calls, self.operators = _RMSNormCalls(), _Operators()

    def probe(self, x: Tensor, dtype: torch.dtype = F32, weight: torch.dtype = F32, gate: Tensor | None = None, **rest: Any) -> Probe:
        if self.gated:
            gate = (self.randn(*x.shape) if gate is None else gate).to(weight)
        tensor = None
        if self.weight_shape is not None:  # of all magnitudes, so that it shows if the weight is limited
            tensor = (self.randn(*self.weight_shape) * self.randn(*self.weight_shape).mul(3).exp2()).to(weight)
        return Probe(x.to(dtype), gate if self.gated else None, tensor, **rest)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F32, device="cpu")

    def run(self, probe: Probe) -> Tensor | BaseException:
        """What the original's forward returns for copies of the probe's tensors."""
        x, gate, weight = (None if t is None else _cloned(t) for t in (probe.x, probe.gate, probe.weight))
        copied = self._copy(probe, weight)
        inputs = [t for t in (x, gate) if t is not None]
        before = _state(copied)
        versions = [t._version for t in inputs]
        self.operators.own = {id(tensor): tensor for tensor in (*inputs, *own_tensors(copied).values())}
        self.operators.epsilons = {id(tensor) for name, tensor in own_tensors(copied).items() if is_epsilon(name, tensor)}
        try:
            with self.calls, self.operators, torch.set_grad_enabled(probe.training or probe.x.requires_grad):
                actual = self.cls.forward(copied, *inputs)
        except LeftAloneError:
            raise
        except (Exception, SystemExit) as error:  # of any kind: it is other people's code
            return error.with_traceback(None)  # which would keep the copy, an instance of the class
        if versions != [t._version for t in inputs]:
            raise LeftAloneError("its forward changes its input")
        if before != _state(copied):
            raise LeftAloneError("its forward changes the module")
        if not isinstance(actual, Tensor):
            return TypeError(f"forward returns {type(actual).__name__}, not a tensor")
        return actual

    def _copy(self, probe: Probe, weight: Tensor | None) -> nn.Module:
        """A module of the same class and attributes with `weight` in place of its tensor, and the probe's epsilons."""

        def tensor(name: str, other: Tensor) -> Tensor | None:
            return torch.full(other.shape, probe.changed.get(name, EPS_OF_TENSORS), dtype=F32) if is_epsilon(name, other) else weight

        def copied(_: str, module: nn.Module) -> nn.Module:
            one = copy_with(module, tensor, copied)
            one.training = probe.training
            return one

        one = copied("", self.module)
        for name, value in probe.changed.items():
            if name not in one._buffers:
                _set(one, name, value)
        return one


def _cloned(tensor: Tensor) -> Tensor:
    """With the same strides, also where there are gaps."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)


def _set(module: nn.Module, path: str, value: float) -> None:
    """Sets an attribute of a module, or of an object that is one, which is copied."""
    *owners, name = path.split(".")
    owner: Any = module
    for attribute in owners:
        owner_copy = copy.copy(getattr(owner, attribute))
        object.__setattr__(owner, attribute, owner_copy)
        owner = owner_copy
    object.__setattr__(owner, name, value)


def _state(module: nn.Module) -> dict:
    """What a forward might change: compare two of one module."""
    values = {
        n: repr(v) if isinstance(v, (int, float, str, tuple, list, dict, set, deque)) else id(v) for n, v in attributes(module).items()
    }
    return values | {name: (id(t), t._version) for name, t in own_tensors(module).items()}
