"""Where a prompt differs from a stored one: which line, why, and what it costs."""

import json

import pytest

from kvstore.models.changes import ADVICE, find_changes

RULES = "".join(f"Rule {n}: be brief, and say why it is so.\n" for n in range(9))
HEAD = "You are an agent.\nToday is 2026-11-25.\n"
TOOLS = [
    json.dumps({"function": {"name": name, "description": f"{name} a file. " * 4}})
    for name in ("read", "write", "search")
]


def decode(tokens):
    """Return the text of tokens that are the bytes of it."""
    return bytes(tokens).decode(errors="replace")


def changes(stored, given):
    """Return what differs between two texts."""
    return find_changes(list(stored.encode()), list(given.encode()), decode)


def test_a_change_is_shown_in_its_line_with_what_stands_behind():
    """The first token that differs, its line on both sides, and the tokens behind."""
    given = HEAD.replace("25", "26") + RULES + "And now?"
    (found,) = changes(HEAD + RULES, given)
    assert found.position == HEAD.index("25") + 1
    assert found.line == 2
    assert found.stored == "Today is 2026-11-2⟦5⟧."
    assert found.given == "Today is 2026-11-2⟦6⟧."
    assert found.num_behind == len(HEAD + RULES) - found.position - 1
    assert found.cause == "clock"
    assert found.advice == ADVICE["clock"]


def test_each_change_counts_what_stands_behind_it_up_to_the_next():
    """Who mends the first only moves the end of the hit to the second."""
    stored = HEAD + RULES + "id: 0a1b2c3d4e\n" + RULES + "Bye."
    given = stored.replace("25", "26").replace("0a1b2c3d4e", "9f8e7d6c5b") + "More."
    first, second = changes(stored, given)
    assert first.position + 1 + first.num_behind == second.position
    assert (first.cause, second.cause) == ("clock", "id")
    assert second.num_behind == len(stored) - stored.index("0a1b2c3d4e") - 10


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("", "", None),
        ("Monday, 3 pm\n", "Tuesday, 3 pm\n", "clock"),
        ("Nov 25 2026\n", "Nov 26 2026\n", "clock"),
        ("request 5d3c9a7e-11aa\n", "request 6e4d0b8f-22bb\n", "id"),
        ("On branch main\n", "On branch fix\n", "place"),
        ("cwd: /home/a\n", "cwd: /home/b\n", "place"),
        ("<think>\nit is so\n</think>\n", "", "thinking"),
        ("a  b\n", "a b\n", "space"),
        ("Be kind.\n", "Be curt!\n", "text"),
        ("".join(TOOLS), "".join(TOOLS[:2]), "tools"),
        ("".join(TOOLS), TOOLS[2] + TOOLS[0] + TOOLS[1], "order"),
    ],
)
def test_the_cause_is_told_by_the_text(old, new, cause):
    """A clock, an id, a folder, tools, reasoning that is left out, or just text."""
    found = changes(f"Hello.\n{old}{RULES}", f"Hello.\n{new}{RULES}")
    assert {change.cause for change in found} == ({cause} if cause else set())


def test_the_same_text_in_other_tokens_is_no_fault_of_the_client():
    """What the model sampled is split in another way when it comes back."""
    stored = [*b"Say: ", 1000, *RULES.encode()]
    given = [*b"Say: ", *b"ab", *RULES.encode()]

    def spell(tokens):
        return "".join("ab" if t == 1000 else chr(t) for t in tokens)

    (found,) = find_changes(stored, given, spell)
    assert (found.cause, found.position) == ("tokens", 5)


@pytest.mark.parametrize(
    ("stored", "given"),
    [
        ("", "abc"),
        ("abc", "abc"),
        ("abc", "abcdef"),
        (RULES, RULES + "Then?"),
        (RULES + "One.", RULES + "Two."),
        (RULES, "Nothing of it."),
    ],
)
def test_what_ends_or_is_new_is_no_change(stored, given):
    """Nothing stands behind it that would have to be computed again."""
    assert changes(stored, given) == []


def test_a_long_change_is_shortened_in_the_middle():
    """The text shown of it is bounded."""
    (found,) = changes("x" * 500 + RULES, "y" * 500 + RULES)
    assert len(found.stored) < 120
    assert "…" in found.stored
