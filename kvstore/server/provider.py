"""The model that a server has loaded: what it is, and the caches it makes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import CacheList, make_prompt_cache
from mlx_lm.server import ModelProvider

from ..caches.fit import expect_rows, feed, shapes_of
from ..caches.layout import Shapes
from ..caches.live import is_cuttable, quantize
from ..caches.reanchor import Reanchoring
from ..errors import KVStoreError
from ..fingerprint import Fingerprint
from ..models.context import read_context_length
from ..models.fits import refused, why_not
from ..models.load import find_model, fingerprint_model
from ..models.titles import title_maker
from .disk import ServedModel

if TYPE_CHECKING:
    from .receipts import Receipts

log = logging.getLogger("kvstore")
# Architectures whose layers are a `CacheList` and that a test serves in batches: the
# tokens, the rows and the states are those of serving alone.
_LISTS_BATCHED_RIGHT = {
    "baichuan_m1",
    "deepseek_v32",
    "falcon_h1",
    "glm_moe_dsa",
    "longcat_flash",
    "longcat_flash_ngram",
}


class Provider(ModelProvider):
    """mlx-lm's ``ModelProvider``, which also knows what it has loaded.

    Args:
        cli_args: As mlx-lm's.
        give_up: Called before the model goes.
        reanchor: How far re-anchored rows may move what a model says, as a KL
            divergence; infinity for any, ``None`` to re-anchor nothing.
        note_kl: Called with each one that was measured.
    """

    loaded: Fingerprint | Exception | None = None
    model_key: Any
    context_length: int | None = None
    near: Reanchoring | None = None
    receipts: Receipts | None = None
    find_shapes: Callable[[], list[Shapes]]
    make_title: Callable[[Sequence[int]], str]

    def __init__(
        self,
        cli_args: Any,
        give_up: Callable[[], None],
        *,
        reanchor: float | None = None,
        note_kl: Callable[[float], None] = lambda kl: None,
    ) -> None:
        self._give_up, self._reanchor, self._note_kl = give_up, reanchor, note_kl
        # Models that re-anchoring does not suit, for as long as the server runs.
        self._stopped: set[Fingerprint | Exception | None] = set()
        super().__init__(cli_args)

    def reset(self) -> None:
        """Let the model go."""
        # mlx-lm calls this when it ends, and rows are kept by the model's key.
        self._give_up()
        self.near = self.receipts = None
        super().reset()

    def _load(
        self,
        model_path: str,
        adapter_path: str | None = None,
        draft_model_path: str | None = None,
    ) -> None:
        # What is hashed is what is loaded: a repository may move on in between.
        model = str(find_model(model_path))
        draft = draft_model_path and str(find_model(draft_model_path))
        try:
            found = fingerprint_model(model, adapter_path, draft)
            self.loaded = replace(found, label=model_path)
        except (KVStoreError, OSError) as error:
            self.loaded = error  # served without the store
        super()._load(  # type: ignore[no-untyped-call]
            model, adapter_path, draft
        )
        self.context_length = read_context_length(Path(model))
        self.make_title = title_maker(self.tokenizer)
        self._check_codes()
        self.find_shapes = cache(partial(_find_shapes, self.model, self.draft_model))
        if not _is_batched_right(self.model):
            self.is_batchable = False
        self._measure()
        # By which it is asked for again.
        self.model_key = (model_path, adapter_path, draft_model_path)

    def describe(self, key: Any) -> ServedModel:
        """Return what a key of the server's stands for, while that is loaded."""
        if isinstance(self.loaded, Exception):
            raise self.loaded
        if key != self.model_key or self.loaded is None:
            raise KVStoreError("another model was loaded meanwhile")
        # mlx-lm turns rows into codes without the mark that says what they were.
        has_codes = getattr(self.cli_args, "kv_bits", None) is not None
        is_plain = self.draft_model is None and not has_codes
        near = self.near if is_plain else None
        receipts = self.receipts if near else None
        kinds, title = self._empty_caches(), self.make_title
        return ServedModel(self.loaded, kinds, title, near, receipts)

    def _measure(self) -> None:
        """See whether rows can be re-anchored; why they cannot be is logged."""
        self.near, self.receipts, most = None, None, self._reanchor
        if most is None or self.loaded in self._stopped:
            return
        try:
            near = Reanchoring(self.model)
            if most < math.inf:
                if not is_cuttable(near.make_cache()):
                    raise KVStoreError(
                        "what it costs cannot be measured: the model has windows"
                    )
                from .receipts import Receipts

                self.receipts = Receipts(
                    self.model, most, self._note_kl, self._stop_reanchoring
                )
            self.near = near
        except KVStoreError as error:
            log.warning("kvstore: nothing is re-anchored: %s", error)

    def _stop_reanchoring(self) -> None:
        self._stopped.add(self.loaded)
        self.near = self.receipts = None

    def _check_codes(self) -> None:
        """Refuse, before any prompt, codes that the model cannot run with."""
        bits = getattr(self.cli_args, "kv_bits", None)
        if bits is None:
            return

        def coded(empty: list[Any]) -> list[Any]:
            maybe_quantize_kv_cache(empty, 0, self.cli_args.kv_group_size, bits)
            return empty

        models = [self.model, self.draft_model or self.model]
        why = next(filter(None, (why_not(m, coded) for m in models)), None)
        if why is not None:
            self.reset()  # or it would be taken for loaded
            raise refused(bits, why, "leave it out")

    def _empty_caches(self) -> tuple[list[Any], ...]:
        models = [m for m in (self.model, self.draft_model) if m is not None]
        made = [make_prompt_cache(model) for model in models]
        kinds = [[cache for caches in made for cache in caches]]
        bits = getattr(self.cli_args, "kv_bits", None)
        if bits is not None:
            kinds.append(quantize(kinds[0], bits, self.cli_args.kv_group_size))
        for empty in kinds:
            expect_rows(empty, self.find_shapes)
        return tuple(kinds)


def _is_batched_right(model: Any) -> bool:
    """Whether mlx-lm computes the same tokens and rows in a batch as alone.

    Of the models with a ``CacheList``, it does not for minimax_m3_vl. One that was not
    measured is served alone.
    """
    if not any(isinstance(cache, CacheList) for cache in make_prompt_cache(model)):
        return True
    return type(model).__module__.rpartition(".")[2] in _LISTS_BATCHED_RIGHT


def _find_shapes(*models: Any) -> list[Shapes]:
    """Return what these models fill their caches with."""
    found = []
    for model in [model for model in models if model is not None]:
        made = make_prompt_cache(model)
        feed(model, made)
        found += shapes_of(made)
    return found
