"""Messages as they are typed, pasted or piped: several lines make one. Knows no model.

On a terminal Enter sends a message, unless a line ends in a backslash, quotes are open,
or more is there already: what is pasted is one message, also where the terminal does
not mark it as pasted. Alt-Enter begins a new line.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

QUOTES = '"""'
# A terminal hands over the rest of what was pasted sooner; nobody types as fast.
_PASTED_S = 0.03


def make_reader(
    words: Callable[[], Iterable[str]], files_of: str, meter: Callable[[], str]
) -> Callable[[str], str]:
    """Return what reads the next message; it is given a draft that may be edited.

    It raises ``EOFError`` at the end, and ``KeyboardInterrupt`` on Ctrl-C.

    Args:
        words: What a line may be completed to, asked each time.
        files_of: What begins a line that goes on with a file's path.
        meter: What stands below the line meanwhile.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")
        return lambda draft: _as_text(_read_piped())
    # A tenth of a second, which only a chat on a terminal needs.
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import (
        CompleteEvent,
        Completer,
        Completion,
        PathCompleter,
        WordCompleter,
    )
    from prompt_toolkit.document import Document
    from prompt_toolkit.output import create_output

    whole_lines = WordCompleter(lambda: sorted(words()), sentence=True)
    paths = PathCompleter(expanduser=True)

    class LineCompleter(Completer):
        """Commands with the names they take, or files."""

        def get_completions(
            self, document: Document, complete_event: CompleteEvent
        ) -> Iterable[Completion]:
            text = document.text_before_cursor
            if not text.startswith("/"):
                return ()
            if not text.startswith(files_of):
                return whole_lines.get_completions(document, complete_event)
            path = Document(text.removeprefix(files_of))
            return paths.get_completions(path, complete_event)

    session: PromptSession[str] = PromptSession(
        "> ",
        output=create_output(stdout=sys.stderr),
        multiline=True,
        prompt_continuation=". ",
        key_bindings=_key_bindings(),
        completer=LineCompleter(),
        complete_while_typing=False,
        bottom_toolbar=meter,
        reserve_space_for_menu=4,
    )
    # Its own handler would take Ctrl-C from whoever has it between messages.
    return lambda draft: _as_text(session.prompt(default=draft, handle_sigint=False))


def unquote(text: str) -> str | None:
    """Return what stands between the quotes; ``None`` where there are none."""
    stripped = text.strip()
    if not stripped.startswith(QUOTES):
        return None
    return stripped.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")


def _is_open(text: str) -> bool:
    """Whether quotes have begun that are not closed yet."""
    return text.lstrip().startswith(QUOTES) and text.count(QUOTES) < 2


def _key_bindings() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif _is_open(buffer.text) or _more_waits(event):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _more_waits(event: KeyPressEvent) -> bool:
    """Whether more has been typed behind this key, as only a paste does."""
    if event.key_processor.input_queue:
        return True
    return bool(select.select([event.app.input.fileno()], [], [], _PASTED_S)[0])


def _read_piped() -> str:
    """Return the next message of a pipe: a line, or several that belong together."""
    text = ""
    while True:
        line = sys.stdin.readline()
        if not line and not text:
            raise EOFError
        text += line.removesuffix("\n").removesuffix("\r")
        if line and text.endswith("\\"):
            text = f"{text[:-1]}\n"
        elif line and _is_open(text):
            text += "\n"
        else:
            return text


def _as_text(line: str) -> str:
    """Return a line with a mark for each byte that is no text."""
    return line.encode(errors="surrogateescape").decode(errors="replace")
