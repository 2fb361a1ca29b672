"""Files of results: names, contents, and which one is the newest."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import triton_rmsnorm
from bench import records, style


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")


def test_metadata():
    about = records.metadata()
    assert about.keys() >= {"gpu", "driver", "cpu", "python", "torch", "triton", "commit", "changed", "date"}
    assert about["triton_rmsnorm"] == triton_rmsnorm.__version__  # also from a checkout that is not installed
    assert records.undated(about) == {key: value for key, value in about.items() if key != "date"}


@pytest.mark.skipif(not shutil.which("git"), reason="it is git that knows")
def test_code_that_is_changed_again_is_other_code(monkeypatch, tmp_path):
    """So a run does not go on with what an earlier state of it measured; results are no code."""
    monkeypatch.setattr(records, "ROOT", tmp_path)
    code, result = tmp_path / "triton_rmsnorm" / "kernels.py", tmp_path / "bench" / "results" / "run.json"

    def written(file: Path, text: str) -> str:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return records.metadata()["changed"]

    written(code, "0"), written(result, "0")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a", "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert written(result, "1") == ""
    once, twice = (written(code, text) for text in "12")
    assert once and twice and once != twice and written(result, "2") == twice and written(code, "0") == ""


def test_packages_that_are_not_installed_have_no_version(monkeypatch):
    monkeypatch.setattr(records, "PACKAGES", ("torch", "no-such-package"))
    assert records.versions().keys() == {"triton_rmsnorm", "torch"}


@pytest.mark.parametrize("entries", [[], [{"us": 1.5}, {"us": 2}], {}, {"a b": [1, 2], "c": {}}], ids=str)
def test_a_record_is_read_as_it_was_written(entries):
    about = {"gpu": "NVIDIA H100 (80GB)", "date": "2027-01-02T03:04:05+00:00"}
    path = records.path("run-quick", about)
    assert path.name == "run-quick-nvidia-h100-80gb-20270102030405.json"
    records.write(path, {"metadata": about, "rows": entries}, lines="rows")
    assert json.loads(path.read_text()) == {"metadata": about, "rows": entries}
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    if entries:
        last = path.read_text().splitlines()[-len(entries) - 1 : -1]
        assert len(last) == len(entries) and last[0].startswith(('{"us": 1.5}', '"a b": [1, 2]'))


def test_newest_goes_by_the_stamp():
    assert records.newest("run") is None
    for gpu, year in (("a", 2028), ("b", 2027)):
        records.write(records.path("run-quick", {"gpu": gpu, "date": f"{year}-01-01T00:00:00+00:00"}), {"gpu": gpu})
    records.write(records.path("host", {"date": "2029-01-01T00:00:00+00:00"}, where="stubbed"), {})
    assert json.loads(records.newest("run").read_text()) == {"gpu": "a"}


def test_eight_names_can_be_told_apart():
    names = [f"name {i}" for i in range(8)]
    found = style.styles(*names)
    assert list(found) == names and len({tuple(look.values()) for look in found.values()}) == 8
    assert found["name 0"]["color"] == style.VERMILLION
