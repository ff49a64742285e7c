"""A KV cache that keeps TurboQuant codes in memory instead of keys and values.

A drop-in for mlx-lm's ``KVCache``: rows are coded as they come, and every step decodes
all of them for attention. It trades time for memory: what stays allocated is the codes,
their norms and the first 4 tokens, which are kept as they are.

Knows mlx-lm's cache interface; knows nothing of files or the store.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache, create_attention_mask

from turboquant.quantizer import dequantize_polar, quantize_polar
from turboquant.rotation import Rotation, make_wh_rotation

NUM_SINKS = 4
_MODE = re.compile(r"turbo([1-8])(?:v([1-8]))?")


def parse_kv_bits(mode: str) -> tuple[int, int]:
    """Return the bits of keys and of values that a mode names.

    Args:
        mode: ``turbo3``, or ``turbo5v3`` for 5-bit keys and 3-bit values.

    Raises:
        ValueError: It names none.
    """
    match = _MODE.fullmatch(mode)
    if match is None:
        raise ValueError(f"not a mode like `turbo3` or `turbo5v3`: {mode!r}")
    keys, values = match.groups()
    return int(keys), int(values or keys)


def quantize_prompt_cache(prompt_cache: Sequence[Any], mode: str) -> list[Any]:
    """Return a prompt cache whose ``KVCache`` layers hold codes instead.

    Args:
        prompt_cache: mlx-lm's caches, one per layer; left as they are.
        mode: ``turbo3``, for example.

    Returns:
        New caches for layers of class ``KVCache``, and the same objects for others.

    Raises:
        ValueError: ``mode`` names no width, or a head dimension is not divisible by 8.
    """
    key_bits, value_bits = parse_kv_bits(mode)
    coded = [
        TurboQuantKVCache.from_kv_cache(cache, key_bits, value_bits)
        if type(cache) is KVCache
        else cache
        for cache in prompt_cache
    ]
    # Whoever cancels here still has the caches that went in, whole.
    mx.eval([cache.state for cache in coded if not cache.empty()])
    return coded


class CodedRows:
    """Keys or values as codes, in a buffer that grows by whole steps.

    Args:
        bits: Bits per coordinate, 1 to 8.

    Attributes:
        sinks: The first 4 rows as they are, ``(B, H, 4, D)``, or fewer; ``None``
            before the first row.
        codes: Packed codes of the rows behind them, ``(B, H, capacity, D*bits/8)``.
        norms: Their norms, ``(B, H, capacity)``, ``float32``.
    """

    step = 256

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.sinks: mx.array | None = None
        self.codes: mx.array | None = None
        self.norms: mx.array | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all that is allocated."""
        held = (self.sinks, self.codes, self.norms)
        return sum(array.nbytes for array in held if array is not None)

    def write(self, rows: mx.array, offset: int) -> None:
        """Put rows of shape ``(B, H, T, D)`` behind the first ``offset``."""
        missing = max(0, min(NUM_SINKS - offset, rows.shape[2]))
        if missing:
            kept = [] if self.sinks is None else [self.sinks[:, :, :offset]]
            self.sinks = mx.concatenate([*kept, rows[:, :, :missing]], axis=2)
        rest = rows[:, :, missing:]
        if rest.shape[2]:
            self._write_codes(rest, max(0, offset - NUM_SINKS))

    def read(self, offset: int) -> mx.array:
        """Return the first ``offset`` rows, ``(B, H, offset, D)``, decoded."""
        assert self.sinks is not None
        sinks = self.sinks[:, :, :offset]
        num_coded = offset - NUM_SINKS
        if num_coded <= 0 or self.codes is None or self.norms is None:
            return sinks
        rows = dequantize_polar(
            self.codes[:, :, :num_coded],
            self.norms[:, :, :num_coded],
            self.bits,
            self._rotation(sinks.shape[-1]),
            dtype=sinks.dtype,
        )
        return mx.concatenate([sinks, rows], axis=2)

    def _write_codes(self, rows: mx.array, start: int) -> None:
        codes, norms = quantize_polar(rows, self.bits, self._rotation(rows.shape[-1]))
        stop = start + rows.shape[2]
        self.codes = _grown(self.codes, codes, start, stop, self.step)
        self.norms = _grown(self.norms, norms, start, stop, self.step)
        self.codes[:, :, start:stop] = codes
        self.norms[:, :, start:stop] = norms

    def _rotation(self, dim: int) -> Rotation:
        return make_wh_rotation(dim)


def _grown(
    buffer: mx.array | None, rows: mx.array, start: int, stop: int, step: int
) -> mx.array:
    """Return a buffer with room up to ``stop``, holding the first ``start`` rows."""
    if buffer is not None and stop <= buffer.shape[2]:
        return buffer
    capacity = (stop + step - 1) // step * step
    shape = (*rows.shape[:2], capacity - start, *rows.shape[3:])
    room = mx.zeros(shape, rows.dtype)
    return room if buffer is None else mx.concatenate([buffer[:, :, :start], room], 2)


class TurboQuantKVCache:
    """mlx-lm's ``KVCache`` with codes in the place of keys and values.

    It has no attribute ``bits``: mlx-lm's attention takes caches that have one for
    affine-quantized.

    Args:
        key_bits: Bits per coordinate of keys, 1 to 8.
        value_bits: The same of values; as ``key_bits`` by default.

    Attributes:
        offset: Rows held.

    References:
        TurboQuant, arXiv:2504.19874.
    """

    def __init__(self, key_bits: int = 4, value_bits: int | None = None) -> None:
        self.offset = 0
        self.coded_keys = CodedRows(key_bits)
        self.coded_values = CodedRows(key_bits if value_bits is None else value_bits)

    @classmethod
    def from_kv_cache(
        cls, cache: KVCache, key_bits: int, value_bits: int | None = None
    ) -> TurboQuantKVCache:
        """Return a cache with the codes of another cache's rows, and its marks."""
        coded = cls(key_bits, value_bits)
        if not cache.empty() and cache.offset:
            # mlx-lm 0.31 has no `keys_and_values`; a slice past the end is the end.
            sides: Any = (cache.keys, cache.values)
            coded._append(*(side[:, :, : cache.offset] for side in sides))
        coded.__dict__ |= _marks(cache)
        return coded

    def to_kv_cache(self) -> KVCache:
        """Return a ``KVCache`` with the decoded rows.

        Its attribute ``coded_tokens`` says how many rows went through the codec, and
        ``coded_bits`` the fewest bits per number of their codes.
        """
        cache = KVCache()
        if self.offset:
            cache.update_and_fetch(*self.keys_and_values())
        marks = _marks(self)
        bits = (self.coded_keys.bits, self.coded_values.bits)
        cache.__dict__ |= marks | {  # mlx-lm's has no such attributes
            "coded_tokens": self.offset,
            "coded_bits": min(*bits, marks.get("coded_bits", 8)),
        }
        return cache

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Append rows and return all rows, decoded.

        Args:
            keys: Shape ``(B, H, T, D)``, any float dtype.
            values: The same, with a ``D`` of their own.

        Returns:
            Keys and values, ``(B, H, offset, D)``, in the dtype they came in.
        """
        self._append(keys, values)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return all rows, decoded, ``(B, H, offset, D)``."""
        return self.coded_keys.read(self.offset), self.coded_values.read(self.offset)

    @property
    def state(self) -> tuple[Any, ...]:
        """All that the cache is: arrays, offset and bits."""
        sides = (self.coded_keys, self.coded_values)
        arrays = [(side.sinks, side.codes, side.norms, side.bits) for side in sides]
        return (*arrays, self.offset)

    @state.setter
    def state(self, value: tuple[Any, ...]) -> None:
        *sides, self.offset = value
        self.coded_keys, self.coded_values = (_from_state(side) for side in sides)

    @classmethod
    def from_state(cls, state: tuple[Any, ...]) -> TurboQuantKVCache:
        """Return a cache with this state."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    def size(self) -> int:
        """Return how many rows there are."""
        return self.offset

    def empty(self) -> bool:
        """Whether there never was a row."""
        return self.coded_keys.sinks is None

    def is_trimmable(self) -> bool:
        """Say that rows can be taken back."""
        return True

    def trim(self, n: int) -> int:
        """Take back the last ``n`` rows and return how many that were."""
        n = min(self.offset, n)
        self.offset -= n
        return n

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Return the attention mask for ``n`` more rows, as ``KVCache`` does."""
        mask: mx.array | str | None = create_attention_mask(
            n, self.offset, return_array, window_size
        )
        return mask

    @property
    def nbytes(self) -> int:
        """Bytes of all that is allocated."""
        return self.coded_keys.nbytes + self.coded_values.nbytes

    @classmethod
    def merge(cls, caches: Sequence[TurboQuantKVCache]) -> BatchKVCache:
        """Return a batch of the decoded rows, which is not coded any more."""
        decoded = [cache.to_kv_cache() for cache in caches]
        batch = DecodedBatch([0])
        batch.__dict__ |= vars(BatchKVCache.merge(decoded))
        batch.coded_bits = min(vars(cache)["coded_bits"] for cache in decoded)
        return batch

    def _append(self, keys: mx.array, values: mx.array) -> None:
        self.coded_keys.write(keys, self.offset)
        self.coded_values.write(values, self.offset)
        self.offset += keys.shape[2]


class DecodedBatch(BatchKVCache):
    """A batch of decoded rows; what is taken out of it says that they are.

    Attributes:
        coded_bits: The fewest bits per number that a row of it was coded in.
    """

    coded_bits = 8

    def extend(self, other: BatchKVCache) -> None:
        """Add another batch, decoded or not."""
        super().extend(other)  # type: ignore[no-untyped-call]
        self.coded_bits = min(self.coded_bits, getattr(other, "coded_bits", 8))

    def extract(self, idx: int) -> KVCache:
        """Return one sequence, marked as :meth:`TurboQuantKVCache.to_kv_cache` does."""
        cache: KVCache = super().extract(idx)  # type: ignore[no-untyped-call]
        marks = {"coded_tokens": cache.offset, "coded_bits": self.coded_bits}
        cache.__dict__ |= marks
        return cache


def _marks(cache: Any) -> dict[str, Any]:
    """Return what others have noted on a cache, which is true of its codes too."""
    own = vars(type(cache)())
    return {name: mark for name, mark in vars(cache).items() if name not in own}


def _from_state(state: tuple[Any, ...]) -> CodedRows:
    sinks, codes, norms, bits = state
    rows = CodedRows(bits)
    rows.sinks, rows.codes, rows.norms = sinks, codes, norms
    return rows
