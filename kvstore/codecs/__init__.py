"""The registry: a codec's name to the codec.

A name is an array codec, ``raw``, ``planes``, ``turboN`` or ``turboNvM``, and behind
it ``+zstd`` or nothing.
"""

from __future__ import annotations

import re
from functools import lru_cache

from ..errors import CodecError
from .base import MLX_DTYPES, ArrayCodec, Codec, Rows
from .planes import Planes
from .raw import Raw
from .turbo import Turbo
from .zstd import Zstd

DEFAULT_CODEC = "turbo4+zstd"
_TURBO = re.compile(r"turbo([1-8])(?:v([1-8]))?")


@lru_cache(maxsize=128)
def get_codec(name: str) -> Codec:
    """Return the codec with this name.

    Raises:
        CodecError: There is none.
    """
    base, plus, compressor = name.partition("+")
    array = _array_codec(base)
    if array is None or (plus and compressor != Zstd.name):
        raise CodecError(
            f"unknown codec `{name}`",
            hint=f"choose one of {', '.join(codec_names())}",
        )
    codec = Codec(array, Zstd() if plus else None)
    if codec.name != name:
        raise CodecError(f"unknown codec `{name}`", hint=f"use `{codec.name}`")
    return codec


def lossless_twin(codec: Codec) -> Codec:
    """Return what a codec's tails are stored with: itself where it is lossless."""
    if codec.is_lossless:
        return codec
    return Codec(Planes(), codec.compressor) if codec.compressor else Codec(Raw())


def codec_names() -> list[str]:
    """Return the names of the usual codecs; `turbo1` to `turbo8v8` all work."""
    bases = ("raw", "planes", "turbo2", "turbo3", "turbo4", "turbo5v3", "turbo8")
    return [f"{base}{suffix}" for base in bases for suffix in ("", "+zstd")]


def _array_codec(name: str) -> ArrayCodec | None:
    """Return the array codec with this name, or ``None``."""
    if name == "raw":
        return Raw()
    if name == "planes":
        return Planes()
    if match := _TURBO.fullmatch(name):
        keys, values = match.groups()
        return Turbo(int(keys), int(values or keys))
    return None


__all__ = [
    "DEFAULT_CODEC",
    "MLX_DTYPES",
    "Codec",
    "Rows",
    "codec_names",
    "get_codec",
    "lossless_twin",
]
