"""Blocks of `fit` on their way through a GPU: sent as integers, decoded there."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import mlx.core as mx
import numpy as np

from turboquant.kernels import gpu
from turboquant.kernels.cuda import ALIGNMENT

from ..codecs.base import Array, Parts, Rows
from ..codecs.fit import NUM_SINKS, Fit
from ..codecs.fit_device import FitOnDevice
from ..codecs.floats import Floats

# Bytes that a kernel moves as one row.
_ROW_BYTES = 4096
# Blocks that are decoded together. What a layer of one takes meanwhile is some eight
# times its rows, in numbers of 32 bits.
_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class _FittedBlock:
    """A block of `fit` that was sent to a GPU."""

    # The number of its first coded row in the buffers.
    begin: int
    # Where its streams are on the device.
    place: int
    # Rows that are kept as they are, and which they are.
    parts: Parts
    # Cosine and sine of its positions.
    turns: list[tuple[Floats, Floats]]


class FittedBlocks:
    """Blocks of `fit`, which MLX's products on a GPU decode.

    Args:
        upload: Sends bytes to where the kernels read them.
    """

    def __init__(self, upload: gpu.Upload) -> None:
        self._upload = upload
        self._lock = threading.Lock()
        # Where those of the layers of a basis are.
        self._matrices: dict[tuple[str, tuple[int, ...]], int] = {}
        # By what is alike: how they are decoded, where the matrices are, and they.
        self._found: dict[Any, tuple[FitOnDevice, int, list[_FittedBlock]]] = {}

    def send(
        self, fit: Fit, parts: Parts, rows: Rows, where: int
    ) -> list[tuple[int, int]]:
        """Send a block, from any thread.

        Args:
            fit: Its codec.
            parts: The block, which the caller may overwrite then.
            rows: What they are of.
            where: The number of its first row in the buffers.

        Returns:
            How many sinks it has, and where they were sent: of the keys, and of the
            values; nothing where it has none.
        """
        alike = fit.name, rows.layers, rows.shape, rows.start < NUM_SINKS
        with self._lock:
            if alike not in self._found:
                decoding = FitOnDevice(fit, rows, ALIGNMENT)
                basis = fit.digest, rows.layers
                if basis not in self._matrices:
                    self._matrices[basis] = self._send(decoding.matrices())
                self._found[alike] = decoding, self._matrices[basis], []
        decoding, _, blocks = self._found[alike]
        streams = [parts[name] for name in decoding.names()]
        place = self._send(streams)
        kept = {name: np.array(parts[name]) for name in ("exponents", "exact")}
        sinks = decoding.num_sinks
        turns = decoding.turns(rows.start + sinks)
        blocks.append(_FittedBlock(where + sinks, place, kept, turns))
        if not sinks:
            return []
        halves = np.split(parts["sinks"], 2, axis=1)
        sent = self._upload.send([np.ascontiguousarray(half) for half in halves])
        return [(sinks, at) for at in sent]

    def _send(self, parts: Sequence[Array]) -> int:
        """Send arrays one behind the other, and as many bytes as a kernel may read."""
        return self._upload.send([*parts, np.zeros(_ROW_BYTES, np.uint8)])[0]

    def restore(
        self, data: mx.array, arrays: Sequence[dict[str, mx.array]], num_tokens: int
    ) -> None:
        """Write the rows of all blocks before token ``num_tokens`` into buffers."""
        for decoding, at, blocks in self._found.values():
            size, layers = decoding.num_coded, decoding.rows.layers
            shape = len(layers), *decoding.matrices()[0].shape
            matrices = _fetched(data, [at], math.prod(shape) * 4)
            matrices = matrices[0, : math.prod(shape) * 4]
            matrices = matrices.view(mx.float32).reshape(shape)
            found = sorted(blocks, key=lambda block: block.begin)
            found = [block for block in found if block.begin + size <= num_tokens]
            numbered = enumerate(found)
            for _, several in groupby(numbered, partial(_run_of, size=size)):
                run = [block for _, block in several]
                self._restore(
                    decoding, matrices, run, data, [arrays[n] for n in layers]
                )

    def _restore(
        self,
        decoding: FitOnDevice,
        matrices: mx.array,
        run: Sequence[_FittedBlock],
        data: mx.array,
        arrays: Sequence[dict[str, mx.array]],
    ) -> None:
        """Write the rows of blocks that lie one behind the other."""
        streams = _fetched(data, [block.place for block in run], decoding.nbytes)
        exponents = [block.parts["exponents"] for block in run]
        joined = mx.array(np.concatenate(exponents, axis=-1))
        ways = zip(*(block.turns for block in run), strict=True)
        turns = [
            (
                mx.array(np.concatenate(cos, axis=1)),
                mx.array(np.concatenate(sin, axis=1)),
            )
            for cos, sin in (zip(*way, strict=True) for way in ways)
        ]
        begin = run[0].begin
        for number, held in enumerate(arrays):
            rows = decoding.decode(number, streams, matrices[number], joined, turns)
            exact = decoding.exact(number, [block.parts for block in run])
            for side, (name, decoded) in enumerate(zip("kv", rows, strict=True)):
                buffer = held[name]
                buffer[:, :, begin : begin + decoded.shape[2]] = decoded
                if exact is not None:
                    heads, tokens, kept = exact
                    whole = mx.array(np.ascontiguousarray(kept[:, side]))
                    where = mx.array(heads), mx.array(tokens + begin)
                    buffer[0, where[0], where[1]] = whole.view(decoded.dtype)
            mx.async_eval(held["k"], held["v"])


def _run_of(item: tuple[int, _FittedBlock], size: int) -> tuple[int, int]:
    """Return what is equal for blocks that are decoded together."""
    number, block = item
    return block.begin - number * size, number // _AT_ONCE


def _fetched(data: mx.array, places: Sequence[int], nbytes: int) -> mx.array:
    """Return bytes that were sent, so many from each place on or a few more.

    The kernel that restores rows takes them for rows of half floats.
    """
    rows = -(-nbytes // _ROW_BYTES)
    table = [
        gpu.segment(-1, (1, 1, rows), -number * rows, [place])
        for number, place in enumerate(places)
    ]
    which = np.repeat(np.arange(len(places), dtype=np.int32), rows)
    found = gpu.restore(
        data,
        mx.array(which),
        mx.array(np.array(table, np.int64)),
        None,
        layer=0,
        shape=(1, 1, len(which), _ROW_BYTES // 2),
        dtype=mx.float16,
    )
    return found.view(mx.uint8).reshape(len(places), rows * _ROW_BYTES)
