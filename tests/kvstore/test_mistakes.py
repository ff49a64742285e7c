"""What is commonly got wrong in Python is told in a sentence, with what is right."""

import pytest

import kvstore
from kvstore import ArgumentError, KVStoreError


@pytest.fixture
def store(store_path, caches):
    """A store with an entry `doc`."""
    with kvstore.Store(store_path, "raw") as opened:
        tokens, cache = caches.make_conversation(2, 1)
        opened.save(tokens, cache, caches.MODEL, name="doc")
        yield opened


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ({"tokens": "a text"}, "tokens are integers", "tokenizer.encode"),
        ({"tokens": [[1, 2], [3, 4]]}, "tokens are integers", "one row"),
        ({"tokens": [1.0, 2.0]}, "tokens are integers", "tokenizer.encode"),
        ({"tokens": range(31)}, "holds 32 rows for 31 tokens", "all but the last"),
        ({"prompt_cache": None}, "a prompt cache is a list", "make_prompt_cache"),
        ({"prompt_cache": []}, "the prompt cache is empty", "was fed"),
        ({"fingerprint": "path/to/model"}, "a fingerprint is no str", "from_path"),
        ({"tokens": [1 << 70] * 32}, "64 bits", "63 bits"),
        ({"name": 5}, "a name is text, and no int", "entry.name"),
        ({"name": "-x"}, "a name has", "another name"),
        ({"name": "ab" * 16}, "a name is not like an id", "another name"),
    ],
)
def test_a_mistake_in_a_save_has_a_hint(store, caches, arguments, message, hint):
    """It can be caught with all other errors, and as what Python calls it."""
    tokens, prompt_cache = caches.make_conversation(2, 2)
    usual = {
        "tokens": tokens,
        "prompt_cache": prompt_cache,
        "fingerprint": caches.MODEL,
    }
    with pytest.raises(ArgumentError, match=message) as caught:
        store.save(**usual | arguments)
    assert hint in caught.value.hint
    assert isinstance(caught.value, KVStoreError | ValueError | TypeError)


@pytest.mark.parametrize("verb", ["load", "lookup", "explain"])
@pytest.mark.parametrize(
    ("tokens", "fingerprint", "message"),
    [([], None, "no tokens"), ("text", None, "integers"), ([1], "M", "no str")],
)
def test_a_mistake_in_a_question_has_a_hint(
    store, caches, verb, tokens, fingerprint, message
):
    """Whatever is asked of a prompt."""
    with pytest.raises(ArgumentError, match=message) as caught:
        getattr(store, verb)(tokens, fingerprint or caches.MODEL)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda store: store.entry(5), "a name is text"),
        (lambda store: store.load([1 << 70] * 300, 5), "no int"),
        (lambda store: kvstore.Store(5), "a store is a folder"),
        (lambda store: kvstore.Store(store.path, base=5), "a store is a folder"),
        (lambda store: kvstore.tier(None), "needs the live model"),
    ],
)
def test_a_thing_of_another_kind_has_a_hint(store, use, message):
    """A number for a name or a folder, and nothing for a model."""
    with pytest.raises(ArgumentError, match=message) as caught:
        use(store)
    assert caught.value.hint


def test_a_notebook_shows_entries(store, caches):
    """As text, whatever they are called; a closed store as what it is."""
    tokens, cache = caches.make_conversation(2, 5)
    store.save(tokens, cache, caches.MODEL, name="<b>bold", title="<script>")
    shown = store._repr_html_()
    assert "2 entries" in shown
    assert "<td>&lt;b&gt;bold</td>" in shown
    assert "<script>" not in shown
    store.close()
    assert store._repr_html_().endswith("closed&gt;")


def test_a_closed_store_says_so(store, caches):
    """It is not opened again behind its owner's back; closing twice is none."""
    store.close()
    store.close()
    assert repr(store) == f"<kvstore.Store {str(store.path)!r}, closed>"
    for use in (
        store.entries,
        store.stats,
        lambda: store.load([1, 2], caches.MODEL),
        lambda: store.remove("doc"),
        lambda: len(store),
    ):
        with pytest.raises(KVStoreError, match="the store is closed") as caught:
            use()
        assert "kvstore.Store(path)" in caught.value.hint


def test_a_store_is_a_collection_of_entries(store):
    """It has a length, can be walked, knows names, and is never false."""
    assert (len(store), [entry.name for entry in store]) == (1, ["doc"])
    assert "doc" in store
    assert None not in store
    store.remove("doc")
    assert "doc" not in store
    assert store
    assert repr(store) == f"<kvstore.Store {str(store.path)!r}>"
