"""Patches a tiny random model of every model type of the installed transformers, and every class of norms on its own, and compares.

    python -m bench.hf_census                       all of it; writes docs/hf_census.md
    python -m bench.hf_census --types llama t5      some model types; prints

Without a GPU the kernels run in Triton's interpreter: then this is about what is computed, not about how a GPU rounds.

A model is run forward and backward (random weights of all outputs make the loss) as it is, and patched, in fp32 and in bf16, beside the
same weights in fp64. Of every output and every gradient the patched model may be twice as far from fp64 as the original is, plus one
unit in the last place. What rounding alone does to the original is also measured by controls, the original with every one-dimensional
parameter moved to a neighbouring number: of the original and the controls, the one farthest from fp64 counts. Where a model does not
run in fp64, the original takes its place. Distances are Euclidean, tensor by tensor. Besides, each norm's output is compared with what
the original's forward makes of the same input, as recognition tells semantics apart: equal in half precision but for a few elements on a
rounding boundary, to the last bits in fp32. Where residual adds can be fused with norms, the model is also run so, within the same budget.
The state_dict must not change in any bit.
"""

import argparse
import copy
import importlib
import inspect
import itertools
import json
import os
import pkgutil
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import model_type_to_module_name

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from bench.census.tiny_models import model_types, tiny_batch, tiny_config, tiny_model, unknown
from bench.census_page import differences, page
from bench.workers import in_processes
from triton_rmsnorm import patch, unpatch
from triton_rmsnorm.patching.recognition import agree, may_be_norm, recognize
from triton_rmsnorm.patching.replacement import is_replacement
from triton_rmsnorm.patching.semantics import evaluate

PAGE = Path(__file__).parent.parent / "docs" / "hf_census.md"
SECONDS = 120  # of processor time for one task
HANGS = 600  # seconds after which a process is given up
CONTROLS = 8  # when the first does not decide
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def census(model_type: str) -> dict:
    """What became of the model of one type: stage, and why it stopped there; a row for each class of norms or layers; the largest
    distances."""
    result: dict = {"type": model_type, "stage": "build"}
    with _reported(result):
        model = tiny_model(model_type).eval()
        result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        result["stage"] = "patch"
        report = patch(model, fuse_residual=True)
        result["rows"] = [_row(row) for row in report.rows if not _is_layer(row)]
        result["layers"] = [_row(row) for row in report.rows if _is_layer(row)]
        after = model.state_dict()
        fused = copy.deepcopy(model) if report.fused else None
        unpatch(model)
        if list(before) != list(after) or not all(_same_bits(before[name], after[name]) for name in before):
            raise DiffersError("the state_dict has changed")
        if not report.replaced:
            result["stage"] = "no norms"
            return result
        result["stage"] = "run"
        batch = tiny_batch(model)
        for dtype in (torch.float32, torch.bfloat16):
            cast = copy.deepcopy(model).to(DEVICE, dtype)
            result[str(dtype)] = compare(cast, batch, dtype, copy.deepcopy(fused).to(DEVICE, dtype) if fused else None)
        result["stage"] = "compared"
    return result


def compare(model: nn.Module, batch: dict, dtype: torch.dtype, fused: nn.Module | None = None) -> tuple[float, str, bool]:
    """The largest distance in parts of its budget, of which tensor, and whether fp64 was there to compare with. `model` stays as it is.

    Args:
        fused: the model once more, patched in another way, which is held to the same budget.
    """
    # Copies, because some models keep states from one run to the next.
    original = _run(copy.deepcopy(model), batch, dtype)
    others: list[str] = []
    replaced = copy.deepcopy(model)
    try:
        patch(replaced)
        with _watched(replaced, others):
            ours = [_run(replaced, batch, dtype)]
        if fused is not None:
            ours.append(_run(fused, batch, dtype))
    except Exception as error:
        raise DiffersError(f"patched, it raises {_message(error)}") from error
    if others:
        raise DiffersError(f"another output of {', '.join(others)}")
    for one in ours:
        if one.keys() != original.keys():
            raise DiffersError(f"outputs or gradients came or went: {sorted(one.keys() ^ original.keys())}")
    try:
        truth, in_fp64 = _run(copy.deepcopy(model).double(), batch, torch.float64), True
    except (RuntimeError, TypeError, ValueError):
        truth, in_fp64 = original, False
    noise = {name: (original[name] - truth[name]).norm() for name in truth.keys() & original.keys()}
    for control in range(CONTROLS):
        moved = _run(_moved(model, seed=control), batch, dtype)
        for name in noise.keys() & moved.keys():
            noise[name] = torch.maximum(noise[name], (moved[name] - truth[name]).norm())
        parts = {}
        for name, distance in noise.items():
            budget = 2 * distance + torch.finfo(dtype).eps * truth[name].norm()
            for one in ours:
                part = ((one[name] - truth[name]).norm() / budget).item() if budget > 0 else float(not one[name].equal(truth[name]))
                parts[name] = part if not part <= parts.get(name, 0.0) else parts.get(name, 0.0)  # nan stays
        worst = max(parts, key=parts.get)
        if parts[worst] <= 1:
            break
    return parts[worst], worst, in_fp64


@contextmanager
def _watched(model: nn.Module, others: list[str]) -> Iterator[None]:
    """Collects in `others` the norms whose output is not what the original's forward makes of the same input."""

    def watch(name: str, module: nn.Module):
        original = type(module).__bases__[0].forward

        @torch.no_grad()
        def hook(module, args, kwargs, output):
            if not agree(output, original(module, *args, **kwargs)):
                others.append(name)

        return module.register_forward_hook(hook, with_kwargs=True)

    hooks = [watch(name, module) for name, module in model.named_modules() if is_replacement(type(module))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _run(model: nn.Module, batch: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients by name, in fp64, of a loss that weights all outputs at random."""
    torch.manual_seed(0)
    model.zero_grad()
    batch = {name: _cast(value, dtype) for name, value in batch.items()}
    outputs = dict(_tensors("output", model(**batch)))
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(output.shape, generator=generator).to(output.device) for name, output in outputs.items()}
    sum((output.double() * weights[name]).sum() for name, output in outputs.items() if output.requires_grad).backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().to(torch.float64, copy=True) for name, tensor in (outputs | gradients).items()}


def _tensors(name: str, value) -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in a model's output, but for caches."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield name, value
    elif isinstance(value, dict):
        for key, one in value.items():
            if "past_key" not in str(key) and "cache" not in str(key):
                yield from _tensors(f"{name}.{key}", one)
    elif isinstance(value, (list, tuple)):
        for index, one in enumerate(value):
            yield from _tensors(f"{name}.{index}", one)


def _cast(value, dtype: torch.dtype):
    if not isinstance(value, Tensor):
        return value
    return value.to(DEVICE, dtype if value.is_floating_point() else value.dtype)


def _moved(model: nn.Module, seed: int) -> nn.Module:
    """A copy with every element of one-dimensional parameters moved to a neighbouring number, up or down."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                direction = torch.randn(parameter.shape, generator=generator).to(parameter) * torch.inf
                parameter.copy_(torch.nextafter(parameter, direction))
    return model


def classes_of(package: str) -> dict:
    """What became of every class of norms that is defined in the modeling files of a package, built with 64 columns."""
    result: dict = {"package": package, "stage": "import", "classes": []}
    with _reported(result):
        for file in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if not file.name.startswith("modeling_"):
                continue
            result["stage"] = "import"
            module = importlib.import_module(f"{package}.{file.name}")
            result["stage"] = "compare"
            for cls in vars(module).values():
                if isinstance(cls, type) and cls.__module__ == module.__name__ and may_be_norm(cls):
                    result["classes"] += [_class_outcome(cls, arguments) for arguments in _variants(cls, package)]
        result["stage"] = "compared"
    return result


def _variants(cls: type, package: str) -> list[dict]:
    """Arguments of the constructor: 64 columns, every combination of switches, with and without groups; what to shrink for a config."""
    choices: dict[str, tuple] = {}
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        required = parameter.default is parameter.empty
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if type(parameter.default) is bool:
            choices[name] = (True, False)
        elif name == "config":
            choices[name] = (parameter.annotation if _is_config(parameter.annotation) else package.rpartition(".")[2],)
        elif "group_size" in name:
            choices[name] = (16, 64) if required else (None, 16)
        elif "n_groups" in name:
            choices[name] = (1, 4)
        elif name in ("dim", "hidden_size") or (required and "eps" not in name):
            choices[name] = (64,)
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def _is_config(annotation) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, PreTrainedConfig)


def _class_outcome(cls: type, arguments: dict) -> dict:
    plain = {name: value for name, value in arguments.items() if name != "config"}
    outcome = {"class": f"{cls.__module__.rpartition('.modeling_')[2]}.{cls.__name__}", "arguments": plain}
    try:
        module = cls(**(arguments | {name: tiny_config(arguments[name]) for name in {"config"} & arguments.keys()}))
    except Exception as error:
        named = "norm" in cls.__name__.lower()
        return outcome | ({"status": "not built", "reason": _message(error)} if named else {"status": "no norm"})
    if recognize(module) is None:
        return outcome | {"status": "no norm"}
    row = next(row for row in patch(copy.deepcopy(module)).rows if row.cls is cls)
    outcome |= _row(row)
    if row.status == "replaced":
        outcome["differs"] = _compare_alone(module)
    return outcome


def _compare_alone(module: nn.Module) -> str:
    """Where a norm and its replacement differ on strided input: y as `recognition` tells semantics apart, gradients by the budget."""
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
        value = getattr(module, norm.eps) if isinstance(norm.eps, str) else norm.eps
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


def _row(row) -> dict:
    return {"name": row.cls.__name__, **{name: getattr(row, name) for name in ("semantics", "count", "status", "reason", "resembles")}}


def _is_layer(row) -> bool:
    return row.semantics.startswith("residual add")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _message(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)}"[:160]


class DiffersError(Exception):
    """A patched model is not what it was."""


class _TooLongError(BaseException):
    """A task has taken more than its seconds. Not what an interpreter or a model may catch."""


@contextmanager
def _reported(result: dict) -> Iterator[None]:
    """Notes what is raised, and the seconds."""

    def stop(*_):
        raise _TooLongError(f"more than {SECONDS} seconds of processor time")

    start = time.process_time()
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    except (Exception, _TooLongError) as error:
        result["error"] = _message(error)
        result["differs"] = isinstance(error, DiffersError) or result["stage"] in ("patch", "compare")
        result["where"] = traceback.format_exc()[-2000:]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        result["seconds"] = time.process_time() - start


def _job(task: tuple[str, str]) -> dict:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return {"models": census, "classes": classes_of}[task[0]](task[1])


def run(types: list[str], workers: int) -> dict[str, list[dict]]:
    """Results of models and of classes, each task in a process that may end without ending the others."""
    packages = sorted({f"transformers.models.{model_type_to_module_name(one)}" for one in types})
    tasks = [("models", one) for one in types] + [("classes", one) for one in packages]
    results: dict[str, list[dict]] = {"models": [], "classes": []}
    with tqdm(total=len(tasks), unit="task", mininterval=0.5 if sys.stderr.isatty() else 10.0) as bar:
        for (kind, name), result, failure in in_processes(_job, tasks, workers, HANGS):
            if failure:
                result = {"models": {"type": name}, "classes": {"package": name, "classes": []}}[kind]
                result |= {"stage": "run", "differs": True, "error": failure}
            results[kind].append(result)
            bar.set_postfix_str(name.rpartition(".")[2], refresh=False)
            bar.update()
            for line in differences({"models": [], "classes": [], kind: [result]}):
                bar.write(line)
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.hf_census", description=__doc__.partition("\n")[0])
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="model types; all by default")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument("--json", type=Path, help="also write all results to this file")
    args = parser.parse_args(argv)
    for reason in filter(None, map(unknown, args.types or ())):
        parser.error(f"--types {reason}")

    results = run(args.types or model_types(), args.workers)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = f"{usage.ru_utime + usage.ru_stime:.0f} s of processor time in {args.workers} processes"
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    text = page(results, took)
    if args.types:
        print(text)
    else:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text)
        print(text.partition("\n## ")[0])
    return int(bool(differences(results)))


if __name__ == "__main__":
    sys.exit(main())
