"""A change, which makes both an event and a row of the log. Neither contains a value."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

from datasette.events import Event


@dataclass
class SetSecret(Event):
    """A new version of a secret was stored."""

    name: ClassVar[str] = "set-secret"
    secret: str
    version: int


@dataclass
class DeleteSecret(Event):
    """The newest version of a secret was marked as deleted."""

    name: ClassVar[str] = "delete-secret"
    secret: str
    version: int


@dataclass
class RestoreSecret(Event):
    """A deleted secret was restored."""

    name: ClassVar[str] = "restore-secret"
    secret: str
    version: int


@dataclass
class DestroySecret(Event):
    """The values of some versions of a secret were destroyed."""

    name: ClassVar[str] = "destroy-secret"
    secret: str
    versions: list[object]


@dataclass
class RotateEncryptionKey(Event):
    """Versions were re-wrapped with the primary master key."""

    name: ClassVar[str] = "rotate-encryption-key"
    key_id: str
    versions: int


@dataclass
class UpgradeSecrets(Event):
    """Versions that datasette-secrets 0.x stored were re-sealed."""

    name: ClassVar[str] = "upgrade-secrets"
    versions: int


EVENTS: tuple[type[Any], ...] = (SetSecret, DeleteSecret, RestoreSecret, DestroySecret)
EVENTS += (RotateEncryptionKey, UpgradeSecrets)


#: Where a change is made from: `page`, `api`, `shell`, `start`, or `plugin`, which is
#: everything else.
via: ContextVar[str] = ContextVar("via", default="plugin")


class Change(NamedTuple):
    """What was done to a secret, or to all of them.

    `action`: the name of an event, or one of `set-note`, `set-renew-by`, `check-secret`
    and `get-secret`, which have no event. `detail`: for JSON, without a value.
    """

    action: str
    name: str | None = None
    version: object = None
    detail: Mapping[str, Any] | None = None

    def event(self, actor_id: str | None) -> Event | None:
        """The event of this change, if there is one."""
        kind = next((each for each in EVENTS if each.name == self.action), None)
        if kind is None:
            return None
        known = {"secret": self.name, "version": self.version, **(self.detail or {})}
        own = known.keys() & {field.name for field in fields(kind)}
        event: Event = kind(
            actor={"id": actor_id} if actor_id else None,
            **{name: known[name] for name in own},
        )
        return event
