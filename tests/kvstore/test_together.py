"""Chats, a server and `prune` on one store, at once, killed now and then: all is right.

This file is also the program that its tests start. The oracle is a file in which each
chat notes a digest of the rows that it computed, after every turn that was kept.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from kit import load_beside

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CODECS = ("planes+zstd", "raw")

RULES = [(11 * i) % 250 for i in range(100)]  # all chats begin like this
MAX_TOKENS = 900  # of a conversation; the next turn begins another
NUM_QUESTIONS = 12


beside = load_beside("servers")


@dataclass(frozen=True)
class Size:
    """How much goes on, and for how long at least."""

    seconds: float
    num_chats: int
    kill_every_s: float


SHORT, LONG = Size(20, 3, 2.5), Size(120, 10, 1.5)


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(SHORT, id="short"),
        pytest.param(LONG, id="long", marks=pytest.mark.slow),
    ],
)
def test_all_at_once_is_all_right(store_path, tiny_model, tmp_path, size):
    """No load is wrong, nothing kept is lost, and only who is killed fails."""
    together = Together(store_path, tiny_model, tmp_path, size)
    try:
        together.run()
    finally:
        together.close()
    assert together.problems == []
    assert find_problems(together) == []
    print(together.counts())
    assert together.is_enough()


def test_a_save_gets_through_however_often_prune_comes(store_path, caches, monkeypatch):
    """Blocks that are freed before the entry is there are written under the lock."""
    import kvstore
    from kvstore.ops import save

    write = save.save_blocks

    def write_and_prune(*arguments):
        write(*arguments)
        with kvstore.Store(store_path) as other:
            assert other.plan_prune(now=True).execute() > 0

    monkeypatch.setattr(save, "save_blocks", write_and_prune)
    tokens, prompt_cache = caches.make_conversation(3, 1)
    with kvstore.Store(store_path, "raw") as store:
        store.save(tokens, prompt_cache, caches.MODEL, name="chat")
        assert store.load_entry("chat", caches.MODEL)[1] == tokens


class Together:
    """All the processes of a test.

    Attributes:
        problems: What went wrong, a line each.
    """

    def __init__(self, store, model, folder, size):
        self.store, self.model, self.folder, self.size = store, model, folder, size
        self.servers = beside.Servers(folder / "home")
        self.problems = []
        self.num_kills = self.num_answers = 0
        self._children = []
        self._is_over = threading.Event()

    def run(self):
        """Let all go on at once until the time is up and enough was done."""
        # Its own expectation, from a server that has no store.
        expected = self._ask_all(self.servers.stock(self.model))
        server = self.servers.kvstore(
            self.store, self.model, "--codec", CODECS[0], "--prompt-cache-size", "1"
        )
        asker = threading.Thread(target=self._ask, args=(server, expected))
        asker.start()
        pruner = self._start("prune", "pruner")
        chats = [self._start("chat", number) for number in range(self.size.num_chats)]
        self._kill_and_resume(chats)
        self._is_over.set()
        self._stop.touch()
        asker.join()
        for child in self._children:
            self._end(child)
        self._end(pruner)
        if server.stop():
            self.problems.append(f"the server failed:\n{server.text()[-3000:]}")
        if "Traceback" in server.text():
            self.problems.append(f"the server is broken:\n{server.text()[-3000:]}")

    def _start(self, verb, number):
        words = [verb, self.store, self.model, self.notes(number), number, self._stop]
        log = self.folder / f"{verb}-{number}.log"
        with log.open("ab") as file:
            child = subprocess.Popen(
                [sys.executable, __file__, *map(str, words)],
                stdout=file,
                stderr=file,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            )
        child.log, child.number = log, number
        child.num_turns = self._num_turns(number)
        self._children.append(child)
        return child

    def _end(self, child):
        """Wait for an end, which is to be a good one."""
        if child.wait(timeout=120):
            end = child.log.read_text(errors="replace")[-3000:]
            self.problems.append(
                f"{child.args[2]} ended with {child.returncode}: {end}"
            )

    def _kill_and_resume(self, chats):
        """Kill one chat after the other, and have it go on where it was."""
        chance = random.Random(self.size.num_chats)
        begin = time.monotonic()
        while time.monotonic() < begin + self.size.seconds or not self.is_enough():
            time.sleep(self.size.kill_every_s * chance.uniform(0.5, 1.5))
            chat = chance.choice(chats)
            if any(child.poll() is not None for child in self._children):
                return  # it has failed
            # On a slow machine, a chat would be killed before it has said anything.
            if self._num_turns(chat.number) > chat.num_turns:
                chat.send_signal(signal.SIGKILL)
                chat.wait()
                self._children.remove(chat)
                self.num_kills += 1
                chats[chats.index(chat)] = self._start("chat", chat.number)

    def _ask(self, server, expected):
        """Ask the server again and again, two at a time now and then."""
        chance = random.Random(1)
        try:
            while not self._is_over.is_set():
                number = chance.randrange(NUM_QUESTIONS)
                text = beside.said(server.ask(question(number)))
                self.num_answers += 1
                if text != expected[number]:
                    self.problems.append(f"question {number}: {text!r}")
        except Exception as error:  # a thread's own would be lost
            self.problems.append(f"question {number}: {error!r}")

    def _ask_all(self, server):
        found = [beside.said(server.ask(question(i))) for i in range(NUM_QUESTIONS)]
        server.stop()
        return found

    @property
    def _stop(self):
        """The file that tells all children to end."""
        return self.folder / "stop"

    def notes(self, number):
        """Return where a chat notes what was kept, or the pruner what went."""
        return self.folder / f"notes-{number}"

    def _num_turns(self, number):
        """Return how many turns a chat has noted."""
        return sum(bool(note["rows"]) for note in read_notes(self.notes(number)))

    def counts(self):
        """Return how much has gone on."""
        numbers = range(self.size.num_chats)
        return {
            "turns": sum(map(self._num_turns, numbers)),
            "kills": self.num_kills,
            "answers": self.num_answers,
            **read_notes(self.notes("pruner"), {"prunes": 0, "evicted": 0})[-1],
        }

    def is_enough(self):
        """Say whether so much has gone on that a fault would have shown."""
        counts = self.counts()
        return (
            counts["turns"] > 2 * self.size.num_chats
            and counts["kills"] > 0
            and counts["answers"] > NUM_QUESTIONS
            and counts["prunes"] > 10
            and counts["evicted"] > 0
        )

    def close(self):
        """Kill what still runs."""
        for child in self._children:
            if child.poll() is None:
                child.kill()
                child.wait()
        self.servers.close()


def question(number):
    """Return what the server is asked: one of a few prompts, half of which share."""
    system = {"role": "system", "content": "Answer at length. " * 15}
    user = {"role": "user", "content": f"{number} of many questions. " * (number + 5)}
    return [system] * (number % 2) + [user]


def find_problems(together):
    """Return what is wrong with the store when all have ended."""
    import kvstore
    from kvstore.models.load import load_model

    model, _, fingerprint = load_model(str(together.model))
    problems = []
    with kvstore.Store(together.store, create=False) as store:
        for found in store.verify(read_data=1.0):
            problems.append(f"{found.kind}: {found.detail}")
        for number in range(together.size.num_chats):
            notes = read_notes(together.notes(number))
            problems += check(store, model, fingerprint, name_of(number), notes)
        for entry in store.entries():
            store.load_entry(entry.id, None)
    return problems


# What the processes do.


def name_of(number):
    """Return the name of a chat's entry."""
    return f"chat {number}"


def read_notes(path, *before):
    """Return what a process has noted, without a line that a kill cut short."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [*before, *map(json.loads, lines)]


def digest_tokens(tokens):
    """Return a digest of tokens."""
    return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()


def digest_rows(prompt_cache, num_tokens):
    """Return a digest of the leading rows of all layers."""
    import mlx.core as mx

    found = hashlib.sha256()
    for cache in prompt_cache:
        for side in (cache.keys, cache.values):
            rows = mx.contiguous(side[..., :num_tokens, :])
            found.update(bytes(memoryview(rows.view(mx.uint8))))
    return found.hexdigest()


def check(store, model, fingerprint, name, notes):
    """Return what is wrong with a chat's entry, by what was noted of it.

    The last turn that was kept is there, or one that was begun after it.
    """
    from kvstore.errors import EntryNotFoundError

    kept = [i for i, note in enumerate(notes) if note["rows"]]
    if not kept:
        return []
    fitting = notes[kept[-1] :]
    try:
        prompt_cache, tokens = store.load_entry(name, fingerprint)
    except EntryNotFoundError:
        return [f"{name}: lost"]
    for note in fitting:
        num_tokens = note["num_tokens"]
        if digest_tokens(tokens[:num_tokens]) != note["tokens"]:
            continue
        if note["rows"] and digest_rows(prompt_cache, num_tokens) != note["rows"]:
            return [f"{name}: rows differ from those that were computed"]
        if not is_computed_from(model, prompt_cache, tokens):
            return [f"{name}: rows are not those of its tokens"]
        return []
    return [f"{name}: {len(tokens)} other tokens than were kept"]


def is_computed_from(model, prompt_cache, tokens):
    """Say whether rows are, nearly, those that the model computes for the tokens."""
    import mlx.core as mx

    from kvstore.models.session import prefill

    fresh = prefill(model, tokens)
    return all(
        mx.allclose(
            mine[..., : len(tokens), :], theirs[..., : len(tokens), :], atol=1e-3
        )
        for held, again in zip(prompt_cache, fresh, strict=True)
        for mine, theirs in ((held.keys, again.keys), (held.values, again.values))
    )


def chat(store_path, model_path, notes_path, number, stop):
    """Talk, a turn after the other, each from what the store holds."""
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    import kvstore
    from kvstore.models import LiveCache, SamplingOptions, load_models, stream_generate
    from kvstore.models.session import entry_tokens

    loaded = load_models(model_path)
    model, fingerprint = loaded.model, loaded.fingerprint
    notes_path, name = Path(notes_path), name_of(number)
    notes = read_notes(notes_path)
    chance = random.Random(f"{number} {len(notes)}")
    mx.random.seed(chance.randrange(1 << 30))
    with (
        kvstore.Store(store_path, CODECS[int(number) % 2], create=False) as store,
        notes_path.open("a", buffering=1) as file,
    ):

        def note(tokens, prompt_cache):
            rows = prompt_cache and digest_rows(prompt_cache, len(tokens))
            found = {"num_tokens": len(tokens), "tokens": digest_tokens(tokens)}
            notes.append(found | {"rows": rows})
            file.write(json.dumps(notes[-1]) + "\n")

        while not os.path.exists(stop):
            problems = check(store, model, fingerprint, name, notes)
            assert not problems, problems
            held = entry_tokens(store, name, fingerprint) or []
            begins = not held or len(held) > MAX_TOKENS
            prompt = RULES if begins else held
            prompt = prompt + [chance.randrange(250) for _ in range(40)]
            if begins:
                note(prompt, None)
            live = LiveCache()
            for _ in stream_generate(
                loaded,
                prompt,
                store=store,
                name=name,
                replace=begins,
                live=live,
                sampling=SamplingOptions(chance.randint(1, 12), make_sampler(1.0)),
            ):
                pass
            note(live.tokens, live.prompt_cache)


def prune(store_path, _model, notes_path, _number, stop):
    """Free all that can be freed, and evict what has no name, again and again."""
    import contextlib
    import io

    from kvstore.cli import cli
    from kvstore.cli.failures import run

    num_prunes = num_evicted = 0
    while not os.path.exists(stop):
        said = io.StringIO()
        what = ["--now"] if num_prunes % 3 else ["--now", "--max-size", "300kB"]
        with contextlib.redirect_stdout(said):
            code = run(cli, ["--store", store_path, "--json", "prune", "-y", *what])
        assert code == 0, said.getvalue()
        num_evicted += len(json.loads(said.getvalue())["entries"])
        num_prunes += 1
        with open(notes_path, "a") as file:
            file.write(
                json.dumps({"prunes": num_prunes, "evicted": num_evicted}) + "\n"
            )


if __name__ == "__main__":
    {"chat": chat, "prune": prune}[sys.argv[1]](*sys.argv[2:])
