"""How secrets are shown on the pages: rows, times and people. It never sees a value."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasette.utils import tilde_encode
from markupsafe import Markup

from .. import config, registry
from ..serialize import obtain_url

if TYPE_CHECKING:
    from datasette.app import Datasette

    from .. import listing, store


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

    def row(self, listed: listing.Listed) -> Row:
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
