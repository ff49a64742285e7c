"""The codecs that a store has because it has their bases."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace as changed
from functools import lru_cache, partial

from ..codecs import Codec, FitFamily, find_codec, get_codec
from ..errors import CodecError, FormatError, IntegrityError
from ..format.basis import BasisFile, bases_named, basis_of, parse_basis
from ..format.block import StoredBlock
from ..format.calibration import EXACT, QUALITIES, UNMEASURED, Calibration, rank
from ..storage.bases import (
    basis_size,
    find_calibration,
    read_basis,
    read_basis_bytes,
)
from ..storage.folder import StoreFolder

log = logging.getLogger("kvstore")


@lru_cache(maxsize=8)
def own_codecs(folder: StoreFolder) -> FitFamily:
    """Return the codecs of a store's bases, each basis read when it is first used."""
    return FitFamily(partial(read_basis, folder))


def carried_codecs(folder: StoreFolder, bases: Mapping[str, bytes]) -> FitFamily:
    """Return the codecs of bases that came from elsewhere, and of a store's own."""

    def read(digest: str) -> BasisFile:
        data = bases.get(digest)
        return read_basis(folder, digest) if data is None else parse_basis(data, digest)

    return FitFamily(read)


def read_named(folder: StoreFolder, blocks: Iterable[StoredBlock]) -> dict[str, bytes]:
    """Return the bases that blocks name, by their digests.

    Raises:
        IntegrityError: The store lacks one, or it is damaged.
    """
    found = {digest: read_basis_bytes(folder, digest) for digest in bases_named(blocks)}
    for digest, data in found.items():
        parse_basis(data, digest)
    return found


def codec_of(folder: StoreFolder, name: str) -> Codec:
    """Return the codec with this name, of a store or of all.

    Raises:
        CodecError: There is none.
        IntegrityError: The store lacks its basis, or that is damaged.
    """
    return find_codec(name, own_codecs(folder))


def codec_for(folder: StoreFolder, name: str, fingerprint: str) -> Codec:
    """Return the codec with this name, or what a quality means for a model.

    Raises:
        CodecError: There is none.
        IntegrityError: The store lacks its basis, or that is damaged.
    """
    found = find_calibration(folder, fingerprint)
    chosen = _chosen(folder, name, found)
    codec = codec_of(folder, chosen)
    return changed(codec, rank=rank(chosen, found.told if found else ()))


def _chosen(folder: StoreFolder, name: str, found: Calibration | None) -> str:
    """Return the codec that a name means, of those that can be used."""
    if name not in QUALITIES:
        return name
    if found is None:
        return UNMEASURED[name]
    while not _is_usable(folder, chosen := found.choose(name)):
        left = tuple(one for one in found.measured if one.codec != chosen)
        if not left:
            return EXACT  # no other was measured
        found = changed(found, measured=left)
    return chosen


def _is_usable(folder: StoreFolder, codec: str) -> bool:
    try:
        if basis := basis_of(codec):
            basis_size(folder, basis)  # it may be held, and gone from the store
        return bool(codec_of(folder, codec))
    except (IntegrityError, FormatError, CodecError) as error:
        log.warning("kvstore: `%s` is left out: %s", codec, error)
        return False


def check_codec(name: str, folder: StoreFolder | None = None) -> None:
    """Refuse what is neither a quality nor a codec.

    Args:
        name: What it is called.
        folder: The store; without one, what a store may have passes.

    Raises:
        CodecError: There is no codec or quality of that name.
        IntegrityError: The store lacks its basis, or that is damaged.
    """
    if name in QUALITIES:
        return
    if folder is not None:
        codec_of(folder, name)
    elif basis_of(name) is None:
        get_codec(name)
