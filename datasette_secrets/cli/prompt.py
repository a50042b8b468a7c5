"""What the commands read: values, .env files, and answers.

With `rich` installed, Datasette prints the local variables of every frame of an unhandled
exception. So what is raised here leaves without the frames that hold a value.
"""

from __future__ import annotations

import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import click
from dotenv.parser import Binding, parse_stream

from ..config import ENV_PREFIX
from ..envelope import VALUE_MAX_BYTES, MasterKey, Plaintext
from ..errors import InvalidMasterKey, InvalidSecret, printable, without_frames
from .interrupt import blocking
from .output import is_terminal

# A pasted text has come to its end when nothing has followed for so long.
_QUIET_SECONDS = 1.0
# A terminal hands over a line up to its limit, and drops the rest without a word.
_LINE_MAX_BYTES = {"linux": 4_095, "win32": sys.maxsize}.get(sys.platform, 1_023)
# Ten thousand secrets of a kilobyte and more.
_ENV_MAX_BYTES = 16 * 1024 * 1024


@contextmanager
def _echo_off() -> Iterator[None]:
    """While this lasts, the terminal shows nothing that is typed.

    After a ClickException, the rest of a pasted text is read away, line by line. The shell
    would run it, and keep it in its history.
    """
    try:
        import termios
    except ImportError:  # Windows, where the rest stays in the console
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
        yield
    except click.ClickException:
        while select.select([terminal], [], [], _QUIET_SECONDS)[0]:
            if not os.read(terminal, 65_536):
                break
        raise
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)


def confirm(question: str, *, yes: bool) -> None:
    """Ask on stderr, unless `yes`. Without the answer "y" the command ends."""
    if yes:
        return
    try:
        with blocking():
            agreed = click.confirm(printable(question), err=True)
    except (RuntimeError, UnicodeError):  # broken off, closed, or not text
        agreed = False
        click.echo(err=True)
    if not agreed:
        raise click.ClickException(
            "Nothing was changed: answer y, or add --yes where nobody can answer"
        )


@without_frames
def read_value(name: str, value_file: str | None) -> str:
    """The value from the file, or from a pipe, or typed twice at a hidden prompt.

    One newline at the end of a file or pipe is dropped. What is not UTF-8 comes back with
    surrogates in it, which cannot be stored.
    """
    if value_file is None and is_terminal(sys.stdin):
        return _typed_twice(name)
    text = read_text(value_file or "-", VALUE_MAX_BYTES + len("\r\n"))
    return re.sub(r"\r?\n\Z", "", text)


def _typed_twice(name: str) -> str:
    try:
        with _echo_off(), blocking():
            return click.prompt(
                f"Value for {name} (hidden, single line)",
                hide_input=True,
                confirmation_prompt=True,
                value_proc=_whole_line,
                err=True,
            )
    except UnicodeDecodeError:
        click.echo(err=True)
        raise InvalidSecret("Nothing was stored: it is not valid UTF-8") from None


def _whole_line(value: str) -> str:
    """The typed value. Refuses what may be only the beginning of one."""
    if len(value.encode()) >= _LINE_MAX_BYTES:
        raise click.ClickException(
            "The terminal may have cut the value, since it passes on fewer than "
            f"{_LINE_MAX_BYTES + 1:,} bytes of a line: use a pipe or --value-file"
        )
    if _is_start_of_pem(value) or value in ("{", "["):
        raise click.ClickException(
            "The value has several lines: use a pipe or --value-file"
        )
    return value


def _is_start_of_pem(text: str) -> bool:
    return text.startswith("-----BEGIN ") and "-----END " not in text


def read_text(path: str, max_bytes: int) -> str:
    """What is in the file, `-` being stdin. What is not UTF-8 becomes surrogates.

    Refuses more than `max_bytes`: a device may never end.
    """
    if path == "-" and sys.stdin is None:
        raise click.ClickException("There is nothing to read: stdin is closed")
    try:
        with blocking(), click.open_file(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        reason = error.strerror or "unknown reason"
        raise click.ClickException(f"The file cannot be read: {reason}") from None
    if len(content) <= max_bytes:
        return bytes(content).decode("utf-8", "surrogateescape")
    del content
    raise click.ClickException(f"There are more than {max_bytes:,} bytes to read")


class Entry(NamedTuple):
    """A variable of a .env file: its last line, and its value there, None if empty."""

    line: int
    value: Plaintext | None
    is_repeated: bool


@without_frames
def read_env(path: str, is_master_key: Callable[[str], bool]) -> dict[str, Entry]:
    """The variables of a .env file by name, `-` being stdin.

    python-dotenv reads it: comments, quotes, `export`, several lines in quotes. Nothing
    is interpolated. One wrong line raises a ClickException for the file.
    """
    text = read_text(path, _ENV_MAX_BYTES).removeprefix("\ufeff")
    found: dict[str, Entry] = {}
    for binding in parse_stream(io.StringIO(text, newline=None)):
        if binding.key is None and not binding.error:
            continue
        # python-dotenv counts from the blank lines before.
        string = binding.original.string
        blank = string[: len(string) - len(string.lstrip())]
        line = binding.original.line + blank.count("\n")
        try:
            value = _parse(binding, is_master_key)
        except InvalidSecret as error:
            raise click.ClickException(
                f"Line {line} {error}: nothing was stored"
            ) from None
        name = _name(binding)
        is_repeated = found.pop(name, None) is not None
        found[name] = Entry(line, value, is_repeated)
    return found


def _name(binding: Binding) -> str:
    return (binding.key or "").removeprefix(ENV_PREFIX)


def is_key_line(name: str) -> bool:
    """Whether the line `name=` has the form of a master key, which also ends in "=".

    A name all in upper or all in lower case is not taken for one.
    """
    return _is_key(f"{name}=") and name not in (name.upper(), name.lower())


def _is_key(text: str) -> bool:
    try:
        MasterKey.parse(text)
    except InvalidMasterKey:
        return False
    return True


def _parse(binding: Binding, is_master_key: Callable[[str], bool]) -> Plaintext | None:
    if binding.error:
        raise InvalidSecret("does not parse")
    if binding.value is None:
        raise InvalidSecret("has no '='")
    # A variable may hold several keys: `KEY1=,KEY2=`.
    others = re.split(r"[,\s]+", binding.value)
    is_key_ring = is_key_line(_name(binding)) and any(map(_is_key, others))
    if is_key_ring or is_master_key(f"{binding.key} {binding.value}"):
        raise InvalidSecret("contains a master key, which must not be stored")
    if _is_start_of_pem(binding.value):
        raise InvalidSecret(
            "cannot be stored: it is the first of several lines. Put them in quotes"
        )
    try:
        return Plaintext.parse(binding.value) if binding.value else None
    except InvalidSecret as error:
        raise InvalidSecret(f"cannot be stored: {error}") from None
