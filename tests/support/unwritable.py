"""A file that nobody can write, not even root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def unwritable(path: str) -> Iterator[None]:
    """Within this context, nobody can change the file or folder."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        mode = os.stat(path).st_mode
        os.chmod(path, mode & ~0o222)
        try:
            yield
        finally:
            os.chmod(path, mode)
        return
    chattr = shutil.which("chattr")
    if not chattr or subprocess.run([chattr, "+i", path], timeout=60).returncode:
        # Modes do not stop root, and some file systems lack this flag.
        pytest.skip("nothing here stops root from writing")  # no chattr +i
    try:
        yield
    finally:
        subprocess.run([chattr, "-i", path], check=True, timeout=60)
