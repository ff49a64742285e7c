"""Sums over a store are those of a walk along every entry's blocks."""

import random
from dataclasses import dataclass

import pytest

from kvstore.format.block import Block, BlockHash
from kvstore.ops.stats import _Reach
from kvstore.storage.index import Index, Place

ROOTS = [bytes([i]) * 32 for i in (1, 2)]
LAYOUT = [
    {"class": "KVCache", "params": {}, "rows": [["k", 2, 8, "F16", 0, None, "rows"]]}
]
TOKEN_BYTES = 2 * 8 * 2


@dataclass(frozen=True)
class Tip:
    """What the sums need of an entry."""

    root: str
    tip: str


@pytest.fixture
def forest(tmp_path):
    """An index of random trees of blocks in random shards, and all its blocks."""
    draw, found = random.Random(5), []
    index = Index(tmp_path / "index.sqlite", create=True)
    with index.transaction():
        for number in range(9):
            index.add_shard(f"{number:064x}", 70_001 * (number + 1), 1.0)
        for root in ROOTS:
            parents = [root]
            for _ in range(150):
                block = BlockHash(draw.randbytes(32))
                parent = BlockHash(draw.choice(parents[-4:]))
                parents.append(block)
                shard, nbytes = f"{draw.randrange(9):064x}", draw.randrange(1, 5000)
                tokens = tuple(range(draw.randrange(1, 17)))
                place = Place(block, shard, len(tokens), nbytes, 8)
                index.add_block(Block(block, parent, 0, tokens), place)
                found.append((root, block))
    yield index, found
    index.close()


def test_sums_are_those_of_a_walk(forest):
    """Each block counts once, but for every entry in the bytes of all entries."""
    index, blocks = forest
    links, draw = index.links(), random.Random(7)
    chosen = [*draw.choices(blocks, k=40), (ROOTS[0], bytes(32))]
    entries = [Tip(root.hex(), tip.hex()) for root, tip in chosen]
    seen, entry_bytes = set(), 0
    for _, block in chosen:
        while block in links:
            seen.add(block)
            entry_bytes += links[block].nbytes
            block = links[block].parent
    reach = _Reach(index)
    assert len(links) == reach.num_blocks == 300
    reach.add(entries[:9], {ROOTS[1]: LAYOUT})
    reach.add(entries[9:], {ROOTS[1]: LAYOUT})
    assert sum(links[block].nbytes for block in seen) == reach.nbytes
    assert entry_bytes == reach.entry_bytes
    known = [links[block] for root, block in set(blocks) if root == ROOTS[1]
             and block in seen]  # fmt: skip
    assert sum(link.nbytes for link in known) == reach.coded_bytes
    assert TOKEN_BYTES * sum(link.num_tokens for link in known) == reach.raw_bytes


def test_circles_end(forest):
    """An index may say anything: what hangs from itself is counted once."""
    index, blocks = forest
    with index.transaction():
        index._query("UPDATE blocks SET parent = hash")
    reach = _Reach(index)
    reach.add([Tip(root.hex(), block.hex()) for root, block in blocks[:5]], {})
    links = index.links()
    assert sum(links[block].nbytes for _, block in blocks[:5]) == reach.nbytes


def test_an_empty_index_has_no_sums(tmp_path):
    """Entries whose blocks it does not know add nothing."""
    reach = _Reach(Index(tmp_path / "index.sqlite", create=True))
    reach.add([Tip("00" * 32, "11" * 32)], {})
    assert (reach.num_blocks, reach.nbytes, reach.entry_bytes) == (0, 0, 0)


def test_blocks_of_a_lost_shard_do_not_count(forest):
    """Whatever hangs from one hangs from a gap."""
    index, blocks = forest
    with index.transaction():
        index._query("DELETE FROM shards WHERE id = 3")
    links, seen = index.links(), set()
    for _, block in blocks:
        while block in links:
            seen.add(block)
            block = links[block].parent
    reach = _Reach(index)
    reach.add([Tip(root.hex(), tip.hex()) for root, tip in blocks], {})
    assert 200 < len(links) == reach.num_blocks < 300
    assert sum(links[block].nbytes for block in seen) == reach.nbytes
