"""The specification itself: against the exact result, against autograd, and its gradients against each other."""

import pytest
import torch
from conftest import Results, assert_within_budget, draw, exact, results_of, torchs

from triton_rmsnorm import reference
from triton_rmsnorm.reference import Spec

FIELDS = {
    "plain": {},
    "groups": {"group_size": 32},
    "offset": {"weight_offset": 1.0},
    "groups_and_offset": {"group_size": 32, "weight_offset": 1.0},
}
CPU = torch.device("cpu")


def problem(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return draw((19, 2, 96), dtype, CPU), draw((2, 96), dtype, CPU), draw((19, 2, 96), dtype, CPU)


def closed_form(x, weight, dy, spec) -> Results:
    y, rstd, _ = reference.forward(x, weight, spec)
    gradients = reference.backward(dy, x, weight, rstd, spec)
    return Results(y, gradients.dx, gradients.dw)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_closed_form(dtype, fields):
    x, weight, dy = problem(dtype)
    spec = Spec((2, 96), 1e-6, **fields)
    by_autograd = results_of(lambda x, weight: reference.forward(x, weight, spec)[0], x, weight, dy)
    truth = exact(x, weight, dy, spec)
    others = torchs(x, weight, dy, spec)
    assert_within_budget(closed_form(x, weight, dy, spec), truth, others)
    if dtype == torch.float64:
        assert_within_budget(by_autograd, truth, others)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_gradcheck(fields):
    x, weight, _ = problem()
    spec = Spec((2, 96), 1e-6, **fields)
    x, weight = x[:2].requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: reference.forward(x, weight, spec)[0], (x, weight), fast_mode=True)


@pytest.mark.parametrize("field", ["x_hat_dtype", "rstd_dtype"])
def test_roundings_count_as_the_identity(field):
    """A rounding moves the gradients by no more than it moves what it rounds: by one eps of its dtype."""
    x, weight, dy = problem()
    spec = Spec((2, 96), 1e-6)
    plain, rounded = (closed_form(x, weight, dy, s) for s in (spec, spec._replace(**{field: torch.bfloat16})))
    assert not torch.equal(plain.y, rounded.y)
    for before, after in zip(plain, rounded, strict=True):
        moved = (after.double() - before).abs().amax(-1) / before.abs().amax(-1)
        assert moved.max() <= torch.finfo(torch.bfloat16).eps
