"""What was measured of one entry, by what its model says behind it; and its JSON."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from .documents import JSON, is_count

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Probe:
    """How what a model says behind an entry differs from what it says without it."""

    # Mean KL divergence over the tokens, in nats.
    kl: float
    # How often the first choice is the same, 0 to 1.
    same_choice: float
    # Tokens that were said, and measured with.
    num_tokens: int
    # Digest of the entry's blocks as they were stored then, in hex.
    blocks: str


def parse_probe(value: JSON) -> Probe:
    """Return a probe from JSON.

    Raises:
        ValueError: It is none.
        TypeError: It has other fields.
    """
    found = Probe(**value)
    is_sound = (
        _is_number(found.kl, math.inf)
        and _is_number(found.same_choice, 1)
        and is_count(found.num_tokens)
        and found.num_tokens > 0
        and isinstance(found.blocks, str)
        and _DIGEST.fullmatch(found.blocks)
    )
    if not is_sound:
        raise ValueError("what an entry says of itself cannot be")
    return found


def _is_number(value: Any, limit: float) -> bool:
    return type(value) in (int, float) and 0 <= value <= limit
