"""Trains one model on several devices with torch.nn.RMSNorm and with ours, and compares the losses.

    torchrun --nproc-per-node 2 -m bench.distributed_train --parallel tp
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        -m bench.distributed_train --parallel fsdp+tp --tp 8

    ddp      DistributedDataParallel
    fsdp     FSDP2, fully_shard: parameters and optimizer sharded
    tp       tensor and sequence parallelism: between the split matrices, each device normalizes its part of the sequence
    fsdp+tp  both, on a mesh of two dimensions

With GPUs the devices talk through NCCL; without, they are processes that talk through gloo, and the kernels run in Triton's interpreter.
Two computations that differ only in rounding drift apart in training; how far is shown by a third run, the control: torch.nn.RMSNorm with
every gamma moved to a neighbouring number, of the dtype that it is used in. The losses of ours may differ from torch's by DRIFT times what
the control's do (bench.train).
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from bench.train import DRIFT, control

# triton_rmsnorm is not imported before it is decided whether Triton interprets.

SEED = 0


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and how; everything but the norms."""

    parallel: str = "ddp"
    tp: int = 1  # devices that share a matrix
    dim: int = 64
    layers: int = 2
    heads: int = 4
    vocabulary: int = 64
    seq_len: int = 32
    batch: int = 2  # sequences a step, on each group of `tp` devices
    steps: int = 20
    dtype: torch.dtype = torch.float32  # of activations, and of what is sent forward
    learning_rate: float = 3e-3
    device: torch.device = CPU


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, job: Job, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.head_dim = job.dim // job.heads
        self.attention_norm, self.feed_forward_norm = norm(job.dim), norm(job.dim)
        self.q, self.k, self.v, self.o = (nn.Linear(job.dim, job.dim, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(job.dim, 3 * job.dim, bias=False), nn.Linear(3 * job.dim, job.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (linear(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).flatten(-2))
        return x + self.down(F.silu(self.up(self.feed_forward_norm(x))))


class Decoder(nn.Module):
    """Tokens [batch, seq_len] -> logits [batch, seq_len, vocabulary]."""

    def __init__(self, job: Job, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.embedding = nn.Embedding(job.vocabulary, job.dim)
        self.blocks = nn.ModuleList(Block(job, norm) for _ in range(job.layers))
        self.norm = norm(job.dim)
        self.head = nn.Linear(job.dim, job.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


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
    gathered = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False)
    outer = {
        "embedding": gathered,
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    norm = SequenceParallel()
    split = ColwiseParallel(input_layouts=Shard(1))
    joined = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
    inner = {"attention_norm": norm, "feed_forward_norm": norm}
    inner |= dict.fromkeys(("q", "k", "v", "up"), split) | dict.fromkeys(("o", "down"), joined)
    parallelize_module(model, mesh["tp"], outer)
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], inner)
    return model


PARALLEL: dict[str, Callable[[Decoder, Job, DeviceMesh], nn.Module]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "tp": tp,
    "fsdp+tp": lambda model, job, mesh: fsdp(tp(model, job, mesh), job, mesh),
}


def ours(dim: int) -> nn.Module:
    from triton_rmsnorm import RMSNorm

    return RMSNorm(dim, eps=1e-6)


def torchs(dim: int) -> nn.Module:
    return nn.RMSNorm(dim, eps=1e-6)


PROVIDERS: dict[str, Callable[[int], nn.Module]] = {"torch": torchs, "control": torchs, "ours": ours}


class Run(NamedTuple):
    losses: list[float]  # mean over all devices, one a step
    seconds: float  # a step, median


def new_mesh(job: Job) -> DeviceMesh:
    """Groups of job.tp neighbouring devices share a matrix."""
    world = dist.get_world_size()
    if world % job.tp or (job.tp > 1) != ("tp" in job.parallel):
        raise ValueError(f"--tp must divide the {world} devices, and be more than 1 just for tp, got {job.tp} with {job.parallel}")
    return init_device_mesh(job.device.type, (world // job.tp, job.tp), mesh_dim_names=("dp", "tp"))


def batches(job: Job, group: int) -> Iterator[Tensor]:
    """For each step, tokens [batch, seq_len + 1] of a noisy cycle through the vocabulary: for each group its own, the same every time."""
    for step in range(job.steps):
        generator = torch.Generator().manual_seed(1000 * step + group)
        starts = torch.randint(job.vocabulary, (job.batch, 1), generator=generator)
        noise = torch.randint(2, (job.batch, job.seq_len + 1), generator=generator)
        yield ((starts + 5 * torch.arange(job.seq_len + 1) + noise) % job.vocabulary).to(job.device)


def run(name: str, job: Job, mesh: DeviceMesh) -> Run:
    """Trains from the one seed."""
    torch.manual_seed(SEED)
    model = Decoder(job, PROVIDERS[name])
    if name == "control":
        control(model, job.dtype)
    model = PARALLEL[job.parallel](model.to(job.device), job, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.learning_rate)
    losses, seconds = [], []
    for tokens in batches(job, mesh.get_local_rank("dp")):
        start = time.perf_counter()
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    return Run(losses, statistics.median(seconds))


def largest_difference(a: Run, b: Run) -> float:
    """NaN if any loss is."""
    return (torch.tensor(a.losses, dtype=torch.float64) - torch.tensor(b.losses, dtype=torch.float64)).abs().max().item()


def tolerance(runs: dict[str, Run]) -> float:
    """DRIFT times the largest difference that the control showed, or one rounding of the loss, which is fp32 and may show none."""
    rounding = torch.finfo(torch.float32).eps * max(runs["torch"].losses)
    return DRIFT * max(rounding, largest_difference(runs["control"], runs["torch"]))


def parse(argv: list[str] | None) -> Job:
    parser = argparse.ArgumentParser("bench.distributed_train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", choices=PARALLEL, default="ddp")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations; bfloat16 with fsdp")
    parser.add_argument("--tp", type=int, help="devices that share a matrix (tp: all, fsdp+tp: 2, if not given)")
    for name in ("dim", "layers", "heads", "vocabulary", "seq-len", "batch", "steps"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Job, name.replace("-", "_")), help="%(default)s if not given")
    arguments = vars(parser.parse_args(argv))
    if arguments["tp"] is None:
        arguments["tp"] = {"tp": int(os.environ["WORLD_SIZE"]), "fsdp+tp": 2}.get(arguments["parallel"], 1)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    return Job(**{**arguments, "dtype": getattr(torch, arguments["dtype"]), "device": device})


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
    agrees = largest_difference(runs["ours"], runs["torch"]) <= tolerance(runs)  # not if it is NaN
    if int(os.environ["RANK"]) == 0:
        report(job, runs, agrees)
    return 0 if agrees else 1


def report(job: Job, runs: dict[str, Run], agrees: bool) -> None:
    on = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "CPU, kernels interpreted"
    print(f"{job.parallel} on {os.environ['WORLD_SIZE']} devices ({on}), groups of {job.tp}")
    print(f"{'step':>6}" + "".join(f"{name:>14}" for name in runs) + f"{'difference':>14}{'of control':>14}")
    for step, (torchs, controls, ours) in enumerate(zip(*(run.losses for run in runs.values()), strict=True)):
        print(f"{step:>6}{torchs:>14.5f}{controls:>14.5f}{ours:>14.5f}{ours - torchs:>14.1e}{controls - torchs:>14.1e}")
    tokens = job.batch * job.seq_len * int(os.environ["WORLD_SIZE"]) // job.tp
    print(f"{'':>6}" + "".join(f"{f'{tokens / run.seconds:,.0f}':>14}" for run in runs.values()) + "  tokens/s")
    difference = largest_difference(runs["ours"], runs["torch"])
    print(f"Largest difference: {difference:.1e}, tolerance {tolerance(runs):.1e}: {'the same' if agrees else 'TOO MUCH'}.")


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # gloo's threads outlive their group, and torch aborts where one frees its last tensor while Python ends
