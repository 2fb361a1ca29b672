"""Norms and layers that tests of patching derive theirs from."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from triton_rmsnorm import unpatch

COLUMNS = 16


class Norm(nn.Module):
    """Rounds as Llama's: w · x_hat.to(x)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(COLUMNS) + 0.5)
        self.eps = 1e-6

    def forward(self, x):
        return self.weight * (x.float() * rstd(x, self.eps)).to(x.dtype)


def rstd(x: torch.Tensor, eps: float) -> torch.Tensor:
    """In float32."""
    return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)


class Switched(Norm):
    """Does nothing if its switch is off."""

    on = True

    def forward(self, x):
        return super().forward(x) if self.on else x


class Layer(nn.Module):
    """Adds and normalizes."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(COLUMNS, COLUMNS), Norm()

    def forward(self, x):
        x = x + self.linear(x)
        return x + self.norm(x)


def norm_of(forward: Callable, name: str = "SomeNorm", **attributes: Any) -> nn.Module:
    """A norm of a new class with this forward.

    Args:
        forward: a method.
        name: of the class.
        attributes: beside a weight of 64 ones and an epsilon, or in place of them. None: it has no such attribute.
    """
    norm = type(name, (nn.Module,), {"forward": forward})()
    for attribute, value in ({"weight": nn.Parameter(torch.ones(64)), "eps": 1e-6} | attributes).items():
        if value is not None:
            setattr(norm, attribute, value)
    return norm


def classes(module: nn.Module) -> list[type]:
    """Of a module and its submodules."""
    return [type(one) for one in module.modules()]


def original_of(module: nn.Module) -> nn.Module:
    """A module with the same attributes and tensors that is not patched."""
    original = object.__new__(type(module))
    vars(original).update(vars(module))
    unpatch(original)
    return original
