"""A server whose clients hang up and talk nonsense, and whose store goes away."""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import kvstore

from .power import Disk

ROUND = 40
_CHAT = "/v1/chat/completions"
_NOT_JSON = (
    b"", b"{", b"[1,", b"\xff\xfe", b"[" * 100_000, b'{"messages": [}', b"null", b"[]",
)  # fmt: skip
_TOLD = ("kvstore: kept", "No space left", "made again", "Input/output error")
_WORDS = ("harbour", "lantern", "orchard", "glacier", "violin", "meadow")


def _prompt(number: int) -> str:
    return f"Tell me what you know of the {_WORDS[number % len(_WORDS)]}. " * 12


class Clients:
    """Asks a server for what mlx-lm's own has answered before.

    Args:
        servers: Starts servers; of the tests.
        model: Folder of a model.
        bad: Requests that are refused with 400, each with its path.
    """

    def __init__(self, servers: Any, model: Path, bad: list[tuple[str, Any]]) -> None:
        self._servers, self._model, self._bad = servers, model, bad
        stock = servers.stock(model)
        self._answers = [self._said(stock, n) for n in range(len(_WORDS))]
        stock.stop()
        self.counts: Counter[str] = Counter()
        """How many requests there were of each kind."""
        self.told: Counter[str] = Counter()
        """How many servers said what happened to them."""

    def live(self, chance: random.Random, disk: Disk) -> None:
        """Let a server live through all that can happen to its disk."""
        store = disk.path / "store"
        self._free(disk)
        shutil.rmtree(store, ignore_errors=True)
        # Without loss, so that the answers are the same; on a disk of a few MB.
        options = ("--min-tokens", "1", "--prompt-cache-size", "2", "--codec", "raw")
        options += ("--min-free", "0")
        server = self._servers.kvstore(store, self._model, *options)
        steps = [self._fill, self._free, self._delete, Disk.cut]
        for step in (None, *steps):
            if step is not None:
                step(disk)
            seeds = [chance.random() for _ in range(ROUND // (len(steps) + 1))]
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda seed: self._ask(server, seed), seeds))
            assert server.post(_CHAT, self._body(0))[0] == 200
        is_killed = chance.random() < 0.3
        code = server.stop(signal.SIGKILL if is_killed else signal.SIGTERM)
        assert is_killed or code == 0, f"exit code {code}"
        log = server.text()
        assert "Traceback" not in log, log[-4000:]
        self.told.update(words for words in _TOLD if words in log)
        disk.renew()
        with (
            suppress(kvstore.StoreNotFoundError),
            kvstore.Store(store, create=False) as opened,
        ):
            found = opened.verify()
            assert found == [], found

    def _body(self, number: int, **more: Any) -> dict[str, Any]:
        said = [{"role": "user", "content": _prompt(number)}]
        return {"messages": said, "max_tokens": 8, "temperature": 0.0, **more}

    def _said(self, server: Any, number: int) -> str:
        status, text = server.post(_CHAT, self._body(number))
        assert status == 200, text
        return str(json.loads(text)["choices"][0]["message"]["content"])

    def _ask(self, server: Any, seed: float) -> None:
        """Make one request of some kind, and hold what comes back."""
        chance = random.Random(seed)
        kinds: dict[str, Callable[[Any, random.Random], None]] = {
            "compared": self._compared,
            "given up": self._given_up,
            "no JSON": self._no_json,
            "refused": self._refused,
            "cut": self._cut,
        }
        (kind,) = chance.choices(list(kinds), weights=(8, 4, 3, 3, 2))
        kinds[kind](server, chance)
        self.counts[kind] += 1

    def _compared(self, server: Any, chance: random.Random) -> None:
        number = chance.randrange(len(_WORDS))
        assert self._said(server, number) == self._answers[number]

    def _given_up(self, server: Any, chance: random.Random) -> None:
        body = self._body(chance.randrange(len(_WORDS)), stream=True, max_tokens=200)
        server.leave(_CHAT, body, until=chance.choice((b"", b"data:")))

    def _no_json(self, server: Any, chance: random.Random) -> None:
        status, text = server.post(_CHAT, chance.choice(_NOT_JSON))
        assert status == 400, (status, text)

    def _refused(self, server: Any, chance: random.Random) -> None:
        path, body = chance.choice(self._bad)
        status, text = server.post(path, body)
        assert status == 400, (status, text, body)

    def _cut(self, server: Any, chance: random.Random) -> None:
        """Hang up in the middle of a request."""
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = f"POST {_CHAT} HTTP/1.1\r\nContent-Length: 1000\r\n\r\n".encode()
            connection.sendall(head + b'{"messages"')

    @staticmethod
    def _fill(disk: Disk) -> None:
        """Leave no byte of the disk free."""
        with suppress(OSError), (disk.path / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    @staticmethod
    def _free(disk: Disk) -> None:
        (disk.path / "filler").unlink(missing_ok=True)

    @staticmethod
    def _delete(disk: Disk) -> None:
        with suppress(FileNotFoundError):
            (disk.path / "store").rename(disk.path / "deleted")
        shutil.rmtree(disk.path / "deleted", ignore_errors=True)
