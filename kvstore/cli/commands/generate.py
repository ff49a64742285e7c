"""The verbs that run a model: save, generate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from ...blas import OPENBLAS_REMEDY, is_openblas_missing
from ...errors import KVStoreError
from .. import options
from ..interrupts import Interrupts
from ..main import Verb, chosen_path, log, open_store, output_of
from ..options import (
    ModelOptions,
    PromptOptions,
    model_options,
    option,
    prompt_options,
)
from ..output import Output, format_bytes, format_codec, format_count
from ..settings import setting, some_bytes
from .entries import entry_data, entry_label, probe_words

if TYPE_CHECKING:
    from ...format.documents import JSON
    from ...format.entry import Entry
    from ...models.load import LoadedModel
    from ...storage.blocks import BlockStore
    from ...store import Store


@click.command(cls=Verb)
@model_options
@prompt_options
@options.request
@options.name
@options.codec
@options.replace
@options.exact
@options.min_bits
@options.prefill_step_size
@options.checkpoint_every
@option(
    "--measure",
    help="Go on from exact rows only, let the model say 64 tokens, and note with the"
    " entry how what is stored changes what it says. Needs memory for the rows twice.",
)
@click.pass_context
def save(
    context: click.Context,
    model: ModelOptions,
    prompt: PromptOptions,
    request: BinaryIO | None,
    name: str | None,
    codec: str | None,
    replace: bool,
    exact: bool,
    min_bits: int,
    prefill_step_size: int | None,
    checkpoint_every: int,
    measure: bool,
) -> None:
    """Compute the prompt cache of a prompt and keep it.

    What the store already holds of the prompt is restored and not computed again. The
    message is left open, as with `mlx_lm.cache_prompt`: what `generate --from` or
    `chat --from` is given later is added to it. With `--request`, it is what `serve`
    would compute for that request before it answers. Ctrl-C keeps what is computed.
    """
    output = output_of(context)
    source = options.read_source(prompt, request)
    least = options.least_bits(exact, min_bits)
    store, loaded = open_models(context, model, options.codec_of(codec, least))
    from ...models.generate import save_prompt
    from ...models.session import CacheOptions, Callbacks

    tokens = options.encode_source(loaded.tokenizer, source, prompt, is_open=True)
    warn_of_context(output, loaded, len(tokens))
    begin = time.monotonic()
    with output.progress() as bars, Interrupts(bars.say_stopping) as interrupts:
        try:
            with interrupts.heard():
                entry, num_restored = save_prompt(
                    loaded,
                    tokens,
                    store=store,
                    name=name,
                    replace=replace,
                    cache=CacheOptions(min_bits=least),
                    prefilling=options.prefilling(prefill_step_size, checkpoint_every),
                    measure=bars.bar("measure") if measure else None,
                    callbacks=Callbacks(
                        on_load=bars.bar("restore"),
                        on_prefill=bars.bar("prefill"),
                        on_save=bars.bar("save"),
                    ),
                )
        except KeyboardInterrupt:
            end_if_asked(context, interrupts)
            raise
    _print_saved(output, entry, num_restored, time.monotonic() - begin)


@click.command(cls=Verb)
@model_options
@prompt_options
@options.base
@options.name
@options.codec
@options.replace
@options.max_tokens(100, "Tokens to generate at most.")
@options.sampling_options
@options.live_options
@options.prefill_step_size
@options.checkpoint_every
@click.pass_context
def generate(
    context: click.Context,
    model: ModelOptions,
    prompt: PromptOptions,
    sampling: options.SamplingOptions,
    live: options.LiveOptions,
    base: str | None,
    name: str | None,
    codec: str | None,
    replace: bool,
    max_tokens: int,
    prefill_step_size: int | None,
    checkpoint_every: int,
) -> None:
    """Go on from what is kept, generate text, and keep the result.

    `--from` asks what is kept and leaves it as it is. With `--name` of an entry, the
    prompt continues that conversation, and the entry grows. Else the whole prompt is
    looked up, and what the store holds of it is not computed again. Ctrl-C ends the
    text and keeps what was said so far, and so does SIGTERM. Where no model is named,
    it is that of the entry.
    """
    output = output_of(context)
    live.check()
    options.check_base(base, name)
    text = prompt.read()
    store, loaded = open_models(context, model, codec, live, ref=base or name)
    warn_of_size(output, loaded.model, live.max_kv_size)
    from ...models.generate import stream_generate
    from ...models.session import Callbacks

    # With a base, the name is a new one.
    begun = name if base is None and not replace else None
    tokens = _conversation(store, loaded, prompt, text, base, begun)
    warn_of_context(output, loaded, len(tokens))
    is_kept = base is None or name is not None
    saved: list[Entry] = []
    with (
        output.progress() as bars,
        Interrupts(bars.say_stopping) as interrupts,
        interrupts.deferred(),
    ):
        responses = stream_generate(
            loaded,
            tokens,
            store=store,
            name=name,
            replace=replace,
            keep=is_kept,
            sampling=sampling.make(max_tokens, live.num_draft_tokens),
            cache=live.make_cache_options(),
            prefilling=options.prefilling(prefill_step_size, checkpoint_every),
            callbacks=Callbacks(
                should_stop=lambda: interrupts.is_pending,
                on_load=bars.bar("restore"),
                on_prefill=bars.bar("prefill"),
                on_save=bars.bar("save"),
                on_saved=saved.append,
            ),
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
            if not is_kept:
                output.note(f"`{base}` stays as it was, and nothing is kept")
    end_if_asked(context, interrupts)
    is_finished = bool(said) and said[-1].finish_reason is not None
    if interrupts.is_pending and not is_finished:
        raise KeyboardInterrupt


def end_if_asked(context: click.Context, interrupts: Interrupts) -> None:
    """End the process as a signal does, where there was one that asks for it."""
    if interrupts.ending is not None:
        context.exit(128 + interrupts.ending)


def warn_of_size(output: Output, model: Any, max_kv_size: int | None) -> None:
    """Say where mlx-lm has no use for the size that was asked for."""
    if max_kv_size is not None and hasattr(model, "make_cache"):
        output.warning("`--max-kv-size` has no effect: the model makes its own caches")


def warn_of_context(output: Output, model: LoadedModel, num_tokens: int) -> None:
    """Say that a prompt is longer than the model was made for."""
    from ...models.context import past_context

    warning = past_context(num_tokens, model.context_length)
    if warning is not None:
        output.warning(warning)


def open_models(
    context: click.Context,
    chosen: ModelOptions,
    codec: str | None,
    live: options.LiveOptions | None = None,
    *,
    ref: str | None = None,
    usual: str = "balanced",
) -> tuple[Store, LoadedModel]:
    """Open the store, and load the model, or the one that made the entry ``ref``.

    ``codec`` may be a quality too; where it is ``None``, ``usual`` is.
    """
    chosen = chosen.chosen(context, ref)
    from ...models.load import find_model

    codec = options.codec_of(codec, live.least_bits if live else 0, usual)
    find_model(chosen.model)  # a wrong name must not leave an empty store behind
    if is_openblas_missing():
        output_of(context).warning(
            f"prompts are read about 12 times faster with OpenBLAS: {OPENBLAS_REMEDY}"
        )
    store = make_store(context, codec)
    context.call_on_close(partial(_free_tails, store))
    with output_of(context).progress() as bars, bars.spinner("loading the model"):
        loaded = chosen.load(live.draft_model if live else None)
    from ...ops.calibrate import can_be_calibrated

    could = partial(can_be_calibrated, fingerprint=loaded.fingerprint)
    if not store.run(could):
        context.call_on_close(partial(_note_calibration, context, store, loaded, could))
    return store, loaded


def _note_calibration(
    context: click.Context,
    store: Store,
    loaded: LoadedModel,
    can_be_calibrated: Callable[[BlockStore], bool],
) -> None:
    """Say, when a model has its first rows in a store, what calibrating would give."""
    if store.run(can_be_calibrated):
        output_of(context).note(
            f"`kvstore calibrate --model {loaded.fingerprint.label}` measures once what"
            " storing loses, and may halve what is stored"
        )


def make_store(context: click.Context, codec: str) -> Store:
    """Open the store, or make it with the usual limit."""
    text = setting("limit")
    limit = text and some_bytes(text)
    is_new = not chosen_path(context).exists()
    store = open_store(context, create=True, codec=codec)
    if limit and is_new:
        store.set_limit(limit)
    return store


def _free_tails(store: Store) -> None:
    try:
        store.free_tails()
    except (KVStoreError, OSError) as error:
        log.info("tails that nothing needs stay until they are pruned: %s", error)


def _conversation(
    store: Store,
    model: LoadedModel,
    prompt: PromptOptions,
    text: str,
    base: str | None,
    name: str | None,
) -> list[int]:
    """Return the tokens of the conversation that a prompt begins or continues.

    A base must be there; an entry of the name may be.
    """
    from ...models.generate import continue_entry
    from ...models.session import has_entry

    ref = name if base is None else base
    if ref is None or (base is None and not has_entry(store, ref)):
        return options.encode_source(model.tokenizer, text, prompt)
    if prompt.system_prompt is not None:
        raise click.UsageError(
            f"`--system-prompt` comes too late: `{ref}` has begun without it"
        )
    return continue_entry(model, store, ref, text, prompt.template(model.tokenizer))


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
    measured = f"\n{probe_words(entry.probe)}" if entry.probe else ""
    output.result(
        f"saved {format_count(entry.num_tokens, 'token')} as {entry_label(entry)}:"
        f" {num_restored:,} restored, {num_computed:,} computed in {seconds:.2f} s;"
        f" {format_bytes(entry.nbytes)}, {format_codec(entry.codec)}{measured}",
        data,
        [entry.id],
    )


def _print_said(
    output: Output, said: Sequence[Any], num_prompt: int, entry: Entry | None
) -> None:
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
