"""The strict check that a safetensors header passes before anyone else reads it.

MLX's reader accepts overlaps, holes, duplicate keys and wrapped shapes, and the
safetensors library spends seconds on a million empty tensors. Nothing here trusts
the bytes: every limit is checked before anything is allocated.
"""

from __future__ import annotations

import math
import re
from typing import Any

from .documents import _SURROGATE, JSON, are_integers, strict_json

MAX_HEADER_BYTES = 4 * 1024 * 1024
MAX_TENSORS = 4096
MAX_DIMENSIONS = 8
ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_FIELDS = {"dtype", "shape", "data_offsets"}
_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


def parse_header(header: bytes, data_nbytes: int | None) -> tuple[dict[str, Any], JSON]:
    """Return the tensors and the metadata that a header describes.

    Args:
        header: The JSON text, without the length in front of it.
        data_nbytes: Bytes that follow the header in the file, if that is known.

    Returns:
        Name to ``(dtype, shape, begin, end)`` in the order of the bytes, and the
        string-to-string metadata.

    Raises:
        ValueError: Anything is not exactly as the format says.
    """
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"header of {len(header)} bytes, more than {MAX_HEADER_BYTES}")
    tensors = strict_json(header, allow_floats=False)
    if not isinstance(tensors, dict):
        raise ValueError("header is not an object")
    metadata = tensors.pop("__metadata__", {})
    if not _is_text_map(metadata):
        raise ValueError("metadata is not a map from text to text")
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"{len(tensors)} tensors, more than {MAX_TENSORS}")
    checked = {name: _check_tensor(name, spec) for name, spec in tensors.items()}
    ordered = dict(sorted(checked.items(), key=lambda item: item[1][2:]))
    _check_coverage(ordered, data_nbytes)
    return ordered, metadata


def _is_text_map(value: Any) -> bool:
    if not isinstance(value, dict) or not all(map(_is_text, value.values())):
        return False
    return all(map(_is_text, value))


def _is_text(value: Any) -> bool:
    # JSON can spell half a character, which is no text.
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))


def _check_tensor(name: str, spec: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not _NAME.fullmatch(name):
        raise ValueError("a tensor's name has other characters than A-Za-z0-9._-")
    if not isinstance(spec, dict) or spec.keys() != _FIELDS:
        raise ValueError(f"tensor {name} has other fields than it should")
    dtype, shape, offsets = spec["dtype"], spec["shape"], spec["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise ValueError(f"tensor {name} has an unknown dtype")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} has a bad shape")
    if not are_integers(shape, 0, 2**31):
        raise ValueError(f"tensor {name} has a bad shape")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"tensor {name} has bad offsets")
    if not are_integers(offsets, 0, 2**63):
        raise ValueError(f"tensor {name} has bad offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
        raise ValueError(f"tensor {name} has offsets that do not fit its shape")
    return dtype, tuple(shape), begin, end


def _check_coverage(tensors: dict[str, Any], data_nbytes: int | None) -> None:
    """Refuse holes, overlaps and trailing bytes."""
    position = 0
    for name, (_, _, begin, end) in tensors.items():
        if begin != position:
            raise ValueError(f"tensor {name} overlaps another or leaves a hole")
        position = end
    if data_nbytes not in (position, None):
        raise ValueError(f"tensors end at byte {position}, the data at {data_nbytes}")
