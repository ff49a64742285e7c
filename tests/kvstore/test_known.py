"""A chain that goes on from known blocks is the one that all of its tokens make."""

from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache

import kvstore
from kvstore.caches.provenance import Provenance
from kvstore.errors import ArgumentError
from kvstore.format import chain, known
from kvstore.format.block import BlockHash
from kvstore.format.chain import pack_tokens, split_tokens
from kvstore.format.known import KnownBlocks
from kvstore.server.lineage import Lineage

MODEL = kvstore.Fingerprint({"weights": "a"})
ROOTS = [BlockHash(bytes([i]) * 32) for i in range(2)]
SIZE, STEP = 4, 1024
SEQUENCE = st.lists(st.integers(0, 1), min_size=1, max_size=5 * SIZE)


@pytest.fixture
def hashed(monkeypatch):
    """A list of the tokens of each block that is hashed."""
    found, hash_anew = [], chain.hash_block_tokens

    def noted(parent, tokens):
        found.append(tokens)
        return hash_anew(parent, tokens)

    monkeypatch.setattr(chain, "hash_block_tokens", noted)
    return found


def split(blocks, tokens, root=ROOTS[0]):
    """Return a chain of known blocks, as far as there are some."""
    return blocks.split(root, pack_tokens(tokens))


def anew(tokens, root=ROOTS[0]):
    """Return the same chain where nothing is known."""
    return tuple(split_tokens(root, tuple(tokens), SIZE))


@given(
    st.lists(st.tuples(st.sampled_from(ROOTS), SEQUENCE), max_size=20),
    st.integers(1, 12),
)
def test_any_sequence_is_split_as_if_nothing_were_known(sequences, max_blocks):
    """Of two tokens, so that most begin as others do; whatever was forgotten."""
    blocks = KnownBlocks(SIZE, max_blocks * SIZE)
    for root, tokens in sequences:
        assert anew(tokens, root) == split(blocks, tokens, root)
        assert len(blocks._behind) <= max_blocks
        runs = blocks._runs
        assert sum(len(run.blocks) for run in runs) <= max_blocks
        assert all(anew(run.tokens, run.root) == run.blocks for run in runs)


@given(st.lists(st.integers(-3, 3), max_size=40), st.lists(st.integers(0, 9)))
def test_a_prompt_that_grows_is_split_as_if_nothing_were_known(tokens, steps):
    """By any steps, of which some take tokens back, and beside another one."""
    blocks, stop = KnownBlocks(SIZE), 0
    for step in steps:
        stop = (stop + step) % (len(tokens) + 1)
        assert anew(tokens[:stop]) == split(blocks, tokens[:stop])
        assert anew([9, *tokens]) == split(blocks, [9, *tokens])


@given(SEQUENCE, st.data())
def test_a_token_that_changes_anywhere_is_noticed(tokens, data):
    """So is one that is missing; and what was there before is found again."""
    blocks = KnownBlocks(SIZE)
    split(blocks, tokens)
    at = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens[:at], 2, *tokens[at + 1 :]]
    shorter = [*tokens[:at], *tokens[at + 1 :]]
    for edited in (changed, shorter, tokens):
        assert anew(edited) == split(blocks, edited)


def test_only_what_is_new_is_hashed(hashed):
    """A tail that has grown is another block; an edit costs what is behind it."""
    blocks = KnownBlocks(SIZE)
    split(blocks, range(10))
    assert [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)] == hashed
    hashed.clear()
    split(blocks, range(14))
    assert [(8, 9, 10, 11), (12, 13)] == hashed
    hashed.clear()
    split(blocks, [*range(5), -1, *range(6, 14)])
    assert [(4, -1, 6, 7), (8, 9, 10, 11), (12, 13)] == hashed


def test_the_least_recently_used_block_is_forgotten(hashed):
    """The beginning that conversations share stays."""
    blocks = KnownBlocks(SIZE, 3 * SIZE)
    for end in range(5, 9):
        split(blocks, [1, 1, 1, 1, end, 0, 0, 0, 0])
    hashed.clear()
    split(blocks, [1, 1, 1, 1])
    assert not hashed


def test_known_tokens_stay_integers():
    """Who asks with others that are equal gets those that were hashed."""
    blocks = KnownBlocks(SIZE)
    split(blocks, [True, 2, 3])
    (block,) = split(blocks, np.array([1, 2, 3]))
    assert [int] * 3 == [type(token) for token in block.tokens]


@pytest.mark.parametrize("other", [1.0, Fraction(1), 1 + 0j, np.float32(1), [1]])
@pytest.mark.parametrize("at", [0, 5])
def test_a_known_token_is_no_number_of_another_kind(other, at):
    """Though it is equal: tokens are integers, wherever they stand."""
    blocks, tokens = KnownBlocks(SIZE), [1] * 8
    split(blocks, tokens)
    tokens[at] = other
    with pytest.raises(ArgumentError, match="tokens are integers"):
        split(blocks, tokens)


@pytest.mark.parametrize("other", [True, np.int64(1), np.uint8(1)])
def test_an_integer_of_another_kind_is_known(other):
    """And stored as one of Python's, also where it is new."""
    blocks = KnownBlocks(SIZE)
    for _ in range(2):
        (block,) = split(blocks, [1, other, 1, 1])
        assert [int] * 4 == [type(token) for token in block.tokens]
        assert anew([1, 1, 1, 1]) == (block,)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "tokens",
    [
        [*np.arange(4, dtype=np.uint32), -77],  # a negative id marks media
        [*np.arange(4, dtype=np.int32), -(2**62)],
        list(np.full(9, 2**30, np.int32)),
        [np.int64(2**62)] * 5,
    ],
)
def test_integers_whose_sum_would_overflow_are_known(tokens):
    """Whatever their types and sizes, as far as each fits into 64 bits."""
    blocks = KnownBlocks(SIZE)
    for _ in range(2):
        assert anew(list(map(int, tokens))) == split(blocks, tokens)


class Equal(int):
    """An integer that says that it is equal to all others."""

    __hash__ = int.__hash__

    def __eq__(self, other):
        return True


def test_an_integer_is_what_it_counts():
    """Not what it says that it is equal to."""
    blocks = KnownBlocks(SIZE)
    split(blocks, [1, 2, 3, 4])
    assert anew([9, 2, 3, 4]) == split(blocks, [Equal(9), 2, 3, 4])


def test_a_prompt_that_another_begins_with_fills_no_room(monkeypatch):
    """Where they come in turn, others stay known, and the longest is gone on from."""
    blocks = KnownBlocks(SIZE)
    others = [[i, *range(19)] for i in range(100, 108)]
    for tokens in others:
        split(blocks, tokens)
    for length in [8, 20] * 20:
        split(blocks, range(length))
    asked, block = [], blocks.block
    monkeypatch.setattr(blocks, "block", lambda *a: asked.append(a) or block(*a))
    for tokens in [*others, list(range(20))]:
        assert anew(tokens) == split(blocks, tokens)
    assert not asked


def test_what_a_caller_does_to_his_list_later_is_not_known():
    """Nor is it looked at again."""
    blocks, tokens = KnownBlocks(SIZE), list(range(8))
    split(blocks, tokens)
    tokens[1] = 9
    assert anew(range(8)) == split(blocks, range(8))
    assert anew(tokens) == split(blocks, tokens)


def test_a_prompt_that_goes_on_costs_one_comparison(monkeypatch):
    """No block is looked up that prompts before it had, of several side by side."""
    blocks = KnownBlocks(SIZE)
    prompts = [[i, *range(39)] for i in range(4)]
    for tokens in prompts:
        split(blocks, tokens[:20])
    asked, block = [], blocks.block
    monkeypatch.setattr(blocks, "block", lambda *a: asked.append(a) or block(*a))
    for tokens in prompts:
        assert anew(tokens) == split(blocks, tokens)
    assert len(asked) == 4 * 5


@pytest.mark.parametrize("wrong", ["a", None, 1.5, 2**63])
def test_a_wrong_token_is_refused_behind_known_ones(wrong):
    """And nothing of it is known afterwards."""
    blocks = KnownBlocks(SIZE)
    split(blocks, range(4))
    for _ in range(2):
        with pytest.raises(ArgumentError):
            split(blocks, [*range(4), wrong])
    assert anew(range(9)) == split(blocks, range(9))


def test_a_million_tokens_are_kept_at_most():
    """In how many blocks ever; one is kept even where it is larger."""
    assert known.MAX_TOKENS == KnownBlocks(256)._max_blocks * 256
    assert KnownBlocks(2 * known.MAX_TOKENS)._max_blocks == 1


def test_a_step_hashes_no_more_of_a_longer_prompt(tmp_path, hashed):
    """A server hands over the whole prompt at each step."""
    cache, counts = KVCache(), []
    cache.keys = cache.values = mx.zeros((1, 1, 10 * STEP, 8), mx.float16)
    tokens = list(range(10 * STEP))
    with kvstore.Store(tmp_path / "store", codec="raw") as store:
        for cache.offset in range(STEP, 10 * STEP + 1, STEP):
            hashed.clear()
            found = store.snapshot(tokens[: cache.offset], [cache], MODEL)
            counts.append(len(hashed))
    assert [STEP // 256] * 10 == counts
    assert tuple(split_tokens(found.chain.root, tokens)) == found.chain.blocks


def test_what_was_restored_is_found_without_hashing_again(hashed):
    """A server asks that of the whole prompt at each step too."""
    lineage, tokens = Lineage(), list(range(4 * STEP))
    lineage.note("a", tokens[:STEP], Provenance(STEP, 4))
    counts = []
    for stop in range(STEP, 4 * STEP + 1, STEP):
        hashed.clear()
        assert lineage.of("a", tokens[:stop]) == Provenance(STEP, 4)
        counts.append(len(hashed))
    assert [0, *[STEP // 256] * 3] == counts
