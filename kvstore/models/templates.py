"""Where the turns of a conversation begin, found in its tokens. Knows no store.

What marks a turn is not guessed: a chat template is rendered with different words, and
what stays the same is the template's own. Marks are looked for as tokens, so a message
that merely contains their text is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from ..errors import KVStoreError
from ..format.chain import common_run
from ..format.documents import JSON

# Stand for what was said while a chat template is rendered.
_QUERY, _REPLY, _WORDS = "<query>", "<reply>", "<words>"
_ASKED = {"role": "user", "content": _QUERY}
_REPLIED = {"role": "assistant", "content": _REPLY}
# More than any vocabulary has, and less than a tokenizer can be asked for.
_MAX_TOKEN = 2**31


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
    """Whether there is a reply in a conversation, or an open message at most.

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


# How many tokens more another date may take.
_MAX_DATE = 16
# Words that share no first or last token, nor merge with the template's in one way.
_SAMPLES = ("a", "7 é.", "\n\nB\n", " c ", "(x)")


@dataclass(frozen=True, slots=True)
class TurnMarks:
    """How a chat template marks turns, as tokens."""

    # What stands before the first message where there is no system prompt.
    opening: tuple[int, ...]
    # What begins a message of the user.
    header: tuple[int, ...]
    # What ends a reply and begins the next message of the user.
    boundary: tuple[int, ...]
    # What ends a message of the user and begins the reply.
    answer: tuple[int, ...]
    # The first token of ``boundary`` is one that ends a reply.
    is_closed_by_model: bool

    def first(self, tokens: Sequence[int]) -> int | None:
        """Return where the first message of the user begins, or ``None``."""
        return next(_places(self.header, tokens), None)

    def begins(self, tokens: Sequence[int]) -> list[int]:
        """Return where each turn begins: where the conversation ended before it.

        Args:
            tokens: A conversation, with at least one reply.
        """
        first = self.first(tokens)
        if first is None:
            return []
        # The token that ends a reply is the reply's.
        later = _places(self.boundary, tokens)
        return [
            first,
            *(place + self.is_closed_by_model for place in later if place > first),
        ]

    def last_exchange(
        self, tokens: Sequence[int], begin: int
    ) -> tuple[list[int], list[int]]:
        """Return what was asked and what was replied in the last turn.

        Args:
            tokens: A conversation.
            begin: Where its last turn begins.
        """
        # A header may begin with the token that ended the reply before.
        turn = tokens[max(0, begin - 1) :]
        asked = next(_places(self.header, turn), 0) + len(self.header)
        replied = next(_places(self.answer, turn), None)
        if replied is None:
            return list(turn[asked:]), []
        return list(turn[asked:replied]), list(turn[replied + len(self.answer) :])


def find_marks(
    tokenizer: Any, *, chat_template_config: JSON | None = None
) -> TurnMarks:
    """Return how the chat template of a tokenizer marks turns.

    Args:
        tokenizer: The model's, from mlx-lm, with a chat template.
        chat_template_config: More variables for the chat template.

    Raises:
        KVStoreError: Turns cannot be told apart by tokens of the template.
    """
    config = chat_template_config
    try:
        marks = _derive(tokenizer, config)
        is_found = _is_marked(marks, tokenizer) and _finds_turns(
            marks, tokenizer, config
        )
    except ValueError:  # it leaves out parts of a conversation
        is_found = False
    if not is_found:
        raise KVStoreError(
            "the chat template marks turns with nothing that a message could not"
            " contain, so they cannot be told apart",
            hint="only turns of this session can be taken back",
        )
    return marks


def encode_next(
    tokenizer: Any,
    prompt: str,
    tokens: Sequence[int],
    *,
    chat_template_config: JSON | None = None,
    ignore_chat_template: bool = False,
    is_literal: bool = False,
) -> list[int]:
    """Return what :func:`encode_continuation` does, also where no turn is left.

    A conversation of which all turns were taken back ends with the system's words,
    which are no open message of the user.

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
    config = chat_template_config
    is_plain = ignore_chat_template or not tokenizer.has_chat_template
    if not is_plain and (marks := _marks_behind_system(tokenizer, tokens, config)):
        first = encode_prompt(
            tokenizer, prompt, chat_template_config=config, is_literal=is_literal
        )
        return first[len(marks.opening) :]
    return encode_continuation(
        tokenizer,
        prompt,
        tokens,
        chat_template_config=config,
        ignore_chat_template=ignore_chat_template,
        is_literal=is_literal,
    )


def _marks_behind_system(
    tokenizer: Any, tokens: Sequence[int], config: JSON | None
) -> TurnMarks | None:
    """Return the marks of turns where there is none yet, but what the system says."""
    try:
        # Its first words tell it from plain text, and from what a template refuses.
        begins = _shared_start(
            [
                encode_prompt(
                    tokenizer, "a", system_prompt=words, chat_template_config=config
                )
                for words in _SAMPLES
            ]
        )
        marks = find_marks(tokenizer, chat_template_config=config)
    except KVStoreError:
        return None
    is_system = len(begins) > 1 and list(tokens[: len(begins)]) == begins
    return marks if is_system and marks.first(tokens) is None else None


def begins_with(
    tokenizer: Any,
    tokens: Sequence[int],
    system_prompt: str,
    *,
    chat_template_config: JSON | None = None,
) -> bool:
    """Whether a conversation was begun with this system prompt.

    Args:
        tokenizer: The model's, from mlx-lm, with a chat template.
        tokens: The conversation.
        system_prompt: What the system says first.
        chat_template_config: More variables for the chat template.
    """
    config = chat_template_config
    opening = _shared_start(
        [
            encode_prompt(
                tokenizer,
                words,
                system_prompt=system_prompt,
                chat_template_config=config,
            )
            for words in _SAMPLES
        ]
    )
    is_alone = False
    with suppress(KVStoreError):
        marks = find_marks(tokenizer, chat_template_config=config)
        # All turns were taken back.
        is_alone = marks.first(tokens) is None
    if is_alone:
        opening = opening[: len(opening) - len(marks.header)]
    if list(tokens[: None if is_alone else len(opening)]) == opening:
        return True
    words = system_prompt.strip()
    if not words:
        return False
    # Some templates write the date before it, which may be another by now.
    before, found, after = tokenizer.decode(opening).rpartition(words)
    begin = tokenizer.decode(list(tokens[: len(opening) + _MAX_DATE]))
    wanted = before[-1:] + found + after
    return bool(found) and (begin.endswith(wanted) if is_alone else wanted in begin)


def _derive(tokenizer: Any, config: JSON | None) -> TurnMarks:
    """Return what different conversations have in common."""
    firsts = [
        encode_prompt(tokenizer, words, chat_template_config=config)
        for words in _SAMPLES
    ]
    begun = [*firsts[0], *_plain(tokenizer, "b")]
    laters = [
        encode_continuation(tokenizer, words, begun, chat_template_config=config)
        for words in _SAMPLES
    ]
    first, boundary = _shared_start(firsts), _shared_start(laters)
    header = _common_suffix([first, boundary])
    return TurnMarks(
        opening=tuple(first[: len(first) - len(header)]),
        header=tuple(header),
        boundary=tuple(boundary),
        answer=tuple(_common_suffix(firsts)),
        is_closed_by_model=boundary[:1] != [] and boundary[0] in _ends(tokenizer),
    )


def _is_marked(marks: TurnMarks, tokenizer: Any) -> bool:
    """Whether a special token is in the marks, which no plain text makes."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token for token in added if added[token].special}
    return bool(marks.header) and not special.isdisjoint(marks.boundary)


def _finds_turns(marks: TurnMarks, tokenizer: Any, config: JSON | None) -> bool:
    """Try the marks on a conversation that is known."""
    ends = [[], *([token] for token in _ends(tokenizer))]
    for end in ends:
        tokens = encode_prompt(tokenizer, "One?", chat_template_config=config)
        expected = [len(marks.opening)]
        for words in ("Two\n", "(3)"):
            tokens += [*_plain(tokenizer, "Four."), *end]
            # A reply that was cut off is closed by the template.
            is_closed = tokens[-1:] == list(marks.boundary[:1])
            is_cut_off = marks.is_closed_by_model and not is_closed
            expected.append(len(tokens) + is_cut_off)
            tokens += encode_continuation(
                tokenizer, words, tokens, chat_template_config=config
            )
        tokens += _plain(tokenizer, "End")
        if marks.begins(tokens) != expected or not has_reply(
            tokenizer, tokens, chat_template_config=config
        ):
            return False
    return True


def _ends(tokenizer: Any) -> list[int]:
    return sorted(tokenizer.eos_token_ids)


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _places(mark: Sequence[int], tokens: Sequence[int]) -> Iterator[int]:
    """Yield where ``mark`` stands in ``tokens``."""
    wanted, size = list(mark), len(mark)
    for place, token in enumerate(tokens):
        if token == wanted[0] and list(tokens[place : place + size]) == wanted:
            yield place


def _shared_start(sequences: Sequence[Sequence[int]]) -> list[int]:
    shortest = min(sequences, key=len)
    length = min(common_run(shortest, other) for other in sequences)
    return list(shortest[:length])


def _common_suffix(sequences: Sequence[Sequence[int]]) -> list[int]:
    columns = zip(*(reversed(tokens) for tokens in sequences), strict=False)
    same = takewhile(lambda column: len(set(column)) == 1, columns)
    return [column[0] for column in same][::-1]
