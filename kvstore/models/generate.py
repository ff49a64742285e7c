"""Generate, and save prompts, with a store around the model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import GenerationResponse

from ..fingerprint import Fingerprint
from ..format.block import Progress
from ..format.entry import Entry
from ..store import Store
from .session import (
    CHECKPOINT_EVERY,
    PREFILL_STEP_SIZE,
    _encode,
    _Models,
    _Run,
    _speculate,
    _Stopped,
    make_empty_cache,
    prefill,
)

if TYPE_CHECKING:
    from .session import LiveCache, LogitsProcessor, Sampler


def stream_generate(
    model: Any,
    tokenizer: Any,
    prompt: str | mx.array | Sequence[int],
    *,
    store: Store,
    fingerprint: Fingerprint,
    name: str | None = None,
    replace: bool | Entry = False,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: list[LogitsProcessor] | None = None,
    draft_model: Any = None,
    num_draft_tokens: int = 2,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    checkpoint_every: int = CHECKPOINT_EVERY,
    max_kv_size: int | None = None,
    kv_bits: int | str | None = None,
    kv_group_size: int = 64,
    live: LiveCache | None = None,
    should_stop: Callable[[], bool] | None = None,
    prompt_progress_callback: Progress | None = None,
    load_progress: Progress | None = None,
    save_progress: Progress | None = None,
    on_saved: Callable[[Entry], None] | None = None,
) -> Generator[GenerationResponse, None, None]:
    """Generate text as mlx-lm does, from what a store holds of the prompt.

    Prompt and reply are saved at the end, when the generator is closed, when
    ``should_stop`` says so, and on Ctrl-C. Where that comes before the whole prompt is
    computed, what is done is saved without the name; where Ctrl-C comes in the middle
    of a step, only a cache whose rows can be taken back can be saved.

    Args:
        model: The model, from ``mlx_lm.load``.
        tokenizer: Its tokenizer.
        prompt: Text or tokens; the whole conversation, not only what is new.
        store: Where it is restored from and saved to.
        fingerprint: The model's; that of both, where there is a draft model.
        name: A name for the entry. It moves from an entry that this continues.
        replace: Take the name from an entry that this does not continue; from that
            one only, as it was, where one is given.
        max_tokens: Tokens to generate at most; -1 for no limit.
        sampler: mlx-lm's ``sampler``.
        logits_processors: mlx-lm's; they see the tokens not restored only, and with a
            draft model the last token of the prompt and the reply.
        draft_model: mlx-lm's: a smaller model with the same vocabulary, which guesses
            what comes. Its caches follow the model's.
        num_draft_tokens: How many tokens it guesses at a time.
        prefill_step_size: Prompt tokens computed, and then stored, at a time.
        checkpoint_every: Tokens at least between two states of recurrent layers.
        max_kv_size: mlx-lm's: rows kept per layer, where the model does not say.
        kv_bits: Keep the live cache quantized, from its first token: ``"turbo3"`` in
            TurboQuant codes, a number of bits as mlx-lm does.
        kv_group_size: Numbers that share a scale, where ``kv_bits`` is a number.
        live: Go on from here as far as the prompt begins with its tokens, instead of
            from the store; it holds the conversation afterwards. Whether the name is
            taken is then found when saving, and half a prompt is no entry.
        should_stop: Asked between tokens, and between steps of the prompt.
        prompt_progress_callback: Called with (tokens computed, tokens to compute).
        load_progress: Called with (tokens restored, tokens held).
        save_progress: Called with (tokens saved, tokens in all).
        on_saved: Called with the entry.

    Yields:
        mlx-lm's responses; ``prompt_tokens`` counts those that were computed.

    Raises:
        EntryExistsError: The name is taken.
        UnsupportedCacheError: The model's prompt cache cannot be stored, or is none
            that a draft model can be used with.
    """
    models = _Models(model, draft_model)
    run = _Run(
        models, _encode(tokenizer, prompt), store, fingerprint, name, replace,
        checkpoint_every, live, should_stop,
    )  # fmt: skip
    empty = make_empty_cache(
        model,
        draft_model,
        max_kv_size=max_kv_size,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
    )
    run.begin(empty, load_progress)
    watch = run.watch(prompt_progress_callback)
    responses = (
        mlx_lm.stream_generate(
            model,
            tokenizer,
            run.rest,
            max_tokens,
            sampler=sampler,
            logits_processors=logits_processors,
            prompt_cache=run.prompt_cache,
            prefill_step_size=prefill_step_size,
            prompt_progress_callback=watch,
        )
        if draft_model is None
        else _speculate(
            run,
            tokenizer,
            watch,
            max_tokens=max_tokens,
            sampler=sampler,
            logits_processors=logits_processors,
            num_draft_tokens=num_draft_tokens,
            prefill_step_size=prefill_step_size,
        )
    )
    try:
        # Closed before anything is saved: it holds MLX's stream.
        with closing(responses), suppress(_Stopped):
            for response in responses:
                run.add(response)
                yield response
                if run.is_stopped():
                    break
    except GeneratorExit:
        run.finish(save_progress, on_saved)
        raise
    except KeyboardInterrupt:
        run.finish(save_progress, on_saved, is_interrupted=True)
        raise
    run.finish(save_progress, on_saved)


def save_prompt(
    model: Any,
    tokens: Sequence[int],
    *,
    store: Store,
    fingerprint: Fingerprint,
    name: str | None = None,
    replace: bool | Entry = False,
    draft_model: Any = None,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    checkpoint_every: int = CHECKPOINT_EVERY,
    max_kv_size: int | None = None,
    kv_bits: int | str | None = None,
    kv_group_size: int = 64,
    live: LiveCache | None = None,
    prompt_progress_callback: Progress | None = None,
    load_progress: Progress | None = None,
    save_progress: Progress | None = None,
    on_saved: Callable[[Entry], None] | None = None,
) -> tuple[Entry, int]:
    """Compute what a store lacks of a prompt, and save it.

    Ctrl-C is met as in :func:`stream_generate`.

    Args:
        model: The model, from ``mlx_lm.load``.
        tokens: The prompt.
        store: Where it is saved.
        fingerprint: The model's; that of both, where there is a draft model.
        name: A name for the entry. It moves from an entry that this continues.
        replace: Take the name from an entry that this does not continue; from that
            one only, as it was, where one is given.
        draft_model: Its rows are computed and saved too.
        prefill_step_size: Tokens computed, and then stored, at a time.
        checkpoint_every: Tokens at least between two states of recurrent layers.
        max_kv_size: As in :func:`stream_generate`.
        kv_bits: As in :func:`stream_generate`.
        kv_group_size: As in :func:`stream_generate`.
        live: As in :func:`stream_generate`; nothing is computed where it, or the
            store, holds all.
        prompt_progress_callback: Called with (tokens computed, tokens to compute).
        load_progress: Called with (tokens restored, tokens held).
        save_progress: Called with (tokens saved, tokens in all).
        on_saved: Called with the entry.

    Returns:
        The entry, and how many tokens were held instead of computed.

    Raises:
        EntryExistsError: The name is taken.
        UnsupportedCacheError: The model's prompt cache cannot be stored.
    """
    models = _Models(model, draft_model)
    run = _Run(
        models, tokens, store, fingerprint, name, replace, checkpoint_every, live
    )
    empty = make_empty_cache(
        model,
        draft_model,
        max_kv_size=max_kv_size,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
    )
    run.begin(empty, load_progress, num_left=0 if live is not None else 1)
    watch = run.watch(prompt_progress_callback)
    try:
        if draft_model is not None:
            run.feed(run.rest, len(run.rest), prefill_step_size, watch)
        elif run.rest:
            prefill(
                model,
                run.rest,
                run.prompt_cache,
                prefill_step_size=prefill_step_size,
                progress=watch,
            )
    except KeyboardInterrupt:
        run.finish(save_progress, on_saved, is_interrupted=True)
        raise
    return run.keep(save_progress, on_saved), run.num_restored
