"""One Datasette's settings, database, reader and recorder, created at first use."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from . import config
from .database import Reader
from .errors import InvalidSecret
from .last_used import LastUsedRecorder

if TYPE_CHECKING:
    from datasette.app import Datasette
    from datasette.database import Database


# An attribute, so that it is freed with its Datasette.
_ATTRIBUTE = "_datasette_secrets_instance"

#: How long a server that stops waits for the last uses to be written.
_STOP_SECONDS = 5.0


class Instance:
    """What this plugin keeps for one Datasette."""

    def __init__(self, datasette: Datasette) -> None:
        self.settings = config.load(datasette)
        self.db: Database = config.find_database(datasette, self.settings)
        self.last_used = LastUsedRecorder(self.db)
        self.reader = Reader(self.db)
        #: Sentences for the pages about the upgrade at start.
        self.notices: list[str] = []

    def environment_value(self, name: str) -> str | None:
        """The value of a non-empty `DATASETTE_SECRETS_<NAME>`, unless that is a master key."""
        try:
            value = os.environ.get(config.ENV_PREFIX + name)
        except UnicodeEncodeError:  # no variable can have this name
            return None
        if not value or self.settings.is_reserved(name):
            return None
        return None if self.settings.has_key_in(value) else value

    def value_error(self, name: object, error: InvalidSecret) -> InvalidSecret:
        """The error for a value that cannot be stored. It repeats no master key."""
        of = "" if self.settings.has_key_in(name) else f" of {name}"
        return InvalidSecret(f"The value{of} cannot be stored: {error}")

    def overridden_names(self) -> set[str]:
        """The names for which the environment has a value."""
        prefix = config.ENV_PREFIX
        names = [
            name.removeprefix(prefix) for name in os.environ if name.startswith(prefix)
        ]
        return {name for name in names if self.environment_value(name) is not None}


def get_instance(datasette: Datasette) -> Instance:
    """The instance of this Datasette, made at first use.

    Raises as `config.load` and `config.find_database` do.
    """
    known: Instance | None = getattr(datasette, _ATTRIBUTE, None)
    if known is None:
        known = Instance(datasette)
        setattr(datasette, _ATTRIBUTE, known)
    return known


async def stop(datasette: Datasette) -> None:
    """Write the queued uses, but give up after a few seconds."""
    known: Instance | None = getattr(datasette, _ATTRIBUTE, None)
    if known is not None:
        with suppress(asyncio.TimeoutError):  # somebody's trigger may never end
            await asyncio.wait_for(known.last_used.flush(), _STOP_SECONDS)
