"""torch.compile, torch.export, tracing and fake tensors: no graph break, nothing compiled anew, the same kernels and results as eager."""

import io
import shutil
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from variants import FUNCTIONS, VARIANTS, N, Variant, leaves, scalar, trained

from triton_rmsnorm import AddRMSNorm, RMSNorm, RMSNormGated, rms_norm
from triton_rmsnorm.reference import Spec, accumulation_dtype
from triton_rmsnorm.testing import draw

ops = torch.ops.triton_rmsnorm
compiles = partial(torch.compile, backend="aot_eager", fullgraph=True)  # a graph break is an error
with_inductor = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler")
with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _afresh(small_tiles):
    """Nothing is compiled yet."""
    torch._dynamo.reset()


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def variant(request) -> Variant:
    return request.param


@pytest.fixture(params=FUNCTIONS.values(), ids=FUNCTIONS)
def function(request) -> Variant:
    return request.param


def assert_equal(ours, theirs) -> None:
    """Bit for bit."""
    for our, their in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        assert our.dtype == their.dtype and our.stride() == their.stride() and torch.equal(our, their)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_same_kernels_and_bits(variant, dtype, dynamic, device, launches):
    tensors = variant.draw((4, 3, N), dtype, device)
    expected = trained(variant.ours, tensors)
    eager = [recorded.step for recorded in launches]
    launches.clear()
    assert_equal(trained(compiles(variant.ours, dynamic=dynamic), tensors), expected)
    assert [recorded.step for recorded in launches] == eager


@pytest.mark.parametrize(
    "of",
    {
        "q_of_qkv": lambda x: x.view(4, 6, 3, 2, 16)[:, :, 1].transpose(1, 2),
        "channels_last": lambda x: x.view(4, 6, 8, 12).to(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(1, 2),
        "negated": torch._neg_view,
        "expanded": lambda x: x[:, :1].expand(4, 6, 96),
    }.items(),
    ids=lambda item: item[0],
)
def test_layouts(of, device):
    """Strides of outputs and gradients, too, are those of eager."""
    x = draw((4, 6, 96), torch.float32, device)
    for n in (1, 2):
        f = lambda x: rms_norm(of[1](x), of[1](x).shape[-n:])  # noqa: B023, E731
        assert_equal(trained(compiles(f), [x]), trained(f, [x]))


MODULES = {"RMSNorm": (RMSNorm, 1), "AddRMSNorm": (AddRMSNorm, 2), "RMSNormGated": (RMSNormGated, 2)}
ROWS = ((3, 4), (5, 4), (7, 9), (200, 2), (2, 300))


@pytest.mark.parametrize(("module", "inputs"), MODULES.values(), ids=MODULES)
def test_rows_compile_nothing_anew(module, inputs, device):
    """One dynamic graph serves all numbers of rows, forward and backward; found by itself, as torch does, it is the second."""
    norm = module(64, eps=1e-6, device=device)
    marked = CompileCounterWithBackend("aot_eager")
    dynamic = torch.compile(norm, backend=marked, fullgraph=True, dynamic=True)
    found = CompileCounterWithBackend("aot_eager")
    automatic = torch.compile(norm, backend=found, fullgraph=True)
    for i, shape in enumerate(ROWS):
        tensors = [draw((*shape, 64), torch.float32, device) for _ in range(inputs)]
        expected = trained(norm, tensors)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_equal(trained(dynamic, tensors), expected)
        with torch._dynamo.config.patch(error_on_recompile=i > 2):  # one dimension changed, then the other
            assert_equal(trained(automatic, tensors), expected)


def test_counts_like_torchs(device):
    """As many graphs as torch.nn.RMSNorm for the same calls, among them one row, no grad and other dtypes."""

    def graphs(norm):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(norm, backend=counter)
        counts = []
        for shape in (*ROWS, (1, 4), (0, 4)):
            compiled(draw((*shape, 64), torch.float32, device).requires_grad_()).sum().backward()
            counts.append(counter.frame_count)
        with torch.no_grad():
            compiled(draw((5, 64), torch.float32, device))
        compiled(draw((5, 64), torch.bfloat16, device))
        return [*counts, counter.frame_count]

    assert graphs(RMSNorm(64, device=device)) == graphs(torch.nn.RMSNorm(64, device=device))


def test_columns_may_be_dynamic(device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, w: rms_norm(x, x.shape[-1:], w), backend=counter, fullgraph=True)
    for n in (64, 65, 96, 1000):
        tensors = draw((3, n), torch.float32, device), draw((n,), torch.float32, device)
        assert_equal(trained(compiled, tensors), trained(lambda x, w: rms_norm(x, x.shape[-1:], w), tensors))
    assert counter.frame_count == 2


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_eps_is_an_argument(dynamic, device):
    """Each value is the one that is used, whether a graph was made for it or for any."""
    compiled = compiles(lambda x, eps: rms_norm(x, (N,), eps=eps), dynamic=dynamic)
    x = draw((5, N), torch.float64, device)
    for eps in (1e-5, 0.1, 1e-5, 3.0, 7.25, 2, None):
        assert_equal(compiled(x, eps), rms_norm(x, (N,), eps=eps))


@pytest.mark.slow
@with_inductor
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_inductor(dynamic, device, launches):
    """Among operations that Inductor generates code for: one launch forward, two backward, for any number of rows."""
    torch.manual_seed(0)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.add_norm, self.gated = RMSNorm(64), AddRMSNorm(64, eps=1e-5), RMSNormGated(64, weight_offset=1.0)

        def forward(self, x):
            y, residual = self.add_norm(self.norm(x * 2).cos(), x.sin())
            return self.gated(y + 1, residual).tanh()

    block = Block().to(device)
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    for shape in ((3, 4, 64), (5, 4, 64), (8, 4, 64)):
        x = draw(shape, torch.float32, device)
        expected = trained(block, [x])
        launches.clear()
        ours = trained(compiled, [x])
        assert [recorded.step for recorded in launches] == [
            *["forward"] * 3,
            *["backward", "sum_partials"] * 3,
        ]
        for our, their in zip(ours, expected, strict=True):
            torch.testing.assert_close(our, their)


@pytest.mark.parametrize("recomputed", [True, False])
def test_partitioner_may_recompute_or_save(recomputed, device, launches):
    """AOTAutograd decides whether the forward runs again in the backward."""
    from torch._functorch import config

    tensors = VARIANTS["plain"].draw((4, 3, N), torch.float32, device)
    f = lambda x, w: rms_norm(x.cos(), (N,), w).sin()  # noqa: E731
    expected = trained(f, tensors)
    launches.clear()
    wrapped = (lambda *args: checkpoint(f, *args, use_reentrant=False)) if recomputed else f
    with config.patch(activation_memory_budget=1.0):
        compiled = torch.compile(wrapped, backend="aot_eager_decomp_partition", fullgraph=True)
        for our, their in zip(trained(compiled, tensors), expected, strict=True):
            torch.testing.assert_close(our, their)
    assert [recorded.step for recorded in launches].count("forward") == 1 + recomputed


def test_selective_checkpoint(device, launches):
    """The operators have names, which a policy can tell."""
    x, weight = VARIANTS["plain"].draw((4, 3, N), torch.float32, device)
    f = lambda x, w: rms_norm(x.cos(), (N,), w).sin()  # noqa: E731
    expected = trained(f, (x, weight))
    for save in (True, False):

        def policy(_, op, *args, save=save, **kwargs):
            saved = save and op == ops.forward.default
            return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

        def checkpointed(x, w, policy=policy):
            return checkpoint(f, x, w, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy))

        launches.clear()
        assert_equal(trained(checkpointed, (x, weight)), expected)
        assert [recorded.step for recorded in launches].count("forward") == 2 - save


INSIDE = {
    "grad": lambda f, tensors: grad(scalar(f), (0, 1))(*tensors),
    "vmap": lambda f, tensors: vmap(f, (0, None))(*tensors),
    "vmap_of_grad": lambda f, tensors: vmap(grad(scalar(f), (0, 1)), (0, None))(*tensors),
    "vmap_over_both": lambda f, tensors: vmap(f)(tensors[0], tensors[1].expand(len(tensors[0]), N)),
    "jvp": lambda f, tensors: jvp(f, tuple(tensors), tuple(torch.ones_like(t) for t in tensors)),
    "hessian": lambda f, tensors: hessian(scalar(f))(*tensors),
    "autograd": lambda f, tensors: torch.autograd.grad(scalar(f)(*tensors), tensors),
}


def dual(f, x, weight):
    with forward_ad.dual_level():
        y = f(forward_ad.make_dual(x, torch.ones_like(x)), forward_ad.make_dual(weight, torch.full_like(weight, 2)))
        return tuple(forward_ad.unpack_dual(y))


@pytest.mark.parametrize("where", ["inside", "around"])
@pytest.mark.parametrize("transform", [*INSIDE, "dual"])
def test_transforms(transform, where, device):
    """Derivatives inside of what is compiled, and of what was compiled."""
    x, weight = VARIANTS["plain"].draw((3, 4, N), torch.float64, device)

    def run(f, tensors):
        return dual(f, *tensors) if transform == "dual" else INSIDE[transform](f, tensors)

    if transform == "autograd":
        x, weight = leaves((x, weight))
    theirs = run(VARIANTS["plain"].theirs, (x, weight))
    if where == "inside":
        ours = torch.compile(lambda *tensors: run(VARIANTS["plain"].ours, tensors), backend="aot_eager")(x, weight)
    elif transform == "hessian":
        pytest.skip("torch does not differentiate twice what it compiled")
    else:
        ours = run(torch.compile(VARIANTS["plain"].ours, backend="aot_eager"), (x, weight))
    for our, their in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        torch.testing.assert_close(our, their)


def test_double_backward_of_compiled_is_an_error(device):
    """As of any compiled function; not a gradient that lacks a term."""
    x, weight = leaves(VARIANTS["plain"].draw((4, N), torch.float32, device))
    y = compiles(VARIANTS["plain"].ours)(x, weight)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        slope.square().sum().backward()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("create_graph", [False, True])
def test_compiled_autograd(function, create_graph, device):
    def results():
        tensors = leaves(function.draw((4, 3, N), torch.float64, device))
        torch.manual_seed(0)
        first = torch.autograd.grad(scalar(function.ours)(*tensors), tensors, create_graph=create_graph)
        return (*first, *torch.autograd.grad(sum(t.cos().sum() for t in first), tensors)) if create_graph else first

    torch.manual_seed(0)
    expected = results()
    torch.manual_seed(0)
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        ours = results()
    for our, their in zip(ours, expected, strict=True):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize(("module", "inputs"), MODULES.values(), ids=MODULES)
def test_export(module, inputs, strict, device, launches):
    """With any batch, after decompositions, after a round trip through a file: the operator, and so the kernel, is in the program."""
    norm = module(64, device=device)
    torch.nn.init.normal_(norm.weight)
    batch = torch.export.Dim("batch")
    arguments = tuple(draw((3, 4, 64), torch.float32, device) for _ in range(inputs))
    exported = torch.export.export(norm, arguments, dynamic_shapes=tuple({0: batch} for _ in arguments), strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    others = [draw((11, 4, 64), torch.float32, device) for _ in range(inputs)]
    expected = norm(*others)
    for program in (exported, exported.run_decompositions(), torch.export.load(file)):
        assert ops.forward.default in [node.target for node in program.graph.nodes]
        launches.clear()
        assert_equal(program.module()(*others), expected)
        assert [recorded.step for recorded in launches] == ["forward"]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize(("module", "inputs"), MODULES.values(), ids=MODULES)
def test_exported_module_trains(module, inputs, strict, device, launches):
    """What was exported still has gradients: all of them, by the kernels."""
    norm = module(64, device=device)
    arguments = tuple(draw((3, 64), torch.float32, device) for _ in range(inputs))
    program = torch.export.export(norm, arguments, strict=strict).module()

    def results(norm):
        norm.zero_grad()
        return *trained(norm, arguments), norm.weight.grad

    expected = results(norm)
    launches.clear()
    assert_equal(results(program), expected)
    assert [recorded.step for recorded in launches] == ["forward", "backward", "sum_partials"]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(function, mode, device):
    """Traced with its backward: both operators are in the graph, and it computes what eager does."""

    def gradients(*tensors):
        return torch.autograd.grad(scalar(function.ours)(*tensors), tensors)

    tensors = leaves(function.draw((4, 3, N), torch.float32, device))
    traced = make_fx(gradients, tracing_mode=mode)(*tensors)
    targets = [node.target for node in traced.graph.nodes]
    assert targets.count(ops.forward.default) == targets.count(ops.backward.default) == 1
    others = leaves(function.draw((7 if mode == "symbolic" else 4, 3, N), torch.float32, device))
    if mode == "symbolic":  # the weights of scalar() were traced for one shape
        others = leaves(function.draw((4, 3, N), torch.float32, device))
    assert_equal(traced(*others), gradients(*others))


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = {
    "contiguous": lambda x: x,
    "strided_rows": lambda x: x[:, ::2],
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 2),
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_fake_and_meta(name, layout, device):
    """Without data: shapes, dtypes and strides of outputs and gradients as with data, for all dtypes of x and weight."""
    variant = VARIANTS[name]
    for dtype, weight_dtype in product(DTYPES, DTYPES):
        tensors = [
            t.to(weight_dtype) if argument == "weight" else layout(t)
            for argument, t in zip(variant.arguments, variant.draw((4, 3, 3, N), dtype, device), strict=True)
        ]
        real = trained(variant.ours, tensors)
        with FakeTensorMode() as mode:
            fake = trained(variant.ours, [mode.from_tensor(t) for t in tensors])
        meta = trained(variant.ours, [t.to("meta") for t in tensors])
        for r, f, m in zip(real, fake, meta, strict=True):
            assert (f.shape, f.dtype, f.stride(), f.device) == (r.shape, r.dtype, r.stride(), r.device)
            assert (m.shape, m.dtype) == (r.shape, r.dtype) and m.is_meta


SPECS = {
    "plain": Spec((64,), 1e-5),
    "two_dims": Spec((4, 64), 1e-5),
    "groups": Spec((64,), 0.5, group_size=16, weight_offset=1.0),
    "rounded": Spec((64,), 1e-5, x_hat_dtype=torch.bfloat16, rstd_dtype=torch.float16),
}


# Dtypes of x and weight, the spec, and whether there is a residual or a gate.
SAMPLES = {
    "fp32": (torch.float32, torch.float32, SPECS["plain"], False, False),
    "no_weight": (torch.float32, None, SPECS["plain"], False, False),
    "mixed": (torch.bfloat16, torch.float64, SPECS["two_dims"], False, False),
    "groups": (torch.float64, torch.float32, SPECS["groups"], False, False),
    "rounded": (torch.bfloat16, torch.float32, SPECS["rounded"], False, False),
    "add": (torch.float16, torch.float32, SPECS["plain"], True, False),
    "add_rounded": (torch.bfloat16, None, SPECS["rounded"], True, False),
    "gate": (torch.float64, torch.bfloat16, SPECS["groups"]._replace(activation="silu"), False, True),
    "gate_before": (torch.bfloat16, None, SPECS["two_dims"]._replace(activation="gelu", norm_before_gate=False), False, True),
}


@pytest.mark.parametrize(("dtype", "weight_dtype", "spec", "has_residual", "has_gate"), SAMPLES.values(), ids=SAMPLES)
def test_opcheck(dtype, weight_dtype, spec, has_residual, has_gate, device):
    """Schema, fake, autograd registration and AOTAutograd with dynamic shapes, of both operators; what is not needed is an empty tensor."""
    shape = (3, 4, 64)
    x, dy = draw(shape, dtype, device), draw(shape, dtype, device)
    weight = None if weight_dtype is None else draw(spec.normalized_shape, weight_dtype, device)
    residual = draw(shape, torch.float32, device) if has_residual else None
    gate = draw(shape, torch.float32, device) if has_gate else None
    opcheck(ops.forward.default, (x, weight, residual, gate, *spec))
    opcheck(ops.forward.default, (*(None if t is None else t.requires_grad_() for t in (x, weight, residual, gate)), *spec))

    tensors = [None if t is None else t.detach() for t in (x, weight, residual, gate)]
    _, rstd, residual_out = ops.forward(*tensors, *spec)
    x, weight, residual, gate = tensors
    u = residual_out if has_residual else x
    assert rstd.dtype == accumulation_dtype(x, residual, gate)
    for needs_dx, needs_dw in ((True, weight is not None), (False, weight is not None), (True, False)):
        needs = [needs_dx, needs_dw, needs_dx and has_residual, needs_dx and has_gate]
        if any(needs):
            opcheck(ops.backward.default, (dy, residual if has_residual else None, u, weight, gate, rstd, dtype, needs, *spec))
    arguments = (dy, None, u, weight, gate, rstd, dtype, [True, weight is not None, False, has_gate], *spec)
    opcheck(ops.backward.default, tuple(a.detach().requires_grad_() if isinstance(a, Tensor) and a is not rstd else a for a in arguments))


def test_kernels_are_not_traced(device):
    """Nothing of a launch shows in a graph but the operator: neither strides nor configuration are guarded on."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch.compile(RMSNorm(64, device=device), backend=backend, fullgraph=True)(draw((3, 64), torch.float32, device))
    targets = {
        str(node.target) for graph in graphs for module in graph.modules() if hasattr(module, "graph") for node in module.graph.nodes
    }
    assert any("triton_rmsnorm.forward" in target for target in targets)
    assert not any("empty" in target for target in targets)


@with_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cuda_graph(function, dtype, device):
    """Forward and backward are captured (so nothing synchronizes) and replayed on new data."""
    tensors = leaves(function.draw((64, N), dtype, device))
    norm = function.ours

    def step():
        outputs = tree_leaves(norm(*tensors))
        return [*outputs, *torch.autograd.grad(outputs, tensors, [torch.ones_like(y) for y in outputs])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            for t in tensors:
                t.copy_(torch.randn_like(t))
        graph.replay()
        assert_equal([t.detach() for t in captured], [t.detach() for t in step()])


@with_gpu
def test_no_synchronization(function, device):
    tensors = leaves(function.draw((64, N), torch.bfloat16, device))
    trained(function.ours, tensors)  # compiles
    scale = [torch.ones_like(y) for y in tree_leaves(function.ours(*tensors))]
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(tree_leaves(function.ours(*tensors)), tensors, scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@with_gpu
def test_compiled_with_cuda_graphs(device):
    """mode="reduce-overhead": Inductor captures the launches."""
    norm = RMSNorm(64, device=device)
    compiled = torch.compile(lambda x: norm(x.cos()).sin(), mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = draw((32, 64), torch.bfloat16, device)
        torch.compiler.cudagraph_mark_step_begin()
        for our, their in zip(trained(compiled, [x]), trained(lambda x: norm(x.cos()).sin(), [x]), strict=True):
            torch.testing.assert_close(our.clone(), their)
