"""One small JSON file per entry; renaming it into place is what commits a save.

Knows nothing of blocks but the hash of the last one.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import blake3

from . import files
from .errors import FormatError, IntegrityError
from .hashing import canonical_json
from .safetensors_header import strict_json
from .types import JSON, Entry

FORMAT = 1
MAX_BYTES = 65_536
_ID = re.compile(r"[0-9a-f]{32}")
_HASH = re.compile(r"[0-9a-f]{64}")
_STAMPED = {"created_at", "updated_at"}


def entry_id(name: str | None, tip: str) -> str:
    """Return the id of an entry: a name's own, or its tip's where it has none."""
    text = f"tip {tip}" if name is None else f"name {name}"
    # What is no text, an argument of odd bytes say, names nothing that there is.
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]


def entry_path(folder: Path, entry: str) -> Path:
    """Return where the entry with this id lies."""
    return folder / f"{entry}.json"


def write_entry(folder: Path, entry: Entry, staging: Path) -> None:
    """Commit an entry durably."""
    body: JSON = {"format": FORMAT, **asdict(entry)}
    body["digest"] = _digest(body)
    files.write_atomic(entry_path(folder, entry.id), canonical_json(body), staging)


def read_entry(folder: Path, entry: str) -> Entry | None:
    """Return the entry with this id, or ``None``.

    Raises:
        IntegrityError: Its file is damaged.
        FormatError: It has a format we do not read.
    """
    path = entry_path(folder, entry)
    try:
        data = files.read_small(path, MAX_BYTES)
    except FileNotFoundError:
        return None
    except (ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from error
    return _parse(path, data)


def list_ids(folder: Path) -> list[str]:
    """Return the ids of all entries, sorted."""
    stems = (path.stem for path in folder.glob("*.json"))
    return sorted(stem for stem in stems if _ID.fullmatch(stem))


def remove_entry(folder: Path, entry: str) -> None:
    """Remove an entry's file durably."""
    files.remove(entry_path(folder, entry))


def _digest(body: JSON) -> str:
    return str(blake3.blake3(canonical_json(body)).hexdigest())


def _damaged(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"entry file is damaged: {path}: {why}",
        path=path,
        hint="save it again; the blocks it named are still in the store",
    )


def _parse(path: Path, data: bytes) -> Entry:
    """Return the entry that ``data`` spells, having checked its digest."""
    try:
        body = strict_json(data, allow_floats=True)
        digest, form = body.pop("digest"), body.pop("format")
        rest = {"format": form, **body}
        # To the byte as it was written: JSON can be spelled in several ways.
        is_whole = data == canonical_json({"digest": digest, **rest})
        is_right = digest == _digest(rest)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(path, "not an entry") from error
    if not (is_whole and is_right) or type(form) is not int:
        raise _damaged(path, "digest mismatch")
    if form != FORMAT:
        raise FormatError(
            f"entry has format {form}, this release reads {FORMAT}: {path}",
            hint="upgrade mlx-kvstore",
        )
    return _build(path, body)


def _build(path: Path, body: JSON) -> Entry:
    """Return an :class:`Entry`, having checked names and types of all fields."""
    if set(body) != {field.name for field in fields(Entry)}:
        raise _damaged(path, "unexpected fields")
    if not all(_fits(name, value) for name, value in body.items()):
        raise _damaged(path, "a field has the wrong type")
    if body["id"] != path.stem:
        raise _damaged(path, f"holds the entry {body['id']}")
    return Entry(**body)


def _fits(name: str, value: Any) -> bool:
    """Say whether ``value`` is of the type that the field ``name`` has."""
    if name == "name":
        return value is None or isinstance(value, str)
    if name == "pinned":
        return isinstance(value, bool)
    if name in _STAMPED:
        return type(value) in (float, int)
    if name in ("num_tokens", "nbytes"):
        return type(value) is int and value > 0
    if name == "made_with":
        return isinstance(value, dict) and all(
            isinstance(text, str) for text in value.values()
        )
    if name in ("tip", "root"):
        return isinstance(value, str) and _HASH.fullmatch(value) is not None
    return isinstance(value, str)
