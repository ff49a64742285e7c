"""Models, tokenizers, prompts and cache files as mlx-lm has them. Knows no store.

mlx-lm takes a second to import, so each function imports what it needs of it.
"""

from __future__ import annotations

import inspect
import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from . import files
from .errors import KVStoreError
from .fingerprint import Fingerprint
from .types import JSON

# Stand for what was said while a chat template is rendered.
_QUERY, _REPLY, _WORDS = "<query>", "<reply>", "<words>"
_ASKED = {"role": "user", "content": _QUERY}
_REPLIED = {"role": "assistant", "content": _REPLY}
# More than any vocabulary has, and less than a tokenizer can be asked for.
_MAX_TOKEN = 2**31


def find_model(model: str) -> Path:
    """Return the folder of a model, downloaded where mlx-lm would download it.

    Args:
        model: A folder, or a repository on the Hugging Face Hub.

    Raises:
        KVStoreError: There is no such model.
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
    """Load a model as mlx-lm does.

    Args:
        model: A folder, or a repository on the Hugging Face Hub.
        adapter_path: Folder with an adapter's weights and configuration.
        trust_remote_code: Let the model and its tokenizer bring code of their own.
        lazy: Read the weights when they are used.

    Returns:
        The model, its tokenizer, and its fingerprint.

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
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _cannot_load(model, error) from error
    return loaded, tokenizer, fingerprint


def load_models(
    model: str,
    adapter_path: str | None = None,
    draft_model: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> tuple[Any, Any, Any, Fingerprint]:
    """Load a model and, if one is named, a draft model for it.

    Args:
        model: A folder, or a repository on the Hugging Face Hub.
        adapter_path: Folder with an adapter's weights and configuration.
        draft_model: As ``model``; ``None`` for none.
        trust_remote_code: Let models and tokenizers bring code of their own.

    Returns:
        The model, its tokenizer, the draft model or ``None``, and the fingerprint of
        both together.

    Raises:
        KVStoreError: There is no such model, mlx-lm cannot load it, or the draft model
            has another vocabulary.
    """
    loaded, tokenizer, fingerprint = load_model(
        model, adapter_path, trust_remote_code=trust_remote_code
    )
    if draft_model is None:
        return loaded, tokenizer, None, fingerprint
    draft, theirs, drafted = load_model(
        draft_model, trust_remote_code=trust_remote_code
    )
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise KVStoreError(
            f"the draft model `{draft_model}` has another vocabulary than `{model}`",
            hint="give a smaller model of the same family",
        )
    return loaded, tokenizer, draft, fingerprint.with_draft(drafted)


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer alone.

    Raises:
        KVStoreError: There is no such model, or mlx-lm cannot load its tokenizer.
    """
    path = find_model(model)
    from mlx_lm import utils

    try:
        load: Any = utils.load_tokenizer
        return load(path, {"trust_remote_code": trust_remote_code})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _cannot_load(model, error) from error


def fingerprint_model(
    model: str, adapter_path: str | None = None, draft_model: str | None = None
) -> Fingerprint:
    """Return a model's fingerprint, labelled with the name it was given by.

    Args:
        model: A folder, or a repository on the Hugging Face Hub.
        adapter_path: Folder with an adapter's weights and configuration.
        draft_model: The same of a draft model, whose caches follow the model's.

    Raises:
        KVStoreError: There is no such model or adapter.
    """
    fingerprint = Fingerprint.from_path(find_model(model), adapter_path)
    if draft_model is not None:
        fingerprint = fingerprint.with_draft(fingerprint_model(draft_model))
    return replace(fingerprint, label=model)


def encode_prompt(
    tokenizer: Any,
    prompt: str,
    *,
    system_prompt: str | None = None,
    chat_template_config: JSON | None = None,
    ignore_chat_template: bool = False,
    is_open: bool = False,
    is_literal: bool = False,
) -> list[int]:
    """Return the tokens of the first message of a conversation.

    Args:
        tokenizer: The model's, from mlx-lm.
        prompt: What the user says.
        system_prompt: What the system says before.
        chat_template_config: More variables for the chat template.
        ignore_chat_template: Take the prompt as plain text.
        is_open: Leave the message open, as ``mlx_lm.cache_prompt`` does, so that
            more can be added to it; else the reply comes next.
        is_literal: What the user says makes no special tokens, whatever it contains.

    Raises:
        ValueError: There is a system prompt and no chat template.
    """
    if not _has_template(tokenizer, ignore_chat_template):
        if system_prompt is not None:
            raise ValueError("a system prompt needs a chat template, and none is used")
        return list(tokenizer.encode(prompt))
    before: JSON = {"role": "system", "content": system_prompt}

    def render(words: str) -> str:
        messages: list[JSON] = [{"role": "user", "content": words}]
        messages = messages if system_prompt is None else [before, *messages]
        return _render(tokenizer, messages, chat_template_config, is_open=is_open)

    return _encode(tokenizer, render, prompt, is_literal)


def encode_continuation(
    tokenizer: Any,
    prompt: str,
    tokens: Sequence[int],
    *,
    chat_template_config: JSON | None = None,
    ignore_chat_template: bool = False,
    is_literal: bool = False,
) -> list[int]:
    """Return the tokens that a prompt adds behind those of a conversation.

    Where the conversation ends with a reply, that is closed and a message of the user
    follows. Where it ends inside a message, the prompt goes on with that, as with
    ``mlx_lm.generate --prompt-cache-file``.

    Args:
        tokenizer: The model's, from mlx-lm.
        prompt: What the user says.
        tokens: The conversation so far.
        chat_template_config: More variables for the chat template.
        ignore_chat_template: Take the prompt as plain text.
        is_literal: What the user says makes no special tokens, whatever it contains.

    Raises:
        ValueError: The chat template leaves out parts of a conversation.
    """
    if not _has_template(tokenizer, ignore_chat_template):
        return list(tokenizer.encode(prompt, add_special_tokens=False))
    config = chat_template_config
    is_replied = has_reply(tokenizer, tokens, chat_template_config=config)

    def render(words: str) -> str:
        query = {"role": "user", "content": words}
        if is_replied:
            conversation = _render(tokenizer, [_ASKED, _REPLIED, query], config)
            return _around(_REPLY, conversation)[1]
        before, _ = _around(_QUERY, _render(tokenizer, [_ASKED], config))
        return _render(tokenizer, [query], config)[len(before) :]

    added = _encode(tokenizer, render, prompt, is_literal)
    # The model ended its reply itself, with the token that the template would add.
    is_closed = tokens and tokens[-1] in tokenizer.eos_token_ids
    return added[1:] if is_closed and added[:1] == [tokens[-1]] else added


def has_reply(
    tokenizer: Any,
    tokens: Sequence[int],
    *,
    chat_template_config: JSON | None = None,
) -> bool:
    """Say whether there is a reply in a conversation, or an open message at most.

    Args:
        tokenizer: The model's, from mlx-lm, with a chat template.
        tokens: The conversation.
        chat_template_config: More variables for the chat template.

    Raises:
        ValueError: The chat template leaves out parts of a conversation.
    """
    config = chat_template_config
    conversation = _render(tokenizer, [_ASKED, _REPLIED, _ASKED], config)
    header, _ = _around(_REPLY, _around(_QUERY, conversation)[1])
    _, after = _around(_QUERY, _render(tokenizer, [_ASKED], config))
    # Some templates begin a reply with more, such as `<think>`, than they repeat later.
    begin = _common_prefix(header, after).strip()
    # Some stand for no text, such as those of images, and a tokenizer refuses them.
    spelled = [token for token in tokens if 0 <= token < _MAX_TOKEN]
    return bool(begin) and begin in tokenizer.decode(spelled)


def check_cache_path(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a path that :func:`write_prompt_cache` could not write to.

    Args:
        path: Where; the name ends in ``.safetensors``.
        overwrite: Replace a file that is there.

    Raises:
        KVStoreError: There is a file, or no folder, or the name has another ending.
    """
    if path.suffix != ".safetensors":
        # mlx-lm tells the format by it.
        raise KVStoreError(
            f"not a name for a safetensors file: `{path}`",
            hint="end it in `.safetensors`",
        )
    if path.exists() and not overwrite:
        raise KVStoreError(
            f"there is a file already: `{path}`", hint="`--overwrite` replaces it"
        )
    if not path.parent.is_dir():
        raise KVStoreError(
            f"no such folder: `{path.parent}`", hint="make it, or choose another"
        )


def write_prompt_cache(
    path: Path, prompt_cache: Sequence[Any], model: str, *, overwrite: bool = False
) -> int:
    """Write the file that ``mlx_lm.generate --prompt-cache-file`` reads.

    It appears whole or not at all, and only its owner can read it.

    Args:
        path: Where; the name ends in ``.safetensors``.
        prompt_cache: mlx-lm's list of per-layer caches.
        model: What mlx-lm is to load the model by.
        overwrite: Replace a file that is there.

    Returns:
        Its size in bytes.

    Raises:
        KVStoreError: There is a file, or the name has another ending.
        OSError: It cannot be written.
    """
    check_cache_path(path, overwrite=overwrite)
    from mlx_lm.models.cache import save_prompt_cache

    metadata = {"model": model, "tokenizer_config": "{}"}
    staged = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.safetensors")
    descriptor = files.create(staged)
    try:
        save_prompt_cache(str(staged), _readable(prompt_cache), metadata)
        files.sync(descriptor)
        nbytes = os.fstat(descriptor).st_size
        files.publish(staged, path)
    finally:
        os.close(descriptor)
        staged.unlink(missing_ok=True)
    return nbytes


def _readable(prompt_cache: Sequence[Any]) -> list[Any]:
    """Return caches of mlx-lm's own classes, with live codes decoded."""
    # mlx-lm finds a class by its name, among its own only.
    return [
        cache.to_kv_cache() if hasattr(cache, "to_kv_cache") else cache
        for cache in prompt_cache
    ]


def _trust(model: str, trust_remote_code: bool) -> dict[str, bool]:
    """Return the argument that lets ``mlx_lm.load`` run a model's own code.

    Raises:
        ValueError: mlx-lm would run such code without being asked.
    """
    from mlx_lm import load

    if "trust_remote_code" in inspect.signature(load).parameters:
        return {"trust_remote_code": trust_remote_code}
    # mlx-lm 0.31 has no such argument and runs whatever the configuration names.
    config = json.loads((find_model(model) / "config.json").read_text())
    if "model_file" in config and not trust_remote_code:
        raise ValueError(f"it brings code of its own: {config['model_file']!r}")
    return {}


def _cannot_load(model: str, error: Exception) -> KVStoreError:
    return KVStoreError(
        f"mlx-lm cannot load `{model}`: {error}",
        hint="give a model that `mlx_lm.generate --model` loads",
    )


def _has_template(tokenizer: Any, ignore_chat_template: bool) -> bool:
    return bool(tokenizer.has_chat_template) and not ignore_chat_template


def _encode(
    tokenizer: Any, render: Callable[[str], str], words: str, is_literal: bool
) -> list[int]:
    """Return the tokens of a rendered text with the user's words in it."""

    def plain(piece: str) -> list[int]:
        return list(tokenizer.encode(piece, add_special_tokens=False))

    text = render(words)
    if is_literal and any(mark in words for mark in _special_texts(tokenizer)):
        before, after = _around(_WORDS, render(_WORDS))
        # Some templates strip what was said.
        for said in (words, words.strip()):
            if before + said + after == text:
                literal = tokenizer.encode(
                    said, add_special_tokens=False, split_special_tokens=True
                )
                return [*plain(before), *literal, *plain(after)]
    return plain(text)


def _special_texts(tokenizer: Any) -> list[str]:
    """Return the texts that a tokenizer takes for special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return [str(token) for token in added if token.special]


def _render(
    tokenizer: Any,
    messages: Sequence[JSON],
    config: JSON | None,
    *,
    is_open: bool = False,
) -> str:
    """Return a conversation as text, the last message open or a reply to come.

    Raises:
        KVStoreError: The chat template refuses it.
    """
    from jinja2 import TemplateError

    options = {"add_generation_prompt": not is_open, "continue_final_message": is_open}
    options |= config or {}
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), **{**options, "tokenize": False}
            )
        )
    except TemplateError as error:
        raise KVStoreError(
            f"the chat template refuses this conversation: {error}",
            hint="`--ignore-chat-template` takes the prompt as plain text",
        ) from error


def _around(marker: str, text: str) -> tuple[str, str]:
    """Return what stands before and behind the marker.

    Raises:
        ValueError: The chat template has left it out.
    """
    before, found, after = text.partition(marker)
    if not found:
        raise ValueError("the chat template leaves out parts of a conversation")
    return before, after


def _common_prefix(left: str, right: str) -> str:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    return "".join(letter for letter, _ in same)
