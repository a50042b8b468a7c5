"""What is published: reproducible, complete, and readable on PyPI."""

from __future__ import annotations

import email
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tomli  # Python 3.10 has no tomllib
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from readme_renderer.markdown import render

pytestmark = pytest.mark.timeout(900)  # the build takes minutes on a busy machine

ROOT = Path(__file__).resolve().parents[1]
WHEEL = os.environ.get("WHEEL", "")  # set by scripts/dist.py
OUR_FILES = re.compile(
    r"https://(?:github\.com/datasette/datasette-secrets/blob|"
    r"raw\.githubusercontent\.com/datasette/datasette-secrets)"
    r"/\d[^/]+/(?P<path>[^#]+)(?:#(?P<anchor>.+))?"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The one that is published, or one built twice, from two folders with two umasks."""
    if WHEEL:
        return zipfile.ZipFile(WHEEL)
    output = tmp_path_factory.mktemp("dist") / "files"
    built = subprocess.run(
        [sys.executable, ROOT / "scripts/dist.py", "build", "--output", output],
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    [path] = output.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def dist_info(wheel: zipfile.ZipFile) -> str:
    [name] = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    return name


@pytest.fixture(scope="module")
def sbom(wheel: zipfile.ZipFile, dist_info: str) -> str:
    return wheel.read(f"{dist_info}/sboms/datasette-secrets.cdx.json").decode()


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return dict(tomli.loads(ROOT.joinpath("pyproject.toml").read_text())["project"])


def test_the_bill_of_materials_is_valid_cyclonedx(sbom: str) -> None:
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(sbom) is None
    assert validator.validate_str(sbom.replace('"library"', '"a book"')) is not None


def test_the_bill_of_materials_lists_what_the_project_requires(
    sbom: str, project: dict[str, Any]
) -> None:
    document = json.loads(sbom)
    ours = document["metadata"]["component"]
    assert (ours["name"], ours["version"]) == (project["name"], project["version"])
    listed = {
        (each["properties"][0]["value"], each["scope"])
        for each in document["components"]
    }
    [extra] = project["optional-dependencies"].values()
    assert listed == {
        *((each, "required") for each in project["dependencies"]),
        *((each, "optional") for each in extra),
    }


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(
        self, tag: str, attributes: list[tuple[str, str | None]]
    ) -> None:
        self.found += [
            value
            for name, value in attributes
            if name in ("href", "src", "srcset") and value is not None
        ]


@pytest.fixture(scope="module")
def links_on_pypi(wheel: zipfile.ZipFile, dist_info: str) -> list[str]:
    metadata = email.message_from_bytes(wheel.read(f"{dist_info}/METADATA"))
    page = render(str(metadata.get_payload()))
    assert page is not None
    links = Links()
    links.feed(page)
    return links.found


def test_every_link_and_image_of_the_readme_is_absolute_on_pypi(
    links_on_pypi: list[str],
) -> None:
    assert any(each.endswith(".png") for each in links_on_pypi)
    # PyPI links each heading to itself.
    ours = [each for each in links_on_pypi if not each.startswith("#user-content-")]
    assert [each for each in ours if not each.startswith(("https://", "http://"))] == []


def test_every_link_of_the_readme_to_our_files_finds_one(
    links_on_pypi: list[str], project: dict[str, Any]
) -> None:
    ours = [match for each in links_on_pypi if (match := OUR_FILES.fullmatch(each))]
    assert ours
    assert all(f"/{project['version']}/" in match[0] for match in ours)
    for match in ours:
        path = ROOT / match["path"]
        assert path.exists(), match[0]
        if match["anchor"]:
            assert match["anchor"] in anchors(path.read_text("utf-8")), match[0]


def anchors(markdown: str) -> Iterator[str]:
    """The anchors that GitHub gives to the headings."""
    for heading in re.findall(r"^#+ (.+)$", markdown, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
