"""What a server says at its start: each warning where it is due, and nowhere else."""

from __future__ import annotations

import base64
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from support.console import plugin

from datasette_secrets import (
    DatabaseUnavailable,
    envelope,
    get_secret,
    health,
    inspection,
    set_secret,
)
from datasette_secrets.instance import get_instance

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def named(tmp_path: Path) -> str:
    """The path of a database `named`, with a table of somebody else's."""
    path = str(tmp_path / "named.db")
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("create table t (a)")
    return path


async def test_a_server_on_which_all_is_well_says_nothing(
    make_datasette: MakeDatasette, master_key: str, capsys: Captured
) -> None:
    for _ in range(2):
        datasette = make_datasette(master_key)
        await datasette.invoke_startup()
        await set_secret(datasette, "A", "a value")
    assert capsys.readouterr().err == ""


async def test_versions_whose_key_is_missing_are_counted_by_key(
    make_datasette: MakeDatasette, master_key: str, capsys: Captured
) -> None:
    old = make_datasette(master_key)
    await set_secret(old, "A", "a value")
    await set_secret(old, "A", "another")
    await set_secret(make_datasette(envelope.generate_master_key()), "B", "a value")
    for keys in ([envelope.generate_master_key()], []):
        await make_datasette(*keys).invoke_startup()
        said = capsys.readouterr().err
        key_id = get_instance(old).settings.require_ring().primary.id
        assert f"2 versions need master key {key_id}, which is not" in said
        assert said.count("which is not configured: add it") == 2


async def test_rows_of_0x_are_counted_and_the_command_is_named(
    make_datasette: MakeDatasette, master_key: str, internal: str, capsys: Captured
) -> None:
    await make_datasette(master_key).invoke_startup()
    with closing(sqlite3.connect(internal)) as conn, conn:
        for version in (1, 2, 3):
            conn.execute(
                "insert into datasette_secrets "
                "(name, version, encrypted, encryption_key_name) "
                "values ('A', ?, x'00', 'default')",
                (version,),
            )
    await make_datasette(master_key).invoke_startup()
    said = capsys.readouterr().err
    assert "3 versions were stored by datasette-secrets 0.x" in said
    assert "(A version 1, A version 2, A version 3)" in said
    assert "run 'datasette secrets upgrade'" in said
    assert "versions need" not in said


async def test_a_view_of_the_name_of_the_table_is_said_and_not_read(
    make_datasette: MakeDatasette, master_key: str, named: str, capsys: Captured
) -> None:
    with closing(sqlite3.connect(named)) as conn, conn:
        conn.execute(
            "create view datasette_secrets as with recursive forever(n) as "
            "(select 1 union all select n + 1 from forever) select n from forever"
        )
    datasette = make_datasette(master_key, database="named", files=[named])
    await datasette.invoke_startup()
    said = capsys.readouterr().err
    assert "The view 'datasette_secrets' was not made by this plugin" in said
    assert "; secrets can be read but not changed" in said


async def test_who_may_not_run_sql_across_databases_is_not_warned_of(
    make_datasette: MakeDatasette, master_key: str, named: str
) -> None:
    datasette = make_datasette(
        master_key,
        database="named",
        files=[named],
        crossdb=True,
        config={
            "databases": {
                "named": {"allow_sql": False},
                "_memory": {"allow_sql": False},
            }
        },
    )
    await datasette.invoke_startup()
    assert await health.exposure(datasette) == []


async def test_a_trigger_of_somebody_else_is_said_on_one_line_and_on_the_page(
    make_datasette: MakeDatasette, master_key: str, internal: str, capsys: Captured
) -> None:
    await set_secret(make_datasette(master_key), "A", "a value")
    with closing(sqlite3.connect(internal)) as conn, conn:
        conn.execute(
            'create trigger "forged\n\x1b[2Jline" after update on DATASETTE_secrets '
            "begin select 1; end"
        )
        conn.execute("create table other (a)")
        conn.execute("create trigger another after update on other begin select 1; end")
    datasette = make_datasette(master_key)
    await datasette.invoke_startup()
    [line] = capsys.readouterr().err.splitlines()
    assert r"The trigger 'forged\n\x1b[2Jline' was not made by this plugin" in line
    page = await datasette.client.get(
        "/-/secrets",
        cookies={"ds_actor": datasette.client.actor_cookie({"id": "root"})},
    )
    assert "line&#39; was not made by this plugin" in page.text


async def test_what_a_row_says_for_a_key_id_is_not_repeated(
    make_datasette: MakeDatasette, master_key: str, internal: str, capsys: Captured
) -> None:
    datasette = make_datasette(master_key)
    for name in "ABC":
        await set_secret(datasette, name, "a value")
    with closing(sqlite3.connect(internal)) as conn, conn:
        conn.execute(
            "update datasette_secrets set encryption_key_name = 'forged ' || id"
        )
    await make_datasette(master_key).invoke_startup()
    said = capsys.readouterr().err
    assert "3 versions have no valid key ID: run 'datasette secrets verify'" in said
    assert "forged" not in said


async def test_secrets_that_have_to_be_renewed_are_said_in_one_line(
    make_datasette: MakeDatasette, master_key: str, capsys: Captured
) -> None:
    datasette = make_datasette(master_key)
    for name, renew_by in (("A", "2020-01-02"), ("B", "2020-02-03"), ("C", None)):
        await set_secret(datasette, name, "a value", renew_by=renew_by)
    await set_secret(datasette, "LATER", "a value", renew_by="9999-12-31")
    await make_datasette(master_key).invoke_startup()
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        "datasette-secrets: A has to be renewed by 2020-01-02; "
        "B has to be renewed by 2020-02-03"
    )


@pytest.mark.skipif(
    sqlite3.sqlite_version_info < (3, 33),
    reason="before SQLite 3.33 the check of a table is one of the whole file",
)
async def test_a_start_and_its_check_look_at_no_row_of_another_table(
    make_datasette: MakeDatasette, master_key: str, tmp_path: Path
) -> None:
    steps: dict[str, int] = {}
    statements: list[str] = []

    def prepare_connection(conn: Any, database: str) -> None:
        def step() -> None:
            steps[database] = steps.get(database, 0) + 1

        def count(statement: str) -> None:
            statements.append(statement)
            # Datasette sets and removes one of its own around each query.
            conn.set_progress_handler(step, 1)

        conn.set_trace_callback(count)

    for name, rows in (("small", 1), ("large", 20_000)):
        path = str(tmp_path / f"{name}.db")
        with closing(sqlite3.connect(path)) as conn, conn:
            conn.execute("create table other (a)")
            conn.execute("create index i on other (a)")
            conn.executemany(
                "insert into other values (?)", [(n,) for n in range(rows)]
            )
        await set_secret(
            make_datasette(master_key, database=name, files=[path]), "A", "a value"
        )
        datasette = make_datasette(
            master_key,
            database=name,
            files=[path],
            settings={"num_sql_threads": 1},  # each connection reads the schema
        )
        with plugin(prepare_connection=prepare_connection):
            await datasette.invoke_startup()
            assert await inspection.inspect(get_instance(datasette).db) == []
    assert steps["small"] > 100
    assert steps["large"] == steps["small"]
    # Such a check is one step, however many pages it reads.
    checks = [each for each in statements if "integrity_check" in each]
    assert checks
    assert all("integrity_check(datasette_secrets" in each for each in checks)


async def test_an_immutable_database_is_said_and_can_be_downloaded_by_anyone(
    make_datasette: MakeDatasette, master_key: str, named: str, capsys: Captured
) -> None:
    writing = make_datasette(master_key, database="named", files=[named])
    await set_secret(writing, "A", "a value")
    writing.close()
    options: dict[str, Any] = {"database": "named", "immutables": [named]}
    datasette = make_datasette(master_key, **options)
    await datasette.invoke_startup()
    said = capsys.readouterr().err
    assert "is immutable: they can be read but not changed" in said
    assert "anyone, without signing in, can download the database 'named'" in said
    assert "is immutable" in health.why_read_only(get_instance(datasette))
    assert await get_secret(datasette, "A") == "a value"

    closed = make_datasette(master_key, settings={"allow_download": False}, **options)
    await closed.invoke_startup()
    assert "can download" not in capsys.readouterr().err


async def test_an_internal_database_that_is_attached_as_immutable_is_warned_about(
    make_datasette: MakeDatasette, master_key: str, internal: str
) -> None:
    writing = make_datasette(master_key)
    await set_secret(writing, "A", "a value")
    datasette = make_datasette(
        master_key,
        immutables=[internal],
        config={"databases": {"internal": {"allow_sql": False}}},
    )
    await datasette.invoke_startup()
    warnings = await health.exposure(datasette)
    assert any("can download the database 'internal'" in each for each in warnings)


async def test_a_lock_held_at_the_start_of_a_server_changes_nothing(
    make_datasette: MakeDatasette, master_key: str, named: str, capsys: Captured
) -> None:
    options: dict[str, Any] = {"database": "named", "files": [named]}
    await set_secret(make_datasette(master_key, **options), "A", "a value")
    options["config"] = {"databases": {"named": {"allow_sql": False}}}
    datasette = make_datasette(master_key, **options)
    with closing(sqlite3.connect(named, isolation_level=None)) as conn:
        conn.execute("begin immediate")
        await datasette.invoke_startup()
        conn.execute("commit")
        assert capsys.readouterr().err == ""
        conn.execute("drop table datasette_secrets")
    with pytest.raises(DatabaseUnavailable):
        await get_secret(datasette, "A")


async def test_a_database_that_can_be_changed_is_not_called_read_only(
    make_datasette: MakeDatasette, master_key: str, named: str
) -> None:
    for options in ({}, {"database": "named", "files": [named]}):
        place = get_instance(make_datasette(master_key, **options))
        await set_secret(make_datasette(master_key, **options), "A", "a value")
        assert health.why_read_only(place) == ""


async def test_the_warning_tells_those_who_sign_in_from_everybody(
    make_datasette: MakeDatasette, master_key: str, named: str
) -> None:
    for allowed, who in (
        (True, "anyone, without signing in, can run SQL in the database 'named'"),
        ({"id": "*"}, "anyone who is signed in can run SQL in the database 'named'"),
        ({"id": "ann"}, ""),
    ):
        datasette = make_datasette(
            master_key,
            database="named",
            files=[named],
            config={"databases": {"named": {"allow_sql": allowed}}},
        )
        await datasette.invoke_startup()
        warnings = await health.exposure(datasette)
        assert len(warnings) == bool(who)
        assert "".join(warnings).startswith(who)


async def test_a_damaged_table_does_not_silence_the_warnings(
    make_datasette: MakeDatasette, internal: str, capsys: Captured
) -> None:
    weak = base64.urlsafe_b64encode(b"\0" * 32).decode()
    await set_secret(make_datasette(weak), "A", "a value")
    content = bytearray(Path(internal).read_bytes())
    with closing(sqlite3.connect(internal)) as conn:
        [(size,)] = conn.execute("pragma page_size")
        roots = conn.execute(
            "select rootpage from sqlite_master where tbl_name = 'datasette_secrets'"
        ).fetchall()
    for (page,) in roots:
        content[(page - 1) * size : (page - 1) * size + 8] = b"\xff" * 8
    Path(internal).write_bytes(content)
    capsys.readouterr()
    await make_datasette(weak).invoke_startup()
    said = capsys.readouterr().err
    assert "cannot be read" in said
    assert "is one byte repeated" in said
    await make_datasette().invoke_startup()
    assert "configure their master key instead" in capsys.readouterr().err
