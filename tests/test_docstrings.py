"""Docstrings of public names: a sentence, the formula, arguments with shape, dtype and unit, what is returned and raised, the source."""

import builtins
import inspect
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

import triton_rmsnorm
from triton_rmsnorm.patching import patching

HEADINGS = ("Args", "Returns", "Raises", "Source")
NUMBERS = re.compile(r"\b(int|float)\b")


class Public(NamedTuple):
    """A name, and what its docstring has to have besides a sentence and its arguments."""

    value: Callable
    parts: tuple[str, ...]


def public_names() -> dict[str, Public]:
    """All that `__all__` names, the forward of modules, and what patch returns."""
    found = {}
    for name in triton_rmsnorm.__all__:
        value = getattr(triton_rmsnorm, name)
        if isinstance(value, type) and issubclass(value, torch.nn.Module):
            found[name] = Public(value, ("formula", "Source"))
            found[f"{name}.forward"] = Public(value.forward, ("Returns", "Raises"))
        elif value.__class__ is not str:  # __version__
            patches = value.__module__ == patching.__name__
            found[name] = Public(value, ("Returns", "Raises") if patches else ("formula", "Returns", "Raises", "Source"))
    for cls in (patching.Report, patching.Row):
        found[cls.__name__] = Public(cls, ())
    return found


PUBLIC = public_names()


def parameters(value: Callable) -> dict[str, inspect.Parameter]:
    """Of a function, of a method without self, or of a constructor; in the place of **knobs those of the function that takes them."""
    found = dict(inspect.signature(value).parameters)
    if found.pop("knobs", None):
        function = getattr(triton_rmsnorm, re.search(r"as (\w+)", inspect.getdoc(value))[1])
        found |= {name: p for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    return {name: parameter for name, parameter in found.items() if name != "self"}


def sections(doc: str) -> dict[str, str]:
    """The text before the first heading as "", and what follows each."""
    pieces = re.split(rf"^({'|'.join(HEADINGS)}):", doc, flags=re.MULTILINE)
    return {"": pieces[0], **dict(zip(pieces[1::2], map(inspect.cleandoc, pieces[2::2]), strict=True))}


def entries(text: str) -> dict[str, str]:
    """What is said of each name in lines such as "a, b: text"; an entry goes on where lines are further to the right."""
    found = {}
    for match in re.finditer(r"^(\w[\w, ]*): (.*(?:\n[ \n].*)*)", text, re.MULTILINE):
        for name in match[1].split(", "):
            found[name] = " ".join(match[2].split())
    return found


def said(name: str, doc: str) -> str:
    """What a docstring says of an argument, also where it refers to another public name."""
    text = entries(sections(doc).get("Args", "")).get(name, "")
    if reference := re.match(r"as in (\w+)", text):
        return said(name, inspect.getdoc(PUBLIC[reference[1]].value))
    return text


def faults(value: Callable, parts: tuple[str, ...], doc: str) -> list[str]:
    found, first = sections(doc), doc.split("\n\n")[0]
    bad = [] if re.fullmatch(r"[A-Z`].*[.]", first, re.DOTALL) and len(first) <= 250 else ["does not start with a sentence"]
    if "formula" in parts and not re.search(r"math:: .*=|^y = |, y = ", found[""], re.MULTILINE):
        bad.append("has no formula")
    bad += [f"has no {part}" for part in parts if part != "formula" and not found.get(part, "").strip()]
    for name, parameter in parameters(value).items():
        text, kind = said(name, doc), str(parameter.annotation)
        if not text:
            bad.append(f"says nothing of {name}")
        elif "Tensor" in kind and not re.search(r"\bshape\b", text):
            bad.append(f"says no shape of {name}")
        elif "Tensor" in kind and not re.search(r"\bdtypes?\b|\bfp16\b", text):
            bad.append(f"says no dtype of {name}")
        elif NUMBERS.search(kind) and "Sequence" not in kind and not re.search(r"\bunit\b|\bcolumns\b|\bhow many\b|\bdimensions\b", text):
            bad.append(f"says no unit of {name}")
    bad += [f"describes {name}, which it does not take" for name in entries(found.get("Args", "")) if name not in parameters(value)]
    for names in re.findall(r"^([A-Z]\w+(?:, [A-Z]\w+)*): ", found.get("Raises", ""), re.MULTILINE):
        bad += [f"raises {name}, which is no exception" for name in names.split(", ") if not is_exception(name)]
    return bad


def is_exception(name: str) -> bool:
    value = getattr(builtins, name, None)
    return isinstance(value, type) and issubclass(value, Exception)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstrings(name):
    value, parts = PUBLIC[name]
    assert value.__doc__, f"{name} has no docstring"
    assert faults(value, parts, inspect.getdoc(value)) == []


def test_there_are_such_names():
    assert {"rms_norm", "RMSNorm", "RMSNorm.forward", "AddRMSNorm.forward", "patch", "unpatch", "patched", "Report"} <= PUBLIC.keys()


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("fused, forward and backward.", "fused, forward and backward", "does not start with a sentence"),
        (".. math:: y = ", ".. math:: ", "has no formula"),
        ("        eps: added", "        epsilon: added", "says nothing of eps"),
        ("        eps: added", "        epsilon: added", "describes epsilon, which it does not take"),
        ("gamma of shape", "gamma of size", "says no shape of weight"),
        ("any of the dtypes above", "any of those above", "says no dtype of weight"),
        ("in the unit of x^2", "before the root", "says no unit of eps"),
        ("    Returns:", "    Result:", "has no Returns"),
        ("    Raises:", "    Errors:", "has no Raises"),
        ("        ValueError: input", "        ValueErorr: input", "raises ValueErorr, which is no exception"),
        ("    Source:", "    See", "has no Source"),
    ],
)
def test_a_fault_is_found(old, new, fault):
    value, parts = PUBLIC["rms_norm"]
    assert old in value.__doc__
    assert fault in faults(value, parts, inspect.cleandoc(value.__doc__.replace(old, new)))
