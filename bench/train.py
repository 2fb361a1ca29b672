"""Trains a model on English text, byte by byte, with the norms of Hugging Face and with ours, and compares losses, speed and memory.

    python -m bench.train                  a small Llama; without a GPU the kernels run in Triton's interpreter
    python -m bench.train --preset 1b      one of a billion parameters; meant for a GPU, where every provider is compared
    python -m bench.train --model olmo2    a tiny model of any type that transformers can train on text

All runs start from one seed and see the same batches. Two computations that differ only in rounding still drift apart in training; how
far is shown by a third run, the control: Hugging Face's norms again, with every gamma moved to a neighbouring number. The losses of ours
may differ from Hugging Face's by DRIFT times what the control's do.
"""

import argparse
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.training import CPU, PRESETS, SEED, Job, batches, count_parameters, device_name, interpreted, new_model, read_text, train

# Neither Triton nor what imports it (triton_rmsnorm, optimizers) may be imported before main has decided whether Triton interprets.

# Measured on CPUs with the tiny preset, over seeds. What rounds differently, but rightly, strays at most 2.1 times as far as the control
# (ours, three seeds, and x / sqrt(...) in place of x * rsqrt(...), 17 seeds); in bf16 0.4 times. In fp32, an output 0.01 % too large strays
# at least 30 times as far, and the lost dgamma of one sequence in eight at least 170 times. In bf16 the control itself is so coarse that
# an error of 1 % in dx does not show.
DRIFT = 4


def huggingface(model: nn.Module) -> nn.Module:
    return model


def control(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Moves every gamma to a neighbouring number of `dtype` (None: its own), up or down at random."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                rounded = weight.cpu().to(dtype or weight.dtype)
                towards = torch.randint(2, weight.shape, generator=generator).to(rounded.dtype) * 4 - 2
                weight.copy_(torch.nextafter(rounded, towards))
    return model


def ours(model: nn.Module) -> nn.Module:
    from triton_rmsnorm import patch

    report = patch(model)
    if not report.replaced:
        raise RuntimeError("patch found no norm to replace")
    tqdm.write(f"{report}\n")
    return model


# A provider is a name and a function that equips a model with norms. The first two are what the others are compared with.
PROVIDERS: dict[str, Callable[[nn.Module], nn.Module]] = {"huggingface": huggingface, "control": control, "ours": ours}
BASELINE, CONTROL, *COMPARED = PROVIDERS


@dataclass(frozen=True)
class Run:
    losses: list[float]  # nats a byte, one a step
    step_seconds: float  # median
    peak_bytes: int | None  # of GPU memory; None without a GPU


def compare(job: Job, text: Tensor) -> dict[str, Run]:
    """One run for each provider, in turn; prints losses beside those of the first two as they come."""
    runs: dict[str, Run] = {}
    for name in PROVIDERS:
        runs[name] = run(name, job, text, runs)
    return runs


def run(name: str, job: Job, text: Tensor, before: dict[str, Run]) -> Run:
    if job.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(job.device)
    model = PROVIDERS[name](new_model(job))
    if name in COMPARED:
        tqdm.write(f"{'step':>6}{BASELINE:>14}{name:>14}{'difference':>14}{'of control':>14}")
    every = max(1, job.steps // 10)
    losses, seconds = [], []
    interval = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(total=job.steps, desc=f"{name:>12}", unit="step", mininterval=interval, dynamic_ncols=True) as bar:
        start = time.perf_counter()
        for step, loss in enumerate(train(model, batches(job, text), job.learning_rate)):
            seconds.append(time.perf_counter() - start)
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if name in COMPARED and (step % every == 0 or step == job.steps - 1):
                baseline, rounded = before[BASELINE].losses[step], before[CONTROL].losses[step]
                bar.write(f"{step:>6}{baseline:>14.5f}{loss:>14.5f}{loss - baseline:>14.1e}{rounded - baseline:>14.1e}")
            start = time.perf_counter()
    peak_bytes = torch.cuda.max_memory_allocated(job.device) if job.device.type == "cuda" else None
    return Run(losses, statistics.median(seconds), peak_bytes)


def unfit(job: Job) -> str:
    """Why a tiny model of a type cannot be trained on text, if so, or shows nothing about norms."""
    from bench.tiny_models import unknown
    from triton_rmsnorm import patch

    if reason := unknown(job.model):
        return reason
    tokens = torch.arange(32, 64)[None]  # bytes that text has
    try:
        model = new_model(replace(job, device=CPU))
        loss = model(input_ids=tokens, labels=tokens).loss
    except Exception as error:  # of any kind: it is the model's own code
        return f"must be one that is trained on text and can be built small, but {job.model} raises {type(error).__name__}: {error}"
    if loss is None:
        return f"must be one that is trained on text, but {job.model} has no loss"
    return "" if patch(model).replaced else f"must be one with RMS norms, but patch replaces nothing in {job.model}"


def largest_difference(run: Run, baseline: Run) -> float:
    """NaN if any loss is."""
    return (torch.tensor(run.losses, dtype=torch.float64) - torch.tensor(baseline.losses, dtype=torch.float64)).abs().max().item()


def tolerance(runs: dict[str, Run]) -> float:
    """DRIFT times the largest difference that the control showed, or one rounding of the loss, which is fp32 and may show none."""
    rounding = torch.finfo(torch.float32).eps * max(runs[BASELINE].losses)
    return DRIFT * max(rounding, largest_difference(runs[CONTROL], runs[BASELINE]))


def what_fits(job: Job, text: Tensor) -> Job | None:
    """The largest of ever halved jobs that every provider gets through: two steps, because AdamW's state comes with the first."""
    while job.batch > 1 or job.seq_len > 64:
        halved = {"batch": job.batch // 2} if job.batch > 1 else {"seq_len": job.seq_len // 2}
        job = replace(job, steps=2, **halved)
        try:
            compare(job, text)
        except torch.OutOfMemoryError:
            continue
        return job
    return None


def figures(job: Job, source: str, runs: dict[str, Run]) -> dict:
    """Everything that was measured, and on what."""
    packages = ("triton_rmsnorm", "torch", "triton", "transformers", "numpy")
    return {
        "date": date.today().isoformat(),
        "device": device_name(job.device),
        "interpreted": interpreted(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "model": {"type": job.model, "parameters": count_parameters(job), **(job.sizes or {})},
        "text": source,
        **{name: getattr(job, name) for name in ("seq_len", "batch", "steps", "learning_rate")},
        "dtype": str(job.dtype).removeprefix("torch."),
        "seed": SEED,
        "tolerance": tolerance(runs),
        "runs": {
            name: {
                "largest_difference": largest_difference(run, runs[BASELINE]),
                "step_seconds": run.step_seconds,
                "tokens_per_second": job.tokens / run.step_seconds,
                "peak_bytes": run.peak_bytes,
                "losses": run.losses,
            }
            for name, run in runs.items()
        },
    }


def plot(result: dict, path: Path) -> None:
    """The loss curves above, their distance from the baseline below."""
    from matplotlib.figure import Figure

    runs, rounding = result["runs"], torch.finfo(torch.float32).eps
    # Okabe and Ito's colours, which the colour-blind can tell apart; the eighth is the tolerance's.
    colours = dict(zip(runs, ("#56B4E9", "#E69F00", "#000000", "#009E73", "#CC79A7", "#0072B2", "#F0E442"), strict=False))
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    for name, run in runs.items():
        if name != CONTROL:
            wide = {"linewidth": 5.0, "alpha": 0.7} if name == BASELINE else {"linewidth": 1.2, "linestyle": "--"}
            top.plot(run["losses"], color=colours[name], label=name, **wide)
        if name != BASELINE:
            differences = [abs(a - b) for a, b in zip(run["losses"], runs[BASELINE]["losses"], strict=True)]
            marker = "x" if name == CONTROL else "."
            bottom.plot(differences, marker, color=colours[name], label=name, markersize=5)
    bottom.axhline(result["tolerance"], color="#D55E00", linestyle=":", label="tolerance")
    bottom.set_yscale("symlog", linthresh=rounding)
    largest = max(result["tolerance"], *(run["largest_difference"] for run in runs.values()))
    if math.isfinite(largest):
        bottom.set_ylim(-rounding / 4, 30 * largest)
    top.set_ylabel("loss (nats per byte)")
    bottom.set(xlabel="training step", ylabel=f"distance from {BASELINE}'s\nloss (nats per byte)")
    how = f"{result['device']}{', kernels interpreted' if result['interpreted'] else ''}, {result['dtype']}, {result['date']}"
    kind, parameters = result["model"]["type"], result["model"]["parameters"]
    top.set_title(f"{kind} of {parameters / 1e6:.3g} M parameters on {result['text']}\n{how}", fontsize=10)
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="upper right", ncols=3 if axes is bottom else 1)
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, and what is made of them: job, text and source."""
    parser = argparse.ArgumentParser("bench.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes of a Llama, and defaults of what follows")
    kind.add_argument("--model", metavar="TYPE", help="a model type of transformers, in a tiny configuration")
    parser.add_argument("--steps", type=_positive, help="training steps of each run")
    parser.add_argument("--seq-len", type=_positive, help="tokens of a sequence, which are bytes")
    parser.add_argument("--batch", type=_positive, help="sequences a step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of parameters and activations")
    parser.add_argument("--device", help="cuda or cpu; a GPU if there is one")
    parser.add_argument("--checkpointing", action="store_true", help="keep a layer's input instead of its activations")
    parser.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="time every provider instead of comparing two (what --preset 1b does unless --no-compare)",
    )
    parser.add_argument("--text", type=Path, help="file to train on instead of Python's help texts")
    parser.add_argument("--out", type=Path, help="folder for picture and figures (out/train; of all providers on a GPU bench/results)")
    args = parser.parse_args(argv)
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        parser.error(f"--device must be cuda or cpu, got {args.device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device is {args.device}, but torch finds no GPU")
    if args.text is not None and not args.text.is_file():
        parser.error(f"--text must be a file, got {args.text}")
    given = {name: getattr(args, name) for name in ("steps", "seq_len", "batch") if getattr(args, name) is not None}
    if args.dtype is not None:
        given["dtype"] = getattr(torch, args.dtype)
    if args.model is not None:
        if args.compare:
            parser.error("--model is for two runs: every provider (--compare) is for Llamas")
        given |= {"model": args.model, "sizes": None}
    args.job = replace(PRESETS[args.preset], device=device, checkpointing=args.checkpointing, **given)
    if args.compare is None:
        args.compare = args.preset == "1b"
    if args.out is None:
        args.out = Path(__file__).parent / "results" if args.compare and device.type == "cuda" else Path("out/train")
    args.source = args.text.name if args.text else "pydoc_data.topics"
    args.text = read_text(args.text)
    if not 2 <= args.job.seq_len <= len(args.text):
        parser.error(f"--seq-len must be from 2 to {len(args.text)}, the bytes of {args.source}, got {args.job.seq_len}")
    args.error = parser.error
    return args


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    job, text, source = args.job, args.text, args.source
    if job.device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)  # the interpreter has one, and a model that it can serve needs no more
    if job.sizes is None and (reason := unfit(job)):
        args.error(f"--model {reason}")

    print(f"{job.model} of {count_parameters(job) / 1e6:.3g} M parameters, {job.dtype}, on {device_name(job.device)}".replace("torch.", ""))
    print(f"{job.steps} steps of {job.batch} x {job.seq_len} bytes from the {len(text) / 1e3:.0f} KB of {source}")
    if interpreted():
        print("No GPU is used: the kernels run in Triton's interpreter, which shows what they compute, not how fast they are.")
    print()
    if args.compare:
        from bench import compare_training  # it imports Triton

        return compare_training.main(job, text, source, args.out)
    runs = None
    try:
        runs = compare(job, text)
    except torch.OutOfMemoryError as error:
        print(f"\nOut of memory: {str(error).split('. ')[0]}.")
    if runs is None:  # by now the memory of the failed run is free
        print("Looking for what fits ...")
        smaller = what_fits(job, text)
        print(f"This fits: --batch {smaller.batch} --seq-len {smaller.seq_len}" if smaller else "Not even one short sequence fits.")
        return 1

    print(f"\n{'':>12}{'tokens/s':>12}{'step':>12}{'peak memory':>14}")
    for name, run in runs.items():
        peak = "n/a (no GPU)" if run.peak_bytes is None else f"{run.peak_bytes / 2**30:.2f} GiB"
        slow = "   interpreted, no measure of speed" if interpreted() and name in COMPARED else ""
        print(f"{name:>12}{job.tokens / run.step_seconds:>12,.0f}{1e3 * run.step_seconds:>9.1f} ms{peak:>14}{slow}")
    print(f"\nTolerance: {tolerance(runs):.1e}, which is {DRIFT} times what one rounding of every gamma does to the losses (the control).")
    same = True
    for name in COMPARED:
        difference = largest_difference(runs[name], runs[BASELINE])
        agrees = difference <= tolerance(runs)  # not if it is NaN
        same &= agrees
        print(f"Largest difference of the losses of {name} and {BASELINE}: {difference:.1e}, {'the same' if agrees else 'TOO MUCH'}.")

    result = figures(job, source, runs)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "figures.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, args.out / "losses.png")
    print(f"Picture and figures: {args.out / 'losses.png'}, {args.out / 'figures.json'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
