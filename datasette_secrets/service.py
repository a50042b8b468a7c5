"""What can be done with a secret: get, set, delete, restore, roll back, destroy.

An environment variable is read before the database. `None` means "not set"; anything
wrong raises. A value is never a local variable of a frame that can raise, or that waits
for something that can: with `rich` installed, Datasette prints locals.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import changes, config, database, envelope, inspection, registry, store
from .changes import Changing
from .errors import InvalidSecret, NeedsUpgrade
from .events import NOBODY, Author, Change
from .instance import Instance, get_instance

if TYPE_CHECKING:
    from datasette.app import Datasette


NAME_MAX_CHARACTERS = 128


NOTE_MAX_CHARACTERS = 100


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")


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
    renew_by: str | None = None,
    keep: int | None = None,
) -> int:
    """Store a new version of a secret and return its number: 1, 2, 3 …

    `value`: 1 to 65,536 bytes of UTF-8 with no NUL. `note`: up to 100 characters for
    people; None keeps the one before. `expected_version`: the newest version that the
    caller knows of, 0 for none; None not to check. `renew_by`: `YYYY-MM-DD`, the day by
    which people should store another value; None for no day. `keep`: how many versions
    to keep, 2 or more, for credentials that a plugin stores itself; older ones are
    removed with their records. None keeps all.

    Raises InvalidSecret, VersionConflict, NotConfigured and DatabaseUnavailable; nothing
    is then stored.
    """
    stored = set_value(
        datasette,
        name,
        value,
        note=note,
        author=_plugin(actor_id),
        expected_version=expected_version,
        renew_by=renew_by,
        keep=keep,
    )
    del value
    return await stored


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
    return await delete(
        datasette, name, author=_plugin(actor_id), expected_version=expected_version
    )


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
    return await restore(
        datasette, name, author=_plugin(actor_id), expected_version=expected_version
    )


def _plugin(actor_id: object) -> Author:
    return Author(_id(actor_id), "plugin")


# What the pages, the commands and the functions above have in common.


async def set_value(
    datasette: Datasette,
    name: str,
    value: str | envelope.Plaintext,
    *,
    note: str | None = None,
    author: Author = NOBODY,
    expected_version: int | None = None,
    renew_by: str | None = None,
    keep: int | None = None,
    checked: str | None = None,
) -> int:
    """`set_secret`, by any author. `checked`: the outcome if the value was checked before."""
    try:
        plaintext = (
            value
            if isinstance(value, envelope.Plaintext)
            else envelope.Plaintext.parse(value)
        )
    except InvalidSecret as error:
        raise InvalidSecret(f"The value of {name} cannot be stored: {error}") from None
    finally:
        del value
    instance = get_instance(datasette)
    await _check_name(datasette, instance, name)
    _check_note(note)
    _check_renew_by(renew_by)
    if keep is not None and (type(keep) is not int or keep < 2):
        raise InvalidSecret("keep is a number of versions, 2 or more")
    ring = instance.settings.require_ring()
    _check_holds_no_key(name, plaintext, ring)

    def seal(version: int) -> envelope.Sealed:
        return plaintext.seal(ring.primary, name, version)

    def insert_secret_version(changing: Changing) -> tuple[int, list[Change]]:
        version = store.insert_version(
            changing,
            name,
            seal,
            note=note,
            renew_by=renew_by,
            expected_version=expected_version,
        )
        pruned = store.prune(changing, name, keep) if keep else []
        detail = {"pruned": pruned} if pruned else None
        made = [Change("set-secret", name, version, detail)]
        if checked is not None:
            made.append(Change("check-secret", name, version, {"outcome": checked}))
        return version, made

    return await changes.make(datasette, instance.db, author, insert_secret_version)


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
    author: Author = NOBODY,
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

    def sealer(name: str) -> Callable[[int], envelope.Sealed]:
        return lambda version: values[name].seal(ring.primary, name, version)

    def insert_secret_versions(
        changing: Changing,
    ) -> tuple[dict[str, int | None], list[Change]]:
        stored: dict[str, int | None] = {}
        for name in values:
            is_skipped = skip_existing and store.is_stored(changing.conn, name)
            stored[name] = (
                None
                if is_skipped
                else store.insert_version(changing, name, sealer(name), note=None)
            )
        return stored, [
            Change("set-secret", name, version)
            for name, version in stored.items()
            if version is not None
        ]

    return await changes.make(datasette, instance.db, author, insert_secret_versions)


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
    author: Author = NOBODY,
    expected_version: int | None = None,
) -> int:
    """Change the note of the newest version, whose number is returned.

    Raises InvalidSecret, VersionConflict, NotConfigured and DatabaseUnavailable.
    """
    instance = get_instance(datasette)
    _check_note(note)

    def set_secret_note(changing: Changing) -> tuple[int, list[Change]]:
        version = store.update_newest(
            changing, name, {"note": note}, expected_version=expected_version
        )
        return version, [Change("set-note", name, version)]

    return await changes.make(datasette, instance.db, author, set_secret_note)


async def set_renew_by(
    datasette: Datasette,
    name: str,
    renew_by: str | None,
    *,
    author: Author = NOBODY,
    expected_version: int | None = None,
) -> int:
    """Change or clear the day by which to renew the newest version; returns its number.

    Raises InvalidSecret, VersionConflict and DatabaseUnavailable.
    """
    instance = get_instance(datasette)
    _check_renew_by(renew_by)

    def set_secret_renew_by(changing: Changing) -> tuple[int, list[Change]]:
        version = store.update_newest(
            changing, name, {"renew_by": renew_by}, expected_version=expected_version
        )
        change = Change("set-renew-by", name, version, {"renew_by": renew_by})
        return version, [change]

    return await changes.make(datasette, instance.db, author, set_secret_renew_by)


async def log_read(
    datasette: Datasette, name: str, version: int | None, *, author: Author
) -> None:
    """Log that a person was shown a stored value; `version` None for the newest.

    Logs nothing where the value came from the environment. Raises DatabaseUnavailable.
    """
    instance = get_instance(datasette)
    if version is None:
        if instance.environment_value(name) is not None:
            return
        newest = await store.newest_version(instance.reader, name)
        version = newest and newest.version
    change = Change("get-secret", name, version)
    await changes.record(instance.db, author, change)


async def delete(
    datasette: Datasette,
    name: str,
    *,
    author: Author = NOBODY,
    expected_version: int | None = None,
) -> int:
    """`delete_secret`, by any author."""
    instance = get_instance(datasette)

    def delete_secret_version(changing: Changing) -> tuple[int, list[Change]]:
        version, is_changed = store.mark_deleted(
            changing, name, expected_version=expected_version
        )
        return version, [Change("delete-secret", name, version)] * is_changed

    return await changes.make(datasette, instance.db, author, delete_secret_version)


async def restore(
    datasette: Datasette,
    name: str,
    *,
    author: Author = NOBODY,
    expected_version: int | None = None,
) -> int:
    """`restore_secret`, by any author."""
    instance = get_instance(datasette)

    def restore_secret_version(changing: Changing) -> tuple[int, list[Change]]:
        version, is_changed = store.clear_deleted(
            changing, name, expected_version=expected_version
        )
        return version, [Change("restore-secret", name, version)] * is_changed

    return await changes.make(datasette, instance.db, author, restore_secret_version)


async def roll_back(
    datasette: Datasette,
    name: str,
    version: int,
    *,
    author: Author = NOBODY,
    expected_version: int | None = None,
) -> int:
    """Seal the value of an earlier version afresh as a new one; returns its number.

    The new version has the note of the earlier one. Raises InvalidSecret when there is no
    such version or it was destroyed, and what `get_secret` and `set_secret` raise.
    """
    instance = get_instance(datasette)
    ring = instance.settings.require_ring()

    def roll_back_secret(changing: Changing) -> tuple[int, list[Change]]:
        row = store.find_version(changing.conn, name, version)
        if row.is_legacy:
            raise NeedsUpgrade(name, version)
        new_version = store.insert_version(
            changing,
            name,
            lambda number: envelope.reseal(ring, row.name, row.version, row, number),
            note=store.note_of(changing.conn, row.id),
            expected_version=expected_version,
        )
        detail = {"rolled_back_from": row.version}
        return new_version, [Change("set-secret", name, new_version, detail)]

    return await changes.make(datasette, instance.db, author, roll_back_secret)


async def destroy_versions(
    datasette: Datasette,
    name: str,
    versions: Sequence[object],
    *,
    author: Author = NOBODY,
    expected_version: int | None = None,
    vacuum: bool = False,
) -> tuple[int, database.CleanUp]:
    """Remove the values of some versions for good: how many, and what became of the rest.

    Their record stays. `vacuum`: rewrite the file even if it is large or a named
    database. Raises InvalidSecret when a version is not stored, VersionConflict and
    DatabaseUnavailable.
    """
    instance = get_instance(datasette)

    def destroy_secret_versions(changing: Changing) -> tuple[int, list[Change]]:
        destroyed = store.destroy(
            changing, name, versions, expected_version=expected_version
        )
        version = destroyed[0] if len(destroyed) == 1 else None
        change = Change("destroy-secret", name, version, {"versions": destroyed})
        return len(destroyed), [change] if destroyed else []

    await inspection.require_sound(instance.db)
    destroyed = await changes.make(
        datasette, instance.db, author, destroy_secret_versions
    )
    return destroyed, await clean_up(instance, vacuum=vacuum)


async def destroy_row(
    datasette: Datasette,
    row_id: int,
    *,
    author: Author = NOBODY,
    vacuum: bool = False,
) -> database.CleanUp:
    """Remove the value of a damaged row, which has no name or version to call it by.

    Raises InvalidSecret when there is no such row, and DatabaseUnavailable.
    """
    instance = get_instance(datasette)

    def destroy_secret_row(changing: Changing) -> tuple[None, list[Change]]:
        name, version = store.destroy_row(changing, row_id)
        detail = {"versions": [version], "id": row_id}
        return None, [Change("destroy-secret", name, version, detail)]

    await inspection.require_sound(instance.db)
    await changes.make(datasette, instance.db, author, destroy_secret_row)
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


def _check_renew_by(renew_by: object) -> None:
    if renew_by is None:
        return
    try:
        if not isinstance(renew_by, str) or not _DATE.match(renew_by):
            raise ValueError
        datetime.date.fromisoformat(renew_by)
    except ValueError:
        raise InvalidSecret(
            "A date to renew by is YYYY-MM-DD, and one that exists"
        ) from None


def _id(actor_id: object) -> str | None:
    return str(actor_id) if actor_id else None
