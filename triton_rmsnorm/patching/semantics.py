"""The closed list of what a norm may compute: every combination of the options of `rms_norm` and `rms_norm_gated`.

With x_hat = x · rstd and rstd = (mean(x²) + eps)^(-1/2), computed in float32, a norm is y = (weight_offset + weight) · x_hat. Norms differ
in where they round on the way:

    w · x_hat                    y alone is rounded: OLMo, gpt-oss
    w · x_hat.to(x)              x_hat is rounded to the dtype of the input before it is scaled: Llama and most others
    w · x_hat.to(w if half)      x_hat is rounded to the dtype of the weight if that is fp16 or bf16: T5
    (1 + w) · x_hat              the weight is stored as the difference from 1: Gemma
    x · rstd.to(x)               rstd is rounded before it multiplies x
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from triton_rmsnorm import reference
from triton_rmsnorm.patching.reads import Reads

HALF = (torch.float16, torch.bfloat16)
_ROUNDINGS = {None: "", "input": ".to(x)", "half weight": ".to(w if half)", "float32": ".to(float32)"}


@dataclass(frozen=True)
class Semantics:
    """What a norm computes, by mechanics.

    Args:
        scaled: there is a weight.
        x_hat_rounding: the dtype that x_hat is rounded to before it is multiplied by the weight: "input", "half weight" (the weight's, if
            that is fp16 or bf16) or "float32". None: y is rounded instead, to the dtype of the input.
        weight_offset: added to the weight.
        offset_in_weight_dtype: the sum of both is rounded to the dtype of the weight.
        rstd_rounded: rstd is rounded to the dtype of the input.
        group_size: columns that are normalized together; None: all.
        activation: this function of a second input, the gate, multiplies y, which then has the dtype of x.
        norm_before_gate: False: it multiplies x instead, in float32.
    """

    scaled: bool = True
    x_hat_rounding: str | None = None
    weight_offset: float = 0.0
    offset_in_weight_dtype: bool = False
    rstd_rounded: bool = False
    group_size: int | None = None
    activation: str | None = None
    norm_before_gate: bool = True

    def options(self, x: torch.dtype, weight: torch.dtype | None) -> dict:
        """The keyword arguments of `rms_norm`, or of `rms_norm_gated` with a gate, for an input and a weight of these dtypes."""
        x_hat_dtype = None
        if self.x_hat_rounding == "input":
            x_hat_dtype = x
        elif self.x_hat_rounding == "half weight" and weight in HALF:
            x_hat_dtype = weight
        elif self.x_hat_rounding is not None:
            x_hat_dtype = torch.float32
        return {
            "group_size": self.group_size,
            "weight_offset": 0.0 if self.offset_in_weight_dtype else self.weight_offset,
            "x_hat_dtype": x_hat_dtype,
            "rstd_dtype": x if self.rstd_rounded else None,
            **({"activation": self.activation, "norm_before_gate": self.norm_before_gate} if self.activation else {}),
        }

    def factor(self, weight: Tensor | None) -> Tensor | None:
        """The weight that goes with these options."""
        return self.weight_offset + weight if self.offset_in_weight_dtype and weight is not None else weight

    def in_float32(self) -> "Semantics":
        """The same formula without roundings, which do nothing where everything is float32."""
        return replace(self, x_hat_rounding=None, offset_in_weight_dtype=False, rstd_rounded=False)

    def __str__(self) -> str:
        offset = f"({self.weight_offset:g} + w){'.to(w)' if self.offset_in_weight_dtype else ''}"
        factor = f"{offset if self.weight_offset else 'w'} · " if self.scaled else ""
        x_hat = ("x · rstd.to(x)" if self.rstd_rounded else "x_hat") + _ROUNDINGS[self.x_hat_rounding]
        groups = f", groups of {self.group_size}" if self.group_size else ""
        gate = f", {self.activation} gate {'after' if self.norm_before_gate else 'before'}" if self.activation else ""
        return factor + x_hat + groups + gate


def evaluate(
    semantics: Semantics, x: Tensor, weight: Tensor | None, eps: float | None, dims: int = 1, gate: Tensor | None = None
) -> Tensor:
    """y in plain torch; differentiable. eps None is float32's machine epsilon."""
    dtype = None if weight is None else weight.dtype
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    spec = reference.Spec(tuple(x.shape[-dims:]), eps, **semantics.options(x.dtype, dtype))
    return reference.forward(reference.Inputs(x, semantics.factor(weight), gate=gate), spec).y


_OFFSETS = ((0.0, False), (1.0, False), (1.0, True))
# Without groups and gates.
SEMANTICS = (
    *(Semantics(False, rounding, rstd_rounded=rstd) for rounding in (None, "float32") for rstd in (False, True)),
    *(Semantics(True, rounding, *offset, rstd) for rounding in _ROUNDINGS for offset in _OFFSETS for rstd in (False, True)),
)


def gated(semantics: Semantics) -> list[Semantics]:
    """`semantics` with each gate, before and after. With a gate after the norm, rounding x_hat to float32 changes nothing."""
    orders = (False,) if semantics.x_hat_rounding == "float32" else (False, True)
    return [replace(semantics, activation=name, norm_before_gate=order) for name in reference.ACTIVATIONS for order in orders]


@dataclass(frozen=True)
class Norm:
    """What is proved of a module, and which calls the proof covers.

    Args:
        semantics: what it computes.
        weight: the name of the attribute; None: it has no weight that is used.
        eps: the name of the attribute, with dots if it belongs to an object that is one; or the value.
        default_eps: the attribute was None, for which it takes float32's machine epsilon.
        dims: trailing dimensions of the input that are normalized.
        shape: their sizes, if it takes no others or computes something else for others.
        outer_dims: how many other dimensions the input may have; None: any number.
        strides: those of its output, of input that is not contiguous: of an elementwise operation on "input", those of torch's
            "rms_norm", or "contiguous". None: it follows no such rule.
        autocast: under autocast it computes the same ("unaffected"), what torch's "rms_norm" does, or something else ("other").
        reads: what else its forward may read.
    """

    semantics: Semantics
    weight: str | None
    eps: str | float
    default_eps: bool = False
    dims: int = 1
    shape: tuple[int, ...] | None = None
    outer_dims: tuple[int, ...] | None = None
    strides: Literal["input", "rms_norm", "contiguous"] | None = "contiguous"
    autocast: Literal["unaffected", "rms_norm", "other"] = "unaffected"
    reads: Reads = field(default_factory=Reads)

    def __str__(self) -> str:
        return str(self.semantics)
