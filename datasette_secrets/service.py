"""What can be done with a secret: get, set, delete, restore, roll back, destroy.

An environment variable is read before the database. `None` means "not set"; anything
wrong raises. A value is never a local variable of a frame that can raise, or that waits
for something that can: with `rich` installed, Datasette prints locals.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import config, database, envelope, events, registry, schema, store
from .errors import InvalidSecret, NeedsUpgrade
from .instance import Instance, get_instance

if TYPE_CHECKING:
    from datasette.app import Datasette
    from datasette.events import Event


TrackEvent = Callable[["Event"], None]


NAME_MAX_CHARACTERS = 128


NOTE_MAX_CHARACTERS = 100


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


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
    instance = get_instance(datasette)
    if instance.environment_value(secret_name) is not None:
        return instance.environment_value(secret_name)
    row = await store.newest_version(instance.reader, secret_name)
    if row is None or row.deleted_at is not None or row.is_destroyed:
        return None
    if row.is_legacy:
        raise NeedsUpgrade(secret_name, row.version)
    ring = instance.settings.require_ring()
    user = str(actor_id) if actor_id else None
    if not instance.last_used.is_recorded(row, user):
        envelope.unseal(ring, secret_name, row.version, row)
        await instance.last_used.record(row, user)
    return envelope.unseal(ring, secret_name, row.version, row)


async def get_version(
    datasette: Datasette, name: str, version: int, *, actor_id: str | None = None
) -> str:
    """The value of one stored version, whatever the environment says, deleted or not.

    Raises InvalidSecret when there is no such version or it was destroyed, and what
    `get_secret` raises.
    """
    instance = get_instance(datasette)

    def find_secret_version(conn: Any) -> store.Row:
        return store.find_version(conn, name, version)

    row = await database.read(instance.db, find_secret_version)
    if row.is_legacy:
        raise NeedsUpgrade(name, version)
    ring = instance.settings.require_ring()
    envelope.unseal(ring, name, version, row)
    await instance.last_used.record(row, _id(actor_id))
    return envelope.unseal(ring, name, version, row)


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
    try:
        plaintext = envelope.Plaintext.parse(value)
    except InvalidSecret as error:
        raise InvalidSecret(f"The value of {name} cannot be stored: {error}") from None
    finally:
        del value
    instance = get_instance(datasette)
    await _check_name(datasette, instance, name)
    _check_note(note)
    ring = instance.settings.require_ring()
    _check_holds_no_key(name, plaintext, ring)
    await schema.ensure_migrated(instance.db)

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

    return await database.write(instance.db, insert_secret_version)


async def check_settable(
    datasette: Datasette, name: str, note: str | None = None
) -> None:
    """Raise what `set_secret` would for this name and note, before a value is asked for."""
    instance = get_instance(datasette)
    await _check_name(datasette, instance, name)
    _check_note(note)
    instance.settings.require_ring()


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
    instance = get_instance(datasette)
    for name in values:
        await _check_name(datasette, instance, name)
    ring = instance.settings.require_ring()
    for name, value in values.items():
        _check_holds_no_key(name, value, ring)
    if dry_run:
        return {
            name: _next(await store.history(instance.db, name), skip_existing)
            for name in values
        }
    await schema.ensure_migrated(instance.db)

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

    return await database.write(instance.db, insert_secret_versions)


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
    instance = get_instance(datasette)
    _check_note(note)
    await schema.ensure_migrated(instance.db)

    def set_secret_note(conn: Any) -> int:
        return store.set_note(
            conn,
            name,
            note,
            actor_id=_id(actor_id),
            now=now(),
            expected_version=expected_version,
        )

    return await database.write(instance.db, set_secret_note)


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
    instance = get_instance(datasette)
    await schema.ensure_migrated(instance.db)

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

    return await database.write(instance.db, delete_secret_version)


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
    instance = get_instance(datasette)
    await schema.ensure_migrated(instance.db)

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

    return await database.write(instance.db, restore_secret_version)


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
    instance = get_instance(datasette)
    ring = instance.settings.require_ring()
    await schema.ensure_migrated(instance.db)

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

    return await database.write(instance.db, roll_back_secret)


async def destroy_versions(
    datasette: Datasette,
    name: str,
    versions: Sequence[object],
    *,
    actor_id: str | None = None,
    expected_version: int | None = None,
    vacuum: bool = False,
) -> tuple[int, database.CleanUp]:
    """Remove the values of some versions for good: how many, and what became of the rest.

    Their record stays. `vacuum`: rewrite the file even if it is large or a named
    database. Raises InvalidSecret when a version is not stored, VersionConflict and
    DatabaseUnavailable.
    """
    instance = get_instance(datasette)
    await schema.ensure_migrated(instance.db)

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

    destroyed = await database.write(instance.db, destroy_secret_versions)
    return destroyed, await clean_up(instance, vacuum=vacuum)


async def destroy_row(
    datasette: Datasette,
    row_id: int,
    *,
    actor_id: str | None = None,
    vacuum: bool = False,
) -> database.CleanUp:
    """Remove the value of a damaged row, which has no name or version to call it by.

    Raises InvalidSecret when there is no such row, and DatabaseUnavailable.
    """
    instance = get_instance(datasette)
    await schema.ensure_migrated(instance.db)

    def destroy_secret_row(conn: Any, track_event: TrackEvent) -> None:
        name, version = store.destroy_row(conn, row_id)
        _announce(
            datasette,
            track_event,
            events.DestroySecret(_actor(actor_id), name, [version]),
        )

    await database.write(instance.db, destroy_secret_row)
    return await clean_up(instance, vacuum=vacuum)


async def clean_up(instance: Instance, *, vacuum: bool = False) -> database.CleanUp:
    """Leave nothing of destroyed values and replaced wraps in the database's files.

    Its `remains` says in one sentence what may be left and what to do about it.
    """
    is_small = database.file_bytes(instance.db) < database.VACUUM_MAX_BYTES
    vacuum = vacuum or (instance.settings.database is None and is_small)
    done = await database.clean_up(instance.db, vacuum=vacuum)
    remains = [done.remains] if done.remains else []
    if not vacuum:
        remains.append(
            "traces of old ciphertext may remain in unused parts of the file: run "
            "'datasette secrets rotate-key --vacuum' when it can be rewritten"
        )
    if not done.log_emptied and done.litestream:
        remains.append(
            "old ciphertext remains in the write-ahead log, which Litestream holds while "
            "it runs: stop Litestream, run 'datasette secrets rotate-key', and start "
            "Litestream again"
        )
    elif not done.log_emptied:
        remains.append(
            "old ciphertext remains in the write-ahead log, which another process "
            "holds: run 'datasette secrets rotate-key' again when that has finished"
        )
    if done.litestream:
        remains.append(
            "Litestream's folder beside the database and its replica keep older copies "
            "until their retention ends"
        )
    return done._replace(remains="; ".join(remains) or None)


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


async def is_registered(datasette: Datasette, name: str) -> bool:
    """Whether a plugin registered a secret of this name."""
    return any(secret.name == name for secret in await registry.get_secrets(datasette))


async def _check_name(datasette: Datasette, instance: Instance, name: object) -> None:
    if not isinstance(name, str) or not name:
        raise InvalidSecret("A secret needs a name")
    if instance.settings.is_reserved(name):
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
    if await is_registered(datasette, name) or await store.history(instance.db, name):
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
