"""Subclasses that take the place of a module's class: the original in everything but its forward.

A module gets such a class by assignment to `__class__`, so its attributes, parameters, buffers and hooks stay the very objects that they
were. Pickled and copied it is the original's class and the proof that the subclass was made from.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from torch import nn

from triton_rmsnorm.patching.report import LeftAloneError

# Held while classes are made and modules are given one.
LOCK = threading.RLock()


class Mark:
    """What a class that we made was made from: an attribute of the class, by which it is known.

    Args:
        original: its base class.
        proof: what was proved of modules of the original class.
        derive: derive(original, proof) makes the class.
        holds: whether the proof holds for a module that was unpickled.
        forward: what the original's forward was when the class was made.
        instances: modules that were given the class, by id.
    """

    def __init__(self, original: type[nn.Module], proof: Any, derive: Callable, holds: Callable[[nn.Module], bool]):
        self.original, self.proof, self.derive, self.holds = original, proof, derive, holds
        self.forward, self.code = original.forward, code_of(original.forward)
        self.functions: tuple[tuple[Any, tuple, Any, Any], ...] = ()  # that it calls: holder, path, function and code
        self.cls: type[nn.Module] | None = None  # the class
        self.instances: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()

    def is_current(self) -> bool:
        """Whether the original's forward is what it was when the class was made."""
        forward = self.original.forward
        return forward is self.forward and code_of(forward) is self.code


def code_of(function: Any) -> Any:
    """The code of a Python function, which may be replaced in it, as by autoreload of IPython."""
    return getattr(function, "__code__", None)


def derived(
    original: type[nn.Module],
    proof: Hashable,
    name: str,
    forward: Callable[[Mark], Callable],
    derive: Callable,
    members: dict[str, Any],
    holds: Callable[[nn.Module], bool] = lambda module: True,
) -> type[nn.Module]:
    """The subclass of `original` for a proof. There is one for each pair, until the original's forward is replaced.

    Args:
        original: its base class.
        proof: what is proved of modules of that class.
        name: of the class.
        forward: gives its forward for its mark.
        derive, holds: as in Mark.
        members: other attributes of the class.

    Raises:
        LeftAloneError: the class of the original does not allow this.
    """
    with LOCK:
        for subclass in type.__subclasses__(original):
            mark = mark_of(subclass)
            if mark is not None and mark.proof == proof and mark.is_current():
                return subclass
        mark = Mark(original, proof, derive, holds)
        module = {"__module__": derive.__module__}
        members = {"forward": forward(mark), "__doc__": original.__doc__, **_copying(mark), **module, **members}
        mark.cls = cls = _subclass(original, name, members)
        type.__setattr__(cls, "_triton_rmsnorm", mark)  # by which it is found
        return cls


def _subclass(original: type, name: str, members: dict) -> type:
    """A subclass that neither `__init_subclass__` nor a metaclass gets to see, because both may register or refuse it."""
    metaclass: Any = type(original)
    # The constructor of `type` or of ABCMeta, not that of a metaclass derived from it.
    constructor = next(base for base in metaclass.__mro__ if base.__module__ in ("builtins", "abc"))
    try:
        cls = constructor.__new__(metaclass, name, (nn.Module,), members)
        type.__setattr__(cls, "__bases__", (original,))
    except TypeError as error:
        raise LeftAloneError(f"its class cannot have a subclass: {error}") from None
    return cls


def mark_of(cls: type) -> Mark | None:
    """The mark of a class that we made; None for others."""
    return vars(cls).get("_triton_rmsnorm")


def proof_of(cls: type) -> Any:
    """The proof that a class was made from, or None if we did not make it."""
    mark = mark_of(cls)
    return None if mark is None else mark.proof


def original_of(cls: type) -> type:
    """The class that a class that we made takes the place of; other classes are their own."""
    mark = mark_of(cls)
    return cls if mark is None else mark.original


def assign(module: nn.Module, cls: type[nn.Module]) -> None:
    """Gives a module a class that we made, or its own class again."""
    with LOCK:
        mark = mark_of(type(module))
        if mark is not None:
            mark.instances.pop(id(module), None)
        object.__setattr__(module, "__class__", cls)
        mark = mark_of(cls)
        if mark is not None:
            mark.instances[id(module)] = module


def own_mark(module: nn.Module) -> Mark | None:
    """The mark of the class among those of a module that we made."""
    return next((mark for cls in type(module).__mro__ if (mark := mark_of(cls)) is not None), None)


def marks_of(cls: type) -> list[Mark]:
    """Of a class that we made, perhaps of another one that we made, and so on: those of all, the first one made of the original."""
    mark = mark_of(cls)
    return [] if mark is None else [*marks_of(mark.original), mark]


def _copying(mark: Mark) -> dict[str, Callable]:
    """How modules of the class of this mark are copied and pickled."""

    def reduce_ex(self: nn.Module, protocol: int) -> Any:
        """What the original would be pickled and copied as, and what makes our class of it."""
        cls: Any = mark.cls
        if not isinstance(self, cls):  # another thread has given it its own class again
            return self.__reduce_ex__(protocol)
        reduced = super(cls, self).__reduce_ex__(max(protocol, 2))
        if type(self) is not cls or isinstance(reduced, str):
            return reduced
        marks = marks_of(cls)
        original, steps = marks[0].original, [(one.derive, one.proof) for one in marks]
        function, args, *rest = reduced
        function = original if function is cls else function
        args = tuple(original if arg is cls else arg for arg in args)
        complete = not rest or rest[0] is None  # no state follows
        return _restored, (function, args, original, steps, complete), *rest

    def setstate(self: nn.Module, state: Any) -> None:
        cls: Any = mark.cls
        if not isinstance(self, cls):  # as above
            type(self).__setstate__(self, state)
        else:
            super(cls, self).__setstate__(state)
            if type(self) is cls:
                _verify(self)

    return {"__reduce_ex__": reduce_ex, "__setstate__": setstate}


def _restored(function: Callable, args: tuple, original: type[nn.Module], steps: list[tuple[Callable, Any]], complete: bool) -> nn.Module:
    """A module of the original class, which is given ours if it can be made here."""
    module = function(*args)
    if type(module) is original:
        try:
            cls = original
            for derive, proof in steps:
                cls = derive(cls, proof)
            assign(module, cls)
        except LeftAloneError as error:
            warnings.warn(f"{original.__qualname__} is loaded as it was before it was patched: {error}", stacklevel=2)
        else:
            if complete:
                _verify(module)
    return module


def _verify(module: nn.Module) -> None:
    """Gives a module its own class again if what was proved elsewhere, or earlier, does not hold here."""
    marks = marks_of(type(module))
    if not all(mark.holds(module) for mark in marks):
        original = marks[0].original
        assign(module, original)
        warnings.warn(f"{original.__qualname__} is loaded as it was before it was patched: its code is another here", stacklevel=3)
