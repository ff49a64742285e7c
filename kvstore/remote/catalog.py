"""The entries of a remote: listed, found by name, and found by the tokens they hold."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from ..errors import (
    EntryNotFoundError,
    FormatError,
    IntegrityError,
    KVStoreError,
    SignerError,
)
from ..format.block import BlockHash
from ..format.chain import split_tokens
from ..format.entry import entry_id
from ..storage.entries import MIN_ID
from ..storage.keys import known_keys
from .client import Client, Remote
from .layout import (
    ENTRIES,
    MAX_DOCUMENT_BYTES,
    EntryKey,
    RemoteEntry,
    derived,
    parse_document,
    parse_key,
    signer_of,
)

log = logging.getLogger("kvstore")
_READERS = 8
# A distributed store answers from any of its replicas, and each may lag behind.
_LISTINGS = 4
_PAUSE_S = 0.3


Found = dict[EntryKey, RemoteEntry]
"""Entries of a remote, by where they lie."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Entries of a remote."""

    found: Found
    # Why others were refused, one for each.
    refused: tuple[KVStoreError, ...]
    # Those of them that will be again.
    wrong: tuple[EntryKey, ...] = ()


def list_entries(client: Client) -> Found:
    """Return the entries of a remote, latest first; of each name and model the latest.

    Raises:
        RemoteError: The remote fails, or cannot list.
    """
    listing = _read_all(client, _keys(client, None), is_any=True)
    _warn(listing)
    return _latest(listing)


def find_entry(client: Client, ref: str, fingerprint: str | None = None) -> RemoteEntry:
    """Return the entry with this name, or whose document's digest starts so.

    One that is named by its whole key, `FINGERPRINT/ID`, needs no list.

    Raises:
        EntryNotFoundError: There is none, or there are several.
        IntegrityError: All that there are were refused.
        SignerError: None is signed by a trusted key, and the remote is not trusted.
        RemoteError: The remote fails, or cannot list.
    """
    by_name, by_digest = _find_keys(client, ref, fingerprint)
    listing = _read_all(client, by_name or by_digest)
    latest = _latest(listing)
    if not latest and listing.refused:
        raise listing.refused[0]
    if not latest:
        raise EntryNotFoundError(
            f"no entry `{ref}` in remote `{client.remote.name}`",
            hint="`kvstore ls --remote` lists them",
        )
    if len(latest) > 1:
        several = "of several models" if by_name else "that start so"
        raise EntryNotFoundError(
            f"remote `{client.remote.name}` has {len(latest)} entries `{ref}`"
            f" {several}",
            hint="`--model` says which; so does more of the id",
        )
    _warn(listing)
    (found,) = latest.values()
    return found


def read_new(
    client: Client,
    fingerprint: str | None,
    known: dict[EntryKey, RemoteEntry | None],
) -> None:
    """Learn of a model's entries; why some that are new were refused is logged.

    Only documents that are not known yet are read; ``known`` is changed to what the
    remote has, with ``None`` for what was refused.

    Raises:
        RemoteError: The remote fails, or cannot list.
    """
    keys = _keys(client, fingerprint)
    for gone in known.keys() - set(keys):
        del known[gone]
    new = [key for key in keys if key not in known]
    listing = _read_all(client, new)
    # A document never changes: neither does what is wrong with it. But one that the
    # server that was asked does not have yet may come.
    known.update(dict.fromkeys(listing.wrong))
    known.update(listing.found)
    _warn(listing)


def check_allowed(remote: Remote, found: RemoteEntry) -> str:
    """Return the key that signed an entry; nothing where it needs none.

    Raises:
        IntegrityError: The signature is not of this entry.
        SignerError: No trusted key signed it, and the remote is not trusted.
        KVStoreError: The package that checks signatures is missing.
    """
    key = signer_of(found)
    if remote.is_trusted or key in known_keys():
        return key
    who = f"signed by the unknown key {key}" if key else "not signed"
    raise SignerError(
        f"remote entry {found.entry.name or found.entry.tip[:12]} is {who}",
        hint="`kvstore key trust NAME KEY` trusts a signer, `--trust` all who may write"
        " to the remote",
    )


def find_prefixes(
    known: Iterable[RemoteEntry | None], tokens: Sequence[int]
) -> list[RemoteEntry]:
    """Return what known entries have of a prompt, the longest first.

    Entries that go on otherwise are cut to the full blocks that they share.
    """
    cut = (cut_to_prompt(remote, tokens) for remote in known if remote is not None)
    found = {remote.entry.tip: remote for remote in cut if remote is not None}
    return sorted(found.values(), key=lambda remote: -remote.entry.num_tokens)


def cut_to_prompt(remote: RemoteEntry, tokens: Sequence[int]) -> RemoteEntry | None:
    """Return as much of an entry as a prompt shares, or ``None``."""
    root = BlockHash(bytes.fromhex(remote.entry.root))
    size, count = remote.block_size, 0
    stop = remote.entry.num_tokens
    for block in split_tokens(root, tokens[:stop], size):
        if block.hash.hex() != remote.blocks[count][0]:
            break
        count += 1
    if count == len(remote.blocks):
        return remote
    if count == 0:
        return None
    blocks = remote.blocks[:count]
    used = sorted({number for _, number in blocks})
    tip = blocks[-1][0]
    entry = replace(
        remote.entry,
        id=entry_id(None, tip),
        name=None,
        tip=tip,
        num_tokens=count * size,
    )
    return derived(
        remote,
        entry=entry,
        shards=tuple(remote.shards[number] for number in used),
        blocks=tuple((block, used.index(number)) for block, number in blocks),
    )


def _find_keys(
    client: Client, ref: str, fingerprint: str | None
) -> tuple[list[EntryKey], list[EntryKey]]:
    if (direct := parse_key(f"{ENTRIES}/{ref}.json")) is not None:
        return [], [direct]
    is_start = len(ref) >= MIN_ID and not set(ref) - set("0123456789abcdef")
    for number in range(_LISTINGS):
        by_name = _named_keys(client, ref, fingerprint)
        if by_name:
            return by_name, []
        # Of what may be an id, every key has to be listed.
        keys = _keys(client, fingerprint) if is_start else []
        by_digest = [key for key in keys if key.digest.startswith(ref)]
        if by_digest:
            return [], by_digest
        if number < _LISTINGS - 1:
            time.sleep(_PAUSE_S)
    return [], []


def _named_keys(client: Client, name: str, fingerprint: str | None) -> list[EntryKey]:
    """Return the keys of all documents of a name: a short list for each model."""
    models = client.folders(ENTRIES) if fingerprint is None else [fingerprint]
    folder = entry_id(name, "")
    paths = [k for model in models for k in client.keys(f"{ENTRIES}/{model}/{folder}")]
    return [key for path in paths if (key := parse_key(path))]


def _keys(client: Client, fingerprint: str | None) -> list[EntryKey]:
    folder = ENTRIES if fingerprint is None else f"{ENTRIES}/{fingerprint}"
    return [key for name in client.keys(folder) if (key := parse_key(name))]


def _read_all(
    client: Client, keys: Sequence[EntryKey], *, is_any: bool = False
) -> Listing:
    """Read documents; what is no such document is told and left out.

    So is what no trusted key has signed, unless ``is_any``.
    """
    wrong: list[EntryKey] = []

    def read(key: EntryKey) -> RemoteEntry | KVStoreError:
        try:
            data = client.read_whole(str(key), MAX_DOCUMENT_BYTES)
            found = parse_document(key, data)
            signer_of(found) if is_any else check_allowed(client.remote, found)
            return found
        except (IntegrityError, FormatError, SignerError) as error:
            wrong.append(key)
            return error
        except FileNotFoundError:
            return IntegrityError(
                f"remote entry {key.digest[:12]} is listed and not there",
                hint="try again later",
            )

    with ThreadPoolExecutor(_READERS) as pool:
        results = dict(zip(keys, pool.map(read, keys), strict=True))
    return Listing(
        {key: one for key, one in results.items() if isinstance(one, RemoteEntry)},
        tuple(one for one in results.values() if isinstance(one, KVStoreError)),
        tuple(wrong),
    )


def _latest(listing: Listing) -> Found:
    latest: dict[tuple[str, str], EntryKey] = {}
    for key in sorted(listing.found, key=lambda k: -listing.found[k].entry.updated_at):
        latest.setdefault((key.fingerprint, key.entry_id), key)
    return {key: listing.found[key] for key in latest.values()}


def _warn(listing: Listing) -> None:
    for error in listing.refused:
        log.warning("%s", error)
