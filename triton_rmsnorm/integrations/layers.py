"""Layers for the `kernels` package, which puts the forward of a layer into each module whose class carries the layer's name.

What such a name promises differs from class to class: "RMSNorm" is on classes that round before the weight and on classes that round after
it. So the forward here looks at the module that it is called for, and runs what `patch` would give it, or else its class's own forward.
"""

import functools
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from triton_rmsnorm.patching.recognition import fingerprint, recognize
from triton_rmsnorm.patching.replacement import is_replacement, replaced_forward
from triton_rmsnorm.patching.semantics import Norm


class RMSNorm(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return getattr(_FORWARDS, _forward_for(self))(self, hidden_states)


class RMSNormGated(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return getattr(_FORWARDS, _forward_for(self))(self, hidden_states, gate)


LAYERS = {"RMSNorm": RMSNorm, "RMSNormGated": RMSNormGated, "RMSNormZeroCentered": RMSNorm}

# Forwards by name: a constant that torch.compile can hold on to, where it cannot follow how a module is recognized.
_FORWARDS = SimpleNamespace()
_replaced_forward: Callable[..., Callable] = functools.cache(replaced_forward)
# By module: its class, the name, and the norm with the attributes that it was recognized with.
_NAMES: weakref.WeakKeyDictionary[nn.Module, tuple[type, str, Norm | None, Hashable]] = weakref.WeakKeyDictionary()


@torch.compiler.assume_constant_result
def _forward_for(module: nn.Module) -> str:
    """The name in _FORWARDS of the forward for a module, which is recognized at the first call and after changes that may matter."""
    cls, name, norm, before = _NAMES.get(module, (None, "", None, None))
    if cls is not type(module) or (norm is not None and fingerprint(module, norm.reads) != before):
        cls = type(module)
        verdict = None if is_replacement(cls) else recognize(module)
        norm = None if verdict is None else verdict.norm
        forward: Callable = cls.forward if norm is None else _replaced_forward(cls, norm)
        name = f"{cls.__name__}_{id(forward)}"
        setattr(_FORWARDS, name, forward)
        _NAMES[module] = cls, name, norm, None if norm is None else fingerprint(module, norm.reads)
    return name


@dataclass(frozen=True)
class Repository:
    """Where the `kernels` package loads a layer from: nowhere but here."""

    layer: type[nn.Module]

    def load(self) -> type[nn.Module]:
        return self.layer
