"""The residual add taken into the norm that follows it, in layers whose source shows it and a trial confirms it.

In the forward of a layer the statements

    hidden_states = residual + hidden_states
    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)

become, if that norm is one that we have replaced,

    y, hidden_states = add_and_normalize(residual, hidden_states, self.post_attention_layernorm)
    residual = hidden_states
    hidden_states = y

and the layer gets a subclass of its class with this forward. Between the sum and the norm there may be only other names for the sum, and
the norm must be the first thing that its statement computes, so that everything is computed in the order of the source. Where our kernel
for both does not apply, `add_and_normalize` adds and calls the norm as before.

A layer is only fused after a `trial` of both forwards.
"""

import __future__

import ast
import inspect
import types
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from triton_rmsnorm.patching.isolation import isolated
from triton_rmsnorm.patching.reads import reads
from triton_rmsnorm.patching.recognition import fingerprint
from triton_rmsnorm.patching.replacement import add_and_normalize, is_replacement
from triton_rmsnorm.patching.subclass import CannotSubclassError, Mark, derived, proof_of
from triton_rmsnorm.patching.trial import FailedError, in_words, try_out

_ADD, _Y = "_triton_rmsnorm_add", "_triton_rmsnorm_y"


@dataclass(frozen=True)
class Fusion:
    """What a class made by `fused` does: sums are taken into these norms, names of submodules."""

    norms: tuple[str, ...]

    def __str__(self) -> str:
        return f"residual add in {', '.join(self.norms)}"


class _RefusedError(RuntimeError):
    """The reason why a layer is left alone."""


# Outcomes of trials, by the class of a layer and everything that its forward reads.
Memory = dict[Hashable, tuple[Fusion | None, str]]


def fused(original: type[nn.Module], fusion: Fusion) -> type[nn.Module]:
    """The subclass of `original` that computes sums together with norms.

    Raises:
        RuntimeError: the source of original.forward is not there, or has no such sums, as on a machine with another version of it.
        CannotSubclassError: the class of the original does not allow this.
    """
    # The very name of the original: it is by name that wrapping policies and device maps know layers.
    members = {_ADD: staticmethod(add_and_normalize)}
    return derived(original, fusion, original.__name__, _forward, fused, lambda layer: True, _wrapped_as_the_original, **members)


def fusible(layer: nn.Module, memory: Memory) -> tuple[Fusion | None, str]:
    """What can be fused in `layer`, or the reason why nothing can; (None, "") if it does not add and normalize.

    Args:
        layer: it is only looked at.
        memory: outcomes that the caller keeps; those of equal layers are not tried again.
    """
    replaced = {name for name, child in layer._modules.items() if child is not None and _takes_sum(child)}
    if not replaced:
        return None, ""
    try:
        source = _source_of(type(layer).forward)
        names = source.norms & replaced
        if not names:
            return None, source.reason(replaced)
        if _has_any_global_hook():
            return None, "there is a hook for all modules, which would see the trial"
        found = reads(layer, submodules=False)
        try:
            key = type(layer), tuple(sorted(names)), fingerprint(layer, found) if found else None, found
        except TypeError:
            return _tried(layer, names)
        return memory.get(key) or memory.setdefault(key, _tried(layer, names))
    except (_RefusedError, CannotSubclassError) as refused:
        return None, str(refused)


def _tried(layer: nn.Module, names: set[str]) -> tuple[Fusion | None, str]:
    """The outcome of a trial."""
    rewritten = fused(type(layer), Fusion(tuple(sorted(names)))).forward
    try:
        with isolated():
            return Fusion(tuple(sorted(try_out(layer, names, rewritten, _ADD)))), ""
    except FailedError as failed:
        return None, str(failed)


def _takes_sum(module: nn.Module) -> bool:
    return is_replacement(type(module)) and proof_of(type(module)).semantics.activation is None


def _forward(mark: Mark) -> Callable:
    source = _source_of(mark.forward)
    missing = set(mark.proof.norms) - source.norms
    if missing:
        name = mark.original.__qualname__
        raise _RefusedError(f"in {name}.forward no sum goes straight into {', '.join(sorted(missing))}")
    return source.rewritten(mark.proof.norms)


def _wrapped_as_the_original(cls: Any) -> None:
    """Makes sure that the same is wrapped around a rewritten forward as around the original's.

    Decorators are in the source. `__init_subclass__`, which wraps it in GradientCheckpointingLayer, is called if something is missing.
    """
    original = _codes(cls.__bases__[0].forward)[:-1]
    if _codes(cls.forward)[:-1] != original:
        try:
            super(cls, cls).__init_subclass__()
        except Exception as error:  # of any kind: it is others' code
            raise _RefusedError(f"its class cannot have a subclass: {in_words(error)}") from None
    if _codes(cls.forward)[:-1] != original:
        raise _RefusedError("something is wrapped around its forward that its source does not show")


@dataclass(frozen=True)
class _Site:
    """A sum and the norm of it."""

    norm: str
    add: ast.stmt
    call: ast.Call  # of the norm
    user: ast.stmt  # the statement of the call


class _Source:
    """The source of a forward: what it says, and rewritten."""

    def __init__(self, forward: Callable):
        self.forward = forward
        self.function = inspect.unwrap(forward)
        if not isinstance(self.function, types.FunctionType):
            raise _RefusedError("its forward is not a Python function")
        self.code = self.function.__code__
        try:
            self.file = "".join(inspect.findsource(self.function)[0])
        except (OSError, TypeError):
            raise _RefusedError("the source of its forward is not there") from None
        function = self._parsed()[1]
        self.norms = {site.norm for site in _sites(function, _addition)}  # submodules that are called with a sum right after it
        self.others = {site.norm: type(site.add) for site in _sites(function, _other_addition)}  # with one that is written otherwise
        statements = [statement for block in _blocks(function) for statement in block]
        self.adds = any(name in _names(parts) for name, *parts in filter(None, map(_addition, statements)))

    def reason(self, norms: set[str]) -> str:
        """Why no sum is fused with these norms; "" if there is none."""
        for name in sorted(norms & self.others.keys()):
            return f"the sum before {name} is {_WRITTEN[self.others[name]]}"
        return "no sum goes straight into a replaced norm" if self.adds else ""

    def rewritten(self, norms: tuple[str, ...]) -> Callable:
        """The forward with the sums before these norms fused."""
        if self.code.co_freevars:
            raise _RefusedError(f"its forward uses variables of an enclosing scope: {', '.join(self.code.co_freevars)}")
        tree, function = self._parsed()
        original = self._defined(function)
        codes = _codes(original)
        if self._compiled(tree) != self.code or codes[:-1] != _codes(self.forward)[-len(codes) : -1]:
            raise _RefusedError("its forward is not what its source says")
        _Fuse([site for site in _sites(function, _addition) if site.norm in norms], function.args).visit(function)
        inner = inspect.unwrap(original)
        inner.__code__ = self._compiled(ast.fix_missing_locations(tree))
        inner.__defaults__, inner.__kwdefaults__ = self.function.__defaults__, self.function.__kwdefaults__
        inner.__qualname__ = self.function.__qualname__
        return original

    def _parsed(self) -> tuple[ast.Module, ast.FunctionDef]:
        """The file and the forward in it."""
        tree = ast.parse(self.file)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (node.name, _first_line(node)) == (self.code.co_name, self.code.co_firstlineno):
                return tree, node
        raise _RefusedError("its forward is not where its source should be")

    def _compiled(self, tree: ast.Module) -> types.CodeType:
        """The code of the forward in a file. What surrounds it matters: names of imported modules are compiled in another way."""
        codes = [compile(tree, self.code.co_filename, "exec", dont_inherit=True)]
        for code in codes:
            if code.co_name == self.code.co_name and code.co_firstlineno == self.code.co_firstlineno:
                return code
            codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        raise _RefusedError("its forward is not where its source should be")

    def _defined(self, function: ast.FunctionDef) -> Callable:
        """The forward defined once more, with its decorators, in a class of the same name, among the globals of the original."""
        space: dict = {}
        name = self.function.__qualname__.split(".")[-2:][0]
        name = name if name.isidentifier() else "_"  # not <locals>
        tree = ast.parse(f"class {name}: pass")
        tree.body[0].body = [function]  # type: ignore[attr-defined]
        flags = self.code.co_flags & _FUTURE_FLAGS
        try:
            exec(compile(tree, self.code.co_filename, "exec", flags, True), self.function.__globals__, space)
        except Exception as error:  # of any kind: decorators are others' code
            raise _RefusedError(f"its forward cannot be defined again: {in_words(error)}") from None
        return vars(space[name])[function.name]


_FUTURE_FLAGS = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})


@lru_cache(maxsize=64)
def _source(forward: Callable, code: types.CodeType | None) -> _Source:
    return _Source(forward)


def _source_of(forward: Callable) -> _Source:
    return _source(forward, getattr(inspect.unwrap(forward), "__code__", None))


def _codes(function: Callable) -> list:
    """The code of a function and of what it wraps. Codes are equal if all but the file is, line numbers included."""
    codes = [getattr(function, "__code__", None)]
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
        codes.append(getattr(function, "__code__", None))
    return codes


def _first_line(function: ast.FunctionDef) -> int:
    return min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])


_Addition = tuple[str, ast.expr, ast.expr]


def _sites(function: ast.FunctionDef, addition: Callable[[ast.stmt], _Addition | None]) -> list[_Site]:
    """Sums, of the kind that `addition` finds, and the norms of them."""
    if not function.args.args:
        return []
    this = function.args.args[0].arg
    if any(isinstance(node, ast.Name) and node.id == this and not isinstance(node.ctx, ast.Load) for node in ast.walk(function)):
        return []
    sums = ((block, index, addition(statement)) for block in _blocks(function) for index, statement in enumerate(block))
    found = (_site(block, index, this, sum_[0]) for block, index, sum_ in sums if sum_ is not None)
    return [site for site in found if site is not None]


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Sequences of statements in `node`, but for those of functions and classes inside."""
    for _, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else []
        if children and isinstance(children[0], ast.stmt):
            yield children
        for child in children:
            nested = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            if isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)) and not nested:
                yield from _blocks(child)


def _addition(statement: ast.stmt) -> _Addition | None:
    """name, left and right of `name = left + right`."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.BinOp(left, ast.Add(), right)):
            return name, left, right
    return None


def _other_addition(statement: ast.stmt) -> _Addition | None:
    """The same of sums that are written in ways that are not rewritten."""
    match statement:
        case ast.AugAssign(ast.Name(id=name) as left, ast.Add(), right):
            return name, left, right
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.BinOp(left, ast.Add(), right)):
            return name, left, right
        case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
            for target, value in zip(names, values, strict=False):
                match target, value:
                    case ast.Name(id=name), ast.BinOp(left, ast.Add(), right):
                        return name, left, right
    return None


_WRITTEN: dict[type, str] = {
    ast.AugAssign: "written as `x += ...`, which changes a tensor that may have other names",
    ast.AnnAssign: "an assignment with an annotation",
    ast.Assign: "one of several values of an assignment",
}


def _names(expressions: list[ast.expr]) -> set[str]:
    return {expression.id for expression in expressions if isinstance(expression, ast.Name)}


def _site(block: list[ast.stmt], index: int, this: str, name: str) -> _Site | None:
    """The site whose sum, called `name`, is statement `index` of `block`."""
    names = {name}
    for statement in block[index + 1 :]:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Name(id=value)):
                names = names | {name} if value in names else names - {name}
            case ast.Assign(value=value) | ast.Expr(value=value) | ast.Return(value=ast.expr() as value):
                match _first(value):
                    case ast.Call(ast.Attribute(ast.Name(id=owner), norm), [ast.Name(id=name)], []) as call:
                        if owner == this and name in names:
                            return _Site(norm, block[index], call, statement)
                return None
            case _:
                return None
    return None


def _first(node: ast.expr) -> ast.expr | None:
    """The first thing that evaluating `node` does, apart from loading names, attributes and constants."""
    match node:
        case ast.BinOp():
            parts = [node.left, node.right]
        case ast.Call():
            parts = [node.func, *node.args, *(keyword.value for keyword in node.keywords)]
        case ast.Attribute():
            parts = [node.value]
        case ast.Subscript():
            parts = [node.value, node.slice]
        case ast.Tuple() | ast.List():
            parts = node.elts
        case ast.UnaryOp():
            parts = [node.operand]
        case _:  # what may be evaluated at another time or not at all counts as a whole
            parts = []
    for part in parts:
        first = _first(part)
        if first is not None:
            return first
    return None if isinstance(node, (ast.Name, ast.Attribute, ast.Constant)) else node


class _Fuse(ast.NodeTransformer):
    """Rewrites sites."""

    def __init__(self, sites: list[_Site], arguments: ast.arguments):
        self.this = arguments.args[0].arg
        self.norms = {id(site.add): site.norm for site in sites}
        self.calls = {id(site.call) for site in sites}
        self.users = {id(site.user) for site in sites if not isinstance(site.user, ast.Return)}

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if id(node) in self.calls:
            return ast.copy_location(ast.Name(_Y, ast.Load()), node)
        self.generic_visit(node)
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | list[ast.stmt]:
        self.generic_visit(node)
        addition = _addition(node)
        if addition and id(node) in self.norms:
            operands = [*addition[1:], self._attribute(self.norms[id(node)])]
            node.targets = [ast.Tuple([ast.Name(_Y, ast.Store()), *node.targets], ast.Store())]
            node.value = ast.copy_location(ast.Call(self._attribute(_ADD), operands, []), node.value)
            return node
        return self._and_forget(node)

    def visit_Expr(self, node: ast.Expr) -> ast.stmt | list[ast.stmt]:
        self.generic_visit(node)
        return self._and_forget(node)

    def _and_forget(self, node: ast.stmt) -> ast.stmt | list[ast.stmt]:
        """The norm's output should live no longer than it did."""
        if id(node) not in self.users:
            return node
        return [node, ast.copy_location(ast.Delete([ast.Name(_Y, ast.Del())]), node)]

    def _attribute(self, name: str) -> ast.Attribute:
        return ast.Attribute(ast.Name(self.this, ast.Load()), name, ast.Load())
