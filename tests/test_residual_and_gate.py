"""add_rms_norm and rms_norm_gated: every output and gradient against the exact result, layouts, launches, errors."""

import re

import pytest
import torch
from torch import Tensor
from variants import id_of, ours

from triton_rmsnorm import AddRMSNorm, RMSNormGated, add_rms_norm, reference, rms_norm, rms_norm_gated
from triton_rmsnorm.reference import Inputs, Spec
from triton_rmsnorm.runtime import config
from triton_rmsnorm.testing import assert_within_budget, draw, expected, run

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
EPS = 1e-5


def problem(m, n, dtype, weight_dtype, device, *, residual_dtype=None, gate_dtype=None) -> Inputs:
    def rows(dtype: torch.dtype | None) -> Tensor | None:
        return draw((m, n), dtype, device) if dtype else None

    weight = draw((n,), weight_dtype, device) if weight_dtype else None
    return Inputs(rows(dtype), weight, rows(residual_dtype), rows(gate_dtype))


def check(inputs: Inputs, spec: Spec) -> None:
    """Outputs and gradients are within the budget, and have the dtypes and shapes of the inputs."""
    x, _, residual, _ = inputs
    dy = draw(x.shape, x.dtype, x.device)
    dresidual_out = None if residual is None else draw(x.shape, residual.dtype, x.device)
    results = run(ours(spec), inputs, dy, dresidual_out)
    for name, tensor in inputs._asdict().items():
        if tensor is not None:
            gradient = results.present[f"d{name}"]
            assert (gradient.dtype, gradient.shape) == (tensor.dtype, tensor.shape)
    assert results.y.dtype == x.dtype
    assert_within_budget(results, expected(inputs, dy, spec, dresidual_out))


@pytest.mark.parametrize(("m", "n"), [(199, 1), (19, 127), (45, 768), (3, 4097), (0, 8)])
@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=id_of)
def test_residual_columns(dtype, m, n, device):
    check(problem(m, n, dtype, dtype, device, residual_dtype=dtype), Spec((n,), EPS))


@pytest.mark.parametrize(
    ("dtype", "residual_dtype", "weight_dtype"),
    [(BF16, F32, BF16), (BF16, F32, F32), (F32, BF16, F32), (F16, BF16, F32), (F32, F64, F32), (BF16, F32, None)],
    ids=id_of,
)
def test_residual_mixed_dtypes(dtype, residual_dtype, weight_dtype, device):
    check(problem(19, 256, dtype, weight_dtype, device, residual_dtype=residual_dtype), Spec((256,), EPS))


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize(("m", "n"), [(199, 1), (45, 768), (3, 4097), (0, 8)])
@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=id_of)
def test_gate_columns(dtype, m, n, norm_before_gate, device):
    spec = Spec((n,), EPS, activation="silu", norm_before_gate=norm_before_gate)
    check(problem(m, n, dtype, dtype, device, gate_dtype=dtype), spec)


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=id_of)
def test_activations(dtype, activation, norm_before_gate, device):
    spec = Spec((96,), EPS, activation=activation, norm_before_gate=norm_before_gate)
    check(problem(19, 96, dtype, dtype, device, gate_dtype=dtype), spec)


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize(("dtype", "gate_dtype", "weight_dtype"), [(BF16, F32, F32), (F32, BF16, BF16), (F16, F16, None)], ids=id_of)
def test_gate_mixed_dtypes_and_groups(dtype, gate_dtype, weight_dtype, norm_before_gate, device):
    spec = Spec((512,), EPS, 128, activation="silu", norm_before_gate=norm_before_gate)
    check(problem(19, 512, dtype, weight_dtype, device, gate_dtype=gate_dtype), spec)


@pytest.mark.parametrize("stand_in", [config.SM_80, config.SM_90], ids=lambda device: device.name)
@pytest.mark.parametrize("n", [200, 4096, 20000])
def test_configurations_of_gpus(n, stand_in, device, run_as):
    run_as(stand_in)
    m, weight_dtype = max(3, 9000 // n), F32 if n < 10_000 else None  # the sum of dw takes a program for every 32 columns
    check(problem(m, n, BF16, weight_dtype, device, residual_dtype=F32), Spec((n,), EPS))
    check(problem(m, n, F32, weight_dtype, device, gate_dtype=F32), Spec((n,), EPS, activation="silu", norm_before_gate=False))


def test_rounding_before_the_gate(device):
    """With x_hat_dtype, weight · x_hat is rounded to its dtype before the gate multiplies it, as models do that norm in half precision."""
    x, z = draw((199, 64), BF16, device), draw((199, 64), BF16, device)
    for weight, after in ((draw((64,), BF16, device), BF16), (draw((64,), F32, device), F32)):
        product = rms_norm(x, (64,), weight, EPS, x_hat_dtype=BF16)
        assert product.dtype == after
        expected = (product.float() * torch.nn.functional.silu(z.float())).to(BF16)
        actual = rms_norm_gated(x, z, (64,), weight, EPS, x_hat_dtype=BF16)
        assert actual.dtype == BF16
        # silu in the last bit of fp32 tips few roundings.
        assert (actual != expected).double().mean() < 0.002


def test_one_launch_forward(device, launches):
    x, r = draw((9, 64), F32, device), draw((9, 64), F32, device)
    add_rms_norm(x, r, (64,))
    rms_norm_gated(x, r, (64,))
    assert [recorded.step for recorded in launches] == ["forward"] * 2


def test_one_gradient_for_input_and_residual_of_one_dtype(device, launches):
    """Both are the same numbers: they are written once."""
    x, r = (draw((9, 64), F32, device).requires_grad_() for _ in range(2))
    add_rms_norm(x, r, (64,))[0].sum().backward()
    (backward,) = (recorded for recorded in launches if recorded.step == "backward")
    assert backward.pointers["DX"] is not None and backward.pointers["DRESIDUAL"] is None
    assert torch.equal(x.grad, r.grad) and backward.pointers["DRESIDUAL_OUT"] is None


@pytest.mark.parametrize("needed", [("x",), ("residual",), ("weight",), ("x", "weight"), ("residual", "weight")])
def test_only_what_needs_a_gradient(needed, device):
    inputs = problem(9, 64, BF16, F32, device, residual_dtype=F32)
    dy, dresidual_out = draw((9, 64), BF16, device), draw((9, 64), F32, device)
    full = run(ours(Spec((64,), EPS)), inputs, dy, dresidual_out)
    leaves = {name: t.detach().requires_grad_(name in needed) for name, t in inputs._asdict().items() if t is not None}
    outputs = ours(Spec((64,), EPS))(**leaves)
    torch.autograd.backward(outputs, (dy, dresidual_out))
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in needed)
        assert leaf.grad is None or torch.equal(leaf.grad, full.present[f"d{name}"])


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
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


def test_bit_determinism(device):
    inputs, dy = problem(300, 128, BF16, BF16, device, gate_dtype=BF16), draw((300, 128), BF16, device)
    first, second = (run(ours(Spec((128,), EPS, activation="silu")), inputs, dy).present for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_modules(device):
    add = AddRMSNorm(64, eps=EPS, weight_offset=1.0, device=device)
    assert torch.equal(add.weight, torch.zeros_like(add.weight)), "a factor of 1"
    assert "weight_offset=1.0" in repr(add) and list(add.state_dict()) == ["weight"]
    x, r = draw((9, 64), F32, device), draw((9, 64), F32, device)
    assert all(map(torch.equal, add(x, r), add_rms_norm(x, r, (64,), add.weight, EPS, weight_offset=1.0)))
    gated = RMSNormGated(64, eps=EPS, activation="sigmoid", norm_before_gate=False, group_size=16, device=device)
    expected = rms_norm_gated(x, r, (64,), gated.weight, EPS, activation="sigmoid", norm_before_gate=False, group_size=16)
    assert torch.equal(gated(x, r), expected)


X = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: add_rms_norm(X, X[:1], (8,)), RuntimeError, "residual must have the shape of input, (2, 8), got (1, 8)"),
        (lambda: add_rms_norm(X, X.to("meta"), (8,)), RuntimeError, "residual must be on the device of input, cpu, got meta"),
        (lambda: add_rms_norm(X, X.int(), (8,)), NotImplementedError, "got torch.int32"),
        (lambda: add_rms_norm(X, None, (8,)), TypeError, "residual must be a Tensor, got NoneType"),
        (lambda: add_rms_norm(X.to(torch.complex64), X, (8,)), NotImplementedError, "got torch.complex64"),
        (lambda: rms_norm_gated(X, X[..., :4], (8,)), RuntimeError, "gate must have the shape of input, (2, 8), got (2, 4)"),
        (lambda: rms_norm_gated(X, X, (8,), activation="swish"), ValueError, "one of silu, sigmoid, gelu, gelu_tanh, relu, got 'swish'"),
        (lambda: rms_norm_gated(X, X, (8,), group_size=3), ValueError, "group_size must divide the normalized size 8, got 3"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
