"""The verb ls, over a store or a remote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ..format.documents import JSON
from ..format.entry import Entry
from .entries import entry_data
from .main import Verb, open_store, output_of
from .output import Column, Output, format_bytes, format_count, format_time

if TYPE_CHECKING:
    from ..remote.catalog import Listed
    from ..store import Store

_SHORT = 12


@click.command("ls", cls=Verb)
@click.option(
    "--model", metavar="TEXT", help="Only entries whose MODEL has this in it."
)
@click.option(
    "--remote",
    metavar="[NAME]",
    is_flag=False,
    flag_value="",
    help="The entries of a remote; without its name, of the only one.",
)
@click.pass_context
def list_entries(context: click.Context, model: str | None, remote: str | None) -> None:
    """List the entries, latest first.

    SIZE counts blocks that entries share with each of them.
    """
    output = output_of(context)
    if remote is not None:
        _print_remote_entries(output, open_store(context), remote or None, model)
        return
    entries = open_store(context).entries()
    if model is not None:
        entries = [entry for entry in entries if model in entry.model]
    output.table(
        entries,
        _entry_columns(entries),
        data=entry_data,
        id_of=lambda entry: entry.id,
        empty="no entries",
    )


def _entry_columns(entries: Sequence[Entry]) -> list[Column[Entry]]:
    num_tokens = sum(entry.num_tokens for entry in entries)
    nbytes = sum(entry.nbytes for entry in entries)
    return [
        Column(
            "NAME",
            lambda entry: entry.name or "-",
            total=format_count(len(entries), "entry"),
        ),
        Column("ID", lambda entry: entry.id[:_SHORT]),
        Column(
            "TOKENS", lambda entry: f"{entry.num_tokens:,}", True, f"{num_tokens:,}"
        ),
        Column(
            "SIZE",
            lambda entry: format_bytes(entry.nbytes),
            True,
            format_bytes(nbytes),
        ),
        Column("CODEC", lambda entry: entry.codec),
        Column("SAVED", lambda entry: format_time(entry.updated_at)),
        Column("MODEL", lambda entry: entry.model),
    ]


def _print_remote_entries(
    output: Output, store: Store, name: str | None, model: str | None
) -> None:
    """Print the entries of a remote; without its name, of the only one."""
    found = [
        listed
        for listed in store.remote_entries(name)
        if model is None or model in listed.remote.entry.model
    ]
    output.table(
        found,
        _listed_columns(),
        data=_listed_data,
        id_of=lambda listed: listed.key.digest,
        empty="no entries",
    )


def _listed_columns() -> list[Column[Listed]]:
    return [
        Column("NAME", lambda listed: listed.remote.entry.name or "-"),
        Column("ID", lambda listed: listed.key.digest[:_SHORT]),
        Column("TOKENS", lambda listed: f"{listed.remote.entry.num_tokens:,}", True),
        Column("SIZE", lambda listed: format_bytes(listed.remote.entry.nbytes), True),
        Column("CODEC", lambda listed: listed.remote.entry.codec),
        Column("SAVED", lambda listed: format_time(listed.remote.entry.updated_at)),
        Column("MODEL", lambda listed: listed.remote.entry.model),
    ]


def _listed_data(listed: Listed) -> JSON:
    return {
        "id": listed.key.digest,
        "fingerprint": listed.key.fingerprint,
        "entry": entry_data(listed.remote.entry),
        "shards": [asdict(shard) for shard in listed.remote.shards],
    }
