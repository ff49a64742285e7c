"""What a removed entry would be known by in any file, and a search for it.

A block is known by its hash and by its tokens, in all the forms that a store writes.
The rows of a shard are left out: every byte of them belongs to a block that its header
names, which :mod:`~kvstore.ops.check` has made sure of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import IntegrityError
from ..format.block import BlockHash
from ..format.entry import Entry
from ..storage.blocks import BlockStore

# So many tokens in a row tell a conversation from all others.
_RUN = 8
Traces = dict[BlockHash, tuple[bytes, ...]]
"""The blocks of entries, and the bytes that each is known by beside its hash."""


def traces_of(blocks: BlockStore, entry: Entry) -> Traces:
    """Return what an entry's blocks are known by, as far as they can be read."""
    try:
        chain = blocks.chain(entry)
    except IntegrityError:
        return {BlockHash(bytes.fromhex(entry.tip)): ()}
    return {place.hash: tuple(_words(s.block.tokens)) for place, s in chain}


def _words(tokens: tuple[int, ...]) -> Iterator[bytes]:
    """Yield the tokens as a header spells them, a few in a row."""
    for start in range(0, len(tokens) - _RUN + 1, _RUN):
        yield ",".join(map(str, tokens[start : start + _RUN])).encode()


def find_traces(blocks: BlockStore, traces: Traces) -> Path | None:
    """Return a file that holds a trace of a block that the store has no more, if any.

    Args:
        blocks: The store's blocks.
        traces: From :func:`traces_of`, before the entries were removed. Blocks that
            other entries need are not looked for.
    """
    gone = {b: words for b, words in traces.items() if not blocks.index.place(b)}
    written = blocks.index.written
    hashes = [f for b in gone for f in (bytes(b), b.hex().encode(), written(bytes(b)))]
    tokens = [word for words in gone.values() for word in words]
    for path in sorted(p for p in blocks.folder.path.rglob("*") if p.is_file()):
        # Another conversation in a shard may have said the same.
        is_shard = blocks.folder.shards in path.parents
        data = _header(path) if is_shard else path.read_bytes()
        if _has_any(data, hashes if is_shard else [*hashes, *tokens]):
            return path
    return None


def _header(shard: Path) -> bytes:
    with shard.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _has_any(data: bytes, words: Iterable[bytes]) -> bool:
    return any(word in data for word in words)
