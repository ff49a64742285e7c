"""LM Studio's mlx-engine with its prompt caches on disk, for good.

Call ``install()`` before ``mlx_engine.generate.load_model``. Both of its paths start
from the disk then: one request at a time (``max_seq_nums=1``, ``kv_bits``, draft
models) and batches (its default). ``kv_bits="turbo3"`` holds TurboQuant codes in
memory. Written against commit 08f0c07 of August 2026.
"""

from functools import cache
from pathlib import Path
from typing import Any

import mlx_engine.generate
from mlx_engine.cache_wrapper import CacheWrapper
from mlx_engine.model_kit.batched_vision.model_kit import BatchedVisionModelKit
from mlx_engine.model_kit.batched_vision.prompt_cache import chunks, coordinator
from mlx_engine.model_kit.model_kit import ModelKit
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_vlm.models.cache import make_prompt_cache

import kvstore
from kvstore.server import DiskPromptCache, ServedModel
from turboquant.kv_cache import parse_kv_bits, quantize_prompt_cache


def install(path: str | Path | None = None, codec: str | None = None) -> None:
    """Put a store behind both paths.

    Args:
        path: The store's folder, as :class:`kvstore.Store` takes it.
        codec: What is saved with.
    """
    install_sequential(path, codec)
    install_batched(path, codec)


def install_sequential(path: str | Path | None, codec: str | None) -> None:
    """Put a store in the place of the history of one request after another."""
    make_cache, load = CacheWrapper._make_cache, ModelKit._full_model_init
    shutdown = ModelKit.shutdown
    find_params = mlx_engine.generate.get_kv_cache_quantization_params

    def take_params(kv_bits: Any, group_size: Any, start: Any) -> tuple[Any, Any, Any]:
        if not isinstance(kv_bits, str):
            return find_params(kv_bits, group_size, start)
        parse_kv_bits(kv_bits)  # raises ValueError
        return kv_bits, None, None

    def load_model(self: Any, model_path: Path, *args: Any, **given: Any) -> None:
        mode = given.get("kv_bits")
        if isinstance(mode, str):
            # mlx-lm takes bits for its own quantization, and a window cannot be coded.
            given |= {"kv_bits": None, "max_kv_size": None}
        load(self, model_path, *args, **given)
        self.cache_wrapper.model_path = model_path
        if isinstance(mode, str):
            self.cache_wrapper.mode = mode
            self.cache_wrapper._live_cache = self.cache_wrapper._make_cache()

    def make(self: Any) -> list[Any]:
        mode = getattr(self, "mode", None)
        return (
            quantize_prompt_cache(make_cache(self), mode) if mode else make_cache(self)
        )

    def make_history(self: Any) -> DiskPromptCache:
        @cache  # A draft model comes after the history that is made for it.
        def describe(key: str) -> ServedModel:
            folder = getattr(self, "model_path", None)
            fingerprint = (
                kvstore.Fingerprint.of(self.model)
                if folder is None  # nobody's but a test's
                else kvstore.Fingerprint.from_path(folder)
            )
            if self._draft_model is not None:
                draft = kvstore.Fingerprint.of(self._draft_model)
                fingerprint = fingerprint.with_draft(draft)
            # It changes some of mlx-lm's models, so only itself gets these rows.
            fingerprint = fingerprint.with_salt("mlx-engine")
            empty, start = self._make_cache(), {"quantized_kv_start": 0}
            maybe_quantize_kv_cache(empty, **self._kv_cache_qtn_params | start)
            return ServedModel(fingerprint, (empty,))

        store, size = kvstore.Store(path, codec), self._history_capacity
        return DiskPromptCache(store, describe, max_size=size)

    def end(self: Any) -> None:
        if self.cache_wrapper is not None and not self.is_shutdown():
            # Nothing but the live cache has the last reply.
            self._executor.submit(self.cache_wrapper._flush_live_cache).result()
            self.cache_wrapper._history.close()
        shutdown(self)

    mlx_engine.generate.get_kv_cache_quantization_params = take_params
    ModelKit._full_model_init, ModelKit.shutdown = load_model, end
    CacheWrapper._make_cache, CacheWrapper._make_history = make, make_history


def install_batched(path: str | Path | None, codec: str | None) -> None:
    """Put a store in the place of the temporary file of the batched path."""
    load, shutdown = BatchedVisionModelKit._load_model, BatchedVisionModelKit.shutdown
    make_chunk = chunks._make_prefix_cache_chunk

    def keep_prompt(before: str, ids: Any, spans: Any, start: int, end: int) -> Any:
        chunk = make_chunk(before, ids, spans, start, end)
        chunk.prompt = ids, spans  # else there is nothing but its hash
        return chunk

    def load_model(self: Any) -> None:
        load(self)
        model = getattr(self.model, "language_model", self.model)
        coordinator = self._prompt_cache_coordinator
        if self._prompt_cache_store.can_store_records():  # the user has a disk cache
            coordinator.tier = kvstore.tier(
                model,
                model_path=self._model_path,
                make_cache=lambda: make_prompt_cache(model),
                path=path,
                codec=codec,
            )
            coordinator.__class__ = TieredCoordinator

    def end(self: Any) -> None:
        shutdown(self)
        if tier := getattr(self._prompt_cache_coordinator, "tier", None):
            tier.close()

    chunks._make_prefix_cache_chunk = keep_prompt
    BatchedVisionModelKit._load_model = load_model
    BatchedVisionModelKit.shutdown = end


class TieredCoordinator(coordinator.VlmPromptCacheCoordinator):
    """mlx-engine's newest prompt cache in memory, with a tier behind it."""

    tier: kvstore.Tier

    def _restore_best_prefix(self, *, prompt_input_ids: Any, image_spans: Any) -> Any:
        held = super()._restore_best_prefix(
            prompt_input_ids=prompt_input_ids, image_spans=image_spans
        )
        found, rest = self.tier.fetch(
            name_images(prompt_input_ids, image_spans),
            held=0 if held is None else held.cached_prefix_len,
            spans=[(span.start, span.end) for span in image_spans],
        )
        if found is None:
            return held
        num_found = len(prompt_input_ids) - len(rest)
        return coordinator.RestoredPromptCache(num_found, found, None)

    def save_prompt_cache_snapshot(
        self, prompt_cache: Any, prefix_chunks: Any, start: int, end: int, length: int
    ) -> None:
        """Keep what a prefill, or a reply, has come to."""
        ids, spans = prefix_chunks[end - 1].prompt
        self.tier.put(name_images(ids, spans)[:length], prompt_cache)

    def store_hot_prompt_cache(self, **given: Any) -> None:
        """Keep the end of a reply."""
        super().store_hot_prompt_cache(**given)
        tokens = name_images(given["prompt_input_ids"], given["image_spans"])
        self.tier.put(tokens, given["prompt_cache"])


def name_images(ids: Any, spans: Any) -> list[int]:
    """Return tokens that name the contents of images, not only their places."""
    tokens = list(ids)
    for span in spans:
        name = -1 - int(span.image_hash[:15], 16)
        tokens[span.start : span.end] = [name] * (span.end - span.start)
    return tokens
