"""The record of a GPU: what is done in which time, what is kept, and how it goes on; with steps and a clock that are made up."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up import LARGE, run_of, timed
from processes import compiled

from bench import records
from bench.providers import CEILING, EAGER, OURS
from bench.record import __main__ as command
from bench.record import apply as apply_module
from bench.record import run
from bench.record.apply import MARK, apply
from bench.record.page import REHEARSAL
from bench.record.run import RECORD, Recorder, plan, share
from bench.record.step import perform
from bench.record.steps import STEPS, Outcome, Step
from bench.speed import run as speed
from triton_rmsnorm.runtime import table

ABOUT = {"gpu": "NVIDIA H100", "commit": "c", "triton_rmsnorm": "1", "torch": "2", "triton": "3", "date": "2027-01-01T00:00:00+00:00"}


def step(name: str, least: float = 1.0, wanted: float = 2.0, rank: int = 0) -> Step:
    return Step(name, f"what {name} does", lambda folder, minutes: Outcome(), least, wanted, rank)


THREE = [step("one", 1, 3, 1), step("two", 2, 2, 2), step("three", 1, 2, 0)]


class Made:
    """Performs steps that take the minutes they are given and `late` seconds more, on a clock of its own."""

    def __init__(self, late: float = 0.0, **outcomes):
        self.now, self.done, self.late, self.outcomes = 0.0, [], late, outcomes

    def clock(self) -> float:
        return self.now

    def __call__(self, step: Step, folder: Path, minutes: float) -> Outcome:
        self.done.append((step.name, round(minutes, 3)))
        self.now += 60 * minutes + self.late
        outcome = self.outcomes.get(step.name, Outcome(note="as planned", result={"rows": []}))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def recorder(out: Path, perform, **about) -> Recorder:
    out.mkdir(exist_ok=True)
    return Recorder(out, ABOUT | about, perform=perform, clock=perform.clock)


def statuses(out: Path) -> dict[str, str]:
    return {name: step["status"] for name, step in json.loads((out / RECORD).read_text())["steps"].items()}


def test_plan():
    names = {minutes: [step.name for step in plan(minutes, STEPS.values())] for minutes in (0.1, 4, 8, 50)}
    assert names[0.1] == [] and names[50] == list(STEPS)
    assert names[4] == ["self-check", "ceiling", "quick", "first use", "host"]
    assert set(names[8]) > set(names[4]) and {"tests", "tune"} < set(names[8])
    for minutes, chosen in names.items():
        assert sum(STEPS[name].least for name in chosen) <= minutes


def test_share():
    """Each has its least; what is left is shared by what they can use, and nobody gets more."""
    assert share(4, THREE) == 1 and share(5.5, THREE) == 2 and share(100, THREE) == 3
    assert share(100, THREE[1:2]) == 2


def test_all_steps_in_order(tmp_path, capsys):
    made = Made()
    recorder(tmp_path / "out", made).run(100, THREE)
    assert made.done == [("one", 3), ("two", 2), ("three", 2)]
    assert statuses(tmp_path / "out") == dict.fromkeys(("one", "two", "three"), "done")
    shown = capsys.readouterr().out
    assert "[2/3] two: what two does; up to 2.0 of 97.0 minutes" in shown and "done in 2.0 minutes: as planned" in shown


def test_a_step_that_fails_is_a_line(tmp_path):
    made = Made(two=RuntimeError("illegal address\nmore"), one=Outcome("failed", "3 of 9 | failed"))
    recorder(tmp_path, made).run(100, THREE)
    assert statuses(tmp_path) == {"one": "failed", "two": "failed", "three": "done"}
    page = (tmp_path / "record.md").read_text()
    assert "| two: what two does | failed | 2.0 | RuntimeError: illegal address |" in page
    assert "| one: what one does | failed | 3.0 | 3 of 9 \\| failed |" in page


def test_a_budget_that_runs_out(tmp_path):
    """What is left out from the start, and what finds no time because a step took longer."""
    made = Made()
    recorder(tmp_path / "short", made).run(2.5, THREE)
    assert [name for name, _ in made.done] == ["one", "three"]
    assert statuses(tmp_path / "short") == {"two": "out of time", "one": "done", "three": "done"}

    late = Made(late=600)
    recorder(tmp_path / "late", late).run(5, THREE)
    assert [name for name, _ in late.done] == ["one"]
    assert statuses(tmp_path / "late") == {"one": "done", "two": "out of time", "three": "out of time"}
    assert "0.0 minutes were left, it needs 2" in (tmp_path / "late" / "record.md").read_text()


def test_resume(tmp_path):
    """What is done or absent is not done again, and is not lost where time is short; files are there again; another GPU is refused."""

    class Writing(Made):
        def __call__(self, step, folder, minutes):
            seen.append(sorted(str(path.relative_to(folder)) for path in folder.rglob("*.json")))
            (folder / "tuned").mkdir(exist_ok=True)
            (folder / "tuned" / f"{step.name}.json").write_text('{"kept": 1}')
            return super().__call__(step, folder, minutes)

    seen: list[list[str]] = []
    recorder(tmp_path, Writing(two=Outcome("partial", "half"), one=Outcome("absent"))).run(100, THREE)
    assert seen == [[], ["tuned/one.json"], ["tuned/one.json", "tuned/two.json"]]
    seen.clear()

    again = Writing()
    other = recorder(tmp_path, again, gpu="NVIDIA A100")
    assert "gpu NVIDIA H100, not NVIDIA A100" in other.resume()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / RECORD).write_text("{")
    assert "record.json is not JSON" in recorder(tmp_path / "cut", again).resume()
    same = recorder(tmp_path, again, date="2027-01-02T00:00:00+00:00")
    assert same.resume() == ""
    same.run(1, THREE)
    assert not seen and statuses(tmp_path)["two"] == "partial"  # which is what an earlier day left
    same.run(100, THREE)
    assert [name for name, _ in again.done] == ["two"] and seen == [["tuned/one.json", "tuned/three.json", "tuned/two.json"]]
    assert statuses(tmp_path) == {"one": "absent", "two": "done", "three": "done"}


def record_of(out: Path, **fields) -> dict:
    """A record with results, on disk with its page."""
    rows = [timed(problem, name, us) for problem in LARGE for name, us in ((CEILING, 90), (OURS, 100), ("Liger", 95), (EAGER, 800))]
    files = {"run-quick-nvidia-h100-20270101000000.json": run_of(*rows), "tuned/nvidia-h100-16-ctas.json": {"entries": []}}
    made = Made(two=Outcome("failed", "broke"))
    recording = recorder(out, made)
    recording.record |= {"files": files, **fields}
    recording.run(100, THREE)
    return recording.record


def test_the_page_names_losses_first(tmp_path):
    record_of(tmp_path)
    page = (tmp_path / "record.md").read_text()
    assert page.index("## Losses") < page.index("## Steps") < page.index("## Every problem")
    assert "Against the best peer: 0 wins, 4 losses." in page
    assert "- 131072 x 1024 forward bf16: 0.95x (100.0 µs to 95.0 µs of Liger)" in page
    assert "Below 95% (forward) and 90% (backward) of the bandwidth of a copy in 2 of 4 problems." in page
    for name in re.findall(r"!\[.*\]\((.*)\)", page):
        assert (tmp_path / name).stat().st_size > 20_000
    assert "REHEARSAL" not in page


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A checkout in which a record has its places."""
    root = tmp_path / "root"
    monkeypatch.setattr(records, "ROOT", root)
    monkeypatch.setattr(records, "RESULTS", root / "bench" / "results")
    monkeypatch.setattr(table, "SHIPPED", root / "tuned")
    monkeypatch.setattr(apply_module, "README", root / "README.md")
    (root / "bench" / "results").mkdir(parents=True)
    (root / "README.md").write_text(f"# Title\n\n{MARK}\n> Status.\n")
    return root


def test_apply(root, tmp_path):
    """Page, pictures and results go to bench/results, the table to the package, the picture to README; a second time in its place."""
    record_of(tmp_path)
    for _ in range(2):
        apply(tmp_path)
    written = {str(path.relative_to(root)) for path in root.rglob("*.*")}
    stem = "bench/results/record-nvidia-h100-20270101000000"
    run_file = "bench/results/run-quick-nvidia-h100-20270101000000.json"
    assert written >= {f"{stem}.md", f"{stem}.json", f"{stem}-speed.png", f"{stem}-losses.png", run_file, "tuned/nvidia-h100-16-ctas.json"}
    assert "](record-nvidia-h100-20270101000000-speed.png)" in (root / f"{stem}.md").read_text()
    readme = (root / "README.md").read_text()
    assert readme == f"# Title\n\n{MARK}\n[![Speed]({stem}-speed.png)]({stem}.md)\n\n> Status.\n"
    assert json.loads((root / run_file).read_text())["rows"]


def test_a_rehearsal_is_no_result(root, tmp_path, capsys):
    record_of(tmp_path, rehearsal=True)
    for caption in re.findall(r"^(?:!\[|\*)(.*)", (tmp_path / "record.md").read_text(), re.MULTILINE):
        assert caption.startswith(REHEARSAL)
    with pytest.raises(SystemExit) as ended:
        command.main(["--apply", str(tmp_path)])
    assert ended.value.code == 2 and "holds a rehearsal, which is not a result" in capsys.readouterr().err


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@without_gpu
@pytest.mark.slow
def test_a_process_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "GRACE", 0)
    rehearsal = Recorder(tmp_path, ABOUT, rehearse=True)
    assert rehearsal.perform(STEPS["ceiling"], tmp_path, 0.0) == Outcome("out of time", "it was ended")


@without_gpu
@pytest.mark.slow
def test_a_record_that_is_terminated_ends_its_step(tmp_path):
    """And leaves nothing but what it has."""
    command = [sys.executable, "-m", "bench.record", "--rehearse", "--out", str(tmp_path / "out")]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=records.ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert "[1/" in next(process.stdout)
        process.terminate()
    assert process.returncode == 143 and [path.name for path in tmp_path.iterdir()] == ["out"]


@without_gpu
@pytest.mark.slow
@pytest.mark.xdist_group("compiled")
def test_rehearsal(tmp_path, capsys, monkeypatch):
    """All steps but the full suite, and again: nothing is left to do. To save time, few have processes of their own."""
    in_process = Recorder._in_process

    def in_few_processes(recorder: Recorder, step: Step, folder: Path, minutes: float) -> Outcome:
        if step.name == "full":
            return Outcome()
        if step.name == "ceiling":
            return in_process(recorder, step, folder, minutes)
        arguments = step.name, folder, minutes, True
        return compiled(perform, *arguments) if step.name == "host" else perform(*arguments)

    monkeypatch.setattr(Recorder, "_in_process", in_few_processes)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # processes of pytest
    monkeypatch.setattr(speed, "_compile_ahead", lambda *_: None)  # see test_bench.py
    out = tmp_path / "out"
    arguments = ["--rehearse", "--out", str(out), "--minutes", "200"]
    assert command.main(arguments) == 0
    record = json.loads((out / RECORD).read_text())
    expected = dict.fromkeys(STEPS, "done") | {"sanitizer": "absent"}
    if not shutil.which("cc"):
        del expected["host"]
    assert {name: step["status"] for name, step in record["steps"].items() if name in expected} == expected
    files = list(out.iterdir())
    assert len(files) <= 8 and all(file.stat().st_size < 16 << 20 for file in files)
    page = (out / "record.md").read_text()
    pictures = re.findall(r"!\[(.*)\]\((.*)\)", page)
    assert len(pictures) == 4 and all(alt.startswith(REHEARSAL) and (out / name).exists() for alt, name in pictures)
    assert "## What tuning at the first use" in page

    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "--resume goes on with it" in capsys.readouterr().err
    assert command.main([*arguments, "--resume"]) == 0
    assert "[1/" not in capsys.readouterr().out
