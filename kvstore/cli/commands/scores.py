"""What conversations with `serve` have cost, as a table: `stats --sessions`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...models.changes import ADVICE
from ..output import Column, Output, format_ago, format_count, to_rfc3339

if TYPE_CHECKING:
    from ...storage.index import Score
    from ...store import Store

_WORDS = {str(cause): words for cause, words in ADVICE.items()}
_SHORT = 8


Line = tuple["Score", float | None]
"""A conversation, and the seconds of what was computed again; ``None`` if unknown."""


def print_scores(output: Output, store: Store) -> None:
    """Print what the latest conversations have cost."""
    speeds = {s.timings[0].fingerprint: s.prefill_tps for s in store.stats().speeds}
    lines: list[Line] = []
    for score in store.scores():
        tps = speeds.get(score.fingerprint)
        lines.append((score, round(score.num_again / tps, 3) if tps else None))
    output.table(
        lines,
        _columns(lines),
        data=_data,
        id_of=lambda line: line[0].id.hex(),
        empty="no conversations with `serve` yet",
    )


def _data(line: Line) -> dict[str, Any]:
    score, again_s = line
    return asdict(score) | {
        "id": score.id.hex(),
        "cause": score.why if score.why in _WORDS else None,
        "why": _why(line),
        "began_at": to_rfc3339(score.began_at),
        "used_at": to_rfc3339(score.used_at),
        "again_s": again_s,
    }


def _columns(lines: list[Line]) -> list[Column[Line]]:
    def number(header: str, name: str, rank: int = 0) -> Column[Line]:
        total = f"{sum(getattr(score, name) for score, _ in lines):,}"
        return Column(
            header, lambda line: f"{getattr(line[0], name):,}", True, total, rank
        )

    return [
        Column(
            "SESSION",
            lambda line: line[0].id.hex()[:_SHORT],
            total=format_count(len(lines), "session"),
        ),
        number("REQUESTS", "num_requests", rank=5),
        number("MEMORY", "from_memory", rank=2),
        number("DISK", "from_disk", rank=2),
        number("MOVED", "num_reanchored", rank=4),
        number("COMPUTED", "num_computed"),
        number("AGAIN", "num_again"),
        Column("COST", _cost, True, rank=3),
        Column("USED", lambda line: format_ago(line[0].used_at), rank=6),
        Column("WHY", _why),
    ]


def _cost(line: Line) -> str:
    return "" if line[1] is None else f"{line[1]:.1f} s"


def _why(line: Line) -> str:
    """Return the reason of the worst request of a conversation, in words."""
    return _WORDS.get(line[0].why, line[0].why)
