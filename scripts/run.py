"""Serves an instance to try: the plugin, the example plugin, and a database that stays.

Everything lives in .run, which only its owner can read. What is already there is used
again, so secrets, sign-ins and changes to datasette.yaml outlive a restart.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / ".run"
HOST = "127.0.0.1"
DATASETTE = [sys.executable, "-m", "datasette"]

# Paths in it are relative to .run, where the server is started.
CONFIG = """\
plugins:
  datasette-secrets:
    encryption-key:  # newest first
      - $file: encryption-key.txt
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
    write_once("encryption-key.txt", generate_encryption_key)
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


def serve(port: int) -> None:
    print(
        f"The example plugin: http://{HOST}:{port}/-/weather\n"
        f"Its secret:         http://{HOST}:{port}/-/secrets\n"
        "First sign in with the link that follows. Ctrl-C stops the server.",
        flush=True,
    )
    os.chdir(RUN)
    os.environ["DATASETTE_SECRET"] = Path("cookie-secret.txt").read_text("utf-8")
    arguments = [
        *("serve", "--root", "--host", HOST, "--port", str(port)),
        *("--config", "datasette.yaml", "--internal", "internal.db"),
        *("--plugins-dir", str(ROOT / "scripts" / "example_plugin")),
    ]
    # The server takes this process's place, so that signals reach it directly.
    os.execv(sys.executable, [*DATASETTE, *arguments])


if __name__ == "__main__":
    main()
