"""What only a GPU can answer: compiled kernels of every kind, streams, CUDA graphs, addresses, memory, tuning, torch.compile, training.

`pytest -m gpu -n 8` runs these tests alone, in a few minutes. Without a GPU they are skipped.
"""

import copy
import gc
from collections.abc import Iterator
from statistics import median

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from variants import Drawn, Problem, assert_same, id_of, needs_gpu, ours

from bench.census.tiny_models import tiny_model
from triton_rmsnorm import patch, rms_norm
from triton_rmsnorm.reference import Inputs, Spec
from triton_rmsnorm.runtime import autotune, launch, table
from triton_rmsnorm.runtime.config import Key
from triton_rmsnorm.runtime.timing import time_interleaved
from triton_rmsnorm.testing import Results, draw

pytestmark = [pytest.mark.gpu, needs_gpu]

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
EPS = 1e-6
KINDS = {
    "plain": {},
    "residual": {},
    "gate_after": {"activation": "silu"},
    "gate_before": {"activation": "silu", "norm_before_gate": False},
}


def drawn(kind: str, m: int, n: int, dtype=BF16, weight_dtype: torch.dtype | None = None, device="cuda", **fields) -> Drawn:
    """Random tensors for one norm."""
    residual, gate = dtype if kind == "residual" else None, dtype if "gate" in kind else None
    return Problem((m, n), dtype, weight_dtype or dtype, residual, gate, fields={"eps": EPS, **KINDS[kind], **fields}).draw(device)


@pytest.fixture(params=["clusters", "no_clusters"])
def clusters(request) -> Iterator[None]:
    """With and without the thread blocks of a cluster for one row; without them, long rows are processed in blocks."""
    device = launch.device_of(torch.device("cuda"))
    if request.param == "clusters":
        if device.max_ctas == 1:
            pytest.skip("no clusters with this GPU and this Triton")
        yield
        return
    with launch.pretend(device._replace(max_ctas=1), on="cuda"):
        yield


SHORT = [1, 2, 64, 127, 128, 256, 768, 1023, 2048, 4096, 5120, 8192]
LONG = [8193, 12288, 20_000, 32_768, 65_536, 131_072]
SAME = [(BF16, BF16), (F32, F32)]
GRID = [("plain", *dtypes) for dtypes in [*SAME, (F16, F16), (BF16, F32), (F32, BF16)]]
GRID += [(kind, *dtypes) for kind in KINDS if kind != "plain" for dtypes in SAME]


@pytest.mark.parametrize("n", SHORT)
@pytest.mark.parametrize(("kind", "dtype", "weight_dtype"), GRID, ids=id_of)
def test_grid(kind, dtype, weight_dtype, n):
    drawn(kind, 199, n, dtype, weight_dtype).check()


@pytest.mark.parametrize("n", LONG)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=id_of)
def test_grid_of_long_rows(dtype, kind, n, clusters):
    drawn(kind, 19, n, dtype).check()


@pytest.mark.parametrize("n", [127, 4096, 20_000])
@pytest.mark.parametrize("kind", KINDS)
def test_double_precision(kind, n):
    drawn(kind, 9, n, F64).check()


def test_clusters_and_blocks_are_reached(clusters):
    """The grid above has rows in clusters where there are any, and rows in blocks both ways."""
    with launch.recorded() as launches:
        for n in LONG:
            drawn("plain", 3, n).run()
    ctas = {step: {one.launch.options["num_ctas"] for one in launches if one.step == step} for step in ("forward", "backward")}
    blocked = {one.step for one in launches if one.launch.values.get("BLOCK_N", 1 << 30) < one.launch.values.get("N", 0)}
    if launch.device_of(torch.device("cuda")).max_ctas > 1:
        assert max(ctas["forward"]) > 1 and max(ctas["backward"]) > 1
    else:
        assert ctas == {"forward": {1}, "backward": {1}} and blocked == {"forward", "backward", "c1"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "group_size"), [(4096, 128), (8192, 1024), (300, 100), (65536, 32768)])
def test_groups(n, group_size, kind):
    drawn(kind, 19, n, group_size=group_size).check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [100, 4096, 20_000])
def test_without_gradients(kind, n):
    """The same bits, before and after a call that needs gradients: another kernel, which stores no rstd."""
    problem = drawn(kind, 37, n)
    with torch.no_grad():
        before = ours(problem.spec)(*problem.inputs)
    results = problem.run()
    with torch.no_grad():
        after = ours(problem.spec)(*problem.inputs)
    for outputs in (before, after):
        assert_same(tree_leaves(outputs), [y for y in results[:2] if y is not None])


@pytest.mark.parametrize("n", [1000, 20_000])
def test_stream_that_is_not_the_default_one(n):
    """Launches wait for what their stream has to do first, also the backward's, which runs in another thread."""
    problem = drawn("plain", 199, n)
    alone = problem.run()
    late = drawn("plain", 199, n)
    late.inputs.weight.copy_(problem.inputs.weight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # keeps the stream busy for some milliseconds
        late.inputs.x.copy_(problem.inputs.x)
        late.dy.copy_(problem.dy)
        results = late.run()
    torch.cuda.synchronize()
    assert_same(results, alone)


def test_two_streams():
    """Calls on two streams at once, with the same shapes and with others."""
    problems = [drawn("plain", 4096, 4096), drawn("plain", 4096, 4096), drawn("residual", 300, 20_000), drawn("plain", 5000, 64)]
    alone = [problem.run() for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    found: list[tuple[int, Results]] = []
    for _ in range(5):
        for i, problem in enumerate(problems):
            with torch.cuda.stream(streams[i % 2]):
                found.append((i, problem.run()))
    torch.cuda.synchronize()
    for i, results in found:
        assert_same(results, alone[i])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1000, 4096, 65_536])
def test_graph(kind, n):
    """Forward and backward in one CUDA graph: each replay computes from what is in the inputs then."""
    problem, other = drawn(kind, 37, n), drawn(kind, 37, n)
    alone = other.run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        problem.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = problem.run()
    graph.replay()
    problem.check(results)
    for static, values in zip(tree_leaves(problem[1:]), tree_leaves(other[1:]), strict=True):
        if static is not None:
            static.copy_(values)
    graph.replay()
    assert_same(results, alone)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", KINDS)
def test_two_devices(kind):
    """Kernels run where the tensors are, and the current device stays what it is."""
    for n in (1000, 20_000):
        here, there = drawn(kind, 37, n, device="cuda:0"), drawn(kind, 37, n, device="cuda:1")
        for problem in (here, there, here, there):
            problem.check()
            assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("n", [64, 4096])
def test_more_than_2_31_elements(n):
    """The last rows are computed as they are alone; dweight is theirs, because all others have no gradient."""
    m = 2**31 // n + 37
    if torch.cuda.mem_get_info()[0] < 6 * 2 * m * n:
        pytest.skip("needs 26 GB of free GPU memory")
    x = torch.empty(m, n, dtype=BF16, device="cuda").normal_()
    weight, dy = draw((n,), BF16, "cuda"), torch.zeros_like(x)
    dy[-9:] = draw((9, n), BF16, "cuda")
    batch = Drawn(Spec((n,), EPS), Inputs(x, weight), dy)
    last = batch.rows(slice(-9, None))
    results, alone = batch.run(), last.run()
    assert torch.equal(results.y[-9:], alone.y) and torch.equal(results.dx[-9:], alone.dx)
    assert not results.y[:9].isnan().any() and not results.dx[:-9].any()
    last.check(alone._replace(dweight=results.dweight))


@pytest.mark.parametrize("n", [64, 999, 4096, 20_000])
@pytest.mark.parametrize("shift", [2, 4, 8, 16], ids="{}_bytes".format)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=id_of)
def test_alignment(dtype, shift, n):
    """All tensors, or only one, begin at an address that is a multiple of so few bytes."""
    if shift < dtype.itemsize:
        pytest.skip("less than an element")
    problem = drawn("plain", 37, n, dtype)

    def shifted(tensor: Tensor) -> Tensor:
        start = shift // dtype.itemsize
        view = torch.empty(tensor.numel() + start, dtype=dtype, device="cuda")[start:].view(tensor.shape)
        assert view.data_ptr() % 16 == shift % 16
        return view.copy_(tensor)

    x, weight, dy = problem.inputs.x, problem.inputs.weight, problem.dy
    for inputs, gradient in (
        (Inputs(shifted(x), shifted(weight)), shifted(dy)),
        (Inputs(shifted(x), weight), dy),
        (Inputs(x, shifted(weight)), dy),
        (Inputs(x, weight), shifted(dy)),
    ):
        problem._replace(inputs=inputs, dy=gradient).check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n"), [(5000, 1), (5000, 127), (2000, 4096), (300, 20_000), (100, 65_536)])
def test_deterministic(m, n, kind):
    """The same bits in 100 runs."""
    problem = drawn(kind, m, n)
    first = problem.run()
    for _ in range(100):
        assert_same(problem.run(), first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 64, 127, 1000, 4096, 8192, 20_000, 32_768, 65_536])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=id_of)
def test_rows_do_not_depend_on_their_batch(dtype, n, kind):
    drawn(kind, 1500 if n <= 8192 else 300, n, dtype).check_rows()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [256, 4096, 20_000])
def test_tuning_on_first_use(n, kind, tuned, monkeypatch):
    """The same bits as without it; what was found is kept for the next process; nothing is searched while a graph is captured."""
    searched: list[Key] = []
    search = autotune.search
    monkeypatch.setattr(autotune, "search", lambda key, *rest: searched.append(key) or search(key, *rest))

    def cached() -> set[Key]:
        device = launch.device_of(torch.device("cuda"))
        return set(table.read(autotune.cache_file(device, False), device))

    problem = drawn(kind, 199, n)
    with monkeypatch.context() as off:
        off.setattr(table, "search", None)
        untuned = problem.run()
        launch.forget()

        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        off.setattr(table, "search", autotune.tune)
        with torch.cuda.graph(graph):
            captured = problem.run()
        assert not searched and not cached()
        graph.replay()
        assert_same(captured, untuned)

    launch.forget()
    assert_same(problem.run(), untuned)
    assert set(searched) == cached() and {key.direction for key in searched} == {"forward", "backward"}
    searched.clear()
    autotune._found.clear()  # as in another process
    launch.forget()
    assert_same(problem.run(), untuned)
    assert not searched


def test_times_do_not_depend_on_the_order():
    x, out = torch.ones(2, 1 << 24, device="cuda")
    times = time_interleaved([lambda: out.copy_(x)] * 4, 15, torch.ones(1 << 24, device="cuda"))
    assert [median(us) for us in times] == pytest.approx([median(times[-1])] * 4, rel=0.03)


@pytest.mark.parametrize("full", [False, True], ids=["same_bits", "full"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_search_gives_its_memory_back(direction, full):
    device = launch.device_of(torch.device("cuda"))
    rms_norm(torch.ones(1, 64, device="cuda"), (64,))
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    autotune.search(Key(direction, 2048, 2, 2), device, full)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert 0 < torch.cuda.max_memory_allocated() - before[0] <= autotune.MEMORY * (4 if full else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_memory(kind):
    """A forward keeps its outputs and rstd, nothing else; a backward its gradients."""
    problem = drawn(kind, 1024, 4096)
    problem.run()
    leaves = [tensor.requires_grad_() for tensor in problem.inputs if tensor is not None]
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # also what other tests used on other streams
    before = torch.cuda.memory_allocated()
    outputs = ours(problem.spec)(*problem.inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    size = sum(y.nbytes for y in outputs)
    assert torch.cuda.memory_allocated() - before == size + 1024 * 4
    gradients = torch.autograd.grad(outputs, leaves, [problem.dy, problem.dresidual_out][: len(outputs)])
    storages = {gradient.data_ptr(): gradient.nbytes for gradient in gradients}
    assert torch.cuda.memory_allocated() - before == size + sum(storages.values())
    del outputs, gradients
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("weight_dtype", [None, BF16, F32], ids=id_of)
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=id_of)
def test_autocast(dtype, weight_dtype):
    """Outputs and gradients have the dtypes that torch gives them, and its values."""
    x, weight = draw((37, 1000), dtype, "cuda"), None if weight_dtype is None else draw((1000,), weight_dtype, "cuda")
    dy = draw((37, 1000), F64, "cuda")

    def results_of(norm) -> dict[str, Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight) if tensor is not None]
        with torch.autocast("cuda", BF16):
            y = norm(leaves[0], (1000,), *leaves[1:])
        gradients = torch.autograd.grad(y, leaves, dy.to(y.dtype))
        return dict(zip(("y", "dx", "dweight"), (y, *gradients), strict=False))

    for (name, our), their in zip(results_of(rms_norm).items(), results_of(F.rms_norm).values(), strict=True):
        assert our.dtype == their.dtype, name
        torch.testing.assert_close(our, their, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def compiler(monkeypatch) -> Iterator[None]:
    """torch.compile from scratch, without processes of its own: the tests run in several already."""
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind, mode, compiler):
    """Inductor, alone and with CUDA graphs: the bits of eager, on other values too, in one graph."""
    problems = [drawn(kind, 64, 1024) for _ in range(2)]
    expected = [problem.run() for problem in problems]
    compiled = torch.compile(ours(problems[0].spec), fullgraph=True, mode=None if mode == "default" else mode)
    for _ in range(3):  # CUDA graphs warm up, capture and replay
        for problem, eager in zip(problems, expected, strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            assert_same(problem.run(compiled), eager)
    if mode == "reduce-overhead":
        assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("dtype", [BF16, F32], ids=id_of)
@pytest.mark.parametrize("fuse_residual", [False, True], ids=["norms", "fused"])
def test_a_patched_model_trains(fuse_residual, dtype):
    """A tiny Llama learns a batch by heart, with losses that follow those of the original, and every norm's weight has a gradient."""
    sizes = {"vocab_size": 128, "hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 3}
    original = tiny_model("llama", **sizes).to("cuda", dtype)
    model, control = copy.deepcopy(original), copy.deepcopy(original)
    assert patch(model, strict=True, fuse_residual=fuse_residual).replaced == 7
    tokens = torch.randint(128, (4, 64), device="cuda")

    def losses(model) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        found = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    with launch.recorded() as launches:
        ours = losses(model)
    assert [sum(one.step == step for one in launches) for step in ("forward", "backward")] == [10 * 7] * 2
    assert ours[-1] < ours[0] - 1
    with torch.no_grad():
        for name, weight in control.named_parameters():
            if "norm" in name:
                weight *= 1 + torch.finfo(dtype).eps
    theirs = losses(original)
    moved = max(abs(one - other) for one, other in zip(losses(control), theirs, strict=True))  # by one rounding of each weight
    assert ours == pytest.approx(theirs, rel=0, abs=max(2 * moved, 1e-3))
    assert all(weight.grad.count_nonzero() > weight.numel() / 2 for name, weight in model.named_parameters() if "norm" in name)
