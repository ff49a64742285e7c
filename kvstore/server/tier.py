"""A store behind the prompt caches of a server that is not mlx-lm's, in three lines.

::

    tier = kvstore.tier(model, model_path=folder)
    prompt_cache, rest = tier.fetch(tokens)
    tier.put(tokens, prompt_cache)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..caches import live as caches
from ..caches.fit import expect_rows, feed, shapes_of
from ..caches.layout import Shapes
from ..caches.lookalike import Lookalikes
from ..errors import ArgumentError
from ..fingerprint import Fingerprint
from ..format.block import EXACT_BITS
from ..format.spans import Span
from ..models.load import fingerprint_model
from ..store import Store
from .disk import (
    MAX_QUEUED_BYTES,
    MIN_TOKENS,
    Disk,
    ServedModel,
    end_with,
    harmless,
    log,
)


class Tier:
    """What a server keeps on disk of one model's prompt caches.

    Any thread may call it. Once it is made, it never raises into the server: what goes
    wrong is logged to ``kvstore``, and the server goes on without the disk. It holds no
    prompt cache in memory. What waits is written when the process ends, or at
    :meth:`close`.

    Make one with :func:`tier`.

    Args:
        disk: Where prompts are kept.
        fingerprint: Of the model as it is loaded.
        lookalikes: Knows the server's prompt caches.
    """

    def __init__(
        self, disk: Disk, fingerprint: Fingerprint, lookalikes: Lookalikes
    ) -> None:
        self._lookalikes = lookalikes
        self._served = ServedModel(fingerprint, (lookalikes.empty,))
        self._disk = disk
        self._end = end_with(self, disk)

    def __enter__(self) -> Tier:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the model."""
        return self._served.fingerprint

    def fetch(
        self, tokens: Sequence[int], *, held: int = 0, spans: Sequence[Span] = ()
    ) -> tuple[list[Any] | None, list[int]]:
        """Return the longest prefix of a prompt that is on disk, and the rest.

        Args:
            tokens: The prompt, as :meth:`kvstore.Store.load` takes it.
            held: How many of its tokens the server holds in memory; fewer than
                ``min_tokens`` more are not read.
            spans: Parts of the prompt that are fed whole, each as the position of its
                first token and the position behind its last.

        Returns:
            A prompt cache of the server's own classes, evaluated, for any one thread;
            or ``None``. And the tokens still to be fed, of which there is always one,
            unless ``tokens`` has none.
        """
        with harmless("not read"):
            prompt = [operator.index(token) for token in tokens]
            if self._end.alive and prompt:
                found, _ = self._disk.read(self._served, prompt, held, spans)
                if found is not None:
                    return self._lookalikes.to_theirs(found[0]), found[1]
        return None, list(tokens)

    def put(
        self,
        tokens: Sequence[int],
        prompt_cache: Sequence[Any],
        *,
        upto: int | None = None,
        shared: bool = False,
    ) -> bool:
        """Have a prompt cache written soon, and say whether it will be.

        The rows that the store lacks are copied before this returns. The prompt cache
        is not changed, and may be afterwards.

        Args:
            tokens: Those whose rows the cache has; a last one may have none yet.
            prompt_cache: The server's caches, one per layer. On another thread than the
                one that computed it, its arrays must be evaluated.
            upto: Keep the rows of so many leading tokens only. A wrapped window, or a
                state, cannot be cut: then nothing is kept.
            shared: Other prompts go on from here, as from the end of a system prompt,
                so that what continues it does not take its place.
        """
        with harmless("not kept"):
            if self._end.alive:
                prompt = [operator.index(token) for token in tokens][:upto]
                return self._put(prompt, prompt_cache, shared)
        return False

    def note_prefill(self, num_tokens: int, seconds: float) -> None:
        """Note how long the model took to compute rows of so many tokens.

        A tier that is told reads nothing that would be computed sooner.
        """
        with harmless("not noted"):
            self._disk.store.note_prefill(self.fingerprint, num_tokens, seconds)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was put is on disk or given up; say whether it is."""
        return self._disk.flush(timeout_s)

    def close(self) -> None:
        """Write what waits; after this, nothing is found and nothing kept."""
        with harmless("not closed"):
            self._end()

    def _put(
        self, tokens: list[int], prompt_cache: Sequence[Any], is_shared: bool
    ) -> bool:
        ours = self._lookalikes.to_ours(prompt_cache)
        tokens = tokens[: caches.count_rows(ours, len(tokens))]
        whole = caches.cut_copy(ours, len(tokens)) if tokens else None
        if whole is None:
            log.info("kvstore: not kept: no rows of exactly %d tokens", len(tokens))
            return False
        return self._disk.keep(self._served, tokens, whole, is_shared=is_shared)


def tier(
    model: Any,
    *,
    model_path: str | Path | None = None,
    fingerprint: Fingerprint | None = None,
    make_cache: Callable[[], Sequence[Any]] | None = None,
    path: str | Path | None = None,
    codec: str | None = None,
    min_tokens: int = MIN_TOKENS,
    exact: bool = False,
    min_bits: int = 0,
    min_free_bytes: int = 0,
    max_queued_bytes: int = MAX_QUEUED_BYTES,
) -> Tier:
    """Return the disk tier of a server's prompt caches.

    Args:
        model: The live model.
        model_path: What it was loaded from, a folder or a Hugging Face repository: then
            its fingerprint is that of ``kvstore serve`` and ``generate``, if its class
            is mlx-lm's; with another package's, such as mlx-vlm's, it has that
            package's name as salt. Without it, the fingerprint is computed from the
            parameters, which takes seconds for a large model.
        fingerprint: What names it, for a model with an adapter or a draft model.
        make_cache: Makes an empty prompt cache as the server does; mlx-lm's
            ``make_prompt_cache(model)`` by default. It may be of codes, or of other
            classes than mlx-lm's that do the same.
        path: The store's folder; ``$KVSTORE_DIR`` or ``~/.cache/kvstore`` by default.
        codec: What full blocks are saved with: a codec, or a quality, as a
            :class:`~kvstore.Store` takes it; ``balanced`` by default.
        min_tokens: Fewer tokens are neither kept nor read for.
        exact: Read only rows that nothing lossy went into.
        min_bits: Read only rows of at least so many bits per number.
        min_free_bytes: What the disk keeps free.
        max_queued_bytes: Rows that may wait to be written; more are not kept.

    Raises:
        ArgumentError: The live model is missing.
        KVStoreError: There is no such model, no such codec, or the store cannot be
            opened.
        UnsupportedCacheError: A layer is of a class that cannot be stored.
        OSError: The disk fails.
    """
    from mlx_lm.models.cache import make_prompt_cache

    is_named = fingerprint is not None or model_path is not None
    if model is None and not (is_named and make_cache):
        raise ArgumentError(
            "a tier needs the live model", hint="`mlx_lm.load(path)` returns it"
        )
    if fingerprint is None and model_path is not None:
        fingerprint = fingerprint_model(str(model_path))
        package = type(model).__module__.partition(".")[0]
        if model is not None and package != "mlx_lm":
            # Of the same weights, another implementation may compute other rows.
            fingerprint = fingerprint.with_salt(package)
    fingerprint = fingerprint or Fingerprint.of(model)
    empty = make_cache() if make_cache else make_prompt_cache(model)
    lookalikes = Lookalikes(empty)

    def find_shapes() -> list[Shapes] | None:
        # A server's model may have to be fed otherwise.
        with harmless("what is read is not held against the model"):
            fed = make_cache() if make_cache else make_prompt_cache(model)
            feed(model, fed)
            return shapes_of(lookalikes.to_ours(fed))
        return None

    if model is not None:
        # Fed at once, since a fetch comes on any thread: fed while it generates, a
        # model that keeps positions beside its caches would lose them.
        shapes = find_shapes()
        expect_rows(lookalikes.empty, lambda: shapes)
    disk = Disk(
        Store(path, codec),
        min_tokens=min_tokens,
        min_bits=EXACT_BITS if exact else min_bits,
        min_free_bytes=min_free_bytes,
        max_queued_bytes=max_queued_bytes,
    )
    return Tier(disk, fingerprint, lookalikes)
