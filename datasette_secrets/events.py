"""A change, where it was made from, and the event that Datasette is told of it.

One description of a change makes both its event and its row in the change log. Neither
carries a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

from datasette.events import Event


@dataclass
class SetSecret(Event):
    """
    Event name: ``set-secret``

    A new version of a secret was stored.

    :ivar secret: The name of the secret.
    :type secret: str
    :ivar version: The number of the new version.
    :type version: int
    """

    name: ClassVar[str] = "set-secret"
    secret: str
    version: int


@dataclass
class DeleteSecret(Event):
    """
    Event name: ``delete-secret``

    A secret was deleted: its newest version was marked.

    :ivar secret: The name of the secret.
    :type secret: str
    :ivar version: The number of the version that was marked.
    :type version: int
    """

    name: ClassVar[str] = "delete-secret"
    secret: str
    version: int


@dataclass
class RestoreSecret(Event):
    """
    Event name: ``restore-secret``

    A deleted secret was restored.

    :ivar secret: The name of the secret.
    :type secret: str
    :ivar version: The number of the version that counts again.
    :type version: int
    """

    name: ClassVar[str] = "restore-secret"
    secret: str
    version: int


@dataclass
class DestroySecret(Event):
    """
    Event name: ``destroy-secret``

    The values of some versions of a secret were destroyed.

    :ivar secret: The name of the secret.
    :type secret: str
    :ivar versions: The numbers of those versions.
    :type versions: list
    """

    name: ClassVar[str] = "destroy-secret"
    secret: str
    versions: list[object]


@dataclass
class RotateEncryptionKey(Event):
    """
    Event name: ``rotate-encryption-key``

    Versions were re-wrapped with the primary master key.

    :ivar key_id: The id of that key.
    :type key_id: str
    :ivar versions: How many versions were re-wrapped.
    :type versions: int
    """

    name: ClassVar[str] = "rotate-encryption-key"
    key_id: str
    versions: int


@dataclass
class UpgradeSecrets(Event):
    """
    Event name: ``upgrade-secrets``

    Versions that datasette-secrets 0.x stored were re-sealed.

    :ivar versions: How many versions were re-sealed.
    :type versions: int
    """

    name: ClassVar[str] = "upgrade-secrets"
    versions: int


EVENTS = (
    SetSecret,
    DeleteSecret,
    RestoreSecret,
    DestroySecret,
    RotateEncryptionKey,
    UpgradeSecrets,
)


#: Where a change is made from: `page`, `api`, `shell`, `start`, or `plugin`, which is
#: everything else.
via: ContextVar[str] = ContextVar("via", default="plugin")


class Change(NamedTuple):
    """What was done to a secret, or to all of them.

    `action`: the name of an event, or one of `set-note`, `set-renew-by`, `check-secret`
    and `get-secret`, for which there is none. `detail`: fit for JSON, without a value.
    """

    action: str
    name: str | None = None
    version: object = None
    detail: Mapping[str, Any] | None = None

    def event(self, actor_id: str | None) -> Event | None:
        """The event of this change, if there is one."""
        kind = _EVENT_OF.get(self.action)
        if kind is None:
            return None
        known = {"secret": self.name, "version": self.version, **(self.detail or {})}
        event: Event = kind(
            actor={"id": actor_id} if actor_id else None,
            **{
                field.name: known[field.name]
                for field in fields(kind)
                if field.name in known
            },
        )
        return event


_EVENT_OF: dict[str, type[Any]] = {event.name: event for event in EVENTS}
