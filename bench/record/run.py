"""Runs the steps of a record within its minutes and keeps what there is after each of them, and meanwhile."""

import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench import records
from bench.record import page
from bench.record.step import FILE
from bench.record.steps import STEPS, Outcome, Step

RECORD, LOG = "record.json", "log.txt"
LOG_BYTES = 4 << 20  # that are kept, of the end
SAME = ("gpu", "commit", "triton_rmsnorm", "torch", "triton")  # what a record that goes on shares with its beginning
LOOK = 20  # seconds between two looks at a step that runs
GRACE = 20  # seconds that a step may take longer than its minutes before it is ended


def plan(minutes: float, steps: Iterable[Step]) -> list[Step]:
    """The steps that fit, in their order: those of low rank first, with the least that each needs."""
    steps, chosen = list(steps), []
    for step in sorted(steps, key=lambda step: step.rank):
        if sum(one.least for one in chosen) + step.least <= minutes:
            chosen.append(step)
    return [step for step in steps if step in chosen]


def share(minutes: float, steps: list[Step]) -> float:
    """The minutes of the first of the steps that are left: its least, and its part of what none of them needs."""
    slack = minutes - sum(step.least for step in steps)
    wishes = sum(step.wanted - step.least for step in steps)
    first = steps[0]
    extra = (first.wanted - first.least) * min(1.0, max(0.0, slack) / wishes) if wishes else 0.0
    return first.least + extra


class Recorder:
    """A record in a folder.

    Args:
        out: the folder; of what is in it, only the record's own files are touched.
        rehearse: whether stand-ins are measured instead of a GPU.
        perform: does one step; given the step, the folder for its files and its minutes.
        clock: seconds.
    """

    def __init__(
        self,
        out: Path,
        metadata: dict,
        rehearse: bool = False,
        perform: Callable[[Step, Path, float], Outcome] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.out, self.clock = out, clock
        self.perform = perform or self._in_process
        self.record: dict[str, Any] = {"metadata": metadata, "rehearsal": rehearse, "steps": {}, "files": {}}

    def resume(self) -> str:
        """Takes over what the folder holds; says why that cannot be, or nothing."""
        try:
            before = json.loads((self.out / RECORD).read_text())
        except ValueError as error:
            return f"{self.out / RECORD} is not JSON: {error}"
        for key in SAME:
            then, now = before["metadata"].get(key), self.record["metadata"].get(key)
            if then != now:
                return f"{self.out / RECORD} was made with {key} {then}, not {now}"
        if before["rehearsal"] != self.record["rehearsal"]:
            return f"{self.out / RECORD} is {'' if before['rehearsal'] else 'not '}a rehearsal"
        self.record = before
        return ""

    def run(self, minutes: float, steps: Iterable[Step] = tuple(STEPS.values())) -> None:
        """Does what is not done yet. Progress goes to stdout."""
        end = self.clock() + 60 * minutes
        todo = [step for step in steps if self.record["steps"].get(step.name, {}).get("status") not in ("done", "absent")]
        left = plan(minutes, todo)
        planned = len(left)
        for step in todo:
            if step not in left:
                self._note(step, Outcome("out of time", f"needs {step.least:g} minutes"), 0.0)
        self.save(draw=True)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self._restore(folder)
            while left:
                before = copy.deepcopy(self.record["files"])
                step, remaining = left[0], (end - self.clock()) / 60
                if remaining < step.least:
                    self._note(step, Outcome("out of time", f"{max(0.0, remaining):.1f} minutes were left, it needs {step.least:g}"), 0.0)
                else:
                    allotted = share(remaining, left)
                    at = f"[{planned - len(left) + 1}/{planned}]"
                    print(f"{at} {step.name}: {step.what}; up to {allotted:.1f} of {remaining:.1f} minutes", flush=True)
                    self._do(step, folder, allotted)
                left.pop(0)
                self.save(draw=self.record["files"] != before)

    def _do(self, step: Step, folder: Path, minutes: float) -> None:
        start = self.clock()
        try:
            outcome = self.perform(step, folder, minutes)
        except Exception as error:
            outcome = Outcome("failed", f"{type(error).__name__}: {error}".split("\n")[0][:300])
        self._collect(folder)
        self._note(step, outcome, (self.clock() - start) / 60)
        print(f"    {outcome.status} in {(self.clock() - start) / 60:.1f} minutes{': ' if outcome.note else ''}{outcome.note}", flush=True)

    def _note(self, step: Step, outcome: Outcome, minutes: float) -> None:
        known = self.record["steps"].get(step.name)
        if outcome.status == "out of time" and known and known["status"] == "partial":
            return  # what an earlier day left is still there
        self.record["steps"][step.name] = {"what": step.what, **outcome._asdict(), "minutes": round(minutes, 2)}

    def _in_process(self, step: Step, folder: Path, minutes: float) -> Outcome:
        """In a session of its own, so that all that it starts can be ended with it."""
        file = folder / FILE
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "bench.record.step", step.name, str(folder), f"{minutes}"]
        environment = os.environ | {"TRITON_RMSNORM_AUTOTUNE": "0"}  # what is not in the table is the analytic choice
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(records.ROOT), os.environ.get("PYTHONPATH")]))
        if self.record["rehearsal"]:
            command.append("--rehearse")
            environment |= {"TRITON_INTERPRET": "0" if step.name == "host" else "1"}
        path = self.out / LOG
        with path.open("ab") as log:
            log.write(f"\n== {step.name}: {step.what}\n".encode())
            log.flush()
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
            start = looked = time.monotonic()
            try:
                while process.poll() is None and time.monotonic() < start + 60 * minutes + GRACE:
                    time.sleep(0.2)
                    if time.monotonic() > looked + LOOK:  # of what is not finished, the last state is kept, too
                        looked = time.monotonic()
                        self._collect(folder)
                        self.save()
                        print(f"    {(looked - start) / 60:.1f} of {minutes:.1f} minutes", flush=True)
            finally:
                late = process.poll() is None
                if late:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        path.write_bytes(path.read_bytes()[-LOG_BYTES:])
        if file.exists():
            return Outcome(**json.loads(file.read_text()))
        if late:
            return Outcome("out of time", "it was ended")
        return Outcome("failed", f"its process ended with exit code {process.returncode}")

    def _restore(self, folder: Path) -> None:
        for name, content in self.record["files"].items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(content))

    def _collect(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*.json")):
            if path.name != FILE:
                try:
                    self.record["files"][str(path.relative_to(folder))] = json.loads(path.read_text())
                except (OSError, ValueError):  # being replaced
                    continue

    def save(self, draw: bool = False) -> None:
        records.write(self.out / RECORD, self.record, lines="files")
        page.write(self.out, self.record, draw)
