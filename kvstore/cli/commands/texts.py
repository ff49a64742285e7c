"""The verbs show and search: an entry's text, and the entries that have a word."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from .. import options
from ..completion import complete_entries
from ..main import Verb, open_store, output_of
from ..options import option
from ..output import Column, printable
from .entries import entry_data

if TYPE_CHECKING:
    from ...errors import KVStoreError
    from ...models.texts import Hit

_TAIL = 400


@click.command(cls=Verb)
@click.argument("ref", metavar="NAME", shell_complete=complete_entries)
@option(
    "--tail [N]",
    "num_last",
    type=click.IntRange(min=1),
    is_flag=False,
    flag_value=_TAIL,
    help=f"Only the last N tokens; {_TAIL} without a number.",
)
@option(
    "--model MODEL",
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
    from ...models.texts import entry_text, tokenizer_of

    text = entry_text(store, entry, tokenizer_of(entry, model), num_last)
    data = {"entry": entry_data(entry), "text": text}
    output.result(printable(text) if sys.stdout.isatty() else text, data, [entry.id])


@click.command(cls=Verb)
@click.argument("word", metavar="WORD", type=options.some_text)
@option(
    "--model MODEL",
    type=options.some_text,
    help="Where the model lies now, for its tokenizer; for entries of all models."
    "  [default: what each entry says]",
)
@click.pass_context
def search(context: click.Context, word: str, model: str | None) -> None:
    """List the entries that have WORD in their text, name or title.

    Upper and lower case are the same. PLACES counts them in the text. Exits with 1
    where there is none.
    """
    output = output_of(context)
    store = open_store(context)
    from ...models.texts import search, tokenizer_of

    def warn(what: str, why: KVStoreError) -> None:
        output.warning(f"not searched: `{what}`: {why}")

    hits = list(search(store, word, load=lambda e: tokenizer_of(e, model), unread=warn))
    output.table(
        hits,
        _COLUMNS,
        data=lambda hit: asdict(hit) | {"entry": entry_data(hit.entry)},
        id_of=lambda hit: hit.entry.id,
        empty="nothing found",
    )
    if not hits:
        context.exit(1)


_COLUMNS: list[Column[Hit]] = [
    Column("NAME", lambda hit: hit.entry.name or hit.entry.id[:8]),
    Column("PLACES", lambda hit: f"{hit.num_places:,}", True),
    Column("TEXT", lambda hit: hit.excerpt),
]
