"""`python -m triton_rmsnorm`: versions and device, how the kernels are configured, and whether they compute what they should.

Forward and backward are compared with fp64. The table shows what part of the error budget (triton_rmsnorm.testing) the worst element takes;
the exit status is 1 if any takes more. fp64 itself is left to the tests, which compute with more digits.
"""

import os
import platform
import sys

import torch
import triton

import triton_rmsnorm
from triton_rmsnorm import testing
from triton_rmsnorm.reference import Inputs, Spec
from triton_rmsnorm.runtime import config as tuning
from triton_rmsnorm.runtime import launch

EPS = 1e-6
PROBLEMS = [  # dtypes of x and of the weight, rows, columns: many rows per tile, one, and rows longer than a tile
    (torch.float32, torch.float32, 199, 4096),
    (torch.float16, torch.float16, 199, 4096),
    (torch.bfloat16, torch.bfloat16, 199, 4096),
    (torch.bfloat16, torch.float32, 199, 4096),
    (torch.float32, torch.bfloat16, 199, 4096),
    (torch.float32, torch.float32, 199, 64),
    (torch.float32, torch.float32, 199, 1000),
    (torch.float32, torch.float32, 19, 10000),
    (torch.float32, torch.float32, 5, 20000),
]
CONFIGURED = (64, 512, 4096, 8192, 16384, 32768, 131072)


def main() -> int:
    if not torch.cuda.is_available() and not launch.INTERPRETED and os.environ.get("TRITON_INTERPRET") != "1":
        print("No GPU is found, so Triton's interpreter is switched on (TRITON_INTERPRET=1).", flush=True)
        # By now Triton is imported, and it reads the variable only then.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"TRITON_INTERPRET": "1"})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(describe(device))
    if not launch.runs_on(torch.empty(0, device=device)):
        print("FAILED: the kernels run neither on a GPU nor in the interpreter.")
        return 1

    print("\nConfigurations for bfloat16, chosen by the row length N:\n")
    here = launch.device_of(device)
    print(configurations(here))
    if launch.INTERPRETED:
        print("\nand on an sm_90 GPU with Triton 3.9 or newer:\n")
        print(configurations(tuning.SM_90))

    print("\nLargest errors against fp64, as parts of what is allowed (2 x torch's own + 1 unit in the last place):\n")
    lines, failed = [], 0
    for dtype, weight_dtype, rows, columns in PROBLEMS:
        parts = errors(dtype, weight_dtype, rows, columns, device)
        passed = all(part <= 1 for part in parts)  # NaN fails
        failed += not passed
        shown = [f"{part:.2f}" for part in parts]
        lines.append((_name(dtype), _name(weight_dtype), rows, columns, *shown, "ok" if passed else "FAILED"))
    print(table(("x", "weight", "rows", "N", "y", "dx", "dw", ""), lines))
    print(f"\n{f'FAILED: {failed} of {len(PROBLEMS)}' if failed else f'All {len(PROBLEMS)} passed'}.")
    return 1 if failed else 0


def describe(device: torch.device) -> str:
    """Versions and device."""
    lines = [
        f"triton_rmsnorm {triton_rmsnorm.__version__}, torch {torch.__version__}, triton {triton.__version__}, "
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    ]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        runtime = (
            f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}, sm_{properties.major}{properties.minor}"
        )
        lines.append(f"{properties.name}, {properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB, {runtime}")
    if launch.INTERPRETED:
        lines.append("The kernels run in Triton's interpreter: this checks their arithmetic, not what is compiled from them.")
    return "\n".join(lines)


def configurations(device: tuning.Device) -> str:
    """The configurations chosen for rows of some lengths on `device`."""
    rows = []
    for n in CONFIGURED:
        for direction in ("forward", "backward"):
            config = tuning.analytic(tuning.Key(direction, n, 2, 2), device)
            tile = f"{config.block_m} x {config.block_n}"
            numbers = (config.num_warps, config.num_ctas, config.num_stages, config.programs)
            rows.append((n if direction == "forward" else "", direction, tile, *numbers))
    return table(("N", "kernel", "tile", "warps", "ctas", "stages", "programs"), rows)


def errors(dtype: torch.dtype, weight_dtype: torch.dtype, rows: int, columns: int, device: torch.device) -> tuple[float, ...]:
    """The largest errors of y, dx and dw of a random problem, as parts of the error budget."""
    torch.manual_seed(0)
    inputs = Inputs(testing.draw((rows, columns), dtype, device), testing.draw((columns,), weight_dtype, device))
    dy = testing.draw((rows, columns), dtype, device)
    results = testing.run(lambda x, weight, *_: triton_rmsnorm.rms_norm(x, weight.shape, weight, EPS), inputs, dy)
    parts = testing.parts_of_budget(results, testing.expected(inputs, dy, Spec((columns,), EPS)))
    return parts["y"], parts["dx"], parts["dweight"]


def table(header: tuple, rows: list[tuple]) -> str:
    """Columns side by side: numbers to the right, words to the left."""
    cells = [tuple(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    words = [any(character.isalpha() for row in cells[1:] for character in row[i]) for i in range(len(header))]
    justified = (
        [cell.ljust(width) if word else cell.rjust(width) for cell, width, word in zip(row, widths, words, strict=True)] for row in cells
    )
    return "\n".join("  ".join(row).rstrip() for row in justified)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
