"""What secrets there are and in which state, all of it known without decrypting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from . import registry, store
from .instance import Instance, get_instance

if TYPE_CHECKING:
    from datasette.app import Datasette


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
    registered: registry.Registered | None
    newest: store.Version | None
    used: store.LastUse


@dataclass(frozen=True)
class SecretState:
    """What is known of a secret without reading its value.

    `state`: `"stored"`, `"environment"`, `"not-set"`, `"deleted"`, `"destroyed"`,
    `"needs-upgrade"` or `"needs-key"`, as in the JSON API. `version`: the number of the
    newest stored version, also where the environment overrides it; None without one.
    `source`: where `get_secret` looks for the value, `"environment"` or `"database"`;
    None if the secret has none. `renew_by`: `YYYY-MM-DD` or None.
    """

    state: str
    version: int | None
    source: str | None
    renew_by: str | None

    @property
    def is_set(self) -> bool:
        """Whether there is a value that can be read, as far as is known without reading."""
        return self.state in ("stored", "environment")


async def secret_state(datasette: Datasette, name: str) -> SecretState:
    """Whether a secret is set, for a page that offers what needs it.

    `name`: registered or not. Nothing is decrypted and no use is recorded, so it can be
    asked on every page. A damaged row raises nothing here: `get_secret` says what is
    wrong when the value is needed. Raises DatabaseUnavailable.
    """
    instance = get_instance(datasette)
    newest = await store.newest(instance.reader, name)
    state = _state(instance, name, newest)
    version = newest.version if newest else None
    renew_by = newest.renew_by if newest else None
    return SecretState(
        state=state,
        version=version if isinstance(version, int) else None,
        source=_SOURCES.get(state),
        renew_by=renew_by if isinstance(renew_by, str) else None,
    )


_SOURCES = {
    "environment": "environment",
    "stored": "database",
    "needs-upgrade": "database",
    "needs-key": "database",
}


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
    instance = get_instance(datasette)
    registered = {
        secret.name: secret for secret in await registry.registered_secrets(datasette)
    }
    stored = await _newest_versions(instance, contains, after, limit)
    asked_for = {
        name
        for name in registered
        if contains.casefold() in name.casefold() and (after is None or name > after)
    }
    # Names as code points, which is how SQLite orders their UTF-8. A registered name that
    # lies after a full page of stored ones is cut off again, so it need not be known here
    # whether it is stored.
    uses = await store.last_uses(instance.db, list(stored))
    listed = (
        _listed(instance, name, registered.get(name), stored.get(name), uses.get(name))
        for name in sorted(asked_for | stored.keys())
        if not instance.settings.is_reserved(name)
    )
    return [each for each in listed if waiting or each.state != "not-set"][:limit]


async def _newest_versions(
    instance: Instance, contains: str, after: str | None, limit: int | None
) -> dict[str, store.Version]:
    """`limit` of the newest versions by name. Reserved names do not count."""
    found: dict[str, store.Version] = {}
    while True:
        versions = await store.newest_versions(
            instance.db,
            contains=contains,
            after=after,
            limit=-1 if limit is None else limit,
        )
        found |= {
            each.name: each
            for each in versions
            if not instance.settings.is_reserved(each.name)
        }
        if limit is None or len(found) >= limit or len(versions) < limit:
            return found
        after = versions[-1].name


async def waiting_secrets(datasette: Datasette, *, contains: str = "") -> list[Listed]:
    """What plugins registered and has no value, in the order of registration.

    Nobody ever set it, or the newest version was destroyed; one that was deleted does not
    wait. `contains` as in `list_secrets`. Raises DatabaseUnavailable.
    """
    instance = get_instance(datasette)
    registered = [
        secret
        for secret in await registry.registered_secrets(datasette)
        if contains.casefold() in secret.name.casefold()
        and not instance.settings.is_reserved(secret.name)
    ]
    names = [each.name for each in registered]
    stored = {
        version.name: version
        for version in await store.newest_versions(instance.db, names=names)
    }
    uses = await store.last_uses(instance.db, names)
    listed = [
        _listed(instance, name, secret, stored.get(name), uses.get(name))
        for name, secret in zip(names, registered, strict=True)
    ]
    return [each for each in listed if each.state in ("not-set", "destroyed")]


async def count_secrets(datasette: Datasette, *, contains: str = "") -> int:
    """How many `list_secrets` lists, all pages together. Raises DatabaseUnavailable."""
    instance = get_instance(datasette)
    registered = [
        secret.name
        for secret in await registry.registered_secrets(datasette)
        if contains.casefold() in secret.name.casefold()
        and not instance.settings.is_reserved(secret.name)
    ]
    stored = await store.stored_names(instance.db, registered)
    return len(set(registered) - stored) + await store.count_names(
        instance.db, contains=contains, reserved=instance.settings.reserved
    )


async def find_secret(datasette: Datasette, name: str) -> Listed | None:
    """The secret of this name if it is registered or stored. Raises DatabaseUnavailable."""
    instance = get_instance(datasette)
    if instance.settings.is_reserved(name):
        return None
    versions = await store.history(instance.db, name)
    registered = {
        secret.name: secret for secret in await registry.registered_secrets(datasette)
    }
    if not versions and name not in registered:
        return None
    uses = await store.last_uses(instance.db, [name])
    newest = versions[0] if versions else None
    return _listed(instance, name, registered.get(name), newest, uses.get(name))


def _listed(
    instance: Instance,
    name: str,
    registered: registry.Registered | None,
    newest: store.Version | None,
    used: store.LastUse | None,
) -> Listed:
    state = _state(instance, name, newest)
    return Listed(name, state, registered, newest, used or store.LastUse())


def _state(instance: Instance, name: str, newest: store.Version | None) -> str:
    if instance.environment_value(name) is not None:
        return "environment"
    return "not-set" if newest is None else version_state(instance, newest)


def version_state(instance: Instance, version: store.Version) -> str:
    """One of STATES for a stored version by itself, the environment left aside."""
    if version.is_destroyed:
        return "destroyed"
    if version.is_deleted:
        return "deleted"
    if version.is_legacy:
        return "needs-upgrade"
    ring = instance.settings.ring
    return "stored" if ring is not None and version.key_id in ring else "needs-key"
