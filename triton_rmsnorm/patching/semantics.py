"""The closed list of what a norm may compute: every combination of the knobs of `rms_norm` and `rms_norm_gated`.

With x_hat = x · rstd, rstd = (mean(x²) + eps)^(-1/2), all in float32, a norm is y = (weight_offset + weight) · x_hat. Norms differ in where
they round on the way.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from triton_rmsnorm import reference

HALF = (torch.float16, torch.bfloat16)
_ROUNDINGS = {None: "", "input": ".to(x)", "half weight": ".to(w if half)", "float32": ".to(float32)"}


@dataclass(frozen=True)
class Semantics:
    """What a norm computes, by mechanics."""

    scaled: bool = True  # there is a weight
    x_hat: str | None = None  # x_hat is rounded before the weight, and y not after it; to what: a key of _ROUNDINGS. None: only y is
    weight_offset: float = 0.0
    offset_in_weight_dtype: bool = False  # weight_offset + weight is rounded to the weight's dtype
    rstd_rounded: bool = False  # rstd is rounded to the input's dtype
    group_size: int | None = None
    activation: str | None = None  # this function of a second input, the gate, multiplies y, which then has the dtype of x
    norm_before_gate: bool = True  # False: it multiplies x instead, in float32

    def knobs(self, x: torch.dtype, weight: torch.dtype | None) -> dict:
        """The keyword arguments of `rms_norm`, or of `rms_norm_gated` with a gate, for an input and a weight of these dtypes."""
        x_hat_dtype = None
        if self.x_hat == "input":
            x_hat_dtype = x
        elif self.x_hat == "half weight" and weight in HALF:
            x_hat_dtype = weight
        elif self.x_hat is not None:
            x_hat_dtype = torch.float32
        return {
            "group_size": self.group_size,
            "weight_offset": 0.0 if self.offset_in_weight_dtype else self.weight_offset,
            "x_hat_dtype": x_hat_dtype,
            "rstd_dtype": x if self.rstd_rounded else None,
            **({"activation": self.activation, "norm_before_gate": self.norm_before_gate} if self.activation else {}),
        }

    def factor(self, weight: Tensor | None) -> Tensor | None:
        """The weight that goes with these knobs."""
        return self.weight_offset + weight if self.offset_in_weight_dtype and weight is not None else weight

    def in_float32(self) -> "Semantics":
        """The same formula without roundings, which are none where all is float32."""
        return replace(self, x_hat=None, offset_in_weight_dtype=False, rstd_rounded=False)

    def __str__(self) -> str:
        offset = f"({self.weight_offset:g} + w){'.to(w)' if self.offset_in_weight_dtype else ''}"
        factor = f"{offset if self.weight_offset else 'w'} · " if self.scaled else ""
        x_hat = ("x · rstd.to(x)" if self.rstd_rounded else "x_hat") + _ROUNDINGS[self.x_hat]
        groups = f", groups of {self.group_size}" if self.group_size else ""
        gate = f", {self.activation} gate {'after' if self.norm_before_gate else 'before'}" if self.activation else ""
        return factor + x_hat + groups + gate


def evaluate(
    semantics: Semantics, x: Tensor, weight: Tensor | None, eps: float | None, dims: int = 1, gate: Tensor | None = None
) -> Tensor:
    """y in plain torch; differentiable. eps None is float32's machine epsilon."""
    dtype = None if weight is None else weight.dtype
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    spec = reference.Spec(tuple(x.shape[-dims:]), eps, **semantics.knobs(x.dtype, dtype))
    return reference.forward(reference.Inputs(x, semantics.factor(weight), gate=gate), spec).y


def _closed_list() -> tuple[Semantics, ...]:
    found = [Semantics(False, x_hat, rstd_rounded=rstd) for x_hat in (None, "float32") for rstd in (False, True)]
    offsets = ((0.0, False), (1.0, False), (1.0, True))
    found += [Semantics(True, x_hat, *offset, rstd) for x_hat in _ROUNDINGS for offset in offsets for rstd in (False, True)]
    return tuple(found)


# Without groups and gates.
SEMANTICS = _closed_list()


def gated(semantics: Semantics) -> list[Semantics]:
    """`semantics` with each gate, before and after. Before an unrounded product, x_hat "float32" is no case of its own."""
    orders = (False,) if semantics.x_hat == "float32" else (False, True)
    return [replace(semantics, activation=name, norm_before_gate=order) for name in reference.ACTIVATIONS for order in orders]


@dataclass(frozen=True)
class Norm:
    """What is proved of a module: what it computes, and where it keeps what that takes."""

    semantics: Semantics
    weight: str | None  # name of the attribute
    eps: str | float  # name of the attribute, or the value
    dims: int = 1  # trailing dimensions of the input that are normalized
    autocasts: bool = False  # it calls torch's own rms_norm, which autocast casts for
