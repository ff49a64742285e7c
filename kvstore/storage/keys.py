"""The keys of the user: one to sign with, and those of others whom the user trusts.

They lie in the folder for configuration and not in a store, which is a cache: whoever
removes a store, or copies it elsewhere, must not take a key along.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import IntegrityError, KVStoreError, SignerError
from ..format.documents import canonical_json, strict_json
from ..format.signature import is_key, new_secret, public_key
from . import files

_MAX_BYTES = 1024 * 1024
_OWN = "you"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


def config_home() -> Path:
    """Return the folder for what the user sets: ``$XDG_CONFIG_HOME/kvstore``."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "kvstore"


def _secret_path() -> Path:
    return config_home() / "signing.key"


def new_signing_key() -> str:
    """Make the user's key, and return its public part.

    Raises:
        KVStoreError: There is one.
    """
    path = _secret_path()
    files.make_private_dir(path.parent)
    secret = new_secret()
    try:
        # With its public half, so that to name a signer takes no cryptography.
        files.write_new(path, f"{secret}\n{public_key(secret)}\n".encode())
    except FileExistsError as error:
        raise KVStoreError(
            f"there is a key already: {path}",
            hint="`kvstore key show` shows it; who wants another moves this file away",
        ) from error
    return public_key(secret)


def signing_key() -> str:
    """Return the user's secret key.

    Raises:
        KVStoreError: There is none.
        IntegrityError: Its file is damaged.
    """
    keys = _own_keys()
    if not keys:
        raise KVStoreError(
            "there is no key to sign with", hint="`kvstore key new` makes one"
        )
    return keys[0]


def own_key() -> str:
    """Return the user's public key, or nothing where there is none."""
    keys = _own_keys()
    return keys[1] if keys else ""


def _own_keys() -> list[str]:
    path = _secret_path()
    try:
        keys = files.read_small(path, 1024).decode("ascii", "replace").split()
    except FileNotFoundError:
        return []
    if len(keys) != 2 or not all(map(is_key, keys)):
        raise _damaged(path)
    return keys


def read_signers() -> dict[str, str]:
    """Return the public keys that the user trusts, by the names given to them.

    Raises:
        IntegrityError: The file is damaged.
    """
    path = _signers_path()
    try:
        found = strict_json(files.read_small(path, _MAX_BYTES), allow_floats=False)
        if not all(_NAME.fullmatch(n) and is_key(k) for n, k in found.items()):
            raise ValueError("no names and keys")
        return dict(found)
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError, EOFError) as error:
        raise _damaged(path) from error


def trust_signer(name: str, key: str) -> None:
    """Take a key for that of somebody whom the user trusts.

    Raises:
        KVStoreError: The name or the key is none, or the name has another key.
    """
    if not _NAME.fullmatch(name) or name == _OWN:
        raise KVStoreError(
            f"a signer's name has letters, digits, `.`, `_`, `@` and `-`, and is not"
            f" `{_OWN}`: {name!r}",
            hint="choose another name",
        )
    if not is_key(key):
        raise KVStoreError(
            f"a public key is 64 hex digits: {key[:80]!r}",
            hint="`kvstore key show` prints it, on the machine of whoever signs",
        )
    signers = read_signers()
    if signers.get(name, key) != key:
        raise KVStoreError(
            f"`{name}` has another key: {signers[name]}",
            hint=f"`kvstore key trust {name} --off` forgets it",
        )
    _write_signers({**signers, name: key})


def distrust_signer(name: str) -> str:
    """Trust a signer no longer, and return the key; what was taken from it stays.

    Raises:
        KVStoreError: There is none of this name.
    """
    signers = read_signers()
    if name not in signers:
        raise _unknown(name)
    key = signers.pop(name)
    _write_signers(signers)
    return key


def known_keys() -> dict[str, str]:
    """Return what the user calls the holders of keys, by the keys."""
    named = {key: name for name, key in read_signers().items()}
    return named | ({own: _OWN} if (own := own_key()) else {})


def check_signer(
    key: str, *, wanted: str | None = None, is_signed_only: bool = False
) -> None:
    """Refuse what was not signed by whom it has to be.

    That the signature is right is not checked here: see ``format.signature``.

    Args:
        key: The public key that signed it; empty where nobody did.
        wanted: Name of the signer that it must be of.
        is_signed_only: Whether the store that it is for takes only what was signed.

    Raises:
        SignerError: Somebody else signed it, or nobody did.
    """
    known = known_keys()
    who = f"signed by {known.get(key, f'the unknown key {key}')}"
    if wanted is not None and wanted not in known.values():
        raise _unknown(wanted)
    if wanted is not None and known.get(key) != wanted:
        raise SignerError(
            f"it is {who if key else 'not signed'}, and not by `{wanted}`",
            hint="ask whoever sent it; without `--from` it is taken all the same",
        )
    if is_signed_only and key not in known:
        raise SignerError(
            f"it is {who if key else 'not signed'}, and this store takes only what a"
            " trusted key signed",
            hint="`kvstore key trust NAME KEY` trusts one; `kvstore key policy` tells",
        )


def _unknown(name: str) -> SignerError:
    return SignerError(
        f"no signer `{name}` is known",
        hint="`kvstore key show` lists them; `kvstore key trust NAME KEY` adds one",
    )


def _signers_path() -> Path:
    return config_home() / "signers.json"


def _write_signers(signers: dict[str, str]) -> None:
    path = _signers_path()
    files.make_private_dir(path.parent)
    files.write_atomic(path, canonical_json(signers), path.parent)


def _damaged(path: Path) -> IntegrityError:
    return IntegrityError(
        f"a file of keys is damaged: {path}", path=path, hint="remove it, or mend it"
    )
