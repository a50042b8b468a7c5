"""How secrets are shown: rows, times and people for the pages, objects for JSON.

Nothing here has ever seen a value.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from datasette.utils import tilde_encode
from markupsafe import Markup

from . import config, registry, rotation, service, store

if TYPE_CHECKING:
    from datasette.app import Datasette

STATE_LABELS = {
    "stored": "Stored",
    "environment": "Environment",
    "not-set": "Not set",
    "deleted": "Deleted",
    "destroyed": "Destroyed",
    "needs-upgrade": "Needs upgrade",
    "needs-key": "Key missing",
}


@dataclass(frozen=True)
class Moment:
    """A time: `relative` for the eye, `exact` for the rest, `iso` for machines."""

    relative: str
    exact: str
    iso: str


@dataclass(frozen=True)
class Deed:
    """When something happened, and the name of who did it, if known."""

    at: Moment | None
    by: str | None


@dataclass(frozen=True)
class Row:
    """A secret, as the list and its own page show it."""

    name: str
    url: str
    state: str
    label: str
    variable: str
    description: Markup
    is_example: bool
    obtain_url: str | None
    obtain_label: str
    version: object
    note: str
    key_id: str | None
    updated: Deed
    used: Deed
    deleted: Deed


@dataclass(frozen=True)
class VersionRow:
    """A version, as the history shows it. `number`: None where the row is damaged."""

    version: object
    number: int | None
    state: str
    label: str
    is_newest: bool
    is_destroyed: bool
    note: str
    shows_note: bool
    key_id: str
    created: Deed
    used: Deed
    deleted: Deed


@dataclass(frozen=True)
class KeyRow:
    """A master key, and how many versions it wraps."""

    key_id: str
    source: str
    is_primary: bool
    is_configured: bool
    is_removable: bool
    versions: int


class Display:
    """Turns what is stored into what is shown, with people's names looked up at once."""

    def __init__(
        self, datasette: Datasette, names: Mapping[str, str], now: datetime.datetime
    ) -> None:
        self._datasette = datasette
        self._names = names
        self._now = now

    @classmethod
    async def of(
        cls, datasette: Datasette, versions: Iterable[store.Version | None]
    ) -> Display:
        """A display that knows everybody whom these versions name."""
        ids = {
            actor_id
            for version in versions
            if version is not None
            for actor_id in (
                version.created_by,
                version.updated_by,
                version.deleted_by,
                version.last_used_by,
            )
            if actor_id
        }
        now = datetime.datetime.now(datetime.timezone.utc)
        return cls(datasette, await actor_names(datasette, ids), now)

    def row(self, listed: service.Listed) -> Row:
        registered, newest = listed.registered, listed.newest
        url = obtain_url(registered)
        return Row(
            name=listed.name,
            url=secret_url(self._datasette, listed.name),
            state=listed.state,
            label=STATE_LABELS[listed.state],
            variable=config.ENV_PREFIX + listed.name,
            description=Markup((registered and registered.description) or ""),  # noqa: S704  # plugins are trusted code, and may use HTML here
            is_example=registered is registry.EXAMPLE,
            obtain_url=url,
            obtain_label=(registered and registered.obtain_label) or "Get one",
            version=newest.version if newest else None,
            note=str(newest.note or "") if newest else "",
            key_id=newest.key_id if newest else None,
            updated=self.deed(
                newest and newest.updated_at, newest and newest.updated_by
            ),
            used=self.deed(listed.used.at, listed.used.by),
            deleted=self.deed(
                newest and newest.deleted_at, newest and newest.deleted_by
            ),
        )

    def version(
        self,
        version: store.Version,
        state: str,
        *,
        is_newest: bool,
        shows_note: bool,
    ) -> VersionRow:
        """A row of the history."""
        return VersionRow(
            version=version.version,
            number=version.version if type(version.version) is int else None,
            state=state,
            label=STATE_LABELS[state],
            is_newest=is_newest,
            is_destroyed=version.is_destroyed,
            note=str(version.note or ""),
            shows_note=shows_note,
            key_id=version.key_id,
            created=self.deed(version.created_at, version.created_by),
            used=self.deed(version.last_used_at, version.last_used_by),
            deleted=self.deed(version.deleted_at, version.deleted_by),
        )

    def deed(self, at: object, by: object) -> Deed:
        who = str(by) if by else None
        return Deed(moment(at, self._now), who and self._names.get(who, who))


async def actor_names(datasette: Datasette, ids: set[str]) -> dict[str, str]:
    """What to call these actors: username, else name, else id, which is always known."""
    if not ids:
        return {}
    try:
        actors = await datasette.actors_from_ids(sorted(map(str, ids)))
        return {
            str(actor_id): str(
                actor.get("username")
                or actor.get("name")
                or actor.get("id")
                or actor_id
            )
            for actor_id, actor in actors.items()
            if actor
        }
    except Exception:  # another plugin's hook: its failure costs names, not the page
        return {}


def moment(at: object, now: datetime.datetime) -> Moment | None:
    """`at`: UTC `YYYY-MM-DD HH:MM:SS`; None without one. Anything else shows as it is."""
    if not at:
        return None
    try:
        time = datetime.datetime.fromisoformat(str(at)).replace(
            tzinfo=datetime.timezone.utc
        )
    except ValueError:
        return Moment(str(at), str(at), "")
    seconds = max(0, int((now - time).total_seconds()))
    return Moment(
        _ago(seconds),
        time.strftime("%Y-%m-%d %H:%M:%S UTC"),
        time.strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _ago(seconds: int) -> str:
    for unit, size in (
        ("year", 31_556_952),
        ("month", 2_629_746),
        ("day", 86_400),
        ("hour", 3_600),
        ("minute", 60),
    ):
        count = seconds // size
        if count:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def secret_url(datasette: Datasette, name: str, action: str = "") -> str:
    """The address of a secret's page, or of one of its actions."""
    suffix = f"/-/{action}" if action else ""
    return str(datasette.urls.path(f"/-/secrets/{tilde_encode(name)}{suffix}"))


def obtain_url(registered: registry.Secret | None) -> str | None:
    """Where to get the secret, if that is a web address."""
    url = registered.obtain_url if registered else None
    try:
        return url if url and urlsplit(url).scheme in ("http", "https") else None
    except ValueError:
        return None


def key_rows(census: rotation.Census, sources: Mapping[str, str]) -> list[KeyRow]:
    """The keys of the ring, newest first, then those that rows need and it lacks."""
    return [
        KeyRow(
            key_id=key_id,
            source=sources.get(key_id, ""),
            is_primary=key_id == census.primary,
            is_configured=key_id in census.ring,
            is_removable=key_id in census.removable,
            versions=census.counts.get(key_id, 0),
        )
        for key_id in (*census.ring, *census.missing)
    ]


# JSON. Times are UTC as they are stored, actors are ids.


def secret_json(listed: service.Listed) -> dict[str, Any]:
    registered, newest = listed.registered, listed.newest
    return {
        "name": listed.name,
        "state": listed.state,
        "registered": registered is not None,
        "description": registered.description if registered else None,
        "obtain_url": obtain_url(registered),
        "obtain_label": registered.obtain_label if registered else None,
        **(_version_json(newest) if newest else dict.fromkeys(_VERSION_KEYS)),
        "last_used_at": _plain(listed.used.at),
        "last_used_by": _plain(listed.used.by),
    }


def version_json(version: store.Version, state: str) -> dict[str, Any]:
    known = _version_json(version)
    return {"version": known.pop("version"), "state": state, **known}


_VERSION_KEYS = (
    "version",
    "note",
    "key_id",
    "created_at",
    "created_by",
    "updated_at",
    "updated_by",
    "deleted_at",
    "deleted_by",
    "last_used_at",
    "last_used_by",
)


def _version_json(version: store.Version) -> dict[str, Any]:
    known = {key: _plain(getattr(version, key)) for key in _VERSION_KEYS}
    return {**known, "key_id": None} if version.is_destroyed else known


def _plain(known: object) -> object:
    """What a damaged row holds in place of text or a number, as text."""
    return known if known is None or isinstance(known, (str, int)) else str(known)


def key_json(key: KeyRow) -> dict[str, Any]:
    return {
        "id": key.key_id,
        "primary": key.is_primary,
        "configured": key.is_configured,
        "removable": key.is_removable,
        "versions": key.versions,
    }
