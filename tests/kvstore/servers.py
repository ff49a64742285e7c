"""Servers in processes of their own, ours and mlx-lm's, and what a client asks them.

Their logs go to files, of which the tests that fail show the end.
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

# On the same BLAS as ours, since another one rounds otherwise.
STOCK = """
from kvstore.blas import load_openblas
load_openblas()
from mlx_lm.server import main
main()
"""
# A file that would become longer cannot be written, as on a full disk.
LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from kvstore.cli import main
main()
"""
# Differ from one answer to the next, and nobody cares.
UNSTABLE = ("id", "created", "system_fingerprint")


def kept(text):
    """Return the number of tokens of each save that a log tells of."""
    return [int(number) for number in re.findall(r"kvstore: kept (\d+) tokens", text)]


class Server:
    """A server on a port of its own.

    Args:
        words: Python's own arguments, but for the port.
        folder: For its log and for an empty cache of the Hugging Face Hub.
    """

    def __init__(self, words, folder):
        self.port = free_port()
        self.log = folder / f"server-{self.port}.log"
        (folder / "hub").mkdir(parents=True, exist_ok=True)
        words = [*words, "--port", self.port]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=os.environ | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"},
            )
        self._client = None

    @property
    def url(self):
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self):
        """The official client of the API; never tries again."""
        import openai

        if self._client is None:
            self._client = openai.OpenAI(
                base_url=f"{self.url}/v1", api_key="-", max_retries=0, timeout=300
            )
        return self._client

    def wait(self, timeout_s=300):
        """Wait until it answers; return itself."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=60):
                    return self
            except urllib.error.HTTPError:
                break  # it cannot load its model
            except OSError:
                time.sleep(0.05)
        raise AssertionError(f"the server does not answer:\n{self.text()[-4000:]}")

    def text(self):
        """Return what it has logged so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, words, timeout_s=300):
        """Wait until it has logged some words."""
        self._wait_until(lambda text: words in text, words, timeout_s)

    def wait_for_saves(self, number, timeout_s=300):
        """Wait until so many prompt caches are on disk."""
        self._wait_until(
            lambda text: len(kept(text)) >= number, f"kept, {number} times", timeout_s
        )

    def wait_for_kept(self, num_tokens, timeout_s=300):
        """Wait until so many tokens of one conversation are on disk."""
        self._wait_until(
            lambda text: any(number >= num_tokens for number in kept(text)),
            f"kept {num_tokens} tokens",
            timeout_s,
        )

    def _wait_until(self, is_said, what, timeout_s):
        deadline = time.monotonic() + timeout_s
        while not is_said(self.text()):
            assert time.monotonic() < deadline, f"it does not say: {what}"
            time.sleep(0.01)

    def stop(self, number=signal.SIGTERM):
        """Send a signal, wait for the end and return the exit code."""
        if self._client is not None:
            self._client.close()
            self._client = None
        self.process.send_signal(number)
        return self.process.wait(timeout=300)

    def post(self, path, body):
        """Send bytes, or JSON; return status and body, 0 where it just hangs up."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except http.client.RemoteDisconnected:
            return 0, b""

    def leave(self, path, body, until):
        """Send a request and hang up as soon as some bytes have come back."""
        with self.begin(path, body, until):
            pass

    @contextmanager
    def begin(self, path, body, until):
        """Send a request and go on as soon as some bytes have come back."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(head.encode() + data)
            received = b""
            while until not in received:
                received += (piece := connection.recv(4096))
                assert piece, f"the server has hung up after {received!r}"
            yield

    def ask(self, messages, **options):
        """Return what the chat answers."""
        options = {"model": "default_model", "max_tokens": 8} | options
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.client.chat.completions.create(messages=messages, **options)

    def stream(self, messages, **options):
        """Return what a chat streams, and how long its first token takes."""
        options |= {"stream": True, "stream_options": {"include_usage": True}}
        begin, seconds, text = time.monotonic(), None, ""
        for chunk in self.ask(messages, **options):
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if piece and seconds is None:
                seconds = time.monotonic() - begin
            text += piece or ""
        return Streamed(seconds, text, chunk.usage.prompt_tokens, cached(chunk))

    def complete(self, prompt, **options):
        """Return what follows a text."""
        options = {"model": "default_model", "max_tokens": 8} | options
        return self.client.completions.create(prompt=prompt, **options)


@dataclass(frozen=True)
class Streamed:
    """What a stream said.

    Attributes:
        seconds: From the request to the first token.
        text: All of it.
        num_prompt: Tokens of the prompt.
        num_cached: Those of them that were held.
    """

    seconds: float
    text: str
    num_prompt: int
    num_cached: int


class Servers:
    """Starts servers, and ends those that still run.

    Args:
        folder: For their logs.
    """

    def __init__(self, folder):
        self.folder = folder
        self.started = []

    def kvstore(self, store, model, *options, max_file_bytes=None):
        """Start ours and wait for it; no file can become longer than it may."""
        start = ("-m", "kvstore") if max_file_bytes is None else ("-c", LIMITED)
        limit = () if max_file_bytes is None else (max_file_bytes,)
        words = ("--store", store, "serve", "--model", model, *options)
        return self._start(*start, *limit, *words)

    def stock(self, model, *options):
        """Start mlx-lm's and wait for it."""
        return self._start("-c", STOCK, "--model", model, *options)

    def _start(self, *words):
        self.started.append(Server(words, self.folder))
        return self.started[-1].wait()

    def close(self):
        """Kill what still runs."""
        for server in self.started:
            if server.process.poll() is None:
                server.process.kill()
                server.process.wait()

    def print_logs(self, seen):
        """Print what was logged beyond what was seen; pytest shows it of a failure."""
        for server in self.started:
            new = server.text()[seen.get(server.port, 0) :]
            if new:
                print(f"--- log of the server on port {server.port}\n{new[-6000:]}")


# One for each port of a server.
_bound: list[socket.socket] = []


def free_port():
    """Return a port that nobody listens on."""
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
    if sys.platform == "linux":
        # As long as it is bound, nobody is given it; a server that asks for it is.
        _bound.append(probe)
    else:
        probe.close()
    return port


def cached(answer):
    """Return how many tokens of the prompt were held."""
    return answer.usage.prompt_tokens_details.cached_tokens


def said(answer):
    """Return the text of an answer."""
    return answer.choices[0].message.content


def plain(answer):
    """Return an answer without what differs from one run to the next.

    Nor has it what only ours says: where the tokens that it held came from.
    """
    found = answer if isinstance(answer, dict) else answer.model_dump()
    if isinstance(found.get("usage"), dict):
        usage = found["usage"].items()
        found["usage"] = {key: value for key, value in usage if key != "kvstore"}
    return {key: value for key, value in found.items() if key not in UNSTABLE}


TOOL_CALL = '{"name": "look_up", "arguments": {"word": "cache"}}'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look up a word.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string"}},
                "required": ["word"],
            },
        },
    }
]
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for tool_call in message.tool_calls or [] %}<tool_call>{{ tool_call.name }}"
    "{{ tool_call.function | tojson }}</tool_call>{% endfor %}"
    "{{ message['content'] or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


CALL = ("<tool_call>", TOOL_CALL, "</tool_call>")


def write_tool_model(folder, tiny_model, chain=CALL, template=TOOL_TEMPLATE):
    """Write a model that answers every prompt with a tool call; return its folder.

    What a token is followed by stands in a table: attention and MLP add nothing.

    Args:
        folder: Where to.
        tiny_model: Whose tokenizer it has.
        chain: All that it says, as tokens of its own.
        template: What its messages are rendered by.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs
    from tokenizers import AddedToken, Tokenizer

    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in chain])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((tiny_model / "tokenizer_config.json").read_text())
    settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    size = -(-tokenizer.get_vocab_size() // 8) * 8
    config = json.loads((tiny_model / "config.json").read_text())
    config |= {"vocab_size": size, "hidden_size": size, "tie_word_embeddings": False}
    mx.random.seed(0)
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = mx.zeros_like(weights[name])
    ends = [tokenizer.encode("\n").ids[0], *map(tokenizer.token_to_id, chain)]
    table = mx.zeros((size, size))
    for token, following in zip(ends, [*ends[1:], config["eos_token_id"]], strict=True):
        table[following, token] = 1
    weights["model.embed_tokens.weight"] = mx.eye(size)
    weights["lm_head.weight"] = table
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder, model, seed=0):
    """Write a LoRA adapter that changes what a model says; return its folder."""
    import mlx.core as mx

    folder.mkdir()
    config = json.loads((model / "config.json").read_text())
    layers, rank = config["num_hidden_layers"], 4
    keys = ["self_attn.v_proj", "self_attn.k_proj"]
    scale = {"rank": rank, "scale": 20.0, "dropout": 0.0, "keys": keys}
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": scale}
        )
    )
    mx.random.seed(seed)
    width = config["num_key_value_heads"] * config["head_dim"]
    weights = {
        f"model.layers.{layer}.{key}.{name}": mx.random.normal(shape) * 0.3
        for layer in range(layers)
        for key in keys
        for name, shape in (
            ("lora_a", (config["hidden_size"], rank)),
            ("lora_b", (rank, width)),
        )
    }
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    return folder
