"""Remotes by name: added, tried, listed, and used by the command line."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from obstore.exceptions import GenericError

import kvstore
from kvstore.errors import EntryNotFoundError, IntegrityError, KVStoreError, RemoteError
from kvstore.remote.client import Client, Limits, Remote
from kvstore.remote.layout import document_of, parse_document, parse_key
from kvstore.remote.probe import Probe, probe
from kvstore.remote.remotes import make_remote

BLOCK = 16
URL = "s3://bucket/some/where"


@pytest.fixture
def remote(s3_server):
    return make_remote("team", URL, s3_server.options, is_trusted=True)


@pytest.fixture
def stores(tmp_path, empty_store, caches):
    """Two stores of small blocks; the first has entries."""
    import shutil

    paths = [shutil.copytree(empty_store, tmp_path / name / "store") for name in "ab"]
    with kvstore.Store(paths[0], "raw") as store:
        for name, seed, num_blocks in (("doc", 1, 4), ("other", 2, 2)):
            tokens, cache = caches.make_conversation(num_blocks, seed, extra=3)
            store.save(tokens, cache, caches.MODEL, name=name)
    return paths


@pytest.fixture
def opened(stores, remote):
    """Both stores, open and with the remote."""
    with kvstore.Store(stores[0]) as left, kvstore.Store(stores[1]) as right:
        for store in (left, right):
            store.remotes.add(remote)
        yield left, right


def quick(remote):
    return Client(remote, Limits(retries=0))


# --- What a server can do. ---


def test_an_object_that_is_too_short_is_no_failure_of_the_server(
    s3_server, remote, tmp_path
):
    """It is named, whether a range begins behind its end or only ends there."""
    (tmp_path / "v1").mkdir()
    for client in (quick(remote), quick(Remote("here", tmp_path.as_uri()))):
        for name, data in (("empty", b""), ("short", b"abc")):
            s3_server.objects[f"bucket/some/where/v1/{name}"] = data
            (tmp_path / "v1" / name).write_bytes(data)
            for begin in (0, 5):
                with pytest.raises(IntegrityError, match=f"v1/{name}"):
                    client.read(f"v1/{name}", begin, 10)


def test_a_good_server_is_said_to_be_good(s3_server, remote):
    """All that is needed is tried, and one small object is left."""
    assert Probe(True, True, True, True) == probe(quick(remote))
    assert Probe(True, True, True, True) == probe(quick(remote))
    assert 1 == len(s3_server.objects)


@pytest.mark.parametrize("creates", ["ignored", 501, 400])
def test_a_server_that_overwrites_is_usable(s3_server, remote, creates):
    """Conditional requests are not needed, and their lack is said."""
    s3_server.creates = creates
    assert Probe(True, False, True, True) == probe(quick(remote))


def test_a_server_without_lists_or_rights_is_told_apart(s3_server, remote):
    """What may not be listed can be written; what may not be written can be read."""
    s3_server.can_list = False
    assert not probe(quick(remote)).can_list
    s3_server.can_list = True
    s3_server.fault = lambda request: 403 if request.command == "PUT" else None
    s3_server.objects.clear()
    assert Probe(False, None, None, True) == probe(quick(remote))
    s3_server.fault = lambda request: 403
    with pytest.raises(RemoteError, match="access is denied"):
        probe(quick(remote))


def test_a_server_without_ranges_is_refused(s3_server, remote):
    """Nothing could be pulled from it."""
    s3_server.has_ranges = False
    with pytest.raises(RemoteError, match="ranges"):
        probe(quick(remote))


def test_a_server_that_is_not_there_is_not_added(stores, remote, s3_server):
    """An address that is wrong is told at once."""
    s3_server.fault = lambda request: 404
    with kvstore.Store(stores[0]) as store:
        with pytest.raises(RemoteError):
            store.remotes.add(remote)
        assert [] == store.remotes.all()


def test_credentials_that_are_not_set_are_asked_for(remote, monkeypatch, s3_server):
    """Nobody is told of the address at which a provider's machines ask for theirs."""

    def ask_the_provider(*args):
        raise GenericError("Error at http://169.254.169.254/latest/token")

    client = quick(remote)
    monkeypatch.setattr(client, "_store", SimpleNamespace(head=ask_the_provider))
    with pytest.raises(RemoteError, match="no credentials are set") as caught:
        client.size("x")
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint


# --- Names. ---


@pytest.mark.parametrize(
    ("name", "url", "options", "why"),
    [
        ("", URL, {}, "name"),
        ("a/b", URL, {}, "name"),
        ("team", "ftp://x/y", {}, "begins with"),
        ("team", "s3://id:secret@bucket", {}, "password"),
        ("team", "https://host/x?sig=abc", {}, "query"),
        ("team", "s3://", {}, "names a bucket"),
        ("team", "file://host/x", {}, "names a bucket"),
        ("team", URL, {"aws_secret_access_key": "x"}, "never stored"),
        ("team", URL, {"AWS_SESSION_TOKEN": "x"}, "never stored"),
        ("team", URL, {"sas": "x"}, "never stored"),
    ],
)
def test_what_is_no_remote_is_refused(name, url, options, why):
    """No credential is stored, and nothing that could not be one."""
    with pytest.raises(ValueError, match=why):
        make_remote(name, url, options)


def test_a_folder_is_a_url(tmp_path, monkeypatch):
    """A path becomes the URL of the folder, wherever it is used from."""
    monkeypatch.chdir(tmp_path)
    assert (tmp_path / "a b").as_uri() == make_remote("disk", "a b", {}).url


def test_remotes_are_kept_and_forgotten(opened, stores, remote):
    """They are read back as they were, and a name belongs to one."""
    left, _ = opened
    assert [remote] == left.remotes.all()
    left.remotes.add(remote)
    with pytest.raises(KVStoreError, match="already"):
        left.remotes.add(replace(remote, url=URL + "/else"))
    assert remote == left.remotes.remove("team")
    assert [] == left.remotes.all()
    with pytest.raises(KVStoreError, match="no remote"):
        left.remotes.push("doc")


def test_the_name_is_needed_where_there_are_several(opened, remote):
    """With one remote its name may be left out."""
    left, _ = opened
    left.remotes.push("doc")
    left.remotes.add(replace(remote, name="two", url=URL + "/two"))
    with pytest.raises(KVStoreError, match="which remote") as caught:
        left.remotes.push("doc")
    assert "`team`, `two`" in caught.value.hint
    with pytest.raises(KVStoreError, match="no remote `three`"):
        left.remotes.push("doc", "three")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"remotes":{"a":{"url":1}}}'])
def test_a_damaged_file_is_named(stores, text):
    """What cannot be read is no empty list."""
    (stores[0] / "remotes.json").write_text(text)
    with kvstore.Store(stores[0]) as store, pytest.raises(IntegrityError, match="json"):
        store.remotes.all()


# --- Entries. ---


def test_entries_are_listed_and_pulled_by_name(opened, caches):
    """The latest of each name counts, however often it was pushed."""
    left, right = opened
    left.remotes.push("doc")
    left.remotes.push("other")
    tokens, cache = caches.make_conversation(5, 1, extra=3)
    left.save(tokens, cache, caches.MODEL, name="doc")
    left.remotes.push("doc")
    listed = left.remotes.entries()
    assert ["doc", "other"] == [one.entry.name for one in listed.values()]
    assert 5 * BLOCK + 3 == right.remotes.pull("doc").num_tokens
    assert "other" == right.remotes.pull([*listed][1].digest[:8], name="other").name
    assert tokens == right.load_entry("doc", caches.MODEL)[1]


def test_a_list_that_lags_behind_is_asked_again(opened, s3_server, monkeypatch):
    """A replica that does not know the entry yet hides it for a moment only."""
    left, right = opened
    left.remotes.push("doc")
    folders, lists = Client.folders, []

    def lag(client, prefix):
        lists.append(prefix)
        return folders(client, prefix) if len(lists) > 2 else []

    monkeypatch.setattr(Client, "folders", lag)
    assert "doc" == right.remotes.pull("doc").name
    assert 3 == len(lists)


def test_a_name_is_found_without_the_list_of_all(opened, s3_server):
    """One list of models and one of the name, however many entries there are."""
    left, right = opened
    left.remotes.push("doc")
    left.remotes.push("other")
    s3_server.log.clear()
    right.remotes.pull("doc")
    lists = [path for _, path in s3_server.log if "list-type" in path]
    assert 2 == len(lists)
    documents = [path for _, path in s3_server.log if path.endswith(".json")]
    assert 1 == len(documents)


def test_a_whole_key_needs_no_list(opened, s3_server):
    """So a server that cannot list can be pulled from."""
    left, right = opened
    key = left.remotes.push("doc").key
    s3_server.can_list = False
    assert "doc" == right.remotes.pull(key.path).name
    with pytest.raises(RemoteError, match="access is denied"):
        right.remotes.pull("doc", name="else")
    s3_server.can_list = True
    with pytest.raises(IntegrityError, match="not there"):
        right.remotes.pull(key.path.replace(key.digest, "0" * 64), name="else")


def test_a_web_server_is_read_by_keys(opened, s3_server):
    """What lies behind it was pushed otherwise; a list is not needed."""
    left, right = opened
    key = left.remotes.push("doc").key
    url = f"{s3_server.endpoint}/bucket/some/where"
    found = right.remotes.add(Remote("web", url, is_trusted=True))
    assert Probe(False, None, True, False) == found
    assert "doc" == right.remotes.pull(key.path, "web").name
    with pytest.raises(RemoteError, match="only read"):
        right.remotes.push("doc", "web")
    with pytest.raises(RemoteError, match="lists nothing"):
        right.remotes.pull("else", "web")


def test_what_is_not_there_is_said(opened, caches):
    """Neither name, nor id, nor model."""
    left, right = opened
    left.remotes.push("doc")
    for ref, model in (("else", None), ("doc", caches.OTHER_WEIGHTS), ("", None)):
        with pytest.raises(EntryNotFoundError, match="in remote `team`"):
            right.remotes.pull(ref, fingerprint=model)


def test_one_name_of_two_models_must_be_told_apart(opened, caches):
    """Each model finds its own."""
    left, right = opened
    left.remotes.push("doc")
    cache = caches.make_cache(BLOCK, 7)
    left.save(range(BLOCK), cache, caches.OTHER_WEIGHTS, name="doc", replace=True)
    left.remotes.push("doc")
    with pytest.raises(EntryNotFoundError, match="2 entries `doc` of several models"):
        right.remotes.pull("doc")
    assert (
        BLOCK == right.remotes.pull("doc", fingerprint=caches.OTHER_WEIGHTS).num_tokens
    )
    entry = right.remotes.pull("doc", fingerprint=caches.MODEL, name="first")
    assert 4 * BLOCK + 3 == entry.num_tokens


def test_a_prompt_finds_what_it_shares(opened, caches):
    """Of an entry that goes on otherwise, the full blocks that are shared come."""
    left, right = opened
    left.remotes.push("doc")
    left.remotes.push("other")
    tokens, _ = caches.make_conversation(4, 1, extra=3)
    shared = tokens[: 2 * BLOCK + 5]
    entry = right.remotes.pull([*shared, 7, 7], fingerprint=caches.MODEL)
    assert (None, 2 * BLOCK) == (entry.name, entry.num_tokens)
    assert 2 * BLOCK == right.lookup([*shared, 7, 7], caches.MODEL).num_tokens
    entry = right.remotes.pull([*tokens, 7, 7], fingerprint=caches.MODEL, name="mine")
    assert ("mine", len(tokens)) == (entry.name, entry.num_tokens)
    for prompt, model in (([5, 6, 7], caches.MODEL), (tokens, caches.OTHER_WEIGHTS)):
        with pytest.raises(EntryNotFoundError, match="nothing of this prompt"):
            right.remotes.pull(prompt, fingerprint=model)


def test_a_poisoned_document_does_not_hide_the_others(opened, s3_server, caplog):
    """It is named in the log; the good ones are listed and pulled."""
    left, right = opened
    left.remotes.push("doc")
    left.remotes.push("other")
    bad = next(k for k in s3_server.keys("/v1/entries/") if "other" not in k)
    parsed = parse_document(
        parse_key(bad.partition("where/")[2]), s3_server.objects[bad]
    )
    s3_server.objects[bad] = s3_server.objects[bad].replace(b"raw", b"rax")
    listed = right.remotes.entries()
    assert 1 == len(listed)
    digest = parse_key(bad.partition("where/")[2]).digest
    assert digest[:12] in caplog.text
    with pytest.raises(IntegrityError, match=digest[:12]):
        right.remotes.pull(parsed.entry.name)


def test_a_later_document_that_lies_is_refused(opened, s3_server, caches):
    """Somebody who may write says that the entry of a name is another one."""
    left, right = opened
    key = left.remotes.push("doc").key
    (path,) = s3_server.keys("/v1/entries/")
    true = parse_document(key, s3_server.objects[path])
    later = replace(true.entry, updated_at=true.entry.updated_at + 1)
    lie = replace(true, entry=later, blocks=(true.blocks[1], *true.blocks[1:]))
    other, data = document_of(lie)
    s3_server.objects[f"bucket/some/where/{other}"] = data
    with pytest.raises(IntegrityError, match="refused"):
        right.remotes.pull("doc")
    assert [] == right.entries()
    assert 4 * BLOCK + 3 == right.remotes.pull(key.digest).num_tokens


def test_a_share_that_is_not_mounted_is_no_remote(opened, tmp_path):
    """Nothing is written where the folder was."""
    left, _ = opened
    left.remotes.add(Remote("disk", (tmp_path / "share").as_uri(), is_trusted=True))
    (tmp_path / "share").rename(tmp_path / "gone")
    with pytest.raises(RemoteError, match="share"):
        left.remotes.push("doc", "disk")
    assert not (tmp_path / "share").exists()


# --- The command line. ---


@pytest.fixture
def run(run_cli, stores):
    def call(which, *words):
        return run_cli(*words, store=stores[which])

    return call


def test_the_verbs_work_together(run, s3_server, caches):
    """Added, pushed, listed, pulled and forgotten."""
    words = ("--endpoint", s3_server.endpoint, "--option", "region=us-east-1")
    words = (*words, "--trust")
    code, out, err = run(0, "remote", "add", "team", URL, *words)
    assert (0, "") == (code, err)
    assert "creates once: yes" in out
    code, out, _ = run(0, "push", "doc", "other")
    assert 0 == code
    assert out.startswith("pushed 67 tokens of `doc`: ")
    assert "pushed 35 tokens of `other`" in out
    run(1, "remote", "add", "team", URL, *words)
    code, out, _ = run(1, "ls", "--remote", "--json")
    assert ["other", "doc"] == [row["entry"]["name"] for row in json.loads(out)]
    code, out, _ = run(1, "pull", "doc")
    assert 0 == code
    assert "pulled 67 tokens as `doc`" in out
    assert "doc" in run(1, "ls")[1]
    code, out, _ = run(1, "remote", "ls", "--json")
    assert URL == json.loads(out)[0]["url"]
    assert 0 == run(1, "remote", "rm", "team")[0]
    assert "no remotes" in "".join(run(1, "remote", "ls")[1:])


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("remote", "add", "team", "ftp://x"), 2, "begins with"),
        (("remote", "add", "t", "/tmp", "--option", "x"), 2, "is not NAME=VALUE"),
        (("remote", "add", "t", "/tmp", "--option", "aws_secret=x"), 2, "never stored"),
        (("push", "doc"), 1, "the store has no remote"),
        (("push", "nothing"), 1, "no entry `nothing`"),
        (("push",), 2, "missing argument"),
        (("pull",), 2, "give names, or `--model` and `--prompt`"),
        (("pull", "doc", "--prompt", "x"), 2, "give names"),
        (("pull", "--prompt", "x"), 2, "`--prompt` needs `--model`"),
        (("pull", "--request", "-"), 2, "`--request` needs `--model`"),
        (("pull", "a", "--adapter-path", "x"), 2, "needs `--model`"),
        (("pull", "a", "b", "--name", "x"), 2, "`--name` is for one entry"),
        (("ls", "--remote"), 1, "the store has no remote"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(run, words, code, text):
    """Each mistake has its error and its hint."""
    found, out, err = run(0, *words)
    assert (code, "") == (found, out)
    lines = err.splitlines()
    assert lines[0].startswith("error: ")
    assert text in lines[0]
    assert lines[1].startswith("hint: ")
    assert 2 == len(lines)


def test_a_prompt_is_pulled_with_its_model(run_cli, tmp_path, tiny_model, s3_server):
    """Saved here, pulled there by the same prompt, and found by it."""
    folder = tmp_path / "remote"
    prompt = ("--model", tiny_model, "--prompt", "word " * 300)
    here, there = tmp_path / "here", tmp_path / "there"
    assert 0 == run_cli("save", *prompt, store=here)[0]
    for store in (here, there):
        assert 0 == run_cli("remote", "add", "disk", folder, store=store)[0]
    ref = run_cli("ls", "-q", store=here)[1].strip()
    assert 0 == run_cli("push", ref, store=here)[0]
    code, out, err = run_cli("pull", *prompt, "--name", "mine", "--trust", store=there)
    assert (0, "") == (code, err)
    assert "as `mine`" in out
    request = tmp_path / "request.json"
    request.write_text('{"messages": [{"role": "user", "content": "a"}]}')
    words = ("--model", tiny_model, "--request", request, "--trust")
    code, _, err = run_cli("pull", *words, store=there)
    assert 1 == code
    assert "has nothing of this prompt" in err
    held = [run_cli("lookup", *prompt, "-q", store=store)[1] for store in (here, there)]
    assert held[0] == held[1] != "0\n"
