"""What a model has sampled, in the place of what a chat template makes of it again.

A client sends each reply back as text, or as a parsed tool call. The template renders
it, and the tokenizer splits it, as they like: other tokens than the model has sampled,
whose rows are held. Where the reply is the same, the sampled tokens are put back.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice
from typing import Any

from ..models.templates import places

Read = Callable[[str], tuple[str, list[Any], str]]
"""What a client is sent of a reply's text: content, tool calls, and reasoning."""
_MAX_KNOWN = 64
# So many tokens before a reply tell it from others, where the beginning is another.
_CONTEXT = 64


class Sampled:
    """The latest conversations of a model, as tokens, those that go on only once."""

    def __init__(self, known: Iterable[Sequence[int]] = ()) -> None:
        self._known = [array("q", tokens) for tokens in islice(known, _MAX_KNOWN)]

    def add(self, tokens: Sequence[int]) -> None:
        """Note a conversation."""
        new = array("q", tokens)
        kept = [old for old in self._known if old != new[: len(old)]]
        self._known = [new, *kept][:_MAX_KNOWN]

    def latest(self) -> list[array[int]]:
        """Return them, the latest first."""
        return list(self._known)


def replay(
    tokenizer: Any,
    prompt: Sequence[int],
    messages: Sequence[Any],
    known: Iterable[array[int]],
    read: Read | None = None,
    *,
    near: bool = False,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return a prompt with the sampled tokens of the replies in it.

    Args:
        tokenizer: The model's, from mlx-lm.
        prompt: As the chat template renders it; it ends where a reply begins.
        messages: What it was rendered from.
        known: Conversations, as :class:`Sampled` has them.
        read: How tool calls are read, where the model has any.
        near: Rows behind other words are of use: of what comes before a reply, the
            last tokens decide whether it is the same one.

    Returns:
        The prompt, and for each reply where it ends in the given one, and by how many
        tokens it has become longer.
    """
    ends = tokenizer.eos_token_ids
    replies = _replies(prompt, ends)
    said = [message for message in messages if message.get("role") == "assistant"]
    made, edits, done, seen = array("q"), [], 0, 0
    known = same = list(known)
    like: Sequence[array[int]] = ()
    # A reply that cannot be told from what else is rendered could be any other's.
    pairs = zip(replies, said, strict=True) if len(replies) == len(said) else ()
    for (begin, end), message in pairs:
        made.extend(prompt[done:begin])
        same = [one for one in same if one[seen : len(made)] == made[seen:]]
        if not same and not near:
            done = begin
            break
        rendered = array("q", prompt[begin:end])
        starts = [(one, len(made)) for one in same]
        if not same:
            # What went on like it before first.
            starts = _behind(made[-_CONTEXT:], like) or _behind(made[-_CONTEXT:], known)
            like = [one for one, _ in starts] or like
        found = (_reply(one, start, ends) for one, start in starts)
        fits = (_fitting(tokenizer, rendered, s, message, read) for s in found if s)
        reply = next((fit for fit in fits if fit is not None), rendered)
        seen = len(made)
        made.extend(reply)
        edits.append((end, len(reply) - len(rendered)))
        done = end
    made.extend(prompt[done:])
    return made.tolist(), edits


def cut_again(
    segments: Sequence[Sequence[int]],
    prompt: list[int],
    edits: Sequence[tuple[int, int]],
) -> list[list[int]] | None:
    """Return a prompt cut where it was before; ``None`` where that leaves a part empty.

    In a reply that has changed, it is cut behind as many tokens as before.
    """
    found, begin, stop = [], 0, 0
    old = sum(map(len, segments)) + sum(longer for _, longer in edits)
    if old != len(prompt):
        return None
    for segment in segments:
        stop += len(segment)
        end = stop + sum(longer for at, longer in edits if at <= stop)
        found.append(prompt[begin:end])
        begin = end
    return found if all(found) else None


def _replies(prompt: Sequence[int], ends: Collection[int]) -> list[tuple[int, int]]:
    """Return where each reply in a prompt begins, and where the token is that ends it.

    What stands behind the last such token is how the template opens a reply.
    """
    stops = [place for place, token in enumerate(prompt) if token in ends]
    opening = prompt[stops[-1] + 1 :] if stops else ()
    if not opening:
        return []
    known = set(stops)
    begins = [p + len(opening) for p in places(opening, prompt) if p - 1 in known][:-1]
    return [(begin, stops[bisect_left(stops, begin)]) for begin in begins]


def _behind(
    context: array[int], known: Iterable[array[int]]
) -> list[tuple[array[int], int]]:
    """Return where some tokens end in known conversations, once in each."""
    wanted, found = context.tobytes(), []
    for one in known:
        data = one.tobytes()
        place = data.rfind(wanted)
        while place >= 0 and place % one.itemsize:  # across tokens
            place = data.rfind(wanted, 0, place + len(wanted) - 1)
        if place >= 0:
            found.append((one, place // one.itemsize + len(context)))
    return found


def _reply(known: array[int], begin: int, ends: Collection[int]) -> array[int]:
    """Return the reply that begins there in a known conversation."""
    stops = (i for i in range(begin, len(known)) if known[i] in ends)
    return known[begin : next(stops, len(known))]


def _fitting(
    tokenizer: Any,
    rendered: array[int],
    sampled: array[int],
    message: Any,
    read: Read | None,
) -> array[int] | None:
    """Return sampled tokens, if they are the reply that was rendered."""
    if sampled == rendered:
        return rendered
    if min(sampled, default=0) < 0:
        return None  # media, which no reply has
    was, now = (tokenizer.decode(part.tolist()) for part in (sampled, rendered))
    if "\ufffd" in was:  # stands for any bytes that are no text
        return None
    # A template may take space away, and a client too; what it has added is its own.
    if was == now or (was.strip() == now.strip() and _content(message) in was):
        return sampled
    calls = _calls(message)
    if calls and read is not None:
        content, called, reasoning = read(was)
        is_same = content.strip() == _content(message).strip() and called == calls
        # Reasoning that the template leaves out is not put back; nor is any taken away.
        is_same = is_same and reasoning.strip() == read(now)[2].strip()
        return sampled if is_same else None
    # Of a reply that was cut at a number of tokens, the last one has no row.
    if was and not calls and now.startswith(was):
        rest = tokenizer.encode(now[len(was) :], add_special_tokens=False)
        made = sampled + array("q", rest)
        # Some tokenizers put a space before whatever they encode.
        return made if tokenizer.decode(made.tolist()) == now else None
    return None


def _content(message: Any) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _calls(message: Any) -> list[Any]:
    """Return name and arguments of each tool call of a message."""
    return [
        call_of(call.get("function", {})) for call in message.get("tool_calls") or ()
    ]


def call_of(function: Any) -> tuple[Any, Any]:
    """Return name and arguments of a tool call, the latter as a JSON value."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return function.get("name"), arguments  # compared as they are
    return function.get("name"), arguments
