"""Write docs/CLI.md and the manual page docs/kvstore.1 from the command line itself.

Usage: python tools/cli_docs.py
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from kvstore.cli import cli
from kvstore.cli.verbs import EXAMPLES

PATH = Path(__file__).parent.parent / "docs/CLI.md"
MANUAL = PATH.with_name("kvstore.1")


def render() -> str:
    """Return the page."""
    root = _root()
    lines = ["# The command line", ""]
    lines += ["Written by `make docs` from the program itself; do not edit.", ""]
    lines += describe(root)
    for verb in verbs(root):
        lines += ["", f"## {verb.command_path}", "", *describe(verb)]
    return "\n".join(lines) + "\n"


def render_manual() -> str:
    """Return the manual page, as roff."""
    root = _root()
    lines = [".TH KVSTORE 1", ".SH NAME", "kvstore \\- keep prompt caches on disk"]
    for context in (root, *verbs(root)):
        command = context.command
        usage = " ".join(command.collect_usage_pieces(context))
        lines += [f".SH {context.command_path.upper()}", ".B", context.command_path]
        lines += [_roff(usage)]
        for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
            lines += [".PP", _roff(paragraph)]
        for flags, meaning in options(context):
            lines += [".TP", ".B", _roff(flags), _roff(meaning)]
        if examples := EXAMPLES.get(context.command_path.partition(" ")[2]):
            lines += [".PP", ".nf", *map(_roff, examples), ".fi"]
    return "\n".join(lines) + "\n"


def _root() -> click.Context:
    return click.Context(cli, info_name="kvstore", **cli.context_settings)


def _roff(text: str) -> str:
    """Return a text on one line, with nothing that roff takes for a request."""
    plain = " ".join(text.split()).replace("`", "").replace("\\", "\\e")
    return "\\&" + plain.replace("-", "\\-")


def verbs(parent: click.Context) -> Iterator[click.Context]:
    """Yield each verb, followed by the verbs that it has itself."""
    group = parent.command
    if isinstance(group, click.Group):
        for name in group.list_commands(parent):
            verb = click.Context(group.commands[name], info_name=name, parent=parent)
            yield verb
            yield from verbs(verb)


def describe(context: click.Context) -> Iterator[str]:
    """Yield how a command is used, what it does, and its options."""
    command = context.command
    yield f"`{context.command_path} {' '.join(command.collect_usage_pieces(context))}`"
    yield ""
    yield inspect.cleandoc(command.help or "")
    rows = list(filter(None, map(option_row, options(context))))
    if rows:
        yield from ("", "| option | meaning |", "|---|---|", *rows)
    examples = EXAMPLES.get(context.command_path.partition(" ")[2])
    if examples:
        yield from ("", "```", *examples, "```")


def options(context: click.Context) -> Iterator[tuple[str, str]]:
    """Yield the options that are not the same everywhere, with what they mean."""
    for option in context.command.get_params(context):
        described = option.get_help_record(context)
        is_help = "--help" in option.opts and context.parent is not None
        if isinstance(option, click.Option) and described and not is_help:
            yield described


def option_row(option: tuple[str, str]) -> str:
    """Return one line of the table of options."""
    flags, meaning = (" ".join(text.split()).replace("|", "\\|") for text in option)
    return f"| `{flags}` | {meaning} |"


if __name__ == "__main__":
    PATH.write_text(render())
    MANUAL.write_text(render_manual())
