"""Recognition: which modules may be RMS norms, and what is proved of them.

`proof` runs the forward of a candidate beside the closed list of semantics. Here is what comes before and after: whether a module is a
candidate at all, the reason in words where it is left alone, and verdicts that are remembered.
"""

import inspect
import types
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils.weak import WeakIdRef

from triton_rmsnorm.patching.inspection import attributes, is_epsilon, named_modules, own_tensors, sounds_like_rms
from triton_rmsnorm.patching.isolation import isolated
from triton_rmsnorm.patching.probes import agree
from triton_rmsnorm.patching.proof import Proof
from triton_rmsnorm.patching.reads import Reads, frozen, is_plain, reads
from triton_rmsnorm.patching.report import LeftAloneError
from triton_rmsnorm.patching.semantics import Norm

__all__ = ["Verdict", "agree", "fingerprint", "may_be_norm", "recognize"]


@dataclass(frozen=True)
class Verdict:
    """The outcome for a module: a proved norm, or the reason why there is none.

    Args:
        norm: what is proved.
        reason, resembles, ran, other: as in LeftAloneError.
    """

    norm: Norm | None
    reason: str = ""
    resembles: bool = False
    ran: bool = True
    other: bool = False


# Verdicts by class, attributes and everything else that the forward reads.
Memory = dict[Hashable, Verdict]


def recognize(module: nn.Module, memory: Memory | None = None) -> Verdict | None:
    """What `module` computes, or why it is not known. None: nothing about it suggests an RMS norm, or it is another norm.

    Args:
        module: it is only looked at.
        memory: verdicts that the caller keeps, for as long as nothing changes that a forward could read in ways that `reads` misses.
    """
    if not _suggests_norm(module):
        return Verdict(None, _others_in(module)) if sounds_like_rms(type(module)) else None
    found = reads(module)
    if found is None:
        return Verdict(None, "its forward is not a Python function") if sounds_like_rms(type(module)) else None
    memory = {} if memory is None else memory
    key = type(module), fingerprint(module, found), found
    verdict = memory.get(key) or memory.setdefault(key, _prove(module, found))
    named = verdict.ran and not verdict.other and "norm" in type(module).__name__.lower()
    return verdict if verdict.norm or verdict.resembles or named else None


def may_be_norm(cls: type[nn.Module]) -> bool:
    """Whether instances of a class may be RMS norms, as far as its code tells: forward's arguments, a name or a trace of an epsilon."""
    if not issubclass(cls, nn.Module) or (cls.__module__.startswith("torch.nn.") and not issubclass(cls, nn.RMSNorm)):
        return False
    return _inputs(cls) is not None and ("norm" in cls.__name__.lower() or sounds_like_rms(cls) or _mentions_eps(cls))


def _suggests_norm(module: nn.Module) -> bool:
    cls = type(module)
    if cls.__module__.startswith("torch.") and not isinstance(module, nn.RMSNorm):
        return False
    if _inputs(cls) is None or len(_weights(module)) > 1 or any(own_tensors(child) for _, child in named_modules(module)[1:]):
        return False
    if may_be_norm(cls) or any(is_epsilon(name, tensor) for name, tensor in own_tensors(module).items()):
        return True
    return any("eps" in name or (type(v) is float and 0 < v <= 1e-2) for name, v in attributes(module).items())


def _weights(module: nn.Module) -> list[str]:
    return [name for name, tensor in own_tensors(module).items() if not is_epsilon(name, tensor)]


def _others_in(module: nn.Module) -> str:
    """Why something that is called an RMS norm is none."""
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    others = [name for name, child in named_modules(module)[1:] if own_tensors(child)]
    if len(_weights(module)) > 1 or others:
        return f"it has more parameters and buffers than a weight: {', '.join((*_weights(module), *others))}"
    return "its forward takes other arguments than an RMS norm's"


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


def _prove(module: nn.Module, found: Reads) -> Verdict:
    inputs = _inputs(type(module))
    assert inputs is not None
    try:
        with isolated():
            norm = Proof(module, found, inputs).norm()
            if reads(module) != found:
                raise LeftAloneError("its forward changes what it reads")
    except LeftAloneError as refused:
        return Verdict(None, str(refused), refused.resembles, refused.ran, refused.other)
    return Verdict(norm)


def fingerprint(module: nn.Module, found: Reads) -> Hashable:
    """All attributes that a forward may read, except for values of tensors: plain ones and containers by value, others by identity."""
    values = tuple((name, frozen(value, _identity)) for name, value in sorted(attributes(module).items()) if found.reads(name))
    tensors = tuple((name, name in module._parameters, *_metadata(t)) for name, t in own_tensors(module).items())
    present = ((name, child) for name, child in module._modules.items() if child is not None)
    children = tuple((name, type(child), fingerprint(child, found)) for name, child in present)
    return values, tensors, children


def _metadata(tensor: Tensor) -> tuple:
    uninitialized = is_lazy(tensor)
    return type(tensor), None if uninitialized else tuple(tensor.shape), tensor.dtype


def _identity(value: Any) -> Hashable:
    if is_plain(value):
        return type(value), repr(value)
    try:
        return WeakIdRef(value)
    except TypeError:  # there are no weak references to it: it is never found again
        return object()
