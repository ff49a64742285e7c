"""A KV cache that keeps TurboQuant codes in memory instead of keys and values.

A drop-in for mlx-lm's ``KVCache``: whole blocks of 256 rows are coded, all but the
newest, and every step decodes all of them for attention. It trades time for memory:
what stays allocated is the codes, their norms, a mean of the keys for each block, the
first 4 tokens and the newest block, which are kept as they are.

Knows mlx-lm's cache interface; knows nothing of files or the store.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache, create_attention_mask

from turboquant.quantizer import dequantize_polar, quantize_polar
from turboquant.rotation import make_wh_rotation

NUM_SINKS = 4
BLOCK = 256
"""Rows that are coded together; those of a stored block, which then has them as is."""
_LARGEST_MEAN = 65504.0  # of float16
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


@dataclass(frozen=True)
class CodedRows:
    """Keys or values: codes of the first rows, and the last ones as they are.

    Codes end where a block does, or nothing follows them. So each block of rows is
    coded as a whole or not at all, whatever is taken back in between.
    """

    # Bits per coordinate, 1 to 8.
    bits: int
    # Whether each head's mean over a block is taken off its rows, as is done to keys.
    is_centred: bool
    # How many rows went through the codec; the first 4 of them are kept beside it.
    num_coded: int = 0
    # ``(B, H, 4, D)``; this and the next ones are ``None`` before the first block.
    sinks: Any = None
    # Packed codes of the coded rows behind the sinks, ``(B, H, N, D * bits / 8)``.
    codes: Any = None
    # ``(B, H, N)``, ``float32``.
    norms: Any = None
    # ``(B, H, blocks, D)``, ``float16``; of keys only.
    means: Any = None
    # Rows that are not coded, ``(B, H, T, D)``; ``None`` before the first row.
    tail: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """All that is allocated."""
        held = (self.sinks, self.codes, self.norms, self.means, self.tail)
        return [array for array in held if array is not None]

    def read(self) -> mx.array:
        """Return all rows, ``(B, H, T, D)``, decoded."""
        assert self.tail is not None
        if not self.num_coded:
            return self.tail
        means = None
        if self.means is not None:
            means = mx.repeat(self.means, BLOCK, axis=2)
            means = means[:, :, NUM_SINKS : self.num_coded]
        decoded = dequantize_polar(
            self.codes,
            self.norms,
            self.bits,
            make_wh_rotation(self.sinks.shape[-1]),
            dtype=self.sinks.dtype,
            mean=means,
        )
        return mx.concatenate([self.sinks, decoded, self.tail], axis=2)

    def append(self, rows: mx.array) -> CodedRows:
        """Return these rows and others behind them, ``(B, H, T, D)``."""
        if rows.shape[-1] % 8:
            raise ValueError(f"the last axis must be a multiple of 8: {rows.shape}")
        if self.tail is None:
            return replace(self, tail=rows[:, :, :0]).append(rows)
        # What follows a part of a coded block has no block of its own.
        missing = min(-self.num_coded % BLOCK, rows.shape[2])
        coded = self._code(rows[:, :, :missing]) if missing else self
        tail = mx.concatenate([self.tail, rows[:, :, missing:]], axis=2)
        return replace(coded, tail=tail)

    def settle(self, num_exact: int = 1) -> CodedRows:
        """Return the same with all whole blocks coded, but for the last rows."""
        if self.tail is None:
            return self
        whole = max(0, self.tail.shape[2] - num_exact) // BLOCK * BLOCK
        coded = self
        for i in range(0, whole, BLOCK):
            coded = coded._code(self.tail[:, :, i : i + BLOCK])
        return replace(coded, tail=_copied(self.tail, whole)) if whole else self

    def trim(self, num_rows: int) -> CodedRows:
        """Return the first rows."""
        if self.tail is None:
            return self
        if num_rows >= self.num_coded:
            return replace(self, tail=self.tail[:, :, : num_rows - self.num_coded])
        if num_rows <= NUM_SINKS:
            rows = self.sinks[:, :, :num_rows]
            return replace(CodedRows(self.bits, self.is_centred), tail=rows)
        means = self.means
        return replace(
            self,
            num_coded=num_rows,
            codes=self.codes[:, :, : num_rows - NUM_SINKS],
            norms=self.norms[:, :, : num_rows - NUM_SINKS],
            means=None if means is None else means[:, :, : -(-num_rows // BLOCK)],
            tail=self.tail[:, :, :0],
        )

    def append_codes(
        self,
        codes: mx.array,
        norms: mx.array,
        mean: mx.array | None = None,
        sinks: mx.array | None = None,
    ) -> CodedRows:
        """Return these rows and one block's codes behind them.

        Args:
            codes: ``(B, H, N, D * bits / 8)``; without the sinks.
            norms: ``(B, H, N)``.
            mean: Of keys, ``(B, H, 1, D)``.
            sinks: Of the first block, ``(B, H, 4, D)``.
        """
        known = self.tail if sinks is None else sinks
        assert known is not None
        num_rows = codes.shape[2] + (0 if sinks is None else NUM_SINKS)
        return replace(
            self,
            num_coded=self.num_coded + num_rows,
            sinks=self.sinks if sinks is None else sinks,
            codes=_joined(self.codes, codes),
            norms=_joined(self.norms, norms),
            means=self.means if mean is None else _joined(self.means, mean),
            tail=known[:, :, :0],
        )

    def _code(self, rows: mx.array) -> CodedRows:
        """Return these rows and others of one block, coded, and no tail."""
        sinks = None
        if not self.num_coded:
            sinks = _copied(rows, 0, NUM_SINKS)
        rest = rows if sinks is None else rows[:, :, NUM_SINKS:]
        mean, centred = None, rest
        if self.is_centred:
            is_new = self.num_coded % BLOCK == 0
            known = _mean(rest) if is_new else self.means[:, :, -1:]
            mean = known if is_new else None
            centred = rest.astype(mx.float32) - known.astype(mx.float32)
        rotation = make_wh_rotation(rows.shape[-1])
        coded = quantize_polar(centred, self.bits, rotation)
        return self.append_codes(*coded, mean, sinks)


def _mean(rows: mx.array) -> mx.array:
    """Return each head's mean, ``(B, H, 1, D)``; 0 where it is not finite."""
    mean = mx.mean(rows.astype(mx.float32), axis=2, keepdims=True)
    mean = mx.where(mx.isfinite(mean), mean, 0)
    return mx.clip(mean, -_LARGEST_MEAN, _LARGEST_MEAN).astype(mx.float16)


def _copied(rows: mx.array, begin: int, end: int | None = None) -> mx.array:
    # A view would keep all of the rows.
    return mx.take(rows, mx.arange(*slice(begin, end).indices(rows.shape[2])), axis=2)


def _joined(rows: mx.array | None, more: mx.array) -> mx.array:
    return more if rows is None else mx.concatenate([rows, more], axis=2)


class TurboQuantKVCache:
    """mlx-lm's ``KVCache`` with codes in the place of keys and values.

    It has no attribute ``bits``: mlx-lm's attention takes caches that have one for
    affine-quantized.

    Args:
        key_bits: Bits per coordinate of keys, 1 to 8.
        value_bits: The same of values; as ``key_bits`` by default.

    Attributes:
        offset: Rows held.
        coded_keys: The keys.
        coded_values: The values.

    References:
        TurboQuant, arXiv:2504.19874.
    """

    def __init__(self, key_bits: int = 4, value_bits: int | None = None) -> None:
        value_bits = key_bits if value_bits is None else value_bits
        self.offset = 0
        self.coded_keys = CodedRows(key_bits, is_centred=True)
        self.coded_values = CodedRows(value_bits, is_centred=False)

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
            coded._settle()
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
            "coded_tokens": self.coded_keys.num_coded,
            "coded_bits": min(*bits, marks.get("coded_bits", 8)),
        }
        return cache

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Append rows and return all rows, those that were coded before decoded.

        Args:
            keys: Shape ``(B, H, T, D)``, any float dtype.
            values: The same, with a ``D`` of their own.

        Returns:
            Keys and values, ``(B, H, offset, D)``, in the dtype they came in.

        Raises:
            ValueError: ``D`` is no multiple of 8.
        """
        self._append(keys, values)
        # What is coded now is read as it came once more: attention needs it anyway.
        found = self.keys_and_values()
        self._settle()
        return found

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return all rows, decoded, ``(B, H, offset, D)``."""
        return self.coded_keys.read(), self.coded_values.read()

    @property
    def state(self) -> tuple[Any, ...]:
        """All that the cache is: arrays, bits and counts."""
        sides = (self.coded_keys, self.coded_values)
        return (*(tuple(vars(side).values()) for side in sides), self.offset)

    @state.setter
    def state(self, value: tuple[Any, ...]) -> None:
        keys, values, self.offset = value
        self.coded_keys, self.coded_values = CodedRows(*keys), CodedRows(*values)

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
        return self.coded_keys.tail is None

    def is_trimmable(self) -> bool:
        """Say that rows can be taken back."""
        return True

    def trim(self, n: int) -> int:
        """Take back the last ``n`` rows and return how many that were."""
        n = min(self.offset, n)
        self.offset -= n
        self.coded_keys = self.coded_keys.trim(self.offset)
        self.coded_values = self.coded_values.trim(self.offset)
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
        held = (*self.coded_keys.arrays, *self.coded_values.arrays)
        return sum(array.nbytes for array in held)

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> TurboQuantKVCache:
        """Return this cache: what is in codes is not coded a second time."""
        return self

    @classmethod
    def merge(cls, caches: Sequence[TurboQuantKVCache | KVCache]) -> DecodedBatch:
        """Return a batch of the decoded rows, which is not coded any more.

        Args:
            caches: Of codes, or some as they are.
        """
        decoded = [c if isinstance(c, KVCache) else c.to_kv_cache() for c in caches]
        bits = (vars(cache).get("coded_bits", 8) for cache in decoded)
        merged = BatchKVCache.merge(decoded)
        return DecodedBatch(merged, min(bits))

    def _append(self, keys: mx.array, values: mx.array) -> None:
        self.coded_keys = self.coded_keys.append(keys)
        self.coded_values = self.coded_values.append(values)
        self.offset += keys.shape[2]

    def _settle(self) -> None:
        self.coded_keys = self.coded_keys.settle()
        self.coded_values = self.coded_values.settle()


class DecodedBatch:
    """A batch of decoded rows; what is taken out of it says that they are.

    It has a ``BatchKVCache``, and all of its methods, but no ``keys``: a batch of
    mlx-lm's own would be extended by them, and would say nothing of it.

    Args:
        batch: The rows.
        coded_bits: The fewest bits per number that a row of it was coded in.
    """

    def __init__(self, batch: BatchKVCache, coded_bits: int) -> None:
        self._batch, self.coded_bits = batch, coded_bits

    def __getattr__(self, name: str) -> Any:
        if name in ("_batch", "keys", "values"):
            raise AttributeError(
                f"a batch of codes has no `{name}`: give all requests of a batch caches"
                " of codes, or none"
            )
        return getattr(self._batch, name)

    def __copy__(self) -> DecodedBatch:
        return DecodedBatch(copy.copy(self._batch), self.coded_bits)

    @property
    def state(self) -> Any:
        """That of the batch."""
        return self._batch.state

    @state.setter
    def state(self, value: Any) -> None:
        self._batch.state = value

    def extend(self, other: DecodedBatch | BatchKVCache) -> None:
        """Add another batch, decoded or not."""
        self._batch.extend(getattr(other, "_batch", other))
        self.coded_bits = min(self.coded_bits, getattr(other, "coded_bits", 8))

    def extract(self, idx: int) -> KVCache:
        """Return one sequence, marked as :meth:`TurboQuantKVCache.to_kv_cache` does."""
        cache: KVCache = self._batch.extract(idx)
        marks = {"coded_tokens": cache.offset, "coded_bits": self.coded_bits}
        cache.__dict__ |= marks
        return cache


def _marks(cache: Any) -> dict[str, Any]:
    """Return what others have noted on a cache, which is true of its codes too."""
    own = vars(type(cache)())
    return {name: mark for name, mark in vars(cache).items() if name not in own}
