"""The envelope: what it opens, and that nothing else opens."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.secret import SecretBox
from support import decoder

from datasette_secrets import envelope
from datasette_secrets.envelope import KeyRing, MasterKey, Plaintext, Sealed
from datasette_secrets.errors import (
    CannotOpen,
    CannotUpgrade,
    InvalidMasterKey,
    InvalidSecret,
    UnknownMasterKey,
)

VECTORS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "vectors/envelope-v1.json").read_text("utf-8")
)["cases"]

names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    min_size=1,
    max_size=128,
)
versions = st.integers(1, 2**63 - 1)
values = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    min_size=1,
    max_size=1_000,
)


parse_key = MasterKey.parse
parse_value = Plaintext.parse


def new_key() -> MasterKey:
    return parse_key(envelope.generate_master_key())


def sealed_in(case: dict[str, Any]) -> Sealed:
    return Sealed(
        1,
        case["key_id"],
        bytes.fromhex(case["wrapped_key"]),
        bytes.fromhex(case["encrypted"]),
    )


def ring_of(case: dict[str, Any]) -> KeyRing:
    return KeyRing([parse_key(case["master_key"])])


@pytest.fixture
def sealed_row() -> tuple[KeyRing, Sealed]:
    """A value sealed as version 3 of OPENAI_API_KEY, and the ring that opens it."""
    ring = KeyRing([new_key()])
    value = parse_value("sk-a-value-that-is-only-for-tests")
    return ring, value.seal(ring.primary, "OPENAI_API_KEY", 3)


def opens(ring: KeyRing, name: str, version: int, sealed: Sealed) -> bool:
    try:
        envelope.unseal(ring, name, version, sealed)
    except CannotOpen:
        return False
    return True


def unwraps(ring: KeyRing, name: str, version: int, sealed: Sealed) -> bool:
    try:
        envelope.unwrap(ring, name, version, sealed)
    except CannotOpen:
        return False
    return True


# What opens.


@pytest.mark.parametrize("number", range(len(VECTORS)))
def test_open_opens_every_frozen_vector(number: int) -> None:
    case = VECTORS[number]
    opened = envelope.unseal(
        ring_of(case), case["name"], case["version"], sealed_in(case)
    )
    assert opened == case["value"]


@pytest.mark.parametrize("number", range(len(VECTORS)))
def test_the_decoder_opens_every_frozen_vector_step_by_step(number: int) -> None:
    case = VECTORS[number]
    key = decoder.master_key(case["master_key"])
    context = decoder.context(case["name"], case["version"])
    data_key = decoder.unwrap(key, context, bytes.fromhex(case["wrapped_key"]))
    value = decoder.open_value(data_key, context, bytes.fromhex(case["encrypted"]))
    assert decoder.key_id(key) == case["key_id"] == ring_of(case).primary.id
    assert context.hex() == case["context"]
    assert data_key.hex() == case["data_key"]
    assert value == case["value"].encode("utf-8")


@settings(max_examples=100, deadline=None)
@given(name=names, version=versions, value=values)
def test_open_returns_what_was_sealed(name: str, version: int, value: str) -> None:
    ring = KeyRing([new_key()])
    sealed = parse_value(value).seal(ring.primary, name, version)
    assert envelope.unseal(ring, name, version, sealed) == value


@settings(max_examples=60, deadline=None)
@given(name=names, version=versions, value=values)
def test_the_decoder_opens_what_the_package_sealed(
    name: str, version: int, value: str
) -> None:
    text = envelope.generate_master_key()
    sealed = parse_value(value).seal(parse_key(text), name, version)
    row = {
        "envelope_version": sealed.envelope_version,
        "encryption_key_name": sealed.key_id,
        "wrapped_key": sealed.wrapped_key,
        "encrypted": sealed.encrypted,
    }
    opened = decoder.open_row([decoder.master_key(text)], name, version, row)
    assert opened.value == value.encode("utf-8")


@settings(max_examples=60, deadline=None)
@given(
    name=names,
    version=versions,
    value=values,
    data_key=st.binary(min_size=32, max_size=32),
)
def test_the_package_opens_what_the_decoder_sealed(
    name: str, version: int, value: str, data_key: bytes
) -> None:
    text = envelope.generate_master_key()
    key = decoder.master_key(text)
    context = decoder.context(name, version)
    sealed = Sealed(
        1,
        decoder.key_id(key),
        decoder.wrap(key, context, data_key, os.urandom(24)),
        decoder.seal(data_key, context, value.encode("utf-8"), os.urandom(24)),
    )
    assert envelope.unseal(KeyRing([parse_key(text)]), name, version, sealed) == value


@pytest.mark.parametrize("size", [1, 254, 255, 256, 257, 511, 512, 65_535, 65_536])
def test_values_of_every_size_around_a_block_survive(size: int) -> None:
    ring = KeyRing([new_key()])
    sealed = parse_value("v" * size).seal(ring.primary, "A", 1)
    assert envelope.unseal(ring, "A", 1, sealed) == "v" * size


@settings(max_examples=100, deadline=None)
@given(
    value=st.text(
        st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=600
    )
)
def test_encrypted_says_the_length_only_to_256_bytes(value: str) -> None:
    sealed = parse_value(value).seal(new_key(), "A", 1)
    assert sealed.encrypted is not None
    blocks = len(value) // 256 + 1
    assert len(sealed.encrypted) == 24 + 256 * blocks + 16


def test_no_data_key_and_no_nonce_is_used_twice() -> None:
    text = envelope.generate_master_key()
    raw, key = decoder.master_key(text), parse_key(text)
    value = parse_value("the same value")
    context = decoder.context("A", 1)
    data_keys, nonces = set(), set()
    for _ in range(200):
        sealed = value.seal(key, "A", 1)
        assert sealed.wrapped_key is not None
        assert sealed.encrypted is not None
        data_keys.add(decoder.unwrap(raw, context, sealed.wrapped_key))
        nonces |= {sealed.wrapped_key[:24], sealed.encrypted[:24]}
    assert (len(data_keys), len(nonces)) == (200, 400)


def test_rewrap_keeps_the_data_key_and_the_encrypted_value() -> None:
    texts = [envelope.generate_master_key() for _ in range(2)]
    old, new = (parse_key(text) for text in texts)
    sealed = parse_value("kept").seal(old, "A", 1)
    rewrapped_key = envelope.rewrap(KeyRing([new, old]), "A", 1, sealed)
    context = decoder.context("A", 1)
    assert sealed.wrapped_key is not None
    fresh = sealed._replace(key_id=new.id, wrapped_key=rewrapped_key)
    assert decoder.unwrap(
        decoder.master_key(texts[1]), context, rewrapped_key
    ) == decoder.unwrap(decoder.master_key(texts[0]), context, sealed.wrapped_key)
    assert envelope.unseal(KeyRing([new]), "A", 1, fresh) == "kept"


def test_rewrap_uses_a_fresh_nonce(sealed_row: tuple[KeyRing, Sealed]) -> None:
    ring, sealed = sealed_row
    wraps = {envelope.rewrap(ring, "OPENAI_API_KEY", 3, sealed) for _ in range(20)}
    assert len(wraps | {sealed.wrapped_key}) == 21


def test_reseal_takes_a_fresh_data_key_and_the_new_number(
    sealed_row: tuple[KeyRing, Sealed],
) -> None:
    ring, sealed = sealed_row
    fresh = envelope.reseal(ring, "OPENAI_API_KEY", 3, sealed, 4)
    assert envelope.unseal(ring, "OPENAI_API_KEY", 4, fresh) == envelope.unseal(
        ring, "OPENAI_API_KEY", 3, sealed
    )
    assert not opens(ring, "OPENAI_API_KEY", 3, fresh)
    mixed = fresh._replace(encrypted=sealed.encrypted)
    assert not opens(ring, "OPENAI_API_KEY", 4, mixed)
    assert not opens(ring, "OPENAI_API_KEY", 3, mixed)


# What does not.


@pytest.mark.parametrize("column", ["wrapped_key", "encrypted"])
def test_open_rejects_every_single_bit_flip(
    sealed_row: tuple[KeyRing, Sealed], column: str
) -> None:
    ring, sealed = sealed_row
    intact = getattr(sealed, column)
    assert opens(ring, "OPENAI_API_KEY", 3, sealed)
    opened = []
    for bit in range(len(intact) * 8):
        flipped = bytearray(intact)
        flipped[bit // 8] ^= 1 << bit % 8
        change: dict[str, Any] = {column: bytes(flipped)}
        if opens(ring, "OPENAI_API_KEY", 3, sealed._replace(**change)):
            opened.append(bit)
    assert not opened


@pytest.mark.parametrize("column", ["wrapped_key", "encrypted"])
def test_open_rejects_every_truncation_from_either_end(
    sealed_row: tuple[KeyRing, Sealed], column: str
) -> None:
    ring, sealed = sealed_row
    intact = getattr(sealed, column)
    opened = [
        length
        for length in range(len(intact))
        for cut in (intact[:length], intact[len(intact) - length :])
        if opens(ring, "OPENAI_API_KEY", 3, sealed._replace(**{column: cut}))
    ]
    assert not opened


@pytest.mark.parametrize("column", ["wrapped_key", "encrypted"])
def test_open_rejects_added_bytes(
    sealed_row: tuple[KeyRing, Sealed], column: str
) -> None:
    ring, sealed = sealed_row
    intact = getattr(sealed, column)
    for added in (b"\0", b"\x80", b"\0" * 256, os.urandom(17)):
        for longer in (intact + added, added + intact):
            assert not opens(
                ring, "OPENAI_API_KEY", 3, sealed._replace(**{column: longer})
            )


def test_unwrap_rejects_every_single_bit_flip(
    sealed_row: tuple[KeyRing, Sealed],
) -> None:
    ring, sealed = sealed_row
    assert sealed.wrapped_key is not None
    assert unwraps(ring, "OPENAI_API_KEY", 3, sealed)
    for bit in range(len(sealed.wrapped_key) * 8):
        flipped = bytearray(sealed.wrapped_key)
        flipped[bit // 8] ^= 1 << bit % 8
        assert not unwraps(
            ring, "OPENAI_API_KEY", 3, sealed._replace(wrapped_key=bytes(flipped))
        )


@settings(max_examples=100, deadline=None)
@given(name=names, version=versions, other=names, number=versions)
def test_open_rejects_a_row_moved_to_another_name_or_version(
    name: str, version: int, other: str, number: int
) -> None:
    ring = KeyRing([new_key()])
    sealed = parse_value("tied to its row").seal(ring.primary, name, version)
    for moved_to in {(other, number), (other, version), (name, number)}:
        is_home = moved_to == (name, version)
        assert opens(ring, *moved_to, sealed) == is_home
        assert unwraps(ring, *moved_to, sealed) == is_home


@pytest.mark.parametrize(
    ("name", "version", "other", "number"),
    [
        ("A", 1, "AA", 1),
        ("A", 1, "a", 1),
        ("A", 1, "A\0", 1),
        ("A", 1, "A ", 1),
        ("\u00e9", 1, "e\u0301", 1),  # the same text in NFC and NFD
        ("A", 1, "A", 257),
        ("A", 1, "A", 1 << 56),
        # the bytes of one name's end read as another's version
        ("A\1\0\0\0\0\0\0\0", 1, "A", 1),
    ],
)
def test_names_and_versions_that_look_alike_are_different_rows(
    name: str, version: int, other: str, number: int
) -> None:
    ring = KeyRing([new_key()])
    sealed = parse_value("tied to its row").seal(ring.primary, name, version)
    assert opens(ring, name, version, sealed)
    assert not opens(ring, other, number, sealed)


@pytest.mark.parametrize("column", ["wrapped_key", "encrypted"])
def test_open_rejects_one_layer_taken_from_another_row(column: str) -> None:
    ring = KeyRing([new_key()])
    mine = parse_value("mine").seal(ring.primary, "A", 1)
    for name, version in [("B", 1), ("A", 2), ("A", 1)]:
        theirs = parse_value("theirs").seal(ring.primary, name, version)
        mixed = mine._replace(**{column: getattr(theirs, column)})
        assert not opens(ring, "A", 1, mixed)


@pytest.mark.parametrize("version", [0, -1, 2**63, 2**64, True, 1.0, "1", None, b"1"])
def test_open_rejects_a_version_that_is_no_positive_integer(
    sealed_row: tuple[KeyRing, Sealed], version: Any
) -> None:
    ring, sealed = sealed_row
    with pytest.raises(CannotOpen):
        envelope.unseal(ring, "OPENAI_API_KEY", version, sealed)


@pytest.mark.parametrize("format_", [None, 0, 2, -1, "1", b"1", 1.5])
def test_open_rejects_every_other_format(
    sealed_row: tuple[KeyRing, Sealed], format_: Any
) -> None:
    ring, sealed = sealed_row
    for refusing in (envelope.unseal, envelope.unwrap, envelope.rewrap):
        with pytest.raises(CannotOpen):
            refusing(
                ring, "OPENAI_API_KEY", 3, sealed._replace(envelope_version=format_)
            )


@pytest.mark.parametrize("column", ["wrapped_key", "encrypted"])
@pytest.mark.parametrize("content", [None, "text", 7, 7.5, b"", bytearray(104)])
def test_open_rejects_a_column_of_another_type(
    sealed_row: tuple[KeyRing, Sealed], column: str, content: Any
) -> None:
    ring, sealed = sealed_row
    with pytest.raises(CannotOpen):
        envelope.unseal(ring, "OPENAI_API_KEY", 3, sealed._replace(**{column: content}))


@pytest.mark.parametrize(
    "key_id",
    [None, 7, b"", "", "default", "0" * 15, "0" * 17, "G" * 16, "0" * 16 + "\n"],
)
def test_a_row_that_names_no_key_id_is_damaged(
    sealed_row: tuple[KeyRing, Sealed], key_id: Any
) -> None:
    ring, sealed = sealed_row
    with pytest.raises(CannotOpen):
        envelope.unseal(ring, "OPENAI_API_KEY", 3, sealed._replace(key_id=key_id))


def test_a_row_that_needs_another_key_says_which() -> None:
    stored = new_key()
    sealed = parse_value("kept").seal(stored, "A", 7)
    with pytest.raises(UnknownMasterKey) as caught:
        envelope.unseal(KeyRing([new_key()]), "A", 7, sealed)
    assert (caught.value.name, caught.value.version) == ("A", 7)
    assert caught.value.key_id == stored.id


def test_no_key_is_tried_but_the_one_that_a_row_names() -> None:
    right, wrong = new_key(), new_key()
    sealed = parse_value("kept").seal(right, "A", 1)._replace(key_id=wrong.id)
    assert not opens(KeyRing([right, wrong]), "A", 1, sealed)


def test_every_refusal_names_the_row(sealed_row: tuple[KeyRing, Sealed]) -> None:
    ring, sealed = sealed_row
    other = KeyRing([new_key()])
    calls: list[Callable[[KeyRing, Any], object]] = [
        lambda ring, row: envelope.unseal(ring, "A", 7, row),
        lambda ring, row: envelope.rewrap(ring, "A", 7, row),
        lambda ring, row: envelope.reseal(ring, "A", 7, row, 8),
        lambda ring, row: envelope.unwrap(ring, "A", 7, row),
    ]
    for call in calls:
        for row in (
            sealed,  # which belongs elsewhere
            sealed._replace(wrapped_key=None),
            sealed._replace(envelope_version=2),
            sealed._replace(key_id="default"),
        ):
            with pytest.raises(CannotOpen) as damaged:
                call(ring, row)
            assert (damaged.value.name, damaged.value.version) == ("A", 7)
        with pytest.raises(UnknownMasterKey) as unknown:
            call(other, sealed)
        assert (unknown.value.name, unknown.value.version) == ("A", 7)


def test_a_value_too_short_to_be_one_is_refused_by_name(
    sealed_row: tuple[KeyRing, Sealed],
) -> None:
    ring, sealed = sealed_row
    for encrypted in (None, b"", b"x" * 295):
        with pytest.raises(CannotOpen) as caught:
            envelope.unseal(
                ring, "OPENAI_API_KEY", 3, sealed._replace(encrypted=encrypted)
            )
        assert (caught.value.name, caught.value.version) == ("OPENAI_API_KEY", 3)


@pytest.mark.parametrize("name", [None, 7, b"OPENAI_API_KEY"])
def test_a_name_that_is_no_text_is_a_damaged_row(
    sealed_row: tuple[KeyRing, Sealed], name: Any
) -> None:
    ring, sealed = sealed_row
    for refusing in (envelope.unseal, envelope.unwrap, envelope.rewrap):
        with pytest.raises(CannotOpen):
            refusing(ring, name, 3, sealed)


@pytest.mark.parametrize(
    ("version", "can"),
    [
        (1, True),
        (200, True),
        (2**63 - 1, True),
        (0, False),
        (-1, False),
        (2**63, False),
        (2**64 - 1, False),
        (3**63 - 1, False),
    ],
)
def test_upgrade_seals_for_versions_that_there_can_be(version: int, can: bool) -> None:
    text = envelope.generate_master_key()
    ring, token = KeyRing([parse_key(text)]), Fernet(text).encrypt(b"of 0.x")
    if can:
        sealed = envelope.upgrade(ring, "A", version, token)
        assert envelope.unseal(ring, "A", version, sealed) == "of 0.x"
        return
    with pytest.raises(CannotUpgrade) as caught:
        envelope.upgrade(ring, "A", version, token)
    assert (caught.value.name, caught.value.version) == ("A", version)


@pytest.mark.parametrize("version", [0, 2**63, 2**64 - 1])
def test_what_was_sealed_for_no_version_that_there_can_be_does_not_open(
    version: int,
) -> None:
    text = envelope.generate_master_key()
    key, data_key = decoder.master_key(text), os.urandom(32)
    context = decoder.context("A", version)
    sealed = Sealed(
        1,
        decoder.key_id(key),
        decoder.wrap(key, context, data_key, os.urandom(24)),
        decoder.seal(data_key, context, b"value", os.urandom(24)),
    )
    ring = KeyRing([parse_key(text)])
    assert not opens(ring, "A", version, sealed)
    assert not unwraps(ring, "A", version, sealed)


# One blob for two keys.

_P = 2**130 - 5
_CLAMP = 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF


def poly1305_key(key: bytes, nonce: bytes) -> tuple[int, int]:
    """The r and s with which SecretBox authenticates under `key` and `nonce`.

    The tag of nothing is s. The tag of one block is block * r + s: of the five numbers
    below p that end in these 128 bits, one divided by the block has r's cleared bits.
    """
    box = SecretBox(key)
    s = int.from_bytes(box.encrypt(b"", nonce).ciphertext, "little")
    sealed = box.encrypt(bytes(16), nonce).ciphertext
    block = int.from_bytes(sealed[16:], "little") + 2**128
    low = (int.from_bytes(sealed[:16], "little") - s) % 2**128
    candidates = {(low + high * 2**128) * pow(block, -1, _P) % _P for high in range(5)}
    [r] = [r for r in candidates if r & ~_CLAMP == 0]
    return r, s


def blob_for_two_keys(first: bytes, second: bytes, head: bytes) -> bytes:
    """A blob that SecretBox opens under both keys; under the first it begins with `head`.

    The tag is linear in the blocks: with two blocks taken by `head`, two are left to
    solve for, and a solution fits 128 bits each about once in sixteen tries.
    """
    assert len(head) == 32
    while True:
        nonce = os.urandom(24)
        (r1, s1), (r2, s2) = poly1305_key(first, nonce), poly1305_key(second, nonce)
        body = SecretBox(first).encrypt(head, nonce).ciphertext[16:]
        c1, c2 = (
            int.from_bytes(body[start : start + 16], "little") + 2**128
            for start in (0, 16)
        )
        tag = int.from_bytes(os.urandom(16), "little")
        # c1 r^4 + c2 r^3 + c3 r^2 + c4 r = tag - s, for both keys
        want1 = ((tag - s1) % 2**128 - c1 * r1**4 - c2 * r1**3) * pow(r1, -1, _P)
        want2 = ((tag - s2) % 2**128 - c1 * r2**4 - c2 * r2**3) * pow(r2, -1, _P)
        c3 = (want1 - want2) * pow(r1 - r2, -1, _P) % _P
        c4 = (want1 - c3 * r1) % _P
        if 2**128 <= c3 < 2**129 and 2**128 <= c4 < 2**129:
            blocks = b"".join(
                (c - 2**128).to_bytes(16, "little") for c in (c1, c2, c3, c4)
            )
            return nonce + tag.to_bytes(16, "little") + blocks


def test_one_wrap_made_for_two_keys_does_not_open_under_both() -> None:
    texts = [envelope.generate_master_key() for _ in range(2)]
    first, second = (decoder.master_key(text) for text in texts)
    ring = KeyRing(parse_key(text) for text in texts)
    context = decoder.context("A", 1)
    blob = blob_for_two_keys(first, second, context)

    # libsodium alone opens it under both, with two different data keys …
    plain = [SecretBox(key).decrypt(blob) for key in (first, second)]
    assert plain[0][32:] != plain[1][32:]
    # … and the context at its head lets it open under one only.
    encrypted = decoder.seal(plain[0][32:], context, b"value", os.urandom(24))
    other = decoder.seal(plain[1][32:], context, b"other", os.urandom(24))
    assert opens(ring, "A", 1, Sealed(1, decoder.key_id(first), blob, encrypted))
    forged = Sealed(1, decoder.key_id(second), blob, other)
    assert not opens(ring, "A", 1, forged)
    assert not unwraps(ring, "A", 1, forged)
    with pytest.raises(CannotOpen):
        envelope.rewrap(ring, "A", 1, forged)


# Keys, and what is shown of them.


@pytest.mark.parametrize(
    "text",
    [
        "",
        "short",
        "A" * 43,
        "A" * 44,
        "A" * 45,
        "=" * 44,
        "A" * 42 + "==",
        "A" * 42 + "B=",  # its last character has bits that no byte uses
        "A" * 20 + "\n" + "A" * 22 + "=",
        "A" * 20 + " " + "A" * 22 + "=",
        "\u00e9" * 43 + "=",
        "A" * 43 + "\uff1d",
        "\uff21" * 43 + "=",
    ],
)
def test_parse_says_what_is_wrong_with_a_key_without_showing_it(text: str) -> None:
    with pytest.raises(InvalidMasterKey) as caught:
        MasterKey.parse(text)
    assert str(caught.value).startswith("it ")
    assert not text or text not in str(caught.value)


@pytest.mark.parametrize("around", ["{}", "{}\n", "  {}\t", "\r\n{}\r\n"])
def test_parse_takes_either_alphabet_and_white_space_around(around: str) -> None:
    raw = bytes([0xFB, 0xFF] * 16)
    spellings = [base64.b64encode(raw), base64.urlsafe_b64encode(raw)]
    assert spellings[0] != spellings[1]
    ids = {parse_key(around.format(each.decode())).id for each in spellings}
    assert ids == {decoder.key_id(raw)}


def test_a_generated_master_key_is_44_characters_that_parse() -> None:
    texts = {envelope.generate_master_key() for _ in range(100)}
    assert len(texts) == 100
    assert {len(text) for text in texts} == {44}
    assert all(isinstance(MasterKey.parse(text), MasterKey) for text in texts)


def test_no_repr_str_or_format_shows_a_key_or_a_value() -> None:
    text = envelope.generate_master_key()
    raw, key = decoder.master_key(text), parse_key(text)
    plaintext = parse_value("a value that must not be shown")
    ring = KeyRing([key])
    sealed = plaintext.seal(key, "A", 1)
    shown = "".join(
        f"{thing!r}{thing}"
        for thing in (key, plaintext, ring, sealed, [key], {1: ring})
    )
    for needle in (text, text[:20], raw.hex(), repr(raw)[2:42], "a value that"):
        assert needle not in shown
    assert repr(plaintext) == "<Plaintext>"
    assert repr(KeyRing([key, new_key()])).startswith(f"<KeyRing {key.id} ")


@pytest.mark.parametrize("secret", ["key", "ring", "plaintext"])
def test_what_holds_a_key_or_a_value_has_no_dict_to_print(secret: str) -> None:
    key = new_key()
    thing = {"key": key, "ring": KeyRing([key]), "plaintext": parse_value("v")}[secret]
    assert not hasattr(thing, "__dict__")


def test_appears_in_finds_a_key_in_every_spelling() -> None:
    raw = bytes([0xFB, 0xFF] * 16)
    key = parse_key(base64.b64encode(raw).decode())
    standard = base64.b64encode(raw).decode()
    for spelling in (
        standard,
        standard.rstrip("="),
        standard.replace("+", "-").replace("/", "_"),
        raw.hex(),
        raw.hex().upper(),
    ):
        assert key.appears_in(f"prefix {spelling} suffix")
        assert KeyRing([new_key(), key]).any_appears_in(spelling)
    assert not key.appears_in(envelope.generate_master_key())
    assert not KeyRing([new_key(), key]).any_appears_in(standard[:-3])
    assert key.id in KeyRing([new_key(), key])
    assert key.id not in KeyRing([new_key()])


def test_a_key_given_twice_is_once_in_the_ring() -> None:
    text = envelope.generate_master_key()
    assert len(KeyRing([parse_key(text), parse_key(text)]).keys) == 1


def test_a_ring_without_keys_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="at least one key"):
        KeyRing([])


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "empty"),
        ("a\0b", "NUL"),
        ("\ud800", "UTF-8"),
        ("x" * 65_537, "65,537"),
        ("\u00e9" * 32_769, "65,538"),
        (b"bytes", "not text"),
        (None, "not text"),
    ],
)
def test_parse_says_what_is_wrong_with_a_value(value: object, problem: str) -> None:
    with pytest.raises(InvalidSecret) as caught:
        Plaintext.parse(value)
    assert problem in str(caught.value)
