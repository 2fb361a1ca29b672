"""The norms of the tests: random tensors for any Spec, and the public functions with the same made of torch's own operations."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from triton_rmsnorm import add_rms_norm, rms_norm, rms_norm_gated
from triton_rmsnorm.reference import Inputs, Spec
from triton_rmsnorm.runtime import config, launch
from triton_rmsnorm.testing import Norm, Results, assert_within_budget, draw, expected, run


class Variant(NamedTuple):
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    theirs: Callable[..., Tensor | tuple[Tensor, ...]]
    arguments: tuple[str, ...] = ("x", "weight")
    ndim: int = 1  # of the weight

    @property
    def weight_at(self) -> int | None:
        return self.arguments.index("weight") if "weight" in self.arguments else None

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        return [draw(shape[-self.ndim :] if name == "weight" else shape, dtype, device) for name in self.arguments]

    def per_argument(self, of_rows: Any, of_weight: Any) -> tuple:
        """One value for the tensors of rows, another for the weight: the in_dims of a vmap, for example."""
        return tuple(of_weight if name == "weight" else of_rows for name in self.arguments)


N = 6


def torchs(x: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """F.rms_norm on the CPU: on GPUs torch has another operator, which lacks forward-mode AD and makes all of a row with inf NaN."""
    return F.rms_norm(x.cpu(), normalized_shape, None if weight is None else weight.cpu(), eps).to(x.device)


VARIANTS = {
    "plain": Variant(lambda x, w: rms_norm(x, (N,), w), lambda x, w: torchs(x, (N,), w)),
    "no_weight": Variant(lambda x: rms_norm(x, (N,)), lambda x: torchs(x, (N,)), ("x",)),
    "two_dims": Variant(lambda x, w: rms_norm(x, (3, N), w), lambda x, w: torchs(x, (3, N), w), ndim=2),
    "groups_and_offset": Variant(
        lambda x, w: rms_norm(x, (N,), w, 1e-3, group_size=2, weight_offset=1.0),
        lambda x, w: torchs(x.unflatten(-1, (3, 2)), (2,), eps=1e-3).flatten(-2) * (1 + w),
    ),
    "residual": Variant(
        lambda x, w, r: add_rms_norm(x, r, (N,), w), lambda x, w, r: (torchs(x + r, (N,), w), x + r), ("x", "weight", "residual")
    ),
    "gate": Variant(
        lambda x, w, z: rms_norm_gated(x, z, (N,), w, activation="sigmoid"),
        lambda x, w, z: torchs(x, (N,), w) * z.sigmoid(),
        ("x", "weight", "gate"),
    ),
    "gate_first": Variant(
        lambda x, w, z: rms_norm_gated(x, z, (N,), w, activation="gelu_tanh", norm_before_gate=False),
        lambda x, w, z: torchs(x * F.gelu(z, approximate="tanh"), (N,), w),
        ("x", "weight", "gate"),
    ),
}
# One for each of the three functions.
FUNCTIONS = {name: VARIANTS[name] for name in ("plain", "residual", "gate")}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


needs_gpu = pytest.mark.skipif(
    launch.INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU, and kernels that are not interpreted"
)


def ours(spec: Spec) -> Norm:
    """The public function that computes `spec`, as norm(x, weight, residual, gate)."""
    options = spec._asdict()
    shape, eps, gate_options = options.pop("normalized_shape"), options.pop("eps"), ("activation", "norm_before_gate")
    of_gate = {name: options.pop(name) for name in gate_options}

    def norm(x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None, gate: Tensor | None = None) -> Any:
        if residual is not None:
            return add_rms_norm(x, residual, shape, weight, eps, **options)
        if gate is not None:
            return rms_norm_gated(x, gate, shape, weight, eps, **of_gate, **options)
        return rms_norm(x, shape, weight, eps, **options)

    return norm


class Problem(NamedTuple):
    """The shape of x, the dtypes of the tensors that there are, and fields of the Spec."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    weight: torch.dtype | None = torch.float32
    residual: torch.dtype | None = None
    gate: torch.dtype | None = None
    normalized: int = 1  # dimensions
    fields: dict[str, Any] = {}  # noqa: RUF012

    @property
    def spec(self) -> Spec:
        eps = torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32).eps
        return Spec(self.shape[-self.normalized :], **{"eps": eps} | self.fields)

    def draw(self, device: torch.device | str) -> "Drawn":
        shapes = self.shape, self.spec.normalized_shape, *4 * [self.shape]
        dtypes = self.dtype, self.weight, self.residual, self.gate, self.dtype, self.residual
        *inputs, dy, dresidual_out = (draw(shape, dtype, device) if dtype else None for shape, dtype in zip(shapes, dtypes, strict=True))
        return Drawn(self.spec, Inputs(*inputs), dy, dresidual_out)


def _rows_of(tensors: Any, rows: slice) -> Any:
    """Inputs or results for some of the rows, with all of the weight."""
    return tensors._replace(**{name: t[rows] for name, t in tensors._asdict().items() if t is not None and "weight" not in name})


class Drawn(NamedTuple):
    """Tensors for one norm, and what is computed from them."""

    spec: Spec
    inputs: Inputs
    dy: Tensor
    dresidual_out: Tensor | None = None

    def rows(self, rows: slice) -> "Drawn":
        """The same with some of the rows."""
        dresidual_out = None if self.dresidual_out is None else self.dresidual_out[rows]
        return Drawn(self.spec, _rows_of(self.inputs, rows), self.dy[rows], dresidual_out)

    def run(self, norm: Norm | None = None) -> Results:
        return run(norm or ours(self.spec), self.inputs, self.dy, self.dresidual_out)

    def check(self, results: Results | None = None) -> None:
        """Outputs and gradients are within the budget, and have the dtypes and shapes of the inputs."""
        results = results or self.run()
        for name, tensor in self.inputs._asdict().items():
            if tensor is not None:
                gradient = results.present[f"d{name}"]
                assert (gradient.dtype, gradient.shape) == (tensor.dtype, tensor.shape)
        assert results.y.dtype == self.inputs.x.dtype
        assert_within_budget(results, expected(self.inputs, self.dy, self.spec, self.dresidual_out))

    def check_rows(self) -> None:
        """A row has the same bits alone, among a few, first or elsewhere; and all results have when they are computed again."""
        results = self.run()
        assert_same(self.run(), results)
        for rows in (slice(0, 1), slice(3, 4), slice(3, 40), slice(1, None), slice(-1, None)):
            some = self.rows(rows).run()
            assert_same(some._replace(dweight=None), _rows_of(results, rows)._replace(dweight=None))


def assert_same(ours: Any, theirs: Any) -> None:
    """Sequences or mappings of tensors are equal bit for bit, with None only where theirs have None."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def uneven(y: Tensor) -> Tensor:
    """A tensor like y, with elements that differ."""
    return torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape).cos()


def trained(function: Callable[..., Any], tensors: Iterable[Tensor]) -> list[Tensor]:
    """All outputs and gradients of function(*tensors), with an uneven gradient arriving."""
    tensors = leaves(tensors)
    outputs = tree_leaves(function(*tensors))
    torch.autograd.backward(outputs, [uneven(y) for y in outputs])
    return [*[y.detach() for y in outputs], *[t.grad for t in tensors]]


def scalar(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """A scalar of all outputs, each element with its own weight."""
    return lambda *arguments: sum((y * uneven(y)).sum() for y in tree_leaves(function(*arguments)))


def offsets_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The offset of every element."""
    offsets = torch.zeros(shape, dtype=torch.long)
    for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        offsets += (torch.arange(size) * stride).view(-1, *(1,) * (len(shape) - dim - 1))
    return offsets


def id_of(value: object) -> str | None:
    """A dtype without its module, for the names of tests."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def block_n(direction: str, n: int, device: config.Device) -> int:
    """Columns of a tile for rows of n columns in fp32."""
    return config.analytic(config.Key(direction, n, 4, 4), device).block_n


# The first N at which the interpreter's forward or backward processes rows in blocks.
BLOCKED = {
    next(2**k + 1 for k in range(20) if block_n(direction, 2**k + 1, config.INTERPRETER) <= 2**k) for direction in ("forward", "backward")
}
