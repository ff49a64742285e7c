"""What a model says next, from the rows that it computed and from what is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import KVStoreError
from ..format.block import Progress
from ..format.probe import Probe

if TYPE_CHECKING:
    from ..format.entry import Entry
    from ..store import Store
    from .load import LoadedModel

NUM_TOKENS = 64
"""That are said behind an entry to measure it."""


def measure_entry(
    model: LoadedModel,
    store: Store,
    entry: Entry,
    prompt_cache: list[Any],
    logits: mx.array,
    progress: Progress,
) -> Entry:
    """Measure how what is stored changes what a model says next, and note it.

    The model goes on from its own rows, each token drawn, and is fed the same tokens
    behind what is stored. Until then both are in memory.

    Args:
        model: What computed the rows; of a draft model nothing is measured.
        store: Where the entry is.
        entry: What is measured.
        prompt_cache: The entry's rows as they were computed, none from lossy ones. It
            grows.
        logits: What the model said behind them, ``(V,)``.
        progress: Called with (tokens said, tokens to say).

    Returns:
        The entry, as it is then.

    Raises:
        KVStoreError: The model says NaN.
    """
    digest = store.blocks_digest(entry.id)
    stored, _ = store.load_entry(entry.id, model.fingerprint)
    both = [model.parts(held)[0][1] for held in (prompt_cache, stored)]
    ends = model.tokenizer.eos_token_ids
    found: list[tuple[float, bool]] = []
    for number in range(NUM_TOKENS):
        progress(number, NUM_TOKENS)
        token = int(mx.random.categorical(logits, key=mx.random.key(number)))
        exact, coded = (log_probabilities(model.model, held, [token]) for held in both)
        kl, same = compare(exact, coded)
        found.append((float(kl[0]), bool(same[0])))
        if token in ends:
            break
        logits = exact[0]
    progress(NUM_TOKENS, NUM_TOKENS)
    kl, same = np.mean(found, axis=0).tolist()
    return store.note_probe(entry, Probe(max(0.0, kl), same, len(found), digest))


def log_probabilities(
    model: Any, prompt_cache: list[Any], tokens: Sequence[int]
) -> mx.array:
    """Return those of all tokens behind each of some, ``(T, V)``."""
    logits = model(mx.array([list(tokens)]), cache=prompt_cache)[0].astype(mx.float32)
    found: mx.array = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(found)
    return found


def compare(exact: mx.array, found: mx.array) -> tuple[Any, Any]:
    """Return KL divergence, and whether the first choice is the same, by token.

    Raises:
        KVStoreError: Either is no numbers.
    """
    kl = np.asarray((mx.exp(exact) * (exact - found)).sum(axis=-1), np.float64)
    if not np.isfinite(kl).all():
        raise KVStoreError(
            "nothing can be measured: what the model says is no numbers",
            hint="are its weights damaged?",
        )
    return kl, np.asarray(exact.argmax(axis=-1) == found.argmax(axis=-1))
