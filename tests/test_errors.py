"""Bad input: the type of error that torch raises, with a message that names what was expected and what came."""

import inspect
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from triton_rmsnorm import AddRMSNorm, RMSNormGated, add_rms_norm, functional, rms_norm, rms_norm_gated
from triton_rmsnorm.runtime import launch

X, W = torch.ones(4, 6), torch.ones(6)
FP8, C64 = torch.float8_e4m3fn, torch.complex64
REAL = "must be float16, bfloat16, float32 or float64"

# Arguments, and what the message says.
BAD = {
    "no_normalized_shape": ((X, ()), "normalized_shape must have at least one dimension, got ()"),
    "too_few_dims": ((W, (4, 6)), "input must have at least 2 dimensions to match normalized_shape (4, 6), got 1"),
    "shape": ((X, (5,)), "input must have shape (*, 5), got (4, 6)"),
    "negative_shape": ((X, (-1,)), "input must have shape (*, -1), got (4, 6)"),
    "weight_size": ((X, (6,), torch.ones(5)), "weight must have shape (6,) to match normalized_shape, got (5,)"),
    "weight_broadcast": ((X, (6,), torch.ones(1)), "weight must have shape (6,) to match normalized_shape, got (1,)"),
    "weight_device": ((X, (6,), W.to("meta")), "weight must be on the device of input, cpu, got meta"),
    "input_device": ((X.to("meta"), (6,), W), "weight must be on the device of input, meta, got cpu"),
    "int": ((X.int(), (6,)), f"input {REAL}, got torch.int32"),
    "bool": ((X.bool(), (6,)), f"input {REAL}, got torch.bool"),
    "fp8": ((X.to(FP8), (6,)), f"input {REAL}, got {FP8}"),
    "int_of_wrong_shape": ((X.int(), (5,)), "input must have shape (*, 5), got (4, 6)"),
    "int_with_wrong_weight": ((X.int(), (6,), torch.ones(5)), "weight must have shape (6,) to match normalized_shape, got (5,)"),
    "input_is_array": ((X.numpy(), (6,)), "input must be a Tensor, got ndarray"),
    "normalized_shape_is_int": ((X, 6), "normalized_shape must be a tuple of ints, got 6"),
    "normalized_shape_is_none": ((X, None), "normalized_shape must be a tuple of ints, got None"),
    "normalized_shape_is_tensor": ((X, torch.tensor([6])), "normalized_shape must be a tuple of ints, got tensor([6])"),
    "normalized_shape_of_floats": ((X, (6.0,)), "normalized_shape must be a tuple of ints, got (6.0,)"),
    "normalized_shape_of_float_tensors": ((X, (torch.tensor(6.0),)), "normalized_shape must be a tuple of ints, got (tensor(6.),)"),
    "normalized_shape_of_bools": ((X[:, :1], (True,)), "normalized_shape must be a tuple of ints, got (True,)"),
    "weight_is_array": ((X, (6,), W.numpy()), "weight must be a Tensor or None, got ndarray"),
    "eps_is_string": ((X, (6,), W, "1e-5"), "eps must be a float or None, got str"),
    "eps_is_vector": ((X, (6,), W, torch.tensor([1e-5])), "eps must be a float or None, got Tensor"),
    "eps_requires_grad": ((X, (6,), W, torch.tensor(1e-5, requires_grad=True)), "eps must be a float or None, got Tensor"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_as_torch(arguments, message):
    with pytest.raises(Exception) as theirs:
        F.rms_norm(*arguments)
    with pytest.raises(theirs.type, match=f"^{re.escape(message)}(;|$)"):  # a phrase of torch's message may follow
        rms_norm(*arguments)


# What torch has not, or does otherwise: it multiplies by weights of some other dtypes.
OURS = {
    "int_weight": (lambda: rms_norm(X, (6,), W.int()), NotImplementedError, f"weight {REAL}, got torch.int32"),
    "fp8_weight": (lambda: rms_norm(X, (6,), W.to(FP8)), NotImplementedError, f"weight {REAL}, got {FP8}"),
    "complex_weight": (lambda: rms_norm(X, (6,), W.to(C64)), NotImplementedError, f"weight {REAL}, got {C64}"),
    "group_of_none": (lambda: rms_norm(X, (6,), group_size=0), ValueError, "group_size must divide the normalized size 6, got 0"),
    "groups_unequal": (lambda: rms_norm_gated(X, X, (6,), group_size=4), ValueError, "group_size must divide the normalized size 6, got 4"),
    "offset_of_no_weight": (lambda: rms_norm(X, (6,), weight_offset=1.0), ValueError, "weight_offset must be 0 without a weight, got 1.0"),
    "residual_shape": (lambda: add_rms_norm(X, X[:1], (6,)), RuntimeError, "residual must have the shape of input, (4, 6), got (1, 6)"),
    "residual_meta": (lambda: add_rms_norm(X, X.to("meta"), (6,)), RuntimeError, "residual must be on the device of input, cpu, got meta"),
    "int_residual": (lambda: add_rms_norm(X, X.int(), (6,)), NotImplementedError, f"residual {REAL}, got torch.int32"),
    "group_of_float": (lambda: rms_norm(X, (6,), group_size=3.0), TypeError, "group_size must be an int or None, got 3.0"),
    "offset_is_none": (lambda: rms_norm(X, (6,), W, weight_offset=None), TypeError, "weight_offset must be a float, got NoneType"),
    "x_hat_dtype": (lambda: rms_norm(X, (6,), x_hat_dtype=torch.int8), NotImplementedError, f"x_hat_dtype {REAL}, got torch.int8"),
    "rstd_dtype": (lambda: rms_norm(X, (6,), rstd_dtype="float16"), TypeError, "rstd_dtype must be a torch.dtype or None, got str"),
    "no_residual": (lambda: add_rms_norm(X, None, (6,)), TypeError, "residual must be a Tensor, got NoneType"),
    "complex_input": (lambda: add_rms_norm(X.to(C64), X, (6,)), NotImplementedError, f"input {REAL}, got {C64}"),
    "gate_shape": (lambda: rms_norm_gated(X, X[..., :4], (6,)), RuntimeError, "gate must have the shape of input, (4, 6), got (4, 4)"),
    "activation": (
        lambda: rms_norm_gated(X, X, (6,), activation="swish"),
        ValueError,
        "activation must be one of silu, sigmoid, gelu, gelu_tanh, relu, got 'swish'",
    ),
    "order_is_string": (
        lambda: rms_norm_gated(X, X, (6,), norm_before_gate="False"),
        TypeError,
        "norm_before_gate must be a bool, got 'False'",
    ),
    "group_of_module": (lambda: AddRMSNorm(6, group_size=4), ValueError, "group_size must divide the normalized size 6, got 4"),
    "offset_of_module": (
        lambda: RMSNormGated(6, elementwise_affine=False, weight_offset=1.0),
        ValueError,
        "weight_offset must be 0 without a weight, got 1.0",
    ),
    "unknown_option": (lambda: AddRMSNorm(6, groupsize=2), TypeError, "add_rms_norm() got an unexpected keyword argument 'groupsize'"),
    "option_of_another": (
        lambda: AddRMSNorm(6, activation="silu"),
        TypeError,
        "add_rms_norm() got an unexpected keyword argument 'activation'",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), OURS.values(), ids=OURS)
def test_beyond_torch(call, error, message):
    """Also where a mode sees the call first, such as that of torch.set_default_device."""
    for context in (nullcontext(), torch.device("cpu")):
        with context, pytest.raises(error, match=f"^{re.escape(message)}$"):
            call()


# What torch accepts, too.
GOOD = {
    "list": (X, [6]),
    "size": (X, X.shape[-1:]),
    "numpy_int": (X, (np.int64(6),)),
    "int_tensor": (X, (torch.tensor(6),)),
    "eps_int": (X, (6,), W, 1),
    "eps_bool": (X, (6,), W, True),
    "eps_scalar_tensor": (X, (6,), W, torch.tensor(1e-5)),
    "eps_numpy": (X, (6,), W, np.float32(1e-5)),
    "eps_numpy_int": (X, (6,), W, np.int64(1)),
    "complex": (X.to(C64), (6,), W.to(C64), 1e-5),
    "meta": (X.to("meta"), (6,), W.to("meta")),
}


@pytest.fixture
def nothing_known() -> None:
    """Equal values of other types were not seen before."""
    functional._cached_fit.cache_clear()
    launch.forget()


@pytest.mark.parametrize("arguments", GOOD.values(), ids=GOOD)
def test_accepted_as_by_torch(arguments, nothing_known):
    ours, theirs = rms_norm(*arguments), F.rms_norm(*arguments)
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    assert ours.is_meta or torch.allclose(ours, theirs)


@pytest.mark.parametrize("number", [1, True, np.float32(1), np.int64(1), torch.tensor(1.0), torch.tensor(1)], ids=repr)
def test_numbers_of_other_types(number, device, nothing_known):
    x, w = (tensor.to(device, copy=True).requires_grad_() for tensor in (X, W))
    y = rms_norm(x, (6,), w, weight_offset=number, group_size=np.int64(2))
    y.sum().backward()
    expected = rms_norm(X.to(device), (6,), W.to(device), weight_offset=1.0, group_size=2)
    assert torch.equal(y, expected)


def test_signature():
    ours, theirs = (inspect.signature(function) for function in (rms_norm, F.rms_norm))
    positional = [p for p in ours.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in theirs.parameters.values()]
    with pytest.raises(TypeError):
        rms_norm(X, (6,), bias=W)


def test_failed_launch_is_not_hidden(device, monkeypatch):
    """There is no second way when a kernel cannot be launched."""

    def fail(self, *pointers):
        raise RuntimeError("no such kernel")

    x = X.to(device, copy=True).requires_grad_()
    y = rms_norm(x, (6,))
    monkeypatch.setattr(launch.Launch, "__call__", fail)
    with pytest.raises(RuntimeError, match="no such kernel"):
        y.sum().backward()
    for context in (nullcontext(), torch.no_grad(), torch.inference_mode()):
        with context, pytest.raises(RuntimeError, match="no such kernel"):
            rms_norm(x + 1, (6,))
