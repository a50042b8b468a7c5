"""What the commands say: examples to paste, suggestions, remedies, tables that fit."""

from __future__ import annotations

import asyncio
import datetime
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from support import documents
from support.console import Console, key_id
from support.forks import Forks
from support.terminal import Terminal

from datasette_secrets import envelope
from datasette_secrets.cli import secrets

CONTEXT = click.Context(secrets, info_name="secrets", **secrets.context_settings)
NAMES = secrets.list_commands(CONTEXT)
TAKE_A_NAME = {
    "history": (),
    "get": (),
    "check": (),
    "note": ("a note",),
    "renew": ("never",),
    "delete": ("--yes",),
    "restore": ("--yes",),
    "rollback": ("1", "--yes"),
    "destroy": ("--all-but-newest", "--yes"),
    "log": (),
}


def help_of(name: str) -> str:
    command = secrets.get_command(CONTEXT, name)
    assert command is not None
    return command.get_help(click.Context(command, info_name=name, parent=CONTEXT))


@pytest.fixture
async def filled(console: Console) -> Console:
    await console.fill("OPENAI_API_KEY", versions=2)
    return console


# Help


@pytest.fixture
async def folder(console: Console, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the examples name."""
    await console.fill("OPENAI_API_KEY", versions=3)
    console.sql("update datasette_secrets set id = 17 where version = 2")
    for name, key in (("first", console.key), ("old", "")):
        (console.folder / f"{name}.key").write_text(key)
    console.configure({"$file": "first.key"}, {"$file": "old.key"})
    (console.folder / ".env").write_text("IMPORTED=value\n")
    return console.folder


def examples(name: str) -> list[str]:
    """The lines of an example, from its first to the last that ends with a backslash."""
    first = r"^  ((?:pass show |\(umask |datasette secrets )[^\\\n]*"
    return re.findall(rf"(?m){first}(?:\\\n[^\\\n]*)*)$", help_of(name))


@pytest.fixture(scope="module")
def datasette(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What starts the program `datasette` in a shell."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks.command
    forks.close()


@pytest.mark.parametrize("name", NAMES)
def test_each_example_can_be_pasted(name: str, folder: Path, datasette: str) -> None:
    env = documents.shell_environment(folder, datasette)
    password_store = folder / "commands" / "pass"
    password_store.write_text("#!/bin/sh\necho sk-1\n")
    password_store.chmod(0o755)
    if name == "key-id":
        (folder / "first.key").rename(folder / "master.key")
    found = examples(name)
    assert any(f"datasette secrets {name}" in each for each in found)
    for example in found:
        assert all(len(line) <= 78 for line in example.split("\n"))
        if name == "check":
            said = "No plugin registered a check"
            example = f"{{ {example} 2>&1 || true; }} | grep '{said}'"
        documents.run(example, folder, env, typed="y\n" if name != "set" else "sk-2")


def test_the_list_of_the_commands_cuts_no_description() -> None:
    _, commands = secrets.get_help(CONTEXT).split("Commands:")
    assert "..." not in commands


def test_h_is_help_unless_datasette_has_it_for_the_host() -> None:
    assert "-h, --help" in secrets.get_help(CONTEXT)
    for name in NAMES:
        opens_a_database = name not in ("generate-encryption-key", "key-id")
        assert ("-h, --help" in help_of(name)) != opens_a_database


def test_create_is_offered_only_where_something_is_stored() -> None:
    offering = {name for name in NAMES if "--create" in help_of(name)}
    assert offering == {"set", "import"}


# Names


@pytest.mark.parametrize("name", TAKE_A_NAME)
def test_a_mistyped_name_is_answered_with_a_similar_one_and_not_repeated(
    filled: Console, name: str
) -> None:
    typed = "OPENAI_KEY"
    arguments = ("--name", typed) if name == "log" else (typed, *TAKE_A_NAME[name])
    assert filled.refused(name, *arguments) == (
        f"There is no secret of that name in {filled.internal}. "
        "Did you mean OPENAI_API_KEY?"
    )


def test_nothing_is_suggested_for_what_resembles_no_name(filled: Console) -> None:
    said = filled.refused("get", "sk-proj-typed-by-mistake")
    assert said == f"There is no secret of that name in {filled.internal}"


def test_a_registered_name_and_another_case_are_suggested(filled: Console) -> None:
    assert "Did you mean EXAMPLE_SECRET?" in filled.refused("get", "EXAMPEL_SECRET")
    assert "Did you mean OPENAI_API_KEY?" in filled.refused("get", "openai_api_key")


def test_set_stores_a_new_name_and_asks_whether_a_similar_one_was_meant(
    filled: Console,
) -> None:
    result = filled.run("set", "OPENAI_KEY", input="value")
    assert (result.exit_code, result.stdout) == (0, "Stored OPENAI_KEY version 1\n")
    assert result.stderr == (
        "There is no secret of that name yet. Did you mean OPENAI_API_KEY?\n"
    )
    assert filled.run("set", "OPENAI_KEY", input="value").stderr == ""


def test_rollback_and_destroy_look_for_the_version_before_they_ask(
    filled: Console,
) -> None:
    for arguments in (("rollback", "7"), ("destroy", "--version", "7")):
        command, *rest = arguments
        said = filled.refused(command, "OPENAI_API_KEY", *rest)
        assert said.startswith("OPENAI_API_KEY has no such version")


# Remedies


def test_remedies_have_the_options_that_were_given(filled: Console) -> None:
    options = shlex.join(filled.options)
    filled.sql("update datasette_secrets set wrapped_key = zeroblob(104) where id = 1")
    filled.configure(envelope.generate_master_key(), filled.key)
    for command in (("verify",), ("rotate-key",)):
        result = filled.run(*command)
        remedy = f"datasette secrets destroy OPENAI_API_KEY --version 1 {options}\n"
        assert remedy in result.stdout
        [problem] = filled.json(*command)["problems"]
        assert problem["remedy"] == (
            "datasette secrets destroy OPENAI_API_KEY --version 1"
        )
    assert f"run 'datasette secrets rotate-key {options}'" in filled.ok("status")


def test_remedies_name_the_files_and_never_the_value_of_a_setting(
    filled: Console,
) -> None:
    filled.use_named_database()
    key = filled.key
    setting = ["-s", "plugins.datasette-secrets.encryption-key", key]
    filled.config.write_text('{"plugins": {"datasette-secrets": {"database": "data"}}}')
    filled.options += [*setting, "-s", "plugins.other.token", "sk-of-another-plugin"]
    said = filled.refused("rollback", "OPENAI_API_KEY", "7")
    assert f"datasette secrets history OPENAI_API_KEY {filled.internal} -c" in said
    assert "encryption-key '…' -s plugins.other.token '…'" in said
    assert key not in said
    assert "sk-of-another-plugin" not in said


def test_commands_that_open_no_database_get_no_options(filled: Console) -> None:
    filled.configure()
    said = filled.refused("set", "A", input="value")
    assert "'datasette secrets generate-encryption-key'" in said


@pytest.mark.parametrize("command", ["status", "verify", "list"])
def test_a_database_that_cannot_be_read_is_named(filled: Console, command: str) -> None:
    filled.internal.write_bytes(b"no database at all " * 100)
    link = filled.folder / "link.db"
    link.symlink_to(filled.internal)
    filled.options[-1] = str(link)
    assert filled.refused(command).startswith(f"{filled.internal}: The database")


# Counts


@pytest.mark.parametrize(
    ("versions", "need", "can", "wraps"),
    [
        (1, "1 version needs", "1 version can be decrypted\n", "wraps 1 version\n"),
        (2, "2 versions need", "All 2 versions can be", "wraps 2 versions\n"),
    ],
)
def test_one_is_singular(
    console: Console, versions: int, need: str, can: str, wraps: str
) -> None:
    asyncio.run(console.fill("A", versions=versions))
    assert wraps in console.ok("status")
    assert console.ok("verify").startswith(can)
    console.configure(envelope.generate_master_key())
    assert f"{need} master key {key_id(console.key)}" in console.run("status").stdout


# Tables


def shown_on_a_terminal(console: Console, *arguments: str) -> list[str]:
    terminal = Terminal(console, *arguments, NO_COLOR="1", COLUMNS="80")
    assert terminal.end() == 0
    return terminal.shown.splitlines()


def test_tables_fit_a_terminal_and_are_whole_in_a_pipe(console: Console) -> None:
    long_name = "A_NAME_THAT_IS_" + "LONG_" * 12
    asyncio.run(console.fill("OPENAI_API_KEY", long_name))
    note = "a note that is too long for the line of a terminal " * 2
    actor = "somebody.with.a.long.name@example.com"
    console.ok("note", "OPENAI_API_KEY", note[:100], "--actor", actor)
    console.ok("note", long_name, note[:100], "--actor", actor)
    for command in (["list"], ["history", long_name], ["log"]):
        lines = shown_on_a_terminal(console, *command)
        assert max(map(len, lines)) <= 80
        assert any("…" in line for line in lines)
        assert any("now" in line for line in lines)
    listed = console.ok("list")
    assert long_name in listed
    assert note[:100].rstrip() in listed
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", listed)


@pytest.mark.parametrize(
    ("passed", "shown"),
    [
        ({"seconds": 5}, "now"),
        ({"minutes": 5}, "5 min ago"),
        ({"hours": 30}, "1 d ago"),
        ({"days": 800}, "2 y ago"),
    ],
)
def test_a_terminal_shows_how_long_ago_something_was(
    filled: Console, passed: dict[str, int], shown: str
) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    at = (now - datetime.timedelta(**passed)).strftime("%Y-%m-%d %H:%M:%S")
    filled.sql(f"update datasette_secrets set updated_at = '{at}'")
    [line] = [line for line in shown_on_a_terminal(filled, "list") if "OPENAI" in line]
    assert shown in line
    assert filled.json("list")["secrets"][1]["updated_at"] == at


def test_a_terminal_shows_a_note_and_a_damaged_time_as_they_are(
    filled: Console,
) -> None:
    note, at = "2026-02-30 10:00:00", "2026-02-31 10:00:00"
    filled.sql(f"update datasette_secrets set note = '{note}', updated_at = '{at}'")
    [line] = [line for line in shown_on_a_terminal(filled, "list") if "OPENAI" in line]
    assert note[:10] in line
    assert at[:10] in line


def test_a_command_that_is_named_gets_the_metadata_as_well(filled: Console) -> None:
    metadata = filled.folder / "metadata.yaml"
    filled.config.rename(metadata)
    filled.options[:2] = ["-m", str(metadata)]
    said = filled.ok("rotate-key")
    assert f"'datasette secrets new-key {shlex.join(filled.options)}'" in said


def test_the_command_that_helps_can_be_pasted_if_there_is_more_than_one_problem(
    filled: Console,
) -> None:
    filled.sql(
        "update datasette_secrets set version = 'x' where id = 1",
        "update datasette_secrets set version = 'y' where id = 2",
    )
    said = filled.refused("note", "OPENAI_API_KEY", "n")
    assert (
        f"'datasette secrets status {shlex.join(filled.options)}' names 1 more" in said
    )
    _, _, command = said.partition("remove it: ")
    assert command == f"datasette secrets destroy-row 1 {shlex.join(filled.options)}"
