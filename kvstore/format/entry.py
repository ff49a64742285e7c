"""An entry and its JSON; what may be a name."""

from __future__ import annotations

import hashlib
import re
import time
import unicodedata
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import blake3

from ..errors import ArgumentError, FormatError, IntegrityError
from .calibration import Measured, parse_measured
from .documents import JSON, canonical_json, strict_json
from .probe import Probe, parse_probe

MAX_NAME = 200
MAX_LABEL = 1000
MAX_TITLE = 80
ADOPTED = "adopted from"
"""What an entry that was taken over says in ``made_with``: from which model."""
RECOMPRESSED = "recompressed from"
"""What an entry that was recompressed says there: the codecs of its blocks before."""
JOINERS = "\u200c\u200d"
"""Of Persian, of Hindi, and of emoji: part of a text, though nothing is printed."""


def make_entry(
    old: Entry | None,
    *,
    name: str | None,
    tip: str,
    root: str,
    num_tokens: int,
    nbytes: int,
    codec: str,
    model: str,
    title: str = "",
    receipts: tuple[Measured, ...] = (),
) -> Entry:
    """Return an entry saved now, in place of ``old`` where there is one."""
    now = time.time()
    return Entry(
        id=entry_id(name, tip),
        name=None if name is None else normalize_name(name),
        tip=tip,
        root=root,
        num_tokens=num_tokens,
        nbytes=nbytes,
        codec=codec,
        model=model[:MAX_LABEL],
        made_with=_versions(),
        created_at=old.created_at if old else now,
        updated_at=now,
        pinned=old.pinned if old else False,
        title=clean_title(title),
        receipts=receipts,
    )


def clean_title(text: str) -> str:
    """Return the first words of a text, on one line that any terminal can show.

    Args:
        text: Anything. At most 80 characters of it are taken.
    """
    # A reader may be far behind the first words of a book.
    words = " ".join(text[: 20 * MAX_TITLE].split())
    shown = "".join(c for c in words if c.isprintable() or c in JOINERS)
    if len(shown) <= MAX_TITLE:
        return shown
    start = shown[: MAX_TITLE - 1]
    # A word is cut only where it is most of the title.
    whole = start.rpartition(" ")[0]
    return f"{whole if len(whole) * 2 > len(start) else start}…"


def normalize_name(name: str) -> str:
    """Return the one spelling of a name: Unicode's NFC, which keyboards give."""
    return unicodedata.normalize("NFC", name)


def check_ref(ref: object) -> None:
    """Refuse what names no entry.

    Raises:
        ArgumentError: It is no text.
    """
    if not isinstance(ref, str):
        raise ArgumentError(
            f"a name is text, and no {type(ref).__name__}: {ref!r:.80}",
            hint="`entry.name` or `entry.id`, or the start of that",
        )


def check_name(name: str | None) -> None:
    """Refuse names that could not be typed or printed.

    Raises:
        ArgumentError: It is one.
    """
    if name is None:
        return
    check_ref(name)
    if _ID.fullmatch(name):
        raise ArgumentError(
            f"a name is not like an id, 32 hex digits: {name!r}",
            hint="choose another name",
        )
    if not name or len(name) > MAX_NAME or not name.isprintable() or name[0] == "-":
        raise ArgumentError(
            f"a name has 1 to {MAX_NAME} printable characters and does not start"
            f" with `-`: {name!r}",
            hint="choose another name",
        )


def _versions() -> dict[str, str]:
    """Return the versions that an entry records; advisory."""
    # Imported here: it takes as long as listing a thousand entries.
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for distribution in ("mlx-kvstore", "mlx", "mlx-lm"):
        # A package whose METADATA is missing is told in other ways by other releases.
        with suppress(PackageNotFoundError, OSError, KeyError):
            found[distribution] = version(distribution)
    # Or it has `None` for a version.
    return {name: text for name, text in found.items() if isinstance(text, str)}


@dataclass(frozen=True, slots=True)
class Entry:
    """A saved prompt cache: a name, or none, that points at its last block."""

    # 32 hex digits, derived from the name, or from the tip without one.
    id: str
    # The name, or ``None``.
    name: str | None
    # Hash of the last block in hex.
    tip: str
    # Hash that the first block has as parent, in hex.
    root: str
    # Tokens held.
    num_tokens: int
    # Bytes of its blocks in the store, shared ones included.
    nbytes: int
    # The codec asked for when it was saved.
    codec: str
    # What the model was called; advisory.
    model: str
    # Versions of kvstore, mlx and mlx-lm; advisory.
    made_with: dict[str, str]
    # When the name was first saved, Unix seconds.
    created_at: float
    # When it was last saved, Unix seconds.
    updated_at: float
    # It is never evicted.
    pinned: bool = False
    # The first words of the first message, or nothing where nobody knew them.
    title: str = ""
    # What its lossy codecs were measured to do; nothing where one was not.
    receipts: tuple[Measured, ...] = ()
    # What was measured of itself, where that was asked for.
    probe: Probe | None = None
    # The public key that signed it where it came from, in hex, or nothing.
    signer: str = ""

    def is_called(self, name: str) -> bool:
        """Whether this is its name, however its letters are composed."""
        return self.name == normalize_name(name)


FORMAT = 1
MAX_BYTES = 65_536
_ID = re.compile(r"[0-9a-f]{32}")
_HASH = re.compile(r"[0-9a-f]{64}")
_STAMPED = {"created_at", "updated_at"}
_OPTIONAL = {"title", "receipts", "probe", "signer"}
_MAX_RECEIPTS = 32


def is_id(text: str) -> bool:
    """Whether a text has the form of an entry's id."""
    return _ID.fullmatch(text) is not None


def entry_id(name: str | None, tip: str) -> str:
    """Return the id of an entry: a name's own, or its tip's where it has none."""
    text = f"tip {tip}" if name is None else f"name {normalize_name(name)}"
    # What is no text, an argument of odd bytes say, names nothing that there is.
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]


def _digest(body: JSON) -> str:
    return str(blake3.blake3(canonical_json(body)).hexdigest())


def damaged_entry(path: Path, why: str) -> IntegrityError:
    """Return the error for an entry that cannot be read."""
    return IntegrityError(
        f"entry file is damaged: {path}: {why}",
        path=path,
        hint="save it again; the blocks it named are still in the store",
    )


def entry_to_bytes(entry: Entry) -> bytes:
    """Return an entry as canonical JSON with a digest of itself."""
    body: JSON = {"format": FORMAT, **asdict(entry)}
    for name in _OPTIONAL:
        if not body[name]:
            del body[name]
    return canonical_json({"digest": _digest(body), **body})


def parse_entry(path: Path, data: bytes, entry_id: str | None = None) -> Entry:
    """Return the entry that ``data`` spells, having checked its digest.

    Args:
        path: The file that it was read from.
        data: Its bytes.
        entry_id: The id that it must have; the stem of the file by default.

    Raises:
        IntegrityError: It is damaged.
        FormatError: It has a format we do not read.
    """
    try:
        body = strict_json(data, allow_floats=True)
        digest, form = body.pop("digest"), body.pop("format")
        rest = {"format": form, **body}
        # To the byte as it was written: JSON can be spelled in several ways.
        is_whole = data == canonical_json({"digest": digest, **rest})
        is_right = digest == _digest(rest)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise damaged_entry(path, "not an entry") from error
    if not (is_whole and is_right) or type(form) is not int:
        raise damaged_entry(path, "digest mismatch")
    if form != FORMAT:
        raise FormatError(
            f"entry has format {form}, this release reads {FORMAT}: {path}",
            hint="upgrade mlx-kvstore",
        )
    return _build(path, body, entry_id or path.stem)


def _build(path: Path, body: JSON, entry_id: str) -> Entry:
    """Return an :class:`Entry`, having checked names and types of all fields."""
    if body.keys() | _OPTIONAL != {field.name for field in fields(Entry)}:
        raise damaged_entry(path, "unexpected fields")
    if not all(_fits(name, value) for name, value in body.items()):
        raise damaged_entry(path, "a field has the wrong type")
    if body["id"] != entry_id:
        raise damaged_entry(path, f"holds the entry {body['id']}")
    return to_entry(body)


def to_entry(body: JSON) -> Entry:
    """Return an entry from its fields in JSON, which were checked."""
    probe = parse_probe(body["probe"]) if "probe" in body else None
    receipts = _receipts(body.get("receipts", []))
    return Entry(**body | {"receipts": receipts, "probe": probe})


def _receipts(found: list[JSON]) -> tuple[Measured, ...]:
    return tuple(map(parse_measured, found))


def _are_receipts(value: Any) -> bool:
    """Whether a value lists what was measured, each codec once and in order."""
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_RECEIPTS:
        return False
    try:
        codecs = [one.codec for one in _receipts(value)]
    except (ValueError, TypeError):
        return False
    return codecs == sorted(set(codecs))


def _is_probe(value: Any) -> bool:
    try:
        return isinstance(value, dict) and parse_probe(value) is not None
    except (ValueError, TypeError):
        return False


def _fits(name: str, value: Any) -> bool:
    """Whether ``value`` is of the type that the field ``name`` has."""
    if name == "name":
        return value is None or isinstance(value, str)
    if name == "title":
        return isinstance(value, str) and value != "" and value == clean_title(value)
    if name == "receipts":
        return _are_receipts(value)
    if name == "probe":
        return _is_probe(value)
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
    if name in ("tip", "root", "signer"):
        return isinstance(value, str) and _HASH.fullmatch(value) is not None
    return isinstance(value, str)
