"""The verbs about the store as a whole: verify, dir, completion."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from ..errors import KVStoreError
from ..output import Column, Output, format_count, format_table, terminal_width
from ..types import Finding
from .options import Percentage
from .root import Verb, cli, open_store, output_of

_SHELLS = ("bash", "zsh", "fish")


@click.command(cls=Verb)
@click.option(
    "--read-data",
    metavar="[PART%]",
    type=Percentage(),
    is_flag=False,
    flag_value=1.0,
    default=0.0,
    help="Read the shards' bytes too: all, or such a part of the shards, as in"
    " --read-data=10%.",
)
@click.option(
    "--repair",
    is_flag=True,
    help="Read everything and put right what can be: damaged files go to quarantine,"
    " what is whole in them into new ones, and the index is built anew.",
)
@click.pass_context
def verify(context: click.Context, read_data: float, repair: bool) -> None:
    """Compare entries, index and shards, and list what is wrong.

    Nothing is changed, unless `--repair` is given. Exits with 1 where anything is
    wrong, or still is after a repair.
    """
    output = output_of(context)
    store = open_store(context)
    if repair:
        for finding in store.repair():
            output.warning(f"{finding.path}: {finding.detail}")
        read_data = 1.0
    with output.progress() as bars:
        findings = store.verify(read_data, progress=bars.bar("verify"))
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
    path = str(open_store(context).path.absolute())
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
    found = get_completion_class(name) if name in _SHELLS else None
    if found is None:
        raise click.UsageError("cannot tell which shell you use; name one")
    click.echo(found(cli, {}, "kvstore", "_KVSTORE_COMPLETE").source())


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
