"""From the shell: what cannot be done costs one sentence, changes nothing, leaks nothing."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import traceback
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.console import (
    DATASETTE,
    Console,
    environment,
    key_id,
    plugin,
    sentence,
)

from datasette_secrets import database, envelope, schema
from datasette_secrets.cli import output, prompt, serve
from datasette_secrets.last_used import LastUsedRecorder

#: A command line for each command that opens a database, and what it reads.
COMMANDS = {
    "rotate-key": (("rotate-key",), None),
    "upgrade": (("upgrade", "--yes"), None),
    "status": (("status",), None),
    "verify": (("verify",), None),
    "list": (("list",), None),
    "history": (("history", "OPENAI"), None),
    "set": (("set", "OPENAI"), "value"),
    "get": (("get", "OPENAI"), None),
    "check": (("check", "OPENAI"), None),
    "import": (("import", "-"), "A=1\n"),
    "delete": (("delete", "OPENAI", "--yes"), None),
    "restore": (("restore", "DELETED", "--yes"), None),
    "rollback": (("rollback", "OPENAI", "1", "--yes"), None),
    "destroy": (("destroy", "OPENAI", "--version", "1", "--yes"), None),
    "destroy-row": (("destroy-row", "1", "--yes"), None),
    "note": (("note", "OPENAI", "a note"), None),
    "renew": (("renew", "OPENAI", "2031-05-31"), None),
    "log": (("log",), None),
}
WRITE = (
    "rotate-key",
    "set",
    "import",
    "delete",
    "restore",
    "rollback",
    "destroy",
    "destroy-row",
    "note",
    "renew",
)
EACH = pytest.mark.parametrize(
    ("arguments", "given"), list(COMMANDS.values()), ids=list(COMMANDS)
)
EACH_THAT_WRITES = pytest.mark.parametrize(
    ("arguments", "given"), [COMMANDS[name] for name in WRITE], ids=WRITE
)
Arguments = tuple[str, ...]
CLOSE_STDIN, CLOSE_STDOUT = partial(os.close, 0), partial(os.close, 1)


@pytest.fixture
async def filled(console: Console) -> Console:
    await console.fill("OPENAI", versions=2)
    await console.fill("DELETED")
    console.sql(
        "update datasette_secrets set deleted_at = '2026-01-02 03:04:05' "
        "where name = 'DELETED'"
    )
    return console


def test_every_command_is_tried_here() -> None:
    from datasette_secrets.cli import secrets

    known = set(secrets.list_commands(None))  # type: ignore[arg-type]
    # Those about key files are tried in test_keyfiles.
    about_keys = {"generate-encryption-key", "key-id", "new-key"}
    assert known == COMMANDS.keys() | about_keys


# Which database


@EACH
def test_a_mistyped_path_makes_no_file(
    console: Console, arguments: Arguments, given: str | None
) -> None:
    said = console.refused(*arguments, input=given, code=2)
    assert "--internal names a file that does not exist" in said
    assert os.listdir(console.folder) == ["datasette.yaml"]


@EACH
def test_a_temporary_database_is_refused(
    console: Console, arguments: Arguments, given: str | None
) -> None:
    console.options = ["-c", str(console.config)]
    assert "temporary database" in console.refused(*arguments, input=given)
    console.options += ["--internal", ":memory:", "--create"]
    assert "temporary database" in console.refused(*arguments, input=given)


@EACH
def test_a_file_that_is_no_database_is_refused(
    console: Console, arguments: Arguments, given: str | None
) -> None:
    console.internal.write_bytes(b"no database at all " * 100)
    said = console.refused(*arguments, input=given)
    assert said.endswith("it is not a SQLite database")
    assert console.internal.read_bytes() == b"no database at all " * 100


@EACH
def test_an_argument_that_is_no_file_is_refused_and_not_repeated(
    filled: Console, arguments: Arguments, given: str | None
) -> None:
    before = filled.files()
    for extra in ((), ("--create",)):
        # The argument stands after what the command itself takes.
        said = filled.refused(*arguments, "sk-typed", *extra, input=given, code=2)
        assert "FILES" in said
        assert "sk-typed" not in said
    assert filled.files() == before
    assert not Path("sk-typed").exists()


def test_a_value_as_an_argument_is_refused_with_the_way_that_works(
    filled: Console,
) -> None:
    said = filled.refused("set", "OPENAI", "sk-typed", code=2)
    assert "never taken from the command line" in said
    for way in ("prompt", "pipe", "--value-file"):
        assert way in said


def test_create_makes_the_internal_database_and_named_files(console: Console) -> None:
    console.ok("set", "A", "--create", input="1")
    assert console.internal.exists()
    other = console.folder / "other.sqlite"
    console.ok("set", "A", str(other), "--create", input="1")
    assert other.exists()


def test_create_makes_no_folder(console: Console) -> None:
    console.options[-1] = str(console.folder / "missing" / "internal.db")
    said = console.refused("set", "A", "--create", input="1", code=2)
    assert "in a folder that does not exist" in said
    assert "add --create" not in said
    console.options[-1] = str(console.folder / "internal.database")
    said = console.refused("set", "A", "--create", input="1", code=2)
    assert "must end in .db, .sqlite or .sqlite3" in said
    console.options[-1] = str(console.folder)
    assert "names a folder" in console.refused("set", "A", "--create", code=2)


def test_a_database_that_is_not_attached_is_refused(filled: Console) -> None:
    filled.configure(filled.key, database="elsewhere")
    assert "'elsewhere' is not attached" in filled.refused("list")


# The state it is in


@EACH_THAT_WRITES
def test_a_database_that_stays_locked_is_refused(
    filled: Console, arguments: Arguments, given: str | None
) -> None:
    before = filled.sql("select * from datasette_secrets order by id")
    filled.use_named_database()

    def prepare_connection(conn: sqlite3.Connection) -> None:
        # Less than the five seconds that SQLite waits by itself in Python.
        conn.execute("pragma busy_timeout = 50").fetchall()

    other = sqlite3.connect(filled.internal, isolation_level=None)
    with closing(other), plugin(prepare_connection=prepare_connection):
        other.execute("begin immediate")
        said = filled.refused(*arguments, input=given)
    assert "another process holds its lock" in said
    assert filled.sql("select * from datasette_secrets order by id") == before


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="root may write to what is read-only",
)
@EACH_THAT_WRITES
def test_a_read_only_file_is_refused(
    filled: Console, arguments: Arguments, given: str | None
) -> None:
    filled.configure(envelope.generate_master_key(), filled.key)
    filled.internal.chmod(0o400)
    assert "read-only" in filled.refused(*arguments, input=given)


@EACH_THAT_WRITES
def test_an_immutable_database_is_refused(
    filled: Console, arguments: Arguments, given: str | None
) -> None:
    data = filled.folder / "data.db"
    shutil.copy(filled.internal, data)
    filled.configure(filled.key, database="data")
    filled.options = ["-i", str(data), "-c", str(filled.config)]
    assert "is immutable" in filled.refused(*arguments, input=given)
    assert filled.ok("get", "OPENAI") == "OPENAI value 2\n"


def test_a_full_disk_costs_a_sentence_and_no_secret(filled: Console) -> None:
    [(pages,)] = filled.sql("pragma page_count")
    filled.use_named_database()

    def prepare_connection(conn: sqlite3.Connection) -> None:
        conn.execute(f"pragma max_page_count = {pages + 2}").fetchall()

    lines = "".join(f"A{number}=sk-{'x' * 5000}\n" for number in range(9))
    with plugin(prepare_connection=prepare_connection):
        said = filled.refused("import", "-", input=lines)
    assert "the disk is full: make room" in said
    assert "sk-" not in said
    assert filled.ok("get", "OPENAI") == "OPENAI value 2\n"
    assert "A1" not in filled.ok("list")


# Keys


@EACH
def test_a_malformed_key_is_refused_and_not_shown(
    filled: Console, arguments: Arguments, given: str | None
) -> None:
    filled.configure("sk-no-key")
    said = filled.refused(*arguments, input=given)
    assert "encryption-key is not a master key" in said
    assert "sk-no-key" not in said


@pytest.mark.parametrize(
    "name",
    ["rotate-key", "upgrade", "verify", "set", "get", "import", "rollback"],
)
def test_without_a_key_what_needs_one_says_so(filled: Console, name: str) -> None:
    arguments, given = COMMANDS[name]
    filled.configure()
    said = filled.refused(*arguments, input=given)
    assert "is not configured" in said
    assert "generate-encryption-key" in said


@pytest.mark.parametrize("name", ["list", "history", "delete", "restore", "destroy"])
def test_without_a_key_the_rest_works(filled: Console, name: str) -> None:
    arguments, given = COMMANDS[name]
    filled.configure()
    filled.ok(*arguments, input=given)


def test_a_key_that_is_missing_is_named(filled: Console) -> None:
    filled.configure(envelope.generate_master_key())
    for arguments in (("get", "OPENAI"), ("rollback", "OPENAI", "1", "--yes")):
        assert key_id(filled.key) in filled.refused(*arguments)


# Everything else


@EACH
def test_a_configuration_that_cannot_be_read_is_refused(
    filled: Console, arguments: Arguments, given: str | None
) -> None:
    filled.config.write_text("{: :")
    assert "neither valid JSON nor" in filled.refused(*arguments, input=given)


# Click leaves the configuration open when an option after it is refused.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "arguments",
    [
        ("rollback", "OPENAI", "sk-typed"),
        ("get", "OPENAI", "--version", "sk-typed"),
        ("get", "OPENAI", "--version", "0"),
        ("get", "OPENAI", "--version", str(2**63)),
        ("rollback", "OPENAI", "-1"),
        ("set", ""),
        ("set", "\udcff"),
        ("rotate-key", "--batch-size", "0"),
        ("set", "A", "--value=sk-typed"),
        ("set", "A", "--value-file", "sk-typed"),
        ("set", "A", "-----BEGIN sk-typed"),
        ("set", "A", "--expected-version", "sk-typed"),
        ("set", "A", "--create=sk-typed"),
        ("rotate-key", "--batch-size", "sk-typed"),
        ("list", "-s", "sql_time_limit_ms", "sk-typed"),
        ("list", "--immutable", "sk-typed"),
        ("list", "--metadata", "sk-typed"),
        ("list", "--plugins-dir", "sk-typed"),
        ("sk-typed",),
        ("--sk-typed",),
        ("set", "A", "--get", "/"),
        ("list", "--pdb"),
    ],
)
def test_bad_usage_exits_2_and_repeats_no_value(
    filled: Console, arguments: Arguments
) -> None:
    assert "sk-typed" not in filled.refused(*arguments, code=2)


# Click leaves the configuration open, as above.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("option", ["--config", "--internal"])
def test_a_path_that_is_none_is_not_repeated(filled: Console, option: str) -> None:
    filled.options += [option, "sk-typed"]
    said = filled.refused("list", code=2)
    assert option in said
    assert "exist" in said
    assert "sk-typed" not in said


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_mistyped_option_or_command_is_answered_with_those_there_are(
    filled: Console,
) -> None:
    assert "Did you mean --value-file" in filled.refused("set", "--value-fil", code=2)
    assert "Did you mean" in filled.refused("lst", code=2)


@pytest.mark.parametrize("argument", ["sk-typed", "--sk-typed"])
def test_a_key_is_made_from_nothing_that_was_typed(argument: str) -> None:
    command = [*DATASETTE, "secrets", "generate-encryption-key", argument]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "sk-typed" not in done.stderr
    assert "Traceback" not in done.stderr


# Streams that are full or closed. Where `rich` is installed, a traceback would show what
# was to be printed.


def made_key(**options: Any) -> subprocess.CompletedProcess[str]:
    command = [*DATASETTE, "secrets", "generate-encryption-key"]
    return subprocess.run(
        command, stderr=subprocess.PIPE, text=True, check=False, timeout=60, **options
    )


@pytest.mark.parametrize("name", ["status", "list", "history", "verify", "get", "set"])
def test_what_cannot_be_printed_costs_one_sentence(filled: Console, name: str) -> None:
    arguments, given = COMMANDS[name]
    with open("/dev/full", "w") as full:
        done = filled.process(*arguments, stdout=full, input=given)
    assert done.returncode == 1
    assert "No space left on device" in sentence(done.stderr)


def test_a_change_is_not_denied_because_its_answer_cannot_be_printed(
    filled: Console,
) -> None:
    with open("/dev/full", "w") as full:
        done = filled.process("set", "OPENAI", stdout=full, input="new")
    assert "the change may have been made" in sentence(done.stderr)
    assert "look at 'datasette secrets log -c" in done.stderr
    assert filled.value("OPENAI") == "new"


def test_a_key_id_that_cannot_be_printed_costs_one_sentence(filled: Console) -> None:
    file = filled.folder / "master.key"
    file.write_text(filled.key)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*DATASETTE, "secrets", "key-id", str(file)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 1
    assert sentence(done.stderr).startswith("No key ID: it could not be printed")


def test_a_terminal_that_lacks_a_character_shows_it_escaped(filled: Console) -> None:
    filled.ok("note", "OPENAI", "日本")
    done = filled.process("list", env=environment(PYTHONIOENCODING="latin-1"))
    assert done.returncode == 0
    assert r"\u65e5\u672c" in done.stdout


def test_an_actor_that_is_not_utf_8_is_recorded_as_far_as_it_is(
    filled: Console,
) -> None:
    done = filled.process("get", "OPENAI", "--actor", os.fsdecode(b"a\xff"))
    assert (done.returncode, done.stderr) == (0, "")
    [(actor,)] = filled.sql(
        "select actor_id from datasette_secrets_log order by id desc limit 1"
    )
    assert actor == "a?"


def test_a_key_that_cannot_be_printed_costs_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        done = made_key(stdout=full)
    assert done.returncode == 1
    assert sentence(done.stderr).startswith("No key: it could not be printed")


def test_a_closed_stdout_costs_one_sentence(filled: Console) -> None:
    done = filled.process("get", "OPENAI", stdout=None, preexec_fn=CLOSE_STDOUT)
    assert done.returncode == 1
    assert sentence(done.stderr).endswith("stdout is closed")
    done = made_key(preexec_fn=CLOSE_STDOUT)
    assert done.returncode == 1
    assert sentence(done.stderr).endswith("stdout is closed")
    done = filled.process("list", stdout=None, preexec_fn=CLOSE_STDOUT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("set", "OPENAI"), "stdin is closed"),
        (("import", "-"), "stdin is closed"),
        (("delete", "OPENAI"), "Nothing was changed"),
    ],
)
def test_a_closed_stdin_costs_one_sentence(
    filled: Console, arguments: Arguments, said: str
) -> None:
    done = filled.process(*arguments, preexec_fn=CLOSE_STDIN)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in sentence(done.stderr.removeprefix("Delete OPENAI"))
    assert filled.ok("get", "OPENAI") == "OPENAI value 2\n"


@pytest.mark.parametrize("fault", ["a plugin that fails", "other bytes than UTF-8"])
def test_a_datasette_that_does_not_start_shows_no_key(
    filled: Console, fault: str
) -> None:
    plugins = filled.folder / "plugins"
    plugins.mkdir()
    if fault == "a plugin that fails":
        plugins.joinpath("failing.py").write_text("1 / 0")
        filled.options += ["--plugins-dir", str(plugins)]
    else:
        filled.config.write_bytes(filled.config.read_bytes() + b"# \xff")
    done = filled.process("list")
    assert done.returncode == 1
    assert filled.key[:10] not in sentence(done.stderr)


def test_what_only_concerns_serving_is_accepted_and_ignored(filled: Console) -> None:
    serving = (
        *("--host", "0.0.0.0", "--port", "8999", "--root", "--reload", "--cors"),  # noqa: S104
        *("--uds", "/nowhere", "--ssl-keyfile", "/nowhere", "--ssl-certfile", "/no"),
        *("--template-dir", "/nowhere", "--static", "a:/nowhere", "--secret", "s"),
        *("--inspect-file", "/nowhere", "--default-deny", "--version-note", "n"),
    )
    assert filled.ok("get", "OPENAI", *serving) == "OPENAI value 2\n"


def test_a_command_starts_no_plugin_and_writes_no_catalog(filled: Console) -> None:
    started = []
    with plugin(startup=lambda: started.append(True)):
        for arguments, given in COMMANDS.values():
            filled.run(*arguments, input=given)
    assert not started
    tables = filled.sql("select name from sqlite_master where type = 'table'")
    ours = {"datasette_secrets", "datasette_secrets_log", "_sqlite_migrations"}
    assert {name for (name,) in tables} == ours


@pytest.mark.parametrize("name", ["status", "verify", "list", "history"])
def test_a_command_that_only_looks_changes_no_byte(filled: Console, name: str) -> None:
    before = filled.files()
    filled.run(*COMMANDS[name][0])
    filled.run("rotate-key", "--dry-run")
    filled.run("upgrade", "--dry-run")
    assert filled.files() == before


@pytest.mark.parametrize("name", ["set", "get", "import"])
def test_no_frame_of_an_unforeseen_failure_holds_a_value(
    filled: Console, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `rich` is installed, Datasette prints the locals of each of them."""
    filled.ok("set", "OPENAI", input="sk-typed")

    def break_down(*_: object, **__: object) -> None:
        raise RuntimeError

    for owner, function in (
        (database, "write"),
        (schema, "ensure_migrated"),
        (LastUsedRecorder, "record"),
        (serve, "stop"),
        (prompt, "_parse"),
        (output, "give_up_stdout"),
    ):
        with monkeypatch.context() as broken:
            broken.setattr(owner, function, break_down)
            given = {"set": "sk-typed", "import": "A=sk-typed\n"}.get(name)
            result = filled.run(*COMMANDS[name][0], input=given)
            assert result.exc_info is not None
            for frame, _ in traceback.walk_tb(result.exc_info[2]):
                # The runner holds what it was given as stdin.
                if frame.f_globals["__name__"] != "click.testing":
                    held = [what for what in frame.f_locals.values() if is_held(what)]
                    assert len(held) == 0, frame.f_code.co_name


def is_held(what: object) -> bool:
    return "sk-typed" in repr(what)
