"""Where a prompt differs from one that is stored, and what to do about it.

A store finds prefixes: all that stands behind a first difference is computed again, be
it the same or not. Each change is told with how much of the same stands behind it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from typing import Literal

from ..format.chain import common_run

Decode = Callable[[Sequence[int]], str]
Cause = Literal[
    "tokens", "space", "order", "thinking", "tools", "clock", "id", "place", "text"
]
ADVICE: dict[Cause, str] = {
    "tokens": "the same text in other tokens: a reply was sampled so, and nothing in"
    " the client changes it",
    "space": "only white space differs: send messages as they were received",
    "order": "the same parts in another order: send them sorted, tools by name",
    "thinking": "the chat template leaves out earlier reasoning: a variable of the"
    " template may keep it",
    "tools": "the tools are others: offer the same ones in each request",
    "clock": "a date or a time: leave it out, or put it into the last message",
    "id": "an id that is new each time: leave it out, or put it into the last message",
    "place": "a folder, or the state of a repository: put it into the last message",
    "text": "keep what stays in front, to the letter, and put what changes behind it",
}
"""What to change, for each cause."""
# Fewer tokens in common, between two changes, are there by accident.
_MIN_RUN = 32
_MAX_SHOWN = 60
_AROUND = 24
_CUTS = frozenset("\n.,;:{}<>")
_CLOCK = re.compile(
    r"\d{4}-\d\d|\d{1,2}:\d\d|\b\d{1,2}[./]\d{1,2}[./]\d{2,4}"
    r"|\b(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\b.*\d"
    r"|\b(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b"
)
_ID = re.compile(r"\b(?=[0-9a-f-]*\d)[0-9a-f][0-9a-f-]{7,}\b", re.IGNORECASE)
_PLACE = re.compile(r"\bgit\b|branch|commit|folder|director|cwd|[\w.~]/[\w.]", re.I)
_WORD = re.compile(r"\w+")
_TOOL = re.compile(r'"(?:function|parameters|input_schema)"|\btools?\b')


@dataclass(frozen=True, slots=True)
class Change:
    """One place where a prompt differs from a stored one, and goes on the same."""

    # Of the first token that differs, in the prompt.
    position: int
    # Of the line that it stands in, from 1.
    line: int
    # What differs, with the rest of its line around it.
    stored: str
    given: str
    # So many tokens behind it are the same, up to the next change.
    num_behind: int
    cause: Cause

    @property
    def advice(self) -> str:
        """What to change."""
        return ADVICE[self.cause]


@dataclass(frozen=True, slots=True)
class _Span:
    """Tokens that differ: ``stored[a:b]`` against ``given[c:d]``."""

    a: int
    b: int
    c: int
    d: int


def find_changes(
    stored: Sequence[int], given: Sequence[int], decode: Decode
) -> list[Change]:
    """Return where a prompt differs from a stored one, first to last.

    What differs at the end is left out: nothing stands behind it.
    """
    spans = list(_spans(stored, given, decode))
    ends = [span.c for span in spans[1:]]
    parts = [(decode(stored[s.a : s.b]), decode(given[s.c : s.d])) for s in spans]
    found = []
    for number, (span, end) in enumerate(zip(spans, ends, strict=False)):
        here = decode(given[: span.c])
        sides = (
            _show(stored, span.a, span.b, decode),
            _show(given, span.c, span.d, decode),
        )
        cause = _cause(number, parts, sides)
        line = here.count("\n") + 1
        found.append(Change(span.c, line, *sides, end - span.d, cause))
    return found


def _split(
    tokens: Sequence[int], is_end: Callable[[int], bool]
) -> list[tuple[int, ...]]:
    found, begin = [], 0
    for position, token in enumerate(tokens, 1):
        if is_end(token) or position == len(tokens):
            found.append(tuple(tokens[begin:position]))
            begin = position
    return found


def _spans(
    stored: Sequence[int], given: Sequence[int], decode: Decode
) -> Iterator[_Span]:
    """Yield what differs; the last span ends both, and may be empty."""

    @cache
    def is_end(token: int) -> bool:
        # Of a sentence, a line, or a part of JSON.
        return not _CUTS.isdisjoint(decode([token]))

    begin = common_run(stored, given)
    left, right = _split(stored[begin:], is_end), _split(given[begin:], is_end)
    ours, theirs = _starts(left, begin), _starts(right, begin)
    matcher = SequenceMatcher(None, left, right, autojunk=False)
    a, c = begin, begin
    for i, j, size in matcher.get_matching_blocks():
        is_last = size == 0
        if not is_last and theirs[j + size] - theirs[j] < _MIN_RUN:
            continue
        span = _Span(a, ours[i], c, theirs[j])
        yield span if is_last else _tightened(span, stored, given)
        a, c = ours[i + size], theirs[j + size]


def _tightened(span: _Span, stored: Sequence[int], given: Sequence[int]) -> _Span:
    left, right = list(stored[span.a : span.b]), list(given[span.c : span.d])
    first = common_run(left, right)
    left, right = left[first:], right[first:]
    last = common_run(left[::-1], right[::-1])
    return _Span(span.a + first, span.b - last, span.c + first, span.d - last)


def _starts(pieces: Sequence[Sequence[int]], begin: int) -> list[int]:
    found = [begin]
    for piece in pieces:
        found.append(found[-1] + len(piece))
    return found


def _show(tokens: Sequence[int], begin: int, end: int, decode: Decode) -> str:
    """Return the text of some tokens, marked, with what stands around in its line."""
    before = decode(tokens[max(0, begin - _AROUND) : begin]).rpartition("\n")[2]
    after = decode(tokens[end : end + _AROUND]).partition("\n")[0]
    inside = decode(tokens[begin:end])
    if len(inside) > _MAX_SHOWN:
        half = _MAX_SHOWN // 2
        inside = f"{inside[:half]}…{inside[-half:]}"
    return f"{before}⟦{inside}⟧{after}"


def _cause(
    number: int, parts: Sequence[tuple[str, str]], sides: tuple[str, str]
) -> Cause:
    """Return why one of some changes was made, as far as its text says.

    ``parts`` has what is stored and given of every change, ``sides`` that of this one
    with what stands around it.
    """
    was, now = parts[number]
    if was == now:
        return "tokens"
    if was.split() == now.split() or (was + now).isspace():
        return "space"
    if "think" in was and "think" not in now:
        return "thinking"
    if _is_moved(was, [new for _, new in parts]) and _is_moved(
        now, [old for old, _ in parts]
    ):
        return "order"
    if _TOOL.search(was + now) and max(len(was), len(now)) > _MAX_SHOWN:
        return "tools"
    plain = [side.replace("⟦", "").replace("⟧", "") for side in sides]
    for cause, pattern in _PATTERNS.items():
        if all(map(pattern.search, plain)):
            return cause
    return "text"


_PATTERNS: dict[Cause, re.Pattern[str]] = {"clock": _CLOCK, "id": _ID, "place": _PLACE}


def _is_moved(text: str, others: Sequence[str]) -> bool:
    words = Counter(_WORD.findall(text))
    there = Counter(word for other in others for word in _WORD.findall(other))
    return (words & there).total() >= 0.9 * words.total()
