"""Builds the wheel and the sdist into dist/, checks them, and tests the installed wheel.

The suite comes out of the sdist, with the package taken away, and runs in a new
environment that has the wheel: nothing of the checkout can stand in for what is shipped.
"""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
PACKAGE = "datasette_secrets"


def main() -> None:
    wheel, sdist = build()
    check_wheel(wheel)
    check_sdist(sdist)
    test_installed(wheel, sdist)
    print(f"Good to publish: {wheel.name}, {sdist.name}")


def build() -> tuple[Path, Path]:
    shutil.rmtree(DIST, ignore_errors=True)
    # A build/ left by an older setuptools run would leak removed files into the wheel.
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    # Builds the wheel from the sdist, so the sdist is known to be enough.
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    [wheel], [sdist] = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    return wheel, sdist


def check_wheel(path: Path) -> None:
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        [info] = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
        entry_points = wheel.read(f"{info}/entry_points.txt").decode()
    require(names, package_files() | {f"{info}/licenses/LICENSE"}, path)
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
    files = (ROOT / PACKAGE).rglob("*")
    kept = {f for f in files if f.is_file() and "__pycache__" not in f.parts}
    names = {file.relative_to(ROOT).as_posix() for file in kept}
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
        run(python, "-m", "pytest", "-n", "2", "--dist", "loadfile", cwd=source)


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


def run(*command: object, cwd: Path = ROOT) -> None:
    words = [str(word) for word in command]
    print("$", *words, flush=True)
    if subprocess.run(words, cwd=cwd, timeout=3600).returncode:
        sys.exit(f"Not good to publish: {' '.join(words)} failed")


if __name__ == "__main__":
    main()
