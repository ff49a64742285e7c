"""Pages beside the API of mlx-lm's server: the store as it is now, and counters.

Names and titles of entries are private, so what shows or changes them needs a token:
``$KVSTORE_TOKEN``, or one that is logged at the start. Counters may be read by whoever
reaches the port, unless clients are told apart: they would tell one how much others
ask, and how much of it was known.
"""

from __future__ import annotations

import hmac
import importlib.util
import json
import logging
import os
import re
import secrets
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from ..errors import EntryNotFoundError, KVStoreError
from ..format.documents import JSON
from ..store import Store

if TYPE_CHECKING:
    from .metrics import Metrics

log = logging.getLogger("kvstore")
_PATHS = ("/kvstore", "/metrics")
_JSON = "application/json"


Answer = tuple[HTTPStatus, str, bytes]
"""Status, content type and body of what a request is answered with."""


class Pages:
    """Answers ``/kvstore``, ``/kvstore/data``, ``/kvstore/entries/ID``, ``/metrics``.

    Args:
        open_store: Opens the store; each request does so for itself.
        describe: Returns what a page shows.
        render: Returns the page, as HTML.
        are_private: Whether the counters need the token too.

    Attributes:
        metrics: The counters; ``None`` where the package for them is missing.
    """

    def __init__(
        self,
        open_store: Callable[[], Store],
        describe: Callable[[Store], JSON],
        render: Callable[[JSON], str],
        *,
        are_private: bool = False,
    ) -> None:
        self._open_store, self._describe, self._render = open_store, describe, render
        self.metrics = _make_metrics()
        self._are_private = are_private
        # One that is given stays the same, so that Prometheus can be told it.
        given = os.environ.get("KVSTORE_TOKEN")
        self.token = given or secrets.token_urlsafe(16)
        self.login = "?token=$KVSTORE_TOKEN" if given else f"?token={self.token}"

    def attach(self, handler_class: Any) -> None:
        """Have mlx-lm's handler of requests answer them too."""
        get = handler_class.do_GET

        def do(handler: Any) -> None:
            try:
                url = urlsplit(handler.path)
            except ValueError:
                words = "the request's address is malformed"
                _send(handler, *_refusal(HTTPStatus.BAD_REQUEST, words))
                return
            is_ours = url.path in _PATHS or url.path.startswith("/kvstore/")
            if handler.command == "GET" and not is_ours:
                get(handler)
            else:
                _send(handler, *self._answer_safely(handler, url))

        handler_class.do_GET = handler_class.do_PUT = handler_class.do_DELETE = do

    def _answer_safely(self, handler: Any, url: SplitResult) -> Answer:
        command, path = handler.command, url.path
        is_count = (command, path) == ("GET", "/metrics")
        if is_count and not self._are_private:
            return self._metrics()
        if not self._has_token(handler, url.query):
            words = "this page needs the token that the server has logged at its start"
            return _refusal(HTTPStatus.FORBIDDEN, words)
        if is_count:
            return self._metrics()
        try:
            return self._answer(handler, path)
        except ConnectionError:  # the client's, which is no fault of the disk
            raise
        except EntryNotFoundError as error:
            return _refusal(HTTPStatus.NOT_FOUND, str(error), error.hint)
        except KVStoreError as error:
            return _refusal(HTTPStatus.CONFLICT, str(error), error.hint)
        except ValueError as error:
            return _refusal(HTTPStatus.BAD_REQUEST, str(error))
        except OSError as error:
            log.warning("kvstore: %s: %s", handler.command, error)
            return _refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "the disk fails")

    def _answer(self, handler: Any, path: str) -> Answer:
        command = handler.command
        with self._open_store() as store:
            if command == "GET" and path in ("/kvstore", "/kvstore/data"):
                data = self._describe(store)
                if path == "/kvstore":
                    page = self._render(data).encode()
                    return HTTPStatus.OK, "text/html; charset=utf-8", page
                return HTTPStatus.OK, _JSON, json.dumps(data).encode()
            entry_id = unquote(path.removeprefix("/kvstore/entries/"))
            if command == "PUT" and entry_id != path:
                store.pin(entry_id, pinned=_read_pinned(handler))
                return HTTPStatus.NO_CONTENT, _JSON, b""
            if command == "DELETE" and entry_id != path:
                store.remove(entry_id)
                return HTTPStatus.NO_CONTENT, _JSON, b""
        return _refusal(HTTPStatus.NOT_FOUND, f"there is no {command} {path}")

    def _metrics(self) -> Answer:
        if self.metrics is None:
            hint = "pip install 'mlx-kvstore[metrics]'"
            words = "the package prometheus-client is missing"
            return _refusal(HTTPStatus.NOT_IMPLEMENTED, words, hint)
        try:
            with self._open_store() as store:
                body, content_type = self.metrics.count(store)
        except (KVStoreError, OSError, ValueError) as error:
            # Without a token nobody is told more: an error may name the store's path.
            log.warning("kvstore: GET /metrics: %s", error)
            words = "the store cannot be read"
            return _refusal(HTTPStatus.SERVICE_UNAVAILABLE, words)
        return HTTPStatus.OK, content_type, body

    def _has_token(self, handler: Any, query: str) -> bool:
        given = parse_qs(query).get("token", [])
        # A proxy's login may be there instead.
        scheme, _, word = handler.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given.append(word.strip())
        token = self.token.encode()
        return any(hmac.compare_digest(each.encode(), token) for each in given)


def _make_metrics() -> Metrics | None:
    if importlib.util.find_spec("prometheus_client") is None:
        return None
    from .metrics import Metrics

    return Metrics()


def _read_pinned(handler: Any) -> bool:
    """Return ``pinned`` of a request's body, ``{"pinned": true}``.

    Raises:
        ValueError: It has another body.
    """
    length = handler.headers.get("Content-Length", "")
    is_short = re.fullmatch("[0-9]{1,2}", length)
    match json.loads(handler.rfile.read(int(length))) if is_short else None:
        case {"pinned": bool(pinned), **rest} if not rest:
            return pinned
    raise ValueError('the body must be {"pinned": true} or {"pinned": false}')


def _refusal(status: HTTPStatus, words: str, hint: str | None = None) -> Answer:
    body = {"error": words} | ({"hint": hint} if hint else {})
    return status, _JSON, json.dumps(body).encode()


def _send(handler: Any, status: HTTPStatus, content_type: str, body: bytes) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", content_type)
    handler.send_header("Content-Length", str(len(body)))
    # The address has the token in it, which goes to no other page and into no cache.
    handler.send_header("Referrer-Policy", "no-referrer")
    handler.send_header("Cache-Control", "no-store")
    handler.end_headers()
    handler.wfile.write(body)
