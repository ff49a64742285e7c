"""A bundle into a store: all of it, checked to the last byte, or nothing.

The shards of a bundle are staged and checked; then `ops.transfer.admit` takes in what
the store lacks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace as changed
from pathlib import Path
from typing import IO, Any

from ...errors import CodecError, IntegrityError, KVStoreError
from ...fingerprint import Fingerprint, refuse_other
from ...format.basis import bases_named
from ...format.block import Progress
from ...format.bundle import BundleReader, refused
from ...format.entry import Entry
from ...storage import files
from ...storage.bases import add_basis
from ...storage.blocks import BlockStore
from ...storage.entries import Catalog
from ...storage.folder import StoreFolder
from ...storage.keys import check_signer
from ...storage.shards import OpenShard, StagedShard, open_shard_at, receive_shard
from ..bases import carried_codecs
from .admit import Incoming, Inspector, admit, check_space

# `prune` takes staged files for forgotten after an hour.
_TOUCH_EVERY_S = 600.0


def import_entry(
    blocks: BlockStore,
    catalog: Catalog,
    bundle: BundleReader,
    name: str | None,
    *,
    replace: bool,
    like: Sequence[Any] | None = None,
    progress: Progress,
) -> Entry:
    """Take a bundle's entry into a store and return it.

    Args:
        blocks: The store's blocks.
        catalog: Its entries.
        bundle: From :func:`open_bundle`.
        name: A name in place of the entry's own.
        replace: Take the name from an entry that this one does not continue.
        like: The empty prompt cache of the model that it must be of.
        progress: Called with (tokens checked, tokens in all).

    Raises:
        FormatError: It has a shard of a newer release.
        IntegrityError: It is not, to the byte, what a store would have written.
        SignerError: The store takes only what was signed, and this was not.
        EntryExistsError: The name belongs to something else.
        KVStoreError: Its blocks have another size, or the store's own blocks lack
            states or windows that the entry needs.
        OSError: The disk is full or fails.
    """
    check_signer(bundle.signer, is_signed_only=blocks.folder.config.is_signed_only)
    _check_block_size(bundle, blocks.folder)
    name = bundle.entry.name if name is None else name
    with _unpacked(blocks.folder, bundle, like, progress) as found:
        # Before the blocks that name them can be seen.
        for basis in bundle.bases.values():
            add_basis(blocks.folder, basis)
        return blocks.run(lambda: admit(blocks, catalog, found, name, replace=replace))


def open_bundle(
    file: IO[bytes] | BundleReader,
    fingerprint: Fingerprint | None = None,
    signer: str | None = None,
) -> BundleReader:
    """Return a bundle of the model wanted, as far as its start tells.

    It needs no store, so none has to be made for what is refused here.

    Args:
        file: The bundle, or a reader that this has returned.
        fingerprint: Of the model wanted; ``None`` takes any.
        signer: Name of the signer wanted; ``None`` takes any, and none.

    Raises:
        FormatError: It is no bundle, or one of a newer release.
        IntegrityError: It is damaged.
        SignerError: Somebody else signed it, or nobody did.
        FingerprintError: Another model made it.
    """
    bundle = file if isinstance(file, BundleReader) else BundleReader(file)
    check_signer(bundle.signer, wanted=signer)
    if fingerprint is not None:
        stored = Fingerprint(bundle.origin.fingerprint)
        refuse_other(bundle.entry.name or bundle.entry.tip[:12], stored, fingerprint)
    return bundle


def _check_block_size(bundle: BundleReader, folder: StoreFolder) -> None:
    if bundle.block_size != folder.block_size:
        raise KVStoreError(
            f"the bundle has blocks of {bundle.block_size} tokens, and the store of"
            f" {folder.block_size}: {folder.path}",
            hint="import it into another store",
        )


@contextmanager
def _unpacked(
    folder: StoreFolder,
    bundle: BundleReader,
    like: Sequence[Any] | None,
    progress: Progress,
) -> Iterator[Incoming]:
    """Stage the shards of a bundle and check all of it; remove what is not published.

    Raises:
        FormatError: It has a shard of a newer release.
        IntegrityError: Anything is not as it must be.
        OSError: The disk is full or fails.
    """
    with _refusing():
        inspector = Inspector(
            bundle.entry,
            bundle.origin,
            bundle.block_size,
            carried_codecs(folder, bundle.bases),
            like,
        )
    found: list[StagedShard] = []
    touched_at = time.monotonic()
    with ExitStack() as stack:
        # Before a gigabyte has been read from a pipe.
        check_space(folder, bundle.entry.nbytes)
        for name, size, parts in bundle.shards():
            check_space(folder, size)
            path = stack.enter_context(files.staged_path(folder.staging))
            with _refusing_shard(name, path):
                receive_shard(folder, path, name, parts)
                with open_shard_at(path, folder.cipher) as opened:
                    own = opened.name()
                    if folder.cipher is None and own != name:
                        raise IntegrityError("it has another header than its name says")
                    _inspect(inspector, bundle, opened)
            found.append(StagedShard(path, own, opened.header))
            progress(inspector.num_tokens, bundle.entry.num_tokens)
            if time.monotonic() - touched_at > _TOUCH_EVERY_S:
                touched_at = time.monotonic()
                for staged in found:
                    os.utime(staged.path)
        with _refusing():
            chain = inspector.finish()
        if inspector.nbytes != bundle.entry.nbytes:
            raise refused("its blocks have another size than its entry says")
        if not set(bundle.bases) <= bases_named(inspector.blocks):
            raise refused("it has a basis that none of its blocks names")
        # Only now, at its end, is the signature known to be right.
        entry = changed(bundle.entry, signer=bundle.signer)
        yield Incoming(entry, chain, tuple(inspector.blocks), tuple(found))


def _inspect(inspector: Inspector, bundle: BundleReader, opened: OpenShard) -> None:
    """Check a shard, which has the next blocks of the entry and no others."""
    if opened.header.origin != bundle.origin or not opened.header.blocks:
        raise IntegrityError("it is of another model or layout, or has no block")
    for stored in opened.header.blocks:
        inspector.inspect(stored, opened)


@contextmanager
def _refusing() -> Iterator[None]:
    """Refuse the bundle where its entry is refused."""
    try:
        yield
    except (IntegrityError, CodecError) as error:
        raise refused(str(error)) from error


@contextmanager
def _refusing_shard(name: str, path: Path) -> Iterator[None]:
    """Refuse the bundle where a shard is refused; nobody knows the staged file."""
    try:
        yield
    except (IntegrityError, CodecError) as error:
        why = str(error).replace(f": {path}", "")
        raise refused(f"shard {name[:12]}: {why}") from error
