"""How fast a machine computes rows of a model, and restores them. Pure: no files.

Computing is taken to have a rate, restoring a fixed part and a part for each token.
From both follows from how many tokens on restoring is the faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from ..storage.index import Timing

Verdict = Literal["pays", "never", "unknown"]
"""Whether restoring rows is faster than computing them, from some number on."""


def is_current(timing: Timing, now: float) -> bool:
    """Whether sums were last added to within a day; clocks may be set back."""
    return abs(timing.measured_at - now) <= MAX_AGE_S


MIN_PREFILL_TOKENS = 64
"""Fewer are computed in one step, whose time says little of a prefill."""
MAX_AGE_S = 86_400.0
"""What was measured longer ago decides nothing: a disk may be slow once."""
# What is left of the weight of older observations when one is added.
_DECAY = 0.9
# One load, the first of a process say, may take long by accident.
_ENOUGH_LOADS = 1 + _DECAY + _DECAY**2 - 1e-9
# Below, the numbers of tokens are too much alike.
_MIN_SPREAD = 0.05
_MAX_TOKENS = 1e9
_MAX_SECONDS = 1e6
_MAX_TIME = 1e11
_MAX_NUM = 1 / (1 - _DECAY) + 1
# No machine is slower or faster, but a flipped bit is, and sums overflow by it.
_MIN_TPS, _MAX_TPS = 1e-3, 1e12


def observe(
    fingerprint: str,
    codec: str | None,
    num_tokens: int,
    *,
    seconds: float,
    at: float,
    model: str = "",
) -> Timing | None:
    """Return one observation, or ``None`` where it says nothing.

    Args:
        fingerprint: Digest of the model's fingerprint.
        codec: What the rows were restored from; ``None`` where they were computed.
        num_tokens: How many tokens' rows.
        seconds: How long it took.
        at: When, Unix seconds.
        model: What the model is called.
    """
    if codec is None and num_tokens < MIN_PREFILL_TOKENS:
        return None
    timing = Timing(
        fingerprint, codec, model, 1.0, float(num_tokens), float(seconds),
        float(num_tokens) ** 2, num_tokens * float(seconds), float(at),
    )  # fmt: skip
    return timing if is_sound(timing) else None


def add(known: Timing | None, new: Timing) -> Timing:
    """Return sums with newer ones of the same kind added; older ones fade."""
    if known is None or not is_sound(known) or not is_current(known, new.measured_at):
        return new
    return replace(
        new,
        num=known.num * _DECAY + new.num,
        tokens=known.tokens * _DECAY + new.tokens,
        seconds=known.seconds * _DECAY + new.seconds,
        squares=known.squares * _DECAY + new.squares,
        products=known.products * _DECAY + new.products,
    )


def is_sound(timing: Timing) -> bool:
    """Whether sums could be those of observations; a file may hold anything."""
    limits = (
        (timing.num, _MAX_NUM),
        (timing.tokens, _MAX_NUM * _MAX_TOKENS),
        (timing.seconds, _MAX_NUM * _MAX_SECONDS),
        (timing.squares, _MAX_NUM * _MAX_TOKENS**2),
        (timing.products, _MAX_NUM * _MAX_TOKENS * _MAX_SECONDS),
        (timing.measured_at, _MAX_TIME),
    )
    # Written so that NaN fails.
    is_possible = all(0 < value <= most for value, most in limits)
    return is_possible and _MIN_TPS <= _rate(timing) <= _MAX_TPS


@dataclass(frozen=True, slots=True)
class Speeds:
    """What is known of one model on this machine."""

    # What was observed of computing its rows, or ``None``.
    prefill: Timing | None = None
    # What was observed of restoring them, or ``None``.
    load: Timing | None = None

    @classmethod
    def choose(cls, timings: Iterable[Timing], codec: str, now: float) -> Speeds:
        """Return the speeds of one model that decide now.

        Args:
            timings: All of that model's.
            codec: What its rows are restored from; where that was never measured,
                whatever was restored last.
            now: Unix seconds.
        """
        usable = [t for t in timings if is_sound(t) and is_current(t, now)]
        loads = [timing for timing in usable if timing.codec is not None]
        return cls(
            next((timing for timing in usable if timing.codec is None), None),
            max(loads, key=lambda t: (t.codec == codec, t.measured_at), default=None),
        )

    @property
    def timings(self) -> tuple[Timing, ...]:
        """What was observed, of restoring first."""
        return tuple(one for one in (self.load, self.prefill) if one is not None)

    @property
    def measured_at(self) -> float:
        """When the older of both was measured last, Unix seconds."""
        return min(one.measured_at for one in self.timings)

    def are_current(self, now: float) -> bool:
        """Whether both were measured within a day; else they decide nothing."""
        return all(is_current(one, now) for one in self.timings)

    @property
    def prefill_tps(self) -> float | None:
        """Tokens computed in a second."""
        return None if self.prefill is None else _rate(self.prefill)

    @property
    def load_tps(self) -> float | None:
        """Tokens restored in a second, on the average of what was observed."""
        return None if self.load is None else _rate(self.load)

    @property
    def verdict(self) -> Verdict:
        """Whether there is a number of tokens from which on restoring is faster."""
        if self.prefill is None or self._known_load is None:
            return "unknown"
        return "never" if self.break_even_tokens is None else "pays"

    @property
    def break_even_tokens(self) -> int | None:
        """Fewest tokens that are restored faster than computed.

        ``None`` where none are, and where that is not known; :attr:`verdict` says
        which.
        """
        load = self._known_load
        if self.prefill is None or load is None:
            return None
        is_faster = _rate(load) > _rate(self.prefill)
        # As `load_s` has it, on this side of the mean or on that.
        guess = (0.0, 1 / _rate(load)) if is_faster else (load.seconds / load.num, 0.0)
        fixed_s, token_s = _fit(load) or guess
        gain_s = 1 / _rate(self.prefill) - token_s
        if gain_s <= 0 or fixed_s / gain_s >= _MAX_TOKENS:
            return None
        return math.floor(fixed_s / gain_s) + 1

    def prefill_s(self, num_tokens: int) -> float | None:
        """Return how long so many tokens take to compute, or ``None``."""
        return None if self.prefill is None else num_tokens / _rate(self.prefill)

    def load_s(self, num_tokens: int) -> float | None:
        """Return how long so many tokens take to restore, or ``None``."""
        load = self._known_load
        if load is None:
            return None
        line = _fit(load)
        if line is None:
            # Of all that fits, the least: who is thought too slow is never tried.
            return load.seconds / load.num * min(1, num_tokens * load.num / load.tokens)
        fixed_s, token_s = line
        return fixed_s + token_s * num_tokens

    def pays(self, num_tokens: int, *, held: int = 0) -> bool:
        """Whether restoring is expected to be faster than computing.

        True where that is not known: what is never tried is never measured.

        Args:
            num_tokens: How many tokens would be restored.
            held: So many of them are in memory already and need not be computed.
        """
        if num_tokens <= held:
            return False
        load_s, prefill_s = self.load_s(num_tokens), self.prefill_s(num_tokens - held)
        return load_s is None or prefill_s is None or load_s < prefill_s

    @property
    def _known_load(self) -> Timing | None:
        load = self.load
        return load if load is not None and load.num >= _ENOUGH_LOADS else None


def _rate(timing: Timing) -> float:
    return timing.tokens / timing.seconds


def _fit(timing: Timing) -> tuple[float, float] | None:
    """Return the fixed part and that of each token, in seconds: least squares.

    ``None`` where the observations do not tell both apart.
    """
    mean_tokens, mean_s = timing.tokens / timing.num, timing.seconds / timing.num
    variance = timing.squares / timing.num - mean_tokens**2
    if variance <= (_MIN_SPREAD * mean_tokens) ** 2:
        return None
    token_s = (timing.products / timing.num - mean_tokens * mean_s) / variance
    fixed_s = mean_s - token_s * mean_tokens
    if token_s <= 0:
        return None
    return (
        (fixed_s, token_s) if fixed_s >= 0 else (0.0, timing.products / timing.squares)
    )
