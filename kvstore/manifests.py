"""What a bundle says of itself: the manifest, and the strict check of it.

There is one spelling of a manifest, canonical JSON; whatever is spelled otherwise, has
other fields or does not fit together is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import blake3

from .catalog import check_name
from .errors import FormatError, IntegrityError
from .fingerprint import Fingerprint
from .hashing import canonical_json, hash_root
from .safetensors_header import is_count, strict_json
from .types import JSON, Origin

FORMAT = 1
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
# What the eleven octal digits of an archive's header can say.
MAX_SHARD_BYTES = 8**11 - 1
_MAX_ENTRY_BYTES = 32_768
_MAX_TIME = 2.0**33
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle says of itself; most is as in :class:`Entry`.

    Attributes:
        name: The entry's name, or ``None``.
        tip: Hash of the last block in hex.
        root: Hash that the first block has as parent, in hex.
        num_tokens: Tokens held.
        codec: The codec asked for when the entry was saved.
        model: What the model was called; advisory.
        made_with: Versions of kvstore, mlx and mlx-lm; advisory.
        created_at: When the name was first saved, Unix seconds.
        block_size: Tokens in a full block.
        origin: What computed the rows.
        shards: SHA-256 in hex, and bytes, of each shard in the order of their tokens.
    """

    name: str | None
    tip: str
    root: str
    num_tokens: int
    codec: str
    model: str
    made_with: dict[str, str]
    created_at: float
    block_size: int
    origin: Origin
    shards: tuple[tuple[str, int], ...]

    @property
    def label(self) -> str:
        """What to call the entry: its name, or the start of its last block's hash."""
        return self.name or self.tip[:12]


def refused(why: str) -> IntegrityError:
    """Return the error that a bundle is not what it should be."""
    return IntegrityError(
        f"the bundle is refused: {why}", hint="export it again, or copy it again"
    )


def manifest_to_bytes(manifest: Manifest) -> bytes:
    """Return a manifest with a digest of itself, as canonical JSON.

    Raises:
        ValueError: It is too large.
    """
    body: JSON = {
        "format": FORMAT,
        "entry": _entry(manifest),
        "block_size": manifest.block_size,
        "fingerprint": manifest.origin.fingerprint,
        "layout": manifest.origin.layout,
        "tenant": manifest.origin.tenant,
        "shards": [{"sha256": n, "nbytes": size} for n, size in manifest.shards],
    }
    data = canonical_json({"digest": _digest(body), **body})
    if len(data) > MAX_MANIFEST_BYTES:
        raise ValueError(f"a manifest of {len(data)} bytes is too large")
    return data


def _entry(manifest: Manifest) -> JSON:
    return {
        "name": manifest.name,
        "tip": manifest.tip,
        "root": manifest.root,
        "num_tokens": manifest.num_tokens,
        "codec": manifest.codec,
        "model": manifest.model,
        "made_with": manifest.made_with,
        "created_at": manifest.created_at,
    }


def _digest(body: JSON) -> str:
    return str(blake3.blake3(canonical_json(body)).hexdigest())


def parse_manifest(data: bytes) -> Manifest:
    """Return what a manifest says, having checked all of it that needs no shard.

    Raises:
        FormatError: A newer release wrote it.
        IntegrityError: It is not as we would have written it.
    """
    try:
        body = strict_json(data, allow_floats=True)
        _refuse_half_characters(body)
        if body.pop("digest") != _digest(body):
            raise ValueError("it does not match its digest")
        form = body["format"]
        if type(form) is int and form != FORMAT:
            raise FormatError(
                f"the bundle has format {form}, this release reads {FORMAT}",
                hint="upgrade mlx-kvstore",
            )
        manifest = _build(body)
        if data != manifest_to_bytes(manifest):  # JSON can be spelled in several ways
            raise ValueError("it has other fields than it should, or is spelled so")
        _check(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise refused(f"its manifest: {error}") from error
    return manifest


def _refuse_half_characters(body: Any) -> None:
    """Refuse what JSON can spell and nobody can print or write to a file.

    Raises:
        ValueError: There is some.
    """
    try:
        json.dumps(body, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("a text has half a character") from error


def _build(body: JSON) -> Manifest:
    """Return the fields of a manifest, of whatever type they are."""
    return Manifest(
        **body["entry"],
        block_size=body["block_size"],
        origin=Origin(body["fingerprint"], body["layout"], body["tenant"]),
        shards=tuple((shard["sha256"], shard["nbytes"]) for shard in body["shards"]),
    )


def _check(manifest: Manifest) -> None:
    """Check types and values of all fields.

    Raises:
        ValueError: One is not as it should be.
    """
    texts: list[Any] = [manifest.tip, manifest.root, manifest.codec, manifest.model]
    texts += [manifest.origin.tenant, *manifest.made_with.values()]
    texts += [name for name, _ in manifest.shards]
    if not all(type(text) is str for text in texts):
        raise ValueError("a field is no text")
    if manifest.name is not None and type(manifest.name) is not str:
        raise ValueError("its name is no text")
    check_name(manifest.name)
    if len(canonical_json(_entry(manifest))) > _MAX_ENTRY_BYTES:
        raise ValueError("its entry is too large")
    hashes = [manifest.tip, manifest.root, *(name for name, _ in manifest.shards)]
    if not all(_HEX.fullmatch(digits) for digits in hashes):
        raise ValueError("a hash is not 64 hex digits")
    time = manifest.created_at
    if type(time) not in (int, float) or not 0 <= time < _MAX_TIME:
        raise ValueError("a time is out of range")
    _check_sizes(manifest)
    origin = manifest.origin
    if type(origin.fingerprint) is not dict or type(origin.layout) is not list:
        raise ValueError("fingerprint or layout is missing")
    fingerprint = Fingerprint(origin.fingerprint).digest
    root = hash_root(fingerprint, origin.layout, origin.tenant)
    if root.hex() != manifest.root:
        raise ValueError("its root is not that of its fingerprint and layout")


def _check_sizes(manifest: Manifest) -> None:
    sizes = [size for _, size in manifest.shards]
    counts = [manifest.num_tokens, manifest.block_size, *sizes]
    if not all(is_count(count) and count for count in counts):
        raise ValueError("a size is no count")
    num_blocks = -(-manifest.num_tokens // manifest.block_size)
    if not 0 < len(sizes) <= num_blocks or max(sizes) > MAX_SHARD_BYTES:
        raise ValueError("its shards are too many or too large")
