"""The stock ``mlx_lm.server`` with a store behind its prompt cache.

mlx-lm's module is executed once more, as a copy that nobody else sees. In that copy,
four of its names stand for classes of ours; mlx-lm itself stays as it is.
"""

from __future__ import annotations

import _thread
import argparse
import importlib.util
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

from ..caches.memory import share_heap
from ..errors import KVStoreError
from ..fingerprint import Fingerprint, read_json, weight_files
from ..format.documents import JSON
from ..models.load import find_model
from ..models.texts import decode
from .disk import ServedModel, harmless
from .drift import Drift, find_drift
from .generator import Batch, mixed_generator
from .pages import Pages
from .prefill import stream_alone
from .prompt_cache import DiskPromptCache, Lookup
from .provider import Provider
from .requests import BadRequestError, check_body
from .tenants import find_tenant
from .warm import start_warming
from .watch import Requests, Served, score, watch

log = logging.getLogger("kvstore")
# Docker kills ten seconds after it asks; launchd and systemd wait longer.
_WRITE_S, _REPLY_S = 7.0, 2.0
MakeCache = Callable[[Callable[[Any], ServedModel], int], DiskPromptCache]
"""Makes the prompt cache, given ``describe`` and how many it may hold in memory."""


def serve(
    args: Sequence[str],
    make_cache: MakeCache,
    pages: Pages,
    tenant_header: str | None = None,
    *,
    reanchor: float | None = None,
    warm: Mapping[str, JSON] | None = None,
) -> None:
    """Run ``mlx_lm.server`` until SIGINT or SIGTERM; what waits is written then.

    Args:
        args: The command line of ``mlx_lm.server``.
        make_cache: Makes the prompt cache, which is closed at the end.
        pages: Show the store at ``/kvstore``.
        tenant_header: Names who asks; a request without it is refused. The prompt
            cache is then one of :class:`TenantPromptCache`.
        reanchor: Reuse rows behind a change in a prompt, where the model can, as long
            as that moves what it says by no more than this KL divergence; infinity for
            any.
        warm: Requests to compute ahead, by what to call them.

    Raises:
        KVStoreError: There is no such model, or mlx-lm runs distributed.
        ValueError: mlx-lm does not take these arguments.
    """
    share_heap()
    server: Any = _copy_module("mlx_lm.server")
    parts = _Parts(server, make_cache, pages, reanchor, warm)
    # mlx-lm's own parser would read the command line of this process.
    server.argparse = SimpleNamespace(
        **{**vars(argparse), "ArgumentParser": _parser_class(args)}
    )
    server.ModelProvider = parts.make_provider
    server.LRUPromptCache = parts.make_prompt_cache
    server.ResponseGenerator = parts.make_generator
    server.stream_generate = parts.stream
    server.BatchGenerator = parts.make_batch
    _check_requests(server.APIHandler, parts.requests, tenant_header)
    drift = Drift()

    def note(served: Served, found: Lookup | None) -> None:
        if pages.metrics:
            pages.metrics.note(served, found)
        if found is not None:
            _compare(parts.providers[-1], parts.opened[-1], drift, served, found)

    watch(server, parts.requests, lambda: parts.opened[-1], note)
    pages.attach(server.APIHandler)
    _run(server, parts.generators, parts.opened, parts.requests)


class _Parts:
    """Ours, in the place of mlx-lm's; each list has one at most, which mlx-lm makes."""

    def __init__(
        self,
        server: Any,
        make_cache: MakeCache,
        pages: Pages,
        reanchor: float | None,
        warm: Mapping[str, JSON] | None,
    ) -> None:
        self._make_cache, self._pages = make_cache, pages
        self._reanchor, self._warm = reanchor, warm
        self._generator_class = mixed_generator(server)
        self._stream_generate = server.stream_generate
        self._batches: list[Any] = []
        self.requests = Requests()
        self.providers: list[Any] = []
        self.opened: list[DiskPromptCache] = []
        self.generators: list[Any] = []

    def make_provider(self, cli_args: argparse.Namespace) -> Any:
        def note_kl(kl: float) -> None:
            self.opened[-1].store.notes.add_reanchored(kl)

        reanchor = self._reanchor
        made = Provider(cli_args, self._give_up, reanchor=reanchor, note_kl=note_kl)
        self.providers.append(made)
        return made

    def make_prompt_cache(self, max_size: int) -> DiskPromptCache:
        self.opened.append(self._make_cache(self.providers[-1].describe, max_size))
        # mlx-lm has set up its log only now.
        log.info("kvstore: the store is shown at /kvstore%s", self._pages.login)
        return self.opened[-1]

    def make_generator(self, *given: Any) -> Any:
        made = self._generator_class(self._give_up, self.requests, *given)
        self.generators.append(made)
        if self._warm:
            options = self.providers[-1].cli_args
            start_warming(options.host, options.port, self._pages.token, self._warm)
        return made

    def make_batch(self, *given: Any, **options: Any) -> Any:
        # There is one at a time.
        self._batches[:] = [Batch(self._keep, self._keep_prefill, *given, **options)]
        return self._batches[0]

    def stream(self, **options: Any) -> Iterator[Any]:
        # A request that is served alone goes past the batch; what it computes is kept
        # too.
        generator = self.generators[-1]
        return stream_alone(
            self._stream_generate,
            generator.key_alone,
            self._keep_prefill,
            lambda: generator._stop,
            **options,
        )

    def _give_up(self) -> None:
        for batch in self._batches:
            batch.give_up()
        self._batches.clear()

    def _keep(self, tokens: list[int], prompt_cache: list[Any]) -> None:
        key = self.providers[-1].model_key
        self.opened[-1].insert_cache(key, tokens, prompt_cache, cache_type="user")

    def _keep_prefill(self, tokens: list[int], prompt_cache: list[Any]) -> None:
        key = self.providers[-1].model_key
        self.opened[-1].keep_prefill(key, tokens, prompt_cache)


def _compare(
    provider: Provider,
    prompt_cache: DiskPromptCache,
    drift: Drift,
    served: Served,
    found: Lookup,
) -> None:
    """Say where a prompt has left its conversation, and note what that has cost."""
    # At the end the model is let go while a request still waits.
    if served.prompt is None or provider.tokenizer is None:
        return
    with harmless("not compared with what came before"):
        known = prompt_cache.sampled(provider.model_key, served.prompt)
        change = known and find_drift(
            served.prompt,
            found.num_computed,
            known.latest(),
            partial(decode, provider.tokenizer),
        )
        if change and (words := drift.note(change)):
            log.warning("kvstore: %s", words)
        if isinstance(provider.loaded, Fingerprint):
            why = change.cause if change else found.reason
            cost = score(served, found, provider.loaded, why)
            prompt_cache.store.notes.add_request(cost)


def _run(
    server: Any,
    generators: Sequence[Any],
    opened: Sequence[DiskPromptCache],
    requests: Requests,
) -> None:
    """Serve until the process is to end; what waits is written then."""
    with _terminated_like_interrupted():
        try:
            server.main()
        except KeyboardInterrupt:
            if not _failures(generators):
                raise
        finally:
            is_written = _end(generators, opened, requests)
            if opened:
                what = "all is written" if is_written else "not all is written"
                log.info("kvstore: stopped after %s; %s", requests.sum(), what)
    for error in _failures(generators):
        if isinstance(error, KVStoreError):
            raise error
        raise KVStoreError(
            f"the thread that generates has ended: {type(error).__name__}: {error}",
            hint="the log says where; start the server again",
        ) from error


def _failures(generators: Sequence[Any]) -> list[Exception]:
    """Return what has ended the threads that generate, if anything has."""
    return [found for g in generators if (found := g.failure) is not None]


def _check_requests(
    handler_class: Any, requests: Requests, tenant_header: str | None
) -> None:
    """Have mlx-lm's handler refuse what would end the thread that generates."""
    validate, post = handler_class.validate_model_parameters, handler_class.do_POST
    set_completion_headers = handler_class._set_completion_headers

    def validate_all(handler: Any) -> None:
        try:
            validate(handler)
            check_body(handler.path, handler.body)
            if tenant_header is not None:
                tenant = find_tenant(handler.headers, tenant_header)
                requests.current.tenant = tenant
        except ValueError as error:
            raise BadRequestError(str(error)) from error

    def set_headers(handler: Any, status_code: int = 200) -> None:
        # mlx-lm says of all that is wrong only later that it is not found.
        if isinstance(sys.exc_info()[1], BadRequestError):
            status_code = 400
        set_completion_headers(handler, status_code)

    def do_post(handler: Any) -> None:
        try:
            post(handler)
        # mlx-lm 0.31 does not answer the first, and no release the others.
        except (BadRequestError, UnicodeDecodeError, RecursionError) as error:
            handler._set_completion_headers(400)
            handler.end_headers()
            handler.wfile.write(json.dumps({"error": str(error)}).encode())

    handler_class._set_completion_headers = set_headers
    handler_class.validate_model_parameters = validate_all
    handler_class.do_POST = do_post


def _end(
    generators: Sequence[Any],
    opened: Sequence[DiskPromptCache],
    requests: Requests,
) -> bool:
    """Stop what generates, and write what waits, even where Ctrl-C comes again.

    Returns:
        Whether all is written.
    """
    is_written = True
    try:
        for generator in generators:
            generator.stop_and_join()  # or it would live on where no port is free
            _wait_for_end(generator._generation_thread)
    finally:
        # Its thread ends with the process, whatever it was about to log or note.
        requests.wait_for_end(_REPLY_S)
        for prompt_cache in opened:
            is_written = prompt_cache.close(_WRITE_S) and is_written
    return is_written


def _wait_for_end(thread: threading.Thread) -> None:
    """Wait until a thread that has been joined is gone from the process too."""
    # Its last act, behind all of Python's, is to hand MLX's stream back, for which it
    # takes the interpreter's lock: the process aborts where the interpreter has begun
    # to end by then.
    tasks = Path("/proc/self/task")  # where there is none, a moment has to do
    deadline = time.monotonic() + (10 if tasks.exists() else 0.1)
    while time.monotonic() < deadline:
        if tasks.exists() and not (tasks / str(thread.native_id)).exists():
            return
        time.sleep(0.01)


def _copy_module(name: str) -> ModuleType:
    """Return a module executed anew, which only the caller knows."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise KVStoreError(f"mlx-lm has no module `{name}`")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _parser_class(args: Sequence[str]) -> type[argparse.ArgumentParser]:
    """Return a parser of the given arguments that raises what is wrong with them."""

    class Parser(argparse.ArgumentParser):
        def parse_args(self, *_: Any) -> Any:  # type: ignore[override]
            found = super().parse_args(list(args))
            _check(found)
            return found

        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    return Parser


def options_help() -> str:
    """Return what ``mlx_lm.server --help`` says of its options."""
    server = _copy_module("mlx_lm.server")
    found: list[str] = []

    class Parser(argparse.ArgumentParser):
        def parse_args(self, *_: Any) -> NoReturn:  # type: ignore[override]
            found.append(self.format_help())
            raise SystemExit

    server.argparse = SimpleNamespace(  # type: ignore[attr-defined]
        **{**vars(argparse), "ArgumentParser": Parser}
    )
    with suppress(SystemExit):
        server.main()
    return found[0].partition("options:\n")[2]


def _check(cli_args: argparse.Namespace) -> None:
    """Refuse now what the server would find out in a thread, and live on with.

    Raises:
        KVStoreError: There is no such model, mlx-lm runs distributed, or nothing can
            listen there.
        ValueError: There is no such port.
    """
    import mlx.core as mx

    if not 0 <= cli_args.port < 65_536:  # of more, the system takes the lower bits
        raise ValueError(f"argument --port: {cli_args.port} is not from 0 to 65535")
    for model in (cli_args.model, cli_args.draft_model):
        if model is not None:
            folder = find_model(model)
            weight_files(folder)
            read_json(folder / "config.json")
    # Each process would hold other rows of the same tokens, and all must hit alike.
    if mx.distributed.init().size() > 1:
        raise KVStoreError(
            "the store cannot be shared by the processes of a distributed model",
            hint="run `mlx_lm.server` without a store",
        )
    _check_address(cli_args.host, cli_args.port)


def _check_address(host: str, port: int) -> None:
    """Listen where the server will, before a model is loaded for it."""
    try:
        infos = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = infos[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()  # two may be bound to one port, and one can listen
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise KVStoreError(
            f"cannot listen at {host}, port {port}: {why}",
            hint="choose another place with `--host` and `--port`",
        ) from error


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the server as Ctrl-C does, once."""
    usual = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    usual_hook = sys.unraisablehook

    def interrupt(*_: Any) -> None:
        for number in usual:
            signal.signal(number, signal.SIG_IGN)  # what waits is being written
        raise KeyboardInterrupt

    def hook(lost: Any) -> None:
        # Python only prints what is raised while it collects garbage: the server would
        # go on, and hear no further signal.
        if lost.exc_type is KeyboardInterrupt:
            signal.signal(signal.SIGTERM, interrupt)
            # A `Thread` would wait for a lock that who is interrupted may hold.
            _thread.start_new_thread(again, ())
        else:
            usual_hook(lost)

    def again() -> None:
        time.sleep(0.1)  # until nobody collects
        os.kill(os.getpid(), signal.SIGTERM)

    for number, handler in usual.items():
        if handler is not signal.SIG_IGN:  # as by `nohup`
            signal.signal(number, interrupt)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = usual_hook
        for number, handler in usual.items():
            signal.signal(number, handler)
