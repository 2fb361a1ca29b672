"""What all tests share: the interpreter where there is no GPU, memory that starts as NaN, a seed, and what is launched."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
os.environ["TRITON_RMSNORM_AUTOTUNE"] = "0"  # the tests of tuning switch it on
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # so that models compute the same bits twice

from triton_rmsnorm.runtime import autotune, config, launch, table

# torch.empty and its relatives are filled with NaN, so that output that no kernel wrote is noticed.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU if Triton interprets."""
    return torch.device("cpu" if launch.INTERPRETED else "cuda")


@pytest.fixture
def launches() -> Iterator[list[launch.Recorded]]:
    """The launches of a test, as they happen."""
    with launch.recorded() as recorded:
        yield recorded


@pytest.fixture
def group_of_one(tmp_path, monkeypatch, device) -> Iterator[DeviceMesh]:
    """The mesh of one process that is all of a group."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl", f"file://{tmp_path}/group", rank=0, world_size=1)
    yield dist.init_device_mesh(device.type, (1,))
    dist.destroy_process_group()


@pytest.fixture
def run_as() -> Iterator[Callable[[config.Device], None]]:
    """A function after whose call the interpreter runs the configurations of the given device; a cluster counts as one program."""
    if not launch.INTERPRETED:
        pytest.skip("a GPU runs its own configurations")
    with ExitStack() as stack:
        yield lambda stand_in: stack.enter_context(launch.pretend(stand_in))


@pytest.fixture
def tuned(monkeypatch, tmp_path) -> Iterator[None]:
    """Tuning is on, and nothing is known except what the test finds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(autotune.VARIABLE)
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "none")
    monkeypatch.setattr(table, "search", autotune.tune)
    monkeypatch.setattr(autotune, "_found", {})
    table.shipped.cache_clear()
    launch.forget()
    yield
    table.shipped.cache_clear()
    launch.forget()


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """The interpreter's own tiles are tall, to be quick with many rows."""
    if not launch.INTERPRETED:
        yield
        return
    with launch.pretend(config.SM_80):
        yield
