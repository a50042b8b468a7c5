"""The public API against a plain dictionary, by random sequences of calls.

The model knows nothing of keys, rows or SQL: a secret is a list of values, a set of
destroyed numbers and a mark. Rotations, new master keys and restarts must not be visible
in it at all.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from click.testing import CliRunner, Result
from datasette.cli import cli
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support import decoder
from support.faults import datasette_on

from datasette_secrets import (
    InvalidSecret,
    SecretsError,
    VersionConflict,
    changes,
    delete_secret,
    envelope,
    get_secret,
    restore_secret,
    rotation,
    service,
    set_secret,
    store,
)
from datasette_secrets.instance import get_instance

T = TypeVar("T")
NAMES = ("A", "B", "a")

names = st.sampled_from(NAMES)
values = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    min_size=1,
    max_size=300,
)
actors = st.sampled_from([None, "ann", "bob"])
notes = st.none() | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=100
)
numbers = st.integers(-1, 9)


@dataclass
class Model:
    """A secret as people think of it. Versions count from 1."""

    values: list[str] = field(default_factory=list)
    destroyed: set[int] = field(default_factory=set)
    is_deleted: bool = False
    #: The note of each version, empty if it has none.
    notes: list[str] = field(default_factory=list)
    #: The uses of the newest version: the second before, the one after, and the actor.
    uses: list[tuple[str, str, str | None]] = field(default_factory=list)

    @property
    def newest(self) -> int:
        return len(self.values)

    @property
    def value(self) -> str | None:
        if not self.values or self.is_deleted or self.newest in self.destroyed:
            return None
        return self.values[-1]

    def has(self, version: int) -> bool:
        return 1 <= version <= self.newest and version not in self.destroyed

    def add(self, value: str, note: str | None = None) -> None:
        """A new version. Without a note it has that of the version before."""
        if note is None:
            note = self.notes[-1] if self.notes else ""
        self.values.append(value)
        self.notes.append(note)
        self.is_deleted = False
        self.uses.clear()

    def may_be_last_use(self, at: str | None, by: str | None) -> bool:
        """Whether the row may say so: the last second, and an actor of that second."""
        if not self.uses or at is None:
            return not self.uses and at is by is None
        return at >= self.uses[-1][0] and any(
            before <= at <= after and actor == by for before, after, actor in self.uses
        )


class Secrets(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.mkdtemp()
        self.path = str(Path(self.folder, "internal.db"))
        self.keys = [envelope.generate_master_key()]
        self.datasette = datasette_on(self.path, *self.keys)
        self.model = {name: Model() for name in NAMES}

    def teardown(self) -> None:
        self.datasette.close()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(self.folder)

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(call)

    def refuses(
        self, call: Coroutine[Any, Any, Any], error: type[SecretsError]
    ) -> None:
        try:
            self.run(call)
        except error:
            return
        raise AssertionError(f"{error.__name__} was not raised")

    def restart(self, *keys: str) -> None:
        self.datasette.close()
        self.datasette = datasette_on(self.path, *keys)

    # Reading.

    @rule(name=names, actor=actors)
    def get(self, name: str, actor: str | None) -> None:
        before = changes.now()
        found = self.run(self.get_and_settle(name, actor))
        assert (found == self.model[name].value) is True
        if found is not None:
            self.model[name].uses.append((before, changes.now(), actor))

    async def get_and_settle(self, name: str, actor: str | None) -> str | None:
        """Read, and let the writing of the use finish: the read waits 50 ms at most."""
        found = await get_secret(self.datasette, name, actor)
        writing = asyncio.all_tasks() - {asyncio.current_task()}
        if writing:
            _, unfinished = await asyncio.wait(writing, timeout=60)
            assert not unfinished
        return found

    # Changing.

    @rule(name=names, value=values, note=notes, actor=actors)
    def set(self, name: str, value: str, note: str | None, actor: str | None) -> None:
        model = self.model[name]
        version = self.run(
            set_secret(self.datasette, name, value, note=note, actor_id=actor)
        )
        model.add(value, note)
        assert version == model.newest

    @rule(name=names, value=values, expected=numbers)
    def set_expecting(self, name: str, value: str, expected: int) -> None:
        model = self.model[name]
        call = set_secret(self.datasette, name, value, expected_version=expected)
        if expected != model.newest:
            self.refuses(call, VersionConflict)
        else:
            self.run(call)
            model.add(value)

    @rule(name=names, value=st.sampled_from(["", "a\0b", "x" * 65_537, "\ud800"]))
    def set_what_cannot_be_stored(self, name: str, value: str) -> None:
        self.refuses(set_secret(self.datasette, name, value), InvalidSecret)

    @rule(name=names)
    def delete(self, name: str) -> None:
        call = delete_secret(self.datasette, name)
        if not self.model[name].values:
            self.refuses(call, InvalidSecret)
        else:
            assert self.run(call) == self.model[name].newest
            self.model[name].is_deleted = True

    @rule(name=names)
    def restore(self, name: str) -> None:
        model = self.model[name]
        call = restore_secret(self.datasette, name)
        if not model.has(model.newest):
            self.refuses(call, InvalidSecret)
        else:
            self.run(call)
            model.is_deleted = False

    @rule(name=names, version=numbers)
    def roll_back(self, name: str, version: int) -> None:
        model = self.model[name]
        call = service.roll_back(self.datasette, name, version)
        if not model.has(version):
            self.refuses(call, InvalidSecret)
        else:
            assert self.run(call) == model.newest + 1
            model.add(model.values[version - 1], model.notes[version - 1])

    @rule(name=names, versions=st.lists(numbers, max_size=3))
    def destroy(self, name: str, versions: list[int]) -> None:
        model = self.model[name]
        call = service.destroy_versions(self.datasette, name, versions)
        if not all(1 <= version <= model.newest for version in versions):
            self.refuses(call, InvalidSecret)
        else:
            count, _ = self.run(call)
            assert count == len(set(versions) - model.destroyed)
            model.destroyed |= set(versions)

    @rule(name=names, note=notes.filter(lambda note: note is not None))
    def change_note(self, name: str, note: str) -> None:
        call = service.set_details(self.datasette, name, {"note": note})
        if not self.model[name].values:
            self.refuses(call, InvalidSecret)
        else:
            self.run(call)
            self.model[name].notes[-1] = note

    # The same by the commands, each with an instance of its own on the same file.

    def command(self, *arguments: str, stdin: str = "") -> Result:
        result = CliRunner().invoke(
            cli,
            ["secrets", *arguments, "--internal", self.path, "--create"],
            input=stdin,
            env={"DATASETTE_SECRETS_ENCRYPTION_KEY": ",".join(self.keys)},
        )
        assert result.exit_code in (0, 1), arguments
        return result

    @rule(name=names, value=values.filter(lambda value: not value.endswith("\r")))
    def command_set(self, name: str, value: str) -> None:
        assert self.command("set", name, stdin=f"{value}\n").exit_code == 0
        self.model[name].add(value)

    @rule(name=names)
    def command_get(self, name: str) -> None:
        model = self.model[name]
        before = changes.now()
        result = self.command("get", name, "--actor", "ann")
        if model.value is None:
            assert (result.exit_code, result.stdout) == (1, "")
        else:
            assert (result.stdout_bytes.decode() == model.value + "\n") is True
            model.uses.append((before, changes.now(), "ann"))

    @rule(name=names, version=st.integers(1, 9))
    def command_get_version(self, name: str, version: int) -> None:
        model = self.model[name]
        before = changes.now()
        result = self.command("get", name, "--version", str(version), "--actor", "bob")
        if not model.has(version):
            assert (result.exit_code, result.stdout) == (1, "")
        else:
            value = model.values[version - 1]
            assert (result.stdout_bytes.decode() == value + "\n") is True
            if version == model.newest:
                model.uses.append((before, changes.now(), "bob"))

    @rule(name=names)
    def command_delete(self, name: str) -> None:
        model = self.model[name]
        done = self.command("delete", name, "--yes").exit_code == 0
        assert done == bool(model.values)
        model.is_deleted = model.is_deleted or done

    @rule(name=names)
    def command_restore(self, name: str) -> None:
        model = self.model[name]
        done = self.command("restore", name, "--yes").exit_code == 0
        assert done == model.has(model.newest)
        model.is_deleted = model.is_deleted and not done

    @rule(name=names, version=st.integers(1, 9))
    def command_roll_back(self, name: str, version: int) -> None:
        model = self.model[name]
        done = self.command("rollback", name, str(version), "--yes").exit_code == 0
        assert done == model.has(version)
        if done:
            model.add(model.values[version - 1], model.notes[version - 1])

    @rule(name=names)
    def command_destroy_all_but_newest(self, name: str) -> None:
        model = self.model[name]
        result = self.command("destroy", name, "--all-but-newest", "--yes")
        done = result.exit_code == 0
        # Refused where it would leave no value that can be read.
        assert done == model.has(model.newest)
        if done:
            model.destroyed |= set(range(1, model.newest))

    @rule(
        values=st.dictionaries(names, st.from_regex(r"[ -&(-~]{1,40}", fullmatch=True))
    )
    def command_import(self, values: dict[str, str]) -> None:
        lines = "".join(f"{name}='{value}'\n" for name, value in values.items())
        literal = lines.replace("\\", "\\\\")
        assert self.command("import", "-", stdin=literal).exit_code == 0
        for name, value in values.items():
            self.model[name].add(value)

    @rule(options=st.sampled_from([[], ["--new-data-keys"], ["--batch-size", "1"]]))
    def command_rotate(self, options: list[str]) -> None:
        result = self.command("rotate-key", *options)
        has_rows = any(model.values for model in self.model.values())
        assert (result.exit_code == 0) == has_rows

    # What nobody who reads a secret may notice.

    @rule()
    def start_again(self) -> None:
        self.restart(*self.keys)

    @rule(new_data_keys=st.booleans(), batch_size=st.integers(1, 4))
    def rotate(self, new_data_keys: bool, batch_size: int) -> None:
        report = self.run(
            rotation.rotate(
                self.datasette, new_data_keys=new_data_keys, batch_size=batch_size
            )
        )
        assert report.complete
        assert report.census is not None
        if report.census.versions:
            assert set(report.census.counts) == {report.primary}

    @precondition(lambda self: len(self.keys) < 4)
    @rule()
    def put_a_new_key_first(self) -> None:
        self.keys.insert(0, envelope.generate_master_key())
        self.restart(*self.keys)

    @rule()
    def remove_the_keys_that_are_said_to_be_removable(self) -> None:
        removable = self.run(rotation.census(self.datasette)).removable
        self.keys = [
            key
            for key in self.keys
            if decoder.key_id(decoder.master_key(key)) not in removable
        ]
        self.restart(*self.keys)

    # What always holds.

    @invariant()
    def everything_opens_and_every_version_is_there(self) -> None:
        report = self.run(rotation.verify(self.datasette))
        assert report.problems == []
        assert report.opened == sum(
            len(each.values) - len(each.destroyed) for each in self.model.values()
        )
        for name, model in self.model.items():
            history = self.run(store.history(get_instance(self.datasette).db, name))
            assert [each.version for each in history] == list(
                range(model.newest, 0, -1)
            )
            assert {
                each.version for each in history if each.is_destroyed
            } == model.destroyed
            if history:
                assert (history[0].note or "") == model.notes[-1]
                assert history[0].is_deleted == model.is_deleted
                newest = history[0]
                assert model.may_be_last_use(newest.last_used_at, newest.last_used_by)

    @invariant()
    def the_decoder_agrees(self) -> None:
        opened = {
            (row.name, row.version): row.value.decode()
            for row in decoder.open_file(self.path, *self.keys)
        }
        expected = {
            (name, version): value
            for name, model in self.model.items()
            for version, value in enumerate(model.values, 1)
            if version not in model.destroyed
        }
        assert (opened == expected) is True


TestSecrets = Secrets.TestCase
TestSecrets.settings = settings(
    max_examples=10,
    stateful_step_count=25,
    deadline=None,
    # Not "explain", for which hypothesis traces every line that is run.
    phases=[Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
