"""Rows with exactly one fault each: every door refuses each of them with the same error."""

from __future__ import annotations

import importlib.util
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDatasette
from datasette.app import Datasette
from support import decoder

from datasette_secrets import (
    DatabaseUnavailable,
    SecretsError,
    get_secret,
    rotation,
    schema,
    service,
    set_secret,
)

HERE = Path(__file__).parent
CORPUS: dict[str, Any] = json.loads(
    (HERE / "vectors/corpus-v1.json").read_text("utf-8")
)
FAULTS: list[dict[str, Any]] = CORPUS["faults"]
EVERY_FAULT = pytest.mark.parametrize(
    "case", FAULTS, ids=[case["fault"].replace(" ", "-") for case in FAULTS]
)

Row = dict[str, Any]
Store = Callable[[Row], None]


def cell(written: Any) -> Any:
    if isinstance(written, dict) and "blob" in written:
        return bytes.fromhex(written["blob"])
    return written


def insert(path: str, row: Row) -> None:
    """Put one row in the place of all that are there."""
    places = []
    for column, written in row.items():
        as_text = isinstance(written, dict) and "text" in written
        places.append(
            f"cast(x'{written['text']}' as text)" if as_text else f":{column}"
        )
    cells = {
        column: cell(written)
        for column, written in row.items()
        if not (isinstance(written, dict) and "text" in written)
    }
    with closing(sqlite3.connect(path)) as conn, conn:
        conn.execute("delete from datasette_secrets")
        conn.execute(
            f"insert into datasette_secrets ({', '.join(row)}) "
            f"values ({', '.join(places)})",
            cells,
        )


def everything(path: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as conn:
        conn.text_factory = bytes
        return conn.execute("select * from datasette_secrets").fetchall()


@pytest.fixture
async def corpus_datasette(make_datasette: MakeDatasette) -> Datasette:
    datasette = make_datasette(*CORPUS["ring"])
    await datasette.invoke_startup()
    return datasette


@pytest.fixture
def store(corpus_datasette: Datasette, internal: str) -> Iterator[Store]:
    """Puts one row of the corpus into the running instance's database."""
    yield lambda row: insert(internal, row)


async def code_of(awaitable: Any) -> str:
    """The code of the error, or the kind of thing that came back instead."""
    try:
        returned = await awaitable
    except SecretsError as error:
        return error.code
    return f"no error: {type(returned).__name__}"


def test_the_corpus_has_at_least_sixty_faults_none_of_them_twice() -> None:
    rows = {json.dumps(case["row"]) for case in FAULTS}
    names = {case["fault"] for case in FAULTS}
    assert len(rows) == len(names) == len(FAULTS) >= 60
    assert json.dumps(CORPUS["intact"]["row"]) not in rows


def test_the_corpus_is_what_its_script_makes() -> None:
    script = HERE.parent / "scripts/make_corpus.py"
    spec = importlib.util.spec_from_file_location("make_corpus", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (HERE / "vectors/corpus-v1.json").read_text("utf-8") == module.as_text()


async def test_the_intact_row_opens(corpus_datasette: Datasette, store: Store) -> None:
    store(CORPUS["intact"]["row"])
    name = CORPUS["intact"]["row"]["name"]
    assert await get_secret(corpus_datasette, name) == CORPUS["intact"]["value"]
    assert not (await rotation.verify(corpus_datasette)).problems


def test_the_decoder_opens_the_intact_row_and_none_of_the_others() -> None:
    keys = [decoder.master_key(text) for text in CORPUS["ring"]]

    def opens(row: Row) -> bool:
        cells = {column: cell(written) for column, written in row.items()}
        try:
            decoder.open_row(keys, cells["name"], cells["version"], cells)
            return True
        except (decoder.Refused, ValueError, TypeError, AttributeError):
            return False
        except Exception as error:  # struct.error has no public base but this
            assert type(error).__module__ == "struct"
            return False

    assert opens(CORPUS["intact"]["row"])
    # The decoder returns bytes: what is wrong with those two is only their text.
    not_text = {"encrypted: is not UTF-8", "encrypted: is half a surrogate pair"}
    assert {case["fault"] for case in FAULTS if opens(case["row"])} == not_text


@EVERY_FAULT
async def test_each_fault_is_refused_by_every_door_and_mended_by_a_new_value(
    corpus_datasette: Datasette, store: Store, internal: str, case: dict[str, Any]
) -> None:
    store(case["row"])
    before = everything(internal)
    name, version = case["row"]["name"], cell(case["row"]["version"])

    assert await code_of(get_secret(corpus_datasette, name)) == case["error"]

    [problem] = (await rotation.verify(corpus_datasette)).problems
    assert (problem.code, problem.name) == (case["error"], name)

    is_number = type(version) is int and 0 < version < schema.VERSION_MAX
    if is_number:
        rolled = service.roll_back(corpus_datasette, name, version)
        assert await code_of(rolled) == case["error"]

    if is_number:
        resealed = await rotation.rotate(corpus_datasette, new_data_keys=True)
        assert [problem.code for problem in resealed.problems] == [case["error"]]
        assert everything(internal) == before
    else:
        # No version can come after it: the row goes first, by the command that is named.
        [row_id] = re.findall(r"datasette secrets destroy-row (\d+)", problem.remedy)
        for change in (
            rotation.rotate(corpus_datasette, new_data_keys=True),
            set_secret(corpus_datasette, name, "mended"),
        ):
            with pytest.raises(DatabaseUnavailable, match=f"destroy-row {row_id}"):
                await change
        assert everything(internal) == before
        await service.destroy_row(corpus_datasette, int(row_id))
    await set_secret(corpus_datasette, name, "mended")
    assert await get_secret(corpus_datasette, name) == "mended"
