"""Blocks that were hashed lately, so that a prompt that grew costs its new tokens only.

Each step of a prefill hands over the whole prompt. Knows nothing of arrays or files.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from .block import Block, BlockHash
from .chain import Packed, make_block, split_tokens

# They take about 43 MB in blocks of 256, and whole prompts at most 50 more; that many
# rows take a thousand times as much.
MAX_TOKENS = 2**20
# Prompts that a server computes side by side.
_MAX_RUNS = 16


class _Run(NamedTuple):
    """The full blocks of a prompt, from its beginning."""

    root: BlockHash
    tokens: Packed
    blocks: tuple[Block, ...]

    def begins(self, root: BlockHash, tokens: Packed) -> bool:
        """Whether a prompt starts with these blocks."""
        return self.root == root and tokens[: len(self.tokens)] == self.tokens


class KnownBlocks:
    """The blocks of the last prompts, and for each block the one last seen behind it.

    A known block is used for the same tokens only: all of them are compared, which
    takes a fraction of the time that hashing takes. Any thread may ask.

    Args:
        block_size: Tokens of a block.
        max_tokens: How many are kept at most, but one block at least; and as many of
            whole prompts. The least recently used go first.
    """

    def __init__(self, block_size: int, max_tokens: int = MAX_TOKENS) -> None:
        self._block_size = block_size
        self._behind: OrderedDict[BlockHash, Block] = OrderedDict()
        self._max_blocks = max(1, max_tokens // block_size)
        # The last one first. Replaced, never changed: another thread may look at it.
        self._runs: tuple[_Run, ...] = ()

    def split(self, root: BlockHash, tokens: Packed) -> tuple[Block, ...]:
        """Return the chain of blocks of a prompt, as :func:`split_tokens` yields it."""
        begun = [run.blocks for run in self._runs if run.begins(root, tokens)]
        known = max(begun, key=len, default=())
        begin = len(known) * self._block_size
        parent = known[-1].hash if known else root
        size, rest = self._block_size, tokens[begin:]
        blocks = *known, *split_tokens(parent, rest, size, self.block, begin)
        self._keep(root, tokens, blocks)
        return blocks

    def _keep(self, root: BlockHash, tokens: Packed, blocks: tuple[Block, ...]) -> None:
        """Have a prompt take the place of all that it goes on from."""
        num_full = len(tokens) // self._block_size
        if not 0 < num_full <= self._max_blocks:
            return
        full = tokens[: num_full * self._block_size]
        runs = [_Run(root, full, blocks[:num_full])]
        for run in self._runs:
            num_blocks = num_full + len(run.blocks)
            if num_blocks <= self._max_blocks and not run.begins(root, full):
                num_full = num_blocks
                runs.append(run)
        self._runs = tuple(runs[:_MAX_RUNS])

    def block(self, parent: BlockHash, start: int, tokens: tuple[int, ...]) -> Block:
        """Return the block of some tokens, as :func:`make_block` does."""
        block = self._behind.pop(parent, None)
        # Where it starts is settled: the parent's hash stands for all that is before.
        if block is None or block.tokens != tokens:
            block = make_block(parent, start, tokens)
        self._behind[parent] = block
        if len(self._behind) > self._max_blocks:
            self._behind.popitem(last=False)
        return block
