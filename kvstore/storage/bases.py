"""The bases of a store, and what was measured of its models' codecs.

A basis is an immutable file, named by the SHA-256 of its bytes. A calibration is named
by the fingerprint of its model, and the next one replaces it.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FormatError, IntegrityError
from ..format.basis import (
    MAX_BYTES,
    BasisFile,
    basis_digest,
    basis_of,
    parse_basis,
)
from ..format.calibration import MAX_BYTES as MAX_CALIBRATION
from ..format.calibration import (
    Calibration,
    calibration_to_bytes,
    parse_calibration,
)
from . import files

if TYPE_CHECKING:
    from .folder import StoreFolder

log = logging.getLogger("kvstore")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def basis_path(folder: StoreFolder, digest: str) -> Path:
    """Return where the basis of this digest lies.

    Raises:
        ValueError: It is no digest.
    """
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"not the digest of a basis: {digest!r}")
    return folder.bases / f"{digest}.safetensors"


def list_bases(folder: StoreFolder) -> list[str]:
    """Return the digests of all bases, sorted."""
    stems = (path.stem for path in folder.bases.glob("*.safetensors"))
    return sorted(stem for stem in stems if _DIGEST.fullmatch(stem))


def add_basis(folder: StoreFolder, data: bytes) -> str:
    """Put a basis into the store, where it lasts, and return its digest.

    Raises:
        IntegrityError: The bytes are no basis.
        FormatError: They are one of a newer release.
    """
    digest = basis_digest(data)
    parse_basis(data, digest)  # what cannot be read back must not be acknowledged
    with files.staged(folder.staging) as (path, descriptor):
        files.write_all(descriptor, data)
        os.fchmod(descriptor, 0o400)
        files.sync(descriptor)
        files.publish(path, basis_path(folder, digest))
    return digest


def read_basis(folder: StoreFolder, digest: str) -> BasisFile:
    """Return a basis, checked.

    Raises:
        IntegrityError: The store lacks it, or it is damaged.
        FormatError: A newer release wrote it.
    """
    return parse_basis(read_basis_bytes(folder, digest), digest)


def read_basis_bytes(folder: StoreFolder, digest: str) -> bytes:
    """Return the bytes of a basis, unchecked.

    Raises:
        IntegrityError: The store lacks it, or it cannot be read.
    """
    path = basis_path(folder, digest)
    try:
        return files.read_small(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (ValueError, EOFError) as error:
        raise IntegrityError(f"basis cannot be read: {error}", path=path) from error


def basis_size(folder: StoreFolder, digest: str) -> int:
    """Return the bytes that a basis has on disk.

    Raises:
        IntegrityError: The store lacks it.
    """
    path = basis_path(folder, digest)
    try:
        return path.stat().st_size
    except FileNotFoundError as error:
        raise _missing(path) from error


def _missing(path: Path) -> IntegrityError:
    return IntegrityError(
        f"the store lacks the basis {path.stem[:12]}",
        path=path,
        hint="import the bundle again with its basis, or save the prompt again",
    )


def remove_basis(folder: StoreFolder, digest: str) -> None:
    """Remove a basis; no block may name it any more."""
    files.remove(basis_path(folder, digest))


def calibration_path(folder: StoreFolder, fingerprint: str) -> Path:
    """Return where the calibration of a model lies.

    Raises:
        ValueError: That is no digest of a fingerprint.
    """
    if not _DIGEST.fullmatch(fingerprint):
        raise ValueError(f"not the digest of a fingerprint: {fingerprint!r}")
    return folder.bases / f"{fingerprint}.json"


def calibrated_bases(folder: StoreFolder) -> set[str]:
    """Return the bases that calibrations and what they measured name.

    Raises:
        IntegrityError: A calibration is damaged.
        FormatError: A newer release wrote one.
    """
    stems = [path.stem for path in folder.bases.glob("*.json")]
    found = [
        read_calibration(folder, stem) for stem in filter(_DIGEST.fullmatch, stems)
    ]
    measured = {basis_of(m.codec) for one in found if one for m in one.measured}
    return {b for b in measured | {one.basis for one in found if one} if b}


def write_calibration(folder: StoreFolder, calibration: Calibration) -> None:
    """Keep a calibration in place of an earlier one of this model."""
    data = calibration_to_bytes(calibration)
    parse_calibration(data, calibration.fingerprint)
    path = calibration_path(folder, calibration.fingerprint)
    files.write_atomic(path, data, folder.staging)


def read_calibration(folder: StoreFolder, fingerprint: str) -> Calibration | None:
    """Return the calibration of a model, or ``None`` where there is none.

    Raises:
        IntegrityError: It is damaged.
        FormatError: A newer release wrote it.
    """
    path = calibration_path(folder, fingerprint)
    try:
        data = files.read_small(path, MAX_CALIBRATION)
    except FileNotFoundError:
        return None
    except (ValueError, EOFError) as error:
        raise IntegrityError(
            f"calibration cannot be read: {error}", path=path
        ) from error
    return parse_calibration(data, fingerprint)


def find_calibration(folder: StoreFolder, fingerprint: str) -> Calibration | None:
    """Return what was measured of a model, or ``None`` where nothing can be read."""
    try:
        return read_calibration(folder, fingerprint)
    except (IntegrityError, FormatError, OSError) as error:
        log.warning("kvstore: what was measured is left out: %s", error)
        return None
