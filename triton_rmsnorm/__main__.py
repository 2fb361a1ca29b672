"""`python -m triton_rmsnorm`: what is here, how the kernels are configured, and whether they compute what they should.

Forward and backward are compared with fp64. An error may be twice that of torch's own operation, before torch rounds to half precision,
plus one unit in the last place; the table shows what part of this the worst element takes. The exit status is 1 if any takes more.
fp64 itself is left to the tests, which calculate with more digits.
"""

import os
import platform
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

import triton_rmsnorm
from triton_rmsnorm import reference
from triton_rmsnorm.runtime import config as tuning
from triton_rmsnorm.runtime import launch

EPS = 1e-6
DTYPES = [  # of x and dy, and of the weight
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
]
SIZES = [(199, 64), (199, 1000), (19, 10000), (5, 20000)]  # rows, columns: many rows a tile, one, and rows that fit none
CONFIGURED = (64, 512, 4096, 8192, 16384, 32768, 131072)


def main() -> int:
    if not torch.cuda.is_available() and not launch.INTERPRETED and os.environ.get("TRITON_INTERPRET") != "1":
        print("No GPU is found, so Triton's interpreter is switched on (TRITON_INTERPRET=1).", flush=True)
        # By now Triton is imported, and it reads the variable only then.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"TRITON_INTERPRET": "1"})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(describe(device))
    if not launch.runs_on(device):
        print("FAILED: the kernels run neither on a GPU nor in the interpreter.")
        return 1

    print("\nConfigurations for bfloat16, chosen by the row length N:\n")
    here = launch.device_of(device)
    print(configurations(here))
    if launch.INTERPRETED:
        print("\nand on an sm_90 GPU with Triton 3.9 or newer:\n")
        print(configurations(tuning.SM_90))

    print("\nLargest errors against fp64, as parts of what is allowed (2 x torch's own + 1 unit in the last place):\n")
    checked = [
        (*problem, errors(*problem, device))
        for problem in [(*dtypes, 199, 4096) for dtypes in DTYPES] + [(torch.float32, torch.float32, *size) for size in SIZES]
    ]
    failed = [result for *_, result in checked if not all(error <= 1 for error in result)]  # NaN fails
    print(
        table(
            ("x", "weight", "rows", "N", "y", "dx", "dw", ""),
            [
                (_name(x), _name(weight), rows, n, *(f"{error:.2f}" for error in result), "FAILED" if result in failed else "ok")
                for x, weight, rows, n, result in checked
            ],
        )
    )
    print(f"\n{f'FAILED: {len(failed)} of {len(checked)}' if failed else f'All {len(checked)} passed'}.")
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


def errors(dtype: torch.dtype, weight_dtype: torch.dtype, rows: int, columns: int, device: torch.device) -> tuple[float, float, float]:
    """The largest errors of y, dx and dw of a random problem, as parts of what is allowed."""
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, rows, columns, generator=generator).to(device, dtype)
    weight = torch.randn(columns, generator=generator).to(device, weight_dtype)
    ours = results(triton_rmsnorm.rms_norm, x, weight, dy)
    theirs = results(F.rms_norm, x.float(), weight.float(), dy.float())
    exact = results(_reference, x.double(), weight.double(), dy.double())
    # A sum over rows has no order of its own: dw may err as much as one row after the other does.
    unit = F.rms_norm(x.float(), weight.shape, eps=EPS)
    by_row = sum(dy_row * x_hat for dy_row, x_hat in zip(dy.float(), unit, strict=True))
    return (
        _part_of_budget(ours[0], exact[0], theirs[0]),
        _part_of_budget(ours[1], exact[1], theirs[1]),
        _part_of_budget(ours[2], exact[2], theirs[2], by_row),
    )


def results(rms_norm: Callable, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dw."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = rms_norm(x, weight.shape, weight, EPS)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def _reference(x: Tensor, normalized_shape: torch.Size, weight: Tensor, eps: float) -> Tensor:
    return reference.forward(reference.Inputs(x, weight), reference.Spec(normalized_shape, eps)).y


def _part_of_budget(ours: Tensor, exact: Tensor, *others: Tensor) -> float:
    info = torch.finfo(ours.dtype)
    exponent = torch.frexp(exact.abs().clamp(min=info.smallest_normal)).exponent
    ulp = torch.ldexp(torch.full_like(exact, info.eps), exponent - 1)
    budget = 2 * max((other.double() - exact).abs().max() for other in others) + ulp
    return ((ours.double() - exact).abs() / budget).max().item()


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
