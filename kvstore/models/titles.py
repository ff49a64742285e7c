"""What a conversation is about, in a few words: those that it begins with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ..errors import KVStoreError
from ..format.entry import clean_title
from .templates import Template, TurnMarks

_NUM_TOKENS = 64
"""Enough for a title in any language."""


def make_title(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return what :func:`title_maker` makes of one conversation."""
    return title_maker(tokenizer)(tokens)


def title_maker(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Return what makes titles: the first words of the first message of the user.

    It is a function of a conversation's tokens, which any thread may call. A title has
    at most 80 characters on one line. Where the chat template does not tell messages
    apart, it has the first words of all. Without a tokenizer it is empty.
    """
    if tokenizer is None:
        return lambda tokens: ""
    marks: TurnMarks | None = None
    if tokenizer.has_chat_template:
        with suppress(KVStoreError):
            marks = Template(tokenizer).marks

    def make(tokens: Sequence[int]) -> str:
        first = _first_message(marks, tokens)[:_NUM_TOKENS]
        texts = [token for token in first if token >= 0]  # others are media
        text = tokenizer.decode(texts, skip_special_tokens=True)
        # A character that was cut in the middle.
        return clean_title(str(text).rstrip("\ufffd"))

    return make


def _first_message(marks: TurnMarks | None, tokens: Sequence[int]) -> list[int]:
    first = None if marks is None else marks.first(tokens)
    if marks is None or first is None:
        return list(tokens[:_NUM_TOKENS])
    end = first + len(marks.header) + _NUM_TOKENS + len(marks.answer)
    return marks.exchange(tokens[first:end], 0)[0]
