"""Trains the same model with the norms of every provider in turn: time of a step, tokens a second, peak memory, and losses side by side.

`python -m bench.train --preset 1b` runs it, or --compare with any preset. A provider that is not installed is listed as absent. One that
runs out of memory is listed as such, with what would fit; the others go on.
"""

import gc
import json
import math
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from bench import records, training
from bench.training import Job
from triton_rmsnorm import patch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = "HF eager"
FAILED = ("failed", "out of memory")


def eager(model: nn.Module) -> nn.Module:
    return model


def ours(model: nn.Module) -> nn.Module:
    return _patched(model)


def ours_fused(model: nn.Module) -> nn.Module:
    return _patched(model, fuse_residual=True)


def _patched(model: nn.Module, fuse_residual: bool = False) -> nn.Module:
    report = patch(model, strict=True, fuse_residual=fuse_residual)
    if not report.replaced or (fuse_residual and not report.fused):
        raise RuntimeError(f"patch found nothing to replace:\n{report}")
    return model


def liger(model: nn.Module) -> nn.Module:
    """Only its norms: what is compared is norms."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    others = dict.fromkeys(("rope", "swiglu", "cross_entropy", "fused_linear_cross_entropy"), False)
    with mock.patch.object(modeling_llama, "LlamaRMSNorm", modeling_llama.LlamaRMSNorm):  # it replaces the class for all models to come
        apply_liger_kernel_to_llama(rms_norm=True, **others, model=model)
    return model


class AbsentError(Exception):
    """What a provider needs is not here; says what."""


def compiled(model: nn.Module) -> nn.Module:
    on_cpu = next(model.parameters()).device.type == "cpu"
    if not torch._dynamo.is_dynamo_supported() or (on_cpu and not (shutil.which("g++") or shutil.which("clang++"))):
        raise AbsentError("torch.compile does not run here" if not on_cpu else "torch.compile needs a C++ compiler on a CPU")
    torch._dynamo.reset()
    return torch.compile(model, dynamic=False)


def compiled_ours(model: nn.Module) -> nn.Module:
    return compiled(_patched(model))


# A provider is a name and a function that equips a model, which is the same for all at first.
PROVIDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    BASELINE: eager,
    "ours": ours,
    "ours, residual fused": ours_fused,
    "Liger (its norms)": liger,
    "torch.compile": compiled,
    "torch.compile, ours": compiled_ours,
}


@dataclass
class Run:
    """What came of one provider."""

    status: str  # "measured", "absent", "out of memory" or "failed"
    note: str = ""
    losses: list[float] | None = None  # nats a byte, one a step
    seconds: tuple[float, float, float] | None = None  # a step, after the warm-up: quartiles, with the median in the middle
    peak_bytes: int | None = None  # of GPU memory; None without a GPU; where memory ran out, what there was of it until then


def compare(job: Job, text: Tensor, save: Callable[[dict[str, Run]], None] = lambda runs: None) -> dict[str, Run]:
    """One run for each provider, in turn; `save` is called with what there is after each."""
    runs: dict[str, Run] = {}
    for name in PROVIDERS:
        runs[name] = _run(name, job, text)
        save(runs)
    return runs


def _run(name: str, job: Job, text: Tensor) -> Run:
    on_gpu = job.device.type == "cuda"
    gc.collect()  # of the model before
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(job.device)

    def peak() -> int | None:
        return torch.cuda.max_memory_allocated(job.device) if on_gpu else None

    try:
        losses, seconds = _train(name, job, text)
    except (ImportError, AbsentError) as error:
        return Run("absent", _first_line(error))
    except torch.OutOfMemoryError as error:
        return Run("out of memory", _first_line(error).split(". ")[0], peak_bytes=peak())
    except Exception as error:  # whatever foreign code trips over is its result
        return Run("failed", f"{type(error).__name__}: {_first_line(error)}")
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return Run("measured", losses=losses, seconds=(quartiles[0], quartiles[1], quartiles[2]), peak_bytes=peak())


def _train(name: str, job: Job, text: Tensor) -> tuple[list[float], list[float]]:
    """Losses of all steps, and seconds of those after the warm-up."""
    model = PROVIDERS[name](training.new_model(job))
    losses, seconds = [], []
    interval = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(total=job.steps, desc=f"{name:>22}", unit="step", mininterval=interval, dynamic_ncols=True) as bar:
        start = time.perf_counter()
        for loss in training.train(model, training.batches(job, text), job.learning_rate):
            seconds.append(time.perf_counter() - start)
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            start = time.perf_counter()
    return losses, seconds[warm_up(job) :]


def warm_up(job: Job) -> int:
    """Steps that are not timed: kernels are compiled in them."""
    return min(5, job.steps // 2)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:300]


def difference(run: Run, baseline: Run) -> float | None:
    """The largest of the losses from the baseline's; NaN if any loss is; None where one of them has none."""
    if run.losses is None or baseline.losses is None:
        return None
    return (torch.tensor(run.losses, dtype=torch.float64) - torch.tensor(baseline.losses, dtype=torch.float64)).abs().max().item()


def what_fits(job: Job, fixed: int, capacity: int, needed: int) -> str:
    """Advice where memory ran out, in words.

    Args:
        fixed: bytes of parameters, gradients and AdamW's two moments, which no smaller batch changes.
        capacity: bytes of the GPU.
        needed: bytes of a step that got through, or that were taken when the memory ran out: then it is a lower bound.
    """
    gib = 2**30
    if fixed > 0.95 * capacity:
        return f"Parameters, gradients and AdamW's moments take {fixed / gib:.1f} of {capacity / gib:.1f} GiB: only a smaller model fits."
    activations = max(needed - fixed, 0)
    batch, seq_len = job.batch, job.seq_len
    while (batch > 1 or seq_len > 64) and (tokens := batch * seq_len):
        estimate = fixed + activations * tokens / job.tokens
        if tokens < job.tokens and estimate < 0.9 * capacity:
            break
        batch, seq_len = (batch // 2, seq_len) if batch > 1 else (batch, seq_len // 2)
    estimate = fixed + activations * batch * seq_len / job.tokens
    advice = f"--batch {batch} --seq-len {seq_len} should fit: about {estimate / gib:.1f} of {capacity / gib:.1f} GiB"
    advice += f", of which {fixed / gib:.1f} for parameters, gradients and AdamW's moments."
    return advice if job.checkpointing else f"{advice} Or --checkpointing, which keeps a layer's input instead of all its activations."


def advice(job: Job, runs: dict[str, Run]) -> str:
    """What would fit, where a run was out of memory; else nothing."""
    if not any(run.status == "out of memory" for run in runs.values()):
        return ""
    halved = f"--batch {job.batch // 2}" if job.batch > 1 else f"--seq-len {job.seq_len // 2}"
    if job.device.type != "cuda":
        return f"Out of memory: try {halved}, or --checkpointing."
    fixed = 4 * training.count_parameters(job) * job.dtype.itemsize
    needed = max(run.peak_bytes or 0 for run in runs.values())
    return what_fits(job, fixed, torch.cuda.get_device_properties(job.device).total_memory, needed)


def result(job: Job, source: str, runs: dict[str, Run]) -> dict:
    """Everything that was measured, and on what."""
    baseline = runs.get(BASELINE, Run("absent"))
    return {
        "metadata": records.metadata() | {"transformers": version("transformers"), "device": training.device_name(job.device)},
        "interpreted": training.interpreted(),
        "model": {"type": "llama", "parameters": training.count_parameters(job), **job.sizes},
        "text": source,
        **{name: getattr(job, name) for name in ("seq_len", "batch", "steps", "learning_rate", "checkpointing")},
        "warm_up": warm_up(job),
        "dtype": str(job.dtype).removeprefix("torch."),
        "seed": training.SEED,
        "runs": {
            name: {
                "status": run.status,
                "note": run.note,
                "step_seconds": run.seconds and dict(zip(("low", "median", "high"), run.seconds, strict=True)),
                "tokens_per_second": run.seconds and job.tokens / run.seconds[1],
                "peak_bytes": run.peak_bytes,
                "largest_difference": difference(run, baseline),
                "losses": run.losses,
            }
            for name, run in runs.items()
        },
        "advice": advice(job, runs),
    }


def table(result: dict) -> Table:
    slow = " (kernels interpreted: no measure of speed)" if result["interpreted"] else ""
    columns = ("step ms (quartiles)", "tokens/s", "peak GiB", "last loss", f"largest difference from {BASELINE}")
    found = Table("", *columns, caption=_about(result) + slow)
    for name, run in result["runs"].items():
        if run["status"] != "measured":
            found.add_row(name, f"{run['status']}: {run['note']}")
            continue
        low, median, high = (1e3 * run["step_seconds"][key] for key in ("low", "median", "high"))
        peak = "n/a" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 2**30:.2f}"
        apart = "n/a" if run["largest_difference"] is None else f"{run['largest_difference']:.1e}"
        times = f"{median:.1f} ({low:.1f} to {high:.1f})"
        found.add_row(name, times, f"{run['tokens_per_second']:,.0f}", peak, f"{run['losses'][-1]:.4f}", apart)
    return found


def _about(result: dict) -> str:
    about, model = result["metadata"], result["model"]
    versions = ", ".join(f"{key} {about[key]}" for key in ("torch", "triton", "transformers"))
    size = (
        f"Llama of {model['parameters'] / 1e6:.3g} M parameters, {result['dtype']}, {result['batch']} x {result['seq_len']} tokens a step"
    )
    return f"{size}; {about['device']}, {versions}, {about['date'][:10]}"


def draw(result: dict) -> "Figure":
    """Bars of a provider each: time of a step, peak memory, and how far the losses are from the baseline's."""
    from matplotlib.figure import Figure

    runs = result["runs"]
    measured = [(i, run) for i, run in enumerate(runs.values()) if run["status"] == "measured"]
    figure = Figure(figsize=(10.5, 1.6 + 0.45 * len(runs)), layout="constrained")
    times, memory, losses = figure.subplots(1, 3, sharey=True, width_ratios=(4, 3, 3))
    panels = {  # what a run has, and how it is written
        times: (lambda run: 1e3 * run["step_seconds"]["median"], "{:.1f}", "time of a step (ms)\nmedian, and quartiles"),
        memory: (lambda run: run["peak_bytes"] and run["peak_bytes"] / 2**30, "{:.2f}", "peak memory (GiB)"),
        losses: (lambda run: run["largest_difference"], "{:.1g}", f"largest difference of losses\nfrom {BASELINE} (nats a byte)"),
    }
    for axes, (value_of, written, label) in panels.items():
        found = [(i, value) for i, run in measured if (value := value_of(run)) is not None and math.isfinite(value)]
        top = max((value for _, value in found), default=0) or 1
        for i, value in found:
            axes.barh(i, value, 0.62, color="#D55E00" if "ours" in list(runs)[i] else "#56B4E9")  # Okabe and Ito's
            axes.text(value + 0.07 * top, i, written.format(value), va="center", fontsize=9)
        if not found:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="0.4")
        if axes is losses or not found:
            axes.set_xticks([])
        axes.set(xlabel=label, xlim=(0, 1.4 * top))
        axes.grid(axis="x", alpha=0.3)
    for i, run in measured:
        low, median, high = (1e3 * run["step_seconds"][key] for key in ("low", "median", "high"))
        times.errorbar(median, i, xerr=[[median - low], [high - median]], color="black", capsize=3, linewidth=1)
    for i, run in enumerate(runs.values()):
        if run["status"] != "measured":
            times.text(0.02, i, run["status"], transform=times.get_yaxis_transform(), va="center", fontsize=9, style="italic")
    times.set_yticks(range(len(runs)), runs)
    times.set_ylim(len(runs) - 0.5, -0.5)
    slow = "\nkernels interpreted on a CPU: times are no measure of speed" if result["interpreted"] else ""
    figure.suptitle(_about(result) + slow, fontsize=9)
    return figure


def main(job: Job, text: Tensor, source: str, folder: Path) -> int:
    """Compares, prints, and writes a file of figures and a picture; 1 if ours failed, ran out of memory or lost its way to NaN."""
    started = result(job, source, {})
    slug = re.sub(r"[^a-z0-9]+", "-", started["metadata"]["device"].lower()).strip("-")
    stamp = re.sub(r"[^0-9]", "", started["metadata"]["date"])[:14]
    path = folder / f"train-{slug}-{stamp}.json"
    folder.mkdir(parents=True, exist_ok=True)

    def save(runs: dict[str, Run]) -> None:
        path.write_text(json.dumps(result(job, source, runs) | {"metadata": started["metadata"]}, indent=1) + "\n")

    runs = compare(job, text, save)
    found = json.loads(path.read_text())
    Console(width=160).print(table(found))
    if found["advice"]:
        print(found["advice"])
    draw(found).savefig(path.with_suffix(".png"), dpi=130)
    print(f"Figures and picture: {path}, {path.with_suffix('.png')}")
    mine = [run for name, run in runs.items() if "ours" in name]
    return int(any(run.status in FAILED or not all(map(math.isfinite, run.losses or [])) for run in mine))
