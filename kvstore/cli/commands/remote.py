"""The verbs about object stores: remote, push, pull."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

import click

from .. import options
from ..main import Verb, VerbGroup, open_store, output_of
from ..options import ModelOptions, PromptOptions, option
from ..output import Column, format_bytes, format_count
from .entries import entry_data, entry_label
from .lookup import prompt_tokens

if TYPE_CHECKING:
    from ...format.documents import JSON
    from ...remote.probe import Probe
    from ...remote.push import Pushed


_remote_option = option(
    "--remote NAME", type=options.some_text, help="The remote.  [default: the only one]"
)


_trust_option = option(
    "--trust",
    help="Trust all who may write to the remote: take entries that no trusted key has"
    " signed.",
)


@click.group("remote", cls=VerbGroup, subcommand_metavar="add|ls|rm ...")
def remote() -> None:
    """Name object stores that entries are pushed to and pulled from."""


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise click.BadParameter(f"`{text}` is not NAME=VALUE")
    return name, value


@remote.command("add", cls=Verb)
@click.argument("name", metavar="NAME")
@click.argument("url", metavar="URL")
@option(
    "--endpoint URL",
    type=options.some_text,
    help="The server of a service that is compatible with S3.",
)
@option(
    "--option NAME=VALUE",
    "settings",
    type=_setting,
    multiple=True,
    help="A setting of the provider, `region=eu-central-1` say; never a credential.",
)
@_trust_option
@click.pass_context
def add(
    context: click.Context,
    name: str,
    url: str,
    endpoint: str | None,
    settings: tuple[tuple[str, str], ...],
    trust: bool,
) -> None:
    """Add an object store under a name, having tried what it can do.

    URL is s3://BUCKET/PREFIX, gs://…, az://…, file:///FOLDER or a folder's path.
    Credentials are read where the provider's own tools look for them, AWS_ACCESS_KEY_ID
    say, and never stored. A small object is left behind, v1/probe/….
    """
    output = output_of(context)
    chosen = dict(settings)
    if endpoint is not None:
        chosen["endpoint"] = endpoint
    try:
        from ...remote.remotes import make_remote

        made = make_remote(name, url, chosen, is_trusted=trust)
    except ValueError as error:
        raise click.UsageError(str(error), context) from error
    found = open_store(context, create=True).remotes.add(made)
    data: JSON = {"remote": asdict(made), "probe": asdict(found)}
    text = "\n".join([f"added remote `{name}`: {made.url}", *_describe_probe(found)])
    output.result(text, data, [name])


def _describe_probe(found: Probe) -> list[str]:
    words = {True: "yes", False: "no", None: "not tried"}
    rows = [
        f"writes:       {words[found.can_write]}",
        f"lists:        {words[found.can_list]}",
        f"reads ranges: {words[found.has_ranges]}",
        f"creates once: {words[found.creates_once]}",
    ]
    if found.creates_once is False:
        rows[-1] += "; it would overwrite, so `push` asks first what is there"
    if not found.can_list:
        rows[1] += "; `pull` and `ls` need a list"
    return rows


@remote.command("ls", cls=Verb)
@click.pass_context
def list_remotes(context: click.Context) -> None:
    """List the remotes."""
    output_of(context).table(
        open_store(context).remotes.all(),
        [
            Column("NAME", lambda one: one.name),
            Column("URL", lambda one: one.url),
            Column("TRUSTED", lambda one: "yes" if one.is_trusted else "no"),
            Column("OPTIONS", lambda one: " ".join(map("=".join, one.options.items()))),
        ],
        data=asdict,
        id_of=lambda one: one.name,
        empty="no remotes",
    )


@remote.command("rm", cls=Verb)
@click.argument("name", metavar="NAME")
@click.pass_context
def forget(context: click.Context, name: str) -> None:
    """Forget a remote; what lies in it stays."""
    output = output_of(context)
    gone = open_store(context).remotes.remove(name)
    output.result(f"forgot remote `{name}`: {gone.url}", asdict(gone), [name])


@click.command(cls=Verb)
@options.refs
@_remote_option
@click.pass_context
def push(context: click.Context, refs: tuple[str, ...], remote: str | None) -> None:
    """Put entries into a remote, signed where you have a key (`kvstore key new`).

    What is there already is not sent again, so the same command goes on after an
    interruption. An entry holds the tokens, so the text: whoever can read the remote
    can read the conversation.
    """
    output = output_of(context)
    store = open_store(context)
    # All are found before the first is sent.
    entries = [store.entry(ref) for ref in refs]
    begin = time.monotonic()
    with output.progress() as bars:
        done = [
            store.remotes.push(
                e.id, remote, progress=bars.bar(f"push {entry_label(e)}")
            )
            for e in entries
        ]
    data: JSON = {
        "pushed": [_pushed_data(one) for one in done],
        "elapsed_s": round(time.monotonic() - begin, 3),
    }
    lines = [_describe_pushed(one) for one in done]
    output.result("\n".join(lines), data, [one.key.digest for one in done])


def _describe_pushed(done: Pushed) -> str:
    return (
        f"pushed {format_count(done.entry.num_tokens, 'token')} of"
        f" {entry_label(done.entry)}: {format_bytes(done.sent_bytes)} in"
        f" {format_count(done.num_sent, 'object')}; {done.num_there} were there"
    )


@click.command(cls=Verb)
@click.argument("refs", metavar="[NAME]...", nargs=-1)
@_remote_option
@_trust_option
@partial(options.model_options, is_needed=False)
@partial(options.prompt_options, is_argument=False)
@options.request
@options.name
@options.replace
@click.pass_context
def pull(
    context: click.Context,
    refs: tuple[str, ...],
    remote: str | None,
    trust: bool,
    model: ModelOptions,
    prompt: PromptOptions,
    request: BinaryIO | None,
    name: str | None,
    replace: bool,
) -> None:
    """Take entries of a remote into the store, checked to the last byte.

    NAME is an entry's name, the start of its id in `ls --remote`, or its whole key that
    `push --json` prints, which needs no list. With `--model`, and `--prompt` or
    `--request`, what the remote has of that prompt is taken. Only what the store lacks
    is read, and the same command goes on after an interruption. Whoever wrote an entry
    decided what the model has read: it must be signed by a key that you trust (`kvstore
    key`), unless `--trust` was given, here or to `remote add`.
    """
    output = output_of(context)
    asked = next(
        (o for o, v in (("prompt", prompt.prompt), ("request", request)) if v), None
    )
    _check_wanted(context, refs, model, asked, name)
    store = open_store(context)
    begin = time.monotonic()
    client = store.remotes.client(remote, is_trusted=trust)
    source = options.read_source(prompt, request) if asked else None
    like, fingerprint = model.made_by()
    wanted: dict[str, str | list[int]] = {f"pull `{ref}`": ref for ref in refs}
    if source is not None:
        wanted["pull"] = prompt_tokens(model, prompt, source)[0]
    with output.progress() as bars:
        entries = [
            store.remotes.pull(
                one,
                client,
                fingerprint=fingerprint,
                like=like,
                name=name,
                replace=replace,
                progress=bars.bar(what),
            )
            for what, one in wanted.items()
        ]
    data: JSON = {
        "entries": [entry_data(entry) for entry in entries],
        "elapsed_s": round(time.monotonic() - begin, 3),
    }
    lines = [
        f"pulled {format_count(entry.num_tokens, 'token')} as {entry_label(entry)}:"
        f" {format_bytes(entry.nbytes)}, made by {entry.model}"
        for entry in entries
    ]
    output.result("\n".join(lines), data, [entry.id for entry in entries])


def _check_wanted(
    context: click.Context,
    refs: Sequence[str],
    model: ModelOptions,
    asked: str | None,
    name: str | None,
) -> None:
    """Refuse what does not say which entries are meant."""
    if bool(refs) == (asked is not None):
        words = "give names, or `--model` and `--prompt` or `--request`"
        raise click.UsageError(words, context)
    if asked is not None and model.model is None:
        raise click.UsageError(f"`--{asked}` needs `--model`", context)
    if model.adapter_path is not None and model.model is None:
        raise click.UsageError("`--adapter-path` needs `--model`", context)
    if name is not None and len(refs) > 1:
        raise click.UsageError("`--name` is for one entry", context)


def _pushed_data(done: Pushed) -> JSON:
    return {
        "entry": entry_data(done.entry),
        "id": done.key.digest,
        "key": done.key.path,
        "sent_objects": done.num_sent,
        "sent_bytes": done.sent_bytes,
        "there_objects": done.num_there,
    }
