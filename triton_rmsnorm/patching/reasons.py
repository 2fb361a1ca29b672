"""Why something is not proved, in words that name the cause."""

import math

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from triton_rmsnorm.patching.inspection import is_epsilon, own_tensors, sounds_like_rms, squeezed
from triton_rmsnorm.patching.probes import Probe, Subject
from triton_rmsnorm.patching.report import LeftAloneError
from triton_rmsnorm.patching.semantics import Semantics

BEFORE_WRAPPING = "patch the model before it is wrapped, on every rank"


def check_tensors(module: nn.Module) -> None:
    """Whether a module's tensors are what a norm has.

    Raises:
        LeftAloneError: they are not.
    """
    sounds = sounds_like_rms(type(module))
    for name, tensor in own_tensors(module).items():
        if is_lazy(tensor):
            raise LeftAloneError(f"its {name} is not initialized yet", sounds, ran=False)
        if tensor.numel() == 0:
            raise LeftAloneError(f"its {name} is empty, as where ZeRO-3 or FSDP has partitioned it: {BEFORE_WRAPPING}", True, ran=False)
        if name in vars(module):
            flat = f"its {name} is a tensor, but neither parameter nor buffer, as where FSDP has flattened it: {BEFORE_WRAPPING}"
            raise LeftAloneError(flat, sounds)
        if not tensor.is_floating_point():
            raise LeftAloneError(f"its {name} is {tensor.dtype}", sounds)
        if is_epsilon(name, tensor) and name in module._parameters:
            raise LeftAloneError(f"its {name} is a parameter, for which it would need a gradient", sounds)


def fails(subject: Subject, error: BaseException | None) -> LeftAloneError:
    """The forward of a subject fails."""
    message = str(error).split("\n")[0]
    reason = f"its forward fails on a copy on the CPU: {type(error).__name__}: {message}"
    return LeftAloneError(reason, resembles=sounds_like_rms(subject.cls), ran=False)


def other_dimension(subject: Subject) -> LeftAloneError | None:
    """It normalizes dimension 1 of a larger input, if it does."""
    if subject.weight_shape is None or subject.gated:
        return None
    columns = math.prod(subject.weight_shape)
    for rest in ((5,), (3, 5), (2, 3, 5)):
        probe = subject.probe(subject.randn(2, columns, *rest))
        actual = subject.run(probe)
        if isinstance(actual, Tensor) and actual.shape == probe.x.shape and probe.weight is not None:
            weight = probe.weight.reshape(columns, *(1,) * len(rest))
            expected = probe.x * torch.rsqrt(probe.x.square().mean(1, keepdim=True)) * weight
            if torch.allclose(actual, expected, rtol=0.1, atol=0.01):
                return LeftAloneError("it normalizes dimension 1, not the last")
    return None


def none_fits(probe: Probe, actual: Tensor, candidates: list[Semantics], eps: float, shape: tuple[int, ...]) -> LeftAloneError:
    """What it is instead, if it is a known other thing.

    Args:
        probe, actual: a run and its output.
        candidates: the semantics that fitted until then.
        eps: its epsilon in this run.
        shape: what it normalizes.
    """
    if not probe.in_float32:
        dtypes = f"{probe.x.dtype} input" + (f" and {probe.weight.dtype} weight" if probe.weight is not None else "")
        return LeftAloneError(f"in float32 it computes {candidates[0]}, but for {dtypes} it rounds in no known order", resembles=True)
    x = probe.x
    over = tuple(range(-len(shape), 0))
    mean_square = x.square().mean(over, keepdim=True)
    centered = x - x.mean(over, keepdim=True)
    formulas = {
        "subtracts the mean": centered * torch.rsqrt(centered.square().mean(over, keepdim=True) + eps),
        "divides by the unbiased standard deviation": x * torch.rsqrt(x.var(over, keepdim=True) + eps),
        "divides by the L2 norm": x * torch.rsqrt(x.square().sum(over, keepdim=True) + eps),
        "adds its epsilon outside the square root": x / (mean_square.sqrt() + eps),
        "clamps the mean square by its epsilon": x * torch.rsqrt(mean_square.clamp_min(eps)),
        "clamps the root mean square by its epsilon": x / mean_square.sqrt().clamp_min(eps),
        "returns the reciprocal root mean square": torch.rsqrt(mean_square + eps),
    }
    factors: tuple = (1.0,)
    if probe.weight is not None and squeezed(tuple(probe.weight.shape)) == squeezed(shape):
        factors = (1.0, probe.weight, 1.0 + probe.weight)
    for reason, formula in formulas.items():
        products = [formula * factor for factor in factors]
        if any(actual.shape == y.shape and torch.allclose(actual, y.to(actual.dtype), rtol=1e-4, atol=1e-5) for y in products):
            return LeftAloneError(f"it {reason}", other=reason == "subtracts the mean")
    return LeftAloneError("it computes no RMS norm of its input")
