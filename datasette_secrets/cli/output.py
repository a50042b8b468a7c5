"""What the commands print: tables, JSON, values, reports and warnings."""

from __future__ import annotations

import datetime
import errno
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click

from .. import health, listing, serialize
from ..errors import printable, without_frames
from ..instance import get_instance
from .arguments import with_options

if TYPE_CHECKING:
    from datasette.app import Datasette

    from .. import changes, database, keyfiles, rotation, store, upgrade
    from ..instance import Instance

_LONG_WORK = 5_000
#: A last column that is wider is shortened before any other one.
_LAST_COLUMN = 12
_TERMINAL_MIN = 60


def is_terminal(stream: TextIO | None) -> bool:
    """Whether it is one. Python's name for a stream that was closed is None."""
    return stream is not None and stream.isatty()


def give_up_stdout() -> None:
    """Let Python write what is left in its buffer to nowhere when it exits."""
    if sys.stdout is None:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def say(sentence: object, *, err: bool = False, **style: Any) -> None:
    """A line on stdout, its commands with the options that were given.

    The style is for a terminal whose user did not set NO_COLOR.
    """
    line = with_options(printable(sentence))
    if style and is_terminal(sys.stdout) and not os.environ.get("NO_COLOR"):
        line = click.style(line, **style)
    click.echo(line, err=err)


def warn(sentence: str) -> None:
    """A line on stderr."""
    say(sentence, err=True)


def print_json(content: dict[str, Any]) -> None:
    """A JSON object on stdout. A damaged row may hold what JSON has no word for."""
    click.echo(json.dumps({"ok": True, **content}, indent=2, default=repr))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns on stdout, on a terminal no wider than that. None is an empty cell."""
    cells = [["" if cell is None else printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    if is_terminal(sys.stdout):
        limit = max(_TERMINAL_MIN, shutil.get_terminal_size().columns)
        while sum(widths) + 2 * (len(widths) - 1) > limit:
            is_last = widths[-1] > _LAST_COLUMN
            widths[-1 if is_last else widths.index(max(widths))] -= 1
    for number, row in enumerate([headings, *cells]):
        line = "  ".join(
            (cell if len(cell) <= width else f"{cell[: width - 1]}…").ljust(width)
            for cell, width in zip(row, widths, strict=True)
        )
        say(line.rstrip(), **({} if number else {"bold": True}))


def _time(at: object) -> object:
    """A stored time; on a terminal, how long ago that was."""
    try:
        then = datetime.datetime.fromisoformat(f"{at}+00:00")
    except ValueError:  # there is none, or a damaged one
        return at
    if not is_terminal(sys.stdout):
        return at
    passed = datetime.datetime.now(datetime.timezone.utc) - then
    for unit, name in ((31_557_600, "y"), (86_400, "d"), (3_600, "h"), (60, "min")):
        if passed.total_seconds() >= unit:
            return f"{passed.total_seconds() // unit:.0f} {name} ago"
    return "now"


@contextmanager
def progress(label: str, steps: int) -> Iterator[Callable[[int], None]]:
    """What to call with each number of steps done: a bar on a terminal for long work."""
    if steps < _LONG_WORK or not is_terminal(sys.stderr):
        yield lambda _: None
        return
    with click.progressbar(length=steps, label=label, file=sys.stderr) as bar:
        yield bar.update


@without_frames
def print_value(failure: str, value: str | None) -> None:
    """Write the value and a newline to stdout. Raises a ClickException if that fails."""
    if value is None:
        raise click.ClickException(f"{failure}: it is not set")
    if sys.stdout is None:
        raise click.ClickException(
            f"{failure}: it could not be printed: stdout is closed"
        )
    if is_terminal(sys.stdout) and _printable_lines(value) != value:
        value = _printable_lines(value)
        warn("Control characters are shown escaped. Use a pipe for the exact value")
    stream = sys.stdout.buffer
    try:
        stream.write(value.encode("utf-8", "surrogateescape") + b"\n")
        stream.flush()
    except OSError as error:
        give_up_stdout()
        reason = f"it could not be printed: {error.strerror}"
        if error.errno == errno.EPIPE:
            reason = "the pipe was closed before it was read"
        raise click.ClickException(f"{failure}: {reason}") from None


def _printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def print_rotation(instance: Instance, report: rotation.Rotation) -> None:
    versions = health.count_versions(report.to_change)
    if report.dry_run:
        done = f"Would re-wrap {versions}"
    elif report.clean_up is None:
        done = f"Nothing was changed; {versions} to re-wrap"
    else:
        done = f"Re-wrapped {health.count_versions(report.changed)}"
    if report.current:
        verb = "uses" if report.current == 1 else "use"
        done += f"; {report.current:,} already {verb} the primary key"
    say(done)
    if not report.to_change and not report.problems:
        say("To replace the master key, run 'datasette secrets new-key'")
    print_problems(report.problems)
    if report.problems and report.clean_up is None:
        say("Fix these first, or skip them with --skip-unopenable")
    if report.census is not None:
        print_keys(instance, report.census)
        for remark in health.about_slots(report.census):
            if remark.code == "old-key-unneeded":
                say(remark.message)


def print_upgrade(report: upgrade.Upgrade) -> None:
    found = health.count_versions(len(report.found))
    if not report.found:
        say("Nothing that datasette-secrets 0.x stored is left")
    elif report.dry_run:
        say(f"Would upgrade {len(report.found) - len(report.problems):,} of {found}")
    else:
        say(f"Upgraded {report.changed:,} of {found}")
    print_problems(report.problems)


def print_verification(
    found: rotation.Verification, table: list[rotation.Problem]
) -> None:
    destroyed = f" ({found.destroyed:,} destroyed)" if found.destroyed else ""
    total = health.count_versions(found.opened + len(found.problems))
    if found.problems:
        say(f"{found.opened:,} of {total} can be decrypted{destroyed}")
    else:
        every = "All " if found.opened > 1 else ""
        say(f"{every}{total} can be decrypted{destroyed}")
    print_problems(table + found.problems)


_ROTATE = ("datasette secrets rotate-key", "datasette secrets status")
_STEPS = {
    "new": (
        *(
            "Copy {first} to a safe place, apart from the database",
            "Restart the server",
        ),
        *_ROTATE,
    ),
    "second": (
        "Copy {second} to a safe place, apart from the database, and to every server",
        *("Restart every server", "datasette secrets new-key --swap"),
    ),
    "swap": ("Copy both files to every server", "Restart every server", *_ROTATE),
}


def print_new_key(done: keyfiles.Replaced, how: str) -> None:
    say(f"First:  master key {done.first_id}, in {done.first}")
    say(f"Second: master key {done.second_id}, in {done.second}")
    if done.kept:
        say(f"The previous key of the second file is kept for backups in {done.kept}")
    servers = (
        "one server (for several, use --second)" if how == "new" else "several servers"
    )
    say(f"Next, for {servers}:")
    first, second = shlex.quote(done.first), shlex.quote(done.second)
    for number, step in enumerate(_STEPS[how], 1):
        say(f"  {number}. {step.format(first=first, second=second)}")


def print_list(listed: list[listing.Listed]) -> None:
    rows: list[tuple[object, ...]] = []
    for name, state, _, newest, used, _ in listed:
        cells: tuple[object, ...] = (None,) * 6
        if newest is not None:
            changed = newest.version, _time(newest.updated_at), newest.updated_by
            cells = (*changed, _time(used.at), used.by, newest.note)
        rows.append((name, state, *cells))
    print_table(("NAME", "STATE", "VER", "UPDATED", "BY", "USED", "BY", "NOTE"), rows)


def print_history(versions: list[store.Version], states: list[str]) -> None:
    print_table(
        ("VER", "STATE", "CREATED", "BY", "USED", "BY", "KEY", "NOTE"),
        [
            (
                version.version,
                state,
                _time(version.created_at),
                version.created_by,
                _time(version.last_used_at),
                version.last_used_by,
                None if version.is_destroyed else version.key_id,
                version.note,
            )
            for version, state in zip(versions, states, strict=True)
        ],
    )


def print_log(entries: list[changes.Entry]) -> None:
    rows = []
    for each in entries:
        detail = ", ".join(f"{key}: {value}" for key, value in each.detail.items())
        change = each.action, each.name, each.version, each.actor_id, each.via
        rows.append((_time(each.at), *change, detail))
    print_table(("TIME", "ACTION", "NAME", "VER", "BY", "VIA", "DETAIL"), rows)


def path_of(datasette: Datasette) -> str:
    """The database of the secrets, fit to be shown: its resolved path."""
    db = get_instance(datasette).db
    return printable(os.path.realpath(db.path) if db.path else db.name)


def print_problems(problems: list[rotation.Problem]) -> None:
    for problem in problems:
        say(problem.message, fg="red")
        say(f"  {problem.remedy}")


def print_keys(instance: Instance, census: rotation.Census) -> None:
    for key in health.key_rows(census, instance.settings.sources):
        role = "configured" if key.is_configured else "not configured"
        source = f", {key.source}" if key.source else ""
        versions = f"wraps {health.count_versions(key.versions)}"
        say(
            f"  {key.key_id}  {'primary' if key.is_primary else role}{source}: {versions}"
        )


def finish(clean_up: database.CleanUp | None) -> int:
    """Say what a clean-up left behind. Returns the exit code."""
    if clean_up is not None and clean_up.remains:
        warn(f"{clean_up.remains[0].upper()}{clean_up.remains[1:]}")
    return serialize.exit_code_of_clean_up(clean_up)
