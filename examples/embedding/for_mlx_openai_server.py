"""mlx-openai-server with its prompt caches on disk, for good.

Call ``install()`` before the server makes its handlers. A store takes the place of the
pickles that the server writes, and loses when it ends. Written against commit 4b7d4b6
of May 2026 (release 1.8.1).
"""

from pathlib import Path
from typing import Any

from app.handler.mlx_lm import MLXLMHandler

import kvstore


class Tiered:
    """What the server asks of its ``LRUPromptCache``, of a tier."""

    def __init__(self, tier: kvstore.Tier) -> None:
        self.tier = tier

    def fetch_nearest_cache(
        self, tokens: list[int], *, allowed_sources: Any = None
    ) -> tuple[list[Any] | None, list[int]]:
        """Return what is stored of a prompt, which any thread may go on from."""
        self.tier.flush(2)  # what the last reply has left
        return self.tier.fetch(tokens)

    def insert_cache(
        self,
        tokens: list[int],
        prompt_cache: list[Any],
        *,
        cache_type: str = "assistant",
        source: str = "",
    ) -> None:
        """Keep a prompt cache."""
        self.tier.put(tokens, prompt_cache, shared=cache_type == "system")

    def log_cache_stats(self) -> None:
        """Do nothing: ``kvstore stats`` tells."""

    def close(self) -> None:
        """Write what waits."""
        self.tier.close()


def install(path: str | Path | None = None, codec: str | None = None) -> None:
    """Put a store in the place of the server's own pickles.

    Args:
        path: The store's folder, as :class:`kvstore.Store` takes it.
        codec: What is saved with.
    """
    init = MLXLMHandler.__init__

    def make(self: Any, model_path: str, *args: Any, **options: Any) -> None:
        init(self, model_path, *args, **options)
        fingerprint = None
        if self.model.draft_model is not None:
            draft = kvstore.Fingerprint.of(self.model.draft_model)
            fingerprint = kvstore.Fingerprint.of(self.model.model).with_draft(draft)
        self.prompt_cache.close()
        self.prompt_cache = Tiered(
            kvstore.tier(
                self.model.model,
                model_path=model_path,
                fingerprint=fingerprint,
                make_cache=self.model.create_prompt_cache,
                path=path,
                codec=codec,
            )
        )

    MLXLMHandler.__init__ = make
