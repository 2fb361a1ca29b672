"""Who is timed: the table of providers. A provider is a name and a function that makes a norm for a problem, or says why it has none.

    norm = PROVIDERS["Liger"].norm(problem)
    y = norm(x, weight, residual, gate)  # or (y, x + residual); residual and gate are None where the problem has none

Each is given its best: the fastest of its entry points that computes what is asked for, in the rounding that torch.nn.RMSNorm has.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import triton_rmsnorm
from bench.problem import EPS, Problem
from triton_rmsnorm import reference

Norm = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor | tuple[Tensor, Tensor]]


class UnsupportedError(Exception):
    """The provider has nothing for a problem; says why."""


def ours(problem: Problem) -> Norm:
    shape, knobs = (problem.columns,), problem.knobs
    return {
        "plain": lambda x, weight, residual, gate: triton_rmsnorm.rms_norm(x, shape, weight, EPS, **knobs),
        "residual": lambda x, weight, residual, gate: triton_rmsnorm.add_rms_norm(x, residual, shape, weight, EPS, **knobs),
        "gate": lambda x, weight, residual, gate: triton_rmsnorm.rms_norm_gated(x, gate, shape, weight, EPS, **knobs),
    }[problem.kind]


def eager(problem: Problem) -> Norm:
    def norm(x, weight, residual, gate):
        if residual is not None:
            residual_out = residual + x
            return F.rms_norm(residual_out, (problem.n,), weight, EPS).to(x.dtype), residual_out
        y = F.rms_norm(x, (problem.n,), weight, EPS)
        return y if gate is None else y * F.silu(gate)

    return norm


def compiled(problem: Problem) -> Norm:
    """The formulas in plain torch, which it fuses; of eager's plain norm it makes the same."""

    def norm(x, weight, residual, gate):
        y, _, residual_out = reference.forward(reference.Inputs(x, weight, residual, gate), problem.spec)
        return y if residual_out is None else (y, residual_out)

    torch._dynamo.reset()  # each problem is compiled for itself, and there is a limit to how often one function is
    torch._functorch.config.donated_buffer = False  # the backward is repeated
    return torch.compile(norm, dynamic=False)


def liger(problem: Problem) -> Norm:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    if problem.kind == "gate":
        raise UnsupportedError("has no gated norm")
    if problem.kind == "residual":
        if problem.own_dresidual:
            raise UnsupportedError("keeps the sum in the dtype of x")
        return lambda x, weight, residual, gate: LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "gemma")
    # "gemma" is all in fp32, as torch; dx goes over the gradient that arrives, its default, without which it fills dx with zeros first
    return lambda x, weight, residual, gate: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "gemma", True)


def quack(problem: Problem) -> Norm:
    from quack.rmsnorm import rmsnorm

    if problem.kind == "gate":
        raise UnsupportedError("has no gated norm")
    if problem.kind == "residual":
        return lambda x, weight, residual, gate: rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True)
    return lambda x, weight, residual, gate: rmsnorm(x, weight, eps=EPS)


def flash_linear_attention(problem: Problem) -> Norm:
    from fla.modules.norm.fused_norm_gate import rms_norm_gated
    from fla.modules.norm.layernorm import rms_norm

    return {
        "plain": lambda x, weight, residual, gate: rms_norm(x, weight, None, eps=EPS),
        "residual": lambda x, weight, residual, gate: rms_norm(x, weight, None, residual, EPS, prenorm=True),
        "gate": lambda x, weight, residual, gate: rms_norm_gated(x, gate, weight, None, activation="swish", eps=EPS),
    }[problem.kind]


class Provider(NamedTuple):
    norm: Callable[[Problem], Norm]
    module: str | None = None  # that has to be importable


OURS, EAGER, CEILING = "ours", "torch eager", "copy"
PROVIDERS = {
    OURS: Provider(ours),
    EAGER: Provider(eager),
    "torch.compile": Provider(compiled),
    "Liger": Provider(liger, "liger_kernel.ops.rms_norm"),
    "QuACK": Provider(quack, "quack.rmsnorm"),
    "fla": Provider(flash_linear_attention, "fla.modules.norm.layernorm"),
}


def absent() -> dict[str, str]:
    """The providers that cannot be imported, and why."""
    reasons = {}
    for name, provider in PROVIDERS.items():
        try:
            if provider.module:
                importlib.import_module(provider.module)
        except Exception as error:  # whatever it is that a foreign package trips over on this machine, it is absent
            reasons[name] = f"{type(error).__name__}: {error}"
    return reasons


def path(call: Callable[[], object]) -> str:
    """Which way torch took in a call, from what it ran: its fused operator, the QuACK in its vendor folder, or a composite."""
    with torch.profiler.profile() as profile:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = profile.events()
    kernels = [event.name.lower() for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    if any("quack" in name or "cutlass" in name for name in kernels):
        way = "vendored QuACK"
    elif any("rsqrt" in event.name.lower() for event in events):  # an operator, or the backward of one, that only the composite has
        way = "composite"
    else:
        way = "fused op"
    return f"{way} ({len(kernels)} kernels)" if kernels else way
