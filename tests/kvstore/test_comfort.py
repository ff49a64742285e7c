"""What is used every day needs few words: defaults, aliases, examples, pipes."""

import io
import json

import pytest

from kvstore import Store
from kvstore.cli import cli
from kvstore.cli.verbs import ALIASES, EXAMPLES, GROUPS


@pytest.fixture(autouse=True)
def no_settings(monkeypatch, tmp_path):
    """A user without settings; returns where the file would be."""
    for name in ("MODEL", "CODEC", "LIMIT"):
        monkeypatch.delenv(f"KVSTORE_{name}", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "config/kvstore").mkdir(parents=True)
    return tmp_path / "config/kvstore/config.toml"


def test_every_verb_is_in_a_group():
    """And every alias and example belongs to a verb."""
    names = [name for group in GROUPS.values() for name in group]
    assert sorted(names) == sorted(set(cli.commands) - set(ALIASES))
    assert set(ALIASES.values()) <= set(names)
    assert not ALIASES.keys() & set(names)
    assert EXAMPLES.keys() == set(names) - {"dir", "help"}


def test_settings_come_from_variables_and_a_file(
    run_cli, tiny_model, monkeypatch, no_settings
):
    """A variable wins over the file; the limit is that of a new store."""
    lines = ['model = "nowhere"', 'codec = "raw"', 'limit = "3GB"']
    no_settings.write_text("\n".join(lines))
    assert "nowhere" in run_cli("save", "Some words.")[2]
    monkeypatch.setenv("KVSTORE_MODEL", str(tiny_model))
    code, out, err = run_cli("save", "--json", "Some words.", "--name", "doc")
    assert code == 0, err
    assert json.loads(out)["entry"]["codec"] == "raw"
    assert json.loads(run_cli("stats", "--json")[1])["max_bytes"] == 3e9
    no_settings.write_text("modell = 1")
    monkeypatch.delenv("KVSTORE_MODEL")
    assert "has more than" in run_cli("save", "Some words.")[2]


def test_a_model_has_a_limit_of_its_own(run_cli, tiny_model, no_settings):
    """In a table of the file, which every verb keeps to; other texts are refused."""
    assert run_cli("save", "Some words.", "--model", tiny_model)[0] == 0
    no_settings.write_text(f'[limits]\n"{tiny_model}" = "1KB"')
    plan = json.loads(run_cli("prune", "--dry-run", "--json")[1])
    assert [entry["model"] for entry in plan["entries"]] == [str(tiny_model)]
    no_settings.write_text('[limits]\n"some model" = "1KB"')
    assert json.loads(run_cli("prune", "--dry-run", "--json")[1])["entries"] == []
    for text in ('limits = "1KB"', "[limits]\nmodel = 5", '[limits]\nm = "many"'):
        no_settings.write_text(text)
        code, _, err = run_cli("prune", "--dry-run")
        assert code == 2
        assert "limits" in err or "not a size" in err


def test_a_server_takes_the_model_of_the_settings(run_cli, monkeypatch):
    """Unless another is named; what comes later is what mlx-lm takes."""
    seen = []
    monkeypatch.setattr(
        "kvstore.server.app.serve", lambda args, *_, **__: seen.append(args)
    )
    monkeypatch.setenv("KVSTORE_MODEL", "usual")
    run_cli("serve", "--port", 1)
    run_cli("serve", "--model", "other")
    assert [list(args)[:2] for args in seen] == [["--model", "usual"]] * 2
    assert list(seen[1])[-2:] == ["--model", "other"]


def test_a_quality_chooses_the_codec(run_cli, tiny_model, monkeypatch):
    """A chat is kept in high quality, a prompt in balanced, where nobody says more."""

    def codec_of(*words):
        code, _, err = run_cli(*words, "--model", tiny_model, "--name", "doc")
        assert code == 0, err
        entry = json.loads(run_cli("inspect", "doc", "--json")[1])["entry"]
        run_cli("rm", "doc", "-y")
        return entry["codec"]

    assert codec_of("save", "Some words.") == "turbo4+zstd"
    assert codec_of("save", "Some words.", "--quality", "exact") == "planes+zstd"
    assert codec_of("generate", "Hi.", "--quality", "high") == "turbo6+zstd"
    assert codec_of("save", "Some words.", "--exact") == "planes+zstd"
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\n"))
    assert codec_of("chat", "--max-tokens", 2) == "turbo6+zstd"
    words = ("save", "--model", tiny_model, "x", "--quality", "high", "--exact")
    assert "`--quality high` stores 6 bits" in run_cli(*words)[2]


def test_calibrating_is_offered_once(run_cli, tiny_model, tmp_path):
    """When the first rows of a model are kept, to people, and never again."""

    def offers(*words, store="store"):
        words = ("save", "--model", tiny_model, *words)
        code, _, err = run_cli(*words, store=tmp_path / store)
        assert code == 0, err
        return err.count(f"`kvstore calibrate --model {tiny_model}`")

    assert offers("Some words.") == 1
    assert offers("Other words.") == 0
    assert offers("Some words.", "-q", store="quiet") == 0
    assert offers("Some words.", "--json", store="json") == 0


def test_a_name_brings_its_model(run_cli, tiny_model, monkeypatch):
    """What is gone on with, or asked, is so by the model that made it."""
    run_cli("save", "--model", tiny_model, "--prompt", "Some words.", "--name", "doc")
    for words in (
        ("generate", "--name", "doc", "More."),
        ("generate", "--from", "doc", "More."),
    ):
        code, _, err = run_cli(*words, "--max-tokens", 2)
        assert code == 0, err
    monkeypatch.setattr("sys.stdin", io.StringIO("And more.\n"))
    assert run_cli("chat", "--name", "doc", "--max-tokens", 2)[0] == 0
    code, _, err = run_cli("generate", "--name", "other", "More.")
    assert (code, "missing option `--model`" in err) == (2, True)


@pytest.mark.parametrize(
    "words",
    [("adopt", "doc"), ("demo",), ("lookup", "x"), ("save", "x"), ("chat",)],
)
def test_a_model_is_asked_for(run_cli, words):
    """Where neither an option, a setting nor an entry names one."""
    code, _, err = run_cli(*words)
    assert (code, "missing option `--model`" in err) == (2, True)
    assert "KVSTORE_MODEL" in err


def test_a_missing_entry_is_told_before_its_model(run_cli, tiny_model):
    """Who mistypes a name is not sent to look for a model."""
    run_cli("save", "--model", tiny_model, "Some words.", "--name", "doc")
    for words in (["--from", "dok"], ["--name", "dok"]):
        assert "no entry `dok`, whose model" in run_cli("generate", "x", *words)[2]
    found = json.loads(run_cli("inspect", "doc", "--json")[1])["entry"]["id"]
    assert "give 4 digits at least" in run_cli("show", found[:3])[2]


def test_what_was_kept_otherwise_is_told(run_cli, tiny_model):
    """Who leaves an option out is told which, and not that the name is taken."""
    words = ("--name", "chat", "--max-tokens", 2)
    codes = ("--kv-bits", "turbo3")
    assert run_cli("generate", "Hello.", "--model", tiny_model, *codes, *words)[0] == 0
    code, _, err = run_cli("generate", "More.", *words)
    assert (code, "`chat` are kept otherwise" in err, "`--kv-bits`" in err) == (1, 1, 1)
    assert run_cli("generate", "More.", *words, *codes)[0] == 0


def test_a_base_needs_no_store_before_it(run_cli, tiny_model, tmp_path):
    """Who has a share and nothing yet reads it at once; a wrong path makes nothing."""
    share = tmp_path / "share"
    words = ("save", "--model", tiny_model, "Some words.", "--name", "doc")
    assert run_cli(*words, store=share)[0] == 0
    code, _, err = run_cli("ls", "--base", tmp_path / "shar")
    assert (code, f"no store at {tmp_path / 'shar'}" in err) == (10, True)
    assert not (tmp_path / "store").exists()
    assert run_cli("ls", "-q", "--base", share)[0] == 0
    words = ("generate", "--from", "doc", "More.", "--max-tokens", 2)
    assert run_cli(*words, "--base", share)[0] == 0


def test_the_folder_of_a_user_has_a_short_name(
    run_cli, tiny_model, monkeypatch, no_settings, tmp_path
):
    """Where no shell has put it in: in a variable, a file, and behind `=`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(tiny_model)
    no_settings.write_text('model = "~/model"')
    assert run_cli("save", "x", "--store=~/kv", "--name", "doc")[0] == 0
    assert run_cli("save", "x", "--store=~/kv", "--model=~/model")[0] == 0
    assert (tmp_path / "kv/config.json").exists()
    monkeypatch.setenv("KVSTORE_DIR", "~/kv")
    assert len(Store(create=False).entries()) == 2


def test_a_prompt_is_an_argument_an_option_or_piped(run_cli, tiny_model, monkeypatch):
    """All three are the same prompt; two at once are refused."""
    model = ("--model", tiny_model)

    def count(*words, piped=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(piped))
        code, out, err = run_cli("lookup", *model, *words, "--json")
        assert code == 0, err
        return json.loads(out)["num_prompt_tokens"]

    run_cli("save", *model, "One.")
    as_option = count("--prompt", "Some words.")
    assert count("Some words.") == count(piped="Some words.") == as_option
    assert count("-", piped="Some words.") == as_option
    assert run_cli("lookup", *model, "Some", "--prompt", "words.")[0] == 2
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "missing option `--prompt`" in run_cli("lookup", *model)[2]


@pytest.mark.parametrize("alias", ["remove", "delete"])
def test_other_names_of_verbs_work(run_cli, tiny_model, alias):
    """What people try first is taken."""
    run_cli("save", "--model", tiny_model, "Words.", "--name", "doc")
    assert run_cli(alias, "doc", "-y")[0] == 0


def test_help_has_examples(run_cli):
    """Of each verb, and with `help` in front of it."""
    assert "kvstore prune --older-than 30d -n" in run_cli("prune", "-h")[1]
    assert "Look after the store" in run_cli("help")[1]
    assert "Examples:" in run_cli("help", "remove")[1]
    assert run_cli("help", "nothing")[0] == 2


def groups(command=cli, path=()):
    """Yield the words of every verb that has verbs of its own, and those."""
    for name, verb in getattr(command, "commands", {}).items():
        if hasattr(verb, "commands"):
            yield [*path, name], list(verb.commands)
            yield from groups(verb, (*path, name))


@pytest.mark.parametrize(("words", "verbs"), list(groups()), ids=lambda value: value[0])
def test_a_verb_with_verbs_lists_them(run_cli, words, verbs):
    """With what each is for."""
    code, out, _ = run_cli(*words, "--help")
    lines = out.split("Commands:")[1].split()
    assert (code, set(verbs) - set(lines)) == (0, set())


def test_failures_are_documents_too(run_cli, tmp_path):
    """With `--json` stdout has the error, once."""
    code, out, err = run_cli("ls", "--json")
    error = json.loads(out)["error"]
    assert (code, error["exit_code"]) == (10, 10)
    assert f"error: {error['message']}\nhint: {error['hint']}\n" == err
    assert json.loads(run_cli("--json", "lss")[1])["error"]["exit_code"] == 2


@pytest.mark.parametrize(
    ("verb", "option", "start", "expected"),
    [
        ("save", "codec", "turbo5v", {"turbo5v3", "turbo5v3+zstd"}),
        ("chat", "name", "d", {"doc"}),
        ("generate", "base", "d", {"doc"}),
        ("chat", "model", "./x", {"./x"}),
    ],
)
def test_values_of_options_are_completed(
    tiny_model, run_cli, tmp_path, verb, option, start, expected
):
    """Codecs, names of entries, and folders of models."""
    run_cli("save", "--model", tiny_model, "Words.", "--name", "doc")
    command = cli.commands[verb]
    (parameter,) = (p for p in command.params if p.name == option)
    root = cli.make_context("kvstore", ["--store", str(tmp_path / "store"), verb])
    found = parameter.shell_complete(root, start)
    assert {item.value for item in found} == expected
