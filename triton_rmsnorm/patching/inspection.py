"""What is to be known of a module before its forward runs."""

from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from triton_rmsnorm.patching.reads import INTERNAL


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a module has that not every module has."""
    return {name: value for name, value in vars(module).items() if name not in INTERNAL}


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters and buffers, and tensors that are plain attributes."""
    named = (*module._parameters.items(), *module._buffers.items(), *attributes(module).items())
    return {name: value for name, value in named if isinstance(value, Tensor)}


def named_modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The module and its submodules with their names, as nn.Module.named_modules; but modules need not have a hash."""
    found: dict[int, tuple[str, nn.Module]] = {}
    waiting = [("", module)]
    while waiting:
        name, one = waiting.pop()
        if id(one) not in found:
            found[id(one)] = name, one
            children = [(child_name, child) for child_name, child in one._modules.items() if isinstance(child, nn.Module)]
            waiting += [(f"{name}.{child_name}" if name else child_name, child) for child_name, child in reversed(children)]
    return list(found.values())


def is_epsilon(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of a module looks like its epsilon."""
    return "eps" in name and not is_lazy(tensor) and tensor.numel() == 1


def sounds_like_rms(cls: type) -> bool:
    """Whether a class is called an RMS norm."""
    name = cls.__name__
    return "RMS" in name or "Rms" in name or "_rms" in name or name.startswith("rms")  # not LayerNormSomething


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without leading dimensions of size 1, over which a weight is broadcast."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
