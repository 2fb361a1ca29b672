"""Docstrings of public names. Ruff's D rules and pydoclint check their form; what neither knows is checked here.

That is: the formula and its source, a shape and a dtype for every tensor, and that every exception exists.
"""

import builtins
import inspect
import re
from collections.abc import Callable

import pytest
import torch

import triton_rmsnorm

# Functions and classes that have arguments; not modules, the version, and autotuning().
PUBLIC = {
    name: value
    for name in triton_rmsnorm.__all__
    if callable(value := getattr(triton_rmsnorm, name)) and inspect.signature(value).parameters
}
NORMS = {name: value for name, value in PUBLIC.items() if "norm" in name.lower()}
FORWARDS = {f"{name}.forward": value.forward for name, value in PUBLIC.items() if isinstance(value, type)}


def section(heading: str, of: Callable) -> str:
    found = re.search(rf"^{heading}:\n((?:    .*\n?|\n)+)", inspect.getdoc(of), re.MULTILINE)
    return inspect.cleandoc(found[1]) if found else ""


def entries(text: str) -> dict[str, str]:
    """The text of each name in lines such as "a: text"; an entry continues on lines that are indented further."""
    return {match[1]: " ".join(match[2].split()) for match in re.finditer(r"^(\w+): (.*(?:\n[ \n].*)*)", text, re.MULTILINE)}


def described(name: str, of: Callable) -> str:
    """What a docstring says about an argument, also where it refers to another public name."""
    text = entries(section("Args", of))[name]
    reference = re.match(r"[Aa]s in (\w+)", text)
    return described(name, PUBLIC[reference[1]]) if reference else text


@pytest.mark.parametrize("name", NORMS)
def test_formula_and_source(name):
    assert re.search(r"math:: .*=|^y = |, y = ", inspect.getdoc(PUBLIC[name]), re.MULTILINE)
    assert re.search(r"^Source: .*\d{4}", inspect.getdoc(PUBLIC[name]), re.MULTILINE)


@pytest.mark.parametrize("name", NORMS | FORWARDS)
def test_tensors_have_a_shape_and_a_dtype(name):
    function = (NORMS | FORWARDS)[name]
    for argument, parameter in inspect.signature(function).parameters.items():
        if "Tensor" in str(parameter.annotation):
            text = described(argument, function)
            assert re.search(r"\bshape\b", text) and re.search(r"\bdtypes?\b|\bfp16\b", text), f"{argument}: {text}"


@pytest.mark.parametrize("name", PUBLIC | FORWARDS)
def test_returns_and_raises(name):
    function = (PUBLIC | FORWARDS)[name]
    if isinstance(function, type) and issubclass(function, torch.nn.Module):
        return  # of a module, forward returns and raises
    assert section("Returns", function) or section("Yields", function)
    exceptions = entries(section("Raises", function))
    assert exceptions or not inspect.signature(function).parameters
    for exception in exceptions:
        assert issubclass(getattr(builtins, exception), Exception)
