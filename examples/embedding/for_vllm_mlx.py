"""vllm-mlx with the prompt caches of its simple engine on disk.

Call ``install()`` before the engine starts, and switch its prefix trie on:
``SimpleEngine(model, prefix_trie_cache=True)``. Written against commit 4b654c0 of
August 2026.
"""

from pathlib import Path
from typing import Any

from mlx_lm.models.cache import make_prompt_cache
from vllm_mlx.engine.simple import SimpleEngine

import kvstore
from kvstore.server import DiskPromptCache, ServedModel


def install(path: str | Path | None = None, codec: str | None = None) -> None:
    """Put a store in the place of mlx-lm's prompt caches in memory.

    Args:
        path: The store's folder, as :class:`kvstore.Store` takes it.
        codec: What is saved with.
    """
    ensure, stop = SimpleEngine._ensure_prefix_trie_cache, SimpleEngine.stop
    peek = SimpleEngine._peek_prefix_trie_tokens_saved

    def ensure_stored(self: Any) -> Any:
        with self._prefix_trie_cache_lock:
            if self._prefix_trie_cache is None and self._prefix_trie_cache_enabled:
                self._prefix_trie_cache = make(self._prefix_trie_cache_size)
        return ensure(self)

    def make(size: int) -> DiskPromptCache:
        known: list[ServedModel] = []

        def describe(model: Any) -> ServedModel:
            # One engine, one model: which is no key, since Python cannot hash it.
            if not known:
                fingerprint = kvstore.Fingerprint.of(model)
                known.append(ServedModel(fingerprint, (make_prompt_cache(model),)))
            return known[0]

        return DiskPromptCache(kvstore.Store(path, codec), describe, max_size=size)

    async def stop_stored(self: Any) -> None:
        cache = self._prefix_trie_cache
        await stop(self)
        if isinstance(cache, DiskPromptCache):
            cache.close()

    def peek_stored(trie: Any, model: Any, tokens: list[int]) -> int | None:
        # What the disk has is known when it has been read.
        return (
            len(tokens)
            if isinstance(trie, DiskPromptCache)
            else peek(trie, model, tokens)
        )

    SimpleEngine._ensure_prefix_trie_cache = ensure_stored
    SimpleEngine._peek_prefix_trie_tokens_saved = staticmethod(peek_stored)
    SimpleEngine.stop = stop_stored
