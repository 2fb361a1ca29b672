"""Recognition: each semantics is found and told from all others, what is something else is left alone, and nothing is touched."""

import itertools
from collections import deque
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from norms import norm_of, rstd
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from triton_rmsnorm.patching import recognition
from triton_rmsnorm.patching.probes import HALF_MISMATCHES, agree
from triton_rmsnorm.patching.proof import Proof
from triton_rmsnorm.patching.reads import Reads
from triton_rmsnorm.patching.recognition import recognize
from triton_rmsnorm.patching.semantics import SEMANTICS, Semantics, evaluate, gated


def rounded(self, x):
    return self.weight * (x.float() * rstd(x, self.eps)).to(x.dtype)


def sum_by_einsum(self, x):
    x32 = x.float()
    mean = torch.einsum("...i,...i->...", x32, x32)[..., None] / x.shape[-1]
    return (x32 * (mean + self.eps) ** -0.5 * self.weight.float()).type_as(x)


def rounded_if_weight_is_half(self, x):
    x = x * rstd(x, self.eps)
    return self.weight * (x.to(self.weight.dtype) if self.weight.dtype in (torch.float16, torch.bfloat16) else x)


def divided(self, x):
    return self.weight * (x.float() / torch.sqrt(mean_square(x.float()) + self.eps)).to(x.dtype)


def plain(self, x):
    return (self.weight * (x.float() / torch.sqrt(x.float().square().mean(dim=-1, keepdim=True) + self.eps))).to(x.dtype)


def of_128_columns(self, x):
    return (self.weight * x.float() * torch.rsqrt(x.float().square().sum(-1, keepdim=True) / 128 + self.eps)).to(x.dtype)


def weightless(self, x):
    return (x.float() * rstd(x, self.eps)).type_as(x)


def grouped(self, x):
    groups = x.float().unflatten(-1, (-1, self.group_size))
    return (self.weight * (groups * rstd(groups, self.eps)).flatten(-2)).to(x.dtype)


def number_of_groups(self, x):
    groups = x.float().unflatten(-1, (self.n_groups, -1))
    return self.weight * (groups * rstd(groups, self.eps)).flatten(-2).to(x.dtype)


def gate_before(self, x, gate=None):
    h = x.float() if gate is None else x.float() * F.silu(gate.float())
    return self.weight * (h * rstd(h, self.eps)).to(x.dtype)


def gate_after(self, x, gate):
    return (self.weight.float() * x.float() * rstd(x, self.eps) * torch.sigmoid(gate.float())).to(x.dtype)


def three_dimensions_only(self, x):
    batch, length, _ = x.shape
    return rounded(self, x).view(batch, length, -1)


ROUNDED = Semantics(x_hat_rounding="input")
KNOWN = {
    "rounded": (norm_of(rounded), ROUNDED),
    "plain": (norm_of(plain), Semantics()),
    "sum by einsum": (norm_of(sum_by_einsum), Semantics()),
    "torch's": (norm_of(lambda self, x: F.rms_norm(x, (64,), self.weight, self.eps)), Semantics()),
    "rounded if the weight is half": (norm_of(rounded_if_weight_is_half), Semantics(x_hat_rounding="half weight")),
    "offset": (
        norm_of(lambda self, x: (x.float() * rstd(x, self.eps) * (1.0 + self.weight.float())).to(x.dtype)),
        Semantics(weight_offset=1.0),
    ),
    "offset in its dtype": (
        norm_of(lambda self, x: (x.float() * rstd(x, self.eps) * (1 + self.weight)).type_as(x)),
        Semantics(weight_offset=1.0, offset_in_weight_dtype=True),
    ),
    "weightless": (norm_of(weightless, weight=None), Semantics(scaled=False)),
    "weight unused": (norm_of(weightless, weight=nn.Buffer(torch.ones(48), persistent=False)), Semantics(scaled=False)),
    "rounded rstd": (norm_of(lambda self, x: x * rstd(x, self.eps).to(x.dtype), weight=None), Semantics(scaled=False, rstd_rounded=True)),
    "groups": (norm_of(grouped, group_size=16), Semantics(group_size=16)),
    "number of groups": (norm_of(number_of_groups, n_groups=8), replace(ROUNDED, group_size=8)),
    "gate before": (norm_of(gate_before), replace(ROUNDED, activation="silu", norm_before_gate=False)),
    "gate after": (norm_of(gate_after), Semantics(activation="sigmoid")),
    "128 columns only": (norm_of(of_128_columns, weight=nn.Parameter(torch.ones(128))), Semantics()),
    "three dimensions only": (norm_of(three_dimensions_only), ROUNDED),
}


@pytest.mark.parametrize("name", KNOWN)
def test_norms_written_by_hand(name):
    module, semantics = KNOWN[name]
    norm = recognize(module).norm
    assert norm.semantics == semantics
    assert norm.weight == ("weight" if semantics.scaled else None)
    assert norm.eps == "eps"
    assert norm.autocast == {"torch's": "rms_norm", "sum by einsum": "other"}.get(name, "unaffected")  # a matrix product is cast


def formula(self, x):
    return evaluate(self.semantics, x, self.weight if self.semantics.scaled else None, self.eps)


def gated_formula(self, x, gate):
    return evaluate(self.semantics, x, self.weight if self.semantics.scaled else None, self.eps, gate=gate)


IN_GROUPS = [replace(semantics, group_size=8) for semantics in SEMANTICS]
GATED = [one for some in SEMANTICS[::5] for one in gated(some)]


@pytest.mark.parametrize("semantics", [*SEMANTICS, *IN_GROUPS, *GATED], ids=str)
def test_each_semantics_fits_itself_alone(semantics):
    forward = gated_formula if semantics.activation else formula
    verdict = recognize(norm_of(forward, semantics=semantics, columns_of_a_group=semantics.group_size or 64))
    assert verdict.norm is not None, verdict.reason
    assert verdict.norm.semantics == semantics


@pytest.mark.parametrize("scaled", [True, False], ids=["weight", "no_weight"])
def test_semantics_differ_by_far_more_than_is_put_down_to_rounding(scaled):
    """For each pair there is a probe with another dtype, or 25 times as many other elements as HALF_MISMATCHES."""
    some = [semantics for semantics in SEMANTICS if semantics.scaled == scaled]
    proof = Proof(norm_of(rounded), Reads(), (1, 1))
    proof.shape, proof.rows = (64,), (8,)
    probes = list(proof._probes("eps"))
    outputs = {one: [proof._expected(one, probe, "eps") for probe in probes] for one in some}
    for one, other in itertools.combinations(some, 2):
        pairs = list(zip(outputs[one], outputs[other], strict=True))
        shares = [1.0 if a.dtype != b.dtype else ((a != b) & ~(a.isnan() & b.isnan())).double().mean().item() for a, b in pairs]
        assert max(shares) > 25 * HALF_MISMATCHES, f"{one} and {other}"
        assert not all(agree(a, b, probe.coarsest) for (a, b), probe in zip(pairs, probes, strict=True))


# --- what is something else ---


def scaled_by(factor):
    """A forward that multiplies x and the weight by this function of self and x in float32."""
    return lambda self, x: (self.weight * x.float() * factor(self, x.float())).to(x.dtype)


def mean_square(x):
    return x.pow(2).mean(-1, keepdim=True)


def without_mean(self, x):
    centered = x.float() - x.float().mean(-1, keepdim=True)
    return (self.weight * centered * rstd(centered, self.eps)).to(x.dtype)


def mean_detached(self, x):
    with torch.no_grad():
        factor = rstd(x, self.eps)
    return self.weight * (x.float() * factor).to(x.dtype)


def in_place(self, x):
    x.mul_(rstd(x, self.eps).to(x.dtype))
    return self.weight * x


def counting(self, x):
    self.calls += 1
    return rounded(self, x)


def remembering(self, x):
    self.history.append(x)
    return rounded(self, x)


def rounded_as_the_gate(self, x, gate):
    return (self.weight * (x.float() * rstd(x, self.eps)).to(gate.dtype) * torch.sigmoid(gate.float())).to(x.dtype)


def running_mean(self, x):
    self.weight.lerp_(x.detach().float().reshape(-1, 64).mean(0), 0.1)
    return rounded(self, x)


def in_the_dtype_of_x(self, x):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def plain_in_fp16(self, x):
    return plain(self, x) if x.dtype == self.weight.dtype == torch.float16 else rounded(self, x)


def plain_in_bf16_training(self, x):
    return plain(self, x) if x.dtype == torch.bfloat16 and self.training else rounded(self, x)


def detached_in_training(self, x):
    return mean_detached(self, x) if self.training else rounded(self, x)


def limited_x_hat(self, x):
    return self.weight * (x.float() * rstd(x, self.eps)).clamp(max=getattr(self, "limit", 6)).to(x.dtype)


def limited_in_fp16(self, x):
    return rounded(self, x).clamp(-65000, 65000) if x.dtype == torch.float16 else rounded(self, x)


def fails(self, x):
    raise NotImplementedError("a kernel for another device")


def exits(self, x):
    raise SystemExit("a kernel for another device")


ONES = torch.ones(64)


# Norms, reasons (None: not in the report), and whether they resemble an RMS norm.
OTHERS = {
    "a LayerNorm": (norm_of(without_mean), None, False),
    "unbiased": (norm_of(lambda self, x: x * (self.weight * torch.rsqrt(x.var(-1, keepdim=True) + self.eps))), "unbiased", False),
    "L2": (norm_of(scaled_by(lambda self, x: torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + self.eps))), "L2 norm", False),
    "eps outside": (norm_of(scaled_by(lambda self, x: 1 / (mean_square(x).sqrt() + self.eps))), "outside the square root", False),
    "eps clamps the mean square": (
        norm_of(scaled_by(lambda self, x: torch.rsqrt(mean_square(x).clamp_min(self.eps)))),
        "clamps the mean square by its epsilon",
        False,
    ),
    "eps clamps the root": (
        norm_of(scaled_by(lambda self, x: 1 / mean_square(x).sqrt().clamp_min(self.eps))),
        "clamps the root mean square by its epsilon",
        False,
    ),
    "eps has a limit": (norm_of(scaled_by(lambda self, x: torch.rsqrt(mean_square(x) + min(self.eps, 1e-2)))), "no RMS norm", False),
    "eps ignored": (norm_of(scaled_by(lambda self, x: torch.rsqrt(mean_square(x) + 1e-6))), "does not depend on its eps", False),
    "no eps": (norm_of(scaled_by(lambda self, x: torch.rsqrt(mean_square(x))), eps=None), "no epsilon", False),
    "F.normalize": (
        norm_of(lambda self, x: (F.normalize(x.float(), dim=-1) * 8 * self.weight).to(x.dtype), eps=None),
        "no epsilon",
        False,
    ),
    "in the dtype of x": (norm_of(in_the_dtype_of_x), "rounds in no known order", True),
    "other in fp16": (norm_of(plain_in_fp16), "for torch.float16 input and torch.float16 weight it rounds in no known order", True),
    "other in bf16 training": (norm_of(plain_in_bf16_training), "for torch.bfloat16 input and torch.bfloat16 weight it rounds", True),
    "rstd": (norm_of(lambda self, x: rstd(x, self.eps).to(x.dtype), weight=None), "reciprocal", False),
    "mean detached": (norm_of(mean_detached), "gradient", True),
    "weight detached": (norm_of(lambda self, x: self.weight.detach() * (x.float() * rstd(x, self.eps)).to(x.dtype)), "gradient", True),
    "mean detached in training": (norm_of(detached_in_training), "gradient", True),
    "limited in fp16": (norm_of(limited_in_fp16), "for torch.float16 input and torch.float16 weight", True),
    "limited weight": (norm_of(lambda self, x: self.weight.clamp(-9, 9) * rounded(self, x) / self.weight), "no RMS norm", False),
    "limited x_hat": (norm_of(limited_x_hat), "no RMS norm", False),
    "limited x_hat of many columns": (norm_of(limited_x_hat, weight=nn.Parameter(torch.ones(1024)), limit=20), "no RMS norm", False),
    "limited epsilon": (norm_of(scaled_by(lambda self, x: torch.rsqrt(mean_square(x) + max(self.eps, 1e-8)))), "no RMS norm", False),
    "tensor in a list": (
        norm_of(lambda self, x: rounded(self, x) * self.hidden[0], hidden=[ONES]),
        "reads a tensor that is neither",
        False,
    ),
    "global tensor": (norm_of(lambda self, x: rounded(self, x) * ONES), "reads a tensor that is neither", False),
    "checks its input": (
        norm_of(lambda self, x: x if (x == 0).all() else rounded(self, x)),
        "depends on the values of its input",
        False,
    ),
    "over rows": (norm_of(scaled_by(lambda self, x: torch.rsqrt(x.pow(2).mean() + self.eps))), "no RMS norm", False),
    "part of the columns": (norm_of(scaled_by(lambda self, x: rstd(x[..., :63], self.eps))), "no RMS norm", False),
    "other without gradients": (
        norm_of(lambda self, x: rounded(self, x) if torch.is_grad_enabled() else x),
        "does not depend on its eps",
        False,
    ),
    "other of slices": (norm_of(lambda self, x: rounded(self, x) if x.is_contiguous() else x), "no RMS norm", False),
    "dropout": (norm_of(lambda self, x: F.dropout(rounded(self, x), 0.1, self.training)), "draws random numbers", False),
    "NaN replaced": (norm_of(lambda self, x: rounded(self, x).nan_to_num()), "no RMS norm", False),
    "in place": (norm_of(in_place), "changes its input", False),
    "counting": (norm_of(counting, calls=0), "changes the module", False),
    "history": (norm_of(remembering, history=deque(maxlen=3)), "changes the module", False),
    "long history of others": (
        norm_of(
            lambda self, x: remembering(self.other, x) * self.weight / self.other.weight,
            other=SimpleNamespace(history=[0] * 99, weight=1, eps=1e-6),
        ),
        "changes what it reads",
        False,
    ),
    "gate's dtype": (norm_of(rounded_as_the_gate), "rounds in no known order", True),
    "running mean": (norm_of(running_mean, weight=nn.Buffer(torch.ones(64))), "changes the module", False),
    "parts": (  # a name and nothing else, as in Voxtral
        norm_of(fails, "AdaRMSNorm", weight=None, eps=None, linear1=nn.Linear(8, 4), linear2=nn.Linear(4, 8)),
        "more parameters and buffers than a weight: linear1, linear2",
        False,
    ),
    "fails": (norm_of(fails), None, False),
    "exits": (norm_of(exits, "SomeRMSNorm"), "fails on a copy on the CPU: SystemExit: a kernel for another", True),
    "fails by name": (norm_of(fails, "SomeRMSNorm"), "fails on a copy on the CPU: NotImplementedError: a kernel for another", True),
}


@pytest.mark.parametrize(("module", "reason", "resembles"), OTHERS.values(), ids=OTHERS)
def test_what_is_something_else_is_left_alone(module, reason, resembles):
    verdict = recognize(module)
    if reason is None:
        assert verdict is None
    else:
        assert verdict.norm is None
        assert reason in verdict.reason
        assert verdict.resembles == resembles


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(64, 64),
        nn.LayerNorm(64),
        nn.LayerNorm(64, bias=False),
        nn.BatchNorm1d(64),
        nn.SiLU(),
        nn.Dropout(1e-3),
        norm_of(rounded, bias=nn.Parameter(torch.zeros(64))),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_not_even_looked_at(module):
    assert recognize(module) is None


def test_what_cannot_be_told_is_left_alone():
    """Where input and weight have one dtype, rounding to the one or the other is the same."""

    def refuses_mixed(self, x):
        assert x.dtype == self.weight.dtype
        return rounded(self, x)

    verdict = recognize(norm_of(refuses_mixed))
    assert verdict.norm is None
    assert verdict.resembles
    assert "more than one semantics fits: w · x_hat.to(x); w · x_hat.to(w if half)" in verdict.reason


# --- where things are ---


def other_names(self, t):
    return (t.float() * torch.rsqrt(mean_square(t.float()) + self.variance_epsilon) * self.scale).to(t.dtype)


def configured(self, x):
    return (self.weight * x.float() * torch.rsqrt(mean_square(x.float()) + self.config.eps)).to(x.dtype)


def by_another_function(self, x):
    return rounded(self, x)


def with_constant(eps):
    return norm_of(scaled_by(lambda self, x: torch.rsqrt(mean_square(x) + eps)), eps=None)


def of_the_class(eps):
    norm = norm_of(rounded, eps=None)
    type(norm).eps = eps
    return norm


SCALE = nn.Parameter(torch.ones(64))
PLACES = [
    (norm_of(other_names, weight=None, eps=None, scale=SCALE, variance_epsilon=1e-5, dropout=0.1, size=64), "scale", "variance_epsilon"),
    (norm_of(configured, eps=None, config=SimpleNamespace(eps=1e-6)), "weight", "config.eps"),
    (of_the_class(1e-5), "weight", "eps"),
    (norm_of(by_another_function, "Scale"), "weight", "eps"),
    (norm_of(by_another_function, "Scale", eps=nn.Buffer(torch.tensor(1e-6))), "weight", "eps"),
    *((with_constant(eps), "weight", eps) for eps in (1e-12, 1e-8, 1e-6, 1.5e-5, 1e-3, torch.finfo(torch.float32).eps)),
]


@pytest.mark.parametrize(("module", "weight", "eps"), PLACES, ids=lambda value: str(value) if isinstance(value, (str, float)) else "")
def test_where_weight_and_epsilon_are(module, weight, eps):
    norm = recognize(module).norm
    assert (norm.weight, norm.eps) == (weight, eps)


@pytest.mark.parametrize("shape", [64, (4, 16), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_torchs_module(shape, affine, eps):
    norm = recognize(nn.RMSNorm(shape, eps, affine)).norm
    assert norm.semantics == Semantics(scaled=affine)
    assert norm.dims == (1 if isinstance(shape, int) else len(shape))
    assert norm.autocast == "rms_norm"


@pytest.mark.parametrize("columns", [2, 3, *range(16, 65, 4), 127, 4096])
def test_any_number_of_columns(columns):
    """Also where another way to compute x_hat tips a few elements of it over a rounding boundary, before a weight in float32."""
    for forward in (rounded, divided):
        assert recognize(norm_of(forward, weight=nn.Parameter(torch.ones(columns)))).norm.semantics == ROUNDED


# --- what is remembered ---


def test_verdicts_are_remembered_by_class_and_attributes(monkeypatch):
    proofs = []
    prove = recognition._prove
    monkeypatch.setattr(recognition, "_prove", lambda module, found: proofs.append(module) or prove(module, found))
    module, memory = norm_of(grouped, group_size=16), {}
    first = recognize(module, memory)
    assert recognize(module, memory) is first
    assert len(proofs) == 1
    module.group_size = 32
    assert recognize(module, memory).norm.semantics.group_size == 32
    assert len(proofs) == 2
    type(module).forward = rounded
    assert recognize(module, memory).norm.semantics == ROUNDED
    assert len(proofs) == 3


def test_attributes_that_have_no_hash():
    """As the configurations of transformers, which are dataclasses; they are told apart by identity."""

    @dataclass
    class Config:
        eps: float

    module, memory = norm_of(configured, eps=None, config=Config(1e-6)), {}
    first = recognize(module, memory)
    assert first.norm.eps == "config.eps"
    assert recognize(module, memory) is first
    module.config = Config(1e-6)
    assert recognize(module, memory) is not first


# --- the modes of the caller ---


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "fake": FakeTensorMode,
}


@pytest.mark.parametrize("mode", MODES)
def test_in_any_mode(mode):
    with MODES[mode]():
        verdict = recognize(norm_of(plain))
        assert torch.is_grad_enabled() == (mode not in ("no_grad", "inference_mode"))
    assert verdict.norm.semantics == Semantics()
