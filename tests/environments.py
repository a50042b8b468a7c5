"""Virtual environments with other packages from PyPI, made at first use and kept."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-dependents"


def environment(name: str, *requirements: str, python: str = sys.executable) -> Path:
    """The folder of its programs, `python` and `pip` among them."""
    folder = FOLDER / name
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    installed = folder / "installed.txt"
    wanted = "\n".join(map(_describe, requirements))
    if not installed.exists() or installed.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python, "-m", "venv", folder], check=True)
        install(programs, *requirements)
        installed.write_text(wanted)
    return programs


def _describe(requirement: str) -> str:
    wheel = Path(requirement)
    if wheel.suffix != ".whl":
        return requirement
    return f"{wheel.name} {hashlib.sha256(wheel.read_bytes()).hexdigest()}"


def install(programs: Path, *arguments: str | Path) -> None:
    pip = [programs / "python", "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", *arguments], check=True)
