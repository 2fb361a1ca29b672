"""The source of a layer's forward: which sums go straight into a norm, and the same forward with these sums and norms fused.

The statements

    hidden_states = residual + hidden_states
    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)

become

    y, hidden_states = self.<ADD>(residual, hidden_states, self.post_attention_layernorm)
    residual = hidden_states
    hidden_states = y

Decorators, and whatever else is wrapped around the forward, are copied as they are, not run again. Between the sum and the norm there may
be only other names for the sum, and the norm must be the first thing that its statement computes, so that everything is computed in the
order of the source.
"""

import ast
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from triton_rmsnorm.patching.report import LeftAloneError

# Names in rewritten forwards: of an attribute of self, which adds and normalizes, and of a norm's output.
ADD, _Y = "_triton_rmsnorm_add", "_triton_rmsnorm_y"


@dataclass(frozen=True)
class _Site:
    """A sum and the norm of it."""

    norm: str
    written: str  # how the sum is written if it cannot be rewritten
    block: list[ast.stmt]
    add: ast.stmt
    call: ast.Call  # of the norm
    user: ast.stmt  # the statement of the call


class Source:
    """The source of a forward: what it says, and rewritten."""

    def __init__(self, forward: Callable):
        self.forward = forward
        self.function = inspect.unwrap(forward)
        if not isinstance(self.function, types.FunctionType):
            raise LeftAloneError("its forward is not a Python function")
        self.code = self.function.__code__
        try:
            self.file = "".join(inspect.findsource(self.function)[0])
        except (OSError, TypeError):
            raise LeftAloneError("the source of its forward is not there") from None
        function = self._parsed()[1]
        sites = _sites(function)
        self.norms = {site.norm for site in sites if not site.written}  # submodules that are called with a sum right after it
        self.others = {site.norm: site.written for site in sites if site.written}  # with one that cannot be rewritten
        self.adds = any(map(_adds, itertools.chain(*_blocks(function))))

    def reason(self, norms: set[str]) -> str:
        """Why no sum is fused with these norms; "" if there is none."""
        if others := sorted(norms & self.others.keys()):
            return f"the sum before {others[0]} is {self.others[others[0]]}"
        return "no sum goes straight into a replaced norm" if self.adds else ""

    def rewritten(self, norms: tuple[str, ...], outermost: Callable) -> Callable:
        """The forward with the sums before these norms fused, in copies of its wrappers, which take `outermost` for the outermost one."""
        if self.code.co_freevars:
            raise LeftAloneError(f"its forward uses variables of an enclosing scope: {', '.join(self.code.co_freevars)}")
        tree, function = self._parsed()
        if self._compiled(tree) != self.code:
            raise LeftAloneError("its forward is not what its source says")
        _fuse([site for site in _sites(function) if site.norm in norms and not site.written], function.args.args[0].arg)
        rewritten = _copied(self.function, self._compiled(ast.fix_missing_locations(tree)), {})
        for wrapper in reversed(_wrappers(self.forward)):
            replaced = {id(wrapper.__wrapped__): rewritten}
            if not isinstance(wrapper, types.FunctionType) or not any(id(bound) in replaced for bound in _bound(wrapper)):
                raise LeftAloneError("something is wrapped around its forward that cannot be followed")
            if wrapper is self.forward:  # a wrapper may ask whether it is the outermost one
                replaced[id(wrapper)] = outermost
            rewritten = _copied(wrapper, wrapper.__code__, replaced)
        return rewritten

    def _parsed(self) -> tuple[ast.Module, ast.FunctionDef]:
        """The file and the forward in it."""
        tree = ast.parse(self.file)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (node.name, _first_line(node)) == (self.code.co_name, self.code.co_firstlineno):
                return tree, node
        raise LeftAloneError("its forward is not where its source should be")

    def _compiled(self, tree: ast.Module) -> types.CodeType:
        """The code of the forward in a file. What surrounds it matters: names of imported modules are compiled in another way."""
        codes = [compile(tree, self.code.co_filename, "exec", dont_inherit=True)]
        for code in codes:
            if code.co_name == self.code.co_name and code.co_firstlineno == self.code.co_firstlineno:
                return code
            codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        raise LeftAloneError("its forward is not where its source should be")


@lru_cache(maxsize=64)
def _source(forward: Callable, code: types.CodeType | None) -> Source:
    return Source(forward)


def source_of(forward: Callable) -> Source:
    return _source(forward, getattr(inspect.unwrap(forward), "__code__", None))


def _wrappers(function: Any) -> list:
    """What is wrapped around a function, from the outside."""
    return [function, *_wrappers(function.__wrapped__)] if hasattr(function, "__wrapped__") else []


def _bound(function: types.FunctionType) -> list:
    return [cell.cell_contents for cell in function.__closure__ or ()]


def _copied(function: types.FunctionType, code: types.CodeType, replaced: dict[int, Any]) -> Any:
    """A copy of a function with this code, bound to other things in place of those with these ids."""
    cells = zip(function.__closure__ or (), _bound(function), strict=True)
    closure = tuple(types.CellType(replaced[id(bound)]) if id(bound) in replaced else cell for cell, bound in cells)
    copied: Any = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copied, function)
    del copied.__wrapped__
    vars(copied).update({name: replaced.get(id(value), value) for name, value in vars(function).items()})
    return copied


def _first_line(function: ast.FunctionDef) -> int:
    return min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])


def _sites(function: ast.FunctionDef) -> list[_Site]:
    """Sums and the norms of them."""
    if not function.args.args:
        return []
    this = function.args.args[0].arg
    if any(isinstance(node, ast.Name) and node.id == this and not isinstance(node.ctx, ast.Load) for node in ast.walk(function)):
        return []
    places = ((block, index) for block in _blocks(function) for index in range(len(block)))
    return [site for block, index in places if (site := _site(block, index, this)) is not None]


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


def _sum(statement: ast.stmt) -> tuple[str, list[ast.expr], str] | None:
    """The name and the operands of a sum that gets a name, and how it is written if it cannot be rewritten."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.BinOp(left, ast.Add(), right)):
            return name, [left, right], ""
        case ast.AugAssign(ast.Name(id=name) as left, ast.Add(), right):
            return name, [left, right], "written as `x += ...`, which changes a tensor that may have other names"
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.BinOp(left, ast.Add(), right)):
            return name, [left, right], "an assignment with an annotation"
        case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
            for target, value in zip(names, values, strict=False):
                match target, value:
                    case ast.Name(id=name), ast.BinOp(left, ast.Add(), right):
                        return name, [left, right], "one of several values of an assignment"
    return None


def _adds(statement: ast.stmt) -> bool:
    """Whether something is added to a variable."""
    name, operands, written = _sum(statement) or ("", [], "")
    return not written and any(isinstance(one, ast.Name) and one.id == name for one in operands)


def _site(block: list[ast.stmt], index: int, this: str) -> _Site | None:
    """The site whose sum is statement `index` of `block`, if that is one."""
    found = _sum(block[index])
    if found is None:
        return None
    name, _, written = found
    names = {name}
    for statement in block[index + 1 :]:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Name(id=value)):
                names = names | {name} if value in names else names - {name}
            case ast.Assign(value=value) | ast.Expr(value=value) | ast.Return(value=ast.expr() as value):
                match _first(value):
                    case ast.Call(ast.Attribute(ast.Name(id=owner), norm), [ast.Name(id=name)], []) as call:
                        if owner == this and name in names:
                            return _Site(norm, written, block, block[index], call, statement)
                return None
            case _:
                return None
    return None


# Evaluating these evaluates their parts, in the order of their fields.
_IN_ORDER = (ast.BinOp, ast.UnaryOp, ast.Call, ast.keyword, ast.Attribute, ast.Subscript, ast.Tuple, ast.List)


def _first(node: ast.AST) -> ast.expr | None:
    """The first thing that evaluating `node` does, apart from loading names, attributes and constants."""
    if isinstance(node, _IN_ORDER):  # what may be evaluated at another time or not at all counts as a whole
        for part in ast.iter_child_nodes(node):
            first = _first(part)
            if first is not None:
                return first
    return node if isinstance(node, ast.expr) and not isinstance(node, (ast.Name, ast.Attribute, ast.Constant)) else None


def _fuse(sites: list[_Site], this: str) -> None:
    """Rewrites sites in place."""
    for site in sites:
        add, user = site.add, site.user
        assert isinstance(add, ast.Assign) and isinstance(add.value, ast.BinOp)
        operands = [add.value.left, add.value.right, _attribute(this, site.norm)]
        add.targets = [ast.Tuple([ast.Name(_Y, ast.Store()), *add.targets], ast.Store())]
        add.value = ast.copy_location(ast.Call(_attribute(this, ADD), operands, []), add.value)
        _ReadOutput(site.call).visit(user)
        # The norm's output should live no longer than it did.
        if not isinstance(user, ast.Return) and all(user is not other.add for other in sites):
            site.block.insert(site.block.index(user) + 1, ast.copy_location(ast.Delete([ast.Name(_Y, ast.Del())]), user))


def _attribute(this: str, name: str) -> ast.Attribute:
    return ast.Attribute(ast.Name(this, ast.Load()), name, ast.Load())


class _ReadOutput(ast.NodeTransformer):
    """Puts the norm's output in place of its call."""

    def __init__(self, call: ast.Call):
        self.call = call

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if node is self.call:
            return ast.copy_location(ast.Name(_Y, ast.Load()), node)
        self.generic_visit(node)
        return node
