"""Runs other people's forwards on copies of their modules without a trace: outside of all modes and of global random generators."""

import copy
import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from triton_rmsnorm.patching.inspection import attributes
from triton_rmsnorm.patching.report import LeftAloneError


@contextmanager
def isolated() -> Iterator[None]:
    """On the CPU, with gradients, without warnings, autocast, compilation and the caller's modes."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_python_random_kept())
        if "torch._dynamo" in sys.modules:  # a forward that is decorated with torch.compile fills no cache
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.jit.optimized_execution(False))
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch._C._DisableAutocast())
        yield


class Draws(TorchDispatchMode):
    """Random numbers that torch draws come from `generator`; without one they raise LeftAloneError. No other generator changes."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler for this class

    def __init__(self, generator: torch.Generator | None = None):
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or isinstance(kwargs.get("generator"), torch.Generator):
            return func(*args, **kwargs)
        if self.generator is None:
            raise LeftAloneError("it draws random numbers")
        if not _takes_generator(func):
            func = getattr(func.overloadpacket, "generator", None)
            if func is None or not _takes_generator(func):
                raise LeftAloneError("it draws random numbers in a way that cannot be repeated")
        return func(*args, **(kwargs | {"generator": self.generator}))


def _takes_generator(func: Any) -> bool:
    return any(argument.name == "generator" for argument in func._schema.arguments)


@contextmanager
def _python_random_kept() -> Iterator[None]:
    """Puts the generators of Python and NumPy back if they were used."""
    numpy = sys.modules.get("numpy")
    state = random.getstate()
    numpy_state: Any = numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        if random.getstate() != state:
            random.setstate(state)
        if numpy and not all(map(numpy.array_equal, numpy.random.get_state(), numpy_state)):
            numpy.random.set_state(numpy_state)


def copy_with(module: nn.Module, tensor: Callable, submodule: Callable, cls: type[nn.Module] | None = None) -> nn.Module:
    """A module of the same class, or of `cls`, and the same attributes, without hooks. No constructor runs.

    Args:
        module: it is only looked at.
        tensor: gives what it has in place of a parameter or buffer, for the name and the module's own.
        submodule: likewise.
        cls: its class.
    """
    copied = object.__new__(cls or type(module))
    own = {name: copy.copy(value) if isinstance(value, (list, dict, set, deque)) else value for name, value in attributes(module).items()}
    vars(copied).update(vars(nn.Module()) | own)
    for kind, made in (("_parameters", tensor), ("_buffers", tensor), ("_modules", submodule)):
        vars(copied)[kind] = {name: None if one is None else made(name, one) for name, one in vars(module)[kind].items()}
    return copied
