"""Values and gradients against the exact result, and which rows, columns and calls may influence one another."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import BLOCKED, Results, assert_within_budget, draw, exact, exact_given, longdouble, results_of, torchs
from torch.nn import functional as F

from triton_rmsnorm import reference, rms_norm
from triton_rmsnorm.reference import Spec, accumulation_dtype
from triton_rmsnorm.runtime import config as tuning
from triton_rmsnorm.runtime import launch

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


COLUMNS = [1, 2, 127, 128, 768, 1000, 1023, 4096, *sorted({n - 1 for n in BLOCKED} | BLOCKED)]


def name_of(value) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def spec_of(x: torch.Tensor, normalized_shape: tuple[int, ...], **fields) -> Spec:
    return Spec(normalized_shape, **{"eps": torch.finfo(accumulation_dtype(x)).eps, **fields})


def check(x, weight, normalized_shape, **fields) -> None:
    """y, dx and dw of one call are within the budget and of the right dtypes."""
    dy = draw(x.shape, x.dtype, x.device)
    ours = results_of(lambda x, weight: rms_norm(x, normalized_shape, weight, **fields), x, weight, dy)
    assert ours.y.dtype == ours.dx.dtype == x.dtype
    assert weight is None or ours.dw.dtype == weight.dtype
    spec = spec_of(x, normalized_shape, **fields)
    assert_within_budget(ours, exact(x, weight, dy, spec), torchs(x, weight, dy, spec))


@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_columns(dtype, n, device):
    m = 199 if n <= 4096 else 19
    check(draw((m, n), dtype, device), draw((n,), dtype, device), (n,))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_one_row(dtype, device):
    check(draw((768,), dtype, device), draw((768,), dtype, device), (768,))


@pytest.mark.parametrize("n", [1000, max(BLOCKED)])
@pytest.mark.parametrize(("dtype", "weight_dtype"), list(itertools.permutations(DTYPES, 2)), ids=name_of)
def test_mixed_dtypes(dtype, weight_dtype, n, device):
    check(draw((9, n), dtype, device), draw((n,), weight_dtype, device), (n,))


@pytest.mark.parametrize("n", [64, 4096, max(BLOCKED)])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_no_weight(dtype, n, device):
    check(draw((9, n), dtype, device), None, (n,))


@pytest.mark.parametrize("shape", [(199, 3, 5, 7), (2, 199, 8, 16), (199, 1, 100)])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_normalized_shape(shape, ndim, device):
    normalized_shape = shape[len(shape) - ndim :]
    check(draw(shape, torch.float32, device), draw(normalized_shape, torch.float32, device), normalized_shape)


@pytest.mark.parametrize(("rows", "n"), [(5000, 64), (70, 4096)])
def test_many_tiles(rows, n, device):
    """More tiles than programs: dw is accumulated over tiles and summed over programs."""
    check(draw((rows, n), torch.float32, device), draw((n,), torch.float32, device), (n,))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from the interpreter, of rows beyond the last
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5, -0.25, 3])
def test_eps(eps, device):
    check(draw((199, 127), torch.float32, device), draw((127,), torch.float32, device), (127,), eps=eps)


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_precision_of_eps(dtype, eps, device):
    """Rows whose mean square is about eps show which eps it is: that of the arithmetic, not of the dtype, with all its digits."""
    scale = eps or torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    x = (draw((199, 64), torch.float64, device) * scale**0.5).to(dtype)
    check(x, draw((64,), dtype, device), (64,), **({} if eps is None else {"eps": eps}))


@pytest.mark.parametrize(("n", "group_size"), [(1024, 128), (300, 100), (8, 1), (96, 96), (2 * max(BLOCKED), max(BLOCKED))])
def test_groups(n, group_size, device):
    check(draw((9, n), torch.float32, device), draw((n,), torch.float32, device), (n,), group_size=group_size)


@pytest.mark.parametrize("n", [1000, max(BLOCKED)])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float64)], ids=name_of)
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


@pytest.mark.parametrize("n", [768, max(BLOCKED)])
@pytest.mark.parametrize(("dtype", "weight_dtype", "x_hat_dtype", "rstd_dtype"), ROUNDINGS, ids=name_of)
def test_roundings(dtype, weight_dtype, x_hat_dtype, rstd_dtype, n, device, launches):
    """Given rstd, y is bit for bit what torch makes of the same steps; the gradients take x_hat as it was rounded."""
    x, weight = draw((9, n), dtype, device), None if weight_dtype is None else draw((n,), weight_dtype, device)
    spec = spec_of(x, (n,), x_hat_dtype=x_hat_dtype, rstd_dtype=rstd_dtype)

    def function(x, weight):
        return rms_norm(x, (n,), weight, x_hat_dtype=x_hat_dtype, rstd_dtype=rstd_dtype)

    y = function(x.requires_grad_(), weight).detach()
    rstd = launches[0].pointers["RSTD"]
    x_hat = x.detach().to(rstd.dtype) * (rstd if rstd_dtype is None else rstd.to(rstd_dtype).to(rstd.dtype))
    if x_hat_dtype is not None:
        x_hat = x_hat.to(x_hat_dtype)
    product = x_hat if weight is None else x_hat * weight.to(torch.promote_types(weight.dtype, x_hat.dtype))
    torch.testing.assert_close(y, product.to(y.dtype), rtol=0, atol=0)
    assert y.dtype == (dtype if x_hat_dtype is None else product.dtype)

    dy = draw(y.shape, y.dtype, device)
    truth = exact_given(longdouble(x_hat), longdouble(rstd), weight, dy, spec)._replace(y=None)
    composed = reference.backward(dy.to(rstd.dtype), x.detach().to(rstd.dtype), weight, rstd, spec)
    ours = results_of(function, x, weight, dy)._replace(y=None)
    assert_within_budget(ours, truth, [Results(None, composed.dx, composed.dw)])


@pytest.mark.parametrize("n", [1000, max(BLOCKED)])
@pytest.mark.parametrize("has_weight", [True, False], ids=["weight", "no_weight"])
@pytest.mark.parametrize(("needs_dx", "needs_dw"), list(itertools.product([True, False], repeat=2)))
def test_needs_grad(needs_dx, needs_dw, has_weight, n, device, launches):
    """What needs no gradient gets none and costs nothing, and the other gradient does not change."""
    x, weight = draw((9, n), torch.float32, device), draw((n,), torch.float32, device) if has_weight else None
    dy = draw(x.shape, x.dtype, device)
    everything = results_of(lambda x, weight: rms_norm(x, (n,), weight), x, weight, dy)
    launches.clear()

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
    assert not has_weight or (weight.grad is None if not needs_dw else torch.equal(weight.grad, everything.dw))

    kernels = [recorded.kernel for recorded in launches]
    c1 = ["_rms_norm_bwd_c1_kernel"] * (needs_dx and n in BLOCKED and launch.INTERPRETED)
    main = ["_rms_norm_bwd_kernel"] * (needs_dx or needs_dw)
    assert [k for k in kernels if launch.INTERPRETED or "c1" not in k] == c1 + main + ["_sum_partials_kernel"] * needs_dw
    for recorded in launches:
        if recorded.kernel == "_rms_norm_bwd_kernel":
            assert (recorded.pointers["DX"] is not None) == needs_dx
            assert (recorded.pointers["DW_PARTIAL"] is not None) == needs_dw


DEVICES = {
    "sm_80": tuning.SM_80,
    "sm_90": tuning.SM_90,
    "sm_90_without_clusters": replace(tuning.SM_90, max_ctas=1),
    "sm_100": tuning.SM_100,
    "gfx942": tuning.GFX942,
    "three_programs": replace(tuning.SM_90, num_sms=3),  # so that each walks over many tiles
}


@pytest.mark.parametrize(("m", "n"), [(199, 127), (150, 1000), (40, 4096)])
@pytest.mark.parametrize("stand_in", DEVICES.values(), ids=DEVICES)
def test_configurations_of_devices(stand_in, m, n, device, run_as):
    run_as(stand_in)
    check(draw((m, n), torch.bfloat16, device), draw((n,), torch.float32, device), (n,))


@pytest.mark.parametrize("stand_in", [tuning.SM_80, tuning.GFX942], ids=lambda stand_in: stand_in.name)
def test_blocks_of_devices(stand_in, device, run_as):
    """A row walked in blocks both ways, dw spread over grid axis 2."""
    run_as(stand_in)
    n = 33000
    assert max(choose(n, 4, 4, stand_in).block_n for choose in (tuning.forward_config, tuning.backward_config)) < n
    check(draw((3, n), torch.float32, device), draw((n,), torch.float32, device), (n,))


def test_many_partial_dw(device, run_as):
    """More of them than one tile of the kernel that sums them."""
    run_as(tuning.SM_80)
    m, n = 70, 8200
    assert tuning.reduction_config(n, tuning.SM_80).block_m < m <= tuning.backward_config(n, 4, 4, tuning.SM_80).programs
    check(draw((m, n), torch.float32, device), draw((n,), torch.float32, device), (n,))


@pytest.mark.parametrize("stand_in", DEVICES.values(), ids=DEVICES)
def test_long_rows_of_devices(stand_in, device, run_as):
    run_as(stand_in)
    check(draw((3, 70000), torch.float32, device), None, (70000,))


@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (0, 0), (2, 0, 5), (2, 3, 0, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize("ndim", [1, 2])
def test_nothing(shape, dtype, ndim, device, launches):
    """No rows or no columns: the same shapes and dtypes as torch, zeros for dw, and no launch."""
    x, dy = draw(shape, dtype, device), draw(shape, dtype, device)
    weight = draw(shape[-ndim:], dtype, device)
    ours = results_of(lambda x, weight: rms_norm(x, shape[-ndim:], weight), x, weight, dy)
    theirs = results_of(lambda x, weight: F.rms_norm(x, shape[-ndim:], weight), x, weight, dy)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=0)
    assert torch.equal(ours.dw, torch.zeros_like(weight))
    assert not launches


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("n", [127, max(BLOCKED)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_extreme_rows(dtype, n, device):
    """Rows with inf, NaN, zeros, and squares that overflow or vanish: as in torch, and without effect on other rows."""
    x, dy = draw((7, n), dtype, device), draw((7, n), dtype, device)
    plain = results_of(lambda x, _: rms_norm(x, (n,)), x, None, dy)
    x[0, 3], x[1, 5], x[2] = torch.inf, torch.nan, 0
    x[3] *= 1e30
    x[4] *= 1e-30
    ours = results_of(lambda x, _: rms_norm(x, (n,)), x, None, dy)
    theirs = results_of(lambda x, _: F.rms_norm(x, (n,)), x, None, dy)
    for our, their, before in ((ours.y, theirs.y, plain.y), (ours.dx, theirs.dx, plain.dx)):
        assert torch.equal(our.isnan(), their.isnan()) and torch.equal(our.isinf(), their.isinf())
        assert torch.equal(our[5:], before[5:])
    assert torch.equal(ours.y[[2, 3]], torch.zeros_like(x[[2, 3]]))
    spec, finite = spec_of(x, (n,)), [2, 4, 5, 6]
    ours = Results(ours.y[finite], ours.dx[finite], None)
    assert_within_budget(ours, exact(x[finite], None, dy[finite], spec), torchs(x[finite], None, dy[finite], spec))
