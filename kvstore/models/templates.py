"""A model's chat template: messages to tokens, and turns out of tokens.

What marks a turn is not guessed: the template is rendered with different words, and
what stays the same is the template's own. Marks are looked for as tokens, so a message
that merely contains their text is none. Knows no store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
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
        return next(places(self.header, tokens), None)

    def begins(self, tokens: Sequence[int]) -> list[int]:
        """Return where each turn begins: where the conversation ended before it."""
        first = self.first(tokens)
        if first is None:
            return []
        # The token that ends a reply is the reply's.
        later = places(self.boundary, tokens)
        return [
            first,
            *(place + self.is_closed_by_model for place in later if place > first),
        ]

    def exchange(
        self, tokens: Sequence[int], begin: int
    ) -> tuple[list[int], list[int]]:
        """Return what was asked and replied in the turn that tokens end with."""
        # A header may begin with the token that ended the reply before.
        turn = tokens[max(0, begin - 1) :]
        asked = next(places(self.header, turn), 0) + len(self.header)
        replied = next(places(self.answer, turn), None)
        if replied is None:
            return list(turn[asked:]), []
        return list(turn[asked:replied]), list(turn[replied + len(self.answer) :])


def places(mark: Sequence[int], tokens: Sequence[int]) -> Iterator[int]:
    """Yield where ``mark`` stands in ``tokens``."""
    wanted, size = list(mark), len(mark)
    for place, token in enumerate(tokens):
        if token == wanted[0] and list(tokens[place : place + size]) == wanted:
            yield place


class Template:
    """How a conversation with a model is rendered.

    Args:
        tokenizer: The model's, from mlx-lm.
        variables: More variables for the chat template.
        ignore: Take what is said as plain text.

    Attributes:
        is_plain: What is said is taken as plain text: the tokenizer has no chat
            template, or it is to be ignored.
    """

    def __init__(
        self, tokenizer: Any, variables: JSON | None = None, *, ignore: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.is_plain = ignore or not tokenizer.has_chat_template
        self._variables = variables or {}

    def encode_prompt(
        self,
        prompt: str,
        system_prompt: str | None = None,
        *,
        is_open: bool = False,
        is_literal: bool = False,
    ) -> list[int]:
        """Return the tokens of the first message of a conversation.

        Args:
            prompt: What the user says.
            system_prompt: What the system says before.
            is_open: Leave the message open, as ``mlx_lm.cache_prompt`` does, so that
                more can be added to it; else the reply comes next.
            is_literal: What the user says makes no special tokens, whatever it
                contains.

        Raises:
            ValueError: There is a system prompt and no chat template.
        """
        if self.is_plain:
            if system_prompt is not None:
                raise ValueError(
                    "a system prompt needs a chat template, and none is used"
                )
            return list(self.tokenizer.encode(prompt))
        before: JSON = {"role": "system", "content": system_prompt}

        def render(words: str) -> str:
            messages: list[JSON] = [{"role": "user", "content": words}]
            messages = messages if system_prompt is None else [before, *messages]
            return self._render(messages, is_open=is_open)

        return self._encode(render, prompt, is_literal)

    def encode_next(
        self, prompt: str, tokens: Sequence[int], *, is_literal: bool = False
    ) -> list[int]:
        """Return the tokens that a message of the user adds to a conversation.

        Where the conversation ends with a reply, that is closed first. Where it ends
        inside a message, the prompt goes on with that, as with
        ``mlx_lm.generate --prompt-cache-file``. Where nothing but the system's words is
        left, a first message follows. ``is_literal`` is that of :meth:`encode_prompt`.

        Raises:
            ValueError: The chat template leaves out parts of a conversation.
        """
        if self.is_plain:
            return self._plain(prompt)
        if marks := self._marks_behind_system(tokens):
            first = self.encode_prompt(prompt, is_literal=is_literal)
            return first[len(marks.opening) :]
        return self._continue(prompt, tokens, is_literal)

    def _continue(
        self, prompt: str, tokens: Sequence[int], is_literal: bool = False
    ) -> list[int]:
        is_replied = self.has_reply(tokens)

        def render(words: str) -> str:
            query = {"role": "user", "content": words}
            if is_replied:
                conversation = self._render([_ASKED, _REPLIED, query])
                return _around(_REPLY, conversation)[1]
            before, _ = _around(_QUERY, self._render([_ASKED]))
            return self._render([query])[len(before) :]

        added = self._encode(render, prompt, is_literal)
        # The model ended its reply itself, with the token that the template would add.
        is_closed = tokens and tokens[-1] in self.tokenizer.eos_token_ids
        return added[1:] if is_closed and added[:1] == [tokens[-1]] else added

    def has_reply(self, tokens: Sequence[int]) -> bool:
        """Whether there is a reply in a conversation, or an open message at most.

        Raises:
            ValueError: The chat template leaves out parts of a conversation.
        """
        conversation = self._render([_ASKED, _REPLIED, _ASKED])
        header, _ = _around(_REPLY, _around(_QUERY, conversation)[1])
        _, after = _around(_QUERY, self._render([_ASKED]))
        # Some templates begin a reply with more, such as `<think>`, than they repeat.
        begin = header[: common_run(header, after)].strip()
        # Some stand for no text, such as those of images; a tokenizer refuses them.
        spelled = [token for token in tokens if 0 <= token < _MAX_TOKEN]
        return bool(begin) and begin in self.tokenizer.decode(spelled)

    @cached_property
    def marks(self) -> TurnMarks:
        """How turns are marked.

        Raises:
            KVStoreError: Turns cannot be told apart by tokens of the template.
        """
        with suppress(ValueError):  # it leaves out parts of a conversation
            marks = self._derive_marks()
            if self._is_marked(marks) and self._finds_turns(marks):
                return marks
        raise KVStoreError(
            "the chat template marks turns with nothing that a message could not"
            " contain, so they cannot be told apart",
            hint="only turns of this session can be taken back",
        )

    def begins_with(self, tokens: Sequence[int], system_prompt: str) -> bool:
        """Whether a conversation was begun with this system prompt."""
        if self.is_plain:
            return False
        opening = self._shared_start(system_prompt)
        is_alone = False
        with suppress(KVStoreError):
            # All turns were taken back.
            is_alone = self.marks.first(tokens) is None
        if is_alone:
            opening = opening[: len(opening) - len(self.marks.header)]
        if list(tokens[: None if is_alone else len(opening)]) == opening:
            return True
        words = system_prompt.strip()
        if not words:
            return False
        # Some templates write the date before it, which may be another by now.
        before, found, after = self.tokenizer.decode(opening).rpartition(words)
        begin = self.tokenizer.decode(list(tokens[: len(opening) + _MAX_DATE]))
        wanted = before[-1:] + found + after
        return bool(found) and (begin.endswith(wanted) if is_alone else wanted in begin)

    def _marks_behind_system(self, tokens: Sequence[int]) -> TurnMarks | None:
        """Return the marks where no turn is there yet, but what the system says."""
        with suppress(KVStoreError):
            # Its first words tell it from plain text, and from what a template refuses.
            begins = _shared_start(
                [self.encode_prompt("a", words) for words in _SAMPLES]
            )
            is_system = len(begins) > 1 and list(tokens[: len(begins)]) == begins
            if is_system and self.marks.first(tokens) is None:
                return self.marks
        return None

    def _derive_marks(self) -> TurnMarks:
        firsts = [self.encode_prompt(words) for words in _SAMPLES]
        begun = [*firsts[0], *self._plain("b")]
        laters = [self._continue(words, begun) for words in _SAMPLES]
        first, boundary = _shared_start(firsts), _shared_start(laters)
        header = _common_suffix([first, boundary])
        return TurnMarks(
            opening=tuple(first[: len(first) - len(header)]),
            header=tuple(header),
            boundary=tuple(boundary),
            answer=tuple(_common_suffix(firsts)),
            is_closed_by_model=boundary[:1] != [] and boundary[0] in self._ends,
        )

    def _is_marked(self, marks: TurnMarks) -> bool:
        """Whether a special token is in the marks, which no plain text makes."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special = {token for token in added if added[token].special}
        return bool(marks.header) and not special.isdisjoint(marks.boundary)

    def _finds_turns(self, marks: TurnMarks) -> bool:
        for end in [[], *([token] for token in self._ends)]:
            tokens = self.encode_prompt("One?")
            expected = [len(marks.opening)]
            for words in ("Two\n", "(3)"):
                tokens += [*self._plain("Four."), *end]
                # A reply that was cut off is closed by the template.
                is_closed = tokens[-1:] == list(marks.boundary[:1])
                is_cut_off = marks.is_closed_by_model and not is_closed
                expected.append(len(tokens) + is_cut_off)
                tokens += self._continue(words, tokens)
            tokens += self._plain("End")
            if marks.begins(tokens) != expected or not self.has_reply(tokens):
                return False
        return True

    @property
    def _ends(self) -> list[int]:
        return sorted(self.tokenizer.eos_token_ids)

    def _shared_start(self, system_prompt: str) -> list[int]:
        return _shared_start(
            [self.encode_prompt(words, system_prompt) for words in _SAMPLES]
        )

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _encode(
        self, render: Callable[[str], str], words: str, is_literal: bool
    ) -> list[int]:
        text = render(words)
        if is_literal and any(mark in words for mark in self._special_texts()):
            before, after = _around(_WORDS, render(_WORDS))
            # Some templates strip what was said.
            for said in (words, words.strip()):
                if before + said + after == text:
                    literal = self.tokenizer.encode(
                        said, add_special_tokens=False, split_special_tokens=True
                    )
                    return [*self._plain(before), *literal, *self._plain(after)]
        return self._plain(text)

    def _special_texts(self) -> list[str]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        return [str(token) for token in added if token.special]

    def _render(self, messages: Sequence[JSON], *, is_open: bool = False) -> str:
        """Return a conversation as text, the last message open or a reply to come."""
        from jinja2 import TemplateError

        options = {
            "add_generation_prompt": not is_open,
            "continue_final_message": is_open,
            **self._variables,
            "tokenize": False,
        }
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), **options))
        except TemplateError as error:
            raise KVStoreError(
                f"the chat template refuses this conversation: {error}",
                hint="`--ignore-chat-template` takes the prompt as plain text",
            ) from error


def _around(marker: str, text: str) -> tuple[str, str]:
    before, found, after = text.partition(marker)
    if not found:
        raise ValueError("the chat template leaves out parts of a conversation")
    return before, after


def _shared_start(sequences: Sequence[list[int]]) -> list[int]:
    shortest = min(sequences, key=len)
    return shortest[: min(common_run(shortest, other) for other in sequences)]


def _common_suffix(sequences: Sequence[list[int]]) -> list[int]:
    return _shared_start([tokens[::-1] for tokens in sequences])[::-1]
