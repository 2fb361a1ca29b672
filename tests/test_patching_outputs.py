"""What a replaced norm returns beside its numbers: strides, dtypes under autocast, errors; and norms with their parts in other places."""

import copy

import pytest
import torch
from norms import COLUMNS, Layer, Norm, original_of, rstd
from torch import nn
from torch.nn import functional as F

from triton_rmsnorm import patch
from triton_rmsnorm.patching import replacement


class WithOffset(Norm):
    def forward(self, x):
        return (x.float() * rstd(x, self.eps) * (1 + self.weight.float())).type_as(x)


class Contiguous(Norm):
    def forward(self, x):
        return super().forward(x.reshape(-1, COLUMNS)).view(x.shape)


class OfTorch(Norm):
    def forward(self, x):
        return F.rms_norm(x, (COLUMNS,), self.weight, self.eps)


class Reversed(Norm):
    """Rows in an order that follows no rule."""

    def forward(self, x):
        y = super().forward(x)
        return y if x.is_contiguous() else torch.empty(y.shape[::-1], dtype=y.dtype).permute(*range(y.dim())[::-1]).copy_(y)


LAYOUTS = {
    "transposed": lambda: torch.randn(2, 3, 4, COLUMNS).transpose(1, 2),
    "batch of 1": lambda: torch.randn(1, 3, 4, COLUMNS).transpose(1, 2),
    "columns apart": lambda: torch.randn(2, COLUMNS, 3).transpose(1, 2),
    "channels": lambda: torch.randn(2, COLUMNS, 3, 5).permute(0, 2, 3, 1),
    "slice": lambda: torch.randn(2, 3, 2 * COLUMNS)[..., :COLUMNS],
    "transposed slice": lambda: torch.randn(2, 3, 4, 2 * COLUMNS)[..., :COLUMNS].transpose(1, 2),
    "every second row": lambda: torch.randn(2, 6, COLUMNS)[:, ::2],
    "expanded": lambda: torch.randn(3, 1, COLUMNS).expand(3, 4, COLUMNS),
    "expanded columns": lambda: torch.randn(2, 3, 1).expand(2, 3, COLUMNS),
    "channels_last": lambda: torch.randn(2, 3, 5, COLUMNS).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 3, 2, 5, COLUMNS).to(memory_format=torch.channels_last_3d),
    "permuted": lambda: torch.randn(2, 3, 4, 5, COLUMNS).permute(3, 1, 0, 2, 4),
    "contiguous": lambda: torch.randn(2, 3, COLUMNS),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cls", [Norm, WithOffset, Contiguous, OfTorch, Reversed])
def test_strides(cls, layout, device):
    """Output and gradients are where the original's are in memory, so that `view` works or fails on them as it did."""
    norm, x = cls().to(device), LAYOUTS[layout]().to(device)
    assert patch(norm).replaced == 1
    results = []
    for one in (norm, original_of(norm)):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = one(x)
        (one(leaf) * torch.linspace(-1, 2, COLUMNS, device=device)).sum().backward()
        results.append((y.detach(), y.stride(), leaf.grad))
    (y, strides, dx), (expected, expected_strides, expected_dx) = results
    assert strides == expected_strides
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-4, atol=1e-5)
    assert dx.stride() == expected_dx.stride()


def test_the_kernels_read_transposed_rows(device, launches):
    """A transposed output costs no copy."""
    norm = Norm().to(device)
    patch(norm)
    x = torch.randn(2, 3, 4, COLUMNS, device=device).transpose(1, 2)
    y = norm(x)
    (launch,) = launches
    assert launch.pointers["X"].data_ptr() == x.data_ptr() and launch.pointers["Y"].data_ptr() == y.data_ptr()


# --- autocast ---


class Asks(Norm):
    def forward(self, x):
        weight = self.weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, (COLUMNS,), weight, self.eps)


class WeightAfter(Norm):
    def forward(self, x):
        return F.rms_norm(x, (COLUMNS,), None, self.eps) * self.weight


class ByProduct(Norm):
    """Under autocast its sum of squares is in half precision."""

    def forward(self, x):
        square = torch.einsum("...i,...i->...", x.float(), x.float())[..., None]
        return (self.weight * x.float() * torch.rsqrt(square / COLUMNS + self.eps)).to(x.dtype)


class Decorated(Norm):
    forward = torch.autocast("cpu", enabled=False)(OfTorch.forward)


class Function(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, (COLUMNS,), weight, eps)

    @staticmethod
    def backward(ctx, dy):
        inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            return *torch.autograd.grad(F.rms_norm(inputs[0], (COLUMNS,), inputs[1], ctx.eps), inputs, dy), None


class CastingFunction(Norm):
    def forward(self, x):
        return Function.apply(x, self.weight, self.eps)


AUTOCAST = {Norm: "unaffected", OfTorch: "rms_norm"}
AUTOCAST |= dict.fromkeys((Asks, WeightAfter, ByProduct, Decorated, CastingFunction), "other")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("cls", AUTOCAST)
def test_autocast(cls, dtype, device):
    """What a GPU's autocast would change is found on the CPU, by the lists of operators that it casts for."""
    norm, x = cls().to(device, dtype), torch.randn(4, COLUMNS, device=device, dtype=dtype)
    assert patch(norm).replaced == 1
    assert type(norm)._triton_rmsnorm.proof.autocast == AUTOCAST[cls]
    for enabled in (True, False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            torch.testing.assert_close(norm(x), original_of(norm)(x))


def test_autocast_is_off_inside(monkeypatch, device):
    """Where it would change nothing of the original's result: on a GPU, rms_norm itself follows autocast."""
    norm, enabled = Norm().to(device), []
    assert patch(norm).replaced == 1
    monkeypatch.setattr(replacement, "rms_norm", lambda *_, **__: enabled.append(torch.is_autocast_enabled(device.type)))
    with torch.autocast(device.type, torch.bfloat16):
        norm(torch.randn(4, COLUMNS, device=device))
    assert enabled == [False]


def test_fused_under_autocast(device, launches):
    layer, x = Layer().to(device), torch.randn(2, COLUMNS, device=device)
    original = copy.deepcopy(layer)
    assert patch(layer, fuse_residual=True).fused == 1
    with torch.autocast(device.type, torch.bfloat16):
        torch.testing.assert_close(layer(x), original(x), rtol=1e-2, atol=1e-2)
        assert layer(x).dtype == original(x).dtype


# --- parts in other places ---


class Broadcast(Norm):
    def __init__(self, ones):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(*(1,) * ones, COLUMNS))


@pytest.mark.parametrize("ones", [1, 2, 3])
def test_weights_with_leading_ones(ones, device, launches):
    norm = Broadcast(ones).to(device)
    assert patch(norm).replaced == 1
    for outer in ((), (5,), (2, 3), (2, 1, 3), (2, 2, 2, 2)):
        launches.clear()
        x = torch.randn(*outer, COLUMNS, device=device)
        torch.testing.assert_close(norm(x), original_of(norm)(x))
        assert len(launches) == (len(outer) >= ones)  # of input with fewer dimensions the original makes an output with more
    norm(torch.randn(2, 1, 3, COLUMNS, device=device)).sum().backward()
    assert norm.weight.grad.shape == norm.weight.shape


class EpsilonIsABuffer(Norm):
    def __init__(self, shape=()):
        super().__init__()
        del self.eps
        self.register_buffer("eps", torch.full(shape, 1e-6))


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_epsilon_in_a_buffer(shape, device, launches):
    """It is followed: filled, replaced, under inference_mode; compiled code runs the original."""
    norm, x = EpsilonIsABuffer(shape).to(device), torch.randn(3, COLUMNS, device=device)
    assert patch(norm).replaced == 1

    def fill():
        norm.eps.fill_(0.3)

    def replace():
        norm.eps = torch.full(shape, 2.0, device=device)

    for number, change in enumerate((lambda: None, fill, replace), 1):
        change()
        torch.testing.assert_close(norm(x), original_of(norm)(x))
        with torch.inference_mode():
            torch.testing.assert_close(norm(x), original_of(norm)(x))
        assert len(launches) == 2 * number
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), original_of(norm)(x))
    torch._dynamo.reset()
    assert patch(EpsilonIsABuffer(shape).to("meta")).replaced == 1


class ThreeDimensions(Norm):
    def forward(self, x):
        batch, length, columns = x.shape
        return super().forward(x).view(batch, length, columns)


class OthersUnchanged(Norm):
    """Of input with another number of dimensions it is another one."""

    def forward(self, x):
        return super().forward(x) if x.dim() == 3 else x


CALLS = [
    (nn.RMSNorm(COLUMNS), [(2, COLUMNS // 2), (), (1,)]),
    (nn.RMSNorm(COLUMNS, elementwise_affine=False), [(2, COLUMNS // 2), ()]),
    (nn.RMSNorm((2, COLUMNS)), [(2, COLUMNS // 2), (COLUMNS,), (3, COLUMNS)]),
    (ThreeDimensions(), [(COLUMNS,), (2, COLUMNS), (2, 3, 4, COLUMNS), (2, 2, 2, 2, COLUMNS)]),
]


@pytest.mark.parametrize(("norm", "shapes"), CALLS, ids=lambda value: str(value) if isinstance(value, nn.Module) else "")
def test_input_that_the_original_refuses(norm, shapes, device, launches):
    norm = copy.deepcopy(norm).to(device)
    assert patch(norm).replaced == 1
    norm(torch.randn(4, 2, COLUMNS, device=device))
    assert len(launches) == 1
    for x in (*(torch.randn(shape, device=device) for shape in shapes), torch.randn(3, COLUMNS).to_mkldnn()):
        with pytest.raises((RuntimeError, ValueError)) as wanted:
            original_of(norm)(x)
        with pytest.raises(wanted.type) as raised:
            norm(x)
        assert str(raised.value) == str(wanted.value)
    assert patch(OthersUnchanged()).replaced == 0


def test_torch_jit(device, launches):
    """Traced and scripted, a patched norm is what it was before."""
    for norm in (Norm(), nn.RMSNorm(COLUMNS)):
        norm, x = norm.to(device), torch.randn(3, COLUMNS, device=device)
        patch(norm)
        expected = original_of(norm)(x)
        modules = [torch.jit.trace(norm, x), torch.jit.script(nn.Sequential(norm))]
        launches.clear()  # torch.jit.trace also calls the norm itself
        for module in modules:
            torch.testing.assert_close(module(x), expected)
        assert not launches
