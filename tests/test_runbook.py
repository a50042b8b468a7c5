"""Every command of the runbook works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.console import DATASETTE
from support.documents import read

from datasette_secrets import envelope

PAGE = read("operations.md")
BLOCKS = {
    heading: re.findall(r"(?ms)^```bash\n(.*?)^```$", text)
    for heading, text in re.findall(r"(?ms)^## (.*?)$(.*?)(?=^## |\Z)", PAGE)
}
PRELUDE = re.findall(r"(?ms)^```bash\n(.*?)^```$", PAGE)[0]
# What a machine has that a test has not. Each does the least that shows the commands work.
STAND_INS = {
    # A server that starts opens all that is stored: that is what is tried.
    "systemctl": """
        case "$1" in start|restart) ;; *) exit 0;; esac
        cd "$MACHINE/srv/datasette"
        conf="$MACHINE/etc/systemd/system/datasette.service.d/master-key.conf"
        if [ -e "$conf" ]; then
            mkdir -p "$MACHINE/run/credentials/datasette.service"
            base64 -d "$(sed -n 's/^LoadCredentialEncrypted=master.key://p' "$conf")" \\
                > "$MACHINE/run/credentials/datasette.service/master.key"
        fi
        datasette secrets verify -c datasette.yaml --internal internal.db
    """,
    "systemd-creds": """
        [ "$1 $2" = "encrypt --name=master.key" ]; base64 "$3" > "$4"
    """,
    "sudo": '[ "$1 $2" = "-u datasette" ]; shift 2; exec "$@"',
    "scp": """
        for file; do target="$file"; done
        target="$MACHINE/new-host/${target#new-host:$MACHINE/}"
        while [ $# -gt 1 ]; do cp "$1" "$target"; shift; done
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


class Machine:
    """A folder that stands for the root of a machine, with the programs it needs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("srv/datasette", "media/safe", "media/backup", "bin"):
            (root / folder).mkdir(parents=True)
        (root / "new-host" / "srv" / "datasette").mkdir(parents=True)
        datasette = " ".join(f"'{word}'" for word in DATASETTE)
        programs = {**STAND_INS, "datasette": f'exec {datasette} "$@"'}
        for name, script in programs.items():
            path = root / "bin" / name
            path.write_text(f"#!/usr/bin/env bash\nset -eu\n{script}\n")
            path.chmod(0o755)
        self.home = root / "srv" / "datasette"

    def run(self, *blocks: str) -> str:
        """Run these as they stand, but for the root, and servers that answer once.

        Returns what went wrong, if anything.
        """
        text = "\n".join(blocks)
        text = re.sub(r"(?<![\w.-])/(srv|media|etc|run)/", rf"{self.root}/\1/", text)
        text = re.sub(
            r"(?m)^(.*\bdatasette serve .*)$", r"\1 --get /-/versions.json", text
        )
        text = re.sub(r"(?m)^(.*) # exits 1$", r"if \1; then exit 9; fi", text)
        path = f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            env={**os.environ, "PATH": path, "MACHINE": str(self.root)},
            input="a new value\n",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return done.stdout if done.returncode else ""


FIRST, *LATER = BLOCKS


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in each part of the runbook; the later ones run side by side."""
    first = Machine(tmp_path_factory.mktemp("machine"))
    outcome = first.run(PRELUDE, *BLOCKS[FIRST])

    def follow(heading: str) -> str:
        machine = Machine(tmp_path_factory.mktemp("machine"))
        shutil.copytree(first.home, machine.home, dirs_exist_ok=True)
        if heading == "A key is lost":
            lost = machine.home / "master.key"
            lost.write_text(envelope.generate_master_key())
        return machine.run(PRELUDE, *BLOCKS[heading])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {
            FIRST: outcome,
            **dict(zip(LATER, pool.map(follow, LATER), strict=True)),
        }


@pytest.mark.skipif(
    not (shutil.which("jq") and shutil.which("sqlite3")),
    reason="the runbook uses jq and sqlite3",
)
@pytest.mark.parametrize("heading", BLOCKS)
def test_runbook(heading: str, outcomes: dict[str, str]) -> None:
    assert BLOCKS[heading], "it has no command"
    assert outcomes[heading] == ""
