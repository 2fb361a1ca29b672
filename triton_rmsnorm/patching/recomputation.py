"""The subclass of a model's class whose forward runs in `recompute_norms`."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from triton_rmsnorm.patching.subclass import Mark, derived
from triton_rmsnorm.recompute import recompute_norms


@dataclass(frozen=True)
class Recomputation:
    """Stands where other classes that we make have a proof: there is nothing to prove, because no bit changes."""

    def __str__(self) -> str:
        return "outputs of norms"


def recomputing(original: type[nn.Module], recomputation: Recomputation) -> type[nn.Module]:
    """The subclass of `original` whose forward runs in `recompute_norms`.

    Raises:
        LeftAloneError: the class of the original does not allow this.
    """
    # Transformers finds what a model can return, hidden states for example, by the name of its class.
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return derived(original, recomputation, original.__name__, _forward, recomputing, names)


def _forward(mark: Mark) -> Callable:
    def forward(self: nn.Module, *args: Any, **named: Any) -> Any:
        with recompute_norms():
            return mark.original.forward(self, *args, **named)

    return functools.wraps(mark.forward)(forward)
