"""Frames in one thread and in several, damaged ones among them."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvstore.codecs.zstd import Zstd


def test_a_damaged_frame_spoils_none_behind_it():
    """What a thread keeps between two frames knows nothing of the first."""
    zstd = Zstd()
    contents = [bytes([n]) * 999 + np.arange(n * 100).tobytes() for n in range(9)]
    for content in contents:
        frame = zstd.compress(memoryview(content))
        damaged = memoryview(frame[:-5] + bytes([frame[-5] ^ 1]) + frame[-4:])
        for broken in (damaged, memoryview(frame)[:-1]):
            with pytest.raises(ValueError, match="zstd"):
                zstd.decompress(broken, len(content))
        assert content == zstd.decompress(memoryview(frame), len(content))


def test_threads_read_frames_at_the_same_time():
    """None gets what another thread reads."""
    zstd = Zstd(finds_matches=False)
    random = np.random.default_rng(0)
    contents = [random.integers(0, 9, 60_000, np.uint8).tobytes() for _ in range(8)]
    frames = [zstd.compress(memoryview(content)) for content in contents]

    def read(number):
        frame = memoryview(frames[number % 8])
        return zstd.decompress(frame, 60_000) == contents[number % 8]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(400)))
