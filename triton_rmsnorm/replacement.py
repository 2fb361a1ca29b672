"""The subclass that takes the place of a proved norm's class: the original in everything but its forward."""

import copyreg
import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from triton_rmsnorm.functional import rms_norm, rms_norm_gated
from triton_rmsnorm.semantics import Norm

PROVED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def replacement(original: type[nn.Module], norm: Norm) -> type[nn.Module]:
    """The subclass of `original` that computes `norm`; there is one for each pair."""
    for subclass in original.__subclasses__():
        if vars(subclass).get("_triton_rmsnorm") == norm:
            return subclass
    name = f"Triton{original.__name__}"  # what reads class names, such as an initialization of weights, finds the original's
    methods = {"forward": _forward(original, norm), "__reduce_ex__": _reduce_ex}
    return type(original)(name, (original,), {"__module__": __name__, "__doc__": original.__doc__, "_triton_rmsnorm": norm, **methods})


def is_replacement(cls: type) -> bool:
    return "_triton_rmsnorm" in vars(cls)


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
        if x.is_cuda and torch.is_autocast_enabled("cuda") and not norm.autocasts:
            with torch.autocast("cuda", enabled=False):
                return _compute(self, norm, x, weight, gate)
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


def _compute(module: nn.Module, norm: Norm, x: Tensor, weight: Tensor | None, gate: Tensor | None) -> Tensor:
    eps = getattr(module, norm.eps) if isinstance(norm.eps, str) else norm.eps
    knobs = norm.semantics.knobs(x.dtype, None if weight is None else weight.dtype)
    shape, factor = x.shape[-norm.dims :], norm.semantics.factor(weight)
    if gate is not None:
        return rms_norm_gated(x, gate, shape, factor, eps, **knobs)
    return rms_norm(x, shape, factor, eps, **knobs)


def _reduce_ex(self, protocol):
    """Pickled and copied as the original's class and what is proved of it, from which any process makes this class again."""
    cls = type(self)
    base = cls if is_replacement(cls) else next(base for base in cls.__mro__ if is_replacement(base))
    function, args, *rest = super(base, self).__reduce_ex__(max(protocol, 2))
    if base is cls and function is copyreg.__newobj__:
        return _new, (base.__bases__[0], base._triton_rmsnorm), *rest
    return function, args, *rest


def _new(original: type[nn.Module], norm: Norm) -> nn.Module:
    cls = replacement(original, norm)
    return cls.__new__(cls)
