"""bench.cost: what is counted without memory is what happens, byte by byte, and what is not interpreted is what was assumed."""

import importlib.util
import json
from collections import Counter
from contextlib import nullcontext
from functools import cache, reduce
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModel, LlamaConfig

from bench import traffic as one_launch
from bench.audit.record import launches as launches_of_problem
from bench.audit.traffic import traffic
from bench.cost import __main__, count, layers, report
from bench.cost.count import DIRECTIONS, Cost, Counts, cost_of, of_row
from bench.cost.layers import FUSED, HF, MODELS, OURS, PROVIDERS, RECOMPUTED, Model, count_layer
from bench.problem import Problem
from bench.traffic import Launched, UncountableError, launched, moved
from triton_rmsnorm import patch, recompute_norms
from triton_rmsnorm.runtime import config, launch

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="bytes are counted in the interpreter")

HIDDEN, HEADS, INTERMEDIATE, TOKENS = 256, 4, 512, 96
SIZES = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
SMALL = Model("llama", SIZES)
ROW = 2 * HIDDEN  # bytes of bf16
PEERS = [name for name, provider in PROVIDERS.items() if provider.package and importlib.util.find_spec(provider.package)]


@cache
def small(provider: str) -> Counts:
    return count_layer(SMALL, PROVIDERS[provider], TOKENS, torch.bfloat16).counts


def test_norms_of_ours_by_hand():
    """Two norms and two additions each way: every tensor once, and the partial sums of dw."""
    norm = {"read": TOKENS * ROW + ROW, "written": TOKENS * (ROW + 4)}  # x, weight; y, rstd
    add = {"read": 2 * TOKENS * ROW, "written": TOKENS * ROW}
    assert small(OURS).cost("norms", "forward") == Cost(4, 2 * (norm["read"] + add["read"]), 2 * (norm["written"] + add["written"]))
    main, _ = launches_of_problem(Problem(TOKENS, HIDDEN, "backward"), config.SM_90)
    partial = main.launch.grid[0] * 4 * HIDDEN  # every program writes one row of partial sums of dw
    read, written = 2 * TOKENS * ROW + ROW + 4 * TOKENS + partial, TOKENS * ROW + partial + ROW  # dy, x, weight, rstd; dx, dw
    assert small(OURS).cost("norms", "backward") == Cost(2 * 2 + 2, 2 * (read + add["read"]), 2 * (written + add["written"]))


def test_fused_and_recomputed_by_hand():
    """Fused, a sum is not read again, and gradients are not added by a launch. Recomputed outputs are read from x, weight and rstd."""
    saved = small(OURS).cost("norms", "forward"), small(FUSED).cost("norms", "forward")
    assert [a - b for a, b in zip(*saved, strict=True)] == [1, TOKENS * ROW, 0]
    saved = small(OURS).cost("norms", "backward"), small(FUSED).cost("norms", "backward")
    assert [a - b for a, b in zip(*saved, strict=True)] == [1, TOKENS * ROW, TOKENS * ROW]
    more = small(RECOMPUTED).cost("norms", "backward"), small(FUSED).cost("norms", "backward")
    assert [a - b for a, b in zip(*more, strict=True)] == [2, 2 * (TOKENS * (ROW + 4) + ROW), 2 * TOKENS * ROW]
    assert small(RECOMPUTED).cost("norms", "forward") == small(FUSED).cost("norms", "forward")
    assert small(FUSED).kept_by("norms") - small(RECOMPUTED).kept_by("norms") == 2 * TOKENS * ROW
    assert small(FUSED).kept_by("norms") == 2 * TOKENS * (2 * ROW + 4)  # x, y and rstd of both


def test_hugging_face_by_hand():
    """The forward of LlamaRMSNorm, operation by operation, in units of rows of bf16."""
    operations = {  # read, written; numbers per row count as 4 bytes
        "to float32": (1, 2),
        "pow": (2, 2),
        "rsqrt(mean + eps) · x": (2, 2),
        "to bf16": (2, 1),
        "· weight": (1, 1),
        "residual +": (2, 1),
    }
    read, written = (sum(column) * ROW * TOKENS for column in zip(*operations.values(), strict=True))
    read += TOKENS * 2 * ROW + ROW + 3 * 4 * TOKENS  # of mean: pow; of the product with it: weight; mean, mean + eps, rstd
    written += 3 * 4 * TOKENS
    assert small(HF).cost("norms", "forward") == Cost(18, 2 * read, 2 * written)


@pytest.mark.parametrize("provider", [HF, "torch composite", OURS, FUSED, RECOMPUTED, *PEERS])
def test_the_rest_does_not_depend_on_the_provider(provider):
    for direction in DIRECTIONS:
        assert small(provider).cost("rest", direction) == small(HF).cost("rest", direction)
    assert small(provider).kept_by("rest") == small(HF).kept_by("rest")


@pytest.mark.parametrize("provider", [HF, OURS, RECOMPUTED])
def test_kept_is_what_a_real_layer_keeps(provider, device):
    """Of a layer with memory, by the same attention."""
    torch.manual_seed(0)
    settings = {"num_hidden_layers": 1, "vocab_size": 8, "use_cache": False, **SIZES}
    model = AutoModel.from_config(LlamaConfig(**settings), dtype=torch.bfloat16, attn_implementation="sdpa").to(device)
    if provider != HF:
        patch(model, fuse_residual=provider == RECOMPUTED)
    kept: dict[int, torch.UntypedStorage] = {}
    given = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if inside and storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage
        return tensor

    inside: list[bool] = []
    layer = model.layers[0]
    layer.register_forward_pre_hook(lambda *_: inside.append(True))
    layer.register_forward_hook(lambda *_: inside.pop() and None)
    hidden = torch.randn(1, TOKENS, HIDDEN, dtype=torch.bfloat16, device=device, requires_grad=True)
    rotary = model.rotary_emb(hidden, torch.arange(TOKENS, device=device)[None])
    model.rotary_emb.forward = lambda *_, **__: rotary
    given |= {tensor.untyped_storage().data_ptr() for tensor in rotary}
    with saved_tensors_hooks(pack, lambda tensor: tensor), recompute_norms() if provider == RECOMPUTED else nullcontext():
        output = model(inputs_embeds=hidden).last_hidden_state
    ours = sum(storage.nbytes() for storage in kept.values())
    output.sum().backward()
    # The flash operator for GPUs also keeps the state of the random numbers of dropout; that for CPUs does not.
    assert 0 <= small(provider).kept_by("layer") - ours <= 32


@pytest.mark.slow
@pytest.mark.parametrize("provider", [OURS, RECOMPUTED, *PEERS])
def test_bisection_counts_every_program(provider, monkeypatch):
    """Of all kernels, where programs do not do the same: 132 of them share 250 rows."""
    found: list[Launched] = []
    monkeypatch.setattr(count, "launched", lambda *arguments: found.append(launched(*arguments)) or found[-1])
    count_layer(SMALL, PROVIDERS[provider], 250, torch.bfloat16)
    monkeypatch.undo()
    assert len(found) > 2
    bisected = {one: moved(one) for one in set(found)}

    def every_program(self, low, high, y, z):
        return sum((self.program(x, y, z).moved for x in range(low, high + 1)), Counter())

    monkeypatch.setattr(one_launch._Programs, "sum", every_program)
    for one, counted in bisected.items():
        assert moved.__wrapped__(one) == counted, one.kernel.__name__


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("variant", ["plain", "residual", "gate"])
def test_the_audit_counts_the_same(variant, direction):
    """By another method, from the interpretation of one tile and of two."""
    problem = Problem(1024, 512, direction, variant)
    counted, ours = traffic(problem, config.SM_90), Cost()
    for found in launches_of_problem(problem, config.SM_90):
        ours = ours.plus(cost_of(launched(found.launch.kernel, found.launch.grid, found.pointers | found.launch.values)))
    assert ours.read == sum(counted.loaded.values()) - sum(counted.cached.values())
    assert ours.written == sum(counted.stored.values())


OPERATIONS = {  # launches, bytes read and written for fp32 tensors of 10 x 20
    "views are free": (lambda x: x.t().reshape(20, 5, 2)[3:].unsqueeze(0).detach(), Cost()),
    "memory is free": (lambda x: (torch.empty_like(x), x.new_empty(7)), Cost()),
    "an operand that is given twice": (lambda x: x * x, Cost(1, 800, 800)),
    "an expanded operand": (lambda x: x + x[:1].expand(10, 20), Cost(1, 800 + 80, 800)),
    "in place": (lambda x: x.add_(1), Cost(1, 800, 800)),
    "a copy": (lambda x: x.to(torch.float64), Cost(1, 800, 1600)),
    "into another": (lambda x: torch.empty_like(x).copy_(x), Cost(1, 800, 800)),
    "a fill": (lambda x: (torch.zeros_like(x), x.zero_()), Cost(2, 0, 1600)),
    "a transposed copy": (lambda x: x.t().contiguous(), Cost(1, 800, 800)),
    "a product of matrices": (lambda x: x @ x.t(), Cost(1, 800 + 800, 400)),
    "a sum": (lambda x: x.sum(0), Cost(1, 800, 80)),
}


@pytest.mark.parametrize(("function", "cost"), OPERATIONS.values(), ids=OPERATIONS)
def test_operations(function, cost):
    """What is counted outside of any model."""
    counted: list[Cost] = []
    counter = SimpleNamespace(add=counted.append, made=lambda tensors: None)
    with count._Operations(counter):
        function(torch.empty(10, 20, device="meta"))
    assert reduce(Cost.plus, counted, Cost()) == cost


def test_what_cannot_be_counted(capsys):
    with pytest.raises(UncountableError, match="not installed"):
        count_layer(SMALL, PROVIDERS[HF]._replace(package="no_such_package"), TOKENS, torch.bfloat16)
    with pytest.raises(UncountableError, match="has none of these norms"):
        count_layer(SMALL, PROVIDERS[HF]._replace(equip=lambda model, norms: 0), TOKENS, torch.bfloat16)
    with pytest.raises(SystemExit):
        __main__.main(["--model", "Llama-3-8B", "llama-3"])
    assert "--model must be a model type of transformers, such as llama" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        __main__.main(["--tokens", "0"])
    assert "--tokens: must be a positive integer, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_models_that_cannot_be_counted(monkeypatch, tmp_path, capsys):
    """One without RMS norms, and one that takes another input."""
    monkeypatch.setattr(__main__.records, "RESULTS", tmp_path)
    assert __main__.main(["--model", "bert", "t5", "--tokens", "64", "--jobs", "1"]) == 1
    shown = capsys.readouterr().out
    assert "bert, ours: no RMS norm is recognized" in shown and "t5, ours: ValueError: You must specify" in shown
    assert not list(tmp_path.iterdir())


@pytest.fixture
def record(monkeypatch, tmp_path, capsys) -> dict:
    """What the command writes for a small model and the providers that are always there, one of which has none of its norms."""
    monkeypatch.setattr(layers, "MODELS", {"small": SMALL})
    monkeypatch.setattr(__main__, "MODELS", {"small": SMALL})
    monkeypatch.setattr(layers, "PROVIDERS", {HF: PROVIDERS[HF], OURS: PROVIDERS[OURS], "none": PROVIDERS[HF]._replace(equip=lambda *_: 0)})
    monkeypatch.setattr(__main__.records, "RESULTS", tmp_path)
    assert __main__.main(["--tokens", str(TOKENS)]) == 0
    file = tmp_path / "cost-bf16-96.json"
    assert file.with_suffix(".png").stat().st_size > 10_000
    assert f"| none | {report.DASH} |" in capsys.readouterr().out
    return json.loads(file.read_text())


def test_record(record):
    of_hf, of_ours, of_none = record["rows"]
    assert of_none == {"model": "small", "provider": "none", "reason": "has none of these norms"}
    assert of_row(of_hf) == small(HF) and of_row(of_ours) == small(OURS)
    table, kb = report.markdown(record), TOKENS * 1024
    forward, backward = (small(OURS).cost("norms", direction).read / kb for direction in DIRECTIONS)
    assert f"| ours | 2 of 2 | 4 + 6 | {forward:.1f} + {backward:.1f} |" in table
    assert "small, none: has none of these norms." in table

    texts = [text.get_text().strip() for axes in report.picture(record).axes for text in axes.texts]
    assert texts[:3] == [report.DASH, *(f"{small(provider).cost('norms').moved / kb:.0f}" for provider in (OURS, HF))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "olmo2", *MODELS])
def test_models(name):
    """Any type of transformers that runs without values, in its own configuration."""
    model = MODELS.get(name) or Model(name, {})
    ours, theirs = (count_layer(model, PROVIDERS[provider], 64, torch.bfloat16) for provider in (FUSED, HF))
    assert ours.computed == ours.norms >= 2
    assert 0 < ours.counts.cost("norms").moved < theirs.counts.cost("norms").moved
    assert ours.counts.cost("layer").moved < theirs.counts.cost("layer").moved
