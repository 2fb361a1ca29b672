"""What becomes of a norm, a layer, a model or a class: a row of the report, and the class that a module is to get."""

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from triton_rmsnorm.patching.fusion import Fusion, fused, fusible
from triton_rmsnorm.patching.inspection import sounds_like_rms
from triton_rmsnorm.patching.isolation import isolated
from triton_rmsnorm.patching.reasons import BEFORE_WRAPPING
from triton_rmsnorm.patching.recognition import may_be_norm, recognize
from triton_rmsnorm.patching.recomputation import Recomputation, recomputing
from triton_rmsnorm.patching.replacement import replacement
from triton_rmsnorm.patching.report import LeftAloneError, Row, Status, in_words
from triton_rmsnorm.patching.semantics import Norm
from triton_rmsnorm.patching.subclass import original_of, proof_of


@dataclass(frozen=True)
class Change:
    """A way in which a module may get another class.

    Args:
        proof: the class of what is proved of modules that can be changed.
        found: what is proved of a module, or None and the reason why it is left alone; and whether it looks like an RMS norm. None: it has
            no row in the report. The dictionary is for what it remembers.
        derive: makes the class, of that of the module and of what is proved.
        done: status of a module that is changed.
        before: status of one that was changed before.
        unknown: in place of what is proved, in the row of a module that is left alone.
    """

    proof: type
    found: Callable[[nn.Module, dict], tuple[Any, str, bool] | None]
    derive: Callable[[type[nn.Module], Any], type[nn.Module]]
    done: Status
    before: Status
    unknown: str = ""


def outcome(change: Change, module: nn.Module, memory: dict) -> tuple[Row | None, type[nn.Module] | None]:
    """What becomes of a module, which is only looked at: its row but for the count, and the class that it is to get.

    Args:
        memory: as for `change.found`.
    """
    cls = type(module)
    for base in cls.__mro__:
        if isinstance(proof_of(base), change.proof):
            return Row(original_of(base), str(proof_of(base)), 0, change.before, resembles=change is REPLACE), None
    found = change.found(module, memory)
    if found is None:
        return None, None
    proof, reason, resembles = found
    derived = None
    if proof is not None:
        reason = wrapped(module)
        if not reason:
            try:
                derived = change.derive(cls, proof)
            except LeftAloneError as error:
                reason = str(error)
    status = change.done if derived else Status.LEFT_ALONE
    return Row(original_of(cls), str(proof or change.unknown), 0, status, reason, resembles), derived


def _norm(module: nn.Module, memory: dict) -> tuple[Norm | None, str, bool] | None:
    cls = type(module)
    try:
        if str(getattr(cls.forward, "__module__", "")).startswith("triton_rmsnorm."):
            return None
        verdict = recognize(module, memory)
    except Exception as error:  # of any kind: any module may stand in a model
        return (None, f"it cannot be read: {in_words(error)}", True) if sounds_like_rms(cls) else None
    return None if verdict is None else (verdict.norm, verdict.reason, verdict.norm is not None or verdict.resembles)


def _fusion(layer: nn.Module, memory: dict) -> tuple[Fusion | None, str, bool] | None:
    try:
        fusion, reason = fusible(layer, memory)
    except Exception as error:  # as above
        fusion, reason = None, f"it cannot be tried: {in_words(error)}"
    return (fusion, reason, False) if fusion or reason else None


REPLACE = Change(Norm, _norm, replacement, Status.REPLACED, Status.REPLACED_BEFORE)
FUSE = Change(Fusion, _fusion, fused, Status.FUSED, Status.FUSED_BEFORE, "residual add")
RECOMPUTE = Change(
    Recomputation, lambda model, memory: (Recomputation(), "", False), recomputing, Status.RECOMPUTED, Status.RECOMPUTED_BEFORE
)


def outcome_of_class(cls: type[nn.Module], has_instances: bool) -> Row:
    """What will become of instances to come, as far as a small one tells."""
    small = _small_instance(cls)
    row = outcome(REPLACE, small, {})[0] if small is not None else None
    if row is not None and row.status == Status.REPLACED:
        return replace(row, status=Status.TO_COME)
    if has_instances or (small is None and may_be_norm(cls)):
        return Row(cls, "", 0, Status.TO_COME, "proved when one is built")
    return row or Row(cls, "", 0, Status.LEFT_ALONE, "it is not an RMS norm")


def wrapped(module: nn.Module) -> str:
    """How something else has taken over this very module, if so: its behaviour is then not only its class's."""
    if "_hf_hook" in vars(module):
        return "accelerate has hooked it: patch the model before that"
    if "forward" in vars(module):
        return "its forward was replaced: patch the model before that"
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if any(_distributed(type(t)) for t in tensors) or any(map(_distributed, hooks)):
        return f"torch.distributed has taken it over: {BEFORE_WRAPPING}"
    return next((f"it has a {type(t).__name__} for a tensor" for t in tensors if not _plain(t)), "")


def _distributed(thing: Any) -> bool:
    return str(getattr(inspect.unwrap(getattr(thing, "func", thing)), "__module__", "")).startswith("torch.distributed.")


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor is of a class of torch's, not of one with a meaning of its elements that only others know."""
    return type(tensor).__module__.partition(".")[0] == "torch"


def _small_instance(cls: type[nn.Module]) -> nn.Module | None:
    """An instance of 64 columns, on no device, if the constructor asks for nothing but sizes and an epsilon."""
    values = {}
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if parameter.default is parameter.empty and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            values[name] = 1e-6 if "eps" in name else 16 if "group" in name else 64
    with suppress(Exception, SystemExit), isolated(), torch.device("meta"):
        return cls(**values)
    return None
