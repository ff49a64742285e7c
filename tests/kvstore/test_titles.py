"""An entry says what it is about: the first words of the first message."""

import shutil
from dataclasses import replace

import pytest
from kit import save_prompt, stream_generate

import kvstore
from kvstore.errors import IntegrityError
from kvstore.format.entry import MAX_TITLE, clean_title, entry_to_bytes, parse_entry
from kvstore.models.templates import Template
from kvstore.models.titles import make_title

QUESTION = "Who may sign for a sum of more than a hundred?"


@pytest.fixture
def store(store_path):
    """A store of small blocks that loses nothing."""
    with kvstore.Store(store_path, "raw") as opened:
        yield opened


def test_a_title_is_the_first_message(loaded, store):
    """Neither what the system says nor the marks of the template are in it."""
    model, tokenizer, fingerprint = loaded
    prompt = Template(tokenizer).encode_prompt(QUESTION, "Be kind. " * 20)
    options = {"store": store, "fingerprint": fingerprint, "max_tokens": 4}
    list(stream_generate(model, tokenizer, prompt, name="chat", **options))
    assert store.entry("chat").title == QUESTION


def test_a_title_stays_as_the_conversation_grows(loaded, store):
    """What continues an entry keeps its title, also where nobody names it."""
    model, tokenizer, fingerprint = loaded
    tokens = Template(tokenizer).encode_prompt(QUESTION)
    save_prompt(model, tokens, store=store, fingerprint=fingerprint, name="a")
    assert store.entry("a").title == ""  # there is no tokenizer
    cache, rest = store.load([*tokens, 1], fingerprint)
    assert rest == [1]
    store.save(tokens, cache, fingerprint, name="a", title="First words")
    assert store.save(tokens, cache, fingerprint, name="a").title == "First words"
    # What replaces it has its own.
    longer = save_prompt(
        model, [5] * 40, store=store, fingerprint=fingerprint, name="a", replace=True
    )
    assert longer[0].title == ""


def test_a_title_goes_with_its_entry(loaded, store, empty_store, tmp_path):
    """Names, pins and bundles leave it as it is."""
    model, _, fingerprint = loaded
    tokens = list(range(40))
    save_prompt(model, tokens, store=store, fingerprint=fingerprint)
    cache, _ = store.load([*tokens, 1], fingerprint)
    store.save(tokens, cache, fingerprint, name="a", title="First words")
    assert store.pin("a").title == store.rename("a", "b").title == "First words"
    with (tmp_path / "b.kvbundle").open("w+b") as file:
        store.export_bundle("b", file)
        file.seek(0)
        with kvstore.Store(shutil.copytree(empty_store, tmp_path / "other")) as other:
            assert other.import_bundle(file).title == "First words"


def test_plain_text_has_a_title(loaded):
    """Without a chat template the first words of all are taken."""
    tokenizer = loaded[1]
    assert make_title(tokenizer, tokenizer.encode("Some plain text")) == (
        "Some plain text"
    )
    assert make_title(None, [1, 2]) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  two\n lines\t", "two lines"),
        ("a\x1b[31mb\x00c\u202ed", "a[31mbcd"),
        ("می\u200cخواهم 👩\u200d👧", "می\u200cخواهم 👩\u200d👧"),
        ("word " * 40, "word " * 14 + "word…"),
        ("x" * 200, "x" * (MAX_TITLE - 1) + "…"),
        ("", ""),
    ],
)
def test_a_title_is_one_line_that_can_be_shown(text, expected):
    """Control characters go, joiners stay, and long texts end in a dot of three."""
    title = clean_title(text)
    assert title == expected
    assert len(title) <= MAX_TITLE
    assert clean_title(title) == title


@pytest.mark.parametrize("title", ["a\x1bb", "x" * 200, " a"])
def test_a_title_that_no_store_writes_is_refused(loaded, store, title):
    """An entry's file is strict in this field too."""
    model, _, fingerprint = loaded
    entry, _ = save_prompt(model, [1, 2], store=store, fingerprint=fingerprint)
    path = store.path / "entries" / f"{entry.id}.json"
    assert b"title" not in entry_to_bytes(entry)
    with pytest.raises(IntegrityError, match="wrong type"):
        parse_entry(path, entry_to_bytes(replace(entry, title=title)))
