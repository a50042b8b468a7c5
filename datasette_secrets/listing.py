"""Which secrets there are, and their states, without decrypting.

Every async function raises DatabaseUnavailable.
"""

from __future__ import annotations

import bisect
import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from . import changes, registry, store
from .instance import Instance, get_instance

if TYPE_CHECKING:
    from datasette.app import Datasette


# The pages call them by the words in `templates/datasette_secrets/macros.html`.
STATES = (
    "stored",
    "environment",
    "not-set",
    "deleted",
    "destroyed",
    "needs-upgrade",
    "needs-key",
)

#: A secret is listed first if it has to be renewed within this many days.
DUE_DAYS = 14


class Listed(NamedTuple):
    """A secret as the list shows it.

    `state`: one of STATES. `registered`: what plugins registered. `newest`: the newest
    stored version, also where the environment overrides it. `used`: the last use of any
    version. `checked`: the log row of the newest check of the newest version.
    """

    name: str
    state: str
    registered: registry.Registered | None
    newest: store.Version | None
    used: store.LastUse
    checked: changes.Entry | None


class HistoryRow(NamedTuple):
    """A version, with what the log holds about it.

    `rolled_back_from`: the version that its value was copied from. `destroyed`: the row of
    the log. `copies`: the other versions that are known to have the same value.
    `can_be_copied`: whether the secret can be rolled back to this version.
    """

    of: store.Version
    state: str
    is_newest: bool
    rolled_back_from: int | None
    destroyed: changes.Entry | None
    copies: list[int]
    can_be_copied: bool


@dataclass(frozen=True)
class SecretState:
    """What is known of a secret without reading its value.

    Attributes:
        state: `"stored"`, `"environment"`, `"not-set"`, `"deleted"`, `"destroyed"`,
            `"needs-upgrade"` or `"needs-key"`, as in the JSON API.
        version: The number of the newest stored version, also where the environment
            overrides it. None without one.
        source: Where `get_secret` looks for the value, `"environment"` or `"database"`.
            None if the secret has none.
        renew_by: `YYYY-MM-DD` or None.
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
    """Whether a secret is set, for a page that offers something that needs it.

    Nothing is decrypted and no use is recorded, so every page can call it. A damaged
    row raises nothing here, only in `get_secret`.

    Args:
        name: Registered or not.

    Raises:
        DatabaseUnavailable: The database cannot be read.
    """
    instance = get_instance(datasette)
    newest = await store.newest(instance.reader, name)
    state = _state(instance, name, newest)
    source = state if state == "environment" else None
    if state in ("stored", "needs-upgrade", "needs-key"):
        source = "database"
    version = newest.version if newest else None
    renew_by = newest.renew_by if newest else None
    return SecretState(
        state=state,
        version=version if isinstance(version, int) else None,
        source=source,
        renew_by=renew_by if isinstance(renew_by, str) else None,
    )


class Sections(NamedTuple):
    """One page of all secrets, in sections.

    `urgent`: those that cannot be read, or have to be renewed, up to the size of a page.
    `waiting`: registered and without a value, in the order of registration. `removed`:
    deleted and destroyed ones. `others`: a page of the rest. Only the first page has the
    other three. `before`, `after`: the names after which the previous and the next page
    begin; None without one, "" for the first page.
    """

    urgent: list[Listed]
    waiting: list[Listed]
    others: list[Listed]
    removed: list[Listed]
    total: int
    removed_total: int
    before: str | None
    after: str | None


async def list_secrets(
    datasette: Datasette,
    *,
    contains: str = "",
    after: str | None = None,
    limit: int | None = None,
) -> list[Listed]:
    """Every secret that is registered or stored, sorted by the code points of its name.

    `contains`: only names that contain this, ignoring case. `after`, `limit`: a page.
    Reserved names are left out.
    """
    instance = get_instance(datasette)
    registered, names = await _names(datasette, instance, contains)
    page = [name for name in names if after is None or name > after][:limit]
    return await _list(instance, registered, page)


async def list_sections(
    datasette: Datasette, contains: str, state: str, after: str, size: int
) -> Sections:
    """A page of the list, sorted by name, ignoring case.

    `contains` as in `list_secrets`. `state`: only secrets of this state, in one section.
    Only the rows of that page are read, and those of secrets in another state than
    `stored`.
    """
    instance = get_instance(datasette)
    registered, names = await _names(datasette, instance, contains)
    unusual = await store.unusual_names(
        instance.db, [key.id for key in instance.settings.ring or ()]
    )
    unusual |= registered.keys() | instance.overridden_names()
    looked_at = sorted(unusual.intersection(names), key=_by_name)
    known = await _list(instance, registered, looked_at)
    if state:
        states = {each.name: each.state for each in known}
        names = [name for name in names if states.get(name, "stored") == state]
        known = []
    waiting, urgent, removed = [], [], []
    for each in known:
        if each.state in ("not-set", "destroyed") and each.registered:
            waiting.append(each)
        elif each.state in ("needs-key", "needs-upgrade") or is_due(each):
            urgent.append(each)
        elif each.state in ("deleted", "destroyed"):
            removed.append(each)
    urgent = urgent[:size]  # the others are listed with the rest
    order = {name: place for place, name in enumerate(registered)}
    waiting.sort(key=lambda each: order[each.name])
    set_apart = {each.name for each in (*waiting, *urgent, *removed)}
    others = [name for name in names if name not in set_apart]
    others.sort(key=str.casefold)  # `names` is sorted, and stays so among equals
    start = bisect.bisect_right(others, _by_name(after), key=_by_name) if after else 0
    page = others[start : start + size]
    shown = size if start == 0 else 0
    return Sections(
        urgent if shown else [],
        waiting if shown else [],
        await _list(instance, registered, page),
        removed[:shown],
        total=len(names),
        removed_total=len(removed),
        before=None if shown else others[start - size - 1] if start > size else "",
        after=page[-1] if start + size < len(others) else None,
    )


def is_due(listed: Listed, days: int = DUE_DAYS) -> bool:
    """Whether a secret that can be read has to be renewed within so many days."""
    renew_by = listed.newest and listed.newest.renew_by
    if listed.state != "stored" or not renew_by:
        return False
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return str(renew_by) <= (today + datetime.timedelta(days)).isoformat()


async def list_due(datasette: Datasette, days: int) -> list[Listed]:
    """The secrets that have to be renewed within so many days, sorted by name.

    Does not look for registered secrets.
    """
    instance = get_instance(datasette)
    names = await store.names(instance.db, with_date=True)
    return [each for each in await _list(instance, {}, names) if is_due(each, days)]


async def case_twin(datasette: Datasette, name: str) -> str | None:
    """The name of another secret that differs from this one only in case.

    None if `name` itself exists.
    """
    _, names = await _names(datasette, get_instance(datasette), name)
    twins = (each for each in names if each.casefold() == name.casefold())
    return None if name in names else next(twins, None)


async def _names(
    datasette: Datasette, instance: Instance, contains: str
) -> tuple[dict[str, registry.Registered], list[str]]:
    """The registered secrets, and the names of all secrets, sorted by code points."""
    registered = await registry.registered_secrets(datasette)
    stored = await store.names(instance.db)
    names = sorted([*stored, *(registered.keys() - set(stored))])
    wanted, reserved = contains.casefold(), instance.settings.reserved
    return registered, [
        name
        for name in names
        if wanted in name.casefold() and name.upper() not in reserved
    ]


async def _list(
    instance: Instance, registered: Mapping[str, registry.Registered], names: list[str]
) -> list[Listed]:
    """The secrets of these names, in this order."""
    versions = await store.newest_versions(instance.db, names)
    stored = {version.name: version for version in versions}
    uses = await store.last_uses(instance.db, names)
    checks = await changes.newest_checks(instance.db, names)
    listed = []
    for name in names:
        newest, checked = stored.get(name), checks.get(name)
        if newest is None or (checked and checked.version != newest.version):
            checked = None
        used = uses.get(name, store.LastUse())
        state = _state(instance, name, newest)
        plugins = registered.get(name)
        listed.append(Listed(name, state, plugins, newest, used, checked))
    return listed


def _by_name(name: str) -> tuple[str, str]:
    return name.casefold(), name


async def find_secret(datasette: Datasette, name: str) -> Listed | None:
    """The secret of this name if it is registered or stored."""
    instance = get_instance(datasette)
    if instance.settings.is_reserved(name):
        return None
    registered = await registry.registered_secrets(datasette)
    [found] = await _list(instance, registered, [name])
    return found if found.newest or found.registered else None


async def history(datasette: Datasette, name: str) -> list[HistoryRow]:
    """Every version of a secret, newest first. Their states ignore the environment."""
    instance = get_instance(datasette)
    versions = await store.history(instance.db, name)
    past = await changes.past(instance.db, name)
    readable = {each.version for each in versions if not each.is_destroyed}
    return [
        HistoryRow(
            version,
            _version_state(instance, version),
            is_newest=version is versions[0],
            rolled_back_from=past.rolled_back_from.get(version.version),
            destroyed=past.destroyed.get(version.version)
            if version.is_destroyed
            else None,
            copies=[each for each in past.copies(version.version) if each in readable],
            can_be_copied=version is not versions[0]
            and _version_state(instance, version._replace(deleted_at=None)) == "stored",
        )
        for version in versions
    ]


def _state(instance: Instance, name: str, newest: store.Version | None) -> str:
    if instance.environment_value(name) is not None:
        return "environment"
    return "not-set" if newest is None else _version_state(instance, newest)


def _version_state(instance: Instance, version: store.Version) -> str:
    if version.is_destroyed:
        return "destroyed"
    if version.is_deleted:
        return "deleted"
    if version.is_legacy:
        return "needs-upgrade"
    ring = instance.settings.ring
    return "stored" if ring is not None and version.key_id in ring else "needs-key"
