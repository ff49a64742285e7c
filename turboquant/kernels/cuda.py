"""Bytes to the memory of a CUDA device, by its driver and through pinned memory.

MLX copies an array from the host page by page, at a twentieth of what the bus can do.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 16
"""Bytes at whose multiples each part begins."""
_NUM_SLOTS = 16
_SLOT_BYTES = 4 * 1024 * 1024
_MAX_SLOT_BYTES = 64 * 1024 * 1024
_CHUNK_BYTES = 64 * 1024 * 1024
# Of the driver: pinned for every context, and a stream that waits for no other.
_PORTABLE, _NON_BLOCKING = 1, 1
_OUT_OF_MEMORY = 2
_QUICK = ("cuCtxSetCurrent", "cuMemcpyHtoDAsync_v2")


class Upload:
    """Bytes that a device is sent, from any thread; they go when this goes.

    Args:
        nbytes: How many are likely.

    Raises:
        OSError: There is no driver.
        MemoryError: The device, or what may be pinned of the host, has no room.
        RuntimeError: The driver refuses otherwise.
    """

    def __init__(self, nbytes: int = 0) -> None:
        self._lock = threading.Lock()
        self._chunk_bytes = max(nbytes, _CHUNK_BYTES)
        self._chunks: list[int] = []
        self._next = self._end = 0
        weakref.finalize(self, _free, self._chunks)

    def send(self, parts: Sequence[NDArray[Any]]) -> list[int]:
        """Copy contiguous arrays, and return the address of each on the device."""
        flat = [part.reshape(-1).view(np.uint8) for part in parts]
        places, size = lay_out(flat)
        address = self._allocate(size)
        for begin in range(0, size, _SLOT_BYTES):
            with _slot() as slot:
                count = gather(flat, places, begin, slot.memory(_SLOT_BYTES))
                slot.copy(address + begin, count)
        return [address + place for place in places]

    def receive(
        self, size: int, read: Callable[[Sequence[memoryview]], None]
    ) -> int | None:
        """Have bytes read into pinned memory; return where they are on the device."""
        if size > _MAX_SLOT_BYTES:
            return None
        with _slot() as slot:
            read([slot.memory(size).data])
            address = self._allocate(aligned(size))
            slot.copy(address, size)
        return address

    def data(self) -> mx.array:
        """Return what kernels are told of it: nothing, since they know addresses."""
        return mx.zeros((1,))

    def _allocate(self, size: int) -> int:
        _make_current()
        with self._lock:
            if self._end - self._next < size:
                more = max(size, self._chunk_bytes)
                self._next, more = _reserve(more, size)
                self._chunks.append(self._next)
                self._end = self._next + more
            address, self._next = self._next, self._next + size
            return address


def aligned(size: int) -> int:
    """Return a number of bytes rounded up to where the next part begins."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def lay_out(parts: Sequence[NDArray[np.uint8]]) -> tuple[list[int], int]:
    """Return where each part begins behind the one before, and where all end."""
    places, end = [], 0
    for part in parts:
        places.append(end)
        end += aligned(part.size)
    return places, end


def gather(
    parts: Sequence[NDArray[np.uint8]],
    places: Sequence[int],
    begin: int,
    out: NDArray[np.uint8],
) -> int:
    """Copy what lies behind ``begin`` as far as it fits, and return how much."""
    end = begin
    for part, place in zip(parts, places, strict=True):
        first, last = max(begin, place), min(begin + out.size, place + part.size)
        if first < last:
            # NumPy would keep the interpreter's lock.
            target = out.ctypes.data + first - begin
            ctypes.memmove(target, part.ctypes.data + first - place, last - first)
            end = last
    return end - begin


class _Slot:
    """Pinned memory that grows to what is asked of it, and a stream to copy by."""

    def __init__(self) -> None:
        self._address = ctypes.c_void_p()
        self._memory = np.empty(0, np.uint8)
        self._stream = ctypes.c_void_p()
        _call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)

    def memory(self, size: int) -> NDArray[np.uint8]:
        """Return so many bytes of it."""
        if size > self._memory.size:
            if self._memory.size:
                self._memory = np.empty(0, np.uint8)
                _call("cuMemFreeHost", self._address)
            more = -(-size // _SLOT_BYTES) * _SLOT_BYTES
            _call("cuMemHostAlloc", ctypes.byref(self._address), more, _PORTABLE)
            pointer = ctypes.cast(self._address, ctypes.POINTER(ctypes.c_uint8))
            self._memory = np.ctypeslib.as_array(pointer, (more,))
        return self._memory[:size]

    def copy(self, target: int, size: int) -> None:
        """Copy its first bytes to an address of the device."""
        _call("cuMemcpyHtoDAsync_v2", target, self._address, size, self._stream)
        _call("cuStreamSynchronize", self._stream)


@contextmanager
def _slot() -> Iterator[_Slot]:
    """Wait for a slot that nobody uses; there are a few, kept for good."""
    _make_current()
    slot = _slots().get()
    try:
        yield slot
    finally:
        _slots().put(slot)


@cache
def _slots() -> queue.SimpleQueue[_Slot]:
    slots: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
    for _ in range(_NUM_SLOTS):
        slots.put(_Slot())
    return slots


def _reserve(nbytes: int, least: int) -> tuple[int, int]:
    """Return memory of the device, and its size: less than wanted where room is short.

    Raises:
        MemoryError: There is not even the least.
    """
    chunk = ctypes.c_uint64()
    for size in (nbytes, nbytes, least):
        with suppress(MemoryError):
            _call("cuMemAlloc_v2", ctypes.byref(chunk), size)
            return chunk.value, size
        mx.clear_cache()  # which MLX keeps of what it has freed
    raise MemoryError(f"the GPU has no room for {least / 1e6:,.0f} MB more")


def _free(chunks: Sequence[int]) -> None:
    if chunks:
        _make_current()
    for chunk in chunks:
        _call("cuMemFree_v2", chunk)


def _make_current() -> None:
    """Have this thread use the context that MLX uses."""
    if not getattr(_thread, "is_current", False):
        _call("cuCtxSetCurrent", _context())
        _thread.is_current = True


_thread = threading.local()


@cache
def _context() -> ctypes.c_void_p:
    context = ctypes.c_void_p()
    _call("cuInit", 0)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    return context


@cache
def _function(name: str, is_slow: bool) -> Any:
    # Letting go of the interpreter's lock and waiting for it takes longer than most.
    return getattr((ctypes.CDLL if is_slow else ctypes.PyDLL)("libcuda.so.1"), name)


def _call(name: str, *arguments: Any) -> None:
    # Numbers are addresses and sizes, of 64 bits.
    wide = [ctypes.c_uint64(a) if isinstance(a, int) else a for a in arguments]
    code = _function(name, name not in _QUICK)(*wide)
    if code == _OUT_OF_MEMORY:
        raise MemoryError(f"CUDA's driver: {name} finds no memory")
    if code:
        raise RuntimeError(f"CUDA's driver: {name} gives error {code}")
