"""The README and the commands agree, and every command of the runbook works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete
from support.console import DATASETTE, Console

from datasette_secrets import envelope
from datasette_secrets.cli import secrets

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
CONTEXT = click.Context(secrets, info_name="secrets")
NAMES = secrets.list_commands(CONTEXT)


def command(name: str) -> click.Command:
    found = secrets.get_command(CONTEXT, name)
    assert found is not None
    return found


def section(heading: str) -> str:
    [found] = re.findall(rf"(?ms)^## {heading}$(.*?)(?=^## |\Z)", README)
    return str(found)


# The commands and the README


def test_the_table_and_the_transcript_are_what_running_the_commands_gives() -> None:
    script = ROOT / "scripts" / "readme_shell.py"
    made = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True
    )
    assert made.stdout.splitlines() == README.splitlines(), (
        "run python scripts/readme_shell.py --write"
    )


def test_no_command_and_no_option_is_in_the_readme_that_does_not_exist() -> None:
    uses = re.findall(
        r"(?:datasette secrets|\bsecrets) ([a-z-]+)((?: [^`|\n#;)']+)?)",
        "\n".join(re.findall(r"`[^`\n]+`|```.*?```", README, re.DOTALL)),
    )
    checked = set()
    for name, rest in uses:
        if name not in NAMES:
            assert name in ("create", "versions"), name  # those are gcloud's
            continue
        known = {
            option
            for param in command(name).get_params(CONTEXT)
            for option in (*param.opts, *param.secondary_opts)
        }
        options = re.findall(r"(?<=\s)(--?[a-z][a-z-]*)", rest)
        assert set(options) <= known, (name, options)
        checked.add(name)
    assert {"set", "rotate-key", "status", "verify", "destroy"} <= checked


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_to_do_and_has_an_example(name: str) -> None:
    context = click.Context(command(name), info_name=name, parent=CONTEXT)
    text = command(name).get_help(context)
    assert f"datasette secrets {name}" in text
    first = (command(name).help or "").splitlines()[0]
    assert first[0].isupper()
    assert not first.endswith(".")
    for param in command(name).params:
        assert isinstance(param, click.Argument) or param.help


@pytest.mark.parametrize("name", NAMES)
def test_every_json_shape_stands_in_the_readme(name: str) -> None:
    takes_json = any(param.name == "as_json" for param in command(name).params)
    documented = section("The shell").split("### JSON")[1]
    assert takes_json == bool(re.search(rf"(?m)^\| `{name}[` ]", documented))


# Datasette's own options


@pytest.mark.parametrize("name", [name for name in NAMES if name[:3] != "gen"])
def test_every_command_takes_what_serve_takes(name: str) -> None:
    from datasette.cli import cli

    left_out = {"get", "headers", "token", "pdb", "open_browser", "help_settings"}
    wanted = {
        (param.name, *param.opts, param.nargs, param.multiple)
        for param in cli.commands["serve"].params
        if param.name not in {*left_out, "actor"}
    }
    params = command(name).get_params(CONTEXT)
    assert wanted <= {
        (each.name, *each.opts, each.nargs, each.multiple) for each in params
    }
    assert not left_out & {each.name for each in params}


def test_copying_leaves_the_options_of_serve_as_they_were() -> None:
    from datasette.cli import cli

    for name in NAMES:
        command(name).get_params(CONTEXT)
    serve = {param.name: param for param in cli.commands["serve"].params}
    assert not any(getattr(param, "hidden", False) for param in serve.values())
    assert serve["port"].type.name == "integer range"
    assert serve["port"].expose_value


def test_completion_knows_commands_options_and_files(console: Console) -> None:
    from datasette.cli import cli

    def complete(*words: str) -> list[str]:
        *args, incomplete = words
        found = BashComplete(cli, {}, "datasette", "_DATASETTE_COMPLETE")
        return [
            item.value or item.type for item in found.get_completions(args, incomplete)
        ]

    assert "rotate-key" in complete("secrets", "ro")
    assert complete("secrets", "rotate-key", "--new") == ["--new-data-keys"]
    assert "--internal" in complete("secrets", "rotate-key", "--int")
    assert complete("secrets", "list", "--internal", "int") == ["int"]


def test_datasette_help_loads_no_command_and_nothing_behind_them() -> None:
    program = (
        "import sys\n"
        "from datasette.cli import cli\n"
        "cli(['--help'], standalone_mode=False)\n"
        "print(*[name for name in sys.modules if name.startswith('datasette_secrets')])\n"
        "print(*[name for name in ('nacl', 'dotenv') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    *shown, ours, theirs = done.stdout.split("\n")[:-1]
    assert any("Manage the secrets that plugins use" in line for line in shown)
    assert set(ours.split()) == {
        "datasette_secrets",
        "datasette_secrets.errors",
        "datasette_secrets.cli",
        "datasette_secrets.cli.arguments",
        "datasette_secrets.registry",
    }
    assert theirs == ""


# The runbook

BLOCKS = {
    heading: re.findall(r"(?ms)^```bash\n(.*?)^```$", text)
    for heading, text in re.findall(
        r"(?ms)^### (.*?)$(.*?)(?=^### |\Z)", section("Runbook")
    )
}
PRELUDE = re.findall(r"(?ms)^```bash\n(.*?)^```$", section("Runbook"))[0]
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
