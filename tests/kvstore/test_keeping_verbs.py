"""The verbs that keep a store in order, from the command line."""

import json

import apsw
import pytest
from click.testing import CliRunner

import kvstore
from kvstore.cli import cli


@pytest.fixture
def store_with(store_path, caches):
    """A store with two named entries and one without a name."""
    with kvstore.Store(store_path, codec="raw") as store:
        for seed, name in enumerate(("a", "b", None), 1):
            tokens, cache = caches.make_conversation(2, seed)
            store.save(tokens, cache, caches.MODEL, name=name)
    return store_path


@pytest.fixture
def run(store_with):
    """A function that runs a verb and returns what it printed as JSON."""

    def call(*arguments, exit_code=0):
        result = CliRunner().invoke(
            cli, ["--store", str(store_with), "--json", *arguments]
        )
        assert result.exit_code == exit_code, result.output
        return json.loads(result.stdout) if result.stdout else None

    return call


def test_prune_frees_what_rm_left(run, store_with):
    """After `rm`, `prune --now` frees the entry's bytes; a dry run frees none."""
    run("rm", "a", "-y")
    planned = run("prune", "--now", "-n")
    assert planned["dry_run"] is True
    assert run("prune", "--now", "-y")["freed_bytes"] == planned["freed_bytes"] > 0
    assert run("prune", "--now", "-n")["freed_bytes"] == 0


def test_prune_asks_first(run):
    """Without a terminal and without `-y` nothing is freed."""
    run("rm", "a", "-y")
    run("prune", "--now", exit_code=2)
    assert run("prune", "--now", "-n")["freed_bytes"] > 0


def test_prune_evicts_down_to_a_size(run):
    """`--max-size` evicts what has no name, and names only when asked."""
    assert [e["name"] for e in run("prune", "--max-size", "0", "-n")["entries"]] == [
        None
    ]
    both = run("prune", "--max-size", "0", "--named", "-n")["entries"]
    assert [entry["name"] for entry in both] == [None, "a", "b"]
    run("pin", "a")
    run("prune", "--max-size", "0B", "--named", "-y")
    assert [entry["name"] for entry in run("ls")] == ["a"]


@pytest.mark.parametrize(
    ("text", "nbytes"), [("20GB", 20e9), ("1.5 MB", 1.5e6), ("512k", 512e3), ("9", 9)]
)
def test_sizes_are_decimal(run, text, nbytes):
    """A size is read with its unit, and the limit is kept."""
    run("prune", "--limit", text, "-y")
    assert run("stats")["max_bytes"] == nbytes


@pytest.mark.parametrize(
    "arguments",
    [
        ("--max-size", "much"),
        ("--older-than", "long"),
        ("--limit", "-1"),
        ("--limit", "0", "-y"),
        ("--limit", "99999999999999999999TB"),
        ("--max-size", "9" * 400),
    ],
)
def test_bad_values_are_usage_errors(run, arguments):
    """What is no size and no length of time is refused."""
    run("prune", *arguments, exit_code=2)


def test_rename_and_pin_show_in_the_list(run):
    """A renamed entry has its new name, a pinned one says so."""
    assert run("rename", "a", "z")["name"] == "z"
    assert run("pin", "z")["pinned"] is True
    assert run("pin", "z", "--off")["pinned"] is False
    run("rename", "z", "b", exit_code=1)
    assert sorted(str(entry["name"]) for entry in run("ls")) == ["None", "b", "z"]


def test_stats_sum_up(run):
    """`stats` counts entries, blocks and what was written."""
    found = run("stats")
    assert (found["num_entries"], found["num_blocks"]) == (3, 6)
    assert found["counters"]["written_bytes"] == found["nbytes"]
    assert found["compression_ratio"] < 1  # raw rows and headers


def test_stats_of_a_store_whose_sums_are_known(store_path, caches):
    """Sharing, compression and what no entry needs are those of what lies there."""
    shared = caches.random_rows(2 * caches.BLOCK, 1)
    tokens = list(range(2 * caches.BLOCK))
    with kvstore.Store(store_path, codec="raw") as store:
        for name, seed in (("a", 2), ("b", 3), (None, 4)):
            cache = caches.grow(None, shared)
            cache = caches.grow(cache, caches.random_rows(caches.BLOCK, seed))
            own = [seed] * caches.BLOCK
            store.save(tokens + own, cache, caches.MODEL, name=name)
        found = store.stats()
        block_bytes = 2 * 2 * 2 * caches.BLOCK * 64 * 2  # layers, sides, heads, BF16
        assert found.num_blocks == 5
        assert found.reached_bytes == pytest.approx(found.nbytes, abs=10)
        assert found.dedup_ratio == pytest.approx(9 / 5, rel=0.02)
        assert found.compression_ratio == pytest.approx(
            5 * block_bytes / found.nbytes, abs=0.001
        )
        kept = 4 / 5 * found.nbytes
        assert found.kept_bytes == pytest.approx(kept, rel=0.05)
        store.remove("a")
        after = store.stats()
        assert after.nbytes == found.nbytes
        assert after.reached_bytes == pytest.approx(kept, rel=0.05)
        assert after.dedup_ratio == pytest.approx(6 / 4, rel=0.02)
        for entry in store.entries():
            store.remove(entry.id)
        empty = store.stats()
        assert (empty.reached_bytes, empty.dedup_ratio) == (0, 1.0)


def test_stats_know_how_much_smaller_rows_are(store_path, caches):
    """Codes of four bits are nearly four times smaller than bfloat16 rows."""
    with kvstore.Store(store_path, codec="turbo4") as store:
        tokens, cache = caches.make_conversation(4, 1, extra=0)
        store.save(tokens, cache, caches.MODEL)
        ratio = store.stats().compression_ratio
        raw = 4 * 2 * 2 * 2 * caches.BLOCK * 64 * 2
        assert ratio == pytest.approx(raw / store.stats().nbytes, abs=0.001)
        assert ratio > 1.5  # sinks and headers are much of small blocks


def test_stats_count_what_lies_in_quarantine(run, store_with):
    """Files that could not be read are there to be looked at, and take room."""
    assert (run("stats")["num_quarantined"], run("stats")["quarantine_bytes"]) == (0, 0)
    (store_with / "quarantine" / "x").write_bytes(b"12345")
    (store_with / "quarantine" / "y").write_bytes(b"678")
    assert (run("stats")["num_quarantined"], run("stats")["quarantine_bytes"]) == (2, 8)


def test_stats_say_why_a_store_is_over_its_limit(show, run, store_with):
    """What has names is evicted only when asked, and the hint says how."""
    kept = run("stats")["kept_bytes"]
    for limit, is_named in ((10**9, False), (kept + 1, False), (kept - 1, True)):
        with kvstore.Store(store_with) as store:
            store.set_limit(limit)
        out, err = show("stats")
        assert ("over the limit since " in out) is is_named
        assert ("--named" in err) is is_named


def test_pinned_entries_are_kept_as_named_ones_are(run):
    """What is pinned is never evicted, so its bytes are those that are kept."""
    kept, nbytes = run("stats")["kept_bytes"], run("stats")["reached_bytes"]
    assert kept < nbytes
    (nameless,) = [entry["id"] for entry in run("ls") if entry["name"] is None]
    run("pin", nameless)
    assert run("stats")["kept_bytes"] == nbytes


@pytest.fixture
def show(store_with):
    """A function that runs a verb and returns what people see of it."""

    def call(*arguments):
        result = CliRunner().invoke(cli, ["--store", str(store_with), *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout, result.stderr

    return call


def note(store_path, caches, loads):
    """Note prefills at 1,000 tokens a second, and loads."""
    with kvstore.Store(store_path) as store:
        store.note_prefill(caches.MODEL, 1000, 1.0)
        for num_tokens, seconds in loads:
            store.notes.add_timing(caches.MODEL, "raw", num_tokens, seconds=seconds)


@pytest.mark.parametrize(
    ("loads", "load_tps", "verdict", "tokens", "text"),
    [
        ([(1000, 0.5)] * 3, 2000, "pays", 1, "loading pays from 1 token on"),
        ([(500, 1.5), (1000, 2.5), (1500, 3.5)], 403, "never", None,
         "loading does not pay"),
        ([(500, 1.2502), (1000, 1.5002), (1500, 1.7502)], 680, "pays", 2001,
         "loading pays from 2,001 tokens on"),
        ([(1000, 0.5)] * 2, 2000, "unknown", None,
         "too little is measured yet to say when loading pays"),
    ],
)  # fmt: skip
def test_stats_show_the_break_even(
    show, run, store_with, caches, loads, load_tps, verdict, tokens, text
):
    """How fast rows are computed and restored, and from how many on that pays."""
    assert run("stats")["speeds"] == []
    note(store_with, caches, loads)
    (found,) = run("stats")["speeds"]
    assert found["prefill_tps"] == pytest.approx(1000)
    assert found["load_tps"] == pytest.approx(load_tps, rel=0.01)
    assert (found["verdict"], found["break_even_tokens"]) == (verdict, tokens)
    assert (found["codec"], found["model"]) == ("raw", "model-a")
    assert found["measured_at"].endswith("Z")
    assert f"; {text}\n" in show("stats")[0]


def test_stats_say_what_is_not_measured(show, run, store_with, caches):
    """Where a prefill was never measured, nobody knows what was saved."""
    assert "time saved:     not measured yet" in show("stats")[0]
    with kvstore.Store(store_with) as store:
        store.note_prefill(caches.MODEL, 1000, 4.0)
        tokens, _ = caches.make_conversation(2, 1)
        store.load(tokens, caches.MODEL)
    saved = run("stats")["seconds_saved"]
    assert saved == pytest.approx((len(tokens) - 1) / 250, rel=0.5)
    assert "too little is measured yet to say when" in show("stats")[0]


def test_stats_say_what_is_too_old_to_decide(show, run, store_with, caches, index_age):
    """After a day, loading is tried again whatever was measured."""
    note(store_with, caches, [(1000, 0.5)] * 3)
    assert run("stats")["speeds"][0]["is_current"]
    index_age(25 * 3600)
    assert not run("stats")["speeds"][0]["is_current"]
    assert "will be tried again)" in show("stats")[0]


@pytest.fixture
def index_age(store_with):
    """A function that makes what was measured older."""

    def age(seconds):
        connection = apsw.Connection(str(store_with / "index.sqlite"))
        connection.execute(
            "UPDATE timings SET measured_at = measured_at - ?", [seconds]
        )
        connection.close()

    return age


def test_ls_by_model(run):
    """`ls --model` lists what a model made."""
    assert len(run("ls", "--model", "model-a")) == 3
    assert run("ls", "--model", "other") == []


def test_verify_repairs(run, store_with, flip_bit):
    """`verify --repair` leaves a store in which only the lost block is missing."""
    path = max(store_with.glob("shards/*/*.safetensors"))
    flip_bit(path, (path.stat().st_size - 9) * 8)
    assert run("verify", "--read-data", exit_code=1)["findings"]
    left = run("verify", "--repair", exit_code=1)["findings"]
    assert {finding["kind"] for finding in left} == {"missing-block"}
    broken = left[0]["entries"][0]
    run("rm", broken, "-y")
    assert run("verify", "--read-data")["findings"] == []
