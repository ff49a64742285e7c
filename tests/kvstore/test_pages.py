"""What a server shows beside its API: the store, to its owner alone, and counters."""

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request

import kit
import pytest

import kvstore

beside = kit.load_beside("servers")

LONG = "Say what the river did to the town in the year of the flood. " * 12


@pytest.fixture
def servers(tmp_path):
    """Starts servers of one test."""
    started = beside.Servers(tmp_path / "home")
    yield started
    started.print_logs({})
    started.close()


@pytest.fixture
def shown(servers, tmp_path, tiny_model):
    """A server that has answered one question, its store, and the token of its page."""
    store = tmp_path / "store"
    server = servers.kvstore(store, tiny_model)
    server.ask(LONG)
    token = re.search(r"/kvstore\?token=(\S+)", server.text())[1]
    return server, store, token


def fetch(server, path, method="GET", token="", data=None):
    """Return status, type and body of an answer."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(server.url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read()


def wait_for_entry(server, token):
    """Return the first entry that the page has, once it is written."""
    server.wait_for("kept 777 tokens")
    data = json.loads(fetch(server, "/kvstore/data", token=token)[2])
    return next(line for line in data["lines"] if line["id"])


def test_the_page_is_for_whoever_has_the_token(shown):
    """It shows the entries; without the token, or with another, it shows nothing."""
    server, _, token = shown
    entry = wait_for_entry(server, token)
    status, kind, page = fetch(server, f"/kvstore?token={token}")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert entry["id"] in page.decode()
    assert entry["name"].startswith("Say what the river did")
    target = f"/kvstore/entries/{entry['id']}"
    for method, path in (
        ("GET", "/kvstore"),
        ("GET", "/kvstore/data?token=x"),
        ("GET", "/kvstore?token="),
        ("PUT", target),
        ("DELETE", target),
    ):
        status, _, body = fetch(server, path, method, data=b'{"pinned": true}')
        assert status == 403, path
        assert entry["id"].encode() not in body
    # The log tells the token once, to whoever has started the server.
    assert server.text().count(token) == 1


def test_an_entry_is_pinned_and_removed(shown):
    """As by the verbs; what is asked wrongly changes nothing."""
    server, folder, token = shown
    path = f"/kvstore/entries/{wait_for_entry(server, token)['id']}"
    for wrong in (b"", b"{", b"[]", b'{"pinned": 1.5}', b"[" * 90, b" " * 1000):
        assert fetch(server, path, "PUT", token, wrong)[0] == 400, wrong
    assert fetch(server, "/kvstore/entries/0123456789", "DELETE", token)[0] == 404
    assert fetch(server, "/kvstore/other", "DELETE", token)[0] == 404
    with kvstore.Store(folder) as store:
        assert not store.entries()[0].pinned
        assert fetch(server, path, "PUT", token, b'{"pinned": true}')[0] == 204
        assert store.entries()[0].pinned
        assert fetch(server, path, "DELETE", token)[0] == 204
        assert store.entries() == []


def test_counters_are_for_prometheus(shown):
    """They need no token, name nothing, and count what was served."""
    server, _, token = shown
    wait_for_entry(server, token)
    server.post("/v1/chat/completions", {"stop": 5})
    status, kind, body = fetch(server, "/metrics")
    assert status == 200
    assert kind.startswith("text/plain; version=0.0.4")
    found = dict(line.rsplit(" ", 1) for line in body.decode().splitlines())
    assert found['kvstore_requests_total{status="200"}'] == "1.0"
    assert found['kvstore_requests_total{status="400"}'] == "1.0"
    assert float(found['kvstore_prompt_tokens_total{source="computed"}']) > 100
    assert found["kvstore_generated_tokens_total"] == "8.0"
    assert found["kvstore_first_token_seconds_count"] == "1.0"
    assert float(found["kvstore_store_bytes"]) > 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_a_browser_shows_what_can_be_changed(shown):
    """In Chromium: the entry, with what pins and removes it."""
    server, _, token = shown
    wait_for_entry(server, token)
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    url = f"{server.url}/kvstore?token={token}"
    shown = subprocess.run(
        [*words, url], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert ">1 entry</span>" in shown
    assert shown.count("<button>") == 2
