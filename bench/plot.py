"""`python -m bench.plot [FILE ...]`: draws results, by default the newest of bench.run and of bench.audit, beside their files.

Files of bench.run are taken together, in one picture beside the first, and are also printed. Files of bench.audit, bench.cost,
bench.host and bench.train get a picture each.
"""

import argparse
import json
from pathlib import Path

from bench import records
from bench.audit import picture
from bench.cost import report as cost
from bench.speed import host, report
from bench.train import report as training

# By the first word of a file's name.
PICTURES = {"audit": picture.picture, "cost": cost.picture, "host": host.picture, "train": training.picture}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="run-*.json, which are taken together, or others")
    files = parser.parse_args(arguments).files
    files = files or [file for file in (records.newest("run"), picture.newest()) if file]
    if not files:
        print(f"There are no results in {records.RESULTS}: python -m bench.run makes them.")
        return 1
    kinds = {file: file.name.split("-")[0] for file in files}
    if measured := [file for file, kind in kinds.items() if kind not in PICTURES]:
        runs = [json.loads(file.read_text()) for file in measured]
        print(report.markdown(runs))
        _save(report.picture(runs), measured[0])
    for file, kind in kinds.items():
        if kind in PICTURES:
            _save(PICTURES[kind](json.loads(file.read_text())), file)
    return 0


def _save(figure, file: Path) -> None:
    figure.savefig(file.with_suffix(".png"), dpi=140)
    print(file.with_suffix(".png"))


if __name__ == "__main__":
    raise SystemExit(main())
