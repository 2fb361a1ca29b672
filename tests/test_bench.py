"""The benchmark, end to end on small problems, with the interpreter for a GPU and a clock that is made up."""

import json
import sys
from pathlib import Path

import pytest
import torch
from made_up import LARGE, run_of, timed
from torch.nn import functional as F

from bench import plot, providers, records, tune
from bench import problem as problems
from bench.problem import DIRECTIONS, LAYOUTS, VARIANTS, Problem, draw
from bench.providers import CEILING, EAGER, OURS, Provider, UnsupportedError
from bench.record import __main__ as record
from bench.speed import check, report, run
from triton_rmsnorm import reference
from triton_rmsnorm.reference import Inputs
from triton_rmsnorm.runtime import autotune, launch, table
from triton_rmsnorm.runtime.config import SM_90, analytic
from triton_rmsnorm.testing import composed

CPU = torch.device("cpu")
SMALL = [
    Problem(32, 48, direction, variant, "bf16", weight_dtype, layout)
    for direction in DIRECTIONS
    for variant in ("plain", "residual", "residual_fp32", "gate")
    for weight_dtype, layout in (("bf16", "contiguous"), ("fp32", "slice"))
]


@pytest.fixture(autouse=True)
def few_heads(monkeypatch):
    monkeypatch.setattr(problems, "HEADS", 4)


@pytest.mark.parametrize("dtype", ["bf16", "fp64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_are_those_of_the_tensors(variant, dtype):
    small = Problem(32, 48, variant=variant, dtype=dtype, weight_dtype=dtype)
    data = draw(small, CPU)
    outputs, gradients = (
        check.make_call(small._replace(direction=direction), composed(small.spec), data)() for direction in ("forward", "backward")
    )
    read = [*data.cotangents, outputs[-1] if data.residual is not None else data.x, data.weight]
    read += [data.gate] if data.gate is not None else []
    written = dict(zip(check.trained(small, data), gradients, strict=True))
    if data.residual is not None and written["residual"].dtype == written["x"].dtype:
        del written["residual"]  # dx serves the residual, too
    moved = {"forward": [*data.inputs, *outputs], "backward": [*read, *written.values()]}
    moved["forward+backward"] = moved["forward"] + moved["backward"]
    rstd = reference.forward(Inputs(*data[:4]), small.spec).rstd
    for direction in DIRECTIONS:
        problem = small._replace(direction=direction)
        assert problem.bytes == sum(tensor.nbytes for tensor in moved[direction]), direction
        assert problem.rstd_bytes == rstd.nbytes * (1 + ("+" in direction))


def test_suites():
    quick, full = (problems.SUITES[name] for name in ("quick", "full"))
    assert set(quick) < set(full) and len(set(full)) == len(full) and len({str(entry) for entry in full}) == len(full)
    assert {entry.direction for entry in full} == set(DIRECTIONS)
    assert {entry.n for entry in full if entry.variant == "plain"} >= set(problems.GRID)
    for entry in full:
        assert entry.layout == "contiguous" or entry.m % 32 == 0
        assert entry.m * entry.n <= problems.ELEMENTS * 1.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Rows in every layout are found in place: each is 48 elements side by side."""
    x = draw(Problem(32, 48, layout=layout), CPU).x
    strides = {
        "contiguous": (48, 1),
        "slice": (3 * 4 * 48, 48, 1),
        "transposed": (3 * 8 * 48, 48, 3 * 48, 1),
        "padded": (51, 1),
        "unaligned": (48, 1),
    }
    assert x.numel() == 32 * 48 and x.stride() == strides[layout]
    assert x.storage_offset() == {"transposed": 48, "unaligned": 1}.get(layout, 0)


# torch's own gate in half precision rounds the gradient before it reaches an fp32 weight, which no suite has.
CHECKED = [(problem, OURS) for problem in SMALL] + [
    (problem, EAGER) for problem in SMALL if problem.kind != "gate" or problem.weight_dtype == "bf16"
]


@pytest.mark.parametrize(("problem", "name"), CHECKED, ids=str)
def test_providers_pass_the_check(problem, name, device):
    data = draw(problem, device)
    call = check.make_call(problem, providers.PROVIDERS[name].norm(problem), data)
    expected = check.expect(problem, data)
    assert check.wrong(call(), expected) == ""
    assert check.wrong(call(), expected) == ""  # also when it is repeated


def changed(change):
    """A norm whose y and x + residual are changed."""
    return lambda norm, *tensors: change(*norm(*tensors))


def halved(index):
    """A norm whose gradient of one input is halved."""

    def defective(norm, *tensors):
        half = tensors[index] / 2
        return norm(*tensors[:index], half.detach() + half, *tensors[index + 1 :])

    return defective


DEFECTS = {
    "y": (changed(lambda y, r: (y * 1.02, r)), "y"),
    "one element of y": (changed(lambda y, r: (torch.cat([y[:1] * 1.5, y[1:]]), r)), "y"),
    "nan": (changed(lambda y, r: (torch.where(torch.arange(y.shape[-1]) == 3, torch.nan, y), r)), "y"),
    "x + residual": (changed(lambda y, r: (y, r + 0.1)), "residual_out"),
    "dx": (halved(0), "dx"),
    "dweight": (halved(1), "dweight"),
    "dresidual": (halved(2), "dresidual"),
}


@pytest.mark.parametrize(("defective", "wrong"), DEFECTS.values(), ids=DEFECTS)
def test_check_finds_what_is_wrong(defective, wrong):
    problem = Problem(32, 48, "forward+backward", "residual")
    data, norm = draw(problem, CPU), composed(problem.spec)
    call = check.make_call(problem, lambda *tensors: defective(norm, *tensors), data)
    assert check.wrong(call(), check.expect(problem, data)).startswith(f"{wrong} takes ")


def test_check_counts_results():
    problem = Problem(32, 48, variant="residual")
    data = draw(problem, CPU)
    call = check.make_call(problem, lambda *tensors: composed(problem.spec)(*tensors)[0], data)
    assert check.wrong(call(), check.expect(problem, data)) == "1 results instead of 2"


def test_check_finds_a_weight_gradient_accumulated_in_bf16():
    problem = Problem(4096, 8, "backward", weight_dtype="fp32")
    data = draw(problem, CPU)
    expected = check.expect(problem, data)
    x_hat = F.rms_norm(data.x.float(), (8,), None, problems.EPS)
    total = torch.zeros(8, dtype=torch.bfloat16)
    for row in (data.dy.float() * x_hat).bfloat16():
        total += row
    results = check.make_call(problem, composed(problem.spec), data)()
    assert check.wrong(results, expected) == ""
    assert check.wrong([results[0], total.float()], expected).startswith("dweight takes ")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_which_way_torch_took(direction):
    problem = Problem(4, 8, direction)
    assert providers.path(check.make_call(problem, providers.eager(problem), draw(problem, CPU))) == "composite"  # on the CPU
    fused = torch.nn.functional.layer_norm  # which is one operator there, too
    call = check.make_call(problem, lambda x, weight, residual, gate: fused(x, (8,), weight), draw(problem, CPU))
    assert providers.path(call) == "fused op"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("main", [run.main, tune.main, record.main], ids=["run", "tune", "record"])
def test_without_a_gpu(main, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == records.NO_GPU not in (0, 1, 2)
    shown = capsys.readouterr().out
    assert "no GPU" in shown and shown.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.fixture
def clock(monkeypatch):
    """Shows 100 µs for the first thing that is timed, 101 µs for the next. Returns how often it was looked at."""
    looks = []

    def time_cold(call, seconds, before=lambda: None):
        before()
        call()
        looks.append(call)
        return [99.0 + len(looks)] * 5

    monkeypatch.setattr(check, "time_cold", time_cold)
    return looks


def vandal(problem):
    """Right at first, but it writes over the gradient that arrives, and is wrong if that is not restored."""
    norm = composed(problem.spec)

    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            given = dy.clone()
            dy.zero_()
            return given

    return lambda *tensors: Overwriting.apply(norm(*tensors))


def test_arriving_gradients_are_restored(monkeypatch):
    problem = Problem(32, 48, "backward")
    data, results = draw(problem, CPU), []

    def time_cold(call, seconds, before):
        for _ in range(3):
            before()
            results.append(call())
        return [1.0] * 3

    monkeypatch.setattr(check, "time_cold", time_cold)
    expected = check.expect(problem, data)
    check.measure(problem, vandal(problem), data, expected, 1)
    assert [check.wrong(result, expected) for result in results] == [""] * 3


def unsupported(problem):
    raise UnsupportedError("is not made for that")


def failing(problem):
    raise RuntimeError("broke\nin two lines")


def wrong(problem):
    norm = composed(problem.spec)
    return lambda *tensors: norm(*tensors) * 1.1


PLAIN = [problem for problem in SMALL if problem.variant == "plain"]


@pytest.fixture
def bench_run(monkeypatch, tmp_path, clock, device):
    """run.main on the plain small problems, with one provider of each kind."""
    monkeypatch.setattr(records, "gpu", lambda: device)
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setitem(problems.SUITES, "quick", PLAIN)
    table = {"vandal": vandal, OURS: providers.ours, "unsupported": unsupported, "failing": failing, "wrong": wrong}
    table = {name: Provider(norm) for name, norm in table.items()} | {"nobody": Provider(failing, "no_such_module")}
    for patched in (providers, run, report):
        monkeypatch.setattr(patched, "PROVIDERS", table)
    return lambda *arguments: run.main(["--jobs", "0", *arguments])


def written(folder: Path) -> tuple[Path, dict]:
    """The file of the only run, and what is in it."""
    (file,) = folder.glob("run-*.json")
    return file, json.loads(file.read_text())


def test_run(bench_run, clock, tmp_path, capsys):
    assert bench_run() == 0
    _, result = written(tmp_path)
    rows = result["rows"]
    assert len(rows) == 6 * len(PLAIN)
    statuses = {(row["provider"], row["status"], row["note"]) for row in rows}
    assert statuses == {
        (CEILING, "measured", ""),
        ("vandal", "measured", ""),
        (OURS, "measured", ""),
        ("unsupported", "unsupported", "is not made for that"),
        ("failing", "failed", "RuntimeError: broke"),
        *(entry for entry in statuses if entry[:2] == ("wrong", "wrong") and " of its error budget" in entry[2]),
    }
    assert len(clock) == 3 * len(PLAIN) and 2 * clock[0]().nbytes == PLAIN[0].bytes  # a copy reads and writes
    for row in rows:
        if row["status"] == "measured":
            assert row["low_us"] == row["us"] == row["high_us"] and row["calls"] == 5
            assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1000, abs=0.06)
    said = capsys.readouterr().out
    assert "nobody is absent: ModuleNotFoundError" in said
    assert f"{len(PLAIN)} losses" in said and "vandal" in said  # ours was timed 1 µs after it
    assert result["metadata"].keys() >= {"gpu", "driver", "torch", "triton", "commit", "date"}
    assert result["absent"] == {"nobody": "ModuleNotFoundError: No module named 'no_such_module'"}


def test_a_run_goes_on(bench_run, clock, tmp_path, capsys):
    assert bench_run() == 0
    file, content = written(tmp_path)
    whole, cut = content["rows"], content["rows"][: len(content["rows"]) // 2]
    file.write_text(json.dumps(content | {"rows": cut}))
    clock.clear()
    capsys.readouterr()
    assert bench_run() == 0
    assert "Going on with" in capsys.readouterr().out
    names = [[(row["problem"], row["provider"]) for row in rows] for rows in (written(tmp_path)[1]["rows"], whole)]
    assert names[0] == names[1]
    assert len(clock) == sum(row["status"] == "measured" for row in whole[len(cut) :])

    (tmp_path / "run-quick-z.json").write_text('{"rows": [')  # no JSON: it is passed over
    file.write_text(json.dumps(content | {"rows": cut, "metadata": content["metadata"] | {"torch": "another"}}))
    clock.clear()
    assert bench_run() == 0  # of other versions nothing is taken over
    assert len(clock) == 3 * len(PLAIN)


def test_a_finished_run_is_not_gone_on_with(bench_run, monkeypatch, tmp_path, clock):
    stamps = iter(f"2026-01-0{day}T00:00:00+00:00" for day in range(1, 9))
    metadata = records.metadata()
    monkeypatch.setattr(records, "metadata", lambda: metadata | {"date": next(stamps)})
    for times in (1, 2):
        assert bench_run() == 0
        assert len(clock) == times * 3 * len(PLAIN) and len(list(tmp_path.glob("run-*.json"))) == times


@pytest.mark.parametrize("minutes", ["0.0001", "0"])
def test_out_of_time(minutes, bench_run, clock, capsys):
    assert bench_run("--minutes", minutes) == 0
    assert not clock
    assert f"out of time, {6 * len(PLAIN)} of {6 * len(PLAIN)} cells are left" in capsys.readouterr().out


def test_compiling_ahead_calls_everything_once(bench_run, launches, clock, device):
    run._call_once(PLAIN[0], [CEILING, "failing", OURS], device)
    assert launches and not clock


@pytest.mark.slow
def test_compiles_ahead_in_processes(bench_run, capsys, device):
    assert bench_run("--jobs", "1") == 0  # in a process of its own, which knows only the real providers
    assert "not compiled ahead" not in capsys.readouterr().out
    run._compile_ahead({problem: [OURS] for problem in PLAIN}, device, 1, 0.0)
    assert f"of {len(PLAIN)} problems are not compiled ahead" in capsys.readouterr().out


def test_ours_must_be_right(bench_run, monkeypatch):
    monkeypatch.setitem(run.PROVIDERS, OURS, Provider(wrong))
    assert bench_run() == 1


def test_report():
    rows = [timed(LARGE[0], OURS, 50)]  # and measured again
    rows += [timed(problem, name, us) for problem in LARGE for name, us in ((CEILING, 90), (OURS, 100), ("Liger", 200), (EAGER, 800))]
    rows += [timed(Problem(1, 64), OURS, 40), timed(Problem(1, 64), "Liger", 30), timed(Problem(1, 64), EAGER, 90)]
    rows += [timed(Problem(2, 64), OURS, 40.5), timed(Problem(2, 64), "Liger", 40)]
    rows += [timed(Problem(3, 64), OURS, 40), timed(Problem(3, 64), "Liger", 1, status="unsupported", note="no")]
    lines = report.markdown(run_of(*rows)).splitlines()
    assert "| 131072 x 1024 forward bf16 | 100.0 | 5369 | 90.0% | Liger | 200.0 | 2.00x |" in lines
    assert "| 3 x 64 forward bf16 | 40.0 | 0 |  |  |  |  |" in lines
    mean = (2 * 2 * 0.75 * 40 / 40.5) ** 0.25
    assert f"Geometric means, forward: 90.0% of the copy, 5.24x torch eager (3), {mean:.2f}x Liger (4), {mean:.2f}x the best peer." in lines
    at = lines.index("Against the best peer: 4 wins, 2 losses.")
    assert lines[at + 1 : at + 3] == [
        "- 1 x 64 forward bf16: 0.75x (40.0 µs to 30.0 µs of Liger)",
        "- 2 x 64 forward bf16: 0.99x (40.5 µs to 40.0 µs of Liger, within the spread)",
    ]
    assert lines[-2:] == ["- QuACK is absent: ImportError: none", "- Liger: unsupported: no (3 x 64 forward bf16)"]


def test_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    assert plot.main([]) == 1 and "no results" in capsys.readouterr().out
    rows = [timed(problem, name, us) for problem in LARGE for name, us in ((CEILING, 90), (OURS, 100), ("Liger", 200))]
    for stamp in ("20260101", "20260102"):
        (tmp_path / f"run-quick-none-{stamp}.json").write_text(json.dumps(run_of(*rows)))
    assert plot.main([]) == 0
    (picture,) = tmp_path.glob("*.png")
    assert picture.name == "run-quick-none-20260102.png" and picture.stat().st_size > 20_000
    assert str(picture) in capsys.readouterr().out
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "sweep-none.json")])
    assert "FILE must be one of run-*.json, " in capsys.readouterr().err
    cut = tmp_path / "run-cut.json"
    for content, words in ((None, "No such file"), ('{"rows": [', "Expecting value")):
        if content is not None:
            cut.write_text(content)
        with pytest.raises(SystemExit):
            plot.main([str(cut)])
        assert f"{cut}: " in (said := capsys.readouterr().err) and words in said


@pytest.mark.parametrize("problems", [LARGE, LARGE[:1], []], ids=["all", "one row", "nothing"])
def test_plot_of_what_is_there(problems, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # cannot be imported: it would choose the caller's backend
    rows = [timed(problem, OURS, 100 if problem.direction == "forward" else 10) for problem in problems]
    figure = report.picture(run_of(*rows))
    figure.savefig(tmp_path / "plot.png")
    for axes in figure.axes[:2]:
        bottom, top = axes.get_ylim()
        assert bottom == 0 and all(line.get_ydata().max() < top for line in axes.lines)


@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_keys_are_those_of_the_launches(problem, monkeypatch):
    """What is tuned is what the configuration is chosen by when the problem is computed."""
    chosen = []
    monkeypatch.setattr(table, "choose", lambda key, device: chosen.append(key) or analytic(key, device))
    with launch.pretend(SM_90), launch.recorded(run=False):
        check.make_call(problem._replace(direction="forward+backward"), providers.ours(problem), draw(problem, CPU))()
    assert {key for key in chosen if key.direction in problem.direction} == {*tune.keys(problem)}


def test_tune(monkeypatch, tmp_path, capsys):
    """From nothing to a table, and on from there."""
    searched = []

    def search(key, device):
        searched.append(key)
        return table.Measured(analytic(key, device), 80.0, 100.0)

    monkeypatch.setattr(autotune, "search", search)
    monkeypatch.setattr(records, "gpu", lambda: CPU)
    monkeypatch.setattr(table, "SHIPPED", tmp_path)
    monkeypatch.setitem(problems.SUITES, "quick", SMALL)
    wanted = {key for problem in SMALL for key in tune.keys(problem)}
    with launch.pretend(SM_90):
        assert tune.main(["--suite", "quick", "--minutes", "0"]) == 0
        assert not searched and not list(tmp_path.iterdir())
        assert tune.main(["--suite", "quick"]) == 0
        (path,) = tmp_path.iterdir()
        assert path.name == "sm-90-16-ctas.json" and table.read(path, SM_90).keys() == set(searched) == wanted
        assert json.loads(path.read_text()).keys() >= {"gpu", "driver", "torch", "triton", "triton_rmsnorm", "date", "commit"}
        n = len(wanted)
        assert f"{n} configurations, {n} of them new; on average 1.250 times as fast" in capsys.readouterr().out

        assert tune.main(["--suite", "quick"]) == 0
        assert len(searched) == n and f"{n} configurations, 0 of them new" in capsys.readouterr().out
