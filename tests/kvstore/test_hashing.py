"""Tokens to block hashes: frozen, one to one, and a chain."""

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.format.chain import common_run, hash_block_tokens, hash_root, split_tokens
from kvstore.format.documents import canonical_json

# The hashes below are written down for ever: stores on people's disks hold them.
ROOT = hash_root("ab" * 32, [{"class": "KVCache"}])
TOKENS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40)


@pytest.mark.parametrize(
    ("fingerprint", "layout", "expected"),
    [
        (
            "ab" * 32,
            [{"class": "KVCache"}],
            "974c461c7f95f811a6cb0d92f53087ccd9fc33da4314429f5646c76a7a954342",
        ),
        (
            "",
            [],
            "27726e407cb38e3f280c62b67aa3ebc41e611cb0ba64531c06ed69520b83846c",
        ),
    ],
)
def test_root_hashes_are_frozen(fingerprint, layout, expected):
    """A root hash is the same in every release."""
    assert expected == hash_root(fingerprint, layout).hex()


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([0], "04f9395c2a16a76b183eecfc279e78ac5f622c9eb174dc677f7261f7a54d9979"),
        ([1, 2, 3], "f15e223fafaaf6f05678d766e403727d88e77f06c2eb79c7df6c88ccbfab07dc"),
        (
            [-1, -(2**63), 2**63 - 1],
            "52900c294e477c15c3b7fd9491256ec2b3d56c59cc6b6f7a4a66c2cdaba70dc3",
        ),
        (
            list(range(256)),
            "4fdd3d53a6a5ca451985a63178df7e0c33eafd58b99e46e80886a00fd5f72f7e",
        ),
    ],
)
def test_block_hashes_are_frozen(tokens, expected):
    """A block hash is the same in every release."""
    assert expected == hash_block_tokens(ROOT, tokens).hex()


def test_a_block_hash_is_what_the_format_page_says():
    """A block hash is SHA-256 of the parent and 64-bit little-endian tokens."""
    data = ROOT + struct.pack("<qq", 7, -7)
    assert hashlib.sha256(data).digest() == hash_block_tokens(ROOT, [7, -7])


@pytest.mark.parametrize("token", [2**63, -(2**63) - 1])
def test_a_token_that_does_not_fit_is_refused(token):
    """Tokens outside of 64 bits are a mistake of the caller, and said to be one."""
    with pytest.raises(ValueError, match="64 bits"):
        hash_block_tokens(ROOT, [token])


@given(TOKENS, TOKENS)
def test_no_two_token_lists_share_a_hash(left, right):
    """Block hashes are equal where the tokens are equal, and nowhere else."""
    hashes = [hash_block_tokens(ROOT, tokens) for tokens in (left, right)]
    assert (left == right) == (hashes[0] == hashes[1])


@given(TOKENS, st.integers(1, 20))
def test_the_blocks_of_a_sequence_are_a_chain(tokens, block_size):
    """Blocks follow each other, each hashed with its parent, and lose no token."""
    parent, position, joined = ROOT, 0, []
    for block in split_tokens(ROOT, tokens, block_size):
        assert (parent, position) == (block.parent, block.start)
        assert block.hash == hash_block_tokens(parent, block.tokens)
        parent, position = block.hash, position + len(block.tokens)
        joined += block.tokens
    assert tokens == joined


def test_only_the_last_block_may_be_short():
    """All blocks but the last have the block size."""
    blocks = split_tokens(ROOT, list(range(37)), 16)
    assert [16, 16, 5] == [len(block.tokens) for block in blocks]


def test_equal_blocks_behind_other_parents_differ():
    """The same tokens at another place of a sequence are another block."""
    first, second = split_tokens(ROOT, [5, 5, 5, 5], 2)
    assert first.tokens == second.tokens
    assert first.hash != second.hash


@pytest.mark.parametrize(
    "other",
    [
        ("cd" * 32, [{"class": "KVCache"}]),
        ("ab" * 32, [{"class": "KVCache"}] * 2),
    ],
)
def test_fingerprint_and_layout_each_change_the_root(other):
    """What must not be mixed has other root hashes."""
    assert hash_root(*other) != ROOT


def test_canonical_json_has_one_form():
    """The order of keys does not matter, and nothing but ASCII comes out."""
    left = canonical_json({"b": [1, 2.5, None], "a": "ä"})
    assert left == canonical_json({"a": "ä", "b": [1, 2.5, None]})
    assert b'{"a":"\\u00e4","b":[1,2.5,null]}' == left


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_canonical_json_refuses_what_json_cannot_say(value):
    """Neither NaN nor an infinity has a canonical form."""
    with pytest.raises(ValueError, match="JSON"):
        canonical_json([value])


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [([], [], 0), ([1], [], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2),
     ([1, 2, 3], [1, 9, 3], 1), ([1], [2], 0)],
)  # fmt: skip
def test_a_common_run_ends_at_the_first_difference(left, right, expected):
    """The common run counts leading tokens that are equal."""
    assert expected == common_run(left, right)
