"""The launches of a problem on a device that is not there, recorded with the tensors they get. Nothing runs."""

from unittest import mock

from torch import Tensor

from bench.problem import Problem, draw
from bench.providers import Norm, ours
from bench.speed.check import make_call
from triton_rmsnorm.runtime import config, table
from triton_rmsnorm.runtime.config import Device
from triton_rmsnorm.runtime.launch import Recorded, as_compiled, pretend, recorded

DEVICES = {device.name: as_compiled(device) for device in (config.SM_80, config.SM_90, config.SM_100, config.GFX942)}
_ROWS = {"X", "RESIDUAL", "GATE", "Y", "RESIDUAL_OUT", "DY", "DRESIDUAL_OUT", "DX", "DRESIDUAL", "DGATE"}


def launches(problem: Problem, device: Device) -> list[Recorded]:
    """The launches of one direction of `problem` in a training step on `device`, with tensors without memory."""
    with mock.patch.object(table, "search", None), pretend(device, on="meta"), recorded(run=False) as found:
        calls(problem, ours(problem), found)
    return found


def calls(problem: Problem, norm: Norm, found: list) -> None:
    """Calls a norm in one direction of `problem` while something records into `found`."""
    backward = make_call(problem._replace(direction="backward"), norm, draw(problem, "meta"))  # after a forward with gradients
    if problem.direction == "backward":
        found.clear()
        backward()


def tensors(launch: Recorded) -> dict[str, Tensor]:
    """The tensors of a launch, by the names of the kernel's pointers."""
    return {name: tensor for name, tensor in launch.pointers.items() if tensor is not None}


def rows(launch: Recorded) -> dict[str, Tensor]:
    """The tensors whose rows a kernel walks over, which are its largest."""
    names = {"DW_PARTIAL"} if launch.step == "sum_partials" else _ROWS
    return {name: tensor for name, tensor in tensors(launch).items() if name in names}


def depends_on_rows(problem: Problem, device: Device, rows: tuple[int, ...] = (1, 3, 100_000)) -> bool:
    """Whether a problem is cut into other tiles, or compiled with other options, for other numbers of rows."""
    return len({tuple(map(_configuration, launches(problem._replace(m=m), device))) for m in rows}) > 1


def _configuration(recorded: Recorded) -> tuple:
    values, options = recorded.launch.values, recorded.launch.options
    return (*(value for name, value in values.items() if name in ("BLOCK_M", "BLOCK_N", "NUM_STAGES")), *sorted(options.items()))
