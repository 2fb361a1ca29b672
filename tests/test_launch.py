"""Launches: how many, over what, from which thread; what they touch; what they may depend on."""

import mmap
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from variants import BLOCKED, Drawn, N, Problem, assert_same, block_n, every_function, leaves, offsets_of, ours

from triton_rmsnorm.reference import Inputs, Needs, Spec
from triton_rmsnorm.runtime import config, launch, plan
from triton_rmsnorm.runtime.layout import Layout
from triton_rmsnorm.testing import draw


def test_memory_is_poisoned(device):
    """What no kernel writes is NaN in these tests."""
    assert torch.empty(9, device=device).isnan().all() and torch.empty(9, dtype=torch.bfloat16, device=device).isnan().all()


@every_function
def test_one_launch_forward_two_backward(function, device, launches):
    """They are prepared once."""
    tensors = leaves(function.draw((3, 5, N), torch.bfloat16, device))
    for _ in range(2):
        outputs = tree_leaves(function.ours(*tensors))
        assert launches[-1].step == "forward"
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert [recorded.step for recorded in launches] == 2 * ["forward", "backward", "sum_partials"]
    assert [recorded.launch for recorded in launches[:3]] == [recorded.launch for recorded in launches[3:]]


SHAPES = [(199, 1), (1100, 64), (70, 1000), (5, max(BLOCKED))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_do_not_depend_on_their_batch(shape, dtype, device):
    Problem(shape, dtype, dtype).draw(device).check_rows()


@pytest.mark.slow
@pytest.mark.parametrize("stand_in", [config.SM_80, config.SM_90], ids=lambda stand_in: stand_in.name)
def test_rows_do_not_depend_on_their_batch_on_devices(stand_in, device, run_as):
    run_as(stand_in)
    Problem((5, 1000)).draw(device).check_rows()


@pytest.mark.parametrize("stand_in", [config.SM_80, config.SM_90, config.GFX942], ids=lambda stand_in: stand_in.name)
@pytest.mark.parametrize("n", [128, 4096, 100_000])
def test_number_of_rows_compiles_nothing_anew(n, stand_in):
    """Rows decide the extent of the grid and integers that are no constants, but nothing that is compiled in.

    The programs of a backward are no more than its tiles, and no more than its configuration says.
    """
    backward = config.analytic(config.Key("backward", n, 2, 2), stand_in)

    def compiled(m):
        x, weight = Layout((m, n), (n, 1), torch.bfloat16), Layout((n,), (1,), torch.bfloat16)
        spec = Spec((n,), 1e-6)
        forward = plan.forward_launch(spec, stand_in, x, weight)
        launches = plan.backward_launches(spec, stand_in, Needs(), x, None, x, weight)
        assert launches.main.grid[0] <= -(-m // backward.block_m) and prod(launches.main.grid) <= backward.programs
        prepared = [each for each in (forward, *launches) if each is not None]
        integers = ("M", "programs")
        return [(each.kernel, each.options, {k: v for k, v in each.values.items() if k not in integers}) for each in prepared]

    assert compiled(1) == compiled(8192) == compiled(2**24)


@pytest.mark.parametrize(
    ("shape", "group_size", "message"),
    [
        ((2**31, 1), None, "input must have at most 2147418112 rows, got 2147483648"),
        ((1, 2**31), None, "rows must have at most 2146435072 columns, got 2147483648"),
        ((1, 2**20), 8, "rows must have at most 65535 groups, got 131072"),
    ],
)
def test_too_many(shape, group_size, message):
    """The numbers of rows and columns are 32-bit integers in the kernels, and groups are an axis of the grid."""
    with pytest.raises(RuntimeError, match=message):
        plan.forward_launch(Spec(shape[1:], 1e-6, group_size), config.SM_90, Layout(shape, (shape[1], 1), torch.float32), None)


def test_a_gradient_wider_than_x_counts():
    """With x_hat rounded, y and dy have the dtype of a wider weight: fewer rows of them are in flight."""
    x, dy = (Layout((2**20, 4096), (4096, 1), dtype) for dtype in (torch.bfloat16, torch.float32))
    weight, spec = Layout((4096,), (1,), torch.float32), Spec((4096,), 1e-6, x_hat_dtype=torch.bfloat16)
    key = config.Key("backward", 4096, itemsize=4, weight_itemsize=4)
    launches = plan.backward_launches(spec, config.SM_90, Needs(), dy, None, x, weight)
    assert launches.main.grid[0] == config.analytic(key, config.SM_90).programs


@pytest.fixture
def accesses(monkeypatch, launches):
    """Addresses that the interpreted kernels load from and store to; what is no tensor's is an error before it is touched."""
    if not launch.INTERPRETED:
        pytest.skip("a GPU does not tell")
    from triton.runtime.interpreter import InterpreterBuilder

    loads, stores = [], []

    def spied(original, addresses):
        def access(self, pointers, *rest):
            mask = next(each.data for each in rest if each is not None and each.data.dtype == bool)
            touched = pointers.data[np.broadcast_to(mask, pointers.data.shape)]
            storages = [tensor.untyped_storage() for tensor in launches[-1].pointers.values() if tensor is not None]
            inside = sum((touched >= s.data_ptr()) & (touched < s.data_ptr() + s.nbytes()) for s in storages)
            assert np.all(inside), "touches memory that is no tensor's"
            addresses.append(touched)
            return original(self, pointers, *rest)

        return access

    for name, addresses in (("create_masked_load", loads), ("create_masked_store", stores)):
        monkeypatch.setattr(InterpreterBuilder, name, spied(getattr(InterpreterBuilder, name), addresses))
    return loads, stores


def addresses_of(tensor: Tensor) -> np.ndarray:
    """Of all elements, each once, in order."""
    elements = offsets_of(tensor.shape, tensor.stride())
    return np.unique(tensor.data_ptr() + elements.numpy() * tensor.element_size())


@pytest.mark.parametrize("stand_in", [config.INTERPRETER, config.SM_80, config.SM_90, config.GFX942], ids=lambda stand_in: stand_in.name)
@pytest.mark.parametrize(("shape", "group_size"), [((37, 100), None), ((5, 3, 96), 32), ((3, max(BLOCKED)), None)], ids=str)
def test_touches_what_it_should(shape, group_size, stand_in, device, run_as, launches, accesses):
    """Loads stay inside the inputs, whatever lies between rows; each element of an output is stored once; rows are read once."""
    run_as(stand_in)
    n = shape[-1]
    x = draw((*shape[:-1], n + 7), torch.float32, device)[..., 3 : n + 3]
    weight, dy = draw((2 * n,), torch.float32, device)[::2], draw((*shape[:-1], n + 4), torch.float32, device)[..., :n]
    Drawn(Spec((n,), 1e-6, group_size), Inputs(x, weight), dy).run()

    pointers = {}
    for recorded in launches:
        pointers |= {name: pointer for name, pointer in recorded.pointers.items() if pointer is not None}
    written = [pointers[name] for name in ("Y", "RSTD", "C1", "DX", "DW_PARTIAL", "DW") if name in pointers]
    loads, stores = (np.concatenate(addresses) for addresses in accesses)
    assert np.array_equal(np.sort(stores), np.sort(np.concatenate([addresses_of(tensor) for tensor in written])))
    assert np.isin(loads, np.concatenate([addresses_of(tensor) for tensor in (x, weight, dy, *written)])).all()
    columns = group_size or n
    for tensor, directions in ((x, ("forward", "backward")), (dy, ("backward",))):
        _, times = np.unique(loads[np.isin(loads, addresses_of(tensor))], return_counts=True)
        assert set(times) == {sum(1 if block_n(direction, columns, stand_in) >= columns else 2 for direction in directions)}


def test_offsets_beyond_2_31(device, request):
    """Rows and elements of the weight that lie more than 2^31 elements apart, in memory that nobody touches in between."""
    if launch.INTERPRETED:
        request.getfixturevalue("accesses")  # an error rather than a crash
    n, row, column = 64, 2**30 + 2**20 + 1, 2**25 + 2**21 + 1  # odd: strides are counted in units of what all are divisible by
    elements = 2 * max(2 * row, (n - 1) * column + 1)
    if device.type == "cpu":
        base = torch.frombuffer(mmap.mmap(-1, 2 * elements), dtype=torch.float16)
    elif torch.cuda.mem_get_info(device)[0] > 3 * elements:
        base = torch.empty(elements, dtype=torch.float16, device=device)
    else:
        pytest.skip(f"needs {3 * elements} bytes")
    x, dy = base.as_strided((3, n), (row, 1)), base.as_strided((3, n), (row, 1), 128)
    weight = base.as_strided((n,), (column,), 256)
    for tensor in (x, dy, weight):
        tensor.copy_(draw(tensor.shape, torch.float16, device))
    Drawn(Spec((n,), 1e-6), Inputs(x, weight), dy).check()


def test_threads(device):
    """Two threads at once, and backward in another thread than forward, as autograd has it on a GPU."""
    problems = [Problem((199, n)).draw(device) for n in (64, 1000, 128, 768)]
    alone = [problem.run() for problem in problems]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            assert_same(list(pool.map(Drawn.run, problems)), alone)

        spec, (x, weight, *_), dy, _ = problems[0]
        x, weight = x.requires_grad_(), weight.requires_grad_()
        y = ours(spec)(x, weight)
        pool.submit(y.backward, dy).result()
    assert_same([y.detach(), x.grad, weight.grad], list(alone[0].present.values()))


class FakeKernel:
    """Of Triton's: kernel[grid](...) launches on the current device and gives what kernel[grid] launches again."""

    arg_names = ("X", "Y")

    def __init__(self):
        self.current, self.compiled, self.launched = 0, [], []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            device, addresses = self.current, [pointer.address for pointer in arguments]
            self.compiled.append((device, *(address % 16 == 0 for address in addresses)))
            return {grid: lambda *pointers, stream: self.launched.append((device, self.current, stream, *(p.address for p in pointers)))}

        return run


class FakePointer:
    def __init__(self, device: int, address: int):
        self.get_device, self.data_ptr, self.address = lambda: device, lambda: address, address


def test_kernels_are_compiled_once_a_device_and_alignment(monkeypatch):
    """GPUs of one model share what is prepared, but each has to load the kernel, and is launched on while it is the current one."""
    kernel = FakeKernel()

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            self.before, kernel.current = kernel.current, self.index

        def __exit__(self, *_):
            kernel.current = self.before

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: kernel.current, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 100 + device, raising=False)
    prepared = launch.Launch("forward", kernel, (1, 1, 1), config.Config(1, 64, 4))
    for _ in range(2):
        for device, *addresses in ((0, 64, 32), (1, 64, 32), (0, 72, 32), (0, 64, 40)):
            prepared(*(FakePointer(device, address) for address in addresses))
    assert kernel.compiled == [(0, True, True), (1, True, True), (0, False, True), (0, True, False)] and kernel.current == 0
    assert kernel.launched == [(0, 0, 100, 64, 32), (1, 1, 101, 64, 32), (0, 0, 100, 72, 32), (0, 0, 100, 64, 40)]
