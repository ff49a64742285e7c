"""What a restored prompt cache remembers of its rows: a value, without the cache."""

from __future__ import annotations

from dataclasses import dataclass

from ..format.block import EXACT_BITS


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a restored prompt cache remembers of its rows."""

    # So many leading tokens' rows went through a lossy codec.
    coded_tokens: int = 0
    # The fewest bits per number that a row, or one it was computed from, was coded in.
    bits: int = EXACT_BITS
    # So many rows were computed behind other tokens than those before them now.
    num_moved: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether all rows are those that the model computes of these tokens."""
        return self.bits == EXACT_BITS and not self.num_moved

    @property
    def quality(self) -> str:
        """The same for people."""
        moved = f"{self.num_moved} re-anchored" if self.num_moved else ""
        if self.bits == EXACT_BITS:
            return moved or "exact"
        bits = f"{self.bits} bits" if self.bits else "of unknown quality"
        return f"{bits}, {moved}" if moved else bits

    def joined(self, other: Provenance) -> Provenance:
        """Return that of rows of both, which promises less of each."""
        return Provenance(
            max(self.coded_tokens, other.coded_tokens),
            min(self.bits, other.bits),
            max(self.num_moved, other.num_moved),
        )
