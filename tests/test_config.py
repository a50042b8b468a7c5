"""Settings: every way to write a key, and every way to get it wrong."""

from __future__ import annotations

import base64
import os
import pickle
import re
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from conftest import MakeDatasette
from datasette.app import Datasette
from datasette.utils import StartupError

from datasette_secrets import (
    InvalidMasterKey,
    NotConfigured,
    config,
    envelope,
    keyfiles,
    set_secret,
)
from datasette_secrets.instance import get_instance

KEYS = [envelope.generate_master_key() for _ in range(3)]
IDS = [envelope.MasterKey.parse(key).id for key in KEYS]


def load(options: object) -> config.Settings:
    datasette = Datasette(config={"plugins": {"datasette-secrets": options}})
    try:
        return config.load(datasette)
    finally:
        datasette.close()


def ids(settings: config.Settings) -> list[str]:
    assert settings.ring is not None
    return [key.id for key in settings.ring]


@pytest.mark.parametrize("option", ["encryption-key", "encryption_key"])
def test_one_key(option: str) -> None:
    assert ids(load({option: KEYS[0]})) == IDS[:1]


def test_a_list_is_newest_first_and_its_first_is_primary() -> None:
    settings = load({"encryption-key": KEYS})
    assert ids(settings) == IDS
    assert settings.require_ring().primary.id == IDS[0]


def test_keys_from_variables_files_and_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("A_KEY", f"  {KEYS[0]}\n")
    file = tmp_path / "key"
    file.write_text(KEYS[1] + "\n")
    settings = load(
        {"encryption-key": [{"$env": "A_KEY"}, {"$file": str(file)}, KEYS[2]]}
    )
    assert ids(settings) == IDS
    assert "$env A_KEY" in settings.sources[IDS[0]]
    assert f"$file {file}" in settings.sources[IDS[1]]


def test_both_base64_alphabets_are_one_key() -> None:
    key = base64.urlsafe_b64encode(b"\xfb\xff" * 16).decode()
    other = key.replace("-", "+").replace("_", "/")
    assert key != other
    assert ids(load({"encryption-key": key})) == ids(load({"encryption-key": other}))


def test_a_key_that_is_given_twice_is_used_once_with_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ids(load({"encryption-key": [KEYS[0], KEYS[1], KEYS[0]]})) == IDS[:2]
    assert "and is ignored" in capsys.readouterr().err


def test_the_environment_variable_is_read_without_an_option(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(config.ENV_KEY, f"{KEYS[0]}, {KEYS[1]}\n")
    assert ids(load({})) == IDS[:2]


def test_the_option_wins_over_the_environment_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(config.ENV_KEY, KEYS[1])
    assert ids(load({"encryption-key": KEYS[0]})) == IDS[:1]


def test_an_empty_later_entry_is_skipped() -> None:
    assert ids(load({"encryption-key": [KEYS[0], {"$env": "UNSET"}, ""]})) == IDS[:1]


@pytest.mark.parametrize(
    "options, says",
    [
        (None, config.ENV_KEY),
        ({}, config.ENV_KEY),
        ({"encryption-key": ""}, "is empty"),
        ({"encryption-key": []}, "is empty"),
        ({"encryption-key": {"$env": "UNSET_KEY"}}, "UNSET_KEY"),
        ({"encryption-key": [{"$env": "UNSET_KEY"}, {"$env": "OTHER"}]}, "OTHER"),
    ],
)
def test_without_any_key_the_plugin_is_not_configured(
    options: object, says: str
) -> None:
    settings = load(options)
    assert settings.ring is None
    assert says in settings.missing
    with pytest.raises(NotConfigured, match="generate-encryption-key"):
        settings.require_ring()


MALFORMED = {
    "too short": KEYS[0][:-1],
    "too long": KEYS[0] + "A",
    "not base64": "!" * 44,
    "31 bytes": base64.urlsafe_b64encode(bytes(range(31))).decode(),
    "33 bytes": base64.urlsafe_b64encode(bytes(range(33))).decode(),
    "unpadded": KEYS[0].rstrip("="),
    "white space within": KEYS[0][:20] + " " + KEYS[0][21:],
    "not canonical": base64.urlsafe_b64encode(bytes(32)).decode()[:-2] + "B=",
    "not ascii": "é" * 44,
    "of both alphabets": "-_" + "+/" + base64.urlsafe_b64encode(bytes(32)).decode()[4:],
}


@pytest.mark.parametrize("fault", MALFORMED)
@pytest.mark.parametrize("position", [0, 1])
def test_a_malformed_key_is_refused_without_being_shown(
    fault: str, position: int
) -> None:
    keys = [KEYS[1], KEYS[2]]
    keys[position] = MALFORMED[fault]
    with pytest.raises(InvalidMasterKey) as caught:
        load({"encryption-key": keys})
    message = str(caught.value)
    shown = [key for key in [*keys, keys[position][:10]] if key in message]
    assert len(shown) == 0
    assert f"entry {position + 1} of" in message
    assert "generate-encryption-key" in message


@pytest.mark.parametrize(
    "options, says",
    [
        ({"encryption-key": ["", KEYS[0]]}, "entry 1 of encryption-key is empty"),
        ({"encryption-key": [{"$env": "UNSET"}, KEYS[0]]}, "UNSET"),
        ({"encryption-key": KEYS[0], "encryption_key": KEYS[0]}, "both"),
        ({"encryption-key": {"$file": "/no/such/file"}}, "/no/such/file"),
        ({"encryption-key": 12}, "must be text"),
        ({"encryption-key": [{"a": 1, "b": 2}]}, "must be text"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: object, says: str) -> None:
    with pytest.raises(InvalidMasterKey) as caught:
        load(options)
    assert says in str(caught.value)


@pytest.mark.parametrize("options", ["text", {"database": 3}])
def test_settings_of_the_wrong_shape_are_refused(options: object) -> None:
    with pytest.raises(NotConfigured):
        load(options)


@pytest.mark.parametrize("plugins", [["datasette-secrets"], "datasette-secrets"])
def test_plugins_that_are_no_mapping_are_refused(plugins: object) -> None:
    datasette = Datasette()
    datasette.config["plugins"] = plugins
    with pytest.raises(NotConfigured, match="mapping"):
        config.load(datasette)
    assert config.exposed_names(datasette) == []
    datasette.close()


def test_the_variables_that_hold_keys_are_reserved_in_any_case() -> None:
    settings = load(
        {"encryption-key": [KEYS[0], {"$env": "DATASETTE_SECRETS_last_year"}]}
    )
    for name in ("ENCRYPTION_KEY", "old_encryption_key", "LAST_YEAR", "last_year"):
        assert settings.is_reserved(name)
    assert not settings.is_reserved("OPENAI_API_KEY")


@pytest.mark.parametrize(
    "options, says",
    [
        ({"encryption-key": "nonsense"}, "is not a master key"),
        ({"encryption-key": KEYS[0], "database": "elsewhere"}, "not attached"),
        ({"encryption-key": KEYS[0], "database": "_memory"}, "_memory"),
    ],
)
async def test_datasette_does_not_start_with_settings_that_cannot_be_used(
    options: object, says: str
) -> None:
    datasette = Datasette(config={"plugins": {"datasette-secrets": options}})
    with pytest.raises(StartupError, match=says):
        await datasette.invoke_startup()
    datasette.close()


async def test_not_configured_says_so_on_stderr_and_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    datasette = Datasette(
        config={"plugins": {"datasette-secrets": {"encryption-key": {"$env": "NONE"}}}}
    )
    await datasette.invoke_startup()
    assert "NONE" in capsys.readouterr().err
    datasette.close()


async def test_keys_that_rows_need_and_nobody_configured_are_named_at_start(
    make_datasette: MakeDatasette, capsys: pytest.CaptureFixture[str]
) -> None:
    await set_secret(make_datasette(KEYS[0]), "A_NAME", "a value")
    for keys in ([KEYS[1]], []):
        await make_datasette(*keys).invoke_startup()
        assert IDS[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", ["same path", "link to it", "link to its folder", "hard link"]
)
async def test_the_table_is_locked_where_the_internal_file_is_served_as_well(
    make_datasette: MakeDatasette,
    internal: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    await set_secret(make_datasette(KEYS[0]), "A_NAME", "a value")
    served = Path(internal)
    if kind != "same path":
        served = tmp_path / "served" / "internal.db"
        if kind == "link to its folder":
            served.parent.symlink_to(Path(internal).parent)
        else:
            served.parent.mkdir()
            make_link = (
                served.symlink_to if kind == "link to it" else served.hardlink_to
            )
            make_link(internal)
    datasette = make_datasette(KEYS[0], files=[str(served)])
    await datasette.invoke_startup()
    assert "run SQL" in capsys.readouterr().err
    for table in ("datasette_secrets", "datasette_secrets_log"):
        response = await datasette.client.get(
            f"/internal/{table}.json",
            cookies={"ds_actor": datasette.client.actor_cookie({"id": "root"})},
        )
        assert response.status_code == 403


async def test_sql_across_databases_is_warned_of(
    make_datasette: MakeDatasette, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "named.db")
    sqlite3.connect(path).execute("vacuum").connection.close()
    config = {"databases": {"named": {"allow_sql": {"id": "root"}}}}
    for crossdb in (False, True):
        datasette = make_datasette(
            KEYS[0], database="named", files=[path], crossdb=crossdb, config=config
        )
        await datasette.invoke_startup()
        assert ("across databases" in capsys.readouterr().err) is crossdb


def codes(settings: config.Settings) -> list[str]:
    return [code for code, _ in settings.warnings]


def warning(settings: config.Settings) -> str:
    [(_, sentence)] = settings.warnings
    return sentence


def test_usual_settings_warn_of_nothing() -> None:
    assert load({"encryption-key": KEYS, "database": "_internal"}).warnings == ()


def test_an_unknown_option_is_named() -> None:
    settings = load({"encryption-key": KEYS[0], "databse": "secrets"})
    assert codes(settings) == ["unknown-option"]
    assert "databse" in warning(settings)


async def test_an_unknown_option_is_named_at_start(
    make_datasette: MakeDatasette, capsys: pytest.CaptureFixture[str]
) -> None:
    datasette = make_datasette(KEYS[0])
    datasette.config["plugins"]["datasette-secrets"]["databse"] = "secrets"
    await datasette.invoke_startup()
    assert "the option databse is unknown" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["none", *MALFORMED])
def test_a_key_pasted_where_a_name_belongs_is_not_shown(fault: str) -> None:
    pasted = MALFORMED.get(fault, KEYS[0])
    if not pasted.isascii() or "!" in pasted:
        pasted = KEYS[0][:20] + "\u00e9!" + KEYS[0][20:]
    for options in (
        {"encryption-key": {"$env": pasted}},
        {"encryption-key": [{"$env": pasted}, KEYS[1]]},
        {"encryption-key": {"$file": pasted}},
        {"encryption-key": KEYS[1], "database": pasted},
        {"encryption-key": KEYS[1], pasted: "x"},
    ):
        datasette = Datasette(config={"plugins": {"datasette-secrets": options}})
        said = ""
        try:
            settings = config.load(datasette)
            said = f"{settings.missing} {settings.warnings}"
            config.find_database(datasette, settings)
        except (InvalidMasterKey, NotConfigured) as error:
            said += str(error)
        finally:
            datasette.close()
        assert "(not shown" in said
        assert pasted[:10] not in said and pasted[-10:] not in said


@pytest.mark.parametrize("name", ["master.key", "keys/OLD-2.key", "/etc/x/" + "k" * 50])
def test_the_name_of_a_key_file_is_shown(name: str) -> None:
    with pytest.raises(InvalidMasterKey) as caught:
        load({"encryption-key": {"$file": name}})
    assert name in str(caught.value)


@pytest.mark.unix("Windows has no FIFOs and no such devices")
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("fifo", "it is not a regular file"),
        ("/dev/zero", "it has more than 65,536 bytes"),
        ("folder", "it is not a regular file"),
        ("large", "it has more than 65,536 bytes"),
        ("pipe that never ends", "it did not end within 0 seconds"),
    ],
)
def test_a_key_file_that_is_no_file_of_a_key_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, says: str
) -> None:
    monkeypatch.setattr(keyfiles, "_READ_SECONDS", 0)
    reading, writing = os.pipe()
    path = str(tmp_path / "master.key")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "large":
        Path(path).write_text("x" * 65_537)
    else:
        path = {"folder": str(tmp_path), "/dev/zero": kind}.get(
            kind, f"/dev/fd/{reading}"
        )
    try:
        with pytest.raises(InvalidMasterKey) as caught:
            load({"encryption-key": {"$file": path}})
    finally:
        os.close(reading)
        os.close(writing)
    assert str(caught.value) == (
        f"datasette-secrets: encryption-key cannot be read: $file {path}: {says}"
    )


@pytest.mark.unix("Windows has no such pipes")
@pytest.mark.parametrize("is_late", [True, False])
def test_a_key_can_come_through_a_pipe(is_late: bool) -> None:
    """As from `<(pass show master-key)` in a shell."""
    reading, writing = os.pipe()

    def write() -> None:
        for part in (KEYS[0][:20], KEYS[0][20:]):
            os.write(writing, part.encode())
        os.close(writing)

    writer = threading.Timer(0.2 if is_late else 0, write)
    writer.start()
    if not is_late:
        writer.join(60)
    try:
        settings = load({"encryption-key": {"$file": f"/dev/fd/{reading}"}})
    finally:
        writer.join(60)
        os.close(reading)
    assert ids(settings) == [IDS[0]]


@pytest.mark.unix("Windows makes links for administrators alone")
def test_a_link_to_a_key_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "data").write_text(KEYS[0])
    (tmp_path / "master.key").symlink_to(tmp_path / "data")
    path = str(tmp_path / "master.key")
    assert ids(load({"encryption-key": {"$file": path}})) == [IDS[0]]


async def test_an_empty_key_file_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    path.write_text("\n")
    options = {"encryption-key": {"$file": str(path)}}
    datasette = Datasette(config={"plugins": {"datasette-secrets": options}})
    with pytest.raises(StartupError, match=r"master\.key\) is empty"):
        await datasette.invoke_startup()
    datasette.close()


@pytest.mark.unix("Windows has no such modes")
@pytest.mark.parametrize("journal", ["wal", "delete"])
@pytest.mark.parametrize("database", [None, "named"])
async def test_a_new_database_can_be_read_by_its_owner_alone(
    make_datasette: MakeDatasette,
    master_key: str,
    tmp_path: Path,
    database: str | None,
    journal: str,
) -> None:
    umask = os.umask(0o022)
    try:
        named = tmp_path / "named.db"
        with closing(sqlite3.connect(named)) as conn:
            conn.execute("vacuum")  # as `datasette serve named.db --create` does
            conn.execute(f"pragma journal_mode = {journal}").fetchall()
        datasette = make_datasette(master_key, database=database, files=[str(named)])
        await datasette.invoke_startup()
        db = get_instance(datasette).db
        with closing(sqlite3.connect(str(db.path))) as conn:
            conn.execute(f"pragma journal_mode = {journal}").fetchall()
        await set_secret(datasette, "A", "a value")
    finally:
        os.umask(umask)
    files = list(tmp_path.glob(f"{Path(db.path).name}*"))
    assert len(files) == (3 if journal == "wal" else 1)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


@pytest.mark.unix("Windows has no such modes")
async def test_the_mode_of_a_database_that_is_in_use_is_left_alone(
    make_datasette: MakeDatasette, master_key: str, internal: str
) -> None:
    with closing(sqlite3.connect(internal)) as conn:
        conn.execute("create table somebody_elses (a)")
    os.chmod(internal, 0o644)
    await make_datasette(master_key).invoke_startup()
    assert os.stat(internal).st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("mode", "expected"), [(0o600, []), (0o640, []), (0o644, ["key-file-mode"])]
)
def test_a_key_file_that_others_can_read_is_warned_of(
    tmp_path: Path, mode: int, expected: list[str]
) -> None:
    path = tmp_path / "master.key"
    path.write_text(KEYS[0])
    path.chmod(mode)
    assert codes(load({"encryption-key": {"$file": str(path)}})) == expected


def test_the_path_of_a_file_is_shown_although_it_could_be_a_key(tmp_path: Path) -> None:
    folder = tmp_path / "Users/Ada1/Projects/datasette/private/keys/of/this/server"
    folder.mkdir(parents=True)
    path = folder / "master"
    path.touch(mode=0o644)
    entry = {"$file": str(path)}
    with pytest.raises(InvalidMasterKey, match=re.escape(f"{path}) is empty")):
        load({"encryption-key": [entry, KEYS[0]]})
    [_, said] = load({"encryption-key": [KEYS[0], entry]}).warnings[0]
    assert said.endswith(f"run chmod o= {path}")
    path.unlink()
    with pytest.raises(InvalidMasterKey, match="not shown"):
        load({"encryption-key": [entry, KEYS[0]]})


def test_a_key_in_the_command_line_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    option = f"plugins.datasette-secrets.encryption-key={KEYS[0]}"
    monkeypatch.setattr("sys.argv", ["datasette", "-s", option])
    settings = load({"encryption-key": KEYS[0]})
    assert codes(settings) == ["key-in-arguments"]
    assert KEYS[0] not in warning(settings)


def test_a_key_of_equal_bytes_is_warned_of() -> None:
    weak = base64.urlsafe_b64encode(bytes(32)).decode()
    settings = load({"encryption-key": [KEYS[0], weak]})
    assert codes(settings) == ["weak-key"]
    assert weak not in warning(settings)


def test_neither_a_key_nor_a_value_is_pickled() -> None:
    for holder in (
        envelope.MasterKey.parse(KEYS[0]),
        envelope.KeyRing([envelope.MasterKey.parse(KEYS[0])]),
        envelope.Plaintext.parse("a value"),
    ):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError, match="pickled"):
                pickle.dumps(holder, protocol)
