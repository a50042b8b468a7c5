"""Times the list of secrets beside Datasette's own page of the same table, 10,000 secrets.

Both are asked over HTTP by one client, in turn, and show as many rows; the table is a copy
in a database that people can browse, since the original is not to be looked at. Printed
are the medians and their ratio: above 1, the list is the slower one.

    python scripts/benchmarks/pages.py [SECRETS]
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from datasette.app import Datasette

from datasette_secrets import set_secret
from datasette_secrets.envelope import generate_master_key
from datasette_secrets.instance import get_instance
from datasette_secrets.web.secrets import PAGE_SIZE

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support.serving import served

ROUNDS = 40


async def build(folder: Path, secrets: int) -> Datasette:
    """An instance with that many secrets, and a browsable copy of their table."""
    internal, copy = folder / "internal.db", folder / "copy.db"
    settings = {"encryption-key": generate_master_key()}
    config = {"plugins": {"datasette-secrets": settings}}
    writer = Datasette(internal=str(internal), config=config)
    await writer.invoke_startup()
    await set_secret(writer, "KEY", "a value", note="the first", actor_id="root")
    writer.close()
    with contextlib.closing(sqlite3.connect(internal)) as conn, conn:
        conn.execute(
            """insert into datasette_secrets (name, note, version, encrypted,
                encryption_key_name, created_at, created_by, updated_at, updated_by,
                last_used_at, last_used_by, wrapped_key, envelope_version)
            with recursive n(i) as (select 1 union all select i + 1 from n limit :more)
            select 'KEY_' || printf('%06d', i), 'note ' || i, 1, encrypted,
                encryption_key_name, created_at, 'actor ' || (i % 50), updated_at,
                'actor ' || (i % 50), updated_at, 'actor ' || (i % 50), wrapped_key, 1
            from n, datasette_secrets""",
            {"more": secrets - 1},
        )
    # A plain copy with the same columns, index and rows.
    with (
        contextlib.closing(sqlite3.connect(internal)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
        target,
    ):
        source.execute("vacuum into ?", [f"{copy}.all"])
        for (sql,) in source.execute(
            "select sql from sqlite_master where tbl_name = 'datasette_secrets'"
        ):
            if sql:
                target.execute(sql)
        target.execute("attach ? as other", [f"{copy}.all"])
        target.execute(
            "insert into datasette_secrets select * from other.datasette_secrets"
        )
        target.commit()
    datasette = Datasette(
        [str(copy)],
        internal=str(internal),
        config=config,
        settings={"default_page_size": PAGE_SIZE},
    )
    datasette.root_enabled = True
    return datasette


def time_pages(address: str, cookie: str, paths: dict[str, str]) -> dict[str, float]:
    """Milliseconds for each page: the median of many, asked for in turn."""
    host = address.removeprefix("http://")
    taken: dict[str, list[float]] = {name: [] for name in paths}
    connection = http.client.HTTPConnection(host)
    for number in range(ROUNDS + 3):
        for name, path in paths.items():
            start = time.perf_counter()
            connection.request("GET", path, headers={"Cookie": f"ds_actor={cookie}"})
            response = connection.getresponse()
            response.read()
            if response.status != 200:
                sys.exit(f"{path} answers {response.status}")
            if number >= 3:  # the first ones compile templates and open connections
                taken[name].append((time.perf_counter() - start) * 1000)
    return {name: statistics.median(each) for name, each in taken.items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def main() -> None:
    secrets = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as folder, quiet():
        datasette = asyncio.run(build(Path(folder), secrets))
        middle = f"KEY_{secrets // 2:06}"
        paths = {
            "list, first page": "/-/secrets",
            "table, first page": "/copy/datasette_secrets",
            "list, a page in the middle": f"/-/secrets?_next={middle}",
            "table, a page in the middle": f"/copy/datasette_secrets?_next={secrets // 2}",
            "list, filtered": "/-/secrets?q=0099",
            "table, filtered": "/copy/datasette_secrets?name__contains=0099",
        }
        with served(datasette) as address:
            cookie = datasette.sign({"a": {"id": "root"}}, "actor")
            medians = time_pages(address, cookie, paths)
        print(f"{secrets:,} secrets, {PAGE_SIZE} on a page, median of {ROUNDS}")
        names = list(paths)
        for ours, theirs in zip(names[::2], names[1::2], strict=True):
            ratio = medians[ours] / medians[theirs]
            print(f"{ours:28} {medians[ours]:7.1f} ms")
            print(f"{theirs:28} {medians[theirs]:7.1f} ms   ratio {ratio:.2f}")
        get_instance(datasette).db.close()
        datasette.close()


if __name__ == "__main__":
    main()
