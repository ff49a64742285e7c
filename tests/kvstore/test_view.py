"""The page shows the store, needs no network, and runs no script but its own."""

import base64
import hashlib
import json
import re
import shutil
import subprocess

import pytest

import kvstore

HOSTILE = (
    '</script><script>document.title="OWNED"</script>',
    '<img src=x onerror="document.title=1">',
    "<!--<script>&lt;",
)


@pytest.fixture
def page(store_path, caches, run_cli, tmp_path):
    """The file of a store whose names and titles are hostile."""
    with kvstore.Store(store_path, "raw") as store:
        for seed, text in enumerate(HOSTILE):
            tokens, cache = caches.make_conversation(2, seed)
            store.save(tokens, cache, caches.MODEL, name=text, title=text)
        tokens, cache = caches.make_conversation(2, 9)
        store.save(tokens, cache, caches.MODEL, title="Who may sign?")
        store.pin(HOSTILE[0])
    path = tmp_path / "page.html"
    code, out, err = run_cli("view", "-o", path, store=store_path)
    assert (code, out.strip()) == (0, str(path)), err
    return path


def data_of(text):
    """Return the data that a page holds."""
    return json.loads(re.search(r'type="application/json">(.*?)</script>', text)[1])


def test_nothing_of_an_entry_is_markup(page):
    """What entries are called stands in the data alone, without a sharp bracket."""
    text = page.read_text()
    assert len(re.findall("<script", text)) == 2
    assert not any(hostile in text for hostile in HOSTILE)
    assert {line["title"] for line in data_of(text)["lines"]} >= set(HOSTILE)


def test_the_page_may_run_itself_and_load_nothing(page):
    """Its policy names the digests of its own style and script."""
    text = page.read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; ")
    for tag in ("style", "script"):
        own = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    text = text.replace(re.search(r'json">(.*?)</script>', text)[1], "")
    assert not re.search(r"https?:|\burl\(|@import|\bsrc=|\bhref=", text)


def test_the_page_has_what_the_store_has(page, store_path):
    """Every entry once, every byte once, and what goes and stays is marked."""
    data = data_of(page.read_text())
    entries = [line for line in data["lines"] if line["id"]]
    assert {line["name"] for line in entries} == {*HOSTILE, "Who may sign?"}
    with kvstore.Store(store_path) as store:
        assert sum(x["nbytes"] for x in data["lines"]) == store.stats().reached_bytes
    marks = {line["name"]: line["marks"] for line in entries if line["marks"]}
    assert marks == {HOSTILE[0]: ["pinned"], "Who may sign?": ["evicted next"]}


def test_a_page_is_private_and_replaces_nothing(page, run_cli, store_path):
    """It is for its owner alone; a file is only replaced where asked to."""
    assert page.stat().st_mode & 0o777 == 0o600
    assert run_cli("view", "-o", page, store=store_path)[0] == 1
    assert run_cli("view", "-o", page, "--overwrite", store=store_path)[0] == 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_a_browser_shows_names_as_text(page):
    """In Chromium itself."""
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    shown = subprocess.run(
        [*words, page.as_uri()], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    assert "<title>kvstore</title>" in shown
    assert "4 entries" in shown
    assert "&lt;img src=x onerror=" in shown
