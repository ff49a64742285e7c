"""The verb calibrate."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...storage.folder import encryption_of
from ..main import Verb, open_store, output_of
from ..options import ModelOptions, model_options, option
from ..output import Column, format_codec, format_table, terminal_width

if TYPE_CHECKING:
    from ...format.calibration import Calibration, Measured
    from ...models.load import LoadedModel
    from ...store import Store


@click.command(cls=Verb)
@partial(model_options, is_needed=False)
@option(
    "--text FILE",
    "texts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="A text to learn from; may be given several times.  [default: what Python and"
    " the system bring, in several languages]",
)
@option(
    "--from-store",
    help="Learn from rows that are stored without loss; no model is run.",
)
@option("--measure-only", help="Measure codecs, and make no new basis.")
@option(
    "--contexts N",
    type=click.IntRange(min=1),
    default=32,
    help="Texts of 1,280 tokens to learn from. A quarter as many, others, are measured"
    " with; if those are fewer than 4, qualities are as if nothing was measured.",
)
@click.pass_context
def calibrate(
    context: click.Context,
    model: ModelOptions,
    texts: tuple[Path, ...],
    from_store: bool,
    measure_only: bool,
    contexts: int,
) -> None:
    """Fit codecs to a model, and measure what each does to what it says.

    The basis that is made lies in the store, and what is saved with a `--quality` from
    then on takes the smallest codec that was measured to meet it. Nothing that is
    stored already is changed. The same command goes on where it was stopped.
    """
    if from_store and (measure_only or texts):
        raise click.UsageError(
            "`--from-store` excludes `--measure-only` and `--text`: it reads no text"
        )
    output = output_of(context)
    if from_store:
        store = open_store(context)
        fingerprint = None if model.model is None else model.fingerprint()
        with output.progress() as bars:
            calibration = store.calibrate(fingerprint, progress=bars.bar("read"))
        hint = "measures it: until then no quality uses it"
        output.hint(f"`kvstore calibrate --model MODEL --measure-only` {hint}")
    else:
        calibration = _run_model(context, model, texts, contexts, measure_only)
    text = format_calibration(calibration, terminal_width())
    ids = [calibration.basis] if calibration.basis else []
    output.result(text, asdict(calibration), ids)


def _run_model(
    context: click.Context,
    options: ModelOptions,
    texts: tuple[Path, ...],
    count: int,
    measure_only: bool,
) -> Calibration:
    from .generate import open_models

    store, loaded = open_models(context, options, None)
    from ...models.calibrate import calibrate_model

    learned = _contexts(loaded, texts, count)
    with output_of(context).progress() as bars:
        try:
            return calibrate_model(
                loaded, store, learned, measure_only=measure_only, bar=bars.bar
            )
        except KeyboardInterrupt as error:
            error.hint = _hint(store, measure_only)  # type: ignore[attr-defined]
            raise


def _hint(store: Store, measure_only: bool) -> str:
    """Return what somebody can do who has stopped the command."""
    if measure_only:
        return "what was measured is not kept; run the same command again"
    if encryption_of(store.path) is not None:
        return (
            "an encrypted store keeps no rows of texts; run it again, with"
            " `--measure-only` if it was measuring"
        )
    return "what was computed is kept; run the same command to go on"


def _contexts(
    loaded: LoadedModel, texts: tuple[Path, ...], count: int
) -> list[list[int]]:
    from ...models.calibrate import CONTEXT, NUM_LEARNED
    from ...models.corpus import given_contexts, usual_contexts

    number = count + -(-count // NUM_LEARNED)
    if not texts:
        return usual_contexts(loaded.tokenizer, number, CONTEXT)
    read = []
    for path in texts:
        try:
            read.append(path.read_text())
        except UnicodeDecodeError as error:
            raise click.UsageError(f"`{path}` is not UTF-8") from error
    return given_contexts(loaded.tokenizer, read, number, CONTEXT)


def format_calibration(calibration: Calibration, width: int | None = None) -> str:
    """Return what was measured as people read it: a table, and what qualities mean."""
    from ...format.calibration import QUALITIES

    basis = calibration.basis
    lines = [f"basis {basis[:12]}" if basis else "no basis"]
    if not calibration.measured:
        return "\n".join(lines)
    lines += ["", *format_table(calibration.measured, _COLUMNS, width), ""]
    for quality in QUALITIES:
        lines.append(f"{quality}: {format_codec(calibration.choose(quality))}")
    return "\n".join(lines)


_COLUMNS: tuple[Column[Measured], ...] = (
    Column("CODEC", lambda one: one.codec.partition("@")[0].removesuffix("+zstd")),
    Column("BITS", lambda one: f"{one.bits:.2f}", is_number=True),
    Column("KL", lambda one: f"{one.kl:.5f}", is_number=True),
    Column("±", lambda one: f"{one.kl_error:.5f}", is_number=True),
    Column("SAME CHOICE", lambda one: f"{one.same_choice:.1%}", is_number=True),
)
