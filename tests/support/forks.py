"""Runs commands of `datasette`, each in a forked process: a start of Python for all.

    python -m support.forks

Reads a JSON object a line: `arguments`, `stdin`, and `environment` to add. Answers with a
line each: `status`, `stdout`, `stderr`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

from datasette.cli import cli


def run(job: dict[str, Any]) -> dict[str, Any]:
    with (
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
    ):
        stdin.write(job["stdin"].encode())
        stdin.seek(0)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            for number, file in enumerate((stdin, stdout, stderr)):
                os.dup2(file.fileno(), number)
            sys.stdin = open(0, closefd=False)  # noqa: SIM115  # for as long as it runs
            os.environ.update(job["environment"])
            try:
                status = cli(job["arguments"], "datasette", standalone_mode=True)
            except SystemExit as left:
                status = left.code
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status if isinstance(status, int) else int(status is not None))
        _, status = os.waitpid(pid, 0)
        stdout.seek(0)
        stderr.seek(0)
        return {
            "status": os.waitstatus_to_exitcode(status),
            "stdout": stdout.read().decode("utf-8", "replace"),
            "stderr": stderr.read().decode("utf-8", "replace"),
        }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
