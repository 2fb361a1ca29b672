"""What docs/transformations.md says runs where is what runs there."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transforms import TRANSFORMS, VMAPPED
from variants import VARIANTS, N

from triton_rmsnorm import RMSNorm
from triton_rmsnorm.runtime import launch

LINES = (Path(__file__).parent.parent / "docs" / "transformations.md").read_text().splitlines()
CELLS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES if line.startswith("| ")]
ROWS = {case: places for case, *places in CELLS if case}
WAYS = ("kernels", "composed", "torch's own")
Scenario = Callable[[list[Tensor]], object]  # of x and weight

norm = VARIANTS["plain"].ours
backward = TRANSFORMS["backward"]


def transforms(*names: str, of: Callable = norm) -> list[Scenario]:
    return [partial(TRANSFORMS[name], of) for name in names]


def vmapped(in_dims: tuple, variant: str = "plain", name: str = "vmap") -> Scenario:
    def scenario(tensors: list[Tensor]) -> None:
        tensors = [*tensors, tensors[0]][: len(in_dims)]
        batch = [tensor if dim is None else torch.stack([tensor, 2 * tensor]) for tensor, dim in zip(tensors, in_dims, strict=True)]
        VMAPPED[name](VARIANTS[variant].ours, batch, in_dims)

    return scenario


def exported(tensors: list[Tensor]) -> None:
    x, _ = tensors
    backward(torch.export.export(RMSNorm(N, device=x.device), (x,)).module(), [x])


def dtensor(tensors: list[Tensor]) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    device = tensors[0].device.type
    dist.init_process_group("gloo" if device == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device, (1,))
        placed = [distribute_tensor(t, mesh, [place]) for t, place in zip(tensors, (Shard(0), Replicate()), strict=True)]
        backward(lambda x, weight: norm(x, weight).full_tensor(), placed)
    finally:
        dist.destroy_process_group()


def compiled(transform: str, inside: bool) -> Scenario:
    run = TRANSFORMS[transform]
    if inside:
        return lambda tensors: torch.compile(lambda *args: run(norm, args), backend="eager")(*tensors)
    return lambda tensors: run(torch.compile(norm, backend="eager"), tensors)


def without_triton(tensors: list[Tensor]) -> None:
    with launch.pretend(None):
        backward(norm, tensors)


SCENARIOS: dict[str, list[Scenario]] = {
    "plain eager call, `backward()`": [partial(backward, norm)],
    "`create_graph=True` (double backward, gradient penalties)": transforms("double_backward"),
    "`is_grads_batched=True`": transforms("batched_gradients"),
    "`torch.func.grad`, `vjp`": transforms("grad", "vjp"),
    "`torch.func.grad` of `grad`": transforms("grad_of_grad"),
    "`torch.func.vmap` over input, residual or gate": [
        vmapped((0, None)),
        vmapped((0, None, 0), "residual"),
        vmapped((None, None, 0), "gate"),
    ],
    "`vmap(grad)`, `jacrev`": [vmapped((0, None), name="vmap_of_grad"), *transforms("jacrev")],
    "`vmap` over the weight, or over both": [vmapped((None, 0)), vmapped((0, 0))],
    "`jvp`, `jacfwd`, `hessian`, forward-mode AD, `functionalize`": transforms("jvp", "jacfwd", "hessian", "dual", "functionalize"),
    "`torch.compile`, `torch.export`, DTensor": [compiled("backward", inside=False), exported, dtensor],
    "`torch.func` inside `torch.compile`": [compiled("grad", inside=True)],
    "`torch.jit.trace`; `torch.jit.script` of `RMSNorm`": [
        lambda tensors: backward(torch.jit.trace(norm, tuple(tensors), check_trace=False), tensors),
        lambda tensors: backward(torch.jit.script(RMSNorm(N, device=tensors[0].device)), tensors[:1]),
    ],
    "complex input; a device without Triton, the CPU without the interpreter": [
        lambda tensors: backward(lambda x, w: norm(x.to(torch.complex64), w).abs(), tensors),
        without_triton,
    ],
}


def test_every_row_is_tried():
    assert list(ROWS) == list(SCENARIOS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("row", "scenario"), [(row, scenario) for row, some in SCENARIOS.items() for scenario in some])
def test_row(row, scenario, device, launches, small_tiles):
    tensors = VARIANTS["plain"].draw((3, 2, N), torch.float32, device)
    with torch.autograd.profiler.profile() as profile:
        scenario(tensors)
    operators = {event.name for event in profile.function_events}
    steps = {recorded.step for recorded in launches}
    rest = {"torch's own"} if "aten::rms_norm" in operators else {"composed"} if "aten::rsqrt" in operators else set()
    forward = {"kernels"} if "forward" in steps else rest
    backward = {"kernels"} if "backward" in steps else set()
    if forward == {"kernels"} or not backward:
        backward |= rest  # what is composed has composed derivatives
    assert [forward, backward] == [{way for way in WAYS if way in cell} for cell in ROWS[row]]
