"""The verbs that run a model: save, generate, lookup."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..output import Output, format_bytes, format_count
from . import options
from .entry_verbs import entry_data, entry_label
from .options import (
    ModelOptions,
    PromptOptions,
    gathered,
    model_options,
    prompt_options,
)
from .root import Verb, load_fast_blas, open_store, output_of

if TYPE_CHECKING:
    from ..fingerprint import Fingerprint
    from ..store import Store
    from ..types import JSON, Entry


@click.command(cls=Verb)
@model_options
@prompt_options
@options.name
@options.codec
@options.replace
@options.prefill_step_size
@options.checkpoint_every
@click.pass_context
@gathered("model", ModelOptions)
@gathered("prompt", PromptOptions)
def save(
    context: click.Context,
    model: ModelOptions,
    prompt: PromptOptions,
    name: str | None,
    codec: str | None,
    replace: bool,
    prefill_step_size: int,
    checkpoint_every: int,
) -> None:
    """Compute the prompt cache of a prompt and keep it.

    What the store already holds of the prompt is restored and not computed again. The
    message is left open, as with `mlx_lm.cache_prompt`: what `generate --name` is given
    later is added to it. Ctrl-C keeps what is computed.
    """
    output = output_of(context)
    text = prompt.read()
    store, loaded, tokenizer, fingerprint = _open(context, model, codec)
    from ..generate import save_prompt

    tokens = _encode(tokenizer, text, prompt, is_open=True)
    begin = time.monotonic()
    with output.progress() as bars:
        entry, num_restored = save_prompt(
            loaded,
            tokens,
            store=store,
            fingerprint=fingerprint,
            name=name,
            replace=replace,
            prefill_step_size=prefill_step_size,
            checkpoint_every=checkpoint_every,
            load_progress=bars.bar("restore"),
            prompt_progress_callback=bars.bar("prefill"),
            save_progress=bars.bar("save"),
        )
    _print_saved(output, entry, num_restored, time.monotonic() - begin)


@click.command(cls=Verb)
@model_options
@prompt_options
@options.name
@options.codec
@options.replace
@click.option(
    "--max-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Tokens to generate at most.",
)
@click.option(
    "--temp",
    metavar="T",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 takes the likeliest token.",
)
@click.option(
    "--top-p",
    metavar="P",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="Sample from the likeliest tokens that together have this probability.",
)
@click.option(
    "--top-k",
    metavar="K",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Sample from so many of the likeliest tokens; 0 from all.",
)
@click.option("--seed", metavar="N", type=int, help="Seed of the sampling.")
@options.kv_bits
@options.prefill_step_size
@options.checkpoint_every
@click.pass_context
@gathered("sampling", options.SamplingOptions)
@gathered("model", ModelOptions)
@gathered("prompt", PromptOptions)
def generate(
    context: click.Context,
    model: ModelOptions,
    prompt: PromptOptions,
    sampling: options.SamplingOptions,
    name: str | None,
    codec: str | None,
    replace: bool,
    max_tokens: int,
    prefill_step_size: int,
    checkpoint_every: int,
    kv_bits: int | str | None,
) -> None:
    """Go on from what is kept, generate text, and keep the result.

    With the name of an entry, the prompt continues that conversation. Else the whole
    prompt is looked up, and what the store holds of it is not computed again. Ctrl-C
    ends the text and keeps what was said so far.
    """
    output = output_of(context)
    text = prompt.read()
    store, loaded, tokenizer, fingerprint = _open(context, model, codec)
    from ..generate import stream_generate

    tokens = _conversation(store, tokenizer, fingerprint, prompt, text, name, replace)
    saved: list[Entry] = []
    with output.progress() as bars:
        responses = stream_generate(
            loaded,
            tokenizer,
            tokens,
            store=store,
            fingerprint=fingerprint,
            name=name,
            replace=replace,
            max_tokens=max_tokens,
            sampler=sampling.make_sampler(),
            prefill_step_size=prefill_step_size,
            checkpoint_every=checkpoint_every,
            kv_bits=kv_bits,
            load_progress=bars.bar("restore"),
            prompt_progress_callback=bars.bar("prefill"),
            save_progress=bars.bar("save"),
            on_saved=saved.append,
        )
        said: list[Any] = []
        try:
            with closing(responses):
                for response in responses:
                    bars.clear()
                    output.stream(response.text)
                    said.append(response)
        finally:
            bars.clear()
            _print_said(output, said, len(tokens), next(iter(saved), None))


@click.command(cls=Verb)
@model_options
@prompt_options
@click.pass_context
@gathered("model", ModelOptions)
@gathered("prompt", PromptOptions)
def lookup(context: click.Context, model: ModelOptions, prompt: PromptOptions) -> None:
    """Say how much of a prompt the store holds, and why not more.

    The prompt is taken as `generate` without a name takes it. No weights are loaded.
    """
    output = output_of(context)
    text = prompt.read()
    store = open_store(context)
    from ..model import fingerprint_model, load_tokenizer

    fingerprint = fingerprint_model(model.model, model.adapter_path)
    tokenizer = load_tokenizer(model.model, trust_remote_code=model.trust_remote_code)
    match = store.lookup(_encode(tokenizer, text, prompt), fingerprint)
    total = format_count(match.num_prompt_tokens, "token")
    output.result(
        f"{match.num_tokens:,} of {total} held: {match.reason}: {match.detail}",
        asdict(match),
        [str(match.num_tokens)],
    )


def _open(
    context: click.Context, options: ModelOptions, codec: str | None
) -> tuple[Store, Any, Any, Fingerprint]:
    """Open the store, and load model, tokenizer and fingerprint."""
    load_fast_blas()
    from ..model import find_model, load_model

    find_model(options.model)  # a wrong name must not leave an empty store behind
    store = open_store(context, create=True, codec=codec)
    loaded, tokenizer, fingerprint = load_model(
        options.model,
        options.adapter_path,
        trust_remote_code=options.trust_remote_code,
    )
    return store, loaded, tokenizer, fingerprint


def _encode(
    tokenizer: Any, text: str, prompt: PromptOptions, *, is_open: bool = False
) -> list[int]:
    """Return the tokens of a first message."""
    from ..model import encode_prompt

    return encode_prompt(
        tokenizer,
        text,
        system_prompt=prompt.system_prompt,
        chat_template_config=prompt.chat_template_config,
        ignore_chat_template=prompt.ignore_chat_template,
        is_open=is_open,
    )


def _conversation(
    store: Store,
    tokenizer: Any,
    fingerprint: Fingerprint,
    prompt: PromptOptions,
    text: str,
    name: str | None,
    replace: bool,
) -> list[int]:
    """Return the tokens of the conversation that a prompt begins or continues."""
    from ..generate import entry_tokens
    from ..model import encode_continuation

    held = None
    if name is not None and not replace:
        held = entry_tokens(store, name, fingerprint)
    if held is None:
        return _encode(tokenizer, text, prompt)
    if prompt.system_prompt is not None:
        raise click.UsageError(
            f"`--system-prompt` comes too late: `{name}` has begun without it"
        )
    return held + encode_continuation(
        tokenizer,
        text,
        held,
        chat_template_config=prompt.chat_template_config,
        ignore_chat_template=prompt.ignore_chat_template,
    )


def _print_saved(
    output: Output, entry: Entry, num_restored: int, seconds: float
) -> None:
    num_computed = entry.num_tokens - num_restored
    data: JSON = {
        "entry": entry_data(entry),
        "num_restored_tokens": num_restored,
        "num_computed_tokens": num_computed,
        "elapsed_s": round(seconds, 3),
    }
    output.result(
        f"saved {format_count(entry.num_tokens, 'token')} as {entry_label(entry)}:"
        f" {num_restored:,} restored, {num_computed:,} computed in {seconds:.2f} s;"
        f" {format_bytes(entry.nbytes)}, {entry.codec}",
        data,
        [entry.id],
    )


def _print_said(
    output: Output, said: Sequence[Any], num_prompt: int, entry: Entry | None
) -> None:
    """Print what is to be told after a reply, finished or not."""
    if output.mode == "json":
        output.result("", _said_data(said, num_prompt, entry))
        return
    if said:
        last = said[-1]
        output.stream("\n")
        output.note(
            f"prompt: {format_count(num_prompt, 'token')},"
            f" {num_prompt - last.prompt_tokens:,} restored, {last.prompt_tokens:,}"
            f" computed at {last.prompt_tps:.1f} tokens/s; reply:"
            f" {last.generation_tokens:,} at {last.generation_tps:.1f} tokens/s"
        )
    if entry is not None:
        tokens = format_count(entry.num_tokens, "token")
        output.note(f"kept {tokens} as {entry_label(entry)}")


def _said_data(said: Sequence[Any], num_prompt: int, entry: Entry | None) -> JSON:
    data: JSON = {
        "text": "".join(response.text for response in said),
        "finish_reason": (said and said[-1].finish_reason) or "interrupted",
        "num_prompt_tokens": num_prompt,
        "num_generated_tokens": len(said),
        "entry": entry_data(entry) if entry else None,
    }
    if said:
        last = said[-1]
        data |= {
            "num_restored_tokens": num_prompt - last.prompt_tokens,
            "num_computed_tokens": last.prompt_tokens,
            "prompt_tps": round(last.prompt_tps, 3),
            "generation_tps": round(last.generation_tps, 3),
        }
    return data
