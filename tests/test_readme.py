"""Every Python block of README.md runs, and .ci/run finds the command for the tests in it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
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
