"""The house in numbers: depth of imports, files, lines, functions, constants, names with two meanings.

    python tests/house_counts.py              # this tree
    python tests/house_counts.py ../other     # another checkout

Read from the sources alone; nothing is imported.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*")
PUBLIC = ("gradflow.integrations.",)  # modules that users import, of which each needs its package
Trees = dict[str, ast.Module]  # dotted name -> source


def trees(folder: Path) -> Trees:
    """All modules of a package, or of a folder of tests."""
    found = {}
    for file in sorted(folder.rglob("*.py")):
        name = ".".join(file.relative_to(folder.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(file.read_text())
    return found


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """Modules of the package that are imported when this one is."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known or {node.module}
    return found & known


def longest_chain(package: Trees) -> int:
    """How many modules the longest chain of imports passes through."""
    known = set(package)

    @cache
    def depth(name: str) -> int:
        beneath = imports(package[name], known) - {name}
        return 1 + max((depth(other) for other in beneath), default=0)

    return max(depth(name) for name in package)


def functions(package: Trees) -> list[int]:
    """Lines of every function."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for tree in package.values()
        for node in ast.walk(tree)
        if isinstance(node, kinds)
    ]


def constants(package: Trees) -> Iterator[tuple[str, str, str]]:
    """(module, name, value) of every constant of a module."""
    for module, tree in package.items():
        for node in tree.body:
            value = getattr(node, "value", None)
            if isinstance(node, ast.Assign):
                target: ast.expr = node.targets[0]
            elif isinstance(node, ast.AnnAssign):
                target = node.target
            else:
                continue
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            for name, what in pairs:
                if isinstance(name, ast.Name) and CONSTANT.fullmatch(name.id) and what is not None:
                    yield module, name.id, ast.unparse(what)


def doubled(pairs: Iterator[tuple[str, str]]) -> list[str]:
    """Names that stand for more than one thing."""
    meanings = defaultdict(set)
    for name, meaning in pairs:
        meanings[name].add(meaning)
    return sorted(name for name, several in meanings.items() if len(several) > 1)


def classes(package: Trees) -> Iterator[tuple[str, str]]:
    """(name, module) of every class."""
    for module, tree in package.items():
        yield from ((node.name, module) for node in tree.body if isinstance(node, ast.ClassDef))


def internals(tests: Trees, rooms: set[str]) -> list[tuple[str, str]]:
    """(test file, import) of what tests import from deep inside the package."""
    return [
        (module, f"{node.module}.{alias.name}")
        for module, tree in tests.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.count(".") > 1
        if node.module.startswith("gradflow.") and node.module not in rooms
        if not node.module.startswith(PUBLIC)
        for alias in node.names
    ]


def counts(root: Path) -> dict[str, int | float]:
    """Every count by its words."""
    package, tests = trees(root / "gradflow"), trees(root / "tests")
    rooms = {name for name in package if name.count(".") <= 1}
    deep, all_constants = internals(tests, rooms), list(constants(package))
    files = Counter(name.rpartition(".")[2] for name in package)
    sources = [len(f.read_text().splitlines()) for f in (root / "gradflow").rglob("*.py")]
    return {
        "longest chain of imports": longest_chain(package),
        "files": len(package),
        "lines": sum(sources),
        "median lines of a function": statistics.median(functions(package)),
        "longest function": max(functions(package)),
        "module constants outside limits.py": sum(
            m != "gradflow.limits" for m, *_ in all_constants
        ),
        "constants of two values": len(doubled((n, v) for _, n, v in all_constants)),
        "classes of two meanings": len(doubled(classes(package))),
        "file names used twice": sum(count > 1 for count in files.values()),
        "test files that import internals": len({module for module, _ in deep}),
        "internals that tests import": len({name for _, name in deep}),
    }


def main(arguments: list[str], say: Callable[[str], object] = print) -> None:
    """One line for each count."""
    root = Path(arguments[0]) if arguments else Path(__file__).parent.parent
    for words, count in counts(root.resolve()).items():
        say(f"{words:40} {count:>8g}")


if __name__ == "__main__":
    main(sys.argv[1:])
