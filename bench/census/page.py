"""The page on what the census found."""

import re
from collections import defaultdict
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
    results = record["results"]
    models = [result for result in results if "type" in result]
    classes = [one for result in results for one in result.get("classes", ())]
    compared = [model for model in models if model["stage"] == "compared"]
    about, wrong, left = record["metadata"], differences(results), _left_alone(models, classes)
    replaced = {one["class"] for one in classes if one["status"] == "replaced"}
    rows = [row for model in models for row in model.get("rows", ())]
    norms = sum(row["count"] for row in rows if row["status"] == "replaced")
    others = sum(row["count"] for row in rows if _like_rms_norm(row))
    fused = [sum(row["count"] for row in model["layers"] if row["status"] == "fused") for model in compared]
    in_fp64 = sum(model[dtype][2] for model in compared for dtype in DTYPES)
    lines = [
        "# Every model type of transformers, patched",
        "",
        "A tiny random model of every model type is run forward and backward as it is and with its norms replaced by `patch`, with and",
        "without `fuse_residual=True`, in fp32 and in bf16. Outputs, gradients and state_dict are compared, and each class of norms",
        "also on its own. How exactly is described at the top of [`bench/census/__main__.py`](../bench/census/__main__.py). Results for",
        "every model type and every class are in [hf_census.json](hf_census.json).",
        "",
        f"Written by `python -m bench.hf_census` on {about['date'][:10]}: transformers {about['transformers']}, torch {about['torch']}, "
        f"Triton {about['triton']}, {about['machine']}.",
        "",
        *_table(
            ("", "number"),
            [
                ("model types", len(models)),
                ("that can be built small from their own configuration", sum(model["stage"] != "build" for model in models)),
                ("of these, with RMS norms, run as they were and patched", f"**{len(compared)}**"),
                ("norms replaced in all models that were built", f"**{norms}** of {norms + others}"),
                ("norms replaced in models that were compared", sum(row["count"] for model in compared for row in _replaced(model))),
                ("models with fused residual adds", sum(map(bool, fused))),
                ("layers fused in them", sum(fused)),
                ("classes of norms replaced, each compared on its own", f"**{len(replaced)}**"),
                ("classes that are called RMS norms, or nearly are, and are left unchanged", len({name for name, _, _ in left} - replaced)),
                ("**differences beyond rounding**", f"**{len(wrong) or 'none'}**"),
            ],
        ),
        "",
        *(f"- {one}" for one in wrong),
        *[""][: len(wrong)],
        f"{in_fp64} of the {2 * len(compared)} comparisons of models had the same model in fp64 to go by, the others only the original.",
        "",
        "## Largest distances",
        "",
        "The largest distance of any output or gradient as a fraction of its budget; more than 1 would be a difference.",
        "",
        *_table(("model type", "dtype", "tensor", "distance"), _largest(compared)),
        "",
        "## Semantics",
        "",
        "x_hat is the normalized input in fp32, w the weight; `.to(x)` rounds to the dtype of the input, `.to(w)` to that of the weight.",
        "A class with switches can be in several rows.",
        "",
        *_table(("semantics", "classes", "model types", "norms in them", "for example"), _by_semantics(compared, classes)),
        "",
        "## Left unchanged",
        "",
        "Classes that are called RMS norms or nearly compute one, and why they are left unchanged.",
        "",
        *_table(("class", "reason"), [(f"`{name}`{switches}", reason) for name, switches, reason in left]),
        "",
        "## Residual adds",
        "",
        "Layers that add and have replaced norms, with `fuse_residual=True`.",
        "",
        *_table(("outcome", "classes"), _by_outcome(compared)),
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


def _replaced(model: dict) -> list[dict]:
    return [row for row in model["rows"] if row["status"] == "replaced"]


def _largest(models: list[dict]) -> list[tuple]:
    """The three models nearest to their budget in each dtype."""
    rows = []
    for dtype in DTYPES:
        for model in sorted(models, key=lambda model: -model[dtype][0])[:3]:
            part, tensor, _ = model[dtype]
            rows.append((model["type"], dtype, f"`{tensor}`", f"{part:.2f}"))
    return rows


def _by_semantics(models: list[dict], classes: list[dict]) -> list[tuple]:
    """Classes, model types, norms and an example; the most frequent first."""
    of_classes, of_types, norms = defaultdict(dict), defaultdict(set), defaultdict(int)
    for one in classes:
        if one["status"] == "replaced":
            of_classes[_without_size(one["semantics"])][one["class"].rpartition(".")[2]] = None
    for model in models:
        for row in _replaced(model):
            of_types[_without_size(row["semantics"])].add(model["type"])
            norms[_without_size(row["semantics"])] += row["count"]
    return [
        (f"`{one}`", len(of_classes[one]), len(of_types[one]), norms[one], next(iter(of_classes[one]), "torch's own"))
        for one in sorted(of_classes.keys() | of_types.keys(), key=lambda semantics: (-len(of_classes[semantics]), semantics))
    ]


def _without_size(semantics: str) -> str:
    return re.sub(r"groups of \d+", "groups", semantics)


def _left_alone(models: list[dict], classes: list[dict]) -> list[tuple[str, str, str]]:
    """Class, switches and reason; classes that were not built alone come from the models that have them."""
    rows = {(one["class"], _switches(one), one["reason"]) for one in classes if _like_rms_norm(one)}
    alone = {one["class"].rpartition(".")[2] for one in classes}
    for row in (row for model in models for row in model.get("rows", ())):
        if _like_rms_norm(row) and row["name"] not in alone:
            rows.add((row["name"], "", row["reason"]))
    return sorted(rows)


def _like_rms_norm(one: dict) -> bool:
    """Whether it is left unchanged although its name says RMS or it nearly computes an RMS norm."""
    name = (one.get("name") or one["class"]).lower()
    return one["status"] == "left alone" and (bool(one.get("resembles")) or "rms" in name)


def _switches(one: dict) -> str:
    """The arguments, except sizes, with which a class was built."""
    return f" ({', '.join(f'{name}={value}' for name, value in one['switches'].items())})" if "switches" in one else ""


def _by_outcome(models: list[dict]) -> list[tuple]:
    outcomes: dict[str, set[str]] = defaultdict(set)
    for row in (row for model in models for row in model["layers"]):
        outcomes[": ".join(filter(None, (row["status"], row.get("reason"))))].add(row["name"])
    return sorted(((outcome, len(names)) for outcome, names in outcomes.items()), key=lambda row: (-row[1], row))


def _not_compared(results: list[dict]) -> list[tuple]:
    def count(kind: str, *stages: str) -> int:
        return sum(kind in result and result["stage"] in stages for result in results)

    return [
        ("built, without a norm to replace", count("type", "no norms")),
        ("that cannot be built: the default configuration cannot be shrunk by rule", count("type", "build")),
        ("built, but not run: they take other input than text, one image or one sound", count("type", "run")),
        ("whose package cannot be imported", count("package", "import")),
    ]
