"""The verb doctor."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..main import Verb, chosen_path, output_of
from ..options import ModelOptions, model_options
from ..output import has_colour, one_line

if TYPE_CHECKING:
    from ...ops.upkeep.doctor import Diagnosis

_COLOURS = {"good": "green", "warning": "yellow", "bad": "red"}


@click.command(cls=Verb)
@partial(model_options, is_needed=False)
@click.pass_context
def doctor(context: click.Context, model: ModelOptions) -> None:
    """Check this machine, the store's folder and a model, and say what to do.

    Looks at the packages, MLX's back end and its BLAS, codecs and kernels, the disk and
    its file system, space, permissions, and with `--model` whether that can be loaded,
    kept, and how long a text it takes. Nothing is changed. Exits with 1 where anything
    is bad; a warning is none.
    """
    output = output_of(context)
    path = chosen_path(context)
    found = []
    for diagnosis in _examine(path, model):
        found.append(diagnosis)
        if output.mode == "human":
            click.echo(format_diagnosis(diagnosis))
    data = {"store": str(path), "findings": [asdict(one) for one in found]}
    wrong = [one.subject for one in found if one.state != "good"]
    output.result("" if wrong else "all is well", data, wrong)
    if any(one.state == "bad" for one in found):
        context.exit(1)


def _examine(path: Path, model: ModelOptions) -> Iterator[Diagnosis]:
    from ...ops.upkeep.doctor import examine_machine, examine_store

    has_back_end = True
    for diagnosis in examine_machine():
        is_needed = diagnosis.subject in ("BLAS", "back end")
        has_back_end &= not (is_needed and diagnosis.state == "bad")
        yield diagnosis
    yield from examine_store(path)
    if model.model is not None and has_back_end:
        from ...models.doctor import examine_model

        yield from examine_model(
            model.model, model.adapter_path, trust_remote_code=model.trust_remote_code
        )


def format_diagnosis(diagnosis: Diagnosis) -> str:
    """Return what a check found as people read it, the remedy on a line of its own."""
    state = f"{diagnosis.state:<7}"
    if has_colour(sys.stdout):
        state = click.style(state, fg=_COLOURS[diagnosis.state])
    line = f"{state}  {diagnosis.subject}: {one_line(diagnosis.detail)}"
    if diagnosis.remedy:
        line += f"\n         {one_line(diagnosis.remedy)}"
    return line
