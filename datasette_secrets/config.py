"""Reads the plugin's settings into a frozen `Settings`. No message of it shows a key."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from .envelope import KeyRing, MasterKey
from .errors import InvalidMasterKey, NotConfigured, without_frames

if TYPE_CHECKING:
    from datasette.app import Datasette
    from datasette.database import Database

PLUGIN = "datasette-secrets"
ENV_PREFIX = "DATASETTE_SECRETS_"
ENV_KEY = "DATASETTE_SECRETS_ENCRYPTION_KEY"
HOW_TO_MAKE_A_KEY = "make one with 'datasette secrets generate-encryption-key'"
_KNOWN_OPTIONS = ("encryption-key", "encryption_key", "database")
_ALWAYS_RESERVED = frozenset({"ENCRYPTION_KEY", "OLD_ENCRYPTION_KEY"})


class Settings(NamedTuple):
    """How this instance keeps its secrets.

    `ring`: the master keys, None while the plugin is not configured.
    `sources`: where each configured key came from, by its id.
    `database`: the name of the database, None for the internal one.
    `reserved`: upper-case names that are never a secret's.
    `missing`: why there is no ring, in one sentence; empty when there is one.
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


@without_frames
def load(datasette: Datasette) -> Settings:
    """The instance's settings, read anew.

    Raises InvalidMasterKey for a key that cannot be used and NotConfigured for settings
    that make no sense.
    """
    options = _options(datasette)
    if options is None:
        raise NotConfigured(f"{PLUGIN}: its configuration must be a mapping")
    database = options.get("database")
    if database is not None and not isinstance(database, str):
        raise NotConfigured(f"{PLUGIN}: 'database' must be the name of a database")
    if "encryption-key" in options and "encryption_key" in options:
        raise InvalidMasterKey(
            f"{PLUGIN}: both 'encryption-key' and 'encryption_key' are configured: "
            "keep one of them"
        )
    key_option = options.get("encryption-key", options.get("encryption_key"))
    keys = _read_keys(key_option)
    return Settings(
        ring=KeyRing(keys.values()) if keys else None,
        sources={key.id: source for source, key in keys.items()},
        database=None if database == "_internal" else database or None,
        reserved=_ALWAYS_RESERVED | _variables_of_keys(key_option),
        missing="" if keys else _why_missing(key_option),
        warnings=tuple(_warnings(options, keys)),
    )


def _warnings(
    options: dict[str, Any], keys: dict[str, MasterKey]
) -> Iterator[tuple[str, str]]:
    for option in options:
        if option not in _KNOWN_OPTIONS:
            known = ", ".join(_KNOWN_OPTIONS[::2])
            yield (
                "unknown-option",
                f"the option {_named(str(option))} is unknown and has no effect: the "
                f"options are {known}",
            )
    for source, key in keys.items():
        if key.is_one_byte_repeated:
            yield (
                "weak-key",
                f"{source} is one byte repeated, which anybody can guess: "
                f"{HOW_TO_MAKE_A_KEY}, put it first and run 'datasette secrets rotate-key'",
            )
        if any(map(key.appears_in, sys.argv)):
            yield (
                "key-in-arguments",
                f"{source} is visible in the command line, which other users of this "
                "machine can read: move it to a file",
            )
    key_option = options.get("encryption-key", options.get("encryption_key"))
    for path in _paths(key_option):
        if path is not None and is_readable_by_others(path):
            yield (
                "key-file-mode",
                f"the key file {_named(path)} can be read by every user of this machine: "
                "run chmod o-r on it",
            )


def is_readable_by_others(path: str) -> bool:
    """Whether every user of the machine can read this file."""
    try:
        return os.name != "nt" and bool(os.stat(path).st_mode & stat.S_IROTH)
    except (OSError, ValueError):
        return False


_LIKE_A_KEY = re.compile(r"[A-Za-z0-9+/_=-]{40,}")


def _named(text: str) -> str:
    """`text` for a message, unless a key may have been pasted in its place."""
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
        return "(not shown, since it may be a key)"
    return text


def database_name(datasette: Datasette) -> str | None:
    """The configured `database` if it is not the internal one. Loads no key, never raises."""
    name = (_options(datasette) or {}).get("database")
    return name if isinstance(name, str) and name not in ("", "_internal") else None


def key_files(datasette: Datasette) -> list[str | None]:
    """The path of each entry of `encryption-key`, newest first; None for one that is no file."""
    options = _options(datasette) or {}
    return _paths(options.get("encryption-key", options.get("encryption_key")))


def _paths(key_option: Any) -> list[str | None]:
    paths = [
        entry.get("$file") if isinstance(entry, dict) else None
        for entry in _entries(key_option)
    ]
    return [path if isinstance(path, str) else None for path in paths]


def exposed_names(datasette: Datasette) -> list[str]:
    """The names under which the database of the secrets can be browsed.

    The configured one, and any attached database that is the same file as the one with
    the secrets in it. Loads no key, never raises.
    """
    name = database_name(datasette)
    own = (
        datasette.get_internal_database()
        if name is None
        else datasette.databases.get(name)
    )
    path = own.path if own else None
    configured = [] if name is None else [name]
    return configured + [
        other
        for other, db in datasette.databases.items()
        if other != name and path and db.path and _is_same_file(db.path, path)
    ]


def _is_same_file(path: str, other: str) -> bool:
    """Whether both lead to one file, through links of any kind as well."""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return os.path.abspath(path) == os.path.abspath(other)


def find_database(datasette: Datasette, settings: Settings) -> Database:
    """The database in which the secrets are. Raises NotConfigured if it is not attached."""
    db: Database
    if settings.database is None:
        db = datasette.get_internal_database()
        return db
    if settings.database == "_memory":
        raise NotConfigured(
            f"{PLUGIN}: secrets cannot be kept in '_memory', which is lost with the "
            "process: leave 'database' out, or name a database file"
        )
    if settings.database not in datasette.databases:
        raise NotConfigured(
            f"{PLUGIN}: the database '{_named(settings.database)}' is not attached: "
            "start Datasette with its file, or correct 'database'"
        )
    db = datasette.get_database(settings.database)
    return db


def _options(datasette: Datasette) -> dict[str, Any] | None:
    """The plugin's options as written, `$env` and `$file` not yet followed.

    None when they are no mapping.
    """
    plugins = (datasette.config or {}).get("plugins") or {}
    options = plugins.get(PLUGIN) if isinstance(plugins, dict) else plugins
    if options is None:
        return {}
    return options if isinstance(options, dict) else None


def _entries(key_option: Any) -> list[Any]:
    return key_option if isinstance(key_option, list) else [key_option]


def _read_keys(key_option: Any) -> dict[str, MasterKey]:
    """The configured keys by where each came from, newest first; none without any."""
    texts = _texts_of_variable() if key_option is None else _texts_of_option(key_option)
    # A variable may be left unset on purpose; a file that was named is there to be read.
    is_file = any(path is not None for path in _paths(key_option)[:1])
    if not is_file and not any(text for _, text in texts):
        return {}
    if not texts[0][1]:
        raise InvalidMasterKey(
            f"{PLUGIN}: {texts[0][0]} is empty: the first key is the one that wraps"
        )
    keys: dict[str, MasterKey] = {}
    for source, text in texts:
        if not text:
            continue
        key = _parse_key(source, text)
        same = next((known for known in keys if keys[known].id == key.id), None)
        if same is None:
            keys[source] = key
        else:
            print(
                f"{PLUGIN}: {source} is the same key as {same}: it counts once",
                file=sys.stderr,
            )
    return keys


def _texts_of_variable() -> list[tuple[str, str]]:
    listed = os.environ.get(ENV_KEY, "").split(",")
    return [
        (
            f"the environment variable {ENV_KEY}"
            + (f" (entry {number} of {len(listed)})" if len(listed) > 1 else ""),
            text.strip(),
        )
        for number, text in enumerate(listed, 1)
    ]


def _texts_of_option(key_option: Any) -> list[tuple[str, str]]:
    entries = _entries(key_option)
    texts = []
    for number, entry in enumerate(entries, 1):
        option = "encryption-key"
        if len(entries) > 1:
            option = f"entry {number} of {option}"
        source, text = _follow(option, entry)
        texts.append((source, text.strip()))
    return texts


def _parse_key(source: str, text: str) -> MasterKey:
    try:
        return MasterKey.parse(text)
    except InvalidMasterKey as error:
        raise InvalidMasterKey(
            f"{PLUGIN}: {source} is not a master key, {error}: take away what stands "
            f"around it, or {HOW_TO_MAKE_A_KEY}"
        ) from None


def _follow(option: str, entry: Any) -> tuple[str, str]:
    """Where an entry's text comes from, and the text. Raises InvalidMasterKey."""
    if entry is None or isinstance(entry, str):
        return option, entry or ""
    if isinstance(entry, dict) and len(entry) == 1:
        [(kind, name)] = entry.items()
        if kind == "$env" and isinstance(name, str):
            return f"{option} ($env {_named(name)})", os.environ.get(name, "")
        if kind == "$file" and isinstance(name, str):
            return f"{option} ($file {_named(name)})", _read_file(option, name)
    raise _unreadable(option, "it must be text, {$env: NAME} or {$file: PATH}")


def _read_file(option: str, path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        shown = _named(path)
        if shown == path and not os.path.isabs(path):
            shown += f", which is {os.path.abspath(path)}"
        problem = f"$file {shown}: {error.strerror or 'unreadable'}"
    except ValueError:
        problem = f"$file {_named(path)}: not text"
    raise _unreadable(option, problem)


def _unreadable(option: str, problem: str) -> InvalidMasterKey:
    return InvalidMasterKey(f"{PLUGIN}: {option} cannot be read: {problem}")


def _variables_of_keys(key_option: Any) -> frozenset[str]:
    """The secret names that would read the variables from which keys are configured."""
    return frozenset(
        entry["$env"].upper().removeprefix(ENV_PREFIX)
        for entry in _entries(key_option)
        if isinstance(entry, dict)
        and isinstance(entry.get("$env"), str)
        and entry["$env"].upper().startswith(ENV_PREFIX)
    )


def _why_missing(key_option: Any) -> str:
    variables = [
        entry["$env"]
        for entry in _entries(key_option)
        if isinstance(entry, dict) and isinstance(entry.get("$env"), str)
    ]
    if key_option is None:
        cause = (
            f"neither 'encryption-key' nor the environment variable {ENV_KEY} is set"
        )
    elif variables:
        plural = "s" if len(variables) > 1 else ""
        cause = (
            f"the environment variable{plural} {', '.join(map(_named, variables))}, from which "
            f"'encryption-key' is read, {'are' if plural else 'is'} not set"
        )
    else:
        cause = "'encryption-key' is empty"
    return (
        f"{PLUGIN} is not configured: {cause}: {HOW_TO_MAKE_A_KEY}, unless secrets are "
        "stored here already, which need theirs"
    )
