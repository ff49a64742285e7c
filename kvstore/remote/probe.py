"""What the server of a remote can do, tried out with one small object.

Nothing depends on the answer but what a person is told: a server that overwrites is
safe to use, since every object is named by what it holds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from ..errors import IntegrityError, RemoteError
from .client import Client
from .layout import ENTRIES

# Always the same bytes under one name, since nothing is ever removed.
_DATA = b"kvstore asks what this server can do\n"
_FOLDER = "v1/probe"


@dataclass(frozen=True, slots=True)
class Probe:
    """What a server has been seen to do."""

    # Objects can be created.
    can_write: bool
    # A second creation is refused; ``None`` where that could not be tried.
    creates_once: bool | None
    # A range of an object can be read; ``None`` where that could not be tried.
    has_ranges: bool | None
    # Objects can be listed, those just created among them.
    can_list: bool


def probe(client: Client) -> Probe:
    """Try out what a server can do.

    Raises:
        RemoteError: It cannot be reached, or does nothing that is needed.
    """
    key = f"{_FOLDER}/{hashlib.sha256(_DATA).hexdigest()}"
    is_web = client.remote.is_web
    refusal = None if is_web else _write(client, key)
    is_there = client.is_there(key, len(_DATA)) if refusal is None else False
    found = Probe(
        can_write=is_there and not is_web,
        creates_once=_creates_once(client, key) if is_there and not is_web else None,
        has_ranges=_has_ranges(client, key) if is_there else None,
        can_list=_can_list(client, key if is_there else None),
    )
    if not (found.can_write or found.can_list or is_web):
        raise refusal or RemoteError(
            f"remote `{client.remote.name}` forgets what it is sent"
        )
    if found.has_ranges is False:
        raise RemoteError(
            f"remote `{client.remote.name}` sends no ranges of objects",
            hint="use another server, or another gateway before it",
        )
    return found


def _write(client: Client, key: str) -> RemoteError | None:
    """Put the object there; return why that cannot be."""
    try:
        if not client.is_there(key, len(_DATA)):
            client.put(key, _DATA)
    except RemoteError as error:
        return error
    return None


def _creates_once(client: Client, key: str) -> bool:
    try:
        return not client.create(key, _DATA)
    except RemoteError:
        return False  # it knows no such request


def _has_ranges(client: Client, key: str) -> bool:
    try:
        return bytes(client.read(key, 3, 9)) == _DATA[3:9]
    except (IntegrityError, RemoteError, FileNotFoundError):
        return False


def _can_list(client: Client, key: str | None) -> bool:
    try:
        keys = client.keys(_FOLDER if key else ENTRIES)
    except RemoteError:
        return False
    return key is None or key in keys
