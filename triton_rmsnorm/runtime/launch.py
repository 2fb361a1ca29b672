"""Launches: kernels with everything but their pointers, the devices that they run on, and a recorder of what is launched.

Under TRITON_INTERPRET=1, set before Triton is imported, the same launches run on CPU tensors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

from triton_rmsnorm.runtime import config as tuning
from triton_rmsnorm.runtime import interpreter, kernels
from triton_rmsnorm.runtime.config import Config, Device

INTERPRETED = not isinstance(kernels._rms_norm_fwd_kernel, triton.JITFunction)
# Whether a row may be spread over the thread blocks of a cluster. With Triton 3.8 only one-dimensional rows compile (TritonGPUPlanCTAPass);
# older versions know no reductions across a cluster.
CLUSTERS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)

_places = ("is_cuda", "is_cpu") if INTERPRETED else ("is_cuda",)  # attributes of tensors that the kernels run on
_stand_in: Device | None = None
_caches: list[Any] = []

P = ParamSpec("P")
R = TypeVar("R")


class Launch:
    """A kernel with everything but its pointers: called with them, it runs on the current stream of their device.

    Attributes:
        step: "forward", "output", "backward", "c1" or "sum_partials".
        pointers: names of the kernel's pointers, in the order of the call.
        values: the other arguments of the kernel, by name.
        options: Triton's options, by name.
    """

    def __init__(self, step: str, kernel: Any, grid: tuple[int, int, int], config: Config, **values: Any):
        self.step = step
        self.kernel = kernel
        self.grid = grid
        self.pointers = tuple(name for name in kernel.arg_names if name not in values)
        self.values = {name: values[name] for name in kernel.arg_names if name in values}
        self.arguments = tuple(self.values.values())
        # Without contraction to fma, results depend only on what the kernel says, not on what the compiler knows of the arguments.
        self.options = {"num_warps": config.num_warps, "num_ctas": config.num_ctas, "enable_fp_fusion": False}
        self._compiled: dict[tuple, Callable[..., None]] = {}

    def __call__(self, *pointers: Tensor | None) -> None:
        if INTERPRETED:
            return interpreter.run(self.kernel, self.grid, dict(zip(self.pointers, pointers, strict=True)), self.values)
        device = pointers[0].get_device()  # type: ignore[union-attr] # the first pointer is x or dy
        if device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self(*pointers)
        # Triton compiles for what pointers are divisible by, and loads for a device. All else that it specializes on is fixed here.
        bits = 0
        for pointer in pointers:
            if pointer is not None:
                bits |= pointer.data_ptr()
        alignment = bits % 16 == 0 or tuple([pointer is None or pointer.data_ptr() % 16 == 0 for pointer in pointers])
        run = self._compiled.get((device, alignment))
        if run is None:
            self._compiled[device, alignment] = self.kernel[self.grid](*pointers, *self.arguments, **self.options)[self.grid]
        else:
            run(*pointers, *self.arguments, stream=torch._C._cuda_getCurrentRawStream(device))
        return None


def device_of(device: torch.device) -> Device:
    """The Device that a launch on tensors of `device` is configured for."""
    if _stand_in is not None:
        return _stand_in
    return tuning.INTERPRETER if INTERPRETED else _gpu(torch.cuda.current_device() if device.index is None else device.index)


def as_compiled(device: Device) -> Device:
    """`device` as the installed Triton compiles for it: without clusters where it has none."""
    return device if CLUSTERS else device._replace(max_ctas=1)


@cache
def _gpu(index: int) -> Device:
    properties: Any = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    return as_compiled(
        Device(
            name=properties.name,
            backend="hip" if hip else "cuda",
            num_sms=properties.multi_processor_count,
            shared_memory=64 * 1024 if hip else properties.shared_memory_per_block_optin,
            max_ctas=16 if not hip and properties.major in (9, 10) else 1,
        )
    )


def kept(function: Callable[P, R]) -> Callable[P, R]:
    """Caches what is prepared for launches, until `forget`."""
    cached = lru_cache(maxsize=4096)(function)
    _caches.append(cached)
    return cached  # type: ignore[return-value]


def runs_on(x: Tensor) -> bool:
    """Whether the kernels can run on the device of x: on a GPU, and on the CPU when Triton interprets."""
    # torch.compile warns of a cache. Comparing the name of the device takes longer than this loop, and so does any().
    for place in _places:  # noqa: SIM110
        if getattr(x, place):
            return True
    return False


def forget() -> None:
    """Everything is prepared again at the next call: configurations are chosen anew."""
    for cached in _caches:
        cached.cache_clear()


@contextmanager
def pretend(device: Device | None, on: str = "cpu") -> Iterator[None]:
    """For tests and offline compilation: launches are configured as for `device`, and tensors of the type `on` count as its tensors.

    With None for a device, the kernels run nowhere. This holds on all threads.
    """
    global _stand_in, _places
    before = _stand_in, _places
    _stand_in, _places = device, ((*_places, f"is_{on}") if device else ())
    forget()
    try:
        yield
    finally:
        _stand_in, _places = before
        forget()


class Recorded(NamedTuple):
    """A launch and the tensors it got, by the names of the kernel's pointers."""

    launch: Launch
    pointers: dict[str, Tensor | None]

    @property
    def step(self) -> str:
        return self.launch.step


@contextmanager
def recorded(run: bool = True) -> Iterator[list[Recorded]]:
    """The list of all launches while it is active, on all threads, as they happen. With run=False they are recorded and do not run."""
    launches: list[Recorded] = []
    start = Launch.__call__

    def record(self: Launch, *pointers: Tensor | None) -> None:
        launches.append(Recorded(self, dict(zip(self.pointers, pointers, strict=True))))
        if run:
            start(self, *pointers)

    Launch.__call__ = record  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        Launch.__call__ = start  # type: ignore[method-assign]
