"""add_rms_norm and rms_norm_gated: every output and gradient against fp64, layouts, determinism, what is launched, and bad input."""

import re
from collections.abc import Callable

import pytest
import torch
from conftest import draw, longdouble, ulp
from torch import Tensor

from triton_rmsnorm import AddRMSNorm, RMSNormGated, add_rms_norm, reference, rms_norm, rms_norm_gated
from triton_rmsnorm.reference import Spec, accumulation_dtype
from triton_rmsnorm.runtime import config as tuning

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
EPS = 1e-5


def name_of(value) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def run(function: Callable, tensors: dict[str, Tensor | None], cotangents: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of function(**tensors), by the names of their cotangents, and d<name> of all tensors, by autograd."""
    leaves = {name: t if t is None else t.detach().requires_grad_() for name, t in tensors.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, list(cotangents.values()))
    results = dict(zip(cotangents, (output.detach() for output in outputs), strict=True))
    return results | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}


def composed(spec: Spec) -> Callable:
    """The same of torch's operations, as (y, residual_out) or y."""

    def function(x, weight, residual=None, gate=None):
        y, _, residual_out = reference.forward(x, weight, spec, residual, gate)
        return y if residual is None else (y, residual_out)

    return function


def check(ours: Callable, spec: Spec, tensors: dict[str, Tensor | None], out_dtype: torch.dtype | None = None) -> None:
    """Within 2 x the error of the same in torch's operations before a last rounding + one ulp, element by element; dtypes of inputs."""
    x = tensors["x"]
    cotangents = {"y": draw(x.shape, out_dtype or x.dtype, x.device)}
    if tensors.get("residual") is not None:
        cotangents["residual_out"] = draw(x.shape, tensors["residual"].dtype, x.device)
    actual = run(ours, tensors, cotangents)
    for name, tensor in tensors.items():
        assert tensor is None or (actual[f"d{name}"].dtype, actual[f"d{name}"].shape) == (tensor.dtype, tensor.shape)
    assert actual["y"].dtype == cotangents["y"].dtype

    acc = accumulation_dtype(*tensors.values())
    judged = dict(tensors)
    if tensors.get("residual") is not None:
        # What is normalized is the sum as the residual stream holds it, which is exact: from there on gradients are judged.
        total = (x.to(acc) + tensors["residual"].to(acc)).to(tensors["residual"].dtype)
        assert torch.equal(actual["residual_out"], total)
        judged["residual"], judged["x"] = torch.zeros_like(x, dtype=acc), total

    def result_in(dtype):
        up = {name: t if t is None else t.to(dtype) for name, t in judged.items()}
        return run(composed(spec), up, {name: c.to(dtype) for name, c in cotangents.items()})

    exact, torchs = result_in(F64), result_in(acc)
    for name, value in actual.items():
        truth = longdouble(exact[name])
        if value is None or not truth.size:
            continue
        budget = 2 * abs(longdouble(torchs[name]) - truth).max() + ulp(truth, value.dtype)
        if acc == F64:  # there is no wider judge here: 32 roundings of terms of size 1, of which dx is a difference
            budget = budget + 32 * torch.finfo(F64).eps * max(1, abs(truth).max())
        assert (abs(longdouble(value) - truth) <= budget).all(), f"{name}: {abs(longdouble(value) - truth).max()}"


def residual_problem(m, n, dtype, residual_dtype, weight_dtype, device):
    drawn = {"x": ((m, n), dtype), "residual": ((m, n), residual_dtype), "weight": ((n,), weight_dtype)}
    return {name: draw(shape, d, device) if d else None for name, (shape, d) in drawn.items()}


def gated_problem(m, n, dtype, gate_dtype, weight_dtype, device):
    drawn = {"x": ((m, n), dtype), "gate": ((m, n), gate_dtype), "weight": ((n,), weight_dtype)}
    return {name: draw(shape, d, device) if d else None for name, (shape, d) in drawn.items()}


@pytest.mark.parametrize(("m", "n"), [(19, 1), (19, 127), (199, 768), (19, 1000), (7, 4096), (3, 16385), (0, 8)])
@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=name_of)
def test_add_columns(dtype, m, n, device):
    tensors = residual_problem(m, n, dtype, dtype, dtype, device)
    check(lambda x, residual, weight: add_rms_norm(x, residual, (n,), weight, EPS), Spec((n,), EPS), tensors)


@pytest.mark.parametrize(
    ("dtype", "residual_dtype", "weight_dtype"),
    [(BF16, F32, BF16), (BF16, F32, F32), (F32, BF16, F32), (F16, BF16, F32), (F32, F64, F32), (BF16, F32, None)],
    ids=name_of,
)
def test_add_mixed_dtypes(dtype, residual_dtype, weight_dtype, device):
    tensors = residual_problem(19, 256, dtype, residual_dtype, weight_dtype, device)
    check(lambda x, residual, weight: add_rms_norm(x, residual, (256,), weight, EPS), Spec((256,), EPS), tensors)


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize(("m", "n"), [(19, 1), (199, 768), (19, 1000), (3, 16385), (0, 8)])
@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=name_of)
def test_gated_columns(dtype, m, n, norm_before_gate, device):
    spec = Spec((n,), EPS, activation="silu", norm_before_gate=norm_before_gate)
    tensors = gated_problem(m, n, dtype, dtype, dtype, device)
    check(lambda x, gate, weight: rms_norm_gated(x, gate, (n,), weight, EPS, norm_before_gate=norm_before_gate), spec, tensors)


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(activation, norm_before_gate, device):
    spec = Spec((96,), EPS, activation=activation, norm_before_gate=norm_before_gate)
    tensors = gated_problem(19, 96, F32, F32, F32, device)
    knobs = {"activation": activation, "norm_before_gate": norm_before_gate}
    check(lambda x, gate, weight: rms_norm_gated(x, gate, (96,), weight, EPS, **knobs), spec, tensors)


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize(("dtype", "gate_dtype", "weight_dtype"), [(BF16, F32, F32), (F32, BF16, BF16), (F16, F16, None)], ids=name_of)
def test_gated_mixed_dtypes_and_groups(dtype, gate_dtype, weight_dtype, norm_before_gate, device):
    spec = Spec((512,), EPS, 128, activation="silu", norm_before_gate=norm_before_gate)
    tensors = gated_problem(19, 512, dtype, gate_dtype, weight_dtype, device)
    knobs = {"norm_before_gate": norm_before_gate, "group_size": 128}
    check(lambda x, gate, weight: rms_norm_gated(x, gate, (512,), weight, EPS, **knobs), spec, tensors)


@pytest.mark.parametrize("stand_in", [tuning.SM_80, tuning.SM_90], ids=lambda device: device.name)
@pytest.mark.parametrize("n", [200, 4096, 9000, 20000])
def test_configurations_of_gpus(n, stand_in, device, run_as):
    run_as(stand_in)
    tensors = residual_problem(9, n, BF16, F32, F32, device)
    check(lambda x, residual, weight: add_rms_norm(x, residual, (n,), weight, EPS), Spec((n,), EPS), tensors)
    spec = Spec((n,), EPS, activation="silu", norm_before_gate=False)
    tensors = gated_problem(9, n, F32, F32, F32, device)
    check(lambda x, gate, weight: rms_norm_gated(x, gate, (n,), weight, EPS, norm_before_gate=False), spec, tensors)


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
    assert [recorded.kernel for recorded in launches] == ["_rms_norm_fwd_kernel"] * 2


def test_one_gradient_for_input_and_residual_of_one_dtype(device, launches):
    """Both are the same numbers: they are written once."""
    x, r = (draw((9, 64), F32, device).requires_grad_() for _ in range(2))
    add_rms_norm(x, r, (64,))[0].sum().backward()
    (backward,) = (recorded for recorded in launches if recorded.kernel == "_rms_norm_bwd_kernel")
    assert backward.pointers["DX"] is not None and backward.pointers["DRESIDUAL"] is None
    assert torch.equal(x.grad, r.grad) and backward.pointers["DRESIDUAL_OUT"] is None


@pytest.mark.parametrize("needed", [("x",), ("residual",), ("weight",), ("x", "weight"), ("residual", "weight")])
def test_only_what_needs_a_gradient(needed, device):
    tensors = residual_problem(9, 64, BF16, F32, F32, device)
    full = run(lambda x, residual, weight: add_rms_norm(x, residual, (64,), weight), tensors, _cotangents(tensors))
    leaves = {name: t.detach().requires_grad_(name in needed) for name, t in tensors.items()}
    torch.manual_seed(1)
    outputs = add_rms_norm(leaves["x"], leaves["residual"], (64,), leaves["weight"])
    torch.autograd.backward(outputs, list(_cotangents(tensors).values()))
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in needed)
        assert leaf.grad is None or torch.equal(leaf.grad, full[f"d{name}"])


def _cotangents(tensors):
    torch.manual_seed(1)
    x, residual = tensors["x"], tensors["residual"]
    return {"y": draw(x.shape, x.dtype, x.device), "residual_out": draw(x.shape, residual.dtype, x.device)}


def test_slices_of_one_projection_are_read_in_place(device, launches):
    projected = draw((2, 5, 3 * 64), F32, device)
    x, z = projected[..., 64:128], projected[..., 128:]
    before = projected.clone()
    y = rms_norm_gated(x, z, (64,), norm_before_gate=False)
    assert launches[0].pointers["X"].data_ptr() == x.data_ptr() and launches[0].pointers["GATE"].data_ptr() == z.data_ptr()
    assert torch.equal(projected, before)
    torch.testing.assert_close(y, rms_norm_gated(x.contiguous(), z.contiguous(), (64,), norm_before_gate=False), rtol=0, atol=0)


def test_strided_and_expanded_gradients(device):
    x, r = (draw((6, 64), F64, device).requires_grad_() for _ in range(2))
    y, s = add_rms_norm(x, r, (64,))
    dy, ds = draw((64, 6), F64, device).T, torch.ones((), dtype=F64, device=device).expand(6, 64)
    strided = torch.autograd.grad((y, s), (x, r), (dy, ds), retain_graph=True)
    dense = torch.autograd.grad((y, s), (x, r), (dy.contiguous(), ds.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


def test_bit_determinism(device):
    tensors = gated_problem(300, 128, BF16, BF16, BF16, device)
    cotangents = {"y": draw((300, 128), BF16, device)}
    first, second = (run(lambda x, gate, weight: rms_norm_gated(x, gate, (128,), weight), tensors, cotangents) for _ in range(2))
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
        (lambda: rms_norm(X, (8,), group_size=0), ValueError, "group_size must divide the normalized size 8, got 0"),
        (lambda: rms_norm(X, (8,), weight_offset=1.0), ValueError, "weight_offset must be 0 without a weight, got 1.0"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
