"""Classes of norms, each built alone with 64 columns: what it computes, and whether its replacement computes the same."""

import copy
import importlib
import inspect
import itertools
import pkgutil
from operator import attrgetter

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from bench.census.compare import DEVICE, reported, row_of
from bench.census.tiny_models import tiny_config
from triton_rmsnorm import patch
from triton_rmsnorm.patching.recognition import agree, may_be_norm, recognize
from triton_rmsnorm.patching.report import in_words
from triton_rmsnorm.patching.semantics import evaluate


def classes_of(package: str) -> dict:
    """What became of every class of norms that is defined in the modeling files of a package, built with 64 columns."""
    result: dict = {"package": package, "stage": "import", "classes": []}
    with reported(result):
        for file in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if not file.name.startswith("modeling_"):
                continue
            result["stage"] = "import"
            module = importlib.import_module(f"{package}.{file.name}")
            result["stage"] = "compare"
            for cls in vars(module).values():
                if isinstance(cls, type) and cls.__module__ == module.__name__ and may_be_norm(cls):
                    outcomes = (_class_outcome(cls, arguments) for arguments in _variants(cls, package))
                    result["classes"] += [outcome for outcome in outcomes if outcome["status"] != "no norm"]
        result["stage"] = "compared"
    return result


def _variants(cls: type, package: str) -> list[dict]:
    """Arguments of the constructor: 64 columns, every combination of switches, with and without groups.

    For a config, the arguments contain its class or model type.
    """
    choices: dict[str, tuple] = {}
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        required = parameter.default is parameter.empty
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if type(parameter.default) is bool:
            choices[name] = (True, False)
        elif name == "config":
            is_class = isinstance(parameter.annotation, type) and issubclass(parameter.annotation, PreTrainedConfig)
            choices[name] = (parameter.annotation if is_class else package.rpartition(".")[2],)
        elif "group_size" in name:
            choices[name] = (16, 64) if required else (None, 16)
        elif "n_groups" in name:
            choices[name] = (1, 4)
        elif name in ("dim", "hidden_size") or (required and "eps" not in name):
            choices[name] = (64,)
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def _class_outcome(cls: type, arguments: dict) -> dict:
    outcome: dict = {"class": f"{cls.__module__.rpartition('.modeling_')[2]}.{cls.__name__}"}
    if switches := {name: value for name, value in arguments.items() if name != "config" and value != 64}:
        outcome["switches"] = switches
    try:
        module = cls(**(arguments | {name: tiny_config(arguments[name]) for name in {"config"} & arguments.keys()}))
    except Exception as error:
        named = "norm" in cls.__name__.lower()
        return outcome | ({"status": "not built", "reason": in_words(error)} if named else {"status": "no norm"})
    if recognize(module) is None:
        return outcome | {"status": "no norm"}
    row = next(row for row in patch(copy.deepcopy(module)).rows if row.cls is cls)
    outcome |= {name: value for name, value in row_of(row).items() if name not in ("name", "count")}
    if row.status == "replaced" and (where := _compare_alone(module)):
        outcome["differs"] = where
    return outcome


def _compare_alone(module: nn.Module) -> str:
    """Where a norm and its replacement differ on strided input, if anywhere: y is compared as recognition does, gradients by the budget."""
    norm = recognize(module).norm
    gated = norm.semantics.activation is not None
    for dtype, weight_dtype in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)):
        torch.manual_seed(0)
        original = copy.deepcopy(module).to(DEVICE, weight_dtype)
        for parameter in original.parameters():
            torch.nn.init.normal_(parameter)
        ours = copy.deepcopy(original)
        patch(ours)
        columns = getattr(original, norm.weight).numel() if norm.weight else 64
        x, gate = torch.randn(2, 8, 3, columns).to(DEVICE, dtype).transpose(1, 2)  # [3, 8, columns], strided
        inputs = [x, gate][: 1 + gated]
        y = [one(*inputs) for one in (original, ours)]
        if not agree(*y):
            return f"y, {dtype}"
        dy = torch.randn_like(y[0])
        truth = copy.deepcopy(original).double()
        leaves = [t.double().requires_grad_() for t in inputs]
        weight = getattr(truth, norm.weight) if norm.weight else None
        value = attrgetter(norm.eps)(module) if isinstance(norm.eps, str) else norm.eps
        exact = evaluate(norm.semantics.in_float32(), leaves[0], weight, value, norm.dims, leaves[1] if gated else None)
        wanted = _gradients(exact, leaves, truth, dy.double())
        found = []
        for one in (original, ours):
            leaves = [t.detach().requires_grad_() for t in inputs]
            found.append(_gradients(one(*leaves), leaves, one, dy))
        for index, (theirs, mine, exact) in enumerate(zip(*found, wanted, strict=True)):
            budget = 2 * (theirs.double() - exact).norm() + torch.finfo(mine.dtype).eps * exact.norm()
            if mine.dtype != theirs.dtype or (mine.double() - exact).norm() > budget:
                return f"gradient {index}, {dtype}"
    return ""


def _gradients(y: Tensor, inputs: list[Tensor], module: nn.Module, dy: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, [*inputs, *module.parameters()], dy))
