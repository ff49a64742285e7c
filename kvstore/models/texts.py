"""What is kept, as text again: one entry, or all of them searched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..errors import IntegrityError, KVStoreError
from ..format.entry import Entry
from ..store import Store
from .load import load_tokenizer

_AROUND = 40
"""Characters shown on either side of what was searched."""


@dataclass(frozen=True, slots=True)
class Hit:
    """An entry that has a word in it."""

    entry: Entry
    # How often; 0 where only its name or title has it.
    num_places: int
    # The text around the first place, or the title.
    excerpt: str


def entry_text(
    store: Store, entry: Entry, tokenizer: Any, num_last: int | None = None
) -> str:
    """Return the text of an entry, or its last tokens', with its chat template's marks.

    Raises:
        EntryNotFoundError: It is gone.
        IntegrityError: A part of it is missing or damaged.
    """
    chain = store.chain(entry.id)
    tokens = [token for _, stored in chain for token in stored.block.tokens]
    return decode(tokenizer, tokens if num_last is None else tokens[-num_last:])


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of tokens, in which an image, or other media, is one mark.

    Negative tokens are media, as ``DiskPromptCache`` takes them.
    """
    runs = groupby(tokens, lambda token: token < 0)
    return "".join(
        "[media]" if media else str(tokenizer.decode(list(run))) for media, run in runs
    )


def tokenizer_of(entry: Entry, model: str | None = None) -> Any:
    """Return the tokenizer of the model that made an entry.

    Raises:
        KVStoreError: There is no such model, where the entry says or where it is now.
    """
    try:
        return load_tokenizer(model or entry.model)
    except KVStoreError as error:
        if model is None:
            error.hint = "`--model` says where the model lies now"
        raise


def search(
    store: Store,
    word: str,
    *,
    load: Callable[[Entry], Any],
    unread: Callable[[str, KVStoreError], None],
) -> Iterator[Hit]:
    """Yield the entries that have a word in their text, name or title, latest first.

    Upper and lower case are the same.

    Args:
        store: Whose entries.
        word: What is searched.
        load: Returns the tokenizer of an entry; called once per model.
        unread: Called with the model, or the entry, whose text cannot be searched, and
            why.
    """
    loaded: dict[str, Any] = {}
    for entry in store.entries():
        text = f"{entry.name or ''} {entry.title}"
        if entry.model not in loaded:
            try:
                loaded[entry.model] = load(entry)
            except KVStoreError as error:
                loaded[entry.model] = None
                unread(entry.model, error)
        tokenizer = loaded[entry.model]
        if tokenizer is not None:
            try:
                body = entry_text(store, entry, tokenizer)
            except IntegrityError as error:
                unread(entry.name or entry.id, error)
            else:
                if places := _places(body, word):
                    yield Hit(entry, len(places), _excerpt(body, places[0], word))
                    continue
        if _places(text, word):
            yield Hit(entry, 0, entry.title)


def _places(text: str, word: str) -> list[int]:
    text, word = text.lower(), word.lower()
    found, place = [], text.find(word)
    while place >= 0:
        found.append(place)
        place = text.find(word, place + len(word))
    return found


def _excerpt(text: str, place: int, word: str) -> str:
    start, end = max(0, place - _AROUND), place + len(word) + _AROUND
    shown = " ".join(text[start:end].split())
    return f"{'…' * (start > 0)}{shown}{'…' * (end < len(text))}"
