"""A folder that stands for a machine, in which the commands of the runbook are run."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from support.console import DATASETTE, key_id

#: What `datasette secrets set` is given wherever a block runs it.
ANSWER = "a new value"
NOBODY = 65534
DEADLINE = 300

# What a machine has that a test has not. Each does the least that shows the commands work.
STAND_INS = {
    # A server that starts decrypts all that is stored: that is what is tried.
    "systemctl": """
        case "$*" in
        "start litestream" | "stop litestream")
            exec bash -eu "$MACHINE/etc/litestream.sh" "$1" ;;
        "start datasette"* | "restart datasette"*) ;;
        "stop datasette"* | "disable datasette" | daemon-reload) exit 0 ;;
        *) exit 9 ;;
        esac
        cd "$MACHINE/srv/datasette"
        conf="$MACHINE/etc/systemd/system/datasette.service.d/master-key.conf"
        if [ -e "$conf" ]; then
            mkdir -p "$MACHINE/run/credentials/datasette.service"
            base64 -d "$(sed -n 's/^LoadCredentialEncrypted=master.key://p' "$conf")" \\
                > "$MACHINE/run/credentials/datasette.service/master.key"
        fi
        export DATASETTE_INTERNAL=private/internal.db
        datasette serve . --get /-/versions.json > "$MACHINE/served"
        datasette secrets verify .
    """,
    "systemd-creds": """
        [ "$1 $2" = "encrypt --name=master.key" ]
        sealed=$(base64 "$3")
        echo "$sealed" > "$4"
    """,
    "sudo": 'exec "$@"',
    "scp": """
        preserve=; if [ "$1" = -p ]; then preserve=-p; shift; fi
        for file; do target="$file"; done
        target="$MACHINE/new-host/${target#new-host:$MACHINE/}"
        while [ $# -gt 1 ]; do cp $preserve "$1" "$target"; shift; done
    """,
    "ssh": """
        [ "$1" = new-host ]; shift
        new="$MACHINE/new-host"; command="${*//$MACHINE/$new}"
        MACHINE="$new" exec bash -euc "$command"
    """,
    "op": """
        case "$1 $2" in
        "item create")
            [ "$3 $4 $5" = "--vault Servers -" ]
            jq -er '.fields[0].value' > "$MACHINE/op" ;;
        "run --")
            shift 2
            [ "$DATASETTE_SECRETS_ENCRYPTION_KEY" = op://Servers/datasette/password ]
            DATASETTE_SECRETS_ENCRYPTION_KEY="$(cat "$MACHINE/op")" exec "$@" ;;
        *) exit 9 ;;
        esac
    """,
    "vault": """
        case "$*" in
        "kv put -mount=secret datasette encryption-key=@"*)
            cp "${5#encryption-key=@}" "$MACHINE/vault" ;;
        "kv get -mount=secret -field=encryption-key datasette") cat "$MACHINE/vault" ;;
        *) exit 9 ;;
        esac
    """,
    "gcloud": """
        case "$*" in
        "secrets create datasette-master-key --data-file="*)
            cp "${4#--data-file=}" "$MACHINE/gcloud" ;;
        "secrets versions access latest --secret=datasette-master-key")
            cat "$MACHINE/gcloud" ;;
        *) exit 9 ;;
        esac
    """,
}
FOLDERS = (
    "srv/datasette",
    "media/safe",
    "media/backup",
    "etc",
    "run",
    "new-host/srv/datasette/private",
)


class Done(NamedTuple):
    code: int
    output: str


@functools.cache
def service_user() -> int:
    """The user that the service runs as: nobody, where root runs the tests and may be him."""
    if os.getuid():
        return os.getuid()
    command = [*DATASETTE, "--version"]
    try:
        done = subprocess.run(
            command, user=NOBODY, capture_output=True, timeout=DEADLINE
        )
    except OSError:
        return 0
    return 0 if done.returncode else NOBODY


class Machine:
    """`/srv`, `/media`, `/etc` and `/run` of a machine, and the programs that it needs.

    All of it belongs to the user of the service. `datasette`: what starts that program, in
    a shell. `prepared`: a machine to begin with a copy of.
    """

    def __init__(self, datasette: str, prepared: Machine | None = None) -> None:
        # pytest's own folders are closed to the user of the service.
        self._folder = tempfile.TemporaryDirectory(prefix="machine-")
        self.root = Path(self._folder.name)
        self.home = self.root / "srv" / "datasette"
        self.private = self.home / "private"
        self.safe = self.root / "media" / "safe"
        if prepared is not None:
            for folder in ("srv", "media", "etc"):
                shutil.copytree(prepared.root / folder, self.root / folder)
        for folder in FOLDERS:
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        programs = self.root / "bin"
        programs.mkdir(exist_ok=True)
        # A person answers the prompt of `set`.
        answer = f"exec < <(echo '{ANSWER}')"
        asks = f'if [ "$1 ${{2-}}" = "secrets set" ]; then {answer}; fi'
        own = {"datasette": f'{asks}\nexec {datasette} "$@"'}
        for name, script in {**STAND_INS, **own}.items():
            path = programs / name
            path.write_text(f"#!/usr/bin/env bash\nset -eu\n{script}\n")
            path.chmod(0o755)
        self._path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        self.root.chmod(0o755)
        self.own(self.root, *self.root.rglob("*"))

    def close(self) -> None:
        self._folder.cleanup()

    def own(self, *paths: Path) -> None:
        if os.getuid() == 0:
            for path in paths:
                os.chown(path, service_user(), service_user())

    def run(
        self,
        *blocks: str,
        stop: bool = True,
        user: int | None = None,
        kill_before: int = 0,
    ) -> Done:
        """Run these as they stand, but for the root, and servers that answer once.

        With `stop`, the first command that fails ends them, as in a script; otherwise the
        next is run, as when somebody pastes them. `kill_before`: the shell is killed
        before the command of this number, from the second block on; a call of a function
        is one. A line that ends in `# exits 1` must fail.
        """
        if kill_before:
            counting = f"((++step == {kill_before})) && kill -KILL $$"
            blocks = (
                blocks[0],
                f"step=0; trap '{counting}' DEBUG",
                *blocks[1:],
            )
        text = self.rooted("\n".join(blocks))
        text = re.sub(
            r"(?m)^(.*\bdatasette serve .*)$", r"\1 --get /-/versions.json", text
        )
        text = re.sub(r"(?m)^(.*) # exits 1$", r"if \1; then exit 9; fi", text)
        options = (
            {} if os.getuid() else {"user": service_user() if user is None else user}
        )
        if options:
            options |= {"group": options["user"]}
        done = subprocess.run(
            ["bash", "-uo", "pipefail", *(["-e"] if stop else []), "-c", text],
            cwd=self.root,
            env={
                **{
                    name: os.environ[name]
                    for name in os.environ
                    if "SECRETS" not in name
                },
                "PATH": self._path,
                "MACHINE": str(self.root),
                "HOME": str(self.root),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE,
            **options,  # type: ignore[call-overload]
        )
        return Done(done.returncode, done.stdout)

    def rooted(self, text: str) -> str:
        """The text, with this folder for the root of the machine."""
        return re.sub(r"(?<![\w.-])/(srv|media|etc|run)/", rf"{self.root}/\1/", text)

    def write(self, path: Path, content: str, mode: int = 0o600) -> None:
        """Write a file as the user of the service would."""
        path.write_text(content)
        path.chmod(mode)
        self.own(path)

    def key_ids(self, *folders: Path) -> set[str]:
        """The IDs of the keys in the key files of these folders."""
        return {
            key_id(line)
            for folder in folders
            for path in folder.glob("*.key*")
            for line in path.read_text().split()
        }

    def exposed(self) -> list[str]:
        """Files that others could read, or that the service could not."""
        backups = self.root / "media" / "backup"
        closed = [self.private, *self.private.glob("*.key*")]
        closed += [*self.safe.iterdir(), *backups.iterdir()]
        return [
            str(path.relative_to(self.root))
            for path in [*closed, *self.private.rglob("*")]
            if path.stat().st_uid != service_user()
            or (path in closed and path.stat().st_mode & 0o077)
        ]
