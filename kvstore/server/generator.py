"""The thread that generates: its requests, and the batches that it computes."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import ArraysCache, CacheList, make_prompt_cache

from ..caches.live import is_cuttable, read_provenance, set_provenance
from ..fingerprint import Fingerprint
from ..models.context import past_context
from .disk import harmless
from .prefill import KeepRows, Steps, view
from .replay import call_of, cut_again, replay
from .requests import BadRequestError, check_choice
from .tenants import own, tenant_of
from .watch import conversation_of

if TYPE_CHECKING:
    from ..caches.provenance import Provenance
    from .prompt_cache import DiskPromptCache
    from .watch import Requests

log = logging.getLogger("kvstore")
# After a second without requests, other work begins.
_IDLE_POLLS = 10
# In the place of mlx-lm's class, of which each server has a copy with names of its own.
_ResponseGenerator: Any = object


class Generator(_ResponseGenerator):  # type: ignore[misc]
    """Is mixed into mlx-lm's ``ResponseGenerator``, and also measures prefills."""

    # mlx-lm's class that takes a reply apart; 0.31 reads tokens, not text.
    text_machine: Any = None

    def __init__(
        self,
        give_up: Callable[[], None],
        requests: Requests,
        model_provider: Any,
        prompt_cache: DiskPromptCache,
    ) -> None:
        self._give_up, self._requests = give_up, requests
        self._disk = prompt_cache
        self._alone = _Alone()
        self.failure: Exception | None = None
        self._num_idle = 0
        # What a prompt cache is known by, of the request that is served alone.
        self.key_alone: list[int] = []
        super().__init__(model_provider, prompt_cache)

    def _generate(self) -> None:
        try:
            super()._generate()
            self._give_up()  # for mlx-lm 0.31, which does not reset its model
        except Exception as error:
            self.failure = error
            raise
        finally:
            # On this thread, whose arrays they are.
            self._disk.trim_to(n_sequences=0)
            if self.failure is not None:
                # The main thread serves on, and would answer nothing but errors.
                os.kill(os.getpid(), signal.SIGTERM)

    def _next_request(self, timeout: float | None = None) -> Any:
        # mlx-lm waits a tenth of a second where nothing is being generated.
        is_idle = timeout is not None and self.requests.empty()
        self._num_idle = self._num_idle + 1 if is_idle else 0
        receipts = self.model_provider.receipts
        if self._num_idle > _IDLE_POLLS and receipts is not None:
            with harmless("not compared with exact rows"):
                if receipts.step():
                    timeout = 0.0  # who has come meanwhile has waited enough
        return super()._next_request(timeout)

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        found = super()._tokenize(tokenizer, request, args)
        # Raised in here, an error is the request's; later on it ends the thread.
        if not all(isinstance(token, int) for token in found[0]):
            raise BadRequestError("the prompt is no list of tokens")
        if not found[0]:
            raise BadRequestError("the prompt is empty")
        check_choice(self.model_provider.model, args)
        warning = past_context(len(found[0]), self.model_provider.context_length)
        if warning is not None:
            log.warning("kvstore: %s", warning)
        key = self.model_provider.model_key
        self._make_state_machine(key, tokenizer, args.stop_words)
        vision = found[4] if len(found) > 4 else None  # mlx-lm 0.31 has none
        prompt, segments = found[0], found[1]
        if vision is None and request.request_type == "chat":
            with harmless("what was sampled is not put back"):
                prompt, segments = self._replay(tokenizer, request, args, found)
        prompt = own(prompt, request.tenant)
        if vision is not None:
            vision.cache_key = own(vision.cache_key, request.tenant)
        self.key_alone = (prompt if vision is None else vision.cache_key)[:]
        return prompt, segments, *found[2:]

    def _replay(
        self, tokenizer: Any, request: Any, args: Any, found: Any
    ) -> tuple[list[int], list[list[int]]]:
        """Return a prompt and its parts with the sampled tokens of its replies."""
        prompt, segments, _, initial, *_ = found
        key = self.model_provider.model_key
        known = self._disk.sampled(key, own(prompt, request.tenant))
        messages = request.messages
        if known is None or not any(m["role"] == "assistant" for m in messages):
            return prompt, segments
        read = None
        machine = self.text_machine
        if tokenizer.has_tool_calling and machine is not None:
            _, texts = self._make_state_machine(key, tokenizer, args.stop_words)
            read = partial(
                _read_reply, machine, texts, initial, tokenizer, request.tools
            )
        latest = known.latest()
        near = self.model_provider.near is not None
        made, edits = replay(tokenizer, prompt, messages, latest, read, near=near)
        parts = cut_again(segments, made, edits)
        return (prompt, segments) if parts is None else (made, parts)

    def generate(
        self,
        request: Any,
        generation_args: Any,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> tuple[Any, Iterator[Any]]:
        """Begin a request, and time its prefill where nothing else is computed."""
        served = self._requests.current
        request.tenant = served.tenant
        served.conversation = conversation_of(request, served.tenant)
        ticket = self._alone.enter()
        begin = time.monotonic()

        def progress(done: int, total: int) -> None:
            loaded = self.model_provider.loaded
            is_known = isinstance(loaded, Fingerprint)
            if is_known and done == total and self._alone.was(ticket):
                seconds = time.monotonic() - begin
                self._disk.store.note_prefill(loaded, total, seconds)
            if progress_callback is not None:
                progress_callback(done, total)

        try:
            found = super().generate(request, generation_args, progress)
        except BaseException:
            self._alone.leave()
            raise
        # What came before is loading a model, and reading the disk.
        begin = time.monotonic()
        self._requests.current.prompt = found[0].prompt[:]
        return found[0], self._alone.until_end(self._requests.counted(found[1]))


def mixed_generator(server: Any) -> Any:
    """Return :class:`Generator` over the class of a copy of mlx-lm's module."""
    names = {"text_machine": getattr(server, "TextStateMachine", None)}
    return type("Generator", (Generator, server.ResponseGenerator), names)


def _read_reply(
    machine: Any, texts: Any, initial: str, tokenizer: Any, tools: Any, text: str
) -> tuple[str, list[Any], str]:
    """Return content, tool calls and reasoning of a reply, as mlx-lm's server does."""
    state, parts = machine.split(texts.make_state(initial), text)
    _, rest, last = machine.flush(state)
    found = {"normal": "", "reasoning": ""}
    calls, before = [], initial
    for kind, part in [*parts, (last, rest)]:
        if kind == "tool":
            # What stands between two calls may be nothing.
            calls += [part] if before != "tool" else []
            calls[-1] += part if before == "tool" else ""
        else:
            found[kind] = found.get(kind, "") + part
        before = kind
    read: list[Any] = []
    try:
        for call in calls:
            made = tokenizer.tool_parser(call, tools)
            read += map(call_of, made if isinstance(made, list) else [made])
    except ValueError:
        read = [None]  # which no message has
    return found["normal"], read, found["reasoning"]


class _Alone:
    """Knows whether a request had the model to itself; for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_entered = 0
        self._num_active = 0

    def enter(self) -> int | None:
        """Begin a request; the ticket is ``None`` where another is served."""
        with self._lock:
            self._num_entered += 1
            self._num_active += 1
            return self._num_entered if self._num_active == 1 else None

    def was(self, ticket: int | None) -> bool:
        """Whether no request was served beside that one so far."""
        with self._lock:
            return ticket == self._num_entered

    def until_end(self, responses: Iterator[Any]) -> Iterator[Any]:
        """Return the responses of a request, which ends with them."""

        def begun() -> Iterator[Any]:
            try:
                yield
                yield from responses
            finally:
                self.leave()

        found = begun()
        # One that nobody has begun to read would never end.
        next(found)
        return found

    def leave(self) -> None:
        """End a request."""
        with self._lock:
            self._num_active -= 1


class Batch(BatchGenerator):
    """mlx-lm's batch of requests, which keeps what it has begun.

    Args:
        keep: Called where a request is given up.
        keep_prefill: Called while a prompt is computed.
        model: As mlx-lm's, and its options.
    """

    def __init__(
        self, keep: KeepRows, keep_prefill: KeepRows, model: Any, **options: Any
    ) -> None:
        self._keep, self._keep_prefill = keep, keep_prefill
        if _has_states(model):
            # In a batch, the padding of the shorter prompts would run through
            # their states. Tokens that are generated need no padding.
            options["prefill_batch_size"] = 1
        self._begun: dict[Any, Steps] = {}
        self._tenants: dict[Any, str | None] = {}
        # What merging caches into a batch makes them forget.
        self._marks: dict[Any, Provenance] = {}
        self._has_rows_only = is_cuttable(make_prompt_cache(model))
        super().__init__(model, **options)

    def insert_segments(self, *parts: Any, **options: Any) -> Any:
        """Begin requests, and note of what tenants and rows they are."""
        uids = super().insert_segments(*parts, **options)
        held = options.get("all_tokens") or [[]] * len(uids)
        for uid, begun in zip(uids, options.get("caches") or (), strict=False):
            if begun and (mark := read_provenance(begun)).num_moved:
                self._marks[uid] = mark
        for uid, tokens in zip(uids, held, strict=True):
            steps = Steps(len(tokens), has_rows_only=self._has_rows_only)
            self._begun[uid] = steps
            self._tenants[uid] = tenant_of(tokens)
        return uids

    def next(self) -> Any:
        """Compute a step, and keep what is worth it of prompts."""
        found = super().next()  # type: ignore[no-untyped-call]
        for response in found[0]:
            self._note(response)
        for response in found[1]:
            if response.all_tokens is not None:  # at the end
                self._begun.pop(response.uid, None)
                tenant = self._tenants.pop(response.uid, None)
                response.all_tokens = own(response.all_tokens, tenant)
                self._mark(response.uid, response.prompt_cache)
                self._marks.pop(response.uid, None)
        return found

    def _mark(self, uid: Any, prompt_cache: list[Any] | None) -> None:
        """Give caches of a request's back what they have forgotten."""
        if prompt_cache and uid in self._marks:
            set_provenance(prompt_cache, self._marks[uid])

    def extract_cache(self, uids: Any) -> Any:
        """Return caches and tokens, marked as what they are."""
        found = super().extract_cache(uids)  # type: ignore[no-untyped-call]
        for uid, (prompt_cache, tokens) in found.items():
            self._mark(uid, prompt_cache)
            found[uid] = (prompt_cache, own(tokens, self._tenants.get(uid)))
        return found

    def _note(self, response: Any) -> None:
        """Hand over what has been computed of a prompt, if it is worth it."""
        batch, steps = self._prompt_batch, self._begun.get(response.uid)
        if steps is None or response.uid not in batch.uids:
            return
        number = batch.uids.index(response.uid)
        tokens = batch.tokens[number]
        if response.end_of_segment:
            steps.note(len(tokens))  # which mlx-lm's server keeps
        elif steps.is_due(len(tokens)):
            mine = own(list(tokens), self._tenants.get(response.uid))
            rows = view(batch.prompt_cache, number)
            self._mark(response.uid, rows)
            self._keep_prefill(mine, rows)

    def give_up(self) -> None:
        """Keep what was computed of all requests that have not ended."""
        self.remove(list(self._begun))

    def remove(self, uids: Any, return_prompt_caches: bool = False) -> Any:
        """Keep what was computed of requests that end before their time."""
        # The client has left, and will ask again if the prompt took it too long.
        for uid in uids:
            self._begun.pop(uid, None)
        held = super().remove(  # type: ignore[no-untyped-call]
            uids, return_prompt_caches=True
        )
        for uid, (prompt_cache, _) in held.items():
            self._mark(uid, prompt_cache)
        for uid in uids:
            self._tenants.pop(uid, None)
            self._marks.pop(uid, None)
        for prompt_cache, tokens in held.values():
            if prompt_cache and tokens:
                self._keep(tokens[:], prompt_cache)
        return held if return_prompt_caches else {}


def _has_states(model: Any) -> bool:
    """Whether a layer of a model keeps a state that no position can be cut from."""

    def is_state(cache: Any) -> bool:
        if isinstance(cache, CacheList):
            return any(map(is_state, cache.caches))
        return isinstance(cache, ArraysCache)

    return any(map(is_state, make_prompt_cache(model)))
