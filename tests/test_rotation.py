"""Rotation: everything re-wrapped, nothing lost, and the report is true."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from datasette.app import Datasette

from datasette_secrets import (
    DatabaseUnavailable,
    changes,
    database,
    envelope,
    get_secret,
    rotation,
    service,
    set_secret,
)
from datasette_secrets.instance import get_instance

OLD, NEW, OTHER = (envelope.generate_master_key() for _ in range(3))
OLD_ID, NEW_ID, OTHER_ID = (
    envelope.MasterKey.parse(key).id for key in (OLD, NEW, OTHER)
)


async def started(make_datasette: MakeDatasette, *keys: str) -> Datasette:
    datasette = make_datasette(*keys)
    await datasette.invoke_startup()
    return datasette


async def fill(datasette: Datasette, names: int = 3, versions: int = 4) -> None:
    for name in range(names):
        for version in range(versions):
            await set_secret(datasette, f"NAME_{name}", f"value {name} {version}")


def rows(path: str, columns: str) -> list[Any]:
    conn = sqlite3.connect(path)
    found = conn.execute(f"select {columns} from datasette_secrets order by id")
    result = found.fetchall()
    conn.close()
    return result


def alter(path: str, *statements: str) -> None:
    conn = sqlite3.connect(path)
    with conn:
        for sql in statements:
            conn.execute(sql)
    conn.close()


async def test_every_version_is_wrapped_by_the_primary_key_and_no_value_is_touched(
    make_datasette: MakeDatasette, internal: str
) -> None:
    await fill(await started(make_datasette, OLD))
    untouched = "id, name, version, encrypted, created_at, updated_at, updated_by, note"
    before = rows(internal, untouched)
    datasette = await started(make_datasette, NEW, OLD)
    report = await rotation.rotate(datasette, batch_size=5)
    assert gc.isenabled()
    assert (report.to_change, report.changed, report.complete) == (12, 12, True)
    assert rows(internal, untouched) == before
    entries = await changes.entries(get_instance(datasette).db)
    [entry] = [each for each in entries if each.action == "rotate-encryption-key"]
    assert entry.detail == {"key_id": NEW_ID, "versions": 12}
    assert {key for (key,) in rows(internal, "encryption_key_name")} == {NEW_ID}
    assert report.census is not None
    assert report.census.removable == [OLD_ID]
    alone = await started(make_datasette, NEW)
    assert await get_secret(alone, "NAME_2") == "value 2 3"


async def test_new_data_keys_change_every_value_once(
    make_datasette: MakeDatasette, internal: str
) -> None:
    await fill(await started(make_datasette, OLD))
    before = rows(internal, "encrypted")
    both = await started(make_datasette, NEW, OLD)
    report = await rotation.rotate(both, new_data_keys=True, batch_size=5)
    assert (report.changed, report.complete) == (12, True)
    after = rows(internal, "encrypted")
    assert len(set(before) & set(after)) == 0
    assert (await rotation.verify(both)).opened == 12
    assert await get_secret(both, "NAME_0") == "value 0 3"


async def test_a_second_rotation_finds_everything_current_and_still_cleans_up(
    make_datasette: MakeDatasette,
) -> None:
    await fill(await started(make_datasette, OLD))
    both = await started(make_datasette, NEW, OLD)
    await rotation.rotate(both)
    report = await rotation.rotate(both)
    assert (report.to_change, report.current, report.changed) == (0, 12, 0)
    assert report.complete
    assert report.clean_up is not None


async def test_deleted_versions_are_rotated_and_destroyed_ones_need_no_key(
    make_datasette: MakeDatasette, internal: str
) -> None:
    old = await started(make_datasette, OLD)
    await fill(old, names=2, versions=2)
    await service.delete_secret(old, "NAME_0")
    await service.destroy_versions(old, "NAME_1", [1])
    report = await rotation.rotate(await started(make_datasette, NEW, OLD))
    assert (report.changed, report.complete) == (3, True)
    assert report.census is not None
    assert report.census.counts == {NEW_ID: 3}


async def test_fewer_rows_are_rewritten_at_once_with_their_values(
    make_datasette: MakeDatasette, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(await started(make_datasette, OLD))
    both = await started(make_datasette, NEW, OLD)
    monkeypatch.setattr(rotation, "_BATCH_SIZE_WITH_VALUES", 5)
    steps: list[int] = []
    await rotation.rotate(both, progress=steps.append)
    assert steps == [12, 12]
    steps.clear()
    await rotation.rotate(both, new_data_keys=True, progress=steps.append)
    assert steps == [5, 5, 2] * 2


async def test_a_dry_run_counts_and_changes_nothing(
    make_datasette: MakeDatasette, internal: str
) -> None:
    await fill(await started(make_datasette, OLD))
    before = rows(internal, "*")
    report = await rotation.rotate(
        await started(make_datasette, NEW, OLD), dry_run=True
    )
    assert (report.to_change, report.changed, report.problems) == (12, 0, [])
    assert rows(internal, "*") == before


FAULTS = {
    "needs another key": ("unknown-master-key", OTHER_ID),
    "damaged": ("cannot-open", "destroy NAME_1 --version 2"),
    "moved": ("cannot-open", "destroy NAME_1 --version 2"),
    "written by 0.x": ("needs-upgrade", "upgrade"),
}


async def break_one(make_datasette: MakeDatasette, internal: str, fault: str) -> None:
    """Break NAME_1 version 2."""
    where = "where name = 'NAME_1' and version = 2"
    if fault == "needs another key":
        alter(
            internal,
            f"update datasette_secrets set encryption_key_name = '{OTHER_ID}' {where}",
        )
    elif fault == "damaged":
        alter(
            internal,
            f"update datasette_secrets set wrapped_key = randomblob(104) {where}",
        )
    elif fault == "moved":
        alter(
            internal,
            "update datasette_secrets set wrapped_key = "
            f"(select wrapped_key from datasette_secrets where id = 1) {where}",
        )
    else:
        alter(
            internal,
            "update datasette_secrets set wrapped_key = null, envelope_version = null, "
            f"encryption_key_name = 'default' {where}",
        )


@pytest.mark.parametrize("fault", FAULTS)
async def test_one_row_that_does_not_open_stops_the_rotation_before_it_begins(
    make_datasette: MakeDatasette, internal: str, fault: str
) -> None:
    await fill(await started(make_datasette, OLD))
    await break_one(make_datasette, internal, fault)
    before = rows(internal, "*")
    both = await started(make_datasette, NEW, OLD)
    report = await rotation.rotate(both)
    assert not report.complete
    [problem] = report.problems
    code, says = FAULTS[fault]
    assert (problem.name, problem.code) == ("NAME_1", code)
    assert says in f"{problem.message} {problem.remedy}"
    assert rows(internal, "*") == before


@pytest.mark.parametrize("skip_unopenable", [False, True])
async def test_a_version_that_is_no_number_stops_the_rotation_before_it_begins(
    make_datasette: MakeDatasette, internal: str, skip_unopenable: bool
) -> None:
    await fill(await started(make_datasette, OLD))
    alter(
        internal,
        "update datasette_secrets set version = 'two' "
        "where name = 'NAME_1' and version = 2",
    )
    before = rows(internal, "*")
    both = await started(make_datasette, NEW, OLD)
    with pytest.raises(DatabaseUnavailable, match="destroy-row 6"):
        await rotation.rotate(both, skip_unopenable=skip_unopenable)
    assert rows(internal, "*") == before
    [problem] = (await rotation.verify(both)).problems
    assert (problem.name, problem.code) == ("NAME_1", "cannot-open")
    assert problem.remedy == "datasette secrets destroy-row 6"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("new_data_keys", [False, True])
async def test_skipping_what_does_not_open_rotates_the_rest_and_lists_it(
    make_datasette: MakeDatasette, internal: str, fault: str, new_data_keys: bool
) -> None:
    await fill(await started(make_datasette, OLD))
    await break_one(make_datasette, internal, fault)
    both = await started(make_datasette, NEW, OLD)
    report = await rotation.rotate(
        both, skip_unopenable=True, new_data_keys=new_data_keys, batch_size=4
    )
    assert (report.changed, report.complete) == (11, False)
    assert [problem.code for problem in report.problems] == [FAULTS[fault][0]]
    assert (await rotation.verify(both)).opened == 11


async def test_while_rows_of_0x_are_left_no_old_key_is_called_removable(
    make_datasette: MakeDatasette, internal: str
) -> None:
    await fill(await started(make_datasette, OLD))
    await break_one(make_datasette, internal, "written by 0.x")
    both = await started(make_datasette, NEW, OLD)
    report = await rotation.rotate(both, skip_unopenable=True)
    assert report.census is not None
    assert (report.census.legacy, report.census.removable) == (1, [])


async def test_what_a_server_with_the_old_key_writes_meanwhile_is_rotated_too(
    make_datasette: MakeDatasette,
) -> None:
    server = await started(make_datasette, OLD, NEW)
    await fill(server, names=5, versions=20)
    both = await started(make_datasette, NEW, OLD)
    writing = True

    async def write() -> int:
        count = 0
        while writing:
            await set_secret(server, "BUSY", f"value {count}")
            count += 1
        return count

    writer = asyncio.ensure_future(write())
    # The first batches are read while the server writes; then it stops.
    seen = 0

    def progress(rows: int) -> None:
        nonlocal seen, writing
        seen += rows
        if seen > 150:
            writing = False

    report = await rotation.rotate(both, batch_size=10, progress=progress)
    written = await writer
    assert report.complete
    census = await rotation.census(both)
    # One write may have been under way when the rotation had counted for the last time.
    assert census.counts.get(OLD_ID, 0) <= 1
    assert census.versions == 100 + written
    assert (await rotation.verify(both)).opened == 100 + written


@pytest.mark.parametrize("new_data_keys", [False, True])
async def test_two_rotations_at_once_both_finish_and_lose_nothing(
    make_datasette: MakeDatasette, new_data_keys: bool
) -> None:
    await fill(await started(make_datasette, OLD), names=10, versions=20)
    both = [await started(make_datasette, NEW, OLD) for _ in range(2)]
    reports = await asyncio.gather(
        *(
            rotation.rotate(each, batch_size=7, new_data_keys=new_data_keys)
            for each in both
        )
    )
    assert [report.complete for report in reports] == [True, True]
    assert (await rotation.verify(both[0])).opened == 200


async def test_a_row_that_verify_does_not_find_is_a_problem(
    make_datasette: MakeDatasette, internal: str
) -> None:
    await fill(make_datasette(OLD), names=1, versions=3)
    with closing(sqlite3.connect(internal)) as conn:
        [(size,)] = conn.execute("pragma page_size")
        [(root,)] = conn.execute(
            "select rootpage from sqlite_master where name = 'datasette_secrets'"
        )
    content = bytearray(Path(internal).read_bytes())
    page = (root - 1) * size
    # The cell of the second row: its size in two bytes, its id, its columns.
    cell = page + int.from_bytes(content[page + 10 : page + 12], "big")
    assert (content[page], content[cell + 2]) == (0x0D, 2)
    content[cell + 2] = 9  # so that a search for what follows 9 misses the third row
    Path(internal).write_bytes(content)
    found = await rotation.verify(make_datasette(OLD), batch_size=1)
    [problem] = found.problems
    assert (found.opened, problem.code) == (2, "damaged")
    assert problem.message == "1 rows with a value were not found by their ids"
    assert problem.remedy == "restore the database from a backup"


async def test_verify_opens_every_value_and_names_what_does_not_open(
    make_datasette: MakeDatasette, internal: str
) -> None:
    datasette = await started(make_datasette, OLD)
    await fill(datasette)
    await service.destroy_versions(datasette, "NAME_0", [1])
    alter(
        internal,
        "update datasette_secrets set encrypted = randomblob(length(encrypted)) "
        "where name = 'NAME_2' and version = 3",
    )
    found = await rotation.verify(datasette, batch_size=3)
    assert (found.opened, found.destroyed) == (10, 1)
    assert [(each.name, each.version) for each in found.problems] == [("NAME_2", 3)]


async def test_the_census_opens_nothing_and_names_keys_that_are_not_in_the_ring(
    make_datasette: MakeDatasette, internal: str
) -> None:
    await fill(await started(make_datasette, OLD))
    alter(
        internal,
        f"update datasette_secrets set encryption_key_name = '{OTHER_ID}' where id < 4",
    )
    alter(
        internal, "update datasette_secrets set encrypted = x'00', wrapped_key = x'00'"
    )
    census = await rotation.census(await started(make_datasette, NEW, OLD))
    assert census.counts == {OLD_ID: 9, OTHER_ID: 3}
    assert census.missing == [OTHER_ID]
    assert census.removable == []
    assert census.versions == 12


async def test_no_key_is_removable_where_nothing_is_stored(
    make_datasette: MakeDatasette,
) -> None:
    census = await rotation.census(await started(make_datasette, NEW, OLD))
    assert (census.versions, census.removable) == (0, [])


async def test_nothing_of_old_wraps_is_left_in_the_files(
    make_datasette: MakeDatasette, internal: str
) -> None:
    old = await started(make_datasette, OLD)
    await fill(old, names=30)
    wraps = [wrap for (wrap,) in rows(internal, "wrapped_key")]
    old.close()
    both = await started(make_datasette, NEW, OLD)
    report = await rotation.rotate(both)
    assert report.clean_up == database.CleanUp(vacuumed=True, log_emptied=True)
    both.close()
    with open(internal, "rb") as file:
        content = file.read()
    assert sum(wrap in content for wrap in wraps) == 0
