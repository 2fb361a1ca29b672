"""patch, unpatch, patched: our kernels in place of the RMS norms of any model, where `recognition` has proved what those compute.

A module is replaced by giving it another class: a subclass of its own, made here, whose forward calls our functions. Attributes,
parameters, buffers and hooks stay the very objects that they were, so state dicts, optimizers, checkpoints, copies and code that looks
at the module from outside do not notice. A class is replaced by replacing the instances there are and those that its constructor makes.
"""

import functools
import gc
import importlib
import inspect
import pkgutil
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from triton_rmsnorm.patching.fusion import Fusion, fused, fusible
from triton_rmsnorm.patching.recognition import isolated, may_be_norm, recognize
from triton_rmsnorm.patching.replacement import is_derived, is_replacement, replacement
from triton_rmsnorm.patching.semantics import Norm

Target = nn.Module | type[nn.Module] | str


@dataclass(frozen=True)
class Row:
    """Modules of one class with one outcome.

    Args:
        cls: the original class.
        semantics: what they compute; empty if that is not known.
        count: how many modules.
        status: "replaced", "replaced before" or "left alone"; of a class "to come": instances will be replaced when they are built; of
            layers whose residual add is taken into a norm "fused" or "fused before".
        reason: why they were left alone.
        resembles: whether they are RMS norms, or look like such.
        names: of the modules in the model.
    """

    cls: type
    semantics: str
    count: int
    status: str
    reason: str = ""
    resembles: bool = False
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `patch` did and did not do, and why; it prints as a table.

    Args:
        rows: one for the modules of one class with one outcome.
    """

    rows: tuple[Row, ...]

    @property
    def replaced(self) -> int:
        """Modules replaced by this call."""
        return sum(row.count for row in self.rows if row.status == "replaced")

    @property
    def fused(self) -> int:
        """Layers whose residual add this call took into a norm."""
        return sum(row.count for row in self.rows if row.status == "fused")

    def __str__(self) -> str:
        if not self.rows:
            return "no RMS norm found"
        lines: list[tuple[str, ...]] = [("class", "semantics", "count", "outcome")]
        for row in self.rows:
            outcome = f"{row.status}: {row.reason}" if row.reason else row.status
            lines.append((row.cls.__name__, row.semantics or "-", str(row.count), outcome))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, tuple("-" * width for width in widths))
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def patch(target: Target, *, strict: bool = False, fuse_residual: bool = False) -> Report:
    """Replaces, in place, every RMS norm of `target` that is proved to compute what one of our functions computes.

    Each norm's forward is run on the CPU, on a copy with random weights, and compared with `rms_norm` under all its options; no list of
    names is involved. Outputs and gradients stay what they were, up to the order of sums. Only calls for which this is proved take our
    kernels: fp16, bf16 and fp32 input whose last dimensions are those of the weight; any other call runs the original forward.

    Args:
        target: a model, or one norm; or a class of norms: all its instances, those there are and those to come, which are replaced as
            soon as they are built, before they are loaded, dispatched or parallelized, but no instances of subclasses; or a model type
            of transformers, such as "llama": every class of norms in its modeling files.
        strict: if anything that looks like an RMS norm cannot be replaced, replace nothing and raise.
        fuse_residual: also compute `residual + hidden` together with the replaced norm that directly follows it in the forward of a layer
            of the model, by `add_rms_norm`. A layer's source is rewritten for that, and tried on random input beside the original.

    Returns:
        A report with a row for each class and outcome. It prints as a table.

    Raises:
        TypeError: target is none of these, or fuse_residual and it is no model.
        ValueError: transformers does not know the model type.
        ImportError: target is a model type and transformers is not installed.
        RuntimeError: strict, and something cannot be replaced; the message contains the report.
    """
    return _patch(target, strict, fuse_residual)[0]


def unpatch(target: Target) -> None:
    """Undoes `patch`: gives every replaced norm and fused layer of `target` its own class again. Tensors stay what they are by now.

    A class, or a model type, is undone for all instances, also those of models that were patched as such. Fused layers whose norms are
    undone alone add and normalize one after another again.

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
    classes = _classes(target)
    for cls in classes:
        _restore_constructor(cls)
    replacements = {subclass for cls in classes for subclass in cls.__subclasses__() if is_derived(subclass)}
    _restore(target.modules() if isinstance(target, nn.Module) else (module for _, module in _instances(replacements)))


@contextmanager
def patched(target: Target, *, strict: bool = False, fuse_residual: bool = False) -> Iterator[Report]:
    """Patches the target inside a with statement. At the end, also after an exception, exactly what it replaced is restored.

    Args:
        target: as in patch.
        strict: as in patch.
        fuse_residual: as in patch.

    Yields:
        The report.

    Raises:
        TypeError: as in patch.
        ValueError: as in patch.
        ImportError: as in patch.
        RuntimeError: as in patch, and at the end as in unpatch.
    """
    report, modules, constructors = _patch(target, strict, fuse_residual)
    try:
        yield report
    finally:
        for cls in constructors:
            modules += _restore_constructor(cls)
        _restore(modules)


def _patch(target: Target, strict: bool, fuse_residual: bool) -> tuple[Report, list[nn.Module], list[type]]:
    """The report, the modules that were replaced, and the classes whose constructors were."""
    classes = _classes(target)
    model = target if isinstance(target, nn.Module) else None
    if fuse_residual and model is None:
        raise TypeError(f"target must be a torch.nn.Module for fuse_residual, got {target!r}")
    named = _instances(set(classes)) if model is None else model.named_modules()
    outcomes = [(name, module, *_outcome(module)) for name, module in named]
    replacing = [(module, norm) for _, module, row, norm in outcomes if row is not None and norm is not None and row.status == "replaced"]
    rows = _counted([(None if model is None else name, row) for name, _, row, _ in outcomes if row is not None])
    replaced_classes = {type(module) for module, _ in replacing}
    rows += [_outcome_of_class(cls, cls in replaced_classes) for cls in classes]
    report = Report(tuple(rows))
    if strict and any(row.status == "left alone" and row.resembles for row in rows):
        raise RuntimeError(f"not every RMS norm can be replaced:\n{report}")
    for module, norm in replacing:
        module.__class__ = replacement(type(module), norm)
    constructors = [row.cls for row in rows if row.status == "to come" and _replace_constructor(row.cls)]
    modules = [module for module, _ in replacing]
    if fuse_residual and model is not None:
        layers = [(name, module, *_outcome_of_layer(module)) for name, module in model.named_modules()]
        report = Report((*rows, *_counted([(name, row) for name, _, row, _ in layers if row is not None])))
        for _, module, _, fusion in layers:
            if fusion is not None:
                module.__class__ = fused(type(module), fusion)
                modules.append(module)
    return report, modules, constructors


def _counted(found: list[tuple[str | None, Row]]) -> list[Row]:
    """One row for all that are equal, with their number and names."""
    names: dict[Row, list[str | None]] = {}
    for name, row in found:
        names.setdefault(row, []).append(name)
    return [replace(row, count=len(same), names=tuple(n for n in same if n is not None)) for row, same in names.items()]


def _outcome(module: nn.Module) -> tuple[Row | None, Norm | None]:
    """The row that a module belongs to, but for its count, and what is proved of it; None for what is no norm."""
    cls = type(module)
    for base in cls.__mro__:
        if is_replacement(base):
            return Row(base.__bases__[0], str(vars(base)["_triton_rmsnorm"].semantics), 0, "replaced before", resembles=True), None
    if getattr(cls.forward, "__module__", "").startswith("triton_rmsnorm."):
        return None, None
    verdict = recognize(module)
    if verdict is None:
        return None, None
    norm, reason = verdict.norm, verdict.reason
    if norm is not None:
        reason = _wrapped(module, "patch {} before")
    semantics = str(norm.semantics) if norm else ""
    return Row(cls, semantics, 0, "left alone" if reason else "replaced", reason, norm is not None or verdict.resembles), norm


def _outcome_of_layer(module: nn.Module) -> tuple[Row | None, Fusion | None]:
    """The row that a module belongs to, but for its count, if it adds and normalizes, and what of that is to be fused."""
    for base in type(module).__mro__:
        if is_derived(base) and not is_replacement(base):
            return Row(base.__bases__[0], str(vars(base)["_triton_rmsnorm"]), 0, "fused before"), None
    fusion, reason = fusible(module)
    if fusion is not None:
        reason = _wrapped(module, "patch the model before")
    if reason:
        return Row(type(module), "residual add", 0, "left alone", reason), None
    return (Row(type(module), str(fusion), 0, "fused"), fusion) if fusion is not None else (None, None)


def _wrapped(module: nn.Module, advice: str) -> str:
    """How something else has taken over this very module, if so: its behaviour is then not only its class's."""
    advice = advice.format(type(module).__name__)
    for sign in ("_hf_hook", "forward"):
        if sign in vars(module):
            return f"{'accelerate has hooked it' if sign == '_hf_hook' else 'its own forward was replaced'}: {advice}"
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if any(_distributed(type(t)) for t in tensors) or any(map(_distributed, hooks)):
        return f"torch.distributed has taken it over: {advice}"
    return ""


def _distributed(thing: Any) -> bool:
    return str(getattr(inspect.unwrap(getattr(thing, "func", thing)), "__module__", "")).startswith("torch.distributed.")


def _restore(modules: Iterable[nn.Module]) -> None:
    """Gives replaced norms and fused layers among `modules` their own class again."""
    modules = list(modules)
    for module in modules:
        cls = type(module)
        if not is_derived(cls) and any(map(is_derived, cls.__mro__)):
            raise RuntimeError(f"a replaced norm or layer has become a {cls.__name__} since: undo that first")
    for module in modules:
        if is_derived(type(module)):
            module.__class__ = type(module).__bases__[0]


def _classes(target: Target) -> list[type[nn.Module]]:
    """The classes that `target` names; none for a module."""
    if isinstance(target, nn.Module):
        return []
    if isinstance(target, type) and issubclass(target, nn.Module):
        return [target]
    if isinstance(target, str):
        return _classes_of_model_type(target)
    raise TypeError(f"target must be a torch.nn.Module, a class of modules or a model type of transformers, got {target!r}")


def _classes_of_model_type(name: str) -> list[type[nn.Module]]:
    """What may be norms of the modeling files of a model type of transformers, also what they import."""
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


def _outcome_of_class(cls: type[nn.Module], has_instances: bool) -> Row:
    """What will become of instances to come, as far as a small one tells."""
    trial = _small_instance(cls)
    row = _outcome(trial)[0] if trial is not None else None
    if row is not None and row.status == "replaced":
        return replace(row, status="to come")
    if has_instances or (trial is None and may_be_norm(cls)):
        return Row(cls, "", 0, "to come", "proved when one is built")
    return row or Row(cls, "", 0, "left alone", "it is no RMS norm")


def _small_instance(cls: type[nn.Module]) -> nn.Module | None:
    """An instance of 64 columns, on no device, if the constructor asks for nothing but sizes and an epsilon."""
    values = {}
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if parameter.default is parameter.empty and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            values[name] = 1e-6 if "eps" in name else 16 if "group" in name else 64
    with suppress(Exception), isolated(), torch.device("meta"):
        return cls(**values)
    return None


def _instances(classes: set[type]) -> list[tuple[str, nn.Module]]:
    return [("", thing) for thing in gc.get_objects() if type(thing) in classes] if classes else []


@dataclass(frozen=True)
class _Constructor:
    """The replaced `__init__` of a class."""

    own: Callable | None  # what it was; None if the class inherited it
    built: weakref.WeakSet  # the instances replaced after it


_CONSTRUCTORS: weakref.WeakKeyDictionary[type, _Constructor] = weakref.WeakKeyDictionary()


def _replace_constructor(cls: type[nn.Module]) -> bool:
    """Makes a class's constructor replace what it builds, where that is proved; not of subclasses. False if it does already."""
    if cls in _CONSTRUCTORS:
        return False
    constructor = _Constructor(vars(cls).get("__init__"), weakref.WeakSet())
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        if type(self) is cls:
            row, norm = _outcome(self)
            if row is not None and norm is not None and row.status == "replaced":
                self.__class__ = replacement(cls, norm)
                constructor.built.add(self)

    cls.__init__ = __init__  # type: ignore[method-assign]
    _CONSTRUCTORS[cls] = constructor
    return True


def _restore_constructor(cls: type[nn.Module]) -> list[nn.Module]:
    """Undoes `_replace_constructor`; returns the instances built in between."""
    constructor = _CONSTRUCTORS.pop(cls, None)
    if constructor is None:
        return []
    if constructor.own is None:
        del cls.__init__
    else:
        cls.__init__ = constructor.own  # type: ignore[method-assign]
    return list(constructor.built)
