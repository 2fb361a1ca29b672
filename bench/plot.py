"""`python -m bench.plot [FILE ...]`: draws results, by default the newest of bench.run and of bench.audit, beside their files.

Files of bench.run are also printed; files of bench.audit, bench.cost, bench.host and bench.train are only drawn.
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
PICTURES = {"run": report.picture, "audit": picture.picture, "cost": cost.picture, "host": host.picture, "train": training.picture}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__.split("\n\n")[0])
    kinds = ", ".join(f"{kind}-*.json" for kind in PICTURES)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help=kinds)
    files = parser.parse_args(arguments).files or list(filter(None, (records.newest("run"), picture.newest())))
    for file in files:
        if file.name.split("-")[0] not in PICTURES:
            parser.error(f"FILE must be one of {kinds}, got {file.name}")
    if not files:
        print(f"There are no results in {records.RESULTS}: python -m bench.run makes them.")
        return 1
    for file in files:
        try:
            kind, result = file.name.split("-")[0], json.loads(file.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"{file}: {error}")
        if kind == "run":
            print(report.markdown(result))
        PICTURES[kind](result).savefig(file.with_suffix(".png"), dpi=140)
        print(file.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
