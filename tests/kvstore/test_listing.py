"""What is there can be seen: in a list, in a tree of what entries share, in words."""

import json

import pytest

import kvstore
from kvstore.cli.commands.entries import codec_words


@pytest.fixture
def forest(store_path, caches):
    """A document of 3 blocks, two answers on it, and another one without a name."""
    with kvstore.Store(store_path, "raw") as store:
        for name, seed, title in (
            ("doc", 0, ""),
            ("first", 7, ""),
            ("second", 8, ""),
            (None, 9, "Who may sign?"),
        ):
            start = seed if name is None else 1
            tokens, cache = caches.make_conversation(3, start, extra=0)
            tokens = list(tokens)
            if name != "doc":
                tokens += [seed] * 40
                cache = caches.grow(cache, caches.random_rows(40, seed))
            store.save(tokens, cache, caches.MODEL, name=name, title=title)
    return store_path


@pytest.fixture
def ls(forest, run_cli):
    """A function that runs `ls` and returns what it printed."""

    def call(*words):
        code, out, err = run_cli("ls", *words, store=forest)
        assert code == 0, err
        return json.loads(out) if "--json" in words else out

    return call


def test_a_tree_shows_what_begins_alike(ls, forest):
    """Answers hang from the document, and every byte is counted once."""
    lines = ls("--tree", "--json")
    shown = [(line["depth"], (line["entry"] or {}).get("name")) for line in lines]
    assert shown[0] == (0, None)
    assert set(shown[1:]) == {(1, None), (1, "doc"), (2, "first"), (2, "second")}
    at = shown.index((1, "doc"))
    assert {shown[at + 1], shown[at + 2]} == {(2, "first"), (2, "second")}
    with kvstore.Store(forest) as store:
        assert sum(line["nbytes"] for line in lines) == store.stats().reached_bytes
    assert "└── first" in ls("--tree")


def test_what_is_shared_without_an_entry_has_its_line(ls, forest):
    """Two answers share a document that was removed."""
    with kvstore.Store(forest) as store:
        store.remove("doc")
    lines = [line for line in ls("--tree", "--json") if not line["entry"]]
    assert [(line["depth"], line["num_tokens"]) for line in lines] == [(0, 0), (1, 48)]
    assert "shared by 2" in ls("--tree")


def test_the_last_use_is_that_of_any_block(ls, forest, caches, monkeypatch):
    """Who loads the document uses its answers too, as eviction sees it."""
    with kvstore.Store(forest) as store:
        monkeypatch.setattr("time.time", lambda: 4_000_000_000.0)
        tokens, _ = caches.make_conversation(3, 1, extra=0)
        store.load([*tokens, 1], caches.MODEL)
    uses = {entry["name"]: entry["used_at"] for entry in ls("--json")}
    assert {name for name, at in uses.items() if at.startswith("2096")} == {
        "doc",
        "first",
        "second",
    }
    assert ls("--sort", "used").splitlines()[4].startswith('"Who may sign?"')


@pytest.mark.parametrize("order", ["tokens", "size"])
def test_the_largest_come_first(ls, order):
    """Sizes are sorted from large to small."""
    assert ls("--sort", order, "--json")[-1]["name"] == "doc"


def test_names_are_sorted_and_can_be_asked_for(ls):
    """What has no name stands at the end, and is left out with `--named`."""
    names = [entry["name"] for entry in ls("--sort", "name", "--json")]
    assert names == ["doc", "first", "second", None]
    assert [e["name"] for e in ls("--sort", "name", "--named", "--json")] == names[:3]


def test_what_is_pinned_is_marked(ls, forest, run_cli):
    """In the list, and in what `inspect` says."""
    assert "PIN" not in ls()
    run_cli("pin", "doc", store=forest)
    header, *lines = ls("--sort", "name").splitlines()
    assert lines[0][header.index("PIN") :].startswith("yes")
    assert "never evicted" in run_cli("inspect", "doc", store=forest)[1]


def test_a_list_without_an_index_has_no_uses(ls, monkeypatch):
    """Where another process keeps the index locked, the list comes all the same."""

    def locked(*_, **__):
        raise kvstore.StoreLockedError("locked")

    monkeypatch.setattr("kvstore.ops.tree.last_uses", locked)
    assert len(ls("--json")) == 4


@pytest.mark.parametrize(
    ("codec", "words"),
    [
        ("raw", "all bits, as they are in memory"),
        ("planes+zstd", "all bits, those of like weight together; then zstd"),
        ("turbo4", "codes of 4 bits a number"),
        ("turbo5v3", "codes of 5 bits a number for keys, of 3 for values"),
        (f"fit2@{'ab' * 32}", "about 2 bits a number, in the basis abababababab"),
        ("mine", "`mine`, a codec from elsewhere"),
    ],
)
def test_codecs_are_told_in_words(codec, words):
    """Nobody has to know what `turbo5v3` stands for."""
    assert codec_words(codec) == words


def test_prune_says_why_nothing_is_freed(forest, run_cli):
    """Each reason comes with what would free the bytes."""

    def hint():
        return run_cli("prune", "-n", store=forest)[2]

    assert "entries need all that is left" in hint()
    assert "--purge" in run_cli("rm", "first", "-y", store=forest)[2]
    assert "younger than an hour" in hint()
    assert "--now" in run_cli("stats", store=forest)[2]
    (damaged, *_) = (forest / "entries").glob("*.json")
    damaged.write_bytes(b"{}")
    (forest / "index.sqlite").unlink()
    assert "an entry is damaged" in hint()
