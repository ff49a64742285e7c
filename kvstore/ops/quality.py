"""How far an entry is from what its model computed, as far as that was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import KVStoreError
from ..format.block import StoredBlock
from ..format.calibration import Measured, nominal_bits


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


def find_loss(stored: Sequence[StoredBlock], receipts: Iterable[Measured]) -> Loss:
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
    bits = [nominal_bits(codec) or 0 for codec in lossy]
    # Rows may come from worse ones that lie somewhere else, or did once.
    if not bits or min(block.bits for block in inexact) < min(bits):
        return Loss(unknown="it was computed from rows that were coded elsewhere")
    return Loss(max((known[codec] for codec in lossy), key=lambda one: one.kl))


def refuse_loss(loss: Loss, max_kl: float) -> None:
    """Refuse what is worse than is wanted, or not known.

    Raises:
        KVStoreError: It is such.
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
