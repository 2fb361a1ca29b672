"""Constructors of classes that replace what they build."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from triton_rmsnorm.patching.outcomes import REPLACE, outcome
from triton_rmsnorm.patching.subclass import LOCK, assign


class _Constructor:
    """A replaced `__init__`: what is known beside the function itself.

    Args:
        own: what the class had, or None if it inherited its constructor.
    """

    def __init__(self, own: Callable | None):
        self.own = own
        self.active = True
        self.function: Callable[[], Callable | None] = lambda: None  # a weak reference, because the function refers to the class
        self.built: list[weakref.ref[nn.Module]] = []  # what was replaced after it
        self.memory: dict = {}


# Of each class, in the order in which they were put around one another.
_CONSTRUCTORS: weakref.WeakKeyDictionary[type, list[_Constructor]] = weakref.WeakKeyDictionary()


def replace_constructor(cls: type[nn.Module]) -> bool:
    """Makes a class's constructor replace what it builds, where that is proved; not of subclasses. False if it does already.

    Raises:
        TypeError, AttributeError: the class does not allow to set its constructor.
    """
    constructors = _CONSTRUCTORS.setdefault(cls, [])
    if constructors and vars(cls).get("__init__") is constructors[-1].function():
        was_active, constructors[-1].active = constructors[-1].active, True
        return not was_active
    constructor = _Constructor(vars(cls).get("__init__"))
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        if constructor.active and type(self) is cls:
            with LOCK:
                replaced = outcome(REPLACE, self, constructor.memory)[1]
                if replaced is not None:
                    assign(self, replaced)
                    constructor.built.append(weakref.ref(self))

    constructor.function = weakref.ref(__init__)
    cls.__init__ = __init__  # type: ignore[method-assign]
    constructors.append(constructor)
    return True


def restore_constructor(cls: type[nn.Module]) -> list[nn.Module]:
    """Undoes `replace_constructor`; returns what was replaced in between.

    Where another library has wrapped the constructor since, its wrapper stays, and ours does nothing any more.
    """
    constructors = _CONSTRUCTORS.get(cls, [])
    built = [module for constructor in constructors for one in constructor.built if (module := one()) is not None]
    for constructor in constructors:
        constructor.active = False
        constructor.built.clear()
    while constructors and vars(cls).get("__init__") is constructors[-1].function():
        own = constructors.pop().own
        if own is None:
            del cls.__init__
        else:
            cls.__init__ = own  # type: ignore[method-assign]
    if not constructors:
        _CONSTRUCTORS.pop(cls, None)
    return built
