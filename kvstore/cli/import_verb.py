"""The verb that takes over what others have written: import."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click
from click.core import ParameterSource

from ..output import Output, format_bytes, format_count, one_line
from . import options
from .entry_verbs import entry_data, entry_label
from .options import ModelOptions, PromptOptions, gathered
from .root import Verb, load_fast_blas, open_store, output_of

if TYPE_CHECKING:
    from ..fingerprint import Fingerprint
    from ..types import JSON, Entry

# What a bundle knows itself.
_OF_CACHE_FILES = (
    "trust_remote_code",
    "prompt",
    "system_prompt",
    "chat_template_config",
    "ignore_chat_template",
    "codec",
)


@click.command("import", cls=Verb)
@click.argument(
    "path",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
)
@partial(options.model_options, required=False)
@click.option(
    "--draft-model",
    metavar="MODEL",
    help="The draft model, where a bundle was made with one.",
)
@partial(options.prompt_options, required=False)
@options.name
@options.codec
@options.replace
@click.pass_context
@gathered("model", ModelOptions)
@gathered("prompt", PromptOptions)
def import_file(
    context: click.Context,
    path: Path,
    model: ModelOptions,
    draft_model: str | None,
    prompt: PromptOptions,
    name: str | None,
    codec: str | None,
    replace: bool,
) -> None:
    """Keep a bundle, or a prompt cache that `mlx_lm.cache_prompt` has written.

    A bundle is what `kvstore export` writes; `-` reads one from stdin. It is checked to
    the last byte before anything of it is kept. Whoever made it decided what the model
    has read: import one only from whom you would take a model from. With `--model` it
    is refused if another model made it.

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
        fingerprint = _fingerprint(context, model, draft_model)
        _import_bundle(context, output, path, fingerprint, name=name, replace=replace)
        return
    _refuse_given(context, ("draft_model",), "a cache file")
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
    from ..bundles import is_bundle

    if str(path) == "-" or not path.is_file():
        return True
    with path.open("rb") as file:
        return is_bundle(file.read(512))


def _refuse_given(context: click.Context, names: tuple[str, ...], what: str) -> None:
    """Refuse options that say nothing of such a file.

    Raises:
        click.UsageError: One was given.
    """
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"`{option}` is not for {what}", context)


def _fingerprint(
    context: click.Context, model: ModelOptions, draft_model: str | None
) -> Fingerprint | None:
    """Return the fingerprint of the model that a bundle must be of, if one is given."""
    if model.model is None:
        if model.adapter_path is not None or draft_model is not None:
            raise click.UsageError(
                "`--adapter-path` and `--draft-model` need `--model`", context
            )
        return None
    from ..model import fingerprint_model

    return fingerprint_model(model.model, model.adapter_path, draft_model)


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
    fingerprint: Fingerprint | None,
    *,
    name: str | None,
    replace: bool,
) -> None:
    from ..unpacking import open_bundle

    begin = time.monotonic()
    with _opened(path) as file:
        # First, so that what is no bundle, or another model's, leaves no empty store.
        bundle = open_bundle(file, fingerprint)
        store = open_store(context, create=True)
        with output.progress() as bars:
            entry = store.import_bundle(
                bundle,
                fingerprint=fingerprint,
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
    origin = f"made by {maker}, fingerprint {digest[:12]}"
    output.result(_describe(entry, origin), data, [entry.id])


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
    load_fast_blas()
    from ..importing import read_cache_file
    from ..model import encode_prompt, load_model

    loaded, tokenizer, fingerprint = load_model(
        model.model,
        model.adapter_path,
        trust_remote_code=model.trust_remote_code,
        lazy=True,  # only its layers are looked at
    )
    tokens = encode_prompt(
        tokenizer,
        text,
        system_prompt=prompt.system_prompt,
        chat_template_config=prompt.chat_template_config,
        ignore_chat_template=prompt.ignore_chat_template,
        is_open=True,
    )
    begin = time.monotonic()
    prompt_cache, layouts = read_cache_file(path, tokens, loaded, model.model)
    # A file that is refused leaves no empty store behind.
    store = open_store(context, create=True, codec=codec)
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
    output.result(_describe(entry, origin), data, [entry.id])


def _describe(entry: Entry, origin: str) -> str:
    return (
        f"imported {format_count(entry.num_tokens, 'token')} as {entry_label(entry)}:"
        f" {origin}; {format_bytes(entry.nbytes)}, {entry.codec}"
    )
