"""Blocks that were hashed lately, so that a prompt that grew costs its new tokens only.

Each step of a prefill hands over the whole prompt. Knows nothing of arrays or files.
"""

from __future__ import annotations

from collections import OrderedDict

from .block import Block, BlockHash
from .chain import as_tokens, make_block

# They take about 43 MB in blocks of 256; that many rows take a thousand times as much.
MAX_TOKENS = 2**20


class KnownBlocks:
    """Of each parent the child that was asked for last.

    A known block is used for the same tokens only: all of them are compared, which
    takes a fraction of the time that hashing takes. Any thread may ask.

    Args:
        block_size: Tokens of a block.
        max_tokens: How many are kept at most, but one block at least. The least
            recently used go first.
    """

    def __init__(self, block_size: int, max_tokens: int = MAX_TOKENS) -> None:
        self._behind: OrderedDict[BlockHash, Block] = OrderedDict()
        self._max_blocks = max(1, max_tokens // block_size)

    def block(self, parent: BlockHash, start: int, tokens: tuple[int, ...]) -> Block:
        """Return the block of some tokens, as :func:`make_block` does.

        Raises:
            ArgumentError: A token is no integer, or does not fit into 64 bits.
        """
        block = self._behind.pop(parent, None)
        # Where it starts is settled: the parent's hash stands for all that is before.
        if block is None or block.tokens != tokens:
            block = make_block(parent, start, tuple(as_tokens(tokens)))
        self._behind[parent] = block
        if len(self._behind) > self._max_blocks:
            self._behind.popitem(last=False)
        return block
