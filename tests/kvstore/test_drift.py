"""A server says once what differs in each request."""

import random

import pytest

from kvstore.server.drift import Drift, find_drift

BODY = "\n".join(f"Rule {n}: word {n * 7 % 31} before word {n * 5}." for n in range(40))


def decode(tokens):
    """Return the text of tokens; each is a letter."""
    return "".join(map(chr, tokens))


def encode(text):
    """Return the tokens of a text."""
    return list(map(ord, text))


def clock(number):
    """Return a prompt with a clock in its head."""
    return encode(f"You help.\nIt is 2026-11-27, 09:{number:02}:17.\n{BODY}")


def told(prompts, num_computed=1000):
    """Return what is said of each of some prompts, each known when it is answered."""
    drift, known, found = Drift(), [], []
    for prompt in prompts:
        known.append([*prompt, 7, 8])
        change = find_drift(prompt, num_computed, known, decode)
        found.append(change and drift.note(change))
    return found


def test_a_clock_is_told_the_third_time_and_once():
    """With its line, how much it costs and what to do; and nothing of its text."""
    first, second, third, words, *later = told(map(clock, range(9)))
    assert (first, second, third, set(later)) == (None, None, None, {None})
    assert "in line 2" in words
    assert "put it into the last message" in words
    assert int(words.split(" tokens")[0].split()[-1].replace(",", "")) > 1000
    assert "2026" not in words
    assert "09" not in words


@pytest.mark.parametrize(
    "prompts",
    [
        [clock(0)] * 6,
        [clock(0) + encode("And then? " * n) for n in range(6)],
        [encode(f"It is 09:0{n}. Go on.") for n in range(6)],
        [random.Random(n).choices(range(60, 90), k=2000) for n in range(6)],
        [],
    ],
    ids=["same", "longer", "short", "others", "none"],
)
def test_what_does_not_differ_before_much_is_not_told(prompts):
    """The same again, what goes on, and what has nothing in common."""
    assert not any(told(prompts))


def test_what_costs_nothing_is_not_told():
    """A prompt that was held, whatever differs from another one."""
    assert not any(told(map(clock, range(6)), num_computed=100))


def test_the_same_lines_again_and_again_are_not_compared_for_minutes():
    """Comparing all of them would take the square of their number."""
    lines = random.Random(1).choices(["yes", "no", "perhaps"], k=20_000)
    prompts = [encode(f"At 09:0{n}.\n" + "\n".join(lines)) for n in range(4)]
    assert "in line 1" in told(prompts)[-1]
