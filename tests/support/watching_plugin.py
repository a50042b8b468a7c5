"""A Datasette plugin that uses secrets, and records all that Datasette tells plugins.

test_leaks.py puts it into the plugins folder of a real server. It writes events, spans and
metrics into the folder that WATCHING_FOLDER names, and has routes that fail in the ways
in which plugins fail. The routes under /-/plant leak on purpose: the hunt has to find that.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from datasette import Response, hookimpl

from datasette_secrets import Secret, get_secret, set_secret

try:
    from datasette.telemetry import tracer
    from datasette.telemetry_testing import install_metric_reader, install_span_exporter
except ImportError:  # older Datasettes have no telemetry
    tracer = None  # type: ignore[assignment]

FOLDER = Path(os.environ["WATCHING_FOLDER"])
SPANS: Any = install_span_exporter() if tracer else None
METRICS: Any = install_metric_reader() if tracer else None


@hookimpl
def register_secrets() -> list[Secret]:
    return [
        Secret("REGISTERED", "A <b>secret</b>", "https://example.com/", "Get one"),
        Secret("ODD NAME / with text"),
    ]


@hookimpl
def track_event(event: Any) -> None:
    with FOLDER.joinpath("events").open("a") as file:
        file.write(f"{event!r} {event.name} {event.properties()}\n")


async def use(datasette: Any, request: Any) -> Any:
    """Use a secret as a plugin would. Says which it was, in a way that tells nothing."""
    value = await get_secret(datasette, request.args["name"], "ann")
    digest = hashlib.sha256((value or "").encode()).hexdigest()
    del value
    return Response.text(digest)


async def store(datasette: Any, request: Any) -> Any:
    """Set a secret through the API."""
    version = await set_secret(
        datasette, request.args["name"], FOLDER.joinpath("api-value").read_text()
    )
    return Response.json({"version": version})


async def plant(datasette: Any, request: Any) -> Any:
    planted = FOLDER.joinpath("planted").read_text()
    kind = request.args["kind"]
    if kind == "sql":
        await datasette.get_database("_memory").execute("select :x", {"x": planted})
    elif kind == "span" and tracer:
        with tracer.start_as_current_span("planted") as span:
            span.set_attribute("planted", planted)
    elif kind == "file":
        Path(os.environ["TMPDIR"], "planted").write_text(planted)
    elif kind == "print":
        print(planted.encode().hex())
    elif kind == "locals":
        raise ZeroDivisionError
    return Response.html("<body>planted</body>")


async def dump(datasette: Any, request: Any) -> Any:
    """Write what telemetry has seen."""
    if not tracer:
        return Response.text("0")
    spans = [span.to_json() for span in SPANS.get_finished_spans()]
    FOLDER.joinpath("spans").write_text("\n".join(spans))
    FOLDER.joinpath("metrics").write_text(METRICS.get_metrics_data().to_json())
    return Response.text(str(len(spans)))


@hookimpl
def register_routes() -> list[tuple[str, Any]]:
    return [
        (r"^/-/use$", use),
        (r"^/-/store$", store),
        (r"^/-/plant$", plant),
        (r"^/-/dump$", dump),
    ]
