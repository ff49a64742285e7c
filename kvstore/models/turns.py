"""How a chat template marks turns, and where they begin in a conversation's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TurnMarks:
    """How a chat template marks turns, as tokens."""

    # What stands before the first message where there is no system prompt.
    opening: tuple[int, ...]
    # What begins a message of the user.
    header: tuple[int, ...]
    # What ends a reply and begins the next message of the user.
    boundary: tuple[int, ...]
    # What ends a message of the user and begins the reply.
    answer: tuple[int, ...]
    # The first token of ``boundary`` is one that ends a reply.
    is_closed_by_model: bool

    def first(self, tokens: Sequence[int]) -> int | None:
        """Return where the first message of the user begins, or ``None``."""
        return next(places(self.header, tokens), None)

    def begins(self, tokens: Sequence[int]) -> list[int]:
        """Return where each turn begins: where the conversation ended before it."""
        first = self.first(tokens)
        if first is None:
            return []
        # The token that ends a reply is the reply's.
        later = places(self.boundary, tokens)
        return [
            first,
            *(place + self.is_closed_by_model for place in later if place > first),
        ]

    def exchange(
        self, tokens: Sequence[int], begin: int
    ) -> tuple[list[int], list[int]]:
        """Return what was asked and replied in the turn that tokens end with."""
        # A header may begin with the token that ended the reply before.
        turn = tokens[max(0, begin - 1) :]
        asked = next(places(self.header, turn), 0) + len(self.header)
        replied = next(places(self.answer, turn), None)
        if replied is None:
            return list(turn[asked:]), []
        return list(turn[asked:replied]), list(turn[replied + len(self.answer) :])


def places(mark: Sequence[int], tokens: Sequence[int]) -> Iterator[int]:
    """Yield where ``mark`` stands in ``tokens``."""
    wanted, size = list(mark), len(mark)
    for place, token in enumerate(tokens):
        if token == wanted[0] and list(tokens[place : place + size]) == wanted:
            yield place
