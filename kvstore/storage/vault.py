"""Where the key of an encrypted store is: a passphrase, a file, a keychain, or age.

A store's configuration says which, and has a check value, so that a wrong key is told
from damage before anything is read. The key itself is in it only as an age file.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import blake3

from ..errors import KeyNotFoundError, KVStoreError
from ..format.documents import JSON
from . import files
from .cipher import KEY_BYTES

_SERVICE = "kvstore"
_MAX_BYTES = 65_536
# Of keys that were found once: to try a passphrase takes a second, on purpose.
_known: dict[str, bytes] = {}


def new_key() -> bytes:
    """Return a new key."""
    return secrets.token_bytes(KEY_BYTES)


def keep_by_passphrase(key: bytes, passphrase: str) -> JSON:
    """Return what a configuration says of a key under a passphrase."""
    wrapped = _pyrage().passphrase.encrypt(key, passphrase)
    return _kept(key, "passphrase", wrapped=wrapped.hex())


def keep_by_recipient(key: bytes, recipient: str) -> JSON:
    """Return what a configuration says of a key that one age identity opens.

    Raises:
        KVStoreError: It is no recipient.
    """
    pyrage = _pyrage()
    try:
        whom = pyrage.x25519.Recipient.from_str(recipient)
    except pyrage.RecipientError as error:
        raise KVStoreError(
            f"no age recipient: {recipient!r}", hint="one begins with `age1`"
        ) from error
    return _kept(key, "age", wrapped=pyrage.encrypt(key, [whom]).hex())


def keep_by_file(key: bytes, path: Path) -> JSON:
    """Write a key to a new file, and return what a configuration says of it.

    Raises:
        FileExistsError: There is one.
    """
    path = path.absolute()
    files.write_new(path, f"{key.hex()}\n".encode())
    return _kept(key, "file", path=str(path))


def keep_by_keychain(key: bytes) -> JSON:
    """Give a key to the system's keychain; return what a configuration says of it.

    Raises:
        KVStoreError: There is no keychain.
    """
    keyring, encryption = _keyring(), _kept(key, "keychain")
    try:
        keyring.set_password(_SERVICE, encryption["check"], key.hex())
    except keyring.errors.KeyringError as error:
        raise KVStoreError(
            f"the system has no keychain that can be used: {error}",
            hint="`--key-file` and a passphrase need none",
        ) from error
    return encryption


def is_kept(value: Any) -> bool:
    """Whether a configuration says in a known way where a key is."""
    if not isinstance(value, dict):
        return False
    needed = {"passphrase": "wrapped", "age": "wrapped", "file": "path", "keychain": ""}
    known = needed.get(value.get("method", ""))
    return (
        known is not None
        and value.keys() == {"method", "check", known} - {""}
        and all(isinstance(text, str) for text in value.values())
    )


def needs_passphrase(encryption: JSON | None) -> bool:
    """Whether somebody has to be asked."""
    return (
        encryption is not None
        and encryption["method"] == "passphrase"
        and encryption["check"] not in _known
        and not os.environ.get("KVSTORE_PASSPHRASE")
    )


def unlock(encryption: JSON, passphrase: str | None = None) -> bytes:
    """Return the key of a store, and remember it for this process.

    Args:
        encryption: What the configuration says.
        passphrase: Of somebody who was asked; ``$KVSTORE_PASSPHRASE`` by default.

    Raises:
        KeyNotFoundError: The key is not there, or is another one.
    """
    check = encryption["check"]
    if check not in _known:
        key = _find(encryption, passphrase or os.environ.get("KVSTORE_PASSPHRASE"))
        if len(key) != KEY_BYTES or _check(key) != check:
            raise KeyNotFoundError(
                "the key is that of another store", hint=_HINTS[encryption["method"]]
            )
        _known[check] = key
    return _known[check]


_HINTS = {
    "passphrase": "`$KVSTORE_PASSPHRASE` gives the passphrase where nobody is asked",
    "age": "`$KVSTORE_IDENTITY` names the file of the age identity",
    "file": "`$KVSTORE_KEY_FILE` names the file where it is elsewhere now",
    "keychain": "the keychain of whoever made the store has it",
}


def _find(encryption: JSON, passphrase: str | None) -> bytes:
    """Return what may be the key.

    Raises:
        KeyNotFoundError: There is nothing, or it opens nothing.
    """
    method = encryption["method"]
    try:
        if method == "file":
            path = Path(os.environ.get("KVSTORE_KEY_FILE") or encryption["path"])
            return bytes.fromhex(files.read_small(path, _MAX_BYTES).decode("ascii"))
        if method == "keychain":
            return bytes.fromhex(_ask_keychain(encryption["check"]))
        return _unwrap(method, bytes.fromhex(encryption["wrapped"]), passphrase)
    except (OSError, ValueError, EOFError) as error:
        raise KeyNotFoundError(
            f"the store is encrypted, and its key cannot be read: {error}",
            hint=_HINTS[method],
        ) from error


def _ask_keychain(name: str) -> str:
    keyring = _keyring()
    try:
        return keyring.get_password(_SERVICE, name) or ""
    except keyring.errors.KeyringError as error:
        raise ValueError(str(error)) from error


def _unwrap(method: str, wrapped: bytes, passphrase: str | None) -> bytes:
    """Return the key in an age file.

    Raises:
        ValueError: What opens it is missing or wrong.
    """
    pyrage = _pyrage()
    try:
        if method == "passphrase":
            if not passphrase:
                raise ValueError("no passphrase was given")
            return bytes(pyrage.passphrase.decrypt(wrapped, passphrase))
        path = os.environ.get("KVSTORE_IDENTITY")
        if not path:
            raise ValueError("no age identity was given")
        text = files.read_small(Path(path), _MAX_BYTES).decode("ascii")
        lines = [line for line in text.split() if line.startswith("AGE-SECRET-KEY-")]
        found = [pyrage.x25519.Identity.from_str(line) for line in lines]
        return bytes(pyrage.decrypt(wrapped, found))
    except (pyrage.DecryptError, pyrage.IdentityError) as error:
        raise ValueError(str(error)) from error


def _kept(key: bytes, method: str, **more: str) -> JSON:
    _known[_check(key)] = key
    return {"method": method, "check": _check(key), **more}


def _check(key: bytes) -> str:
    """Return by what a key is known, which does not tell it."""
    return str(blake3.blake3(b"kvstore key", key=key).hexdigest())


def _pyrage() -> Any:
    try:
        import pyrage
    except ImportError as error:
        raise _missing("pyrage") from error
    return pyrage


def _keyring() -> Any:
    try:
        import keyring
        import keyring.errors
    except ImportError as error:
        raise _missing("keyring") from error
    return keyring


def _missing(package: str) -> KVStoreError:
    return KVStoreError(
        f"this way to keep a key needs the package `{package}`",
        hint="pip install 'mlx-kvstore[crypto]'",
    )
