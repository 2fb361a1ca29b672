"""Models of one type, as they are and patched: outputs and gradients of both beside the same weights in fp64."""

import copy
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from bench.census.tiny_models import tiny_batch, tiny_model
from bench.train.providers import control
from triton_rmsnorm import patch, unpatch
from triton_rmsnorm.patching.recognition import agree
from triton_rmsnorm.patching.replacement import is_replacement
from triton_rmsnorm.patching.report import in_words

# When the first does not decide. Sums that cancel have a long tail of rounding errors: of qwen3_next's gradients in fp32, on one CPU, 8
# controls stray 1.3 times as far as the original, 20 of them 4 times.
CONTROLS = 32
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def census(model_type: str) -> dict:
    """What became of the model of one type.

    The result has the stage that was reached and why the next one was not, a row for each class of norms or layers, and in each dtype the
    largest distance and the tensor that has it.

    Stages: build, patch, run, compared; or "no norms" where nothing was replaced.
    """
    result: dict = {"type": model_type, "stage": "build"}
    with reported(result):
        model = tiny_model(model_type).eval()
        result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        result["stage"] = "patch"
        report = patch(model, fuse_residual=True)
        result["rows"] = [row_of(row) for row in report.rows if not _is_layer(row)]
        result["layers"] = [row_of(row) for row in report.rows if _is_layer(row)]
        after = model.state_dict()
        fused = copy.deepcopy(model) if report.fused else None
        unpatch(model)
        if list(before) != list(after) or not all(_same_bits(before[name], after[name]) for name in before):
            raise DiffersError("the state_dict has changed")
        if not report.replaced:
            result["stage"] = "no norms"
            return result
        result["stage"] = "run"
        batch = tiny_batch(model)
        for name, dtype in DTYPES.items():
            cast = copy.deepcopy(model).to(DEVICE, dtype)
            result[name] = compare(cast, batch, dtype, copy.deepcopy(fused).to(DEVICE, dtype) if fused else None)
        result["stage"] = "compared"
    return result


def compare(model: nn.Module, batch: dict, dtype: torch.dtype, fused: nn.Module | None = None) -> tuple[float, str, bool]:
    """The largest distance as a fraction of its budget, the tensor that has it, and whether the model runs in fp64 to compare with.

    `model` is not modified.

    Args:
        fused: the model once more, patched in another way, which is held to the same budget.
    """
    # Copies, because some models keep states from one run to the next.
    original = _run(copy.deepcopy(model), batch, dtype)
    others: list[str] = []
    replaced = copy.deepcopy(model)
    try:
        patch(replaced)
        with _watched(replaced, others):
            ours = [_run(replaced, batch, dtype)]
        if fused is not None:
            ours.append(_run(fused, batch, dtype))
    except Exception as error:
        raise DiffersError(f"patched, it raises {in_words(error)}") from error
    if others:
        raise DiffersError(f"another output of {', '.join(others)}")
    for one in ours:
        if one.keys() != original.keys():
            raise DiffersError(f"outputs or gradients came or went: {sorted(one.keys() ^ original.keys())}")
    try:
        truth, in_fp64 = _run(copy.deepcopy(model).double(), batch, torch.float64), True
    except (RuntimeError, TypeError, ValueError):
        truth, in_fp64 = original, False
    noise = {name: (original[name] - truth[name]).norm() for name in truth.keys() & original.keys()}
    for seed in range(CONTROLS):
        moved = _run(control(copy.deepcopy(model), seed=seed), batch, dtype)
        for name in noise.keys() & moved.keys():
            noise[name] = torch.maximum(noise[name], (moved[name] - truth[name]).norm())
        parts = {}
        for name, distance in noise.items():
            budget = 2 * distance + torch.finfo(dtype).eps * truth[name].norm()
            for one in ours:
                part = ((one[name] - truth[name]).norm() / budget).item() if budget > 0 else float(not one[name].equal(truth[name]))
                parts[name] = part if not part <= parts.get(name, 0.0) else parts.get(name, 0.0)  # nan stays
        worst = max(parts, key=parts.get)
        if parts[worst] <= 1:
            break
    return parts[worst], worst, in_fp64


@contextmanager
def _watched(model: nn.Module, others: list[str]) -> Iterator[None]:
    """Collects in `others` the norms whose output is not what the original's forward makes of the same input."""

    def watch(name: str, module: nn.Module):
        original = type(module).__bases__[0].forward

        @torch.no_grad()
        def hook(module, args, kwargs, output):
            if not agree(output, original(module, *args, **kwargs)):
                others.append(name)

        return module.register_forward_hook(hook, with_kwargs=True)

    hooks = [watch(name, module) for name, module in model.named_modules() if is_replacement(type(module))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _run(model: nn.Module, batch: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients by name, in fp64, of a loss that weights all outputs at random."""
    torch.manual_seed(0)
    model.zero_grad()
    batch = {name: _cast(value, dtype) for name, value in batch.items()}
    outputs = dict(_tensors("output", model(**batch)))
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(output.shape, generator=generator).to(output.device) for name, output in outputs.items()}
    sum((output.double() * weights[name]).sum() for name, output in outputs.items() if output.requires_grad).backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().to(torch.float64, copy=True) for name, tensor in (outputs | gradients).items()}


def _tensors(name: str, value) -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in a model's output, except caches."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield name, value
    elif isinstance(value, dict):
        for key, one in value.items():
            if "past_key" not in str(key) and "cache" not in str(key):
                yield from _tensors(f"{name}.{key}", one)
    elif isinstance(value, (list, tuple)):
        for index, one in enumerate(value):
            yield from _tensors(f"{name}.{index}", one)


def _cast(value, dtype: torch.dtype):
    if not isinstance(value, Tensor):
        return value
    return value.to(DEVICE, dtype if value.is_floating_point() else value.dtype)


def row_of(row) -> dict:
    """A row of a report, without what is empty."""
    fields = {name: getattr(row, name) for name in ("semantics", "count", "reason", "resembles")} | {"status": row.status.value}
    return {"name": row.cls.__name__, **{name: value for name, value in fields.items() if value}}


def _is_layer(row) -> bool:
    return row.semantics.startswith("residual add")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


class DiffersError(Exception):
    """A patched model does not compute what it did."""


@contextmanager
def reported(result: dict) -> Iterator[None]:
    """Notes what is raised instead of raising it."""
    try:
        yield
    except Exception as error:
        result["error"] = in_words(error)
        if isinstance(error, DiffersError) or result["stage"] in ("patch", "compare"):
            result["differs"] = traceback.format_exc()[-2000:]
