"""The three functions: outputs and gradients against the exact result, and what is computed and launched for them."""

import itertools
from typing import Any

import pytest
import torch
from variants import BLOCKED, Drawn, Problem, assert_same, block_n, id_of, ours, torchs

from triton_rmsnorm import AddRMSNorm, RMSNormGated, add_rms_norm, reference, rms_norm, rms_norm_gated
from triton_rmsnorm.reference import BackwardInputs, Inputs, Spec, accumulation_dtype
from triton_rmsnorm.runtime import config, kernels, launch
from triton_rmsnorm.testing import Results, allow, assert_within_budget, draw, expect, longdouble, run, ulp

F16, BF16, F32, F64 = DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LONG = max(BLOCKED)
SOME_COLUMNS = [1, 127, 1000, LONG]
COLUMNS = [2, 128, 768, 1023, *sorted({n - 1 for n in BLOCKED} | {min(BLOCKED)}), 9000]
EPS = 1e-5


def gated(activation: str, before: bool, **fields: Any) -> dict[str, Any]:
    return {"activation": activation, "norm_before_gate": before, **fields}


BOTH = (True, False)
PROBLEMS = {
    "columns": [
        Problem((max(5, min(199, 40_000 // n)), n), dtype, dtype)
        for dtype, n in [*itertools.product(DTYPES, SOME_COLUMNS), *itertools.product((BF16, F32), COLUMNS)]
    ],
    "one_row": [Problem((768,), dtype, dtype) for dtype in DTYPES],
    "mixed_dtypes": [Problem((9, n), *dtypes) for dtypes in itertools.permutations(DTYPES, 2) for n in (96, LONG)],
    "no_weight": [Problem((9, n), dtype, None) for dtype in DTYPES for n in (64, LONG)],
    "normalized_shape": [
        Problem(shape, normalized=normalized) for shape in ((199, 3, 5, 7), (2, 50, 8, 16), (199, 1, 100)) for normalized in (1, 2, 3)
    ],
    "many_tiles": [Problem((3000, 64)), Problem((70, 2048))],  # more than programs: dweight is summed over tiles and over programs
    "eps": [Problem((199, 127), fields={"eps": eps}) for eps in (0.0, 1e-6, 0.5, -0.25, 3)],
    "groups": [Problem((9, n), fields={"group_size": size}) for n, size in ((1024, 128), (300, 100), (8, 1), (96, 96), (2 * LONG, LONG))],
    "weight_offset": [Problem((9, n), *dtypes, fields={"weight_offset": 1.0}) for dtypes in ((BF16, BF16), (F32, F64)) for n in (96, LONG)],
    "residual": [
        Problem(shape, dtype, dtype, dtype) for dtype in (BF16, F32, F64) for shape in ((199, 1), (19, 127), (45, 768), (3, LONG), (0, 8))
    ],
    "residual_dtypes": [
        Problem((9, n), dtype, weight, residual)
        for n in (256, LONG)
        for dtype, residual, weight in (
            *((BF16, F32, BF16), (BF16, F32, F32), (F32, BF16, F32), (F64, F32, F32)),
            *((F16, BF16, F32), (F32, F64, F32), (BF16, F32, None), (F64, F32, None)),
        )
    ],
    "gate": [
        Problem(shape, dtype, dtype, gate=dtype, fields=gated("silu", before))
        for dtype in (BF16, F32, F64)
        for shape in ((199, 1), (45, 768), (3, LONG), (0, 8))
        for before in BOTH
    ],
    "activations": [
        Problem((19, 96), dtype, dtype, gate=dtype, fields=gated(activation, before))
        for dtype in (F32, F64)
        for activation in reference.ACTIVATIONS
        for before in BOTH
    ],
    "gate_dtypes_and_groups": [
        Problem((19, 512), dtype, weight, gate=gate, fields=gated("silu", before, group_size=128))
        for dtype, gate, weight in ((BF16, F32, F32), (F32, BF16, BF16), (F16, F16, None))
        for before in BOTH
    ],
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from the interpreter, of rows beyond the last
@pytest.mark.parametrize("problem", [pytest.param(p, id=f"{name}{i}") for name, some in PROBLEMS.items() for i, p in enumerate(some)])
def test_values(problem, device):
    problem.draw(device).check()


DEVICES = {
    "sm_80": config.SM_80,
    "sm_90": config.SM_90,
    "sm_90_without_clusters": config.SM_90._replace(max_ctas=1),
    "gfx942": config.GFX942,
    "three_programs": config.SM_90._replace(num_sms=3),  # so that each walks over many tiles
}
ON_DEVICES = [
    *(Problem(shape, BF16) for shape in ((45, 127), (21, 1000), (7, 4096))),
    Problem((2, 70000), weight=None),  # a cluster of thread blocks, or blocks of columns both ways
    Problem((45, 256), BF16, BF16, fields={"group_size": 128}),  # several programs for each group
]
# The sum of dw takes a program for every 32 columns.
MORE = [Problem(shape, BF16, F32 if shape[1] < 10_000 else None, F32) for shape in ((45, 200), (3, 4096), (3, 20000))]
MORE += [problem._replace(dtype=F32, residual=None, gate=F32, fields=gated("silu", False)) for problem in MORE]


@pytest.mark.parametrize(
    ("stand_in", "problem"),
    [*itertools.product(DEVICES, ON_DEVICES), *itertools.product(("sm_80", "sm_90"), MORE)],
    ids=lambda value: value if isinstance(value, str) else str(value.shape),
)
def test_configurations_of_devices(stand_in, problem, device, run_as):
    run_as(DEVICES[stand_in])
    problem.draw(device).check()


@pytest.mark.slow
@pytest.mark.parametrize("stand_in", ["sm_80", "gfx942"])
def test_blocks_of_devices(stand_in, device, run_as):
    """A backward in blocks of columns, dweight spread over grid axis 2."""
    run_as(DEVICES[stand_in])
    assert block_n("backward", 16400, DEVICES[stand_in]) < 16400
    Problem((2, 16400)).draw(device).check()


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
def test_precision_of_eps(dtype, eps, device):
    """Rows whose mean square is about eps show which eps it is: that of the arithmetic, not of the dtype, with all its digits."""
    exact = eps or torch.finfo(torch.float64 if dtype == F64 else F32).eps
    x, weight, dy = (draw(shape, dtype, device) for shape in ((199, 64), (64,), (199, 64)))
    drawn = Drawn(Spec((64,), exact), Inputs((x * exact**0.5).to(dtype), weight), dy)
    drawn.check(drawn.run(lambda x, weight, *_: rms_norm(x, (64,), weight, eps)))


ROUNDINGS = [
    (BF16, BF16, BF16, None),
    (BF16, F32, BF16, None),
    (F16, F16, F16, None),
    (F16, F32, F16, F16),
    (F32, BF16, BF16, BF16),
    (F64, F32, F32, None),
    (F32, F64, F32, None),
    (BF16, BF16, None, BF16),
    (BF16, None, BF16, None),
]


@pytest.mark.parametrize("n", [96, LONG])
@pytest.mark.parametrize(("dtype", "weight_dtype", "x_hat_dtype", "rstd_dtype"), ROUNDINGS, ids=id_of)
def test_roundings(dtype, weight_dtype, x_hat_dtype, rstd_dtype, n, device, launches):
    """Given rstd, y is bit for bit what torch makes of the same steps; the gradients take x_hat as it was rounded."""
    x, weight = draw((9, n), dtype, device), None if weight_dtype is None else draw((n,), weight_dtype, device)
    spec = Spec((n,), torch.finfo(accumulation_dtype(x)).eps, x_hat_dtype=x_hat_dtype, rstd_dtype=rstd_dtype)
    dy = draw(x.shape, spec.output_dtype(x, weight), device)
    results = run(ours(spec), Inputs(x, weight), dy)

    rstd = launches[0].pointers["RSTD"]
    x_hat = x.to(rstd.dtype) * (rstd if rstd_dtype is None else rstd.to(rstd_dtype).to(rstd.dtype))
    if x_hat_dtype is not None:
        x_hat = x_hat.to(x_hat_dtype)
    product = x_hat if weight is None else x_hat * weight.to(torch.promote_types(weight.dtype, x_hat.dtype))
    assert_same(results.y, product.to(results.y.dtype))
    assert results.y.dtype == (dtype if x_hat_dtype is None else product.dtype)

    exact_dy, exact_x_hat = longdouble(dy), longdouble(x_hat)
    wdy = exact_dy if weight is None else exact_dy * longdouble(weight)
    dx = (wdy - (exact_x_hat * wdy).mean(-1, keepdims=True) * exact_x_hat) * longdouble(rstd)
    truth = {"y": expect(longdouble(results.y), x), "dx": expect(dx, x)}
    if weight is not None:
        truth["dweight"] = expect((exact_dy * exact_x_hat).sum(0), weight)
    composed = reference.backward(BackwardInputs(dy.to(rstd.dtype), None, x.to(rstd.dtype), weight, None, rstd), spec)
    assert_within_budget(results, allow(truth, [Results(results.y, None, *composed)]))


def test_rounding_before_the_gate(device):
    """With x_hat_dtype, weight · x_hat is rounded to its dtype before the gate multiplies it, as models do that norm in half precision."""
    x, z, dy = (draw((199, 64), BF16, device) for _ in range(3))
    z.requires_grad_()
    for dtype in (BF16, F32):
        weight = draw((64,), dtype, device)
        product = rms_norm(x, (64,), weight, EPS, x_hat_dtype=BF16)
        actual = rms_norm_gated(x, z, (64,), weight, EPS, x_hat_dtype=BF16)
        assert product.dtype == dtype and actual.dtype == BF16
        expected = (product.float() * torch.nn.functional.silu(z.float())).to(BF16)
        for our, their in ((actual, expected), [*torch.autograd.grad(actual, z, dy), *torch.autograd.grad(expected, z, dy)]):
            assert (our != their).double().mean() < 0.002  # silu in the last bit of fp32 tips few roundings


NEEDED = [
    *((Problem((9, n), weight=weight), "x") for n in (1000, LONG) for weight in (F32, None)),
    *((Problem((9, n)), needed) for n in (1000, LONG) for needed in ("weight", "x weight", "")),
    *((Problem((9, 64), BF16, F32, F32), needed) for needed in ("x", "residual", "weight", "residual weight")),
]


@pytest.mark.parametrize(("problem", "needed"), NEEDED)
def test_needs_grad(problem, needed, device, launches):
    """What needs no gradient gets none and costs nothing, and the other gradients do not change."""
    needed = set(needed.split())
    drawn = problem.draw(device)
    everything = drawn.run()
    leaves = {name: t.detach().requires_grad_(name in needed) for name, t in drawn.inputs._asdict().items() if t is not None}
    outputs = ours(problem.spec)(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    needs_du, needs_dw = bool(needed & {"x", "residual"}), "weight" in needed
    assert torch.equal(outputs[0], everything.y)
    assert [y.requires_grad for y in outputs] == [bool(needed), needs_du][: len(outputs)]
    launches.clear()
    if needed:
        cotangents = (drawn.dy, drawn.dresidual_out)
        torch.autograd.backward(*zip(*[pair for pair in zip(outputs, cotangents, strict=False) if pair[0].requires_grad], strict=True))
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in needed)
        assert leaf.grad is None or torch.equal(leaf.grad, everything.present[f"d{name}"])

    c1 = ["c1"] * (needs_du and problem.shape[-1] in BLOCKED and launch.INTERPRETED)
    steps = c1 + ["backward"] * bool(needed) + ["sum_partials"] * needs_dw
    assert [recorded.step for recorded in launches if launch.INTERPRETED or recorded.step != "c1"] == steps
    for recorded in launches:
        if recorded.step == "backward":
            assert (recorded.pointers["DX"] is not None or recorded.pointers["DRESIDUAL"] is not None) == needs_du
            assert (recorded.pointers["DW_PARTIAL"] is not None) == needs_dw


def test_one_gradient_for_input_and_residual_of_one_dtype(device, launches):
    """Both are the same numbers: they are written once."""
    x, r = (draw((9, 64), F32, device).requires_grad_() for _ in range(2))
    add_rms_norm(x, r, (64,))[0].sum().backward()
    (backward,) = (recorded for recorded in launches if recorded.step == "backward")
    assert backward.pointers["DX"] is not None and backward.pointers["DRESIDUAL"] is None
    assert torch.equal(x.grad, r.grad) and backward.pointers["DRESIDUAL_OUT"] is None


def test_slope_of_gelu_tanh(device):
    """Where its sigmoid s is nearly 1, an error of 1 - s is multiplied: by a subtraction, the slope would be 2e-6 off."""
    z = torch.linspace(-8, 8, 4000, device=device).requires_grad_()
    rms_norm_gated(torch.ones_like(z), z, (4000,), eps=0.0, activation="gelu_tanh").sum().backward()
    exact = z.detach().double().requires_grad_()
    torch.nn.functional.gelu(exact, approximate="tanh").sum().backward()
    # Slopes are at most 1.13: three roundings of s, 1 - s and the product, and one of the sum.
    assert (z.grad - exact.grad).abs().max() < 4 * torch.finfo(F32).eps


@pytest.mark.parametrize("dtype", [BF16, F32], ids=id_of)
def test_many_partial_dw(dtype, device):
    """More of them than one tile of the kernel that sums them, columns that do not fill a block."""
    programs, columns, chosen = 300, 100, config.reduction_config(10_000, config.SM_80)
    assert chosen.block_m < programs and columns % chosen.block_n
    sizes = {"COLS": columns, "BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n}
    grid = (-(-columns // chosen.block_n), 1, 1)
    partials, dw = draw((programs, columns), F32, device), torch.empty(columns, dtype=dtype, device=device)
    launch.Launch("sum_partials", kernels._sum_partials_kernel, grid, chosen, programs=programs, **sizes)(partials, dw)
    exact = partials.double().sum(0)
    by_row = sum(partials)  # a sum has no order, so one row after the other is as good as torch's
    budget = 2 * max((other - exact).abs().max() for other in (by_row, partials.sum(0))) + ulp(exact, dtype)
    assert ((dw.double() - exact).abs() <= budget).all()


@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (0, 0), (2, 0, 5), (2, 3, 0, 5)])
@pytest.mark.parametrize("ndim", [1, 2])
def test_nothing(shape, ndim, device, launches):
    """No rows or no columns: the same shapes, strides and dtypes as torch, zeros for dweight, and no launch."""
    for dtype in (BF16, F64):
        inputs, dy = Inputs(draw(shape, dtype, device), draw(shape[-ndim:], dtype, device)), draw(shape, dtype, device)
        results, theirs = (run(lambda x, w, *_, f=f: f(x, shape[-ndim:], w), inputs, dy) for f in (rms_norm, torchs))
        assert_same(results, theirs)
        assert results.y.stride() == theirs.y.stride()
        assert torch.equal(results.dweight, torch.zeros_like(inputs.weight))
    assert not launches


def test_slices_of_one_projection_are_read_in_place(device, launches):
    projected = draw((2, 5, 3 * 64), F32, device)
    x, z = projected[..., 64:128], projected[..., 128:]
    before = projected.clone()
    y = rms_norm_gated(x, z, (64,), norm_before_gate=False)
    assert launches[0].pointers["X"].data_ptr() == x.data_ptr() and launches[0].pointers["GATE"].data_ptr() == z.data_ptr()
    assert torch.equal(projected, before)
    assert torch.equal(y, rms_norm_gated(x.contiguous(), z.contiguous(), (64,), norm_before_gate=False))


def test_strided_and_expanded_gradients(device):
    x, r = (draw((6, 64), F64, device).requires_grad_() for _ in range(2))
    outputs = add_rms_norm(x, r, (64,))
    cotangents = draw((64, 6), F64, device).T, torch.ones((), dtype=F64, device=device).expand(6, 64)
    strided = torch.autograd.grad(outputs, (x, r), cotangents, retain_graph=True)
    dense = torch.autograd.grad(outputs, (x, r), [t.contiguous() for t in cotangents])
    assert_same(strided, dense)


def test_modules(device):
    add = AddRMSNorm(64, eps=EPS, weight_offset=1.0, device=device)
    assert torch.equal(add.weight, torch.zeros_like(add.weight)), "a factor of 1"
    assert "weight_offset=1.0" in repr(add) and list(add.state_dict()) == ["weight"]
    x, r = draw((9, 64), F32, device), draw((9, 64), F32, device)
    assert_same(add(x, r), add_rms_norm(x, r, (64,), add.weight, EPS, weight_offset=1.0))
    options = {"activation": "sigmoid", "norm_before_gate": False, "group_size": 16}
    gate = RMSNormGated(64, eps=EPS, **options, device=device)
    assert torch.equal(gate(x, r), rms_norm_gated(x, r, (64,), gate.weight, EPS, **options))
