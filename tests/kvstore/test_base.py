"""What is kept can be asked about, and stays as it was."""

import io
import json

import pytest
from kit import stream_generate

import kvstore
from kvstore.models import continue_entry
from kvstore.models.load import LoadedModel

DOCUMENT = "The clerk signs for sums up to a hundred, the head for all others. " * 6


@pytest.fixture
def base(run_cli, tiny_model, store_path):
    """A document that was saved as `handbook`: the store's folder."""
    words = ("save", "--model", tiny_model, "--prompt", DOCUMENT, "--name", "handbook")
    assert run_cli(*words, "--codec", "raw")[0] == 0
    return store_path


def files_of(folder):
    """Return every file of a store but the index, with its bytes."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith("index")
    }


@pytest.fixture
def ask(run_cli, tiny_model):
    """A function that asks over the command line: its JSON."""

    def run(*words, prompt="Who may sign?"):
        options = ("--model", tiny_model, "--max-tokens", 8, "--codec", "raw")
        code, out, err = run_cli(
            "generate", *options, "--prompt", prompt, *words, "--json"
        )
        assert code == 0, err
        return json.loads(out)

    return run


def test_a_question_leaves_the_document_as_it_is(base, ask):
    """Whoever asks a document gets the answer, and the store does not change."""
    before = files_of(base)
    first, second = (ask("--from", "handbook") for _ in range(2))
    assert first["entry"] is None
    assert first["num_restored_tokens"] > len(DOCUMENT)
    assert before == files_of(base)
    # Later questions do not see earlier ones.
    assert first["text"] == second["text"]
    assert first["num_prompt_tokens"] == second["num_prompt_tokens"]


def test_the_answer_is_the_one_of_going_on(base, ask):
    """Reading and going on differ in what is kept, not in what is said."""
    read = ask("--from", "handbook")
    gone_on = ask("--name", "handbook")
    assert gone_on["text"] == read["text"]
    assert gone_on["entry"]["name"] == "handbook"


def test_the_document_can_be_saved_again(base, ask, run_cli, tiny_model):
    """A question is no reason to refuse the text under its name."""
    ask("--from", "handbook")
    words = ("save", "--model", tiny_model, "--prompt", DOCUMENT, "--name", "handbook")
    assert run_cli(*words)[0] == 0


def test_a_new_name_keeps_question_and_answer(base, ask):
    """With a new name both are kept under it; the document stays as it is."""
    with kvstore.Store(base, create=False) as store:
        document = store.entry("handbook")
        kept = ask("--from", "handbook", "--name", "signing")["entry"]
        assert (kept["name"], store.entry("handbook")) == ("signing", document)
        tokens = [t for _, s in store.chain("signing") for t in s.block.tokens]
        start = [t for _, s in store.chain("handbook") for t in s.block.tokens]
    assert tokens[: len(start)] == start
    assert len(tokens) == kept["num_tokens"] > len(start)


def test_an_id_may_be_asked(base, ask):
    """An entry without a name can be asked by the start of its id."""
    with kvstore.Store(base, create=False) as store:
        entry = store.entry("handbook")
    assert ask("--from", entry.id[:8])["text"] == ask("--from", "handbook")["text"]


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize(
    ("words", "expected", "message"),
    [
        (("--from", "nothing"), 1, "no entry `nothing`"),
        (("--from", "handbook", "--name", "handbook"), 2, "are both `handbook`"),
        (("--from", "handbook", "--system-prompt", "x"), 2, "comes too late"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    base, run_cli, tiny_model, monkeypatch, verb, words, expected, message
):
    """Errors are a sentence and a hint, and change nothing."""
    before = files_of(base)
    monkeypatch.setattr("sys.stdin", io.StringIO("x\n"))
    prompt = ("--prompt", "x") if verb == "generate" else ()
    code, _, err = run_cli(verb, "--model", tiny_model, *prompt, *words)
    assert code == expected
    assert message in err
    assert "\nhint: " in err
    assert before == files_of(base)


def test_another_model_is_refused(base, run_cli, other_model):
    """What another model has read is no base."""
    words = ("--model", other_model, "--prompt", "x", "--from", "handbook")
    code, _, err = run_cli("generate", *words)
    assert code == 1
    assert "`handbook` was made by another model" in err


def test_a_long_question_writes_no_block(base, run_cli, tiny_model):
    """Nothing of a long prefill is stored either."""
    before = files_of(base)
    words = ("--model", tiny_model, "--from", "handbook", "--max-tokens", 2)
    words += ("--prefill-step-size", 64, "--prompt", "a long question " * 60)
    code, _, err = run_cli("generate", *words)
    assert code == 0
    assert "`handbook` stays as it was, and nothing is kept" in err
    assert before == files_of(base)


# Chats.


@pytest.fixture
def chat(run_cli, monkeypatch, tiny_model):
    """A function that chats over a pipe: exit code, stdout, stderr."""

    def run(lines, *options):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        words = ("--model", tiny_model, "--max-tokens", 8, "--codec", "raw")
        return run_cli("chat", *words, *options)

    return run


def test_a_chat_leaves_the_document_as_it_is(base, chat, ask):
    """Turns follow each other in memory; nothing of them is kept."""
    before = files_of(base)
    code, out, err = chat("Who may sign?\nAnd then?\n/stats\n", "--from", "handbook")
    assert code == 0
    assert "with what `handbook` holds; nothing is kept until `/name NAME`" in err
    assert "nothing is kept until `/name NAME`" in out
    assert "`handbook` stays as it was, and nothing is kept" in err
    assert before == files_of(base)
    assert out.startswith(ask("--from", "handbook")["text"])


@pytest.mark.parametrize("command", ["/name", "/fork"])
def test_a_chat_may_be_kept_late(base, chat, command):
    """A name keeps all that was said before it, and what comes after."""
    code, _, err = chat(f"one\n{command} talk\ntwo\n", "--from", "handbook")
    assert (code, "`talk`, from which `--name` goes on" in err) == (0, True)
    with kvstore.Store(base, create=False) as store:
        document, talk = store.entry("handbook"), store.entry("talk")
        assert talk.num_tokens > document.num_tokens + 16
        tokens = [t for _, s in store.chain("talk") for t in s.block.tokens]
    # It goes on from there without the base, and with it too.
    for options in (("--name", "talk"), ("--name", "talk", "--from", "handbook")):
        code, _, err = chat("", *options)
        assert (code, f"{len(tokens):,} tokens" in err) == (0, True)


def test_turns_before_a_name_may_be_taken_back(base, chat):
    """`/undo` needs nothing on disk."""
    before = files_of(base)
    code, _, err = chat("one\ntwo\n/undo 2\nthree\n", "--from", "handbook")
    assert (code, "taken back" in err) == (0, True)
    assert before == files_of(base)


def test_a_name_of_another_conversation_is_refused(base, chat):
    """A chat is not taken up as one of a document that it was not begun with."""
    assert chat("one\n", "--name", "talk")[0] == 0
    code, _, err = chat("two\n", "--name", "talk", "--from", "handbook")
    assert code == 1
    assert "`talk` was not begun with `handbook`" in err


# In Python.


def test_the_same_in_python(base, loaded, ask):
    """`continue_entry` and `keep=False` are what the verb is made of."""
    before = files_of(base)
    model, tokenizer, fingerprint = loaded
    with kvstore.Store(base, create=False) as store:
        tokens = continue_entry(
            LoadedModel(*loaded), store, "handbook", "Who may sign?"
        )
        responses = stream_generate(
            model,
            tokenizer,
            tokens,
            store=store,
            fingerprint=fingerprint,
            keep=False,
            max_tokens=8,
        )
        text = "".join(response.text for response in responses)
    assert before == files_of(base)
    assert text == ask("--from", "handbook")["text"]


def test_a_name_for_nothing_is_refused(base, loaded):
    """Who keeps nothing has no use for a name."""
    with (
        kvstore.Store(base, create=False) as store,
        pytest.raises(ValueError, match="no use"),
    ):
        next(
            kvstore.stream_generate(
                LoadedModel(*loaded), [1, 2], store=store, name="x", keep=False
            )
        )
