"""Which stored prompt is most like a given one, wherever they have tokens in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

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
    wanted = Counter(tokens)

    def likeness(pair: tuple[Entry, list[int]]) -> tuple[int, int]:
        return (Counter(pair[1]) & wanted).total(), common_run(pair[1], tokens)

    return max(latest(blocks, entries, fingerprint), key=likeness, default=None)


def latest(
    blocks: BlockStore, entries: Sequence[Entry], fingerprint: str
) -> Iterator[tuple[Entry, list[int]]]:
    """Yield the latest entries of a model with their tokens, but damaged ones.

    Args:
        blocks: The store's blocks.
        entries: Its entries, latest first.
        fingerprint: Digest of the model's fingerprint.
    """
    roots = {root.hex() for root, _ in blocks.index.roots(fingerprint)}
    for entry in [entry for entry in entries if entry.root in roots][:_MAX_ENTRIES]:
        if (found := _tokens(blocks, entry)) is not None:
            yield entry, found


def _tokens(blocks: BlockStore, entry: Entry) -> list[int] | None:
    """Return the tokens of an entry; ``None`` where it is damaged."""
    try:
        chain = blocks.chain(entry)
    except (IntegrityError, FormatError):
        return None  # which `verify` reports
    return [token for _, stored in chain for token in stored.block.tokens]
