"""torch.nn.RMSNorm's contract as torch itself tests it (OpInfo, ModuleInfo), and what programs do with a norm besides calling it."""

import copy
import inspect
import io
import warnings
from itertools import product

import pytest
import torch
from processes import compiled
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from variants import BLOCKED, VARIANTS, Drawn, N, Problem, assert_same, every_function, id_of, leaves, torchs, trained, uneven

import triton_rmsnorm
from triton_rmsnorm import AddRMSNorm, RMSNorm, RMSNormGated, add_rms_norm, reference, rms_norm, rms_norm_gated
from triton_rmsnorm.reference import BackwardInputs, Inputs, Spec, accumulation_dtype
from triton_rmsnorm.runtime import launch
from triton_rmsnorm.testing import composed, draw

OPINFO = next(op for op in op_db if op.name == "nn.functional.rms_norm" and not op.variant_test_name)
MODULEINFO = next(module for module in module_db if module.module_cls is torch.nn.RMSNorm)
REAL = sorted((dtype for dtype in OPINFO.dtypes if dtype.is_floating_point), key=str)
COMPLEX = sorted((dtype for dtype in OPINFO.dtypes if dtype.is_complex), key=str)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def eps_of(x: Tensor, eps: float | None) -> float:
    return torch.finfo(accumulation_dtype(x)).eps if eps is None else eps


def check(x: Tensor, weight: Tensor | None, normalized_shape, eps: float | None) -> None:
    """rms_norm and its gradients are within the budget of the exact ones."""
    drawn = Drawn(Spec(tuple(normalized_shape), eps_of(x, eps)), Inputs(x, weight), draw(tuple(x.shape), x.dtype, x.device))
    drawn.check(drawn.run(lambda x, weight, *_: rms_norm(x, normalized_shape, weight, eps)))


def test_opinfo_covers_what_we_claim():
    assert set(DTYPES) <= set(REAL) and COMPLEX
    assert OPINFO.supports_forward_ad and OPINFO.supports_fwgrad_bwgrad and OPINFO.supports_gradgrad and not OPINFO.supports_out


@pytest.mark.parametrize("dtype", REAL, ids=id_of)
def test_opinfo_samples(dtype, device, small_tiles):
    samples = list(OPINFO.sample_inputs(device, dtype))
    assert len(samples) >= 6
    for sample in samples:
        normalized_shape, weight = (*sample.args, None)[:2]
        check(sample.input, weight, normalized_shape, sample.kwargs.get("eps"))
        ours = rms_norm(sample.input, *sample.args, **sample.kwargs)
        theirs = OPINFO.op(sample.input, *sample.args, **sample.kwargs)
        assert (ours.shape, ours.dtype, ours.is_contiguous()) == (theirs.shape, theirs.dtype, theirs.is_contiguous())


@pytest.mark.parametrize("dtype", COMPLEX, ids=id_of)
def test_opinfo_complex_samples(dtype, device, launches):
    """Complex input is left to torch: the same bits, also of the gradients and of conjugated views."""
    for sample, view in product(OPINFO.sample_inputs(device, dtype), (lambda t: t, torch.conj)):
        shape, *weight = sample.args

        def results(norm, sample=sample, view=view, shape=shape, weight=weight) -> list[Tensor]:
            return trained(lambda x, *weight: norm(view(x), shape, *weight, **sample.kwargs), [sample.input, *weight])

        assert_same(results(rms_norm), results(OPINFO.op))
    assert not launches


def test_opinfo_errors(device):
    errors = list(OPINFO.error_inputs(device))
    assert len(errors) >= 3
    for error in errors:
        sample = error.sample_input
        for function in (OPINFO.op, rms_norm):  # ours contain torch's phrases, too
            with pytest.raises(error.error_type, match=error.error_regex):
                function(sample.input, *sample.args, **sample.kwargs)


def assert_alike(ours: RMSNorm, theirs: torch.nn.RMSNorm) -> None:
    assert isinstance(ours, torch.nn.RMSNorm) and repr(ours) == repr(theirs) and ours.__constants__ == theirs.__constants__
    assert [(k, v) for k, v in vars(ours).items() if k[0] != "_"] == [(k, v) for k, v in vars(theirs).items() if k[0] != "_"]
    assert vars(ours).keys() == vars(theirs).keys()
    for (name, our), (their_name, their) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert (name, our.shape, our.dtype, our.device) == (their_name, their.shape, their.dtype, their.device)
        assert our.is_meta or torch.equal(our, their)


def test_constructor():
    assert inspect.signature(RMSNorm) == inspect.signature(torch.nn.RMSNorm)
    assert inspect.signature(RMSNorm.forward) == inspect.signature(torch.nn.RMSNorm.forward)
    for args, kwargs in ((((4, 16),), {"elementwise_affine": False}), (([4, 16], 1e-5), {}), ((64,), {"device": "meta"})):
        assert_alike(RMSNorm(*args, **kwargs), torch.nn.RMSNorm(*args, **kwargs))


@pytest.mark.parametrize(("dtype", "training"), [*product(DTYPES, [True]), (torch.float32, False)], ids=id_of)
def test_moduleinfo(dtype, training, device, small_tiles):
    """Every constructor and input that torch tests its module with: attributes, repr, state, results and gradients."""
    inputs = MODULEINFO.module_inputs_func(MODULEINFO, device=device, dtype=dtype, requires_grad=True, training=training)
    assert len(inputs) >= 5
    for module_input in inputs:
        args, kwargs = module_input.constructor_input.args, module_input.constructor_input.kwargs
        ours = RMSNorm(*args, **kwargs, device=device, dtype=dtype).train(training)
        theirs = torch.nn.RMSNorm(*args, **kwargs, device=device, dtype=dtype).train(training)
        assert_alike(ours, theirs)
        if ours.weight is not None:
            torch.nn.init.normal_(ours.weight)
            theirs.load_state_dict(ours.state_dict())
        (x,) = module_input.forward_input.args
        for our, their in zip(trained(ours, [x]), trained(theirs, [x]), strict=True):
            assert (our.dtype, our.shape, our.stride()) == (their.dtype, their.shape, their.stride())
        check(x.detach(), None if ours.weight is None else ours.weight.detach(), ours.normalized_shape, ours.eps)


NUMBERS = {
    "subnormals": lambda x: x * torch.finfo(x.dtype).smallest_normal / 4,
    "1e30": lambda x: x.to(torch.float64).mul(1e30).clamp(torch.finfo(x.dtype).min, torch.finfo(x.dtype).max).to(x.dtype),
    "maxima": lambda x: torch.full_like(x, torch.finfo(x.dtype).max) * x.sign(),
    "minima_and_maxima": lambda x: x.new_full(x.shape, torch.finfo(x.dtype).max).where(x > 0, x.new_tensor(torch.finfo(x.dtype).tiny)),
    "zeros": torch.zeros_like,
    "negative_zeros": lambda x: -torch.zeros_like(x),
    "infinite": lambda x: torch.where(torch.arange(x.shape[-1], device=x.device) == 3, torch.inf, x),
    "nan": lambda x: torch.where(torch.arange(x.shape[-1], device=x.device) == 3, torch.nan, x),
}
NUMBERED = [*product(DTYPES, (None, 0.0), (32,)), *product((torch.bfloat16,), (None,), (max(BLOCKED),))]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities in the interpreter
@pytest.mark.parametrize(("dtype", "eps", "n"), NUMBERED, ids=id_of)
@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
def test_numbers(numbers, dtype, eps, n, device):
    """NaN and infinities are where torch has them, finite numbers are within the budget, and other rows are unaffected.

    Gradients differ where torch's formula overflows (in 2x, for example) and the closed form does not.
    """
    drawn = Problem((4, n), dtype, dtype, fields={} if eps is None else {"eps": eps}).draw(device)
    plain = drawn.run()
    x, weight, *_ = drawn.inputs
    x[1:3] = numbers(x[1:3])
    ours, theirs = drawn.run(), drawn.run(lambda x, weight, *_: torchs(x, (n,), weight, eps))
    rstd = reference.forward(drawn.inputs, drawn.spec).rstd
    closed = reference.backward(BackwardInputs(drawn.dy, None, x, weight, None, rstd), drawn.spec)
    for our, their in ((ours.y, theirs.y), (ours.dx, closed.dx), (ours.dweight, closed.dweight)):
        assert our.dtype == their.dtype and torch.equal(our.isnan(), their.isnan())
        assert torch.equal(our.isinf(), their.isinf()) and torch.equal(our[our.isinf()], their[our.isinf()])
    if theirs.y.isfinite().all():
        for name, their in theirs.present.items():
            assert not (ours.present[name].isnan() & ~their.isnan()).any()
    for our, before in ((ours.y, plain.y), (ours.dx, plain.dx)):
        assert torch.equal(our[[0, 3]], before[[0, 3]])
    squares = x.to(accumulation_dtype(x)).square().sum(-1)  # what overflows in torch is not exact there
    rows = [i for i in range(4) if all(row[i].isfinite().all() for row in (theirs.y, theirs.dx, squares))]
    results = drawn.rows(rows).run()
    assert_same([results.y, results.dx], [ours.y[rows], ours.dx[rows]])
    drawn.rows(rows).check(results)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("number", [torch.inf, torch.nan, 1e30, 0.0])
@pytest.mark.parametrize("name", ["residual", "gate", "gate_first"])
def test_rows_stay_isolated(name, number, device, small_tiles):
    """A row that holds such a number, in x, residual or gate: NaN where torch's operations make NaN, and nothing in the rows beside."""
    variant = VARIANTS[name]
    for at in (0, 2):
        tensors = variant.draw((4, N), torch.float32, device)
        before = trained(variant.ours, tensors)
        tensors[at][1, 2] = number
        ours, theirs = trained(variant.ours, tensors), trained(variant.theirs, tensors)
        for our, their, old in zip(ours, theirs, before, strict=True):
            if our.dim() > 1:  # to dgamma, all rows contribute
                assert torch.equal(our[[0, 2, 3]], old[[0, 2, 3]]) and torch.equal(our.isnan(), their.isnan())


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_of_nan_and_zero(activation, norm_before_gate, device, small_tiles):
    """NaN passes, and the slope at 0, where relu has none, is the one that torch takes."""
    fields = {"activation": activation, "norm_before_gate": norm_before_gate}
    drawn = Problem((4, 64), gate=torch.float32, fields=fields).draw(device)
    drawn.inputs.gate[1, 2], drawn.inputs.gate[3, 4] = torch.nan, 0.0
    our, their = drawn.run(), drawn.run(composed(drawn.spec))
    assert torch.equal(our.y.isnan(), their.y.isnan()) and our.y[1, 2].isnan()
    torch.testing.assert_close(our.dgate[3], their.dgate[3])


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("dims", [4, 5])
def test_channels_last(dims, ndim, device):
    """The memory format of input, output, gradient in, gradient out."""
    x = draw((2, 4, 3, 5, 6)[:dims], torch.float32, device).to(memory_format=CHANNELS_LAST[dims])
    weight = draw(x.shape[-ndim:], torch.float32, device)
    results = []
    for function in (rms_norm, F.rms_norm):
        leaf, parameter = leaves((x, weight))
        y = function(leaf, x.shape[-ndim:], parameter)
        y.backward(uneven(x).to(memory_format=CHANNELS_LAST[dims]))
        results.append((y, leaf.grad, parameter.grad))
    assert results[0][0].stride() == results[1][0].stride()
    torch.testing.assert_close(*results)


def test_channels_last_under_vmap(device):
    """Samples of four dimensions have a memory format, which vmap cannot tell."""
    x = draw((2, 3, 4, 5, 6), torch.float32, device).to(memory_format=torch.channels_last_3d)

    def results(norm) -> list[Tensor]:
        grad = torch.func.grad(lambda x: norm(x, (6,)).square().sum())
        return [torch.func.vmap(function, 2)(x) for function in (lambda x: norm(x, (6,)), grad)]

    torch.testing.assert_close(results(rms_norm), results(F.rms_norm))


@every_function
def test_negated_everything(function, device):
    """Negative views of inputs, weights and gradients (of complex numbers' imaginary parts, for example)."""
    tensors = function.draw((4, 3, N), torch.float64, device)
    negated = leaves(torch._neg_view(t) for t in tensors)
    plain = leaves(-t for t in tensors)
    outputs, expected = tree_leaves(function.ours(*negated)), tree_leaves(function.theirs(*plain))
    assert all(t.is_neg() for t in negated)
    torch.testing.assert_close(outputs, expected)
    gradients = torch.autograd.grad(outputs, negated, [torch._neg_view(torch.full_like(y, -1)) for y in outputs])
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, plain, [torch.ones_like(y) for y in expected]))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_autocast(where, enabled):
    """The output has the dtype that the running torch gives it; shown with fake tensors, so that it needs no GPU."""
    before = torch.is_autocast_enabled(where)
    torch.set_autocast_enabled(where, enabled)
    try:
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for dtype, weight_dtype in product(DTYPES, (None, *DTYPES)):
                x = torch.empty(3, 8, dtype=dtype, device=where)
                weight = None if weight_dtype is None else torch.empty(8, dtype=weight_dtype, device=where)
                assert rms_norm(x, (8,), weight).dtype == F.rms_norm(x, (8,), weight).dtype, (dtype, weight_dtype)
    finally:
        torch.set_autocast_enabled(where, before)


MODULES = {
    "RMSNorm": (RMSNorm, {}, 1),
    "plain": (RMSNorm, {"elementwise_affine": False}, 1),
    "AddRMSNorm": (AddRMSNorm, {"weight_offset": 1.0}, 2),
    "RMSNormGated": (RMSNormGated, {"activation": "gelu", "norm_before_gate": False, "group_size": 16}, 2),
}


@pytest.fixture(params=MODULES.values(), ids=MODULES)
def module(request, device, small_tiles):
    """A module with random weights, and arguments for it."""
    module_class, kwargs, inputs = request.param
    norm = module_class(64, eps=1e-3, device=device, **kwargs)
    if norm.weight is not None:
        torch.nn.init.normal_(norm.weight)
    return norm, [draw((3, 64), torch.float32, device) for _ in range(inputs)]


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def _assigned(norm):
    """Through the meta device."""
    empty = copy.deepcopy(norm).to("meta")
    assert all(weight.is_meta for weight in empty.parameters())
    empty.load_state_dict(saved(norm.state_dict(), weights_only=True), assign=True)
    return empty


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "save": lambda norm: saved(norm, weights_only=False),
    "assign": _assigned,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_module_survives(module, duplicate):
    norm, arguments = module
    other = duplicate(norm)
    assert type(other) is type(norm) and repr(other) == repr(norm) and other.state_dict().keys() == norm.state_dict().keys()
    assert_same(trained(other, arguments), trained(norm, arguments))


def test_module_built_on_meta(module):
    """Constructed without memory, then given some: weights are those that reset_parameters makes."""
    norm, arguments = module
    options = {"eps": 1e-3, "elementwise_affine": norm.weight is not None, **getattr(norm, "knobs", {})}
    empty = type(norm)(64, device="meta", **options)
    outputs = tree_leaves(empty(*[t.to("meta") for t in arguments]))
    assert all(y.is_meta and y.shape == (3, 64) for y in outputs)
    empty.to_empty(device=arguments[0].device).reset_parameters()
    fresh = type(norm)(64, device=arguments[0].device, **options)
    assert_same(trained(empty, arguments), trained(fresh, arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=id_of)
def test_module_changes_dtype(module, dtype):
    norm, arguments = module
    changed = copy.deepcopy(norm).to(dtype)
    assert all(weight.dtype == dtype for weight in changed.parameters())
    assert all(y.dtype == dtype for y in tree_leaves(changed(*[t.to(dtype) for t in arguments])))
    assert tree_leaves(changed(*arguments))[0].dtype == torch.float32  # of the input, whatever the weight is


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return weight * 2


def test_module_is_inspected(module):
    """Hooks, parametrizations, frozen weights and functional_call: as any module."""
    norm, arguments = module
    expected = trained(norm, arguments)
    seen = []
    handles = [norm.register_forward_pre_hook(lambda *_: seen.append("pre")), norm.register_forward_hook(lambda *_: seen.append("post"))]
    norm.register_full_backward_hook(lambda *_: seen.append("backward"))
    assert_same(trained(norm, arguments), expected)
    assert seen == ["pre", "post", "backward"]
    for handle in handles:
        handle.remove()
    if norm.weight is None:
        return
    called = torch.func.functional_call(norm, {"weight": norm.weight.detach() * 2}, tuple(arguments))
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", Doubled())
    assert_same(norm(*arguments), called)
    norm.requires_grad_(False)
    assert not any(y.requires_grad for y in tree_leaves(norm(*arguments)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(module, use_reentrant, launches):
    norm, arguments = module
    expected = trained(norm, arguments)
    launches.clear()
    ours = trained(lambda *args: checkpoint(norm, *args, use_reentrant=use_reentrant), arguments)
    assert_same(ours, expected)
    assert [recorded.step for recorded in launches].count("forward") == 2


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("of", [lambda norm, x: torch.jit.script(norm), torch.jit.trace], ids=["script", "trace"])
def test_jit(of, device, launches):
    """TorchScript cannot call a kernel: it gets torch's own operator, which serializes, for any number of rows."""
    norm = RMSNorm((4, 16), eps=1e-3, device=device)
    torch.nn.init.normal_(norm.weight)
    scripted = of(norm, draw((3, 4, 16), torch.float32, device))
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    x = draw((7, 4, 16), torch.float32, device)
    launches.clear()
    for function in (scripted, torch.jit.load(file), torch.jit.freeze(scripted.eval())):
        torch.testing.assert_close(function(x), F.rms_norm(x, (4, 16), norm.weight, 1e-3))
        assert "rms_norm" in str(function.graph) or "rms_norm" in str(function.inlined_graph)
    assert not launches


def _scripted(x: Tensor, weight: Tensor) -> Tensor:
    return triton_rmsnorm.rms_norm(x, [8], weight, 1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "error::torch.jit.TracerWarning")
def test_jit_of_functions(device):
    """A scripted function may call rms_norm, as it may call F.rms_norm; a traced one any of ours."""
    x, weight = draw((3, 8), torch.float32, device), draw((8,), torch.float32, device)
    torch.testing.assert_close(torch.jit.script(_scripted)(x, weight), F.rms_norm(x, (8,), weight, 1e-5))
    for function in (
        lambda x: rms_norm(x, (8,), weight_offset=0.0, group_size=2),
        lambda x: rms_norm(x.expand(2, 4, 3, 8).to(memory_format=torch.channels_last), (8,)),
        lambda x: add_rms_norm(x, x.cos(), (8,)),
        lambda x: rms_norm_gated(x, x.cos(), (8,)),
    ):
        torch.testing.assert_close(torch.jit.trace(function, x)(x + 1), function(x + 1))


def test_symbolic_trace(module):
    """torch.fx keeps a call of the function in the graph."""
    norm, arguments = module
    traced = torch.fx.symbolic_trace(torch.nn.ModuleDict({"norm": norm})["norm"])
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert {rms_norm, add_rms_norm, rms_norm_gated} & set(targets)
    assert_same(trained(traced, arguments), trained(norm, arguments))


class Subclass(Tensor):
    """Records what its operations are."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@every_function
def test_torch_function(function, device):
    """Subclasses and modes see one call, by the public name, and the result has the class that torch gives it."""
    tensors = function.draw((3, N), torch.float32, device)
    Subclass.seen.clear()
    outputs = tree_leaves(function.ours(tensors[0].as_subclass(Subclass), *tensors[1:]))
    assert Subclass.seen[0] in (rms_norm, add_rms_norm, rms_norm_gated)
    assert all(type(y) is Subclass for y in outputs)
    with torch.device(device):  # a mode
        moded = tree_leaves(function.ours(*tensors))
    plain = tree_leaves(function.ours(*tensors))
    assert_same([y.as_subclass(Tensor) for y in outputs], plain)
    assert_same(moded, plain)


class Plain(Tensor):
    pass


def test_plain_subclass_and_parameter(device):
    x = draw((3, N), torch.float32, device)
    for value in (x.as_subclass(Plain), torch.nn.Parameter(x), torch.nn.Buffer(x)):
        ours, theirs = rms_norm(value, (N,)), F.rms_norm(value, (N,))
        assert type(ours) is type(theirs)
        torch.testing.assert_close(ours, theirs)


def run_on_the_cpu() -> None:
    """Without TRITON_INTERPRET, CPU tensors are left to torch's own operator, bit for bit, and nothing is launched."""
    assert not launch.INTERPRETED
    spec = Spec((96,), 1e-6, group_size=32, weight_offset=1.0)
    with launch.recorded() as launches:
        for dtype, eps in product(DTYPES, (None, 1e-5)):
            x, weight = draw((3, 5, 96), dtype), draw((96,), dtype)
            ours, theirs = (trained(lambda x, w, f=f, eps=eps: f(x, (96,), w, eps), (x, weight)) for f in (rms_norm, F.rms_norm))
            assert_same(ours, theirs)
            grouped = rms_norm(x, (96,), weight, 1e-6, group_size=32, weight_offset=1.0)
            assert torch.equal(grouped, reference.forward(Inputs(x, weight), spec).y)
            assert torch.equal(RMSNorm(96, dtype=dtype)(x), torch.nn.RMSNorm(96, dtype=dtype)(x))
    assert not launches


@pytest.mark.slow
@pytest.mark.xdist_group("compiled")
def test_cpu_without_interpreter():
    compiled(run_on_the_cpu)
