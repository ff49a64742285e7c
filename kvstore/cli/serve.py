"""The verb that runs mlx-lm's server with a store: serve."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from . import options
from .housekeeping import Size
from .main import Verb, load_fast_blas, log, open_store

if TYPE_CHECKING:
    from ..server.disk import ServedModel
    from ..server.prompt_cache import DiskPromptCache

_MIN_FREE_BYTES = 5_000_000_000


@click.command(
    cls=Verb,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True},
    options_metavar="[OPTIONS] [OPTIONS OF mlx_lm.server]",
)
@options.codec
@click.option(
    "--max-size",
    metavar="SIZE",
    type=Size(min=1),
    help="Set the store's size limit, as `prune --limit` does: 20GB.",
)
@click.option(
    "--min-free",
    metavar="SIZE",
    type=Size(),
    default=_MIN_FREE_BYTES,
    show_default="5GB",
    help="Write nothing that would leave less of the disk free.",
)
@click.option(
    "--min-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Neither keep nor read fewer tokens.",
)
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="")
@click.pass_context
def serve(
    context: click.Context,
    codec: str | None,
    max_size: int | None,
    min_free: int,
    min_tokens: int,
    args: tuple[str, ...],
) -> None:
    """Run `mlx_lm.server` with its prompt cache kept on disk.

    It takes all options of `mlx_lm.server` too, such as --model, --port and
    --prompt-cache-size; `mlx_lm.server --help` lists them. A prompt that is not in
    memory is looked up in the store, and what was computed is written to it while the
    server goes on. SIGTERM and Ctrl-C end it when what waits is written.
    """
    load_fast_blas()
    from ..server.app import serve as run
    from ..server.prompt_cache import DiskPromptCache

    def make_cache(
        describe: Callable[[Any], ServedModel], max_in_memory: int
    ) -> DiskPromptCache:
        # Only now: a wrong option or model must not leave an empty store behind.
        store = open_store(context, create=True, codec=codec)
        if max_size is not None:
            store.set_limit(max_size)
        return DiskPromptCache(
            store,
            describe,
            max_size=max_in_memory,
            min_tokens=min_tokens,
            min_free_bytes=min_free,
        )

    _log_like_mlx_lm()
    try:
        run(args, make_cache)
    except ValueError as error:
        raise click.UsageError(f"mlx_lm.server: {error}", context) from error


def _log_like_mlx_lm() -> None:
    """Send our log where mlx-lm's server sends its own, one line per request."""
    log.handlers.clear()
    log.propagate = True
    # `--log-level` rules, unless `-v` asks for more.
    log.setLevel(log.level if log.level < logging.WARNING else logging.NOTSET)
