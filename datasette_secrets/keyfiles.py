"""Reads key files, puts a new master key into those of a ring, and never loses one.

A new file is written, synced and renamed over the old one. Killed at any moment, every key
that rows need is in one of the two files, and the next run finishes. Anything but a regular
file is refused. A key that leaves the ring is kept beside its file.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from .envelope import MasterKey, generate_master_key
from .errors import InvalidMasterKey, NotConfigured, without_frames

READ_MAX = 65_536
#: How long to wait for the writer of a pipe.
_READ_SECONDS = 10


@dataclass(frozen=True)
class _KeyFile:
    """A file of a key ring as it was when it was read. `key_id`: empty without a key."""

    path: str
    text: str = field(repr=False)
    key_id: str


class Replaced(NamedTuple):
    """The files of a ring after a change, the key ID in each, and where a key was kept."""

    first: str
    first_id: str
    second: str
    second_id: str
    kept: str | None


@without_frames
def key_ids(text: str) -> list[str]:
    """The key IDs of the keys in `text`, separated by white space or commas."""
    found = []
    for number, each in enumerate(text.replace(",", " ").split(), 1):
        try:
            found.append(MasterKey.parse(each).id)
        except InvalidMasterKey as error:
            raise InvalidMasterKey(f"Key {number} cannot be used: {error}") from None
    return found


def read_file(path: str, *, pipes: bool = True) -> bytes:
    """What is in a key file, up to 65,536 bytes. Raises OSError.

    `pipes`: also follow links, and read what a shell or a supervisor hands over, such as
    `/dev/stdin` and `/dev/fd/63`. Nothing waits for ever: not for a FIFO, nor for a device
    without an end.
    """
    flags = os.O_RDONLY if pipes else os.O_RDONLY | os.O_NOFOLLOW
    # Without O_NONBLOCK, which Windows lacks, opening a FIFO would wait for its writer.
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        is_regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if not is_regular and not (pipes and path.startswith(("/dev/", "/proc/"))):
            raise OSError(errno.EINVAL, "it is not a regular file")
        content = b""
        deadline = time.monotonic() + _READ_SECONDS
        while len(content) <= READ_MAX:
            try:
                part = os.read(descriptor, READ_MAX + 1 - len(content))
            except BlockingIOError:
                if time.monotonic() > deadline:
                    reason = f"it did not end within {_READ_SECONDS} seconds"
                    raise OSError(errno.ETIMEDOUT, reason) from None
                time.sleep(0.01)
                continue
            if not part:
                return content
            content += part
        raise OSError(errno.EFBIG, f"it has more than {READ_MAX:,} bytes")
    finally:
        os.close(descriptor)


def make_second(paths: Sequence[str | None]) -> None:
    """Make the second file of the ring, empty, if that alone is missing."""
    first, second = _resolved(paths)
    if os.path.isfile(first) and not os.path.lexists(second):
        with _explained(second, "created"):
            os.close(_create(second, like=first))


@without_frames
def replace(paths: Sequence[str | None], how: str, needed: Collection[str]) -> Replaced:
    """Change the keys in the first two files of a key ring.

    `how`: `new` puts a new key into the first file and its key into the second; `second`
    puts a new key into the second; `swap` exchanges the two. `needed`: the IDs of the keys
    that rows need. Raises NotConfigured; every key is then where it was, or the same call
    finishes what was begun.
    """
    first, second = _resolved(paths)
    with _locked({os.path.dirname(first), os.path.dirname(second)}):
        one, two = _read(first), _read(second)
        begun = _leftover(first)
        if begun and one.key_id == two.key_id:
            if how == "second":
                raise NotConfigured(
                    "An earlier exchange of keys was interrupted. Finish it with "
                    "'datasette secrets new-key --swap'"
                )
            _commit(first)
            done = Replaced(first, begun.key_id, second, two.key_id, None)
        else:
            _check(one, two, how, needed)
            for path, left in ((first, begun), (second, _leftover(second))):
                if left and left.key_id not in (one.key_id, two.key_id):
                    _keep(left, path)
            done = _replace(one, two, how)
        found = _read(first).key_id, _read(second).key_id
        if found != (done.first_id, done.second_id):
            raise NotConfigured(
                f"{first} and {second} do not hold what was written into them: look at "
                "both with 'datasette secrets key-id'"
            )
        return done


def _replace(one: _KeyFile, two: _KeyFile, how: str) -> Replaced:
    kept = None
    new = two.text if how == "swap" else generate_master_key()
    new_id = MasterKey.parse(new).id
    ids, wanted = (new_id, one.key_id), [(two, one.text), (one, new)]
    if how == "second":
        ids, wanted = (one.key_id, new_id), [(two, new)]
    try:
        for file, text in wanted:
            _stage(file.path, text, like=file.path)
        if how != "swap" and two.key_id not in ("", one.key_id):
            kept = _keep(two, two.path)
    except NotConfigured:
        for file, _ in wanted:
            with suppress(OSError):
                os.unlink(_temporary(file.path))
        raise
    # After the first of two steps, both files hold the same key. If this is killed then,
    # the next run goes on.
    for file, _ in wanted:
        _commit(file.path)
    return Replaced(one.path, ids[0], two.path, ids[1], kept)


def _resolved(paths: Sequence[str | None]) -> tuple[str, str]:
    if os.name != "posix":  # Windows has no O_NOFOLLOW, fchown or fcntl
        raise NotConfigured("new-key needs a POSIX system")
    if len(paths) < 2 or paths[0] is None or paths[1] is None:
        raise NotConfigured(
            "new-key needs two files as the first entries of encryption-key, such as "
            "'- $file: master.key' and '- $file: old-master.key'. Make an empty second "
            "file, and list it second"
        )
    first, second = os.path.realpath(paths[0]), os.path.realpath(paths[1])
    if first == second or (os.path.exists(second) and os.path.samefile(first, second)):
        raise NotConfigured(f"Both entries of encryption-key are one file: {first}")
    return first, second


def _check(one: _KeyFile, two: _KeyFile, how: str, needed: Collection[str]) -> None:
    if two.key_id != one.key_id and two.key_id in needed:
        raise NotConfigured(
            f"Nothing was changed: {two.path} holds master key {two.key_id}, which "
            "stored versions need. Restart every server, run 'datasette secrets "
            "rotate-key', and then try again"
        )
    if how == "swap" and two.key_id in ("", one.key_id):
        raise NotConfigured(
            f"{two.path} has no new key. Put one there with 'datasette secrets new-key "
            "--second', and restart every server"
        )


def _read(path: str) -> _KeyFile:
    """What is in the file. Raises NotConfigured for anything but a file with one key."""
    with _explained(path, "read"):
        text = read_file(path, pipes=False).decode("ascii", "replace").strip()
    try:
        key_id = MasterKey.parse(text).id if text else ""
    except InvalidMasterKey as error:
        raise NotConfigured(f"{path} is not a master key: {error}") from None
    return _KeyFile(path, text, key_id)


def _leftover(path: str) -> _KeyFile | None:
    """The key that a killed run was about to put into `path`, if it is whole."""
    try:
        file = _read(_temporary(path))
    except NotConfigured:
        return None
    return file if file.key_id else None


def _keep(file: _KeyFile, path: str) -> str:
    """Keep the key of this file as `PATH.KEYID`."""
    kept = f"{path}.{file.key_id}"
    if os.path.lexists(kept):
        if _read(kept).key_id == file.key_id:
            return kept
        raise NotConfigured(f"{kept} holds another key: move it away")
    _stage(kept, file.text, like=file.path)
    _commit(kept)
    return kept


def _temporary(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.datasette-secrets")


def _stage(path: str, text: str, like: str) -> None:
    """Write what is to replace `path` to a file beside it, and sync it."""
    with _explained(path):
        # An earlier run was killed. Its file is torn, or its key is kept elsewhere.
        with suppress(FileNotFoundError):
            os.unlink(_temporary(path))
        with open(_create(_temporary(path), like), "wb") as file:
            file.write(text.encode("ascii") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(path)


def _create(path: str, like: str) -> int:
    """Open a new file for writing, for the owner and the group of another one."""
    descriptor = os.open(
        path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600
    )
    try:
        mine, other = os.fstat(descriptor), os.stat(like)
        if (mine.st_uid, mine.st_gid) != (other.st_uid, other.st_gid):
            os.fchown(descriptor, other.st_uid, other.st_gid)
        # Somebody chose 0640, for a server that reads as the group. Nobody chooses 0644.
        if other.st_mode & 0o044 == 0o040:
            os.fchmod(descriptor, 0o640)
    except OSError:
        os.close(descriptor)
        os.unlink(path)
        raise NotConfigured(
            f"Nothing was changed: a key file in {os.path.dirname(path)} belongs to "
            "another user or group. Run this as that user, or as root"
        ) from None
    return descriptor


def _commit(path: str) -> None:
    with _explained(path):
        os.replace(_temporary(path), path)
        _sync_folder(path)


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _explained(path: str, verb: str = "replaced") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or "unknown reason"
        raise NotConfigured(f"{path} cannot be {verb}: {reason}") from None


@contextmanager
def _locked(folders: Collection[str]) -> Iterator[None]:
    """Refuse a second run in the same folders. Ends with the process."""
    import fcntl

    with ExitStack() as opened:
        for folder in sorted(folders):
            with _explained(folder, "locked"):
                descriptor = os.open(folder, os.O_RDONLY)
                opened.callback(os.close, descriptor)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise NotConfigured(
                        "Nothing was changed: another new-key command is running in "
                        f"{folder}"
                    ) from None
        yield
