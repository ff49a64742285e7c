"""The verb that makes what is stored smaller: recompress."""

from __future__ import annotations

import click

from ...errors import KVStoreError
from .. import options
from ..main import Verb, load_fast_blas, open_store, output_of
from ..output import format_bytes, format_codec
from .entries import entry_data, entry_label


@click.command(cls=Verb)
@options.ref
@options.codec
@options.yes
@click.pass_context
def recompress(context: click.Context, ref: str, codec: str | None, yes: bool) -> None:
    """Store an entry's exact blocks with another codec.

    They can be loaded at every moment, and are not exact afterwards, in no entry that
    shares them; what a pinned entry has too stays as it is. So does a block that
    something lossy went into: none is coded twice. `inspect` says what the entry was
    stored with before.
    """
    if codec is None:
        raise click.UsageError("missing option `--quality` or `--codec`", context)
    output = output_of(context)
    store = open_store(context)
    entry = store.entry(ref)
    question = f"store the exact blocks of {entry_label(entry)} as {codec}, for good?"
    if not output.confirm(question, is_answered=yes):
        raise KVStoreError("nothing was changed", hint="`-y` confirms")
    load_fast_blas()
    with output.progress() as bars:
        done = store.recompress(entry.id, codec, progress=bars.bar("recompress"))
    data = {"entry": entry_data(done), "nbytes_before": entry.nbytes}
    if done == entry:
        text = (
            f"nothing of {entry_label(entry)} is exact, or it is stored so already, or"
            " a pinned entry has it too"
        )
    else:
        text = (
            f"recompressed {entry_label(entry)}: {format_bytes(done.nbytes)} of"
            f" {format_bytes(entry.nbytes)}, {format_codec(done.codec)}"
        )
    output.result(text, data, [done.id])
