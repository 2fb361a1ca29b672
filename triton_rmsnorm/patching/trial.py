"""Whether another forward of a layer computes what its own does: a trial of both on random input, outputs and gradients.

The layer in the trial has its own class, attributes, norms and parameters, the latter drawn anew, on the CPU. Its other submodules are
replaced by random functions of all tensors that they are given. Both forwards call them alike, so nothing that tells the two apart is
lost, and the trial needs neither room for their weights nor arguments that only they understand. The sums and norms of both are computed
one after another in torch: the trial is of the rewritten source, not of the kernels.
"""

import dis
import inspect
import itertools
import sys
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from triton_rmsnorm.patching.inspection import is_epsilon
from triton_rmsnorm.patching.isolation import Draws, copy_with
from triton_rmsnorm.patching.probes import EPS_OF_TENSORS
from triton_rmsnorm.patching.proof import FEW_COLUMNS
from triton_rmsnorm.patching.report import LeftAloneError, in_words
from triton_rmsnorm.patching.source import ADD
from triton_rmsnorm.patching.subclass import original_of, proof_of

# Largest difference of an output or gradient, relative to its largest element: sums in other orders, in float32.
TOLERANCE = 1e-4
# A layer with more elements in its own parameters and buffers, without its submodules', is not tried.
LARGEST_OWN = 2**24


class _Output(Tensor):
    """A tensor that is also a tuple of as many tensors as are asked for. What is computed from it is a plain tensor."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    def __getitem__(self, index: Any) -> Tensor:
        return torch.sin((2 + index) * self.as_subclass(Tensor)) if type(index) is int else self.as_subclass(Tensor)[index]

    def __iter__(self) -> Any:
        frame = sys._getframe(1)
        for instruction in dis.get_instructions(frame.f_code):
            if instruction.offset == frame.f_lasti and instruction.opname == "UNPACK_SEQUENCE":
                return (self[index] for index in range(instruction.arg or 0))
        return iter(self.as_subclass(Tensor))


def try_out(layer: nn.Module, names: set[str], rewritten: type[nn.Module]) -> set[str]:
    """The norms among `names` that the trial went through, sum and all. It is first tried with few columns, which may not fit.

    Args:
        layer: it is only looked at.
        names: of its fused norms.
        rewritten: a subclass of its class, with another forward; decorators of both are left out.

    Raises:
        LeftAloneError: forward does not run, the two differ, or none of the norms is reached.
    """
    shape = _normalized(layer.get_submodule(min(names)))
    if len(shape) == 1 and shape[0] > FEW_COLUMNS:
        with suppress(LeftAloneError):
            return _try_out(_Trial(layer, names, shape, (FEW_COLUMNS,)), names, rewritten)
    return _try_out(_Trial(layer, names, shape, shape), names, rewritten)


def _try_out(trial: "_Trial", names: set[str], rewritten: type[nn.Module]) -> set[str]:
    original = type(trial.layer)
    name_of = {id(trial.layer._modules[name]): name for name in names}
    seen: set[str] = set()

    def see(x: Tensor, residual: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        seen.add(name_of[id(norm)])
        return add_and_normalize(x, residual, norm)

    vars(trial.layer)[ADD] = see
    failure = ""
    for filled, training in itertools.product((False, True), (False, True)):
        if seen == names and not training:
            break
        trial.layer.training = training
        arguments = trial.arguments(filled)
        try:
            expected = trial.run(original, arguments)
        except (Exception, SystemExit) as error:  # of any kind: it is the layer's own code, on input that it may not be made for
            failure = failure or f"its forward does not run on a trial: {in_words(error)}"
            continue
        try:
            actual = trial.run(rewritten, arguments)
        except (Exception, SystemExit) as error:
            raise LeftAloneError(f"rewritten, its forward fails on a trial: {in_words(error)}") from None
        if not _agree(actual, expected):
            raise LeftAloneError("rewritten, its forward computes something else on a trial")
    if not seen:
        raise LeftAloneError(failure or "the residual add was never reached when the layer was run on test input")
    return seen


def add_and_normalize(x: Tensor, residual: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What the rewritten forward calls, without our kernels. Hooks of the sum see no gradient of the norm, either."""
    total = x + residual
    return norm(total), total.view_as(total)


class _Trial:
    """A layer made small, and its input.

    Args:
        layer: it is only looked at.
        names: of its fused norms.
        shape: what these normalize, which is also the size of everything else in its forward.
        drawn: the shape that takes the place of this.
    """

    def __init__(self, layer: nn.Module, names: set[str], shape: tuple[int, ...], drawn: tuple[int, ...]):
        own = [t for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None]
        if any(is_lazy(t) for t in own):
            raise LeftAloneError("its own parameters are not initialized yet")
        if sum(t.numel() for t in own) > LARGEST_OWN:
            raise LeftAloneError("its own parameters are too large for a trial")
        self.generator = torch.Generator().manual_seed(0)
        self.leaves: list[Tensor] = []  # whose gradients are compared
        self.stand_ins: dict[int, nn.Module] = {}
        self.rows = (1, 2)
        self.shape = drawn
        self.sizes = dict(zip(shape, drawn, strict=True))
        self.layer = self._drawn(layer, names)

    def run(self, cls: type[nn.Module], arguments: dict[str, Tensor]) -> list[Tensor | None]:
        """Outputs and gradients, as a module of this class."""
        object.__setattr__(self.layer, "__class__", cls)
        tensors = {name: value.as_subclass(_Output) for name, value in arguments.items()}
        with Draws(torch.Generator().manual_seed(0)):
            leaves = tree_leaves(inspect.unwrap(cls.forward)(self.layer, **tensors))
        outputs = [leaf.as_subclass(Tensor) for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        generator = torch.Generator().manual_seed(1)
        terms = [(torch.randn(y.shape, generator=generator, dtype=y.dtype) * y).sum() for y in outputs if y.requires_grad]
        loss = torch.stack(terms).sum()
        return [*outputs, *torch.autograd.grad(loss, self.leaves, allow_unused=True)]

    def arguments(self, filled: bool) -> dict[str, Tensor]:
        """Tensors for what forward requires, and, if `filled`, also for what is None by default."""
        function = inspect.unwrap(type(self.layer).forward)
        parameters = list(inspect.signature(function).parameters.values())[1:]
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        wanted = [p.name for p in parameters if p.kind in named and (p.default is p.empty or (filled and p.default is None))]
        return {name: self._leaf(*self.rows, *self.shape) for name in wanted}

    def _leaf(self, *shape: int) -> Tensor:
        leaf = self._randn(*shape).requires_grad_()
        self.leaves.append(leaf)
        return leaf

    def _parameter(self, *shape: int) -> nn.Parameter:
        parameter = nn.Parameter(1 + 0.3 * self._randn(*shape))
        self.leaves.append(parameter)
        return parameter

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32)

    def _drawn(self, module: nn.Module, drawn: Collection[str] = ()) -> nn.Module:
        """Of its class before it was patched, with random values for its own tensors, and for those of submodules named in `drawn`."""

        def submodule(name: str, child: nn.Module) -> nn.Module:
            return self._drawn(child) if name in drawn else self._stand_in(name, child)

        return copy_with(module, self._tensor, submodule, original_of(type(module)))

    def _tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Random; integers are zeros."""
        if is_epsilon(name, tensor):
            return torch.full(tensor.shape, EPS_OF_TENSORS, dtype=torch.float32)
        shape = [self.sizes.get(size, size) for size in tensor.shape]
        if isinstance(tensor, nn.Parameter):
            return self._parameter(*shape)
        return self._randn(*shape) if tensor.is_floating_point() else torch.zeros(shape, dtype=tensor.dtype)

    def _stand_in(self, name: str, module: nn.Module) -> nn.Module:
        """Any other module: of its class and attributes, it computes a random function of the tensors that it is given."""
        if id(module) in self.stand_ins:
            return self.stand_ins[id(module)]
        bare = self.stand_ins[id(module)] = copy_with(module, _meta, self._stand_in)
        scale = self._parameter()

        def forward(*args: Any, **named: Any) -> Tensor:
            tensors = [t for t in tree_leaves((args, named)) if isinstance(t, Tensor) and t.is_floating_point()]
            total = torch.ones(*self.rows, *self.shape, dtype=torch.float32)
            for number, tensor in enumerate(tensors, 1):
                plain = tensor.as_subclass(Tensor)
                total = total + (plain if plain.shape == total.shape else plain.mean()) / number
            return torch.sin(scale * total).as_subclass(_Output)

        vars(bare)["forward"] = forward
        return bare


def _meta(name: str, tensor: Tensor) -> Tensor | None:
    """What can be asked of a stand-in's tensor; None if it cannot be read, such as an uninitialized one."""
    return None if is_lazy(tensor) else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _normalized(norm: nn.Module) -> tuple[int, ...]:
    """The shape that a replaced norm normalizes; any if it takes any."""
    proof = proof_of(type(norm))
    if proof.weight is not None:
        return tuple(getattr(norm, proof.weight).shape[-proof.dims :])
    return proof.shape or (64,)


def _agree(actual: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    """Whether outputs and gradients are the same ones, up to TOLERANCE."""
    return len(actual) == len(expected) and all(map(_same, actual, expected))


def _same(actual: Tensor | None, expected: Tensor | None) -> bool:
    if actual is None or expected is None:
        return actual is expected
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    return not actual.numel() or bool((actual - expected).abs().max() <= TOLERANCE * expected.abs().max())
