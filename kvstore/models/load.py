"""Models, tokenizers, prompts and cache files as mlx-lm has them. Knows no store.

mlx-lm takes a second to import, so each function imports what it needs of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import FingerprintError, KVStoreError
from ..fingerprint import Fingerprint, read_json
from .context import read_context_length


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that can be run, and what names the rows that it computes."""

    # From ``mlx_lm.load``.
    model: Any
    tokenizer: Any
    # Of the model; of both, where there is a draft model.
    fingerprint: Fingerprint
    # A smaller model with the same vocabulary, which guesses what comes. mlx-lm puts
    # its caches behind those of the model.
    draft_model: Any = None
    # Tokens that it was made for; ``None`` where it does not say.
    context_length: int | None = None

    def parts(self, prompt_cache: list[Any]) -> list[tuple[Any, list[Any]]]:
        """Return each model with its own part of a prompt cache."""
        if self.draft_model is None:
            return [(self.model, prompt_cache)]
        num_layers = len(self.model.layers)  # which is where mlx-lm divides it
        return [
            (self.model, prompt_cache[:num_layers]),
            (self.draft_model, prompt_cache[num_layers:]),
        ]


def find_model(model: str) -> Path:
    """Return the folder of a model, downloaded where mlx-lm would download it.

    Raises:
        KVStoreError: It is neither a folder nor a repository on the Hugging Face Hub.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise KVStoreError(
            f"not a model folder: `{model}`",
            hint="give the folder that holds `config.json`",
        )
    # What `mlx_lm.load` itself asks where the weights are.
    from mlx_lm.utils import _download

    try:
        return Path(_download(model))
    except (OSError, ValueError) as error:
        raise KVStoreError(
            f"no model `{model}`: no such folder, and no such repository can be had",
            hint="give a folder or a Hugging Face repository that mlx-lm loads",
        ) from error


def load_model(
    model: str,
    adapter_path: str | None = None,
    *,
    trust_remote_code: bool = False,
    lazy: bool = False,
) -> tuple[Any, Any, Fingerprint]:
    """Load a model as mlx-lm does, with its tokenizer, and return its fingerprint too.

    The arguments are those of :func:`load_models`.

    Raises:
        KVStoreError: There is no such model, or mlx-lm cannot load it.
    """
    # Once, so that what is hashed is what is loaded: a repository may move on.
    path = str(find_model(model))
    fingerprint = replace(fingerprint_model(path, adapter_path), label=model)
    import mlx_lm

    load: Any = mlx_lm.load
    try:
        loaded, tokenizer, *_ = load(
            path,
            adapter_path=adapter_path,
            tokenizer_config={"trust_remote_code": trust_remote_code},
            lazy=lazy,
            **_trust(path, trust_remote_code),
        )
    # MLX raises a RuntimeError for weights that are cut off.
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise _cannot_load(model, error) from error
    return loaded, _quiet(tokenizer), fingerprint


def load_models(
    model: str,
    adapter_path: str | None = None,
    draft_model: str | None = None,
    *,
    trust_remote_code: bool = False,
    lazy: bool = False,
) -> LoadedModel:
    """Load a model and, if one is named, a draft model for it.

    Args:
        model: A folder, or a repository on the Hugging Face Hub.
        adapter_path: Folder with an adapter's weights and configuration.
        draft_model: As ``model``; ``None`` for none.
        trust_remote_code: Let models and tokenizers bring code of their own.
        lazy: Read the weights when they are used.

    Raises:
        KVStoreError: There is no such model, mlx-lm cannot load it, or the draft model
            has another vocabulary.
    """
    loaded, tokenizer, fingerprint = load_model(
        model, adapter_path, trust_remote_code=trust_remote_code, lazy=lazy
    )
    length = read_context_length(find_model(model))
    if draft_model is None:
        return LoadedModel(loaded, tokenizer, fingerprint, None, length)
    draft, theirs, drafted = load_model(
        draft_model, trust_remote_code=trust_remote_code, lazy=lazy
    )
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise KVStoreError(
            f"the draft model `{draft_model}` has another vocabulary than `{model}`",
            hint="give a smaller model of the same family",
        )
    both = fingerprint.with_draft(drafted)
    return LoadedModel(loaded, tokenizer, both, draft, length)


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer alone.

    Raises:
        KVStoreError: There is no such model, or mlx-lm cannot load its tokenizer.
    """
    path = find_model(model)
    from mlx_lm import utils

    try:
        load: Any = utils.load_tokenizer
        return _quiet(load(path, {"trust_remote_code": trust_remote_code}))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _cannot_load(model, error) from error


def _quiet(tokenizer: Any) -> Any:
    """Return a tokenizer that does not speak of errors where a text is long."""
    # So transformers notes that it has warned; `context` does, and says what it means.
    noted = getattr(tokenizer, "deprecation_warnings", None)
    if isinstance(noted, dict):
        noted["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def fingerprint_model(
    model: str, adapter_path: str | None = None, draft_model: str | None = None
) -> Fingerprint:
    """Return a model's fingerprint, labelled with the name it was given by.

    The arguments are those of :func:`load_models`.

    Raises:
        KVStoreError: There is no such model or adapter.
    """
    fingerprint = Fingerprint.from_path(find_model(model), adapter_path)
    if draft_model is not None:
        fingerprint = fingerprint.with_draft(fingerprint_model(draft_model))
    return replace(fingerprint, label=model)


def _trust(model: str, trust_remote_code: bool) -> dict[str, bool]:
    """Return the argument that lets ``mlx_lm.load`` run a model's own code."""
    from mlx_lm import load

    if "trust_remote_code" in inspect.signature(load).parameters:
        return {"trust_remote_code": trust_remote_code}
    # mlx-lm 0.31 has no such argument and runs whatever the configuration names.
    config = read_json(find_model(model) / "config.json")
    if "model_file" in config and not trust_remote_code:
        raise ValueError(f"it brings code of its own: {config['model_file']!r}")
    return {}


def _cannot_load(model: str, error: Exception) -> KVStoreError:
    return KVStoreError(
        f"mlx-lm cannot load `{model}`: {error}",
        hint="`kvstore doctor --model` says more; give a model that"
        " `mlx_lm.generate --model` loads",
    )


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

    from ..caches.mlx_files import open_cache_file

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
    """Whether two names mean one model; nothing is downloaded for it."""
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
