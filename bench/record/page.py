"""The page of a record: losses first, then what was measured, with pictures; all of it from record.json alone."""

from pathlib import Path
from typing import Any

import matplotlib  # noqa: F401 -- if it is missing, this fails before anything is measured, not at the first picture

from bench import records, style
from bench.record.steps import STEPS
from bench.speed import host, report
from bench.speed.report import Comparison
from bench.train import report as training

GOAL = {"forward": 0.95, "backward": 0.90}  # of a copy in the same run
REHEARSAL = "REHEARSAL with stand-ins, not a measurement"
PAGE = "record.md"


def write(out: Path, record: dict[str, Any], draw: bool = True) -> None:
    """The page, and the pictures of what there is: drawn, or those that are there."""
    shown: list[str] = []
    for name, figure_of, alt in PICTURES:
        figure = figure_of(record) if draw else None
        if record["rehearsal"]:
            alt = f"{REHEARSAL}: {alt}"
        if figure is not None:
            if record["rehearsal"]:
                _mark(figure)
            figure.savefig(out / name, dpi=110)
        if (out / name).exists():
            shown.append(f"![{alt}]({name})\n\n*{alt}.*")
    (out / PAGE).write_text("\n".join(markdown(record, shown)) + "\n")


def markdown(record: dict[str, Any], pictures: list[str]) -> list[str]:
    about = record["metadata"]
    versions = records.words(about, *(key for key in about if key not in ("gpu", "date")))
    lines = [
        f"# {REHEARSAL if record['rehearsal'] else 'RMSNorm on ' + about['gpu']}",
        "",
        f"`python -m bench.record`, {about['date']}: {versions}.",
    ]
    run = measured(record)
    lines += ["", "## Losses", "", *losses(report.comparisons(run))]
    lines += ["", "## Steps", "", "| step | outcome | minutes | |", "|---|---|--:|---|"]
    order = list(STEPS)
    for name, step in sorted(record["steps"].items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)):
        note = step["note"].replace("|", "\\|")
        lines.append(f"| {name}: {step['what']} | {step['status']} | {step['minutes']:.1f} | {note} |")
    for picture in pictures:
        lines += ["", picture]
    for step in record["steps"].values():
        if rows := (step["result"] or {}).get("rows"):
            lines += ["", f"## {step['what'][:1].upper()}{step['what'][1:]}", "", f"| {' | '.join(rows[0])} |", f"|{'--:|' * len(rows[0])}"]
            lines += [f"| {' | '.join('' if cell is None else str(cell) for cell in row.values())} |" for row in rows]
    if run["rows"]:
        lines += ["", "## Every problem", "", report.markdown(run)]
    return lines


def losses(compared: list[Comparison]) -> list[str]:
    """Where a peer is faster, then where a copy is faster by more than the goal allows; the worst first."""
    lines = report.wins_and_losses(compared)
    goals = [(one.of_ceiling, one) for one in compared if one.of_ceiling and one.problem.direction in GOAL]
    below = sorted((entry for entry in goals if entry[0] < GOAL[entry[1].problem.direction]), key=lambda entry: entry[0])
    if goals:
        bounds = " and ".join(f"{goal:.0%} ({direction})" for direction, goal in GOAL.items())
        lines += ["", f"Below {bounds} of the bandwidth of a copy in {len(below)} of {len(goals)} problems."]
        lines += [f"- {one.problem}: {part:.1%}" for part, one in below]
    return lines


def measured(record: dict[str, Any]) -> dict[str, Any]:
    """The runs of the benchmark as one: where they overlap, the last one counts."""
    runs = [*_files(record, "run-quick"), *_files(record, "run-full")]
    last = runs[-1] if runs else {"metadata": record["metadata"], "absent": {}}
    return last | {"rows": [row for run in runs for row in run["rows"]]}


def _files(record: dict[str, Any], kind: str) -> list[dict]:
    return [content for name, content in sorted(record["files"].items()) if name.startswith(f"{kind}-")]


def _bars(record: dict[str, Any]):
    """How much faster than the best peer, problem by problem, losses at the top; and beside it the part of a copy's bandwidth."""
    compared = [one for one in report.comparisons(measured(record)) if one.speedup(one.best_peer)]
    if not compared:
        return None
    compared.sort(key=lambda one: one.speedup(one.best_peer))
    figure = style.figure(11, 1.6 + 0.2 * len(compared))
    ratios, parts = figure.subplots(1, 2, sharey=True)
    places = range(len(compared))
    speedups = [one.speedup(one.best_peer) for one in compared]
    ratios.barh(
        places, [value - 1 for value in speedups], left=1, color=[style.VERMILLION if value < 1 else style.BLUE for value in speedups]
    )
    ratios.set(xlabel="time of the best peer / ours (left of 1: a loss)", xlim=(0, 1.08 * max(1, *speedups)), ylim=(-1, len(compared)))
    ratios.set_yticks(places, [f"{one.problem}: {one.best_peer}" for one in compared], fontsize=7)
    for at, value in zip(places, speedups, strict=True):
        ratios.annotate(f"{value:.2f}", (max(value, 1), at), (3, 0), textcoords="offset points", va="center", fontsize=7)
    below = [one.of_ceiling is not None and one.of_ceiling < GOAL.get(one.problem.direction, 0) for one in compared]
    parts.barh(places, [100 * (one.of_ceiling or 0) for one in compared], color=[style.VERMILLION if low else style.BLUE for low in below])
    parts.axvline(100, color=style.BLACK, linewidth=0.8)
    parts.set(xlabel="% of the bandwidth of a copy\n(vermillion: below the goal)")
    ratios.invert_yaxis()
    for axes in (ratios, parts):
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(f"Losses first: RMSNorm on {record['metadata']['gpu']}, {record['metadata']['date'][:10]}", fontsize=10)
    return figure


def _training(record: dict[str, Any]):
    found = _files(record, "train")
    if not found or not any(run["status"] == "measured" for run in found[-1]["runs"].values()):
        return None
    return training.picture(found[-1])


def _speed(record: dict[str, Any]):
    run = measured(record)
    return report.picture(run) if run["rows"] else None


def _host(record: dict[str, Any]):
    found = _files(record, "host")
    return host.picture(found[-1]) if found else None


# Files, what draws them, and what they show.
PICTURES = (
    ("losses.png", _bars, "Every problem beside the best peer, and beside a copy, losses first"),
    ("speed.png", _speed, "Speed over the row length with a copy as the ceiling, and the best peer's time by ours; forward and backward"),
    ("training.png", _training, "Losses, time of a step and memory in training"),
    ("host.png", _host, "The host's time per call"),
)


def _mark(figure) -> None:
    title = figure.get_suptitle()
    figure.suptitle(f"{REHEARSAL}\n{title}", fontsize=10, color=style.VERMILLION)
    figure.text(0.5, 0.5, "REHEARSAL", ha="center", va="center", rotation=25, fontsize=70, alpha=0.12, color=style.VERMILLION, zorder=9)
