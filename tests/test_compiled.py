"""Properties of compiled code that the interpreter cannot show: no dependence on the number of rows, no contraction to fma, no fp64."""

import itertools
import re
from collections import Counter

import pytest
import torch
from processes import compiled

from bench.audit.compile import TARGETS, compile_for
from bench.audit.record import launches
from bench.problem import Problem
from triton_rmsnorm import rms_norm
from triton_rmsnorm.reference import Spec
from triton_rmsnorm.runtime import plan
from triton_rmsnorm.runtime.launch import Recorded, pretend, recorded

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("compiled")]

# Several rows per tile, with one element of a row per thread; the same for an even length; one row per tile; rows in blocks of columns.
COLUMNS = (33, 256, 4096, 300_000)
DIRECTIONS = ("forward", "backward")
VARIANTS = ("plain", "residual", "gate", "gate_first")
FLOAT = r"\b((?:mul|add|sub|mad|fma)(?:\.rn)?|rsqrt)(?:\.approx)?(?:\.ftz)?\.f32\b"


def code_of(found: Recorded, target: str = "sm_90") -> str:
    launch = found.launch
    code = compile_for(launch.kernel, [*found.pointers.values(), *launch.arguments], launch.options, TARGETS[target].gpu).asm
    return code["ptx" if "ptx" in code else "amdgcn"]


def code_for_rows() -> dict[tuple, bool]:
    """Whether the code of every step is the same for 1 row, 16 and 17: 1 and multiples of 16 are what Triton specializes on."""

    def codes(*problem, target):
        return [code_of(found, target) for found in launches(Problem(*problem), TARGETS[target].device)]

    return {
        (target, direction, n): all(codes(1, n, direction, target=target) == codes(m, n, direction, target=target) for m in (16, 17))
        for (target, n), direction in itertools.product([*(("sm_90", n) for n in COLUMNS), ("gfx942", 33), ("gfx942", 300_000)], DIRECTIONS)
    }


def codes_of_views() -> int:
    """How many different sequences of floating-point instructions there are for a view whose sizes and strides grow with the batch.

    Triton specializes on integers in tuples that are divisible by 16, whatever it is told, so addresses may be calculated otherwise.
    """
    codes = set()
    for batch in (2, 5, 16, 17):
        x = torch.empty(batch, 7, 3, 128, device="meta")[:, :, 1].transpose(0, 1)
        with pretend(TARGETS["sm_90"].device, "meta"), recorded(run=False) as found:
            rms_norm(x, (128,))
        codes.add(tuple(re.findall(r"\S+\.f32\b", code_of(found[0]))))
    return len(codes)


def arithmetic() -> dict[tuple, Counter]:
    """How often each instruction of fp32 arithmetic occurs. Without a rounding (.rn), the assembler may contract it."""
    found = {}
    for direction, (variant, dtype) in itertools.product(DIRECTIONS, [*((variant, "fp32") for variant in VARIANTS), ("plain", "bf16")]):
        for launch in launches(Problem(64, 33, direction, variant, dtype, dtype), TARGETS["sm_90"].device):
            found[launch.step, variant, dtype] = Counter(re.findall(FLOAT, code_of(launch)))
    (launch,) = launches(Problem(64, 33, dtype="fp32", weight_dtype="fp32"), TARGETS["sm_90"].device)
    launch.launch.options["enable_fp_fusion"] = True
    found["contraction allowed"] = Counter(re.findall(FLOAT, code_of(launch)))
    return found


def fp64_instructions() -> set[str]:
    """The instructions in fp64 that are left in the forward for fp32 input."""
    (launch,) = launches(Problem(64, 4096, dtype="fp32", weight_dtype="fp32"), TARGETS["sm_90"].device)
    code = code_of(launch)
    assert "rsqrt.approx" in code
    return set(re.findall(r"\b[a-z0-9.]*[.]f64\b[a-z0-9.]*", code))


def scaled_subnormals() -> bool:
    """Whether the forward multiplies a mean square below the smallest normal number by 2^24: a GPU's rsqrt flushes it to 0."""
    (launch,) = launches(Problem(64, 4096, dtype="fp32", weight_dtype="fp32"), TARGETS["sm_90"].device)
    code = code_of(launch)
    smaller, scaled = re.search(r"setp\.lt\S*\.f32\s+\S+ \S+ 0f00800000;", code), re.search(r"mul\S*\.f32\s+\S+ \S+ 0f4B800000;", code)
    return smaller is not None and scaled is not None


OUTPUTS = {
    "plain": {},
    "offset": {"weight_offset": 1.0},
    "silu": {"activation": "silu"},
    "gelu": {"activation": "gelu"},
    "gelu_tanh first": {"activation": "gelu_tanh", "norm_before_gate": False},
}


def forwards_and_outputs() -> dict[str, dict[str, Counter]]:
    """The fp32 arithmetic of forwards and of the kernel that computes their outputs again, by step."""
    x, rstd = torch.empty(64, 4096, dtype=torch.bfloat16, device="meta"), torch.empty(64, 1, device="meta")
    found = {}
    for name, options in OUTPUTS.items():
        spec, gate = Spec((4096,), 1e-6)._replace(**options), x if "activation" in options else None
        with pretend(TARGETS["sm_90"].device, "meta"), recorded(run=False) as steps:
            plan.forward((x, x[0], None, gate), spec)
            plan.output(x, x[0], gate, rstd, spec, x.dtype)
        arithmetic = r"\b(?:mul|add|sub|fma|mad|ex2|div|rcp)\S*\.f32\b"
        found[name] = {one.step: Counter(re.findall(arithmetic, code_of(one))) for one in steps}
    return found


def test_code_does_not_depend_on_the_number_of_rows():
    assert [case for case, same in compiled(code_for_rows).items() if not same] == []


def test_arithmetic_does_not_depend_on_sizes_of_views():
    assert compiled(codes_of_views) == 1


def test_nothing_is_contracted():
    """Products and sums are fused where the kernels say so and nowhere else.

    Contraction would make results depend on what the compiler knows of the arguments. Where a thread holds one element of a row, it would
    also leave the lanes of a warp with different last bits of one sum, which they write to one address.
    """
    found = compiled(arithmetic)
    allowed = found.pop("contraction allowed")
    assert allowed.keys() & {"mul", "add", "fma.rn"}  # this is what it would look like
    for case, counts in found.items():
        assert counts.keys() <= {"mul.rn", "add.rn", "sub.rn", "fma.rn", "rsqrt"}, case
        newton = 2 * counts["rsqrt"]
        assert counts["fma.rn"] > newton if case[0] == "backward" else counts["fma.rn"] == newton, case


def test_eps_does_not_make_the_arithmetic_fp64():
    """eps reaches the kernel as fp64, as a float does that Inductor passes on; fp32 input is not normalized in fp64 for that."""
    found = compiled(fp64_instructions)
    assert "cvt.rn.f32.f64" in found and len(found - {"ld.param.f64", "mov.f64"}) == 1


def test_outputs_are_computed_again_as_in_the_forward():
    """Of the same instructions, without those for the mean: rounded one by one, so a compiler has no choice between bits."""
    for name, steps in compiled(forwards_and_outputs).items():
        assert steps["output"] <= steps["forward"], name
        assert steps["output"].total() and not steps["output"].keys() & {"mul.f32", "add.f32", "sub.f32", "fma.f32", "mad.f32"}, name


def test_subnormal_mean_squares_are_scaled():
    assert compiled(scaled_subnormals)
