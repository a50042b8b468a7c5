"""Values on their way between the shell and an envelope.

Nothing here raises in a frame that holds one: with `rich` installed, Datasette prints the
local variables of every frame of an unhandled exception.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import click

from .envelope import Plaintext

_PREFIX = "DATASETTE_SECRETS_"


def read_value(name: str, value_file: str | None) -> str:
    """The value from the file, or from a pipe, or typed twice at a hidden prompt.

    Of what is not typed, one newline at the end is dropped. What is no UTF-8 comes back
    with surrogates in it, which cannot be stored.
    """
    if value_file is None and sys.stdin is not None and sys.stdin.isatty():
        return str(
            click.prompt(
                f"Value of {name}", hide_input=True, confirmation_prompt=True, err=True
            )
        )
    text = _read(value_file or "-").decode("utf-8", "surrogateescape")
    if text.endswith("\n"):
        return text[: -2 if text.endswith("\r\n") else -1]
    return text


def _read(path: str) -> bytes:
    """The bytes of the file, `-` being stdin."""
    try:
        with click.open_file(path, "rb") as file:
            return bytes(file.read())
    except OSError as error:
        raise click.ClickException(
            f"The file cannot be read: {error.strerror or 'it is unreadable'}"
        ) from None


def print_value(value: str | None) -> str | None:
    """Write the value and a newline to stdout; returns what went wrong, if anything."""
    if value is None:
        return "it is not set"
    stream = sys.stdout.buffer
    try:
        stream.write(value.encode("utf-8", "surrogateescape") + b"\n")
        stream.flush()
    except OSError as error:
        _give_up_stdout()
        if error.errno == errno.EPIPE:
            return "the pipe was closed before it was read"
        return f"it could not be printed: {error.strerror}"
    return None


def _give_up_stdout() -> None:
    """Let Python write what is left in its buffer to nowhere when it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@dataclass(frozen=True)
class Entry:
    """A variable of a .env file: where its last value stands, and the value."""

    line: int
    value: Plaintext


@dataclass
class EnvFile:
    """What a .env file holds. `empty`, `repeated`: names, in the order of the file."""

    entries: dict[str, Entry] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)


def read_env(path: str, is_master_key: Callable[[str], bool]) -> EnvFile | str:
    """The variables of a .env file, `-` being stdin, or what is wrong with it.

    python-dotenv reads it: comments, quotes, `export`, several lines in quotes. Nothing
    is interpolated. Of a name that is given twice the last value counts, and a name
    begins after `DATASETTE_SECRETS_`. One line that is wrong refuses the file.
    """
    text = _read(path).decode("utf-8", "surrogateescape")
    return _parse(text.removeprefix("\ufeff"), is_master_key)


def _parse(text: str, is_master_key: Callable[[str], bool]) -> EnvFile | str:
    from dotenv.parser import parse_stream

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
    found.empty = [name for name in found.empty if name not in found.entries]
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
    if not value:
        if name not in found.empty:
            found.empty.append(name)
        return ""
    plaintext = Plaintext.parse(value)
    if isinstance(plaintext, str):
        return plaintext
    found.entries[name] = Entry(line, plaintext)
    return ""
