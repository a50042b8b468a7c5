"""Reads the plugin's settings into a frozen `Settings`. No message shows a key."""

from __future__ import annotations

import os
import re
import shlex
import stat
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from . import keyfiles
from .envelope import KeyRing, MasterKey
from .errors import InvalidMasterKey, NotConfigured, say, without_frames

if TYPE_CHECKING:
    from datasette.app import Datasette
    from datasette.database import Database

PLUGIN = "datasette-secrets"
ENV_PREFIX = "DATASETTE_SECRETS_"
ENV_KEY = "DATASETTE_SECRETS_ENCRYPTION_KEY"
HOW_TO_MAKE_A_KEY = "Make a master key with 'datasette secrets generate-encryption-key'"
_KNOWN_OPTIONS = ("encryption-key", "encryption_key", "database")
_ALWAYS_RESERVED = frozenset({"ENCRYPTION_KEY", "OLD_ENCRYPTION_KEY"})


class Settings(NamedTuple):
    """The settings of one Datasette.

    `ring`: the master keys, None while the plugin is not configured.
    `sources`: where each configured key came from, by its id.
    `database`: the name of the database, None for the internal one.
    `reserved`: upper-case names that no secret can have.
    `missing`: why there is no ring and what to do; empty when there is one.
    `warnings`: code and sentence of each risky setting.
    """

    ring: KeyRing | None
    sources: dict[str, str]
    database: str | None
    reserved: frozenset[str]
    missing: str
    warnings: tuple[tuple[str, str], ...] = ()

    def is_reserved(self, name: str) -> bool:
        """Whether `name` belongs to a variable that holds a master key."""
        return name.upper() in self.reserved

    def require_ring(self) -> KeyRing:
        """The key ring. Raises NotConfigured when there is none."""
        if self.ring is None:
            raise NotConfigured(self.missing)
        return self.ring

    def has_key_in(self, text: object) -> bool:
        """Whether `text` contains one of the configured master keys."""
        return self.ring is not None and self.ring.any_appears_in(str(text))


@without_frames
def load(datasette: Datasette) -> Settings:
    """Read the settings, with the keys.

    Raises InvalidMasterKey for a key that cannot be used, and NotConfigured for other
    invalid settings.
    """
    options = _options(datasette)
    if options is None:
        raise NotConfigured(f"{PLUGIN}: its configuration must be a mapping")
    if not isinstance(options.get("database"), (str, type(None))):
        raise NotConfigured(f"{PLUGIN}: 'database' must be the name of a database")
    if "encryption-key" in options and "encryption_key" in options:
        raise InvalidMasterKey(
            f"{PLUGIN}: both 'encryption-key' and 'encryption_key' are configured: "
            "keep one of them"
        )
    key_option = _key_option(options)
    keys = _read_keys(key_option)
    variables = [name.upper() for name in _named_by("$env", key_option) if name]
    return Settings(
        ring=KeyRing(keys.values()) if keys else None,
        sources={key.id: source for source, key in keys.items()},
        database=_database_name(options),
        reserved=_ALWAYS_RESERVED.union(
            name.removeprefix(ENV_PREFIX)
            for name in variables
            if name.startswith(ENV_PREFIX)
        ),
        missing="" if keys else _why_missing(key_option),
        warnings=tuple(_warnings(options, keys)),
    )


def _warnings(
    options: dict[str, Any], keys: dict[str, MasterKey]
) -> Iterator[tuple[str, str]]:
    for option in options:
        if option not in _KNOWN_OPTIONS:
            yield (
                "unknown-option",
                f"the option {named(str(option))} is unknown and has no effect. "
                "The options are encryption-key, database",
            )
    for source, key in keys.items():
        if key.is_one_byte_repeated:
            yield (
                "weak-key",
                f"{source} is one byte repeated, so anybody can guess it. "
                f"{HOW_TO_MAKE_A_KEY}, put it first, restart every server, and run "
                "'datasette secrets rotate-key'",
            )
        if any(map(key.appears_in, sys.argv)):
            yield (
                "key-in-arguments",
                f"{source} is visible in the command line, which other users of this "
                "machine can read. Move it to a file",
            )
    for path in _named_by("$file", _key_option(options)):
        if path is not None and is_readable_by_others(path):
            yield (
                "key-file-mode",
                f"every user of this machine can read the key file {path}: run "
                f"chmod o= {shlex.quote(path)}",
            )


def is_readable_by_others(path: str) -> bool:
    """Whether every user of the machine can read this file."""
    try:
        return os.name != "nt" and bool(os.stat(path).st_mode & stat.S_IROTH)
    except (OSError, ValueError):
        return False


NOT_SHOWN = "(not shown, since it may be a key)"
_LIKE_A_KEY = re.compile(r"[A-Za-z0-9+/_=-]{40,}")


def named(text: str) -> str:
    """`text` for a message, but not if it may be a key."""
    kinds = (str.isupper, str.islower, str.isdigit)
    squeezed = "".join(text.split())
    if len(squeezed) >= 40 and (
        squeezed.endswith("=")
        or re.search(r"[0-9A-Fa-f]{64}", squeezed)
        or (
            _LIKE_A_KEY.search(squeezed)
            and all(any(map(kind, squeezed)) for kind in kinds)
        )
    ):
        return NOT_SHOWN
    return text


def _named_file(path: str) -> str:
    """The same for the path of a file. The path of one that exists is no key."""
    return path if os.path.exists(path) else named(path)


def _database_name(options: dict[str, Any]) -> str | None:
    """The configured `database` if it is not the internal one."""
    name = options.get("database")
    return name if isinstance(name, str) and name not in ("", "_internal") else None


def key_files(datasette: Datasette) -> list[str | None]:
    """The path of each entry of `encryption-key`, newest first; None if it is not a file."""
    return _named_by("$file", _key_option(_options(datasette) or {}))


def exposed_names(datasette: Datasette) -> list[str]:
    """The names under which the database of the secrets can be browsed.

    They are the configured name, and that of any attached database that is the same file.
    Loads no key, never raises.
    """
    name = _database_name(_options(datasette) or {})
    internal = datasette.get_internal_database()
    own = internal if name is None else datasette.databases.get(name)
    path = own.path if own else None
    return [
        other
        for other, db in datasette.databases.items()
        if db is own or (path and db.path and _is_same_file(db.path, path))
    ]


def _is_same_file(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return os.path.abspath(path) == os.path.abspath(other)


def find_database(datasette: Datasette, settings: Settings) -> Database:
    """The database of the secrets. Raises NotConfigured if it is not attached."""
    if settings.database == "_memory":
        raise NotConfigured(
            f"{PLUGIN}: '_memory' is lost when the process ends, so secrets cannot be "
            "kept there. Leave 'database' out, or name a database file"
        )
    if settings.database is not None and settings.database not in datasette.databases:
        raise NotConfigured(
            f"{PLUGIN}: the database '{named(settings.database)}' is not attached. "
            "Start Datasette with its file, or correct 'database'"
        )
    db: Database = (
        datasette.get_internal_database()
        if settings.database is None
        else datasette.get_database(settings.database)
    )
    return db


def _options(datasette: Datasette) -> dict[str, Any] | None:
    """The plugin's options as written, `$env` and `$file` not yet followed.

    None if they are not a mapping.
    """
    plugins = (datasette.config or {}).get("plugins") or {}
    options = plugins.get(PLUGIN) if isinstance(plugins, dict) else plugins
    if options is None:
        return {}
    return options if isinstance(options, dict) else None


def _key_option(options: dict[str, Any]) -> Any:
    return options.get("encryption-key", options.get("encryption_key"))


def _entries(key_option: Any) -> list[Any]:
    return key_option if isinstance(key_option, list) else [key_option]


def _named_by(kind: str, key_option: Any) -> list[str | None]:
    """For each entry, the name in its `$env` or `$file`, or None."""
    names = [
        entry.get(kind) if isinstance(entry, dict) else None
        for entry in _entries(key_option)
    ]
    return [name if isinstance(name, str) else None for name in names]


def _read_keys(key_option: Any) -> dict[str, MasterKey]:
    """The configured keys by their source, newest first."""
    texts = list(_texts(key_option))
    # A variable may be left unset on purpose. A configured file must contain a key.
    is_file = any(_named_by("$file", key_option)[:1])
    if (is_file or any(text for _, text in texts)) and not texts[0][1]:
        raise InvalidMasterKey(
            f"{PLUGIN}: {texts[0][0]} is empty, but the first key is the primary key"
        )
    keys: dict[str, MasterKey] = {}
    for source, text in texts:
        if not text:
            continue
        try:
            key = MasterKey.parse(text)
        except InvalidMasterKey as error:
            raise InvalidMasterKey(
                f"{PLUGIN}: {source} is not a master key, {error}. Remove any surrounding "
                "text, or make a new key with 'datasette secrets generate-encryption-key'"
            ) from None
        same = next((known for known in keys if keys[known].id == key.id), None)
        if same is None:
            keys[source] = key
        else:
            say(f"{source} is the same key as {same}, and is ignored")
    return keys


def _texts(key_option: Any) -> Iterator[tuple[str, str]]:
    """Where each key is configured, and its text."""
    option, entries = "encryption-key", _entries(key_option)
    if key_option is None:
        option = f"the environment variable {ENV_KEY}"
        entries = os.environ.get(ENV_KEY, "").split(",")
    for number, entry in enumerate(entries, 1):
        of = f"entry {number} of " if len(entries) > 1 else ""
        source, text = _follow(of + option, entry)
        yield source, text.strip()


def _follow(option: str, entry: Any) -> tuple[str, str]:
    """Where an entry's text comes from, and the text. Raises InvalidMasterKey."""
    match entry:
        case None | str():
            return option, entry or ""
        case {"$env": str(name)} if len(entry) == 1:
            return f"{option} ($env {named(name)})", os.environ.get(name, "")
        case {"$file": str(path)} if len(entry) == 1:
            return f"{option} ($file {_named_file(path)})", _read_file(option, path)
    raise _unreadable(option, "it must be text, {$env: NAME} or {$file: PATH}")


def _read_file(option: str, path: str) -> str:
    shown = _named_file(path)
    try:
        return keyfiles.read_file(path).decode("utf-8")
    except OSError as error:
        if shown == path and not os.path.isabs(path):
            shown += f", which is {os.path.abspath(path)}"
        problem = error.strerror or "unreadable"
    except ValueError:
        problem = "not text"
    raise _unreadable(option, f"$file {shown}: {problem}")


def _unreadable(option: str, problem: str) -> InvalidMasterKey:
    return InvalidMasterKey(f"{PLUGIN}: {option} cannot be read: {problem}")


def _why_missing(key_option: Any) -> str:
    cause = "'encryption-key' is empty"
    variables = [named(name) for name in _named_by("$env", key_option) if name]
    if key_option is None:
        cause = (
            f"neither 'encryption-key' nor the environment variable {ENV_KEY} is set"
        )
    elif variables:
        s, verb = ("s", "are") if len(variables) > 1 else ("", "is")
        names = ", ".join(variables)
        cause = (
            f"the environment variable{s} {names} of 'encryption-key' {verb} not set"
        )
    return (
        f"{PLUGIN} is not configured, because {cause}. {HOW_TO_MAKE_A_KEY}. If secrets are "
        "stored already, configure their master key instead"
    )
