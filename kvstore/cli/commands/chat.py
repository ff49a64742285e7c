"""The verb chat: a conversation in a terminal, or over a pipe."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...errors import EntryExistsError, KVStoreError, StoreLockedError
from .. import options
from ..failures import explain
from ..interrupts import Interrupts
from ..main import Verb, output_of
from ..messages import make_reader, unquote
from ..options import ModelOptions, model_options
from ..output import (
    Bars,
    HintedError,
    Output,
    format_ago,
    format_bytes,
    format_count,
    format_fields,
    has_colour,
    one_line,
    print_failure,
    printable,
)
from .generate import end_if_asked, open_models, warn_of_context, warn_of_size
from .listing import list_named

if TYPE_CHECKING:
    from ...format.block import Progress
    from ...models.chat import Chat
    from ...models.load import LoadedModel
    from ...store import Store

_HELP = """\
/file PATH    put a text file before what you say next
/edit         write the next message in $EDITOR
/undo [K]     take back the last turn, or the last K; the message can be edited
/history      all that was said
/name NAME    give the chat another name, or its first
/fork NAME    go on under NAME from here; the old name stays where it was
/list         the chats and documents that have a name
/switch NAME  go on with another chat
/stats        where the chat stands
/help         this list
/bye          end the chat; so do /exit, /quit and Ctrl-D
//…           say something that begins with a slash
Enter sends; Alt-Enter, a backslash at the end, or \"\"\" … \"\"\" make several lines.
Ctrl-C ends a reply, and never the chat."""
_SHOWN = 200
# Fewer tokens are computed before a bar can be read.
_LONG = 512
# From this part of the model's context on, a chat is told what is left.
_NEAR = 0.9


@click.command(cls=Verb)
@model_options
@options.base
@options.name
@options.template_options
@options.codec
@options.max_tokens(2048, "Tokens of a reply at most.")
@options.sampling_options
@options.live_options
@options.prefill_step_size
@options.checkpoint_every
@click.pass_context
def chat(
    context: click.Context,
    model: ModelOptions,
    template: options.TemplateOptions,
    sampling: options.SamplingOptions,
    live: options.LiveOptions,
    base: str | None,
    name: str | None,
    codec: str | None,
    max_tokens: int,
    prefill_step_size: int | None,
    checkpoint_every: int,
) -> None:
    """Chat, and go on tomorrow.

    Each turn is kept as it ends, under the name if there is one. The same name takes
    the chat up again at its last token. `--from` begins with what an entry holds and
    leaves that as it is: nothing is kept until there is a name. What is pasted is one
    message, and `/file PATH` reads one. Ctrl-C ends a reply and keeps what was said;
    Ctrl-D ends the chat. In it, `/help` lists the commands. From a pipe, each line is a
    message, or all that stands within `\"\"\"`. Where no model is named, it is that of
    the entry.
    """
    output = output_of(context)
    if output.mode == "json":
        raise HintedError(
            "`--json` has no meaning here: a chat is no document",
            "`kvstore generate --json` says one thing",
        )
    live.check()
    options.check_base(base, name)
    store, loaded = open_models(
        context, model, codec, live, ref=base or name, usual="high"
    )
    warn_of_size(output, loaded.model, live.max_kv_size)
    from ...models.chat import Chat
    from ...models.session import Callbacks

    with output.progress() as bars, Interrupts(bars.say_stopping) as interrupts:
        open_chat = partial(
            Chat,
            loaded,
            store=store,
            system_prompt=template.system_prompt,
            template=template.template(loaded.tokenizer),
            sampling=sampling.make(max_tokens, live.num_draft_tokens),
            cache=live.make_cache_options(),
            prefilling=options.prefilling(prefill_step_size, checkpoint_every),
            callbacks=Callbacks(
                should_stop=lambda: interrupts.is_pending,
                on_load=_when_long(bars.bar("restore")),
                on_prefill=_when_long(bars.bar("prefill")),
            ),
        )
        talk = open_chat(name=name, base=base)
        _check_system_prompt(talk, template.system_prompt)
        session = _Session(output, bars, talk, interrupts, open_chat, loaded, store)
        try:
            session.run()
        except OSError:
            # A terminal that hung up cannot be written to; all is saved.
            if interrupts.ending is None or not session.is_saved:
                raise
    end_if_asked(context, interrupts)
    if session.is_failed:
        context.exit(1)


class _Session:
    """A person, or a script, and a chat."""

    def __init__(
        self,
        output: Output,
        bars: Bars,
        chat: Chat,
        interrupts: Interrupts,
        open_chat: Callable[..., Chat],
        model: LoadedModel,
        store: Store,
    ) -> None:
        self._output = output
        self._bars = bars
        self._chat = chat
        self._interrupts = interrupts
        self._open_chat = open_chat
        self._model = model
        self._store = store
        self._is_person = sys.stdin.isatty()
        # Files that go before what is said next.
        self._files: list[str] = []
        # What was said and taken back, to be edited.
        self._draft = ""
        self.is_failed = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/file": self._file,
            "/edit": self._edit,
            "/undo": self._undo,
            "/history": self._history,
            "/name": self._rename,
            "/fork": self._fork,
            "/list": lambda _: list_named(output, store, model.fingerprint.label),
            "/switch": self._switch,
            "/stats": self._stats,
            "/help": lambda _: output.result(_HELP, None),
        }
        self._read_message = make_reader(self._words, "/file ", self._meter)

    @property
    def is_saved(self) -> bool:
        """Whether nothing that is to be kept waits to be saved."""
        return self._chat.is_saved

    def run(self) -> None:
        """Say where the chat stands, and go on until it ends; then all is saved."""
        try:
            self._greet()
            self._take_lines()
        finally:
            self._end()

    def _greet(self) -> None:
        chat, entry = self._chat, self._chat.entry
        if entry is None:
            self._note(f"{_describe_new(chat)}; `/help` lists the commands")
            return
        num_tokens, num_held = len(chat.tokens), chat.num_restorable
        self._note(
            f"`{chat.name}`, {format_ago(entry.updated_at)}: {self._extent()};"
            " `/help` lists the commands"
        )
        if num_held < num_tokens:
            self._note(
                f"{num_held:,} tokens can be restored as you want them; the others are"
                " computed again with what you say next"
            )
        for said in chat.exchanges(num_last=1):
            asked, replied = map(_shorten, said)
            self._output.note(f"> {asked}\n{replied}")

    def _take_lines(self) -> None:
        while (text := self._read()) is not None:
            quoted = unquote(text)
            # A command has one line; what is pasted may begin with a slash.
            is_command = text.startswith("/") and "\n" not in text.strip()
            if quoted is not None:
                self._say(quoted)
            elif text.startswith("//"):
                self._say(text.removeprefix("/"))
            elif text.split() in (["/bye"], ["/exit"], ["/quit"]):
                return
            elif is_command:
                self._command(text)
            elif text.strip():
                self._say(text)

    def _end(self) -> None:
        """Save what could not be saved before, and say how to go on."""
        entry = self._chat.save()
        if not self._chat.is_kept:
            self._note(f"`{self._chat.base}` stays as it was, and nothing is kept")
        if entry is None:
            return
        kept = f"kept {format_count(entry.num_tokens, 'token')} as"
        if entry.name is not None:
            self._note(f"{kept} `{entry.name}`, from which `--name` goes on")
        else:
            self._note(
                f"{kept} `{entry.id[:12]}`; `kvstore rename {entry.id[:12]} NAME` gives"
                " it a name, from which `--name` goes on"
            )

    def _read(self) -> str | None:
        """Return the next message or command, or ``None`` at the end."""
        while self._interrupts.ending is None:
            draft, self._draft = self._draft, ""
            try:
                return self._read_message(draft)
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not self._is_person:
                    return None
                if self._interrupts.ending is None:
                    self._note("Ctrl-D or `/bye` ends the chat")
        return None

    def _words(self) -> Iterator[str]:
        yield from (*self._commands, "/bye")
        for entry in self._store.entries():
            if entry.name is not None:
                yield f"/switch {entry.name}"

    def _meter(self) -> str:
        length, num_tokens = self._model.context_length, len(self._chat.tokens)
        of = f" of {length:,}" if length else ""
        files = f" + {format_count(len(self._files), 'file')}" if self._files else ""
        return one_line(
            f"{self._chat.name or 'no name'}: {num_tokens:,}{of} tokens{files}"
        )

    def _say(self, text: str) -> None:
        last: Any = None
        message = "\n\n".join([*self._files, text])
        warn_of_context(self._output, self._model, self._chat.count_tokens(message))
        num_before = self._chat.num_restored
        error: Exception | None = None
        try:
            with self._interrupts.deferred(), closing(self._chat.say(message)) as said:
                while True:
                    try:
                        response = next(said, None)
                    except (KVStoreError, OSError, ValueError) as caught:
                        error = caught
                        break
                    if response is None:
                        break
                    last = response
                    self._bars.clear()
                    self._output.stream(_shown(response.text))
        except KeyboardInterrupt:
            pass  # the second; it is pending, too
        self._bars.clear()
        if last is not None:
            self._output.stream("\n")
            self._files = []
        if error is not None:
            self._fail(error)
        elif last is not None:
            self._note(self._told(last, num_before))
            self._warn_of_limit()
        if last is None:
            self._draft = text
        if self._interrupts.is_pending:
            self._interrupted(last)

    def _warn_of_limit(self) -> None:
        length, num_tokens = self._model.context_length, len(self._chat.tokens)
        if length is not None and _NEAR * length <= num_tokens <= length:
            self._output.warning(
                f"{length - num_tokens:,} of the model's {length:,} tokens are left:"
                " `/undo` takes turns back"
            )

    def _told(self, last: Any, num_before: int) -> str:
        num_restored = self._chat.num_restored - num_before
        told = f"restored {num_restored:,}, " if num_restored else ""
        told += (
            f"read {last.prompt_tokens:,} ({last.prompt_tps:.0f}/s), wrote"
            f" {last.generation_tokens:,} ({last.generation_tps:.0f}/s):"
            f" {format_count(len(self._chat.tokens), 'token')}"
        )
        if last.finish_reason == "length":
            told += "; cut off"
        return told

    def _interrupted(self, last: Any) -> None:
        if last is None:
            self._note("interrupted before the reply: edit the message, or drop it")
        elif last.finish_reason is None and self._chat.is_saved:
            where = "kept" if self._chat.is_kept else "in this chat"
            self._note(f"interrupted: what was said is {where}")
        if not self._is_person and self._interrupts.ending is None:
            raise KeyboardInterrupt  # it is the script that is to end

    def _command(self, line: str) -> None:
        word, *rest = line.split(maxsplit=1)
        try:
            if word not in self._commands:
                raise HintedError(
                    f"no command `{word}`",
                    "`/help` lists them; `//` begins a message with a slash",
                )
            self._commands[word]("".join(rest).strip())
        except (KVStoreError, OSError, ValueError, click.ClickException) as error:
            self._fail(error)
        except KeyboardInterrupt:
            self._note("interrupted")
        self._bars.clear()

    def _fork(self, name: str) -> None:
        former = self._chat.name
        self._chat.fork(_named(name, "/fork"))
        stays = f"; `{former}` stays where it was" if former else ""
        self._note(f"the chat goes on as `{name}`{stays}")

    def _rename(self, name: str) -> None:
        self._chat.rename(_named(name, "/name"))
        self._note(f"the chat is called `{name}` now")

    def _file(self, name: str) -> None:
        path = Path(_named(name, "/file", "PATH")).expanduser()
        if path.exists() and not path.is_file():
            raise HintedError(f"`{path}` is no file", "`/file PATH` takes a text")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise HintedError(f"`{path}` is not UTF-8", "give a text") from error
        num_tokens = self._chat.count_tokens("\n\n".join([*self._files, text]))
        self._files.append(text)
        self._note(
            f"`{path.name}` goes before what you say next: {num_tokens:,} tokens then"
        )
        warn_of_context(self._output, self._model, num_tokens)

    def _edit(self, rest: str) -> None:
        if not self._is_person:
            raise HintedError("`/edit` needs a terminal", "give the message as a line")
        text = click.edit(rest, extension=".md")
        self._draft = (text or rest).strip()

    def _undo(self, number: str) -> None:
        if number and not re.fullmatch(r"[1-9]\d{0,8}", number):
            raise HintedError(f"not a number of turns: `{number}`", "`/undo 2`")
        num_turns = int(number or 1)
        said = self._chat.exchanges(num_turns)
        self._chat.rewind(num_turns)
        self._draft = said[0][0] if said else ""
        self._note(f"taken back; left: {self._extent()}")

    def _history(self, rest: str) -> None:
        said = self._chat.exchanges()
        text = "\n".join(f"> {asked}\n{replied}\n" for asked, replied in said)
        self._output.result(_shown(text), None)
        if not said:
            self._note("no turns that can be told apart")

    def _switch(self, name: str) -> None:
        entry = self._store.entry(_named(name, "/switch"))
        talk = self._open_chat(name=entry.name, base=None if entry.name else entry.id)
        self._end()
        self._chat, self._files = talk, []
        self._greet()

    def _stats(self, rest: str) -> None:
        chat, entry = self._chat, self._chat.entry
        turns = "unknown" if chat.num_turns is None else f"{chat.num_turns:,}"
        fields = [
            ("name", chat.name or "none"),
            ("entry", entry.id[:12] if entry else "none"),
            ("saved", _describe_saved(chat)),
            ("turns", turns),
            ("tokens", f"{len(chat.tokens):,}"),
            (
                "this session",
                f"{chat.num_restored:,} restored, {chat.num_computed:,} computed,"
                f" {chat.num_generated:,} generated",
            ),
            ("in memory", format_bytes(chat.cache_bytes)),
            ("on disk", format_bytes(entry.nbytes if entry else 0)),
        ]
        self._output.result("\n".join(format_fields(fields)), None)

    def _extent(self) -> str:
        num_turns = self._chat.num_turns
        tokens = format_count(len(self._chat.tokens), "token")
        turns = "" if num_turns is None else f"{format_count(num_turns, 'turn')}, "
        return turns + tokens

    def _fail(self, error: Exception) -> None:
        self._bars.clear()
        self.is_failed = not self._is_person
        message, hint, _ = explain(error)
        if isinstance(error, EntryExistsError) and self._chat.name is None:
            hint += "; the chat goes on without a name, `/name NAME` gives it one"
        elif isinstance(error, (OSError, StoreLockedError)) and not self._chat.is_saved:
            hint += "; the chat goes on in memory, and the next turn saves all of it"
        print_failure(message, hint)

    def _note(self, text: str) -> None:
        text = one_line(text)
        is_dim = has_colour(sys.stderr)
        self._output.note(click.style(text, dim=True) if is_dim else text)


def _describe_new(chat: Chat) -> str:
    begun = f" with what `{chat.base}` holds" if chat.base else ""
    if chat.name:
        return f"a new chat{begun}, `{chat.name}`"
    if begun:
        return f"a new chat{begun}; nothing is kept until `/name NAME`"
    return "a new chat, no name"


def _describe_saved(chat: Chat) -> str:
    if not chat.is_kept:
        return "nothing is kept until `/name NAME`"
    return "all" if chat.is_saved else "not all: the last save failed"


def _check_system_prompt(chat: Chat, system_prompt: str | None) -> None:
    """Refuse another system prompt than the one that a chat was begun with."""
    if system_prompt is None or not chat.tokens or chat.begins_with(system_prompt):
        return
    raise HintedError(
        f"`--system-prompt` comes too late: `{chat.name or chat.base}` was begun with"
        " another, or with none",
        "leave it out, or begin a chat of another name",
    )


def _named(name: str, command: str, what: str = "NAME") -> str:
    if not name:
        raise HintedError(f"`{command}` needs a {what.lower()}", f"`{command} {what}`")
    return name


def _when_long(progress: Progress) -> Progress:
    """Return a callback that is silent where there is little to do."""
    return lambda done, total: progress(done, total) if total >= _LONG else None


def _shorten(text: str) -> str:
    shown = one_line(text)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"


def _shown(text: str) -> str:
    return printable(text) if sys.stdout.isatty() else text
