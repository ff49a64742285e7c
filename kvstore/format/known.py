"""Blocks that were hashed lately: of what goes on, only the new tokens are hashed.

Each step of a prefill hands over the whole prompt. Knows nothing of arrays or files.
"""

from __future__ import annotations

from collections import OrderedDict

from .block import Block, BlockHash
from .chain import as_tokens, make_block

# They take 40 MB at most; that many rows take a thousand times as much.
MAX_TOKENS = 2**20


class KnownBlocks:
    """The block that was asked for last behind each of some parents.

    One that is known is used for the same tokens only: all of them are compared, which
    takes a fraction of the time that hashing takes. Any thread may ask.

    Args:
        block_size: Tokens of a block.
        max_tokens: How many are kept, or one block; those of blocks go first that were
            not asked for longest.
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
