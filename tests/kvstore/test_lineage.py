"""Lineage: what came out of codes is known again by its tokens."""

import pytest

from kvstore.caches.provenance import Provenance
from kvstore.format.chain import BLOCK_SIZE
from kvstore.server.lineage import Lineage

MODEL, OTHER = "a" * 64, "b" * 64
PROMPT = list(range(3 * BLOCK_SIZE))


@pytest.fixture
def lineage():
    """A lineage that knows one restore: two coded blocks, and a tail behind them."""
    known = Lineage()
    known.note(MODEL, PROMPT[:600], Provenance(2 * BLOCK_SIZE, 4))
    return known


def test_nothing_known_is_exact():
    """What no lossy restore has gone into is exact."""
    known = Lineage()
    known.note(MODEL, PROMPT, Provenance())
    assert known.of(MODEL, PROMPT) == Provenance()


def test_what_goes_on_from_a_restore_is_known(lineage):
    """The rows that were coded are, and nothing behind them is exact."""
    longer = [*PROMPT[:600], 7, 8, 9]
    assert lineage.of(MODEL, longer) == Provenance(2 * BLOCK_SIZE, 4)


@pytest.mark.parametrize("shared", [1, 255, 256, 257, 511, 512])
def test_what_shares_a_part_of_a_restore_is_known(lineage, shared):
    """A cache trimmed to a part of a restore has coded rows up to there at least."""
    other = [*PROMPT[:shared], *range(5000, 5600)]
    found = lineage.of(MODEL, other)
    assert not found.is_exact
    assert shared <= found.coded_tokens <= shared + BLOCK_SIZE


def test_what_shares_nothing_is_exact(lineage):
    """Other tokens, and another model's, are not touched."""
    assert lineage.of(MODEL, [9, *PROMPT]) == Provenance()
    assert lineage.of(OTHER, PROMPT) == Provenance()


def test_rows_on_a_lossy_prefix_are_inexact_and_not_coded():
    """A lossless restore of what was computed on codes is inexact all the same."""
    known = Lineage()
    known.note(MODEL, PROMPT[:300], Provenance(0, 4))
    assert known.of(MODEL, PROMPT[:400]) == Provenance(0, 4)
