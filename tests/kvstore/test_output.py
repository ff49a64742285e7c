"""What the command line prints is stable, readable, and one document in JSON."""

import io
import json
import os
import pty
import subprocess
import sys
from datetime import datetime
from functools import partial

import pytest

from kvstore.cli.output import (
    Column,
    HintedError,
    Output,
    format_ago,
    format_bytes,
    format_count,
    format_fields,
    format_table,
    has_colour,
    one_line,
    print_failure,
    to_rfc3339,
)

COLUMNS = [
    Column("NAME", lambda item: item[0], total="2 things"),
    Column("SIZE", lambda item: f"{item[1]:,}", is_number=True, total="1,005"),
]
ITEMS = [("alpha", 5), ("a name that is long", 1000)]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_234_567, "1.2 MB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (2 * 10**9, "2.0 GB"),
        (10**19, "10000.0 PB"),
    ],
)
def test_sizes_are_decimal(nbytes, text):
    """A size has one decimal in the largest unit that leaves it above one."""
    assert format_bytes(nbytes) == text


def test_counts_agree_with_their_noun():
    """One thing is singular, all other numbers are plural."""
    assert format_count(1, "entry") == "1 entry"
    assert format_count(0, "entry") == "0 entries"
    assert format_count(1000, "token") == "1,000 tokens"


def test_times_for_programs_are_rfc_3339():
    """A time is UTC with a Z, so that programs can read and sort it."""
    assert to_rfc3339(1_700_000_000.25) == "2023-11-14T22:13:20.250Z"


def test_a_table_has_capitals_right_numbers_and_a_total():
    """Numbers end in one column, texts begin in one, and no line ends in blanks."""
    assert format_table(ITEMS, COLUMNS) == [
        "NAME                  SIZE",
        "alpha                    5",
        "a name that is long  1,000",
        "2 things             1,005",
    ]


def test_a_table_fits_its_terminal():
    """On a narrow terminal texts are shortened and numbers stay whole."""
    lines = format_table(ITEMS, COLUMNS, width=18)
    assert max(map(len, lines)) == 18
    assert lines[2] == "a name tha…  1,000"


def test_a_narrow_table_leaves_columns_out_before_it_cuts_texts():
    """The columns of the highest rank go first, as many as must."""
    ranked = [
        *COLUMNS,
        Column("LESS", lambda item: "l" * 20, rank=1),
        Column("LEAST", lambda item: "m" * 20, rank=2),
    ]

    def headers(width):
        return format_table(ITEMS, ranked, width)[0].split()

    assert headers(None) == headers(100) == ["NAME", "SIZE", "LESS", "LEAST"]
    assert headers(58) == headers(41) == ["NAME", "SIZE", "LESS"]
    assert headers(40) == headers(10) == ["NAME", "SIZE"]


@pytest.mark.parametrize(
    ("age", "text"),
    [
        (-5, "now"),
        (0, "now"),
        (59, "now"),
        (60, "1 min ago"),
        (7200, "2 h ago"),
        (5 * 86_400, "5 d ago"),
        (100 * 86_400, "2026-01-01"),
        (-86_400, "2026-04-12"),
    ],
)
def test_times_for_people_are_relative(monkeypatch, age, text):
    """What is long ago, or ahead of the clock, is a date."""
    now = datetime(2026, 4, 11, 12).timestamp()
    monkeypatch.setattr("time.time", lambda: now)
    assert format_ago(now - age) == text


def test_a_table_that_cannot_fit_keeps_its_numbers():
    """Below a least width of texts a table is wider than its terminal."""
    assert format_table(ITEMS, COLUMNS, width=3)[2].endswith("1,000")


def test_wide_letters_take_two_cells():
    """Names in Chinese leave the columns behind them in line."""
    lines = format_table([("日本", 1), ("abcd", 2)], COLUMNS)
    assert lines[1:3] == ["日本          1", "abcd          2"]


def test_fields_stand_below_each_other():
    """All values of a list of fields begin in one column."""
    assert format_fields([("id", "a"), ("tokens", "2")]) == ["id:     a", "tokens: 2"]


def test_nothing_printed_moves_the_cursor():
    """Line ends and escape sequences in a name cannot alter the terminal."""
    assert one_line("a\n b\x1b[2J") == "a b\\x1b[2J"
    assert one_line("\u202ead") == "\\u202ead"


@pytest.mark.parametrize("text", ["👩‍👩‍👧", "می‌خواهم", "क्‍ष"])
def test_joined_letters_stay_joined(text):
    """Emoji and the letters of Persian and Hindi are printed as they are."""
    assert one_line(text) == text


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("human", "saved\n"), ("quiet", "1\n2\n"), ("json", '{\n  "a": 1\n}\n')],
)
def test_a_result_has_three_forms(mode, expected, capsys):
    """People get a sentence, programs a document, pipes the ids."""
    Output(mode).result("saved", {"a": 1}, ["1", "2"])
    assert capsys.readouterr().out == expected


def test_a_document_moves_no_cursor(capsys):
    """What a program reads may be looked at, and may come from elsewhere."""
    Output("json").result("", {"a": "\x9b31m\u202e"})
    out = capsys.readouterr().out
    assert out.isascii()
    assert "\x9b31m\u202e" == json.loads(out)["a"]


@pytest.mark.parametrize("mode", ["human", "quiet", "json"])
def test_an_empty_table_is_no_line_on_stdout(mode, capsys):
    """Nothing found is nothing to grep; in JSON it is an empty list."""
    Output(mode).table(
        [], COLUMNS, data=list, id_of=lambda item: item[0], empty="no things"
    )
    out, err = capsys.readouterr()
    assert out == ("[]\n" if mode == "json" else "")
    assert err == ("no things\n" if mode == "human" else "")


def test_only_results_go_to_stdout(capsys):
    """All else goes to stderr, and to programs warnings alone."""
    for mode in ("human", "json", "quiet"):
        output = Output(mode)
        output.note("a note")
        output.hint("a hint")
        output.warning("a warning")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["a note", "hint: a hint", *["warning: a warning"] * 3]


def test_a_failure_is_two_lines(capsys):
    """However long an error is, it takes one line, and its hint another."""
    print_failure("first\nsecond", "do this")
    assert capsys.readouterr().err == "error: first second\nhint: do this\n"


def test_a_question_needs_a_terminal_or_a_flag(monkeypatch):
    """Without a terminal a question is an error that names the flag."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(HintedError) as caught:
        Output().confirm("remove it?", is_answered=False)
    assert "`-y`" in caught.value.hint
    assert Output().confirm("remove it?", is_answered=True)


def test_colour_needs_a_terminal_that_wants_it(monkeypatch):
    """NO_COLOR and dumb terminals are honoured, and a pipe gets none."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert has_colour(terminal)
    assert not has_colour(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not has_colour(terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colour(terminal)


BARS = """
import sys
from kvstore.cli.output import Output
with Output().progress() as bars:
    prefill, save = bars.bar("prefill"), bars.bar("save")
    prefill(0, 2)
    prefill(2, 2)
    bars.clear()
    print("text")
    save(1, 2)
print("rich" in sys.modules)
"""


def test_bars_are_drawn_on_a_terminal_only():
    """A pipe gets no progress bar, and no second for the import of rich."""
    finished = subprocess.run(
        [sys.executable, "-c", BARS], capture_output=True, text=True, check=True
    )
    assert (finished.stdout, finished.stderr) == ("text\nFalse\n", "")


def _read(terminal: int) -> bytes:
    """What comes next of a terminal; empty where its other end is closed."""
    # One read may end before all that was drawn.
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_bars_go_to_stderr_and_leave_it_clean():
    """On a terminal bars are drawn on stderr, again after text; stdout stays clean."""
    outer, inner = pty.openpty()
    finished = subprocess.run(
        [sys.executable, "-c", BARS],
        stdout=subprocess.PIPE,
        stderr=inner,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "80"},
        check=True,
    )
    os.close(inner)
    drawn = b"".join(iter(partial(_read, outer), b""))
    assert finished.stdout == b"text\nTrue\n"
    assert -1 < drawn.index(b"prefill") < drawn.index(b"save")
    os.close(outer)
