"""A CUDA driver that does nothing, so that Triton's own host path runs on a machine without a GPU, up to the driver's door.

Triton compiles its launcher in C against libcuda. Here libcuda is a stub whose calls succeed at once: signatures are bound, kernels are
compiled, arguments are unpacked from tensors and launches are counted, all by Triton's code; only nothing is launched.

    with stubbed():
        triton_rmsnorm.rms_norm(x, (4096,), weight)  # of CPU tensors; the result is uninitialized
"""

import ctypes
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from triton_rmsnorm.runtime import config as tuning
from triton_rmsnorm.runtime import launch, table

DEVICE = launch.as_compiled(tuning.SM_90)

# The calls whose answer Triton looks at; all others only return CUDA_SUCCESS.
_ANSWERS = {
    "cuPointerGetAttribute": "(unsigned long long *pointer, int what, unsigned long long of) { *pointer = of; return 0; }",
    "cuDeviceGetAttribute": f"(int *value, int what, int device) {{ *value = {DEVICE.shared_memory}; return 0; }}",
    "cuFuncGetAttribute": "(int *value, int what, void *function) { *value = what == 0 ? 1024 : 0; return 0; }",  # 0: threads a block
    "cuCtxGetCurrent": "(void **context) { *context = (void *)1; return 0; }",
    "cuLaunchKernelEx": "() { ++launches; return 0; }",
    "cuStreamIsCapturing": "(void *stream, int *status) { *status = 0; return 0; }",
}


@cache
def _library() -> tuple[tempfile.TemporaryDirectory, ctypes.CDLL]:
    """The stub of every function of libcuda that this Triton's launcher names, loaded once under the name that the launcher opens."""
    directory = tempfile.TemporaryDirectory()
    folder = Path(directory.name)
    names = re.findall(r"\bcu[A-Z]\w+", Path(nvidia.__file__).with_suffix(".c").read_text() + Path(nvidia.__file__).read_text())
    functions = [f"int {name}{_ANSWERS.get(name, '() { return 0; }')}" for name in sorted({*names, *_ANSWERS})]
    source, library = folder / "stub.c", folder / "libcuda.so.1"
    source.write_text("\n".join(["int launches;", *functions]))
    command = ["cc", "-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, source]
    subprocess.run(command, check=True)
    return directory, ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


class _Driver(nvidia.CudaDriver):
    def __init__(self):
        super().__init__()
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Stub:
    def __init__(self, library: ctypes.CDLL):
        self._launches = ctypes.c_int.in_dll(library, "launches")

    @property
    def launches(self) -> int:
        """Kernels launched so far."""
        return self._launches.value


@contextmanager
def stubbed() -> Iterator[Stub]:
    """While it is active, Triton's kernels are compiled for sm_90 and launched into nothing, and CPU tensors pass for tensors of a GPU."""
    if launch.INTERPRETED:
        raise RuntimeError("the host path does not run under TRITON_INTERPRET=1")
    directory, library = _library()
    with (
        mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=directory.name),
        launch.pretend(DEVICE),
        mock.patch.object(table, "search", None),  # by time, of which there is none here
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True),  # builds for CPUs have none
        mock.patch.object(torch._C, "_cuda_getDevice", lambda: -1, create=True),  # which is what a CPU tensor says
    ):
        triton.runtime.driver.set_active(_Driver())
        try:
            yield Stub(library)
        finally:
            triton.runtime.driver.set_active(None)
