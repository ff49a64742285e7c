"""How far an entry is from what its model computed, as far as that was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import KVStoreError
from ..format.block import EXACT_BITS, StoredBlock
from ..format.calibration import Measured, nominal_bits
from ..storage.blocks import Described


@dataclass(frozen=True, slots=True)
class Loss:
    """What is known of what an entry has lost."""

    # What was measured of the worst of its codecs, where it has lossy ones.
    worst: Measured | None = None
    # Why nobody knows, or nothing.
    unknown: str = ""

    @property
    def kl(self) -> float | None:
        """KL divergence in nats of what the model says next; ``None`` if unknown.

        That is of the calibration: of other texts, coded whole.
        """
        if self.unknown:
            return None
        return self.worst.kl if self.worst else 0.0


Blocks = Sequence[StoredBlock] | Sequence[Described]
"""What is known of blocks: all that their shards say, or what they went through."""


def find_loss(stored: Blocks, receipts: Iterable[Measured]) -> Loss:
    """Return what is known of some blocks, first to last.

    Args:
        stored: The blocks, as their shards describe them.
        receipts: What was measured of codecs of this model.
    """
    known = {one.codec: one for one in receipts}
    inexact = [block for block in stored if not block.is_exact]
    if not inexact:
        return Loss()
    lossy = {block.codec for block in inexact if not block.is_lossless}
    for codec in sorted(lossy - known.keys()):
        return Loss(unknown=f"`{codec.partition('@')[0]}` was not measured")
    if _has_other_origin(stored):
        return Loss(unknown="it was computed from rows that were coded elsewhere")
    return Loss(max((known[codec] for codec in lossy), key=lambda one: one.kl))


def _has_other_origin(stored: Blocks) -> bool:
    """Whether rows may have been computed from lossy rows that this chain lacks."""
    least, has_exact = EXACT_BITS, False
    for block in stored:
        own = EXACT_BITS if block.is_lossless else nominal_bits(block.codec) or 0
        least = min(least, own)
        # What they were computed from is before them, unless exact rows replaced it.
        if block.bits < own and (has_exact or block.bits < least):
            return True
        has_exact |= block.is_exact
    return False


def refuse_loss(loss: Loss, max_kl: float) -> None:
    """Refuse what is worse than is wanted, or not known.

    Raises:
        KVStoreError: The loss is greater than ``max_kl``, or not known.
    """
    if loss.kl is None:
        raise KVStoreError(
            f"nobody knows what was lost: {loss.unknown}",
            hint="`kvstore calibrate --model MODEL --measure-only` measures codecs",
        )
    if loss.kl > max_kl:
        raise KVStoreError(
            f"worse rows than wanted: KL {loss.kl:.2g}, and {max_kl:g} at most",
            hint="`kvstore save --exact` computes exact ones",
        )
