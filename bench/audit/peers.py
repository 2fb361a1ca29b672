"""`python -m bench.audit --peers`: kernels of Liger and flash-linear-attention compiled for the same problems as ours, side by side.

Their functions are called with tensors that have no data, and what they would launch is compiled. Of an autotuned kernel the configuration
counts that spills least, and of several the one with the fewest instructions per element.
"""

from itertools import product
from typing import Any, NamedTuple
from unittest import mock

from rich import box
from rich.table import Table
from torch import Tensor
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from bench.audit.compile import TARGETS, Target, compile_for, inspect, per_element, read, resident
from bench.audit.record import calls, launches
from bench.audit.rows import ROWS, in_processes
from bench.problem import Problem
from bench.providers import OURS, PROVIDERS, UnsupportedError, absent

PEERS = ("Liger", "fla")
LENGTHS = (256, 1024, 4096, 8192, 16384)


class Figures(NamedTuple):
    """What a kernel takes, and what it has to hide the latency of memory with."""

    registers: int  # per thread
    spilled: int  # bytes per thread
    warps: int  # resident per SM, with as many thread blocks as it takes
    in_flight: int  # bytes of rows per SM
    per_element: float  # instructions


class Call(NamedTuple):
    """A launch of somebody's kernel."""

    kernel: JITFunction
    arguments: tuple
    options: dict[str, Any]  # also arguments that are passed by name

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = {**dict(zip(self.kernel.arg_names, self.arguments, strict=False)), **self.options}
        return {name: named[name] for name in self.kernel.arg_names if isinstance(named.get(name), Tensor)}


def compare_all(target: str, jobs: int | None = None) -> list[tuple[Problem, dict[str, Figures | str]]]:
    """Problems, and figures by provider or why there are none."""
    kinds = product(("forward", "backward"), ("plain", "residual", "gate"), LENGTHS)
    problems = [Problem(ROWS, n, direction, variant) for direction, variant, n in kinds]
    compared = in_processes(compare, [(target, problem) for problem in problems], jobs, "compiling", TRITON_INTERPRET=None)
    return list(zip(problems, compared, strict=True))


def compare(task: tuple[str, Problem]) -> dict[str, Figures | str]:
    target, problem = TARGETS[task[0]], task[1]
    (main,) = (recorded for recorded in launches(problem, target.device) if recorded.step == problem.direction)
    kernel = inspect(main, target)
    found: dict[str, Figures | str] = {
        OURS: Figures(kernel.registers, kernel.spilled, kernel.warps, kernel.in_flight, kernel.per_element),
    }
    missing = absent()
    for name in PEERS:
        if name in missing:
            found[name] = missing[name]
            continue
        try:
            candidates = [_figures(call, problem, target) for call in _recorded(name, problem)]
            found[name] = min(candidates, key=lambda figures: (figures.spilled, figures.per_element))
        except UnsupportedError as error:
            found[name] = str(error)
    return found


def _recorded(name: str, problem: Problem) -> list[Call]:
    """What a provider would launch for a problem: one kernel, in all configurations among which it tunes itself."""
    found: list[Call] = []

    def launch(kernel, *arguments, grid, warmup=False, **options):
        found.append(Call(kernel, arguments, options))

    def tune(tuner, *arguments, **options):
        for config in tuner.configs:
            tuner.fn.run(*arguments, **options, **config.all_kwargs())

    with mock.patch.object(JITFunction, "run", launch), mock.patch.object(Autotuner, "run", tune):
        calls(problem, PROVIDERS[name].norm(problem), found)
    return found


def _figures(call: Call, problem: Problem, target: Target) -> Figures:
    rows = {name: tensor for name, tensor in call.tensors.items() if tensor.numel() == problem.m * problem.columns}
    compiled = compile_for(call.kernel, list(call.arguments), call.options, target.gpu)
    code = read(compiled, list(call.tensors))
    num_warps = compiled.metadata.num_warps
    blocks = resident(code, num_warps, target)
    loaded = sum(access.width for access in code.accesses if access.kind != "store" and access.pointer in rows)
    threads = 32 * num_warps * blocks
    return Figures(code.registers, code.spilled, num_warps * blocks, loaded * threads, per_element(code, rows))


def table(target: str, results: list[tuple[Problem, dict[str, Figures | str]]]) -> Table:
    """A line per problem and provider, with figures or why there are none."""
    columns = ("problem", "provider", "registers", "spilled", "warps per SM", "KB in flight", "instructions per element")
    found = Table(*columns, title=f"{target}, ours and others", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for problem, figures in results:
        for name, of in figures.items():
            cells = [of] if isinstance(of, str) else [*map(str, of[:3]), f"{of.in_flight / 1024:.0f}", f"{of.per_element:.1f}"]
            found.add_row(str(problem) if name == OURS else "", name, *cells)
    return found
