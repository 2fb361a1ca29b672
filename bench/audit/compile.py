"""What Triton's compiler makes of a launch for a GPU that is not there: registers, spills, shared memory, accesses, instructions.

A launch is specialized by the functions that Triton's JIT uses itself, for the tensors that were recorded.
"""

import re
import subprocess
import tempfile
from math import gcd, inf, prod
from pathlib import Path
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from bench.audit.machine import Access, Work, accesses, narrow_products, work
from bench.audit.record import DEVICES, rows, tensors
from triton_rmsnorm.runtime.config import Device
from triton_rmsnorm.runtime.launch import Recorded


class Target(NamedTuple):
    """A GPU to compile for, and what one of its SMs has. Every SM here has four schedulers with 512 registers for each lane of a warp."""

    device: Device
    gpu: GPUTarget
    warps: int
    shared: int  # bytes
    reserved: int  # bytes of shared memory that each thread block takes besides its own
    latency_bytes: int  # bandwidth x latency / SMs: bytes that must be in flight to keep the memory busy
    l2: int  # bytes, of all SMs together


TARGETS = {
    # A100 80 GB: 1.7 TB/s x 700 ns; H200: 4.3 TB/s x 800 ns; B200: 7 TB/s x 900 ns; MI300X: 4.3 TB/s x 1000 ns
    "sm_80": Target(DEVICES["sm_80"], GPUTarget("cuda", 80, 32), 64, 164 << 10, 1024, 1_700_000 * 700 // 108_000, 40 << 20),
    "sm_90": Target(DEVICES["sm_90"], GPUTarget("cuda", 90, 32), 64, 228 << 10, 1024, 4_300_000 * 800 // 132_000, 50 << 20),
    "sm_100": Target(DEVICES["sm_100"], GPUTarget("cuda", 100, 32), 64, 228 << 10, 1024, 7_000_000 * 900 // 148_000, 126 << 20),
    "gfx942": Target(DEVICES["gfx942"], GPUTarget("hip", "gfx942", 64), 32, 64 << 10, 0, 4_300_000 * 1000 // 304_000, 32 << 20),
}
_REGISTERS_PER_LANE = 512
_SCHEDULERS = 4
_THREAD_BLOCKS = 32  # that an SM can hold
REGISTER_UNIT = 8  # registers per thread are allocated in multiples


class Code(NamedTuple):
    """What the compiler made of a kernel."""

    registers: int  # per thread
    spilled: int  # bytes per thread
    shared: int  # bytes per thread block
    accesses: list[Access]  # to global memory
    work: Work
    narrow_products: list[str]  # multiplications whose result may need more than 32 bits


class Kernel(NamedTuple):
    """What is known of one launch."""

    name: str
    step: str
    block_m: int
    block_n: int
    num_warps: int
    num_ctas: int
    grid: tuple[int, int, int]
    registers: int  # per thread
    spilled: int  # bytes per thread
    shared: int  # bytes per thread block
    widths: dict[str, int]  # narrowest access to rows in bytes, by the name of the pointer
    aligned: dict[str, int]  # what it could be: 16, or less where rows are less aligned
    async_copies: int  # instructions in the code
    persistent: bool  # a program works on several tiles
    resident: int  # thread blocks that an SM can hold
    per_sm: float  # thread blocks that it is given; a program per tile is as many as there are rows for
    in_flight: int  # bytes of rows that an SM has asked for and not received
    per_element: float  # instructions per element of a tile
    narrow_products: list[str]

    @property
    def warps(self) -> int:
        """Resident warps per SM: with as many thread blocks as fit, or as there are."""
        return int(min(self.resident, self.per_sm) * self.num_warps)


def inspect(recorded: Recorded, target: Target) -> Kernel:
    """Compiles a launch for `target` and reads what came out."""
    launch, row_tensors = recorded.launch, rows(recorded)
    values, options = launch.values, launch.options
    given = tensors(recorded)
    code = read(compile_for(launch.kernel, [*recorded.pointers.values(), *launch.arguments], options, target.gpu), list(given))
    per_sm = inf if recorded.step in ("forward", "c1") else prod(launch.grid) * options["num_ctas"] / target.device.num_sms
    columns = min(values["BLOCK_N"], values.get("N", values["BLOCK_N"]))
    loaded = {access.pointer for access in code.accesses if access.kind != "store"} & {*row_tensors}
    tile = sum(values["BLOCK_M"] * columns * row_tensors[name].itemsize for name in loaded)
    prefetched = any(access.kind == "async" and access.pointer in row_tensors for access in code.accesses)
    fit = resident(code, options["num_warps"], target)
    return Kernel(
        name=launch.kernel.__name__,
        step=recorded.step,
        block_m=values["BLOCK_M"],
        block_n=values["BLOCK_N"],
        num_warps=options["num_warps"],
        num_ctas=options["num_ctas"],
        grid=launch.grid,
        registers=code.registers,
        spilled=code.spilled,
        shared=code.shared,
        widths={name: min(access.width for access in code.accesses if access.pointer == name) for name in row_tensors},
        aligned={name: alignment(tensor, columns) for name, tensor in row_tensors.items()},
        async_copies=sum(access.kind == "async" for access in code.accesses),
        persistent=values.get("M", 0) > launch.grid[0] * values["BLOCK_M"],
        resident=fit,
        per_sm=per_sm,
        in_flight=int(tile // options["num_ctas"] * (values["NUM_STAGES"] - 1 if prefetched else 1) * min(fit, per_sm)),
        per_element=per_element(code, row_tensors),
        narrow_products=code.narrow_products,
    )


def alignment(tensor: Tensor, columns: int) -> int:
    """Bytes by which an access to rows of `columns` columns, side by side, can be aligned; at most 16."""
    starts = [stride * tensor.itemsize for size, stride in zip(tensor.shape[:-1], tensor.stride(), strict=False) if size > 1]
    return gcd(16, tensor.storage_offset() * tensor.itemsize, columns * tensor.itemsize, *starts)


def resident(code: Code, num_warps: int, target: Target) -> int:
    """Thread blocks that an SM can hold at once."""
    warps = _SCHEDULERS * min(_REGISTERS_PER_LANE // allocated(code.registers), target.warps // _SCHEDULERS)
    return min(_THREAD_BLOCKS, warps // num_warps, target.shared // max(1, code.shared + target.reserved))


def allocated(registers: int) -> int:
    """Registers per thread that the hardware sets aside."""
    return -(-registers // REGISTER_UNIT) * REGISTER_UNIT


def per_element(code: Code, row_tensors: dict[str, Tensor]) -> float:
    """Instructions per element of a tile."""
    stored, loaded = (
        {access.pointer for access in code.accesses if access.pointer in row_tensors and (access.kind == "store") == store}
        for store in (True, False)
    )
    moved, names = (code.work.stored, stored) if stored else (code.work.loaded, loaded)
    if not code.work.loops:  # what concerns rows is known exactly, times the loops that the assembler unrolled
        alike = [access for access in code.accesses if (access.kind == "store") == bool(stored)]
        copies = round(moved / sum(access.width for access in alike))
        moved = max(1, copies) * sum(access.width for access in alike if access.pointer in names)
    return round(code.work.instructions * sum(row_tensors[name].itemsize for name in names) / moved, 1)


def compile_for(kernel: triton.JITFunction, arguments: list, options: dict[str, Any], gpu: GPUTarget) -> CompiledKernel:
    """A kernel compiled for `gpu` as a call with these arguments and options would be."""
    backend = make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {**options, "debug": False}
    if gpu.backend == "hip":
        options.pop("maxnreg", None)  # a launch on an AMD GPU has none
    bound, specialization, _ = bind(*arguments, **options)
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    return triton.compile(ASTSource(kernel, signature, constexprs, attributes), target=gpu, options=parsed.__dict__)


def read(compiled: CompiledKernel, pointers: list[str]) -> Code:
    """What a compiled kernel takes and does; `pointers` are the names of its pointers that are not None, in order."""
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{key}: +(\d+)", code)[1]) for key in ("vgpr_count", "private_segment_fixed_size"))
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "--dump-resource-usage", "--dump-sass", file.name]
            code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, spilled = (int(re.search(rf"{key}:(\d+)", code)[1]) for key in ("REG", "STACK"))
    return Code(
        registers,
        spilled,
        compiled.metadata.shared,
        accesses(compiled.asm["llir"], pointers),
        work(code),
        narrow_products(compiled.asm["ttir"]),
    )
