"""Attacks by somebody who can write to the database file, carried out.

Each is done with the sqlite3 module alone, on the file under a running instance. What
such a writer can still do is here as well: SECURITY.md says so, and these tests are why.
"""

from __future__ import annotations

import base64
import os
import shutil
import sqlite3
import tracemalloc
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from cryptography.fernet import Fernet
from datasette import hookimpl
from datasette.app import Datasette
from datasette.plugins import pm
from support import decoder

from datasette_secrets import (
    CannotOpen,
    InvalidSecret,
    NeedsUpgrade,
    Secret,
    UnknownMasterKey,
    delete_secret,
    envelope,
    get_secret,
    health,
    listing,
    restore_secret,
    rotation,
    service,
    set_secret,
    store,
    upgrade,
)
from datasette_secrets.instance import get_instance

LAYERS = ("wrapped_key", "encrypted")


class Attacker:
    """Has the database file, read and write. Has no master key."""

    def __init__(self, path: str) -> None:
        self.path = path

    def run(self, sql: str, **parameters: Any) -> None:
        with closing(sqlite3.connect(self.path)) as conn, conn:
            conn.execute(sql, parameters)

    def row(self, name: str, version: int) -> dict[str, Any]:
        [row] = [
            row
            for row in decoder.rows(self.path)
            if (row["name"], row["version"]) == (name, version)
        ]
        return row

    def put(self, name: str, version: int, /, **columns: Any) -> None:
        changes = ", ".join(f"{column} = :{column}" for column in columns)
        self.run(
            f"update datasette_secrets set {changes} "
            "where name = :name_ and version = :version_",
            name_=name,
            version_=version,
            **columns,
        )

    def put_token(self, name: str, version: int, token: bytes) -> None:
        """A row as 0.x wrote them."""
        self.run(
            "insert into datasette_secrets "
            "(name, version, encrypted, encryption_key_name) "
            "values (:name, :version, :token, 'default')",
            name=name,
            version=version,
            token=token,
        )


@pytest.fixture
async def attacker(datasette: Datasette, internal: str) -> Attacker:
    """Somebody who can write to the file in which OPENAI_API_KEY and BANK_API_KEY are."""
    await set_secret(datasette, "OPENAI_API_KEY", "openai 1")
    await set_secret(datasette, "OPENAI_API_KEY", "openai 2")
    await set_secret(datasette, "BANK_API_KEY", "bank 1")
    return Attacker(internal)


def data_key_of(attacker: Attacker, name: str, version: int, key_text: str) -> bytes:
    """A data key, leaked: here it is unwrapped with the master key that wraps it."""
    row = attacker.row(name, version)
    key = decoder.master_key(key_text)
    return decoder.unwrap(key, decoder.context(name, version), row["wrapped_key"])


def forge(data_key: bytes, name: str, version: int) -> bytes:
    return decoder.seal(
        data_key, decoder.context(name, version), b"forged", os.urandom(24)
    )


# What does not work.


@pytest.mark.parametrize("taken", [LAYERS, LAYERS[:1], LAYERS[1:]])
@pytest.mark.parametrize(
    ("theirs", "mine"),
    [
        (("BANK_API_KEY", 1), ("OPENAI_API_KEY", 2)),
        (("OPENAI_API_KEY", 1), ("OPENAI_API_KEY", 2)),
    ],
)
async def test_what_was_sealed_for_one_row_does_not_open_in_another(
    datasette: Datasette,
    attacker: Attacker,
    theirs: tuple[str, int],
    mine: tuple[str, int],
    taken: tuple[str, ...],
) -> None:
    stolen = attacker.row(*theirs)
    attacker.put(*mine, **{column: stolen[column] for column in taken})
    with pytest.raises(CannotOpen):
        await get_secret(datasette, mine[0])


async def test_two_rows_that_change_their_names_do_not_open(
    datasette: Datasette, attacker: Attacker
) -> None:
    attacker.run("update datasette_secrets set version = 3 where name = 'BANK_API_KEY'")
    for old, new in (("OPENAI", "X"), ("BANK", "OPENAI"), ("X", "BANK")):
        attacker.run(
            "update datasette_secrets set name = :new where name = :old",
            old=f"{old}_API_KEY",
            new=f"{new}_API_KEY",
        )
    for name in ("OPENAI_API_KEY", "BANK_API_KEY"):
        with pytest.raises(CannotOpen):
            await get_secret(datasette, name)


async def test_two_versions_that_change_their_numbers_do_not_open(
    datasette: Datasette, attacker: Attacker
) -> None:
    for old, new in ((1, 9), (2, 1), (9, 2)):
        attacker.put("OPENAI_API_KEY", old, version=new)
    with pytest.raises(CannotOpen):
        await get_secret(datasette, "OPENAI_API_KEY")
    with pytest.raises(CannotOpen):
        await service.roll_back(datasette, "OPENAI_API_KEY", 1)


async def test_an_older_version_copied_to_the_top_does_not_open(
    datasette: Datasette, attacker: Attacker
) -> None:
    attacker.run(
        "insert into datasette_secrets (name, version, encrypted, "
        "encryption_key_name, wrapped_key, envelope_version) "
        "select name, 3, encrypted, encryption_key_name, wrapped_key, "
        "envelope_version from datasette_secrets "
        "where name = 'OPENAI_API_KEY' and version = 1"
    )
    with pytest.raises(CannotOpen):
        await get_secret(datasette, "OPENAI_API_KEY")


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"envelope_version": None}, CannotOpen),
        ({"envelope_version": 0}, CannotOpen),
        ({"envelope_version": 2}, CannotOpen),
        ({"wrapped_key": None}, CannotOpen),
        ({"wrapped_key": None, "envelope_version": None}, NeedsUpgrade),
    ],
)
async def test_a_row_whose_format_was_downgraded_does_not_open(
    datasette: Datasette, attacker: Attacker, columns: dict[str, Any], error: Any
) -> None:
    attacker.put("OPENAI_API_KEY", 2, **columns)
    with pytest.raises(error):
        await get_secret(datasette, "OPENAI_API_KEY")
    # Nor does an upgrade take it for something else.
    await upgrade.upgrade(datasette)
    with pytest.raises(error):
        await get_secret(datasette, "OPENAI_API_KEY")


@pytest.mark.parametrize("made_with", ["the primary key", "another key", "no key"])
async def test_a_row_of_0x_that_was_smuggled_in_does_not_open(
    datasette: Datasette, attacker: Attacker, master_key: str, made_with: str
) -> None:
    token = {
        "the primary key": Fernet(master_key).encrypt(b"smuggled"),
        "another key": Fernet(Fernet.generate_key()).encrypt(b"smuggled"),
        "no key": base64.urlsafe_b64encode(b"\x80" + os.urandom(80)),
    }[made_with]
    attacker.put_token("OPENAI_API_KEY", 3, token)
    with pytest.raises(NeedsUpgrade):
        await get_secret(datasette, "OPENAI_API_KEY")
    with pytest.raises(NeedsUpgrade):
        await service.roll_back(datasette, "OPENAI_API_KEY", 3)
    [problem] = (await rotation.verify(datasette)).problems
    assert problem.code == "needs-upgrade"


async def test_a_rotation_does_not_bring_in_a_row_of_0x(
    datasette: Datasette, attacker: Attacker, master_key: str
) -> None:
    attacker.put_token("OPENAI_API_KEY", 3, Fernet(master_key).encrypt(b"smuggled"))
    for new_data_keys in (False, True):
        await rotation.rotate(
            datasette, skip_unopenable=True, new_data_keys=new_data_keys
        )
        with pytest.raises(NeedsUpgrade):
            await get_secret(datasette, "OPENAI_API_KEY")


@pytest.mark.parametrize("made_with", ["another key", "no key"])
async def test_an_upgrade_leaves_a_row_of_0x_that_no_key_of_the_ring_opens(
    datasette: Datasette, attacker: Attacker, made_with: str
) -> None:
    token = {
        "another key": Fernet(Fernet.generate_key()).encrypt(b"smuggled"),
        "no key": base64.urlsafe_b64encode(b"\x80" + os.urandom(80)),
    }[made_with]
    attacker.put_token("OPENAI_API_KEY", 3, token)
    report = await upgrade.upgrade(datasette)
    assert (report.changed, report.complete, len(report.problems)) == (0, False, 1)
    assert attacker.row("OPENAI_API_KEY", 3)["encrypted"] == token
    with pytest.raises(NeedsUpgrade):
        await get_secret(datasette, "OPENAI_API_KEY")


LARGE = 30_000_000


async def test_what_is_larger_than_any_value_is_named_and_never_loaded(
    datasette: Datasette, attacker: Attacker
) -> None:
    attacker.run(
        f"update datasette_secrets set encrypted = zeroblob({LARGE}) "
        "where name = 'OPENAI_API_KEY'"
    )
    tracemalloc.start()
    try:
        with pytest.raises(CannotOpen):
            await get_secret(datasette, "OPENAI_API_KEY")
        for version in (1, 2):
            with pytest.raises(CannotOpen):
                await service.roll_back(datasette, "OPENAI_API_KEY", version)
        verified = await rotation.verify(datasette)
        report = await rotation.rotate(
            datasette, new_data_keys=True, skip_unopenable=True
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    names = {problem.name for problem in (*verified.problems, *report.problems)}
    assert names == {"OPENAI_API_KEY"}
    assert peak < LARGE


@pytest.mark.parametrize("size", [65_536, 65_537, 200_000])
async def test_a_value_of_0x_that_is_too_large_is_named_and_left(
    datasette: Datasette, attacker: Attacker, master_key: str, size: int
) -> None:
    token = Fernet(master_key).encrypt(b"x" * size)
    attacker.put_token("OPENAI_API_KEY", 3, token)
    report = await upgrade.upgrade(datasette)
    if size == 65_536:
        assert report.complete
        assert await get_secret(datasette, "OPENAI_API_KEY") == "x" * size
        return
    [problem] = report.problems
    assert "is larger than a value can be" in problem.message
    assert "add its key" not in problem.remedy
    assert attacker.row("OPENAI_API_KEY", 3)["encrypted"] == token


async def test_a_value_of_0x_that_is_too_large_needs_no_key(
    datasette: Datasette, attacker: Attacker, master_key: str
) -> None:
    token = Fernet(master_key).encrypt(b"x" * 200_000)
    attacker.put_token("OPENAI_API_KEY", 3, token)
    with pytest.raises(NeedsUpgrade, match="too large for that, so set a shorter"):
        await get_secret(datasette, "OPENAI_API_KEY")
    [problem] = (await health.examine(datasette)).problems
    assert problem.code == "needs-upgrade"
    assert "too large to be upgraded (OPENAI_API_KEY version 3)" in problem.message
    assert "key that" not in problem.message
    # Beside one that a key would help, each is named once.
    attacker.put_token("BANK_API_KEY", 3, Fernet(Fernet.generate_key()).encrypt(b"x"))
    large, other = (await health.examine(datasette)).problems
    assert large == problem
    assert other.message.startswith("1 version was stored")
    assert "(BANK_API_KEY version 3): add the key" in other.message
    with pytest.raises(NeedsUpgrade, match=r"add the key .* and run"):
        await get_secret(datasette, "BANK_API_KEY")


async def test_a_leaked_data_key_forges_its_own_row_and_no_other(
    datasette: Datasette, attacker: Attacker, master_key: str
) -> None:
    leaked = data_key_of(attacker, "BANK_API_KEY", 1, master_key)
    attacker.put("OPENAI_API_KEY", 2, encrypted=forge(leaked, "OPENAI_API_KEY", 2))
    with pytest.raises(CannotOpen):
        await get_secret(datasette, "OPENAI_API_KEY")
    attacker.put("BANK_API_KEY", 1, encrypted=forge(leaked, "BANK_API_KEY", 1))
    assert await get_secret(datasette, "BANK_API_KEY") == "forged"


async def test_a_leaked_data_key_still_forges_after_a_plain_rotation(
    attacker: Attacker, make_datasette: MakeDatasette, master_key: str
) -> None:
    leaked = data_key_of(attacker, "BANK_API_KEY", 1, master_key)
    new_key = envelope.generate_master_key()
    await rotation.rotate(make_datasette(new_key, master_key))
    attacker.put("BANK_API_KEY", 1, encrypted=forge(leaked, "BANK_API_KEY", 1))
    assert await get_secret(make_datasette(new_key), "BANK_API_KEY") == "forged"


async def test_a_leaked_data_key_does_not_forge_after_a_rotation_with_new_data_keys(
    attacker: Attacker, make_datasette: MakeDatasette, master_key: str
) -> None:
    leaked = data_key_of(attacker, "BANK_API_KEY", 1, master_key)
    new_key = envelope.generate_master_key()
    await rotation.rotate(make_datasette(new_key, master_key), new_data_keys=True)
    attacker.put("BANK_API_KEY", 1, encrypted=forge(leaked, "BANK_API_KEY", 1))
    with pytest.raises(CannotOpen):
        await get_secret(make_datasette(new_key), "BANK_API_KEY")


async def test_a_kept_wrap_of_a_leaked_data_key_is_useless_once_its_master_key_is_gone(
    attacker: Attacker, make_datasette: MakeDatasette, master_key: str
) -> None:
    leaked = data_key_of(attacker, "BANK_API_KEY", 1, master_key)
    kept = attacker.row("BANK_API_KEY", 1)
    new_key = envelope.generate_master_key()
    await rotation.rotate(make_datasette(new_key, master_key), new_data_keys=True)
    attacker.put(
        "BANK_API_KEY",
        1,
        wrapped_key=kept["wrapped_key"],
        encryption_key_name=kept["encryption_key_name"],
        encrypted=forge(leaked, "BANK_API_KEY", 1),
    )
    # The old wrap is as good as its master key: this is why a rotation after a leak
    # ends with that key's removal from the ring.
    both = make_datasette(new_key, master_key)
    assert await get_secret(both, "BANK_API_KEY") == "forged"
    with pytest.raises(UnknownMasterKey):
        await get_secret(make_datasette(new_key), "BANK_API_KEY")


async def test_a_rotated_row_does_not_open_with_the_old_key_alone(
    attacker: Attacker, make_datasette: MakeDatasette, master_key: str
) -> None:
    new_key = envelope.generate_master_key()
    await rotation.rotate(make_datasette(new_key, master_key))
    with pytest.raises(UnknownMasterKey):
        await get_secret(make_datasette(master_key), "BANK_API_KEY")
    # Nor by saying that the old key wraps it.
    key_id = decoder.key_id(decoder.master_key(master_key))
    attacker.put("BANK_API_KEY", 1, encryption_key_name=key_id)
    with pytest.raises(CannotOpen):
        await get_secret(make_datasette(master_key), "BANK_API_KEY")


async def test_a_value_set_under_another_master_key_does_not_open(
    datasette: Datasette, attacker: Attacker, master_key: str
) -> None:
    mine = os.urandom(32)
    data_key, context = os.urandom(32), decoder.context("BANK_API_KEY", 2)
    for claimed, error in (
        (decoder.key_id(mine), UnknownMasterKey),
        (decoder.key_id(decoder.master_key(master_key)), CannotOpen),
    ):
        attacker.run("delete from datasette_secrets where version = 2")
        attacker.run(
            "insert into datasette_secrets (name, version, encrypted, wrapped_key, "
            "envelope_version, encryption_key_name) "
            "values ('BANK_API_KEY', 2, :encrypted, :wrapped_key, 1, :key_id)",
            encrypted=decoder.seal(data_key, context, b"mine", os.urandom(24)),
            wrapped_key=decoder.wrap(mine, context, data_key, os.urandom(24)),
            key_id=claimed,
        )
        with pytest.raises(error):
            await get_secret(datasette, "BANK_API_KEY")


async def test_a_failed_read_is_not_recorded_as_a_use(
    datasette: Datasette, attacker: Attacker
) -> None:
    attacker.put("BANK_API_KEY", 1, encrypted=os.urandom(296))
    with pytest.raises(CannotOpen):
        await get_secret(datasette, "BANK_API_KEY", "ann")
    assert attacker.row("BANK_API_KEY", 1)["last_used_at"] is None


@pytest.mark.parametrize("sql", ["'a' || char(0) || 'b'", "cast(x'ff' as text)", "7"])
async def test_odd_text_in_other_columns_hides_nothing(
    datasette: Datasette, attacker: Attacker, sql: str
) -> None:
    for column in ("note", "created_by", "updated_at", "last_used_at", "deleted_by"):
        attacker.run(f"update datasette_secrets set {column} = {sql}")
    assert await get_secret(datasette, "OPENAI_API_KEY") == "openai 2"
    assert await set_secret(datasette, "OPENAI_API_KEY", "openai 3") == 3
    assert len(await listing.list_secrets(datasette)) == 3  # and the example


# What a writer can still do, as SECURITY.md says.


async def test_a_writer_can_bring_back_an_older_version_by_removing_the_newest(
    datasette: Datasette, attacker: Attacker
) -> None:
    attacker.run("delete from datasette_secrets where version = 2")
    assert await get_secret(datasette, "OPENAI_API_KEY") == "openai 1"


async def test_a_writer_can_put_back_a_row_that_stood_there_before(
    datasette: Datasette, attacker: Attacker
) -> None:
    kept = attacker.row("BANK_API_KEY", 1)
    attacker.run("delete from datasette_secrets where name = 'BANK_API_KEY'")
    await set_secret(datasette, "BANK_API_KEY", "a value set since")
    attacker.put(
        "BANK_API_KEY",
        1,
        wrapped_key=kept["wrapped_key"],
        encrypted=kept["encrypted"],
    )
    assert await get_secret(datasette, "BANK_API_KEY") == "bank 1"


async def test_a_writer_can_put_back_a_copy_of_the_file(
    make_datasette: MakeDatasette, master_key: str, internal: str, tmp_path: Path
) -> None:
    for value in ("one", "two"):
        datasette = make_datasette(master_key)
        await set_secret(datasette, "NAME", value)
        datasette.close()
        if value == "one":
            shutil.copy(internal, tmp_path / "copy.db")
    shutil.copy(tmp_path / "copy.db", internal)
    assert await get_secret(make_datasette(master_key), "NAME") == "one"


async def test_a_row_of_another_instance_opens_under_a_shared_master_key(
    datasette: Datasette,
    attacker: Attacker,
    make_datasette: MakeDatasette,
    master_key: str,
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "another.db")
    await set_secret(make_datasette(master_key, internal=path), "BANK_API_KEY", "other")
    row = Attacker(path).row("BANK_API_KEY", 1)
    attacker.put(
        "BANK_API_KEY", 1, wrapped_key=row["wrapped_key"], encrypted=row["encrypted"]
    )
    assert await get_secret(datasette, "BANK_API_KEY") == "other"


async def test_a_writer_can_undo_a_deletion(
    datasette: Datasette, attacker: Attacker
) -> None:
    await delete_secret(datasette, "BANK_API_KEY", actor_id="ann")
    attacker.put("BANK_API_KEY", 1, deleted_at=None, deleted_by=None)
    assert await get_secret(datasette, "BANK_API_KEY") == "bank 1"


async def test_a_writer_can_forge_notes_times_and_actors(
    datasette: Datasette, attacker: Attacker
) -> None:
    attacker.put("BANK_API_KEY", 1, note="forged", updated_by="forged")
    [version] = await store.history(get_instance(datasette).db, "BANK_API_KEY")
    assert (version.note, version.updated_by) == ("forged", "forged")


async def test_a_writer_can_delete_and_the_secret_then_reads_as_not_set(
    datasette: Datasette, attacker: Attacker
) -> None:
    attacker.run("delete from datasette_secrets where name = 'BANK_API_KEY'")
    assert await get_secret(datasette, "BANK_API_KEY") is None


# Master keys asked for as secrets.


@contextmanager
def registered(*names: str) -> Iterator[None]:
    """A plugin that registers secrets of these names."""

    class Plugin:
        @hookimpl
        def register_secrets(self) -> list[Secret]:
            return [Secret(name) for name in names]

    plugin = Plugin()
    pm.register(plugin, name="test-registers-secrets")
    try:
        yield
    finally:
        pm.unregister(plugin)


@pytest.mark.parametrize("name", ["ENCRYPTION_KEY", "OLD_ENCRYPTION_KEY", "MY_KEY"])
async def test_a_plugin_that_registers_a_reserved_name_gets_nothing(
    make_datasette: MakeDatasette,
    master_key: str,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setenv("DATASETTE_SECRETS_MY_KEY", master_key)
    monkeypatch.setenv(f"DATASETTE_SECRETS_{name}", master_key)
    datasette = make_datasette({"$env": "DATASETTE_SECRETS_MY_KEY"})
    with registered(name, "INNOCENT"):
        assert (await get_secret(datasette, name)) is None
        with pytest.raises(InvalidSecret, match="reserved"):
            await set_secret(datasette, name, "a value")
        listed = [each.name for each in await listing.list_secrets(datasette)]
        assert listed == ["INNOCENT"]


async def test_names_that_are_read_as_the_same_text_are_listed_once(
    datasette: Datasette, internal: str
) -> None:
    await set_secret(datasette, "A", "a value")
    with closing(sqlite3.connect(internal)) as conn, conn:
        for name in ("41ff", "41fe"):  # not UTF-8
            conn.execute(
                "insert into datasette_secrets "
                "(name, version, encrypted, encryption_key_name) "
                f"values (cast(x'{name}' as text), 1, x'00', 'default')"
            )
    listed = [each.name for each in await listing.list_secrets(datasette)]
    assert listed == ["A", "A\ufffd", "EXAMPLE_SECRET"]


@pytest.mark.parametrize(
    "around", ["{}", " {}\n", "{},old", "key={}", "https://host/?k={}&x=1"]
)
async def test_a_variable_that_holds_the_master_key_is_no_secret(
    datasette: Datasette,
    master_key: str,
    monkeypatch: pytest.MonkeyPatch,
    around: str,
) -> None:
    raw = decoder.master_key(master_key)
    for spelling in (
        master_key,
        base64.b64encode(raw).decode(),
        master_key.rstrip("="),
        raw.hex(),
        raw.hex().upper(),
    ):
        monkeypatch.setenv("DATASETTE_SECRETS_INNOCENT", around.format(spelling))
        assert (await get_secret(datasette, "INNOCENT")) is None
        listed = [each.name for each in await listing.list_secrets(datasette)]
        assert "INNOCENT" not in listed
        if str(around) == "{}":
            # What is stored under that name is still what it is.
            assert "EXAMPLE_SECRET" in listed


@pytest.mark.parametrize(
    "name", ["", "a\0b", "a=b", "../A", "A" * 10_000, "é", " A", "A\n"]
)
async def test_a_name_of_any_text_reads_as_not_set(
    datasette: Datasette, name: str
) -> None:
    assert await get_secret(datasette, name) is None


async def test_a_name_that_is_no_text_is_listed_nowhere_and_refused_by_all_else(
    datasette: Datasette,
) -> None:
    assert await listing.find_secret(datasette, "\ud800") is None
    for call in (
        lambda: get_secret(datasette, "\ud800"),
        lambda: set_secret(datasette, "\ud800", "a value"),
        lambda: delete_secret(datasette, "\ud800"),
        lambda: restore_secret(datasette, "\ud800"),
        lambda: service.roll_back(datasette, "\ud800", 1),
        lambda: service.destroy_versions(datasette, "\ud800", [1]),
        lambda: service.set_details(datasette, "\ud800", {"note": "note"}),
    ):
        with pytest.raises(InvalidSecret):
            await call()
    with pytest.raises(InvalidSecret, match="ID of an actor"):
        await set_secret(datasette, "A", "a value", actor_id="\ud800")


@pytest.mark.parametrize("version", [0, -1, 2**63, 2**64, 10**30])
async def test_a_version_of_any_size_is_one_that_is_not_stored(
    datasette: Datasette, attacker: Attacker, version: int
) -> None:
    with pytest.raises(InvalidSecret):
        await service.roll_back(datasette, "BANK_API_KEY", version)
    with pytest.raises(InvalidSecret):
        await service.destroy_versions(datasette, "BANK_API_KEY", [version])
    assert await get_secret(datasette, "BANK_API_KEY") == "bank 1"
