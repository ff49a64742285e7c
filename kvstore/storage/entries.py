"""Entries by name, changed under the lock."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..errors import (
    EntryExistsError,
    EntryNotFoundError,
    FormatError,
    IndexDamagedError,
    IntegrityError,
    StoreLockedError,
)
from ..format import entry as entries
from ..format.entry import (
    MAX_BYTES,
    Entry,
    check_name,
    damaged_entry,
    entry_to_bytes,
    normalize_name,
    parse_entry,
)
from . import files
from .blocks import BlockStore
from .folder import StoreFolder
from .index import Index
from .ledger import load_entry, read_entries, see_entries, stamp_of


def write_entry(folder: StoreFolder, entry: Entry) -> None:
    """Commit an entry durably.

    Raises:
        IntegrityError: It could not be read again; what was there before stays.
    """
    path, data = folder.entry_path(entry.id), entry_to_bytes(entry)
    # Before it is written: a save must not be acknowledged that nobody can read.
    if len(data) > MAX_BYTES or parse_entry(path, data, entry.id) != entry:
        raise damaged_entry(path, "it would be read as another")
    sealed = folder.seal(data, "entry", entry.id)
    files.write_atomic(path, sealed, folder.staging)


def read_entry(folder: StoreFolder, entry: str) -> Entry | None:
    """Return the entry with this id, or ``None``.

    Raises:
        IntegrityError: Its file is damaged.
        FormatError: It has a format we do not read.
    """
    try:
        return load_entry(folder, entry)
    except FileNotFoundError:
        return None


def set_entry_aside(folder: StoreFolder, path: Path) -> None:
    """Move the file of an entry that cannot be read to quarantine."""
    aside = f"entry-{path.stem}-{secrets.token_hex(4)}{path.suffix}"
    files.publish(path, folder.quarantine / aside)


def copied_entry(folder: StoreFolder, index: Index, entry: str) -> Entry | None:
    """Return an entry by its second copy in the index, or ``None``."""
    body = index.entry(entry)
    try:
        path = folder.entry_path(entry)
        return parse_entry(path, body, entry) if body else None
    except (IntegrityError, FormatError):
        return None


def list_ids(folder: StoreFolder) -> list[str]:
    """Return the ids of all entries, sorted."""
    found = (folder.entry_of(path.name) for path in folder.entries.iterdir())
    return sorted(entry for entry in found if entry is not None)


def remove_entries(blocks: BlockStore, ids: Sequence[str]) -> None:
    """Remove the files of entries durably, then their copies; the lock is held."""
    for entry_id in ids:
        path = blocks.folder.entry_path(entry_id)
        if path.is_dir() and not path.is_symlink():
            set_entry_aside(blocks.folder, path)
        else:
            path.unlink()
    files.sync_dir(blocks.folder.entries)
    # Nobody reads a copy whose file is gone, and `prune` drops those that are left.
    with (
        suppress(OSError, StoreLockedError, FormatError, IndexDamagedError),
        blocks.index.transaction(),
    ):
        for entry_id in ids:
            blocks.index.drop_entry(entry_id)


MIN_ID = 4
"""Shortest id prefix accepted. Shorter ones would match by accident."""


class Catalog:
    """Entries by name and id.

    The index holds a second copy of each entry, by which a damaged file is known to
    :mod:`~kvstore.ops.upkeep.prune` and rebuilt by a repair.

    Args:
        blocks: The store's blocks.
        base: Those of a store that is only read, to say that an entry is there.
    """

    def __init__(self, blocks: BlockStore, base: BlockStore | None = None) -> None:
        self._blocks = blocks
        self._base = base

    @property
    def _folder(self) -> StoreFolder:
        return self._blocks.folder

    def all(self) -> list[Entry]:
        """Return all entries that can be read, latest first."""
        known = self._blocks.run(lambda: read_entries(self._blocks.index, self._folder))
        found = [entry for entry in known.values() if isinstance(entry, Entry)]
        return sorted(found, key=lambda entry: (-entry.updated_at, entry.id))

    def find(self, ref: str) -> Entry:
        """Return the entry with this name, or whose id starts so.

        Raises:
            EntryNotFoundError: There is none, or the start is short or fits several.
            IntegrityError: Its file is damaged.
            ArgumentError: It is no text.
        """
        entries.check_ref(ref)
        folder = self._folder
        named = read_entry(folder, entries.entry_id(ref, ""))
        if named is not None:
            return named
        is_start = len(ref) >= MIN_ID
        ids = [i for i in list_ids(folder) if is_start and i.startswith(ref)]
        entry = read_entry(folder, ids[0]) if len(ids) == 1 else None
        if entry is None:
            if self._base is not None:
                theirs = Catalog(self._base).find(ref)
                raise EntryNotFoundError(
                    f"`{theirs.name or theirs.id}` is in the base, which is only read",
                    hint="`--store` in place of `--base` opens it to change or push it",
                )
            several = f": {len(ids)} ids start so" if len(ids) > 1 else ""
            least = "" if is_start else f"; of an id, give {MIN_ID} digits at least"
            raise EntryNotFoundError(
                f"no entry `{ref}`{several}", hint=f"`kvstore ls` lists them{least}"
            )
        return entry

    def _current(self, ref: str | Entry) -> Entry:
        """Return an entry; one that is given only where it has not moved on."""
        if isinstance(ref, str):
            return self.find(ref)
        entry = read_entry(self._folder, ref.id)
        if entry is None or entry.tip != ref.tip:
            raise EntryNotFoundError(
                f"`{ref.name or ref.id}` is another conversation by now",
                hint="`kvstore ls` lists them",
            )
        return entry

    def holder(self, name: str | None, tip: str) -> Entry | None:
        """Return the entry that a save under this name would replace."""
        key = entries.entry_id(name, tip)
        try:
            return read_entry(self._folder, key)
        except (IntegrityError, OSError):
            return None  # a damaged entry does not reserve its name

    def commit(self, entry: Entry) -> Entry:
        """Write an entry, which makes a save count; the lock is held.

        What could not be read in its place goes to quarantine.

        Raises:
            IndexDamagedError: Somebody has deleted the store, and another lies in its
                place: it has the entry perhaps, and none of its blocks.
        """
        folder = self._folder
        path = folder.entry_path(entry.id)
        self._blocks.refuse_memory()
        # First, so that the copy is never older than what was acknowledged.
        self._blocks.run(lambda: self._put_copy(entry))
        try:
            read_entry(folder, entry.id)
        except IntegrityError:
            set_entry_aside(folder, path)
        write_entry(folder, entry)
        with suppress(OSError):
            see_entries(self._blocks.index, [(entry, stamp_of(path.lstat()))])
        return entry

    def _put_copy(self, entry: Entry) -> None:
        with self._blocks.index.transaction():
            self._blocks.index.put_entry(entry.id, entry_to_bytes(entry))

    def remove(self, ref: str | Entry) -> Entry:
        """Remove an entry and return it."""
        with files.locked(self._folder.lock, exclusive=True):
            entry = self._current(ref)
            remove_entries(self._blocks, [entry.id])
        return entry

    def rename(self, ref: str | Entry, name: str) -> Entry:
        """Give an entry another name, or its first.

        A crash in between leaves it under both names.

        Raises:
            EntryExistsError: The name is taken.
        """
        check_name(name)
        name = normalize_name(name)
        with files.locked(self._folder.lock, exclusive=True):
            old = self._current(ref)
            if old.name == name:
                return old
            if self.holder(name, old.tip) is not None:
                raise EntryExistsError(
                    f"the name `{name}` is taken", hint="remove that entry first"
                )
            renamed = replace(old, id=entries.entry_id(name, old.tip), name=name)
            self.commit(renamed)
            remove_entries(self._blocks, [old.id])
        return renamed

    def pin(self, ref: str, *, pinned: bool) -> Entry:
        """Keep an entry from being evicted, whatever is asked; or no longer."""
        with files.locked(self._folder.lock, exclusive=True):
            return self.commit(replace(self.find(ref), pinned=pinned))
