"""What was removed leaves every file of a store: shards, quarantine, tmp, index.

Blocks that other entries share stay, and so do copies elsewhere: exports, backups, and
whatever a drive keeps of overwritten sectors.
"""

from __future__ import annotations

from ..errors import KVStoreError
from ..storage import files
from ..storage.blocks import BlockStore
from .check import repair
from .prune import Policy, plan_prune
from .quarantine import empty_quarantine, take_back
from .traces import Traces, find_traces


def purge(blocks: BlockStore, removed: Traces) -> None:
    """Remove every byte of blocks that no entry needs.

    What lies damaged in the store goes to quarantine, what is whole there comes back,
    and then quarantine and ``tmp`` are emptied. A save that is under way elsewhere has
    to write its blocks again.

    Args:
        blocks: The store's blocks.
        removed: What was removed; that no byte of it is left is proven in the end.

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
    blocks.index.compact()
    if (path := find_traces(blocks, removed)) is not None:
        raise KVStoreError(
            f"a part of what was removed is still in the store: {path}",
            hint="is another process saving it again? `--purge` again",
        )


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
