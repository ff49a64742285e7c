"""The verb chat: a conversation in a terminal, or a message per line of a pipe."""

from __future__ import annotations

import re
import sys
import unicodedata
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import click

from ...errors import EntryExistsError, KVStoreError, StoreLockedError
from .. import options
from ..failures import explain
from ..interrupts import Interrupts
from ..main import Verb, output_of
from ..options import ModelOptions, gathered, model_options
from ..output import (
    Bars,
    Output,
    format_bytes,
    format_count,
    format_fields,
    format_time,
    has_colour,
    one_line,
    print_failure,
)
from .generate import end_if_asked, open_models, warn_of_size

if TYPE_CHECKING:
    from ...format.block import Progress
    from ...models.chat import Chat, ChatStats

_HELP = """\
/fork NAME   go on under NAME from here; the old name stays where it was
/rewind [K]  take back the last turn, or the last K
/name NAME   give the chat another name, or its first
/stats       where the chat stands
/help        this list
//…          say something that begins with a slash
A line that ends in a backslash goes on in the next.
Ctrl-C ends a reply, Ctrl-D the chat."""
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
@click.option(
    "--max-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Tokens of a reply at most.",
)
@options.sampling_options
@options.live_options
@options.prefill_step_size
@options.checkpoint_every
@click.pass_context
@gathered("live", options.LiveOptions)
@gathered("sampling", options.SamplingOptions)
@gathered("template", options.TemplateOptions)
@gathered("model", ModelOptions)
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
    leaves that as it is: nothing is kept until there is a name. Ctrl-C ends a reply and
    keeps what was said; Ctrl-D, or Ctrl-C where nothing is typed, ends the chat. In it,
    `/help` lists the commands. From a pipe, each line is a message. Where no model is
    named, it is that of the entry.
    """
    output = output_of(context)
    if output.mode == "json":
        raise _usage(
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
        talk = Chat(
            loaded,
            store=store,
            name=name,
            base=base,
            system_prompt=template.system_prompt,
            template=options.make_template(loaded.tokenizer, template),
            sampling=sampling.make(max_tokens, live.num_draft_tokens),
            cache=live.make_cache_options(),
            prefilling=options.prefilling(prefill_step_size, checkpoint_every),
            callbacks=Callbacks(
                should_stop=lambda: interrupts.is_pending,
                on_load=_when_long(bars.bar("restore")),
                on_prefill=_when_long(bars.bar("prefill")),
            ),
        )
        _check_system_prompt(talk, template.system_prompt)
        session = _Session(output, bars, talk, interrupts, loaded.context_length)
        try:
            session.run()
        except OSError:
            # A terminal that hung up cannot be written to; all is saved.
            if interrupts.ending is None or not talk.is_saved:
                raise
    end_if_asked(context, interrupts)
    if session.is_failed:
        context.exit(1)


class _Session:
    """A person, or a script, and a chat.

    Attributes:
        is_failed: A script asked for something that could not be done.
    """

    def __init__(
        self,
        output: Output,
        bars: Bars,
        chat: Chat,
        interrupts: Interrupts,
        context_length: int | None = None,
    ) -> None:
        self._output = output
        self._bars = bars
        self._chat = chat
        self._interrupts = interrupts
        self._context_length = context_length
        self._is_person = sys.stdin.isatty()
        self._reads_line = self._is_person and sys.stdout.isatty()
        self.is_failed = False
        if self._reads_line:
            with suppress(ImportError):
                import readline  # noqa: F401  (lines can be edited, and had again)
        if hasattr(sys.stdin, "reconfigure"):
            # The one way that `input`, too, takes bytes that are no text.
            sys.stdin.reconfigure(errors="surrogateescape")

    def run(self) -> None:
        """Say where the chat stands, and go on until it ends; then all is saved.

        Raises:
            KVStoreError: It cannot be saved.
            OSError: The same.
        """
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
            f"`{chat.name}` of {format_time(entry.updated_at)}: {self._extent()};"
            " `/help` lists the commands"
        )
        if num_held < num_tokens:
            self._note(
                f"{num_held:,} tokens can be restored as you want them; the others are"
                " computed again with what you say next"
            )
        said = chat.last_exchange()
        if said is not None and self._output.mode == "human":
            asked, replied = (_shorten(text) for text in said)
            self._output.note(f"> {asked}\n{replied}")

    def _take_lines(self) -> None:
        """Take what is said, and commands, until there is no more."""
        while self._interrupts.ending is None:
            line = self._read()
            if line is None:
                return
            if line.startswith("/") and not line.startswith("//"):
                self._command(line)
            elif line.strip():
                self._say(line.removeprefix("/") if line.startswith("//") else line)

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
        lines: list[str] = []
        while True:
            try:
                line = self._read_line("> " if not lines else ". ")
            except EOFError:
                if self._is_person:
                    click.echo(err=True)
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:
                click.echo(err=True)
                is_empty = not (lines or self._typed())
                if is_empty or self._interrupts.ending is not None:
                    return None
                lines = []  # as in a shell: what was typed is dropped
                continue
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _read_line(self, prompt: str) -> str:
        if self._reads_line:
            return _as_text(input(prompt))
        if self._is_person:
            click.echo(prompt, nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return _as_text(line.removesuffix("\n").removesuffix("\r"))

    def _typed(self) -> str:
        """Return what stands in the line that Ctrl-C has ended."""
        readline = sys.modules.get("readline") if self._reads_line else None
        return str(readline.get_line_buffer()) if readline else ""

    def _say(self, text: str) -> None:
        """Say something, and print the reply as it comes."""
        last: Any = None
        before = self._chat.stats()
        error: Exception | None = None
        try:
            with self._interrupts.deferred(), closing(self._chat.say(text)) as said:
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
                    self._output.stream(_printable(response.text))
        except KeyboardInterrupt:
            pass  # the second; it is pending, too
        self._bars.clear()
        if last is not None:
            self._output.stream("\n")
        if error is not None:
            self._fail(error)
        elif last is not None:
            self._note(self._told(last, before.num_restored_tokens))
            self._warn_of_context()
        if self._interrupts.is_pending:
            self._interrupted(last)

    def _warn_of_context(self) -> None:
        """Say that the chat comes near to the end of the model's context."""
        length, num_tokens = self._context_length, self._chat.stats().num_tokens
        if length is None or num_tokens < _NEAR * length:
            return
        if num_tokens > length:
            self._output.warning(
                f"the chat has {num_tokens:,} tokens, and the model was made for"
                f" {length:,}: `/rewind K` takes turns back"
            )
        else:
            left = length - num_tokens
            self._note(f"{left:,} of the model's {length:,} tokens are left")

    def _told(self, last: Any, num_before: int) -> str:
        """Return a line on a turn: what was held, what computed, and how fast."""
        stats = self._chat.stats()
        num_prompt = stats.num_tokens - last.generation_tokens
        num_restored = stats.num_restored_tokens - num_before
        num_live = num_prompt - last.prompt_tokens - num_restored
        told = (
            f"prompt: {format_count(num_prompt, 'token')}, {num_live:,} in memory,"
            f" {num_restored:,} restored, {last.prompt_tokens:,} computed at"
            f" {last.prompt_tps:.1f} tokens/s; reply: {last.generation_tokens:,} at"
            f" {last.generation_tps:.1f} tokens/s"
        )
        if last.finish_reason == "length":
            told += "; it was cut off, `--max-tokens` allows more"
        return told

    def _interrupted(self, last: Any) -> None:
        if last is None:
            self._note("interrupted before the reply: the message is taken back")
        elif last.finish_reason is None and self._chat.is_saved:
            where = "kept" if self._chat.is_kept else "in this chat"
            self._note(f"interrupted: what was said is {where}")
        if not self._is_person and self._interrupts.ending is None:
            raise KeyboardInterrupt  # it is the script that is to end

    def _command(self, line: str) -> None:
        """Do what a line with a slash asks for."""
        word, *rest = line.split(maxsplit=1)
        commands = {
            "/fork": self._fork,
            "/rewind": self._rewind,
            "/name": self._rename,
            "/stats": self._stats,
            "/help": self._help,
        }
        try:
            if word not in commands:
                raise _usage(
                    f"no command `{word}`",
                    "`/help` lists them; `//` begins a message with a slash",
                )
            commands[word]("".join(rest).strip())
        except (KVStoreError, OSError, ValueError, click.UsageError) as error:
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

    def _rewind(self, number: str) -> None:
        if number and not re.fullmatch(r"[1-9]\d{0,8}", number):
            raise _usage(f"not a number of turns: `{number}`", "`/rewind 2`")
        self._chat.rewind(int(number or 1))
        self._note(f"taken back; left: {self._extent()}")

    def _stats(self, rest: str) -> None:
        stats = self._chat.stats()
        fields = [
            ("name", stats.name or "none"),
            ("entry", stats.entry_id[:12] if stats.entry_id else "none"),
            ("saved", _describe_saved(stats)),
            ("turns", "unknown" if stats.num_turns is None else f"{stats.num_turns:,}"),
            ("tokens", f"{stats.num_tokens:,}"),
            (
                "this session",
                f"{stats.num_restored_tokens:,} restored,"
                f" {stats.num_computed_tokens:,} computed,"
                f" {stats.num_generated_tokens:,} generated",
            ),
            ("in memory", format_bytes(stats.cache_bytes)),
            ("on disk", format_bytes(stats.entry_bytes)),
        ]
        self._output.result("\n".join(format_fields(fields)), None)

    def _help(self, rest: str) -> None:
        self._output.result(_HELP, None)

    def _extent(self) -> str:
        """Return how long the chat is."""
        num_turns = self._chat.num_turns
        tokens = format_count(len(self._chat.tokens), "token")
        return (
            tokens
            if num_turns is None
            else (f"{format_count(num_turns, 'turn')}, {tokens}")
        )

    def _fail(self, error: Exception) -> None:
        """Tell what went wrong; the chat goes on."""
        self._bars.clear()
        self.is_failed = not self._is_person
        failure = explain(error)
        hint = failure.hint
        if isinstance(error, EntryExistsError) and self._chat.name is None:
            hint += "; the chat goes on without a name, `/name NAME` gives it one"
        elif isinstance(error, (OSError, StoreLockedError)) and not self._chat.is_saved:
            hint += "; the chat goes on in memory, and the next turn saves all of it"
        print_failure(failure.message, hint)

    def _note(self, text: str) -> None:
        """Tell something that is not said in the chat."""
        text = one_line(text)
        is_dim = has_colour(sys.stderr)
        self._output.note(click.style(text, dim=True) if is_dim else text)


def _describe_new(chat: Chat) -> str:
    """Return what a chat begins with, and under which name it is kept."""
    begun = f" with what `{chat.base}` holds" if chat.base else ""
    if chat.name:
        return f"a new chat{begun}, `{chat.name}`"
    if begun:
        return f"a new chat{begun}; nothing is kept until `/name NAME`"
    return "a new chat, no name"


def _describe_saved(stats: ChatStats) -> str:
    if not stats.is_kept:
        return "nothing is kept until `/name NAME`"
    return "all" if stats.is_saved else "not all: the last save failed"


def _check_system_prompt(chat: Chat, system_prompt: str | None) -> None:
    """Refuse another system prompt than the one that a chat was begun with."""
    if system_prompt is None or not chat.tokens or chat.begins_with(system_prompt):
        return
    raise _usage(
        f"`--system-prompt` comes too late: `{chat.name or chat.base}` was begun with"
        " another, or with none",
        "leave it out, or begin a chat of another name",
    )


def _usage(message: str, hint: str) -> click.UsageError:
    error = click.UsageError(message)
    error.hint = hint  # type: ignore[attr-defined]
    return error


def _named(name: str, command: str) -> str:
    if not name:
        raise _usage(f"`{command}` needs a name", f"`{command} NAME`")
    return name


def _when_long(progress: Progress) -> Progress:
    """Return a callback that is silent where there is little to do."""
    return lambda done, total: progress(done, total) if total >= _LONG else None


def _as_text(line: str) -> str:
    """Return a line with a mark for each byte that is no text."""
    return line.encode(errors="surrogateescape").decode(errors="replace")


def _shorten(text: str) -> str:
    shown = one_line(text)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"


def _printable(text: str) -> str:
    """Return a piece of a reply without what would move a terminal's cursor."""
    if not sys.stdout.isatty():
        return text
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c
        for c in text
    )
