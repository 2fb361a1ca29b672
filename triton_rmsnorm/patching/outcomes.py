"""What can be done with a module, a class or a layer, as a row of the report and what that takes."""

import inspect
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from triton_rmsnorm.patching.fusion import Fusion, fused, fusible
from triton_rmsnorm.patching.inspection import sounds_like_rms
from triton_rmsnorm.patching.isolation import isolated
from triton_rmsnorm.patching.reasons import BEFORE_WRAPPING
from triton_rmsnorm.patching.recognition import Memory, may_be_norm, recognize
from triton_rmsnorm.patching.recomputation import Recomputation, recomputing
from triton_rmsnorm.patching.replacement import is_replacement, replacement
from triton_rmsnorm.patching.report import Row, Status, in_words
from triton_rmsnorm.patching.subclass import CannotSubclassError, original_of, proof_of

# A row, but for its count, and the class that the module is to get; None: the module has no row, or gets no class.
Outcome = tuple[Row | None, type[nn.Module] | None]


def outcome(module: nn.Module, memory: Memory) -> Outcome:
    """What becomes of a module as a norm. The module is only looked at."""
    cls = type(module)
    for base in cls.__mro__:
        if is_replacement(base):
            return Row(original_of(base), str(proof_of(base).semantics), 0, Status.REPLACED_BEFORE, resembles=True), None
    try:
        if str(getattr(cls.forward, "__module__", "")).startswith("triton_rmsnorm."):
            return None, None
        verdict = recognize(module, memory)
    except Exception as error:  # of any kind: any module may stand in a model
        if not sounds_like_rms(cls):
            return None, None
        return Row(cls, "", 0, Status.LEFT_ALONE, f"it cannot be read: {in_words(error)}", True), None
    if verdict is None:
        return None, None
    norm, reason, replaced = verdict.norm, verdict.reason, None
    if norm is not None:
        reason = wrapped(module)
        if not reason:
            try:
                replaced = replacement(cls, norm)
            except CannotSubclassError as error:
                reason = str(error)
    status = Status.REPLACED if replaced else Status.LEFT_ALONE
    return Row(cls, str(norm.semantics) if norm else "", 0, status, reason, norm is not None or verdict.resembles), replaced


def outcome_of_layer(module: nn.Module, memory: dict) -> Outcome:
    """What becomes of a module as a layer that adds and normalizes."""
    cls = type(module)
    for base in cls.__mro__:
        if isinstance(proof_of(base), Fusion):
            return Row(original_of(base), str(proof_of(base)), 0, Status.FUSED_BEFORE), None
    try:
        fusion, reason = fusible(module, memory)
        if fusion is not None:
            reason = wrapped(module)
        if reason:
            return Row(cls, "residual add", 0, Status.LEFT_ALONE, reason), None
        return (Row(cls, str(fusion), 0, Status.FUSED), fused(cls, fusion)) if fusion is not None else (None, None)
    except Exception as error:  # as above
        return Row(cls, "residual add", 0, Status.LEFT_ALONE, f"it cannot be tried: {in_words(error)}"), None


def outcome_of_model(model: nn.Module) -> tuple[Row, type[nn.Module] | None]:
    """What becomes of a model whose forward is to run in `recompute_norms`."""
    cls = type(model)
    for base in cls.__mro__:
        if isinstance(proof_of(base), Recomputation):
            return Row(original_of(base), "outputs of norms", 0, Status.RECOMPUTED_BEFORE), None
    reason = wrapped(model)
    if not reason:
        try:
            return Row(original_of(cls), "outputs of norms", 0, Status.RECOMPUTED), recomputing(cls, Recomputation())
        except CannotSubclassError as error:
            reason = str(error)
    return Row(cls, "outputs of norms", 0, Status.LEFT_ALONE, reason), None


def outcome_of_class(cls: type[nn.Module], has_instances: bool) -> Row:
    """What will become of instances to come, as far as a small one tells."""
    small = _small_instance(cls)
    row = outcome(small, {})[0] if small is not None else None
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
    with suppress(Exception), isolated(), torch.device("meta"):
        return cls(**values)
    return None
