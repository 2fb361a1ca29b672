"""Draws what the audit froze, which is compiled and counted, not timed.

    frozen = json.loads(newest().read_text())
    picture(frozen)  # memory traffic of the plain norm on every target, registers of every variant on one
    heat_maps(frozen)  # of the plain norm on every target

Both return a figure of matplotlib, which `python -m bench.plot` saves and notebooks show.
"""

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


def _beyond(figures: dict) -> float:
    """Memory traffic above the minimum, in percent."""
    return 100 * (figures["memory"] / figures["minimum"] - 1)


def _about(frozen: dict) -> str:
    return f"Triton {frozen['triton']}, commit {frozen['commit'][:8]}, {frozen['date'][:10]}"


def picture(frozen: dict, target: str = "sm_90"):
    """Memory traffic over N, of the plain norm on every target; registers and spills of every variant on `target`."""
    plain = find(frozen, "plain")
    figure = style.figure(9.6, 8.8)
    grid = figure.add_gridspec(2, 2, height_ratios=(2, 3.2))
    left = None
    for i, direction in enumerate(("forward", "backward")):
        left = axes = figure.add_subplot(grid[0, i], sharey=left)
        for name, look in style.styles(*TARGETS).items():
            points = [(p.n, _beyond(row)) for (of, p), row in plain.items() if (of, p.direction) == (name, direction)]
            axes.plot(*zip(*sorted(points), strict=True), label=name, markersize=4, linewidth=1.3, **look) if points else None
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
    figure.suptitle(f"Compiled and counted without a GPU, not timed. {_about(frozen)}; bf16, {ROWS} rows", fontsize=10)
    return figure


def _registers(axes, found: Found, target: str) -> None:
    rows = {
        f"{name}, {direction}": {p.n: row for (of, p), row in found.items() if (of, p.direction, p.variant) == (target, direction, variant)}
        for direction in ("forward", "backward")
        for variant, name in _NAMES.items()
    }
    rows = {label: row for label, row in rows.items() if row}
    columns = [n for n in GRID if any(n in row for row in rows.values())]
    registers, spilled = (_image(rows, columns, lambda figures, name=name: max(figures[name])) for name in ("registers", "spilled"))
    texts = np.array(
        [[f"{s:.0f}" if s > 0 else f"{r:.0f}" for r, s in zip(*pair, strict=True)] for pair in zip(registers, spilled, strict=True)]
    )
    spills = "spills are orange: bytes per thread" if (spilled > 0).any() else "nothing is spilled"
    _heat_map(axes, registers, _MOST_REGISTERS, texts, list(rows), f"{target}: registers per thread; {spills}")
    for y, x in np.argwhere(spilled > 0):
        axes.texts[y * len(columns) + x].set_bbox({"color": style.VERMILLION, "pad": 1})
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    axes.set_xlabel("N (columns per row)")


def heat_maps(frozen: dict):
    """Of the plain norm, over N and targets: what its kernels take, what keeps the memory busy, and what they move."""
    panels = {  # title: value, and where the colors end
        "registers per thread": (lambda target, row: max(row["registers"]), _MOST_REGISTERS),
        "spilled bytes per thread": (lambda target, row: max(row["spilled"]), None),
        "resident warps per SM": (lambda target, row: row["warps"], 64),
        "bytes in flight / needed": (lambda target, row: row["in_flight"] / TARGETS[target].latency_bytes, 3),
        "instructions per element": (lambda target, row: row["per_element"], 40),
        "memory traffic above the minimum (%)": (lambda target, row: _beyond(row), 10),
    }
    found = find(frozen, "plain")
    lines = list(dict.fromkeys((target, problem.direction) for target, problem in found))
    rows = {line: {p.n: (t, row) for (t, p), row in found.items() if (t, p.direction) == line} for line in lines}
    columns = sorted({problem.n for _, problem in found})
    figure = style.figure(9.4, 14)
    grid = figure.subplots(len(panels), 1, sharex=True)
    for axes, (title, (value, top)) in zip(grid, panels.items(), strict=True):
        image = _image(rows, columns, lambda pair, value=value: value(*pair))
        texts = np.array([[f"{v:.0f}" if v >= 10 or v == round(v) else f"{v:.1f}" for v in np.nan_to_num(line)] for line in image])
        _heat_map(axes, image, top or max(np.nanmax(image, initial=0), 1), texts, [" ".join(line) for line in lines], title)
    grid[-1].set_xticks(range(len(columns)), columns, rotation=90)
    grid[-1].set_xlabel("N (columns per row)")
    figure.suptitle(f"compiled without a GPU: {_about(frozen)}; plain norm, bf16, {ROWS} rows")
    return figure


def _image(rows: dict, columns: list[int], value) -> np.ndarray:
    """value(row[n]) for each row and column; NaN where there is nothing."""
    return np.array([[value(row[n]) if n in row else np.nan for n in columns] for row in rows.values()], dtype=float)


def _heat_map(axes, image: np.ndarray, top: float, texts: np.ndarray, labels: list[str], title: str) -> None:
    shown = axes.imshow(image, cmap="cividis_r", aspect="auto", vmin=0, vmax=top)
    for (y, x), value in np.ndenumerate(image):
        color = "white" if value > 0.55 * top else "black"
        axes.text(x, y, "" if np.isnan(value) else texts[y, x], ha="center", va="center", fontsize=7, color=color)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.grid(False)
    axes.figure.colorbar(shown, ax=axes, pad=0.01, aspect=20)
