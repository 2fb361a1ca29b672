"""What is trained: jobs, the model, its data."""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

SEED = 0
TEXT = "pydoc_data.topics"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """What is trained, and how: everything except the norms."""

    sizes: dict[str, int] | None  # of the model; None: those of bench.census.tiny_models
    seq_len: int  # tokens per sequence; a token is a byte of text
    batch: int  # sequences per step, in each group of `tp` devices
    steps: int
    dtype: torch.dtype  # of parameters and activations; of activations alone where FSDP casts
    learning_rate: float
    device: torch.device = CPU
    model: str = "llama"  # a model type of transformers
    checkpointing: bool = False  # recompute activations of layers in the backward
    parallel: str = ""  # a key of bench.train.distributed.PARALLEL
    tp: int = 1  # devices that share a matrix

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.seq_len


PRESETS = {
    # fp32, because gammas near 1 do not move in bf16: a step of 0.001 is less than half the distance to the next number.
    "tiny": Job(
        {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        seq_len=128,
        batch=8,
        steps=100,
        dtype=torch.float32,
        learning_rate=1e-3,
    ),
    # The sizes of Llama-3.2-1B, except for its vocabulary.
    "1b": Job(
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
        seq_len=4096,
        batch=4,
        steps=50,
        dtype=torch.bfloat16,
        learning_rate=1e-4,
    ),
}


def new_model(job: Job) -> nn.Module:
    """A model with random weights, one token per byte. Every call returns the same and leaves the random state the same."""
    if job.sizes is None:
        from bench.census.tiny_models import tiny_model

        model = tiny_model(job.model, SEED).to(job.device, job.dtype)
        model.config.get_text_config().use_cache = False
        torch.manual_seed(SEED)
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(job.model, vocab_size=256, max_position_embeddings=job.seq_len, use_cache=False, **job.sizes)
        torch.manual_seed(SEED)
        with job.device:
            model = AutoModelForCausalLM.from_config(config, dtype=job.dtype)
    if job.checkpointing:  # under its new name, where transformers has it
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


def batches(job: Job, text: Tensor, group: int = 0) -> Iterator[Tensor]:
    """For each step, tokens [batch, seq_len] from random places of the text. Every call for one group of devices yields the same."""
    generator = torch.Generator().manual_seed(SEED + group)
    for _ in range(job.steps):
        starts = torch.randint(len(text) - job.seq_len + 1, (job.batch, 1), generator=generator)
        yield text[starts + torch.arange(job.seq_len)].long().to(job.device)


def read_text() -> Tensor:
    """The bytes of the help texts on the language that every Python has."""
    return torch.frombuffer(bytearray("\n\n".join(topics.values()), "utf8"), dtype=torch.uint8)


def count_parameters(job: Job) -> int:
    return sum(parameter.numel() for parameter in new_model(replace(job, device=torch.device("meta"))).parameters())


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
