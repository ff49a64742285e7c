"""Rows of one prompt, kept for another that differs before them: an approximation.

What differs is computed, and so are the next tokens behind it, which have to read it.
The rows of the tokens behind those are taken over, their keys rotated to the new
positions: they still are what they were when the model had read the other words. So a
prompt cache with such rows is marked, and what is stored of it has a root of its own.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError
from .live import PromptCache, read_provenance, set_provenance
from .provenance import Provenance
from .rotation import LayerRotation, measure_rotation

NUM_FRESH = 16
"""Tokens computed behind a change. Without them a model half forgets what is new."""
MIN_MOVED = 64
"""Fewer are computed instead."""
MAX_CHANGED = 256
"""Behind a change of more tokens nothing is reused: too much of it would be wrong."""
_SHARE = 4  # nor behind one of more than a quarter of what stands behind it
_STEP = 2048
_ROWS = ("KVCache", "ConcatenateKVCache")
_WINDOW = "RotatingKVCache"


@dataclass(frozen=True, slots=True)
class MovedRun:
    """Tokens that a stored prompt and another have in common, at other places."""

    # Of the first one, in what is stored and in the prompt.
    source: int
    target: int
    size: int

    def behind(self, begin: int) -> MovedRun:
        """Return the part of it that begins there in the prompt, or later."""
        skipped = max(0, begin - self.target)
        places = self.source + skipped, self.target + skipped
        return MovedRun(*places, max(0, self.size - skipped))


class Reanchoring:
    """A model whose stored rows may be reused behind other words.

    Whether its keys can be moved to other positions is measured when this is made.

    Args:
        model: From ``mlx_lm.load``; it computes what differs.
        num_fresh: Tokens that are computed behind each change.

    Raises:
        UnsupportedCacheError: They cannot be; it says which layer, and why.
    """

    def __init__(self, model: Any, *, num_fresh: int = NUM_FRESH) -> None:
        if num_fresh < 1:
            raise ArgumentError(
                f"{num_fresh} tokens computed behind a change",
                hint=f"{NUM_FRESH} are enough for most",
            )
        self._model = model
        self._rotations: list[LayerRotation] = measure_rotation(model)
        self.num_fresh = num_fresh
        self.num_computed = 0
        """Tokens that were computed so far."""
        self.sketches: dict[str, Sketch] = {}
        """Of stored prompts, by the hash of their last block: to find them again."""

    def takes(self, classes: Sequence[str]) -> bool:
        """Whether a prompt cache of these classes is one of the model's own."""
        known = (*_ROWS, _WINDOW)
        return len(classes) == len(self._rotations) and set(classes) <= set(known)

    @staticmethod
    def count(prompt_cache: Sequence[Any]) -> int:
        """Return how many rows of a prompt cache were taken over, at most."""
        return read_provenance(prompt_cache).num_moved

    def gain(self, runs: Sequence[MovedRun]) -> int:
        """Return of how many tokens rows are taken over from some runs."""
        return sum(run.size - self.num_fresh for run in runs)

    def make_cache(self) -> PromptCache:
        """Return an empty prompt cache of the model's."""
        from mlx_lm.models.cache import make_prompt_cache

        return list(make_prompt_cache(self._model))

    def forget(self, known: Container[str]) -> None:
        """Let go of the sketches of all but these."""
        for tip in [tip for tip in self.sketches if tip not in known]:
            del self.sketches[tip]

    def extend(
        self,
        prompt_cache: PromptCache,
        prompt: Sequence[int],
        source: PromptCache,
        runs: Sequence[MovedRun],
    ) -> None:
        """Grow a prompt cache by rows of another one, and by what it computes.

        It ends with the last run then, and is marked.

        Args:
            prompt_cache: Of the model's classes, of leading tokens of the prompt.
            prompt: The prompt.
            source: What has the rows of all runs; of a window, those that the last
                run ends with.
            runs: In order, behind what the prompt cache has; each longer than
                ``num_fresh``.
        """
        done = prompt_cache[0].offset
        mine = read_provenance(prompt_cache)
        marks, before = mine.joined(read_provenance(source)), mine.num_moved
        for run in runs:
            begin = run.target + self.num_fresh
            self._compute(prompt_cache, prompt[done:begin])
            first, done = run.source + self.num_fresh, run.target + run.size
            layers = zip(prompt_cache, source, self._rotations, strict=True)
            for cache, held, rotation in layers:
                _append(cache, held, first, run.source + run.size, rotation, begin)
            mx.eval([cache.state for cache in prompt_cache])
        coded = done if marks.coded_tokens else 0
        num_moved = before + self.gain(runs)
        set_provenance(prompt_cache, Provenance(coded, marks.bits, num_moved))

    def _compute(self, prompt_cache: PromptCache, tokens: Sequence[int]) -> None:
        """Append rows of tokens, computed on what there is."""
        self.num_computed += len(tokens)
        for start in range(0, len(tokens), _STEP):
            some = mx.array([tokens[start : start + _STEP]])
            self._model(some, cache=prompt_cache)
            mx.eval([cache.state for cache in prompt_cache])


def head(prompt_cache: PromptCache, num_tokens: int) -> PromptCache:
    """Return a copy of the leading rows of a prompt cache that has no windows."""
    found = []
    for cache in prompt_cache:
        copied: Any = type(cache)()
        if num_tokens:
            rows = (x[:, :, :num_tokens] for x in (cache.keys, cache.values))
            copied.update_and_fetch(*rows)
        found.append(copied)
    mx.eval([cache.state for cache in found if not cache.empty()])
    marks = read_provenance(prompt_cache)
    coded, moved = min(marks.coded_tokens, num_tokens), min(marks.num_moved, num_tokens)
    set_provenance(found, Provenance(coded, marks.bits, moved))
    return found


def _append(
    cache: Any, held: Any, first: int, stop: int, rotation: LayerRotation, at: int
) -> None:
    """Append rows ``first`` to ``stop`` of another cache at a position of this one."""
    is_window = type(cache).__name__ == _WINDOW
    begin = first
    if is_window:
        # What lies before the window is seen by nobody any more.
        begin = max(first, stop - cache.max_size)
    sides = []
    for array in (held.keys, held.values):
        rows = held._temporal_order(array) if is_window else array[:, :, : held.offset]
        end = rows.shape[2] - (held.offset - stop)
        sides.append(rows[:, :, end - (stop - begin) : end])
    keys = rotation.rotate(sides[0], at - first) if at != first else sides[0]
    if not is_window:
        cache.update_and_fetch(keys, sides[1])
        return
    joined = []
    for mine, moved in ((cache.keys, keys), (cache.values, sides[1])):
        # Something was computed before, so there are rows.
        whole = mx.concatenate([cache._temporal_order(mine), moved], axis=2)
        joined.append(whole[:, :, -cache.max_size :])
    cache.keys, cache.values = joined
    cache.offset, cache._idx = at + stop - first, joined[0].shape[2]


# So many tokens are hashed at each place; of the hashes, one in so many is kept.
_GRAM, _SAMPLED = 32, 16
_FACTOR = 0x9E3779B97F4A7C15
_MAX_PLACES = 16


@dataclass(frozen=True, slots=True)
class Sketch:
    """Tokens, and by what others that have a part of them are known."""

    tokens: npt.NDArray[np.int64]
    # A hash of the tokens at each place, but the last few.
    grams: npt.NDArray[np.uint64] = field(repr=False)
    # Some of them, which depends on the tokens only.
    marks: frozenset[int] = field(repr=False)

    @classmethod
    def of(cls, tokens: Sequence[int]) -> Sketch:
        """Return that of some tokens."""
        array = np.asarray(tokens, np.int64)
        # Unsigned numbers wrap around without a word.
        grams = array.view(np.uint64) * np.uint64(_FACTOR)
        grams ^= grams >> np.uint64(29)
        size, factor = 1, _FACTOR
        while size < _GRAM:
            grams = grams[:-size] * np.uint64(factor) + grams[size:]
            size, factor = 2 * size, factor * factor % 2**64
        high = grams >> np.uint64(32)
        marks = frozenset(grams[high % np.uint64(_SAMPLED) == 0].tolist())
        return cls(array, grams, marks)


def find_runs(stored: Sketch, given: Sketch, begin: int, least: int) -> list[MovedRun]:
    """Return what both have in common behind small changes, in the order of both.

    Args:
        stored: What is stored.
        given: The prompt, less the token that must be fed.
        begin: How many of its tokens are had already.
        least: Fewer tokens are no run.
    """
    order = np.argsort(stored.grams, kind="stable")
    known = stored.grams[order]
    left = np.searchsorted(known, given.grams, "left")
    right = np.searchsorted(known, given.grams, "right")
    places = np.flatnonzero(left < right)
    found: list[MovedRun] = []
    # From where both part, though more may be had of another prompt: what stands there
    # tells which places are the same ones.
    source = target = done = _common(stored.tokens, given.tokens)
    while (number := int(np.searchsorted(places, target))) < len(places):
        target = int(places[number])
        if target - done > MAX_CHANGED:
            break
        some = order[left[target] : right[target]]
        is_near = (some >= source) & (some <= source + MAX_CHANGED)
        there = some[is_near][:_MAX_PLACES].tolist()
        sizes = [_common(stored.tokens[s:], given.tokens[target:]) for s in there]
        size = max(sizes, default=0)
        place = there[sizes.index(size)] if there else source
        changed = max(target - done, place - source)
        if size >= max(least, _SHARE * changed):
            source = place
            found.append(MovedRun(source, target, size))
            source, target = source + size, target + size
            done = target
        else:
            target += max(1, size - _GRAM + 1)
    return [part for run in found if (part := run.behind(begin)).size >= least]


def _common(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> int:
    """Return how many leading tokens both have in common."""
    size = min(len(left), len(right))
    differs = left[:size] != right[:size]
    return int(differs.argmax()) if differs.any() else size
