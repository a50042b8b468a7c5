"""What can be done with secrets: get, set, delete, restore, roll back, destroy, list.

An environment variable counts before the database. `None` means "not set"; anything
wrong raises. A value is never a local variable of a frame that can raise, or that waits
for something that can: with `rich` installed, Datasette prints locals.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import config, envelope, events, registry, store
from .errors import InvalidSecret, NeedsUpgrade
from .uses import UseRecorder

if TYPE_CHECKING:
    from datasette.app import Datasette
    from datasette.database import Database
    from datasette.events import Event

TrackEvent = Callable[["Event"], None]

NAME_MAX_CHARACTERS = 128
NOTE_MAX_CHARACTERS = 100
_VAULT = "_datasette_secrets_vault"  # an attribute, so that it goes with its Datasette
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


class Vault:
    """One Datasette's settings, database, open connection and recorder, put together."""

    def __init__(self, datasette: Datasette) -> None:
        self.settings = config.load(datasette)
        self.db: Database = config.find_database(datasette, self.settings)
        self.uses = UseRecorder(self.db)
        self.reader = store.Reader(self.db)

    def environment_value(self, name: str) -> str | None:
        """What a non-empty `DATASETTE_SECRETS_<NAME>` holds, unless it is a master key."""
        try:
            value = os.environ.get(config.ENV_PREFIX + name)
        except UnicodeEncodeError:  # the name is no text that a variable can have
            return None
        if not value or self.settings.is_reserved(name):
            return None
        ring = self.settings.ring
        if ring is not None and ring.any_appears_in(value):
            return None
        return value


def vault(datasette: Datasette) -> Vault:
    """The Datasette's vault, made at first use.

    Raises as `config.load` and `config.find_database` do.
    """
    known: Vault | None = getattr(datasette, _VAULT, None)
    if known is None:
        known = Vault(datasette)
        setattr(datasette, _VAULT, known)
    return known


async def get_secret(
    datasette: Datasette, secret_name: str, actor_id: str | None = None
) -> str | None:
    """The value of a secret, or None when it is not set.

    A non-empty environment variable `DATASETTE_SECRETS_<NAME>` counts first, then the
    newest stored version; one that is deleted or destroyed counts as not set.
    `secret_name`: str, registered or not. `actor_id`: the id of the actor for whom it is
    used, recorded as `last_used_by`; None for nobody in particular.

    Raises NotConfigured (a version is stored, and no master key is configured),
    UnknownMasterKey (it needs another key), NeedsUpgrade (datasette-secrets 0.x stored
    it), CannotOpen (its row was damaged or tampered with) and DatabaseUnavailable.
    """
    place = vault(datasette)
    if place.environment_value(secret_name) is not None:
        return place.environment_value(secret_name)
    row = await place.reader.newest_version(secret_name)
    if row is None or row.deleted_at is not None or row.is_destroyed:
        return None
    if row.is_legacy:
        raise NeedsUpgrade(secret_name, row.version)
    ring = place.settings.require_ring()
    user = str(actor_id) if actor_id else None
    if not place.uses.is_recorded(row, user):
        envelope.open(ring, secret_name, row.version, row)
        await place.uses.record(row, user)
    return envelope.open(ring, secret_name, row.version, row)


async def get_version(
    datasette: Datasette, name: str, version: int, *, actor_id: str | None = None
) -> str:
    """The value of one stored version, whatever the environment says, deleted or not.

    Raises InvalidSecret when there is no such version or it was destroyed, and what
    `get_secret` raises.
    """
    place = vault(datasette)

    def find_secret_version(conn: Any) -> store.Row:
        return store.find_version(conn, name, version)

    row = await store.read(place.db, find_secret_version)
    if row.is_legacy:
        raise NeedsUpgrade(name, version)
    ring = place.settings.require_ring()
    envelope.open(ring, name, version, row)
    await place.uses.record(row, _id(actor_id))
    return envelope.open(ring, name, version, row)


async def set_secret(
    datasette: Datasette,
    name: str,
    value: str,
    *,
    note: str | None = None,
    actor_id: str | None = None,
    expected_version: int | None = None,
) -> int:
    """Store a new version of a secret and return its number: 1, 2, 3 …

    `value`: 1 to 65,536 bytes of UTF-8 with no NUL. `note`: up to 100 characters for
    people; None keeps the one before. `expected_version`: the newest version that the
    caller knows of, 0 for none; None not to check.

    Raises InvalidSecret, VersionConflict, NotConfigured and DatabaseUnavailable; nothing
    is then stored.
    """
    plaintext = envelope.Plaintext.parse(value)
    del value
    if isinstance(plaintext, str):
        raise InvalidSecret(f"The value of {name} cannot be stored: {plaintext}")
    place = vault(datasette)
    await _check_name(datasette, place, name)
    _check_note(note)
    ring = place.settings.require_ring()
    _check_holds_no_key(name, plaintext, ring)
    await store.ensure_migrated(place.db)

    def seal(version: int) -> envelope.Sealed:
        return plaintext.seal(ring.primary, name, version)

    def insert_secret_version(conn: Any, track_event: TrackEvent) -> int:
        version = store.insert_version(
            conn,
            name,
            seal,
            note=note,
            actor_id=_id(actor_id),
            now=now(),
            expected_version=expected_version,
        )
        _announce(
            datasette, track_event, events.SetSecret(_actor(actor_id), name, version)
        )
        return version

    return await store.write(place.db, insert_secret_version)


async def check_settable(
    datasette: Datasette, name: str, note: str | None = None
) -> None:
    """Raise what `set_secret` would for this name and note, before a value is asked for."""
    place = vault(datasette)
    await _check_name(datasette, place, name)
    _check_note(note)
    place.settings.require_ring()


async def set_secrets(
    datasette: Datasette,
    values: Mapping[str, envelope.Plaintext],
    *,
    skip_existing: bool = False,
    dry_run: bool = False,
    actor_id: str | None = None,
) -> dict[str, int | None]:
    """Store a new version of each secret, all of them in one transaction, or none.

    Returns the number of each new version. `skip_existing`: leave a name of which
    something is stored, even if it is deleted, as it is; its number is then None.
    `dry_run`: only say what the numbers would be.

    Raises what `set_secret` raises.
    """
    place = vault(datasette)
    for name in values:
        await _check_name(datasette, place, name)
    ring = place.settings.require_ring()
    for name, value in values.items():
        _check_holds_no_key(name, value, ring)
    if dry_run:
        return {
            name: _next(await store.history(place.db, name), skip_existing)
            for name in values
        }
    await store.ensure_migrated(place.db)

    def sealer(name: str) -> Callable[[int], envelope.Sealed]:
        return lambda version: values[name].seal(ring.primary, name, version)

    def insert_secret_versions(
        conn: Any, track_event: TrackEvent
    ) -> dict[str, int | None]:
        stored: dict[str, int | None] = {}
        for name in values:
            if skip_existing and store.is_stored(conn, name):
                stored[name] = None
                continue
            stored[name] = version = store.insert_version(
                conn,
                name,
                sealer(name),
                note=None,
                actor_id=_id(actor_id),
                now=now(),
            )
            _announce(
                datasette,
                track_event,
                events.SetSecret(_actor(actor_id), name, version),
            )
        return stored

    return await store.write(place.db, insert_secret_versions)


def _next(versions: list[store.Version], skip_existing: bool) -> int | None:
    if versions and skip_existing:
        return None
    numbers = [each.version for each in versions if type(each.version) is int]
    return max([0, *numbers]) + 1 + len(versions) - len(numbers)


async def set_note(
    datasette: Datasette,
    name: str,
    note: str,
    *,
    actor_id: str | None = None,
    expected_version: int | None = None,
) -> int:
    """Change the note of the newest version, whose number is returned.

    Raises InvalidSecret, VersionConflict, NotConfigured and DatabaseUnavailable.
    """
    place = vault(datasette)
    _check_note(note)
    await store.ensure_migrated(place.db)

    def set_secret_note(conn: Any) -> int:
        return store.set_note(
            conn,
            name,
            note,
            actor_id=_id(actor_id),
            now=now(),
            expected_version=expected_version,
        )

    return await store.write(place.db, set_secret_note)


async def delete_secret(
    datasette: Datasette,
    name: str,
    *,
    actor_id: str | None = None,
    expected_version: int | None = None,
) -> int:
    """Mark the newest version as deleted and return its number; it can be restored.

    `get_secret` then returns None. One that is deleted already stays as it is.
    Raises InvalidSecret when nothing is stored, VersionConflict and DatabaseUnavailable.
    """
    place = vault(datasette)
    await store.ensure_migrated(place.db)

    def delete_secret_version(conn: Any, track_event: TrackEvent) -> int:
        version, changed = store.mark_deleted(
            conn,
            name,
            actor_id=_id(actor_id),
            now=now(),
            expected_version=expected_version,
        )
        if changed:
            _announce(
                datasette,
                track_event,
                events.DeleteSecret(_actor(actor_id), name, version),
            )
        return version

    return await store.write(place.db, delete_secret_version)


async def restore_secret(
    datasette: Datasette,
    name: str,
    *,
    actor_id: str | None = None,
    expected_version: int | None = None,
) -> int:
    """Clear the deleted mark of the newest version and return its number.

    Raises InvalidSecret when nothing is stored or that version was destroyed,
    VersionConflict and DatabaseUnavailable.
    """
    place = vault(datasette)
    await store.ensure_migrated(place.db)

    def restore_secret_version(conn: Any, track_event: TrackEvent) -> int:
        version, changed = store.clear_deleted(
            conn, name, expected_version=expected_version
        )
        if changed:
            _announce(
                datasette,
                track_event,
                events.RestoreSecret(_actor(actor_id), name, version),
            )
        return version

    return await store.write(place.db, restore_secret_version)


async def roll_back(
    datasette: Datasette,
    name: str,
    version: int,
    *,
    actor_id: str | None = None,
    expected_version: int | None = None,
) -> int:
    """Seal the value of an earlier version afresh as a new one; returns its number.

    Raises InvalidSecret when there is no such version or it was destroyed, and what
    `get_secret` and `set_secret` raise.
    """
    place = vault(datasette)
    ring = place.settings.require_ring()
    await store.ensure_migrated(place.db)

    def roll_back_secret(conn: Any, track_event: TrackEvent) -> int:
        row = store.find_version(conn, name, version)
        if row.is_legacy:
            raise NeedsUpgrade(name, version)
        new_version = store.insert_version(
            conn,
            name,
            lambda number: envelope.reseal(ring, row.name, row.version, row, number),
            note=None,
            actor_id=_id(actor_id),
            now=now(),
            expected_version=expected_version,
        )
        _announce(
            datasette,
            track_event,
            events.SetSecret(_actor(actor_id), name, new_version),
        )
        return new_version

    return await store.write(place.db, roll_back_secret)


async def destroy_versions(
    datasette: Datasette,
    name: str,
    versions: Sequence[object],
    *,
    actor_id: str | None = None,
    expected_version: int | None = None,
    vacuum: bool = False,
) -> tuple[int, store.CleanUp]:
    """Remove the values of some versions for good: how many, and what became of the rest.

    Their record stays. `vacuum`: rewrite the file even if it is large or a named
    database. Raises InvalidSecret when a version is not stored, VersionConflict and
    DatabaseUnavailable.
    """
    place = vault(datasette)
    await store.ensure_migrated(place.db)

    def destroy_secret_versions(conn: Any, track_event: TrackEvent) -> int:
        destroyed = store.destroy(
            conn, name, versions, expected_version=expected_version
        )
        if destroyed:
            _announce(
                datasette,
                track_event,
                events.DestroySecret(_actor(actor_id), name, list(versions)),
            )
        return destroyed

    destroyed = await store.write(place.db, destroy_secret_versions)
    return destroyed, await clean_up(place, vacuum=vacuum)


async def clean_up(place: Vault, *, vacuum: bool = False) -> store.CleanUp:
    """Leave nothing of destroyed values and replaced wraps in the database's files.

    Its `remains` says in one sentence what may be left and what to do about it.
    """
    is_small = store.file_bytes(place.db) < store.VACUUM_MAX_BYTES
    vacuum = vacuum or (place.settings.database is None and is_small)
    done = await store.clean_up(place.db, vacuum=vacuum)
    remains = [done.remains] if done.remains else []
    if not vacuum:
        remains.append(
            "traces of old ciphertext may remain in unused parts of the file: run "
            "'datasette secrets rotate-key --vacuum' when it can be rewritten"
        )
    if not done.log_emptied:
        remains.append(
            "old ciphertext remains in the write-ahead log, which another process "
            "holds: run 'datasette secrets rotate-key' again when that has finished"
        )
    return done._replace(remains="; ".join(remains) or None)


# What there is, all of it known without opening anything.


STATES = (
    "stored",
    "environment",
    "not-set",
    "deleted",
    "destroyed",
    "needs-upgrade",
    "needs-key",
)


class Listed(NamedTuple):
    """A secret as the list shows it.

    `state`: one of STATES. `registered`: what the plugin says that waits for it, if one
    does. `newest`: its newest stored version, also where the environment overrides it.
    `used`: the last use of it, whichever its version was.
    """

    name: str
    state: str
    registered: registry.Secret | None
    newest: store.Version | None
    used: store.LastUse


async def list_secrets(
    datasette: Datasette,
    *,
    contains: str = "",
    after: str | None = None,
    limit: int | None = None,
    waiting: bool = True,
) -> list[Listed]:
    """Every secret that is registered or stored, by name.

    `contains`: only names with this in them, whatever the case. `after`, `limit`: a page.
    `waiting`: False leaves out what `waiting_secrets` lists. Reserved names are left out.
    Raises DatabaseUnavailable.
    """
    place = vault(datasette)
    registered = {
        secret.name: secret for secret in await registry.get_secrets(datasette)
    }
    stored = await _newest_versions(place, contains, after, limit)
    asked_for = {
        name
        for name in registered
        if contains.casefold() in name.casefold() and (after is None or name > after)
    }
    # Names as code points, which is how SQLite orders their UTF-8. A registered name that
    # lies after a full page of stored ones is cut off again, so it need not be known here
    # whether it is stored.
    uses = await store.last_uses(place.db, list(stored))
    listed = (
        _listed(place, name, registered.get(name), stored.get(name), uses.get(name))
        for name in sorted(asked_for | stored.keys())
        if not place.settings.is_reserved(name)
    )
    return [each for each in listed if waiting or each.state != "not-set"][:limit]


async def _newest_versions(
    place: Vault, contains: str, after: str | None, limit: int | None
) -> dict[str, store.Version]:
    """`limit` of the newest versions by name. Reserved names do not count."""
    found: dict[str, store.Version] = {}
    while True:
        versions = await store.newest_versions(
            place.db,
            contains=contains,
            after=after,
            limit=-1 if limit is None else limit,
        )
        found |= {
            each.name: each
            for each in versions
            if not place.settings.is_reserved(each.name)
        }
        if limit is None or len(found) >= limit or len(versions) < limit:
            return found
        after = versions[-1].name


async def waiting_secrets(datasette: Datasette, *, contains: str = "") -> list[Listed]:
    """What plugins registered and has no value, in the order of registration.

    Nobody ever set it, or the newest version was destroyed; one that was deleted does not
    wait. `contains` as in `list_secrets`. Raises DatabaseUnavailable.
    """
    place = vault(datasette)
    registered = [
        secret
        for secret in await registry.get_secrets(datasette)
        if contains.casefold() in secret.name.casefold()
        and not place.settings.is_reserved(secret.name)
    ]
    names = [each.name for each in registered]
    stored = {
        version.name: version
        for version in await store.newest_versions(place.db, names=names)
    }
    uses = await store.last_uses(place.db, names)
    listed = [
        _listed(place, name, secret, stored.get(name), uses.get(name))
        for name, secret in zip(names, registered, strict=True)
    ]
    return [each for each in listed if each.state in ("not-set", "destroyed")]


async def count_secrets(datasette: Datasette, *, contains: str = "") -> int:
    """How many `list_secrets` lists, all pages together. Raises DatabaseUnavailable."""
    place = vault(datasette)
    registered = [
        secret.name
        for secret in await registry.get_secrets(datasette)
        if contains.casefold() in secret.name.casefold()
        and not place.settings.is_reserved(secret.name)
    ]
    stored = await store.stored_names(place.db, registered)
    return len(set(registered) - stored) + await store.count_names(
        place.db, contains=contains, reserved=place.settings.reserved
    )


async def find_secret(datasette: Datasette, name: str) -> Listed | None:
    """The secret of this name if it is registered or stored. Raises DatabaseUnavailable."""
    place = vault(datasette)
    if place.settings.is_reserved(name):
        return None
    versions = await store.history(place.db, name)
    registered = {
        secret.name: secret for secret in await registry.get_secrets(datasette)
    }
    if not versions and name not in registered:
        return None
    uses = await store.last_uses(place.db, [name])
    newest = versions[0] if versions else None
    return _listed(place, name, registered.get(name), newest, uses.get(name))


def _listed(
    place: Vault,
    name: str,
    registered: registry.Secret | None,
    newest: store.Version | None,
    used: store.LastUse | None,
) -> Listed:
    state = _state(place, name, newest)
    return Listed(name, state, registered, newest, used or store.LastUse())


def _state(place: Vault, name: str, newest: store.Version | None) -> str:
    if place.environment_value(name) is not None:
        return "environment"
    return "not-set" if newest is None else version_state(place, newest)


def version_state(place: Vault, version: store.Version) -> str:
    """One of STATES for a stored version by itself, the environment left aside."""
    if version.is_destroyed:
        return "destroyed"
    if version.is_deleted:
        return "deleted"
    if version.is_legacy:
        return "needs-upgrade"
    ring = place.settings.ring
    return "stored" if ring is not None and version.key_id in ring else "needs-key"


async def announce_rotation(
    datasette: Datasette, key_id: str, versions: int, actor_id: str | None
) -> None:
    """Send the event of a rotation."""
    if hasattr(datasette, "event_classes"):
        event = events.RotateEncryptionKey(_actor(actor_id), key_id, versions)
        await datasette.track_event(event)


async def announce_upgrade(
    datasette: Datasette, versions: int, actor_id: str | None
) -> None:
    """Send the event of an upgrade."""
    if hasattr(datasette, "event_classes"):
        await datasette.track_event(events.UpgradeSecrets(_actor(actor_id), versions))


async def stop(datasette: Datasette) -> None:
    """Write the uses that wait."""
    known: Vault | None = getattr(datasette, _VAULT, None)
    if known is not None:
        await known.uses.flush()


async def is_registered(datasette: Datasette, name: str) -> bool:
    """Whether a plugin registered a secret of this name."""
    return any(secret.name == name for secret in await registry.get_secrets(datasette))


async def _check_name(datasette: Datasette, place: Vault, name: object) -> None:
    if not isinstance(name, str) or not name:
        raise InvalidSecret("A secret needs a name")
    if place.settings.is_reserved(name):
        raise InvalidSecret(
            f"{name} is reserved: DATASETTE_SECRETS_{name.upper()} holds a master key"
        )
    if len(name) > NAME_MAX_CHARACTERS:
        raise InvalidSecret(
            f"A name has at most {NAME_MAX_CHARACTERS} characters, not {len(name)}"
        )
    is_variable = name.startswith(config.ENV_PREFIX)
    if _NAME.match(name) and not is_variable:
        return
    if await is_registered(datasette, name) or await store.history(place.db, name):
        return
    if is_variable:
        raise InvalidSecret(
            f"{name} is what the environment variable of a secret is called: the secret's "
            f"own name is {name.removeprefix(config.ENV_PREFIX)}"
        )
    raise InvalidSecret(
        "A name is made of letters, digits and underscores and does not begin with a digit"
    )


def _check_holds_no_key(
    name: str, value: envelope.Plaintext, ring: envelope.KeyRing
) -> None:
    if value.contains_key_of(ring):
        raise InvalidSecret(
            f"The value of {name} contains a master key, which is no secret to store"
        )


def _check_note(note: object) -> None:
    if note is None:
        return
    if not isinstance(note, str):
        raise InvalidSecret("A note is text")
    if len(note) > NOTE_MAX_CHARACTERS:
        raise InvalidSecret(
            f"A note has at most {NOTE_MAX_CHARACTERS} characters, not {len(note)}"
        )
    if "\0" in note or any("\ud800" <= character <= "\udfff" for character in note):
        raise InvalidSecret("A note is valid UTF-8 without NUL")


def now() -> str:
    """This second in UTC, `YYYY-MM-DD HH:MM:SS`."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())


def _id(actor_id: object) -> str | None:
    return str(actor_id) if actor_id else None


def _actor(actor_id: object) -> dict[str, str] | None:
    return {"id": str(actor_id)} if actor_id else None


def _announce(datasette: Datasette, track_event: TrackEvent, event: Event) -> None:
    """Queue the event for after the commit. The shell starts no plugins, so has none."""
    if hasattr(datasette, "event_classes"):
        track_event(event)
