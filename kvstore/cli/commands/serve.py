"""The verb that runs mlx-lm's server with a store: serve."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import click
from click.shell_completion import CompletionItem

from .. import options, settings
from ..completion import server_options
from ..main import Verb, chosen_path, log
from ..options import gathered, option
from .generate import make_store
from .view import describe, render

if TYPE_CHECKING:
    from ...server.disk import ServedModel
    from ...server.prompt_cache import DiskPromptCache
    from ...server.remote import RemoteTier
    from ...store import Store

# A token of RFC 9110, section 5.6.2.
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How a server uses the store; sizes in bytes."""

    # Which rows may be read.
    exact: bool
    min_bits: int
    # Fewer tokens are neither kept nor read.
    min_tokens: int
    # The store's size limit, where it is to be set.
    max_size: int | None
    # What the disk keeps free.
    min_free: int
    # What waits in memory to be written.
    max_queue: int
    # What is written in a day, or ``None`` for any.
    max_writes: int | None
    # Which header names a client, and entries that all clients find.
    tenant_header: str | None
    shared: tuple[str, ...]
    # A remote's name, how many seconds a request waits for it, and whether what is
    # saved is put there.
    remote: str | None
    remote_timeout: float
    push: bool
    # Reuse rows behind a change in a prompt too; as long as what is said moves by no
    # more than this KL divergence.
    reanchor: bool
    reanchor_max_kl: float | None

    @property
    def budget(self) -> float | None:
        """What re-anchoring may cost: infinity for any, ``None`` for nothing moved."""
        if self.reanchor_max_kl is None:
            return math.inf if self.reanchor else None
        return self.reanchor_max_kl

    def check(self, *, has_codes: bool, is_warmed: bool) -> None:
        """Refuse what cannot be had together."""
        wanted = {
            "exact": self.exact,
            "reanchor": self.budget is not None,
            "kv-bits": has_codes,
        }
        both = [f"`--{word}`" for word, is_wanted in wanted.items() if is_wanted]
        if len(both) > 1:
            raise click.UsageError(f"{' and '.join(both[:2])} exclude each other")
        header = self.tenant_header
        if self.shared and header is None:
            raise click.UsageError("`--shared` needs `--tenant-header`")
        if header is not None and not _HEADER_NAME.fullmatch(header):
            raise click.UsageError(
                f"`--tenant-header` takes the name of a header, not {header!r}"
            )
        if self.push and self.remote is None:
            raise click.UsageError("`--push` needs `--remote`")
        if is_warmed and header is not None:
            raise click.UsageError("`--warm` and `--tenant-header` exclude each other")

    def open_remote(self, store: Store) -> RemoteTier | None:
        """Return the remote as the server uses it, one that the store knows."""
        from ...server.remote import RemoteTier

        if self.remote is None:
            return None
        return RemoteTier(
            store, self.remote, timeout_s=self.remote_timeout, is_pushing=self.push
        )


class ServeVerb(Verb):
    """Shows the options of mlx-lm's server too."""

    def format_options(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        """Write both."""
        super().format_options(ctx, formatter)
        from ...server.app import options_help

        formatter.write("\nOptions of mlx_lm.server:\n")
        formatter.write(options_help())

    def shell_complete(
        self, ctx: click.Context, incomplete: str
    ) -> list[CompletionItem]:
        """Return both."""
        found = super().shell_complete(ctx, incomplete)
        return found + (server_options(incomplete) if incomplete[:1] == "-" else [])


@click.command(
    cls=ServeVerb,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True},
    options_metavar="[OPTIONS] [OPTIONS OF mlx_lm.server]",
)
@options.codec
@options.exact
@options.min_bits
@option(
    "--max-size SIZE",
    type=settings.some_bytes,
    help="Set the store's size limit, as `prune --limit` does: 20GB.",
)
@option(
    "--min-free SIZE",
    type=settings.size,
    default="5GB",
    help="Write nothing that would leave less of the disk free.",
)
@option(
    "--max-writes SIZE/day",
    type=options.daily_bytes,
    help="Write no more than this in a day (UTC), restarts and other processes counted:"
    " 50GB/day. What is stored stays, and is read.",
)
@option(
    "--min-tokens N",
    type=click.IntRange(min=1),
    default=64,
    help="Neither keep nor read fewer tokens.",
)
@option(
    "--max-queue SIZE",
    type=settings.some_bytes,
    default="2GB",
    help="Rows that may wait in memory to be written; more are not kept. They count for"
    " --prompt-cache-bytes.",
)
@option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    help="Log text, or a JSON object per line; one line per request either way.",
)
@option(
    "--tenant-header NAME",
    help="Keep clients apart by this header of their requests, `Authorization` or one"
    " that a proxy sets: each finds only what it has asked itself. A request without it"
    " is refused.",
)
@option(
    "--shared ENTRY",
    multiple=True,
    help="With `--tenant-header`, an entry that all clients may find, as `save"
    " --request` makes it of a system prompt.",
)
@option(
    "--remote NAME",
    type=options.some_text,
    help="Look in this remote for what is neither in memory nor on disk.",
)
@option(
    "--remote-timeout SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    help="How long a request waits for the remote, which is then left alone for a"
    " minute. What comes later is on disk for the next request.",
)
@option("--push", help="Put into the remote what is written to the store.")
@option(
    "--reanchor",
    help="Where a few tokens of a prompt have changed, a date say, reuse the rows of"
    " what follows, moved to where it stands now: an approximation. What is stored of"
    " it is marked. A model whose rows cannot be moved is served without.",
)
@option(
    "--reanchor-max-kl KL",
    type=click.FloatRange(min=0),
    help="As --reanchor, within a budget: of one request in eight, the exact rows are"
    " computed too, while nothing is asked. Once what the model says is moved by more"
    " than this on the mean, 0.005 say, nothing is re-anchored any more.",
)
@option(
    "--warm FILE.json",
    type=click.File("rb"),
    multiple=True,
    help="Compute the prompt of this request ahead, once the server is there: what an"
    " agent posts to /v1/chat/completions. May be given again.",
)
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="")
@click.pass_context
@gathered("asked", ServeOptions)
def serve(
    context: click.Context,
    codec: str | None,
    asked: ServeOptions,
    log_format: str,
    warm: tuple[BinaryIO, ...],
    args: tuple[str, ...],
) -> None:
    """Run `mlx_lm.server` with its prompt cache kept on disk.

    It takes all options of `mlx_lm.server` too, such as --model, --port and
    --prompt-cache-size; `kvstore serve --help` lists them. A prompt that is not in
    memory is looked up in the store, and what was computed is written to it while the
    server goes on. SIGTERM and Ctrl-C end it when what waits is written, which takes
    7 seconds at most; what is not kept then is logged.

    With `--remote`, a prompt of which neither has enough is looked for there, unless
    computing it is the faster.

    The store is shown, as `kvstore view` does it, at /kvstore, with the token that is
    logged at the start, or is $KVSTORE_TOKEN; /metrics has counters for Prometheus, and
    needs it too where `--tenant-header` is given.
    """
    least = options.least_bits(asked.exact, asked.min_bits)
    chosen = options.codec_of(codec, least, "high")
    has_codes = any(word.partition("=")[0] == "--kv-bits" for word in args)
    asked.check(has_codes=has_codes, is_warmed=bool(warm))
    ahead = {file.name: options.read_request("--warm", file) for file in warm}
    if (model := settings.setting("model")) is not None:
        args = ("--model", os.path.expanduser(model), *args)  # what comes later wins
    from ...server.app import serve as run
    from ...server.pages import Pages
    from ...server.prompt_cache import DiskPromptCache, TenantPromptCache
    from ...server.requests import check_body
    from ...server.tenants import shared_tokens
    from ...store import Store

    def make_cache(
        describe: Callable[[Any], ServedModel], max_in_memory: int
    ) -> DiskPromptCache:
        # Only now: a wrong option or model must not leave an empty store behind.
        store = make_store(context, chosen)
        _shape_log(log_format)
        if asked.max_size is not None:
            store.set_limit(asked.max_size)
        make: Callable[..., DiskPromptCache] = partial(DiskPromptCache, store, describe)
        if asked.tenant_header is not None:
            shared = shared_tokens(store, asked.shared)
            make = partial(TenantPromptCache, store, describe, shared)
        return make(
            remote=asked.open_remote(store),
            max_size=max_in_memory,
            min_tokens=asked.min_tokens,
            exact=asked.exact,
            min_bits=asked.min_bits,
            min_free_bytes=asked.min_free,
            max_queued_bytes=asked.max_queue,
            max_daily_bytes=asked.max_writes,
        )

    for name, body in ahead.items():
        try:
            check_body("chat/completions", body)
        except ValueError as error:
            raise click.UsageError(f"`--warm {name}`: {error}") from error
    header = asked.tenant_header
    open_it = partial(Store, chosen_path(context), create=False)
    pages = Pages(open_it, describe, render, are_private=header is not None)
    _log_like_mlx_lm()
    try:
        run(args, make_cache, pages, header, reanchor=asked.budget, warm=ahead)
    except ValueError as error:
        raise click.UsageError(f"mlx_lm.server: {error}", context) from error


def _shape_log(log_format: str) -> None:
    """Log one line per request, unless debugging was asked for.

    Call it once mlx-lm has set up its logging.
    """
    from ...server.watch import JSONFormatter, is_no_chatter

    root = logging.getLogger()
    is_short = root.getEffectiveLevel() >= logging.INFO and not log.level
    if is_short:
        logging.getLogger("kvstore.lookup").setLevel(logging.WARNING)
    for handler in root.handlers:
        if is_short:
            handler.addFilter(is_no_chatter)
        if log_format == "json":
            handler.setFormatter(JSONFormatter())


def _log_like_mlx_lm() -> None:
    """Send our log where mlx-lm's server sends its own, one line per request."""
    log.handlers.clear()
    log.propagate = True
    # `--log-level` rules, unless `-v` asks for more.
    log.setLevel(log.level if log.level < logging.WARNING else logging.NOTSET)
