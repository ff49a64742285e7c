"""The verb ls: entries of a store, as a list or a tree, or those of a remote."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ...errors import StoreLockedError
from ...format.documents import JSON
from ...format.entry import Entry
from ...storage.keys import known_keys
from ..main import Verb, open_store, output_of
from ..options import option
from ..output import (
    Column,
    Output,
    format_ago,
    format_bytes,
    format_codec,
    format_count,
    to_rfc3339,
)
from .entries import entry_data

if TYPE_CHECKING:
    from ...ops.tree import Branch, Leaf
    from ...remote.layout import EntryKey, RemoteEntry
    from ...store import Store

log = logging.getLogger("kvstore")
# As many digits of an id as tell a thousand entries apart.
_SHORT = 8
_MAX_INDENT = 8


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a list or a tree: an entry, or what several share."""

    num_tokens: int
    # Of an entry all of its blocks; in a tree those that are not told higher up.
    nbytes: int
    entry: Entry | None = None
    # Unix seconds; 0 where there is no entry.
    used_at: float = 0.0
    # What is shown where there is no entry.
    label: str = ""
    depth: int = 0

    @property
    def name(self) -> str:
        """What the entry is called; one without a name by its title."""
        indent = f"└{'─' * min(self.depth, _MAX_INDENT)} " if self.depth else ""
        if self.entry is None:
            return indent + self.label
        title = f'"{self.entry.title}"' if self.entry.title else "-"
        return indent + (self.entry.name or title)


_ORDERS: dict[str, Any] = {
    "saved": lambda line: -line.entry.updated_at,
    "used": lambda line: -line.used_at,
    "size": lambda line: -line.nbytes,
    "tokens": lambda line: -line.num_tokens,
    # Those without one at the end.
    "name": lambda line: (line.entry.name is None, line.entry.name or ""),
}


@click.command("ls", cls=Verb)
@option("--model TEXT", help="Only entries whose MODEL has this in it.")
@option("--named", help="Only entries with a name.")
@option(
    "--sort",
    "order",
    type=click.Choice(list(_ORDERS)),
    default="saved",
    help="What comes first: the latest, the largest, or the alphabet.",
)
@option(
    "--tree", help="Show which entries begin alike; each block's size is counted once."
)
@option(
    "--remote [NAME]",
    is_flag=False,
    flag_value="",
    help="The entries of a remote; without its name, of the only one.",
)
@click.pass_context
def list_entries(
    context: click.Context,
    model: str | None,
    named: bool,
    order: str,
    tree: bool,
    remote: str | None,
) -> None:
    """List the entries, latest first.

    SIZE counts blocks that entries share with each of them. USED is when an entry was
    saved or last loaded; what is used seldom is evicted first. An entry
    without a name is listed by its first words. Where the terminal is narrow, columns
    are left out.
    """
    output = output_of(context)
    store = open_store(context)

    def is_wanted(entry: Entry) -> bool:
        return (model or "") in entry.model and not (named and entry.name is None)

    if remote is not None:
        found = store.remotes.entries(remote or None)
        _print_remote(output, [one for one in found.items() if is_wanted(one[1].entry)])
        return
    entries = list(filter(is_wanted, store.entries()))
    if tree:
        lines = list(tree_lines(store, entries))
    else:
        lines = _list_lines(store, entries)
        lines.sort(key=_ORDERS[order])
    _print_lines(output, lines, len(entries), is_tree=tree)


def list_named(output: Output, store: Store, model: str) -> None:
    """List a model's entries that have a name, those used last first."""
    named = [e for e in store.entries() if e.name is not None and e.model == model]
    lines = sorted(_list_lines(store, named), key=_ORDERS["used"])
    _print_lines(output, lines, len(named))


def _print_lines(
    output: Output, lines: Sequence[Line], num_entries: int, *, is_tree: bool = False
) -> None:
    output.table(
        lines,
        _columns(lines, num_entries),
        data=_line_data if is_tree else _entry_data,
        id_of=lambda line: line.entry.id if line.entry else "",
        empty="no entries",
    )


def _list_lines(store: Store, entries: Sequence[Entry]) -> list[Line]:
    from ...ops import tree

    try:
        used_at = store.run(partial(tree.last_uses, entries=entries))
    except (StoreLockedError, OSError) as error:
        log.info("nobody knows when entries were last loaded: %s", error)
        used_at = {entry.id: entry.updated_at for entry in entries}
    return [Line(e.num_tokens, e.nbytes, e, used_at[e.id]) for e in entries]


def tree_lines(store: Store, entries: Sequence[Entry]) -> Iterator[Line]:
    """Yield a line for each entry, and one for what several entries share."""
    from ...ops.tree import grow_tree

    for root in store.run(partial(grow_tree, entries=entries)):
        model = model_name(_first_entry(root).model)
        label = f"{model}: {format_count(root.num_entries, 'entry')}"
        yield Line(0, 0, label=label)
        waiting = _below(root, 1)
        while waiting:
            item, depth = waiting.pop()
            if isinstance(item, tuple):
                entry, nbytes, used_at = item
                yield Line(entry.num_tokens, nbytes, entry, used_at, depth=depth)
                continue
            below = _below(item, depth + 1)
            if len(item.entries) == 1:
                # What goes on from an entry is shown below it.
                entry, nbytes, used_at = item.entries[0]
                below[-1] = (entry, item.nbytes + nbytes, used_at), depth
            else:
                label = f"shared by {item.num_entries:,}"
                yield Line(item.num_tokens, item.nbytes, label=label, depth=depth)
            waiting += below


def _below(branch: Branch, depth: int) -> list[tuple[Branch | Leaf, int]]:
    found: list[Branch | Leaf] = [*branch.branches[::-1]]
    found += branch.entries[::-1]
    return [(one, depth) for one in found]


def _first_entry(branch: Branch) -> Entry:
    while not branch.entries:
        branch = branch.branches[0]
    return branch.entries[0][0]


def model_name(model: str) -> str:
    """Return the last part of a model's path or repository."""
    return model.rstrip("/").rpartition("/")[2] or "-"


def _columns(lines: Sequence[Line], num_entries: int) -> list[Column[Line]]:
    held = [line.entry for line in lines if line.entry]
    num_tokens = sum(entry.num_tokens for entry in held)
    nbytes = sum(line.nbytes for line in lines)

    def of(get: Callable[[Entry], str]) -> Callable[[Line], str]:
        return lambda line: get(line.entry) if line.entry else ""

    def tokens(line: Line) -> str:
        return f"{line.num_tokens:,}" if line.num_tokens else ""

    def size(line: Line) -> str:
        return format_bytes(line.nbytes) if line.nbytes else ""

    is_any_pinned = any(entry.pinned for entry in held)
    losses = [Column("KL", of(_measured_kl), True, rank=3)]
    pins = [Column("PIN", of(lambda e: "yes" if e.pinned else ""))]
    is_any_signed = any(entry.signer for entry in held)
    names = known_keys() if is_any_signed else {}

    def signer(entry: Entry) -> str:
        return names.get(entry.signer, entry.signer[:_SHORT])

    signers = [Column("SIGNER", of(signer), rank=2)]
    return [
        Column(
            "NAME", lambda line: line.name, total=format_count(num_entries, "entry")
        ),
        Column("ID", of(lambda e: e.id[:_SHORT])),
        Column("TOKENS", tokens, True, f"{num_tokens:,}"),
        Column("SIZE", size, True, format_bytes(nbytes)),
        Column(
            "USED", lambda line: format_ago(line.used_at) if line.entry else "", True
        ),
        *(pins if is_any_pinned else []),
        Column("MODEL", of(lambda e: model_name(e.model)), rank=1),
        Column("SAVED", of(lambda e: format_ago(e.updated_at)), True, rank=2),
        Column("CODEC", of(lambda e: format_codec(e.codec)), rank=3),
        *(losses if any(entry.receipts for entry in held) else []),
        *(signers if is_any_signed else []),
        Column("TITLE", of(lambda e: e.title if e.name else ""), rank=4),
    ]


def _measured_kl(entry: Entry) -> str:
    return f"{max(one.kl for one in entry.receipts):.2g}" if entry.receipts else ""


def _entry_data(line: Line) -> JSON:
    assert line.entry is not None
    return entry_data(line.entry) | {"used_at": to_rfc3339(line.used_at)}


def _line_data(line: Line) -> JSON:
    return {
        "depth": line.depth,
        "num_tokens": line.num_tokens,
        "nbytes": line.nbytes,
        "entry": _entry_data(line) if line.entry else None,
    }


def _print_remote(
    output: Output, found: Sequence[tuple[EntryKey, RemoteEntry]]
) -> None:
    known = known_keys()

    def of(get: Callable[[Entry], str]) -> Callable[[Any], str]:
        return lambda one: get(one[1].entry)

    def signed_by(one: Any) -> str:
        signature = one[1].signature
        return known.get(signature.key, "unknown key") if signature else "-"

    columns: list[Column[Any]] = [
        Column("NAME", of(lambda e: e.name or "-")),
        Column("ID", lambda one: one[0].digest[:_SHORT]),
        Column("TOKENS", of(lambda e: f"{e.num_tokens:,}"), True),
        Column("SIZE", of(lambda e: format_bytes(e.nbytes)), True),
        Column("SAVED", of(lambda e: format_ago(e.updated_at)), True),
        Column("MODEL", of(lambda e: model_name(e.model)), rank=1),
        Column("SIGNED", signed_by, rank=1),
        Column("CODEC", of(lambda e: format_codec(e.codec)), rank=2),
    ]
    output.table(
        found,
        columns,
        data=lambda one: _remote_data(*one),
        id_of=lambda one: one[0].digest,
        empty="no entries",
    )


def _remote_data(key: EntryKey, remote: RemoteEntry) -> JSON:
    return {
        "id": key.digest,
        "fingerprint": key.fingerprint,
        "signer": remote.signature.key if remote.signature else "",
        "entry": entry_data(remote.entry),
        "shards": [asdict(shard) for shard in remote.shards],
    }
