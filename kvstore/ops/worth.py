"""Which entries to keep: those used often and lately, of models slow to compute.

A use counts half as much a day later. So several uses together count as much as a
single later one, and that moment stands for their sum. Two sums can be compared at any
time, and none has to be written again as time goes by.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

from ..format.entry import Entry
from ..storage.index import Index
from .speeds import Speeds, is_sound

HALF_LIFE_S = 86_400.0
"""After so long, a use counts half as much."""


def sum_uses(moments: Sequence[float]) -> float:
    """Return the moment that stands for some uses, or for sums of them.

    Args:
        moments: Unix seconds, at least one.
    """
    latest = max(moments)
    shares = (2.0 ** ((moment - latest) / HALF_LIFE_S) for moment in moments)
    return latest + HALF_LIFE_S * math.log2(sum(shares))


def advantages(index: Index, entries: Sequence[Entry]) -> dict[str, float]:
    """Return how many seconds later the entries of each root count as used.

    If a byte of rows takes one model twice as long to compute as another, that model's
    entries count as used a half-life later. A model whose speed was not measured counts
    as fast as the median.
    """
    measured = {
        timing.fingerprint: tps
        for timing in index.timings()
        if timing.codec is None and is_sound(timing)
        if (tps := Speeds(timing).prefill_tps)
    }
    usual = statistics.median(measured.values()) if measured else 1.0
    speeds = {
        root.hex(): measured.get(fingerprint, usual)
        for root, fingerprint, _ in index.all_roots()
    }
    tokens, nbytes = Counter[str](), Counter[str]()
    for entry in entries:
        tokens[entry.root] += entry.num_tokens
        nbytes[entry.root] += entry.nbytes
    return {
        root: HALF_LIFE_S
        * math.log2(tokens[root] / (speeds.get(root, usual) * max(nbytes[root], 1)))
        for root in tokens
    }
