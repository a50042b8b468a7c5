"""The house: who imports whom, who touches cryptography, who runs SQL.

Read from the source, so that an import inside a function counts as well.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import datasette_secrets

PACKAGE = Path(datasette_secrets.__file__).parent
MODULES = {path.stem: ast.parse(path.read_text()) for path in PACKAGE.glob("*.py")}

# A module imports from modules of the lines below its own, and never from `__init__`.
LAYERS = [
    {"cli", "views"},
    {"reports"},
    {"body", "display", "values"},
    {"shell"},
    {"group"},
    {"rotation", "guard"},
    {"service"},
    {"uses", "events"},
    {"registry", "config"},
    {"store"},
    {"envelope"},
    {"legacy"},
    {"errors"},
]
LEVEL = {name: level for level, names in enumerate(reversed(LAYERS)) for name in names}
LOAD_EVERY_PLUGIN = ("datasette.app", "datasette.cli", "datasette.plugins")

_SQL = re.compile(
    r"\b(select\s.+\sfrom|insert\s+(or\s+\w+\s+)?into|update\s+\S+\s+set|delete\s+from|"
    r"create\s+(table|index|unique)|alter\s+table|drop\s+table|pragma\s+\w+|"
    r"begin\s+immediate|(?<!-)\bvacuum\s*$)",
    re.IGNORECASE | re.DOTALL,
)


def imports(node: ast.AST) -> Iterator[str]:
    """The dotted names that statements in `node` import; ours begin with a dot."""
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            yield from (alias.name for alias in each.names)
        elif isinstance(each, ast.ImportFrom):
            base = "." * each.level + (each.module or "")
            yield base
            separator = "" if base.endswith(".") else "."
            yield from (f"{base}{separator}{alias.name}" for alias in each.names)


def own(names: Iterator[str]) -> set[str]:
    """The modules of this package among imported names."""
    relative = {name.lstrip(".").split(".")[0] for name in names if name[:1] == "."}
    return relative & MODULES.keys()


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def at_import_time(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run when the module is imported."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        if is_for_types_only(node) or isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef)
        ):
            continue
        yield node
        waiting += [
            each for each in ast.iter_child_nodes(node) if isinstance(each, ast.stmt)
        ]


def has_prefix(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == each or name.startswith(each + ".") for each in prefixes)


def test_every_module_has_its_layer() -> None:
    assert LEVEL.keys() == MODULES.keys() - {"__init__"}


@pytest.mark.parametrize("module", sorted(LEVEL))
def test_a_module_imports_only_from_those_below_it(module: str) -> None:
    imported = own(imports(MODULES[module])) - {module}
    assert {name for name in imported if LEVEL[name] >= LEVEL[module]} == set()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_imports_init(module: str) -> None:
    names = set(imports(MODULES[module]))
    assert not {name for name in names if has_prefix(name, ("datasette_secrets",))}
    # `from . import x` names a module, never something that stands in __init__.
    from_package = {
        alias.name
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.ImportFrom) and node.level == 1 and not node.module
        for alias in node.names
    }
    assert from_package <= MODULES.keys() - {"__init__"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_the_last_lines_of_init_load_every_plugin(module: str) -> None:
    statements = list(at_import_time(MODULES[module]))
    loading = [
        node
        for node in statements
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and any(has_prefix(name, LOAD_EVERY_PLUGIN) for name in imports(node))
    ]
    if module != "__init__":
        assert loading == []
        return
    body = MODULES[module].body
    assert loading == [body[-2]]
    assert ast.unparse(body[-2]) == "from datasette.plugins import pm"
    assert ast.unparse(body[-1]).startswith("pm.add_hookspecs(")


@pytest.mark.parametrize(
    ("library", "module"), [("nacl", "envelope"), ("cryptography", "legacy")]
)
def test_cryptography_is_touched_in_one_module(library: str, module: str) -> None:
    touching = {
        name
        for name, tree in MODULES.items()
        if any(has_prefix(each, (library,)) for each in imports(tree))
    }
    assert touching == {module}


def test_only_store_holds_sql() -> None:
    holding = set()
    for name, tree in MODULES.items():
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(
                node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            )
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        texts = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
        ]
        if any(_SQL.search(text) for text in texts):
            holding.add(name)
    # The rule that locks the table is a fragment for Datasette, which runs it. It reads
    # no table.
    assert "store" in holding
    assert holding <= {"store"}


def test_only_store_imports_sqlite() -> None:
    importing = {
        name
        for name, tree in MODULES.items()
        if any(
            has_prefix(each, ("sqlite3", "sqlite_utils"))
            for node in at_import_time(tree)
            for each in imports(node)
            if isinstance(node, (ast.Import, ast.ImportFrom))
        )
    }
    assert importing == {"store"}


def test_store_and_envelope_know_nothing_of_each_others_matter() -> None:
    assert not {
        name
        for name in imports(MODULES["envelope"])
        if has_prefix(name, ("datasette",))
    }
    taken = {
        alias.name
        for node in ast.walk(MODULES["store"])
        if isinstance(node, ast.ImportFrom) and node.module == "envelope"
        for alias in node.names
    }
    # Names of formats and shapes: nothing that holds a key, seals or opens.
    assert taken <= {"ENVELOPE_VERSION", "Sealed"}
