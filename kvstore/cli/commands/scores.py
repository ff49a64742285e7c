"""What conversations with `serve` have cost, as a table: `stats --sessions`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...models.changes import ADVICE
from ..output import Column, Output, format_ago, format_count, to_rfc3339

if TYPE_CHECKING:
    from ...storage.index import Score
    from ...store import Store

_WORDS = {str(cause): words for cause, words in ADVICE.items()}
_SHORT = 8


@dataclass(frozen=True, slots=True)
class Line:
    """A conversation, and by how much it was slower than it need have been."""

    score: Score
    # Seconds for what was computed again; ``None`` where nobody has measured it.
    again_s: float | None

    @property
    def why(self) -> str:
        """The reason of its worst request, in words."""
        return _WORDS.get(self.score.why, self.score.why)

    @property
    def data(self) -> dict[str, Any]:
        """All of it, as a JSON value."""
        score = self.score
        times = {
            name: to_rfc3339(getattr(score, name)) for name in ("began_at", "used_at")
        }
        cause = score.why if score.why in _WORDS else None
        told = {"id": score.id.hex(), "cause": cause, "why": self.why}
        return asdict(score) | told | times | {"again_s": self.again_s}


def print_scores(output: Output, store: Store) -> None:
    """Print what the latest conversations have cost."""
    speeds = {s.fingerprint: s.prefill_tps for s in store.stats().speeds}
    lines = []
    for score in store.scores():
        tps = speeds.get(score.fingerprint)
        lines.append(Line(score, round(score.num_again / tps, 3) if tps else None))
    output.table(
        lines,
        _columns(lines),
        data=lambda line: line.data,
        id_of=lambda line: line.score.id.hex(),
        empty="no conversations with `serve` yet",
    )


def _columns(lines: list[Line]) -> list[Column[Line]]:
    def number(header: str, name: str, rank: int = 0) -> Column[Line]:
        total = f"{sum(getattr(line.score, name) for line in lines):,}"
        return Column(
            header, lambda line: f"{getattr(line.score, name):,}", True, total, rank
        )

    return [
        Column(
            "SESSION",
            lambda line: line.score.id.hex()[:_SHORT],
            total=format_count(len(lines), "session"),
        ),
        number("REQUESTS", "num_requests", rank=5),
        number("MEMORY", "from_memory", rank=2),
        number("DISK", "from_disk", rank=2),
        number("MOVED", "num_reanchored", rank=4),
        number("COMPUTED", "num_computed"),
        number("AGAIN", "num_again"),
        Column("COST", _cost, True, rank=3),
        Column("USED", lambda line: format_ago(line.score.used_at), rank=6),
        Column("WHY", lambda line: line.why),
    ]


def _cost(line: Line) -> str:
    return "" if line.again_s is None else f"{line.again_s:.1f} s"
