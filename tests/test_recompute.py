"""Recomputation of norm outputs: the same bits, exactly the outputs' bytes less, nothing held afterwards, beside the hooks of others."""

import copy
import functools
import gc
import inspect
import pickle
import re
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from processes import compiled
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from variants import id_of, ours

from triton_rmsnorm import RMSNorm, add_rms_norm, patch, patched, recompute, recompute_norms, rms_norm, rms_norm_gated, unpatch
from triton_rmsnorm.reference import Spec
from triton_rmsnorm.runtime import launch, plan
from triton_rmsnorm.testing import draw

N = 48
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Kept:
    """Bytes that autograd keeps, each storage once, without those of given tensors."""

    def __init__(self, given: list[Tensor]):
        self.given = {address(tensor) for tensor in given}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor: Tensor) -> Tensor:
        if address(tensor) not in self.given:
            self.storages[address(tensor)] = tensor.untyped_storage()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Again(NamedTuple):
    """An output that was computed again: its values, and whether it is still there."""

    values: Tensor
    reference: weakref.ref

    @property
    def held(self) -> bool:
        return self.reference() is not None


@pytest.fixture
def again(monkeypatch) -> list[Again]:
    """The outputs that are computed again during a test."""
    outputs = []
    compute = plan.output

    def noted(*arguments):
        y = compute(*arguments)
        outputs.append(Again(y.clone(), weakref.ref(y)))
        return y

    monkeypatch.setattr(plan, "output", noted)
    return outputs


class Run(NamedTuple):
    loss: Tensor
    gradients: tuple[Tensor | None, ...]
    kept: int


def run(function: Callable[..., Tensor], tensors: list[Tensor], context: Callable[[], AbstractContextManager] = nullcontext) -> Run:
    """One training step of `function`, whose forward runs in a context."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    kept = Kept(leaves)
    with kept.hooks(), context():
        loss = function(*leaves)
    return Run(loss.detach(), torch.autograd.grad(loss, leaves, allow_unused=True), kept.bytes)


def assert_equal_bits(ours: Run, theirs: Run) -> None:
    assert torch.equal(ours.loss, theirs.loss)
    for i, (our, their) in enumerate(zip(ours.gradients, theirs.gradients, strict=True)):
        assert (our is None) == (their is None), i
        assert our is None or torch.equal(our, their), i


def assert_recomputed(function: Callable[..., Tensor], tensors: list[Tensor], nbytes: int) -> None:
    """The context changes no bit, and `nbytes` fewer are kept."""
    usual, less = run(function, tensors), run(function, tensors, recompute_norms)
    assert_equal_bits(less, usual)
    assert usual.kept - less.kept == nbytes


class Case(NamedTuple):
    """What a norm has besides x; dtypes that are None are that of x."""

    options: dict[str, Any] = {}  # noqa: RUF012
    weight: bool = True
    residual: bool = False
    gate: bool = False
    residual_dtype: torch.dtype | None = None
    shape: tuple[int, ...] = (2, 3, N)
    normalized: int = 1


CASES = {
    "plain": Case(),
    "no_weight": Case(weight=False),
    "two_dims": Case(shape=(5, 4, N), normalized=2),
    "groups_and_offset": Case({"group_size": 12, "weight_offset": 1.0}),
    "x_hat_rounded": Case({"x_hat_dtype": torch.bfloat16}),
    "rstd_rounded": Case({"x_hat_dtype": torch.float16, "rstd_dtype": torch.bfloat16}),
    "residual": Case(residual=True),
    "residual_fp32": Case(residual=True, residual_dtype=torch.float32),
    "residual_bf16": Case(residual=True, residual_dtype=torch.bfloat16),
    "gate": Case({"activation": "silu"}, gate=True),
    "gate_first": Case({"activation": "gelu_tanh", "norm_before_gate": False, "group_size": 24}, gate=True),
    "gate_rounded": Case({"activation": "gelu", "x_hat_dtype": torch.bfloat16}, gate=True),
    "long_rows": Case(shape=(2, 40000)),
    "no_rows": Case(shape=(0, N)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_norm(case, dtype, device, again):
    """Three users of y, one of them of a view, and a user of x + residual."""
    norm = ours(Spec(case.shape[-case.normalized :], 1e-6)._replace(**case.options))
    names = ["x", *(name for name in ("weight", "residual", "gate") if getattr(case, name))]
    tensors = [draw(case.shape[-case.normalized :] if name == "weight" else case.shape, dtype, device) for name in names]
    if case.residual_dtype is not None:
        tensors[names.index("residual")] = draw(case.shape, case.residual_dtype, device)
    outputs = []

    def function(*leaves):
        y = norm(**dict(zip(names, leaves, strict=True)))
        y, total = y if case.residual else (y, None)
        outputs.append(y.detach().clone())
        loss = y.sin().sum() + y.flatten(0, -2).t().cos().sum() + y.square().sum()
        return loss if total is None else loss + total.square().sum()

    usual, less = run(function, tensors), run(function, tensors, recompute_norms)
    assert_equal_bits(less, usual)
    assert usual.kept - less.kept == outputs[0].nbytes
    assert [torch.equal(output.values, outputs[0]) for output in again] == [True]


VIEWS = {
    "itself": lambda y: y,
    "reshape": lambda y: y.reshape(-1, 4),
    "transpose": lambda y: y.transpose(0, -1),
    "slice": lambda y: y[1:, :, 3:20:2],
    "select": lambda y: y[1],
    "expand": lambda y: y.unsqueeze(1).expand(-1, 7, -1, -1),
    "chunk": lambda y: y.chunk(3, -1)[1],
    "diagonal": lambda y: y.diagonal(0, 0, 1),
    "unfold": lambda y: y.unfold(-1, 8, 4),
    "view of a view": lambda y: y.view(-1).view(3, -1)[1:].t(),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view, device, again):
    x, weight = draw((2, 3, N), torch.float32, device), draw((N,), torch.float32, device)
    factor = draw(view(torch.empty(2, 3, N, device=device)).shape, torch.float32, device)
    assert_recomputed(lambda x, w, f: (view(rms_norm(x, (N,), w)) * f).sum(), [x, weight, factor], x.nbytes)
    assert len(again) == 1


KEPT = {
    "without a norm in the graph": lambda y: y.detach(),  # which therefore keeps no input
    "another dtype": lambda y: y.view(torch.int32),
    "lazily negated": lambda y: torch._neg_view(y),
    "modified before": lambda y: y.mul_(2),
    "a view modified before": lambda y: (y[0].zero_(), y)[1],
}


@pytest.mark.parametrize("use", KEPT.values(), ids=KEPT)
def test_what_is_not_y_is_kept(use, device, again):
    x, factor = draw((2, 3, N), torch.float32, device), draw((2, 3, N), torch.float32, device)
    assert_recomputed(lambda x, f: (use(rms_norm(x, (N,))) * f).sum(), [x, factor], 0)
    assert not again


def test_strided_input_and_weight(device):
    x, weight = draw((3, 5, 2 * N), torch.float32, device), draw((2 * N,), torch.float32, device)
    readings = [lambda x: x[..., :N], lambda x: x[..., ::2], lambda x: x.transpose(0, 1)[..., N:], lambda x: torch._neg_view(x)[..., :N]]
    for read in readings:
        assert_recomputed(lambda x, w, read=read: rms_norm(read(x), (N,), w[::2]).square().sum(), [x, weight], 4 * 15 * N)


class Attention(nn.Module):
    """A norm, three linear layers that share its output, and a norm on what they give."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.norm, self.q_norm = RMSNorm(N, device=device), RMSNorm(12, device=device)
        self.q, self.k, self.v = (nn.Linear(N, N, device=device) for _ in range(3))
        self.out = nn.Linear(12, 12, device=device)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y) for layer in (self.q, self.k, self.v))
        return x + self.out(self.q_norm((q * k).unflatten(-1, (4, 12)))).flatten(-2) * v


@pytest.fixture
def attention(device) -> Attention:
    return Attention(device)


@pytest.fixture
def x(device) -> Tensor:
    return draw((2, 3, N), torch.float32, device)


def trained(model: Callable[[Tensor], Tensor], x: Tensor, context: Callable[[], AbstractContextManager] = nullcontext) -> Run:
    """A step of a model, whose parameters are not counted as kept."""
    parameters = list(model.parameters())
    leaf = x.detach().requires_grad_()
    kept = Kept([leaf, *parameters])
    with kept.hooks(), context():
        loss = model(leaf).square().sum()
    return Run(loss.detach(), torch.autograd.grad(loss, [leaf, *parameters]), kept.bytes)


def test_once_for_all_users(attention, x, again):
    usual = trained(attention, x)
    assert not again
    less = trained(attention, x, recompute_norms)
    assert_equal_bits(less, usual)
    assert usual.kept - less.kept == 2 * x.nbytes
    assert len(again) == 2 and not any(output.held for output in again)


def test_dropped_after_the_last_user(device, again):
    """When the norm's own backward runs, its output is gone already."""
    x = draw((3, N), torch.float32, device).requires_grad_()
    with recompute_norms():
        y = rms_norm(x, (N,))
        loss = y.sin().sum() + y.cos().sum()
    held = []
    y.register_hook(lambda _: held.append([output.held for output in again]))
    loss.backward()
    assert held == [[False]]


def test_dropped_at_the_end_where_a_user_is_not_needed(attention, x, again):
    with recompute_norms():
        loss = attention(x).sum()
    torch.autograd.grad(loss, [attention.q.weight], retain_graph=True)
    assert [output.held for output in again] == [False] * len(again) and again
    torch.autograd.grad(loss, [attention.q.weight, attention.k.weight])
    assert not any(output.held for output in again)


def test_chain_of_norms(device):
    """The output of one norm is the input of the next, so it is not kept either."""
    x, weight = draw((4, N), torch.float32, device), draw((N,), torch.float32, device)

    def function(x, w):
        y = rms_norm(x, (N,), w)
        z, total = add_rms_norm(y, x, (N,), w)
        return (rms_norm_gated(z, y, (N,), w) * total).square().sum()

    assert_recomputed(function, [x, weight], 3 * x.nbytes)


def test_several_losses_and_retain_graph(attention, x, again):
    def gradients(context: Callable[[], AbstractContextManager]) -> list[tuple[Tensor, ...]]:
        with context():
            y = attention(x)
            losses = y.sum(), y.square().sum()
        return [torch.autograd.grad(losses[i], list(attention.parameters()), retain_graph=i < 2) for i in (0, 1, 0)[:2]] + [
            torch.autograd.grad(losses[1], list(attention.parameters()))
        ]

    usual, less = gradients(nullcontext), gradients(recompute_norms)
    assert all(torch.equal(a, b) for ours, theirs in zip(less, usual, strict=True) for a, b in zip(ours, theirs, strict=True))
    assert len(again) == 3 * 2 and not any(output.held for output in again)


def test_second_backward_without_retain_graph_is_an_error(attention, x):
    with recompute_norms():
        loss = attention(x).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("context", [recompute_norms, save_on_cpu])
@pytest.mark.parametrize("until", range(3), ids=["forward", "backward", "double backward"])
def test_double_backward(until, context, attention, x):
    """With the context around the forward alone, around the backward, too, or around all."""

    def gradients(context: Callable[[], AbstractContextManager]) -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        with ExitStack() as stack:
            stack.enter_context(context())
            loss = attention(leaf).square().sum()
            if until == 0:
                stack.close()
            (dx,) = torch.autograd.grad(loss, [leaf], create_graph=True)
            if until == 1:
                stack.close()
            return torch.autograd.grad(dx.square().sum(), [leaf, *attention.parameters()], allow_unused=True)

    for usual, less in zip(gradients(nullcontext), gradients(context), strict=True):
        assert (usual is None) == (less is None)
        assert usual is None or torch.equal(less, usual)


MODIFIED = {
    "x": lambda leaves, y: leaves["x"].mul_(2),
    "x by a view": lambda leaves, y: leaves["x"][0].zero_(),
    "weight": lambda leaves, y: leaves["w"].add_(1),
    "a tensor of others": lambda leaves, y: leaves["f"].add_(1),
}


@pytest.mark.parametrize("modify", MODIFIED.values(), ids=MODIFIED)
@pytest.mark.parametrize("context", [nullcontext, recompute_norms])
def test_modified_in_place(modify, context, device):
    """An error with recomputation as without."""
    shapes = {"x": (3, N), "w": (N,), "f": (3, N)}
    leaves = {name: draw(shape, torch.float32, device).requires_grad_() for name, shape in shapes.items()}
    with context():
        tensors = {name: leaf * 1 for name, leaf in leaves.items()}
        y = rms_norm(tensors["x"], (N,), tensors["w"])
        loss = (y * tensors["f"]).sum()
    with torch.no_grad():
        modify(tensors, y)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: \[torch.*FloatTensor .*is at version 1; expected version 0"):
        loss.backward()


def test_modified_output_does_not_matter(x):
    """Where y was to be kept, this is an error; what is computed again is what was used."""
    x.requires_grad_()
    with recompute_norms():
        y = rms_norm(x, (N,))
        loss = y.sin().sum()
    (usual,) = torch.autograd.grad(rms_norm(x, (N,)).sin().sum(), [x])
    with torch.no_grad():
        y.zero_()
    assert torch.equal(torch.autograd.grad(loss, [x])[0], usual)


def test_backward_inside(attention, x, again, recipes):
    """A whole training loop in the context holds nothing from one step to the next."""
    reference = trained(attention, x)
    with recompute_norms():
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            gradients = torch.autograd.grad(attention(leaf).square().sum(), [leaf, *attention.parameters()])
            assert all(torch.equal(*pair) for pair in zip(gradients, reference.gradients, strict=True))
            assert not held(recipes) and not any(output.held for output in again)
    assert len(again) == len(recipes) == 4


@pytest.fixture
def recipes(monkeypatch) -> Iterator[list[weakref.ref]]:
    """What outputs are computed from; the garbage collector is off, so these go by themselves."""
    made = []
    remember = recompute.remember

    def noted(*arguments):
        recipe = remember(*arguments)
        made.append(weakref.ref(recipe))
        return recipe

    monkeypatch.setattr(recompute, "remember", noted)
    gc.collect()
    gc.disable()
    yield made
    gc.enable()


def held(references: list[weakref.ref]) -> list[Any]:
    return [reference() for reference in references if reference() is not None]


def test_nothing_is_held_after_the_backward(device, again, recipes):
    """Also where the output lives on."""
    x = draw((3, N), torch.float32, device).requires_grad_()
    gate = draw((3, N), torch.float32, device)
    with recompute_norms():
        u = x * 2
        y = rms_norm_gated(u, gate, (N,))
        watched = [weakref.ref(tensor.untyped_storage()) for tensor in (u, gate)]
        loss = y.square().sum()
    del u, gate
    assert len(held(watched)) == 2 and len(held(recipes)) == 1
    loss.backward()
    assert not held(recipes) and not any(output.held for output in again)
    assert not recompute._Backward.running and recompute.active == 0
    gc.collect()  # Triton's interpreter leaves cycles with its arguments
    assert not held(watched)


@pytest.mark.parametrize("users", [0, 1])
def test_nothing_is_held_without_a_backward(users, device, recipes):
    x = draw((3, N), torch.float32, device).requires_grad_()
    with recompute_norms():
        u = x * 2
        watched = [weakref.ref(u.untyped_storage())]
        y = rms_norm(u, (N,))
        uses = [y.square() for _ in range(users)]
        del u
        assert held(watched) and held(recipes)
        del y, uses
        assert not held(recipes)
        gc.collect()
        assert not held(watched)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        raise ValueError("planned")


def test_nothing_is_held_after_an_exception_in_the_backward(device, again):
    """The graph is still there, and with it what y is computed from, but not y."""
    x = draw((3, N), torch.float32, device).requires_grad_()
    with recompute_norms():
        y = rms_norm(x, (N,))
        loss = Fails.apply(y.sin()).sum() + y.cos().sum()  # the operation that was last runs first
    with pytest.raises(ValueError, match="planned"):
        loss.backward()
    assert len(again) == 1 and not again[0].held
    assert not recompute._Backward.running


def test_exception_inside(x):
    with pytest.raises(ValueError, match="planned"), recompute_norms():
        raise ValueError("planned")
    assert recompute.active == 0 and recompute._current_hooks() is None
    kept = run(lambda x: rms_norm(x, (N,)).square().sum(), [x])
    assert_recomputed(lambda x: rms_norm(x, (N,)).square().sum(), [x], x.nbytes)
    assert kept.kept == run(lambda x: rms_norm(x, (N,)).square().sum(), [x]).kept


def test_nesting(attention, x, again):
    @contextmanager
    def nested() -> Iterator[None]:
        with recompute_norms():
            with recompute_norms():
                assert recompute.active == 1
            yield

    usual, less = trained(attention, x), trained(attention, x, nested)
    assert_equal_bits(less, usual)
    assert usual.kept - less.kept == 2 * x.nbytes and len(again) == 2


def test_threads(attention, x, again):
    """The context holds for its thread. A backward may run in any, where torch may add up in another order on the CPU."""
    usual = trained(attention, x)
    results: dict[Any, Any] = {}

    def backward(name: Any, leaf: Tensor, loss: Tensor) -> None:
        results[name] = torch.autograd.grad(loss, [leaf, *attention.parameters()], retain_graph=True)

    def elsewhere() -> None:
        results["kept"] = trained(attention, x).kept

    def forward() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        return leaf, attention(leaf).square().sum()

    kept = forward()
    in_thread(lambda: backward("usual", *kept))
    with recompute_norms():
        less = forward()
        in_thread(elsewhere)
    assert results["kept"] == usual.kept and not again

    threads = [threading.Thread(target=backward, args=(i, *less)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        assert all(torch.equal(*pair) for pair in zip(results[i], results["usual"], strict=True))
    assert not any(output.held for output in again)


def in_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_no_cost_outside(attention, x, monkeypatch):
    monkeypatch.setattr(recompute, "remember", None)  # not called
    trained(attention, x)


def test_no_gradient(attention, x, again):
    with recompute_norms(), torch.no_grad():
        y = attention(x)
    assert not y.requires_grad and not again


@contextmanager
def offloading() -> Iterator[None]:
    """Activation offloading: tensors are saved as copies elsewhere."""
    with saved_tensors_hooks(lambda tensor: (tensor.clone(), tensor.shape), lambda packed: packed[0].clone()):
        yield


@pytest.mark.parametrize("hooks", [offloading, save_on_cpu], ids=["offloading", "save_on_cpu"])
@pytest.mark.parametrize("order", ["outside", "inside"])
def test_hooks_of_others(hooks, order, attention, x, again):
    """Outer hooks see everything but norms' outputs; inner hooks see everything."""

    @contextmanager
    def outside() -> Iterator[None]:
        with hooks(), recompute_norms():
            yield

    @contextmanager
    def inside() -> Iterator[None]:
        with recompute_norms(), hooks():
            yield

    assert_equal_bits(trained(attention, x, outside if order == "outside" else inside), trained(attention, x))
    assert len(again) == (2 if order == "outside" else 0)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("place", ["around", "within"])
def test_checkpointing(use_reentrant, place, attention, x, again):
    def once(x: Tensor) -> Tensor:
        with recompute_norms() if place == "within" else nullcontext():
            return attention(x) * 2

    def function(x: Tensor) -> Tensor:
        with recompute_norms() if place == "around" else nullcontext():
            return checkpoint(once, attention(x), use_reentrant=use_reentrant).square().sum()

    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad((attention(attention(leaf)) * 2).square().sum(), [leaf])
    loss = function(leaf)
    (dx,) = torch.autograd.grad(loss, [leaf]) if not use_reentrant else (backward(loss, leaf),)
    assert torch.equal(dx, expected[0])
    assert len(again) == 2 and not any(output.held for output in again)


def backward(loss: Tensor, leaf: Tensor) -> Tensor:
    loss.backward()
    return leaf.grad


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpointing_with_the_backward_inside(use_reentrant, attention, x, again):
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(attention(leaf).square().sum(), [leaf])
    with recompute_norms():
        loss = checkpoint(attention, leaf, use_reentrant=use_reentrant).square().sum()
        assert torch.equal(backward(loss, leaf), expected)
    assert not any(output.held for output in again)


def test_compile_decides_itself(attention, x, again):
    def function(x: Tensor) -> Tensor:
        with recompute_norms():
            return attention(x).square().sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), [leaf])
    again.clear()
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), [leaf])[0], expected)
    assert not again and recompute.active == 0


def test_compiled_users(device, x, again):
    """A compiled function saves its inputs as any operation does."""
    layer = torch.compile(lambda y: y.sin() * y.cos(), backend="aot_eager")
    assert_equal_bits(
        run(lambda x: layer(rms_norm(x, (N,))).sum(), [x], recompute_norms), run(lambda x: layer(rms_norm(x, (N,))).sum(), [x])
    )
    assert len(again) == 1


def test_func_inside_is_refused_as_with_any_hooks(x):
    def loss(x: Tensor) -> Tensor:
        return rms_norm(x, (N,)).square().sum()

    with recompute_norms(), pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(loss)(x)

    def inside(x: Tensor) -> Tensor:
        with recompute_norms():
            return loss(x)

    torch.testing.assert_close(torch.func.grad(inside)(x), torch.func.grad(loss)(x))


@pytest.mark.skipif(launch.INTERPRETED, reason="streams need a GPU")
def test_streams(device, again):
    """Users on other streams than the norm's wait for what is computed again."""
    side = torch.cuda.Stream()
    x = draw((4096, 4096), torch.bfloat16, device)

    def function(x: Tensor) -> Tensor:
        y = rms_norm(x, (4096,))
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            other = y.sin()
            y.record_stream(side)
        loss = y.cos().float().sum()
        torch.cuda.current_stream().wait_stream(side)
        other.record_stream(torch.cuda.current_stream())
        return loss + other.float().sum()

    usual = run(function, [x])
    for _ in range(5):
        assert_equal_bits(run(function, [x], recompute_norms), usual)


def _stale(monkeypatch) -> None:
    monkeypatch.setattr(recompute._Kept, "unpack", lambda self: self.tensor)


def _wrong_view(monkeypatch) -> None:
    monkeypatch.setattr(recompute._Later, "unpack", lambda self: self.recipe.y(self).flatten().view(self.layout[0]))


def _kept_twice(monkeypatch) -> None:
    pack = recompute._Hooks.pack

    def keeping(self, tensor):
        if self.outer:
            self.outer[0](tensor)
        return pack(self, tensor)

    monkeypatch.setattr(recompute._Hooks, "pack", keeping)


DEFECTS = {
    "stale x": (_stale, partial(test_modified_in_place, MODIFIED["x"], recompute_norms)),
    "wrong view": (_wrong_view, partial(test_views, VIEWS["transpose"], again=[])),
    "kept twice": (_kept_twice, partial(test_views, VIEWS["itself"], again=[])),
}


@pytest.mark.parametrize(("plant", "check"), DEFECTS.values(), ids=DEFECTS)
def test_planted_defects_are_noticed(plant, check, monkeypatch, device):
    plant(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(device=device)


def tiny_llama(device: torch.device, head: bool = True, **fields: Any) -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(vocab_size=32, use_cache=False, **sizes, **fields)
    torch.manual_seed(0)
    model = (transformers.LlamaForCausalLM if head else transformers.LlamaModel)(config)
    return model.to(device, torch.bfloat16).train()


def step(model: nn.Module, context: Callable[[], AbstractContextManager] = nullcontext) -> Run:
    """A training step of a language model: all gradients, and the bytes that are kept."""
    tokens = torch.arange(24, device=next(model.parameters()).device).view(2, 12)
    model.zero_grad()
    kept = Kept([*model.parameters(), *model.buffers()])
    with kept.hooks(), context():
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return Run(loss.detach(), tuple(parameter.grad for parameter in model.parameters()), kept.bytes)


OUTPUTS = 5 * 24 * 64 * 2  # bytes of two norms per layer and one at the end


@pytest.mark.slow
@pytest.mark.parametrize("fuse_residual", [False, True])
def test_patch(fuse_residual, device):
    model = tiny_llama(device)
    patch(model, fuse_residual=fuse_residual)
    usual, in_context = step(model), step(model, recompute_norms)
    assert usual.kept - in_context.kept == OUTPUTS
    report = patch(model, recompute=True)
    assert "LlamaForCausalLM  outputs of norms" in str(report) and "recomputed" in str(report)
    assert "recomputed before" in str(patch(model, fuse_residual=fuse_residual, recompute=True))
    for once_more in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        less = step(once_more)
        assert_equal_bits(less, usual)
        assert_equal_bits(less, in_context)
        assert usual.kept - less.kept == OUTPUTS
    unpatch(model)
    assert type(model) is transformers.LlamaForCausalLM and not any(type(m).__module__.startswith("triton") for m in model.modules())


@pytest.mark.slow
def test_patched(device):
    model = tiny_llama(device)
    with patched(model, fuse_residual=True, recompute=True) as report:
        assert report.replaced == 5 and report.fused == 2
        kept = step(model).kept
    assert type(model) is transformers.LlamaForCausalLM
    with patched(model, fuse_residual=True):
        assert step(model).kept - kept == OUTPUTS


def test_patch_keeps_what_others_look_at(device):
    model = tiny_llama(device, head=False)
    tokens = torch.arange(24, device=device).view(2, 12)
    expected = model(input_ids=tokens, output_hidden_states=True)
    patch(model, recompute=True)
    assert str(type(model)) == str(transformers.LlamaModel) and isinstance(model, transformers.LlamaModel)
    assert inspect.signature(model.forward) == inspect.signature(transformers.LlamaModel(model.config).forward)
    assert len(model(input_ids=tokens, output_hidden_states=True).hidden_states) == len(expected.hidden_states) == 3


def test_patch_of_a_layer_that_is_fused_too(device):
    layer = tiny_llama(device).model.layers[0]
    original = type(layer)
    patch(layer, fuse_residual=True, recompute=True)
    assert type(layer).__mro__[2] is original
    unpatch(layer)
    assert type(layer) is original
    with patched(layer, fuse_residual=True, recompute=True):
        assert type(layer).__mro__[2] is original
    assert type(layer) is original


def test_patch_where_the_forward_was_replaced(device):
    model = tiny_llama(device)
    model.forward = functools.partial(model.forward)
    assert "LlamaForCausalLM  outputs of norms" in str(patch(model, recompute=True)) and type(model) is transformers.LlamaForCausalLM


def test_patch_needs_a_model():
    with pytest.raises(TypeError, match=r"target must be a torch.nn.Module for recompute, got 'llama'"):
        patch("llama", recompute=True)


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_gradient_checkpointing_of_a_model(use_reentrant, device):
    model = tiny_llama(device)
    patch(model)
    usual = step(model)
    patch(model, recompute=True)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    less = step(model)
    assert_equal_bits(less, usual)
    model.gradient_checkpointing_disable()
    assert step(model).kept == usual.kept - OUTPUTS


@pytest.mark.slow
def test_peft(device):
    """Frozen norms; the first of them gets no gradient and is kept, the others are kept by adapters and computed again."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "gate_proj"])
    model = peft.get_peft_model(tiny_llama(device), config, autocast_adapter_dtype=False)
    patch(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    usual = step(model)
    patch(model, recompute=True)
    less = step(model)
    assert_equal_bits(less, usual)
    assert usual.kept - less.kept == 3 * 24 * 64 * 2


def arithmetic() -> dict[tuple, dict[str, Counter]]:
    """The instructions of fp32 arithmetic of forwards and of the kernel that computes their outputs again, compiled for a GPU."""
    from bench.audit.compile import TARGETS, compile_for

    found = {}
    for name, options in COMPILED.items():
        x = torch.empty(64, 4096, dtype=torch.bfloat16, device="meta")
        gate = x if "activation" in options else None
        spec, weight, rstd = Spec((4096,), 1e-6)._replace(**options), x[0], torch.empty(64, 1, device="meta")
        with launch.pretend(TARGETS["sm_90"].device, "meta"), launch.recorded(run=False) as launches:
            plan.forward((x, weight, None, gate), spec)
            plan.output(x, weight, gate, rstd, spec, x.dtype)
        for one in launches:
            pointers = [*one.pointers.values(), *one.launch.arguments]
            code = compile_for(one.launch.kernel, pointers, one.launch.options, TARGETS["sm_90"].gpu).asm["ptx"]
            found.setdefault(name, {})[one.step] = Counter(re.findall(r"\b(?:mul|add|sub|fma|mad|ex2|div|rcp)\S*\.f32\b", code))
    return found


COMPILED = {
    "plain": {},
    "offset": {"weight_offset": 1.0},
    "silu": {"activation": "silu"},
    "gelu": {"activation": "gelu"},
    "gelu_tanh first": {"activation": "gelu_tanh", "norm_before_gate": False},
}


@pytest.mark.slow
@pytest.mark.xdist_group("compiled")
def test_compiled_code():
    """Of the same instructions as a forward, without those for the mean: rounded one by one, so a compiler has no choice between bits."""
    for name, steps in compiled(arithmetic).items():
        assert steps["output"] <= steps["forward"], name
        assert steps["output"].total() and not steps["output"].keys() & {"mul.f32", "add.f32", "sub.f32", "fma.f32", "mad.f32"}, name


@pytest.mark.slow
def test_compiled_model(device, again):
    """Compiled as a whole, a model with the option is what it is without."""
    model = tiny_llama(device)
    patch(model)
    usual = step(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    patch(model, recompute=True)
    assert_equal_bits(step(torch.compile(model, backend="aot_eager", fullgraph=True)), usual)
    assert not again
