"""How far an entry is from what its model computed, as far as that was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..errors import KVStoreError
from ..fingerprint import Fingerprint
from ..format.block import EXACT_BITS, LayerError, StoredBlock
from ..format.calibration import Measured, rank
from ..format.chain import is_reanchored
from ..format.documents import blake3_hex
from ..format.entry import Entry
from ..format.probe import Probe
from ..storage import files
from ..storage.bases import find_calibration
from ..storage.blocks import BlockStore, Described
from ..storage.entries import Catalog


@dataclass(frozen=True, slots=True)
class Loss:
    """What is known of what an entry has lost."""

    # What was measured of the worst of its codecs, where it has lossy ones.
    worst: Measured | None = None
    # Why nobody knows, or nothing.
    unknown: str = ""
    # That is the word of whoever saved it: this store has not measured the codec.
    is_told: bool = False
    # What was measured of the entry itself, with the blocks that it has now.
    probe: Probe | None = None

    @property
    def kl(self) -> float | None:
        """KL divergence in nats of what the model says next; ``None`` if unknown.

        Of the calibration, which is of other texts, and of the entry itself, the larger
        one that is known.
        """
        known = [self.probe.kl] if self.probe else []
        if not self.unknown:
            known.append(self.worst.kl if self.worst else 0.0)
        return max(known, default=None)


Blocks = Sequence[StoredBlock | Described]
"""What is known of blocks: all that their shards say, or what they went through."""


def loss_of(blocks: BlockStore, entry: Entry, stored: Iterable[StoredBlock]) -> Loss:
    """Return what is known of an entry, by its blocks as they are stored."""
    model, held = Fingerprint(blocks.origin(entry).fingerprint), list(stored)
    if is_reanchored(model.fields):
        return Loss(unknown="its rows were computed behind other words")
    found = find_calibration(blocks.folder, model.bare.digest)
    loss = find_loss(held, found.told if found else (), entry.receipts)
    probe = entry.probe
    is_current = probe is not None and probe.blocks == digest_of(held)
    return replace(loss, probe=probe if is_current else None)


def digest_of(stored: Iterable[StoredBlock]) -> str:
    """Return a digest of the digests of some blocks, as they are stored."""
    return blake3_hex(*(block.digest.encode() for block in stored))


def note_probe(
    blocks: BlockStore, catalog: Catalog, entry: Entry, probe: Probe
) -> Entry:
    """Keep with an entry what was measured of it.

    Raises:
        EntryNotFoundError: It is gone.
        KVStoreError: It has changed meanwhile.
    """
    with files.locked(blocks.folder.lock, exclusive=True):
        if catalog.find(entry.id) != entry:
            raise KVStoreError(
                "the entry has changed meanwhile", hint="run it again to measure it"
            )
        return catalog.commit(replace(entry, probe=probe))


def find_loss(
    stored: Blocks, own: Iterable[Measured], told: Iterable[Measured] = ()
) -> Loss:
    """Return what is known of some blocks, first to last.

    Args:
        stored: The blocks, as their shards describe them.
        own: What was measured of codecs of this model.
        told: What an entry says of them, where nothing was measured here.
    """
    measured = {one.codec: one for one in own}
    known = {one.codec: one for one in told} | measured
    lossy = {block.codec for block in stored if not block.is_lossless}
    for codec in sorted(lossy - known.keys()):
        return Loss(unknown=f"`{codec.partition('@')[0]}` was not measured")
    ranks: dict[str, int] = {}
    for block in stored:
        ranks[block.codec] = max(ranks.get(block.codec, 0), block.bits)
    for codec in ranks:
        # Only where a codec was measured is it known as how many bits it counts.
        if codec not in lossy:
            ranks[codec] = EXACT_BITS
        elif codec in measured:
            ranks[codec] = rank(codec, measured.values()) or 0
    coded = [block.bits < ranks[block.codec] for block in stored]
    if any(coded):
        why = (
            f"its block {coded.index(True) + 1} was computed from rows that were coded"
        )
        return Loss(unknown=why)
    worst = max((known[codec] for codec in lossy), key=lambda one: one.kl, default=None)
    return Loss(worst, is_told=worst is not None and worst.codec not in measured)


@dataclass(frozen=True, slots=True)
class Errors:
    """How far stored rows are from those that were given, in some of the blocks."""

    # Lossy blocks, and those in which it was measured.
    num_lossy: int
    num_measured: int
    # Over all of these, by layer and side.
    layers: tuple[LayerError, ...]


def join_errors(stored: Iterable[StoredBlock]) -> Errors:
    """Return what the errors of some blocks are together, layer by layer."""
    lossy = [block for block in stored if not block.is_lossless]
    measured = [block for block in lossy if block.errors]
    squares: dict[tuple[int, str], list[float]] = {}
    for block in measured:
        for layer, side, error in block.errors:
            squares.setdefault((layer, side), []).append(error**2)
    layers = tuple(
        LayerError(*where, math.sqrt(sum(found) / len(found)))
        for where, found in sorted(squares.items())
    )
    return Errors(len(lossy), len(measured), layers)


def refuse_loss(loss: Loss, max_kl: float) -> None:
    """Refuse what is worse than is wanted, or not known.

    Raises:
        KVStoreError: The loss is greater than ``max_kl``, or not known.
    """
    if loss.kl is None:
        raise KVStoreError(
            f"nobody knows what was lost: {loss.unknown}",
            hint="`kvstore calibrate --model MODEL --measure-only` measures codecs,"
            " `kvstore save --measure` one entry",
        )
    if loss.kl > max_kl:
        raise KVStoreError(
            f"worse rows than wanted: KL {loss.kl:.2g}, and {max_kl:g} at most",
            hint="`kvstore save --exact` computes exact ones",
        )
