"""The verb that takes over what others have written: import."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ...errors import KVStoreError
from ...storage import files
from ...storage.keys import check_signer, signing_key
from .. import options
from ..completion import complete_entries
from ..main import Verb, open_store, output_of
from ..options import ModelOptions, PromptOptions, encode_source, option
from ..output import Output, format_bytes, format_codec, format_count, one_line
from .entries import entry_data, entry_label, signer_words

if TYPE_CHECKING:
    from ...fingerprint import Fingerprint
    from ...format.documents import JSON
    from ...format.entry import Entry

# What a bundle knows itself.
_OF_CACHE_FILES = (
    "prompt",
    "system_prompt",
    "chat_template_config",
    "ignore_chat_template",
    "codec",
    "quality",
)


@click.command("import", cls=Verb)
@click.argument(
    "path",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
)
@partial(options.model_options, is_needed=False)
@option(
    "--draft-model MODEL", help="The draft model, where a bundle was made with one."
)
@partial(options.prompt_options, is_argument=False)
@options.name
@options.codec
@options.replace
@option(
    "--from NAME",
    "signer",
    help="Only if this signer signed it: a name that `kvstore key trust` gave.",
)
@click.pass_context
def import_file(
    context: click.Context,
    path: Path,
    model: ModelOptions,
    draft_model: str | None,
    prompt: PromptOptions,
    name: str | None,
    codec: str | None,
    replace: bool,
    signer: str | None,
) -> None:
    """Keep a bundle, or a prompt cache that `mlx_lm.cache_prompt` has written.

    A bundle is what `kvstore export` writes; `-` reads one from stdin. It is checked to
    the last byte before anything of it is kept. Whoever made it decided what the model
    has read: import one only from whom you would take a model from. With `--model` it
    is refused if another model made it, or if its rows are not such as that computes,
    and with `--from` if somebody else signed it, or nobody did.

    A cache file does not hold the prompt, so give it as it was given then, and the
    model. Files of all releases of mlx-lm are read; one that does not fit the model is
    refused, and so is one that holds another number of tokens than the prompt has.
    """
    output = output_of(context)
    if str(path) == "-" and sys.stdin.isatty():
        raise click.UsageError(
            "a bundle does not come from a terminal: redirect it, or give a file",
            context,
        )
    if _is_bundle(path):
        _refuse_given(context, _OF_CACHE_FILES, "a bundle")
        if model.model is None and (model.adapter_path or draft_model):
            raise click.UsageError(
                "`--adapter-path` and `--draft-model` need `--model`", context
            )
        like, fingerprint = model.made_by(draft_model)
        _import_bundle(
            context,
            output,
            path,
            (fingerprint, signer),
            like,
            name=name,
            replace=replace,
        )
        return
    _refuse_given(context, ("draft_model", "signer"), "a cache file")
    if model.model is None or prompt.prompt is None:
        raise click.UsageError(
            f"`{path}` is no bundle, and a cache file of mlx-lm's needs `--model` and"
            " `--prompt`",
            context,
        )
    _import_cache_file(
        context, output, path, model, prompt, name=name, codec=codec, replace=replace
    )


def _is_bundle(path: Path) -> bool:
    """Say by its content whether a file is a bundle; nothing else comes by a pipe."""
    from ...format.bundle import is_bundle

    if str(path) == "-" or not path.is_file():
        return True
    with path.open("rb") as file:
        return is_bundle(file.read(512))


def _refuse_given(context: click.Context, names: tuple[str, ...], what: str) -> None:
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"`{option}` is not for {what}", context)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    with path.open("rb") as file:
        yield file


def _import_bundle(
    context: click.Context,
    output: Output,
    path: Path,
    wanted: tuple[Fingerprint | None, str | None],
    like: list[Any] | None,
    *,
    name: str | None,
    replace: bool,
) -> None:
    from ...ops.transfer.import_bundle import open_bundle

    begin = time.monotonic()
    with _opened(path) as file:
        # First, so that what is no bundle, or another model's, leaves no empty store.
        bundle = open_bundle(file, *wanted)
        store = open_store(context, create=True)
        with output.progress() as bars:
            entry = store.import_bundle(
                bundle,
                like=like,
                name=name,
                replace=replace,
                progress=bars.bar("import"),
            )
    digest = store.fingerprint_of(entry.id).digest
    data: JSON = {
        "entry": entry_data(entry),
        "fingerprint": digest,
        "elapsed_s": round(time.monotonic() - begin, 3),
    }
    maker = one_line(entry.model) or "a model without a name"
    origin = f"made by {maker}, fingerprint {digest[:12]}, {signer_words(entry)}"
    output.result(_describe_imported(entry, origin), data, [entry.id])


def _import_cache_file(
    context: click.Context,
    output: Output,
    path: Path,
    model: ModelOptions,
    prompt: PromptOptions,
    *,
    name: str | None,
    codec: str | None,
    replace: bool,
) -> None:
    text = prompt.read()
    from ...models.load import load_model, read_cache_file

    loaded, tokenizer, fingerprint = load_model(
        model.model,
        model.adapter_path,
        trust_remote_code=model.trust_remote_code,
        lazy=True,  # only its layers are looked at
    )
    tokens = encode_source(tokenizer, text, prompt, is_open=True)
    begin = time.monotonic()
    prompt_cache, layouts = read_cache_file(path, tokens, loaded, model.model)
    # A file that is refused leaves no empty store behind.
    store = open_store(context, create=True, codec=options.codec_of(codec, 0))
    check_signer("", is_signed_only=store.config.is_signed_only)
    with output.progress() as bars:
        entry = store.save(
            tokens,
            prompt_cache,
            fingerprint,
            name=name,
            replace=replace,
            progress=bars.bar("save"),
        )
    data: JSON = {
        "entry": entry_data(entry),
        "layouts": list(layouts),
        "elapsed_s": round(time.monotonic() - begin, 3),
    }
    origin = f"mlx-lm {', '.join(layouts)}"
    output.result(_describe_imported(entry, origin), data, [entry.id])


def _describe_imported(entry: Entry, origin: str) -> str:
    return (
        f"imported {format_count(entry.num_tokens, 'token')} as {entry_label(entry)}:"
        f" {origin}; {format_bytes(entry.nbytes)}, {format_codec(entry.codec)}"
    )


@click.command("export", cls=Verb)
@click.argument("ref", metavar="NAME", shell_complete=complete_entries)
@option(
    "-o",
    "--output FILE",
    "path",
    required=True,
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="The bundle to write; `-` is stdout.",
)
@options.overwrite
@option("--sign", "is_signed", help="Sign it with your key: `kvstore key`.")
@option(
    "--without-basis",
    help="Leave out what `kvstore calibrate` has made: who takes it over has it.",
)
@click.pass_context
def export(
    context: click.Context,
    ref: str,
    path: Path,
    overwrite: bool,
    is_signed: bool,
    without_basis: bool,
) -> None:
    """Write an entry and its blocks as one file: a bundle.

    `kvstore import` takes it over, on another machine too. A bundle holds the tokens,
    so the text: it is as private as the conversation. The same entry gives the same
    bytes, and the same signature. A signature tells nobody more than your key.
    """
    output = output_of(context)
    secret = signing_key() if is_signed else None
    is_file = str(path) != "-"
    if is_file:
        _check_path(path, overwrite)
    else:
        _check_stdout(context, output)
    store = open_store(context)
    entry = store.entry(ref)
    begin = time.monotonic()
    with (
        files.written_whole(path) if is_file else _stdout() as descriptor,
        os.fdopen(descriptor, "wb", closefd=False) as file,
        output.progress() as bars,
    ):
        nbytes = store.export_bundle(
            entry.id,
            file,
            without_basis=without_basis,
            secret=secret,
            progress=bars.bar("export"),
        )
    tokens = format_count(entry.num_tokens, "token")
    text = f"exported {tokens} of {entry_label(entry)}: {format_bytes(nbytes)}"
    if not is_file:
        output.note(text)
        return
    data: JSON = {
        "entry": entry_data(entry),
        "file": str(path),
        "file_bytes": nbytes,
        "elapsed_s": round(time.monotonic() - begin, 3),
    }
    output.result(f"{text}: {path}", data, [str(path)])


def _check_path(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_file():
        raise KVStoreError(
            f"not a regular file: `{path}`", hint="choose another; `-o -` is stdout"
        )
    files.check_new(path, overwrite=overwrite)


def _check_stdout(context: click.Context, output: Output) -> None:
    if output.mode == "json":
        raise click.UsageError("`-o -` and `--json` exclude each other", context)
    if sys.stdout.isatty():
        raise click.UsageError(
            "a bundle is not for a terminal: redirect it, or give a file", context
        )


@contextmanager
def _stdout() -> Iterator[int]:
    sys.stdout.flush()
    yield sys.stdout.fileno()
