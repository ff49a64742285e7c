"""Files that survive a crash: staging, atomic writes, syncs, locks, modes."""

import errno
import os
import stat
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest

from kvstore.errors import StoreLockedError
from kvstore.storage import files

HOLD = """
import sys, time
from pathlib import Path
from kvstore.storage import files
with files.locked(Path(sys.argv[1]), exclusive=sys.argv[2] == "exclusive"):
    print("held", flush=True)
    sys.stdin.read()
"""


class Stop(BaseException):
    """What an interrupt looks like to the code under test."""


@pytest.fixture
def staging(tmp_path):
    """A folder to write in before the rename."""
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


@pytest.fixture
def hold():
    """A function that has another process hold a lock until it is told to stop."""
    running = []

    def start(path, kind):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, path, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        running.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def mode(path):
    """Return the permission bits of a file."""
    return stat.S_IMODE(path.stat().st_mode)


def record_calls(monkeypatch):
    """Record what is written, synced and renamed, in order."""
    calls = []

    def wrap(name):
        original = getattr(os, name)

        def wrapped(*arguments, **options):
            calls.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(os, name, wrapped)

    for name in ("writev", "fsync", "replace", "unlink"):
        wrap(name)
    return calls


def test_an_atomic_write_puts_the_bytes_there(tmp_path, staging):
    """What was written is read back, and nothing is left in the staging folder."""
    target = tmp_path / "entries" / "x.json"
    files.write_atomic(target, b"hello", staging)
    assert b"hello" == target.read_bytes()
    assert [] == os.listdir(staging)


@pytest.mark.parametrize("call", ["writev", "fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_bytes_or_the_new(
    tmp_path, staging, monkeypatch, call
):
    """Wherever a write is cut off, a reader sees one whole version."""
    target = tmp_path / "x"
    files.write_atomic(target, b"old", staging)
    count = 0
    outcomes = set()
    for when in range(1, 20):
        count = 0
        original = getattr(os, call)

        def stop(*arguments, original=original, when=when):
            nonlocal count
            count += 1
            if count == when:
                raise Stop
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, stop)
            try:
                files.write_atomic(target, b"new", staging)
                break
            except Stop:
                outcomes.add(target.read_bytes())
                assert [] == os.listdir(staging)
                files.write_atomic(target, b"old", staging)
    assert b"new" == target.read_bytes()
    assert outcomes <= {b"old", b"new"}
    assert b"old" in outcomes


def test_bytes_are_synced_before_the_rename_and_the_folder_after(
    tmp_path, staging, monkeypatch
):
    """The order is write, sync, rename, sync of the folder."""
    calls = record_calls(monkeypatch)
    files.write_atomic(tmp_path / "x", b"hello", staging)
    assert ["writev", "fsync", "replace", "fsync"] == [
        call for call in calls if call != "unlink"
    ]


def test_a_new_folder_is_synced_into_its_parent(tmp_path, staging, monkeypatch):
    """A file in a new folder is no safer than the folder's own name."""
    calls = record_calls(monkeypatch)
    files.write_atomic(tmp_path / "new" / "x", b"hello", staging)
    assert ["fsync", "fsync", "replace", "fsync"] == [
        call for call in calls if call not in ("writev", "unlink")
    ]


def test_a_removal_is_synced(tmp_path, monkeypatch):
    """The folder is synced behind an unlink."""
    (tmp_path / "x").write_bytes(b"")
    calls = record_calls(monkeypatch)
    files.remove(tmp_path / "x")
    assert ["unlink", "fsync"] == calls


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_short_writes_lose_nothing(tmp_path, staging, monkeypatch, most):
    """A system call that writes less than it was given is asked again."""
    original = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, data: original(fd, [data[0][:most]]))
    data = bytes(range(100))
    files.write_atomic(tmp_path / "x", data, staging)
    assert data == (tmp_path / "x").read_bytes()


@pytest.mark.parametrize("most", [1, 4, 5, 100])
def test_many_buffers_are_written_in_pieces(tmp_path, monkeypatch, most):
    """No call is given more than a piece, and what it leaves is written next."""
    original = os.writev
    given = []

    def writev(descriptor, buffers):
        given.append(sum(map(len, buffers)))
        return original(descriptor, [b"".join(buffers)[:most]])

    monkeypatch.setattr(os, "writev", writev)
    monkeypatch.setattr(files, "_PIECE", 5)
    descriptor = files.create(tmp_path / "x")
    files.write_all(descriptor, b"", b"ab", b"", memoryview(b"cdefghijk"), b"lm", b"")
    os.close(descriptor)
    assert b"abcdefghijklm" == (tmp_path / "x").read_bytes()
    assert 5 == max(given)


def test_short_reads_lose_nothing(tmp_path, monkeypatch):
    """A system call that reads less than it was asked for is asked again."""
    original = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, at: original(fd, [buffers[0][:3]], at)
    )
    (tmp_path / "x").write_bytes(bytes(range(100)))
    assert bytes(range(100)) == files.read_small(tmp_path / "x", 100)


@pytest.mark.parametrize("when", [1, 2])
def test_a_failed_sync_is_raised_and_never_retried(
    tmp_path, staging, monkeypatch, when
):
    """An error of fsync is final: the kernel may have dropped the pages."""
    calls = 0

    def fail(descriptor):
        nonlocal calls
        calls += 1
        if calls == when:
            raise OSError(errno.EIO, "fsync failed")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="fsync failed"):
        files.write_atomic(tmp_path / "x", b"hello", staging)
    assert when == calls
    assert [] == os.listdir(staging)
    assert (when == 2) == (tmp_path / "x").exists()


def test_what_reads_otherwise_is_not_published(tmp_path, staging, monkeypatch):
    """A disk that writes other bytes than it was given fails, by name."""
    files.write_atomic(tmp_path / "x", b"good", staging)
    original = os.writev
    monkeypatch.setattr(
        os, "writev", lambda fd, data: original(fd, [bytes(len(part)) for part in data])
    )
    with pytest.raises(OSError, match="reads otherwise") as caught:
        files.write_atomic(tmp_path / "x", b"hello", staging)
    assert (errno.EIO, str(tmp_path / "x")) == (
        caught.value.errno,
        caught.value.filename,
    )
    assert b"good" == (tmp_path / "x").read_bytes()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_files_and_folders_are_private_whatever_the_umask(tmp_path, umask):
    """Only the owner can read what is stored."""
    before = os.umask(umask)
    try:
        files.make_private_dir(tmp_path / "tmp")
        files.write_atomic(tmp_path / "sub" / "x", b"hello", tmp_path / "tmp")
        with files.locked(tmp_path / "lock", exclusive=True):
            pass
    finally:
        os.umask(before)
    assert [0o700, 0o700] == [mode(tmp_path / name) for name in ("tmp", "sub")]
    assert [0o600, 0o600] == [mode(tmp_path / name) for name in ("sub/x", "lock")]


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "folder"])
def test_a_new_file_never_takes_what_is_there(tmp_path, kind):
    """A file is created where nothing is, and nowhere else."""
    path = tmp_path / "x"
    if kind == "file":
        path.write_bytes(b"mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "y")
        if kind == "link":
            (tmp_path / "y").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        files.create(path)
    assert (tmp_path / "y").exists() == (kind == "link")


def test_a_link_at_the_target_is_replaced_and_not_followed(tmp_path, staging):
    """An atomic write over a link leaves the file that it points to alone."""
    (tmp_path / "precious").write_bytes(b"mine")
    (tmp_path / "x").symlink_to(tmp_path / "precious")
    files.write_atomic(tmp_path / "x", b"hello", staging)
    assert b"mine" == (tmp_path / "precious").read_bytes()
    assert not (tmp_path / "x").is_symlink()


def test_links_folders_and_pipes_are_not_read(tmp_path):
    """Only a regular file is read, and nothing is waited for."""
    (tmp_path / "real").write_bytes(b"secret")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "folder", "pipe"):
        with pytest.raises(OSError, match=r"regular|symbolic"):
            files.open_regular(tmp_path / name)


def test_a_lock_does_not_follow_a_link(tmp_path):
    """A lock file that is a link is refused."""
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(OSError, match="symbolic"),
        files.locked(tmp_path / "lock", exclusive=True),
    ):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_refused_file_leaves_no_descriptor_open(tmp_path):
    """A file that is not read is closed."""
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        with pytest.raises(OSError, match="regular"):
            files.open_regular(tmp_path)
    assert before == len(os.listdir("/dev/fd"))


def test_a_file_larger_than_its_limit_is_not_read(tmp_path):
    """The limit holds before anything is allocated."""
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="more than 100"):
        files.read_small(tmp_path / "x", 100)


def test_a_read_past_the_end_says_where_the_file_ends(tmp_path):
    """A file that is too short is told from one that is not."""
    (tmp_path / "x").write_bytes(b"hello")
    descriptor, size = files.open_regular(tmp_path / "x")
    try:
        with pytest.raises(EOFError, match="byte 5"):
            files.read_into(descriptor, [memoryview(bytearray(size + 1))], 0)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("exclusive", True), ("exclusive", False), ("shared", True)],
)
def test_locks_exclude_each_other_across_processes(tmp_path, hold, theirs, ours):
    """A lock that another process holds is waited for, and not for ever."""
    hold(tmp_path / "lock", theirs)
    started = time.monotonic()
    with (
        pytest.raises(StoreLockedError, match="locked by another process"),
        files.locked(tmp_path / "lock", exclusive=ours, timeout_s=0.2),
    ):
        pass
    assert time.monotonic() - started >= 0.2


def test_shared_locks_are_held_together(tmp_path, hold):
    """Two processes may hold a lock shared."""
    hold(tmp_path / "lock", "shared")
    with files.locked(tmp_path / "lock", exclusive=False, timeout_s=0):
        pass


def test_a_killed_process_holds_no_lock(tmp_path, hold):
    """The lock of a process that was killed is free at once."""
    process = hold(tmp_path / "lock", "exclusive")
    process.kill()
    process.wait()
    with files.locked(tmp_path / "lock", exclusive=True, timeout_s=0):
        pass


def test_a_lock_is_released_by_an_exception(tmp_path):
    """What fails under a lock does not keep it."""
    with pytest.raises(Stop), files.locked(tmp_path / "lock", exclusive=True):
        raise Stop
    with files.locked(tmp_path / "lock", exclusive=True, timeout_s=0):
        pass


def replace_and_fail(target):
    """Begin to write a file, and fail."""
    with files.written_whole(target) as descriptor:
        files.write_all(descriptor, b"ha")
        raise RuntimeError


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """It takes its place when all is well, private; until then the old one stands."""
    target = tmp_path / "x"
    target.write_text("old")
    with pytest.raises(RuntimeError):
        replace_and_fail(target)
    assert ("old", ["x"]) == (target.read_text(), os.listdir(tmp_path))
    with files.written_whole(target) as descriptor:
        files.write_all(descriptor, b"new")
        assert "old" == target.read_text()
    assert ("new", ["x"]) == (target.read_text(), os.listdir(tmp_path))
    assert 0o600 == stat.S_IMODE(target.stat().st_mode)


def test_only_what_a_killed_write_has_left_is_removed(tmp_path):
    """A user's files and folders stay, though their names begin as ours do."""
    names = [".kvstore-backup", ".kvstore-rc", f".kvstore-{'0' * 16}"]
    (tmp_path / names[0]).mkdir()
    (tmp_path / names[0] / "dear").touch()
    for name in names[1:]:
        (tmp_path / name).touch()
    with files.written_whole(tmp_path / "x"):
        pass
    assert {*names[:2], "x"} == set(os.listdir(tmp_path))
    assert ["dear"] == os.listdir(tmp_path / names[0])


def test_a_file_that_is_being_written_is_not_removed(staging, monkeypatch):
    """Nor where too many files are open to find out."""
    with files.staged(staging) as (path, _):
        assert not files.remove_unused(path)
        broken = OSError(errno.EMFILE, "too many open files")
        monkeypatch.setattr(files, "open_regular", Mock(side_effect=broken))
        with pytest.raises(OSError, match="too many"):
            files.remove_unused(path)
        assert path.exists()
