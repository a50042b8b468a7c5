"""Sends SIGINT to a command just before its n-th callback, for one n after another.

    python -m support.interrupted

Reads a job a line, and answers with a report each, both JSON. A job has the `arguments` of `datasette`, the text for its `stdin`, the folder `pristine`,
which is copied to `work` each time, and how many callbacks are tried. A forked process
runs the command, and another one runs it again on what is left. The report has, for each
n, the exit code, what was said on stderr, and the exit code of the second run.
tests/test_interrupt.py starts this.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from typing import Any

from support import forks

SECONDS = 60


def child(job: dict[str, Any], number: int) -> None:
    from datasette.cli import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run, seen = asyncio.Handle._run, 0

    def run_after_sigint(handle: asyncio.Handle) -> Any:
        nonlocal seen
        seen += 1
        if seen == number:
            open(job["work"] + ".sent", "w").close()
            signal.raise_signal(signal.SIGINT)
        return run(handle)

    asyncio.Handle._run = run_after_sigint  # type: ignore[method-assign, assignment]
    for stream, path in ((0, job["work"] + ".in"), (1, os.devnull)):
        os.dup2(os.open(path, os.O_RDWR), stream)
    os.dup2(os.open(job["work"] + ".err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.chdir(job["work"])
    sys.argv = ["datasette", *job["arguments"]]
    cli()


def run(job: dict[str, Any], number: int) -> tuple[str, str]:
    """Run the command in `work`: its exit code, or `hang`, and what it said."""
    with open(job["work"] + ".in", "w") as file:
        file.write(job["stdin"])
    pid = os.fork()
    if pid == 0:
        signal.alarm(SECONDS)
        try:
            child(job, number)
        except SystemExit as ended:
            os._exit(ended.code if isinstance(ended.code, int) else 99)
        finally:
            os._exit(98)
    _, status = os.waitpid(pid, 0)
    with open(job["work"] + ".err") as file:
        said = file.read()
    if os.WIFSIGNALED(status):
        return "hang" if os.WTERMSIG(status) == signal.SIGALRM else "killed", said
    return str(os.WEXITSTATUS(status)), said


def main() -> None:
    forks.warm_up()
    for line in iter(sys.stdin.readline, ""):
        print(json.dumps(interrupt(json.loads(line))), flush=True)


def interrupt(job: dict[str, Any]) -> list[tuple[str, str, str]]:
    report = []
    for number in range(job["first"], job["callbacks"] + 1, job["step"]):
        shutil.rmtree(job["work"], ignore_errors=True)
        shutil.copytree(job["pristine"], job["work"])
        code, said = run(job, number)
        if not os.path.exists(job["work"] + ".sent"):
            break
        os.unlink(job["work"] + ".sent")
        again = run(job, 0)[0]
        report.append((code, said, again))
    return report


if __name__ == "__main__":
    main()
