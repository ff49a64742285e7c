"""mlx-lm's generation with a store: restore, go on, save the tokens that have rows.

A prompt cache holds rows for a while before its owner knows: Ctrl-C may come between
two layers, or between keys and values. So what is saved are the tokens up to which
mlx-lm has said that it is done, whatever the cache's own offset says.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import GenerationResponse, generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache

from turboquant.kv_cache import TurboQuantKVCache, quantize_prompt_cache

from . import prompt_cache as caches
from .catalog import check_name
from .errors import (
    EntryExistsError,
    EntryNotFoundError,
    FingerprintError,
    IntegrityError,
    StoreLockedError,
)
from .fingerprint import Fingerprint
from .store import Store
from .types import Entry, Progress

PREFILL_STEP_SIZE = 2048
"""mlx-lm's own default."""

CHECKPOINT_EVERY = 2048
"""A state may be as large as the rows of thousands of tokens."""

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


def stream_generate(
    model: Any,
    tokenizer: Any,
    prompt: str | mx.array | Sequence[int],
    *,
    store: Store,
    fingerprint: Fingerprint,
    name: str | None = None,
    replace: bool = False,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: list[LogitsProcessor] | None = None,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    checkpoint_every: int = CHECKPOINT_EVERY,
    kv_bits: int | str | None = None,
    kv_group_size: int = 64,
    prompt_progress_callback: Progress | None = None,
    load_progress: Progress | None = None,
    save_progress: Progress | None = None,
    on_saved: Callable[[Entry], None] | None = None,
) -> Generator[GenerationResponse, None, None]:
    """Generate text as mlx-lm does, from what a store holds of the prompt.

    Prompt and reply are saved at the end, when the generator is closed, and on Ctrl-C.
    Where that comes before the whole prompt is computed, what is done is saved without
    the name; where it comes in the middle of a step, only a cache whose layers are all
    ``KVCache`` can be saved.

    Args:
        model: The model, from ``mlx_lm.load``.
        tokenizer: Its tokenizer.
        prompt: Text or tokens; the whole conversation, not only what is new.
        store: Where it is restored from and saved to.
        fingerprint: The model's.
        name: A name for the entry. It moves from an entry that this continues.
        replace: Take the name from an entry that this does not continue.
        max_tokens: Tokens to generate at most; -1 for no limit.
        sampler: mlx-lm's ``sampler``.
        logits_processors: mlx-lm's; they see the tokens not restored only.
        prefill_step_size: Prompt tokens computed, and then stored, at a time.
        checkpoint_every: Tokens at least between two states of recurrent layers.
        kv_bits: Keep the live cache quantized, from its first token: ``"turbo3"`` in
            TurboQuant codes, a number of bits as mlx-lm does.
        kv_group_size: Numbers that share a scale, where ``kv_bits`` is a number.
        prompt_progress_callback: Called with (tokens computed, tokens to compute).
        load_progress: Called with (tokens restored, tokens held).
        save_progress: Called with (tokens saved, tokens in all).
        on_saved: Called with the entry.

    Yields:
        mlx-lm's responses; ``prompt_tokens`` counts those that were computed.

    Raises:
        EntryExistsError: The name is taken.
        UnsupportedCacheError: The model's prompt cache cannot be stored.
    """
    run = _Run(
        model, _encode(tokenizer, prompt), store, fingerprint, name, replace,
        load_progress, checkpoint_every, kv_bits, kv_group_size,
    )  # fmt: skip
    responses = mlx_lm.stream_generate(
        model,
        tokenizer,
        run.rest,
        max_tokens,
        sampler=sampler,
        logits_processors=logits_processors,
        prompt_cache=run.prompt_cache,
        prefill_step_size=prefill_step_size,
        prompt_progress_callback=run.watch(prompt_progress_callback),
    )
    try:
        # Closed before anything is saved: it holds MLX's stream.
        with closing(responses):
            for response in responses:
                run.add(int(response.token))
                yield response
    except GeneratorExit:
        run.save(save_progress, on_saved)
        raise
    except KeyboardInterrupt:
        run.save(save_progress, on_saved, is_interrupted=True)
        raise
    run.save(save_progress, on_saved)


def save_prompt(
    model: Any,
    tokens: Sequence[int],
    *,
    store: Store,
    fingerprint: Fingerprint,
    name: str | None = None,
    replace: bool = False,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    checkpoint_every: int = CHECKPOINT_EVERY,
    prompt_progress_callback: Progress | None = None,
    load_progress: Progress | None = None,
    save_progress: Progress | None = None,
) -> tuple[Entry, int]:
    """Compute what a store lacks of a prompt, and save it.

    Ctrl-C is met as in :func:`stream_generate`.

    Args:
        model: The model, from ``mlx_lm.load``.
        tokens: The prompt.
        store: Where it is saved.
        fingerprint: The model's.
        name: A name for the entry. It moves from an entry that this continues.
        replace: Take the name from an entry that this does not continue.
        prefill_step_size: Tokens computed, and then stored, at a time.
        checkpoint_every: Tokens at least between two states of recurrent layers.
        prompt_progress_callback: Called with (tokens computed, tokens to compute).
        load_progress: Called with (tokens restored, tokens held).
        save_progress: Called with (tokens saved, tokens in all).

    Returns:
        The entry, and how many tokens were restored instead of computed.

    Raises:
        EntryExistsError: The name is taken.
        UnsupportedCacheError: The model's prompt cache cannot be stored.
    """
    run = _Run(
        model, tokens, store, fingerprint, name, replace,
        load_progress, checkpoint_every,
    )  # fmt: skip
    try:
        prefill(
            model,
            run.rest,
            run.prompt_cache,
            prefill_step_size=prefill_step_size,
            progress=run.watch(prompt_progress_callback),
        )
    except KeyboardInterrupt:
        run.save(save_progress, is_interrupted=True)
        raise
    entry = run.save(save_progress)
    assert entry is not None  # all rows are there
    return entry, run.num_restored


def prefill(
    model: Any,
    tokens: Sequence[int],
    prompt_cache: list[Any] | None = None,
    *,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    progress: Progress | None = None,
) -> list[Any]:
    """Compute the rows of all tokens, with mlx-lm's own boundaries.

    All but the last go in steps, the last alone: so it has the same bits that
    ``generate_step`` gives it, fed to a cache that holds the others.

    Args:
        model: The model.
        tokens: What to feed; not what ``prompt_cache`` already holds.
        prompt_cache: Goes on from here; a new one by default.
        prefill_step_size: Tokens computed at a time.
        progress: Called with (tokens computed, tokens to compute).

    Returns:
        The prompt cache.
    """
    if prompt_cache is None:
        prompt_cache = make_prompt_cache(model)
    for _ in generate_step(
        mx.array(list(tokens)),
        model,
        max_tokens=0,
        prompt_cache=prompt_cache,
        prefill_step_size=prefill_step_size,
        prompt_progress_callback=progress,
    ):
        pass
    return prompt_cache


def entry_tokens(
    store: Store, name: str, fingerprint: Fingerprint | None = None
) -> list[int] | None:
    """Return the tokens of the entry with this name, or ``None``.

    Args:
        store: Where to look.
        name: Its name; not its id.
        fingerprint: The model's; ``None`` takes whatever made the entry.

    Raises:
        FingerprintError: Another model made it.
        IntegrityError: A part of it is missing or damaged.
    """
    try:
        if store.entry(name).name != name:
            return None
    except EntryNotFoundError:
        return None
    if fingerprint is not None:
        difference = store.fingerprint_of(name).difference(fingerprint)
        if difference:
            raise FingerprintError(
                f"`{name}` was made by another model: {difference}",
                hint="give the model, and the adapter, that it was saved with",
            )
    chain = store.chain(name)
    return [token for _, stored in chain for token in stored.block.tokens]


class _Run:
    """Tokens, the prompt cache that they go into, and how many of its rows are whole.

    Attributes:
        prompt_cache: Grows while mlx-lm works.
        rest: The tokens to feed.
        num_restored: Tokens that came from the store.
    """

    def __init__(
        self,
        model: Any,
        tokens: Sequence[int],
        store: Store,
        fingerprint: Fingerprint,
        name: str | None,
        replace: bool,
        progress: Progress | None,
        checkpoint_every: int,
        kv_bits: int | str | None = None,
        kv_group_size: int = 64,
    ) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._name = name
        self._replace = replace
        self._tokens = list(tokens)
        self._num_prompt = len(self._tokens)
        empty = _quantized(make_prompt_cache(model), kv_bits, kv_group_size)
        caches.check_classes(empty)
        self._check_name(empty)
        self._next_checkpoint = checkpoint_every
        self._checkpoint_every = checkpoint_every
        held, self.rest = store.load(
            self._tokens, fingerprint, like=empty, progress=progress
        )
        self.prompt_cache: list[Any] = empty if held is None else held
        self.num_restored = self._num_prompt - len(self.rest)
        self._num_rows = self.num_restored

    def watch(self, progress: Progress | None) -> Progress:
        """Return a callback for mlx-lm that keeps what is whole."""

        def note(done: int, total: int) -> None:
            self._num_rows = self.num_restored + done
            if progress is not None:
                progress(done, total)
            # At the end the cache may be a token ahead already.
            if 0 < done < total:
                self._save_blocks(done, is_last=done == total - 1)

        return note

    def _save_blocks(self, done: int, *, is_last: bool) -> None:
        """Store what a long prefill has computed so far.

        The next turn may render the reply otherwise, so that the end of this one is no
        prefix of it; the end of the prompt is.
        """
        due = is_last or done >= self._next_checkpoint
        if due:
            self._next_checkpoint = done + self._checkpoint_every
        try:
            self._store.save_blocks(
                self._tokens[: self._num_rows],
                self.prompt_cache,
                self._fingerprint,
                checkpoint=due,
            )
        except (OSError, StoreLockedError):
            return  # the save at the end says so, when the reply is there

    def add(self, token: int) -> None:
        """Note a token that was generated; mlx-lm has fed it before it told us."""
        self._tokens.append(token)
        self._num_rows = len(self._tokens)

    def save(
        self,
        progress: Progress | None,
        on_saved: Callable[[Entry], None] | None = None,
        *,
        is_interrupted: bool = False,
    ) -> Entry | None:
        """Save what is whole; nothing where that is only what was restored.

        Args:
            progress: Called with (tokens saved, tokens in all).
            on_saved: Called with the entry.
            is_interrupted: mlx-lm may have stopped in the middle of a step.
        """
        if self._num_rows <= self.num_restored:
            return None
        if is_interrupted and not self._cut():
            return None
        # A name is for a conversation, not for half a question.
        name = self._name if self._num_rows >= self._num_prompt else None
        try:
            entry = self._save(name, progress)
        except EntryExistsError as error:
            # It was taken meanwhile, or by another kind of cache: keep what was said.
            entry = self._save(None, progress)
            error.hint = f"it is kept as `{entry.id[:12]}`; {error.hint}"
            raise
        if on_saved is not None:
            on_saved(entry)
        return entry

    def _save(self, name: str | None, progress: Progress | None) -> Entry:
        return self._store.save(
            self._tokens[: self._num_rows],
            self.prompt_cache,
            self._fingerprint,
            name=name,
            replace=self._replace,
            progress=progress,
        )

    def _cut(self) -> bool:
        """Drop rows that may not be whole; return whether that can be done."""
        layers = caches.flatten_caches(self.prompt_cache)
        # A window or a state has forgotten what it was before the step.
        if not all(isinstance(cache, KVCache | TurboQuantKVCache) for cache in layers):
            return False
        for cache in layers:
            cache.trim(cache.offset - self._num_rows)
        return True

    def _check_name(self, like: list[Any]) -> None:
        """Refuse now what the store would refuse after a long prefill."""
        if self._name is None:
            return
        check_name(self._name)
        if self._replace:
            return
        with suppress(IntegrityError):  # then the store lets it be replaced
            if not self._continues(self._name, like):
                raise EntryExistsError(
                    f"the name `{self._name}` is taken by an entry that this one does"
                    " not continue",
                    hint="choose another name, or replace it with `--replace`",
                )

    def _continues(self, name: str, like: list[Any]) -> bool:
        """Say whether an entry, if there is one, is of what we start with."""
        try:
            held = entry_tokens(self._store, name, self._fingerprint)
        except FingerprintError:
            return False
        if held is None:
            return True
        is_prefix = held == self._tokens[: len(held)]
        return is_prefix and self._store.is_like(name, like)


def _quantized(
    empty: list[Any], kv_bits: int | str | None, kv_group_size: int
) -> list[Any]:
    """Return empty caches that will hold codes."""
    if kv_bits is None:
        return empty
    if isinstance(kv_bits, str):
        return quantize_prompt_cache(empty, kv_bits)
    return [
        cache.to_quantized(group_size=kv_group_size, bits=kv_bits)
        if isinstance(cache, KVCache)
        else cache
        for cache in empty
    ]


def _encode(tokenizer: Any, prompt: str | mx.array | Sequence[int]) -> list[int]:
    """Return the tokens that ``mlx_lm.stream_generate`` makes of a prompt."""
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return list(tokenizer.encode(prompt, add_special_tokens=not has_bos))
