"""The audit: its rules hold on a representative part of the grid, no frozen figure got worse, and it notices defects that are planted."""

import json
from collections import Counter
from dataclasses import replace
from math import inf

import pytest
import triton
from processes import compiled

from bench import plot, records
from bench.audit import __main__ as command
from bench.audit import picture, rules
from bench.audit.compile import TARGETS, Kernel, compile_for
from bench.audit.machine import accesses, narrow_products, work
from bench.audit.record import DEVICES, depends_on_rows, launches, tensors
from bench.audit.rows import Row, audit, problems
from bench.audit.traffic import Traffic, count, traffic
from bench.problem import DIRECTIONS, VARIANTS, Problem
from triton_rmsnorm.runtime import launch, plan, table
from triton_rmsnorm.runtime.config import SM_90, Config, Device

PLAIN = Problem(8192, 4096)
BACKWARD = PLAIN._replace(direction="backward")
KERNEL = Kernel(
    name="_rms_norm_fwd_kernel",
    step="forward",
    block_m=1,
    block_n=4096,
    num_warps=4,
    num_ctas=1,
    grid=(1056, 1, 1),
    registers=100,
    spilled=0,
    shared=16384,
    widths={"X": 16, "Y": 16},
    aligned={"X": 16, "Y": 16},
    async_copies=8,
    persistent=True,
    resident=16,
    per_sm=8.0,
    in_flight=65536,
    per_element=10.0,
    narrow_products=[],
)
SIZE = PLAIN.bytes + PLAIN.rstd_bytes
TRAFFIC = Traffic({"X": SIZE // 2, "W": 5000}, {"Y": SIZE // 2}, {"W": 5000}, {"X": 1.0})
ROW = Row("sm_90", PLAIN, "", [KERNEL], False, TRAFFIC)


# A small part of the grid: `python -m bench.audit --quick` takes minutes.
PART = [(target, PLAIN._replace(direction=direction)) for direction in DIRECTIONS[:2] for target in DEVICES]
PART += [("sm_90", Problem(8192, 2048, "backward", variant)) for variant in ("groups", "residual", "gate", "gate_first")]


@pytest.mark.slow
def test_compiled_and_counted():
    """Nothing of the part breaks a rule or is worse than frozen. Triton before 3.9 compiles to slightly more instructions."""
    rows = audit(PART, jobs=1)
    assert {(row.target, row.problem) for row in rows} == set(PART)
    assert all(row.main and row.traffic.loaded and row.traffic.stored for row in rows)
    broken = [f"{row.key}: {rule}" for row in rows for rule in rules.broken(row)]
    assert not [rule for rule in broken if launch.CLUSTERS or "instructions per element" not in rule]
    before, now = rules.frozen(), rules.figures(rows)
    if before:  # for the Triton that is installed
        assert before.keys() >= now.keys()
        assert not rules.worse(before, now), "python -m bench.audit --freeze, if this is what is wanted"


def test_parts_of_the_grid():
    assert {problem for _, problem in PART} | set(problems(quick=True)) <= set(problems())
    assert {problem.variant for problem in problems(quick=True)} == set(VARIANTS)
    assert len(set(problems())) == len(problems())


def with_kernel(row: Row, **changes) -> Row:
    return row._replace(kernels=[row.kernels[0]._replace(**changes)])


BACK = ROW._replace(problem=BACKWARD)
FLAT = with_kernel(ROW, persistent=False, per_sm=inf, resident=8)
FLAT_100 = FLAT._replace(target="sm_100")
UNALIGNED = with_kernel(ROW, widths={"X": 8}, aligned={"X": 8})
DEFECTS = {
    "spills 8 bytes": with_kernel(BACK, spilled=8),
    "accesses X by 8 bytes, not 16": with_kernel(BACK, widths={"X": 8, "Y": 16}),
    "8.00 thread blocks per SM, of which 7 fit": with_kernel(BACK, resident=7),
    "of which 0 fit": with_kernel(BACK, resident=0, grid=(1, 1, 264)),
    "takes 1048576 bytes of shared memory": with_kernel(BACK, shared=1 << 20),
    "has 32-bit offsets: arith.muli": with_kernel(BACK, narrow_products=["arith.muli %1, %2 : i32"]),
    "does not compile": ROW._replace(error="does not compile: no"),
    "X is read 2.000 times": BACK._replace(traffic=TRAFFIC._replace(reads={"X": 2.0})),
    "moves 1.0300 of the minimum, more than 1.02": ROW._replace(traffic=TRAFFIC._replace(stored={"Y": SIZE * 53 // 100})),
    "depends on the number of rows": ROW._replace(depends_on_rows=True),
    # On sm_90, a tile of 4096 columns and 4 warps is 32 elements per thread.
    "has 20 warps per SM, not 24": with_kernel(FLAT, resident=5),
    "has 1.15 of the bytes in flight, not 1.2": with_kernel(FLAT, in_flight=30000),
    "has 0.68 of the bytes in flight, not 0.7": with_kernel(FLAT_100, in_flight=29000),
    "takes 12.1 instructions per element, more than 12": with_kernel(FLAT, per_element=12.1),
    "takes 15.1 instructions per element, more than 15": with_kernel(FLAT, num_warps=8, per_element=15.1),
}


@pytest.mark.parametrize("said", DEFECTS)
def test_defects_are_named(said):
    (rule,) = rules.broken(DEFECTS[said])
    assert said in rule


def test_rows_without_defects():
    assert [rules.broken(row) for row in (ROW, BACK, FLAT, FLAT_100, UNALIGNED)] == [[]] * 5


def test_rows_that_are_read_again_from_the_cache():
    """In the forward, if the rows of all resident programs fit into the L2; else they come from memory."""
    again = ROW._replace(traffic=TRAFFIC._replace(loaded={"X": SIZE, "W": 5000}, reads={"X": 2.0}))
    assert rules.broken(again) == [] and again.cache == SIZE // 2 + 5000 and again.memory == ROW.memory
    crowded = again._replace(kernels=[KERNEL._replace(resident=100)])
    assert crowded.cache == 5000
    assert ["X is read 2.000 times", "moves 1.5000 of the minimum, more than 1.02"] == rules.broken(crowded)


def test_a_backward_may_move_five_percent():
    problem = BACKWARD._replace(n=8192)
    size = problem.bytes + problem.rstd_bytes
    for part, wrong in ((54, 0), (56, 1)):
        moved = Traffic({"X": size // 2}, {"Y": size * part // 100}, {}, {"X": 1.0})
        assert len(rules.broken(ROW._replace(problem=problem, traffic=moved))) == wrong


def test_exceptions_are_no_wider_than_said():
    """What may be read twice or spill; nothing else may."""
    clusters = DEVICES["sm_90"].max_ctas > 1
    once = {problem: rules.read_once("sm_90", problem) for problem in problems()}
    most = 131072 if clusters else 16384
    fewer = {(problem.direction, problem.variant, problem.dtype) for problem, columns in once.items() if columns < most}
    gates = {("backward", variant, "bf16") for variant in ("gate", "gate_first", "gate_rounded", "residual_fp32")}
    assert fewer == {("backward", "plain", "fp64")} | (set() if clusters else gates)
    assert {rules.read_once("gfx942", problem) for problem in once if problem.dtype != "fp64"} == {16384}
    spills = {problem for problem in once if rules.may_spill("sm_90", problem)}
    gates = {BACKWARD._replace(n=7168, variant=variant) for variant in ("gate", "gate_first")}
    fp32 = BACKWARD._replace(n=256, dtype="fp32", weight_dtype="fp32")
    assert {problem for problem in spills if problem.n <= 8192} == {BACKWARD._replace(variant="gate_rounded"), *gates, fp32}
    assert {problem for problem in spills if problem.direction == "forward"} == {fp32._replace(n=32768, direction="forward")}


BEFORE = {"registers": [100, 80], "spilled": [0, 0], "shared": [16384, 64], "memory": 2005}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("registers", [105, 80]),
        ("registers", []),
        ("registers", [90, 80, 105]),
        ("spilled", [0, 4]),
        ("shared", [16385, 64]),
        ("memory", 2006),
    ],
)
def test_worse_figures_are_noticed(name, value):
    assert rules.worse({"row": BEFORE}, {"row": BEFORE | {name: value}}) == [f"row: {name} was {BEFORE[name]}, is {value}"]


def test_better_figures_and_other_rows_are_not_worse():
    better = {"registers": [104], "spilled": [0], "shared": [16384], "memory": 2004}  # one kernel less, and as many registers allocated
    assert not rules.worse({"row": BEFORE, "gone": BEFORE}, {"row": better, "new": BEFORE})


def test_frozen_figures_are_compared(monkeypatch, tmp_path, capsys):
    """From the command's --freeze to its next run, in which a kernel takes more registers and breaks a rule."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(command, "audit", lambda tasks, jobs: [ROW])
    assert rules.frozen() == {}
    assert command.main(["--freeze"]) == 0
    frozen = json.loads(rules.frozen_path().read_text())
    assert frozen["triton"] == triton.__version__ and {"commit", "changed", "date", "rows"} < frozen.keys()
    assert rules.frozen() == rules.figures([ROW])
    assert "1 rows, 0 broken rules" in capsys.readouterr().out

    spilling = ROW._replace(kernels=[KERNEL._replace(registers=128, spilled=16)])
    monkeypatch.setattr(command, "audit", lambda tasks, jobs: [spilling])
    assert command.main(["--quick"]) == 1
    shown = capsys.readouterr().out
    assert f"worse than frozen: {ROW.key}: registers was [100], is [128]" in shown
    assert f"{ROW.key}: _rms_norm_fwd_kernel spills 16 bytes per thread" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--freeze", "--n", "64"], "--freeze takes no part but --quick"),
        (["--quick", "--n", "28672"], "no problem of the grid has such a --variant and --n in the part of --quick"),
        (["--jobs", "0"], "--jobs: must be a positive integer, got 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_arguments(arguments, words, capsys):
    """An arbitrary part is not frozen, and a part without problems breaks no rule."""
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert words in capsys.readouterr().err


def test_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    chosen = [
        ROW._replace(target=target, problem=Problem(8192, n, direction, variant), kernels=[KERNEL._replace(spilled=8 * (n > 4096))])
        for target, variant in (("sm_90", "plain"), ("sm_90", "gate"), ("gfx942", "plain"))
        for direction in ("forward", "backward")
        for n in (64, 4096, 16384)
    ]
    figures = rules.figures([*chosen, ROW._replace(problem=Problem(8192, 64, dtype="fp32"))])
    frozen = {"triton": "3.9.0", "commit": "c", "date": "2026-01-01", "figures": figures}
    for version in ("3.9.0", "3.10.0"):
        records.write(tmp_path / f"audit-{version}.json", frozen | {"triton": version}, lines="figures")
    assert plot.main([]) == 0
    (drawn,) = tmp_path.glob("*.png")
    assert drawn.name == "audit-3.10.0.png" and drawn.stat().st_size > 20_000
    assert str(drawn) in capsys.readouterr().out

    found = picture.find(frozen, "plain", "gate")
    assert found.keys() == {(row.target, row.problem) for row in chosen}
    assert found["sm_90", PLAIN] == rules.figures([ROW])[ROW.key]
    assert len(picture.heat_maps(frozen).axes) == 2 * 6  # maps and their color bars


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


SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;      /* 0x1 */
        /*0010*/                   LDG.E.128 R4, [R2.64] ; /* 0x1 */
        /*0020*/                   NOP ;                   /* 0x1 */
        /*0030*/              @!P0 BRA 0x10 ;              /* 0x1 */
        /*0040*/                   STG.E.64 [R2.64], R4 ;  /* 0x1 */
        /*0050*/                   EXIT ;                  /* 0x1 */
        /*0060*/                   BRA 0x60 ;              /* 0x1 */
"""
AMDGCN = """
_kernel:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	global_load_dwordx4 v[0:3], v4, s[0:1]
	s_waitcnt vmcnt(0)
	global_store_dwordx4 v4, v[0:3], s[0:1]
	s_cbranch_scc1 .LBB0_1
	s_endpgm
"""


def test_work():
    """Those of loops over memory; of a kernel without such a loop all that run."""
    assert work(SASS) == (2, 16, 0, True)
    assert work(SASS.replace("BRA 0x10 ", "BRA 0x40 ")) == (6, 16, 8, False)
    assert work(AMDGCN) == (4, 16, 16, True)


def test_narrow_products():
    """Offsets have to be multiplied in 64 bits, except for a program's index with a constant."""
    code = "%c = arith.constant 128 : i32\n %a = arith.muli %pid, %c : i32\n"
    assert narrow_products(code + "%b = arith.muli %rows, %stride : tensor<4xi64>") == []
    assert len(narrow_products(code + "%b = arith.muli %rows, %stride : tensor<4xi32>\n %d = arith.muli %pid, %stride : i32")) == 2


def policies_in_ptx() -> list[list[str]]:
    """The cache policies of a configuration that are in the code, forward and backward."""
    target, choose = TARGETS["sm_80"], table.choose
    table.choose = lambda key, device: replace(choose(key, device), load_policy="evict_first", store_policy=".cs")
    found = []
    for direction in ("forward", "backward"):
        recorded = launches(Problem(64, 1024, direction), target.device)[0]
        arguments = [*recorded.pointers.values(), *recorded.launch.arguments]
        ptx = compile_for(recorded.launch.kernel, arguments, recorded.launch.options, target.gpu).asm["ptx"]
        found.append([policy for policy in ("evict_first", "st.global.cs") if policy in ptx])
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("compiled")
def test_cache_policies_reach_the_code():
    """Those of loads reach the asynchronous copies of a backward only with some versions of Triton."""
    forward, backward = compiled(policies_in_ptx)
    assert forward == ["evict_first", "st.global.cs"] and "st.global.cs" in backward


needs_interpreter = pytest.mark.skipif(not launch.INTERPRETED, reason="bytes are counted in the interpreter")
SMALL = Device("small", "cuda", num_sms=2, shared_memory=SM_90.shared_memory)


@needs_interpreter
@pytest.mark.parametrize(("variant", "n"), [("plain", 96), ("plain", 17000), ("groups", 96), ("residual_fp32", 1000), ("gate_first", 1000)])
def test_bytes_of_all_rows_follow_from_those_of_two_tiles(variant, n):
    for direction in ("forward", "backward"):
        problem = Problem(1, n, direction, variant)
        problem = problem._replace(m=5 * launches(problem, SMALL)[0].launch.values["BLOCK_M"])  # not as many tiles for each program
        found, total = traffic(problem, SMALL), (Counter(), Counter())
        for recorded in launches(problem, SMALL):
            for moved, counted in zip(total, count(recorded, recorded.launch.grid)[:2], strict=True):
                moved.update(counted)
        assert (found.loaded, found.stored) == total


@needs_interpreter
def test_a_second_read_is_counted(monkeypatch):
    """Of rows it is memory traffic, of the weight it is not."""
    for problem in (PLAIN, BACKWARD):
        found = traffic(problem, DEVICES["sm_90"])
        assert set(found.reads.values()) == {1}
        assert found.cached == {"W": found.loaded["W"] - 2 * 4096}
    monkeypatch.setattr(table, "choose", lambda key, device: Config(1, 1024, 4, 1, 3, 132))
    assert traffic(PLAIN, DEVICES["sm_90"]).reads == {"X": 2}
    assert traffic(BACKWARD, DEVICES["sm_90"]).reads == {"DY": 2, "X": 2}


def test_a_configuration_that_depends_on_rows_is_noticed(monkeypatch):
    assert not any(depends_on_rows(problem, SM_90) for problem in (PLAIN, BACKWARD))
    prepare = plan.forward_launch

    def by_rows(spec, device, x, *rest):
        return prepare(spec, device, x, *rest, config=Config(1, 4096, 4 if x.shape[0] < 1000 else 8, 1, 1, 132))

    monkeypatch.setattr(plan, "forward_launch", by_rows)
    assert depends_on_rows(PLAIN, SM_90)


def test_launches_are_recorded_and_do_not_run():
    forward, backward = (launches(problem, SM_90) for problem in (PLAIN, BACKWARD))
    assert [recorded.step for recorded in (*forward, *backward)] == ["forward", "backward", "sum_partials"]
    assert tensors(forward[0]).keys() == {"X", "W", "Y", "RSTD"} and tensors(forward[0])["X"].is_meta
