"""What the commands print: tables, JSON, values, reports and warnings."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click

from .. import health, serialize
from ..errors import printable
from .arguments import GIVEN

if TYPE_CHECKING:
    from .. import changes, database, keyfiles, listing, rotation, store, upgrade
    from ..instance import Instance


_LONG_WORK = 5_000


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


def styled(text: str, **style: Any) -> str:
    """`text` in this style, on a terminal whose user did not set NO_COLOR."""
    if os.environ.get("NO_COLOR") or not is_terminal(sys.stdout):
        return text
    return click.style(text, **style)


def print_json(content: dict[str, Any]) -> None:
    """A JSON object on stdout. A damaged row may hold what JSON has no word for."""
    click.echo(json.dumps(content, indent=2, default=repr))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns on stdout; None is an empty cell."""
    cells = [["" if cell is None else printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        return "  ".join(padded).rstrip()

    click.echo(styled(line(headings), bold=True))
    for row in cells:
        click.echo(line(row))


def warn(sentence: str) -> None:
    """A sentence on stderr."""
    click.echo(printable(sentence), err=True)


@contextmanager
def progress(label: str, steps: int) -> Iterator[Callable[[int], None]]:
    """What to call with each number of steps done: a bar on a terminal for long work."""
    if steps < _LONG_WORK or not is_terminal(sys.stderr):
        yield lambda _: None
        return
    with click.progressbar(length=steps, label=label, file=sys.stderr) as bar:
        yield bar.update


def count(number: int, noun: str) -> str:
    """`1 version`, `2 versions`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def print_value(value: str | None) -> str | None:
    """Write the value and a newline to stdout; returns what went wrong, if anything."""
    if value is None:
        return "it is not set"
    if sys.stdout is None:
        return "it could not be printed: stdout is closed"
    if is_terminal(sys.stdout) and printable_lines(value) != value:
        value = printable_lines(value)
        warn(
            "Control characters of the value are shown escaped. Use a pipe for its bytes"
        )
    stream = sys.stdout.buffer
    try:
        stream.write(value.encode("utf-8", "surrogateescape") + b"\n")
        stream.flush()
    except OSError as error:
        give_up_stdout()
        if error.errno == errno.EPIPE:
            return "the pipe was closed before it was read"
        return f"it could not be printed: {error.strerror}"
    return None


def print_rotation(instance: Instance, report: rotation.Rotation) -> None:
    versions = count(report.to_change, "version")
    current = f"{report.current:,} {'is' if report.current == 1 else 'are'} current"
    if report.dry_run:
        click.echo(f"Would re-wrap {versions}; {current}")
    elif report.clean_up is None:
        click.echo(f"Nothing was changed; {versions} to re-wrap, {current}")
    else:
        click.echo(
            f"Re-wrapped {count(report.changed, 'version')}; "
            f"{report.current:,} had nothing to change"
        )
    if not report.to_change and not report.problems:
        click.echo("To replace the master key, put a new one first in encryption-key")
    print_problems(report.problems)
    if report.problems and report.clean_up is None:
        click.echo("Deal with these first, or rotate the rest with --skip-unopenable")
    if report.census is not None:
        print_keys(instance, report.census)


def print_upgrade(report: upgrade.Upgrade) -> None:
    found = count(len(report.found), "version")
    if not report.found:
        click.echo("Nothing that datasette-secrets 0.x stored is left")
    elif report.dry_run:
        opens = len(report.found) - len(report.problems)
        click.echo(f"Would bring in {opens:,} of {found}")
    else:
        click.echo(f"Brought in {report.changed:,} of {found}")
    print_problems(report.problems)


_NEXT = {
    "new": """\
Next, for one server (for several, see new-key --second in the help):
  1. Copy {first} to a safe place, apart from the database
  2. Restart the server
  3. datasette secrets rotate-key {options}
  4. datasette secrets status {options}""",
    "second": """\
Next, since there are several servers:
  1. Copy {second} to a safe place, apart from the database
  2. Copy it to every server as well, and restart all of them
  3. datasette secrets new-key --swap {options}""",
    "swap": """\
Next, since there are several servers:
  1. Copy both files to every server, and restart all of them
  2. datasette secrets rotate-key {options}
  3. datasette secrets status {options}""",
}


def print_new_key(done: keyfiles.Replaced, how: str) -> None:
    click.echo(f"First:  master key {done.first_id}, in {printable(done.first)}")
    click.echo(f"Second: master key {done.second_id}, in {printable(done.second)}")
    if done.kept:
        click.echo(
            f"No row needs the key that was there. It is kept in {printable(done.kept)}, "
            "since backups may need it"
        )
    options = click.get_current_context().meta[GIVEN]
    quoted = {name: shlex.quote(path) for name, path in vars(done).items() if path}
    click.echo(printable_lines(_NEXT[how].format(**quoted, options=options)))


def printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def print_list(listed: list[listing.Listed]) -> None:
    print_table(
        ("NAME", "STATE", "VERSION", "UPDATED", "BY", "LAST USED", "BY", "NOTE"),
        [(each.name, each.state, *_newest_cells(each)) for each in listed],
    )


def _newest_cells(listed: listing.Listed) -> tuple[object, ...]:
    newest, used = listed.newest, listed.used
    if newest is None:
        return (None,) * 6
    return (
        newest.version,
        newest.updated_at,
        newest.updated_by,
        used.at,
        used.by,
        newest.note,
    )


def print_history(versions: list[store.Version], states: list[str]) -> None:
    print_table(
        ("VERSION", "STATE", "CREATED", "BY", "LAST USED", "BY", "KEY", "NOTE"),
        [
            (
                version.version,
                state,
                version.created_at,
                version.created_by,
                version.last_used_at,
                version.last_used_by,
                None if version.is_destroyed else version.key_id,
                version.note,
            )
            for version, state in zip(versions, states, strict=True)
        ],
    )


def print_log(entries: list[changes.Entry]) -> None:
    print_table(
        ("TIME (UTC)", "ACTION", "NAME", "VERSION", "BY", "VIA", "DETAIL"),
        [
            (
                each.at,
                each.action,
                each.name,
                each.version,
                each.actor_id,
                each.via,
                ", ".join(f"{key}: {value}" for key, value in each.detail.items()),
            )
            for each in entries
        ],
    )


def shown_database(instance: Instance) -> str:
    return printable(serialize.database_path(instance))


def print_problems(problems: list[rotation.Problem]) -> None:
    for problem in problems:
        click.echo(styled(printable(problem.message), fg="red"))
        click.echo(f"  {printable(problem.remedy)}")


def print_keys(instance: Instance, census: rotation.Census) -> None:
    for key in health.key_rows(census, instance.settings.sources):
        role = (
            "primary"
            if key.is_primary
            else "in the ring"
            if key.is_configured
            else "not configured"
        )
        source = f", {printable(key.source)}" if key.source else ""
        versions = f"wraps {count(key.versions, 'version')}"
        click.echo(f"  {printable(key.key_id)}  {role}{source}: {versions}")
        if key.is_removable:
            click.echo(
                "    No row here needs it now. Keep it for backups, and run status "
                "again once every server has restarted with the new key first."
            )


def say_what_remains(clean_up: database.CleanUp | None) -> None:
    if clean_up is not None and clean_up.remains:
        warn(f"{clean_up.remains[0].upper()}{clean_up.remains[1:]}")


def say_why_incomplete(report: rotation.Rotation) -> None:
    """Why versions are left under another key, where no version is to blame."""
    if not (report.dry_run or report.complete or report.problems):
        warn(
            "Versions are left under another master key: a server whose first key is "
            "another one goes on writing, or the database undoes the changes. Restart "
            "the servers with the new key first, and run this again"
        )
