"""Which entries to keep: those used often and lately, of models slow to compute.

A use counts half as much a day later. So several uses together count as much as a
single later one, and that moment stands for their sum. Two sums can be compared at any
time, and none has to be written again as time goes by.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import FormatError, IntegrityError
from ..fingerprint import Fingerprint
from ..format.entry import Entry
from .speeds import Speeds, is_sound

if TYPE_CHECKING:
    from ..storage.blocks import BlockStore

HALF_LIFE_S = 86_400.0
"""After so long, a use counts half as much."""


def sum_uses(moments: Sequence[float]) -> float:
    """Return the moment, in Unix seconds, that stands for some uses or sums of them."""
    latest = max(moments)
    shares = (2.0 ** ((moment - latest) / HALF_LIFE_S) for moment in moments)
    return latest + HALF_LIFE_S * math.log2(sum(shares))


def advantages(blocks: BlockStore, entries: Sequence[Entry]) -> dict[str, float]:
    """Return how many seconds later the entries of each root count as used.

    If a byte of rows takes one model twice as long to compute as another, that model's
    entries count as used a half-life later. A model whose speed was not measured counts
    as fast as the median.
    """
    tokens, nbytes = Counter[str](), Counter[str]()
    for entry in entries:
        tokens[entry.root] += entry.num_tokens
        nbytes[entry.root] += entry.nbytes
    speeds = _speeds(blocks, {entry.root: entry for entry in entries})
    return {
        root: HALF_LIFE_S
        * math.log2(tokens[root] / (speeds[root] * max(nbytes[root], 1)))
        for root in tokens
    }


def _speeds(blocks: BlockStore, entries: Mapping[str, Entry]) -> dict[str, float]:
    """Return how many tokens a second each model computes, by root.

    Args:
        blocks: The store's blocks.
        entries: One of each root.
    """
    measured = {
        timing.fingerprint: tps
        for timing in blocks.index.timings()
        if timing.codec is None and is_sound(timing)
        if (tps := Speeds(timing).prefill_tps)
    }
    if not measured:
        return dict.fromkeys(entries, 1.0)
    usual = statistics.median(measured.values())
    models = {root.hex(): model for root, model, _ in blocks.index.all_roots()}
    return {
        root: measured.get(models.get(root, ""))
        or measured.get(_model_of(blocks, entry), usual)
        for root, entry in entries.items()
    }


def _model_of(blocks: BlockStore, entry: Entry) -> str:
    """Return the digest of an entry's model, which is the same for all tenants."""
    with suppress(IntegrityError, FormatError, OSError):
        return Fingerprint(blocks.origin(entry).fingerprint).bare.digest
    return ""
