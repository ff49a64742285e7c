"""Bytes to the memory of a GPU and back, through a little pinned memory.

MLX copies an array page by page, at a twentieth of what the bus can do. A kernel that
reads memory which the system may not move needs no more than the bus does. Where such
memory cannot be had, MLX copies after all.
"""

from __future__ import annotations

import ctypes
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from turboquant.kernels import gpu

Bytes = NDArray[np.uint8]
ALIGNMENT = 16
"""Bytes at whose multiples each part begins."""
_SLOT_BYTES = 8 * 1024 * 1024
_NUM_SLOTS = 8
# Of cuMemHostAlloc: for every context, and at one address for host and device.
_PORTABLE_AND_MAPPED = 3


class _Slot(NamedTuple):
    """A piece of pinned memory."""

    memory: Bytes
    # Where it is, or 0 where it is not pinned.
    address: int


def send(parts: Sequence[NDArray[Any]]) -> tuple[list[mx.array], list[int]]:
    """Copy arrays to the GPU, from any thread; back when they are there.

    Args:
        parts: Contiguous arrays.

    Returns:
        Arrays of bytes, to be joined, and where in them each part begins.
    """
    flat = [part.reshape(-1).view(np.uint8) for part in parts]
    places, end = [], 0
    for part in flat:
        places.append(end)
        end += -(-part.size // ALIGNMENT) * ALIGNMENT
    pieces, slots = [], _slots()
    for begin in range(0, end, _SLOT_BYTES):
        size = min(_SLOT_BYTES, end - begin)
        slot = slots.get()
        try:
            for part, place in zip(flat, places, strict=True):
                first, last = max(begin, place), min(begin + size, place + part.size)
                if first < last:
                    part_of = part[first - place : last - place]
                    slot.memory[first - begin : last - begin] = part_of
            pieces.append(_sender().submit(_fetch, slot, size).result())
        finally:
            slots.put(slot)
    return pieces, places


def _fetch(slot: _Slot, size: int) -> mx.array:
    """Return the first bytes of a slot as an array of the GPU's."""
    if not slot.address:
        return mx.array(slot.memory[:size].view(np.uint64))
    with mx.stream(_stream()):
        fetched = gpu.fetch(slot.address, size)
        mx.eval(fetched)
        mx.synchronize(_stream())
    return fetched


@cache
def _sender() -> ThreadPoolExecutor:
    """Return the one thread that starts copies: MLX's streams belong to a thread."""
    return ThreadPoolExecutor(1, "turboquant-sender")


@cache
def _stream() -> mx.Stream:
    return mx.new_stream(mx.gpu)


@cache
def _slots() -> queue.SimpleQueue[_Slot]:
    """Return slots to be taken from and put back to."""
    slots: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
    size = _SLOT_BYTES * _NUM_SLOTS
    address = _pin(size) if gpu.can("restore") and mx.cuda.is_available() else 0
    if address:
        pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
        memory = np.ctypeslib.as_array(pointer, (size,))
    else:
        memory = np.empty(size, np.uint8)
    for begin in range(0, size, _SLOT_BYTES):
        place = address + begin if address else 0
        slots.put(_Slot(memory[begin : begin + _SLOT_BYTES], place))
    return slots


def _pin(size: int) -> int:
    """Return the address of pinned memory that is kept for good; 0 for none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    context, address = ctypes.c_void_p(), ctypes.c_void_p()
    if cuda.cuInit(0) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0):
        return 0
    if cuda.cuCtxPushCurrent_v2(context):
        return 0
    failed = cuda.cuMemHostAlloc(
        ctypes.byref(address), ctypes.c_size_t(size), _PORTABLE_AND_MAPPED
    )
    cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
    return 0 if failed else address.value or 0
