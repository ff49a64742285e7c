"""One log line per request of mlx-lm's server; in the answer, what came from disk.

Knows mlx-lm's handler of requests. What was looked up is asked of the prompt cache.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import blake3
from huggingface_hub.errors import CacheNotFound

from ..fingerprint import Fingerprint
from ..storage.index import Score

if TYPE_CHECKING:
    from .prompt_cache import DiskPromptCache, Lookup

log = logging.getLogger("kvstore")
# Of a prompt without messages, so many characters say which conversation it is of.
_BEGIN = 256
# What mlx-lm says of each request in several lines.
_CHATTER = ("Prompt Cache: ", "- ", "Prompt processing progress: ")
# Behind the first of these, mlx-lm quotes a request or an answer.
_QUOTED = re.compile(r"\s*[:(].*", re.DOTALL)


@dataclass(slots=True)
class Served:
    """One request, as its log line tells it."""

    path: str
    began: float
    # HTTP's, or ``None`` where nothing was answered.
    status: int | None = None
    # The tokens of the prompt, once they are known.
    prompt: list[int] | None = None
    # Whose it is, where clients are told apart.
    tenant: str | None = None
    # A hash of how its conversation begins, by which it is known again.
    conversation: bytes = b""
    num_generated: int = 0
    # Seconds until the first token was there.
    first_token_s: float | None = None
    # Why nobody has the whole answer; empty where somebody has.
    given_up: str = ""


class Requests:
    """The requests that are served now, one for each thread."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._changed = threading.Condition()
        self._num_begun = self._num_served = 0

    def begin(self, path: str) -> Served:
        """Note a request that this thread has begun to serve."""
        self._local.served = Served(path, time.monotonic())
        with self._changed:
            self._num_begun += 1
            self._num_served += 1
        return self.current

    def end(self) -> None:
        """Note that all is said of the request that this thread served."""
        with self._changed:
            self._num_served -= 1
            self._changed.notify_all()

    def wait_for_end(self, timeout_s: float) -> None:
        """Wait until all is said of those that are being served, or so long."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_served, timeout_s)

    def sum(self) -> str:
        """Return how many there were."""
        return f"{self._num_begun} request{'' if self._num_begun == 1 else 's'}"

    @property
    def current(self) -> Served:
        """The request that this thread serves, or was refused before it began."""
        return getattr(self._local, "served", Served("", time.monotonic()))

    def counted(self, responses: Iterable[Any]) -> Iterator[Any]:
        """Yield what is generated for it."""
        served = self.current
        for response in responses:
            served.num_generated += 1
            if served.first_token_s is None:
                served.first_token_s = time.monotonic() - served.began
            yield response


def conversation_of(request: Any, tenant: str | None) -> bytes:
    """Return what a conversation is known by: a hash of what the user says first.

    What stands before it may have a clock in it.
    """
    said = [m.get("content") for m in request.messages if m.get("role") == "user"]
    begin = said[0] if said else request.prompt[:_BEGIN]
    return blake3.blake3(json.dumps([tenant, begin]).encode()).digest()


def score(served: Served, found: Lookup, model: Fingerprint, why: str) -> Score:
    """Return what a request has cost, which has ended now."""
    now = time.time()
    return Score(
        id=served.conversation,
        fingerprint=model.bare.digest,
        model=model.label,
        num_requests=1,
        from_memory=found.from_memory,
        from_disk=found.from_disk,
        num_reanchored=found.num_reanchored,
        num_computed=found.num_computed,
        num_again=0,
        worst=0,
        why=why,
        num_tokens=found.num_prompt_tokens + served.num_generated,
        began_at=now,
        used_at=now,
    )


def watch(
    server: Any,
    requests: Requests,
    cache_of: Callable[[], DiskPromptCache],
    note: Callable[[Served, Lookup | None], None] | None = None,
) -> None:
    """Have the server's handler tell of each request, in its answer and in the log.

    What mlx-lm logs of a request that is wrong, or of an answer that it cannot read,
    is cut before it quotes either, unless debugging was asked for.
    """

    def lookup() -> Lookup | None:
        prompt = requests.current.prompt
        return None if prompt is None else cache_of().lookup_of(prompt)

    def end(served: Served) -> None:
        try:
            found = lookup()
            _log_request(served, found)
            if note is not None:
                note(served, found)
        finally:
            requests.end()

    quiet = {say.__name__: _unquoted(say) for say in (logging.warning, logging.error)}
    server.logging = SimpleNamespace(**vars(logging) | quiet)
    server.scan_cache_dir = _scan_or_nothing(server.scan_cache_dir)
    _watch_posts(server.APIHandler, requests, end)
    _watch_lines(server.APIHandler)
    _add_lookups(server.APIHandler, lookup)


def _watch_posts(
    handler_class: Any, requests: Requests, end: Callable[[Served], None]
) -> None:
    """Note how each request to generate begins, is answered, and ends."""
    post, send = handler_class.do_POST, handler_class.send_response

    def do_post(handler: Any) -> None:
        served = requests.begin(_escaped(handler.path.partition("?")[0]))
        try:
            post(handler)
        except (BrokenPipeError, ConnectionResetError):
            served.given_up = "the client hung up"
            handler.close_connection = True
        except RuntimeError as error:
            # So mlx-lm ends all that wait when the server is stopped.
            if str(error) != "generation thread died":
                raise
            served.given_up = "the server stops"
            handler.close_connection = True
        finally:
            end(served)

    def send_response(handler: Any, code: int, message: str | None = None) -> None:
        if handler.command == "POST":
            requests.current.status = code
        send(handler, code, message)

    handler_class.do_POST = do_post
    handler_class.send_response = send_response


def _watch_lines(handler_class: Any) -> None:
    """Log what is asked besides, and connections that break, in a line each."""
    handle = handler_class.handle_one_request

    def log_request(handler: Any, code: Any = "-", size: Any = "-") -> None:
        if handler.command != "POST":  # which has a line of its own
            log.info("kvstore: %s: %s", _name(handler), int(code))

    def log_message(_: Any, words: str, *args: Any) -> None:
        # A malformed line of a request too may have a token after the mark.
        log.info("kvstore: %s", _escaped((words % args).partition("?")[0]))

    def handle_one_request(handler: Any) -> None:
        try:
            handle(handler)
        except ConnectionError:
            handler.close_connection = True
            log.info("kvstore: %s: the client hung up", _name(handler))

    handler_class.log_request = log_request
    handler_class.log_message = log_message
    handler_class.handle_one_request = handle_one_request


def _add_lookups(handler_class: Any, lookup: Callable[[], Lookup | None]) -> None:
    """Have answers say what came from disk and memory, in headers and in the usage."""
    end_headers = handler_class.end_headers

    def with_headers(handler: Any) -> None:
        if handler.command == "POST" and (found := lookup()) is not None:
            handler.send_header("X-KVStore-Disk-Tokens", str(found.from_disk))
            handler.send_header("X-KVStore-Memory-Tokens", str(found.from_memory))
        end_headers(handler)

    def with_source(make: Any) -> Any:
        def made(handler: Any, *args: Any, **options: Any) -> Any:
            response = make(handler, *args, **options)
            # A streamed answer has it in its last part only.
            if "usage" in response and (found := lookup()) is not None:
                moved = {"reanchored_tokens": found.num_reanchored}
                response["usage"]["kvstore"] = found.sums() | moved
            return response

        return made

    handler_class.end_headers = with_headers
    for name in ("generate_response", "completion_usage_response"):
        setattr(handler_class, name, with_source(getattr(handler_class, name)))


def _scan_or_nothing(scan: Callable[[], Any]) -> Callable[[], Any]:
    def scan_cache_dir() -> Any:
        try:
            return scan()
        except (CacheNotFound, OSError) as error:
            log.debug("kvstore: no models of the Hugging Face Hub: %s", error)
            return SimpleNamespace(repos=())

    return scan_cache_dir


def _unquoted(say: Callable[..., None]) -> Callable[..., None]:
    def said(message: str, *args: Any, **options: Any) -> None:
        if not logging.getLogger().isEnabledFor(logging.DEBUG):
            message = _QUOTED.sub(" (`--log-level DEBUG` says more)", message)
        say(message, *args, **options)

    return said


def _name(handler: Any) -> str:
    """Return method and path of a request, without what may be a token."""
    # There is none where the client hung up before it.
    line = getattr(handler, "requestline", "")
    return _escaped(" ".join(line.partition("?")[0].split()[:2]))


def _escaped(text: str) -> str:
    """Return what a client sent without what would steer the operator's terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _log_request(served: Served, lookup: Lookup | None) -> None:
    seconds = time.monotonic() - served.began
    status = served.given_up or served.status
    parts = [] if lookup is None else [str(lookup)]
    if served.first_token_s is not None:
        generated, first = served.num_generated, served.first_token_s
        parts.append(f"{generated} generated, the first after {first:.2f} s")
    parts.append(f"{seconds:.2f} s in all")
    data = {
        "path": served.path,
        "status": served.status,
        "is_given_up": bool(served.given_up),
        "num_generated_tokens": served.num_generated,
        "first_token_s": served.first_token_s,
        "elapsed_s": round(seconds, 3),
        **(asdict(lookup) if lookup else {}),
    }
    message = f"kvstore: POST {served.path}: {status}: {'; '.join(parts)}"
    log.info("%s", message, extra={"request": data})


class JSONFormatter(logging.Formatter):
    """Each record as a JSON object on one line; a request's has its numbers too."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        data: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname,
            "message": record.getMessage(),
        }
        if record.exc_info:
            data["traceback"] = self.formatException(record.exc_info)
        return json.dumps(data | getattr(record, "request", {}))


def is_no_chatter(record: logging.LogRecord) -> bool:
    """Whether a record is none of those that the line of a request stands for."""
    return record.name != "root" or not record.getMessage().startswith(_CHATTER)
