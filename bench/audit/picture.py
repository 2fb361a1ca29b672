"""Draws what the audit froze, which is compiled and counted, not timed: `python -m bench.plot` saves the picture, a notebook shows it."""

import json
from pathlib import Path

import numpy as np

from bench import records, style
from bench.audit.compile import TARGETS
from bench.audit.rows import ROWS, problems
from bench.problem import GRID, Problem

_MOST_REGISTERS = 255  # that a thread of an NVIDIA GPU can have
_NAMES = {
    "plain": "plain",
    "frozen": "weight frozen",
    "rounded": "rounded before the weight",
    "groups": "8 groups",
    "residual": "residual",
    "residual_fp32": "fp32 residual",
    "gate": "gate",
    "gate_first": "gate first",
    "gate_rounded": "gate, rounded",
}

Found = dict[tuple[str, Problem], dict]  # frozen figures by target and problem


def newest() -> Path | None:
    """The file of the newest Triton; None if there is none."""
    versions = {file: json.loads(file.read_text())["triton"] for file in records.RESULTS.glob("audit-*.json")}
    return max(versions, key=lambda file: tuple(map(int, versions[file].split(".")[:2])), default=None)


def find(frozen: dict, *variants: str) -> Found:
    """What was frozen of contiguous rows in bf16."""
    keys = {(target, problem): f"{target} {problem}" for target in TARGETS for problem in problems() if problem.n in GRID}
    return {
        (target, problem): frozen["figures"][key]
        for (target, problem), key in keys.items()
        if key in frozen["figures"] and problem[3:] in [(variant, "bf16", "bf16", "contiguous") for variant in variants]
    }


def picture(frozen: dict, target: str = "sm_90"):
    """Memory traffic over N, of the plain norm on every target; registers and spills of every variant on `target`."""
    plain = find(frozen, "plain")
    figure = style.figure(9.6, 8.8)
    grid = figure.add_gridspec(2, 2, height_ratios=(2, 3.2))
    left = None
    for i, direction in enumerate(("forward", "backward")):
        left = axes = figure.add_subplot(grid[0, i], sharey=left)
        for name, look in style.styles(*TARGETS).items():
            rows = [(p.n, row) for (of, p), row in plain.items() if (of, p.direction) == (name, direction)]
            points = sorted((n, 100 * (row["memory"] / row["minimum"] - 1)) for n, row in rows)
            axes.plot(*zip(*points, strict=True), label=name, markersize=4, linewidth=1.3, **look) if points else None
        axes.set_yscale("symlog", linthresh=1)
        axes.set(ylim=(-0.2, 120), title=f"{direction} of the plain norm", xlabel="N (columns per row)")
        axes.set_xscale("log", base=2)
        axes.set_xticks((64, 256, 1024, 4096, 16384, 65536))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        if i == 0:
            axes.set_ylabel("memory traffic above\nthe minimum (%)")
            axes.legend(frameon=False, fontsize=9)
    _registers(figure.add_subplot(grid[1, :]), find(frozen, *_NAMES), target)
    about = f"Triton {frozen['triton']}, commit {frozen['commit'][:8]}, {frozen['date'][:10]}"
    figure.suptitle(f"Compiled and counted without a GPU, not timed. {about}; bf16, {ROWS} rows", fontsize=10)
    return figure


def _registers(axes, found: Found, target: str) -> None:
    """A heat map: registers per thread, or what is spilled."""
    lines = {
        f"{name}, {direction}": {p.n: row for (of, p), row in found.items() if (of, p.direction, p.variant) == (target, direction, variant)}
        for direction in ("forward", "backward")
        for variant, name in _NAMES.items()
    }
    lines = {label: line for label, line in lines.items() if line}
    columns = [n for n in GRID if any(n in line for line in lines.values())]
    image = np.array([[max(line[n]["registers"]) if n in line else np.nan for n in columns] for line in lines.values()], dtype=float)
    shown = axes.imshow(image, cmap="cividis_r", aspect="auto", vmin=0, vmax=_MOST_REGISTERS)
    spills = 0
    for y, line in enumerate(lines.values()):
        for x, row in ((columns.index(n), row) for n, row in line.items()):
            registers, spilled = max(row["registers"]), max(row["spilled"])
            text = axes.text(x, y, registers, ha="center", va="center", fontsize=7, color="white" if registers > 140 else "black")
            if spilled:
                text.set(text=f"+{spilled}", bbox={"color": style.VERMILLION, "pad": 1.5})
                spills += 1
    spills = "spills are orange: bytes per thread" if spills else "nothing is spilled"
    axes.set_title(f"{target}: registers per thread; {spills}", fontsize=10)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    axes.set_yticks(range(len(lines)), lines, fontsize=8)
    axes.set_xlabel("N (columns per row)")
    axes.grid(False)
    axes.figure.colorbar(shown, ax=axes, pad=0.01, aspect=20)
