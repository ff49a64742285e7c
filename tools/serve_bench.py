"""What the disk tier costs a server: time per token, and the longest stall.

Stock servers and `kvstore serve` run side by side on one model. Conversations of fresh
text go to each of them in turn, in random order, so that a machine that is slower for a
while is so for all; on Linux, what was measured while other programs were at work is
measured again. Two stock servers show what the procedure itself can tell apart. Then a
prompt cache of 2,000 tokens is inserted, while another stream is running: how long that
keeps the generating thread, and which gap it makes between two tokens there.

    python tools/serve_bench.py MODEL [--pairs N] [--trials N] [--json F]
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from kvstore.blas import load_openblas

T = TypeVar("T")
CODECS = ("raw", "planes+zstd", "turbo4+zstd")
BAR = 0.02
STALL_BAR_S = 0.1
STALL_TOKENS = 2000
# Of one core, by other programs.
DISTURBED = 0.15
MAX_TRIES = 100
# A BLAS of the same speed, since ours brings one.
STOCK = """
from kvstore.blas import load_openblas
load_openblas()
from mlx_lm.server import main
main()
"""
OURS = "from kvstore.cli import main; main()"
SLOW_SYNC_S = 0.3
SLOW = f"""
import os, time
sync = os.fsync
def slow(descriptor):
    time.sleep({SLOW_SYNC_S})
    sync(descriptor)
os.fsync = slow
{OURS}
"""


@dataclass(frozen=True)
class Ratios:
    """How much longer a token takes on one server than on another.

    Attributes:
        what: Which servers.
        ratios: One per pair.
    """

    what: str
    ratios: list[float]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.ratios)

    def describe(self) -> str:
        """Return the line of the table."""
        low, _, high = statistics.quantiles(self.ratios, n=4)
        return (
            f"{self.what:28} {self.median:7.4f} {low:7.4f} {high:7.4f}"
            f" {min(self.ratios):7.4f} {max(self.ratios):7.4f} {len(self.ratios):6}"
        )


@dataclass
class Stalls:
    """What the insertion of a prompt cache does to others; seconds.

    Attributes:
        what: Which server.
        thread_s: How long it kept the generating thread; not known of the stock server.
        gap_s: The longest gap between two tokens of another stream around it.
        before_s: The longest gap in the second before.
    """

    what: str
    thread_s: list[float] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)
    before_s: list[float] = field(default_factory=list)

    def describe(self) -> str:
        """Return the line of the table."""
        columns = (self.thread_s, self.before_s, self.gap_s)
        texts = (
            f"{1000 * statistics.median(x):8.1f} {1000 * max(x):8.1f}"
            if x
            else f"{'':17}"
            for x in columns
        )
        return f"{self.what:28} {'  '.join(texts)}"


def main() -> None:
    """Measure, print and write."""
    options = parse_options()
    texts = Texts(options.model, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        print(f"{os.uname().sysname} {os.uname().machine}, {os.cpu_count()} cores")
        ratios = measure_ratios(options, texts, Path(folder))
        stalls = measure_stalls(options, texts, Path(folder))
    if options.json:
        results = {
            "ratios": {found.what: found.ratios for found in ratios},
            "stalls": [asdict(found) for found in stalls],
        }
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def parse_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or repository that mlx-lm loads")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--slow-pairs", type=int, default=8)
    parser.add_argument("--trials", type=int, default=5, help="insertions per codec")
    parser.add_argument("--gaps", type=int, default=3, help="streams per server")
    parser.add_argument("--tokens", type=int, nargs=2, default=(500, 2000))
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--codec", default="turbo4+zstd", help="of the pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class Texts:
    """Cuts text of so many tokens out of Python's manual; no two begin alike.

    Args:
        model: Whose tokens.
        seed: Of the choice.
    """

    def __init__(self, model: str, seed: int) -> None:
        from pydoc_data.topics import topics

        from mlx_lm.utils import load_tokenizer

        from kvstore.models.load import find_model

        self.chance = random.Random(seed)
        self._tokenizer = load_tokenizer(find_model(model))
        text = "\n\n".join(topics[name] for name in sorted(topics))
        self._tokens = self._tokenizer.encode(text)

    def cut(self, num_tokens: int) -> str:
        """Return text of about so many tokens."""
        start = self.chance.randrange(len(self._tokens) - num_tokens)
        text = self._tokenizer.decode(self._tokens[start : start + num_tokens])
        return f"[{self.chance.random()}] {text}"


class Server:
    """A server of its own process.

    Args:
        program: What Python runs.
        words: Its options, but for the port.
        folder: For its log, and as home of an empty cache of the Hugging Face Hub.
    """

    def __init__(self, program: str, words: Sequence[Any], folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (folder / "hub").mkdir(exist_ok=True)
        self._log = folder / f"{self.port}.log"
        command = [sys.executable, "-c", program, *words, "--port", self.port]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdout=log,
                stderr=log,
                env={**os.environ, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"},
            )

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def wait(self) -> None:
        """Wait until it answers, with its model loaded."""
        while True:
            if self._process.poll() is not None:
                raise SystemExit(self._log.read_text()[-3000:])
            try:
                list(self.stream([{"role": "user", "content": "Hi"}], 1))
                return
            except ConnectionError:
                time.sleep(0.1)

    def stream(
        self, messages: Sequence[dict[str, str]], max_tokens: int
    ) -> Iterator[tuple[float, str]]:
        """Yield when each piece of an answer came, and the piece."""
        body = {"messages": messages, "max_tokens": max_tokens, "stream": True}
        # Ends of text are as unlikely as can be: all answers are equally long.
        body["logit_bias"] = {str(token): -1000 for token in range(3)}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    (choice,) = json.loads(line[6:])["choices"]
                    if piece := choice["delta"].get("content"):
                        yield time.perf_counter(), piece
        finally:
            connection.close()

    def stop(self) -> None:
        """End it; what waits is written."""
        self._process.terminate()
        self._process.wait()


@contextmanager
def running(servers: dict[str, Server]) -> Iterator[dict[str, Server]]:
    """Wait for servers, and end them."""
    try:
        for server in servers.values():
            server.wait()
        yield servers
    finally:
        for server in servers.values():
            server.stop()


def stock(options: argparse.Namespace, folder: Path) -> Server:
    """Start mlx-lm's server."""
    return Server(STOCK, ["--model", options.model], folder)


def ours(
    options: argparse.Namespace, folder: Path, codec: str, program: str = OURS
) -> Server:
    """Start `kvstore serve` on an empty store."""
    store = tempfile.mkdtemp(dir=folder)
    words = ["--store", Path(store) / "store", "serve", "--model", options.model]
    return Server(program, [*words, "--codec", codec, "--min-free", "0"], folder)


def measure_ratios(
    options: argparse.Namespace, texts: Texts, folder: Path
) -> list[Ratios]:
    """Measure the time per token of ours against the stock server's, and print it."""
    print("\ntime per generated token, in pairs")
    print(f"{'':28}  MEDIAN   LOW 4  HIGH 4     MIN     MAX  PAIRS")
    found = []
    with ExitStack() as stack:
        names = {
            "stock": stock(options, folder),
            "another stock server": stock(options, folder),
            f"kvstore, {options.codec}": ours(options, folder, options.codec),
        }
        servers = stack.enter_context(running(names))
        found += compare(servers, options.pairs, options, texts)
    slow = f"kvstore, each sync +{SLOW_SYNC_S} s"
    names = {
        "stock": stock(options, folder),
        slow: ours(options, folder, options.codec, SLOW),
    }
    with running(names) as servers:
        found += compare(servers, options.slow_pairs, options, texts)
    bar = max(BAR, abs(found[0].median - 1))
    verdict = "within" if found[1].median - 1 <= bar else "OVER"
    print(f"bar {100 * bar:.1f} %: {verdict}")
    return found


def compare(
    servers: dict[str, Server],
    pairs: int,
    options: argparse.Namespace,
    texts: Texts,
) -> list[Ratios]:
    """Return and print how the others compare with the first."""
    first, *others = servers
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(pairs):
        size = texts.chance.randint(*options.tokens)
        for name in texts.chance.sample(list(servers), len(servers)):
            seconds[name].append(
                undisturbed(
                    partial(token_s, servers, name, texts, size, options.max_tokens)
                )
            )
    found = []
    for name in others:
        ratios = [b / a for a, b in zip(seconds[first], seconds[name], strict=True)]
        found.append(Ratios(name, ratios))
        print(found[-1].describe(), flush=True)
    return found


class Quiet:
    """Knows whether other programs have been at work; never of a Mac.

    Args:
        servers: Whose own work does not count.
    """

    def __init__(self, servers: dict[str, Server]) -> None:
        self._servers = servers
        self._began, self._before = time.perf_counter(), others_s(servers)

    def was(self) -> bool:
        """Say whether they have left the machine alone since this was made."""
        seconds = time.perf_counter() - self._began
        return others_s(self._servers) - self._before < DISTURBED * seconds


def undisturbed(measure: Callable[[], T | None]) -> T:
    """Return what was measured; ``None`` where other programs were at work."""
    for _ in range(MAX_TRIES):
        # What is written behind the last answer is not to slow down this one.
        time.sleep(1.5)
        found = measure()
        if found is not None:
            return found
    raise SystemExit(f"other programs are at work all the time: {MAX_TRIES} times")


def others_s(servers: dict[str, Server]) -> float:
    """Return the seconds of processor time that other programs have had; 0 on a Mac."""
    if not Path("/proc/stat").exists():
        return 0.0
    ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    # All but idle, waiting, and guests, which are counted as users.
    total = sum(ticks[:8]) - ticks[3] - ticks[4]
    for pid in [os.getpid(), *(server.pid for server in servers.values())]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total -= int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def token_s(
    servers: dict[str, Server], name: str, texts: Texts, size: int, max_tokens: int
) -> float | None:
    """Return the mean time between two tokens of a conversation of two turns.

    The second turn follows at once, while a server with a store writes the first.
    """
    messages = [{"role": "system", "content": texts.cut(size)}]
    spent, count = 0.0, 0
    for question in ("What is this about?", "Say it in other words."):
        messages.append({"role": "user", "content": question})
        answer = servers[name].stream(messages, max_tokens)
        begin, text = next(answer)
        quiet = Quiet(servers)
        pieces = list(answer)
        if not quiet.was():
            return None
        text += "".join(piece for _, piece in pieces)
        messages.append({"role": "assistant", "content": text})
        spent += pieces[-1][0] - begin
        count += len(pieces)
    return spent / count


def measure_stalls(
    options: argparse.Namespace, texts: Texts, folder: Path
) -> list[Stalls]:
    """Measure what an insertion does to others, and print it."""
    print(f"\nms while a prompt cache of {STALL_TOKENS:,} tokens is inserted")
    print(f"{'':29}{'ON THE THREAD':18} {'GAP BEFORE':18} {'GAP AROUND IT':18}")
    print(f"{'':28} {'  MEDIAN    WORST ' * 3}")
    inserted = insert_all(options, texts)
    found = []
    for name in ("stock", *CODECS):
        make: Callable[[], Server] = lambda name=name: (  # noqa: E731
            stock(options, folder) if name == "stock" else ours(options, folder, name)
        )
        row = Stalls(name, inserted.get(name, []))
        with running({name: make()}) as servers:
            for _ in range(options.gaps):
                before, around = undisturbed(partial(measure_gap, servers, name, texts))
                row.before_s.append(before)
                row.gap_s.append(around)
        print(row.describe(), flush=True)
        found.append(row)
    worst = max(seconds for row in found for seconds in row.thread_s)
    verdict = "within" if worst <= STALL_BAR_S else "OVER"
    print(f"bar {1000 * STALL_BAR_S:.0f} ms on the thread: {verdict}")
    return found


def insert_all(options: argparse.Namespace, texts: Texts) -> dict[str, list[float]]:
    """Return how long an insertion keeps the generating thread, per codec.

    Each codec has a process of its own, as a server has.
    """
    text = texts.cut(STALL_TOKENS)
    found = {}
    for codec in CODECS:
        words = [__file__, "insert", options.model, codec, str(options.trials)]
        done = subprocess.run(
            [sys.executable, *words], input=text, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        found[codec] = json.loads(done.stdout)
    return found


def insert(model: str, codec: str, trials: str) -> None:
    """Insert a prompt cache into as many empty stores, and print the seconds."""
    load_openblas()
    from mlx_lm.models.cache import make_prompt_cache

    from kvstore import Store
    from kvstore.models.load import load_model
    from kvstore.models.session import prefill
    from kvstore.server import DiskPromptCache, ServedModel

    loaded, tokenizer, fingerprint = load_model(model)
    tokens = tokenizer.encode(sys.stdin.read())[:STALL_TOKENS]
    prompt_cache = prefill(loaded, tokens)
    served = ServedModel(fingerprint, (make_prompt_cache(loaded),))
    found = []
    for _ in range(int(trials)):
        with tempfile.TemporaryDirectory() as folder:
            tier = DiskPromptCache(Store(folder + "/store", codec), lambda _: served)
            tier.insert_cache("model", tokens, prompt_cache)
            found.append(tier.longest_stall_s)
            tier.close()
    print(json.dumps(found))


def measure_gap(
    servers: dict[str, Server], name: str, texts: Texts
) -> tuple[float, float] | None:
    """Return the longest gap of a stream before and around the end of another request.

    The other one's prompt cache is inserted when its answer ends.
    """
    times: list[float] = []
    is_over = threading.Event()

    def read() -> None:
        for at, _ in servers[name].stream(
            [{"role": "user", "content": "Count."}], 4000
        ):
            times.append(at)
            if is_over.is_set():
                return

    reader = threading.Thread(target=read)
    reader.start()
    while len(times) < 3:
        time.sleep(0.01)
    prompt = [{"role": "user", "content": texts.cut(STALL_TOKENS)}]
    answer = servers[name].stream(prompt, 60)
    next(answer)
    quiet = Quiet(servers)
    *_, (end, _) = answer
    time.sleep(1.5)
    is_over.set()
    reader.join()
    if not quiet.was():
        return None
    gaps = [(b - a, b) for a, b in pairwise(times)]
    before = [gap for gap, at in gaps if end - 1.2 < at <= end - 0.2]
    around = [gap for gap, at in gaps if end - 0.2 < at <= end + 1]
    return max(before), max(around)


if __name__ == "__main__":
    if sys.argv[1:2] == ["insert"]:
        insert(*sys.argv[2:])
    else:
        main()
