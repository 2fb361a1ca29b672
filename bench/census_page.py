"""The page on what bench.hf_census found."""

import os
import platform
import re
from collections import defaultdict
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version

import torch

DTYPES = ("torch.float32", "torch.bfloat16")


def differences(results: dict[str, list[dict]]) -> list[str]:
    """Everything that is wrong."""
    found = []
    for model in results["models"]:
        if model.get("differs"):
            found.append(f"{model['type']}: {model['error']}")
        for dtype in DTYPES:
            parts, name, _ = model.get(dtype, (0.0, "", True))
            if not parts <= 1:
                found.append(f"{model['type']}, {dtype}: {name} is {parts:.2f} times as far off as it may be")
    for package in results["classes"]:
        if package.get("differs"):
            found.append(f"{package['package']}: {package['error']}")
        found += [f"{one['class']}({one['arguments']}): {one['differs']}" for one in package["classes"] if one.get("differs")]
    return found


def page(results: dict[str, list[dict]], took: str) -> str:
    models = sorted(results["models"], key=lambda model: model["type"])
    classes = sorted((one for package in results["classes"] for one in package["classes"]), key=lambda one: one["class"])
    compared = [model for model in models if model["stage"] == "compared"]
    without = [model["type"] for model in models if model["stage"] == "no norms"]
    not_imported = [one for one in results["classes"] if one["stage"] == "import"]
    not_run = [model for model in models if model["stage"] not in ("compared", "no norms")]
    wrong = differences(results)
    of_norms = _by_class(classes)
    replaced = {name for name, ones in of_norms.items() if any(one["status"] == "replaced" for one in ones)}
    left = {name for name, ones in of_norms.items() if name not in replaced and any(map(_like_rms_norm, ones))}
    by_fp64 = sum(model[key][2] for model in compared for key in DTYPES)
    lines = [
        "# Every model type of transformers, patched",
        "",
        "A tiny random model of every model type is run forward and backward as it is and with its norms replaced by `patch`, with and",
        "without `fuse_residual=True`, in fp32 and in bf16: outputs, gradients and state_dict are compared, and each class of norms also",
        "on its own. What is compared, and how exactly, is said at the top of [bench/hf_census.py](../bench/hf_census.py).",
        "",
        f"Written by `python -m bench.hf_census` on {date.today()}: transformers {version('transformers')}, torch {version('torch')}, "
        f"Triton {version('triton')}, {_machine()}; {took}.",
        "",
        *_table(
            ("", "number"),
            [
                ("model types", len(models)),
                ("that can be built small from their own configuration", len(models) - sum(model["stage"] == "build" for model in models)),
                ("of these, with RMS norms, run as they were and patched", f"**{len(compared)}**"),
                ("norms replaced in them", sum(row["count"] for model in compared for row in _replaced(model))),
                ("of these models, with residual adds fused", sum(_fused(model) > 0 for model in compared)),
                ("layers fused in them", sum(map(_fused, compared))),
                ("classes of norms replaced, each compared on its own", f"**{len(replaced)}**"),
                ("classes that are called RMS norms, or are nearly, and are left alone", len(left)),
                ("**differences beyond rounding**", f"**{len(wrong) or 'none'}**"),
            ],
        ),
        "",
        *(f"- {one}" for one in wrong),
        *[""][: len(wrong)],
        f"{by_fp64} of the {2 * len(compared)} comparisons of models had the same model in fp64 to go by, the others only the original.",
        "",
        "## Semantics",
        "",
        "x_hat is the normalized input in fp32, w the weight; `.to(x)` rounds to the dtype of the input, `.to(w)` to that of the weight. "
        "A class with switches may be in several rows.",
        "",
        *_table(("semantics", "classes", "model types", "norms in them", "for example"), _by_semantics(compared, classes)),
        "",
        "## Left alone",
        "",
        "What is called an RMS norm or nearly is one. Other norms, such as LayerNorms, are among the classes below.",
        "",
        *_table(("class", "reason"), _left_alone(models, classes)),
        "",
        "## Residual adds",
        "",
        "Layers that add and have replaced norms, with `fuse_residual=True`.",
        "",
        *_table(("outcome", "classes"), [(outcome, len(names)) for outcome, names in _by_outcome(compared)]),
        "",
        *_folded("Names", _table(("outcome", "classes"), [(outcome, ", ".join(names)) for outcome, names in _by_outcome(compared)])),
        "",
        "## Classes",
        "",
        *_folded(f"{len(of_norms)} classes", _table(("class", "semantics", "outcome"), _class_lines(of_norms))),
        "",
        "## Models",
        "",
        "The last columns are the largest distance of any output or gradient, in parts of its budget; 1 would be too much. "
        "An asterisk: without fp64.",
        "",
        *_folded(
            f"{len(compared)} models",
            _table(("model type", "parameters", "norms", "fused layers", "semantics", "fp32", "bf16"), map(_model_line, compared)),
        ),
        "",
        *_folded(f"{len(without)} more were built and have no norm to replace", [", ".join(without)]),
        "",
        "## Not run",
        "",
        "The default configuration cannot be shrunk by rule, or the model wants other input than text, one image or one sound.",
        "",
        *_folded(f"{len(not_run)} model types", _table(("reason", "model types"), _by_reason(not_run))),
        *(f"\nCannot be imported: {one['package']}, {one['error']}" for one in not_imported),
        "",
    ]
    return "\n".join(lines)


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"Triton's interpreter, {os.cpu_count()} {platform.machine()} cores"


def _table(head: tuple[str, ...], rows: Iterable[tuple]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells]]


def _folded(summary: str, lines: list[str]) -> list[str]:
    return ["<details>", f"<summary>{summary}</summary>", "", *lines, "", "</details>"]


def _replaced(model: dict) -> list[dict]:
    return [row for row in model["rows"] if row["status"] == "replaced"]


def _fused(model: dict) -> int:
    return sum(row["count"] for row in model["layers"] if row["status"] == "fused")


def _by_class(classes: list[dict]) -> dict[str, list[dict]]:
    """What was built of each class that is a norm or sounds like one."""
    found = defaultdict(list)
    for one in classes:
        if one["status"] != "no norm":
            found[one["class"]].append(one)
    return found


def _class_lines(of_norms: dict[str, list[dict]]) -> list[tuple]:
    """A row for each outcome of each class, with the switches that lead to it."""
    lines = []
    for name, ones in of_norms.items():
        outcomes = defaultdict(list)
        for one in ones:
            reason = f"{one['status']}: {_short(one['reason'])}" if one["reason"] else one["status"]
            outcomes[one.get("semantics", ""), reason].append(one)
        for (semantics, outcome), same in outcomes.items():
            built = _switches(same) if len(outcomes) > 1 else ""
            lines.append((f"`{name}`{built}", f"`{semantics}`" if semantics else "", outcome))
    return lines


def _by_semantics(models: list[dict], classes: list[dict]) -> list[tuple]:
    found: dict[str, list[dict]] = defaultdict(lambda: [{}, {}])
    norms: dict[str, int] = defaultdict(int)
    for one in classes:
        if one["status"] == "replaced":
            found[_without_size(one["semantics"])][0][one["class"].rpartition(".")[2]] = None
    for model in models:
        for row in _replaced(model):
            found[_without_size(row["semantics"])][1][model["type"]] = None
            norms[_without_size(row["semantics"])] += row["count"]
    order = sorted(found, key=lambda semantics: -len(found[semantics][0]))
    return [(f"`{one}`", *map(len, found[one]), norms[one], next(iter(found[one][0]), "torch's own")) for one in order]


def _without_size(semantics: str) -> str:
    return re.sub(r"groups of \d+", "groups", semantics)


def _left_alone(models: list[dict], classes: list[dict]) -> list[tuple]:
    rows = {(f"`{one['class']}`{_switches([one])}", one["reason"]): None for one in classes if _like_rms_norm(one)}
    seen = {one["class"].rpartition(".")[2] for one in classes}
    for model in models:
        for row in model.get("rows", ()):
            if _like_rms_norm(row) and row["name"] not in seen:
                rows[f"`{row['name']}`", row["reason"]] = None
    return sorted(rows)


def _like_rms_norm(one: dict) -> bool:
    """Whether it is left alone in spite of its name, or of what it nearly computes."""
    name = one.get("name", "").lower()
    return one["status"] == "left alone" and (one["resembles"] or "rms" in name)


def _switches(ones: list[dict]) -> str:
    """The arguments, but for sizes, with which the class was built."""
    said = [", ".join(f"{key}={value}" for key, value in one["arguments"].items() if value != 64) for one in ones]
    return f" ({'; '.join(said)})" if any(said) else ""


def _by_outcome(models: list[dict]) -> list[tuple[str, list[str]]]:
    outcomes: dict[str, set[str]] = defaultdict(set)
    for row in (row for model in models for row in model["layers"]):
        outcomes[row["status"] if row["status"] == "fused" else f"{row['status']}: {row['reason']}"].add(row["name"])
    return sorted(((outcome, sorted(names)) for outcome, names in outcomes.items()), key=lambda row: (-len(row[1]), row))


def _model_line(model: dict) -> tuple:
    replaced = _replaced(model)
    parts = [f"{model[dtype][0]:.2f}{'' if model[dtype][2] else ' *'}" for dtype in DTYPES]
    semantics = ", ".join(f"`{one}`" for one in sorted({row["semantics"] for row in replaced}))
    return model["type"], model["parameters"], sum(row["count"] for row in replaced), _fused(model), semantics, *parts


def _short(reason: str) -> str:
    return reason if len(reason) <= 100 else f"{reason[:97]}..."


def _by_reason(models: list[dict]) -> list[tuple]:
    reasons = defaultdict(list)
    for model in models:
        reasons[f"{model['stage']}: {_short(model['error'])}"].append(model["type"])
    return sorted(((reason, ", ".join(types)) for reason, types in reasons.items()), key=lambda row: (-len(row[1]), row))
