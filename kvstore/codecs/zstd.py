"""Zstandard frames with a checksum and a declared size."""

from __future__ import annotations

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

    def compress(self, data: memoryview) -> bytes:
        """Return one frame."""
        compressor = zstandard.ZstdCompressor(
            level=LEVEL, write_checksum=True, write_content_size=True
        )
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
            decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
            return decompressor.decompress(data, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ValueError(f"bad zstd frame: {error}") from error
