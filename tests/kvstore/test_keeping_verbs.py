"""The verbs that keep a store in order, from the command line."""

import json

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
    [("--max-size", "much"), ("--older-than", "long"), ("--limit", "-1")],
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
