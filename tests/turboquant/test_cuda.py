"""Memory of a CUDA device, by a driver that is played."""

import ctypes

import mlx.core as mx
import pytest

from turboquant.kernels import cuda

MEGABYTE = 1024 * 1024


@pytest.fixture
def driver(monkeypatch):
    """A driver with so many bytes of memory, and what was asked of it."""
    asked = []

    def use(room):
        def allocate(pointer, size):
            asked.append(size.value)
            if size.value > room:
                return 2  # CUDA_ERROR_OUT_OF_MEMORY
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint64))[0] = 4096
            return 0

        found = {"cuMemAlloc_v2": allocate, "cuMemFree_v2": lambda address: 0}
        monkeypatch.setattr(cuda, "_function", lambda name, is_slow: found[name])
        monkeypatch.setattr(cuda, "_make_current", lambda: None)
        monkeypatch.setattr(mx, "clear_cache", lambda: None)
        return asked

    return use


def test_memory_is_had_in_large_pieces(driver):
    """Parts that lie in one piece of it are asked for once."""
    asked = driver(1024 * MEGABYTE)
    upload = cuda.Upload()
    places = [upload._allocate(MEGABYTE) for _ in range(3)]
    assert places == [4096, 4096 + MEGABYTE, 4096 + 2 * MEGABYTE]
    assert asked == [64 * MEGABYTE]


def test_a_small_piece_will_do(driver):
    """Where room is short, no more is taken than must be."""
    asked = driver(10 * MEGABYTE)
    assert cuda.Upload()._allocate(9 * MEGABYTE) == 4096
    assert asked == [64 * MEGABYTE, 64 * MEGABYTE, 9 * MEGABYTE]


def test_no_room_is_an_error_of_memory(driver):
    """It says how much was wanted."""
    driver(MEGABYTE)
    with pytest.raises(MemoryError, match="no room for 2 MB more"):
        cuda.Upload()._allocate(2_000_000)
