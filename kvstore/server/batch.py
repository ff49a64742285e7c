"""What a server has begun: kept while it is computed, and where it is given up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import ArraysCache, CacheList, make_prompt_cache

from ..caches.live import is_cuttable, read_provenance, set_provenance
from .prefill import KeepRows, Steps, view
from .tenants import own, tenant_of

if TYPE_CHECKING:
    from ..caches.provenance import Provenance


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
