"""Builds the wheel and the sdist into dist/, checks them, and tests the installed wheel.

    python scripts/dist.py [build | test] [--output FOLDER]

build: everything is built twice, from two copies of the source, and must be the same to
the byte. Needs `build` and `setuptools`, nothing else. test: the suite comes out of the
sdist, with the package taken away, and runs in a new environment that has the wheel, so
that nothing of the checkout can stand in for what is shipped. Without either: both.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "datasette_secrets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("step", nargs="?", choices=["build", "test"])
    parser.add_argument("--output", type=Path, default=ROOT / "dist", metavar="FOLDER")
    chosen = parser.parse_args()
    if chosen.step != "test":
        build(chosen.output)
    [wheel] = chosen.output.glob("*.whl")
    [sdist] = chosen.output.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    for path in (wheel, sdist):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}")
    if chosen.step != "build":
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
        test_installed(wheel, sdist)
        print(f"Good to publish: {wheel.name}, {sdist.name}")


def build(output: Path) -> None:
    shutil.rmtree(output, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="datasette-secrets-build-") as folder:
        first = build_copy(Path(folder, "one"), umask=0o022)
        second = build_copy(Path(folder, "another", "place"), umask=0o077)
        for one, other in zip(first, second, strict=True):
            same = one.name == other.name and one.read_bytes() == other.read_bytes()
            expect(same, f"{one.name} is another file when it is built again")
        output.mkdir(parents=True)
        for path in first:
            shutil.copyfile(path, output / path.name)


def build_copy(folder: Path, umask: int) -> list[Path]:
    """The wheel and the sdist, built from a copy of the source.

    The wheel is built from the sdist, so the sdist is known to be enough.
    """
    before = os.umask(umask)
    try:
        for name in source_files():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
        command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist")
        run(*command, cwd=folder, SOURCE_DATE_EPOCH=source_date())
    finally:
        os.umask(before)
    return sorted(folder.joinpath("dist").iterdir())


def source_files() -> list[Path]:
    """What git has, or all there is where that cannot be asked, as in an sdist."""
    tracked = git("ls-files", "-z")
    if tracked:
        names = [Path(name) for name in tracked.split("\0") if name]
        return [name for name in names if ROOT.joinpath(name).is_file()]
    left = {"__pycache__", "build", "dist", f"{PACKAGE}.egg-info"}
    paths = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
    return [path for path in paths if not left.intersection(path.parts)]


def source_date() -> str:
    """When the commit was made."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    return given or git("log", "-1", "--format=%ct").strip() or "315532800"


def git(*arguments: str) -> str:
    if not ROOT.joinpath(".git").exists():
        return ""
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


def check_wheel(path: Path) -> None:
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        [info] = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
        entry_points = wheel.read(f"{info}/entry_points.txt").decode()
    beside = {
        f"{info}/licenses/LICENSE",
        f"{info}/sboms/datasette-secrets.cdx.json",
    }
    require(names, package_files() | beside, path)
    extra = {name for name in names if not name.startswith((f"{PACKAGE}/", info))}
    expect(not extra, f"{path.name} installs beside the package: {sorted(extra)}")
    licence = metadata["License-Expression"]
    expect(licence == "Apache-2.0", f"the licence is {licence}")
    found = f"secrets = {PACKAGE}" in entry_points
    expect(found, "Datasette would not find the plugin: there is no entry point")


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {"LICENSE", "README.md", "Makefile", "tests/conftest.py", "scripts/run.py"}
    require(names, package_files() | wanted, path)


def package_files() -> set[str]:
    """Every file of the package: modules, templates, static files, py.typed."""
    names = {name.as_posix() for name in source_files() if name.parts[0] == PACKAGE}
    for needed in ("py.typed", "templates/", "static/"):
        found = any(name.startswith(f"{PACKAGE}/{needed}") for name in names)
        expect(found, f"the package lacks {needed}")
    return names


def test_installed(wheel: Path, sdist: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="datasette-secrets-dist-") as folder:
        python = new_environment(Path(folder) / "venv")
        source = unpack(sdist, Path(folder) / "source")
        pip = (python, "-m", "pip", "install", "--quiet")
        run(*pip, "--upgrade", "pip>=25.1")  # the first that reads dependency groups
        group = f"{source / 'pyproject.toml'}:test"
        run(*pip, f"{wheel}[fernet]", "--group", group)
        shutil.rmtree(source / PACKAGE)
        pytest = (python, "-m", "pytest", "-n", "2", "--dist", "loadfile")
        run(*pytest, cwd=source, WHEEL=str(wheel.resolve()))


def new_environment(path: Path) -> Path:
    venv.create(path, with_pip=True)
    return path / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def unpack(sdist: Path, folder: Path) -> Path:
    shutil.unpack_archive(sdist, folder)
    [source] = folder.iterdir()
    return source


def require(names: set[str], wanted: set[str], path: Path) -> None:
    expect(not wanted - names, f"{path.name} lacks {sorted(wanted - names)}")


def expect(held: bool, complaint: str) -> None:
    if not held:
        sys.exit(f"Not good to publish: {complaint}")


def run(*command: object, cwd: Path = ROOT, **variables: str) -> None:
    words = [str(word) for word in command]
    print("$", *words, flush=True)
    environment = {**os.environ, **variables}
    done = subprocess.run(words, cwd=cwd, env=environment, check=False, timeout=3600)
    if done.returncode:
        sys.exit(f"Not good to publish: {' '.join(words)} failed")


if __name__ == "__main__":
    main()
