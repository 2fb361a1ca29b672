"""The audit: its rules hold on a representative part of the grid, no frozen figure got worse, and it notices defects that are planted."""

import json
from collections import Counter

import pytest
import triton

from bench import audit
from bench.audit import Row, broken_rules, figures, worse
from bench.launches import DEVICES, VARIANTS, Problem, launches
from bench.offline import Kernel, accesses
from triton_rmsnorm.runtime import config as tuning
from triton_rmsnorm.runtime import launch, plan
from triton_rmsnorm.runtime import table as measured

PLAIN = Problem("forward", "plain", "bf16", "bf16", 4096)
BACKWARD = PLAIN._replace(direction="backward")
KERNEL = Kernel(
    name="_rms_norm_fwd_kernel",
    block_m=1,
    block_n=4096,
    num_warps=4,
    num_ctas=1,
    num_stages=3,
    grid=(264, 1, 1),
    registers=100,
    spilled=0,
    shared=16384,
    widths={"X": 16, "Y": 16},
    aligned={"X": 16, "Y": 16},
    async_copies=8,
    persistent=True,
    resident=4,
    per_sm=2.0,
    in_flight=32768,
)
ROW = Row("sm_90", PLAIN, "", [KERNEL], False, {"X": 1000, "W": 5}, {"Y": 1000}, 2005, {"X": 1.0})


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Compiled and counted in processes of their own."""
    return audit.audit(audit.problems(quick=True))


def test_rules_hold(rows):
    assert not [f"{row.key}: {rule}" for row in rows for rule in broken_rules(row)]
    assert {row.target for row in rows} == set(DEVICES) and {row.problem.variant for row in rows} == set(VARIANTS)
    assert all(row.kernels and row.loaded and row.stored and row.minimum for row in rows)


def test_nothing_is_worse_than_frozen(rows):
    before = audit.frozen()
    if not before:
        pytest.skip(f"no figures are frozen for Triton {triton.__version__}: python -m bench.audit --freeze")
    now = figures(rows)
    assert before.keys() >= now.keys()
    assert not worse(before, now), "python -m bench.audit --freeze, if this is what is wanted"


def test_the_representative_part_is_part_of_the_grid():
    assert set(audit.problems(quick=True)) < set(audit.problems())
    assert len(set(audit.problems())) == len(audit.problems())


def test_row_without_defects():
    assert broken_rules(ROW) == []


@pytest.mark.parametrize(
    ("defect", "said"),
    [
        ({"spilled": 8}, "spills 8 bytes"),
        ({"widths": {"X": 8, "Y": 16}}, "accesses X by 8 bytes, not 16"),
        ({"resident": 1}, "2.00 thread blocks an SM, of which 1 fit"),
        ({"resident": 0, "grid": (1, 1, 264)}, "of which 0 fit"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_defects_of_a_kernel_are_named(defect, said):
    (rule,) = broken_rules(ROW._replace(kernels=[KERNEL._replace(**defect)]))
    assert said in rule


@pytest.mark.parametrize(
    ("defect", "said"),
    [
        ({"error": "does not compile: no"}, "does not compile"),
        ({"reads": {"X": 2.0}}, "X is read 2.000 times"),
        ({"loaded": {"X": 1000, "W": 50}}, "moves 1.0224 of the least bytes, more than 1.02"),
        ({"depends_on_rows": True}, "depends on the number of rows"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_defects_of_a_row_are_named(defect, said):
    (rule,) = broken_rules(ROW._replace(**defect))
    assert said in rule


def test_a_backward_may_move_five_percent():
    row = ROW._replace(problem=BACKWARD, loaded={"X": 1000, "W": 100})
    assert broken_rules(row) == []
    assert len(broken_rules(row._replace(loaded={"X": 1000, "W": 110}))) == 1


def test_exceptions_are_no_wider_than_said():
    """What may be read twice or spill, case by case; nothing else may."""
    clusters = DEVICES["sm_90"].max_ctas > 1
    once = {problem: audit.read_once("sm_90", problem) for problem in audit.problems()}
    most = 131072 if clusters else 16384
    fewer = {(problem.direction, problem.variant, problem.dtype) for problem, columns in once.items() if columns < most}
    gates = {("backward", variant, "bf16") for variant in ("gate", "gate_first", "gate_rounded", "add_fp32")}
    assert fewer == {("backward", "plain", "fp64")} | (set() if clusters else gates)
    assert {audit.read_once("gfx942", problem) for problem in once if problem.dtype != "fp64"} == {16384}
    spills = {problem for problem in once if audit.may_spill("sm_90", problem)}
    if clusters:
        assert spills == {Problem("backward", "gate_rounded", "bf16", "bf16", 131072)}
    else:
        assert min(problem.n for problem in spills if problem.variant == "plain" and problem.dtype != "fp64") == 12288
    assert all(audit.may_spill("sm_90", problem) <= 192 for problem in once)


def test_unaligned_rows_may_be_accessed_by_less():
    assert not broken_rules(ROW._replace(kernels=[KERNEL._replace(widths={"X": 8}, aligned={"X": 8})]))


@pytest.mark.parametrize(
    "change",
    [
        {"registers": [101, 80]},
        {"spilled": [0, 4]},
        {"shared": [16385, 64]},
        {"bytes": 2006},
        {"registers": []},
        {"registers": [90, 80, 101]},
    ],
    ids=str,
)
def test_worse_figures_are_noticed(change):
    before = {"registers": [100, 80], "spilled": [0, 0], "shared": [16384, 64], "bytes": 2005}
    assert not worse({"row": before}, {"row": before})
    (line,) = worse({"row": before}, {"row": before | change})
    ((name, value),) = change.items()
    assert line == f"row: {name} was {before[name]}, is {value}"


def test_better_figures_and_other_rows_are_not_worse():
    before = {"registers": [100, 80], "spilled": [8, 0], "shared": [16384, 64], "bytes": 2005}
    better = {"registers": [99], "spilled": [0], "shared": [16384], "bytes": 2004}  # one kernel less
    assert not worse({"row": before, "gone": before}, {"row": better, "new": before})


def test_frozen_figures_are_compared(monkeypatch, tmp_path, capsys):
    """From the command's --freeze to its next run, in which a kernel takes more registers and breaks a rule."""
    monkeypatch.setattr(audit, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(audit, "audit", lambda problems, targets, jobs: [ROW])
    assert audit.frozen() == {}
    assert audit.main(["--freeze"]) == 0
    frozen = json.loads(audit.frozen_path().read_text())
    assert frozen["triton"] == triton.__version__ and {"commit", "changed", "date", "rows"} < frozen.keys()
    assert audit.frozen() == figures([ROW])
    assert "1 rows, 0 broken rules" in capsys.readouterr().out

    spilling = ROW._replace(kernels=[KERNEL._replace(registers=128, spilled=16)])
    monkeypatch.setattr(audit, "audit", lambda problems, targets, jobs: [spilling])
    assert audit.main(["--quick", "--json", str(tmp_path / "rows.json")]) == 1
    shown = capsys.readouterr().out
    assert f"worse than frozen: {ROW.key}: registers was [100], is [128]" in shown
    assert f"{ROW.key}: _rms_norm_fwd_kernel spills 16 bytes a thread" in shown
    (found,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert found["broken"] == broken_rules(spilling) and found["kernels"][0]["spilled"] == 16 and found["n"] == 4096


def test_an_arbitrary_part_is_not_frozen(capsys):
    with pytest.raises(SystemExit):
        audit.main(["--freeze", "--n", "64"])
    assert "--freeze takes no part but --quick" in capsys.readouterr().err


def test_accesses():
    """Names and widths of accesses are read from LLVM's code, through what pointers are computed from."""
    code = """
define ptx_kernel void @k(ptr addrspace(1) %0, ptr addrspace(1) readonly %1, i32 %2) {
  %4 = getelementptr bfloat, ptr addrspace(1) %0, i64 8
  %5 = tail call { i32, i32, i32, i32 } asm sideeffect "@$5 ld.global.v4.b32 { $0, $1, $2, $3 }, [ $4 + 0 ];", "=r"(ptr addrspace(1) %4)
  tail call void asm sideeffect "cp.async.cg.shared.global [ $0 + 0 ], [ $1 + 0 ], 0x10, $2;", "r,l,r"(ptr %s, ptr addrspace(1) %4, i32 16)
  %6 = getelementptr i8, ptr addrspace(1) %1, i64 %9
  store <2 x float> %7, ptr addrspace(1) %6, align 8
"""
    assert accesses(code, ["X", "Y"]) == [("X", "load", 16), ("X", "async", 16), ("Y", "store", 8)]


needs_interpreter = pytest.mark.skipif(not launch.INTERPRETED, reason="bytes are counted in the interpreter")
SMALL = tuning.Device("small", "cuda", num_sms=2, shared_memory=tuning.SM_90.shared_memory)


def count_all(problem: Problem, rows: int, device: tuning.Device) -> tuple[Counter, Counter]:
    """Bytes loaded and stored by all programs over all rows."""
    from bench.traffic import count

    total = Counter(), Counter()
    for recorded in launches(problem, rows, device, "cpu").recorded:
        for moved, counted in zip(total, count(recorded, recorded.launch.grid), strict=True):
            moved.update(counted)
    return total


@needs_interpreter
@pytest.mark.parametrize(("variant", "n"), [("plain", 96), ("plain", 40000), ("groups", 96), ("add_fp32", 1000), ("gate_first", 1000)])
def test_bytes_of_all_rows_follow_from_those_of_two_tiles(variant, n):
    from bench.traffic import traffic

    for direction in ("forward", "backward"):
        problem = Problem(direction, variant, "bf16", "bf16", n)
        rows = 5 * launches(problem, 1, SMALL).recorded[0].launch.values["BLOCK_M"]  # not as many tiles for each of the programs
        found = traffic(problem, rows, SMALL)
        assert (found.loaded, found.stored) == count_all(problem, rows, SMALL)


@needs_interpreter
def test_a_second_read_is_counted(monkeypatch):
    from bench.traffic import traffic

    for problem in (PLAIN, BACKWARD):
        assert set(traffic(problem, 8192, DEVICES["sm_90"]).reads.values()) == {1}
    blocked = tuning.Config(1, 1024, 4, 1, 3, 132)
    launch.forget()
    with monkeypatch.context() as patched:
        patched.setattr(measured, "choose", lambda key, device: blocked)
        assert traffic(PLAIN, 8192, DEVICES["sm_90"]).reads == {"X": 2}
        assert traffic(BACKWARD, 8192, DEVICES["sm_90"]).reads == {"DY": 2, "X": 2}
    launch.forget()


def test_a_configuration_that_depends_on_rows_is_noticed(monkeypatch):
    assert not any(audit.depends_on_rows(problem, tuning.SM_90) for problem in (PLAIN, BACKWARD))
    prepare = plan.forward_launch

    def by_rows(spec, device, x, weight, *rest):
        warps = 4 if x.shape[0] < 1000 else 8
        return prepare(spec, device, x, weight, *rest, config=tuning.Config(1, 4096, warps, 1, 1, 132))

    with monkeypatch.context() as patched:
        patched.setattr(plan, "forward_launch", by_rows)
        assert audit.depends_on_rows(PLAIN, tuning.SM_90)
