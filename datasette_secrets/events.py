"""What Datasette is told of every change. No event carries a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
