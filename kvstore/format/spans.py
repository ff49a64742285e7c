"""Where a prefix may end. Knows nothing of blocks or files.

A model is fed some parts of a prompt as a unit: an image, for example, whose rows come
from its pixels and not from its tokens. A prefix that ends inside such a part leaves a
caller with tokens that it cannot feed.
"""

from __future__ import annotations

from collections.abc import Sequence

Span = tuple[int, int]
"""First position of a part that is fed as a unit, and the position behind it."""


def last_end(tokens: Sequence[int], end: int, spans: Sequence[Span] = ()) -> int:
    """Return the last position up to ``end`` that lies inside no unit.

    Args:
        tokens: The prompt. A run of one negative id is one unit of media.
        end: Where a prefix would end: the number of its tokens.
        spans: More units, as the caller names them.
    """
    while (start := _unit_start(tokens, end, spans)) < end:
        end = start
    return end


def _unit_start(tokens: Sequence[int], end: int, spans: Sequence[Span]) -> int:
    """Return where the unit around ``end`` starts; ``end`` where there is none."""
    first = min([end, *(start for start, stop in spans if start < end < stop)])
    if end < len(tokens) and tokens[end] < 0:
        while end > 0 and tokens[end - 1] == tokens[end]:
            end -= 1
    return max(0, min(first, end))
