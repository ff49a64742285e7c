"""Shards that arrive piece by piece, and that a crash may leave half written.

Such a file is as long as the shard from the start, with holes where nothing has come.
Which blocks have come is told by their digests, so nothing else is noted about it.
`prune` takes it for forgotten when nobody has touched it for an hour.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


def prepare_partial(staging: Path, name: str, nbytes: int) -> Path:
    """Return the file of a shard that is to arrive, with what an earlier try has left.

    Raises:
        OSError: The disk is full or fails.
    """
    path = staging / f"{name}.partial"
    with suppress(FileNotFoundError):
        path.chmod(0o600)  # an earlier try may have been about to publish it
    descriptor = os.open(path, _OPEN | os.O_CREAT, 0o600)
    try:
        os.ftruncate(descriptor, nbytes)
        os.utime(path)
    finally:
        os.close(descriptor)
    return path


def write_at(path: Path, offset: int, data: memoryview) -> None:
    """Write bytes at their place in the file; several threads may.

    Raises:
        OSError: The disk is full or fails.
    """
    rest = data.cast("B")
    descriptor = os.open(path, _OPEN)
    try:
        while rest:
            count = os.pwrite(descriptor, rest, offset)
            rest, offset = rest[count:], offset + count
    finally:
        os.close(descriptor)
