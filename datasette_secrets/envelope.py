"""Keys, and the envelope in which a value is kept (format 1).

The only module that touches libsodium. It knows nothing of Datasette or SQL, takes no
nonce from a caller, and uses only the key whose ID the row has. Only `upgrade` tries each
key, since a row of datasette-secrets 0.x has no key ID.

    person      = b"dsecrets-v1"             BLAKE2b personalisation, zero-padded to 16 bytes
    key_id      = hex(BLAKE2b-8(b"key-id", key=master_key, person))             16 hex digits
    context     = BLAKE2b-32(u64le(len(name)) || name || u64le(version), person)     32 bytes
                  name in UTF-8, its length in bytes; version as 8 bytes, little-endian
    wrapped_key = XSalsa20-Poly1305(master_key; context || data_key)
                  nonce 24 || tag 16 || body 64                                     104 bytes
    encrypted   = XChaCha20-Poly1305-IETF(data_key; sodium_pad(value, 256), aad=context)
                  nonce 24 || body 256 n || tag 16

A master key is 32 random bytes; its text form is padded Base64 (RFC 4648). The ciphers are
libsodium's, through PyNaCl; BLAKE2b is hashlib's and randomness the operating system's.

The context binds both layers to the name and version of their row. It also commits the wrap
to one master key, because it comes first in the wrapped plaintext. With Poly1305 alone, one
blob could be made that is valid under two keys. Here its first 32 bytes must also decrypt to
the context under both, which takes about 2**128 attempts.

The locals here are keys and values. Some tracebacks print locals, so every error leaves this
module without the frames that hold them (`errors.without_frames`).
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import ModuleType
from typing import NamedTuple, NoReturn, ParamSpec, Protocol, TypeVar

from . import fernet
from .errors import (
    CannotOpen,
    CannotUpgrade,
    InvalidMasterKey,
    InvalidSecret,
    UnknownMasterKey,
    without_frames,
)

ENVELOPE_VERSION = 1
KEY_BYTES = 32
NONCE_BYTES = 24
TAG_BYTES = 16
CONTEXT_BYTES = 32
WRAPPED_KEY_BYTES = NONCE_BYTES + TAG_BYTES + CONTEXT_BYTES + KEY_BYTES
PADDING_BYTES = 256
VALUE_MAX_BYTES = 65_536
#: The longest `encrypted` of any value: a token of 0.x, a third longer than an envelope.
ENCRYPTED_MAX_BYTES = (57 + VALUE_MAX_BYTES + 16 + 2) // 3 * 4
ENCRYPTED_MIN_BYTES = NONCE_BYTES + PADDING_BYTES + TAG_BYTES

P = ParamSpec("P")
T = TypeVar("T")

_PERSON = b"dsecrets-v1"
_KEY_ID = re.compile(r"[0-9a-f]{16}\Z")
_TO_STANDARD = str.maketrans("-_", "+/")
_TO_URLSAFE = str.maketrans("+/", "-_")


@functools.cache
def _sodium() -> ModuleType:
    """PyNaCl's bindings, imported at first use because the import is slow."""
    from nacl import bindings

    return bindings


class MasterKey:
    """32 random bytes that wrap data keys. Neither `repr` nor `str` shows them."""

    __slots__ = ("_key", "id")

    def __init__(self, key: bytes) -> None:
        self._key = key
        #: 16 hex digits that name this key without revealing it.
        self.id: str = hashlib.blake2b(
            b"key-id", digest_size=8, key=key, person=_PERSON
        ).hexdigest()

    def __repr__(self) -> str:
        return f"<MasterKey {self.id}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A master key cannot be pickled")

    @property
    def is_one_byte_repeated(self) -> bool:
        """Whether all its bytes are equal, as in a key made by hand."""
        return len(set(self._key)) == 1

    @classmethod
    @without_frames
    def parse(cls, text: str) -> MasterKey:
        """The key in `text`: 32 bytes in padded Base64, 44 characters.

        Both alphabets of RFC 4648 are accepted. Raises InvalidMasterKey, whose message says
        what is wrong with the key.
        """
        text = text.strip()
        if len(text) != 44 or not text.isascii():
            raise InvalidMasterKey(f"it has {len(text)} characters, but a key has 44")
        try:
            key = base64.b64decode(text.translate(_TO_STANDARD), validate=True)
        except binascii.Error:
            raise InvalidMasterKey("it is not Base64") from None
        if len(key) != KEY_BYTES:
            raise InvalidMasterKey(
                f"it decodes to {len(key)} bytes, but a key has {KEY_BYTES}"
            )
        standard = base64.b64encode(key).decode("ascii")
        if text not in (standard, standard.translate(_TO_URLSAFE)):
            raise InvalidMasterKey("it is not canonical Base64")
        return cls(key)

    def appears_in(self, text: str) -> bool:
        """Whether `text` contains this key, in either alphabet of Base64 or in hex."""
        base64_key = base64.b64encode(self._key).decode("ascii").rstrip("=")
        return (
            base64_key in text.translate(_TO_STANDARD)
            or self._key.hex() in text.casefold()
        )


class KeyRing:
    """The configured master keys, newest first. The first wraps; every one unwraps.

    Raises ValueError when there is none.
    """

    __slots__ = ("_by_id", "keys", "primary")

    def __init__(self, keys: Iterable[MasterKey]) -> None:
        self._by_id = {key.id: key for key in keys}
        self.keys = tuple(self._by_id.values())
        if not self.keys:
            raise ValueError("a key ring holds at least one key")
        self.primary = self.keys[0]

    def __repr__(self) -> str:
        return f"<KeyRing {' '.join(self._by_id)}>"

    def __iter__(self) -> Iterator[MasterKey]:
        return iter(self.keys)

    def __contains__(self, key_id: object) -> bool:
        return key_id in self._by_id

    def find(self, name: str, version: int, key_id: object) -> MasterKey:
        """The key with this ID.

        Raises UnknownMasterKey when it is not in the ring, and CannotOpen when
        `key_id` is not a key ID.
        """
        if isinstance(key_id, str):
            key = self._by_id.get(key_id)
            if key is not None:
                return key
            if is_key_id(key_id):
                raise UnknownMasterKey(name, version, key_id)
        raise CannotOpen(name, version)

    def any_appears_in(self, text: str) -> bool:
        """Whether `text` contains one of the keys."""
        return any(key.appears_in(text) for key in self.keys)


class Envelope(Protocol):
    """The encrypted columns of a row. In a damaged row, they may have any type."""

    @property
    def envelope_version(self) -> int | None: ...
    @property
    def key_id(self) -> str: ...
    @property
    def wrapped_key(self) -> bytes | None: ...
    @property
    def encrypted(self) -> bytes | None: ...


class Sealed(NamedTuple):
    """A new envelope."""

    envelope_version: int | None
    key_id: str
    wrapped_key: bytes | None
    encrypted: bytes | None


class Plaintext:
    """A value on its way into an envelope. Neither `repr` nor `str` shows it."""

    __slots__ = ("_utf8",)

    def __init__(self, utf8: bytes) -> None:
        self._utf8 = utf8

    def __repr__(self) -> str:
        return "<Plaintext>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A value cannot be pickled")

    @classmethod
    @without_frames
    def parse(cls, value: object) -> Plaintext:
        """Check `value`: text, 1 to 65,536 bytes of UTF-8 with no NUL.

        Raises InvalidSecret, whose message says what is wrong with it.
        """
        if not isinstance(value, str):
            raise InvalidSecret("it is not text")
        try:
            utf8 = value.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidSecret("it is not valid UTF-8") from None
        if not utf8:
            raise InvalidSecret("it is empty")
        if len(utf8) > VALUE_MAX_BYTES:
            raise InvalidSecret(
                f"it has {len(utf8):,} bytes, but at most {VALUE_MAX_BYTES:,} are allowed"
            )
        if b"\0" in utf8:
            raise InvalidSecret("it contains a NUL character")
        return cls(utf8)

    def reveal(self) -> str:
        """The value itself. Pass it on at once: it must not become a local variable."""
        return self._utf8.decode("utf-8")

    @without_frames
    def seal(self, master_key: MasterKey, name: str, version: int) -> Sealed:
        """Seal the value as `version` of `name`, with a new data key.

        The envelope is unsealed again and compared before it is returned.
        """
        context = _context(name, version)
        data_key = os.urandom(KEY_BYTES)
        wrapped_key = _wrap(master_key, context, data_key)
        encrypted = _encrypt(data_key, context, self._utf8)
        unwrapped = _unwrap(master_key, context, wrapped_key)
        if _decrypt(unwrapped, context, encrypted) != self._utf8:
            raise CannotOpen(name, version)
        return Sealed(ENVELOPE_VERSION, master_key.id, wrapped_key, encrypted)


def is_key_id(text: str) -> bool:
    """Whether `text` has the form of a key ID: 16 hex digits in lower case."""
    return _KEY_ID.match(text) is not None


def generate_master_key() -> str:
    """A new master key: 32 random bytes in padded URL-safe Base64, 44 characters."""
    return base64.urlsafe_b64encode(os.urandom(KEY_BYTES)).decode("ascii")


def _border(function: Callable[P, T]) -> Callable[P, T]:
    """Like `without_frames`, for functions that take a ring, a name, a version and a row.

    Raises CannotOpen if the row is not authentic.
    """

    def explain(error: Exception, *args: object) -> Exception:
        from nacl.exceptions import CryptoError

        is_damaged = isinstance(error, (CryptoError, ValueError))
        return CannotOpen(args[1], args[2]) if is_damaged else error

    return without_frames(function, explain)


@_border
def unseal(ring: KeyRing, name: str, version: int, row: Envelope) -> str:
    """Decrypt `version` of `name`: its value, 0 bytes or more of UTF-8.

    Raises UnknownMasterKey when the key of the row is not in the ring, and CannotOpen when
    the row was damaged, moved from another version, or forged.
    """
    wrapped_key, encrypted = _check(name, version, row), row.encrypted
    if not isinstance(encrypted, bytes) or len(encrypted) < ENCRYPTED_MIN_BYTES:
        raise CannotOpen(name, version)
    master_key = ring.find(name, version, row.key_id)
    context, data_key = _context_and_data_key(master_key, name, version, wrapped_key)
    return _decrypt(data_key, context, encrypted).decode("utf-8")


@_border
def unwrap(ring: KeyRing, name: str, version: int, row: Envelope) -> None:
    """Prove that the data key can be unwrapped. The value is not decrypted.

    Raises as `unseal` does.
    """
    wrapped_key = _check(name, version, row)
    master_key = ring.find(name, version, row.key_id)
    _unwrap(master_key, _context(name, version), wrapped_key)


@_border
def rewrap(ring: KeyRing, name: str, version: int, row: Envelope) -> bytes:
    """Wrap the row's data key with the primary key. Returns a `wrapped_key`, 104 bytes.

    It has been unwrapped again, so that it can replace the old one. The value is neither
    decrypted nor changed. Raises as `unseal` does.
    """
    wrapped_key = _check(name, version, row)
    master_key = ring.find(name, version, row.key_id)
    context = _context(name, version)
    data_key = _unwrap(master_key, context, wrapped_key)
    rewrapped_key = _wrap(ring.primary, context, data_key)
    if _unwrap(ring.primary, context, rewrapped_key) != data_key:
        raise CannotOpen(name, version)
    return rewrapped_key


@_border
def reseal(
    ring: KeyRing, name: str, version: int, row: Envelope, new_version: int
) -> Sealed:
    """Seal the value of `version` with a new data key, as `new_version` of the same name.

    Raises as `unseal` does.
    """
    value = unseal(ring, name, version, row)
    return Plaintext(value.encode("utf-8")).seal(ring.primary, name, new_version)


@without_frames
def upgrade(ring: KeyRing, name: str, version: int, token: object) -> Sealed:
    """Seal a value of 0.x with the primary key, as `version` of `name`.

    `token`: the stored token, or its size if it is too large. Raises MissingExtra, and
    CannotUpgrade when no key of the ring decrypts it, it is too large or the row is damaged.
    """
    fernet.require_fernet()
    is_too_large = isinstance(token, int) and token > ENCRYPTED_MAX_BYTES
    for master_key in ring:
        with suppress(ValueError):
            utf8 = fernet.decrypt(master_key._key, token)
            utf8.decode("utf-8")
            is_too_large = len(utf8) > VALUE_MAX_BYTES
            if not is_too_large and _is_version(name, version):
                return Plaintext(utf8).seal(ring.primary, name, version)
    raise CannotUpgrade(name, version, is_too_large=is_too_large)


def _is_version(name: object, version: object) -> bool:
    return isinstance(name, str) and isinstance(version, int) and 0 < version < 2**63


def _check(name: str, version: int, row: Envelope) -> bytes:
    """The wrapped key, once its length is checked.

    Raises CannotOpen for a row that cannot be an envelope of format 1.
    """
    wrapped_key = row.wrapped_key
    if (
        row.envelope_version != ENVELOPE_VERSION
        or not isinstance(wrapped_key, bytes)
        or len(wrapped_key) != WRAPPED_KEY_BYTES
        or not _is_version(name, version)
    ):
        raise CannotOpen(name, version)
    return wrapped_key


_CONTEXT_HASH = hashlib.blake2b(digest_size=CONTEXT_BYTES, person=_PERSON)


def _context(name: str, version: int) -> bytes:
    utf8 = name.encode("utf-8", "surrogatepass")
    context = _CONTEXT_HASH.copy()
    context.update(
        len(utf8).to_bytes(8, "little") + utf8 + version.to_bytes(8, "little")
    )
    return context.digest()


# Below, input that is not authentic raises CryptoError or ValueError; see `_border`.


def _wrap(master_key: MasterKey, context: bytes, data_key: bytes) -> bytes:
    nonce = os.urandom(NONCE_BYTES)
    body: bytes = _sodium().crypto_secretbox(context + data_key, nonce, master_key._key)
    return nonce + body


def _unwrap(master_key: MasterKey, context: bytes, wrapped_key: bytes) -> bytes:
    plain: bytes = _sodium().crypto_secretbox_open(
        wrapped_key[NONCE_BYTES:], wrapped_key[:NONCE_BYTES], master_key._key
    )
    if plain[:CONTEXT_BYTES] != context:
        raise ValueError("the wrap belongs to another row")
    return plain[CONTEXT_BYTES:]


# Whoever can read this cache in memory can also read the master key, which unwraps all of
# it. The stored `wrapped_key` is part of what is looked up.
@functools.lru_cache(maxsize=256)
def _context_and_data_key(
    master_key: MasterKey, name: str, version: int, wrapped_key: bytes
) -> tuple[bytes, bytes]:
    context = _context(name, version)
    return context, _unwrap(master_key, context, wrapped_key)


def _encrypt(data_key: bytes, context: bytes, utf8: bytes) -> bytes:
    sodium = _sodium()
    nonce = os.urandom(NONCE_BYTES)
    body: bytes = sodium.crypto_aead_xchacha20poly1305_ietf_encrypt(
        sodium.sodium_pad(utf8, PADDING_BYTES), context, nonce, data_key
    )
    return nonce + body


def _decrypt(data_key: bytes, context: bytes, encrypted: bytes) -> bytes:
    sodium = _sodium()
    padded = sodium.crypto_aead_xchacha20poly1305_ietf_decrypt(
        encrypted[NONCE_BYTES:], context, encrypted[:NONCE_BYTES], data_key
    )
    utf8: bytes = sodium.sodium_unpad(padded, PADDING_BYTES)
    return utf8
