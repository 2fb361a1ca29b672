"""Trains one model on several devices with torch.nn.RMSNorm and with ours, and compares the losses.

    torchrun --nproc-per-node 2 -m bench.distributed_train --parallel tp
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        -m bench.distributed_train --parallel fsdp+tp --tp 8

    ddp      DistributedDataParallel
    fsdp     FSDP2, fully_shard: parameters and optimizer sharded
    tp       tensor and sequence parallelism: between the split matrices, each device normalizes its part of the sequence
    fsdp+tp  both, on a mesh of two dimensions

With GPUs the devices talk through NCCL; without, they are processes that talk through gloo, and the kernels run in Triton's interpreter.
The losses of ours may differ from torch's by DRIFT times what those of a control do: torch.nn.RMSNorm with every gamma moved to a
neighbouring number, of the dtype that it is used in (bench.train).
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from bench import records
from bench.train.job import SEED, Job, batches
from bench.train.providers import CONTROL, control
from bench.train.run import Run, agrees, judge, train

EPS = 1e-6
JOB = Job(
    {"dim": 64, "layers": 2, "heads": 4, "vocabulary": 64},
    seq_len=32,
    batch=2,
    steps=20,
    dtype=torch.float32,
    learning_rate=3e-3,
    model="decoder",
    parallel="ddp",
)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, dim: int, heads: int, norm: type[nn.RMSNorm]):
        super().__init__()
        self.head_dim = dim // heads
        self.attention_norm, self.feed_forward_norm = norm(dim, EPS), norm(dim, EPS)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(3 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (linear(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).flatten(-2))
        return x + self.down(F.silu(self.up(self.feed_forward_norm(x))))


class Output(NamedTuple):
    loss: Tensor


class Decoder(nn.Module):
    """Tokens [batch, seq_len] -> the mean loss of each next token."""

    def __init__(self, sizes: dict[str, int], norm: type[nn.RMSNorm]):
        super().__init__()
        dim, vocabulary = sizes["dim"], sizes["vocabulary"]
        self.embedding = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(Block(dim, sizes["heads"], norm) for _ in range(sizes["layers"]))
        self.norm = norm(dim, EPS)
        self.head = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return Output(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()))


def ddp(model: nn.Module, job: Job, mesh: DeviceMesh) -> nn.Module:
    if job.dtype != torch.float32:
        raise ValueError(f"ddp must train in float32, got {job.dtype}")
    return DistributedDataParallel(model, device_ids=[job.device] if job.device.type == "cuda" else None)


def fsdp(model: Decoder, job: Job, mesh: DeviceMesh) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=job.dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"], mp_policy=policy)
    return fully_shard(model, mesh=mesh["dp"], mp_policy=policy)


def tp(model: Decoder, job: Job, mesh: DeviceMesh) -> nn.Module:
    """Between the matrices, tensors are sharded over the sequence (dim 1); norms keep a whole weight on each device."""
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    plan |= dict.fromkeys(("norm", "blocks.*.attention_norm", "blocks.*.feed_forward_norm"), SequenceParallel())
    plan |= dict.fromkeys((f"blocks.*.{name}" for name in ("q", "k", "v", "up")), ColwiseParallel(input_layouts=Shard(1)))
    joined = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
    plan |= dict.fromkeys(("blocks.*.o", "blocks.*.down"), joined)
    return parallelize_module(model, mesh["tp"], plan)


PARALLEL: dict[str, Callable[[Decoder, Job, DeviceMesh], nn.Module]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "tp": tp,
    "fsdp+tp": lambda model, job, mesh: fsdp(tp(model, job, mesh), job, mesh),
}


def torchs(job: Job) -> Decoder:
    return Decoder(job.sizes, nn.RMSNorm)


def ours(job: Job) -> Decoder:
    from triton_rmsnorm import RMSNorm

    return Decoder(job.sizes, RMSNorm)


BASELINE = "torch"
PROVIDERS: dict[str, Callable[[Job], nn.Module]] = {BASELINE: torchs, CONTROL: lambda job: control(torchs(job), job.dtype), "ours": ours}


def new_mesh(job: Job) -> DeviceMesh:
    """Groups of job.tp neighbouring devices share a matrix."""
    world = dist.get_world_size()
    if world % job.tp or (job.tp > 1) != ("tp" in job.parallel):
        raise ValueError(f"--tp must divide the {world} devices, and be more than 1 just for tp, got {job.tp} with {job.parallel}")
    return init_device_mesh(job.device.type, (world // job.tp, job.tp), mesh_dim_names=("dp", "tp"))


def new_text(job: Job) -> Tensor:
    """A noisy cycle through the vocabulary."""
    places = torch.arange(2**14)
    noise = torch.randint(2, places.shape, generator=torch.Generator().manual_seed(SEED))
    return (5 * places + noise) % job.sizes["vocabulary"]


def run(name: str, job: Job, mesh: DeviceMesh) -> Run:
    """Trains from one seed; each group of devices has its own batches."""
    torch.manual_seed(SEED)
    model = PARALLEL[job.parallel](PROVIDERS[name](job).to(job.device), job, mesh)
    steps = train(model, batches(job, new_text(job), mesh.get_local_rank("dp")), job.learning_rate)
    losses, seconds = zip(*steps, strict=True)
    return Run(losses=list(losses), seconds=list(seconds))


def parse(argv: list[str] | None) -> Job:
    parser = argparse.ArgumentParser("bench.distributed_train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", choices=PARALLEL, default=JOB.parallel)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations; bfloat16 with fsdp")
    parser.add_argument("--tp", type=records.positive, help="devices that share a matrix (tp: all, fsdp+tp: 2, if not given)")
    for name, default in (JOB.sizes | {name: getattr(JOB, name) for name in ("seq_len", "batch", "steps")}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=records.positive, default=default, help="%(default)s if not given")
    arguments = vars(parser.parse_args(argv))
    if "RANK" not in os.environ:
        parser.error("it is started by torchrun: torchrun --nproc-per-node 2 -m bench.distributed_train")
    if arguments["tp"] is None:
        arguments["tp"] = {"tp": int(os.environ["WORLD_SIZE"]), "fsdp+tp": 2}.get(arguments["parallel"], 1)
    arguments["sizes"] = {name: arguments.pop(name) for name in JOB.sizes}
    arguments["dtype"] = getattr(torch, arguments["dtype"])
    gpu = torch.cuda.is_available()
    return replace(JOB, **arguments, device=torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else JOB.device)


def main(argv: list[str] | None = None) -> int:
    job = parse(argv)
    if job.device.type == "cuda":
        torch.cuda.set_device(job.device)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if job.device.type == "cuda" else "gloo")
    try:
        mesh = new_mesh(job)
        runs = {name: run(name, job, mesh) for name in PROVIDERS}
    finally:
        dist.destroy_process_group()
    if int(os.environ["RANK"]) == 0:
        report(job, runs)
    return 0 if agrees(runs["ours"], runs, BASELINE) else 1


def report(job: Job, runs: dict[str, Run]) -> None:
    world = int(os.environ["WORLD_SIZE"])
    on = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "CPU, kernels interpreted"
    print(f"{job.parallel} on {world} devices ({on}), groups of {job.tp}")
    print(f"{'step':>6}" + "".join(f"{name:>14}" for name in runs) + f"{'difference':>14}{'of control':>14}")
    for step, (torchs, controls, ours) in enumerate(zip(*(run.losses for run in runs.values()), strict=True)):
        print(f"{step:>6}{torchs:>14.5f}{controls:>14.5f}{ours:>14.5f}{ours - torchs:>14.1e}{controls - torchs:>14.1e}")
    tokens = job.tokens * world // job.tp
    print(f"{'':>6}" + "".join(f"{f'{tokens / run.step_seconds[1]:,.0f}':>14}" for run in runs.values()) + "  tokens/s")
    judge(runs, BASELINE)
