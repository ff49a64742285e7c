"""The remotes that a store knows: a file beside its configuration. No credentials."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import IntegrityError, KVStoreError
from ..format.documents import JSON, canonical_json, strict_json
from ..storage import files
from ..storage.folder import StoreFolder
from .client import SCHEMES, Remote

FORMAT = 1
_FILE = "remotes.json"
_MAX_BYTES = 1024 * 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SECRET = re.compile(r"secret|password|token|key|credential|sas|bearer", re.IGNORECASE)


def read_remotes(folder: StoreFolder) -> list[Remote]:
    """Return the remotes of a store, by name.

    Raises:
        IntegrityError: The file is damaged.
    """
    path = folder.path / _FILE
    try:
        body = strict_json(files.read_small(path, _MAX_BYTES), allow_floats=False)
        return [_parse(name, row) for name, row in sorted(body["remotes"].items())]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise IntegrityError(
            f"the file of the remotes is damaged: {path}",
            path=path,
            hint="remove it, and add the remotes again",
        ) from error


def _parse(name: str, row: JSON) -> Remote:
    url, options, is_trusted = row["url"], row["options"], row["trusted"]
    texts = [url, *options.values()]
    if type(is_trusted) is not bool or not all(isinstance(t, str) for t in texts):
        raise ValueError("a field has the wrong type")
    return Remote(name, url, dict(options), is_trusted)


def find_remote(folder: StoreFolder, name: str | None) -> Remote:
    """Return the remote of this name, or the only one.

    Raises:
        KVStoreError: There is none, or the name was left out and there are several.
    """
    remotes = read_remotes(folder)
    found = [remote for remote in remotes if name in (None, remote.name)]
    if len(found) == 1:
        return found[0]
    if not remotes:
        raise KVStoreError(
            "the store has no remote", hint="`kvstore remote add NAME URL` adds one"
        )
    names = ", ".join(f"`{remote.name}`" for remote in remotes)
    what = "which remote is meant" if name is None else f"no remote `{name}`"
    raise KVStoreError(what, hint=f"`--remote` takes one of {names}")


def add_remote(folder: StoreFolder, remote: Remote) -> None:
    """Note a remote.

    Raises:
        KVStoreError: The name is taken by another one.
    """
    with _changing(folder) as remotes:
        if remotes.get(remote.name, remote) != remote:
            raise KVStoreError(
                f"there is a remote `{remote.name}` already:"
                f" {remotes[remote.name].url}",
                hint=f"`kvstore remote rm {remote.name}` forgets it",
            )
        remotes[remote.name] = remote


def remove_remote(folder: StoreFolder, name: str) -> Remote:
    """Forget a remote, and return it; nothing in it is touched.

    Raises:
        KVStoreError: There is none.
    """
    remote = find_remote(folder, name)
    with _changing(folder) as remotes:
        remotes.pop(name, None)
    return remote


@contextmanager
def _changing(folder: StoreFolder) -> Iterator[dict[str, Remote]]:
    """Yield the remotes by name, under the lock, and write what became of them."""
    with files.locked(folder.lock, exclusive=True):
        remotes = {remote.name: remote for remote in read_remotes(folder)}
        yield remotes
        body: JSON = {
            "format": FORMAT,
            "remotes": {
                r.name: {"url": r.url, "options": r.options, "trusted": r.is_trusted}
                for r in remotes.values()
            },
        }
        path = folder.path / _FILE
        files.write_atomic(path, canonical_json(body), folder.staging)


def make_remote(
    name: str, url: str, options: Mapping[str, str], *, is_trusted: bool = False
) -> Remote:
    """Return a remote, having checked what can be checked without asking it.

    Args:
        name: What it is to be called.
        url: Where it is, or the path of a folder.
        options: Settings of its provider, `endpoint` and `region` say.
        is_trusted: Take its entries without a signature too.

    Raises:
        ValueError: Anything is not as it must be, or would store a credential.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a remote's name has letters, digits, `.`, `_` and `-`: {name!r}"
        )
    for option in options:
        if _SECRET.search(option):
            raise ValueError(
                f"`{option}` is a credential, which is never stored: set the variable"
                " that your provider's tools read"
            )
    if "://" not in url:
        url = Path(url).absolute().as_uri()
    _check_url(url)
    return Remote(name, url.rstrip("/"), dict(options), is_trusted)


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        kinds = ", ".join(f"`{scheme}://`" for scheme in SCHEMES)
        raise ValueError(f"a remote's URL begins with one of {kinds}: {url}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("a remote's URL has no user, password or query: nothing of it")
    if (parts.scheme == "file") == bool(parts.netloc) or not (
        parts.netloc or parts.path.strip("/")
    ):
        raise ValueError(f"a remote's URL names a bucket, a host or a folder: {url}")
