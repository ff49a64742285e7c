"""An entry into a remote: its shards first, the document that names them last.

Whatever interrupts a push, the next one skips what has arrived. What is sent reveals
no more than the entry: a shard that also holds other tokens is sent as a copy without
them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..errors import IntegrityError, RemoteError
from ..format.block import Progress, ShardHeader, StoredBlock
from ..format.chain import digest_fields
from ..format.entry import Entry
from ..ops.bases import read_named
from ..ops.load import entry_hit
from ..storage.blocks import BlockStore, is_sound
from ..storage.index import Place
from ..storage.keys import own_key, signing_key
from ..storage.shards import OpenShard, open_shard, open_shard_at, staged_copy
from .client import PART_BYTES, Client
from .layout import (
    EntryKey,
    RemoteEntry,
    RemoteShard,
    basis_key,
    document_of,
    shard_key,
    signed,
)

# Each holds at most four parts of a shard in memory.
_UPLOADS = 4


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push has done."""

    entry: Entry
    key: EntryKey
    # Objects sent, and those that were there already.
    num_sent: int
    num_there: int
    sent_bytes: int


Upload = tuple[RemoteShard, Path]
"""A shard that is to be in the remote, and the file that has its bytes."""
Chain = Sequence[tuple[Place, StoredBlock]]
"""The blocks of an entry, first to last, and where they lie."""


def push_entry(
    blocks: BlockStore, entry: Entry, client: Client, progress: Progress
) -> Pushed:
    """Put an entry into a remote, signed where the user has a key.

    Raises:
        IntegrityError: A part of the entry is missing or damaged. The remote has no
            such entry then.
        RemoteError: The remote fails. Pushing again goes on from there.
    """
    if client.remote.is_web:
        raise RemoteError(
            f"remote `{client.remote.name}` is a web server, which is only read",
            hint="push to the object store that it shows",
        )
    return blocks.run_again(lambda: _push(blocks, entry, client, progress))


def _push(
    blocks: BlockStore, entry: Entry, client: Client, progress: Progress
) -> Pushed:
    entry_hit(blocks, entry)  # what cannot be restored is no use
    chain = blocks.chain(entry)
    bases = read_named(blocks.folder, (stored for _, stored in chain))
    with ExitStack() as stack:
        uploads = _prepare(blocks, chain, stack)
        sent = _send_all(client, list(uploads.values()), progress)
    for digest, data in sorted(bases.items()):
        if not client.seems_there(basis_key(digest), len(data)):
            client.put(basis_key(digest), data)
            sent.append(len(data))
    numbers = {name: number for number, name in enumerate(uploads)}
    fingerprint = digest_fields(blocks.origin(entry).fingerprint)
    remote = RemoteEntry(
        replace(entry, nbytes=sum(b.end - b.begin for _, b in chain)),
        fingerprint,
        blocks.folder.block_size,
        tuple(shard for shard, _ in uploads.values()),
        tuple((p.hash.hex(), numbers[p.shard]) for p, _ in chain),
    )
    if own_key():
        remote = signed(remote, signing_key())
    key, document = document_of(remote)
    # Only now may anybody see the entry.
    if not client.seems_there(str(key), len(document)):
        client.put(str(key), document)
        sent.append(len(document))
    num_there = len(uploads) + len(bases) + 1 - len(sent)
    return Pushed(entry, key, len(sent), num_there, sum(sent))


def _prepare(blocks: BlockStore, chain: Chain, stack: ExitStack) -> dict[str, Upload]:
    """Return what to send for each shard of a chain, by its name in the store."""
    tokens = [token for _, stored in chain for token in stored.block.tokens]
    wanted: dict[str, list[StoredBlock]] = {}
    for place, stored in chain:
        wanted.setdefault(place.shard, []).append(stored)
    uploads = {}
    for name, of_entry in wanted.items():
        with _opened(blocks, name) as opened:
            if _reveals_more(opened.header, tokens):
                copy = staged_copy(blocks.folder, opened, of_entry)
                staged = stack.enter_context(copy)
                with open_shard_at(staged.path) as copied:
                    uploads[name] = _upload(copied, staged.name)
            else:
                uploads[name] = _upload(opened, name)
    return uploads


@contextmanager
def _opened(blocks: BlockStore, name: str) -> Iterator[OpenShard]:
    """Open a shard of the store, which `prune` may have taken meanwhile."""
    try:
        with open_shard(blocks.folder, name) as opened:
            yield opened
    except FileNotFoundError as error:
        raise IntegrityError(
            f"shard {name[:12]} is missing", hint="push the entry again"
        ) from error


def _reveals_more(header: ShardHeader, tokens: Sequence[int]) -> bool:
    """Whether a shard has tokens that the entry does not have at their position.

    Short tails that the entry has outgrown are its own tokens.
    """
    return any(
        list(tokens[stored.block.start :][: len(stored.block.tokens)])
        != list(stored.block.tokens)
        or not is_sound(stored)
        for stored in header.blocks
    )


def _upload(opened: OpenShard, name: str) -> Upload:
    size = opened.header
    return RemoteShard(name, size.nbytes, size.data_begin), opened.path


def _send_all(
    client: Client, uploads: Sequence[Upload], progress: Progress
) -> list[int]:
    """Send the shards that are not there, and return their sizes."""
    total = sum(shard.nbytes for shard, _ in uploads)
    done, sent = 0, []
    with ThreadPoolExecutor(_UPLOADS) as pool:
        running = {pool.submit(_send, client, upload): upload for upload in uploads}
        try:
            for future in as_completed(running):
                nbytes = running[future][0].nbytes
                sent += [nbytes] if future.result() else []
                done += nbytes
                progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return sent


def _send(client: Client, upload: Upload) -> bool:
    """Send a shard unless it is there; its bytes are checked on the way."""
    shard, path = upload
    key = shard_key(shard.name)
    if client.seems_there(key, shard.nbytes):
        return False
    client.put_parts(key, shard.nbytes, partial(_checked_parts, path, shard.name))
    return True


def _checked_parts(path: Path, name: str) -> Iterator[bytes]:
    """Yield the bytes of a shard, and fail at the first block that is damaged."""
    try:
        with open_shard_at(path) as opened:
            header = bytes(opened.read_header())
            if hashlib.sha256(header).hexdigest() != name:
                raise IntegrityError(
                    f"shard has another header than its name says: {path}",
                    path=path,
                    hint="`kvstore verify --read-data` finds more",
                )
            yield header
            # Whoever else made a shard may have put them in another order.
            blocks = sorted(opened.header.blocks, key=lambda stored: stored.begin)
            for data in opened.read(blocks):
                for begin in range(0, len(data), PART_BYTES):
                    yield bytes(data[begin : begin + PART_BYTES])
    except FileNotFoundError as error:
        raise IntegrityError(
            f"shard {name[:12]} is missing", hint="push the entry again"
        ) from error
