"""Draws what the audit froze: bytes moved, registers and spills of compiled code. No speed is in it.

    frozen = json.loads(newest(RESULTS).read_text())
    picture(frozen)  # bytes of the plain norm on every target, registers of every variant on one
    heat_maps(frozen)  # of the plain norm on every target

Both return a figure of matplotlib, which `python -m bench.plot` saves and notebooks show.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bench.audit import GRID, ROWS
from bench.launches import VARIANTS, Launches, Problem, launches
from bench.offline import TARGETS
from triton_rmsnorm.runtime import config as tuning

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart, a marker and a line each.
_STYLES = {
    "sm_90": ("#D55E00", "o", "-"),
    "sm_100": ("#0072B2", "s", "--"),
    "sm_80": ("#009E73", "^", "-"),
    "gfx942": ("#CC79A7", "v", "--"),
}
_SPILL = "#D55E00"
_MOST_REGISTERS = 255  # that a thread of an NVIDIA GPU can have
_NAMES = {
    "plain": "plain",
    "frozen": "weight frozen",
    "rounded": "rounded before the weight",
    "groups": "8 groups",
    "add": "with a residual",
    "add_fp32": "with an fp32 residual",
    "gate": "gated",
    "gate_first": "gated first",
    "gate_rounded": "gated, rounded",
}


class Frozen(NamedTuple):
    """One row of the audit: registers and spilled bytes a thread of the kernel with the most, bytes moved and the least bytes."""

    registers: int
    spilled: int
    bytes: int
    least: int
    ahead: float  # bytes of rows that an SM asks for ahead, as parts of what has to be on its way to keep the memory busy

    @property
    def beyond(self) -> float:
        """Bytes moved beyond the least, as a part of it."""
        return self.bytes / self.least - 1


Key = tuple[str, Problem]  # target and problem


def newest(folder: Path) -> Path | None:
    """The file of the newest Triton; None if there is none."""
    return max(folder.glob("audit-*.json"), key=lambda file: _version(json.loads(file.read_text())), default=None)


def _version(frozen: dict) -> tuple[int, ...]:
    return tuple(map(int, frozen["triton"].split(".")[:2]))


def rows(frozen: dict, targets: tuple[str, ...], variants: tuple[str, ...]) -> dict[Key, Frozen]:
    """What was frozen in bf16, by target and problem."""
    found = {}
    for key, figures in frozen["figures"].items():
        target, direction, variant, dtype, weight_dtype, n = key.split()
        if target in targets and variant in variants and dtype == weight_dtype == "bf16":
            problem = Problem(direction, variant, dtype, weight_dtype, int(n))
            recorded = _launches(target, problem, clusters=_version(frozen) >= (3, 9))
            least = sum(tensor.nbytes for tensor in (*recorded.inputs, *recorded.outputs))
            most = max(figures["registers"]), max(figures["spilled"])
            found[target, problem] = Frozen(*most, figures["bytes"], least, _asked_for_ahead(target, problem, recorded))
    return found


def _launches(target: str, problem: Problem, clusters: bool) -> Launches:
    device = next(device for device in (tuning.SM_80, tuning.SM_90, tuning.SM_100, tuning.GFX942) if device.name == target)
    return launches(problem, ROWS, device if clusters else replace(device, max_ctas=1))


def _asked_for_ahead(target: str, problem: Problem, recorded: Launches) -> float:
    walker = next(recorded for recorded in recorded.recorded if "NUM_STAGES" in recorded.launch.values)
    values = walker.launch.values
    row = sum(min(values["BLOCK_N"], problem.n) * tensor.itemsize for name, tensor in walker.rows.items() if name in ("X", "DY"))
    programs = prod(walker.launch.grid) / TARGETS[target].device.num_sms  # of an SM; a cluster spreads one over several
    return values["BLOCK_M"] * row * max(1, values["NUM_STAGES"] - 1) * programs / TARGETS[target].latency_bytes


def about(frozen: dict) -> str:
    parts = [f"Triton {frozen['triton']}", f"commit {frozen['commit'][:8]}" if "commit" in frozen else "", frozen.get("date", "")[:10]]
    return ", ".join(part for part in parts if part)


def picture(frozen: dict, target: str = "sm_90") -> "Figure":
    """Bytes moved over N, of the plain norm on every target; registers and spills of every variant on `target`."""
    from matplotlib.figure import Figure

    plain = rows(frozen, tuple(TARGETS), ("plain",))
    figure = Figure(figsize=(9.6, 8.8), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(2, 3.2))
    left = None
    for i, direction in enumerate(("forward", "backward")):
        left = axes = figure.add_subplot(grid[0, i], sharey=left)
        for name, (colour, marker, line) in _STYLES.items():
            points = {p.n: 100 * row.beyond for (of, p), row in plain.items() if (of, p.direction) == (name, direction)}
            style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4, "linewidth": 1.3}
            axes.plot(*zip(*sorted(points.items()), strict=True), label=name, **style) if points else None
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks((64, 256, 1024, 4096, 16384, 65536))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.tick_params(labelsize=9)
        axes.set_xlabel("N (columns a row)")
        axes.set_title(f"{direction} of the plain norm", fontsize=10)
        axes.grid(alpha=0.3)
        if i == 0:
            axes.set_ylabel("bytes moved beyond\nthe least possible (%)")
            axes.legend(frameon=False, fontsize=9)
    _registers(figure.add_subplot(grid[1, :]), rows(frozen, (target,), tuple(VARIANTS)), target)
    figure.suptitle(f"Compiled and counted without a GPU, which is no speed. {about(frozen)}; bf16, {ROWS} rows", fontsize=11)
    return figure


def _registers(axes: "Axes", found: Mapping[Key, Frozen], target: str) -> None:
    lines = {}
    for direction in ("forward", "backward"):
        for variant, name in _NAMES.items():
            values = {p.n: row for (_, p), row in found.items() if (p.direction, p.variant) == (direction, variant)}
            if values:
                lines[f"{name}, {direction}"] = values
    columns = [n for n in GRID if any(n in values for values in lines.values())]
    registers, spilled = (_image(lines, columns, name) for name in ("registers", "spilled"))
    shown = axes.imshow(registers, cmap="cividis_r", aspect="auto", vmin=0, vmax=_MOST_REGISTERS)
    for (y, x), value in np.ndenumerate(registers):
        if spilled[y, x] > 0:
            axes.add_patch(_frame(x, y))
            axes.text(x, y, f"+{spilled[y, x]:.0f}", ha="center", va="center", fontsize=7, weight="bold", color="white")
        elif not np.isnan(value):
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color=_ink(value, _MOST_REGISTERS))
    axes.set_yticks(range(len(lines)), lines, fontsize=8)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    axes.set_xlabel("N (columns a row)")
    axes.grid(False)
    spills = "framed: spilled bytes a thread" if (spilled > 0).any() else "nothing is spilled"
    axes.set_title(f"{target}: registers a thread; {spills}", fontsize=10)
    axes.figure.colorbar(shown, ax=axes, pad=0.01, aspect=30, label=f"registers a thread (of {_MOST_REGISTERS})")


def _image(lines: Mapping[str, Mapping[int, Frozen]], columns: list[int], name: str) -> np.ndarray:
    return np.array([[getattr(values[n], name) if n in values else np.nan for n in columns] for values in lines.values()], dtype=float)


def _frame(x: int, y: int):
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, facecolor=_SPILL, edgecolor="black", linewidth=0.8)


def _ink(value: float, top: float) -> str:
    return "white" if value > 0.55 * top else "black"


def heat_maps(frozen: dict) -> "Figure":
    """Of the plain norm, over N and targets: registers, spills, bytes beyond the least, and bytes asked for ahead."""
    from matplotlib.figure import Figure

    found = rows(frozen, tuple(TARGETS), ("plain",))
    panels = {  # title: value, and where the colours end
        "registers a thread": (lambda row: row.registers, _MOST_REGISTERS),
        "spilled bytes a thread": (lambda row: row.spilled, None),
        "bytes moved beyond the least (%)": (lambda row: 100 * row.beyond, 10),
        "bytes asked for ahead / needed": (lambda row: row.ahead, 2),
    }
    lines = list(dict.fromkeys((target, problem.direction) for target, problem in found))
    columns = sorted({problem.n for _, problem in found})
    figure = Figure(figsize=(9.4, 10.5), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True)
    for axes, (title, (value_of, top)) in zip(grid, panels.items(), strict=True):
        image = np.full((len(lines), len(columns)), np.nan)
        for (target, problem), row in found.items():
            image[lines.index((target, problem.direction)), columns.index(problem.n)] = value_of(row)
        top = top or max(np.nanmax(image, initial=0), 1)
        shown = axes.imshow(image, cmap="cividis_r", aspect="auto", vmin=0, vmax=top)
        for (y, x), value in np.ndenumerate(image):
            text = f"{value:.0f}" if value >= 10 or value == round(value) else f"{value:.1f}"
            if not np.isnan(value):
                axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color=_ink(value, top))
        axes.set_yticks(range(len(lines)), [" ".join(line) for line in lines], fontsize=9)
        axes.set_title(title, fontsize=10)
        axes.grid(False)
        figure.colorbar(shown, ax=axes, pad=0.01, aspect=12)
    grid[-1].set_xticks(range(len(columns)), columns, rotation=90)
    grid[-1].set_xlabel("N (columns a row)")
    figure.suptitle(f"compiled without a GPU: {about(frozen)}; plain norm, bf16, {ROWS} rows")
    return figure
