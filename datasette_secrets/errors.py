"""The errors of this package. A message never contains a value or a key."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, ParamSpec, TypeVar

if TYPE_CHECKING:
    from datasette.app import Datasette

P = ParamSpec("P")
T = TypeVar("T")


class SecretsError(Exception):
    """Base class of the errors of this package. `.code` is stable, for programs."""

    code: ClassVar[str] = "secrets-error"


class NotConfigured(SecretsError):
    """No usable master key, or no usable database, is configured."""

    code = "not-configured"


class InvalidMasterKey(SecretsError):
    """A configured master key cannot be used; Datasette does not start with it."""

    code = "invalid-master-key"


class UnknownMasterKey(SecretsError):
    """A version is wrapped by a master key that is not in the key ring.

    Attributes:
        name: The name of the secret.
        version: The number of the version.
        key_id: The ID of the master key that it needs, 16 hex digits.
    """

    code = "unknown-master-key"

    def __init__(self, name: str, version: int, key_id: str) -> None:
        self.name = name
        self.version = version
        self.key_id = key_id
        super().__init__(
            f"{name} version {version} is wrapped by master key {key_id}, "
            "which is not configured: add it to encryption-key, or restart the server if "
            "it is already there"
        )


class CannotOpen(SecretsError):
    """A version was tampered with or damaged.

    Attributes:
        name: As in its row. In a damaged row, it may have any type.
        version: As in its row. In a damaged row, it may have any type.
    """

    code = "cannot-open"

    def __init__(self, name: object, version: object) -> None:
        self.name = name
        self.version = version
        super().__init__(
            f"{name} version {version} cannot be decrypted: its row was damaged, moved "
            "or tampered with; set a new value, or restore the row from a backup"
        )


class NeedsUpgrade(SecretsError):
    """datasette-secrets 0.x wrote the version.

    Attributes:
        name: The name of the secret.
        version: The number of the version.
    """

    code = "needs-upgrade"

    def __init__(
        self, name: str, version: int, way_out: str = "run 'datasette secrets upgrade'"
    ) -> None:
        self.name = name
        self.version = version
        super().__init__(
            f"{name} version {version} was stored by datasette-secrets 0.x and cannot be "
            f"read until it is upgraded: {way_out}"
        )


class CannotUpgrade(CannotOpen):
    """A value of 0.x needs another master key, or is larger than a value can be."""

    code = "cannot-upgrade"

    def __init__(
        self, name: object, version: object, *, is_too_large: bool = False
    ) -> None:
        super().__init__(name, version)
        self.is_too_large = is_too_large
        why = "no configured key decrypts it: add its key to encryption-key"
        if is_too_large:
            why = "is larger than a value can be: set a shorter one"
        stored = f"{name} version {version} was stored by datasette-secrets 0.x"
        self.args = (f"{stored}, and {why}",)


class MissingExtra(SecretsError):
    """A value of 0.x can only be decrypted with a package that is not installed."""

    code = "missing-extra"

    def __init__(self) -> None:
        super().__init__(
            "Upgrading what datasette-secrets 0.x stored needs the package "
            "cryptography: install 'datasette-secrets[fernet]'"
        )


class VersionConflict(SecretsError):
    """Somebody else changed the secret first. Nothing was written.

    Attributes:
        name: The name of the secret.
        expected: The version number that the caller gave, 0 for none.
        actual: The number of the newest version, 0 for none.
        updated_at: When that was stored, or its note or date changed, UTC
            `YYYY-MM-DD HH:MM:SS` or None.
        updated_by: The ID of the actor who did that, or None.
    """

    code = "version-conflict"

    def __init__(
        self,
        name: str,
        expected: int,
        actual: int,
        updated_at: str | None = None,
        updated_by: str | None = None,
    ) -> None:
        self.name = name
        self.expected = expected
        self.actual = actual
        self.updated_at = updated_at
        self.updated_by = updated_by
        changed = f", changed by {updated_by or 'somebody'} at {updated_at} UTC"
        super().__init__(
            f"{name} is at version {actual}{changed if updated_at else ''}, "
            f"not at version {expected}: review it, then try again"
        )


class InvalidSecret(SecretsError):
    """A name, note, value, version or date is invalid. Nothing was written."""

    code = "invalid-secret"


class DatabaseUnavailable(SecretsError):
    """The database cannot be read or written now: locked, read-only, full or broken."""

    code = "database-unavailable"


def without_frames(
    function: Callable[P, T],
    explain: Callable[..., Exception] = lambda error, *_: error,
) -> Callable[P, T]:
    """Drop the frames of `function` from its exceptions, because they hold keys or values.

    With `rich` installed, Datasette prints the locals of every frame of an exception. The
    caller's frame stays, and must hold neither. `explain`: given the exception and the
    arguments of `function`, returns the exception to raise.
    """

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # whatever it is, its frames hold the same locals
            bare = explain(error, *args).with_traceback(None)
            bare.__cause__ = bare.__context__ = None
        del args, kwargs
        raise bare

    return guarded


def printable(text: object) -> str:
    """`text` with every character escaped that a terminal may interpret or hide."""
    return "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape").decode("ascii")
        for character in str(text)
    )


def say(sentence: str) -> None:
    """Print one line on stderr, even if a name in it contains line breaks."""
    prefix = "" if sentence.startswith("datasette-secrets") else "datasette-secrets: "
    print(f"{prefix}{printable(sentence)}", file=sys.stderr)


_said: weakref.WeakKeyDictionary[Datasette, set[str]] = weakref.WeakKeyDictionary()


def say_once(datasette: Datasette, sentence: str) -> None:
    """Print the line, unless it was already printed for this Datasette."""
    said = _said.setdefault(datasette, set())
    if sentence not in said:
        said.add(sentence)
        say(sentence)
