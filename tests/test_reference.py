"""The specification itself: against the exact result, against autograd, and its gradients against each other."""

import pytest
import torch
from variants import Drawn, Problem

from triton_rmsnorm import reference
from triton_rmsnorm.reference import BackwardInputs, Inputs
from triton_rmsnorm.testing import Results

FIELDS = {
    "plain": {},
    "groups": {"group_size": 32},
    "offset": {"weight_offset": 1.0},
    "groups_and_offset": {"group_size": 32, "weight_offset": 1.0},
    "gate": {"activation": "silu"},
    "gate_first": {"activation": "gelu", "norm_before_gate": False},
}


def drawn(fields: dict, dtype: torch.dtype = torch.float64) -> Drawn:
    gate = dtype if "activation" in fields else None
    return Problem((19, 2, 96), dtype, dtype, gate=gate, normalized=2, fields=fields).draw("cpu")


def closed_form(given: Drawn) -> Results:
    spec, inputs, dy, _ = given
    y, rstd, _ = reference.forward(inputs, spec)
    return Results(y, None, *reference.backward(BackwardInputs(dy, None, inputs.x, inputs.weight, inputs.gate, rstd), spec))


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_closed_form(dtype, fields):
    given = drawn(fields, dtype)
    given.check(closed_form(given))
    if dtype == torch.float64:
        given.check(given.run(lambda *tensors: reference.forward(Inputs(*tensors), given.spec).y))


@pytest.mark.parametrize("field", ["x_hat_dtype", "rstd_dtype"])
def test_roundings_count_as_the_identity(field):
    """A rounding moves the gradients by no more than it moves what it rounds: by one eps of its dtype."""
    given = drawn({})
    spec = given.spec._replace(**{field: torch.bfloat16})
    plain, rounded = closed_form(given).present, closed_form(given._replace(spec=spec)).present
    assert not torch.equal(plain["y"], rounded["y"])
    for name, before in plain.items():
        moved = (rounded[name].double() - before).abs().amax(-1) / before.abs().amax(-1)
        assert moved.max() <= torch.finfo(torch.bfloat16).eps
