"""Whatever a program imports first, everything is there and every hook is registered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Two plugins as they are found in the wild. The first imports this package, and with it
# `datasette.plugins`, before it defines its hooks; the second the other way round.
DEPENDENTS = {
    "secrets_first_plugin": """
from datasette import hookimpl
from datasette_secrets import Secret, get_secret
from datasette.plugins import pm

@hookimpl
def register_secrets():
    return [Secret("FROM_SECRETS_FIRST")]

@hookimpl
def register_routes():
    return []
""",
    "plugins_first_plugin": """
from datasette import hookimpl

@hookimpl(specname="menu_links")
def defined_early(datasette):
    return []

from datasette.plugins import pm
from datasette_secrets import Secret, get_secret

@hookimpl
def register_secrets(datasette):
    async def inner():
        return [Secret("FROM_PLUGINS_FIRST")]
    return inner
""",
}

PROGRAM = """
import asyncio, importlib, json, sys
importlib.import_module(sys.argv[1])
import datasette_secrets
from datasette.app import Datasette
from datasette.plugins import pm
from datasette_secrets import registry

datasette = Datasette(memory=True)
print(json.dumps({
    "hooks": {
        name: sorted(caller.name for caller in pm.get_hookcallers(plugin))
        for name, plugin in pm.list_name_plugin()
    },
    "secrets": [
        secret.name for secret in asyncio.run(datasette_secrets.get_secrets(datasette))
    ],
    "registered_by": sorted(
        name
        for secret in asyncio.run(registry.registered_secrets(datasette)).values()
        for name in secret.registered_by
    ),
    "public": [hasattr(datasette_secrets, name) for name in datasette_secrets.__all__],
}))
"""


@pytest.fixture(scope="module")
def dependents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two installed plugins that depend on this one."""
    folder = tmp_path_factory.mktemp("dependents")
    for name, source in DEPENDENTS.items():
        (folder / f"{name}.py").write_text(source)
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        (info / "entry_points.txt").write_text(f"[datasette]\n{name} = {name}\n")
    return folder


def run(dependents: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(dependents)}
    environment.pop("DATASETTE_LOAD_PLUGINS", None)
    done = subprocess.run(
        [sys.executable, "-c", *arguments],
        env=environment,
        cwd=dependents,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    return done.stdout


@pytest.mark.parametrize(
    "first",
    [
        "datasette_secrets",
        "datasette_secrets.envelope",
        "secrets_first_plugin",
        "plugins_first_plugin",
        "datasette",
        "datasette.app",
        "datasette.plugins",
        "datasette.cli",
    ],
)
def test_every_hook_is_registered_whatever_is_imported_first(
    dependents: Path, first: str
) -> None:
    found = json.loads(run(dependents, PROGRAM, first))

    assert all(found["public"])
    assert sorted(found["secrets"]) == ["FROM_PLUGINS_FIRST", "FROM_SECRETS_FIRST"]
    assert found["registered_by"] == ["plugins_first_plugin", "secrets_first_plugin"]
    assert found["hooks"]["secrets_first_plugin"] == [
        "register_routes",
        "register_secrets",
    ]
    assert found["hooks"]["plugins_first_plugin"] == ["menu_links", "register_secrets"]
    assert set(found["hooks"]["secrets"]) >= {
        "menu_links",
        "permission_resources_sql",
        "register_actions",
        "register_commands",
        "register_events",
        "register_output_renderer",
        "register_routes",
        "startup",
    }


def test_what_0_x_exported_is_still_there(dependents: Path) -> None:
    run(
        dependents,
        "from datasette_secrets import get_config, get_secret, get_secrets, startup, Secret",
    )


def test_importing_the_package_does_not_load_a_cryptography_library(
    dependents: Path,
) -> None:
    loaded = run(
        dependents, "import datasette_secrets, sys; print('\\n'.join(sys.modules))"
    ).split()
    assert not {"nacl.bindings", "cryptography.fernet"} & set(loaded)
