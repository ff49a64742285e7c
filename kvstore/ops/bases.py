"""The codecs that a store has because it has their bases."""

from __future__ import annotations

import re
from functools import lru_cache, partial

from ..codecs import Codec, FitFamily, find_codec, get_codec
from ..storage.bases import read_basis
from ..storage.folder import StoreFolder

_NAMES_BASIS = re.compile(r"[^@+]+@([0-9a-f]{64})(?:\+zstd)?")


@lru_cache(maxsize=8)
def own_codecs(folder: StoreFolder) -> FitFamily:
    """Return the codecs of a store's bases, each basis read when it is first used."""
    return FitFamily(partial(read_basis, folder))


def codec_of(folder: StoreFolder, name: str) -> Codec:
    """Return the codec with this name, of a store or of all.

    Raises:
        CodecError: There is none.
        IntegrityError: The store lacks its basis, or that is damaged.
    """
    return find_codec(name, own_codecs(folder))


def check_codec(name: str) -> None:
    """Refuse a name that is no codec's, as far as can be told without a store.

    Raises:
        CodecError: It is such.
    """
    if basis_of(name) is None:
        get_codec(name)


def basis_of(codec: str) -> str | None:
    """Return the digest of the basis that a codec's name names, if it names one."""
    match = _NAMES_BASIS.fullmatch(codec)
    return match[1] if match else None
