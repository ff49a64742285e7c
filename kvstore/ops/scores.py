"""What conversations with a server cost: which rows were there, which were computed.

Counts, and a reason in a word: of what was said, neither text nor tokens are kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

import blake3

from ..errors import IndexDamagedError
from ..storage.index import Index, Score

MAX_SCORES = 256
"""Conversations that are known, the latest."""
_ID_BYTES = 8
# Fewer tokens are no loss that anybody would ask about.
_LEAST = 64


def add(known: Score | None, new: Score) -> Score:
    """Return the score of a conversation with one more request."""
    if known is None:
        return replace(new, why="")
    prompt = new.from_memory + new.from_disk + new.num_computed
    again = max(0, new.num_computed - max(0, prompt - known.num_tokens))
    is_worst = again >= max(_LEAST, known.worst)
    return replace(
        new,
        num_requests=known.num_requests + new.num_requests,
        from_memory=known.from_memory + new.from_memory,
        from_disk=known.from_disk + new.from_disk,
        num_reanchored=known.num_reanchored + new.num_reanchored,
        num_computed=known.num_computed + new.num_computed,
        num_again=known.num_again + again,
        worst=again if is_worst else known.worst,
        why=new.why if is_worst else known.why,
        began_at=known.began_at,
    )


def write(index: Index, noted: Iterable[Score]) -> None:
    """Add requests, in their order, to what an index knows.

    What was noted before a purge is left out: it may be of what was purged.
    """
    try:
        (key, since), scores = index.score_key(), index.scores()
    except IndexDamagedError:
        # Or nothing would be noted any more, of hits and speeds neither.
        index.forget_scores(since=time.time())
        return
    known = {score.id: score for score in scores}
    changed = {}
    for score in noted:
        if score.used_at >= since:
            model = score.fingerprint.encode()
            name = blake3.blake3(score.id + model, key=key).digest(_ID_BYTES)
            named = replace(score, id=name)
            changed[name] = known[name] = add(known.get(name), named)
    for score in changed.values():
        index.put_score(score)
    index.drop_scores(keep=MAX_SCORES)
