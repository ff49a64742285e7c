"""Which stored prompt is most like a given one, wherever they have tokens in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..errors import FormatError, IntegrityError
from ..format.chain import common_run
from ..format.entry import Entry
from ..storage.blocks import BlockStore

# The latest; each costs its shards' headers.
_MAX_ENTRIES = 64


def find_nearest(
    blocks: BlockStore, entries: Sequence[Entry], tokens: list[int], fingerprint: str
) -> tuple[Entry, list[int]] | None:
    """Return the entry that has most of a prompt's tokens, and its own.

    Args:
        blocks: The store's blocks.
        entries: Its entries, latest first.
        tokens: The prompt.
        fingerprint: Digest of the model's fingerprint; others' entries are left out.
    """
    roots = {root.hex() for root, _ in blocks.index.roots(fingerprint)}
    mine = [entry for entry in entries if entry.root in roots][:_MAX_ENTRIES]
    wanted = Counter(tokens)

    def likeness(pair: tuple[Entry, list[int]]) -> tuple[int, int]:
        return (Counter(pair[1]) & wanted).total(), common_run(pair[1], tokens)

    found = [(e, t) for e in mine if (t := _tokens(blocks, e)) is not None]
    return max(found, key=likeness, default=None)


def _tokens(blocks: BlockStore, entry: Entry) -> list[int] | None:
    """Return the tokens of an entry; ``None`` where it is damaged."""
    try:
        chain = blocks.chain(entry)
    except (IntegrityError, FormatError):
        return None  # which `verify` reports
    return [token for _, stored in chain for token in stored.block.tokens]
