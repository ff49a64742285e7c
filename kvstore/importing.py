"""A file of mlx-lm's, a model and a prompt, held against each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cache_files import open_cache_file
from .errors import FingerprintError, KVStoreError
from .model import find_model


def read_cache_file(
    path: Path, tokens: Sequence[int], model: Any, label: str
) -> tuple[list[Any], tuple[str, ...]]:
    """Return the prompt cache in a file that ``mlx_lm.cache_prompt`` wrote.

    What it returns, and the tokens, can go to :meth:`kvstore.Store.save`.

    Args:
        path: The file.
        tokens: The prompt, which the file does not hold.
        model: The model, from ``mlx_lm.load``; its weights are not looked at.
        label: What the model is called: a folder, or a Hugging Face repository.

    Returns:
        The prompt cache, and the releases of mlx-lm that write files like this.

    Raises:
        FormatError: It is no such file, is damaged, or has other layers.
        FingerprintError: It says that another model made it.
        KVStoreError: It holds another number of tokens.
        OSError: It cannot be read.
    """
    from mlx_lm.models.cache import make_prompt_cache

    file = open_cache_file(path, make_prompt_cache(model))
    if file.model is not None and not _is_called(label, file.model):
        raise FingerprintError(
            f"`{path}` was made by another model: {file.model[:200]!r}, not `{label}`",
            hint="give the model that made it; one that was given as a relative path"
            " is looked for from the current folder",
        )
    if file.num_tokens != len(tokens):
        raise KVStoreError(
            f"`{path}` holds {file.num_tokens} tokens, and the prompt has"
            f" {len(tokens)}",
            hint="give the prompt, and the options of its chat template, that"
            " `mlx_lm.cache_prompt` was given",
        )
    return file.read(), file.layouts


def _is_called(label: str, other: str) -> bool:
    """Say whether two names mean one model; nothing is downloaded for it."""
    if label == other:
        return True
    folder = find_model(label).resolve()
    # The Hub's cache names a repository's folder so.
    repository = f"models--{other.replace('/', '--')}"
    try:
        is_same = Path(other).resolve() == folder
    except (OSError, ValueError):  # no name for a file
        is_same = False
    return is_same or repository in folder.parts
