"""The committed notebooks: outputs are complete and clean, and no measured number is written by hand. `.ci/run` executes them."""

import ast
import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

FOLDER = Path(__file__).parent.parent / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
PNG = b"\x89PNG\r\n\x1a\n"

# A number with a unit of time, speed or share, a date, or the name of a GPU: these must come from results.
MEASURED = re.compile(
    r"\d\s*(%|percent|[GMT]i?B/s|tokens/s|[nµum]s\b|seconds?\b|minutes?\b|x faster|times (as )?(fast|close|slow|less|more))"
    r"|\b20\d\d-\d\d"
    r"|\b([HAB][12]00|MI3\d\d[AX]?|RTX \d+|L40S?|GH200)\b"
)
# Absolute paths of the machine that executed the notebook.
ABSOLUTE = re.compile(r"(?<![\w.:/<])/(home|root|tmp|usr|opt|work|workspace|mnt|var|Users|content)/|\b[A-Z]:\\\\?[A-Za-z]")

on_every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def outputs(path: Path) -> list[dict]:
    return [output for cell in cells(path, "code") for output in cell["outputs"]]


def texts(path: Path) -> Iterator[str]:
    """Everything that is printed or displayed as text."""
    for output in outputs(path):
        for value in (output.get("text", ""), *(value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))):
            yield "".join(value)


def written(path: Path) -> Iterator[str]:
    """Everything that is written by hand: markdown, and the comments and strings of code."""
    for cell in cells(path, "markdown"):
        yield source(cell)
    for cell in cells(path, "code"):
        yield from re.findall(r"#.*", source(cell))
        nodes = list(ast.walk(ast.parse(source(cell))))
        formats = {
            id(part) for node in nodes if isinstance(node, ast.FormattedValue) and node.format_spec for part in ast.walk(node.format_spec)
        }
        yield from (n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in formats)


def pictures(path: Path) -> list[bytes]:
    return [base64.b64decode(output["data"]["image/png"]) for output in outputs(path) if "image/png" in output.get("data", {})]


def test_names():
    assert [path.stem for path in PATHS] == ["01_rmsnorm", "02_performance", "03_patch_a_model"]


@on_every_notebook
def test_is_valid(path):
    nbformat.validate(nbformat.read(path, as_version=4))


@on_every_notebook
def test_every_cell_ran_once_in_order_and_none_failed(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for output in outputs(path) if output["output_type"] == "error"]
    assert not [output["text"] for output in outputs(path) if output.get("name") == "stderr"]


@on_every_notebook
def test_pictures_are_there_and_fit_a_page(path):
    for cell in cells(path, "code"):
        if re.search(r"^plt\.show\(\)", source(cell), re.M):
            assert any("image/png" in output.get("data", {}) for output in cell["outputs"]), source(cell)
    assert len(pictures(path)) >= 2
    for picture in pictures(path):
        assert picture.startswith(PNG)
        width, height = (int.from_bytes(picture[i : i + 4]) for i in (16, 20))
        assert 500 <= width <= 1000 and 250 <= height <= 1500, f"{width} x {height} pixels"
    assert path.stat().st_size < 2_000_000


@on_every_notebook
def test_says_versions(path):
    assert re.search(r"triton_rmsnorm \d+\.\d+\.\d+.*, torch \d+\.\d+.*, triton \d+\.\d+", "\n".join(texts(path)))


@on_every_notebook
def test_no_path_of_a_machine(path):
    found = [line for text in (*texts(path), *written(path)) for line in text.splitlines() if ABSOLUTE.search(line)]
    assert not found


@on_every_notebook
def test_no_measured_number_is_written_by_hand(path):
    found = [match[0] for text in written(path) for match in MEASURED.finditer(text)]
    assert not found
