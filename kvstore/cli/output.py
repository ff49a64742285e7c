"""What the command line prints, in three modes. Knows no store.

Results go to stdout, all else to stderr. ``human`` prints text, ``json`` one document,
``quiet`` ids. Colour never carries meaning alone.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Generic, Literal, TextIO, TypeVar

import click

from ..format.block import Progress
from ..format.entry import JOINERS

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

T = TypeVar("T")
Mode = Literal["human", "json", "quiet"]
_GAP = "  "
# The JSON that was printed: stdout has one document.
_documents: list[Any] = []
_MIN_WIDTH = 8
# A text that is cut at fewer columns says little.
_READABLE = 16
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    """One column of a table."""

    # Its header, in capitals.
    header: str
    # What it shows of an item.
    cell: Callable[[T], str]
    # Align to the right, and never shorten.
    is_number: bool = False
    # What stands in the last line.
    total: str = ""
    # Where a terminal is narrow, the column of the highest rank goes first; 0 stays.
    rank: int = 0


class HintedError(click.UsageError):
    """A wrong usage, with what to do instead."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Bars:
    """Progress bars on stderr where it is a terminal, nothing elsewhere."""

    def __init__(self, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._rich: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}

    def bar(self, what: str) -> Progress:
        """Return a callback that draws one bar; it appears when first called."""

        def update(done: int, total: int) -> None:
            if self._is_shown and total > 0:
                rich = self._started()
                if what not in self._tasks:
                    self._tasks[what] = rich.add_task(what, total=total)
                rich.update(self._tasks[what], completed=done, total=total)

        return update

    def say_stopping(self) -> None:
        """Say that Ctrl-C was heard, above the bars; any thread may call this."""
        if self._is_shown and self._rich is not None:
            self._rich.console.print("stopping …")
        elif self._is_shown:
            click.echo("\nstopping …", err=True)

    @contextmanager
    def spinner(self, what: str) -> Iterator[None]:
        """Show that something works of which nobody knows how far it is."""
        if not self._is_shown:
            yield
            return
        self._started().add_task(what, total=None)
        try:
            yield
        finally:
            self.clear()

    def clear(self) -> None:
        """Take the bars off the screen, until one is drawn again."""
        if self._rich is not None:
            self._rich.stop()
            self._rich = None
            self._tasks.clear()

    def _started(self) -> RichProgress:
        if self._rich is None:
            # Takes a tenth of a second, so only where there is something to draw.
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                ProgressColumn,
                Task,
                TextColumn,
                TimeRemainingColumn,
            )
            from rich.text import Text

            class RateColumn(ProgressColumn):
                """How many of what is counted a second."""

                def render(self, task: Task) -> Text:
                    return Text(f"{task.speed:,.0f}/s" if task.speed else "")

            self._rich = Progress(
                TextColumn("{task.description}"),
                # Narrow: all of them fit into 80 columns.
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                RateColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=Console(stderr=True),
                transient=True,
            )
            self._rich.start()
        return self._rich


@dataclass(frozen=True, slots=True)
class Output:
    """Where verbs put what they have to say."""

    # ``human``, ``json`` or ``quiet``.
    mode: Mode = "human"

    def result(self, text: str, data: Any, ids: Sequence[str] = ()) -> None:
        """Print what a verb found or did: for people, as JSON, or as ids."""
        if self.mode == "json":
            # In ASCII: what a bundle says of itself may hold what moves a cursor.
            _documents.append(data)
            click.echo(json.dumps(data, indent=2))
        elif self.mode == "quiet":
            for name in ids:
                click.echo(name)
        elif text:
            click.echo(text)

    def table(
        self,
        items: Sequence[T],
        columns: Sequence[Column[T]],
        *,
        data: Callable[[T], Any],
        id_of: Callable[[T], str],
        empty: str,
    ) -> None:
        """Print items as a table with a total line.

        Args:
            items: One per line.
            columns: What to show of them.
            data: An item as a JSON value; the document is a list of them.
            id_of: An item's id.
            empty: What to tell people where there are no items.
        """
        lines = format_table(items, columns, terminal_width()) if items else []
        self.result(
            "\n".join(lines),
            [data(item) for item in items] if self.mode == "json" else [],
            [id_of(item) for item in items],
        )
        if not items:
            self.note(empty)

    def stream(self, text: str) -> None:
        """Print a piece of text as it comes; a JSON document holds it later."""
        if self.mode != "json":
            click.echo(text, nl=False)

    def note(self, message: str) -> None:
        """Tell people something that is not the result."""
        if self.mode == "human":
            with suppress(OSError):  # a terminal that is gone has nobody to tell
                click.echo(message, err=True)

    def warning(self, message: str) -> None:
        """Warn, in every mode."""
        print_line("warning", message, "yellow")

    def hint(self, message: str) -> None:
        """Tell people what they could do next."""
        if self.mode == "human":
            print_line("hint", message, "cyan")

    def confirm(self, question: str, *, is_answered: bool) -> bool:
        """Ask before something is destroyed, unless ``-y`` has answered.

        Raises:
            HintedError: There is no terminal to ask on.
        """
        if is_answered:
            return True
        if not sys.stdin.isatty():
            raise HintedError(
                "this needs a confirmation, and there is no terminal to ask on",
                "`-y` confirms, `-n` shows what would happen",
            )
        return click.confirm(question, err=True)

    @contextmanager
    def progress(self) -> Iterator[Bars]:
        """Yield progress bars, which are gone again at the end."""
        bars = Bars(self.mode != "quiet" and sys.stderr.isatty())
        try:
            yield bars
        finally:
            bars.clear()


def print_line(label: str, message: str, colour: str) -> None:
    """Print ``label: message`` on stderr, in one line."""
    if has_colour(sys.stderr):
        label = click.style(label, fg=colour, bold=True)
    click.echo(f"{label}: {one_line(message)}", err=True)


def print_failure(
    message: str, hint: str, exit_code: int = 1, *, as_json: bool = False
) -> None:
    """Print an error and what can be done about it, on stderr.

    With ``as_json`` on stdout too, unless there is a document already.
    """
    print_line("error", message, "red")
    print_line("hint", hint, "cyan")
    if as_json and not _documents:
        error = {"message": message, "hint": hint, "exit_code": exit_code}
        Output("json").result("", {"error": error})
    _documents.clear()


def has_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal that may show colour."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return not is_plain and stream.isatty()


def one_line(text: str) -> str:
    """Return ``text`` without line ends and other characters that move a cursor."""
    joined = " ".join(text.split())
    return "".join(
        c if c.isprintable() or c in JOINERS else repr(c)[1:-1] for c in joined
    )


def printable(text: str) -> str:
    """Return a text without what would move a terminal's cursor."""
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c
        for c in text
    )


def terminal_width() -> int | None:
    """Return how many columns stdout has; ``None`` where it is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def format_codec(codec: str) -> str:
    """Return the name of a codec without most of its basis's digest."""
    name, at, rest = codec.partition("@")
    return f"{name}@{rest[:12]}{rest[64:]}" if at else name


def format_bytes(nbytes: int) -> str:
    """Return a size in decimal units, such as ``1.2 MB``."""
    size, unit = float(nbytes), 0
    # Not 1000: 999.95 would be rounded up to 1000.0.
    while size >= 999.95 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{nbytes} B" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def format_time(at: float) -> str:
    """Return a time as people read it, in their time zone."""
    return f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M}"


def format_ago(at: float) -> str:
    """Return how long ago a time was, such as ``2 h ago``; the day where it is long."""
    age = time.time() - at
    if not -60 < age < 60 * 86_400:
        return f"{datetime.fromtimestamp(at):%Y-%m-%d}"
    for unit, seconds in (("d", 86_400), ("h", 3600), ("min", 60)):
        if age >= seconds:
            return f"{age / seconds:.0f} {unit} ago"
    return "now"


def to_rfc3339(at: float) -> str:
    """Return a time as programs read it."""
    text = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun, such as ``1 entry`` or ``1,000 entries``."""
    if number == 1:
        return f"1 {noun}"
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {plural}"


def format_fields(fields: Sequence[tuple[str, str]]) -> list[str]:
    """Return names and values as lines, the values one below the other."""
    width = max(len(name) for name, _ in fields) + 1
    return [f"{name + ':':<{width}} {one_line(value)}" for name, value in fields]


def format_table(
    items: Sequence[T], columns: Sequence[Column[T]], width: int | None = None
) -> list[str]:
    """Return a table as lines: headers, one line per item, and totals if any.

    Columns are left out and texts shortened to fit ``width``; ``None`` does neither.
    """
    texts = [
        [column.header, *(one_line(column.cell(item)) for item in items)]
        for column in columns
    ]
    if any(column.total for column in columns):
        for cells, column in zip(texts, columns, strict=True):
            cells.append(column.total)
    widths = [max(map(_cells, cells)) for cells in texts]
    chosen = list(range(len(columns)))
    if width is not None:
        chosen = _choose(columns, widths, width)
        widths = _fit(widths, columns, chosen, width)
    return [
        _format_row([(row[i], columns[i], widths[i]) for i in chosen])
        for row in zip(*texts, strict=True)
    ]


def _format_row(cells: Iterable[tuple[str, Column[T], int]]) -> str:
    shown = []
    for text, column, width in cells:
        short = _shorten(text, width)
        padding = " " * (width - _cells(short))
        shown.append(padding + short if column.is_number else short + padding)
    return _GAP.join(shown).rstrip()


def _line_width(widths: Iterable[int]) -> int:
    return sum(width + len(_GAP) for width in widths) - len(_GAP)


def _choose(
    columns: Sequence[Column[T]], widths: Sequence[int], total: int
) -> list[int]:
    """Return the columns to show: as many as leave all that are shown readable."""
    chosen = list(range(len(columns)))
    needed = [
        width if column.is_number else min(width, _READABLE)
        for width, column in zip(widths, columns, strict=True)
    ]
    while _line_width(needed[i] for i in chosen) > total:
        least = max(chosen, key=lambda i: columns[i].rank)
        if not columns[least].rank:
            break
        chosen.remove(least)
    return chosen


def _fit(
    widths: Sequence[int],
    columns: Sequence[Column[T]],
    chosen: Sequence[int],
    total: int,
) -> list[int]:
    """Return narrower widths for texts, so that a line fits; numbers stay whole."""
    fitted = list(widths)
    texts = [i for i in chosen if not columns[i].is_number]
    while _line_width(fitted[i] for i in chosen) > total:
        widest = max(texts, key=lambda i: fitted[i], default=None)
        if widest is None or fitted[widest] <= _MIN_WIDTH:
            break
        fitted[widest] -= 1
    return fitted


def _shorten(text: str, width: int) -> str:
    if _cells(text) <= width:
        return text
    while _cells(text) > width - 1:
        text = text[:-1]
    return f"{text}…"


def _cells(text: str) -> int:
    """Return how many cells of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from wcwidth import wcswidth

    return max(0, wcswidth(text))
