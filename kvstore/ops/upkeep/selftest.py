"""Whether codecs and kernels give here what they give on every machine."""

from __future__ import annotations

import blake3
import numpy as np

from ...codecs import Rows, get_codec
from ...codecs.base import Array
from ...codecs.turbo import kernels_name

# Of what the codecs make of `_rows`; the formats are frozen, so these are too.
_DIGESTS = {
    "raw": "315dd9e66e6b65492a83e4be07c1c10c",
    "planes": "f566de356fd2578de0528cd2f45a08f0",
    "turbo2": "251007c34ca3f32ecba81df88ceb1d8f",
    "turbo4": "d4fb1357194a013ff44b3985249ca044",
    "turbo5v3": "e11f3147ac9a2dfe99edd5c7218d81d3",
}


def try_codecs() -> tuple[list[str], str]:
    """Return the codecs whose results are wrong here, and what computed them.

    Full blocks are encoded and held against the bytes that they have everywhere. Then
    they are decoded on the CPU and on MLX's device, which must agree: to the bit for
    what is lossless.
    """
    wrong = [name for name, digest in _DIGESTS.items() if _digest(name) != digest]
    lost = [f"{name}+zstd" for name in _DIGESTS if not _comes_back(f"{name}+zstd")]
    return [*wrong, *lost], kernels_name()


def _digest(name: str) -> str:
    """Return a digest of what a codec makes of keys and values of every machine."""
    hasher = blake3.blake3()
    for side in ("k", "v"):
        x, rows = _rows(side)
        for part in get_codec(name).encode(list(x), rows, f"{side}."):
            hasher.update(part.name.encode() + b"".join(part.buffers))
    return str(hasher.hexdigest(length=16))


def _comes_back(name: str) -> bool:
    """Whether what a codec made decodes alike on the CPU and on MLX's device."""
    codec = get_codec(name)
    x, rows = _rows("k")
    opened = codec.open_parts(codec.encode(list(x), rows, "k."), rows, "k.")
    decoded = np.empty_like(x)
    codec.array.decode_into(opened, rows, list(decoded))
    on_device = np.asarray(codec.array.decode(opened, rows))
    if codec.is_lossless:
        return bool((decoded == x).all() and (on_device == x).all())
    return bool(np.allclose(decoded, on_device, atol=1e-4, rtol=1e-3))


def _rows(side: str) -> tuple[Array, Rows]:
    """Return rows that are the same to the bit on every machine."""
    rows = Rows(side, 0, (2, 2, 64, 64), "F32")
    numbers = np.arange(2 * 2 * 64 * 64, dtype=np.uint64) * np.uint64(2654435761)
    # 16 bits each, so that none is rounded.
    x = (numbers >> np.uint64(8)) % np.uint64(65536)
    return (x.astype(np.float32) / 32768 - 1).reshape(rows.shape), rows
