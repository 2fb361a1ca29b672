"""Workarounds for Triton's interpreter (TRITON_INTERPRET=1), as of Triton 3.9. To be deleted once it rounds to bf16 and is thread-safe.

The interpreter truncates when it casts to bf16 and reads bf16 subnormals wrongly, so it gets fp32 copies of bf16 tensors, and torch rounds
what was written. It keeps the program id in a global, while autograd runs backwards in other threads, so launches take a lock. Before
Triton 3.9 it also rounds the product of an fma.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_LOCK = threading.Lock()
_OUTPUTS = ("Y", "RESIDUAL_OUT", "DX", "DRESIDUAL", "DGATE", "DW")


def run(kernel: Any, grid: tuple[int, int, int], pointers: dict[str, Tensor | None], values: dict[str, Any]) -> None:
    """Interprets one launch."""
    copies = {name: _fp32_copy(p) if p is not None and p.dtype == torch.bfloat16 else p for name, p in pointers.items()}
    with _LOCK, _fma_rounded_once():
        kernel[grid](**copies, **values)
    for name, pointer in pointers.items():
        copy = copies[name]
        if pointer is not None and copy is not None and copy is not pointer and name in _OUTPUTS:
            pointer.copy_(copy)


def _fp32_copy(x: Tensor) -> Tensor:
    """All of the storage of x in fp32, seen through the same strides (which may overlap: an expanded tensor)."""
    storage = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    return storage.float().as_strided(x.shape, x.stride(), x.storage_offset())


@contextmanager
def _fma_rounded_once() -> Iterator[None]:
    """While it is active, an fma in fp32 is computed in fp64, where the product is exact."""
    from triton.runtime import interpreter  # needs NumPy

    builder: Any = interpreter.InterpreterBuilder
    theirs = builder.create_fma

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype != "float32":
            return theirs(self, x, y, z)
        exact = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(exact.astype("float32"), z.dtype.scalar)

    builder.create_fma = theirs if hasattr(getattr(interpreter, "_interpreter", None), "fma_fp32") else fma
    try:
        yield
    finally:
        builder.create_fma = theirs
