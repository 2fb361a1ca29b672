"""`python -m bench.record.step NAME FOLDER MINUTES [--rehearse]`: one step, in a process of its own, whose outcome goes to a file."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

from bench import records
from bench.record.rehearsal import stand_ins
from bench.record.steps import STEPS, Outcome
from triton_rmsnorm.runtime import table

FILE = "outcome.json"  # not part of the record's files


def perform(name: str, folder: Path, minutes: float, rehearse: bool) -> Outcome:
    """One step. What this record tunes is what it measures, and its results go to the folder."""
    there, tuned = mock.patch.object(records, "RESULTS", folder), mock.patch.object(table, "SHIPPED", folder / "tuned")
    try:
        with there, tuned, stand_ins() if rehearse else nullcontext():
            return STEPS[name].run(folder, minutes)
    except (Exception, SystemExit) as error:
        outcome = Outcome("failed", f"{type(error).__name__}: {error}".split("\n")[0][:300])
        print(outcome.note, flush=True)
        return outcome


if __name__ == "__main__":
    step, out = sys.argv[1], Path(sys.argv[2])
    outcome = perform(step, out, float(sys.argv[3]), "--rehearse" in sys.argv)
    (out / FILE).write_text(json.dumps(outcome._asdict()))
