"""The subclass that takes the place of a proved norm's class: its forward calls our functions where the proof covers the call."""

import functools
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.weak import WeakTensorKeyDictionary

from triton_rmsnorm.functional import add_rms_norm, rms_norm, rms_norm_gated
from triton_rmsnorm.patching.reads import INTERNAL, Path, Reads, at, bases_of, is_plain, reads, same
from triton_rmsnorm.patching.semantics import Norm
from triton_rmsnorm.patching.subclass import Mark, assign, code_of, derived, mark_of, marks_of, own_mark, proof_of

PROVED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def replacement(original: type[nn.Module], norm: Norm) -> type[nn.Module]:
    """The subclass of `original` that computes `norm`.

    Raises:
        LeftAloneError: the class of the original does not allow this.
    """

    def holds(module: nn.Module) -> bool:
        found = reads(module)
        return found is not None and found.without(norm.eps) == norm.reads

    # Code that reads class names, such as an initialization of weights, finds the original's.
    name = f"Triton{original.__name__}"
    return derived(original, norm, name, _forward, replacement, _watching(original, norm), holds)


def replaced_forward(original: type[nn.Module], norm: Norm) -> Callable:
    """A forward that computes `norm` for modules that keep the class `original`. That attributes are set is not noticed.

    Raises:
        LeftAloneError: the class of the original does not allow a replacement.
    """
    mark = mark_of(replacement(original, norm))
    assert mark is not None
    return _forward(mark, original)


def is_replacement(cls: type) -> bool:
    """Whether we made this class, for a norm."""
    return isinstance(proof_of(cls), Norm)


def add_and_normalize(x: Tensor, residual: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """module(x + residual) and x + residual; fused where `module` is a replacement whose call nothing else watches or changes."""
    mark = getattr(type(module), "_triton_rmsnorm", None)
    if mark is not None and type(module) is mark.cls and _alike(x, residual) and not _watched(module):
        norm = mark.proof
        weight = None if norm.weight is None else getattr(module, norm.weight)
        if _in_force(mark, module, mark.cls) and _covers(module, norm, x, weight, None) and _autocast(norm, x) != "rms_norm":
            return _compute(module, norm, x, weight, None, residual)
    total = x + residual
    return module(total), total


def _watched(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(len(one) > 0 for one in hooks) or "forward" in module.__dict__ or _has_any_global_hook()


def _calls_watched(module: nn.Module) -> bool:
    """Whether a call of a submodule does more than its class's forward."""
    return any(one is not None and (_watched(one) or _calls_watched(one)) for one in module._modules.values())


def _alike(x: Any, residual: Any) -> bool:
    """Whether the sum has this dtype, shape and layout as well."""
    if not isinstance(x, Tensor) or not isinstance(residual, Tensor):
        return False
    alike = x.dtype == residual.dtype and x.shape == residual.shape and x.device == residual.device
    return alike and _row_major(x) and _row_major(residual)


def _forward(mark: Mark, cls: type[nn.Module] | None = None) -> Callable:
    """A forward with the signature of the original's, which still runs in cases for which nothing is proved.

    Args:
        mark: of the replacement.
        cls: the class of the modules that it is for; None: the replacement.
    """
    original, norm = mark.original, mark.proof
    found = ((holder, path, _function_at(holder, path)) for holder, path in _places(original, norm.reads))
    mark.functions = tuple((*place, dict(one.items()) if isinstance(one, dict) else one, code_of(one)) for *place, one in found)
    first, *rest = list(inspect.signature(mark.forward).parameters)[1:]
    gated = norm.semantics.activation is not None

    def call(self: nn.Module, x: Any, others: tuple, named: dict) -> Any:
        gate = None
        if gated:
            gate = others[0] if others else named.get(rest[0])
        if len(others) + len(named) == gated and _in_force(mark, self, cls or mark.cls):
            weight = None if norm.weight is None else getattr(self, norm.weight)
            if _covers(self, norm, x, weight, gate):
                return _compute(self, norm, x, weight, gate)
        return original.forward(self, x, *others, **named)

    def forward(self, _x, *_others, **_named):
        return call(self, _x, _others, _named)

    # The first argument keeps its name, by which callers may pass it. The globals are the original's, where torch.jit.script looks for
    # the names in the original's source.
    code = forward.__code__.replace(co_varnames=("self", first, "_others", "_named"))
    space = getattr(mark.forward, "__globals__", globals())
    return functools.wraps(mark.forward)(types.FunctionType(code, space, "forward", None, forward.__closure__))


def _in_force(mark: Mark, module: nn.Module, cls: type[nn.Module] | None) -> bool:
    """Whether the module still has the class, and nothing has changed that can be noticed at a call; the rest: `_watching`."""
    if type(module) is not cls and cls not in type(module).__mro__:  # something has kept our forward beyond unpatch
        return False
    if not mark.is_current() or (module._modules and _calls_watched(module)):
        return False
    for holder, path, function, code in mark.functions:
        found = _function_at(holder, path)
        if code_of(found) is not code or (found is not function and (type(function) is not dict or found != function)):
            return False
    return not mark.proof.reads.values or mark.proof.reads.hold(module)


def _places(original: type[nn.Module], found: Reads) -> Iterator[tuple[Any, Path]]:
    """Where a forward may look up functions and classes: in its classes, in each that super() may lead to, and among globals."""
    bases = bases_of(original)
    for name in sorted(found.names):
        having = [number for number, base in enumerate(bases, 1) if isinstance(vars(base).get(name), _METHODS)]
        yield from ((base, (name,)) for base in bases[: max(having, default=0)])
    yield from ((sys.modules[root], path) for root, path in found.functions)


_METHODS = (types.FunctionType, staticmethod, classmethod, property, functools.cached_property)


def _function_at(holder: Any, path: Path) -> Any:
    """What is there: of methods and properties their function."""
    function = at(holder, path)
    if isinstance(function, property):
        return function.fget
    return function.__func__ if isinstance(function, types.MethodType) else function


def _covers(module: nn.Module, norm: Norm, x: Any, weight: Tensor | None, gate: Any) -> bool:
    """Whether the proof covers a call with these tensors."""
    if not isinstance(x, Tensor) or x.dtype not in PROVED_DTYPES or x.dim() < norm.dims or x.layout is not torch.strided:
        return False
    shape = x.shape[x.dim() - norm.dims :]
    if norm.shape is not None and shape != norm.shape:
        return False
    if norm.outer_dims is not None and x.dim() - norm.dims not in norm.outer_dims:
        return False
    if norm.weight is not None and (weight is None or weight.dtype not in PROVED_DTYPES or not _fits(weight, shape, x.dim())):
        return False
    if norm.semantics.activation is not None:
        if not isinstance(gate, Tensor) or gate.shape != x.shape or gate.dtype not in PROVED_DTYPES:
            return False
        if not (_row_major(x) and _row_major(gate)):
            return False
    if norm.semantics.group_size is not None and x.shape[-1] % norm.semantics.group_size != 0:
        return False
    if norm.strides is None and not x.is_contiguous():
        return False
    if torch._C._get_tracing_state() is not None or _autocast(norm, x) == "other":
        return False
    eps = _epsilon(module, norm)
    if torch.compiler.is_compiling() and (norm.reads.compiling or isinstance(eps, Tensor)):
        return False
    if isinstance(eps, Tensor):
        return eps.numel() == 1 and not eps.requires_grad and eps.dtype in PROVED_DTYPES
    return isinstance(eps, (float, int)) or (eps is None and norm.default_eps)


def _fits(weight: Tensor, shape: torch.Size, dims: int) -> bool:
    """Whether a weight is one of rows of this shape, for input of so many dimensions; it may have leading dimensions of size 1."""
    if weight.shape == shape:
        return True
    extra = weight.dim() - len(shape)
    return 0 < extra <= dims - len(shape) and weight.shape == (1,) * extra + shape


def _row_major(x: Tensor) -> bool:
    """Whether elementwise operations on x give a contiguous tensor."""
    if x.is_contiguous():
        return True
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1]
    return all(one >= other for one, other in itertools.pairwise(strides))


def _autocast(norm: Norm, x: Tensor) -> str:
    """What autocast makes of the norm on the device of x, as in Norm.autocast; "" without autocast."""
    if not torch._C._is_any_autocast_enabled():
        return ""
    return norm.autocast if torch.is_autocast_enabled(x.device.type) else ""


def _compute(module: nn.Module, norm: Norm, x: Tensor, weight: Tensor | None, gate: Tensor | None, residual: Tensor | None = None) -> Any:
    """y; with a residual y and the sum."""
    if _autocast(norm, x) == "unaffected":
        with torch.autocast(x.device.type, enabled=False):
            return _compute(module, norm, x, weight, gate, residual)
    shape = x.shape[x.dim() - norm.dims :]
    options = norm.semantics.options(x.dtype, None if weight is None else weight.dtype)
    factor = norm.semantics.factor(weight if weight is None or weight.shape == shape else weight.reshape(shape))
    eps = _epsilon(module, norm)
    if isinstance(eps, Tensor):
        eps = _value(eps)
    if residual is not None:
        return add_rms_norm(x, residual, shape, factor, eps, **options)
    if gate is not None:
        return rms_norm_gated(x, gate, shape, factor, eps, **options)
    if norm.strides == "rms_norm" or x.is_contiguous():
        return rms_norm(x, shape, factor, eps, **options)
    if norm.strides == "contiguous":
        return rms_norm(x, shape, factor, eps, **options).contiguous()
    order = _memory_order(torch.empty_like(x, device="meta").stride())
    inverse = sorted(range(x.dim()), key=lambda dim: order[dim])
    if order[-norm.dims :] == list(range(x.dim()))[-norm.dims :]:
        return rms_norm(x.permute(order), shape, factor, eps, **options).permute(inverse)
    return rms_norm(x, shape, factor, eps, **options).permute(order).contiguous().permute(inverse)


def _memory_order(strides: tuple[int, ...]) -> list[int]:
    """Dimensions from the outermost to the innermost in memory. The strides may be symbolic, which `sorted` does not take."""
    order: list[int] = []
    for dim, stride in enumerate(strides):
        place = len(order)
        while place > 0 and strides[order[place - 1]] < stride:
            place -= 1
        order.insert(place, dim)
    return order


def _epsilon(module: nn.Module, norm: Norm) -> Any:
    if not isinstance(norm.eps, str):
        return norm.eps
    value: Any = module
    for name in norm.eps.split("."):
        value = getattr(value, name)
    return value


_VALUES = WeakTensorKeyDictionary()


def _value(eps: Tensor) -> float:
    """The number in a tensor, which is fetched from a device once, until the tensor changes."""
    if eps.is_inference():
        return eps.item()
    version, value = _VALUES.get(eps, (None, 0.0))
    if version != eps._version:
        _VALUES[eps] = version, value = eps._version, eps.item()
    return value


def _watching(original: type[nn.Module], norm: Norm) -> dict[str, Callable]:
    """Methods that set attributes, after which the original's forward runs if it may read what has been set.

    Its weight and its epsilon are looked up at each call, and both training and evaluation are proved.
    """
    followed = {"training", "__class__", norm.weight, norm.eps}
    methods = ("__setattr__", "__delattr__", "register_buffer", "register_parameter", "add_module")
    return {name: _noticed(getattr(original, name), original, norm, followed) for name in methods}


def _noticed(method: Callable, original: type[nn.Module], norm: Norm, followed: set) -> Callable:
    @functools.wraps(method)
    def noticing(self: nn.Module, name: str, *args: Any, **named: Any) -> None:
        relevant = name not in followed and norm.reads.reads(name) and (name in norm.reads.names or name not in INTERNAL)
        before = vars(self).get(name) if relevant else None
        method(self, name, *args, **named)
        if relevant and not (is_plain(before) and name in vars(self) and same(before, vars(self)[name])):
            marks = marks_of(type(self))
            if marks and marks[0].original is original:
                assign(self, original)
            elif own_mark(self) is not None:  # something has derived a class of ours
                vars(self)["forward"] = functools.partial(original.forward, self)

    return noticing
