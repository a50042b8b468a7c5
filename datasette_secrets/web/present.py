"""How secrets are shown on the pages: labels, times and people. It never sees a value."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from datasette.utils import tilde_encode

from .. import config, listing, registry, serialize

if TYPE_CHECKING:
    from datasette.app import Datasette

    from .. import changes, store


class Moment(NamedTuple):
    """A time: `relative` for the eye, `exact` for the rest, `iso` for machines."""

    relative: str
    exact: str
    iso: str


class Stamp(NamedTuple):
    """When something happened, and the name of who did it, if known."""

    at: Moment | None
    by: str | None


class HistoryRow(NamedTuple):
    """A version, as the history shows it. `note`: "" between two that have the same.

    `rolled_back_from`: the version whose value it has. `destroyed`: the row of the log.
    `copies`: the other versions with a value that are known to have the same.
    """

    of: store.Version
    state: str
    is_newest: bool
    note: str
    rolled_back_from: int | None
    destroyed: changes.Entry | None
    copies: list[int]


class Presenter:
    """What the templates ask about a secret. People's names were looked up at once."""

    obtain_url = staticmethod(serialize.obtain_url)
    is_due = staticmethod(listing.is_due)
    example = registry.EXAMPLE
    labels: Mapping[str, str] = {
        "stored": "Stored",
        "environment": "Environment",
        "not-set": "Not set",
        "deleted": "Deleted",
        "destroyed": "Destroyed",
        "needs-upgrade": "Needs upgrade",
        "needs-key": "Master key missing",
    }
    actions: Mapping[str, str] = {
        "set-secret": "Saved",
        "set-note": "Changed the note of",
        "set-renew-by": "Changed the renewal date of",
        "delete-secret": "Deleted",
        "restore-secret": "Restored",
        "destroy-secret": "Destroyed",
        "check-secret": "Tested",
        "get-secret": "Read in the shell",
        "rotate-encryption-key": "Rotated",
        "upgrade-secrets": "Upgraded",
    }
    doors: Mapping[str, str] = {
        "page": "page",
        "api": "JSON API",
        "shell": "shell",
        "plugin": "plugin",
        "start": "start of the server",
    }
    outcomes: Mapping[str, str] = {
        "works": "Works",
        "rejected": "Rejected",
        "unknown": "Could not tell",
    }

    def __init__(
        self, datasette: Datasette, names: Mapping[str, str], now: datetime.datetime
    ) -> None:
        self._datasette = datasette
        self._names = names
        self._now = now

    def enumerate(self, versions: list[Any]) -> str:
        """`version 1`, `versions 1, 2`, or of many `37 versions`."""
        return enumerate_versions(versions)

    def url(self, name: str, action: str = "") -> str:
        """The address of a secret's page, or of one of its actions."""
        return secret_url(self._datasette, name, action)

    def variable(self, name: str) -> str:
        """The environment variable that overrides what is stored."""
        return config.ENV_PREFIX + name

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
        if isinstance(versions, list):
            parts.append(enumerate_versions(versions))
        elif versions is not None:
            parts.append(f"{versions} version{'' if versions == 1 else 's'}")
        if isinstance(known.get("pruned"), list):
            parts.append(f"removed {enumerate_versions(known['pruned'])}")
        return "; ".join(filter(None, parts))

    def stamp(self, at: object, by: object) -> Stamp:
        """When and by whom, from two columns."""
        who = str(by) if by else None
        return Stamp(moment(at, self._now), who and self._names.get(who, who))


async def presenter(
    datasette: Datasette,
    versions: Iterable[store.Version | None],
    entries: Iterable[changes.Entry] = (),
) -> Presenter:
    """A presenter that knows everybody whom these versions and rows of the log name."""
    ids = {entry.actor_id for entry in entries if entry.actor_id} | {
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
    return Presenter(datasette, await actor_names(datasette, ids), now)


#: How many versions a sentence names; of more it says how many.
_NUMBERS_MAX = 10


def enumerate_versions(versions: list[Any]) -> str:
    """`version 1`, `versions 1, 2`, or of many `37 versions`."""
    if len(versions) > _NUMBERS_MAX:
        return f"{len(versions):,} versions"
    return f"version{'s' * (len(versions) > 1)} {', '.join(map(str, versions))}"


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
    return str(datasette.urls.path(f"/-/secrets/{tilde_encode(str(name))}{suffix}"))
