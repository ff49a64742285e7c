"""Power cuts: a disk that forgets what was not synced, and what a store is then.

The disk is ext4 or XFS in a file, which root can mount. It is shut down without its
journal being written, as if the power had gone; mounted again, it has what was synced.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kvstore

# The size of a disk, in bytes: XFS wants 300 MB. The file is sparse.
_NUM_BYTES = {"ext4": 1 << 26, "xfs": 5 << 26}
# EXT4_IOC_SHUTDOWN, which is XFS_IOC_GOINGDOWN too, without a flush of the journal.
_SHUTDOWN, _FLAGS = 0x8004587D, struct.pack("I", 2)


class Disk:
    """A disk whose power can be cut.

    Args:
        image: The file that it is in.
        path: Where it is mounted.
    """

    def __init__(self, image: Path, path: Path) -> None:
        self._image, self.path = image, path

    def mount(self) -> None:
        """Mount it, which replays its journal."""
        _run("mount", "-o", "loop", self._image, self.path)

    def unmount(self) -> None:
        """Unmount it; without a power cut, all that was written is on it then."""
        _run("umount", self.path)

    def renew(self) -> None:
        """Mount it again, with its power back."""
        self.unmount()
        self.mount()

    def cut(self) -> None:
        """Cut its power, unless that has happened."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, _FLAGS)
        finally:
            os.close(descriptor)


def file_systems() -> list[str]:
    """Return the file systems that a disk can be made with on this machine."""
    return [name for name in _NUM_BYTES if shutil.which(f"mkfs.{name}")]


@contextmanager
def mounted(folder: Path, file_system: str = "ext4") -> Iterator[Disk]:
    """Yield a new disk.

    Raises:
        CalledProcessError: Nothing can be mounted here; that takes root.
    """
    image, path = folder / "image", folder / "disk"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(_NUM_BYTES[file_system])
    _run(f"mkfs.{file_system}", "-q", image)
    disk = Disk(image, path)
    disk.mount()
    try:
        yield disk
    finally:
        disk.unmount()


def _run(*words: str | Path) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=60)


def cut_in_turn(
    chance: random.Random,
    number: int,
    folder: Path,
    empty: Path,
    kill: Any,
    caches: Any,
    file_system: str,
) -> int:
    """Cut the power of one store so many times, while it is saved to.

    Half of the cuts fall on a call to the disk, before it is made, and half on a random
    moment. What was acknowledged must be there, whole, and all must go on.

    Args:
        chance: Chooses when.
        number: How many cuts.
        folder: For the disk.
        empty: An empty store.
        kill: The test of kills, whose workers save and note what was acknowledged.
        caches: The makers of prompt caches.
        file_system: Of the disk.

    Returns:
        How many saves were acknowledged before a cut.
    """
    saves = 0
    with mounted(folder, file_system) as disk:
        path = shutil.copytree(empty, disk.path / "store")
        os.sync()
        counted = folder / "noted"
        num_calls, duration = _measure(path, counted, kill)
        for turn in range(number):
            when = chance.choice((0, chance.randint(1, num_calls)))
            noted = folder / f"noted-{turn}"
            worker = kill.Worker(path, noted, 10 * (turn + 1), f"cut {when}")
            worker.go()
            if when == 0:
                time.sleep(chance.random() * duration)
                disk.cut()
                worker.kill()
            worker.wait()
            disk.renew()
            saves += len(worker.noted())
            problems = kill.find_problems(worker, caches)
            assert problems == [], (f"cut {turn} at call {when}", problems)
            with kvstore.Store(path, create=False) as store:
                store.repair()
            kill.save_again(path, worker.base, caches)
            with kvstore.Store(path, create=False) as store:
                assert store.verify() == []
                store.plan_prune(max_bytes=4_000_000, named=True).execute()
    return saves


def _measure(path: Path, noted: Path, kill: Any) -> tuple[int, float]:
    """Return how many calls to the disk the saves make, and how long they take."""
    worker = kill.Worker(path, noted, 0, "cut 1000000")
    begin = time.monotonic()
    worker.go()
    worker.wait()
    seconds = time.monotonic() - begin
    return int(noted.with_name("noted.calls").read_text()), seconds
