"""Compiles every launch for a device that is not there: `python tests/compile_offline.py sm_90 [--all]`, TRITON_INTERPRET not set.

The launches are those of the public functions on meta tensors, as `launch` prepares them for the device; Triton's own `warmup` compiles
them, with a driver that only knows the target. One line a kernel; the exit status is the number of failures.
"""

import argparse
import itertools
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget

from triton_rmsnorm import add_rms_norm, rms_norm, rms_norm_gated
from triton_rmsnorm.runtime import config as tuning
from triton_rmsnorm.runtime import kernels, launch

TARGETS = {
    tuning.SM_80: GPUTarget("cuda", 80, 32),
    tuning.SM_90: GPUTarget("cuda", 90, 32),
    tuning.SM_100: GPUTarget("cuda", 100, 32),
    tuning.GFX942: GPUTarget("hip", "gfx942", 64),
}
ROWS = 8192

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# 3 · 2^k columns leave a quarter of a block masked.
COLUMNS = [1, 2, *(3 * 2**k for k in range(17)), 4096, 16384]
FEW_COLUMNS = [1, 6144, 24576, 49152, 196608]  # test_audit.py compiles bf16 for 64, 1000, 4096, 16384 and 131072


class Driver:
    """As much of Triton's driver as compiling takes."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Pointer:
    """As much of a tensor as compiling takes."""

    def __init__(self, dtype: torch.dtype, address: int):
        self.dtype, self.address = dtype, address

    def data_ptr(self):
        return self.address


def empty(*shape: int, dtype: torch.dtype = BF16, needs_grad: bool = True) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=needs_grad)


def backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


def plain(n: int, dtype: torch.dtype, weight_dtype: torch.dtype | None, **fields) -> None:
    weight = empty(n, dtype=weight_dtype) if weight_dtype else None
    backward(rms_norm(empty(ROWS, n, dtype=dtype), (n,), weight, **fields))


def inputs(n: int, dtype: torch.dtype):
    """What else there is of inputs and wanted gradients, besides row length and dtypes."""
    weight = empty(n, dtype=dtype)
    frozen = weight.detach()
    yield lambda: plain(n, dtype, None)
    yield lambda: backward(rms_norm(empty(ROWS, n, dtype=dtype), (n,), frozen))
    yield lambda: backward(rms_norm(empty(ROWS, n, dtype=dtype, needs_grad=False), (n,), weight))
    yield lambda: backward(rms_norm(empty(64, 128, 3, n, dtype=dtype).transpose(1, 2)[:, 1:], (n,), weight[::1]))
    yield lambda: backward(rms_norm(empty(ROWS, n + 3, dtype=dtype)[:, :n], (n,), empty(2 * n, dtype=dtype)[::2]))


def semantics(n: int, dtype: torch.dtype):
    """What else there is besides a norm and its weight."""
    weight = empty(n, dtype=dtype)
    yield lambda: plain(4 * n, dtype, dtype, group_size=n, weight_offset=1.0)
    yield lambda: plain(n, dtype, FP32, x_hat_dtype=FP16, rstd_dtype=BF16)
    yield lambda: backward(*add_rms_norm(empty(ROWS, n, dtype=dtype), empty(ROWS, n, dtype=FP32), (n,), weight))
    for norm_before_gate in (True, False):
        yield lambda norm_before_gate=norm_before_gate: backward(
            rms_norm_gated(
                empty(ROWS, n, dtype=dtype), empty(ROWS, n, dtype=dtype), (n,), weight, norm_before_gate=norm_before_gate, x_hat_dtype=BF16
            )
        )


def problems(everything: bool):
    dtypes = itertools.product((BF16, FP32, FP64), (None, BF16, FP32, FP64)) if everything else [(BF16, BF16)]
    for (dtype, weight_dtype), n in itertools.product(dtypes, COLUMNS if everything else FEW_COLUMNS):
        yield lambda n=n, dtype=dtype, weight_dtype=weight_dtype: plain(n, dtype, weight_dtype)
    if not everything:
        for n in (96, 3072, 12288, 24576):
            yield lambda n=n: plain(n, FP32, FP32)
        for n in (96, 12288):
            yield lambda n=n: plain(n, FP64, BF16)
    for n in (96, 3072, 8192, 24576, 98304, 196608) if everything else (96, 24576):
        yield from inputs(n, BF16)
    for n in (96, 3072, 8192, 24576, 98304, 196608) if everything else (24576,):
        yield from semantics(n, BF16)


def recorded(device: tuning.Device, everything: bool):
    """Launches and the dtypes of their pointers, each configuration once."""
    seen = set()

    with launch.pretend(device, on="meta"), launch.recorded(run=False) as launches:
        for problem in problems(everything):
            problem()
            for prepared, pointers in launches:
                dtypes = tuple(pointer.dtype if pointer is not None else None for pointer in pointers.values())
                constants = {name: value for name, value in prepared.values.items() if name not in ("M", "N", "COLS", "eps", "programs")}
                blocked = prepared.values.get("BLOCK_N", 0) < prepared.values.get("N", 0)
                plain_dtypes = {dtype for dtype in dtypes if dtype} if everything else None
                none = [dtype is None for dtype in dtypes]
                key = (prepared.step, str(constants), str(prepared.options), blocked, *none, str(plain_dtypes))
                if key not in seen:
                    seen.add(key)
                    yield prepared, dtypes
            launches.clear()


def narrow_products(ttir: str) -> list[str]:
    """Multiplications in 32 bits other than of a scalar with a constant: row offsets have to be 64-bit."""
    constants = set(re.findall(r"(%\S+) = arith\.constant", ttir))
    products = re.findall(r"(arith\.muli (\S+), (\S+) : (?:tensor<[^>]*xi32>|i32))", ttir)
    return [product for product, *operands in products if "tensor" in product or not constants & set(operands)]


def compile_launch(prepared: launch.Launch, dtypes, device: tuning.Device, address: int = 64) -> str | None:
    """What is wrong with the compiled kernel."""
    pointers = [Pointer(dtype, address) if dtype else None for dtype in dtypes]
    try:
        compiled = prepared.kernel.warmup(*pointers, *prepared.arguments, grid=prepared.grid, **prepared.options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if compiled.metadata.shared > device.shared_memory:
        return f"{compiled.metadata.shared} bytes of shared memory, {device.name} has {device.shared_memory}"
    if not {"cubin", "hsaco"} & compiled.asm.keys():
        return f"no binary among {', '.join(compiled.asm)}"
    if narrow_products(compiled.asm["ttir"]):
        return f"32-bit offsets: {narrow_products(compiled.asm['ttir'])}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", choices=[device.name for device in TARGETS])
    parser.add_argument("--all", action="store_true", help="all combinations of dtypes")
    arguments = parser.parse_args()
    if not isinstance(kernels._rms_norm_fwd_kernel, triton.JITFunction):
        parser.error("TRITON_INTERPRET must not be set")

    device, target = next(item for item in TARGETS.items() if item[0].name == arguments.device)
    triton.runtime.driver.set_active(Driver(target))
    device = launch.as_compiled(device)
    count = failures = 0
    for prepared, dtypes in recorded(device, arguments.all):
        count += 1
        wrong = compile_launch(prepared, dtypes, device, address=64 if count % 8 else 4)  # some with pointers that are not aligned
        failures += wrong is not None
        line = [prepared.kernel.__name__, str(prepared.options), *(f"{k}={v}" for k, v in prepared.values.items() if k.isupper())]
        print(*line, wrong or "compiled")
    print(f"{count} kernels compiled for {device.name}, {failures} failures")
    return failures


if __name__ == "__main__":
    sys.exit(main())
