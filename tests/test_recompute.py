"""Recomputation of norm outputs: the same bits, exactly the outputs' bytes less, nothing held afterwards, beside the hooks of others."""

import copy
import functools
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from variants import BLOCKED, Problem, assert_same, id_of, leaves, needs_gpu, ours

from bench.census.tiny_models import tiny_model
from triton_rmsnorm import RMSNorm, add_rms_norm, patch, patched, recompute, recompute_norms, rms_norm, rms_norm_gated, unpatch
from triton_rmsnorm.runtime import plan
from triton_rmsnorm.testing import draw

N = 48
Context = Callable[[], AbstractContextManager]


def held(references: list[weakref.ref]) -> list[Any]:
    return [reference() for reference in references if reference() is not None]


def returned(monkeypatch, module: Any, name: str) -> list[weakref.ref]:
    """What a function returns during a test."""
    results = []
    function = getattr(module, name)

    def noted(*arguments):
        result = function(*arguments)
        results.append(weakref.ref(result))
        return result

    monkeypatch.setattr(module, name, noted)
    return results


@pytest.fixture
def again(monkeypatch) -> list[weakref.ref]:
    """The outputs that are computed again during a test."""
    return returned(monkeypatch, plan, "output")


class Step(NamedTuple):
    """What a training step gives: the loss and all gradients, and the bytes that autograd kept in its forward."""

    results: list[Tensor | None]
    kept: int


def step(loss: Callable[[], Tensor], inputs: list[Tensor], context: Context = nullcontext) -> Step:
    """One step of a loss that is computed from `inputs` (which are not counted as kept), with the forward in a context."""
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), context():
        value = loss()
    return Step([value.detach(), *gradients(value, inputs)], sum(storage.nbytes() for storage in kept.values()))


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
    """By backward(), which reentrant checkpointing needs."""
    loss.backward()
    found = [tensor.grad for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None
    return found


def assert_recomputed(loss: Callable[[], Tensor], inputs: list[Tensor], nbytes: int, context: Context = recompute_norms) -> None:
    """The context changes no bit, and `nbytes` fewer are kept."""
    usual, less = step(loss, inputs), step(loss, inputs, context)
    assert_same(less.results, usual.results)
    assert usual.kept - less.kept == nbytes


def cases(dtype: torch.dtype) -> dict[str, Problem]:
    plain = Problem((2, 3, N), dtype, dtype)
    residual, gate = plain._replace(residual=dtype), plain._replace(gate=dtype)
    return {
        "plain": plain,
        "no_weight": plain._replace(weight=None),
        "two_dims": plain._replace(shape=(5, 4, N), normalized=2),
        "groups_and_offset": plain._replace(fields={"group_size": 12, "weight_offset": 1.0}),
        "x_hat_rounded": plain._replace(fields={"x_hat_dtype": torch.bfloat16}),
        "rstd_rounded": plain._replace(fields={"x_hat_dtype": torch.float16, "rstd_dtype": torch.bfloat16}),
        "residual": residual,
        "residual_fp32": residual._replace(weight=torch.float32, residual=torch.float32, fields={"weight_offset": 1.0}),
        "residual_bf16": residual._replace(residual=torch.bfloat16),
        "gate": gate._replace(fields={"activation": "silu"}),
        "gate_first": gate._replace(fields={"activation": "gelu_tanh", "norm_before_gate": False, "group_size": 24}),
        "gate_rounded": gate._replace(fields={"activation": "gelu", "x_hat_dtype": torch.bfloat16}),
        "long_rows": plain._replace(shape=(2, max(BLOCKED))),
        "no_rows": plain._replace(shape=(0, N)),
    }


CASES = [*cases(torch.float32).items(), *cases(torch.bfloat16).items()]
CASES += [(name, cases(dtype)[name]) for dtype in (torch.float16, torch.float64) for name in ("plain", "residual_fp32", "gate_rounded")]


@pytest.mark.parametrize("problem", [pytest.param(problem, id=f"{name}-{id_of(problem.dtype)}") for name, problem in CASES])
def test_every_norm(problem, device, again):
    """Three users of y, one of them of a view, and a user of x + residual."""
    spec, tensors, *_ = problem.draw(device)
    inputs = leaves(tensor for tensor in tensors if tensor is not None)

    def loss() -> Tensor:
        given = iter(inputs)
        y = ours(spec)(*(None if tensor is None else next(given) for tensor in tensors))
        y, total = y if problem.residual else (y, None)
        users = y.sin().sum() + y.flatten(0, -2).t().cos().sum() + y.square().sum()
        return users if total is None else users + total.square().sum()

    itemsize = spec.output_dtype(tensors.x, tensors.weight).itemsize
    assert_recomputed(loss, inputs, tensors.x.numel() * itemsize)
    assert len(again) == 1


VIEWS = {
    "itself": lambda y: y,
    "reshape": lambda y: y.reshape(-1, 4),
    "transpose": lambda y: y.transpose(0, -1),
    "slice": lambda y: y[1:, :, 3:20:2],
    "expand": lambda y: y.unsqueeze(1).expand(-1, 7, -1, -1),
    "view of a view": lambda y: y.view(-1).view(3, -1)[1:].t(),
}


@pytest.fixture
def x(device, small_tiles) -> Tensor:
    return draw((2, 3, N), torch.float32, device).requires_grad_()


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view, x, again):
    factor = draw(view(x).shape, torch.float32, x.device).requires_grad_()
    assert_recomputed(lambda: (view(rms_norm(x, (N,))) * factor).sum(), [x, factor], x.nbytes)
    assert len(again) == 1


KEPT = {
    "without a norm in the graph": lambda y: y.detach(),  # which therefore keeps no input
    "another dtype": lambda y: torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))).square()).flatten(-2),
    "lazily negated": lambda y: torch._neg_view(y),
    "modified before": lambda y: y.mul_(2),
    "a view modified before": lambda y: (y[0].zero_(), y)[1],
}


@pytest.mark.parametrize("use", KEPT.values(), ids=KEPT)
def test_what_is_not_y_is_kept(use, x, again):
    factor = torch.full_like(x, 3).requires_grad_()
    assert_recomputed(lambda: (use(rms_norm(x, (N,))) * factor).sum(), [x, factor], 0)
    assert not again


READINGS = {
    "wider rows": lambda x: x[..., :N],
    "every second column": lambda x: x[..., ::2],
    "transposed": lambda x: x.transpose(0, 1)[..., N:],
    "negated": lambda x: torch._neg_view(x)[..., :N],
}


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
def test_strided_input_and_weight(read, device):
    x, weight = (draw(shape, torch.float32, device).requires_grad_() for shape in ((3, 5, 2 * N), (2 * N,)))
    assert_recomputed(lambda: rms_norm(read(x), (N,), weight[::2]).square().sum(), [x, weight], 4 * 15 * N)


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
def inputs(attention, x) -> list[Tensor]:
    return [x, *attention.parameters()]


@pytest.fixture
def loss(attention, x) -> Callable[[], Tensor]:
    return lambda: attention(x).square().sum()


@contextmanager
def nested() -> Iterator[None]:
    with recompute_norms():
        with recompute_norms():
            assert recompute.active == 1
        yield


@pytest.mark.parametrize("context", [recompute_norms, nested])
def test_once_for_all_users(context, loss, x, inputs, again):
    """Also where contexts are nested, which has no further effect."""
    assert_recomputed(loss, inputs, 2 * x.nbytes, context)
    assert len(again) == 2 and not held(again)


def test_dropped_after_the_last_user(x, again):
    """When the norm's own backward runs, its output is gone already."""
    with recompute_norms():
        y = rms_norm(x, (N,))
        loss = y.sin().sum() + y.cos().sum()
    found = []
    y.register_hook(lambda _: found.append(held(again)))
    loss.backward()
    assert len(again) == 1 and found == [[]]


def test_dropped_at_the_end_where_a_user_is_not_needed(attention, x, again):
    with recompute_norms():
        loss = attention(x).sum()
    for weights in ([attention.q.weight], [attention.q.weight, attention.k.weight]):
        torch.autograd.grad(loss, weights, retain_graph=True)
        assert again and not held(again)


def test_chain_of_norms(x, device):
    """The output of one norm is the input of the next, so it is not kept either."""
    weight = draw((N,), torch.float32, device).requires_grad_()

    def loss() -> Tensor:
        y = rms_norm(x, (N,), weight)
        z, total = add_rms_norm(y, x, (N,), weight)
        return (rms_norm_gated(z, y, (N,), weight) * total).square().sum()

    assert_recomputed(loss, [x, weight], 3 * x.nbytes)


def test_several_losses_and_retain_graph(attention, x, inputs, again):
    def all_gradients(context: Context) -> list[Tensor]:
        with context():
            y = attention(x)
            first, second = y.sum(), y.square().sum()
        return [gradient for loss in (first, second, first) for gradient in torch.autograd.grad(loss, inputs, retain_graph=True)]

    assert_same(all_gradients(recompute_norms), all_gradients(nullcontext))
    assert len(again) == 3 * 2 and not held(again)


@pytest.mark.parametrize("context", [recompute_norms, save_on_cpu])
@pytest.mark.parametrize("until", range(3), ids=["forward", "backward", "double backward"])
def test_double_backward(until, context, loss, x, inputs):
    """With the context around the forward alone, around the backward, too, or around all."""

    def second(context: Context) -> list[Tensor | None]:
        with ExitStack() as stack:
            stack.enter_context(context())
            value = loss()
            if until == 0:
                stack.close()
            (dx,) = torch.autograd.grad(value, [x], create_graph=True)
            if until == 1:
                stack.close()
            return gradients(dx.square().sum(), inputs)

    assert_same(second(context), second(nullcontext))


MODIFIED = {
    "x": lambda x, weight, factor: x.mul_(2),
    "weight": lambda x, weight, factor: weight.add_(1),
    "a tensor of others": lambda x, weight, factor: factor.add_(1),
}


@pytest.mark.parametrize("modify", MODIFIED.values(), ids=MODIFIED)
@pytest.mark.parametrize("context", [nullcontext, recompute_norms])
def test_modified_in_place(modify, context, device):
    """An error with recomputation as without."""
    shapes = ((3, N), (N,), (3, N))
    tensors = x, weight, factor = [draw(shape, torch.float32, device).requires_grad_() * 1 for shape in shapes]
    with context():
        loss = (rms_norm(x, (N,), weight) * factor).sum()
    with torch.no_grad():
        modify(*tensors)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: \[torch.*FloatTensor .*is at version 1; expected version 0"):
        loss.backward()


def test_a_weight_whose_data_is_gone(x):
    """As where ZeRO-3 has partitioned it since."""
    weight = torch.ones(N, device=x.device)
    with recompute_norms():
        loss = rms_norm(x, (N,), weight).sin().sum()
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight must have the data in backward that it had in forward"):
        loss.backward()


def test_modified_output_does_not_matter(x):
    """Where y was to be kept, this is an error; what is computed again is what was used."""
    with recompute_norms():
        y = rms_norm(x, (N,))
        loss = y.sin().sum()
    usual = torch.autograd.grad(rms_norm(x, (N,)).sin().sum(), [x])
    with torch.no_grad():
        y.zero_()
    assert_same(gradients(loss, [x]), list(usual))


@pytest.fixture
def recipes(monkeypatch) -> Iterator[list[weakref.ref]]:
    """What outputs are computed from; the garbage collector is off, so these go by themselves."""
    made = returned(monkeypatch, recompute, "remember")
    gc.collect()
    gc.disable()
    yield made
    gc.enable()


def test_backward_inside(loss, inputs, again, recipes):
    """A whole training loop in the context holds nothing from one step to the next."""
    usual = step(loss, inputs).results
    with recompute_norms():
        for _ in range(2):
            assert_same(gradients(loss(), inputs), usual[1:])
            assert not held(recipes) and not held(again)
    assert len(again) == len(recipes) == 4


def test_nothing_is_held_after_the_backward(x, again, recipes):
    """Also where the output lives on."""
    gate = torch.ones_like(x)
    with recompute_norms():
        u = x * 2
        y = rms_norm_gated(u, gate, (N,))
        watched = [weakref.ref(tensor.untyped_storage()) for tensor in (u, gate)]
        loss = y.square().sum()
    del u, gate
    assert len(held(watched)) == 2 and len(held(recipes)) == 1
    loss.backward()
    assert not held(recipes) and not held(again)
    assert not recompute._Backward.running and recompute.active == 0
    gc.collect()  # Triton's interpreter leaves cycles with its arguments
    assert not held(watched)


@pytest.mark.parametrize("users", [0, 1])
def test_nothing_is_held_without_a_backward(users, x, recipes):
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


def test_nothing_is_held_after_an_exception_in_the_backward(x, again):
    """The graph is still there, and with it what y is computed from, but not y."""
    with recompute_norms():
        y = rms_norm(x, (N,))
        loss = Fails.apply(y.sin()).sum() + y.cos().sum()  # the operation that was last runs first
    with pytest.raises(ValueError, match="planned"):
        loss.backward()
    assert len(again) == 1 and not held(again)
    assert not recompute._Backward.running


def test_exception_inside(x):
    with pytest.raises(ValueError, match="planned"), recompute_norms():
        raise ValueError("planned")
    assert recompute.active == 0 and recompute._current_hooks() is None
    assert_recomputed(lambda: rms_norm(x, (N,)).square().sum(), [x], x.nbytes)


def test_threads(loss, inputs, again):
    """The context holds for its thread. A backward may run in any, where torch may add up in another order on the CPU."""

    def backward(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, inputs, retain_graph=True)

    with ThreadPoolExecutor(3) as pool:
        usual = pool.submit(backward, loss()).result()
        with recompute_norms():
            less = loss()
            elsewhere = pool.submit(step, loss, inputs).result()
        assert elsewhere.kept == step(loss, inputs).kept and not again
        for found in pool.map(backward, 3 * [less]):
            assert_same(found, usual)
    assert not held(again)


def test_no_cost_outside(loss, inputs, monkeypatch):
    monkeypatch.setattr(recompute, "remember", None)  # not called
    step(loss, inputs)


@pytest.mark.parametrize("order", ["outside", "inside"])
def test_hooks_of_others(order, loss, inputs, again):
    """Outer hooks see everything but norms' outputs; inner hooks see everything."""

    @contextmanager
    def both() -> Iterator[None]:
        first, second = (save_on_cpu, recompute_norms) if order == "outside" else (recompute_norms, save_on_cpu)
        with first(), second():
            yield

    assert_same(step(loss, inputs, both).results, step(loss, inputs).results)
    assert len(again) == (2 if order == "outside" else 0)


def test_outer_hooks_get_what_is_kept_instead(x):
    """What they keep elsewhere is not held here as well."""
    with saved_tensors_hooks(torch.clone, lambda tensor: tensor), recompute_norms():
        u = x * 2
        watched = weakref.ref(u.untyped_storage())
        loss = rms_norm(u, (N,)).square().sum()
    del u
    gc.collect()
    assert watched() is None and loss.requires_grad


PLACES = {"around": (1, 0, 0), "within": (0, 1, 0), "around the backward, too": (0, 0, 1)}


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_checkpointing(use_reentrant, place, attention, x, again):
    around, within, around_all = (recompute_norms if here else nullcontext for here in place)
    (usual,) = torch.autograd.grad((attention(attention(x)) * 2).square().sum(), [x])

    def once(x: Tensor) -> Tensor:
        with within():
            return attention(x) * 2

    with around_all():
        with around():
            loss = checkpoint(once, attention(x), use_reentrant=use_reentrant).square().sum()
        assert_same(gradients(loss, [x]), [usual])
    assert len(again) >= 2 and not held(again)


def test_compile_decides_itself(attention, x, again):
    def function(x: Tensor) -> Tensor:
        with recompute_norms():
            return attention(x).square().sum()

    expected = gradients(function(x), [x])
    again.clear()
    ours = gradients(torch.compile(function, backend="aot_eager", fullgraph=True)(x), [x])
    torch.testing.assert_close(ours, expected)
    assert not again and recompute.active == 0


def test_compiled_users(x, again):
    """A compiled function saves its inputs as any operation does."""
    layer = torch.compile(lambda y: y.sin() * y.cos(), backend="aot_eager")
    assert_recomputed(lambda: layer(rms_norm(x, (N,))).sum(), [x], x.nbytes)
    assert len(again) == 1


def test_func_inside_is_refused_as_with_any_hooks(x):
    def loss(x: Tensor) -> Tensor:
        return rms_norm(x, (N,)).square().sum()

    def inside(x: Tensor) -> Tensor:
        with recompute_norms():
            return loss(x)

    with recompute_norms(), pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(loss)(x)
    torch.testing.assert_close(torch.func.grad(inside)(x), torch.func.grad(loss)(x))


@pytest.mark.gpu
@needs_gpu
def test_streams(device):
    """Users on other streams than the norm's wait for what is computed again."""
    side = torch.cuda.Stream()
    x = draw((4096, 4096), torch.bfloat16, device).requires_grad_()

    def loss() -> Tensor:
        y = rms_norm(x, (4096,))
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            other = y.sin()
            y.record_stream(side)
        here = y.cos().float().sum()
        torch.cuda.current_stream().wait_stream(side)
        other.record_stream(torch.cuda.current_stream())
        return here + other.float().sum()

    usual = step(loss, [x])
    for _ in range(5):
        assert_same(step(loss, [x], recompute_norms).results, usual.results)


def tiny_llama(device: torch.device, layers: int = 2) -> nn.Module:
    return tiny_model("llama", use_cache=False, num_hidden_layers=layers).to(device, torch.bfloat16)


def model_step(model: nn.Module, context: Context = nullcontext) -> Step:
    """A training step of a language model: all gradients, and the bytes that are kept."""
    tokens = torch.arange(24, device=next(model.parameters()).device).view(2, 12)
    given = [*model.parameters(), *model.buffers()]
    return step(lambda: model(input_ids=tokens, labels=tokens).loss, given, context)


OUTPUT = 24 * 64 * 2  # bytes
OUTPUTS = 5 * OUTPUT  # of two norms per layer and one at the end


@pytest.mark.slow
@pytest.mark.parametrize("fuse_residual", [False, True])
def test_patch(fuse_residual, device):
    model = tiny_llama(device)
    patch(model, fuse_residual=fuse_residual)
    usual, in_context = model_step(model), model_step(model, recompute_norms)
    assert usual.kept - in_context.kept == OUTPUTS
    assert "LlamaForCausalLM  outputs of norms" in (report := str(patch(model, recompute=True))) and "recomputed" in report
    assert "recomputed before" in str(patch(model, fuse_residual=fuse_residual, recompute=True))
    for once_more in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        less = model_step(once_more)
        assert_same(less.results, usual.results)
        assert_same(less.results, in_context.results)
        assert usual.kept - less.kept == OUTPUTS
    unpatch(model)
    assert type(model) is transformers.LlamaForCausalLM and not any(type(m).__module__.startswith("triton") for m in model.modules())
    with patched(model, fuse_residual=fuse_residual, recompute=True) as report:
        assert report.replaced == 5 and report.fused == 2 * fuse_residual
        assert model_step(model).kept == less.kept
    assert type(model) is transformers.LlamaForCausalLM


def test_patch_keeps_what_others_look_at(device):
    model = tiny_llama(device).model
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
def test_gradient_checkpointing_of_a_model(device):
    model = tiny_llama(device)
    patch(model)
    usual = model_step(model)
    patch(model, recompute=True)
    model.gradient_checkpointing_enable()
    assert_same(model_step(model).results, usual.results)
    model.gradient_checkpointing_disable()
    assert model_step(model).kept == usual.kept - OUTPUTS


@pytest.mark.slow
def test_peft(device):
    """Frozen norms; the first of them gets no gradient and is kept, the others are kept by adapters and computed again."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "gate_proj"])
    model = peft.get_peft_model(tiny_llama(device), config, autocast_adapter_dtype=False)
    patch(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    usual = model_step(model)
    patch(model, recompute=True)
    less = model_step(model)
    assert_same(less.results, usual.results)
    assert usual.kept - less.kept == 3 * OUTPUT


@pytest.mark.slow
def test_compiled_model(device, again):
    """Compiled as a whole, a model with the option is what it is without."""
    results = []
    for recompute_outputs in (False, True):
        model = tiny_llama(device, layers=1)
        patch(model, recompute=recompute_outputs)
        torch._dynamo.reset()
        results.append(model_step(torch.compile(model, backend="eager", fullgraph=True)).results)
    assert_same(*results)
    assert not again
