"""`--request`: a captured request is rendered as the server renders it."""

import io
import json

import pytest

from kvstore.errors import KVStoreError
from kvstore.models.load import load_tokenizer
from kvstore.server.requests import encode_request

RULES = "".join(f"Rule {n}: be brief, and say why it is so. " for n in range(6))


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    """The tokenizer of the tiny model."""
    return load_tokenizer(str(tiny_model))


@pytest.fixture
def write_request(tmp_path):
    """A function that writes a captured request and returns its path."""

    def write(system, *more, name="request.json"):
        said = [{"role": "system", "content": system}]
        said += [{"role": "user", "content": words} for words in more]
        body = {"model": "any", "messages": said, "temperature": 1, "stream": True}
        path = tmp_path / name
        path.write_text(json.dumps(body))
        return path

    return write


def test_a_request_is_what_the_template_makes_of_its_messages(tokenizer):
    """Parts of text are joined, and the body stays as it was."""
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    body = {"messages": [{"role": "user", "content": parts}]}
    before = json.dumps(body)
    said = [{"role": "user", "content": "Hello"}]
    expected = tokenizer.apply_chat_template(said, add_generation_prompt=True)
    assert encode_request(tokenizer, body) == list(expected)
    assert json.dumps(body) == before


def test_a_completion_is_its_text(tokenizer):
    """Without messages, it is for the other endpoint."""
    found = encode_request(tokenizer, {"prompt": "Once upon a time"})
    assert found == list(tokenizer.encode("Once upon a time"))


IMAGE = [{"type": "image_url", "image_url": {"url": "data:,"}}]
CALL = [{"function": {"arguments": "{no JSON"}}]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": 5},
        {"messages": [5]},
        {"messages": [{"role": "user", "content": IMAGE}]},
        {"messages": [{"role": "user", "content": "a", "tool_calls": CALL}]},
        {"prompt": ["a", "b"]},
        {"prompt": "a", "stop": [""]},
    ],
)
def test_what_the_server_would_refuse_is_refused(tokenizer, body):
    """One sentence with what is wrong, and a hint."""
    with pytest.raises(KVStoreError, match="would refuse") as caught:
        encode_request(tokenizer, body)
    assert caught.value.hint


def test_a_date_in_front_is_found_and_told(run_cli, tiny_model, write_request):
    """Line, both texts, tokens behind it, and what to change."""
    old = write_request("Today is 2026-11-25. " + RULES, "Hello?", name="old.json")
    new = write_request("Today is 2026-11-26. " + RULES, "Hello?", name="new.json")
    code, _, err = run_cli(
        "save", "--model", tiny_model, "--request", old, "--name", "old"
    )
    assert code == 0, err
    words = ("lookup", "--model", tiny_model, "--explain", "--request")
    code, out, err = run_cli(*words, new)
    assert code == 0, err
    assert "compared with `old`" in out
    assert "behind it are the same, and computed again" in out
    assert "  stored: Today is 2026-11-2⟦5⟧. Rule 0" in out
    assert "  given:  Today is 2026-11-2⟦6⟧. Rule 0" in out
    assert "  change: a date or a time" in out
    found = json.loads(run_cli(*words, new, "--json")[1])["nearest"]
    (change,) = found["changes"]
    assert (found["entry"], change["cause"], change["line"]) == ("old", "clock", 2)
    assert change["num_behind"] > len(RULES)
    out = run_cli(*words, old)[1]
    assert "compared with" not in out


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ((), None, "missing option `--prompt`"),
        (("--prompt", "x"), "{}", "either a prompt or `--request`"),
        (("--system-prompt", "x"), "{}", "has its own messages"),
        ((), "{no", "not valid JSON"),
        ((), "[1]", "not a JSON object"),
        ((), "{}", "would refuse this request"),
    ],
)
@pytest.mark.parametrize("verb", ["save", "lookup"])
def test_a_wrong_request_is_told_in_two_lines(
    run_cli, tiny_model, tmp_path, monkeypatch, verb, options, text, message
):
    """The last two are an error and a hint."""
    monkeypatch.setattr("sys.stdin", io.StringIO())
    if text is not None:
        (tmp_path / "body.json").write_text(text)
        options = (*options, "--request", tmp_path / "body.json")
    store = tmp_path / "there"
    run_cli("save", "--model", tiny_model, "--prompt", "a", store=store)
    code, out, err = run_cli(verb, "--model", tiny_model, *options, store=store)
    assert (code in (1, 2), out) == (True, "")
    error, hint = err.splitlines()[-2:]
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")
