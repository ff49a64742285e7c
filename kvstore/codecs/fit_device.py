"""`fit` on a GPU: small integers are unpacked, multiplied and turned where rows go.

The host decompresses and checks. What it sends are the bytes of the streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .base import Array, Rows
from .dtypes import MLX_DTYPES
from .fit import MAX_EXPONENT, NUM_SINKS, Fit
from .fitted import FittedLayers
from .floats import Bools, Floats
from .rotary import angles, rotate_on_device
from .streams import FIRST_CODED, Stream

# Stands where a row has no exponent, being kept as it is.
_EXACT = 255


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the coefficients of a stream lie among the bytes of a block."""

    stream: Stream
    # Which of ``(L, G, N)`` they are.
    holds: Bools
    # Where its bytes begin, and those with its low bits.
    packed: int
    low: int


class FitOnDevice:
    """Decodes blocks of one codec that are alike, on MLX's device.

    Args:
        fit: The codec.
        rows: What the rows of one block are, all keys and values.
        alignment: Bytes at whose multiples each part begins that is sent.
    """

    def __init__(self, fit: Fit, rows: Rows, alignment: int) -> None:
        self.rows = rows
        covering = fit.fitted.covering(rows)
        assert covering is not None  # since `is_known`
        self._layers: FittedLayers = covering
        self._which = covering.indices(rows.layers)
        self._dtype = MLX_DTYPES[rows.dtype]
        self.num_sinks = max(0, min(NUM_SINKS - rows.start, rows.shape[2]))
        self.num_coded = rows.shape[2] - self.num_sinks
        step = fit.fitted.steps[fit.rate]
        self._layout = fit.kept.layout(covering, rows, step)
        self._places, self.nbytes = self._lay_out(alignment)

    def names(self) -> list[str]:
        """Return the parts that are sent, in this order."""
        found = []
        for place in self._places:
            found.append(f"c{place.stream.first}")
            found += [f"b{place.stream.first}"] if place.stream.low_bits else []
        return found

    def matrices(self) -> list[Floats]:
        """Return what takes coefficients to rows: of each layer, ``(G, N, N)``."""
        return [self._layers.matrix[which] for which in self._which]

    def turns(self, start: int) -> list[tuple[Floats, Floats]]:
        """Return cosine and sine of a block's positions, for each way to turn keys.

        Args:
            start: Position of the first row that is coded.
        """
        ways, _ = self._ways()
        return [angles(way[None], start, self.num_coded) for way in ways]

    def decode(
        self,
        layer: int,
        data: mx.array,
        matrix: mx.array,
        exponents: mx.array,
        turns: Sequence[tuple[mx.array, mx.array]],
    ) -> tuple[mx.array, mx.array]:
        """Return one layer's keys and values of some blocks, not evaluated.

        Args:
            layer: Which of the layers.
            data: The bytes that were sent, ``(B, nbytes)`` or more of each.
            matrix: That layer of :meth:`matrices`.
            exponents: Of all layers, ``(L, G, B * T)``.
            turns: What :meth:`turns` returns for all blocks, ``(1, B * T, pairs)``.

        Returns:
            Both ``(1, H, B * T, D)``. Rows that are kept as they are have any numbers.
        """
        group, which = self._layers.group, self._which[layer]
        q = self._coefficients(layer, data)
        wide = q @ matrix.swapaxes(-1, -2)
        halves = mx.minimum(exponents[layer], 2 * MAX_EXPONENT).astype(mx.float32)
        scales = mx.power(2.0, (halves - MAX_EXPONENT) / 2) * float(self._layout.step)
        wide = wide * scales[..., None]
        wide = wide + mx.array(self._layers.mean[which])[:, None]
        shape = (group.num_parts, -1, 2, group.num_joined, group.head_dim)
        x = wide.reshape(shape).transpose(2, 0, 3, 1, 4)
        x = x.reshape(2, group.num_heads, -1, group.head_dim)
        keys, values = x[:1], x[1:]
        if group.num_pairs:
            _, ways = self._ways()
            cos, sin = turns[ways[which]]
            keys = rotate_on_device(keys, cos, sin, is_traditional=group.is_traditional)
        return keys.astype(self._dtype), values.astype(self._dtype)

    def exact(
        self, layer: int, blocks: Sequence[Mapping[str, Array]]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], Array] | None:
        """Return one layer's rows that are kept as they are, if there are some.

        Args:
            layer: Which of the layers.
            blocks: The ``exponents`` and ``exact`` of each block.

        Returns:
            The head of each row of keys, its number among the rows of all blocks, and
            key and value, ``(n, 2, D)``.
        """
        group = self._layers.group
        heads, tokens, rows = [], [], []
        for number, parts in enumerate(blocks):
            if not len(parts["exact"]):
                continue
            marks = parts["exponents"] == _EXACT
            part, token = np.nonzero(marks[layer])
            begin = int(marks[:layer].sum())
            shape = (-1, 2, group.num_joined, group.head_dim)
            found = parts["exact"][begin : begin + len(part)].reshape(shape)
            first = part[:, None] * group.num_joined
            heads.append((first + np.arange(group.num_joined)).ravel())
            at = token + number * self.num_coded
            tokens.append(np.repeat(at, group.num_joined))
            rows.append(found.swapaxes(1, 2).reshape(-1, 2, group.head_dim))
        if not any(len(found) for found in heads):
            return None
        where = [np.concatenate(x).astype(np.int32) for x in (heads, tokens)]
        return where[0], where[1], np.concatenate(rows)

    def _lay_out(self, alignment: int) -> tuple[list[_Place], int]:
        places, end = [], 0

        def lay(size: int) -> int:
            nonlocal end
            begin, end = end, end + -(-size // alignment) * alignment
            return begin

        octets = -(-self.num_coded // 8)
        sizes = self._layout.places.sizes
        for (stream, holds), count in zip(self._layout.streams, sizes, strict=True):
            packed = lay(count * stream.width(self.num_coded))
            low = lay(stream.low_bits * count * octets) if stream.low_bits else 0
            places.append(_Place(stream, holds, packed, low))
        return places, end

    def _ways(self) -> tuple[list[npt.NDArray[np.float64]], dict[int, int]]:
        """Return the frequencies that differ, and which of them each layer has."""
        found: dict[bytes, int] = {}
        ways: list[npt.NDArray[np.float64]] = []
        of_layer: dict[int, int] = {}
        for which in self._which:
            frequencies = self._layers.frequencies[which]
            number = found.setdefault(frequencies.tobytes(), len(found))
            if number == len(ways):
                ways.append(frequencies)
            of_layer[which] = number
        return ways, of_layer

    def _coefficients(self, layer: int, data: mx.array) -> mx.array:
        """Return a layer's coefficients in steps, ``(G, B * T, N)``."""
        blocks, (parts, width) = data.shape[0], self._layout.classes.shape[1:]
        order = np.full(parts * width, -1, np.int32)
        unpacked, count = [], 0
        for place in self._places:
            held = np.flatnonzero(place.holds[layer])
            order[held] = count + np.arange(len(held))
            count += len(held)
            if len(held):
                unpacked.append(self._unpack(place, layer, data))
        # What is not coded is a coefficient of zeros, behind all others.
        order[self._layout.classes[layer].ravel() < FIRST_CODED] = count
        unpacked.append(mx.zeros((blocks, 1, self.num_coded), mx.int16))
        q = mx.take(mx.concatenate(unpacked, axis=1), mx.array(order), axis=1)
        q = q.reshape(blocks, parts, width, self.num_coded).transpose(1, 0, 3, 2)
        return q.reshape(parts, blocks * self.num_coded, width).astype(mx.float32)

    def _unpack(self, place: _Place, layer: int, data: mx.array) -> mx.array:
        """Return one layer's coefficients of a stream, ``(B, n, T)``."""
        stream, tokens = place.stream, self.num_coded
        total = int(place.holds.sum())
        first = int(place.holds[:layer].sum())
        last = first + int(place.holds[layer].sum())
        width = stream.width(tokens)
        begin = place.packed + first * width
        octets = data[:, begin : begin + (last - first) * width]
        octets = octets.reshape(len(data), last - first, width)
        digits, rest = [], octets
        for _ in range(stream.per_byte - 1):
            digits.append(rest % stream.levels)
            rest = rest // stream.levels
        digits.append(rest)
        q = mx.stack(digits, axis=-1).reshape(len(data), last - first, -1)
        q = q[:, :, :tokens].astype(mx.int16) - stream.limit
        if not stream.low_bits:
            return q
        q = q * (1 << stream.low_bits)
        size = -(-tokens // 8)
        shifts = mx.array(np.arange(7, -1, -1, dtype=np.uint8))
        for bit in range(stream.low_bits):
            begin = place.low + (bit * total + first) * size
            plane = data[:, begin : begin + (last - first) * size]
            ones = (plane[..., None] >> shifts) & 1
            ones = ones.reshape(len(data), last - first, -1)[:, :, :tokens]
            q = q + ones.astype(mx.int16) * (1 << bit)
        return q


def is_known(fit: Fit, rows: Rows) -> bool:
    """Whether rows are coded in a basis, and of half the width of a product's numbers.

    Products on a GPU may round what they multiply to 11 bits.
    """
    return rows.dtype in ("F16", "BF16") and fit.fitted.covering(rows) is not None
