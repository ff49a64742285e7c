"""PolarQuant/TurboQuant codes with exact attention sinks and centred keys.

The first 4 tokens of the sequence are kept as they are. Keys are coded less the mean
of each head over the block (those 4 left out), values as they are.

References:
    PolarQuant, arXiv:2502.02617; TurboQuant, arXiv:2504.19874.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant import dequantize_polar, make_wh_rotation
from turboquant.kernels import best_kernels, gpu
from turboquant.packing import plane_widths
from turboquant.packing import split_planes as split_codes

from ..errors import CodecError
from .base import Array, Encoded, PartSpecs, Rows, Run
from .dtypes import MLX_DTYPES
from .on_device import DevicePart

NUM_SINKS = 4
SEED = 0
"""Of the rotation; frozen, since it is part of what `turboN` means."""
_NAME = re.compile(r"turbo([1-8])(?:v([1-8]))?")


@dataclass(frozen=True, slots=True)
class Turbo:
    """Codes of ``key_bits`` bits for keys and ``value_bits`` for values.

    Parts: ``codes``, a bit-packed plane of ``(L, H, T, D * width // 8)``, and behind
    it ``codes1``, ``codes2`` where the width takes several planes; ``norms``,
    float32 split into byte planes; for keys ``mean``, float16 ``(L, H, D)``; in the
    first block ``sinks``, ``(L, H, 4, D)`` in the dtype of the rows.
    """

    usual_names: ClassVar[tuple[str, ...]] = (
        "turbo2",
        "turbo3",
        "turbo4",
        "turbo5v3",
        "turbo8",
    )
    key_bits: int
    value_bits: int
    is_lossless: bool = False

    def __post_init__(self) -> None:
        """Refuse widths that cannot be packed."""
        if not (1 <= self.key_bits <= 8 and 1 <= self.value_bits <= 8):
            raise CodecError(
                f"turbo codes have 1 to 8 bits, not {self.key_bits} and"
                f" {self.value_bits}",
                hint="`turbo4`, `turbo3` and `turbo2` are the usual ones",
            )

    @classmethod
    def from_name(cls, name: str) -> Turbo | None:
        """Return the codec that a name such as ``turbo4`` or ``turbo5v3`` means."""
        match = _NAME.fullmatch(name)
        if not match:
            return None
        keys, values = match.groups()
        return cls(int(keys), int(values or keys))

    @property
    def name(self) -> str:
        """``turbo4``, or ``turbo5v3`` where keys and values differ."""
        values = "" if self.key_bits == self.value_bits else f"v{self.value_bits}"
        return f"turbo{self.key_bits}{values}"

    @property
    def bits(self) -> int:
        """Those of keys or of values."""
        return min(self.key_bits, self.value_bits)

    def parts(self, rows: Rows) -> PartSpecs:
        """Return codes, norms, mean and sinks as far as these rows have them."""
        layers, heads, tokens, dim = rows.shape
        if rows.dtype not in ("F32", "F16", "BF16"):
            raise CodecError(f"turbo codes are of floats, not of {rows.dtype}")
        if dim % 8:
            raise CodecError(
                f"turbo codes need a head dimension divisible by 8, not {dim}",
                hint="use `planes+zstd`",
            )
        sinks = _num_sinks(rows)
        coded = (layers, heads, tokens - sinks)
        specs: PartSpecs = {
            name: ("U8", (*coded, dim * width // 8))
            for name, width in self._planes(rows)
        }
        specs["norms"] = ("U8", (4, *coded))
        if _is_key(rows):
            specs["mean"] = ("F16", (layers, heads, dim))
        if sinks:
            specs["sinks"] = (rows.dtype, (layers, heads, sinks, dim))
        return specs

    def is_compressible(self, part: str) -> bool:
        """All parts."""
        return True

    def encode(self, layers: Sequence[Array], rows: Rows) -> dict[str, Encoded]:
        """Encode all layers in one call."""
        sinks = _num_sinks(rows)
        codes = best_kernels().encode_block(
            [layer[:, sinks:] for layer in layers],
            self._bits(rows),
            make_wh_rotation(rows.shape[3], SEED),
            is_centred=_is_key(rows),
        )
        names = [name for name, _ in self._planes(rows)]
        parts: dict[str, Encoded] = dict(zip(names, codes.planes, strict=True))
        parts["norms"] = _split_norms(codes.norms)
        if codes.mean is not None:
            parts["mean"] = codes.mean
        if sinks:
            parts["sinks"] = np.stack([layer[:, :sinks] for layer in layers])
        return parts

    def is_quick(self, rows: Rows) -> bool:
        """Whether rows are encoded as fast as they would be copied."""
        is_known = rows.dtype in ("F32", "F16", "BF16") and rows.shape[3] % 8 == 0
        return is_known and kernels_name() != "numpy"

    def is_for_device(self, rows: Rows) -> bool:
        """Whether a GPU here can encode such rows."""
        dim = rows.shape[3]
        is_known = rows.shape[2] > _num_sinks(rows) and not dim % 8
        is_known = is_known and dim <= gpu.MAX_DIM
        return is_known and mx.default_device() == mx.gpu and gpu.can("encode")

    def encode_on_device(self, x: gpu.Buffers, rows: Rows) -> dict[str, DevicePart]:
        """Encode rows for which there are kernels, where they are.

        They give the same parts everywhere.

        Args:
            x: Rows of blocks that are alike; only a single block may have sinks.
            rows: Those of the first.

        Returns:
            The parts, not evaluated.
        """
        rotation, sinks = make_wh_rotation(rows.shape[3], SEED), _num_sinks(rows)
        made = gpu.encode(
            x.behind(sinks), self._bits(rows), rotation, is_centred=_is_key(rows)
        )
        parts = {
            name: DevicePart([codes.planes[i] for codes in made])
            for i, (name, _) in enumerate(self._planes(rows))
        }
        parts["norms"] = DevicePart([codes.norms for codes in made], axis=1)
        means = [codes.mean for codes in made if codes.mean is not None]
        if means:
            parts["mean"] = DevicePart(means)
        if sinks:
            parts["sinks"] = DevicePart(gpu.pick(x, range(sinks)))
        return parts

    def decode_into(
        self, parts: Mapping[str, Array], rows: Rows, layers: Sequence[Array]
    ) -> None:
        """Decode all layers in one call."""
        sinks = _num_sinks(rows)
        if sinks:
            for layer, exact in zip(layers, parts["sinks"], strict=True):
                layer[:, :sinks] = exact
        norms = _join_norms(parts)
        best_kernels().decode_block(
            [parts[name] for name, _ in self._planes(rows)],
            norms,
            [layer[:, sinks:] for layer in layers],
            self._bits(rows),
            make_wh_rotation(rows.shape[3], SEED),
            mean=parts["mean"] if _is_key(rows) else None,
        )

    def decode(self, parts: Mapping[str, Array], rows: Rows) -> mx.array:
        """Decode all layers on the device."""
        norms = _join_norms(parts)
        codes = [mx.array(parts[name]) for name, _ in self._planes(rows)]
        dtype = MLX_DTYPES[rows.dtype]
        decoded = dequantize_polar(
            mx.concatenate(codes, axis=-1),
            mx.array(norms),
            self._bits(rows),
            make_wh_rotation(rows.shape[3], SEED),
            dtype=dtype,
            mean=mx.array(parts["mean"])[:, :, None] if _is_key(rows) else None,
        )
        if not _num_sinks(rows):
            return decoded
        return mx.concatenate([mx.array(parts["sinks"]).view(dtype), decoded], axis=2)

    def runs(self, rows: Rows) -> list[Run]:
        """Return the sinks, and the rows of codes behind them."""
        sinks = _num_sinks(rows)
        exact = [Run(sinks, 0, ("sinks",))] if sinks else []
        planes = tuple(name for name, _ in self._planes(rows))
        mean = "mean" if rows.side == "k" else None
        coded = rows.shape[2] - sinks
        return [*exact, Run(coded, self._bits(rows), planes, "norms", mean)]

    def from_live(self, live: Mapping[str, Array], rows: Rows) -> dict[str, Array]:
        """Return the parts of rows that a live cache has codes of.

        Args:
            live: ``codes``, all planes of a vector behind each other, ``(L, H, N, D *
                bits / 8)``; ``norms``, ``(L, H, N)``; ``mean`` and ``sinks`` as stored.
            rows: What rows they are of.
        """
        names = [name for name, _ in self._planes(rows)]
        planes = split_codes(live["codes"], self._bits(rows))
        found = {**live, **dict(zip(names, planes, strict=True))}
        found["norms"] = _split_norms(live["norms"])
        return {name: found[name] for name in self.parts(rows)}

    def to_live(self, parts: Mapping[str, Array], rows: Rows) -> dict[str, Array]:
        """Undo :meth:`from_live`."""
        planes = [parts[name] for name, _ in self._planes(rows)]
        found = {"codes": np.concatenate(planes, axis=-1), "norms": _join_norms(parts)}
        return found | {n: parts[n] for n in ("mean", "sinks") if n in parts}

    def _bits(self, rows: Rows) -> int:
        return self.key_bits if _is_key(rows) else self.value_bits

    def _planes(self, rows: Rows) -> list[tuple[str, int]]:
        """Return name and width in bits of each plane of codes."""
        widths = plane_widths(self._bits(rows))
        return [(f"codes{i or ''}", width) for i, width in enumerate(widths)]


def kernels_name() -> str:
    """Return what computes codes here: ``numpy``, or an instruction set."""
    return best_kernels().name


def _is_key(rows: Rows) -> bool:
    return rows.side.startswith("k")


def _split_norms(norms: Array) -> Array:
    return np.concatenate(best_kernels().split_bytes([norms]))


def _join_norms(parts: Mapping[str, Array]) -> npt.NDArray[np.float32]:
    norms = np.empty(parts["norms"].shape[1:], np.float32)
    best_kernels().join_bytes(list(parts["norms"][:, None]), [norms])
    return norms


def _num_sinks(rows: Rows) -> int:
    """Return how many of these rows are attention sinks."""
    return max(0, min(NUM_SINKS - rows.start, rows.shape[2]))
