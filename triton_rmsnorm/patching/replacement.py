"""The subclass that takes the place of a proved norm's class, or of a layer's: the original in everything but its forward."""

import copyreg
import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from triton_rmsnorm.functional import add_rms_norm, rms_norm, rms_norm_gated
from triton_rmsnorm.patching.semantics import Norm

PROVED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def replacement(original: type[nn.Module], norm: Norm) -> type[nn.Module]:
    """The subclass of `original` that computes `norm`; there is one for each pair."""
    # What reads class names, such as an initialization of weights, finds the original's.
    return derived(original, norm, replacement, f"Triton{original.__name__}", _forward)


def derived(original: type[nn.Module], part: Hashable, derive: Callable, name: str, forward: Callable, **members) -> type[nn.Module]:
    """The subclass of `original` with forward(original, part), made at the first call; derive(original, part) unpickles instances."""
    for subclass in original.__subclasses__():
        if part_of(subclass) == part:
            return subclass
    members |= {"forward": forward(original, part), "__reduce_ex__": _reduce_ex, "__doc__": original.__doc__}
    marks = {"__module__": __name__, "_triton_rmsnorm": part, "_triton_rmsnorm_derive": staticmethod(derive)}
    metaclass: Any = type(original)
    return metaclass(name, (original,), members | marks)


def is_derived(cls: type) -> bool:
    """Whether we made this class, for a norm or for a layer."""
    return "_triton_rmsnorm" in vars(cls)


def is_replacement(cls: type) -> bool:
    """Whether we made this class, for a norm."""
    return isinstance(part_of(cls), Norm)


def part_of(cls: type) -> Any:
    """What a class that we made was made for; None of others."""
    return vars(cls).get("_triton_rmsnorm")


def add_and_normalize(x: Tensor, residual: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """module(x + residual) and x + residual; fused where `module` is a replacement whose call nothing else watches or changes."""
    norm = type(module).__dict__.get("_triton_rmsnorm")
    if isinstance(norm, Norm) and not _watched(module) and _alike(x, residual):
        weight = None if norm.weight is None else getattr(module, norm.weight)
        if _proved(norm, x, weight, None) and not (norm.autocasts and _autocast(x)):
            return _compute(module, norm, x, weight, None, residual)
    total = x + residual
    return module(total), total


def _watched(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(len(one) > 0 for one in hooks) or "forward" in module.__dict__ or _has_any_global_hook()


def _alike(x, residual) -> bool:
    """Whether the sum is of this dtype and shape as well."""
    if not isinstance(x, Tensor) or not isinstance(residual, Tensor):
        return False
    return x.dtype == residual.dtype and x.shape == residual.shape and x.device == residual.device


def _forward(original: type[nn.Module], norm: Norm) -> Callable:
    """forward of the replacement, with the signature of the original's, which still runs in cases for which nothing is proved."""
    run_original = original.forward
    first, *rest = list(inspect.signature(run_original).parameters)[1:]
    gated = norm.semantics.activation is not None

    def call(self, x, others, named):
        gate = None
        if gated:
            gate = others[0] if others else named.get(rest[0])
        weight = None if norm.weight is None else getattr(self, norm.weight)
        if len(others) + len(named) != gated or not _proved(norm, x, weight, gate):
            return run_original(self, x, *others, **named)
        return _compute(self, norm, x, weight, gate)

    def forward(self, x, *others, **named):
        return call(self, x, others, named)

    # The first argument keeps its name, by which callers may pass it.
    forward.__code__ = forward.__code__.replace(co_varnames=("self", first, "others", "named"))
    return functools.wraps(run_original)(forward)


def _proved(norm: Norm, x, weight: Tensor | None, gate: Tensor | None) -> bool:
    """Whether the proof covers these tensors."""
    if not isinstance(x, Tensor) or x.dtype not in PROVED_DTYPES or x.dim() < norm.dims:
        return False
    if norm.weight is not None and (weight is None or weight.shape != x.shape[-norm.dims :] or weight.dtype not in PROVED_DTYPES):
        return False
    if norm.semantics.activation is not None and (gate is None or gate.shape != x.shape or gate.dtype not in PROVED_DTYPES):
        return False
    return norm.semantics.group_size is None or x.shape[-1] % norm.semantics.group_size == 0


def _autocast(x: Tensor) -> bool:
    return x.is_cuda and torch.is_autocast_enabled("cuda")


def _compute(module: nn.Module, norm: Norm, x: Tensor, weight: Tensor | None, gate: Tensor | None, residual: Tensor | None = None):
    """y; with a residual y and the sum."""
    if _autocast(x) and not norm.autocasts:
        with torch.autocast("cuda", enabled=False):
            return _compute(module, norm, x, weight, gate, residual)
    eps = getattr(module, norm.eps) if isinstance(norm.eps, str) else norm.eps
    knobs = norm.semantics.knobs(x.dtype, None if weight is None else weight.dtype)
    shape, factor = x.shape[-norm.dims :], norm.semantics.factor(weight)
    if residual is not None:
        return add_rms_norm(x, residual, shape, factor, eps, **knobs)
    if gate is not None:
        return rms_norm_gated(x, gate, shape, factor, eps, **knobs)
    return rms_norm(x, shape, factor, eps, **knobs)


def _reduce_ex(self, protocol):
    """Pickled and copied as the original's class and what is proved of it, from which any process makes this class again."""
    cls: Any = type(self)
    base = next(base for base in cls.__mro__ if is_derived(base))
    function, args, *rest = super(base, self).__reduce_ex__(max(protocol, 2))
    if base is cls and function is copyreg.__newobj__:  # type: ignore[attr-defined]
        return _new, (cls._triton_rmsnorm_derive, cls.__bases__[0], cls._triton_rmsnorm), *rest
    return function, args, *rest


def _new(derive: Callable, original: type[nn.Module], part: Hashable) -> nn.Module:
    cls = derive(original, part)
    return cls.__new__(cls)
