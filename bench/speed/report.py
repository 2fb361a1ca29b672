"""Results of bench.run as Markdown and as a picture: GB/s over N with the ceiling, ours against the best peer, wins and losses.

run = json.loads(records.newest("run").read_text())
print(markdown(run))
picture(run)  # a figure of matplotlib
"""

from statistics import geometric_mean
from typing import NamedTuple

from bench import records, style
from bench.problem import DIRECTIONS, Problem, rows
from bench.providers import CEILING, EAGER, OURS, PROVIDERS

_STYLES = style.styles(*PROVIDERS)


class Comparison(NamedTuple):
    """What was measured of one problem: rows by provider."""

    problem: Problem
    rows: dict[str, dict]

    @property
    def ours(self) -> dict | None:
        return self.rows.get(OURS)

    @property
    def best_peer(self) -> str | None:
        peers = [name for name in self.rows if name not in (OURS, CEILING)]
        return min(peers, key=lambda name: self.rows[name]["us"], default=None)

    def speedup(self, peer: str | None) -> float | None:
        """How many times as fast as `peer` ours is."""
        return self.rows[peer]["us"] / self.ours["us"] if self.ours and peer in self.rows else None

    @property
    def of_ceiling(self) -> float | None:
        return self.speedup(CEILING)


def comparisons(run: dict) -> list[Comparison]:
    """By problem, in the order in which they were measured; of what was measured twice, the last time counts."""
    found: dict[Problem, dict[str, dict]] = {}
    for row in run["rows"]:
        measured = found.setdefault(Problem(**row["problem"]), {})
        if row["status"] == "measured":
            measured[row["provider"]] = row
    return [Comparison(problem, measured) for problem, measured in found.items()]


def markdown(run: dict) -> str:
    """All that was measured, as Markdown: the table, geometric means, wins and losses, what is absent or was not measured and why."""
    compared = comparisons(run)
    lines = [records.words(run["metadata"]), ""]
    lines += ["| problem | ours µs | GB/s | of copy | best peer | its µs | speedup |", "|---|--:|--:|--:|---|--:|--:|"]
    for comparison in compared:
        ours, peer = comparison.ours, comparison.best_peer
        mine = [f"{ours['us']:.1f}", f"{ours['gb_per_s']:.0f}", _percent(comparison.of_ceiling)] if ours else ["", "", ""]
        theirs = [peer, f"{comparison.rows[peer]['us']:.1f}", _times(comparison.speedup(peer))] if peer else ["", "", ""]
        lines.append(f"| {' | '.join([str(comparison.problem), *mine, *theirs])} |")
    for direction in DIRECTIONS:
        lines += _means(direction, [comparison for comparison in compared if comparison.problem.direction == direction])
    lines += wins_and_losses(compared)
    eager = sorted({row["note"] for row in run["rows"] if row["provider"] == EAGER and row["note"]})
    lines += ["", f"{EAGER} took: {', '.join(eager)}"] if eager else []
    reasons = [f"- {name} is absent: {reason}" for name, reason in run["absent"].items()]
    unmeasured: dict[str, list[str]] = {}
    for row in run["rows"]:
        if row["status"] != "measured":
            unmeasured.setdefault(f"{row['provider']}: {row['status']}: {row['note']}", []).append(str(Problem(**row["problem"])))
    reasons += [f"- {reason} ({', '.join(problems)})" for reason, problems in unmeasured.items()]
    return "\n".join([*lines, *(["", "Not measured:", *reasons] if reasons else [])])


def _means(direction: str, compared: list[Comparison]) -> list[str]:
    """Geometric means over the problems of a direction that both sides measured."""
    means = []
    for name in (CEILING, *PROVIDERS):
        ratios = [ratio for comparison in compared if (ratio := comparison.speedup(name))] if name != OURS else []
        if ratios:
            mean = geometric_mean(ratios)
            means.append(f"{_percent(mean)} of the {CEILING}" if name == CEILING else f"{_times(mean)} {name} ({len(ratios)})")
    best = [ratio for comparison in compared if (ratio := comparison.speedup(comparison.best_peer))]
    means += [f"{_times(geometric_mean(best))} the best peer"] if best else []
    return ["", f"Geometric means, {direction}: {', '.join(means)}."] if means else []


def wins_and_losses(compared: list[Comparison]) -> list[str]:
    """How many there are against the best peer, and the losses, the worst first."""
    judged = [comparison for comparison in compared if comparison.ours and comparison.best_peer]
    losses = [comparison for comparison in judged if comparison.speedup(comparison.best_peer) < 1]
    lines = ["", f"Against the best peer: {len(judged) - len(losses)} wins, {len(losses)} losses."]
    for comparison in sorted(losses, key=lambda comparison: comparison.speedup(comparison.best_peer)):
        ours, theirs = comparison.ours, comparison.rows[comparison.best_peer]
        near = ", within the spread" if ours["low_us"] <= theirs["high_us"] else ""
        times = f"{ours['us']:.1f} µs to {theirs['us']:.1f} µs of {comparison.best_peer}"
        lines.append(f"- {comparison.problem}: {_times(comparison.speedup(comparison.best_peer))} ({times}{near})")
    return lines


def _percent(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1%}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def picture(run: dict):
    compared, about = comparisons(run), run["metadata"]
    figure = style.figure(9.8, 7.4)
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for direction, (speeds, ratios) in zip(DIRECTIONS, axes.T, strict=False):
        here = sorted((c for c in compared if c.problem.direction == direction), key=lambda c: c.problem.n)
        plain = [c for c in here if c.problem == Problem(rows(c.problem.n), c.problem.n, direction)]
        for name in (CEILING, *_STYLES):
            points = [(c.problem.n, c.rows[name]["gb_per_s"]) for c in plain if name in c.rows]
            if points:
                look = _STYLES.get(name, {"color": style.BLACK, "linestyle": "--"})
                line = {"linewidth": 2.2, "zorder": 3} if name == OURS else {"linewidth": 1.2, "zorder": 2}
                speeds.plot(*zip(*points, strict=True), label=name, markersize=4, **look, **line)
        for label, marker, chosen in (
            ("plain, bf16, large", "o", plain),
            ("residual", "s", [c for c in here if c.problem.kind == "residual"]),
            ("gate", "^", [c for c in here if c.problem.kind == "gate"]),
            ("other dtypes, slices, few rows", "x", [c for c in here if c.problem.variant == "plain" and c not in plain]),
        ):
            points = [(c.problem.n, ratio) for c in chosen if (ratio := c.speedup(c.best_peer))]
            if points:
                line = {"color": style.VERMILLION} if marker == "o" else {"color": "#404040", "linestyle": ""}
                ratios.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=5, **line)
        ratios.axhline(1, color="black", linewidth=0.8)
        speeds.set(title=f"{direction}: plain, bf16, {rows(4096) * 4096 >> 20} Mi elements", xscale="log")
        ratios.set(xlabel="N (columns)")
        ratios.set_xscale("log", base=2)
        for axis in (speeds, ratios):
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylim(bottom=0)  # which both have, once all is drawn
    axes[0, 0].set_ylabel("GB/s (bytes that have to be moved)")
    axes[1, 0].set_ylabel("best peer's time / ours")
    for axis in axes[:, 0]:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.suptitle(f"RMSNorm on {about['gpu']}, torch {about['torch']}, Triton {about['triton']}, L2 cold, {about['date'][:10]}")
    return figure
