"""An entry to a bundle: its blocks in shards of their own, copied and never decoded.

Every shard is read twice: first for its digest, which is its name and precedes it in
the archive, then to be written. Each block's digest is checked both times.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from typing import IO

from ...caches.kinds import known_layout
from ...caches.stored import is_restorable
from ...errors import IntegrityError
from ...format.block import Origin, Progress, StoredBlock
from ...format.bundle import bundled_entry, write_bundle
from ...format.chain import origin_root
from ...format.entry import Entry
from ...format.shard import group_blocks, shard_header
from ...storage.blocks import BlockStore
from ...storage.index import Place
from ..bases import read_named

# How often blocks that `prune` moves meanwhile are looked for again.
_TRIES = 3
Counter = Callable[[int], None]
"""Called with the number of tokens that are done."""


_BundleShard = tuple[str, int, list[StoredBlock]]
"""Name and size of a shard to be written, and its blocks as stored."""


def export_entry(
    blocks: BlockStore,
    entry: Entry,
    file: IO[bytes],
    progress: Progress,
    *,
    without_basis: bool = False,
    secret: str | None = None,
) -> int:
    """Write an entry as a bundle and return the bundle's size in bytes.

    Args:
        blocks: The store's blocks.
        entry: The entry.
        file: Opened for writing bytes; need not be seekable.
        progress: Called with (tokens written, tokens in all); read is half written.
        without_basis: Leave the bases out that its blocks name.
        secret: The key to sign it with.

    Raises:
        IntegrityError: A part of the entry is missing or damaged. If that happens
            while it is written, what has been written is no bundle.
    """

    def count(done: int) -> None:
        progress(done // 2, entry.num_tokens)

    origin, shards = blocks.run_again(lambda: _digest_shards(blocks, entry, count))
    stored = [block for _, _, group in shards for block in group]
    nbytes = sum(block.end - block.begin for block in stored)

    def count_second(done: int) -> None:
        count(entry.num_tokens + done)

    return write_bundle(
        file,
        bundled_entry(entry, nbytes),
        blocks.folder.block_size,
        [
            (name, size, _contents(blocks, origin, group, count_second))
            for name, size, group in shards
        ],
        bases={} if without_basis else read_named(blocks.folder, stored),
        secret=secret,
    )


def _digest_shards(
    blocks: BlockStore, entry: Entry, count: Counter
) -> tuple[Origin, list[_BundleShard]]:
    """Return what computed an entry, and the shards of its bundle.

    Raises:
        IntegrityError: A part of it is missing or damaged.
    """
    stored = [block for _, block in blocks.chain(entry)]
    origin = blocks.origin(entry)
    if not is_restorable(known_layout(origin.layout), stored, entry.num_tokens):
        raise IntegrityError(
            f"block {entry.tip[:12]} cannot be rebuilt: a state or rows of a window"
            " are missing",
            block=entry.tip,
            hint="save the prompt again",
        )
    found = []
    for group in group_blocks(stored):
        name = hashlib.sha256(shard_header(origin, group)).hexdigest()
        # All is read before anything is written, so that damage ends the export here.
        nbytes = sum(map(len, _contents(blocks, origin, group, count)))
        found.append((name, nbytes, group))
    return origin, found


def _contents(
    blocks: BlockStore, origin: Origin, group: Sequence[StoredBlock], count: Counter
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a shard of some blocks.

    Blocks that `prune` moves meanwhile are found again at their new place.
    """
    yield shard_header(origin, group)
    done = 0
    errors: list[IntegrityError] = []
    while done < len(group):
        try:
            for stored, data in _read(blocks, origin, group[done:]):
                yield data
                done += 1
                count(stored.block.start + len(stored.block.tokens))
        except IntegrityError as error:
            errors.append(error)
            if len(errors) == _TRIES:
                # It says what was wrong, not what is missing now.
                raise errors[0] from None


def _read(
    blocks: BlockStore, origin: Origin, group: Sequence[StoredBlock]
) -> Iterator[tuple[StoredBlock, memoryview]]:
    """Yield blocks with their bytes, wherever they lie now.

    Raises:
        IntegrityError: One is missing or damaged, or another copy than it was.
    """
    root = origin_root(origin)
    places = [_place(blocks, stored) for stored in group]
    found = chain.from_iterable(
        blocks.read(shard, list(run), root)
        for shard, run in groupby(places, key=lambda place: place.shard)
    )
    for stored, (copy, data) in zip(group, found, strict=True):
        if not _is_same(origin, stored, copy):
            raise _gone(stored, "was replaced by another copy")
        yield stored, data


def _place(blocks: BlockStore, stored: StoredBlock) -> Place:
    place = blocks.index.place(stored.block.hash)
    if place is None:
        raise _gone(stored, "is missing")
    return place


def _is_same(origin: Origin, left: StoredBlock, right: StoredBlock) -> bool:
    """Whether two copies of a block are the same, wherever they lie."""
    if left == right:
        return True
    return shard_header(origin, [left]) == shard_header(origin, [right])


def _gone(stored: StoredBlock, what: str) -> IntegrityError:
    block = stored.block.hash.hex()
    return IntegrityError(
        f"block {block[:12]} {what} since the export began",
        block=block,
        hint="export the entry again",
    )
