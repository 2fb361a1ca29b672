"""What is left of a comparison: its figures as JSON, a table to print, a picture."""

import math

import torch

from bench import records, style
from bench.train.job import SEED, TEXT, Job, count_parameters, device_name, interpreted
from bench.train.providers import BASELINE, CONTROL
from bench.train.run import Run, largest_difference, tolerance, warm_up, what_fits


def about(job: Job) -> dict:
    """What was trained, and on what."""
    return {
        "metadata": records.metadata() | {"device": device_name(job.device)},
        "interpreted": interpreted(),
        "model": {"type": job.model, "parameters": count_parameters(job), **(job.sizes or {})},
        "text": TEXT,
        **{name: getattr(job, name) for name in ("seq_len", "batch", "steps", "learning_rate", "checkpointing")},
        "warm_up": warm_up(job.steps),
        "dtype": str(job.dtype).removeprefix("torch."),
        "seed": SEED,
    }


def figures(about: dict, job: Job, runs: dict[str, Run]) -> dict:
    """Everything that was measured."""
    return about | {
        "tolerance": tolerance(runs) if CONTROL in runs else None,
        "advice": what_fits(job, runs),
        "runs": {
            name: {
                "status": run.status,
                "note": run.note,
                "step_seconds": dict(zip(("low", "median", "high"), run.step_seconds, strict=True)) if run.measured else None,
                "tokens_per_second": job.tokens / run.step_seconds[1] if run.measured else None,
                "peak_bytes": run.peak_bytes,
                "largest_difference": largest_difference(run, runs[BASELINE]),
                "losses": run.losses,
            }
            for name, run in runs.items()
        },
    }


def table(result: dict) -> str:
    columns = ("tokens/s", "step (ms)", "quartiles", "peak (GiB)", "last loss", "difference")
    lines = [f"{'':>22}" + "".join(f"{column:>17}" for column in columns)]
    for name, run in result["runs"].items():
        if run["status"] != "measured":
            lines.append(f"{name:>22}  {run['status']}: {run['note']}")
            continue
        low, median, high = (1e3 * run["step_seconds"][key] for key in ("low", "median", "high"))
        peak = "n/a (no GPU)" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 2**30:.2f}"
        apart = "n/a" if run["largest_difference"] is None else f"{run['largest_difference']:.1e}"
        cells = (f"{run['tokens_per_second']:,.0f}", f"{median:.1f}", f"{low:.1f} to {high:.1f}", peak, f"{run['losses'][-1]:.4f}", apart)
        lines.append(f"{name:>22}" + "".join(f"{cell:>17}" for cell in cells))
    if result["interpreted"]:
        lines.append("Kernels of Triton were interpreted: their times are not a measure of speed.")
    return "\n".join(lines)


def picture(result: dict):
    """Loss curves, and their distance from the baseline's; beside them, unless kernels were interpreted, bars of time and memory."""
    runs = {name: run for name, run in result["runs"].items() if run["status"] == "measured"}
    looks = {BASELINE: {"color": "0.75"}, **style.styles(*sorted(runs.keys() - {BASELINE}, key=lambda name: ("ours" not in name, name)))}
    timed = not result["interpreted"]
    figure = style.figure(13.0 if timed else 7.5, 6.5)
    figure.suptitle(_title(result), fontsize=10)
    panels = figure.subplots(2, 1 + timed, squeeze=False, height_ratios=(3, 2))
    _draw_losses(*panels[:, 0], runs, looks, result["tolerance"])
    if timed:
        _draw_bars(*panels[:, 1], runs, looks)
    return figure


def _draw_losses(top, bottom, runs: dict[str, dict], looks: dict[str, dict], tolerance: float | None) -> None:
    rounding = torch.finfo(torch.float32).eps
    for name, run in runs.items():
        if name != CONTROL:
            wide = {"linewidth": 6.0} if name == BASELINE else {"linewidth": 1.2, "linestyle": "--", "zorder": 3}
            top.plot(run["losses"], color=looks[name]["color"], label=name, **wide)
        if name != BASELINE and BASELINE in runs:
            differences = [abs(a - b) for a, b in zip(run["losses"], runs[BASELINE]["losses"], strict=True)]
            marker = {"marker": "x", "markersize": 7} if name == CONTROL else {"marker": looks[name]["marker"], "markersize": 4}
            bottom.plot(differences, color=looks[name]["color"], linestyle="", label=name, **marker)
    largest = max((run["largest_difference"] or 0.0 for run in runs.values()), default=0.0)
    if tolerance is not None:
        bottom.axhline(tolerance, color="0.3", linestyle=":", label="tolerance")
        largest = max(largest, tolerance)
    bottom.set_yscale("symlog", linthresh=rounding)
    if math.isfinite(largest):
        bottom.set_ylim(-rounding / 4, 30 * max(largest, rounding))
    top.sharex(bottom)
    top.set_ylabel("loss (nats per byte)")
    bottom.set(xlabel="training step", ylabel=f"distance from {BASELINE}'s\nloss (nats per byte)")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=3 if axes is bottom else 1)


def _draw_bars(times, memory, runs: dict[str, dict], looks: dict[str, dict]) -> None:
    low, median, high = ([1e3 * run["step_seconds"][key] for run in runs.values()] for key in ("low", "median", "high"))
    quartiles = [[b - a for a, b in zip(*pair, strict=True)] for pair in ((low, median), (median, high))]
    peaks = [(run["peak_bytes"] or 0) / 2**30 for run in runs.values()]
    for axes, label, values, spread, written in (
        (times, "time of a step (ms): median and quartiles", median, quartiles, "{:.1f}"),
        (memory, "peak memory (GiB)", peaks, None, "{:.2f}"),
    ):
        bars = axes.barh(list(runs), values, 0.62, xerr=spread, capsize=3, color=[looks[name]["color"] for name in runs])
        axes.bar_label(bars, fmt=written, padding=4, fontsize=9)
        axes.set_xlabel(label)
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)


def _title(result: dict) -> str:
    data, model = result["metadata"], result["model"]
    versions = records.words(data, "torch", "triton", "transformers")
    size = f"{model['type']} of {model['parameters'] / 1e6:.3g} M parameters on {result['text']}, {result['dtype']}"
    how = f"{data['device']}{', kernels interpreted' if result['interpreted'] else ''}, {versions}, {data['date'][:10]}"
    return f"{size}, {result['batch']} x {result['seq_len']} tokens per step\n{how}"
