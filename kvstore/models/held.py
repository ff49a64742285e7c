"""Samples of contexts, held in files while a basis is fitted to them. Knows no model.

A context takes minutes on a large model, so that its samples stay in the store's
``tmp`` where a run is stopped: the next one finds them. Others take what lies there for
forgotten when no run has looked at it for an hour.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import blake3
import numpy as np

from ..codecs.dtypes import NUMPY_DTYPES
from ..codecs.fitting import Sample
from ..codecs.floats import narrow
from ..errors import KVStoreError
from ..format.documents import JSON, canonical_json
from ..storage import files

# To be raised when the same context gets other samples, or a file holds them otherwise.
_FORMAT = 1
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Outline:
    """What the sample of some layers is like; its first token is at position 0."""

    # safetensors name of the element type.
    dtype: str
    # Of the rows, and of each gradient.
    shape: tuple[int, ...]
    num_gradients: int

    @property
    def dtypes(self) -> list[np.dtype[np.generic]]:
        """Element types of the rows and of gradients of 16 bits, as NumPy has them."""
        types = [NUMPY_DTYPES[self.dtype], *[np.uint16] * self.num_gradients]
        return [np.dtype(each) for each in types]

    @property
    def nbytes(self) -> int:
        """What it takes in a file."""
        return math.prod(self.shape) * sum(each.itemsize for each in self.dtypes)


class HeldSamples:
    """Holds samples, of which those with the same names are computed once.

    Args:
        staging: Where their files stay until they are removed. By default the files
            have no names, and are gone with the process.
        about: What all samples depend on.
    """

    def __init__(self, staging: Path | None = None, about: JSON | None = None) -> None:
        self._staging, self._about = staging, about
        self._paths: list[Path] = []

    def get(
        self,
        which: JSON,
        outlines: Sequence[Outline],
        compute: Callable[[], Sequence[Sample]],
    ) -> list[Sample]:
        """Return the samples of a context, their gradients in 16 bits.

        Args:
            which: What these samples depend on.
            outlines: What they are like.
            compute: Returns them; called where no earlier run has left them whole.

        Raises:
            KVStoreError: The disk is full.
            OSError: It fails.
        """
        if self._staging is None:
            return _parse(_hold_nameless(compute()), outlines)
        about = [_FORMAT, self._about, which, [astuple(each) for each in outlines]]
        key = blake3.blake3(canonical_json(about)).digest()
        path = self._staging / f"{key.hex()}.samples"
        self._paths.append(path)
        found = _find(path, key, outlines)
        return _parse(found or _write(path, key, outlines, compute()), outlines)

    def remove(self) -> None:
        """Remove the files; those that cannot be are forgotten in an hour."""
        for path in self._paths:
            with suppress(OSError):
                path.unlink()

    def touch(self) -> None:
        """Let nobody take the files of a long run for forgotten; call it often."""
        for path in self._paths:
            with suppress(OSError):
                os.utime(path)


def _find(path: Path, key: bytes, outlines: Sequence[Outline]) -> mmap.mmap | None:
    """Return what a file holds, or ``None`` where it is not there or damaged."""
    try:
        descriptor, size = files.open_regular(path)
    except OSError:
        return None
    try:
        nbytes = sum(outline.nbytes for outline in outlines)
        if size != nbytes + _DIGEST_BYTES:
            return None
        found = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    with memoryview(found) as data:
        is_whole = blake3.blake3(data[:nbytes], key=key).digest() == data[nbytes:]
    return found if is_whole else None


def _write(
    path: Path, key: bytes, outlines: Sequence[Outline], samples: Sequence[Sample]
) -> mmap.mmap:
    """Write samples, and behind them a digest of them and their name."""
    buffers = _buffers(samples)
    digest = blake3.blake3(key=key)
    for buffer in buffers:
        digest.update(buffer)
    hint = "free some space and run it again to go on, or delete `*.samples` there"
    with (
        _told_where(path.parent, hint),
        files.staged(path.parent) as (staged, descriptor),
    ):
        files.write_all(descriptor, *buffers, digest.digest())
        files.sync(descriptor)
        # Once it has its name, a purge may take it.
        found = _find(staged, key, outlines)
        if found is None:
            raise OSError(errno.EIO, "reads otherwise than it was written", str(path))
        files.publish(staged, path)
    return found


def _hold_nameless(samples: Sequence[Sample]) -> mmap.mmap:
    """Write samples to a file that has no name, and return what it holds."""
    folder = Path(tempfile.gettempdir())
    with (
        _told_where(folder, "free some space, or choose a larger folder by `$TMPDIR`"),
        tempfile.TemporaryFile(dir=folder, buffering=0) as file,
    ):
        files.write_all(file.fileno(), *_buffers(samples))
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@contextmanager
def _told_where(folder: Path, hint: str) -> Iterator[None]:
    """Say which folder is too small, and what can be done."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise KVStoreError(
            f"no room for what is learned from: {folder}", hint=hint
        ) from error


def _buffers(samples: Sequence[Sample]) -> list[memoryview]:
    """Return rows and gradients as they are written."""
    arrays = []
    for sample in samples:
        drawn = (each.astype(np.float32) for each in sample.gradients)
        arrays += [sample.x, *(narrow(each, "BF16") for each in drawn)]
    return [np.ascontiguousarray(array).data.cast("B") for array in arrays]


def _parse(data: mmap.mmap, outlines: Sequence[Outline]) -> list[Sample]:
    """Return the samples in a file, which stay there."""
    offset, found = 0, []
    for outline in outlines:
        arrays = []
        for dtype in outline.dtypes:
            count = math.prod(outline.shape)
            flat = np.frombuffer(data, dtype, count, offset)
            arrays.append(flat.reshape(outline.shape))
            offset += flat.nbytes
        found.append(Sample(0, outline.dtype, arrays[0], tuple(arrays[1:])))
    return found
