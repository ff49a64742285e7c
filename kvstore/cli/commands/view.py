"""The verb view: the store as one HTML page that needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...format.documents import JSON
from ...storage import files
from .. import options
from ..main import Verb, open_store, output_of
from ..output import format_ago, format_bytes, one_line
from .housekeeping import stats_fields
from .listing import Line, model_name, tree_lines

if TYPE_CHECKING:
    from ...store import Store

_NUM_NEXT = 5


@click.command(cls=Verb)
@options.option(
    "-o",
    "--output FILE.html",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write.  [default: a temporary one, which a browser opens]",
)
@options.overwrite
@click.pass_context
def view(context: click.Context, path: Path | None, overwrite: bool) -> None:
    """Show the store as a page: what entries share, sizes, and what goes next.

    The page is one file. It loads nothing, sends nothing, and runs no script but its
    own. It has names and titles of entries, so keep it as private as the store.
    """
    output = output_of(context)
    if path is not None:
        files.check_new(path, overwrite=overwrite)
    data = render(describe(open_store(context))).encode()
    if path is None:
        number, name = tempfile.mkstemp(".html", "kvstore-")
        written = Path(name)
        with open(number, "wb") as file:
            file.write(data)
    else:
        written = path
        with files.written_whole(path) as descriptor:
            files.write_all(descriptor, data)
    output.result(str(written), {"path": str(written)}, [str(written)])
    if path is None and sys.stdout.isatty() and output.mode == "human":
        import webbrowser  # slow to import

        webbrowser.open(written.as_uri())


def describe(store: Store) -> JSON:
    """Return what the page shows."""
    from ...ops.upkeep.prune import eviction_order

    entries = store.entries()
    going = {entry.id for entry in store.run(eviction_order)[:_NUM_NEXT]}
    by_age = sorted(entries, key=lambda entry: entry.created_at)
    lines = list(tree_lines(store, entries))
    sizes = {line.entry.id: line.nbytes for line in lines if line.entry}
    return {
        "path": str(store.path),
        "sums": stats_fields(store.stats()),
        "lines": [_line_data(line, going) for line in lines],
        "growth": list(
            zip(
                (entry.created_at for entry in by_age),
                accumulate(sizes.get(entry.id, 0) for entry in by_age),
                strict=True,
            )
        ),
    }


def _line_data(line: Line, going: set[str]) -> JSON:
    entry = line.entry
    name = (entry.name or entry.title) if entry else line.label
    return {
        "depth": line.depth,
        "id": entry.id if entry else "",
        "name": one_line(name) or "(no name)",
        "title": entry.title if entry and entry.name else "",
        "nbytes": line.nbytes,
        "tokens": f"{line.num_tokens:,}" if line.num_tokens else "",
        "size": format_bytes(line.nbytes) if line.nbytes else "",
        "used": format_ago(line.used_at) if entry else "",
        "model": model_name(entry.model) if entry else "",
        "marks": list(_marks(line, going)),
    }


def _marks(line: Line, going: set[str]) -> Iterator[str]:
    if line.entry and line.entry.pinned:
        yield "pinned"
    if line.entry and line.entry.id in going:
        yield "evicted next"


def render(data: JSON) -> str:
    """Return the page with its data, and with hashes of all that it may run."""
    page = resources.files(__package__).joinpath("page.html").read_text()
    for tag, mark in (("style", "@STYLE_HASH@"), ("script", "@SCRIPT_HASH@")):
        (own,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        page = page.replace(mark, _hash(own))
    text = json.dumps(data)
    # Nothing in it can end the block that it stands in.
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    before, after = page.split("@DATA@")
    return f"{before}{text}{after}"


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
