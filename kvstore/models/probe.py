"""What a model says next, from the rows that it computed and from what is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import KVStoreError
from ..format.block import Progress
from ..format.documents import is_amount
from ..format.probe import Probe

if TYPE_CHECKING:
    from ..format.entry import Entry
    from ..store import Store
    from .load import LoadedModel

NUM_TOKENS = 64
"""How many tokens the model says after an entry, so that the entry is measured."""
_MIN_TOKENS = 16


def count_tokens(model: LoadedModel, num_tokens: int) -> int:
    """Return how many tokens a model may say behind so many.

    Raises:
        KVStoreError: It was made for too few.
    """
    if model.context_length is None:
        return NUM_TOKENS
    count = min(NUM_TOKENS, model.context_length - num_tokens)
    if count < _MIN_TOKENS:
        raise KVStoreError(
            f"nothing can be measured: the model was made for {model.context_length:,}"
            f" tokens, and the prompt has {num_tokens:,}",
            hint="leave out `--measure`",
        )
    return count


def measure_entry(
    model: LoadedModel,
    store: Store,
    entry: Entry,
    prompt_cache: list[Any],
    logits: mx.array,
    progress: Progress,
) -> Entry:
    """Measure how what is stored changes what a model says next, and note it.

    The model goes on from its own rows: tokens are drawn from what it says, but for
    those that end a reply. It is fed the same tokens behind what is stored. Until then
    the rows are in memory twice.

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
        KVStoreError: The model says NaN, the entry has changed meanwhile, or the prompt
            is as long as the model's context.
    """
    digest = store.blocks_digest(entry.id)
    stored, tokens = store.load_entry(entry.id, model.fingerprint)
    both = [model.parts(held)[0][1] for held in (prompt_cache, stored)]
    ends = mx.zeros_like(logits)
    ends[mx.array([*model.tokenizer.eos_token_ids], mx.uint32)] = -mx.inf
    found: list[tuple[float, bool]] = []
    count = count_tokens(model, len(tokens))
    for number in range(count):
        progress(number, count)
        token = int(mx.random.categorical(logits + ends, key=mx.random.key(number)))
        exact, coded = (log_probabilities(model.model, held, [token]) for held in both)
        kl, same = compare(exact, coded)
        found.append((float(kl[0]), bool(same[0])))
        logits = exact[0]
    progress(count, count)
    kl, same = np.maximum(np.mean(found, axis=0), 0).tolist()
    if not is_amount(kl):
        raise KVStoreError(
            "behind what is stored the model says no numbers",
            hint="save it with another `--codec`",
        )
    return store.note_probe(entry, Probe(kl, same, count, digest))


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

    Args:
        exact: Log-probabilities of all tokens, ``(T, V)``.
        found: Those that are held against them; where they are NaN, the divergence is
            infinite.

    Raises:
        KVStoreError: The exact ones are NaN.
    """
    # A model may rule tokens out, by a logit of -inf.
    each = mx.where(mx.isinf(exact), 0, mx.exp(exact) * (exact - found))
    kl = np.asarray(each.sum(axis=-1), np.float64)
    if mx.isnan(exact).any():
        raise KVStoreError(
            "nothing can be measured: the model says no numbers",
            hint="are its weights damaged?",
        )
    same = np.asarray(exact.argmax(axis=-1) == found.argmax(axis=-1))
    return np.where(np.isnan(kl), np.inf, kl), same
