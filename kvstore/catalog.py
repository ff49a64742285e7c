"""The entries of one store by name: found, committed, renamed, pinned, removed.

Whatever changes a name happens under the store's exclusive lock.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from dataclasses import replace

from . import entries, files
from .errors import (
    EntryExistsError,
    EntryNotFoundError,
    FormatError,
    IntegrityError,
)
from .folder import StoreFolder
from .types import Entry

MAX_NAME = 200
MIN_ID = 4
"""As few digits of an id are taken for it; fewer are a slip of the hand."""
MAX_LABEL = 1000


class Catalog:
    """Entries by name and id.

    Args:
        folder: The store.
    """

    def __init__(self, folder: StoreFolder) -> None:
        self._folder = folder

    def all(self) -> list[Entry]:
        """Return all entries that can be read, latest first."""
        found = []
        for entry_id in entries.list_ids(self._folder.entries):
            with suppress(IntegrityError, FormatError):
                entry = entries.read_entry(self._folder.entries, entry_id)
                # Another process may have removed it just now.
                found += [entry] if entry else []
        return sorted(found, key=lambda entry: (-entry.updated_at, entry.id))

    def find(self, ref: str) -> Entry:
        """Return the entry with this name, or whose id starts so.

        Raises:
            EntryNotFoundError: There is none, or the start is short or fits several.
            IntegrityError: Its file is damaged.
        """
        folder = self._folder.entries
        named = entries.read_entry(folder, entries.entry_id(ref, ""))
        if named is not None:
            return named
        is_start = len(ref) >= MIN_ID
        ids = [i for i in entries.list_ids(folder) if is_start and i.startswith(ref)]
        entry = entries.read_entry(folder, ids[0]) if len(ids) == 1 else None
        if entry is None:
            several = f": {len(ids)} ids start so" if len(ids) > 1 else ""
            raise EntryNotFoundError(
                f"no entry `{ref}`{several}", hint="`kvstore ls` lists them"
            )
        return entry

    def _current(self, ref: str | Entry) -> Entry:
        """Return an entry; one that is given only where it has not moved on."""
        if isinstance(ref, str):
            return self.find(ref)
        entry = self.find(ref.id)
        if entry.tip != ref.tip:
            raise EntryNotFoundError(
                f"`{ref.name or ref.id}` is another conversation by now",
                hint="`kvstore ls` lists them",
            )
        return entry

    def holder(self, name: str | None, tip: str) -> Entry | None:
        """Return the entry that a save under this name would replace."""
        key = entries.entry_id(name, tip)
        try:
            return entries.read_entry(self._folder.entries, key)
        except IntegrityError:
            return None  # what nobody can read stands in nobody's way

    def commit(self, entry: Entry) -> Entry:
        """Write an entry, which makes a save count; the lock is held.

        What could not be read in its place goes to quarantine.
        """
        folder = self._folder
        path = entries.entry_path(folder.entries, entry.id)
        try:
            entries.read_entry(folder.entries, entry.id)
        except IntegrityError:
            aside = f"entry-{entry.id}-{secrets.token_hex(4)}.json"
            files.publish(path, folder.quarantine / aside)
        entries.write_entry(folder.entries, entry, folder.staging)
        return entry

    def remove(self, ref: str | Entry) -> Entry:
        """Remove an entry and return it."""
        with files.locked(self._folder.lock, exclusive=True):
            entry = self._current(ref)
            entries.remove_entry(self._folder.entries, entry.id)
        return entry

    def rename(self, ref: str | Entry, name: str) -> Entry:
        """Give an entry another name, or its first.

        A crash in between leaves it under both names.

        Raises:
            EntryExistsError: The name is taken.
        """
        check_name(name)
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
            entries.remove_entry(self._folder.entries, old.id)
        return renamed

    def pin(self, ref: str, *, pinned: bool) -> Entry:
        """Keep an entry from being evicted, whatever is asked; or no longer."""
        with files.locked(self._folder.lock, exclusive=True):
            return self.commit(replace(self.find(ref), pinned=pinned))


def make_entry(
    old: Entry | None,
    *,
    name: str | None,
    tip: str,
    root: str,
    num_tokens: int,
    nbytes: int,
    codec: str,
    model: str,
) -> Entry:
    """Return an entry saved now, in place of ``old`` where there is one."""
    now = time.time()
    return Entry(
        id=entries.entry_id(name, tip),
        name=name,
        tip=tip,
        root=root,
        num_tokens=num_tokens,
        nbytes=nbytes,
        codec=codec,
        model=model[:MAX_LABEL],
        made_with=_versions(),
        created_at=old.created_at if old else now,
        updated_at=now,
        pinned=old.pinned if old else False,
    )


def check_name(name: str | None) -> None:
    """Refuse names that could not be typed or printed.

    Raises:
        ValueError: It is one.
    """
    if name is None:
        return
    if not name or len(name) > MAX_NAME or not name.isprintable() or name[0] == "-":
        raise ValueError(
            f"a name has 1 to {MAX_NAME} printable characters and does not start"
            f" with `-`: {name!r}"
        )


def _versions() -> dict[str, str]:
    """Return the versions that an entry records; advisory."""
    # Imported here: it takes as long as listing a thousand entries.
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for distribution in ("mlx-kvstore", "mlx", "mlx-lm"):
        with suppress(PackageNotFoundError):
            found[distribution] = version(distribution)
    return found
