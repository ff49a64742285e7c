"""mlx-lm's generation with a store: restore, go on, save the tokens that have rows.

A prompt cache holds rows for a while before its owner knows: Ctrl-C may come between
two layers, or between keys and values. So what is saved are the tokens up to which
mlx-lm has said that it is done, whatever the cache's own offset says.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import (
    GenerationResponse,
    generate_step,
    generation_stream,
    wired_limit,
)
from mlx_lm.models.cache import make_prompt_cache

from ..caches import live as caches
from ..caches.fit import expect_rows, feed, shapes_of
from ..caches.layout import Shapes
from ..errors import (
    EntryExistsError,
    EntryNotFoundError,
    FingerprintError,
    IntegrityError,
    StoreLockedError,
    UnsupportedCacheError,
)
from ..fingerprint import Fingerprint, refuse_other
from ..format.block import Progress
from ..format.chain import common_run
from ..format.entry import Entry, check_name
from .fits import check_codes
from .load import LoadedModel, load_models
from .titles import make_title

if TYPE_CHECKING:
    from ..store import Store

PREFILL_STEP_SIZE = 2048
"""mlx-lm's own default."""
_CPU_STEP_SIZE = 256
# Of steps sized by time, the first: quick even with a large model.
_LEAST_STEP_SIZES = {True: 32, False: 512}
CHECKPOINT_EVERY = 2048
"""A state may be as large as the rows of thousands of tokens."""
Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """How the prompt cache of a run is made."""

    # mlx-lm's: rows kept per layer, where the model does not say.
    max_kv_size: int | None = None
    # Keep rows quantized, from the first token: ``"turbo3"`` in TurboQuant codes, a
    # number of bits as mlx-lm does.
    kv_bits: int | str | None = None
    # Numbers that share a scale, where ``kv_bits`` is a number.
    kv_group_size: int = 64
    # Go on from no rows of fewer bits per number; ``EXACT_BITS`` for exact ones.
    min_bits: int = 0


@dataclass(frozen=True, slots=True)
class PrefillOptions:
    """How a prompt is computed."""

    # Tokens computed, and then stored, at a time; with `step_s`, at most.
    step_size: int = PREFILL_STEP_SIZE
    # Tokens at least between two stored states of recurrent layers.
    checkpoint_every: int = CHECKPOINT_EVERY
    # Tokens at least between two writes of full blocks, so that small steps make no
    # small shards; 0 writes after each step.
    save_every: int = 0
    # Seconds that a step is to take, so that somebody who waits sees it move. Sizes are
    # powers of two: two runs take other steps only where the machine is busier.
    step_s: float | None = None

    def next_size(self, num_tokens: int = 0, seconds: float = 0.0) -> int:
        """Return how many tokens the next step computes, after one of some seconds."""
        if self.step_s is None:
            return self.step_size
        # A GPU needs many tokens to be busy.
        least = _LEAST_STEP_SIZES[mx.default_device().type == mx.cpu]
        wanted = num_tokens * self.step_s / max(seconds, 1e-6)
        size = 1 << int(math.log2(max(wanted, 1)))
        return min(max(least, size), self.step_size)


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How a reply is drawn."""

    # Tokens to generate at most; -1 for no limit.
    max_tokens: int = 256
    # mlx-lm's ``sampler``.
    sampler: Sampler | None = None
    # mlx-lm's. They see the whole prompt, restored or not.
    logits_processors: list[LogitsProcessor] | None = None
    # How many tokens the draft model guesses at a time.
    num_draft_tokens: int = 2


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What a run tells its caller, and asks."""

    # Asked between tokens, and between steps of the prompt.
    should_stop: Callable[[], bool] | None = None
    # Called with (tokens restored, tokens held).
    on_load: Progress | None = None
    # Called with (tokens computed, tokens to compute).
    on_prefill: Progress | None = None
    # Called with (tokens saved, tokens in all).
    on_save: Progress | None = None
    # Called with the entry.
    on_saved: Callable[[Entry], None] | None = None


@dataclass(slots=True)
class LiveCache:
    """A prompt cache in memory, from which the next run goes on.

    It is empty before the first run, while one works, and after one that failed.
    """

    # Exactly the tokens whose rows it holds.
    tokens: list[int] = field(default_factory=list)
    # mlx-lm's list of per-layer caches.
    prompt_cache: list[Any] = field(default_factory=list)

    def clear(self) -> None:
        """Let go of what it holds."""
        self.tokens, self.prompt_cache = [], []

    @property
    def nbytes(self) -> int:
        """Bytes that its caches take in memory."""
        return sum(cache.nbytes for cache in self.prompt_cache)


def usual_step_size() -> int:
    """Return how many tokens a CPU computes in a second or two; a GPU needs many."""
    is_cpu = mx.default_device().type == mx.cpu
    return _CPU_STEP_SIZE if is_cpu else PREFILL_STEP_SIZE


def make_empty_cache(
    model: LoadedModel, options: CacheOptions = CacheOptions()
) -> list[Any]:
    """Return the empty prompt cache that :func:`stream_generate` starts with.

    Raises:
        UnsupportedCacheError: It cannot be stored, or is none that a draft model can be
            used with.
    """
    empty = _make_plain_cache(model, options)
    if model.draft_model is not None:
        is_divided = len(make_prompt_cache(model.model)) == len(model.model.layers)
        _check_draft(empty, is_divided)
    empty = caches.quantize(empty, options.kv_bits, options.kv_group_size)
    caches.check_classes(empty)

    def find_shapes() -> list[Shapes]:
        made = _make_plain_cache(model, options)
        for part, mine in model.parts(made):
            feed(part, mine)
        return shapes_of(made)

    expect_rows(empty, functools.cache(find_shapes))
    return empty


def check_kv_bits(model: LoadedModel, options: CacheOptions) -> None:
    """Refuse codes that a model, or its draft model, cannot run with.

    Raises:
        UnsupportedCacheError: It says why, and which codes it can run with.
    """
    for one, _ in model.parts([]):
        check_codes(one, options.kv_bits, options.kv_group_size)


def _make_plain_cache(model: LoadedModel, options: CacheOptions) -> list[Any]:
    models = [m for m in (model.model, model.draft_model) if m is not None]
    return [c for m in models for c in make_prompt_cache(m, options.max_kv_size)]


def load_empty_cache(
    model: str,
    adapter_path: str | None = None,
    draft_model: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> tuple[list[Any], Fingerprint]:
    """Return a model's empty prompt cache, and its fingerprint; no weights are read.

    Arguments and errors are those of :func:`~kvstore.models.load.load_models`.

    Raises:
        UnsupportedCacheError: Its prompt cache cannot be stored.
    """
    loaded = load_models(
        model, adapter_path, draft_model, trust_remote_code=trust_remote_code, lazy=True
    )
    return make_empty_cache(loaded), loaded.fingerprint


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
    """Return the tokens of the entry with this name, no id; ``None`` if there is none.

    Raises:
        FingerprintError: Another model than the given one made it.
        IntegrityError: A part of it is missing or damaged.
    """
    return base_tokens(store, name, fingerprint) if has_entry(store, name) else None


def has_entry(store: Store, name: str) -> bool:
    """Whether an entry has this name; an id is none."""
    try:
        return store.entry(name).is_called(name)
    except EntryNotFoundError:
        return False


def base_tokens(
    store: Store, ref: str, fingerprint: Fingerprint | None = None
) -> list[int]:
    """Return the tokens of an entry, by its name, its id or the start of it.

    Raises:
        EntryNotFoundError: There is none.
        FingerprintError: Another model than the given one made it.
        IntegrityError: A part of it is missing or damaged.
    """
    entry = store.entry(ref)
    if fingerprint is not None:
        refuse_other(ref, store.fingerprint_of(entry.id), fingerprint)
    chain = store.chain(entry.id)
    return [token for _, stored in chain for token in stored.block.tokens]


class Stopped(Exception):  # noqa: N818  (no error)
    """Ends a prefill between two steps."""


class Session:
    """One run of a model: its tokens, their rows, and how many of these are whole.

    The arguments are those of :func:`~kvstore.models.generate.stream_generate`.

    Attributes:
        prompt_cache: Grows while mlx-lm works.
        rest: The tokens to feed.
        tokens: The prompt, and what was generated.
        num_restored: Tokens that were held.
    """

    def __init__(
        self,
        model: LoadedModel,
        tokens: Sequence[int],
        store: Store,
        *,
        name: str | None,
        replace: bool | Entry,
        is_kept: bool = True,
        prefill: PrefillOptions,
        live: LiveCache | None,
        callbacks: Callbacks,
    ) -> None:
        self.model = model
        self._store = store
        self._name = name
        self._replace = replace
        self._is_kept = is_kept
        self.tokens = list(tokens)
        self._num_prompt = len(self.tokens)
        self._prefill = prefill
        self._next_checkpoint = prefill.checkpoint_every
        self._next_save = prefill.save_every
        self._live = live
        self._callbacks = callbacks
        self.prompt_cache: list[Any] = []
        self.rest: list[int] = []
        self.num_restored = 0
        # Of the model; a draft model may have less.
        self._num_rows = self._num_draft_rows = 0

    def begin(self, options: CacheOptions, num_left: int = 1) -> None:
        """Find what is held of the tokens, and leave at least `num_left` to be fed."""
        empty = make_empty_cache(self.model, options)
        if self._live is None:  # else whoever has it has asked
            check_kv_bits(self.model, options)
        self._check_name(empty)
        if not self._take_live(empty, num_left, options.min_bits):
            # One more than there is: it is the last that is never restored.
            wanted = [*self.tokens, *[-1] * (1 - num_left)]
            held, rest = self._store.load(
                wanted,
                self.model.fingerprint,
                min_bits=options.min_bits,
                like=empty,
                progress=self._callbacks.on_load,
            )
            self.prompt_cache = empty if held is None else held
            self._start_at(len(wanted) - len(rest))
        if self._live is not None:
            self._live.clear()

    def _take_live(self, empty: list[Any], num_left: int, min_bits: int) -> bool:
        if self._live is None or not self._live.tokens:
            return False
        held = self._live.prompt_cache
        num_rows = common_run(
            self._live.tokens, self.tokens[: self._num_prompt - num_left]
        )
        is_longer = num_rows < len(self._live.tokens)
        if not num_rows or (is_longer and not caches.is_cuttable(held)):
            return False
        # Other options than the last run's ask for another kind of cache.
        if caches.signature(held) != caches.signature(empty):
            return False
        # It may have been restored from worse rows than this run allows.
        if caches.read_provenance(held).bits < min_bits:
            return False
        if is_longer:
            caches.cut(held, num_rows)
        self.prompt_cache = held
        self._start_at(num_rows)
        return True

    def _start_at(self, num_rows: int) -> None:
        self.rest = self.tokens[num_rows:]
        self.num_restored = self._num_rows = self._num_draft_rows = num_rows

    def note(self, done: int, total: int) -> None:
        """Note that so many of the tokens to compute have whole rows in all layers.

        Raises:
            Stopped: The run is to end, and no step is under way.
        """
        self._num_rows = self._num_draft_rows = self.num_restored + done
        if self._callbacks.on_prefill is not None:
            self._callbacks.on_prefill(done, total)
        # At the end the cache may be a token ahead already.
        if 0 < done < total:
            self._save_blocks(done, is_last=done == total - 1)
        if done < total and self.is_stopped():
            raise Stopped

    def is_stopped(self) -> bool:
        """Whether the run is to end here."""
        should_stop = self._callbacks.should_stop
        return should_stop is not None and should_stop()

    def feed(self) -> None:
        """Have the models compute the rows of the rest but the last, step by step.

        Raises:
            Stopped: The run is to end, and no step is under way.
        """
        total, fed, seconds = len(self.rest), 0, 0.0
        self.note(0, total)
        parts = self.model.parts(self.prompt_cache)
        streams: list[Any] = [generation_stream]
        with wired_limit(self.model.model, streams):
            start = self.num_restored
            for done, took in compute(parts, self.rest[:-1], self._prefill, start):
                seconds, fed = seconds + took, done
                self.note(fed, total)
        if fed:
            self._store.note_prefill(self.model.fingerprint, fed, seconds)

    def feed_last(self) -> mx.array:
        """Have the models compute the rows of the last token, behind all others.

        It goes alone: so it has the same bits that mlx-lm gives it when it begins a
        reply.

        Returns:
            What the model says next, ``(V,)``: logits, not evaluated.
        """
        parts = self.model.parts(self.prompt_cache)
        streams: list[Any] = [generation_stream]
        with wired_limit(self.model.model, streams):
            logits, *_ = (_feed(model, self.rest[-1:], part) for model, part in parts)
        self.note(len(self.rest), len(self.rest))
        said: mx.array = logits[0, -1]
        return said

    def _save_blocks(self, done: int, *, is_last: bool) -> None:
        """Store what a long prefill has computed so far.

        The next turn may render the reply otherwise, so that the end of this one is no
        prefix of it; the end of the prompt is.
        """
        if not self._is_kept:
            return
        if not is_last and done < self._next_save:
            return
        self._next_save = done + self._prefill.save_every
        due = is_last or done >= self._next_checkpoint
        if due:
            self._next_checkpoint = done + self._prefill.checkpoint_every
        try:
            self._store.save_blocks(
                self.tokens[: self._num_rows],
                self.prompt_cache,
                self.model.fingerprint,
                checkpoint=due,
            )
        except (OSError, StoreLockedError):
            return  # the save at the end says so, when the reply is there

    def add(self, response: GenerationResponse) -> None:
        """Note a token that was generated; mlx-lm has fed it before it told us.

        With a draft model only where it had guessed the token. The draft model is up to
        two tokens behind: the last guess is not fed to it, nor what came instead.
        """
        self.tokens.append(int(response.token))
        num_tokens = len(self.tokens)
        is_fed = self.model.draft_model is None or response.from_draft
        self._num_rows = num_tokens if is_fed else num_tokens - 1
        self._num_draft_rows = num_tokens - 2

    def finish(self, *, is_interrupted: bool = False) -> None:
        """Save what is whole; nothing where that is only what was held.

        Where it ``is_interrupted``, mlx-lm may have stopped in the middle of a step.
        """
        if self.model.draft_model is not None:
            self._catch_up()
        elif is_interrupted:
            # A window or a state has forgotten what it was before the step.
            if not caches.is_cuttable(self.prompt_cache):
                return
            self._num_rows = caches.cut(self.prompt_cache, self._num_rows)
        is_new = self._num_rows > self.num_restored
        # Half a question is no part of a conversation that is held.
        is_half = self._live is not None and self._num_rows < self._num_prompt
        if self._is_kept and is_new and not is_half:
            self.keep()
        else:
            self._hold()

    def _catch_up(self) -> None:
        """Have both models hold the same rows: all that was said."""
        if len(self.tokens) == self._num_prompt:
            # mlx-lm, interrupted, takes back guesses that it has not made yet.
            self._num_rows = caches.cut(self.prompt_cache, self._num_rows)
            return
        held = (self._num_rows, self._num_draft_rows)
        parts = self.model.parts(self.prompt_cache)
        for (model, part), num_rows in zip(parts, held, strict=True):
            _feed(model, self.tokens[caches.cut(part, num_rows) :], part)
        self._num_rows = len(self.tokens)

    def _hold(self) -> None:
        if self._live is not None:
            self._live.tokens = self.tokens[: self._num_rows]
            self._live.prompt_cache = self.prompt_cache

    def keep(self) -> Entry:
        """Save what is whole, and leave the prompt cache to the next run.

        Raises:
            EntryExistsError: The name was taken meanwhile; there is an entry without.
        """
        self._hold()
        # A name is for a conversation, not for half a question.
        name = self._name if self._num_rows >= self._num_prompt else None
        on_saved = self._callbacks.on_saved or (lambda entry: None)
        try:
            entry = self._save(name)
        except EntryExistsError as error:
            # It was taken meanwhile, or by another kind of cache: keep what was said.
            entry = self._save(None)
            error.hint = f"it is kept as `{entry.id[:12]}`; {error.hint}"
            on_saved(entry)
            raise
        on_saved(entry)
        return entry

    def _save(self, name: str | None) -> Entry:
        return self._store.save(
            self.tokens[: self._num_rows],
            self.prompt_cache,
            self.model.fingerprint,
            name=name,
            replace=self._replace,
            title=make_title(self.model.tokenizer, self.tokens),
            progress=self._callbacks.on_save,
        )

    def _check_name(self, like: list[Any]) -> None:
        """Refuse now what the store would refuse after a long prefill."""
        if self._name is None:
            return
        check_name(self._name)
        if self._replace or self._live is not None:
            return
        with suppress(IntegrityError):  # then the store lets it be replaced
            held = self._begun(self._name)
            if held is None or held != self.tokens[: len(held)]:
                raise EntryExistsError(
                    f"the name `{self._name}` is taken by an entry that this one does"
                    " not continue",
                    hint="choose another name, or replace it with `--replace`",
                )
            if held and not self._store.is_like(self._name, like):
                raise EntryExistsError(
                    f"the rows of `{self._name}` are kept otherwise than these",
                    hint="give the `--kv-bits` or `--max-kv-size` that it was made"
                    f" with, or none; `--from {self._name}` leaves it as it is",
                )

    def _begun(self, name: str) -> list[int] | None:
        try:
            return entry_tokens(self._store, name, self.model.fingerprint) or []
        except FingerprintError:
            return None


def respond(
    session: Session, sampling: SamplingOptions
) -> Generator[GenerationResponse, None, None]:
    """Yield mlx-lm's responses.

    The prompt is computed here: mlx-lm takes steps of one size, and with a draft model
    tells nobody how far it is.
    """
    begin = time.perf_counter()
    total, prompt_tps = len(session.rest), 0.0
    session.feed()
    before = mx.array(session.tokens[:-1])
    responses = mlx_lm.stream_generate(
        session.model.model,
        session.model.tokenizer,
        session.rest[-1:],
        # With a draft model, mlx-lm's own sign for no limit is none.
        sys.maxsize if sampling.max_tokens == -1 else sampling.max_tokens,
        session.model.draft_model,
        num_draft_tokens=sampling.num_draft_tokens,
        sampler=sampling.sampler,
        logits_processors=[
            functools.partial(_process_all, processor, before)
            for processor in sampling.logits_processors or ()
        ],
        prompt_cache=session.prompt_cache,
    )
    with closing(responses):
        for response in responses:
            if not prompt_tps:
                prompt_tps = total / (time.perf_counter() - begin)
                session.note(total, total)
            yield dataclasses.replace(
                response, prompt_tokens=total, prompt_tps=prompt_tps
            )


def compute(
    parts: Sequence[tuple[Any, list[Any]]],
    tokens: Sequence[int],
    options: PrefillOptions,
    start: int = 0,
) -> Iterator[tuple[int, float]]:
    """Compute the rows of some tokens, a step at a time.

    Yields:
        After each step, how many tokens are done, and the seconds that it took.
    """
    done, size = 0, options.next_size()
    while done < len(tokens):
        # Sized by time, steps end at multiples of their size, as blocks do.
        ahead = (start + done) % size if options.step_s else 0
        some = tokens[done : done + size - ahead]
        begin = time.perf_counter()
        for model, part in parts:
            _feed(model, some, part)
        took = time.perf_counter() - begin
        done += len(some)
        size = options.next_size(len(some), took)
        yield done, took


def _process_all(
    processor: LogitsProcessor, before: mx.array, tokens: mx.array, logits: mx.array
) -> mx.array:
    """Have a processor see the tokens that mlx-lm was not fed, too."""
    return processor(mx.concatenate([before.astype(tokens.dtype), tokens]), logits)


def _feed(model: Any, tokens: Sequence[int], prompt_cache: list[Any]) -> Any:
    """Compute the rows of some tokens, and return the logits, not evaluated."""
    if not tokens:
        return None
    with mx.stream(generation_stream):
        logits = model(mx.array(list(tokens))[None], cache=prompt_cache)
        # Step by step: a lazy graph of the whole prompt would keep the memory of all
        # steps.
        mx.eval([cache.state for cache in prompt_cache])
    mx.clear_cache()
    return logits


def _check_draft(empty: list[Any], is_divided: bool) -> None:
    """Refuse caches from which mlx-lm cannot, silently, take back wrong guesses."""
    hint = "leave out the draft model"
    for number, cache in enumerate(caches.flatten_caches(empty)):
        if not caches.is_cuttable([cache]):
            raise UnsupportedCacheError(
                f"layer {number} is a {type(cache).__name__}, which cannot take back"
                " what a draft model guessed wrong",
                hint=hint,
            )
    if not is_divided:
        raise UnsupportedCacheError(
            "mlx-lm cannot tell the model's caches from the draft model's", hint=hint
        )


def encode_text(tokenizer: Any, prompt: str | mx.array | Sequence[int]) -> list[int]:
    """Return the tokens that ``mlx_lm.stream_generate`` makes of a prompt."""
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return list(tokenizer.encode(prompt, add_special_tokens=not has_bos))
