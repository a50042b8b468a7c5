"""Opens what datasette-secrets 0.x stored, for the one command that brings it in.

That was Fernet (https://github.com/fernet/spec): AES-128-CBC and HMAC-SHA-256 under the
two halves of the 32-byte key, bound to no name and no version. Nothing is ever written in
this form, and no running server opens it. `cryptography` is an optional dependency, and
imported at first use.
"""

from __future__ import annotations

import base64

from .errors import MissingExtra


def require_fernet() -> None:
    """Raise MissingExtra unless tokens can be opened here."""
    try:
        import cryptography.fernet  # noqa: F401
    except ImportError:
        raise MissingExtra from None


def way_out(*, is_configured: bool) -> str:
    """What to do so that what 0.x stored is upgraded here."""
    if not is_configured:
        return "configure a master key and restart"
    try:
        require_fernet()
    except MissingExtra:
        return "install 'datasette-secrets[fernet]' and restart"
    return "run 'datasette secrets upgrade'"


def decrypt(master_key: bytes, token: bytes | str) -> bytes:
    """The value in a token of 0.x.

    `master_key`: 32 bytes. Call `require_fernet` first. Raises ValueError when this key
    does not open it.
    """
    from cryptography.fernet import Fernet, InvalidToken

    if isinstance(token, str):
        token = token.encode("utf-8", "replace")
    try:
        return Fernet(base64.urlsafe_b64encode(master_key)).decrypt(token)
    except InvalidToken:
        raise ValueError from None
