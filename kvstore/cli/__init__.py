"""The command ``kvstore``: one file per few verbs, each with a Python method behind it.

Nothing here imports mlx-lm before a verb that runs a model is called.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from .chat_verb import chat
from .demo_verb import demo
from .entry_verbs import inspect_entry, list_entries, load, remove
from .export_verb import export
from .failures import run
from .import_verb import import_file
from .keeping_verbs import pin, prune, rename, stats
from .lookup_verb import lookup
from .model_verbs import generate, save
from .root import cli
from .serve_verb import serve
from .store_verbs import completion, show_dir, verify

for _verb in (
    save,
    load,
    generate,
    chat,
    serve,
    export,
    import_file,
    lookup,
    list_entries,
    inspect_entry,
    rename,
    pin,
    remove,
    prune,
    verify,
    stats,
    demo,
    show_dir,
    completion,
):
    cli.add_command(_verb)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code.

    Args:
        args: Its arguments; those of the process by default.
    """
    sys.exit(run(cli, args))


__all__ = ["cli", "main"]
