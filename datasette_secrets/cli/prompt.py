"""What the commands read: values, .env files, and answers.

Nothing here raises in a frame that holds a value; with `rich` installed, Datasette prints
the local variables of every frame of an unhandled exception.
"""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter

import click
from dotenv.parser import parse_stream

from ..envelope import VALUE_MAX_BYTES, Plaintext
from ..errors import InvalidSecret, printable
from .interrupt import blocking
from .output import is_terminal, warn

# A pasted text has come to its end when nothing has followed for so long.
_QUIET_SECONDS = 1.0


@contextmanager
def echo_off() -> Iterator[Callable[[], None]]:
    """While this lasts, the terminal shows nothing that is typed.

    Yields what reads away the rest of a pasted text, which comes line by line and would go
    to whatever reads the terminal next: a shell would run it, and keep it in its history.
    """
    try:
        import termios
    except ImportError:  # Windows, where the rest stays in the console
        yield lambda: None
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = [*before]
    silent[3] &= ~termios.ECHO

    def discard_input() -> None:
        while select.select([terminal], [], [], _QUIET_SECONDS)[0]:
            if not os.read(terminal, 65_536):
                break

    try:
        termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
        yield discard_input
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)


def confirm(question: str, *, yes: bool) -> None:
    """Ask on stderr, unless `yes`. Without the answer "y" the command ends."""
    if yes:
        return
    try:
        with blocking():
            agreed = click.confirm(printable(question), err=True)
    except (RuntimeError, UnicodeError):  # broken off, closed, or no text
        agreed = False
        click.echo(err=True)
    if not agreed:
        raise click.ClickException(
            "Nothing was changed: answer y, or add --yes where nobody can answer"
        )


# A terminal hands over a line up to its limit, and drops the rest without a word.
_LINE_MAX_BYTES = {"linux": 4_095, "win32": sys.maxsize}.get(sys.platform, 1_023)


# Ten thousand secrets of a kilobyte and more.
_ENV_MAX_BYTES = 16 * 1024 * 1024


_PREFIX = "DATASETTE_SECRETS_"


#: Stands for what was typed and is no UTF-8. It cannot be stored, either.
_NOT_TEXT = "\udcff"


def read_value(name: str, value_file: str | None) -> str:
    """The value from the file, or from a pipe, or typed twice at a hidden prompt.

    Of what is not typed, one newline at the end is dropped. What is no UTF-8 comes back
    with surrogates in it, which cannot be stored.
    """
    if value_file is None and is_terminal(sys.stdin):
        typed = _typed_twice(name)
        if typed is None:
            raise click.Abort
        return typed
    text = read_text(value_file or "-", VALUE_MAX_BYTES + len("\r\n"))
    if text.endswith("\n"):
        return text[: -2 if text.endswith("\r\n") else -1]
    return text


def _typed_twice(name: str) -> str | None:
    """What is typed twice alike; None when that was broken off."""
    with echo_off() as discard_input:
        while True:
            value = _typed(f"Value for {name} (hidden, single line)")
            if value is None or value == _NOT_TEXT:
                return value
            if len(value.encode("utf-8", "surrogateescape")) >= _LINE_MAX_BYTES:
                discard_input()
                warn(
                    f"The terminal may have cut the value: it passes on fewer than "
                    f"{_LINE_MAX_BYTES + 1:,} bytes of a line. Use a pipe or --value-file"
                )
                return None
            if _is_start_of_pem(value) or value in ("{", "["):
                discard_input()
                warn("The value has several lines: use a pipe or --value-file")
                return None
            repeated = _typed("Repeat for confirmation")
            if repeated is None or repeated == value:
                return repeated
            warn("The two values do not match. Enter them again")


def _typed(question: str) -> str | None:
    """What is typed at a hidden prompt, which raises nothing; None for nothing."""
    try:
        with blocking():
            return str(click.prompt(question, hide_input=True, err=True))
    except UnicodeDecodeError:
        click.echo(err=True)
        return _NOT_TEXT
    except Exception:  # whatever it is, its frames may hold what was typed
        return None


def _is_start_of_pem(text: str) -> bool:
    return text.startswith("-----BEGIN ") and "-----END " not in text


def read_text(path: str, max_bytes: int) -> str:
    """What is in the file, `-` being stdin. What is no UTF-8 becomes surrogates.

    Refuses more than `max_bytes`: a device may never end.
    """
    if path == "-" and sys.stdin is None:
        raise click.ClickException("There is nothing to read: stdin is closed")
    try:
        with blocking(), click.open_file(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise click.ClickException(
            f"The file cannot be read: {error.strerror or 'it is unreadable'}"
        ) from None
    if len(content) <= max_bytes:
        return bytes(content).decode("utf-8", "surrogateescape")
    del content
    raise click.ClickException(f"There are more than {max_bytes:,} bytes to read")


@dataclass(frozen=True)
class Entry:
    """A variable of a .env file: where its last value stands, and the value."""

    line: int
    value: Plaintext


@dataclass
class EnvFile:
    """What a .env file holds, in its order. `empty`: names, and the lines they stand in."""

    entries: dict[str, Entry] = field(default_factory=dict)
    empty: dict[str, int] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)

    @property
    def lines(self) -> dict[str, int]:
        """Every name, and the line in which its last value stands."""
        found = {name: entry.line for name, entry in self.entries.items()} | self.empty
        return dict(sorted(found.items(), key=itemgetter(1)))


def read_env(path: str, is_master_key: Callable[[str], bool]) -> EnvFile | str:
    """The variables of a .env file, `-` being stdin, or what is wrong with it.

    python-dotenv reads it: comments, quotes, `export`, several lines in quotes. Nothing
    is interpolated. Of a name that is given twice the last value counts, and a name
    begins after `DATASETTE_SECRETS_`. One line that is wrong refuses the file.
    """
    text = read_text(path, _ENV_MAX_BYTES)
    return _parse(text.removeprefix("\ufeff"), is_master_key)


def _parse(text: str, is_master_key: Callable[[str], bool]) -> EnvFile | str:
    found = EnvFile()
    try:
        for binding in parse_stream(io.StringIO(text, newline=None)):
            line = _line(binding.original.line, binding.original.string)
            if binding.error:
                return f"Line {line} does not parse"
            if binding.key is None:
                continue
            if binding.value is None:
                return f"Line {line} has no '='"
            name = binding.key.removeprefix(_PREFIX)
            if is_master_key(binding.value):
                return f"Line {line} holds a master key, which is no secret to store"
            problem = _add(found, name, binding.value, line)
            if problem:
                return f"Line {line} cannot be stored: {problem}"
    except Exception:  # whatever it is, its frames hold values
        return "The file does not parse"
    return found


def _line(first: int, original: str) -> int:
    """The line on which it begins: python-dotenv counts from the blank lines before."""
    leading = original[: len(original) - len(original.lstrip())]
    return first + leading.count("\n")


def _add(found: EnvFile, name: str, value: str, line: int) -> str:
    if name in found.entries or name in found.empty:
        if name not in found.repeated:
            found.repeated.append(name)
        found.entries.pop(name, None)
        found.empty.pop(name, None)
    if not value:
        found.empty[name] = line
        return ""
    if _is_start_of_pem(value):
        return "it is the first of several lines, which have to stand in quotes"
    try:
        found.entries[name] = Entry(line, Plaintext.parse(value))
    except InvalidSecret as error:
        return str(error)
    return ""
