"""Shards of an entry, read before they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread

from ..format.block import BlockHash
from ..format.entry import Entry
from ..storage.blocks import BlockStore
from ..storage.shards import shard_path

_PIECE = 8 << 20


def read_ahead(blocks: BlockStore, entry: Entry) -> Thread:
    """Start a thread that reads what the index says an entry lies in, first to last."""
    tip = BlockHash(bytes.fromhex(entry.tip))
    shards = dict.fromkeys(place.shard for place, _ in blocks.index.chain(tip))
    paths = [shard_path(blocks.folder.shards, name) for name in reversed(shards)]
    # No process waits at its end for what nobody asks for any more.
    thread = Thread(target=_read, args=(paths,), name="kvstore-prefetch", daemon=True)
    thread.start()
    return thread


def _read(paths: Sequence[Path]) -> None:
    buffer = bytearray(_PIECE)
    for path in paths:
        with suppress(OSError), path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
