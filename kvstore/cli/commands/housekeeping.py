"""The verbs that keep a store in order: prune, stats, rename, pin."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import FishComplete, ZshComplete

from ...errors import KVStoreError
from .. import options, settings
from ..completion import QuotingBash
from ..main import Verb, chosen_path, cli, open_store, output_of
from ..options import option
from ..output import (
    Column,
    Output,
    format_bytes,
    format_count,
    format_fields,
    format_table,
    format_time,
    terminal_width,
    to_rfc3339,
)
from .entries import confirm_removal, entry_data, entry_label, name_entries
from .scores import print_scores

if TYPE_CHECKING:
    from ...format.documents import JSON
    from ...ops.speeds import Speeds
    from ...ops.stats import Stats
    from ...ops.upkeep.check import Finding
    from ...ops.upkeep.prune import PrunePlan


@click.command(cls=Verb)
@option(
    "--max-size SIZE",
    type=settings.size,
    help="Evict entries, the least worth first, until this much is left: 20GB.",
)
@option(
    "--older-than SPAN",
    type=options.span,
    help="Evict entries not used for so long: 30d, 12h.",
)
@option("--named", help="Evict entries with names too, after all others.")
@option(
    "--now",
    help="Free blocks that nothing reaches even if they are younger than an hour, and"
    " empty quarantine.",
)
@option(
    "--limit SIZE",
    type=settings.some_bytes,
    help="Set the store's size limit, which saves keep to from now on.",
)
@options.yes
@option("-n", "--dry-run", help="Only say what would go.")
@click.pass_context
def prune(
    context: click.Context,
    max_size: int | None,
    older_than: float | None,
    named: bool,
    now: bool,
    limit: int | None,
    yes: bool,
    dry_run: bool,
) -> None:
    """Free what no entry reaches, and evict entries where asked to.

    Blocks that nothing reaches are kept for an hour, since a save may be under way.
    Pinned entries are never evicted.
    """
    output = output_of(context)
    store = open_store(context)
    sizes = [size for size in (max_size, limit) if size is not None]
    plan = store.plan_prune(
        max_bytes=min(sizes, default=None),
        older_than_s=older_than,
        named=named,
        now=now,
    )
    is_needed = bool(plan.entries or plan.freed_bytes or plan.leftovers)
    is_asked = is_needed and not dry_run
    question = f"prune {_describe(plan)}?"
    if is_asked:
        confirm_removal(output, question, is_answered=yes)
    if limit is not None and not dry_run:
        store.set_limit(limit)
    freed = plan.execute() if is_asked else plan.freed_bytes
    _print_pruned(output, plan, freed, dry_run)


@click.command(cls=Verb)
@option(
    "--sessions",
    help="Show what the latest 256 conversations with `serve` have cost: tokens whose"
    " rows were in memory, on disk or moved there (`--reanchor`), tokens computed,"
    " those computed again, and why. Nothing that was said is kept for it.",
)
@click.pass_context
def stats(context: click.Context, sessions: bool) -> None:
    """Show what the store holds, and what it has saved so far.

    Speeds are those of this machine, older ones fading: how fast a model reads a
    prompt, and how fast it is restored. Where restoring is the slower, a server does
    not do it; after a day it is tried again.
    """
    output = output_of(context)
    if sessions:
        print_scores(output, open_store(context))
        return
    found = open_store(context).stats()
    data = asdict(found) | {"speeds": list(map(_speeds_data, found.speeds))}
    output.result("\n".join(format_fields(stats_fields(found))), data)
    if found.nbytes > found.max_bytes < found.kept_bytes:
        output.hint("`kvstore prune --max-size SIZE --named` evicts what has a name")
    elif found.nbytes > found.reached_bytes:
        output.hint(
            "`kvstore prune` frees what no entry needs and is an hour old, `--now` all"
        )


@click.command(cls=Verb)
@options.ref
@click.argument("name", metavar="NAME", type=options.entry_name)
@click.pass_context
def rename(context: click.Context, ref: str, name: str) -> None:
    """Give an entry another name, or its first."""
    output = output_of(context)
    entry = open_store(context).rename(ref, name)
    output.result(f"`{ref}` is `{name}` now", entry_data(entry), [entry.id])


@click.command(cls=Verb)
@options.ref
@option("--off", help="Let it be evicted again.")
@click.pass_context
def pin(context: click.Context, ref: str, off: bool) -> None:
    """Keep an entry from ever being evicted."""
    output = output_of(context)
    entry = open_store(context).pin(ref, pinned=not off)
    state = "may be evicted again" if off else "is never evicted now"
    output.result(f"{entry_label(entry)} {state}", entry_data(entry), [entry.id])


def _describe(plan: PrunePlan) -> str:
    text = f"{format_bytes(plan.freed_bytes)} of {format_bytes(plan.nbytes)}"
    if plan.entries:
        text += f", with {name_entries(plan.entries)}"
    return text


def _print_pruned(
    output: Output, plan: PrunePlan, freed_bytes: int, dry_run: bool
) -> None:
    done = "would free" if dry_run else "freed"
    text = f"{done} {format_bytes(freed_bytes)} of {format_bytes(plan.nbytes)}"
    if plan.entries:
        text += (
            f"; {'would evict' if dry_run else 'evicted'} {name_entries(plan.entries)}"
        )
    data = {
        "dry_run": dry_run,
        "freed_bytes": freed_bytes,
        "nbytes": plan.nbytes,
        "entries": [entry_data(entry) for entry in plan.entries],
        "young_bytes": plan.young_bytes,
        "scattered_bytes": plan.scattered_bytes,
        "is_whole": plan.is_whole,
        "removed_shards": list(plan.removed),
        "repacked_shards": list(plan.repacked),
        "removed_bases": list(plan.bases),
    }
    output.result(text, data, [entry.id for entry in plan.entries])
    for hint in _why_bytes_stay(plan):
        output.hint(hint)


def _why_bytes_stay(plan: PrunePlan) -> Iterator[str]:
    if not plan.is_whole:
        yield (
            "an entry is damaged and nobody knows what it needs, so that only what"
            " evicted entries had is freed: `kvstore verify` names it"
        )
    elif plan.young_bytes:
        yield (
            f"{format_bytes(plan.young_bytes)} that no entry needs are younger than an"
            " hour, and stay in case a save is under way: `--now` frees them"
        )
    if plan.scattered_bytes:
        yield (
            f"{format_bytes(plan.scattered_bytes)} that no entry needs lie in files of"
            " which most is needed: `--now` rewrites these"
        )
    elif plan.is_whole and not (plan.freed_bytes or plan.young_bytes):
        yield (
            "entries need all that is left: `--max-size` and `--older-than` let"
            " entries go, `--named` those with a name too"
        )


def stats_fields(found: Stats) -> list[tuple[str, str]]:
    """Return what `stats` shows, as names and texts."""
    counters = found.counters
    hits, misses = counters.get("hits", 0), counters.get("misses", 0)
    saved = found.seconds_saved
    return [
        ("entries", f"{found.num_entries:,}"),
        ("tokens", f"{found.num_tokens:,}"),
        ("size", _describe_size(found)),
        ("shards", f"{found.num_shards:,} with {found.num_blocks:,} blocks"),
        (
            "sharing",
            f"{found.dedup_ratio:.2f}x: apart, the entries would take"
            f" {format_bytes(found.entry_bytes)}",
        ),
        (
            "compression",
            f"{found.compression_ratio:.2f}x: what entries need, against memory",
        ),
        *_aside_fields(found),
        ("hits", f"{hits:,} of {hits + misses:,} loads"),
        ("not recomputed", format_count(counters.get("restored_tokens", 0), "token")),
        ("recomputed", format_count(counters.get("missed_tokens", 0), "token")),
        ("time saved", "not measured yet" if saved is None else _duration(saved)),
        ("written", format_bytes(counters.get("written_bytes", 0))),
        ("read", format_bytes(counters.get("read_bytes", 0))),
        *_reanchored_fields(found),
        *(("speed", _describe_speeds(one)) for one in found.speeds),
    ]


def _reanchored_fields(found: Stats) -> Iterator[tuple[str, str]]:
    if found.reanchored_kl is not None:
        checks = format_count(found.counters["reanchored_checks"], "request")
        yield (
            "re-anchored",
            f"moved what is said by KL {found.reanchored_kl:.5f}, {checks}",
        )


def _describe_size(found: Stats) -> str:
    text = f"{format_bytes(found.nbytes)} of {format_bytes(found.max_bytes)}"
    unneeded = max(0, found.nbytes - found.reached_bytes)
    if unneeded:
        text += f", {format_bytes(unneeded)} of which no entry needs"
    if found.nbytes > found.max_bytes < found.kept_bytes:
        kept = format_bytes(found.kept_bytes)
        text += f"; over the limit since {kept} are of entries with names or pinned"
    return text


def _aside_fields(found: Stats) -> Iterator[tuple[str, str]]:
    """Yield what lies in quarantine and in `tmp`, which counts for the limit too."""
    for name, num, nbytes in (
        ("quarantine", found.num_quarantined, found.quarantine_bytes),
        ("unfinished", found.num_staged, found.staged_bytes),
    ):
        if num:
            yield name, f"{format_count(num, 'file')}, {format_bytes(nbytes)}"


def _speeds_data(speeds: Speeds) -> JSON:
    known = speeds.timings
    return {
        "fingerprint": known[0].fingerprint,
        "model": next((one.model for one in known if one.model), ""),
        "codec": speeds.load.codec if speeds.load else None,
        "prefill_tps": speeds.prefill_tps,
        "load_tps": speeds.load_tps,
        "verdict": speeds.verdict,
        "break_even_tokens": speeds.break_even_tokens,
        "measured_at": to_rfc3339(speeds.measured_at),
        "is_current": speeds.are_current(time.time()),
    }


def _describe_speeds(speeds: Speeds) -> str:
    data = _speeds_data(speeds)
    parts = []
    if speeds.prefill_tps is not None:
        parts.append(f"computes {_rate(speeds.prefill_tps)}")
    if speeds.load_tps is not None:
        parts.append(f"restores {_rate(speeds.load_tps)} from {data['codec']}")
    tokens = format_count(speeds.break_even_tokens or 0, "token")
    verdict = {
        "pays": f"loading pays from {tokens} on",
        "never": "loading does not pay",
        "unknown": "too little is measured yet to say when loading pays",
    }[speeds.verdict]
    if not data["is_current"]:
        verdict += f" (as of {format_time(speeds.measured_at)}: will be tried again)"
    model = data["model"] or data["fingerprint"][:12]
    return f"{model}: {', '.join(parts)}; {verdict}"


def _rate(tps: float) -> str:
    return f"{tps:,.0f} tokens/s" if tps >= 10 else f"{tps:.2f} tokens/s"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


_SHELLS = {"bash": QuotingBash, "zsh": ZshComplete, "fish": FishComplete}


@click.command(cls=Verb)
@option(
    "--read-data [PART%]",
    type=options.percentage,
    is_flag=False,
    flag_value="100%",
    default="0%",
    show_default=False,
    help="Read the shards' bytes too: all, or such a part of the shards, as in"
    " --read-data=10%.",
)
@option(
    "--repair",
    help="Read everything and put right what can be: damaged files go to quarantine,"
    " what is whole in them into new ones, and the index is built anew.",
)
@option(
    "--recompute N",
    "num_blocks",
    type=click.IntRange(min=1),
    help="Have `--model` compute the rows of N random blocks of its own anew, and"
    " compare.",
)
@options.model_options
@click.pass_context
def verify(
    context: click.Context,
    read_data: float,
    repair: bool,
    num_blocks: int | None,
    model: options.ModelOptions,
) -> None:
    """Compare entries, index and shards, and list what is wrong.

    Nothing is changed, unless `--repair` is given. Exits with 1 where anything is
    wrong, or still is after a repair. What was forged together with its digests is
    found by `--recompute` alone, which takes as long as the prompts it draws.
    """
    output = output_of(context)
    if num_blocks is not None:
        model = model.chosen(context)
    store = open_store(context)
    if repair:
        for finding in store.repair():
            output.warning(f"{finding.path}: {finding.detail}")
        read_data = 1.0
    with output.progress() as bars:
        findings = store.verify(read_data, progress=bars.bar("verify"))
        if num_blocks is not None:
            from ...models.recompute import count_quantized, recompute

            loaded = model.load()
            found = recompute(store, loaded, num_blocks, progress=bars.bar("recompute"))
            findings += [one.finding for one in found if not one.is_right]
            worst = max((one.error for one in found), default=0.0)
            output.note(
                f"{format_count(len(found), 'block')} computed anew: they differ by"
                f" {worst:.2%} at most"
            )
            states = sum(one.has_unseen_state for one in found)
            coded = count_quantized(store, loaded)
            if states or coded:
                output.note(
                    f"not compared: {format_count(states, 'state')} in the middle of"
                    f" entries, {format_count(coded, 'entry')} of quantized rows"
                )
    _print_findings(output, findings)
    if findings:
        raise KVStoreError(
            f"{format_count(len(findings), 'finding')} in {store.path}",
            hint="save the affected prompts again; all other entries can be loaded",
        )


@click.command("dir", cls=Verb)
@click.pass_context
def show_dir(context: click.Context) -> None:
    """Print the store's folder."""
    output = output_of(context)
    path = str(chosen_path(context).absolute())
    output.result(path, {"path": path}, [path])


@click.command(cls=Verb)
@click.argument(
    "shell", metavar="[bash|zsh|fish]", type=click.Choice(_SHELLS), required=False
)
def completion(shell: str | None) -> None:
    """Print the script that makes a shell complete `kvstore`.

    For the shell you use, if none is named. Try `eval "$(kvstore completion)"`.
    """
    name = shell or Path(os.environ.get("SHELL", "")).name
    if name not in _SHELLS:
        raise click.UsageError("cannot tell which shell you use; name one")
    click.echo(_SHELLS[name](cli, {}, "kvstore", "_KVSTORE_COMPLETE").source())


@click.command("help", cls=Verb)
@click.argument("verb", metavar="[VERB]", required=False)
@click.pass_context
def show_help(context: click.Context, verb: str | None) -> None:
    """Show the help of a verb, or the list of all."""
    parent = context.parent
    assert parent is not None
    command = cli.get_command(parent, verb) if verb else cli
    if command is None:
        raise click.UsageError(f"no such command `{verb}`", context)
    shown = click.Context(command, info_name=command.name, parent=parent)
    click.echo(command.get_help(shown if verb else parent))


def _print_findings(output: Output, findings: Sequence[Finding]) -> None:
    columns: list[Column[Finding]] = [
        Column("KIND", lambda finding: finding.kind),
        Column("ENTRIES", lambda finding: ", ".join(finding.entries) or "-"),
        Column("PATH", lambda finding: finding.path),
        Column("DETAIL", lambda finding: finding.detail),
    ]
    lines = format_table(findings, columns, terminal_width())
    output.result(
        "\n".join(lines) if findings else "nothing is wrong",
        {"findings": [asdict(finding) for finding in findings]},
        [finding.path for finding in findings],
    )
