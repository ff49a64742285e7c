"""What a conversation is about, in a few words: those that it begins with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..errors import KVStoreError
from ..format.entry import clean_title
from .templates import Template

_NUM_TOKENS = 64
"""Enough for a title in any language."""


def make_title(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the first words of the first message of the user.

    Args:
        tokenizer: The model's, from mlx-lm; ``None`` gives no title.
        tokens: The conversation.

    Returns:
        At most 80 characters on one line. Where the chat template does not tell
        messages apart, the first words of all.
    """
    if tokenizer is None:
        return ""
    first = _first_message(tokenizer, tokens)
    text = tokenizer.decode(first[:_NUM_TOKENS], skip_special_tokens=True)
    # A character that was cut in the middle.
    return clean_title(str(text).rstrip("\ufffd"))


def _first_message(tokenizer: Any, tokens: Sequence[int]) -> list[int]:
    """Return the first message of the user, or its beginning."""
    if tokenizer.has_chat_template:
        with suppress(KVStoreError):
            marks = Template(tokenizer).marks
            first = marks.first(tokens)
            if first is not None:
                end = first + len(marks.header) + _NUM_TOKENS + len(marks.answer)
                return marks.last_exchange(tokens[first:end], 0)[0]
    return list(tokens[:_NUM_TOKENS])
