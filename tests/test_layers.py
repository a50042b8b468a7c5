"""The house: who imports whom, who touches cryptography, who holds SQL.

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
NAME = PACKAGE.name


def dotted(path: Path) -> str:
    """The name of a module within the package; that of a folder is its `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"


MODULES = {dotted(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}

# A module imports only from the lines below its own, and never from `__init__`.
LAYERS = [
    {"cli", "web"},
    {"serialize"},
    {"health"},
    {"permissions"},
    {"upgrade"},
    {"rotation"},
    {"checks"},
    {"listing", "service"},
    {"instance"},
    {"last_used"},
    {"store"},
    {"changes"},
    {"inspection"},
    {"schema"},
    {"database"},
    {"config", "containment", "registry", "events"},
    {"keyfiles"},
    {"envelope"},
    {"fernet"},
    {"errors"},
]
# The same within a folder.
FOLDERS = {
    "cli": [
        {"cli"},
        {"cli.commands", "cli.keys"},
        {"cli.serve"},
        {"cli.prompt"},
        {"cli.interrupt", "cli.output"},
        {"cli.arguments"},
    ],
    "web": [
        {"web"},
        {"web.actions"},
        {"web.secrets"},
        {"web.encryption", "web.log"},
        {"web.answer"},
        {"web.present"},
        {"web.request"},
    ],
}
LOAD_EVERY_PLUGIN = ("datasette.app", "datasette.cli", "datasette.plugins")
LINES_MAX = 600

_SQL = re.compile(
    r"\b(select\s.+\sfrom|insert\s+(or\s+\w+\s+)?into|update\s+\S+\s+set|delete\s+from|"
    r"create\s+(table|index|unique)|alter\s+table|drop\s+table|pragma\s+\w+|"
    r"begin\s+immediate|(?<!-)\bvacuum\s*$)",
    re.IGNORECASE | re.DOTALL,
)


def levels(layers: list[set[str]]) -> dict[str, int]:
    return {
        name: level for level, names in enumerate(reversed(layers)) for name in names
    }


LEVEL = levels(LAYERS)


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


def own(module: str) -> set[str]:
    """The modules of this package that a module imports."""
    folder = module.split(".")[0] if module.split(".")[0] in FOLDERS else ""
    found = set()
    for name in imports(MODULES[module]):
        if not name.startswith("."):
            continue
        dots = len(name) - len(name.lstrip("."))
        inside = folder and dots == 1
        full = f"{folder}.{name[dots:]}" if inside else name[dots:]
        while full and full not in MODULES:
            full = full.rpartition(".")[0]
        found |= {full} - {""}
    return found - {module, folder}


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


def texts(tree: ast.Module) -> Iterator[str]:
    """Every string, docstrings aside; of an f-string its parts, joined."""
    skipped = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(
            node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        )
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "x"
                for part in node.values
            )
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in skipped
        ):
            yield node.value


def test_every_module_has_its_layer() -> None:
    in_folders = set().union(*(levels(layers) for layers in FOLDERS.values()))
    assert LEVEL.keys() | in_folders == MODULES.keys() - {"__init__"}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"__init__"}))
def test_a_module_imports_only_from_those_below_it(module: str) -> None:
    folder = module.split(".")[0]
    level = LEVEL[folder]
    inside = levels(FOLDERS.get(folder, []))
    for name in own(module):
        if name in inside:
            assert inside[name] < inside[module], name
        else:
            assert LEVEL[name.split(".")[0]] < level, name


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_imports_init(module: str) -> None:
    assert not {each for each in imports(MODULES[module]) if has_prefix(each, (NAME,))}
    # `from . import x` names a module, never something that stands in __init__.
    inside = module in FOLDERS or "." in module
    folder = module.split(".")[0] + "." if inside else ""
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and node.level and not node.module:
            base = folder if node.level == 1 else ""
            assert {base + alias.name for alias in node.names} <= MODULES.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_the_last_lines_of_init_load_every_plugin(module: str) -> None:
    if module.startswith("cli."):
        return  # loaded when a command is asked for: every plugin is then there
    loading = [
        node
        for node in at_import_time(MODULES[module])
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


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_is_too_long(module: str) -> None:
    path = PACKAGE.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert len(path.read_text().splitlines()) <= LINES_MAX


@pytest.mark.parametrize(
    ("library", "module"), [("nacl", "envelope"), ("cryptography", "fernet")]
)
def test_cryptography_is_touched_in_one_module(library: str, module: str) -> None:
    touching = {
        name
        for name, tree in MODULES.items()
        if any(has_prefix(each, (library,)) for each in imports(tree))
    }
    assert touching == {module}


def test_only_the_modules_of_the_database_hold_sql() -> None:
    holding = {
        name
        for name, tree in MODULES.items()
        if any(_SQL.search(text) for text in texts(tree))
    }
    # `changes` writes and reads back rows of both tables, and reads the log. `inspection`
    # reads the schema. The rule that locks the tables is a fragment for Datasette, which
    # runs it. It reads no table.
    assert holding == {"store", "changes", "inspection", "schema", "database"}


@pytest.mark.parametrize(
    "source",
    [
        'f"select {columns} from {table} where id = :id"',
        'f"update {table} set note = :note"',
        '"pragma " "integrity_check"',
    ],
)
def test_sql_is_seen_in_strings_of_every_kind(source: str) -> None:
    assert any(_SQL.search(text) for text in texts(ast.parse(f"x = {source}")))


def test_only_the_modules_of_the_database_import_sqlite() -> None:
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
    assert importing == {"store", "changes", "inspection", "schema", "database"}


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
    # Names of formats and shapes: nothing that holds a key, seals or unseals.
    assert taken <= {"ENCRYPTED_MAX_BYTES", "ENVELOPE_VERSION", "Sealed"}
