"""What the README and the pages under .github/docs show is run as it stands there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasette.app import Datasette
from datasette.plugins import pm
from support import documents
from support.documents import PAGES, ROOT, Served, blocks, read, run, section

import datasette_secrets
from datasette_secrets import envelope, listing

README_LINES_MAX = 250
#: Where the package is, which may be another place than that of its README and its tests.
INSTALLED = Path(envelope.__file__).parent.parent
GITHUB_PAGES = sorted((ROOT / ".github").glob("*.md"))


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    return documents.shell_environment(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


# Every page


@pytest.mark.parametrize("page", PAGES)
def test_a_page_states_at_its_head_who_it_is_for(page: str) -> None:
    title, _, audience, *_ = read(page).splitlines()
    assert title.startswith("# ")
    assert re.match(r"\*For .+", audience)


def test_the_readme_takes_ten_minutes() -> None:
    assert len(read("README.md").splitlines()) <= README_LINES_MAX


@pytest.mark.parametrize("path", [*PAGES.values(), *GITHUB_PAGES], ids=lambda p: p.name)
def test_every_link_to_a_file_or_heading_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", path.read_text()):
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists():  # the package may be installed elsewhere
            file = INSTALLED / file.relative_to(ROOT)
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", path.read_text())
    return {
        re.sub(r"[^\w\- ]", "", each).lower().replace(" ", "-") for each in headings
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_linked_from_another(page: str) -> None:
    others = [path.read_text() for name, path in PAGES.items() if name != page]
    assert page == "README.md" or any(page in text for text in others)


# The README


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    [block] = blocks(section("README.md", "Try it"), "bash")
    commands = [line.split() for line in block.splitlines()]
    assert commands == [["make", "run"], ["make", "test"]]
    targets = [target for _, target in commands]
    subprocess.run(
        ["make", "--dry-run", *targets],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=60,
    )


@pytest.fixture
def configured(shell: dict[str, str], folder: Path) -> str:
    """A folder in which the section on installing was followed up to its last command."""
    installing = section("README.md", "Install and configure")
    install, make_key, serve = blocks(installing, "bash")
    [configuration] = blocks(installing, "yaml")
    run(install + make_key, folder, shell)
    (folder / "datasette.yaml").write_text(configuration)
    return serve


def test_installing_and_configuring_as_written_serves_with_the_key(
    configured: str, shell: dict[str, str], folder: Path
) -> None:
    for name in ("master.key", "old-master.key"):
        assert (folder / name).stat().st_mode & 0o077 == 0
    with Served(configured, folder, shell) as served:
        pass
    assert "auth-token" in served.stdout
    assert not [line for line in served.said if "datasette-secrets:" in line]
    assert (folder / "internal.db").exists()


@pytest.mark.usefixtures("configured")
def test_the_commands_of_the_readme_run_as_written(
    shell: dict[str, str], folder: Path
) -> None:
    [block] = blocks(section("README.md", "The shell"), "bash")
    shown = run(block, folder, shell, typed="sk-a value\n")
    assert "OPENAI_API_KEY" in shown
    assert "sk-a value\n" in shown


def test_the_permission_is_given_as_written(folder: Path) -> None:
    [block] = blocks(section("README.md", "Permissions"), "yaml")
    (folder / "datasette.yaml").write_text(block)
    env = documents.shell_environment(folder)
    for actor, status in (("ada", 200), ("bob", 403)):
        done = subprocess.run(
            [
                "datasette",
                ".",
                "--get",
                "/-/secrets.json",
                "--actor",
                f'{{"id": "{actor}"}}',
            ],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (json.loads(done.stdout)["ok"], actor) == (status == 200, actor)


@pytest.fixture
def plugins_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory with the plugin of the README in it."""
    before = set(pm.get_plugins())
    folder = tmp_path / "plugins"
    folder.mkdir()
    plugin = blocks(section("README.md", "Use a secret from a plugin"), "python")[0]
    (folder / "ask.py").write_text(plugin)
    monkeypatch.chdir(tmp_path)
    yield
    for plugin in set(pm.get_plugins()) - before:
        pm.unregister(plugin)


@pytest.mark.usefixtures("plugins_folder")
async def test_the_plugin_and_its_test_run_as_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = blocks(section("README.md", "Use a secret from a plugin"), "python")[1]
    namespace: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), namespace)  # noqa: S102
    test = namespace["test_ask"]
    assert callable(test)
    await test(monkeypatch)
    monkeypatch.delenv("DATASETTE_SECRETS_OPENAI_API_KEY")
    with pytest.raises(AssertionError):
        await test(types.SimpleNamespace(setenv=lambda *_: None))


def test_the_readme_and_the_page_on_upgrading_give_the_same_commands() -> None:
    [short] = blocks(section("README.md", "Moving over from 0.x"), "bash")
    long = "".join(blocks(section("upgrading.md", "What to do"), "bash"))
    assert short == long


# The JSON API


@pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("jq")), reason="needs curl and jq"
)
def test_the_json_api_answers_every_curl_example(
    shell: dict[str, str], folder: Path
) -> None:
    [create_token] = blocks(section("json-api.md", "Authentication"), "bash")
    [examples] = blocks(section("json-api.md", "Requests"), "bash")
    shell = {
        **shell,
        "DATASETTE_SECRET": "for this test",
        "DATASETTE_SECRETS_ENCRYPTION_KEY": envelope.generate_master_key(),
    }
    (folder / "key.txt").write_text("sk-a value")
    setup, *rest = examples.partition("\n# Every secret")
    serve = "datasette serve --internal internal.db --root"
    with Served(serve, folder, shell) as served:
        setup = setup.replace("http://127.0.0.1:8001", served.url).replace(
            "dstok_…", f"$({create_token.strip()})"
        )
        # The first version is stored before, for there is one in the examples.
        for value in ("one", "two", "three"):
            setup += f'\napi $URL/OPENAI_API_KEY/-/set -d \'{{"value": "{value}"}}\'\n'
        answers = list(decoded(run(setup + "".join(rest), folder, shell)))
    assert len(answers) == len(re.findall(r'\bapi "?\$URL', examples)) + 3
    refused = [answer for answer in answers if not answer["ok"]]
    assert refused == []


def decoded(text: str) -> Iterator[dict[str, object]]:
    """JSON objects that follow one another without anything between."""
    decoder = json.JSONDecoder()
    while text := text.strip():
        answer, end = decoder.raw_decode(text)
        yield answer
        text = text[end:]


async def test_the_documented_list_has_every_key_that_is_sent(
    datasette: Datasette, admin: dict[str, str]
) -> None:
    [example] = [json.loads(each) for each in blocks(read("json-api.md"), "json")]
    sent = (await datasette.client.get("/-/secrets.json", cookies=admin)).json()
    assert example.keys() == sent.keys()
    assert example["secrets"][0].keys() == sent["secrets"][0].keys()
    assert example["keys"][0].keys() == sent["keys"][0].keys()
    for state in listing.STATES:
        assert f"`{state}`" in section("json-api.md", "The list")


def test_every_public_name_has_a_docstring() -> None:
    for name in datasette_secrets.__all__:
        assert getattr(datasette_secrets, name).__doc__, name
