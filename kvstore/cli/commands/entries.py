"""The verbs about entries: load, inspect, rm, adopt, recompress."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...errors import KVStoreError
from ...format.chain import is_reanchored
from ...format.documents import JSON
from ...format.entry import Entry
from ...storage.keys import known_keys
from .. import options
from ..completion import complete_entries
from ..main import Verb, open_store, output_of
from ..options import option
from ..output import (
    Column,
    Output,
    format_ago,
    format_bytes,
    format_codec,
    format_count,
    format_fields,
    format_table,
    terminal_width,
    to_rfc3339,
)

if TYPE_CHECKING:
    from ...fingerprint import Fingerprint
    from ...format.block import StoredBlock
    from ...format.probe import Probe
    from ...ops.quality import Errors, Loss
    from ...ops.upkeep.purge import Traces
    from ...storage.index import Place

    Blocks = Sequence[tuple[Place, StoredBlock]]
_SHORT = 12


@click.command(cls=Verb)
@click.argument("ref", metavar="NAME", shell_complete=complete_entries)
@options.output_file
@options.overwrite
@option(
    "--model MODEL",
    type=options.some_text,
    help="Folder of the model, or its Hugging Face repository, to check that it made"
    " the entry.  [default: believe what is stored]",
)
@option("--adapter-path DIR", help="Folder of an adapter's weights.")
@options.exact_only
@options.min_bits
@option(
    "--max-kl KL",
    type=click.FloatRange(min=0),
    help="Refuse rows that were measured to move what the model says by more, or were"
    " not measured: their codec by `calibrate`, the entry by `save --measure`: 0.003.",
)
@click.pass_context
def load(
    context: click.Context,
    ref: str,
    path: Path | None,
    overwrite: bool,
    model: str | None,
    adapter_path: str | None,
    exact: bool,
    min_bits: int,
    max_kl: float | None,
) -> None:
    """Restore an entry, and write it as mlx-lm's own file.

    The file is what `mlx_lm.generate --prompt-cache-file` reads. Without `-o` the entry
    is restored and dropped again: a check that it can be.
    """
    output = output_of(context)
    if adapter_path is not None and model is None:
        raise click.UsageError("`--adapter-path` needs `--model`")
    store = open_store(context)
    entry = store.entry(ref)
    if path is not None:
        from ...caches.mlx_files import check_cache_path, write_prompt_cache

        check_cache_path(path, overwrite=overwrite)
    begin = time.monotonic()
    with output.progress() as bars:
        prompt_cache, _ = store.load_entry(
            entry.id,
            _fingerprint(model, adapter_path),
            exact=exact,
            min_bits=min_bits,
            max_kl=max_kl,
            progress=bars.bar("restore"),
        )
    seconds = time.monotonic() - begin
    data: JSON = {
        "entry": entry_data(entry),
        "nbytes": sum(cache.nbytes for cache in prompt_cache),
        "elapsed_s": round(seconds, 3),
    }
    if path is not None:
        label = model or entry.model
        size = write_prompt_cache(path, prompt_cache, label, overwrite=overwrite)
        data |= {"file": str(path), "file_bytes": size}
    output.result(_describe_load(entry, data), data, [str(path) if path else entry.id])


@click.command("inspect", cls=Verb)
@options.ref
@click.pass_context
def inspect_entry(context: click.Context, ref: str) -> None:
    """Show an entry: what made it, its blocks, and where they lie.

    REF is a name, an id, or the start of an id.
    """
    from ...ops.quality import join_errors

    output = output_of(context)
    store = open_store(context)
    entry = store.entry(ref)
    fingerprint = store.fingerprint_of(entry.id)
    chain = store.chain(entry.id)
    loss = store.loss(entry.id)
    errors = join_errors(stored for _, stored in chain)
    data = {
        "entry": entry_data(entry),
        "loss": {"kl": loss.kl, "unknown": loss.unknown or None},
        "errors": asdict(errors) | {"layers": [e._asdict() for e in errors.layers]},
        "fingerprint": {"digest": fingerprint.digest, **fingerprint.fields},
        "blocks": [_block_data(place, stored) for place, stored in chain],
    }
    fields = _entry_fields(entry, fingerprint, chain, loss, errors)
    lines = format_fields(fields)
    table = format_table(_by_shard(chain), _shard_columns(chain), terminal_width())
    output.result("\n".join([*lines, "", *table]), data, [entry.id])


@click.command("rm", cls=Verb)
@click.argument("refs", metavar="REF...", nargs=-1, shell_complete=complete_entries)
@option(
    "--purge", help="Leave no byte of what was removed, now or before, in the store."
)
@options.yes
@option("-n", "--dry-run", help="Only say what would be removed.")
@click.pass_context
def remove(
    context: click.Context, refs: tuple[str, ...], purge: bool, yes: bool, dry_run: bool
) -> None:
    """Remove entries.

    REF is a name, an id, or the start of an id. The blocks stay in the store: other
    entries may share them, and the same prompt finds them again. With --purge they go
    at once, unless another entry needs them, and quarantine/ and tmp/ are emptied; then
    every file of the store is searched for what was removed. REF may be left out.
    """
    if not (refs or purge):
        raise click.MissingParameter(None, context, context.command.params[0])
    output = output_of(context)
    store = open_store(context)
    # All are found before the first is removed.
    entries = list({(entry := store.entry(ref)).id: entry for ref in refs}.values())
    if not dry_run:
        wanted = _describe(entries) if entries else "what no entry needs"
        question = f"remove {wanted}{' for good' if purge else ''}?"
        confirm_removal(output, question, is_answered=yes)
        traces: Traces = {}
        for entry in entries if purge else ():
            traces |= store.traces_of(entry.id)
        entries = [store.remove(entry.id) for entry in entries]
        for basis in store.purge(traces) if purge else ():
            output.warning(
                f"basis {basis[:12]} stays: it was fitted to stored rows, which may"
                " have been among these"
            )
    _print_removed(output, entries, dry_run, purge=purge)


@click.command(cls=Verb)
@options.refs
@options.model_options
@options.yes
@option("-n", "--dry-run", help="Only say what differs.")
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


@click.command(cls=Verb)
@options.ref
@options.codec
@options.yes
@click.pass_context
def recompress(context: click.Context, ref: str, codec: str | None, yes: bool) -> None:
    """Store an entry's exact blocks with another codec.

    They can be loaded at every moment, and are not exact afterwards, in no entry that
    shares them; what a pinned or signed entry has too stays. So does a block that
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


def confirm_removal(output: Output, question: str, *, is_answered: bool) -> None:
    """Ask before something is removed.

    Raises:
        KVStoreError: The answer is no.
        click.Abort: Ctrl-C, or Ctrl-D, instead of an answer.
    """
    try:
        if not output.confirm(question, is_answered=is_answered):
            raise KVStoreError("nothing was removed", hint="`-y` confirms")
    except click.Abort as error:
        click.echo(err=True)
        error.hint = "nothing was removed"  # type: ignore[attr-defined]
        raise


def entry_data(entry: Entry) -> JSON:
    """Return an entry as a JSON value, with times that programs read."""
    return asdict(entry) | {
        "created_at": to_rfc3339(entry.created_at),
        "updated_at": to_rfc3339(entry.updated_at),
    }


def entry_label(entry: Entry) -> str:
    """Return what to call an entry in a sentence."""
    return f"`{entry.name or entry.id[:_SHORT]}`"


def _describe_load(entry: Entry, data: JSON) -> str:
    text = (
        f"restored {format_count(entry.num_tokens, 'token')} of {entry_label(entry)}"
        f" in {data['elapsed_s']:.2f} s: {format_bytes(data['nbytes'])} from"
        f" {format_bytes(entry.nbytes)}"
    )
    if "file" in data:
        text += f"; wrote {format_bytes(data['file_bytes'])}: {data['file']}"
    return text


def _fingerprint(model: str | None, adapter_path: str | None) -> Fingerprint | None:
    if model is None:
        return None
    from ...models.load import fingerprint_model

    return fingerprint_model(model, adapter_path)


def name_entries(entries: Sequence[Entry]) -> str:
    """Return how many entries there are, and what the first are called."""
    names = ", ".join(entry_label(entry) for entry in entries[:3])
    more = f" and {len(entries) - 3:,} more" if len(entries) > 3 else ""
    return f"{format_count(len(entries), 'entry')}: {names}{more}"


def _describe(entries: Sequence[Entry]) -> str:
    tokens = format_count(sum(entry.num_tokens for entry in entries), "token")
    nbytes = format_bytes(sum(entry.nbytes for entry in entries))
    return f"{name_entries(entries)}: {tokens}, {nbytes} of blocks"


def _print_removed(
    output: Output, entries: Sequence[Entry], dry_run: bool, *, purge: bool
) -> None:
    done = "would remove" if dry_run else "removed"
    what = _describe(entries) if entries else "nothing"
    output.result(
        f"{done} {what}{', for good' if purge else ''}",
        {"dry_run": dry_run, "entries": [entry_data(entry) for entry in entries]},
        [entry.id for entry in entries],
    )
    if entries and not purge:
        output.hint("`kvstore prune` frees the blocks, `kvstore rm --purge` for good")


def _entry_fields(
    entry: Entry,
    fingerprint: Fingerprint,
    chain: Blocks,
    loss: Loss,
    errors: Errors,
) -> list[tuple[str, str]]:
    codecs = Counter(stored.codec for _, stored in chain)
    config = fingerprint.fields.get("config")
    is_exact = all(place.is_exact for place, _ in chain)
    is_exact = is_exact and not is_reanchored(fingerprint.fields)
    return [
        ("name", entry.name or "-"),
        ("title", entry.title or "-"),
        ("id", entry.id),
        ("tokens", f"{entry.num_tokens:,}"),
        ("size", format_bytes(entry.nbytes)),
        *(
            ("stored", f"{format_count(n, 'block')} as {codec_label(codec)}")
            for codec, n in codecs.items()
        ),
        (
            "exact",
            "yes: to the bit what the model computed"
            if is_exact
            else "no: near to what the model computed; a reply may differ in words",
        ),
        ("quality", loss_words(loss)),
        *([("measured", probe_words(loss.probe))] if loss.probe else []),
        *([("errors", error_words(errors))] if errors.layers else []),
        ("pinned", "yes: it is never evicted" if entry.pinned else "no"),
        ("model", entry.model),
        ("type", str(config.get("model_type")) if isinstance(config, dict) else "-"),
        ("adapter", str(fingerprint.fields.get("adapter") or "none")),
        ("weights", str(fingerprint.fields.get("weights"))),
        ("fingerprint", fingerprint.digest),
        ("created", f"{format_ago(entry.created_at)}, {to_rfc3339(entry.created_at)}"),
        ("saved", f"{format_ago(entry.updated_at)}, {to_rfc3339(entry.updated_at)}"),
        *([("signature", signer_words(entry))] if entry.signer else []),
        ("made with", ", ".join(f"{k} {v}" for k, v in entry.made_with.items())),
    ]


def signer_words(entry: Entry) -> str:
    """Return who signed an entry where it came from."""
    if not entry.signer:
        return "not signed"
    name = known_keys().get(entry.signer)
    return f"signed by {name or 'an unknown key'}, {entry.signer}"


def loss_words(loss: Loss) -> str:
    """Return what is known of how far an entry is from what its model computed."""
    if loss.unknown:
        return f"not known: {loss.unknown}"
    if loss.worst is None:
        return "nothing is lost"
    one = loss.worst
    source = ", as whoever saved it says" if loss.is_told else ""
    return (
        f"KL {one.kl:.2g}, the first choice the same in {one.same_choice:.1%}, measured"
        f" on other texts with {format_codec(one.codec)}{source}"
    )


def probe_words(probe: Probe) -> str:
    """Return what was measured of an entry itself."""
    return (
        f"KL {probe.kl:.2g}, the first choice the same in {probe.same_choice:.1%} of"
        f" {format_count(probe.num_tokens, 'token')} that the model said behind it"
    )


def error_words(errors: Errors) -> str:
    """Return how far stored rows are from those that were given, and where farthest."""
    sides = []
    for name, side in (("keys", "k"), ("values", "v")):
        if found := [one for one in errors.layers if one.side == side]:
            mean = sum(one.error for one in found) / len(found)
            worst = max(found, key=lambda one: one.error)
            most = f"at most {worst.error:.1%}, in layer {worst.layer}"
            sides.append(f"{name} {mean:.1%} of their size ({most})")
    blocks = format_count(errors.num_lossy, "lossy block")
    return f"{', '.join(sides)}; measured in {errors.num_measured:,} of {blocks}"


def codec_label(codec: str) -> str:
    """Return a codec's name, and what it means."""
    return f"{format_codec(codec)}: {codec_words(codec)}"


def codec_words(codec: str) -> str:
    """Return what a codec's name means."""
    rows, _, packed = codec.partition("+")
    words = f"`{rows}`, a codec from elsewhere"
    if rows == "raw":
        words = "all bits, as they are in memory"
    elif rows == "planes":
        words = "all bits, those of like weight together"
    elif match := re.fullmatch(r"turbo(\d)(?:v(\d))?", rows):
        keys, values = match[1], match[2] or match[1]
        words = f"codes of {keys} bits a number"
        if values != keys:
            words = f"codes of {keys} bits a number for keys, of {values} for values"
    elif match := re.fullmatch(r"fit([\d.]+)@([0-9a-f]{64})", rows):
        words = f"about {match[1]} bits a number, in the basis {match[2][:_SHORT]}"
    return f"{words}; then {packed}" if packed else words


def _block_data(place: Place, stored: StoredBlock) -> JSON:
    return {
        "hash": place.hash.hex(),
        "start": stored.block.start,
        "num_tokens": place.num_tokens,
        "nbytes": place.nbytes,
        "codec": stored.codec,
        "is_lossless": stored.is_lossless,
        "is_exact": stored.is_exact,
        "digest": stored.digest,
        "shard": place.shard,
    }


def _by_shard(chain: Blocks) -> list[Blocks]:
    held: dict[str, list[tuple[Place, StoredBlock]]] = {}
    for place, stored in chain:
        held.setdefault(place.shard, []).append((place, stored))
    return list(held.values())


def _num_tokens(blocks: Blocks) -> str:
    return f"{sum(place.num_tokens for place, _ in blocks):,}"


def _size(blocks: Blocks) -> str:
    return format_bytes(sum(place.nbytes for place, _ in blocks))


def _codecs(blocks: Blocks) -> str:
    return ", ".join(dict.fromkeys(format_codec(b.codec) for _, b in blocks))


def _shard_columns(chain: Blocks) -> list[Column[Blocks]]:
    shards = format_count(len(_by_shard(chain)), "shard")
    return [
        Column("SHARD", lambda held: held[0][0].shard[:_SHORT], total=shards),
        Column("START", lambda held: f"{held[0][1].block.start:,}", True),
        Column("BLOCKS", lambda held: f"{len(held):,}", True, f"{len(chain):,}"),
        Column("TOKENS", _num_tokens, True, _num_tokens(chain)),
        Column("SIZE", _size, True, _size(chain)),
        Column("CODECS", _codecs),
    ]
