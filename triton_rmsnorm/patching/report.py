"""What `patch` reports."""

from dataclasses import dataclass
from enum import Enum


class Status(str, Enum):
    """What became of modules."""

    REPLACED = "replaced"
    REPLACED_BEFORE = "replaced before"  # by an earlier call
    TO_COME = "to come"  # of a class: instances will be replaced when they are built
    FUSED = "fused"  # layers whose residual add is computed together with a norm
    FUSED_BEFORE = "fused before"
    RECOMPUTED = "recomputed"  # a model whose backward computes the outputs of norms again
    RECOMPUTED_BEFORE = "recomputed before"
    LEFT_ALONE = "left alone"

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Row:
    """Modules of one class with one outcome.

    Args:
        cls: the original class.
        semantics: what they compute; empty if that is not known.
        count: number of modules.
        status: their outcome.
        reason: why they were left alone.
        resembles: whether they are RMS norms, or look like RMS norms.
        names: of the modules in the model.
    """

    cls: type
    semantics: str
    count: int
    status: Status
    reason: str = ""
    resembles: bool = False
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `patch` did and did not do, and why. It prints as a table.

    Args:
        rows: one for all modules of one class with one outcome.
    """

    rows: tuple[Row, ...]

    @property
    def replaced(self) -> int:
        """Modules replaced by this call."""
        return sum(row.count for row in self.rows if row.status == Status.REPLACED)

    @property
    def fused(self) -> int:
        """Layers whose residual add this call took into a norm."""
        return sum(row.count for row in self.rows if row.status == Status.FUSED)

    def __str__(self) -> str:
        if not self.rows:
            return "no RMS norm found"
        lines: list[tuple[str, ...]] = [("class", "semantics", "count", "outcome")]
        for row in self.rows:
            outcome = f"{row.status!s}: {row.reason}" if row.reason else str(row.status)
            lines.append((row.cls.__name__, row.semantics or "-", str(row.count), outcome))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, tuple("-" * width for width in widths))
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


class LeftAloneError(RuntimeError):
    """Why something is left alone.

    Args:
        reason: in words, for the report.
        resembles: it looks like an RMS norm all the same.
        ran: its forward took what an RMS norm takes.
        other: it is a known other norm, such as a LayerNorm.
    """

    def __init__(self, reason: str, resembles: bool = False, ran: bool = True, other: bool = False):
        super().__init__(reason)
        self.resembles, self.ran, self.other = resembles, ran, other


def in_words(error: BaseException) -> str:
    """The type and the message of an error, on one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
