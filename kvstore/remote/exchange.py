"""Entries of a store to its remotes and back: what ``Store.remotes`` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace as changed
from typing import TYPE_CHECKING, Any

from ..errors import EntryNotFoundError, IntegrityError, KVStoreError
from ..fingerprint import Fingerprint
from ..format.block import Progress, ignore_progress
from ..format.chain import as_tokens
from ..format.entry import Entry, check_name
from ..storage.blocks import BlockStore
from ..storage.entries import Catalog
from .catalog import Found, find_entry, find_prefixes, list_entries, read_new
from .client import Client, Limits, Remote
from .layout import EntryKey, RemoteEntry
from .probe import Probe, probe
from .remotes import add_remote, find_remote, read_remotes, remove_remote

if TYPE_CHECKING:
    from .push import Pushed


class Remotes:
    """The object stores that one store knows, by their names."""

    def __init__(self, blocks: BlockStore, catalog: Catalog) -> None:
        self._blocks = blocks
        self._catalog = catalog

    def all(self) -> list[Remote]:
        """Return where they are.

        Raises:
            IntegrityError: The file that they are kept in is damaged.
        """
        return read_remotes(self._blocks.folder)

    def add(self, remote: Remote) -> Probe:
        """Note an object store that ``make_remote`` made, having tried what it can do.

        Raises:
            RemoteError: It cannot be reached, or can do nothing that is needed.
            KVStoreError: Another one has this name.
        """
        self._refuse_sealed()
        found = probe(Client(remote, create=True))
        add_remote(self._blocks.folder, remote)
        return found

    def remove(self, name: str) -> Remote:
        """Forget an object store, and return it; what lies in it stays.

        Raises:
            KVStoreError: There is none of this name.
        """
        return remove_remote(self._blocks.folder, name)

    def entries(self, remote: str | None = None) -> Found:
        """Return the entries of a remote, latest first; of each name the latest.

        The only remote is the default. What is refused is named in the log.

        Raises:
            RemoteError: The remote fails, or cannot list.
        """
        return list_entries(self.client(remote))

    def push(
        self,
        ref: str,
        remote: str | Client | None = None,
        *,
        progress: Progress | None = None,
    ) -> Pushed:
        """Put an entry into a remote; what is there already is not sent again.

        Args:
            ref: The entry's name, or its id or the start of it.
            remote: The remote, or its name; the only one by default.
            progress: Called with (bytes that are there, bytes in all).

        Raises:
            EntryNotFoundError: There is no such entry.
            IntegrityError: A part of it is missing or damaged.
            RemoteError: The remote fails; pushing again goes on from there.
        """
        from .push import push_entry

        entry, client = self._catalog.find(ref), self.client(remote)
        return push_entry(self._blocks, entry, client, progress or ignore_progress)

    def pull(
        self,
        wanted: str | Sequence[int] | RemoteEntry,
        remote: str | Client | None = None,
        *,
        fingerprint: Fingerprint | None = None,
        like: Sequence[Any] | None = None,
        min_bits: int = 0,
        name: str | None = None,
        replace: bool = False,
        progress: Progress | None = None,
    ) -> Entry:
        """Take an entry of a remote into the store; only what it lacks is read.

        All of it is checked before any of it can be seen, as
        :meth:`kvstore.Store.import_bundle` does.

        Args:
            wanted: The entry's name, or the start of its id in the remote; or the
                tokens of a prompt, of which the most that the remote has is taken: of
                an entry that goes on otherwise, the full blocks that it shares; or an
                entry that was found there.
            remote: The remote, or its name; the only one by default.
            fingerprint: The model's; ``None`` takes what any model made.
            like: The model's empty prompt cache, as ``import_bundle`` takes it.
            min_bits: Fewest bits per number that its rows must have.
            name: A name for the entry, in place of its own.
            replace: Take the name from an entry that this does not continue.
            progress: Called with (bytes that have come, bytes to come).

        Raises:
            EntryNotFoundError: There is none, or there are several.
            IntegrityError: It is not what its names say.
            SignerError: No trusted key signed it, and the remote is not trusted.
            EntryExistsError: The name is taken.
            KVStoreError: Its rows have fewer bits.
            RemoteError: The remote fails; pulling again goes on from there.
            ValueError: The name is not one.
            OSError: The disk is full or fails.
        """
        from .pull import pull_entry

        check_name(name)
        client, errors = self.client(remote), []
        for found in _find(client, wanted, fingerprint):
            try:
                return pull_entry(
                    self._blocks,
                    self._catalog,
                    client,
                    found,
                    name,
                    replace=replace,
                    like=like,
                    min_bits=min_bits,
                    progress=progress or ignore_progress,
                )
            except IntegrityError as error:
                errors.append(error)  # of a prompt, a shorter one may do
        raise errors[0]

    def client(
        self,
        remote: str | Client | None,
        limits: Limits | None = None,
        *,
        is_trusted: bool = False,
    ) -> Client:
        """Return a remote, by default the only one, to be asked within these limits.

        Where it ``is_trusted``, its entries need no signature, whatever was noted.

        Raises:
            KVStoreError: There is none of this name.
        """
        self._refuse_sealed()
        if isinstance(remote, Client):
            return remote
        found = find_remote(self._blocks.folder, remote)
        is_trusted = is_trusted or found.is_trusted
        return Client(changed(found, is_trusted=is_trusted), limits)

    def _refuse_sealed(self) -> None:
        if self._blocks.folder.cipher is not None:
            raise KVStoreError(
                "an encrypted store has no remotes: what lies there is in the clear",
                hint="`kvstore export` writes one entry in the clear, on purpose",
            )


def _find(
    client: Client,
    wanted: str | Sequence[int] | RemoteEntry,
    fingerprint: Fingerprint | None,
) -> list[RemoteEntry]:
    """Return what is wanted of a remote; of a prompt, the longest first."""
    if isinstance(wanted, RemoteEntry):
        return [wanted]
    digest = fingerprint.digest if fingerprint else None
    if isinstance(wanted, str):
        return [find_entry(client, wanted, digest)]
    known: dict[EntryKey, RemoteEntry | None] = {}
    read_new(client, digest, known)
    if found := find_prefixes(known.values(), as_tokens(wanted)):
        return found
    raise EntryNotFoundError(
        f"remote `{client.remote.name}` has nothing of this prompt and model",
        hint="`kvstore ls --remote` lists what it has",
    )
