"""README.md and docs/: the Python blocks run and print what is shown, commands and links exist, and README stays short."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triton_rmsnorm import RMSNorm

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *(path for name in ("CONTRIBUTING.md", "docs/*.md") for path in sorted(ROOT.glob(name)))]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
# Each Python block with the output shown below it: a block without a language.
EXAMPLES = [
    (code, shown if kind == "" else "")
    for (language, code), (kind, shown) in zip(BLOCKS, [*BLOCKS[1:], (None, "")], strict=True)
    if language == "python"
]
COMMANDS = sorted({match for page in PAGES for match in re.findall(r"`python (-m bench[^`]*)`", page.read_text())})
LINKS = [(page, link) for page in PAGES for link in sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())))]


@pytest.mark.slow
def test_examples(tmp_path):
    """As a reader runs them: one after the other in a fresh process elsewhere, without TRITON_INTERPRET."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "\n".join(code for code, _ in EXAMPLES)
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(shown for _, shown in EXAMPLES)


def test_what_is_found_in_the_pages():
    """The patterns above find something; a page that is written differently must not pass because nothing is tested."""
    assert len(EXAMPLES) == 2 and any(shown for _, shown in EXAMPLES)
    assert {language for language, _ in BLOCKS} == {"python", "sh", ""}
    assert len(COMMANDS) >= 8 and len(LINKS) >= 20


def test_one_line_runs_the_tests():
    """`.ci/run` takes it from README."""
    assert len(re.findall(r"^python3 -m venv .* -m pytest .*$", README, re.MULTILINE)) == 1


def test_is_short():
    assert len(README.split()) < 900


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda value: value.name if isinstance(value, Path) else value)
def test_links(page, link):
    assert (page.parent / link).exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, capsys):
    """The program exists and knows the options."""
    _, module, *options = shlex.split(command)
    with pytest.raises(SystemExit) as exit:
        program = importlib.import_module(module)
        if hasattr(program, "__path__"):
            program = importlib.import_module(f"{module}.__main__")
        program.main([*options, "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in options if option.startswith("--"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are Python functions only in the interpreter")
def test_the_way_of_x():
    """The functions in CONTRIBUTING's list are called in its order."""
    steps = re.findall(r"^\d+\. `([\w.]+)\.(\w+)`", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    modules = {"triton_rmsnorm." + re.sub(r"\.[A-Z]\w*$", "", owner) for owner, _ in steps}
    called = []

    def record(frame, event, _):
        name = frame.f_globals.get("__name__")
        if event == "call" and name in modules:
            called.append((name.removeprefix("triton_rmsnorm."), frame.f_code.co_name))

    norm, x = RMSNorm(64), torch.randn(3, 64, requires_grad=True)
    sys.setprofile(record)
    try:
        norm(x).backward(x)
    finally:
        sys.setprofile(None)
    wanted = [(re.sub(r"\.[A-Z]\w*$", "", owner), name) for owner, name in steps]
    remaining = iter(called)
    assert len(wanted) == 10 and all(step in remaining for step in wanted), called
