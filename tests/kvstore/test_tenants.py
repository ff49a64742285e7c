"""Clients of one server that are kept apart: nobody reads what another has asked."""

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from types import SimpleNamespace

import kit
import pytest

import kvstore
from kvstore.format.chain import common_run
from kvstore.ops.speeds import Speeds
from kvstore.server.disk import Disk, ServedModel
from kvstore.server.tenants import OwnedTokens, find_tenant

beside = kit.load_beside("servers")

PIN = "4711"
SECRET = "My bank is the one on the corner, and what it asks me there is PIN "
HANDBOOK = "Answer in one word, and never twice in the same way. " * 8
OPTIONS = ("--min-tokens", "8", "--codec", "planes+zstd")


@pytest.fixture
def servers(tmp_path):
    """Starts servers of one test."""
    started = beside.Servers(tmp_path / "home")
    yield started
    started.print_logs({})
    started.close()


def ask(server, key, *texts, headers=None, **options):
    """Return how many tokens were held of a question, or a system prompt and one."""
    roles = ("system", "user")[-len(texts) :]
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    client = server.client.with_options(api_key=key, default_headers=headers)
    answer = client.chat.completions.create(
        model="default_model", max_tokens=1, messages=messages, **options
    )
    return beside.cached(answer)


def probe(server, tokenizer):
    """Try for a PIN 40 times; return where more is told than the thief has asked."""
    asked, told_more = [], []
    for known in range(len(PIN)):
        for digit in "0123456789":
            guess = f"{SECRET}{PIN[:known]}{digit}###"
            messages = [{"role": "user", "content": guess}]
            tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            own = max((common_run(tokens, other) for other in asked), default=0)
            if ask(server, "thief", guess) > own:
                told_more.append(digit)
            asked.append(tokens)
    return told_more


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [True, False])
def test_a_secret_of_another_cannot_be_probed(
    servers, tiny_model, loaded, tmp_path, restarts
):
    """Nobody is told of more than they have asked themselves."""
    options = (*OPTIONS, "--tenant-header", "Authorization")
    server = servers.kvstore(tmp_path / "store", tiny_model, *options)
    ask(server, "owner", f"{SECRET}{PIN}, keep it to yourself.")
    if restarts:
        server.stop()
        server = servers.kvstore(tmp_path / "store", tiny_model, *options)
    assert probe(server, loaded[1]) == []


def test_without_tenants_a_secret_is_found(servers, tiny_model, loaded, tmp_path):
    """So the tries above would tell."""
    server = servers.kvstore(tmp_path / "store", tiny_model, "--min-tokens", "8")
    ask(server, "owner", f"{SECRET}{PIN}, keep it to yourself.")
    assert probe(server, loaded[1])


@pytest.mark.parametrize("alone", [{}, {"seed": 1}], ids=["batch", "alone"])
def test_each_client_finds_its_own_only(servers, tiny_model, tmp_path, alone):
    """In memory and on disk, alone and in a batch, and after a restart."""
    options = (*OPTIONS, "--tenant-header", "Authorization")
    text = "What does the handbook say of lateness?" * 9
    server = servers.kvstore(tmp_path / "store", tiny_model, *options)
    with ThreadPoolExecutor() as pool:
        told = list(pool.map(lambda key: ask(server, key, text, **alone), "ab"))
    assert told == [0, 0]
    assert ask(server, "a", text, **alone) > 300
    server.stop()
    server = servers.kvstore(tmp_path / "store", tiny_model, *options)
    told = [ask(server, key, text, **alone) for key in "cab"]
    assert [found > 300 for found in told] == [False, True, True]
    assert told[0] == 0
    assert not any("unknown tenant" in each.text() for each in servers.started)


def test_what_the_operator_names_is_found_by_all(
    servers, tiny_model, tmp_path, run_cli
):
    """Its rows, and no more of what lies beside them."""
    store = tmp_path / "store"
    system = {"role": "system", "content": HANDBOOK}
    for name, text in [("handbook", "x"), ("private", "yes, the secret is 4711.")]:
        file = tmp_path / "request.json"
        file.write_text(
            json.dumps({"messages": [system, {"role": "user", "content": text}]})
        )
        words = ("--model", tiny_model, "--request", file, "--name", name)
        code, _, err = run_cli("save", *words, "--codec", "raw")
        assert code == 0, err
    options = (*OPTIONS, "--tenant-header", "X-User", "--shared", "handbook")
    server = servers.kvstore(store, tiny_model, *options)
    told = [
        ask(server, "-", HANDBOOK, text, headers={"X-User": text[-4:]})
        for text in ("yes, the secret is 4711.", "yes, it is not known to me")
    ]
    with kvstore.Store(store, create=False) as opened:
        num_tokens = opened.entry("handbook").num_tokens
    assert told[0] == told[1]
    assert len(HANDBOOK) < told[0] < num_tokens


def counters(server, token):
    """Return with what status the counters are told, and whether there are any."""
    request = urllib.request.Request(f"{server.url}/metrics")
    request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, b"kvstore_" in answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b"kvstore_" in error.read()


def test_who_does_not_say_who_asks_is_refused(
    servers, tiny_model, tmp_path, monkeypatch
):
    """Nor is a client told how much others ask: the counters are the operator's."""
    monkeypatch.setenv("KVSTORE_TOKEN", "operator")
    options = (*OPTIONS, "--tenant-header", "X-User")
    server = servers.kvstore(tmp_path / "store", tiny_model, *options)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    status, text = server.post("/v1/chat/completions", body)
    assert (status, b"X-User" in text) == (400, True)
    assert counters(server, "thief") == (403, False)
    assert counters(server, "operator") == (200, True)
    assert "operator" not in server.text()


def test_an_entry_to_share_must_be_there(kvstore_cli, tiny_model):
    """Before anything is served."""
    words = ("serve", "--model", tiny_model, "--port", "0", "--shared", "nobody")
    assert kvstore_cli(*words).returncode == 2
    done = kvstore_cli(*words, "--tenant-header", "X-User")
    assert (done.returncode, "nobody" in done.stderr) == (1, True)


@pytest.mark.parametrize("name", ["X-T:", "", "X T", "X-T\n", "Ä"])
def test_a_header_must_be_one(kvstore_cli, tiny_model, name):
    """Else each request would be refused."""
    words = ("serve", "--model", tiny_model, "--port", "0", "--tenant-header", name)
    done = kvstore_cli(*words)
    assert (done.returncode, "name of a header" in done.stderr) == (2, True)


@pytest.mark.parametrize("values", [[], [""], ["  "], ["a", "b"]])
def test_a_tenant_is_named_once(values):
    """A proxy that adds its header to a client's own names none."""
    headers = Message()
    for value in values:
        headers["X-User"] = value
    with pytest.raises(ValueError, match="X-User"):
        find_tenant(headers, "X-User")


@pytest.mark.parametrize("tenant", ["mine", "another"])
def test_nobody_waits_for_what_another_asked(tenant):
    """What is on its way to the disk is waited for by its own tenant alone."""
    tokens, model = list(range(1000)), kvstore.Fingerprint({"weights": "a"}, "a")
    asked = []
    origin = SimpleNamespace(fingerprint=model.with_salt(tenant).fields)
    job = SimpleNamespace(
        tokens=tokens, snapshot=SimpleNamespace(chain=SimpleNamespace(origin=origin))
    )
    disk = SimpleNamespace(
        store=SimpleNamespace(speeds=lambda fingerprint: Speeds(None, None)),
        _writer=SimpleNamespace(wait_for=lambda is_near, _: asked.append(is_near(job))),
    )
    served = ServedModel(model.with_salt("mine"), ())
    Disk._wait_for_near(disk, served, tokens, 0)
    assert asked == [tenant == "mine"]


def test_a_key_is_not_stored():
    """Only a digest of it, another for each key."""
    found = []
    for key in ("Bearer a", "Bearer b"):
        headers = Message()
        headers["Authorization"] = key
        found.append(find_tenant(headers, "authorization"))
        assert key not in found[-1]
    assert found[0] != found[1]


def test_slices_keep_their_tenant():
    """As mlx-lm's server makes them."""
    tokens = OwnedTokens([1, 2, 3], "a")
    assert (tokens[:2], tokens[:2].tenant, tokens[1]) == ([1, 2], "a", 2)
    assert tokens[:].tenant == "a"
