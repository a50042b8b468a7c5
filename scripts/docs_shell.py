"""Makes the parts of the page on the shell that come from running things.

    python scripts/docs_shell.py --write

The table of the commands is made from the commands, the transcript by typing it into a
terminal. Without --write the page is printed as it should be; a test compares.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import click

PAGE = Path(__file__).resolve().parent.parent / ".github/docs/shell.md"
OPTIONS = "-c datasette.yaml --internal internal.db"
KEY = "datasette secrets generate-encryption-key"
CONFIG = """\
cat > datasette.yaml <<'END'
plugins:
  datasette-secrets:
    encryption-key:
    - $file: master.key
    - $file: old-master.key
END"""
#: What is typed at the prompts of `set`.
VALUE = "sk-proj-1234"
COMMANDS = (
    f"(umask 077; set -C; {KEY} > master.key; touch old-master.key)",
    CONFIG,
    f"datasette secrets set OPENAI_API_KEY {OPTIONS} --create",
    f"datasette secrets list {OPTIONS}",
    f"datasette secrets get OPENAI_API_KEY {OPTIONS}",
    f"datasette secrets new-key {OPTIONS}",
    f"datasette secrets rotate-key {OPTIONS}",
    f"datasette secrets verify {OPTIONS}",
)
#: Key IDs and the folder differ in every run. These stand for them.
KEY_IDS = ("41d7c0a2be9f1100", "9a3e5577d20c48b1")
FOLDER = "/home/ada"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="change the page")
    write = parser.parse_args().write
    text = PAGE.read_text("utf-8")
    for part, made in (("commands", table()), ("transcript", transcript())):
        text = replace(text, part, made)
    if write:
        PAGE.write_text(text, "utf-8")
    else:
        sys.stdout.write(text)


def replace(text: str, part: str, made: str) -> str:
    begin, end = f"<!-- {part} -->\n", f"<!-- end of {part} -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{made}\n{end}{after}"


def table() -> str:
    """A row for each command: its arguments, the first line of its help, its options."""
    from datasette_secrets.cli import secrets

    context = click.Context(secrets, info_name="secrets")
    rows = []
    for name in secrets.list_commands(context):
        command = secrets.get_command(context, name)
        assert command is not None and command.help is not None
        own = getattr(command, "own_params", command.params)
        arguments = " ".join(
            [name, *(each.make_metavar(context) for each in own if is_argument(each))]
        )
        options = ", ".join(
            " ".join(filter(None, [f"`{longest(each)}", value(each, context)])) + "`"
            for each in own
            if not is_argument(each)
        )
        rows.append(f"| `{arguments}` | {command.help.splitlines()[0]} | {options} |")
    return "| command | does | options |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def is_argument(param: click.Parameter) -> bool:
    return isinstance(param, click.Argument)


def longest(param: click.Parameter) -> str:
    return max(param.opts, key=len)


def value(param: click.Parameter, context: click.Context) -> str:
    assert isinstance(param, click.Option)
    return "" if param.is_flag else param.make_metavar(context)


def transcript() -> str:
    """What a terminal shows, when the commands are typed into it one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        shown = [f"$ {command}\n{run(command, folder)}" for command in COMMANDS]
        text = "".join(shown).replace(os.path.realpath(folder), FOLDER)
    return "```console\n" + stable(text) + "```\n"


def run(command: str, folder: str) -> str:
    master, slave = pty.openpty()
    environment = {
        **{name: os.environ[name] for name in os.environ if "SECRETS" not in name},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LOGNAME": "ada",
        "NO_COLOR": "1",
    }
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        cwd=folder,
        env=environment,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    shown = ""
    while got := read(master):
        shown += got
        if got.endswith(": "):
            os.write(master, f"{VALUE}\n".encode())
    os.close(master)
    if process.wait(timeout=60):
        sys.exit(f"{command} failed:\n{shown}")
    return shown.replace("\r\n", "\n")


def read(terminal: int) -> str:
    try:
        return os.read(terminal, 4096).decode()
    except OSError:  # how Linux says that the other side has ended
        return ""


def stable(text: str) -> str:
    # In the order in which the keys were made: the newer one stands first.
    found = list(dict.fromkeys(re.findall(r"\b[0-9a-f]{16}\b", text)))
    for key_id, stands_for in zip(reversed(found), KEY_IDS, strict=True):
        text = text.replace(key_id, stands_for)
    return text


if __name__ == "__main__":
    main()
