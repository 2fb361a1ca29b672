"""Counts of bench.cost as Markdown and as a picture: KB per token and layer.

record = json.loads((records.RESULTS / "cost-bf16-4096.json").read_text())
print(markdown(record))
picture(record)  # a figure of matplotlib
"""

from typing import TYPE_CHECKING, NamedTuple

from bench import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KB = 1024
DASH = "\N{EN DASH}"  # what could not be counted
DIRECTIONS = ("forward", "backward")
_COLUMNS = ("norms by", "of them", "launches", "KB read", "KB written", "KB kept", "layer: launches", "KB moved", "KB kept")
_PACKAGES = ("triton_rmsnorm", "torch", "triton", "transformers", "liger-kernel", "flash-linear-attention")


class Totals(NamedTuple):
    """What a part of a layer costs in some direction."""

    launches: int
    read: float  # KB per token
    written: float

    @property
    def moved(self) -> float:
        return self.read + self.written


def totals(record: dict, row: dict, part: str, direction: str | None = None) -> Totals:
    """Of "norms" or of the whole "layer"; both ways, unless a direction is named."""
    costs = [c for c in row["costs"] if part in (c["part"], "layer") and direction in (c["direction"], None)]
    launches, read, written = (sum(cost[name] for cost in costs) for name in Totals._fields)
    return Totals(launches, read / record["tokens"] / KB, written / record["tokens"] / KB)


def kept(record: dict, row: dict, part: str) -> float:
    """KB per token."""
    return sum(nbytes for of, nbytes in row["kept"].items() if part in (of, "layer")) / record["tokens"] / KB


def markdown(record: dict) -> str:
    """A table for each model, and how its numbers were counted."""
    lines = [about(record), ""]
    for model in models(record):
        lines += [f"**{model}**", "", f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
        for row in rows_of(record, model):
            if "reason" in row:
                lines.append(f"| {row['provider']} |{f' {DASH} |' * 8}")
                continue
            ways = [totals(record, row, "norms", direction) for direction in DIRECTIONS]
            layer = totals(record, row, "layer")
            cells = [
                f"{row['computed']} of {row['norms']}",
                " + ".join(str(way.launches) for way in ways),
                " + ".join(f"{way.read:.1f}" for way in ways),
                " + ".join(f"{way.written:.1f}" for way in ways),
                f"{kept(record, row, 'norms'):.1f}",
                str(layer.launches),
                f"{layer.moved:.1f}",
                f"{kept(record, row, 'layer'):.1f}",
            ]
            lines.append(f"| {row['provider']} | {' | '.join(cells)} |")
        lines.append("")
    lines += [f"- {note}" for note in notes(record)]
    return "\n".join(lines)


def notes(record: dict) -> list[str]:
    """How the numbers were counted, and why some are missing."""
    reasons = [f"{row['model']}, {row['provider']}: {row['reason']}." for row in record["rows"] if "reason" in row]
    return [
        "Per token and decoder layer, forward + backward: first the norms with the additions to the residual stream, then the whole layer.",
        "Of them: how many of the layer's norms the provider computes. The others are Hugging Face's.",
        "Operations of torch count as one launch that reads each input once and writes each output once. Loads and stores of Triton "
        "kernels are counted in Triton's interpreter, with the configuration for an H100, or the first one of a peer that tunes itself; a "
        "tensor that all programs read, such as the weight, counts once per launch.",
        "Kept for the backward: each storage once, without parameters and position embeddings.",
        "Attention is one launch each way. The layer of Qwen3.5-9B is counted without its gated delta rule, whose kernels need a GPU.",
        *reasons,
    ]


def models(record: dict) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in record["rows"]))


def rows_of(record: dict, model: str) -> list[dict]:
    return [row for row in record["rows"] if row["model"] == model]


def about(record: dict) -> str:
    """What was counted, with which versions, and when."""
    metadata = record["metadata"]
    versions = ", ".join(f"{name} {metadata[name]}" for name in _PACKAGES if name in metadata)
    return f"{record['tokens']} tokens in {record['dtype']}; {versions}; {metadata['date'][:10]}"


def picture(record: dict) -> "Figure":
    """Bars of bytes moved and of bytes kept by the norms, for each model and provider."""
    from matplotlib.figure import Figure

    shown = [model for model in models(record) if any("costs" in row for row in rows_of(record, model))]
    figure = Figure(figsize=(10, 0.9 + 2.15 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 2, squeeze=False, sharex="col", width_ratios=(3, 2))
    for (moved_axes, kept_axes), model in zip(axes, shown, strict=True):
        rows = rows_of(record, model)[::-1]  # bars are drawn from the bottom
        _bars(
            moved_axes, rows, [[totals(record, row, "norms", way).moved for way in DIRECTIONS] if "costs" in row else None for row in rows]
        )
        _bars(kept_axes, rows, [[kept(record, row, "norms")] if "costs" in row else None for row in rows])
        moved_axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
        moved_axes.set_title(model, loc="left", fontweight="bold")
        kept_axes.set_yticks([])
    axes[0][0].set_title("KB moved per token", loc="right")
    axes[0][1].set_title("KB kept per token", loc="right")
    handles = [axes[0][0].barh(0, 0, color="0.35", **look) for look in _LOOKS]
    axes[0][0].legend(handles, DIRECTIONS, loc="lower right", frameon=False)
    figure.suptitle("What the norms and residual additions of one decoder layer cost (counted, not timed)", x=0.01, ha="left")
    figure.supxlabel(about(record), x=0.01, ha="left", fontsize=8)
    return figure


_LOOKS: tuple[dict, ...] = ({}, {"alpha": 0.55, "hatch": "////"})


def _label(row: dict) -> str:
    share = "" if "reason" in row or row["computed"] == row["norms"] else f" ({row['computed']} of {row['norms']})"
    return row["provider"] + share


def _bars(axes: "Axes", rows: list[dict], values: list[list[float] | None]) -> None:
    """Stacked bars with their sums; a dash where nothing was counted."""
    for at, (row, parts) in enumerate(zip(rows, values, strict=True)):
        if parts is None:
            axes.text(0, at, f" {DASH}", va="center")
            continue
        left = 0.0
        for part, look in zip(parts, _LOOKS, strict=False):
            axes.barh(at, part, left=left, color=_color(row["provider"]), edgecolor="white", linewidth=0.5, **look)
            left += part
        axes.text(left, at, f" {left:.0f}", va="center")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _color(provider: str) -> str:
    return style.VERMILLION if provider.startswith("ours") else style.BLUE
