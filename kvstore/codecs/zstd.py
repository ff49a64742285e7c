"""Zstandard frames with a checksum and a declared size."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import ClassVar

import zstandard

# Level 1: on bit-packed codes, higher levels give larger frames and take longer.
LEVEL = 1
MAX_WINDOW_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Zstd:
    """One frame per array."""

    name: ClassVar[str] = "zstd"
    # Whether repetitions are looked for; what reads a frame need not know.
    finds_matches: bool = True

    def compress(self, data: memoryview) -> bytes:
        """Return one frame."""
        if self.finds_matches:
            compressor = zstandard.ZstdCompressor(
                level=LEVEL, write_checksum=True, write_content_size=True
            )
        else:
            compressor = zstandard.ZstdCompressor(compression_params=_entropy_only())
        return compressor.compress(data)

    def decompress(self, data: memoryview, nbytes: int) -> bytes:
        """Return the content of one frame of exactly ``nbytes``.

        Raises:
            ValueError: It is no such frame.
        """
        try:
            # The declared size is allocated at once, whatever limit is set.
            if zstandard.frame_content_size(data) != nbytes:
                raise ValueError("zstd frame of another size than its header says")
            return _decompressor().decompress(data, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ValueError(f"bad zstd frame: {error}") from error


_own = threading.local()


def _decompressor() -> zstandard.ZstdDecompressor:
    """Return this thread's, whose tables take longer to set up than a small frame."""
    found: zstandard.ZstdDecompressor | None = getattr(_own, "decompressor", None)
    if found is None:
        found = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        _own.decompressor = found
    return found


def _entropy_only() -> zstandard.ZstdCompressionParameters:
    """Return parameters with which hardly a repetition is found."""
    return zstandard.ZstdCompressionParameters.from_level(
        LEVEL,
        min_match=7,
        hash_log=6,
        chain_log=6,
        window_log=17,
        write_checksum=True,
        write_content_size=True,
    )
