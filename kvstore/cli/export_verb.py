"""The verb that hands an entry over: export."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .. import files
from ..errors import KVStoreError
from ..output import Output, format_bytes, format_count
from . import options
from .entry_verbs import entry_data, entry_label
from .root import Verb, open_store, output_of

if TYPE_CHECKING:
    from ..store import Store
    from ..types import JSON, Entry


@click.command("export", cls=Verb)
@click.argument("ref", metavar="NAME", shell_complete=options.complete_entries)
@click.option(
    "-o",
    "--output",
    "path",
    metavar="FILE",
    required=True,
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="The bundle to write; `-` is stdout.",
)
@click.option("--overwrite", is_flag=True, help="Replace the file if it is there.")
@click.pass_context
def export(context: click.Context, ref: str, path: Path, overwrite: bool) -> None:
    """Write an entry and its blocks as one file: a bundle.

    `kvstore import` takes it over, on another machine too. A bundle holds the tokens,
    so the text: it is as private as the conversation. The same entry gives the same
    bytes.
    """
    output = output_of(context)
    if str(path) == "-":
        _export_to_stdout(context, output, ref)
        return
    _check_path(path, overwrite)
    store = open_store(context)
    entry = store.entry(ref)
    begin = time.monotonic()
    with files.written_whole(path) as descriptor:
        nbytes = _write(store, entry, output, descriptor)
    data: JSON = {
        "entry": entry_data(entry),
        "file": str(path),
        "file_bytes": nbytes,
        "elapsed_s": round(time.monotonic() - begin, 3),
    }
    output.result(f"{_describe(entry, nbytes)}: {path}", data, [str(path)])


def _check_path(path: Path, overwrite: bool) -> None:
    """Refuse a path that a bundle could not be written to.

    Raises:
        KVStoreError: There is something, or no folder.
    """
    if path.exists() and not path.is_file():
        raise KVStoreError(
            f"not a regular file: `{path}`", hint="choose another; `-o -` is stdout"
        )
    if path.exists() and not overwrite:
        raise KVStoreError(
            f"there is a file already: `{path}`", hint="`--overwrite` replaces it"
        )
    if not path.parent.is_dir():
        raise KVStoreError(
            f"no such folder: `{path.parent}`", hint="make it, or choose another"
        )


def _export_to_stdout(context: click.Context, output: Output, ref: str) -> None:
    if output.mode == "json":
        raise click.UsageError("`-o -` and `--json` exclude each other", context)
    if sys.stdout.isatty():
        raise click.UsageError(
            "a bundle is not for a terminal: redirect it, or give a file", context
        )
    store = open_store(context)
    entry = store.entry(ref)
    sys.stdout.flush()
    nbytes = _write(store, entry, output, sys.stdout.fileno())
    output.note(_describe(entry, nbytes))


def _write(store: Store, entry: Entry, output: Output, descriptor: int) -> int:
    """Write a bundle to an open file and return its size in bytes."""
    with (
        os.fdopen(descriptor, "wb", closefd=False) as file,
        output.progress() as bars,
    ):
        return store.export_bundle(entry.id, file, progress=bars.bar("export"))


def _describe(entry: Entry, nbytes: int) -> str:
    tokens = format_count(entry.num_tokens, "token")
    return f"exported {tokens} of {entry_label(entry)}: {format_bytes(nbytes)}"
