"""What docs/transformations.md says runs where is what runs there."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from variants import VARIANTS, N, leaves, scalar

from triton_rmsnorm import RMSNorm, rms_norm
from triton_rmsnorm.runtime import launch

LINES = (Path(__file__).parent.parent / "docs" / "transformations.md").read_text().splitlines()
CELLS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES if line.startswith("| ")]
ROWS = {case: places for case, *places in CELLS if case}
WAYS = ("kernels", "composed", "torch's own")


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, (N,), weight)


loss = scalar(norm)


def backward(function: Callable[[Tensor, Tensor], Tensor], *tensors: Tensor) -> None:
    function(*leaves(tensors)).sum().backward()


def create_graph(x: Tensor, weight: Tensor) -> None:
    tensors = leaves((x, weight))
    slopes = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
    sum(slope.square().sum() for slope in slopes).backward()


def is_grads_batched(x: Tensor, weight: Tensor) -> None:
    tensors = leaves((x, weight))
    y = norm(*tensors)
    torch.autograd.grad(y, tensors, torch.stack([y.detach()] * 2), is_grads_batched=True)


def grad_of_grad(x: Tensor, weight: Tensor) -> None:
    grad(lambda *tensors: sum(slope.square().sum() for slope in grad(loss, (0, 1))(*tensors)), (0, 1))(x, weight)


def forward_mode(x: Tensor, weight: Tensor) -> None:
    with forward_ad.dual_level():
        norm(forward_ad.make_dual(x, torch.ones_like(x)), weight)


def exported(x: Tensor, weight: Tensor) -> None:
    module = RMSNorm(N, device=x.device)
    backward(lambda x, _: torch.export.export(module, (x.detach(),)).module()(x), x, weight)


def dtensor(x: Tensor, weight: Tensor) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo" if x.is_cpu else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(x.device.type, (1,))
        backward(
            lambda x, weight: norm(x, weight).full_tensor(),
            distribute_tensor(x, mesh, [Shard(0)]),
            distribute_tensor(weight, mesh, [Replicate()]),
        )
    finally:
        dist.destroy_process_group()


def without_triton(x: Tensor, weight: Tensor) -> None:
    with launch.pretend(None):
        backward(norm, x, weight)


def tangents(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.ones_like(t) for t in tensors)


def compiled(function: Callable) -> Callable:
    return torch.compile(function, backend="eager")


SCENARIOS: dict[str, tuple[Callable[[Tensor, Tensor], object], ...]] = {
    "plain eager call, `backward()`": (lambda x, w: backward(norm, x, w),),
    "`create_graph=True` (double backward, gradient penalties)": (create_graph,),
    "`is_grads_batched=True`": (is_grads_batched,),
    "`torch.func.grad`, `vjp`": (grad(loss, (0, 1)), lambda x, w: vjp(norm, x, w)[1](x)),
    "`torch.func.grad` of `grad`": (grad_of_grad,),
    "`torch.func.vmap` over input, residual or gate": (
        vmap(norm, (0, None)),
        lambda x, w: vmap(VARIANTS["residual"].ours, (0, None, 0))(x, w, x),
        lambda x, w: vmap(VARIANTS["gate"].ours, (None, None, 0))(x[0], w, x),
    ),
    "`vmap(grad)`, `jacrev`": (vmap(grad(loss, (0, 1)), (0, None)), jacrev(loss, (0, 1))),
    "`vmap` over the weight, or over both": (
        lambda x, w: vmap(norm, (None, 0))(x, torch.stack([w] * 2)),
        lambda x, w: vmap(norm)(x, torch.stack([w] * len(x))),
    ),
    "`jvp`, `jacfwd`, `hessian`, forward-mode AD, `functionalize`": (
        lambda x, w: jvp(norm, (x, w), tangents(x, w)),
        jacfwd(norm, (0, 1)),
        hessian(loss),
        forward_mode,
        functionalize(norm),
    ),
    "`torch.compile`, `torch.export`, DTensor": (lambda x, w: backward(compiled(norm), x, w), exported, dtensor),
    "`torch.func` inside `torch.compile`": (compiled(lambda x, w: grad(loss, (0, 1))(x, w)),),
    "`torch.jit.trace`; `torch.jit.script` of `RMSNorm`": (
        lambda x, w: backward(torch.jit.trace(norm, (x, w), check_trace=False), x, w),
        lambda x, w: backward(lambda x, _: torch.jit.script(RMSNorm(N, device=x.device))(x), x, w),
    ),
    "complex input; a device without Triton, the CPU without the interpreter": (
        lambda x, w: backward(lambda x, w: norm(x, w).abs(), x.to(torch.complex64), w),
        without_triton,
    ),
}


def test_every_row_is_tried():
    assert list(ROWS) == list(SCENARIOS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("row", "scenario"), [(row, f) for row, some in SCENARIOS.items() for f in some])
def test_row(row, scenario, device, launches, small_tiles):
    tensors = VARIANTS["plain"].draw((3, 2, N), torch.float32, device)
    with torch.autograd.profiler.profile() as profile:
        scenario(*tensors)
    operators = {event.name for event in profile.function_events}
    steps = {recorded.step for recorded in launches}
    rest = {"torch's own"} if "aten::rms_norm" in operators else {"composed"} if "aten::rsqrt" in operators else set()
    forward = {"kernels"} if "forward" in steps else rest
    backward = {"kernels"} if "backward" in steps else set()
    if forward == {"kernels"} or not backward:
        backward |= rest  # what is composed has composed derivatives
    assert [forward, backward] == [{way for way in WAYS if way in cell} for cell in ROWS[row]]
