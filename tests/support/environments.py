"""Virtual environments with other packages from PyPI, made at first use, kept and upgraded."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-dependents"


def environment(
    name: str,
    *requirements: str,
    wheel: Path | None = None,
    extra: str = "",
    group: str = "",
    python: str = sys.executable,
) -> Path:
    """The folder of its programs, `python` and `pip` among them.

    `wheel`: this package, installed last and again each time. `extra`: `[fernet]`, for
    example. `group`: one of the dependency groups in pyproject.toml.
    """
    folder = FOLDER / name
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    installed = folder / "installed.txt"
    ours = (ROOT / "pyproject.toml").read_bytes() if wheel else b""
    wanted = "\n".join([*requirements, hashlib.sha256(ours).hexdigest()])
    if not installed.exists() or installed.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python, "-m", "venv", folder], check=True, timeout=900)
        install(programs, "--upgrade", "pip>=25.1")  # the first that reads groups
    ours_first = [f"{wheel}{extra}"] if wheel else []
    groups = ["--group", f"{ROOT / 'pyproject.toml'}:{group}"] if group else []
    # A kept environment has what was the newest when it was made.
    newest = ("--upgrade", "--upgrade-strategy", "eager")
    install(programs, *newest, *ours_first, *groups, *requirements)
    installed.write_text(wanted)
    if wheel:
        install(programs, "--force-reinstall", "--no-deps", str(wheel))
    return programs


def install(programs: Path, *arguments: str) -> None:
    pip = [
        str(programs / "python"),
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--quiet",
    ]
    subprocess.run([*pip, "install", *arguments], check=True, timeout=900)


def build_wheel() -> Path:
    """The wheel of the checkout as it is."""
    folder = FOLDER / "wheel"
    # What an older build left in build/ would get into the wheel.
    for left in (folder, ROOT / "build"):
        shutil.rmtree(left, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    arguments = ["wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*pip, *arguments], check=True, timeout=900)
    [wheel] = folder.glob("*.whl")
    return wheel
