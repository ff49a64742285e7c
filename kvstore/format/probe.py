"""What was measured of one entry, by what its model says behind it; and its JSON."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .documents import JSON, is_amount, is_count

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Probe:
    """How far what a model says behind stored rows is from what it says otherwise."""

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
        is_amount(found.kl)
        and is_amount(found.same_choice)
        and found.same_choice <= 1
        and is_count(found.num_tokens)
        and found.num_tokens > 0
        and isinstance(found.blocks, str)
        and _DIGEST.fullmatch(found.blocks)
    )
    if not is_sound:
        raise ValueError("nobody can have measured that")
    return found
