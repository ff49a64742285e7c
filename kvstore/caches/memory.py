"""The memory of MLX's arrays: how much, seen by whom, cleared by nobody."""

from __future__ import annotations

import ctypes
import io
import json
import math
import mmap
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from struct import pack
from typing import Any, BinaryIO, cast

import mlx.core as mx
import numpy as np

from ..codecs.parallel import NUM_THREADS

_SIZES = {"U8": 1, "U16": 2, "F16": 2, "F32": 4, "U32": 4, "I32": 4, "I64": 8}
_LARGE_PAGE = 2 * 1024 * 1024
# Of all arrays: less would not fill its last page well.
_MIN_BYTES = 32 * 1024 * 1024
# The most that a large page may take.
_MAX_S = 0.001
# Linux has them from 5.14 and 6.1 on, and Python no names for them.
_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25
# As glibc's malloc.h has it.
_M_ARENA_MAX = -8


def memory_bytes() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def share_heap() -> None:
    """Have all threads to come take memory from one heap, where glibc has several.

    What one thread frees, another takes then. Else rows that the disk has taken leave
    holes in the heap of whoever copied them, beside those of the rows that a server
    has let go of: half a prompt cache's limit, on a busy machine.
    """
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def is_shared() -> bool:
    """Whether NumPy sees the memory of MLX's arrays."""
    return bool(mx.default_device() == mx.cpu or _shares_memory())


@cache
def _shares_memory() -> bool:
    """Whether a Mac's GPU sees what NumPy writes into an evaluated array.

    MLX promises a view, and unified memory does the rest. It is tried once all the
    same, since a copy would leave a prompt cache of zeros.
    """
    if not mx.metal.is_available():
        return False
    array = mx.zeros((4096,), mx.uint16)
    mx.eval(array)
    np.asarray(array)[...] = 1
    return bool(mx.all(array == 1).item())


def uninitialised(
    shapes: Mapping[str, tuple[tuple[int, ...], str]],
) -> dict[str, mx.array]:
    """Return arrays of whatever their memory held; the caller writes all of it.

    MLX has no function for them: its `empty` gives zeros. But the arrays that it loads
    from a file are filled by the file alone, and the one here writes nothing.
    Clearing them first would take as long as reading them from a disk does: each page
    is given to the process when it is first touched, here by the decoding threads.

    Args:
        shapes: Of each array its shape and the safetensors name of its dtype.
    """
    tensors: dict[str, Any] = {}
    end = 0
    for name, (shape, dtype) in shapes.items():
        begin, end = end, end + math.prod(shape) * _SIZES[dtype]
        tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(tensors).encode()
    file = _Unread(pack("<Q", len(header)) + header, end)
    loaded = mx.load(cast(BinaryIO, file), format="safetensors", stream=mx.cpu)
    assert isinstance(loaded, dict)
    mx.eval(loaded)
    if end >= _MIN_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        _take_memory(loaded.values())
    return loaded


def _take_memory(arrays: Iterable[mx.array]) -> None:
    """Have the system give the arrays their memory in a few calls, not page by page.

    Page by page, that takes longer than decoding does. On Linux only.
    """
    spans = [_span(array) for array in arrays]
    largest = max(spans, key=lambda span: span[1] - span[0], default=(0, 0))
    if _try_large_page(*largest):
        # Before threads take memory: whoever asks has to wait for them.
        for begin, end in spans:
            if not _ask_for_large_pages(begin, end):
                break
    parts = (spans[i::NUM_THREADS] for i in range(NUM_THREADS))
    with ThreadPoolExecutor(NUM_THREADS, "kvstore-memory") as pool:
        list(pool.map(_take_spans, parts))


def _span(array: mx.array) -> tuple[int, int]:
    """Return the addresses where an array begins and ends."""
    begin = np.asarray(array).ctypes.data
    return begin, begin + array.nbytes


def _try_large_page(begin: int, end: int) -> bool:
    """Take one large page, and say whether it came quickly.

    One of 2 MB is as fast as 20 of 4 kB; but a virtual machine may have given large
    ones back, and then each takes as long as 2,000.
    """
    first = begin + -begin % _LARGE_PAGE
    last = first + _LARGE_PAGE
    if last > end:
        return False
    began = time.thread_time()
    _advise(first, last, mmap.MADV_HUGEPAGE)
    _advise(first, last, _MADV_POPULATE_WRITE)
    return time.thread_time() - began < _MAX_S


def _ask_for_large_pages(begin: int, end: int) -> bool:
    """Ask for large pages, take the first, and say whether that went quickly."""
    first, last = (at - at % _LARGE_PAGE for at in (begin, end))
    began = time.thread_time()
    _advise(first, last, mmap.MADV_HUGEPAGE)
    # A small page is there: the allocator has written before the array.
    _advise(first, first + _LARGE_PAGE, _MADV_COLLAPSE)
    return time.thread_time() - began < _MAX_S


def _take_spans(spans: Sequence[tuple[int, int]]) -> None:
    is_quick = True
    for begin, end in spans:
        begin -= begin % mmap.PAGESIZE
        if not is_quick:  # any more
            _advise(begin, end, mmap.MADV_NOHUGEPAGE)
        began = time.thread_time()
        _advise(begin, end, _MADV_POPULATE_WRITE)
        seconds = time.thread_time() - began
        is_quick = is_quick and seconds < _MAX_S * (1 + (end - begin) / _LARGE_PAGE)


def _advise(begin: int, end: int, advice: int) -> None:
    """Advise the system, which may refuse it."""
    if end > begin:
        size = ctypes.c_size_t(end - begin)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), size, ctypes.c_int(advice))


class _Unread(io.RawIOBase):
    """A file that has a beginning; reading the rest leaves the buffer as it is."""

    def __init__(self, beginning: bytes, num_rest: int) -> None:
        self._beginning = beginning
        self._size = len(beginning) + num_rest
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        known = self._beginning[self._at : self._at + len(buffer)]
        memoryview(buffer)[: len(known)] = known
        self._at += len(buffer)
        return len(buffer)
