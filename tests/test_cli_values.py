"""From the shell: set, get, list, history, import, delete, destroy, check …"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from support.console import DATASETTE, Console, plugin, sentence
from support.terminal import Terminal

from datasette_secrets import CheckResult, Secret, envelope, service
from datasette_secrets.cli import output

CREATE = "--create"


@pytest.fixture
async def filled(console: Console) -> Console:
    """Two secrets, of which OPENAI has two versions."""
    await console.fill("OPENAI", versions=2)
    await console.fill("WEATHER")
    return console


# set and get


def test_what_is_piped_in_is_stored_and_printed_unchanged(console: Console) -> None:
    for value in ("simple", "ünï ✓", " spaced ", "two\nlines", "dos\r\nlines", "=#'\""):
        console.ok("set", "A", CREATE, input=value)
        assert console.value("A") == value


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_one_newline_at_the_end_of_a_pipe_is_dropped(
    console: Console, newline: str
) -> None:
    console.ok("set", "A", CREATE, input=f"value{newline}{newline}")
    assert console.value("A") == f"value{newline}"


def test_get_into_set_changes_nothing(console: Console) -> None:
    console.ok("set", "A", CREATE, input="value\n\n")
    console.ok("set", "B", input=console.ok("get", "A"))
    assert console.ok("get", "A") == console.ok("get", "B")


def test_a_value_is_read_from_a_file(console: Console) -> None:
    path = console.folder / "value.txt"
    path.write_bytes(b"from a file\n")
    console.ok("set", "A", CREATE, "--value-file", str(path))
    assert console.ok("get", "A") == "from a file\n"


def test_set_says_which_version_it_stored(filled: Console) -> None:
    assert filled.ok("set", "OPENAI", input="x") == "Stored OPENAI version 3\n"


def test_a_note_is_kept_until_another_is_given(console: Console) -> None:
    console.ok("set", "A", CREATE, "--note", "first", input="1")
    console.ok("set", "A", input="2")
    console.ok("set", "A", "--note", "", input="3")
    versions = console.json("history", "A")["versions"]
    assert [version["note"] for version in versions] == ["", "first", "first"]


def test_a_stale_expected_version_is_refused(filled: Console) -> None:
    said = filled.refused("set", "OPENAI", "--expected-version", "1", input="x")
    assert "is at version 2" in said
    filled.ok("set", "OPENAI", "--expected-version", "2", input="x")
    filled.ok("set", "NEW", "--expected-version", "0", input="x")


def test_the_login_name_is_recorded_unless_an_actor_is_given(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "ada")
    console.ok("set", "A", CREATE, input="1")
    console.ok("set", "A", "--actor", "robot", input="2")
    console.ok("get", "A")
    newest, first = console.json("history", "A")["versions"]
    assert first["created_by"] == "cli:ada"
    assert newest["created_by"] == "robot"
    assert newest["last_used_by"] == "cli:ada"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_the_log_names_the_version_that_was_printed(
    filled: Console, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Another version is stored just before the value is read, or just after."""

    def store_another() -> None:
        filled.sql(
            "insert into datasette_secrets (name, version, encryption_key_name) "
            "values ('OPENAI', 3, '')"
        )

    if moment == "before":
        read = service.get_version

        def read_later(*arguments: Any, **options: Any) -> Any:
            store_another()
            return read(*arguments, **options)

        monkeypatch.setattr(service, "get_version", read_later)
    else:
        write = output.print_value

        def print_and_store(failure: str, value: str | None) -> None:
            write(failure, value)
            store_another()

        monkeypatch.setattr(output, "print_value", print_and_store)
    assert filled.value("OPENAI") == "OPENAI value 2"
    [read_entry] = filled.json("log", "--name", "OPENAI", "--limit", "1")["log"]
    assert (read_entry["action"], read_entry["version"]) == ("get-secret", 2)


def test_the_environment_counts_first_and_a_version_never_comes_from_it(
    filled: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATASETTE_SECRETS_OPENAI", "from the environment")
    assert filled.ok("get", "OPENAI") == "from the environment\n"
    assert filled.ok("get", "OPENAI", "--version", "1") == "OPENAI value 1\n"


def test_an_older_and_a_deleted_version_can_be_printed(filled: Console) -> None:
    filled.ok("delete", "OPENAI", "--yes")
    assert "it was deleted" in filled.refused("get", "OPENAI")
    assert filled.ok("get", "OPENAI", "--version", "2") == "OPENAI value 2\n"


@pytest.mark.parametrize("is_configured", [True, False])
def test_a_key_file_is_not_imported_and_not_shown(
    console: Console, is_configured: bool
) -> None:
    key = ""
    while not key[:-1].isidentifier():
        key = envelope.generate_master_key()
    console.configure(*[key] * is_configured, console.key)
    file = console.folder / "master.key"
    file.write_text(f"{key}\n{key}\n")
    done = console.run("import", str(file), CREATE)
    assert (key[:-1] in done.output) is False
    said = "contains a master key" if is_configured else "not shown"
    assert said in done.stderr
    assert done.exit_code == is_configured
    file.write_text(f"{key},{key}\n")  # as in a variable with two keys
    assert "Line 1 contains a master key" in console.refused(
        "import", str(file), CREATE
    )


def test_a_long_name_is_shown_where_it_is_skipped(console: Console) -> None:
    name = "AZURE_OPENAI_DEPLOYMENT_API_KEY_FOR_EUROPE0"  # 43 characters, valid Base64
    envelope.MasterKey.parse(f"{name}=")
    done = console.run("import", "-", CREATE, input=f"{name}=\nA=1\n")
    assert f"{name} is empty: skipped" in done.stderr
    for each in (name, "azureOpenAiDeploymentApiKeyForEuropeRegion0"):
        envelope.MasterKey.parse(f"{each}=")
        said = console.ok("import", "-", input=f"{each}=1\n")
        assert f"Stored {each} version 1" in said


def test_get_of_what_is_not_there_is_an_error(filled: Console) -> None:
    said = filled.refused("get", "NOTHING")
    assert said == f"There is no secret of that name in {filled.internal}"
    assert "No value of EXAMPLE_SECRET" in filled.refused("get", "EXAMPLE_SECRET")
    assert "has no version 9" in filled.refused("get", "OPENAI", "--version", "9")


def test_a_value_that_cannot_be_printed_costs_one_sentence(filled: Console) -> None:
    with open("/dev/full", "w") as full:
        done = filled.process("get", "OPENAI", stdout=full)
    assert done.returncode == 1
    assert "could not be printed" in sentence(done.stderr)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "it is empty"),
        (b"\n", "it is empty"),
        (b"a\0b", "it contains a NUL character"),
        (b"\xff\xfe", "it is not valid UTF-8"),
        (b"x" * 65_537, "it has 65,537 bytes"),
    ],
)
def test_a_value_that_cannot_be_stored_is_refused(
    filled: Console, value: bytes, reason: str
) -> None:
    assert reason in filled.refused("set", "OPENAI", input=value)
    assert filled.ok("get", "OPENAI") == "OPENAI value 2\n"


def test_a_note_or_a_name_that_cannot_be_stored_is_refused(filled: Console) -> None:
    said = filled.refused("set", "A", "--note", "x" * 101, input="v")
    assert "100 characters" in said
    assert "letters, digits" in filled.refused("set", "A=sk-123", input="v")
    assert "sk-123" not in filled.refused("set", "A=sk-123", input="v")
    assert "reserved" in filled.refused("set", "encryption_key", input="v")
    assert "128 characters" in filled.refused("set", "A" * 129, input="v")


# On a terminal


def test_a_value_is_typed_twice_and_never_shown(console: Console) -> None:
    terminal = Terminal(console, "set", "A", CREATE)
    terminal.until("Value for A")
    terminal.type("typed value")
    terminal.until("Repeat for confirmation")
    terminal.type("typed value")
    assert terminal.end() == 0
    assert "Stored A version 1" in terminal.shown
    assert "typed value" not in terminal.shown
    assert console.ok("get", "A") == "typed value\n"


def test_what_is_typed_differently_the_second_time_is_asked_for_again(
    console: Console,
) -> None:
    terminal = Terminal(console, "set", "A", CREATE)
    for first, second in (("typed", "tyqed"), ("value", "value")):
        terminal.until("Value for A")
        terminal.type(first)
        terminal.until("Repeat for confirmation")
        terminal.shown = ""
        terminal.type(second)
    assert terminal.end() == 0
    assert "typed" not in terminal.shown
    assert console.ok("get", "A") == "value\n"


def test_a_byte_that_is_no_utf_8_is_refused_and_what_was_typed_not_shown(
    console: Console,
) -> None:
    terminal = Terminal(console, "set", "A", CREATE, LC_ALL="C.UTF-8")
    terminal.until("Value for A")
    terminal.type("sk-typed\udcff")
    assert terminal.end() == 1
    assert "it is not valid UTF-8" in terminal.shown
    assert "Traceback" not in terminal.shown
    assert "sk-typed" not in terminal.shown


def test_a_byte_that_is_no_utf_8_in_the_confirmation_shows_nothing_of_the_value(
    console: Console,
) -> None:
    terminal = Terminal(console, "set", "A", CREATE, LC_ALL="C.UTF-8")
    terminal.until("Value for A")
    terminal.type("sk-typed")
    terminal.until("Repeat for confirmation")
    terminal.type("sk-typed\udcff")
    assert terminal.end() == 1
    assert "it is not valid UTF-8" in terminal.shown
    assert "Traceback" not in terminal.shown
    assert "sk-typed" not in terminal.shown


@pytest.mark.parametrize("first_line", ["-----BEGIN PRIVATE KEY-----", "{"])
def test_the_first_of_several_lines_is_not_taken_for_the_value(
    console: Console, first_line: str
) -> None:
    terminal = Terminal(console, "set", "A", CREATE)
    terminal.until("Value for A")
    terminal.type(f"{first_line}\nsecond line")
    assert terminal.end() == 1
    assert "use a pipe or --value-file" in terminal.shown
    assert "second line" not in terminal.shown
    assert "no secret of that name" in console.refused("get", "A")


def test_no_line_of_a_refused_paste_is_shown_or_left_for_the_shell(
    console: Console,
) -> None:
    """More of them than a terminal holds at once."""
    terminal = Terminal(console, "set", "A", CREATE)
    terminal.until("Value for A")
    lines = ["-----BEGIN PRIVATE KEY-----", *["body" * 15] * 300]
    pasting = threading.Thread(target=terminal.type, args=["\n".join(lines)])
    pasting.start()
    assert terminal.end() == 1
    pasting.join(60)
    assert not pasting.is_alive()
    assert "use a pipe or --value-file" in terminal.shown
    assert "body" not in terminal.shown
    assert terminal.left == ""


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colours_are_for_terminals_whose_user_wants_them(
    filled: Console, no_color: str, coloured: bool
) -> None:
    terminal = Terminal(filled, "list", NO_COLOR=no_color, TERM="xterm")
    assert terminal.end() == 0
    assert ("\x1b[" in terminal.shown) == coloured
    assert "\x1b" not in filled.ok("list")


# What is listed


def test_list_has_a_documented_shape_and_no_value(filled: Console) -> None:
    listed = filled.json("list")
    assert listed["ok"] is True
    assert [each["name"] for each in listed["secrets"]] == [
        "EXAMPLE_SECRET",
        "OPENAI",
        "WEATHER",
    ]
    assert set(listed["secrets"][1]) == {
        "name",
        "state",
        "registered",
        "registered_by",
        "description",
        "obtain_url",
        "obtain_label",
        "version",
        "note",
        "key_id",
        "created_at",
        "created_by",
        "updated_at",
        "updated_by",
        "deleted_at",
        "deleted_by",
        "last_used_at",
        "last_used_by",
        "renew_by",
        "checked_at",
        "check",
    }
    assert (listed["secrets"][1]["state"], listed["secrets"][1]["version"]) == (
        "stored",
        2,
    )
    assert "value" not in json.dumps(listed)


def test_history_lists_every_version_and_no_value(filled: Console) -> None:
    filled.ok("destroy", "OPENAI", "--version", "1", "--yes")
    history = filled.json("history", "OPENAI")
    assert (history["ok"], history["name"]) == (True, "OPENAI")
    assert [(each["version"], each["state"]) for each in history["versions"]] == [
        (2, "stored"),
        (1, "destroyed"),
    ]
    assert "value" not in json.dumps(history)
    text = filled.ok("history", "OPENAI")
    assert re.search(r"(?m)^1 +destroyed ", text)
    assert f"Nothing is stored for EXAMPLE_SECRET in {filled.internal}" == (
        filled.refused("history", "EXAMPLE_SECRET")
    )


def test_control_characters_are_escaped(filled: Console) -> None:
    evil = "\x1b[2J\u202e\x07"
    filled.sql(
        "update datasette_secrets set "
        f"note = '{evil}', updated_by = '{evil}', created_by = '{evil}'"
    )
    for command in (["list"], ["history", "OPENAI"], ["list", "--json"]):
        printed = filled.ok(*command)
        assert not set(evil) - {"[", "2", "J"} & set(printed)
        assert "\\x1b[2J\\u202e\\x07" in printed or "\\u001b" in printed


# import


def test_a_env_file_is_read_as_dotenv_reads_it(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME_KEY", "interpolated")
    env = console.folder / ".env"
    env.write_bytes(
        b"\xef\xbb\xbf# a comment\r\n"
        b"PLAIN=plain # with a comment\r\n"
        b"export EXPORTED=exported\r\n"
        b"SINGLE='single # quoted'\r\n"
        b'DOUBLE="tab\\tquoted"\r\n'
        b'LINES="one\r\ntwo"\r\n'
        b"DOLLAR=pa${HOME_KEY}ss\r\n"
        b"HASH=a#b\r\n"
        b"EMPTY=\r\n"
        b"DATASETTE_SECRETS_PREFIXED=prefixed\r\n"
    )
    result = console.run("import", str(env), CREATE)
    assert result.exit_code == 0
    assert "EMPTY is empty: skipped" in result.stderr
    expected = {
        "PLAIN": "plain",
        "EXPORTED": "exported",
        "SINGLE": "single # quoted",
        "DOUBLE": "tab\tquoted",
        "LINES": "one\ntwo",
        "DOLLAR": "pa${HOME_KEY}ss",
        "HASH": "a#b",
        "PREFIXED": "prefixed",
    }
    stored = {row[0] for row in console.sql("select name from datasette_secrets")}
    assert stored == set(expected)
    for name, value in expected.items():
        assert console.ok("get", name) == value + "\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("A=1\n\n\nsk-not-a-line\n", "Line 4 has no '='"),
        ("A=1\nB='sk-open\n", "Line 2 does not parse"),
        ("A=1\nsk-1 23=2\n", "Line 2 does not parse"),
        ("A=1\nsk-name=2\n", "Line 2: A name is made of letters"),
        ("A=1\nsk-x+y/=\n", "Line 2: A name is made of letters"),
        ("A=-----BEGIN PRIVATE KEY-----\nsk-x=\n", "Line 1 cannot be stored"),
        ("A=-----BEGIN PRIVATE KEY-----\nMIIEvQ=\n", "the first of several lines"),
        ("A=1\nB=sk-\0\n", "Line 2 cannot be stored: it contains a NUL character"),
        ("A=1\nB=" + "x" * 65_537, "Line 2 cannot be stored: it has 65,537 bytes"),
        (b"A=1\nB=\xff", "Line 2 cannot be stored: it is not valid UTF-8"),
        ("A=1\nENCRYPTION_KEY=sk-x\n", "Line 2: ENCRYPTION_KEY is reserved"),
        ("A=1\nDATASETTE_SECRETS_ENCRYPTION_KEY=sk-x\n", "is reserved"),
        ("A=1\nOTHER=A-MASTER-KEY\n", "Line 2 contains a master key"),
    ],
)
def test_one_wrong_line_refuses_the_whole_file_and_is_not_repeated(
    filled: Console, content: str | bytes, said: str
) -> None:
    if isinstance(content, str):
        content = content.replace("A-MASTER-KEY", filled.key)
    sentence = filled.refused("import", "-", input=content)
    assert said in sentence
    assert "sk-" not in sentence
    assert filled.key not in sentence
    assert "nothing was stored" in sentence
    assert filled.sql("select count(*) from datasette_secrets") == [(3,)]


def test_of_a_name_given_twice_the_last_value_counts(filled: Console) -> None:
    result = filled.run("import", "-", input="A=1\nB=1\nA=2\nB=\n")
    assert result.stdout == "Stored A version 1\n"
    assert "A is given more than once: the last value is used" in result.stderr
    assert "B is empty: skipped" in result.stderr
    assert filled.ok("get", "A") == "2\n"


def test_skip_existing_leaves_what_is_stored_even_if_it_is_deleted(
    filled: Console,
) -> None:
    filled.ok("delete", "WEATHER", "--yes")
    lines = "OPENAI=x\nWEATHER=x\nNEW=x\n"
    result = filled.run("import", "-", "--skip-existing", input=lines)
    assert result.stdout == "Stored NEW version 1\n"
    assert filled.ok("get", "OPENAI") == "OPENAI value 2\n"
    assert "it was deleted" in filled.refused("get", "WEATHER")


def test_a_dry_run_says_what_an_import_would_do_and_does_not(filled: Console) -> None:
    before = filled.files()
    arguments = ("import", "-", "--skip-existing")
    lines = "OPENAI=x\nNEW=x\nE=\n"
    dry = filled.run(*arguments, "--dry-run", input=lines)
    assert filled.files() == before
    done = filled.run(*arguments, input=lines)
    assert dry.stdout.replace("Would store", "Stored") == done.stdout
    assert dry.stderr == done.stderr


def test_a_private_key_in_quotes_is_imported_whole(console: Console) -> None:
    pem = "-----BEGIN PRIVATE KEY-----\nMIIEvQ+x/=\n-----END PRIVATE KEY-----"
    console.ok("import", "-", CREATE, input=f'A="{pem}"\n')
    assert console.value("A") == pem


def test_an_import_is_one_transaction(filled: Console) -> None:
    filled.sql(
        "create trigger full before insert on datasette_secrets "
        "when new.name = 'B' begin select raise(abort, 'no'); end"
    )
    filled.refused("import", "-", input="A=1\nB=2\n")
    assert filled.sql("select count(*) from datasette_secrets") == [(3,)]


# Taking away and bringing back


def test_a_deleted_secret_reads_as_not_set_until_it_is_restored(
    filled: Console,
) -> None:
    assert filled.ok("delete", "OPENAI", "--yes") == "Deleted OPENAI, at version 2\n"
    said = filled.refused("get", "OPENAI")
    assert "OPENAI: it was deleted. Restore it with 'datasette secrets" in said
    assert f"datasette secrets restore OPENAI {shlex.join(filled.options)}" in said
    assert filled.ok("restore", "OPENAI", "--yes") == "Restored OPENAI version 2\n"
    assert filled.ok("get", "OPENAI") == "OPENAI value 2\n"
    assert filled.ok("restore", "OPENAI") == "OPENAI is not deleted\n"


@pytest.mark.parametrize("name", ["O P", "it's", "'", "a ' b"])
def test_a_command_that_is_named_can_be_pasted(filled: Console, name: str) -> None:
    quoted = name.replace("'", "''")
    filled.sql(f"update datasette_secrets set name = '{quoted}' where name = 'OPENAI'")
    filled.ok("delete", name, "--yes")
    pasted = f"datasette secrets restore {shlex.join([name, *filled.options])}'"
    assert f"Restore it with '{pasted}" in filled.refused("get", name)


def test_rolling_back_makes_a_new_version(filled: Console) -> None:
    said = filled.ok("rollback", "OPENAI", "1", "--yes")
    assert said == "Stored OPENAI version 3, with the value of version 1\n"
    assert filled.ok("get", "OPENAI") == "OPENAI value 1\n"
    assert "has no such version" in filled.refused("rollback", "OPENAI", "9")


def test_destroying_all_but_the_newest_leaves_it(filled: Console) -> None:
    filled.ok("set", "OPENAI", input="newest")
    said = filled.ok("destroy", "OPENAI", "--all-but-newest", "--yes")
    assert said == "Destroyed 2 versions of OPENAI\n"
    assert filled.ok("get", "OPENAI") == "newest\n"
    for version in ("1", "2"):
        filled.refused("get", "OPENAI", "--version", version)
    said = filled.ok("destroy", "OPENAI", "--all-but-newest", "--yes")
    assert said == "Destroyed 0 versions of OPENAI\n"


def test_several_versions_are_destroyed_together_or_not_at_all(
    filled: Console,
) -> None:
    arguments = ("destroy", "OPENAI", "--version", "1", "--version")
    assert "has no such version" in filled.refused(*arguments, "7", "--yes")
    assert filled.ok("get", "OPENAI", "--version", "1") == "OPENAI value 1\n"
    assert filled.ok(*arguments, "2", "--yes") == "Destroyed 2 versions of OPENAI\n"
    for answer in (["--yes"], []):  # nothing to ask
        said = filled.refused("restore", "OPENAI", *answer)
        assert "version 2 was destroyed and cannot be restored" in said
    assert "newest version was destroyed" in filled.refused("get", "OPENAI")


@pytest.mark.parametrize(
    "arguments",
    [
        ("delete", "OPENAI"),
        ("restore", "WEATHER"),
        ("rollback", "OPENAI", "1"),
        ("destroy", "OPENAI", "--version", "1"),
    ],
)
def test_nothing_is_changed_without_the_answer_y(
    filled: Console, arguments: tuple[str, ...]
) -> None:
    filled.ok("delete", "WEATHER", "--yes")
    before = filled.sql("select * from datasette_secrets order by id")
    for answer in ("", "n\n", "\n"):
        result = filled.run(*arguments, input=answer)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert "[y/N]" in result.stderr
        assert result.stderr.endswith("add --yes where nobody can answer\n")
    assert filled.sql("select * from datasette_secrets order by id") == before
    assert filled.run(*arguments, input="y\n").exit_code == 0
    assert filled.sql("select * from datasette_secrets order by id") != before


@pytest.mark.parametrize("typed", ["\u0661", "0", "+1", "1_", "sk-typed"])
def test_what_is_not_a_version_number_is_refused_and_not_repeated(
    filled: Console, typed: str
) -> None:
    said = filled.refused("destroy", "OPENAI", "--version", typed, "--yes", code=2)
    assert said == "Invalid value for '--version': a version is a number: 1, 2, 3 …"
    assert filled.ok("get", "OPENAI", "--version", "1") == "OPENAI value 1\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("delete", "OPENAI"),
        ("restore", "OPENAI"),
        ("rollback", "OPENAI", "1"),
        ("destroy", "OPENAI", "--version", "2"),
        ("destroy", "OPENAI", "--all-but-newest"),
    ],
)
def test_what_was_changed_since_the_question_is_not_acted_on(
    filled: Console, arguments: tuple[str, ...]
) -> None:
    if arguments[0] == "restore":
        filled.ok("delete", "OPENAI", "--yes")
    terminal = Terminal(filled, *arguments)
    terminal.until("[y/N]")
    filled.ok("set", "OPENAI", input="of somebody else")
    before = filled.sql("select * from datasette_secrets order by id")
    terminal.type("y")
    assert terminal.end() == 1
    assert "OPENAI is at version 3" in terminal.shown
    assert filled.sql("select * from datasette_secrets order by id") == before


def test_the_question_says_when_a_version_is_in_use(filled: Console) -> None:
    in_use = filled.run("destroy", "OPENAI", "--version", "2", input="n\n")
    assert "for good (plugins use version 2)?" in in_use.stderr
    old = filled.run("destroy", "OPENAI", "--version", "1", input="n\n")
    assert "plugins use" not in old.stderr


def test_destroy_says_which_other_versions_have_the_value(filled: Console) -> None:
    filled.ok("rollback", "OPENAI", "1", "--yes")
    asked = filled.run("destroy", "OPENAI", "--version", "1", input="n\n").stderr
    assert "Version 3 has the same value" in asked
    both = ("--version", "1", "--version", "3")
    asked = filled.run("destroy", "OPENAI", *both, input="n\n").stderr
    assert "the same value" not in asked
    done = filled.run("destroy", "OPENAI", "--version", "1", "--yes")
    assert (done.exit_code, "Version 3 has the same" in done.stderr) == (0, True)


def test_the_question_says_which_version_is_in_a_row(filled: Console) -> None:
    asked = filled.run("destroy-row", "1", input="n\n").stderr
    [(name, version)] = filled.sql(
        "select name, version from datasette_secrets where id = 1"
    )
    assert f"Destroy row 1 ({name} version {version}) for good?" in asked
    said = filled.ok("destroy-row", "1", "--yes")
    assert said == f"Destroyed row 1 ({name} version {version})\n"
    before = filled.sql("select * from datasette_secrets_log")
    # Again, it only cleans up, as it must after an interruption.
    assert filled.ok("destroy-row", "1", "--yes") == "Destroyed row 1\n"
    assert filled.sql("select * from datasette_secrets_log") == before


def test_destroy_needs_to_know_which_versions(filled: Console) -> None:
    said = filled.refused("destroy", "OPENAI", code=2)
    assert "--all-but-newest" in said
    arguments = ("destroy", "OPENAI", "--version", "1", "--all-but-newest")
    filled.refused(*arguments, code=2)


def test_the_database_can_be_a_named_one(console: Console, tmp_path: Path) -> None:
    data = tmp_path / "data.db"
    console.configure(console.key, database="data")
    console.options = [str(data), "-c", str(console.config)]
    console.ok("set", "A", "--create", input="in data.db")
    assert data.exists()
    assert console.ok("get", "A") == "in data.db\n"
    result = console.run("destroy", "A", "--version", "1", "--yes")
    assert result.exit_code == 0
    assert "--vacuum" in result.stderr
    result = console.run("destroy", "A", "--version", "1", "--yes", "--vacuum")
    assert (result.exit_code, result.stderr) == (0, "")


def test_generate_encryption_key_prints_a_key_and_nothing_else() -> None:
    command = [*DATASETTE, "secrets", "generate-encryption-key"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60
    )
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}=\n", done.stdout)
    assert done.stderr == ""
    done = subprocess.run(
        [*command, "sk-1"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "sk-1" not in done.stderr


# check


@pytest.mark.parametrize(
    ("outcome", "code", "said"),
    [
        ("works", 0, "OPENAI works: the provider said so\n"),
        ("rejected", 1, "OPENAI was rejected: the provider said so\n"),
        ("unknown", 3, "OPENAI could not be checked: the provider said so\n"),
    ],
)
def test_check_says_what_the_check_says(
    filled: Console, outcome: str, code: int, said: str
) -> None:
    given = []

    async def ask(value: str) -> CheckResult:
        given.append(value)
        return CheckResult(outcome, "the provider said so")

    with plugin(register_secrets=lambda: [Secret("OPENAI", check=ask)]):
        result = filled.run("check", "OPENAI", "--actor", "ann")
    assert (result.exit_code, result.stdout, result.stderr) == (code, said, "")
    assert given == [filled.value("OPENAI")]
    [logged] = filled.sql(
        "select actor_id, via, name, version, detail from datasette_secrets_log "
        "where action = 'check-secret'"
    )
    version = filled.json("history", "OPENAI")["versions"][0]["version"]
    assert logged == (
        "ann",
        "shell",
        "OPENAI",
        version,
        f'{{"outcome": "{outcome}"}}',
    )


def test_check_shows_no_value_of_a_check_that_raises(filled: Console) -> None:
    async def ask(value: str) -> bool:
        raise ValueError(value)

    with plugin(register_secrets=lambda: [Secret("OPENAI", check=ask)]):
        result = filled.run("check", "OPENAI")
    assert result.exit_code == 3
    assert result.output == (
        "OPENAI could not be checked: The check failed with ValueError\n"
    )


def test_check_needs_a_check_and_a_value(filled: Console) -> None:
    async def ask(_: str) -> bool:
        raise AssertionError("it was called")

    assert "No plugin registered a check" in filled.refused("check", "OPENAI")
    with plugin(register_secrets=lambda: [Secret("UNSET", check=ask)]):
        assert "has no value to check" in filled.refused("check", "UNSET")
