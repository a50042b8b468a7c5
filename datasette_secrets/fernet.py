"""Decrypts what datasette-secrets 0.x stored, for the upgrade.

That was Fernet (https://github.com/fernet/spec): AES-128-CBC and HMAC-SHA-256 under the
two halves of the 32-byte key, bound to no name and no version. This package never writes
this form, and no read of a secret decrypts it. `cryptography` is an optional dependency,
imported at first use.
"""

from __future__ import annotations

import base64
from typing import Any

from .errors import MissingExtra


def require_fernet() -> None:
    """Raise MissingExtra unless `cryptography` is installed."""
    try:
        import cryptography.fernet  # noqa: F401
    except ImportError:
        raise MissingExtra from None


def way_out(*, is_configured: bool) -> str:
    """What the administrator has to do to have the values of 0.x upgraded."""
    if not is_configured:
        return "configure a master key and restart"
    try:
        require_fernet()
    except MissingExtra:
        return "install 'datasette-secrets[fernet]' and restart"
    return (
        "add the key that it was stored with to encryption-key unless it is there, and "
        "run 'datasette secrets upgrade'"
    )


def decrypt(master_key: bytes, token: Any) -> bytes:
    """The value in a token of 0.x.

    `master_key`: 32 bytes. Call `require_fernet` first. Raises ValueError when it is not a
    token of this key.
    """
    from cryptography.fernet import Fernet, InvalidToken

    try:
        return Fernet(base64.urlsafe_b64encode(master_key)).decrypt(token)
    except (InvalidToken, TypeError):
        raise ValueError from None
