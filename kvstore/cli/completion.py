"""What the shell completes: entries, models, codecs, options of mlx-lm's server."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import click
from click.shell_completion import BashComplete, CompletionItem

# Names of other codecs are taken too.
_ARRAY_CODECS = (*(f"turbo{bits}" for bits in range(2, 9)), "turbo5v3", "planes")
_CODECS = ("raw", *_ARRAY_CODECS, *(f"{name}+zstd" for name in _ARRAY_CODECS))
_REPOSITORY = re.compile(r"models--([^/]+?)--([^/]+)")

# Click's own script does not quote a name that has spaces.
_BASH = """\
%(complete_func)s() {
    local kind value current=${COMP_WORDS[COMP_CWORD]}
    COMPREPLY=()
    while IFS=, read -r kind value; do
        case $kind in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain)
                # Where a quote is open, readline closes it.
                [[ $current == [\\"\\']* ]] || printf -v value %%q "$value"
                COMPREPLY+=("$value")
                ;;
        esac
    done < <(COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD \\
        %(complete_var)s=bash_complete "$1")
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class QuotingBash(BashComplete):
    """Completion in Bash, with names as the shell wants them quoted."""

    source_template = _BASH


def complete_codecs(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the names of codecs that start so."""
    return _items(_CODECS, incomplete)


def complete_entries(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the names of entries that start so."""
    from ..errors import KVStoreError
    from .main import open_store

    try:
        names = [entry.name or entry.id for entry in open_store(context).entries()]
    except (KVStoreError, OSError):
        return []  # a shell that completes is no place for errors
    return _items(names, incomplete)


def complete_models(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return models of entries and of Hugging Face's cache, or that a folder fits."""
    from ..errors import KVStoreError
    from .main import open_store

    models = _cached_models()
    with suppress(KVStoreError, OSError):
        models |= {entry.model for entry in open_store(context).entries()}
    named = _items(sorted(models), incomplete)
    return named if incomplete and named else [CompletionItem(incomplete, type="dir")]


def server_options(incomplete: str) -> list[CompletionItem]:
    """Return the options of mlx-lm's server that start so.

    They are read off its text, since importing it takes seconds.
    """
    found = find_spec("mlx_lm")
    if found is None or found.origin is None:
        return []
    text = Path(found.origin).with_name("server.py").read_text(encoding="utf-8")
    names = re.findall(r'add_argument\(\s*(?:"-\w",\s*)?"(--[\w-]+)"', text)
    return _items(names, incomplete)


def _cached_models() -> set[str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        folders = [path.name for path in Path(HF_HUB_CACHE).iterdir()]
    except OSError:
        return set()
    found = map(_REPOSITORY.fullmatch, folders)
    return {f"{match[1]}/{match[2]}" for match in found if match}


def _items(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
