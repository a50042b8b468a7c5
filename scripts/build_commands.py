"""What setuptools does not do by itself: pyproject.toml names these commands.

- The sdist has what the suite needs, so that it runs from there. (setuptools reads a
  MANIFEST.in from the top level alone, and there it would be one more file.)
- The same source and SOURCE_DATE_EPOCH give the same bytes, in any folder, for anybody.
- The wheel has a software bill of materials (PEP 770).
- The relative links of the README work on PyPI.
"""

from __future__ import annotations

import datetime
import gzip
import json
import os
import re
import tarfile
import uuid
from pathlib import Path
from typing import Any

import setuptools
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.egg_info import egg_info
from setuptools.command.sdist import sdist

# The earliest time that a zip file can hold.
EPOCH = int(os.environ.get("SOURCE_DATE_EPOCH", "315532800"))
GITHUB = "https://github.com/datasette/datasette-secrets/blob"
GITHUB_RAW = "https://raw.githubusercontent.com/datasette/datasette-secrets"
IMAGES = (".png", ".svg", ".jpg")

# The target of a link in Markdown, or of an attribute in HTML. A URL has a colon.
TARGET = re.compile(
    r"""(?P<before>\]\(|\b(?:href|src|srcset)=")(?P<to>[^)\s":]+)(?=[)\s"])"""
)


def with_absolute_links(readme: str, tag: str) -> str:
    """The README with links to the files of this version on GitHub."""

    def absolute(match: re.Match[str]) -> str:
        target = match["to"]
        if target.startswith("#"):  # PyPI gives headings no anchors
            target = f"README.md{target}"
        base = GITHUB_RAW if target.endswith(IMAGES) else GITHUB
        return f"{match['before']}{base}/{tag}/{target}"

    return TARGET.sub(absolute, readme)


class EggInfo(egg_info):
    """Writes the metadata, the README in it, of the sdist and the wheel."""

    def run(self) -> None:
        metadata = self.distribution.metadata
        metadata.long_description = with_absolute_links(
            metadata.long_description, tag=metadata.get_version()
        )
        super().run()


class CompleteSdist(sdist):
    def make_distribution(self) -> None:
        self.filelist.include("Makefile")
        for folder in ("tests", "scripts", ".github"):
            self.filelist.graft(folder)
        self.filelist.prune(".github/screenshots")
        self.filelist.include(".github/screenshots/list.png")  # the README shows it
        self.filelist.global_exclude("*.py[cod]")
        super().make_distribution()

    def make_archive(
        self, base_name: Any, format: str, *_: Any, base_dir: Any = None, **__: Any
    ) -> str:
        assert format == "gztar", f"no {format} can be made"
        name = f"{base_name}.tar.gz"
        with (
            Path(name).open("wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=EPOCH) as compressed,
            tarfile.open(
                fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT
            ) as tar,
        ):
            for path in sorted([Path(base_dir), *Path(base_dir).rglob("*")]):
                tar.add(path, recursive=False, filter=without_origin)
        return name


def without_origin(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nothing of who made it where, and when."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = EPOCH
    member.mode = 0o755 if member.isdir() else 0o644
    return member


class WheelWithSbom(bdist_wheel):
    def write_wheelfile(self, wheelfile_base: str, *args: Any, **options: Any) -> None:
        super().write_wheelfile(wheelfile_base, *args, **options)
        folder = Path(wheelfile_base, "sboms")
        folder.mkdir(exist_ok=True)
        sbom = json.dumps(self.sbom(), indent=2) + "\n"
        folder.joinpath("datasette-secrets.cdx.json").write_text(sbom, "utf-8")
        # The zip file keeps the modes, and those depend on the umask.
        for path in Path(wheelfile_base).parent.rglob("*"):
            if path.is_file():
                path.chmod(0o644)

    def sbom(self) -> dict[str, Any]:
        """A CycloneDX document: what this is, made with what, and what it requires.

        The wheel has no code of others in it. Which versions of its dependencies are
        used is decided when it is installed, so they have a range and no version.
        """
        project = self.distribution.metadata
        version = project.get_version()
        ours = f"pkg:pypi/datasette-secrets@{version}"
        required = self.distribution.install_requires
        optional = [
            each for more in self.distribution.extras_require.values() for each in more
        ]
        components = [
            {
                "type": "library",
                "bom-ref": f"pkg:pypi/{name_of(requirement)}",
                "name": name_of(requirement),
                "scope": scope,
                "purl": f"pkg:pypi/{name_of(requirement)}",
                "properties": [
                    {"name": "datasette-secrets:requirement", "value": requirement}
                ],
            }
            for scope, group in (("required", required), ("optional", optional))
            for requirement in sorted(set(group))
        ]
        made_at = datetime.datetime.fromtimestamp(EPOCH, datetime.timezone.utc)
        return {
            "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, ours)}",
            "version": 1,
            "metadata": {
                "timestamp": made_at.isoformat(),
                "lifecycles": [{"phase": "build"}],
                "tools": {
                    "components": [
                        {
                            "type": "application",
                            "name": "setuptools",
                            "version": setuptools.__version__,
                        }
                    ]
                },
                "component": {
                    "type": "library",
                    "bom-ref": ours,
                    "name": "datasette-secrets",
                    "version": version,
                    "description": project.description,
                    "licenses": [{"expression": project.license_expression}],
                    "purl": ours,
                },
            },
            "components": components,
            "dependencies": [
                {"ref": ours, "dependsOn": [each["bom-ref"] for each in components]}
            ],
            # What those require in turn is not listed.
            "compositions": [{"aggregate": "incomplete", "dependencies": [ours]}],
        }


def name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return match[0].lower()
