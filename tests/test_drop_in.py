"""In place of torch.nn.RMSNorm: the same module from outside, also where no kernel can run."""

import copy
import inspect
import pickle

import pytest
import torch
from processes import compiled
from torch.nn import functional as F
from variants import trained

from triton_rmsnorm import RMSNorm, reference, rms_norm
from triton_rmsnorm.reference import Inputs, Spec
from triton_rmsnorm.runtime import launch

ARGUMENTS = {
    "int": ((64,), {}),
    "list": (([4, 16],), {}),
    "eps": ((64, 1e-5), {}),
    "plain": ((64,), {"elementwise_affine": False}),
    "dtype": ((64,), {"dtype": torch.bfloat16}),
    "device": ((64,), {"device": "meta"}),
}


@pytest.mark.parametrize(("args", "kwargs"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_module_looks_the_same(args, kwargs):
    ours, theirs = RMSNorm(*args, **kwargs), torch.nn.RMSNorm(*args, **kwargs)
    assert isinstance(ours, torch.nn.RMSNorm) and type(ours).__name__ == "RMSNorm"
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    assert (ours.normalized_shape, ours.eps, ours.elementwise_affine) == (theirs.normalized_shape, theirs.eps, theirs.elementwise_affine)
    assert ours.__constants__ == theirs.__constants__
    assert ours._parameters.keys() == theirs._parameters.keys()
    for (name, our), (their_name, their) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == their_name
        assert (our.shape, our.dtype, our.device) == (their.shape, their.dtype, their.device)
        assert our.is_meta or torch.equal(our, their)


def test_constructor():
    assert inspect.signature(RMSNorm) == inspect.signature(torch.nn.RMSNorm)
    assert inspect.signature(RMSNorm.forward) == inspect.signature(torch.nn.RMSNorm.forward)


def test_state_moves_between_them(device):
    theirs = torch.nn.RMSNorm(64, device=device)
    torch.nn.init.normal_(theirs.weight)
    ours = RMSNorm(64, device=device)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(9, 64, device=device)
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(module(x), theirs(x))
    ours.reset_parameters()
    assert torch.equal(ours.weight, torch.ones_like(ours.weight))


def run_on_the_cpu() -> None:
    """Without TRITON_INTERPRET, CPU tensors are left to torch's own operator, bit for bit, and nothing is launched."""
    assert not launch.INTERPRETED
    with launch.recorded() as launches:
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            x, weight = torch.randn(3, 5, 96, dtype=dtype), torch.randn(96, dtype=dtype)
            for eps in (None, 1e-5):
                ours = trained(lambda x, weight, eps=eps: rms_norm(x, (96,), weight, eps), (x, weight))
                theirs = trained(lambda x, weight, eps=eps: F.rms_norm(x, (96,), weight, eps), (x, weight))
                assert all(torch.equal(our, their) and our.dtype == their.dtype for our, their in zip(ours, theirs, strict=True))
            grouped = rms_norm(x, (96,), weight, 1e-6, group_size=32, weight_offset=1.0)
            spec = Spec((96,), 1e-6, group_size=32, weight_offset=1.0)
            assert torch.equal(grouped, reference.forward(Inputs(x, weight), spec).y)
            assert torch.equal(RMSNorm(96, dtype=dtype)(x), torch.nn.RMSNorm(96, dtype=dtype)(x))
    assert not launches


@pytest.mark.slow
def test_cpu_without_interpreter():
    compiled(run_on_the_cpu)
