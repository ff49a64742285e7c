"""The tree of the prefixes that entries share. From entries and index alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field

from ..format.block import BlockHash
from ..format.entry import Entry
from ..storage.blocks import BlockStore
from ..storage.index import Link

Leaf = tuple[Entry, int, float]


@dataclass(slots=True)
class Branch:
    """Full blocks in a row that the same entries have."""

    # Tokens from the start of the prompt to where it ends; 0 for what a model computed.
    num_tokens: int
    # Bytes of its own blocks.
    nbytes: int = 0
    # How many entries are in it and in its branches.
    num_entries: int = 0
    # Those whose last full block is its last one, each with the bytes of its tail and
    # when it was saved or last hit, the later of both.
    entries: list[Leaf] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)


def last_uses(blocks: BlockStore, entries: Sequence[Entry]) -> dict[str, float]:
    """Return when each entry was saved or last hit, the later of both, by its id.

    In Unix seconds. Loads of processes that still run are not in it.
    """
    if not blocks.folder.index.exists():  # which is not made anew for this
        return {entry.id: entry.updated_at for entry in entries}
    uses = blocks.index.uses()
    return _last_uses(uses, blocks.index.links() if uses else {}, entries)


def _last_uses(
    uses: dict[BlockHash, tuple[float, float]],
    links: dict[BlockHash, Link],
    entries: Sequence[Entry],
) -> dict[str, float]:
    known: dict[BlockHash, float] = {}
    for entry in entries:
        for block in reversed(list(_walk(links, _tip(entry), known))):
            before = known.get(links[block].parent, 0.0)
            used_at, _ = uses.get(block, (0.0, 0.0))
            known[block] = max(before, used_at)
    return {e.id: max(e.updated_at, known.get(_tip(e), 0.0)) for e in entries}


def grow_tree(blocks: BlockStore, entries: Sequence[Entry]) -> list[Branch]:
    """Return the prefixes that entries share, a root for each model and layout."""
    links = blocks.index.links()
    used_at = _last_uses(blocks.index.uses(), links, entries)
    ends: defaultdict[BlockHash, list[Leaf]] = defaultdict(list)
    order: dict[BlockHash, None] = {}  # parents first
    for entry in entries:
        end, tail_bytes = _last_full(links, entry, blocks.folder.block_size)
        if any(other.tip == entry.tip for other, *_ in ends[end]):
            tail_bytes = 0  # which is counted
        ends[end].append((entry, tail_bytes, used_at[entry.id]))
        order |= dict.fromkeys(reversed(list(_walk(links, end, order))))
    return _grow(links, order, ends)


def _grow(
    links: dict[BlockHash, Link],
    order: dict[BlockHash, None],
    ends: dict[BlockHash, list[Leaf]],
) -> list[Branch]:
    children: defaultdict[BlockHash, list[BlockHash]] = defaultdict(list)
    for block in order:
        children[links[block].parent].append(block)
    grown: dict[BlockHash, Branch] = {}
    roots = dict.fromkeys(b for b in (*children, *ends) if b not in order)
    for root in roots:
        grown[root] = Branch(0, entries=ends.get(root, []))
    for block in order:
        link = links[block]
        branch = grown.setdefault(link.parent, Branch(0))
        # A row of blocks is one branch, until something ends there or it divides.
        if (
            link.parent in roots
            or link.parent in ends
            or len(children[link.parent]) > 1
        ):
            branch = Branch(branch.num_tokens)
            grown[link.parent].branches.append(branch)
        branch.num_tokens += link.num_tokens
        branch.nbytes += link.nbytes
        branch.entries = ends.get(block, [])
        grown[block] = branch
    for block in reversed((*roots, *order)):
        branch = grown[block]
        below = sum(one.num_entries for one in branch.branches)
        branch.num_entries = below + len(branch.entries)
    return [grown[root] for root in roots]


def _last_full(
    links: dict[BlockHash, Link], entry: Entry, block_size: int
) -> tuple[BlockHash, int]:
    """Return the last full block of an entry, and the bytes of the tail behind it."""
    link = links.get(_tip(entry))
    if link is None or link.num_tokens == block_size:
        return _tip(entry), 0
    return link.parent, link.nbytes


def _tip(entry: Entry) -> BlockHash:
    return BlockHash(bytes.fromhex(entry.tip))


def _walk(
    links: dict[BlockHash, Link], block: BlockHash, known: Container[BlockHash]
) -> Iterator[BlockHash]:
    """Yield the blocks of a chain that are not known yet, last first."""
    seen: set[BlockHash] = set()
    # An index may say anything, circles included.
    while block in links and block not in known and block not in seen:
        seen.add(block)
        yield block
        block = links[block].parent
