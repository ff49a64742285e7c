"""Rows of one prompt, kept for another that differs before them: an approximation.

The prefix that is the same is copied. What differs is computed, and so are the next
tokens behind it, which have to read it. The rows of the tokens behind those are taken
over, their keys rotated to the new positions: they still are what they were when the
model had read the other words. So they are never exact, and a store does not take them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import mlx.core as mx

from ..caches.live import Provenance, set_provenance
from ..errors import UnsupportedCacheError
from ..format.chain import common_run
from .rotation import LayerRotation

NUM_FRESH = 16
"""Tokens computed behind a change. Without them a model half forgets what is new."""
_MIN_MOVED = 64
_STEP = 2048


@dataclass(frozen=True, slots=True)
class Reanchored:
    """A prompt cache with rows that were computed for another prompt."""

    # Marked, and so are copies of its caches: no store saves them. Who builds other
    # caches of its rows, as mlx-lm does for a batch or for `kv_bits`, has to mark them.
    prompt_cache: list[Any]
    # Tokens of the prompt that are still to be fed, one at least.
    rest: list[int]
    # Leading rows that are those of the prompt itself.
    num_kept: int
    # Rows that were computed, on what lies before them.
    num_computed: int
    # Rows that were taken over from other positions, or from behind other words.
    num_moved: int


def reanchor_prompt(
    model: Any,
    rotations: Sequence[LayerRotation],
    prompt_cache: Sequence[Any],
    tokens: Sequence[int],
    prompt: Sequence[int],
    *,
    num_fresh: int = NUM_FRESH,
) -> Reanchored | None:
    """Return a prompt cache for a prompt, made of that of a similar one.

    Args:
        model: From ``mlx_lm.load``; it computes what differs.
        rotations: From :func:`~kvstore.models.rotation.measure_rotation` of that model.
        prompt_cache: What is held, of ``KVCache`` only; it stays as it is.
        tokens: Those whose rows it holds.
        prompt: The new prompt.
        num_fresh: Tokens that are computed behind each change.

    Returns:
        ``None`` where nothing behind a change is the same for long enough.

    Raises:
        UnsupportedCacheError: A layer is not a ``KVCache``.
        ValueError: Tokens and rows disagree.
    """
    _check(prompt_cache, tokens, rotations)
    wanted = list(prompt[:-1])
    kept = common_run(tokens, wanted)
    runs = _runs(tokens, wanted, kept, num_fresh + _MIN_MOVED)
    if not runs:
        return None
    made = _Copying(model, rotations, prompt_cache)
    made.move(0, kept, 0)
    done, num_moved = kept, 0
    for source, target, size in runs:
        made.compute(prompt[done : target + num_fresh])
        made.move(source + num_fresh, source + size, target - source)
        done, num_moved = target + size, num_moved + size - num_fresh
    set_provenance(made.caches, Provenance(done, 0, is_moved=True))
    num_computed = done - kept - num_moved
    return Reanchored(made.caches, list(prompt[done:]), kept, num_computed, num_moved)


def _check(
    prompt_cache: Sequence[Any],
    tokens: Sequence[int],
    rotations: Sequence[LayerRotation],
) -> None:
    from mlx_lm.models.cache import KVCache

    for number, cache in enumerate(prompt_cache):
        if type(cache) is not KVCache:
            raise UnsupportedCacheError(
                f"layer {number} is a {type(cache).__name__}, whose rows are not moved",
                hint="only models whose layers are all of KVCache are re-anchored",
            )
        if cache.offset != len(tokens):
            raise ValueError(
                f"layer {number} holds {cache.offset} rows for {len(tokens)} tokens"
            )
    if len(rotations) != len(prompt_cache):
        raise ValueError(f"{len(rotations)} rotations for {len(prompt_cache)} layers")


def _runs(
    tokens: Sequence[int], wanted: Sequence[int], begin: int, least: int
) -> list[tuple[int, int, int]]:
    """Return what both have behind a change: its places in both, and how long it is."""
    matcher = SequenceMatcher(None, tokens[begin:], wanted[begin:], autojunk=False)
    return [
        (block.a + begin, block.b + begin, block.size)
        for block in matcher.get_matching_blocks()
        if block.size >= least
    ]


class _Copying:
    """A prompt cache that grows by rows of another one, and by computed ones."""

    def __init__(
        self, model: Any, rotations: Sequence[LayerRotation], held: Sequence[Any]
    ) -> None:
        from mlx_lm.models.cache import KVCache

        self._model, self._rotations, self._held = model, rotations, held
        self.caches: list[Any] = [KVCache() for _ in held]

    def move(self, begin: int, end: int, by: int) -> None:
        """Append rows of the other one, moved by so many positions."""
        if begin == end:
            return
        layers = zip(self.caches, self._held, self._rotations, strict=True)
        for cache, held, rotation in layers:
            keys = held.keys[:, :, begin:end]
            keys = rotation.rotate(keys, by) if by else keys
            cache.update_and_fetch(keys, held.values[:, :, begin:end])
        self._evaluate()

    def compute(self, tokens: Sequence[int]) -> None:
        """Append rows of tokens, computed on what there is."""
        for start in range(0, len(tokens), _STEP):
            self._model(mx.array([tokens[start : start + _STEP]]), cache=self.caches)
            self._evaluate()

    def _evaluate(self) -> None:
        mx.eval([cache.state for cache in self.caches])
