"""The verb that takes over what mlx-lm has written: import."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..output import Output, format_bytes, format_count
from . import options
from .entry_verbs import entry_data, entry_label
from .options import ModelOptions, PromptOptions, gathered
from .root import Verb, load_fast_blas, open_store, output_of

if TYPE_CHECKING:
    from ..types import JSON, Entry


@click.command("import", cls=Verb)
@click.argument(
    "path",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@options.model_options
@options.prompt_options
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
    prompt: PromptOptions,
    name: str | None,
    codec: str | None,
    replace: bool,
) -> None:
    """Keep a prompt cache that `mlx_lm.cache_prompt` has written.

    FILE does not hold the prompt, so give it as it was given then. Files of all
    releases of mlx-lm are read; one that does not fit the model is refused, and so is
    one that holds another number of tokens than the prompt has.
    """
    output = output_of(context)
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
    _print_imported(output, entry, layouts, time.monotonic() - begin)


def _print_imported(
    output: Output, entry: Entry, layouts: tuple[str, ...], seconds: float
) -> None:
    data: JSON = {
        "entry": entry_data(entry),
        "layouts": list(layouts),
        "elapsed_s": round(seconds, 3),
    }
    output.result(
        f"imported {format_count(entry.num_tokens, 'token')} as {entry_label(entry)}:"
        f" mlx-lm {', '.join(layouts)}; {format_bytes(entry.nbytes)}, {entry.codec}",
        data,
        [entry.id],
    )
