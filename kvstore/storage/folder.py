"""The store's folder: where things lie in it, how it is made and recognised."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, FormatError, IntegrityError, StoreNotFoundError
from ..format.chain import BLOCK_SIZE
from ..format.config import (
    CONFIG,
    CONFIG_COPY,
    MAX_CONFIG_BYTES,
    StoreConfig,
    config_to_bytes,
    damaged_config,
    parse_config,
)
from ..format.documents import JSON
from ..format.entry import is_id
from . import files
from .cipher import Cipher
from .vault import is_kept, unlock

_MAX_DEFAULT_BYTES = 50_000_000_000
_FOLDERS = ("entries", "shards", "quarantine", "tmp")


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """An existing store."""

    path: Path
    config: StoreConfig
    # Number of the disk that it lies on, as the system counts them.
    device: int = 0
    # Of an encrypted store: what its key does.
    cipher: Cipher | None = None

    @property
    def block_size(self) -> int:
        """Tokens in a full block."""
        return self.config.block_size

    @property
    def max_bytes(self) -> int:
        """The size limit: what was set, or a tenth of the disk, at most 50 GB."""
        if self.config.max_bytes is not None:
            return self.config.max_bytes
        disk = os.statvfs(self.path)
        return min(disk.f_blocks * disk.f_frsize // 10, _MAX_DEFAULT_BYTES)

    @property
    def entries(self) -> Path:
        """One JSON file per entry."""
        return self.path / "entries"

    @property
    def shards(self) -> Path:
        """The shards, by the first two digits of their names."""
        return self.path / "shards"

    @property
    def bases(self) -> Path:
        """The bases of the `fit` codecs; there is no such folder before the first."""
        return self.path / "bases"

    @property
    def quarantine(self) -> Path:
        """Files that could not be read; never used again, kept to be looked at."""
        return self.path / "quarantine"

    @property
    def staging(self) -> Path:
        """Files that are being written; what a crash leaves here is garbage."""
        return self.path / "tmp"

    def entry_path(self, entry: str) -> Path:
        """Return where the entry with this id lies; in the clear, its id tells much."""
        if self.cipher is None:
            return self.entries / f"{entry}.json"
        return self.entries / f"{self.cipher.hide(bytes.fromhex(entry)).hex()}.sealed"

    def entry_of(self, name: str) -> str | None:
        """Return the id of the entry in a file of this name, or ``None``."""
        stem, dot, suffix = name.partition(".")
        if self.cipher is None:
            return stem if dot + suffix == ".json" and is_id(stem) else None
        try:
            entry = self.cipher.show(bytes.fromhex(stem)).hex()
        except ValueError:
            return None
        return entry if dot + suffix == ".sealed" and is_id(entry) else None

    def seal(self, data: bytes, *about: str) -> bytes:
        """Return what is written to disk of a small file."""
        return data if self.cipher is None else self.cipher.seal(data, *about)

    def unseal(self, data: bytes, *about: str) -> bytes:
        """Return what :meth:`seal` was given.

        Raises:
            ValueError: It is not of this store and kind.
        """
        return data if self.cipher is None else self.cipher.open(data, *about)

    @property
    def index(self) -> Path:
        """The SQLite index."""
        return self.path / "index.sqlite"

    @property
    def lock(self) -> Path:
        """Held while an entry is committed or things are removed."""
        return self.path / "lock"


def default_path() -> Path:
    """Return ``$KVSTORE_DIR``, or ``kvstore`` in the folder for caches."""
    chosen = os.environ.get("KVSTORE_DIR")
    return Path(chosen).expanduser() if chosen else files.cache_home() / "kvstore"


def open_folder(path: Path, *, is_borrowed: bool = False) -> StoreFolder:
    """Return the store at ``path``.

    Args:
        path: Where it is.
        is_borrowed: Write nothing to it, though it lacks something.

    Raises:
        StoreNotFoundError: There is none.
        FormatError: A newer release made it.
        IntegrityError: Its ``config.json`` is damaged, or that of another store.
    """
    _check_path(path)
    config = _find_config(path)
    _check_folders(path, is_borrowed=is_borrowed)
    # A power cut may have come while the store was made.
    lost = [name for name in (CONFIG_COPY, CONFIG) if not (path / name).exists()]
    for name in [] if is_borrowed else lost:
        with suppress(OSError):  # on a read-only disk nothing is written anyway
            files.write_atomic(path / name, config_to_bytes(config), path / "tmp")
    cipher = None
    if config.encryption is not None:
        cipher = Cipher(unlock(config.encryption), config.id)
    return StoreFolder(path, config, path.stat().st_dev, cipher)


def _find_config(path: Path) -> StoreConfig:
    """Return the configuration, of which one copy may be damaged or missing."""
    found: list[StoreConfig] = []
    errors: list[Exception] = []
    for name in (CONFIG, CONFIG_COPY):
        try:
            found.append(read_config(path / name))
        except (OSError, IntegrityError, FormatError) as error:
            errors.append(error)
    if not found:
        if isinstance(errors[0], FileNotFoundError | NotADirectoryError):
            raise _not_a_store(path) from errors[0]
        raise errors[0]
    # With the wrong key, or none, all that is encrypted here would look damaged.
    if found[0].encryption != found[-1].encryption:
        raise IntegrityError(
            f"the copies of the store's configuration have different keys: {path}",
            hint=f"delete the one that is not the store's: `{CONFIG}` or"
            f" `{CONFIG_COPY}`",
        )
    return found[0]


def encryption_of(path: Path) -> JSON | None:
    """Return where the key of the store at ``path`` is, if that is encrypted."""
    for name in (CONFIG, CONFIG_COPY):
        with suppress(OSError, IntegrityError, FormatError):
            return read_config(path / name).encryption
    return None


def read_config(path: Path) -> StoreConfig:
    """Return what a configuration file says.

    Raises:
        FileNotFoundError: There is none.
        FormatError: A newer release wrote it.
        IntegrityError: It is damaged.
    """
    try:
        data = files.read_small(path, MAX_CONFIG_BYTES)
    except (ValueError, EOFError) as error:
        raise damaged_config(path) from error
    config = parse_config(path, data)
    if config.encryption is not None and not is_kept(config.encryption):
        raise FormatError(
            f"the key of this store is kept in a way that this release does not know:"
            f" {path}",
            hint="upgrade mlx-kvstore",
        )
    return config


def write_config(path: Path, config: StoreConfig) -> None:
    """Write a store's configuration; the file that makes it a store comes last.

    Raises:
        IntegrityError: It could not be read again; nothing has been written.
    """
    data = config_to_bytes(config)
    if parse_config(path / CONFIG, data) != config:
        raise damaged_config(path / CONFIG)
    for name in (CONFIG_COPY, CONFIG):
        files.write_atomic(path / name, data, path / "tmp")


def create_folder(
    path: Path, block_size: int = BLOCK_SIZE, encryption: JSON | None = None
) -> StoreFolder:
    """Return the store at ``path``, made now where there is none.

    Raises:
        StoreNotFoundError: The folder holds something else.
    """
    if is_store(path):
        return open_folder(path)
    if path.exists() and not path.is_dir():
        raise _not_a_store(path)
    files.make_private_dir(path)
    _refuse_foreign(path)
    with files.locked(path / "lock", exclusive=True):
        # Another process may have made it while this one waited.
        if not is_store(path):
            _fill(path, block_size, encryption)
    return open_folder(path)


def remake_folder(folder: StoreFolder) -> StoreFolder:
    """Return the store that lies where one was, made anew if somebody deleted it.

    Raises:
        StoreNotFoundError: Its disk is not there, or the folder holds something else.
    """
    try:
        return open_folder(folder.path)
    except StoreNotFoundError:
        # What is at the mount point of a disk that is gone belongs to another disk.
        if _existing(folder.path).stat().st_dev != folder.device:
            raise
    # What was to be encrypted is not to be written in the clear now.
    old = folder.config
    made = create_folder(folder.path, old.block_size, old.encryption)
    new = made.config
    if (old.max_bytes, old.is_signed_only) == (new.max_bytes, new.is_signed_only):
        return made
    # Another process may have made it, and set a limit of its own.
    limit = new.max_bytes or old.max_bytes
    is_strict = new.is_signed_only or old.is_signed_only
    return configured(made, max_bytes=limit, is_signed_only=is_strict)


def _existing(path: Path) -> Path:
    """Return a path, or the nearest folder above it that exists."""
    return path if path.exists() else _existing(path.absolute().parent)


def configured(folder: StoreFolder, **changes: Any) -> StoreFolder:
    """Write fields of a store's configuration, and return the store with them.

    Raises:
        ValueError: A size limit is not positive.
    """
    if (limit := changes.get("max_bytes")) is not None and limit <= 0:
        raise ArgumentError(f"a size limit is positive: {limit}", hint="in bytes")
    with files.locked(folder.lock, exclusive=True):
        # What others have set since this process opened the store stays.
        opened = open_folder(folder.path)
        config = replace(opened.config, **changes)
        write_config(folder.path, config)
    return replace(opened, config=config)


def is_store(path: Path) -> bool:
    """Whether there is a store, damaged or not."""
    return (path / CONFIG).exists() or (path / CONFIG_COPY).exists()


def _refuse_foreign(path: Path) -> None:
    """Refuse a folder that holds what no store that is being made would."""
    ours = {*_FOLDERS, "lock", "CACHEDIR.TAG", CONFIG, CONFIG_COPY}
    foreign = {child.name for child in path.iterdir()} - ours
    # Another process may have made it a store meanwhile, and used it.
    if foreign and not is_store(path):
        raise _not_a_store(path)


def _fill(path: Path, block_size: int, encryption: JSON | None) -> None:
    """Make everything a store has; the configuration last, since it makes it one."""
    for name in _FOLDERS:
        files.make_private_dir(path / name)
    # All at once: a folder made during a save would need a sync of its own.
    for number in range(256):
        files.make_private_dir(path / "shards" / f"{number:02x}")
    files.sync_dir(path / "shards")
    files.write_atomic(path / "CACHEDIR.TAG", files.CACHEDIR_TAG, path / "tmp")
    write_config(
        path, StoreConfig(secrets.token_hex(16), block_size, encryption=encryption)
    )


def _check_path(path: Path) -> None:
    """Refuse a path that SQLite could not open.

    Raises:
        StoreNotFoundError: It is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise StoreNotFoundError(
            f"the path of a store must be UTF-8: {str(path)!r}",
            hint="choose another folder",
        ) from error


def _check_folders(path: Path, *, is_borrowed: bool) -> None:
    """Refuse links in a store, and make the folders that a copy has left out.

    An archive leaves out empty folders: a bundle that `tar` has unpacked, say.

    Raises:
        PermissionError: Everybody may write into the store.
        OSError: A folder of it is a link.
    """
    _refuse_writable(path)
    for folder in (path / name for name in (*_FOLDERS, "bases")):
        if folder.is_symlink():
            raise _linked(folder)
        if folder.is_dir():
            _refuse_writable(folder)
        elif folder.name in _FOLDERS and not is_borrowed:
            with suppress(OSError):  # on a read-only disk nothing is written anyway
                files.make_private_dir(folder)
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        for part in os.scandir(path / "shards"):
            if part.is_symlink():
                raise _linked(Path(part.path))


def _refuse_writable(folder: Path) -> None:
    mode = folder.stat().st_mode
    # With the sticky bit nobody can replace what another user has made.
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise PermissionError(
            errno.EPERM, "everybody may write into this store (chmod 700)", str(folder)
        )


def _linked(folder: Path) -> OSError:
    return OSError(errno.ELOOP, "a folder of the store is a link", str(folder))


def _not_a_store(path: Path) -> StoreNotFoundError:
    if path.is_dir() and any(path.iterdir()):
        return StoreNotFoundError(
            f"not a kvstore store: {path}",
            hint="choose an empty folder or one that does not exist",
        )
    if path.exists() and not path.is_dir():
        return StoreNotFoundError(f"not a folder: {path}", hint="choose a folder")
    return StoreNotFoundError(
        f"no store at {path}",
        hint="`kvstore save` makes one; `--store DIR` chooses another",
    )
