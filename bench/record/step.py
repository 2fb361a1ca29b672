"""`python -m bench.record.step NAME FOLDER MINUTES [--rehearse]`: one step, in a process of its own, whose outcome goes to a file."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

from bench import records
from bench.record.rehearsal import stand_ins
from bench.record.steps import STEPS, Outcome
from triton_rmsnorm.runtime import table

FILE = "outcome.json"  # not part of the record's files


def main(name: str, folder: Path, minutes: float, rehearse: bool) -> None:
    records.RESULTS, table.SHIPPED = folder, folder / "tuned"  # what this record tunes is what it measures
    try:
        with stand_ins() if rehearse else nullcontext():
            outcome = STEPS[name].run(folder, minutes)
    except (Exception, SystemExit) as error:
        outcome = Outcome("failed", f"{type(error).__name__}: {error}".split("\n")[0][:300])
        print(outcome.note, flush=True)
    (folder / FILE).write_text(json.dumps(outcome._asdict()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), "--rehearse" in sys.argv)
