"""What integrations do without the frameworks. With them: tests/test_integrations_kernels.py, which runs where versions fit."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

import triton_rmsnorm

PAGE = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
# The Python blocks under each heading.
BLOCKS = {
    f"{heading} {number}": code
    for heading, section in re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", PAGE, re.MULTILINE)
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))
}


def test_versions_that_do_not_fit(monkeypatch):
    import_utils = pytest.importorskip("transformers.utils.import_utils")
    monkeypatch.setattr(import_utils, "is_kernels_available", lambda: False)
    with pytest.raises(
        ImportError, match=r"kernels must be >=.*,<.* for transformers .*, got .*; transformers 5.22.2 and kernels 0.17.2 fit"
    ):
        triton_rmsnorm.kernel_config()


def test_transformers_without_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.utils.import_utils", None)
    with pytest.raises(ImportError, match=r"transformers must be 5.22 or later for kernel_config, got "):
        triton_rmsnorm.kernel_config()


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """A directory with a tiny Llama, its tokenizer and a dataset; the current directory is empty."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from bench.census.tiny_models import tiny_model

    path = tmp_path / "tiny"
    tiny_model("llama").save_pretrained(path)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    (path / "data.jsonl").write_text("".join(json.dumps({"text": f"After {i} comes {i + 1}."}) + "\n" for i in range(64)))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_blocks_of_the_page(block, tiny, group_of_one, launches):
    """Where a block's framework is installed."""
    for framework in re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE):
        pytest.importorskip(framework)
    if "kernel_config" in block:
        pytest.importorskip("triton_rmsnorm.integrations.transformers", exc_type=ImportError)
    from transformers import AutoModelForCausalLM

    ids = torch.arange(8)
    names = {"triton_rmsnorm": triton_rmsnorm, "torch": torch, "name": str(tiny), "model": AutoModelForCausalLM.from_pretrained(tiny)}
    if "trl" in block:
        block = block.replace("max_steps=2", "max_steps=2, use_cpu=True")
        datasets = pytest.importorskip("datasets")
        names["dataset"] = datasets.load_dataset("json", data_files=str(tiny / "data.jsonl"), split="train")
    else:
        names["dataset"] = [{"input_ids": ids, "labels": ids}] * 4
    exec(compile(block, "integrations.md", "exec"), names)
    if "dataset" not in block:
        names["model"](input_ids=ids[None], labels=ids[None]).loss.backward()
    forwards = [recorded for recorded in launches if "fwd" in recorded.launch.kernel.fn.__name__]
    assert len(forwards) >= 5 * (2 if "max_steps=2" in block else 1)  # TRL checkpoints activations


@pytest.mark.slow
def test_axolotl(tiny):
    """The plugin of the page, in a training run of axolotl: losses are what they are without it."""
    yaml = pytest.importorskip("yaml")
    pytest.importorskip("axolotl")
    config = {
        "base_model": str(tiny),
        "datasets": [{"path": str(tiny / "data.jsonl"), "ds_type": "json", "type": "completion"}],
        "sequence_len": 64,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "learning_rate": 0.001,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "output_dir": "out",
        "bf16": False,
        "attn_implementation": "eager",
        "logging_steps": 1,
        "special_tokens": {"pad_token": "<pad>"},
    }
    plugin = yaml.safe_load(re.search(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1])
    losses = []
    for options in ({}, plugin):
        Path("config.yaml").write_text(yaml.safe_dump(config | options))
        command = [sys.executable, "-m", "axolotl.cli.train", "config.yaml"]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        losses.append([float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", output)])
        for outcome in (r"LlamaRMSNorm .* 5 .*replaced", r"LlamaDecoderLayer .* 2 .*fused"):
            assert bool(re.search(outcome, output)) == bool(options)
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], abs=1e-3)


def train_with_torchtitan(rank: int, path: Path, imports: list[str]) -> None:
    """Three steps of torchtitan's smallest Llama on one of two processes, sharded; the losses are saved."""
    from torch.distributed.fsdp import FSDPModule
    from torchtitan.config import OverrideConfig, apply_overrides
    from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import model_registry

    from triton_rmsnorm.runtime import launch

    dist.init_process_group("gloo", init_method=f"file://{path}/group{len(imports)}", rank=rank, world_size=2)
    config = model_registry("debugmodel", attn_backend="flex").model
    config.layers = config.layers[:2]
    for layer in config.layers:  # flex attention has no backward on the CPU
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    apply_overrides(OverrideConfig(imports=imports), config)
    with torch.device("meta"):
        model = config.build()
    model.verify_module_protocol()
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    apply_fsdp_to_decoder(model, mesh, param_dtype=torch.float32, reduce_dtype=torch.float32, pp_enabled=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_states()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(2048, (2, 17), generator=torch.Generator().manual_seed(rank))
    losses = []
    with launch.recorded() as launches:
        for _ in range(3):
            logits = model(tokens[:, :-1], torch.arange(16).expand(2, 16))
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    forwards = [recorded for recorded in launches if "fwd" in recorded.launch.kernel.fn.__name__]
    torch.save((losses, len(forwards)), path / f"{rank}{len(imports)}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_torchtitan(tmp_path):
    """The override of the page: all five norms are ours, and losses are what they are without it."""
    pytest.importorskip("torchtitan")
    target = re.search(r"--override.imports (\S+)", PAGE)[1]
    for imports in ([], [target]):
        multiprocessing.spawn(train_with_torchtitan, (tmp_path, imports), nprocs=2)
    for rank in range(2):
        (plain, none), (ours, forwards) = (torch.load(tmp_path / f"{rank}{overrides}") for overrides in range(2))
        assert none == 0 and forwards == 3 * 5
        assert ours == pytest.approx(plain, rel=1e-5) and plain[2] < plain[0]
