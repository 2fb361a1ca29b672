"""What a forward reads besides its input: attributes of its module, and everything else that can change what it computes.

A proof of what a module computes holds as long as nothing has changed that its forward reads. What that may be is found without running
anything: the code of the forward and of the Python functions that it can reach names attributes, globals, and attributes of objects and
classes. Names are matched wherever they could apply, so more may be found than is read, but not less, as far as code is Python and does
not compute names. The code of torch, NumPy and Python's own library is not followed.
"""

import enum
import functools
import hashlib
import sys
import types
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from triton_rmsnorm.patching.subclass import mark_of

# Packages whose functions do not change what they compute.
_TRUSTED = sys.stdlib_module_names | {"numpy", "torch", "triton", "triton_rmsnorm"}
# Code with one of these names may read any attribute.
_REFLECTION = {"__dict__", "__getattribute__", "attrgetter", "eval", "exec", "getattr", "globals", "locals", "vars"}
_REFLECTION |= {f"{named}{kind}" for named in ("", "named_", "_") for kind in ("parameters", "buffers", "modules", "children")}
_COMPILING = {"is_compiling", "is_dynamo_compiling", "is_exporting"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device)
# Methods that run wherever an attribute is read.
_HOOKS = {"__getattr__", "__getattribute__"}
# Larger containers, longer paths and more functions are not followed.
_LARGEST_CONTAINER, _LONGEST_PATH, _MOST_FUNCTIONS = 32, 16, 256
_MISSING = object()
_FUNCTIONS, _CONTAINERS = (types.FunctionType, type), (dict, list, tuple, set, frozenset)


Path = tuple[str | tuple[Hashable], ...]


@dataclass(frozen=True)
class Reads:
    """What a forward may read.

    Args:
        names: of attributes of the module.
        every: whether it may read any attribute, because its code looks attributes up by computed names.
        values: plain values that are not attributes of the module itself, such as flags of its class, fields of its configuration and
            globals: the Python module or "" for the nn.Module, the path, and the value at the time of the proof. A path has names of
            attributes, and keys and indexes, each as a tuple of one.
        functions: where functions and classes, and dictionaries of them, are found among globals, in the same way.
        code: a digest of the code that was followed, and of constants that it is bound to.
        autocast: whether the code mentions autocast.
        compiling: whether the code asks if it is compiled.
    """

    names: frozenset[str] = frozenset()
    every: bool = False
    values: tuple[tuple[str, Path, Hashable], ...] = ()
    functions: tuple[tuple[str, Path], ...] = ()
    code: str = ""
    autocast: bool = False
    compiling: bool = False

    def reads(self, name: str) -> bool:
        """Whether the forward may read this attribute of the module."""
        return self.every or name in self.names

    def without(self, attribute: str | float) -> "Reads":
        """All but the value of an attribute, given by its path with dots, that is looked up at each call."""
        if not isinstance(attribute, str):
            return self
        path = tuple(attribute.split("."))
        return replace(self, values=tuple(value for value in self.values if value[:2] != ("", path)))

    def hold(self, module: nn.Module) -> bool:
        """Whether `values` are what they were."""
        return all(same(frozen(at(sys.modules.get(root) if root else module, path)), value) for root, path, value in self.values)


def reads(module: nn.Module, submodules: bool = True) -> Reads | None:
    """What the forward of `module` may read; None if there is no Python code in it that could be followed.

    Args:
        module: it is only looked at.
        submodules: follow the forwards of its submodules, too.
    """
    walk = _Walk(module, submodules)
    walk.run()
    if not walk.functions:
        return None
    autocast = any("autocast" in name or name in ("custom_fwd", "custom_bwd") for name in walk.names)
    values = tuple((*where, value) for where, value in sorted(walk.values.items(), key=repr))
    functions = tuple(sorted(walk.places, key=repr))
    compiling = not _COMPILING.isdisjoint(walk.names)
    every = not _REFLECTION.isdisjoint(walk.names)
    return Reads(frozenset(walk.names), every, values, functions, walk.digest.hexdigest(), autocast, compiling)


def is_plain(value: Any) -> bool:
    """Whether a value cannot change: numbers, strings, dtypes and the like."""
    return isinstance(value, _PLAIN)


def _itself_or_type(value: Any) -> Hashable:
    if is_plain(value):
        return value
    cls = type(value)
    mark = getattr(cls, "_triton_rmsnorm", None)  # torch.compile cannot follow mark_of
    cls = mark.original if mark is not None and mark.cls is cls else cls
    return f"{cls.__module__}.{cls.__qualname__}"


def frozen(value: Any, of_other: Callable[[Any], Hashable] = _itself_or_type) -> Hashable:
    """A value that stays as it is when `value` changes: of containers their contents, of anything else what `of_other` gives."""
    if isinstance(value, (list, tuple)):
        return type(value).__qualname__, tuple(frozen(one, of_other) for one in value)
    if isinstance(value, dict):
        return type(value).__qualname__, tuple((frozen(key, of_other), frozen(one, of_other)) for key, one in value.items())
    if isinstance(value, (set, frozenset)):
        return type(value).__qualname__, frozenset(frozen(one, of_other) for one in value)
    return of_other(value)


def same(value: Any, other: Any) -> bool:
    """Whether two plain values are equal and of one type."""
    return value is other or (type(value) is type(other) and value == other)


def at(value: Any, path: Path) -> Any:
    """What a path leads to by now."""
    for step in path:
        if isinstance(step, str):
            value = getattr(value, step, _MISSING)
        else:
            try:
                value = value[step[0]]
            except (LookupError, TypeError):
                value = _MISSING
    return value


class _Walk:
    """Follows code and names until nothing new is found."""

    def __init__(self, module: nn.Module, submodules: bool):
        self.module, self.submodules = module, submodules
        self.names: set[str] = {name for name in _HOOKS if _method(type(module), name)}
        self.functions: dict[int, types.FunctionType] = {}
        self.values: dict[tuple[str, Path], Hashable] = {}
        self.places: set[tuple[str, Path]] = set()  # of functions and classes
        self.digest = hashlib.sha256()
        self.holders: dict[int, tuple[str | None, Path, Any]] = {id(module): ("", (), module)}

    def run(self) -> None:
        self.visit("", ("forward", "__wrapped__"), _method(type(self.module), "forward"), own=True)  # as it is found while it is replaced
        found: tuple = ()
        while found != (found := (len(self.names), len(self.functions), len(self.holders))):
            # That a module trains or not does not make it another one.
            names = sorted(name for name in self.names - {"training"} if not name.startswith("__") or name in _HOOKS)
            for root, path, holder in list(self.holders.values()):
                other = isinstance(holder, nn.Module) and holder is not self.module
                for name in names:
                    if name != "forward" or self.submodules or not other:
                        for value in _held(holder, name, root == ""):
                            self.visit(root, (*path, name), value, own=holder is self.module)

    def visit(self, root: str | None, path: Path, value: Any, own: bool = False) -> None:
        """Notes a value, or what can be reached from it.

        Args:
            root, path: where it is, as in Reads.values; None where no path leads to it.
            own: it is in a class of the module, so it is followed even if that is one of torch.nn.
        """
        if isinstance(value, type) and issubclass(value, torch.autograd.Function):
            root = None  # torch.compile can neither compare it nor look for its attributes
        if isinstance(value, types.MethodType):
            self.visit(root, (*path, "__self__"), value.__self__)
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            value = value.__func__
        if root and isinstance(value, _FUNCTIONS):
            self.places.add((root, path))
        if isinstance(value, types.FunctionType):
            self.follow(root, path, value, own)
        elif isinstance(value, property):
            self.visit(None, (), value.fget, own)
        elif isinstance(value, (functools.partial, functools.partialmethod)):
            followed = root if isinstance(value, functools.partial) else None
            for name, part in (("func", value.func), ("args", value.args), ("keywords", value.keywords)):
                self.visit(followed, (*path, name), part, own)
        elif isinstance(value, functools.cached_property):
            self.visit(None, (), value.func, own)
        elif is_plain(value):
            self.note(root, path, value)
        elif isinstance(value, _CONTAINERS):
            large = len(value) > _LARGEST_CONTAINER
            if large:
                self.note(None, path, len(value))
            elif root and _is_registry(value):
                self.places.add((root, path))
                self.note(None, path, frozen(value))
            else:
                self.note(root, path, frozen(value), changes=not isinstance(value, (tuple, frozenset)))
            for key, part in list(value.items()) if isinstance(value, dict) else () if large else enumerate(value):
                if key in self.names if large else not is_plain(part):
                    # No path leads into a set. Containers inside are noted already, and registries of functions would take long.
                    skipped = isinstance(value, (set, frozenset)) or (not large and isinstance(part, _FUNCTIONS + _CONTAINERS))
                    self.visit(None if skipped else root, (*path, (key,)), part)
        elif "__wrapped__" in getattr(value, "__dict__", ()):  # by functools.cache
            self.visit(root, (*path, "__wrapped__"), value.__wrapped__, own)
        elif not isinstance(value, Tensor):
            self.enter(root, path, value)

    def note(self, root: str | None, path: Path, value: Hashable, changes: bool = False) -> None:
        """Plain attributes of the module itself are left out: that they are set is noticed (see replacement.py)."""
        if root is None:
            self.digest.update(repr(value).encode())
        elif root or len(path) > 1 or changes or path[0] not in vars(self.module):
            self.values[root, path] = value

    def enter(self, root: str | None, path: Path, value: Any) -> None:
        """Follows the attributes of an object, a class or a Python module."""
        if id(value) in self.holders or len(path) > _LONGEST_PATH:
            return
        if isinstance(value, types.ModuleType):
            if not _trusted(value.__name__) and sys.modules.get(value.__name__) is value:
                self.holders[id(value)] = value.__name__, (), value
        elif isinstance(value, type):
            if not _trusted(value.__module__):
                if issubclass(value, torch.autograd.Function):
                    for name in sorted(vars(value).keys() & {"forward", "setup_context", "backward"}):
                        self.visit(root, (*path, name), vars(value)[name])
                self.holders[id(value)] = root, path, value
        elif isinstance(value, nn.Module):
            self.holders[id(value)] = root, path, value
            self.note(root, path, frozen(value), changes=True)
            if self.submodules:
                self.visit(None, (), _method(type(value), "forward"))
            if self.submodules and _trusted(type(value).__module__):
                for name, attribute in vars(value).items():
                    if name not in INTERNAL and is_plain(attribute):
                        self.note(root, (*path, name), attribute)
        elif hasattr(value, "__dict__") or hasattr(value, "__slots__"):
            self.holders[id(value)] = root, path, value
            if not _trusted(type(value).__module__):
                self.visit(None, (), _method(type(value), "__call__"))

    def follow(self, root: str | None, path: Path, function: types.FunctionType, own: bool) -> None:
        """Takes the names and globals of a function, and what it is bound to."""
        if id(function) in self.functions or len(self.functions) >= _MOST_FUNCTIONS:
            return
        self.functions[id(function)] = function
        space = function.__globals__
        origin = space.get("__name__", "")  # not function.__module__, which decorators copy from what they wrap
        for index, (name, cell) in enumerate(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)):
            with suppress(ValueError):  # an empty cell
                followed = root if name != "__class__" and not _trusted(origin) else None
                self.visit(followed, (*path, "__closure__", (index,), "cell_contents"), cell.cell_contents, own)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.visit(None, (), value)
        if _trusted(origin) and not (own and origin.startswith("torch.nn.")):
            if "autocast" in origin:  # a decorator
                self.names.add("autocast")
            return
        names = set(_digested(function.__code__, self.digest))
        self.names |= names
        known = vars(sys.modules[origin]) is space if origin in sys.modules else False
        for name in sorted(names & space.keys()):
            self.visit(origin if known else None, (name,), space[name])


def _is_registry(value: Any) -> bool:
    """Whether it is a dictionary of functions and classes, such as ACT2FN of transformers, which has tuples with them, too."""
    return isinstance(value, dict) and bool(value) and all(callable(one) or isinstance(one, tuple) for one in list(value.values()))


# Attributes that every nn.Module has. What is proved is the forward of its class, not what something put into the instance.
INTERNAL = frozenset(vars(nn.Module())) | {"forward"}


def _trusted(name: str | None) -> bool:
    return (name or "").partition(".")[0] in _TRUSTED


def bases_of(cls: type) -> list[type]:
    """Classes that a class inherits from, without those that we made or that all have."""
    return [base for base in cls.__mro__ if base not in (nn.Module, object) and mark_of(base) is None]


def _method(cls: type, name: str) -> Any:
    return next((vars(base)[name] for base in bases_of(cls) if name in vars(base)), None)


def _held(holder: Any, name: str, computed: bool) -> Iterator[Any]:
    """What `holder` has of that name. If `computed`, code of its class runs where that makes up attributes, as in some configurations."""
    computed = computed and not isinstance(holder, (type, types.ModuleType, nn.Module))
    if isinstance(holder, (type, types.ModuleType)):
        spaces = [vars(base) for base in bases_of(holder)] if isinstance(holder, type) else [vars(holder)]
    else:
        attributes = getattr(holder, "__dict__", {})
        if isinstance(holder, nn.Module):
            attributes = {key: value for key, value in attributes.items() if key != "forward"}
        trusted = _trusted(type(holder).__module__) and not isinstance(holder, nn.Module)
        bases = [] if trusted else bases_of(type(holder))
        spaces = [attributes, attributes.get("_modules", {}) if isinstance(holder, nn.Module) else {}, *map(vars, bases)]
        computed = computed and not trusted and any(_method(type(holder), hook) for hook in _HOOKS)
    for space in spaces:
        if name in space:
            slot = isinstance(space[name], types.MemberDescriptorType)
            yield getattr(holder, name, _MISSING) if slot else space[name]
            if not isinstance(space[name], (types.FunctionType, property)):  # which super() may lead beyond
                return
            computed = False
    if computed:
        with suppress(Exception):  # of any kind: it is other people's code
            yield getattr(holder, name)


def _digested(code: types.CodeType, digest: Any) -> Iterator[str]:
    """The names in a piece of code, and in those that it contains; strings may be names, too."""
    digest.update(code.co_code)
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _digested(constant, digest)
        else:
            digest.update(repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant).encode())
            for name in constant if isinstance(constant, tuple) else (constant,):
                if isinstance(name, str) and name.isidentifier():
                    yield name
    digest.update(repr(code.co_names).encode())
