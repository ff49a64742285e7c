"""How long a conversation a model can hold, as its configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import KVStoreError
from ..fingerprint import read_json

# As the families of models spell it.
_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a model was made for; ``None`` where it does not say.

    A configuration of several parts has one per part, of which the text's counts.
    """
    for part in (config, config.get("text_config"), config.get("llm_config")):
        if not isinstance(part, Mapping):
            continue
        for name in _FIELDS:
            value = part.get(name)
            if type(value) is int and value > 0:
                return value
    return None


def read_context_length(folder: Path) -> int | None:
    """Return the same of a model's folder."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, KVStoreError):
        return None
    return context_length(config) if isinstance(config, dict) else None


def past_context(num_tokens: int, length: int | None) -> str | None:
    """Return a warning of a prompt that is longer than its model was made for."""
    if length is None or num_tokens <= length:
        return None
    return (
        f"the prompt has {num_tokens:,} tokens, and the model was made for {length:,}:"
        " what it says may be of no use"
    )
