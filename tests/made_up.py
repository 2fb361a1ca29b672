"""Results of bench.run that nobody measured, for tests of what is made of them."""

from bench.problem import Problem, rows


def timed(problem: Problem, provider: str, us: float, **fields) -> dict:
    """A row of bench.run."""
    timing = {"us": us, "low_us": us - 1, "high_us": us + 1, "calls": 9, "gb_per_s": problem.bytes / us / 1000}
    about = {"problem": problem._asdict(), "provider": provider, "bytes": problem.bytes, "status": "measured", "note": ""}
    return {**about, **timing, **fields}


LARGE = [Problem(rows(n), n, direction) for n in (1024, 4096) for direction in ("forward", "backward")]


def run_of(*rows: dict) -> dict:
    """A result of bench.run."""
    metadata = {"gpu": "none", "torch": "2", "triton": "3", "commit": "c", "date": "2026-01-01T00:00:00+00:00"}
    return {"suite": "quick", "metadata": metadata, "absent": {"QuACK": "ImportError: none"}, "rows": list(rows)}
