"""Every wait in the tests and scripts has a deadline, so that a hang is a failure.

Read from the source. pytest-timeout ends whatever waits in a way that this does not see.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
PROCESSES = {"run", "call", "check_call", "check_output"}
#: For each method, how many positional arguments it takes before its deadline.
METHODS = {"communicate": 1, "wait": 0, "join": 0}


def endless(source: str) -> Iterator[str]:
    """The calls that wait and have no deadline."""
    tree = ast.parse(source)
    limited = {
        argument
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "asyncio.wait_for"
        for argument in call.args
    }
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        owner, method = ast.unparse(call.func.value), call.func.attr
        if owner == "subprocess":
            waits, before = method in PROCESSES, None
        elif owner == "asyncio":
            waits, before = method == "wait", None
        else:
            waits, before = method in METHODS, METHODS.get(method)
        has_deadline = (
            call in limited
            or any(keyword.arg == "timeout" for keyword in call.keywords)
            or (before is not None and len(call.args) > before)
        )
        # Nobody can set an event without a name: what waits for it is a hang under test.
        if waits and not has_deadline and owner != "asyncio.Event()":
            yield f"line {call.lineno}: {ast.unparse(call)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_wait_has_a_deadline(path: Path) -> None:
    assert list(endless(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "wait",
    [
        "subprocess.run(command)",
        "process.communicate(text)",
        "self._process.wait()",
        "thread.join()",
        "await asyncio.wait(tasks)",
        "await event.wait()",
    ],
)
def test_a_wait_without_a_deadline_is_found(wait: str) -> None:
    assert list(endless(wait))


@pytest.mark.parametrize(
    "wait",
    [
        "subprocess.run(command, timeout=60)",
        "process.communicate(timeout=60)",
        "process.wait(60)",
        "thread.join(60)",
        "await asyncio.wait_for(event.wait(), 60)",
        "', '.join(names)",
    ],
)
def test_a_wait_with_a_deadline_is_not(wait: str) -> None:
    assert not list(endless(wait))
