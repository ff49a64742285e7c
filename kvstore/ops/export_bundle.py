"""An entry to a bundle: its blocks in shards of their own, copied and never decoded.

Read twice: once for the digests of all shards, which the manifest has and which comes
first, and once to be written. Each block's digest is checked both times.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import IO

from ..errors import IntegrityError
from ..format import shard as shards
from ..format.block import BlockHash, Origin, Progress, StoredBlock
from ..format.bundle import Manifest, write_bundle
from ..format.entry import Entry
from ..storage.blocks import BlockStore
from ..storage.index import Place

# How often blocks that `prune` moves meanwhile are looked for again.
_TRIES = 3


@dataclass(frozen=True, slots=True)
class Packing:
    """What a bundle will hold."""

    # What it will say of itself.
    manifest: Manifest
    # The blocks of each of its shards, as they are stored.
    groups: tuple[tuple[StoredBlock, ...], ...]


class Exporter:
    """Writes one entry as a bundle.

    Args:
        blocks: The store's blocks.
        entry: The entry.
        progress: Called with (tokens written, tokens in all); read is half written.
    """

    def __init__(self, blocks: BlockStore, entry: Entry, progress: Progress) -> None:
        self._folder = blocks.folder
        self._blocks = blocks
        self._entry = entry
        self._progress = progress
        self._root = BlockHash(bytes.fromhex(entry.root))
        self._done = 0

    def pack(self) -> Packing:
        """Read the entry, and return what its bundle will hold.

        Raises:
            IntegrityError: A part of it is missing or damaged.
        """
        self._done = 0
        blocks = [stored for _, stored in self._blocks.chain(self._entry)]
        groups = tuple(map(tuple, shards.group_blocks(blocks)))
        origin = self._blocks.origin(self._entry)
        found = tuple(self._digest(origin, group) for group in groups)
        return Packing(self._manifest(origin, found), groups)

    def write(self, packing: Packing, file: IO[bytes]) -> int:
        """Write the bundle and return its size in bytes.

        Raises:
            IntegrityError: A part of the entry is missing or damaged by now; what has
                been written is no bundle.
        """
        origin = packing.manifest.origin
        contents = (self._contents(origin, group) for group in packing.groups)
        return write_bundle(file, packing.manifest, contents)

    def _manifest(self, origin: Origin, found: tuple[tuple[str, int], ...]) -> Manifest:
        entry = self._entry
        return Manifest(
            name=entry.name,
            tip=entry.tip,
            root=entry.root,
            num_tokens=entry.num_tokens,
            codec=entry.codec,
            # A path may have bytes that are no text.
            model=entry.model.encode(errors="replace").decode(),
            made_with=entry.made_with,
            created_at=entry.created_at,
            block_size=self._folder.block_size,
            origin=origin,
            shards=found,
        )

    def _digest(self, origin: Origin, group: Sequence[StoredBlock]) -> tuple[str, int]:
        """Return SHA-256 in hex and bytes of a shard of some blocks."""
        digest, nbytes = hashlib.sha256(), 0
        for part in self._contents(origin, group):
            digest.update(part)
            nbytes += len(part)
        return digest.hexdigest(), nbytes

    def _contents(
        self, origin: Origin, group: Sequence[StoredBlock]
    ) -> Iterator[bytes | memoryview]:
        """Yield the bytes of a shard of some blocks."""
        yield shards.shard_header(origin, group)
        done = 0
        errors: list[IntegrityError] = []
        while done < len(group):
            try:
                for stored, data in self._read(origin, group[done:]):
                    yield data
                    done += 1
                    self._note(len(stored.block.tokens))
            except IntegrityError as error:
                # What `prune` has moved meanwhile is found at its new place.
                errors.append(error)
                if len(errors) == _TRIES:
                    # It says what was wrong, not what is missing now.
                    raise errors[0] from None

    def _read(
        self, origin: Origin, group: Sequence[StoredBlock]
    ) -> Iterator[tuple[StoredBlock, memoryview]]:
        """Yield blocks with their bytes, wherever they lie now.

        Raises:
            IntegrityError: One is missing or damaged, or another copy than it was.
        """
        places = [self._place(stored) for stored in group]
        found = chain.from_iterable(
            self._blocks.read(shard, list(run), self._root)
            for shard, run in groupby(places, key=lambda place: place.shard)
        )
        for stored, (copy, data) in zip(group, found, strict=True):
            if not _is_same(origin, stored, copy):
                raise _gone(stored, "was replaced by another copy")
            yield stored, data

    def _place(self, stored: StoredBlock) -> Place:
        place = self._blocks.index.place(stored.block.hash)
        if place is None:
            raise _gone(stored, "is missing")
        return place

    def _note(self, num_tokens: int) -> None:
        self._done += num_tokens
        self._progress(self._done // 2, self._entry.num_tokens)


def _is_same(origin: Origin, left: StoredBlock, right: StoredBlock) -> bool:
    """Whether two copies of a block are the same, wherever they lie."""
    if left == right:
        return True
    header = shards.shard_header
    return header(origin, [left]) == header(origin, [right])


def _gone(stored: StoredBlock, what: str) -> IntegrityError:
    block = stored.block.hash.hex()
    return IntegrityError(
        f"block {block[:12]} {what} since the export began",
        block=block,
        hint="export the entry again",
    )
