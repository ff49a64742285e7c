"""Tokens to a chain of block hashes. Knows nothing of arrays or files."""

from __future__ import annotations

import hashlib
import operator
from array import array
from collections.abc import Callable, Iterator, Sequence
from struct import error as struct_error
from struct import pack
from typing import Any, TypeAlias

from ..errors import ArgumentError
from .block import Block, BlockHash, Origin
from .documents import JSON, canonical_json

BLOCK_SIZE = 256


def digest_fields(fingerprint: JSON) -> str:
    """Return the digest of a fingerprint: SHA-256 of its canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(fingerprint)).hexdigest()


REANCHORED = "reanchored"
"""The field of a fingerprint that marks rows computed behind other tokens."""


def mark_reanchored(fingerprint: JSON) -> JSON:
    """Return the fingerprint of rows that were computed behind other tokens."""
    return {**fingerprint, REANCHORED: True}


def is_reanchored(fingerprint: JSON) -> bool:
    """Whether rows of a fingerprint were computed behind other tokens."""
    return REANCHORED in fingerprint


def hash_root(fingerprint: str, layout: Any) -> BlockHash:
    """Return the hash that stands as parent of the first block."""
    data = canonical_json(["kvstore root 1", fingerprint, layout])
    return BlockHash(hashlib.sha256(data).digest())


def origin_root(origin: Origin) -> BlockHash:
    """Return the root hash that all blocks of an origin descend from."""
    return hash_root(digest_fields(origin.fingerprint), origin.layout)


def hash_block_tokens(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """Return the hash of one block, given its parent's.

    Args:
        parent: Hash of the previous block, or the root hash for the first.
        tokens: The block's token ids; negative ids mark media.

    Raises:
        ArgumentError: A token does not fit into 64 bits.
    """
    # Fixed-width integers: no two token lists share an encoding.
    try:
        data = parent + pack(f"<{len(tokens)}q", *tokens)
    except struct_error as error:
        raise _too_large() from error
    return BlockHash(hashlib.sha256(data).digest())


Packed: TypeAlias = "array[int]"
"""Tokens as integers of 64 bits."""
MakeBlock = Callable[[BlockHash, int, tuple[int, ...]], Block]
"""Returns the block of some tokens, given its parent's hash and where it starts."""


def make_block(parent: BlockHash, start: int, tokens: tuple[int, ...]) -> Block:
    """Return the block of some tokens.

    Args:
        parent: As :func:`hash_block_tokens` takes it.
        start: Position of the first token.
        tokens: Of the block, integers.
    """
    return Block(hash_block_tokens(parent, tokens), parent, start, tokens)


def split_tokens(
    root: BlockHash,
    tokens: Sequence[int],
    block_size: int = BLOCK_SIZE,
    make: MakeBlock = make_block,
    begin: int = 0,
) -> Iterator[Block]:
    """Yield the chain of blocks of ``tokens``; the last may be a short tail.

    Args:
        root: What the first block has as parent.
        tokens: The tokens.
        block_size: Tokens of a block.
        make: Makes each block.
        begin: Position of the first token.
    """
    parent = root
    for start in range(0, len(tokens), block_size):
        part = tuple(tokens[start : start + block_size])
        block = make(parent, begin + start, part)
        yield block
        parent = block.hash


def common_run(left: Sequence[object], right: Sequence[object]) -> int:
    """Return how many leading tokens, or letters, two sequences share."""
    length = min(len(left), len(right))
    return next((i for i in range(length) if left[i] != right[i]), length)


def pack_tokens(tokens: Sequence[int]) -> Packed:
    """Return tokens as integers of 64 bits, of which two arrays are compared fast.

    Raises:
        ArgumentError: One is no integer, or does not fit into 64 bits.
    """
    # Of anything but a list, `array` might read bytes.
    items = tokens if isinstance(tokens, list) else as_tokens(tokens)
    try:
        return array("q", items)
    except OverflowError as error:
        raise _too_large() from error
    except TypeError:
        return array("q", as_tokens(items))  # which says what is wrong


def as_tokens(tokens: Sequence[int]) -> list[int]:
    """Return tokens as integers of Python.

    Raises:
        ArgumentError: One is no integer.
    """
    try:
        return list(map(operator.index, tokens))
    except TypeError as error:
        raise ArgumentError(
            f"tokens are integers, in a flat list: {error}",
            hint="`tokenizer.encode(text)` returns them; of a batch, pass one row",
        ) from error


def _too_large() -> ArgumentError:
    return ArgumentError(
        "a token does not fit into 64 bits", hint="a media key is cut to 63 bits"
    )
