"""What the commands print: tables, JSON, values, reports and warnings."""

from __future__ import annotations

import calendar
import errno
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TextIO

import click

from .. import health, serialize
from ..errors import printable, without_frames
from ..instance import get_instance
from .arguments import with_options

if TYPE_CHECKING:
    from datasette.app import Datasette

    from .. import database, keyfiles, rotation, upgrade
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


def _styled(line: str, **style: Any) -> str:
    """The line in this style, on a terminal whose user did not set NO_COLOR."""
    is_plain = os.environ.get("NO_COLOR") or not is_terminal(sys.stdout)
    return line if is_plain or not any(style.values()) else click.style(line, **style)


def say(sentence: object, *, err: bool = False, **style: Any) -> None:
    """A line on stdout, its commands with the options that were given."""
    click.echo(_styled(with_options(printable(sentence)), **style), err=err)


def warn(sentence: str) -> None:
    """A line on stderr."""
    say(sentence, err=True)


def print_json(content: dict[str, Any]) -> None:
    """A JSON object on stdout. A damaged row may hold what JSON has no word for."""
    click.echo(json.dumps({"ok": True, **content}, indent=2, default=repr))


_HEADINGS = {
    **{"version": "VER", "key_id": "KEY", "actor_id": "BY", "at": "TIME"},
    **{"created_at": "CREATED", "updated_at": "UPDATED", "last_used_at": "USED"},
    **{"created_by": "BY", "updated_by": "BY", "last_used_by": "BY"},
}


def print_rows(
    rows: Sequence[Mapping[str, object]],
    columns: Sequence[str],
    content: dict[str, Any] | None,
) -> None:
    """The JSON `content`, or without it a table of these keys of the objects in it.

    On a terminal it is no wider than that, and shows how long ago a time is.
    """
    if content is not None:
        print_json(content)
        return
    is_short = is_terminal(sys.stdout)
    cells = [[_HEADINGS.get(key, key.upper()) for key in columns]]
    for row in rows:
        cells.append([printable(_cell(key, row[key], is_short)) for key in columns])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    limit = max(_TERMINAL_MIN, shutil.get_terminal_size().columns)
    while is_short and sum(widths) + 2 * (len(widths) - 1) > limit:
        is_last = widths[-1] > _LAST_COLUMN
        widths[-1 if is_last else widths.index(max(widths))] -= 1
    for number, line in enumerate(cells):
        padded = "  ".join(
            (cell if len(cell) <= width else f"{cell[: width - 1]}…").ljust(width)
            for cell, width in zip(line, widths, strict=True)
        )
        click.echo(_styled(padded.rstrip(), bold=number == 0))


def _cell(key: str, content: object, is_short: bool) -> object:
    if isinstance(content, dict):
        return ", ".join(f"{name}: {each}" for name, each in content.items())
    if is_short and key.endswith("at") and content:
        return _how_long_ago(str(content))
    return "" if content is None else content


def _how_long_ago(at: str) -> str:
    try:
        then = calendar.timegm(time.strptime(at, "%Y-%m-%d %H:%M:%S"))
    except ValueError:  # somebody edited the table
        return at
    for unit, name in ((31_557_600, "y"), (86_400, "d"), (3_600, "h"), (60, "min")):
        if time.time() - then >= unit:
            return f"{(time.time() - then) // unit:.0f} {name} ago"
    return "now"


def progress(label: str, steps: int) -> AbstractContextManager[Any]:
    """A bar to update with each number of steps done: on a terminal, for long work."""
    is_hidden = steps < _LONG_WORK or not is_terminal(sys.stderr)
    return click.progressbar(
        length=steps, label=label, file=sys.stderr, hidden=is_hidden
    )


@without_frames
def print_value(failure: str, value: str | None) -> None:
    """Write the value and a newline to stdout. Raises a ClickException if that fails."""
    if value is None:
        raise click.ClickException(f"{failure}: it is not set")
    if sys.stdout is None:
        raise click.ClickException(
            f"{failure}: it could not be printed: stdout is closed"
        )
    if is_terminal(sys.stdout):
        exact = value
        value = "\n".join(map(printable, exact.split("\n")))
        if value != exact:
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
    print_keys(instance, report.census)
    for remark in health.unneeded_keys(report.census):
        say(remark.message)


def print_upgrade(report: upgrade.Upgrade) -> None:
    found = health.count_versions(len(report.found))
    can = len(report.found) - len(report.problems)
    done = f"Upgraded {report.changed:,}"
    if report.dry_run:
        done = f"Would upgrade {can:,}"
    nothing = "Nothing that datasette-secrets 0.x stored is left"
    say(f"{done} of {found}" if report.found else nothing)
    print_problems(report.problems)


def print_verification(
    found: rotation.Verification, table: list[rotation.Problem]
) -> None:
    destroyed = f" ({found.destroyed:,} destroyed)" if found.destroyed else ""
    total = health.count_versions(found.opened + len(found.problems))
    which = "All " if found.opened > 1 else ""
    if found.problems:
        which = f"{found.opened:,} of "
    say(f"{which}{total} can be decrypted{destroyed}")
    print_problems(table + found.problems)


def print_new_key(done: keyfiles.Replaced, how: str) -> None:
    first, second = {
        "new": ("New key, primary", "Old key"),
        "second": ("Primary key", "New key, not used yet"),
        # After a second swap, the other key is the new one.
        "swap": ("Primary key", "Other key"),
    }[how]
    say(f"{first}: {done.first_id}, in {done.first}")
    say(f"{second}: {done.second_id}, in {done.second}")
    if done.kept:
        say(f"The previous key of the second file is kept for backups in {done.kept}")
    new = shlex.quote(done.second if how == "second" else done.first)
    restart = "Copy both files to every server, and restart all of them"
    if how == "new":
        restart = "Restart the server"
    steps = [f"Copy {new} to a safe place, apart from the database", restart]
    following = ["new-key --swap"] if how == "second" else ["rotate-key", "status"]
    steps += [f"datasette secrets {each}" for each in following]
    say("Next:")
    for number, step in enumerate(steps, 1):
        say(f"  {number}. {step}")


def path_of(datasette: Datasette) -> str:
    """The database of the secrets, fit to be shown: its resolved path."""
    db = get_instance(datasette).db
    return printable(os.path.realpath(db.path) if db.path else db.name)


def print_problems(problems: list[rotation.Problem]) -> None:
    for problem in problems:
        say(problem.message, fg="red")
        say(f"  {problem.remedy}")


def print_keys(instance: Instance, census: rotation.Census) -> None:
    for key in health.key_rows(instance, census):
        role = "configured" if key.configured else "not configured"
        source = f", {key.source}" if key.source else ""
        versions = f"wraps {health.count_versions(key.versions)}"
        say(f"  {key.id}  {'primary' if key.primary else role}{source}: {versions}")


def finish(clean_up: database.CleanUp | None) -> int:
    """Say what a clean-up left behind. Returns the exit code."""
    if clean_up is not None and clean_up.remains:
        warn(f"{clean_up.remains[0].upper()}{clean_up.remains[1:]}")
    return serialize.exit_code_of_clean_up(clean_up)
