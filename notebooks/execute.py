"""`python notebooks/execute.py`: runs the notebooks from top to bottom, each in a fresh kernel; the exit status is 1 if a cell raises.

With --write the outputs are kept in the notebooks themselves, otherwise they are dropped, or go to the folder --out.
"""

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

FOLDER = Path(__file__).parent


def notebooks() -> list[Path]:
    return sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path, timeout: float) -> NotebookNode:
    """The notebook with fresh outputs, and nothing in it of when or by which kernel they were made.

    Raises:
        CellExecutionError: a cell raises.
        CellTimeoutError: a cell takes longer than `timeout` seconds.
    """
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=resources, record_timing=False).execute()
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = merged(cell.outputs)
    return notebook


def merged(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Neighbouring pieces of one stream become one: how a stream is cut up is chance."""
    result: list[NotebookNode] = []
    for output in outputs:
        if result and output.output_type == "stream" == result[-1].output_type and output.name == result[-1].name:
            result[-1].text += output.text
        else:
            result.append(output)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="notebooks/execute.py", description=__doc__.split(": ", 1)[1].split("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path, metavar="NOTEBOOK", help="by default all in this folder")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the notebooks")
    parser.add_argument("--out", type=Path, help="write the notebooks with their outputs to this folder")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a cell may take (default: %(default)s)")
    options = parser.parse_args(argv)
    failed = 0
    for path in options.paths or notebooks():
        start = time.perf_counter()
        print(f"{path.name} ... ", end="", flush=True)
        try:
            notebook = execute(path, options.timeout)
        except (CellExecutionError, TimeoutError) as error:
            failed += 1
            print(f"FAILED\n{error}")
            continue
        print(f"{time.perf_counter() - start:.0f} s")
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, options.out / path.name)
        if options.write:
            nbformat.write(notebook, path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
