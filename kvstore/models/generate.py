"""Generate, save prompts and go on from entries, with a store around the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from contextlib import closing, suppress

import mlx.core as mx
from mlx_lm.generate import GenerationResponse

from ..caches.live import read_provenance
from ..errors import KVStoreError
from ..format.block import EXACT_BITS, Progress
from ..format.entry import Entry
from ..store import Store
from .load import LoadedModel
from .probe import count_tokens, measure_entry
from .session import (
    CacheOptions,
    Callbacks,
    LiveCache,
    PrefillOptions,
    SamplingOptions,
    Session,
    Stopped,
    base_tokens,
    encode_text,
    respond,
)
from .templates import Template


def stream_generate(
    model: LoadedModel,
    prompt: str | mx.array | Sequence[int],
    *,
    store: Store,
    name: str | None = None,
    replace: bool | Entry = False,
    keep: bool = True,
    sampling: SamplingOptions = SamplingOptions(),
    cache: CacheOptions = CacheOptions(),
    prefilling: PrefillOptions = PrefillOptions(),
    live: LiveCache | None = None,
    callbacks: Callbacks = Callbacks(),
) -> Generator[GenerationResponse, None, None]:
    """Generate text as mlx-lm does, from what a store holds of the prompt.

    Prompt and reply are saved at the end, when the generator is closed, when
    ``callbacks.should_stop`` says so, and on Ctrl-C. Where that comes before the whole
    prompt is computed, what is done is saved without the name; where Ctrl-C comes in
    the middle of a step, only a cache whose rows can be taken back can be saved.

    Args:
        model: The model, with its tokenizer and fingerprint.
        prompt: Text or tokens; the whole conversation, not only what is new.
        store: Where it is restored from and saved to.
        name: A name for the entry. It moves from an entry that this continues.
        replace: Take the name from an entry that this does not continue; from that
            one only, as it was, where one is given.
        keep: Save prompt and reply. Without, the store is only read: no entry and no
            block is written.
        sampling: How the reply is drawn.
        cache: How the prompt cache is made.
        prefilling: How the prompt is computed.
        live: Go on from here as far as the prompt begins with its tokens, instead of
            from the store; it holds the conversation afterwards. Whether the name is
            taken is then found when saving, and half a prompt is no entry.
        callbacks: What is told, and asked, meanwhile.

    Yields:
        mlx-lm's responses; ``prompt_tokens`` counts those that were computed.

    Raises:
        EntryExistsError: The name is taken.
        UnsupportedCacheError: The model's prompt cache cannot be stored, or is none
            that a draft model can be used with.
        ValueError: The name is not one, or there is one although nothing is kept.
    """
    if name is not None and not keep:
        raise ValueError(f"nothing is kept, so there is no use for the name {name!r}")
    session = Session(
        model,
        encode_text(model.tokenizer, prompt),
        store,
        name=name,
        replace=replace,
        is_kept=keep,
        prefill=prefilling,
        live=live,
        callbacks=callbacks,
    )
    session.begin(cache)
    responses = respond(session, sampling)
    try:
        # Closed before anything is saved: it holds MLX's stream.
        with closing(responses), suppress(Stopped):
            for response in responses:
                session.add(response)
                yield response
                if session.is_stopped():
                    break
    except GeneratorExit:
        session.finish()
        raise
    except KeyboardInterrupt:
        session.finish(is_interrupted=True)
        raise
    session.finish()


def save_prompt(
    model: LoadedModel,
    tokens: Sequence[int],
    *,
    store: Store,
    name: str | None = None,
    replace: bool | Entry = False,
    cache: CacheOptions = CacheOptions(),
    prefilling: PrefillOptions = PrefillOptions(),
    live: LiveCache | None = None,
    measure: Progress | None = None,
    callbacks: Callbacks = Callbacks(),
) -> tuple[Entry, int]:
    """Compute what a store lacks of a prompt, and save it.

    Ctrl-C is met as in :func:`stream_generate`, whose arguments these are. With
    ``live``, nothing is computed where it, or the store, holds all. The rows of a draft
    model are computed and saved too. ``callbacks.should_stop`` is not asked.

    With ``measure``, only exact rows are restored, and how what is stored changes what
    the model says next is noted with the entry; it is called with (tokens said, tokens
    to say). What is measured cannot be held ``live``.

    Returns:
        The entry, and how many tokens were held instead of computed.

    Raises:
        EntryExistsError: The name is taken.
        UnsupportedCacheError: The model's prompt cache cannot be stored.
        KVStoreError: It is saved, and was not measured; or the prompt is too long for
            that, and nothing is done.
        ValueError: ``measure`` is given with ``live``, or with a cache of codes.
    """
    if measure is not None:
        if live is not None:
            raise ValueError("what is measured grows, and cannot be held live")
        count_tokens(model, len(tokens))
        cache = dataclasses.replace(cache, min_bits=EXACT_BITS)
    session = Session(
        model,
        tokens,
        store,
        name=name,
        replace=replace,
        prefill=prefilling,
        live=live,
        callbacks=dataclasses.replace(callbacks, should_stop=None),
    )
    session.begin(cache, 0 if live is not None else 1)
    if measure is not None and not read_provenance(session.prompt_cache).is_exact:
        raise ValueError("rows that the cache keeps in codes cannot be measured")
    logits = None
    try:
        if session.rest:
            session.feed()
            logits = session.feed_last()
    except KeyboardInterrupt:
        session.finish(is_interrupted=True)
        raise
    entry = session.keep()
    if measure is not None and logits is not None:
        held = session.prompt_cache
        try:
            entry = measure_entry(model, store, entry, held, logits, measure)
        except KVStoreError as error:
            raise KVStoreError(
                f"`{entry.name or entry.id[:12]}` is saved, and was not measured:"
                f" {error}",
                hint=error.hint,
            ) from error
    return entry, session.num_restored


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
