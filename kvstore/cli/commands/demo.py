"""The verbs demo and bench: one measurement, told in two ways."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..main import Verb, output_of
from ..options import ModelOptions, codec_name, max_tokens, model_options, option, utf8
from ..output import Column, format_bytes, format_count, format_table, terminal_width

if TYPE_CHECKING:
    from ...models.demo import DemoResult, DemoRow

num_tokens = option(
    "--num-tokens N",
    type=click.IntRange(min=256),
    help="How much of a document to read.  [default: about 2,000 tokens, 256 where the"
    " model is slow]",
)
codecs = option(
    "--codec CODEC",
    "codecs",
    type=codec_name,
    multiple=True,
    help="A codec to compare; may be given several times.  [default: the usual ones]",
)


@click.command(cls=Verb)
@model_options
@option(
    "--document FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text to read.  [default: a part of Python's manual]",
)
@option("--question TEXT", type=utf8, help="What to ask about it.")
@num_tokens
@max_tokens(48, "Tokens of an answer at most.")
@codecs
@click.pass_context
def demo(
    context: click.Context,
    model: ModelOptions,
    document: Path | None,
    question: str | None,
    num_tokens: int | None,
    max_tokens: int,
    codecs: tuple[str, ...],
) -> None:
    """Show the main job on a model, with the seconds and bytes that it takes.

    Prefills a document and saves it, with several codecs. For each of them a new
    process resumes it, is asked a question, and answers. All in a temporary folder:
    nothing is left behind.
    """
    output = output_of(context)
    model, result = _run(
        context, model, document, question, num_tokens, max_tokens, codecs
    )
    output.result(format_result(result, terminal_width()), asdict(result))
    output.hint(
        f"now with a text of yours: `kvstore save --model {model.model} --name doc <"
        ' FILE`, then `kvstore generate --from doc "QUESTION"`'
    )


@click.command(cls=Verb)
@model_options
@num_tokens
@codecs
@click.pass_context
def bench(
    context: click.Context,
    model: ModelOptions,
    num_tokens: int | None,
    codecs: tuple[str, ...],
) -> None:
    """Measure what a store saves with a model of yours, on this machine.

    Takes about two minutes: a document is computed, saved, and loaded in a new process
    for each codec. The report says from how many tokens on loading is faster than
    computing, and can be pasted into an issue. Nothing is left behind.
    """
    output = output_of(context)
    _, result = _run(context, model, None, None, num_tokens, 8, codecs)
    from ...ops.upkeep.doctor import examine_machine

    found = list(examine_machine())
    machine = {one.subject: one.detail for one in found}
    machine["machine"] = f"{platform.platform()}, {os.cpu_count()} cores"
    data = asdict(result) | {"machine": machine}
    output.result(format_report(result, machine), data)


def _run(
    context: click.Context,
    model: ModelOptions,
    document: Path | None,
    question: str | None,
    num_tokens: int | None,
    max_tokens: int,
    codecs: tuple[str, ...],
) -> tuple[ModelOptions, DemoResult]:
    output = output_of(context)
    model = model.chosen(context)
    from ...models.demo import CODECS, run_demo

    with output.progress() as bars:
        result = run_demo(
            model.model,
            adapter_path=model.adapter_path,
            trust_remote_code=model.trust_remote_code,
            document=document,
            question=question,
            num_tokens=num_tokens,
            max_tokens=max_tokens,
            codecs=codecs or CODECS,
            bar=bars.bar,
            note=output.note,
        )
    return model, result


def format_report(result: DemoResult, machine: dict[str, str]) -> str:
    """Return what was measured, and on what machine, in Markdown."""
    prefill_s = result.rows[0].load_s
    lines = [
        f"`{Path(result.model).name}`, {result.num_tokens:,} tokens, computed in"
        f" {prefill_s:.2f} s ({result.num_tokens / prefill_s:,.0f} tokens/s)",
        "",
        "| | MB on disk | save, s | load, s | first logits, s | ratio | pays from |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result.rows[1:]:
        pays = format_count(row.pays_from, "token") if row.pays_from else "-"
        lines.append(
            f"| {row.way} | {(row.nbytes or 0) / 1e6:.1f} | {row.save_s:.2f} |"
            f" {row.load_s:.2f} | {row.first_s:.2f} | {_speedup_cell(row)} | {pays} |"
        )
    lines += ["", *(f"* {name}: {value}" for name, value in machine.items())]
    return "\n".join(lines)


def format_result(result: DemoResult, width: int | None = None) -> str:
    """Return the result as people read it: what was asked, the table, the answers."""
    lines = [f"{result.num_tokens:,} tokens of a document, read by `{result.model}`"]
    lines += ["", *format_table(result.rows, _COLUMNS, width)]
    lines += ["", *_compare(result), "", f"question: {result.question}"]
    lines += [
        f"{row.way}: {' '.join(row.answer.split())}"
        for row in result.rows
        if row.is_reference or not row.is_same
    ]
    return "\n".join(lines)


def _compare(result: DemoResult) -> list[str]:
    sizes = [row.nbytes for row in result.rows if row.nbytes]
    smaller = max(sizes) / min(sizes)
    return [
        "mlx-lm's own file loads sooner: it is neither checked nor compressed. A store",
        f"is up to {smaller:.1f} times smaller, checks every byte, finds prompts by",
        "their tokens, and keeps what they share once.",
    ]


def _size_cell(row: DemoRow) -> str:
    return "" if row.nbytes is None else format_bytes(row.nbytes)


def _speedup_cell(row: DemoRow) -> str:
    return f"{row.speedup:.1f}×" if row.speedup < 10 else f"{row.speedup:.0f}×"


def _same_cell(row: DemoRow) -> str:
    if row.is_same:
        return "" if row.is_reference else "yes"
    return f"first {row.num_same} of {row.num_answer}"


_COLUMNS: tuple[Column[DemoRow], ...] = (
    Column("FROM", lambda row: row.way),
    Column("SIZE", _size_cell, is_number=True),
    Column("FIRST TOKEN", lambda row: f"{row.first_s:.2f} s", is_number=True),
    Column("FASTER", _speedup_cell, is_number=True),
    Column("ANSWER", lambda row: f"{row.answer_s:.2f} s", is_number=True),
    Column("SAME WORDS", _same_cell),
)
