"""From the shell: rotate-key, status, verify, upgrade, and what they say in JSON."""

from __future__ import annotations

import shlex
import sqlite3
from contextlib import closing
from typing import Any

import pytest
from support import zero
from support.console import Console, key_id

from datasette_secrets import envelope

OLD, NEW, OTHER = (envelope.generate_master_key() for _ in range(3))
OLD_ID, NEW_ID, OTHER_ID = (key_id(key) for key in (OLD, NEW, OTHER))


@pytest.fixture
async def old(console: Console) -> Console:
    """Five versions under the old key, in front of which stands a new one."""
    console.key = OLD
    await console.fill("A", versions=3)
    await console.fill("B", versions=2)
    console.configure(NEW, OLD)
    return console


def values(console: Console) -> list[tuple[str, int, bytes]]:
    return console.sql("select name, version, encrypted from datasette_secrets")


def keys_of_rows(console: Console) -> set[str]:
    rows = console.sql("select encryption_key_name from datasette_secrets")
    return {key for (key,) in rows}


def damage(console: Console, name: str, version: object) -> None:
    console.sql(
        "update datasette_secrets set wrapped_key = zeroblob(104) "
        f"where name = '{name}' and version = {version}"
    )


# rotate-key


def test_rotation_says_where_what_and_what_next(old: Console) -> None:
    before = values(old)
    said = old.ok("rotate-key")
    assert said.splitlines() == [
        f"Database: {old.internal}",
        f"Primary master key: {NEW_ID}, from entry 1 of encryption-key",
        "Re-wrapped 5 versions",
        f"  {NEW_ID}  primary, entry 1 of encryption-key: wraps 5 versions",
        f"  {OLD_ID}  configured, entry 2 of encryption-key: wraps 0 versions",
        f"no version needs master key {OLD_ID}. If it is a new key, leave it. If it is the "
        "old one: once every server has restarted with the new key listed first, keep a "
        "copy for backups and empty its file or entry",
    ]
    assert values(old) == before
    assert keys_of_rows(old) == {NEW_ID}


def test_the_same_in_json_has_a_documented_shape(old: Console) -> None:
    assert old.json("rotate-key") == {
        "ok": True,
        "database": str(old.internal),
        "dry_run": False,
        "to_change": 5,
        "changed": 5,
        "current": 0,
        "problems": [],
        "keys": [
            key_json(NEW_ID, 5, 1, primary=True),
            key_json(OLD_ID, 0, 2, removable=True),
        ],
        "clean_up": {"vacuumed": True, "log_emptied": True, "remains": None},
    }


def key_json(
    id_: str, versions: int, entry: int | None, **marks: bool
) -> dict[str, Any]:
    return {
        "id": id_,
        "primary": False,
        "configured": entry is not None,
        "removable": False,
        "versions": versions,
        "source": entry and f"entry {entry} of encryption-key",
        **marks,
    }


def test_a_dry_run_changes_nothing_and_exits_0(old: Console) -> None:
    before = old.files()
    said = old.ok("rotate-key", "--dry-run")
    assert "Would re-wrap 5 versions\n" in said
    assert old.files() == before


def test_new_data_keys_seal_every_value_afresh(old: Console) -> None:
    before = {row[2] for row in values(old)}
    old.ok("rotate-key", "--new-data-keys")
    assert not before & {row[2] for row in values(old)}
    assert old.ok("get", "A") == "A value 3\n"
    old.ok("rotate-key", "--new-data-keys", "--batch-size", "2")


def test_what_does_not_open_stops_the_rotation_with_what_to_do(old: Console) -> None:
    damage(old, "A", 1)
    before = old.files()
    result = old.run("rotate-key")
    assert result.exit_code == 1
    assert "Nothing was changed; 5 versions to re-wrap" in result.stdout
    assert "A version 1 cannot be decrypted" in result.stdout
    assert "datasette secrets destroy A --version 1" in result.stdout
    assert "--skip-unopenable" in result.stdout
    assert old.files() == before


def test_the_rest_can_be_rotated_and_still_exits_1(old: Console) -> None:
    damage(old, "A", 1)
    result = old.run("rotate-key", "--skip-unopenable")
    assert result.exit_code == 1
    assert "Re-wrapped 4 versions" in result.stdout
    assert "A version 1 cannot be decrypted" in result.stdout
    assert "no version needs" not in result.stdout
    assert old.ok("destroy", "A", "--version", "1", "--yes")
    assert "Re-wrapped 0 versions; 4 already use the primary key\n" in old.ok(
        "rotate-key"
    )


def test_a_key_that_is_not_in_the_ring_is_named(old: Console) -> None:
    old.configure(NEW, OTHER)
    result = old.run("rotate-key")
    assert result.exit_code == 1
    assert f"add key {OLD_ID} to encryption-key" in result.stdout
    assert [each["code"] for each in old.json("rotate-key")["problems"]] == (
        ["unknown-master-key"] * 5
    )


def test_a_rotation_that_is_not_complete_says_why(old: Console) -> None:
    old.sql(
        "create trigger undo before update on datasette_secrets "
        "begin select raise(ignore); end"
    )
    for arguments in (("rotate-key",), ("rotate-key", "--json")):
        result = old.run(*arguments)
        assert result.exit_code == 1
        assert "The trigger 'undo' was not made by this plugin" in result.stderr
    assert keys_of_rows(old) == {OLD_ID}


def test_with_no_secrets_it_asks_whether_the_file_is_right(console: Console) -> None:
    console.internal.touch()
    said = console.refused("rotate-key")
    assert said.startswith("There are no secrets in ")
    assert "is it the right database?" in said
    assert console.internal.read_bytes() == b""


# status


def test_status_in_json_has_a_documented_shape(old: Console) -> None:
    old.configure(NEW, OTHER)
    old.ok("set", "B", input="new")
    old.ok("destroy", "A", "--version", "1", "--yes")
    old.internal.chmod(0o600)
    assert old.json("status") == {
        "ok": False,
        "database": str(old.internal),
        "database_name": None,
        "journal_mode": "delete",
        "versions": 5,
        "destroyed": 1,
        "needs_upgrade": 0,
        "keys": [
            key_json(NEW_ID, 1, 1, primary=True),
            key_json(OTHER_ID, 0, 2, removable=True),
            key_json(OLD_ID, 4, None),
        ],
        "problems": [
            {
                "code": "unknown-master-key",
                "message": f"4 versions need master key {OLD_ID}, which is not "
                "configured: add it to encryption-key, or restart the server if it is "
                'already there. If the key is lost, see "A key is lost" in '
                ".github/docs/operations.md",
            }
        ],
        "warnings": [
            {
                "code": "old-key-unneeded",
                "message": f"no version needs master key {OTHER_ID}. If it is a new key, "
                "leave it. If it is the old one: once every server has restarted with the new "
                "key listed first, keep a copy for backups and empty its file or entry",
            }
        ],
    }


def test_status_exits_0_while_all_is_well(old: Console) -> None:
    said = old.ok("status")
    assert said.splitlines()[:2] == [
        f"Database: {old.internal}, journal mode delete",
        "Stored: 5 versions, 0 destroyed",
    ]
    old.sql("pragma journal_mode = wal")
    assert "journal mode wal" in old.ok("status")


def test_status_without_a_key_says_so_and_exits_1(old: Console) -> None:
    old.configure()
    result = old.run("status")
    assert result.exit_code == 1
    assert "is not configured" in result.stdout
    assert "Stored: 5 versions" in result.stdout


def test_status_opens_nothing(old: Console) -> None:
    """It counts rows whose wraps and values are nonsense."""
    old.sql("update datasette_secrets set wrapped_key = x'00', encrypted = x'00'")
    assert old.json("status")["versions"] == 5


# verify


def test_verify_opens_every_version(old: Console) -> None:
    old.ok("destroy", "B", "--version", "1", "--yes")
    assert old.ok("verify") == "All 4 versions can be decrypted (1 destroyed)\n"
    assert old.json("verify") == {
        "ok": True,
        "database": str(old.internal),
        "opened": 4,
        "destroyed": 1,
        "problems": [],
    }


def test_verify_names_what_does_not_open_and_exits_1(old: Console) -> None:
    damage(old, "A", 2)
    # A value that is not the one of its wrap is moved here from another version.
    old.sql(
        "update datasette_secrets set encrypted = (select encrypted from "
        "datasette_secrets where name = 'A' and version = 1) "
        "where name = 'B' and version = 1"
    )
    old.sql(
        f"update datasette_secrets set encryption_key_name = '{OTHER_ID}' "
        "where name = 'B' and version = 2"
    )
    found = old.json("verify")
    assert (found["ok"], found["opened"]) == (False, 2)
    assert [
        (each["name"], each["version"], each["code"]) for each in found["problems"]
    ] == [
        ("A", 2, "cannot-open"),
        ("B", 1, "cannot-open"),
        ("B", 2, "unknown-master-key"),
    ]
    result = old.run("verify")
    assert result.exit_code == 1
    assert OTHER_ID in result.stdout


@pytest.mark.parametrize(
    ("row_id", "name", "version"),
    [
        (2, "A", "2"),
        (2, "ODD NAME; echo 'x'", "2"),
        (2, "-y", "2"),
        (2, "line\n", "2"),
        (2, "A", "-1"),
        (2, "A", "2.5"),
        (2, "A", "1e300"),
        (2, "A", "x'32'"),
        (2, "A", "'two words'"),
        (-17, "--actor", "9223372036854775807"),
        (-(2**63), "A", "'two words'"),
    ],
)
def test_the_remedy_can_be_run_as_it_stands(
    old: Console, row_id: int, name: str, version: str
) -> None:
    quoted = name.replace("'", "''")
    old.sql(
        f"update datasette_secrets set id = {row_id}, name = '{quoted}', "
        f"version = {version} where name = 'A' and version = 2"
    )
    damage(old, quoted, version)
    problems = old.json("verify")["problems"]
    # A row that the check of the tables finds as well is named with the same command.
    [command] = {each["remedy"].split(": ")[-1] for each in problems}
    begin, *arguments = shlex.split(command)[1:]
    assert begin == "secrets"
    old.ok(*arguments, "--yes")
    assert old.json("verify")["ok"] is True


# upgrade


@pytest.fixture
def zero_x(console: Console) -> Console:
    """What 0.x stored: three versions, one of them under a key that is lost."""
    with closing(sqlite3.connect(console.internal)) as conn, conn:
        conn.executescript(zero.SCHEMA)
        zero.insert(conn, "A", 1, zero.token(OLD, "A value 1"))
        zero.insert(conn, "A", 2, zero.token(OLD, "A value 2"))
        zero.insert(conn, "LOST", 1, zero.token(OTHER, "lost"))
    console.configure(NEW, OLD)
    return console


def test_what_0x_stored_stops_a_rotation_and_is_upgraded(zero_x: Console) -> None:
    assert "run 'datasette secrets upgrade -c" in zero_x.refused("get", "A")
    assert zero_x.json("status")["needs_upgrade"] == 3
    result = zero_x.run("rotate-key")
    assert result.exit_code == 1
    command = f"datasette secrets upgrade {shlex.join(zero_x.options)}"
    assert f"  {command}\n" in result.stdout
    assert "no version needs" not in result.stdout
    zero_x.run("upgrade", "--yes")
    assert zero_x.ok("get", "A") == "A value 2\n"
    assert zero_x.json("status")["needs_upgrade"] == 1


def test_an_upgrade_lists_what_it_found_and_asks(zero_x: Console) -> None:
    before = zero_x.files()
    result = zero_x.run("upgrade", input="n\n")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"Stored by datasette-secrets 0.x in {zero_x.internal}:",
        "  A version 1",
        "  A version 2",
        "  LOST version 1",
    ]
    assert "Upgrade 3 versions?" in result.stderr
    assert zero_x.files() == before
    result = zero_x.run("upgrade", input="y\n")
    assert result.exit_code == 1
    assert "Upgraded 2 of 3 versions" in result.stdout
    assert "LOST version 1" in result.stdout.split("Upgraded")[1]


def test_a_version_that_0x_stored_twice_is_upgraded_at_the_first_try(
    zero_x: Console,
) -> None:
    with closing(sqlite3.connect(zero_x.internal)) as conn, conn:
        conn.execute("delete from datasette_secrets where name = 'LOST'")
        zero.insert(conn, "A", 2, zero.token(OLD, "A again"))
    assert "Upgraded 3 of 3 versions" in zero_x.ok("upgrade", "--yes")
    assert zero_x.ok("get", "A") == "A value 2\n"


@pytest.mark.parametrize("row_id", ["'1'", "'x'", "1.5", "null"])
@pytest.mark.parametrize("command", ["verify", "rotate-key", "upgrade", "status"])
def test_a_table_whose_ids_are_no_numbers_is_refused_and_ends_no_loop(
    old: Console, command: str, row_id: str
) -> None:
    with closing(sqlite3.connect(old.internal)) as conn, conn:
        [columns] = conn.execute(
            "select group_concat(name) from pragma_table_info('datasette_secrets')"
        ).fetchone()
        conn.executescript(
            f"""
            create table remade as select {columns} from datasette_secrets;
            drop table datasette_secrets;
            create table datasette_secrets ({columns});
            insert into datasette_secrets select * from remade;
            update datasette_secrets set id = {row_id};
            create unique index datasette_secrets_name_version
                on datasette_secrets (name, version);
            """
        )
    result = old.run(command)
    assert result.exit_code == 1
    assert "was not made by this plugin" in result.output


def test_an_upgrade_in_json_lists_what_it_found_before_it_asks(
    zero_x: Console,
) -> None:
    result = zero_x.run("upgrade", "--json", input="n\n")
    assert (result.exit_code, result.stdout) == (1, "")
    listed, _ = result.stderr.split("Upgrade 3 versions?")
    assert listed.count(" version ") == 3
    assert zero_x.run("upgrade", "--json", "--yes").stderr.count(" version ") == 0


def test_an_upgrade_in_json_has_a_documented_shape(zero_x: Console) -> None:
    dry = zero_x.json("upgrade", "--dry-run")
    assert dry["ok"] is False
    assert dry["changed"] == 0
    assert dry["clean_up"] is None
    zero_x.configure(NEW, OLD, OTHER)
    assert zero_x.json("upgrade", "--yes") == {
        "ok": True,
        "database": str(zero_x.internal),
        "dry_run": False,
        "found": [
            {"name": "A", "version": 1},
            {"name": "A", "version": 2},
            {"name": "LOST", "version": 1},
        ],
        "changed": 3,
        "problems": [],
        "clean_up": {"vacuumed": True, "log_emptied": True, "remains": None},
    }
    assert zero_x.ok("upgrade") == "Nothing that datasette-secrets 0.x stored is left\n"
