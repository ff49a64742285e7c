"""What a server shows beside its API: the store, to its owner alone, and counters."""

import json
import logging
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import kit
import pytest

import kvstore
from kvstore.server import warm
from kvstore.server.pages import Pages
from kvstore.server.watch import Requests, watch

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


def fetch(server, path, method="GET", token="", data=None, login=None):
    """Return status, type and body of an answer."""
    login = f"Bearer {token}" if token else login
    headers = {"Authorization": login} if login else {}
    request = urllib.request.Request(server.url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read()


def send_line(server, line):
    """Send a request's first line as it is; return the first line of the answer."""
    with socket.create_connection(("127.0.0.1", server.port), 300) as connection:
        connection.sendall(f"{line}\r\n\r\n".encode())
        return connection.makefile("rb").readline()


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


def test_the_token_is_known_by_its_place(shown):
    """In the address, whatever a proxy's login says, or as a bearer's."""
    server, _, token = shown
    for query, login, status in (
        (f"?token={token}", "Basic abc", 200),
        (f"?token={token}", "Bearer other", 200),
        ("", f"bearer {token}", 200),
        ("?token=other", f"BEARER {token}", 200),
        ("", token, 403),
        ("", f"Basic {token}", 403),
        ("", "Bearer", 403),
    ):
        assert fetch(server, f"/kvstore{query}", login=login)[0] == status, login


def test_malformed_requests_are_answered(shown):
    """And the log has the token of none, nor a traceback."""
    server, _, token = shown
    before = server.text()
    assert b" 400 " in send_line(server, "GET http://[ HTTP/1.1")
    assert b" 400 " in send_line(server, "PUT http://[/kvstore HTTP/1.1")
    assert b" 400 " in send_line(server, f"GET /kvstore?token={token} extra HTTP/1.1")
    assert b" 414 " in send_line(server, "GET /" + "x" * 65536)
    assert b" 404 " in send_line(server, f"POST /kvstore?token={token} HTTP/1.1")
    assert b" 404 " in send_line(server, "POST /\x1b[2J HTTP/1.1")
    assert b" 404 " in send_line(server, "GET /\x1b[2J HTTP/1.1")
    server.wait_for("POST /kvstore: 404")
    server.wait_for("GET /\\x1b[2J: 404")
    log = server.text()[len(before) :]
    assert "\x1b" not in log
    assert "GET /kvstore: 400" in log
    assert token not in log
    assert "Traceback" not in log


def test_a_client_that_hangs_up_is_one_line(caplog):
    """And no traceback."""
    makers = ("do_GET", "do_POST", "generate_response", "completion_usage_response")
    handler = type("Handler", (BaseHTTPRequestHandler,), dict.fromkeys(makers))
    server = SimpleNamespace(APIHandler=handler, scan_cache_dir=None)
    watch(server, Requests(), cache_of=None)
    Pages(None, None, None).attach(handler)
    caplog.set_level(logging.INFO, "kvstore")
    client, connection = socket.socketpair()
    with connection:
        client.sendall(b"GET /kvstore?token=x HTTP/1.1\r\n\r\n")
        client.close()
        handler(connection, ("", 0), None)
    assert caplog.messages[-1] == "kvstore: GET /kvstore: the client hung up"


def test_a_server_that_stops_is_one_line_for_who_waits(caplog):
    """mlx-lm ends all that wait by an error; any other is one still."""
    handler = type("Handler", (BaseHTTPRequestHandler,), {})
    for maker in ("do_GET", "generate_response", "completion_usage_response"):
        setattr(handler, maker, None)

    def fail(_):
        raise RuntimeError(words)

    handler.do_POST = fail
    server = SimpleNamespace(APIHandler=handler, scan_cache_dir=None)
    watch(server, Requests(), cache_of=None)
    caplog.set_level(logging.INFO, "kvstore")
    asking = SimpleNamespace(path="/v1/completions?x")
    words = "generation thread died"
    handler.do_POST(asking)
    assert "POST /v1/completions: the server stops" in caplog.messages[-1]
    words = "another"
    with pytest.raises(RuntimeError, match="another"):
        handler.do_POST(asking)


def test_what_is_computed_ahead_is_told_to_no_proxy(monkeypatch, caplog):
    """The server is asked itself, with its token, whatever that is made of."""
    caplog.set_level(logging.INFO, "kvstore")
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(parse_qs(urlsplit(self.path).query)["token"])
            self.send_response(200)
            self.end_headers()

        def do_POST(self):
            seen.append(
                json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            )
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"usage": {"prompt_tokens": 7}}')

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(warm, "_START_S", 0.0)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        warm._warm(f"http://127.0.0.1:{server.server_port}", "a b&c/ü", {"it": {}})
        server.shutdown()
    assert seen == [["a b&c/ü"], {"max_tokens": 1, "stream": False}]
    assert "`it` is computed ahead: 7 tokens" in caplog.text


def test_an_entry_is_pinned_and_removed(shown):
    """As by the verbs; what is asked wrongly changes nothing."""
    server, folder, token = shown
    path = f"/kvstore/entries/{wait_for_entry(server, token)['id']}"
    for wrong in (b"", b"{", b"[]", b"[" * 90, b" " * 1000):
        assert fetch(server, path, "PUT", token, wrong)[0] == 400, wrong
    for wrong in ({"pinned": 1}, {"pinned": 0.0}, {}, {"pinned": True, "more": 1}):
        data = json.dumps(wrong).encode()
        assert fetch(server, path, "PUT", token, data)[0] == 400, wrong
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
    body = b""
    while not all(b'{status="%d"}' % code in body for code in (200, 400)):
        # They are counted when the answer has been sent.
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


def test_counters_of_no_store_name_no_path(shown):
    """The log says why, and whoever has the token is told."""
    server, store, token = shown
    wait_for_entry(server, token)
    store.rename(store.with_name("elsewhere"))
    status, _, body = fetch(server, "/metrics")
    assert (status, json.loads(body)) == (503, {"error": "the store cannot be read"})
    status, _, body = fetch(server, "/kvstore", token=token)
    assert (status, str(store) in body.decode()) == (409, True)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_a_browser_shows_what_can_be_changed(shown):
    """In Chromium: the entry, with what pins and removes it."""
    server, _, token = shown
    wait_for_entry(server, token)
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    url = f"{server.url}/kvstore?token={token}"
    shown = subprocess.run(
        [*words, url], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    assert ">1 entry</span>" in shown
    assert shown.count("<button>") == 2
