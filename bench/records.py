"""Results as files in bench/results/: what a measurement depends on, how its file is called, written and found again.

    record = {"metadata": metadata(), "rows": [...]}
    file = path("run-quick", record["metadata"])  # bench/results/run-quick-nvidia-h100-20270101120000.json
    write(file, record, lines="rows")
    newest("run-quick")  # that file

Nothing here imports Triton before `versions` is called, so a program may still decide whether Triton interprets.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
NO_GPU = 69  # exit status of a measurement without a GPU; EX_UNAVAILABLE of sysexits.h
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "quack-kernels", "nvidia-cutlass-dsl", "flash-linear-attention")


def gpu() -> torch.device:
    """The GPU that is measured. Without one the program ends with status NO_GPU."""
    if not torch.cuda.is_available():
        print("There is no GPU here, and nothing to be measured without one.")
        raise SystemExit(NO_GPU)
    return torch.device("cuda", torch.cuda.current_device())


def positive(text: str) -> int:
    """The type of an argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text}")
    return int(text)


def metadata() -> dict:
    """What a measurement depends on besides the code that is measured."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cpu": f"{os.cpu_count()} x {_cpu()}",
        "python": platform.python_version(),
        **versions(),
        "commit": _output("git", "rev-parse", "HEAD") or os.environ.get("GIT_COMMIT", "unknown"),
        "changed": _changed(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Versions of this package, which need not be installed, and of those of PACKAGES that are, by their names on the index."""
    from triton_rmsnorm import __version__  # imports Triton

    found = {"triton_rmsnorm": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def words(metadata: dict, *names: str) -> str:
    """What is known of `names`, or of everything, to be read: "torch 2.13.0, triton 3.9.0"."""
    return ", ".join(f"{name} {metadata[name]}" for name in names or metadata if metadata.get(name) not in (None, "", False))


def undated(metadata: dict) -> dict:
    """What two measurements share if they can be continued one by the other."""
    return {key: value for key, value in metadata.items() if key != "date"}


def path(kind: str, metadata: dict, where: str | None = None) -> Path:
    """A file for a result: kind, where it was measured (by default the GPU's name) and when; kinds are words and hyphens."""
    slug = re.sub(r"[^a-z0-9]+", "-", (where or metadata["gpu"]).lower()).strip("-")
    stamp = re.sub(r"[^0-9]", "", metadata["date"])[:14]
    return RESULTS / f"{kind}-{slug}-{stamp}.json"


def write(path: Path, record: dict, lines: str | None = None) -> None:
    """Writes a record as JSON. The list or dict under `lines` comes last, with one entry per line; the file is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({key: value for key, value in record.items() if key != lines}, indent=1)
    if lines is not None:
        entries = record[lines]
        if isinstance(entries, dict):
            opening, closing = "{}"
            shown = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items()]
        else:
            opening, closing = "[]"
            shown = [json.dumps(entry) for entry in entries]
        text = f"{text[:-2]},\n {json.dumps(lines)}: {opening}\n" + ",\n".join(shown) + f"\n{closing}}}"
    scratch = path.with_suffix(".part")
    scratch.write_text(text + "\n")
    scratch.replace(path)


def newest(kind: str) -> Path | None:
    """The file of a kind that was begun last; None if there is none."""
    return max(RESULTS.glob(f"{kind}-*.json"), key=lambda file: file.stem.split("-")[-1], default=None)


def _changed() -> str:
    """A word for how the code differs from the commit, by which two measurements know whether it is the same; nothing if it does not."""
    code = "triton_rmsnorm", "bench", ":(exclude)bench/results"
    difference = _output("git", "diff", "--no-ext-diff", "HEAD", "--", *code)
    return difference and hashlib.sha256(difference.encode()).hexdigest()[:8]


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu() -> str:
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.machine()
