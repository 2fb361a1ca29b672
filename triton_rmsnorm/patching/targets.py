"""What `patch` can be pointed at: the modules of a model, the instances of a class, the classes of a model type of transformers."""

import gc
import importlib
import pkgutil
from collections.abc import Iterator
from difflib import get_close_matches

from torch import nn

from triton_rmsnorm.patching.recognition import may_be_norm
from triton_rmsnorm.patching.subclass import mark_of

Target = nn.Module | type[nn.Module] | str


def classes_of(target: Target) -> list[type[nn.Module]]:
    """The classes that `target` names; none for a module.

    Raises:
        TypeError, ValueError, ImportError: as patch.
    """
    if isinstance(target, nn.Module):
        return []
    if isinstance(target, type) and issubclass(target, nn.Module):
        return [target]
    if isinstance(target, str):
        return _classes_of_model_type(target)
    raise TypeError(f"target must be a torch.nn.Module, a class of modules or a model type of transformers, got {target!r}")


def _classes_of_model_type(name: str) -> list[type[nn.Module]]:
    """Classes that may be norms in the modeling files of a model type of transformers, including those that they import."""
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name
    except ImportError as error:
        raise ImportError(f"target {name!r} is taken for a model type of transformers, which cannot be imported") from error
    if name not in CONFIG_MAPPING_NAMES:
        close = ", ".join(map(repr, get_close_matches(name, CONFIG_MAPPING_NAMES))) or "those of its CONFIG_MAPPING"
        raise ValueError(f"target must be a module, a class or a model type of transformers ({close}), got {name!r}")
    package = importlib.import_module(f"transformers.models.{model_type_to_module_name(name)}")
    found: dict[type, None] = {}
    for file in pkgutil.iter_modules(package.__path__):
        if file.name.startswith("modeling_"):
            module = importlib.import_module(f"{package.__name__}.{file.name}")
            classes = (value for value in vars(module).values() if isinstance(value, type) and issubclass(value, nn.Module))
            found.update((cls, None) for cls in classes if not cls.__module__.startswith("torch.") and may_be_norm(cls))
    return list(found)


def instances(classes: list[type[nn.Module]]) -> list[nn.Module]:
    """All modules of these very classes that the garbage collector knows."""
    known = set(classes)
    return [thing for thing in gc.get_objects() if type(thing) in known] if known else []


def replaced_instances(cls: type[nn.Module]) -> Iterator[nn.Module]:
    """Modules of this class that have a class that we made, also those that gc.freeze has hidden from the garbage collector."""
    marks = [mark for subclass in type.__subclasses__(cls) if (mark := mark_of(subclass)) is not None]
    for mark in marks:
        yield from mark.instances.values()
    yield from instances([mark.cls for mark in marks if mark.cls is not None])
