"""Norms and layers that tests of patching derive theirs from."""

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
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x.float() * torch.rsqrt(variance + self.eps)).to(x.dtype)


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


def original_of(module: nn.Module) -> nn.Module:
    """A module with the same attributes and tensors that is not patched."""
    original = object.__new__(type(module))
    vars(original).update(vars(module))
    unpatch(original)
    return original
