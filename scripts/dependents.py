"""Tests the wheel beside the plugins that depend on it, in environments of their own.

Runs the tests of this project that need those plugins. Starts a server beside each plugin
that requires one of them. Runs the plugins' own suites, as far as PyPI has them, once with
this package and once with datasette-secrets 0.3a0: what passes with 0.3a0 has to pass with
this package. Prints the tables of .github/COMPATIBILITY.md, and exits 1 if something broke.
"""

from __future__ import annotations

import base64
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
sys.path.insert(0, str(TESTS))

from support.documents import Served  # noqa: E402
from support.environments import FOLDER, build_wheel, environment  # noqa: E402

# Each with the tests to run of its own suite: pytest's -k, empty for all, None for none.
DEPENDENTS = {
    # The rest needs a conftest.py that the sdist does not have, or looks for menus that
    # Datasette has changed.
    "datasette-enrichments": "using_secret or job_listings",
    "datasette-enrichments-opencage": "",
    # These two expect that no other plugin registers a purpose.
    "datasette-llm": "not purposes_no_plugins and not register_llm_purposes",
    "datasette-enrichments-llm": "",
    # Its only test needs a recording of OpenAI's answer that the sdist does not have.
    "datasette-enrichments-gpt": None,
    # The same.
    "datasette-extract": "not extract_flow",
    # This one expects another Cache-Control than Datasette sends.
    "datasette-agent": "not stream_endpoint_headers",
}
# These use a plugin of the list above. A server must start with each of them.
FURTHER = (
    "datasette-embeddings",
    "datasette-enrichments-quickjs",
    "datasette-enrichments-re2",
    "datasette-llm-accountant",
    "datasette-llm-usage",
)
# What those suites and ours need, and httpx, which datasette-enrichments-opencage imports
# without requiring it.
TOOLS = (
    "pytest",
    "pytest-asyncio",
    "pytest-httpx",
    "pytest-timeout",
    "hypothesis",
    "inline-snapshot",
    "llm-echo>=0.5a0",
    "httpx",
    "setuptools",
)
OLD = "datasette-secrets==0.3a0"
KEY = base64.urlsafe_b64encode(bytes(32)).decode()  # it protects nothing
# The suite of datasette-extract expects both to be set.
VARIABLES = dict.fromkeys(
    ("OPENAI_API_KEY", "DATASETTE_SECRETS_OPENAI_API_KEY"), "none"
)

Outcomes = dict[str, str]


def main() -> None:
    wheel = build_wheel()
    ours = environment("ours", *DEPENDENTS, *TOOLS, wheel=wheel, extra="[fernet]")
    datasette = f"datasette=={version(ours, 'datasette')}"
    theirs = environment(
        "theirs",
        OLD,
        datasette,
        *(f"{name}=={version(ours, name)}" for name in DEPENDENTS),
        *TOOLS,
    )
    print(f"{wheel.name}, {datasette}, Python {sys.version.split()[0]}\n", flush=True)

    broken = run_own_tests(ours, wheel)
    print("\n| plugin | a server with it |\n|---|---|", flush=True)
    for name in FURTHER:
        programs = environment(f"with-{name}", name, datasette, wheel=wheel)
        status = serve(programs)
        broken |= status != 200
        print(f"| {name} {version(programs, name)} | `/`: {status} |", flush=True)

    print(f"\n| plugin | its own tests with ours | with {OLD} |\n|---|---|---|")
    for name, selection in DEPENDENTS.items():
        release = version(ours, name)
        if selection is None:
            print(f"| {name} {release} | none that can be run | |")
            continue
        suite = fetch_suite(ours, name, release)
        with_ours = run_suite(ours, suite, selection)
        with_theirs = run_suite(theirs, suite, selection)
        row = (f"{name} {release}", count(with_ours), count(with_theirs))
        print(f"| {' | '.join(row)} |", flush=True)
        for test, outcome in with_theirs.items():
            if outcome == "passed" and with_ours.get(test) != "passed":
                print(f"{name}: {test} passes with {OLD} only")
                broken = True
    sys.exit(broken)


def version(programs: Path, name: str) -> str:
    code = (
        "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    )
    command = [programs / "python", "-c", code, name]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=3600
    )
    return done.stdout.strip()


def run_own_tests(programs: Path, wheel: Path) -> bool:
    # Not `python -m pytest`, which would find the checkout before the wheel.
    modules = (*sorted(TESTS.glob("test_dependents*.py")), TESTS / "test_upgrade.py")
    command = [programs / "pytest", "-q", "-m", "dependents", *modules]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "WHEEL": str(wheel)}, timeout=3600
    )
    return done.returncode != 0


def serve(programs: Path) -> int:
    """Start a server; the status of its homepage."""
    with tempfile.TemporaryDirectory() as folder:
        program = shlex.quote(str(programs / "datasette"))
        command = f"{program} serve --internal internal.db"
        variables = {**os.environ, "DATASETTE_SECRETS_ENCRYPTION_KEY": KEY}
        with (
            Served(command, Path(folder), variables) as server,
            urllib.request.urlopen(server.url, timeout=60) as answer,
        ):
            return int(answer.status)


def fetch_suite(programs: Path, name: str, release: str) -> Path:
    """The tests in a plugin's source distribution."""
    folder = FOLDER / "suites" / f"{name}-{release}"
    if not folder.exists():
        run(
            *(
                programs / "python",
                "-m",
                "pip",
                "--disable-pip-version-check",
                "--quiet",
            ),
            *("download", "--no-deps", "--no-binary", ":all:", "--dest", folder),
            f"{name}=={release}",
        )
        [sdist] = folder.glob("*.tar.gz")
        shutil.unpack_archive(sdist, folder, filter="data")
    [suite] = folder.glob("*/tests")
    return suite


def run_suite(programs: Path, suite: Path, selection: str) -> Outcomes:
    """Each test's outcome: passed, failed or skipped."""
    report = suite.parent / "report.xml"
    report.unlink(missing_ok=True)
    subprocess.run(
        [
            *(programs / "pytest", "-q", "-p", "dependents_plugin", "-k", selection),
            *("-c", os.devnull, "--rootdir", suite, "-o", "asyncio_mode=strict"),
            *("-o", "asyncio_default_fixture_loop_scope=function"),
            *(f"--junitxml={report}", suite),
        ],
        cwd=suite,
        env={**os.environ, **VARIABLES, "PYTHONPATH": str(ROOT / "scripts")},
        stdout=subprocess.DEVNULL,
        check=False,
        timeout=3600,
    )
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314  # pytest's own
        unusual = [child.tag for child in case if child.tag != "system-out"]
        outcome = (
            "skipped" if "skipped" in unusual else "failed" if unusual else "passed"
        )
        outcomes[case.get("name", "")] = outcome
    return outcomes


def count(outcomes: Outcomes) -> str:
    kinds = ("passed", "failed", "skipped")
    numbers = [(list(outcomes.values()).count(kind), kind) for kind in kinds]
    return ", ".join(f"{number} {kind}" for number, kind in numbers if number)


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, timeout=3600)


if __name__ == "__main__":
    main()
