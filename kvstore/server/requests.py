"""Requests of the API: what is refused, and the tokens that the server makes of one."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from ..errors import KVStoreError
from ..format.documents import JSON


class BadRequestError(ValueError):
    """A request that cannot be served as it is."""


def check_body(path: str, body: JSON) -> None:
    """Refuse a request whose prompt or stop words are of a kind that mlx-lm cannot use.

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
    if not isinstance(body.get("stream_options") or {}, dict):
        raise ValueError("stream_options must be an object")


def check_choice(model: Any, args: Any) -> None:
    """Refuse a request whose next token cannot be chosen as it asks.

    MLX writes the bias of a token that is none to memory of something else, and ends.

    Raises:
        BadRequestError: It says what is wrong.
    """
    bias, sampling = args.logits.logit_bias or (), args.sampling
    top_k = sampling.top_k if sampling.temperature else 0
    if args.seed is not None and not 0 <= args.seed < 1 << 64:
        raise BadRequestError("seed must be from 0 to 2^64 - 1")
    if sampling.xtc_probability and sampling.xtc_threshold > 0.5:
        raise BadRequestError("xtc_threshold must be at most 0.5")
    if not bias and not top_k:
        return
    size = model(mx.array([[0]])).shape[-1]  # nothing is computed for it
    if not all(0 <= token < size for token in bias):
        raise BadRequestError(f"logit_bias must be of tokens from 0 to {size - 1}")
    if top_k >= size:
        raise BadRequestError(f"top_k must be less than {size}")


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
