"""Trains a model on English text, byte by byte, with the norms of Hugging Face and with ours, and compares losses, speed and memory.

    python -m bench.train                  a small Llama; without a GPU the kernels run in Triton's interpreter
    python -m bench.train --preset 1b      one of a billion parameters; meant for a GPU, where every provider is compared
    python -m bench.train --model olmo2    a tiny model of any type that transformers can train on text

All runs start from one seed and see the same batches. Two computations that differ only in rounding still drift apart in training; how
far is shown by a third run, the control: Hugging Face's norms again, with every gamma moved to a neighbouring number. The losses of ours
may differ from Hugging Face's by DRIFT times what the control's do. A provider that is not installed is listed as absent. One that fails or
runs out of memory is listed as such, with what to try; the others go on.

Exit status: 0; 1 if ours was not measured or its losses differ too much.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch

from bench import records
from bench.train import report
from bench.train.job import PRESETS, TEXT, Job, device_name, interpreted, read_text
from bench.train.providers import PROVIDERS, QUICK, RECOMPUTED
from bench.train.run import Run, attempt, judge


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, and the job that follows from them."""
    parser = argparse.ArgumentParser("bench.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes of a Llama, and defaults of what follows")
    kind.add_argument("--model", metavar="TYPE", help="a model type of transformers, in a tiny configuration")
    parser.add_argument("--steps", type=records.positive, help="training steps of each run")
    parser.add_argument("--seq-len", type=records.positive, help="tokens per sequence; a token is a byte")
    parser.add_argument("--batch", type=records.positive, help="sequences per step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of parameters and activations")
    parser.add_argument("--checkpointing", action="store_true", help="keep a layer's input instead of its activations")
    parser.add_argument("--recompute", action="store_true", help="also ours with recompute_norms, which --compare includes")
    parser.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help=f"every provider instead of {', '.join(QUICK)} (what --preset 1b does unless --no-compare)",
    )
    parser.add_argument("--out", type=Path, help="folder for picture and figures (out/train; of all providers on a GPU bench/results)")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in ("steps", "seq_len", "batch") if getattr(args, name) is not None}
    if args.dtype is not None:
        given["dtype"] = getattr(torch, args.dtype)
    if args.model is not None:
        from bench.census.tiny_models import unknown

        if reason := unknown(args.model):
            parser.error(f"--model {reason}")
        if args.compare:
            parser.error("--model is for ours alone: every provider (--compare) is for Llamas")
        given |= {"model": args.model, "sizes": None}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.job = replace(PRESETS[args.preset], device=device, checkpointing=args.checkpointing, **given)
    if args.compare is None:
        args.compare = args.preset == "1b"
    if args.out is None:
        args.out = records.RESULTS if args.compare and device.type == "cuda" else Path("out/train")
    if not 2 <= args.job.seq_len <= len(read_text()):
        parser.error(f"--seq-len must be from 2 to {len(read_text())}, the bytes of the text, got {args.job.seq_len}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)  # now, and not when there are results
    except OSError as error:
        parser.error(f"--out: {error}")
    return args


def main(argv: list[str] | None = None) -> int:
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before the arguments: model types of transformers are looked up, which imports Triton
    args = parse(argv)
    job: Job = args.job
    if job.device.type == "cpu":
        torch.set_num_threads(1)  # the interpreter has one, and a model that it can serve needs no more
    about = report.about(job)
    parameters = about["model"]["parameters"]
    print(f"{job.model} of {parameters / 1e6:.3g} M parameters, {about['dtype']}, on {device_name(job.device)}")
    print(f"{job.steps} steps of {job.batch} x {job.seq_len} bytes from the {len(read_text()) / 1e3:.0f} KB of {TEXT}")
    if interpreted():
        print("No GPU is used: the kernels run in Triton's interpreter, which shows what they compute, not how fast they are.")
    print()

    name = records.path("train", about["metadata"], about["metadata"]["device"]).stem if args.compare else None
    json, picture = args.out / f"{name or 'figures'}.json", args.out / f"{name or 'losses'}.png"
    names = tuple(PROVIDERS) if args.compare else QUICK + (RECOMPUTED,) * args.recompute
    runs: dict[str, Run] = {}
    for name in names:
        runs[name] = attempt(name, job, runs)
        result = report.figures(about, job, runs)
        records.write(json, result, lines="runs")
    print(f"\n{report.table(result)}")
    if result["advice"]:
        print(result["advice"])
    good = judge(runs)
    report.picture(result).savefig(picture, dpi=150)
    print(f"Picture and figures: {picture}, {json}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
