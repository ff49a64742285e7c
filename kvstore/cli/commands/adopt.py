"""The verb that takes entries over for another model: adopt."""

from __future__ import annotations

import click

from ...errors import KVStoreError
from .. import options
from ..main import Verb, load_fast_blas, open_store, output_of
from ..output import format_count
from .entries import entry_data, entry_label


@click.command(cls=Verb)
@options.refs
@options.model_options
@options.yes
@options.option("-n", "--dry-run", is_flag=True, help="Only say what differs.")
@click.pass_context
def adopt(
    context: click.Context,
    refs: tuple[str, ...],
    model: options.ModelOptions,
    yes: bool,
    dry_run: bool,
) -> None:
    """Take entries over for another model, for which you vouch.

    For a model that computes the very same rows and counts as another one, as after a
    changed configuration. Nothing checks that: rows of another model make it talk
    nonsense. Each entry leaves the model that made it; `inspect` says where it is from.
    """
    model = model.chosen(context)
    load_fast_blas()
    output = output_of(context)
    store = open_store(context)
    # All are found before the first is taken.
    entries = list({(entry := store.entry(ref)).id: entry for ref in refs}.values())
    given = model.fingerprint()
    for entry in entries:
        difference = store.fingerprint_of(entry.id).difference(given)
        output.note(f"{entry_label(entry)}: {difference or 'of this model already'}")
    what = format_count(len(entries), "entry")
    question = f"take over {what} for `{model.model}`?"
    if dry_run:
        return
    if not output.confirm(question, is_answered=yes):
        raise KVStoreError("nothing was taken over", hint="`-y` confirms")
    adopted = [store.adopt(entry.id, given) for entry in entries]
    output.result(
        f"took over {what} for `{model.model}`",
        {"entries": [entry_data(entry) for entry in adopted]},
        [entry.id for entry in adopted],
    )
