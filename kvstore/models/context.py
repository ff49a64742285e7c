"""How long a conversation a model can hold, as its configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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

    Args:
        config: Its ``config.json``. A model of several parts has one per part, of which
            the text's counts.
    """
    for part in (config, config.get("text_config"), config.get("llm_config")):
        if not isinstance(part, Mapping):
            continue
        for name in _FIELDS:
            value = part.get(name)
            if type(value) is int and value > 0:
                return value
    return None
