"""What all entries say, from their copies in the index where their files are untouched.

To open and check a file takes ten times what a look at its name does. A file whose
stamp is still that of when it was read holds what it held then, and its copy in the
index is believed where it has the digest of that.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING

import blake3

from ..errors import FormatError, IntegrityError, StoreLockedError
from ..format.entry import (
    MAX_BYTES,
    Entry,
    damaged_entry,
    entry_to_bytes,
    parse_entry,
    to_entry,
)
from . import files
from .cipher import SEALED_BYTES
from .index import Index

if TYPE_CHECKING:
    from .folder import StoreFolder

Found = Entry | IntegrityError | FormatError | OSError
"""An entry, or why it cannot be read."""


def read_entries(index: Index, folder: StoreFolder) -> dict[str, Found]:
    """Return all entries by their ids, and what is wrong with those not readable."""
    known = index.entries()
    found: dict[str, Found] = {}
    read: list[tuple[Entry, str]] = []
    for entry_id, stamp in sorted(_stamps(folder)):
        body, seen, digest = known.get(entry_id, (b"", "", b""))
        if seen == stamp and _digest(body) == digest:
            found[entry_id] = _to_entry(body)
            continue
        try:
            entry = load_entry(folder, entry_id)
        except FileNotFoundError:
            continue  # another process has removed it just now
        except (IntegrityError, FormatError, OSError) as error:
            found[entry_id] = error
        else:
            found[entry_id] = entry
            read.append((entry, stamp))
    see_entries(index, read)
    return found


def load_entry(folder: StoreFolder, entry_id: str) -> Entry:
    """Return the entry with this id, as its file has it.

    Raises:
        FileNotFoundError: There is none.
        IntegrityError: Its file is damaged.
        FormatError: It has a format we do not read.
    """
    path = folder.entry_path(entry_id)
    try:
        data = files.read_small(path, MAX_BYTES + SEALED_BYTES)
        data = folder.unseal(data, "entry", entry_id)
    except (ValueError, EOFError) as error:
        raise damaged_entry(path, str(error)) from error
    return parse_entry(path, data, entry_id)


def see_entries(index: Index, read: list[tuple[Entry, str]]) -> None:
    """Note what entries' files hold, if the index can be written to now.

    Args:
        index: The index.
        read: Entries, and the stamps that their files had before they were read.
    """
    if not read:
        return
    # Who cannot write it reads the files again.
    with suppress(StoreLockedError, OSError), index.unsynced():
        for entry, stamp in read:
            body = entry_to_bytes(entry)
            can_go = entry.name is None and not entry.pinned
            size = entry.nbytes if can_go else 0
            index.see_entry(entry.id, body, stamp, _digest(body), size)


def stamp_of(status: os.stat_result) -> str:
    """Return what changes where a file does, or another takes its place."""
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{status.st_ino} {status.st_size} {times}"


def _stamps(folder: StoreFolder) -> list[tuple[str, str]]:
    found = []
    with os.scandir(folder.entries) as items:
        for item in items:
            if (entry_id := folder.entry_of(item.name)) is not None:
                with suppress(FileNotFoundError):
                    status = item.stat(follow_symlinks=False)
                    found.append((entry_id, stamp_of(status)))
    return found


def _digest(body: bytes) -> bytes:
    return blake3.blake3(body).digest()


def _to_entry(body: bytes) -> Entry:
    """Return the entry that bytes spell which have been checked before."""
    fields = json.loads(body)
    del fields["digest"], fields["format"]
    return to_entry(fields)
