"""What can be done with a secret: get, set, delete, restore, roll back, destroy.

`None` means "not set"; a failure always raises. A frame that can raise, or that awaits
such a frame, never has a value in a local variable, since Datasette prints locals with
`rich`.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from . import changes, config, database, envelope, fernet, inspection, registry, store
from .changes import Changing
from .errors import (
    DatabaseUnavailable,
    InvalidSecret,
    NeedsUpgrade,
    SecretsError,
    VersionConflict,
    without_frames,
)
from .events import Change
from .instance import Instance, get_instance
from .schema import TABLE

if TYPE_CHECKING:
    from datasette.app import Datasette


T = TypeVar("T")

NAME_MAX_CHARACTERS = 128
NOTE_MAX_CHARACTERS = 100
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


async def get_secret(
    datasette: Datasette, secret_name: str, actor_id: str | None = None
) -> str | None:
    """The value of a secret, or None when it is not set.

    A non-empty environment variable `DATASETTE_SECRETS_<NAME>` comes first, then the
    newest stored version. None if that is deleted or destroyed.

    Args:
        secret_name: Registered or not.
        actor_id: The actor for whom it is used, recorded as `last_used_by`. None for
            nobody in particular.

    Raises:
        NotConfigured: A version is stored, and no master key is configured.
        UnknownMasterKey: The version needs another master key.
        NeedsUpgrade: datasette-secrets 0.x stored it.
        CannotOpen: Its row was damaged or tampered with.
        DatabaseUnavailable: The database cannot be read.
    """
    instance = get_instance(datasette)
    if instance.environment_value(secret_name) is not None:
        return instance.environment_value(secret_name)
    row = await store.newest_version(instance.reader, secret_name)
    if row is None or row.deleted_at is not None or row.is_destroyed:
        return None
    return await _use(instance, secret_name, row, actor_id)


async def get_version(
    datasette: Datasette, name: str, version: int, *, actor_id: str | None = None
) -> str:
    """The value of one stored version, even if it is deleted or overridden.

    Raises InvalidSecret when there is no such version or it was destroyed, and what
    `get_secret` raises.
    """
    instance = get_instance(datasette)
    row = await _read_version(instance, name, version)
    return await _use(instance, name, row, actor_id)


async def _read_version(instance: Instance, name: str, version: int) -> store.Row:
    return await database.read(
        instance.db, lambda conn: store.find_version(conn, name, version)
    )


async def _use(
    instance: Instance, name: str, row: store.Row, actor_id: str | None
) -> str:
    """The value of a row. Its use is recorded before the value is returned."""
    if row.is_legacy:
        raise _needs_upgrade(instance, row)
    ring = instance.settings.require_ring()
    user = str(actor_id) if actor_id else None
    if not instance.last_used.is_recorded(row, user):
        envelope.unseal(ring, name, row.version, row)
        await instance.last_used.record(row, user)
    return envelope.unseal(ring, name, row.version, row)


def _needs_upgrade(instance: Instance, row: store.Row) -> NeedsUpgrade:
    way_out = fernet.way_out(is_configured=instance.settings.ring is not None)
    if row.is_too_large:
        way_out = "it is too large for that, so set a shorter value"
    return NeedsUpgrade(row.name, row.version, way_out)


async def set_secret(
    datasette: Datasette,
    name: str,
    value: str,
    *,
    note: str | None = None,
    actor_id: str | None = None,
    expected_version: int | None = None,
    renew_by: str | None = None,
    keep: int | None = None,
) -> int:
    """Store a new version of a secret, and read it back.

    Args:
        name: Up to 128 characters: `[A-Za-z_][A-Za-z0-9_]*`, or what is registered or
            stored already.
        value: 1 to 65,536 bytes of UTF-8 with no NUL.
        note: Up to 100 characters for people. None keeps the one before.
        actor_id: The actor who stores it. None for nobody in particular.
        expected_version: The newest version that the caller knows of, 0 for none. None
            not to check.
        renew_by: `YYYY-MM-DD`, the day by which people should store another value. None
            for no day.
        keep: How many versions to keep, 2 or more, for credentials that a plugin stores
            itself. Older ones are removed with their records. None keeps all.

    Returns:
        The number of the new version: 1, 2, 3 …

    Raises:
        InvalidSecret: The name, value, note or another argument is not valid.
        VersionConflict: The newest version is not `expected_version`.
        NotConfigured: No master key is configured.
        NeedsUpgrade: datasette-secrets 0.x stored values that are not upgraded yet.
        DatabaseUnavailable: The database cannot be written.

    Nothing is stored when one of these is raised. An exception of another plugin's
    `track_event` is passed on too, but the value is stored.
    """
    try:
        plaintext = envelope.Plaintext.parse(value)
    except InvalidSecret as error:
        raise get_instance(datasette).value_error(name, error) from None
    finally:
        del value
    try:
        _check_note(datasette, note)
    except InvalidSecret:
        del note  # it may contain a master key
        raise
    _check_renew_by(renew_by)
    if keep is not None and (type(keep) is not int or keep < 2):
        raise InvalidSecret("keep must be a number of versions, 2 or more")
    stored = await set_secrets(
        datasette,
        {name: plaintext},
        actor_id=actor_id,
        keep=keep,
        note=note,
        renew_by=renew_by,
        expected_version=expected_version,
    )
    return stored[name] or 0


async def delete_secret(
    datasette: Datasette,
    name: str,
    *,
    actor_id: str | None = None,
    expected_version: int | None = None,
) -> int:
    """Mark the newest version as deleted. It can be restored.

    `get_secret` then returns None. A version that is already deleted stays as it is.

    Args:
        name: The name of a stored secret.
        actor_id: The actor who deletes it. None for nobody in particular.
        expected_version: As in `set_secret`.

    Returns:
        The number of that version.

    Raises:
        InvalidSecret: Nothing is stored under this name.
        VersionConflict: The newest version is not `expected_version`.
        NeedsUpgrade: datasette-secrets 0.x stored values that are not upgraded yet.
        DatabaseUnavailable: The database cannot be written.

    Exceptions of another plugin's `track_event` are as in `set_secret`.
    """

    def delete_secret_version(changing: Changing) -> int:
        newest = store.require_newest(changing.conn, name, expected_version)
        if not newest.is_deleted:
            columns = {"deleted_at": changing.at, "deleted_by": changing.actor_id}
            changing.update(TABLE, newest.id, columns)
            changing.made.append(Change("delete-secret", name, newest.version))
        return newest.version

    return await _change(datasette, actor_id, delete_secret_version)


async def restore_secret(
    datasette: Datasette,
    name: str,
    *,
    actor_id: str | None = None,
    expected_version: int | None = None,
) -> int:
    """Clear the deleted mark of the newest version.

    Args:
        name: The name of a stored secret.
        actor_id: The actor who restores it. None for nobody in particular.
        expected_version: As in `set_secret`.

    Returns:
        The number of that version.

    Raises:
        InvalidSecret: Nothing is stored under this name, or that version was destroyed.
        VersionConflict: The newest version is not `expected_version`.
        NeedsUpgrade: datasette-secrets 0.x stored values that are not upgraded yet.
        DatabaseUnavailable: The database cannot be written.

    Exceptions of another plugin's `track_event` are as in `set_secret`.
    """

    def restore_secret_version(changing: Changing) -> int:
        newest = store.require_newest(changing.conn, name, expected_version)
        if newest.is_destroyed:
            raise InvalidSecret(
                f"{name} version {newest.version} was destroyed and cannot be restored: "
                "set a new value, or roll back to an earlier version"
            )
        if newest.is_deleted:
            changing.update(TABLE, newest.id, {"deleted_at": None, "deleted_by": None})
            changing.made.append(Change("restore-secret", name, newest.version))
        return newest.version

    return await _change(datasette, actor_id, restore_secret_version)


async def _change(
    datasette: Datasette, actor_id: str | None, change: Callable[[Changing], T]
) -> T:
    return await changes.make(datasette, get_instance(datasette).db, actor_id, change)


async def check_settable(
    datasette: Datasette,
    name: str,
    value: envelope.Plaintext | None = None,
    *,
    note: str | None = None,
    renew_by: str | None = None,
    expected_version: int | None = None,
) -> None:
    """Raise what `set_secret` would raise for these arguments, as far as that is known."""
    instance = get_instance(datasette)
    await _check_name(datasette, instance, name)
    _check_note(datasette, note)
    _check_renew_by(renew_by)
    ring = instance.settings.require_ring()
    if value is not None and ring.any_appears_in(value.reveal()):
        raise InvalidSecret(
            f"The value of {name} contains a master key, which must not be stored"
        )
    if expected_version is not None:
        newest = await store.newest(instance.reader, name)
        store.check_expected(name, newest, expected_version)


async def set_secrets(
    datasette: Datasette,
    values: Mapping[str, envelope.Plaintext],
    *,
    skip_existing: bool = False,
    dry_run: bool = False,
    actor_id: str | None = None,
    keep: int | None = None,
    **options: Any,
) -> dict[str, int | None]:
    """Store a new version of each secret, all of them in one transaction, or none.

    Returns the number of each new version. `skip_existing`: do not change a secret
    that has a stored version, even a deleted one; its number is then None. `dry_run`: only
    return what the numbers would be. `options`: of `insert_version`.

    Raises what `set_secret` raises.
    """
    for name, value in values.items():
        await check_settable(datasette, name, value)
    instance = get_instance(datasette)
    ring = instance.settings.require_ring()
    if dry_run:
        return {
            name: None
            if (newest := await store.newest(instance.reader, name)) and skip_existing
            else store.next_version(name, newest)
            for name in values
        }

    def insert_secret_versions(changing: Changing) -> dict[str, int | None]:
        stored: dict[str, int | None] = dict.fromkeys(values)
        for name in values:
            if skip_existing and store.find_newest(changing.conn, name):
                continue
            seal = functools.partial(values[name].seal, ring.primary, name)
            version = store.insert_version(changing, name, seal, **options)
            pruned = store.prune(changing, name, keep) if keep else []
            detail = {"pruned": pruned} if pruned else None
            changing.made.append(Change("set-secret", name, version, detail))
            stored[name] = version
        return stored

    return await _change(datasette, actor_id, insert_secret_versions)


async def set_details(
    datasette: Datasette,
    name: str,
    details: Mapping[str, str | None],
    *,
    actor_id: str | None = None,
    expected_version: int | None = None,
    expected: Mapping[str, str | None] | None = None,
) -> tuple[int, list[str]]:
    """Change the `note`, the date `renew_by`, or both, of the newest version.

    `expected`: their old values as the caller saw them. Returns the number of the version, and
    which of them changed. Raises InvalidSecret, VersionConflict and DatabaseUnavailable.
    """
    _check_note(datasette, details.get("note"))
    _check_renew_by(details.get("renew_by"))

    def update_secret(changing: Changing) -> tuple[int, list[str]]:
        newest = store.require_newest(changing.conn, name, expected_version)
        number = newest.version
        changed = {}
        for column, detail in details.items():
            stored = getattr(newest, column) or None
            if (detail or None) == stored:
                continue
            if expected and (expected.get(column, stored) or None) != stored:
                at, by = newest.updated_at, newest.updated_by
                raise VersionConflict(name, number, number, at, by)
            changed[column] = detail
            logged = {column: detail} if column == "renew_by" else None
            changing.made.append(Change(_ACTIONS[column], name, number, logged))
        if changed:
            who = {"updated_at": changing.at, "updated_by": changing.actor_id}
            changing.update(TABLE, newest.id, {**changed, **who})
        return number, list(changed)

    return await _change(datasette, actor_id, update_secret)


_ACTIONS = {"note": "set-note", "renew_by": "set-renew-by"}


async def log_read(
    datasette: Datasette, name: str, version: int, *, actor_id: str | None = None
) -> None:
    """Log that the value of this stored version was printed. Raises DatabaseUnavailable."""
    change = Change("get-secret", name, version)
    await changes.record(datasette, get_instance(datasette).db, actor_id, change)


async def roll_back(
    datasette: Datasette,
    name: str,
    version: int,
    *,
    actor_id: str | None = None,
    expected_version: int | None = None,
) -> int:
    """Seal the value of an earlier version again as a new one. Returns its number.

    The new version has the note of the earlier one. Raises InvalidSecret when there is no
    such version or it was destroyed, and what `get_secret` and `set_secret` raise.
    """
    instance = get_instance(datasette)
    ring = instance.settings.require_ring()

    def roll_back_secret(changing: Changing) -> int:
        row = store.find_version(changing.conn, name, version)
        if row.is_legacy:
            raise _needs_upgrade(instance, row)
        new_version = store.insert_version(
            changing,
            name,
            lambda number: envelope.reseal(ring, name, version, row, number),
            note=str(row.note or ""),
            expected_version=expected_version,
        )
        detail = {"rolled_back_from": version}
        changing.made.append(Change("set-secret", name, new_version, detail))
        return new_version

    return await _change(datasette, actor_id, roll_back_secret)


async def destroy_versions(
    datasette: Datasette,
    name: str,
    versions: Sequence[int],
    *,
    actor_id: str | None = None,
    expected_version: int | None = None,
    vacuum: bool = False,
) -> tuple[int, database.CleanUp]:
    """Remove the values of some versions for good. Returns how many, and the clean-up.

    Their records stay. `vacuum`: rewrite the file even if it is large, or not the internal
    database. Raises InvalidSecret when a version is not stored, VersionConflict and
    DatabaseUnavailable.
    """

    def destroy_secret_versions(changing: Changing) -> int:
        if expected_version is not None:
            store.require_newest(changing.conn, name, expected_version)
        destroyed = store.destroy(changing, name, versions)
        if destroyed:
            version = destroyed[0] if len(destroyed) == 1 else None
            detail = {"versions": destroyed}
            changing.made.append(Change("destroy-secret", name, version, detail))
        return len(destroyed)

    instance = get_instance(datasette)
    await inspection.require_sound(instance.db)
    destroyed, made = await changes.commit(
        datasette, instance.db, actor_id, destroy_secret_versions
    )
    return destroyed, await finish(datasette, actor_id, *made, vacuum=vacuum)


async def older_versions(datasette: Datasette, name: str) -> list[int]:
    """The versions before the newest that hold a value, to be destroyed.

    Raises InvalidSecret unless the newest one, which would be left, can be decrypted.
    Raises DatabaseUnavailable.
    """
    instance = get_instance(datasette)
    newest, *older = await store.history(instance.db, name)
    try:
        row = await _read_version(instance, name, newest.version)
        if row.is_legacy:
            raise _needs_upgrade(instance, row)
        envelope.unseal(instance.settings.require_ring(), name, row.version, row)
    except DatabaseUnavailable:
        raise
    except SecretsError as error:
        raise InvalidSecret(
            f"Only the newest version would be left, which cannot be read: {error}"
        ) from None
    return [each.version for each in older if not each.is_destroyed]


async def describe_row(datasette: Datasette, row_id: int) -> str:
    """`row 17 (OPENAI_API_KEY version 3)` if it holds a value, else `row 17`."""
    rows = await store.rows_with_ids(get_instance(datasette).db, [row_id])
    holds = [f" ({row.name} version {row.version})" for row in rows]
    return f"row {row_id}{''.join(holds)}"


async def destroy_row(
    datasette: Datasette,
    row_id: int,
    *,
    actor_id: str | None = None,
    vacuum: bool = False,
) -> database.CleanUp:
    """Remove the value of a damaged row that has no valid name or version.

    Raises what `store.destroy_row` raises, and DatabaseUnavailable.
    """
    instance = get_instance(datasette)

    def destroy_secret_row(changing: Changing) -> None:
        destroyed = store.destroy_row(changing, row_id)
        if destroyed is not None:
            name, version = destroyed
            detail = {"versions": [version], "id": row_id}
            changing.made.append(Change("destroy-secret", name, version, detail))

    _, made = await changes.commit(
        datasette, instance.db, actor_id, destroy_secret_row, mends=True
    )
    return await finish(datasette, actor_id, *made, vacuum=vacuum)


async def finish(
    datasette: Datasette, actor_id: str | None, *made: Change, vacuum: bool = False
) -> database.CleanUp:
    """Clean up after changes, and then send their events, whatever happened meanwhile."""
    try:
        return await clean_up(get_instance(datasette), vacuum=vacuum)
    finally:
        await changes.announce(datasette, actor_id, *made)


async def clean_up(instance: Instance, *, vacuum: bool = False) -> database.CleanUp:
    """Remove destroyed values and replaced wraps from the database's files.

    `remains` in the result says what may be left and what to do about it.
    """
    is_small = instance.db.size < database.VACUUM_MAX_BYTES
    vacuum = vacuum or (instance.settings.database is None and is_small)
    done = await database.clean_up(instance.db, vacuum=vacuum)
    remains = [done.remains] if done.remains else []
    if not vacuum:
        remains.append(
            "traces of old ciphertext may remain in unused parts of the file: run "
            "'datasette secrets rotate-key --vacuum' when it can be rewritten"
        )
    if not done.log_emptied:
        holder = (
            "Litestream holds while it runs: stop Litestream, run 'datasette secrets "
            "rotate-key', and start Litestream again"
            if done.litestream
            else "another process holds: run 'datasette secrets rotate-key' again when "
            "that has finished"
        )
        remains.append(f"old ciphertext remains in the write-ahead log, which {holder}")
    if done.litestream:
        remains.append(
            "Litestream's folder beside the database and its replica keep older copies "
            "until their retention ends"
        )
    return done._replace(remains="; ".join(remains) or None)


async def _check_name(datasette: Datasette, instance: Instance, name: object) -> None:
    if not isinstance(name, str) or not name:
        raise InvalidSecret("A secret needs a name")
    if instance.settings.has_key_in(name):
        raise InvalidSecret("The name contains a master key, which must not be stored")
    own_name = name.removeprefix(config.ENV_PREFIX)
    if instance.settings.is_reserved(own_name):
        raise InvalidSecret(
            f"{own_name} is reserved: {config.ENV_PREFIX}{own_name.upper()} holds a master "
            "key"
        )
    if len(name) > NAME_MAX_CHARACTERS:
        raise InvalidSecret(
            f"A name has at most {NAME_MAX_CHARACTERS} characters, not {len(name)}"
        )
    is_variable = name.startswith(config.ENV_PREFIX)
    if _NAME.match(name) and not is_variable:
        return
    is_stored = await store.newest(instance.reader, name) is not None
    if is_stored or name in await registry.registered_secrets(datasette):
        return
    raise InvalidSecret(
        f"{name} is the name of an environment variable. The secret's own name is "
        f"{own_name}"
        if is_variable
        else "A name is made of letters, digits and underscores, and does not begin with "
        "a digit"
    )


@without_frames
def _check_note(datasette: Datasette, note: object) -> None:
    if note is not None and not isinstance(note, str):
        raise InvalidSecret("A note must be text")
    if note and len(note) > NOTE_MAX_CHARACTERS:
        raise InvalidSecret(
            f"A note has at most {NOTE_MAX_CHARACTERS} characters, not {len(note)}"
        )
    if note and re.search("[\0\ud800-\udfff]", note):
        raise InvalidSecret("A note must be valid UTF-8 without NUL characters")
    if note and get_instance(datasette).settings.has_key_in(note):
        raise InvalidSecret(
            "The note contains a master key, and notes are not encrypted"
        )


def _check_renew_by(renew_by: object) -> None:
    try:
        # It may be another format of ISO 8601.
        is_date = str(datetime.date.fromisoformat(str(renew_by))) == renew_by
    except ValueError:
        is_date = False
    if renew_by is not None and not is_date:
        raise InvalidSecret("A date must be valid, and written as YYYY-MM-DD")
