"""Files that survive a crash: staging, fsync, atomic rename, locks, private modes.

Knows nothing of what the files hold. The only module that renames or syncs.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import KVStoreError, StoreLockedError

# What one call of the system takes, on Linux and on macOS.
_MAX_BUFFERS = 1024
# Bytes that one call writes. Smaller writes make many small pages. Larger writes get
# pages of 2 MB, which are slow where a virtual machine has given memory back.
_PIECE = 1024 * 1024
CACHEDIR_TAG = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# This folder is a cache of kvstore; backups may skip it.\n"
)


def cache_home() -> Path:
    """Return the folder for caches: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def make_private_dir(path: Path) -> None:
    """Create a folder, with its parents, that only its owner can enter.

    Raises:
        NotADirectoryError: There is a file in the place of a parent.
    """
    for folder in reversed([path, *path.parents]):
        if not folder.is_dir():
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
            except FileExistsError as error:
                number = errno.ENOTDIR
                raise NotADirectoryError(
                    number, os.strerror(number), str(folder)
                ) from error


def create(path: Path) -> int:
    """Create a new private file and return its descriptor.

    Raises:
        FileExistsError: Something is there already, a dangling link included.
    """
    # With both flags nobody can have put a link there that we would write through.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o600)


def write_all(descriptor: int, *buffers: bytes | memoryview) -> None:
    """Write every byte of some buffers, however short the single writes are."""
    rest = [memoryview(buffer).cast("B") for buffer in buffers]
    while rest:
        piece, room = [], _PIECE
        for buffer in rest[:_MAX_BUFFERS]:
            piece.append(buffer[:room])
            room -= len(piece[-1])
            if not room:
                break
        _drop(rest, os.writev(descriptor, piece))


def _drop(rest: list[memoryview], count: int) -> None:
    """Take off what one call has moved, which may end in the middle of a buffer."""
    done = 0
    while done < len(rest) and count >= len(rest[done]):
        count -= len(rest[done])
        done += 1
    del rest[:done]
    if count:
        rest[0] = rest[0][count:]


def sync(descriptor: int) -> None:
    """Force a file to the medium.

    An error is final: the kernel may have dropped the pages, so never retry.
    """
    # On macOS, fsync stops at the drive's own cache.
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is None:
        os.fsync(descriptor)
    else:
        fcntl.fcntl(descriptor, full_sync)


def sync_file(path: Path) -> None:
    """Force a file that is closed already to the medium."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync_dir(path: Path) -> None:
    """Force the names in a folder to the medium."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staged(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield a new private file in ``folder`` that is gone again at the end.

    Rename it away to keep it.
    """
    with staged_path(folder) as path:
        descriptor = create(path)
        try:
            # By which others see that it is not left over; it goes with the process.
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield path, descriptor
        finally:
            os.close(descriptor)


@contextmanager
def staged_path(folder: Path) -> Iterator[Path]:
    """Yield a new name in ``folder``; what :func:`create` makes there goes at the end.

    For many files, of which not each is to keep a descriptor.
    """
    path = folder / secrets.token_hex(16)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def publish(path: Path, target: Path) -> None:
    """Rename a synced file to where it is seen, and make the new name last."""
    if not target.parent.is_dir():
        make_private_dir(target.parent)
        # A new folder is a name in its parent, which has to last too.
        sync_dir(target.parent.parent)
    os.replace(path, target)
    sync_dir(target.parent)


def write_atomic(target: Path, data: bytes, staging: Path) -> None:
    """Put ``data`` at ``target``: after a crash the old bytes or the new ones.

    Raises:
        OSError: What was written reads as something else. The old bytes stay.
    """
    with staged(staging) as (path, descriptor):
        write_all(descriptor, data)
        sync(descriptor)
        if path.read_bytes() != data:
            raise OSError(errno.EIO, "reads otherwise than it was written", str(target))
        publish(path, target)


def write_new(target: Path, data: bytes) -> None:
    """Put ``data`` into a new private file, which lasts when this returns.

    Raises:
        FileExistsError: There is one.
    """
    with staged(target.parent) as (path, descriptor):
        write_all(descriptor, data)
        sync(descriptor)
        # A link, since a rename would replace what is there.
        os.link(path, target)
        sync_dir(target.parent)


_UNFINISHED = ".kvstore-"
# What else begins so is the user's.
_OURS = re.compile(re.escape(_UNFINISHED) + "[0-9a-f]{16}")


def _create_nameless(folder: Path) -> int | None:
    """Return a new private file in a folder that has no name; ``None`` for no such."""
    flags = getattr(os, "O_TMPFILE", 0)
    if not flags or not os.path.exists("/proc/self/fd"):
        return None
    try:
        return os.open(folder, flags | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError:
        return None  # the file system has none; what else is wrong, a name will tell


def check_new(path: Path, *, overwrite: bool) -> None:
    """Refuse a path that a user's file could not be written to.

    Raises:
        KVStoreError: There is a file, or no folder.
    """
    if path.exists() and not overwrite:
        raise KVStoreError(
            f"there is a file already: `{path}`", hint="`--overwrite` replaces it"
        )
    if not path.parent.is_dir():
        raise KVStoreError(
            f"no such folder: `{path.parent}`", hint="make it, or choose another"
        )


@contextmanager
def written_whole(target: Path) -> Iterator[int]:
    """Yield a new private file that takes the place of ``target`` if all goes well.

    Where the system can, it has no name until then, so that a kill leaves nothing. What
    a kill has left elsewhere goes when the next file is written into the folder.
    """
    for left in target.parent.glob(f"{_UNFINISHED}*"):
        if _OURS.fullmatch(left.name) and is_regular(left):
            with suppress(OSError):  # another user's, say
                remove_unused(left)
    path = target.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}")
    descriptor, has_name = _create_nameless(target.parent), False
    if descriptor is None:
        descriptor, has_name = create(path), True
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield descriptor
        sync(descriptor)
        if not has_name:
            # The folder is for nothing but to have the link followed.
            os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor)
        publish(path, target)
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def sizes_in(folder: Path) -> dict[Path, int]:
    """Return the bytes of everything in a folder; what vanishes is left out."""
    found = {}
    with suppress(FileNotFoundError), os.scandir(folder) as items:
        for item in items:
            with suppress(FileNotFoundError):
                found[Path(item.path)] = item.stat(follow_symlinks=False).st_size
    return found


def remove(path: Path) -> None:
    """Unlink a file and make that last."""
    path.unlink()
    sync_dir(path.parent)


def remove_any(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
        sync_dir(path.parent)
    else:
        remove(path)


def remove_unused(path: Path) -> bool:
    """Remove a staged file, unless somebody is writing it; whether it is gone.

    Raises:
        OSError: Too many files are open to tell.
    """
    try:
        descriptor, _ = open_regular(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # which tells nothing of the file
        remove_any(path)  # a folder or a pipe is no staged file
        return True
    try:
        # Whoever writes it holds a shared lock, which goes with the process.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError):
            remove(path)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def open_regular(path: Path) -> tuple[int, int]:
    """Open a file for reading and return its descriptor and size.

    Raises:
        FileNotFoundError: There is none.
        OSError: It is a link, not a regular file, or another user's.
    """
    # Without O_NONBLOCK, a pipe would be waited for.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_uid not in (os.geteuid(), 0) and os.geteuid() != 0:
            raise PermissionError(errno.EPERM, "belongs to another user", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def is_regular(path: Path, *, or_missing: bool = False) -> bool:
    """Whether a path is a file, and no link, folder or pipe; or nothing, if asked."""
    # Asked once: another process may make or remove it meanwhile.
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return or_missing


def read_into(descriptor: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Fill buffers of bytes, one after the other, from ``offset`` on.

    Raises:
        EOFError: The file ends before.
    """
    rest = [buffer for buffer in buffers if len(buffer)]
    while rest:
        count = os.preadv(descriptor, rest[:_MAX_BUFFERS], offset)
        if count == 0:
            raise EOFError(f"file ends at byte {offset}")
        offset += count
        _drop(rest, count)


def forget_cached(descriptor: int) -> None:
    """Have the next read of a file come from the medium, where the system can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def read_small(path: Path, limit: int) -> bytes:
    """Return the bytes of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: As :func:`open_regular`.
        ValueError: The file is larger.
    """
    descriptor, size = open_regular(path)
    try:
        if size > limit:
            raise ValueError(f"{size} bytes, more than {limit}")
        data = bytearray(size)
        read_into(descriptor, [memoryview(data)], 0)
        return bytes(data)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, *, exclusive: bool, timeout_s: float = 10.0) -> Iterator[None]:
    """Hold an advisory lock on ``path``, shared or exclusive.

    Raises:
        StoreLockedError: Others held it for ``timeout_s``.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    # The file is never removed: who waits has it open, and would hold a lock on a file
    # that nobody else opens any more.
    descriptor = os.open(path, flags, 0o600)
    try:
        _acquire(descriptor, path, exclusive, time.monotonic() + timeout_s)
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, exclusive: bool, deadline: float) -> None:
    """Wait for the lock until ``deadline``."""
    mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    while True:
        # Asked again and again, since a wait inside of the system knows no deadline.
        try:
            return fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise StoreLockedError(
                    f"the store is locked by another process: {path}",
                    hint="wait for the other kvstore process to finish",
                ) from error
            time.sleep(0.01)
