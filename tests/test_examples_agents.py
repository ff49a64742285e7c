"""examples/agents: the callback, the files, and LiteLLM before our server."""

import importlib.util
import json
import os
import shutil
import subprocess
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from kit import load_beside

beside = load_beside("servers")
FOLDER = Path(__file__).parent.parent / "examples" / "agents"
LITELLM = shutil.which("litellm")


@pytest.fixture(scope="module")
def stable():
    """The callback's module; LiteLLM need not be there."""
    path = FOLDER / "stable_prompt.py"
    spec = importlib.util.spec_from_file_location("stable_prompt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def messages_request(number, tools):
    """Return a request as Claude Code posts it to /v1/messages."""
    header = f"x-anthropic-billing-header: cc_version=2.1.38; cch={number:05x};"
    rules = "You are an interactive agent. Help with the files of this folder. " * 8
    return {
        "model": "claude-opus-4-8",
        "max_tokens": 8,
        "system": [
            {"type": "text", "text": header},
            {"type": "text", "text": rules, "cache_control": {"type": "ephemeral"}},
        ],
        "tools": [
            {"name": name, "description": name, "input_schema": {"type": "object"}}
            for name in tools
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What is here?"}]}
        ],
    }


def chat_request(number, tools):
    """Return a request as others post it to /v1/chat/completions."""
    head = f"You help.\nCurrent time: 09:{number:02}:17\nSession ID: {number}\nBriefly."
    return {
        "messages": [
            {"role": "system", "content": head},
            {"role": "user", "content": "Current time: what does that mean?"},
        ],
        "tools": [{"type": "function", "function": {"name": n}} for n in tools],
    }


@pytest.mark.parametrize("make", [messages_request, chat_request])
def test_what_changes_is_taken_out_of_the_front(stable, make):
    """Two requests of a session are the same; what the user says is left alone."""
    first, second = make(1, ["Write", "Bash"]), make(2, ["Bash", "Write"])
    made = stable.make_stable(first)
    assert made == stable.make_stable(second) == stable.make_stable(made)
    assert made["messages"][-1] == first["messages"][-1]
    assert first == make(1, ["Write", "Bash"])
    assert "billing" not in json.dumps(made)
    assert [stable.tool_name(tool) for tool in made["tools"]] == ["Bash", "Write"]


def test_what_has_no_front_is_left_alone(stable):
    """Such as a prompt for completions, or an answer's tokens to be counted."""
    for request in ({"prompt": "Hi"}, {"messages": None}, {"input": "Hi", "tools": []}):
        assert stable.make_stable(request) == request


def test_the_files_can_be_read():
    """And lead to where the page says that the two servers listen."""
    found = {
        "claude-settings.json": json.loads,
        "opencode.json": json.loads,
        "codex.toml": tomllib.loads,
    }
    for name, load in found.items():
        assert load((FOLDER / name).read_text())
    page = (FOLDER / "README.md").read_text()
    for path in FOLDER.glob("*.*"):
        assert path.name in page or path.name == "README.md"
        if path.suffix in (".json", ".toml", ".yml"):
            assert any(f"127.0.0.1:{port}" in path.read_text() for port in (4000, 8080))


def post(url, body):
    """Return what is answered."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


@pytest.fixture
def proxy(tiny_model, tmp_path):
    """Address of LiteLLM's proxy with the example's files, before our server."""
    servers, port = beside.Servers(tmp_path / "home"), beside.free_port()
    server = servers.kvstore(tmp_path / "store", tiny_model)
    shutil.copytree(FOLDER, tmp_path / "agents")
    config = tmp_path / "agents" / "litellm.yaml"
    config.write_text(config.read_text().replace(":8080", f":{server.port}"))
    process = subprocess.Popen(
        [LITELLM, "--config", config, "--host", "127.0.0.1", "--port", str(port)],
        cwd=config.parent,
        env={name: os.environ[name] for name in ("PATH", "HOME")},
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveliness")
            break
        except OSError:
            time.sleep(0.2)
    yield f"http://127.0.0.1:{port}/v1"
    process.terminate()
    process.wait(timeout=60)
    servers.close()


@pytest.mark.slow
@pytest.mark.skipif(LITELLM is None, reason="LiteLLM is not installed")
def test_a_second_request_through_litellm_is_held(proxy):
    """Of Anthropic's API, with another billing header and order; and of the others."""
    post(f"{proxy}/messages", messages_request(1, ["Write", "Bash"]))
    usage = post(f"{proxy}/messages", messages_request(2, ["Bash", "Write"]))["usage"]
    assert usage["input_tokens"] == 1
    assert usage["cache_read_input_tokens"] > 500
    asked = {"model": "m", "input": "And you? " * 40, "max_output_tokens": 8}
    held = [
        post(f"{proxy}/responses", asked)["usage"]["input_tokens_details"]
        for _ in range(2)
    ]
    assert held[1]["cached_tokens"] > 300
    asked = {"model": "m", "max_tokens": 8, **chat_request(1, ["b", "a"])}
    asked["messages"][0]["content"] += " Be kind." * 20
    for number in (1, 2):
        head = asked["messages"][0]["content"].replace("09:01", f"09:0{number}")
        asked["messages"][0]["content"] = head
        found = post(f"{proxy}/chat/completions", asked)["usage"]
    assert found["kvstore"]["computed_tokens"] == 1
