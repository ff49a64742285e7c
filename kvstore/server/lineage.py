"""What lossy restores a process has handed out. Knows tokens only.

A restored prompt cache carries a mark of what its rows went through. Merging caches
into a batch and extracting them again loses it, so a server finds it here again, by the
tokens: too much is taken for lossy where conversations part, and never too little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..caches.provenance import Provenance
from ..format.block import EXACT_BITS, BlockHash
from ..format.chain import BLOCK_SIZE, pack_tokens
from ..format.known import KnownBlocks

Step = tuple[str, BlockHash, int]
"""Digest of a fingerprint, hash of what comes before a block, and its first token."""


class Lineage:
    """Remembers which tokens' rows came out of a lossy restore."""

    def __init__(self) -> None:
        self._coded: set[Step] = set()
        self._bits: dict[Step, int] = {}
        self._known = KnownBlocks(BLOCK_SIZE)

    @property
    def is_empty(self) -> bool:
        """Whether there was no such restore."""
        return not self._bits

    def note(
        self, fingerprint: str, tokens: Sequence[int], provenance: Provenance
    ) -> None:
        """Remember a restore."""
        if provenance.is_exact:
            return
        for start, _, step in self._steps(fingerprint, tokens):
            self._bits[step] = min(self._bits.get(step, EXACT_BITS), provenance.bits)
            if start < provenance.coded_tokens:
                self._coded.add(step)

    def of(self, fingerprint: str, tokens: Sequence[int]) -> Provenance:
        """Return what rows computed for these tokens may have gone through."""
        if self.is_empty:
            return Provenance()
        coded, bits = 0, EXACT_BITS
        for _, stop, step in self._steps(fingerprint, tokens):
            bits = min(bits, self._bits.get(step, EXACT_BITS))
            coded = stop if step in self._coded else coded
        return Provenance(coded, bits)

    def _steps(
        self, fingerprint: str, tokens: Sequence[int]
    ) -> Iterator[tuple[int, int, Step]]:
        """Yield where each block starts and stops, and what it begins with."""
        root = BlockHash(bytes(32))
        for block in self._known.split(root, pack_tokens(tokens)):
            stop = block.start + len(block.tokens)
            yield block.start, stop, (fingerprint, block.parent, block.tokens[0])
