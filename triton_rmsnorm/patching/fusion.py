"""The residual add taken into the norm that follows it, in layers whose source shows it and a trial confirms it.

A layer gets a subclass of its class with a rewritten forward (see `source`), which calls `add_and_normalize` for a sum and the norm of it.
Where our kernel for both does not apply, that adds and calls the norm as before. A layer is only fused after a `trial` of both forwards.
"""

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from triton_rmsnorm.patching.isolation import isolated
from triton_rmsnorm.patching.reads import reads
from triton_rmsnorm.patching.recognition import fingerprint
from triton_rmsnorm.patching.replacement import add_and_normalize
from triton_rmsnorm.patching.report import LeftAloneError
from triton_rmsnorm.patching.semantics import Norm
from triton_rmsnorm.patching.source import ADD, source_of
from triton_rmsnorm.patching.subclass import Mark, derived, proof_of
from triton_rmsnorm.patching.trial import try_out


@dataclass(frozen=True)
class Fusion:
    """What a class made by `fused` does: sums are taken into these norms, names of submodules."""

    norms: tuple[str, ...]

    def __str__(self) -> str:
        return f"residual add in {', '.join(self.norms)}"


# Outcomes of trials, by the class of a layer and everything that its forward reads.
Memory = dict[Hashable, tuple[Fusion | None, str]]


def fused(original: type[nn.Module], fusion: Fusion) -> type[nn.Module]:
    """The subclass of `original` that computes sums together with norms.

    Raises:
        LeftAloneError: the source of original.forward is not there, or has no such sums, as on a machine with another version of it; or
            the class of the original does not allow this.
    """
    # The very name of the original: it is by name that wrapping policies and device maps know layers.
    return derived(original, fusion, original.__name__, _forward, fused, {ADD: staticmethod(add_and_normalize)})


def fusible(layer: nn.Module, memory: Memory) -> tuple[Fusion | None, str]:
    """What can be fused in `layer`, or the reason why nothing can; (None, "") if it does not add and normalize.

    Args:
        layer: it is only looked at.
        memory: outcomes that the caller keeps; those of equal layers are not tried again.
    """
    proofs = {name: proof_of(type(child)) for name, child in layer._modules.items()}
    replaced = {name for name, proof in proofs.items() if isinstance(proof, Norm) and proof.semantics.activation is None}
    if not replaced:
        return None, ""
    try:
        source = source_of(type(layer).forward)
        names = source.norms & replaced
        if not names:
            return None, source.reason(replaced)
        names = {name for name in names if type(layer._modules[name]).__call__ is nn.Module.__call__}
        if not names:
            return None, "a call of its norm does more than the norm's forward"
        if _has_any_global_hook():
            return None, "there is a hook for all modules, which would see the trial"
        found = reads(layer, submodules=False)
        key = type(layer), tuple(sorted(names)), fingerprint(layer, found) if found else None, found
        return memory.get(key) or memory.setdefault(key, _tried(layer, names))
    except LeftAloneError as refused:
        return None, str(refused)


def _tried(layer: nn.Module, names: set[str]) -> tuple[Fusion | None, str]:
    """The outcome of a trial."""
    try:
        rewritten = fused(type(layer), Fusion(tuple(sorted(names))))
        with isolated():
            return Fusion(tuple(sorted(try_out(layer, names, rewritten)))), ""
    except LeftAloneError as refused:
        return None, str(refused)


def _forward(mark: Mark) -> Callable:
    source = source_of(mark.forward)
    missing = set(mark.proof.norms) - source.norms
    if missing:
        name = mark.original.__qualname__
        raise LeftAloneError(f"in {name}.forward no sum goes straight into {', '.join(sorted(missing))}")

    def forward(self: nn.Module, *args: Any, **named: Any) -> Any:
        ours = mark.cls is not None and isinstance(self, mark.cls)  # otherwise something has kept this forward beyond unpatch
        function = rewritten if ours and mark.is_current() else mark.original.forward
        return function(self, *args, **named)

    rewritten = source.rewritten(mark.proof.norms, forward)
    return functools.wraps(rewritten)(forward)
