"""Keys, and the envelope in which a value is kept (format 1).

The only module that touches libsodium. It knows nothing of Datasette or SQL, takes no
nonce from a caller, and uses the key that a row names and no other. Only `upgrade` tries
each key, since a row of datasette-secrets 0.x names none.

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
to one master key, because it is the head of the wrapped plaintext. With Poly1305 alone one
blob could be made for two keys. Its first 32 bytes would then have to decrypt to the context
under the second key as well, which takes about 2**128 attempts.

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
    """PyNaCl's bindings, imported at first use: that takes longer than all else here."""
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
        """Whether all its bytes are equal, so that somebody made it by hand."""
        return len(set(self._key)) == 1

    @classmethod
    @without_frames
    def parse(cls, text: str) -> MasterKey:
        """The key in `text`: 32 bytes in padded Base64, 44 characters.

        Both alphabets of RFC 4648 are accepted. Raises InvalidMasterKey, which says what is
        wrong with it.
        """
        text = text.strip()
        if len(text) != 44 or not text.isascii():
            raise InvalidMasterKey(f"it has {len(text)} characters where a key has 44")
        try:
            key = base64.b64decode(text.translate(_TO_STANDARD), validate=True)
        except binascii.Error:
            raise InvalidMasterKey("it is not Base64") from None
        if len(key) != KEY_BYTES:
            raise InvalidMasterKey(
                f"it decodes to {len(key)} bytes where a key has {KEY_BYTES}"
            )
        standard = base64.b64encode(key).decode("ascii")
        if text not in (standard, standard.translate(_TO_URLSAFE)):
            raise InvalidMasterKey(
                "it is not Base64 in the one spelling of either alphabet"
            )
        return cls(key)

    def appears_in(self, text: str) -> bool:
        """Whether `text` contains this key, in Base64 however it is spelled, or in hex."""
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
        """The key that a row names.

        Raises UnknownMasterKey when it is not in the ring, and CannotOpen when
        `key_id` is no key id at all.
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
    """What a row stores of one version. In a damaged row, any field may be anything."""

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
        """`value` on its way: text, 1 to 65,536 bytes of UTF-8 with no NUL.

        Raises InvalidSecret, which says what is wrong with it.
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
                f"it has {len(utf8):,} bytes where {VALUE_MAX_BYTES:,} are allowed"
            )
        if b"\0" in utf8:
            raise InvalidSecret("it contains a NUL character")
        return cls(utf8)

    def reveal(self) -> str:
        """The value itself. Pass it on at once: it must not become a local variable."""
        return self._utf8.decode("utf-8")

    def contains_key_of(self, ring: KeyRing) -> bool:
        """Whether one of the master keys is in the value."""
        return ring.any_appears_in(self._utf8.decode("utf-8"))

    @without_frames
    def seal(self, master_key: MasterKey, name: str, version: int) -> Sealed:
        """Seal the value as `version` of `name`, under a data key of its own.

        The envelope has been unsealed again and compared.
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
    """Whether `text` names a master key: 16 hex digits in lower case."""
    return _KEY_ID.match(text) is not None


def generate_master_key() -> str:
    """A new master key: 32 random bytes in padded URL-safe Base64, 44 characters."""
    return base64.urlsafe_b64encode(os.urandom(KEY_BYTES)).decode("ascii")


def _border(function: Callable[P, T]) -> Callable[P, T]:
    """As `without_frames`, for functions of a ring, a name, a version and a row.

    Raises CannotOpen for what is not authentic.
    """

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # whatever it is, its frames hold the same locals
            from nacl.exceptions import CryptoError

            is_damaged = isinstance(error, (CryptoError, ValueError))
            bare = CannotOpen(args[1], args[2]) if is_damaged else error
            bare.with_traceback(None)
            bare.__cause__ = bare.__context__ = None
        del args, kwargs
        raise bare

    return guarded


@_border
def unseal(ring: KeyRing, name: str, version: int, row: Envelope) -> str:
    """Decrypt `version` of `name`: its value, 0 bytes or more of UTF-8.

    Raises UnknownMasterKey when the row names a key that is not in the ring, and
    CannotOpen when it was damaged, moved from another row, or forged.
    """
    wrapped_key, encrypted = _check(name, version, row), row.encrypted
    if not isinstance(encrypted, bytes) or len(encrypted) < ENCRYPTED_MIN_BYTES:
        raise CannotOpen(name, version)
    master_key = ring.find(name, version, row.key_id)
    context = _context(name, version)
    data_key = _recent_data_key(master_key, context, wrapped_key)
    return _decrypt(data_key, context, encrypted).decode("utf-8")


@_border
def unwrap(ring: KeyRing, name: str, version: int, row: Envelope) -> None:
    """Prove that the data key can be unwrapped; the value is not looked at.

    Raises as `unseal` does.
    """
    wrapped_key = _check(name, version, row)
    master_key = ring.find(name, version, row.key_id)
    _unwrap(master_key, _context(name, version), wrapped_key)


@_border
def rewrap(ring: KeyRing, name: str, version: int, row: Envelope) -> bytes:
    """The row's data key wrapped by the primary key: a new `wrapped_key`, 104 bytes.

    It has been unwrapped again, so that it can be written over the old one. The value is
    neither looked at nor changed. Raises as `unseal` does.
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
    """The value of `version` under a fresh data key, as `new_version` of the same name.

    It has been unsealed again and compared. Raises as `unseal` does.
    """
    value = unseal(ring, name, version, row)
    return Plaintext(value.encode("utf-8")).seal(ring.primary, name, new_version)


@without_frames
def upgrade(ring: KeyRing, name: str, version: int, token: object) -> Sealed:
    """The value that 0.x stored, sealed under the primary key as `version` of `name`.

    `token`: what the row holds, or the size of what is too large. Raises MissingExtra, and
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
    """The wrapped key, of a length that can be sliced.

    Raises CannotOpen for a row that no envelope of format 1 can have.
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


# Below, what is not authentic raises PyNaCl's CryptoError or a ValueError; see `_border`.


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


# The wraps that were unwrapped last. Whoever can read this memory can read the master key,
# which unwraps them all. A wrap that is no longer stored is never looked up here.
_recent_data_key = functools.lru_cache(maxsize=256)(_unwrap)


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
