"""patch, unpatch, patched: our kernels in place of the RMS norms of any model, where it is proved what those compute.

A module is replaced by giving it another class: a subclass of its class, made here, whose forward calls our functions. Attributes,
parameters, buffers and hooks stay the very objects that they were, so state dicts, optimizers, checkpoints, copies and code that looks
at the module from outside do not notice. A class is replaced by replacing the instances there are and those that its constructor makes.
"""

import functools
import gc
import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches

from torch import nn

from triton_rmsnorm.patching.constructors import replace_constructor, restore_constructor
from triton_rmsnorm.patching.inspection import named_modules
from triton_rmsnorm.patching.outcomes import FUSE, RECOMPUTE, REPLACE, Change, outcome, outcome_of_class
from triton_rmsnorm.patching.recognition import may_be_norm
from triton_rmsnorm.patching.report import Report, Row, Status, in_words
from triton_rmsnorm.patching.subclass import LOCK, assign, mark_of

Target = nn.Module | type[nn.Module] | str


def patch(target: Target, *, strict: bool = False, fuse_residual: bool = False, recompute: bool = False) -> Report:
    """Replaces, in place, every RMS norm of `target` that is proved to compute what one of our functions computes.

    Each norm's forward is run on the CPU, on a copy with random weights, and compared with `rms_norm` under all its options; no list of
    names is involved. Outputs and gradients stay what they were, up to the order of sums. Only calls that the proof covers take our
    kernels: fp16, bf16 and fp32 input whose last dimensions are those of the weight; any other call runs the original forward. So does a
    norm from then on if an attribute is set that its forward may read, other than its weight and epsilon, which are looked up at each call.

    Changes of classes, of their methods and of globals that the code of a forward names are followed, too. What it reads in other ways,
    such as environment variables, and where it depends on sizes or on the device, is not; after such a change, unpatch and patch anew. The
    input itself is kept for the backward: changing it in place after the call raises an error there, also where the original had kept a
    copy.

    If it raises, nothing has changed.

    Args:
        target: a model, or one norm; or a class of norms: all its instances, those there are and those to come, which are replaced as
            soon as they are built, before they are loaded, dispatched or parallelized, but no instances of subclasses; or a model type
            of transformers, such as "llama": every class of norms in its modeling files.
        strict: if anything that looks like an RMS norm cannot be replaced, replace nothing and raise.
        fuse_residual: also compute `residual + hidden` together with the replaced norm that directly follows it in the forward of a layer
            of the model, by `add_rms_norm`. A layer's source is rewritten for that, and tried on random input beside the original.
        recompute: also run the forward of the model in `recompute_norms`, so that autograd keeps less.

    Returns:
        A report with a row for each class and outcome. It prints as a table.

    Raises:
        TypeError: target is none of these, or it is not a model and fuse_residual or recompute is set.
        ValueError: transformers does not know the model type.
        ImportError: target is a model type and transformers is not installed.
        RuntimeError: strict, and something cannot be replaced; the message contains the report.
    """
    return _patch(target, strict, fuse_residual, recompute)[0]


def unpatch(target: Target) -> None:
    """Undoes `patch`: replaced norms, fused layers and recomputing models in `target` get their own class again. Tensors stay as they are.

    A class, or a model type, is undone for all instances, also those of models that were patched as such, and copies. Fused layers whose
    norms are undone alone add and normalize one after another again. Where something else holds a forward of ours, such as a hook of
    accelerate, it runs the original from then on.

    Args:
        target: as in patch.

    Returns:
        None.

    Raises:
        TypeError: as in patch.
        ValueError: as in patch.
        ImportError: as in patch.
        RuntimeError: the class of a replaced norm or layer was changed again later, for example by fully_shard; undo that first.
    """
    with LOCK:
        classes = _classes_of(target)
        for cls in classes:
            restore_constructor(cls)
        if isinstance(target, nn.Module):
            _restore((module, nn.Module) for _, module in named_modules(target))
        else:
            _restore((module, nn.Module) for cls in classes for module in _replaced_instances(cls))


@contextmanager
def patched(target: Target, *, strict: bool = False, fuse_residual: bool = False, recompute: bool = False) -> Iterator[Report]:
    """Patches the target inside a with statement. At the end, also after an exception, exactly what it replaced is restored.

    Copies that are made inside, by deepcopy or pickle, stay patched: `unpatch` undoes them.

    Args:
        target: as in patch.
        strict: as in patch.
        fuse_residual: as in patch.
        recompute: as in patch.

    Yields:
        The report.

    Raises:
        TypeError: as in patch.
        ValueError: as in patch.
        ImportError: as in patch.
        RuntimeError: as in patch, and at the end as in unpatch.
    """
    report, changed, constructors = _patch(target, strict, fuse_residual, recompute)
    try:
        yield report
    finally:
        with LOCK:
            for cls in constructors:
                changed += ((module, cls) for module in restore_constructor(cls))
            _restore(changed)


# Modules that were given another class, and the class of each before that.
Changed = list[tuple[nn.Module, type]]


def _patch(target: Target, strict: bool, fuse_residual: bool, recompute: bool) -> tuple[Report, Changed, list[type]]:
    """The report, what was given another class, and the classes whose constructors were replaced. All or nothing."""
    classes = _classes_of(target)
    model = target if isinstance(target, nn.Module) else None
    if (fuse_residual or recompute) and model is None:
        option = "fuse_residual" if fuse_residual else "recompute"
        raise TypeError(f"target must be a torch.nn.Module for {option}, got {target!r}")
    changed: Changed = []
    constructors: list[type] = []
    with LOCK:
        try:
            named = [(None, module) for module in _instances(classes)] if model is None else named_modules(model)
            rows = _change(REPLACE, named, changed)
            replaced = {row.cls for row in rows if row.status == Status.REPLACED}
            rows += [_replace_constructor(outcome_of_class(cls, cls in replaced), constructors) for cls in classes]
            if strict and any(row.status == Status.LEFT_ALONE and row.resembles for row in rows):
                raise RuntimeError(f"not every RMS norm can be replaced:\n{Report(tuple(rows))}")
            if fuse_residual and model is not None:
                rows += _change(FUSE, named_modules(model), changed)
            if recompute and model is not None:
                rows += _change(RECOMPUTE, [("", model)], changed)
        except BaseException:
            for cls in constructors:
                restore_constructor(cls)
            _restore(changed)
            raise
    return Report(tuple(rows)), changed, constructors


def _change(change: Change, named: Iterable[tuple[str | None, nn.Module]], changed: Changed) -> list[Row]:
    """Gives modules their new class and appends them to `changed`. The rows count those that are equal but for their names."""
    memory: dict = {}
    outcomes = [(name, module, *outcome(change, module, memory)) for name, module in named]
    names: dict[Row, list[str | None]] = {}
    for name, module, row, cls in outcomes:
        if cls is not None:
            changed.append((module, type(module)))
            assign(module, cls)
        if row is not None:
            names.setdefault(row, []).append(name)
    return [replace(row, count=len(same), names=tuple(n for n in same if n is not None)) for row, same in names.items()]


def _replace_constructor(row: Row, replaced: list[type]) -> Row:
    """Replaces the constructor of a class with instances to come and appends the class to `replaced`; returns its row."""
    if row.status == Status.TO_COME:
        try:
            if replace_constructor(row.cls):
                replaced.append(row.cls)
        except (TypeError, AttributeError) as error:
            return replace(row, status=Status.LEFT_ALONE, reason=f"its constructor cannot be replaced: {in_words(error)}")
    return row


def _restore(changed: Iterable[tuple[nn.Module, type]]) -> None:
    """Takes classes that we made from modules, down to a class that each had before, or else its own."""
    changed = list(changed)
    for module, _ in changed:
        cls = type(module)
        if mark_of(cls) is None and any(map(mark_of, cls.__mro__)):
            raise RuntimeError(f"a replaced norm or layer has become a {cls.__name__} since: undo that first")
    for module, before in reversed(changed):
        while type(module) is not before and (mark := mark_of(type(module))) is not None:  # a model that is a layer, too, may have two
            own = vars(module).get("forward")
            if isinstance(own, functools.partial) and own.func is mark.forward:  # see replacement.py
                del vars(module)["forward"]
            assign(module, mark.original)


def _classes_of(target: Target) -> list[type[nn.Module]]:
    """The classes that `target` names; none for a module."""
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


def _instances(classes: list[type[nn.Module]]) -> list[nn.Module]:
    """All modules of these very classes that the garbage collector knows."""
    known = set(classes)
    return [thing for thing in gc.get_objects() if type(thing) in known] if known else []


def _replaced_instances(cls: type[nn.Module]) -> Iterator[nn.Module]:
    """Modules of this class that have a class that we made, also those that gc.freeze has hidden from the garbage collector."""
    marks = [mark for subclass in type.__subclasses__(cls) if (mark := mark_of(subclass)) is not None]
    for mark in marks:
        yield from mark.instances.values()
    yield from _instances([mark.cls for mark in marks if mark.cls is not None])
