"""The specification itself: against the exact result, against autograd, and its gradients against each other."""

import pytest
import torch
from torch import Tensor

from triton_rmsnorm import reference
from triton_rmsnorm.reference import BackwardInputs, Inputs, Spec
from triton_rmsnorm.testing import Results, assert_within_budget, draw, expected, run

FIELDS = {
    "plain": {},
    "groups": {"group_size": 32},
    "offset": {"weight_offset": 1.0},
    "groups_and_offset": {"group_size": 32, "weight_offset": 1.0},
    "gate": {"activation": "silu"},
    "gate_first": {"activation": "gelu", "norm_before_gate": False},
}


def problem(spec: Spec, dtype: torch.dtype = torch.float64) -> tuple[Inputs, Tensor]:
    gate = draw((19, 2, 96), dtype) if spec.activation else None
    return Inputs(draw((19, 2, 96), dtype), draw((2, 96), dtype), gate=gate), draw((19, 2, 96), dtype)


def closed_form(inputs: Inputs, dy: Tensor, spec: Spec) -> Results:
    y, rstd, _ = reference.forward(inputs, spec)
    return Results(y, None, *reference.backward(BackwardInputs(dy, None, inputs.x, inputs.weight, inputs.gate, rstd), spec))


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_closed_form(dtype, fields):
    spec = Spec((2, 96), 1e-6, **fields)
    inputs, dy = problem(spec, dtype)
    want = expected(inputs, dy, spec)
    assert_within_budget(closed_form(inputs, dy, spec), want)
    if dtype == torch.float64:
        by_autograd = run(lambda *tensors: reference.forward(Inputs(*tensors), spec).y, inputs, dy)
        assert_within_budget(by_autograd, want)


@pytest.mark.parametrize("field", ["x_hat_dtype", "rstd_dtype"])
def test_roundings_count_as_the_identity(field):
    """A rounding moves the gradients by no more than it moves what it rounds: by one eps of its dtype."""
    spec = Spec((2, 96), 1e-6)
    inputs, dy = problem(spec)
    plain, rounded = (closed_form(inputs, dy, s).present for s in (spec, spec._replace(**{field: torch.bfloat16})))
    assert not torch.equal(plain["y"], rounded["y"])
    for name, before in plain.items():
        moved = (rounded[name].double() - before).abs().amax(-1) / before.abs().amax(-1)
        assert moved.max() <= torch.finfo(torch.bfloat16).eps
