"""What Triton's compiler makes of a launch for a GPU that is not there: registers, spills, shared memory, widths of accesses, occupancy.

A launch is specialized by the functions that Triton's JIT uses itself, for the tensors that were recorded (aligned to 16 bytes).
"""

import re
import subprocess
import tempfile
from math import gcd, prod
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from bench.launches import DEVICES, Problem, Recorded, launches
from triton_rmsnorm.runtime import config as tuning


class Target(NamedTuple):
    """A GPU to compile for, and what one of its SMs has. Every SM here has four schedulers with 512 registers for each lane of a warp."""

    device: tuning.Device
    gpu: GPUTarget
    warps: int
    shared: int  # bytes
    reserved: int  # bytes of shared memory that each thread block takes besides its own
    latency_bytes: int  # bandwidth x latency / SMs: what must be on its way to keep the memory busy


TARGETS = {
    # A100 80 GB: 1.7 TB/s x 700 ns; H200: 4.3 TB/s x 800 ns; B200: 7 TB/s x 900 ns; MI300X: 4.3 TB/s x 1000 ns
    "sm_80": Target(DEVICES["sm_80"], GPUTarget("cuda", 80, 32), 64, 164 * 1024, 1024, 1_700_000 * 700 // 108_000),
    "sm_90": Target(DEVICES["sm_90"], GPUTarget("cuda", 90, 32), 64, 228 * 1024, 1024, 4_300_000 * 800 // 132_000),
    "sm_100": Target(DEVICES["sm_100"], GPUTarget("cuda", 100, 32), 64, 228 * 1024, 1024, 7_000_000 * 900 // 148_000),
    "gfx942": Target(DEVICES["gfx942"], GPUTarget("hip", "gfx942", 64), 32, 64 * 1024, 0, 4_300_000 * 1000 // 304_000),
}
_REGISTERS_PER_LANE = 512
_SCHEDULERS = 4


class Kernel(NamedTuple):
    """What is known of one launch."""

    name: str
    block_m: int
    block_n: int
    num_warps: int
    num_ctas: int
    num_stages: int  # 1: no prefetch
    grid: tuple[int, int, int]
    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a thread block
    widths: dict[str, int]  # narrowest access to rows in bytes, by the name of the pointer
    aligned: dict[str, int]  # what it could be: 16, or less where rows are less aligned
    async_copies: int  # instructions in the code
    persistent: bool
    resident: int  # thread blocks that an SM can hold
    per_sm: float  # thread blocks that it is given
    in_flight: int  # bytes of rows on their way to an SM


def kernels(problem: Problem, rows: int, target: Target) -> list[Kernel]:
    """The launches of a problem, compiled."""
    return [inspect(recorded, target) for recorded in launches(problem, rows, target.device).recorded]


def inspect(recorded: Recorded, target: Target) -> Kernel:
    """Compiles a launch for `target` and reads what came out."""
    launch, tensors, rows = recorded.launch, recorded.tensors, recorded.rows
    values, options = launch.values, launch.options
    compiled = compile_for(recorded, target.gpu)
    registers, spilled = _registers(compiled)
    found = accesses(compiled.asm["llir"], list(tensors))

    warps = _SCHEDULERS * min(_REGISTERS_PER_LANE // _round_up(registers, 8), target.warps // _SCHEDULERS)
    resident = min(warps // options["num_warps"], target.shared // max(1, compiled.metadata.shared + target.reserved))
    per_sm = prod(launch.grid) * options["num_ctas"] / target.device.num_sms
    columns = min(values["BLOCK_N"], values.get("N", values["BLOCK_N"]))
    tile = sum(values["BLOCK_M"] * columns * rows[name].itemsize for name in {name for name, kind, _ in found if kind != "store"} & {*rows})
    depth = values["NUM_STAGES"] - 1 if any(kind == "async" and name in rows for name, kind, _ in found) else 1
    return Kernel(
        name=launch.kernel.__name__,
        block_m=values["BLOCK_M"],
        block_n=values["BLOCK_N"],
        num_warps=options["num_warps"],
        num_ctas=options["num_ctas"],
        num_stages=values.get("NUM_STAGES", 1),
        grid=launch.grid,
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        widths={name: min(width for other, _, width in found if other == name) for name in rows},
        aligned={name: gcd(16, tensor.stride(0) * tensor.itemsize, columns * tensor.itemsize) for name, tensor in rows.items()},
        async_copies=sum(kind == "async" for _, kind, _ in found),
        persistent="NUM_STAGES" in values,
        resident=resident,
        per_sm=per_sm,
        in_flight=int(tile // options["num_ctas"] * depth * min(resident, per_sm)),
    )


def compile_for(recorded: Recorded, gpu: GPUTarget) -> CompiledKernel:
    launch, tensors = recorded
    kernel, backend = launch.kernel, make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    pointers = [tensors.get(name) for name in kernel.arg_names if name not in launch.values]
    options = {**launch.options, "debug": False}
    if gpu.backend == "hip":
        options.pop("maxnreg", None)  # a launch on an AMD GPU has none
    bound, specialization, _ = bind(*pointers, *launch.arguments, **options)
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    return triton.compile(ASTSource(kernel, signature, constexprs, attributes), target=gpu, options=parsed.__dict__)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _registers(compiled: CompiledKernel) -> tuple[int, int]:
    """Registers and spilled bytes a thread."""
    if "amdgcn" in compiled.asm:
        keys = ("vgpr_count", "private_segment_fixed_size")
        return tuple(int(re.search(rf"\.{key}: +(\d+)", compiled.asm["amdgcn"])[1]) for key in keys)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))


_ASM = re.compile(r'asm sideeffect "[^"]*?\b(ld\.global|st\.global|cp\.async\.c[ag]\.shared\.global)([^"]*)"(.*)')
_BUFFER = re.compile(r"@llvm\.amdgcn\.raw\.ptr\.buffer\.(load|store)\.(\w+)\((.*)")
_PLAIN = re.compile(r"\b(load|store) (<[^>]*>|\w+)(?: %[\w.]+)?, (ptr addrspace\(1\).*)")
_POINTER = re.compile(r"\s*(%[\w.]+) = (?:getelementptr|phi|select|freeze|addrspacecast|.*make\.buffer\.rsrc)\b(.*)")
_REGISTER = re.compile(r"%[\w.]+")
_KINDS = {"ld.global": "load", "st.global": "store", "load": "load", "store": "store"}


def accesses(llir: str, pointers: list[str]) -> list[tuple[str, str, int]]:
    """Accesses to global memory in LLVM IR: (name of the kernel's pointer, "load", "store" or "async", bytes)."""
    lines = llir.splitlines()
    parameters = re.findall(r"ptr addrspace\(1\)[^%]*(%[\w.]+)", next(line for line in lines if line.startswith("define")))
    origin = dict(zip(parameters, pointers, strict=False))  # which parameter a pointer was computed from; the last ones are Triton's own
    computed = [match.groups() for match in map(_POINTER.match, lines) if match]
    known = 0
    while known < len(origin):  # again, until loops have gone round
        known = len(origin)
        for register, operands in computed:
            for operand in _REGISTER.findall(operands):
                if operand in origin:
                    origin[register] = origin[operand]

    found = []
    for line in lines:
        if match := _ASM.search(line):
            instruction, suffix, operands = match.groups()
            kind = _KINDS.get(instruction, "async")
            if kind == "async":
                width = int(re.search(r"\], \[.*?\], (\w+)", suffix)[1], 16)
            else:
                lanes, bits = re.search(r"(?:\.v(\d+))?\.[bfsu](\d+) ", suffix).groups()
                width = int(lanes or 1) * int(bits) // 8
        elif match := _BUFFER.search(line) or _PLAIN.search(line):
            kind, type_, operands = match.groups()
            width = _type_bytes(type_)
        else:
            continue
        found += [(origin[register], kind, width) for register in _REGISTER.findall(operands) if register in origin]
    return found


def _type_bytes(name: str) -> int:
    """Of v4i32, <8 x bfloat>, float, i16, ..."""
    lanes, vector, kind, bits = re.fullmatch(r"(?:<(\d+) x |v(\d+))?([a-z]+)(\d*)>?", name).groups()
    return int(lanes or vector or 1) * (int(bits) // 8 if bits else {"half": 2, "bfloat": 2, "float": 4, "double": 8}[kind])
