"""Every error of kvstore, and nothing else.

::

    KVStoreError(Exception)              exit 1
    ├── StoreNotFoundError               exit 10, also a FileNotFoundError
    ├── StoreLockedError                 exit 11
    ├── FormatError                      a store or shard version we do not read
    ├── EntryNotFoundError               also a LookupError
    ├── EntryExistsError                 the name belongs to another conversation
    ├── FingerprintError                 made by another model: names the field
    ├── CodecError                       unknown name or bad configuration
    ├── UnsupportedCacheError            a cache class we cannot store
    ├── IntegrityError                   bytes disagree with their digest or header
    ├── IndexDamagedError                the index is wrong, and could not be rebuilt
    ├── ArgumentError                    a mistake in a call; also ValueError, TypeError
    ├── RemoteError                      an object store fails, or refuses a request
    ├── KeyNotFoundError                 the key of an encrypted store is not there
    └── SignerError                      not signed by whom it has to be

A caller writes::

    try:
        prompt_cache, tokens = store.load_entry("handbook", fingerprint)
    except kvstore.EntryNotFoundError:
        ...  # compute it
    except kvstore.IntegrityError as error:
        print(error, error.path, error.hint)
"""

from __future__ import annotations

from pathlib import Path


class KVStoreError(Exception):
    """Base of all errors of this package.

    Attributes:
        hint: What the user can do about it, one sentence, or empty.
        exit_code: What the command line exits with.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class StoreNotFoundError(KVStoreError, FileNotFoundError):
    """There is no store at this path."""

    exit_code = 10

    # FileNotFoundError formats (errno, text); ours is one sentence.
    def __str__(self) -> str:
        return str(self.args[0])


class StoreLockedError(KVStoreError):
    """Another process kept the store locked for too long."""

    exit_code = 11


class FormatError(KVStoreError):
    """A store, shard or entry has a format version that this release cannot read."""


class EntryNotFoundError(KVStoreError, LookupError):
    """No entry has this name or id."""


class EntryExistsError(KVStoreError):
    """The name is taken by an entry that the new one does not continue."""


class FingerprintError(KVStoreError):
    """An entry was made by another model than the one given."""


class CodecError(KVStoreError):
    """A codec's name is unknown or its configuration is bad."""


class UnsupportedCacheError(KVStoreError):
    """A prompt cache holds a class that cannot be stored."""


class IntegrityError(KVStoreError):
    """Stored bytes disagree with their digest or header.

    Attributes:
        path: The file at fault, where one is.
        block: Hash of the block at fault in hex, where one is.
    """

    def __init__(
        self,
        message: str,
        *,
        path: Path | None = None,
        block: str | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(message, hint=hint)
        self.path = path
        self.block = block


class IndexDamagedError(KVStoreError):
    """The index contradicts itself or a shard.

    Not an :class:`IntegrityError`: no stored row is in doubt. The store rebuilds the
    index from the shards and tries again, so a caller sees this only where that fails.

    Attributes:
        path: The index.
    """

    def __init__(self, why: str, path: Path) -> None:
        super().__init__(
            f"the index is damaged: {why}",
            hint="`kvstore verify --repair` builds it anew",
        )
        self.path = path


class ArgumentError(KVStoreError, ValueError, TypeError):
    """An argument is not what the call takes; the hint says what it takes."""


class KeyNotFoundError(KVStoreError):
    """The key of an encrypted store is not where it should be, or is another one."""


class SignerError(KVStoreError):
    """What comes from elsewhere is not signed by whom it has to be."""


class RemoteError(KVStoreError):
    """An object store cannot be reached, fails, or refuses a request.

    Attributes:
        may_pass: Whether the same request may succeed later.
    """

    def __init__(self, message: str, *, hint: str = "", may_pass: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.may_pass = may_pass
