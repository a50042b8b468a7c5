"""How secrets are shown on the pages: labels, times and people. It never sees a value."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from datasette.utils import tilde_encode

from .. import health, listing, registry, serialize

if TYPE_CHECKING:
    from datasette.app import Datasette

    from .. import changes
    from .request import Visit


class Stamp(NamedTuple):
    """A time, and the name of who did something then, if known.

    `relative` for the eye, `exact` for the rest, `iso` for machines.
    """

    relative: str
    exact: str
    iso: str
    by: str | None


#: A sentence names so many versions. Of more it only gives the number.
_NUMBERS_MAX = 10


def enumerate_versions(versions: Sequence[object]) -> str:
    """`version 1`, `versions 1, 2 and 3`, or of many `37 versions`."""
    if len(versions) > _NUMBERS_MAX:
        return f"{len(versions):,} versions"
    *first, last = map(str, versions or ("",))
    return f"versions {', '.join(first)} and {last}" if first else f"version {last}"


@dataclass
class Presenter:
    """What templates can call. It has the names of all people on the page."""

    list_url: str
    names: Mapping[str, str]

    enumerate = staticmethod(enumerate_versions)
    obtain_url = staticmethod(serialize.obtain_url)
    is_due = staticmethod(listing.is_due)
    example = registry.EXAMPLE
    outcomes: ClassVar[dict[str, str]] = {
        "works": "Works",
        "rejected": "Rejected",
        "unknown": "Could not be tested",
    }

    def url(self, name: str, action: str = "") -> str:
        """The address of a secret's page, or of one of its actions."""
        suffix = f"/-/{action}" if action else ""
        return f"{self.list_url}/{tilde_encode(str(name))}{suffix}"

    def detail(self, entry: changes.Entry) -> str:
        """What else is known of a row of the log."""
        known = entry.detail
        parts = []
        if "rolled_back_from" in known:
            parts.append(f"from version {known['rolled_back_from']}")
        if "outcome" in known:
            parts.append(self.outcomes.get(str(known["outcome"]), ""))
        if "renew_by" in known:
            parts.append(str(known["renew_by"] or "no date"))
        versions = known.get("versions")
        if isinstance(versions, list) and versions != [entry.version]:
            parts.append(enumerate_versions(versions))
        elif isinstance(versions, int):
            parts.append(health.count_versions(versions))
        if isinstance(known.get("pruned"), list):
            parts.append(f"removed {enumerate_versions(known['pruned'])}")
        return "; ".join(filter(None, parts))

    def stamp(self, at: object, by: object = None) -> Stamp | None:
        """When and by whom, from two columns. `at`: UTC `YYYY-MM-DD HH:MM:SS` or None."""
        if not at:
            return None
        who = self.names.get(str(by), str(by)) if by else None
        try:
            time = datetime.datetime.fromisoformat(str(at))
        except ValueError:
            return Stamp(str(at), str(at), "", who)
        time = time.replace(tzinfo=datetime.timezone.utc)
        return Stamp(
            _ago(datetime.datetime.now(datetime.timezone.utc) - time),
            time.strftime("%Y-%m-%d %H:%M:%S UTC"),
            time.strftime("%Y-%m-%dT%H:%M:%SZ"),
            who,
        )


_PEOPLE = ("created_by", "updated_by", "deleted_by", "last_used_by", "actor_id", "by")


async def presenter(visit: Visit, people: Iterable[object]) -> Presenter:
    """A presenter with the names of all people in these versions, uses and rows."""
    ids = {getattr(each, column, None) for each in people for column in _PEOPLE}
    names = await actor_names(visit.datasette, set(map(str, filter(None, ids))))
    return Presenter(visit.list_url, names)


async def actor_names(datasette: Datasette, ids: set[str]) -> dict[str, str]:
    """The username, or else the name, of each of these actors. Some may be missing."""
    if not ids:
        return {}
    try:
        actors = await datasette.actors_from_ids(sorted(ids))
        return {
            str(actor_id): str(actor.get("username") or actor.get("name") or actor_id)
            for actor_id, actor in actors.items()
            if actor
        }
    except Exception:  # another plugin's hook: its failure costs names, not the page
        return {}


def _ago(age: datetime.timedelta) -> str:
    for unit, size in (
        ("year", 31_556_952),
        ("month", 2_629_746),
        ("day", 86_400),
        ("hour", 3_600),
        ("minute", 60),
    ):
        count = int(age.total_seconds()) // size
        if count > 0:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
