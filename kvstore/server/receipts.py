"""Measures, while nothing is asked, how far re-anchored rows move what a model says.

Of a sample of requests, the exact rows are computed too, a few tokens at a time, so
that whoever asks meanwhile waits for these few at most. Knows no requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from ..caches.live import PromptCache, read_provenance
from ..caches.reanchor import head

log = logging.getLogger("kvstore")
# Of requests with re-anchored rows, the first, and one in so many.
_ONE_IN = 8
# So many of the last tokens are fed on both rows; at a time, so many.
_NUM_NEXT, _STEP = 64, 32


class Receipts:
    """Keeps a model's re-anchoring within a budget.

    It belongs to the thread that generates.

    Args:
        model: The model.
        max_kl: How far its next-token distribution may be moved, on the mean.
        note: Called with each KL divergence that was measured, in nats.
        stop: Called once the mean of them is beyond the budget.
    """

    def __init__(
        self,
        model: Any,
        max_kl: float,
        note: Callable[[float], None],
        stop: Callable[[], None],
    ) -> None:
        self._model, self._max_kl = model, max_kl
        self._note, self._stop = note, stop
        self._num_offered = 0
        self._num_found, self._sum = 0, 0.0
        self._work: Iterator[float | None] | None = None

    def offer(self, tokens: Sequence[int], prompt_cache: PromptCache) -> None:
        """Have what a request ended with compared later, if it is one of the sample.

        Args:
            tokens: Those whose rows the cache has.
            prompt_cache: Of rows that can be cut; nobody may change it.
        """
        if not read_provenance(prompt_cache).num_moved or len(tokens) < 2:
            return
        self._num_offered += 1
        if self._work is None and self._num_offered % _ONE_IN == 1:
            self._work = self._compare(list(tokens), prompt_cache)

    def step(self) -> bool:
        """Do a little of what there is to do, and say whether there was any."""
        work, self._work = self._work, None  # what fails is not tried again
        if work is None:
            return False
        if (kl := next(work)) is None:
            self._work = work
        else:
            self._judge(kl)
        return True

    def _judge(self, kl: float) -> None:
        self._num_found += 1
        self._sum += kl
        self._note(kl)
        mean = self._sum / self._num_found
        log.info("kvstore: re-anchored rows moved what is said next by KL %.5f", kl)
        if not mean <= self._max_kl:
            log.warning(
                "kvstore: nothing is re-anchored any more: it moved what this model"
                " says next by KL %.5f, on the mean of %d requests, and %g is allowed",
                mean,
                self._num_found,
                self._max_kl,
            )
            self._stop()

    def _compare(
        self, tokens: list[int], prompt_cache: PromptCache
    ) -> Iterator[float | None]:
        """Yield ``None`` after each step, and at last the mean KL divergence."""
        from mlx_lm.models.cache import make_prompt_cache

        begin = max(1, len(tokens) - _NUM_NEXT)
        parts = [tokens[i : i + _STEP] for i in range(begin, len(tokens), _STEP)]
        # One after the other, so that there is one more cache of all tokens at a time.
        exact = make_prompt_cache(self._model)
        for start in range(0, begin, _STEP):
            self._feed(tokens[start : min(begin, start + _STEP)], exact)
            mx.eval([cache.state for cache in exact])
            yield None
        right = []
        for part in parts:
            right.append(self._feed(part, exact))
            mx.eval(right)
            yield None
        del exact
        near: PromptCache = []
        for cache in prompt_cache:
            near += head([cache], begin)
            mx.eval(near[-1].state)
            yield None
        total = 0.0
        for part, p in zip(parts, right, strict=True):
            q = self._feed(part, near)
            total += float((mx.exp(p) * (p - q)).sum())
            yield None
        yield total / (len(tokens) - begin)

    def _feed(self, tokens: list[int], prompt_cache: PromptCache) -> mx.array:
        """Return log probabilities of what follows each token, not evaluated yet."""
        logits = self._model(mx.array([tokens]), cache=prompt_cache)[0]
        logits = logits.astype(mx.float32)
        found: mx.array = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return found
