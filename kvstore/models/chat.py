"""A conversation that is there again tomorrow. Knows no terminal.

It is its tokens, as they were fed and generated: no turn is ever rendered again. Rows
stay in a live cache between turns, and each turn is saved as it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import (
    EntryExistsError,
    EntryNotFoundError,
    IntegrityError,
    KVStoreError,
    StoreLockedError,
)
from ..format.entry import Entry, check_name
from ..store import Store
from .generate import save_prompt, stream_generate
from .load import LoadedModel
from .session import (
    CacheOptions,
    Callbacks,
    LiveCache,
    PrefillOptions,
    SamplingOptions,
    base_tokens,
    check_kv_bits,
    entry_tokens,
    has_entry,
    make_empty_cache,
)
from .templates import Template

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse

MAX_TOKENS = 2048
"""Enough for a long reply; a model that finds no end is stopped all the same."""


class Chat:
    """A conversation with a model, kept in a store.

    Errors of saving come when a reply is complete: the conversation goes on all the
    same, and the next turn, or :meth:`save`, saves all that was said.

    Args:
        model: The model, with its tokenizer and fingerprint.
        store: Where the conversation is kept.
        name: Goes on with the entry of this name, or gives it to a new one.
        base: Name or id of an entry that the chat begins with, and leaves as it is.
            Nothing is kept then, unless there is a name, or :meth:`fork` or
            :meth:`rename` gives one.
        system_prompt: What the system says first; not used where there is an entry.
        template: How the conversation is rendered; as the model's tokenizer says by
            default.
        sampling: How replies are drawn.
        cache: How the prompt cache is made.
        prefilling: How prompts are computed.
        callbacks: What is told, and asked, meanwhile.

    Attributes:
        name: The name under which each turn is saved, or ``None``.
        base: The entry that the chat began with and leaves as it is, or ``None``.
        is_kept: Each turn is saved as it ends.
        entry: The entry as it was last saved, or ``None``.
        num_restored: Tokens restored from disk, over all turns of this session.
        num_computed: Tokens of prompts that were computed, over the same.
        num_generated: Tokens of replies, over the same.

    Raises:
        EntryExistsError: The name has an entry that does not begin with the base.
        EntryNotFoundError: There is no such base.
        FingerprintError: Another model made the entry, or the base.
        IntegrityError: A part of the entry, or of the base, is missing or damaged.
        UnsupportedCacheError: The model's prompt cache cannot be stored, or is none
            that a draft model can be used with.
        ValueError: The name is not one, or a system prompt has no chat template.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        store: Store,
        name: str | None = None,
        base: str | None = None,
        system_prompt: str | None = None,
        template: Template | None = None,
        sampling: SamplingOptions = SamplingOptions(max_tokens=MAX_TOKENS),
        cache: CacheOptions = CacheOptions(),
        prefilling: PrefillOptions = PrefillOptions(),
        callbacks: Callbacks = Callbacks(),
    ) -> None:
        check_name(name)
        self._model = model
        self._store = store
        self._fingerprint = model.fingerprint
        self.name = name
        self.base = base
        self.is_kept = base is None or name is not None
        self._system_prompt = system_prompt
        self._template = template or Template(model.tokenizer)
        if system_prompt is not None and self._template.is_plain:
            raise ValueError("a system prompt needs a chat template, and none is used")
        self._empty = make_empty_cache(model, cache)
        check_kv_bits(model, cache)
        self._sampling = sampling
        self._cache_options = cache
        self._prefilling = prefilling
        self._callbacks = callbacks
        self._live = LiveCache()
        self.entry: Entry | None = None
        self._tokens: list[int] = []
        self._num_saved = 0
        # Entries without a name that this chat has made; one at a time is enough.
        self._own: set[str] = set()
        self.num_restored = self.num_computed = self.num_generated = 0
        self._num_loaded = 0
        if name is not None:
            self._resume(name)
        if base is not None:
            self._begin_with(base)
        # Where each turn begins that is known of; those before, if any, are not.
        self._begins: list[int] = []
        self._why_unknown: KVStoreError | None = None
        self._find_turns()

    @property
    def tokens(self) -> list[int]:
        """The tokens of the whole conversation."""
        return list(self._tokens)

    @property
    def num_turns(self) -> int | None:
        """Turns so far: what the user said, and the reply; ``None`` if unknown."""
        return None if self._why_unknown else len(self._begins)

    @property
    def num_restorable(self) -> int:
        """Tokens whose rows the store holds as this chat wants them."""
        # One more than there is: it is the last that is never restored.
        wanted = [*self._tokens, -1]
        return self._store.lookup(
            wanted,
            self._fingerprint,
            min_bits=self._cache_options.min_bits,
            like=self._empty,
        ).num_tokens

    @property
    def cache_bytes(self) -> int:
        """What the live cache takes in memory."""
        return self._live.nbytes

    @property
    def is_saved(self) -> bool:
        """Whether nothing that is to be kept waits to be saved."""
        return not self.is_kept or self._num_saved == len(self._tokens)

    def say(self, text: str) -> Generator[GenerationResponse, None, None]:
        """Say something and generate the reply; both are saved when it ends.

        Where the chat began with a base and has no name, nothing is saved.

        Where it ends early, because ``should_stop`` says so, the generator is closed or
        Ctrl-C comes, what was said so far is kept. Where not even a first token was
        said, the message is taken back, and what was computed of it is stored.

        Args:
            text: What the user says. It makes no special tokens, whatever it contains.

        Yields:
            mlx-lm's responses; ``prompt_tokens`` counts those that were computed.

        Raises:
            EntryExistsError: Another conversation has the name by now. What was said is
                kept without a name, and so the chat goes on.
            OSError: It could not be saved, and is kept in memory.
            StoreLockedError: The same.
        """
        prompt = [*self._tokens, *self._encode(text)]
        said: list[int] = []
        last: GenerationResponse | None = None
        self._num_loaded = 0
        responses = stream_generate(
            self._model,
            prompt,
            store=self._store,
            name=self.name,
            replace=self._replaced(),
            keep=self.is_kept,
            sampling=self._sampling,
            cache=self._cache_options,
            prefilling=self._prefilling,
            live=self._live,
            callbacks=replace(
                self._callbacks, on_load=self._note_load, on_saved=self._note_saved
            ),
        )
        try:
            with closing(responses):
                for last in responses:
                    said.append(int(last.token))
                    yield last
        except EntryExistsError:
            self._lose_name()
            raise
        finally:
            self.num_restored += self._num_loaded
            if last is not None:
                self._begins.append(self._begin_of(prompt))
                self._tokens = [*prompt, *said]
                self.num_computed += last.prompt_tokens
                self.num_generated += len(said)

    def save(self) -> Entry | None:
        """Save what is not saved yet, after an error, and return the entry if any.

        Raises:
            EntryExistsError: As in :meth:`say`.
            OSError: It could not be saved, and is kept in memory.
            StoreLockedError: The same.
        """
        if not self.is_saved:
            self._keep(self._tokens)
        return self.entry

    def fork(self, name: str) -> None:
        """Go on under another name from here; the old one stays where it was.

        Raises:
            EntryExistsError: The name is taken.
            OSError: It could not be saved; nothing has changed.
            ValueError: The name is not one.
        """
        self._check_free(name)
        if self._tokens:
            self.entry = self._save_prompt(self._tokens, name, may_lose=False)
            self._num_saved = len(self._tokens)
        self.name, self.is_kept = name, True

    def rename(self, name: str) -> None:
        """Give the chat another name, or its first.

        Raises:
            EntryExistsError: The name is taken.
            OSError: It could not be saved.
            ValueError: The name is not one.
        """
        self._check_free(name)
        if self.entry is not None:
            try:
                self.entry = self._store.rename(self.entry, name)
            except EntryNotFoundError:
                # It was moved on, or removed: there is no entry of ours.
                self.entry, self._num_saved = None, 0
        self.name, self.is_kept = name, True
        self.save()

    def rewind(self, num_turns: int = 1) -> None:
        """Take back the last turns, in the store too.

        The conversation then ends where the reply before them ended, or with what was
        there before the first turn. Where rows cannot be taken back, they are restored
        from the last checkpoint, and the rest is computed again.

        Raises:
            EntryExistsError: As in :meth:`say`.
            KVStoreError: There are not so many turns, or they cannot be told apart.
            OSError: It could not be saved; nothing has changed.
            ValueError: It is no number of turns.
        """
        if num_turns < 1:
            raise ValueError(f"not a number of turns: {num_turns}")
        if num_turns > len(self._begins):
            if self._why_unknown is not None:
                raise self._why_unknown
            raise KVStoreError(
                f"cannot take back {num_turns} turns of {len(self._begins)}",
                hint="`/stats` says how many there are",
            )
        tokens = self._tokens[: self._begins[-num_turns]]
        if self._is_empty(tokens):
            tokens = []
        try:
            if tokens and self.is_kept:
                self._keep(tokens)
            elif not tokens:
                self._remove_entry()
        except EntryExistsError:
            self._cut(tokens, num_turns)
            raise
        self._cut(tokens, num_turns)

    def begins_with(self, system_prompt: str) -> bool:
        """Whether the conversation was begun with this system prompt."""
        return self._template.begins_with(self._tokens, system_prompt)

    def exchanges(self, num_last: int | None = None) -> list[tuple[str, str]]:
        """Return what was said and replied in each known turn, or in the last ones."""
        template = self._template
        if self._why_unknown is not None or template.is_plain:
            return []
        decode = template.tokenizer.decode
        ends = [*self._begins[1:], len(self._tokens)]
        turns = list(zip(self._begins, ends, strict=True))
        found = []
        for begin, end in turns if num_last is None else turns[-num_last:]:
            turn = template.marks.exchange(self._tokens[:end], begin)
            asked, replied = (decode(t, skip_special_tokens=True) for t in turn)
            found.append((asked.strip(), replied.strip()))
        return found

    def count_tokens(self, text: str) -> int:
        """Return how many tokens the conversation has once this is said."""
        return len(self._tokens) + len(self._encode(text))

    def _resume(self, name: str) -> None:
        tokens = entry_tokens(self._store, name, self._fingerprint)
        if tokens is None:
            return
        self.entry = self._store.entry(name)
        self._tokens = tokens
        self._num_saved = len(tokens)

    def _begin_with(self, base: str) -> None:
        tokens = base_tokens(self._store, base, self._fingerprint)
        if self.entry is None:
            self._tokens = tokens
        elif self._tokens[: len(tokens)] != tokens:
            raise EntryExistsError(
                f"`{self.name}` was not begun with `{base}`",
                hint="choose another name, or leave out the base to go on with it",
            )

    def _find_turns(self) -> None:
        if not self._tokens:
            return
        try:
            if self._template.is_plain:
                raise KVStoreError(
                    "turns of plain text cannot be told apart",
                    hint="only turns of this session can be taken back",
                )
            if self._template.has_reply(self._tokens):
                self._begins = self._template.marks.begins(self._tokens)
        except KVStoreError as error:
            self._why_unknown = error

    def _encode(self, text: str) -> list[int]:
        if not self._tokens:
            return self._template.encode_prompt(
                text, self._system_prompt, is_literal=True
            )
        return self._template.encode_next(text, self._tokens, is_literal=True)

    def _begin_of(self, prompt: Sequence[int]) -> int:
        if not self._tokens and not self._template.is_plain:
            with suppress(KVStoreError):
                # What the system says first is no part of it.
                return self._template.marks.first(prompt) or 0
        return len(self._tokens)

    def _is_empty(self, tokens: Sequence[int]) -> bool:
        """Whether nothing is left but what every conversation begins with."""
        if self._template.is_plain or not tokens:
            return not tokens
        with suppress(KVStoreError):
            return list(self._template.marks.opening) == list(tokens)
        return False

    def _cut(self, tokens: list[int], num_turns: int) -> None:
        self._tokens = tokens
        del self._begins[-num_turns:]

    def _replaced(self) -> bool | Entry:
        """Return what may lose the name: only what this chat knows."""
        return self.entry if self.entry and self.entry.name else False

    def _keep(self, tokens: list[int]) -> None:
        try:
            self._save_prompt(
                tokens, self.name, may_lose=self._replaced(), on_saved=self._note_saved
            )
        except EntryExistsError:
            self._lose_name()
            raise

    def _save_prompt(
        self,
        tokens: list[int],
        name: str | None,
        *,
        may_lose: bool | Entry,
        on_saved: Callable[[Entry], None] | None = None,
    ) -> Entry:
        """Save the rows of some tokens; they are computed where nothing holds them."""
        self._num_loaded = 0
        entry, num_held = save_prompt(
            self._model,
            tokens,
            store=self._store,
            name=name,
            replace=may_lose,
            cache=self._cache_options,
            prefilling=self._prefilling,
            live=self._live,
            callbacks=replace(
                self._callbacks, on_load=self._note_load, on_saved=on_saved
            ),
        )
        self.num_restored += self._num_loaded
        self.num_computed += len(tokens) - num_held
        return entry

    def _note_load(self, done: int, total: int) -> None:
        self._num_loaded = done
        if self._callbacks.on_load is not None:
            self._callbacks.on_load(done, total)

    def _note_saved(self, entry: Entry) -> None:
        if self._callbacks.on_saved is not None:
            self._callbacks.on_saved(entry)
        old, self.entry = self.entry, entry
        self._num_saved = entry.num_tokens
        if old is not None and old.id != entry.id and old.id in self._own:
            self._own.discard(old.id)
            # It costs a little disk, no more, until `prune` evicts it.
            with suppress(
                EntryNotFoundError, IntegrityError, StoreLockedError, OSError
            ):
                if not self._store.entry(old.id).pinned:
                    self._store.remove(old)
        # One that was there before is somebody else's too.
        if entry.name is None and entry.created_at == entry.updated_at:
            self._own.add(entry.id)

    def _remove_entry(self) -> None:
        old = self.entry
        is_ours = old is not None and (old.name is not None or old.id in self._own)
        if old is not None and is_ours:
            try:
                self._store.remove(old)
            except EntryNotFoundError as error:
                if old.name is not None and self._is_taken(old.name):
                    self.name, self.entry, self._num_saved = None, None, 0
                    raise _taken(old.name) from error
        self.entry, self._num_saved = None, 0
        self._live.clear()

    def _lose_name(self) -> None:
        self.name = None
        if self.entry is not None and self.entry.name is not None:
            self.entry, self._num_saved = None, 0

    def _check_free(self, name: str) -> None:
        check_name(name)
        if self._is_taken(name):
            raise _taken(name)

    def _is_taken(self, name: str) -> bool:
        with suppress(IntegrityError):  # a damaged entry does not reserve its name
            return has_entry(self._store, name)
        return False


def _taken(name: str) -> EntryExistsError:
    return EntryExistsError(f"the name `{name}` is taken", hint="choose another name")
