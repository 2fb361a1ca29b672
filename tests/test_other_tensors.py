"""Tensors that are not plain strided ones, or have not the data that they had: torch's result where it has one, else torch's error."""

import re
import warnings
from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from variants import FUNCTIONS, N, Variant, assert_same, every_function

from triton_rmsnorm import AddRMSNorm, RMSNorm, RMSNormGated, add_rms_norm, rms_norm, rms_norm_gated
from triton_rmsnorm.runtime import launch
from triton_rmsnorm.testing import draw

pytestmark = pytest.mark.usefixtures("small_tiles")


def jagged(device: torch.device, requires_grad: bool = False) -> Tensor:
    rows = [draw((length, N), torch.float32, device) for length in (3, 5)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=requires_grad)


def test_jagged_nested_tensors(device):
    """By torch's operator, forward and backward, through the function and the module."""
    x = jagged(device)
    results = []
    for norm in (RMSNorm(N, device=device), torch.nn.RMSNorm(N, device=device)):
        leaf = x.detach().requires_grad_()
        y = norm(leaf)
        y.values().mul(torch.linspace(-1, 2, N, device=device)).sum().backward()
        results.append((y.values(), leaf.grad.values(), norm.weight.grad))
    assert_same(*results)
    assert torch.equal(rms_norm(x, (N,)).values(), F.rms_norm(x, (N,)).values())


def test_errors_of_torchs_operator(monkeypatch):
    """They are not taken for errors of a layout where torch knows the layout."""
    monkeypatch.setattr(torch, "rms_norm", Mock(side_effect=RuntimeError("out of memory")))
    for x in (jagged(torch.device("cpu")), torch.ones(3, N, dtype=torch.complex64)):
        with pytest.raises(RuntimeError, match=r"^out of memory$"):
            rms_norm(x, (N,))


LAYOUTS = {
    "oneDNN": (Tensor.to_mkldnn, "torch._mkldnn"),
    "sparse_coo": (Tensor.to_sparse, "torch.sparse_coo"),
    "sparse_csr": (Tensor.to_sparse_csr, "torch.sparse_csr"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize(("to_layout", "name"), LAYOUTS.values(), ids=LAYOUTS)
def test_other_layouts(to_layout, name):
    """An error of torch's type that names the layout, for each of the tensors."""
    x, weight = torch.ones(3, N), torch.ones(N)
    with pytest.raises(RuntimeError) as theirs:
        F.rms_norm(to_layout(x), (N,))
    with pytest.raises(theirs.type, match=f"input must have layout .*, got {name}"):
        rms_norm(to_layout(x), (N,))
    calls = {
        "input": lambda other: add_rms_norm(other, x, (N,)),
        "residual": lambda other: add_rms_norm(x, other, (N,)),
        "gate": lambda other: rms_norm_gated(x, other, (N,)),
    }
    for argument, call in calls.items():
        with pytest.raises(NotImplementedError, match=f"{argument} must have layout torch.strided, got {name}"):
            call(to_layout(x))
    if name != "torch.sparse_csr":  # which has two dimensions
        with pytest.raises(NotImplementedError, match=f"weight must have layout torch.strided, got {name}"):
            rms_norm(x, (N,), to_layout(weight))


def test_options_are_not_for_jagged_or_complex_input(device):
    """Torch's operator has none of them, and would leave them out."""
    with pytest.raises((NotImplementedError, TypeError), match=r"layout|group_size"):
        rms_norm(jagged(device), (N,), group_size=2)
    with pytest.raises(NotImplementedError, match=r"input must be float16, bfloat16, float32 or float64, got torch.complex64"):
        rms_norm(torch.ones(3, N, dtype=torch.complex64, device=device), (N,), group_size=2)


def test_sparse_gradients(device):
    """An error, as torch has one."""
    x = draw((3, N), torch.float32, device).requires_grad_()
    dy = torch.ones_like(x).to_sparse()
    with pytest.raises(RuntimeError):
        F.rms_norm(x, (N,)).backward(dy)
    with pytest.raises(RuntimeError, match=r"gradients must have layout torch.strided, got torch.sparse_coo"):
        rms_norm(x, (N,)).backward(dy)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_subclasses_that_know_only_torchs_operators(device):
    x, mask = draw((3, N), torch.float32, device), torch.ones(3, N, dtype=torch.bool, device=device)
    masked = torch.masked.masked_tensor(x, mask)
    assert torch.equal(rms_norm(masked, (N,)).get_data(), F.rms_norm(masked, (N,)).get_data())


@pytest.mark.parametrize("at", ["first", "last", "all"])
@every_function
def test_tensors_from_inference_mode_feed_training(function: Variant, at, device):
    """As with torch.nn.RMSNorm: features that were made under inference_mode go through a norm whose weight is trained."""
    drawn = function.draw((3, 2, N), torch.float32, device)
    with torch.inference_mode():
        inference = [t.clone() for t in drawn]
    of_rows = [i for i, name in enumerate(function.arguments) if name != "weight"]
    replaced = {"first": of_rows[:1], "last": of_rows[-1:], "all": of_rows}[at]
    results = []
    for norm in (function.ours, function.theirs):
        tensors = [inference[i] if i in replaced else t.detach().requires_grad_() for i, t in enumerate(drawn)]
        outputs = [y for y in tree_leaves(norm(*tensors)) if y.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        results.append([t.grad for i, t in enumerate(tensors) if i not in replaced])
    torch.testing.assert_close(*results)


def test_tensors_that_outlive_torch_func(device):
    """torch.func leaves wrappers around what is kept beyond it: they are what they hold, with a gradient and without."""
    left = []
    torch.func.grad(lambda x: left.append(x * 2) or left[0].sum())(draw((3, N), torch.float32, device))
    for weight in (None, torch.ones(N, device=device, requires_grad=True)):
        assert torch.equal(rms_norm(left[0], (N,), weight), rms_norm(left[0].clone(), (N,), weight))
        with torch.no_grad():
            assert torch.equal(rms_norm(left[0], (N,), weight), rms_norm(left[0].clone(), (N,), weight))


def replace_data(weight: Tensor, size: int) -> None:
    weight.data = weight.new_ones(size)


FREED = {
    "data": replace_data,
    "storage": lambda weight, size: weight.untyped_storage().resize_(size * weight.element_size()),
}


@pytest.mark.parametrize("size", [0, 2])
@pytest.mark.parametrize("free", FREED.values(), ids=FREED)
@every_function
def test_weight_that_was_freed(function: Variant, free: Callable, size, device):
    """A weight without its data in the backward, as ZeRO-3 leaves it: an error that names both shapes, and nothing is read beyond it."""
    tensors = [t.requires_grad_() for t in function.draw((3, N), torch.float32, device)]
    outputs = tree_leaves(function.ours(*tensors))
    with torch.no_grad():
        free(tensors[1], size)
    with pytest.raises(RuntimeError) as error:
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert re.search(rf"weight must have .*\({N},\), got .*\({size},\)", str(error.value))


def test_gate_that_was_freed(device):
    x, weight, gate = (t.requires_grad_() for t in FUNCTIONS["gate"].draw((3, N), torch.float32, device))
    y = FUNCTIONS["gate"].ours(x, weight, gate)
    gate.data = gate.new_empty(0)
    with pytest.raises(RuntimeError, match=r"gate must have the same shape in backward as in forward, \(3, 6\), got \(0,\)"):
        y.sum().backward()


@pytest.mark.parametrize("module", [RMSNorm, AddRMSNorm, RMSNormGated])
def test_onnx_export(module, device, monkeypatch):
    """ONNX knows none of our operators: an exported program has torch's operations where torch.onnx.export is under way."""
    arguments = [draw((3, N), torch.float32, device) for _ in range(1 if module is RMSNorm else 2)]

    def operators() -> set[str]:
        program = torch.export.export(module(N, device=device), tuple(arguments), strict=False)
        return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}

    assert any("triton_rmsnorm" in name for name in operators())
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert not any("triton_rmsnorm" in name for name in operators())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("norm", [rms_norm, F.rms_norm], ids=["ours", "torch"])
def test_traced_sizes(norm, device):
    """torch.jit.trace makes tensors of sizes: they are a normalized_shape, and a trace warns of nothing."""
    x = draw((3, N), torch.float32, device)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(lambda x: norm(x, x.shape[-1:]), x)
    other = draw((5, N), torch.float32, device)
    assert torch.equal(traced(other), F.rms_norm(other, (N,)))


def test_in_place_of_torchs_function(device, monkeypatch):
    """A program may put ours in the place of torch's: what is left to torch does not come back to ours."""
    x = draw((3, N), torch.float32, device)
    expected = F.rms_norm(x, (N,))
    monkeypatch.setattr(F, "rms_norm", rms_norm)
    torch.testing.assert_close(F.rms_norm(x.to(torch.complex64), (N,)).real, expected)
    with launch.pretend(None):
        torch.testing.assert_close(torch.nn.RMSNorm(N, device=device)(x), expected)
