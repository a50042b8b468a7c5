"""SECURITY.md ties each claim to the tests that show it: they are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = (HERE.parent / ".github/SECURITY.md").read_text("utf-8")
CLAIM = re.compile(r"^\| (?P<claim>[^|]+) \| (?P<tests>[^|]*::[^|]*) \|$", re.MULTILINE)
TEST = re.compile(r"`(test_\w+\.py)::(\w+)`")


def names_in(file: str) -> set[str]:
    """The names that pytest collects from a file: functions, and cases by assignment."""
    tree = ast.parse((HERE / file).read_text("utf-8"))
    names = {
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    names |= {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return {name for name in names if name.lower().startswith("test")}


def test_every_claim_names_a_test() -> None:
    tables = PAGE.split("| claim | tests |")[1:]
    rows = [
        row
        for table in tables
        for row in table.partition("\n\n")[0].strip().splitlines()[1:]
    ]
    assert len(tables) == 5
    assert len(rows) > 20
    assert [row for row in rows if not CLAIM.match(row)] == []


def test_every_test_that_a_claim_names_is_there() -> None:
    named = TEST.findall(PAGE)
    assert len(named) > 40
    assert [
        f"{file}::{name}" for file, name in named if name not in names_in(file)
    ] == []


def test_every_file_that_the_page_links_to_is_there() -> None:
    links = re.findall(r"\]\((docs/[^)#]+)", PAGE)
    assert links
    assert [
        link for link in links if not (HERE.parent / ".github" / link).exists()
    ] == []
