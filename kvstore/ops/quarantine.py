"""Files that could not be read: taken back where they are whole, or thrown away."""

from __future__ import annotations

from contextlib import suppress

from ..errors import FormatError, IntegrityError
from ..storage import files
from ..storage.folder import StoreFolder
from ..storage.shards import open_shard_at, shard_path


def take_back(folder: StoreFolder) -> None:
    """Take shards out of the quarantine that are whole: they were misread once.

    The store's lock is held; the index does not know them yet.
    """
    for path in folder.quarantine.glob("*.safetensors"):
        with suppress(IntegrityError, FormatError, OSError, ValueError):
            with open_shard_at(path, folder.cipher) as opened:
                is_whole = opened.sha256() == path.stem
            target = shard_path(folder.shards, path.stem)
            if is_whole and not target.exists():
                files.publish(path, target)


def empty_quarantine(folder: StoreFolder) -> int:
    """Remove what is in quarantine for good reason, and return its bytes.

    The store's lock is held.
    """
    take_back(folder)
    found = files.sizes_in(folder.quarantine)
    for path in found:
        files.remove_any(path)
    return sum(found.values())
