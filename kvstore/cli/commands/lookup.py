"""The verb lookup."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from ...format.chain import common_run
from .. import options
from ..main import Verb, open_store, output_of
from ..options import ModelOptions, PromptOptions, option
from ..output import format_count

if TYPE_CHECKING:
    from ...fingerprint import Fingerprint
    from ...format.documents import JSON
    from ...ops.explain import Divergence, Explanation, OtherModel
    from ...ops.load import Match
    from ...store import Store

Decode = Callable[[Sequence[int]], str]
Text = dict[str, str]
"""The text around a token: ``before`` it, its own, and ``after`` it."""


@click.command(cls=Verb)
@options.model_options
@options.prompt_options
@options.request
@option(
    "--explain",
    help="Look through all that is stored: show the first token that differs with the"
    " text around it, or the field of the model that does; and each line that differs"
    " from the nearest stored prompt, what that costs and what to change.",
)
@click.pass_context
def lookup(
    context: click.Context,
    model: ModelOptions,
    prompt: PromptOptions,
    request: BinaryIO | None,
    explain: bool,
) -> None:
    """Say how much of a prompt the store holds, and why not more.

    The prompt is taken as `generate` without a name takes it, a request as `serve`
    does. No weights are loaded.
    """
    output = output_of(context)
    model = model.chosen(context)
    source = options.read_source(prompt, request)
    store = open_store(context)
    tokens, fingerprint, tokenizer = prompt_tokens(model, prompt, source)
    if not explain:
        match = store.lookup(tokens, fingerprint)
        output.result(_describe(match), asdict(match), [str(match.num_tokens)])
        return
    found = store.explain(tokens, fingerprint)
    sides = _sides(found.divergence, tokenizer) if found.divergence else None
    nearest = _nearest(store, tokens, fingerprint, tokenizer)
    lines = [_describe(found.match), *_explain(found, sides), *_tell(nearest)]
    data = {
        **asdict(found.match),
        "explanation": _data(found, sides),
        "nearest": nearest,
    }
    output.result("\n".join(lines), data, [str(found.match.num_tokens)])


def prompt_tokens(
    model: ModelOptions, prompt: PromptOptions, source: str | JSON
) -> tuple[list[int], Fingerprint, Any]:
    """Return a prompt's tokens, its model's fingerprint, and the tokenizer.

    They are those of `generate`; no weights are loaded.
    """
    from ...models.load import load_tokenizer

    fingerprint = model.fingerprint()
    tokenizer = load_tokenizer(model.model, trust_remote_code=model.trust_remote_code)
    tokens = options.encode_source(tokenizer, source, prompt)
    return tokens, fingerprint, tokenizer


def _around(tokens: Sequence[int], at: int, decode: Decode) -> Text:
    """Return the text of tokens, cut around one of them.

    A character may have bytes of several tokens, and some tokenizers drop the space
    before a first token, so all is decoded from the start.
    """
    before, through, whole = (decode(tokens[:n]) for n in (at, at + 1, None))
    start, end = common_run(before, through), common_run(through, whole)
    return {"before": before[:start], "token": through[start:], "after": whole[end:]}


def _sides(divergence: Divergence, tokenizer: Any) -> tuple[Text, Text]:
    """Return the text of what is stored, and of what is given in its place."""
    at, decode = divergence.position - divergence.start, partial(_decode, tokenizer)
    stored = _around(divergence.stored, at, decode)
    return stored, _around(divergence.given, at, decode)


def _nearest(
    store: Store, tokens: Sequence[int], fingerprint: Fingerprint, tokenizer: Any
) -> JSON | None:
    """Return what is stored that is most like a prompt, and where the prompt differs.

    Each change has the seconds that computing what stands behind it takes, if known.
    """
    from ...models.changes import find_changes

    found = store.nearest(tokens, fingerprint)
    if found is None:
        return None
    entry, stored = found
    speeds = store.speeds(fingerprint)
    changes = [
        {
            **asdict(change),
            "advice": change.advice,
            "prefill_s": speeds.prefill_s(change.num_behind),
        }
        for change in find_changes(stored, tokens, partial(_decode, tokenizer))
    ]
    name = entry.name or entry.id
    return {"entry": name, "num_tokens": entry.num_tokens, "changes": changes}


def _tell(nearest: JSON | None) -> list[str]:
    if nearest is None or not nearest["changes"]:
        return []
    tokens = format_count(nearest["num_tokens"], "token")
    lines = [f"compared with `{_visible(nearest['entry'])}`, {tokens}:"]
    for change in nearest["changes"]:
        behind, seconds = (
            format_count(change["num_behind"], "token"),
            change["prefill_s"],
        )
        took = "" if seconds is None else f", {seconds:.1f} s"
        lines += [
            f"line {change['line']:,}, token {change['position']:,}: {behind} behind it"
            f" are the same, and computed again{took}",
            f"  stored: {_visible(change['stored'])}",
            f"  given:  {_visible(change['given'])}",
            f"  change: {change['advice']}",
        ]
    return lines


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of tokens; those that the tokenizer refuses as numbers."""
    try:
        return str(tokenizer.decode(list(tokens)))
    except (OverflowError, ValueError, TypeError, LookupError):
        if len(tokens) == 1:
            return f"<{tokens[0]}>"
        return "".join(_decode(tokenizer, [token]) for token in tokens)


def _visible(text: str) -> str:
    """Return text in one line: line ends and the like as they are written in code."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _describe(match: Match) -> str:
    total = format_count(match.num_prompt_tokens, "token")
    return f"{match.num_tokens:,} of {total} held: {match.reason}: {match.detail}"


def _explain(found: Explanation, sides: tuple[Text, Text] | None) -> list[str]:
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


def _explain_divergence(divergence: Divergence, sides: tuple[Text, Text]) -> list[str]:
    at = divergence.position - divergence.start
    entry = f" in `{_visible(divergence.entry)}`" if divergence.entry else ""
    return [
        f"token {divergence.position:,}: stored {divergence.stored[at]}{entry},"
        f" given {divergence.given[at]}",
        f"stored: {_marked(**sides[0])}",
        f"given:  {_marked(**sides[1])}",
    ]


def _marked(before: str, token: str, after: str) -> str:
    return f"…{_visible(before)}⟦{_visible(token)}⟧{_visible(after)}…"


def _explain_other(other: OtherModel) -> str:
    model = f" of {_visible(other.model)}" if other.model else ""
    entry = f"`{_visible(other.entry)}`{model}" if other.entry else "something"
    # Of another tokenizer's tokens it has none, which says nothing of the text.
    tokens = format_count(other.num_tokens, "token")
    has = f" has {tokens} of the prompt, and" if other.num_tokens else ""
    return f"not usable: {entry}{has} differs in {_visible(other.difference)}"


def _data(found: Explanation, sides: tuple[Text, Text] | None) -> JSON:
    data = asdict(found)
    del data["match"]
    if sides is not None:
        data["divergence"] |= {"stored_text": sides[0], "given_text": sides[1]}
    return data
