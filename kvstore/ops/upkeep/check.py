"""Verify a store, open its index, rebuild it. Verifying never writes."""

from __future__ import annotations

import errno
import random
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...errors import FormatError, IndexDamagedError, IntegrityError, KVStoreError
from ...format.basis import bases_named, basis_of
from ...format.block import BlockHash, Progress, StoredBlock
from ...format.config import CONFIG, CONFIG_COPY
from ...format.entry import Entry, damaged_entry
from ...storage import files
from ...storage.bases import basis_path, list_bases, read_basis, read_calibration
from ...storage.blocks import READ_ONLY, _build_index, is_sound, place_in
from ...storage.entries import (
    copied_entry,
    list_ids,
    read_entry,
    set_entry_aside,
    write_entry,
)
from ...storage.folder import (
    StoreFolder,
    open_folder,
    read_config,
    write_config,
)
from ...storage.index import Index
from ...storage.shards import (
    OpenShard,
    list_shards,
    open_shard,
    publish_shard,
    quarantine_shard,
    shard_path,
    staged_copy,
    take_back,
)

FindingKind = Literal[
    "damaged-entry",
    "damaged-shard",
    "damaged-block",
    "missing-shard",
    "missing-block",
    "unindexed-shard",
    "damaged-index",
    "newer-format",
    "damaged-config",
    "damaged-basis",
    "missing-basis",
    "foreign-rows",
]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that ``verify`` found wrong."""

    # What sort of thing.
    kind: FindingKind
    # The file, relative to the store.
    path: str
    # What is wrong, one sentence.
    detail: str
    # Names or ids of entries that cannot be loaded because of it.
    entries: tuple[str, ...] = ()


_SHARD_DAMAGE = ("damaged-shard", "damaged-block")
Sound = dict[BlockHash, tuple[str, StoredBlock]]
"""Blocks that were found good: in which shard, and what its header says."""


def verify(folder: StoreFolder, read_data: float, progress: Progress) -> list[Finding]:
    """Return everything that is wrong with a store.

    Args:
        folder: The store.
        read_data: Which part of the shards is read whole, 0 to 1.
        progress: Called with (shards checked, shards in all).
    """
    sound: Sound = {}
    findings: list[Finding] = []
    # Entries first: the blocks of what is saved from now on are not asked for.
    found = [(i, _read_entry(folder, i)) for i in list_ids(folder)]
    findings += _check_config(folder)
    names = list_shards(folder.shards)
    progress(0, len(names))
    for done, name in enumerate(names, 1):
        whole = random.random() < read_data
        findings += _check_shard(folder, name, whole, sound)
        progress(done, len(names))
    findings += _check_bases(folder, sound)
    needed: dict[BlockHash, Entry] = {}
    findings += _check_entries(folder, found, sound, needed)
    findings += _check_index(folder, set(names), sound, needed)
    return findings


def repair(folder: StoreFolder) -> list[Finding]:
    """Put right what can be, and return what was found.

    Damaged entries and shards go to quarantine; an entry comes back from its copy in
    the index; the good blocks of a damaged shard are written into a new one; shards in
    quarantine that are whole come back; the index is built anew.
    """
    findings = verify(folder, 1.0, lambda done, total: None)
    if not findings:
        return findings
    with files.locked(folder.lock, exclusive=True):
        damaged = [f for f in findings if f.kind == "damaged-config"]
        for finding in damaged:
            _make_way(folder, folder.path / finding.path)
        if damaged:
            write_config(folder.path, _configured(folder).config)
        for finding in findings:
            path = folder.path / finding.path
            is_entry = finding.kind == "damaged-entry"
            entry_id = folder.entry_of(path.name) if is_entry else None
            if entry_id is not None and _is_broken(folder, entry_id):
                _replace_entry(folder, entry_id)
        for shard in sorted({f.path for f in findings if f.kind in _SHARD_DAMAGE}):
            name = Path(shard).stem
            # It may have been written anew since it was looked at.
            if list(_check_shard(folder, name, True, {})):
                _replace_shard(folder, name)
        take_back(folder)
        _build_index(folder)
    return findings


def _make_way(folder: StoreFolder, path: Path) -> None:
    """Put a folder aside that lies where a file is to be; no rename replaces it."""
    if path.is_dir():
        aside = f"{path.stem}-{secrets.token_hex(4)}"
        files.publish(path, folder.quarantine / aside)


def _replace_entry(folder: StoreFolder, entry_id: str) -> None:
    """Put the index's copy in the place of a damaged entry, which else is set aside."""
    entry = None
    with suppress(IndexDamagedError, OSError):
        index = Index(folder.index, cipher=folder.cipher)
        try:
            entry = copied_entry(folder, index, entry_id)
        finally:
            index.close()
    path = folder.entry_path(entry_id)
    # At no moment there is none: a copy without a file is that of a removed entry.
    if entry is None or path.is_dir():
        set_entry_aside(folder, path)
    if entry is not None:
        write_entry(folder, entry)


def _is_broken(folder: StoreFolder, entry_id: str) -> bool:
    """Whether an entry still cannot be read; it may have been saved again."""
    try:
        read_entry(folder, entry_id)
    except (IntegrityError, OSError):
        return True
    except FormatError:
        return False  # whole, and another release's
    return False


def _replace_shard(folder: StoreFolder, name: str) -> None:
    """Put a damaged shard into quarantine, and its good blocks into a new one."""
    with (
        # Where nothing in it can be told apart, or read at all.
        suppress(IntegrityError, FormatError, OSError),
        open_shard(folder, name) as opened,
    ):
        found = opened.header.blocks
        good = [b for b in found if _block_problem(opened, b, True) is None]
        if good:
            with staged_copy(folder, opened, good) as staged:
                publish_shard(folder.shards, staged)
    quarantine_shard(folder.shards, name, folder.quarantine)


def _configured(folder: StoreFolder) -> StoreFolder:
    """Return a store with what others have set since it was opened, if one can say."""
    with suppress(KVStoreError, OSError):
        return open_folder(folder.path, is_borrowed=True)
    return folder


def _check_config(folder: StoreFolder) -> Iterator[Finding]:
    """Yield which of the two copies of the configuration is not right."""
    folder = _configured(folder)
    for name in (CONFIG, CONFIG_COPY):
        path = folder.path / name
        try:
            if folder.config == read_config(path):
                continue
            detail = "it differs from the other copy"
        except (IntegrityError, FormatError, OSError) as error:
            detail = str(error)
        yield _finding(folder, "damaged-config", path, detail)


def _check_bases(folder: StoreFolder, sound: Sound) -> Iterator[Finding]:
    """Yield bases and calibrations that are not right; take what needs them away."""
    for path in sorted(folder.bases.glob("*.json")):
        try:
            read_calibration(folder, path.stem)
        except (IntegrityError, FormatError, OSError, ValueError) as error:
            yield _finding(folder, "damaged-basis", path, str(error))
    bad = bases_named(stored for _, stored in sound.values())
    for digest in sorted(bad | set(list_bases(folder))):
        path = basis_path(folder, digest)
        try:
            read_basis(folder, digest)
            bad.discard(digest)
        except (IntegrityError, FormatError, OSError) as error:
            kind: FindingKind = "damaged-basis" if path.exists() else "missing-basis"
            yield _finding(folder, kind, path, str(error))
    for block, (_, stored) in list(sound.items()):
        if basis_of(stored.codec) in bad:
            del sound[block]  # nobody can decode it


def _check_shard(
    folder: StoreFolder, name: str, whole: bool, sound: Sound
) -> Iterator[Finding]:
    """Yield what is wrong with a shard; add its good blocks to ``sound``."""
    path = shard_path(folder.shards, name)
    try:
        with open_shard(folder, name) as opened:
            for stored in opened.header.blocks:
                problem = _block_problem(opened, stored, whole)
                if problem is None:
                    sound.setdefault(stored.block.hash, (name, stored))
                else:
                    yield _finding(folder, "damaged-block", path, problem)
            if opened.name() != name:
                problem = "its header is not the one that its name says"
                yield _finding(folder, "damaged-shard", path, problem)
        if whole:
            _second_opinion(path)
    except FileNotFoundError:
        return  # pruned by another process meanwhile
    except FormatError as error:
        yield _finding(folder, "newer-format", path, str(error))
    except (IntegrityError, OSError) as error:
        yield _finding(folder, "damaged-shard", path, str(error))


def _block_problem(opened: OpenShard, stored: StoredBlock, whole: bool) -> str | None:
    name = stored.block.hash.hex()[:12]
    if not is_sound(stored):
        return f"block {name} is not named by its tokens"
    try:
        if whole:
            list(opened.read([stored]))
    except (IntegrityError, OSError) as error:
        return str(error)
    return None


def _second_opinion(path: Path) -> None:
    """Have the safetensors library open a shard.

    Raises:
        IntegrityError: It refuses.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as opened:
            opened.keys()
    except SafetensorError as error:
        raise IntegrityError(f"safetensors refuses it: {error}") from error


def _check_index(
    folder: StoreFolder, on_disk: set[str], sound: Sound, needed: dict[BlockHash, Entry]
) -> Iterator[Finding]:
    """Yield where the index and the shards on disk disagree.

    A shard that no entry needs may be unknown to it: that is what a save leaves that
    was killed, and its blocks are found again when the same prompt is saved.
    """
    if not folder.index.exists():
        if on_disk:
            yield _finding(folder, "damaged-index", folder.index, "it is missing")
        return
    try:
        index = Index(folder.index, cipher=folder.cipher)
        try:
            yield from _check_rows(folder, index, on_disk, sound, needed)
        finally:
            index.close()
    except IndexDamagedError as error:
        yield _finding(folder, "damaged-index", folder.index, str(error))
    except OSError as error:
        if error.errno in (*READ_ONLY, errno.ENOSPC):
            return  # nobody who reads this store uses its index
        if error.errno != errno.EIO:
            raise
        yield _finding(folder, "damaged-index", folder.index, str(error))


def _check_rows(
    folder: StoreFolder,
    index: Index,
    on_disk: set[str],
    sound: Sound,
    needed: dict[BlockHash, Entry],
) -> Iterator[Finding]:
    """Yield what an index that can be opened says wrongly, or does not say."""
    for problem in index.check():
        yield _finding(folder, "damaged-index", folder.index, problem)
    yield from _compare(folder, index, on_disk)
    lost = [block for block in needed if index.place(block) is None]
    # Evicted meanwhile, whose files went before their rows did.
    lost = [b for b in lost if _read_entry(folder, needed[b].id) == needed[b]]
    for name in sorted({sound[block][0] for block in lost}):
        path = shard_path(folder.shards, name)
        detail = "the index lacks blocks of it that entries need"
        yield _finding(folder, "unindexed-shard", path, detail)


def _compare(folder: StoreFolder, index: Index, on_disk: set[str]) -> Iterator[Finding]:
    """Yield shards that only the index has, and blocks that are not in theirs."""
    known = set(index.shards())
    for name in sorted(known - on_disk):
        path = folder.shards / name[:2] / f"{name}.safetensors"
        if path.exists() or name not in index.shards():
            continue  # added or pruned since the folder was listed
        yield _finding(folder, "missing-shard", path, "the index names it")
    for name in sorted(known & on_disk):
        with suppress(IntegrityError, FormatError, OSError):
            with open_shard(folder, name) as opened:
                held = {place_in(name, stored) for stored in opened.header.blocks}
            for place in index.places_in(name):
                if place not in held:
                    detail = f"block {place.hash.hex()[:12]} is not so in {name[:12]}"
                    yield _finding(folder, "damaged-index", folder.index, detail)
    for block in index.lost_blocks():
        detail = f"block {block.hex()[:12]} is in no shard"
        yield _finding(folder, "damaged-index", folder.index, detail)


def _read_entry(
    folder: StoreFolder, entry_id: str
) -> Entry | IntegrityError | FormatError | None:
    try:
        return read_entry(folder, entry_id)
    except (IntegrityError, FormatError) as error:
        return error
    except OSError as error:
        return damaged_entry(folder.entry_path(entry_id), str(error))


def _check_entries(
    folder: StoreFolder,
    found: Sequence[tuple[str, Entry | IntegrityError | FormatError | None]],
    sound: Sound,
    needed: dict[BlockHash, Entry],
) -> Iterator[Finding]:
    """Yield entries that cannot be read or lack a block; add their blocks."""
    for entry_id, entry in found:
        path = folder.entry_path(entry_id)
        if isinstance(entry, FormatError):
            yield _finding(folder, "newer-format", path, str(entry), (entry_id,))
        elif isinstance(entry, IntegrityError):
            yield _finding(folder, "damaged-entry", path, str(entry), (entry_id,))
        elif entry is not None:
            lost = _first_lost(entry, sound, needed)
            # Removed, or saved again, meanwhile: its blocks may have gone or moved.
            if lost and _read_entry(folder, entry_id) == entry:
                detail = f"block {lost.hex()[:12]} is missing or damaged"
                label = (entry.name or entry.id,)
                yield _finding(folder, "missing-block", path, detail, label)


def _first_lost(
    entry: Entry, sound: Sound, needed: dict[BlockHash, Entry]
) -> BlockHash | None:
    """Return the last block of an entry that is not sound; note those that are."""
    block = BlockHash(bytes.fromhex(entry.tip))
    while block.hex() != entry.root:
        if block not in sound:
            return block
        needed.setdefault(block, entry)
        block = sound[block][1].block.parent
    return None


def _finding(
    folder: StoreFolder,
    kind: FindingKind,
    path: Path,
    detail: str,
    found: tuple[str, ...] = (),
) -> Finding:
    return Finding(kind, str(path.relative_to(folder.path)), detail, found)
