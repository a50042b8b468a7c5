"""No traceback has a frame whose local variables hold a key or a value.

With `rich` installed, Datasette prints the locals of every frame of an exception. So every
error that the public API raises is raised here, with a value or key at stake, and all
frames are searched, whoever's they are, but those of the tests: every local, what it
prints as, what it contains, and what a function has closed over.
"""

from __future__ import annotations

import ast
import dataclasses
import secrets
import sqlite3
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import datasette as datasette_package
import pytest
from conftest import MakeDatasette
from cryptography.fernet import Fernet
from datasette.app import Datasette
from datasette.database import Database
from datasette.utils import StartupError
from support import decoder
from support.console import plugin
from support.hunt import spellings

import datasette_secrets
from datasette_secrets import (
    Secret,
    SecretsError,
    checks,
    config,
    delete_secret,
    envelope,
    errors,
    get_secret,
    listing,
    rotation,
    service,
    set_secret,
    upgrade,
)
from datasette_secrets.registry import Registered
from datasette_secrets.web.request import Body

TESTS = str(Path(__file__).parent)
# They hold keys and values, and print as nothing. Datasette holds its configuration.
HOLDERS = (
    envelope.MasterKey,
    envelope.Plaintext,
    envelope.KeyRing,
    Body,
    Datasette,
    Database,
)


def contents(thing: Any) -> Iterator[Any]:
    """What an object holds, one level down."""
    if isinstance(thing, HOLDERS):
        return
    if isinstance(thing, dict):
        yield from thing.keys()
        yield from thing.values()
    elif isinstance(thing, (list, tuple, set, frozenset)):
        yield from thing
    elif isinstance(thing, FunctionType):
        for cell in thing.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # an empty cell
                continue
    elif isinstance(thing, BaseException):
        yield from (*thing.args, *vars(thing).values())
    elif not isinstance(thing, type):
        yield from getattr(thing, "__dict__", {}).values()


def shown(thing: Any) -> Iterator[bytes]:
    """`thing` as it would be seen: as text, as bytes, printed."""
    if isinstance(thing, str):
        yield thing.encode("utf-8", "surrogatepass")
    elif isinstance(thing, (bytes, bytearray)):
        yield bytes(thing)
    yield repr(thing).encode("utf-8", "surrogatepass")
    yield str(thing).encode("utf-8", "surrogatepass")


def leaks(error: BaseException | None, *hidden: str | bytes) -> list[str]:
    """The frames and locals in which something hidden is, by name."""
    needles = [needle for secret in hidden for _, needle in spellings(secret)]
    found = []
    while error is not None:
        for frame, line in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename.startswith(TESTS):
                continue
            for name, local in frame.f_locals.items():
                deep = [local, *contents(local)]
                deep += [inner for each in deep[1:] for inner in contents(each)]
                seen = [text for each in deep for text in shown(each)]
                if any(needle in text for needle in needles for text in seen):
                    found.append(f"{name} in {frame.f_code.co_name}, line {line}")
        message = str(error).encode("utf-8", "surrogatepass")
        if any(needle in message for needle in needles):
            found.append("the message")
        error = error.__cause__ or (
            None if error.__suppress_context__ else error.__context__
        )
    return found


async def error_of(call: Callable[[], Awaitable[Any]]) -> BaseException:
    try:
        await call()
    except Exception as error:
        return error
    raise AssertionError("no error")


def new_secret() -> str:
    return secrets.token_urlsafe(30)


class Scene:
    """A Datasette that holds a secret, with all that must not be seen of it."""

    def __init__(self, datasette: Datasette, path: str, key: str, value: str) -> None:
        self.datasette = datasette
        self.path = path
        self.key = key
        self.value = value

    def alter(self, sql: str, *parameters: Any) -> None:
        with closing(sqlite3.connect(self.path)) as conn, conn:
            conn.execute(sql, parameters)

    @property
    def hidden(self) -> list[str | bytes]:
        raw = decoder.master_key(self.key)
        data_keys: list[str | bytes] = []
        for row in decoder.rows(self.path):
            try:
                bound = decoder.context(row["name"], row["version"])
                data_keys.append(decoder.unwrap(raw, bound, row["wrapped_key"]))
            except (decoder.Refused, TypeError):
                continue
        return [self.value, self.key, raw, *data_keys]


@pytest.fixture
async def scene(datasette: Datasette, internal: str, master_key: str) -> Scene:
    value = new_secret()
    await set_secret(datasette, "A", value)
    return Scene(datasette, internal, master_key, value)


DAMAGES = [
    ("update datasette_secrets set encrypted = zeroblob(296)", errors.CannotOpen),
    ("update datasette_secrets set wrapped_key = zeroblob(104)", errors.CannotOpen),
    ("update datasette_secrets set wrapped_key = x'00'", errors.CannotOpen),
    (
        "update datasette_secrets set encryption_key_name = '0123456789abcdef'",
        errors.UnknownMasterKey,
    ),
    (
        "update datasette_secrets set wrapped_key = null, envelope_version = null",
        errors.NeedsUpgrade,
    ),
]


@pytest.mark.parametrize(("damage", "kind"), DAMAGES)
async def test_reading_what_does_not_open(
    scene: Scene, damage: str, kind: type[SecretsError]
) -> None:
    hidden = scene.hidden
    scene.alter(damage)
    for call in (
        lambda: get_secret(scene.datasette, "A", "ann"),
        lambda: service.roll_back(scene.datasette, "A", 1),
    ):
        error = await error_of(call)
        assert type(error) is kind
        assert leaks(error, *hidden) == []


@pytest.mark.parametrize(("damage", "kind"), DAMAGES)
async def test_checking_what_does_not_open(
    scene: Scene, damage: str, kind: type[SecretsError]
) -> None:
    hidden = scene.hidden
    scene.alter(damage)
    with checked():
        error = await error_of(lambda: checks.check_stored(scene.datasette, "A"))
    assert type(error) is kind
    assert leaks(error, *hidden) == []


async def test_checking_a_variable_that_cannot_be_a_value(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = new_secret()
    monkeypatch.setenv("DATASETTE_SECRETS_A", secret * 3_000)
    with checked():
        error = await error_of(lambda: checks.check_stored(scene.datasette, "A"))
    assert type(error) is errors.InvalidSecret
    assert "A cannot be checked: it has" in str(error)
    assert leaks(error, secret, *scene.hidden) == []


async def test_a_check_for_which_there_is_no_thread(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = scene.hidden

    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    error = await error_of(
        lambda: checks.run_check(
            Registered("A", check=ask), envelope.Plaintext.parse(scene.value)
        )
    )
    assert type(error) is RuntimeError
    assert leaks(error, *hidden) == []


async def ask(_: str) -> bool:
    return True


@contextmanager
def checked() -> Iterator[None]:
    """As long as this lasts, a plugin has a check for A."""
    with plugin(register_secrets=lambda: [Secret("A", check=ask)]):
        yield


@pytest.mark.parametrize("odd", ["{}\0", "{}\ud800", "many", "bytes", "list"])
async def test_setting_a_value_that_cannot_be_stored(scene: Scene, odd: str) -> None:
    secret = new_secret()
    value: Any = {
        "many": secret * 3_000,
        "bytes": secret.encode(),
        "list": [secret],
    }.get(odd, odd.format(secret))
    error = await error_of(lambda: set_secret(scene.datasette, "A", value))
    assert type(error) is errors.InvalidSecret
    assert leaks(error, secret, *scene.hidden) == []


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"name": "1A"}, errors.InvalidSecret),
        ({"name": "\ud800"}, errors.InvalidSecret),
        ({"name": "ENCRYPTION_KEY"}, errors.InvalidSecret),
        ({"note": "x" * 101}, errors.InvalidSecret),
        ({"note": 7}, errors.InvalidSecret),
        ({"expected_version": 7}, errors.VersionConflict),
    ],
)
async def test_setting_a_value_that_is_refused(
    scene: Scene, options: dict[str, Any], kind: type[SecretsError]
) -> None:
    secret = new_secret()
    call = {"name": "A", "value": secret, **options}
    error = await error_of(lambda: set_secret(scene.datasette, **call))
    assert type(error) is kind
    assert leaks(error, secret, *scene.hidden) == []


async def test_a_note_that_contains_a_master_key(scene: Scene) -> None:
    secret, note = new_secret(), f"the key is {scene.key}"
    error = await error_of(lambda: set_secret(scene.datasette, "A", secret, note=note))
    assert type(error) is errors.InvalidSecret
    assert leaks(error, secret, *scene.hidden) == []


async def test_setting_a_value_in_a_database_that_fails(scene: Scene) -> None:
    secret, hidden = new_secret(), scene.hidden
    scene.alter("alter table datasette_secrets rename column note to notes")
    for call in (
        lambda: set_secret(scene.datasette, "A", secret),
        lambda: service.roll_back(scene.datasette, "A", 1),
        lambda: delete_secret(scene.datasette, "A"),
        lambda: listing.list_secrets(scene.datasette),
    ):
        error = await error_of(call)
        assert type(error) is errors.DatabaseUnavailable
        assert leaks(error, secret, *hidden) == []


async def test_setting_a_value_that_a_trigger_refuses(scene: Scene) -> None:
    secret, hidden = new_secret(), scene.hidden
    scene.alter(
        "create trigger t before update on datasette_secrets "
        "begin select raise(abort, 'no'); end"
    )
    for call in (
        lambda: rotation.rotate(scene.datasette, new_data_keys=True),
        lambda: delete_secret(scene.datasette, "A"),
    ):
        error = await error_of(call)
        assert type(error) is errors.DatabaseUnavailable
        assert leaks(error, secret, *hidden) == []


async def test_a_write_on_a_closed_datasette(scene: Scene) -> None:
    secret, hidden = new_secret(), scene.hidden
    scene.datasette.close()
    for call in (
        lambda: set_secret(scene.datasette, "A", secret),
        lambda: get_secret(scene.datasette, "A"),
    ):
        assert leaks(await error_of(call), secret, *hidden) == []


async def test_reading_and_writing_without_a_key(
    scene: Scene, make_datasette: MakeDatasette
) -> None:
    secret = new_secret()
    without = make_datasette()
    for call in (
        lambda: get_secret(without, "A"),
        lambda: set_secret(without, "A", secret),
        lambda: rotation.rotate(without),
    ):
        error = await error_of(call)
        assert type(error) is errors.NotConfigured
        assert leaks(error, secret, *scene.hidden) == []


async def test_an_event_that_fails_after_the_value_was_set(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        @datasette_package.hookimpl
        def track_event(self, event: Any) -> None:
            raise ZeroDivisionError

    from datasette.plugins import pm

    secret, failing = new_secret(), Failing()
    pm.register(failing)
    try:
        error = await error_of(lambda: set_secret(scene.datasette, "A", secret))
    finally:
        pm.unregister(failing)
    assert type(error) is ZeroDivisionError
    assert leaks(error, secret, *scene.hidden) == []
    assert await get_secret(scene.datasette, "A") == secret


async def test_a_hook_that_fails_while_a_value_is_set(scene: Scene) -> None:
    class Failing:
        @datasette_package.hookimpl
        def register_secrets(self, datasette: Datasette) -> None:
            raise ZeroDivisionError

    from datasette.plugins import pm

    secret, failing = new_secret(), Failing()
    pm.register(failing)
    try:
        error = await error_of(lambda: set_secret(scene.datasette, "ODD NAME", secret))
    finally:
        pm.unregister(failing)
    assert type(error) is ZeroDivisionError
    assert leaks(error, secret, *scene.hidden) == []


async def test_an_upgrade_that_fails(scene: Scene) -> None:
    value = new_secret()
    scene.alter(
        "insert into datasette_secrets (name, version, encrypted, encryption_key_name)"
        " values ('OLD', 1, ?, 'default')",
        Fernet(scene.key).encrypt(value.encode()),
    )
    scene.alter(
        "create trigger t before update on datasette_secrets "
        "begin select raise(abort, 'no'); end"
    )
    error = await error_of(lambda: upgrade.upgrade(scene.datasette))
    assert type(error) is errors.DatabaseUnavailable
    assert leaks(error, value, *scene.hidden) == []


# Configuration.


def malformed_keys() -> dict[str, str]:
    """Keys that are nearly right: what is wrong must be said without them."""
    good = envelope.generate_master_key()
    return {
        "a character short": good[:-2] + "=",
        "a character long": good[:-1] + "A=",
        "with a space": good[:20] + " " + good[21:],
        "with a character that is no Base64": good[:20] + "$" + good[21:],
        "two in one": good + good,
        "not ASCII": good[:20] + "\u00e9" + good[21:],
    }


@pytest.mark.parametrize("fault", malformed_keys())
@pytest.mark.parametrize(
    "place", ["text", "list", "$env", "$file", "variable", "a second one", "a mapping"]
)
async def test_a_malformed_key_in_the_configuration(
    make_datasette: MakeDatasette,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    fault: str,
    place: str,
) -> None:
    bad, good = malformed_keys()[fault], envelope.generate_master_key()
    tmp_path.joinpath("key").write_text(bad + "\n")
    monkeypatch.setenv("A_KEY", bad)
    if place == "variable":
        monkeypatch.setenv(config.ENV_KEY, f"{good},{bad}")
    lists: dict[str, list[Any]] = {
        "text": [bad],
        "list": [good, bad],
        "$env": [good, {"$env": "A_KEY"}],
        "$file": [{"$file": str(tmp_path / "key")}, good],
        "variable": [],
        "a second one": ["", good],
        "a mapping": [good, {"key": bad}],
    }
    datasette = make_datasette(*lists[place])
    hidden: list[str | bytes] = [bad, good, decoder.master_key(good)]
    calls: list[tuple[Callable[[], Awaitable[Any]], type[Exception]]] = [
        (lambda: get_secret(datasette, "A"), errors.InvalidMasterKey),
        (lambda: set_secret(datasette, "A", "value"), errors.InvalidMasterKey),
        (lambda: datasette.invoke_startup(), StartupError),
    ]
    for call, kind in calls:
        error = await error_of(call)
        assert type(error) is kind
        assert leaks(error, *hidden) == []


async def test_settings_that_make_no_sense(make_datasette: MakeDatasette) -> None:
    key = envelope.generate_master_key()
    for settings in (
        {"encryption-key": key, "encryption_key": key},
        {"encryption-key": key, "database": 7},
        {"encryption-key": key, "database": "nowhere"},
        {"encryption-key": key, "database": "_memory"},
        {"encryption-key": {"$file": f"/nowhere/{'x' * 10}"}},
        [key],
    ):
        datasette = make_datasette()
        datasette.config = {"plugins": {config.PLUGIN: settings}}
        for call in (
            lambda ds=datasette: get_secret(ds, "A"),
            lambda ds=datasette: ds.invoke_startup(),
        ):
            error = await error_of(call)
            assert leaks(error, key, decoder.master_key(key)) == []


def test_the_search_finds_a_local_that_holds_a_value() -> None:
    secret = new_secret()
    datasette_secrets_file = str(Path(datasette_secrets.__file__))

    @dataclasses.dataclass
    class Holder:
        inner: object

    for local in (
        secret,
        secret[:10],
        secret.encode(),
        [secret],
        Holder(Holder(secret)),
        lambda: secret,
    ):
        code = compile("def f(local):\n 1/0", datasette_secrets_file, "exec")
        scope: dict[str, Any] = {}
        exec(code, scope)  # noqa: S102  # a frame that seems to be of the package
        try:
            scope["f"](local)
        except ZeroDivisionError as error:
            assert leaks(error, secret)


def test_every_error_of_the_package_is_raised_by_a_test_above() -> None:
    tested = {
        node.attr
        for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "errors"
    }
    kinds = {
        name
        for name, each in vars(errors).items()
        if isinstance(each, type) and issubclass(each, SecretsError)
    }
    # What is missing is the base, and two that no call of the API raises on its own.
    assert kinds - tested <= {"SecretsError", "CannotUpgrade", "MissingExtra"}
