"""DTensors, tensor and sequence parallelism, FSDP2 and DDP: two and four gloo processes, in each the kernels interpreted.

Processes start slowly, so one test a number of processes runs all checks in them, one after the other, and names those that failed.
"""

import copy
import io
import os
import socket
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._pytree import tree_leaves
from variants import FUNCTIONS, VARIANTS, N, Variant, uneven

from triton_rmsnorm import RMSNorm, recompute_norms, rms_norm
from triton_rmsnorm.runtime import config, launch, plan
from triton_rmsnorm.testing import draw

CPU = torch.device("cpu")
CHECKS: dict[str, tuple[Callable[[], None], tuple[int, ...]]] = {}


def check_on(*worlds: int):
    def noted(function: Callable[[], None]) -> Callable[[], None]:
        CHECKS[function.__name__] = (function, worlds)
        return function

    return noted


check = check_on(2)


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("world", [2, 4])
def test_processes(world, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor", "triton_rmsnorm"])  # imported once, for all processes
    failures = context.SimpleQueue()
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    processes = [context.Process(target=_process, args=(rank, world, port, failures)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(500)
    report = []
    while not failures.empty():
        report.append(failures.get())
    assert not report, "\n".join(report)
    assert [process.exitcode for process in processes] == [0] * world


def _process(rank: int, world: int, port: int, failures) -> None:
    torch.set_num_threads(1)
    with launch.pretend(config.SM_80):  # small tiles
        _run_checks(rank, world, port, failures)
    os._exit(0)  # as bench.distributed_train does


def _run_checks(rank: int, world: int, port: int, failures) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world, timeout=timedelta(seconds=100))
    for name, (function, worlds) in CHECKS.items():
        if world not in worlds:
            continue
        error = None
        torch.manual_seed(0)
        try:
            function()
        except BaseException:
            error = f"{name} in process {rank} of {world}:\n{traceback.format_exc()}"
            failures.put(error)
        failed = [None] * world
        dist.all_gather_object(failed, error is not None)
        if any(failed) and "Timeout" in str(error):
            break
    dist.destroy_process_group()


@cache  # a program has one; torch.compile mistakes one mesh for another that is equal
def mesh(*shape: int):
    return init_device_mesh("cpu", shape or (dist.get_world_size(),))


def distributed(tensor: torch.Tensor, on, *placements):
    return distribute_tensor(tensor, on, placements).requires_grad_()


def compare(variant: Variant, tensors, on, placements, *, collectives: bool | None = False) -> list:
    """Compares forward and backward of DTensors, placed as given, with plain tensors, and returns the gradients.

    There must be collectives (True), none (False), or either (None).
    """
    whole = [t.detach().requires_grad_() for t in tensors]
    expected = tree_leaves(variant.ours(*whole))
    expected_dys = [uneven(y) for y in expected]
    expected_gradients = torch.autograd.grad(expected, whole, expected_dys)

    placed = [distributed(t, on, *where) for t, where in zip(tensors, placements, strict=True)]
    with CommDebugMode() as forward:
        outputs = tree_leaves(variant.ours(*placed))
    dys = [distributed(dy, on, *y.placements).detach() for dy, y in zip(expected_dys, outputs, strict=True)]
    with CommDebugMode() as backward:  # not into .grad: torch 2.11 gathers uneven shards for a gradient that two tensors share
        gradients = torch.autograd.grad(outputs, placed, dys)
    some = forward.get_total_counts() + backward.get_total_counts() > 0
    assert collectives is None or some == collectives, (forward.comm_counts, backward.comm_counts)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert torch.equal(ours.full_tensor(), theirs)
    for name, ours, theirs in zip(variant.arguments, gradients, expected_gradients, strict=True):
        if name == "weight":
            torch.testing.assert_close(ours.full_tensor(), theirs)
        else:
            assert torch.equal(ours.full_tensor(), theirs)
    return list(gradients)


@check_on(2, 4)
def rows_are_sharded():
    """Over any outer dimension, evenly or not, also with no rows for some processes: no collective, and dgamma stays a partial sum.

    Where there are fewer rows than processes, DTensor itself redistributes before it asks an operator's rule.
    """
    on = mesh()
    equal, unequal = ((4, 4, 3, N), VARIANTS), ((5, 3, 3, N), FUNCTIONS)
    for shape, variants in (equal, unequal) if dist.get_world_size() == 2 else (unequal,):
        for variant in variants.values():
            for dim in range(len(shape) - variant.ndim):
                rows, weight = (Shard(dim),), (Replicate(),)
                tensors, few = variant.draw(shape, torch.float32, CPU), shape[dim] < dist.get_world_size()
                gradients = compare(variant, tensors, on, variant.per_argument(rows, weight), collectives=None if few else False)
                assert few or [g.placements for g in gradients] == list(variant.per_argument(rows, (Partial("sum"),)))


@check_on(4)
def two_mesh_dimensions():
    """Sharded over both, over one, or over none."""
    on = mesh(2, 2)
    for name in ("plain", "residual", "gate_first"):
        variant = VARIANTS[name]
        tensors = variant.draw((4, 6, N), torch.float32, CPU)
        for rows, dw in (
            ((Shard(0), Shard(1)), (Partial(), Partial())),
            ((Shard(0), Shard(0)), (Partial(), Partial())),
            ((Shard(1), Replicate()), (Partial(), Replicate())),
            ((Replicate(), Shard(0)), (Replicate(), Partial())),
            ((Replicate(), Replicate()), (Replicate(), Replicate())),
        ):
            gradients = compare(variant, tensors, on, variant.per_argument(rows, (Replicate(), Replicate())))
            assert [g.placements for g in gradients] == list(variant.per_argument(rows, dw))


@check
def columns_are_sharded():
    """A row is needed whole: it is redistributed, and so is a weight in parts."""
    on = mesh()
    for variant in (VARIANTS["no_weight"], *FUNCTIONS.values()):
        tensors = variant.draw((4, 4, 3, N), torch.float32, CPU)
        compare(variant, tensors, on, variant.per_argument((Shard(3),), (Replicate(),)), collectives=True)
        if variant.weight_at is not None:
            compare(variant, tensors, on, variant.per_argument((Shard(0),), (Shard(0),)), collectives=True)
            compare(variant, tensors, on, variant.per_argument((Shard(3),), (Shard(0),)), collectives=True)


@check
def placed_differently():
    for name in ("residual", "gate"):
        variant = VARIANTS[name]
        tensors = variant.draw((4, 4, N), torch.float32, CPU)
        compare(variant, tensors, mesh(), [(Shard(0),), (Replicate(),), (Shard(1),)], collectives=True)


@check
def partial_sums_are_summed_first():
    """The norm of a sum is not the sum of norms."""
    on, world = mesh(), dist.get_world_size()
    x, weight = VARIANTS["plain"].draw((4, N), torch.float32, CPU)
    part = DTensor.from_local(x * (dist.get_rank() + 1), on, [Partial()])
    y = rms_norm(part, (N,), distributed(weight, on, Replicate()))
    torch.testing.assert_close(y.full_tensor(), rms_norm(x * sum(range(1, world + 1)), (N,), weight))


@check
def what_needs_no_gradient():
    """Frozen weights and inputs, no weight, only x + residual used, nothing but dgamma."""
    on = mesh()
    for name in ("plain", "residual", "gate"):
        variant = VARIANTS[name]
        tensors = variant.draw((4, 3, N), torch.float32, CPU)
        for at in range(len(tensors)):
            whole, placed = [], []
            for i, (tensor, where) in enumerate(zip(tensors, variant.per_argument(Shard(0), Replicate()), strict=True)):
                whole.append(tensor.detach().requires_grad_(i == at))
                placed.append(distributed(tensor, on, where).detach().requires_grad_(i == at))
            for arguments in (whole, placed):
                outputs = [y for y in tree_leaves(variant.ours(*arguments)) if y.requires_grad]
                torch.autograd.backward(outputs, [y.detach().cos() for y in outputs])
            assert [t.grad is None for t in placed] == [i != at for i in range(len(tensors))]
            torch.testing.assert_close(placed[at].grad.full_tensor(), whole[at].grad)
    x, weight, residual = (distributed(t, on, p) for t, p in zip(tensors, (Shard(0), Replicate(), Shard(0)), strict=True))
    _, summed = VARIANTS["residual"].ours(x, weight, residual)
    summed.backward(torch.ones_like(summed))
    assert torch.equal(x.grad.full_tensor(), torch.ones_like(tensors[0])) and weight.grad is None


@check
def second_derivatives():
    on = mesh()
    for name in ("plain", "residual", "gate", "gate_first"):
        variant = VARIANTS[name]

        def penalty(tensors, f=variant.ours):
            slopes = torch.autograd.grad(sum(y.square().sum() for y in tree_leaves(f(*tensors))), tensors, create_graph=True)
            return torch.autograd.grad(sum(slope.cos().sum() for slope in slopes), tensors)

        tensors = [t.requires_grad_() for t in variant.draw((4, 3, N), torch.float64, CPU)]
        placed = [distributed(t.detach(), on, *w) for t, w in zip(tensors, variant.per_argument((Shard(0),), (Replicate(),)), strict=True)]
        for ours, theirs in zip(penalty(placed), penalty(tensors), strict=True):
            torch.testing.assert_close(ours.full_tensor(), theirs)


@check_on(2)
def compiled():
    """torch.compile with DTensors: one graph, the same results and placements as in eager."""
    variant, results = VARIANTS["residual"], []
    tensors = variant.draw((4, 3, N), torch.float32, CPU)
    for function in (variant.ours, torch.compile(variant.ours, backend="aot_eager", fullgraph=True)):
        placed = [distributed(t, mesh(), *w) for t, w in zip(tensors, variant.per_argument((Shard(0),), (Replicate(),)), strict=True)]
        outputs = tree_leaves(function(*placed))
        torch.autograd.backward(outputs, [y.detach().cos() for y in outputs])
        results.append([*outputs, *[t.grad for t in placed]])
    for eager, ours in zip(*results, strict=True):
        assert ours.placements == eager.placements and torch.equal(ours.full_tensor(), eager.full_tensor())


TORCHS: dict[str, dict] = {}  # runs without our kernels, by their job


def losses(parallel: str, tp: int, **fields) -> tuple[float, float]:
    """Largest difference of the losses of torch.nn.RMSNorm and ours, and the tolerance; checks that our kernels have been at work."""
    from bench.train import distributed as training
    from bench.train.run import largest_difference, tolerance

    sizes = {"dim": 16, "layers": 1, "heads": 4, "vocabulary": 16}
    job = replace(training.JOB, parallel=parallel, tp=tp, **{"sizes": sizes, "seq_len": 8, "steps": 4} | fields)
    with launch.recorded() as launches:
        on = training.new_mesh(job)
        if str(job) not in TORCHS:
            TORCHS[str(job)] = {name: training.run(name, job, on) for name in training.PROVIDERS if name != "ours"}
        runs = TORCHS[str(job)] | {"ours": training.run("ours", job, on)}
    assert Counter(recorded.step for recorded in launches) == dict.fromkeys(("forward", "backward", "sum_partials"), 3 * job.steps)
    assert runs["torch"].losses[-1] < runs["torch"].losses[0]
    return largest_difference(runs["ours"], runs["torch"]), tolerance(runs, training.BASELINE)


# The control is coarse in bf16: it takes so long until gammas that do not train show beyond it.
IN_BF16 = {"dtype": torch.bfloat16, "steps": 12, "learning_rate": 1e-2}


@check_on(2, 4)
def all_train_the_same():
    of_two = [("ddp", 1, {}), ("fsdp", 1, {}), ("tp", 2, {}), ("fsdp", 1, IN_BF16)]
    for parallel, tp, fields in of_two if dist.get_world_size() == 2 else [("fsdp+tp", 2, {})]:
        difference, tolerance = losses(parallel, tp, **fields)
        assert difference <= tolerance < (1e-1 if fields else 1e-4), (parallel, difference, tolerance)


@check_on(2)
def fsdp_recomputes_outputs_of_norms():
    """Its weights are freed between the forward and the backward, in which they are gathered again before anything is computed again."""

    def gradients(context) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(RMSNorm(32), nn.Linear(32, 32)) for _ in range(3)))
        for layer in model:
            fully_shard(layer, mesh=mesh(), reshard_after_forward=True)
        fully_shard(model, mesh=mesh())
        x = draw((dist.get_rank() + 2, 32), torch.float32, CPU)
        with launch.recorded() as launches:
            with context():
                loss = model(x).square().sum()
            loss.backward()
        again.append(sum(found.step == "output" for found in launches))
        return [parameter.grad.to_local() for parameter in model.parameters()]

    again: list[int] = []
    usual, less = gradients(nullcontext), gradients(recompute_norms)
    assert all(map(torch.equal, usual, less)) and again == [0, 3]


@check_on(2)
def a_lost_gradient_shows():
    """The comparison of losses is one that can fail: dgamma of one process is lost, in bf16 that of both."""
    run, losing = plan.backward, (1,)

    def lossy(*args, **kwargs):
        gradients = run(*args, **kwargs)
        if dist.get_rank() in losing and gradients.dweight is not None:
            gradients.dweight.zero_()
        return gradients

    plan.backward = lossy
    try:
        for parallel, tp in (("ddp", 1), ("tp", 2)):
            difference, tolerance = losses(parallel, tp)
            assert difference > 10 * tolerance, (parallel, difference, tolerance)
        losing = (0, 1)
        difference, tolerance = losses("fsdp", 1, **IN_BF16)
        assert difference > tolerance, (difference, tolerance)
    finally:
        plan.backward = run


@check_on(2)
def modules_with_dtensor_weights():
    """A module whose weight is a DTensor: copied, saved and loaded with it."""
    norm = distribute_module(RMSNorm(N), mesh())
    x = distributed(draw((4, N), torch.float32, CPU), mesh(), Replicate())
    file = io.BytesIO()
    torch.save(norm.state_dict(), file)
    file.seek(0)
    other = distribute_module(RMSNorm(N), mesh())
    other.load_state_dict(torch.load(file, weights_only=False))
    for module in (norm, copy.deepcopy(norm), other):
        assert isinstance(module.weight, DTensor) and isinstance(module(x), DTensor)


@pytest.mark.slow
def test_registration():
    script, env = Path(__file__).parent / "scripts" / "rules_are_registered_lazily.py", {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, script], check=True, env=env, timeout=120)


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The example as a user starts it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "bench.distributed_train"]
    sizes = ["--parallel", "ddp", "--steps", "2", "--dim", "16", "--layers", "1", "--vocabulary", "16", "--seq-len", "8"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "ddp on 1 devices" in done.stdout and "the same." in done.stdout


def test_without_torchrun(monkeypatch, capsys):
    from bench.train import distributed as training

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        training.main(["--parallel", "tp"])
    assert "started by torchrun" in capsys.readouterr().err
