"""Canonical JSON and strict JSON."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import blake3


def canonical_json(value: Any) -> bytes:
    """Return the one JSON encoding of ``value``: sorted keys, no white space.

    Raises:
        ValueError: ``value`` holds NaN or an infinity.
    """
    text = json.dumps(
        value,
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=True,
        allow_nan=False,
    )
    return text.encode()


MAX_NESTING = 64
_SURROGATE = re.compile("[\ud800-\udfff]")
_BRACKETS = bytes.maketrans(b"{}", b"[]")
# What may stand behind a backslash, which is not to touch a later quote; where anything
# else does, the parser goes no further.
_ESCAPED = b"\\/bfnrtu"
_NO_MARKS = bytes(set(range(256)).difference(b'[]{}"', _ESCAPED))


def strict_json(text: bytes | str, *, allow_floats: bool) -> Any:
    """Parse JSON, refusing duplicate keys, NaN, infinities and deep nesting.

    A ``RecursionError`` is the caller's, who stands too deep himself: it is no reason
    to call the text damaged.

    Raises:
        ValueError: The text is not such JSON.
    """
    text = text if isinstance(text, str) else text.decode("utf-8")
    _refuse_deep(text)
    return json.loads(
        text,
        object_pairs_hook=_unique,
        parse_constant=_refuse,
        parse_float=_finite if allow_floats else _refuse,
    )


def _refuse_deep(text: str) -> None:
    """Refuse brackets in more than so many others, before a parser follows them."""
    marks = text.encode(errors="replace").translate(_BRACKETS, _NO_MARKS)
    # Without escaped quotes, every second part between quotes is no string.
    plain = marks.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]
    rest = b"".join(plain).translate(None, _ESCAPED)
    for _ in range(MAX_NESTING):
        if b"[]" not in rest:
            break
        rest = rest.replace(b"[]", b"")  # the innermost
    if b"[]" in rest or rest.count(b"[") > MAX_NESTING:
        raise ValueError("nested too deeply")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, refusing a key that comes twice."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("duplicate key")
    return value


def _refuse(text: str) -> Any:
    raise ValueError(f"number not allowed here: {text[:40]}")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def is_count(value: Any, limit: int = 2**63) -> bool:
    """Whether ``value`` is an integer from 0 to below ``limit``."""
    return type(value) is int and 0 <= value < limit


MAX_AMOUNT = 1e6
"""No number that was measured may be larger."""


def is_amount(value: Any) -> bool:
    """Whether ``value`` is a number that somebody may have measured, from 0 on."""
    return type(value) in (float, int) and 0 <= value <= MAX_AMOUNT


def are_integers(values: list[Any], low: int, limit: int) -> bool:
    """Whether all of ``values`` are integers from ``low`` to below ``limit``."""
    # Without a loop in Python, since a header has thousands.
    is_int = {int}.issuperset(map(type, values))
    return is_int and (not values or low <= min(values) <= max(values) < limit)


def blake3_hex(*buffers: bytes | memoryview) -> str:
    """Return the BLAKE3 of some bytes, one buffer after the other."""
    digest = blake3.blake3()
    for buffer in buffers:
        digest.update(buffer)
    return digest.hexdigest()


JSON = dict[str, Any]
"""A JSON object."""
