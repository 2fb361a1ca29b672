"""Recognition: each semantics is found and told from all others, what is something else is left alone, and nothing is touched."""

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from triton_rmsnorm.patching import recognition
from triton_rmsnorm.patching.probes import HALF_MISMATCHES, agree
from triton_rmsnorm.patching.proof import Proof
from triton_rmsnorm.patching.reads import Reads, reads
from triton_rmsnorm.patching.recognition import recognize
from triton_rmsnorm.patching.semantics import SEMANTICS, Semantics, evaluate, gated


class Norm(nn.Module):
    """A norm of 64 columns; the cases below write their formulas by hand."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.eps = 1e-6


class Rounded(Norm):
    def forward(self, x):
        x_hat = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x_hat.to(x.dtype)


class Plain(Norm):
    def forward(self, hidden):
        x = hidden.to(torch.float32)
        return (self.weight * (x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + self.eps))).to(hidden.dtype)


class PowerAndSum(Norm):
    def forward(self, x):
        x32 = x.float()
        mean = torch.einsum("...i,...i->...", x32, x32)[..., None] / x.shape[-1]
        return (x32 * (mean + self.eps) ** -0.5 * self.weight.float()).type_as(x)


class RoundedIfWeightIsHalf(Norm):
    def forward(self, x):
        x = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x.to(self.weight.dtype) if self.weight.dtype in (torch.float16, torch.bfloat16) else x)


class WithOffset(Norm):
    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class WithOffsetInItsDtype(Norm):
    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1 + self.weight)).type_as(x)


class Weightless(nn.Module):
    def __init__(self, eps=1e-5):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)


class WeightUnused(Weightless):
    """Its buffer has another length than its input, as in Falcon-Mamba."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(48), persistent=False)


class RoundedRstd(Weightless):
    def forward(self, x):
        return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps).to(x.dtype)


class Grouped(Norm):
    def __init__(self, group_size=16):
        super().__init__()
        self.group_size = group_size

    def forward(self, x):
        groups = x.float().unflatten(-1, (-1, self.group_size))
        y = (groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2)
        return (self.weight * y).to(x.dtype)


class NumberOfGroups(Norm):
    def __init__(self):
        super().__init__()
        self.n_groups = 8

    def forward(self, x):
        groups = x.float().unflatten(-1, (self.n_groups, -1))
        y = (groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2)
        return self.weight * y.to(x.dtype)


class Torchs(Norm):
    def forward(self, x):
        return F.rms_norm(x, (64,), self.weight, self.eps)


class GateBefore(Norm):
    def forward(self, x, gate=None):
        h = x.float() if gate is None else x.float() * F.silu(gate.float())
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class GateAfter(Norm):
    def forward(self, x, gate):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * y * torch.sigmoid(gate.float())).to(x.dtype)


class ThreeDimensionsOnly(Norm):
    def forward(self, x):
        batch, length, _ = x.shape
        x_hat = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x_hat.to(x.dtype).view(batch, length, -1)


KNOWN = [
    (Rounded, Semantics(x_hat_rounding="input")),
    (Plain, Semantics()),
    (PowerAndSum, Semantics()),
    (RoundedIfWeightIsHalf, Semantics(x_hat_rounding="half weight")),
    (WithOffset, Semantics(weight_offset=1.0)),
    (WithOffsetInItsDtype, Semantics(weight_offset=1.0, offset_in_weight_dtype=True)),
    (Weightless, Semantics(scaled=False)),
    (WeightUnused, Semantics(scaled=False)),
    (RoundedRstd, Semantics(scaled=False, rstd_rounded=True)),
    (Grouped, Semantics(group_size=16)),
    (NumberOfGroups, Semantics(x_hat_rounding="input", group_size=8)),
    (Torchs, Semantics()),
    (GateBefore, Semantics(x_hat_rounding="input", activation="silu", norm_before_gate=False)),
    (GateAfter, Semantics(activation="sigmoid")),
    (ThreeDimensionsOnly, Semantics(x_hat_rounding="input")),
]


@pytest.mark.parametrize(("cls", "semantics"), KNOWN, ids=lambda value: getattr(value, "__name__", ""))
def test_norms_written_by_hand(cls, semantics):
    norm = recognize(cls()).norm
    assert norm.semantics == semantics
    assert norm.weight == ("weight" if semantics.scaled else None)
    assert norm.eps == "eps"
    assert norm.autocast == {Torchs: "rms_norm", PowerAndSum: "other"}.get(cls, "unaffected")  # a matrix product is cast


class Formula(Norm):
    def __init__(self, semantics):
        super().__init__()
        self.semantics = semantics
        self.columns_of_a_group = semantics.group_size or 64

    def forward(self, x):
        return evaluate(self.semantics, x, self.weight if self.semantics.scaled else None, self.eps)


class GatedFormula(Formula):
    def forward(self, x, gate):
        return evaluate(self.semantics, x, self.weight if self.semantics.scaled else None, self.eps, gate=gate)


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("semantics", SEMANTICS, ids=str)
def test_each_semantics_fits_itself_alone(semantics, group_size):
    semantics = Semantics(**{**vars(semantics), "group_size": group_size})
    verdict = recognize(Formula(semantics))
    assert verdict.norm is not None, verdict.reason
    assert verdict.norm.semantics == semantics


@pytest.mark.parametrize("semantics", [one for some in SEMANTICS[::5] for one in gated(some)], ids=str)
def test_each_gated_semantics_fits_itself_alone(semantics):
    verdict = recognize(GatedFormula(semantics))
    assert verdict.norm is not None, verdict.reason
    assert verdict.norm.semantics == semantics


@pytest.mark.parametrize("scaled", [True, False], ids=["weight", "no_weight"])
def test_semantics_differ_by_far_more_than_is_put_down_to_rounding(scaled):
    """For each pair there is a probe with another dtype, or 25 times as many other elements as HALF_MISMATCHES."""
    some = [semantics for semantics in SEMANTICS if semantics.scaled == scaled]
    proof = Proof(Norm(), Reads(), (1, 1))
    proof.shape, proof.rows = (64,), (8,)
    probes = list(proof._probes("eps"))
    outputs = {one: [proof._expected(one, probe, "eps") for probe in probes] for one in some}
    for one, other in itertools.combinations(some, 2):
        pairs = list(zip(outputs[one], outputs[other], strict=True))
        shares = [1.0 if a.dtype != b.dtype else ((a != b) & ~(a.isnan() & b.isnan())).double().mean().item() for a, b in pairs]
        assert max(shares) > 25 * HALF_MISMATCHES, f"{one} and {other}"
        assert not all(agree(a, b) for a, b in pairs)


# --- what is something else ---


class MeanSubtractedNorm(Norm):
    def forward(self, x):
        centered = x.float() - x.float().mean(-1, keepdim=True)
        return (self.weight * centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class UnbiasedVarianceNorm(Norm):
    def forward(self, x):
        return x * (self.weight * torch.rsqrt(x.var(-1, keepdim=True) + self.eps))


class L2Norm(Norm):
    def forward(self, x):
        x32 = x.float()
        return (self.weight * x32 * torch.rsqrt(x32.pow(2).sum(-1, keepdim=True) + self.eps)).to(x.dtype)


class EpsOutsideNorm(Norm):
    def forward(self, x):
        x32 = x.float()
        return (self.weight * x32 / (x32.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)).to(x.dtype)


class EpsIsABoundNorm(Norm):
    def forward(self, x):
        x32 = x.float()
        return (self.weight * x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True).clamp_min(self.eps))).to(x.dtype)


class EpsIsBoundedNorm(Norm):
    def forward(self, x):
        x32 = x.float()
        return (self.weight * x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + min(self.eps, 1e-2))).to(x.dtype)


class EpsIgnoredNorm(Norm):
    def forward(self, x):
        x32 = x.float()
        return (self.weight * x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class NoEpsNorm(Norm):
    def __init__(self):
        super().__init__()
        del self.eps

    def forward(self, x):
        return (self.weight * x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True))).to(x.dtype)


class NormalizedNorm(NoEpsNorm):
    def forward(self, x):
        return (F.normalize(x.float(), dim=-1) * 8 * self.weight).to(x.dtype)


class InInputDtypeNorm(Norm):
    def forward(self, x):
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class RstdOnlyNorm(Weightless):
    def forward(self, x):
        return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps).to(x.dtype)


class DetachedMeanNorm(Norm):
    def forward(self, x):
        with torch.no_grad():
            rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x.float() * rstd).to(x.dtype)


class FrozenWeightNorm(Norm):
    def forward(self, x):
        x_hat = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.detach() * x_hat.to(x.dtype)


class OverRowsNorm(Norm):
    def forward(self, x):
        return (self.weight * x.float() * torch.rsqrt(x.float().pow(2).mean() + self.eps)).to(x.dtype)


class PartOfTheColumnsNorm(Norm):
    def forward(self, x):
        return (self.weight * x.float() * torch.rsqrt(x.float()[..., :63].pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class DroppedNorm(Rounded):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


class NanReplacedNorm(Rounded):
    def forward(self, x):
        return super().forward(x).nan_to_num()


class InPlaceNorm(Norm):
    def forward(self, x):
        x.mul_(torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps).to(x.dtype))
        return self.weight * x


class CountingNorm(Rounded):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class RunningMeanNorm(Rounded):
    def __init__(self):
        super().__init__()
        del self.weight
        self.register_buffer("weight", torch.ones(64))

    def forward(self, x):
        self.weight.lerp_(x.detach().float().reshape(-1, 64).mean(0), 0.1)
        return super().forward(x)


class TwoWeights(Rounded):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(64))


class AdaRMSNorm(nn.Module):
    """A name and nothing else, as in Voxtral."""

    def __init__(self):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x):
        return self.linear2(self.linear1(x))


class Fails(Norm):
    def forward(self, x):
        raise NotImplementedError("a kernel for another device")


class RMSNormThatFails(Fails):
    pass


OTHERS = [
    (MeanSubtractedNorm, None, False),  # a LayerNorm
    (UnbiasedVarianceNorm, "unbiased", False),
    (L2Norm, "L2 norm", False),
    (EpsOutsideNorm, "outside the square root", False),
    (EpsIsABoundNorm, "clamps the mean square by its epsilon", False),
    (EpsIsBoundedNorm, "no RMS norm", False),
    (EpsIgnoredNorm, "does not depend on its eps", False),
    (NoEpsNorm, "no epsilon", False),
    (NormalizedNorm, "no epsilon", False),
    (InInputDtypeNorm, "rounds in no known order", True),
    (RstdOnlyNorm, "reciprocal", False),
    (DetachedMeanNorm, "gradient", True),
    (FrozenWeightNorm, "gradient", True),
    (OverRowsNorm, "no RMS norm", False),
    (PartOfTheColumnsNorm, "no RMS norm", False),
    (DroppedNorm, "draws random numbers", False),
    (NanReplacedNorm, "no RMS norm", False),
    (InPlaceNorm, "changes its input", False),
    (CountingNorm, "changes the module", False),
    (RunningMeanNorm, "changes the module", False),
    (AdaRMSNorm, "more parameters and buffers than a weight: linear1, linear2", False),
    (Fails, None, False),
    (RMSNormThatFails, "fails on a copy on the CPU: NotImplementedError: a kernel for another device", True),
]


@pytest.mark.parametrize(("cls", "reason", "resembles"), OTHERS, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_something_else_is_left_alone(cls, reason, resembles):
    verdict = recognize(cls())
    if reason is None:
        assert verdict is None
    else:
        assert verdict.norm is None
        assert reason in verdict.reason
        assert verdict.resembles == resembles


@pytest.mark.parametrize(
    "module",
    [nn.Linear(64, 64), nn.LayerNorm(64), nn.LayerNorm(64, bias=False), nn.BatchNorm1d(64), nn.SiLU(), nn.Dropout(1e-3), TwoWeights()],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_not_even_looked_at(module):
    assert recognize(module) is None


def test_what_cannot_be_told_is_left_alone():
    """Where input and weight have one dtype, rounding to the one or the other is the same."""

    class RefusesMixedNorm(Rounded):
        def forward(self, x):
            assert x.dtype == self.weight.dtype
            return super().forward(x)

    verdict = recognize(RefusesMixedNorm())
    assert verdict.norm is None
    assert verdict.resembles
    assert "more than one semantics fits: w · x_hat.to(x); w · x_hat.to(w if half)" in verdict.reason


# --- where things are ---


def test_other_names_of_weight_and_epsilon():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(64))
            self.variance_epsilon, self.dropout, self.size = 1e-5, 0.1, 64

        def forward(self, t):
            return (t.float() * torch.rsqrt(t.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.scale).to(t.dtype)

    norm = recognize(Other()).norm
    assert (norm.weight, norm.eps) == ("scale", "variance_epsilon")


@pytest.mark.parametrize("eps", [1e-12, 1e-8, 1e-6, 1.5e-5, 1e-3, torch.finfo(torch.float32).eps])
def test_epsilon_in_the_code(eps):
    class Constant(NoEpsNorm):
        def forward(self, x):
            return (self.weight * x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    assert recognize(Constant()).norm.eps == eps


def test_epsilon_in_a_configuration():
    class Configured(NoEpsNorm):
        def __init__(self, config):
            super().__init__()
            self.config = config

        def forward(self, x):
            return (self.weight * x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.config.eps)).to(x.dtype)

    assert recognize(Configured(SimpleNamespace(eps=1e-6))).norm.eps == "config.eps"


def test_epsilon_of_the_class():
    class OfTheClass(NoEpsNorm):
        eps = 1e-5

        def forward(self, x):
            return (self.weight * x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    assert recognize(OfTheClass()).norm.eps == "eps"


@pytest.mark.parametrize("shape", [64, (4, 16), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_torchs_module(shape, affine, eps):
    norm = recognize(nn.RMSNorm(shape, eps, affine)).norm
    assert norm.semantics == Semantics(scaled=affine)
    assert norm.dims == (1 if isinstance(shape, int) else len(shape))
    assert norm.autocast == "rms_norm"


@pytest.mark.parametrize("columns", [2, 3, 127, 4096])
def test_any_number_of_columns(columns):
    module = Rounded()
    module.weight = nn.Parameter(torch.ones(columns))
    assert recognize(module).norm.semantics == Semantics(x_hat_rounding="input")


# --- what is remembered ---


def test_verdicts_are_remembered_by_class_and_attributes(monkeypatch):
    proofs = []
    prove = recognition._prove
    monkeypatch.setattr(recognition, "_prove", lambda module, found: proofs.append(module) or prove(module, found))

    class Remembered(Grouped):
        pass

    memory = {}
    first = recognize(Remembered(16), memory)
    assert recognize(Remembered(16), memory) is first
    assert len(proofs) == 1
    assert recognize(Remembered(32), memory).norm.semantics.group_size == 32
    assert len(proofs) == 2
    Remembered.forward = Rounded.forward
    assert recognize(Remembered(16), memory).norm.semantics == Semantics(x_hat_rounding="input")
    assert len(proofs) == 3


def test_attributes_that_have_no_hash():
    """As the configurations of transformers, which are dataclasses; they are told apart by identity."""

    @dataclass
    class Config:
        eps: float

    class Configured(NoEpsNorm):
        def __init__(self, config):
            super().__init__()
            self.config = config

        def forward(self, x):
            return (self.weight * x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.config.eps)).to(x.dtype)

    config, memory = Config(1e-6), {}
    first = recognize(Configured(config), memory)
    assert first.norm.eps == "config.eps"
    assert recognize(Configured(config), memory) is first
    assert recognize(Configured(Config(1e-6)), memory) is not first


# --- what is not touched ---


def prove(module):
    return recognition._prove(module, reads(module))


def test_the_module_is_only_looked_at():
    module = Rounded()
    nn.init.normal_(module.weight)
    module.weight.grad = torch.randn(64)
    called = []
    module.register_forward_hook(lambda *_: called.append("forward"))
    module.register_forward_pre_hook(lambda *_: called.append("pre"))
    module.register_full_backward_hook(lambda *_: called.append("backward"))
    before = {name: id(value) for name, value in vars(module).items()}
    weight, version, copies = module.weight, module.weight._version, (module.weight.detach().clone(), module.weight.grad.clone())
    state = torch.get_rng_state()
    recognition._prove(module, reads(module))
    assert torch.equal(torch.get_rng_state(), state)
    assert not called
    assert {name: id(value) for name, value in vars(module).items()} == before
    assert module.weight is weight
    assert module.weight._version == version
    assert torch.equal(module.weight, copies[0])
    assert torch.equal(module.weight.grad, copies[1])
    assert torch.is_grad_enabled()


def test_random_numbers_are_given_back():
    state = torch.get_rng_state()
    assert prove(DroppedNorm()).norm is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.device("meta"), lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "meta", "autocast"],
)
def test_in_any_mode(mode):
    with mode():
        verdict = prove(Rounded())
        grad = torch.is_grad_enabled()
    assert verdict.norm.semantics == Semantics(x_hat_rounding="input")
    assert grad == (mode not in (torch.no_grad, torch.inference_mode))


def test_under_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        verdict = prove(Rounded())
    assert verdict.norm.semantics == Semantics(x_hat_rounding="input")


def test_on_the_meta_device():
    assert prove(Rounded().to("meta")).norm.semantics == Semantics(x_hat_rounding="input")


def test_default_dtype_does_not_matter():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert prove(Plain()).norm.semantics == Semantics()
    finally:
        torch.set_default_dtype(torch.float32)
