"""What is kept can be read and searched as text."""

import json
import random
import shutil
from array import array
from functools import partial

import pytest

from kvstore.models.texts import decode
from kvstore.server.drift import find_drift


@pytest.fixture
def texts(run_cli, tiny_model, store_path):
    """A store with two named texts, and one without a name."""
    words = ("save", "--model", tiny_model, "--codec", "raw", "--prompt")
    assert run_cli(*words, "The clerk may sign.", "--name", "signing")[0] == 0
    assert run_cli(*words, "Nobody may\nLEAVE early.", "--name", "leave-it")[0] == 0
    assert run_cli(*words, "A clerk, and another clerk.")[0] == 0
    return store_path


def test_show_prints_what_the_model_has_read(texts, run_cli):
    """The whole text, marks included; with `--tail` only its end."""
    code, out, _ = run_cli("show", "signing")
    assert code == 0
    assert "user\nThe clerk may sign." in out
    assert "<|im_start|>" in out
    assert run_cli("show", "signing", "--tail=5")[1] == "sign.\n"
    data = json.loads(run_cli("show", "signing", "--json")[1])
    assert (data["entry"]["name"], data["text"] + "\n") == ("signing", out)


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("CLERK", [None, "signing"]),
        ("may\nleave", ["leave-it"]),
        ("leave-it", ["leave-it"]),  # in its name alone
    ],
)
def test_search_finds_words_in_texts_and_names(texts, run_cli, word, names):
    """Upper and lower case are the same, and the text around is shown."""
    code, out, err = run_cli("search", word, "--json")
    hits = json.loads(out)
    assert (code, err) == (0, "")
    assert names == [hit["entry"]["name"] for hit in hits]
    if hits[0]["num_places"]:
        assert word.lower().replace("\n", " ") in hits[0]["excerpt"].lower()


def test_search_counts_places(texts, run_cli):
    """Each place counts, and an entry without a name is told by its id."""
    _, out, _ = run_cli("search", "clerk")
    header, first, second = (line.split() for line in out.splitlines())
    assert header == ["NAME", "PLACES", "TEXT"]
    assert (first[1], second[:2]) == ("2", ["signing", "1"])


def test_nothing_found_is_told(texts, run_cli):
    """As with grep, a script sees it in the exit code."""
    assert run_cli("search", "zebra", "--json")[:2] == (1, "[]\n")
    assert run_cli("search", "zebra")[2] == "nothing found\n"


def test_a_model_that_moved_is_told(texts, run_cli, tiny_model, tmp_path, monkeypatch):
    """Without its tokenizer a text cannot be read; `--model` says where it is now."""
    from kvstore.models import texts as job

    real = job.load_tokenizer
    monkeypatch.setattr(
        job,
        "load_tokenizer",
        lambda model: real(
            str(tmp_path / "gone") if model == str(tiny_model) else model
        ),
    )
    code, _, err = run_cli("show", "signing")
    assert code == 1
    assert "hint: `--model` says where the model lies now" in err
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    assert "clerk" in run_cli("show", "signing", "--model", moved)[1]
    # What can be seen without the text is searched all the same.
    code, out, err = run_cli("search", "signing")
    assert (code, "warning: not searched" in err) == (0, True)
    assert "signing" in out


def test_a_damaged_entry_hides_no_other(texts, run_cli):
    """What cannot be read is named, and the search goes on."""
    blocks = json.loads(run_cli("inspect", "signing", "--json")[1])["blocks"]
    shard = blocks[-1]["shard"]
    (texts / "shards" / shard[:2] / f"{shard}.safetensors").unlink()
    code, out, err = run_cli("search", "may", "--json")
    assert code == 0
    found = {h["entry"]["name"]: h["num_places"] for h in json.loads(out)}
    assert found == {"leave-it": 1, "signing": 0}  # whose title can still be read
    assert "warning: not searched: `signing`" in err


def test_an_image_is_one_mark(loaded):
    """The tokenizer knows no token of it, and the text around it is the same."""
    _, tokenizer, _ = loaded
    before, after = tokenizer.encode("look: "), tokenizer.encode(" what is it?")
    tokens = [*before, *[-7] * 600, *[-9] * 20, *after]
    assert decode(tokenizer, tokens) == "look: [media] what is it?"
    assert decode(tokenizer, before + after) == "look:  what is it?"
    seen = partial(decode, tokenizer)
    rest = random.Random(0).choices(range(33, 90), k=2000)
    other, known = (
        [*tokenizer.encode(f"It is 10:0{n}. "), *[-7] * 600, *rest] for n in (1, 2)
    )
    change = find_drift(other, len(other) - 3, [array("q", known)], seen)
    assert change.given == "It is 10:0⟦1⟧. [media]"
