"""The registry: a codec's name to the codec.

A name is that of an array codec, such as ``raw``, ``planes`` or ``turbo4``, and behind
it ``+zstd`` or nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from ..errors import CodecError
from .base import ArrayCodec, Codec, Rows
from .dtypes import MLX_DTYPES
from .fit import Fit, FitFamily
from .planes import Planes
from .raw import Raw
from .turbo import Turbo
from .zstd import Zstd


class CodecFamily(Protocol):
    """Array codecs that differ in numbers which are part of their names."""

    @property
    def usual_names(self) -> tuple[str, ...]:
        """The names that are offered to users; others may work."""

    def from_name(self, name: str) -> ArrayCodec | None:
        """Return the array codec of this name, or ``None`` if it is of another family.

        Raises:
            CodecError: The name is one of this family's with impossible numbers.
        """


_FAMILIES: list[CodecFamily] = [Raw, Planes, Turbo]


def register_codec(family: CodecFamily) -> None:
    """Add array codecs, which every process that loads their blocks must do too.

    Args:
        family: The codecs; the class of a codec may be its own family.

    Raises:
        ValueError: A codec of one of these names exists.
    """
    for name in family.usual_names:
        if _array_codec(name, _FAMILIES) is not None:
            raise ValueError(f"there is a codec `{name}` already")
    _FAMILIES.append(family)
    get_codec.cache_clear()


@lru_cache(maxsize=128)
def get_codec(name: str) -> Codec:
    """Return the codec with this name.

    Raises:
        CodecError: There is none.
    """
    return _assemble(name, _FAMILIES)


def find_codec(name: str, own: CodecFamily) -> Codec:
    """Return the codec with this name, which may be one that only a store has.

    Args:
        name: Its name.
        own: The codecs of that store.

    Raises:
        CodecError: There is none.
        IntegrityError: What the store has of it is missing or damaged.
    """
    base, _, _ = name.partition("+")
    return _assemble(name, [own]) if own.from_name(base) else get_codec(name)


def _assemble(name: str, families: Sequence[CodecFamily]) -> Codec:
    """Return the codec with this name: an array codec, and zstd behind it or not."""
    base, plus, compressor = name.partition("+")
    array = _array_codec(base, families)
    if array is None or (plus and compressor != Zstd.name):
        raise CodecError(
            f"unknown codec `{name}`",
            hint=f"choose one of {', '.join(codec_names())}",
        )
    zstd = array.compressor if isinstance(array, Fit) else Zstd()
    codec = Codec(array, zstd if plus else None)
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
    names = [name for family in _FAMILIES for name in family.usual_names]
    return [f"{name}{suffix}" for name in names for suffix in ("", "+zstd")]


def _array_codec(name: str, families: Sequence[CodecFamily]) -> ArrayCodec | None:
    """Return the array codec with this name, or ``None``."""
    found = (family.from_name(name) for family in families)
    return next((codec for codec in found if codec is not None), None)


__all__ = [
    "MLX_DTYPES",
    "Codec",
    "CodecFamily",
    "FitFamily",
    "Rows",
    "codec_names",
    "find_codec",
    "get_codec",
    "lossless_twin",
    "register_codec",
]
