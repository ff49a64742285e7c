"""Rows as small integers in a basis that was fitted to their model.

The first 4 tokens of the sequence are kept as they are. Of every other, the keys before
RoPE and the values of some heads of a layer make one row, which is taken less its mean
and divided by a scale of its own; its coefficients in the basis are rounded to a step.
Coefficients that are expected to stay far below the step are not stored. A row that
this would spoil is kept as it is.

Rows of layers that the basis does not cover lose nothing.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant.kernels import best_kernels
from turboquant.kernels.long_rows import Coefficients, Turns
from turboquant.kernels.native import NativeKernels

from ..blas import one_thread
from ..errors import CodecError, IntegrityError
from ..format.basis import BasisFile
from ..format.calibration import nominal_bits
from .base import Array, Encoded, PartSpecs, Rows
from .dtypes import MLX_DTYPES, NUMPY_DTYPES
from .fitted import (
    Fitted,
    FittedLayers,
    are_strange,
    describe,
    divided,
    fitted_from_file,
    joined,
    log_sizes,
    put_long,
)
from .floats import Bools, Floats, narrow, widen
from .kept import Kept, Layout
from .planes import Planes
from .rotary import angles, rotate, rotate_on_device
from .streams import (
    FIRST_CODED,
    Integers,
    are_packed,
    pack_integers,
    unpack_integers,
)
from .zstd import Zstd

NUM_SINKS = 4
_NAME = re.compile(r"fit([0-9][0-9.]{0,7})@([0-9a-f]{64})")
MAX_EXPONENT = 6
"""Of scales, in half octaves."""
# Stands where a row has no exponent, being kept as it is.
_EXACT = 255
# Of a row that is kept as it is: the mean square of its errors, in squared steps.
_MAX_ERROR = 0.5
_PLANES = Planes()
Sides = tuple[Array, Array]
"""Buffers for the keys and for the values of one layer, each ``(H, T, D)``."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Codes of one rate in one basis.

    Parts: ``exponents``, ``(L, G, T)``; ``c5``, ``c6`` and on, the streams of
    coefficients, a row of bytes for each layer, part of it and coefficient of their
    classes; ``b27`` and on, low bits of theirs; ``exact``, the rows that are kept as
    they are, as many as there are; in the first block ``sinks``, ``(L, 2 H, 4, D)``.
    """

    rate: str
    # Names the basis.
    digest: str
    fitted: Fitted = field(repr=False, compare=False)
    is_lossless: bool = False
    kept: Kept = field(default_factory=Kept, repr=False, compare=False)
    is_joint: ClassVar[bool] = True
    # Entropy is all that is left in streams: repetitions are not worth looking for.
    compressor: ClassVar[Zstd] = Zstd(finds_matches=False)

    @property
    def name(self) -> str:
        """``fit2@`` and the digest of the basis."""
        return f"fit{self.rate}@{self.digest}"

    @property
    def bits(self) -> int:
        """Bits by which copies are compared: of a `turbo` that loses about as much."""
        return nominal_bits(self.name) or 0

    def parts(self, rows: Rows) -> PartSpecs:
        """Return the parts of rows that the basis covers, or planes of others."""
        plan = self._plan(rows)
        return plan.parts() if plan else _PLANES.parts(rows)

    def check(self, parts: Mapping[str, Array], rows: Rows) -> None:
        """Refuse parts that no encoding gives.

        Raises:
            IntegrityError: They are such.
        """
        plan = self._plan(rows)
        if plan:
            plan.check(parts)

    def is_compressible(self, part: str) -> bool:
        """All parts but the low planes of rows that are stored in planes."""
        return part != "low"

    def encode(self, layers: Sequence[Array], rows: Rows) -> dict[str, Encoded]:
        """Encode rows, the heads of the keys first."""
        plan = self._plan(rows)
        if plan is None:
            return _PLANES.encode(layers, rows)
        # Of a broken row NaN is made, which is nothing to warn of.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return plan.encode(np.stack(layers))

    def decode_into(
        self, parts: Mapping[str, Array], rows: Rows, layers: Sequence[Array]
    ) -> None:
        """Decode into buffers."""
        half = rows.shape[1] // 2
        sides = [(layer[:half], layer[half:]) for layer in layers]
        self.decode_sides_into(parts, rows, sides)

    def decode_sides_into(
        self, parts: Mapping[str, Array], rows: Rows, layers: Sequence[Sides]
    ) -> None:
        """Decode into a buffer for each layer's keys and one for its values.

        Each has the shape ``(H, T, D)``.
        """
        plan = self._plan(rows)
        if plan:
            plan.decode_into(parts, layers)
            return
        whole = np.empty(rows.shape, NUMPY_DTYPES[rows.dtype])
        _PLANES.decode_into(parts, rows, list(whole))
        for sides, found in zip(layers, whole, strict=True):
            _put(found, sides)

    def decode(self, parts: Mapping[str, Array], rows: Rows) -> mx.array:
        """Decode all layers on the device."""
        plan = self._plan(rows)
        return plan.decode(parts) if plan else _PLANES.decode(parts, rows)

    def _plan(self, rows: Rows) -> _Plan | None:
        layers = self.fitted.covering(rows)
        if layers is None or rows.dtype not in _LARGEST:
            return None
        layout = self.kept.layout(layers, rows, self.fitted.steps[self.rate])
        return _Plan(rows, layers, layout, self.kept)


class FitFamily:
    """The `fit` codecs of the bases that a store has.

    Args:
        read: Returns a basis by its digest; raises an ``IntegrityError``.
    """

    usual_names: tuple[str, ...] = ()  # who has no basis can use none of them

    def __init__(self, read: Callable[[str], BasisFile]) -> None:
        # Few: one of a large model takes a hundred megabytes.
        self._fitted = lru_cache(maxsize=4)(
            lambda digest: fitted_from_file(read(digest))
        )
        # What each keeps is half as large as its basis, or less.
        self._codecs = lru_cache(maxsize=2)(self._codec)
        # Threads that ask at once would each read the basis, and hold it.
        self._lock = threading.Lock()

    def from_name(self, name: str) -> Fit | None:
        """Return the codec that a name such as ``fit2@`` and a digest means.

        Raises:
            CodecError: The basis has no such rate.
            IntegrityError: The basis is missing or damaged.
        """
        match = _NAME.fullmatch(name)
        if not match:
            return None
        with self._lock:
            return self._codecs(*match.groups())

    def _codec(self, rate: str, digest: str) -> Fit:
        fitted = self._fitted(digest)
        if rate not in fitted.steps:
            raise CodecError(
                f"basis {digest[:12]} has no rate {rate}",
                hint=f"it has {', '.join(fitted.steps)}",
            )
        return Fit(rate, digest, fitted)


_LARGEST = {"F32": 2.0**126, "F16": 2.0**14, "BF16": 2.0**126}
"""Of each dtype, from what magnitude on rows are kept as they are."""


class _Plan:
    """How some rows are laid out in parts.

    Args:
        rows: What they are.
        layers: What the basis says of their layers.
        layout: Where their coefficients are.
        kept: What is known of all blocks.
    """

    def __init__(
        self, rows: Rows, layers: FittedLayers, layout: Layout, kept: Kept
    ) -> None:
        self._rows, self._layers, self._group = rows, layers, layers.group
        self._which = layers.indices(rows.layers)
        self._layout, self._kept = layout, kept
        # The first rows of a prompt are unlike all others and attention rests on them:
        # they are kept as they are.
        self._sinks = max(0, min(NUM_SINKS - rows.start, rows.shape[2]))
        self._num_coded = rows.shape[2] - self._sinks

    def parts(self) -> PartSpecs:
        """Return dtype and shape of every part."""
        layers, heads, _, dim = self._rows.shape
        coded = (layers, self._group.num_parts, self._num_coded)
        specs: PartSpecs = {"exponents": ("U8", coded)}
        octets = -(-self._num_coded // 8)
        sizes = self._layout.places.sizes
        for (stream, _), count in zip(self._layout.streams, sizes, strict=True):
            width = stream.width(self._num_coded)
            specs[f"c{stream.first}"] = ("U8", (count, width))
            if stream.low_bits:
                specs[f"b{stream.first}"] = ("U8", (stream.low_bits, count, octets))
        specs["exact"] = (self._rows.dtype, (-math.prod(coded), self._group.width))
        if self._sinks:
            specs["sinks"] = (self._rows.dtype, (layers, heads, self._sinks, dim))
        return specs

    def check(self, parts: Mapping[str, Array]) -> None:
        """Raise an ``IntegrityError`` for parts that no encoding gives."""
        # A digest says that these bytes were written so, not that our encoder wrote
        # them.
        exponents = parts["exponents"]
        is_exact = exponents == _EXACT
        if (exponents[~is_exact] > 2 * MAX_EXPONENT).any():
            raise IntegrityError("an exponent is out of range")
        if int(is_exact.sum()) != len(parts["exact"]):
            raise IntegrityError("there are more or fewer exact rows than marks")
        for stream, _ in self._layout.streams:
            if not are_packed(parts[f"c{stream.first}"], stream):
                raise IntegrityError("a coefficient is out of range")

    def encode(self, x: Array) -> dict[str, Encoded]:
        """Return the parts of rows of shape ``(L, 2 H, T, D)``."""
        coded = np.ascontiguousarray(x[:, :, self._sinks :])
        wide = self._centred(widen(coded, self._rows.dtype))
        # The scale is rounded to half octaves first and divided by as rounded, so that
        # whoever decodes multiplies by the very same number.
        sizes = log_sizes(wide, self._group)
        exponents = self._exponents(sizes)
        wide /= np.exp2(exponents.astype(np.float32) / 2)[..., None]
        inverse = self._layers.inverse[self._which]
        q, is_exact = self._rounded(_product(wide, inverse) / self._layout.step)
        is_exact |= are_strange(sizes, self._layers.features[self._which])
        # Of the rows as they were given: what was rotated and rotated back is another
        # number.
        exact = joined(coded, self._group)
        is_exact |= self._is_large(exact)
        q[is_exact] = 0
        marks = exponents.astype(np.int16) + MAX_EXPONENT
        parts: dict[str, Encoded] = {
            "exponents": np.where(is_exact, _EXACT, marks).astype(np.uint8),
            "exact": exact[is_exact],
        }
        by_coefficient = q.swapaxes(-1, -2)
        for stream, holds in self._layout.streams:
            packed, low = pack_integers(by_coefficient[holds], stream)
            parts[f"c{stream.first}"] = packed
            parts[f"b{stream.first}"] = low
        if self._sinks:
            parts["sinks"] = x[:, :, : self._sinks]
        return parts

    def decode_into(self, parts: Mapping[str, Array], layers: Sequence[Sides]) -> None:
        """Write each layer's rows into its buffers."""
        coded = [
            (keys[:, self._sinks :], values[:, self._sinks :])
            for keys, values in layers
        ]
        kernels = _kernels_for(self._rows.shape[3])
        if kernels:
            self._restore(kernels, parts, coded)
        else:
            for number, sides in enumerate(coded):
                _put(self._decoded(parts, number), sides)
        for number, (keys, values) in enumerate(layers if self._sinks else ()):
            sinks = keys[:, : self._sinks], values[:, : self._sinks]
            _put(parts["sinks"][number], sinks)
        self._put_exact(parts, coded)

    def _put_exact(self, parts: Mapping[str, Array], coded: Sequence[Sides]) -> None:
        """Write the rows that are kept as they are over others."""
        if not len(parts["exact"]):
            return
        is_exact = parts["exponents"] == _EXACT
        ends = np.cumsum(is_exact.sum(axis=(1, 2)))
        for end, where, sides in zip(ends, is_exact, coded, strict=True):
            exact = parts["exact"][end - where.sum() : end]
            put_long(sides, self._group, where, exact)

    def _decoded(self, parts: Mapping[str, Array], layer: int) -> Array:
        """Return one layer's rows behind the sinks."""
        which = self._which[layer]
        wide = self._products(parts, layer)
        wide *= self._scales(parts["exponents"][layer])
        wide += self._layers.mean[which][:, None]
        turned = self._turned(divided(wide, self._group)[None], [which])[0]
        return narrow(turned, self._rows.dtype)

    def _restore(
        self,
        kernels: NativeKernels,
        parts: Mapping[str, Array],
        layers: Sequence[Sides],
    ) -> None:
        """Write all rows behind the sinks, those that are exact as zero."""
        found = Coefficients(self._layout.places)
        for stream, _ in self._layout.streams:
            low = parts[f"b{stream.first}"] if stream.low_bits else None
            found.add(parts[f"c{stream.first}"], low, stream.limit, stream.per_byte)
        scales = self._scales(parts["exponents"])[..., 0] * self._layout.step
        bases = self._kept.bases(kernels, self._rows, self._layers, self._layout)
        kernels.restore_long(found, bases, scales, self._turns(), layers)

    def decode(self, parts: Mapping[str, Array]) -> mx.array:
        """Return all rows, ``(L, 2 H, T, D)``, computed on MLX's device."""
        dtype = MLX_DTYPES[self._rows.dtype]
        exponents = parts["exponents"]
        coefficients = mx.array(self._integers(parts, 0, len(self._which)))
        matrix = mx.array(self._layers.matrix[self._which])
        wide = coefficients.swapaxes(-1, -2) @ matrix.swapaxes(-1, -2)
        wide = wide * mx.array(self._scales(exponents))
        wide = wide + mx.array(self._layers.mean[self._which])[:, :, None]
        decoded = self._turned_on_device(self._divided_on_device(wide)).astype(dtype)
        is_exact = exponents == _EXACT
        if is_exact.any():
            held = np.empty(decoded.shape, parts["exact"].dtype)
            mask = np.zeros(decoded.shape, np.bool_)
            for layer, where in enumerate(is_exact):
                begin = int(is_exact[:layer].sum())
                exact = parts["exact"][begin : begin + int(where.sum())]
                marks = np.ones_like(exact, np.bool_)
                for array, rows in ((held, exact), (mask, marks)):
                    put_long(np.split(array[layer], 2), self._group, where, rows)
            decoded = mx.where(mx.array(mask), mx.array(held).view(dtype), decoded)
        if not self._sinks:
            return decoded
        return mx.concatenate([mx.array(parts["sinks"]).view(dtype), decoded], axis=2)

    def _products(self, parts: Mapping[str, Array], layer: int) -> Floats:
        """Return one layer's rows, neither scaled nor moved, ``(G, T, N)``."""
        coefficients = self._integers(parts, layer, layer + 1)[0]
        matrix = self._layers.matrix[self._which[layer]]
        found = np.empty((len(matrix), self._num_coded, self._group.width), np.float32)
        for number, is_coded in enumerate(self._layout.classes[layer] >= FIRST_CODED):
            # Half of them are not coded at low rates, and cost nothing.
            some = coefficients[number][is_coded]
            with one_thread():
                np.matmul(some.T, matrix[number][:, is_coded].T, out=found[number])
        return found

    def _integers(self, parts: Mapping[str, Array], first: int, last: int) -> Floats:
        """Return the coefficients of some layers, ``(L, G, N, T)``."""
        shape = (last - first, *self._layout.classes.shape[1:], self._num_coded)
        out = np.zeros(shape, np.float32)
        for stream, holds in self._layout.streams:
            begin, end = int(holds[:first].sum()), int(holds[:last].sum())
            low = parts[f"b{stream.first}"][:, begin:end] if stream.low_bits else _NONE
            packed = parts[f"c{stream.first}"][begin:end]
            out[holds[first:last]] = unpack_integers(
                packed, low, stream, self._num_coded
            )
        out *= self._layout.step
        return out

    def _rounded(self, y: Floats) -> tuple[Integers, Bools]:
        """Return coefficients in steps as integers, and which rows those would spoil.

        Both are ``(L, G, T)`` and, of the integers, ``N``.
        """
        most = np.zeros(self._layout.classes.shape, np.float32)
        for stream, holds in self._layout.streams:
            most[holds] = stream.most
        rounded = np.clip(np.rint(y), -most[:, :, None], most[:, :, None])
        error = np.square(y - rounded).mean(axis=-1)
        is_spoilt = ~(error <= _MAX_ERROR)  # of NaN too
        rounded[is_spoilt] = 0
        return rounded.astype(np.int16), is_spoilt

    def _is_large(self, coded: Array) -> Bools:
        """Whether rows come near the limits of their dtype, where rounding fails."""
        size = np.abs(widen(coded, self._rows.dtype)).max(axis=-1, initial=0)
        return np.asarray(~(size < _LARGEST[self._rows.dtype]))

    def _exponents(self, sizes: Floats) -> npt.NDArray[np.int8]:
        """Return the scale of each row in half octaves, ``(L, G, T)``."""
        told = describe(sizes, self._layers.features[self._which])
        weights = self._layers.importance[self._which]
        return exponents_of(told, weights).astype(np.int8)

    def _scales(self, exponents: Array) -> Floats:
        """Return the scales that exponents mean, with an axis behind them."""
        halves = exponents.astype(np.float32) - MAX_EXPONENT
        return np.exp2(np.minimum(halves, MAX_EXPONENT) / 2)[..., None]

    def _centred(self, x: Floats) -> Floats:
        """Return long rows less their mean, keys rotated back to position 0."""
        wide = joined(self._turned(x, self._which, back=True), self._group)
        return np.asarray(wide - self._layers.mean[self._which][:, :, None])

    def _turned(self, x: Floats, which: list[int], *, back: bool = False) -> Floats:
        """Turn the keys among rows ``(L, 2 H, T, D)`` to their positions, or back."""
        if not self._group.num_pairs:
            return x
        cos, sin = self._angles(which)
        # Without their positions keys of one head vary along few directions, which is
        # what the basis was fitted to.
        keys = x[:, : self._group.num_heads]
        keys[...] = rotate(
            keys,
            cos,
            -sin if back else sin,
            is_traditional=self._group.is_traditional,
        )
        return x

    def _divided_on_device(self, wide: mx.array) -> mx.array:
        """Do what :func:`divided` does, on MLX's device."""
        group, (layers, parts, tokens, _) = self._group, wide.shape
        x = wide.reshape(layers, parts, tokens, 2, group.num_joined, group.head_dim)
        x = x.transpose(0, 3, 1, 4, 2, 5)
        return x.reshape(layers, 2 * group.num_heads, tokens, group.head_dim)

    def _turned_on_device(self, x: mx.array) -> mx.array:
        if not self._group.num_pairs:
            return x
        cos, sin = map(mx.array, self._angles(self._which))
        keys, values = mx.split(x, 2, axis=1)
        keys = rotate_on_device(
            keys, cos, sin, is_traditional=self._group.is_traditional
        )
        return mx.concatenate([keys, values], axis=1)

    def _turns(self) -> Turns:
        """Return cosine and sine as kernels take them."""
        start = self._rows.start + self._sinks
        frequencies = self._layers.frequencies[self._which]
        groups = -(-self._num_coded // 16)
        found = angles(frequencies, start, groups * 16)
        split = (x.reshape(len(x), groups, 16, x.shape[2]) for x in found)
        return Turns(*(np.ascontiguousarray(x.swapaxes(2, 3)) for x in split))

    def _angles(self, which: list[int]) -> tuple[Floats, Floats]:
        """Return cosine and sine for every coded row, ``(L, 1, T, pairs)``."""
        start = self._rows.start + self._sinks
        found = angles(self._layers.frequencies[which], start, self._num_coded)
        return found[0][:, None], found[1][:, None]


_NONE = np.zeros((0, 0, 0), np.uint8)


def _put(rows: Array, sides: Sides) -> None:
    """Write rows ``(2 H, T, D)`` into two buffers."""
    keys, values = sides
    keys[...], values[...] = rows[: len(keys)], rows[len(keys) :]


def _kernels_for(head_dim: int) -> NativeKernels | None:
    """Return compiled kernels that take heads of this size, where there are some."""
    kernels = best_kernels()
    if isinstance(kernels, NativeKernels) and head_dim % 8 == 0:
        return kernels
    return None


def _product(rows: Floats, matrices: Floats) -> Floats:
    """Return rows ``(L, G, T, N)`` times the transposes of ``(L, G, N, N)``."""
    kernels = _kernels_for(rows.shape[-1] // 2)
    if kernels is None:
        with one_thread():
            return rows @ matrices.swapaxes(-1, -2)
    out = np.empty_like(rows)
    for where in np.ndindex(rows.shape[:2]):
        out[where] = kernels.multiply(rows[where], matrices[where])
    return out


def exponents_of(told: Floats, weights: Floats) -> Floats:
    """Return scales in half octaves, of what :func:`describe` returns.

    Args:
        told: ``(…, G, T, F)``.
        weights: How much each of that counts, ``(…, G, F)``.
    """
    found = np.nan_to_num(np.rint((told @ weights[..., None])[..., 0]))
    return np.asarray(np.clip(found, -MAX_EXPONENT, MAX_EXPONENT), np.float32)
