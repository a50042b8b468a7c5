"""Asks pip-audit for known vulnerabilities of what is installed beside this package.

Exits with 1 if there is one. Where pip-audit cannot reach its data, it says so and that is
all: the machine that builds and publishes can.
"""

from __future__ import annotations

import json
import subprocess
import sys

# They come with the virtual environment, and nothing of this package runs them.
OF_THE_ENVIRONMENT = {"pip", "setuptools"}


def main() -> int:
    command = ["--local", "--skip-editable", "--progress-spinner", "off"]
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", *command, "--format", "json"],
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
        print("pip-audit could not reach its data: nothing was audited")
        return 0
    print(f"pip-audit knows {len(audited)} of {len(packages)} packages")
    found = [
        f"{each['name']} {each['version']}: {', '.join(v['id'] for v in each['vulns'])}"
        for each in audited
        if each["vulns"] and each["name"] not in OF_THE_ENVIRONMENT
    ]
    print("\n".join(found) or "No known vulnerability")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
