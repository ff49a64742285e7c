"""The verb show: an entry's text."""

from __future__ import annotations

import sys

import click

from .. import options
from ..completion import complete_entries
from ..main import Verb, load_fast_blas, open_store, output_of
from ..output import printable
from .entries import entry_data

_TAIL = 400


@click.command(cls=Verb)
@click.argument("ref", metavar="NAME", shell_complete=complete_entries)
@click.option(
    "--tail",
    "num_last",
    metavar="[N]",
    type=click.IntRange(min=1),
    is_flag=False,
    flag_value=_TAIL,
    help=f"Only the last N tokens; {_TAIL} without a number.",
)
@click.option(
    "--model",
    metavar="MODEL",
    type=options.some_text,
    help="Where the model lies now, for its tokenizer.  [default: what the entry says]",
)
@click.pass_context
def show(
    context: click.Context, ref: str, num_last: int | None, model: str | None
) -> None:
    """Print the text of an entry, as the model has read it.

    The marks of the chat template are printed too. Of the model, only the tokenizer is
    loaded.
    """
    output = output_of(context)
    store = open_store(context)
    entry = store.entry(ref)
    load_fast_blas()
    from ...models.texts import entry_text, tokenizer_of

    text = entry_text(store, entry, tokenizer_of(entry, model), num_last)
    data = {"entry": entry_data(entry), "text": text}
    output.result(printable(text) if sys.stdout.isatty() else text, data, [entry.id])
