"""What was measured of a model's codecs, as JSON, and which codec a quality means."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..errors import FormatError, IntegrityError
from .documents import JSON, canonical_json, is_amount, strict_json

FORMAT = 1
MAX_BYTES = 65_536
MIN_CONTEXTS = 4
"""Contexts that tell how far a mean over them may be off."""
Quality = Literal["exact", "high", "balanced", "small"]
BOUNDS: dict[str, float] = {"high": 0.001, "balanced": 0.003, "small": 0.01}
"""The most that each may move what the model says next: KL divergence in nats."""
QUALITIES = ("exact", *BOUNDS)
EXACT = "planes+zstd"
UNMEASURED = {
    "exact": EXACT,
    "high": "turbo6+zstd",
    "balanced": "turbo4+zstd",
    "small": "turbo4+zstd",
}
"""What is taken of a model that nobody measured."""
_BITS = re.compile(r"(turbo|fit)(\d)(?:\.\d+)?(?:v(\d))?(?:@.*)?(?:\+zstd)?")
_BASIS_BITS = 2
"""Added to the rate of `fit` to compare it with `turbo`: `fit2` beats `turbo4`."""
_NAME = re.compile(r"[a-z0-9.]{1,20}(?:@[0-9a-f]{64})?(?:\+zstd)?")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Measured:
    """What a codec does to what a model says next, on contexts left out."""

    codec: str
    # Per number of the rows, everything counted but the basis.
    bits: float
    # Mean KL divergence from what it says without a store, in nats.
    kl: float
    # Its standard error, over contexts.
    kl_error: float
    # How often the first choice is the same, 0 to 1.
    same_choice: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is known of one model's codecs."""

    # Digest of the model's fingerprint.
    fingerprint: str
    # What the model was called; advisory.
    model: str
    # Digest of its basis, or ``None``.
    basis: str | None
    # How many contexts were left out to measure with.
    num_contexts: int
    measured: tuple[Measured, ...]

    @property
    def told(self) -> tuple[Measured, ...]:
        """What was measured on enough contexts to count."""
        return self.measured if self.num_contexts >= MIN_CONTEXTS else ()

    def choose(self, quality: str) -> str:
        """Return the smallest codec that was measured to meet a quality.

        It meets one if its mean loss does even where that is too low by its own
        standard error: a mean over a few contexts may be lucky. Of fewer than
        ``MIN_CONTEXTS`` that error itself is not known, and nothing counts.
        """
        if quality == "exact" or not self.told:
            return UNMEASURED[quality]
        bound = BOUNDS[quality]
        good = [one for one in self.told if one.kl + one.kl_error <= bound]
        return min(good, key=lambda one: one.bits).codec if good else EXACT


def rank(codec: str, measured: Iterable[Measured]) -> int | None:
    """Return the bits by which copies that a codec made are compared with others.

    They are those of the widest `turbo` that was measured to lose no less, or the
    nominal ones where either was not; ``None`` of a codec that is lossless or unknown.

    Args:
        codec: Its name.
        measured: What is known of this model's codecs.
    """
    known = {one.codec.removesuffix("+zstd"): one.kl for one in measured}
    name = codec.removesuffix("+zstd")
    nominal = nominal_bits(codec)
    turbo = {n: kl for n in range(1, 9) if (kl := known.get(f"turbo{n}")) is not None}
    if nominal is None or name not in known or not turbo or name.startswith("turbo"):
        return nominal
    least = max(1, min(nominal, min(turbo) - 1))
    return max([n for n, kl in turbo.items() if kl >= known[name]], default=least)


def nominal_bits(codec: str) -> int | None:
    """Return the fewest bits of a lossy codec of ours, by its name.

    Of one with a basis they are those of a `turbo` that loses about as much.
    """
    match = _BITS.fullmatch(codec)
    if not match:
        return None
    family, *widths = match.groups()
    bits = min(int(n) for n in widths if n)
    return bits + _BASIS_BITS if family == "fit" else bits


def calibration_to_bytes(calibration: Calibration) -> bytes:
    """Return a calibration as canonical JSON."""
    return canonical_json({"format": FORMAT, **asdict(calibration)})


def parse_calibration(data: bytes, fingerprint: str) -> Calibration:
    """Return the calibration that bytes spell.

    Raises:
        IntegrityError: It is damaged, or another model's.
        FormatError: A newer release wrote it.
    """
    try:
        body = strict_json(data, allow_floats=True)
        form = body.pop("format")
        if type(form) is int and form != FORMAT:
            raise FormatError(f"calibration has format {form}, this release reads 1")
        measured = tuple(map(parse_measured, body.pop("measured")))
        found = Calibration(**body, measured=measured)
        if data != calibration_to_bytes(found) or not _is_sound(found, fingerprint):
            raise ValueError("it is not as it was written")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise IntegrityError(
            f"calibration {fingerprint[:12]} cannot be read: {error}",
            hint="`kvstore calibrate` makes it anew",
        ) from error
    return found


def parse_measured(value: JSON) -> Measured:
    """Return what was measured of a codec, from JSON.

    Raises:
        ValueError: It is not that.
    """
    found = Measured(**value)
    numbers = (found.bits, found.kl, found.kl_error, found.same_choice)
    if not isinstance(found.codec, str) or not _NAME.fullmatch(found.codec):
        raise ValueError("a codec has no name")
    if not all(map(is_amount, numbers)):
        raise ValueError("what was measured is no number from 0")
    return found


def _is_sound(found: Calibration, fingerprint: str) -> bool:
    basis: Any = found.basis
    is_basis = basis is None or (isinstance(basis, str) and _DIGEST.fullmatch(basis))
    types = isinstance(found.model, str) and type(found.num_contexts) is int
    return bool(found.fingerprint == fingerprint and is_basis and types)
