"""The subclass that takes the place of a proved norm's class: the original in everything but its forward."""

import copyreg
import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from triton_rmsnorm.functional import rms_norm
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
    semantics, dims, run_original = norm.semantics, norm.dims, original.forward

    def call(self, x, others, named):
        weight = None if norm.weight is None else getattr(self, norm.weight)
        if others or named or not isinstance(x, Tensor) or not _proved(x, weight):
            return run_original(self, x, *others, **named)
        eps = getattr(self, norm.eps) if isinstance(norm.eps, str) else norm.eps
        knobs = semantics.knobs(x.dtype, None if weight is None else weight.dtype)
        if x.is_cuda and torch.is_autocast_enabled("cuda") and not norm.autocasts:
            with torch.autocast("cuda", enabled=False):
                return rms_norm(x, x.shape[-dims:], semantics.factor(weight), eps, **knobs)
        return rms_norm(x, x.shape[-dims:], semantics.factor(weight), eps, **knobs)

    def _proved(x, weight):
        if x.dtype not in PROVED_DTYPES or x.dim() < dims:
            return False
        if semantics.group_size is not None and x.shape[-1] % semantics.group_size:
            return False
        return norm.weight is None or (weight is not None and weight.shape == x.shape[-dims:] and weight.dtype in PROVED_DTYPES)

    def forward(self, x, *others, **named):
        return call(self, x, others, named)

    # The first argument keeps its name, by which callers may pass it.
    first = list(inspect.signature(run_original).parameters)[1]
    forward.__code__ = forward.__code__.replace(co_varnames=("self", first, "others", "named"))
    return functools.wraps(run_original)(forward)


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
