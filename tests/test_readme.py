"""What the README shows is run as it stands there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasette.plugins import pm

import datasette_secrets
from datasette_secrets import envelope, listing

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def section(heading: str) -> str:
    return README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def blocks(heading: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", section(heading), re.DOTALL)


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment whose `datasette` is this one, and whose `pip` has nothing to do."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, module in (("datasette", "datasette"), ("pip", "pip --version")):
        script = commands / name
        tail = '"$@"' if name == "datasette" else ""
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} {tail}\n')
        script.chmod(0o755)
    return {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


class Served:
    """A `datasette serve` in a process of its own, stopped when it is left."""

    def __init__(self, command: str, folder: Path, env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {command} -p 0"],
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Served:
        assert self._process.stderr is not None
        self.said = []
        for line in self._process.stderr:
            self.said.append(line)
            found = re.search(r"running on (http://[\d.:]+)", line)
            if found:
                self.url = found[1]
                return self
        raise AssertionError("the server did not start: " + "".join(self.said))

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self.stdout, _stderr = self._process.communicate()


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    [block] = blocks("Try it", "bash")
    commands = [line.split() for line in block.splitlines()]
    assert commands == [["make", "run"], ["make", "test"]]
    targets = [target for _, target in commands]
    subprocess.run(
        ["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True
    )


def test_installing_and_configuring_as_written_serves_with_the_key(
    shell: dict[str, str], folder: Path
) -> None:
    [block] = blocks("Install and configure", "bash")
    *commands, serve = block.strip().splitlines()
    subprocess.run(
        ["bash", "-e", "-c", "\n".join(commands)],
        cwd=folder,
        env=shell,
        check=True,
        capture_output=True,
    )
    assert (folder / "encryption-key.txt").stat().st_mode & 0o077 == 0
    with Served(serve, folder, shell) as served:
        pass
    assert "auth-token" in served.stdout
    assert not [line for line in served.said if "datasette-secrets:" in line]
    assert (folder / "internal.db").exists()


@pytest.fixture
def plugins_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory with the plugin of the README in it."""
    before = set(pm.get_plugins())
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "ask.py").write_text(blocks("Use a secret from a plugin", "python")[0])
    monkeypatch.chdir(tmp_path)
    yield
    for plugin in set(pm.get_plugins()) - before:
        pm.unregister(plugin)


@pytest.mark.usefixtures("plugins_folder")
async def test_the_plugin_and_its_test_run_as_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = blocks("Use a secret from a plugin", "python")[1]
    namespace: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), namespace)  # noqa: S102
    test = namespace["test_ask"]
    assert callable(test)
    await test(monkeypatch)
    monkeypatch.delenv("DATASETTE_SECRETS_OPENAI_API_KEY")
    with pytest.raises(AssertionError):
        await test(types.SimpleNamespace(setenv=lambda *_: None))


@pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("jq")), reason="needs curl and jq"
)
def test_the_json_api_answers_every_curl_example(
    shell: dict[str, str], folder: Path
) -> None:
    create_token, examples = blocks("The JSON API", "bash")
    shell = {
        **shell,
        "DATASETTE_SECRET": "for this test",
        "DATASETTE_SECRETS_ENCRYPTION_KEY": envelope.generate_master_key(),
    }
    (folder / "key.txt").write_text("sk-a value")
    setup, *rest = examples.partition("\n# Every secret")
    with Served(
        "datasette serve --internal internal.db --root", folder, shell
    ) as served:
        setup = setup.replace("http://127.0.0.1:8001", served.url).replace(
            "dstok_…", f"$({create_token.strip()})"
        )
        # The first version is stored before, for there is one in the examples.
        for value in ("one", "two", "three"):
            setup += f'\napi $URL/OPENAI_API_KEY/-/set -d \'{{"value": "{value}"}}\'\n'
        done = subprocess.run(
            ["bash", "-e", "-c", setup + "".join(rest)],
            cwd=folder,
            env=shell,
            check=True,
            capture_output=True,
            text=True,
        )
    answers = list(decoded(done.stdout))
    assert len(answers) == examples.count("api $URL") + 3
    refused = [answer for answer in answers if not answer["ok"]]
    assert refused == []


def decoded(text: str) -> Iterator[dict[str, object]]:
    """JSON objects that follow one another without anything between."""
    decoder = json.JSONDecoder()
    while text := text.strip():
        answer, end = decoder.raw_decode(text)
        yield answer
        text = text[end:]


def test_the_documented_shape_of_the_list_has_every_key_that_is_sent() -> None:

    [example] = [json.loads(each) for each in blocks("The JSON API", "json")]
    [secret] = example["secrets"]
    assert secret["state"] in listing.STATES
    described = section("The JSON API")
    for state in listing.STATES:
        assert f"`{state}`" in described


#: Where the package is, which may be another place than that of its README and its tests.
INSTALLED = Path(envelope.__file__).parent.parent


def test_every_link_to_a_file_of_the_repository_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README):
        assert any((root / target).exists() for root in (ROOT, INSTALLED)), target


def test_every_public_name_has_a_docstring() -> None:
    for name in datasette_secrets.__all__:
        assert getattr(datasette_secrets, name).__doc__, name
