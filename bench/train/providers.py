"""Who is compared in training. A provider is a name and a function that equips a model, which is the same for all of them at first."""

import shutil
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import nn
from tqdm import tqdm

from bench.train.job import SEED


class AbsentError(Exception):
    """What a provider needs is not available here; says what."""


def control(model: nn.Module, dtype: torch.dtype | None = None, seed: int = SEED) -> nn.Module:
    """Moves every element of one-dimensional parameters, such as gammas, to a neighbouring number, up or down at random.

    Args:
        dtype: of the numbers; None for each parameter's own.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                rounded = weight.cpu().to(dtype or weight.dtype)
                towards = torch.where(torch.randn(weight.shape, generator=generator) > 0, torch.inf, -torch.inf)
                weight.copy_(torch.nextafter(rounded, towards.to(rounded)))
    return model


def ours(model: nn.Module, fuse_residual: bool = False, recompute: bool = False) -> nn.Module:
    from triton_rmsnorm import patch

    report = patch(model, fuse_residual=fuse_residual, recompute=recompute)
    if not report.replaced or (fuse_residual and not report.fused):
        raise RuntimeError(f"patch found nothing to replace:\n{report}")
    tqdm.write(f"{report}\n")
    return model


def liger(model: nn.Module) -> nn.Module:
    """Only its norms, because norms are what is compared."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    others = dict.fromkeys(("rope", "swiglu", "cross_entropy", "fused_linear_cross_entropy"), False)
    with mock.patch.object(modeling_llama, "LlamaRMSNorm", modeling_llama.LlamaRMSNorm):  # it replaces the class for all later models
        apply_liger_kernel_to_llama(rms_norm=True, **others, model=model)
    return model


def compiled(model: nn.Module) -> nn.Module:
    on_cpu = next(model.parameters()).device.type == "cpu"
    if not torch._dynamo.is_dynamo_supported() or (on_cpu and not (shutil.which("g++") or shutil.which("clang++"))):
        raise AbsentError("torch.compile does not run here" if not on_cpu else "torch.compile needs a C++ compiler on a CPU")
    torch._dynamo.reset()
    return torch.compile(model, dynamic=False)


BASELINE, CONTROL, RECOMPUTED = "huggingface", "control", "ours, recomputed"
PROVIDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    BASELINE: lambda model: model,
    CONTROL: control,
    "ours": ours,
    "ours, residual fused": partial(ours, fuse_residual=True),
    RECOMPUTED: partial(ours, recompute=True),
    "Liger (its norms)": liger,
    "torch.compile": compiled,
    "torch.compile, ours": lambda model: compiled(ours(model)),
}
QUICK = (BASELINE, CONTROL, "ours")  # those that are compared unless more are asked for
