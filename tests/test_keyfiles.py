"""New keys in the files of a key ring: `new-key` and `key-id`."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from support import zero
from support.console import Console, key_id
from support.unwritable import unwritable
from test_faults import HERE, fault_shim

from datasette_secrets import NotConfigured, envelope, keyfiles

__all__ = ["fault_shim"]

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


class Ring(Console):
    """An operator's folder whose keys are in two files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.first, self.second = folder / "master.key", folder / "old-master.key"
        self.first.touch(0o600)
        self.first.write_text(self.key + "\n")
        self.second.touch(0o600)
        self.use(self.first, self.second)

    def use(self, *paths: Path) -> None:
        self.configure(*({"$file": str(path)} for path in paths))

    def ids(self) -> list[str]:
        """The key IDs in the two files."""
        return [
            key_id(text) if (text := path.read_text()) else ""
            for path in (self.first, self.second)
        ]

    def unchanged(self, *arguments: str) -> str:
        """What `new-key` says when it refuses, and leaves the folder as it is."""
        before = {path.name: path.stat() for path in self.folder.iterdir()}
        said = self.refused("new-key", *arguments)
        after = {path.name: path.stat() for path in self.folder.iterdir()}
        assert {name: each.st_mtime_ns for name, each in before.items()} == {
            name: each.st_mtime_ns for name, each in after.items()
        }
        return said


@pytest.fixture
async def ring(tmp_path: Path) -> Ring:
    ring = Ring(tmp_path)
    await ring.fill("A", versions=2)
    return ring


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_the_current_key_moves_to_the_second_file_and_a_new_one_becomes_first(
    ring: Ring,
) -> None:
    old = key_id(ring.key)
    said = ring.ok("new-key")
    new, second = ring.ids()
    assert (second, new != old) == (old, True)
    assert f"New key, primary: {new}, in {ring.first}\n" in said
    assert f"Old key: {old}, in {ring.second}\n" in said
    assert ring.first.read_text() not in said
    assert (mode(ring.first), mode(ring.second)) == (0o600, 0o600)
    assert sorted(os.listdir(ring.folder)) == [
        "datasette.yaml",
        "internal.db",
        "master.key",
        "old-master.key",
    ]
    ring.ok("rotate-key")
    assert [key["versions"] for key in ring.json("status")["keys"]] == [2, 0]


def test_the_next_commands_can_be_pasted(ring: Ring) -> None:
    said = ring.ok("new-key")
    lines = re.findall(r"(?:secrets) (rotate-key|status) (.*)", said)
    assert [name for name, _ in lines] == ["rotate-key", "status"]
    for name, options in lines:
        line = f"{sys.executable} -m datasette secrets {name} {options}"
        done = subprocess.run(["sh", "-c", line], check=False, timeout=120)
        assert done.returncode == 0


def test_with_several_servers_it_takes_two_steps(ring: Ring) -> None:
    old = key_id(ring.key)
    said = ring.ok("new-key", "--second")
    assert "new-key --swap" in said
    first, new = ring.ids()
    assert first == old
    assert new not in ("", old)
    assert f"Primary key: {old}, in" in said
    assert f"New key, not used yet: {new}, in" in said
    assert f"Primary key: {new}, in" in ring.ok("new-key", "--swap")
    assert ring.ids() == [new, old]
    ring.ok("rotate-key")
    assert ring.value("A") == "A value 2"


@pytest.mark.parametrize("step", [(), ("--second",), ("--swap",)])
def test_a_second_file_whose_key_rows_need_is_left_as_it_is(
    ring: Ring, step: tuple[str, ...]
) -> None:
    ring.ok("new-key")
    ids = ring.ids()
    said = ring.unchanged(*step)
    assert ids[1] in said
    assert "rotate-key" in said
    assert ring.ids() == ids


@pytest.mark.parametrize("step", [(), ("--second",)])
def test_a_key_that_no_row_needs_is_kept_beside_its_file(
    ring: Ring, step: tuple[str, ...]
) -> None:
    unneeded = envelope.generate_master_key()
    ring.second.write_text(unneeded)
    said = ring.ok("new-key", *step)
    kept = Path(f"{ring.second}.{key_id(unneeded)}")
    assert str(kept) in said
    assert (kept.read_text().strip(), mode(kept)) == (unneeded, 0o600)


def test_a_key_is_not_kept_over_another_one(ring: Ring) -> None:
    unneeded = envelope.generate_master_key()
    ring.second.write_text(unneeded)
    kept = Path(f"{ring.second}.{key_id(unneeded)}")
    kept.write_text(envelope.generate_master_key())
    assert "holds another key" in ring.refused("new-key")
    assert ring.ids() == [key_id(ring.key), key_id(unneeded)]
    kept.write_text(unneeded)
    ring.ok("new-key")


def test_the_second_file_may_hold_the_first_key_as_well(ring: Ring) -> None:
    shutil.copy(ring.first, ring.second)
    ring.ok("new-key")
    assert ring.ids()[1] == key_id(ring.key)


def test_a_missing_second_file_is_made(ring: Ring) -> None:
    ring.second.unlink()
    ring.ok("new-key")
    assert (ring.ids()[1], mode(ring.second)) == (key_id(ring.key), 0o600)


def test_rows_of_0x_are_upgraded_first(tmp_path: Path) -> None:
    ring = Ring(tmp_path)
    zero.write(str(ring.internal), [("A", 1, zero.token(ring.key, "value"))])
    assert "datasette secrets upgrade" in ring.unchanged()


def test_a_swap_needs_a_new_key_in_the_second_file(ring: Ring) -> None:
    assert "--second" in ring.unchanged("--swap")


def test_the_two_steps_are_not_one(ring: Ring) -> None:
    assert "restart" in ring.refused("new-key", "--second", "--swap", code=2)


def test_a_ring_that_is_not_in_files_is_refused(ring: Ring) -> None:
    for keys in (
        (ring.key,),
        ({"$file": str(ring.first)},),
        ({"$file": str(ring.first)}, {"$env": "OLD"}),
    ):
        ring.configure(*keys)
        said = ring.unchanged()
        assert "two files" in said
        assert "empty second file" in said


def test_a_configuration_that_cannot_be_used_is_named_as_it_is(ring: Ring) -> None:
    ring.configure("no key")
    assert "a key has 44" in ring.unchanged()
    ring.configure(ring.key)
    assert "restart" in ring.refused("new-key", "--second", "--swap", code=2)


def test_two_entries_that_are_one_file_are_refused(ring: Ring) -> None:
    ring.second.unlink()
    ring.second.symlink_to(ring.first)
    assert "one file" in ring.unchanged()
    ring.second.unlink()
    ring.second.hardlink_to(ring.first)
    assert "one file" in ring.unchanged()


def test_links_are_followed_and_stay_links(ring: Ring) -> None:
    (ring.folder / "real").mkdir()
    real = ring.folder / "real" / "key"
    ring.first.rename(real)
    ring.first.symlink_to(real)
    ring.ok("new-key")
    assert ring.first.is_symlink()
    assert ring.ids()[1] == key_id(ring.key)
    assert key_id(real.read_text()) == ring.ids()[0] != key_id(ring.key)


def test_what_is_not_a_regular_file_is_refused(ring: Ring) -> None:
    ring.second.unlink()
    ring.second.symlink_to("/dev/null")
    assert "not a regular file" in ring.unchanged()


def test_a_group_that_was_let_in_on_purpose_stays_so(ring: Ring) -> None:
    ring.first.chmod(0o640)
    ring.second.chmod(0o644)
    ring.ok("new-key")
    assert (mode(ring.first), mode(ring.second)) == (0o640, 0o600)


@pytest.mark.skipif(not IS_ROOT, reason="only root can give files away")
def test_run_as_root_the_files_stay_those_of_the_service(ring: Ring) -> None:
    unneeded = envelope.generate_master_key()
    ring.second.write_text(unneeded)
    for path in (ring.first, ring.second):
        os.chown(path, 4321, 4322)
    ring.ok("new-key")
    kept = Path(f"{ring.second}.{key_id(unneeded)}")
    for path in (ring.first, ring.second, kept):
        assert (path.stat().st_uid, path.stat().st_gid) == (4321, 4322)


def test_on_a_read_only_mount_nothing_is_changed(ring: Ring) -> None:
    folder = ring.folder / "mounted"
    folder.mkdir()
    for path in (ring.first, ring.second):
        shutil.move(path, folder / path.name)
    ring.first, ring.second = folder / "master.key", folder / "old-master.key"
    ring.use(ring.first, ring.second)
    ids = ring.ids()
    line = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    mounted = ["unshare", "--mount", "sh", "-c", line, str(folder)]
    command = ring.command("new-key")
    # Nobody but root may mount, and not in every container.
    can_mount = (
        IS_ROOT and not subprocess.run([*mounted, "true"], timeout=60).returncode
    )
    with nullcontext() if can_mount else unwritable(str(folder)):
        done = subprocess.run(
            [*mounted, *command] if can_mount else command,
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 1
    assert "cannot be replaced" in done.stderr
    assert ring.ids() == ids
    assert sorted(os.listdir(folder)) == ["master.key", "old-master.key"]


def test_a_second_run_at_the_same_time_is_refused(ring: Ring) -> None:
    folder = os.open(ring.folder, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    assert "another new-key" in ring.unchanged()
    os.close(folder)


def test_of_two_runs_at_once_one_makes_a_key(ring: Ring) -> None:
    running = [ring.start("new-key") for _ in range(2)]
    for process in running:
        process.communicate(timeout=120)
    assert sorted(process.returncode for process in running) == [0, 1]
    new, second = ring.ids()
    assert (second, new != second) == (key_id(ring.key), True)


def test_killed_at_any_write_no_key_is_lost_and_the_next_run_finishes(
    fault_shim: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "support.keyfile_faults"],
        cwd=HERE,
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, "LD_PRELOAD": str(fault_shim)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    assert report["killed"] > 100


# key-id


def test_key_id_names_each_key_and_shows_none(ring: Ring) -> None:
    keys = [envelope.generate_master_key() for _ in range(3)]
    file = ring.folder / "some.keys"
    file.write_text(f"{keys[0]}\n{keys[1]},{keys[2]}\n")
    expected = "".join(key_id(key) + "\n" for key in keys)
    ring.options = []
    assert ring.ok("key-id", str(file)) == expected
    assert ring.ok("key-id", "-", input=file.read_text()) == expected


@pytest.mark.parametrize("text", ["", "no key", "k" * 44, "\x00\xff", "{key}{key}"])
def test_key_id_says_what_is_no_key_and_repeats_nothing(ring: Ring, text: str) -> None:
    ring.options = []
    said = ring.refused("key-id", "-", input=text.replace("{key}", ring.key))
    assert ring.key not in said
    assert "kkk" not in said


def test_a_key_in_place_of_a_file_is_not_repeated(ring: Ring) -> None:
    ring.options = []
    for arguments in ((ring.key,), ("-", ring.key), (ring.key, ring.key)):
        result = ring.run("key-id", *arguments, input=ring.key)
        assert result.exit_code in (1, 2)
        assert ring.key not in result.output


def test_where_new_key_cannot_work_it_says_so_and_makes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "master.key", tmp_path / "old-master.key"
    first.write_text(envelope.generate_master_key())
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        with pytest.raises(NotConfigured, match="needs a POSIX system"):
            keyfiles.make_second([str(first), str(second)])
    assert not second.exists()
