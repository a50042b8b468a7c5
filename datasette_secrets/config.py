"""Reads the plugin's settings into a frozen `Settings`. No message of it shows a key."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from .envelope import KeyRing, MasterKey
from .errors import InvalidMasterKey, NotConfigured, SecretsError

if TYPE_CHECKING:
    from datasette.app import Datasette
    from datasette.database import Database

PLUGIN = "datasette-secrets"
ENV_PREFIX = "DATASETTE_SECRETS_"
ENV_KEY = "DATASETTE_SECRETS_ENCRYPTION_KEY"
HOW_TO_MAKE_A_KEY = "make one with 'datasette secrets generate-encryption-key'"
_ALWAYS_RESERVED = frozenset({"ENCRYPTION_KEY", "OLD_ENCRYPTION_KEY"})


class Settings(NamedTuple):
    """How this instance keeps its secrets.

    `ring`: the master keys, None while the plugin is not configured.
    `sources`: where each configured key came from, by its id.
    `database`: the name of the database, None for the internal one.
    `reserved`: upper-case names that are never a secret's.
    `missing`: why there is no ring, in one sentence; empty when there is one.
    """

    ring: KeyRing | None
    sources: dict[str, str]
    database: str | None
    reserved: frozenset[str]
    missing: str

    def is_reserved(self, name: str) -> bool:
        """Whether `name` belongs to a variable that holds a master key."""
        return name.upper() in self.reserved

    def require_ring(self) -> KeyRing:
        """The key ring. Raises NotConfigured when there is none."""
        if self.ring is None:
            raise NotConfigured(self.missing)
        return self.ring


def load(datasette: Datasette) -> Settings:
    """The instance's settings, read anew.

    Raises InvalidMasterKey for a key that cannot be used and NotConfigured for settings
    that make no sense.
    """
    settings = _load(datasette)
    if isinstance(settings, SecretsError):
        raise settings
    return settings


def _load(datasette: Datasette) -> Settings | SecretsError:
    """The settings, or what is wrong with them: returned, since the locals hold keys."""
    options = _options(datasette)
    if options is None:
        return NotConfigured(f"{PLUGIN}: its configuration must be a mapping")
    database = options.get("database")
    if database is not None and not isinstance(database, str):
        return NotConfigured(f"{PLUGIN}: 'database' must be the name of a database")
    if "encryption-key" in options and "encryption_key" in options:
        return InvalidMasterKey(
            f"{PLUGIN}: both 'encryption-key' and 'encryption_key' are configured: "
            "keep one of them"
        )
    key_option = options.get("encryption-key", options.get("encryption_key"))
    keys, sources, problem = _read_keys(key_option)
    if problem:
        return InvalidMasterKey(f"{PLUGIN}: {problem}")
    return Settings(
        ring=KeyRing(keys) if keys else None,
        sources=sources,
        database=None if database == "_internal" else database or None,
        reserved=_ALWAYS_RESERVED | _variables_of_keys(key_option),
        missing="" if keys else _why_missing(key_option),
    )


def database_name(datasette: Datasette) -> str | None:
    """The configured `database` if it is not the internal one. Loads no key, never raises."""
    name = (_options(datasette) or {}).get("database")
    return name if isinstance(name, str) and name not in ("", "_internal") else None


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
            f"{PLUGIN}: the database '{settings.database}' is not attached: start "
            "Datasette with its file, or correct 'database'"
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


def _read_keys(key_option: Any) -> tuple[list[MasterKey], dict[str, str], str]:
    """The configured keys with their sources, and what is wrong with them, if anything.

    Returns the problem rather than raising it: its locals hold key texts.
    """
    texts: list[tuple[str, str]] = []
    if key_option is None:
        listed = os.environ.get(ENV_KEY, "").split(",")
        for number, text in enumerate(listed, 1):
            position = f" (entry {number} of {len(listed)})" if len(listed) > 1 else ""
            texts.append(
                (f"the environment variable {ENV_KEY}{position}", text.strip())
            )
    else:
        entries = _entries(key_option)
        for number, entry in enumerate(entries, 1):
            position = f"entry {number} of " if len(entries) > 1 else ""
            source, text, problem = _follow(entry)
            if problem:
                return [], {}, f"{position}encryption-key cannot be read: {problem}"
            texts.append((f"{position}encryption-key{source}", text.strip()))
    if not any(text for _, text in texts):
        return [], {}, ""
    if not texts[0][1]:
        return [], {}, f"{texts[0][0]} is empty: the first key is the one that wraps"
    return _parse_keys(texts)


def _parse_keys(
    texts: list[tuple[str, str]],
) -> tuple[list[MasterKey], dict[str, str], str]:
    keys: list[MasterKey] = []
    sources: dict[str, str] = {}
    for source, text in texts:
        if not text:
            continue
        key = MasterKey.parse(text)
        if isinstance(key, str):
            way_out = f"take away what stands around it, or {HOW_TO_MAKE_A_KEY}"
            return [], {}, f"{source} is not a master key, {key}: {way_out}"
        if key.id in sources:
            print(
                f"{PLUGIN}: {source} is the same key as {sources[key.id]}: it counts once",
                file=sys.stderr,
            )
            continue
        keys.append(key)
        sources[key.id] = source
    return keys, sources, ""


def _follow(entry: Any) -> tuple[str, str, str]:
    """Where an entry's text comes from, the text, and why it cannot be read, if so."""
    if entry is None or isinstance(entry, str):
        return "", entry or "", ""
    if isinstance(entry, dict) and len(entry) == 1:
        [(kind, name)] = entry.items()
        if kind == "$env" and isinstance(name, str):
            return f" ($env {name})", os.environ.get(name, ""), ""
        if kind == "$file" and isinstance(name, str):
            try:
                with open(name, encoding="utf-8") as file:
                    return f" ($file {name})", file.read(), ""
            except OSError as error:
                where = (
                    "" if os.path.isabs(name) else f", which is {os.path.abspath(name)}"
                )
                return "", "", f"$file {name}{where}: {error.strerror or 'unreadable'}"
            except ValueError:
                return "", "", f"$file {name}: not text"
    return "", "", "it must be text, {$env: NAME} or {$file: PATH}"


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
            f"the environment variable{plural} {', '.join(variables)}, from which "
            f"'encryption-key' is read, {'are' if plural else 'is'} not set"
        )
    else:
        cause = "'encryption-key' is empty"
    return (
        f"{PLUGIN} is not configured: {cause}: {HOW_TO_MAKE_A_KEY}, unless secrets are "
        "stored here already, which need theirs"
    )
