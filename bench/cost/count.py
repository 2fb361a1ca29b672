"""Counts one forward and backward of a decoder layer of a model without memory (on the device "meta").

    launches, bytes moved   of torch's operations by a dispatch mode: each computing operation is one launch that reads its inputs once
                            and writes its outputs once; of Triton's kernels, whoever's, by the interpreter (bench/traffic.py), where
                            a tensor that every program reads as a whole counts once, because the caches of a GPU serve the rest
    bytes kept              by hooks for saved tensors, each storage once, without parameters and what is made outside of the layer

The part "norms" is what the norms and the layer itself do, which is to add to the residual stream; in the backward, what belongs to those
operations, including the sums of gradients that meet there. Everything else of the layer is "rest".
"""

import inspect
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from math import prod
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpretedFunction

from bench.traffic import Launched, launched, moved
from triton_rmsnorm import autograd, ops
from triton_rmsnorm.runtime import config, interpreter, launch

GPU = config.SM_90
DIRECTIONS = ("forward", "backward")


class Cost(NamedTuple):
    """What one part does in one direction, in launches and bytes."""

    launches: int = 0
    read: float = 0
    written: float = 0

    @property
    def moved(self) -> float:
        return self.read + self.written

    def plus(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


class Counts(NamedTuple):
    """What a layer costs, by its parts "norms" and "rest"; "layer" is both."""

    costs: dict[tuple[str, str], Cost]  # by direction and part
    kept: dict[str, int]  # bytes by part

    def cost(self, part: str, *directions: str) -> Cost:
        """Both ways, unless a direction is named."""
        total = Cost()
        for (direction, of), cost in self.costs.items():
            if part in (of, "layer") and direction in (directions or DIRECTIONS):
                total = total.plus(cost)
        return total

    def kept_by(self, part: str) -> int:
        return sum(nbytes for of, nbytes in self.kept.items() if part in (of, "layer"))

    def as_row(self) -> dict[str, Any]:
        """For JSON."""
        costs = [{"direction": direction, "part": part, **cost._asdict()} for (direction, part), cost in sorted(self.costs.items())]
        return {"costs": costs, "kept": self.kept}


def of_row(row: dict[str, Any]) -> Counts:
    """What `as_row` has written."""
    costs = {(cost["direction"], cost["part"]): Cost(cost["launches"], cost["read"], cost["written"]) for cost in row["costs"]}
    return Counts(costs, row["kept"])


def count(
    model: nn.Module,
    layer: nn.Module,
    norms: set[nn.Module],
    inputs: dict[str, Tensor],
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> Counts:
    """Counts what `layer` does in a forward of the model, which runs in `context`, and in the backward from its first output."""
    counter = _Counter(layer, norms, model)
    with counter.watching():
        with _Operations(counter), saved_tensors_hooks(counter.keep, lambda tensor: tensor), context():
            output = model(**inputs)[0]
        counter.direction = "backward"
        dy = torch.empty_like(output)
        with _Operations(counter):
            output.backward(dy)
    return counter.counts()


class _Counter:
    def __init__(self, layer: nn.Module, norms: set[nn.Module], model: nn.Module):
        self.layer, self.norms = layer, norms
        self.direction = "forward"
        self.modules: list[nn.Module] = []  # that are being called
        self.marks: list[int] = [0]  # numbers of autograd's nodes at which another part begins
        self.parts: list[str | None] = [None]
        self.last: str | None = None  # the part of the node before
        self.costs: defaultdict[tuple[str, str], Cost] = defaultdict(Cost)
        self.launched: list[tuple[str, Launched]] = []
        self.given = {storage(tensor)._cdata for tensor in (*model.parameters(), *model.buffers())}
        self.norms_own: dict[int, torch.UntypedStorage] = {}  # what norms made, by address; it lives on, so that no address is used twice
        self.saved: dict[int, tuple[torch.UntypedStorage, bool]] = {}  # by address: whether a norm saves it

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            call = nn.Module._call_impl
            stack.enter_context(mock.patch.object(nn.Module, "_call_impl", lambda module, *a, **k: self._called(call, module, a, k)))
            run_tuned = lambda tuner, *a, **k: tuner.fn.run(*a, **k, **tuner.configs[0].all_kwargs())  # noqa: E731
            stack.enter_context(mock.patch.object(Autotuner, "run", run_tuned))
            stack.enter_context(mock.patch.object(InterpretedFunction, "run", lambda kernel, *a, **k: self._run(kernel, a, k)))
            stack.enter_context(mock.patch.object(interpreter, "run", self._run_ours))
            stack.enter_context(launch.pretend(GPU, on="meta"))
            for module in (ops, autograd):  # the mode that counts does not have to see our operators
                stack.enter_context(mock.patch.object(module, "is_direct", lambda tensors: True))
            yield

    def _called(self, call: Callable, module: nn.Module, args: tuple, named: dict[str, Any]) -> Any:
        if module is self.layer:  # positions and masks, which all layers share
            self.given |= {storage(tensor)._cdata for tensor in tree_leaves((args[1:], named)) if isinstance(tensor, Tensor)}
        self.modules.append(module)
        self._mark()
        try:
            return call(module, *args, **named)
        finally:
            self.modules.pop()
            self._mark()

    def _mark(self) -> None:
        if self.direction == "forward":
            self.marks.append(torch._C._autograd._get_sequence_nr())
            self.parts.append(self.part)

    @property
    def part(self) -> str | None:
        """The part that is at work; None outside of the layer."""
        if self.direction == "forward":
            if self.layer not in self.modules:
                return None
            return "norms" if self.modules[-1] is self.layer or self.modules[-1] in self.norms else "rest"
        node = torch._C._current_autograd_node()
        if node is not None and not node.name().endswith("AccumulateGrad"):
            self.last = self.parts[bisect(self.marks, node._sequence_nr()) - 1]
        return self.last

    def add(self, cost: Cost) -> None:
        part = self.part
        if part is not None:
            self.costs[self.direction, part] = self.costs[self.direction, part].plus(cost)

    def made(self, tensors: list[Tensor]) -> None:
        if self.part == "norms":
            self.norms_own |= {storage(tensor)._cdata: storage(tensor) for tensor in tensors}

    def keep(self, tensor: Tensor) -> Tensor:
        part, kept = self.part, storage(tensor)
        if part is not None and kept._cdata not in self.given:
            of_norms = part == "norms" or kept._cdata in self.norms_own
            self.saved[kept._cdata] = kept, of_norms or self.saved.get(kept._cdata, (kept, False))[1]
        return tensor

    def _run(self, kernel: InterpretedFunction, arguments: tuple, options: dict[str, Any]) -> None:
        """Of anybody's kernel. Among the options may be arguments of the kernel."""
        named = {name: value for name, value in options.items() if name in kernel.arg_names}
        self._launch(kernel, options["grid"], inspect.getcallargs(kernel.fn, *arguments, **named))

    def _run_ours(self, kernel: InterpretedFunction, grid: tuple[int, ...], pointers: dict[str, Any], values: dict[str, Any]) -> None:
        self._launch(kernel, grid, pointers | values)

    def _launch(self, kernel: InterpretedFunction, grid: Any, arguments: dict[str, Any]) -> None:
        if self.part is not None:
            self.launched.append((self.direction, launched(kernel, grid, arguments)))

    def counts(self) -> Counts:
        for direction, one in self.launched:  # all Triton kernels are norms', also where the output of one is computed again
            self.costs[direction, "norms"] = self.costs[direction, "norms"].plus(cost_of(one))
        kept: Counter[str] = Counter()
        for one, of_norms in self.saved.values():
            kept["norms" if of_norms else "rest"] += one.nbytes()
        return Counts(dict(self.costs), dict(kept))


def cost_of(launch: Launched) -> Cost:
    loaded, stored, again = moved(launch)
    return Cost(1, loaded.total() - again.total(), stored.total())


def storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


class _Operations(TorchDispatchMode):
    """Counts torch's operations as they reach a device."""

    def __init__(self, counter: _Counter):
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = op(*args, **(kwargs or {}))
        arguments = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        results = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        name = op.overloadpacket.__name__
        if op.is_view or name in _FREE or not results:
            if not any(storage(a)._cdata == storage(b)._cdata for a in arguments for b in results):
                self.counter.made(results)
            return result
        read = [] if name in _FILLS else arguments[1:] if name == "copy_" else arguments
        self.counter.made(results)
        self.counter.add(Cost(1, _bytes(read), _bytes(results)))
        return result


# Operations that only describe or allocate memory, and those that write without reading it.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "_reshape_alias", "lift_fresh"}
_FILLS = {"zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "new_zeros", "new_ones", "new_full", "fill_", "zero_", "arange"}


def _bytes(tensors: list[Tensor]) -> int:
    """Of distinct memory: an operand that is given twice is read once."""
    distinct = {(storage(t)._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype): t for t in tensors}
    return sum(_elements(tensor) * tensor.itemsize for tensor in distinct.values())


def _elements(tensor: Tensor) -> int:
    """Distinct elements of a tensor, which may be expanded."""
    return prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
