"""The page on the shell and the commands agree."""

from __future__ import annotations

import re
import subprocess
import sys

import click
import pytest
from click.shell_completion import BashComplete
from support.console import Console
from support.documents import PAGES, ROOT, read, section

from datasette_secrets.cli import secrets

CONTEXT = click.Context(secrets, info_name="secrets", **secrets.context_settings)
NAMES = secrets.list_commands(CONTEXT)


def command(name: str) -> click.Command:
    found = secrets.get_command(CONTEXT, name)
    assert found is not None
    return found


# The commands and the page


def test_the_table_and_the_transcript_are_what_running_the_commands_gives() -> None:
    script = ROOT / "scripts" / "docs_shell.py"
    made = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert made.stdout.splitlines() == read("shell.md").splitlines(), (
        "run python scripts/docs_shell.py --write"
    )


@pytest.mark.parametrize("page", PAGES)
def test_no_command_and_no_option_is_shown_that_does_not_exist(page: str) -> None:
    uses = re.findall(
        r"(?:datasette secrets|\bsecrets) ([a-z-]+)((?: [^`|\n#;&)']+)?)",
        "\n".join(re.findall(r"`[^`\n]+`|```.*?```", read(page), re.DOTALL)),
    )
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
def test_every_json_shape_stands_on_the_page(name: str) -> None:
    takes_json = any(param.name == "as_json" for param in command(name).params)
    documented = section("shell.md", "JSON")
    assert takes_json == bool(re.search(rf"(?m)^\| `{name}[` ]", documented))


# Datasette's own options


@pytest.mark.parametrize(
    "name", sorted({*NAMES} - {"generate-encryption-key", "key-id"})
)
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
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    *shown, ours, theirs = done.stdout.split("\n")[:-1]
    assert any("Manage the secrets that plugins use" in line for line in shown)
    assert set(ours.split()) == {
        "datasette_secrets",
        "datasette_secrets.errors",
        "datasette_secrets.cli",
        "datasette_secrets.cli.arguments",
        "datasette_secrets.containment",
        "datasette_secrets.registry",
    }
    assert theirs == ""
