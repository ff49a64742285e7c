"""Rows of a prompt that is still being computed, handed over step by step.

So whatever ends a long prefill, a SIGKILL included, costs its last steps only, and at
the end there is little left to copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import mlx.core as mx

from ..caches.live import is_cuttable

KEEP_EVERY = 2048
"""Tokens computed, at least, from one handing over to the next."""
KeepRows = Callable[[list[int], list[Any]], None]
"""Called with tokens and a prompt cache that has at least their rows."""


class Steps:
    """Knows when rows are handed over again.

    Args:
        num_held: Tokens that were not computed.
        has_rows_only: Whether rows of every position can be cut from the cache. A state
            takes as much as thousands of rows: then steps grow with the prompt.
    """

    def __init__(self, num_held: int, *, has_rows_only: bool) -> None:
        self._num_kept = num_held
        self._has_rows_only = has_rows_only

    def is_due(self, num_rows: int) -> bool:
        """Whether so many rows are worth it; if so, they count as handed over."""
        every = KEEP_EVERY if self._has_rows_only else max(KEEP_EVERY, num_rows // 8)
        if num_rows < self._num_kept + every:
            return False
        self._num_kept = num_rows
        return True

    def note(self, num_rows: int) -> None:
        """Note that somebody else has handed over so many rows."""
        self._num_kept = num_rows


def view(prompt_cache: list[Any], number: int) -> list[Any]:
    """Return one prompt's caches out of those of a batch.

    Plain rows are not copied, so let go of them before the batch goes on.
    """
    return [_view(cache, number) for cache in prompt_cache]


def _view(cache: Any, number: int) -> Any:
    from mlx_lm.models.cache import BatchKVCache, KVCache

    if type(cache) is not BatchKVCache:
        return cache.extract(number)
    batch: Any = cache  # whose types say that it may be empty
    mx.eval(batch.left_padding)
    first, stop = batch.left_padding.tolist()[number], batch._idx
    found = KVCache()
    found.keys = batch.keys[number : number + 1, :, first:stop]
    found.values = batch.values[number : number + 1, :, first:stop]
    found.offset = stop - first
    return found


def stream_alone(
    stream_generate: Callable[..., Iterator[Any]],
    tokens: list[int],
    keep: KeepRows,
    is_stopped: Callable[[], bool],
    **options: Any,
) -> Iterator[Any]:
    """Yield the responses of mlx-lm's ``stream_generate``, and keep what it computes.

    Args:
        stream_generate: mlx-lm's.
        tokens: The whole prompt, of which ``options["prompt"]`` is the end.
        keep: Called while the prompt is computed.
        is_stopped: Asked between steps and tokens; if so, the responses end.
        options: What mlx-lm's server calls it with.
    """
    from ..models.session import Stopped

    rest, prompt_cache = options["prompt"], options["prompt_cache"]
    num_held = len(tokens) - len(rest)
    progress = options.pop("prompt_progress_callback")
    steps = Steps(num_held, has_rows_only=is_cuttable(prompt_cache))

    def note(done: int, total: int) -> None:
        progress(done, total)
        # At the end of all, the cache may be a token ahead already.
        if 0 < done < total and (done == total - 1 or steps.is_due(num_held + done)):
            keep(tokens[: num_held + done], prompt_cache)
        if done < total and is_stopped():
            raise Stopped

    try:
        if options.get("draft_model") is not None:
            options["prompt"] = _feed_both(rest, note, options)
        for response in stream_generate(**options, prompt_progress_callback=note):
            yield response
            if is_stopped():
                return
    except Stopped:
        return


def _feed_both(
    rest: list[int], note: Callable[[int, int], None], options: dict[str, Any]
) -> list[int]:
    """Compute a prompt with model and draft model, and return its last token.

    With the steps of mlx-lm, which would tell nobody how far it is, and feed one model
    after the other: until the end no token would have rows of both.
    """
    from mlx_lm.generate import maybe_quantize_kv_cache

    model, draft, step = (
        options[name] for name in ("model", "draft_model", "prefill_step_size")
    )
    both, cut = options["prompt_cache"], len(model.layers)
    stream = options.get("stream")
    quantize = partial(
        maybe_quantize_kv_cache,
        quantized_kv_start=options.get("quantized_kv_start"),
        kv_group_size=options.get("kv_group_size"),
        kv_bits=options.get("kv_bits"),
    )
    note(0, len(rest))
    for start in range(0, len(rest) - 1, step):
        some = mx.array(rest[start : min(start + step, len(rest) - 1)], mx.uint32)
        with nullcontext() if stream is None else mx.stream(stream):
            for one, layers in ((draft, slice(cut, None)), (model, slice(cut))):
                part = both[layers]
                one(some[None], cache=part)
                quantize(part)
                both[layers] = part  # or rows that follow would be in codes only
                mx.eval([cache.state for cache in part])
        mx.clear_cache()
        note(start + some.size, len(rest))
    return rest[-1:]
