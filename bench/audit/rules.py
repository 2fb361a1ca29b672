"""What the audit holds compiled code to, with every exception and its reason, and the frozen figures that may not get worse."""

import json
from collections.abc import Iterable
from math import inf

import triton

from bench import records
from bench.audit.compile import TARGETS, Kernel, allocated
from bench.audit.rows import ROWS, Row
from bench.problem import VARIANTS, Problem

WARPS = {8192: 24, 131072: 16}  # resident per SM in the forward on sm_90, for up to so many columns


def read_once(target: str, problem: Problem) -> int:
    """The largest number of columns for which rows must be read once from memory.

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


def may_move(target: str, problem: Problem) -> float:
    """Memory traffic as a multiple of the minimum: 1.02 in the forward, 1.05 in the backward.

    A backward of up to 4096 columns may move 1.10 (gfx942: 1.20) of it: an H200 was fastest with several programs per SM, each of which has
    a partial dw (measured). These are still in the L2 when they are summed, but count as memory traffic here. They weigh 1.5 times as much
    where no dx is written.
    """
    if problem.direction == "forward":
        return 1.02
    more = 0.05 if problem.n > 4096 else 0.2 if target == "gfx942" else 0.1
    return 1 + more * (1 if VARIANTS[problem.variant].needs_dx else 1.5)


def may_spill(target: str, problem: Problem) -> float:
    """The largest number of bytes per thread that may be spilled.

    It is 0 on sm_90 and sm_100, but 8 in two kernels for fp32, the forward of 32768 columns and the backward of 256, and in the backward

    - of more than 8192 columns, where a thread holds 64 elements: 200 (640 where rows are not aligned). An H200 was fastest this way, at 85
      to 92 % of a copy (measured for up to 32768 columns);
    - of a gate around which values are rounded, at 4096 columns: 88, since fewer elements per thread would cost more (not measured);
    - of a gate, at 7168 columns: 104 (not measured).

    The other targets have no limit (not measured).
    """
    if target not in ("sm_90", "sm_100"):
        return inf
    if problem.direction == "backward" and problem.n > 8192:
        return 200 if problem.layout == "contiguous" else 640
    if problem.direction == "backward" and problem.kind == "gate":
        return 88 if problem.variant == "gate_rounded" and problem.n > 2048 else 104 if problem.n == 7168 else 0
    return 8 if problem.dtype == "fp32" and (problem.direction, problem.n) in (("forward", 32768), ("backward", 256)) else 0


def instructions(problem: Problem, kernel: Kernel) -> float:
    """The largest number of instructions per element on sm_90, for 1024 to 16384 columns: 12 forward, 15 backward.

    The exceptions:

    - With 16 elements per thread, addresses, masks, sums and the Newton step of rstd weigh more: 15 and 19. An H200 was as fast with them,
      or faster, at 95 to 100 % of a copy (measured, without the Newton step, which is 0.3 to 0.6 of the 15), so instructions are not what
      limits it.
    - A backward of more than 8192 columns has 64 elements per thread and spills, above all where some columns are masked: 20; with
      roundings 23, and 28 with a residual in fp32, whose gradient is a tensor of its own.
    - A residual is one more tensor to load, to round and to store: 18 and 22. Roundings of x_hat or rstd: 16 and 21.
    - A gate takes an exponential and a division: 33 and 44, or 50 where a quarter of the tile is masked; gelu with its erf, and roundings
      around it: 50 and 70. A gate before the norm is activated in both passes over a row that is read in blocks: 44.
    - fp64 has half of the lanes and no fast reciprocal square root: 50 and 50.
    """
    forward = problem.direction == "forward"
    masked = problem.n <= 0.75 * kernel.block_n
    if problem.variant == "gate_rounded":
        return 50 if forward else 70
    if problem.kind == "gate":
        return (44 if problem.variant == "gate_first" and problem.n > 8192 else 33) if forward else 50 if masked else 44
    if "fp64" in (problem.dtype, problem.weight_dtype):
        return 50
    if problem.n > 8192 and not forward:
        return 28 if problem.own_dresidual else 23 if problem.variant.startswith("rounded") or problem.kind == "residual" else 20
    if problem.kind == "residual":
        return 18 if forward else 22
    if problem.variant.startswith("rounded"):
        return 16 if forward else 21
    few = kernel.block_m * kernel.block_n <= 16 * 32 * kernel.num_warps * kernel.num_ctas
    return (15 if forward else 19) if few else (12 if forward else 15)


def hidden_latency(row: Row, kernel: Kernel) -> list[str]:
    """What a kernel lacks to hide the latency of memory.

    It needs, on sm_90, 24 warps per SM in the forward of up to 8192 columns and 16 beyond, and on every target 1.2 times the bytes in
    flight that keep its memory busy; 1.1 times where more than a quarter of a tile is masked (0.95 with an fp32 weight for half-precision
    rows, which takes registers), and 0.7 times on sm_100: the configurations were chosen on an H200, which has little more than half of its
    bandwidth per SM. Not looked at are rows that are not contiguous, fewer than 64 columns, and a backward that 8192 rows do not fill.
    """
    problem, target = row.problem, TARGETS[row.target]
    if problem.layout != "contiguous" or problem.n < 64 or (problem.direction == "backward" and not kernel.persistent):
        return []
    found = []
    wanted = next((warps for columns, warps in WARPS.items() if problem.n <= columns), 0)
    if row.target == "sm_90" and problem.direction == "forward" and kernel.warps < wanted:
        found.append(f"{kernel.name} has {kernel.warps} warps per SM, not {wanted}")
    least = 1.2
    if problem.n < 0.75 * kernel.block_n:
        least = 0.95 if problem.weight_dtype == "fp32" != problem.dtype else 1.1
    if row.target == "sm_100":
        least = 0.7
    if kernel.in_flight < least * target.latency_bytes:
        found.append(f"{kernel.name} has {kernel.in_flight / target.latency_bytes:.2f} of the bytes in flight, not {least}")
    return found


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
    if row.main:
        found += hidden_latency(row, row.main)
        allowed = instructions(problem, row.main)
        if row.target == "sm_90" and 1024 <= problem.n <= 16384 and problem.layout == "contiguous" and row.main.per_element > allowed:
            found.append(f"{row.main.name} takes {row.main.per_element} instructions per element, more than {allowed}")
    if problem.n <= read_once(row.target, problem):
        from_memory = {} if row.reads_from_cache else row.traffic.reads
        found += [f"{name} is read {times:.3f} times" for name, times in from_memory.items() if times != 1]
        limit = may_move(row.target, problem)
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
