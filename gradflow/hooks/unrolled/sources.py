"""Where in the user's source a loop stands, and which variables it carries."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import linecache
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor, nn

TORCH_CODE = "torch."
Loop = ast.For | ast.While
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class SourceLoop:
    """A loop of the user's source."""

    file: str
    line: int
    # variables it carries that reach the weights, in the order in which their values are made
    carried: tuple[str, ...]
    certain: bool  # whether that order is that in which the values are made
    before_written: tuple[str, ...] = ()  # all that it reads before it writes it

    @property
    def where(self) -> str:
        """The file as a reader would name it, and the line."""
        name = os.path.relpath(self.file) if os.path.isabs(self.file) else self.file
        return f"{self.file if name.startswith('..') else name}:{self.line}"


def in_class(module: nn.Module, attributes: set[str], led: str = "") -> SourceLoop | None:
    """The loop of a module's class that uses these attributes of it: parameters or modules.

    led: of the methods that this one leads to alone.
    """
    for file, scope in _scopes_of(module):
        methods = [statement for statement in scope.body if isinstance(statement, Function)]
        names = _led_to({led}, methods) if led else {method.name for method in methods}
        found = _in_methods(file, [m for m in methods if m.name in names], attributes)
        if found is not None:
            return found
    return None


def in_functions(
    module: nn.Module, attributes: set[str], frames: Sequence[FrameType]
) -> SourceLoop | None:
    """The same loop in a function beside the module's class, or in one of the code that runs."""
    called = {name for _, scope in _scopes_of(module) for name in _mentioned(scope)}
    called |= {frame.f_code.co_name for frame in frames}
    files = [file for _, file in _classes(module)] + [f.f_code.co_filename for f in frames]
    for file in dict.fromkeys(files):
        found = _anywhere(file, attributes, called)
        if found is not None:
            return found
    return None


def inside(module: nn.Module) -> SourceLoop | None:
    """A loop in a module's own methods that uses its weights and carries something, if there is one."""
    attributes = {name for name, _ in module.named_children()}
    attributes |= {name for name, _ in module.named_parameters(recurse=False)}
    found = in_class(module, attributes)
    return found if found is not None and found.carried else None


def kept(module: nn.Module) -> list[str]:
    """The attributes in which a module's forward keeps something for its next call."""
    for file, scope in _scopes_of(module):
        for method in scope.body:
            if isinstance(method, ast.FunctionDef) and method.name == "forward":
                found = _described(file, _as_loop(method), set()).before_written
                mine = f"{method.args.args[0].arg}." if method.args.args else "self."
                return [name for name in found if name.startswith(mine)]
    return []


def _as_loop(method: ast.FunctionDef) -> ast.While:
    """A method's body as that of a loop: what it carries is what it keeps from call to call."""
    return ast.While(test=ast.Constant(True), body=method.body, orelse=[], lineno=method.lineno)


def _classes(module: nn.Module) -> list[tuple[type, str]]:
    """The classes of a module that are the user's own, and their files."""
    kinds = [kind for kind in type(module).__mro__ if not kind.__module__.startswith(TORCH_CODE)]
    return [(kind, file) for kind in kinds if (file := _file_of(kind)) is not None]


def _scopes_of(module: nn.Module) -> Iterator[tuple[str, ast.ClassDef]]:
    """The source of a module's classes, as far as it is to be had."""
    for kind, file in _classes(module):
        codes = [
            getattr(inspect.unwrap(f), "__code__", None) for f in vars(kind).values() if callable(f)
        ]
        lines = [code.co_firstlineno for code in codes if code is not None]
        for scope in _scopes(file):
            if not isinstance(scope, ast.ClassDef) or scope.name != kind.__name__:
                continue
            last = scope.end_lineno or scope.lineno  # several may have one name
            if not lines or any(scope.lineno <= line <= last for line in lines):
                yield file, scope


PLAIN = "{0}", ""
FLAT = "{0}.flatten(1)", ".view_as({0})"  # states (B, ...) as the rows that tap takes, and back
FLAT_IN_TIME = "{0}.transpose(0, 1).flatten(1)", ".unflatten(1, (len({0}), -1)).transpose(0, 1)"


def keeping(modules: Iterable[nn.Module], shape: tuple[int, ...]) -> SourceLoop | None:
    """The forward of a module that keeps a state with a gradient, of this shape if any, as a loop."""
    for holder, name in ((module, name) for module in modules for name in kept(module)):
        state = getattr(holder, name.rpartition(".")[2], None)
        if not isinstance(state, Tensor) or (shape and tuple(state.shape) != shape):
            continue
        if state.requires_grad:
            code = inspect.unwrap(type(holder).forward).__code__
            return SourceLoop(code.co_filename, code.co_firstlineno, (name,), certain=True)
    return None


def insertion(found: SourceLoop | None, form: tuple[str, str] = PLAIN) -> str:
    """The line that marks the states of a loop; form: how a state becomes rows, and is made of them."""
    names = found.carried if found is not None else ()
    plain = [name.rpartition(".")[2] for name in names]
    if form[1]:  # one state: of several it is not known which are no rows
        name = names[0] if len(names) == 1 and plain[0].isidentifier() else "h"
        short = name.rpartition(".")[2]
        return f"{name} = gradflow.tap({short}={form[0].format(name)}){form[1].format(name)}"
    if not names or not all(name.isidentifier() for name in plain) or len(set(plain)) < len(plain):
        return "h, c = gradflow.tap(h=h, c=c)" if len(names) > 1 else "h = gradflow.tap(h=h)"
    given = ", ".join(f"{short}={name}" for short, name in zip(plain, names, strict=True))
    return f"{', '.join(names)} = gradflow.tap({given})"


# --------------------------------------------------------------------------------------- the files


def _file_of(kind: type) -> str | None:
    try:
        return inspect.getsourcefile(kind)
    except (TypeError, OSError):
        pass
    forward = inspect.unwrap(vars(kind)["forward"]) if "forward" in vars(kind) else None
    code = getattr(forward, "__code__", None)
    return code.co_filename if code is not None else None


def _scopes(file: str) -> Iterator[ast.AST]:
    tree = _tree(file, "".join(linecache.getlines(file)))
    return iter(()) if tree is None else ast.walk(tree)


@functools.lru_cache(maxsize=16)
def _tree(file: str, text: str) -> ast.Module | None:
    try:
        return ast.parse(text) if text else None
    except (SyntaxError, ValueError):
        return None


def _mentioned(node: ast.AST) -> set[str]:
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


def _led_to(start: set[str], functions: Sequence[Function]) -> set[str]:
    """The names that some lead to, where a function leads to all that it mentions."""
    found = set(start)
    for _ in functions:
        found |= {name for f in functions if f.name in found for name in _mentioned(f)}
    return found


def _in_methods(file: str, methods: list[Function], attributes: set[str]) -> SourceLoop | None:
    """The loop of one of these methods that uses them, itself or through another method."""
    wanted = set(attributes)
    for _ in range(4):  # a method that calls a method that uses them uses them
        for method in methods:
            found = _innermost(_of_itself(method, wanted - attributes), wanted, own=True)
            if found is not None:
                return _described(file, found, wanted)
        more = {m.name for m in methods if _mentions(m, wanted, own=True)} - wanted
        if not more:
            return None
        wanted |= more
    return None


class _OthersMethods(ast.NodeTransformer):
    """Takes the names of methods off everything but a method's own object: layer.reset() is not self's."""

    def __init__(self, own: str, methods: set[str]) -> None:
        self.own, self.methods = own, methods

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        others = not (isinstance(node.value, ast.Name) and node.value.id == self.own)
        return node.value if others and node.attr in self.methods else node


def _of_itself(method: Function, methods: set[str]) -> ast.AST:
    if not methods or not method.args.args:
        return method
    return _OthersMethods(method.args.args[0].arg, methods).visit(copy.deepcopy(method))


def _anywhere(file: str, attributes: set[str], called: set[str]) -> SourceLoop | None:
    """The only one of a file, or of what was called there; of several there is none that is sure."""
    body = getattr(next(_scopes(file), None), "body", [])
    functions = [statement for statement in body if isinstance(statement, Function)]
    led = _led_to(called, functions)
    every = [
        (s, _innermost(s, attributes, own=False)) for s in body if not isinstance(s, ast.ClassDef)
    ]
    loops = [(getattr(s, "name", "<module>") in led, loop) for s, loop in every if loop]
    found = [loop for was_called, loop in loops if was_called] or [loop for _, loop in loops]
    return _described(file, found[0], attributes) if len(found) == 1 else None


# --------------------------------------------------------------------------------------- the loops


def _mentions(node: ast.AST, attributes: set[str], *, own: bool) -> bool:
    for part in ast.walk(node):
        if not isinstance(part, ast.Attribute) or part.attr not in attributes:
            continue
        if not own or isinstance(part.value, ast.Name):
            return True
    return False


def _innermost(node: ast.AST, attributes: set[str], *, own: bool) -> Loop | None:
    """The innermost loop whose body uses them; one that only goes over them is passed by."""
    best: Loop | None = None
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            continue
        inner = _innermost(child, attributes, own=own)
        best = best or inner
    if best is not None or not isinstance(node, ast.For | ast.While):
        return best
    index = _names(node.target) if isinstance(node, ast.For) else set()
    for statement in node.body:
        for part in ast.walk(statement):
            if not isinstance(part, ast.Subscript) or not index & _names(part.slice):
                continue
            if _mentions(part.value, attributes, own=own):
                return None  # another weight every time: a loop over layers
    body = ast.Module(body=node.body, type_ignores=[])
    return node if _mentions(body, attributes, own=own) else None


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


# --------------------------------------------------------------------------- what a loop carries


@dataclass(frozen=True)
class _Step:
    """One assignment in a loop's body."""

    writes: tuple[str, ...]
    reads: frozenset[str]
    uses: bool  # whether the weights are in it
    alias: str = ""  # another variable whose value it takes over
    adds_to: str = ""  # a variable that it only adds to: its old value meets no weight


def _described(file: str, loop: Loop, attributes: set[str]) -> SourceLoop:
    steps = list(_steps(loop.body, attributes))
    written: set[str] = set()
    carried: list[str] = []
    later = {name for step in steps for name in step.writes}
    for step in steps:
        for name in step.reads:
            if name not in written and name in later and name not in carried:
                carried.append(name)
        written |= set(step.writes)
    reach: set[str] = {name for step in steps if step.uses for name in step.reads - {step.adds_to}}
    for _ in steps:  # what goes into what the weights are used on
        reach |= {n for step in steps if reach & set(step.writes) for n in step.reads}
    states = [name for name in carried if name in reach]
    places = [_made_at(name, steps, len(steps)) for name in states]
    states = [states[i] for i in sorted(range(len(states)), key=places.__getitem__)]
    return SourceLoop(
        file, loop.lineno, tuple(states), len(set(places)) == len(places), tuple(carried)
    )


def _made_at(name: str, steps: list[_Step], before: int) -> int:
    """The last assignment that made the value of a variable."""
    for place in range(before - 1, -1, -1):
        if name in steps[place].writes:
            alias = steps[place].alias
            return _made_at(alias, steps, place) if alias else place
    return before


def _steps(body: list[ast.stmt], attributes: set[str]) -> Iterator[_Step]:
    for statement in body:
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            yield from _assignments(statement, attributes)
        elif isinstance(statement, ast.For | ast.While | ast.If | ast.With | ast.Try):
            head = getattr(statement, "iter", getattr(statement, "test", None))
            if head is not None:
                yield _Step((), frozenset(_reads(head)), _mentions(head, attributes, own=False))
            for part in ("body", "orelse", "finalbody"):
                yield from _steps(getattr(statement, part, []), attributes)
        elif isinstance(statement, ast.Expr):
            uses = _mentions(statement, attributes, own=False)
            yield _Step((), frozenset(_reads(statement)), uses)


def _assignments(statement: Any, attributes: set[str]) -> Iterator[_Step]:
    """One per value, in the order in which the values are made."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    if statement.value is None:
        return
    pairs = _one_by_one(targets, statement.value)
    if pairs:
        reads = frozenset(_reads(statement.value))  # all are read before one is written
        for number, (target, value) in enumerate(pairs):
            name = _name(target)
            yield _Step(
                () if name is None else (name,),
                frozenset(_reads(value)) if number else reads,
                _mentions(value, attributes, own=False),
                _alias(value),
            )
        return
    writes_all: list[str] = []
    read = _reads(statement.value)
    for target in targets:
        flat = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
        for part in flat:
            if isinstance(part, ast.Subscript):
                read |= _reads(part.slice)
            name = _name(part)
            if name is not None:
                writes_all.append(name)
    if isinstance(statement, ast.AugAssign):
        read |= set(writes_all)
    uses = _mentions(statement, attributes, own=False)
    alias = _alias(statement.value) if not isinstance(statement, ast.AugAssign) else ""
    yield _Step(tuple(writes_all), frozenset(read), uses, alias, _sum_in(statement))


def _one_by_one(targets: list[ast.expr], value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    """Of h, c = a, b the pairs (h, a) and (c, b); of anything else none."""
    left = targets[0]
    if len(targets) > 1 or not isinstance(left, ast.Tuple) or not isinstance(value, ast.Tuple):
        return []
    return (
        list(zip(left.elts, value.elts, strict=True)) if len(left.elts) == len(value.elts) else []
    )


def _sum_in(statement: Any) -> str:
    """x of x += y and of x = x + y, where y has no x in it."""
    target = statement.target if not isinstance(statement, ast.Assign) else statement.targets[0]
    name, value = _name(target), statement.value
    if isinstance(statement, ast.AugAssign):
        others = [value] if isinstance(statement.op, ast.Add) else []
    else:
        is_sum = isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add)
        sides = [value.left, value.right] if is_sum else []
        others = [side for side in sides if _name(side) != name]
        others = others if len(others) == 1 else []
    return name or "" if others and name not in _reads(others[0]) else ""


def _alias(value: ast.AST) -> str:
    return value.id if isinstance(value, ast.Name) else ""


def _name(node: ast.AST) -> str | None:
    """A variable, an attribute of self, or "hs[...]" for a place in one."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    if isinstance(node, ast.Subscript):
        whole = _name(node.value)
        return f"{whole}[...]" if whole is not None else None
    return None


def _reads(node: ast.AST) -> set[str]:
    found: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name | ast.Attribute | ast.Subscript):
            name = _name(part)
            if name is not None:
                found.add(name)
    return found
