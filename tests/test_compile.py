"""torch.compile, torch.export, tracing and fake tensors: no graph break, nothing compiled anew, the same kernels and results as eager."""

import io
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transforms import TRANSFORMS, VMAPPED, double_backward, gradients
from variants import FUNCTIONS, VARIANTS, N, every_function, every_variant, id_of, leaves, trained

from triton_rmsnorm import AddRMSNorm, RMSNorm, RMSNormGated, rms_norm
from triton_rmsnorm.reference import Spec, accumulation_dtype
from triton_rmsnorm.testing import draw

pytestmark = pytest.mark.slow  # compilers of torch

ops = torch.ops.triton_rmsnorm
compiles = partial(torch.compile, backend="aot_eager", fullgraph=True)  # a graph break is an error
plain = VARIANTS["plain"].ours


@pytest.fixture(autouse=True)
def _afresh(small_tiles):
    """Nothing is compiled yet."""
    torch._dynamo.reset()


MODULES = {"RMSNorm": (RMSNorm, 1), "AddRMSNorm": (AddRMSNorm, 2), "RMSNormGated": (RMSNormGated, 2)}


@pytest.fixture(params=MODULES.values(), ids=MODULES)
def module(request, device):
    """A module, and what draws arguments for it."""
    module_class, inputs = request.param
    norm = module_class(64, eps=1e-6, device=device)
    torch.nn.init.normal_(norm.weight)
    return norm, lambda *shape: [draw((*shape, 64), torch.float32, device) for _ in range(inputs)]


def assert_equal(ours, theirs) -> None:
    """Bit for bit."""
    for our, their in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        assert our.dtype == their.dtype and our.stride() == their.stride() and torch.equal(our, their)


SAME = [(name, torch.bfloat16, False) for name in VARIANTS] + [(name, torch.float64, True) for name in FUNCTIONS]


@pytest.mark.parametrize(("name", "dtype", "dynamic"), SAME, ids=id_of)
def test_same_kernels_and_bits(name, dtype, dynamic, device, launches):
    variant = VARIANTS[name]
    tensors = variant.draw((4, 3, N), dtype, device)
    expected = trained(variant.ours, tensors)
    eager = [recorded.step for recorded in launches]
    launches.clear()
    assert_equal(trained(compiles(variant.ours, dynamic=dynamic), tensors), expected)
    assert [recorded.step for recorded in launches] == eager


LAYOUTS = {
    "q_of_qkv": lambda x: x.view(4, 6, 3, 2, 16)[:, :, 1].transpose(1, 2),
    "channels_last": lambda x: x.view(4, 6, 8, 12).to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 2),
    "negated": torch._neg_view,
    "expanded": lambda x: x[:, :1].expand(4, 6, 96),
}


@pytest.mark.parametrize(("layout", "ndim"), [*((layout, 1) for layout in LAYOUTS), ("channels_last", 2)])
def test_layouts(layout, ndim, device):
    """Strides of outputs and gradients, too, are those of eager."""
    of = LAYOUTS[layout]

    def norm(x: Tensor) -> Tensor:
        return rms_norm(of(x), of(x).shape[-ndim:])

    x = draw((4, 6, 96), torch.float32, device)
    assert_equal(trained(compiles(norm), [x]), trained(norm, [x]))


ROWS = ((3, 4), (7, 90))


def test_rows_compile_nothing_anew(module):
    """One dynamic graph serves all numbers of rows, forward and backward."""
    norm, arguments = module
    compiled = compiles(norm, dynamic=True)
    for i, shape in enumerate(ROWS):
        tensors = arguments(*shape)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_equal(trained(compiled, tensors), trained(norm, tensors))


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
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], weight)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(norm, backend=counter, fullgraph=True)
    for n in (64, 65, 96, 1000):
        tensors = draw((3, n), torch.float32, device), draw((n,), torch.float32, device)
        assert_equal(trained(compiled, tensors), trained(norm, tensors))
    assert counter.frame_count == 2


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_eps_is_an_argument(dynamic, device):
    """Each value is the one that is used, whether a graph was made for it or for any."""
    compiled = compiles(lambda x, eps: rms_norm(x, (N,), eps=eps), dynamic=dynamic)
    x = draw((5, N), torch.float64, device)
    for eps in (1e-5, 0.1, 3.0, 2, None, np.float64(0.2)):
        assert_equal(compiled(x, eps), rms_norm(x, (N,), eps=eps))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.add_norm, self.gated = RMSNorm(64), AddRMSNorm(64, eps=1e-5), RMSNormGated(64, weight_offset=1.0)

    def forward(self, x):
        y, residual = self.add_norm(self.norm(x * 2).cos(), x.sin())
        return self.gated(y + 1, residual).tanh()


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler")
@torch._inductor.config.patch(compile_threads=1)  # no processes of its own
def test_inductor(device, launches):
    """Among operations that Inductor generates code for: one launch forward, two backward, for any number of rows."""
    block = Block().to(device)
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for shape in ((3, 4, 64), (5, 4, 64)):
        x = draw(shape, torch.float32, device)
        expected = trained(block, [x])
        launches.clear()
        torch.testing.assert_close(trained(compiled, [x]), expected)
        assert [recorded.step for recorded in launches] == ["forward"] * 3 + ["backward", "sum_partials"] * 3


def between(x: Tensor, weight: Tensor) -> Tensor:
    return plain(x.cos(), weight).sin()


@pytest.mark.parametrize("recomputed", [True, False])
def test_partitioner_may_recompute_or_save(recomputed, device, launches):
    """AOTAutograd decides whether the forward runs again in the backward."""
    tensors = VARIANTS["plain"].draw((4, 3, N), torch.float32, device)
    expected = trained(between, tensors)
    launches.clear()
    function = partial(checkpoint, between, use_reentrant=False) if recomputed else between
    ours = trained(torch.compile(function, backend="aot_eager_decomp_partition", fullgraph=True), tensors)
    torch.testing.assert_close(ours, expected)
    assert [recorded.step for recorded in launches].count("forward") == 1 + recomputed


@pytest.mark.parametrize("save", [True, False])
def test_selective_checkpoint(save, device, launches):
    """The operators have names, which a policy can tell."""
    tensors = VARIANTS["plain"].draw((4, 3, N), torch.float32, device)
    expected = trained(between, tensors)
    launches.clear()

    def policy(_, op, *args, **kwargs):
        saved = save and op == ops.forward.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    assert_equal(trained(partial(checkpoint, between, use_reentrant=False, context_fn=contexts), tensors), expected)
    assert [recorded.step for recorded in launches].count("forward") == 2 - save


INSIDE = {name: TRANSFORMS[name] for name in ("grad", "jvp", "hessian", "backward", "dual")} | {
    "vmap": lambda f, tensors: VMAPPED["vmap"](f, tensors, (0, None)),
    "vmap_of_grad": lambda f, tensors: VMAPPED["vmap_of_grad"](f, tensors, (0, None)),
    "vmap_over_both": lambda f, tensors: VMAPPED["vmap"](f, (tensors[0], tensors[1].expand(len(tensors[0]), N)), (0, 0)),
}


@pytest.mark.parametrize(
    ("name", "where"), [*((name, "inside") for name in INSIDE), ("grad", "around"), ("vmap", "around"), ("dual", "around")]
)
def test_transforms(name, where, device):
    """Derivatives inside of what is compiled, and of what was compiled."""
    transform, tensors = INSIDE[name], VARIANTS["plain"].draw((3, 4, N), torch.float64, device)
    theirs = transform(VARIANTS["plain"].theirs, tensors)
    if where == "inside":
        ours = torch.compile(lambda *args: transform(plain, args), backend="aot_eager")(*tensors)
    else:
        ours = transform(torch.compile(plain, backend="aot_eager"), tensors)
    for our, their in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        torch.testing.assert_close(our, their)


def test_double_backward_of_compiled_is_an_error(device):
    """As of any compiled function; not a gradient that lacks a term."""
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        double_backward(compiles(plain), VARIANTS["plain"].draw((4, N), torch.float32, device))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "transform"), [*((name, "backward") for name in FUNCTIONS), ("residual", "double_backward")])
def test_compiled_autograd(name, transform, device):
    function = FUNCTIONS[name]
    tensors = function.draw((4, 3, N), torch.float64, device)
    expected = TRANSFORMS[transform](function.ours, tensors)
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        ours = TRANSFORMS[transform](function.ours, tensors)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(module, strict, launches):
    """With any batch, after decompositions, after a round trip through a file: the operator is in the program; and it trains."""
    norm, arguments = module
    given = tuple(arguments(3, 4))
    exported = torch.export.export(norm, given, dynamic_shapes=({0: torch.export.Dim("batch")},) * len(given), strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    others = arguments(11, 4)

    def results(norm) -> list[Tensor]:
        norm.zero_grad()
        return [*trained(norm, others), norm.weight.grad]

    expected = results(norm)
    for program in (exported, exported.run_decompositions(), torch.export.load(file)):
        assert ops.forward.default in [node.target for node in program.graph.nodes]
        launches.clear()
        assert_equal(results(program.module()), expected)
        assert [recorded.step for recorded in launches] == ["forward", "backward", "sum_partials"]


@every_function
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(function, mode, device):
    """Traced with its backward: both operators are in the graph, and it computes what eager does."""
    tensors, others = (leaves(function.draw((4, 3, N), torch.float32, device)) for _ in range(2))
    traced = make_fx(lambda *tensors: gradients(function.ours, tensors), tracing_mode=mode)(*tensors)
    targets = [node.target for node in traced.graph.nodes]
    assert targets.count(ops.forward.default) == targets.count(ops.backward.default) == 1
    assert_equal(traced(*others), gradients(function.ours, others))


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FAKED = {
    "contiguous": lambda x: x,
    "strided_rows": lambda x: x[:, ::2],
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 2),
    "empty": lambda x: x[:0],
}


@every_variant
@pytest.mark.parametrize("layout", FAKED.values(), ids=FAKED)
def test_fake_and_meta(variant, layout, device):
    """Without data: shapes, dtypes and strides of outputs and gradients as with data; contiguous, for all dtypes of x and of the weight."""
    dtypes = [*zip(DTYPES, DTYPES, strict=True), *zip(DTYPES, reversed(DTYPES), strict=True)]
    for dtype, weight_dtype in dtypes if layout is FAKED["contiguous"] else dtypes[1:2] + dtypes[-2:-1]:
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


PLAIN = Spec((64,), 1e-5)
TWO_DIMS = Spec((4, 64), 1e-5)
GROUPS = Spec((64,), 0.5, group_size=16, weight_offset=1.0)
ROUNDED = Spec((64,), 1e-5, x_hat_dtype=torch.bfloat16, rstd_dtype=torch.float16)
# Dtypes of x and weight, the spec, and whether there is a residual or a gate.
SAMPLES = {
    "no_weight": (torch.float32, None, PLAIN, None),
    "mixed": (torch.bfloat16, torch.float64, TWO_DIMS, None),
    "rounded": (torch.bfloat16, torch.float32, ROUNDED, None),
    "add": (torch.float16, torch.float32, ROUNDED, "residual"),
    "gate": (torch.float32, torch.bfloat16, GROUPS._replace(activation="silu"), "gate"),
    "gate_before": (torch.bfloat16, None, TWO_DIMS._replace(activation="gelu", norm_before_gate=False), "gate"),
}


WITHOUT_AUTOGRAD = ("test_schema", "test_faketensor")


@pytest.mark.parametrize(("dtype", "weight_dtype", "spec", "other"), SAMPLES.values(), ids=SAMPLES)
def test_opcheck(dtype, weight_dtype, spec, other, device):
    """Schema, fake, autograd registration and AOTAutograd with dynamic shapes, of both operators; what is not needed is an empty tensor."""
    x, dy, more = (draw((3, 4, 64), d, device) for d in (dtype, dtype, torch.float64))
    weight = None if weight_dtype is None else draw(spec.normalized_shape, weight_dtype, device)
    residual, gate = (more if other == name else None for name in ("residual", "gate"))
    tensors = (x, weight, residual, gate)
    opcheck(ops.forward.default, (*tensors, *spec), test_utils=WITHOUT_AUTOGRAD)
    opcheck(ops.forward.default, (*(None if t is None else t.clone().requires_grad_() for t in tensors), *spec))

    _, rstd, residual_out = ops.forward(*tensors, *spec)
    assert rstd.dtype == accumulation_dtype(x, residual, gate)
    saved = (residual_out if other == "residual" else x, weight, gate, rstd)
    has_weight, has_residual, has_gate = weight is not None, other == "residual", other == "gate"
    for needs in ([True, has_weight, has_residual, has_gate], [False, has_weight, False, False], [True, False, has_residual, has_gate]):
        if any(needs):
            opcheck(ops.backward.default, (dy, residual, *saved, dtype, needs, *spec), test_utils=WITHOUT_AUTOGRAD)
    differentiable = [t.clone().requires_grad_() if isinstance(t, Tensor) and t is not rstd else t for t in (dy, None, *saved)]
    opcheck(ops.backward.default, (*differentiable, dtype, [True, has_weight, False, has_gate], *spec))


def test_kernels_are_not_traced(device):
    """Nothing of a launch shows in a graph but the operator: neither strides nor configuration are guarded on."""
    graphs = []
    compiled = torch.compile(RMSNorm(64, device=device), backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    compiled(draw((3, 64), torch.float32, device))
    nodes = [node for graph in graphs for module in graph.modules() if hasattr(module, "graph") for node in module.graph.nodes]
    targets = {str(node.target) for node in nodes}
    assert any("triton_rmsnorm.forward" in target for target in targets)
    assert not any("empty" in target for target in targets)
