"""Every Python block of README.md runs, .ci/run finds the command for the tests in it, and what it links to and names is there."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = sorted(set(re.findall(r"`(python (?:-m bench|notebooks).*?)`", README)))
SHELL = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines()]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
@pytest.mark.parametrize("interpret", [True, False], ids=["as-tested", "plain"])
def test_python_blocks(code, interpret, tmp_path):
    """In a fresh process, as a reader would run them; without a GPU, once interpreted and once not."""
    environment = {name: value for name, value in os.environ.items() if interpret or name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_blocks_are_found():
    assert len(PYTHON) >= 2 and {language for language, _ in BLOCKS} == {"python", "sh", ""}


def test_commands():
    """One line each for the tests and for the main job, and the first is the line that .ci/run runs."""
    tests, main_job = ([line for line in SHELL if command in line] for command in ("-m pytest", "-m bench.train"))
    assert len(tests) == len(main_job) == 1
    found = subprocess.run([ROOT / ".ci" / "test_command"], capture_output=True, text=True, check=True).stdout
    assert found == tests[0] + "\n"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)]+)\)", README))))
def test_links(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_text(command, capsys, monkeypatch):
    """The program is there, and knows the options."""
    _, *arguments = shlex.split(command)
    if arguments[0] == "-m":
        module, options = importlib.import_module(arguments[1]), arguments[2:]
        with pytest.raises(SystemExit) as exit:
            module.main([*options, "--help"])
        assert exit.value.code == 0
        shown = capsys.readouterr().out
    else:
        shown, options = (
            subprocess.run([sys.executable, *arguments, "--help"], cwd=ROOT, capture_output=True, text=True).stdout,
            arguments[1:],
        )
    assert all(option in shown for option in options)


def test_commands_are_found():
    assert len(COMMANDS) >= 6
