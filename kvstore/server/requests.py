"""Requests of the API: what is refused, and the tokens that the server makes of one."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from ..errors import KVStoreError
from ..format.documents import JSON


def check_body(path: str, body: JSON) -> None:
    """Refuse a request whose prompt or stop words are of a kind that mlx-lm cannot use.

    Args:
        path: Where it was posted.
        body: What was posted.

    Raises:
        ValueError: It says which field.
    """
    is_chat = path.endswith("chat/completions")
    # In mlx-lm's own words, where it has some.
    if is_chat and "messages" not in body:
        raise ValueError("Request did not contain messages")
    if not is_chat and "prompt" not in body:
        raise ValueError("Request did not contain a prompt")
    if not is_chat and not isinstance(body["prompt"], str):
        raise ValueError("prompt must be a string")
    stop = body.get("stop") or []
    words = stop if isinstance(stop, list) else [stop]
    if not all(isinstance(word, str) and word for word in words):
        raise ValueError("stop must be a string or a list of strings, none empty")


def encode_request(
    tokenizer: Any, body: JSON, *, chat_template_args: JSON | None = None
) -> list[int]:
    """Return the prompt of a request, made by mlx-lm's own server.

    Args:
        tokenizer: The model's, from mlx-lm.
        body: What a client posts to ``/v1/chat/completions``, or, without
            ``messages``, to ``/v1/completions``.
        chat_template_args: What the server was given as ``--chat-template-args``.

    Raises:
        KVStoreError: The server would refuse it, or it has images.
    """
    body = copy.deepcopy(body)  # mlx-lm changes the messages
    is_chat = "messages" in body
    try:
        check_body("chat/completions" if is_chat else "completions", body)
        tokens = _tokenize(tokenizer, body, is_chat, chat_template_args or {})
    except (
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise _refused(error) from error
    except Exception as error:
        # A chat template raises what it likes, of a class that jinja2 has.
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise _refused(error) from error
    if not all(isinstance(token, int) for token in tokens):
        raise _refused(ValueError("the prompt is no list of tokens"))
    return list(tokens)


def _tokenize(
    tokenizer: Any, body: JSON, is_chat: bool, chat_template_args: JSON
) -> list[int]:
    from mlx_lm import server

    request = server.CompletionRequest(
        "chat" if is_chat else "text",
        "" if is_chat else body["prompt"],
        body["messages"] if is_chat else [],
        body.get("tools") or None,
        body.get("role_mapping"),
    )
    # All that it asks of the server.
    options = SimpleNamespace(chat_template_args=chat_template_args)
    provider = SimpleNamespace(cli_args=options, processor=None)
    stub = SimpleNamespace(model_provider=provider)
    arguments = SimpleNamespace(chat_template_kwargs=body.get("chat_template_kwargs"))
    tokenize: Any = server.ResponseGenerator._tokenize
    tokens: list[int] = tokenize(stub, tokenizer, request, arguments)[0]
    return tokens


def _refused(error: Exception) -> KVStoreError:
    return KVStoreError(
        f"the server would refuse this request: {type(error).__name__}: {error}",
        hint="give what a client posts to `/v1/chat/completions`, as JSON, without"
        " images",
    )
