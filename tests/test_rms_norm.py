"""rms_norm: values and gradients against the exact result, and which rows, columns and calls may influence one another."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import BLOCKED, block_n, id_of, ours, torchs

from triton_rmsnorm import reference, rms_norm
from triton_rmsnorm.reference import BackwardInputs, Inputs, Spec, accumulation_dtype
from triton_rmsnorm.runtime import config, kernels, launch
from triton_rmsnorm.testing import Results, allow, assert_within_budget, draw, expect, expected, longdouble, run, ulp

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SOME_COLUMNS = [1, 127, 1000, max(BLOCKED)]
COLUMNS = [2, 128, 768, 1023, *sorted({n - 1 for n in BLOCKED} | {min(BLOCKED)}), 9000]


def spec_of(x: Tensor, normalized_shape: tuple[int, ...], **fields: Any) -> Spec:
    return Spec(normalized_shape, **{"eps": torch.finfo(accumulation_dtype(x)).eps, **fields})


def check(x: Tensor, weight: Tensor | None, normalized_shape: tuple[int, ...], **options: Any) -> None:
    """y, dx and dweight of one call are within the budget and of the right dtypes."""
    inputs, dy = Inputs(x, weight), draw(x.shape, x.dtype, x.device)
    results = run(lambda x, weight, *_: rms_norm(x, normalized_shape, weight, **options), inputs, dy)
    assert results.y.dtype == results.dx.dtype == x.dtype
    assert weight is None or results.dweight.dtype == weight.dtype
    assert_within_budget(results, expected(inputs, dy, spec_of(x, normalized_shape, **options)))


@pytest.mark.parametrize(
    ("dtype", "n"), [*itertools.product(DTYPES, SOME_COLUMNS), *itertools.product([torch.bfloat16, torch.float32], COLUMNS)], ids=id_of
)
def test_columns(dtype, n, device):
    m = max(5, min(199, 40_000 // n))
    check(draw((m, n), dtype, device), draw((n,), dtype, device), (n,))


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
def test_one_row(dtype, device):
    check(draw((768,), dtype, device), draw((768,), dtype, device), (768,))


@pytest.mark.parametrize("n", [96, max(BLOCKED)])
@pytest.mark.parametrize(("dtype", "weight_dtype"), list(itertools.permutations(DTYPES, 2)), ids=id_of)
def test_mixed_dtypes(dtype, weight_dtype, n, device):
    check(draw((9, n), dtype, device), draw((n,), weight_dtype, device), (n,))


@pytest.mark.parametrize("n", [64, max(BLOCKED)])
@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
def test_no_weight(dtype, n, device):
    check(draw((9, n), dtype, device), None, (n,))


@pytest.mark.parametrize("shape", [(199, 3, 5, 7), (2, 50, 8, 16), (199, 1, 100)])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_normalized_shape(shape, ndim, device):
    normalized_shape = shape[len(shape) - ndim :]
    check(draw(shape, torch.float32, device), draw(normalized_shape, torch.float32, device), normalized_shape)


@pytest.mark.parametrize(("rows", "n"), [(3000, 64), (70, 2048)])
def test_many_tiles(rows, n, device):
    """More tiles than programs: dweight is accumulated over tiles and summed over programs."""
    check(draw((rows, n), torch.float32, device), draw((n,), torch.float32, device), (n,))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from the interpreter, of rows beyond the last
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5, -0.25, 3])
def test_eps(eps, device):
    check(draw((199, 127), torch.float32, device), draw((127,), torch.float32, device), (127,), eps=eps)


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
def test_precision_of_eps(dtype, eps, device):
    """Rows whose mean square is about eps show which eps it is: that of the arithmetic, not of the dtype, with all its digits."""
    scale = eps or torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    x = (draw((199, 64), torch.float64, device) * scale**0.5).to(dtype)
    check(x, draw((64,), dtype, device), (64,), **({} if eps is None else {"eps": eps}))


@pytest.mark.parametrize(("n", "group_size"), [(1024, 128), (300, 100), (8, 1), (96, 96), (2 * max(BLOCKED), max(BLOCKED))])
def test_groups(n, group_size, device):
    check(draw((9, n), torch.float32, device), draw((n,), torch.float32, device), (n,), group_size=group_size)


@pytest.mark.parametrize("n", [96, max(BLOCKED)])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float64)], ids=id_of)
def test_weight_offset(dtype, weight_dtype, n, device):
    check(draw((9, n), dtype, device), draw((n,), weight_dtype, device), (n,), weight_offset=1.0)


ROUNDINGS = [
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, None),
    (torch.bfloat16, torch.float32, torch.bfloat16, None),
    (torch.float16, torch.float16, torch.float16, None),
    (torch.float16, torch.float32, torch.float16, torch.float16),
    (torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float32, torch.float32, None),
    (torch.float32, torch.float64, torch.float32, None),
    (torch.bfloat16, torch.bfloat16, None, torch.bfloat16),
    (torch.bfloat16, None, torch.bfloat16, None),
]


@pytest.mark.parametrize("n", [96, max(BLOCKED)])
@pytest.mark.parametrize(("dtype", "weight_dtype", "x_hat_dtype", "rstd_dtype"), ROUNDINGS, ids=id_of)
def test_roundings(dtype, weight_dtype, x_hat_dtype, rstd_dtype, n, device, launches):
    """Given rstd, y is bit for bit what torch makes of the same steps; the gradients take x_hat as it was rounded."""
    x, weight = draw((9, n), dtype, device), None if weight_dtype is None else draw((n,), weight_dtype, device)
    spec = spec_of(x, (n,), x_hat_dtype=x_hat_dtype, rstd_dtype=rstd_dtype)
    dy = draw(x.shape, spec.output_dtype(x, weight), device)
    results = run(ours(spec), Inputs(x, weight), dy)

    rstd = launches[0].pointers["RSTD"]
    x_hat = x.to(rstd.dtype) * (rstd if rstd_dtype is None else rstd.to(rstd_dtype).to(rstd.dtype))
    if x_hat_dtype is not None:
        x_hat = x_hat.to(x_hat_dtype)
    product = x_hat if weight is None else x_hat * weight.to(torch.promote_types(weight.dtype, x_hat.dtype))
    torch.testing.assert_close(results.y, product.to(results.y.dtype), rtol=0, atol=0)
    assert results.y.dtype == (dtype if x_hat_dtype is None else product.dtype)

    exact_dy, exact_x_hat = longdouble(dy), longdouble(x_hat)
    wdy = exact_dy if weight is None else exact_dy * longdouble(weight)
    dx = (wdy - (exact_x_hat * wdy).mean(-1, keepdims=True) * exact_x_hat) * longdouble(rstd)
    truth = {"y": expect(longdouble(results.y), x), "dx": expect(dx, x)}
    if weight is not None:
        truth["dweight"] = expect((exact_dy * exact_x_hat).sum(0), weight)
    composed = reference.backward(BackwardInputs(dy.to(rstd.dtype), None, x.to(rstd.dtype), weight, None, rstd), spec)
    assert_within_budget(results, allow(truth, [Results(results.y, None, *composed)]))


@pytest.mark.parametrize("n", [1000, max(BLOCKED)])
@pytest.mark.parametrize("has_weight", [True, False], ids=["weight", "no_weight"])
@pytest.mark.parametrize(("needs_dx", "needs_dw"), list(itertools.product([True, False], repeat=2)))
def test_needs_grad(needs_dx, needs_dw, has_weight, n, device, launches):
    """What needs no gradient gets none and costs nothing, and the other gradient does not change."""
    x, weight = draw((9, n), torch.float32, device), draw((n,), torch.float32, device) if has_weight else None
    dy = draw(x.shape, x.dtype, device)
    everything = run(lambda x, weight, *_: rms_norm(x, (n,), weight), Inputs(x, weight), dy)

    x.requires_grad_(needs_dx)
    needs_dw = needs_dw and has_weight
    if has_weight:
        weight.requires_grad_(needs_dw)
    y = rms_norm(x, (n,), weight)
    assert torch.equal(y, everything.y)
    assert y.requires_grad == (needs_dx or needs_dw)
    launches.clear()
    if y.requires_grad:
        y.backward(dy)
    assert x.grad is None if not needs_dx else torch.equal(x.grad, everything.dx)
    assert not has_weight or (weight.grad is None if not needs_dw else torch.equal(weight.grad, everything.dweight))

    c1 = ["c1"] * (needs_dx and n in BLOCKED and launch.INTERPRETED)
    steps = c1 + ["backward"] * (needs_dx or needs_dw) + ["sum_partials"] * needs_dw
    assert [recorded.step for recorded in launches if launch.INTERPRETED or recorded.step != "c1"] == steps
    for recorded in launches:
        if recorded.step == "backward":
            assert (recorded.pointers["DX"] is not None) == needs_dx
            assert (recorded.pointers["DW_PARTIAL"] is not None) == needs_dw


DEVICES = {
    "sm_80": config.SM_80,
    "sm_90": config.SM_90,
    "sm_90_without_clusters": config.SM_90._replace(max_ctas=1),
    "sm_100": config.SM_100,
    "gfx942": config.GFX942,
    "three_programs": config.SM_90._replace(num_sms=3),  # so that each walks over many tiles
}


@pytest.mark.parametrize(("m", "n"), [(45, 127), (21, 1000), (7, 4096)])
@pytest.mark.parametrize("stand_in", DEVICES.values(), ids=DEVICES)
def test_configurations_of_devices(stand_in, m, n, device, run_as):
    run_as(stand_in)
    check(draw((m, n), torch.bfloat16, device), draw((n,), torch.float32, device), (n,))


@pytest.mark.parametrize("stand_in", [config.SM_80, config.GFX942], ids=lambda stand_in: stand_in.name)
def test_blocks_of_devices(stand_in, device, run_as):
    """A backward in blocks of columns, dweight spread over grid axis 2."""
    run_as(stand_in)
    n = 16400
    assert block_n("backward", n, stand_in) < n
    check(draw((2, n), torch.float32, device), draw((n,), torch.float32, device), (n,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=id_of)
def test_many_partial_dw(dtype, device):
    """More of them than one tile of the kernel that sums them, columns that do not fill a block."""
    programs, columns, chosen = 300, 100, config.reduction_config(10_000, config.SM_80)
    assert chosen.block_m < programs and columns % chosen.block_n
    sizes = {"COLS": columns, "BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n}
    grid = (-(-columns // chosen.block_n), 1, 1)
    partials, dw = draw((programs, columns), torch.float32, device), torch.empty(columns, dtype=dtype, device=device)
    launch.Launch("sum_partials", kernels._sum_partials_kernel, grid, chosen, programs=programs, **sizes)(partials, dw)
    exact = partials.double().sum(0)
    by_row = sum(partials)  # a sum has no order, so one row after the other is as good as torch's
    budget = 2 * max((other - exact).abs().max() for other in (by_row, partials.sum(0))) + ulp(exact, dtype)
    assert ((dw.double() - exact).abs() <= budget).all()


@pytest.mark.parametrize("stand_in", DEVICES.values(), ids=DEVICES)
def test_long_rows_of_devices(stand_in, device, run_as):
    """A cluster of thread blocks, or blocks of columns both ways."""
    run_as(stand_in)
    check(draw((2, 70000), torch.float32, device), None, (70000,))


@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (0, 0), (2, 0, 5), (2, 3, 0, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=id_of)
@pytest.mark.parametrize("ndim", [1, 2])
def test_nothing(shape, dtype, ndim, device, launches):
    """No rows or no columns: the same shapes and dtypes as torch, zeros for dweight, and no launch."""
    inputs, dy = Inputs(draw(shape, dtype, device), draw(shape[-ndim:], dtype, device)), draw(shape, dtype, device)
    results, theirs = (run(lambda x, w, *_, f=f: f(x, shape[-ndim:], w), inputs, dy) for f in (rms_norm, torchs))
    for name, result in theirs.present.items():
        torch.testing.assert_close(results.present[name], result, rtol=0, atol=0)
    assert torch.equal(results.dweight, torch.zeros_like(inputs.weight))
    assert not launches


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=id_of)
def test_extreme_long_rows(dtype, device):
    """Rows with inf, NaN, zeros, and squares that overflow or vanish: as in torch, and without effect on other rows."""
    n = max(BLOCKED)  # short rows are in test_contract.py
    x, dy = draw((7, n), dtype, device), draw((7, n), dtype, device)

    def results_of(norm) -> Results:
        return run(lambda x, *_: norm(x, (n,)), Inputs(x), dy)

    plain = results_of(rms_norm)
    x[0, 3], x[1, 5], x[2] = torch.inf, torch.nan, 0
    x[3] *= 1e30
    x[4] *= 1e-30
    results, theirs = results_of(rms_norm), results_of(torchs)
    for our, their, before in ((results.y, theirs.y, plain.y), (results.dx, theirs.dx, plain.dx)):
        assert torch.equal(our.isnan(), their.isnan()) and torch.equal(our.isinf(), their.isinf())
        assert torch.equal(our[5:], before[5:])
    assert torch.equal(results.y[[2, 3]], torch.zeros_like(x[[2, 3]]))
    finite = [2, 4, 5, 6]
    assert_within_budget(Results(results.y[finite], dx=results.dx[finite]), expected(Inputs(x[finite]), dy[finite], spec_of(x, (n,))))
