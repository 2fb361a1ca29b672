"""Counts of bench.cost as Markdown and as a picture: KB per token and layer.

record = json.loads((records.RESULTS / "cost-bf16-4096.json").read_text())
print(markdown(record))
picture(record)  # a figure of matplotlib
"""

from itertools import groupby
from operator import itemgetter

from bench import records, style
from bench.cost.count import DIRECTIONS, of_row

KB = 1024
DASH = "\N{EN DASH}"  # what could not be counted
_COLUMNS = ("norms by", "of them", "launches", "KB read", "KB written", "KB kept", "layer: launches", "KB moved", "KB kept")
_PACKAGES = ("triton_rmsnorm", "torch", "triton", "transformers", "liger-kernel", "flash-linear-attention")


def markdown(record: dict) -> str:
    """A table for each model, and how its numbers were counted."""
    lines = [about(record), ""]
    for model, rows in by_model(record).items():
        lines += [f"**{model}**", "", f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
        lines += [f"| {' | '.join([row['provider'], *_cells(row, record['tokens'] * KB)])} |" for row in rows]
        lines.append("")
    lines += [f"- {note}" for note in notes(record)]
    return "\n".join(lines)


def _cells(row: dict, unit: int) -> list[str]:
    """What follows the provider. Bytes are shown in `unit`."""
    if "reason" in row:
        return [DASH] * 8
    counts = of_row(row)
    ways = [counts.cost("norms", direction) for direction in DIRECTIONS]
    layer = counts.cost("layer")
    return [
        f"{row['computed']} of {row['norms']}",
        " + ".join(str(way.launches) for way in ways),
        " + ".join(f"{way.read / unit:.1f}" for way in ways),
        " + ".join(f"{way.written / unit:.1f}" for way in ways),
        f"{counts.kept_by('norms') / unit:.1f}",
        str(layer.launches),
        f"{layer.moved / unit:.1f}",
        f"{counts.kept_by('layer') / unit:.1f}",
    ]


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


def by_model(record: dict) -> dict[str, list[dict]]:
    """The rows of each model, which are side by side."""
    return {model: list(rows) for model, rows in groupby(record["rows"], itemgetter("model"))}


def about(record: dict) -> str:
    """What was counted, with which versions, and when."""
    metadata = record["metadata"]
    return f"{record['tokens']} tokens in {record['dtype']}; {records.words(metadata, *_PACKAGES)}; {metadata['date'][:10]}"


def picture(record: dict):
    """Bars of bytes moved and of bytes kept by the norms, for each model and provider."""
    shown = {model: rows for model, rows in by_model(record).items() if any("costs" in row for row in rows)}
    figure = style.figure(9.6, 0.9 + 2.15 * len(shown))
    axes = figure.subplots(len(shown), 2, squeeze=False, sharex="col", width_ratios=(3, 2))
    unit = record["tokens"] * KB
    for (moved_axes, kept_axes), (model, rows) in zip(axes, shown.items(), strict=True):
        for at, row in enumerate(reversed(rows)):  # bars are drawn from the bottom
            counts = of_row(row) if "costs" in row else None
            _bar(moved_axes, at, row["provider"], [counts.cost("norms", way).moved / unit for way in DIRECTIONS] if counts else [])
            _bar(kept_axes, at, row["provider"], [counts.kept_by("norms") / unit] if counts else [])
        moved_axes.set_yticks(range(len(rows)), map(_label, reversed(rows)))
        moved_axes.set_title(model, loc="left", fontweight="bold")
        kept_axes.set_yticks([])
        for one in (moved_axes, kept_axes):
            one.margins(x=0.12)
            one.spines[["top", "right"]].set_visible(False)
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


def _bar(axes, at: int, provider: str, parts: list[float]) -> None:
    """Stacked parts with their sum; a dash where nothing was counted."""
    left, color = 0.0, style.VERMILLION if provider.startswith("ours") else style.BLUE
    for part, look in zip(parts, _LOOKS, strict=False):
        axes.barh(at, part, left=left, color=color, edgecolor="white", linewidth=0.5, **look)
        left += part
    axes.text(left, at, f" {left:.0f}" if parts else f" {DASH}", va="center")
