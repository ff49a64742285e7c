"""A question to what is kept: an entry's tokens, and one more message behind them."""

from __future__ import annotations

from ..store import Store
from .load import LoadedModel
from .session import base_tokens
from .templates import Template


def continue_entry(
    model: LoadedModel,
    store: Store,
    ref: str,
    text: str,
    template: Template | None = None,
) -> list[int]:
    """Return the tokens of an entry with one more message behind them.

    The entry, which ``ref`` names by its name, id or the start of it, stays as it is.
    :func:`stream_generate` with ``keep=False`` answers without keeping anything; with a
    ``name`` it keeps question and answer under that.

    Raises:
        EntryNotFoundError: There is no such entry.
        FingerprintError: Another model made it.
        IntegrityError: A part of it is missing or damaged.
        ValueError: The chat template leaves out parts of a conversation.
    """
    held = base_tokens(store, ref, model.fingerprint)
    template = template or Template(model.tokenizer)
    return held + template.encode_next(text, held)
