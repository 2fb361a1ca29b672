"""The error budget: one definition for the self-check, the benchmarks, the tests and the notebooks.

Each element of an output or gradient may be off by twice the largest error of torch's own operations, before they round to half precision,
plus one unit in the last place (ulp) of its dtype at its magnitude. The exact result is computed in fp64, or in long doubles where a
tensor is fp64.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_rmsnorm import reference
from triton_rmsnorm.reference import BackwardInputs, Inputs, Spec, accumulation_dtype

if TYPE_CHECKING:
    import numpy as np

Norm = Callable[..., Any]  # norm(x, weight, residual, gate) returns y, or y and x + residual where there is a residual
ORDERS_OF_A_SUM = 4  # of rows, for dweight, and more where few columns show fewer of the possible errors


class Results(NamedTuple):
    """Outputs and gradients of one norm; None where there is none."""

    y: Tensor
    residual_out: Tensor | None = None
    dx: Tensor | None = None
    dweight: Tensor | None = None
    dresidual: Tensor | None = None
    dgate: Tensor | None = None

    @property
    def present(self) -> dict[str, Tensor]:
        return {name: result for name, result in self._asdict().items() if result is not None}


class Expected(NamedTuple):
    """The exact value of a result, and its error budget: allowed + ulps · ulp of each element."""

    value: Tensor  # fp64
    rest: Tensor | float = 0.0  # value + rest is exact, where fp64 is not exact enough
    allowed: float = 0.0
    ulps: float = 1.0


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Normal random numbers; in rows of a few columns none is near 0, so that the rounding of one row does not outweigh all others."""
    x = torch.randn(shape, dtype=torch.float64, device=device)
    return (x if shape[-1] > 8 else x + x.sign() / 2).to(dtype)


def run(norm: Norm, inputs: Inputs, dy: Tensor, dresidual_out: Tensor | None = None) -> Results:
    """The outputs of norm(x, weight, residual, gate), and by autograd the gradients of all of them that are there."""
    leaves = Inputs(*(None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs))  # type: ignore[arg-type]
    outputs = norm(*leaves)
    y, residual_out = outputs if isinstance(outputs, tuple) else (outputs, None)
    present = {f"d{name}": leaf for name, leaf in leaves._asdict().items() if leaf is not None}
    if residual_out is None:
        gradients = torch.autograd.grad(y, list(present.values()), dy)
        return Results(y.detach(), **dict(zip(present, gradients, strict=True)))
    gradients = torch.autograd.grad((y, residual_out), list(present.values()), (dy, dresidual_out))
    return Results(y.detach(), residual_out.detach(), **dict(zip(present, gradients, strict=True)))


def composed(spec: Spec) -> Norm:
    """The norm of torch's operations: its own operator where it has one for `spec`, else from `reference`."""

    def norm(x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None, gate: Tensor | None = None) -> Any:
        if residual is None and spec.is_plain:
            return F.rms_norm(x, spec.normalized_shape, weight, spec.eps)
        y, _, residual_out = reference.forward(Inputs(x, weight, residual, gate), spec)
        return y if residual_out is None else (y, residual_out)

    return norm


def expected(inputs: Inputs, dy: Tensor, spec: Spec, dresidual_out: Tensor | None = None, *, rounded: bool = False) -> dict[str, Expected]:
    """The exact results and their budgets, by the names of Results.

    With a residual, x + residual must be the sum rounded once, and everything else is judged as a function of that rounded sum.

    Args:
        rounded: judge by torch's operations in the dtypes of the inputs, and x + residual as any other result. This is the wider budget of
            libraries that round in other places.
    """
    x, weight, residual, gate = inputs
    acc = accumulation_dtype(x, residual, gate)
    if residual is None or rounded:
        truth = exact(inputs, dy, spec, dresidual_out)
        return allow(truth, torchs(inputs, dy, spec, dresidual_out, rounded=rounded))
    total = (x.to(acc) + residual.to(acc)).to(residual.dtype)
    given = Inputs(total, weight, torch.zeros_like(total, dtype=acc), gate)
    results = allow(exact(given, dy, spec, dresidual_out), torchs(given, dy, spec, dresidual_out))
    return results | {"residual_out": Expected(total.double(), ulps=0)}


def allow(truth: dict[str, Expected], others: list[Results]) -> dict[str, Expected]:
    """Allows twice the largest error of `others`."""

    def largest(name: str, want: Expected) -> float:
        errors = [_error(other.present[name], want) for other in others]
        return max(error.max().item() if error.numel() else 0.0 for error in errors)

    return {name: want._replace(allowed=2 * largest(name, want)) for name, want in truth.items()}


def parts_of_budget(results: Results, expected: dict[str, Expected]) -> dict[str, float]:
    """What part of its budget the worst element of each result takes: more than 1, or NaN, is wrong."""
    if results.present.keys() != expected.keys():
        raise AssertionError(f"got {', '.join(results.present)} where {', '.join(expected)} are expected")
    return {name: _parts(result, expected[name]).max().item() if result.numel() else 0.0 for name, result in results.present.items()}


def assert_within_budget(results: Results, expected: dict[str, Expected]) -> None:
    """Every element of every result is within its budget."""
    for name, part in parts_of_budget(results, expected).items():
        if not part <= 1:
            result, want = results.present[name], expected[name]
            at = int(_parts(result, want).nan_to_num(torch.inf).argmax())
            got, exact = result.flatten()[at].item(), want.value.flatten()[at].item()
            raise AssertionError(f"{name}, element {at} of {(*result.shape,)}, is {got} instead of {exact}: {part:.3g} of its error budget")


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The gap between neighbours of `dtype` at the magnitude of x, in fp64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.double().abs().clamp(info.smallest_normal)).exponent
    return torch.exp2((exponent - 1).double()) * info.eps


def exact(inputs: Inputs, dy: Tensor, spec: Spec, dresidual_out: Tensor | None = None) -> dict[str, Expected]:
    """The results of the formulas: in fp64, which does not know them better than fp64 itself, or then in long doubles.

    Roundings of x_hat and rstd, which only fp64 knows, are between dtypes that lie apart.
    """
    tensors = [tensor for tensor in (*inputs, dy, dresidual_out) if tensor is not None]
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return _exact_longdouble(inputs, dy, spec, dresidual_out)
    up = _cast(inputs, torch.float64)
    y, rstd, residual_out = reference.forward(up, spec)
    dresidual_out = None if dresidual_out is None else dresidual_out.double()
    assert rstd is not None
    u = up.x if residual_out is None else residual_out
    gradients = reference.backward(BackwardInputs(dy.double(), dresidual_out, u, up.weight, up.gate, rstd), spec)
    results = Results(y, residual_out, *gradients)
    if up.residual is not None:
        results = results._replace(dresidual=results.dx)
    return {name: Expected(result) for name, result in results.present.items()}


def torchs(inputs: Inputs, dy: Tensor, spec: Spec, dresidual_out: Tensor | None = None, *, rounded: bool = False) -> list[Results]:
    """The results of torch's operations, without or with (`rounded`) a last rounding; dweight also summed in other orders of rows."""
    acc = accumulation_dtype(inputs.x, inputs.residual, inputs.gate)
    up = _cast(inputs, acc)
    results = [
        run(composed(spec), inputs, dy, dresidual_out)
        if rounded
        else run(composed(spec), up, dy.to(acc), None if dresidual_out is None else dresidual_out.to(acc))
    ]
    weight = up.weight
    if weight is None:
        return results
    of_rows = (dy.to(acc) * reference.forward(up._replace(weight=None), spec).y).to(weight.dtype).reshape(-1, weight.numel())
    for _ in range(ORDERS_OF_A_SUM + 64 // max(1, weight.numel()) if of_rows.numel() < 1 << 22 else 1):
        of_rows = of_rows[torch.randperm(len(of_rows), device=of_rows.device)]
        by_row = torch.zeros_like(weight).flatten()
        for rows in of_rows.split(max(1, len(of_rows) // 512)):  # one after the other, in at most about 512 steps
            by_row = by_row + rows.sum(0)
        results += [results[0]._replace(dweight=dweight.reshape(weight.shape)) for dweight in (by_row, of_rows.sum(0))]
    return results


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    x, weight, residual, gate = inputs
    return Inputs(
        x.to(dtype),
        None if weight is None else weight.to(torch.promote_types(weight.dtype, dtype)),
        None if residual is None else residual.to(dtype),
        None if gate is None else gate.to(dtype),
    )


def _error(result: Tensor, want: Expected) -> Tensor:
    if result.shape != want.value.shape:
        raise AssertionError(f"a result has shape {(*result.shape,)} instead of {(*want.value.shape,)}")
    return (result.detach().double() - want.value - want.rest).abs()


def _parts(result: Tensor, want: Expected) -> Tensor:
    error = _error(result, want)
    return torch.where(error == 0, error, error / (want.allowed + want.ulps * ulp(want.value, result.dtype)))


def _exact_longdouble(inputs: Inputs, dy: Tensor, spec: Spec, dresidual_out: Tensor | None) -> dict[str, Expected]:
    """The closed form in 80-bit floats. It knows no roundings, also not of x + residual."""
    import numpy as np

    def rows(tensor: Tensor | None) -> Any:
        return None if tensor is None else longdouble(tensor).reshape(-1, spec.groups, spec.columns)

    x, weight, residual, gate, dy_rows, dr = (rows(tensor) for tensor in (*inputs, dy, dresidual_out))
    w = 1 if weight is None else weight + np.longdouble(spec.weight_offset)
    x = x if residual is None else x + residual
    g, slope = (1, 0) if gate is None else _activation_longdouble(gate, str(spec.activation))
    u, dproduct = (x, dy_rows * g) if spec.norm_before_gate else (x * g, dy_rows)
    rstd = 1 / np.sqrt((u * u).mean(-1, keepdims=True) + np.longdouble(spec.eps))
    x_hat = u * rstd
    wdy = w * dproduct
    du = (wdy - (x_hat * wdy).mean(-1, keepdims=True) * x_hat) * rstd + (0 if dr is None else dr)
    results = {"y": w * x_hat * g if spec.norm_before_gate else w * x_hat, "dx": du if spec.norm_before_gate else du * g}
    if weight is not None:
        results["dweight"] = (dproduct * x_hat).sum(0)
    if residual is not None:
        results |= {"residual_out": x, "dresidual": results["dx"]}
    if gate is not None:
        results["dgate"] = (dy_rows * w * x_hat if spec.norm_before_gate else du * x) * slope
    like: dict[str, Any] = dict.fromkeys(results, inputs.x) | {"dweight": inputs.weight}
    return {name: expect(result, like[name]) for name, result in results.items()}


def longdouble(x: Tensor) -> "np.ndarray":
    import numpy as np

    return x.detach().double().cpu().numpy().astype(np.longdouble)


def expect(exact: "np.ndarray", like: Tensor) -> Expected:
    """An exact result of long doubles, with the shape and device of `like`."""
    value = exact.astype("float64")
    rest = (exact - value).astype("float64")
    tensors = [torch.from_numpy(part).reshape(like.shape).to(like.device) for part in (value, rest)]
    return Expected(tensors[0], tensors[1])


def _activation_longdouble(z: "np.ndarray", activation: str) -> tuple["np.ndarray", "np.ndarray"]:
    """activation(z) and its derivative."""
    import numpy as np

    if activation in ("silu", "sigmoid"):
        s = 1 / (1 + np.exp(-z))
        return (s, s * (1 - s)) if activation == "sigmoid" else (z * s, s * (1 + z * (1 - s)))
    pi = np.longdouble("3.14159265358979323846264338327950288")
    if activation == "gelu":
        # The standard normal distribution's cdf is 1/2 + pdf · (z + z³/3 + z⁵/15 + ...), a series without cancellation.
        pdf = np.exp(-z * z / 2) / np.sqrt(2 * pi)
        term = total = z
        for n in range(3, 603, 2):
            term = term * z * z / n
            total = total + term
        cdf = 0.5 + pdf * total
        return z * cdf, cdf + z * pdf
    if activation == "gelu_tanh":
        scale = np.sqrt(2 / pi)
        tanh = np.tanh(scale * (z + np.longdouble("0.044715") * z**3))
        slope = scale * (1 + 3 * np.longdouble("0.044715") * z * z)
        return z * (1 + tanh) / 2, (1 + tanh) / 2 + z * (1 - tanh * tanh) * slope / 2
    if activation == "relu":
        return np.maximum(z, 0), (z > 0).astype(z.dtype)
    raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}")
