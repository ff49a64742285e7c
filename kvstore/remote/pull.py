"""An entry of a remote into a store: only the blocks that the store lacks are read.

Headers come first, and all that they can tell is checked before any row is read. Rows
come in parallel, into files that the next try goes on with. Then the entry is taken in
as a bundle would be: every block is checked as far as loading it would, and all of it
becomes visible, or nothing.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

from ..caches.snapshot import Chain
from ..errors import CodecError, FormatError, IntegrityError, KVStoreError
from ..format.basis import MAX_BYTES, bases_named, parse_basis
from ..format.block import BlockHash, Origin, Progress, ShardHeader, StoredBlock
from ..format.chain import digest_fields, origin_root
from ..format.entry import Entry
from ..format.shard import parse_shard_header
from ..ops.bases import carried_codecs
from ..ops.commit import replaceable
from ..ops.transfer.admit import Incoming, Inspector, admit, check_space
from ..storage import files
from ..storage.bases import add_basis, read_basis
from ..storage.blocks import BlockStore
from ..storage.entries import Catalog
from ..storage.folder import StoreFolder
from ..storage.keys import check_signer
from ..storage.partial import prepare_partial, write_at
from ..storage.shards import OpenShard, StagedShard, open_shard_at, staged_copy
from .catalog import check_allowed
from .client import Client, ranges
from .layout import RemoteEntry, RemoteShard, basis_key, shard_key

# Each holds one part of a shard in memory.
_DOWNLOADS = 8
# Whoever else pulls into the same store waits for so long.
_LOCK_S = 600.0
# `prune` takes staged files for forgotten after an hour.
_TOUCH_EVERY_S = 600.0


@dataclass(frozen=True, slots=True)
class _Arriving:
    """A shard of a remote, of which some blocks are to come."""

    shard: RemoteShard
    header: ShardHeader
    # Those that the store lacks, in the order of the chain.
    wanted: tuple[StoredBlock, ...]
    # The file that they come into.
    path: Path

    @property
    def is_whole(self) -> bool:
        """Whether all of its blocks are to come."""
        return len(self.wanted) == len(self.header.blocks)


@dataclass(frozen=True, slots=True)
class _Plan:
    """An entry of which the headers have come and been checked."""

    inspector: Inspector
    chain: Chain
    arriving: tuple[_Arriving, ...]
    # Bases that its blocks name and the store lacks, by their digests.
    bases: dict[str, bytes]


def pull_entry(
    blocks: BlockStore,
    catalog: Catalog,
    client: Client,
    remote: RemoteEntry,
    name: str | None,
    *,
    replace: bool,
    like: Sequence[Any] | None = None,
    min_bits: int = 0,
    progress: Progress,
) -> Entry:
    """Take an entry of a remote into a store, as :meth:`Remotes.pull` does.

    Raises:
        IntegrityError: An object is missing, or not what its name says. Nothing of the
            entry can be seen in the store then.
        SignerError: No trusted key signed it, and the remote is not trusted.
        EntryExistsError: The name belongs to something else.
        KVStoreError: Its blocks have another size or too few bits, or the store's own
            blocks lack states or windows that the entry needs.
        RemoteError: The remote fails. Pulling again goes on from there.
        StoreLockedError: Another process pulls into the same store for too long.
        OSError: The disk is full or fails.
    """
    folder = blocks.folder
    signer = check_allowed(client.remote, remote)
    check_signer(signer, is_signed_only=folder.config.is_signed_only)
    if remote.block_size != folder.block_size:
        raise KVStoreError(
            f"the remote entry has blocks of {remote.block_size} tokens, and the store"
            f" of {folder.block_size}: {folder.path}",
            hint="pull it into another store",
        )
    name = remote.entry.name if name is None else name

    def work() -> Entry:
        plan = _plan(blocks, client, remote, like)
        # Before anything large has come.
        if (worst := min(b.bits for b in plan.inspector.blocks)) < min_bits:
            raise KVStoreError(
                f"the remote entry has rows of {worst} bits, and at least {min_bits}"
                " are wanted"
            )
        # A name that may not move is refused before gigabytes have come.
        replaceable(catalog, name, plan.chain, replace)
        _fetch(client, folder, plan.arriving, progress)
        kept = signer if _holds_no_others(blocks, remote, plan) else ""
        signed = changed(remote, entry=changed(remote.entry, signer=kept))
        with _checked(folder, signed, plan) as incoming:
            # Before the blocks that name them can be seen.
            for basis in plan.bases.values():
                add_basis(folder, basis)
            entry = admit(blocks, catalog, incoming, name, replace=replace)
        # Whole shards have been renamed into the store; of the others a part was
        # copied.
        for arriving in plan.arriving:
            arriving.path.unlink(missing_ok=True)
        return entry

    # Two that fetch one shard would write into one file.
    lock = folder.path / "pull.lock"
    with files.locked(lock, exclusive=True, timeout_s=_LOCK_S):
        return blocks.run(work)


def _plan(
    blocks: BlockStore, client: Client, remote: RemoteEntry, like: Sequence[Any] | None
) -> _Plan:
    """Read the headers of what the store lacks, and check all that they tell."""
    held = _held(blocks, remote)
    missing = [row for row in remote.blocks if _to_hash(row[0]) not in held]
    numbers = sorted({number for _, number in missing})
    shards = [remote.shards[number] for number in numbers]
    # All headers before any rows: what they show to be wrong costs no download.
    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        headers = list(pool.map(lambda shard: _read_header(client, shard), shards))
    arriving = tuple(
        _Arriving(
            shard,
            header,
            tuple(_find(shard, header, h) for h, n in missing if n == number),
            _partial(blocks.folder, shard, raw),
        )
        for number, shard, (header, raw) in zip(numbers, shards, headers, strict=True)
    )
    came = {b.block.hash: b for a in arriving for b in a.wanted}
    origin = _origin(blocks, remote, [header for header, _ in headers])
    known = came | held
    with _refusing(remote):
        bases = _read_bases(blocks.folder, client, bases_named(known.values()))
        own = carried_codecs(blocks.folder, bases)
        size = remote.block_size
        inspector = Inspector(remote.entry, origin, size, own, like)
        for block, _ in remote.blocks:
            inspector.follow(known[_to_hash(block)])
        chain = _finish(inspector, bool(held))
        return _Plan(inspector, chain, arriving, bases)


def _read_bases(
    folder: StoreFolder, client: Client, digests: Iterable[str]
) -> dict[str, bytes]:
    """Return those of some bases that the store lacks, checked."""
    found: dict[str, bytes] = {}
    left = MAX_BYTES
    for digest in sorted(digests):
        with suppress(IntegrityError):  # where it is damaged, it comes anew
            read_basis(folder, digest)
            continue
        try:
            data = client.read_whole(basis_key(digest), left)
        except FileNotFoundError as error:
            raise IntegrityError(f"the basis {digest[:12]} is missing") from error
        parse_basis(data, digest)
        found[digest] = data
        left -= len(data)
    return found


def _finish(inspector: Inspector, has_held: bool) -> Chain:
    try:
        return inspector.finish()
    except IntegrityError as error:
        if not has_held:
            raise
        raise KVStoreError(
            "the store has blocks of this entry without the states or windows that it"
            " needs, and what it has is never replaced",
            hint="pull it into another store",
        ) from error


def _holds_no_others(blocks: BlockStore, remote: RemoteEntry, plan: _Plan) -> bool:
    """Whether the blocks that the store has already are those that were signed.

    A document names shards: what lies in the same shard here has the same bytes.
    """
    came = {stored.block.hash for one in plan.arriving for stored in one.wanted}
    for name, number in remote.blocks:
        if (block := _to_hash(name)) not in came:
            place = blocks.index.place(block)
            if place is None or place.shard != remote.shards[number].name:
                return False
    return True


def _held(blocks: BlockStore, remote: RemoteEntry) -> dict[BlockHash, StoredBlock]:
    held = {}
    for row in remote.blocks:
        place = blocks.index.place(_to_hash(row[0]))
        if place is not None:
            # A damaged copy leaves the index, and the remote's may take its place.
            with suppress(FormatError, IntegrityError):
                held[place.hash] = blocks.stored(place)
    return held


def _read_header(client: Client, shard: RemoteShard) -> tuple[ShardHeader, memoryview]:
    with _naming(shard):
        raw = client.read(shard_key(shard.name), 0, shard.header_nbytes)
        # The entry's document has this name and may be signed, so that a header can be
        # trusted before the rest of its shard has come.
        if hashlib.sha256(raw).hexdigest() != shard.name:
            raise _refused(shard, "its header is not the one that was pushed")
        try:
            header = parse_shard_header(bytes(raw[8:]), shard.nbytes)
        except (ValueError, KeyError, TypeError) as error:
            raise _refused(shard, str(error)) from error
        if int.from_bytes(raw[:8], "little") != len(raw) - 8:
            raise _refused(shard, "its header has another length than it says")
        return header, raw


def _find(shard: RemoteShard, header: ShardHeader, block: str) -> StoredBlock:
    for stored in header.blocks:
        if stored.block.hash.hex() == block:
            return stored
    raise _refused(shard, f"it lacks block {block[:12]}")


def _partial(folder: StoreFolder, shard: RemoteShard, header: memoryview) -> Path:
    path = prepare_partial(folder.staging, shard.name, shard.nbytes)
    write_at(path, 0, header)
    return path


def _origin(
    blocks: BlockStore, remote: RemoteEntry, headers: Sequence[ShardHeader]
) -> Origin:
    """Return what computed the entry, the same for all of its shards."""
    if not headers:  # the store has every block
        place = blocks.index.place(_to_hash(remote.entry.tip))
        if place is None:
            raise IntegrityError(
                "blocks have vanished from the store", hint="pull the entry again"
            )
        return blocks.origin_at(place)
    origin = headers[0].origin
    if any(header.origin != origin for header in headers):
        raise _refused(remote, "its shards are of several models or layouts")
    if digest_fields(origin.fingerprint) != remote.fingerprint:
        raise _refused(remote, "its shards are of another model")
    if origin_root(origin).hex() != remote.entry.root:
        raise _refused(remote, "its shards are of another layout")
    return origin


def _fetch(
    client: Client,
    folder: StoreFolder,
    arriving: Sequence[_Arriving],
    progress: Progress,
) -> None:
    total = sum(b.end - b.begin for a in arriving for b in a.wanted)
    parts = [(a, *part) for a in arriving for part in _missing_parts(a)]
    left = sum(end - begin for _, begin, end in parts)
    check_space(folder, left)
    progress(total - left, total)
    touched_at = time.monotonic()
    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        running = {pool.submit(_bring, client, *part): part for part in parts}
        try:
            for future in as_completed(running):
                future.result()
                _, begin, end = running[future]
                left -= end - begin
                progress(total - left, total)
                if time.monotonic() - touched_at > _TOUCH_EVERY_S:
                    touched_at = time.monotonic()
                    for one in arriving:
                        os.utime(one.path)
        except BaseException:
            # Or Ctrl-C would wait for every part that is queued.
            pool.shutdown(cancel_futures=True)
            raise


def _missing_parts(arriving: _Arriving) -> Iterator[tuple[int, int]]:
    run: tuple[int, int] | None = None
    begin_of_data = arriving.header.data_begin
    with open_shard_at(arriving.path) as opened:
        for stored in sorted(arriving.wanted, key=lambda stored: stored.begin):
            if _has_come(opened, stored):
                continue
            begin, end = begin_of_data + stored.begin, begin_of_data + stored.end
            if run is not None and run[1] == begin:
                run = run[0], end  # neighbours are one range
                continue
            if run is not None:
                yield from ranges(*run)
            run = begin, end
    if run is not None:
        yield from ranges(*run)


def _has_come(opened: OpenShard, stored: StoredBlock) -> bool:
    try:
        list(opened.read([stored]))
    except IntegrityError:
        return False
    return True


def _bring(client: Client, arriving: _Arriving, begin: int, end: int) -> None:
    with _naming(arriving.shard):
        data = client.read(shard_key(arriving.shard.name), begin, end)
    write_at(arriving.path, begin, data)


@contextmanager
def _checked(
    folder: StoreFolder, remote: RemoteEntry, plan: _Plan
) -> Iterator[Incoming]:
    """Check every block that came, and yield the entry as `admit` takes it."""
    with ExitStack() as stack:
        shards = [_staged(folder, one, plan, stack) for one in plan.arriving]
        blocks = tuple(plan.inspector.blocks)
        yield Incoming(remote.entry, plan.chain, blocks, tuple(shards))


def _staged(
    folder: StoreFolder, arriving: _Arriving, plan: _Plan, stack: ExitStack
) -> StagedShard:
    """Return a shard of just the wanted blocks, each of them checked."""
    shard = arriving.shard
    try:
        with open_shard_at(arriving.path) as opened:
            for stored in arriving.wanted:
                plan.inspector.check_rows(stored, opened)
            if not arriving.is_whole:
                copy = staged_copy(folder, opened, arriving.wanted)
                return stack.enter_context(copy)
            if opened.name() != shard.name:
                raise IntegrityError("it has another header than its name says")
            os.chmod(arriving.path, 0o400)
    except (IntegrityError, CodecError) as error:
        # Or the next try would find the same bytes, and be refused again.
        arriving.path.unlink(missing_ok=True)
        why = str(error).replace(f": {arriving.path}", "")
        raise _refused(shard, why) from error
    return StagedShard(arriving.path, shard.name, arriving.header)


@contextmanager
def _naming(shard: RemoteShard) -> Iterator[None]:
    """Say which shard it is that is not there."""
    try:
        yield
    except FileNotFoundError as error:
        raise _refused(shard, "it is missing") from error


@contextmanager
def _refusing(remote: RemoteEntry) -> Iterator[None]:
    """Say which entry it is that is refused."""
    try:
        yield
    except (IntegrityError, CodecError) as error:
        raise _refused(remote, str(error)) from error


def _refused(what: RemoteShard | RemoteEntry, why: str) -> IntegrityError:
    if isinstance(what, RemoteShard):
        label = f"remote shard {what.name[:12]}"
    else:
        label = f"remote entry {what.entry.name or what.entry.tip[:12]}"
    return IntegrityError(
        f"{label} is refused: {why}",
        hint="whoever owns the remote can remove the object and push the entry again",
    )


def _to_hash(block: str) -> BlockHash:
    return BlockHash(bytes.fromhex(block))
