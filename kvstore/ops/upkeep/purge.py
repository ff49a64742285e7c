"""What was removed leaves every file of a store: shards, quarantine, tmp, index.

Blocks that other entries share stay, and so do copies elsewhere: exports, backups, and
whatever a drive keeps of overwritten sectors. A block is known by its hash and by its
tokens, in all the forms that a store writes. The rows of a shard are left out of the
search: every byte of them belongs to a block that its header names, which
:mod:`~kvstore.ops.upkeep.check` has made sure of.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...errors import FormatError, IntegrityError, KVStoreError
from ...format.block import BlockHash
from ...format.entry import Entry
from ...storage import files
from ...storage.bases import list_bases, read_basis
from ...storage.blocks import BlockStore
from ...storage.folder import StoreFolder
from ...storage.shards import empty_quarantine, take_back
from .check import repair
from .prune import Policy, plan_prune

# So many tokens in a row tell a conversation from all others.
_RUN = 8
Traces = dict[BlockHash, tuple[bytes, ...]]
"""The blocks of entries, and the bytes that each is known by beside its hash."""


def purge(blocks: BlockStore, removed: Traces) -> list[str]:
    """Remove every byte of blocks that no entry needs.

    What lies damaged in the store goes to quarantine, what is whole there comes back,
    and then quarantine and ``tmp`` are emptied. A save that is under way elsewhere has
    to write its blocks again.

    Args:
        blocks: The store's blocks.
        removed: What was removed; that no byte of it is left is proven in the end.

    Returns:
        Digests of the bases that were fitted to stored rows, perhaps to these, and that
        a calibration or a block still needs.

    Raises:
        KVStoreError: An entry cannot be read or lacks a block, so that nobody can say
            what it needs; or a save is under way; or a trace of what was removed was
            found. Nothing needed is gone.
    """
    blocks.close()
    if not repair(blocks.folder):
        with files.locked(blocks.folder.lock, exclusive=True):
            take_back(blocks.folder)
    blocks.confirm()
    plan_prune(blocks, Policy(grace_s=0.0)).execute()
    left = plan_prune(blocks, Policy(grace_s=0.0))
    if not left.is_whole:
        raise KVStoreError(
            "what was removed stays on disk: an entry cannot be read or lacks a block,"
            " which may be among it",
            hint="remove the entries that `kvstore verify` names, then `--purge` again",
        )
    _empty(blocks)
    plan_prune(blocks, Policy(grace_s=0.0)).execute()  # bases wait for quarantine
    with blocks.index.transaction():
        # Of how a conversation began, a server may be about to note a hash again.
        blocks.index.forget_scores(since=time.time())
    blocks.index.compact()
    if (path := find_traces(blocks, removed)) is not None:
        raise KVStoreError(
            f"a part of what was removed is still in the store: {path}",
            hint="is another process saving it again? `--purge` again",
        )
    return [b for b in list_bases(blocks.folder) if _is_of_rows(blocks.folder, b)]


def _is_of_rows(folder: StoreFolder, basis: str) -> bool:
    """Whether a basis was fitted to stored rows, or cannot be read."""
    try:
        return read_basis(folder, basis).about.get("made_from") == "rows"
    except (IntegrityError, FormatError):
        return True


def _empty(blocks: BlockStore) -> None:
    """Remove everything in quarantine, and in ``tmp`` what nobody is writing."""
    folder = blocks.folder
    with files.locked(folder.lock, exclusive=True):
        empty_quarantine(folder)
        busy = [p for p in folder.staging.iterdir() if not files.remove_unused(p)]
    if busy:
        raise KVStoreError(
            f"another process is writing to the store: {busy[0]}",
            hint="wait for it to finish, then `--purge` again",
        )


def traces_of(blocks: BlockStore, entry: Entry) -> Traces:
    """Return what an entry's blocks are known by, as far as they can be read."""
    try:
        chain = blocks.chain(entry)
    except IntegrityError:
        return {BlockHash(bytes.fromhex(entry.tip)): ()}
    return {place.hash: tuple(_words(s.block.tokens)) for place, s in chain}


def _words(tokens: tuple[int, ...]) -> Iterator[bytes]:
    """Yield the tokens as a header spells them, a few in a row."""
    for start in range(0, len(tokens) - _RUN + 1, _RUN):
        yield ",".join(map(str, tokens[start : start + _RUN])).encode()


def find_traces(blocks: BlockStore, traces: Traces) -> Path | None:
    """Return a file that holds a trace of a block that the store has no more, if any.

    Args:
        blocks: The store's blocks.
        traces: From :func:`traces_of`, before the entries were removed. Blocks that
            other entries need are not looked for.
    """
    gone = {b: words for b, words in traces.items() if not blocks.index.place(b)}
    written = blocks.index.written
    hashes = [f for b in gone for f in (bytes(b), b.hex().encode(), written(bytes(b)))]
    tokens = [word for words in gone.values() for word in words]
    for path in sorted(p for p in blocks.folder.path.rglob("*") if p.is_file()):
        # Another conversation in a shard may have said the same.
        is_shard = blocks.folder.shards in path.parents
        data = _header(path) if is_shard else path.read_bytes()
        if _has_any(data, hashes if is_shard else [*hashes, *tokens]):
            return path
    return None


def _header(shard: Path) -> bytes:
    with shard.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(min(size, shard.stat().st_size))  # or it is no shard


def _has_any(data: bytes, words: Iterable[bytes]) -> bool:
    return any(word in data for word in words)
