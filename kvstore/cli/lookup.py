"""The verb lookup."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import click

from .main import Verb, open_store, output_of
from .options import (
    ModelOptions,
    PromptOptions,
    gathered,
    model_options,
    prompt_options,
)
from .output import format_count

if TYPE_CHECKING:
    from ..fingerprint import Fingerprint
    from ..format.documents import JSON
    from ..ops.explain import Divergence, Explanation, OtherModel
    from ..ops.load import Match

Decode = Callable[[Sequence[int]], str]


@click.command(cls=Verb)
@model_options
@prompt_options
@click.option(
    "--explain",
    is_flag=True,
    help="Look through all that is stored: show the first token that differs with the"
    " text around it, or the field of the model that does.",
)
@click.pass_context
@gathered("model", ModelOptions)
@gathered("prompt", PromptOptions)
def lookup(
    context: click.Context, model: ModelOptions, prompt: PromptOptions, explain: bool
) -> None:
    """Say how much of a prompt the store holds, and why not more.

    The prompt is taken as `generate` without a name takes it. No weights are loaded.
    """
    output = output_of(context)
    text = prompt.read()
    store = open_store(context)
    tokens, fingerprint, tokenizer = prompt_tokens(model, prompt, text)
    if not explain:
        match = store.lookup(tokens, fingerprint)
        output.result(_describe(match), asdict(match), [str(match.num_tokens)])
        return
    found = store.explain(tokens, fingerprint)
    sides = _Sides.of(found.divergence, tokenizer) if found.divergence else None
    lines = [_describe(found.match), *_explain(found, sides)]
    data = {**asdict(found.match), "explanation": _data(found, sides)}
    output.result("\n".join(lines), data, [str(found.match.num_tokens)])


def prompt_tokens(
    model: ModelOptions, prompt: PromptOptions, text: str
) -> tuple[list[int], Fingerprint, Any]:
    """Return a prompt's tokens, as `generate` takes them, without loading weights.

    Args:
        model: The model.
        prompt: How the prompt is rendered.
        text: The prompt.

    Returns:
        The tokens, the model's fingerprint and its tokenizer.
    """
    from ..models.load import fingerprint_model, load_tokenizer
    from ..models.templates import encode_prompt

    fingerprint = fingerprint_model(model.model, model.adapter_path)
    tokenizer = load_tokenizer(model.model, trust_remote_code=model.trust_remote_code)
    tokens = encode_prompt(
        tokenizer,
        text,
        system_prompt=prompt.system_prompt,
        chat_template_config=prompt.chat_template_config,
        ignore_chat_template=prompt.ignore_chat_template,
    )
    return tokens, fingerprint, tokenizer


@dataclass(frozen=True, slots=True)
class _Text:
    """The text around a token: before it, its own, and behind it."""

    before: str
    token: str
    after: str

    @classmethod
    def of(cls, tokens: Sequence[int], at: int, decode: Decode) -> _Text:
        """Return the text of tokens, cut around one of them.

        A character may have bytes of several tokens, and some tokenizers drop the
        space before a first token, so all is decoded from the start.
        """
        before, through, whole = (decode(tokens[:n]) for n in (at, at + 1, None))
        shared = _common(before, through)
        return cls(
            shared, through[len(shared) :], whole[len(_common(through, whole)) :]
        )

    def __str__(self) -> str:
        return (
            f"…{_visible(self.before)}⟦{_visible(self.token)}⟧{_visible(self.after)}…"
        )


@dataclass(frozen=True, slots=True)
class _Sides:
    """Both sides of a divergence as text."""

    stored: _Text
    given: _Text

    @classmethod
    def of(cls, divergence: Divergence, tokenizer: Any) -> _Sides:
        """Return the text of both sides."""

        def decode(tokens: Sequence[int]) -> str:
            return _decode(tokenizer, tokens)

        at = divergence.position - divergence.start
        stored = _Text.of(divergence.stored, at, decode)
        return cls(stored, _Text.of(divergence.given, at, decode))


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of tokens; those that the tokenizer refuses as numbers."""
    try:
        return str(tokenizer.decode(list(tokens)))
    except (OverflowError, ValueError, TypeError, LookupError):
        if len(tokens) == 1:
            return f"<{tokens[0]}>"
        return "".join(_decode(tokenizer, [token]) for token in tokens)


def _common(left: str, right: str) -> str:
    """Return how two texts begin alike."""
    pairs = zip(left, right, strict=False)
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _visible(text: str) -> str:
    """Return text in one line: line ends and the like as they are written in code."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _describe(match: Match) -> str:
    total = format_count(match.num_prompt_tokens, "token")
    return f"{match.num_tokens:,} of {total} held: {match.reason}: {match.detail}"


def _explain(found: Explanation, sides: _Sides | None) -> list[str]:
    """Return what is to be told beside the match."""
    lines = []
    if found.damage is not None:
        lines.append(f"damage: {_visible(found.damage)}")
    if found.divergence is not None and sides is not None:
        lines += _explain_divergence(found.divergence, sides)
    elif found.num_common:
        holder = f"`{_visible(found.entry)}`" if found.entry else "no entry"
        tokens = format_count(found.num_common, "token")
        lines.append(f"stored: {tokens} of the prompt, held by {holder}")
    if found.other is not None:
        lines.append(_explain_other(found.other))
    return lines


def _explain_divergence(divergence: Divergence, sides: _Sides) -> list[str]:
    at = divergence.position - divergence.start
    entry = f" in `{_visible(divergence.entry)}`" if divergence.entry else ""
    return [
        f"token {divergence.position:,}: stored {divergence.stored[at]}{entry},"
        f" given {divergence.given[at]}",
        f"stored: {sides.stored}",
        f"given:  {sides.given}",
    ]


def _explain_other(other: OtherModel) -> str:
    model = f" of {_visible(other.model)}" if other.model else ""
    entry = f"`{_visible(other.entry)}`{model}" if other.entry else "something"
    # Of another tokenizer's tokens it has none, which says nothing of the text.
    tokens = format_count(other.num_tokens, "token")
    has = f" has {tokens} of the prompt, and" if other.num_tokens else ""
    return f"not usable: {entry}{has} differs in {_visible(other.difference)}"


def _data(found: Explanation, sides: _Sides | None) -> JSON:
    data = asdict(found)
    del data["match"]
    if sides is not None:
        data["divergence"] |= {
            "stored_text": asdict(sides.stored),
            "given_text": asdict(sides.given),
        }
    return data
