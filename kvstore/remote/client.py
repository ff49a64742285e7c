"""Requests to an object store: retried, bounded in time, errors in one sentence.

The only module that knows obstore. It creates and reads objects; it has no way to
overwrite or delete one on purpose.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ..errors import IntegrityError, KVStoreError, RemoteError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")
log = logging.getLogger("kvstore")
SCHEMES = ("file", "s3", "gs", "az", "http", "https")
PART_BYTES = 8 * 1024 * 1024
"""How much one request moves. A connection that is cut costs no more."""

_PAUSE_S = 0.3
# A request that holds all of it takes so much memory.
_MAX_WHOLE = 128 * 1024 * 1024
# Who has no credentials is taken for a machine of the provider's, which asks there.
_METADATA = "//169.254.169.254/"
_STATUS = re.compile(r"status code: (\d{3}[ A-Za-z]*)")
# How a server, or a folder, says that an object ends before a range begins.
_BEYOND = re.compile(r"status code: 416|range was invalid")
_SILENCE = "error sending request"
_HINT = (
    "set the provider's credentials, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY say"
)


@dataclass(frozen=True, slots=True)
class Remote:
    """Where an object store is; no credentials."""

    # What the user calls it.
    name: str
    url: str
    # Settings of obstore's for this provider, `endpoint` and `region` say.
    options: dict[str, str] = field(default_factory=dict)
    # Whoever may write to it is trusted: its entries need no signature.
    is_trusted: bool = False

    @property
    def is_web(self) -> bool:
        """Whether it is a web server, which is only read."""
        return self.url.startswith("http")


@dataclass(frozen=True, slots=True)
class Limits:
    """How long requests may take."""

    # A whole request, and the silence within one.
    timeout_s: float = 120.0
    silence_s: float = 60.0
    connect_s: float = 5.0
    # How often obstore repeats one that fails, and for how long in all.
    retries: int = 4
    retry_s: float = 60.0
    # How often a request is made anew that failed in the middle of a body.
    tries: int = 3


class Client:
    """One object store, which several threads may use.

    Args:
        remote: Where it is.
        limits: How long requests may take.
        create: Make the folder of a ``file://`` remote where it is missing.

    Raises:
        KVStoreError: obstore is not installed.
        RemoteError: The URL or an option is not one.
    """

    def __init__(
        self, remote: Remote, limits: Limits | None = None, *, create: bool = False
    ) -> None:
        self.remote = remote
        _check_installed()
        limits = limits or Limits()
        self._tries = limits.tries
        self._store = self._translated(lambda: _open_store(remote, limits, create))

    def size(self, key: str, *, tries: int | None = None) -> int | None:
        """Return the size of an object in bytes, or ``None`` where there is none."""
        try:
            return int(self._retried(lambda: self._store.head(key), tries)["size"])
        except FileNotFoundError:
            return None

    def put(self, key: str, data: bytes) -> None:
        """Create an object that was not there just now, as :meth:`put_parts` does."""
        self.put_parts(key, len(data), lambda: iter([data]))

    def put_parts(
        self, key: str, nbytes: int, read: Callable[[], Iterator[bytes]]
    ) -> None:
        """Create an object that was not there just now.

        Its key is named by its content: another client that creates it meanwhile sends
        the same bytes. ``read`` returns its parts, once for each try; what that raises
        is raised, and then there is no such object.

        Raises:
            RemoteError: The server fails, or has an object of another size by now.
        """
        for number in range(self._tries):
            # A server of which a node is down may fail to put parts together.
            is_whole = nbytes <= PART_BYTES or (number == 1 and nbytes <= _MAX_WHOLE)
            try:
                return self._translated(partial(self._send, key, read, is_whole))
            except RemoteError as error:
                # The server may have done it, and the reply may be lost.
                if error.may_pass and self.seems_there(key, nbytes):
                    return None
                if not error.may_pass or number == self._tries - 1:
                    raise
                time.sleep(_PAUSE_S * 2**number)

    def _send(
        self, key: str, read: Callable[[], Iterator[bytes]], is_whole: bool
    ) -> None:
        try:
            self._store.put(
                key,
                b"".join(read()) if is_whole else read(),
                use_multipart=not is_whole,
                chunk_size=PART_BYTES,
                max_concurrency=4,
            )
        except FileNotFoundError as error:
            raise self._failed(error, "there is no such bucket") from error

    def create(self, key: str, data: bytes) -> bool:
        """Create an object by a conditional request; whether there was none.

        Raises:
            RemoteError: The server fails, or knows no such request.
        """
        from obstore.exceptions import AlreadyExistsError

        def send() -> bool:
            try:
                self._store.put(key, data, mode="create")
            except AlreadyExistsError:
                return False
            return True

        return self._translated(send)

    def read(self, key: str, begin: int, end: int) -> memoryview:
        """Return a range of an object.

        Raises:
            FileNotFoundError: There is no such object.
            IntegrityError: It is shorter.
            RemoteError: The server fails.
        """
        from obstore.exceptions import BaseError

        def receive() -> memoryview:
            try:
                data = memoryview(self._store.get_range(key, start=begin, end=end))
            except BaseError as error:
                if not _BEYOND.search(str(error)):
                    raise
                data = memoryview(b"")
            if len(data) != end - begin:
                raise IntegrityError(
                    f"remote `{self.remote.name}` has {len(data)} bytes of"
                    f" {end - begin}: {key}",
                    hint="whoever owns the remote can remove the object",
                )
            return data

        return self._retried(receive)

    def read_whole(self, key: str, limit: int) -> bytes:
        """Return an object of at most ``limit`` bytes.

        Raises:
            FileNotFoundError: There is no such object.
            RemoteError: It is larger, or the server fails.
        """

        def receive() -> bytes:
            found = self._store.get(key)
            if found.meta["size"] > limit:
                raise RemoteError(f"object is larger than {limit} bytes: {key}")
            return bytes(found.bytes())

        return self._retried(receive)

    def keys(self, prefix: str) -> list[str]:
        """Return all keys in a folder and the folders in it.

        Raises:
            RemoteError: The server fails, or cannot list.
        """

        def receive() -> list[str]:
            self._check_lists()
            pages = self._store.list(prefix, chunk_size=1000)
            try:
                return [found["path"] for page in pages for found in page]
            except FileNotFoundError:
                return []

        return self._retried(receive)

    def folders(self, prefix: str) -> list[str]:
        """Return the names of the folders in a folder.

        Raises:
            RemoteError: The server fails, or cannot list.
        """

        def receive() -> list[str]:
            self._check_lists()
            try:
                found = self._store.list_with_delimiter(prefix)["common_prefixes"]
            except FileNotFoundError:
                return []
            return [path.rpartition("/")[2] for path in found]

        return self._retried(receive)

    def _check_lists(self) -> None:
        if self.remote.is_web:
            raise RemoteError(
                f"remote `{self.remote.name}` is a web server, which lists nothing",
                hint="name the entry by its whole key, which `push --json` prints",
            )

    def is_there(self, key: str, nbytes: int, *, tries: int | None = None) -> bool:
        """Whether there is an object of this size.

        Raises:
            RemoteError: There is one of another size, or the server fails.
        """
        found = self.size(key, tries=tries)
        if found not in (None, nbytes):
            raise RemoteError(
                f"remote `{self.remote.name}` has {found} bytes where {nbytes} belong:"
                f" {key}",
                hint="whoever owns the remote can remove the object",
            )
        return found is not None

    def seems_there(self, key: str, nbytes: int) -> bool:
        """Whether there is an object of this size, as far as the server can say.

        A distributed store of which a node is down may refuse to say that there is
        none, and yet take it. To send it once more does no harm.

        Raises:
            RemoteError: There is one of another size, or access is denied.
        """
        try:
            return self.is_there(key, nbytes, tries=1)
        except RemoteError as error:
            if not error.may_pass:
                raise
            return False

    def _retried(self, work: Callable[[], T], tries: int | None = None) -> T:
        """Run a request again where it failed in a way that may pass."""
        # obstore has tried it again too, unless it failed in the middle of a body.
        for number in range((tries or self._tries) - 1):
            try:
                return self._translated(work)
            except RemoteError as error:
                if not error.may_pass:
                    raise
                time.sleep(_PAUSE_S * 2**number)
        return self._translated(work)

    def _translated(self, work: Callable[[], T]) -> T:
        """Run a request, and say what failed in one sentence."""
        from obstore import exceptions

        try:
            return work()
        except (
            exceptions.PermissionDeniedError,
            exceptions.UnauthenticatedError,
        ) as error:
            raise self._failed(error, "access is denied", hint=_HINT) from error
        except (
            exceptions.InvalidPathError,
            exceptions.NotSupportedError,
            exceptions.UnknownConfigurationKeyError,
        ) as error:
            raise self._failed(error) from error
        except exceptions.BaseError as error:
            if _METADATA in str(error):
                why, hint = "no credentials are set", _HINT
                raise self._failed(error, why, hint=hint) from error
            # obstore tells a refused list from no other failure.
            if any(f"status code: {code}" in str(error) for code in (401, 403)):
                raise self._failed(error, "access is denied", hint=_HINT) from error
            log.debug("%s", error)
            again = "the same command goes on from there"
            raise self._failed(error, _why(error), hint=again, may_pass=True) from error
        except ValueError as error:
            raise self._failed(error) from error

    def _failed(
        self,
        error: Exception,
        why: str | None = None,
        *,
        hint: str = "",
        may_pass: bool = False,
    ) -> RemoteError:
        # The first line says it; the rest is for whoever debugs obstore.
        why = why or str(error).partition("\n")[0].strip().rstrip(":. ")
        return RemoteError(
            f"remote `{self.remote.name}`: {why}", hint=hint, may_pass=may_pass
        )


def _why(error: Exception) -> str | None:
    """Return what a server has answered, in place of all that obstore says of it."""
    if answer := _STATUS.search(str(error)):
        return f"the server answers {answer[1].strip()}"
    return "the server does not answer" if _SILENCE in str(error) else None


def _check_installed() -> None:
    try:
        import obstore  # noqa: F401
    except ImportError as error:
        raise KVStoreError(
            "remotes need the package obstore, which is not installed",
            hint="`pip install 'mlx-kvstore[remote]'`",
        ) from error


def _open_store(remote: Remote, limits: Limits, create: bool) -> ObjectStore:
    from obstore.store import LocalStore, from_url

    parts = urlsplit(remote.url)
    if parts.scheme == "file":
        return LocalStore(url2pathname(parts.path), mkdir=create)
    # obstore's type has one overload for each provider.
    config: Any = dict(remote.options)
    places = (remote.url, remote.options.get("endpoint", ""))
    return from_url(
        remote.url,
        config=config or None,
        client_options={
            "allow_http": any(place.startswith("http://") for place in places),
            "timeout": timedelta(seconds=limits.timeout_s),
            "read_timeout": timedelta(seconds=limits.silence_s),
            "connect_timeout": timedelta(seconds=limits.connect_s),
        },
        retry_config={
            "max_retries": limits.retries,
            "retry_timeout": timedelta(seconds=limits.retry_s),
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=5),
                "base": 2,
            },
        },
    )


def ranges(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges in which so many bytes are read."""
    for start in range(begin, end, PART_BYTES):
        yield start, min(start + PART_BYTES, end)
