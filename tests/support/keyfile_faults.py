"""Kills a change of the key files at each of its writes, syncs, renames and removals.

    LD_PRELOAD=fault_shim.so python -m support.keyfile_faults > report.json

For each way to change them, and each way to be killed, a forked process is killed at the
n-th change. What is left is looked at, and the same change is run again. The report says
how many were killed, and what was wrong, in words and key IDs. tests/test_keyfiles.py
starts this.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from support.faults import KILLS, in_child, shim

from datasette_secrets import SecretsError, envelope, keyfiles

FIRST, SECOND = "master.key", "old-master.key"


def ids_in(folder: Path) -> set[str]:
    """The key IDs of all the files there that hold a whole key."""
    found = set()
    for path in folder.iterdir():
        try:
            found |= set(keyfiles.key_ids(path.read_text()))
        except SecretsError:
            continue
    return found


def id_in(path: Path) -> str:
    return "".join(keyfiles.key_ids(path.read_text()))


def run(folder: Path, how: str, needed: str) -> str:
    try:
        keyfiles.replace([str(folder / FIRST), str(folder / SECOND)], how, {needed})
    except SecretsError as error:
        return str(error)
    return ""


def killed_at(folder: Path, how: str, needed: str, mode: int, point: int) -> bool:
    def work() -> str:
        shim().fault_arm(str(folder).encode(), point, mode)
        return run(folder, how, needed)

    status, said = in_child(work)
    assert os.WIFSIGNALED(status) or said == "", said
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def look(folder: Path, how: str, current: str, other: str) -> list[str]:
    """What is wrong after a kill, and after the same change was run again."""
    wrong = []
    first, second = folder / FIRST, folder / SECOND
    if current not in (id_in(first), id_in(second)):
        wrong.append("a key that rows need is in neither file")
    if other and other not in ids_in(folder):
        wrong.append("a key was lost")
    moved = id_in(first) != current
    said = run(folder, how, current)
    if said and not (moved and how != "second"):
        wrong.append(f"the next run refused: {said}")
    held = (id_in(first), id_in(second))
    if how == "second":
        is_finished = held[0] == current and held[1] not in ("", current, other)
    else:
        is_finished = held[1] == current and held[0] not in ("", current)
    if how == "swap":
        is_finished &= held[0] == other
    if not is_finished:
        wrong.append("not finished")
    if other and other not in ids_in(folder):
        wrong.append("a key was lost by the next run")
    if any(path.name.startswith(".") for path in folder.iterdir()):
        wrong.append("a file was left over")
    return wrong


def main() -> None:
    killed, wrong = 0, []
    ways = (
        ("new", ""),
        ("new", "old"),
        ("second", ""),
        ("second", "old"),
        ("swap", "new"),
    )
    for (how, held), mode in itertools.product(ways, KILLS):
        for point in itertools.count(1):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name).resolve()
                keys = [envelope.generate_master_key() for _ in range(2)]
                (folder / FIRST).write_text(keys[0] + "\n")
                (folder / SECOND).write_text(keys[1] if held else "")
                current = id_in(folder / FIRST)
                other = id_in(folder / SECOND)
                if not killed_at(folder, how, current, KILLS[mode], point):
                    break
                killed += 1
                for each in look(folder, how, current, other):
                    wrong.append(f"{how} {held} {mode} at {point}: {each}")
    json.dump({"killed": killed, "wrong": wrong}, sys.stdout)


if __name__ == "__main__":
    main()
