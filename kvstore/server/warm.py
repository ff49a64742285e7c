"""Captured requests, computed ahead: by asking the server itself, once it is there."""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.request
from collections.abc import Mapping
from urllib.parse import quote

from ..format.documents import JSON

log = logging.getLogger("kvstore")
# It listens before it has loaded its model, and answers when it has.
_START_S = 60.0
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}
# A proxy would be asked for its own 127.0.0.1, and be told prompts and the token.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def start_warming(
    host: str, port: int, token: str, requests: Mapping[str, JSON]
) -> None:
    """Post requests to a server, one after the other, on a thread of its own.

    Args:
        host: Where it will listen.
        port: The same.
        token: That of its page, by which it is told from another server on that port.
        requests: What clients post to ``/v1/chat/completions``, by what to call it.
    """
    where = _ANYWHERE.get(host, f"[{host}]" if ":" in host else host)
    names = (f"http://{where}:{port}", token, requests)
    threading.Thread(target=_warm, args=names, name="warm", daemon=True).start()


def _warm(url: str, token: str, requests: Mapping[str, JSON]) -> None:
    deadline = time.monotonic() + _START_S
    while not _is_there(f"{url}/kvstore?token={quote(token, safe='')}"):
        if time.monotonic() > deadline:
            log.warning("kvstore: nothing is computed ahead: no answer from %s", url)
            return
        time.sleep(0.1)
    for name, request in requests.items():
        body = request | {"max_tokens": 1, "stream": False}
        body.pop("max_completion_tokens", None)
        begin = time.monotonic()
        try:
            usage = _post(f"{url}/v1/chat/completions", body)["usage"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            log.warning("kvstore: `%s` is not computed ahead: %s", name, error)
            continue
        log.info(
            "kvstore: `%s` is computed ahead: %s tokens in %.1f s",
            name,
            usage["prompt_tokens"],
            time.monotonic() - begin,
        )


def _is_there(page: str) -> bool:
    try:
        with _open(page, timeout=5):
            return True
    except OSError:  # an answer of another server included
        return False


def _post(url: str, body: JSON) -> JSON:
    """Return what is answered; whatever its model takes, it is waited for."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with _open(request) as answer:
        found: JSON = json.loads(answer.read())
    return found
