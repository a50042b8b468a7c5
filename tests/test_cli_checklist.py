"""The checklist of `status`, dates, notes and the change log, from the shell."""

from __future__ import annotations

import asyncio
import datetime
import json
import os

import pytest
from datasette.app import Datasette
from support.console import Console, key_id

from datasette_secrets import envelope


@pytest.fixture
async def filled(console: Console) -> Console:
    await console.fill("A", versions=2)
    await console.fill("B")
    console.internal.chmod(0o600)
    return console


def in_days(days: int) -> str:
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return (today + datetime.timedelta(days)).isoformat()


def codes(console: Console) -> list[str]:
    return [warning["code"] for warning in console.json("status")["warnings"]]


def test_all_is_well_without_a_warning(filled: Console) -> None:
    status = filled.json("status")
    assert (status["ok"], status["problems"], status["warnings"]) == (True, [], [])


def test_a_database_that_others_can_read_is_a_warning(filled: Console) -> None:
    filled.internal.chmod(0o644)
    assert codes(filled) == ["database-mode"]
    assert str(filled.internal) in filled.ok("status")
    filled.internal.chmod(0o640)
    assert codes(filled) == []


def test_an_old_key_is_needed_until_the_rotation_and_not_afterwards(
    filled: Console,
) -> None:
    old = filled.key
    filled.configure(envelope.generate_master_key(), old)
    assert codes(filled) == ["old-key-needed"]
    said = filled.ok("status")
    assert f"the old master key {key_id(old)}: restart every server, then run" in said
    filled.ok("rotate-key")
    assert codes(filled) == ["old-key-unneeded"]


def test_a_date_warns_from_two_weeks_before(filled: Console) -> None:
    filled.ok("renew", "A", in_days(20))
    assert codes(filled) == []
    filled.ok("renew", "A", in_days(3))
    assert codes(filled) == ["due"]
    assert f"A has to be renewed by {in_days(3)}" in filled.ok("status")
    filled.ok("renew", "A", "never")
    assert codes(filled) == []


@pytest.mark.parametrize(("days", "code"), [("0", 0), ("2", 0), ("3", 1), ("400", 1)])
def test_due_within_changes_the_exit_code(
    filled: Console, days: str, code: int
) -> None:
    filled.ok("set", "B", "--renew-by", in_days(3), input="new")
    assert filled.run("status", "--due-within", days).exit_code == code
    filled.ok("set", "B", input="newer")
    assert filled.run("status", "--due-within", days).exit_code == 0


@pytest.mark.parametrize(
    "date", ["2031-02-30", "31.05.2031", "20310531", "2031-W01-1", "sk-typed", "0"]
)
def test_a_date_that_does_not_exist_is_refused_and_not_repeated(
    filled: Console, date: str
) -> None:
    for arguments in (("renew", "A", date), ("set", "A", "--renew-by", date)):
        said = filled.refused(*arguments, code=2, input="value")
        assert "YYYY-MM-DD" in said
        assert "sk-typed" not in said
    assert filled.value("A") == "A value 2"


def test_a_note_changes_alone(filled: Console) -> None:
    filled.ok("note", "A", "ask Anna")
    newest, older = filled.json("history", "A")["versions"]
    assert (newest["version"], newest["note"]) == (2, "ask Anna")
    assert older["note"] != "ask Anna"
    assert filled.value("A") == "A value 2"


def test_the_log_has_what_the_shell_did_newest_first(filled: Console) -> None:
    for arguments in (
        ("note", "A", "a note", "--actor", "anna"),
        ("renew", "A", "2031-05-31"),
        ("rollback", "A", "1", "--yes"),
        ("get", "A"),
        ("delete", "A", "--yes"),
        ("destroy", "A", "--version", "1", "--yes"),
    ):
        filled.ok(*arguments)
    entries = filled.json("log", "--name", "A", "--limit", "6")["log"]
    assert [entry["action"] for entry in entries] == [
        "destroy-secret",
        "delete-secret",
        "get-secret",
        "set-secret",
        "set-renew-by",
        "set-note",
    ]
    assert {entry["via"] for entry in entries} == {"shell"}
    assert entries[-1]["actor_id"] == "anna"
    assert entries[3]["detail"] == {"rolled_back_from": 1}
    shown = filled.ok("log", "--limit", "1")
    assert "destroy-secret" in shown
    assert "delete-secret" not in shown
    assert "A value" not in filled.ok("log")


def test_a_refused_change_leaves_no_entry(filled: Console) -> None:
    before = filled.json("log")["log"]
    filled.refused("note", "A", "x" * 101)
    filled.refused("renew", "MISSING", "never")
    filled.refused("rollback", "A", "9", "--yes")
    assert filled.json("log")["log"] == before


def test_an_overriding_variable_is_a_warning(
    filled: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "DATASETTE_SECRETS_A", "from here")
    assert codes(filled) == ["overridden"]
    assert filled.run("status").exit_code == 0


def said_at_start(console: Console, capsys: pytest.CaptureFixture[str]) -> str:
    config = json.loads(console.config.read_text())
    datasette = Datasette(internal=str(console.internal), config=config)
    capsys.readouterr()
    asyncio.run(datasette.invoke_startup())
    datasette.close()
    return capsys.readouterr().err


def test_what_the_settings_warn_about_and_due_dates_reach_status_and_the_start(
    filled: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    filled.ok("renew", "A", in_days(3))
    filled.configure(filled.key, databse="elsewhere")
    assert {"unknown-option", "due"} <= {*codes(filled)}
    said = said_at_start(filled, capsys)
    for warning in filled.json("status")["warnings"]:
        assert f"datasette-secrets: {warning['message']}\n" in said


def test_a_start_without_a_key_names_the_plugin_once(
    filled: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    filled.configure()
    [line] = [
        line
        for line in said_at_start(filled, capsys).splitlines()
        if "secrets is not configured" in line
    ]
    assert line.startswith("datasette-secrets is not configured")
