"""Whether another forward of a layer computes what its own does: a trial of both on random input, outputs and gradients.

The layer in the trial has its own class, attributes, norms (its own forward their own classes, too) and parameters, the latter drawn
anew, on the CPU. Its other submodules are
stood in for by random functions of all tensors that they are given. Both forwards call them alike, so nothing that tells the two apart
is lost, and the trial needs neither room for their weights nor arguments that only they understand.
"""

import dis
import inspect
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from triton_rmsnorm.patching.replacement import add_and_normalize, part_of

# Largest difference of an output or gradient, relative to its largest element: sums in other orders, in float32.
TOLERANCE = 1e-4
# A layer with more elements of its own, beside its submodules, is not tried.
LARGEST_OWN = 2**24


class FailedError(Exception):
    """The outcome of a trial that does not show that both are the same."""


class _Output(Tensor):
    """A tensor that is also a tuple of as many tensors as are asked for. What is computed of it is a plain tensor."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    def __getitem__(self, index):
        return torch.sin((2 + index) * self.as_subclass(Tensor)) if type(index) is int else self.as_subclass(Tensor)[index]

    def __iter__(self):
        frame = sys._getframe(1)
        for instruction in dis.get_instructions(frame.f_code):
            if instruction.offset == frame.f_lasti and instruction.opname == "UNPACK_SEQUENCE":
                return (self[index] for index in range(instruction.arg or 0))
        return iter(self.as_subclass(Tensor))


def try_out(layer: nn.Module, names: set[str], rewritten: Callable, add: str) -> set[str]:
    """The norms among `names` that the trial went through, sum and all.

    Args:
        layer: it is only looked at.
        names: of its fused norms.
        rewritten: another forward for it; decorators of both are left out.
        add: what that calls for a sum and a norm, an attribute of self.

    Raises:
        FailedError: forward does not run, the two differ, or none of the norms is met.
    """
    trial = _Trial(layer, names)
    norms = {name: trial.layer._modules[name] for name in names}
    replacements = {name: type(norm) for name, norm in norms.items()}
    name_of = {id(norm): name for name, norm in norms.items()}
    seen: set[str] = set()

    def see(x, residual, norm):
        seen.add(name_of[id(norm)])
        return add_and_normalize(x, residual, norm)

    vars(trial.layer)[add] = see
    failure = ""
    for filled, training in itertools.product((False, True), (False, True)):
        if seen == names and not training:
            break
        trial.layer.training = training
        arguments = trial.arguments(filled)
        for name, cls in replacements.items():
            norms[name].__class__ = cls.__bases__[0]
        try:
            expected = trial.run(inspect.unwrap(type(layer).forward), arguments)
        except Exception as error:  # of any kind: it is the layer's own code, on input that it may not be made for
            failure = failure or f"its forward does not run on a trial: {in_words(error)}"
            continue
        for name, cls in replacements.items():
            norms[name].__class__ = cls
        try:
            actual = trial.run(inspect.unwrap(rewritten), arguments)
        except Exception as error:
            raise FailedError(f"rewritten, its forward fails on a trial: {in_words(error)}") from None
        if not _agree(actual, expected):
            raise FailedError("rewritten, its forward computes something else on a trial")
    if not seen:
        raise FailedError(failure or "a trial does not come by its sums")
    return seen


class _Trial:
    """A layer made small, and its input."""

    def __init__(self, layer: nn.Module, names: set[str]):
        own = [t for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None]
        if sum(t.numel() for t in own) > LARGEST_OWN:
            raise FailedError("its own parameters are too large for a trial")
        self.generator = torch.Generator().manual_seed(0)
        self.leaves: list[Tensor] = []  # whose gradients are compared
        self.stand_ins: dict[int, nn.Module] = {}
        self.rows = (1, 2)
        self.shape = _normalized(layer.get_submodule(min(names)))
        self.layer = self._drawn(layer)
        for name, child in layer._modules.items():
            if child is None:
                self.layer._modules[name] = None
            else:
                self.layer._modules[name] = self._drawn(child) if name in names else self._stand_in(child)

    def run(self, forward: Callable, arguments: dict) -> tuple[list[Tensor], list[Tensor | None]]:
        """Outputs and gradients."""
        torch.manual_seed(0)
        arguments = {name: value.as_subclass(_Output) if isinstance(value, Tensor) else value for name, value in arguments.items()}
        leaves = tree_leaves(forward(self.layer, **arguments))
        outputs = [leaf.as_subclass(Tensor) for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        generator = torch.Generator().manual_seed(1)
        terms = [(torch.randn(y.shape, generator=generator) * y).sum() for y in outputs if y.requires_grad]
        loss = torch.stack(terms).sum()
        return outputs, list(torch.autograd.grad(loss, self.leaves, allow_unused=True))

    def arguments(self, filled: bool) -> dict:
        """Tensors for what forward requires, and, if `filled`, also for what is None by default."""
        function = inspect.unwrap(type(self.layer).forward)
        parameters = list(inspect.signature(function).parameters.values())[1:]
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        wanted = [p.name for p in parameters if p.kind in named and (p.default is p.empty or (filled and p.default is None))]
        return {name: self._leaf(*self.rows, *self.shape) for name in wanted}

    def _leaf(self, *shape: int) -> Tensor:
        leaf = torch.randn(shape, generator=self.generator).requires_grad_()
        self.leaves.append(leaf)
        return leaf

    def _parameter(self, *shape: int) -> nn.Parameter:
        parameter = nn.Parameter(1 + 0.3 * torch.randn(shape, generator=self.generator))
        self.leaves.append(parameter)
        return parameter

    def _bare(self, module: nn.Module) -> nn.Module:
        """A module of the same class and attributes, without hooks, tensors or submodules. No constructor runs."""
        bare = object.__new__(type(module))
        empty = vars(nn.Module())
        attributes = {name: value for name, value in vars(module).items() if name not in empty}
        copied = {name: value.copy() if isinstance(value, (list, dict, set)) else value for name, value in attributes.items()}
        vars(bare).update(empty | copied)
        return bare

    def _drawn(self, module: nn.Module) -> nn.Module:
        """Bare, with random values for its own tensors; integers are zeros."""
        bare = self._bare(module)
        for name, parameter in module._parameters.items():
            bare._parameters[name] = None if parameter is None else self._parameter(*parameter.shape)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                drawn = torch.randn(buffer.shape, generator=self.generator) if buffer.is_floating_point() else torch.zeros(buffer.shape)
                buffer = drawn if buffer.is_floating_point() else drawn.to(buffer.dtype)
            bare._buffers[name] = buffer
        return bare

    def _stand_in(self, module: nn.Module) -> nn.Module:
        """Any other module: of its class and attributes, it computes a random function of the tensors that it is given."""
        if id(module) in self.stand_ins:
            return self.stand_ins[id(module)]
        bare = self.stand_ins[id(module)] = self._bare(module)
        pairs: list[tuple[dict, dict]] = [(bare._parameters, module._parameters), (bare._buffers, module._buffers)]
        for own, others in pairs:
            own.update({name: None if other is None else torch.empty_like(other, device="meta") for name, other in others.items()})
        bare._modules.update({name: None if child is None else self._stand_in(child) for name, child in module._modules.items()})
        scale = self._parameter()

        def forward(*args, **named):
            tensors = [t for t in tree_leaves((args, named)) if isinstance(t, Tensor) and t.is_floating_point()]
            total = torch.ones(*self.rows, *self.shape)
            for number, tensor in enumerate(tensors, 1):
                plain = tensor.as_subclass(Tensor)
                total = total + (plain if plain.shape == total.shape else plain.mean()) / number
            return torch.sin(scale * total).as_subclass(_Output)

        vars(bare)["forward"] = forward
        return bare


def _normalized(norm: nn.Module) -> tuple[int, ...]:
    """The shape that a replaced norm normalizes; any if it has no weight."""
    weight = part_of(type(norm)).weight
    return (64,) if weight is None else tuple(getattr(norm, weight).shape)


def _agree(actual: tuple[list, list], expected: tuple[list, list]) -> bool:
    """Whether outputs and gradients are the same ones, up to TOLERANCE."""
    if [len(part) for part in actual] != [len(part) for part in expected]:
        return False
    for one, other in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        if one is None or other is None:
            same = one is other
        else:
            same = one.shape == other.shape and one.dtype == other.dtype
            same = same and (not one.numel() or bool((one - other).abs().max() <= TOLERANCE * other.abs().max()))
        if not same:
            return False
    return True


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
