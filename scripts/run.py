"""Serves an instance to try: the plugin, the example plugin, and a database that stays.

Everything lives in .run, which only its owner can read. What is already there is used
again, so secrets, sign-ins and changes to datasette.yaml outlive a restart.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from datasette import Forbidden, Response, hookimpl
from datasette.app import Datasette
from datasette.plugins import pm
from datasette.utils import StartupError, parse_metadata
from datasette.utils.asgi import Request

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / ".run"
HOST = "127.0.0.1"
DATASETTE = [sys.executable, "-m", "datasette"]
PLUGINS = ROOT / "scripts" / "example_plugin"

# Paths in it are relative to .run, where the server is started.
CONFIG = """\
plugins:
  datasette-secrets:
    encryption-key:  # newest first
      - $file: master.key
      - $file: old-master.key
"""


def main() -> None:
    port = parse_arguments().port
    # Before anything is made: even a file that exists for an instant is private.
    os.umask(0o077)
    refuse_taken(port)
    prepare()
    serve(port)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8001)
    return parser.parse_args()


def refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        # As the server itself does, or a port just closed would look taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            sys.exit(
                f"Cannot serve on {HOST}:{port} ({error}): "
                f"choose another port with make run PORT={port + 1}"
            )


def prepare() -> None:
    RUN.mkdir(mode=0o700, exist_ok=True)
    RUN.chmod(0o700)
    write_once("datasette.yaml", lambda: CONFIG)
    write_once("master.key", generate_encryption_key)
    write_once("old-master.key", str)  # empty until new-key moves the first key there
    # Signs cookies: kept, so that a restart signs nobody out.
    write_once("cookie-secret.txt", lambda: secrets.token_hex(32))


def write_once(name: str, content: Callable[[], str]) -> None:
    path = RUN / name
    if path.exists():
        return
    # Under another name until it is whole: an interrupted start leaves no half file.
    unfinished = path.with_suffix(".new")
    unfinished.write_text(content(), encoding="utf-8")
    unfinished.replace(path)


def generate_encryption_key() -> str:
    command = [*DATASETTE, "secrets", "generate-encryption-key"]
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, timeout=60
    ).stdout


class SignIn:
    """A link that signs in as root and leads to the secrets. It works until the server ends."""

    def __init__(self) -> None:
        self.token = secrets.token_urlsafe(24)

    @hookimpl
    def register_routes(self) -> list[tuple[str, Callable[..., Any]]]:
        async def sign_in(datasette: Datasette, request: Request) -> Response:
            token = request.args.get("token") or ""
            if not secrets.compare_digest(token, self.token):
                raise Forbidden("The link is of another run: take the one printed last")
            response: Response = Response.redirect(datasette.urls.path("/-/secrets"))
            datasette.set_actor_cookie(response, {"id": "root"})
            return response

        return [(r"^/-/sign-in$", sign_in)]


def serve(port: int) -> None:
    os.chdir(RUN)
    sign_in = SignIn()
    pm.register(sign_in, name="sign-in")
    datasette = Datasette(
        config=parse_metadata(Path("datasette.yaml").read_text("utf-8")),
        internal="internal.db",
        plugins_dir=str(PLUGINS),
        secret=Path("cookie-secret.txt").read_text("utf-8"),
    )
    datasette.root_enabled = True
    link = f"http://{HOST}:{port}/-/sign-in?token={sign_in.token}"
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve_until_interrupted(datasette, port, link))


def shell_commands() -> str:
    """What to type in another terminal, to use the shell on this instance."""
    datasette = Path(sys.executable).with_name("datasette")
    options = "-c datasette.yaml --internal internal.db"
    program, plugins = (
        shlex.quote(
            os.path.relpath(path, RUN) if path.is_relative_to(ROOT) else str(path)
        )
        for path in (datasette, PLUGINS)
    )
    return (
        f"  cd {shlex.quote(str(RUN))}\n"
        f"  {program} secrets list {options} --plugins-dir {plugins}\n"
    )


async def serve_until_interrupted(datasette: Datasette, port: int, link: str) -> None:
    try:
        await datasette.invoke_startup()
    except StartupError as error:
        sys.exit(f"Error: {error}")
    server = uvicorn.Server(uvicorn.Config(datasette.app(), log_level="warning"))
    # All imports come before the link, so that Ctrl-C finds the server ready for it.
    server.config.load()
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()  # a browser that comes before the server is ready has to wait
        print(
            f"The example plugin: http://{HOST}:{port}/-/weather\n"
            f"The shell, in another terminal:\n{shell_commands()}"
            f"Ctrl-C stops the server. Sign in and manage secrets:\n{link}",
            flush=True,
        )
        await server.serve(sockets=[listener])


if __name__ == "__main__":
    main()
