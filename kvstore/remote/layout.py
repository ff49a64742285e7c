"""What lies in a remote, and under which keys. Bytes to values and back; no requests.

Everything is named by what it holds, so no object is ever changed: a shard by the
SHA-256 of its header, an entry's document by that of its bytes. The document has the
name of each shard, and its header the digest of each block. So a block can be checked
that was read alone.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import FormatError, IntegrityError
from ..format.documents import JSON, canonical_json, is_count, strict_json
from ..format.entry import Entry, entry_id, entry_to_bytes, parse_entry
from ..format.safetensors import MAX_HEADER_BYTES
from ..format.signature import (
    Signature,
    check_signature,
    parse_signature,
    sign,
    signature_to_json,
)

FORMAT = 1
# A block takes 70 bytes: this is enough for a prompt of twenty million tokens.
MAX_DOCUMENT_BYTES = 8 * 1024 * 1024
ENTRIES = "v1/entries"
# What a signature is of.
_KIND = "remote entry"
_HASH = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(
    rf"{ENTRIES}/([0-9a-f]{{64}})/([0-9a-f]{{32}})/([0-9a-f]{{64}})\.json"
)


@dataclass(frozen=True, slots=True)
class RemoteShard:
    """A shard of a remote."""

    # SHA-256 of its header in hex.
    name: str
    nbytes: int
    # The header with its length, which stands before the data.
    header_nbytes: int


@dataclass(frozen=True, slots=True)
class RemoteEntry:
    """An entry of a remote, and which shard has each of its blocks."""

    entry: Entry
    # Digest of the fingerprint of what computed it, in hex.
    fingerprint: str
    # Tokens in a full block.
    block_size: int
    shards: tuple[RemoteShard, ...]
    # Hash of each block in hex, and the number of its shard; first to last.
    blocks: tuple[tuple[str, int], ...]
    # Of all of this; `signer_of` checks it.
    signature: Signature | None = None
    # What it was cut out of or renamed from, which is what was signed.
    whole: RemoteEntry | None = None


@dataclass(frozen=True, slots=True)
class EntryKey:
    """What the key of an entry's document says."""

    # Digest of the model's fingerprint in hex.
    fingerprint: str
    # The id that a store gives an entry of this name.
    entry_id: str
    # SHA-256 of the document in hex.
    digest: str

    @property
    def path(self) -> str:
        """The key below the folder of the entries, without its suffix."""
        # A folder for each name, so that its documents are found by a short list.
        return f"{self.fingerprint}/{self.entry_id}/{self.digest}"

    def __str__(self) -> str:
        return f"{ENTRIES}/{self.path}.json"


def shard_key(name: str) -> str:
    """Return the key of a shard."""
    return f"v1/shards/{name[:2]}/{name}.safetensors"


def basis_key(digest: str) -> str:
    """Return the key of a basis."""
    return f"v1/bases/{digest}.safetensors"


def parse_key(key: str) -> EntryKey | None:
    """Return what the key of a document says, or ``None`` if it is none."""
    match = _KEY.fullmatch(key)
    return EntryKey(*match.groups()) if match else None


def document_of(remote: RemoteEntry) -> tuple[EntryKey, bytes]:
    """Return the document of an entry, and its key.

    Whether an entry is pinned, and who signed it where it came from, is left out: that
    holds for one store only.
    """
    body = _body(remote)
    if remote.signature is not None:
        body["signature"] = signature_to_json(remote.signature)
    data = canonical_json(body)
    digest = hashlib.sha256(data).hexdigest()
    return EntryKey(remote.fingerprint, remote.entry.id, digest), data


def _body(remote: RemoteEntry) -> dict[str, JSON]:
    entry = replace(remote.entry, pinned=False, signer="", probe=None)
    return {
        "format": FORMAT,
        "fingerprint": remote.fingerprint,
        "block_size": remote.block_size,
        "entry": strict_json(entry_to_bytes(entry), allow_floats=True),
        "shards": [
            [shard.name, shard.nbytes, shard.header_nbytes] for shard in remote.shards
        ],
        "blocks": [list(block) for block in remote.blocks],
    }


def signed(remote: RemoteEntry, secret: str) -> RemoteEntry:
    """Return an entry with the signature of the holder of a secret key."""
    return replace(remote, signature=sign(secret, _KIND, _body(remote)))


def derived(remote: RemoteEntry, **changes: Any) -> RemoteEntry:
    """Return an entry with other fields, which keeps who signed the whole of it."""
    return replace(remote, **changes, whole=remote.whole or remote)


def signer_of(remote: RemoteEntry) -> str:
    """Return the key that signed an entry; nothing where it is not signed.

    Raises:
        IntegrityError: The signature is not of this entry.
        KVStoreError: The package that checks signatures is missing.
    """
    whole = remote.whole or remote
    if whole.signature is None:
        return ""
    check_signature(whole.signature, _KIND, _body(whole))
    return whole.signature.key


def parse_document(key: EntryKey, data: bytes) -> RemoteEntry:
    """Return the entry that a document spells, having checked it against its key.

    Raises:
        FormatError: A newer release wrote it.
        IntegrityError: It is not what its key says, or contradicts itself.
    """
    if hashlib.sha256(data).hexdigest() != key.digest:
        raise _refused(key, "it has other bytes than its name says")
    try:
        body = strict_json(data, allow_floats=True)
        form = body["format"]
        if type(form) is int and form != FORMAT:
            raise FormatError(
                f"remote entry has format {form}, this release reads {FORMAT}",
                hint="upgrade mlx-kvstore",
            )
        remote = _build(body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refused(key, str(error)) from error
    except IntegrityError as error:
        raise _refused(key, "its entry is damaged") from error
    if document_of(remote)[0] != key:
        raise _refused(key, "it lies under the key of another")
    return remote


def _build(body: JSON) -> RemoteEntry:
    entry = parse_entry(
        Path(f"{body['entry']['id']}.json"), canonical_json(body["entry"])
    )
    if entry.id != entry_id(entry.name, entry.tip):
        raise ValueError("its id is not that of its name")
    remote = RemoteEntry(
        entry,
        _hash(body["fingerprint"]),
        _count(body["block_size"]),
        tuple(_shard(row) for row in body["shards"]),
        tuple((_hash(block), _count(number, 0)) for block, number in body["blocks"]),
        parse_signature(body["signature"]) if "signature" in body else None,
    )
    _check(remote)
    return remote


def _check(remote: RemoteEntry) -> None:
    num_blocks = -(-remote.entry.num_tokens // remote.block_size)
    if len(remote.blocks) != num_blocks or remote.blocks[-1][0] != remote.entry.tip:
        raise ValueError("its blocks are not those of its entry")
    if {number for _, number in remote.blocks} != set(range(len(remote.shards))):
        raise ValueError("its blocks do not lie in its shards")
    if len({shard.name for shard in remote.shards}) != len(remote.shards):
        raise ValueError("a shard is there twice")


def _shard(row: list[Any]) -> RemoteShard:
    name, nbytes, header_nbytes = row
    if _count(header_nbytes, 8) > min(_count(nbytes), 8 + MAX_HEADER_BYTES):
        raise ValueError("a header is larger than a header can be")
    return RemoteShard(_hash(name), nbytes, header_nbytes)


def _hash(value: Any) -> str:
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise ValueError("a hash is not 64 hex digits")
    return value


def _count(value: Any, least: int = 1) -> int:
    if not is_count(value) or value < least:
        raise ValueError("a number is no count")
    return int(value)


def _refused(key: EntryKey, why: str) -> IntegrityError:
    return IntegrityError(
        f"remote entry {key.digest[:12]} is refused: {why}",
        hint="whoever owns the remote can remove the object and push the entry again",
    )
