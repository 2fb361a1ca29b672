"""The page on what the census found."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

DTYPES = ("float32", "bfloat16")


def differences(results: list[dict]) -> list[str]:
    """Everything that is wrong."""
    found = []
    for result in results:
        if result.get("differs"):
            found.append(f"{result.get('type') or result['package']}: {result['error']}")
        for dtype in DTYPES:
            part, name, _ = result.get(dtype, (0.0, "", True))
            if not part <= 1:
                found.append(f"{result['type']}, {dtype}: {name} is {part:.2f} times as far off as it may be")
        for one in result.get("classes", ()):
            if one.get("differs"):
                found.append(f"{one['class']}{_switches(one)}: {one['differs']}")
    return found


def page(record: dict) -> str:
    """Markdown.

    Args:
        record: what docs/hf_census.json holds.
    """
    results, about = record["results"], record["metadata"]
    models = [result for result in results if "type" in result]
    compared = [model for model in models if model["stage"] == "compared"]
    classes = [one for result in results for one in result.get("classes", ())]
    rows = [row | {"type": model["type"], "compared": model in compared} for model in models for row in model.get("rows", ())]
    replaced = [row for row in rows if row["status"] == "replaced"]
    replaced_classes = {one["class"] for one in classes if one["status"] == "replaced"}
    layers = [row for model in compared for row in model["layers"]]
    fused = [row["count"] for row in layers if row["status"] == "fused"]
    norms, others = (sum(row["count"] for row in of) for of in (replaced, filter(_like_rms_norm, rows)))
    left, wrong = _left_alone(rows, classes), differences(results)
    distances = sorted((*model[dtype], model["type"], dtype) for model in compared for dtype in DTYPES)
    summary = {
        "model types": len(models),
        "that can be built small from their own configuration": sum(model["stage"] != "build" for model in models),
        "of these, with RMS norms, run as they were and patched": f"**{len(compared)}**",
        "norms replaced in all models that were built": f"**{norms}** of {norms + others}",
        "norms replaced in models that were compared": sum(row["count"] for row in replaced if row["compared"]),
        "models with fused residual adds": sum(any(row["status"] == "fused" for row in model["layers"]) for model in compared),
        "layers fused in them": sum(fused),
        "classes of norms replaced, each compared on its own": f"**{len(replaced_classes)}**",
        "classes that are called RMS norms, or nearly are, and are left unchanged": len({name for name, *_ in left} - replaced_classes),
        "**differences beyond rounding**": f"**{len(wrong) or 'none'}**",
    }
    machine = f"Triton's interpreter, {about['cpu']}" if about["gpu"] == "none" else about["gpu"]
    lines = [
        "# Every model type of transformers, patched",
        "",
        "A tiny random model of every model type is run forward and backward as it is and with its norms replaced by `patch`, with and",
        "without `fuse_residual=True`, in fp32 and in bf16. Outputs, gradients and state_dict are compared, and each class of norms",
        "also on its own. How exactly is described at the top of [`bench/hf_census.py`](../bench/hf_census.py). Results for",
        "every model type and every class are in [hf_census.json](hf_census.json).",
        "",
        f"Written by `python -m bench.hf_census` on {about['date'][:10]}: transformers {about['transformers']}, torch {about['torch']}, "
        f"Triton {about['triton']}, {machine}.",
        "",
        *_table(("", "number"), summary.items()),
        "",
        *(f"- {one}" for one in wrong),
        *[""][: len(wrong)],
        f"{sum(in_fp64 for _, _, in_fp64, *_ in distances)} of the {len(distances)} comparisons of models had the same model in fp64 to go",
        "by, the others only the original. The largest distances of an output or gradient, as a fraction of what is allowed:",
        "",
        *_table(
            ("model type", "dtype", "tensor", "distance"),
            ((model, dtype, f"`{tensor}`", f"{part:.2f}") for part, tensor, _, model, dtype in distances[:-6:-1]),
        ),
        "",
        "## Semantics",
        "",
        "x_hat is the normalized input in fp32, w the weight; `.to(x)` rounds to the dtype of the input, `.to(w)` to that of the weight.",
        "A class with switches can be in several rows.",
        "",
        *_table(
            ("semantics", "classes", "model types", "norms in them", "for example"),
            _by_semantics([row for row in replaced if row["compared"]], classes),
        ),
        "",
        "## Left unchanged",
        "",
        "Classes that are called RMS norms or nearly compute one, and why they are left unchanged.",
        "",
        *_table(("class", "reason"), ((f"`{name}`{switches}", reason) for name, switches, reason in left)),
        "",
        "## Residual adds",
        "",
        "Layers that add and have replaced norms, with `fuse_residual=True`.",
        "",
        *_table(("outcome", "classes"), Counter(outcome for outcome, _ in {(_outcome(row), row["name"]) for row in layers}).most_common()),
        "",
        "## Not compared",
        "",
        *_table(("model types", "number"), _not_compared(results)),
        "",
    ]
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: Iterable[tuple]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells]]


def _by_semantics(rows: list[dict], classes: list[dict]) -> list[tuple]:
    """Classes, model types, norms and an example; the most frequent first."""
    names, types, norms = defaultdict(dict), defaultdict(set), Counter()
    for one in classes:
        if one["status"] == "replaced":
            names[_without_size(one["semantics"])][one["class"].rpartition(".")[2]] = None
    for row in rows:
        types[_without_size(row["semantics"])].add(row["type"])
        norms[_without_size(row["semantics"])] += row["count"]
    found = sorted(names.keys() | types.keys(), key=lambda semantics: (-len(names[semantics]), semantics))
    return [(f"`{one}`", len(names[one]), len(types[one]), norms[one], next(iter(names[one]), "torch's own")) for one in found]


def _without_size(semantics: str) -> str:
    return re.sub(r"groups of \d+", "groups", semantics)


def _left_alone(rows: list[dict], classes: list[dict]) -> list[tuple[str, str, str]]:
    """Class, switches and reason; classes that were not built alone come from the models that have them."""
    alone = {one["class"].rpartition(".")[2] for one in classes}
    found = {(one["class"], _switches(one), one["reason"]) for one in classes if _like_rms_norm(one)}
    found |= {(row["name"], "", row["reason"]) for row in rows if _like_rms_norm(row) and row["name"] not in alone}
    return sorted(found)


def _like_rms_norm(one: dict) -> bool:
    """Whether it is left unchanged although its name says RMS or it nearly computes an RMS norm."""
    name = (one.get("name") or one["class"]).lower()
    return one["status"] == "left alone" and (bool(one.get("resembles")) or "rms" in name)


def _switches(one: dict) -> str:
    """The arguments, except sizes, with which a class was built."""
    return f" ({', '.join(f'{name}={value}' for name, value in one['switches'].items())})" if "switches" in one else ""


def _outcome(row: dict) -> str:
    return f"{row['status']}: {row['reason']}" if "reason" in row else row["status"]


def _not_compared(results: list[dict]) -> list[tuple]:
    stages = Counter(("type" if "type" in result else "package", result["stage"]) for result in results)
    return [
        ("built, without a norm to replace", stages["type", "no norms"]),
        ("that cannot be built: the default configuration cannot be shrunk by rule", stages["type", "build"]),
        ("built, but not run: they take other input than text, one image or one sound", stages["type", "run"]),
        ("whose package cannot be imported", stages["package", "import"]),
    ]
