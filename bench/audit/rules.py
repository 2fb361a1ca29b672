"""What the audit holds compiled code to, with every exception and its reason, and the frozen figures that may not get worse."""

import json
from collections.abc import Iterable
from math import inf

import triton

from bench import records
from bench.audit.compile import TARGETS, allocated
from bench.audit.rows import ROWS, Row
from bench.problem import VARIANTS, Problem

MEMORY = {"forward": 1.02, "backward": 1.05}  # bytes that may be moved, as multiples of the minimum


def read_once(target: str, problem: Problem) -> int:
    """The largest number of columns for which rows must be read once.

    It is 131072 where there are clusters and 16384 where there are none (sm_80, gfx942, Triton before 3.9), and half of that in two cases
    in which a row would only fit by spilling (compiled):

    - the backward in fp64: 120 bytes per thread at 131072 columns in 16 thread blocks;
    - a backward that writes a gradient besides dx, where one NVIDIA thread block holds a row: 180 to 440 bytes per thread at 16384 columns.
    """
    device, variant = TARGETS[target].device, VARIANTS[problem.variant]
    one_block = device.backend == "cuda" and device.max_ctas == 1
    two_gradients = variant.gate or problem.own_dresidual
    halved = problem.direction == "backward" and (problem.dtype == "fp64" or (two_gradients and one_block))
    return (131072 if device.max_ctas > 1 else 16384) // (2 if halved else 1)


def may_spill(target: str, problem: Problem) -> float:
    """The largest number of bytes per thread that may be spilled.

    On sm_90 and sm_100 it is 0, except for rows where a second read is assumed to cost more (not measured):

    - without clusters (Triton before 3.9), the longer half of those that are to be read once, and longer ones;
    - with clusters, the backward of a gate around which values are rounded, beyond 65536 columns.
    """
    once, variant = read_once(target, problem), VARIANTS[problem.variant]
    if target not in ("sm_90", "sm_100"):
        return inf
    if TARGETS[target].device.max_ctas == 1:
        return 192 if problem.n > once // 2 else 0
    rounded_gate = problem.direction == "backward" and variant.gate and "x_hat_dtype" in variant.knobs
    return 176 if rounded_gate and once // 2 < problem.n <= once else 0


def broken(row: Row) -> list[str]:
    """What is wrong with a row, in words."""
    if row.error:
        return [row.error]
    problem = row.problem
    found = []
    for kernel in row.kernels:
        if kernel.spilled > may_spill(row.target, problem):
            found.append(f"{kernel.name} spills {kernel.spilled} bytes per thread")
        for name, width in kernel.widths.items():
            if width < kernel.aligned[name]:
                found.append(f"{kernel.name} accesses {name} by {width} bytes, not {kernel.aligned[name]}")
        wanted = kernel.per_sm if kernel.persistent and kernel.grid[0] > 1 else 1  # one for each block of columns there must be
        if kernel.resident < wanted:
            found.append(f"{kernel.name} has {kernel.per_sm:.2f} thread blocks per SM, of which {kernel.resident} fit")
        if kernel.shared > TARGETS[row.target].device.shared_memory:
            found.append(f"{kernel.name} takes {kernel.shared} bytes of shared memory")
        if kernel.narrow_products:
            found.append(f"{kernel.name} has 32-bit offsets: {', '.join(kernel.narrow_products)}")
    if problem.n <= read_once(row.target, problem):
        found += [f"{name} is read {times:.3f} times" for name, times in row.reads.items() if times != 1 and not row.reads_from_cache]
        limit = MEMORY[problem.direction]
        if row.memory > limit * row.minimum:
            found.append(f"moves {row.memory / row.minimum:.4f} of the minimum, more than {limit}")
    if row.depends_on_rows:
        found.append("the configuration depends on the number of rows")
    return found


def figures(rows: Iterable[Row]) -> dict[str, dict]:
    """What is frozen of each row: what each kernel takes, and what all of them move."""
    return {
        row.key: {
            "registers": [kernel.registers for kernel in row.kernels],
            "spilled": [kernel.spilled for kernel in row.kernels],
            "shared": [kernel.shared for kernel in row.kernels],
            "memory": row.memory,
            "cache": row.cache,
            "minimum": row.minimum,
            "warps": row.main.warps if row.main else 0,
            "in_flight": row.main.in_flight if row.main else 0,
            "per_element": row.main.per_element if row.main else 0,
        }
        for row in rows
    }


_COMPARED = {"registers": allocated, "spilled": int, "shared": int, "memory": int}  # figures and what counts of them


def frozen_path():
    """A file for each version of Triton, since others compile to other registers."""
    return records.RESULTS / f"audit-{triton.__version__}.json"


def freeze(rows: Iterable[Row]) -> None:
    about = {name: value for name, value in records.metadata().items() if name in ("commit", "changed", "date")}
    records.write(frozen_path(), {"triton": triton.__version__, **about, "rows": ROWS, "figures": figures(rows)}, lines="figures")


def frozen() -> dict[str, dict]:
    """The figures frozen for the Triton that is installed; none if there is no such file."""
    return json.loads(frozen_path().read_text())["figures"] if frozen_path().exists() else {}


def worse(before: dict[str, dict], now: dict[str, dict]) -> list[str]:
    """Figures of `now` that are larger than `before`, in words; registers as the hardware allocates them. Other rows are ignored."""
    return [
        f"{key}: {name} was {before[key][name]}, is {now[key][name]}"
        for key in before.keys() & now.keys()
        for name, rounded in _COMPARED.items()
        if _larger(now[key][name], before[key][name], rounded)
    ]


def _larger(new: int | list[int], old: int | list[int], rounded) -> bool:
    if isinstance(new, int):
        return rounded(new) > rounded(old)
    if len(new) == len(old):
        return any(rounded(a) > rounded(b) for a, b in zip(new, old, strict=True))
    return rounded(max(new, default=1 << 31)) > rounded(max(old))
