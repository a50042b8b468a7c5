"""Asks pip-audit for known vulnerabilities of what is installed here, and of the build tools.

Exits with 1 if there is one. If pip-audit cannot reach its data, it prints that and exits
with 0, or with 1 if DATASETTE_SECRETS_REQUIRE_AUDIT is set, as the workflows do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BUILD_TOOLS = Path(__file__).resolve().parent.parent / ".github/build-requirements.txt"
INSTALLED = ("--local", "--skip-editable")
LOCKED = ("--requirement", str(BUILD_TOOLS), "--require-hashes", "--disable-pip")

# It comes with the virtual environment, and nothing of this package imports it.
OF_THE_ENVIRONMENT = {"pip"}


def main() -> int:
    return max(audit("installed packages", INSTALLED), audit("build tools", LOCKED))


def audit(label: str, arguments: tuple[str, ...]) -> int:
    options = ("--progress-spinner", "off", "--format", "json")
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", *arguments, *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        packages = []
    audited = [each for each in packages if "vulns" in each]
    if not audited:
        print(done.stderr, end="", file=sys.stderr)
        print(f"{label}: pip-audit could not reach its data, so nothing was audited")
        return 1 if os.environ.get("DATASETTE_SECRETS_REQUIRE_AUDIT") else 0
    print(f"{label}: pip-audit knows {len(audited)} of {len(packages)}")
    found = [
        f"{each['name']} {each['version']}: {', '.join(v['id'] for v in each['vulns'])}"
        for each in audited
        if each["vulns"] and each["name"] not in OF_THE_ENVIRONMENT
    ]
    print("\n".join(found) or "No known vulnerability")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
