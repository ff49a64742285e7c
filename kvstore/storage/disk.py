"""What a disk is and how fast it is. Knows no store; leaves nothing behind."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from . import files

_CHUNK = 1 << 20
_NUM_CHUNKS = 32
_NUM_SYNCS = 5
_MOUNTS = Path("/proc/self/mountinfo")


def measure_disk(folder: Path) -> dict[str, float]:
    """Write, sync and read 32 MB in a folder, and sync some small files.

    Returns:
        Bytes per second written and synced, in one file, ``write_bps``; read back, from
        memory where the system keeps them there, ``read_bps``; and the seconds that a
        small file takes to be durable, its name included, ``sync_s``, the median.

    Raises:
        OSError: It cannot be written, or the disk is full or fails.
    """
    data = os.urandom(_CHUNK)  # a file system may compress zeros
    with files.staged(folder) as (path, descriptor):
        begin = time.perf_counter()
        for _ in range(_NUM_CHUNKS):
            files.write_all(descriptor, data)
        files.sync(descriptor)
        write_s = time.perf_counter() - begin
        read_s = _time_read(path)
    sync_s = statistics.median(_time_sync(folder) for _ in range(_NUM_SYNCS))
    nbytes = _CHUNK * _NUM_CHUNKS
    write_bps, read_bps = nbytes / write_s, nbytes / read_s
    return {"write_bps": write_bps, "read_bps": read_bps, "sync_s": sync_s}


def _time_read(path: Path) -> float:
    descriptor, nbytes = files.open_regular(path)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = memoryview(bytearray(_CHUNK))
        begin = time.perf_counter()
        for offset in range(0, nbytes, _CHUNK):
            files.read_into(descriptor, [buffer], offset)
        return time.perf_counter() - begin
    finally:
        os.close(descriptor)


def _time_sync(folder: Path) -> float:
    with files.staged(folder) as (_, descriptor):
        files.write_all(descriptor, b"x" * 4096)
        begin = time.perf_counter()
        files.sync(descriptor)
        files.sync_dir(folder)
        return time.perf_counter() - begin


def file_system_of(path: Path) -> str | None:
    """Return the type of the file system that a path lies on, such as ``ext4``.

    Returns:
        ``None`` where the system does not say.
    """
    mounts = _linux_mounts() if sys.platform == "linux" else _bsd_mounts()
    real = path.resolve()
    # What was mounted later hides what was there before.
    found = [(len(point.parts), kind) for point, kind in mounts if _is_in(real, point)]
    deepest = max((depth for depth, _ in found), default=0)
    return next((kind for depth, kind in reversed(found) if depth == deepest), None)


def _is_in(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents


def _linux_mounts() -> list[tuple[Path, str]]:
    try:
        lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    return [_parse_mount(line) for line in lines if " - " in line]


def _parse_mount(line: str) -> tuple[Path, str]:
    """Return mount point and type, from a line of ``mountinfo``."""
    before, _, behind = line.partition(" - ")
    point = before.split()[4]
    for code, letter in (("\\040", " "), ("\\011", "\t"), ("\\134", "\\")):
        point = point.replace(code, letter)
    return Path(point), behind.split()[0]


def _bsd_mounts() -> list[tuple[Path, str]]:
    """Return mount points and types as ``mount`` lists them on a Mac."""
    try:
        done = subprocess.run(
            ["/sbin/mount"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = []
    for line in done.stdout.splitlines():
        where, _, options = line.rpartition(" (")
        _, _, point = where.partition(" on ")
        found.append((Path(point), options.split(",")[0].rstrip(")")))
    return found
