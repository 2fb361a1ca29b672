"""Exact recomputation: autograd does not keep the outputs of the norms, and the backward computes them again, bit for bit.

The operations that follow a norm, such as linear layers, save its output y for their backward. Inside `recompute_norms` autograd hands all
that is to be saved to hooks. They recognize y, or a view of it, by its storage, and save a `_Recipe` in its place: what was normalized, the
weight, the gate and rstd, which the norm saves anyway. The first operation that needs y in a backward computes it, the others of that
backward share it, and it is dropped after the last of them.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from triton_rmsnorm.reference import Spec
from triton_rmsnorm.runtime import plan

active = 0  # contexts that are open, on any thread
_lock = threading.Lock()


@contextmanager
def recompute_norms() -> Iterator[None]:
    """Inside, autograd does not keep the outputs of our norms; the backward computes them again, with the same bits.

    An output y of `rms_norm`, `add_rms_norm`, `rms_norm_gated`, their modules and patched norms is usually kept by the operations that use
    it. Inside this context they keep what y is computed from instead, which the norm keeps anyway: its input (the sum, where there is a
    residual), the weight, the gate and rstd. This costs one more launch per norm in the backward, which reads these and writes y. Gradients
    do not change. The backward may run inside the context or after it::

        with triton_rmsnorm.recompute_norms():
            loss = model(**batch).loss
        loss.backward()

    It holds for the thread that enters it. These keep y as usual: operations that save it in another dtype or after it was modified in
    place, norms that need no gradient, and norms inside torch.compile, torch.func or with tensor subclasses. Hooks for saved tensors that
    were set before, such as those of activation offloading and checkpointing, see everything else that is saved; hooks that are set inside
    take precedence, so there is no effect inside a checkpointed function unless that function enters the context itself. Where there are
    hooks, autograd saves the data of parameters, not the parameters: DeepSpeed ZeRO-3, which gives them other data, then frees nothing.

    Two things do not go together with it. Writing to y without telling autograd, through `y.data` or in a kernel, is not noticed, and the
    gradients are then wrong; Liger's rotary embedding writes in this way to the output of a q_norm or k_norm. Compiled autograd
    (`torch._dynamo.config.compiled_autograd`) does not support these hooks.

    Returns:
        A context manager. It may be nested, which has no further effect.

    Raises:
        RuntimeError: in the backward, if a tensor that it needs was modified in place, as autograd does. This includes the input of the
            norm as soon as y is needed. torch.func transformations raise inside the context, as with any hooks for saved tensors.
    """
    global active
    allowed = not torch.compiler.is_compiling() and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    if not allowed or _current_hooks() is not None:
        yield
        return
    with _lock:
        active += 1
    try:
        hooks = _Hooks(outer=_top())
        with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
            yield
    finally:
        with _lock:
            active -= 1


def remember(y: Tensor, saved: tuple[Tensor | None, ...], spec: Spec) -> "_Recipe | None":
    """Called by a norm while contexts are open, with what it saves: (x or x + residual, weight, gate, rstd).

    Returns:
        What y is computed from, or None if no context is in effect here. The norm holds it until its backward.
    """
    hooks = _current_hooks()
    if hooks is None:
        return None
    recipe = _Recipe(y, saved, spec, hooks)
    y.untyped_storage()._triton_rmsnorm_recipe = weakref.ref(recipe)  # type: ignore[attr-defined]
    return recipe


def _kept(tensor: Tensor, version: int) -> Tensor:
    """A tensor that is saved as usual. Where there are hooks, autograd leaves the check of its version to them."""
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {version} instead"
        )
    return tensor


class _Later:
    """Stands for a saved tensor: y or a view of it, for one operation. Called, it gives the tensor."""

    def __init__(self, recipe: "_Recipe", view: Tensor):
        self.recipe = recipe
        self.layout = view.shape, view.stride(), view.storage_offset()
        self.backward: int | None = None  # in which it was last unpacked
        with recipe.lock:
            recipe.users.add(self)

    def __call__(self) -> Tensor:
        return self.recipe.y(self).as_strided(*self.layout)


class _Hooks:
    """Saves recipes in place of norms' outputs, and everything else as the hooks outside of these do: each as what restores it."""

    def __init__(self, outer: tuple[Any, Any] | None):
        self.outer = outer

    def pack(self, tensor: Tensor) -> Callable[[], Tensor]:
        if type(tensor) is Tensor and tensor.layout is torch.strided:
            reference = getattr(tensor.untyped_storage(), "_triton_rmsnorm_recipe", None)
            recipe = None if reference is None else reference()
            if recipe is not None and recipe.describes(tensor):
                return _Later(recipe, tensor)
        if self.outer is None:
            return partial(_kept, tensor, tensor._version)
        pack, unpack = self.outer
        return partial(unpack, pack(tensor))

    @staticmethod
    def unpack(restore: Callable[[], Tensor]) -> Tensor:
        return restore()


class _Recipe:
    """Computes the output y of a norm again. It holds y only during a backward that uses it."""

    def __init__(self, y: Tensor, saved: tuple[Tensor | None, ...], spec: Spec, hooks: _Hooks):
        self.saved = [None if tensor is None else hooks.pack(tensor.detach()) for tensor in saved]
        self.spec = spec
        self.dtype, self.version = y.dtype, y._version
        self.stream = torch.cuda.current_stream(y.device) if y.is_cuda else None
        self.lock = threading.RLock()
        self.users: weakref.WeakSet[_Later] = weakref.WeakSet()

    def describes(self, tensor: Tensor) -> bool:
        """Whether the tensor, in the storage of y, is a view of y as the norm wrote it."""
        return tensor._version == self.version and tensor.dtype == self.dtype and not tensor.is_neg()

    def y(self, user: _Later) -> Tensor:
        """y, which is kept for the other users of the backward under way."""
        backward = _Backward.current()
        with self.lock:
            y = backward.outputs.get(self) if backward else None
            if y is None:
                y = self._compute()
            if backward:
                user.backward = backward.number
                if any(other.backward != backward.number for other in self.users):
                    backward.outputs[self] = y
                else:
                    backward.outputs.pop(self, None)
        self._wait(y)
        return y

    def _compute(self) -> Tensor:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.no_grad(), torch.cuda.stream(self.stream):  # where the stream is None, this does nothing
            u, weight, gate, rstd = (None if restore is None else restore() for restore in self.saved)
            return plan.output(u, weight, gate, rstd, self.spec, self.dtype)  # type: ignore[arg-type] # u and rstd are always saved

    def _wait(self, y: Tensor) -> None:
        """Orders what follows on the current stream after the computation of y, which took place on the stream of the forward."""
        if self.stream is not None:
            stream = torch.cuda.current_stream(self.stream.device)
            if stream != self.stream:
                stream.wait_stream(self.stream)
                y.record_stream(stream)


class _Backward:
    """The outputs that one backward has computed again and still needs.

    Autograd holds it as a callback for the end of this backward, so it goes with the backward, also when that fails.
    """

    running: ClassVar[weakref.WeakValueDictionary[int, "_Backward"]] = weakref.WeakValueDictionary()

    def __init__(self, number: int):
        self.number = number
        self.outputs: dict[_Recipe, Tensor] = {}

    def __call__(self) -> None:
        self.outputs.clear()

    @classmethod
    def current(cls) -> "_Backward | None":
        """That of the backward under way on this thread; None outside of any."""
        number = torch._C._current_graph_task_id()
        if number < 0:
            return None
        with _lock:
            backward = cls.running.get(number)
            if backward is None:
                backward = cls.running[number] = cls(number)
                torch.autograd.Variable._execution_engine.queue_callback(backward)
        return backward


def _top() -> tuple[Any, Any] | None:
    """The hooks for saved tensors that are in effect on this thread."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _current_hooks() -> _Hooks | None:
    """Our hooks, if they are in effect on this thread."""
    top = _top()
    owner = getattr(top[0], "__self__", None) if top else None
    return owner if isinstance(owner, _Hooks) else None
